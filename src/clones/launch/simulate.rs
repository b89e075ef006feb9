//! The option `--simulate` and the pages that a simulated clone touches.

use std::str::FromStr;

use crate::clones::counted;
use crate::clones::registry::Touched;
use crate::error::{Error, Result};
use crate::units::{Bytes, PAGE_SIZE, PageCount, approximate, whole};

/// A number of pages, absolute or relative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    /// A share of all pages of the file, in percent.
    Percent(f64),
    /// An absolute number.
    Pages(PageCount),
}

impl Amount {
    /// Returns the number of pages for a file of `all` pages.
    pub fn of(self, all: PageCount) -> PageCount {
        match self {
            Amount::Percent(percent) => {
                PageCount::new(whole((approximate(all.get()) * percent / 100.0).round()))
            }
            Amount::Pages(pages) => pages,
        }
    }
}

impl FromStr for Amount {
    type Err = Error;

    fn from_str(text: &str) -> Result<Amount> {
        let invalid = || {
            Error::usage(format!("invalid amount of pages '{text}'"))
                .hint("write a share (5%), a number of pages (1024p) or a page-aligned size (4M)")
        };
        if let Some(number) = text.strip_suffix('%') {
            let percent: f64 = number.parse().map_err(|_| invalid())?;
            return if (0.0..=100.0).contains(&percent) {
                Ok(Amount::Percent(percent))
            } else {
                Err(invalid())
            };
        }
        if let Some(number) = text.strip_suffix('p') {
            return Ok(Amount::Pages(PageCount::new(number.parse().map_err(|_| invalid())?)));
        }
        let bytes = Bytes::parse(text).map_err(|_| invalid())?;
        if bytes.is_page_aligned() { Ok(Amount::Pages(bytes.pages())) } else { Err(invalid()) }
    }
}

/// The value of `--simulate`: `read=P%,write=P%[,seed=N][,file=NAME][,prefault=written]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulate {
    /// Pages to read but not to write.
    pub read: Amount,
    /// Pages to write.
    pub write: Amount,
    /// Selects the pages, together with the clone's index.
    pub seed: u64,
    /// The memory file to touch; `None` for the first RAM file.
    pub file: Option<String>,
    /// True if the pages that all recordings of the working set have written are copied before the others are touched.
    pub prefault: bool,
}

impl FromStr for Simulate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Simulate> {
        let none = Amount::Pages(PageCount::ZERO);
        let mut simulate = Simulate { read: none, write: none, seed: 0, file: None, prefault: false };
        for word in text.split(',').filter(|w| !w.is_empty()) {
            match word.split_once('=') {
                Some(("read", amount)) => simulate.read = amount.parse()?,
                Some(("write", amount)) => simulate.write = amount.parse()?,
                Some(("seed", seed)) => {
                    simulate.seed = seed.parse().map_err(|_| {
                        Error::usage(format!("invalid seed '{seed}' in --simulate"))
                            .hint("write seed=N with N from 0 to 18446744073709551615")
                    })?;
                }
                Some(("file", name)) => simulate.file = Some(name.to_owned()),
                Some(("prefault", "written")) => simulate.prefault = true,
                _ => {
                    return Err(Error::usage(format!("unknown part '{word}' in --simulate")).hint(
                        "write read=P%,write=P%, optionally with seed=N, file=NAME and prefault=written",
                    ));
                }
            }
        }
        Ok(simulate)
    }
}

/// Formats the value of `--simulate`, which the zygote parses again.
impl std::fmt::Display for Simulate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let amount = |amount| match amount {
            Amount::Percent(percent) => format!("{percent}%"),
            Amount::Pages(pages) => format!("{}p", pages.get()),
        };
        write!(f, "read={},write={},seed={}", amount(self.read), amount(self.write), self.seed)?;
        self.file.iter().try_for_each(|file| write!(f, ",file={file}"))?;
        if self.prefault { write!(f, ",prefault=written") } else { Ok(()) }
    }
}

impl Simulate {
    /// Returns the numbers of pages to touch in a file of `size` bytes.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) if the file has fewer pages.
    pub fn touched(&self, size: Bytes) -> Result<Touched> {
        let all = PageCount::new(size.get() / PAGE_SIZE);
        let (read, written) = (self.read.of(all).get(), self.write.of(all).get());
        if read.checked_add(written).is_none_or(|both| both > all.get()) {
            return Err(Error::usage(format!(
                "--simulate reads {} and writes {} more, but the file has only {}",
                counted(read, "page", "pages"),
                counted(written, "page", "pages"),
                counted(all.get(), "page", "pages")
            ))
            .hint("use smaller amounts, together at most 100%"));
        }
        Ok(Touched { read_pages: read, written_pages: written })
    }

    /// Returns the pages of clone `index` in pseudo-random order, each once: the clone writes the first ones and reads
    /// the next ones.
    pub fn pages(&self, size: Bytes, index: u32) -> Scatter {
        Scatter::new(size.get() / PAGE_SIZE, mix(self.seed ^ mix(u64::from(index).wrapping_add(1))))
    }
}

/// A permutation of `0..count` in constant memory: a Feistel network on the next power of four, with cycle walking.
#[derive(Debug, Clone, Copy)]
pub struct Scatter {
    count: u64,
    half_bits: u32,
    key: u64,
}

impl Scatter {
    /// Creates a permutation of `0..count` from a key.
    pub fn new(count: u64, key: u64) -> Scatter {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        Scatter { count, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// Returns the page at a position of the order; `place` must be less than the count.
    pub fn at(&self, place: u64) -> u64 {
        let mut value = place;
        loop {
            value = self.encrypt(value);
            if value < self.count || place >= self.count {
                return value;
            }
        }
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..4 {
            let f = mix(right ^ self.key.rotate_left(round * 16)) & mask;
            (left, right) = (right, left ^ f);
        }
        (left << self.half_bits) | right
    }
}

/// SplitMix64's finalizer.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn parses_amounts_and_rejects_invalid_ones() {
        let simulate: Simulate = "read=10%,write=1024p,seed=7,file=rom,prefault=written".parse().unwrap();
        assert_eq!(simulate.to_string().parse::<Simulate>().unwrap(), simulate);
        let touched = simulate.touched(Bytes::new(64 << 20)).unwrap();
        assert_eq!(touched, Touched { read_pages: 1638, written_pages: 1024 });
        let four: Simulate = "write=4M".parse().unwrap();
        assert_eq!(four.touched(Bytes::new(64 << 20)).unwrap().written_pages, 1024);
        for invalid in [
            "write=101%",
            "write=-1%",
            "write=5",
            "write=x",
            "frob=1",
            "prefault=all",
            "read",
            "seed=-1",
            "write=nan%",
        ] {
            assert!(invalid.parse::<Simulate>().is_err(), "{invalid}");
        }
        let much: Simulate = "read=60%,write=60%".parse().unwrap();
        assert!(much.touched(Bytes::new(64 << 20)).is_err());
    }

    #[test]
    fn visits_every_page_once() {
        for count in [1u64, 2, 3, 255, 256, 257, 5000] {
            let scatter = Scatter::new(count, 42);
            let seen: BTreeSet<u64> = (0..count).map(|i| scatter.at(i)).collect();
            assert_eq!(seen.len() as u64, count);
            assert_eq!(seen.last(), Some(&(count - 1)));
        }
        let simulate: Simulate = "write=1%".parse().unwrap();
        let size = Bytes::new(64 << 20);
        let first: Vec<u64> = (0..100).map(|i| simulate.pages(size, 0).at(i)).collect();
        let second: Vec<u64> = (0..100).map(|i| simulate.pages(size, 1).at(i)).collect();
        assert_ne!(first, second, "clones touch different pages");
        let steps: BTreeSet<i64> = first.windows(2).map(|w| w[1] as i64 - w[0] as i64).collect();
        assert!(steps.len() > 90, "no pattern");
    }
}
