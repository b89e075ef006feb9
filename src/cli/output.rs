//! Output of a command: results on standard output, messages on standard error, and an exit code.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Code, Error, Result};
use crate::json_log::{self, LogFormat};
use crate::print_line;
use crate::sanitize::{path_text, sanitize};
use crate::sys::poll::Patient;

/// The result of a command. Text and JSON are both made from the same struct.
pub trait Report {
    /// Writes the result as text.
    ///
    /// # Errors
    /// Returns an error if writing to `out` fails.
    fn text(&self, out: &mut dyn Write) -> io::Result<()>;
    /// Returns the result as a JSON object, without the `schema` field.
    fn json(&self) -> Value;
}

/// The outcome of a command that ran: its report and its exit code.
pub struct Done {
    report: Option<Box<dyn Report>>,
    exit: u8,
    error: Option<Error>,
}

impl Done {
    /// Creates a successful outcome with a report.
    pub fn report(report: impl Report + 'static) -> Done {
        Done { report: Some(Box::new(report)), exit: 0, error: None }
    }

    /// Creates a successful outcome without a report (`{"schema":1}` with `--json`).
    pub fn silent() -> Done {
        Done { report: None, exit: 0, error: None }
    }

    /// Sets the exit code of this kind of failure; the report is still printed (`verify` that found damage).
    #[must_use]
    pub fn exit_as(mut self, code: Code) -> Done {
        self.exit = code.exit_code();
        self
    }

    /// Adds an error that stopped the command halfway; the report lists what was done before.
    #[must_use]
    pub fn but_failed(mut self, error: Error) -> Done {
        self.exit = error.code().exit_code();
        self.error = Some(error);
        self
    }

    /// Sets the exit code of a program that was run for the user.
    #[must_use]
    pub fn exit_code(mut self, code: u8) -> Done {
        self.exit = code;
        self
    }
}

/// Returns the JSON value of a struct. Serialization cannot fail for the structs of this crate.
pub fn to_json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// Adds the `schema` field to an object.
pub fn with_schema(value: Value) -> Value {
    let mut object = serde_json::Map::new();
    object.insert("schema".into(), json!(1));
    if let Value::Object(fields) = value {
        object.extend(fields);
    }
    Value::Object(object)
}

/// Prints the result, and returns the exit code.
pub fn finish(result: Result<Done>, json: bool) -> ExitCode {
    match result {
        Ok(done) => match print(&done, json).inspect(|()| {
            done.error.iter().filter(|_| !json).for_each(|error| print_error("", error));
        }) {
            Ok(()) => ExitCode::from(done.exit),
            // The reader has closed the pipe. This is not a failure of the command.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(done.exit),
            Err(error) => {
                let error = Error::failed("cannot write the result").because(error);
                print_error(
                    "",
                    &error.hint("the command itself is done; check the file or pipe of standard output"),
                );
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

/// Returns the remedy of the error, or a general one for its code.
fn remedy(error: &Error) -> &str {
    error.hint_text().unwrap_or(match error.code() {
        Code::Usage => "run 'stencil help COMMAND' for the arguments of a command",
        Code::NotFound => {
            "run 'stencil ls' to list templates, 'stencil ps' to list clones, 'stencil status' to list mounts"
        }
        Code::Damage => {
            "run 'stencil verify' to list all affected templates; import the same memory again to repair them"
        }
        Code::InUse => "run 'stencil ps' to list the processes that use templates",
        Code::CheckFailed => "see the report for the findings and their remedies",
        Code::TryAgain => "run the same command again later",
        Code::Failed => {
            "run the command again with -v for more messages; run 'stencil doctor' to check the host"
        }
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

/// Reports an error as text or JSON, and returns its exit code.
pub fn fail(error: &Error, json: bool) -> ExitCode {
    if json {
        // If standard output cannot be written, the exit code still reports the failure.
        let _ = writeln!(Patient(io::stdout()), "{}", with_schema(json!({"error": error_json(error)})));
    } else {
        print_error("", error);
    }
    ExitCode::from(error.code().exit_code())
}

/// Prints the error and its remedy on standard error, as `error:` and `hint:` lines after the prefix.
pub fn print_error(prefix: &str, error: &Error) {
    print_line!("{prefix}error: {error}");
    print_line!("{prefix}hint: {}", sanitize(remedy(error)));
}

/// Starts logging to standard error from this level on, unless `STENCIL_LOG` sets another level. `daemon` is the form
/// of the log of a command that runs until it is stopped.
pub fn start_log(level: &str, daemon: Option<LogFormat>) {
    let mut log = env_logger::Builder::from_env(env_logger::Env::default().filter_or("STENCIL_LOG", level));
    match daemon {
        None => log.format_timestamp(None),
        Some(LogFormat::Text) => log.format_timestamp_millis(),
        Some(LogFormat::Json) => {
            json_log::start("exporter");
            log.format(json_log::write)
        }
    };
    log.init();
}

/// Asks a question on the terminal. Returns an error unless the answer is `y` or `yes`.
///
/// # Errors
/// Returns [`Code::Usage`] without a terminal, and an error for another answer.
pub fn confirm(question: &str) -> Result<()> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::usage("cannot ask for a confirmation: standard input is not a terminal")
            .hint("add --yes to run the command without a question"));
    }
    let _ = write!(io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(|e| Error::failed("cannot read the answer").because(e))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Error::failed("nothing was changed: the answer was not y")
            .hint("run the command again and answer y, or add --yes")),
    }
}
