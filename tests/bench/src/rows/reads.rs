//! Rows about reading through a mapping, and those that need the same mounts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Number;
use stencilfs::error::{Error, Result};

use super::{CLUSTERS, density, erofs_of, launch, warm};
use crate::run::Context;
use crate::run::floor::Packed;
use crate::run::inputs;
use crate::run::sampling::{Measurement, Procedure, Title, read_ahead, touch, touch_cold};
use crate::run::site::{Mount, Store};
use crate::run::static_fs::StaticFs;

/// A file with the data, as one file system serves it.
pub struct Source<'a> {
    pub name: &'a str,
    pub file: PathBuf,
    pub mount: Option<&'a Mount<'a>>,
    pub read_ahead_bytes: Option<u64>,
}

impl<'a> Source<'a> {
    /// A file of a file system.
    pub fn plain(name: &'a str, file: PathBuf) -> Result<Source<'a>> {
        let stat = fs::metadata(&file).map_err(|e| Error::io("cannot inspect", &file, e))?;
        Ok(Source { name, file, mount: None, read_ahead_bytes: read_ahead(stat.dev()) })
    }

    /// The template `bench:TAG` of a mount.
    pub fn served(context: &Context, mount: &'a Mount<'a>, tag: &str) -> Result<Source<'a>> {
        let file = mount.memory(tag);
        let read_ahead_bytes = match mount.serve.as_str() {
            "decode" => mount.status()?["read_ahead_bytes"].as_u64(),
            "passthrough" => read_ahead(context.site.device()?),
            // The EROFS mount is at no path, and sysfs does not show it.
            _ => None,
        };
        Ok(Source { name: &mount.name, file, mount: Some(mount), read_ahead_bytes })
    }

    /// A subject that touches pages of the file with cold caches. `words` are arguments of `touch.c` after the path.
    pub fn cold(
        &self,
        context: &'a Context,
        name: &'a str,
        words: impl Fn(u64) -> Vec<String> + 'a,
    ) -> Procedure<'a> {
        let (file, mount) = (self.file.clone(), self.mount);
        Procedure {
            name,
            command: self.command(context, &words(1)),
            read_ahead_bytes: self.read_ahead_bytes,
            take: Box::new(move |round| {
                let words = words(round);
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                touch_cold(context.site, &file, &words, mount)
            }),
        }
    }

    /// The command line of a measurement.
    pub fn command(&self, context: &Context, words: &[String]) -> String {
        let mut command = std::process::Command::new("touch");
        context.site.recorded(command.arg(&self.file).args(words))
    }
}

/// Pages that are touched with `MADV_RANDOM`.
const ADVISED_PAGES: u64 = 4000;

/// Arguments of `touch.c`: all pages in order.
pub fn sweep(advice: &str) -> impl Fn(u64) -> Vec<String> + use<> {
    let words = vec!["sweep".to_owned(), advice.to_owned()];
    move |_| words.clone()
}

/// Arguments of `touch.c`: pages anywhere, others in each round.
pub fn random(advice: &str, pages: u64) -> impl Fn(u64) -> Vec<String> + use<> {
    let advice = advice.to_owned();
    move |round| vec!["random".to_owned(), advice.clone(), round.to_string(), pages.to_string()]
}

const ROWS: [&str; 7] =
    ["sequential", "random-20000", "random-advised", "warm", "warm-huge", "launch", "density"];

pub fn measure(context: &Context, dense: &Path) -> Result<()> {
    if !context.wants(&ROWS) {
        return Ok(());
    }
    let store = Store::new(context.site, "reads");
    let digest = inputs::import(&store, dense, "dense")?;
    let [kernel, passthrough, decode] = ["kernel", "passthrough", "decode"].map(|serve| store.mount(serve));
    let (kernel, passthrough, decode) = (kernel?, passthrough?, decode?);
    let small = store.mount_as("decode-128k", "decode", &["--read-ahead", "128K"])?;
    let large = store.mount_as("decode-4m", "decode", &["--read-ahead", "4M"])?;
    // The first open makes the copy.
    touch(context.site, &passthrough.memory("dense"), &["first"], None)?;
    for mount in [&kernel, &passthrough, &decode, &small, &large] {
        mount.wait_until_served(&digest)?;
    }
    let [erofs, erofs_64k] = CLUSTERS.map(|(name, more)| erofs_of(context.site, dense, name, more));
    let (erofs, erofs_64k) = (erofs?, erofs_64k?);
    let sources = [
        Source::served(context, &kernel, "dense")?,
        Source::served(context, &passthrough, "dense")?,
        Source::served(context, &decode, "dense")?,
        Source::served(context, &small, "dense")?,
        Source::served(context, &large, "dense")?,
        Source::plain("ext4", dense.to_owned())?,
        Source::plain("erofs", erofs.file("memory"))?,
        Source::plain("erofs-64k", erofs_64k.file("memory"))?,
    ];
    sequential(context, &sources)?;
    random_pages(context, &sources, dense)?;
    if !context.is_quick() {
        warm::measure(context, &sources)?;
    }
    // `stencil clone` uses one of the mounts of a store: from here on there is only this one.
    drop(sources);
    [kernel, decode, small, large].into_iter().try_for_each(Mount::umount)?;
    launch::measure(context, &passthrough)?;
    density::measure(context, &passthrough)
}

fn sequential(context: &Context, sources: &[Source; 8]) -> Result<()> {
    let [kernel, passthrough, _, _, _, ext4, ..] = sources;
    let mut subjects: Vec<Procedure> =
        sources.iter().map(|source| source.cold(context, source.name, sweep("normal"))).collect();
    let advised = [(kernel, "kernel-huge"), (passthrough, "passthrough-huge"), (ext4, "ext4-huge")];
    subjects.extend(advised.map(|(source, name)| source.cold(context, name, sweep("huge"))));
    let title = Title {
        name: "sequential",
        about: "Read one word of each page through a mapping, in order; -huge with MADV_HUGEPAGE. decode-128k \
                and decode-4m are decode with another --read-ahead; erofs-64k has clusters of 64 KiB in place of 4 KiB.",
        input: "dense",
        caches: "cold",
    };
    context.row(title, subjects)
}

fn random_pages(context: &Context, sources: &[Source; 8], dense: &Path) -> Result<()> {
    let site = context.site;
    let title = Title {
        name: "random-20000",
        about: "Read one word of 20 000 pages anywhere through a mapping, with default advice; the same pages for all \
                subjects of a round.",
        input: "dense",
        caches: "cold",
    };
    let subjects = sources.iter().map(|source| source.cold(context, source.name, random("normal", 20_000)));
    context.row(title, subjects.collect())?;
    let title = Title {
        name: "random-advised",
        about: "Read one word of 4000 pages anywhere through a mapping, with MADV_RANDOM; the same pages for all \
                subjects of a round. decode-floor adds up two medians: reading a block of 64 KiB compressed by LZ4 \
                with O_DIRECT, decoding and hashing it; and a fault on a FUSE file whose server replies at once.",
        input: "dense",
        caches: "cold",
    };
    let (packed, static_fs) =
        (site.path("packed"), StaticFs::mount(&site.create_dir("static")?, context.dense_bytes)?);
    let blocks = Packed::write(dense, &packed)?;
    let mut subjects: Vec<Procedure> = sources
        .iter()
        .map(|source| source.cold(context, source.name, random("random", ADVISED_PAGES)))
        .collect();
    subjects.push(Procedure {
        name: "decode-floor",
        command:
            "stencil-bench: read, decode and hash blocks of 64 KiB; touch DIR/static/zeros random random"
                .to_owned(),
        read_ahead_bytes: None,
        take: Box::new(|round| {
            let words = random("random", ADVISED_PAGES)(round);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let replies = touch_cold(site, static_fs.file(), &words, None)?.sample;
            let reply = |metric| replies.get(metric).and_then(Number::as_f64).unwrap_or(f64::NAN);
            let blocks = blocks.verify_anywhere(&packed, round, ADVISED_PAGES)?;
            let measurement = Measurement::seconds(reply("seconds") + blocks.iter().sum::<f64>() / 1e6);
            let measurement = measurement.with("reply_p50_us", reply("p50_us"));
            Ok(measurement.with("p50_us", reply("p50_us") + blocks[blocks.len() / 2]))
        }),
    });
    context.row(title, subjects)?;
    fs::remove_file(&packed).map_err(|e| Error::io("cannot remove", &packed, e))
}
