//! Access to the host: a scenario that measures the whole host (free memory, KSM, swap) runs alone, all others share
//! the host.

use std::cell::Cell;
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static HOST: RwLock<()> = RwLock::new(());

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// A shared lock on the host. A thread may hold several, but only the first takes the lock: a second read lock would
/// wait behind a writer that waits for the first.
#[derive(Debug)]
pub struct Shared(#[expect(dead_code, reason = "held, not read")] Option<RwLockReadGuard<'static, ()>>);

/// Takes the shared lock, for scenarios that mount, launch processes, or use much memory.
pub fn shared() -> Shared {
    let held = HELD.replace(HELD.get() + 1);
    Shared((held == 0).then(|| HOST.read().unwrap_or_else(PoisonError::into_inner)))
}

impl Drop for Shared {
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
    }
}

/// Takes the exclusive lock, for scenarios that measure the whole host or change its settings.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    HOST.write().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a repeat count: `test` normally, `soak` in `make soak`.
pub fn rounds<N>(test: N, soak: N) -> N {
    if soaking() { soak } else { test }
}

/// Takes a measurement that other load on this host, also in other containers, may disturb: repeats a bad measurement
/// at most twice. `figure` itself must panic at a deviation that no load explains.
#[track_caller]
pub fn measured(mut figure: impl FnMut() -> Result<(), String>) {
    for left in (0..3).rev() {
        match figure() {
            Ok(()) => return,
            Err(off) if left > 0 => println!("measuring again: {off}"),
            Err(off) => panic!("three bad measurements, the last: {off}"),
        }
    }
}

/// Frees and compacts memory, so that the kernel can allocate pages of 2 MiB: earlier file I/O fragments it.
pub fn compact_memory() {
    rustix::fs::sync();
    set("/proc/sys/vm/drop_caches", "3");
    set("/proc/sys/vm/compact_memory", "1");
}

/// Returns true in `make soak`, which uses the long counts and prints measurements.
pub fn soaking() -> bool {
    std::env::var_os("STENCIL_SOAK").is_some()
}

fn set(path: &str, value: &str) {
    std::fs::write(path, value).unwrap_or_else(|e| panic!("{path} = {value}: {e}"));
}

/// An active swap file; drop switches it off and removes it. Only for scenarios that run alone.
pub struct SwapFile(tempfile::TempPath);

impl SwapFile {
    /// Creates and activates a swap file of this size.
    pub fn on(bytes: u64) -> SwapFile {
        let path = tempfile::Builder::new()
            .prefix("swap")
            .tempfile_in(env!("CARGO_TARGET_TMPDIR"))
            .unwrap()
            .into_temp_path();
        let run = |program: &str, args: &[&str]| {
            let done = Command::new(program).args(args).arg(&*path).output().unwrap();
            assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        };
        run("fallocate", &["-l", &bytes.to_string()]);
        run("mkswap", &[]);
        run("swapon", &[]);
        SwapFile(path)
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        let done = Command::new("swapoff").arg(&*self.0).status();
        assert!(done.is_ok_and(|s| s.success()) || std::thread::panicking(), "swapoff");
    }
}

/// KSM with a high scan rate; drop undoes its merges and restores its settings. Only for scenarios that run alone.
pub struct Ksm(Vec<(String, String)>);

impl Ksm {
    /// Switches KSM on.
    pub fn on() -> Ksm {
        let wanted =
            [("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("smart_scan", "0"), ("run", "1")];
        let mut before = Vec::new();
        for (name, value) in wanted {
            let path = format!("/sys/kernel/mm/ksm/{name}");
            let old = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            set(&path, value);
            before.push((path, old.trim().to_owned()));
        }
        Ksm(before)
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        set("/sys/kernel/mm/ksm/run", "2");
        for (path, value) in self.0.iter().rev() {
            set(path, value);
        }
    }
}

/// Waits until the host's available memory changes by less than 1 MiB in each of five steps of 100 ms: memory of
/// earlier scenarios is freed late.
pub fn settle() {
    let available = || stencilfs::clones::baseline::Baseline::now().unwrap().available().get();
    let (mut last, mut still) = (available(), 0);
    for _ in 0..100 {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = available();
        still = if now.abs_diff(last) < 1 << 20 { still + 1 } else { 0 };
        last = now;
        if still >= 5 {
            return;
        }
    }
}
