//! QEMU's command line.

use super::{Memory, Paste, Served, shell_word};
use crate::clones::recipe::{Recipe, Values};
use crate::error::Result;
use crate::units::Bytes;

/// Where the memory lies in the process: a multiple of this lets 2 MiB folios be mapped as one.
const HUGE: u64 = 2 << 20;

/// Options and their values; all of them have one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line(pub Vec<(String, String)>);

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.push((format!("-{option}"), value.into()));
    }

    /// Every word.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|(option, value)| [option.as_str(), value.as_str()])
    }
}

pub(super) fn paste(template: &Served) -> Result<Paste> {
    let (program, line, mut notes) = match &template.recipe {
        Some(recipe) => (recipe.program.clone(), of_recipe(recipe, template)?, vec![]),
        None => ("qemu-system-x86_64".to_owned(), of_files(template, Some("q35"))?, vec![]),
    };
    if template.state().is_some() {
        notes.push(
            "this is the memory; device state is resumed by `stencil clone`, or by the whole command line of \
             `stencil inspect` with -incoming defer and the capability x-ignore-shared"
                .to_owned(),
        );
    }
    let mut text = shell_word(&program);
    for (option, value) in &line.0 {
        text.push_str(&format!(" \\\n    {option} {}", shell_word(value)));
    }
    let argv = std::iter::once(program.as_str()).chain(line.words()).map(str::to_owned).collect();
    Ok(Paste { text, argv: Some(argv), body: None, notes })
}

/// Machine and memory for files that nobody has a recipe for: one NUMA node a RAM file, one NVDIMM a ROM. Without a
/// machine type the line is one to add to another that has it.
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
        // QEMU gives each memory device a gigabyte of its own to be aligned in.
        let room: u64 = roms.iter().map(|rom| rom.size.get().next_multiple_of(1 << 30) + (1 << 30)).sum();
        size.push_str(&format!(",slots={},maxmem={}k", roms.len(), (total.get() + room) / 1024));
    }
    line.add("m", size);
    for (number, memory) in ram.iter().enumerate() {
        let object = object(*memory, &format!("ram{number}"), HUGE);
        line.add("object", format!("{object},share=off,readonly=on,rom=off"));
    }
    if ram.len() > 1 {
        for number in 0..ram.len() {
            line.add("numa", format!("node,nodeid={number},memdev=ram{number}"));
        }
    }
    for (number, rom) in roms.iter().enumerate() {
        // An NVDIMM shows only whole multiples of its alignment.
        let align = if rom.size.get().is_multiple_of(HUGE) { HUGE } else { 0 };
        line.add("object", format!("{},share=on,readonly=on", object(*rom, &format!("rom{number}"), align)));
        line.add("device", format!("nvdimm,id=nvdimm{number},memdev=rom{number},unarmed=on"));
    }
    Ok(line)
}

fn object(memory: Memory<'_>, id: &str, align: u64) -> String {
    let align = if align == 0 { String::new() } else { format!(",align={}M", align >> 20) };
    let path = memory.path.replace(',', ",,");
    format!("memory-backend-file,id={id},size={},mem-path={path}{align}", memory.size.get())
}

/// Machine and memory as the captured VM had them: device state fits no other.
fn of_recipe(recipe: &Recipe, template: &Served) -> Result<Line> {
    let mut chosen = vec![];
    let mut words = recipe.argv.iter().peekable();
    while let Some(option) = words.next() {
        let Some(value) = words.next_if(|next| !next.starts_with('-')) else { continue };
        let backend = value.starts_with("memory-backend-");
        let value = match option.trim_start_matches('-') {
            "object" if backend && value.contains(",rom=off") && !value.contains(",align=") => {
                format!("{value},align=2M")
            }
            "object" if backend => value.clone(),
            "device" if value.starts_with("nvdimm,") => value.clone(),
            "machine" | "m" | "smp" | "numa" => value.clone(),
            _ => continue,
        };
        chosen.extend([option.clone(), value]);
    }
    let files: Vec<_> = template.files.iter().map(|(file, path)| (file.name.clone(), path.clone())).collect();
    // Only what is chosen is filled in: the rest is of one clone.
    let chosen = Recipe { argv: chosen, ..recipe.clone() };
    let words = chosen.arguments(&Values::new(&template.name, &files))?;
    let pair = |pair: &[String]| pair.first().cloned().zip(pair.get(1).cloned());
    Ok(Line(words.chunks(2).filter_map(pair).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;
    use crate::store::FileKind::{Ram, Rom};

    #[test]
    fn one_file_is_the_memory_of_the_machine() {
        let paste = paste(&served(&[("memory", Ram, 64)])).unwrap();
        assert_eq!(
            paste.argv.unwrap().join(" "),
            "qemu-system-x86_64 -machine q35,memory-backend=ram0 -m size=65536k -object \
             memory-backend-file,id=ram0,size=67108864,mem-path=/mnt/by-id/abc/memory,align=2M,share=off,\
             readonly=on,rom=off"
        );
    }

    #[test]
    fn several_files_are_nodes_and_a_rom_is_an_nvdimm() {
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
    fn a_recipe_keeps_its_own_ids() {
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
             size=64M,mem-path=/mnt/by-id/abc/memory,share=off,readonly=on,rom=off,align=2M"
        );
    }
}
