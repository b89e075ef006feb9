//! Checks that only root and the caller can have created or changed a file or directory.
//!
//! Records in the runtime directory decide which processes root signals and which files root removes. A record is used
//! only if root or the caller owns it and no other user can write it, and if the same holds for all directories of its
//! path.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Stat};

use super::directory::Directory;

/// Maximum number of symbolic links in a path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Write permission for group and others.
const OTHERS_WRITE: u32 = 0o022;

/// Checks that root or the caller owns a file and that only its owner can write it.
///
/// # Errors
/// Returns `PermissionDenied` with the reason.
pub fn expect(stat: &Stat) -> io::Result<()> {
    expect_owner(stat.st_uid)?;
    // The mode of a symbolic link has no effect.
    match stat.st_mode & OTHERS_WRITE {
        0 => Ok(()),
        _ if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => Ok(()),
        _ => Err(denied(format!("writable by other users (mode {:04o})", stat.st_mode & 0o7777))),
    }
}

/// Resolves the symbolic links of a path that only root and the caller can redirect: each component must belong to one
/// of them, and in a world-writable directory the sticky bit must keep other users from renaming it.
///
/// # Errors
/// Returns `NotFound` if a component is missing, `PermissionDenied` with the component and the reason, and an error if
/// a system call fails.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut resolved = PathBuf::from("/");
    let mut left: VecDeque<OsString> = components(&std::path::absolute(path)?);
    let mut links = 0;
    check(&resolved)?;
    while let Some(name) = left.pop_front() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        resolved.push(&name);
        if !check(&resolved)? {
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let target = std::fs::read_link(&resolved)?;
        match target.is_absolute() {
            true => resolved = PathBuf::from("/"),
            false => drop(resolved.pop()),
        }
        let mut remaining = components(&target);
        remaining.append(&mut left);
        left = remaining;
    }
    Ok(resolved)
}

/// Opens a directory whose path and owner can be trusted.
///
/// # Errors
/// Same as [`resolve`] and [`expect`].
pub fn open(path: &Path) -> io::Result<Directory> {
    let directory = Directory::open_canonical(&resolve(path)?)?;
    expect(&directory.own_metadata()?)?;
    Ok(directory.named(path))
}

fn components(path: &Path) -> VecDeque<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    names.collect()
}

/// Checks one component of a path. Returns true for a symbolic link.
fn check(path: &Path) -> io::Result<bool> {
    let found = std::fs::symlink_metadata(path)?;
    let named = |e: io::Error| denied(format!("{}: {e}", path.display()));
    expect_owner(found.uid()).or_else(|e| if is_unmapped(found.uid()) { Ok(()) } else { Err(named(e)) })?;
    if found.is_dir() && found.mode() & 0o1002 == 0o002 {
        let why =
            format!("writable by all users without the sticky bit (mode {:04o})", found.mode() & 0o7777);
        return Err(named(denied(why)));
    }
    Ok(found.is_symlink())
}

fn expect_owner(uid: u32) -> io::Result<()> {
    match uid == 0 || uid == rustix::process::geteuid().as_raw() {
        true => Ok(()),
        false => Err(denied(format!("owned by user {uid}"))),
    }
}

/// Returns true if the user has no mapping in this user namespace, such as the root user of the host.
fn is_unmapped(uid: u32) -> bool {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    if read("/proc/sys/kernel/overflowuid").trim().parse() != Ok(uid) {
        return false;
    }
    let map = read("/proc/self/uid_map");
    let mut words = map.split_ascii_whitespace();
    [words.next(), words.next(), words.next()] != [Some("0"), Some("0"), Some("4294967295")]
}

fn denied(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

#[cfg(test)]
mod tests {
    use crate::sys::files::trust::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn rejects_a_path_that_other_users_can_change() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let deep = root.join("open/deep");
        fs::create_dir_all(&deep).unwrap();
        symlink("open/../open", root.join("link")).unwrap();
        assert_eq!(resolve(&root.join("link/deep")).unwrap(), deep);
        assert_eq!(resolve(&root.join("link/none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        mode(&root.join("open"), 0o777);
        let refused = resolve(&root.join("link/deep")).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(
            refused.to_string().contains("open: writable by all users without the sticky bit"),
            "{refused}"
        );
        mode(&root.join("open"), 0o1777);
        assert!(open(&deep).is_ok(), "sticky");
        assert!(open(&root.join("open")).unwrap_err().to_string().contains("mode 1777"));
        symlink("again", root.join("again")).unwrap();
        assert_eq!(resolve(&root.join("again")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn rejects_files_of_other_users() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (theirs, link) = (dir.path().join("theirs"), dir.path().join("link"));
        fs::create_dir(&theirs).unwrap();
        symlink(dir.path(), &link).unwrap();
        std::os::unix::fs::chown(&theirs, Some(1000), None).unwrap();
        std::os::unix::fs::lchown(&link, Some(1000), None).unwrap();
        for path in [&theirs, &link] {
            let refused = open(path).unwrap_err();
            assert!(refused.to_string().contains("owned by user 1000"), "{refused}");
        }
    }
}
