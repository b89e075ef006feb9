//! Name resolution with `openat2(2)`, or one component at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

/// Maximum number of attempts to resolve a name. The kernel returns `EAGAIN` if a concurrent rename may have affected
/// the resolution (openat2(2)), where a retry helps, and also for a file under a conflicting lease, where no retry
/// helps.
const MAX_ATTEMPTS: usize = 64;

pub const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

pub const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Set after `openat2` has failed with `ENOSYS`.
static NO_OPENAT2: AtomicBool = AtomicBool::new(false);

pub fn resolve(
    from: impl AsFd,
    name: &Path,
    flags: OFlags,
    mode: Mode,
    how: ResolveFlags,
) -> io::Result<OwnedFd> {
    let flags = match flags.contains(OFlags::PATH) {
        // Opening with O_PATH never blocks, and openat2 rejects O_NONBLOCK and O_NOCTTY with O_PATH.
        true => flags | OFlags::CLOEXEC,
        false => flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
    };
    let open = || match NO_OPENAT2.load(Ordering::Relaxed) {
        true => walk(from.as_fd(), name, flags, mode, how),
        false => match openat2(from.as_fd(), name, flags, mode, how) {
            Err(Errno::NOSYS) => {
                NO_OPENAT2.store(true, Ordering::Relaxed);
                walk(from.as_fd(), name, flags, mode, how)
            }
            opened => opened,
        },
    };
    let mut opened = open();
    for _ in 1..MAX_ATTEMPTS {
        match opened {
            Err(Errno::AGAIN) => opened = open(),
            _ => break,
        }
    }
    match opened {
        // The errno for opening a FIFO without a reader for writing, and for opening any socket.
        Err(Errno::NXIO) => Err(not_regular("a FIFO, socket or device")),
        opened => Ok(opened?),
    }
}

/// Resolves a name like `openat2`, one component at a time.
fn walk(
    from: BorrowedFd<'_>,
    name: &Path,
    flags: OFlags,
    mode: Mode,
    how: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    if !how.contains(ResolveFlags::NO_SYMLINKS) {
        return openat(from, name, flags, mode);
    }
    let mut at: Option<OwnedFd> = None;
    let mut components = name.components().peekable();
    while let Some(component) = components.next() {
        let (step, flags, mode) = match components.peek() {
            Some(_) => (OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, OFlags::empty(), Mode::empty()),
            None => (OFlags::empty(), flags, mode),
        };
        match component {
            Component::RootDir if !how.contains(ResolveFlags::BENEATH) => {}
            Component::Normal(_) | Component::CurDir => {}
            _ => return Err(Errno::XDEV),
        }
        let from = at.as_ref().map_or(from, OwnedFd::as_fd);
        at = Some(openat(from, component.as_os_str(), step | flags | OFlags::NOFOLLOW, mode)?);
    }
    at.ok_or(Errno::NOENT)
}

/// The error for a file of another type. `what` names the type.
pub fn not_regular(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected a regular file, found {what}"))
}

#[cfg(test)]
mod tests {
    use crate::sys::files::directory::resolve::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn walk_enforces_the_same_rules_as_openat2() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("inside/sub")).unwrap();
        std::fs::write(dir.path().join("outside"), "kept").unwrap();
        let inside = std::fs::File::open(dir.path().join("inside")).unwrap();
        symlink(dir.path(), dir.path().join("inside/link")).unwrap();
        symlink(dir.path().join("outside"), dir.path().join("inside/file")).unwrap();
        std::fs::write(dir.path().join("inside/sub/file"), "found").unwrap();
        let canonical = std::fs::canonicalize(dir.path()).unwrap();
        let absolute = |name: &str| canonical.join(name).to_str().unwrap().to_owned();
        let links = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let cases = [
            (BENEATH, "sub/file".to_owned(), true),
            (BENEATH, ".".to_owned(), true),
            (BENEATH, "./sub".to_owned(), true),
            (BENEATH, "file".to_owned(), false),
            (BENEATH, "link/outside".to_owned(), false),
            (BENEATH, "sub/../../outside".to_owned(), false),
            (BENEATH, absolute("inside/sub"), false),
            (BENEATH, "none".to_owned(), false),
            (links, absolute("inside/sub/file"), true),
            (links, absolute("inside/link/outside"), false),
        ];
        for (how, name, opens) in cases {
            let name = Path::new(&name);
            let walked = walk(inside.as_fd(), name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), how);
            assert_eq!(walked.is_ok(), opens, "{name:?}: {walked:?}");
            let opened = openat2(inside.as_fd(), name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), how);
            assert_eq!(opened.is_ok(), opens, "{name:?}: {opened:?}");
        }
    }
}
