//! Types for units, so that bytes, pages and offsets cannot be mixed by accident.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Size of a base page in bytes. x86-64 has no other base page size.
pub const PAGE_SIZE: u64 = 4096;

/// Size in bytes of a huge page that a PMD entry maps (x86-64).
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

const _: () = assert!(usize::BITS == 64, "x86-64 has 64-bit addresses");

/// Converts a length, offset or index for use in memory.
#[expect(clippy::cast_possible_truncation, reason = "`usize` has 64 bits, as asserted above")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// Returns the nearest floating-point number.
#[expect(clippy::cast_precision_loss, reason = "a relative error of 2^-53 does not show in ratios and texts")]
pub const fn approximate(n: u64) -> f64 {
    n as f64
}

/// Returns the whole part of a number: 0 for a negative number or NaN, and `u64::MAX` for a larger one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "documented")]
pub const fn whole(number: f64) -> u64 {
    number as u64
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(u64);

/// A number of 4 KiB pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageCount(u64);

/// Zero-based index of a page within one file or one mapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageIndex(u64);

/// An offset in a file, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileOffset(u64);

/// An offset in a mapping (guest memory), in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemoryOffset(u64);

macro_rules! unit {
    ($name:ident) => {
        impl $name {
            /// Wraps a bare number.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// Returns the bare number.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// Returns the bare number as `usize`.
            pub const fn as_usize(self) -> usize {
                to_usize(self.0)
            }
        }
    };
}
unit!(Bytes);
unit!(PageCount);
unit!(PageIndex);
unit!(FileOffset);
unit!(MemoryOffset);

impl Bytes {
    /// Zero bytes.
    pub const ZERO: Bytes = Bytes(0);

    /// Returns `self - other`, or zero if `other` is larger.
    pub fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }

    /// Returns the average rate of a transfer, in bytes per second.
    pub fn per_second(self, seconds: f64) -> Bytes {
        Bytes(whole(approximate(self.0) / seconds.max(1e-6)))
    }

    /// Splits the bytes into `count` parts that differ by at most one byte; the larger parts come first.
    pub fn split(self, count: usize) -> impl Iterator<Item = Bytes> {
        let count = count as u64;
        let (each, larger) = (self.0.checked_div(count).unwrap_or(0), self.0.checked_rem(count).unwrap_or(0));
        (0..count).map(move |index| Bytes(each + u64::from(index < larger)))
    }

    /// Returns the number of pages that hold this many bytes, rounded up.
    pub fn pages(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE))
    }

    /// Returns true if the size is a multiple of the base page size.
    pub fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }

    /// Parses a size: decimal digits with an optional unit (`k`, `M`, `G`, `T`, `KiB`, `MB`, … in any case; all are
    /// powers of 1024), a hexadecimal number (`0x…`), or a decimal fraction with a unit (`1.5G`).
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the text is not a size or exceeds 2^64 − 1 bytes.
    pub fn parse(text: &str) -> Result<Bytes> {
        let bad = || {
            Error::usage(format!("invalid size '{text}'"))
                .hint("use a number of bytes, or a number with the unit k, M, G or T, such as 512M")
        };
        if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            return u64::from_str_radix(hex, 16).map(Bytes).map_err(|_| bad());
        }
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(bad()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(1 << shift).map(Bytes).ok_or_else(bad);
        }
        let fraction: f64 = number.parse().map_err(|_| bad())?;
        let bytes = fraction * approximate(1 << shift);
        if shift == 0 || !bytes.is_finite() || bytes >= approximate(u64::MAX) {
            return Err(bad());
        }
        Ok(Bytes(whole(bytes)))
    }
}

impl PageCount {
    /// Zero pages.
    pub const ZERO: PageCount = PageCount(0);

    /// Returns the size of the pages in bytes.
    pub fn bytes(self) -> Bytes {
        Bytes(self.0 * PAGE_SIZE)
    }
}

macro_rules! sums {
    ($name:ident) => {
        impl Add for $name {
            type Output = $name;
            fn add(self, other: $name) -> $name {
                $name(self.0 + other.0)
            }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: $name) {
                self.0 += other.0;
            }
        }
        impl Sum for $name {
            fn sum<I: Iterator<Item = $name>>(iter: I) -> $name {
                iter.fold($name(0), Add::add)
            }
        }
    };
}
sums!(Bytes);
sums!(PageCount);

/// Three significant digits and a binary unit (`1.50 GiB`). Sizes below 1 KiB are exact.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = approximate(self.0) / 1024.0;
        let mut unit = 0;
        while value >= 999.5 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if value < 9.995 {
            2
        } else if value < 99.95 {
            1
        } else {
            0
        };
        f.pad(&format!("{value:.digits$} {}", UNITS[unit]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_saturates_and_rates_are_per_second() {
        assert_eq!([-1.5, f64::NAN, 2.9, 1e30].map(whole), [0, 0, 2, u64::MAX]);
        assert_eq!(Bytes::new(100).per_second(2.0), Bytes::new(50));
        assert_eq!(Bytes::new(100).per_second(0.0), Bytes::new(100_000_000));
    }

    #[test]
    fn parses_sizes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("0x1000", 4096),
            ("4k", 4096),
            ("4KiB", 4096),
            ("512M", 512 << 20),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(Bytes::parse(text).unwrap().get(), bytes, "{text}");
        }
        for text in ["", "M", "1.5", "12Q", "-4k", "99999999999T", "0x"] {
            assert!(Bytes::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn displays_sizes() {
        assert_eq!(Bytes::new(12).to_string(), "12 B");
        assert_eq!(Bytes::new(1536).to_string(), "1.50 KiB");
        assert_eq!(Bytes::new(512 << 20).to_string(), "512 MiB");
        assert_eq!(Bytes::new(1 << 30).to_string(), "1.00 GiB");
    }
}
