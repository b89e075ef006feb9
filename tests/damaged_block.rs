//! One damaged block of a template that is in use: whoever needs a page of it fails, and nobody else.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use stencilfs::memory::Backend;
use stencilfs::store::{BLOCK_SIZE, Digest, Scratch, Store};

use crate::kvm_guest::{Machine, set_program, write_template};
use crate::support::actor::Actor;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::passing::SetOnDrop;

const PAGE: u64 = 4096;
const IN_BLOCK: u64 = BLOCK_SIZE / PAGE;
/// Pages below the guest's window: where it sees them is where they lie.
const LOW: u64 = 0x80;

/// Flips a byte of the store so that one block is lost of those which the guest sees low in its memory, and that is not
/// the one with its code. The store is asked directly: nobody has read a page through the mount.
fn damage_one(dir: &Path, digest: &str) -> (u64, Digest) {
    let store = Store::open(dir).unwrap();
    let digest: Digest = digest.parse().unwrap();
    let packs = store.pack_files().unwrap();
    assert_eq!(packs.len(), 1);
    let pack = File::options().read(true).write(true).open(&packs[0]).unwrap();
    let flip = |at: u64| {
        let mut byte = [0];
        pack.read_exact_at(&mut byte, at).unwrap();
        pack.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        pack.sync_all().unwrap();
    };
    for at in (0..pack.metadata().unwrap().len()).step_by(97) {
        flip(at);
        let template = Store::open(dir).unwrap().template(&digest).unwrap();
        let mut room = vec![0; BLOCK_SIZE as usize];
        let lost: Vec<u64> = (0..template.block_count(0))
            .filter(|&b| template.read_block(0, b, &mut Scratch::default(), &mut room).is_err())
            .collect();
        if let [block] = lost[..]
            && (1..LOW / IN_BLOCK - 1).contains(&block)
        {
            return (block, template.block_id(0, block).unwrap().unwrap());
        }
        flip(at);
    }
    panic!("no byte of the pack belongs to one of the blocks");
}

fn segments(pages: impl Iterator<Item = u64>) -> Vec<u16> {
    pages.map(|page| (page * PAGE / 16) as u16).collect()
}

#[test]
fn one_damaged_block_fails_only_those_who_touch_it() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let source = world.dir().join("source");
    write_template(&source, &[], &[]);
    let digest = world.import(&source, "guest:1");
    let (block, id) = damage_one(&world.store_dir(), &digest);
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
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ends = SetOnDrop(&over);
        // Guests and clones that need nothing of it go on all the while, again and again.
        let guest = scope.spawn(|| {
            let mut runs = 0;
            while !over.load(Ordering::Relaxed) || runs == 0 {
                let mut machine = machine(&good);
                assert_eq!(machine.run().expect("a guest that needs nothing of it"), 0);
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
            // Its neighbours first, so that the place where it stops says which page it was.
            let list = segments([lost.start - 1, lost.end, page, 1].into_iter());
            let mut machine = machine(&list);
            if let Some(address) = machine.run_to_lost_page() {
                assert_eq!(address / PAGE, page);
            }
            assert_eq!(machine.begun(), 3, "KVM_RUN fails on exactly page {page}");
            refused += 1;
        }
        assert_eq!(refused, IN_BLOCK);
        for page in [lost.start, lost.end - 1] {
            let mut clone = Actor::start();
            clone.tell(&format!("map 0 {} 0 {} rw", file.display(), bytes.len()));
            assert_eq!(clone.dies_of(&format!("read 0 {page}")), Some(libc::SIGBUS), "page {page}");
        }
        drop(ends);
        clone.join().expect("a clone that needs nothing of it");
        println!(
            "{refused} guests failed, {} went on",
            guest.join().expect("guests that need nothing of it")
        );
    });
    assert!(world.counter("damaged") >= IN_BLOCK + 2);
    assert_eq!(world.counter("source_waits"), 0, "damage is no reason to wait");
    let log = world.log();
    let lines: Vec<&str> = log.lines().filter(|l| l.contains(" ERROR ")).collect();
    assert_eq!(lines.len(), 1, "a block is named once:\n{log}");
    for word in [&digest, "file memory", &format!("offset {}:", block * BLOCK_SIZE), &format!("digest {id}")]
    {
        assert!(lines[0].contains(word), "'{word}' is not in: {}", lines[0]);
    }
    assert_eq!(world.status()["restarts"], 0);
}

/// A pack that is gone while the store is there is damage, at once.
#[test]
fn a_missing_pack_of_a_present_store_is_not_waited_for() {
    let _host = host::shared();
    let world = TestMount::new("decode");
    let digest = world.import_bytes(&vec![7; 1 << 20], "web:1");
    let file = File::open(world.file(&digest, "memory")).unwrap();
    for pack in Store::open(&world.store_dir()).unwrap().pack_files().unwrap() {
        fs::remove_file(pack).unwrap();
    }
    let asked = std::time::Instant::now();
    let error = file.read_exact_at(&mut [0; PAGE as usize], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(asked.elapsed() < std::time::Duration::from_secs(2), "{:?}", asked.elapsed());
    assert!(world.log().contains("pack is damaged: the file is missing"), "{}", world.log());
    assert_eq!((world.counter("source_waits"), world.counter("source_outages")), (0, 0));
}
