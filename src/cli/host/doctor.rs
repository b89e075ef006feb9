//! `stencil doctor`: checks what the host supports, and what reduces sharing or speed.

use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::mount::stuck::{self, Stuck};
use crate::cli::output::{Done, Report, to_json};
use crate::control;
use crate::error::{Code, Error, Result};
use crate::sys::memory::cachestat;
use crate::sys::memory::pagemap::{Pagemap, Query};
use crate::sys::probe::{self, KernelRelease};
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

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// The feature works, at a cost that the check names.
    Note,
    /// A requirement of Stencil is not met.
    Missing,
}

/// One check of the host.
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

/// Checks the host. The command exits with 1 if a requirement is not met.
///
/// # Errors
/// Same as [`stuck::fix`] with `--fix-stuck`. Otherwise none: a check that cannot be made is a finding.
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
            format!("{name}, {} or later is required", KernelRelease::OLDEST),
            "boot Linux 6.9 or later: on Debian 12, linux-image-amd64 from bookworm-backports",
        ),
        Err(error) => Check::missing("kernel", error.to_string(), "run this command on Linux"),
    }
}

fn pagemap_scan() -> Check {
    let tried = Pagemap::this_process().and_then(|map| map.scan(0..0x1_0000, &Query::default()));
    match tried {
        Ok(_) => Check::ok("PAGEMAP_SCAN", "works"),
        Err(error) => Check::missing(
            "PAGEMAP_SCAN",
            error.to_string(),
            "boot Linux 6.7 or later: PAGEMAP_SCAN counts dirty pages",
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
            "boot Linux 6.5 or later: cachestat(2) counts resident pages",
        ),
    }
}

fn device(name: &'static str, path: &str, remedy: &str) -> Check {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_char_device() => Check::ok(name, path),
        Ok(_) => Check::missing(name, format!("{path} is not a character device"), remedy),
        Err(error) => Check::missing(name, format!("{path}: {}", crate::error::errno_text(&error)), remedy),
    }
}

/// Checks whether the kernel was built with FUSE passthrough. Only a mount can test the running kernel, so this check
/// reads the kernel's configuration; `stencil status` reports the result for each mount.
fn passthrough() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let config = std::fs::read(format!("/boot/config-{release}")).ok();
    match config.map(|text| String::from_utf8_lossy(&text).contains("CONFIG_FUSE_PASSTHROUGH=y")) {
        Some(true) => Check::ok("passthrough", "supported by the kernel"),
        Some(false) => Check::note(
            "passthrough",
            "the kernel was built without CONFIG_FUSE_PASSTHROUGH",
            "boot a kernel with FUSE passthrough for faster page faults; until then, blocks are decoded",
        ),
        None => Check::ok("passthrough", "unknown until the first mount: no kernel configuration in /boot"),
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
        false => Check::note(
            NAME,
            format!("no permission to inspect {}", holders::list_pids(&[1])),
            "none needed: process 1 is assumed not to be a clone, and all others can be inspected",
        ),
    }
}

/// Checks the kernel features that confine a server.
fn isolation() -> Check {
    let mut lacks = Vec::new();
    match probe::landlock_version() {
        Some(version) if version >= probe::MIN_LANDLOCK_VERSION => {}
        Some(version) => lacks.push(format!(
            "the kernel supports version {version} of Landlock, which lacks restrictions of version {}",
            probe::MIN_LANDLOCK_VERSION
        )),
        None => lacks.push("the kernel has no Landlock, or Landlock is disabled".to_owned()),
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
        "boot a newer kernel with lsm=landlock,…; until then, servers are less confined (docs/explanation/security.md)",
    )
}

fn kvm() -> Check {
    match device("kvm", "/dev/kvm", "") {
        check if check.verdict == Verdict::Ok => check,
        check => {
            Check::note("kvm", check.found, "load kvm_intel or kvm_amd; until then, guests are emulated")
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

fn huge_pages() -> Check {
    let Some(text) = probe::setting("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return Check::note(
            "huge pages",
            "the kernel has no transparent huge pages",
            "templates are mapped by 4 KiB entries: more page tables and page faults",
        );
    };
    match probe::chosen(&text).unwrap_or("unknown") {
        "never" => Check::note(
            "huge pages",
            "never",
            "let backings be mapped by 2 MiB entries: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        "always" => Check::note(
            "huge pages",
            "always",
            "set madvise: a clone that writes one page of zeroed memory outside templates may take 2 MiB",
        ),
        word => Check::ok("huge pages", word),
    }
}

fn ksm() -> Check {
    match probe::number("/sys/kernel/mm/ksm/run") {
        Some(1) => Check::note(
            "ksm",
            "running",
            "merged copies are counted once, but each clone still reports them; the scanner takes CPU time",
        ),
        Some(_) => Check::ok("ksm", "off; template pages are shared without KSM"),
        None => Check::ok("ksm", "not in this kernel; template pages are shared without KSM"),
    }
}

fn swap() -> Check {
    match procfs::meminfo("SwapTotal") {
        Ok(Some(total)) if total > Bytes::ZERO => {
            Check::ok("swap", format!("{total}; copied pages in swap are reported as swap_bytes"))
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
            "use reserve=off, or set vm.overcommit_memory to 0 or 1: each clone is charged the size of its RAM",
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
            "run sysctl fs.fuse.max_pages_limit=256, so that one request reads 1 MiB",
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
            Check::ok("store", format!("{} does not exist; the first import creates it", dir.display()))
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
            "name a directory on ext4 or xfs with mount --cache-dir: backings are then mapped by 2 MiB entries",
        ),
        Err(error) => Check::note("backing", error.to_string(), "name a directory with --cache-dir"),
    }
}

/// Checks for FUSE connections whose requests make no progress.
fn connections(stuck: std::result::Result<&[Stuck], &Error>) -> Vec<Check> {
    match stuck {
        Ok([]) => vec![Check::ok("connections", "none is stuck")],
        Ok(stuck) => stuck.iter().map(|one| Check::note("connections", one.found(), &one.remedy())).collect(),
        Err(error) => vec![Check::note("connections", error.to_string(), "run the command as root")],
    }
}

/// Checks for mounts without a living supervisor or server.
fn mounts() -> Vec<Check> {
    let mut checks = Vec::new();
    let listing = control::list().unwrap_or_default();
    for dead in listing.dead {
        let remedy = dead.error().hint_text().unwrap_or_default().to_owned();
        checks.push(Check::note("mount", dead.error().to_string(), &remedy));
    }
    for living in listing.mounts {
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
}
