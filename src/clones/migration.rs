//! QEMU migrations, which save the device state of a VM and load it into a clone: settings, progress and outcome.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::qmp::Qmp;
use crate::error::{Error, Result};

/// The capability that leaves RAM in shared files out of the migration stream.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// States in which no migration is active.
const IDLE: [&str; 4] = ["none", "completed", "failed", "cancelled"];

/// Parameters that affect a migration through a pipe, with the values for saving device state.
fn parameters() -> [(&'static str, Value); 9] {
    [
        ("mode", json!("normal")),
        ("tls-creds", json!("")),
        ("tls-hostname", json!("")),
        ("tls-authz", json!("")),
        // The VM is paused meanwhile, so no limit is needed. Units: bytes/s, bytes/s, ms.
        ("max-bandwidth", json!(1_u64 << 40)),
        ("avail-switchover-bandwidth", json!(0)),
        ("downtime-limit", json!(300)),
        // Other methods send zero pages of video memory as data, so the device state grows by that size.
        ("zero-page-detection", json!("legacy")),
        ("direct-io", json!(false)),
    ]
}

/// Migration capabilities and parameters of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Reads all capabilities, and the parameters that [`for_device_state`](Self::for_device_state) changes.
    ///
    /// # Errors
    /// Same as [`Qmp::run`]; also returns an error if this QEMU does not support `x-ignore-shared`.
    pub fn of(qmp: &mut Qmp) -> Result<Settings> {
        let all = qmp.run("query-migrate-capabilities", json!({}))?;
        let capability = |item: &Value| {
            let name = item.get("capability")?.as_str()?.to_owned();
            Some((name, item.get("state")?.as_bool()?))
        };
        let capabilities: BTreeMap<_, _> =
            all.as_array().into_iter().flatten().filter_map(capability).collect();
        if !capabilities.contains_key(IGNORE_SHARED) {
            return Err(Error::failed(format!(
                "unsupported QEMU: missing migration capability {IGNORE_SHARED}"
            ))
            .at(qmp.path())
            .hint("use QEMU 8.2 or newer"));
        }
        let all = qmp.run("query-migrate-parameters", json!({}))?;
        let parameter = |(name, _): (&str, Value)| Some((name.to_owned(), all.get(name)?.clone()));
        Ok(Settings { capabilities, parameters: parameters().into_iter().filter_map(parameter).collect() })
    }

    /// Returns the settings for saving device state without shared RAM, at full speed and in one stream.
    #[must_use]
    pub fn for_device_state(&self) -> Settings {
        let supported = |(name, value): (&str, Value)| {
            self.parameters.contains_key(name).then(|| (name.to_owned(), value))
        };
        Settings {
            capabilities: self.capabilities.keys().map(|n| (n.clone(), n == IGNORE_SHARED)).collect(),
            parameters: parameters().into_iter().filter_map(supported).collect(),
        }
    }

    /// Changes the settings of the VM to these.
    ///
    /// # Errors
    /// Same as [`Qmp::run`]. QEMU refuses to change capabilities while a migration is active.
    pub fn apply(&self, qmp: &mut Qmp) -> Result<()> {
        let now = Settings::of(qmp)?;
        let changed: Map<String, Value> = self
            .parameters
            .iter()
            .filter(|(name, value)| now.parameters.get(*name) != Some(*value))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !changed.is_empty() {
            qmp.run("migrate-set-parameters", Value::Object(changed))?;
        }
        // All in one command: QEMU validates the resulting set, and some capabilities exclude others.
        let changed: Vec<Value> = self
            .capabilities
            .iter()
            .filter(|(name, state)| now.capabilities.get(*name) != Some(*state))
            .map(|(name, state)| json!({"capability": name, "state": state}))
            .collect();
        if !changed.is_empty() {
            qmp.run("migrate-set-capabilities", json!({"capabilities": changed}))?;
        }
        Ok(())
    }
}

/// Describes the settings that are not at their defaults and that a capture overrides.
pub fn overridden(settings: &Settings) -> Vec<String> {
    let on = settings.capabilities.iter().filter(|(name, on)| **on && *name != IGNORE_SHARED);
    let usual = |name: &str, value: &Value| match name {
        "mode" => value == "normal",
        "direct-io" => value == false,
        name => !name.starts_with("tls-") || value == "",
    };
    let unusual = settings.parameters.iter().filter(|(name, value)| !usual(name, value));
    on.map(|(name, _)| name.clone()).chain(unusual.map(|(name, value)| format!("{name}={value}"))).collect()
}

/// Returns QEMU's reasons for refusing to migrate the VM in mode `normal`. The list is empty while another mode is set,
/// because QEMU then reports the reasons for that mode only.
///
/// # Errors
/// Same as [`Qmp::run`].
pub fn blockers(qmp: &mut Qmp) -> Result<Vec<String>> {
    let parameters = qmp.run("query-migrate-parameters", json!({}))?;
    if parameters.get("mode").and_then(Value::as_str).unwrap_or("normal") != "normal" {
        return Ok(vec![]);
    }
    let info = qmp.run("query-migrate", json!({}))?;
    let reasons = info.get("blocked-reasons").and_then(Value::as_array).into_iter().flatten();
    Ok(reasons.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// Returns the state of the last migration, and whether no migration is active.
///
/// # Errors
/// Same as [`Qmp::run`].
pub fn phase(qmp: &mut Qmp) -> Result<(String, bool)> {
    let info = qmp.run("query-migrate", json!({}))?;
    let status = status(&info);
    Ok((status.to_owned(), IDLE.contains(&status)))
}

fn status(info: &Value) -> &str {
    info.get("status").and_then(Value::as_str).unwrap_or("none")
}

/// Waits until the active migration has completed.
///
/// # Errors
/// Returns an error with QEMU's text if the migration fails, and [`Code::TryAgain`](crate::error::Code::TryAgain) if it
/// does not complete by the deadline.
pub fn wait_end(qmp: &mut Qmp, deadline: Instant) -> Result<()> {
    let mut pause = Duration::from_millis(1);
    loop {
        let info = qmp.run("query-migrate", json!({}))?;
        match status(&info) {
            "completed" => return Ok(()),
            status @ ("failed" | "cancelled") => {
                let reason = info.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::failed(format!("migration of device state {status}: {reason}"))
                    .at(qmp.path())
                    .hint("find the device in QEMU's log, then start the VM without it"));
            }
            _ if Instant::now() >= deadline => {
                return Err(Error::try_again("timed out waiting for the migration of device state")
                    .at(qmp.path())
                    .hint("see query-migrate on the same socket; try again when the host is less busy"));
            }
            _ => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
