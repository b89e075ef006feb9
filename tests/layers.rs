//! The floors of the house: a file imports only from lower floors or from its own folder, and only the
//! fence around the kernel holds unsafe code.

use std::fs;
use std::path::{Path, PathBuf};

/// Floor of each module of the library; the same number may not import each other, but for its own folder.
const FLOORS: [(&str, u32); 10] = [
    ("units", 0),
    ("error", 0),
    ("progress", 0),
    ("shown", 0),
    ("sys", 1),
    ("store", 2),
    ("memory", 2),
    ("control", 3),
    ("clones", 4),
    ("cli", 5),
];

fn floor(module: &str) -> u32 {
    FLOORS
        .iter()
        .find(|(name, _)| *name == module)
        .unwrap_or_else(|| panic!("{module} has no floor: add it"))
        .1
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

/// True for `remove/tests.rs` where `remove.rs` has it for tests alone.
fn is_test_module(file: &Path) -> bool {
    let parent = fs::read_to_string(file.parent().unwrap().with_extension("rs")).unwrap_or_default();
    file.ends_with("tests.rs") && parent.contains("#[cfg(test)]\nmod tests;")
}

/// The modules that a source text names behind `crate::`, also in grouped imports.
fn imports(text: &str, root: &str) -> Vec<String> {
    let mut found = Vec::new();
    let text = text.split("#[cfg(test)]").next().unwrap();
    for (at, _) in text.match_indices(root) {
        let line_start = text[..at].rfind('\n').map_or(0, |i| i + 1);
        if text[line_start..at].trim_start().starts_with("//") {
            continue;
        }
        let rest = &text[at + root.len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => found.push(std::mem::take(&mut word)),
                    c if depth == 0 => word.push(c),
                    _ => {}
                }
            }
            found.push(word);
        } else {
            found.push(rest.to_owned());
        }
    }
    found
        .iter()
        .map(|path| path.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>())
        .filter(|module| FLOORS.iter().any(|(name, _)| name == module))
        .collect()
}

#[test]
fn a_file_imports_only_from_lower_floors() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    let mut wrong = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(root.join("src")).unwrap();
        let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if module == "lib" || module == "main" {
            continue;
        }
        for import in imports(&fs::read_to_string(file).unwrap(), "crate::") {
            let same_house = import == module || floor(&import) < floor(module);
            let ground = floor(&import) == 0;
            if !same_house && !ground {
                wrong.push(format!("{} imports {import}", relative.display()));
            }
        }
    }
    assert!(files.len() > 10, "found only {} files", files.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_daemon_knows_neither_memory_nor_clones() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("mountd/src"), &mut files);
    for file in &files {
        for import in imports(&fs::read_to_string(file).unwrap(), "stencilfs::") {
            assert!(
                !["memory", "clones", "cli"].contains(&import.as_str()),
                "{} imports {import}",
                file.display()
            );
        }
    }
}

#[test]
fn unsafe_code_stays_behind_the_fence() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    sources(&root.join("mountd/src"), &mut files);
    for file in files {
        let relative = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if relative.starts_with("src/sys/") || relative == "mountd/src/server/opening.rs" {
            continue;
        }
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let block = ["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code)"];
            assert!(!block.iter().any(|b| code.contains(b)), "{relative}:{}: {line}", number + 1);
        }
    }
}

/// Lines of the store's code that open a path as the system resolves it: the files that a user names, the store's own
/// folder as the user names it, and files of the host.
const PATHS_OF_USERS: [(&str, &str); 6] = [
    ("export.rs", ""),
    ("import/request.rs", "std::fs::metadata(path)"),
    ("open.rs", "std::fs::canonicalize(dir)"),
    ("path.rs", "std::fs::canonicalize(existing)"),
    ("owner.rs", "fs::read_to_string(path)"),
    ("publish.rs", "File::open(\"/dev/urandom\")"),
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
            // Part of another name, as `PackFile::open(`; a type or function that is imported.
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
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files.retain(|file| !is_test_module(file));
    let (mut wrong, mut used) = (Vec::new(), std::collections::BTreeSet::new());
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
    let text = "use crate::{error::Error, store::{a, b}};\n// crate::clones\nlet x = crate::memory::y();\n#[cfg(test)]\ncrate::cli";
    assert_eq!(imports(text, "crate::"), ["error", "store", "memory"]);
}

/// The loop is the part of the supervisor that can fail by itself; what it decides is in the machine, which makes no system
/// call and reads no clock.
#[test]
fn the_supervisors_loop_stays_small_and_its_machine_pure() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("mountd/src/supervisor");
    let lines = fs::read_to_string(root.join("run.rs")).unwrap().lines().count();
    assert!(lines <= 450, "the supervisor's loop has {lines} lines: decisions belong to the machine");
    let mut files = Vec::new();
    sources(&root.join("machine"), &mut files);
    assert!(files.len() > 8, "{files:?}");
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let is_test = file.components().any(|part| part.as_os_str() == "tests") || file.ends_with("tests.rs");
        for call in
            ["::now()", "std::fs", "rustix::fs", "rustix::io", "fuse_dev", "thread::", "Command", "File::"]
        {
            assert!(is_test || !code.contains(call), "{}: {call}", file.display());
        }
    }
}

/// Functions of a source text with what follows them up to the next one, and whether they are tests.
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

/// The functions of a text that call one of these, also through one another.
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

/// The tests of a scenario that have longer counts, and whose name `make soak` does not take.
fn never_long(scenario: &str, text: &str, long: &[String], taken: &[&str]) -> Vec<String> {
    let callers = callers(text, long);
    let tests =
        functions(text).into_iter().filter(|(name, _, test)| *test && callers.iter().any(|c| c == name));
    tests
        .map(|(name, ..)| format!("{scenario}::{name}"))
        .filter(|path| !taken.iter().any(|word| path.contains(word)))
        .collect()
}

/// Name and text of every scenario.
fn scenarios(root: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (folder, module) in [("tests", ""), ("tests/alone", "alone::")] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "rs") {
                let name = path.file_stem().unwrap().to_str().unwrap();
                found.push((format!("{module}{name}"), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

/// Anywhere else, such a scenario makes all threads of the test harness wait until the others have ended.
#[test]
fn scenarios_that_need_the_host_for_themselves_are_in_alone() {
    let call = concat!("host::al", "one()");
    let mut seen = 0;
    for (scenario, text) in scenarios(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        let is_inside = scenario.starts_with("alone::");
        if scenario != "alone::mod" {
            assert_eq!(text.contains(call), is_inside, "{scenario}: {call}");
            assert!(!is_inside || !text.contains("host::shared()"), "{scenario} shares the host");
            seen += usize::from(is_inside);
        }
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn whoever_has_longer_counts_is_run_with_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
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
