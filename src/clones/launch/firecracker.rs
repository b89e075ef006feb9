//! Firecracker clones: starts Firecracker, loads the template's snapshot through its API and resumes the guest.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use super::active_launch::ActiveLaunch;
use super::child::{ControlSocket, ReadyWait, connect, expect_short, kill, spawn_with};
use super::order::Microvm;
use crate::clones::firecracker_api::Api;
use crate::clones::recipe::Escape;
use crate::clones::registry::{API_SOCKET, Entry, LOG, SERIAL_INPUT, SERIAL_LOG};
use crate::error::{Error, Result};
use crate::sys::process::own_session;

/// Resumes one clone and returns when its guest runs.
///
/// # Errors
/// Returns an error if Firecracker cannot be started or refuses the snapshot, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
pub fn resume(active: &ActiveLaunch<'_>, microvm: &Microvm, entry: &mut Entry) -> Result<Child> {
    let body = body(active, microvm, entry)?;
    let socket = ControlSocket {
        vmm: "Firecracker",
        name: "API",
        path: entry.dir.join(API_SOCKET),
        hint: "check that --firecracker names Firecracker 1.12 or newer",
    };
    expect_short(&socket.path.display().to_string())?;
    let mut command = Command::new(&microvm.program);
    // Relative paths in the snapshot (vsock, disks) become paths in the clone's directory.
    own_session(&mut command)
        .args(["--id", &entry.id, "--api-sock", API_SOCKET, "--log-path", LOG])
        .current_dir(&entry.dir);
    let (input, output) = (serial_input(entry)?, entry.open_log(SERIAL_LOG)?);
    let mut child = spawn_with(&mut command, entry, input.into(), output.into())?;
    let wait = ReadyWait::new(active);
    let loaded = connect(&wait, &mut child, entry, &socket, Api::connect)
        .and_then(|mut api| load(&mut api, &body, &wait));
    match loaded {
        Ok(()) => Ok(child),
        Err(error) => Err(kill(child, entry, error)),
    }
}

/// Returns the body of the request for one clone.
fn body(active: &ActiveLaunch<'_>, microvm: &Microvm, entry: &Entry) -> Result<Value> {
    let mut body = microvm.body.clone();
    if !microvm.networks.is_empty() {
        let values = active.order.target.values().of_clone(&entry.id, entry.index, &entry.dir);
        let override_of = |(interface, device): &(String, String)| {
            let device = values.fill(device, Escape::None)?;
            Ok(json!({"iface_id": interface, "host_dev_name": device}))
        };
        body["network_overrides"] = microvm.networks.iter().map(override_of).collect::<Result<_>>()?;
    }
    Ok(body)
}

fn load(api: &mut Api, body: &Value, wait: &ReadyWait<'_>) -> Result<()> {
    api.run("PUT /snapshot/load", body, wait.deadline).map_err(|error| match error.hint_text() {
        Some(_) => error,
        None => error.at(body["snapshot_path"].as_str().unwrap_or_default()).hint(
            "give each clone the devices that the snapshot names: --network for TAP devices; Firecracker opens disks \
             and the vsock socket at their paths in the snapshot, relative ones in the directory of the clone",
        ),
    })
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
