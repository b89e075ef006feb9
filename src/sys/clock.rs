//! A clock that is the same in all processes of a host, for timestamps in shared memory.

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};

/// Returns `CLOCK_MONOTONIC` of the initial time namespace in nanoseconds; never 0. Processes in other time namespaces
/// read the same time, because the offset of their namespace is subtracted (time_namespaces(7)).
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let here = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    u64::try_from(here - offset()).unwrap_or(0).max(1)
}

/// Returns the offset of this time namespace in nanoseconds. The offset is constant while a process is in the
/// namespace, so it is read once. A sandboxed process calls [`monotonic`] before it enters the sandbox.
fn offset() -> i128 {
    static OFFSET: OnceLock<i128> = OnceLock::new();
    // The file does not exist on kernels without time namespaces.
    *OFFSET.get_or_init(|| parse(&std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default()))
}

fn parse(offsets: &str) -> i128 {
    let monotonic = offsets.lines().find_map(|line| line.trim_start().strip_prefix("monotonic"));
    let mut numbers = monotonic.unwrap_or_default().split_ascii_whitespace();
    let mut next = || numbers.next().and_then(|number| number.parse::<i128>().ok()).unwrap_or(0);
    let (seconds, nanoseconds) = (next(), next());
    seconds * 1_000_000_000 + nanoseconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_time_namespace_offsets() {
        assert_eq!(parse("monotonic           0         0\nboottime         1000         0\n"), 0);
        assert_eq!(parse("monotonic  -2 500000000\nboottime 7 0\n"), -1_500_000_000);
        assert_eq!(parse(""), 0);
        let (first, second) = (monotonic(), monotonic());
        assert!(first > 0 && second >= first);
    }
}
