//! Placeholders in recipes and commands, and their values for one clone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::error::{Error, Result};
use crate::store::Roles;

/// Placeholders without an argument.
const PLAIN: [&str; 8] = ["memory", "state", "id", "index", "dir", "mac", "cid", "uuid"];

/// Placeholders with an argument: `{file:NAME}`…
const NAMED: [&str; 4] = ["file", "disk", "port", "mac"];

/// Returns the placeholders in a text, without their braces. All other braces are literal text.
pub fn placeholders(text: &str) -> impl Iterator<Item = &str> {
    in_braces(text).filter(|name| is_placeholder(name))
}

/// Returns the words in braces that look like a placeholder and are unknown: `{prot:80}`, `{uid}`.
pub fn misspelt(text: &str) -> impl Iterator<Item = &str> {
    in_braces(text).filter(|name| {
        let word = name.split_once(':').map_or(*name, |(kind, _)| kind);
        let is_word = !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase());
        is_word && !is_placeholder(name)
    })
}

fn in_braces(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices('{').filter_map(|(at, _)| {
        let inner = text.get(at + 1..)?;
        inner.get(..inner.find('}')?)
    })
}

fn is_placeholder(name: &str) -> bool {
    let sane = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    PLAIN.contains(&name) || name.split_once(':').is_some_and(|(kind, of)| NAMED.contains(&kind) && sane(of))
}

/// Resources that a command line needs before its placeholders can be filled in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Names of the ports in `{port:NAME}`.
    pub ports: BTreeSet<String>,
    /// Names of the disks in `{disk:NAME}`.
    pub disks: BTreeSet<String>,
}

impl Needs {
    /// Collects the ports and disks that these arguments name.
    pub fn of<'a>(argv: impl IntoIterator<Item = &'a String>) -> Needs {
        let mut needs = Needs::default();
        for name in argv.into_iter().flat_map(|arg| placeholders(arg)) {
            match name.split_once(':') {
                Some(("port", name)) => drop(needs.ports.insert(name.to_owned())),
                Some(("disk", name)) => drop(needs.disks.insert(name.to_owned())),
                _ => {}
            }
        }
        needs
    }
}

/// How a value is escaped when it is filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escape {
    /// The value is inserted unchanged.
    None,
    /// Commas are doubled, as QEMU's property strings require.
    DoubleCommas,
}

/// Placeholder values of one clone.
#[derive(Debug, Clone)]
pub struct Values {
    by_name: BTreeMap<String, String>,
    template: String,
}

impl Values {
    /// Creates the values of a clone of `template`; `files` are pairs of a file name and its path below the mount.
    pub fn new(template: &str, files: &[(String, String)], roles: &Roles) -> Values {
        let mut by_name = BTreeMap::new();
        for (name, path) in files {
            for (role, file) in [("memory", &roles.memory), ("state", &roles.state)] {
                if file.as_ref() == Some(name) {
                    by_name.insert(role.to_owned(), path.clone());
                }
            }
            by_name.insert(format!("file:{name}"), path.clone());
        }
        Values { by_name, template: template.to_owned() }
    }

    /// Adds the clone's id, index and directory.
    #[must_use]
    pub fn of_clone(mut self, id: &str, index: u32, dir: &Path) -> Values {
        self.by_name.insert("id".into(), id.to_owned());
        self.by_name.insert("index".into(), index.to_string());
        self.by_name.insert("dir".into(), dir.display().to_string());
        self
    }

    /// Adds a value.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Values {
        self.by_name.insert(name.to_owned(), value.into());
        self
    }

    /// Returns the value of a placeholder.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.by_name.get(name).map(String::as_str)
    }

    /// Returns the values as environment variables: `STENCIL_MEMORY`, `STENCIL_STATE`, `STENCIL_ID`…
    ///
    /// Placeholders with an argument become `STENCIL_FILE_NAME`, `STENCIL_PORT_80` and so on, with `_` for every
    /// character that is not an ASCII letter or digit.
    pub fn variables(&self) -> impl Iterator<Item = (String, &str)> {
        let name = |key: &str| {
            let safe = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
            format!("STENCIL_{}", key.chars().map(safe).collect::<String>())
        };
        self.by_name.iter().map(move |(key, value)| (name(key), value.as_str()))
    }

    /// Fills in the placeholders of one argument. All other braces stay as they are.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if a placeholder names a file or disk that the template does
    /// not have.
    pub fn fill(&self, text: &str, escape: Escape) -> Result<String> {
        let mut filled = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(open) = rest.find('{') {
            let (before, from) = rest.split_at(open);
            filled.push_str(before);
            let Some(close) = from.find('}') else {
                rest = from;
                break;
            };
            let (name, after) = (&from[1..close], &from[close + 1..]);
            if let Some(value) = self.by_name.get(name) {
                match escape {
                    Escape::None => filled.push_str(value),
                    Escape::DoubleCommas => filled.push_str(&value.replace(',', ",,")),
                }
                rest = after;
            } else if matches!(name, "memory" | "state") {
                let what = if name == "memory" {
                    "RAM file, or several without the name 'memory'"
                } else {
                    "device state"
                };
                return Err(Error::usage(format!("{{{name}}}: template {} has no {what}", self.template))
                    .hint("list the files of the template with `stencil inspect`"));
            } else if let Some(file) = name.strip_prefix("file:") {
                return Err(Error::usage(format!(
                    "{{{name}}}: template {} has no file '{file}'",
                    self.template
                ))
                .hint("list the files of the template with `stencil inspect`"));
            } else if name.starts_with("disk:") && is_placeholder(name) {
                return Err(Error::usage(format!("{{{name}}}: template {} has no such disk", self.template))
                    .hint("list the disks of the recipe with `stencil inspect --recipe`"));
            } else {
                filled.push('{');
                rest = &from[1..];
            }
        }
        filled.push_str(rest);
        Ok(filled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Values {
        let files =
            [("memory".to_owned(), "/m,n/memory".to_owned()), ("rom-1".to_owned(), "/m/rom".to_owned())];
        let roles = Roles { memory: Some("memory".into()), state: None };
        Values::new("web", &files, &roles).of_clone("c1", 3, Path::new("/run/c1"))
    }

    #[test]
    fn fills_known_placeholders_and_keeps_other_braces() {
        let values = values();
        assert_eq!(values.fill("x {id}-{index} {dir}", Escape::None).unwrap(), "x c1-3 /run/c1");
        assert_eq!(values.fill("p={memory}", Escape::DoubleCommas).unwrap(), "p=/m,,n/memory");
        assert_eq!(values.fill("{file:rom-1}", Escape::None).unwrap(), "/m/rom");
        assert_eq!(values.fill("awk '{print $1}' {", Escape::None).unwrap(), "awk '{print $1}' {");
        assert_eq!(values.fill("{{id}}", Escape::None).unwrap(), "{c1}");
        assert_eq!(values.fill("{\"a\":\"{id}\"}", Escape::None).unwrap(), "{\"a\":\"c1\"}");
        assert!(values.fill("{state}", Escape::None).is_err());
        assert!(values.fill("{file:nope}", Escape::None).is_err());
    }

    #[test]
    fn finds_only_valid_placeholders() {
        let text = "a={mac},b={port:80} {x} {port:} {{disk:root}} {id {file:a/b} {mac:1}";
        let found: Vec<_> = placeholders(text).collect();
        assert_eq!(found, ["mac", "port:80", "disk:root", "mac:1"]);
        let needs = Needs::of(&[text.to_owned()]);
        assert!(needs.ports.contains("80") && needs.disks.contains("root"));
        assert!(values().fill("{disk:root}", Escape::None).is_err());
        let values = values().with("disk:root", "/d").with("port:80", "4711");
        assert_eq!(values.fill("{disk:root}:{port:80}", Escape::None).unwrap(), "/d:4711");
        assert!(values.variables().any(|v| v == ("STENCIL_PORT_80".to_owned(), "4711")));
    }

    #[test]
    fn help_of_clone_lists_every_placeholder() {
        use clap::CommandFactory;
        let cli = crate::cli::Cli::command();
        let clone = cli.find_subcommand("clone").unwrap();
        let help = clone.get_arguments().find(|a| a.get_id() == "command").unwrap().get_help().unwrap();
        let help = help.to_string();
        let listed: BTreeSet<&str> = placeholders(&help).collect();
        let of = |kind: &&str| match *kind {
            "file" | "disk" => format!("{kind}:NAME"),
            kind => format!("{kind}:N"),
        };
        let all: Vec<String> = PLAIN.iter().map(ToString::to_string).chain(NAMED.iter().map(of)).collect();
        assert_eq!(listed, all.iter().map(String::as_str).collect());
    }

    #[test]
    fn environment_variables_have_valid_shell_names() {
        let values = values();
        let all: Vec<_> = values.variables().collect();
        assert!(all.contains(&("STENCIL_MEMORY".to_owned(), "/m,n/memory")));
        assert!(all.contains(&("STENCIL_FILE_ROM_1".to_owned(), "/m/rom")));
        assert!(all.contains(&("STENCIL_INDEX".to_owned(), "3")));
    }
}
