//! Memory that the kernel decodes is held once, and counted to the page.

use std::fs::File;

use stencilfs::sys::memory::mapping::Advice;
use stencilfs::units::MemoryOffset;

use crate::mount::serving::{private_mapping, smaps};
use crate::support::actor::Actor;
use crate::support::daemon::drill::drop_caches;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::random;

const PAGE: usize = 4096;

#[test]
fn clones_share_one_copy_in_large_mappings_and_it_is_counted_to_the_page() {
    let _host = host::alone();
    let world = TestMount::new("kernel");
    let bytes = random(3, 16 << 20);
    let digest = world.import_bytes(&bytes, "web:1");
    world.wait_until_verified(&digest);
    let path = world.file(&digest, "memory");
    host::measured(|| {
        // Without free memory in pieces of 2 MiB, the kernel maps smaller pieces.
        host::compact_memory();
        drop_caches();
        let file = File::open(&path).unwrap();
        let mapping = private_mapping(&file, bytes.len() as u64);
        mapping.advise(0..bytes.len() as u64, Advice::HugePage).unwrap();
        for (page, expected) in bytes.iter().step_by(PAGE).enumerate() {
            assert_eq!(mapping.load(MemoryOffset::new((page * PAGE) as u64)).unwrap(), *expected);
        }
        match smaps(&path, "FilePmdMapped") {
            large if large == bytes.len() as u64 => Ok(()),
            large => Err(format!("only {large} bytes are mapped by 2 MiB entries")),
        }
    });

    let mut clones = [Actor::start(), Actor::start()];
    for clone in &mut clones {
        clone.tell(&format!("map 0 {} 0 {} rw", path.display(), bytes.len()));
        for (page, expected) in bytes.iter().step_by(PAGE).enumerate() {
            assert_eq!(clone.tell(&format!("read 0 {page}")) as u8, *expected);
        }
        clone.tell("write 0 7 1");
    }
    let density = world.json(&["density", "--audit"]);
    let template = &density["templates"][0];
    assert_eq!((&template["serving"], &template["resident_bytes"]), (&"kernel".into(), &bytes.len().into()));
    let dirty: Vec<_> =
        density["clones"].as_array().unwrap().iter().map(|row| row["dirty_pages"].clone()).collect();
    assert_eq!(dirty, [1, 1]);
    let error = density["audit"]["frames"]["error_percent"].as_f64().unwrap();
    assert!(error.abs() <= 0.5, "{}", density["audit"]);
}

/// A read in order without advice fills folios of 2 MiB, because of the large read-ahead of kernel decode.
#[test]
fn a_read_in_order_without_advice_makes_memory_that_is_mapped_by_2_mib_entries() {
    let _host = host::alone();
    let bytes = random(4, 64 << 20);
    let share_mapped = |options: &[&str]| {
        let world = TestMount::with(options);
        let digest = world.import_bytes(&bytes, "web:1");
        world.wait_until_verified(&digest);
        let path = world.file(&digest, "memory");
        host::compact_memory();
        drop_caches();
        let file = File::open(&path).unwrap();
        // The first mapping fills the page cache, the second maps the pages that are there.
        let mappings = [0, 1].map(|_| {
            let mapping = private_mapping(&file, bytes.len() as u64);
            for (page, expected) in bytes.iter().step_by(PAGE).enumerate() {
                assert_eq!(mapping.load(MemoryOffset::new((page * PAGE) as u64)).unwrap(), *expected);
            }
            mapping
        });
        let [first, _second] = mappings;
        drop(first);
        smaps(&path, "FilePmdMapped") as f64 / bytes.len() as f64
    };
    host::measured(|| match share_mapped(&["--serve", "kernel"]) {
        // The first 20 MiB or so are smaller folios, as the kernel makes them larger step by step.
        0.5.. => Ok(()),
        share => Err(format!("only {share} of the memory is mapped by 2 MiB entries")),
    });
    assert_eq!(share_mapped(&["--serve", "kernel", "--read-ahead", "128K"]), 0.0);
}

/// sysfs shows EROFS mounts by serial numbers alone, so the supervisors must tell apart mounts that they make at the
/// same time.
#[test]
fn templates_that_are_mounted_at_the_same_time_all_get_the_read_ahead() {
    const TEMPLATES: u8 = 8;
    let _host = host::alone();
    let worlds = [0, 1].map(|number| {
        let world = TestMount::unmounted();
        let digests: Vec<String> = (0..TEMPLATES)
            .map(|tag| {
                world.import_bytes(
                    &random(u64::from(10 + number * TEMPLATES + tag), 1 << 20),
                    &format!("web:{tag}"),
                )
            })
            .collect();
        (world, digests)
    });
    std::thread::scope(|scope| {
        for (world, digests) in &worlds {
            scope.spawn(|| {
                world.mount(&["--serve", "kernel"]).ok();
                digests.iter().for_each(|digest| world.wait_until_verified(digest));
            });
        }
    });
    let all = std::fs::read_dir("/sys/class/bdi").unwrap().map(|entry| entry.unwrap().path());
    let sizes: Vec<String> = all
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("erofs-"))
        .map(|path| std::fs::read_to_string(path.join("read_ahead_kb")).unwrap())
        .collect();
    assert_eq!(sizes, vec!["4096\n"; 2 * usize::from(TEMPLATES)]);
}
