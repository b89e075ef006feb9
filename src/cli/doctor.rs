//! `stencil doctor`: can this host do it, and does anything on it cost sharing or speed?

use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::{Value, json};

use super::Global;
use super::output::{Done, Report, to_json};
use super::stuck::{self, Stuck};
use crate::control;
use crate::error::{Code, Error, Result};
use crate::sys::pagemap::{Pagemap, Query};
use crate::sys::probe::{self, KernelRelease};
use crate::sys::users::{self, PATIENCE};
use crate::sys::{cachestat, procfs};
use crate::units::Bytes;

/// Arguments of `stencil doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Directory of passthrough backings to look at (as `mount --cache-dir`)
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<std::path::PathBuf>,
    /// Abort a FUSE connection that nobody answers, after asking: N as listed, or the only one
    #[arg(long, value_name = "N", num_args = 0..=1)]
    #[expect(clippy::option_option, reason = "left out, without a number, with one")]
    fix_stuck: Option<Option<u32>>,
    /// Do not ask before the abort
    #[arg(long, requires = "fix_stuck")]
    yes: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Works, at a cost that the check names.
    Note,
    /// Something that Stencil needs is missing.
    Missing,
}

/// One thing looked at.
#[derive(Debug, Clone, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn note(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
        Check { name, verdict: Verdict::Note, found: found.into(), remedy: Some(remedy.to_owned()) }
    }

    fn missing(name: &'static str, found: impl Into<String>, remedy: &str) -> Check {
        Check { name, verdict: Verdict::Missing, found: found.into(), remedy: Some(remedy.to_owned()) }
    }
}

struct DoctorReport {
    checks: Vec<Check>,
    stuck: Vec<Stuck>,
}

/// Looks at the host and prints what it found; exit 1 when something is missing.
///
/// # Errors
/// What [`stuck::fix`] refuses. Without it none: what cannot be asked is a finding.
pub fn run(args: &DoctorArgs, global: &Global) -> Result<Done> {
    if let Some(number) = args.fix_stuck {
        return Ok(Done::report(stuck::fix(number, args.yes)?));
    }
    let mut checks = vec![
        kernel(),
        pagemap_scan(),
        page_cache_figures(),
        device("fuse", "/dev/fuse", "load the kernel module: modprobe fuse"),
        passthrough(),
        privileges(),
        closed_processes(),
        isolation(),
        kvm(),
        qemu(version("qemu-system-x86_64")),
        qemu_img(version("qemu-img")),
        huge_pages(),
        ksm(),
        swap(),
        overcommit(),
        read_size(),
        store(&global.store),
        cache(args.cache_dir.as_deref().unwrap_or(&global.store)),
    ];
    let stuck = stuck::find();
    checks.extend(connections(stuck.as_ref().map(Vec::as_slice)));
    checks.extend(mounts());
    let stuck = stuck.unwrap_or_default();
    let missing = checks.iter().any(|check| check.verdict == Verdict::Missing);
    let done = Done::report(DoctorReport { checks, stuck });
    Ok(if missing { done.exit_as(Code::Failed) } else { done })
}

fn kernel() -> Check {
    match KernelRelease::running() {
        Ok((release, name)) if release >= KernelRelease::OLDEST => Check::ok("kernel", name),
        Ok((_, name)) => Check::missing(
            "kernel",
            format!("{name}, needed {} or later", KernelRelease::OLDEST),
            "boot a kernel 6.9 or later: on Debian 12, linux-image-amd64 from bookworm-backports",
        ),
        Err(error) => Check::missing("kernel", error.to_string(), "run it on Linux"),
    }
}

fn pagemap_scan() -> Check {
    let tried = Pagemap::this_process().and_then(|map| map.scan(0..0x1_0000, &Query::default()));
    match tried {
        Ok(_) => Check::ok("PAGEMAP_SCAN", "works"),
        Err(error) => Check::missing(
            "PAGEMAP_SCAN",
            error.to_string(),
            "dirty pages are counted with it: Linux 6.7 has it",
        ),
    }
}

fn page_cache_figures() -> Check {
    let tried = std::fs::File::open("/proc/self/exe")
        .map_err(|e| crate::error::Error::io("cannot open", "/proc/self/exe", e))
        .and_then(|file| cachestat::cached(&file));
    match tried {
        Ok(_) => Check::ok("cachestat", "works"),
        Err(error) => Check::missing(
            "cachestat",
            error.to_string(),
            "resident pages are counted with it: Linux 6.5 has it",
        ),
    }
}

fn device(name: &'static str, path: &str, remedy: &str) -> Check {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_char_device() => Check::ok(name, path),
        Ok(_) => Check::missing(name, format!("{path} is no device"), remedy),
        Err(error) => Check::missing(name, format!("{path}: {}", crate::error::errno_text(&error)), remedy),
    }
}

/// Whether the kernel was built with FUSE passthrough. Only a mount can ask the running kernel; its
/// configuration is the next best, and a living mount says what it got in `stencil status`.
fn passthrough() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let config = std::fs::read(format!("/boot/config-{release}")).ok();
    match config.map(|text| String::from_utf8_lossy(&text).contains("CONFIG_FUSE_PASSTHROUGH=y")) {
        Some(true) => Check::ok("passthrough", "the kernel has it"),
        Some(false) => Check::note(
            "passthrough",
            "this kernel is built without CONFIG_FUSE_PASSTHROUGH",
            "templates are served by decoding; a kernel with it maps them faster",
        ),
        None => Check::ok("passthrough", "the kernel's configuration is not at hand; the first mount tells"),
    }
}

fn privileges() -> Check {
    if probe::has_sys_admin() {
        Check::ok("privileges", "CAP_SYS_ADMIN")
    } else {
        Check::note(
            "privileges",
            "no CAP_SYS_ADMIN",
            "the store commands work; run mount, clone and density as root",
        )
    }
}

/// Processes that may not be looked into here: any of them may be a clone.
fn closed_processes() -> Check {
    const NAME: &str = "processes";
    let look = |pid| procfs::maps(pid, |_, _| false).map(|_| None::<()>).map_err(io::Error::other);
    match users::look_at_all(PATIENCE, look) {
        Err(error) => return Check::missing(NAME, error.to_string(), "mount /proc"),
        Ok(all) => {
            if let Some(holes) = all.unseen.describe("be clones") {
                return Check::note(NAME, holes, all.unseen.remedy());
            }
        }
    }
    let looks = users::look_at_each(vec![1], PATIENCE, move |pid| look(pid).is_err().then_some(()));
    match looks.seen.is_empty() {
        true => Check::ok(NAME, "all can be looked into"),
        false => Check::note(
            NAME,
            format!("no right to look into {}", users::list_pids(&[1])),
            "process 1 counts as none of the clones; all other processes can be looked into",
        ),
    }
}

/// What the sandbox of a server is made of.
fn isolation() -> Check {
    let mut lacks = Vec::new();
    match probe::landlock_version() {
        Some(version) if version >= probe::LANDLOCK_NEEDED => {}
        Some(version) => lacks.push(format!(
            "the kernel's Landlock has version {version}, and knows not all that version {} forbids",
            probe::LANDLOCK_NEEDED
        )),
        None => lacks.push("the kernel has no Landlock, or it is not switched on".to_owned()),
    }
    if !probe::has_seccomp_filters() {
        lacks.push("the kernel has no seccomp filters".to_owned());
    }
    if lacks.is_empty() {
        return Check::ok("isolation", "servers can be confined by Landlock and seccomp");
    }
    Check::note(
        "isolation",
        lacks.join("; "),
        "servers run, with fewer walls around them: docs/explanation/security.md; boot a newer kernel, with lsm=landlock,…",
    )
}

fn kvm() -> Check {
    match device("kvm", "/dev/kvm", "") {
        check if check.verdict == Verdict::Ok => check,
        check => Check::note("kvm", check.found, "guests run under emulation; load kvm_intel or kvm_amd"),
    }
}

/// The first line of what a program of the PATH says of its version; none where there is no such program.
fn version(program: &str) -> io::Result<Option<String>> {
    let asked = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    match asked {
        Ok(answer) if !answer.status.success() => {
            let said = String::from_utf8_lossy(&answer.stderr);
            Err(io::Error::other(format!("{}: {}", answer.status, said.trim())))
        }
        Ok(answer) => {
            let text = String::from_utf8_lossy(&answer.stdout);
            Ok(Some(text.lines().next().unwrap_or_default().to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first QEMU that has `rom=off`.
const QEMU_NEEDED: (u32, u32) = (8, 2);

/// A note at most: other VMMs, and QEMUs out of the PATH, do without it.
fn qemu(version: io::Result<Option<String>>) -> Check {
    let remedy = "guests of QEMU want 8.2 or later (Debian 12: qemu-system-x86 from bookworm-backports); other VMMs do not";
    let said = match version {
        Ok(Some(said)) => said,
        Ok(None) => return Check::note("qemu", "no qemu-system-x86_64 in PATH", remedy),
        Err(error) => return Check::note("qemu", format!("cannot run qemu-system-x86_64: {error}"), remedy),
    };
    let release = said.split_once("version ").and_then(|(_, rest)| {
        let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    });
    match release {
        Some(release) if release >= QEMU_NEEDED => Check::ok("qemu", said),
        Some(_) => {
            Check::note("qemu", format!("{said}: it has no rom=off, so templates are ROM only"), remedy)
        }
        None => Check::note("qemu", format!("its version is not understood: '{said}'"), remedy),
    }
}

fn qemu_img(version: io::Result<Option<String>>) -> Check {
    let remedy = "capture and clones of VMs with disks run it (Debian: qemu-utils)";
    match version {
        Ok(Some(said)) => Check::ok("qemu-img", said),
        Ok(None) => Check::note("qemu-img", "not in PATH", remedy),
        Err(error) => Check::note("qemu-img", format!("cannot run it: {error}"), remedy),
    }
}

fn huge_pages() -> Check {
    let Some(text) = probe::setting("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return Check::note(
            "huge pages",
            "this kernel has no transparent huge pages",
            "templates are mapped by 4 KiB entries: more page tables and faults",
        );
    };
    match probe::chosen(&text).unwrap_or("unknown") {
        "never" => Check::note(
            "huge pages",
            "never",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled lets backings be mapped by 2 MiB entries",
        ),
        "always" => Check::note(
            "huge pages",
            "always",
            "a clone that writes one page of zeroed memory outside templates may get 2 MiB: madvise wastes less",
        ),
        word => Check::ok("huge pages", word),
    }
}

fn ksm() -> Check {
    match probe::number("/sys/kernel/mm/ksm/run") {
        Some(1) => Check::note(
            "ksm",
            "running",
            "merged copies are counted once, but each clone still shows them; the scanner costs CPU",
        ),
        Some(_) => Check::ok("ksm", "off; template pages need none"),
        None => Check::ok("ksm", "not in this kernel; template pages need none"),
    }
}

fn swap() -> Check {
    match procfs::meminfo("SwapTotal") {
        Ok(Some(total)) if total > Bytes::ZERO => {
            Check::ok("swap", format!("{total}; copies in swap are shown as swap_bytes"))
        }
        Ok(_) => Check::ok("swap", "none"),
        Err(error) => Check::note("swap", error.to_string(), "mount /proc"),
    }
}

fn overcommit() -> Check {
    match probe::number("/proc/sys/vm/overcommit_memory") {
        Some(2) => Check::note(
            "overcommit",
            "strict (vm.overcommit_memory=2)",
            "every clone is charged the whole size of its RAM: use reserve=off, or set vm.overcommit_memory to 0 or 1",
        ),
        Some(mode) => Check::ok("overcommit", format!("vm.overcommit_memory={mode}")),
        None => Check::note("overcommit", "unknown", "mount /proc"),
    }
}

fn read_size() -> Check {
    match probe::number("/proc/sys/fs/fuse/max_pages_limit") {
        Some(pages) if pages < 256 => Check::note(
            "read size",
            format!("fs.fuse.max_pages_limit={pages}"),
            "sysctl fs.fuse.max_pages_limit=256 lets one request read 1 MiB",
        ),
        Some(pages) => Check::ok("read size", Bytes::new(pages * crate::units::PAGE_SIZE).to_string()),
        None => Check::ok("read size", "1.00 MiB"),
    }
}

fn store(dir: &Path) -> Check {
    match probe::file_system(dir) {
        Ok(fs) if fs.free < Bytes::new(1 << 30) => Check::note(
            "store",
            format!("{} on {}, only {} free", dir.display(), fs.name, fs.free),
            "free space before the next import",
        ),
        Ok(fs) => Check::ok("store", format!("{} on {}, {} free", dir.display(), fs.name, fs.free)),
        Err(_) => {
            Check::ok("store", format!("{} does not exist yet; the first import makes it", dir.display()))
        }
    }
}

fn cache(dir: &Path) -> Check {
    let existing = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match probe::file_system(existing) {
        Ok(fs) if matches!(fs.name.as_str(), "ext4" | "xfs") => {
            Check::ok("backing", format!("{} on {}", existing.display(), fs.name))
        }
        Ok(fs) => Check::note(
            "backing",
            format!("{} on {}", existing.display(), fs.name),
            "passthrough backings are mapped by 2 MiB entries on ext4 or xfs: name one with mount --cache-dir",
        ),
        Err(error) => Check::note("backing", error.to_string(), "name a directory with --cache-dir"),
    }
}

/// FUSE connections whose requests wait without moving.
fn connections(stuck: std::result::Result<&[Stuck], &Error>) -> Vec<Check> {
    match stuck {
        Ok([]) => vec![Check::ok("connections", "none is stuck")],
        Ok(stuck) => stuck.iter().map(|one| Check::note("connections", one.found(), &one.remedy())).collect(),
        Err(error) => vec![Check::note("connections", error.to_string(), "run it as root")],
    }
}

/// Mounts without a living supervisor or server.
fn mounts() -> Vec<Check> {
    let mut checks = Vec::new();
    let listing = control::list().unwrap_or_default();
    for dead in listing.dead {
        let remedy = dead.error().remedy_text().unwrap_or_default().to_owned();
        checks.push(Check::note("mount", dead.error().to_string(), &remedy));
    }
    for living in listing.mounts {
        let place = living.mountpoint.display();
        checks.push(match (living.orphaned, living.server_pid) {
            (true, _) => Check::note(
                "mount",
                format!("{place} has lost its supervisor"),
                &format!("give it another one: stencil mount {place}"),
            ),
            (_, None) => Check::note(
                "mount",
                format!("{place} has no server now"),
                "look at `stencil status` and its log",
            ),
            (_, Some(pid)) => Check::ok("mount", format!("{place} is served by process {pid}")),
        });
    }
    checks
}

impl Report for DoctorReport {
    fn json(&self) -> Value {
        json!({ "checks": to_json(&self.checks), "stuck": to_json(&self.stuck) })
    }

    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        for check in &self.checks {
            let word = match check.verdict {
                Verdict::Ok => "ok",
                Verdict::Note => "note",
                Verdict::Missing => "MISSING",
            };
            writeln!(out, "{word:<8}{:<14}{}", check.name, check.found)?;
            if let Some(remedy) = &check.remedy {
                writeln!(out, "{:<22}{remedy}", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_without_rom_off_is_a_note() {
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
}
