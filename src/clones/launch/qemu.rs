//! A QEMU clone: started by the template's recipe, fed its device state, running.

use std::process::{Child, Command};
use std::time::Duration;

use serde_json::json;

use super::Herd;
use super::child::{Patience, spawn};
use crate::clones::qmp::Qmp;
use crate::clones::recipe::Recipe;
use crate::clones::registry::Entry;
use crate::error::{Error, Result};
use crate::sys::process::own_session;

/// The longest path that a unix socket's address holds.
const LONGEST_SOCKET: usize = 107;

/// Resumes one clone and returns when its guest runs.
///
/// # Errors
/// When QEMU cannot be started, refuses the state, or takes too long.
pub fn resume(herd: &Herd<'_>, recipe: &Recipe, entry: &mut Entry) -> Result<Child> {
    if entry.qmp_path().as_os_str().len() > LONGEST_SOCKET {
        return Err(Error::failed("the path of the QMP socket would be longer than a unix socket's may be")
            .at(entry.qmp_path())
            .remedy("set STENCIL_RUNTIME_DIR to a shorter path"));
    }
    let values = herd.order.target.values().of_clone(&entry.id, entry.index, &entry.dir);
    let state = values.get("state").map(str::to_owned).ok_or_else(|| {
        Error::usage(format!(
            "template {} has no file 'state', so no device state to resume",
            herd.order.target.name
        ))
    })?;
    let mut command = Command::new(&recipe.program);
    own_session(&mut command).args(recipe.arguments(&values)?).envs(values.variables());
    // Not the launcher's folder, which somebody may want to unmount.
    command.current_dir(&entry.dir);
    let mut child = spawn(&mut command, entry)?;
    let patience = Patience::new(herd);
    match bring_up(&patience, &mut child, entry, &state) {
        Ok(()) => Ok(child),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

fn bring_up(patience: &Patience<'_>, child: &mut Child, entry: &Entry, state: &str) -> Result<()> {
    let mut qmp = connect(patience, child, entry)?;
    qmp.ignore_shared(true)?;
    qmp.run("migrate-incoming", json!({"uri": format!("file:{state}")}))?;
    qmp.wait_migrated(patience.deadline)?;
    qmp.run("cont", json!({}))?;
    match qmp.status()?.as_str() {
        "running" => Ok(()),
        other => Err(Error::failed(format!("the guest does not run after it was resumed: it is '{other}'"))
            .remedy("capture it again from a guest that runs, with this version of QEMU")),
    }
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
        if let Some(status) = ended {
            return Err(Error::failed(format!("QEMU ended at once ({status})"))
                .remedy("stencil inspect shows the recipe: this host needs the same QEMU, and what its command line names"));
        }
        patience.pause(Duration::from_millis(5))?;
    }
}

fn libc_refused() -> i32 {
    rustix::io::Errno::CONNREFUSED.raw_os_error()
}
