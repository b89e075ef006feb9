//! The rows: what is measured, and beside what.

mod cold_start;
mod density;
mod disk;
mod floors;
mod guests;
mod import;
mod launch;
mod reads;
mod warm;
mod zeros;

use std::path::{Path, PathBuf};
use std::process::Command;

use stencilfs::error::{Error, Result};

use crate::run::Context;
use crate::run::inputs;
use crate::run::site::{Erofs, Site, run};

/// Measures the rows of a run.
pub fn measure(context: &Context, zeros_bytes: u64) -> Result<()> {
    let (dense, input) = inputs::dense(context.site, context.dense_bytes)?;
    context.inputs.borrow_mut().push(input);
    cold_start::measure(context, &dense)?;
    reads::measure(context, &dense)?;
    import::measure(context, &dense)?;
    if !context.is_quick() {
        disk::measure(context, &dense)?;
        floors::measure(context, &dense)?;
        zeros::measure(context, &dense, zeros_bytes)?;
        guests::measure(context)?;
    }
    Ok(())
}

/// Clusters of an EROFS image: the default of mkfs.erofs, 4 KiB, or the block size of the store.
const CLUSTERS: [(&str, &[&str]); 2] = [("erofs", &[]), ("erofs-64k", &["-C65536"])];

/// The command that makes an EROFS image of a directory, compressed by LZ4.
fn make_erofs(image: &Path, directory: &Path, more: &[&str]) -> Command {
    let mut command = Command::new("mkfs.erofs");
    command.args(["--quiet", "-zlz4", "-T0"]).args(more).arg(image).arg(directory);
    command
}

/// Makes an EROFS image of a file and mounts it. The file is called `memory` in it.
fn erofs_of(site: &Site, file: &Path, name: &str, more: &[&str]) -> Result<Erofs> {
    let directory = directory_of(site, file, name)?;
    let image = site.path(&format!("{name}.image"));
    run(&mut make_erofs(&image, &directory, more))?;
    Erofs::mount(&image)
}

/// Makes a directory that contains only `memory`, a link to the file.
fn directory_of(site: &Site, file: &Path, name: &str) -> Result<PathBuf> {
    let directory = site.create_dir(&format!("{name}.tree"))?;
    let link = directory.join("memory");
    std::fs::hard_link(file, &link).map_err(|e| Error::io("cannot create", &link, e))?;
    Ok(directory)
}
