//! EROFS mounts without a path: the kernel decompresses a file out of other files.
//!
//! The metadata and the data are regular files (file-backed mounts, Linux 6.12). The mount lasts as long as a file of
//! it is open, or registered as a FUSE backing.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use crate::error::{Error, Result};
use crate::sys::files::read_ahead::Numbered;
use crate::units::Bytes;

/// How often an image is mounted to find its mount in sysfs.
const ATTEMPTS: u32 = 4;

/// Mounts the image in `metadata` with its extra devices, in the order of its device table, and opens the file `name`
/// in its root directory. The page cache holds pages of this file, but none of the devices. The kernel's read-ahead for
/// the file is `read_ahead`, or the kernel's default if that is `None` or the mount cannot be found in sysfs.
///
/// # Errors
/// Returns an error with the kernel's explanation if the kernel cannot mount the image: `ENODEV` without EROFS,
/// `ENOTBLK` if the metadata is on a file system that cannot back a mount (tmpfs, overlayfs), `EINVAL` for an image
/// that this kernel does not understand.
pub fn open_file(
    metadata: impl AsFd,
    devices: &[impl AsFd],
    name: &str,
    read_ahead: Option<Bytes>,
) -> Result<OwnedFd> {
    let root = mount_with(metadata, devices, read_ahead)?;
    let failed = |e: Errno| Error::io("cannot open the file of an EROFS mount", name, e.into());
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(&root, name, flags, Mode::empty()).map_err(failed)?;
    match FileType::from_raw_mode(fstat(&file).map_err(failed)?.st_mode) {
        FileType::RegularFile => Ok(file),
        other => Err(Error::failed(format!("the file of an EROFS mount is a {other:?}")).at(name)),
    }
}

/// Mounts an image, and sets the read-ahead of the mount. Mounts that several processes make at the same time cannot be
/// told apart in sysfs: then the image is mounted again after a pause, which differs between processes.
fn mount_with(metadata: impl AsFd, devices: &[impl AsFd], read_ahead: Option<Bytes>) -> Result<OwnedFd> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let before = Numbered::list("erofs-");
        let root = mount(&metadata, devices)?;
        let Some(size) = read_ahead else { return Ok(root) };
        let why = match before.and_then(|before| before.set_of_new(size)) {
            Ok(true) => return Ok(root),
            Ok(false) if attempt < ATTEMPTS => {
                drop(root);
                sleep(Duration::from_millis(1 + u64::from(std::process::id() % 16)));
                continue;
            }
            Ok(false) => "several EROFS file systems were mounted at the same time".to_owned(),
            Err(error) => error.to_string(),
        };
        log::warn!("cannot set the read-ahead of kernel decode, so the kernel's default applies: {why}");
        return Ok(root);
    }
}

fn mount(metadata: impl AsFd, devices: &[impl AsFd]) -> Result<OwnedFd> {
    let failed =
        |e: Errno| Error::failed("the kernel cannot mount the metadata of a file (EROFS)").because(e.into());
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| {
        failed(e).hint("load the kernel module erofs (modprobe erofs), or set CONFIG_EROFS_FS")
    })?;
    let path = |fd: &dyn AsFd| format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let mount = || {
        fsconfig_set_string(&context, "source", path(&metadata))?;
        for device in devices {
            fsconfig_set_string(&context, "device", path(device))?;
        }
        // The kernel caches neither pages of the devices nor compressed data.
        fsconfig_set_flag(&context, "directio")?;
        fsconfig_set_string(&context, "cache_strategy", "disabled")?;
        fsconfig_set_flag(&context, "ro")?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    mount().map_err(|e| match messages(&context) {
        Some(text) => failed(e).context(text),
        None => failed(e),
    })
}

/// Returns the kernel's messages about this mount.
fn messages(context: &OwnedFd) -> Option<String> {
    let mut messages = Vec::new();
    let mut message = [0; 1024];
    // Each read returns one message, and fails when there are no more.
    while let Ok(length @ 1..) = rustix::io::read(context, &mut message) {
        messages.push(String::from_utf8_lossy(&message[..length]).trim().to_owned());
    }
    (!messages.is_empty()).then(|| messages.join("; "))
}
