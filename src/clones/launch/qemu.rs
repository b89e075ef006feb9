//! A QEMU clone: started by the template's recipe, fed its device state, running.

use std::process::{Child, Command};
use std::time::Duration;

use serde_json::json;

use super::Herd;
use super::child::{Patience, spawn};
use super::own;
use crate::clones::agent::{Channel, Clock};
use crate::clones::family;
use crate::clones::migration::{self, Settings};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{Needs, Recipe};
use crate::clones::registry::{Entry, LOG};
use crate::error::{Error, Result};
use crate::sys::process::{ProcessId, own_session};

/// The longest path that a unix socket's address holds.
const LONGEST_SOCKET: usize = 107;

/// How often a clone is begun anew with other ports and addresses, because somebody else has taken one.
const ATTEMPTS: u32 = 5;

/// Words of QEMU's that mean so.
const TAKEN: [&str; 3] =
    ["Could not set up host forwarding rule", "Address already in use", "unable to set guest cid"];

/// Resumes one clone and returns when its guest runs.
///
/// # Errors
/// When QEMU cannot be started, refuses the state, or takes too long.
pub fn resume(herd: &Herd<'_>, recipe: &Recipe, entry: &mut Entry) -> Result<Child> {
    let needs = Needs::of(&recipe.argv);
    let patience = Patience::new(herd);
    let mut attempt = 0;
    loop {
        let begin = std::fs::metadata(entry.log_path()).map_or(0, |m| m.len());
        let outcome = resume_once(herd, &patience, recipe, &needs, entry, attempt);
        attempt += 1;
        match outcome {
            Err(error) if attempt < ATTEMPTS && somebody_has_it(entry, begin) => {
                log::info!("clone {}: {error}; it is begun anew with other ports", entry.id);
            }
            other => return other,
        }
    }
}

/// True when QEMU has said since then that a port or an address is taken.
fn somebody_has_it(entry: &Entry, begin: u64) -> bool {
    let log = entry.read_file(LOG).ok().flatten().unwrap_or_default();
    let since = String::from_utf8_lossy(log.get(begin as usize..).unwrap_or_default()).into_owned();
    TAKEN.iter().any(|words| since.contains(words))
}

fn resume_once(
    herd: &Herd<'_>,
    patience: &Patience<'_>,
    recipe: &Recipe,
    needs: &Needs,
    entry: &mut Entry,
    attempt: u32,
) -> Result<Child> {
    // The ports stay reserved until QEMU listens on them.
    let (values, _reserved) =
        own::make(herd.order.target, &recipe.disks, needs, entry, attempt, || herd.is_over())?;
    let state = values.get("state").map(str::to_owned).ok_or_else(|| {
        Error::usage(format!(
            "template {} has no file 'state', so no device state to resume",
            herd.order.target.name
        ))
    })?;
    let arguments = recipe.arguments(&values)?;
    let channel = Channel::of(&arguments);
    let sockets =
        arguments.iter().flat_map(|arg| arg.split([',', '=', ':'])).filter(|word| word.ends_with(".sock"));
    if let Some(long) = sockets.into_iter().find(|path| path.len() > LONGEST_SOCKET) {
        return Err(Error::failed(
            "the path of a clone's socket would be longer than a unix socket's may be",
        )
        .at(long)
        .remedy("set STENCIL_RUNTIME_DIR to a shorter path"));
    }
    let mut command = Command::new(&recipe.program);
    own_session(&mut command).args(arguments).envs(values.variables());
    // Not the launcher's folder, which somebody may want to unmount.
    command.current_dir(&entry.dir);
    // A QEMU before this one may have left it.
    let _ = std::fs::remove_file(entry.qmp_path());
    let mut child = spawn(&mut command, entry)?;
    match bring_up(patience, &mut child, entry, &state, &recipe.shared_networks()) {
        Ok(mut qmp) => {
            let clock = renew_clock(&mut qmp, channel.as_ref());
            herd.gathered(|g| g.clocks.push(clock));
            Ok(child)
        }
        Err(error) => {
            // The recipe's program may have started another one.
            match family::kill(std::slice::from_ref(entry)) {
                Ok(()) => {
                    let _ = child.wait();
                    Err(error)
                }
                // One that does not die is not waited for.
                Err(other) => {
                    let _ = child.kill();
                    let _ = child.try_wait();
                    Err(error.and(other))
                }
            }
        }
    }
}

fn bring_up(
    patience: &Patience<'_>,
    child: &mut Child,
    entry: &mut Entry,
    state: &str,
    shared: &[String],
) -> Result<Qmp> {
    let mut qmp = connect(patience, child, entry)?;
    // The recipe's program may be a script that started QEMU: the clone is the QEMU.
    if let Some(process) = ProcessId::of(qmp.peer_pid()?)?.filter(|p| Some(*p) != entry.process()) {
        entry.set_process(process)?;
    }
    // The recipe may have others (-global migration.…), which the clone has afterwards.
    let settings = Settings::of(&mut qmp)?;
    settings.for_device_state().apply(&mut qmp)?;
    qmp.run("migrate-incoming", json!({"uri": format!("file:{state}")}))?;
    migration::wait_end(&mut qmp, patience.deadline)?;
    settings.apply(&mut qmp)?;
    // Its guest still has the addresses of the captured one, which may run.
    for network in shared {
        qmp.run("set_link", json!({"name": network, "up": false}))?;
    }
    qmp.run("cont", json!({}))?;
    match qmp.status()?.as_str() {
        "running" => Ok(qmp),
        other => Err(Error::failed(format!("the guest does not run after it was resumed: it is '{other}'"))
            .remedy("capture it again from a guest that runs, with this version of QEMU")),
    }
}

/// What can be done from outside for the clock of a guest that was resumed. Its RTC follows the host's clock.
fn renew_clock(qmp: &mut Qmp, channel: Option<&Channel>) -> Clock {
    let clock = channel.map_or(Clock::NoChannel, |channel| channel.set_clock(qmp));
    // Ticks that the RTC has missed are not made up for. Machines without such an RTC do not know this command.
    if let Err(error) = qmp.run("rtc-reset-reinjection", json!({})) {
        log::debug!("{error}");
    }
    clock
}

fn connect(patience: &Patience<'_>, child: &mut Child, entry: &Entry) -> Result<Qmp> {
    let path = entry.qmp_path();
    loop {
        if path.exists() {
            match Qmp::connect(&path) {
                // Bound, not listening yet.
                Err(e) if e.errno() == Some(libc_refused()) => {}
                other => return other,
            }
        }
        let ended = child.try_wait().map_err(|e| Error::failed("cannot wait for QEMU").because(e))?;
        if let Some(status) = ended
            && family::of_folder(&entry.dir).is_empty()
        {
            return Err(Error::failed(format!("QEMU ended at once ({status})"))
                .remedy("stencil inspect shows the recipe: this host needs the same QEMU, and what its command line names"));
        }
        patience.pause(Duration::from_millis(5))?;
    }
}

fn libc_refused() -> i32 {
    rustix::io::Errno::CONNREFUSED.raw_os_error()
}
