//! A launch recipe: the command line that a template's clones are resumed with, kept in its policy.
//!
//! Arguments hold placeholders, filled in for each clone: `{memory}`, `{state}` and `{file:NAME}` are paths
//! of the template's files below the mount, `{dir}` is the clone's own folder, `{id}` and `{index}` name it.
//! What a host can have only once is made for each: `{mac}` and `{mac:N}`, `{cid}`, `{uuid}`, `{port:N}`, `{disk:NAME}`.

mod chars;
mod check;
mod correct;
mod disks;
mod host;
mod identity;
mod libvirt;
mod memory;
mod network;
mod plan;
mod props;
mod rules;
mod values;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
pub use check::MAX_TEXT;
pub use correct::corrected;
pub use disks::PlannedDisk;
pub use host::{Image, LiveDisk};
pub use identity::Identity;
pub use plan::{Blob, Examined, Facts, Plan, Ram, Refusal, Rom, examine, plan};
pub use props::Props;
pub use rules::{device_type, implied, is_device_for_clones, options};
pub use values::{Escape, Needs, Values};

/// The version of the recipe's own format.
const VERSION: u32 = 1;

/// How to resume a clone of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Format of this recipe.
    pub version: u32,
    /// Which monitor it is for; `qemu`.
    pub vmm: String,
    /// The program that the template was captured from.
    pub program: String,
    /// Its version then, for people.
    #[serde(default)]
    pub vmm_version: String,
    /// What clones write to: each gets an overlay of its own, `{disk:NAME}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Arguments with placeholders, without the program.
    pub argv: Vec<String>,
}

/// A disk that clones write to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The name in `{disk:NAME}`.
    pub name: String,
    /// The template's file that the overlay lies over.
    pub base: String,
    /// Format of that file.
    pub format: String,
}

impl Recipe {
    /// A recipe for QEMU.
    pub fn qemu(program: String, vmm_version: String, argv: Vec<String>) -> Recipe {
        Recipe { version: VERSION, vmm: "qemu".into(), program, vmm_version, disks: vec![], argv }
    }

    /// With these disks of the VM: clones get those that its guest could write to.
    #[must_use]
    pub fn with_disks(mut self, disks: &[PlannedDisk]) -> Recipe {
        let written = disks.iter().filter(|disk| !disk.live.read_only);
        let disk = |d: &PlannedDisk| Disk { name: d.name.clone(), base: d.file(), format: d.format.clone() };
        self.disks = written.map(disk).collect();
        self
    }

    /// Reads the recipe of a policy.
    ///
    /// # Errors
    /// When it is of another format or for another monitor.
    pub fn from_value(value: &Value) -> Result<Recipe> {
        let recipe: Recipe = serde_json::from_value(value.clone()).map_err(|e| {
            Error::failed(format!("the template's launch recipe cannot be understood: {e}"))
                .remedy("give the command yourself: stencil clone T -- CMD…")
        })?;
        if recipe.version != VERSION || recipe.vmm != "qemu" {
            return Err(Error::failed(format!(
                "the template's launch recipe is version {} for '{}', this build knows version {VERSION} for 'qemu'",
                recipe.version, recipe.vmm
            ))
            .remedy("use a newer stencil, or give the command yourself: stencil clone T -- CMD…"));
        }
        Ok(recipe)
    }

    /// As it is kept in the policy.
    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }

    /// Names of networks on which clones would meet the guest that they were.
    pub fn shared_networks(&self) -> Vec<String> {
        network::shared(&self.argv)
    }

    /// The arguments of one clone.
    ///
    /// # Errors
    /// When a placeholder names a file that the template does not have.
    pub fn arguments(&self, values: &Values) -> Result<Vec<String>> {
        // In `key=value,key=value` a comma of a path is doubled; an argument that is just a path is taken as it is.
        let escape = |arg: &str| if arg.contains('=') { Escape::DoubleCommas } else { Escape::None };
        self.argv.iter().map(|arg| values.fill(arg, escape(arg))).collect()
    }
}
