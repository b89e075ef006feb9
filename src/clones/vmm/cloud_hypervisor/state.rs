//! `state.json`: the snapshots of Cloud Hypervisor's components. Each component's state is a string with JSON in it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::units::{Bytes, PAGE_SIZE};

/// `MemoryManagerSnapshotData`.
#[derive(Deserialize, Serialize)]
struct MemoryManager {
    memory_ranges: Ranges,
    guest_ram_mappings: Vec<Mapping>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Deserialize, Serialize)]
struct Ranges {
    data: Vec<Range>,
}

/// A range whose contents follow those of the range before in the file `memory-ranges`.
#[derive(Deserialize, Serialize)]
struct Range {
    gpa: u64,
    length: u64,
}

#[derive(Deserialize, Serialize)]
struct Mapping {
    gpa: u64,
    size: u64,
    zone_id: String,
    virtio_mem: bool,
    file_offset: u64,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Removes the memory ranges, so that a restore copies nothing, and gives each mapping its offset in the memory file.
/// `size` is the size of that file, `zones` are the zones of `config.json`.
///
/// # Errors
/// Returns [`Code::Usage`](crate::error::Code::Usage) if the memory file is not the memory of this state.
pub(super) fn convert(snapshot: &mut Value, size: Bytes, zones: &[String]) -> Result<()> {
    let Some(Value::String(state)) = snapshot.pointer_mut("/snapshots/memory-manager/snapshot_data/state")
    else {
        return Err(Error::usage(
            "state.json has no memory manager: Cloud Hypervisor did not write the file",
        ));
    };
    let mut memory: MemoryManager = serde_json::from_str(state)
        .map_err(|e| Error::usage(format!("cannot parse the memory manager in state.json: {e}")))?;
    let ranges = std::mem::take(&mut memory.memory_ranges.data);
    for mapping in &mut memory.guest_ram_mappings {
        let object = format!("memory at {:#x} of zone '{}'", mapping.gpa, mapping.zone_id);
        if mapping.virtio_mem {
            return Err(Error::usage(format!(
                "{object} was added by virtio-mem: a template has a fixed size"
            ))
            .hint("take the snapshot of a VM without hotplug_size"));
        }
        if !zones.contains(&mapping.zone_id) {
            return Err(Error::usage(format!("{object} is not in config.json"))
                .hint("import config.json and state.json of the same snapshot"));
        }
        if !ranges.is_empty() {
            mapping.file_offset = offset(&ranges, mapping).ok_or_else(|| {
                Error::usage(format!("the memory ranges of state.json contain no whole copy of {object}"))
                    .hint("import a snapshot whose memory zones are either all files or all anonymous memory")
            })?;
        }
    }
    if ranges.is_empty() && zones.len() > 1 {
        return Err(Error::usage(format!("the memory of the snapshot is in {} files", zones.len()))
            .hint("take the snapshot of a VM with one memory zone"));
    }
    let ends =
        memory.guest_ram_mappings.iter().map(|mapping| mapping.file_offset.saturating_add(mapping.size));
    let (end, size) = (ends.max().unwrap_or(0), size.get());
    // The file of a zone may be larger than the zone.
    if end > size || end < size && !ranges.is_empty() {
        return Err(Error::usage(format!(
            "the memory file has {size} bytes, but the mappings in the state end at \
            byte {end}"
        ))
        .hint("import the memory file of the same snapshot"));
    }
    *state = json!(memory).to_string();
    Ok(())
}

/// Returns where the contents of a mapping begin in `memory-ranges`; `None` if one range does not contain all of them.
fn offset(ranges: &[Range], mapping: &Mapping) -> Option<u64> {
    let mut start = 0u64;
    for range in ranges {
        if let Some(within) = mapping.gpa.checked_sub(range.gpa).filter(|within| *within < range.length) {
            let offset = start.checked_add(within)?;
            let whole = mapping.size <= range.length - within && offset.is_multiple_of(PAGE_SIZE);
            return whole.then_some(offset);
        }
        start = start.checked_add(range.length)?;
    }
    None
}
