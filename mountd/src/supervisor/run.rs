//! The supervisor's event loop: waits for events, passes them to the [`Machine`], and executes the actions it returns.
//!
//! The loop has one thread, which blocks in poll(2) only. Operations that may take long are jobs, in separate
//! processes.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags};
use stencilfs::control::{Channel, Received, Response, Snapshot};
use stencilfs::error::{Error, Result};
use stencilfs::sys::fuse::device;
use stencilfs::sys::poll::poll_for;
use stencilfs::sys::process::{self, ProcessId};

use super::become_program;
use super::callers::{Callers, state_response};
use super::damage::DamagedReaders;
use super::event::{Action, CallerId, Event, Inputs, JobId, JobResult, Role, ServerId, Started, Task};
use super::jobs::{self, Job};
use super::machine::{InitialState, Machine, log_end};
use super::program::Program;
use super::resources::Resources;
use super::server_process::ServerProcess;
use super::service_manager::ServiceManager;
use super::signals::Signals;
use super::watchdog::Watchdog;
use crate::protocol::stats::Counter;

/// Longest wait for jobs and the server after the end of the mount.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// The source of an event: a descriptor that the loop polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signals,
    Connection,
    Listener,
    Caller(CallerId),
    Link(ServerId),
    Exit(ServerId),
    Job(JobId),
}

/// A new mount, or the mount of another supervisor, with its descriptors.
pub struct AcquiredMount {
    /// The initial state of the machine.
    pub initial_state: InitialState,
    /// The descriptors of the mount.
    pub resources: Resources,
    /// The socket to the current server, and the in-flight table of that server.
    pub link: Option<(Channel, Option<OwnedFd>)>,
    /// True if the mount must be detached at once; it then ends with its last mapping.
    pub drains: bool,
}

/// The supervisor of one mount.
#[derive(Debug)]
pub struct Supervisor {
    machine: Machine,
    process: ProcessId,
    resources: Resources,
    servers: HashMap<ServerId, ServerProcess>,
    jobs: Vec<(JobId, Job)>,
    callers: Callers,
    signals: Signals,
    manager: ServiceManager,
    watchdog: Watchdog,
    damaged_readers: DamagedReaders,
    end: Option<Error>,
}

impl Supervisor {
    /// Creates the supervisor of a mount, and executes the first actions of the machine.
    ///
    /// # Errors
    /// Returns an error if the identity of this process cannot be read from `/proc`, or if the current server has
    /// exited.
    pub fn new(
        acquired: AcquiredMount,
        callers: Callers,
        signals: Signals,
        manager: ServiceManager,
    ) -> Result<Supervisor> {
        let AcquiredMount { initial_state, resources, link, drains } = acquired;
        let inputs = inputs(&resources);
        let mut watchdog = Watchdog::new(initial_state.mount.options.watchdog, initial_state.mount.device);
        let damaged_readers = DamagedReaders::new(initial_state.mount.options.on_damage);
        let (server, leaving_processes) =
            (initial_state.server.as_ref().map(|row| row.process), initial_state.leaving.clone());
        let (machine, leaving, actions) = Machine::new(initial_state, &inputs);
        let mut servers = HashMap::new();
        if let (Some(process), Some(current), Some((link, table))) = (server, machine.current(), link) {
            watchdog.watch(table);
            servers.insert(current.id, ServerProcess::open(process, Some(link))?);
        }
        let mut exited = Vec::new();
        for (id, process) in leaving.into_iter().zip(leaving_processes) {
            match ServerProcess::open(process, None) {
                Ok(process) => drop(servers.insert(id, process)),
                Err(_) => exited.push(id),
            }
        }
        let process = ProcessId::current()?;
        let (jobs, end) = (Vec::new(), None);
        let mut supervisor = Supervisor {
            machine,
            process,
            resources,
            servers,
            jobs,
            callers,
            signals,
            manager,
            watchdog,
            damaged_readers,
            end,
        };
        supervisor.execute(actions);
        for id in exited {
            supervisor.handle(Event::Exited(id));
        }
        if drains {
            let actions = supervisor.machine.drain();
            supervisor.execute(actions);
        }
        Ok(supervisor)
    }

    /// Starts a server of this program beside the current server, after this process has executed the program.
    pub fn try_program(&mut self, program: Result<Program>, caller: Option<CallerId>) {
        match program {
            Ok(program) => {
                let actions = self.machine.try_program(program, caller);
                self.execute(actions);
            }
            Err(error) => {
                // The current server continues; the caller of the restart gets the error.
                log::error!("{error}");
                self.execute(Action::answer(caller, Err(error)));
            }
        }
    }

    /// Runs until the mount has ended.
    ///
    /// # Errors
    /// Returns the error if no server ever answered the kernel, with the callers, so that the error can be reported to
    /// them.
    pub fn run(mut self) -> std::result::Result<(), (Error, Callers)> {
        use rustix::mm::{MlockAllFlags, mlockall};
        if let Err(e) = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE) {
            log::warn!("cannot lock the supervisor's memory: {e}");
        }
        while !device::is_over(&self.resources.fuse) {
            if let Some(error) = self.end.take() {
                return Err((error, self.callers));
            }
            self.run_once();
        }
        log::info!("the mount has ended");
        self.handle(Event::MountOver);
        self.manager.stopping();
        let until = Instant::now() + SHUTDOWN_TIMEOUT;
        while (self.machine.has_jobs() || self.machine.current().is_some()) && Instant::now() < until {
            self.run_once();
            // poll(2) does not block any more, since it reports the closed connection.
            std::thread::sleep(Duration::from_millis(2));
        }
        self.servers.values().for_each(ServerProcess::kill);
        self.callers.fail_waiting();
        Ok(())
    }

    fn run_once(&mut self) {
        for source in self.wait() {
            match source {
                Source::Signals => {
                    if let Some(may_abort) = self.signals.take_pending() {
                        self.handle(Event::Signal { may_abort });
                    }
                }
                Source::Listener => {
                    if let Some(gone) = self.callers.accept(&self.resources.listener) {
                        self.handle(Event::CallerGone(gone));
                    }
                }
                Source::Caller(id) => self.read_caller(id),
                Source::Link(id) => self.read_link(id),
                Source::Exit(id) => {
                    self.handle(Event::Exited(id));
                    if !self.machine.tracks(id) {
                        self.servers.remove(&id);
                    }
                }
                Source::Connection | Source::Job(_) => {}
            }
        }
        self.end_jobs();
        let reason = match self.machine.current() {
            Some(server) if server.row.serving => self.watchdog.check(&self.resources.stats),
            Some(server) => self.watchdog.check_startup(server.since),
            None => None,
        };
        if let Some(reason) = reason {
            let actions = self.machine.replace_server(&reason);
            self.execute(actions);
        }
        self.handle(Event::Tick);
        self.manager.ping();
        while let Ok(Some((pid, end))) = process::reap_one() {
            log_end(pid, end);
        }
    }

    fn wait(&self) -> Vec<Source> {
        let mut all: Vec<(Source, BorrowedFd<'_>)> =
            vec![(Source::Signals, self.signals.as_fd()), (Source::Connection, self.resources.fuse.as_fd())];
        if self.callers.has_room() {
            all.push((Source::Listener, self.resources.listener.as_fd()));
        }
        all.extend(self.callers.channels().map(|(id, channel)| (Source::Caller(id), channel)));
        for (id, server) in &self.servers {
            all.extend(server.link.iter().map(|link| (Source::Link(*id), link.as_fd())));
            all.push((Source::Exit(*id), server.pidfd.as_fd()));
        }
        all.extend(self.jobs.iter().map(|(id, job)| (Source::Job(*id), job.channel.as_fd())));
        let events = |source| if source == Source::Connection { PollFlags::empty() } else { PollFlags::IN };
        let mut polled: Vec<PollFd<'_>> =
            all.iter().map(|(source, fd)| PollFd::from_borrowed_fd(*fd, events(*source))).collect();
        let until_wakeup = |at: Instant| at.saturating_duration_since(Instant::now());
        let timeout = self.machine.next_wakeup().map_or(Duration::MAX, until_wakeup);
        if poll_for(&mut polled, Some(timeout.min(self.watchdog.interval()))).is_err() {
            return Vec::new();
        }
        all.iter().zip(&polled).filter(|(_, p)| !p.revents().is_empty()).map(|((s, _), _)| *s).collect()
    }

    fn read_caller(&mut self, id: CallerId) {
        match self.callers.receive(id) {
            Some(Received::Message(request, fd)) => self.handle(Event::Request(id, request, fd)),
            Some(Received::Nothing) => {}
            Some(Received::Closed) | None => {
                self.callers.drop_caller(id);
                self.handle(Event::CallerGone(id));
            }
        }
    }

    fn read_link(&mut self, id: ServerId) {
        let Some(link) = self.servers.get(&id).and_then(|server| server.link.as_ref()) else { return };
        match link.try_receive() {
            Ok(Received::Message(request, fd)) => self.handle(Event::Message(id, request, fd)),
            Ok(Received::Nothing) => {}
            Ok(Received::Closed) | Err(_) => self.handle(Event::LinkClosed(id)),
        }
    }

    fn end_jobs(&mut self) {
        let mut ended = Vec::new();
        self.jobs.retain(|(id, job)| match job.result() {
            Some(result) => {
                ended.push((*id, result));
                false
            }
            None => true,
        });
        for (id, result) in ended {
            self.handle(Event::JobEnded(id, result));
        }
    }

    fn handle(&mut self, event: Event) {
        let actions = self.machine.handle(event, &inputs(&self.resources));
        self.execute(actions);
    }

    /// Executes actions in order. The outcome of an action is handled before the next action.
    fn execute(&mut self, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            if let Some(outcome) = self.perform(action) {
                self.handle(outcome);
            }
        }
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::StartServer(id, role, program) => return Some(self.start_server(id, role, &program)),
            Action::EndServer(id) => {
                let server = self.servers.get_mut(&id)?;
                server.link = None;
                let (status, oom) = server.exit_status();
                server.kill();
                return Some(Event::ServerEnded { id, status, oom });
            }
            Action::KillServer(id) => {
                let server = self.servers.get_mut(&id)?;
                server.link = None;
                server.kill();
            }
            Action::Watch(table) => self.watchdog.watch(table),
            Action::Resend => device::resend(&self.resources.fuse)
                .unwrap_or_else(|e| log::error!("cannot make the kernel send requests again: {e}")),
            Action::Reply(id, reply, file) => {
                let link = self.servers.get(&id)?.link.as_ref()?;
                if let Err(e) = link.try_send(&reply, file.as_ref().map(AsFd::as_fd)) {
                    log::error!("cannot send a reply to the server: {e}");
                    return Some(Event::LinkClosed(id));
                }
            }
            Action::WriteInitReply { id, number, init_reply, is_first } => {
                let result = device::write_reply(&self.resources.fuse, &init_reply);
                return Some(Event::InitReplyWritten { id, number, is_first, result });
            }
            Action::RegisterBacking(id, number, key) => {
                let file = self.machine.backings().file(&key)?;
                let result = device::backing_open(&self.resources.fuse, file.as_fd());
                return Some(Event::BackingRegistered(id, number, key, result));
            }
            Action::CloseBackings(ids) => {
                for id in ids {
                    device::backing_close(&self.resources.fuse, id)
                        .unwrap_or_else(|e| log::error!("cannot close backing {id}: {e}"));
                }
            }
            Action::StartJob(id, task) => match self.start_job(task) {
                Ok(job) => self.jobs.push((id, job)),
                Err(error) => return Some(Event::JobEnded(id, JobResult::Failed(error))),
            },
            Action::Save => {
                let snapshot = self.snapshot(false);
                self.resources.save(&snapshot).unwrap_or_else(|e| log::error!("{e}"));
            }
            Action::WriteRecord => {
                let server = self.machine.current().map(|server| server.row.process);
                let machine = &self.machine;
                let result = self.resources.write_record(machine.mount(), server, machine.program());
                return Some(Event::RecordWritten(result));
            }
            Action::Ring => drop(self.resources.stats.page().ring()),
            Action::Announce => {
                Resources::set_read_ahead(self.machine.mount());
                self.manager.ready(&self.resources, self.machine.program());
                self.callers.report_serving();
            }
            Action::StoreBackings => self.manager.store_backings(self.machine.backings().registered()),
            Action::ForgetBackings(ids) => self.manager.forget_backings(&ids),
            Action::AnnounceStop => self.manager.stopping(),
            Action::StopReader { thread, key, offset, arrived } => {
                let own: Vec<u32> = self.servers.values().map(|server| server.process.pid).collect();
                self.damaged_readers.stop((thread, arrived), &key, offset, &own);
            }
            Action::CountReplaced => self.resources.stats.count(Counter::WatchdogReplaced),
            Action::Respond(caller, response, file) => return self.respond(caller, response, file),
            Action::RespondState(caller) => {
                let response = state_response(&self.snapshot(true));
                let (response, file) = response.map_or_else(|e| (Err(e), None), |(r, fd)| (Ok(r), Some(fd)));
                return self.respond(caller, response, file);
            }
            Action::RespondInodes(caller, numbers) => {
                let response = device::cached_inodes(&self.resources.fuse, &numbers)
                    .map(|known| Response::Inodes { known })
                    .map_err(|e| {
                        Error::failed("cannot determine which inodes the kernel has cached").because(e)
                    });
                return self.respond(caller, response, None);
            }
            Action::KeepCaller(caller, keep) => self.callers.keep(caller, keep),
            Action::BecomeProgram(program, caller) => {
                let current = self.machine.current().and_then(|server| self.servers.get(&server.id));
                let error = become_program::exec(
                    &program,
                    self.machine.program(),
                    &self.resources,
                    current.and_then(|server| server.link.as_ref()),
                    self.callers.channel(caller),
                    self.machine.backings(),
                    &self.machine.mount().options.mountpoint,
                );
                return Some(Event::ExecFailed(caller, error));
            }
            Action::GiveUp(error) => self.end = Some(error),
        }
        None
    }

    fn respond(
        &mut self,
        caller: CallerId,
        response: Result<Response>,
        file: Option<OwnedFd>,
    ) -> Option<Event> {
        let sent = self.callers.respond(caller, response, file);
        (!sent).then_some(Event::CallerGone(caller))
    }

    fn start_server(&mut self, id: ServerId, role: Role, program: &Program) -> Event {
        let mountpoint = &self.machine.mount().options.mountpoint;
        let started =
            ServerProcess::start(&self.resources, self.machine.backings(), program, role, mountpoint);
        Event::ServerStarted(
            role,
            started.map(|server| {
                let process = server.process;
                self.servers.insert(id, server);
                Started { id, process }
            }),
        )
    }

    fn start_job(&self, task: Task) -> Result<Job> {
        let hidden = self.resources.supervisor_only(&self.callers);
        let mount = self.machine.mount();
        match task {
            Task::CreateBacking { size, data } => {
                jobs::create_backing(&hidden, &mount.chosen.cache, size, data)
            }
            Task::FreezeBacking { key, reserved } => {
                let file = self.machine.backings().file(&key);
                let file = file.ok_or_else(|| Error::failed("the file of the backing is closed"))?;
                jobs::freeze_backing(&hidden, (&mount.chosen, &mount.options), &key, file, reserved)
            }
            Task::Remember(key, verified) => jobs::remember(&hidden, &mount.options.store, &key, verified),
            Task::FindUnused(keys) => jobs::find_unused(&hidden, &mount.options.store, mount.device, &keys),
            Task::Unmount(mode) => {
                jobs::unmount(&hidden, &mount.options, mount.device, mode, &self.resources.fuse)
            }
            Task::CloseFiles(files) => jobs::close_files(&hidden, files),
            Task::CheckProgram(program) => jobs::check_program(&program, &self.resources.ledger),
        }
    }

    fn snapshot(&self, serving_only: bool) -> Snapshot {
        self.machine.snapshot(self.process, serving_only, self.resources.stats.figures())
    }
}

fn inputs(resources: &Resources) -> Inputs {
    Inputs { now: Instant::now(), wall: SystemTime::now(), answers: resources.stats.get(Counter::Answers) }
}
