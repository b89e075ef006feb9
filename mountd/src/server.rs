//! The server: speaks FUSE for one mount. Everything it knows a successor can find again.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Session, SessionACL};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use stencilfs::control::Failure;
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;
use stencilfs::sys::fuse_dev;
use stencilfs::sys::memfd::SharedCounters;
use stencilfs::units::Bytes;

use crate::decode::{Decoder, MAX_READ};
use crate::fuse::Templates;
use crate::hydrate::Hydrator;
use crate::inflight::Flights;
use crate::link::{Answer, Ask, Cache, Hello, Link};
use crate::passthrough::Passthrough;
use crate::replies::Replies;
use crate::sandbox;
use crate::stats::Stats;
use crate::tree::Tree;

/// Decoded blocks that are kept for their neighbours' sake.
const KEEP: Bytes = Bytes::new(16 << 20);

/// Threads that answer the kernel: enough that a few slow reads hold up nobody.
const FEWEST_THREADS: usize = 4;
const MOST_THREADS: usize = 16;

/// Serves until the mount is over. Descriptor 0 is the connection to the kernel, 1 the link to the supervisor.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let (fuse, link) = inherited()?;
    let link = Arc::new(Link::new(link));
    let (hello, counters) = link.hello()?;
    serve(&fuse, &link, hello, counters).inspect_err(|error| {
        let _ = link.ask(&Ask::GiveUp { failure: Failure::from(error) }, None);
    })
}

/// Takes the two descriptors off the numbers where a stray `print` would reach them.
fn inherited() -> Result<(OwnedFd, OwnedFd)> {
    let take = || -> std::io::Result<(OwnedFd, OwnedFd)> {
        let fuse = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
        let link = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        Ok((fuse, link))
    };
    take().map_err(|e| {
        Error::failed("no connection was inherited").because(e).remedy("servers are started by a supervisor")
    })
}

fn serve(fuse: &OwnedFd, link: &Arc<Link>, hello: Hello, counters: OwnedFd) -> Result<()> {
    let page = SharedCounters::map(counters)
        .map_err(|e| Error::failed("cannot map the counters page").because(e))?;
    let stats = Stats::new(page);
    let flights = Flights::begin(stats.clone())?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.clamp(FEWEST_THREADS, MOST_THREADS);
    let replies = Replies::lock(threads, Bytes::new(MAX_READ as u64))?;
    let sockets = handshake_sockets()?;
    // The server makes its backings itself: it needs their folder beside the store.
    let scratch = if let Cache::Directory(dir) = &hello.cache { Some(dir.clone()) } else { None };
    sandbox::enter_making_files(&hello.store, scratch.as_deref())?;
    let tree = Arc::new(Tree::new(Store::open(&hello.store)?));
    let hydrator = Hydrator::new(hello.cache, Arc::clone(link), stats.clone(), cores);
    let passthrough = Passthrough::new(
        hello.serve.parse()?,
        Duration::from_millis(hello.hydrate_timeout_ms),
        hydrator,
        hello.backings,
        stats.clone(),
    );
    let decoder = Decoder::new(KEEP, stats.clone(), replies);
    let filesystem = Templates::new(tree, decoder, passthrough, stats, flights);

    let session = handshake(filesystem, sockets, &hello.init, threads, link, flights)?;
    let taken_over = |e| Error::failed("cannot take over the connection").because(e);
    fuse_dev::replace_descriptor(session.as_fd(), fuse).map_err(taken_over)?;
    if hello.successor {
        // What the predecessor had read and not answered comes again.
        fuse_dev::resend(fuse).map_err(taken_over)?;
    }
    log::info!("serving with {threads} threads");
    session.run().map_err(|e| Error::failed("the connection failed").because(e))
}

/// For the handshake: in the sandbox no socket can be made.
fn handshake_sockets() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::failed("cannot make the sockets of the handshake").because(e.into()))
}

/// fuser insists on an INIT of its own: it gets the kernel's from a socket pair, and its reply goes to the supervisor.
fn handshake(
    filesystem: Templates,
    (ours, theirs): (OwnedFd, OwnedFd),
    init: &[u8],
    threads: usize,
    link: &Link,
    flights: &Flights,
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
    match link.ask(&Ask::Handshake { reply }, Some(flights.table().fd().as_fd()))? {
        Answer::Done => Ok(session),
        other => Err(Error::failed(format!("the supervisor gave an answer to another question: {other:?}"))),
    }
}
