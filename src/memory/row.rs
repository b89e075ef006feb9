//! The truth table of `share`, `readonly` and `rom`.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::sys::memory::mapping::{Protection, Sharing};

use super::options::OnOffAuto;

/// Open mode of the backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// `O_RDONLY`; the file must exist.
    ReadOnly,
    /// `O_RDWR`; a missing file is created.
    ReadWrite,
}

/// Kind of memory from the point of view of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Writable memory; writes go to the file (`share=on`) or to private copies.
    Ram,
    /// Read-only memory.
    Rom,
    /// Writable memory on a read-only file: a write copies its page, and the file is shared by all clones.
    Template,
}

/// One row of the truth table for `share`, `readonly` and `rom` in QEMU's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Depends on `readonly`.
    pub open: OpenMode,
    /// Depends on `rom`.
    pub protection: Protection,
    /// Depends on `share`.
    pub sharing: Sharing,
    /// Kind of memory from the point of view of the guest.
    pub role: Role,
}

/// Returns the row of a combination.
///
/// # Errors
/// Returns QEMU's error for the four combinations that QEMU rejects.
pub fn row(share: bool, readonly: bool, rom: OnOffAuto) -> Result<Row> {
    let rom = match (rom, readonly) {
        (OnOffAuto::Auto, readonly) => readonly,
        (OnOffAuto::On, true) => true,
        (OnOffAuto::Off, _) => false,
        (OnOffAuto::On, false) => {
            return Err(Error::usage("property 'rom' = 'on' is not supported with 'readonly' = 'off'")
                .hint("add readonly=on"));
        }
    };
    if readonly && share && !rom {
        return Err(Error::usage(
            "property 'rom' = 'off' is incompatible with 'readonly' = 'on' and 'share' = 'on'",
        )
        .hint("use share=off: writes are then copied, and the file stays shared by all clones"));
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

    /// Checks all combinations against the meaning of each property, independently of `row`.
    #[test]
    fn all_combinations_follow_the_properties() {
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
