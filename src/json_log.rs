//! Logs as JSON: one object per line, with the mount and the template that the line is about.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use log::Record;
use log::kv::{Key, VisitSource};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::sanitize::{path_text, sanitize};

/// Environment variable with the log format, for the processes that a supervisor starts.
pub const VARIABLE: &str = "STENCIL_LOG_FORMAT";

/// Log format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Human-readable lines.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// Returns the option value of this format.
    pub fn name(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }

    /// Returns the log format that the environment names, or text.
    pub fn from_environment() -> LogFormat {
        std::env::var(VARIABLE).ok().and_then(|name| name.parse().ok()).unwrap_or_default()
    }
}

impl FromStr for LogFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<LogFormat> {
        [LogFormat::Text, LogFormat::Json]
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| Error::usage(format!("invalid log format '{text}'")).hint("use text or json"))
    }
}

/// Name of this process, if it logs as JSON.
static PROCESS: OnceLock<&str> = OnceLock::new();

/// Mountpoint of this process.
static MOUNT: RwLock<Option<String>> = RwLock::new(None);

/// Returns the log format of this process.
pub fn format() -> LogFormat {
    if PROCESS.get().is_some() { LogFormat::Json } else { LogFormat::Text }
}

/// Sets the mountpoint that the lines of this process are about.
pub fn set_mount(mountpoint: &Path) {
    *MOUNT.write().unwrap_or_else(PoisonError::into_inner) = Some(path_text(mountpoint).into_owned());
}

/// Sets the name of this process in its lines. Panics are logged too, instead of lines that are not JSON.
pub fn start(process: &'static str) {
    let _ = PROCESS.set(process);
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}

/// Collects the fields `template` and `file` of a line.
struct Fields<'a>(&'a mut Map<String, Value>);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(
        &mut self,
        key: Key<'kvs>,
        value: log::kv::Value<'kvs>,
    ) -> std::result::Result<(), log::kv::Error> {
        self.0.insert(key.as_str().to_owned(), value.to_string().into());
        Ok(())
    }
}

/// Writes a line.
///
/// # Errors
/// Returns an error if writing fails.
pub fn write(out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mount = MOUNT.read().unwrap_or_else(PoisonError::into_inner).clone();
    let object = object(time.as_millis(), PROCESS.get().copied(), mount, record);
    writeln!(out, "{}", sanitize(&object.to_string()))
}

fn object(milliseconds: u128, process: Option<&str>, mount: Option<String>, record: &Record<'_>) -> Value {
    let mut line = Map::new();
    let mut add = |key: &str, value: Value| line.insert(key.to_owned(), value);
    add("time", time_text(milliseconds).into());
    add("level", record.level().as_str().to_ascii_lowercase().into());
    if let Some(process) = process {
        add("process", process.into());
    }
    add("pid", std::process::id().into());
    if let Some(mount) = mount {
        add("mount", mount.into());
    }
    // The source is a list of pairs in memory, and the visitor does not fail.
    let _ = record.key_values().visit(&mut Fields(&mut line));
    line.insert("message".to_owned(), record.args().to_string().into());
    Value::Object(line)
}

fn time_text(milliseconds: u128) -> String {
    let time = i64::try_from(milliseconds).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(|| milliseconds.to_string(), |time| format!("{time:.3}"))
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object_with_mount_and_template() {
        let pairs = [("template", "blake3:12"), ("file", "memory")];
        let kvs: &dyn log::kv::Source = &pairs;
        let record = Record::builder()
            .level(log::Level::Error)
            .args(format_args!("two\nlines \"and\" \u{202e}more"))
            .key_values(&kvs)
            .build();
        let line = object(1_764_523_313_007, Some("server"), Some("/srv/a b".into()), &record);
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["time", "level", "process", "pid", "mount", "template", "file", "message"]);
        assert_eq!(line["time"], "2025-11-30T17:21:53.007Z");
        assert_eq!((&line["level"], &line["mount"]), (&"error".into(), &"/srv/a b".into()));
        assert_eq!(line["template"], "blake3:12");
        let mut out = Vec::new();
        write(&mut out, &record).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.ends_with("}\n") && text.matches('\n').count() == 1 && !text.contains('\u{202e}'),
            "{text}"
        );
        let parsed: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed["message"], "two\nlines \"and\" \u{202e}more");
    }
}
