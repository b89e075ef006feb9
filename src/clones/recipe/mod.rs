//! A launch recipe: the QEMU command line that resumes clones of a template, stored in the template's policy.
//!
//! Arguments contain placeholders, which are filled in for each clone: `{memory}`, `{state}` and `{file:NAME}` are
//! paths of the template's files below the mount, `{dir}` is the clone's directory, `{id}` and `{index}` identify the
//! clone. Resources that must be unique on a host are allocated for each clone: `{mac}`, `{mac:N}`, `{cid}`, `{uuid}`,
//! `{port:N}`, `{disk:NAME}`.

mod chardevs;
mod corrections;
mod disks;
mod host;
mod identity;
mod libvirt;
mod memory;
mod network;
mod plan;
mod props;
mod rules;
mod validation;
mod values;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
pub use corrections::corrected;
pub use disks::PlannedDisk;
pub use host::{Image, LiveDisk};
pub use identity::Identity;
pub use memory::{Ram, Rom};
pub use plan::{Blob, Examined, Facts, Plan, Refusal, examine, plan};
pub use props::Props;
pub use rules::{device_type, implied, is_device_for_clones, options};
pub use validation::MAX_TEXT;
pub use values::{Escape, Needs, Values};

/// The version of the recipe format.
const VERSION: u32 = 1;

/// The launch recipe of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Version of the recipe format.
    pub version: u32,
    /// The VMM that the recipe is for; always `qemu`.
    pub vmm: String,
    /// The program of the captured VM.
    pub program: String,
    /// The version of the program at the time of the capture; informative only.
    #[serde(default)]
    pub vmm_version: String,
    /// Writable disks: each clone gets its own overlay of each disk, `{disk:NAME}`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Arguments with placeholders, without the program name.
    pub argv: Vec<String>,
}

/// A writable disk of clones.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The name in `{disk:NAME}`.
    pub name: String,
    /// The template file that backs the overlay.
    pub base: String,
    /// Format of the backing file.
    pub format: String,
}

impl Recipe {
    /// Creates a recipe for QEMU.
    pub fn qemu(program: String, vmm_version: String, argv: Vec<String>) -> Recipe {
        Recipe { version: VERSION, vmm: "qemu".into(), program, vmm_version, disks: vec![], argv }
    }

    /// Sets the disks of the recipe to the writable ones among `disks`.
    #[must_use]
    pub fn with_disks(mut self, disks: &[PlannedDisk]) -> Recipe {
        let writable = disks.iter().filter(|disk| !disk.live.read_only);
        let disk = |d: &PlannedDisk| Disk { name: d.name.clone(), base: d.file(), format: d.format.clone() };
        self.disks = writable.map(disk).collect();
        self
    }

    /// Returns the message for a template without a recipe.
    pub fn missing(template: impl fmt::Display) -> String {
        format!("template {template} has no launch recipe, because it was not captured from a VM")
    }

    /// Parses the recipe in a policy.
    ///
    /// # Errors
    /// Returns an error if the value is not a recipe, or has another format version or VMM than this build supports.
    pub fn from_value(value: &Value) -> Result<Recipe> {
        let recipe: Recipe = serde_json::from_value(value.clone()).map_err(|e| {
            Error::failed(format!("cannot parse the launch recipe of the template: {e}"))
                .hint("pass the command of the clone: stencil clone T -- CMD…")
        })?;
        if recipe.version != VERSION || recipe.vmm != "qemu" {
            return Err(Error::failed(format!(
                "unsupported launch recipe: version {} for '{}', expected version {VERSION} for 'qemu'",
                recipe.version, recipe.vmm
            ))
            .hint("use a newer stencil, or pass the command of the clone: stencil clone T -- CMD…"));
        }
        Ok(recipe)
    }

    /// Returns the recipe as the policy stores it.
    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or(Value::Null)
    }

    /// Returns the names of networks that clones share with the captured guest.
    pub fn shared_networks(&self) -> Vec<String> {
        network::shared(&self.argv)
    }

    /// Returns the arguments of one clone, with all placeholders filled in.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if a placeholder names a file or disk that the template does
    /// not have.
    pub fn arguments(&self, values: &Values) -> Result<Vec<String>> {
        // QEMU reads `,,` as a comma in `key=value,key=value`, but takes an argument that is only a path literally.
        let escape = |arg: &str| if arg.contains('=') { Escape::DoubleCommas } else { Escape::None };
        self.argv.iter().map(|arg| values.fill(arg, escape(arg))).collect()
    }
}
