//! Every modifying call fails with the errno in the table of `docs/reference/semantics.md`, and changes nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, IFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps,
    Uid, XattrFlags, chmodat, chownat, linkat, mkdirat, mknodat, open, renameat, renameat_with, symlinkat,
    unlinkat, utimensat,
};
use rustix::io::Errno;
use stencilfs::sys::memory::mapping::{Mapping, Protection, Request, Sharing};
use stencilfs::units::{Bytes, FileOffset};

use crate::support::host;
use crate::support::mount::{TestMount, run};
use crate::support::pages::tables::{code, rows};

struct Paths {
    file: PathBuf,
    directory: PathBuf,
    tag: PathBuf,
    templates: PathBuf,
}

type Call = Box<dyn Fn(&Paths) -> Result<(), Errno>>;

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or_else(|| panic!("no errno: {error}"))
}

fn opens(path: fn(&Paths) -> PathBuf, flags: OFlags) -> Call {
    Box::new(move |p| open(path(p), flags, Mode::from_bits_truncate(0o644)).map(drop))
}

/// Calls a function on a descriptor opened with O_RDONLY, like those of clones.
fn with_fd(act: fn(&File) -> Result<(), Errno>) -> Call {
    Box::new(move |p| act(&File::open(&p.file).unwrap()))
}

fn map_shared_writable(file: &File) -> Result<(), Errno> {
    let request = Request {
        length: Bytes::new(4096),
        align: Bytes::new(4096),
        file: Some((file.as_fd(), FileOffset::new(0))),
        protection: Protection::ReadWrite,
        sharing: Sharing::Shared,
        reserve: true,
        sync: false,
    };
    Mapping::new(&request).map(drop).map_err(errno)
}

/// The call of each row of the table, by its first cell.
fn calls() -> BTreeMap<&'static str, Call> {
    fn file(p: &Paths) -> PathBuf {
        p.file.clone()
    }
    fn new(p: &Paths) -> PathBuf {
        p.directory.join("new")
    }
    let now = || {
        let time = Timespec { tv_sec: 1, tv_nsec: 0 };
        Timestamps { last_access: time, last_modification: time }
    };
    let mode = Mode::from_bits_truncate(0o755);
    let (rd, wr, rw) = (OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR);
    let mut calls: BTreeMap<&'static str, Call> = BTreeMap::new();
    let mut add = |name, call: Call| assert!(calls.insert(name, call).is_none(), "{name} twice");
    add("`open(F, O_WRONLY)`", opens(file, wr));
    add("`open(F, O_RDWR)`", opens(file, rw));
    add("`open(F, O_RDONLY \\| O_TRUNC)`", opens(file, rd | OFlags::TRUNC));
    add("`open(F, O_WRONLY \\| O_APPEND)`", opens(file, wr | OFlags::APPEND));
    add("`open(F, O_RDWR \\| O_CREAT)`", opens(file, rw | OFlags::CREATE));
    add("`open(F, O_RDONLY \\| O_CREAT \\| O_EXCL)`", opens(file, rd | OFlags::CREATE | OFlags::EXCL));
    add("`open(D/new, O_RDWR \\| O_CREAT)`", opens(new, rw | OFlags::CREATE));
    add("`open(D/new, O_RDONLY \\| O_CREAT)`", opens(new, rd | OFlags::CREATE));
    add("`open(D, O_RDWR \\| O_TMPFILE)`", opens(|p| p.directory.clone(), rw | OFlags::TMPFILE));
    add("`open(T, O_RDWR)` through a tag", opens(|p| p.tag.join("memory"), rw));
    add("`truncate(F)`", Box::new(|p| run_truncate(&p.file)));
    add("`ftruncate` on an `O_RDONLY` descriptor", with_fd(|f| rustix::fs::ftruncate(f, 1)));
    add("`write` on an `O_RDONLY` descriptor", with_fd(|f| rustix::io::write(f, b"x").map(drop)));
    add("`pwrite` on an `O_RDONLY` descriptor", with_fd(|f| rustix::io::pwrite(f, b"x", 9).map(drop)));
    add(
        "`fallocate` on an `O_RDONLY` descriptor",
        with_fd(|f| rustix::fs::fallocate(f, FallocateFlags::empty(), 0, 4096)),
    );
    add(
        "`fallocate` with `PUNCH_HOLE` on an `O_RDONLY` descriptor",
        with_fd(|f| {
            rustix::fs::fallocate(f, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096)
        }),
    );
    add(
        "`copy_file_range` into an `O_RDONLY` descriptor",
        with_fd(|f| rustix::fs::copy_file_range(f, Some(&mut 0), f, Some(&mut 8192), 4096).map(drop)),
    );
    add(
        "`sendfile` into an `O_RDONLY` descriptor",
        with_fd(|f| rustix::fs::sendfile(f, f, Some(&mut 0), 4096).map(drop)),
    );
    add("`mmap(MAP_SHARED, PROT_WRITE)`", with_fd(map_shared_writable));
    add("`chmod(F)`", Box::new(move |p| chmodat(CWD, &p.file, mode, AtFlags::empty())));
    add(
        "`fchmod` on an `O_RDONLY` descriptor",
        with_fd(|f| rustix::fs::fchmod(f, Mode::from_bits_truncate(0o777))),
    );
    let me = (Some(Uid::from_raw(1)), Some(Gid::from_raw(1)));
    add("`chown(F)`", Box::new(move |p| chownat(CWD, &p.file, me.0, me.1, AtFlags::empty())));
    add("`utimensat(F)`", Box::new(move |p| utimensat(CWD, &p.file, &now(), AtFlags::empty())));
    add("`chmod(D)`", Box::new(move |p| chmodat(CWD, &p.directory, mode, AtFlags::empty())));
    add("`mkdir(D/new)`", Box::new(move |p| mkdirat(CWD, new(p), mode)));
    add("`mkdir(templates/new)`", Box::new(move |p| mkdirat(CWD, p.templates.join("new"), mode)));
    add("`mknod(D/new)`", Box::new(move |p| mknodat(CWD, new(p), FileType::RegularFile, mode, 0)));
    add("`mkfifo(D/new)`", Box::new(move |p| mknodat(CWD, new(p), FileType::Fifo, mode, 0)));
    add("`symlink(D/new)`", Box::new(|p| symlinkat("memory", CWD, new(p))));
    let beside_tag = |p: &Paths| p.tag.with_file_name("new");
    add("`symlink(templates/web/new)`", Box::new(move |p| symlinkat("x", CWD, beside_tag(p))));
    add("`link(F, D/new)`", Box::new(|p| linkat(CWD, &p.file, CWD, new(p), AtFlags::empty())));
    add("`unlink(F)`", Box::new(|p| unlinkat(CWD, &p.file, AtFlags::empty())));
    add("`unlink(T)`, a tag", Box::new(|p| unlinkat(CWD, &p.tag, AtFlags::empty())));
    add("`rmdir(D)`", Box::new(|p| unlinkat(CWD, &p.directory, AtFlags::REMOVEDIR)));
    add("`rename(F, D/new)`", Box::new(|p| renameat(CWD, &p.file, CWD, new(p))));
    add(
        "`rename` with `RENAME_EXCHANGE`",
        Box::new(|p| {
            renameat_with(CWD, &p.file, CWD, p.directory.join("manifest.json"), RenameFlags::EXCHANGE)
        }),
    );
    add(
        "`setxattr(F, user.x)`",
        Box::new(|p| rustix::fs::setxattr(&p.file, "user.x", b"1", XattrFlags::empty())),
    );
    add(
        "`setxattr(F, trusted.x)`",
        Box::new(|p| rustix::fs::setxattr(&p.file, "trusted.x", b"1", XattrFlags::empty())),
    );
    add("`removexattr(F, user.x)`", Box::new(|p| rustix::fs::removexattr(&p.file, "user.x")));
    add(
        "`ioctl(FS_IOC_SETFLAGS)` on an `O_RDONLY` descriptor",
        with_fd(|f| rustix::fs::ioctl_setflags(f, IFlags::APPEND)),
    );
    add(
        "`fcntl(F_SETLK)` with a write lock",
        with_fd(|f| rustix::fs::fcntl_lock(f, rustix::fs::FlockOperation::NonBlockingLockExclusive)),
    );
    calls
}

/// truncate(2) by path; the standard library has only ftruncate(2) on an open file.
fn run_truncate(path: &Path) -> Result<(), Errno> {
    let script = "truncate($ARGV[0], 1) and exit 0; exit $!+0";
    let status = std::process::Command::new("perl").args(["-e", script]).arg(path).status().unwrap();
    match status.code() {
        Some(0) => Ok(()),
        code => Err(Errno::from_raw_os_error(code.expect("perl must not end by a signal"))),
    }
}

fn assert_calls_fail_as_documented(serve: &str) {
    let _host = host::shared();
    let world = TestMount::new(serve);
    let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i / 4096 % 255) as u8 + 1).collect();
    let digest = world.import_bytes(&bytes, "web:1");
    let directory = world.mountpoint().join("by-id").join(&digest);
    let paths = Paths {
        file: directory.join("memory"),
        templates: world.mountpoint().join("templates"),
        tag: world.mountpoint().join("templates/web/1"),
        directory,
    };
    let listing = |p: &Path| run("ls", &["-lRn", "--time-style=full-iso", p.to_str().unwrap()]);
    let before = (listing(world.mountpoint()), listing(&world.store_dir()));
    let mut calls = calls();
    for row in rows("reference/semantics.md", "every_write_like_call_is_refused_as_the_table_says") {
        let call = calls.remove(row[0].as_str()).unwrap_or_else(|| panic!("no call for the row {}", row[0]));
        let expected = code(&row[1]).unwrap();
        let got = match call(&paths) {
            Ok(()) => "success".to_owned(),
            Err(errno) => name(errno).to_owned(),
        };
        assert_eq!(got, expected, "{} on {serve}", row[0]);
        assert_eq!(fs::metadata(&paths.file).unwrap().size(), bytes.len() as u64, "{}", row[0]);
    }
    assert!(calls.is_empty(), "calls without a row in the table: {:?}", calls.keys());
    assert_eq!(
        (listing(world.mountpoint()), listing(&world.store_dir())),
        before,
        "mount and store must not change"
    );
    assert!(fs::read(&paths.file).unwrap() == bytes, "the bytes must not change");
    world.stencil(&["verify"]).ok();
    assert!(world.counter("opens_refused") >= 6 && world.counter("writes_refused") >= 15);
}

fn name(errno: Errno) -> &'static str {
    match errno {
        Errno::ACCESS => "EACCES",
        Errno::PERM => "EPERM",
        Errno::BADF => "EBADF",
        Errno::INVAL => "EINVAL",
        Errno::EXIST => "EEXIST",
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::NOTTY => "ENOTTY",
        Errno::ROFS => "EROFS",
        Errno::NOSYS => "ENOSYS",
        Errno::IO => "EIO",
        Errno::NOENT => "ENOENT",
        Errno::XDEV => "EXDEV",
        Errno::STALE => "ESTALE",
        _ => "another errno",
    }
}

#[test]
fn modifying_calls_fail_with_the_documented_errno() {
    assert_calls_fail_as_documented("decode");
    assert_calls_fail_as_documented("passthrough");
}

#[test]
fn the_kernel_enforces_mode_and_owner_of_the_policy() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let digest = world.import_bytes(&[7; 8192], "web:1");
    let path = world.file(&digest, "memory");
    // Another user, who can traverse the scenario's directories and has no capabilities.
    let read_as = |uid: &str| {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", uid, "--regid", uid, "--clear-groups", "head", "-c", "1"]);
        command.arg(&path).output().unwrap().status.success()
    };
    world.open_to_others();
    assert!(read_as("65534"), "mode 0444 allows every user to read");
    world.stencil(&["chmod", "0400", "web:1"]).ok();
    world.stencil(&["chown", "1234:1234", "web:1"]).ok();
    crate::support::mount::wait_for("the new mode", || (!read_as("65534")).then_some(()));
    assert!(read_as("1234"));
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o400, 1234, 1234));
}
