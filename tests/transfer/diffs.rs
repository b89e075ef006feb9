//! Import of diff snapshots: the holes of the memory file are the pages of the base.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

use crate::support::mount::run;
use crate::support::store::{Fixture, Ran, guest_like, random, stencil};
use crate::vmm::firecracker::state;

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// Writes a file with these pages of `memory`, and holes in place of all others.
fn write_diff(path: &Path, memory: &[u8], pages: &BTreeSet<usize>) {
    let file = File::create(path).unwrap();
    file.set_len(memory.len() as u64).unwrap();
    for at in pages.iter().map(|page| page * PAGE) {
        file.write_all_at(&memory[at..at + PAGE], at as u64).unwrap();
    }
}

/// Writes a directory as Firecracker does: a diff if `pages` are given.
fn folder(path: PathBuf, memory: &[u8], pages: Option<&BTreeSet<usize>>, seed: u64) -> PathBuf {
    fs::create_dir(&path).unwrap();
    match pages {
        Some(pages) => write_diff(&path.join("vm.mem"), memory, pages),
        None => fs::write(path.join("vm.mem"), memory).unwrap(),
    }
    fs::write(path.join("vm.state"), state(0x8664, "8.0.0", seed)).unwrap();
    path
}

/// Changes single pages, runs across blocks, the first and the last page; some of them to zeros.
fn change(memory: &mut [u8], seed: u64) -> BTreeSet<usize> {
    let count = memory.len() / PAGE;
    let choices = random(seed, 60);
    let mut pages = BTreeSet::from([0, count - 1]);
    for choice in choices.chunks(3) {
        let first = usize::from(u16::from_le_bytes([choice[0], choice[1]])) % count;
        pages.extend(first..(first + usize::from(choice[2] % 24)).min(count));
    }
    for page in &pages {
        let bytes = &mut memory[page * PAGE..(page + 1) * PAGE];
        match page % 5 {
            0 => bytes.fill(0),
            _ => bytes.copy_from_slice(&random(seed + *page as u64, PAGE)),
        }
    }
    pages
}

fn export(fixture: &Fixture, what: &str) -> Vec<u8> {
    let out = fixture.path("exported");
    fixture.run(&["export", what, out.to_str().unwrap(), "--force"]).ok();
    fs::read(out).unwrap()
}

fn import(fixture: &Fixture, source: &Path, more: &[&str]) -> Ran {
    fixture.run(&[&["import", source.to_str().unwrap()], more].concat())
}

/// A store with the template `vm:0`, the base of all diffs, whose memory is returned.
fn based(fixture: &Fixture, mib: usize) -> Vec<u8> {
    let memory = guest_like(1, mib * MIB);
    let source = folder(fixture.path("0"), &memory, None, 0);
    import(fixture, &source, &["vm:0"]).ok();
    memory
}

#[test]
fn a_chain_of_diffs_gives_the_merged_images() {
    let (fixture, whole) = (Fixture::new(), Fixture::new());
    // The last block is shorter than a block.
    let mut memory = guest_like(1, 8 * MIB);
    let source = folder(fixture.path("0"), &memory, None, 0);
    import(&fixture, &source, &["vm:0"]).ok();
    let mut images = vec![memory.clone()];
    for depth in 1..=4u64 {
        let pages = change(&mut memory, depth * 1000);
        let source = folder(fixture.path(&depth.to_string()), &memory, Some(&pages), depth);
        let (tag, base) = (format!("vm:{depth}"), format!("vm:{}", depth - 1));
        let text = import(&fixture, &source, &[&tag, "--base", &base]).ok();
        let expected = format!("{} of {} pages changed", pages.len(), memory.len() / PAGE);
        assert_eq!(text.stdout.lines().last(), Some(expected.as_str()), "{text:?}");
        let report = import(&fixture, &source, &[&tag, "--base", &base, "--json"]).ok().json();
        assert_eq!((&report["changed_pages"], &report["existed"]), (&pages.len().into(), &true.into()));
        // The same template as from the merged image, whose digest another store computes.
        let merged = folder(whole.path(&depth.to_string()), &memory, None, depth);
        let merged = import(&whole, &merged, &["vm", "--json"]).ok().json();
        assert_eq!((&report["digest"], &report["files"]), (&merged["digest"], &merged["files"]));
        assert_eq!(merged["changed_pages"], Value::Null);
        images.push(memory.clone());
    }
    for (depth, image) in images.iter().enumerate() {
        assert!(export(&fixture, &format!("vm:{depth}/vm.mem")) == *image, "depth {depth}");
    }
    // Each template is whole: it does not need its base.
    for base in ["vm:0", "vm:1", "vm:2", "vm:3"] {
        fixture.run(&["rm", base]).ok();
    }
    fixture.run(&["gc", "--all"]).ok();
    fixture.run(&["verify"]).ok();
    assert!(export(&fixture, "vm:4/vm.mem") == images[4]);
    fixture.assert_clean();
}

/// Firecracker's memory is whole MiB; other sources may end within a block.
#[test]
fn a_diff_may_end_within_a_block() {
    let fixture = Fixture::new();
    let base = guest_like(1, 3 * MIB + 3 * PAGE);
    let source = fixture.file("base", &base);
    import(&fixture, &source, &["vm:0"]).ok();
    for pages in [vec![0], vec![769], vec![768, 770], vec![16, 17]] {
        let (mut memory, pages) = (base.clone(), BTreeSet::from_iter(pages));
        pages.iter().for_each(|page| memory[page * PAGE..(page + 1) * PAGE].fill(9));
        write_diff(&fixture.path("diff"), &memory, &pages);
        import(&fixture, &fixture.path("diff"), &["vm:1", "--base", "vm:0"]).ok();
        assert!(export(&fixture, "vm:1") == memory, "{pages:?}");
    }
}

#[test]
fn a_diff_takes_the_space_of_its_changed_pages() {
    let fixture = Fixture::new();
    let base = guest_like(1, 128 * MIB);
    let source = folder(fixture.path("0"), &base, None, 0);
    let whole = import(&fixture, &source, &["vm:0", "--json"]).ok().json();
    // 2 % of the pages, in runs of 32: a guest's writes are near one another, and a changed page costs its block.
    let count = base.len() / PAGE;
    let runs = count / 50 / 32;
    let mut memory = base;
    let pages: BTreeSet<usize> =
        (0..runs).flat_map(|run| (0..32).map(move |page| (run * 50 * 32) + 7 + page)).collect();
    let changed = guest_like(2, memory.len());
    for at in pages.iter().map(|page| page * PAGE) {
        memory[at..at + PAGE].copy_from_slice(&changed[at..at + PAGE]);
    }
    let source = folder(fixture.path("1"), &memory, Some(&pages), 0);
    let diff = import(&fixture, &source, &["vm:1", "--base", "vm:0", "--json"]).ok().json();
    let of = |report: &Value, field: &str| report[field].as_f64().unwrap();
    println!(
        "{} of {count} pages changed; base: {:.3} s, {} bytes stored; diff: {:.3} s, {} bytes stored",
        pages.len(),
        of(&whole, "seconds"),
        of(&whole, "stored_bytes"),
        of(&diff, "seconds"),
        of(&diff, "stored_bytes")
    );
    assert!(of(&diff, "stored_bytes") > 0.0);
    assert!(of(&diff, "stored_bytes") <= 0.04 * of(&whole, "stored_bytes"), "{diff}");
    assert!(export(&fixture, "vm:1/vm.mem") == memory);
}

/// A copy that keeps the holes is the same diff. Any other copy is refused, or loses pages without an error.
#[test]
fn a_copy_of_a_diff_must_keep_its_holes() {
    let fixture = Fixture::new();
    let base = based(&fixture, 4);
    let mut memory = base.clone();
    let pages = change(&mut memory, 7);
    let is_zero = |page: &usize| memory[page * PAGE..(page + 1) * PAGE].iter().all(|byte| *byte == 0);
    let source = folder(fixture.path("1"), &memory, Some(&pages), 1);
    import(&fixture, &source, &["vm:1", "--base", "vm:0"]).ok();
    assert!(export(&fixture, "vm:1/vm.mem") == memory);
    // The memory that results if a copy loses the zero pages: the pages of the base take their place.
    let mut without_zeros = memory.clone();
    for page in pages.iter().filter(|page| is_zero(page)) {
        without_zeros[page * PAGE..(page + 1) * PAGE].copy_from_slice(&base[page * PAGE..(page + 1) * PAGE]);
    }
    assert!(without_zeros != memory, "some changed page is zero");
    let copy = fixture.path("copy");
    let copied = |program: &str, options: &[&str]| {
        let _ = fs::remove_dir_all(&copy);
        let mut words: Vec<String> = options.iter().map(|&word| word.to_owned()).collect();
        words.push(format!("{}/", source.display()));
        words.push(copy.display().to_string());
        run(program, &words);
        import(&fixture, &copy, &["vm:2", "--base", "vm:0"])
    };
    fs::create_dir(&copy).unwrap();
    let tar = format!("cd {} && tar --sparse -c . | tar -x -C {}", source.display(), copy.display());
    run("sh", &["-c", &tar]);
    let ran = import(&fixture, &copy, &["vm:2", "--base", "vm:0"]).ok();
    assert!(export(&fixture, "vm:2/vm.mem") == memory && ran.stderr.is_empty(), "{ran:?}");
    for (program, options) in [
        ("cp", &["-r", "--reflink=never"][..]),
        ("cp", &["-r", "--reflink=never", "--sparse=auto"]),
        ("cp", &["-r", "--sparse=always"]),
        ("rsync", &["-aS"]),
    ] {
        let ran = copied(program, options).ok();
        assert!(export(&fixture, "vm:2/vm.mem") == without_zeros, "{program} {options:?}");
        assert!(ran.stderr.contains("note: no changed page of the diff is zero"), "{ran:?}");
    }
    for (program, options) in [("cp", &["-r", "--sparse=never"][..]), ("rsync", &["-a"])] {
        let ran = copied(program, options);
        assert!(ran.code == 2 && ran.stderr.contains("the diff has no hole"), "{program}: {ran:?}");
        assert!(ran.stderr.contains("tar --sparse") && ran.stderr.contains("--all-pages"), "{ran:?}");
    }
    // If the guest has written every page, the file alone is the memory.
    import(&fixture, &copy, &["vm:2", "--base", "vm:0", "--all-pages"]).ok();
    assert!(export(&fixture, "vm:2/vm.mem") == fs::read(copy.join("vm.mem")).unwrap());
    fixture.assert_clean();
}

#[test]
fn refuses_what_is_no_diff_of_the_base() {
    let fixture = Fixture::new();
    let mut memory = based(&fixture, 4);
    let pages = change(&mut memory, 7);
    let source = folder(fixture.path("1"), &memory, Some(&pages), 1);
    let refused = |source: &Path, more: &[&str], code: i32, messages: &[&str]| {
        let ran = import(&fixture, source, &[&["vm:2"], more].concat());
        assert_eq!(ran.code, code, "{more:?}: {ran:?}");
        messages.iter().for_each(|message| assert!(ran.stderr.contains(message), "{message}: {ran:?}"));
    };
    refused(&source, &[], 2, &["bytes of the memory file are holes", "with --base T"]);
    refused(&source, &["--all-pages"], 2, &["--base"]);
    refused(&source, &["--base", "none"], 4, &["none"]);
    let small = folder(fixture.path("small"), &memory[..2 * MIB], Some(&BTreeSet::from([1])), 1);
    refused(&small, &["--base", "vm:0"], 2, &["the diff has 2097152 bytes", "has 4194304"]);
    let diff = source.join("vm.mem");
    let two = format!("other={}", diff.display());
    refused(&diff, &["--base", "vm:0", "--file", &two], 2, &["a diff has one file of kind ram, not 2"]);
    refused(Path::new("/dev/null"), &["--base", "vm:0"], 2, &["must be a regular file"]);
    let all = fixture.path("all");
    fs::create_dir(&all).unwrap();
    fs::rename(&small, all.join("v1")).unwrap();
    let ran = import(&fixture, &all, &["vm", "--base", "vm:0"]);
    assert!(ran.code == 2 && ran.stderr.contains("--file or --base is given"), "{ran:?}");
    let kata = fixture.path("kata");
    fs::create_dir(&kata).unwrap();
    fs::write(kata.join("state"), "QEVM").unwrap();
    write_diff(&kata.join("memory"), &memory, &pages);
    refused(&kata, &["--base", "vm:0"], 2, &["has a Kata template", "only Firecracker"]);
    assert_eq!(fixture.run(&["inspect", "vm:2"]).code, 4);
    fixture.assert_clean();
}

/// A page that lies in a larger allocated piece is no hole, and would be taken for zeros.
#[test]
fn refuses_a_diff_on_a_file_system_with_larger_pieces() {
    let fixture = Fixture::new();
    let mut memory = based(&fixture, 4);
    let huge = fixture.path("huge");
    fs::create_dir(&huge).unwrap();
    run("mount", &["-t", "tmpfs", "-o", "huge=always,size=64M", "none", huge.to_str().unwrap()]);
    let pages = change(&mut memory, 7);
    let source = folder(huge.join("1"), &memory, Some(&pages), 1);
    let ran = import(&fixture, &source, &["vm:1", "--base", "vm:0"]);
    run("umount", &[huge.to_str().unwrap()]);
    assert!(ran.code == 2 && ran.stderr.contains("allocates 2097152 bytes at a time"), "{ran:?}");
}

/// Flips a byte in the first records of every pack: the first blocks of the base.
fn damage(fixture: &Fixture) {
    for pack in fixture.files("packs") {
        let file = File::options().read(true).write(true).open(pack).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 5000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 5000).unwrap();
    }
}

#[test]
fn unchanged_blocks_are_not_read() {
    let fixture = Fixture::new();
    let base = based(&fixture, 4);
    damage(&fixture);
    let write = |name: &str, pages: &[usize]| {
        let mut memory = base.clone();
        pages.iter().for_each(|page| memory[page * PAGE..(page + 1) * PAGE].fill(7));
        folder(fixture.path(name), &memory, Some(&pages.iter().copied().collect()), 1)
    };
    let far = write("far", &[1000]);
    import(&fixture, &far, &["vm:1", "--base", "vm:0"]).ok();
    let verify = fixture.run(&["verify"]);
    assert!(
        verify.code == 3 && verify.stdout.contains("vm:0") && verify.stdout.contains("vm:1"),
        "{verify:?}"
    );
    // One page in each of the first blocks: these are completed from the base.
    let near = write("near", &[1, 17, 33, 49]);
    let ran = import(&fixture, &near, &["vm:2", "--base", "vm:0"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert_eq!(fixture.run(&["inspect", "vm:2"]).code, 4);
    fixture.assert_clean();
}

/// An import that waits for its device state has taken the base's places already.
#[test]
fn the_base_is_neither_removed_nor_moved_nor_repaired_unnoticed() {
    let fixture = Fixture::new();
    let mut memory = guest_like(1, 4 * MIB);
    let source = fixture.file("base", &memory);
    import(&fixture, &source, &["vm:0"]).ok();
    let pages = change(&mut memory, 7);
    write_diff(&fixture.path("diff"), &memory, &pages);
    let fifo = fixture.path("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    write_diff(&fixture.path("far"), &memory, &BTreeSet::from([1000]));
    let fifo = fifo.to_str().unwrap();
    let start = |diff: &str| {
        let diff = fixture.path(diff);
        let args = ["import", diff.to_str().unwrap(), "vm:1", "--base", "vm:0", "--state", fifo];
        let mut command = stencil(fixture.dir.path(), &args);
        let child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
        let writer = File::options().write(true).open(fifo).unwrap();
        // This state does not fit into the pipe and the import's batches. When it has been written, the import has read
        // the memory, which comes first.
        let mut writer = writer;
        writer.write_all(&random(1, 16 * MIB)).unwrap();
        (child, writer)
    };
    let (child, mut writer) = start("diff");
    let rm = fixture.run(&["rm", "vm:0"]);
    assert!(rm.code == 5 && rm.stderr.contains("(import)"), "{rm:?}");
    let mut gc = stencil(fixture.dir.path(), &["gc", "--all"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(gc.try_wait().unwrap().is_none(), "gc does not wait for the import");
    writer.write_all(b"state").unwrap();
    drop(writer);
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.ok();
    // A collection that has waited for 15 s gives up.
    match gc.wait().unwrap().code() {
        Some(75) => drop(fixture.run(&["gc", "--all"]).ok()),
        code => assert_eq!(code, Some(0)),
    }
    assert!(export(&fixture, "vm:1/memory") == memory);
    fixture.run(&["verify"]).ok();

    damage(&fixture);
    let (child, mut writer) = start("far");
    let repaired = import(&fixture, &source, &["vm:0", "--json"]).ok().json();
    assert_ne!(repaired["repaired_blocks"], 0, "{repaired}");
    writer.write_all(b"other state").unwrap();
    drop(writer);
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert!(ran.code == 75 && ran.stderr.contains("was repaired during the import"), "{ran:?}");
}

/// Imports of diffs, collections and removals of other templates at the same time.
#[test]
fn diffs_beside_collections_are_whole() {
    let fixture = Fixture::new();
    let base = based(&fixture, 8);
    let dir = fixture.dir.path();
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            for _ in 0..6 {
                let output = stencil(dir, &["gc", "--all", "--untagged"]).output().unwrap();
                assert!([0, 75].contains(&output.status.code().unwrap()), "{output:?}");
            }
        });
        for number in 0..8u64 {
            let mut memory = base.clone();
            let pages = change(&mut memory, number * 100);
            let source = folder(fixture.path(&format!("d{number}")), &memory, Some(&pages), number);
            // The tag moves: the template of the round before is removed.
            import(&fixture, &source, &["vm:x", "--base", "vm:0"]).ok();
            assert!(export(&fixture, "vm:x/vm.mem") == memory, "{number}");
        }
        collector.join().unwrap();
    });
    fixture.run(&["verify"]).ok();
}
