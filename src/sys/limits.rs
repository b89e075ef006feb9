//! Limits of the host on processes and their memory. Parsers take text, so that unit tests can pass strings.

use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::process::procfs;
use crate::units::Bytes;

/// Reads a number below `/proc/sys`; `name` is as sysctl(8) takes it.
///
/// # Errors
/// Returns an error if the file cannot be read or contains another text.
pub fn sysctl(name: &str) -> Result<u64> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    let text = procfs::read_text(Path::new(&path))?;
    text.trim().parse().map_err(|_| Error::failed("expected a number").at(path))
}

/// Returns the number of tasks (processes and their threads) of the host.
///
/// # Errors
/// Returns an error if `/proc/loadavg` cannot be read.
pub fn tasks() -> Result<u64> {
    let path = Path::new("/proc/loadavg");
    parse_tasks(&procfs::read_text(path)?).ok_or_else(|| Error::failed("cannot parse").at(path))
}

fn parse_tasks(loadavg: &str) -> Option<u64> {
    loadavg.split_ascii_whitespace().nth(3)?.split_once('/')?.1.parse().ok()
}

/// Memory that processes may still reserve while the kernel checks reservations (`vm.overcommit_memory` = 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reservable {
    /// For a process of an administrator.
    pub by_root: Bytes,
    /// For any other process, as far as the kernel keeps a reserve for administrators and for other processes of a user.
    pub by_others: Bytes,
}

/// Returns what can still be reserved, or `None` if the kernel does not check reservations.
///
/// # Errors
/// Returns an error if a figure cannot be read.
pub fn reservable() -> Result<Option<Reservable>> {
    if sysctl("vm.overcommit_memory")? != 2 {
        return Ok(None);
    }
    let figure = |key: &str| {
        let found = procfs::meminfo(key)?;
        found.ok_or_else(|| Error::failed(format!("missing {key} in /proc/meminfo")))
    };
    let by_root = figure("CommitLimit")?.saturating_sub(figure("Committed_AS")?);
    let mut by_others = by_root;
    for name in ["vm.admin_reserve_kbytes", "vm.user_reserve_kbytes"] {
        by_others = by_others.saturating_sub(Bytes::new(sysctl(name)?.saturating_mul(1024)));
    }
    Ok(Some(Reservable { by_root, by_others }))
}

/// Returns the memory that a process has reserved, or `None` if the process has exited.
///
/// # Errors
/// Returns an error if `/proc/PID/smaps` cannot be read.
pub fn reserved(pid: u32) -> Result<Option<Bytes>> {
    Ok(procfs::read_of(pid, "smaps")?.map(|text| parse_reserved(&text)))
}

/// Sums the sizes of the mappings with the flag `ac` (`VM_ACCOUNT`) in the text of a `smaps` file.
fn parse_reserved(smaps: &str) -> Bytes {
    let (mut sum, mut size) = (0u64, 0u64);
    for line in smaps.lines() {
        if let Some(text) = line.strip_prefix("Size:") {
            size = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_ascii_whitespace().any(|flag| flag == "ac")
        {
            sum = sum.saturating_add(size);
        }
    }
    Bytes::new(sum.saturating_mul(1024))
}

/// Returns the largest number of tasks of the user of a process (`RLIMIT_NPROC`), or `None` without a limit or if the
/// process has exited.
///
/// # Errors
/// Returns an error if `/proc/PID/limits` cannot be read or parsed.
pub fn tasks_of_user(pid: u32) -> Result<Option<u64>> {
    let Some(text) = procfs::read_of(pid, "limits")? else { return Ok(None) };
    let failed = || Error::failed("cannot parse the limits of a process").at(format!("/proc/{pid}/limits"));
    parse_max_processes(&text).ok_or_else(failed)
}

/// Parses the soft limit of the line `Max processes`.
fn parse_max_processes(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max processes"))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_limits_of_this_host() {
        assert!(sysctl("kernel.pid_max").unwrap() > 100);
        assert!(sysctl("vm.max_map_count").unwrap() > 100);
        assert!(sysctl("kernel.hostname.missing").is_err());
        assert!(tasks().unwrap() > 1);
        assert!(reserved(std::process::id()).unwrap().unwrap() > Bytes::ZERO);
        assert_eq!(reserved(u32::MAX >> 1).unwrap(), None);
        assert!(tasks_of_user(std::process::id()).is_ok());
    }

    #[test]
    fn counts_tasks() {
        assert_eq!(parse_tasks("0.00 0.01 0.05 2/1234 5678\n"), Some(1234));
        for text in ["", "0 0 0", "0 0 0 12 5", "0 0 0 1/ 5", "0 0 0 1/x 5", "0 0 0 1/-3 5"] {
            assert_eq!(parse_tasks(text), None, "{text}");
        }
    }

    #[test]
    fn sums_accounted_mappings_only() {
        let text = "\
7f00-7f01 rw-p 00000000 00:2f 12 /mnt/memory
Size:            1024 kB
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me ac 
7f02-7f03 r--p 00000000 00:2f 12 /mnt/memory
Size:            2048 kB
VmFlags: rd mr mw me acx 
Size:    12 kB
VmFlags: ac
";
        assert_eq!(parse_reserved(text), Bytes::new(1036 << 10));
        for hostile in ["", "Size:\nVmFlags: ac", "VmFlags: ac", "Size: x kB\nVmFlags: ac"] {
            assert_eq!(parse_reserved(hostile), Bytes::ZERO, "{hostile}");
        }
        let huge = "Size: 18446744073709551615 kB\nVmFlags: ac\n".repeat(2);
        assert_eq!(parse_reserved(&huge), Bytes::new(u64::MAX));
    }

    #[test]
    fn parses_the_limit_of_processes() {
        let limits = |value: &str| {
            format!("Limit   Soft Limit  Hard Limit  Units\nMax processes   {value}   96254   processes\n")
        };
        assert_eq!(parse_max_processes(&limits("1234")), Some(Some(1234)));
        assert_eq!(parse_max_processes(&limits("unlimited")), Some(None));
        for hostile in ["".to_owned(), "Max processes".to_owned(), limits("-1"), limits("1k")] {
            assert_eq!(parse_max_processes(&hostile), None, "{hostile}");
        }
    }
}
