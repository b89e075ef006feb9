//! Compares Stencil with the installed QEMU: both get the same object and must give the same verdict, the same error
//! text, the same mapping, and the same results of a read and a write. The objects are in the tables of
//! `docs/reference/semantics.md`.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;
use stencilfs::memory::{Backend, Observed, Options, observe, parse_smaps};
use stencilfs::units::MemoryOffset;

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::pages::tables::{code, rows};
use crate::support::vm::object_files::{Files, explain, user_of};
use crate::support::vm::qemu_object::{Guest, Verdict, verdict};

const DOCUMENT: &str = "reference/semantics.md";
const MIB: u64 = 1 << 20;

/// The mapping in `smaps` whose first line satisfies `pick`.
fn mapping(smaps: &str, pick: impl Fn(&str) -> bool) -> Option<Observed> {
    let line = smaps.lines().find(|line| line.contains('-') && pick(line))?;
    let start = u64::from_str_radix(line.split_once('-')?.0, 16).ok()?;
    parse_smaps(smaps, start)
}

/// QEMU's mapping of the object: for a file, the mapping of a path in `directory`; otherwise the mapping of `size`
/// bytes (QEMU adds a guard page behind guest memory).
fn mapping_in_qemu(guest: &Guest, directory: &Path, size: u64) -> Observed {
    let smaps = guest.smaps();
    let directory = directory.to_str().unwrap();
    let sized = |line: &str| {
        let (start, rest) = line.split_once('-')?;
        let (end, _) = rest.split_once(' ')?;
        Some(u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()? == size)
    };
    mapping(&smaps, |line| line.contains(directory))
        .or_else(|| mapping(&smaps, |line| line.contains("/memfd:m") && sized(line) == Some(true)))
        .or_else(|| {
            mapping(&smaps, |line| line.contains(" rw-p 00000000 00:00 0") && sized(line) == Some(true))
        })
        .unwrap_or_else(|| panic!("no mapping of a file in {directory}: {smaps}"))
}

/// Access mode (`O_RDONLY` or `O_RDWR`) of the descriptor that a process has for the file.
fn open_mode(pid: u32, path: &Path) -> String {
    let descriptors = format!("/proc/{pid}/fd");
    let fd = fs::read_dir(descriptors)
        .unwrap()
        .flatten()
        .find(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == path))
        .unwrap_or_else(|| panic!("process {pid} does not have {} open", path.display()));
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display())).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    match u32::from_str_radix(flags, 8).unwrap() & 3 {
        0 => "O_RDONLY".to_owned(),
        2 => "O_RDWR".to_owned(),
        other => format!("mode {other}"),
    }
}

/// Results of a read and a write: the byte before the write, the byte after the write, the byte in the file afterwards.
type Outcome = (u8, u8, u8);

const PLACE: u64 = 3 * 4096 + 77;

fn byte_in(file: &Path) -> u8 {
    fs::read(file).unwrap()[PLACE as usize]
}

#[test]
fn share_readonly_and_rom_combinations_match_qemu() {
    let _host = host::shared();
    let table = rows(DOCUMENT, "the_twelve_rows");
    assert_eq!(table.len(), 12);
    let mut accepted = 0;
    for row in &table {
        let [share, readonly, rom, open, perms, result] = &row[..] else { panic!("{row:?}") };
        let object = format!("M,size=4M,mem-path={{file}},share={share},readonly={readonly},rom={rom}");
        let files = Files::new(&object);
        let expanded = files.expand(&object);
        let theirs = verdict(&expanded, None);
        let (ours, _) = explain(&expanded, &files, None);
        assert_eq!(theirs.clone().without_hint(), ours.without_hint(), "{object}");
        if perms == "–" {
            assert_eq!(theirs.without_hint(), Verdict::refused(code(result).unwrap()), "{object}");
            continue;
        }
        assert_eq!(theirs, Verdict::Accepted, "{object}");
        accepted += 1;
        let (their_map, their_outcome) = in_qemu(&expanded, &files, open);
        let files = Files::new(&object);
        let (our_map, our_outcome) = in_stencil(&files.expand(&object), &files, open);
        assert_same_mapping(&object, &their_map, &our_map);
        assert_eq!(&our_map.perms, perms, "{object}");
        assert_eq!(
            their_outcome, our_outcome,
            "{object}: byte before a write, after the write, and in the file"
        );
        let (before, after, in_file) = our_outcome;
        match &perms[..] {
            "r--p" | "r--s" => assert_eq!((before, after), (in_file, in_file), "{object}"),
            "rw-p" => assert!(after != before && in_file == before, "{object}: {our_outcome:?}"),
            _ => assert!(after != before && in_file == after, "{object}: {our_outcome:?}"),
        }
    }
    assert_eq!(accepted, 9);
}

fn in_qemu(object: &str, files: &Files, open: &str) -> (Observed, Outcome) {
    let mut guest = Guest::with_memory(object, files.folder.path());
    let before = guest.read(PLACE);
    guest.write(PLACE, !before);
    let after = guest.read(PLACE);
    assert_eq!(open_mode(guest.pid(), &files.path("file")), open, "QEMU: {object}");
    let map = mapping_in_qemu(&guest, files.folder.path(), 4 * MIB);
    (map, (before, after, byte_in(&files.path("file"))))
}

fn in_stencil(object: &str, files: &Files, open: &str) -> (Observed, Outcome) {
    let backend = Backend::from_text(object).unwrap();
    let read = || {
        let mut byte = [0];
        backend.read_at(MemoryOffset::new(PLACE), &mut byte).unwrap();
        byte[0]
    };
    let before = read();
    // `write_at` on ROM returns an error; a store by a guest would raise SIGSEGV, which `backend_memory` tests.
    let written = backend.write_at(MemoryOffset::new(PLACE), &[!before]);
    assert_eq!(written.is_ok(), backend.protection() == stencilfs::memory::Protection::ReadWrite, "{object}");
    let after = read();
    assert_eq!(open_mode(std::process::id(), &files.path("file")), open, "Stencil: {object}");
    let map = observe(backend.address_range().start).unwrap();
    (map, (before, after, byte_in(&files.path("file"))))
}

/// Asserts that permissions, length, offset and VmFlags are the same. Addresses may differ, and also the documented
/// exception: `merge=off` of anonymous memory.
fn assert_same_mapping(object: &str, theirs: &Observed, ours: &Observed) {
    assert_eq!(theirs.perms, ours.perms, "{object}");
    assert_eq!(theirs.offset, ours.offset, "{object}");
    assert_eq!(theirs.end - theirs.start, ours.end - ours.start, "{object}");
    let mut flags = theirs.vm_flags.clone();
    if object.starts_with("memory-backend-ram") && object.contains("merge=off") {
        flags.retain(|flag| flag != "mg");
    }
    assert_eq!(flags, ours.vm_flags, "{object}");
}

#[test]
fn accepted_objects_are_mapped_as_in_qemu() {
    let _host = host::shared();
    for row in rows(DOCUMENT, "accepted_objects") {
        let [object, perms] = &row[..] else { panic!("{row:?}") };
        let object = code(object).unwrap();
        let uid = user_of(object);
        let files = Files::new(object);
        let expanded = files.expand(object);
        let guest = Guest::without_machine(&expanded, uid);
        let size = if object.contains("size=1M") { MIB } else { 4 * MIB };
        let size = if object.contains("size=0.5M") { MIB / 2 } else { size };
        let theirs = mapping_in_qemu(&guest, files.folder.path(), size);
        let their_policy = numa_policy(guest.pid(), theirs.start);
        drop(guest);
        let files = Files::new(object);
        if object.contains("policy") {
            let ours = Backend::from_text(&files.expand(object)).unwrap();
            let our_policy = numa_policy(std::process::id(), ours.address_range().start);
            assert_eq!(our_policy, their_policy, "{object}");
            assert_ne!(our_policy, "default", "{object}");
        }
        let (ours, value) = explain(&files.expand(object), &files, uid);
        assert_eq!(ours, Verdict::Accepted, "{object}");
        let ours: Observed = observed(&value);
        assert_same_mapping(object, &theirs, &ours);
        assert_eq!(&ours.perms, perms, "{object}");
        let copied = if object.contains("prealloc=on") { size } else { 0 };
        for (vmm, map) in [("QEMU", &theirs), ("Stencil", &ours)] {
            assert_eq!(map.anonymous_bytes.get(), copied, "{vmm}: {object}: prealloc must copy every page");
        }
        if object.ends_with("{folder}") {
            for (vmm, map) in [("QEMU", &theirs), ("Stencil", &ours)] {
                let unnamed =
                    map.line.contains("/folder/qemu_back_mem.m.") && map.line.ends_with(" (deleted)");
                assert!(unnamed, "{vmm}: {}", map.line);
            }
            assert_eq!(fs::read_dir(files.path("folder")).unwrap().count(), 0, "{object}");
        }
        if !object.contains("align=") {
            assert!(ours.start.is_multiple_of(2 * MIB), "{object}: the mapping must be aligned to 2 MiB");
        }
    }
}

/// The NUMA memory policy of the mapping that starts at an address.
fn numa_policy(pid: u32, start: u64) -> String {
    let maps = fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    let line = maps.lines().find_map(|line| line.strip_prefix(&format!("{start:x} "))).unwrap();
    let end = line.find(" file=").or(line.find(" anon=")).unwrap_or(line.len());
    line[..end].to_owned()
}

fn observed(value: &Value) -> Observed {
    let map = &value["map"];
    let number = |key: &str| map[key].as_u64().unwrap();
    let bytes = |key: &str| stencilfs::units::Bytes::new(number(key));
    Observed {
        line: map["line"].as_str().unwrap().to_owned(),
        start: number("start"),
        end: number("end"),
        perms: map["perms"].as_str().unwrap().to_owned(),
        offset: number("offset"),
        vm_flags: serde_json::from_value(map["vm_flags"].clone()).unwrap(),
        resident_bytes: bytes("resident_bytes"),
        anonymous_bytes: bytes("anonymous_bytes"),
        pmd_mapped_bytes: bytes("pmd_mapped_bytes"),
    }
}

const TEMPLATING_HINT: &str = "Consider opening the backing store read-only but still creating writable RAM \
    using '-object memory-backend-file,readonly=on,rom=off...' (see \"VM templating\" documentation)";

#[test]
fn refused_objects_have_the_error_texts_of_qemu() {
    let _host = host::shared();
    for row in rows(DOCUMENT, "refused_objects") {
        let [object, text] = &row[..] else { panic!("{row:?}") };
        let object = code(object).unwrap_or("");
        let uid = user_of(object);
        let files = Files::new(object);
        let expanded = files.expand(object);
        let text = files.expand(code(text).unwrap());
        let theirs = verdict(&expanded, uid);
        let files_after = names(&files);
        let (ours, _) = explain(&expanded, &files, uid);
        assert_eq!(theirs.clone().without_hint(), Verdict::refused(&text), "QEMU: {object}");
        assert_eq!(ours.clone().without_hint(), Verdict::refused(&text), "Stencil: {object}");
        // Stencil prints each hint of QEMU. Where QEMU prints none, Stencil may print another hint, but not QEMU's
        // templating hint.
        let hint = |verdict: &Verdict| match verdict {
            Verdict::Refused { hint, .. } => hint.clone(),
            _ => None,
        };
        match hint(&theirs) {
            Some(theirs) => assert_eq!(hint(&ours), Some(theirs), "{object}"),
            None => assert_ne!(hint(&ours).as_deref(), Some(TEMPLATING_HINT), "{object}"),
        }
        let ours_left: Vec<_> = names(&files).into_iter().filter(|n| n != "stencil").collect();
        assert_eq!(ours_left, files_after, "{object}: no other files may be left behind");
    }
}

fn names(files: &Files) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(files.folder.path())
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn the_templating_hint_is_printed_where_qemu_prints_it() {
    let _host = host::shared();
    for (object, printed) in [
        ("M,size=4M,mem-path={denied}", true),
        ("M,size=4M,mem-path={denied},share=on", false),
        ("M,size=4M,mem-path={rofs}", false),
    ] {
        let files = Files::new(object);
        let expanded = files.expand(object);
        let ours = explain(&expanded, &files, user_of(object)).0;
        for (vmm, verdict) in [("QEMU", verdict(&expanded, user_of(object))), ("Stencil", ours)] {
            let Verdict::Refused { hint, .. } = verdict else { panic!("{vmm} accepts {object}") };
            assert_eq!(hint.as_deref() == Some(TEMPLATING_HINT), printed, "{vmm}: {object}: {hint:?}");
        }
    }
}

#[test]
fn differences_from_qemu_are_the_documented_ones() {
    let _host = host::shared();
    for row in rows(DOCUMENT, "where_we_differ") {
        let [object, qemu, stencil] = &row[..] else { panic!("{row:?}") };
        let object = code(object).unwrap();
        let files = Files::new(object);
        let expanded = files.expand(object);
        let theirs = verdict(&expanded, None).without_hint();
        let expected = match (&qemu[..], code(qemu)) {
            ("SIGSEGV", _) => Verdict::Died(libc::SIGSEGV),
            ("SIGABRT", _) => Verdict::Died(libc::SIGABRT),
            (_, Some(text)) => Verdict::refused(text),
            _ => Verdict::Accepted,
        };
        assert_eq!(theirs, expected, "QEMU: {object}");
        let ours = explain(&expanded, &files, None).0.without_hint();
        let expected = code(stencil).map_or(Verdict::Accepted, Verdict::refused);
        assert_eq!(ours, expected, "Stencil: {object}");
    }
}

#[test]
fn accepted_objects_carry_the_documented_notes() {
    for row in rows(DOCUMENT, "notes_of_accepted_objects") {
        let [object, note] = &row[..] else { panic!("{row:?}") };
        let object = code(object).unwrap();
        let files = Files::new(object);
        let (_, value) = explain(&files.expand(object), &files, None);
        let notes: Vec<_> = value["notes"].as_array().unwrap().iter().map(|n| n["name"].clone()).collect();
        let expected: Vec<_> = code(note).into_iter().collect();
        assert_eq!(notes, expected, "{object}");
    }
}

/// Files that QEMU creates have the same length and mode as those of Stencil.
#[test]
fn files_are_created_as_qemu_creates_them() {
    let _host = host::shared();
    for object in ["M,size=4M,mem-path={missing}", "M,size=4M,mem-path={missing},share=on,offset=1M"] {
        let theirs = Files::new(object);
        assert_eq!(verdict(&theirs.expand(object), None), Verdict::Accepted);
        let ours = Files::new(object);
        drop(Backend::create(&Options::parse(&ours.expand(object)).unwrap().plan().unwrap()).unwrap());
        let length_and_mode = |files: &Files| {
            let metadata = File::open(files.path("missing")).unwrap().metadata().unwrap();
            (metadata.len(), metadata.permissions().mode())
        };
        assert_eq!(length_and_mode(&ours), length_and_mode(&theirs), "{object}");
        let trial = Files::new(object);
        explain(&trial.expand(object), &trial, None);
        assert!(!trial.path("missing").exists(), "explain must not create the file");
    }
}

/// The bytes of the file after a backend with `discard-data` has been dropped.
#[test]
fn data_is_discarded_where_qemu_discards_it() {
    let _host = host::shared();
    for (more, discarded) in [
        (",share=on,discard-data=on", true),
        (",share=on", false),
        (",discard-data=on", false),
        (",readonly=on,rom=off,discard-data=on", false),
        (",readonly=on,share=on,discard-data=on", false),
    ] {
        let object = format!("M,size=2M,mem-path={{file}}{more}");
        let (theirs, ours) = (Files::new(&object), Files::new(&object));
        assert_eq!(verdict(&theirs.expand(&object), None), Verdict::Accepted);
        drop(Backend::from_text(&ours.expand(&object)).unwrap());
        let (theirs, ours) = (fs::read(theirs.path("file")).unwrap(), fs::read(ours.path("file")).unwrap());
        assert!(theirs == ours, "{object}");
        assert_eq!(ours[..2 << 20].iter().all(|byte| *byte == 0), discarded, "{object}");
        assert!(ours[2 << 20..].iter().all(|byte| *byte != 0), "{object}: bytes behind the object must stay");
    }
}

/// A template in a mount, served by decode and by passthrough: the same error texts and the same mapping, except for
/// MADV_HUGEPAGE, with which each fault would read 2 MiB.
#[test]
fn on_a_mount_only_the_huge_page_advice_differs() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let content: Vec<u8> = (0..4 * MIB).map(|n| (n / 4096 % 251) as u8 + 1).collect();
        let digest = world.import_bytes(&content, "conformance:1");
        let file = world.file(&digest, "memory");
        let object =
            |more: &str| format!("memory-backend-file,id=m,size=4M,mem-path={}{more}", file.display());
        let files = Files::new("");

        for (more, perms) in
            [(",readonly=on,rom=off", "rw-p"), (",readonly=on", "r--p"), (",readonly=on,share=on", "r--s")]
        {
            let object = object(more);
            let guest = Guest::without_machine(&object, None);
            let theirs = mapping(&guest.smaps(), |line| line.contains(file.to_str().unwrap())).unwrap();
            drop(guest);
            let (verdict, value) = explain(&object, &files, None);
            assert_eq!(verdict, Verdict::Accepted, "{serve}: {object}");
            let ours = observed(&value);
            assert_eq!((&ours.perms[..], ours.offset), (perms, theirs.offset), "{serve}{more}");
            let without: Vec<_> = theirs.vm_flags.iter().filter(|flag| *flag != "hg").cloned().collect();
            assert_ne!(without, theirs.vm_flags, "QEMU must set MADV_HUGEPAGE");
            assert_eq!(ours.vm_flags, without, "{serve}{more}");
            let notes = value["notes"].as_array().unwrap();
            assert!(notes.iter().any(|note| note["name"] == "no-huge-advice"), "{serve}{more}");
        }

        for (more, hint) in [("", true), (",share=on", false), (",rom=off", true)] {
            let object = object(more);
            let theirs = verdict(&object, None);
            let ours = explain(&object, &files, None).0;
            let text =
                format!("can't open backing store {} for guest RAM: Permission denied", file.display());
            for (vmm, verdict) in [("QEMU", theirs), ("Stencil", ours)] {
                assert_eq!(verdict.clone().without_hint(), Verdict::refused(&text), "{serve}: {vmm}{more}");
                let Verdict::Refused { hint: got, .. } = verdict else { unreachable!() };
                assert_eq!(got.as_deref() == Some(TEMPLATING_HINT), hint, "{serve}: {vmm}{more}: {got:?}");
            }
        }
    }
}
