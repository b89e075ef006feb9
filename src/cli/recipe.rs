//! `stencil recipe edit`: changes how clones of a template are launched.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use super::Global;
use super::output::{Done, Report, to_json};
use super::words::word;
use crate::clones::recipe::{MAX_TEXT, Recipe};
use crate::error::{Error, Result};
use crate::shown::shown_lines;
use crate::store::{Digest, Store, TemplateFile, TemplateRef};
use crate::sys::stream;

/// How long the program that writes a recipe may be silent.
const SILENCE: Duration = Duration::from_secs(300);

/// Change how clones of a template are launched
#[derive(Debug, Args)]
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
/// Opens it in $VISUAL or $EDITOR. What cannot work is refused, and the template keeps the recipe that it has; clones
/// that run are not changed. In arguments {memory} {state} {file:NAME} {id} {index} {dir} {mac} {mac:N} {cid} {uuid}
/// {port:N} {disk:NAME} are filled in for each clone.
#[derive(Debug, Args)]
pub struct EditArgs {
    /// NAME[:TAG], NAME@blake3:HEX, or eight or more hex digits
    #[arg(value_name = "T", value_parser = word::<TemplateRef>)]
    template: TemplateRef,
    /// Take the recipe from a file, '-' is standard input; no editor is opened
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

/// Runs it.
///
/// # Errors
/// When there is no such template, the recipe cannot work, or somebody else changed it meanwhile.
pub fn run(args: &RecipeArgs, global: &Global) -> Result<Done> {
    let RecipeCommand::Edit(args) = &args.command;
    let store = Store::open(&global.store)?;
    let digest = store.resolve(&args.template)?;
    let template = store.template(&digest)?;
    let files = template.files();
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
            false => Err(Error::try_again("the recipe was changed by somebody else while it was edited")
                .remedy("look at it with `stencil inspect --recipe`, then edit it again")),
        }
    };
    let changed = match &args.from {
        Some(path) => take(Recipe::edited(&read(path)?, files)?)?,
        None => in_editor(before.as_ref(), files, take)?,
    };
    Ok(Done::report(Edited { digest, changed }))
}

fn read(path: &Path) -> Result<String> {
    let fail = |e| Error::io("cannot read the recipe", path, e);
    // A person at a terminal may think.
    let (mut file, limit) = if path.as_os_str() == "-" {
        (File::from(rustix::io::dup(io::stdin()).map_err(|e| fail(e.into()))?), None)
    } else {
        (stream::open_source(path).map_err(fail)?, Some(SILENCE))
    };
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    loop {
        if !stream::wait_readable(&file, limit, || Ok(()), fail)? {
            return Err(Error::try_again(format!("nothing came for {} s", SILENCE.as_secs()))
                .at(path)
                .remedy("start the program that writes the recipe, then run this again"));
        }
        match file.read(&mut part) {
            Ok(0) => break,
            Ok(got) => bytes.extend(part.iter().take(got)),
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err(fail(e)),
        }
        if bytes.len() as u64 > MAX_TEXT {
            return Err(Error::usage(format!("a recipe has at most {MAX_TEXT} bytes"))
                .at(path)
                .remedy("give a recipe"));
        }
    }
    String::from_utf8(bytes)
        .map_err(|_| Error::usage("a recipe is UTF-8").at(path).remedy("give a recipe: it is JSON"))
}

/// Lets a person edit, and takes what was typed. When that fails for good, the text is kept and named.
fn in_editor(
    before: Option<&Value>,
    files: &[TemplateFile],
    take: impl FnOnce(Recipe) -> Result<bool>,
) -> Result<bool> {
    let Some(before) = before else {
        return Err(Error::usage("this template has no recipe to edit: it was not captured from a VM")
            .remedy("write one and give it with --from FILE; `stencil inspect --recipe` of another shows the form"));
    };
    // One of a newer build is edited as the JSON that it is.
    let text = match Recipe::from_value(before) {
        Ok(recipe) => shown_lines(&recipe.to_text()),
        Err(_) => shown_lines(&format!("{before:#}\n")),
    };
    let file = tempfile::Builder::new()
        .prefix("stencil-recipe-")
        .suffix(".json")
        .tempfile()
        .map_err(|e| Error::io("cannot make a temporary file", std::env::temp_dir(), e))?;
    std::fs::write(file.path(), &text).map_err(|e| Error::io("cannot write", file.path(), e))?;
    let outcome = edit(file.path(), &text, files).and_then(|recipe| recipe.map_or(Ok(false), take));
    outcome.map_err(|error| {
        if std::fs::read(file.path()).is_ok_and(|now| now == text.as_bytes()) {
            return error;
        }
        let remedy = error.remedy_text().map_or(String::new(), |remedy| format!("{remedy}; "));
        match file.keep() {
            Ok((_, kept)) => error.remedy(format!(
                "{remedy}what you have typed is in {}: --from takes it, remove it then",
                kept.display()
            )),
            Err(_) => error,
        }
    })
}

/// Lets a person edit until it is right; nothing when it was left as it is.
fn edit(path: &Path, text: &str, files: &[TemplateFile]) -> Result<Option<Recipe>> {
    loop {
        open_editor(path)?;
        let now = read(path)?;
        if now == text {
            return Ok(None);
        }
        match Recipe::edited(&now, files) {
            Ok(recipe) => return Ok(Some(recipe)),
            Err(error) if io::stdin().is_terminal() && again(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn open_editor(path: &Path) -> Result<()> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into());
    // Both may hold arguments, as everywhere: a shell takes them apart.
    let mut line = editor.clone();
    line.push(" \"$1\"");
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(line)
        .arg("stencil")
        .arg(path)
        // Standard output is for what this command has to say.
        .stdout(if io::stdout().is_terminal() { Stdio::inherit() } else { Stdio::null() })
        .status()
        .map_err(|e| Error::io("cannot start a shell for the editor", "/bin/sh", e))?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!("the editor '{}' failed ({status})", editor.to_string_lossy()))
            .remedy("set VISUAL or EDITOR to an editor, or use --from FILE; the recipe was not changed")),
    }
}

fn again(error: &Error) -> bool {
    let _ = write!(io::stderr(), "{error}\nEdit it again? [Y/n] ");
    let mut answer = String::new();
    let _ = io::stderr().flush();
    io::stdin().read_line(&mut answer).is_ok_and(|got| got > 0) && !answer.trim().eq_ignore_ascii_case("n")
}
