//! Users and jails: a clone in a chroot with one template is counted like any other, and users without read permission
//! learn nothing about a template. Also reads through the mount by unmodified programs (fio).

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use stencilfs::sys::memory::cachestat;

use crate::support::actor::{self, Actor, compile};
use crate::support::host;
use crate::support::mount::{TestMount, copy_program, run, without_others};
use crate::support::pages::tables::{code, rows};
use crate::support::store::{guest_like, word_sum};

const MIB: usize = 1 << 20;
pub const PAGE: usize = 4096;

/// Imports a template that only root and the user 123 can read.
fn import_for_123(world: &TestMount, bytes: &[u8]) -> String {
    let source = world.dir().join("source");
    fs::write(&source, bytes).unwrap();
    let args = ["import", source.to_str().unwrap(), "web:1", "--mode", "0440", "--owner", "123:123"];
    world.stencil(&args).ok();
    world.json(&["inspect", "web:1"])["digest"].as_str().unwrap().to_owned()
}

/// The hash that the actor computes for a page.
pub fn hash(page: &[u8]) -> u64 {
    word_sum(page) >> 1
}

#[test]
fn a_clone_in_a_chroot_with_one_template_is_counted() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        let bytes = guest_like(11, 16 * MIB);
        let digest = import_for_123(&world, &bytes);
        let jail = world.dir().join("jail");
        fs::create_dir_all(jail.join("template")).unwrap();
        copy_program(actor::program(), jail.join("actor"));
        let directory = world.mountpoint().join("by-id").join(&digest);
        let metadata = fs::metadata(&directory).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o550, 123, 123));

        // The bind mount is in a separate mount namespace, as a jailer creates it, and ends with that namespace.
        let script = format!(
            "{} && mount --bind \"$1\" \"$2/template\" && mount -o remount,bind,ro \"$2/template\" && \
             exec chroot --userspec=123:123 --groups= \"$2\" /actor",
            without_others(world.dir())
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(&directory).arg(&jail);
        let mut clone = Actor::through(command);
        clone.tell(&format!("map 0 /template/memory 0 {} rw", bytes.len()));
        clone.write_pages(0, (0..50).map(|page| page * 31));
        for page in [7, 500, 4000] {
            assert_eq!(clone.tell(&format!("hash 0 {page}")), hash(&bytes[page * PAGE..(page + 1) * PAGE]));
        }
        assert!(
            clone.ask(&format!("map 1 {} 0 4096 ro", directory.join("memory").display())).is_err(),
            "the chroot must contain nothing but the template"
        );

        let density = world.json(&["density"]);
        let row = density["clones"].as_array().unwrap().iter().find(|c| c["pid"] == clone.pid()).unwrap();
        assert_eq!((&row["uid"], &row["dirty_pages"]), (&123.into(), &50.into()), "{serve}: {row}");
        assert_eq!(row["maps"][0]["serving"], serve);
        let ps = world.json(&["ps"]);
        let row = ps["clones"].as_array().unwrap().iter().find(|c| c["pid"] == clone.pid()).unwrap();
        assert_eq!((row["kind"].as_str(), row["digest"].as_str()), (Some("other"), Some(digest.as_str())));
        let dirty = world.json(&["dirty", &clone.pid().to_string()]);
        assert_eq!(dirty["dirty_pages"], 50);
        world.stencil(&["rm", "web:1"]).exits(5);
    }
}

#[test]
fn unauthorized_users_learn_nothing_about_a_template() {
    let _host = host::shared();
    let documented: Vec<(String, String)> =
        rows("explanation/security.md", "who_may_not_read_a_template_learns_nothing_of_it")
            .into_iter()
            .map(|row| (code(&row[0]).unwrap().to_owned(), code(&row[1]).unwrap().to_owned()))
            .collect();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        world.open_to_others();
        let bytes = guest_like(12, 8 * MIB);
        let digest = import_for_123(&world, &bytes);
        let file = world.file(&digest, "memory");
        // Some pages are in the page cache and some are not, so that cachestat(2) and mincore(2) would reveal
        // something.
        let opened = File::open(&file).unwrap();
        rustix::fs::fadvise(&opened, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&opened, &mut [0; PAGE], 0).unwrap();
        if serve == "decode" {
            let cached = cachestat::cached(&opened).unwrap().get();
            assert!((1..bytes.len() as u64 / 4096).contains(&cached), "{cached}");
        }
        let tagged = world.mountpoint().join("templates/web/1/memory");
        let probe = |uid: &str| -> Vec<(String, String)> {
            let out =
                run(compile("probe").to_str().unwrap(), &[uid.as_ref(), file.as_os_str(), tagged.as_ref()]);
            let pair = |line: &str| line.split_once('\t').map(|(a, b)| (a.to_owned(), b.to_owned()));
            out.lines().filter_map(pair).collect()
        };
        assert_eq!(probe("124"), documented, "{serve}");
        // The owner gets results from the same program: the errors above are due to missing permissions.
        let as_owner = probe("123");
        for call in
            ["open(F, O_RDONLY)", "open(T, O_RDONLY)", "stat(F)", "opendir(D)", "chdir(D)", "cachestat(R)"]
        {
            assert!(as_owner.contains(&(call.to_owned(), "ok".to_owned())), "{serve} {call}: {as_owner:?}");
        }
    }
}

/// Reads the whole file with fio and this engine; fio compares the checksum of each block.
pub fn fio(file: &Path, engine: &[&str]) {
    let mut command = Command::new("fio");
    command.args(["--name=read", "--readonly", "--rw=randread", "--bs=4k", "--size=32m", "--verify=crc32c"]);
    command.args(["--verify_fatal=1", "--output-format=json"]).args(engine);
    command
        .arg(format!("--filename={}", file.display()))
        .current_dir(file.parent().unwrap().parent().unwrap());
    let done = command.output().expect("cannot run fio: run 'make setup'");
    let out = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{engine:?}: {out}\n{}", String::from_utf8_lossy(&done.stderr));
    let json: serde_json::Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
    let job = &json["jobs"][0];
    assert_eq!(job["error"], 0, "{engine:?}");
    assert_eq!(job["read"]["io_bytes"], 32 * MIB as u64, "{engine:?}");
}

const ENGINES: [&[&str]; 4] = [
    &["--ioengine=mmap"],
    &["--ioengine=psync", "--direct=1"],
    &["--ioengine=io_uring", "--iodepth=16"],
    &["--ioengine=io_uring", "--iodepth=16", "--direct=1"],
];

/// Imports a file in which fio has written a checksum into each block.
pub fn import_from_fio(world: &TestMount) -> (Vec<u8>, std::path::PathBuf) {
    let source = world.dir().join("fio.source");
    let written = format!("--filename={}", source.display());
    let options = [
        "--name=write",
        "--rw=write",
        "--bs=4k",
        "--size=32m",
        "--verify=crc32c",
        "--do_verify=0",
        "--verify_state_save=0",
    ];
    run("fio", &[&options[..], &["--ioengine=psync", "--output=/dev/null", &written]].concat());
    let digest = world.import(&source, "fio");
    (fs::read(&source).unwrap(), world.file(&digest, "memory"))
}

#[test]
fn fio_verifies_every_checksum_with_every_engine() {
    let _host = host::shared();
    for serve in ["passthrough", "decode"] {
        let world = TestMount::new(serve);
        let (bytes, file) = import_from_fio(&world);
        for engine in ENGINES {
            fio(&file, engine);
        }
        assert!(fs::read(&file).unwrap() == bytes, "{serve}");
        assert_eq!(world.counter("damaged") + world.counter("failed"), 0, "{serve}");
    }
}
