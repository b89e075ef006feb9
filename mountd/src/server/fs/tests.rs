use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::OFlags;
use stencilfs::control::{OnDamage, Op, Phase, ServeMode};
use stencilfs::error::Error;
use stencilfs::store::Scratch;

use super::*;
use crate::protocol::{FileKey, ServerReply, ServerRequest};
use crate::server::testing::{BLOCK, Setup, Supervisor, World, content, reply, request, wait_for};
use crate::server::tree::node::{Kind, ROOT};

fn attributes(world: &World, ino: u64) -> Result<Attributes, Refusal> {
    let mut found = None;
    world.fs.attributes(request(Op::GetAttr, ino), |reply| found = Some(reply));
    found.unwrap()
}

fn list(world: &World, ino: u64, after: u64) -> Result<Vec<DirectoryEntry>, Refusal> {
    let mut found = None;
    world.fs.list(request(Op::ReadDir, ino), after, |reply| found = Some(reply));
    found.unwrap()
}

fn names(entries: &[DirectoryEntry]) -> Vec<&str> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    names
}

fn seek_in(world: &World, ino: u64, offset: i64, whence: i32) -> Result<i64, Refusal> {
    let mut found = None;
    world.fs.seek(request(Op::LSeek, ino), (offset, whence), |reply| found = Some(reply));
    found.unwrap()
}

#[test]
fn lookups_walk_the_tree_of_templates_and_tags() {
    let world = World::new(ServeMode::Decode);
    let digest = world.digest.to_string();
    let directory = world.find(&format!("by-id/{digest}")).unwrap();
    assert_eq!((directory.attributes.kind, directory.attributes.mode), (Kind::Directory, 0o550));
    assert_eq!(directory.ttl, ENTRY_TTL);
    let memory = world.lookup(directory.attributes.ino, "memory").unwrap();
    let Attributes { kind, mode, size, data, .. } = memory.attributes;
    assert_eq!((kind, mode, size.get()), (Kind::File, 0o440, world.memory.len() as u64));
    assert_eq!(data.get(), 5 * BLOCK as u64, "pages of zeros take no space");
    assert_eq!(memory.ttl, ENTRY_TTL);

    let tag = world.find("templates/web/1").unwrap();
    assert_eq!((tag.attributes.kind, tag.ttl), (Kind::Symlink, Duration::ZERO));
    let mut target = None;
    world.fs.read_link(request(Op::ReadLink, tag.attributes.ino), |found| target = Some(found));
    assert_eq!(target.unwrap(), Ok(format!("../../by-id/{digest}")));
    let mut target = None;
    world.fs.read_link(request(Op::ReadLink, ROOT), |found| target = Some(found));
    assert_eq!(target.unwrap(), Err(Refusal::Invalid));

    let up = |path: &str| world.find(path).unwrap().attributes.ino;
    assert_eq!(up(&format!("by-id/{digest}/..")), up("by-id"));
    assert_eq!(up("by-id/.."), ROOT);
    assert_eq!(up("templates/web/1/.."), up("templates/web"));
    assert_eq!(up("templates/web/.."), up("templates"));
    assert_eq!(up(&format!("by-id/{digest}/memory/..")), directory.attributes.ino);

    let missing = [
        "nothing".to_owned(),
        "by-id/nothing".to_owned(),
        format!("by-id/{}", digest.to_uppercase()),
        format!("by-id/{digest}/nothing"),
        "templates/other".to_owned(),
        "templates/web/2".to_owned(),
        "templates/web/not a tag".to_owned(),
    ];
    for path in missing {
        assert_eq!(world.find(&path), Err(Refusal::NoEntry), "{path}");
    }
    assert_eq!(world.find(&format!("by-id/{digest}/memory/x")), Err(Refusal::NotDirectory));
    assert_eq!(world.lookup(4711, "x"), Err(Refusal::Stale));
    assert_eq!(world.fs.stats.get(Counter::Failed), 0);
}

#[test]
fn a_successor_accepts_the_inode_numbers_of_its_predecessor() {
    let world = World::new(ServeMode::Decode);
    let digest = world.digest.to_string();
    let paths = ["by-id", "templates", "templates/web", "templates/web/1"].map(str::to_owned);
    let paths: Vec<String> = paths
        .into_iter()
        .chain(["", "/memory", "/manifest.json"].map(|name| format!("by-id/{digest}{name}")))
        .collect();
    let before: Vec<Attributes> = paths.iter().map(|path| world.find(path).unwrap().attributes).collect();
    let successor = world.succeed(Setup::new(ServeMode::Decode));
    for attributes_before in before {
        assert_eq!(attributes(&successor, attributes_before.ino), Ok(attributes_before));
    }
    assert_eq!(attributes(&successor, 4711), Err(Refusal::Stale));
}

#[test]
fn listings_continue_after_each_entry() {
    let world = World::new(ServeMode::Decode);
    for tag in 2..40 {
        world.import(&format!("web:{tag}"), &world.memory);
    }
    let directory = |path: &str| world.find(path).unwrap().attributes.ino;
    assert_eq!(names(&list(&world, ROOT, 0).unwrap()), [".", "..", "by-id", "templates"]);
    let template = directory(&format!("by-id/{}", world.digest));
    assert_eq!(names(&list(&world, template, 0).unwrap()), [".", "..", "manifest.json", "memory"]);
    assert_eq!(names(&list(&world, directory("templates"), 0).unwrap()), [".", "..", "web"]);
    assert_eq!(list(&world, directory("by-id"), 0).unwrap().len(), 3);

    let all = list(&world, directory("templates/web"), 0).unwrap();
    assert_eq!(all.len(), 41);
    for (index, entry) in all.iter().enumerate() {
        let rest = list(&world, directory("templates/web"), entry.cookie).unwrap();
        assert_eq!(rest, all[index + 1..], "after {}", entry.name);
        let found = world.lookup(directory("templates/web"), &entry.name).unwrap().attributes;
        assert_eq!((found.ino, found.kind), (entry.ino, entry.kind));
    }
    assert_eq!(list(&world, directory("templates/web/1"), 0), Err(Refusal::NotDirectory));
    assert_eq!(list(&world, world.memory_ino(), 0), Err(Refusal::NotDirectory));
}

#[test]
fn reads_return_the_content_at_every_alignment() {
    let world = World::new(ServeMode::Decode);
    let ino = world.memory_ino();
    assert_eq!(reply(&world.open(ino)), Ok(Opened::Decode));
    let length = world.memory.len();
    let ranges = [
        (0, BLOCK),
        (0, length),
        (1, 100),
        (BLOCK - 1, 2),
        (BLOCK, 4096),
        (2 * BLOCK + 4096, 3 * BLOCK),
        (length - 10, 4096),
        (length, 1),
        (length + BLOCK, 1),
    ];
    for (start, size) in ranges {
        let expected = &world.memory[start.min(length)..(start + size).min(length)];
        let read = reply(&world.read(ino, start as u64, size)).unwrap();
        assert!(read == expected, "{size} bytes at {start}");
    }
    let stats = &world.fs.stats;
    assert_eq!(stats.get(Counter::OpensDecode), 1);
    assert!(stats.get(Counter::BlocksZero) > 0 && stats.get(Counter::BlocksCached) > 0);
    let manifest = world.find(&format!("by-id/{}/manifest.json", world.digest)).unwrap().attributes;
    assert_eq!(reply(&world.open(manifest.ino)), Ok(Opened::Decode));
    let text = reply(&world.read(manifest.ino, 0, 1 << 20)).unwrap();
    assert_eq!(text.len() as u64, manifest.size.get());
    assert_eq!(reply(&world.read(manifest.ino, 5, 7)).unwrap(), text[5..12]);
    assert_eq!(reply(&world.read(manifest.ino, 1 << 30, 7)).unwrap(), b"");
    assert_eq!(reply(&world.read(ROOT, 0, 1)), Err(Refusal::IsDirectory));
    assert_eq!(stats.get(Counter::Failed), 0);
    assert_eq!(world.fs.flights.table().requests().count(), 0, "all requests are answered");
}

#[test]
fn only_files_are_opened_and_only_for_reading() {
    let world = World::new(ServeMode::Decode);
    let ino = world.memory_ino();
    for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::TRUNC] {
        let (sender, receiver) = std::sync::mpsc::channel();
        let send = Box::new(move |opened| assert_eq!(sender.send(opened), Ok(())));
        world.fs.open(request(Op::Open, ino), flags, send);
        assert_eq!(reply(&receiver), Err(Refusal::Writes), "{flags:?}");
    }
    assert_eq!(world.fs.stats.get(Counter::OpensRefused), 3);
    assert_eq!(reply(&world.open(ROOT)), Err(Refusal::IsDirectory));
    let tag = world.find("templates/web/1").unwrap().attributes.ino;
    assert_eq!(reply(&world.open(tag)), Err(Refusal::Invalid));
    assert_eq!(reply(&world.open(4711)), Err(Refusal::Stale));
}

#[test]
fn modifying_requests_are_refused() {
    let world = World::new(ServeMode::Decode);
    let refused = |op| {
        let mut refusal = None;
        world.fs.refuse(request(op, ROOT), |why| refusal = Some(why));
        refusal.unwrap()
    };
    let writes = [Op::MkNod, Op::MkDir, Op::Unlink, Op::RmDir, Op::Symlink, Op::Rename, Op::Link, Op::Create];
    for op in writes.into_iter().chain([Op::Write, Op::FAllocate]) {
        assert_eq!(refused(op), Refusal::Writes, "{op:?}");
    }
    assert_eq!(world.fs.stats.get(Counter::WritesRefused), 10);
    let unsupported = [Op::Flush, Op::FSync, Op::FSyncDir, Op::SetXAttr, Op::GetXAttr, Op::ListXAttr];
    for op in unsupported.into_iter().chain([Op::RemoveXAttr, Op::IoCtl, Op::CopyFileRange]) {
        assert_eq!(refused(op), Refusal::Unsupported, "{op:?}");
    }
    for (resizes, expected) in [(true, Refusal::Writes), (false, Refusal::Policy)] {
        let mut refusal = None;
        world.fs.set_attributes(request(Op::SetAttr, ROOT), resizes, |why| refusal = Some(why));
        assert_eq!(refusal, Some(expected));
    }
    assert_eq!(world.fs.stats.get(Counter::WritesRefused), 12);
}

#[test]
fn each_refusal_has_its_errno() {
    let expected = [
        (Refusal::NoEntry, libc::ENOENT),
        (Refusal::Stale, libc::ESTALE),
        (Refusal::NotDirectory, libc::ENOTDIR),
        (Refusal::IsDirectory, libc::EISDIR),
        (Refusal::Invalid, libc::EINVAL),
        (Refusal::Writes, libc::EACCES),
        (Refusal::Policy, libc::EPERM),
        (Refusal::NoPosition, libc::ENXIO),
        (Refusal::Unsupported, libc::ENOSYS),
        (Refusal::Damaged, libc::EIO),
        (Refusal::Away, libc::EIO),
        (Refusal::Failed, libc::EIO),
        (Refusal::NoSpace, libc::ENOSPC),
        (Refusal::Crowded, libc::EAGAIN),
    ];
    for (refusal, errno) in expected {
        assert_eq!(refusal.errno(), errno, "{refusal:?}");
    }
}

#[test]
fn seek_finds_data_and_holes_by_block() {
    let world = World::new(ServeMode::Decode);
    let (ino, block) = (world.memory_ino(), BLOCK as i64);
    // Blocks 1 and 4 of 7 are zero.
    assert_eq!(seek_in(&world, ino, 5, libc::SEEK_DATA), Ok(5));
    assert_eq!(seek_in(&world, ino, block + 5, libc::SEEK_DATA), Ok(2 * block));
    assert_eq!(seek_in(&world, ino, 5, libc::SEEK_HOLE), Ok(block));
    assert_eq!(seek_in(&world, ino, 5 * block, libc::SEEK_HOLE), Ok(7 * block));
    assert_eq!(seek_in(&world, ino, 7 * block, libc::SEEK_DATA), Err(Refusal::NoPosition));
    assert_eq!(seek_in(&world, ino, -1, libc::SEEK_DATA), Err(Refusal::NoPosition));
    assert_eq!(seek_in(&world, ino, 0, libc::SEEK_SET), Err(Refusal::Invalid));
    assert_eq!(seek_in(&world, ROOT, 0, libc::SEEK_DATA), Err(Refusal::Unsupported));
    // A file that ends with zeros has no data there.
    let ends_with_zeros = world.import("web:2", &content(2));
    let path = format!("by-id/{ends_with_zeros}/memory");
    let ino = world.find(&path).unwrap().attributes.ino;
    assert_eq!(seek_in(&world, ino, block, libc::SEEK_DATA), Err(Refusal::NoPosition));
}

#[test]
fn totals_count_templates_and_data() {
    let world = World::new(ServeMode::Decode);
    world.import("web:2", &content(3));
    let mut found = None;
    world.fs.totals(request(Op::StatFs, ROOT), |totals| found = Some(totals));
    assert_eq!(found, Some(Ok((2, Bytes::new(7 * BLOCK as u64)))));
}

/// Damages one block of the world's template, and returns its number.
fn damage_one(world: &World) -> usize {
    let pack = world.packs().remove(0);
    let file = File::options().read(true).write(true).open(pack).unwrap();
    // The first record follows the header.
    let mut byte = [0];
    file.read_exact_at(&mut byte, 300).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 300).unwrap();
    let template = world.store.template(&world.digest).unwrap();
    let mut buffer = vec![0; BLOCK];
    let mut damaged =
        |block: &usize| template.read_block(0, *block as u64, &mut Scratch::default(), &mut buffer).is_err();
    let bad: Vec<usize> = (0..7).filter(|block| damaged(block)).collect();
    assert_eq!(bad.len(), 1, "{bad:?}");
    bad[0]
}

#[test]
fn a_damaged_block_fails_alone_until_an_import_repairs_the_store() {
    let world = World::new(ServeMode::Decode);
    let ino = world.memory_ino();
    let bad = damage_one(&world);
    let damaged = |at: usize| reply(&world.read(ino, (at * BLOCK) as u64, BLOCK));
    assert_eq!(damaged(bad), Err(Refusal::Damaged));
    assert_eq!(world.fs.stats.get(Counter::Damaged), 1);
    for block in (0..7).filter(|block| *block != bad) {
        assert!(damaged(block).unwrap() == world.memory[block * BLOCK..(block + 1) * BLOCK]);
    }
    assert_eq!(world.import("web:1", &world.memory), world.digest);
    assert!(damaged(bad).unwrap() == world.memory[bad * BLOCK..(bad + 1) * BLOCK]);
}

#[test]
fn an_open_template_is_read_from_repaired_tables() {
    let world = World::new(ServeMode::Decode);
    let ino = world.memory_ino();
    let directory = world.dir.path().join(format!("store/images/{}", world.digest));
    let replace = |name: &str, bytes: &[u8]| {
        fs::write(directory.join("new"), bytes).unwrap();
        fs::rename(directory.join("new"), directory.join(name)).unwrap();
    };
    // Whole blocks are not cached.
    let read_block = || reply(&world.read(ino, 0, BLOCK));
    // The last bytes of an image are a hash; a placement ends with rows and two checksums of 32 bytes.
    for (name, from_end) in [("image", 1), ("placement", 65)] {
        world.fs.tree.close_templates();
        let open = world.fs.tree.template(&world.digest).unwrap();
        let path = directory.join(name);
        let intact = fs::read(&path).unwrap();
        let at = intact.len() - from_end;
        File::options().write(true).open(path).unwrap().write_all_at(&[!intact[at]], at as u64).unwrap();
        assert_eq!(read_block(), Err(Refusal::Damaged), "{name}");
        // A repair replaces one table after the other.
        replace("image", &fs::read(directory.join("image")).unwrap());
        assert_eq!(read_block(), Err(Refusal::Damaged), "{name}");
        replace(name, &intact);
        assert!(read_block().unwrap() == world.memory[..BLOCK], "{name}");
        assert!(Arc::ptr_eq(&open, &world.fs.tree.template(&world.digest).unwrap()));
    }
}

#[test]
fn reads_wait_for_a_store_that_is_away_and_other_requests_fail() {
    let world = World::new(ServeMode::Decode);
    let (ino, stats) = (world.memory_ino(), &world.fs.stats);
    let (home, away) = (world.dir.path().join("store"), world.dir.path().join("away"));
    fs::rename(&home, &away).unwrap();
    assert_eq!(world.find("templates/web/1"), Err(Refusal::Away));
    assert_eq!((stats.get(Counter::Failed), stats.get(Counter::SourceOutages)), (1, 1));
    world.fs.tree.close_templates();
    let waiting: Vec<_> = (0..7).map(|block| world.read(ino, (block * BLOCK) as u64, BLOCK)).collect();
    let parked = || world.fs.flights.table().requests().filter(|r| r.phase == Phase::WaitingForStore).count();
    assert_eq!(parked(), 7);
    assert_eq!(stats.get(Counter::SourceWaits), 7);
    assert!(waiting[0].try_recv().is_err(), "a read was answered without the store");
    fs::rename(&away, &home).unwrap();
    for (block, receiver) in waiting.iter().enumerate() {
        assert!(reply(receiver).unwrap() == world.memory[block * BLOCK..(block + 1) * BLOCK]);
    }
    wait_for("the end of the outage", || (parked() == 0).then_some(()));
    assert!(world.find("templates/web/1").is_ok());
}

#[test]
fn reads_fail_when_the_store_stays_away() {
    let mut setup = Setup::new(ServeMode::Decode);
    setup.longest_wait = Duration::from_millis(1);
    let world = World::with(setup);
    let ino = world.memory_ino();
    let (home, away) = (world.dir.path().join("store"), world.dir.path().join("away"));
    fs::rename(&home, &away).unwrap();
    world.fs.tree.close_templates();
    let failing: Vec<_> = (0..3).map(|_| world.read(ino, 0, 1)).collect();
    failing.iter().for_each(|receiver| assert_eq!(reply(receiver), Err(Refusal::Away)));
    assert_eq!(world.fs.stats.get(Counter::Failed), 3);
    fs::rename(&away, &home).unwrap();
    assert_eq!(reply(&world.read(ino, 0, 5)).unwrap(), b"block");
}

#[test]
fn reads_wait_in_their_thread_when_the_table_is_full() {
    let world = World::new(ServeMode::Decode);
    let ino = world.memory_ino();
    let mut parked = Vec::new();
    loop {
        let mut flight = world.fs.flights.enter(request(Op::Open, ino));
        if !flight.park(Phase::Parked) {
            break;
        }
        parked.push(flight);
    }
    let (home, away) = (world.dir.path().join("store"), world.dir.path().join("away"));
    fs::rename(&home, &away).unwrap();
    world.fs.tree.close_templates();
    std::thread::scope(|scope| {
        let read = scope.spawn(|| reply(&world.read(ino, 0, 5)));
        wait_for("a waiting read", || {
            let waits = |r: &stencilfs::control::InFlight| r.phase == Phase::WaitingForStore;
            world.fs.flights.table().requests().any(|r| waits(&r)).then_some(())
        });
        fs::rename(&away, &home).unwrap();
        assert_eq!(read.join().unwrap().unwrap(), b"block");
    });
}

#[test]
fn a_condemned_template_is_not_found_and_its_open_files_are_read() {
    let world = World::new(ServeMode::Decode);
    let (path, ino) = (format!("by-id/{}", world.digest), world.memory_ino());
    let directory = world.find(&path).unwrap().attributes.ino;
    world.condemn(Some(false));
    assert_eq!(world.find(&path), Err(Refusal::NoEntry));
    assert_eq!(world.lookup(directory, "memory"), Err(Refusal::NoEntry));
    assert_eq!(world.lookup(ino, "."), Err(Refusal::NoEntry));
    assert_eq!(names(&list(&world, directory, 0).unwrap()), [".", ".."]);
    assert_eq!(reply(&world.open(ino)), Err(Refusal::Stale));
    assert_eq!(reply(&world.read(ino, 0, 5)).unwrap(), b"block");
    world.condemn(None);
    assert_eq!(reply(&world.open(ino)), Ok(Opened::Decode));
}

#[test]
fn reads_wait_while_a_removal_is_undecided() {
    let world = World::new(ServeMode::Decode);
    let ino = world.memory_ino();
    world.condemn(Some(false));
    world.fs.tree.close_templates();
    let (image, hidden) = (world.dir.path().join("store/images"), world.dir.path().join("hidden"));
    let image = image.join(world.digest.to_string());
    fs::rename(&image, &hidden).unwrap();
    let waiting = world.read(ino, 0, 5);
    assert!(waiting.try_recv().is_err());
    fs::rename(&hidden, &image).unwrap();
    assert_eq!(reply(&waiting).unwrap(), b"block");
    // Once the removal is decided, the template does not come back.
    world.condemn(Some(true));
    world.fs.tree.close_templates();
    fs::rename(&image, &hidden).unwrap();
    assert_eq!(reply(&world.read(ino, 0, 5)), Err(Refusal::NoEntry));
}

#[test]
fn a_read_of_one_damaged_page_is_answered_after_its_process_was_stopped() {
    let stops = |request: &ServerRequest| matches!(request, ServerRequest::StopReader { .. });
    let (setup, gate) = Setup::new(ServeMode::Decode).hold(|r| matches!(r, ServerRequest::StopReader { .. }));
    let world = World::with(Setup { on_damage: OnDamage::Stop, ..setup });
    let damaged = (damage_one(&world) * BLOCK) as u64;
    let ino = world.memory_ino();

    // READs of more than a page, and of threads that the kernel does not name, fail at once.
    assert_eq!(reply(&world.read_by(7, ino, damaged, BLOCK)), Err(Refusal::Damaged));
    assert_eq!(reply(&world.read_by(7, ino, damaged, 8192)), Err(Refusal::Damaged));
    assert_eq!(reply(&world.read_by(0, ino, damaged + 4096, 4096)), Err(Refusal::Damaged));
    assert_eq!(world.supervisor.count(stops), 0);

    let answers = world.fs.stats.get(Counter::Answers);
    let reads = [7, 8].map(|thread| world.read_by(thread, ino, damaged + 8192, 4096));
    wait_for("the request", || (world.supervisor.count(stops) == 1).then_some(()));
    // The supervisor holds the reply: other READs are answered, also of the same threads.
    let start = if damaged == 0 { 2 * BLOCK } else { 0 };
    for thread in [0, 7, 8, 9] {
        let read = reply(&world.read_by(thread, ino, start as u64, 4096));
        assert!(read == Ok(world.memory[start..start + 4096].to_vec()), "thread {thread}");
    }
    let table = world.fs.flights.table();
    assert_eq!((table.parked(), world.fs.stats.get(Counter::Answers) - answers), (2, 4));
    assert!(table.oldest().is_none(), "the watchdog ignores READs that wait for the supervisor");
    assert!(reads.iter().all(|read| read.try_recv().is_err()), "answered before the process was stopped");
    gate.open();
    for read in &reads {
        assert_eq!(reply(read), Err(Refusal::Damaged));
    }
    assert_eq!((world.fs.stats.get(Counter::Damaged), world.supervisor.count(stops)), (5, 2));
    let requests = world.supervisor.requests.lock().unwrap();
    let stopped: Vec<(u32, &FileKey, u64)> = requests
        .iter()
        .filter_map(|request| match request {
            ServerRequest::StopReader { thread, key, offset, .. } => Some((*thread, key, *offset)),
            _ => None,
        })
        .collect();
    let key = world.key();
    assert_eq!(stopped, [7, 8].map(|thread| (thread, &key, damaged + 8192)));
}

#[test]
fn a_read_of_a_damaged_page_fails_if_its_process_cannot_be_stopped() {
    let refuse = |request: &ServerRequest, _: &Supervisor| {
        let refusal = ServerReply::Refused((&Error::failed("no")).into());
        matches!(request, ServerRequest::StopReader { .. }).then_some((refusal, None))
    };
    for (on_damage, stops) in [(OnDamage::Kill, 1), (OnDamage::Eio, 0)] {
        let world = World::with(Setup { on_damage, ..Setup::new(ServeMode::Decode).script(refuse) });
        let damaged = (damage_one(&world) * BLOCK) as u64;
        assert_eq!(reply(&world.read_by(7, world.memory_ino(), damaged, 4096)), Err(Refusal::Damaged));
        let count = world.supervisor.count(|request| matches!(request, ServerRequest::StopReader { .. }));
        assert_eq!(count, stops, "{on_damage:?}");
    }
}
