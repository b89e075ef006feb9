//! The whole server on a socket pair: the test takes the place of the kernel.

use std::collections::BTreeMap;

use stencilfs::control::ServeMode;

use super::*;
use crate::protocol::ledger::Ledger;
use crate::server::testing::{BLOCK, Supervisor, World, snapshot, supervise};

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const READDIR: u32 = 28;
const LSEEK: u32 = 46;

/// `FOPEN_PASSTHROUGH`
const FOPEN_PASSTHROUGH: u32 = 1 << 7;

/// Returns the bytes of a request.
fn packet(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(40 + body.len()).unwrap();
    let mut bytes = [length.to_le_bytes(), opcode.to_le_bytes()].concat();
    bytes.extend([unique.to_le_bytes(), node.to_le_bytes()].concat());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The kernel's INIT request: version 7.41, all flags.
fn init() -> Vec<u8> {
    let mut body = words(&[7, 41, 1 << 20, u32::MAX, u32::MAX]);
    body.resize(64, 0);
    packet(INIT, 1, 0, &body)
}

/// The kernel's end of a connection.
struct Kernel {
    connection: OwnedFd,
    last: u64,
}

impl Kernel {
    /// Makes a request, and returns the body of the reply.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> std::result::Result<Vec<u8>, i32> {
        self.last += 1;
        let request = packet(opcode, self.last, node, body);
        rustix::io::write(&self.connection, &request).unwrap();
        let mut reply = vec![0; 2 << 20];
        let length = rustix::io::read(&self.connection, &mut reply[..]).unwrap();
        reply.truncate(length);
        assert_eq!((word(&reply, 0) as usize, long(&reply, 8)), (length, self.last), "opcode {opcode}");
        match word(&reply, 4).cast_signed() {
            0 => Ok(reply.split_off(16)),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, path: &str) -> std::result::Result<u64, i32> {
        path.split('/').try_fold(1, |node, name| {
            let reply = self.ask(LOOKUP, node, &[name.as_bytes(), b"\0"].concat())?;
            Ok(long(&reply, 0))
        })
    }
}

/// Runs a server for the template of a world, and `work` with the other end of its connection.
fn with_server(mode: ServeMode, work: impl FnOnce(&World, &mut Kernel)) {
    let world = World::new(mode);
    let mut snapshot = snapshot(&world, None);
    (snapshot.init, snapshot.options.serve) = (init(), mode);
    let mut ledger = Ledger::create().unwrap();
    ledger.write(&serde_json::to_vec(&snapshot).unwrap()).unwrap();
    let supervisor = Arc::new(Supervisor::default());
    let (fuse, connection) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let null = || std::fs::File::open("/dev/null").unwrap().into();
    let inherited = Inherited {
        fuse,
        link: supervise(Arc::clone(&supervisor), Box::new(|_, _| None), None),
        counters: fds::copy(world.fs.stats.page().fd()).unwrap(),
        ledger: ledger.read_only().unwrap(),
        _for_takeover: [null(), null()],
    };
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&inherited, 2, |_| Ok(vec!["no sandbox in this test".to_owned()])));
        let mut kernel = Kernel { connection, last: 1 };
        crate::server::testing::wait_for("a server", || {
            (supervisor.count(|r| matches!(r, ServerRequest::Serving)) == 1).then_some(())
        });
        assert_eq!(
            supervisor.count(|r| matches!(r, ServerRequest::Handshake { lacks, .. } if lacks.len() == 1)),
            1
        );
        work(&world, &mut kernel);
        // The end of the connection ends the server.
        drop(kernel);
    });
}

#[test]
fn a_server_answers_the_kernels_requests() {
    with_server(ServeMode::Decode, |world, kernel| {
        let digest = world.digest;
        let memory = kernel.lookup(&format!("by-id/{digest}/memory")).unwrap();
        assert_eq!(memory, world.memory_ino(), "each server of a store computes the same numbers");
        let attributes = kernel.ask(GETATTR, memory, &[0; 16]).unwrap();
        // Size, permissions and block size of struct fuse_attr, which begins at byte 16 of the reply.
        assert_eq!(long(&attributes, 24), world.memory.len() as u64);
        assert_eq!(word(&attributes, 76), libc::S_IFREG | 0o440);
        assert_eq!(word(&attributes, 96), 4096);
        let opened = kernel.ask(OPEN, memory, &words(&[0, 0])).unwrap();
        assert_eq!(word(&opened, 8) & FOPEN_PASSTHROUGH, 0);
        let read = |offset: u64, size: u32| [longs(&[0, offset]), words(&[size, 0, 0, 0, 0, 0])].concat();
        for (offset, size) in [(0, BLOCK), (100, 5000), (6 * BLOCK, 1 << 20), (7 * BLOCK, 4096)] {
            let got = kernel.ask(READ, memory, &read(offset as u64, size.try_into().unwrap())).unwrap();
            let end = (offset + size).min(world.memory.len());
            assert!(got == world.memory[offset.min(end)..end], "{size} bytes at {offset}");
        }
        let seek = |offset: u64, whence: u32| [longs(&[0, offset]), words(&[whence, 0])].concat();
        let hole = kernel.ask(LSEEK, memory, &seek(0, libc::SEEK_HOLE.cast_unsigned())).unwrap();
        assert_eq!(long(&hole, 0), BLOCK as u64);
        let tag = kernel.lookup("templates/web/1").unwrap();
        assert_eq!(kernel.ask(READLINK, tag, &[]).unwrap(), format!("../../by-id/{digest}").into_bytes());
        let listing = kernel.ask(READDIR, 1, &read(0, 4096)).unwrap();
        for name in [&b"by-id"[..], b"templates"] {
            assert!(listing.windows(name.len()).any(|part| part == name));
        }
        let totals = kernel.ask(STATFS, 1, &[]).unwrap();
        // Blocks and files of struct fuse_kstatfs.
        assert_eq!((long(&totals, 0), long(&totals, 24)), (5 * BLOCK as u64 / 4096, 1));
        assert_eq!(kernel.lookup("nothing"), Err(libc::ENOENT));
        assert_eq!(kernel.ask(READ, 1, &read(0, 10)), Err(libc::EISDIR));
    });
}

#[test]
fn a_server_refuses_every_change() {
    with_server(ServeMode::Decode, |world, kernel| {
        let memory = kernel.lookup(&format!("by-id/{}/memory", world.digest)).unwrap();
        let name = || b"name\0".to_vec();
        let write = [longs(&[0, 0]), words(&[3, 0, 0, 0, 0, 0]), b"abc".to_vec()].concat();
        // The bit FATTR_SIZE or FATTR_MODE, and the rest of struct fuse_setattr_in.
        let set = |valid: u32| [words(&[valid]), vec![0; 84]].concat();
        let cases: BTreeMap<&str, (u32, u64, Vec<u8>, i32)> = [
            ("open for writing", (OPEN, memory, words(&[1, 0]), libc::EACCES)),
            ("SETATTR of the size", (4, memory, set(1 << 3), libc::EACCES)),
            ("SETATTR of the mode", (4, memory, set(1), libc::EPERM)),
            ("SYMLINK", (6, 1, [name(), name()].concat(), libc::EACCES)),
            ("MKNOD", (8, 1, [vec![0; 16], name()].concat(), libc::EACCES)),
            ("MKDIR", (9, 1, [vec![0; 8], name()].concat(), libc::EACCES)),
            ("UNLINK", (10, 1, name(), libc::EACCES)),
            ("RMDIR", (11, 1, name(), libc::EACCES)),
            ("RENAME", (12, 1, [longs(&[1]), name(), name()].concat(), libc::EACCES)),
            ("LINK", (13, 1, [longs(&[memory]), name()].concat(), libc::EACCES)),
            ("WRITE", (16, memory, write, libc::EACCES)),
            ("FSYNC", (20, memory, vec![0; 16], libc::ENOSYS)),
            ("SETXATTR", (21, memory, [words(&[1, 0]), name(), b"x".to_vec()].concat(), libc::ENOSYS)),
            ("GETXATTR", (22, memory, [words(&[9, 0]), name()].concat(), libc::ENOSYS)),
            ("LISTXATTR", (23, memory, words(&[9, 0]), libc::ENOSYS)),
            ("REMOVEXATTR", (24, memory, name(), libc::ENOSYS)),
            ("FLUSH", (25, memory, vec![0; 24], libc::ENOSYS)),
            ("FSYNCDIR", (30, 1, vec![0; 16], libc::ENOSYS)),
            ("CREATE", (35, 1, [vec![0; 16], name()].concat(), libc::EACCES)),
            ("IOCTL", (39, memory, vec![0; 32], libc::ENOSYS)),
            ("FALLOCATE", (43, memory, vec![0; 32], libc::EACCES)),
            ("COPY_FILE_RANGE", (47, memory, vec![0; 56], libc::ENOSYS)),
        ]
        .into();
        for (what, (opcode, node, body, errno)) in cases {
            assert_eq!(kernel.ask(opcode, node, &body), Err(errno), "{what}");
        }
        let read = [longs(&[0, 0]), words(&[5, 0, 0, 0, 0, 0])].concat();
        assert_eq!(kernel.ask(READ, memory, &read).unwrap(), b"block");
    });
}

#[test]
fn a_server_hands_out_registered_backings() {
    with_server(ServeMode::Auto, |world, kernel| {
        let memory = kernel.lookup(&format!("by-id/{}/memory", world.digest)).unwrap();
        let opened = kernel.ask(OPEN, memory, &words(&[0, 0])).unwrap();
        assert_eq!((word(&opened, 8) & FOPEN_PASSTHROUGH, word(&opened, 12)), (FOPEN_PASSTHROUGH, 1));
    });
}
