//! Checks whether a VM can be captured: lists the obstacles, and derives a command line without them. Does not change
//! the VM.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::lock::VmLock;
use super::qemu_process::path_of;
use super::vm::{self, Live, Vm};
use super::{busy, images};
use crate::clones::migration::{Settings, overridden};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{corrected, examine};
use crate::error::{Error, Result};

/// A finding of the check.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Subject of the finding: `state`, `busy`, `ram`, `device`, `disk`, `option`, `file`, `tool`, `clone`, `settings`.
    pub about: &'static str,
    /// True if the finding prevents a capture.
    pub blocks: bool,
    /// Description of the finding.
    pub what: String,
    /// Advice to the user.
    pub remedy: String,
}

/// The result of the check.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Process id of QEMU.
    pub pid: u32,
    /// True if no finding prevents a capture.
    pub can_be_captured: bool,
    /// All findings.
    pub findings: Vec<Finding>,
    /// The directory to run the corrected command in.
    pub directory: PathBuf,
    /// The corrected command line, beginning with the program; empty for a VM that libvirt started.
    pub command: Vec<String>,
}

/// Checks the VM behind a QMP socket.
///
/// # Errors
/// Returns an error if QEMU cannot be queried, for example because nothing listens on the socket or QEMU does not
/// reply, and [`Code::InUse`](crate::error::Code::InUse) if another capture has locked the VM.
pub fn check(socket: &Path) -> Result<Check> {
    let mut qmp = Qmp::open(socket)?;
    let pid = qmp.peer_pid()?;
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
