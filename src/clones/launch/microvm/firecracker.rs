//! Firecracker clones: starts Firecracker and loads the template's snapshot through its API.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use super::expect_own;
use super::jail::{self, Jail};
use crate::clones::launch::active_launch::ActiveLaunch;
use crate::clones::launch::child::{ControlSocket, ReadyWait, connect, expect_short, kill, spawn_with};
use crate::clones::launch::order::Microvm;
use crate::clones::recipe::Escape;
use crate::clones::registry::{API_SOCKET, Entry, SERIAL_INPUT, SERIAL_LOG, VMM_LOG};
use crate::clones::vmm_api::{Api, Server};
use crate::error::{Error, Result};
use crate::sys::process::session::{Child, Session};

/// Starts the Firecracker of one clone, and returns when it has loaded the snapshot. The guest is paused.
///
/// # Errors
/// Returns an error if Firecracker cannot be started or refuses the snapshot, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
pub fn load(active: &ActiveLaunch<'_>, microvm: &Microvm, entry: &mut Entry) -> Result<Child> {
    let mut body = body(active, microvm, entry)?;
    let target = active.order.target;
    // The mounts end when this function returns: the jailer has its copy then.
    let (mut command, path, _mounts) = match &microvm.jailer {
        Some(jailer) => {
            jail::translate(&mut body, target);
            let jail = Jail::create(jailer, &microvm.program, entry)?;
            let mounts = jail.mount(jailer, target, entry)?;
            (jail::command(jailer, &microvm.program, entry), jail.socket(), Some(mounts))
        }
        None => (without_jail(microvm, entry)?, entry.dir.join(API_SOCKET), None),
    };
    let socket = ControlSocket {
        vmm: "Firecracker",
        name: "API",
        path,
        hint: match microvm.jailer {
            None => "check that --firecracker names Firecracker 1.12 or newer",
            Some(_) => {
                "check that --jailer and --firecracker name programs of one release, 1.12 or newer, and that \
                 --chroot-base-dir names a directory on a file system that permits devices and programs"
            }
        },
    };
    for path in [&socket.path, &entry.dir.join(API_SOCKET)] {
        expect_short(&path.display().to_string())?;
    }
    let (input, output) = (serial_input(entry)?, entry.open_log(SERIAL_LOG)?);
    let mut child = spawn_with(&mut command, entry, input.as_fd(), output.as_fd())?;
    let wait = ReadyWait::new(active);
    let loaded = connect(&wait, &mut child, entry, &socket, |path| Api::connect(Server::Firecracker, path))
        .and_then(|mut api| {
            expect_own(&api, entry)?;
            load_snapshot(&mut api, &body, microvm, &wait)?;
            match active.order.count > 1 && microvm.jailer.is_none() {
                true => refuse_shared_files(entry),
                false => Ok(()),
            }
        });
    match loaded {
        Ok(()) => Ok(child),
        Err(error) => Err(kill(child, entry, error)),
    }
}

/// Returns the command that starts Firecracker.
fn without_jail(microvm: &Microvm, entry: &Entry) -> Result<Session> {
    entry.open_log(VMM_LOG)?;
    let mut command = Session::new(&microvm.program);
    // Relative paths in the snapshot (vsock, disks) become paths in the clone's directory.
    command
        .args(["--id", &entry.id, "--api-sock", API_SOCKET, "--log-path", VMM_LOG])
        .current_dir(&entry.dir);
    Ok(command)
}

/// Returns the body of the request for one clone.
fn body(active: &ActiveLaunch<'_>, microvm: &Microvm, entry: &Entry) -> Result<Value> {
    let values = active.order.target.values().of_clone(&entry.id, entry.index, &entry.dir);
    let mut body = microvm.body.clone();
    body["resume_vm"] = false.into();
    if !microvm.networks.is_empty() {
        let override_of = |(interface, device): &(String, String)| {
            let device = values.fill(device, Escape::None)?;
            Ok(json!({"iface_id": interface, "host_dev_name": device}))
        };
        body["network_overrides"] = microvm.networks.iter().map(override_of).collect::<Result<_>>()?;
    }
    if let Some(path) = &microvm.vsock {
        body["vsock_override"] = json!({"uds_path": path});
    }
    Ok(body)
}

fn load_snapshot(api: &mut Api, body: &Value, microvm: &Microvm, wait: &ReadyWait<'_>) -> Result<()> {
    let hint = match &microvm.jailer {
        None => {
            "give each clone the devices that the snapshot names: --network for TAP devices; Firecracker opens disks \
             and the vsock socket at their paths in the snapshot; relative paths are in the directory of the clone"
                .to_owned()
        }
        Some(jailer) => format!(
            "let user {} or group {} read the template (stencil chown, stencil chmod), and give each clone the devices \
             that the snapshot names: --network for TAP devices",
            jailer.uid, jailer.gid
        ),
    };
    api.run("PUT /snapshot/load", body, wait.deadline).map_err(|error| match error.hint_text() {
        Some(_) => error,
        None => error.at(body["snapshot_path"].as_str().unwrap_or_default()).hint(hint),
    })
}

/// Refuses a clone that has a file outside of its directory open for writing: a disk at an absolute path in the
/// snapshot, to which all clones of the launch would write.
fn refuse_shared_files(entry: &Entry) -> Result<()> {
    let fds = PathBuf::from(format!("/proc/{}/fd", entry.pid));
    let failed = |e| Error::io("cannot list the open files of Firecracker", &fds, e);
    for fd in fs::read_dir(&fds).map_err(failed)? {
        let fd = fd.map_err(failed)?.path();
        // The mode of the link tells how the file is open (proc(5)).
        let is_written = fs::symlink_metadata(&fd).is_ok_and(|link| link.permissions().mode() & 0o200 != 0);
        let (Ok(file), Ok(path)) = (fs::metadata(&fd), fs::read_link(&fd)) else { continue };
        let is_disk = file.is_file() || file.file_type().is_block_device();
        let is_there =
            fs::metadata(&path).is_ok_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()));
        if is_written && is_disk && is_there && !path.starts_with(&entry.dir) {
            return Err(Error::usage("cannot launch several clones: each would write to this file, a disk of the VM")
                .at(path)
                .hint(
                    "make the disk read-only before the snapshot, or give it a relative path and make the disk of each \
                     clone: docs/how-to/firecracker.md",
                ));
        }
    }
    Ok(())
}

/// Creates and opens the FIFO of the guest's serial input. Firecracker inherits it for reading and writing, so that it
/// never reads an end of file.
fn serial_input(entry: &Entry) -> Result<File> {
    let path = entry.dir.join(SERIAL_INPUT);
    let failed = |e| Error::io("cannot create the FIFO of a clone's serial port", &path, e);
    mknodat(CWD, path.as_os_str().as_bytes(), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
        .map_err(|e| failed(e.into()))?;
    File::options().read(true).write(true).open(&path).map_err(failed)
}
