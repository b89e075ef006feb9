//! A server without FUSE and without privileges, for unit tests: a real store, and a supervisor that is a thread.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use stencilfs::control::{
    BackingKind, CONTROL_VERSION, Channel, Chosen, CondemnedRow, MountOptions, OnDamage, Op, RequestInfo,
    ServeMode, Snapshot,
};
use stencilfs::progress::Silent;
use stencilfs::store::{BLOCK_SIZE, Digest, FileKind, ImportFile, ImportRequest, Source, Store};
use stencilfs::sys::memory::memfd::{self, SharedCounters};
use stencilfs::sys::process::ProcessId;
use stencilfs::units::Bytes;
use tempfile::TempDir;

use crate::protocol::link::Link;
use crate::protocol::stats::Stats;
use crate::protocol::{Cache, FileKey, Numbered, ServerReply, ServerRequest, fds};
use crate::server::backings::hydrate::Hydrator;
use crate::server::backings::{Backings, EarlierBacking};
use crate::server::fs::{FileSystem, FoundEntry};
use crate::server::in_flight::Flights;
use crate::server::pending::Opened;
use crate::server::read::Reader;
use crate::server::read::damage::DamagedReads;
use crate::server::read::decode::Decoder;
use crate::server::read::outage::StoreOutage;
use crate::server::read::reply_buffers::Replies;
use crate::server::refusal::Refusal;
use crate::server::tree::Tree;
use crate::server::tree::condemned::Condemned;
use crate::server::tree::node::ROOT;

pub const BLOCK: usize = BLOCK_SIZE as usize;

/// Longest wait of a test for a state.
const LIMIT: Duration = Duration::from_secs(60);

/// Largest READ of the tests, in bytes; smaller than that of a real server, as a user may lock little memory.
const LARGEST_READ: u64 = 512 << 10;

/// Waits until `found` returns a value.
pub fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A reply of the supervisor, with a descriptor.
pub type Answer = (ServerReply, Option<OwnedFd>);

/// Replies to requests that differ from the default ones; `None` for the default.
pub type Script = Box<dyn FnMut(&ServerRequest, &Supervisor) -> Option<Answer> + Send>;

/// A supervisor that records the requests of the server.
#[derive(Default)]
pub struct Supervisor {
    pub requests: Mutex<Vec<ServerRequest>>,
    /// Backings by file.
    pub files: Mutex<HashMap<FileKey, OwnedFd>>,
    registered: AtomicU32,
}

impl Supervisor {
    /// Returns the reply of a supervisor whose cache has space for all backings.
    fn answer(&self, request: &ServerRequest) -> Answer {
        match request {
            ServerRequest::Reserve { key, size, .. } => {
                let file = memfd::create("backing", Bytes::new(*size)).unwrap();
                self.files.lock().unwrap().insert(key.clone(), fds::copy(&file).unwrap());
                (ServerReply::Created, Some(file))
            }
            ServerRequest::Register { key, identity, .. } => {
                let files = self.files.lock().unwrap();
                assert!(fds::has_identity(&files[key], *identity), "another file was verified");
                (ServerReply::Registered(self.registered.fetch_add(1, Ordering::Relaxed) + 1), None)
            }
            ServerRequest::Evict { keys } => {
                self.files.lock().unwrap().retain(|key, _| !keys.contains(key));
                (ServerReply::Evicted(keys.clone()), None)
            }
            ServerRequest::Freeze { key } => {
                let file = fds::copy(&self.files.lock().unwrap()[key]).unwrap();
                (ServerReply::Frozen { verified_at: None }, Some(file))
            }
            _ => (ServerReply::Done, None),
        }
    }

    /// Returns the bytes of a backing.
    pub fn backing(&self, key: &FileKey) -> Vec<u8> {
        let file = fs::File::from(fds::copy(&self.files.lock().unwrap()[key]).unwrap());
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        bytes
    }

    /// Returns how many requests satisfy `wanted`.
    pub fn count(&self, wanted: impl Fn(&ServerRequest) -> bool) -> usize {
        self.requests.lock().unwrap().iter().filter(|request| wanted(request)).count()
    }
}

/// A gate that holds back replies of the supervisor until the test opens the gate.
#[derive(Default)]
pub struct Gate(Mutex<bool>, Condvar);

impl Gate {
    pub fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn pass(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
    }
}

/// Selects the requests whose replies wait at the gate. All later requests wait too: a link carries one at a time.
pub type Held = (fn(&ServerRequest) -> bool, Arc<Gate>);

/// Starts a supervisor; returns a link to it.
pub fn supervise(supervisor: Arc<Supervisor>, mut script: Script, held: Option<Held>) -> Arc<Link> {
    let (ours, theirs) = Channel::pair().unwrap();
    std::thread::spawn(move || {
        while let Ok(Some((request, _))) = ours.receive::<Numbered<ServerRequest>>() {
            let Numbered { number, body } = request;
            supervisor.requests.lock().unwrap().push(body.clone());
            if let Some((is_held, gate)) = &held
                && is_held(&body)
            {
                gate.pass();
            }
            let (body, fd) = script(&body, &supervisor).unwrap_or_else(|| supervisor.answer(&body));
            let _ = ours.send(&Numbered { number, body }, fd.as_ref().map(AsFd::as_fd));
        }
    });
    Arc::new(Link::new(theirs.into(), None, None))
}

/// The configuration of a server in a test.
pub struct Setup {
    pub mode: ServeMode,
    pub cache: Cache,
    pub hydrate_timeout: Duration,
    pub longest_wait: Duration,
    pub on_damage: OnDamage,
    pub earlier: Vec<EarlierBacking>,
    pub script: Script,
    pub held: Option<Held>,
}

impl Setup {
    pub fn new(mode: ServeMode) -> Setup {
        Setup {
            mode,
            cache: Cache::Memory,
            hydrate_timeout: LIMIT,
            longest_wait: LIMIT,
            on_damage: OnDamage::Eio,
            earlier: Vec::new(),
            script: Box::new(|_, _| None),
            held: None,
        }
    }

    /// Holds back the replies to these requests until the gate is opened.
    pub fn hold(self, is_held: fn(&ServerRequest) -> bool) -> (Setup, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        (Setup { held: Some((is_held, Arc::clone(&gate))), ..self }, gate)
    }

    pub fn script(
        mut self,
        script: impl FnMut(&ServerRequest, &Supervisor) -> Option<Answer> + Send + 'static,
    ) -> Setup {
        self.script = Box::new(script);
        self
    }
}

/// A store with one template `web:1`, and a server for it.
pub struct World {
    pub dir: TempDir,
    pub store: Store,
    pub digest: Digest,
    /// Content of the template's file `memory`.
    pub memory: Vec<u8>,
    pub fs: FileSystem,
    pub link: Arc<Link>,
    pub supervisor: Arc<Supervisor>,
}

/// Returns `blocks` blocks: each third one is zero, the others have text and their number.
pub fn content(blocks: usize) -> Vec<u8> {
    let block = |number: usize| {
        let line = format!("block {number} of the guest's memory\n");
        let bytes = line.bytes().cycle().take(BLOCK);
        if number % 3 == 1 { vec![0; BLOCK] } else { bytes.collect() }
    };
    (0..blocks).flat_map(block).collect()
}

impl World {
    /// Returns a list of condemned templates: with this world's template if `removed` is given, else empty.
    fn condemned_rows(&self, removed: Option<bool>) -> Vec<CondemnedRow> {
        removed.map(|removed| CondemnedRow { digest: self.digest, removed }).into_iter().collect()
    }

    /// Replaces the server's list of condemned templates, as described for [`World::condemned_rows`].
    pub fn condemn(&self, removed: Option<bool>) {
        self.fs.condemned.change(&self.condemned_rows(removed));
    }

    pub fn new(mode: ServeMode) -> World {
        World::with(Setup::new(mode))
    }

    pub fn with(setup: Setup) -> World {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        let memory = content(7);
        let digest = import(&dir, &store, "web:1", &memory);
        World::serve(dir, store, (digest, memory), setup)
    }

    /// Starts another server for the same store.
    pub fn succeed(self, setup: Setup) -> World {
        let World { dir, digest, memory, .. } = self;
        let store = Store::open(&dir.path().join("store")).unwrap();
        World::serve(dir, store, (digest, memory), setup)
    }

    fn serve(dir: TempDir, store: Store, (digest, memory): (Digest, Vec<u8>), setup: Setup) -> World {
        let Setup { mode, cache, hydrate_timeout, longest_wait, on_damage, earlier, script, held } = setup;
        let supervisor = Arc::new(Supervisor::default());
        let link = supervise(Arc::clone(&supervisor), script, held);
        let stats = Stats::new(SharedCounters::create().unwrap());
        let condemned = Condemned::new(&[]);
        let tree = Arc::new(Tree::new(store.clone(), 64, Arc::clone(&condemned)));
        let kind = if mode == ServeMode::Kernel { BackingKind::Kernel } else { BackingKind::Copy };
        let hydrator =
            Hydrator::new((kind, cache), Arc::clone(&link), stats.clone(), Arc::clone(&condemned), 2);
        let backings = Backings::new(mode, hydrate_timeout, hydrator, earlier, stats.clone());
        let replies = Replies::lock(2, Bytes::new(LARGEST_READ)).unwrap();
        let decoder = Decoder::new(Bytes::new(16 << 20), stats.clone(), replies);
        let damaged = DamagedReads::start(on_damage, Arc::clone(&link)).unwrap();
        let reader = Arc::new(Reader::new(Arc::clone(&tree), decoder, damaged, stats.clone()));
        let outage = StoreOutage::new(store.clone(), Arc::clone(&reader), stats.clone(), longest_wait);
        let flights = Flights::create(stats.clone()).unwrap();
        let fs = FileSystem { tree, reader, outage, backings, condemned, stats, flights };
        World { dir, store, digest, memory, fs, link, supervisor }
    }

    pub fn import(&self, tag: &str, bytes: &[u8]) -> Digest {
        import(&self.dir, &self.store, tag, bytes)
    }

    pub fn key(&self) -> FileKey {
        FileKey { digest: self.digest, file: "memory".to_owned() }
    }

    /// Returns the paths of the store's packs.
    pub fn packs(&self) -> Vec<PathBuf> {
        let template = self.store.template(&self.digest).unwrap();
        template.packs().iter().map(|pack| pack.as_ref().to_owned()).collect()
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<FoundEntry, Refusal> {
        let mut found = None;
        self.fs.lookup(request(Op::Lookup, parent), name.as_ref(), |reply| found = Some(reply));
        found.unwrap()
    }

    /// Looks up a path below the root.
    pub fn find(&self, path: &str) -> Result<FoundEntry, Refusal> {
        let mut found = self.lookup(ROOT, ".");
        for name in path.split('/') {
            found = self.lookup(found?.attributes.ino, name);
        }
        found
    }

    /// Looks up the inode number of the template's file `memory`.
    pub fn memory_ino(&self) -> u64 {
        self.find(&format!("by-id/{}/memory", self.digest)).unwrap().attributes.ino
    }

    /// Opens a file; the receiver gets the reply.
    pub fn open(&self, ino: u64) -> Receiver<Result<Opened, Refusal>> {
        let (sender, receiver) = channel();
        let send = move |reply| assert_eq!(sender.send(reply), Ok(()));
        self.fs.open(request(Op::Open, ino), rustix::fs::OFlags::RDONLY, Box::new(send));
        receiver
    }

    /// Reads a file; the receiver gets the reply.
    pub fn read(&self, ino: u64, offset: u64, size: usize) -> Receiver<Result<Vec<u8>, Refusal>> {
        self.read_by(0, ino, offset, size)
    }

    /// Same as [`read`](Self::read), as a READ that this thread has requested.
    pub fn read_by(
        &self,
        thread: u32,
        ino: u64,
        offset: u64,
        size: usize,
    ) -> Receiver<Result<Vec<u8>, Refusal>> {
        let (sender, receiver) = channel();
        let request = RequestInfo { offset, size: size as u32, thread, ..request(Op::Read, ino) };
        let send =
            move |reply: Result<&[u8], Refusal>| assert!(sender.send(reply.map(<[u8]>::to_vec)).is_ok());
        self.fs.read(request, send);
        receiver
    }
}

/// Receives a reply; panics if there is none.
pub fn reply<T>(receiver: &Receiver<T>) -> T {
    receiver.recv_timeout(LIMIT).expect("no reply")
}

pub fn request(op: Op, ino: u64) -> RequestInfo {
    RequestInfo { unique: 1, op, ino, offset: 0, size: 0, thread: 0 }
}

fn import(dir: &TempDir, store: &Store, tag: &str, bytes: &[u8]) -> Digest {
    let path = dir.path().join("source");
    fs::write(&path, bytes).unwrap();
    let file =
        |name: &str, kind| ImportFile { name: name.to_owned(), kind, source: Source::Path(path.clone()) };
    let mut request = ImportRequest::new(Some(tag.parse().unwrap()), vec![file("memory", FileKind::Ram)]);
    request.mode = Some(0o640);
    store.import(request, &Silent).unwrap().digest
}

/// Returns a mount state with the template of `world` in the list of condemned templates, if it is condemned at all.
pub fn snapshot(world: &World, removed: Option<bool>) -> Snapshot {
    let store = format!("--store={}", world.dir.path().join("store").display());
    let options = [store.as_str(), "--", "/mnt"].map(Into::into).into_iter();
    Snapshot {
        control_version: CONTROL_VERSION,
        version: String::new(),
        options: MountOptions::from_args(options).unwrap(),
        device: 0,
        record: PathBuf::new(),
        supervisor: ProcessId::current().unwrap(),
        init: Vec::new(),
        reply: None,
        chosen: Chosen { kind: BackingKind::Copy, cache: Cache::Memory, why: None, most: Bytes::ZERO },
        server: None,
        leaving: Vec::new(),
        page: (0, 0),
        draining: false,
        restarts: 0,
        last_end: None,
        early_ends: 0,
        next_start: None,
        backings: Vec::new(),
        store_id: String::new(),
        condemned: world.condemned_rows(removed),
        counters: BTreeMap::new(),
        latencies: BTreeMap::new(),
    }
}
