//! What the supervisor's threads share: the connection, the backings, the record.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stencilfs::control::{
    FileStatus, MountOptions, MountStatus, Record, RecordDir, Residency, ServeMode, TemplateStatus,
    UnmountMode,
};
use stencilfs::error::{Error, Result};
use stencilfs::store::{Digest, Serving, Store};
use stencilfs::sys::process::ProcessId;
use stencilfs::sys::{fuse_dev, mount, procfs};
use stencilfs::units::Bytes;

use super::backings::Backings;
use super::cache::Chosen;
use crate::link::{Answer, Ask, Cache, FileKey, Hello};
use crate::stats::Stats;

/// A search for users of backings that takes longer is given up.
const SEARCH: Duration = Duration::from_secs(2);

/// One mount, seen from its supervisor.
#[derive(Debug)]
pub struct Shared {
    /// How it was asked for, with canonical paths.
    pub options: MountOptions,
    /// The connection.
    pub fuse: OwnedFd,
    /// The counters.
    pub stats: Stats,
    /// True once the kernel has a reply to its INIT.
    pub greeted: AtomicBool,
    /// Conversations on the control socket.
    pub callers: AtomicUsize,
    device: u64,
    init: Vec<u8>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    record: Option<RecordDir>,
    reply: Option<Vec<u8>>,
    server: Option<ProcessId>,
    restarts: u64,
    backings: Backings,
}

impl Shared {
    /// A mount that nobody serves yet.
    pub fn new(
        options: MountOptions,
        fuse: OwnedFd,
        device: u64,
        init: Vec<u8>,
        record: RecordDir,
        stats: Stats,
        chosen: Chosen,
    ) -> Shared {
        Shared {
            options,
            fuse,
            stats,
            greeted: AtomicBool::new(false),
            callers: AtomicUsize::new(0),
            device,
            init,
            state: Mutex::new(State {
                record: Some(record),
                reply: None,
                server: None,
                restarts: 0,
                backings: Backings::new(chosen),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Folder of the record.
    pub fn record_dir(&self) -> std::path::PathBuf {
        self.state().record.as_ref().map(|r| r.path().to_owned()).unwrap_or_default()
    }

    /// Removes the record; the last thing that is done.
    pub fn close(&self) {
        self.state().record = None;
    }

    /// Writes the record anew.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn write_record(&self) -> Result<()> {
        let me = ProcessId::me()?;
        let state = self.state();
        let Some(dir) = &state.record else { return Ok(()) };
        dir.write(&Record {
            mountpoint: self.options.mountpoint.clone(),
            store: self.options.store.clone(),
            device: self.device,
            supervisor_pid: me.pid,
            supervisor_start: me.start_time,
            server_pid: state.server.map(|s| s.pid),
            server_start: state.server.map_or(0, |s| s.start_time),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// Notes who serves now.
    pub fn set_server(&self, pid: Option<u32>) {
        let server = pid.and_then(|pid| ProcessId::of(pid).ok().flatten());
        {
            let mut state = self.state();
            state.server = server;
            if server.is_none() {
                state.backings.forget_unfinished();
            }
        }
        if let Err(error) = self.write_record() {
            log::error!("{error}");
        }
    }

    /// One more server was lost.
    pub fn count_restart(&self) {
        self.state().restarts += 1;
    }

    /// True once the kernel has a reply to its INIT.
    pub fn is_greeted(&self) -> bool {
        self.greeted.load(Ordering::SeqCst)
    }

    /// What a new server is told.
    pub fn hello(&self, successor: bool) -> Hello {
        let state = self.state();
        let timeout = self.options.hydrate_timeout.as_millis();
        Hello {
            init: self.init.clone(),
            successor,
            store: self.options.store.clone(),
            serve: self.options.serve.name().to_owned(),
            hydrate_timeout_ms: u64::try_from(timeout).unwrap_or(u64::MAX),
            cache: state.backings.chosen().cache.clone(),
            backings: state.backings.ready(),
        }
    }

    /// Answers the server.
    ///
    /// # Errors
    /// What is to be refused, and why.
    pub fn answer(&self, ask: Ask, fd: Option<OwnedFd>) -> Result<Answer> {
        match ask {
            Ask::Handshake { reply } => self.accept_reply(reply)?,
            Ask::Reserve { key, bytes } => return self.state().backings.reserve(key, bytes),
            Ask::Evict { keys } => {
                let secret = Store::open(&self.options.store)?.secret();
                let unused = self.find_unused(secret, keys)?;
                self.state().backings.close(&self.fuse, &unused);
                return Ok(Answer::Evicted(unused));
            }
            Ask::Freeze { key } => self.state().backings.freeze(&key, fd)?,
            Ask::Register { key } => {
                return Ok(Answer::Backing(self.state().backings.register(&self.fuse, &key)?));
            }
            Ask::Decode { key, why } => self.state().backings.decode(key, why),
            Ask::GiveBack { key } => self.state().backings.give_up(&key),
            Ask::Progress { key, bytes } => self.state().backings.progress(&key, bytes),
            Ask::GiveUp { failure } => log::error!("the server cannot start: {}", failure.into_error()),
        }
        Ok(Answer::Done)
    }

    /// Which of `keys` nobody uses. `/proc/PID/maps` of a process that waits for a page of ours can block until a server
    /// answers it, and this thread is the one that starts servers: it waits only so long, then all count as used.
    fn find_unused(&self, secret: [u8; 32], keys: Vec<FileKey>) -> Result<Vec<FileKey>> {
        let (found, answer) = std::sync::mpsc::channel();
        let device = self.device;
        std::thread::spawn(move || {
            let _ = found.send(Backings::find_unused(device, &secret, keys));
        });
        match answer.recv_timeout(SEARCH) {
            Ok(unused) => unused,
            Err(_) => {
                log::warn!("the users of backings could not be found within {SEARCH:?}: none is evicted");
                Ok(Vec::new())
            }
        }
    }

    /// The first reply goes to the kernel; later ones must be the same, for the kernel will not hear them.
    fn accept_reply(&self, reply: Vec<u8>) -> Result<()> {
        let mut state = self.state();
        match &state.reply {
            None => {
                fuse_dev::write_reply(&self.fuse, &reply)
                    .map_err(|e| Error::failed("the kernel does not accept the handshake").because(e))?;
                state.reply = Some(reply);
                Ok(())
            }
            Some(first) if *first == reply => Ok(()),
            Some(_) => Err(Error::failed("this server asks the kernel for other things than the first one")
                .remedy("unmount and mount again with the new version")),
        }
    }

    /// True while a path leads to the mount.
    pub fn is_attached(&self) -> bool {
        procfs::mounts().is_ok_and(|all| {
            all.iter()
                .rfind(|m| m.mountpoint == self.options.mountpoint)
                .is_some_and(|m| m.dev == self.device)
        })
    }

    /// Ends the mount.
    ///
    /// # Errors
    /// [`Code::InUse`](stencilfs::error::Code::InUse) where it is in use and not forced.
    pub fn unmount(&self, mode: UnmountMode) -> Result<()> {
        let path = &self.options.mountpoint;
        let attached = self.is_attached();
        if !attached && mode != UnmountMode::Force {
            return Err(Error::in_use("it is detached already, and served until its last user ends")
                .at(path)
                .remedy("`stencil status` names it; --force ends it, and whoever still needs it"));
        }
        if attached {
            mount::unmount(path, mode != UnmountMode::Plain).map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => Error::in_use("the mount is in use")
                    .at(path)
                    .remedy("stop its users, or detach it with -l: they are then served until they end"),
                _ => Error::io("cannot unmount", path, e),
            })?;
        }
        if mode == UnmountMode::Force {
            match mount::abort_fuse_connection(self.device) {
                // The last user had gone already.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
                other => other.map_err(|e| Error::io("cannot abort the connection", path, e))?,
            }
        }
        Ok(())
    }

    /// Waits until callers have their answers; not for long.
    pub fn wait_for_callers(&self) {
        let until = Instant::now() + Duration::from_secs(2);
        while self.callers.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Page cache of the backings.
    ///
    /// # Errors
    /// When the kernel cannot say.
    pub fn residency(&self) -> Result<Vec<Residency>> {
        self.state().backings.residency()
    }

    /// How the mount does.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn status(&self) -> Result<MountStatus> {
        let store = Store::open(&self.options.store)?;
        let digests = store.digests()?;
        let detached = !self.is_attached();
        let state = self.state();
        let chosen = state.backings.chosen();
        let templates = digests.iter().filter_map(|d| self.template_status(&store, d, &state)).collect();
        Ok(MountStatus {
            mountpoint: self.options.mountpoint.clone(),
            store: self.options.store.clone(),
            device: self.device,
            supervisor_pid: std::process::id(),
            server_pid: state.server.map(|s| s.pid),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            restarts: state.restarts,
            detached,
            serve: self.options.serve.name().to_owned(),
            cache: match &chosen.cache {
                Cache::Directory(dir) => Some(dir.display().to_string()),
                Cache::Memory => Some("memory".to_owned()),
                Cache::Nowhere(_) => None,
            },
            cache_why: match &chosen.cache {
                Cache::Nowhere(why) => Some(why.clone()),
                _ => chosen.why.clone(),
            },
            cache_size: chosen.most,
            cache_used: state.backings.used(),
            templates,
            counters: self.stats.all(),
        })
    }

    fn template_status(&self, store: &Store, digest: &Digest, state: &State) -> Option<TemplateStatus> {
        let template = store.template(digest).inspect_err(|e| log::warn!("{e}")).ok()?;
        let never = match &state.backings.chosen().cache {
            Cache::Nowhere(why) => Some(why.clone()),
            _ => None,
        };
        let files: Vec<FileStatus> = template
            .files()
            .iter()
            .map(|file| {
                let key = FileKey { digest: *digest, file: file.name.clone() };
                let backing = state.backings.get(&key);
                let why = match backing {
                    Some(backing) => backing.why.clone(),
                    None => never.clone(),
                };
                let empty = file.size == Bytes::ZERO;
                let decode = empty
                    || self.options.serve == ServeMode::Decode
                    || self.options.serve == ServeMode::Auto && why.is_some();
                FileStatus {
                    name: file.name.clone(),
                    size: file.size,
                    serving: if decode { Serving::Decode } else { Serving::Passthrough },
                    why,
                    hydrated_bytes: Bytes::new(backing.map_or(0, |b| b.filled)),
                    hydrated: backing.is_some_and(super::backings::Backing::is_ready),
                }
            })
            .collect();
        // What people ask about is the memory: the largest file speaks for the template.
        let largest = files.iter().max_by_key(|f| f.size);
        Some(TemplateStatus {
            digest: *digest,
            serving: largest.map_or(Serving::Decode, |f| f.serving),
            why: largest.and_then(|f| f.why.clone()),
            clones: 0,
            hydrated_bytes: files.iter().map(|f| f.hydrated_bytes).sum(),
            files,
        })
    }
}
