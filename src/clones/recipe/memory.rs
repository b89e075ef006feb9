//! Conversion of memory objects: RAM becomes a private mapping of a template file, ROM (the file of a read-only NVDIMM)
//! stays read-only.
//!
//! Each object must be a file mapped with `share=on`: QEMU leaves only shared memory out of the device state
//! (`x-ignore-shared`).

use super::props::{Props, is_on};

/// A RAM backend of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ram {
    /// Object id.
    pub id: String,
    /// Name of the template file: `memory` for the first backend, `memory-ID` for others.
    pub file: String,
    /// `mem-path=` of the object, as QEMU sees the path.
    pub mem_path: String,
}

/// Read-only memory of the VM: the file of a read-only NVDIMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rom {
    /// Object id.
    pub id: String,
    /// Name of the template file: `rom-ID`.
    pub file: String,
    /// `mem-path=` of the object, as QEMU sees the path.
    pub mem_path: String,
}

/// A memory object of clones.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Guest RAM.
    Ram(Ram),
    /// Read-only memory.
    Rom(Rom),
}

/// The change that makes a memory object usable for clones, as advice.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem(pub String);

/// Returns true for an object type that is guest memory.
pub(super) fn is_memory(kind: &str) -> bool {
    kind.starts_with("memory-backend-")
}

/// Converts a memory object to that of clones; `ram_files` is the number of RAM files before this one, `size` the value
/// of `-m`.
pub(super) fn object(props: &mut Props, ram_files: usize, size: &str) -> Result<Memory, Problem> {
    let kind = props.get("qom-type").unwrap_or_default().to_owned();
    let id = props.get("id").unwrap_or_default().to_owned();
    if kind != "memory-backend-file" {
        let size = props.get("size").unwrap_or(size);
        return Err(Problem(format!(
            "replace -object {kind},id={id},… with -object memory-backend-file,id={id},size={size},mem-path=FILE,share=on"
        )));
    }
    let rom = is_rom(props);
    let missing = if !is_on(props.get("share")) {
        Some("share=on")
    } else if !rom && is_on(props.get("readonly")) {
        Some("readonly=off")
    } else if props.get("offset").is_some_and(|o| !o.trim_start_matches("0x").trim_matches('0').is_empty()) {
        Some("offset=0")
    } else {
        None
    };
    if let Some(option) = missing {
        return Err(Problem(format!("add {option} to -object {kind},id={id},…")));
    }
    let mem_path = props.get("mem-path").unwrap_or_default().to_owned();
    for key in ["prealloc", "prealloc-threads", "prealloc-context", "discard-data", "pmem"] {
        props.remove(key);
    }
    if rom {
        let file = format!("rom-{id}");
        props.set("mem-path", &format!("{{file:{file}}}"));
        return Ok(Memory::Rom(Rom { id, file, mem_path }));
    }
    let (file, place) = match ram_files {
        0 => ("memory".to_owned(), "{memory}".to_owned()),
        _ => (format!("memory-{id}"), format!("{{file:memory-{id}}}")),
    };
    for (key, value) in [("mem-path", place.as_str()), ("share", "off"), ("readonly", "on"), ("rom", "off")] {
        props.set(key, value);
    }
    // Lets the kernel map 2 MiB folios of the template with one entry: QEMU aligns a file mapping to 4 KiB by default.
    // The guest cannot see the alignment, because no memory device uses this object.
    if props.get("align").is_none() {
        props.set("align", "2M");
    }
    Ok(Memory::Ram(Ram { id, file, mem_path }))
}

/// Returns true for read-only memory, by QEMU's rule: `rom=auto` follows `readonly=`.
fn is_rom(props: &Props) -> bool {
    match props.get("rom") {
        None | Some("auto") => is_on(props.get("readonly")),
        rom => is_on(rom),
    }
}

/// Returns the reason why an NVDIMM is unsupported for clones; `None` if its memory is a ROM.
pub(super) fn nvdimm(props: &Props, roms: &[Rom]) -> Option<String> {
    let memdev = props.get("memdev").unwrap_or_default();
    let id = props.get("id").unwrap_or(memdev);
    if !roms.iter().any(|rom| rom.id == memdev) {
        return Some(format!(
            "device nvdimm ({id}), which is writable (put -object memory-backend-file,id={memdev},…,share=on,readonly=on \
             before it)"
        ));
    }
    (!is_on(props.get("unarmed"))).then(|| format!("device nvdimm ({id}) without unarmed=on"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(text: &str, before: usize) -> (Result<Memory, Problem>, String) {
        let mut props = Props::parse(text, "qom-type").unwrap();
        let memory = object(&mut props, before, "1G");
        (memory, props.render("qom-type"))
    }

    #[test]
    fn rom_stays_rom() {
        for text in [
            "memory-backend-file,id=nv,size=4M,mem-path=/img,share=on,readonly=on",
            "memory-backend-file,id=nv,size=4M,mem-path=/img,share=on,readonly=on,rom=auto",
            "memory-backend-file,id=nv,size=4M,mem-path=/img,share=on,readonly=on,rom=on,pmem=on",
        ] {
            let (memory, line) = converted(text, 0);
            let rom = Rom { id: "nv".into(), file: "rom-nv".into(), mem_path: "/img".into() };
            assert_eq!(memory, Ok(Memory::Rom(rom)), "{text}");
            assert!(line.contains("mem-path={file:rom-nv},share=on,readonly=on"), "{line}");
            assert!(!line.contains("pmem") && !line.contains("rom=off"), "{line}");
        }
        let private = converted("memory-backend-file,id=nv,size=4M,mem-path=/img,readonly=on", 0).0;
        assert!(
            matches!(private, Err(Problem(text)) if text.contains("share=on")),
            "QEMU saves private memory in the device state"
        );
    }

    #[test]
    fn second_node_gets_a_separate_file() {
        let (memory, line) = converted("memory-backend-file,id=n1,size=4M,mem-path=/n1,share=on", 1);
        let ram = Ram { id: "n1".into(), file: "memory-n1".into(), mem_path: "/n1".into() };
        assert_eq!(memory, Ok(Memory::Ram(ram)));
        assert!(line.ends_with("mem-path={file:memory-n1},share=off,readonly=on,rom=off,align=2M"), "{line}");
    }

    #[test]
    fn refuses_a_writable_nvdimm() {
        let roms = [Rom { id: "mem1".into(), file: "rom-mem1".into(), mem_path: "/img".into() }];
        let refusal = |text: &str| nvdimm(&Props::parse(text, "driver").unwrap(), &roms);
        assert_eq!(refusal("nvdimm,id=nv,memdev=mem1,unarmed=on"), None);
        assert!(refusal("nvdimm,id=nv,memdev=mem1").unwrap().contains("without unarmed=on"));
        assert!(refusal("nvdimm,id=nv,memdev=ram7,unarmed=on").unwrap().contains("which is writable"));
    }
}
