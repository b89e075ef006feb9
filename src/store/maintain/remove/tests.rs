use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::progress::Silent;
use crate::store::Collect;
use crate::store::maintain::remove::*;
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
fn restores_a_template_that_is_in_use() {
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
    // A mount that was started in between may show the template, so the second call of `hidden` returns `None`.
    let calls = Cell::new(0);
    let only_first = |_: &[Digest]| Ok((calls.replace(calls.get() + 1) == 0).then(Refused::new));
    assert_eq!(
        store.remove(&reference, Some(&digest), only_first, unused).unwrap(),
        Removal::Template(digest)
    );
    assert_eq!(calls.get(), 2);
    is_back();
    let Removal::Done(removed) = store.remove(&reference, Some(&digest), hidden, unused).unwrap() else {
        panic!("the template was not removed");
    };
    assert_eq!((removed.tags, removed.digest), (tags.to_vec(), Some(digest)));
    assert!(!store.has(&digest) && store.tags().unwrap().is_empty());
}

/// Creates a store with three templates without tags.
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
fn removes_a_batch_except_the_template_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let (store, [a, b, c]) = three(dir.path());
    store.set_tag(&"web:1".parse().unwrap(), &c).unwrap();
    let used = |digests: &[Digest]| {
        assert!(
            digests.iter().all(|digest| !store.has(digest)),
            "the templates are set aside before the search"
        );
        Ok(vec![(b, Error::in_use("process 7 maps it"))])
    };
    let done = store.remove_untagged(&[a, b, c], hidden, used).unwrap();
    assert_eq!(codes(done), in_order(vec![(a, Ok(true)), (b, Err(Code::InUse)), (c, Ok(false))]));
    assert_eq!([a, b, c].map(|digest| store.has(&digest)), [false, true, true]);
    // A lease is found before a template is set aside.
    let leased = |_: &[Digest]| Ok(Some(vec![(b, Error::in_use("leased"))]));
    let used = |digests: &[Digest]| {
        assert!(digests.is_empty() && store.has(&b));
        Ok(Refused::new())
    };
    assert_eq!(codes(store.remove_untagged(&[b], leased, used).unwrap()), [(b, Err(Code::InUse))]);
}

#[test]
fn restores_a_batch_that_a_mount_may_show() {
    let dir = tempfile::tempdir().unwrap();
    let (store, [a, b, _]) = three(dir.path());
    let calls = Cell::new(0);
    let only_first = |_: &[Digest]| Ok((calls.replace(calls.get() + 1) == 0).then(Refused::new));
    let done = store.remove_untagged(&[a, b], only_first, unused).unwrap();
    assert_eq!(codes(done), in_order(vec![(a, Err(Code::TryAgain)), (b, Err(Code::TryAgain))]));
    assert!(store.has(&a) && store.has(&b) && calls.get() == 2);
}

#[test]
fn restores_the_others_if_one_template_cannot_be_restored() {
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
        store.restore_set_aside().unwrap();
        assert!(store.has(&blocked));
    }
}

#[test]
fn keeps_files_that_cannot_be_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (store, digest, tags) = filled(dir.path());
    let reference = TemplateRef::Digest(digest);
    let (directory, tag) = (store.image_dir(&digest), store.tag_path(&tags[1]));
    let inode = |path: &StorePath| fs::metadata(path).unwrap().ino();
    let tag_file = inode(&tag);
    // The template is in use, and an obstacle lies at the path of its directory, then at the path of a tag.
    for obstacle in [&directory, &tag] {
        let late = |_: &[Digest]| {
            match obstacle == &directory {
                true => fs::write(obstacle, "").unwrap(),
                false => fs::create_dir(obstacle).unwrap(),
            }
            Err(Error::in_use("process 7 maps it"))
        };
        let error = store.remove(&reference, Some(&digest), hidden, late).unwrap_err();
        assert_eq!(error.code(), Code::InUse, "{error}");
        let message = format!("{error} {:?}", error.hint_text());
        assert!(
            message.contains(obstacle.as_ref().to_str().unwrap()) && message.contains("run 'stencil gc'"),
            "{message}"
        );
        let _ = fs::remove_file(obstacle);
        let _ = fs::remove_dir(obstacle);
        store.collect(Collect::default(), &AtomicBool::new(false), &Silent).unwrap();
        let mut block = vec![0; 64 << 10];
        store.template(&digest).unwrap().read_block(0, 3, &mut Scratch::default(), &mut block).unwrap();
        assert!(block[..8192].iter().all(|byte| *byte == 7));
        tags.iter().for_each(|tag| assert_eq!(store.tag(tag).unwrap(), Some(digest)));
        assert_eq!(inode(&tag), tag_file, "the tag was restored by a rename");
    }
    // The removal is killed and the template is imported again: the new template stays.
    let killed = || Err(Error::failed("killed"));
    let late = |_: &[Digest]| {
        fs::write(&directory, "").unwrap();
        killed()
    };
    store.remove(&reference, Some(&digest), hidden, late).unwrap_err();
    fs::remove_file(&directory).unwrap();
    assert_eq!(filled(dir.path()).1, digest);
    store.expect_removable(&TemplateRef::Tag(tags[1].clone())).unwrap();
    assert!(!aside_path(&directory).exists() && !aside_path(&tag).exists());
    assert!(store.template(&digest).is_ok());
    let Removal::Done(_) = store.remove(&reference, Some(&digest), hidden, unused).unwrap() else {
        panic!("the template was not removed");
    };
    let left = |directory: StorePath| fs::read_dir(directory).unwrap().count();
    assert_eq!(left(store.images_dir()) + left(store.tags_dir()) + left(store.tmp_dir()), 0);
}
