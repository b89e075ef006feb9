//! A real KVM guest goes through the death of servers: it reads every page of its memory, writes every third, and ends
//! by its own HLT; every page is then what it must be.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use kvm_ioctls::VcpuExit;
use stencilfs::memory::{Backend, PageRange};
use stencilfs::units::MemoryOffset;

use crate::support::drill::Drill;
use crate::support::host;
use crate::support::kvm::Guest;
use crate::support::mount::TestMount;
use crate::support::readers::{Image, PAGE};

const IMAGE: Image = Image { salt: 7, pages: 16 << 10 };

/// Where a written page holds what was written.
const WRITTEN: u64 = 0x800;

/// 32-bit code at address 0, which is page 0: for each further page, compares the page's second word with its number,
/// and writes the number's complement into every third. A wrong page's number goes to port 16.
fn program(pages: u32) -> Vec<u8> {
    let mut code = Vec::new();
    code.extend([0xbe, 0x00, 0x10, 0x00, 0x00]); // mov esi, 0x1000
    code.extend([0xbb, 0x01, 0x00, 0x00, 0x00]); // mov ebx, 1
    code.extend([0xbd, 0x03, 0x00, 0x00, 0x00]); // mov ebp, 3
    code.extend([0x39, 0x5e, 0x08]); //       next: cmp [esi+8], ebx
    code.extend([0x75, 0x22]); //                   jne bad
    code.extend([0x4d, 0x75, 0x0f]); //             dec ebp; jnz skip
    code.extend([0xbd, 0x03, 0x00, 0x00, 0x00]); // mov ebp, 3
    code.extend([0x89, 0xd8, 0xf7, 0xd0]); //       mov eax, ebx; not eax
    code.extend([0x89, 0x86, 0x00, 0x08, 0x00, 0x00]); // mov [esi+0x800], eax
    code.extend([0x81, 0xc6, 0x00, 0x10, 0x00, 0x00]); // skip: add esi, 0x1000
    code.extend([0x43, 0x81, 0xfb]); //             inc ebx; cmp ebx, pages
    code.extend(pages.to_le_bytes());
    code.extend([0x72, 0xda, 0xf4]); //             jb next; hlt
    code.extend([0x89, 0xd8, 0x66, 0xba, 0x10, 0x00, 0xef, 0xf4]); // bad: mov eax, ebx; mov dx, 16; out dx, eax; hlt
    code
}

/// The image, with the program for page 0.
fn template() -> Vec<u8> {
    let mut bytes = IMAGE.bytes();
    let code = program(IMAGE.pages as u32);
    bytes[..code.len()].copy_from_slice(&code);
    bytes
}

/// Runs to the guest's own halt.
fn run(guest: &mut Guest) -> Result<(), String> {
    match guest.cpu.run().map_err(|e| format!("KVM_RUN: {e}"))? {
        VcpuExit::Hlt => Ok(()),
        VcpuExit::IoOut(16, page) => Err(format!("the guest read a wrong page: {page:?}")),
        other => Err(format!("the guest left with {other:?}")),
    }
}

/// One guest from its first page to its halt; then every page is compared, and what is private is what it wrote.
fn one_guest(path: &Path, running: &AtomicBool) -> Result<(), String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(|e| e.to_string())?;
    let object = format!(
        "memory-backend-file,id=m,size={},mem-path={},readonly=on,rom=off",
        IMAGE.pages * PAGE,
        path.display()
    );
    let memory = Backend::from_text(&object).map_err(|e| e.to_string())?;
    let mut guest = Guest::new(memory.clone(), &[(0, 0..IMAGE.pages * PAGE)], 0).flat();
    running.store(true, Ordering::SeqCst);
    let end = run(&mut guest);
    running.store(false, Ordering::SeqCst);
    end?;
    let dirty = memory.dirty().map_err(|e| e.to_string())?;
    let dirty: BTreeSet<u64> = dirty.iter().flat_map(PageRange::pages).collect();
    if dirty != (3..IMAGE.pages).step_by(3).collect() {
        return Err(format!("{} pages are private", dirty.len()));
    }
    let mut found = [0; PAGE as usize];
    for page in 1..IMAGE.pages {
        memory.read_at(MemoryOffset::new(page * PAGE), &mut found).map_err(|e| e.to_string())?;
        let mut expected = IMAGE.page(page);
        if page.is_multiple_of(3) {
            let at = WRITTEN as usize;
            expected[at..at + 4].copy_from_slice(&(!page as u32).to_le_bytes());
        }
        if found != expected {
            return Err(format!("page {page} has wrong bytes"));
        }
    }
    Ok(())
}

/// Guests one after the other, in a thread of which nobody waits without a limit.
struct Guests {
    running: Arc<AtomicBool>,
    ended: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    result: mpsc::Receiver<Result<(), String>>,
}

impl Guests {
    fn start(path: PathBuf) -> Guests {
        let (tell, result) = mpsc::channel();
        let [running, over] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let ended = Arc::new(AtomicU64::new(0));
        let guests = Guests { running: running.clone(), ended: ended.clone(), over: over.clone(), result };
        std::thread::spawn(move || {
            let mut end = Ok(());
            while end.is_ok() && !over.load(Ordering::SeqCst) {
                end = one_guest(&path, &running);
                ended.fetch_add(1, Ordering::SeqCst);
            }
            let _ = tell.send(end);
        });
        guests
    }

    /// True while a guest is in `KVM_RUN`, and which one it is.
    fn now(&self) -> (bool, u64) {
        (self.running.load(Ordering::SeqCst), self.ended.load(Ordering::SeqCst))
    }
}

fn kills_under_guests(serve: &str) {
    let _host = host::alone();
    let world = TestMount::new(serve);
    let digest = world.import_bytes(&template(), "guest:1");
    let guests = Guests::start(world.file(&digest, "memory"));
    let mut drill = Drill::new(&world);
    let mut under = 0;
    let wanted = host::rounds(8, 50);
    for round in 0..wanted * 20 {
        // At any moment of a guest's life; what was between two guests does not count.
        std::thread::sleep(Duration::from_micros(1000 + round * 7919 % 40_000));
        if !guests.now().0 {
            continue;
        }
        let before = guests.now();
        drill.kill();
        under += u64::from(before.0 && guests.now() == before);
        if let Ok(end) = guests.result.try_recv() {
            panic!("{serve}: {end:?} after {under} kills");
        }
        if under == wanted {
            break;
        }
    }
    guests.over.store(true, Ordering::SeqCst);
    let end = guests.result.recv_timeout(Duration::from_secs(30)).expect("the last guest halts");
    end.unwrap_or_else(|error| panic!("{serve}: {error}"));
    drill.report(&format!("KVM guests, {serve}"), &[]);
    println!("{serve}: {under} kills inside KVM_RUN, {} guests halted", guests.now().1);
    assert!(under >= wanted, "{serve}: only {under} of {} kills met a guest in KVM_RUN", drill.kills().len());
}

#[test]
fn guests_halt_and_every_page_compares_by_decode() {
    kills_under_guests("decode");
}

#[test]
fn guests_halt_and_every_page_compares_by_passthrough() {
    kills_under_guests("passthrough");
}
