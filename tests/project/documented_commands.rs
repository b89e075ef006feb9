//! The commands of README.md, of the tutorial and of the how-to pages run as the pages show them, and their output is
//! the shown output.
//!
//! Each page is one session of a reader: a fresh home directory and a bash that runs every line that begins with `$ `,
//! in order (`support::pages::session`). Output is compared line by line; `support::pages::page` has the rules for
//! parts that vary. A command that fails must be followed by `$ echo $?`. A page may name the environment that it
//! needs: `<!-- environment: NAME -->`, see [`prepare`].
//!
//! `make docs-record` (`STENCIL_UPDATE_DOCS=1`) writes the real output into the pages, and draws docs/tutorial.svg.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::exporter;
use crate::support::host;
use crate::support::mount::{UNSEEN, copy_program, run};
use crate::support::pages::page::{Block, blocks, line_matches, matches, updated, violations};
use crate::support::pages::session::{Outcome, Session};
use crate::support::pages::svg::terminal;
use crate::support::vm::{self, guest};

/// Blocks of one page that may say `not-run`.
const MAX_NOT_RUN: usize = 2;
/// Longest README.
const README_LINES: usize = 150;
/// How long a command is repeated if it fails because a process of another scenario cannot be inspected.
const RETRY_LIMIT: Duration = Duration::from_secs(30);

macro_rules! pages {
    ($($test:ident $path:literal)*) => {
        const PAGES: &[&str] = &[$($path),*];
        $(#[test] fn $test() { check_page($path); })*
    };
}

pages! {
    readme "README.md"
    tutorial "docs/tutorial.md"
    admit_clones "docs/how-to/admit-clones.md"
    cloud_hypervisor_page "docs/how-to/cloud-hypervisor.md"
    firecracker_page "docs/how-to/firecracker.md"
    jails "docs/how-to/jails.md"
    kata "docs/how-to/kata.md"
    libvirt "docs/how-to/libvirt.md"
    monitoring "docs/how-to/monitoring.md"
    move_templates "docs/how-to/move-templates.md"
    plan_capacity "docs/how-to/plan-capacity.md"
    qemu "docs/how-to/qemu.md"
    questions "docs/how-to/questions.md"
    recipes "docs/how-to/recipes.md"
    record_and_report "docs/how-to/record-and-report.md"
    remove_templates "docs/how-to/remove-templates-and-free-space.md"
    renew_clones "docs/how-to/renew-clones.md"
    rust_vmm "docs/how-to/rust-vmm.md"
    stuck_mount "docs/how-to/stuck-mount.md"
    systemd_and_fstab "docs/how-to/systemd-and-fstab.md"
    upgrade "docs/how-to/upgrade.md"
}

fn updating() -> bool {
    std::env::var_os("STENCIL_UPDATE_DOCS").is_some()
}

fn path_of(page: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(page)
}

fn read(page: &str) -> String {
    fs::read_to_string(path_of(page)).unwrap_or_else(|e| panic!("{page}: {e}"))
}

/// Prepares the host of a page.
fn prepare(environment: &str, session: &mut Session) {
    let home = session.home();
    match environment {
        // A kernel and an initramfs to boot. The kernel's command line turns off features that are slow without KVM.
        "guest-kernel" => {
            let [kernel, initramfs, append] = guest::linux();
            fs::copy(kernel, home.join("vmlinuz")).unwrap();
            fs::copy(initramfs, home.join("initramfs")).unwrap();
            let program = format!(
                "#!/bin/bash\nexec /usr/bin/qemu-system-x86_64 \"${{@/#kvm/tcg}}\" -append '{append}'\n"
            );
            install(&session.bin().join("qemu-system-x86_64"), &program);
        }
        // A store with the template `guest:v1`, captured from a running QEMU.
        "captured-guest" => guest::give_to(&session.store()),
        // A store with the template `web:1`: 64 MiB, of which 32 MiB are not zero. Mounted at /srv/templates.
        "mounted-template" => {
            tell(session, "seq 1 9999999 | head -c 32M >memory && truncate -s 64M memory");
            tell(session, "mkdir /srv/templates && stencil -q import memory web:1 && rm memory");
            tell(session, "stencil -q mount /srv/templates");
        }
        // Prometheus, promtool, and the examples of an installed documentation.
        "prometheus" => {
            for program in ["prometheus", "promtool"] {
                copy_program(exporter::program(program), session.bin().join(program));
            }
            let examples = path_of("docs/reference/monitoring");
            let installed = "/usr/local/share/doc/stencil/examples";
            let copy = format!("cp {}/{{alerts.yml,dashboard.json}} {installed}", examples.display());
            tell(session, &format!("mkdir -p {installed} && {copy}"));
        }
        // A Firecracker with a guest; its API socket is fc.sock.
        "running-firecracker" => {
            for program in ["firecracker", "jailer"] {
                copy_program(vm::firecracker::program(program), session.bin().join(program));
            }
            // The guest writes pages again and again.
            let commands = "while sleep 0.05; do printf w; done";
            tell(session, &format!("{commands} | firecracker --api-sock fc.sock >fc.log &"));
            tell(session, "until [ -S fc.sock ]; do sleep 0.1; done");
            let kernel = vm::firecracker::guest().display();
            for (object, body) in [
                ("boot-source", format!(r#"{{"kernel_image_path": "{kernel}"}}"#)),
                (
                    "machine-config",
                    r#"{"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true}"#.to_owned(),
                ),
                ("actions", r#"{"action_type": "InstanceStart"}"#.to_owned()),
            ] {
                tell(
                    session,
                    &format!("curl -sf --unix-socket fc.sock -X PUT http://localhost/{object} -d '{body}'"),
                );
            }
            tell(session, "until grep -q '^R' fc.log; do sleep 0.1; done");
        }
        // A snapshot as Cloud Hypervisor 51 writes it.
        "cloud-hypervisor-snapshot" => {
            use crate::support::vm::cloud_hypervisor::{Version, anonymous, config, state};
            tell(session, "mkdir snapshot && seq 1 9999999 | head -c 32M >snapshot/memory-ranges");
            let memory = [("mem0", 0, 32 << 20, 0)];
            let files = [config(Version::V51, anonymous(Version::V51, 32 << 20)), state(&memory, &memory)];
            for (name, json) in ["config.json", "state.json"].into_iter().zip(files) {
                fs::write(home.join("snapshot").join(name), json.to_string()).unwrap();
            }
        }
        // The files that Kata's factory makes: a template of QEMU, and a template of Cloud Hypervisor on a tmpfs, as
        // Kata mounts it.
        "kata-factory" => {
            let memory = "seq 1 9999999 | head -c 32M >/run/vc/vm/template/memory";
            tell(session, &format!("mkdir -p /run/vc/vm/template && {memory}"));
            tell(session, "seq 1 9999 >/run/vc/vm/template/state");
            tell(session, &format!("mount -t tmpfs -o size=40M tmpfs /run/vc/vm/template && {memory}"));
            tell(session, "cd /run/vc/vm/template && echo '{}' | tee config.json >state.json; cd");
        }
        _ => panic!("unknown environment '{environment}'"),
    }
}

fn install(path: &Path, script: &str) {
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[track_caller]
fn tell(session: &mut Session, command: &str) {
    let outcome = session.run(command).unwrap();
    assert_eq!(outcome.code, 0, "{command}: {}", outcome.text);
}

/// Runs a command. Repeats the command while its error is that a process of another scenario cannot be inspected.
fn outcome(session: &mut Session, command: &str) -> Result<Outcome, String> {
    let end = Instant::now() + RETRY_LIMIT;
    loop {
        let outcome = session.run(command)?;
        if outcome.code != 75 || !outcome.text.contains(UNSEEN) || Instant::now() > end {
            return Ok(outcome);
        }
    }
}

/// Saves a block as a file at this path.
fn save(session: &mut Session, block: &Block, path: &str) {
    let text = block.lines.join("\n").replace('\'', "'\\''");
    tell(session, &format!("mkdir -p \"$(dirname {path})\" && printf '%s\\n' '{text}' >{path}"));
}

/// Runs a page. Returns its lines with the real output of the commands, and the differences from the shown output.
fn run_page(page: &str) -> (Vec<String>, Vec<String>) {
    let text = read(page);
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let mut faults = violations(&text);
    let mut replacements: Vec<(std::ops::Range<usize>, Vec<String>)> = Vec::new();
    let (mut not_run, mut ran) = (0, 0);
    let mut session = Session::start();
    let environments =
        text.lines().filter_map(|line| line.strip_prefix("<!-- environment: ")?.strip_suffix(" -->"));
    environments.for_each(|environment| prepare(environment, &mut session));
    let mut failed: Option<(usize, i32)> = None;
    'page: for block in blocks(&text) {
        if let Some(path) = block.option("file") {
            save(&mut session, &block, path);
        }
        if block.language != "console" {
            continue;
        }
        if let Some(reason) = block.option("not-run") {
            println!("{page}:{}: not run: {reason}", block.line + 1);
            not_run += 1;
            continue;
        }
        let varies = block.varies();
        for step in block.steps() {
            let at = step.line + 1;
            if let Some((line, code)) = failed.take().filter(|_| step.command != "echo $?") {
                faults.push(format!("line {line}: exit code {code}, and the page does not show it"));
            }
            let outcome = match outcome(&mut session, &step.command) {
                Ok(outcome) => outcome,
                Err(why) => {
                    faults.push(format!("line {at}: {}: {why}", step.command));
                    break 'page;
                }
            };
            ran += 1;
            failed = (outcome.code != 0).then_some((at, outcome.code));
            let real: Vec<String> = outcome.text.lines().map(|line| line.trim_end().to_owned()).collect();
            let agrees = matches(&step.shown, &real, &varies);
            let first = step.line + step.length;
            let has_gap = step.shown.iter().any(|line| line == "[...]");
            if !agrees || (updating() && !has_gap) {
                replacements.push((first..first + step.shown.len(), updated(&step.shown, &real)));
            }
            if !agrees {
                faults.push(format!(
                    "line {at}: $ {}\n{}",
                    step.command,
                    difference(&step.shown, &real, &varies)
                ));
            }
        }
    }
    if let Some((line, code)) = failed {
        faults.push(format!("line {line}: exit code {code}, and the page does not show it"));
    }
    if page == "README.md" || page == "docs/tutorial.md" {
        let left = session.leftovers();
        faults.extend(left.iter().map(|what| format!("left behind at the end of the page: {what}")));
    }
    println!("{page}: {ran} commands run, {not_run} blocks not run");
    assert!(not_run <= MAX_NOT_RUN, "{page}: {not_run} blocks are not run");
    assert!(ran > 0, "{page}: no command is run");
    for (range, new) in replacements.into_iter().rev() {
        lines.splice(range, new);
    }
    (lines, faults)
}

/// Returns the lines of both outputs: equal lines begin with a blank, further shown lines with `-`, further real lines
/// with `+`.
fn difference(shown: &[String], real: &[String], varies: &[&str]) -> String {
    let same = shown.iter().zip(real).take_while(|(s, r)| line_matches(s, r, varies)).count();
    let with =
        |sign: &str, lines: &[String]| lines.iter().map(|l| format!("    {sign} {l}\n")).collect::<String>();
    with(" ", &shown[..same]) + &with("-", &shown[same..]) + &with("+", &real[same..])
}

fn check_page(page: &str) {
    let _host = host::shared();
    let (lines, faults) = run_page(page);
    if updating() {
        let new = lines.join("\n") + "\n";
        fs::write(path_of(page), &new).unwrap();
        if page == "docs/tutorial.md" {
            fs::write(path_of("docs/tutorial.svg"), recorded(&new)).unwrap();
        }
    }
    let fatal = |fault: &&String| !updating() || !fault.contains("\n    ");
    let faults: Vec<&String> = faults.iter().filter(fatal).collect();
    let text = faults.iter().map(|fault| format!("{page}: {fault}\n")).collect::<String>();
    assert!(faults.is_empty(), "{text}make docs-record writes the real output into the page");
}

/// The image of a page's recorded blocks.
fn recorded(text: &str) -> String {
    let parts = blocks(text).into_iter().filter(|block| block.has("record")).map(|block| block.lines);
    let lines: Vec<String> = parts.collect::<Vec<_>>().join(&String::new());
    terminal("A first template and its clones", &lines)
}

#[test]
fn every_page_is_run_and_keeps_the_rules() {
    let mut found: Vec<String> = fs::read_dir(path_of("docs/how-to"))
        .unwrap()
        .map(|entry| format!("docs/how-to/{}", entry.unwrap().file_name().display()))
        .chain(["README.md", "docs/tutorial.md"].map(str::to_owned))
        .collect();
    let mut listed: Vec<&str> = PAGES.to_vec();
    found.sort();
    listed.sort();
    assert_eq!(found, listed, "each page has a test in this file");
    assert!(
        read("README.md").lines().count() <= README_LINES,
        "README.md has more than {README_LINES} lines"
    );
    for page in PAGES {
        let (text, name) = (read(page), page.rsplit('/').next().unwrap());
        assert_eq!(violations(&text), Vec::<String>::new(), "{page}");
        if page.starts_with("docs/how-to/") {
            for title in ["## Before you start", "## Check", "## If it fails"] {
                assert!(text.lines().any(|line| line == title), "{page} has no section '{title}'");
            }
            assert!(read("README.md").contains(name), "README.md has no link to {page}");
        }
    }
}

#[test]
fn the_image_of_the_tutorial_is_drawn_from_the_page() {
    // In an update the page may be written at this moment.
    if !updating() {
        assert_eq!(read("docs/tutorial.svg"), recorded(&read("docs/tutorial.md")), "run make docs-record");
    }
}

#[test]
fn a_page_that_is_not_true_is_found() {
    let broken = [
        ("```\n$ ls\n```\n", "not marked"),
        ("```sh\nls\n```\n", "'console'"),
        ("    $ ls\n", "outside"),
        ("```console,notrun=x\n$ ls\n```\n", "unknown word"),
        ("```console,varies=all\n$ ls\n```\n", "unknown classes"),
        ("```console\nls\n```\n", "begin with a command"),
        (" ```console\n $ ls\n ```\n", "indented"),
    ];
    for (text, words) in broken {
        let found = violations(text);
        assert!(found.iter().any(|fault| fault.contains(words)), "{text}: {found:?}");
    }
    assert_eq!(violations("```console,varies=id+size,record\n$ ls\n> -l\nfile\n```\n"), Vec::<String>::new());

    let same = |shown: &str, real: &str, varies: &[&str]| line_matches(shown, real, varies);
    assert!(same("8 clones  take", "8 clones take", &[]) && !same("8 clones take", "9 clones take", &[]));
    assert!(same("page tables  4.44 MiB", "page tables  900 KiB", &["size"]));
    assert!(!same("page tables  4.44 MiB", "page tables", &["size"]));
    assert!(!same(
        "page tables  4.44 MiB",
        "page tables  900 KiB",
        &["pid", "id", "time", "digest", "ratio"]
    ));
    assert!(same("removed blake3:[..] at last", "removed blake3:12ab at last", &[]));
    assert!(!same("removed blake3:[..] at last", "removed blake3:12ab at", &[]));
    assert!(same("c0ffee12  4711  running  1s", "c1a2b3c4  17  running  12s", &["id", "pid", "time"]));
    assert!(!same("c0ffee12  4711  running  1s", "c1a2b3c4  17  ended  12s", &["id", "pid", "time"]));
    assert!(same("-name web-c0ffee12", "-name web-c1a2b3c4", &["id"]));
    assert!(!same("-name web-c0ffee12", "-name db-c1a2b3c4", &["id"]));
    assert!(
        same("in 1.2 s.", "in 900 ms.", &["time"])
            && same("port 127.0.0.1:80", "port 127.0.0.1:9", &["address"])
    );
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(matches(&lines("a\n[...]\nd"), &lines("a\nb\nc\nd"), &[]));
    assert!(
        !matches(&lines("a\n[...]\nd"), &lines("a\nb\nc"), &[]) && !matches(&lines("a"), &lines("a\nb"), &[])
    );
    assert_eq!(updated(&lines("x [..]\nold"), &lines("new\nx 1\ny")), lines("new\nx [..]\ny"));
}

#[test]
fn a_session_is_a_readers_and_ends_with_everything_in_it() {
    let mut session = Session::start();
    let mut says = |command: &str| session.run(command).map(|o| (o.text, o.code)).unwrap();
    assert_eq!(says("cd /srv; here=1"), (String::new(), 0));
    assert_eq!(says("echo $here; pwd; false"), ("1\n/srv\n".into(), 1));
    assert_eq!(says("echo $?; cd; pwd"), ("1\n/root\n".into(), 0), "the code of the last command; HOME");
    assert_eq!(says("cat <<'EOF'\na\nb\nEOF"), ("a\nb\n".into(), 0));
    assert_eq!(
        says("touch /etc/x /var/lib/x /usr/sbin/x /srv/x /mnt/x /run/x; sleep 1000 &"),
        (String::new(), 0)
    );
    assert_eq!(session.leftovers(), ["sleep 1000 "]);
    let home = session.home();
    drop(session);
    assert!(!home.exists());
    for dir in ["/etc", "/var/lib", "/usr/sbin", "/srv", "/mnt", "/run"] {
        assert!(!Path::new(dir).join("x").exists(), "{dir}");
    }
    let all = run("sh", &["-c", "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'"]);
    assert!(!all.contains(&format!("={}", home.parent().unwrap().display())), "a process is left");
}
