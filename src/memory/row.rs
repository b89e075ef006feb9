//! The truth table of `share`, `readonly` and `rom`.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::sys::mapping::{Protection, Sharing};

use super::options::OnOffAuto;

/// How the file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// `O_RDONLY`; the file must exist.
    ReadOnly,
    /// `O_RDWR`; a missing file is made.
    ReadWrite,
}

/// What the guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Writable; a write goes to the file (`share=on`) or to a copy.
    Ram,
    /// Not writable.
    Rom,
    /// Writable memory from a read-only file: every write copies its page, the file is shared by all.
    Template,
}

/// One row of the truth table that QEMU's documentation gives for `share`, `readonly` and `rom`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Follows `readonly`.
    pub open: OpenMode,
    /// Follows `rom`.
    pub protection: Protection,
    /// Follows `share`.
    pub sharing: Sharing,
    /// What the guest gets.
    pub role: Role,
}

/// The row of a combination.
///
/// # Errors
/// QEMU's words for the four combinations that it refuses.
pub fn row(share: bool, readonly: bool, rom: OnOffAuto) -> Result<Row> {
    let rom = match (rom, readonly) {
        (OnOffAuto::Auto, readonly) => readonly,
        (OnOffAuto::On, true) => true,
        (OnOffAuto::Off, _) => false,
        (OnOffAuto::On, false) => {
            return Err(Error::usage("property 'rom' = 'on' is not supported with 'readonly' = 'off'")
                .remedy("add readonly=on"));
        }
    };
    if readonly && share && !rom {
        return Err(Error::usage(
            "property 'rom' = 'off' is incompatible with 'readonly' = 'on' and 'share' = 'on'",
        )
        .remedy("use share=off: every write is then copied, and the file stays shared by all"));
    }
    Ok(Row {
        open: if readonly { OpenMode::ReadOnly } else { OpenMode::ReadWrite },
        protection: if rom { Protection::Read } else { Protection::ReadWrite },
        sharing: if share { Sharing::Shared } else { Sharing::Private },
        role: match (rom, readonly) {
            (true, _) => Role::Rom,
            (false, true) => Role::Template,
            (false, false) => Role::Ram,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Independent of `row`: what the three properties mean, each by itself.
    #[test]
    fn every_combination_follows_the_three_rules() {
        for share in [false, true] {
            for readonly in [false, true] {
                for rom in [OnOffAuto::Auto, OnOffAuto::On, OnOffAuto::Off] {
                    let is_rom = match rom {
                        OnOffAuto::Auto => readonly,
                        OnOffAuto::On => true,
                        OnOffAuto::Off => false,
                    };
                    let got = row(share, readonly, rom);
                    let name = format!("share={share} readonly={readonly} rom={rom:?}");
                    if is_rom && !readonly {
                        let words = "property 'rom' = 'on' is not supported with 'readonly' = 'off'";
                        assert_eq!(got.unwrap_err().message(), words, "{name}");
                        continue;
                    }
                    if !is_rom && readonly && share {
                        let words = "property 'rom' = 'off' is incompatible with 'readonly' = 'on' and 'share' = 'on'";
                        assert_eq!(got.unwrap_err().message(), words, "{name}");
                        continue;
                    }
                    let got = got.unwrap();
                    assert_eq!(got.open == OpenMode::ReadOnly, readonly, "{name}");
                    assert_eq!(got.protection == Protection::Read, is_rom, "{name}");
                    assert_eq!(got.sharing == Sharing::Shared, share, "{name}");
                    assert_eq!(got.role == Role::Template, readonly && !is_rom, "{name}");
                    assert_eq!(got.role == Role::Rom, is_rom, "{name}");
                }
            }
        }
    }
}
