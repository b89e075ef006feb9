//! `stencil recipe edit`: changes the launch recipe of a template.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use crate::cli::Global;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::value_parsers::word;
use crate::clones::recipe::{MAX_TEXT, Recipe};
use crate::error::{Error, Result};
use crate::sanitize::sanitize_lines;
use crate::store::{Digest, Roles, Store, TemplateFile, TemplateRef};
use crate::sys::files::stream;

/// Time after which a program that writes a recipe to a pipe has stalled.
const STALL_TIMEOUT: Duration = Duration::from_secs(300);

/// Change the launch recipe of a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil recipe edit web:1
  stencil recipe edit web:1 --from recipe.json")]
pub struct RecipeArgs {
    #[command(subcommand)]
    command: RecipeCommand,
}

#[derive(Debug, Subcommand)]
enum RecipeCommand {
    Edit(EditArgs),
}

/// Edit the launch recipe of a template
///
/// Opens the recipe in $VISUAL or $EDITOR. If the edited recipe is invalid, the template keeps its present recipe.
/// Running clones are not changed. In arguments, {memory} {state} {file:NAME} {id} {index} {dir} {mac} {mac:N} {cid}
/// {uuid} {port:N} {disk:NAME} are replaced for each clone.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil recipe edit web:1
  stencil inspect web:1 --recipe > recipe.json
  stencil recipe edit web:1 --from recipe.json")]
pub struct EditArgs {
    /// Template: NAME[:TAG], NAME@blake3:HEX, or at least eight hex digits of the digest
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Read the recipe from a file, '-' for standard input, instead of opening an editor
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

#[derive(Serialize)]
struct Edited {
    digest: Digest,
    changed: bool,
}

impl Report for Edited {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} {}", self.digest, if self.changed { "has the new recipe" } else { "is unchanged" })
    }

    fn json(&self) -> Value {
        to_json(self)
    }
}

/// Runs `stencil recipe edit`.
///
/// # Errors
/// Returns `Code::NotFound` if the template does not exist, `Code::Usage` if the recipe is invalid, and
/// `Code::TryAgain` if the stored recipe was changed during the edit.
pub fn run(args: &RecipeArgs, global: &Global) -> Result<Done> {
    let RecipeCommand::Edit(args) = &args.command;
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    let template = store.template(&digest)?;
    let (files, roles) = (template.files(), &template.roles()?);
    let before = template.policy().recipe.clone();
    let take = |recipe: Recipe| {
        let value = recipe.to_value();
        if before.as_ref() == Some(&value) {
            return Ok(false);
        }
        let mut is_as_before = true;
        store.set_policy(&digest, |policy| {
            is_as_before = args.from.is_some() || policy.recipe == before;
            if is_as_before {
                policy.recipe = Some(value);
            }
        })?;
        match is_as_before {
            true => Ok(true),
            false => Err(Error::try_again("the recipe was changed by another command during the edit")
                .hint("see the new recipe with 'stencil inspect --recipe', then edit it again")),
        }
    };
    let changed = match &args.from {
        Some(path) => take(Recipe::edited(&read(path)?, files, roles)?)?,
        None => in_editor(before.as_ref(), (files, roles), take)?,
    };
    Ok(Done::report(Edited { digest, changed }))
}

fn read(path: &Path) -> Result<String> {
    let fail = |e| Error::io("cannot read the recipe", path, e);
    // No time limit for standard input: a user may type the recipe at a terminal.
    let (mut file, limit) = if path.as_os_str() == "-" {
        (File::from(rustix::io::dup(io::stdin()).map_err(|e| fail(e.into()))?), None)
    } else {
        (stream::open_source(path).map_err(fail)?, Some(STALL_TIMEOUT))
    };
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    loop {
        if !stream::wait_readable(&file, limit, || Ok(()), fail)? {
            return Err(Error::try_again(format!("no recipe data for {} s", STALL_TIMEOUT.as_secs()))
                .at(path)
                .hint("start the program that writes the recipe, then run this command again"));
        }
        match file.read(&mut part) {
            Ok(0) => break,
            Ok(got) => bytes.extend(part.iter().take(got)),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err(fail(e)),
        }
        if bytes.len() as u64 > MAX_TEXT {
            return Err(Error::usage(format!("the recipe is longer than {MAX_TEXT} bytes"))
                .at(path)
                .hint("name a file that holds a recipe"));
        }
    }
    String::from_utf8(bytes).map_err(|_| {
        Error::usage("invalid recipe: not UTF-8")
            .at(path)
            .hint("name a file that holds a recipe, which is JSON")
    })
}

/// Opens the recipe in an editor, and passes the result to `take`. On an error, the text is kept in a file for the
/// user.
fn in_editor(
    before: Option<&Value>,
    template: (&[TemplateFile], &Roles),
    take: impl FnOnce(Recipe) -> Result<bool>,
) -> Result<bool> {
    let Some(before) = before else {
        return Err(Error::usage("the template has no recipe: it was not captured from a VM").hint(
            "write a recipe and run again with --from FILE; 'stencil inspect --recipe' prints an example",
        ));
    };
    // A recipe of a newer version cannot be parsed, and is edited as plain JSON.
    let text = match Recipe::from_value(before) {
        Ok(recipe) => sanitize_lines(&recipe.to_text()),
        Err(_) => sanitize_lines(&format!("{before:#}\n")),
    };
    let file = tempfile::Builder::new()
        .prefix("stencil-recipe-")
        .suffix(".json")
        .tempfile()
        .map_err(|e| Error::io("cannot create a temporary file", std::env::temp_dir(), e))?;
    std::fs::write(file.path(), &text).map_err(|e| Error::io("cannot write", file.path(), e))?;
    let outcome = edit(file.path(), &text, template).and_then(|recipe| recipe.map_or(Ok(false), take));
    outcome.map_err(|error| {
        if std::fs::read(file.path()).is_ok_and(|now| now == text.as_bytes()) {
            return error;
        }
        let remedy = error.hint_text().map_or(String::new(), |remedy| format!("{remedy}; "));
        match file.keep() {
            Ok((_, kept)) => error.hint(format!(
                "{remedy}your text is in {}: run again with --from, then remove the file",
                kept.display()
            )),
            Err(_) => error,
        }
    })
}

/// Opens the editor until the recipe is valid. Returns `None` if the text was not changed.
fn edit(path: &Path, text: &str, (files, roles): (&[TemplateFile], &Roles)) -> Result<Option<Recipe>> {
    loop {
        open_editor(path)?;
        let now = read(path)?;
        if now == text {
            return Ok(None);
        }
        match Recipe::edited(&now, files, roles) {
            Ok(recipe) => return Ok(Some(recipe)),
            Err(error) if io::stdin().is_terminal() && again(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn open_editor(path: &Path) -> Result<()> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into());
    // VISUAL and EDITOR may contain arguments, so a shell splits them.
    let mut line = editor.clone();
    line.push(" \"$1\"");
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(line)
        .arg("stencil")
        .arg(path)
        // Standard output is reserved for the result of this command.
        .stdout(if io::stdout().is_terminal() { Stdio::inherit() } else { Stdio::null() })
        .status()
        .map_err(|e| Error::io("cannot start a shell for the editor", "/bin/sh", e))?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!("the editor '{}' failed ({status})", editor.to_string_lossy()))
            .hint("set VISUAL or EDITOR to an editor, or use --from FILE; the recipe was not changed")),
    }
}

fn again(error: &Error) -> bool {
    let _ = write!(io::stderr(), "{error}\nEdit it again? [Y/n] ");
    let mut answer = String::new();
    let _ = io::stderr().flush();
    io::stdin().read_line(&mut answer).is_ok_and(|got| got > 0) && !answer.trim().eq_ignore_ascii_case("n")
}
