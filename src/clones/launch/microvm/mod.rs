//! Clones of VMMs that load a snapshot on request: Firecracker and Cloud Hypervisor.
//!
//! No guest runs until the snapshots of all clones are loaded: a running guest takes processor time from the loads.

pub mod cloud_hypervisor;
pub mod firecracker;
mod jail;

pub use jail::enter_mount_namespace;
use serde_json::json;

use super::active_launch::ActiveLaunch;
use super::child::ReadyWait;
use super::order::Launched;
use crate::clones::registry::{API_SOCKET, Entry, process_tree};
use crate::clones::vmm_api::{Api, Server};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;

/// Number of guests that are resumed at the same time. Each request needs a file descriptor.
const RESUME_BATCH: usize = 64;

/// Resumes the guests of these clones. A guest that cannot be resumed is removed, and is a failure of the launch.
pub fn resume(active: &ActiveLaunch<'_>, server: Server, launched: Launched) -> Launched {
    let (request, body) = match server {
        Server::Firecracker => ("PATCH /vm", Some(json!({"state": "Resumed"}))),
        Server::CloudHypervisor => ("PUT /api/v1/vm.resume", None),
    };
    let Launched { clones, failures, clocks, children } = launched;
    active.gathered(|gathered| gathered.failures = failures);
    let mut ready = Vec::with_capacity(clones.len());
    for batch in clones.chunks(RESUME_BATCH).take_while(|_| !active.is_over()) {
        let wait = ReadyWait::new(active);
        // All requests are sent before the first wait: running guests would delay the remaining requests.
        let send = |entry: &Entry| {
            let mut api = Api::connect(server, &entry.dir.join(API_SOCKET))?;
            match api.peer_pid()? {
                pid if pid == entry.pid => {}
                other => return Err(foreign(other, entry)),
            }
            api.send(request, body.as_ref()).map(|()| api)
        };
        let sent: Vec<Result<Api>> = batch.iter().map(send).collect();
        for (entry, api) in batch.iter().zip(sent) {
            match api.and_then(|mut api| api.wait(request, wait.deadline)) {
                Ok(_) => ready.push(entry.clone()),
                Err(error) => active.give_up(entry, &error),
            }
        }
    }
    let failures = active.gathered(|gathered| std::mem::take(&mut gathered.failures));
    Launched { clones: ready, failures, clocks, children }
}

/// Checks that a process of the clone listens on the API socket, and records that process: the program may be a script
/// that starts the VMM as a child. The check is needed because the user of a jail can replace the socket.
fn expect_own(api: &Api, entry: &mut Entry) -> Result<()> {
    let pid = api.peer_pid()?;
    match ProcessId::of(pid)? {
        Some(process) if Some(process) == entry.process() => Ok(()),
        Some(process) if process_tree::of_folder(&entry.dir).contains(&process) => entry.set_process(process),
        _ => Err(foreign(pid, entry)),
    }
}

fn foreign(pid: u32, entry: &Entry) -> Error {
    Error::failed(format!(
        "process {pid}, which does not belong to clone {}, listens on the API socket",
        entry.id
    ))
    .at(entry.dir.join(API_SOCKET))
    .hint("find out which program has replaced the socket")
}
