//! Kills, stops and continues the server of a mount, at moments of one's choice, and keeps the time.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use stencilfs::control::{InFlight, InFlightTable, Op, Phase};
use stencilfs::sys::fuse::control_fs::Waiting;
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::process::procfs;

use super::inflight::find_table;
use super::mount::{TestMount, wait_for};
use super::readers::Finished;

/// Nanoseconds of `CLOCK_MONOTONIC`, as the readers count them.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The death of one server.
#[derive(Debug, Clone)]
pub struct Kill {
    /// When the signal was sent, in nanoseconds of `CLOCK_MONOTONIC`.
    pub at: u64,
    /// Until the process was gone.
    pub gone: Duration,
    /// What it had taken from the kernel and not answered, as its table says after its death.
    pub met: Vec<InFlight>,
}

impl Kill {
    /// True when it held a READ in one of these states.
    pub fn met_read(&self, phases: &[Phase]) -> bool {
        self.met.iter().any(|r| is_read(r) && phases.contains(&r.phase))
    }
}

/// True for a READ.
pub fn is_read(request: &InFlight) -> bool {
    request.opcode == Op::Read as u32
}

/// A server that can be killed without a moment's delay.
struct Aim {
    server: ProcessId,
    process: OwnedFd,
    table: InFlightTable,
}

/// A mount whose servers die.
pub struct Drill<'a> {
    world: &'a TestMount,
    waiting: Waiting,
    kills: Vec<Kill>,
    marks: Vec<u64>,
    cuts: Vec<u64>,
}

impl<'a> Drill<'a> {
    /// None has died yet.
    pub fn new(world: &'a TestMount) -> Drill<'a> {
        let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(world.mountpoint()).unwrap());
        let waiting = Waiting::of(device).unwrap();
        Drill { world, waiting, kills: Vec::new(), marks: Vec::new(), cuts: Vec::new() }
    }

    /// The server that runs now.
    pub fn server(&self) -> ProcessId {
        wait_for("a server", || self.world.recorded_server().filter(ProcessId::is_alive))
    }

    /// Requests without an answer, whether a server has read them or not.
    pub fn unanswered(&self) -> u64 {
        self.waiting.read().unwrap()
    }

    fn aim(&self) -> Aim {
        wait_for("a server with a table", || {
            let server = self.world.recorded_server()?;
            let process = pidfd_open(Pid::from_raw(server.pid as i32)?, PidfdFlags::empty()).ok()?;
            let table = find_table(server.pid)?;
            // The descriptors are fixed now: if the start time still fits, they are that server's.
            server.is_alive().then_some(Aim { server, process, table })
        })
    }

    /// Kills the server, and waits until it is gone: at most a second.
    #[track_caller]
    pub fn kill(&mut self) -> &Kill {
        let aim = self.aim();
        self.shoot(&aim)
    }

    /// Kills the server at the moment when it has such a request; `None` when there is none for `patience`.
    #[track_caller]
    pub fn kill_when(&mut self, patience: Duration, wanted: impl Fn(&InFlight) -> bool) -> Option<&Kill> {
        let aim = self.aim();
        let until = Instant::now() + patience;
        while !aim.table.requests().any(|r| wanted(&r)) {
            if Instant::now() >= until {
                return None;
            }
            std::hint::spin_loop();
        }
        Some(self.shoot(&aim))
    }

    #[track_caller]
    fn shoot(&mut self, aim: &Aim) -> &Kill {
        let at = now();
        pidfd_send_signal(&aim.process, Signal::KILL).unwrap();
        let gone = aim.server.wait_gone(Duration::from_secs(1)).unwrap();
        assert!(gone, "server {} outlives SIGKILL for a second", aim.server.pid);
        let gone = Duration::from_nanos(now() - at);
        self.kills.push(Kill { at, gone, met: aim.table.requests().collect() });
        &self.kills[self.kills.len() - 1]
    }

    /// A moment without a kill, for comparison: what readers feel then is the host's.
    pub fn mark(&mut self) {
        self.marks.push(now());
    }

    /// What the host does from here to the next mark or kill is nobody's.
    pub fn cut(&mut self) {
        self.cuts.push(now());
    }

    /// The mount.
    pub fn world(&self) -> &'a TestMount {
        self.world
    }

    /// All kills so far.
    pub fn kills(&self) -> &[Kill] {
        &self.kills
    }

    /// How many kills met a READ in one of these states.
    pub fn met_reads(&self, phases: &[Phase]) -> usize {
        self.kills.iter().filter(|k| k.met_read(phases)).count()
    }

    /// Prints how often, how fast, and what the readers felt of it. Panics where `status` counts otherwise.
    pub fn report(&self, what: &str, readers: &[Finished]) -> Felt {
        let gone = self.kills.iter().map(|k| k.gone).max().unwrap_or_default();
        println!(
            "{what}: {} kills, the slowest server was gone after {gone:.1?}; READs met: {} taken, {} decoding, {} replying",
            self.kills.len(),
            self.met_reads(&[Phase::Taken]),
            self.met_reads(&[Phase::Decoding]),
            self.met_reads(&[Phase::Replying]),
        );
        let at: Vec<u64> = self.kills.iter().map(|k| k.at).collect();
        let moments = [&at[..], &self.marks, &self.cuts].concat();
        let mut felt = Felt::of(&at, &moments, readers, true);
        let quiet = Felt::of(&self.marks, &moments, readers, false);
        felt.without_kill = quiet.each;
        if !readers.is_empty() {
            let pages: u64 = readers.iter().map(|r| r.pages).sum();
            println!(
                "{what}: {} readers, {pages} pages; stalls at a kill: {}",
                readers.len(),
                Times(&felt.each)
            );
            println!("{what}: of the slowest reader of each kill: {}", Times(&felt.worst));
            if !self.marks.is_empty() {
                println!("{what}: at moments without a kill: {}", Times(&felt.without_kill));
            }
        }
        assert_eq!(self.world.status()["restarts"], self.kills.len());
        felt
    }
}

/// Stops every thread of a process. What a thread does inside the kernel it finishes first.
#[track_caller]
pub fn stop(process: ProcessId) {
    assert!(process.signal(Signal::STOP).unwrap());
    let until = Instant::now() + Duration::from_secs(10);
    while !is_stopped(process.pid) {
        assert!(Instant::now() < until, "process {} does not stop", process.pid);
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn is_stopped(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut states = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")));
    states.all(|text| text.ok().and_then(|t| procfs::parse_stat(&t)).is_none_or(|s| s.state == 'T'))
}

/// How long reads took that met a kill.
#[derive(Debug)]
pub struct Felt {
    /// Of each reader at each kill its longest read; sorted.
    pub each: Vec<Duration>,
    /// Of each kill the longest read of all; sorted.
    pub worst: Vec<Duration>,
    /// Of each reader at each marked moment without a kill its longest read; sorted.
    without_kill: Vec<Duration>,
}

impl Felt {
    /// At each of the moments `at`, until the next of `all`; reads that go on beyond that count for a kill only.
    fn of(at: &[u64], all: &[u64], readers: &[Finished], beyond: bool) -> Felt {
        let mut felt = Felt { each: Vec::new(), worst: Vec::new(), without_kill: Vec::new() };
        for &moment in at {
            let next = all.iter().copied().filter(|&m| m > moment).min().unwrap_or(u64::MAX);
            let longest = |reader: &Finished| {
                let met = reader.stalls.iter().filter(|s| s.end > moment && s.begin < next);
                let met = met.filter(|s| beyond || s.end < next);
                Duration::from_nanos(met.map(|s| s.end - s.begin).max().unwrap_or_default())
            };
            let each: Vec<Duration> = readers.iter().map(longest).collect();
            felt.worst.extend(each.iter().max());
            felt.each.extend(each);
        }
        felt.each.sort();
        felt.worst.sort();
        felt
    }

    /// An error if a kill delays a read by more than 500 ms, or if p99 of the delays is above 50 ms. On a busy host reads take
    /// long without a kill too; there, p99 may be three times theirs, and 200 ms at most. Panics at a delay that no busy host
    /// explains.
    #[track_caller]
    pub fn is_bearable(&self) -> Result<(), String> {
        let (p99, max) = (quantile(&self.each, 0.99), quantile(&self.each, 1.0));
        let without_kill = quantile(&self.without_kill, 0.99);
        assert!(max <= Duration::from_secs(3), "a read was not answered for {max:?}");
        let limit = (without_kill * 3).clamp(Duration::from_millis(50), Duration::from_millis(200));
        match p99 <= limit && max <= Duration::from_millis(500) {
            true => Ok(()),
            false => Err(format!(
                "reads took {p99:?} (p99), at most {max:?}, beside a kill, and {without_kill:?} (p99) without one"
            )),
        }
    }
}

/// Sorted times, in short.
pub struct Times<'a>(pub &'a [Duration]);

impl std::fmt::Display for Times<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, p99, max] = [0.5, 0.99, 1.0].map(|q| quantile(self.0, q));
        write!(f, "p50 {median:.1?}, p99 {p99:.1?}, max {max:.1?} of {}", self.0.len())
    }
}

/// A quantile of sorted times.
pub fn quantile(sorted: &[Duration], q: f64) -> Duration {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * q).ceil() as usize).copied().unwrap_or_default()
}

/// Drops what the kernel may forget of names and pages, on the whole host.
pub fn drop_caches() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}
