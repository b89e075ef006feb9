//! Rows about pages that are in the page cache: reading them, and copying them by a write.

use stencilfs::error::Result;

use super::reads::Source;
use crate::run::Context;
use crate::run::sampling::{Procedure, Title, touch, touch_cold};

pub fn measure(context: &Context, sources: &[Source; 8]) -> Result<()> {
    let [kernel, passthrough, decode, _, _, ext4, ..] = sources;
    let title = Title {
        name: "warm",
        about: "Read one word of each page through a new mapping, then write to each page of the last quarter.",
        input: "dense",
        caches: "all pages in the page cache, read in order before",
    };
    let subjects = [kernel, passthrough, decode, ext4].map(|source| warm(context, source, "normal"));
    context.row(title, subjects.into())?;
    let title = Title {
        name: "warm-huge",
        about: "The same with MADV_HUGEPAGE, also for the reads before. The share of the unwritten 2 MiB ranges that is \
                mapped by 2 MiB entries is FilePmdMapped of /proc/PID/smaps.",
        input: "dense",
        caches: "all pages in the page cache, read in order before",
    };
    let subjects = [kernel, passthrough, ext4].map(|source| warm(context, source, "huge"));
    context.row(title, subjects.into())
}

fn warm<'a>(context: &'a Context, source: &'a Source, advice: &'static str) -> Procedure<'a> {
    Procedure {
        name: source.name,
        command: source.command(context, &["copy".to_owned(), advice.to_owned()]),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            touch_cold(context.site, &source.file, &["sweep", advice], source.mount)?;
            touch(context.site, &source.file, &["copy", advice], source.mount)
        }),
    }
}
