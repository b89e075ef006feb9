//! Memory backends through their public API: handles, dirty pages, ROM, damaged and unsuitable files.

mod zero_runs;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use stencilfs::error::Code;
use stencilfs::memory::{Backend, PageRange, Protection, Role, Sharing, observe};
use stencilfs::units::{Bytes, FileOffset, HUGE_PAGE_SIZE, MemoryOffset, PAGE_SIZE, PageIndex};

use crate::support::daemon::passing::Mounted;
use crate::support::host;
use crate::support::mount::{TestMount, run};

/// Creates a file of `bytes` bytes without a zero page, and returns its path.
pub fn template(dir: &Path, bytes: u64) -> PathBuf {
    let path = dir.join("template");
    let mut file = File::create(&path).unwrap();
    for page in 0..bytes / PAGE_SIZE {
        file.write_all(&[(page % 251) as u8 + 1; PAGE_SIZE as usize]).unwrap();
    }
    path
}

fn object(path: &Path, size: u64, options: &str) -> String {
    format!("memory-backend-file,id=m,size={size},mem-path={},readonly=on{options}", path.display())
}

pub fn pages_of(ranges: &[PageRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(PageRange::pages).collect()
}

/// A linear congruential generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn dirty_pages_of_random_accesses_are_exact() {
    let dir = tempfile::tempdir().unwrap();
    let size = 32 << 20;
    let path = template(dir.path(), size);
    for (seed, options) in
        [(1, ",rom=off"), (2, ",rom=off,prefault=on"), (3, ",rom=off,reserve=off,offset=1M")]
    {
        let size = if options.contains("offset") { size - (1 << 20) } else { size };
        let memory = Backend::from_text(&object(&path, size, options)).unwrap();
        let mut random = Random(seed);
        let mut written = BTreeSet::new();
        for round in 0..10 {
            for _ in 0..200 {
                let page = random.below(size / PAGE_SIZE);
                match random.below(4) {
                    0 => drop(memory.touch(PageIndex::new(page)).unwrap()),
                    1 => {
                        let at = page * PAGE_SIZE + random.below(PAGE_SIZE);
                        memory.poke(MemoryOffset::new(at), 0).unwrap();
                        written.insert(page);
                    }
                    2 => {
                        let at = page * PAGE_SIZE + random.below(PAGE_SIZE);
                        let length = random.below(3 * PAGE_SIZE).min(size - at);
                        memory.write_at(MemoryOffset::new(at), &vec![7; length as usize]).unwrap();
                        if length > 0 {
                            written.extend(page..=(at + length - 1) / PAGE_SIZE);
                        }
                    }
                    _ => {
                        let at = page * PAGE_SIZE;
                        let mut bytes = vec![0; random.below(3 * PAGE_SIZE).min(size - at) as usize];
                        memory.read_at(MemoryOffset::new(at), &mut bytes).unwrap();
                    }
                }
            }
            assert_eq!(pages_of(&memory.dirty().unwrap()), written, "round {round}{options}");
        }
    }
}

#[test]
fn a_handle_describes_its_mapping_and_the_last_one_unmaps() {
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path(), 4 << 20);
    let memory = Backend::from_text(&object(&path, 1 << 20, ",rom=off,offset=2M,reserve=off")).unwrap();
    assert_eq!(memory.len(), Bytes::new(1 << 20));
    assert_eq!(memory.file_offset(), FileOffset::new(2 << 20));
    assert_eq!((memory.protection(), memory.sharing()), (Protection::ReadWrite, Sharing::Private));
    assert_eq!(memory.flags(), libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    assert_eq!(memory.role(), Role::Template);
    assert!((memory.as_ptr() as u64).is_multiple_of(HUGE_PAGE_SIZE));
    let metadata = File::from(memory.fd().unwrap().try_clone_to_owned().unwrap()).metadata().unwrap();
    assert_eq!(metadata.len(), 4 << 20);
    let range = memory.address_range();
    let region = memory.clone();
    drop(memory);
    assert_eq!(region.touch(PageIndex::new(3)).unwrap(), ((512 + 3) % 251) as u8 + 1);
    let is_mapped = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.contains(path.to_str().unwrap())
    };
    assert!(is_mapped());
    drop(region);
    assert!(!is_mapped(), "{range:x?} is still mapped after the last handle was dropped");
}

#[test]
fn ram_objects_map_anonymous_or_shared_memory() {
    for (options, sharing, flags) in [
        ("", Sharing::Private, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        (",share=on", Sharing::Shared, libc::MAP_SHARED),
    ] {
        let memory = Backend::from_text(&format!("memory-backend-ram,id=r,size=10000{options}")).unwrap();
        assert_eq!(memory.len(), Bytes::new(3 * PAGE_SIZE), "the size is rounded up to pages, as in QEMU");
        assert_eq!((memory.sharing(), memory.flags()), (sharing, flags));
        assert_eq!(memory.fd().is_some(), sharing == Sharing::Shared);
        memory.write_at(MemoryOffset::new(5000), b"x").unwrap();
        assert_eq!(memory.touch(PageIndex::new(1)).unwrap(), 0);
    }
}

#[test]
fn access_beyond_the_end_is_a_usage_error() {
    let memory = Backend::from_text("memory-backend-ram,id=r,size=64k").unwrap();
    let mut byte = [0];
    assert_eq!(memory.read_at(MemoryOffset::new(65536), &mut byte).unwrap_err().code(), Code::Usage);
    assert_eq!(memory.write_at(MemoryOffset::new(u64::MAX), &byte).unwrap_err().code(), Code::Usage);
    assert_eq!(memory.touch(PageIndex::new(16)).unwrap_err().code(), Code::Usage);
    assert_eq!(memory.touch(PageIndex::new(u64::MAX)).unwrap_err().code(), Code::Usage);
    assert_eq!(memory.poke(MemoryOffset::new(65536), 1).unwrap_err().code(), Code::Usage);
    memory.read_at(MemoryOffset::new(65535), &mut byte).unwrap();
    memory.read_at(MemoryOffset::new(65536), &mut []).unwrap();
}

#[test]
fn read_at_fails_beyond_the_end_of_a_truncated_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path(), 1 << 20);
    let memory = Backend::from_text(&object(&path, 1 << 20, ",rom=off")).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(64 << 10).unwrap();
    let mut bytes = vec![0; 8192];
    memory.read_at(MemoryOffset::new(0), &mut bytes).unwrap();
    assert_eq!(memory.read_at(MemoryOffset::new(512 << 10), &mut bytes).unwrap_err().code(), Code::Failed);
    assert!(memory.write_at(MemoryOffset::new(512 << 10), &bytes).is_err());
    let remaining = Backend::from_text(&object(&path, 64 << 10, ",rom=off,prefault=on,offset=0"));
    assert!(remaining.is_ok());
}

#[test]
fn read_at_fails_only_in_the_damaged_block_of_a_template() {
    use std::os::unix::fs::FileExt;
    let _host = host::shared();
    let world = TestMount::new("decode");
    let mut content = vec![0; 4 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    let digest = world.import_bytes(&content, "damaged:1");
    for pack in fs::read_dir(world.store_dir().join("packs")).unwrap().flatten() {
        let pack = File::options().read(true).write(true).open(pack.path()).unwrap();
        let (mut byte, middle) = ([0], pack.metadata().unwrap().len() / 2);
        pack.read_exact_at(&mut byte, middle).unwrap();
        pack.write_all_at(&[!byte[0]], middle).unwrap();
        pack.sync_all().unwrap();
    }
    let path = world.file(&digest, "memory");
    let memory = Backend::from_text(&object(&path, 4 << 20, ",rom=off")).unwrap();
    let mut damaged = 0;
    for (n, wanted) in content.chunks(64 << 10).enumerate() {
        let mut block = vec![0; wanted.len()];
        match memory.read_at(MemoryOffset::new(n as u64 * (64 << 10)), &mut block) {
            Ok(()) => assert!(block == wanted, "block {n}"),
            Err(error) => {
                assert_eq!(error.code(), Code::Failed);
                assert!(error.hint_text().unwrap().contains("stencil verify"));
                damaged += 1;
            }
        }
    }
    assert_eq!(damaged, 1, "damaged blocks");
    assert!(memory.dirty().unwrap().is_empty());
    let error = Backend::from_text(&object(&path, 4 << 20, ",rom=off,prefault=on")).unwrap_err();
    assert!(error.message().starts_with("cannot read every page of the backing store"), "{error}");
}

#[test]
fn refuses_a_fifo_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = Backend::from_text(&object(&path, 1 << 20, "")).unwrap_err();
    assert_eq!(error.message(), "unable to map backing store for guest RAM: No such device");
}

#[test]
fn a_failed_backend_does_not_create_or_modify_files() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    File::create(&empty).unwrap();
    let missing = dir.path().join("missing");
    for (path, invalid) in [(&empty, "policy=bind"), (&missing, "policy=bind"), (&missing, "align=12k")] {
        let object = format!("memory-backend-file,id=m,size=1M,mem-path={},{invalid}", path.display());
        assert!(Backend::from_text(&object).is_err());
        assert!(!missing.exists());
        assert_eq!(empty.metadata().unwrap().len(), 0);
    }
}

#[test]
fn discard_data_punches_the_file_when_the_last_handle_drops() {
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path(), 1 << 20);
    let object =
        format!("memory-backend-file,id=m,size=512k,mem-path={},share=on,discard-data=on", path.display());
    let memory = Backend::from_text(&object).unwrap();
    let second = memory.clone();
    drop(memory);
    assert_ne!(fs::read(&path).unwrap()[0], 0);
    drop(second);
    let left = fs::read(&path).unwrap();
    assert!(left[..512 << 10].iter().all(|b| *b == 0) && left[512 << 10..].iter().all(|b| *b != 0));
}

#[test]
fn copy_on_write_of_2_mib_mappings_copies_4_kib_pages() {
    let _host = host::shared();
    let dir = tempfile::tempdir().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "huge=always,size=64M", "none", dir.path().to_str().unwrap()]);
    let _mounted = Mounted(dir.path().to_owned());
    let size = 16 << 20;
    let path = template(dir.path(), size);
    let mut memory = None;
    host::measured(|| {
        host::compact_memory();
        drop(memory.take());
        template(dir.path(), size);
        let prefaulted = Backend::from_text(&object(&path, size, ",rom=off,prefault=on")).unwrap();
        let mapped = observe(prefaulted.address_range().start).unwrap().pmd_mapped_bytes.get();
        memory = Some(prefaulted);
        // The default alignment allows every 2 MiB to be mapped by a PMD.
        if mapped == size { Ok(()) } else { Err(format!("{mapped} of {size} bytes are mapped by PMDs")) }
    });
    let memory = memory.unwrap();
    let mapped = || observe(memory.address_range().start).unwrap().pmd_mapped_bytes.get();
    assert!(memory.dirty().unwrap().is_empty());
    // Two pages of the first 2 MiB, and one on each side of the border between the fourth and the fifth.
    let written = BTreeSet::from([0, 77, 4 * 512 - 1, 4 * 512]);
    for page in &written {
        memory.poke(MemoryOffset::new(page * PAGE_SIZE + 9), 0).unwrap();
    }
    assert_eq!(pages_of(&memory.dirty().unwrap()), written);
    assert_eq!(mapped(), size - 3 * HUGE_PAGE_SIZE, "each write splits the PMD mapping of its 2 MiB");
    assert_eq!(memory.touch(PageIndex::new(78)).unwrap(), 79);
}

/// Set in the child process of the test below, which is killed by SIGSEGV.
const ROM_CHILD: &str = "STENCIL_TEST_ROM_CHILD";

#[test]
fn writes_to_rom_raise_sigsegv_and_copy_no_page() {
    if let Some(path) = std::env::var_os(ROM_CHILD) {
        store_to_rom(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = template(dir.path(), 1 << 20);
    let before = fs::read(&path).unwrap();
    for options in ["", ",share=on", ",rom=on"] {
        let rom = Backend::from_text(&object(&path, 1 << 20, options)).unwrap();
        assert_eq!(rom.role(), Role::Rom);
        assert_eq!(rom.write_at(MemoryOffset::new(4096), &[0; 64]).unwrap_err().code(), Code::Failed);
        assert!(rom.dirty().unwrap().is_empty());
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "vmm::backend_memory::writes_to_rom_raise_sigsegv_and_copy_no_page"])
        .env(ROM_CHILD, &path)
        .output()
        .unwrap()
        .status;
    assert_eq!(status.signal(), Some(libc::SIGSEGV));
    assert!(fs::read(&path).unwrap() == before);
}

fn store_to_rom(path: &Path) -> ! {
    let rom = Backend::from_text(&object(path, 1 << 20, "")).unwrap();
    rom.touch(PageIndex::new(5)).unwrap();
    assert!(rom.dirty().unwrap().is_empty());
    rom.poke(MemoryOffset::new(5 * PAGE_SIZE), 1).unwrap();
    panic!("the write to ROM succeeded");
}
