//! A script for `path` of Kata's `[hypervisor.qemu]`.

use super::{Paste, Served, shell_word};
use crate::error::Result;

/// The script, with names in `@` for what is the template's.
const SCRIPT: &str = include_str!("kata.sh");

pub(super) fn paste(template: &Served) -> Result<Paste> {
    let memory = template.one_ram("Kata", "has one for its guest")?;
    let program = template.recipe.as_ref().map_or("/usr/bin/qemu-system-x86_64", |r| &r.program);
    let text = SCRIPT
        .replace("@TEMPLATE@", &template.name)
        .replace("@QEMU@", &shell_word(program))
        .replace("@SIZE@", &memory.size.get().to_string())
        .replace("@STATE@", &shell_word(template.state().unwrap_or_default()))
        .replace("@MEMORY@", &shell_word(memory.path));
    let notes = vec![
        "write it to a file, make it executable, and name it as path of \
         [hypervisor.qemu]; docs/how-to/kata.md has the whole procedure"
            .to_owned(),
    ];
    Ok(Paste { text: text.trim_end().to_owned(), argv: None, body: None, notes })
}
