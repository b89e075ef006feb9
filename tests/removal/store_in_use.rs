//! `rm` refuses a mapped template; `path` prints a path by digest.

use std::fs;

use stencilfs::memory::{Backend, Options};

use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::store::guest_like;

const SIZE: usize = 4 << 20;

fn map(path: &str) -> Backend {
    let object =
        format!("memory-backend-file,id=m,size={SIZE},mem-path={path},share=off,readonly=on,rom=off");
    Backend::create(&Options::parse(&object).unwrap().plan().unwrap()).unwrap()
}

#[test]
fn rm_refuses_a_mapped_template() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let bytes = guest_like(1, SIZE);
        let digest = world.import_bytes(&bytes, "web:1");
        let other = world.import_bytes(&guest_like(2, SIZE), "other");
        let path = world.json(&["path", "web:1/memory"])["path"].as_str().unwrap().to_owned();
        assert_eq!(path, world.file(&digest, "memory").to_str().unwrap());
        assert_eq!(world.stencil(&["path", "web:1"]).ok().out.trim_end(), path.trim_end_matches("/memory"));
        world.stencil(&["path", "web:1/nope"]).exits(4).says("no file 'nope'");

        let backend = map(&path);
        let mut page = [0; 4096];
        backend.read_at(stencilfs::units::MemoryOffset::new(0), &mut page).unwrap();
        assert_eq!(page, bytes[..4096]);
        let own = std::process::id().to_string();
        let refused = |words: &[&str]| {
            let run = world.stencil(words).exits(5).says("is in use");
            assert!(run.err.contains(&own), "{run:?}");
        };
        refused(&["rm", "web:1"]);
        refused(&["rm", &digest]);
        // A tag can be removed while the template has another one, and so can another template.
        world.stencil(&["tag", "web:1", "web:2"]).ok();
        world.stencil(&["rm", "web:1"]).ok();
        world.stencil(&["rm", "other"]).ok();
        assert!(!world.store_dir().join("images").join(&other).exists());
        refused(&["rm", "web:2"]);
        // A lazily unmounted mount serves until the last mapping is gone, and still blocks `rm`.
        world.stencil(&["umount", "-l", world.mountpoint().to_str().unwrap()]).ok();
        refused(&["rm", "web:2"]);
        world.stencil(&["path", "web:2"]).exits(4).says("not mounted");
        drop(backend);
        world.stencil(&["rm", "web:2"]).ok();
        assert_eq!(fs::read_dir(world.store_dir().join("images")).unwrap().count(), 0);
    }
}
