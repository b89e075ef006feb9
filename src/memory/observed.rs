//! What the kernel says of a mapping: its line in `maps`, its flags, what of it is in RAM.

use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::sys::procfs;
use crate::units::Bytes;

/// One mapping, as `/proc/PID/smaps` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// The line as it stands in `/proc/PID/maps`.
    pub line: String,
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `rw-p` and the like.
    pub perms: String,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// The kernel's two-letter flags.
    pub vm_flags: Vec<String>,
    /// Mapped by the page tables and in RAM.
    pub resident_bytes: Bytes,
    /// Of these, copies that belong to this process.
    pub anonymous_bytes: Bytes,
    /// Of these, mapped by PMDs.
    pub pmd_mapped_bytes: Bytes,
}

/// The mapping of an `smaps` text that contains an address.
pub fn parse_smaps(text: &str, address: u64) -> Option<Observed> {
    let mut lines = text.lines();
    let (line, map) = lines.by_ref().find_map(|line| {
        let map = procfs::parse_maps(line, |_, _| true).pop()?;
        (map.start..map.end).contains(&address).then_some((line, map))
    })?;
    let mut observed = Observed {
        line: line.to_owned(),
        start: map.start,
        end: map.end,
        perms: map.perms,
        offset: map.offset,
        vm_flags: Vec::new(),
        resident_bytes: Bytes::ZERO,
        anonymous_bytes: Bytes::ZERO,
        pmd_mapped_bytes: Bytes::ZERO,
    };
    for line in lines {
        let Some((key, value)) = line.split_once(':') else { break };
        // The next mapping's line has its colon behind several words.
        if key.contains(' ') {
            break;
        }
        let bytes = || Bytes::parse(&value.replace([' ', 'B'], "")).unwrap_or(Bytes::ZERO);
        match key {
            "Rss" => observed.resident_bytes = bytes(),
            "Anonymous" => observed.anonymous_bytes = bytes(),
            "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => observed.pmd_mapped_bytes += bytes(),
            "VmFlags" => observed.vm_flags = value.split_whitespace().map(str::to_owned).collect(),
            _ => {}
        }
    }
    Some(observed)
}

/// The mapping of this process that contains an address.
///
/// # Errors
/// Not found where nothing is mapped; else what reading `/proc/self/smaps` gives.
pub fn observe(address: u64) -> Result<Observed> {
    let text = procfs::read_text(Path::new("/proc/self/smaps"))?;
    parse_smaps(&text, address).ok_or_else(|| Error::not_found(format!("nothing is mapped at {address:#x}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f2d1ffff000-7f2d23fff000 rw-p 00001000 fe:00 10010818                   /tmp/a: b
Size:              65536 kB
Rss:                  12 kB
Anonymous:             8 kB
AnonHugePages:         0 kB
FilePmdMapped:      2048 kB
VmFlags: rd wr mr mw me dc ac hg mg 
7f2d23fff000-7f2d24000000 ---p 00000000 00:00 0 
Rss:                   4 kB
VmFlags: mr mw me nr 
";

    #[test]
    fn a_mapping_is_found_by_address() {
        let found = parse_smaps(SMAPS, 0x7f2d_2000_0000).unwrap();
        assert_eq!((found.perms.as_str(), found.offset), ("rw-p", 4096));
        assert!(found.line.ends_with("/tmp/a: b"));
        assert_eq!(found.vm_flags.join(" "), "rd wr mr mw me dc ac hg mg");
        assert_eq!(found.resident_bytes.get(), 12 << 10);
        assert_eq!(found.anonymous_bytes.get(), 8 << 10);
        assert_eq!(found.pmd_mapped_bytes.get(), 2 << 20);
        assert_eq!(parse_smaps(SMAPS, 0x7f2d_23ff_f000).unwrap().perms, "---p");
        assert_eq!(parse_smaps(SMAPS, 0x1000), None);
    }
}
