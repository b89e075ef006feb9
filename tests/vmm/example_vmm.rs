//! The library as other VMMs use it: the example `vmm` runs a guest on a template in a mount, which `templates` finds.

use std::path::{Path, PathBuf};

use stencilfs::error::Code;
use stencilfs::templates::Templates;
use stencilfs::units::{FileOffset, PAGE_SIZE};

use crate::support::host;
use crate::support::mount::{STENCIL, TestMount, run};
use crate::vmm::kvm_guest::write_template;

/// The example, which `make test` builds before the suite.
fn example() -> PathBuf {
    let path = Path::new(STENCIL).with_file_name("examples").join("vmm");
    let build = "cargo build -p stencilfs --no-default-features --features rust-vmm --example vmm";
    assert!(path.is_file(), "{} is missing: run `{build}` (and --release) first", path.display());
    path
}

/// Real-mode segments of pages below 1 MiB.
fn segments(pages: &[u64]) -> Vec<u16> {
    pages.iter().map(|page| (page * PAGE_SIZE / 16) as u16).collect()
}

#[test]
fn the_example_prints_exactly_the_pages_that_its_guest_wrote() {
    let _host = host::shared();
    for serve in ["decode", "passthrough"] {
        let world = TestMount::new(serve);
        let source = world.dir().join("source");
        // Page 0 has the program. 83 and 256 have no common divisor: each page occurs once.
        let written: Vec<u64> = (1..130).map(|n| n * 83 % 256).filter(|page| *page != 0).collect();
        let read: Vec<u64> = (1..256).filter(|page| !written.contains(page)).collect();
        write_template(&source, &segments(&read), &segments(&written));
        world.import(&source, "guest:1");
        let template = Templates::open(world.store_dir()).unwrap().get("guest:1").unwrap();
        let memory = template.path_in(world.mountpoint(), "memory").unwrap();

        let output = run(example().to_str().unwrap(), &[&memory]);
        let mut sorted = written.clone();
        sorted.sort_unstable();
        let pages = memory.metadata().unwrap().len() / PAGE_SIZE;
        let mut expected = format!("the guest has copied {} of {pages} pages\n", written.len());
        sorted.iter().for_each(|page| expected += &format!("{:#x}\n", page * PAGE_SIZE));
        assert_eq!(output, expected, "{serve}");
        let original = std::fs::read(&source).unwrap();
        assert!(std::fs::read(&memory).unwrap() == original, "{serve}: the template must not change");
    }
}

#[test]
fn templates_reads_a_store_and_finds_its_mount() {
    let _host = host::shared();
    let (one, two) = (TestMount::new("decode"), TestMount::new("decode"));
    let mut content = vec![0; 300 << 10];
    content[128 << 10..].fill(5);
    content[200_000] = 6;
    let digest = one.import_bytes(&content, "a:1");
    two.import_bytes(&content, "a:1");
    let templates = Templates::open(one.store_dir()).unwrap();
    assert_eq!(templates.get("nothing:1").unwrap_err().code(), Code::NotFound);
    let listed = templates.tags().unwrap();
    assert_eq!(
        listed.iter().map(|(tag, found)| (tag.as_str(), found.to_string())).collect::<Vec<_>>(),
        [("a:1", digest.clone())]
    );
    let template = templates.get(&digest[..12]).unwrap();
    assert_eq!(template.digest().to_string(), digest);

    let mut reader = template.reader("memory").unwrap();
    let mut bytes = vec![9; 100_000];
    reader.read_at(FileOffset::new(100_001), &mut bytes).unwrap();
    assert!(bytes == content[100_001..200_001]);
    let beyond = reader.read_at(FileOffset::new(content.len() as u64 - 5), &mut bytes);
    assert_eq!(beyond.unwrap_err().code(), Code::Usage);
    let data = 128u64 << 10..320 << 10;
    assert_eq!(reader.data_ranges().unwrap(), std::slice::from_ref(&data));
    assert_eq!(template.reader("state").unwrap_err().code(), Code::NotFound);

    assert_eq!(template.path_in(one.mountpoint(), "memory").unwrap(), one.file(&digest, "memory"));
    let other = template.path_in(two.mountpoint(), "memory").unwrap_err();
    assert_eq!(
        (other.code(), other.message()),
        (Code::Failed, "the file belongs to a mount of another store")
    );
    assert_eq!(template.path_in(one.dir(), "memory").unwrap_err().code(), Code::NotFound);
}
