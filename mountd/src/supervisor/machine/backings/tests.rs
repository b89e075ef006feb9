use super::*;
use stencilfs::control::{BackingKind, Cache};
use stencilfs::error::Code;

fn key(name: &str) -> FileKey {
    FileKey { digest: Digest::of(name.as_bytes()), file: "memory".into() }
}

fn cache(limit: u64) -> Chosen {
    Chosen { kind: BackingKind::Copy, cache: Cache::Memory, why: None, most: Bytes::new(limit) }
}

fn file() -> (OwnedFd, (u64, u64)) {
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let identity = fds::identity(&file).unwrap();
    (file, identity)
}

fn ready(backings: &mut Backings, name: &str, bytes: u64, id: u32) {
    let key = key(name);
    assert_eq!(backings.reserve(&cache(u64::MAX), &key, Bytes::new(bytes)).unwrap(), Reservation::Create);
    let (file, identity) = file();
    backings.created(&key, file).unwrap();
    assert_eq!(backings.reserved_for_freeze(&key).unwrap(), Some(Bytes::new(bytes)));
    drop(backings.frozen(&key, None).unwrap());
    assert_eq!(backings.registration(&key, identity).unwrap(), Registration::Register);
    backings.note_registered(&key, id);
}

#[test]
fn only_the_frozen_and_verified_file_is_registered() {
    let mut backings = Backings::default();
    let key = key("a");
    assert!(backings.registration(&key, (0, 0)).is_err(), "nothing is reserved");
    backings.reserve(&cache(100), &key, Bytes::new(10)).unwrap();
    assert!(backings.registration(&key, (0, 0)).is_err(), "no file");
    assert!(backings.reserved_for_freeze(&key).is_err(), "no file");
    let ((first, identity), (_second, other)) = (file(), file());
    backings.created(&key, first).unwrap();
    assert!(backings.registration(&key, identity).unwrap_err().to_string().contains("not frozen"));
    drop(backings.frozen(&key, None).unwrap());
    assert_eq!(backings.reserved_for_freeze(&key).unwrap(), None, "already frozen");
    assert!(backings.registration(&key, other).unwrap_err().to_string().contains("verified file is not"));
    assert!(backings.copy(&key).is_err(), "not registered");
    assert_eq!(backings.registration(&key, identity).unwrap(), Registration::Register);
    backings.note_registered(&key, 3);
    assert_eq!(backings.registration(&key, identity).unwrap(), Registration::AlreadyRegistered(3));
    assert_eq!(backings.reserve(&cache(100), &key, Bytes::new(10)).unwrap(), Reservation::Ready(3));
    assert!(backings.copy(&key).is_ok() && backings.copy_at(0).is_ok() && backings.copy_at(1).is_err());
}

#[test]
fn a_reservation_evicts_small_backings_first() {
    let mut backings = Backings::default();
    ready(&mut backings, "a", 40, 1);
    ready(&mut backings, "b", 30, 2);
    let reserve =
        |backings: &mut Backings, bytes| backings.reserve(&cache(100), &key("c"), Bytes::new(bytes));
    assert_eq!(reserve(&mut backings, 30).unwrap(), Reservation::Create);
    backings.abandon(&key("c"));
    let evict = reserve(&mut backings, 60).unwrap();
    assert_eq!(evict, Reservation::Evict(vec![key("b"), key("a")]), "smallest first");
    assert_eq!(reserve(&mut backings, 101).unwrap_err().code(), Code::TryAgain);
    let unfinished = backings.reserve(&cache(100), &key("d"), Bytes::new(30)).unwrap();
    assert_eq!(unfinished, Reservation::Create);
    assert_eq!(
        reserve(&mut backings, 90).unwrap_err().code(),
        Code::TryAgain,
        "unfinished backings cannot be evicted"
    );
}

#[test]
fn registered_backings_and_reasons_survive_the_death_of_a_server() {
    let mut backings = Backings::default();
    ready(&mut backings, "a", 1, 1);
    backings.reserve(&cache(100), &key("b"), Bytes::new(5)).unwrap();
    backings.created(&key("b"), file().0).unwrap();
    backings.note_reason(key("c"), Some("too\nlate".into())).unwrap();
    backings.reserve(&cache(100), &key("c"), Bytes::new(5)).unwrap();
    backings.created(&key("c"), file().0).unwrap();
    assert_eq!(backings.drop_unfinished().len(), 2);
    let rows = backings.rows();
    assert_eq!(rows.iter().map(|row| row.key.clone()).collect::<Vec<_>>(), [key("a"), key("c")]);
    assert_eq!((rows[1].stage, rows[1].reserved, rows[1].why.as_deref()), (Stage::None, 0, Some("too late")));
    assert_eq!(backings.files().count(), 1);
}

#[test]
fn closing_removes_registered_backings_only() {
    let mut backings = Backings::default();
    ready(&mut backings, "a", 1, 7);
    backings.reserve(&cache(100), &key("b"), Bytes::new(5)).unwrap();
    assert_eq!(backings.keys_of(&key("a").digest), [key("a")]);
    assert!(backings.keys_of(&key("b").digest).is_empty());
    let (ids, files) = backings.close(&[key("a"), key("b"), key("c")]);
    assert_eq!((ids, files.len(), backings.rows().len()), (vec![7], 1, 1));
}

#[test]
fn names_reasons_and_files_are_bounded() {
    let mut backings = Backings::default();
    let long = FileKey { file: "x".repeat(MAX_NAME + 1), ..key("a") };
    assert_eq!(backings.note_reason(long, None).unwrap_err().code(), Code::Usage);
    backings.note_reason(key("a"), Some("x".repeat(MAX_REASON * 2))).unwrap();
    assert_eq!(backings.rows()[0].why.as_ref().map(String::len), Some(MAX_REASON));
    for number in 1..MAX_FILES {
        backings.note_reason(key(&number.to_string()), None).unwrap();
    }
    assert_eq!(backings.note_reason(key("one more"), None).unwrap_err().code(), Code::TryAgain);
}

#[test]
fn progress_never_decreases_and_is_complete_after_registration() {
    let mut backings = Backings::default();
    backings.reserve(&cache(100), &key("a"), Bytes::new(50)).unwrap();
    for (report, expected) in [(20, 20), (10, 20), (30, 30)] {
        backings.note_progress(&key("a"), report);
        assert_eq!(backings.rows()[0].filled, expected);
    }
    ready(&mut backings, "b", 50, 1);
    assert_eq!(backings.rows()[1].filled, 50);
}

#[test]
fn backings_are_restored_with_their_files() {
    let mut backings = Backings::default();
    ready(&mut backings, "a", 1, 7);
    let restored = Backings::restore(backings.rows(), |row| backings.copy(&row.key).ok());
    assert_eq!(restored.registered().map(|(id, _)| id).collect::<Vec<_>>(), [7]);
}
