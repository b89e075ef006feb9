//! Parsers for permissions: octal modes, users and groups.

use std::fs;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::store::Policy;

/// Permission bits that files of a template may have.
pub(in crate::store) const READ_BITS: u32 = 0o444;

/// Parses an octal mode. Only read bits are allowed, because templates are read-only.
///
/// # Errors
/// Returns a usage error if the text is not an octal mode or if other bits are set.
pub fn parse_mode(text: &str) -> Result<u32> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode & !READ_BITS == 0 && text.len() <= 5 => Ok(mode),
        _ => Err(Error::usage(format!("invalid mode '{text}': only read bits are allowed"))
            .remedy("use an octal mode: 0444 for all users, 0440 for owner and group, 0400 for the owner")),
    }
}

/// A change of owner and group. `None` means no change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// New user.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
}

impl Owner {
    /// Applies the change to a policy.
    pub fn apply(self, policy: &mut Policy) {
        policy.uid = self.uid.unwrap_or(policy.uid);
        policy.gid = self.gid.unwrap_or(policy.gid);
    }
}

impl FromStr for Owner {
    type Err = Error;

    /// Parses `USER`, `USER:GROUP` or `:GROUP`, by name or number.
    fn from_str(text: &str) -> Result<Owner> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if text.is_empty() || group == Some("") {
            return Err(
                Error::usage(format!("invalid owner '{text}'")).remedy("use USER, USER:GROUP or :GROUP")
            );
        }
        let uid = (!user.is_empty()).then(|| number("user", user, "/etc/passwd")).transpose()?;
        let gid = group.map(|group| number("group", group, "/etc/group")).transpose()?;
        Ok(Owner { uid, gid })
    }
}

/// Parses a user or group number, or looks up its name. `u32::MAX` is rejected: chown(2) takes it as "no change".
fn number(what: &str, text: &str, path: &str) -> Result<u32> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        let number = text.parse::<u32>().ok().filter(|n| *n != u32::MAX);
        return number.ok_or_else(|| {
            Error::usage(format!("invalid {what} number {text}: out of range"))
                .remedy(format!("use a number below {}, or a name from {path}", u32::MAX))
        });
    }
    let table = fs::read_to_string(path).map_err(|e| Error::io("cannot look up name", path, e))?;
    find(&table, text).ok_or_else(|| {
        Error::usage(format!("unknown {what} '{text}' in {path}"))
            .remedy(format!("use the number of the {what}"))
    })
}

/// Returns the third field of the line whose first field is `name`.
fn find(table: &str, name: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use crate::store::names::owner::*;

    #[test]
    fn parses_only_modes_with_read_bits() {
        for (text, mode) in [("444", 0o444), ("0400", 0o400), ("0", 0), ("0440", 0o440)] {
            assert_eq!(parse_mode(text).unwrap(), mode);
        }
        for bad in ["", "0644", "555", "9", "-1", "u+r", "4444", "000000444"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn parses_owners_by_name_and_number() {
        let owner = |uid, gid| Owner { uid, gid };
        assert_eq!("7".parse::<Owner>().unwrap(), owner(Some(7), None));
        assert_eq!("7:8".parse::<Owner>().unwrap(), owner(Some(7), Some(8)));
        assert_eq!(":8".parse::<Owner>().unwrap(), owner(None, Some(8)));
        assert_eq!("root:root".parse::<Owner>().unwrap(), owner(Some(0), Some(0)));
        for bad in ["", ":", "7:", "4294967295", "no-such-user-here", "1:no-such-group-here"] {
            assert!(bad.parse::<Owner>().is_err(), "{bad}");
        }
        assert_eq!(find("a:x:5:6:::\nb:x:7:8:::", "b"), Some(7));
        assert_eq!(find("a\nb:x:y", "b"), None);
    }
}
