//! Rows about the disk space of many similar templates.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use stencilfs::error::{Error, Result};

use crate::run::Context;
use crate::run::inputs::{changed, import};
use crate::run::sampling::{Measurement, Procedure, Title};
use crate::run::site::Store;

/// Size of each template.
const BYTES: u64 = 128 << 20;
/// Number of templates.
const TEMPLATES: u64 = 20;
/// Share of the pages that differ from the first template.
const PERCENT: u64 = 5;

pub fn measure(context: &Context, dense: &Path) -> Result<()> {
    let about = |pages: &str| {
        format!(
            "20 templates of 128 MiB, 19 of which differ from the first in 5 % of the pages, {pages}. floor: a store \
             with the first template, and another one with all differing pages alone. The cache is what a mount with \
             kernel decode keeps beside the store."
        )
    };
    let rows = [
        ("disk", about("in runs of 64 pages that do not begin at a block"), 64),
        ("disk-scattered", about("each of which is a page alone"), 1),
    ];
    for (name, about, pages) in &rows {
        if context.wants(&[name]) {
            let title = Title { name, about, input: "dense", caches: "not relevant" };
            row(context, dense, title, *pages)?;
        }
    }
    Ok(())
}

fn row(context: &Context, dense: &Path, title: Title, pages: u64) -> Result<()> {
    let site = context.site;
    let [base, copy, alone] = ["base", "changed", "alone"].map(|name| site.path(&format!("{name}-{pages}")));
    let copied =
        File::open(dense).and_then(|file| io::copy(&mut file.take(BYTES), &mut File::create(&base)?));
    copied.map_err(|e| Error::io("cannot write the first template", &base, e))?;
    let ours = Procedure {
        name: "stencil",
        command: site.recorded(&Store::new(site, "store").import(&copy, "N", &[])),
        read_ahead_bytes: None,
        take: Box::new(|_| {
            let store = Store::new(site, "similar");
            let mut digests = vec![import(&store, &base, "0")?];
            for number in 1..TEMPLATES {
                changed(&base, &copy, &alone, (PERCENT, pages, number))?;
                digests.push(import(&store, &copy, &number.to_string())?);
            }
            let measurement = Measurement::default().count("stored_bytes", store.stored_bytes()?);
            let mount = store.mount("kernel")?;
            for digest in &digests {
                mount.wait_until_served(digest)?;
            }
            let cache = mount.status()?["cache_used"].as_u64();
            let cache = cache.ok_or_else(|| Error::failed("the status lacks the size of the cache"))?;
            mount.umount()?;
            Ok(measurement.count("cache_bytes", cache).count("bytes", TEMPLATES * BYTES))
        }),
    };
    let floor = Procedure {
        name: "floor",
        command: site.recorded(&Store::new(site, "store").import(&alone, "N", &[])),
        read_ahead_bytes: None,
        take: Box::new(|_| {
            let (first, differences) = (Store::new(site, "first"), Store::new(site, "differences"));
            import(&first, &base, "0")?;
            import(&differences, &alone, "0")?;
            Ok(Measurement::default()
                .count("stored_bytes", first.stored_bytes()? + differences.stored_bytes()?))
        }),
    };
    // In one round the subjects are measured in the order of the second one: the floor needs the differences.
    context.row_in_rounds(title, vec![floor, ours], Some(1))?;
    for path in [&base, &copy, &alone] {
        fs::remove_file(path).map_err(|e| Error::io("cannot remove", path, e))?;
    }
    Ok(())
}
