//! Parallel work on all cores with results in order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use crate::error::{Error, Result};
use crate::sys::process::threads;

/// Blocks in a batch, the unit of parallel work: 1 MiB is read, hashed and compressed at a time.
pub(in crate::store) const BATCH_BLOCKS: usize = 16;

/// Passes each item that `make` sends to `work`, on all cores, and each result to `take`, in the order of `make`.
/// `state` creates the state that a worker reuses between items.
///
/// The number of items in flight is bounded. The first error in that order, or a panic in `make` or `work`, stops the
/// work: later sends fail, and `stop` is set, so that a `make` that waits for an external event can return.
pub(in crate::store) fn ordered<S, I: Send, O: Send>(
    stop: &AtomicBool,
    make: impl FnOnce(&mut dyn FnMut(I) -> Result<()>) -> Result<()> + Send,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I) -> Result<O> + Sync,
    mut take: impl FnMut(O) -> Result<()>,
) -> Result<()> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let (permit, permits) = mpsc::channel::<()>();
    for _ in 0..workers * 3 + 2 {
        // Cannot fail: the receiver `permits` is alive.
        let _ = permit.send(());
    }
    let (to_workers, pieces) = mpsc::channel::<(u64, I)>();
    let pieces = Mutex::new(pieces);
    let (to_taker, done) = mpsc::channel::<(u64, Result<O>)>();
    thread::scope(|scope| {
        for number in 0..workers {
            let (pieces, to_taker, state, work) = (&pieces, to_taker.clone(), &state, &work);
            let started = threads::start_scoped(scope, move || {
                let mut own = None;
                loop {
                    let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, piece)) = next else { return };
                    // An unreported panic would make the caller wait for this item forever.
                    let result = threads::catch_panic(|| work(own.get_or_insert_with(state), piece));
                    if to_taker.send((number, result)).is_err() {
                        return;
                    }
                }
            });
            match started {
                Err(error) if number == 0 => return Err(error),
                // Continue with the workers that were started.
                Err(_) => break,
                Ok(_) => {}
            }
        }
        threads::start_scoped(scope, move || {
            let mut number = 0;
            let mut send = |piece| {
                // Fails after an earlier error, and the caller gets the earlier error.
                let sent = permits.recv().is_ok() && to_workers.send((number, piece)).is_ok();
                number += 1;
                if sent { Ok(()) } else { Err(Error::failed("stopped")) }
            };
            if let Err(error) = threads::catch_panic(|| make(&mut send)) {
                let _ = to_taker.send((number, Err(error)));
            }
        })?;
        let mut waiting = BTreeMap::new();
        let mut next = 0;
        let mut run = || {
            while let Ok((number, result)) = done.recv() {
                waiting.insert(number, result);
                while let Some(result) = waiting.remove(&next) {
                    next += 1;
                    let item = result?;
                    threads::catch_panic(|| take(item))?;
                    // Fails if the thread that runs `make` has finished.
                    let _ = permit.send(());
                }
            }
            Ok(())
        };
        let result = run();
        if result.is_err() {
            stop.store(true, Ordering::Relaxed);
        }
        // Wakes a `make` thread that waits for a permit, and workers that wait for items.
        drop(permit);
        drop(done);
        result
    })
}

#[cfg(test)]
mod tests {
    use crate::store::write::ordered::*;

    #[test]
    fn keeps_the_order_and_limits_items_in_flight() {
        let mut taken = Vec::new();
        let in_flight = std::sync::atomic::AtomicUsize::new(0);
        let make = |send: &mut dyn FnMut(u64) -> Result<()>| {
            (1..=2000).try_for_each(|n| {
                assert!(in_flight.fetch_add(1, Ordering::SeqCst) < 400);
                send(n)
            })
        };
        let work = |_: &mut (), n: u64| {
            if n.is_multiple_of(7) {
                thread::sleep(std::time::Duration::from_micros(300));
            }
            Ok(n)
        };
        let take = |n| {
            in_flight.fetch_sub(1, Ordering::SeqCst);
            taken.push(n);
            Ok(())
        };
        ordered(&AtomicBool::new(false), make, || (), work, take).unwrap();
        assert_eq!(taken, (1..=2000).collect::<Vec<_>>());
    }

    #[test]
    fn returns_the_first_error_in_order_and_stops_a_waiting_make() {
        let stop = AtomicBool::new(false);
        let make = |send: &mut dyn FnMut(i32) -> Result<()>| {
            (1..=20).try_for_each(&mut *send)?;
            while !stop.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            send(21)
        };
        let work = |_: &mut (), n: i32| match n {
            10 => {
                thread::sleep(std::time::Duration::from_millis(20));
                Err(Error::failed("ten"))
            }
            11 => Err(Error::failed("eleven")),
            _ => Ok(n),
        };
        let error = ordered(&stop, make, || (), work, |_| Ok(())).unwrap_err();
        assert_eq!(error.message(), "ten");
    }

    #[test]
    fn a_panic_of_make_or_work_is_an_error() {
        let run = |bad_make: bool| {
            let make = |send: &mut dyn FnMut(i32) -> Result<()>| {
                (0..10_000).try_for_each(|n| {
                    assert!(!bad_make || n != 500, "test");
                    send(n)
                })
            };
            let work = |_: &mut (), n: i32| {
                assert!(bad_make || n != 500, "test");
                Ok(n)
            };
            let mut taken = 0;
            let error = ordered(
                &AtomicBool::new(false),
                make,
                || (),
                work,
                |_| {
                    taken += 1;
                    Ok(())
                },
            );
            (taken, error.unwrap_err().message().to_owned())
        };
        for bad_make in [false, true] {
            assert_eq!(run(bad_make), (500, "a worker thread panicked".to_owned()));
        }
    }
}
