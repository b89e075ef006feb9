//! QEMU's migrations, by which device state leaves a VM and enters a clone: the settings for that, and their end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::qmp::Qmp;
use crate::error::{Error, Result};

/// The capability by which device state comes without RAM that lies in a shared file.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// States of a migration that is not under way.
const IDLE: [&str; 4] = ["none", "completed", "failed", "cancelled"];

/// Parameters that decide how a migration goes over a pipe, with the values for device state.
fn parameters() -> [(&'static str, Value); 9] {
    [
        ("mode", json!("normal")),
        ("tls-creds", json!("")),
        ("tls-hostname", json!("")),
        ("tls-authz", json!("")),
        // The VM stands still meanwhile: no limit, in bytes per second and in milliseconds.
        ("max-bandwidth", json!(1_u64 << 40)),
        ("avail-switchover-bandwidth", json!(0)),
        ("downtime-limit", json!(300)),
        // Else video memory full of zeros becomes part of the device state.
        ("zero-page-detection", json!("legacy")),
        ("direct-io", json!(false)),
    ]
}

/// Settings of a VM's migrations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    capabilities: BTreeMap<String, bool>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// All capabilities, and the parameters that [`for_device_state`](Self::for_device_state) changes, as they are now.
    ///
    /// # Errors
    /// As [`Qmp::run`], or when this QEMU cannot leave shared RAM out.
    pub fn of(qmp: &mut Qmp) -> Result<Settings> {
        let all = qmp.run("query-migrate-capabilities", json!({}))?;
        let capability = |one: &Value| {
            let name = one.get("capability")?.as_str()?.to_owned();
            Some((name, one.get("state")?.as_bool()?))
        };
        let capabilities: BTreeMap<_, _> =
            all.as_array().into_iter().flatten().filter_map(capability).collect();
        if !capabilities.contains_key(IGNORE_SHARED) {
            return Err(Error::failed(format!(
                "this QEMU does not know the migration capability {IGNORE_SHARED}"
            ))
            .at(qmp.path())
            .remedy("use QEMU 8.2 or newer"));
        }
        let all = qmp.run("query-migrate-parameters", json!({}))?;
        let parameter = |(name, _): (&str, Value)| Some((name.to_owned(), all.get(name)?.clone()));
        Ok(Settings { capabilities, parameters: parameters().into_iter().filter_map(parameter).collect() })
    }

    /// The settings under which device state comes without shared RAM, at once and as one stream.
    #[must_use]
    pub fn for_device_state(&self) -> Settings {
        let known = |(name, value): (&str, Value)| {
            self.parameters.contains_key(name).then(|| (name.to_owned(), value))
        };
        Settings {
            capabilities: self.capabilities.keys().map(|n| (n.clone(), n == IGNORE_SHARED)).collect(),
            parameters: parameters().into_iter().filter_map(known).collect(),
        }
    }

    /// Makes the VM's settings these.
    ///
    /// # Errors
    /// As [`Qmp::run`]. QEMU changes no capability while a migration is under way.
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
        // All in one command: QEMU looks at the set that results, and some exclude others.
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

/// Capabilities and parameters that are set, and would change what a migration of device state does.
pub fn set_aside(settings: &Settings) -> Vec<String> {
    let on = settings.capabilities.iter().filter(|(name, on)| **on && *name != IGNORE_SHARED);
    let usual = |name: &str, value: &Value| match name {
        "mode" => value == "normal",
        "direct-io" => value == false,
        name => !name.starts_with("tls-") || value == "",
    };
    let unusual = settings.parameters.iter().filter(|(name, value)| !usual(name, value));
    on.map(|(name, _)| name.clone()).chain(unusual.map(|(name, value)| format!("{name}={value}"))).collect()
}

/// Why QEMU would refuse to migrate the VM in its normal mode, in its own words. Empty while another mode is set, since
/// QEMU then lists the obstacles of that mode only.
///
/// # Errors
/// As [`Qmp::run`].
pub fn blockers(qmp: &mut Qmp) -> Result<Vec<String>> {
    let parameters = qmp.run("query-migrate-parameters", json!({}))?;
    if parameters.get("mode").and_then(Value::as_str).unwrap_or("normal") != "normal" {
        return Ok(vec![]);
    }
    let info = qmp.run("query-migrate", json!({}))?;
    let reasons = info.get("blocked-reasons").and_then(Value::as_array).into_iter().flatten();
    Ok(reasons.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// The state of the VM's last migration, and whether it is over.
///
/// # Errors
/// As [`Qmp::run`].
pub fn phase(qmp: &mut Qmp) -> Result<(String, bool)> {
    let info = qmp.run("query-migrate", json!({}))?;
    let status = status(&info);
    Ok((status.to_owned(), IDLE.contains(&status)))
}

fn status(info: &Value) -> &str {
    info.get("status").and_then(Value::as_str).unwrap_or("none")
}

/// Waits until the migration that was started has come to its end.
///
/// # Errors
/// When it fails, in QEMU's words, or does not end by the deadline.
pub fn wait_end(qmp: &mut Qmp, deadline: Instant) -> Result<()> {
    let mut pause = Duration::from_millis(1);
    loop {
        let info = qmp.run("query-migrate", json!({}))?;
        match status(&info) {
            "completed" => return Ok(()),
            status @ ("failed" | "cancelled") => {
                let reason = info.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::failed(format!("the migration of device state has {status}: {reason}"))
                    .at(qmp.path())
                    .remedy("QEMU's log says which device; that one has to go, or be one that can migrate"));
            }
            _ if Instant::now() >= deadline => {
                return Err(Error::try_again("the migration of device state does not come to an end")
                    .at(qmp.path())
                    .remedy(
                        "see query-migrate on the same socket; a host that is less busy takes less long",
                    ));
            }
            _ => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
