//! A wrapper script for `path` in Kata's `[hypervisor.qemu]`.

use super::paste::{VmmArguments, shell_word};
use super::served::Served;
use crate::error::Result;

/// The script, with `@NAME@` for the values of the template.
const SCRIPT: &str = include_str!("kata.sh");

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    let memory = template.one_ram("Kata supports only one RAM file")?;
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
