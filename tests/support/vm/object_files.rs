//! The files that the tables of memory objects refer to.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::vm::qemu_object::Verdict;

const MIB: u64 = 1 << 20;
const NOBODY: u32 = 65534;

/// The files that the tables refer to, in a private directory.
pub struct Files {
    pub folder: tempfile::TempDir,
    mounted: Option<PathBuf>,
}

impl Files {
    pub fn new(object: &str) -> Files {
        let folder = tempfile::tempdir().unwrap();
        // Another user must be able to enter the directory and create sockets and files in it.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let mut files = Files { folder, mounted: None };
        for (name, size, mode) in
            [("file", 4 * MIB, 0o666), ("short", MIB, 0o666), ("empty", 0, 0o666), ("denied", 4 * MIB, 0o444)]
        {
            let path = files.path(name);
            let content: Vec<u8> = (0..size).map(|n| (n / 4096 % 251) as u8 + 1).collect();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(files.path("folder")).unwrap();
        fs::set_permissions(files.path("folder"), fs::Permissions::from_mode(0o777)).unwrap();
        if object.contains("{rofs}") {
            files.mount_read_only();
        }
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a read-only bind mount of a second directory. A bind mount, because making a file system read-only fails
    /// while a child that another thread is starting has one of its files open for writing.
    fn mount_read_only(&mut self) {
        let (source, place) = (self.path("source"), self.path("mount"));
        fs::create_dir(&source).unwrap();
        fs::copy(self.path("file"), source.join("rofs")).unwrap();
        fs::create_dir(&place).unwrap();
        run(Command::new("mount").arg("--bind").args([&source, &place]));
        self.mounted = Some(place.clone());
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&place));
    }

    /// Replaces the placeholders in an object by the paths of the files.
    pub fn expand(&self, object: &str) -> String {
        let mut text = match object.strip_prefix('M') {
            Some(rest) => format!("memory-backend-file,id=m{rest}"),
            None => object.to_owned(),
        };
        for name in ["file", "short", "empty", "denied", "folder", "missing"] {
            text = text.replace(&format!("{{{name}}}"), self.path(name).to_str().unwrap());
        }
        text.replace("{rofs}", self.path("mount/rofs").to_str().unwrap())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Some(place) = &self.mounted {
            run(Command::new("umount").arg("--lazy").arg(place));
        }
    }
}

pub fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// The user for an object: objects with an unwritable file are tried as another user, because root can write to it.
pub fn user_of(object: &str) -> Option<u32> {
    object.contains("{denied}").then_some(NOBODY)
}

/// Runs `stencil explain`, as another user if `uid` is set.
pub fn explain(object: &str, files: &Files, uid: Option<u32>) -> (Verdict, Value) {
    let program = match uid {
        None => PathBuf::from(env!("CARGO_BIN_EXE_stencil")),
        Some(_) => {
            let copy = files.path("stencil");
            // The program is copied by cp(1): if this process wrote the file, a child that another thread is starting
            // could inherit the open descriptor, and execve would fail with ETXTBSY.
            run(Command::new("cp").arg(env!("CARGO_BIN_EXE_stencil")).arg(&copy));
            copy
        }
    };
    let mut command = Command::new(program);
    command.args(["explain", "--json", "--", object]);
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().unwrap();
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&output.status) {
        return (Verdict::Died(signal), Value::Null);
    }
    let value: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{object}: {e}: {}", String::from_utf8_lossy(&output.stderr)));
    if value["verdict"] == "accepted" {
        assert!(output.status.success());
        return (Verdict::Accepted, value);
    }
    assert!(!output.status.success());
    let text = |key: &str| value["error"][key].as_str().map(str::to_owned);
    (Verdict::Refused { words: text("message").unwrap(), hint: text("remedy") }, value)
}
