//! Firecracker's jailer: prepares the directory of a jail, and the command that starts Firecracker in it.
//!
//! The jailer gives each Firecracker its own chroot, `BASE/PROGRAM/ID/root`. The template's directory appears in the
//! chroot through a mount that only the launch and the jail see: the launch has its own mount namespace, and the jailer
//! makes a copy of that namespace. The host has no mount that would need an unmount.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{fchown, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::clones::launch::order::Jailer;
use crate::clones::launch::target::Target;
use crate::clones::registry::{API_SOCKET, Entry, VMM_LOG};
use crate::error::{Error, Result};
use crate::sys::files::private_mounts::{PrivateMount, enter_namespace};
use crate::sys::probe;
use crate::sys::process::session::Session;
use crate::units::Bytes;

/// Directory of the template in the jail.
const TEMPLATE: &str = "/template";

/// The directory of a jail, prepared for the jailer.
pub struct Jail {
    /// Root directory of the jail, on the host.
    root: PathBuf,
}

impl Jail {
    /// Creates the directory of the jail, and stores its path in the clone's record.
    ///
    /// # Errors
    /// Returns an error if the directory or the record cannot be written.
    pub fn create(jailer: &Jailer, program: &Path, entry: &mut Entry) -> Result<Jail> {
        let jail = jailer.chroot_base_dir.join(program.file_name().unwrap_or_default()).join(&entry.id);
        let root = jail.join("root");
        let failed = |e| {
            Error::io("cannot create a jail", &root, e)
                .hint("name another directory that only root can write, on a file system mounted without nodev and noexec: --chroot-base-dir DIR")
        };
        // The jail of another runtime directory may have the same id.
        if jail.symlink_metadata().is_ok() {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        if probe::file_system(&jailer.chroot_base_dir)?.is_memory() {
            entry.jail_bytes = Bytes::new(fs::metadata(program).map_err(failed)?.len());
        }
        entry.jail = Some(jail);
        entry.save()?;
        let made = || {
            fs::create_dir_all(root.join(TEMPLATE.trim_start_matches('/')))?;
            File::create_new(root.join(VMM_LOG))?;
            // The path of the API socket is the same as for a clone without a jail.
            symlink(root.join(API_SOCKET), entry.dir.join(API_SOCKET))
        };
        made().map_err(failed)?;
        Ok(Jail { root })
    }

    /// Returns the path of the API socket, on the host.
    pub fn socket(&self) -> PathBuf {
        self.root.join(API_SOCKET)
    }

    /// Mounts the template and the clone's log in the jail. The jailer copies the mounts; they end with the returned
    /// value in this process, and with Firecracker in the jail.
    ///
    /// # Errors
    /// Returns an error if the clone's log cannot be handed to the user of the jail, or if a mount fails.
    pub fn mount(&self, jailer: &Jailer, target: &Target, entry: &Entry) -> Result<[PrivateMount; 2]> {
        let log = entry.dir.join(VMM_LOG);
        fchown(entry.open_log(VMM_LOG)?, Some(jailer.uid), Some(jailer.gid))
            .map_err(|e| Error::io("cannot hand the log to the user of the jail", &log, e))?;
        let bind = |source: &Path, name: &str| {
            PrivateMount::bind(source, self.root.join(name.trim_start_matches('/'))).map_err(|e| {
                Error::io("cannot mount the path in a jail", source, e).hint(
                    "check with ls that the path can be read and that the mount of the template answers",
                )
            })
        };
        Ok([bind(&target.dir, TEMPLATE)?, bind(&log, VMM_LOG)?])
    }
}

/// Gives this launch its own mount namespace, for the mounts in jails.
///
/// # Errors
/// Returns an error if the kernel refuses a new mount namespace.
pub fn enter_mount_namespace() -> Result<()> {
    enter_namespace().map_err(|e| {
        Error::failed("cannot create a mount namespace for the jails")
            .because(e)
            .hint("run as root with CAP_SYS_ADMIN")
    })
}

/// Returns the command that starts Firecracker in the jail of a clone.
pub fn command(jailer: &Jailer, program: &Path, entry: &Entry) -> Session {
    let mut command = Session::new(&jailer.program);
    command
        .args(["--id", &entry.id, "--uid", &jailer.uid.to_string(), "--gid", &jailer.gid.to_string()])
        .arg("--exec-file")
        .arg(program)
        .arg("--chroot-base-dir")
        .arg(&jailer.chroot_base_dir)
        .args(["--", "--api-sock", API_SOCKET, "--log-path", VMM_LOG]);
    command
}

/// Replaces paths of the template below the mount by their paths in a jail, in the body of `PUT /snapshot/load`.
pub fn translate(body: &mut Value, target: &Target) {
    for pointer in ["/snapshot_path", "/mem_backend/backend_path"] {
        let Some(path) = body.pointer_mut(pointer) else { continue };
        let inside = path.as_str().and_then(|path| Path::new(path).strip_prefix(&target.dir).ok());
        if let Some(inside) = inside {
            *path = Path::new(TEMPLATE).join(inside).display().to_string().into();
        }
    }
}
