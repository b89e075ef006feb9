//! `stencil clone`: launches processes that map one template.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::clones::launch_set::LaunchSet;
use crate::cli::clones::working_set::Recorded;
use crate::cli::mount::hydrate;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::{Label, word};
use crate::cli::{Global, interrupt};
use crate::clones::agent::Clock;
use crate::clones::counted;
use crate::clones::launch::{
    CloudHypervisor, Failure, How, Jailer, LaunchRequest, Launched, Microvm, Ready, Simulate, Target, launch,
};
use crate::clones::registry::process_tree::ProcessTrees;
use crate::clones::registry::{self, Entry, Kind};
use crate::clones::stop::stop;
use crate::clones::vmm::{Vmm, check_launch, paste};
use crate::clones::working_set::Warmed;
use crate::error::{Code, Error, Result};
use crate::progress::Progress;
use crate::store::{Store, TemplateRef};
use crate::sys::files::trust;
use crate::sys::process::search_path::find_program;
use crate::sys::process::session::Child;

/// Launch clones of a template
///
/// Without --simulate and without CMD, the launch recipe of the template is used; the snapshot of a Firecracker or
/// Cloud Hypervisor is loaded by that program. The command returns when all clones are ready; the clones run until they
/// exit or are stopped. If one clone fails to become ready, all clones of the call are removed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil clone web:1 -n 20
  stencil clone web:1 -n 100 --simulate read=5%,write=1%
  stencil clone web:1 --wait -- your-vmm --mem {memory} --state {state}")]
pub struct CloneArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Number of clones
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Wait until all clones have exited, and exit with the status of the command; an interrupt stops the clones
    #[arg(long)]
    wait: bool,
    /// Condition for a command to be ready: mapped (the command maps the template's memory) or notify (the command
    /// writes to the file descriptor whose number is in STENCIL_NOTIFY)
    #[arg(long, default_value = "mapped", value_parser = ["mapped", "notify"])]
    ready: String,
    /// Keep the clones that become ready when others fail
    #[arg(long)]
    keep_going: bool,
    /// Launch simulated clones, which map the memory and touch pages, instead of a VMM: read=AMOUNT,write=AMOUNT,
    /// optionally with seed=N, file=NAME and prefault=written; an AMOUNT is a share (5%), pages (1024p) or bytes (4M);
    /// prefault=written copies the pages of that file that all recordings of the working set have written
    #[arg(long, value_name = "read=P%,write=P%", value_parser = word::<Simulate>, conflicts_with = "command")]
    simulate: Option<Simulate>,
    /// Label of the clones, for subtotals in 'stencil density'; may be repeated
    #[arg(long = "label", value_name = "K=V", value_parser = word::<Label>)]
    labels: Vec<Label>,
    /// Directory for the disks of the clones; each disk is removed with its clone [default: the runtime directory of
    /// the clone, which is in RAM if /run is]
    #[arg(long, value_name = "DIR", conflicts_with = "simulate")]
    disk_dir: Option<PathBuf>,
    /// Firecracker to start for the clones of a Firecracker snapshot: a path, or a name in PATH [default: firecracker]
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["simulate", "command"])]
    firecracker: Option<PathBuf>,
    /// Cloud Hypervisor to start for the clones of a Cloud Hypervisor snapshot: a path, or a name in PATH [default:
    /// cloud-hypervisor]
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["simulate", "command"])]
    cloud_hypervisor: Option<PathBuf>,
    /// TAP device of a network interface of a Firecracker or Cloud Hypervisor snapshot; {index} and {id} are replaced.
    /// Can be repeated
    #[arg(long, value_name = "IFACE=DEVICE", value_parser = network, conflicts_with_all = ["simulate", "command"])]
    network: Vec<(String, String)>,
    /// Path of the vsock socket of each clone of a Firecracker snapshot, relative to the directory or the jail of the
    /// clone. Needs Firecracker 1.16
    #[arg(long, value_name = "PATH", conflicts_with_all = ["simulate", "command"])]
    vsock: Option<String>,
    /// Firecracker's jailer, which starts each Firecracker in its own chroot: a path, or a name in PATH
    #[arg(long, value_name = "PROGRAM", requires_all = ["uid", "gid"], conflicts_with_all = ["simulate", "command"])]
    jailer: Option<PathBuf>,
    /// User id of each Firecracker in its jail
    #[arg(long, value_name = "UID", requires = "jailer")]
    uid: Option<u32>,
    /// Group id of each Firecracker in its jail
    #[arg(long, value_name = "GID", requires = "jailer")]
    gid: Option<u32>,
    /// Directory of the jails
    #[arg(long, value_name = "DIR", requires = "jailer", default_value = "/srv/jailer")]
    chroot_base_dir: PathBuf,
    /// Number of clones that are launched at the same time [default: twice the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    parallel: Option<u32>,
    /// Seconds that a clone may take to become ready
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    #[command(flatten)]
    working_set: LaunchSet,
    /// Command to run. These placeholders are replaced, and are also in its environment (STENCIL_MEMORY, …):
    ///   {memory} {state} {file:NAME}  path of a file of the template
    ///   {id} {index} {dir}            id of the clone, number within the launch, directory
    ///   {mac} {mac:N} {cid} {uuid}    MAC addresses, vsock address, random UUID
    ///   {port:N} {disk:NAME}          port of the host, disk overlay: reserved or created only if named here
    #[arg(last = true, value_name = "CMD", verbatim_doc_comment)]
    command: Vec<String>,
}

struct CloneReport {
    name: String,
    digest: String,
    clones: Vec<Entry>,
    failures: Vec<Failure>,
    warnings: Vec<String>,
    age: Duration,
    seconds: f64,
    warmed: Option<Warmed>,
    recorded: Option<Recorded>,
    ended: bool,
}

impl Report for CloneReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if !self.ended {
            for clone in &self.clones {
                match clone.ports.is_empty() {
                    true => writeln!(out, "{}", clone.id)?,
                    false => writeln!(out, "{}\t{}", clone.id, crate::cli::clones::ps::ports(&clone.ports))?,
                }
            }
        }
        for failure in &self.failures {
            writeln!(out, "clone {} failed: {}", failure.index, failure.message)?;
        }
        self.recorded.iter().try_for_each(|recorded| recorded.text(out))
    }

    fn json(&self) -> Value {
        json!({
            "reference": self.name,
            "digest": self.digest,
            "clones": to_json(&self.clones),
            "failures": to_json(&self.failures),
            "warnings": self.warnings,
            "template_age_seconds": self.age.as_secs(),
            "ready_seconds": self.seconds,
            "warmed": to_json(&self.warmed),
            "recorded": to_json(&self.recorded),
        })
    }
}

/// Runs `stencil clone`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist or its store is not mounted, and an error if a clone does
/// not become ready.
pub fn run(args: &CloneArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let (target, lease) = Target::find(&store, &args.template, "clone")?;
    let mut warnings = vec![];
    let how = match (&args.simulate, args.command.is_empty()) {
        (Some(simulate), _) => How::Simulated(simulate.clone()),
        (None, true) => vmm_of(args, &target, &store, &mut warnings)?,
        (None, false) => How::Command(
            args.command.clone(),
            if args.ready == "notify" { Ready::Notify } else { Ready::Mapped },
        ),
    };
    if let How::Qemu(recipe) = &how {
        warnings.extend(recipe.shared_networks().into_iter().map(is_cut_off));
    }
    let kind = how.kind();
    let cancel = interrupt::flag()?;
    let cores =
        std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    let order = LaunchRequest {
        target: &target,
        how,
        count: args.count,
        parallel: args.parallel.unwrap_or(cores * 2),
        keep_going: args.keep_going,
        ready_timeout: Duration::from_secs(args.timeout.into()),
        labels: Label::map(&args.labels),
        disk_dir: args.disk_dir.as_deref().map(disk_directory).transpose()?,
        prefault: match &args.simulate {
            Some(Simulate { prefault: true, .. }) => args.working_set.written(&store, &target)?,
            _ => BTreeMap::new(),
        },
        cancel: &cancel,
    };
    if global.shows_progress() {
        hydrate::show(&target, &*global.progress(), &cancel);
    }
    let mut working_set = args.working_set.begin(&store, &target, args.count, &cancel)?;
    let start = Instant::now();
    let launched = launch(&order, &*global.progress())?;
    // From here on, the mappings of the clones protect the template from removal.
    drop(lease);
    let seconds = start.elapsed().as_secs_f64();
    let age = SystemTime::now().duration_since(target.created).unwrap_or_default();
    match kind {
        Kind::Qemu => warnings.push(clock_note(age, &launched.clocks)),
        Kind::Firecracker | Kind::CloudHypervisor => warnings.push(format!(
            "the template is {0} old, and the clocks of its clones are {0} behind: see \
             docs/how-to/renew-clones.md",
            span(age)
        )),
        Kind::Simulated | Kind::Command => {}
    }
    warnings.iter().for_each(|warning| crate::print_line!("note: {warning}"));
    let warmed = working_set.warmed(&cancel);
    let (recorded, not_recorded) = match working_set.recorded(&store, &launched.clones, &cancel) {
        Ok(recorded) => (recorded, None),
        Err(error) => (None, Some(error.context("the clone runs, but its working set was not recorded"))),
    };
    let failed = !launched.failures.is_empty();
    let mut code = 0;
    let report = |clones, failures, ended| CloneReport {
        name: target.name.clone(),
        digest: target.digest.to_string(),
        clones,
        failures,
        warnings,
        age,
        seconds,
        warmed,
        recorded,
        ended,
    };
    let done = if args.wait {
        let Launched { clones, failures, children, .. } = launched;
        code = wait(&clones, children, &cancel, &*global.progress())?;
        Done::report(report(clones, failures, true))
    } else {
        Done::report(report(launched.clones, launched.failures, false))
    };
    Ok(match (not_recorded, failed, code) {
        (Some(error), ..) => done.but_failed(error),
        (None, true, _) => done.exit_as(Code::Failed),
        (None, false, code) => done.exit_code(code),
    })
}

/// Returns the VMM that resumes the clones: QEMU by the template's recipe, or the VMM that took the snapshot. Adds
/// notes for the user.
fn vmm_of(args: &CloneArgs, target: &Target, store: &Store, notes: &mut Vec<String>) -> Result<How> {
    let mut served = target.served(store)?;
    if served.recipe.is_none() && served.is_of_firecracker() {
        not_applicable(
            target,
            "Firecracker",
            [
                ("--disk-dir", args.disk_dir.is_some()),
                ("--cloud-hypervisor", args.cloud_hypervisor.is_some()),
            ],
        )?;
        let program = program(args.firecracker.as_deref().unwrap_or("firecracker".as_ref()))?;
        let body = paste(Vmm::Firecracker, &served)?.body.unwrap_or_default();
        let jailer = jailer(args)?;
        let (networks, vsock) = (args.network.clone(), args.vsock.clone());
        // Firecracker leaves its socket behind, so the socket must be in the directory that is removed with the clone.
        if let Some(path) =
            vsock.as_deref().filter(|path| path.starts_with('/') || path.split('/').any(|part| part == ".."))
        {
            return Err(Error::usage(format!(
                "invalid --vsock {path}: the socket must be in the directory or the jail of the clone"
            ))
            .hint("use a relative path: --vsock vsock.sock"));
        }
        return Ok(How::Firecracker(Microvm { program, body, networks, vsock, jailer }));
    }
    let snapshot = Vmm::CloudHypervisor.documents();
    if served.recipe.is_none() && served.has_files(snapshot) {
        not_applicable(
            target,
            "Cloud Hypervisor",
            [
                ("--disk-dir", args.disk_dir.is_some()),
                ("--firecracker", args.firecracker.is_some()),
                ("--jailer", args.jailer.is_some()),
                ("--vsock", args.vsock.is_some()),
            ],
        )?;
        served.read_documents(&store.template(&target.digest)?, snapshot)?;
        notes.extend(check_launch(&served, &args.network, args.count)?);
        let program = program(args.cloud_hypervisor.as_deref().unwrap_or("cloud-hypervisor".as_ref()))?;
        return Ok(How::CloudHypervisor(CloudHypervisor {
            program,
            template: Box::new(served),
            networks: args.network.clone(),
        }));
    }
    let recipe = target.recipe()?;
    not_applicable(
        target,
        "QEMU",
        [
            ("--firecracker", args.firecracker.is_some()),
            ("--cloud-hypervisor", args.cloud_hypervisor.is_some()),
            ("--jailer", args.jailer.is_some()),
            ("--network", !args.network.is_empty()),
            ("--vsock", args.vsock.is_some()),
        ],
    )?;
    Ok(How::Qemu(recipe))
}

/// Returns an error if one of these options is set.
fn not_applicable<const N: usize>(target: &Target, vmm: &str, options: [(&str, bool); N]) -> Result<()> {
    match options.iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((option, _)) => Err(Error::usage(format!(
            "option {option} does not apply: {vmm} runs the clones of template {}",
            target.name
        ))
        .hint("omit the option, or choose another template")),
    }
}

fn jailer(args: &CloneArgs) -> Result<Option<Jailer>> {
    let (Some(jailer), Some(uid), Some(gid)) = (&args.jailer, args.uid, args.gid) else { return Ok(None) };
    let base = &args.chroot_base_dir;
    // Another user with write access to a parent directory could redirect the writes of root.
    let trusted = std::fs::create_dir_all(base).and_then(|()| {
        let path = trust::resolve(base)?;
        trust::open(&path).map(|_| path)
    });
    let chroot_base_dir = trusted.map_err(|e| {
        Error::io("cannot use the directory of the jails", base, e)
            .hint("name a directory that only root can write: --chroot-base-dir DIR")
    })?;
    Ok(Some(Jailer { program: program(jailer)?, uid, gid, chroot_base_dir }))
}

/// Returns the absolute path of a program: clones have another working directory, and a jailer does not search PATH.
fn program(name: &Path) -> Result<PathBuf> {
    let is_path = name.as_os_str().as_encoded_bytes().contains(&b'/');
    let found = match is_path {
        true => name.canonicalize(),
        false => find_program(name)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not found in PATH"))
            .and_then(|path| path.canonicalize()),
    };
    found.map_err(|e| {
        Error::io("cannot find the program", name, e).hint("install the program, or give its path")
    })
}

/// Parses `IFACE=DEVICE`.
fn network(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((interface, device)) if !interface.is_empty() && !device.is_empty() => {
            Ok((interface.to_owned(), device.to_owned()))
        }
        _ => Err("expected IFACE=DEVICE, such as eth0=tap-{index}".to_owned()),
    }
}

/// Returns the canonical path of the directory: clones run with another working directory.
fn disk_directory(path: &Path) -> Result<PathBuf> {
    let path = path.canonicalize().map_err(|e| Error::io("cannot use the directory for disks", path, e))?;
    let usable = path.is_dir() && path.to_str().is_some();
    let wrong = || {
        Error::usage("the value of --disk-dir is not a directory, or its path is not UTF-8")
            .at(&path)
            .hint("name a directory with a UTF-8 path")
    };
    usable.then_some(()).ok_or_else(wrong)?;
    Ok(path)
}

fn is_cut_off(network: String) -> String {
    format!(
        "the network {network} is cut off, because the guests still have the MAC and IP address of the captured guest: \
         change both in the guest, then run QMP set_link with name={network} and up=true on qmp.sock of the clone \
         (docs/how-to/renew-clones.md)"
    )
}

/// Describes the state of the guest clocks after a resume from a template of the given age.
fn clock_note(age: Duration, clocks: &[Clock]) -> String {
    let count = |is_it: fn(&Clock) -> bool| clocks.iter().filter(|clock| is_it(clock)).count();
    let (set, no_channel) = (count(|c| *c == Clock::Set), count(|c| *c == Clock::NoChannel));
    let age = span(age);
    if set == clocks.len() {
        return format!(
            "the template is {age} old; the guest agents have set the clocks; see docs/how-to/renew-clones.md for the other \
             properties that a clone must renew"
        );
    }
    let why = match clocks.iter().find_map(|clock| match clock {
        Clock::Refused(why) => Some(why.as_str()),
        _ => None,
    }) {
        Some(why) => why,
        None if no_channel > 0 => "the VM has no channel for a guest agent",
        None => "no guest agent runs",
    };
    let which = match set {
        0 => format!("the system clocks of its clones are {age} behind"),
        _ => format!(
            "guest agents have set the system clocks of {set} of {}; the others are {age} behind",
            counted(clocks.len() as u64, "clone", "clones")
        ),
    };
    format!(
        "the template is {age} old, and {which} ({why}): set these clocks from the RTC, which shows the current time \
         (hwclock --hctosys), and follow docs/how-to/renew-clones.md"
    )
}

/// Formats a span of time in its largest unit.
fn span(age: Duration) -> String {
    let seconds = age.as_secs();
    let (number, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    counted(number, unit, &format!("{unit}s"))
}

fn all_have_exited(clones: &[Entry]) -> bool {
    let trees = ProcessTrees::scan(clones);
    clones.iter().all(|clone| trees.of(clone).is_empty())
}

/// Waits until all clones have exited, and removes their records and disks. Returns the exit code of the first command
/// that failed, 0 if none did.
fn wait(
    clones: &[Entry],
    mut children: Vec<Child>,
    cancel: &std::sync::atomic::AtomicBool,
    progress: &dyn Progress,
) -> Result<u8> {
    let mut code = 0;
    loop {
        children.retain_mut(|child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                let this = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                if code == 0 {
                    code = u8::try_from(this.max(0)).unwrap_or(u8::MAX);
                }
                false
            }
            Err(_) => false,
        });
        if cancel.load(Ordering::Relaxed) {
            stop(clones, Duration::from_secs(10), progress)?;
            return Err(Error::failed("interrupted: the clones were stopped").hint("run the command again"));
        }
        if children.is_empty() && clones.iter().all(|c| !c.is_alive()) && all_have_exited(clones) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    registry::remove_all(clones)?;
    registry::wait_for_watchdogs(clones);
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_note_says_which_clocks_are_behind_and_why() {
        let note = |clocks: &[Clock]| clock_note(Duration::from_secs(60), clocks);
        let none = "the system clocks of its clones are 60 seconds behind";
        assert!(note(&[Clock::NoAgent]).contains(&format!("{none} (no guest agent runs)")));
        assert!(note(&[Clock::Refused("denied".into())]).contains(&format!("{none} (denied)")));
        let some = note(&[Clock::NoAgent, Clock::Set]);
        assert!(
            some.contains("set the system clocks of 1 of 2 clones; the others are 60 seconds behind"),
            "{some}"
        );
    }
}
