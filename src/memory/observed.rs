//! Properties of a mapping in `/proc/PID/smaps`: its `maps` line, VM flags and resident memory.

use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::sys::process::procfs;
use crate::units::Bytes;

/// One mapping in `/proc/PID/smaps`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// The line of the mapping in `/proc/PID/maps`.
    pub line: String,
    /// Address of the first byte.
    pub start: u64,
    /// Address after the last byte.
    pub end: u64,
    /// Permissions, such as `rw-p`.
    pub perms: String,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Two-letter VM flags of the kernel.
    pub vm_flags: Vec<String>,
    /// Resident memory that the page tables map.
    pub resident_bytes: Bytes,
    /// Private copies and other anonymous memory, part of `resident_bytes`.
    pub anonymous_bytes: Bytes,
    /// Memory that is mapped by PMDs, part of `resident_bytes`.
    pub pmd_mapped_bytes: Bytes,
}

/// Parses the mapping that contains an address from the text of a `smaps` file.
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
        // A key with spaces is the first line of the next mapping.
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

/// Returns the mapping of this process that contains an address.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code::NotFound) if nothing is mapped at the address, and an error if
/// `/proc/self/smaps` cannot be read.
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
    fn finds_a_mapping_by_address() {
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
