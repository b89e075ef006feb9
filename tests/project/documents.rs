//! The documentation names what exists: tests, pages, headings, source files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

const EVIDENCE: &str = "docs/evidence.md";
const MEASUREMENT: &str = "docs/evidence-measurement.md";
const FAILURES: &str = "docs/explanation/failure-model.md";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files with that extension in a directory and below it, as paths from the root of the repository.
fn files_below(dir: &str, extension: &str) -> Vec<PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![root().join(dir)]);
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every page of the documentation, with its text.
fn pages() -> BTreeMap<PathBuf, String> {
    let others = ["README.md", "CHANGELOG.md"].map(PathBuf::from);
    let pages: BTreeMap<_, _> =
        files_below("docs", "md").into_iter().chain(others).map(|page| (page.clone(), read(page))).collect();
    assert!(pages.len() > 20, "{:?}", pages.keys());
    pages
}

/// The words in single backquotes, outside of blocks of code.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").step_by(2).flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

/// Citations of tests: `module::test`. Types of the library have a capital letter, placeholders are all capitals.
fn citations(text: &str) -> Vec<(&str, &str)> {
    let is_name = |word: &str| word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
    quoted(text)
        .filter_map(|word| word.rsplit_once("::"))
        .filter(|(module, test)| is_name(module) && is_name(test))
        .filter(|(module, _)| module.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect()
}

/// True if the path is the file of a module such as `alone::restart`, in whatever subdirectory of `tests/`.
fn is_file_of(path: &Path, module: &str) -> bool {
    let mut names: Vec<&str> = module.split("::").collect();
    let last = names.pop().unwrap();
    let stem = path.with_extension("");
    let mut directories: Vec<&str> = stem
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    if directories.last() == Some(&"mod") {
        directories.pop();
    }
    let file = directories.pop();
    let mut left = directories.iter();
    file == Some(last)
        && names.iter().all(|name| left.any(|directory| directory == name))
        && directories.contains(&"alone") == names.contains(&"alone")
        && !directories.contains(&"support")
}

fn has_test(source: &str, test: &str) -> bool {
    source.split("\n\n").any(|item| {
        let before = item.split(&format!("fn {test}()")).collect::<Vec<_>>();
        before.len() == 2 && before[0].lines().any(|line| line.trim() == "#[test]")
    })
}

/// The cited tests that do not exist.
fn missing(text: &str) -> Vec<String> {
    let sources: Vec<(PathBuf, String)> =
        files_below("tests", "rs").into_iter().map(|path| (path.clone(), read(path))).collect();
    let exists = |module: &str, test: &str| {
        sources.iter().any(|(path, source)| is_file_of(path, module) && has_test(source, test))
    };
    citations(text).iter().filter(|(m, t)| !exists(m, t)).map(|(m, t)| format!("{m}::{t}")).collect()
}

/// Text below a heading, up to the next heading of the same level or a higher one.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let level = heading.split(' ').next().unwrap().len();
    let begin = page.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no section {heading}"));
    let rest = &page[begin + heading.len() + 2..];
    let ends = (1..=level).filter_map(|n| rest.find(&format!("\n{} ", "#".repeat(n))));
    &rest[..ends.min().unwrap_or(rest.len())]
}

/// Rows of all tables of a text, split into cells, without headings.
fn table_rows(text: &str) -> Vec<Vec<&str>> {
    let mut rows: Vec<Vec<&str>> = Vec::new();
    let mut in_body = false;
    for line in text.lines() {
        if !line.starts_with('|') {
            in_body = false;
        } else if line.starts_with("|---") {
            in_body = true;
        } else if in_body {
            rows.push(line.trim_matches('|').split(" | ").map(str::trim).collect());
        }
    }
    rows
}

#[test]
fn every_test_that_evidence_names_exists() {
    for page in [EVIDENCE, MEASUREMENT, FAILURES] {
        assert_eq!(missing(&read(page)), Vec::<String>::new(), "{page}");
    }
    let invented = "`project::documents::no_such` and `nowhere::at_all`, `project::layers::a_file_imports_only_from_lower_layers`, \
                    `alone::layers::a_file_imports_only_from_lower_layers`, `failover::restart::soak_readers_survive_restarts_of_the_server`";
    assert_eq!(missing(invented).len(), 4);
}

#[test]
fn every_promise_of_evidence_names_a_test() {
    let (page, measurement) = (read(EVIDENCE), read(MEASUREMENT));
    let rows = [table_rows(&page), table_rows(&measurement)].concat();
    assert!(rows.len() >= 150, "{} rows", rows.len());
    for row in &rows {
        assert_eq!(row.len(), 2, "{row:?}");
        assert!(!citations(row[1]).is_empty(), "no test: {row:?}");
        assert_eq!(
            citations(row[1]).len(),
            quoted(row[1]).count(),
            "the second cell has tests alone: {row:?}"
        );
    }
    for (heading, least) in [
        ("## Removal and space", 15),
        ("## Mounts and serving", 15),
        ("## Handover to another build", 3),
        ("## Takeover after the death of a supervisor", 5),
        ("## Draining", 4),
        ("## Stuck connections", 3),
        ("## As a service", 5),
        ("## Security", 25),
        ("### QEMU", 2),
        ("### Firecracker", 2),
        ("### Cloud Hypervisor", 2),
        ("### libvirt", 2),
        ("### Kata Containers", 1),
    ] {
        let named: BTreeSet<_> = citations(section(&page, heading)).into_iter().collect();
        assert!(named.len() >= least, "{heading}: {named:?}");
    }
}

#[test]
fn every_failure_names_a_test() {
    let page = read(FAILURES);
    let text = section(&page, "## Failures and their effects");
    assert!(text.contains(" | Tests |\n"), "the last column has the tests");
    let rows = table_rows(text);
    assert!(rows.len() >= 20, "{}", rows.len());
    for row in rows {
        assert_eq!(row.len(), 6, "{row:?}");
        assert!(!citations(row[5]).is_empty(), "no test: {row:?}");
        assert!(row[..5].iter().all(|cell| citations(cell).is_empty()), "a test in another column: {row:?}");
    }
}

#[test]
fn only_evidence_and_the_table_of_failures_cite_tests() {
    let modules: BTreeSet<String> = files_below("tests", "rs")
        .iter()
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .filter(|name| name.contains('_'))
        .collect();
    for (page, text) in pages() {
        let text = match page.to_str().unwrap() {
            EVIDENCE | MEASUREMENT => continue,
            FAILURES => text.replace(section(&text, "## Failures and their effects"), ""),
            _ => text,
        };
        assert_eq!(citations(&text), vec![], "{}", page.display());
        // Contributors are told which scenario belongs to which source file.
        if !page.ends_with("CONTRIBUTING.md") {
            let named: Vec<_> = quoted(&text).filter(|word| modules.contains(*word)).collect();
            assert!(named.is_empty(), "{}: {named:?}", page.display());
        }
    }
}

/// The anchors of a page's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let prose: String = text.split("```").step_by(2).collect();
    let headings =
        prose.lines().filter_map(|line| line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' '));
    headings
        .map(|heading| {
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.collect::<String>().trim().to_lowercase().replace(' ', "-")
        })
        .collect()
}

/// Targets of the links in a text that lead into this repository.
fn links(text: &str) -> Vec<&str> {
    let prose = text.split("```").step_by(2);
    prose
        .flat_map(|prose| prose.split("](").skip(1))
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
        .filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
        .collect()
}

#[test]
fn every_link_leads_to_a_page_and_a_heading() {
    let mut dead = Vec::new();
    let mut count = 0;
    for (page, text) in pages() {
        for link in links(&text) {
            count += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => root().join(&page),
                path => root().join(page.parent().unwrap()).join(path),
            };
            let found = match anchor {
                "" => target.exists(),
                anchor => fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(anchor)),
            };
            if !found {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(count >= 60, "{count} links");
    assert!(dead.is_empty(), "{dead:#?}");
}

#[test]
fn every_source_file_that_a_page_names_exists() {
    let is_path = |word: &&str| {
        ["src/", "mountd/", "tests/", "docs/"].iter().any(|top| word.starts_with(top))
            && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-./@".contains(&b))
    };
    let mut count = 0;
    for (page, text) in pages() {
        for word in quoted(&text).filter(is_path) {
            count += 1;
            assert!(root().join(word).exists(), "{} names {word}", page.display());
        }
    }
    assert!(count >= 80, "{count} paths");
}

#[test]
fn pages_have_lines_of_120_columns_and_400_lines() {
    for (page, text) in pages() {
        assert!(text.lines().count() <= 400, "{} has {} lines", page.display(), text.lines().count());
        for prose in text.split("```").step_by(2) {
            let long = prose.lines().find(|line| line.chars().count() > 120 && !line.starts_with('|'));
            assert_eq!(long, None, "{}", page.display());
        }
    }
}
