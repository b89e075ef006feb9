//! `stencil ps`: lists clones.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::columns::Column::{Number, Text};
use crate::cli::columns::Columns;
use crate::cli::output::{Done, Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::clones::epochs;
use crate::clones::find::dead_mount::DeadMount;
use crate::clones::find::handlers::{self, Handler, ServedProcess};
use crate::clones::find::{self, CloneProcess};
use crate::clones::registry::process_tree::ProcessTrees;
use crate::clones::registry::{self, Ending, Entry};
use crate::control;
use crate::error::Result;
use crate::sanitize::utc;
use crate::sys::process::{ProcessId, signal_name};

/// List clones, and other processes that map a template
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  stencil ps
  stencil ps -q
  stencil --store /srv/store ps --json")]
pub struct PsArgs {
    /// Print only the ids of clones that Stencil launched; same as -q
    #[arg(long)]
    ids: bool,
    /// Accepted for users of other tools: clones that have ended are always listed
    #[arg(short, long, hide = true)]
    all: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    id: Option<String>,
    pid: u32,
    state: &'static str,
    kind: &'static str,
    /// Reference given at launch.
    reference: Option<String>,
    digest: String,
    created: Option<u64>,
    dir: Option<String>,
    /// Labels given at launch.
    labels: BTreeMap<String, String>,
    /// Ports of the host that are forwarded to the guest, by their names in the recipe.
    ports: BTreeMap<String, u16>,
    /// How the clone's process ended, if it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<Ended>,
    /// The processes that a page-fault handler serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    serves: Option<Vec<ServedProcess>>,
}

/// How a clone's process ended.
#[derive(Debug, Serialize)]
struct Ended {
    /// Time of the exit, in RFC 3339.
    at: String,
    exit_code: Option<u8>,
    /// Name of the signal, such as `SIGKILL`.
    signal: Option<String>,
}

impl Ended {
    fn of(entry: &Entry) -> Option<Ended> {
        let Ending { at, exit_code, signal } = Ending::of(entry)?;
        Some(Ended { at: utc(at), exit_code, signal: signal.map(|number| signal_name(number.into())) })
    }

    /// Formats the end of the process, such as `exit 1 at 2026-01-02T03:04:05Z`.
    fn text(&self) -> String {
        let how = match (self.exit_code, &self.signal) {
            (Some(code), _) => format!("exit {code}"),
            (None, Some(signal)) => signal.clone(),
            (None, None) => "unknown".to_owned(),
        };
        format!("{how} at {}", self.at)
    }
}

impl Row {
    fn of(entry: &Entry, trees: &ProcessTrees) -> Row {
        let state = match (entry.is_launching(), trees.of(entry).is_empty()) {
            _ if entry.is_foreign() => "foreign",
            (true, _) => "launching",
            (false, false) => "running",
            (false, true) => "ended",
        };
        Row {
            id: Some(entry.id.clone()),
            pid: entry.pid,
            state,
            kind: entry.kind.name(),
            reference: Some(entry.name.clone()),
            digest: entry.template.clone(),
            created: Some(entry.created),
            dir: Some(entry.dir.display().to_string()),
            labels: entry.labels.clone(),
            ports: entry.ports.clone(),
            ended: if state == "ended" { Ended::of(entry) } else { None },
            serves: None,
        }
    }

    /// Creates the row of a process that Stencil did not launch.
    fn of_other(clone: &CloneProcess) -> Option<Row> {
        Some(Row {
            id: None,
            pid: clone.pid,
            state: "running",
            kind: "other",
            reference: None,
            digest: clone.maps.first()?.digest.to_string(),
            created: None,
            dir: None,
            labels: BTreeMap::new(),
            ports: BTreeMap::new(),
            ended: None,
            serves: None,
        })
    }

    fn of_handler(handler: Handler) -> Row {
        Row {
            id: None,
            pid: handler.pid,
            state: "running",
            kind: "page-faults",
            reference: None,
            digest: handler.digest.to_string(),
            created: None,
            dir: None,
            labels: BTreeMap::new(),
            ports: BTreeMap::new(),
            ended: None,
            serves: Some(handler.serves),
        }
    }
}

struct PsReport {
    rows: Vec<Row>,
    /// Processes that could not be inspected; each may be a clone.
    unseen: Vec<u32>,
    /// Errors of records that cannot be used; each may belong to a clone.
    unread: Vec<String>,
    /// Mounts whose supervisor and server are dead.
    dead_mounts: Vec<DeadMount>,
    ids: bool,
}

impl Report for PsReport {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.ids {
            return self.rows.iter().filter_map(|r| r.id.as_ref()).try_for_each(|id| writeln!(out, "{id}"));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut columns = Columns::new(&[
            Text("ID"),
            Number("PID"),
            Text("STATE"),
            Text("KIND"),
            Number("AGE"),
            Text("PORTS"),
            Text("TEMPLATE"),
            Text("END"),
        ]);
        for row in &self.rows {
            let short: String = row.digest.chars().take(12).collect();
            columns.row([
                row.id.clone().unwrap_or_else(|| "-".into()),
                row.pid.to_string(),
                row.state.into(),
                row.kind.into(),
                row.created.map_or_else(|| "-".into(), |at| age(now.saturating_sub(at))),
                ports(&row.ports),
                row.reference.clone().unwrap_or(short),
                row.ended.as_ref().map_or_else(|| "-".into(), Ended::text),
            ]);
        }
        columns.print(out)
    }

    fn json(&self) -> Value {
        let mut all = json!({ "clones": to_json(&self.rows) });
        if !self.unseen.is_empty() {
            all["unseen"] = json!(self.unseen);
        }
        if !self.unread.is_empty() {
            all["unread"] = json!(self.unread);
        }
        if !self.dead_mounts.is_empty() {
            all["dead_mounts"] = to_json(&self.dead_mounts);
        }
        all
    }
}

/// Formats forwarded ports as `HOST->NAME`, in the form of container tools.
pub(in crate::cli) fn ports(all: &BTreeMap<String, u16>) -> String {
    let one = |(name, port): (&String, &u16)| format!("{port}->{name}");
    if all.is_empty() { "-".into() } else { all.iter().map(one).collect::<Vec<_>>().join(",") }
}

/// Formats a span of time in its largest unit.
pub(in crate::cli) fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Runs `stencil ps`.
///
/// # Errors
/// Returns an error if the runtime directory cannot be read.
pub fn run(args: &PsArgs, global: &Global) -> Result<Done> {
    let filter = StoreFilter::of(global)?;
    registry::sweep().unwrap_or_else(|error| log::warn!("{error}"));
    epochs::sweep().unwrap_or_else(|error| log::warn!("{error}"));
    let (mut entries, unread) = registry::list_and_unread()?;
    unread.iter().for_each(|error| log::warn!("{error}"));
    let unread = unread.iter().map(ToString::to_string).collect();
    let trees = ProcessTrees::scan(&entries);
    // Clones that have ended since their record was read.
    let has_ended = |entry: &Entry| entry.ending.is_none() && trees.of(entry).is_empty();
    if entries.iter().any(has_ended) {
        let later: HashMap<String, Option<Ending>> =
            registry::list()?.into_iter().map(|entry| (entry.id, entry.ending)).collect();
        for entry in entries.iter_mut().filter(|entry| has_ended(entry)) {
            entry.ending = later.get(&entry.id).copied().flatten();
        }
    }
    let shown = entries.iter().filter(|entry| filter.has_clone(entry));
    let mut rows: Vec<Row> = shown.map(|entry| Row::of(entry, &trees)).collect();
    let ours: HashSet<ProcessId> = entries.iter().flat_map(|entry| trees.of(entry)).collect();
    let mut unseen = vec![];
    let mut dead_mounts = vec![];
    let mounts = control::mounts_and_dead().map(|mut mounts| {
        mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
        mounts
    });
    match mounts.and_then(|mounts| Ok((find::template_mappings(&mounts)?, mounts))) {
        Ok((mut others, mounts)) => {
            // A handler is no clone of a dead mount.
            let handlers = handlers::take_out(&mut others.clones, |_| true);
            dead_mounts = DeadMount::of(&mounts, others.clones.iter());
            for dead in &dead_mounts {
                log::warn!("{}; {}", dead.describe(), dead.remedy);
            }
            if let Some(holes) = others.holes() {
                log::warn!("{holes}");
            }
            unseen = others.unseen.pids();
            others.clones.retain(|clone| !clone.processes().any(|its| ours.contains(&its)));
            let handlers = handlers.unwrap_or_else(|error| {
                log::warn!("cannot find page-fault handlers: {error}");
                vec![]
            });
            for handler in handlers {
                log::warn!("{}", handler.describe());
                if !ours.iter().any(|its| its.pid == handler.pid) {
                    rows.push(Row::of_handler(handler));
                }
            }
            rows.extend(others.clones.iter().filter_map(Row::of_other));
        }
        // A user who cannot inspect the processes of others still gets the recorded clones.
        Err(error) => log::warn!("cannot list other processes: {error}"),
    }
    Ok(Done::report(PsReport { rows, unseen, unread, dead_mounts, ids: args.ids || global.quiet }))
}
