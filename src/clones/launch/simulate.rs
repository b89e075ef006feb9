//! What a simulated clone is told to touch: the words of `--simulate`, and which pages that are.

use std::str::FromStr;

use crate::clones::registry::Touched;
use crate::error::{Error, Result};
use crate::units::{Bytes, PAGE_SIZE, PageCount};

/// An amount of pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    /// A share of all pages of the file, in percent.
    Percent(f64),
    /// So many.
    Pages(PageCount),
}

impl Amount {
    /// In pages of a file that has so many.
    pub fn of(self, all: PageCount) -> PageCount {
        match self {
            Amount::Percent(percent) => PageCount::new((all.get() as f64 * percent / 100.0).round() as u64),
            Amount::Pages(pages) => pages,
        }
    }
}

impl FromStr for Amount {
    type Err = Error;

    fn from_str(text: &str) -> Result<Amount> {
        let bad = || {
            Error::usage(format!("'{text}' is no amount of pages"))
                .remedy("write a share like 5%, pages like 1024p, or bytes like 4M")
        };
        if let Some(number) = text.strip_suffix('%') {
            let percent: f64 = number.parse().map_err(|_| bad())?;
            return if (0.0..=100.0).contains(&percent) { Ok(Amount::Percent(percent)) } else { Err(bad()) };
        }
        if let Some(number) = text.strip_suffix('p') {
            return Ok(Amount::Pages(PageCount::new(number.parse().map_err(|_| bad())?)));
        }
        let bytes = Bytes::parse(text).map_err(|_| bad())?;
        if bytes.is_page_aligned() { Ok(Amount::Pages(bytes.pages())) } else { Err(bad()) }
    }
}

/// The words of `--simulate`: `read=P%,write=P%[,seed=N][,file=NAME]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulate {
    /// Pages that are read and not written.
    pub read: Amount,
    /// Pages that are written.
    pub write: Amount,
    /// With the clone's number it decides which pages.
    pub seed: u64,
    /// The file whose pages are touched; none: the first RAM file.
    pub file: Option<String>,
}

impl FromStr for Simulate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Simulate> {
        let none = Amount::Pages(PageCount::ZERO);
        let mut simulate = Simulate { read: none, write: none, seed: 0, file: None };
        for word in text.split(',').filter(|w| !w.is_empty()) {
            match word.split_once('=') {
                Some(("read", amount)) => simulate.read = amount.parse()?,
                Some(("write", amount)) => simulate.write = amount.parse()?,
                Some(("seed", seed)) => {
                    simulate.seed = seed.parse().map_err(|_| {
                        Error::usage(format!("seed '{seed}' is no number"))
                            .remedy("write seed=N with N from 0 to 18446744073709551615")
                    })?;
                }
                Some(("file", name)) => simulate.file = Some(name.to_owned()),
                _ => {
                    return Err(Error::usage(format!("--simulate does not know '{word}'"))
                        .remedy("write read=P%,write=P% and, if you like, seed=N and file=NAME"));
                }
            }
        }
        Ok(simulate)
    }
}

/// Reads as it was written: the zygote gets it so.
impl std::fmt::Display for Simulate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let amount = |amount| match amount {
            Amount::Percent(percent) => format!("{percent}%"),
            Amount::Pages(pages) => format!("{}p", pages.get()),
        };
        write!(f, "read={},write={},seed={}", amount(self.read), amount(self.write), self.seed)?;
        self.file.iter().try_for_each(|file| write!(f, ",file={file}"))
    }
}

impl Simulate {
    /// How many pages of a file of that size are touched.
    ///
    /// # Errors
    /// A usage error when the file does not have so many.
    pub fn touched(&self, size: Bytes) -> Result<Touched> {
        let all = PageCount::new(size.get() / PAGE_SIZE);
        let (read, written) = (self.read.of(all).get(), self.write.of(all).get());
        if read.checked_add(written).is_none_or(|both| both > all.get()) {
            return Err(Error::usage(format!(
                "--simulate reads {read} and writes {written} other pages, but the file has {} in all",
                all.get()
            ))
            .remedy("write smaller shares: together at most 100%"));
        }
        Ok(Touched { read_pages: read, written_pages: written })
    }

    /// The pages of clone `index`, each once, in an order without pattern: the first ones are written,
    /// those after them read.
    pub fn pages(&self, size: Bytes, index: u32) -> Scatter {
        Scatter::new(size.get() / PAGE_SIZE, mix(self.seed ^ mix(u64::from(index).wrapping_add(1))))
    }
}

/// A permutation of `0..count` that needs no memory: a Feistel network on the next even power of two,
/// walked on until the value falls into the range.
#[derive(Debug, Clone, Copy)]
pub struct Scatter {
    count: u64,
    half_bits: u32,
    key: u64,
}

impl Scatter {
    /// Permutes `0..count` by a key.
    pub fn new(count: u64, key: u64) -> Scatter {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        Scatter { count, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// The page at that place of the order; `place` is below the count.
    pub fn at(&self, place: u64) -> u64 {
        let mut value = place;
        loop {
            value = self.round_trip(value);
            if value < self.count || place >= self.count {
                return value;
            }
        }
    }

    fn round_trip(&self, value: u64) -> u64 {
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
    fn words_and_amounts() {
        let simulate: Simulate = "read=10%,write=1024p,seed=7,file=rom".parse().unwrap();
        assert_eq!(simulate.to_string().parse::<Simulate>().unwrap(), simulate);
        let touched = simulate.touched(Bytes::new(64 << 20)).unwrap();
        assert_eq!(touched, Touched { read_pages: 1638, written_pages: 1024 });
        let four: Simulate = "write=4M".parse().unwrap();
        assert_eq!(four.touched(Bytes::new(64 << 20)).unwrap().written_pages, 1024);
        for bad in
            ["write=101%", "write=-1%", "write=5", "write=x", "frob=1", "read", "seed=-1", "write=nan%"]
        {
            assert!(bad.parse::<Simulate>().is_err(), "{bad}");
        }
        let much: Simulate = "read=60%,write=60%".parse().unwrap();
        assert!(much.touched(Bytes::new(64 << 20)).is_err());
    }

    #[test]
    fn every_page_comes_once() {
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
        assert_ne!(first, second, "clones touch pages of their own");
        let steps: BTreeSet<i64> = first.windows(2).map(|w| w[1] as i64 - w[0] as i64).collect();
        assert!(steps.len() > 90, "no pattern");
    }
}
