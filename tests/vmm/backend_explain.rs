//! `stencil explain`: output, exit codes, and that the backing file is neither created nor modified.

use std::fs;
use std::process::{Command, Output};

use crate::support::vm::object_files::Files;

fn explain(files: &Files, object: &str, json: bool) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stencil"));
    if json {
        command.arg("--json");
    }
    command.args(["explain", "--", &files.expand(object)]).output().unwrap()
}

fn utf8(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn explains_an_accepted_object_as_text_and_json() {
    let files = Files::new("");
    let object = "M,size=4M,mem-path={file},readonly=on,rom=off";
    let output = explain(&files, object, false);
    assert!(output.status.success() && output.stderr.is_empty());
    let text = utf8(&output.stdout);
    let path = files.path("file").display().to_string();
    let lines: Vec<_> = text.lines().collect();
    assert!(
        lines[0].starts_with("memory-backend-file 'm', 4.00 MiB: writable RAM from a read-only file"),
        "{text}"
    );
    assert!(
        lines[1].starts_with("maps ") && lines[1].contains(" rw-p ") && lines[1].ends_with(&path),
        "{text}"
    );
    assert!(lines[2].starts_with("VmFlags  rd wr "), "{text}");
    assert!(lines[4].contains("4.00 MiB") && lines[5].trim().starts_with("use reserve=off, "), "{text}");

    let value: serde_json::Value = serde_json::from_slice(&explain(&files, object, true).stdout).unwrap();
    assert_eq!(value["schema"], 1);
    assert_eq!(value["verdict"], "accepted");
    assert_eq!(value["role"], "template");
    assert_eq!(value["size_bytes"], 4 << 20);
    assert_eq!(value["notes"][0]["bytes"], 4 << 20);
    assert!(value["notes"][0]["remedy"].as_str().unwrap().starts_with("use reserve=off, "), "{value}");
}

#[test]
fn a_rejected_object_gives_an_error_a_hint_and_an_exit_code() {
    let files = Files::new("");
    for (object, code) in [
        ("M,size=4M,mem-path={file},share=maybe", 2),
        ("memory-backend-file,id=1", 2),
        ("M,size=4M,mem-path={file},rom=on", 2),
        ("M,size=4M,mem-path={missing},readonly=on", 4),
        ("M,size=8M,mem-path={file}", 1),
        ("M,size=4M,mem-path={empty},readonly=on", 1),
    ] {
        let output = explain(&files, object, false);
        let text = utf8(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{object}: {text}");
        assert!(output.stdout.is_empty(), "{object}");
        assert_eq!(text.lines().count(), 2, "{object}: {text}");
        assert!(text.starts_with("error: ") && text.contains("\nhint: "), "{object}: {text}");
    }
}

#[test]
fn explain_does_not_create_or_modify_files() {
    for object in [
        "M,size=4M,mem-path={missing}",
        "M,size=4M,mem-path={missing},share=on,prealloc=on",
        "M,size=4M,mem-path={empty},share=on",
        "M,size=4M,mem-path={empty},prealloc=on,prefault=on",
        "M,size=4M,mem-path={file},share=on,discard-data=on,prealloc=on",
        "M,size=4M,mem-path={file},prealloc=on",
        "M,size=4M,mem-path={folder}",
    ] {
        let files = Files::new("");
        let before = fs::read(files.path("file")).unwrap();
        assert!(explain(&files, object, false).status.success(), "{object}");
        assert!(fs::read(files.path("file")).unwrap() == before, "{object}");
        assert_eq!(fs::metadata(files.path("empty")).unwrap().len(), 0, "{object}");
        assert!(!files.path("missing").exists(), "{object}");
        assert_eq!(fs::read_dir(files.path("folder")).unwrap().count(), 0, "{object}");
    }
}
