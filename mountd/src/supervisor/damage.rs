//! Stops or kills processes that need a damaged block (`--on-damage`).

use std::collections::VecDeque;
use std::time::Duration;

use rustix::process::Signal;
use stencilfs::control::{FileKey, OnDamage};
use stencilfs::error::Result;
use stencilfs::sanitize::sanitize;
use stencilfs::store::Digest;
use stencilfs::sys::process::holders::name_of;
use stencilfs::sys::process::procfs::{self, Status};
use stencilfs::sys::process::{ProcessId, Thread, times};

/// Largest number of processes and READs that are remembered, so that they are not logged again.
const MAX_LOGGED: usize = 256;

/// A READ: template, hash of the file's name, offset. A server may send long names.
type Read = (Digest, Digest, u64);

/// Processes that needed a damaged block.
#[derive(Debug)]
pub struct DamagedReaders {
    on_damage: OnDamage,
    /// The processes and READs that were logged last: the kernel may repeat the READ for one access.
    logged: VecDeque<(ProcessId, Read)>,
    /// The READ of the last logged thread that got no signal.
    spared: Option<Read>,
}

impl DamagedReaders {
    /// Creates an empty list.
    pub fn new(on_damage: OnDamage) -> DamagedReaders {
        DamagedReaders { on_damage, logged: VecDeque::new(), spared: None }
    }

    /// Sends the signal of the mount's option to the process of a thread that needs a damaged block, and logs the
    /// signal. The processes `own`, this process, threads of the kernel, and threads that started after the READ
    /// `arrived` (in time since boot) get no signal. Does not block.
    pub fn stop(&mut self, (thread, arrived): (u32, Duration), key: &FileKey, offset: u64, own: &[u32]) {
        let place = || format!("template {} file {} offset {offset}", key.digest, sanitize(&key.file));
        let read = (key.digest, Digest::of(key.file.as_bytes()), offset);
        let (signal, done) = match self.on_damage {
            OnDamage::Eio => return,
            OnDamage::Stop => (Signal::STOP, "stopped"),
            OnDamage::Kill => (Signal::KILL, "killed"),
        };
        match signal_process_of(thread, arrived, signal, own) {
            Ok(Target::Signalled(status, process)) => {
                if process.is_some_and(|process| self.logged.contains(&(process, read))) {
                    return;
                }
                if let Some(process) = process {
                    self.logged.truncate(MAX_LOGGED - 1);
                    self.logged.push_front((process, read));
                }
                let advice = match self.on_damage {
                    OnDamage::Stop => {
                        "; end the process and do not continue it with SIGCONT: a guest could read zeros \
                         instead of the page"
                    }
                    _ => "",
                };
                log::error!(
                    template:% = key.digest, file = key.file;
                    "{}: {done} process {} ({}), which needs this page: the page cannot be read{advice}; if the \
                     log reports damage, import the same memory again to repair the template",
                    place(),
                    status.tgid,
                    sanitize(&status.name),
                );
            }
            Ok(Target::Spared(status)) => {
                if self.spared.replace(read) != Some(read) {
                    let kind = if status.is_kernel_thread { "of the kernel" } else { "of this mount" };
                    let name = sanitize(&status.name);
                    log::warn!(
                        template:% = key.digest, file = key.file;
                        "{}: thread {thread} {kind} ({name}) needs this page, which cannot be read, and gets EIO",
                        place()
                    );
                }
            }
            Ok(Target::Ended) => {}
            Err(error) => {
                log::error!(
                    template:% = key.digest, file = key.file;
                    "{}: a process that needs this page was not {done}: {error}; the READ fails with EIO: \
                     end the clones of this template",
                    place()
                );
            }
        }
    }
}

/// What happened to a process that needs a damaged block.
enum Target {
    /// The process, if its id could be read for the log.
    Signalled(Status, Option<ProcessId>),
    /// No signal may be sent to this thread.
    Spared(Status),
    Ended,
}

fn signal_process_of(tid: u32, arrived: Duration, signal: Signal, own: &[u32]) -> Result<Target> {
    // The thread is opened before its status is read. If the status is that of a later thread with the same number, the
    // opened thread has ended, and the signal fails.
    let Some(thread) = Thread::of(tid)? else { return Ok(Target::Ended) };
    let Some(mut status) = procfs::status_of_thread(tid)? else { return Ok(Target::Ended) };
    if times::is_later_thread(tid, arrived)? {
        return Ok(Target::Ended);
    }
    if status.is_kernel_thread || status.tgid == std::process::id() || own.contains(&status.tgid) {
        return Ok(Target::Spared(status));
    }
    // The name is read before the signal: a killed process has no name.
    status.name = name_of(status.tgid);
    let process = ProcessId::of(status.tgid).ok().flatten();
    Ok(if thread.signal(signal)? { Target::Signalled(status, process) } else { Target::Ended })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use stencilfs::sys::process::own_session;

    use super::*;

    /// A child that is killed on drop.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Sleeper {
            Sleeper(own_session(&mut Command::new("sleep")).arg("100").spawn().unwrap())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn signals_readers_but_no_process_of_the_mount_and_no_thread_of_the_kernel() {
        let key = FileKey { digest: Digest::of(b"x"), file: "memory".into() };
        let (reader, server) = (Sleeper::start(), Sleeper::start());
        let mut readers = DamagedReaders::new(OnDamage::Kill);
        let (pid, own, now) = (reader.0.id(), [server.0.id()], times::since_boot());
        // A signal to this process would end the test.
        for thread in [std::process::id(), server.0.id(), u32::MAX >> 1, 0] {
            readers.stop((thread, now), &key, 5 << 16, &own);
            assert!(readers.logged.is_empty(), "thread {thread}");
        }
        assert!(ProcessId::of(server.0.id()).unwrap().unwrap().is_alive());
        DamagedReaders::new(OnDamage::Eio).stop((pid, now), &key, 0, &own);
        // A READ from before the start of the process was that of an earlier thread with the same number.
        readers.stop((pid, now - Duration::from_secs(60)), &key, 0, &own);
        let process = ProcessId::of(pid).unwrap().unwrap();
        assert!(process.is_alive());
        readers.stop((pid, now), &key, 5 << 16, &own);
        readers.stop((pid, now), &key, 5 << 16, &own);
        assert_eq!(readers.logged, [(process, (key.digest, Digest::of(b"memory"), 5 << 16))]);
        assert!(process.wait_for_exit(std::time::Duration::from_secs(5)).unwrap());
    }
}
