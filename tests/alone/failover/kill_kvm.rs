//! KVM guests while servers are killed: each guest reads every page of its memory, writes every third one and executes
//! HLT; then every page is compared.

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

use crate::support::daemon::drill::Drill;
use crate::support::daemon::readers::{Image, PAGE};
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::vm::kvm::Guest;

const IMAGE: Image = Image { salt: 7, pages: 16 << 10 };

/// Offset of the written word in a page, in bytes.
const WRITTEN_OFFSET: u64 = 0x800;

/// Returns 32-bit code for address 0, in page 0. For each further page, the code compares the second 64-bit word of the
/// page with the page number, and writes the complement of the number into every third page. The code writes the number
/// of a wrong page to port 16.
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

/// Returns the image with the program in page 0.
fn template() -> Vec<u8> {
    let mut bytes = IMAGE.bytes();
    let code = program(IMAGE.pages as u32);
    bytes[..code.len()].copy_from_slice(&code);
    bytes
}

/// Runs the guest until it halts.
fn run(guest: &mut Guest) -> Result<(), String> {
    match guest.cpu.run().map_err(|e| format!("KVM_RUN: {e}"))? {
        VcpuExit::Hlt => Ok(()),
        VcpuExit::IoOut(16, page) => Err(format!("the guest read a wrong page: {page:?}")),
        other => Err(format!("unexpected KVM exit {other:?}")),
    }
}

/// Runs one guest until it halts, then compares every page, and the copied pages with the written ones.
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
    let result = run(&mut guest);
    running.store(false, Ordering::SeqCst);
    result?;
    let dirty = memory.dirty().map_err(|e| e.to_string())?;
    let dirty: BTreeSet<u64> = dirty.iter().flat_map(PageRange::pages).collect();
    if dirty != (3..IMAGE.pages).step_by(3).collect() {
        return Err(format!("{} pages are dirty, expected every third page", dirty.len()));
    }
    let mut found = [0; PAGE as usize];
    for page in 1..IMAGE.pages {
        memory.read_at(MemoryOffset::new(page * PAGE), &mut found).map_err(|e| e.to_string())?;
        let mut expected = IMAGE.page(page);
        if page.is_multiple_of(3) {
            let at = WRITTEN_OFFSET as usize;
            expected[at..at + 4].copy_from_slice(&(!page as u32).to_le_bytes());
        }
        if found != expected {
            return Err(format!("page {page} has wrong bytes"));
        }
    }
    Ok(())
}

/// Runs guests one after the other in a thread, which is never joined: a guest that hangs must not block the test.
struct Guests {
    /// True while a guest is in `KVM_RUN`.
    running: Arc<AtomicBool>,
    /// Number of guests that have halted or failed.
    ended: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    result: mpsc::Receiver<Result<(), String>>,
}

impl Guests {
    fn start(path: PathBuf) -> Guests {
        let (sender, result) = mpsc::channel();
        let [running, done] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let ended = Arc::new(AtomicU64::new(0));
        let guests = Guests { running: running.clone(), ended: ended.clone(), done: done.clone(), result };
        std::thread::spawn(move || {
            let mut last = Ok(());
            while last.is_ok() && !done.load(Ordering::SeqCst) {
                last = one_guest(&path, &running);
                ended.fetch_add(1, Ordering::SeqCst);
            }
            let _ = sender.send(last);
        });
        guests
    }

    /// Returns whether a guest is in `KVM_RUN`, and the number of guests before it.
    fn current(&self) -> (bool, u64) {
        (self.running.load(Ordering::SeqCst), self.ended.load(Ordering::SeqCst))
    }
}

fn kill_under_guests(serve: &str) {
    let _host = host::alone();
    let world = TestMount::new(serve);
    let digest = world.import_bytes(&template(), "guest:1");
    world.wait_until_verified(&digest);
    let guests = Guests::start(world.file(&digest, "memory"));
    let mut drill = Drill::new(&world);
    let mut in_kvm_run = 0;
    let wanted = host::rounds(8, 50);
    for round in 0..wanted * 20 {
        // The kills come at various moments in the life of a guest. A kill between two guests does not count.
        std::thread::sleep(Duration::from_micros(1000 + round * 7919 % 40_000));
        if !guests.current().0 {
            continue;
        }
        // A server that dies before it serves is restarted after a pause.
        wait_for("a server that serves", || world.status()["server_version"].as_str().map(drop));
        let before = guests.current();
        drill.kill();
        in_kvm_run += u64::from(before.0 && guests.current() == before);
        if let Ok(result) = guests.result.try_recv() {
            panic!("{serve}: {result:?} after {in_kvm_run} kills");
        }
        if in_kvm_run == wanted {
            break;
        }
    }
    guests.done.store(true, Ordering::SeqCst);
    let result =
        guests.result.recv_timeout(Duration::from_secs(30)).expect("the last guest halts within 30 s");
    result.unwrap_or_else(|error| panic!("{serve}: {error}"));
    drill.report(&format!("KVM guests, {serve}"), &[]);
    println!("{serve}: {in_kvm_run} kills inside KVM_RUN, {} guests halted", guests.current().1);
    assert!(
        in_kvm_run >= wanted,
        "{serve}: only {in_kvm_run} of {} kills hit a guest in KVM_RUN",
        drill.kills().len()
    );
}

#[test]
fn kvm_guests_survive_server_kills_by_decode() {
    kill_under_guests("decode");
}

#[test]
fn kvm_guests_survive_server_kills_by_passthrough() {
    kill_under_guests("passthrough");
}

#[test]
fn kvm_guests_survive_server_kills_by_kernel_decode() {
    kill_under_guests("kernel");
}
