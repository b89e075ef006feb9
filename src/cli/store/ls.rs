//! `stencil ls`: lists the templates of the store.

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Done, Report, to_json};
use crate::error::{Error, Result};
use crate::store::{Digest, Store, TagName, TemplateFile};
use crate::units::Bytes;

/// List templates
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil ls
  stencil ls web
  stencil --store /srv/store ls --json")]
pub struct LsArgs {
    /// List only the tags of this name
    name: Option<String>,
}

#[derive(Serialize)]
struct Line {
    tag: Option<TagName>,
    digest: Digest,
    size_bytes: Bytes,
    data_bytes: Bytes,
    stored_bytes: Bytes,
    created: u64,
    files: Vec<TemplateFile>,
    /// Reason why the template cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

struct Listing(Vec<Line>);

impl Report for Listing {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut table = Columns::new(&[
            Text("NAME"),
            Text("TAG"),
            Text("DIGEST"),
            Number("SIZE"),
            Number("DATA"),
            Number("STORED"),
            Text("FILES"),
        ]);
        for line in &self.0 {
            let text = |part: fn(&TagName) -> &str| line.tag.as_ref().map_or("-", part).to_owned();
            let files: Vec<&str> = line.files.iter().map(|f| f.name.as_str()).collect();
            let last = if line.error.is_some() { "damaged".to_owned() } else { files.join(", ") };
            table.row([
                text(TagName::name),
                text(TagName::tag),
                line.digest.short(),
                line.size_bytes.to_string(),
                line.data_bytes.to_string(),
                line.stored_bytes.to_string(),
                last,
            ]);
        }
        table.print(out)?;
        self.0.iter().try_for_each(|line| match &line.error {
            Some(error) => writeln!(out, "damaged: template {}: {error}", line.digest),
            None => Ok(()),
        })
    }

    fn json(&self) -> Value {
        json!({"templates": to_json(&self.0)})
    }
}

fn describe(store: &Store, digest: &Digest, tag: Option<TagName>) -> Line {
    let mut line = Line {
        tag,
        digest: *digest,
        size_bytes: Bytes::ZERO,
        data_bytes: Bytes::ZERO,
        stored_bytes: Bytes::ZERO,
        created: 0,
        files: Vec::new(),
        error: None,
    };
    match store.template(digest) {
        Ok(template) => {
            line.size_bytes = template.size();
            line.data_bytes = template.data_bytes();
            line.stored_bytes = template.stored_bytes();
            line.created = template.policy().created;
            line.files = template.files().to_vec();
        }
        Err(error) => line.error = Some(error.to_string()),
    }
    line
}

/// Runs `stencil ls`. A damaged template is listed with its error.
///
/// # Errors
/// Returns `Code::NotFound` if no tag has the name, and an error if the store cannot be read.
pub fn run(args: &LsArgs, global: &Global) -> Result<Done> {
    let store = Store::open(&global.store)?;
    let (tags, digests) = (store.tags()?, store.digests()?);
    let wanted = |name: &str| args.name.as_ref().is_none_or(|n| n == name);
    let mut lines: Vec<Line> = tags
        .iter()
        .filter(|t| wanted(&t.name))
        .map(|t| describe(&store, &t.digest, TagName::new(&t.name, &t.tag).ok()))
        .collect();
    if args.name.is_none() {
        let nameless = digests.iter().filter(|d| tags.iter().all(|t| t.digest != **d));
        lines.extend(nameless.map(|d| describe(&store, d, None)));
    } else if lines.is_empty() {
        let name = args.name.as_deref().unwrap_or_default();
        return Err(Error::not_found(format!("no tag has the name '{name}'"))
            .at(store.dir())
            .hint("run 'stencil ls' to list the templates"));
    }
    Ok(Done::report(Listing(lines)))
}
