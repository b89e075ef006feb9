//! Errors of the argument parser, in the form of all other errors.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::output::fail;
use crate::error::{Code, Error};

/// Commands of other tools that are no commands here, and the hint for each.
const ELSEWHERE: [(&str, &str); 9] = [
    ("run", "use 'stencil clone'"),
    ("start", "use 'stencil clone'"),
    ("launch", "use 'stencil clone'"),
    ("create", "use 'stencil import' for a template, 'stencil clone' for clones"),
    ("build", "use 'stencil import' or 'stencil capture'"),
    ("commit", "use 'stencil capture'"),
    ("pull", "use 'stencil load' with a stream of 'stencil save'"),
    ("push", "use 'stencil save' and 'stencil load' on the other host"),
    ("stats", "use 'stencil density'"),
];

/// Reports an error of the argument parser, as text or, with `--json`, as JSON, and returns the exit code. Help and
/// version, which the parser returns as errors too, are printed with exit code 0.
pub fn report(error: &clap::Error, cli: &mut clap::Command) -> ExitCode {
    let json = std::env::args_os().any(|arg| arg == "--json");
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::InvalidSubcommand => {
            let unknown = text(error, ContextKind::InvalidSubcommand).unwrap_or_default();
            let error =
                Error::usage(format!("unrecognized subcommand '{unknown}'")).hint(instead(error, unknown));
            return fail(&error, json);
        }
        _ if json => {
            return fail(&usage_error(&error.render().to_string()), true);
        }
        // The parser counts an option that an environment variable sets as an argument, even if the user typed the
        // command alone.
        ErrorKind::MissingSubcommand => match alone(error, cli) {
            Some(command) => drop(write!(io::stderr(), "{}", command.render_help())),
            None => drop(error.print()),
        },
        _ => drop(error.print()),
    }
    ExitCode::from(Code::Usage.exit_code())
}

/// Returns the error of clap's text: a message whose following lines, if indented, list arguments or values; then,
/// after empty lines, tips, the usage and a reference to `--help`.
fn usage_error(text: &str) -> Error {
    let text = text.trim_start_matches("error: ");
    let (message, rest) = text.split_once("\n\n").unwrap_or((text, ""));
    let mut lines = message.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    let listed = lines.collect::<Vec<_>>().join(", ");
    let message = if listed.is_empty() { first.to_owned() } else { format!("{first} {listed}") };
    let part = |prefix| rest.lines().find_map(|line| line.trim_start().strip_prefix(prefix));
    let remedy = match (part("tip: "), part("Usage: ")) {
        (Some(tip), _) => tip.to_owned(),
        (None, Some(usage)) => format!("use: {usage}"),
        (None, None) => "run 'stencil --help'".to_owned(),
    };
    Error::usage(message).hint(remedy)
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind)? {
        ContextValue::String(text) => Some(text),
        // The parser sorts its suggestions, the best one last.
        ContextValue::Strings(texts) => texts.last().map(String::as_str),
        _ => None,
    }
}

/// Returns the hint for an unknown command.
fn instead(error: &clap::Error, unknown: &str) -> String {
    let usage = error.get(ContextKind::Usage).map(ToString::to_string).unwrap_or_default();
    let is_name = |word: &&str| !word.starts_with(['[', '<', '-']);
    let words: Vec<&str> = usage.split_whitespace().skip(1).take_while(is_name).collect();
    let parent = if words.is_empty() { "stencil".to_owned() } else { words.join(" ") };
    let elsewhere = ELSEWHERE.iter().find(|(name, _)| parent == "stencil" && *name == unknown);
    match (elsewhere, text(error, ContextKind::SuggestedSubcommand)) {
        (Some((_, hint)), _) => (*hint).to_owned(),
        (None, Some(similar)) => {
            format!("use '{parent} {similar}', or run '{parent} --help' to list the commands")
        }
        (None, None) => format!("run '{parent} --help' to list the commands"),
    }
}

/// Returns the command that lacks its subcommand if the call has no further arguments.
fn alone<'a>(error: &clap::Error, cli: &'a mut clap::Command) -> Option<&'a mut clap::Command> {
    let words: Vec<&str> = text(error, ContextKind::InvalidSubcommand)?.split(' ').collect();
    if std::env::args_os().len() != words.len() {
        return None;
    }
    cli.build();
    words.iter().skip(1).try_fold(cli, |command, name| command.find_subcommand_mut(name))
}
