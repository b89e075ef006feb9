//! Options of a mount, and their form as arguments of the supervisor.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::json_log::LogFormat;
use crate::store::BLOCK_SIZE;
use crate::units::{Bytes, PAGE_SIZE};

/// How the files of a mount are served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServeMode {
    /// Passthrough if the host supports it and the backing fits, else decode, with the reason in the status.
    #[default]
    Auto,
    /// Kernel decode as soon as all blocks of a file are verified; until then, and where the host does not support it,
    /// decode, with the reason in the status.
    Kernel,
    /// Passthrough only; an open that would need decode fails.
    Passthrough,
    /// Decode only.
    Decode,
}

impl ServeMode {
    /// Returns true if a file that has no backing is served by decode.
    pub fn allows_decode(self) -> bool {
        self != ServeMode::Passthrough
    }

    /// Returns the option value of this mode.
    pub fn name(self) -> &'static str {
        match self {
            ServeMode::Auto => "auto",
            ServeMode::Kernel => "kernel",
            ServeMode::Passthrough => "passthrough",
            ServeMode::Decode => "decode",
        }
    }
}

impl FromStr for ServeMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<ServeMode> {
        [ServeMode::Auto, ServeMode::Kernel, ServeMode::Passthrough, ServeMode::Decode]
            .into_iter()
            .find(|m| m.name() == text)
            .ok_or_else(|| {
                Error::usage(format!("invalid serve mode '{text}'"))
                    .hint("use auto, kernel, passthrough or decode")
            })
    }
}

/// What happens to a process that needs a damaged block, before its READ fails with EIO.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDamage {
    /// Nothing: the READ fails.
    #[default]
    Eio,
    /// The process gets SIGSTOP.
    Stop,
    /// The process gets SIGKILL.
    Kill,
}

impl OnDamage {
    /// Returns the option value of this choice.
    pub fn name(self) -> &'static str {
        match self {
            OnDamage::Eio => "eio",
            OnDamage::Stop => "stop",
            OnDamage::Kill => "kill",
        }
    }
}

impl FromStr for OnDamage {
    type Err = Error;

    fn from_str(text: &str) -> Result<OnDamage> {
        [OnDamage::Eio, OnDamage::Stop, OnDamage::Kill]
            .into_iter()
            .find(|choice| choice.name() == text)
            .ok_or_else(|| {
                Error::usage(format!("invalid reaction to damage '{text}'")).hint("use eio, stop or kill")
            })
    }
}

/// Options of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountOptions {
    /// Mountpoint: an empty directory.
    pub mountpoint: PathBuf,
    /// Path of the store.
    pub store: PathBuf,
    /// Serve mode.
    pub serve: ServeMode,
    /// Directory for backings; `None` lets the supervisor choose.
    pub cache_dir: Option<PathBuf>,
    /// Limit of all backings, in bytes; `None` lets the supervisor choose.
    pub cache_size: Option<Bytes>,
    /// How long an open waits for its backing before the file is served by decode.
    pub hydrate_timeout: Duration,
    /// The server is replaced after it leaves a request unanswered for this long; zero disables the watchdog.
    pub watchdog: Duration,
    /// What happens to a process that needs a damaged block of a file that is served by decode.
    pub on_damage: OnDamage,
    /// With kernel decode, the blocks of each file are verified again after this time; zero for never.
    pub scrub_interval: Duration,
    /// The kernel's read-ahead for files served by decode or kernel decode; see [`read_ahead`](Self::read_ahead).
    pub read_ahead: Option<Bytes>,
    /// Mount with `MS_NOEXEC`.
    pub noexec: bool,
    /// The supervisor stays in the foreground, in the session of its caller.
    pub foreground: bool,
    /// Log format of supervisor and server.
    #[serde(default)]
    pub log_format: LogFormat,
}

/// Default of [`MountOptions::hydrate_timeout`].
const HYDRATE_TIMEOUT: Duration = Duration::from_secs(30);

/// Default of [`MountOptions::scrub_interval`]: a week.
const SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Default of [`MountOptions::watchdog`].
const WATCHDOG: Duration = Duration::from_secs(10);

/// Read-ahead of files that are served by decode: a fault requests eight blocks at once. With the kernel's own default
/// of two blocks, a sequential read waits for the server twice as long.
pub const DEFAULT_READ_AHEAD: Bytes = Bytes::new(8 * BLOCK_SIZE);

/// Read-ahead of files that the kernel decodes: large enough that a read in order makes folios of 2 MiB, which the CPU
/// maps with one entry.
const KERNEL_READ_AHEAD: Bytes = Bytes::new(4 << 20);

/// Options of `-o` that are specific to Stencil and take a value.
const WITH_VALUE: [&str; 9] = [
    "serve",
    "cache-dir",
    "cache-size",
    "hydrate-timeout",
    "watchdog",
    "on-damage",
    "scrub-interval",
    "read-ahead",
    "log-format",
];

/// Largest value of [`MountOptions::read_ahead`].
const MAX_READ_AHEAD: Bytes = Bytes::new(64 << 20);

/// Parses a size of the kernel's read-ahead.
///
/// # Errors
/// Returns a usage error for an invalid or too large size.
pub fn parse_read_ahead(text: &str) -> Result<Bytes> {
    let size = Bytes::parse(text)?;
    match size <= MAX_READ_AHEAD && size.get().is_multiple_of(PAGE_SIZE) {
        true => Ok(size),
        false => Err(Error::usage(format!(
            "invalid read-ahead {text}: expected whole pages, at most {MAX_READ_AHEAD}"
        ))
        .hint("use a size such as 128K or 4M, or 0 for no read-ahead")),
    }
}

/// Options of `-o` that are ignored: each describes a property of every Stencil mount, or is meant for `mount` and
/// `fstab`.
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

/// Returns the error of an option of `-o` that is always refused, with the reason.
fn refused(word: &str) -> Option<Error> {
    let key = word.split_once('=').map_or(word, |(key, _)| key);
    let (why, remedy) = match key {
        "suid" | "dev" => ("", "omit the option: templates hold memory images, not programs or devices"),
        "remount" => (
            ": the options of a mount are fixed",
            "unmount and mount again, or switch to another build with 'stencil restart'",
        ),
        "user" | "users" | "owner" | "group" => (
            ": only root can mount a store for all users",
            "omit the option, and mount as root or by a service",
        ),
        _ => return None,
    };
    Some(Error::usage(format!("mount option '{word}' is refused{why}")).hint(remedy))
}

impl MountOptions {
    /// Creates the default options for a store and a mountpoint.
    pub fn new(mountpoint: impl Into<PathBuf>, store: impl Into<PathBuf>) -> MountOptions {
        MountOptions {
            mountpoint: mountpoint.into(),
            store: store.into(),
            serve: ServeMode::default(),
            cache_dir: None,
            cache_size: None,
            hydrate_timeout: HYDRATE_TIMEOUT,
            watchdog: WATCHDOG,
            on_damage: OnDamage::default(),
            scrub_interval: SCRUB_INTERVAL,
            read_ahead: None,
            noexec: false,
            foreground: false,
            log_format: LogFormat::default(),
        }
    }

    /// Returns the kernel's read-ahead for files that are served in this way.
    pub fn read_ahead(&self, serve: ServeMode) -> Bytes {
        self.read_ahead.unwrap_or(match serve {
            ServeMode::Kernel => KERNEL_READ_AHEAD,
            _ => DEFAULT_READ_AHEAD,
        })
    }

    /// Applies one `-o a,b=c` list.
    ///
    /// # Errors
    /// Returns a usage error that names the unknown, invalid or refused option.
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
                    return Err(Error::usage(format!("unknown mount option '{word}'")).hint(
                        "use serve=, cache-dir=, cache-size=, hydrate-timeout=, watchdog=, on-damage=, scrub-interval=, read-ahead=, log-format=, noexec or the usual options of fstab",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Returns true if `word` is a known option of `-o`, even if it is refused or ignored.
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
                    .hint(format!("use a UTF-8 value for {key}="))
            })
        };
        match key {
            "serve" => self.serve = text()?.parse()?,
            "cache-dir" => self.cache_dir = Some(PathBuf::from(value)),
            "cache-size" => self.cache_size = Some(Bytes::parse(text()?)?),
            "hydrate-timeout" => self.hydrate_timeout = parse_seconds(text()?)?,
            "watchdog" => self.watchdog = parse_seconds(text()?)?,
            "on-damage" => self.on_damage = text()?.parse()?,
            "scrub-interval" => self.scrub_interval = parse_seconds(text()?)?,
            "read-ahead" => self.read_ahead = Some(parse_read_ahead(text()?)?),
            "log-format" => self.log_format = text()?.parse()?,
            _ => return Err(Error::usage(format!("unknown option '{key}'"))),
        }
        Ok(())
    }

    /// Returns the arguments of the supervisor.
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
        push("on-damage", OsStr::new(self.on_damage.name()));
        push("scrub-interval", OsStr::new(&self.scrub_interval.as_secs_f64().to_string()));
        if let Some(size) = self.read_ahead {
            push("read-ahead", OsStr::new(&size.get().to_string()));
        }
        // The option is passed only if its value is not the default: an earlier build does not know the option.
        if self.log_format != LogFormat::default() {
            push("log-format", OsStr::new(self.log_format.name()));
        }
        for (flag, set) in [("--noexec", self.noexec), ("--foreground", self.foreground)] {
            if set {
                args.push(flag.into());
            }
        }
        args.push("--".into());
        args.push(self.mountpoint.clone().into_os_string());
        args
    }

    /// Parses the output of [`to_args`](Self::to_args), without its first argument (`supervise`).
    ///
    /// # Errors
    /// Returns a usage error that names the unknown or invalid argument.
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
            return Err(Error::usage("missing mountpoint or --store="));
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

/// Parses a time in seconds: `30`, `0.5` or `30s`.
///
/// # Errors
/// Returns a usage error that names the text.
pub fn parse_seconds(text: &str) -> Result<Duration> {
    text.strip_suffix('s')
        .unwrap_or(text)
        .parse::<f64>()
        .ok()
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .ok_or_else(|| {
            Error::usage(format!("invalid time '{text}'"))
                .hint("write a number of seconds, for example 30 or 0.5")
        })
}

#[cfg(test)]
mod tests {
    use crate::control::protocol::options::*;

    #[test]
    fn arguments_round_trip() {
        let mut options = MountOptions::new("/mnt/a b", "/st=ore");
        options.serve = ServeMode::Decode;
        options.cache_dir = Some("/c".into());
        options.cache_size = Some(Bytes::new(5 << 20));
        options.hydrate_timeout = Duration::from_millis(250);
        options.watchdog = Duration::from_millis(1500);
        options.on_damage = OnDamage::Kill;
        options.scrub_interval = Duration::from_secs(3600);
        options.read_ahead = Some(Bytes::new(4 << 20));
        options.noexec = true;
        options.foreground = true;
        options.log_format = LogFormat::Json;
        let args = options.to_args();
        assert_eq!(args[0], "supervise");
        assert_eq!(MountOptions::from_args(args.into_iter().skip(1)).unwrap(), options);
    }

    #[test]
    fn parses_option_lists() {
        let mut options = MountOptions::new("/m", "/s");
        options
            .apply("ro,nosuid,serve=decode,cache-size=1G,hydrate-timeout=2s,on-damage=stop,x-systemd.automount,noexec")
            .unwrap();
        assert_eq!(options.serve, ServeMode::Decode);
        assert_eq!(options.cache_size, Some(Bytes::new(1 << 30)));
        assert_eq!(options.hydrate_timeout, Duration::from_secs(2));
        assert_eq!(options.on_damage, OnDamage::Stop);
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
            "on-damage",
            "on-damage=pause",
            "read-ahead=4097",
            "read-ahead=1G",
        ] {
            let error = options.apply(bad).unwrap_err();
            assert_eq!(error.code(), crate::error::Code::Usage, "{bad}");
            assert!(error.hint_text().is_some(), "{bad}: {error}");
        }
    }
}
