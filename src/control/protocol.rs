//! What the control socket carries: one [`Request`] frame, one [`Response`] frame, both JSON.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};
use crate::store::{Digest, Serving};
use crate::units::Bytes;

/// What a supervisor can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Request {
    /// How the mount does.
    Status,
    /// How much of each passthrough backing is in the page cache.
    Residency,
    /// End the mount.
    Unmount {
        /// How.
        mode: UnmountMode,
    },
}

/// How a mount is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmountMode {
    /// Only if nobody uses it.
    Plain,
    /// Take it out of the tree now; supervisor and server go on until the last use has ended.
    Lazy,
    /// Take it out of the tree and abort the connection: who still needs a page from it dies.
    Force,
}

/// What a supervisor answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<MountStatus>),
    /// To [`Request::Residency`].
    Residency {
        /// One for each backing.
        files: Vec<Residency>,
    },
    /// It was done.
    Done,
    /// It was not done.
    Failed(Failure),
}

/// An [`Error`] on its way between two processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    code: String,
    message: String,
    path: Option<PathBuf>,
    remedy: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        let mut message = error.message().to_owned();
        if let Some(errno) = error.errno() {
            let cause = std::io::Error::from_raw_os_error(errno);
            message = format!("{message}: {}", crate::error::errno_text(&cause));
        }
        Failure {
            code: error.code().name().to_owned(),
            message,
            path: error.path().map(ToOwned::to_owned),
            remedy: error.remedy_text().map(str::to_owned),
        }
    }
}

impl Failure {
    /// The error that it was.
    pub fn into_error(self) -> Error {
        const CODES: [Code; 6] =
            [Code::Failed, Code::Usage, Code::Damage, Code::NotFound, Code::InUse, Code::TryAgain];
        let code = CODES.into_iter().find(|c| c.name() == self.code).unwrap_or(Code::Failed);
        let mut error = Error::new(code, self.message);
        if let Some(path) = self.path {
            error = error.at(path);
        }
        match self.remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }
}

/// One mount, as `status --json` prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountStatus {
    /// Where it is mounted, or was before a lazy unmount.
    pub mountpoint: PathBuf,
    /// The store that it serves.
    pub store: PathBuf,
    /// `st_dev` of everything in it.
    pub device: u64,
    /// Process that holds the mount.
    pub supervisor_pid: u32,
    /// Process that answers the kernel; none while a successor is being started.
    pub server_pid: Option<u32>,
    /// Version of both.
    pub version: String,
    /// How many servers were started in place of one that died.
    pub restarts: u64,
    /// True after a lazy unmount: no path leads to it, mappings of it still live.
    pub detached: bool,
    /// `auto`, `passthrough` or `decode`, as asked for.
    pub serve: String,
    /// Where passthrough backings live: a directory, or `memory`, or nothing with the reason in `cache_why`.
    pub cache: Option<String>,
    /// Why the cache is not where it was expected.
    pub cache_why: Option<String>,
    /// Most bytes that backings may take.
    pub cache_size: Bytes,
    /// Bytes that backings take now.
    pub cache_used: Bytes,
    /// What is served, and how.
    pub templates: Vec<TemplateStatus>,
    /// What was done since the mount began, by name.
    pub counters: BTreeMap<String, u64>,
}

/// How one template is served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TemplateStatus {
    /// Which.
    pub digest: Digest,
    /// What the next open of its RAM gets.
    pub serving: Serving,
    /// Why not passthrough, in words; none where it is, or will be at the first open.
    pub why: Option<String>,
    /// Processes that map it. The supervisor leaves it 0; the command line counts.
    pub clones: u64,
    /// Bytes of its files that are in backings, those being filled included.
    pub hydrated_bytes: Bytes,
    /// Its files.
    pub files: Vec<FileStatus>,
}

/// How one file of a template is served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileStatus {
    /// Its name.
    pub name: String,
    /// Its length.
    pub size: Bytes,
    /// What the next open gets.
    pub serving: Serving,
    /// Why not passthrough.
    pub why: Option<String>,
    /// Bytes of data in its backing, also while that is being filled.
    pub hydrated_bytes: Bytes,
    /// True when the backing is complete and verified.
    pub hydrated: bool,
}

/// Page cache of one passthrough backing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Residency {
    /// Template.
    pub digest: Digest,
    /// File of it.
    pub file: String,
    /// Bytes of the backing in the page cache.
    pub resident_bytes: Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_way() {
        let error = Error::in_use("2 clones map it").at("/mnt").remedy("stop them");
        let text = serde_json::to_string(&Response::Failed(Failure::from(&error))).unwrap();
        let Response::Failed(back) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        let back = back.into_error();
        assert_eq!(back.code(), Code::InUse);
        assert_eq!(back.to_string(), "2 clones map it: /mnt");
        assert_eq!(back.remedy_text(), Some("stop them"));
    }

    #[test]
    fn requests_have_stable_words() {
        let text = serde_json::to_string(&Request::Unmount { mode: UnmountMode::Lazy }).unwrap();
        assert_eq!(text, r#"{"ask":"unmount","mode":"lazy"}"#);
    }
}
