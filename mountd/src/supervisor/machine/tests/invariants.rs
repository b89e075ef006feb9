//! Random sequences of events. The model panics if an action breaks an invariant; invariants over several events are
//! checked here.

use proptest::prelude::*;
use stencilfs::control::{Request, UnmountMode};

use super::super::*;
use super::model::{self, World};
use super::server_model::Key;
use crate::protocol::ServerRequest;

/// One step of a sequence.
#[derive(Debug, Clone, Copy)]
enum Step {
    Pass(u16),
    Introduce,
    Hydrate(Key),
    Abandon(Key),
    /// Requests the registration of a file that is not frozen or not verified.
    RegisterEarly(Key),
    Repeat,
    OutOfTurn,
    Evict(Key),
    LinkCloses,
    CandidateCloses,
    Exits(u8),
    JobEnds,
    JobFails,
    ApplyCondemned,
    Open(Key),
    OpenDecode(Key),
    Close(Key),
    Condemn(u8, Key),
    Confirm(u8, Key),
    Release(u8, Key),
    CallerGone(u8),
    Restart(u8, bool),
    Signal(bool),
    Unmount(u8),
    Answered,
    Watchdog,
    StartsFail(bool),
}

fn key() -> impl Strategy<Value = Key> {
    (0..3u8).prop_map(Key)
}

fn step() -> impl Strategy<Value = Step> {
    let caller = || 1..4u8;
    prop_oneof![
        3 => (0..20_000u16).prop_map(Step::Pass),
        8 => Just(Step::Introduce),
        12 => key().prop_map(Step::Hydrate),
        1 => key().prop_map(Step::Abandon),
        2 => key().prop_map(Step::RegisterEarly),
        2 => Just(Step::Repeat),
        1 => Just(Step::OutOfTurn),
        4 => key().prop_map(Step::Evict),
        2 => Just(Step::LinkCloses),
        2 => Just(Step::CandidateCloses),
        5 => (0..8u8).prop_map(Step::Exits),
        12 => Just(Step::JobEnds),
        2 => Just(Step::JobFails),
        6 => Just(Step::ApplyCondemned),
        6 => key().prop_map(Step::Open),
        3 => key().prop_map(Step::OpenDecode),
        5 => key().prop_map(Step::Close),
        5 => (caller(), key()).prop_map(|(c, k)| Step::Condemn(c, k)),
        6 => (caller(), key()).prop_map(|(c, k)| Step::Confirm(c, k)),
        3 => (caller(), key()).prop_map(|(c, k)| Step::Release(c, k)),
        1 => caller().prop_map(Step::CallerGone),
        2 => (caller(), any::<bool>()).prop_map(|(c, supervisor)| Step::Restart(c, supervisor)),
        1 => any::<bool>().prop_map(Step::Signal),
        1 => caller().prop_map(Step::Unmount),
        3 => Just(Step::Answered),
        1 => Just(Step::Watchdog),
        1 => any::<bool>().prop_map(Step::StartsFail),
    ]
}

/// A world, and the history of its removals.
struct Run {
    world: World,
    /// Number of opens of a template when a caller got the response that the template is condemned.
    settled: HashMap<(CallerId, Key), u64>,
    /// Callers that wait until a template is condemned, and the number of responses when each began to wait.
    waiting: Vec<(CallerId, Key, usize)>,
    /// How often each caller has closed its connection.
    gone: HashMap<u8, u64>,
}

impl Run {
    fn new() -> Run {
        Run { world: World::new(), settled: HashMap::new(), waiting: Vec::new(), gone: HashMap::new() }
    }

    /// Returns the number of a caller's current connection: each new connection has a new number.
    fn caller(&self, caller: u8) -> CallerId {
        CallerId(u64::from(caller) + 10 * self.gone.get(&caller).copied().unwrap_or(0))
    }

    fn opens(&self, key: Key) -> u64 {
        self.world.opens.get(&key.digest()).copied().unwrap_or(0)
    }

    fn is_waiting(&self, caller: CallerId) -> bool {
        self.world.pending_requests.get(&caller).is_some_and(|count| *count > 0)
    }

    fn request(&mut self, caller: CallerId, request: Request) {
        self.world.send(Event::Request(caller, request, Some(model::file())));
    }

    /// Makes a request of the current server, unless the server waits for a reply.
    fn request_of_current(&mut self, request: ServerRequest) {
        let Some(id) = self.world.machine.current().map(|server| server.id) else { return };
        if self.world.servers.get(&id).is_some_and(|server| server.pending.is_none()) {
            self.world.request_of(id, request);
        }
    }

    fn introduce(&mut self) {
        let candidate = self.world.candidate();
        let current =
            self.world.machine.current().filter(|server| !server.row.serving).map(|server| server.id);
        if let Some(id) = candidate.or(current)
            && self.world.servers.get(&id).is_some_and(|server| server.pending.is_none())
        {
            self.world.request_of(id, World::handshake(b"reply"));
            self.world.request_of(id, ServerRequest::Serving);
        }
    }

    fn step(&mut self, step: Step) {
        let current = self.world.machine.current().map(|server| server.id);
        match step {
            Step::Pass(milliseconds) => self.world.pass(Duration::from_millis(milliseconds.into())),
            Step::Introduce => self.introduce(),
            Step::Hydrate(key) => {
                let Some(server) = current.and_then(|id| self.world.servers.get(&id)) else { return };
                let filling = self.world.machine.backings().file(&key.file());
                let frozen = filling.is_some_and(|file| {
                    self.world.frozen.contains(&crate::protocol::fds::identity(file).unwrap())
                });
                let next = server.next_step(key, frozen);
                self.request_of_current(next);
            }
            Step::Abandon(key) => self.request_of_current(ServerRequest::Abandon { key: key.file() }),
            Step::RegisterEarly(key) => {
                let file = self.world.machine.backings().file(&key.file());
                let identity = file.map_or((1, 1), |file| crate::protocol::fds::identity(file).unwrap());
                self.request_of_current(ServerRequest::Register {
                    key: key.file(),
                    identity,
                    verified_at: None,
                });
            }
            Step::Repeat => {
                if let Some(id) = current {
                    self.world.repeat(id);
                }
            }
            Step::OutOfTurn => {
                if let Some(id) = current {
                    self.world.request_of(id, ServerRequest::Progress { key: Key(0).file(), bytes: 1 });
                }
            }
            Step::Evict(key) => {
                let Some(server) = current.and_then(|id| self.world.servers.get_mut(&id)) else { return };
                if server.pending.is_none() {
                    let keys = server.withdraw(&[key]);
                    self.request_of_current(ServerRequest::Evict { keys });
                }
            }
            Step::LinkCloses => {
                if let Some(id) = current {
                    self.world.send(Event::LinkClosed(id));
                }
            }
            Step::CandidateCloses => {
                if let Some(id) = self.world.candidate() {
                    self.world.send(Event::LinkClosed(id));
                }
            }
            Step::Exits(which) => {
                let leaving: Vec<ServerId> =
                    self.world.servers.iter().filter(|(_, s)| s.is_killed).map(|(id, _)| *id).collect();
                if let Some(id) = leaving.get(which as usize % leaving.len().max(1)) {
                    self.world.send(Event::Exited(*id));
                }
            }
            Step::JobEnds => self.world.finish_job(|_| true),
            Step::JobFails => self.world.fail_jobs(),
            Step::ApplyCondemned => self.world.apply_condemned_list(),
            Step::Open(key) => drop(self.world.open_passthrough(key)),
            Step::OpenDecode(key) => self.world.open_decode(key),
            Step::Close(key) => self.world.close_file(key),
            Step::Condemn(caller, key) => {
                let caller = self.caller(caller);
                if !self.is_waiting(caller) {
                    self.waiting.push((caller, key, self.world.responses.len()));
                    self.request(caller, Request::Condemn { digests: vec![key.digest()] });
                }
            }
            Step::Confirm(caller, key) => self.confirm(self.caller(caller), key),
            Step::Release(caller, key) => {
                let caller = self.caller(caller);
                if !self.is_waiting(caller) {
                    self.settled.remove(&(caller, key));
                    self.request(caller, Request::Release { digests: vec![key.digest()], removed: false });
                }
            }
            Step::CallerGone(number) => {
                let caller = self.caller(number);
                *self.gone.entry(number).or_default() += 1;
                self.settled.retain(|(holder, _), _| *holder != caller);
                self.waiting.retain(|(waiting, ..)| *waiting != caller);
                self.world.send(Event::CallerGone(caller));
            }
            Step::Restart(caller, supervisor) => {
                let caller = self.caller(caller);
                if !self.is_waiting(caller) {
                    self.request(caller, Request::Restart { supervisor });
                }
            }
            Step::Signal(may_abort) => self.world.send(Event::Signal { may_abort }),
            Step::Unmount(caller) => {
                let caller = self.caller(caller);
                if !self.is_waiting(caller) {
                    self.request(caller, Request::Unmount { mode: UnmountMode::Plain });
                }
            }
            Step::Answered => self.world.answers += 1,
            Step::Watchdog => {
                let actions = self.world.machine.replace_server("requested by the test");
                self.world.execute(actions);
            }
            Step::StartsFail(fail) => self.world.start_error = fail,
        }
    }

    /// Confirms a removal. A template that is still condemned must not have been opened since; an unused template is
    /// removed.
    fn confirm(&mut self, caller: CallerId, key: Key) {
        let Some(opens) = self.settled.get(&(caller, key)).copied().filter(|_| !self.is_waiting(caller))
        else {
            return;
        };
        self.request(caller, Request::Confirm { digests: vec![key.digest()] });
        let confirmed = self.world.responses.last().is_some_and(|(_, response)| response.is_ok());
        if confirmed {
            assert_eq!(self.opens(key), opens, "a condemned template was opened");
            if self.world.is_unused(key) {
                self.request(caller, Request::Release { digests: vec![key.digest()], removed: true });
            }
        }
        self.settled.remove(&(caller, key));
    }

    fn note_settled(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|(caller, key, from)| {
            let response = self.world.responses[*from..].iter().find(|(other, _)| other == caller);
            if response.is_some() {
                self.settled.insert((*caller, *key), self.opens(*key));
            }
            response.is_none()
        });
        self.waiting = waiting;
    }

    fn check(&self) {
        let resends = self.world.log.iter().filter(|line| line.as_str() == "Resend").count() as u64;
        let (exits, dismissed) = (self.world.exits, self.world.dismissed);
        assert!(resends <= exits + dismissed, "{resends} resends for {exits} exits");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_events_breaks_an_invariant(steps in proptest::collection::vec(step(), 1..150)) {
        let mut run = Run::new();
        for step in steps {
            run.step(step);
            run.note_settled();
            if run.world.gave_up {
                break;
            }
            run.check();
        }
    }

    /// Each server that exits causes one resend, in any sequence of events.
    #[test]
    fn each_death_causes_one_resend(steps in proptest::collection::vec(step(), 1..100)) {
        let mut run = Run::new();
        run.introduce();
        for step in steps {
            run.step(step);
        }
        while let Some(id) = run.world.servers.iter().find(|(_, server)| server.is_killed).map(|(id, _)| *id) {
            run.world.send(Event::Exited(id));
        }
        let resends = run.world.log.iter().filter(|line| line.as_str() == "Resend").count() as u64;
        prop_assert_eq!(resends, run.world.exits + run.world.dismissed);
    }
}
