//! What stands against the capture of a VM: all of it at once, and the command line of a VM without it. Nothing of the VM
//! is changed.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::lock::VmLock;
use super::vm::{self, Live, Vm};
use super::{busy, images};
use crate::clones::migration::{Settings, set_aside};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{corrected, examine};
use crate::error::{Error, Result};

/// Something that was found.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What it is about: `state`, `busy`, `ram`, `device`, `disk`, `option`, `file`, `tool`, `clone`, `settings`.
    pub about: &'static str,
    /// True when the VM cannot be captured with it.
    pub blocks: bool,
    /// What it is.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Check {
    /// The QEMU.
    pub pid: u32,
    /// True when nothing stands against it.
    pub can_be_captured: bool,
    /// What was found.
    pub findings: Vec<Finding>,
    /// The folder that the command line is to be run in.
    pub directory: PathBuf,
    /// The command line with everything corrected, and its program; empty for a VM that libvirt started.
    pub command: Vec<String>,
}

/// Looks at the VM behind a QMP socket.
///
/// # Errors
/// When it cannot be asked: nothing listens there, it does not run, or another capture has it.
pub fn check(socket: &Path) -> Result<Check> {
    let mut qmp = Qmp::open(socket)?;
    let pid = qmp.peer_pid()?;
    let _lock = VmLock::take(pid)?;
    qmp.greet()?;
    let mut findings = vec![];
    let mut add = |about, blocks, what: String, remedy: String| {
        findings.push(Finding { about, blocks, what, remedy });
    };
    for busy in busy::look(&mut qmp)? {
        add("busy", true, busy.what, busy.remedy);
    }
    if let Err(error) = vm::is_running(&mut qmp) {
        add("state", true, error.to_string(), remedy(&error));
    }
    let live = Live::look(&mut qmp)?;
    let examined = examine(&live.argv, &live.facts)?;
    let below = |what: &str| (!examined.is_libvirt()).then(|| format!("the command line below {what}"));
    for problem in &examined.ram_problems {
        let what = "the RAM of this VM is not in a file that QEMU shares".to_owned();
        add("ram", true, what, below("has it in one").unwrap_or_else(|| examined.share_ram(problem)));
    }
    for refused in &examined.refused {
        let about = match refused.what.as_str() {
            what if what.starts_with("device ") => "device",
            what if what.contains("disk") => "disk",
            _ => "option",
        };
        let what = format!("clones cannot have {}", refused.what);
        let instead = below("is without it, or has what clones can have instead");
        add(about, true, what, instead.unwrap_or_else(|| examined.start_without(refused)));
    }
    if examined.error().is_none() {
        let looked = Vm::of(&mut qmp, live.clone(), true, examined.plan.clone());
        let files = looked.and_then(|vm| vm.ram_files().and_then(|_| vm.rom_files()));
        if let Err(error) = files {
            add("file", true, error.to_string(), remedy(&error));
        }
    }
    let Live { facts, argv, program, .. } = live;
    if !facts.disks.is_empty()
        && let Err(error) = images::is_there()
    {
        add("tool", true, error.to_string(), remedy(&error));
    }
    for warning in &examined.plan.warnings {
        let (what, remedy) = warning.split_once("; ").unwrap_or((warning, "nothing needs to be done"));
        add("clone", false, what.to_owned(), remedy.to_owned());
    }
    for what in set_aside(&Settings::of(&mut qmp)?) {
        let remedy = "nothing needs to be done: a capture sets it aside and gives it back";
        add("settings", false, format!("the migration setting {what}"), remedy.into());
    }
    let name = format!("vm-{pid}");
    let free = |id: &str| {
        let path = |number: usize| match number {
            0 => format!("/dev/shm/{name}-{id}"),
            number => format!("/dev/shm/{name}-{id}-{number}"),
        };
        (0..).map(path).find(|p| !vm::path_of(pid, Path::new(p)).exists()).unwrap_or_default()
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
    error.remedy_text().unwrap_or_default().to_owned()
}
