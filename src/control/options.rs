//! What a mount is asked to be; the words between `stencil mount` and the supervisor's argument list.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::units::Bytes;

/// How files are to be served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServeMode {
    /// Passthrough where the host can and the backing fits, else decode with a named reason.
    #[default]
    Auto,
    /// Passthrough; what cannot be is refused.
    Passthrough,
    /// Decode.
    Decode,
}

impl ServeMode {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            ServeMode::Auto => "auto",
            ServeMode::Passthrough => "passthrough",
            ServeMode::Decode => "decode",
        }
    }
}

impl FromStr for ServeMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<ServeMode> {
        [ServeMode::Auto, ServeMode::Passthrough, ServeMode::Decode]
            .into_iter()
            .find(|m| m.name() == text)
            .ok_or_else(|| {
                Error::usage(format!("'{text}' is no way to serve")).remedy("say auto, passthrough or decode")
            })
    }
}

/// Everything that makes a mount what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOptions {
    /// An empty directory.
    pub mountpoint: PathBuf,
    /// The store to serve.
    pub store: PathBuf,
    /// How.
    pub serve: ServeMode,
    /// Where backings live; none lets the supervisor choose.
    pub cache_dir: Option<PathBuf>,
    /// Most bytes of backings; none lets the supervisor choose.
    pub cache_size: Option<Bytes>,
    /// How long an open may wait for its backing before it is served by decode.
    pub hydrate_timeout: Duration,
    /// A request that a server leaves unanswered for so long has the server replaced; zero for never.
    pub watchdog: Duration,
    /// Execution of files in it is refused.
    pub noexec: bool,
    /// The supervisor stays in its caller's session and talks to its terminal.
    pub foreground: bool,
}

/// How long an open waits for its backing where nothing else is said.
const HYDRATE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a request may be unanswered where nothing else is said.
const WATCHDOG: Duration = Duration::from_secs(10);

/// Words of `-o` that are Stencil's own and have a value.
const WITH_VALUE: [&str; 5] = ["serve", "cache-dir", "cache-size", "hydrate-timeout", "watchdog"];

/// Words of `-o` that say what is so anyway, or that are meant for others (`mount`, `fstab`).
const WITHOUT_EFFECT: [&str; 26] = [
    "ro",
    "rw",
    "defaults",
    "allow_other",
    "default_permissions",
    "nosuid",
    "nodev",
    "exec",
    "sync",
    "async",
    "dirsync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "lazytime",
    "auto",
    "noauto",
    "nofail",
    "nouser",
    "_netdev",
    "silent",
    "loud",
];

/// Words of `-o` that cannot be had, whatever the caller is ready to forgo, and why.
fn refused(word: &str) -> Option<Error> {
    let key = word.split_once('=').map_or(word, |(key, _)| key);
    let (why, remedy) = match key {
        "suid" | "dev" => ("", "templates hold memory images, never programs or devices: leave it out"),
        "remount" => (
            ": a mount of Stencil keeps the options that it was made with",
            "umount it and mount it again, or go on with another build by `stencil restart`",
        ),
        "user" | "users" | "owner" | "group" => (
            ": only root can mount a store for everybody",
            "leave it out, and let root or a service mount it",
        ),
        _ => return None,
    };
    Some(Error::usage(format!("mount option '{word}' is refused{why}")).remedy(remedy))
}

impl MountOptions {
    /// A mount of that store there, with everything else by default.
    pub fn new(mountpoint: impl Into<PathBuf>, store: impl Into<PathBuf>) -> MountOptions {
        MountOptions {
            mountpoint: mountpoint.into(),
            store: store.into(),
            serve: ServeMode::default(),
            cache_dir: None,
            cache_size: None,
            hydrate_timeout: HYDRATE_TIMEOUT,
            watchdog: WATCHDOG,
            noexec: false,
            foreground: false,
        }
    }

    /// Takes one `-o a,b=c` list.
    ///
    /// # Errors
    /// A usage error that names the word that is not understood.
    pub fn apply(&mut self, list: &str) -> Result<()> {
        for word in list.split(',').filter(|w| !w.is_empty()) {
            if let Some(error) = refused(word) {
                return Err(error);
            }
            match word.split_once('=') {
                Some((key, value)) if WITH_VALUE.contains(&key) => self.set(key, OsStr::new(value))?,
                None if word == "noexec" => self.noexec = true,
                _ if Self::knows(word) => {}
                _ => {
                    return Err(Error::usage(format!("unknown mount option '{word}'")).remedy(
                        "known are serve=, cache-dir=, cache-size=, hydrate-timeout=, watchdog=, noexec and the usual words of fstab",
                    ));
                }
            }
        }
        Ok(())
    }

    /// True for a word of `-o` that means something here, be it that it is refused, or that is for others.
    pub fn knows(word: &str) -> bool {
        match word.split_once('=') {
            _ if refused(word).is_some() || word.starts_with("x-") || word.starts_with("X-") => true,
            Some((key, _)) => WITH_VALUE.contains(&key) || key == "comment",
            None => word.is_empty() || word == "noexec" || WITHOUT_EFFECT.contains(&word),
        }
    }

    fn set(&mut self, key: &str, value: &OsStr) -> Result<()> {
        let text = || {
            value.to_str().ok_or_else(|| {
                Error::usage(format!("the value of {key} is not UTF-8"))
                    .remedy(format!("write {key}= in plain letters and digits"))
            })
        };
        match key {
            "serve" => self.serve = text()?.parse()?,
            "cache-dir" => self.cache_dir = Some(PathBuf::from(value)),
            "cache-size" => self.cache_size = Some(Bytes::parse(text()?)?),
            "hydrate-timeout" => self.hydrate_timeout = parse_seconds(text()?)?,
            "watchdog" => self.watchdog = parse_seconds(text()?)?,
            _ => return Err(Error::usage(format!("unknown option '{key}'"))),
        }
        Ok(())
    }

    /// The supervisor's arguments.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["supervise".into()];
        let mut push = |key: &str, value: &OsStr| {
            let mut arg = OsString::from(format!("--{key}="));
            arg.push(value);
            args.push(arg);
        };
        push("store", self.store.as_os_str());
        push("serve", OsStr::new(self.serve.name()));
        if let Some(dir) = &self.cache_dir {
            push("cache-dir", dir.as_os_str());
        }
        if let Some(size) = self.cache_size {
            push("cache-size", OsStr::new(&size.get().to_string()));
        }
        push("hydrate-timeout", OsStr::new(&self.hydrate_timeout.as_secs_f64().to_string()));
        push("watchdog", OsStr::new(&self.watchdog.as_secs_f64().to_string()));
        for (flag, set) in [("--noexec", self.noexec), ("--foreground", self.foreground)] {
            if set {
                args.push(flag.into());
            }
        }
        args.push("--".into());
        args.push(self.mountpoint.clone().into_os_string());
        args
    }

    /// Reads what [`to_args`](Self::to_args) wrote, without its first word.
    ///
    /// # Errors
    /// A usage error that names the argument that is not understood.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<MountOptions> {
        use std::os::unix::ffi::OsStrExt;
        let mut options = MountOptions::new("", "");
        let mut args = args.into_iter();
        for arg in args.by_ref() {
            let bytes = arg.as_bytes();
            if bytes == b"--" {
                break;
            }
            match bytes {
                b"--noexec" => options.noexec = true,
                b"--foreground" => options.foreground = true,
                _ => options.argument(bytes)?,
            }
        }
        options.mountpoint = args.next().map(PathBuf::from).unwrap_or_default();
        if options.mountpoint.as_os_str().is_empty() || options.store.as_os_str().is_empty() {
            return Err(Error::usage("a mountpoint and --store= are needed"));
        }
        Ok(options)
    }

    fn argument(&mut self, bytes: &[u8]) -> Result<()> {
        use std::os::unix::ffi::OsStrExt;
        let bad = || Error::usage(format!("unknown argument {}", OsStr::from_bytes(bytes).display()));
        let split = bytes.iter().position(|&b| b == b'=').ok_or_else(bad)?;
        let key = std::str::from_utf8(&bytes[..split]).ok().and_then(|k| k.strip_prefix("--"));
        let value = OsStr::from_bytes(&bytes[split + 1..]);
        match key.ok_or_else(bad)? {
            "store" => self.store = PathBuf::from(value),
            key => self.set(key, value)?,
        }
        Ok(())
    }
}

/// Seconds as people write them: `30`, `0.5`, `30s`.
///
/// # Errors
/// A usage error that names the text.
pub fn parse_seconds(text: &str) -> Result<Duration> {
    text.strip_suffix('s')
        .unwrap_or(text)
        .parse::<f64>()
        .ok()
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .ok_or_else(|| {
            Error::usage(format!("'{text}' is no time in seconds")).remedy("write it like 30 or 0.5")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_survive_the_way() {
        let mut options = MountOptions::new("/mnt/a b", "/st=ore");
        options.serve = ServeMode::Decode;
        options.cache_dir = Some("/c".into());
        options.cache_size = Some(Bytes::new(5 << 20));
        options.hydrate_timeout = Duration::from_millis(250);
        options.watchdog = Duration::from_millis(1500);
        options.noexec = true;
        options.foreground = true;
        let args = options.to_args();
        assert_eq!(args[0], "supervise");
        assert_eq!(MountOptions::from_args(args.into_iter().skip(1)).unwrap(), options);
    }

    #[test]
    fn option_lists() {
        let mut options = MountOptions::new("/m", "/s");
        options
            .apply("ro,nosuid,serve=decode,cache-size=1G,hydrate-timeout=2s,x-systemd.automount,noexec")
            .unwrap();
        assert_eq!(options.serve, ServeMode::Decode);
        assert_eq!(options.cache_size, Some(Bytes::new(1 << 30)));
        assert_eq!(options.hydrate_timeout, Duration::from_secs(2));
        assert!(options.noexec);
        for bad in [
            "frobnicate",
            "serve",
            "serve=fast",
            "cache-size=much",
            "suid",
            "dev",
            "ro=1",
            "hydrate-timeout=-1",
        ] {
            let error = options.apply(bad).unwrap_err();
            assert_eq!(error.code(), crate::error::Code::Usage, "{bad}");
            assert!(error.remedy_text().is_some(), "{bad}: {error}");
        }
    }
}
