//! All address pools, by name.

use core::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::auth::identity::Identity;
use crate::config::PoolConfig;
use crate::message::emit;
use crate::pool::{Again, Pool};
use crate::report::Failure;

/// All pools.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    pools: HashMap<Arc<str>, (PoolConfig, Pool)>,
}

impl Pools {
    /// Takes over the pools of the configuration. One that is as before keeps its leases.
    pub(crate) fn configure(&mut self, configs: &[PoolConfig]) {
        let mut old = std::mem::take(&mut self.pools);
        for config in configs {
            let kept = old.remove(&config.name).filter(|(before, _)| before == config);
            let pool = kept.map(|(_, pool)| pool).or_else(|| Pool::new(config.first, config.last));
            if let Some(pool) = pool {
                self.pools.insert(Arc::clone(&config.name), (config.clone(), pool));
            }
        }
    }

    /// An address of the family from the first of the named pools that has one; `None` if none of them has this family.
    pub(crate) fn lease(
        &mut self,
        names: &[Arc<str>],
        v4: bool,
        identity: &Identity,
        wish: Option<IpAddr>,
    ) -> Result<Option<IpAddr>, Failure> {
        let identity = emit::id_body(&identity.to_data());
        let mut full = None;
        for name in names {
            let Some((_, pool)) = self.pools.get_mut(name).filter(|(_, pool)| pool.is_v4() == v4) else {
                continue;
            };
            match pool.lease(&identity, wish, Again::Same) {
                Ok(address) => return Ok(Some(address)),
                Err(_) => full = Some(name.to_string()),
            }
        }
        full.map_or(Ok(None), |name| Err(Failure::PoolFull(name)))
    }

    /// Gives an address back.
    pub(crate) fn release(&mut self, address: IpAddr) {
        if let Some((_, pool)) = self.pools.values_mut().find(|(_, pool)| pool.contains(address)) {
            pool.release(address);
        }
    }
}
