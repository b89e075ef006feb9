use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::progress::Silent;
use crate::store::Collect;
use crate::store::{FileKind, ImportFile, ImportRequest, Scratch, Source};

fn hidden(_: &[Digest]) -> Result<Option<Refused>> {
    Ok(Some(Refused::new()))
}

fn unused(_: &[Digest]) -> Result<Refused> {
    Ok(Refused::new())
}

fn filled(dir: &Path) -> (Store, Digest, [TagName; 2]) {
    let store = Store::open_or_create(&dir.join("store")).unwrap();
    let source = dir.join("source");
    fs::write(&source, vec![7; 204_800]).unwrap();
    let tags: [TagName; 2] = ["web:1".parse().unwrap(), "web:2".parse().unwrap()];
    let source = Source::Path(source);
    let file = ImportFile { name: "memory".into(), kind: FileKind::Ram, source };
    let request = ImportRequest::new(Some(tags[0].clone()), vec![file]);
    let digest = store.import(request, &Silent).unwrap().digest;
    store.set_tag(&tags[1], &digest).unwrap();
    (store, digest, tags)
}

#[test]
fn what_turns_out_to_be_in_use_is_put_back_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (store, digest, tags) = filled(dir.path());
    let reference = TemplateRef::Digest(digest);
    let is_back = || {
        assert_eq!(store.template(&digest).unwrap().files().len(), 1);
        tags.iter().for_each(|tag| assert_eq!(store.tag(tag).unwrap(), Some(digest)));
    };
    let used = store.remove(&reference, Some(&digest), hidden, |_| {
        assert!(!store.has(&digest) && store.tags().unwrap().is_empty());
        Err(Error::in_use("process 7 maps it"))
    });
    assert_eq!(used.unwrap_err().code(), Code::InUse);
    is_back();
    // A mount that began in between: it is asked too, from the beginning.
    let looks = Cell::new(0);
    let first = |_: &[Digest]| Ok((looks.replace(looks.get() + 1) == 0).then(Refused::new));
    assert_eq!(store.remove(&reference, Some(&digest), first, unused).unwrap(), Removal::Template(digest));
    assert_eq!(looks.get(), 2);
    is_back();
    let Removal::Done(removed) = store.remove(&reference, Some(&digest), hidden, unused).unwrap() else {
        panic!("it stays");
    };
    assert_eq!((removed.tags, removed.template), (tags.to_vec(), Some(digest)));
    assert!(!store.has(&digest) && store.tags().unwrap().is_empty());
}

/// Three templates without tags.
fn three(dir: &Path) -> (Store, [Digest; 3]) {
    let store = Store::open_or_create(&dir.join("store")).unwrap();
    let digests = [1, 2, 3].map(|byte| {
        let source = dir.join(format!("source-{byte}"));
        fs::write(&source, vec![byte; 204_800]).unwrap();
        let file = ImportFile { name: "memory".into(), kind: FileKind::Ram, source: Source::Path(source) };
        store.import(ImportRequest::new(None, vec![file]), &Silent).unwrap().digest
    });
    (store, digests)
}

fn codes(done: Vec<(Digest, Result<bool>)>) -> Vec<(Digest, std::result::Result<bool, Code>)> {
    let mut codes: Vec<_> =
        done.into_iter().map(|(digest, done)| (digest, done.map_err(|e| e.code()))).collect();
    codes.sort_by_key(|(digest, _)| *digest);
    codes
}

fn in_order<T>(mut expected: Vec<(Digest, T)>) -> Vec<(Digest, T)> {
    expected.sort_by_key(|(digest, _)| *digest);
    expected
}

#[test]
fn one_that_is_in_use_stays_and_the_others_of_its_batch_go() {
    let dir = tempfile::tempdir().unwrap();
    let (store, [a, b, c]) = three(dir.path());
    store.set_tag(&"web:1".parse().unwrap(), &c).unwrap();
    let used = |digests: &[Digest]| {
        assert!(digests.iter().all(|digest| !store.has(digest)), "they are aside by now");
        Ok(vec![(b, Error::in_use("process 7 maps it"))])
    };
    let done = store.remove_untagged(&[a, b, c], hidden, used).unwrap();
    assert_eq!(codes(done), in_order(vec![(a, Ok(true)), (b, Err(Code::InUse)), (c, Ok(false))]));
    assert_eq!([a, b, c].map(|digest| store.has(&digest)), [false, true, true]);
    // A lease is found before anything is moved.
    let leased = |_: &[Digest]| Ok(Some(vec![(b, Error::in_use("leased"))]));
    let used = |digests: &[Digest]| {
        assert!(digests.is_empty() && store.has(&b));
        Ok(Refused::new())
    };
    assert_eq!(codes(store.remove_untagged(&[b], leased, used).unwrap()), [(b, Err(Code::InUse))]);
}

#[test]
fn a_batch_that_a_mount_may_show_again_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (store, [a, b, _]) = three(dir.path());
    let looks = Cell::new(0);
    let first = |_: &[Digest]| Ok((looks.replace(looks.get() + 1) == 0).then(Refused::new));
    let done = store.remove_untagged(&[a, b], first, unused).unwrap();
    assert_eq!(codes(done), in_order(vec![(a, Err(Code::TryAgain)), (b, Err(Code::TryAgain))]));
    assert!(store.has(&a) && store.has(&b) && looks.get() == 2);
}

#[test]
fn one_that_cannot_be_restored_is_in_no_others_way() {
    let dir = tempfile::tempdir().unwrap();
    let (store, digests) = three(dir.path());
    for blocked in digests {
        let obstacle = store.image_dir(&blocked);
        let used = |these: &[Digest]| {
            fs::write(&obstacle, "").unwrap();
            Ok(these.iter().map(|digest| (*digest, Error::in_use("process 7 maps it"))).collect())
        };
        let done = store.remove_untagged(&digests, hidden, used).unwrap();
        assert!(done.iter().all(|(_, done)| done.as_ref().is_err_and(|e| e.code() == Code::InUse)));
        assert_eq!(digests.map(|digest| store.has(&digest)), digests.map(|digest| digest != blocked));
        fs::remove_file(&obstacle).unwrap();
        store.settle_graves().unwrap();
        assert!(store.has(&blocked));
    }
}

#[test]
fn what_cannot_be_put_back_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (store, digest, tags) = filled(dir.path());
    let reference = TemplateRef::Digest(digest);
    let (folder, tag) = (store.image_dir(&digest), store.tag_path(&tags[1]));
    let inode = |path: &StorePath| fs::metadata(path).unwrap().ino();
    let tag_file = inode(&tag);
    // Somebody has it, and something lies where it was: the folder's place, then that of a tag.
    for obstacle in [&folder, &tag] {
        let late = |_: &[Digest]| {
            match obstacle == &folder {
                true => fs::write(obstacle, "").unwrap(),
                false => fs::create_dir(obstacle).unwrap(),
            }
            Err(Error::in_use("process 7 maps it"))
        };
        let error = store.remove(&reference, Some(&digest), hidden, late).unwrap_err();
        assert_eq!(error.code(), Code::InUse, "{error}");
        let said = format!("{error} {:?}", error.remedy_text());
        assert!(said.contains(obstacle.as_ref().to_str().unwrap()) && said.contains("stencil gc"), "{said}");
        let _ = fs::remove_file(obstacle);
        let _ = fs::remove_dir(obstacle);
        store.collect(Collect::default(), &AtomicBool::new(false), &Silent).unwrap();
        let mut block = vec![0; 64 << 10];
        store.template(&digest).unwrap().read_block(0, 3, &mut Scratch::default(), &mut block).unwrap();
        assert!(block[..8192].iter().all(|byte| *byte == 7));
        tags.iter().for_each(|tag| assert_eq!(store.tag(tag).unwrap(), Some(digest)));
        assert_eq!(inode(&tag), tag_file, "it took no room to put it back");
    }
    // A removal that was killed: what came meanwhile stays.
    let lost = || Err(Error::failed("killed"));
    let late = |_: &[Digest]| {
        fs::write(&folder, "").unwrap();
        lost()
    };
    store.remove(&reference, Some(&digest), hidden, late).unwrap_err();
    fs::remove_file(&folder).unwrap();
    assert_eq!(filled(dir.path()).1, digest);
    store.expect_removable(&TemplateRef::Tag(tags[1].clone())).unwrap();
    assert!(!grave_of(&folder).exists() && !grave_of(&tag).exists());
    assert!(store.template(&digest).is_ok());
    let Removal::Done(_) = store.remove(&reference, Some(&digest), hidden, unused).unwrap() else {
        panic!("it stays");
    };
    let left = |folder: StorePath| fs::read_dir(folder).unwrap().count();
    assert_eq!(left(store.images_dir()) + left(store.tags_dir()) + left(store.tmp_dir()), 0);
}
