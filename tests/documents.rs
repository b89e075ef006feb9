//! Promises name the tests that would fail without them, and these exist.

use std::fs;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What stands in backquotes and names a scenario (`kill_qemu`, `alone::restart`) and a test of it. A type of the library
/// has a capital letter, and other things with `::` have other signs.
fn named(text: &str) -> Vec<(&str, &str)> {
    let is_name = |word: &str| word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
    let words = text.split('`').skip(1).step_by(2).filter_map(|word| word.rsplit_once("::"));
    words
        .filter(|(scenario, test)| is_name(scenario) && is_name(test))
        .filter(|(scenario, _)| scenario.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect()
}

fn missing(text: &str) -> Vec<String> {
    let exists = |(scenario, test): &(&str, &str)| {
        fs::read_to_string(root().join(format!("tests/{}.rs", scenario.replace("::", "/"))))
            .is_ok_and(|source| source.contains(&format!("fn {test}()")))
    };
    named(text).iter().filter(|pair| !exists(pair)).map(|(s, t)| format!("{s}::{t}")).collect()
}

#[test]
fn every_test_that_a_page_names_exists() {
    let folder = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages: Vec<_> = folder.chain([root().join("README.md"), root().join("CHANGELOG.md")]).collect();
    assert!(pages.len() > 9, "{pages:?}");
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        assert_eq!(missing(&text), Vec::<String>::new(), "{}", page.display());
        let least = match page.file_name().unwrap().to_str().unwrap() {
            "operating.md" => 40,
            "compatibility.md" => 5,
            _ => 0,
        };
        assert!(named(&text).len() >= least, "{}: {:?}", page.display(), named(&text));
    }
    assert_eq!(
        missing(
            "`documents::no_such` and `nowhere::at_all`, `layers::a_file_imports_only_from_lower_floors`"
        )
        .len(),
        2
    );
}

#[test]
fn what_other_vmms_get_names_tests_that_exist() {
    let page = fs::read_to_string(root().join("docs/vmms.md")).unwrap();
    for vmm in ["QEMU", "Firecracker", "libvirt", "Kata Containers"] {
        let section = page.split(&format!("## {vmm}\n")).nth(1).unwrap_or_else(|| panic!("no section {vmm}"));
        assert!(!named(section.split("\n## ").next().unwrap()).is_empty(), "{vmm} names no test");
    }
}

#[test]
fn every_failure_names_a_test() {
    let page = fs::read_to_string(root().join("docs/operating.md")).unwrap();
    let section = page.split("## What a clone sees").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() >= 14, "{}", rows.len());
    for row in rows {
        let cells = row.trim_matches('|').split(" | ").count();
        assert_eq!(cells, 6, "{row}");
        assert!(!named(row).is_empty(), "no test: {row}");
    }
    for title in ["Another build", "A lost supervisor", "Draining", "What is stuck", "As a service"] {
        let section =
            page.split(&format!("## {title}\n")).nth(1).unwrap_or_else(|| panic!("no section {title}"));
        assert!(!named(section.split("\n## ").next().unwrap()).is_empty(), "{title} names no test");
    }
}
