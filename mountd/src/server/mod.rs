//! The server: speaks FUSE for one mount. A successor can reconstruct all of its state.

mod adapter;
mod backings;
mod condemn_watcher;
mod fs;
mod in_flight;
mod pending;
mod read;
mod refusal;
mod sandbox;
#[cfg(test)]
mod testing;
mod tree;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Session, SessionACL};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stencilfs::control::{BackingRow, CONTROL_VERSION, Failure, FileKey, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;
use stencilfs::sys::files::descriptor;
use stencilfs::sys::fuse::device;
use stencilfs::sys::memory::memfd::SharedCounters;
use stencilfs::sys::process;
use stencilfs::units::Bytes;

use crate::protocol::fds;
use crate::protocol::ledger;
use crate::protocol::link::{self, Link};
use crate::protocol::named_fds::NamedFds;
use crate::protocol::stats::Stats;
use crate::protocol::{BESIDE, ServerReply, ServerRequest};
use crate::server::adapter::Adapter;
use crate::server::backings::hydrate::{self, Hydrator, Ready};
use crate::server::backings::{Backings, EarlierBacking};
use crate::server::condemn_watcher::Watcher;
use crate::server::fs::FileSystem;
use crate::server::in_flight::Flights;
use crate::server::read::Reader;
use crate::server::read::damage::DamagedReads;
use crate::server::read::decode::{Decoder, MAX_READ};
use crate::server::read::outage::{STORE_TIMEOUT, StoreOutage, retry_while};
use crate::server::read::reply_buffers::Replies;
use crate::server::tree::condemned::Condemned;
use crate::server::tree::{Tree, open_templates};

/// Size of the cache of decompressed blocks, for reads of the other parts of a block.
const BLOCK_CACHE: Bytes = Bytes::new(16 << 20);

/// Number of threads for each processor that fill or verify a backing: most of them wait for the disk.
const HYDRATION_THREADS: usize = 4;

/// Number of threads that serve the kernel: enough that a few slow reads do not block other requests.
const MIN_THREADS: usize = 4;
const MAX_THREADS: usize = 16;

/// Longest wait of a candidate for a reply during startup; then the candidate exits, as its supervisor must have died.
/// The supervisor's timeout for a candidate is far shorter.
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest wait of the only server of a mount for a reply during startup. Long enough for the takeover by another
/// supervisor; limited because a mount without a record is never taken over, and its clones would never end.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(300);

/// The descriptors of a server. All stay open, including unused ones: after the death of the supervisor, a supervisor
/// that takes over duplicates them by their numbers in the arguments of this process.
struct Inherited {
    fuse: OwnedFd,
    link: Arc<Link>,
    counters: OwnedFd,
    ledger: OwnedFd,
    _for_takeover: [OwnedFd; 2],
}

impl Inherited {
    fn from_fds(fds: &mut NamedFds, is_candidate: bool) -> Result<Inherited> {
        let fuse = fds.need("fuse")?;
        let kernel = fds::copy(&fuse)?;
        Ok(Inherited {
            fuse,
            link: Arc::new(Link::new(
                fds.need("link")?,
                Some(kernel),
                Some(if is_candidate { CANDIDATE_TIMEOUT } else { STARTUP_TIMEOUT }),
            )),
            counters: fds.need("counters")?,
            ledger: fds.need("ledger")?,
            _for_takeover: [fds.need("peer")?, fds.need("program")?],
        })
    }
}

/// Serves until the connection is closed. The arguments name the descriptors.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let run = || -> Result<()> {
        // If the server is stopped, the kernel sends SIGHUP to its orphaned process group when the supervisor dies. The
        // server must survive, as it then holds the only descriptors of the mount.
        process::ignore_hangup().map_err(|e| Error::failed("cannot ignore SIGHUP").because(e))?;
        let mut args = args.peekable();
        let is_candidate = args.next_if(|arg| arg == BESIDE).is_some();
        let inherited = Inherited::from_fds(&mut NamedFds::from_args(args)?, is_candidate)?;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        serve(&inherited, cpus.clamp(MIN_THREADS, MAX_THREADS), sandbox::enter).inspect_err(|error| {
            let _ = inherited.link.request_done(&ServerRequest::GiveUp { failure: Failure::from(error) });
        })
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves the connection; `confine` enters the sandbox for the store at a path, and returns the parts of the sandbox
/// that the kernel lacks.
fn serve(
    inherited: &Inherited,
    threads: usize,
    confine: impl FnOnce(&Path) -> Result<Vec<String>>,
) -> Result<()> {
    let Inherited { fuse, link, counters, ledger, .. } = inherited;
    let page = SharedCounters::map(fds::copy(counters)?);
    let stats = Stats::new(page.map_err(|e| Error::failed("cannot map the counters page").because(e))?);
    // The ring is read before the list of condemned templates: each later change of the list increases the count of
    // rings.
    let rings = stats.page().rings();
    let (_, snapshot) = ledger::read(fds::copy(ledger)?)?;
    let Snapshot { init, reply, options, chosen, backings, condemned, .. } = snapshot;
    let condemned = Condemned::new(&condemned);
    // The supervisor may close the backings of removed templates at any time.
    let backings: Vec<BackingRow> =
        backings.into_iter().filter(|b| !condemned.is_removed(&b.key.digest)).collect();
    let flights = Flights::create(stats.clone())?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    // One buffer more, for the thread that answers READs after a store outage.
    let replies = Replies::lock(threads + 1, Bytes::new(MAX_READ as u64))?;
    let max_open = open_templates::max_open();
    let sockets = handshake_sockets()?;
    let late: Vec<FileKey> =
        backings.iter().filter(|b| b.id.is_none() && b.why.is_some()).map(|b| b.key.clone()).collect();
    let backings = earlier(backings);
    // Landlock rules refer to the directory itself, so the store must be reachable before they are made.
    open_store(&options.store, reply.is_some())?;
    let lacks = confine(&options.store)?;
    // Reopened in the sandbox: without capabilities, the server may have less access than before.
    let store = open_store(&options.store, reply.is_some())?;
    let tree = Arc::new(Tree::new(store.clone(), max_open, Arc::clone(&condemned)));
    let scrub_interval = options.scrub_interval;
    let hydrator = Hydrator::new(
        (chosen.kind, chosen.cache),
        Arc::clone(link),
        stats.clone(),
        Arc::clone(&condemned),
        cpus * HYDRATION_THREADS,
    );
    let made = Backings::new(options.serve, options.hydrate_timeout, hydrator, backings, stats.clone());
    let watcher = Watcher {
        condemned: Arc::clone(&condemned),
        tree: Arc::clone(&tree),
        backings: Arc::clone(&made),
        store: store.clone(),
        fuse: fds::copy(fuse)?,
        ledger: fds::copy(ledger)?,
        stats: stats.clone(),
        link: Arc::clone(link),
    };
    let decoder = Decoder::new(BLOCK_CACHE, stats.clone(), replies);
    let damaged = DamagedReads::start(options.on_damage, Arc::clone(link))?;
    let reader = Arc::new(Reader::new(Arc::clone(&tree), decoder, damaged, stats.clone()));
    let outage = StoreOutage::new(store, Arc::clone(&reader), stats.clone(), STORE_TIMEOUT);
    let late = late.into_iter().map(|key| (tree.template(&key.digest).ok(), key)).collect();
    let unfinished = made.restore_late(late);
    let wanted = Arc::clone(&tree);
    let filesystem =
        FileSystem { tree, reader, outage, backings: Arc::clone(&made), condemned, stats, flights };

    let session = handshake(filesystem, sockets, &init, threads, link, (flights, lacks))?;
    let taken_over = |e| Error::failed("cannot take over the connection").because(e);
    device::replace_descriptor(session.as_fd(), fuse).map_err(taken_over)?;
    if reply.is_some() {
        // The kernel sends those requests again that the predecessor has read but not answered.
        device::resend(fuse).map_err(taken_over)?;
    }
    link.request_done(&ServerRequest::Serving)?;
    link.remove_timeout();
    watcher.start(rings);
    made.start(unfinished);
    made.make_all(&wanted);
    made.scrub(&wanted, scrub_interval);
    log::info!("serving with {threads} threads");
    session.run().map_err(|e| Error::failed("the FUSE connection failed").because(e))
}

/// Returns the registered backings with their descriptors, which have the same numbers as in the supervisor. A backing
/// that was registered after the start of this process is not included: the supervisor returns it in reply to a
/// reservation.
fn earlier(rows: Vec<BackingRow>) -> Vec<EarlierBacking> {
    let opened = |row: BackingRow| {
        let (id, number) = (row.id?, row.descriptor?);
        let fd = descriptor::take(number).ok()?;
        let file = fds::has_identity(&fd, row.identity).then_some(fd)?;
        let verified_at = row.verified_at.unwrap_or_else(hydrate::now);
        // A reason at a registered backing is damage.
        let ready = row.why.is_none().then_some(Ready { id, verified_at, file: file.into(), packs: None });
        Some(EarlierBacking { key: row.key, ready })
    };
    rows.into_iter().filter_map(opened).collect()
}

/// Creates the sockets for the handshake, as the sandbox forbids new sockets.
fn handshake_sockets() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::failed("cannot create the sockets of the handshake").because(e.into()))
}

/// Opens the store. A successor waits for a store that is away; meanwhile the kernel queues requests, so that none
/// fails.
fn open_store(dir: &Path, successor: bool) -> Result<Store> {
    let mut logged = !successor;
    retry_while(
        STORE_TIMEOUT,
        |_| successor,
        || {
            Store::open(dir).inspect_err(|error| {
                if !std::mem::replace(&mut logged, true) {
                    log::error!("{error}; waiting up to {STORE_TIMEOUT:?} for the store");
                }
            })
        },
    )
}

/// Performs the FUSE handshake: passes the kernel's INIT request to fuser through a socket pair, and sends the INIT
/// reply of fuser to the supervisor.
fn handshake(
    filesystem: FileSystem,
    (ours, theirs): (OwnedFd, OwnedFd),
    init: &[u8],
    threads: usize,
    link: &Link,
    (flights, lacks): (&Flights, Vec<String>),
) -> Result<Session<Adapter>> {
    let fail = |e: std::io::Error| Error::failed("the handshake failed").because(e);
    rustix::io::write(&ours, init).map_err(|e| fail(e.into()))?;
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    let session = Session::from_fd(Adapter(filesystem), theirs, SessionACL::All, config).map_err(fail)?;
    let mut reply = vec![0; 4096];
    let length = rustix::io::read(&ours, &mut reply[..]).map_err(|e| fail(e.into()))?;
    reply.truncate(length);
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let handshake =
        ServerRequest::Handshake { control_version: CONTROL_VERSION, version, lacks, init_reply: reply };
    match link.request(&handshake, Some(flights.table().fd().as_fd()))? {
        (ServerReply::Done, _) => Ok(session),
        (other, _) => Err(link::unexpected(&other)),
    }
}

#[cfg(test)]
mod tests;
