//! What a VM is busy with: a capture waits for none of it, and disturbs none.

use serde_json::{Value, json};

use crate::clones::migration;
use crate::clones::qmp::Qmp;
use crate::error::{Code, Error, Result};

/// Something that a capture would collide with.
#[derive(Debug)]
pub(super) struct Busy {
    pub code: Code,
    pub what: String,
    pub remedy: String,
}

/// Looks for migrations and block jobs of others, and for what keeps QEMU from giving its device state.
///
/// # Errors
/// QEMU's words.
pub(super) fn look(qmp: &mut Qmp) -> Result<Vec<Busy>> {
    let mut found = vec![];
    let (phase, is_idle) = migration::phase(qmp)?;
    if !is_idle {
        found.push(Busy {
            code: Code::InUse,
            what: format!("a migration of the VM is under way (its state is '{phase}')"),
            remedy: "wait for its end (QMP query-migrate), or end it with QMP migrate_cancel".into(),
        });
    }
    let reasons = migration::blockers(qmp)?;
    if !reasons.is_empty() {
        found.push(Busy {
            code: Code::Usage,
            what: format!("QEMU cannot give its device state: {}", reasons.join("; ")),
            remedy: "start the VM without the devices and features that QEMU names".into(),
        });
    }
    let jobs = qmp.run("query-jobs", json!({}))?;
    for job in jobs.as_array().into_iter().flatten() {
        let text = |key| job.get(key).and_then(Value::as_str).unwrap_or("?");
        let (id, kind, status) = (text("id"), text("type"), text("status"));
        let remedy = match status {
            "concluded" => format!("QMP job-dismiss with id={id} removes it"),
            _ => format!("wait for its end (QMP query-jobs), or end it with QMP job-cancel and id={id}"),
        };
        let what = format!("a {kind} job '{id}' has the VM's disks (its state is '{status}')");
        found.push(Busy { code: Code::InUse, what, remedy });
    }
    Ok(found)
}

/// Refuses a VM that is busy.
///
/// # Errors
/// One that names everything that was found.
pub(super) fn refuse(qmp: &mut Qmp) -> Result<()> {
    let errors = look(qmp)?.into_iter().map(|busy| Error::new(busy.code, busy.what).remedy(busy.remedy));
    errors.reduce(Error::and).map_or(Ok(()), Err)
}
