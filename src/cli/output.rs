//! What a command leaves: data on standard output, talk on standard error, an exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Code, Error, Result};
use crate::say;
use crate::shown::{path_text, shown};
use crate::sys::wait::Patient;

/// One result, shown to people as text and to machines as one JSON object, both from the same struct.
pub trait Report {
    /// The text for people.
    ///
    /// # Errors
    /// Whatever writing to `out` gives.
    fn text(&self, out: &mut dyn Write) -> io::Result<()>;
    /// The JSON object, without its `schema` field.
    fn json(&self) -> Value;
}

/// A command that ran: what it prints and how it exits.
pub struct Done {
    report: Option<Box<dyn Report>>,
    exit: u8,
    error: Option<Error>,
}

impl Done {
    /// Ran, and prints this.
    pub fn report(report: impl Report + 'static) -> Done {
        Done { report: Some(Box::new(report)), exit: 0, error: None }
    }

    /// Ran, and has nothing to print (`{"schema":1}` with `--json`).
    pub fn silent() -> Done {
        Done { report: None, exit: 0, error: None }
    }

    /// Prints its report, and exits as that kind of failure does (`verify` that found damage).
    #[must_use]
    pub fn exit_as(mut self, code: Code) -> Done {
        self.exit = code.exit_code();
        self
    }

    /// Prints its report, which tells what was done, and fails with what kept it from the rest.
    #[must_use]
    pub fn but_failed(mut self, error: Error) -> Done {
        self.exit = error.code().exit_code();
        self.error = Some(error);
        self
    }

    /// Exits with the code of a program that was run in the user's name.
    #[must_use]
    pub fn exit_code(mut self, code: u8) -> Done {
        self.exit = code;
        self
    }
}

/// The JSON value of anything serializable; it cannot fail for the structs of this crate.
pub fn to_json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

fn with_schema(value: Value) -> Value {
    let mut object = serde_json::Map::new();
    object.insert("schema".into(), json!(1));
    if let Value::Object(fields) = value {
        object.extend(fields);
    }
    Value::Object(object)
}

/// Prints the result and gives the exit code.
pub fn finish(result: Result<Done>, json: bool) -> ExitCode {
    match result {
        Ok(done) => match print(&done, json).inspect(|()| {
            done.error.iter().filter(|_| !json).for_each(|error| tell("stencil", error));
        }) {
            Ok(()) => ExitCode::from(done.exit),
            // The reader of a pipe has gone: it wanted no more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(done.exit),
            Err(error) => {
                say!("stencil: cannot write the result: {error}");
                ExitCode::from(1)
            }
        },
        Err(error) => fail(&error, json),
    }
}

fn print(done: &Done, json: bool) -> io::Result<()> {
    let mut out = io::BufWriter::new(Patient(io::stdout()));
    if json {
        let mut value = with_schema(done.report.as_ref().map_or(Value::Null, |r| r.json()));
        if let Some(error) = &done.error {
            value["error"] = error_json(error);
        }
        writeln!(out, "{value}")?;
    } else if let Some(report) = &done.report {
        report.text(&mut out)?;
    }
    out.flush()
}

/// What to do next: the error's own words, else where to look.
fn remedy(error: &Error) -> &str {
    error.remedy_text().unwrap_or(match error.code() {
        Code::Usage => "`stencil help COMMAND` shows the words that a command takes",
        Code::NotFound => "`stencil ls` lists templates, `stencil ps` clones, `stencil status` mounts",
        Code::Damage => {
            "`stencil verify` names all that is affected; importing the same memory again repairs it"
        }
        Code::InUse => "`stencil ps` lists who uses templates",
        Code::CheckFailed => "the report says what was found, and what to do",
        Code::TryAgain => "run the same command again later",
        Code::Failed => "run it again with -v to see more; `stencil doctor` looks at the host",
    })
}

fn error_json(error: &Error) -> Value {
    let mut message = error.message().to_owned();
    if let Some(source) = std::error::Error::source(error) {
        message = format!("{message}: {source}");
    }
    json!({
        "code": error.code().name(),
        "message": message,
        "path": error.path().map(path_text),
        "remedy": remedy(error),
    })
}

fn fail(error: &Error, json: bool) -> ExitCode {
    if json {
        // The exit code says it as well.
        let _ = writeln!(Patient(io::stdout()), "{}", with_schema(json!({"error": error_json(error)})));
    } else {
        tell("stencil", error);
    }
    ExitCode::from(error.code().exit_code())
}

/// Says on standard error what failed, and what to do next.
pub fn tell(program: &str, error: &Error) {
    say!("{program}: {error}");
    say!("{program}: {}", shown(remedy(error)));
}

/// Talk of this process goes to standard error, from this level on; `STENCIL_LOG` says another.
pub fn start_log(level: &str) {
    env_logger::Builder::from_env(env_logger::Env::default().filter_or("STENCIL_LOG", level))
        .format_timestamp(None)
        .init();
}

/// Errors of the argument parser, in the form that the call asked for.
pub fn clap_error(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    let help = matches!(error.kind(), DisplayHelp | DisplayVersion);
    if !help && std::env::args_os().any(|a| a == "--json") {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        return fail(&Error::usage(first).remedy("see stencil --help"), true);
    }
    let _ = error.print();
    ExitCode::from(if help { 0 } else { Code::Usage.exit_code() })
}
