//! Checks of the running kernel: its version, the features that Stencil uses, and its settings.

use std::process::{Command, Stdio};

use super::check::Check;
use crate::control::Mount;
use crate::sys::memory::cachestat;
use crate::sys::memory::pagemap::{Pagemap, Query};
use crate::sys::probe::{self, KernelRelease};
use crate::sys::process::procfs;
use crate::units::Bytes;

pub fn kernel() -> Check {
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

pub fn pagemap_scan() -> Check {
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

pub fn page_cache_figures() -> Check {
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

/// Checks whether the running kernel supports FUSE passthrough: by its configuration, or by a mount that has a backing
/// registered with the kernel.
pub fn passthrough(mounts: &[Mount]) -> Check {
    const NAME: &str = "passthrough";
    const SETTING: &str = "CONFIG_FUSE_PASSTHROUGH=y";
    match configuration() {
        Some((path, text)) if text.lines().any(|line| line == SETTING) => {
            Check::ok(NAME, format!("{SETTING} in {path}"))
        }
        Some((path, _)) => Check::note(
            NAME,
            format!("no {SETTING} in {path}"),
            "boot a kernel with FUSE passthrough for faster page faults; until then, blocks are decoded",
        ),
        None => match mounts.iter().find(|mount| has_registered_backing(mount)) {
            Some(mount) => Check::ok(NAME, format!("{} serves by passthrough", mount.mountpoint.display())),
            None => Check::unknown(
                NAME,
                "no kernel configuration in /proc/config.gz or /boot, and no mount serves by passthrough",
                "mount a store, open a template, and see 'stencil status'",
            ),
        },
    }
}

fn has_registered_backing(mount: &Mount) -> bool {
    !mount.orphaned && mount.snapshot().is_ok_and(|state| state.backings.iter().any(|row| row.id.is_some()))
}

/// Returns the configuration of the running kernel and its path, `None` if there is none.
fn configuration() -> Option<(String, String)> {
    const OF_THE_KERNEL: &str = "/proc/config.gz";
    let unpacked = Command::new("gzip").args(["-dc", OF_THE_KERNEL]).stderr(Stdio::null()).output();
    let unpacked = unpacked.map(|output| (OF_THE_KERNEL.to_owned(), output.stdout));
    let installed = format!("/boot/config-{}", rustix::system::uname().release().to_string_lossy());
    let installed = std::fs::read(&installed).map(|text| (installed, text));
    let texts = [unpacked, installed].into_iter().flatten();
    let mut texts = texts.map(|(path, text)| (path, String::from_utf8_lossy(&text).into_owned()));
    texts.find(|(_, text)| text.contains("CONFIG_FUSE_FS"))
}

/// Checks the kernel features that confine a server.
pub fn isolation() -> Check {
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
        "boot Linux 6.12 or later with CONFIG_SECCOMP_FILTER, and with landlock in lsm=; until then, servers are less \
         confined (docs/explanation/security.md)",
    )
}

pub fn huge_pages() -> Check {
    let Some(text) = probe::setting("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return Check::note(
            "huge pages",
            "the kernel has no transparent huge pages",
            "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE: 4 KiB mappings take more page tables and page faults",
        );
    };
    match probe::chosen(&text).unwrap_or_default() {
        "" => {
            Check::unknown("huge pages", format!("cannot parse '{text}'"), "see transparent_hugepage in /sys")
        }
        "never" => Check::note(
            "huge pages",
            "never",
            "map backings by 2 MiB entries: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        "always" => Check::note(
            "huge pages",
            "always",
            "set madvise: otherwise a clone that writes one page of new memory outside its template mappings \
             may take 2 MiB",
        ),
        word => Check::ok("huge pages", word),
    }
}

pub fn ksm() -> Check {
    match probe::number("/sys/kernel/mm/ksm/run") {
        Some(1) => Check::note(
            "ksm",
            "running",
            "stop KSM if only clones use it, because it takes CPU time; a merged page counts once in the \
             totals, and once for each clone in the figures of clones",
        ),
        Some(_) => Check::ok("ksm", "off; template pages are shared without KSM"),
        None => Check::ok("ksm", "not in this kernel; template pages are shared without KSM"),
    }
}

pub fn swap() -> Check {
    match procfs::meminfo("SwapTotal") {
        Ok(Some(total)) if total > Bytes::ZERO => {
            Check::ok("swap", format!("{total}; copied pages in swap are reported as swap_bytes"))
        }
        Ok(_) => Check::ok("swap", "none"),
        Err(error) => Check::unknown("swap", error.to_string(), "mount /proc"),
    }
}

pub fn overcommit() -> Check {
    match probe::number("/proc/sys/vm/overcommit_memory") {
        Some(2) => Check::note(
            "overcommit",
            "strict (vm.overcommit_memory=2)",
            "set vm.overcommit_memory to 0 or 1: this mode charges each clone the size of its RAM, also with reserve=off",
        ),
        Some(mode) => Check::ok("overcommit", format!("vm.overcommit_memory={mode}")),
        None => Check::unknown("overcommit", "cannot read vm.overcommit_memory", "mount /proc"),
    }
}

pub fn read_size() -> Check {
    match probe::number("/proc/sys/fs/fuse/max_pages_limit") {
        Some(pages) if pages < 256 => Check::note(
            "read size",
            format!("fs.fuse.max_pages_limit={pages}"),
            "run sysctl fs.fuse.max_pages_limit=256 before mounting: requests of later mounts read 1 MiB",
        ),
        Some(pages) => Check::ok("read size", Bytes::new(pages * crate::units::PAGE_SIZE).to_string()),
        None => Check::ok("read size", "1.00 MiB"),
    }
}
