//! QEMU command lines with the memory of a template.

use super::paste::{VmmArguments, shell_word};
use super::served::{Memory, Served};
use crate::clones::recipe::{Escape, Props, Recipe, implied, options};
use crate::error::{Error, Result};
use crate::units::Bytes;

/// Alignment of a memory mapping in bytes that lets the kernel map 2 MiB folios with one page table entry.
const HUGE_PAGE: u64 = 2 << 20;

/// Options with their values; every option has a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line(pub Vec<(String, String)>);

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.push((format!("-{option}"), value.into()));
    }

    /// Returns all words: options and values in turn.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(option, value)| [option.as_str(), value.as_str()])
    }
}

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    let (program, line, mut notes) = match &template.recipe {
        Some(recipe) => (recipe.program.clone(), of_recipe(recipe, template)?, vec![]),
        None => ("qemu-system-x86_64".to_owned(), of_files(template, Some("q35"))?, vec![]),
    };
    if template.state().is_some() {
        notes.push(
            "these options set up memory only; to resume the device state, use `stencil clone`, or the whole command line \
             of `stencil inspect --recipe` with -incoming defer and the migration capability x-ignore-shared"
                .to_owned(),
        );
    }
    let mut text = shell_word(&program);
    for (option, value) in &line.0 {
        text.push_str(&format!(" \\\n    {option} {}", shell_word(value)));
    }
    let argv = std::iter::once(program.as_str()).chain(line.words()).map(str::to_owned).collect();
    Ok(VmmArguments { text, argv: Some(argv), notes, ..VmmArguments::default() })
}

/// Returns machine and memory options for a template without recipe: one NUMA node per RAM file, one NVDIMM per ROM.
/// Without a machine type the options complete a command line that has one.
pub(super) fn of_files(template: &Served, machine: Option<&str>) -> Result<Line> {
    let mut line = Line::default();
    let (ram, roms) = (template.ram()?, template.roms());
    let total: Bytes = ram.iter().map(|memory| memory.size).sum();
    let backend = (ram.len() == 1).then_some("memory-backend=ram0");
    let nvdimm = (!roms.is_empty()).then_some("nvdimm=on");
    let machine: Vec<&str> = machine.into_iter().chain(backend).chain(nvdimm).collect();
    if !machine.is_empty() {
        line.add("machine", machine.join(","));
    }
    let mut size = format!("size={}k", total.get() / 1024);
    if !roms.is_empty() {
        // QEMU reserves up to 1 GiB more address space for each memory device, for its alignment.
        let room: u64 = roms.iter().map(|rom| rom.size.get().next_multiple_of(1 << 30) + (1 << 30)).sum();
        size.push_str(&format!(",slots={},maxmem={}k", roms.len(), (total.get() + room) / 1024));
    }
    line.add("m", size);
    for (number, memory) in ram.iter().enumerate() {
        let object = object(*memory, &format!("ram{number}"), Some(HUGE_PAGE));
        // Without reserve=off, each clone is charged the whole size of its RAM.
        let reserve = if template.commits_strictly { "" } else { ",reserve=off" };
        line.add("object", format!("{object},share=off,readonly=on,rom=off{reserve}"));
    }
    if ram.len() > 1 {
        for number in 0..ram.len() {
            line.add("numa", format!("node,nodeid={number},memdev=ram{number}"));
        }
    }
    for (number, rom) in roms.iter().enumerate() {
        // The guest sees only whole multiples of an NVDIMM's alignment.
        let align = rom.size.get().is_multiple_of(HUGE_PAGE).then_some(HUGE_PAGE);
        line.add("object", format!("{},share=on,readonly=on", object(*rom, &format!("rom{number}"), align)));
        line.add("device", format!("nvdimm,id=nvdimm{number},memdev=rom{number},unarmed=on"));
    }
    Ok(line)
}

fn object(memory: Memory<'_>, id: &str, align: Option<u64>) -> String {
    let align = align.map(|align| format!(",align={}M", align >> 20)).unwrap_or_default();
    let path = memory.path.replace(',', ",,");
    format!("memory-backend-file,id={id},size={},mem-path={path}{align}", memory.size.get())
}

/// Returns machine and memory options of the captured VM: QEMU loads device state only into the same machine.
fn of_recipe(recipe: &Recipe, template: &Served) -> Result<Line> {
    let mut line = Line::default();
    let fill = |text: &str| template.values.fill(text, Escape::DoubleCommas);
    for (option, value) in options(&recipe.argv) {
        let (Some(value), Some(implied)) = (value, implied(option)) else { continue };
        let mut props = Props::parse(value, implied).ok_or_else(|| {
            Error::usage(format!(
                "cannot parse the properties of '-{option} {value}' in the recipe of template {}",
                template.name
            ))
            .hint("rewrite the option as key=value,key=value with `stencil recipe edit`")
        })?;
        match option {
            "object" if props.get(implied).is_some_and(|kind| kind.starts_with("memory-backend-")) => {
                if props.get("rom") == Some("off") && props.get("align").is_none() {
                    props.set("align", "2M");
                }
                let reserves = ["reserve", "prealloc"].iter().any(|key| props.get(key).is_some());
                if props.get("rom") == Some("off") && !reserves && !template.commits_strictly {
                    props.set("reserve", "off");
                }
                props.lead_with(implied);
                line.add(option, fill(&props.render(implied))?);
            }
            "object" => {}
            "device" if !matches!(props.get(implied), Some("nvdimm" | "pc-dimm")) => {}
            _ => line.add(option, fill(value)?),
        }
    }
    let ram = template.ram()?;
    if let Some(why) = recipe.unused_ram(ram.iter().map(|memory| memory.name), &template.roles) {
        return Err(Error::usage(format!("the recipe of template {} {why}", template.name)).hint(
            "show the recipe with `stencil inspect --recipe` and correct it with `stencil recipe edit`",
        ));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;
    use crate::store::FileKind::{Ram, Rom};

    #[test]
    fn single_file_is_the_memory_of_the_machine() {
        let paste = paste(&served(&[("memory", Ram, 64)])).unwrap();
        assert_eq!(
            paste.argv.unwrap().join(" "),
            "qemu-system-x86_64 -machine q35,memory-backend=ram0 -m size=65536k -object \
             memory-backend-file,id=ram0,size=67108864,mem-path=/mnt/by-id/abc/memory,align=2M,share=off,\
             readonly=on,rom=off,reserve=off"
        );
        let mut template = served(&[("memory", Ram, 64)]);
        template.commits_strictly = true;
        assert!(super::paste(&template).unwrap().text.ends_with(",readonly=on,rom=off"));
    }

    #[test]
    fn several_files_become_nodes_and_a_rom_becomes_an_nvdimm() {
        let paste = paste(&served(&[("memory-b", Ram, 64), ("memory", Ram, 32), ("img", Rom, 6)])).unwrap();
        let line = paste.argv.unwrap().join(" ");
        assert!(line.contains("-m size=98304k,slots=1,maxmem=2195456k"), "{line}");
        assert!(line.contains("id=ram0,size=33554432,mem-path=/mnt/by-id/abc/memory,"), "{line}");
        assert!(
            line.contains("-numa node,nodeid=1,memdev=ram1") && !line.contains("memory-backend="),
            "{line}"
        );
        assert!(line.contains("mem-path=/mnt/by-id/abc/img,align=2M,share=on,readonly=on -device"), "{line}");
        assert!(line.ends_with("nvdimm,id=nvdimm0,memdev=rom0,unarmed=on"), "{line}");
    }

    #[test]
    fn keeps_the_object_ids_of_a_recipe() {
        let mut template = served(&[("memory", Ram, 64)]);
        let argv = "-machine pc-q35-10.0,memory-backend=main -nodefaults -m 64M -smp 2 -kernel {file:memory} -object \
                    memory-backend-file,id=main,size=64M,mem-path={memory},share=off,readonly=on,rom=off \
                    -object rng-random,id=r -device virtio-rng-pci,rng=r -serial file:{dir}/s";
        let argv = argv.split_ascii_whitespace().map(str::to_owned).collect();
        template.recipe = Some(Recipe::qemu("/usr/bin/qemu".into(), "10".into(), argv));
        let paste = paste(&template).unwrap();
        assert_eq!(
            paste.argv.unwrap().join(" "),
            "/usr/bin/qemu -machine pc-q35-10.0,memory-backend=main -m 64M -smp 2 -object memory-backend-file,id=main,\
             size=64M,mem-path=/mnt/by-id/abc/memory,share=off,readonly=on,rom=off,align=2M,reserve=off"
        );
    }

    /// Returns the command line for a template with `memory` and `memory-b`, and a recipe with these arguments.
    fn line_for(words: &str) -> Result<String> {
        let mut template = served(&[("memory", Ram, 64), ("memory-b", Ram, 32)]);
        let argv = words.split_ascii_whitespace().map(str::to_owned).collect();
        template.recipe = Some(Recipe::qemu("qemu".into(), "10".into(), argv));
        Ok(paste(&template)?.argv.unwrap().join(" "))
    }

    const NODES: &str = "-M q35 -nodefaults --m 96M -numa node,memdev=a --numa node,memdev=b,cpus=1 \
                         -object memory-backend-file,id=a,size=64M,mem-path={memory},readonly=on,rom=off \
                         -object {\"id\":\"b\",\"size\":33554432,\"readonly\":true,\"rom\":\"off\",\"mem-path\":\"{file:memory-b}\",\"qom-type\":\"memory-backend-file\"}";

    #[test]
    fn reads_options_of_every_form() {
        assert_eq!(
            line_for(NODES).unwrap(),
            "qemu -M q35 -m 96M -numa node,memdev=a -numa node,memdev=b,cpus=1 -object memory-backend-file,id=a,size=64M,\
             mem-path=/mnt/by-id/abc/memory,readonly=on,rom=off,align=2M,reserve=off -object memory-backend-file,id=b,\
             size=33554432,readonly=on,rom=off,mem-path=/mnt/by-id/abc/memory-b,align=2M,reserve=off"
        );
        let slot = NODES.replace("--numa node,memdev=b,cpus=1", "-device pc-dimm,memdev=b,id=d");
        assert!(line_for(&slot).unwrap().contains(" -device pc-dimm,memdev=b,id=d "));
    }

    #[test]
    fn refuses_unused_ram_by_name() {
        for (from, to, words) in [
            ("node,memdev=a", "node,mem=64M", "does not use RAM file 'memory'"),
            ("memdev=b", "memdev=c", "does not use RAM file 'memory-b'"),
            ("{file:memory-b}", "/elsewhere", "does not use RAM file 'memory-b'"),
            (
                "--numa node,memdev=b",
                "-unknown --numa -device e1000,memdev=b",
                "does not use RAM file 'memory-b'",
            ),
            ("-M q35", "-M q35,memory-backend=b -M memory-backend=a", "does not use RAM file 'memory-b'"),
            ("\"qom-type\"", "\"a\":[1],\"qom-type\"", "cannot parse the properties"),
            ("{memory}", "{file:none}", "no file 'none'"),
        ] {
            let recipe = NODES.replacen(from, to, 1);
            let recipe = match from {
                "-M q35" => recipe.replace("--numa node,memdev=b", "-name x"),
                _ => recipe,
            };
            let error = line_for(&recipe).unwrap_err().to_string();
            assert!(error.contains(words), "{from} → {to}: {error}");
        }
    }
}
