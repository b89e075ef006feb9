//! Rows about a large template, most of which is zeros.

use std::path::Path;
use std::process::Command;

use stencilfs::error::Result;

use super::erofs_of;
use super::reads::{Source, random, sweep};
use crate::run::Context;
use crate::run::inputs;
use crate::run::sampling::{Procedure, Title};
use crate::run::site::{Store, run};

pub fn measure(context: &Context, dense: &Path, bytes: u64) -> Result<()> {
    if !context.wants(&["sequential-zeros", "random-zeros"]) {
        return Ok(());
    }
    let (file, input) = inputs::with_zeros(context.site, dense, bytes)?;
    context.inputs.borrow_mut().push(input);
    let holes = context.site.path("holes");
    run(Command::new("cp").arg("--sparse=always").arg(&file).arg(&holes))?;
    let store = Store::new(context.site, "zeros-store");
    let digest = inputs::import(&store, &file, "zeros")?;
    let (kernel, decode) = (store.mount("kernel")?, store.mount("decode")?);
    kernel.wait_until_served(&digest)?;
    decode.wait_until_served(&digest)?;
    let erofs = erofs_of(context.site, &file, "zeros", &[])?;
    let sources = [
        Source::served(context, &kernel, "zeros")?,
        Source::served(context, &decode, "zeros")?,
        Source::plain("ext4", file)?,
        Source::plain("ext4-holes", holes)?,
        Source::plain("erofs", erofs.file("memory"))?,
    ];
    let title = Title {
        name: "sequential-zeros",
        about: "Read one word of each page through a mapping, in order. ext4: the raw file without holes; ext4-holes: \
                its copy by cp --sparse=always.",
        input: "zeros",
        caches: "cold",
    };
    let subjects: Vec<Procedure> =
        sources.iter().map(|source| source.cold(context, source.name, sweep("normal"))).collect();
    context.row(title, subjects)?;
    let title = Title {
        name: "random-zeros",
        about: "Read one word of 20 000 pages anywhere through a mapping, with default advice.",
        ..title
    };
    let subjects = sources.iter().map(|source| source.cold(context, source.name, random("normal", 20_000)));
    context.row(title, subjects.collect())
}
