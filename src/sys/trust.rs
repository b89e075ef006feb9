//! Whether a file or folder can have been made or changed by another user than root and the caller.
//!
//! Records of the runtime directory decide which processes root signals and which files it removes. They are used only
//! when root or the caller owns them and nobody else can write them, and when the same holds for the way to them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Stat};

use super::folder::Folder;

/// Symbolic links that one path may have, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Write permission for group and others.
const OTHERS_WRITE: u32 = 0o022;

/// Fails for what another user owns, or others than its owner can write.
///
/// # Errors
/// `PermissionDenied` that says why.
pub fn expect(stat: &Stat) -> io::Result<()> {
    expect_owner(stat.st_uid)?;
    // A link's mode means nothing.
    match stat.st_mode & OTHERS_WRITE {
        0 => Ok(()),
        _ if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => Ok(()),
        _ => Err(denied(format!("other users can write it (mode {:04o})", stat.st_mode & 0o7777))),
    }
}

/// The path without symbolic links, of a folder whose way nobody but root and the caller can change: each component
/// belongs to one of them, and where everybody can write, the sticky bit keeps others from renaming it.
///
/// # Errors
/// `NotFound`; `PermissionDenied` that names the component and says why; else the system's.
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
        let mut ahead = components(&target);
        ahead.append(&mut left);
        left = ahead;
    }
    Ok(resolved)
}

/// Opens a folder whose way and owner can be trusted.
///
/// # Errors
/// As [`resolve`] and [`expect`].
pub fn open(path: &Path) -> io::Result<Folder> {
    let folder = Folder::open_canonical(&resolve(path)?)?;
    expect(&folder.own_metadata()?)?;
    Ok(folder.named(path))
}

fn components(path: &Path) -> VecDeque<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    names.collect()
}

/// Checks one component of a way; true for a symbolic link.
fn check(path: &Path) -> io::Result<bool> {
    let found = std::fs::symlink_metadata(path)?;
    let named = |e: io::Error| denied(format!("{}: {e}", path.display()));
    if !is_unmapped(found.uid()) {
        expect_owner(found.uid()).map_err(named)?;
    }
    if found.is_dir() && found.mode() & 0o1002 == 0o002 {
        let why = format!("everybody can rename what is in it (mode {:04o})", found.mode() & 0o7777);
        return Err(named(denied(why)));
    }
    Ok(found.is_symlink())
}

fn expect_owner(uid: u32) -> io::Result<()> {
    match uid == 0 || uid == rustix::process::geteuid().as_raw() {
        true => Ok(()),
        false => Err(denied(format!("it belongs to user {uid}"))),
    }
}

/// True in a user namespace for a user who has no number there, as the host's root.
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
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_way_that_others_can_change_is_refused_by_name() {
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
        assert!(refused.to_string().contains("open: everybody can rename"), "{refused}");
        mode(&root.join("open"), 0o1777);
        assert!(open(&deep).is_ok(), "sticky");
        assert!(open(&root.join("open")).unwrap_err().to_string().contains("mode 1777"));
        symlink("again", root.join("again")).unwrap();
        assert_eq!(resolve(&root.join("again")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
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
            assert!(refused.to_string().contains("belongs to user 1000"), "{refused}");
        }
    }
}
