//! QEMU clones: starts QEMU by the template's recipe, loads the device state and resumes the guest.

use std::collections::BTreeSet;

use serde_json::json;

use super::active_launch::ActiveLaunch;
use super::child::{ControlSocket, ReadyWait, connect, expect_short, kill, spawn};
use crate::clones::agent::{Channel, Clock};
use crate::clones::launch::clone_resources;
use crate::clones::migration::{self, Settings};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::{Needs, Recipe};
use crate::clones::registry::{Entry, LOG};
use crate::error::{Error, Result};
use crate::sys::process::ProcessId;
use crate::sys::process::session::{Child, Session};
use crate::units::to_usize;

/// Maximum number of attempts to start a clone, each with new ports and addresses, if another process uses one of them.
const MAX_ATTEMPTS: u32 = 5;

/// QEMU's messages for a port or address that is in use.
const IN_USE_MESSAGES: [&str; 3] =
    ["Could not set up host forwarding rule", "Address already in use", "unable to set guest cid"];

/// Resumes one clone and returns when its guest runs.
///
/// # Errors
/// Returns an error if QEMU cannot be started or refuses the device state, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) on a timeout.
pub fn resume(active: &ActiveLaunch<'_>, recipe: &Recipe, entry: &mut Entry) -> Result<Child> {
    let needs = Needs::of(&recipe.argv);
    let wait = ReadyWait::new(active);
    let mut attempt = 0;
    loop {
        let log_start = std::fs::metadata(entry.log_path()).map_or(0, |m| m.len());
        let outcome = resume_once(active, &wait, recipe, &needs, entry, attempt);
        attempt += 1;
        match outcome {
            Err(error) if attempt < MAX_ATTEMPTS && address_in_use(entry, log_start) => {
                log::info!("clone {}: {error}; restarting with other ports and addresses", entry.id);
            }
            other => return other,
        }
    }
}

/// Returns true if the log of the clone, from byte `log_start`, reports a port or address in use.
fn address_in_use(entry: &Entry, log_start: u64) -> bool {
    let log = entry.read_file(LOG).ok().flatten().unwrap_or_default();
    let text = String::from_utf8_lossy(log.get(to_usize(log_start)..).unwrap_or_default()).into_owned();
    IN_USE_MESSAGES.iter().any(|message| text.contains(message))
}

fn resume_once(
    active: &ActiveLaunch<'_>,
    wait: &ReadyWait<'_>,
    recipe: &Recipe,
    needs: &Needs,
    entry: &mut Entry,
    attempt: u32,
) -> Result<Child> {
    // The ports stay reserved until QEMU listens on them.
    let (values, _reserved) =
        clone_resources::allocate(active.order.target, &recipe.disks, needs, entry, attempt, || {
            active.is_over()
        })?;
    let state = values.get("state").map(str::to_owned).ok_or_else(|| {
        Error::usage(format!(
            "template {} has no device state (file 'state') to resume",
            active.order.target.name
        ))
    })?;
    let arguments = recipe.arguments(&values)?;
    let channel = Channel::of(&arguments);
    let mut words = arguments.iter().flat_map(|arg| arg.split([',', '=', ':']));
    words.by_ref().filter(|word| word.ends_with(".sock")).try_for_each(expect_short)?;
    let mut command = Session::new(&recipe.program);
    command.args(arguments).envs(values.variables());
    // The launcher's working directory would keep its file system busy.
    command.current_dir(&entry.dir);
    // An earlier attempt may have left its socket.
    let _ = std::fs::remove_file(entry.qmp_path());
    let mut child = spawn(&mut command, entry)?;
    match bring_up(wait, &mut child, entry, &state, &recipe.shared_networks()) {
        Ok(mut qmp) => {
            let clock = update_clock(&mut qmp, channel.as_ref());
            active.gathered(|g| g.clocks.push(clock));
            Ok(child)
        }
        Err(error) => Err(kill(child, entry, error)),
    }
}

fn bring_up(
    wait: &ReadyWait<'_>,
    child: &mut Child,
    entry: &mut Entry,
    state: &str,
    shared: &[String],
) -> Result<Qmp> {
    let socket = ControlSocket {
        vmm: "QEMU",
        name: "QMP",
        path: entry.qmp_path(),
        hint: "check that this host has the QEMU, files and devices of the recipe: `stencil inspect --recipe`",
    };
    let mut qmp = connect(wait, child, entry, &socket, Qmp::connect)?;
    // The recipe's program may be a script that started QEMU; the record must name the QEMU process.
    if let Some(process) = ProcessId::of(qmp.peer_pid()?)?.filter(|p| Some(*p) != entry.process()) {
        entry.set_process(process)?;
    }
    // The recipe may set other migration settings (`-global migration.…`), which are restored after the resume.
    let settings = Settings::of(&mut qmp)?;
    settings.for_device_state().apply(&mut qmp)?;
    qmp.run("migrate-incoming", json!({"uri": format!("file:{state}")}))?;
    migration::wait_end(&mut qmp, wait.deadline)?;
    settings.apply(&mut qmp)?;
    // The guest still has the addresses of the captured VM, which may be running.
    shared.iter().try_for_each(|network| cut_off(&mut qmp, network))?;
    qmp.run("cont", json!({}))?;
    match qmp.status()?.as_str() {
        "running" => Ok(qmp),
        other => {
            Err(Error::failed(format!("the guest is not running after the resume: its state is '{other}'"))
                .hint("capture the template again from a running guest, with this version of QEMU"))
        }
    }
}

/// Makes QEMU discard all packets from and to a network. Its cards keep their link: QEMU would keep packets that the
/// guest sends on a card without a link, and would send them with the captured addresses when the link returns.
fn cut_off(qmp: &mut Qmp, network: &str) -> Result<()> {
    // Also takes away the link of the cards.
    qmp.run("set_link", json!({"name": network, "up": false}))?;
    let text = qmp.run("human-monitor-command", json!({"command-line": "info network"}))?;
    let cards = cards_on(text.as_str().unwrap_or_default(), network).ok_or_else(|| {
        Error::failed(format!("QEMU's 'info network' does not show network {network}"))
            .hint("launch the clones with another version of QEMU, and report this one")
    })?;
    for card in cards {
        qmp.run("set_link", json!({"name": card, "up": true}))?;
    }
    Ok(())
}

/// Returns the names of the cards on a network in the text of `info network`, or `None` if the text does not have the
/// network. An indented line is the network of the card in the line above, or a port of a hub. A card with the name of
/// its network is left out: QEMU would set the link of both.
fn cards_on<'a>(text: &'a str, network: &str) -> Option<BTreeSet<&'a str>> {
    let (mut above, mut is_found) = ("", false);
    let mut cards = BTreeSet::new();
    for line in text.lines() {
        let indented = line.strip_prefix(" \\ ");
        let mut words = indented.unwrap_or(line).split(": ");
        let names: Vec<&str> = words.by_ref().take_while(|word| !word.starts_with("index=")).collect();
        is_found |= names.contains(&network);
        match indented {
            None => {
                above =
                    if line.contains("type=nic") { names.first().copied().unwrap_or_default() } else { "" }
            }
            Some(_) => {
                let is_on_network = names.first() == Some(&network);
                if is_on_network && !above.is_empty() && above != network {
                    cards.insert(above);
                }
            }
        }
    }
    is_found.then_some(cards)
}

/// Updates the clock of a resumed guest through its agent. With
/// `-rtc clock=host`, the default, the emulated RTC follows the host's clock.
fn update_clock(qmp: &mut Qmp, channel: Option<&Channel>) -> Clock {
    let clock = channel.map_or(Clock::NoChannel, |channel| channel.set_clock(qmp));
    // Discards missed RTC ticks, which QEMU would otherwise inject in a burst. Fails on machines without an MC146818
    // RTC.
    if let Err(error) = qmp.run("rtc-reset-reinjection", json!({})) {
        log::debug!("{error}");
    }
    clock
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_all_cards_on_a_network() {
        let text = "eth0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ lan: index=0,type=tap,\
                    ifname=tap0,script=/etc/ifup\r\neth0: index=1,type=nic,model=virtio-net-pci\r\n \\ lan: index=1,\
                    type=tap,fd=9\r\ne1000.0: index=0,type=nic\r\n \\ net0: index=0,type=user,net=10.0.2.0\r\nspare: \
                    index=0,type=tap\r\nhub 0\r\n \\ hub0port1: hubbed: index=0,type=tap,ifname=tap1\r\n \\ hub0port0: \
                    rtl.0: index=0,type=nic\r\n";
        assert_eq!(cards_on(text, "lan"), Some(BTreeSet::from(["eth0"])));
        assert_eq!(cards_on(text, "net0"), Some(BTreeSet::from(["e1000.0"])));
        let same = "n: index=0,type=nic\r\n \\ n: index=0,type=tap\r\n";
        assert_eq!(cards_on(same, "n"), Some(BTreeSet::new()));
        // QEMU does not take the link from a card that is connected through a hub.
        for network in ["spare", "hubbed"] {
            assert_eq!(cards_on(text, network), Some(BTreeSet::new()), "{network}");
        }
        assert_eq!(cards_on(text, "other"), None);
    }
}
