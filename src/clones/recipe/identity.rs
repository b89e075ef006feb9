//! Addresses that must be unique on a host, derived from a clone's id.

use std::path::Path;

use crate::store::Digest;

/// Maximum number of network cards of a clone.
const CARDS: u8 = 16;

/// The network identity of a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    number: u64,
    host: u64,
    attempt: u32,
}

impl Identity {
    /// Derives the identity of the clone with this id (`c` and seven hex digits, unique in its runtime directory).
    /// `attempt` counts the earlier attempts whose vsock address was in use.
    pub fn of(id: &str, attempt: u32) -> Identity {
        let number = id.get(1..).and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0) & 0x0fff_ffff;
        Identity { number, host: host_number(), attempt }
    }

    /// Returns the MAC address of a network card: locally administered, unicast.
    ///
    /// 28 bits are the clone's id and 4 bits the card, so the addresses of clones in one runtime directory are unique.
    /// 13 bits identify the host and the runtime directory; two hosts with the same 13 bits collide only if two random
    /// 28-bit ids are equal too.
    pub fn mac(&self, card: u8) -> String {
        let bits = ((self.host & 0x1fff) << 32) | (self.number << 4) | u64::from(card % CARDS);
        let bytes = bits.to_le_bytes();
        // Bits 0 and 1 of the first byte are fixed: unicast, locally administered. Bit 2 is set so that no address
        // begins with 0x52, the prefix of QEMU's defaults.
        let first = 0x06 | (bytes[5] & 0x1f) << 3;
        let rest: Vec<String> = bytes[..5].iter().rev().map(|byte| format!("{byte:02x}")).collect();
        format!("{first:02x}:{}", rest.join(":"))
    }

    /// Returns the vsock address (CID): not a reserved one, and unique among the clones of the runtime directory.
    pub fn cid(&self) -> u32 {
        let high = u64::from(self.attempt % 14) + 1;
        ((high << 28 | self.number) & 0xffff_ffff) as u32
    }

    /// Returns the numbers of the cards that have an address.
    pub fn cards() -> impl Iterator<Item = u8> {
        0..CARDS
    }
}

/// Returns 64 bits of a hash of the host's machine id and the runtime directory.
fn host_number() -> u64 {
    let read = |path: &str| std::fs::read(Path::new(path)).unwrap_or_default();
    let mut id = read("/etc/machine-id");
    if id.is_empty() {
        id = read("/proc/sys/kernel/random/boot_id");
    }
    id.extend_from_slice(crate::clones::registry::runtime_root().as_os_str().as_encoded_bytes());
    let digest = Digest::of(&id);
    digest.bytes().iter().take(8).fold(0, |all, byte| all << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn mac_addresses_are_local_and_unique() {
        let mut seen = BTreeSet::new();
        for id in ["c0000000", "c0000001", "cfffffff", "cabcdef0"] {
            for card in Identity::cards() {
                let mac = Identity::of(id, 0).mac(card);
                let first = u8::from_str_radix(&mac[..2], 16).unwrap();
                assert_eq!(first & 3, 2, "{mac}: unicast, locally administered");
                assert_eq!(mac.len(), 17);
                assert!(seen.insert(mac));
            }
        }
    }

    #[test]
    fn vsock_addresses_are_never_reserved() {
        for attempt in 0..40 {
            for id in ["c0000000", "cfffffff"] {
                let cid = Identity::of(id, attempt).cid();
                assert!((3..u32::MAX).contains(&cid), "{cid:#x}");
            }
        }
        assert_ne!(Identity::of("c0000001", 0).cid(), Identity::of("c0000001", 1).cid());
        assert_ne!(Identity::of("c0000001", 0).cid(), Identity::of("c0000002", 0).cid());
    }
}
