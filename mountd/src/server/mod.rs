//! The server: speaks FUSE for one mount. Everything it knows a successor can find again.

mod attr;
mod condemned;
mod decode;
mod fuse;
mod hydrate;
mod in_flight;
mod node;
mod open_templates;
mod opening;
mod passthrough;
mod read;
mod refusal;
mod reply_buffers;
pub mod sandbox;
mod store_outage;
mod tree;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuser::{Session, SessionACL};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stencilfs::control::{BackingRow, CONTROL_VERSION, Failure, FileKey, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;
use stencilfs::sys::memfd::SharedCounters;
use stencilfs::sys::{descriptor, fuse_dev, process};
use stencilfs::units::Bytes;

use crate::protocol::link::{self, Link};
use crate::protocol::named_fds::Fds;
use crate::protocol::stats::Stats;
use crate::protocol::{BESIDE, ServerReply, ServerRequest};
use crate::protocol::{fds, ledger};
use crate::server::condemned::{Condemned, Watcher};
use crate::server::decode::{Decoder, MAX_READ};
use crate::server::fuse::Templates;
use crate::server::hydrate::Hydrator;
use crate::server::in_flight::Flights;
use crate::server::passthrough::Passthrough;
use crate::server::read::Reader;
use crate::server::reply_buffers::Replies;
use crate::server::store_outage::{AGAIN, LONGEST_WAIT, Source};
use crate::server::tree::Tree;

/// Decoded blocks that are kept for their neighbours' sake.
const KEEP: Bytes = Bytes::new(16 << 20);

/// Threads that answer the kernel: enough that a few slow reads hold up nobody.
const FEWEST_THREADS: usize = 4;
const MOST_THREADS: usize = 16;

/// Such a one ends when its supervisor has died before it served; the supervisor's own limit is far below.
const PATIENCE: Duration = Duration::from_secs(30);

/// Another one has time to be taken over. Nobody may know of it: clones that wait for ever are worse off than clones
/// that end.
const LONG_PATIENCE: Duration = Duration::from_secs(300);

/// What a server is handed. It keeps all of it open, also what it does not use: a supervisor that takes the place of a
/// dead one finds everything here, under the numbers of the arguments.
struct Inherited {
    fuse: OwnedFd,
    link: Arc<Link>,
    counters: OwnedFd,
    ledger: OwnedFd,
    _for_supervisors: [OwnedFd; 2],
}

impl Inherited {
    fn take(fds: &mut Fds, beside: bool) -> Result<Inherited> {
        let fuse = fds.need("fuse")?;
        let kernel = fds::copy(&fuse)?;
        Ok(Inherited {
            fuse,
            link: Arc::new(Link::new(
                fds.need("link")?,
                Some(kernel),
                Some(if beside { PATIENCE } else { LONG_PATIENCE }),
            )),
            counters: fds.need("counters")?,
            ledger: fds.need("ledger")?,
            _for_supervisors: [fds.need("peer")?, fds.need("program")?],
        })
    }
}

/// Serves until the mount is over. The arguments name the descriptors.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let run = || -> Result<()> {
        // One that stands still when its supervisor dies is all that the mount has left.
        process::outlive_hangup().map_err(|e| Error::failed("cannot ignore SIGHUP").because(e))?;
        let mut args = args.peekable();
        let beside = args.next_if(|arg| arg == BESIDE).is_some();
        let inherited = Inherited::take(&mut Fds::from_args(args)?, beside)?;
        serve(&inherited).inspect_err(|error| {
            let _ = inherited.link.call_done(&ServerRequest::GiveUp { failure: Failure::from(error) });
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

fn serve(inherited: &Inherited) -> Result<()> {
    let Inherited { fuse, link, counters, ledger, .. } = inherited;
    let page = SharedCounters::map(fds::copy(counters)?);
    let stats = Stats::new(page.map_err(|e| Error::failed("cannot map the counters page").because(e))?);
    // Before the list of condemned templates is read: what changes it later rings again.
    let rings = stats.page().rings();
    let (_, snapshot) = ledger::read(fds::copy(ledger)?)?;
    let Snapshot { init, reply, options, chosen, backings, condemned, .. } = snapshot;
    let condemned = Condemned::new(&condemned);
    // The supervisor closes these.
    let backings: Vec<BackingRow> =
        backings.into_iter().filter(|b| !condemned.is_removed(&b.key.digest)).collect();
    let flights = Flights::begin(stats.clone())?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.clamp(FEWEST_THREADS, MOST_THREADS);
    // One more for the thread that answers what waited for the store.
    let replies = Replies::lock(threads + 1, Bytes::new(MAX_READ as u64))?;
    let most_open = open_templates::most_open();
    let sockets = handshake_sockets()?;
    let late: Vec<FileKey> =
        backings.iter().filter(|b| b.id.is_none() && b.why.is_some()).map(|b| b.key.clone()).collect();
    let backings = ready(backings);
    // What the sandbox allows is the folder that lies there now: the store must be there first.
    open_store(&options.store, reply.is_some())?;
    let lacks = sandbox::enter(&options.store)?;
    // Without its capabilities the server may see less than before.
    let store = open_store(&options.store, reply.is_some())?;
    let tree = Arc::new(Tree::new(store.clone(), most_open, Arc::clone(&condemned)));
    let hydrator =
        Hydrator::new(chosen.cache, Arc::clone(link), stats.clone(), Arc::clone(&condemned), cores);
    let passthrough =
        Passthrough::new(options.serve, options.hydrate_timeout, hydrator, backings, stats.clone());
    let watcher = Watcher {
        condemned: Arc::clone(&condemned),
        tree: Arc::clone(&tree),
        passthrough: Arc::clone(&passthrough),
        store: store.clone(),
        fuse: fds::copy(fuse)?,
        ledger: fds::copy(ledger)?,
        stats: stats.clone(),
        link: Arc::clone(link),
    };
    let decoder = Decoder::new(KEEP, stats.clone(), replies);
    let reader = Arc::new(Reader::new(Arc::clone(&tree), decoder));
    let source = Source::new(store, Arc::clone(&reader), stats.clone());
    let late = late.into_iter().map(|key| (tree.template(&key.digest).ok(), key)).collect();
    let unfinished = passthrough.know_late(late);
    let filesystem =
        Templates { tree, reader, source, passthrough: Arc::clone(&passthrough), condemned, stats, flights };

    let session = handshake(filesystem, sockets, &init, threads, link, (flights, lacks))?;
    let taken_over = |e| Error::failed("cannot take over the connection").because(e);
    fuse_dev::replace_descriptor(session.as_fd(), fuse).map_err(taken_over)?;
    if reply.is_some() {
        // What the predecessor had read and not answered comes again.
        fuse_dev::resend(fuse).map_err(taken_over)?;
    }
    link.call_done(&ServerRequest::Serving)?;
    link.wait_for_ever();
    watcher.start(rings);
    passthrough.begin(unfinished);
    log::info!("serving with {threads} threads");
    session.run().map_err(|e| Error::failed("the connection failed").because(e))
}

/// The backings that are ready, with their descriptors: they were inherited under the supervisor's numbers. One that
/// became ready after this process was started is not among them; the supervisor hands it over when it is asked for.
fn ready(rows: Vec<BackingRow>) -> Vec<(FileKey, u32, OwnedFd)> {
    let ready = rows.into_iter().filter_map(|row| Some((row.key, row.id?, row.descriptor?, row.identity)));
    let inherited = |(key, id, number, identity)| {
        let fd = descriptor::take(number).ok()?;
        fds::is(&fd, identity).then_some((key, id, fd))
    };
    ready.filter_map(inherited).collect()
}

/// For the handshake: in the sandbox no socket can be made.
fn handshake_sockets() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::failed("cannot make the sockets of the handshake").because(e.into()))
}

/// Opens the store. A successor waits for one that is away: until then the kernel keeps what it asks, and nobody gets an
/// error.
fn open_store(dir: &Path, successor: bool) -> Result<Store> {
    let begun = Instant::now();
    loop {
        match Store::open(dir) {
            Err(error) if successor && begun.elapsed() < LONGEST_WAIT => {
                if begun.elapsed() < AGAIN {
                    log::error!("{error}; waiting for it up to {LONGEST_WAIT:?}");
                }
                std::thread::sleep(AGAIN);
            }
            done => return done,
        }
    }
}

/// fuser insists on an INIT of its own: it gets the kernel's from a socket pair, and its reply goes to the supervisor.
fn handshake(
    filesystem: Templates,
    (ours, theirs): (OwnedFd, OwnedFd),
    init: &[u8],
    threads: usize,
    link: &Link,
    (flights, lacks): (&Flights, Vec<String>),
) -> Result<Session<Templates>> {
    let fail = |e: std::io::Error| Error::failed("the handshake failed").because(e);
    rustix::io::write(&ours, init).map_err(|e| fail(e.into()))?;
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    let session = Session::from_fd(filesystem, theirs, SessionACL::All, config).map_err(fail)?;
    let mut reply = vec![0; 4096];
    let length = rustix::io::read(&ours, &mut reply[..]).map_err(|e| fail(e.into()))?;
    reply.truncate(length);
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let handshake =
        ServerRequest::Handshake { control_version: CONTROL_VERSION, version, lacks, init_reply: reply };
    match link.call(&handshake, Some(flights.table().fd().as_fd()))? {
        (ServerReply::Done, _) => Ok(session),
        (other, _) => Err(link::unexpected(&other)),
    }
}
