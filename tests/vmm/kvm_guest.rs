//! A KVM guest whose RAM is a memory backend: real-mode code reads some pages and writes others; afterwards exactly the
//! written pages are private.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bindings::KVM_MEM_READONLY;
use kvm_ioctls::VcpuExit;
use stencilfs::memory::{Backend, PageRange, Role, page_ranges};
use stencilfs::sys::memory::pagemap::Pagemap;
use stencilfs::units::{MemoryOffset, PAGE_SIZE};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::kvm::Guest;

const SIZE: u64 = 16 << 20;

/// Guest-physical address of a second window of the memory, which starts at `WINDOW_MEMORY` of the backend.
const WINDOW_GUEST: u64 = 0x8_0000;
const WINDOW_MEMORY: u64 = 8 << 20;
const WINDOW_PAGES: u64 = 64;

/// Guest addresses of the two page lists, whose entries are 16-bit segments; the code is at address 0.
const READ_LIST: u16 = 0x400;
const WRITE_LIST: u16 = 0x800;

/// Real-mode code that loads one byte of each segment in the read list, stores one byte to each in the write list, and
/// halts.
fn program(reads: u16, writes: u16) -> Vec<u8> {
    let mut code = vec![0xfc]; // cld
    for (list, count, access) in
        [(READ_LIST, reads, [0x26, 0x8a, 0x15]), (WRITE_LIST, writes, [0x26, 0x88, 0x0d])]
    {
        code.push(0xbe); // mov si, list
        code.extend(list.to_le_bytes());
        code.push(0xb9); // mov cx, count
        code.extend(count.to_le_bytes());
        code.extend([0xe3, 0x08]); // jcxz past the loop
        code.push(0xad); // lodsw
        code.extend([0x8e, 0xc0]); // mov es, ax
        code.extend(access); // mov dl, [es:di] or mov [es:di], cl
        code.extend([0xe2, 0xf8]); // loop
    }
    code.push(0xf4); // hlt
    code
}

/// Writes a template that contains the program, and a pattern everywhere else.
pub fn write_template(path: &Path, reads: &[u16], writes: &[u16]) {
    let mut file = File::create(path).unwrap();
    for page in 0..SIZE / PAGE_SIZE {
        file.write_all(&[(page % 251) as u8 + 1; PAGE_SIZE as usize]).unwrap();
    }
    file.write_all_at(&program(reads.len() as u16, writes.len() as u16), 0).unwrap();
    for (list, segments) in [(READ_LIST, reads), (WRITE_LIST, writes)] {
        let bytes: Vec<u8> = segments.iter().flat_map(|s| s.to_le_bytes()).collect();
        file.write_all_at(&bytes, u64::from(list)).unwrap();
    }
}

/// Writes a program into the guest's copy of the first page.
pub fn set_program(memory: &Backend, reads: &[u16]) {
    memory.write_at(MemoryOffset::new(0), &program(reads.len() as u16, 0)).unwrap();
    let list: Vec<u8> = reads.iter().flat_map(|s| s.to_le_bytes()).collect();
    memory.write_at(MemoryOffset::new(READ_LIST.into()), &list).unwrap();
}

/// A guest with 1 MiB of guest-physical memory: the start of the backend, and from `WINDOW_GUEST` on its pages at 8
/// MiB.
pub struct Machine(Guest);

impl Machine {
    pub fn new(memory: Backend, flags: u32) -> Machine {
        let window = WINDOW_MEMORY..WINDOW_MEMORY + WINDOW_PAGES * PAGE_SIZE;
        Machine(Guest::new(memory, &[(0, 0..WINDOW_GUEST), (WINDOW_GUEST, window)], flags))
    }

    /// Number of pages of the read list that the guest has started to read.
    pub fn reads_started(&self) -> usize {
        usize::from(self.0.cpu.get_regs().unwrap().rsi as u16 - READ_LIST) / 2
    }

    /// Runs until an access to a page of guest memory fails. KVM_RUN then returns EFAULT; if KVM emulates the
    /// instruction, KVM_RUN exits with MMIO instead, as for an address without memory. Returns the address of such an
    /// exit.
    pub fn run_to_lost_page(&mut self) -> Option<u64> {
        match self.0.cpu.run() {
            Err(error) => {
                assert_eq!(error.errno(), libc::EFAULT, "KVM_RUN: {error}");
                None
            }
            Ok(VcpuExit::MmioRead(address, _)) => Some(address),
            Ok(other) => panic!("unexpected exit of the guest: {other:?}"),
        }
    }

    /// Runs until HLT and returns the number of writes that exited as MMIO.
    pub fn run(&mut self) -> Result<usize, kvm_ioctls::Error> {
        let mut mmio_writes = 0;
        loop {
            match self.0.cpu.run()? {
                VcpuExit::Hlt => return Ok(mmio_writes),
                VcpuExit::MmioWrite(..) => mmio_writes += 1,
                other => panic!("unexpected exit of the guest: {other:?}"),
            }
        }
    }
}

/// Returns `count` different pages of guest memory without those in `except` and without the page with the code: as
/// segments, and as page numbers of the backend.
pub fn scattered(count: usize, seed: u64, except: &[u64]) -> (Vec<u16>, Vec<u64>) {
    let mut state = seed;
    let mut segments = Vec::new();
    let mut pages = Vec::new();
    let first_window = WINDOW_GUEST / PAGE_SIZE;
    while pages.len() < count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let guest = 1 + (state >> 33) % (first_window + WINDOW_PAGES - 1);
        let page = match guest.checked_sub(first_window) {
            Some(in_window) => WINDOW_MEMORY / PAGE_SIZE + in_window,
            None => guest,
        };
        if !except.contains(&page) && !pages.contains(&page) {
            pages.push(page);
            segments.push((guest * PAGE_SIZE / 16) as u16);
        }
    }
    (segments, pages)
}

fn pages_of(ranges: &[PageRange]) -> BTreeSet<u64> {
    ranges.iter().flat_map(PageRange::pages).collect()
}

/// The dirty pages as reported by the backend itself, and as read from `/proc/PID/pagemap`.
fn both_views(memory: &Backend) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let inside = memory.dirty().unwrap();
    let outside = Pagemap::open(std::process::id()).unwrap();
    let outside = page_ranges(&outside, memory.address_range()).unwrap();
    (pages_of(&inside), pages_of(&outside))
}

/// Runs a guest on a template, and asserts that exactly the pages in `writes` are private and contain the written
/// bytes.
pub fn writes_exactly(template: &Path, extra: &str, writes: &[u64]) {
    let object = format!(
        "memory-backend-file,id=m,size=16M,mem-path={},readonly=on,rom=off{extra}",
        template.display()
    );
    let memory = Backend::from_text(&object).unwrap();
    assert_eq!(memory.role(), Role::Template);
    let mut machine = Machine::new(memory.clone(), 0);
    assert_eq!(machine.run().unwrap(), 0);
    let expected = BTreeSet::from_iter(writes.iter().copied());
    let (inside, outside) = both_views(&memory);
    assert_eq!(inside, expected, "{} writes{extra}", writes.len());
    assert_eq!(outside, inside);
    for (n, &page) in writes.iter().enumerate() {
        let mut bytes = [0; 2];
        memory.read_at(MemoryOffset::new(page * PAGE_SIZE), &mut bytes).unwrap();
        // The guest stores the loop counter; the next byte is still that of the template.
        assert_eq!(bytes, [(writes.len() - n) as u8, (page % 251) as u8 + 1], "page {page}");
    }
    // The VM is dropped before its memory, and the dirty pages must stay the same.
    drop(machine);
    assert_eq!(pages_of(&memory.dirty().unwrap()), expected);
}

#[test]
fn exactly_the_pages_that_a_kvm_guest_wrote_are_private() {
    let _host = host::shared();
    let directory = tempfile::tempdir().unwrap();
    for (count, extra) in
        [(0, ""), (1, ""), (100, ""), (100, ",prefault=on"), (150, ",reserve=off,merge=off")]
    {
        let (write_list, writes) = scattered(count, 42 + count as u64, &[]);
        let (read_list, _) = scattered(40, 7, &writes);
        let template = directory.path().join(format!("template-{count}"));
        write_template(&template, &read_list, &write_list);
        let before = std::fs::read(&template).unwrap();
        writes_exactly(&template, extra, &writes);
        assert!(std::fs::read(&template).unwrap() == before, "the template must not change");
    }
}

#[test]
fn two_guests_of_one_template_are_isolated() {
    let _host = host::shared();
    let directory = tempfile::tempdir().unwrap();
    let template = directory.path().join("template");
    let (list, writes) = scattered(80, 3, &[]);
    write_template(&template, &[], &list);
    let object = format!(
        "memory-backend-file,id=m,size=16M,mem-path={},readonly=on,rom=off,reserve=off",
        template.display()
    );
    let (one, two) = (Backend::from_text(&object).unwrap(), Backend::from_text(&object).unwrap());
    Machine::new(one.clone(), 0).run().unwrap();
    let writes = BTreeSet::from_iter(writes);
    assert_eq!(pages_of(&one.dirty().unwrap()), writes);
    assert!(two.dirty().unwrap().is_empty());
    Machine::new(two.clone(), 0).run().unwrap();
    assert_eq!(pages_of(&two.dirty().unwrap()), writes);
}

#[test]
fn guest_writes_to_rom_exit_as_mmio_and_copy_nothing() {
    let _host = host::shared();
    let directory = tempfile::tempdir().unwrap();
    let template = directory.path().join("rom");
    let (list, writes) = scattered(60, 11, &[]);
    write_template(&template, &[], &list);
    let object = format!("memory-backend-file,id=m,size=16M,mem-path={},readonly=on", template.display());
    let rom = Backend::from_text(&object).unwrap();
    assert_eq!(rom.role(), Role::Rom);
    let mut machine = Machine::new(rom.clone(), KVM_MEM_READONLY);
    assert_eq!(machine.run().unwrap(), writes.len(), "every write must exit as MMIO");
    assert_eq!(both_views(&rom), (BTreeSet::new(), BTreeSet::new()));
    // Same without KVM_MEM_READONLY: the protection of the mapping decides.
    drop(machine);
    assert_eq!(Machine::new(rom.clone(), 0).run().unwrap(), writes.len());
    assert_eq!(both_views(&rom), (BTreeSet::new(), BTreeSet::new()));
}

/// The same guest on templates in a mount; `stencil dirty` inspects it from outside.
#[test]
fn dirty_reports_exactly_the_pages_a_kvm_guest_wrote() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let (write_list, writes) = scattered(120, 19, &[]);
        let (read_list, _) = scattered(60, 23, &writes);
        let source = world.dir().join("source");
        write_template(&source, &read_list, &write_list);
        let digest = world.import(&source, "guest:1");
        let file = world.file(&digest, "memory");
        for extra in ["", ",reserve=off", ",prefault=on"] {
            writes_exactly(&file, extra, &writes);
        }

        let object =
            format!("memory-backend-file,id=m,size=16M,mem-path={},readonly=on,rom=off", file.display());
        let memory = Backend::from_text(&object).unwrap();
        let mut machine = Machine::new(memory.clone(), 0);
        machine.run().unwrap();
        let report = world.json(&["dirty", &std::process::id().to_string(), "--ranges"]);
        let ranges = report["ranges"].as_array().unwrap();
        let reported: BTreeSet<u64> = ranges
            .iter()
            .map(|r| (r["first_page"].as_u64().unwrap(), r["pages"].as_u64().unwrap()))
            .flat_map(|(first, pages)| first..first + pages)
            .collect();
        assert_eq!(reported, BTreeSet::from_iter(writes.iter().copied()), "{serve}");
        assert!(
            std::fs::read(&file).unwrap() == std::fs::read(&source).unwrap(),
            "{serve}: the template must not change"
        );

        let rom =
            format!("memory-backend-file,id=m,size=16M,mem-path={},readonly=on,share=on", file.display());
        let rom = Backend::from_text(&rom).unwrap();
        assert_eq!(Machine::new(rom.clone(), KVM_MEM_READONLY).run().unwrap(), writes.len(), "{serve}");
        assert!(rom.dirty().unwrap().is_empty());
    }
}
