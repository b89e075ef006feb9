//! Descriptors with names, as they are handed from process to process: `--fds=NAME:NUMBER,…`, or sd_listen_fds(3).

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use stencilfs::error::{Error, Result};
use stencilfs::sys::descriptor;

const OPTION: &str = "--fds=";

/// The argument that names these; whoever is started with it inherits them under their numbers.
pub fn argument(all: &[(&str, BorrowedFd<'_>)]) -> String {
    let names = all.iter().map(|(name, fd)| format!("{name}:{},", fd.as_raw_fd()));
    OPTION.to_owned() + &names.collect::<String>()
}

/// What such an argument names; none for another argument, and for one that cannot be understood.
pub fn parse(argument: &str) -> Option<Vec<(&str, RawFd)>> {
    let list = argument.strip_prefix(OPTION)?.split(',').filter(|item| !item.is_empty());
    list.map(|item| item.split_once(':').and_then(|(name, number)| Some((name, number.parse().ok()?))))
        .collect()
}

/// Descriptors with names; of one name there may be several.
#[derive(Debug, Default)]
pub struct Fds(HashMap<String, Vec<OwnedFd>>);

impl Fds {
    /// Those that the arguments before `--` name.
    ///
    /// # Errors
    /// When one of them is not open.
    pub fn from_args(args: impl Iterator<Item = OsString>) -> Result<Fds> {
        let bad = || Error::usage("it is started by a supervisor only, which hands it descriptors");
        let mut fds = Fds::default();
        for arg in args.take_while(|arg| arg != "--") {
            for (name, number) in arg.to_str().and_then(parse).ok_or_else(bad)? {
                fds.add(name, number)?;
            }
        }
        Ok(fds)
    }

    /// Those that a service manager kept, as sd_listen_fds_with_names(3) finds them.
    ///
    /// # Errors
    /// When one of them is not open.
    pub fn from_service_manager() -> Result<Fds> {
        const FIRST: RawFd = 3;
        let word = |name| std::env::var(name).unwrap_or_default();
        let mut fds = Fds::default();
        if word("LISTEN_PID") == std::process::id().to_string() {
            let count: usize = word("LISTEN_FDS").parse().unwrap_or(0);
            let names = word("LISTEN_FDNAMES");
            let names = names.split(':').chain(std::iter::repeat("")).take(count);
            for (name, number) in names.zip(FIRST..) {
                fds.add(name, number)?;
            }
        }
        Ok(fds)
    }

    fn add(&mut self, name: &str, number: RawFd) -> Result<()> {
        let fd = descriptor::take(number).map_err(|e| {
            Error::failed(format!("descriptor {number} ({name}) was not handed to this program")).because(e)
        })?;
        self.0.entry(name.to_owned()).or_default().push(fd);
        Ok(())
    }

    /// The names that there are.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Those of that name, without taking them.
    pub fn of(&self, name: &str) -> &[OwnedFd] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// All of that name.
    pub fn all(&mut self, name: &str) -> Vec<OwnedFd> {
        self.0.remove(name).unwrap_or_default()
    }

    /// The one of that name.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.all(name).pop()
    }

    /// The one of that name, which must be there.
    ///
    /// # Errors
    /// Names it.
    pub fn need(&mut self, name: &str) -> Result<OwnedFd> {
        self.take(name)
            .ok_or_else(|| Error::failed(format!("no descriptor '{name}' was handed to this program")))
    }

    /// All that are left, whatever their names.
    pub fn rest(&mut self) -> Vec<OwnedFd> {
        self.0.drain().flat_map(|(_, fds)| fds).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_written_is_what_is_read() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let text = argument(&[("fuse", a.as_fd()), ("link", b.as_fd())]);
        assert_eq!(parse(&text), Some(vec![("fuse", a.as_raw_fd()), ("link", b.as_raw_fd())]));
        assert_eq!(parse(&argument(&[])), Some(vec![]));
        for other in ["--fd=fuse:3", "--fds=fuse", "--fds=fuse:x", "fuse:3"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
