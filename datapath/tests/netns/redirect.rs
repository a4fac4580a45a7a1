//! The smallest XDP program there is: everything to the socket of its queue, what has none on to the kernel. So that the port
//! is tested without the steering program.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The program, attached to an interface in native mode until dropped.
pub struct Redirect {
    map: OwnedFd,
    _program: OwnedFd,
    _link: OwnedFd,
}

const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const QUEUES: u32 = 4;

impl Redirect {
    /// Attaches to the interface of this index in the caller's namespace.
    pub fn attach(index: u32) -> Self {
        let map = bpf(MAP_CREATE, &mut Words::new(&[MAP_TYPE_XSKMAP, 4, 4, QUEUES])).unwrap();
        let fd = u64::try_from(map.as_raw_fd()).unwrap();
        // Each instruction: code, destination | source << 4, offset, immediate.
        let code: [u64; 6] = [
            instruction(0x61, 2, 1, 16, 0), // r2 = ctx->rx_queue_index
            instruction(0x18, 1, 1, 0, u32::try_from(fd).unwrap()), // r1 = the map,
            0,                              //      second half
            instruction(0xb7, 3, 0, 0, 2),  // r3 = XDP_PASS
            instruction(0x85, 0, 0, 0, 51), // call bpf_redirect_map
            instruction(0x95, 0, 0, 0, 0),  // exit
        ];
        let license = c"GPL";
        let mut load = Words::new(&[PROG_TYPE_XDP, 6]);
        load.push_pointer(code.as_ptr().addr());
        load.push_pointer(license.as_ptr().addr());
        let program = bpf(PROG_LOAD, &mut load).unwrap();
        let program_fd = u32::try_from(program.as_raw_fd()).unwrap();
        let mut link = Words::new(&[program_fd, index, ATTACH_XDP, XDP_FLAGS_DRV_MODE]);
        let link = bpf(LINK_CREATE, &mut link).unwrap();
        Self { map, _program: program, _link: link }
    }

    /// Sends what comes on the queue to the socket.
    pub fn set(&self, queue: u32, socket: BorrowedFd<'_>) {
        let value = u32::try_from(socket.as_raw_fd()).unwrap();
        let mut update = Words::new(&[u32::try_from(self.map.as_raw_fd()).unwrap(), 0]);
        update.push_pointer((&raw const queue).addr());
        update.push_pointer((&raw const value).addr());
        bpf_plain(MAP_UPDATE_ELEM, &mut update).unwrap();
    }
}

fn instruction(code: u64, destination: u64, source: u64, offset: u64, immediate: u32) -> u64 {
    code | destination << 8 | source << 12 | offset << 16 | u64::from(immediate) << 32
}

/// `union bpf_attr` as 32-bit words.
struct Words {
    words: [u32; 32],
    used: usize,
}

impl Words {
    fn new(first: &[u32]) -> Self {
        let mut words = [0; 32];
        words[..first.len()].copy_from_slice(first);
        Self { words, used: first.len() }
    }

    fn push_pointer(&mut self, address: usize) {
        let address = u64::try_from(address).unwrap().to_ne_bytes();
        for half in address.chunks_exact(4) {
            self.words[self.used] = u32::from_ne_bytes(half.try_into().unwrap());
            self.used += 1;
        }
    }
}

fn bpf_plain(command: i32, attribute: &mut Words) -> io::Result<i32> {
    // JUSTIFICATION: a test without the loader needs the bare system call.
    // SAFETY: the attribute is 128 zero-filled bytes, larger than what the commands used here read; the pointers in it are to
    // values of the caller that outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.words.as_mut_ptr(), 128) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap()) }
}

fn bpf(command: i32, attribute: &mut Words) -> io::Result<OwnedFd> {
    let fd = bpf_plain(command, attribute)?;
    // JUSTIFICATION: as above.
    // SAFETY: these commands return a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
