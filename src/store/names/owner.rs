//! Parsers for permissions: octal modes, users and groups.

use std::str::FromStr;

use nix::errno::Errno;
use nix::unistd::{Group, User};

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
            .hint("use an octal mode: 0444 for all users, 0440 for owner and group, 0400 for the owner")),
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
                Error::usage(format!("invalid owner '{text}'")).hint("use USER, USER:GROUP or :GROUP")
            );
        }
        let uid_of = |name: &str| User::from_name(name).map(|user| user.map(|user| user.uid.as_raw()));
        let gid_of = |name: &str| Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw()));
        let uid = (!user.is_empty()).then(|| number("user", user, uid_of)).transpose()?;
        let gid = group.map(|group| number("group", group, gid_of)).transpose()?;
        Ok(Owner { uid, gid })
    }
}

/// Parses a user or group number, or looks up its name in the sources of nsswitch.conf(5). `u32::MAX` is rejected:
/// chown(2) takes it as "no change".
fn number(what: &str, text: &str, look_up: impl Fn(&str) -> nix::Result<Option<u32>>) -> Result<u32> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        let number = text.parse::<u32>().ok().filter(|n| *n != u32::MAX);
        return number.ok_or_else(|| {
            Error::usage(format!("invalid {what} number {text}: out of range"))
                .hint(format!("use a number below {}, or the name of the {what}", u32::MAX))
        });
    }
    let found = match look_up(text) {
        // getpwnam(3): some sources return these errors for an unknown name.
        Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => Ok(None),
        found => found,
    };
    let remedy = format!("use the number of the {what}, or a name that 'getent' finds");
    match found {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(Error::usage(format!("unknown {what} '{text}'")).hint(remedy)),
        Err(e) => {
            Err(Error::failed(format!("cannot look up {what} '{text}'")).because(e.into()).hint(remedy))
        }
    }
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
    }
}
