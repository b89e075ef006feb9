//! `mount.fuse.stencil`: the program that mount(8) runs for `mount -t fuse.stencil STORE MNT` and for fstab entries.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use crate::cli::output;
use crate::control::places;
use crate::control::{self, MountOptions};
use crate::error::{Code, Error, Result};
use crate::store::Store;
use crate::sys::files::mount::{self, FS_TYPE};

/// File name by which mount(8) runs this program.
pub const NAME: &str = "mount.fuse.stencil";

/// Mount a template store: the helper of mount(8)
///
/// mount(8) runs this program for `mount -t fuse.stencil STORE MNT` and for fstab entries of type fuse.stencil. The
/// program follows the calling convention of mount(8) and mounts in the same way as `stencil mount`.
#[derive(Debug, Parser)]
#[command(name = NAME, version, after_long_help = EXAMPLES, disable_help_flag = true)]
pub struct Helper {
    /// Directory of the template store
    #[arg(value_name = "STORE")]
    store: PathBuf,
    /// An empty directory
    #[arg(value_name = "MNT")]
    mountpoint: PathBuf,
    /// Options: serve=, cache-dir=, cache-size=, hydrate-timeout=, watchdog=, on-damage=, scrub-interval=, read-ahead=,
    /// noexec, and the usual options
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<String>,
    /// Ignore unknown options with a warning
    #[arg(short = 's')]
    sloppy: bool,
    /// Check the arguments, the store and the directory without mounting
    #[arg(short = 'f')]
    fake: bool,
    /// Ignored: there is no mtab to write
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Print the mount that was made
    #[arg(short = 'v')]
    verbose: bool,
    /// File system type, as given to mount(8)
    #[arg(short = 't', value_name = "TYPE")]
    fs_type: Option<String>,
    /// Rejected: enter a mount namespace with nsenter(1) instead
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Print help
    #[arg(short = 'h', long, action = clap::ArgAction::Help)]
    help: (),
}

const EXAMPLES: &str = "\
An fstab entry:

  /var/lib/stencil /srv/templates fuse.stencil cache-size=20G,nofail 0 0

Exit status, as defined by mount(8): 0 mounted, 1 invalid arguments, 32 the mount failed.
umount(8) unmounts a mount that is not in use; `stencil umount` also lists the processes that use the mount.";

/// Returns true if the program was started by the file name of the helper.
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.and_then(|path| Path::new(path).file_name()).is_some_and(|name| name == NAME)
}

/// Runs the helper with this process's arguments.
pub fn main() -> ExitCode {
    let helper = match Helper::try_parse() {
        Ok(helper) => helper,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    let level = if helper.verbose { "info" } else { "warn" };
    output::start_log(level, None);
    match helper.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::print_error(&format!("{NAME}: "), &error);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Returns the exit status of mount(8) for the error.
fn exit_code(error: &Error) -> u8 {
    match error.code() {
        Code::Usage => 1,
        _ => 32,
    }
}

impl Helper {
    fn run(&self) -> Result<()> {
        let mut options = self.to_options()?;
        if self.fake {
            options.store = Store::open(&options.store)?.dir().to_owned();
            let there = std::fs::metadata(&options.mountpoint)
                .map_err(|e| Error::io("cannot use the mountpoint", &options.mountpoint, e))?;
            if !there.is_dir() {
                return Err(Error::usage("the mountpoint is not a directory")
                    .at(&options.mountpoint)
                    .hint("name an empty directory"));
            }
            options.mountpoint = mount::place(&options.mountpoint)
                .map_err(|e| Error::io("cannot use the mountpoint", &options.mountpoint, e))?;
            places::check(&mut options)?;
        } else {
            control::start_supervisor(&options)?;
        }
        if self.verbose {
            let word = if self.fake { "could be mounted" } else { "is mounted" };
            let (store, mountpoint) = (options.store.display(), options.mountpoint.display());
            let _ = writeln!(std::io::stdout(), "{NAME}: {store} {word} on {mountpoint}");
        }
        Ok(())
    }

    fn to_options(&self) -> Result<MountOptions> {
        if let Some(namespace) = &self.namespace {
            return Err(Error::usage(format!("mount -N {namespace} is not supported"))
                .hint("enter the namespace: nsenter --mount=… mount …"));
        }
        if let Some(other) = self.fs_type.as_deref().filter(|t| ![FS_TYPE, "stencil"].contains(t)) {
            return Err(Error::usage(format!("the type is {other}, expected {FS_TYPE}"))
                .hint(format!("run mount -t {FS_TYPE}")));
        }
        let full = |path: &Path| std::path::absolute(path).map_err(|e| Error::io("cannot use", path, e));
        let mut options = MountOptions::new(full(&self.mountpoint)?, full(&self.store)?);
        for word in self.options.iter().flat_map(|list| list.split(',')) {
            if self.sloppy && !MountOptions::knows(word) {
                log::warn!("unknown option {word} is ignored (-s)");
                continue;
            }
            options.apply(word)?;
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::mount::helper::*;

    fn options(words: &[&str]) -> Result<MountOptions> {
        let helper = Helper::try_parse_from([&[NAME], words].concat()).unwrap();
        helper.to_options()
    }

    #[test]
    fn parses_the_arguments_of_mount() {
        let call = ["/s", "/m", "-n", "-v", "-o", "rw,serve=decode,watchdog=3,_netdev,nofail", "-t", FS_TYPE];
        let options = options(&call).unwrap();
        assert_eq!((options.store.to_str(), options.mountpoint.to_str()), (Some("/s"), Some("/m")));
        assert_eq!(options.serve, control::ServeMode::Decode);
        assert_eq!(options.watchdog.as_secs(), 3);
        assert!(!options.foreground);
    }

    #[test]
    fn sloppy_ignores_unknown_options_but_rejects_invalid_values() {
        assert_eq!(options(&["/s", "/m", "-o", "frobnicate"]).unwrap_err().code(), Code::Usage);
        assert!(options(&["/s", "/m", "-s", "-o", "frobnicate,noexec"]).unwrap().noexec);
        assert!(options(&["/s", "/m", "-s", "-o", "serve=fast"]).is_err());
        for word in ["remount,rw", "suid"] {
            assert!(options(&["/s", "/m", "-s", "-o", word]).is_err(), "{word}");
        }
        for call in [["-N", "/proc/1/ns/mnt"], ["-t", "fuse.other"]] {
            assert_eq!(
                options(&[&["/s", "/m"], &call[..]].concat()).unwrap_err().code(),
                Code::Usage,
                "{call:?}"
            );
        }
    }

    #[test]
    fn recognizes_the_helper_by_its_file_name() {
        assert!(is_called(Some(OsStr::new("/sbin/mount.fuse.stencil"))));
        assert!(!is_called(Some(OsStr::new("/usr/bin/stencil"))) && !is_called(None));
    }
}
