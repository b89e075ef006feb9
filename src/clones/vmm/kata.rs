//! The configuration of Kata Containers. With QEMU, it is a wrapper script for `path` in `[hypervisor.qemu]`. Cloud
//! Hypervisor and Dragonball open the memory of a Kata template read-only and map the memory privately: with these two,
//! it consists of the commands that mount the template's directory over Kata's template directory.

use super::paste::{VmmArguments, shell_word};
use super::served::{Memory, Served};
use crate::error::{Error, Result};

/// The script, with `@NAME@` for the values of the template.
const SCRIPT: &str = include_str!("kata.sh");

/// Default of Kata's `template_path`.
const TEMPLATE_PATH: &str = "/run/vc/vm/template";

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    let memory = template.one_ram("Kata supports only one RAM file")?;
    // Cloud Hypervisor's state is `state.json`; Dragonball's `state` is JSON too, unlike QEMU's.
    let is_json = template.state_head.as_ref().is_some_and(|head| head.starts_with(b"{"));
    if is_json || template.files.iter().any(|file| file.name == "state.json") {
        return directory(template, memory);
    }
    let program = template.recipe.as_ref().map_or("/usr/bin/qemu-system-x86_64", |r| &r.program);
    let text = SCRIPT
        .replace("@TEMPLATE@", &template.name)
        .replace("@QEMU@", &shell_word(program))
        .replace("@SIZE@", &memory.size.get().to_string())
        .replace("@STATE@", &shell_word(template.state().unwrap_or_default()))
        .replace("@MEMORY@", &shell_word(memory.path));
    let notes = vec![
        "write the script to a file, make the file executable, and set path in [hypervisor.qemu] to that file; \
         docs/how-to/kata.md has the whole procedure"
            .to_owned(),
    ];
    Ok(VmmArguments { text: text.trim_end().to_owned(), notes, ..VmmArguments::default() })
}

fn directory(template: &Served, memory: Memory<'_>) -> Result<VmmArguments> {
    let Some(directory) = memory.path.strip_suffix("/memory") else {
        return Err(Error::usage(format!(
            "the RAM file of template {} is '{}', but Kata opens 'memory'",
            template.name, memory.name
        ))
        .hint("import the directory of Kata's template, whose memory file is named 'memory'"));
    };
    let text =
        format!("umount --lazy {TEMPLATE_PATH}\nmount --bind {} {TEMPLATE_PATH}", shell_word(directory));
    let notes = vec![
        format!(
            "run these commands after Kata has made its template; with another template_path in its configuration, \
             replace {TEMPLATE_PATH}"
        ),
        "Kata's Cloud Hypervisor must be version 51 or later, which opens the memory file read-only"
            .to_owned(),
    ];
    Ok(VmmArguments { text, notes, ..VmmArguments::default() })
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;
    use crate::store::FileKind::{Blob, Ram};

    #[test]
    fn vmms_that_map_privately_get_the_directory_of_the_mount() {
        let expected = "umount --lazy /run/vc/vm/template\nmount --bind /mnt/by-id/abc /run/vc/vm/template";
        let mut template = served(&[("memory", Ram, 64), ("config.json", Blob, 1), ("state.json", Blob, 1)]);
        assert_eq!(paste(&template).unwrap().text, expected);
        template = served(&[("memory", Ram, 64), ("state", Blob, 1)]);
        template.state_head = Some(b"{\"epoch\":1".to_vec());
        assert_eq!(paste(&template).unwrap().text, expected);
        template.state_head = Some(b"QEVM".to_vec());
        assert!(paste(&template).unwrap().text.starts_with("#!/bin/sh\n"));
        template = served(&[("memory-ranges", Ram, 64), ("state.json", Blob, 1)]);
        assert!(
            paste(&template).unwrap_err().to_string().contains("is 'memory-ranges', but Kata opens 'memory'")
        );
    }
}
