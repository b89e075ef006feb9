//! `stencil density` for people: the default view, and subtotals.

mod groups;
mod overview;

use std::collections::BTreeMap;

use serde_json::Value;

use super::accounting::number;

/// The parts of which `host_bytes` is the sum.
pub const PARTS: [&str; 6] = [
    "template_bytes",
    "store_cache_bytes",
    "private_bytes",
    "page_table_bytes",
    "overhead_bytes",
    "disk_bytes",
];

/// Bytes by the name of a part.
pub type Parts = BTreeMap<&'static str, u64>;

/// Returns the sum of these rows in each part.
pub fn sum<'a>(rows: impl IntoIterator<Item = &'a Value>) -> Parts {
    let mut sum: Parts = PARTS.into_iter().map(|part| (part, 0)).collect();
    for row in rows {
        PARTS.into_iter().for_each(|part| *sum.get_mut(part).unwrap() += number(row, part));
    }
    sum
}
