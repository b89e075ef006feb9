//! Sealed packs: no process changes the bytes that the kernel decodes; `gc`, `store unseal` and `store destroy` remove
//! the seal.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::support::actor::Actor;
use crate::support::daemon::drill::drop_caches;
use crate::support::host;
use crate::support::mount::{TestMount, wait_for};
use crate::support::store::random;

const LENGTH: usize = 4 << 20;

fn packs(world: &TestMount) -> Vec<PathBuf> {
    fs::read_dir(world.store_dir().join("packs")).unwrap().map(|e| e.unwrap().path()).collect()
}

#[test]
fn sealed_packs_can_be_neither_changed_nor_removed_and_unseal_refuses_a_mounted_store() {
    let _host = host::shared();
    let world = TestMount::new("kernel");
    let digest = world.import_bytes(&random(1, LENGTH), "web:1");
    let open_before = File::options().write(true).open(&packs(&world)[0]).unwrap();
    world.wait_until_verified(&digest);
    let pack = &packs(&world)[0];
    let refused = [
        open_before.write_all_at(b"x", 5000).unwrap_err().kind(),
        File::options().write(true).open(pack).unwrap_err().kind(),
        fs::remove_file(pack).unwrap_err().kind(),
        fs::rename(pack, world.dir().join("moved")).unwrap_err().kind(),
        fs::hard_link(pack, world.dir().join("link")).unwrap_err().kind(),
    ];
    assert_eq!(refused, [ErrorKind::PermissionDenied; 5]);
    drop(open_before);

    let store = world.store_dir();
    let store = store.to_str().unwrap();
    world.stencil(&["store", "unseal", store]).exits(5).says("the store is mounted on");
    world.stencil(&["store", "destroy", "--yes", store]).exits(5).says("the store is mounted on");
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    assert!(fs::remove_file(pack).is_err(), "the seal outlives the mount");
    let unsealed = world.json(&["store", "unseal", store]);
    assert_eq!(unsealed["unsealed_packs"], 1, "{unsealed}");
    assert_eq!(world.json(&["store", "unseal", store])["unsealed_packs"], 0);
    world.mount(&["--serve", "kernel"]).ok();
    world.wait_until_verified(&digest);
    world.stencil(&["umount", world.mountpoint().to_str().unwrap()]).ok();
    world.stencil(&["store", "destroy", store]).exits(2).says("--yes");
    let destroyed = world.json(&["store", "destroy", "--yes", store]);
    assert_eq!(destroyed["removed_templates"], 1, "{destroyed}");
    assert!(!world.store_dir().exists());
}

#[test]
fn a_collection_removes_sealed_packs_and_clones_keep_their_bytes() {
    let _host = host::shared();
    let world = TestMount::new("kernel");
    // Two templates are in one pack. The collection rewrites this pack, and removes the pack of the third template.
    let (kept, gone) = (random(1, LENGTH), random(2, LENGTH));
    let both = world.dir().join("both");
    fs::write(&both, [&kept[..], &gone[..]].concat()).unwrap();
    let whole = world.import(&both, "both:1");
    let part = world.import_bytes(&kept, "part:1");
    world.wait_until_verified(&whole);
    world.wait_until_verified(&part);
    let mut clone = Actor::start();
    clone.tell(&format!("map 0 {} 0 {LENGTH} rw", world.file(&part, "memory").display()));
    let before = packs(&world);
    world.stencil(&["rm", "both:1"]).ok();
    world.stencil(&["gc", "--all"]).ok();
    assert!(packs(&world).iter().all(|pack| !before.contains(pack)), "the collection has rewritten the pack");
    assert_eq!(world.counter("evictions"), 0, "the backing of a clone stays");
    drop_caches();
    for (page, expected) in kept.iter().step_by(4096).enumerate() {
        assert_eq!(clone.tell(&format!("read 0 {page}")) as u8, *expected);
    }
    assert!(fs::read(world.file(&part, "memory")).unwrap() == kept);
    // Without the clone, the next change of the store frees the removed packs.
    drop(clone);
    world.stencil(&["gc", "--all"]).ok();
    wait_for("the release of the removed packs", || (world.counter("evictions") == 1).then_some(()));
    world.wait_until_verified(&part);
    assert!(fs::read(world.file(&part, "memory")).unwrap() == kept);
}
