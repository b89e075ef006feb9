//! Tests of the machine with a model of servers, jobs, the kernel and processes: scenarios, and random sequences of
//! events.

mod initial;
mod invariants;
mod model;
mod server_model;

use std::time::Duration;

use stencilfs::control::{Failure, MAX_INODES, OnDamage, Request, Response, UnmountMode};
use stencilfs::error::{Code, Error};

use super::*;
use crate::protocol::{ServerReply, ServerRequest};
use crate::supervisor::event::JobResult;
use model::World;
use server_model::Key;

const RM: CallerId = CallerId(1);

fn serving_world() -> World {
    let mut world = World::new();
    world.introduce_current();
    world
}

#[test]
fn a_new_mount_starts_a_server_and_announces_it() {
    let mut world = World::new();
    assert_eq!(world.seen("StartServer"), 1);
    world.introduce_current();
    assert_eq!((world.seen("WriteInitReply"), world.seen("Announce"), world.seen("Resend")), (1, 1, 0));
}

#[test]
fn a_dead_server_is_replaced_immediately_and_causes_a_resend_after_its_exit() {
    let mut world = serving_world();
    let dead = world.current();
    world.answers += 1;
    world.send(Event::LinkClosed(dead));
    assert_eq!((world.seen("StartServer"), world.seen("Resend")), (2, 0));
    world.send(Event::LinkClosed(dead));
    world.send(Event::Exited(dead));
    world.send(Event::Exited(dead));
    assert_eq!((world.seen("StartServer"), world.seen("Resend")), (2, 1));
    assert!(!world.machine.tracks(dead) && world.machine.tracks(world.current()));
}

#[test]
fn the_supervisor_gives_up_with_the_reason_of_a_server_that_cannot_start() {
    let mut world = World::new();
    let failure = Failure::from(&Error::failed("no locked memory"));
    world.request(ServerRequest::GiveUp { failure });
    world.send(Event::Exited(world.current()));
    assert!(world.log.iter().any(|line| line.contains("GiveUp") && line.contains("no locked memory")));
}

#[test]
fn a_different_or_rejected_init_reply_is_refused() {
    let mut world = World::new();
    world.init_error = Some(libc::EINVAL);
    let reply = world.request(World::handshake(b"reply"));
    assert!(matches!(reply, Some(ServerReply::Refused(_))));
    assert!(world.machine.mount().init_reply.is_none(), "a rejected reply is not recorded");
    world.init_error = None;
    assert!(matches!(world.request(World::handshake(b"reply")), Some(ServerReply::Done)));
    world.init_error = Some(libc::ENOENT);
    let repeated = world.request(World::handshake(b"reply"));
    assert!(matches!(repeated, Some(ServerReply::Done)), "the kernel has received a reply before");
    let other = world.request(World::handshake(b"other"));
    assert!(matches!(other, Some(ServerReply::Refused(_))));
    let version = ServerRequest::Handshake {
        control_version: 0,
        version: String::new(),
        lacks: Vec::new(),
        init_reply: b"reply".to_vec(),
    };
    assert!(matches!(world.request(version), Some(ServerReply::Refused(_))));
}

#[test]
fn a_server_that_does_not_wait_for_its_reply_is_replaced() {
    let mut world = serving_world();
    let key = Key(0).file();
    world.request(ServerRequest::Reserve { key: key.clone(), size: 1, data_bytes: 1 });
    world.request(ServerRequest::Abandon { key });
    assert_eq!((world.seen("EndServer"), world.seen("StartServer")), (1, 2));
    world.finish_jobs();
    assert_eq!(world.seen("Created"), 0, "the server that made the request is gone");
}

#[test]
fn a_reader_of_a_damaged_block_is_stopped_before_the_reply() {
    let stop = || ServerRequest::StopReader {
        thread: 7,
        key: Key(0).file(),
        offset: 4096,
        arrived: Duration::from_secs(5),
    };
    let mut world = serving_world();
    assert!(matches!(world.request(stop()), Some(ServerReply::Done)));
    assert_eq!(world.seen("StopReader"), 0, "not with --on-damage eio");
    for choice in [OnDamage::Stop, OnDamage::Kill] {
        world.machine.mount.options.on_damage = choice;
        let before = world.log.len();
        assert!(matches!(world.request(stop()), Some(ServerReply::Done)));
        let actions = &world.log[before..];
        assert_eq!(actions.len(), 2, "{actions:?}");
        assert!(
            actions[0].starts_with("StopReader { thread: 7")
                && actions[0].ends_with("offset: 4096, arrived: 5s }")
        );
        assert!(actions[1].starts_with("Reply"), "{actions:?}");
    }
}

#[test]
fn a_backing_is_registered_and_evicted() {
    let mut world = serving_world();
    let id = world.hydrate(Key(0)).expect("a backing");
    assert_eq!(world.seen("StoreBackings"), 1);
    let key = Key(0).file();
    let repeated = world.request(ServerRequest::Reserve { key: key.clone(), size: 1, data_bytes: 1 });
    assert!(matches!(repeated, Some(ServerReply::Registered(other)) if other == id));
    world.evict(&[Key(0)]);
    assert!(world.kernel.is_empty());
    assert_eq!((world.seen("ForgetBackings"), world.seen("CloseFiles")), (1, 1));
}

#[test]
fn a_backing_in_use_is_not_evicted() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    assert!(world.open_passthrough(Key(0)));
    world.evict(&[Key(0)]);
    assert_eq!(world.kernel.len(), 1);
}

#[test]
fn nothing_is_evicted_while_a_candidate_exists() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    world.request(ServerRequest::Evict { keys: vec![Key(0).file()] });
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
    world.finish_jobs();
    assert_eq!(world.kernel.len(), 1, "the candidate was started with this backing");
    world.request(ServerRequest::Evict { keys: vec![Key(0).file()] });
    assert_eq!(world.seen("FindUnused"), 1, "no second search");
}

#[test]
fn the_rejection_of_a_backing_by_the_kernel_is_reported() {
    let mut world = serving_world();
    world.backing_error = Some(libc::ELOOP);
    assert!(world.hydrate(Key(0)).is_none());
    assert!(world.log.iter().any(|line| line.contains("rejects the backing")));
}

#[test]
fn a_request_whose_job_fails_is_refused_and_the_server_continues() {
    let mut world = serving_world();
    let key = Key(0).file();
    world.request(ServerRequest::Reserve { key: key.clone(), size: 1, data_bytes: 1 });
    world.fail_jobs();
    assert_eq!(world.seen("Refused"), 1);
    assert!(matches!(
        world.request(ServerRequest::Freeze { key: key.clone() }),
        Some(ServerReply::Refused(_))
    ));
    assert!(matches!(
        world.request(ServerRequest::Progress { key: key.clone(), bytes: 1 }),
        Some(ServerReply::Done)
    ));
    let reason = Some("no room".to_owned());
    assert!(matches!(world.request(ServerRequest::NoBacking { key, reason }), Some(ServerReply::Done)));
    assert_eq!(world.machine.backings().rows()[0].why.as_deref(), Some("no room"));
}

#[test]
fn a_removal_gets_its_response_when_the_server_applies_the_list() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    let digests = vec![Key(0).digest()];
    world.send(Event::Request(RM, Request::Condemn { digests: digests.clone() }, None));
    assert_eq!((world.seen("Ring"), world.seen("Settled")), (1, 0));
    world.apply_condemned_list();
    assert_eq!(world.seen("Settled"), 1);
    world.send(Event::Request(RM, Request::Confirm { digests: digests.clone() }, None));
    world.send(Event::Request(RM, Request::Release { digests, removed: true }, None));
    world.apply_condemned_list();
    assert!(world.kernel.is_empty(), "the backing is closed after the server has dropped it");
    world.apply_condemned_list();
    assert_eq!(world.seen("Settled"), 2);
    assert!(world.machine.snapshot(model::process(1), false, Figures::default()).condemned.is_empty());
}

/// Otherwise a server that never reads of the removal would answer opens with a closed backing, once the same image is
/// imported again.
#[test]
fn backings_of_a_removal_that_died_are_closed_when_the_server_has_dropped_them() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    let digests = vec![Key(0).digest()];
    world.send(Event::Request(RM, Request::Condemn { digests: digests.clone() }, None));
    world.apply_condemned_list();
    world.send(Event::Request(RM, Request::Release { digests, removed: true }, None));
    world.send(Event::CallerGone(RM));
    assert_eq!(world.kernel.len(), 1, "the server has not dropped the backing yet");
    world.apply_condemned_list();
    assert!(world.kernel.is_empty());
    world.apply_condemned_list();
    assert!(!world.open_passthrough(Key(0)));
    assert!(world.machine.snapshot(model::process(1), false, Figures::default()).condemned.is_empty());
}

#[test]
fn a_disconnected_caller_releases_its_templates_with_a_ring() {
    let mut world = serving_world();
    let digests = vec![Key(0).digest()];
    world.send(Event::Request(RM, Request::Condemn { digests }, None));
    world.send(Event::CallerGone(RM));
    assert_eq!(world.seen("Ring"), 2);
    world.send(Event::CallerGone(RM));
    assert_eq!(world.seen("Ring"), 2);
}

#[test]
fn a_candidate_replaces_the_server_and_the_program() {
    let mut world = serving_world();
    let old = world.current();
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
    world.send(Event::Request(CallerId(2), Request::Restart { supervisor: false }, Some(model::file())));
    assert!(world.log.iter().any(|line| line.contains("another restart")));
    let candidate = world.candidate().expect("a candidate");
    let early = world.request_of(candidate, ServerRequest::Evict { keys: Vec::new() });
    assert!(matches!(early, Some(ServerReply::Refused(_))), "the candidate does not serve yet");
    world.request_of(candidate, World::handshake(b"reply"));
    assert_eq!(world.seen("WriteInitReply"), 1, "the kernel has received a reply before");
    world.request_of(candidate, ServerRequest::Serving);
    assert_eq!((world.current(), world.seen("KillServer")), (candidate, 1));
    world.send(Event::Exited(old));
    assert_eq!(world.seen("Resend"), 1);
    let answered = |line: &String| line.starts_with("Respond(CallerId(1), Ok(Done)");
    assert!(world.log.iter().any(answered));
}

#[test]
fn a_candidate_that_fails_is_dismissed_with_its_reason() {
    for fail in ["exits", "closes", "is late", "gives up"] {
        let mut world = serving_world();
        let current = world.current();
        world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
        let candidate = world.candidate().expect("a candidate");
        match fail {
            "exits" => world.send(Event::Exited(candidate)),
            "closes" => world.send(Event::LinkClosed(candidate)),
            "is late" => world.pass(TRIAL_TIMEOUT * 2),
            _ => {
                let failure = Failure::from(&Error::failed("no store"));
                world.request_of(candidate, ServerRequest::GiveUp { failure });
                world.send(Event::LinkClosed(candidate));
                assert!(world.log.iter().any(|line| line.contains("no store")));
            }
        }
        assert_eq!(world.current(), current, "{fail}");
        assert!(world.log.iter().any(|line| line.contains("does not serve")), "{fail}");
        world.send(Event::Exited(candidate));
        assert!(!world.machine.tracks(candidate), "{fail}");
    }
}

#[test]
fn the_caller_gets_the_error_of_a_candidate_that_cannot_be_started() {
    let mut world = serving_world();
    world.start_error = true;
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
    assert!(world.log.iter().any(|line| line.starts_with("Respond(CallerId(1), Err")));
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, None));
    assert!(world.log.iter().any(|line| line.contains("contains no program")));
}

#[test]
fn a_new_supervisor_program_is_checked_and_executed_when_no_job_runs() {
    let mut world = serving_world();
    world.send(Event::Request(RM, Request::Restart { supervisor: true }, Some(model::file())));
    world.send(Event::Request(CallerId(2), Request::Unmount { mode: UnmountMode::Plain }, None));
    world.finish_job(|task| task == "CheckProgram");
    assert_eq!(world.seen("BecomeProgram"), 0, "an unmount is running");
    world.fail_jobs();
    assert_eq!(world.seen("BecomeProgram"), 1);
    world.send(Event::Request(RM, Request::Restart { supervisor: true }, Some(model::file())));
    world.fail_jobs();
    assert_eq!(world.seen("BecomeProgram"), 1, "the check failed");
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
    assert!(world.candidate().is_some(), "another restart is possible");
}

#[test]
fn an_executed_supervisor_program_starts_a_candidate() {
    let mut world = serving_world();
    let actions = world.machine.try_program(Program::new(model::file()), Some(RM));
    world.execute(actions);
    assert!(world.candidate().is_some());
}

#[test]
fn signals_unmount_then_abort() {
    let mut world = serving_world();
    world.send(Event::Signal { may_abort: false });
    assert_eq!((world.seen("AnnounceStop"), world.seen("Unmount(Plain)")), (1, 1));
    world.fail_jobs();
    assert_eq!(world.seen("Unmount(Lazy)"), 1);
    world.finish_jobs();
    world.send(Event::Signal { may_abort: false });
    assert_eq!(world.seen("Unmount(Force)"), 0);
    world.send(Event::Signal { may_abort: true });
    assert_eq!(world.seen("Unmount(Force)"), 1);
    assert!(world.machine.snapshot(model::process(1), false, Figures::default()).draining);
    let actions = world.machine.drain();
    world.execute(actions);
    assert_eq!(world.seen("Unmount(Plain)"), 2);
    world.fail_jobs();
    world.fail_jobs();
}

#[test]
fn nothing_is_started_once_the_mount_is_over() {
    let mut world = serving_world();
    world.send(Event::MountOver);
    let server = world.current();
    world.send(Event::Exited(server));
    world.send(Event::Exited(server));
    assert_eq!((world.seen("StartServer"), world.seen("Resend")), (1, 0));
    assert!(world.machine.current().is_none() && !world.machine.has_jobs());
}

#[test]
fn a_failed_write_of_the_record_is_retried() {
    let mut world = World::new();
    world.record_error = true;
    world.introduce_current();
    let before = world.seen("WriteRecord");
    world.send(Event::Tick);
    assert_eq!(world.seen("WriteRecord"), before);
    assert!(world.machine.next_wakeup().is_some());
    world.record_error = false;
    world.pass(RECORD_RETRY_INTERVAL * 2);
    world.pass(RECORD_RETRY_INTERVAL * 2);
    assert_eq!(world.seen("WriteRecord"), before + 1);
}

#[test]
fn the_watchdog_replaces_the_server_and_reverts_to_the_previous_program() {
    let mut world = serving_world();
    let first = std::sync::Arc::clone(world.machine.program());
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
    let candidate = world.candidate().expect("a candidate");
    world.request_of(candidate, World::handshake(b"reply"));
    world.request_of(candidate, ServerRequest::Serving);
    assert!(!std::sync::Arc::ptr_eq(world.machine.program(), &first));
    let actions = world.machine.replace_server("a request is unanswered for 10 s");
    world.execute(actions);
    assert!(std::sync::Arc::ptr_eq(world.machine.program(), &first));
    assert_eq!((world.seen("CountReplaced"), world.seen("EndServer")), (1, 1));
}

#[test]
fn queries_are_answered_from_the_state() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    world.send(Event::Request(RM, Request::Snapshot, None));
    world.send(Event::Request(RM, Request::Backing { index: 0 }, None));
    world.send(Event::Request(RM, Request::Backing { index: 1 }, None));
    world.send(Event::Request(RM, Request::Inodes { numbers: vec![1] }, None));
    world.send(Event::Request(RM, Request::Inodes { numbers: vec![1; MAX_INODES + 1] }, None));
    world.send(Event::Request(RM, Request::Confirm { digests: vec![Key(1).digest()] }, None));
    let count = |text: &str| world.log.iter().filter(|line| line.contains(text)).count();
    assert_eq!((world.seen("RespondState"), world.seen("RespondInodes"), count("Ok(Descriptor)")), (1, 1, 1));
    assert_eq!(count("Respond(CallerId(1), Err"), 3);
}

#[test]
fn a_takeover_keeps_the_current_and_the_leaving_servers() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    let state = world.machine.snapshot(model::process(1), false, Figures::default());
    let row = state.server.clone();
    let initial_state = InitialState {
        server: row,
        leaving: vec![model::process(90)],
        has_served: true,
        ..initial::initial()
    };
    let (machine, leaving, actions) = Machine::new(initial_state, &world.inputs());
    let names: Vec<String> = actions.iter().map(model::name).collect();
    assert_eq!(names, ["Save", "WriteRecord", "Announce"], "no second server");
    assert_eq!(leaving.len(), 1);
    assert!(machine.tracks(leaving[0]) && machine.current().is_some_and(|server| server.row.serving));
    let starting = state.server.map(|row| ServerRow { serving: false, ..row });
    let (machine, _, actions) =
        Machine::new(InitialState { server: starting, ..initial::initial() }, &world.inputs());
    assert_eq!(actions.iter().map(model::name).collect::<Vec<_>>(), ["Save", "WriteRecord"]);
    assert!(
        machine.snapshot(model::process(1), true, Figures::default()).server.is_none(),
        "the server does not serve yet"
    );
}

#[test]
fn callers_get_errors_with_codes() {
    let mut world = serving_world();
    world.send(Event::Request(RM, Request::Confirm { digests: vec![Key(0).digest()] }, None));
    let codes = world.responses.iter().filter_map(|(_, response)| response.as_ref().err().map(Error::code));
    assert_eq!(codes.collect::<Vec<_>>(), [Code::TryAgain]);
    world.send(Event::Request(RM, Request::Refresh, None));
    world.apply_condemned_list();
    let settled =
        |(_, response): &(CallerId, Result<Response>)| matches!(response, Ok(Response::Settled { .. }));
    assert!(world.responses.iter().any(settled));
    world.pass(Duration::from_secs(1));
    let job = JobId(77);
    world.send(Event::JobEnded(job, JobResult::Done(None)));
}

#[test]
fn a_backing_that_a_scrub_found_damaged_is_given_to_no_later_server() {
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    let key = Key(0).file();
    let scrubbed = |damage: Option<&str>| ServerRequest::Scrubbed {
        key: Key(0).file(),
        at: 7,
        damage: damage.map(str::to_owned),
    };
    world.request(scrubbed(None));
    world.finish_jobs();
    assert_eq!(world.machine.backings().rows()[0].verified_at, Some(7));

    // A candidate has read a mount state in which the backing is intact.
    world.send(Event::Request(RM, Request::Restart { supervisor: false }, Some(model::file())));
    world.finish_jobs();
    let refused = world.request(scrubbed(Some("a lost bit")));
    assert!(matches!(refused, Some(ServerReply::Refused(_))), "{refused:?}");
    assert_eq!(world.machine.backings().rows()[0].why, None);
    let mut world = serving_world();
    world.hydrate(Key(0)).expect("a backing");
    world.request(scrubbed(Some("a lost bit")));
    world.finish_jobs();
    let row = &world.machine.backings().rows()[0];
    assert_eq!((row.why.as_deref(), row.verified_at), (Some("a lost bit"), None));
    let reserve = world.request(ServerRequest::Reserve { key, size: 1, data_bytes: 1 });
    assert!(matches!(reserve, Some(ServerReply::Refused(_))), "{reserve:?}");
}
