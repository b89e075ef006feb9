//! One damaged block in a template that is in use: only accesses to pages of that block fail.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use stencilfs::memory::Backend;
use stencilfs::store::{BLOCK_SIZE, Store};

use crate::support::actor::Actor;
use crate::support::daemon::passing::SetOnDrop;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::damage_one;
use crate::vmm::kvm_guest::{Machine, set_program, write_template};

const PAGE: u64 = 4096;
const IN_BLOCK: u64 = BLOCK_SIZE / PAGE;
/// The guest's second window starts at this page. Pages below have the same address in the guest as in the memory file.
const LOW: u64 = 0x80;

fn segments(pages: impl Iterator<Item = u64>) -> Vec<u16> {
    pages.map(|page| (page * PAGE / 16) as u16).collect()
}

#[test]
fn a_damaged_block_fails_only_the_guests_that_touch_it() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let source = world.dir().join("source");
    write_template(&source, &[], &[]);
    let digest = world.import(&source, "guest:1");
    // Pages below LOW, but not the block with the guest's code.
    let (block, id) = damage_one(&world.store_dir(), &digest, 1..LOW / IN_BLOCK - 1);
    let bytes = fs::read(&source).unwrap();
    let lost = block * IN_BLOCK..(block + 1) * IN_BLOCK;
    let file = world.file(&digest, "memory");
    let object = format!("memory-backend-file,id=m,size=16M,mem-path={},readonly=on,rom=off", file.display());
    let machine = |pages: &[u16]| {
        let memory = Backend::from_text(&object).unwrap();
        set_program(&memory, pages);
        Machine::new(memory, 0)
    };
    let good = segments((1..LOW).filter(|p| !lost.contains(p)));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ends = SetOnDrop(&stop);
        // Guests and clones that do not access the block must run without errors during the whole test.
        let guest = scope.spawn(|| {
            let mut runs = 0;
            while !stop.load(Ordering::Relaxed) || runs == 0 {
                let mut machine = machine(&good);
                assert_eq!(machine.run().expect("a guest that does not access the damaged block"), 0);
                runs += 1;
            }
            runs
        });
        let clone = scope.spawn(|| {
            let mut clone = Actor::start();
            clone.tell(&format!("map 0 {} 0 {} rw", file.display(), bytes.len()));
            for page in (0..bytes.len() as u64 / PAGE).filter(|p| !lost.contains(p)) {
                assert_eq!(
                    clone.tell(&format!("read 0 {page}")) as u8,
                    bytes[(page * PAGE) as usize],
                    "{page}"
                );
            }
        });
        let mut refused = 0;
        for page in lost.clone() {
            // Neighbours of the block first, so that the position in the list tells which page failed.
            let list = segments([lost.start - 1, lost.end, page, 1].into_iter());
            let mut machine = machine(&list);
            if let Some(address) = machine.run_to_lost_page() {
                assert_eq!(address / PAGE, page);
            }
            assert_eq!(machine.reads_started(), 3, "KVM_RUN must fail on page {page}");
            refused += 1;
        }
        assert_eq!(refused, IN_BLOCK);
        for page in [lost.start, lost.end - 1] {
            let mut clone = Actor::start();
            clone.tell(&format!("map 0 {} 0 {} rw", file.display(), bytes.len()));
            assert_eq!(clone.dies_of(&format!("read 0 {page}")), Some(libc::SIGBUS), "page {page}");
        }
        drop(ends);
        clone.join().expect("a clone that does not access the damaged block");
        println!(
            "{refused} guests failed; {} runs of a guest that does not access the block succeeded",
            guest.join().expect("guests that do not access the damaged block")
        );
    });
    assert!(world.counter("damaged") >= IN_BLOCK + 2);
    assert_eq!(world.counter("source_waits"), 0, "a damaged block must not be waited for");
    let log = world.log();
    let lines: Vec<&str> = log.lines().filter(|l| l.contains(" ERROR ")).collect();
    assert_eq!(lines.len(), 1, "the damaged block must be logged once:\n{log}");
    for text in [&digest, "file memory", &format!("offset {}:", block * BLOCK_SIZE), &format!("digest {id}")]
    {
        assert!(lines[0].contains(text), "'{text}' is not in: {}", lines[0]);
    }
    assert_eq!(world.status()["restarts"], 0);
}

/// A missing pack in a store that is present is damage: the read fails with EIO at once, unlike in a store outage.
#[test]
fn reads_from_a_missing_pack_fail_without_waiting() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&vec![7; 1 << 20], "web:1");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    for pack in Store::open(&world.store_dir()).unwrap().pack_files().unwrap() {
        fs::remove_file(pack).unwrap();
    }
    let started = std::time::Instant::now();
    let error = file.read_exact_at(&mut [0; PAGE as usize], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(started.elapsed() < std::time::Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(world.log().contains("pack is damaged: the file is missing"), "{}", world.log());
    assert_eq!((world.counter("source_waits"), world.counter("source_outages")), (0, 0));
}
