//! The one error type: what failed, where, what was got and expected, and what to do next.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::shown::{path_text, shown};

/// Result with Stencil's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is; each has one exit code of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Anything that has no kind of its own.
    Failed,
    /// The words of the call are wrong: nothing was tried.
    Usage,
    /// Stored bytes are not what was stored.
    Damage,
    /// The named thing does not exist.
    NotFound,
    /// The named thing is in use by somebody else.
    InUse,
    /// What was asked for was looked at, and is not so.
    CheckFailed,
    /// The same call may succeed later.
    TryAgain,
}

impl Code {
    /// Exit code of a command that fails so.
    pub fn exit_code(self) -> u8 {
        match self {
            Code::Failed => 1,
            Code::Usage => 2,
            Code::Damage => 3,
            Code::NotFound => 4,
            Code::InUse => 5,
            Code::CheckFailed => 6,
            Code::TryAgain => 75,
        }
    }

    /// The word that stands in `error.code` of `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Code::Failed => "failed",
            Code::Usage => "usage",
            Code::Damage => "damage",
            Code::NotFound => "not-found",
            Code::InUse => "in-use",
            Code::CheckFailed => "check-failed",
            Code::TryAgain => "try-again",
        }
    }
}

/// A failure that its reader can act upon.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    code: Code,
    message: String,
    path: Option<PathBuf>,
    remedy: Option<String>,
    source: Option<io::Error>,
}

impl Error {
    /// An error of the given kind; the message says what was tried, got and expected.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { code, message: message.into(), path: None, remedy: None, source: None }))
    }

    /// [`Code::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message)
    }

    /// [`Code::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Usage, message)
    }

    /// [`Code::Damage`].
    pub fn damage(message: impl Into<String>) -> Self {
        Self::new(Code::Damage, message)
    }

    /// [`Code::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// [`Code::InUse`].
    pub fn in_use(message: impl Into<String>) -> Self {
        Self::new(Code::InUse, message)
    }

    /// [`Code::TryAgain`].
    pub fn try_again(message: impl Into<String>) -> Self {
        Self::new(Code::TryAgain, message)
    }

    /// A failed system call on a path. `ENOENT` becomes [`Code::NotFound`], everything else
    /// [`Code::Failed`]; full disks and missing rights bring their remedy along.
    pub fn io(what: impl Into<String>, path: impl AsRef<Path>, source: io::Error) -> Self {
        let code = match source.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            _ => Code::Failed,
        };
        let remedy = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Some("free space on that filesystem, then run the command again: nothing was changed")
            }
            io::ErrorKind::PermissionDenied => Some("run it as a user with access to that path, or as root"),
            io::ErrorKind::ReadOnlyFilesystem => {
                Some("that filesystem is mounted read-only; use another place or remount it")
            }
            _ => None,
        };
        let mut error = Self::new(code, what).at(path);
        error.0.remedy = remedy.map(str::to_owned);
        error.because(source)
    }

    /// Names the path that the error is about.
    #[must_use]
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Keeps the system's own error beneath this one. One that names a limit brings its remedy along, unless there is one.
    #[must_use]
    pub fn because(mut self, source: io::Error) -> Self {
        if self.0.remedy.is_none() {
            self.0.remedy = limit_remedy(&source).map(str::to_owned);
        }
        self.0.source = Some(source);
        self
    }

    /// Puts words in front of the message, for the caller's view of what was tried.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// Tells another failure as well, after this one; the kind stays this one's.
    #[must_use]
    pub fn and(self, other: Error) -> Self {
        let mut both = Error::new(self.code(), format!("{self}; moreover: {other}"));
        let remedies: Vec<&str> = [self.remedy_text(), other.remedy_text()].into_iter().flatten().collect();
        both.0.remedy = (!remedies.is_empty()).then(|| remedies.join("; "));
        both
    }

    /// What kind of failure it is.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// What was tried, got and expected, without path and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Message and cause, without the path.
    pub fn reason(&self) -> String {
        match &self.0.source {
            Some(source) => format!("{}: {}", self.0.message, errno_text(source)),
            None => self.0.message.clone(),
        }
    }

    /// The path it is about.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// What to do next.
    pub fn remedy_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// The system's error number, where a system call failed.
    pub fn errno(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// `message: path: cause`, on one line; the remedy is printed by the command line beneath it.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.0.message))?;
        if let Some(path) = &self.0.path {
            write!(f, ": {}", shown(&path_text(path)))?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {}", shown(&errno_text(source)))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

/// The system's words alone (`No such file or directory`), as C programs print them.
pub fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// What to do about a limit of the process, the control group or the host.
fn limit_remedy(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EFBIG => Some(
            "raise the limit on the size of files (ulimit -f), or use a filesystem that takes larger ones",
        ),
        libc::EMFILE => Some("raise the limit on open files of this process: ulimit -n"),
        libc::ENFILE => Some("raise the limit on open files of the host: sysctl fs.file-max"),
        libc::ENOMEM => Some(
            "raise the limits on memory: ulimit -v, memory.max of the control group; or free memory on the host",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_what_where_and_why() {
        let error = Error::io("cannot open pack", "/s/p", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.to_string(), "cannot open pack: /s/p: No such file or directory");
        assert_eq!(error.code(), Code::NotFound);
        assert_eq!(error.errno(), Some(libc::ENOENT));
    }

    #[test]
    fn of_two_failures_both_are_told() {
        let first = Error::try_again("first").at("/a").remedy("do this");
        let both = first.and(Error::failed("second").remedy("do that"));
        assert_eq!((both.code(), both.to_string().as_str()), (Code::TryAgain, "first: /a; moreover: second"));
        assert_eq!(both.remedy_text(), Some("do this; do that"));
    }

    #[test]
    fn one_line_stays_one_line() {
        let error = Error::failed("label 'a\n\u{1b}[2K\u{202e}'").at("/s\r");
        assert_eq!(error.to_string(), r"label 'a\n\u001b[2K\u202e': /s\u000d");
    }

    #[test]
    fn a_limit_is_named() {
        let cause = |errno| Error::failed("cannot start").because(io::Error::from_raw_os_error(errno));
        for (errno, word) in
            [(libc::EFBIG, "ulimit -f"), (libc::EMFILE, "ulimit -n"), (libc::ENOMEM, "ulimit -v")]
        {
            assert!(cause(errno).remedy_text().is_some_and(|remedy| remedy.contains(word)), "{word}");
        }
        assert_eq!(cause(libc::EIO).remedy_text(), None);
        let own = Error::failed("no").remedy("own").because(io::Error::from_raw_os_error(libc::ENOMEM));
        assert_eq!(own.remedy_text(), Some("own"));
    }

    #[test]
    fn a_full_disk_brings_its_remedy() {
        let error = Error::io("cannot write", "/s", io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(error.remedy_text().unwrap().contains("free space"));
        assert_eq!(error.code().exit_code(), 1);
    }
}
