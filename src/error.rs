//! The error type of the library: the failed operation, the object, the cause and a remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::sanitize::{path_text, sanitize};

/// A result with [`Error`] as its default error type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Kind of a failure. Each kind has its own exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Any failure without a more specific kind.
    Failed,
    /// Invalid arguments or input. The item that failed has changed nothing; earlier items of the command may be done.
    Usage,
    /// Stored data is corrupt.
    Damage,
    /// The named object does not exist.
    NotFound,
    /// The named object is in use by another process.
    InUse,
    /// A check has run to completion and its condition does not hold.
    CheckFailed,
    /// A temporary failure: the same command may succeed later.
    TryAgain,
}

impl Code {
    /// Returns the exit code of a command that fails with this kind. 75 is `EX_TEMPFAIL` of sysexits.h.
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

    /// Returns the value of `error.code` in `--json` output.
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

/// A failure with an optional path, cause and remedy.
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
    /// Creates an error. The message names the failed operation or the invalid value.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { code, message: message.into(), path: None, remedy: None, source: None }))
    }

    /// Creates an error with [`Code::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message)
    }

    /// Creates an error with [`Code::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Code::Usage, message)
    }

    /// Creates an error with [`Code::Damage`].
    pub fn damage(message: impl Into<String>) -> Self {
        Self::new(Code::Damage, message)
    }

    /// Creates an error with [`Code::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// Creates an error with [`Code::InUse`].
    pub fn in_use(message: impl Into<String>) -> Self {
        Self::new(Code::InUse, message)
    }

    /// Creates an error with [`Code::TryAgain`].
    pub fn try_again(message: impl Into<String>) -> Self {
        Self::new(Code::TryAgain, message)
    }

    /// Creates an error for a failed system call on a path: [`Code::NotFound`] for `ENOENT`, otherwise
    /// [`Code::Failed`]. Adds a remedy for missing files, full disks, exceeded quotas, denied permissions and read-only
    /// file systems.
    pub fn io(what: impl Into<String>, path: impl AsRef<Path>, source: io::Error) -> Self {
        let code = match source.kind() {
            io::ErrorKind::NotFound => Code::NotFound,
            _ => Code::Failed,
        };
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => Some("check the path: no file or directory has this name"),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Some("free space on that file system and run the command again")
            }
            io::ErrorKind::PermissionDenied => {
                Some("run the command as root or as a user with access to the path")
            }
            io::ErrorKind::ReadOnlyFilesystem => {
                Some("choose a path on a writable file system, or remount the file system read-write")
            }
            _ => None,
        };
        let mut error = Self::new(code, what).at(path);
        error.0.remedy = remedy.map(str::to_owned);
        error.because(source)
    }

    /// Sets the path that the error is about.
    #[must_use]
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// Sets the remedy: an imperative that tells the user what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.remedy = Some(hint.into());
        self
    }

    /// Sets the underlying error. A cause that is a resource limit adds its own remedy unless a remedy is already set.
    #[must_use]
    pub fn because(mut self, source: io::Error) -> Self {
        if self.0.remedy.is_none() {
            self.0.remedy = limit_remedy(&source).map(str::to_owned);
        }
        self.0.source = Some(source);
        self
    }

    /// Prefixes the message with the operation of the caller.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// Appends a second failure to the message. The kind stays that of the first failure; the remedies are joined.
    #[must_use]
    pub fn and(self, other: Error) -> Self {
        let mut both = Error::new(self.code(), format!("{self}; also: {other}"));
        let remedies: Vec<&str> = [self.hint_text(), other.hint_text()].into_iter().flatten().collect();
        both.0.remedy = (!remedies.is_empty()).then(|| remedies.join("; "));
        both
    }

    /// Returns the kind of the failure.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// Returns the message without path and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the message and the cause without the path.
    pub fn reason(&self) -> String {
        match &self.0.source {
            Some(source) => format!("{}: {}", self.0.message, errno_text(source)),
            None => self.0.message.clone(),
        }
    }

    /// Returns the path that the error is about.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Returns the remedy.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// Returns the errno of the underlying system call.
    pub fn errno(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }
}

/// `message: path: cause` on one line, sanitized for a terminal, without a prefix and without the remedy.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&sanitize(&self.0.message))?;
        if let Some(path) = &self.0.path {
            write!(f, ": {}", sanitize(&path_text(path)))?;
        }
        if let Some(source) = &self.0.source {
            write!(f, ": {}", sanitize(&errno_text(source)))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

/// Returns the text of the error as strerror(3) prints it (`No such file or directory`), without the errno.
pub fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Returns the remedy for a limit of the process, the cgroup or the host.
fn limit_remedy(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EFBIG => {
            Some("raise the file size limit (ulimit -f), or use a file system that supports larger files")
        }
        libc::EMFILE => Some("raise the open file limit of this process: ulimit -n"),
        libc::ENFILE => Some("raise the open file limit of the host: sysctl fs.file-max"),
        libc::ENOMEM => {
            Some("raise the memory limits (ulimit -v, memory.max of the cgroup) or free memory on the host")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_joins_message_path_and_cause() {
        let error = Error::io("cannot open pack", "/s/p", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.to_string(), "cannot open pack: /s/p: No such file or directory");
        assert_eq!(error.code(), Code::NotFound);
        assert_eq!(error.errno(), Some(libc::ENOENT));
    }

    #[test]
    fn and_joins_messages_and_remedies() {
        let first = Error::try_again("first").at("/a").hint("do this");
        let both = first.and(Error::failed("second").hint("do that"));
        assert_eq!((both.code(), both.to_string().as_str()), (Code::TryAgain, "first: /a; also: second"));
        assert_eq!(both.hint_text(), Some("do this; do that"));
    }

    #[test]
    fn display_is_one_sanitized_line() {
        let error = Error::failed("label 'a\n\u{1b}[2K\u{202e}'").at("/s\r");
        assert_eq!(error.to_string(), r"label 'a\n\u001b[2K\u202e': /s\u000d");
    }

    #[test]
    fn resource_limits_add_a_remedy() {
        let cause = |errno| Error::failed("cannot start").because(io::Error::from_raw_os_error(errno));
        for (errno, word) in
            [(libc::EFBIG, "ulimit -f"), (libc::EMFILE, "ulimit -n"), (libc::ENOMEM, "ulimit -v")]
        {
            assert!(cause(errno).hint_text().is_some_and(|remedy| remedy.contains(word)), "{word}");
        }
        assert_eq!(cause(libc::EIO).hint_text(), None);
        let own = Error::failed("no").hint("own").because(io::Error::from_raw_os_error(libc::ENOMEM));
        assert_eq!(own.hint_text(), Some("own"));
    }

    #[test]
    fn full_disk_adds_a_remedy() {
        let error = Error::io("cannot write", "/s", io::Error::from_raw_os_error(libc::ENOSPC));
        assert!(error.hint_text().unwrap().contains("free space"));
        assert_eq!(error.code().exit_code(), 1);
    }
}
