//! A clock that all processes of a host share, for times in memory that several of them read.

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC` as the initial time namespace has it; never 0. A process of another time namespace
/// reads the same time: its own offset is taken off (time_namespaces(7)).
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let here = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    u64::try_from(here - offset()).unwrap_or(0).max(1)
}

/// What this time namespace adds to the clock. It cannot change while a process is in the namespace, and is read once: a
/// process in a sandbox calls [`monotonic`] before it enters.
fn offset() -> i128 {
    static OFFSET: OnceLock<i128> = OnceLock::new();
    // A kernel without time namespaces has no such file.
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
    fn the_offset_of_a_namespace() {
        assert_eq!(parse("monotonic           0         0\nboottime         1000         0\n"), 0);
        assert_eq!(parse("monotonic  -2 500000000\nboottime 7 0\n"), -1_500_000_000);
        assert_eq!(parse(""), 0);
        let (first, second) = (monotonic(), monotonic());
        assert!(first > 0 && second >= first);
    }
}
