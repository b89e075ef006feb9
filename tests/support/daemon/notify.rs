//! A service manager for one service, which behaves like systemd: it receives the service's notifications, stores the
//! file descriptors that the service sends, and passes them to the next process of the service.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fstat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use rustix::process::{Pid, Signal, kill_process};
use stencilfs::sys::process::inherit_all;

/// The limit for all waits.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The first descriptor number for the copies, above the final numbers from 3 on.
const FIRST_COPY: i32 = 200;

/// One service and its manager. Drop kills the service.
pub struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    log: PathBuf,
    watchdog: Duration,
    child: Option<Child>,
    /// The stored descriptors with their names.
    pub store: Vec<(String, OwnedFd)>,
    /// The assignments that the present process has sent, without descriptors.
    pub heard: Vec<String>,
    /// Messages from processes other than the service's main process.
    pub strangers: Vec<String>,
    last_ping: Instant,
    longest_pause: Duration,
}

impl Manager {
    /// Creates a manager with its notify socket in `dir` and this watchdog timeout.
    pub fn new(dir: &Path, watchdog: Duration) -> Manager {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        sockopt::set_socket_passcred(&socket, true).unwrap();
        Manager {
            socket,
            path,
            log: dir.join("service.log"),
            watchdog,
            child: None,
            store: Vec::new(),
            heard: Vec::new(),
            strangers: Vec::new(),
            last_ping: Instant::now(),
            longest_pause: Duration::ZERO,
        }
    }

    /// Starts the service's process with all stored descriptors.
    pub fn start(&mut self, service: &Command) {
        assert!(self.child.is_none(), "the service is running");
        self.heard.clear();
        let high: Vec<OwnedFd> = self
            .store
            .iter()
            .map(|(_, fd)| rustix::io::fcntl_dupfd_cloexec(fd, FIRST_COPY).unwrap())
            .collect();
        let mut script = String::new();
        for (place, fd) in (3..).zip(&high) {
            script += &format!("exec {place}<&{0} {0}<&-\n", fd.as_raw_fd());
        }
        // WATCHDOG_PID and LISTEN_PID must be the PID of the process itself, which only the shell knows.
        script += "export WATCHDOG_PID=$$\n";
        if !high.is_empty() {
            let names: Vec<&str> = self.store.iter().map(|(name, _)| name.as_str()).collect();
            script += &format!(
                "export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}\n",
                high.len(),
                names.join(":")
            );
        }
        script += "exec \"$@\"";
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]).arg(service.get_program()).args(service.get_args());
        for (key, value) in service.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        command
            .env("NOTIFY_SOCKET", &self.path)
            .env("WATCHDOG_USEC", self.watchdog.as_micros().to_string())
            .current_dir("/")
            .stderr(File::options().create(true).append(true).open(&self.log).unwrap())
            .process_group(0);
        let fds: Vec<_> = high.iter().map(AsFd::as_fd).collect();
        self.child = Some(inherit_all(&mut command, &fds).spawn().unwrap());
        self.last_ping = Instant::now();
        self.longest_pause = Duration::ZERO;
    }

    /// The PID of the service's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the service was not started").id()
    }

    /// The names of the stored descriptors.
    pub fn stored(&self) -> Vec<&str> {
        self.store.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Waits until the present process has sent this assignment.
    #[track_caller]
    pub fn wait_heard(&mut self, word: &str) {
        let until = Instant::now() + TIMEOUT;
        while !self.heard.iter().any(|heard| heard == word) {
            assert!(Instant::now() < until, "no {word} in {:?}", self.heard);
            self.listen(Duration::from_millis(20));
        }
    }

    /// Receives for `time`; returns the number of watchdog notifications and the longest pause between two.
    pub fn watch(&mut self, time: Duration) -> (usize, Duration) {
        let pings = |all: &[String]| all.iter().filter(|word| *word == "WATCHDOG=1").count();
        let (before, until) = (pings(&self.heard), Instant::now() + time);
        (self.last_ping, self.longest_pause) = (Instant::now(), Duration::ZERO);
        while Instant::now() < until {
            self.listen(Duration::from_millis(5));
        }
        (pings(&self.heard) - before, self.longest_pause.max(self.last_ping.elapsed()))
    }

    /// Receives notifications while `act` runs: a service blocks when the socket's buffer is full.
    pub fn during<T: Send>(&mut self, act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(act);
            while !thread.is_finished() {
                self.listen(Duration::from_millis(10));
            }
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sends a signal and waits until the process is gone.
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait_end()
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid() as i32).unwrap(), signal).unwrap();
    }

    /// Hands the process to the caller, which must wait for its exit.
    pub fn give_up(&mut self) -> Child {
        self.child.take().expect("the service was not started")
    }

    /// Waits until the process exits.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the service was not started");
        let until = Instant::now() + TIMEOUT;
        loop {
            self.listen_to(child.id(), Duration::from_millis(5));
            if let Some(status) = child.try_wait().unwrap() {
                // The last notifications.
                self.listen_to(child.id(), Duration::ZERO);
                return status;
            }
            if Instant::now() > until {
                self.child = Some(child);
                panic!("the service has not exited; it sent {:?}", self.heard);
            }
        }
    }

    /// Receives notifications until none arrives for `patience`.
    pub fn listen(&mut self, patience: Duration) {
        self.listen_to(self.pid(), patience);
    }

    fn listen_to(&mut self, main: u32, patience: Duration) {
        let wait = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
        while poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&wait)).is_ok_and(|n| n > 0) {
            let mut text = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253), ScmCredentials(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let got = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut text)], &mut control, flags).unwrap();
            let text = String::from_utf8_lossy(&text[..got.bytes]).into_owned();
            let (mut fds, mut sender) = (Vec::new(), 0);
            for message in control.drain() {
                match message {
                    RecvAncillaryMessage::ScmRights(rights) => fds.extend(rights),
                    RecvAncillaryMessage::ScmCredentials(who) => {
                        sender = who.pid.as_raw_nonzero().get() as u32
                    }
                    _ => {}
                }
            }
            if sender == main {
                self.take(&text, fds);
            } else {
                self.strangers.push(format!("{sender}: {text}"));
            }
        }
    }

    fn take(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let word = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let name = word("FDNAME").unwrap_or("stored").to_owned();
        if word("FDSTORE") == Some("1") {
            for fd in fds {
                // Like systemd, stores a second descriptor of the same open file only once.
                if !self.store.iter().any(|(_, kept)| identity(kept) == identity(&fd)) {
                    self.store.push((name.clone(), fd));
                }
            }
        }
        if word("FDSTOREREMOVE") == Some("1") {
            self.store.retain(|(kept, _)| *kept != name);
        }
        for line in text.lines() {
            if line == "WATCHDOG=1" {
                self.longest_pause = self.longest_pause.max(self.last_ping.elapsed());
                self.last_ping = Instant::now();
            }
            self.heard.push(line.to_owned());
        }
        self.drop_hung_up();
    }

    /// Drops descriptors with EPOLLHUP or EPOLLERR, as systemd does.
    pub fn drop_hung_up(&mut self) {
        self.store.retain(|(_, fd)| {
            let mut look = [PollFd::new(fd, PollFlags::empty())];
            let _ = poll(&mut look, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            !look[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
        });
    }
}

/// An approximation of "the same open file".
fn identity(fd: &OwnedFd) -> (u64, u64, OFlags) {
    let stat = fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino, fcntl_getfl(fd).unwrap())
}

impl Drop for Manager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the service:\n{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
