//! Rows about the time until a template can be read: first byte, verification, hydration.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use stencilfs::error::{Error, Result};

use crate::run::Context;
use crate::run::floor::Packed;
use crate::run::inputs;
use crate::run::sampling::{Counters, Measurement, Procedure, Title, drop_caches, touch};
use crate::run::site::{Store, run};

/// How often the large template repeats the dense image.
const REPEATED: u64 = 16;

pub fn measure(context: &Context, dense: &Path) -> Result<()> {
    if !context.wants(&["first-byte", "verification", "hydration"]) {
        return Ok(());
    }
    let store = Store::new(context.site, "cold");
    let digest = inputs::import(&store, dense, "dense")?;
    if context.wants(&["first-byte"]) {
        first_byte(context, dense, (&store, &digest))?;
    }
    if context.wants(&["verification"]) {
        verification(context, dense, (&store, &digest))?;
    }
    hydration(context, dense, (&store, &digest))
}

fn first_byte(context: &Context, dense: &Path, (store, digest): (&Store, &str)) -> Result<()> {
    let large = Store::new(context.site, "large");
    let large_digest = inputs::import_repeated(&large, dense, REPEATED, "dense")?;
    let take = |store: &Store, digest: &str| {
        let mount = store.mount("kernel")?;
        let mounted = Instant::now();
        let first = touch(context.site, &mount.memory("dense"), &["first"], None)?;
        mount.wait_until_served(digest)?;
        let until_kernel = mounted.elapsed().as_secs_f64();
        drop_caches(context.site, 3 * context.dense_bytes)?;
        let again = touch(context.site, &mount.memory("dense"), &["first"], None)?;
        if again.checksum != first.checksum {
            return Err(Error::damage("kernel decode and the first read give other bytes"));
        }
        mount.umount()?;
        let again = again.sample.get("seconds").and_then(serde_json::Number::as_f64).unwrap_or(f64::NAN);
        Ok(first.with("kernel_read_seconds", again).with("until_kernel_seconds", until_kernel))
    };
    // An earlier mount has verified the template.
    for (store, digest) in [(store, digest), (&large, large_digest.as_str())] {
        store.mount("kernel")?.wait_until_served(digest)?;
    }
    let subject = |name, store, digest| Procedure {
        name,
        command: "stencil mount MNT --serve kernel; touch MNT/templates/bench/dense/memory first".to_owned(),
        read_ahead_bytes: None,
        take: Box::new(move |_| {
            drop_caches(context.site, 3 * context.dense_bytes)?;
            take(store, digest)
        }),
    };
    let title = Title {
        name: "first-byte",
        about: "Open, map and read one word of a template directly after the mount, where an earlier mount has \
                verified the template. kernel-16 is a template of 16 times the input. Column \"other\": the time \
                from the mount until stencil status reports kernel decode, and the time of the first read after that.",
        input: "dense",
        caches: "cold",
    };
    context.row(title, vec![subject("kernel", store, digest), subject("kernel-16", &large, &large_digest)])
}

fn verification(context: &Context, dense: &Path, (store, digest): (&Store, &str)) -> Result<()> {
    let site = context.site;
    let packed = Packed::write(dense, &site.path("packed"))?;
    let ours = Procedure {
        name: "kernel",
        command:
            "stencil store unseal DIR; stencil mount MNT --serve kernel; stencil --json status, until served"
                .to_owned(),
        read_ahead_bytes: None,
        take: Box::new(|_| {
            store.unseal()?;
            drop_caches(site, 3 * context.dense_bytes)?;
            let before = Counters::now(site)?;
            let mount = store.mount("kernel")?;
            mount.wait_until_served(digest)?;
            let measurement = before.finish(site)?.count("bytes", context.dense_bytes);
            mount.umount()?;
            Ok(measurement)
        }),
    };
    let floor = Procedure {
        name: "floor",
        command:
            "stencil-bench: read 64 KiB blocks compressed by LZ4, decode and hash them, on all processors"
                .to_owned(),
        read_ahead_bytes: None,
        take: Box::new(|_| {
            drop_caches(site, 3 * context.dense_bytes)?;
            let before = Counters::now(site)?;
            let bytes = packed.verify()?;
            Ok(before.finish(site)?.count("bytes", bytes))
        }),
    };
    let title = Title {
        name: "verification",
        about: "From the mount of a template that was never verified until kernel decode serves it.",
        input: "dense",
        caches: "cold",
    };
    context.row(title, vec![ours, floor])?;
    let path = site.path("packed");
    fs::remove_file(&path).map_err(|e| Error::io("cannot remove", &path, e))
}

fn hydration(context: &Context, dense: &Path, (store, digest): (&Store, &str)) -> Result<()> {
    let site = context.site;
    let copy = site.path("copy");
    let mut cp = Command::new("cp");
    cp.arg("--sparse=never").arg(dense).arg(&copy);
    let peer = Procedure {
        name: "cp",
        command: site.recorded(&cp),
        read_ahead_bytes: None,
        take: Box::new(|_| {
            drop_caches(site, 3 * context.dense_bytes)?;
            let before = Counters::now(site)?;
            run(&mut cp)?;
            let measurement = before.finish(site)?;
            fs::remove_file(&copy).map_err(|e| Error::io("cannot remove", &copy, e))?;
            Ok(measurement)
        }),
    };
    let ours = Procedure {
        name: "passthrough",
        command: "stencil mount MNT --serve passthrough; touch MNT/templates/bench/dense/memory first"
            .to_owned(),
        read_ahead_bytes: None,
        take: Box::new(|_| {
            drop_caches(site, 3 * context.dense_bytes)?;
            let before = Counters::now(site)?;
            let mount = store.mount("passthrough")?;
            touch(site, &mount.memory("dense"), &["first"], None)?;
            let measurement: Measurement = before.finish(site)?;
            mount.wait_until_served(digest)?;
            mount.umount()?;
            Ok(measurement)
        }),
    };
    let title = Title {
        name: "hydration",
        about: "From the mount to the first byte of a template by passthrough, which makes and verifies a copy; cp \
                copies the raw file to the same file system and verifies nothing. Passthrough makes the copy \
                immutable, for which ext4 writes the copy to the disk; cp does not wait for the disk.",
        input: "dense",
        caches: "cold",
    };
    context.row(title, vec![ours, peer])
}
