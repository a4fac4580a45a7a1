//! Threads that run the endpoint's jobs, and the system's randomness.

use std::num::NonZero;
use std::thread::Builder;

use crossbeam::channel::{Receiver, Sender, unbounded};
use postern_ike::Random;
use postern_ike::job::{Done, Job, JobId};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::mpsc::UnboundedSender;
use tracing::error;
use zeroize::{Zeroize, Zeroizing};

/// Bytes that are asked for at once, for what is short.
const STOCK: usize = 256;

/// What is longer comes from the system itself: keys and nonces, which have to differ even between two copies of this
/// machine.
const SHORT: usize = 8;

/// The system's random source. SPIs and the like come from a small stock, since a question to the system costs more than
/// they do.
pub struct System {
    source: SystemRandom,
    stock: Zeroizing<[u8; STOCK]>,
    /// Bytes of the stock that were given out, and wiped.
    used: usize,
}

impl Default for System {
    fn default() -> Self {
        Self { source: SystemRandom::new(), stock: Zeroizing::new([0; STOCK]), used: STOCK }
    }
}

impl std::fmt::Debug for System {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("System(..)")
    }
}

impl System {
    fn ask(source: &SystemRandom, out: &mut [u8]) {
        if source.fill(out).is_err() {
            // Keys that can be guessed are worse than no gateway.
            error!("the system gives no random numbers");
            std::process::abort();
        }
    }
}

impl Random for System {
    fn fill(&mut self, out: &mut [u8]) {
        if out.len() > SHORT {
            return Self::ask(&self.source, out);
        }
        if self.used + out.len() > STOCK {
            Self::ask(&self.source, self.stock.as_mut());
            self.used = 0;
        }
        if let Some(taken) = self.stock.get_mut(self.used..self.used + out.len()) {
            out.copy_from_slice(taken);
            taken.zeroize();
        }
        self.used += out.len();
    }
}

/// The threads. They end when this is dropped, each after the job that it has.
#[derive(Debug)]
pub struct Jobs {
    queue: Sender<(JobId, Job)>,
}

impl Jobs {
    /// Starts `threads` of them; results go to `done`. The queue's length is bounded by the endpoint's half-open limit:
    /// an IKE SA waits for its job before it gives out another.
    pub fn start(threads: NonZero<usize>, done: &UnboundedSender<(JobId, Done)>) -> std::io::Result<Self> {
        let (queue, jobs) = unbounded();
        for number in 0..threads.get() {
            let (jobs, done) = (jobs.clone(), done.clone());
            Builder::new().name(format!("ike-job-{number}")).spawn(move || work(&jobs, &done))?;
        }
        Ok(Self { queue })
    }

    /// Has `job` done.
    pub fn run(&self, id: JobId, job: Job) {
        if self.queue.send((id, job)).is_err() {
            // Only if every thread has panicked: the job's SA times out.
            error!("the threads for key exchanges and signatures are gone");
        }
    }
}

fn work(jobs: &Receiver<(JobId, Job)>, done: &UnboundedSender<(JobId, Done)>) {
    let mut random = System::default();
    while let Ok((id, job)) = jobs.recv() {
        if done.send((id, job.run(&mut random))).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use postern_ike::message::registry::KeMethod;
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    /// OPS-4: no byte is given out twice, whatever is asked for, and the stock keeps none that was.
    #[test]
    fn ops_4_random_bytes_are_given_once() {
        let mut random = System::default();
        let mut seen = std::collections::HashSet::new();
        for round in 0..20_000 {
            let mut bytes = vec![0; [8, 32, 8, 7, 64][round % 5]];
            random.fill(&mut bytes);
            assert!(seen.insert(bytes), "twice the same after {round}");
            assert!(random.stock.iter().take(random.used).all(|byte| *byte == 0));
        }
    }

    /// IKE-4: two sides that run their jobs on threads come to the same secret.
    #[test]
    fn ike_4_jobs_are_run() {
        let (sender, mut done) = unbounded_channel();
        let jobs = Jobs::start(NonZero::new(2).unwrap(), &sender).unwrap();
        jobs.run(JobId(1), Job::Generate(KeMethod::CURVE25519));
        let Some((JobId(1), Done::Generated(Ok((own, public))))) = done.blocking_recv() else { panic!() };
        jobs.run(JobId(2), Job::Respond { method: KeMethod::CURVE25519, public });
        let Some((JobId(2), Done::Responded(Ok((public, ours))))) = done.blocking_recv() else { panic!() };
        jobs.run(JobId(3), Job::Agree { own, public });
        let Some((JobId(3), Done::Agreed(Ok(theirs)))) = done.blocking_recv() else { panic!() };
        assert!(ours == theirs);
        drop((jobs, sender));
        assert!(done.blocking_recv().is_none(), "the threads have ended");
    }
}
