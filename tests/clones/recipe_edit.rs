//! Recipes are printed and edited, and an invalid recipe never replaces a valid one. Also: placeholders in the commands
//! and recipes of clones.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use serde_json::{Value, json};
use stencilfs::sys::process::ProcessId;

use crate::clones::command::nothing_is_left;
use crate::support::host;
use crate::support::mount::{STENCIL, TestMount};
use crate::support::vm::guest;

fn valid_recipe() -> Value {
    json!({
        "version": 1, "vmm": "qemu", "program": "/usr/bin/qemu-system-x86_64", "vmm_version": "10.0.2",
        "argv": ["-machine", "q35,memory-backend=m", "-object", "memory-backend-file,id=m,size=1M,mem-path={memory},share=off,readonly=on,rom=off",
                 "-chardev", "socket,id=q,path={dir}/qmp.sock,server=on,wait=off", "-incoming", "defer"],
    })
}

#[test]
fn recipe_edit_changes_a_recipe_or_leaves_it_untouched() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    world.import_bytes(&vec![1; 1 << 20], "web");
    world.stencil(&["inspect", "web", "--recipe"]).exits(4).says("has no launch recipe, because it was not");
    world
        .stencil(&["recipe", "edit", "web"])
        .exits(2)
        .says("the template has no recipe: it was not captured from a VM");
    let file = world.dir().join("recipe.json");
    let path = file.to_str().unwrap();
    fs::write(&file, valid_recipe().to_string()).unwrap();
    assert_eq!(world.json(&["recipe", "edit", "web", "--from", path])["changed"], true);
    assert_eq!(world.json(&["recipe", "edit", "web", "--from", path])["changed"], false);
    assert_eq!(world.json(&["inspect", "web", "--recipe"])["recipe"], valid_recipe());

    // The printed recipe is accepted as input, also from a pipe.
    let printed = world.stencil(&["inspect", "web", "--recipe"]).ok().out;
    assert!(printed.lines().count() > 10, "one argument per line: {printed}");
    let mut command = world.command();
    let edit = command.args(["recipe", "edit", "web", "--from", "-"]).stdin(Stdio::piped()).spawn();
    let mut edit = edit.unwrap();
    std::io::Write::write_all(&mut edit.stdin.take().unwrap(), printed.as_bytes()).unwrap();
    assert!(edit.wait().unwrap().success());

    // The error names each fault, and the recipe does not change.
    for (from, to, message) in [
        (
            "{memory}",
            "{file:rom}",
            "{file:rom}: the template has no such file; no argument contains {memory}",
        ),
        ("qmp.sock", "other.sock", "the launcher resumes clones through this QMP socket"),
        ("\"defer\"", "\"tcp:0:1\"", "missing -incoming defer"),
        ("\"defer\"", "\"defer\",\"-daemonize\"", "-daemonize: the launcher must start the process"),
        ("memory-backend=m", "usb=off", "the recipe does not use RAM file 'memory'"),
        ("id=q", "id={uid}", "{uid}: unknown placeholder"),
        ("\"qemu\"", "\"xen\"", "for 'xen', expected version 1 for 'qemu'"),
        ("\"vmm\"", "\"monitor\"", "invalid recipe: unknown field `monitor`"),
        ("{", "", "invalid recipe: "),
    ] {
        fs::write(&file, valid_recipe().to_string().replacen(from, to, 1)).unwrap();
        world.stencil(&["recipe", "edit", "web", "--from", path]).exits(2).says(message);
    }
    fs::write(&file, vec![b' '; (1 << 20) + 1]).unwrap();
    world.stencil(&["recipe", "edit", "web", "--from", path]).exits(2).says("longer than 1048576 bytes");
    world
        .stencil(&["recipe", "edit", "web", "--from", "/nonexistent"])
        .exits(4)
        .says("cannot read the recipe");
    assert_eq!(world.json(&["inspect", "web", "--recipe"])["recipe"], valid_recipe());

    // With an editor, whose command may have arguments.
    let temporary = world.dir().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let edit = |editor: &str| {
        let mut command = world.command();
        command.args(["--json", "recipe", "edit", "web"]).env("VISUAL", editor).env("TMPDIR", &temporary);
        let done = command.stdin(Stdio::null()).output().unwrap();
        (done.status.code().unwrap(), String::from_utf8_lossy(&done.stdout).into_owned())
    };
    assert!(edit("true").1.contains("\"changed\":false"));
    assert!(edit("sed -i s/10.0.2/10.0.3/").1.contains("\"changed\":true"));
    assert_eq!(world.json(&["inspect", "web", "--recipe"])["recipe"]["vmm_version"], "10.0.3");
    assert_eq!(edit("exit 7; true").0, 1);
    assert_eq!(
        fs::read_dir(&temporary).unwrap().count(),
        0,
        "the editor changed nothing, so no file is kept"
    );
    // A rejected edit is kept in a file that the error names, for use with --from.
    let kept = |json: &str| {
        let mut all: Vec<_> = fs::read_dir(&temporary).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(all.len() == 1 && json.contains(all[0].to_str().unwrap()), "{all:?} {json}");
        let text = fs::read_to_string(&all[0]).unwrap();
        fs::remove_file(all.remove(0)).unwrap();
        text
    };
    let (code, json) = edit("sed -i s/{memory}/{nothing}/");
    assert_eq!(code, 2);
    assert!(kept(&json).contains("{nothing}"));
    let (code, json) = edit("sed -i s/10.0.3/10.0.9/ \"$1\"; exit 7 #");
    assert_eq!(code, 1);
    assert!(kept(&json).contains("10.0.9"));
    // Another command changes the recipe during the edit.
    fs::write(&file, valid_recipe().to_string()).unwrap();
    let race = format!("sed -i s/10.0.3/10.0.4/ \"$1\"; {STENCIL} -q recipe edit web --from {path} #");
    let (code, json) = edit(&race);
    assert!(
        code == 75 && json.contains("the recipe was changed by another command during the edit"),
        "{code} {json}"
    );
    assert!(kept(&json).contains("10.0.4"));
    assert_eq!(world.json(&["inspect", "web", "--recipe"])["recipe"], valid_recipe());
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "no file is kept for an accepted edit");
}

#[test]
fn commands_get_unique_values_for_placeholders() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    world.import_bytes(&vec![1; 1 << 20], "web");
    let line = "echo {mac} {mac:1} {cid} {uuid} {port:80} {port:53} > {dir}/told; \
                echo $STENCIL_MAC $STENCIL_MAC_1 $STENCIL_CID $STENCIL_UUID $STENCIL_PORT_80 $STENCIL_PORT_53 > {dir}/again; \
                eval \"echo >&$STENCIL_NOTIFY\"; exec sleep 1000";
    world.stencil(&["clone", "web", "-n", "5", "--ready", "notify", "--", "bash", "-c", line]).ok();
    let mut all = BTreeSet::new();
    for clone in world.json(&["ps"])["clones"].as_array().unwrap() {
        let dir = clone["dir"].as_str().unwrap();
        let values = fs::read_to_string(format!("{dir}/told")).unwrap();
        assert_eq!(values, fs::read_to_string(format!("{dir}/again")).unwrap());
        let fields: Vec<&str> = values.split_ascii_whitespace().collect();
        assert_eq!(
            clone["ports"],
            json!({"53": fields[5].parse::<u16>().unwrap(), "80": fields[4].parse::<u16>().unwrap()})
        );
        assert!(fields[2].parse::<u32>().unwrap() >= 3);
        all.extend(fields.iter().map(|w| (*w).to_owned()));
    }
    assert_eq!(all.len(), 5 * 6, "{all:?}");
    let listed = world.stencil(&["ps"]).ok().out;
    assert!(listed.contains("->80"), "{listed}");
    world.stencil(&["clone", "web", "--", "sh", "-c", "echo {disk:root}"]).exits(1);
    world.stencil(&["stop", "--all"]).ok();
}

/// With a range of 64 ports for 40 clones: a port that is assigned but not bound yet must not be assigned again.
#[test]
fn ports_are_unique_even_if_commands_bind_late() {
    let _host = host::shared();
    let world = TestMount::new("auto");
    world.import_bytes(&vec![1; 1 << 20], "web");
    let bind = "use Socket; socket(S, PF_INET, SOCK_STREAM, 0) or die; select(undef, undef, undef, 1); \
                bind(S, sockaddr_in({port:80}, INADDR_ANY)) or die \"bind {port:80}: $!\"; listen(S, 1) or die; \
                open(N, '>&=', $ENV{STENCIL_NOTIFY}) or die; syswrite(N, 'x') or die; sleep 1000";
    let launch = "echo 40000 40063 >/proc/sys/net/ipv4/ip_local_port_range || exit; stencil=$1; shift; \
                  \"$stencil\" \"$@\" & one=$!; \"$stencil\" \"$@\" && wait $one";
    let mut command = world.command_in("unshare");
    command.args([
        "--net",
        "sh",
        "-c",
        launch,
        "sh",
        STENCIL,
        "clone",
        "web",
        "-n",
        "20",
        "--parallel",
        "20",
    ]);
    let done = command.args(["--ready", "notify", "--", "perl", "-e", bind]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let listed = world.json(&["ps"]);
    let clones = listed["clones"].as_array().unwrap();
    let ports: BTreeSet<u64> = clones.iter().map(|c| c["ports"]["80"].as_u64().unwrap()).collect();
    assert_eq!((clones.len(), ports.len()), (40, 40), "{ports:?}");
    assert!(ports.iter().all(|port| (40_000..40_064).contains(port)), "{ports:?}");
    let reservations = || fs::read_dir(world.runtime_dir().join("ports")).unwrap().count();
    assert_eq!(reservations(), 40);
    world.stencil(&["stop", "--all"]).ok();
    assert_eq!(reservations(), 0, "the ports of stopped clones must be released");
    nothing_is_left(&world);
}

/// Replaces the program in the recipe of `guest:v1` by this script, which gets the arguments of QEMU.
fn start_by_script(world: &TestMount, script: &str) {
    let wrapper = world.dir().join("wrapper");
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let mut recipe = world.json(&["inspect", "guest:v1", "--recipe"])["recipe"].clone();
    recipe["program"] = json!(wrapper);
    let file = world.dir().join("recipe.json");
    fs::write(&file, recipe.to_string()).unwrap();
    world.stencil(&["recipe", "edit", "guest:v1", "--from", file.to_str().unwrap()]).ok();
}

#[test]
fn a_port_taken_by_another_process_is_replaced() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    guest::give(&world);
    // Fails twice with QEMU's error for a port in use, then starts QEMU.
    let script = "#!/bin/sh\necho x >>tries\n[ $(wc -l <tries) -gt 2 ] || {\n\
                  echo \"qemu: -nic user: Could not set up host forwarding rule 'tcp::1-:2'\" >&2; exit 1; }\n\
                  exec qemu-system-x86_64 \"$@\"\n";
    start_by_script(&world, script);
    world.mount(&[]).ok();
    let launched = world.json(&["clone", "guest:v1"]);
    let dir = launched["clones"][0]["dir"].as_str().unwrap();
    assert_eq!(fs::read_to_string(format!("{dir}/tries")).unwrap().lines().count(), 3);
    world.stencil(&["stop", "--all"]).ok();
    // If all attempts fail, the launch fails with QEMU's error.
    start_by_script(&world, &script.replace("-gt 2", "-gt 99"));
    let run = world.stencil(&["clone", "guest:v1"]).exits(1);
    assert!(run.err.contains("Could not set up host forwarding rule"), "{}", run.err);
}

#[test]
fn stop_ends_every_process_of_a_script_that_starts_qemu() {
    let _host = host::shared();
    let world = TestMount::unmounted();
    guest::give(&world);
    world.mount(&[]).ok();
    for line in [
        "qemu-system-x86_64 \"$@\"; exit",
        "setsid qemu-system-x86_64 \"$@\" & sleep 1000",
        "qemu-system-x86_64 \"$@\" & exit",
        "exec qemu-system-x86_64 -daemonize \"$@\"",
        // With an empty environment, QEMU is identified by its QMP socket alone.
        "env -i \"$(command -v qemu-system-x86_64)\" \"$@\"; exit",
    ] {
        start_by_script(&world, &format!("#!/bin/sh\n{line}\n"));
        let launched = world.json(&["clone", "guest:v1", "-n", "2"]);
        let mut processes = vec![];
        for clone in launched["clones"].as_array().unwrap() {
            let pid = clone["pid"].as_u64().unwrap() as u32;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
            assert!(name.starts_with("qemu-system"), "{line}: {name}");
            processes.push(ProcessId::of(pid).unwrap().unwrap());
        }
        let listed = world.json(&["ps"]);
        let states: Vec<_> = listed["clones"].as_array().unwrap().iter().map(|c| &c["state"]).collect();
        assert_eq!(states, ["running"; 2], "{line}: {listed:#}");
        world.stencil(&["stop", "--all"]).ok();
        assert!(processes.iter().all(|p| !p.is_alive()), "{line}");
        nothing_is_left(&world);
    }
    // Scripts that never open the QMP socket or that fail, with children in the background.
    for (line, message) in [
        ("setsid sleep 1000 & exit 3", "timed out after 2 s waiting for the clone"),
        ("sleep 1000 & exec sleep 1000", "timed out after 2 s waiting for the clone"),
        ("exit 3", "QEMU exited before it opened its QMP socket (exit status: 3)"),
    ] {
        start_by_script(&world, &format!("#!/bin/sh\n{line}\n"));
        world.stencil(&["clone", "guest:v1", "--timeout", "2"]).exits(1).says(message);
        nothing_is_left(&world);
    }
}
