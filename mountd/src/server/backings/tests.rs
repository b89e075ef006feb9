use stencilfs::control::Phase;
use stencilfs::error::Error;

use super::*;
use crate::protocol::{ServerReply, fds};
use crate::server::testing::{Answer, BLOCK, Gate, Setup, Supervisor, World, content, reply, wait_for};
use crate::server::tree::node::ROOT;

fn refused(error: &Error) -> Option<Answer> {
    Some((ServerReply::Refused(error.into()), None))
}

fn is_reserve(request: &ServerRequest) -> bool {
    matches!(request, ServerRequest::Reserve { .. })
}

/// A server whose hydrations wait at the gate before the file is registered.
fn gated(mode: ServeMode, timeout: Duration) -> (World, Arc<Gate>) {
    let (setup, gate) = Setup::new(mode).hold(|request| matches!(request, ServerRequest::Freeze { .. }));
    (World::with(Setup { hydrate_timeout: timeout, ..setup }), gate)
}

/// Returns the reason that the server last reported for a file without a backing.
fn reason(supervisor: &Supervisor) -> Option<String> {
    let requests = supervisor.requests.lock().unwrap();
    requests.iter().rev().find_map(|request| match request {
        ServerRequest::NoBacking { reason, .. } => Some(reason.clone()),
        _ => None,
    })?
}

#[test]
fn an_open_waits_for_the_backing_and_later_opens_do_not() {
    let (world, gate) = gated(ServeMode::Auto, Duration::from_secs(60));
    let ino = world.memory_ino();
    let opens = [world.open(ino), world.open(ino)];
    wait_for("a frozen backing", || {
        (world.supervisor.count(|r| matches!(r, ServerRequest::Freeze { .. })) == 1).then_some(())
    });
    assert!(opens[0].try_recv().is_err(), "a backing is served before its verification");
    let parked = world.fs.flights.table().requests().filter(|r| r.phase == Phase::Parked).count();
    assert_eq!(parked, 2);
    gate.open();
    for open in &opens {
        assert_eq!(reply(open), Ok(Opened::Backing(1)));
    }
    assert_eq!(world.open(ino).try_recv(), Ok(Ok(Opened::Backing(1))));
    assert!(world.supervisor.backing(&world.key()) == world.memory);
    let stats = &world.fs.stats;
    assert_eq!(stats.get(Counter::OpensPassthrough), 3);
    assert_eq!((stats.get(Counter::HydrationsStarted), stats.get(Counter::HydrationsDone)), (1, 1));
    assert_eq!(reason(&world.supervisor), None);
}

#[test]
fn a_backing_of_many_pieces_keeps_its_holes() {
    let world = World::new(ServeMode::Passthrough);
    // Pieces of 32 blocks: data in the first, zeros in the second and third, data in the last, which is short.
    let mut bytes = vec![0; 100 * BLOCK];
    bytes[..5 * BLOCK].copy_from_slice(&content(5));
    bytes[97 * BLOCK..].copy_from_slice(&content(3));
    let digest = world.import("web:2", &bytes);
    let ino = world.find(&format!("by-id/{digest}/memory")).unwrap().attributes.ino;
    assert_eq!(reply(&world.open(ino)), Ok(Opened::Backing(1)));
    let key = FileKey { digest, file: "memory".to_owned() };
    assert!(world.supervisor.backing(&key) == bytes);
    let file = fds::copy(&world.supervisor.files.lock().unwrap()[&key]).unwrap();
    let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(32 * BLOCK as u64)).unwrap();
    assert_eq!(data, 96 * BLOCK as u64);
}

#[test]
fn empty_files_and_other_modes_are_decoded() {
    let world = World::new(ServeMode::Decode);
    assert_eq!(reply(&world.open(world.memory_ino())), Ok(Opened::Decode));
    let world = World::new(ServeMode::Auto);
    let passthrough = world.memory_ino();
    let mut setup = Setup::new(ServeMode::Auto);
    setup.cache = Cache::Nowhere("no memory".to_owned());
    let world = world.succeed(setup);
    let decoded = world.find(&format!("by-id/{}/memory", world.digest)).unwrap();
    assert_ne!(decoded.attributes.ino, passthrough, "one inode number is served in one way");
    assert_eq!(reply(&world.open(decoded.attributes.ino)), Ok(Opened::Decode));
    // A file that was looked up as passthrough is looked up again, and gets the other number.
    assert_eq!(reply(&world.open(passthrough)), Err(Refusal::Stale));
    let mut setup = Setup::new(ServeMode::Passthrough);
    setup.cache = Cache::Nowhere("no memory".to_owned());
    let world = world.succeed(setup);
    assert_eq!(reply(&world.open(passthrough)), Err(Refusal::Failed));
}

#[test]
fn an_open_that_times_out_is_served_by_decode_until_the_backing_is_ready() {
    let (world, gate) = gated(ServeMode::Auto, Duration::from_millis(1));
    let passthrough = world.memory_ino();
    let late = world.open(passthrough);
    let decoded = wait_for("the decode number", || {
        let found = world.find(&format!("by-id/{}/memory", world.digest)).unwrap();
        (found.attributes.ino != passthrough).then_some(found)
    });
    assert_eq!(decoded.ttl, Duration::ZERO, "the name must be looked up again later");
    assert_eq!(reply(&world.open(decoded.attributes.ino)), Ok(Opened::Decode));
    assert_eq!(reply(&world.open(passthrough)), Err(Refusal::Stale));
    // If the deadline passes while the gate holds the link, the reason is reported later, and the open is answered
    // later.
    gate.open();
    assert_eq!(reply(&late), Err(Refusal::Stale));
    let reasons = world.supervisor.count(
        |r| matches!(r, ServerRequest::NoBacking { reason: Some(why), .. } if why.contains("after the timeout of 0.001 s")),
    );
    assert!(reasons > 0, "the reason is reported before the open is answered");
    wait_for("the backing", || (world.memory_ino() == passthrough).then_some(()));
    assert_eq!(reply(&world.open(passthrough)), Ok(Opened::Backing(1)));
    assert!(reply(&world.read(decoded.attributes.ino, 0, 5)).is_ok(), "the decode number is still served");
}

#[test]
fn a_backing_that_fails_is_replaced_by_decode_or_an_error() {
    let failing = |mode, error: fn() -> Error| {
        World::with(Setup::new(mode).script(move |r, _| if is_reserve(r) { refused(&error()) } else { None }))
    };
    let full = || Error::failed("the cache is full").because(std::io::Error::from_raw_os_error(libc::ENOSPC));
    let world = failing(ServeMode::Auto, full);
    let passthrough = world.memory_ino();
    assert_eq!(reply(&world.open(passthrough)), Err(Refusal::Stale));
    assert!(reason(&world.supervisor).unwrap().contains("the cache is full"));
    assert_ne!(world.memory_ino(), passthrough);
    assert_eq!(world.fs.stats.get(Counter::HydrationsFailed), 1);
    assert_eq!(world.supervisor.count(|r| matches!(r, ServerRequest::Abandon { .. })), 1);

    let expected: [(fn() -> Error, Refusal); 5] = [
        (full, Refusal::NoSpace),
        (|| Error::try_again("full of backings in use"), Refusal::NoSpace),
        (|| Error::try_again("away").because(std::io::Error::from_raw_os_error(libc::EIO)), Refusal::Away),
        (|| Error::damage("damaged"), Refusal::Damaged),
        (|| Error::failed("other"), Refusal::Failed),
    ];
    for (error, refusal) in expected {
        let world = failing(ServeMode::Passthrough, error);
        let ino = world.memory_ino();
        assert_eq!(reply(&world.open(ino)), Err(refusal));
        assert_eq!(reply(&world.open(ino)), Err(refusal), "each open makes a new attempt");
        assert_eq!(world.supervisor.count(is_reserve), 2);
    }
}

#[test]
fn a_backing_that_was_changed_is_never_registered() {
    for at in [0, BLOCK as u64] {
        let mut setup = Setup::new(ServeMode::Passthrough);
        setup = setup.script(move |request, supervisor| {
            if let ServerRequest::Freeze { key } = request {
                let file = std::fs::File::from(fds::copy(&supervisor.files.lock().unwrap()[key]).unwrap());
                std::os::unix::fs::FileExt::write_all_at(&file, b"X", at).unwrap();
            }
            None
        });
        let world = World::with(setup);
        assert_eq!(reply(&world.open(world.memory_ino())), Err(Refusal::Damaged), "a byte at {at}");
        assert_eq!(world.supervisor.count(|r| matches!(r, ServerRequest::Register { .. })), 0);
    }
}

#[test]
fn data_in_a_hole_of_a_backing_is_damage() {
    let world = World::with(Setup::new(ServeMode::Passthrough).script(|request, supervisor| {
        if let ServerRequest::Freeze { key } = request {
            let file = std::fs::File::from(fds::copy(&supervisor.files.lock().unwrap()[key]).unwrap());
            std::os::unix::fs::FileExt::write_all_at(&file, b"X", 70 * BLOCK as u64).unwrap();
        }
        None
    }));
    let mut bytes = vec![0; 100 * BLOCK];
    bytes[..5 * BLOCK].copy_from_slice(&content(5));
    let digest = world.import("web:2", &bytes);
    let ino = world.find(&format!("by-id/{digest}/memory")).unwrap().attributes.ino;
    assert_eq!(reply(&world.open(ino)), Err(Refusal::Damaged));
}

#[test]
fn a_backing_that_another_server_has_registered_is_used() {
    let world = World::with(Setup::new(ServeMode::Auto).script(|request, _| {
        let file =
            || stencilfs::sys::memory::memfd::create("ready", stencilfs::units::Bytes::new(1)).unwrap();
        is_reserve(request).then(|| (ServerReply::Registered(77), Some(file())))
    }));
    assert_eq!(reply(&world.open(world.memory_ino())), Ok(Opened::Backing(77)));
    let file = stencilfs::sys::memory::memfd::create("ready", stencilfs::units::Bytes::new(1)).unwrap();
    let mut setup = Setup::new(ServeMode::Auto);
    let ready = Ready { id: 42, verified_at: 0, file: file.into(), packs: None };
    setup.earlier = vec![EarlierBacking { key: world.key(), ready: Some(ready) }];
    let world = world.succeed(setup);
    assert_eq!(reply(&world.open(world.memory_ino())), Ok(Opened::Backing(42)));
    assert_eq!(world.supervisor.count(is_reserve), 0);
}

/// Evicts the backing of `web:1` for the one of `web:2`; `is_unused` is the result of the supervisor's search.
fn evict(is_unused: bool) -> (World, u64, Result<Opened, Refusal>) {
    let world =
        World::with(Setup::new(ServeMode::Passthrough).script(move |request, supervisor| match request {
            // There is room for one backing.
            ServerRequest::Reserve { key, .. } => {
                let other = supervisor.files.lock().unwrap().keys().find(|k| *k != key).cloned()?;
                Some((ServerReply::Evict(vec![other]), None))
            }
            ServerRequest::Evict { .. } if !is_unused => Some((ServerReply::Evicted(Vec::new()), None)),
            _ => None,
        }));
    let first = world.memory_ino();
    assert_eq!(reply(&world.open(first)), Ok(Opened::Backing(1)));
    let second = world.import("web:2", &content(3));
    let ino = world.find(&format!("by-id/{second}/memory")).unwrap().attributes.ino;
    let opened = reply(&world.open(ino));
    (world, first, opened)
}

#[test]
fn an_unused_backing_makes_room_for_another_one() {
    let (world, first, opened) = evict(true);
    assert_eq!(opened, Ok(Opened::Backing(2)));
    assert_eq!(world.fs.stats.get(Counter::Evictions), 1);
    // The evicted backing is made again at the next open.
    assert_eq!(reply(&world.open(first)), Ok(Opened::Backing(3)));
    assert_eq!(world.fs.stats.get(Counter::HydrationsDone), 3);
}

#[test]
fn a_backing_in_use_is_not_evicted() {
    let (world, first, opened) = evict(false);
    assert_eq!(opened, Err(Refusal::NoSpace));
    assert_eq!(world.fs.stats.get(Counter::Evictions), 0);
    assert_eq!(world.open(first).try_recv(), Ok(Ok(Opened::Backing(1))));
}

#[test]
fn an_open_during_an_eviction_waits_for_its_outcome() {
    let (setup, gate) =
        Setup::new(ServeMode::Passthrough).hold(|request| matches!(request, ServerRequest::Evict { .. }));
    let world = World::with(setup.script(move |request, supervisor| match request {
        ServerRequest::Reserve { key, .. } => {
            let first = supervisor.files.lock().unwrap().keys().find(|k| *k != key).cloned()?;
            Some((ServerReply::Evict(vec![first]), None))
        }
        ServerRequest::Evict { .. } => Some((ServerReply::Evicted(Vec::new()), None)),
        _ => None,
    }));
    let first = world.memory_ino();
    assert_eq!(reply(&world.open(first)), Ok(Opened::Backing(1)));
    let second = world.import("web:2", &content(3));
    let ino = world.find(&format!("by-id/{second}/memory")).unwrap().attributes.ino;
    let refused = world.open(ino);
    wait_for("the eviction", || {
        (world.supervisor.count(|r| matches!(r, ServerRequest::Evict { .. })) == 1).then_some(())
    });
    let waiting = world.open(first);
    assert!(waiting.try_recv().is_err());
    gate.open();
    assert_eq!(reply(&waiting), Ok(Opened::Backing(1)));
    assert_eq!(reply(&refused), Err(Refusal::NoSpace));
}

#[test]
fn a_condemned_template_gets_no_backing() {
    let (world, gate) = gated(ServeMode::Auto, Duration::from_secs(60));
    let ino = world.memory_ino();
    let waiting = world.open(ino);
    wait_for("a frozen backing", || {
        (world.supervisor.count(|r| matches!(r, ServerRequest::Freeze { .. })) == 1).then_some(())
    });
    world.condemn(Some(false));
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| world.fs.backings.stop_condemned());
        assert_eq!(reply(&waiting), Err(Refusal::NoEntry));
        gate.open();
        ended.join().unwrap();
    });
    assert_eq!(world.supervisor.count(|r| matches!(r, ServerRequest::Register { .. })), 0);
    assert_eq!(world.supervisor.count(|r| matches!(r, ServerRequest::Abandon { .. })), 1);
    world.condemn(None);
    assert_eq!(reply(&world.open(ino)), Ok(Opened::Backing(1)));
}

#[test]
fn a_backing_that_is_ready_is_not_served_if_its_template_was_condemned_meanwhile() {
    let (setup, gate) =
        Setup::new(ServeMode::Auto).hold(|request| matches!(request, ServerRequest::Register { .. }));
    let world = World::with(setup);
    let ino = world.memory_ino();
    let waiting = world.open(ino);
    wait_for("a verified backing", || {
        (world.supervisor.count(|r| matches!(r, ServerRequest::Register { .. })) == 1).then_some(())
    });
    world.condemn(Some(false));
    gate.open();
    assert_eq!(reply(&waiting), Err(Refusal::NoEntry));
    // The backing is served if the removal is abandoned.
    world.condemn(None);
    assert_eq!(reply(&world.open(ino)), Ok(Opened::Backing(1)));
    assert_eq!(world.fs.stats.get(Counter::HydrationsStarted), 1);
}

#[test]
fn the_backings_of_vanished_templates_are_evicted() {
    let world = World::new(ServeMode::Auto);
    assert_eq!(reply(&world.open(world.memory_ino())), Ok(Opened::Backing(1)));
    world.fs.backings.evict_vanished(&world.store);
    assert_eq!(world.fs.stats.get(Counter::Evictions), 0);
    let image = world.dir.path().join(format!("store/images/{}", world.digest));
    std::fs::rename(image, world.dir.path().join("gone")).unwrap();
    world.fs.backings.evict_vanished(&world.store);
    assert_eq!(world.fs.stats.get(Counter::Evictions), 1);
}

#[test]
fn more_opens_than_slots_do_not_wait() {
    for (mode, expected) in [(ServeMode::Auto, Refusal::Stale), (ServeMode::Passthrough, Refusal::Crowded)] {
        let (world, gate) = gated(mode, Duration::from_secs(60));
        let ino = world.memory_ino();
        let waiting: Vec<_> = (0..PARKED_SLOTS).map(|_| world.open(ino)).collect();
        assert_eq!(world.open(ino).try_recv(), Ok(Err(expected)));
        let is_decoded = world.memory_ino() != ino;
        assert_eq!(is_decoded, mode == ServeMode::Auto, "lookups that come next must not wait either");
        gate.open();
        for open in waiting {
            assert_eq!(reply(&open), Ok(Opened::Backing(1)));
        }
        wait_for("the end of the crowd", || (world.memory_ino() == ino).then_some(()));
    }
}

#[test]
fn a_successor_makes_late_backings_and_keeps_their_files_decoded() {
    let world = World::new(ServeMode::Auto);
    let passthrough = world.memory_ino();
    let (gated, gate) = gated(ServeMode::Auto, Duration::from_secs(60));
    let template = gated.fs.tree.template(&gated.digest).unwrap();
    let unknown = FileKey { digest: gated.digest, file: "other".to_owned() };
    let late = vec![(Some(template), gated.key()), (None, unknown)];
    let jobs = gated.fs.backings.restore_late(late);
    assert_eq!(jobs.len(), 1);
    let decoded = gated.memory_ino();
    gated.fs.backings.start(jobs);
    assert_eq!(reply(&gated.open(decoded)), Ok(Opened::Decode));
    gate.open();
    wait_for("the backing", || (gated.memory_ino() != decoded).then_some(()));
    assert!(world.fs.backings.restore_late(Vec::new()).is_empty());
    assert_eq!(world.lookup(ROOT, "."), world.find("."));
    assert_ne!(passthrough, 0);
}

#[test]
fn only_temporary_errors_are_retried() {
    let of = |errno| Error::failed("x").because(std::io::Error::from_raw_os_error(errno));
    assert!(
        is_temporary(&of(libc::ENOSPC))
            && is_temporary(&of(libc::EIO))
            && is_temporary(&Error::try_again("x"))
    );
    assert!(!is_temporary(&of(libc::EINVAL)) && !is_temporary(&Error::damage("x")));
}

/// A supervisor of a mount with kernel decode: the file that the kernel decodes holds `bytes`.
fn kernel_world(bytes: Vec<u8>, verified_at: Option<u64>) -> (World, Arc<Gate>) {
    let decoded = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&decoded, &bytes, 0).unwrap();
    let setup = Setup::new(ServeMode::Kernel).script(move |request, supervisor| match request {
        ServerRequest::Freeze { key } => {
            supervisor.files.lock().unwrap().insert(key.clone(), fds::copy(&decoded).unwrap());
            Some((ServerReply::Frozen { verified_at }, Some(fds::copy(&decoded).unwrap())))
        }
        _ => None,
    });
    let (setup, gate) = setup.hold(|request| matches!(request, ServerRequest::Register { .. }));
    (World::with(setup), gate)
}

#[test]
fn with_kernel_decode_a_file_is_served_by_decode_until_its_blocks_are_verified() {
    let (world, gate) = kernel_world(content(7), None);
    assert_eq!(reply(&world.open(world.memory_ino())), Err(Refusal::Stale));
    assert!(reason(&world.supervisor).unwrap().contains("being verified for kernel decode"));
    let decode = world.memory_ino();
    assert_eq!(reply(&world.open(decode)), Ok(Opened::Decode));
    gate.open();
    let ino = wait_for("the promotion", || Some(world.memory_ino()).filter(|ino| *ino != decode));
    assert_eq!(reply(&world.open(ino)), Ok(Opened::Backing(1)));
    let image = world.supervisor.count(
        |request| matches!(request, ServerRequest::Reserve { size, data_bytes, .. } if size == data_bytes && *size < 1 << 16),
    );
    assert_eq!(image, 1, "room is reserved for the metadata, not for a copy");
}

#[test]
fn with_kernel_decode_the_first_open_of_a_verified_file_waits_for_the_kernel() {
    let (world, gate) = kernel_world(content(7), Some(1));
    let open = world.open(world.memory_ino());
    wait_for("the registration", || {
        (world.supervisor.count(|r| matches!(r, ServerRequest::Register { .. })) == 1).then_some(())
    });
    assert!(open.try_recv().is_err());
    gate.open();
    assert_eq!(reply(&open), Ok(Opened::Backing(1)));
}

#[test]
fn with_kernel_decode_wrong_bytes_of_the_kernel_are_never_served() {
    let mut bytes = content(7);
    bytes[3 * BLOCK + 77] ^= 1;
    let (world, gate) = kernel_world(bytes, None);
    gate.open();
    assert_eq!(reply(&world.open(world.memory_ino())), Err(Refusal::Stale));
    let why = wait_for("the reason", || {
        reason(&world.supervisor).filter(|why| why.contains("the kernel decodes other bytes"))
    });
    assert!(why.contains(&format!("offset {}", 3 * BLOCK)), "{why}");
    assert_eq!(world.supervisor.count(|r| matches!(r, ServerRequest::Register { .. })), 0);
    assert_eq!(reply(&world.open(world.memory_ino())), Ok(Opened::Decode));
}
