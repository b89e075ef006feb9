//! A recipe that a person has written: everything that would not work is said at once.

use super::rules::locks_memory;
use super::values::{misspelt, placeholders};
use super::{Identity, Props, Recipe, VERSION, implied, options};
use crate::error::{Error, Result};
use crate::store::{FileKind, TemplateFile, check_name};

/// The longest text of a recipe; a policy holds no more.
pub const MAX_TEXT: u64 = 1 << 20;

impl Recipe {
    /// Says which of these RAM files QEMU would not give to its guest, and go on with memory of its own: no object has
    /// it that the machine, a node or a memory device is made of.
    pub fn ram_of_nobody<'a>(&self, ram: impl IntoIterator<Item = &'a str>) -> Option<String> {
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
            let is_it = |path: &str| path == file || (name == "memory" && path == "{memory}");
            objects.iter().any(|(id, path)| is_it(path) && used.contains(id))
        };
        let name = ram.into_iter().find(|name| !is_given(name))?;
        Some(format!(
            "gives RAM file '{name}' to nobody: no -machine memory-backend= and no -numa node,memdev= names an -object \
             that has it"
        ))
    }

    /// Reads a recipe that was edited, for a template with these files.
    ///
    /// # Errors
    /// A usage error that names everything that is wrong with it.
    pub fn edited(text: &str, files: &[TemplateFile]) -> Result<Recipe> {
        let recipe: Recipe = serde_json::from_str(text).map_err(|e| {
            Error::usage(format!("this is no recipe: {e}"))
                .remedy("keep the JSON of `stencil inspect --recipe`; each argument is one string of argv")
        })?;
        let ram = files.iter().filter(|file| file.kind == FileKind::Ram).map(|file| file.name.as_str());
        let ram_of_nobody = recipe.ram_of_nobody(ram);
        let files: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let mut wrong = vec![];
        if recipe.version != VERSION || recipe.vmm != "qemu" {
            wrong.push(format!(
                "version {} for '{}', expected version {VERSION} for 'qemu'",
                recipe.version, recipe.vmm
            ));
        }
        if recipe.program.is_empty() {
            wrong.push("no program".into());
        }
        if recipe.argv.iter().chain([&recipe.program]).any(|word| word.contains('\0')) {
            wrong.push("a zero byte in an argument".into());
        }
        for (at, disk) in recipe.disks.iter().enumerate() {
            if check_name("disk", &disk.name).is_err() {
                wrong.push(format!(
                    "disk '{}': a name of letters, digits, '.', '_' and '-' is needed",
                    disk.name
                ));
            }
            if recipe.disks.iter().take(at).any(|other| other.name == disk.name) {
                wrong.push(format!("disk '{}' is there twice", disk.name));
            }
            if !files.contains(&disk.base.as_str()) {
                wrong.push(format!("disk '{}': the template has no file '{}'", disk.name, disk.base));
            }
            if !matches!(disk.format.as_str(), "raw" | "qcow2") {
                wrong
                    .push(format!("disk '{}': format '{}' is neither raw nor qcow2", disk.name, disk.format));
            }
        }
        for name in recipe.argv.iter().flat_map(|arg| placeholders(arg)) {
            let is_card = |number: &str| Identity::cards().any(|card| card.to_string() == number);
            let problem = match name.split_once(':') {
                None if matches!(name, "memory" | "state") && !files.contains(&name) => {
                    "the template has none"
                }
                Some(("file", file)) if !files.contains(&file) => "the template has none",
                Some(("disk", disk)) if !recipe.disks.iter().any(|d| d.name == disk) => {
                    "the template has none"
                }
                Some(("mac", number)) if !is_card(number) => "a clone has addresses for cards 0 to 15",
                _ => continue,
            };
            wrong.push(format!("{{{name}}}: {problem}"));
        }
        let before = [""].into_iter().chain(recipe.argv.iter().map(String::as_str));
        for (before, arg) in before.zip(&recipe.argv) {
            // QEMU takes options with one hyphen and with two.
            if matches!(arg.as_str(), "-daemonize" | "--daemonize") {
                wrong.push("-daemonize: a clone's process is the one that its launcher starts".into());
            }
            // What the guest's kernel is told is the guest's.
            if !matches!(before, "-append" | "--append") {
                wrong.extend(misspelt(arg).map(|name| format!("{{{name}}}: there is no such placeholder")));
            }
        }
        for (need, why) in [
            ("{memory}", "clones would not map the template"),
            ("{dir}/qmp.sock", "clones are resumed through that QMP socket"),
        ] {
            if !recipe.argv.iter().any(|arg| arg.contains(need)) {
                wrong.push(format!("no argument has {need}: {why}"));
            }
        }
        wrong.extend(options(&recipe.argv).into_iter().filter_map(|(option, value)| {
            let (value, why) = (value?, locks_memory(option, value?)?);
            Some(format!("-{option} {value}: {why}"))
        }));
        wrong.extend(ram_of_nobody.map(|why| format!("it {why}")));
        let is_deferred = |pair: &[String]| matches!(pair, [option, value] if option.trim_start_matches('-') == "incoming" && value == "defer");
        if !recipe.argv.windows(2).any(is_deferred) {
            wrong.push("no -incoming defer: that is how QEMU waits for its device state".into());
        }
        match wrong.is_empty() {
            true => Ok(recipe),
            false => Err(Error::usage(format!("this recipe cannot work: {}", wrong.join("; ")))
                .remedy("mend it and try again: the template's recipe was not changed")),
        }
    }

    /// As text that a person edits: one argument a line.
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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

    #[test]
    fn a_good_one_reads_as_it_is_written() {
        let files = files();
        let recipe = Recipe::edited(GOOD, &files).unwrap();
        assert_eq!(Recipe::edited(&recipe.to_text(), &files).unwrap(), recipe);
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let files = files();
        for (from, to, words) in [
            ("disk-root", "disk-boot", "no file 'disk-boot'"),
            ("{disk:root}", "{disk:boot}", "{disk:boot}"),
            ("{memory}", "{file:rom}", "{file:rom}"),
            ("{memory}", "/ram", "no argument has {memory}"),
            ("qmp.sock", "other", "{dir}/qmp.sock"),
            ("\"raw\"", "\"vmdk\"", "neither raw nor qcow2"),
            ("\"qemu\",\"program\"", "\"xen\",\"program\"", "for 'xen'"),
            ("\"vmm\"", "\"vmn\"", "unknown field"),
            ("{mac:1}", "{mac:x}", "{mac:x}"),
            ("{mac:1}", "{mac:16}", "cards 0 to 15"),
            ("{port:80}", "{prot:80}", "{prot:80}: there is no such placeholder"),
            ("{port:80}", "{pid}", "{pid}: there is no such placeholder"),
            (
                "\"-incoming\",\"defer\"",
                "\"-incoming\",\"tcp:0:1\",\"-name\",\"defer\"",
                "no -incoming defer",
            ),
            ("\"-append\"", "\"-daemonize\",\"-append\"", "-daemonize: "),
            ("\"root\"", "\"../x\"", "a name of letters"),
            ("\"-append\"", "\"-overcommit\",\"mem-lock=on\",\"-append\"", "would copy all RAM"),
            (",memory-backend=m", "", "it gives RAM file 'memory' to nobody"),
        ] {
            let error = Recipe::edited(&GOOD.replacen(from, to, 1), &files).unwrap_err();
            assert!(error.to_string().contains(words), "{from} → {to}: {error}");
        }
        let two = GOOD.replace("{memory}", "{file:rom}");
        let error = Recipe::edited(&two, &files).unwrap_err().to_string();
        assert!(error.contains("{file:rom}") && error.contains("no argument has {memory}"), "{error}");
    }
}
