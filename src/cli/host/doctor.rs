//! `stencil doctor`: checks what the host supports, and what reduces sharing or speed.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::Value;

use super::check::{Check, Verdict};
use super::kernel;
use crate::cli::Global;
use crate::cli::mount::stuck::{self, Stuck};
use crate::cli::output::{Done, Report, to_json};
use crate::clones::counted;
use crate::clones::find::dead_mount::DeadMount;
use crate::clones::find::{self, handlers};
use crate::control::{self, Listing};
use crate::error::{Code, Error, Result};
use crate::store::Store;
use crate::sys::probe;
use crate::sys::process::holders::{self, SCAN_TIMEOUT};
use crate::sys::process::procfs;
use crate::units::Bytes;

/// Arguments of `stencil doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  stencil doctor
  stencil doctor --cache-dir /var/cache/stencil
  stencil doctor --fix-stuck 57")]
pub struct DoctorArgs {
    /// Directory for passthrough backings to check (as in `mount --cache-dir`)
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<std::path::PathBuf>,
    /// Abort a stuck FUSE connection after a confirmation: connection N, or the only stuck one
    #[arg(long, value_name = "N", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "absent, without a number, with a number")]
    fix_stuck: Option<Option<u32>>,
    /// Abort without a confirmation
    #[arg(long, requires = "fix_stuck")]
    yes: bool,
}

#[derive(Serialize)]
struct DoctorReport {
    verdict: Verdict,
    /// The verdict in one sentence.
    summary: String,
    counts: Counts,
    checks: Vec<Check>,
    stuck: Vec<Stuck>,
}

/// Numbers of checks by result.
#[derive(Serialize)]
struct Counts {
    ok: usize,
    note: usize,
    unknown: usize,
    missing: usize,
}

impl DoctorReport {
    fn new(checks: Vec<Check>, stuck: Vec<Stuck>) -> DoctorReport {
        let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
        let counts = Counts {
            ok: count(Verdict::Ok),
            note: count(Verdict::Note),
            unknown: count(Verdict::Unknown),
            missing: count(Verdict::Missing),
        };
        let verdict = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok);
        DoctorReport { verdict, summary: summary(verdict, &checks), counts, checks, stuck }
    }
}

/// Returns the verdict in one sentence, with the number of checks of each result.
fn summary(verdict: Verdict, checks: &[Check]) -> String {
    let parts = [
        (Verdict::Missing, "requirement missing", "requirements missing"),
        (Verdict::Unknown, "unknown", "unknown"),
        (Verdict::Note, "note", "notes"),
        (Verdict::Ok, "ok", "ok"),
    ];
    let part = |(result, one, many)| {
        let mut names: Vec<&str> = checks.iter().filter(|c| c.verdict == result).map(|c| c.name).collect();
        let count = counted(names.len() as u64, one, many);
        names.dedup();
        match (names.is_empty(), result) {
            (true, _) => None,
            (false, Verdict::Ok) => Some(count),
            (false, _) => Some(format!("{count} ({})", names.join(", "))),
        }
    };
    let parts: Vec<String> = parts.into_iter().filter_map(part).collect();
    let can = if verdict == Verdict::Missing { "cannot" } else { "can" };
    format!("this host {can} run Stencil: {}", parts.join(", "))
}

/// Checks the host. The command exits with 1 if a requirement is not met.
///
/// # Errors
/// Same as [`stuck::fix`] with `--fix-stuck`. Otherwise none: a check that cannot be made is a finding.
pub fn run(args: &DoctorArgs, global: &Global) -> Result<Done> {
    if let Some(number) = args.fix_stuck {
        return Ok(Done::report(stuck::fix(number, args.yes)?));
    }
    let (listing, unlisted) = match control::list() {
        Ok(listing) => (listing, None),
        Err(error) => (Listing::default(), Some(error)),
    };
    let mut checks = vec![
        kernel::kernel(),
        kernel::pagemap_scan(),
        kernel::page_cache_figures(),
        device("fuse", "/dev/fuse", "load the kernel module (modprobe fuse), or run the command as root"),
        kernel::passthrough(&listing.mounts),
        privileges(),
        closed_processes(),
        kernel::isolation(),
        kvm(),
        qemu(version("qemu-system-x86_64")),
        qemu_img(version("qemu-img")),
        kernel::huge_pages(),
        kernel::ksm(),
        kernel::swap(),
        kernel::overcommit(),
        kernel::read_size(),
        store(&global.store),
        cache(args.cache_dir.as_deref().unwrap_or(&global.store)),
        kernel_decode(args.cache_dir.as_deref().unwrap_or(&global.store), &global.store),
    ];
    let stuck = stuck::find();
    checks.extend(connections(stuck.as_ref().map(Vec::as_slice)));
    checks.extend(unlisted.iter().map(unread_mount));
    checks.extend(mounts(&listing));
    let report = DoctorReport::new(checks, stuck.unwrap_or_default());
    let missing = report.verdict == Verdict::Missing;
    let done = Done::report(report);
    Ok(if missing { done.exit_as(Code::Failed) } else { done })
}

/// Checks that this process can open a device.
fn device(name: &'static str, path: &str, remedy: &str) -> Check {
    match File::options().read(true).write(true).open(path).and_then(|file| file.metadata()) {
        Ok(meta) if meta.file_type().is_char_device() => Check::ok(name, path),
        Ok(_) => Check::missing(name, format!("{path} is not a character device"), remedy),
        Err(error) => Check::missing(name, format!("{path}: {}", crate::error::errno_text(&error)), remedy),
    }
}

/// Checks whether the kernel could decode the packs of the store, with metadata in `metadata_dir`.
fn kernel_decode(metadata_dir: &Path, store: &Path) -> Check {
    const NAME: &str = "kernel decode";
    const REMEDY: &str =
        "see docs/explanation/kernel-decode.md; without kernel decode, mount with the default of --serve";
    if !probe::has_sys_admin() {
        return Check::note(NAME, "not probed without CAP_SYS_ADMIN", "run doctor as root");
    }
    match control::probe_kernel_decode(existing(metadata_dir), existing(store)) {
        Ok(()) => Check::ok(NAME, "the kernel can decode packs (mount --serve kernel)"),
        Err(error) => Check::note(NAME, error.to_string(), REMEDY),
    }
}

fn privileges() -> Check {
    if probe::has_sys_admin() {
        Check::ok("privileges", "CAP_SYS_ADMIN")
    } else {
        Check::note(
            "privileges",
            "no CAP_SYS_ADMIN",
            "run mount, clone and density as root; the store commands work without privileges",
        )
    }
}

/// Checks for processes that cannot be inspected: each may be a clone.
fn closed_processes() -> Check {
    const NAME: &str = "processes";
    let look = |pid| procfs::maps(pid, |_, _| false).map(|_| None::<()>).map_err(io::Error::other);
    match holders::look_at_all(SCAN_TIMEOUT, look) {
        Err(error) => return Check::missing(NAME, error.to_string(), "mount /proc"),
        Ok(all) => {
            if let Some(holes) = all.unseen.describe("be clones") {
                return Check::note(NAME, holes, all.unseen.remedy());
            }
        }
    }
    let looks = holders::look_at_each(vec![1], SCAN_TIMEOUT, move |pid| look(pid).is_err().then_some(()));
    match looks.seen.is_empty() {
        true => Check::ok(NAME, "all can be inspected"),
        false => {
            let first = holders::list_pids(&[1]);
            Check::ok(
                NAME,
                format!("all can be inspected except {first}, which is assumed not to be a clone"),
            )
        }
    }
}

fn kvm() -> Check {
    match device("kvm", "/dev/kvm", "") {
        check if check.verdict == Verdict::Ok => check,
        check => {
            let remedy =
                "load kvm_intel or kvm_amd, or join the group of /dev/kvm; until then, guests are emulated";
            Check::note("kvm", check.found, remedy)
        }
    }
}

/// Returns the first line that a program in the PATH prints for `--version`, `None` if the program does not exist.
fn version(program: &str) -> io::Result<Option<String>> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    match output {
        Ok(output) if !output.status.success() => {
            let message = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!("{}: {}", output.status, message.trim())))
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            Ok(Some(text.lines().next().unwrap_or_default().to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// First release of QEMU with `rom=off` for memory-backend-file.
const QEMU_NEEDED: (u32, u32) = (8, 2);

/// Checks the QEMU in the PATH. The result is a note at most: other VMMs, and a QEMU elsewhere, do not need this one.
fn qemu(version: io::Result<Option<String>>) -> Check {
    let remedy = "install QEMU 8.2 or later for QEMU guests (Debian 12: qemu-system-x86, bookworm-backports)";
    let text = match version {
        Ok(Some(text)) => text,
        Ok(None) => return Check::note("qemu", "no qemu-system-x86_64 in PATH", remedy),
        Err(error) => return Check::note("qemu", format!("cannot run qemu-system-x86_64: {error}"), remedy),
    };
    let release = text.split_once("version ").and_then(|(_, rest)| {
        let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    match release {
        Some(release) if release >= QEMU_NEEDED => Check::ok("qemu", text),
        Some(_) => {
            Check::note("qemu", format!("{text}: no rom=off, so templates can only be mapped as ROM"), remedy)
        }
        None => Check::note("qemu", format!("cannot parse the version '{text}'"), remedy),
    }
}

fn qemu_img(version: io::Result<Option<String>>) -> Check {
    let remedy = "install qemu-img for capture and for clones of VMs with disks (Debian: qemu-utils)";
    match version {
        Ok(Some(text)) => Check::ok("qemu-img", text),
        Ok(None) => Check::note("qemu-img", "not in PATH", remedy),
        Err(error) => Check::note("qemu-img", format!("cannot run qemu-img: {error}"), remedy),
    }
}

fn store(dir: &Path) -> Check {
    match probe::file_system(dir) {
        Ok(fs) if fs.free < Bytes::new(1 << 30) => Check::note(
            "store",
            format!("{} on {}, only {} free", dir.display(), fs.name, fs.free),
            "free space before the next import",
        ),
        Ok(fs) => {
            let sealed = Store::open(dir).map_or(0, |store| store.sealed());
            let sealed = match sealed {
                0 => String::new(),
                some => format!(
                    "; {} for kernel decode: rm and mv fail with EPERM until 'stencil store unseal'",
                    counted(some, "pack is sealed", "packs are sealed")
                ),
            };
            Check::ok("store", format!("{} on {}, {} free{sealed}", dir.display(), fs.name, fs.free))
        }
        Err(error) if error.code() == Code::NotFound => {
            Check::ok("store", format!("{} does not exist; the first import creates it", dir.display()))
        }
        Err(error) => {
            Check::unknown("store", error.to_string(), "run the command as a user who can read the store")
        }
    }
}

fn cache(dir: &Path) -> Check {
    let existing = existing(dir);
    match probe::file_system(existing) {
        Ok(fs) if matches!(fs.name.as_str(), "ext4" | "xfs") => {
            Check::ok("backing", format!("{} on {}", existing.display(), fs.name))
        }
        Ok(fs) => Check::note(
            "backing",
            format!("{} on {}", existing.display(), fs.name),
            "name a directory on ext4 or xfs with mount --cache-dir: backings are then mapped by 2 MiB entries",
        ),
        Err(error) => Check::unknown("backing", error.to_string(), "name a directory with --cache-dir"),
    }
}

/// Returns the directory, or the nearest one above it that exists.
fn existing(dir: &Path) -> &Path {
    dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// Checks for FUSE connections whose requests make no progress.
fn connections(stuck: std::result::Result<&[Stuck], &Error>) -> Vec<Check> {
    match stuck {
        Ok([]) => vec![Check::ok("connections", "none is stuck")],
        Ok(stuck) => stuck.iter().map(|one| Check::note("connections", one.found(), &one.remedy())).collect(),
        Err(error) => vec![Check::unknown("connections", error.to_string(), "run the command as root")],
    }
}

/// Reports a record that cannot be read: it may belong to a mount.
fn unread_mount(error: &Error) -> Check {
    Check::unknown("mount", error.to_string(), error.hint_text().unwrap_or("see 'stencil status'"))
}

/// Checks for mounts without a living supervisor or server.
fn mounts(listing: &Listing) -> Vec<Check> {
    let mut checks: Vec<Check> = listing.unread.iter().map(unread_mount).collect();
    for dead in &listing.dead {
        let error = dead.lost_both();
        let one = control::with_store(vec![dead.clone()]);
        let clones = find::template_mappings(&one).and_then(|mut found| {
            handlers::take_out(&mut found.clones, |_| true)?;
            Ok(DeadMount::of(&one, found.clones.iter()))
        });
        let found = match clones.as_deref() {
            Ok([dead]) => dead.describe(),
            _ => error.to_string(),
        };
        checks.push(Check::note("mount", found, error.hint_text().unwrap_or_default()));
    }
    for living in &listing.mounts {
        let place = living.mountpoint.display();
        checks.push(match (living.orphaned, living.server_pid) {
            (true, _) => Check::note(
                "mount",
                format!("{place} has lost its supervisor"),
                &format!("start a new supervisor: stencil mount {place}"),
            ),
            (_, None) => Check::note(
                "mount",
                format!("{place} has no server"),
                "see 'stencil status' and the log of the mount",
            ),
            (_, Some(pid)) => Check::ok("mount", format!("{place} is served by process {pid}")),
        });
    }
    checks
}

impl Report for DoctorReport {
    fn json(&self) -> Value {
        to_json(self)
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for check in &self.checks {
            let word = match check.verdict {
                Verdict::Ok => "ok",
                Verdict::Note => "note",
                Verdict::Unknown => "unknown",
                Verdict::Missing => "MISSING",
            };
            writeln!(out, "{word:<8}{:<14}{}", check.name, check.found)?;
            if let Some(remedy) = &check.remedy {
                writeln!(out, "{:<22}{remedy}", "")?;
            }
        }
        writeln!(out, "{}", self.summary)
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::host::doctor::*;

    #[test]
    fn reports_a_qemu_without_rom_off_as_a_note() {
        let verdict = |text: &str| qemu(Ok(Some(text.to_owned()))).verdict;
        let of_debian =
            |version: &str| format!("QEMU emulator version {version} (Debian 1:{version}+dfsg-1)");
        for (version, expected) in [
            ("7.2.19", Verdict::Note),
            ("8.1.5", Verdict::Note),
            ("8.2.0", Verdict::Ok),
            ("10.0.2", Verdict::Ok),
        ] {
            assert_eq!(verdict(&of_debian(version)), expected, "{version}");
        }
        assert_eq!(verdict("QEMU emulator version 9.0.50"), Verdict::Ok);
        assert_eq!(verdict(""), Verdict::Note);
        assert_eq!(qemu(Ok(None)).verdict, Verdict::Note);
    }

    #[test]
    fn counts_unknown_apart_from_ok_and_names_what_is_not_ok() {
        let mut checks = vec![Check::ok("a", ""), Check::ok("b", ""), Check::unknown("c", "", "look")];
        let report = DoctorReport::new(checks.clone(), vec![]);
        assert_eq!(
            (report.verdict, report.summary.as_str()),
            (Verdict::Unknown, "this host can run Stencil: 1 unknown (c), 2 ok")
        );
        assert_eq!((report.counts.ok, report.counts.unknown), (2, 1));
        checks.extend([
            Check::missing("d", "", "get"),
            Check::note("e", "", "see"),
            Check::note("e", "", "see"),
        ]);
        let summary = DoctorReport::new(checks, vec![]).summary;
        assert_eq!(
            summary,
            "this host cannot run Stencil: 1 requirement missing (d), 1 unknown (c), 2 notes (e), 2 ok"
        );
    }
}
