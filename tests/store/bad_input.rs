//! User errors: each gives one clear line, a remedy, the right exit code, and changes nothing.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Duration;

use crate::support::mount::copy_program;
use crate::support::store::{Fixture, Ran, guest_like, random, stencil};

/// Panics unless the command fails with this exit code and an error that contains all of `words`, with a remedy, in
/// text and as JSON.
fn refused(fixture: &Fixture, args: &[&str], code: i32, words: &[&str]) {
    let ran = fixture.run(args);
    assert_eq!(ran.code, code, "{args:?}: {ran:?}");
    assert_eq!(ran.stdout, "", "{args:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "{args:?} lacks '{word}': {ran:?}");
    }
    let with_json: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
    let json = fixture.run(&with_json);
    assert_eq!(json.code, code, "{args:?}");
    let error = &json.json()["error"];
    let name = match code {
        1 => "failed",
        2 => "usage",
        3 => "damage",
        4 => "not-found",
        _ => "in-use",
    };
    assert_eq!(error["code"], name, "{error}");
    assert!(!error["message"].as_str().unwrap().is_empty(), "{error}");
    assert!(error["remedy"].is_string(), "{error}");
}

#[test]
fn invalid_names_and_options_are_usage_errors() {
    let fixture = Fixture::new();
    let good = fixture.file("good", &random(1, 8192));
    let good = good.to_str().unwrap();
    for name in [
        "a/b",
        "/a",
        "../a",
        "a..b",
        "..",
        "",
        ":x",
        "a:",
        "a:b:c",
        "-a",
        "a b",
        "ä",
        "deadbeef",
        "a@b",
        &"n".repeat(129),
    ] {
        // After `--` the name cannot be an option.
        let ran = fixture.run(&["import", "--", good, name]);
        assert_eq!(ran.code, 2, "{name}: {ran:?}");
        let ran = fixture.run(&["import", "--json", "--", good, name]);
        assert_eq!((ran.code, ran.json()["error"]["code"].as_str()), (2, Some("usage")), "{name}");
    }
    refused(&fixture, &["import", good, "a/b"], 2, &["invalid name 'a/b': contains '/'", "letters, digits"]);
    refused(&fixture, &["import", good, "a..b"], 2, &["contains '..'"]);
    refused(&fixture, &["import", good, "a", "--file", "../x=/dev/null"], 2, &["file name"]);
    refused(
        &fixture,
        &["import", good, "a", "--file", "manifest.json=/dev/null,kind=blob"],
        2,
        &["manifest.json"],
    );
    refused(&fixture, &["import", good, "a", "--file", "memory=/dev/null,kind=blob"], 2, &["given twice"]);
    refused(&fixture, &["import", good, "a", "--file", "x=/dev/null,kind=disk"], 2, &["ram, rom or blob"]);
    refused(&fixture, &["import", good, "a", "--file", "x"], 2, &["NAME=PATH"]);
    refused(&fixture, &["import", good, "a", "--label", "x"], 2, &["KEY=VALUE"]);
    refused(&fixture, &["import", good, "a", "--mode", "0644"], 2, &["only read bits", "0444"]);
    refused(
        &fixture,
        &["import", good, "a", "--owner", "no-such-user-here"],
        2,
        &["unknown user 'no-such-user-here'", "number"],
    );
    refused(&fixture, &["import", good, "a", "--compression", "gzip"], 2, &["lz4, none, zstd"]);
    refused(&fixture, &["import", good, "a", "--compression", "zstd:99"], 2, &["1 to 22"]);
    refused(&fixture, &["import", good, "a", "--format", "vmdk"], 2, &["auto, raw or firecracker"]);
    refused(&fixture, &["import", good, "a", "--no-such-option"], 2, &["--no-such-option"]);
    // None of the commands has created a store.
    assert!(!fixture.path("store").exists());
}

#[test]
fn unusable_sources_are_refused() {
    let fixture = Fixture::new();
    let dir = fixture.dir.path().to_str().unwrap().to_owned();
    let path = |name: &str| format!("{dir}/{name}");
    fixture.file("odd", &random(1, 10_000));
    fixture.file("empty", b"");
    fixture.file("qcow2", &[&b"QFI\xfb"[..], &[0; 8188]].concat());
    fixture.file("gzip", &[&b"\x1f\x8b\x08"[..], &[0; 8189]].concat());
    symlink("nowhere", path("dangling")).unwrap();
    refused(&fixture, &["import", &path("missing"), "a"], 4, &["cannot open", "No such file"]);
    refused(&fixture, &["import", &path("dangling"), "a"], 4, &["cannot open", "No such file"]);
    refused(&fixture, &["import", &dir, "a"], 2, &["cannot import a symbolic link", "dangling"]);
    refused(
        &fixture,
        &["import", &path("odd"), "a"],
        2,
        &["10000 is not a multiple of 4096", "truncate -s 12288"],
    );
    refused(&fixture, &["import", &path("empty"), "a"], 2, &["is empty"]);
    refused(&fixture, &["import", &path("qcow2"), "a"], 2, &["qcow2", "--format raw"]);
    refused(&fixture, &["import", &path("gzip"), "a"], 2, &["gzip", "zcat"]);
    let state = path("odd");
    refused(&fixture, &["import", &path("qcow2"), "a", "--format", "firecracker"], 2, &["a state file"]);
    fixture.file("page", &random(2, 4096));
    let firecracker = ["import", &path("page"), "a", "--state", &state, "--format", "firecracker"];
    refused(&fixture, &firecracker, 2, &["not written by Firecracker", "--format raw"]);
    fixture.run(&["import", &path("gzip"), "a", "--format", "raw"]).ok();
    fixture.run(&["rm", "a"]).ok();
    // The length of a pipe is known only at its end.
    let ran: Ran = stencil(fixture.dir.path(), &["import", "-", "a"])
        .stdin(File::open(path("odd")).unwrap())
        .output()
        .unwrap()
        .into();
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("10000 is not a multiple of 4096"), "{ran:?}");
    assert_eq!(fixture.run(&["inspect", "a"]).code, 4);
    fixture.assert_clean();
}

/// The source is truncated or written while `import` reads it.
#[test]
fn import_refuses_a_source_that_changes_meanwhile() {
    let fixture = Fixture::new();
    fixture.store();
    for (name, change) in [("cut", 0u8), ("written", 1)] {
        let source = fixture.path(name);
        // Long enough that the change, which comes at once, happens during the import even on a fast machine.
        let file = File::create(&source).unwrap();
        for piece in 0..24 {
            file.write_all_at(&random(piece, 8 << 20), piece * (8 << 20)).unwrap();
        }
        // A change within the same tick of the file system's clock would not change mtime.
        std::thread::sleep(Duration::from_millis(20));
        let child = stencil(
            fixture.dir.path(),
            &["import", source.to_str().unwrap(), "a", "--compression", "zstd:12"],
        )
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
        // The import has started when its session directory exists.
        let session = fixture.path("store/tmp");
        while fs::read_dir(&session).map_or(0, |entries| entries.count()) == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
        match change {
            0 => file.set_len(100 << 20).unwrap(),
            _ => file.write_all_at(b"changed", 5).unwrap(),
        }
        let ran: Ran = child.wait_with_output().unwrap().into();
        assert_eq!(ran.code, 1, "{name}: {ran:?}");
        assert!(ran.stderr.contains("while being read") && ran.stderr.contains("pause the guest"), "{ran:?}");
        assert_eq!(fixture.run(&["ls", "--json"]).json()["templates"].as_array().unwrap().len(), 0);
        fixture.assert_clean();
        assert_eq!(fixture.files("packs").len(), 0);
    }
}

#[test]
fn missing_stores_and_templates_are_reported() {
    let fixture = Fixture::new();
    for args in
        [&["ls"][..], &["inspect", "a"], &["rm", "a"], &["verify"], &["export", "a", "x"], &["tag", "a", "b"]]
    {
        refused(&fixture, args, 4, &["no template store", "STENCIL_STORE"]);
    }
    // A directory that is not a store is not changed.
    let source = fixture.file("m", &guest_like(1, 1 << 20));
    let source = source.to_str().unwrap();
    let not_a_store = fixture.path("store");
    fs::create_dir(&not_a_store).unwrap();
    fs::write(not_a_store.join("letter"), "dear").unwrap();
    refused(&fixture, &["ls"], 2, &["not a template store", "--store"]);
    refused(&fixture, &["import", source, "a"], 2, &["not a template store", "--store"]);
    assert_eq!(fs::read_dir(&not_a_store).unwrap().count(), 1);
    fs::remove_dir_all(&not_a_store).unwrap();
    fs::write(&not_a_store, "a file").unwrap();
    assert_ne!(fixture.run(&["ls"]).code, 0);
    assert_ne!(fixture.run(&["import", source, "a"]).code, 0);
    assert_eq!(fs::read_to_string(&not_a_store).unwrap(), "a file");
    fs::remove_file(&not_a_store).unwrap();

    fixture.run(&["import", source, "a"]).ok();
    for args in [&["inspect", "b"][..], &["rm", "b"], &["chmod", "0444", "b"], &["verify", "b"]] {
        refused(&fixture, args, 4, &["no template '", "stencil ls"]);
    }
    refused(&fixture, &["inspect", &"0".repeat(64)], 4, &["no template"]);
    refused(&fixture, &["inspect", "a@sha256:00"], 2, &["NAME@blake3:HEX"]);
    refused(&fixture, &["export", "a/nope", "x"], 4, &["no file 'nope'", "memory"]);
    for command in
        [&["path", "a"][..], &["args", "a", "--vmm", "qemu"], &["clone", "a", "--simulate", "write=1p"]]
    {
        refused(
            &fixture,
            command,
            4,
            &["error: the store is not mounted: ", "hint: mount the store: ", "mount MNT"],
        );
    }
    refused(&fixture, &["export", "a", "/no/such/folder/x"], 4, &["No such file"]);
}

#[test]
fn a_template_is_found_by_tag_digest_or_prefix() {
    let fixture = Fixture::new();
    let source = fixture.file("m", &guest_like(1, 1 << 20));
    let imported = fixture.run(&["import", source.to_str().unwrap(), "a:1", "--json"]).ok().json();
    let digest = imported["digest"].as_str().unwrap();
    fixture.run(&["tag", "a:1", "b"]).ok();
    for reference in [
        "a:1",
        "b",
        "b:latest",
        digest,
        &digest[..8],
        &digest[..20].to_uppercase(),
        &format!("x@blake3:{digest}"),
    ] {
        let inspected = fixture.run(&["inspect", reference, "--json"]).ok().json();
        assert_eq!(inspected["digest"], digest, "{reference}");
    }
    assert_eq!(fixture.run(&["inspect", "a"]).code, 4);
    assert_eq!(fixture.run(&["inspect", &digest[..7]]).code, 4);
    // A tag is removed alone while the template has others; the last one removes the template.
    let removed = fixture.run(&["rm", "a:1", "--json"]).ok().json();
    assert_eq!(removed["removed"][0]["digest"], serde_json::Value::Null);
    fixture.run(&["inspect", "b"]).ok();
    let removed = fixture.run(&["rm", "b", "--json"]).ok().json();
    assert_eq!(removed["removed"][0]["digest"], digest);
    assert_eq!(fixture.run(&["ls", "--json"]).ok().json()["templates"], serde_json::json!([]));
}

#[test]
fn a_user_without_permission_reads_and_changes_nothing() {
    let fixture = Fixture::new();
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let source = fixture.file("m", &random(1, 4096));
    let source = source.to_str().unwrap();
    fixture.run(&["import", source, "a"]).ok();
    assert_eq!(fs::metadata(fixture.path("store")).unwrap().permissions().mode() & 0o777, 0o700);
    // The other user may not be able to reach the binary: run a copy.
    let binary = fixture.path("stencil");
    copy_program(env!("CARGO_BIN_EXE_stencil"), &binary);
    let before = fixture.files("");
    for args in [&["ls"][..], &["import", source, "b"], &["rm", "a"], &["export", "a", "-"]] {
        let ran: Ran = std::process::Command::new(&binary)
            .args(args)
            .env("STENCIL_STORE", fixture.path("store"))
            .uid(65534)
            .gid(65534)
            .output()
            .unwrap()
            .into();
        assert_eq!(ran.code, 1, "{args:?}: {ran:?}");
        assert!(ran.stderr.contains("Permission denied") && ran.stderr.contains("as root"), "{ran:?}");
    }
    assert_eq!(fixture.files(""), before);
    fixture.run(&["verify"]).ok();
}
