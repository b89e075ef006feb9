//! Launches clones of one template: many in parallel; all or none, unless `keep_going` is set.

mod active_launch;
mod child;
mod clone_resources;
mod job;
mod launch_watchdog;
mod microvm;
mod order;
mod qemu;
mod simulate;
mod simulated_launch;
mod target;
mod worker;
mod zygote;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

use crate::clones::baseline::Baseline;
use crate::clones::capture;
use crate::clones::find;
use crate::clones::registry::{self, Entry, Kind, Launch};
use crate::clones::vmm_api::Server;
use crate::control;
use crate::error::Result;
use crate::progress::Progress;
use active_launch::ActiveLaunch;
pub use order::{CloudHypervisor, Failure, How, Jailer, LaunchRequest, Launched, Microvm, Ready};
pub use simulate::{Amount, Scatter, Simulate};
use simulated_launch::Zygote;
pub use target::Target;

/// Launches clones and returns when all are ready and independent of this process.
///
/// # Errors
/// Returns an error if a clone does not become ready (with `keep_going`: if none does) or the launch is cancelled. All
/// clones of the launch are then removed.
pub fn launch(order: &LaunchRequest<'_>, progress: &dyn Progress) -> Result<Launched> {
    // A failure does not matter here: leftovers of other launches never share an id or a port with this launch.
    registry::sweep().unwrap_or_else(|error| log::warn!("{error}"));
    let mut launch = Launch::prepare()?;
    // Started before any clone: if this process dies, the watchdog or the next sweep removes the clones.
    let watchdog = launch_watchdog::start(&launch)?;
    launch.set_watchdog(watchdog.process()?);
    launch.start()?;
    // Clones that end after the baseline would have a part in it.
    let was_idle = has_no_clones(&launch);
    // The baseline is taken before the zygote starts: the clones share pages with the zygote, so its memory belongs to
    // the launch.
    let before = Baseline::now();
    // The zygote is loaded while this process searches for clones.
    let zygote = match &order.how {
        How::Simulated(simulate) => simulated_launch::start(order, simulate).map(Some),
        _ => Ok(None),
    };
    let is_idle = was_idle.and_then(|was_idle| Ok(was_idle && is_idle(&launch)?));
    let baseline = is_idle.and_then(|idle| idle.then_some(before).transpose());
    launch.set_baseline(baseline.unwrap_or_else(|error| {
        log::warn!("no baseline of available memory for `stencil density --audit`: {error}");
        None
    }));
    progress.start_count("launch", "clones", order.count.into());
    let gathered = zygote.and_then(|zygote| gather(order, &launch, zygote, progress));
    progress.finish();
    let outcome = gathered.and_then(|(launched, held)| {
        held.map_or(Ok(()), simulated_launch::Held::release)?;
        Ok(launched)
    });
    match outcome {
        Ok(launched) => {
            launch.commit()?;
            Ok(launched)
        }
        // The first error is the cause and is returned. An error of the cleanup goes to the log.
        Err(error) => {
            launch.abort().unwrap_or_else(|error| log::error!("{error}"));
            Err(error)
        }
    }
}

/// Returns true if no record has a clone that is alive, and no other launch is in progress.
fn has_no_clones(launch: &Launch) -> Result<bool> {
    // A process of a command may map nothing.
    let is_clone = |entry: &Entry| entry.kind != Kind::Command && entry.is_alive();
    Ok(launch.is_alone()? && !registry::list()?.iter().any(is_clone))
}

/// Returns true if there are no clones that already use memory.
fn is_idle(launch: &Launch) -> Result<bool> {
    Ok(has_no_clones(launch)?
        && find::template_mappings(&control::mounts_and_dead()?)?.complete()?.is_empty())
}

fn gather(
    order: &LaunchRequest<'_>,
    launch: &Launch,
    zygote: Option<Zygote>,
    progress: &dyn Progress,
) -> Result<(Launched, Option<simulated_launch::Held>)> {
    let active = ActiveLaunch { order, launch, progress, next: AtomicU32::new(0), state: Mutex::default() };
    let (launched, held) = match &order.how {
        How::Simulated(simulate) => {
            let zygote = zygote.map_or_else(|| simulated_launch::start(order, simulate), Ok)?;
            let (launched, held) = simulated_launch::launch(&active, zygote)?;
            (launched, Some(held))
        }
        How::Qemu(recipe) => {
            (active.launch_children(|active, entry| qemu::resume(active, recipe, entry))?, None)
        }
        How::Firecracker(microvm) => {
            if microvm.jailer.is_some() {
                microvm::enter_mount_namespace()?;
            }
            let load = |active: &_, entry: &mut _| microvm::firecracker::load(active, microvm, entry);
            (microvm::resume(&active, Server::Firecracker, active.launch_children(load)?), None)
        }
        How::CloudHypervisor(snapshot) => {
            let load = |active: &_, entry: &mut _| microvm::cloud_hypervisor::load(active, snapshot, entry);
            (microvm::resume(&active, Server::CloudHypervisor, active.launch_children(load)?), None)
        }
        How::Command(argv, ready) => {
            (active.launch_children(|active, entry| child::run(active, argv, *ready, entry))?, None)
        }
    };
    Ok((active.all_or_none(launched)?, held))
}

/// Runs this process as a helper of a launch or capture, if its first argument is that of a helper.
pub fn helper_main() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let first = args.next()?;
    if first == zygote::ARGUMENT {
        Some(zygote::main())
    } else if first == launch_watchdog::ARGUMENT {
        Some(launch_watchdog::main(args.next()))
    } else if first == capture::RESUME_ARGUMENT {
        Some(capture::resume_main(args))
    } else {
        None
    }
}
