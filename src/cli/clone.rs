//! `stencil clone`: many processes map one template.

use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use serde_json::{Value, json};

use super::output::{Done, Report, to_json};
use super::words::word;
use super::{Global, hydrate, interrupt};
use crate::clones::agent::Clock;
use crate::clones::family::Families;
use crate::clones::launch::{Failure, How, Launched, Order, Ready, Simulate, Target, launch};
use crate::clones::registry::{self, Entry};
use crate::clones::stop::stop;
use crate::error::{Code, Error, Result};
use crate::store::{Store, TemplateRef};

/// Launch clones of a template
///
/// Without --simulate and CMD the template's own launch recipe is used. The command returns when all clones are
/// ready; they live on until they end or are stopped. If one does not get ready, none is left.
#[derive(Debug, Args)]
pub struct CloneArgs {
    /// The template: NAME[:TAG], NAME@blake3:HEX or the beginning of its digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// How many
    #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Wait until all have ended (an interrupt stops them); exit as the command did
    #[arg(long)]
    wait: bool,
    /// When a command is ready: mapped (it maps the template's memory) or notify (it writes to the descriptor
    /// whose number is in STENCIL_NOTIFY)
    #[arg(long, default_value = "mapped", value_parser = ["mapped", "notify"])]
    ready: String,
    /// Keep the clones that get ready though others fail
    #[arg(long)]
    keep_going: bool,
    /// No VMM but a worker that maps the memory and touches pages: read=AMOUNT,write=AMOUNT[,seed=N][,file=NAME];
    /// an AMOUNT is a share (5%), pages (1024p) or bytes (4M)
    #[arg(long, value_name = "read=P%,write=P%", value_parser = word::<Simulate>, conflicts_with = "command")]
    simulate: Option<Simulate>,
    /// Folder for the clones' disks; each goes with its clone [default: the clone's own folder, which is in RAM where
    /// /run is]
    #[arg(long, value_name = "DIR", conflicts_with = "simulate")]
    disk_dir: Option<PathBuf>,
    /// How many are launched at a time [default: twice the processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    parallel: Option<u32>,
    /// Seconds that one clone may take to get ready
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    /// A command to run; {memory} {state} {file:NAME} {id} {index} {dir} {mac} {mac:N} {cid} {uuid} {port:N} {disk:NAME}
    /// are filled in, and are in STENCIL_MEMORY, STENCIL_STATE… as well: a port and a disk where the command names it
    #[arg(last = true, value_name = "CMD")]
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
    ended: bool,
}

impl Report for CloneReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if !self.ended {
            for clone in &self.clones {
                match clone.ports.is_empty() {
                    true => writeln!(out, "{}", clone.id)?,
                    false => writeln!(out, "{}\t{}", clone.id, super::ps::ports(&clone.ports))?,
                }
            }
        }
        for failure in &self.failures {
            writeln!(out, "clone {} failed: {}", failure.index, failure.message)?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "template": self.digest,
            "clones": to_json(&self.clones),
            "failures": to_json(&self.failures),
            "warnings": self.warnings,
            "template_age_seconds": self.age.as_secs(),
            "ready_seconds": self.seconds,
        })
    }
}

/// Runs it.
///
/// # Errors
/// When there is no such template or mount, or a clone does not get ready.
pub fn run(args: &CloneArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let (target, lease) = Target::find(&store, &args.template, "clone")?;
    let how = match (&args.simulate, args.command.is_empty()) {
        (Some(simulate), _) => How::Simulated(simulate.clone()),
        (None, true) => How::Qemu(target.recipe()?),
        (None, false) => How::Command(
            args.command.clone(),
            if args.ready == "notify" { Ready::Notify } else { Ready::Mapped },
        ),
    };
    let mut warnings: Vec<String> = match &how {
        How::Qemu(recipe) => recipe.shared_networks().into_iter().map(no_link).collect(),
        _ => vec![],
    };
    let is_resumed = matches!(how, How::Qemu(_));
    let cancel = interrupt::flag()?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let order = Order {
        target: &target,
        how,
        count: args.count,
        parallel: args.parallel.unwrap_or(cores * 2),
        keep_going: args.keep_going,
        patience: Duration::from_secs(args.timeout.into()),
        disk_dir: args.disk_dir.as_deref().map(folder).transpose()?,
        cancel: &cancel,
    };
    if global.draws() {
        hydrate::show(&target, &*global.progress(), &cancel);
    }
    let start = Instant::now();
    let launched = launch(&order, &*global.progress())?;
    // From here on they are found by what they map.
    drop(lease);
    let seconds = start.elapsed().as_secs_f64();
    let age = SystemTime::now().duration_since(target.created).unwrap_or_default();
    if is_resumed {
        warnings.push(clock_note(age, &launched.clocks));
    }
    warnings.iter().for_each(|warning| crate::say!("note: {warning}"));
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
        ended,
    };
    let done = if args.wait {
        let Launched { clones, failures, children, .. } = launched;
        code = wait(&clones, children, &cancel)?;
        Done::report(report(clones, failures, true))
    } else {
        Done::report(report(launched.clones, launched.failures, false))
    };
    Ok(match (failed, code) {
        (true, _) => done.exit_as(Code::Failed),
        (false, code) => done.exit_code(code),
    })
}

/// The path of a folder from the root: clones do not stay in this process's.
fn folder(path: &Path) -> Result<PathBuf> {
    let path = path.canonicalize().map_err(|e| Error::io("cannot use the folder for disks", path, e))?;
    let usable = path.is_dir() && path.to_str().is_some();
    let wrong = || Error::usage("--disk-dir wants a folder whose name is UTF-8").at(&path);
    usable.then_some(()).ok_or_else(wrong)?;
    Ok(path)
}

fn no_link(network: String) -> String {
    format!(
        "cards on {network} are without a link, as their guests have the MAC and IP address of the captured one: change \
         those in the guest, then QMP set_link with name={network} and up=true at qmp.sock of the clone (docs/how-to/renew-clones.md)"
    )
}

/// What is known of the clocks of guests that were resumed from a template of that age.
fn clock_note(age: Duration, clocks: &[Clock]) -> String {
    let count = |is_it: fn(&Clock) -> bool| clocks.iter().filter(|clock| is_it(clock)).count();
    let (set, no_channel) = (count(|c| *c == Clock::Set), count(|c| *c == Clock::NoChannel));
    let age = span(age);
    if set == clocks.len() {
        return format!(
            "the template is {age} old: the guest agents have set the clocks; what else a clone must renew is in \
             docs/how-to/renew-clones.md"
        );
    }
    let why = match clocks.iter().find_map(|clock| match clock {
        Clock::Refused(why) => Some(why.as_str()),
        _ => None,
    }) {
        Some(why) => format!("the guest agent of {} of {} has set its clock ({why})", set, clocks.len()),
        None if no_channel > 0 => "the VM has no channel for a guest agent".to_owned(),
        None => format!("no guest agent runs in {} of {}", clocks.len() - set, clocks.len()),
    };
    format!(
        "the template is {age} old, and the system clocks of its clones are as far behind: {why}; set them from the RTC, \
         which shows today's time (hwclock --hctosys), and renew what docs/how-to/renew-clones.md lists"
    )
}

/// A span of time in its largest unit.
fn span(age: Duration) -> String {
    let seconds = age.as_secs();
    let (number, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{number} {unit}{}", if number == 1 { "" } else { "s" })
}

fn nobody_is_left(clones: &[Entry]) -> bool {
    let families = Families::look(clones);
    clones.iter().all(|clone| families.of(clone).is_empty())
}

/// Waits for the end of all clones and removes what they had. Gives the exit code of the first that failed.
fn wait(
    clones: &[Entry],
    mut children: Vec<std::process::Child>,
    cancel: &std::sync::atomic::AtomicBool,
) -> Result<u8> {
    let mut code = 0;
    loop {
        children.retain_mut(|child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                let this = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                if code == 0 {
                    code = this.clamp(0, 255) as u8;
                }
                false
            }
            Err(_) => false,
        });
        if cancel.load(Ordering::Relaxed) {
            stop(clones, Duration::from_secs(10))?;
            return Err(Error::failed("interrupted: the clones were stopped"));
        }
        if children.is_empty() && clones.iter().all(|c| !c.is_alive()) && nobody_is_left(clones) {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    clones.iter().try_for_each(Entry::remove)?;
    registry::wait_for_watchdogs(clones);
    Ok(code)
}
