//! Cloud Hypervisor clones: starts Cloud Hypervisor and restores the template's snapshot through its API.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use serde_json::json;

use super::expect_own;
use crate::clones::launch::active_launch::ActiveLaunch;
use crate::clones::launch::child::{ControlSocket, ReadyWait, connect, expect_short, kill, spawn};
use crate::clones::launch::order::CloudHypervisor;
use crate::clones::recipe::Escape;
use crate::clones::registry::{API_SOCKET, Entry};
use crate::clones::vmm;
use crate::clones::vmm_api::{Api, Server};
use crate::error::{Error, Result};
use crate::sys::process::session::{Child, Session};

/// Starts the Cloud Hypervisor of one clone, and returns when it has restored the snapshot. The guest is paused.
///
/// # Errors
/// Returns an error if Cloud Hypervisor cannot be started or refuses the snapshot, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
pub fn load(active: &ActiveLaunch<'_>, snapshot: &CloudHypervisor, entry: &mut Entry) -> Result<Child> {
    let socket = ControlSocket {
        vmm: "Cloud Hypervisor",
        name: "API",
        path: entry.dir.join(API_SOCKET),
        hint: "check that --cloud-hypervisor names Cloud Hypervisor 51 or newer",
    };
    expect_short(&socket.path.display().to_string())?;
    write_files(active, snapshot, entry)?;
    let mut command = Session::new(&snapshot.program);
    command.args(["--api-socket", API_SOCKET]).current_dir(&entry.dir);
    let mut child = spawn(&mut command, entry)?;
    let wait = ReadyWait::new(active);
    let body = json!({"source_url": format!("file://{}", entry.dir.display())});
    let connected =
        connect(&wait, &mut child, entry, &socket, |path| Api::connect(Server::CloudHypervisor, path));
    let restored = connected.and_then(|mut api| {
        expect_own(&api, entry)?;
        api.run("PUT /api/v1/vm.restore", &body, wait.deadline).map_err(|error| match error.hint_text() {
            Some(_) => error,
            None => error.hint(
                "use the version of Cloud Hypervisor that took the snapshot, 51 or newer, and give each clone the TAP \
                 devices of the snapshot: --network",
            ),
        })
    });
    match restored {
        Ok(()) => Ok(child),
        Err(error) => Err(kill(child, entry, error)),
    }
}

/// Writes the configuration and the state of the clone's VM into its directory.
fn write_files(active: &ActiveLaunch<'_>, snapshot: &CloudHypervisor, entry: &Entry) -> Result<()> {
    let target = active.order.target;
    let values = target.values().of_clone(&entry.id, entry.index, &entry.dir);
    let taps = snapshot.networks.iter().map(|(id, device)| {
        let device = values.fill(device, Escape::None)?;
        Ok((id.clone(), device))
    });
    let taps = taps.collect::<Result<Vec<_>>>()?;
    for (path, bytes) in vmm::cloud_hypervisor_clone(&snapshot.template, &entry.dir, &taps)? {
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&bytes))
            .map_err(|e| Error::io("cannot write the configuration of a clone", &path, e))?;
    }
    Ok(())
}
