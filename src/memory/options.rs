//! Options of a memory object with QEMU's names and defaults.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::units::{Bytes, FileOffset};

use super::grammar;
use super::input::{Input, missing};
use super::json;
use super::note::Note;

/// The object types that Stencil supports for guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectType {
    /// `memory-backend-file`
    File,
    /// `memory-backend-ram`
    Ram,
}

impl ObjectType {
    /// Returns QEMU's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            ObjectType::File => "memory-backend-file",
            ObjectType::Ram => "memory-backend-ram",
        }
    }
}

/// A boolean option with the additional value `auto`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnOffAuto {
    /// on
    On,
    /// off
    Off,
    /// The value depends on another option.
    #[default]
    Auto,
}

/// NUMA policy of the host memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NumaPolicy {
    /// `default`
    #[default]
    Default,
    /// `preferred`
    Preferred,
    /// `bind`
    Bind,
    /// `interleave`
    Interleave,
}

impl NumaPolicy {
    /// Returns QEMU's name of the policy.
    pub fn name(self) -> &'static str {
        match self {
            NumaPolicy::Default => "default",
            NumaPolicy::Preferred => "preferred",
            NumaPolicy::Bind => "bind",
            NumaPolicy::Interleave => "interleave",
        }
    }
}

/// Options of `memory-backend-file` only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileOptions {
    /// `mem-path`
    pub mem_path: PathBuf,
    /// `align`; 0 if not set.
    pub align: Bytes,
    /// `offset`
    pub offset: FileOffset,
    /// `discard-data`
    pub discard_data: bool,
    /// `pmem`
    pub pmem: bool,
    /// `readonly`
    pub readonly: bool,
    /// `rom`
    pub rom: OnOffAuto,
}

/// Options of one memory object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `qom-type`
    pub object: ObjectType,
    /// `id`
    pub id: String,
    /// `size`
    pub size: Bytes,
    /// `dump`: include the memory in core dumps.
    pub dump: bool,
    /// `host-nodes`
    pub host_nodes: Vec<u16>,
    /// `merge`: KSM may merge copied pages.
    pub merge: bool,
    /// `policy`
    pub policy: NumaPolicy,
    /// `prealloc`: copy or allocate every page at startup.
    pub prealloc: bool,
    /// `prealloc-threads`
    pub prealloc_threads: Option<u32>,
    /// `prealloc-context`: the id of another object, which cannot exist in Stencil.
    pub prealloc_context: Option<String>,
    /// `share`
    pub share: bool,
    /// `reserve`
    pub reserve: bool,
    /// `x-use-canonical-path-for-ramblock-id`: use the object path as name of the region in messages.
    pub canonical_name: bool,
    /// Options of `memory-backend-file`; `None` for other types.
    pub file: Option<FileOptions>,
    /// `prefault` (Stencil only): fill the page tables without copying.
    pub prefault: bool,
    /// `anonymous-zeros` (Stencil only): map long runs of zeros of a template as anonymous memory.
    pub anonymous_zeros: bool,
    /// Notes about the text itself.
    pub notes: Vec<Note>,
}

const SWITCHES: [(&str, OnOffAuto); 3] =
    [("auto", OnOffAuto::Auto), ("on", OnOffAuto::On), ("off", OnOffAuto::Off)];

const POLICIES: [(&str, NumaPolicy); 4] = [
    ("default", NumaPolicy::Default),
    ("preferred", NumaPolicy::Preferred),
    ("bind", NumaPolicy::Bind),
    ("interleave", NumaPolicy::Interleave),
];

/// Other memory objects of QEMU, which a template cannot back.
const OTHER_MEMORY: [&str; 3] = ["memory-backend-memfd", "memory-backend-shm", "memory-backend-epc"];

/// QEMU's hint after an invalid `id`.
const IDENTIFIER_HINT: &str =
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";

impl Options {
    /// Parses the argument of `-object`: an option string or a JSON object.
    ///
    /// # Errors
    /// Returns [`Code::Usage`](crate::error::Code::Usage) with QEMU's text.
    pub fn parse(text: &str) -> Result<Options> {
        if text.starts_with('{') { Self::from_json(text) } else { Self::from_words(text) }
    }

    fn from_words(text: &str) -> Result<Options> {
        let mut words = grammar::pairs(text, "qom-type");
        // The first of several ids takes effect, but the last value of every other key. QEMU checks the id before any
        // other key.
        let first_id = words.iter().find(|pair| pair.key == "id").cloned();
        let mut notes = Vec::new();
        if let Some(id) = &first_id {
            check_id(&id.value)?;
        }
        for pair in &words {
            if let Some(short) = &pair.short {
                notes.push(Note::short_form(short, &pair.key, &pair.value));
            }
        }
        words.retain(|pair| pair.key != "id");
        words.extend(first_id);
        Self::read(Input::Words(words), notes)
    }

    fn from_json(text: &str) -> Result<Options> {
        Self::read(Input::Json(json::object(text)?), Vec::new())
    }

    /// Reads the parameters in QEMU's order, which decides which of several errors is reported.
    fn read(mut input: Input, notes: Vec<Note>) -> Result<Options> {
        let object = object_type(&input.text("qom-type")?.ok_or_else(|| missing("qom-type"))?)?;
        let id = input.text("id")?.ok_or_else(|| missing("id"))?;
        let dump = input.switch("dump")?.unwrap_or(true);
        let host_nodes = input.numbers("host-nodes")?;
        let merge = input.switch("merge")?.unwrap_or(true);
        let policy = input.choice("policy", &POLICIES)?.unwrap_or_default();
        let prealloc = input.switch("prealloc")?.unwrap_or(false);
        let prealloc_threads = input.number("prealloc-threads")?;
        let prealloc_context = input.text("prealloc-context")?;
        let share = input.switch("share")?.unwrap_or(false);
        let reserve = input.switch("reserve")?.unwrap_or(true);
        let size = Bytes::new(input.size("size")?.ok_or_else(|| missing("size"))?);
        let canonical_name = input.switch("x-use-canonical-path-for-ramblock-id")?.unwrap_or(false);
        let file = match object {
            ObjectType::File => Some(FileOptions {
                align: Bytes::new(input.size("align")?.unwrap_or(0)),
                offset: FileOffset::new(input.size("offset")?.unwrap_or(0)),
                discard_data: input.switch("discard-data")?.unwrap_or(false),
                mem_path: input.text("mem-path")?.ok_or_else(|| missing("mem-path"))?.into(),
                pmem: input.switch("pmem")?.unwrap_or(false),
                readonly: input.switch("readonly")?.unwrap_or(false),
                rom: input.choice("rom", &SWITCHES)?.unwrap_or_default(),
            }),
            ObjectType::Ram => None,
        };
        let prefault = input.switch("prefault")?.unwrap_or(false);
        let anonymous_zeros = input.switch("anonymous-zeros")?.unwrap_or(true);
        input.end()?;
        check_id(&id)?;
        Ok(Options {
            object,
            id,
            size,
            dump,
            host_nodes,
            merge,
            policy,
            prealloc,
            prealloc_threads,
            prealloc_context,
            share,
            reserve,
            canonical_name,
            file,
            prefault,
            anonymous_zeros,
            notes,
        })
    }
}

fn object_type(name: &str) -> Result<ObjectType> {
    match name {
        "memory-backend-file" => Ok(ObjectType::File),
        "memory-backend-ram" => Ok(ObjectType::Ram),
        other if OTHER_MEMORY.contains(&other) => {
            Err(Error::usage(format!("object type '{other}' cannot be backed by a template"))
                .hint("use memory-backend-file, or memory-backend-ram for memory without a template"))
        }
        other => Err(Error::usage(format!("Parameter 'qom-type' does not accept value '{other}'"))
            .hint("use memory-backend-file or memory-backend-ram")),
    }
}

fn check_id(id: &str) -> Result<()> {
    if grammar::is_identifier(id) {
        return Ok(());
    }
    Err(grammar::expects("id", "an identifier").hint(IDENTIFIER_HINT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_string_and_json_are_equivalent() {
        let words = "memory-backend-file,id=m,size=4M,mem-path=/a,,b,share=on,dump=off,merge=off,readonly=on,rom=off,\
            host-nodes=0,host-nodes=3-5,policy=interleave,prealloc=on,prealloc-threads=3,reserve=off,align=2M,\
            offset=4k,discard-data=on,pmem=on,prefault=on,anonymous-zeros=off,x-use-canonical-path-for-ramblock-id=on";
        let json = r#"{"qom-type":"memory-backend-file","id":"m","size":4194304,"mem-path":"/a,b","share":true,
            "dump":false,"merge":false,"readonly":true,"rom":"off","host-nodes":[0,3,4,5],"policy":"interleave",
            "prealloc":true,"prealloc-threads":3,"reserve":false,"align":2097152,"offset":4096,"discard-data":true,
            "pmem":true,"prefault":true,"anonymous-zeros":false,"x-use-canonical-path-for-ramblock-id":true}"#;
        let (words, json) = (Options::parse(words).unwrap(), Options::parse(json).unwrap());
        assert_eq!(words, json);
        assert_eq!(words.host_nodes, [0, 3, 4, 5]);
        assert!(!words.anonymous_zeros);
        assert_eq!(words.file.as_ref().unwrap().mem_path.to_str(), Some("/a,b"));
        assert_eq!(words.file.as_ref().unwrap().rom, OnOffAuto::Off);
    }

    #[test]
    fn defaults_are_those_of_qemu() {
        let options = Options::parse("memory-backend-file,id=m,size=4M,mem-path=/f").unwrap();
        assert!(options.dump && options.merge && options.reserve && options.anonymous_zeros);
        assert!(!options.share && !options.prealloc && !options.prefault && !options.canonical_name);
        assert_eq!((options.policy, options.prealloc_threads), (NumaPolicy::Default, None));
        let file = options.file.unwrap();
        assert_eq!((file.align, file.offset), (Bytes::ZERO, FileOffset::new(0)));
        assert!(!file.readonly && !file.pmem && !file.discard_data);
        assert_eq!(file.rom, OnOffAuto::Auto);
        assert!(options.notes.is_empty());
    }

    /// Mutated texts are accepted or rejected, but never cause a panic.
    #[test]
    fn mutated_texts_do_not_panic() {
        let seeds = [
            "memory-backend-file,id=m,size=4M,mem-path=/f,host-nodes=0-3,share,noreadonly",
            r#"{"qom-type":"memory-backend-ram","id":"m","size":4096,"host-nodes":[1,2],"x":"\u00e9"}"#,
        ];
        let mut state = 1u64;
        let mut dice = |limit: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % limit
        };
        let odd: Vec<char> = ",,==-\"'\\{}[]:.0x9eéK\u{0}\u{1F600} ".chars().collect();
        for round in 0..20_000 {
            let mut text: Vec<char> = seeds[round % 2].chars().collect();
            for _ in 0..=dice(6) {
                let at = dice(text.len());
                match dice(3) {
                    0 => text[at] = odd[dice(odd.len())],
                    1 => text.insert(at, odd[dice(odd.len())]),
                    _ => drop(text.splice(at..(at + dice(9)).min(text.len()), [])),
                }
                if text.is_empty() {
                    break;
                }
            }
            let text: String = text.into_iter().collect();
            if let Ok(options) = Options::parse(&text) {
                let _ = options.plan().map(|plan| plan.layout(&super::super::FileFacts::NONE));
            }
        }
    }
}
