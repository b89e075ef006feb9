//! References to templates: the report of a command that moves a tag, and the existing tags in the error for an unknown
//! tag.

use std::fs;

use clap::CommandFactory;
use serde_json::json;

use crate::support::store::{Fixture, random};

#[test]
fn a_moved_tag_is_reported_with_its_former_template() {
    let fixture = Fixture::new();
    let [a, b] = [1, 2].map(|seed| {
        let path = fixture.file(&format!("source-{seed}"), &random(seed, 64 << 10));
        path.to_str().unwrap().to_owned()
    });
    let run = |words: &[&str]| fixture.run(words).ok().stdout;
    let first = run(&["import", &a, "web:1"]);
    assert!(!first.contains("moved"), "{first}");
    let digest = |name: &str| fixture.store().resolve(&name.parse().unwrap()).unwrap();
    let of_a = digest("web:1");
    assert!(!run(&["import", &a, "web:1"]).contains("moved"));

    let moved = run(&["import", &b, "web:1"]);
    let expected = format!("\nweb:1 moved from {}, which has no tag now\n", of_a.short());
    assert!(moved.contains(&expected), "{moved}");
    let of_b = digest("web:1");

    let tagged = fixture.run(&["tag", &of_a.to_string(), "web:1", "--json"]).ok().json();
    let back = json!({"tag": "web:1", "former_digest": of_b, "former_untagged": true});
    assert_eq!((&tagged["tag"], &tagged["digest"]), (&json!("web:1"), &json!(of_a)), "{tagged}");
    assert_eq!(tagged["moved"], json!([back]), "{tagged}");
    assert_eq!(run(&["tag", "web:1", "web:2"]), "");

    // Another tag points at the former template.
    assert_eq!(run(&["tag", &of_b.to_string(), "web:1"]), format!("web:1 moved from {}\n", of_a.short()));
    let imported = fixture.run(&["import", &a, "web:1", "--json"]).ok().json();
    assert_eq!(imported["moved"], json!([back]), "{imported}");
    assert_eq!(fixture.run(&["import", &a, "web:1", "--json"]).ok().json()["moved"], json!([]));

    // A damaged tag may point at the former template.
    let tag = fixture.path("store/tags/web/2");
    fs::write(&tag, "damaged").unwrap();
    assert_eq!(run(&["tag", &of_b.to_string(), "web:1"]), format!("web:1 moved from {}\n", of_a.short()));
}

/// Returns the number of commands below `command` that resolve a reference to a template.
fn resolving_commands(command: &clap::Command) -> usize {
    let ids = ["template", "templates", "what", "reference"];
    let resolves = command.get_arguments().any(|arg| ids.contains(&arg.get_id().as_str()));
    usize::from(resolves) + command.get_subcommands().map(resolving_commands).sum::<usize>()
}

#[test]
fn an_unknown_tag_gives_the_existing_tags_as_a_hint() {
    let fixture = Fixture::new();
    fixture.import("web:1", &random(1, 4096));
    fixture.import("web:two", &random(2, 4096));
    fixture.import("other:1", &random(3, 4096));
    let commands = [
        &["inspect", "web"][..],
        &["tag", "web", "new:1"],
        &["rm", "web"],
        &["chmod", "0400", "web"],
        &["chown", "0", "web"],
        &["export", "web/memory", "out"],
        &["save", "web", "-o", "out"],
        &["verify", "web"],
        &["path", "web/memory"],
        &["args", "web", "--vmm", "qemu"],
        &["recipe", "edit", "web"],
        &["clone", "web", "--simulate", "read=1%,write=1%"],
        &["capacity", "web"],
        &["density", "web"],
        &["check", "--all", "--template", "web"],
        &["warm", "web"],
        &["working-set", "ls", "web"],
        &["working-set", "rm", "web"],
    ];
    assert_eq!(commands.len(), resolving_commands(&stencilfs::cli::Cli::command()));
    for command in [&commands[..], &[&["save", "other:1", "--without", "web", "-o", "out"]]].concat() {
        let error = &fixture.run(&[&["--json"], command].concat()).json()["error"];
        assert_eq!(
            (&error["code"], &error["message"]),
            (&json!("not-found"), &json!("no template 'web:latest'"))
        );
        assert_eq!(error["remedy"], "use an existing tag: web:1, web:two", "{command:?}");
    }
    let hint = |name: &str| fixture.run(&["inspect", name]).stderr;
    assert!(hint("no-such").contains("hint: run 'stencil ls'"), "{}", hint("no-such"));
    assert!(hint("abcdef0123").contains("hint: run 'stencil ls'"));
    let digest = fixture.store().resolve(&"web:1".parse().unwrap()).unwrap().to_string();
    (10..20).for_each(|number| drop(fixture.run(&["tag", &digest, &format!("many:{number}")]).ok()));
    let many = hint("many");
    assert!(many.contains("many:10, many:11, "), "{many}");
    assert!(many.ends_with("many:17, …; run 'stencil ls many' to list all 10\n"), "{many}");
}

#[test]
fn ls_of_a_name_without_tags_is_not_found() {
    let fixture = Fixture::new();
    fixture.import("web:1", &random(1, 4096));
    assert!(fixture.run(&["ls", "web"]).ok().stdout.contains("web"));
    for name in ["we", "web:1", "other", ""] {
        let listed = fixture.run(&["ls", name]);
        assert_eq!((listed.code, listed.stdout.as_str()), (4, ""), "{listed:?}");
        assert!(listed.stderr.contains(&format!("no tag has the name '{name}'")), "{listed:?}");
    }
    fixture.run(&["rm", "web:1"]).ok();
    assert_eq!(fixture.run(&["ls", "web"]).code, 4);
    assert_eq!(fixture.run(&["ls"]).code, 0);
}
