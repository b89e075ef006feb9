//! Checks whether a VM can be captured: lists the obstacles, and derives a command line without them. Does not change
//! the VM.

use std::path::Path;

use super::lock::VmLock;
use super::outcome::{Check, Finding};
use super::vm::{self, Live, Vm};
use super::vm_process::{is_firecracker, path_of};
use super::{busy, firecracker, images};
use crate::clones::migration::{Settings, overridden};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{corrected, examine};
use crate::error::{Error, Result};

/// Checks the VM behind a QMP socket of QEMU or an API socket of Firecracker.
///
/// # Errors
/// Returns an error if the VMM cannot be queried, for example because nothing listens on the socket or the VMM does not
/// reply, and [`Code::InUse`](crate::error::Code::InUse) if another capture has locked the VM.
pub fn check(socket: &Path) -> Result<Check> {
    let mut qmp = Qmp::open(socket)?;
    let pid = qmp.peer_pid()?;
    if is_firecracker(pid) {
        drop(qmp);
        return firecracker::check(socket, pid);
    }
    let _lock = VmLock::take(pid)?;
    qmp.greet()?;
    let mut findings = vec![];
    let mut add = |about, blocks, what: String, remedy: String| {
        findings.push(Finding { about, blocks, what, remedy });
    };
    for busy in busy::find(&mut qmp)? {
        add("busy", true, busy.what, busy.remedy);
    }
    if let Err(error) = vm::is_running(&mut qmp) {
        add("state", true, error.to_string(), remedy(&error));
    }
    let live = Live::inspect(&mut qmp)?;
    let examined = examine(&live.argv, &live.facts)?;
    let below = |what: &str| {
        (!examined.is_libvirt()).then(|| format!("restart the VM with the command line below, which {what}"))
    };
    for problem in &examined.ram_problems {
        let what = "the RAM of this VM is not in a file mapped with share=on".to_owned();
        let remedy = below("puts RAM into such a file");
        add("ram", true, what, remedy.unwrap_or_else(|| examined.share_ram(problem)));
    }
    for refused in &examined.refused {
        let about = match refused.what.as_str() {
            what if what.starts_with("device ") => "device",
            what if what.contains("disk") => "disk",
            _ => "option",
        };
        let what = format!("unsupported for clones: {}", refused.what);
        let remedy = below("removes or replaces it");
        add(about, true, what, remedy.unwrap_or_else(|| examined.start_without(refused)));
    }
    if examined.error().is_none() {
        let vm = Vm::of(&mut qmp, live.clone(), true, examined.plan.clone());
        let files = vm.and_then(|vm| vm.ram_files().and_then(|_| vm.rom_files()));
        if let Err(error) = files {
            add("file", true, error.to_string(), remedy(&error));
        }
    }
    let Live { facts, argv, program, .. } = live;
    if !facts.disks.is_empty()
        && let Err(error) = images::check_qemu_img()
    {
        add("tool", true, error.to_string(), remedy(&error));
    }
    for warning in &examined.plan.warnings {
        let (what, remedy) = warning.split_once("; ").unwrap_or((warning, "no action is needed"));
        add("clone", false, what.to_owned(), remedy.to_owned());
    }
    for what in overridden(&Settings::of(&mut qmp)?) {
        let remedy = "no action is needed: a capture overrides the setting and restores it";
        add("settings", false, format!("the VM has the migration setting {what}"), remedy.into());
    }
    let name = format!("vm-{pid}");
    let free = |id: &str| {
        let path = |number: usize| match number {
            0 => format!("/dev/shm/{name}-{id}"),
            number => format!("/dev/shm/{name}-{id}-{number}"),
        };
        (0..).map(path).find(|p| !path_of(pid, Path::new(p)).exists()).unwrap_or_default()
    };
    let command = match examined.is_libvirt() {
        true => vec![],
        false => [vec![program], corrected(&argv, &facts, &free)].concat(),
    };
    let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_else(|_| "/".into());
    let can_be_captured = !findings.iter().any(|finding| finding.blocks);
    Ok(Check { pid, can_be_captured, findings, directory, command })
}

fn remedy(error: &Error) -> String {
    error.hint_text().unwrap_or_default().to_owned()
}
