//! A run: where it takes place, which rows it measures, and what becomes of the samples.

pub mod floor;
pub mod inputs;
pub mod interrupt;
pub mod sampling;
pub mod site;
pub mod static_fs;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use stencilfs::error::{Error, Result};

use crate::goals::Goals;
use crate::model::{Bench, Host, Input, Row};
use crate::rows;
use sampling::{Procedure, Title};
use site::{Site, run};

/// Size of the dense image.
const DENSE: u64 = 1 << 30;
/// Size of the dense image of a short run.
const QUICK_DENSE: u64 = 256 << 20;
/// Size of the image with zeros.
const ZEROS: u64 = 4 << 30;
/// Largest number of measurements of a row in a short run.
const TRIES: u32 = 3;

/// What to measure in full, and the file for the samples.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// File for the samples. Written after each row; other rows of the file are kept
    #[arg(long, default_value = "tests/bench/bench.json")]
    out: PathBuf,
    /// Number of rounds
    #[arg(long, default_value_t = 5)]
    rounds: u64,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Which rows to measure, and where.
#[derive(Debug, Args)]
pub struct PlaceArgs {
    /// Measure this row only; may be repeated
    #[arg(long = "row", value_name = "NAME")]
    only: Vec<String>,
    /// Directory of the programs of Stencil
    #[arg(long, default_value = "target/release")]
    programs: PathBuf,
    /// Directory of the files that make setup downloads for guests
    #[arg(long, default_value = "target/guest")]
    guests: PathBuf,
    /// Directory on the disk that is measured; all files are in a new directory below it
    #[arg(long, default_value = "target/tmp")]
    dir: PathBuf,
}

/// How often the rows are measured.
enum Extent<'a> {
    /// The whole inputs, in this number of rounds.
    Full(u64),
    /// Small inputs, once, and again while a goal of the row is far away.
    Quick(&'a Goals),
}

/// What the rows need to be measured, and their results.
pub struct Context<'a> {
    /// The run without its inputs and rows.
    head: Bench,
    /// The file for the samples and its earlier contents.
    file: Option<(&'a Path, Option<Bench>)>,
    pub site: &'a Site,
    extent: Extent<'a>,
    only: &'a [String],
    /// Size of the dense image.
    pub dense_bytes: u64,
    /// Directory with Firecracker.
    pub guests: &'a Path,
    pub inputs: RefCell<Vec<Input>>,
    rows: RefCell<Vec<Row>>,
    problems: RefCell<Vec<String>>,
}

impl Context<'_> {
    /// Returns true if one of the rows is to be measured.
    pub fn wants(&self, names: &[&str]) -> bool {
        self.only.is_empty() || names.iter().any(|name| self.only.iter().any(|only| only == name))
    }

    /// Returns true for a short run, which measures fewer rows.
    pub fn is_quick(&self) -> bool {
        matches!(self.extent, Extent::Quick(_))
    }

    /// Measures a row.
    pub fn row(&self, title: Title, subjects: Vec<Procedure>) -> Result<()> {
        self.row_in_rounds(title, subjects, None)
    }

    /// Measures a row in another number of rounds.
    pub fn row_in_rounds(
        &self,
        title: Title,
        mut subjects: Vec<Procedure>,
        rounds: Option<u64>,
    ) -> Result<()> {
        if !self.wants(&[title.name]) {
            return Ok(());
        }
        let row = match self.extent {
            Extent::Full(all) => sampling::measure(title, rounds.unwrap_or(all), &mut subjects)?,
            Extent::Quick(goals) => {
                let mut row = sampling::measure(title, 1, &mut subjects)?;
                let mut problems = goals.gross_problems(&row);
                for _ in 1..TRIES {
                    if problems.is_empty() {
                        break;
                    }
                    problems.values().for_each(|problem| eprintln!("measuring again: {problem}"));
                    row = sampling::measure(title, 1, &mut subjects)?;
                    let again = goals.gross_problems(&row);
                    // Each goal has to be met in one of the tries.
                    problems.retain(|goal, _| again.contains_key(goal));
                }
                self.problems.borrow_mut().extend(problems.into_values());
                row
            }
        };
        self.rows.borrow_mut().push(row);
        self.save()
    }

    /// Returns the results so far.
    fn bench(&self) -> Bench {
        Bench { inputs: self.inputs.borrow().clone(), rows: self.rows.borrow().clone(), ..self.head.clone() }
    }

    /// Writes the results so far, with the rows of the file that are not measured yet.
    fn save(&self) -> Result<()> {
        let Some((file, earlier)) = &self.file else { return Ok(()) };
        let mut bench = self.bench();
        if let Some(earlier) = earlier {
            bench.keep_other_rows(earlier.clone());
        }
        bench.write(file)
    }
}

/// Measures everything and writes the samples.
pub fn measure_all(args: &RunArgs) -> Result<()> {
    let site = args.place.site()?;
    let earlier = args.out.exists().then(|| Bench::read(&args.out)).transpose()?;
    let file = Some((args.out.as_path(), earlier));
    let bench = measure(&site, &args.place, Extent::Full(args.rounds), DENSE, file)?.0;
    match args.place.only.is_empty() {
        // Rows of the file that are no longer measured end here.
        true => bench.write(&args.out),
        false => Ok(()),
    }
}

/// Measures small inputs. Fails if a ratio is worse than half its goal in each measurement of its row.
pub fn measure_quickly(args: &PlaceArgs, goals: &Goals) -> Result<()> {
    let site = args.site()?;
    let (bench, problems) = measure(&site, args, Extent::Quick(goals), QUICK_DENSE, None)?;
    for goal in &goals.goals {
        if let Some(ratio) = bench.row(&goal.row).and_then(|row| goal.ratio(row).ok()) {
            println!("{goal}: {ratio:.3}");
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::failed(problems.join("\n"))),
    }
}

impl PlaceArgs {
    fn site(&self) -> Result<Site> {
        Site::new(&self.dir, &self.programs, Path::new("tests/bench"))
    }
}

fn measure(
    site: &Site,
    args: &PlaceArgs,
    extent: Extent,
    dense_bytes: u64,
    file: Option<(&Path, Option<Bench>)>,
) -> Result<(Bench, Vec<String>)> {
    let began = Instant::now();
    let head = Bench {
        schema: 1,
        commit: commit()?,
        date: run(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]))?.trim().to_owned(),
        host: host(site, &args.guests)?,
        inputs: Vec::new(),
        rows: Vec::new(),
    };
    let context = Context {
        head,
        file,
        site,
        extent,
        only: &args.only,
        dense_bytes,
        guests: &args.guests,
        inputs: RefCell::default(),
        rows: RefCell::default(),
        problems: RefCell::default(),
    };
    rows::measure(&context, ZEROS)?;
    let missing: Vec<&String> =
        args.only.iter().filter(|name| context.rows.borrow().iter().all(|row| row.name != **name)).collect();
    if !missing.is_empty() {
        return Err(Error::usage(format!("no row is called {missing:?}")));
    }
    let bench = context.bench();
    eprintln!("{} rows in {:.0} s", bench.rows.len(), began.elapsed().as_secs_f64());
    Ok((bench, context.problems.into_inner()))
}

/// The commit of the work tree; `+` marks changes of other files than results.
fn commit() -> Result<String> {
    let head = run(Command::new("git").args(["rev-parse", "--short=12", "HEAD"]))?;
    let results =
        [":!tests/bench/bench.json", ":!docs/reference/benchmarks", ":!docs/reference/benchmarks.md"];
    let changes =
        run(Command::new("git").args(["status", "--porcelain", "--untracked-files=no", "--"]).args(results))?;
    Ok(format!("{}{}", head.trim(), if changes.is_empty() { "" } else { "+" }))
}

fn host(site: &Site, guests: &Path) -> Result<Host> {
    let read = |path: &str| fs::read_to_string(path).map_err(|e| Error::io("cannot read", path, e));
    let processors = read("/proc/cpuinfo")?;
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory = read("/proc/meminfo")?;
    let kib = memory.split_ascii_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    Ok(Host {
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        cpu: model.map_or("unknown", |(_, model)| model).trim().to_owned(),
        cpus: floor::processors() as u64,
        memory_bytes: kib.unwrap_or_default() * 1024,
        file_system: site.file_system()?,
        tools: versions(guests),
    })
}

/// The versions of the programs that are measured beside Stencil. A program that is missing fails its row.
fn versions(guests: &Path) -> BTreeMap<String, String> {
    let firecracker = guests.join("firecracker");
    let tools = [
        ("fio", Path::new("fio"), "--version"),
        ("firecracker", &firecracker, "--version"),
        ("lz4", Path::new("lz4"), "--version"),
        ("mkfs.erofs", Path::new("mkfs.erofs"), "--version"),
        ("qemu", Path::new("qemu-system-x86_64"), "--version"),
        ("zstd", Path::new("zstd"), "--version"),
    ];
    let version = |(name, program, option): (&str, &Path, &str)| {
        let printed = run(Command::new(program).arg(option)).ok()?;
        let line = printed.lines().find(|line| line.contains(|c: char| c.is_ascii_digit()))?;
        Some((name.to_owned(), line.trim().to_owned()))
    };
    tools.into_iter().filter_map(version).collect()
}
