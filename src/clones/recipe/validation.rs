//! Validation of a recipe that a user has edited: reports all problems at once.

use super::rules::locks_memory;
use super::values::{misspelt, placeholders};
use crate::clones::recipe::{Identity, Props, Recipe, VERSION, implied, options};
use crate::error::{Error, Result};
use crate::store::{FileKind, Roles, TemplateFile, check_name};

/// Maximum length of a recipe's text in bytes, which is the limit of a policy.
pub const MAX_TEXT: u64 = 1 << 20;

impl Recipe {
    /// Describes the first of these RAM files that no memory of the guest uses.
    ///
    /// QEMU accepts a memory object that neither the machine, nor a NUMA node, nor a memory device refers to, and then
    /// allocates other memory for the guest.
    pub fn unused_ram<'a>(&self, ram: impl IntoIterator<Item = &'a str>, roles: &Roles) -> Option<String> {
        let (mut objects, mut machine, mut used) = (vec![], None, vec![]);
        for (option, value) in options(&self.argv) {
            let (Some(value), Some(implied)) = (value, implied(option)) else { continue };
            let Some(props) = Props::parse(value, implied) else { continue };
            let of = |key: &str| props.get(key).map(str::to_owned);
            let kind = of(implied).unwrap_or_default();
            match option {
                "M" | "machine" => machine = of("memory-backend").or(machine),
                "numa" => used.extend(of("memdev")),
                "device" if matches!(kind.as_str(), "nvdimm" | "pc-dimm") => used.extend(of("memdev")),
                "object" if kind.starts_with("memory-backend-") => {
                    objects.extend(of("id").zip(of("mem-path")));
                }
                _ => {}
            }
        }
        used.extend(machine);
        let is_given = |name: &str| {
            let file = format!("{{file:{name}}}");
            let is_it =
                |path: &str| path == file || (roles.memory.as_deref() == Some(name) && path == "{memory}");
            objects.iter().any(|(id, path)| is_it(path) && used.contains(id))
        };
        let name = ram.into_iter().find(|name| !is_given(name))?;
        Some(format!(
            "does not use RAM file '{name}': no -machine memory-backend=, -numa node,memdev= or -device pc-dimm,memdev= (or \
             nvdimm) names an -object with that file"
        ))
    }

    /// Parses an edited recipe of a template with these files and roles.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) with all problems of the recipe.
    pub fn edited(text: &str, files: &[TemplateFile], roles: &Roles) -> Result<Recipe> {
        let recipe: Recipe = serde_json::from_str(text).map_err(|e| {
            Error::usage(format!("invalid recipe: {e}"))
                .hint("keep the JSON form of `stencil inspect --recipe`; each argument is one string of argv")
        })?;
        let ram = files.iter().filter(|file| file.kind == FileKind::Ram).map(|file| file.name.as_str());
        let unused_ram = recipe.unused_ram(ram, roles);
        let files: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let mut problems = vec![];
        if recipe.version != VERSION || recipe.vmm != "qemu" {
            problems.push(format!(
                "version {} for '{}', expected version {VERSION} for 'qemu'",
                recipe.version, recipe.vmm
            ));
        }
        if recipe.program.is_empty() {
            problems.push("missing program".into());
        }
        if recipe.argv.iter().chain([&recipe.program]).any(|word| word.contains('\0')) {
            problems.push("an argument contains a zero byte".into());
        }
        for (at, disk) in recipe.disks.iter().enumerate() {
            if check_name("disk", &disk.name).is_err() {
                problems.push(format!(
                    "disk '{}': invalid name: expected letters, digits, '.', '_' and '-'",
                    disk.name
                ));
            }
            if recipe.disks.iter().take(at).any(|other| other.name == disk.name) {
                problems.push(format!("disk '{}': duplicate name", disk.name));
            }
            if !files.contains(&disk.base.as_str()) {
                problems.push(format!("disk '{}': the template has no file '{}'", disk.name, disk.base));
            }
            if !matches!(disk.format.as_str(), "raw" | "qcow2") {
                problems.push(format!(
                    "disk '{}': unsupported format '{}', expected raw or qcow2",
                    disk.name, disk.format
                ));
            }
        }
        for name in recipe.argv.iter().flat_map(|arg| placeholders(arg)) {
            let is_card = |number: &str| Identity::cards().any(|card| card.to_string() == number);
            let problem = match name.split_once(':') {
                None if name == "memory" && roles.memory.is_none() => {
                    "the template has no RAM file, or several without one named 'memory'; use {file:NAME}"
                }
                None if name == "state" && roles.state.is_none() => "the template has no device state",
                Some(("file", file)) if !files.contains(&file) => "the template has no such file",
                Some(("disk", disk)) if !recipe.disks.iter().any(|d| d.name == disk) => {
                    "the recipe has no such disk"
                }
                Some(("mac", number)) if !is_card(number) => "invalid card number, expected 0 to 15",
                _ => continue,
            };
            problems.push(format!("{{{name}}}: {problem}"));
        }
        let before = [""].into_iter().chain(recipe.argv.iter().map(String::as_str));
        for (before, arg) in before.zip(&recipe.argv) {
            // QEMU takes options with one hyphen and with two.
            if matches!(arg.as_str(), "-daemonize" | "--daemonize") {
                problems.push("-daemonize: the launcher must start the process of a clone itself".into());
            }
            // The kernel command line belongs to the guest: braces in it are no misspelt placeholders.
            if !matches!(before, "-append" | "--append") {
                problems.extend(misspelt(arg).map(|name| format!("{{{name}}}: unknown placeholder")));
            }
        }
        for (need, why) in [
            ("{memory}", "clones would not map the template"),
            ("{dir}/qmp.sock", "the launcher resumes clones through this QMP socket"),
        ] {
            if !recipe.argv.iter().any(|arg| arg.contains(need)) {
                problems.push(format!("no argument contains {need}: {why}"));
            }
        }
        problems.extend(options(&recipe.argv).into_iter().filter_map(|(option, value)| {
            let (value, why) = (value?, locks_memory(option, value?)?);
            Some(format!("-{option} {value}: {why}"))
        }));
        problems.extend(unused_ram.map(|why| format!("the recipe {why}")));
        let is_deferred = |pair: &[String]| matches!(pair, [option, value] if option.trim_start_matches('-') == "incoming" && value == "defer");
        if !recipe.argv.windows(2).any(is_deferred) {
            problems.push("missing -incoming defer: QEMU would not wait for the device state".into());
        }
        match problems.is_empty() {
            true => Ok(recipe),
            false => Err(Error::usage(format!("invalid recipe: {}", problems.join("; "))).hint(
                "correct the recipe and run the command again; the recipe of the template is unchanged",
            )),
        }
    }

    /// Returns the recipe as text for an editor: JSON with one argument per line.
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use crate::clones::recipe::validation::*;
    use crate::units::Bytes;

    const GOOD: &str = r#"{"version":1,"vmm":"qemu","program":"qemu","disks":[{"name":"root","base":"disk-root",
        "format":"raw"}],"argv":["-machine","q35,memory-backend=m","-object","memory-backend-file,id=m,mem-path={memory}","-drive","file={disk:root}","-chardev",
        "socket,path={dir}/qmp.sock","-incoming","defer","{port:80}{mac:1}","-append","{unknown}","{\"a\":1}"]}"#;

    fn files() -> Vec<TemplateFile> {
        let file = |(name, kind): (&str, _)| TemplateFile {
            name: name.into(),
            kind,
            size: Bytes::new(4096),
            data_bytes: Bytes::new(0),
        };
        let all = [("memory", FileKind::Ram), ("state", FileKind::Blob), ("disk-root", FileKind::Blob)];
        all.map(file).into()
    }

    fn roles() -> Roles {
        Roles { memory: Some("memory".into()), state: Some("state".into()) }
    }

    #[test]
    fn valid_recipe_survives_a_round_trip() {
        let files = files();
        let recipe = Recipe::edited(GOOD, &files, &roles()).unwrap();
        assert_eq!(Recipe::edited(&recipe.to_text(), &files, &roles()).unwrap(), recipe);
    }

    #[test]
    fn reports_all_problems_at_once() {
        let files = files();
        for (from, to, words) in [
            ("disk-root", "disk-boot", "no file 'disk-boot'"),
            ("{disk:root}", "{disk:boot}", "{disk:boot}"),
            ("{memory}", "{file:rom}", "{file:rom}"),
            ("{memory}", "/ram", "no argument contains {memory}"),
            ("qmp.sock", "other", "{dir}/qmp.sock"),
            ("\"raw\"", "\"vmdk\"", "unsupported format 'vmdk', expected raw or qcow2"),
            ("\"qemu\",\"program\"", "\"xen\",\"program\"", "for 'xen'"),
            ("\"vmm\"", "\"vmn\"", "unknown field"),
            ("{mac:1}", "{mac:x}", "{mac:x}"),
            ("{mac:1}", "{mac:16}", "invalid card number, expected 0 to 15"),
            ("{port:80}", "{prot:80}", "{prot:80}: unknown placeholder"),
            ("{port:80}", "{pid}", "{pid}: unknown placeholder"),
            (
                "\"-incoming\",\"defer\"",
                "\"-incoming\",\"tcp:0:1\",\"-name\",\"defer\"",
                "missing -incoming defer",
            ),
            ("\"-append\"", "\"-daemonize\",\"-append\"", "-daemonize: "),
            ("\"root\"", "\"../x\"", "invalid name: expected letters"),
            ("\"-append\"", "\"-overcommit\",\"mem-lock=on\",\"-append\"", "would copy all RAM"),
            (",memory-backend=m", "", "the recipe does not use RAM file 'memory'"),
        ] {
            let error = Recipe::edited(&GOOD.replacen(from, to, 1), &files, &roles()).unwrap_err();
            assert!(error.to_string().contains(words), "{from} → {to}: {error}");
        }
        let two = GOOD.replace("{memory}", "{file:rom}");
        let error = Recipe::edited(&two, &files, &roles()).unwrap_err().to_string();
        assert!(error.contains("{file:rom}") && error.contains("no argument contains {memory}"), "{error}");
    }
}
