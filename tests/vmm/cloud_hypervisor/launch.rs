//! A launch of the real Cloud Hypervisor. Part of the suite only if `STENCIL_CLOUD_HYPERVISOR` names the program when
//! `make test` builds the suite.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::{MIB, args, directory, import, written};
use crate::support::daemon::passing::Running;
use crate::support::host;
use crate::support::mount::TestMount;
use crate::support::vm::guest::patiently;

/// A guest that Cloud Hypervisor boots by its PVH entry, in 32-bit mode without paging. It fills 256 pages from 8 MiB
/// with known words and prints `B`; then, again and again, it writes 64 pages from 16 MiB, checks the known words, and
/// prints `.` if they are right and `X` if not.
const GUEST: &str = r#"
.section .note.pvh, "a", @note
.long 4, 8, 18
.asciz "Xen"
.quad 0x200000
.text
.code32
.globl _start
_start:
    mov $0x800000, %edi
    mov $0xa5000000, %eax
1:  mov %eax, (%edi)
    add $4096, %edi
    inc %eax
    cmp $0x900000, %edi
    jb 1b
    mov $0x3f8, %dx
    mov $'B', %al
    out %al, %dx
2:  mov $0x1000000, %edi
3:  incl (%edi)
    add $4096, %edi
    cmp $0x1040000, %edi
    jb 3b
    mov $0x800000, %edi
    mov $0xa5000000, %ecx
    mov $'.', %al
4:  cmp %ecx, (%edi)
    je 5f
    mov $'X', %al
5:  add $4096, %edi
    inc %ecx
    cmp $0x900000, %edi
    jb 4b
    out %al, %dx
    mov $300000, %ecx
6:  pause
    loop 6b
    jmp 2b
"#;

/// Sends a request to Cloud Hypervisor's API.
fn put(socket: &Path, action: &str, body: &str) {
    let mut stream =
        patiently("the API socket", Duration::from_secs(30), || UnixStream::connect(socket).ok());
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let length = body.len();
    let headers = "Host: localhost\r\nAccept: */*\r\nContent-Type: application/json";
    write!(stream, "PUT /api/v1/{action} HTTP/1.1\r\n{headers}\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(answer.starts_with("HTTP/1.1 20"), "{action}: {answer}");
}

/// Where KVM cannot save nested state, as KVM_PVM cannot, Cloud Hypervisor takes no snapshot.
#[test]
fn clones_resume_in_the_real_cloud_hypervisor() {
    let _host = host::shared();
    let binary = std::env::var("STENCIL_CLOUD_HYPERVISOR").expect("STENCIL_CLOUD_HYPERVISOR names no binary");
    let world = TestMount::new("auto");
    let path = |name: &str| world.dir().join(name);
    fs::write(path("guest.S"), GUEST).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-nostdlib", "-static", "-Wl,-Ttext=0x200000,--build-id=none", "-o"]);
    assert!(compiler.arg(path("guest")).arg(path("guest.S")).status().unwrap().success());
    let start = |words: &[&str]| {
        let mut command = Command::new(&binary);
        Running::start(command.args(words), &path("vmm.log"))
    };
    let serial = |file: &Path, text: &str| {
        patiently("the guest's output", Duration::from_secs(60), || {
            let read = fs::read_to_string(file).unwrap_or_default();
            assert!(!read.contains('X'), "the guest read a wrong word: {read}");
            read.contains(text).then_some(read)
        })
    };

    let [memory, socket, output] =
        ["memory", "source.sock", "source.log"].map(|name| path(name).display().to_string());
    for form in ["anonymous", "file"] {
        let zone = format!("id=m0,size=64M,file={memory},shared=on");
        let mut words = vec!["--api-socket", &socket, "--cpus", "boot=1", "--console", "off", "--kernel"];
        let (kernel, log) = (path("guest").display().to_string(), format!("file={output}"));
        words.extend([kernel.as_str(), "--serial", &log]);
        match form {
            "anonymous" => words.extend(["--memory", "size=64M"]),
            _ => {
                File::create(&memory).unwrap().set_len(64 * MIB).unwrap();
                words.extend(["--memory", "size=0", "--memory-zone", &zone]);
            }
        }
        let source = start(&words);
        serial(Path::new(&output), "B..");
        let snapshot = directory(&world, form);
        put(Path::new(&socket), "vm.pause", "");
        put(
            Path::new(&socket),
            "vm.snapshot",
            &json!({"destination_url": format!("file://{snapshot}")}).to_string(),
        );
        drop(source);
        let [config, state] = ["config.json", "state.json"].map(|name| written(&snapshot, name));
        let ranges = Path::new(&snapshot).join("memory-ranges");
        assert_eq!(ranges.exists(), form == "anonymous", "{form}");
        import(
            &world,
            form,
            &fs::read(if ranges.exists() { &ranges } else { Path::new(&memory) }).unwrap(),
            [&config, &state],
        );
        for file in [&memory, &socket, &output] {
            let _ = fs::remove_file(file);
        }

        let mut clones = vec![];
        for number in 0..4 {
            let dir = directory(&world, &format!("{form}-{number}"));
            let argv = args(&world, form, &dir)["argv"].clone();
            let words: Vec<&str> =
                argv.as_array().unwrap()[1..].iter().map(|word| word.as_str().unwrap()).collect();
            clones.push((start(&words), dir));
        }
        for (_, dir) in &clones {
            put(&Path::new(dir).join("api.sock"), "vm.resume", "");
        }
        for (_, dir) in &clones {
            let read = serial(&Path::new(dir).join("serial.log"), "..");
            assert!(!read.contains('B'), "the guest has booted instead of resuming: {read}");
        }
        let density = world.json(&["density"]);
        for (vmm, _) in &clones {
            let row = density["clones"].as_array().unwrap().iter().find(|row| row["pid"] == vmm.0.id());
            let row = row.unwrap_or_else(|| panic!("{form}: no clone in {density}"));
            let pages = row["dirty_pages"].as_u64().unwrap();
            assert_eq!(pages, 64, "{form}: {row}");
        }
        drop(clones);
        clones_of_the_launcher(&world, form, &binary);
    }
}

/// Launches clones by `stencil clone`, and stops them.
fn clones_of_the_launcher(world: &TestMount, template: &str, binary: &str) {
    let launched = world.json(&["clone", template, "-n", "8", "--cloud-hypervisor", binary]);
    let clones = launched["clones"].as_array().unwrap();
    assert!(
        clones.len() == 8 && clones.iter().all(|clone| clone["kind"] == "cloud-hypervisor"),
        "{launched}"
    );
    for clone in clones {
        let id = clone["id"].as_str().unwrap();
        let log = patiently("the guest's output", Duration::from_secs(60), || {
            let logs = world.json(&["logs", id]);
            let serial = logs["serial"].as_str().unwrap_or_default().to_owned();
            assert!(!serial.contains('X'), "the guest read a wrong word: {logs}");
            serial.contains("..").then_some(serial)
        });
        assert!(!log.contains('B'), "the guest has booted instead of resuming: {log}");
        assert_eq!(world.json(&["dirty", id])["dirty_pages"], 64, "{template}: clone {id}");
    }
    world.stencil(&["stop", "--all"]).ok();
    assert_eq!(world.json(&["ps"])["clones"], json!([]));
}
