//! Rows about a large template, most of which is zeros.

use std::path::Path;
use std::process::Command;

use stencilfs::error::Result;

use super::erofs_of;
use super::reads::{Way, random, sweep};
use crate::run::Context;
use crate::run::inputs;
use crate::run::sampling::{Measured, Title};
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
    let ways = [
        Way::served(context, &kernel, "zeros")?,
        Way::served(context, &decode, "zeros")?,
        Way::plain("ext4", file)?,
        Way::plain("ext4-holes", holes)?,
        Way::plain("erofs", erofs.file("memory"))?,
    ];
    let title = Title {
        name: "sequential-zeros",
        about: "Read one word of each page through a mapping, in order. ext4: the raw file without holes; ext4-holes: \
                its copy by cp --sparse=always.",
        input: "zeros",
        caches: "cold",
    };
    let subjects: Vec<Measured> =
        ways.iter().map(|way| way.cold(context, way.name, sweep("normal"))).collect();
    context.row(title, subjects)?;
    let title = Title {
        name: "random-zeros",
        about: "Read one word of 20 000 pages anywhere through a mapping, with default advice.",
        ..title
    };
    let subjects = ways.iter().map(|way| way.cold(context, way.name, random("normal", 20_000)));
    context.row(title, subjects.collect())
}
