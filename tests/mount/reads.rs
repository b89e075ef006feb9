//! Every read method returns the imported bytes, for decode and passthrough, also after the server was killed between
//! reads.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use stencilfs::store::BLOCK_SIZE;

use stencilfs::sys::memory::mapping::{Mapping, Request};
use stencilfs::units::{Bytes, MemoryOffset};

use crate::support::host;
use crate::support::mount::{TestMount, run};

const PAGE: usize = 4096;

/// 24 MiB and a page: incompressible data, regular data, holes of the size of blocks and of huge pages, and an end in
/// the middle of a block.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; (24 << 20) + PAGE];
    let mut random = vec![0; 3 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut random);
    bytes[PAGE..PAGE + random.len()].copy_from_slice(&random);
    for (i, page) in bytes[8 << 20..16 << 20].chunks_mut(PAGE).enumerate().filter(|(i, _)| i % 3 == 0) {
        page[..8].copy_from_slice(&i.to_le_bytes());
        page[100..].fill(i as u8);
    }
    bytes[20 << 20..(20 << 20) + BLOCK_SIZE as usize].fill(3);
    let length = bytes.len();
    bytes[length - 5..].copy_from_slice(b"end!\n");
    bytes
}

/// Compares the file with `expected`: read whole, at unaligned offsets, by copy_file_range, sendfile, O_DIRECT and
/// mmap.
fn compare(path: &Path, expected: &[u8], scratch: &Path) {
    assert!(fs::read(path).unwrap() == expected, "read");

    let file = File::open(path).unwrap();
    let mut piece = vec![0; 300_001];
    for (offset, length) in [
        (0, 1),
        (1, 4095),
        (4095, 2),
        (65_535, 70_001),
        ((3 << 20) + 4090, 300_001),
        ((8 << 20) - 7, 131_072),
        ((20 << 20) - 1, 65_540),
        (expected.len() - 6, 6),
    ] {
        file.read_exact_at(&mut piece[..length], offset as u64).unwrap();
        assert!(piece[..length] == expected[offset..offset + length], "pread {length} at {offset}");
    }
    assert_eq!(
        file.read_at(&mut piece, expected.len() as u64 - 2).unwrap(),
        2,
        "a read must end at the end of the file"
    );
    assert_eq!(file.read_at(&mut piece, expected.len() as u64 + 9).unwrap(), 0);

    let mut other = File::create(scratch).unwrap();
    std::io::copy(&mut File::open(path).unwrap(), &mut other).unwrap();
    let mut position = 4097;
    let sent = rustix::fs::sendfile(&other, &file, Some(&mut position), 200_000).unwrap();
    assert_eq!(sent, 200_000, "sendfile");
    assert!(fs::read(scratch).unwrap()[..expected.len()] == *expected, "copy_file_range");
    other = File::open(scratch).unwrap();
    let mut copied = Vec::new();
    other.seek(SeekFrom::Start(expected.len() as u64)).unwrap();
    other.read_to_end(&mut copied).unwrap();
    assert!(copied == expected[4097..4097 + sent], "sendfile");

    let direct = fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(path)
        .unwrap();
    let mut aligned = stencilfs::sys::memory::memfd::LockedBuffer::new(Bytes::new(1 << 20)).unwrap();
    for offset in [0, 2 << 20, (24 << 20)] {
        let got = direct.read_at(&mut aligned, offset as u64).unwrap();
        let end = expected.len().min(offset + aligned.len());
        assert_eq!(got, end - offset, "O_DIRECT at {offset}");
        assert!(aligned[..got] == expected[offset..end], "O_DIRECT at {offset}");
    }

    let pages = Bytes::new(expected.len() as u64).pages().bytes();
    let mapped = Mapping::new(&Request::view(file.as_fd(), pages)).unwrap();
    let mut mapped_bytes = vec![0; expected.len()];
    mapped.read(MemoryOffset::new(0), &mut mapped_bytes).unwrap();
    assert!(mapped_bytes == expected, "mapped");
}

fn digest_of(path: &Path) -> String {
    run("sha256sum", &[path]).split(' ').next().unwrap().to_owned()
}

fn assert_read_methods_agree(serve: &str) {
    let _host = host::shared();
    let world = TestMount::new(serve);
    let bytes = image();
    let source = world.dir().join("source");
    fs::write(&source, &bytes).unwrap();
    let digest = world.import(&source, "web:1");
    let path = world.file(&digest, "memory");
    let sum = digest_of(&source);
    for round in 0..3 {
        compare(&path, &bytes, &world.dir().join("copy"));
        assert_eq!(digest_of(&path), sum, "sha256sum in round {round}");
        assert_eq!(digest_of(&world.mountpoint().join("templates/web/1/memory")), sum);
        world.kill_server();
        // The next round must be served by the new server, not by the page cache.
        drop_cache(&path);
    }
    let status = world.status();
    assert_eq!(status["restarts"], 3);
    assert_eq!(status["templates"][0]["serving"], serve, "{status:#}");
    let counter = |name: &str| status["counters"][name].as_u64().unwrap();
    assert_eq!(counter("damaged") + counter("failed"), 0, "{status:#}");
    assert_eq!(counter("opens_decode") == 0, serve == "passthrough", "{status:#}");
}

fn drop_cache(path: &Path) {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn every_read_method_agrees_with_the_source_on_decode() {
    assert_read_methods_agree("decode");
}

#[test]
fn every_read_method_agrees_with_the_source_on_passthrough() {
    assert_read_methods_agree("passthrough");
}

#[test]
fn names_attributes_and_sizes_are_as_documented() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    let bytes = image();
    let digest = world.import_bytes(&bytes, "web:1");
    let names = |path: &str| {
        let mut names: Vec<String> = fs::read_dir(world.mountpoint().join(path))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["by-id", "templates"]);
    assert_eq!(names("by-id"), std::slice::from_ref(&digest));
    assert_eq!(names(&format!("by-id/{digest}")), ["manifest.json", "memory"]);
    assert_eq!(names("templates"), ["web"]);
    assert_eq!(names("templates/web"), ["1"]);
    let link = fs::read_link(world.mountpoint().join("templates/web/1")).unwrap();
    assert_eq!(link, Path::new("../../by-id").join(&digest));

    let memory = fs::metadata(world.file(&digest, "memory")).unwrap();
    assert_eq!((memory.len(), memory.mode(), memory.nlink()), (bytes.len() as u64, 0o100_444, 1));
    let zero = [0; PAGE];
    let data = bytes.chunks(PAGE).filter(|page| *page != &zero[..page.len()]).count() * PAGE;
    assert_eq!(memory.blocks() * 512, data as u64, "st_blocks must count the pages with data");
    assert_eq!(fs::metadata(world.mountpoint().join("by-id")).unwrap().mode(), 0o40_555);
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(world.file(&digest, "manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["digest"], digest.as_str());

    let stat = rustix::fs::statvfs(world.mountpoint()).unwrap();
    assert_eq!((stat.f_blocks * stat.f_frsize, stat.f_bfree, stat.f_files), (data as u64, 0, 1));

    for missing in
        ["x", "by-id/x", &format!("by-id/{}", digest.to_uppercase()), "templates/web/2", "templates/x"]
    {
        let error = fs::metadata(world.mountpoint().join(missing)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{missing}");
    }
    let many: Vec<String> = (0..300).map(|i| format!("v{i:03}")).collect();
    for tag in &many {
        let store = stencilfs::store::Store::open(&world.store_dir()).unwrap();
        let pointer = stencilfs::store::TagName::new("many", tag).unwrap();
        store.set_tag(&pointer, &digest.parse().unwrap()).unwrap();
    }
    assert_eq!(names("templates/many"), many, "a listing longer than one READDIR reply");
}

#[test]
fn seek_finds_data_and_holes() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let mut bytes = vec![0; 8 << 20];
        bytes[4 << 20] = 1;
        let digest = world.import_bytes(&bytes, "web:1");
        let file = File::open(world.file(&digest, "memory")).unwrap();
        let seek = |from| rustix::fs::seek(&file, from);
        assert_eq!(seek(rustix::fs::SeekFrom::Data(0)).unwrap(), 4 << 20);
        assert_eq!(seek(rustix::fs::SeekFrom::Hole(4 << 20)).unwrap(), (4 << 20) + BLOCK_SIZE);
        assert_eq!(seek(rustix::fs::SeekFrom::Hole(5 << 20)).unwrap(), 5 << 20);
        assert_eq!(seek(rustix::fs::SeekFrom::Data(5 << 20)).unwrap_err(), rustix::io::Errno::NXIO);
        assert_eq!(seek(rustix::fs::SeekFrom::End(0)).unwrap(), 8 << 20);
    }
}

/// fio writes a file with a checksum in every block, and verifies the checksums through the mount.
#[test]
fn fio_verifies_the_blocks_it_wrote() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let source = world.dir().join("fio");
        let fio = |file: &Path, more: &[&str]| {
            let name = format!("--filename={}", file.display());
            let mut args =
                vec!["--name=templates", name.as_str(), "--size=16m", "--bs=4k", "--verify=crc32c"];
            args.extend(["--randseed=7", "--verify_fatal=1", "--output-format=terse"]);
            args.extend(more);
            let mut command = std::process::Command::new("fio");
            let done = command
                .args(args)
                .current_dir(world.dir())
                .output()
                .expect("cannot run fio: run 'make setup'");
            let printed =
                String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
            (done.status.success() && !printed.contains("verify: bad"), printed)
        };
        let (good, printed) = fio(&source, &["--rw=write", "--do_verify=0"]);
        assert!(good, "{printed}");
        let digest = world.import(&source, "web:1");
        let path = world.file(&digest, "memory");
        for (engine, rw) in
            [("psync", "read"), ("mmap", "read"), ("psync", "randread"), ("libaio", "randread")]
        {
            let (engine, rw) = (format!("--ioengine={engine}"), format!("--rw={rw}"));
            let direct = if engine.contains("libaio") { "--direct=1" } else { "--direct=0" };
            let (good, printed) =
                fio(&path, &[&engine, &rw, direct, "--verify_only=0", "--readonly", "--iodepth=8"]);
            assert!(good, "{serve} {engine} {rw}: {printed}");
            world.kill_server();
            drop_cache(&path);
        }
        // fio does verify: one changed byte is an error.
        let mut bytes = fs::read(&source).unwrap();
        bytes[5 << 20] ^= 1;
        let wrong = world.import_bytes(&bytes, "web:wrong");
        let (good, printed) =
            fio(&world.file(&wrong, "memory"), &["--ioengine=psync", "--rw=read", "--readonly"]);
        assert!(!good, "{printed}");
    }
}
