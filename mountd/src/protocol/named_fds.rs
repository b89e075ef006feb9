//! Named descriptors, passed between processes by `--fds=NAME:NUMBER,…` or by sd_listen_fds(3).

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use stencilfs::error::{Error, Result};
use stencilfs::sys::files::descriptor;

const OPTION: &str = "--fds=";

/// Returns the `--fds` argument for a process that inherits these descriptors under the same numbers.
pub fn argument(all: &[(&str, BorrowedFd<'_>)]) -> String {
    let names = all.iter().map(|(name, fd)| format!("{name}:{},", fd.as_raw_fd()));
    OPTION.to_owned() + &names.collect::<String>()
}

/// Parses a `--fds` argument. Returns `None` if the argument is malformed or another argument.
pub fn parse(argument: &str) -> Option<Vec<(&str, RawFd)>> {
    let list = argument.strip_prefix(OPTION)?.split(',').filter(|item| !item.is_empty());
    list.map(|item| item.split_once(':').and_then(|(name, number)| Some((name, number.parse().ok()?))))
        .collect()
}

/// Named descriptors; several may have the same name.
#[derive(Debug, Default)]
pub struct NamedFds(HashMap<String, Vec<OwnedFd>>);

impl NamedFds {
    /// Takes ownership of the descriptors that are named in the arguments before `--`.
    ///
    /// # Errors
    /// Returns an error if an argument is invalid or a descriptor is not open.
    pub fn from_args(args: impl Iterator<Item = OsString>) -> Result<NamedFds> {
        let mut fds = NamedFds::default();
        for arg in args.take_while(|arg| arg != "--") {
            let list = arg.to_str().and_then(parse).ok_or_else(|| {
                Error::usage(format!("invalid argument '{}', expected --fds=NAME:NUMBER,…", arg.display()))
                    .hint("use 'stencil mount': only a supervisor starts this program with --fds")
            })?;
            for (name, number) in list {
                fds.add(name, number)?;
            }
        }
        Ok(fds)
    }

    /// Takes ownership of the descriptors that a service manager passed, like sd_listen_fds_with_names(3).
    ///
    /// # Errors
    /// Returns an error if a descriptor is not open.
    pub fn from_service_manager() -> Result<NamedFds> {
        const FIRST: RawFd = 3;
        let variable = |name| std::env::var(name).unwrap_or_default();
        let mut fds = NamedFds::default();
        if variable("LISTEN_PID") == std::process::id().to_string() {
            let count: usize = variable("LISTEN_FDS").parse().unwrap_or(0);
            let names = variable("LISTEN_FDNAMES");
            let names = names.split(':').chain(std::iter::repeat("")).take(count);
            for (name, number) in names.zip(FIRST..) {
                fds.add(name, number)?;
            }
        }
        Ok(fds)
    }

    fn add(&mut self, name: &str, number: RawFd) -> Result<()> {
        let fd = descriptor::take(number).map_err(|e| {
            Error::failed(format!("descriptor {number} ({name}) was not inherited")).because(e)
        })?;
        self.0.entry(name.to_owned()).or_default().push(fd);
        Ok(())
    }

    /// Iterates over the names, in no particular order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Returns the descriptors with this name, without removing them.
    pub fn of(&self, name: &str) -> &[OwnedFd] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// Removes and returns all descriptors with this name.
    pub fn all(&mut self, name: &str) -> Vec<OwnedFd> {
        self.0.remove(name).unwrap_or_default()
    }

    /// Removes one descriptor with this name and returns it.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.all(name).pop()
    }

    /// Same as [`take`](Self::take), for a required descriptor.
    ///
    /// # Errors
    /// Returns an error that contains the name if no descriptor has this name.
    pub fn need(&mut self, name: &str) -> Result<OwnedFd> {
        self.take(name).ok_or_else(|| Error::failed(format!("missing descriptor '{name}'")))
    }

    /// Removes and returns all remaining descriptors.
    pub fn rest(&mut self) -> Vec<OwnedFd> {
        self.0.drain().flat_map(|(_, fds)| fds).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn arguments_round_trip() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let text = argument(&[("fuse", a.as_fd()), ("link", b.as_fd())]);
        assert_eq!(parse(&text), Some(vec![("fuse", a.as_raw_fd()), ("link", b.as_raw_fd())]));
        assert_eq!(parse(&argument(&[])), Some(vec![]));
        for other in ["--fd=fuse:3", "--fds=fuse", "--fds=fuse:x", "fuse:3"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
