//! Publishes what the session has written: packs, then the image, then the tag.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::writer::Written;
use super::{ImportRequest, Imported};
use crate::error::{Code, Error, Result};
use crate::store::pack::pack_path;
use crate::store::policy::DEFAULT_MODE;
use crate::store::publish::{Session, sync_folder, write_new};
use crate::store::{Digest, Policy, Store};
use crate::units::Bytes;

pub(super) fn commit(
    store: &Store,
    session: &Session,
    written: Written,
    request: &ImportRequest,
    repaired: u64,
) -> Result<Imported> {
    let folder = session.path().join("image");
    let mut policy = fresh_policy();
    apply(&mut policy, request);
    write_new(&folder.join("policy"), &policy.encode()?)?;
    sync_folder(&folder)?;

    let _names = store.lock_names()?;
    let existed = store.has(&written.digest);
    // What it has written is not needed when a sound template with this content is there: then it goes
    // away with the session.
    let needed = !existed || repaired > 0 || !is_sound(store, &written.digest);
    if needed {
        for id in &written.packs {
            publish(&pack_path(session.path(), *id), &store.packs().path(*id))?;
        }
        sync_folder(&store.packs_dir())?;
    }
    let target = store.image_dir(&written.digest);
    if !existed {
        publish(&folder, &target)?;
        sync_folder(&store.images_dir())?;
    } else {
        if needed {
            // The image is the same by its digest, so that either placement fits either file.
            for name in ["image", "placement"] {
                publish(&folder.join(name), &target.join(name))?;
            }
        }
        match store.set_policy_locked(&written.digest, |policy| apply(policy, request)) {
            Err(e) if e.code() == Code::Damage || e.code() == Code::NotFound => {
                log::warn!("{e}; it is written anew");
                publish(&folder.join("policy"), &target.join("policy"))?;
            }
            other => other?,
        }
        sync_folder(&target)?;
    }
    if let Some(tag) = &request.tag {
        store.set_tag_locked(tag, &written.digest)?;
    }
    Ok(Imported {
        digest: written.digest,
        tag: request.tag.clone(),
        files: written.files,
        existed,
        new_bytes: Bytes::new(if needed { written.new_bytes } else { 0 }),
        stored_bytes: Bytes::new(if needed { written.stored_bytes } else { 0 }),
        repaired_blocks: repaired,
    })
}

fn publish(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io("cannot publish", to, e))
}

/// True when the tables of a template and the headers and indexes of its packs are undamaged. Its
/// blocks were read when the import met them.
fn is_sound(store: &Store, digest: &Digest) -> bool {
    store.template(digest).and_then(|t| t.check()).inspect_err(|e| log::warn!("{e}; repairing")).is_ok()
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
