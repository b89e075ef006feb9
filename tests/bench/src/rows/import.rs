//! Rows about importing.

use std::fs;
use std::path::Path;
use std::process::Command;

use stencilfs::error::{Error, Result};

use super::{CLUSTERS, directory_of, make_erofs};
use crate::run::Context;
use crate::run::floor::{Codec, encode, processors};
use crate::run::sampling::{Counters, Procedure, Title, settle};
use crate::run::site::{Store, occupied, run};

const CACHES: &str = "the input in the page cache";

pub fn measure(context: &Context, dense: &Path) -> Result<()> {
    if !context.wants(&["import-lz4", "import-zstd"]) {
        return Ok(());
    }
    // Reads the input.
    encode(dense, Codec::Lz4, processors(), false)?;
    let tree = directory_of(context.site, dense, "import")?;
    let image = context.site.path("import.image");
    let mut subjects = vec![ours(context, dense, "lz4"), floor(context, dense, Codec::Lz4)];
    for ((_, more), name) in CLUSTERS.iter().zip(["mkfs.erofs", "mkfs.erofs-64k"]) {
        subjects.push(writing(context, name, make_erofs(&image, &tree, more), image.clone()));
    }
    let title = Title {
        name: "import-lz4",
        about: "Import a file. floor: look for zero pages, hash and compress blocks of 64 KiB in memory on all \
                processors, and write nothing. mkfs.erofs compresses by one thread and does not wait for the disk; -64k has \
                clusters of 64 KiB in place of 4 KiB.",
        input: "dense",
        caches: CACHES,
    };
    context.row(title, subjects)?;
    let archive = context.site.path("import.zst");
    let mut command = Command::new("zstd");
    command.args(["-q", "-3", "-T0"]).arg(dense).arg("-o").arg(&archive);
    let peer = writing(context, "zstd", command, archive);
    let title = Title {
        name: "import-zstd",
        about: "The same by Zstandard, level 3. zstd compresses the file as one stream, in which single pages cannot be \
                read.",
        input: "dense",
        caches: CACHES,
    };
    context.row(title, vec![ours(context, dense, "zstd"), floor(context, dense, Codec::Zstd), peer])
}

fn ours<'a>(context: &'a Context, dense: &'a Path, codec: &'static str) -> Procedure<'a> {
    let site = context.site;
    let more = ["--compression", codec];
    Procedure {
        name: "stencil",
        command: site.recorded(&Store::new(site, "store").import(dense, "dense", &more)),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            let store = Store::new(site, "import");
            settle(context.site, 3 * context.dense_bytes)?;
            let before = Counters::now(site)?;
            run(&mut store.import(dense, "dense", &more))?;
            let taken = before.finish(site)?;
            Ok(taken.count("bytes", context.dense_bytes).count("stored_bytes", store.stored_bytes()?))
        }),
    }
}

fn floor<'a>(context: &'a Context, dense: &'a Path, codec: Codec) -> Procedure<'a> {
    Procedure {
        name: "floor",
        command: "stencil-bench: look for zero pages, hash and compress blocks of 64 KiB, on all processors"
            .to_owned(),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            settle(context.site, 3 * context.dense_bytes)?;
            let before = Counters::now(context.site)?;
            let stored = encode(dense, codec, processors(), true)?;
            let taken = before.finish(context.site)?;
            Ok(taken.count("bytes", context.dense_bytes).count("stored_bytes", stored))
        }),
    }
}

/// A peer that writes one file, which is removed again.
fn writing<'a>(
    context: &'a Context,
    name: &'a str,
    mut command: Command,
    out: std::path::PathBuf,
) -> Procedure<'a> {
    let site = context.site;
    Procedure {
        name,
        command: site.recorded(&command),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            settle(context.site, 3 * context.dense_bytes)?;
            let before = Counters::now(site)?;
            run(&mut command)?;
            let taken = before.finish(site)?;
            rustix::fs::sync();
            let stored = occupied(&out)?;
            fs::remove_file(&out).map_err(|e| Error::io("cannot remove", &out, e))?;
            Ok(taken.count("bytes", context.dense_bytes).count("stored_bytes", stored))
        }),
    }
}
