//! Operations of a VM that conflict with a capture. A capture neither waits for them nor interrupts them.

use serde_json::{Value, json};

use crate::clones::migration;
use crate::clones::qmp::Qmp;
use crate::error::{Code, Error, Result};

/// An operation or condition that conflicts with a capture.
#[derive(Debug)]
pub(super) struct Busy {
    pub code: Code,
    pub what: String,
    pub remedy: String,
}

/// Finds migrations and block jobs of other clients, and QEMU's reasons for refusing a migration.
///
/// # Errors
/// Same as [`Qmp::run`].
pub(super) fn find(qmp: &mut Qmp) -> Result<Vec<Busy>> {
    let mut found = vec![];
    let (phase, is_idle) = migration::phase(qmp)?;
    if !is_idle {
        found.push(Busy {
            code: Code::InUse,
            what: format!("a migration of the VM is active (state '{phase}')"),
            remedy:
                "wait for the end of the migration (QMP query-migrate), or cancel the migration with QMP \
                migrate_cancel"
                    .into(),
        });
    }
    let reasons = migration::blockers(qmp)?;
    if !reasons.is_empty() {
        found.push(Busy {
            code: Code::Usage,
            what: format!("QEMU cannot save the device state: {}", reasons.join("; ")),
            remedy: "restart the VM without the devices and features that QEMU names".into(),
        });
    }
    let jobs = qmp.run("query-jobs", json!({}))?;
    for job in jobs.as_array().into_iter().flatten() {
        let text = |key| job.get(key).and_then(Value::as_str).unwrap_or("?");
        let (id, kind, status) = (text("id"), text("type"), text("status"));
        let remedy = match status {
            "concluded" => format!("remove the job with QMP job-dismiss and id={id}"),
            "ready" => format!("end the job with QMP job-complete or job-cancel and id={id}"),
            _ => format!(
                "wait for the end of the job (QMP query-jobs), or cancel the job with QMP job-cancel \
                and id={id}"
            ),
        };
        let what = format!("the VM's disks are in use by {kind} job '{id}' (state '{status}')");
        found.push(Busy { code: Code::InUse, what, remedy });
    }
    Ok(found)
}

/// Refuses a VM with conflicting operations.
///
/// # Errors
/// Returns one error with all conflicts: [`Code::InUse`] if the first one is a migration or job, [`Code::Usage`] if
/// QEMU cannot save the device state.
pub(super) fn refuse(qmp: &mut Qmp) -> Result<()> {
    let errors = find(qmp)?.into_iter().map(|busy| Error::new(busy.code, busy.what).hint(busy.remedy));
    errors.reduce(Error::and).map_or(Ok(()), Err)
}
