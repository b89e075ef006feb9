//! Publishes what the session has written: packs, then the image, then the tag.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use super::writer::Written;
use super::{ImportRequest, Imported};
use crate::error::{Error, Result};
use crate::store::pack::pack_path;
use crate::store::policy::DEFAULT_MODE;
use crate::store::publish::{Session, sync_folder, write_new};
use crate::store::{Policy, Store};
use crate::units::Bytes;

pub(super) fn commit(
    store: &Store,
    session: &Session,
    written: Written,
    request: &ImportRequest,
) -> Result<Imported> {
    let folder = session.path().join("image");
    let mut policy = fresh_policy();
    apply(&mut policy, request);
    write_new(&folder.join("policy"), &policy.encode()?)?;
    sync_folder(&folder)?;

    let _names = store.lock_names()?;
    let existed = store.has(&written.digest);
    if existed {
        // Its own copy of the blocks, if it made any, goes away with the session.
        store.set_policy_locked(&written.digest, |policy| apply(policy, request))?;
    } else {
        let move_to = |from: &std::path::Path, to: &std::path::Path| {
            fs::rename(from, to).map_err(|e| Error::io("cannot publish", to, e))
        };
        for id in &written.packs {
            move_to(&pack_path(session.path(), *id), &store.packs().path(*id))?;
        }
        sync_folder(&store.packs_dir())?;
        move_to(&folder, &store.image_dir(&written.digest))?;
        sync_folder(&store.images_dir())?;
    }
    if let Some(tag) = &request.tag {
        store.set_tag_locked(tag, &written.digest)?;
    }
    Ok(Imported {
        digest: written.digest,
        tag: request.tag.clone(),
        files: written.files,
        existed,
        new_bytes: Bytes::new(if existed { 0 } else { written.new_bytes }),
        stored_bytes: Bytes::new(if existed { 0 } else { written.stored_bytes }),
        repaired_blocks: 0,
    })
}

fn fresh_policy() -> Policy {
    Policy {
        mode: DEFAULT_MODE,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        labels: Default::default(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        recipe: None,
    }
}

fn apply(policy: &mut Policy, request: &ImportRequest) {
    if let Some(mode) = request.mode {
        policy.mode = mode;
    }
    request.owner.apply(policy);
    policy.labels.extend(request.labels.clone());
    if request.recipe.is_some() {
        policy.recipe = request.recipe.clone();
    }
}
