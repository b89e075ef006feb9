//! The layers of the source code: imports go in one direction, and only the layer of kernel interfaces has unsafe code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::pages::imports::{Crate, circles, module_path};

/// Layer of each module of the library. Modules with the same number may not import each other. Every module may import
/// those of layer 0.
const LAYERS: [(&str, u32); 12] = [
    ("units", 0),
    ("error", 0),
    ("json_log", 0),
    ("progress", 0),
    ("sanitize", 0),
    ("sys", 1),
    ("store", 2),
    ("memory", 2),
    ("control", 3),
    ("templates", 3),
    ("clones", 4),
    ("cli", 5),
];

/// Modules of the store, the lowest first; each imports only from those before it.
const LAYERS_OF_STORE: [&str; 7] = ["format", "disk", "names", "read", "write", "maintain", "transfer"];

/// Modules of the daemon, with those that they may import. Supervisor and server are separate processes.
const LAYERS_OF_DAEMON: [(&str, &[&str]); 4] = [
    ("protocol", &[]),
    ("server", &["protocol"]),
    ("supervisor", &["protocol"]),
    ("startup", &["protocol", "supervisor"]),
];

/// Largest number of source files in one folder.
const MAX_FILES: usize = 14;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn library() -> Crate {
    Crate::read(&root().join("src/lib.rs"))
}

fn daemon() -> Crate {
    Crate::read(&root().join("mountd/src/main.rs"))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// True for a file such as `remove/tests.rs` if `remove.rs` declares the module under `#[cfg(test)]`.
fn is_test_module(file: &Path) -> bool {
    let parent = fs::read_to_string(file.parent().unwrap().with_extension("rs")).unwrap_or_default();
    file.ends_with("tests.rs") && parent.contains("#[cfg(test)]\nmod tests;")
}

/// Returns the imports between modules directly in `folder` that `may_import` does not allow.
fn forbidden(all: &Crate, folder: &[&str], may_import: impl Fn(&str, &str) -> bool) -> BTreeSet<String> {
    let folder: Vec<String> = folder.iter().map(|name| (*name).to_owned()).collect();
    let inside = |path: &[String]| path.get(folder.len()).filter(|_| path.starts_with(&folder)).cloned();
    let children: BTreeSet<String> = all.modules().filter_map(|module| inside(module)).collect();
    let mut wrong = BTreeSet::new();
    for module in all.modules() {
        let Some(own) = inside(module) else { continue };
        // An import counts for the path as it is written and for the module that defines the item, so that a re-export
        // hides neither.
        let paths = all.imports(module).into_iter().flat_map(|(written, target)| [written, target]);
        let others = paths.filter_map(|path| inside(&path)).filter(|other| children.contains(other));
        for other in others.filter(|other| *other != own && !may_import(&own, other)) {
            wrong.insert(format!("{} imports {other}", module_path(module)));
        }
    }
    assert!(children.len() > 3, "{children:?}");
    wrong
}

#[test]
fn a_file_imports_only_from_lower_layers() {
    let layer = |module: &str| {
        let found = LAYERS.iter().find(|(name, _)| *name == module);
        found.unwrap_or_else(|| panic!("{module} has no layer: add it")).1
    };
    let wrong = forbidden(&library(), &[], |one, other| layer(other) < layer(one) || layer(other) == 0);
    assert!(wrong.is_empty(), "{wrong:#?}");

    let layer = |module: &str| {
        let found = LAYERS_OF_STORE.iter().position(|name| *name == module);
        found.unwrap_or_else(|| panic!("{module} of the store has no layer: add it"))
    };
    let wrong = forbidden(&library(), &["store"], |one, other| layer(other) < layer(one));
    assert!(wrong.is_empty(), "{wrong:#?}");

    let lower = |module: &str| {
        let found = LAYERS_OF_DAEMON.iter().find(|(name, _)| *name == module);
        found.unwrap_or_else(|| panic!("{module} of the daemon has no layer: add it")).1
    };
    let wrong = forbidden(&daemon(), &[], |one, other| lower(one).contains(&other));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Everything else is private or, with the feature `internals`, hidden.
#[test]
fn other_programs_see_four_modules() {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let (mut public, mut attributes) = (BTreeSet::new(), String::new());
    for line in text.lines() {
        if line.starts_with("#[") {
            attributes += line;
            continue;
        }
        let is_hidden = attributes.contains("any(test, fuzzing)")
            || attributes.starts_with("#[cfg(feature = ") && attributes.contains("doc(hidden)");
        if let Some(name) = line.strip_prefix("pub mod ").filter(|_| !is_hidden) {
            public.insert(name.trim_end_matches(';'));
        }
        attributes.clear();
    }
    assert_eq!(public, BTreeSet::from(["error", "memory", "templates", "units"]));
}

#[test]
fn the_daemon_knows_neither_memory_nor_clones() {
    let names = daemon().names_of("stencilfs");
    assert!(names.len() > 10);
    for (module, name) in names {
        assert!(
            !["memory", "clones", "cli"].contains(&name.as_str()),
            "{} imports {name}",
            module_path(&module)
        );
    }
}

#[test]
fn imports_form_no_circle() {
    for all in [library(), daemon()] {
        let mut found = circles(&all.files());
        found.extend(all.folders().iter().flat_map(circles));
        assert!(found.is_empty(), "{found:#?}");
    }
}

#[test]
fn folders_stay_small() {
    let mut files = Vec::new();
    for folder in ["src", "mountd/src", "tests"] {
        sources(&root().join(folder), &mut files);
    }
    let mut counts = BTreeMap::new();
    for file in &files {
        let folder = file.parent().unwrap().strip_prefix(root()).unwrap();
        *counts.entry(folder.to_str().unwrap()).or_insert(0) += 1;
    }
    counts.retain(|_, count| *count > MAX_FILES);
    assert!(counts.is_empty(), "more than {MAX_FILES} files: {counts:?}");
}

#[test]
fn unsafe_code_stays_behind_the_fence() {
    let root = root();
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    sources(&root.join("mountd/src"), &mut files);
    for file in files {
        let relative = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if relative.starts_with("src/sys/") || relative == "mountd/src/server/adapter.rs" {
            continue;
        }
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let block = ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code)"];
            assert!(!block.iter().any(|b| code.contains(b)), "{relative}:{}: {line}", number + 1);
        }
    }
}

/// Lines of the store's code that open a path as the system resolves it: the files that a user names, and the store's
/// own folder as the user names it.
const PATHS_OF_USERS: [(&str, &str); 4] = [
    ("read/export.rs", ""),
    ("write/import/request.rs", "std::fs::metadata(path)"),
    ("disk/open.rs", "std::fs::canonicalize(dir)"),
    ("disk/path.rs", "std::fs::canonicalize(existing)"),
];

/// The first call in a line of code that resolves a path as the system does, following links.
fn resolves_a_path(line: &str) -> Option<&str> {
    let code = line.split("//").next().unwrap();
    let calls = [
        "fs::",
        "File::open(",
        "File::create",
        "File::options(",
        "OpenOptions::",
        "DirBuilder::",
        "tempfile",
    ];
    let found = |call: &str| {
        code.match_indices(call).find(|(at, _)| {
            let before = code[..*at].strip_suffix("std::").unwrap_or(&code[..*at]);
            let rest = &code[at + call.len()..];
            // Two kinds of matches do not count: a part of another name, such as `PackFile::open(`, and the import of a
            // type or function.
            !before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
                && (call != "fs::"
                    || rest.split('(').next().unwrap().chars().all(|c| c.is_lowercase() || c == '_'))
                && (call != "fs::" || rest.contains('('))
        })
    };
    calls.iter().find_map(|call| found(call).map(|(at, _)| &code[at..]))
}

#[test]
fn the_store_opens_nothing_by_path() {
    let root = root().join("src/store");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files.retain(|file| !is_test_module(file));
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for file in files {
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.split("#[cfg(test)]").next().unwrap().lines().enumerate() {
            if resolves_a_path(line).is_none() {
                continue;
            }
            let exception = PATHS_OF_USERS.iter().find(|(file, part)| *file == name && line.contains(part));
            match exception {
                Some(exception) => drop(used.insert(exception)),
                None => wrong.push(format!("{name}:{}: {line}", number + 1)),
            }
        }
    }
    assert!(wrong.is_empty(), "use StorePath: {wrong:#?}");
    assert_eq!(used.len(), PATHS_OF_USERS.len(), "an exception is not needed any more: {used:?}");

    let found =
        ["fs::read(&path)", "let x = std::fs::rename(a, b);", "File::open(path)", "tempfile::tempfile_in(x)"];
    found.iter().for_each(|line| assert!(resolves_a_path(line).is_some(), "{line}"));
    let passed = ["use std::fs::File;", "PackFile::open(own)", "// fs::read(x)", "rustix::fs::statvfs(dir)"];
    passed.iter().for_each(|line| assert!(resolves_a_path(line).is_none(), "{line}"));
}

#[test]
fn the_reader_of_imports_sees_groups_and_passes_over_comments() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    };
    write("lib.rs", "mod a; mod b; mod c;\n#[cfg(test)]\nmod tests;");
    write(
        "a.rs",
        "use crate::{b::{Item, deep::f as g}, std::x};\n// crate::c::X\nconst A: &str = \"crate::c::X\";\n#[cfg(test)] mod t { use crate::c::X; }\nfn h() { other::crate_(g) }",
    );
    write(
        "b/mod.rs",
        "pub(crate) mod deep; mod item;\npub(in crate::b) use self::item::Own; pub use item::Item;",
    );
    write("b/deep.rs", "fn f() -> super::Own { print_line!(c::call(1)) }\nuse crate::c;");
    write("b/item.rs", "pub struct Item; pub struct Own(pub (u8, u8));");
    write("c.rs", "#[arg(parser = crate::b::parse)] fn call() { <u8 as crate::T>::b::x() }");
    let all = Crate::read(&dir.path().join("lib.rs"));
    let imports = |module: &str| {
        let module: Vec<String> = module.split("::").map(str::to_owned).collect();
        all.imports(&module).iter().map(|(_, target)| module_path(target)).collect::<Vec<_>>()
    };
    assert_eq!(imports("a"), ["b::item", "b::deep", "crate"]);
    assert_eq!(imports("b"), [""; 0]);
    assert_eq!(imports("b::deep"), ["b::item", "c", "c"]);
    assert_eq!(imports("c"), ["crate", "b"]);
    assert_eq!(circles(&all.files()), [[""; 0]; 0]);
    let folders: Vec<_> = all.folders().iter().flat_map(circles).collect();
    assert_eq!(folders, [["b::deep imports c", "c imports b"]]);
}

/// The loop makes the system calls of the supervisor, which can fail. The decisions are in the machine, which makes no
/// system call and reads no clock.
#[test]
fn the_supervisors_loop_stays_small_and_its_machine_pure() {
    let root = root().join("mountd/src/supervisor");
    let lines = fs::read_to_string(root.join("run.rs")).unwrap().lines().count();
    assert!(lines <= 450, "the supervisor's loop has {lines} lines: decisions belong to the machine");
    let mut files = Vec::new();
    sources(&root.join("machine"), &mut files);
    assert!(files.len() > 8, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let is_test = file.components().any(|part| part.as_os_str() == "tests") || file.ends_with("tests.rs");
        for call in [
            "::now()",
            "std::fs",
            "rustix::fs",
            "rustix::io",
            "fuse::device",
            "thread::",
            "Command",
            "File::",
        ] {
            assert!(is_test || !code.contains(call), "{}: {call}", file.display());
        }
    }
}

/// Returns the name of each function of a source text, the text from there to the next function, and whether the
/// function is a test.
fn functions(text: &str) -> Vec<(&str, &str, bool)> {
    let starts: Vec<usize> = text
        .match_indices("fn ")
        .map(|(at, _)| at)
        .filter(|at| {
            let line = &text[text[..*at].rfind('\n').map_or(0, |i| i + 1)..*at];
            line.trim_start().split(' ').all(|word| word.is_empty() || word.starts_with("pub"))
        })
        .collect();
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    let one = |(at, end): (&usize, usize)| {
        let name = text[at + 3..].split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
        let (before, body) = (text[..*at].trim_end(), &text[at + 3 + name.len()..end]);
        (name, body, before.ends_with("#[test]"))
    };
    starts.iter().zip(ends).map(one).collect()
}

/// True when the text calls one of these functions.
fn calls(text: &str, names: &[String]) -> bool {
    let after = |at: usize| text[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_');
    names.iter().any(|name| text.match_indices(&format!("{name}(")).any(|(at, _)| !after(at)))
}

/// The functions of a text that call one of these, directly or through other functions of the text.
fn callers(text: &str, names: &[String]) -> Vec<String> {
    let mut all = names.to_vec();
    loop {
        let found = functions(text)
            .into_iter()
            .filter(|(name, body, _)| !all.contains(&(*name).to_owned()) && calls(body, &all));
        let found: Vec<String> = found.map(|(name, ..)| name.to_owned()).collect();
        if found.is_empty() {
            return all.split_off(names.len());
        }
        all.extend(found);
    }
}

/// The tests of a scenario that have longer counts, and whose names `make soak` does not select.
fn never_long(scenario: &str, text: &str, long: &[String], taken: &[&str]) -> Vec<String> {
    let callers = callers(text, long);
    let tests =
        functions(text).into_iter().filter(|(name, _, test)| *test && callers.iter().any(|c| c == name));
    tests
        .map(|(name, ..)| format!("{scenario}::{name}"))
        .filter(|path| !taken.iter().any(|word| path.contains(word)))
        .collect()
}

/// Path and text of every scenario.
fn scenarios(root: &Path) -> Vec<(String, String)> {
    let tests = root.join("tests");
    let mut files = Vec::new();
    sources(&tests, &mut files);
    let mut found = Vec::new();
    for file in files {
        let relative = file.strip_prefix(&tests).unwrap().with_extension("");
        let path: Vec<&str> = relative.iter().map(|part| part.to_str().unwrap()).collect();
        if path[0] != "support" && path.last() != Some(&"mod") && path != ["suite"] {
            found.push((path.join("::"), fs::read_to_string(&file).unwrap()));
        }
    }
    found
}

/// Anywhere else, such a scenario makes all threads of the test harness wait until the others have ended.
#[test]
fn scenarios_that_need_the_host_for_themselves_are_in_alone() {
    let call = concat!("host::al", "one()");
    let mut seen = 0;
    for (scenario, text) in scenarios(root()) {
        let is_inside = scenario.starts_with("alone::");
        assert_eq!(text.contains(call), is_inside, "{scenario}: {call}");
        assert!(!is_inside || !text.contains("host::shared()"), "{scenario} shares the host");
        seen += usize::from(is_inside);
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn whoever_has_longer_counts_is_run_with_them() {
    let root = root();
    let makefile = fs::read_to_string(root.join("Makefile")).unwrap();
    let soak = makefile.lines().find(|line| line.contains("_SOAK=1 ")).unwrap();
    let taken: Vec<&str> = soak.split_once(" -- ").unwrap().1.split(' ').collect();
    assert!(taken.contains(&"soak"), "{soak}");
    let mut long = ["rounds", "soaking"].map(str::to_owned).to_vec();
    let mut files = Vec::new();
    sources(&root.join("tests/support"), &mut files);
    for file in files.drain(..) {
        long.extend(callers(&fs::read_to_string(file).unwrap(), &long));
    }
    let mut wrong = Vec::new();
    for (scenario, text) in scenarios(root) {
        let own = concat!("STENCIL", "_SOAK");
        assert!(!text.contains(own), "{scenario} asks for {own} itself instead of host.rs");
        wrong.extend(never_long(&scenario, &text, &long, &taken));
    }
    assert!(wrong.is_empty(), "no word of {taken:?} is in the name of {wrong:#?}");

    let text = "fn long() { more(1) }\n#[test]\nfn a() { long(); }\n#[test]\nfn b() { belong(); }\n\
                #[test]\npub fn soak_c() {\n    long()\n}\n";
    let more = ["more".to_owned()];
    assert_eq!(never_long("x", text, &more, &["soak", "kill"]), ["x::a"]);
    assert_eq!(never_long("kill_x", text, &more, &["soak", "kill"]), Vec::<String>::new());
}
