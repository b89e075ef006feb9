//! Captures that fail after the pause began: the VM runs again with its own disk and settings, nothing of what it wrote
//! is lost, and the message says what there is to do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::guest::{Qemu, ignores_shared, media, overlays, patiently, qemu_words};
use crate::support::host;
use crate::support::mount::{Run, TestMount, run};
use crate::support::passing::{Immutable, Mounted};
use crate::support::store::random;

/// How a VM has its disk.
#[derive(Clone, Copy, PartialEq)]
pub enum Plug {
    Drive,
    Blockdev,
}

/// A VM without a guest: firmware runs, its RAM takes a while to be read, and QEMU's own qemu-io writes to the disk
/// where a guest would.
pub struct Vm {
    pub world: TestMount,
    pub qemu: Qemu,
    /// A second session: the capture has the first.
    pub qmp: Qmp,
    before: Value,
    written: u64,
}

const STEP: u64 = 64 << 10;

impl Vm {
    pub fn start(plug: Plug) -> Vm {
        let world = TestMount::unmounted();
        let folder = world.dir().join("vm");
        fs::create_dir(&folder).unwrap();
        let raw = folder.join("raw");
        fs::write(&raw, [random(3, 24 << 20), vec![0; 40 << 20]].concat()).unwrap();
        let image = folder.join("disk.qcow2");
        run("qemu-img", &["convert", "-O", "qcow2", raw.to_str().unwrap(), image.to_str().unwrap()]);
        fs::remove_file(raw).unwrap();
        // As a person types it: from the folder in which QEMU is started.
        let typed = image.strip_prefix(std::env::current_dir().unwrap()).unwrap_or(&image).display();
        let disk = match plug {
            Plug::Drive => format!("-drive if=none,id=root,format=qcow2,file={typed}"),
            Plug::Blockdev => format!(
                "-blockdev driver=file,node-name=f,filename={typed} -blockdev driver=qcow2,node-name=root,file=f"
            ),
        };
        let more = format!(
            "-qmp unix:{}/qmp2,server=on,wait=off -device virtio-scsi-pci,id=s {disk} \
             -device scsi-hd,drive=root,id=hd,bus=s.0",
            world.dir().display()
        );
        let mut words = qemu_words(world.dir(), "192M");
        words.extend(more.split_ascii_whitespace().map(str::to_owned));
        let qemu = Qemu::start(world.dir(), &words);
        let ram = fs::OpenOptions::new().write(true).open(world.dir().join("ram")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&ram, &random(5, 64 << 20), 100 << 20).unwrap();
        let mut qmp = Qmp::connect(&world.dir().join("qmp2")).unwrap();
        let before = media(&mut qmp);
        Vm { world, qemu, qmp, before, written: 0 }
    }

    pub fn folder(&self) -> PathBuf {
        self.world.dir().join("vm")
    }

    pub fn image(&self) -> PathBuf {
        self.folder().join("disk.qcow2")
    }

    fn pid(&self) -> u32 {
        self.qmp.peer_pid().unwrap()
    }

    /// Writes one more step of the disk, as a guest does: QEMU goes on meanwhile. It must not wait for anybody.
    #[track_caller]
    pub fn write(&mut self) {
        let writes = self.writes();
        let (pattern, place) = (self.written + 1, self.written * STEP);
        let line = format!("qemu-io -d hd \"aio_write -P {pattern} {place} {STEP}\"");
        let said = self.qmp.run("human-monitor-command", json!({"command-line": line})).unwrap();
        assert_eq!(said, "");
        patiently("end of the write", Duration::from_secs(10), || (self.writes() > writes).then_some(()));
        self.written += 1;
    }

    fn writes(&mut self) -> u64 {
        let all = self.qmp.run("query-blockstats", json!({})).unwrap();
        all.as_array().unwrap().iter().map(|b| b["stats"]["wr_operations"].as_u64().unwrap()).sum()
    }

    /// Everything that was written is in that image, which is sound.
    #[track_caller]
    pub fn is_all_in_image(&self) {
        let image = self.image();
        run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
        for step in 0..self.written {
            let read = format!("read -P {} {} {STEP}", step + 1, step * STEP);
            let said = run("qemu-io", &["-r", "-f", "qcow2", "-c", &read, image.to_str().unwrap()]);
            assert!(!said.contains("failed"), "step {step}: {said}");
        }
    }

    /// The end of the scenario: QEMU ends, and what was written is all there.
    #[track_caller]
    pub fn end(mut self) {
        self.write();
        self.qmp.run("quit", json!({})).unwrap();
        patiently("end of QEMU", Duration::from_secs(10), || self.qemu.has_ended().then_some(()));
        self.is_all_in_image();
    }

    /// The VM is as it was before the capture, its disk takes writes, and nothing of the capture is left.
    #[track_caller]
    pub fn is_as_before(&mut self) {
        let until = Instant::now() + Duration::from_secs(40);
        loop {
            let (status, own) = (self.qmp.status().unwrap(), media(&mut self.qmp));
            let (ignores, left) = (ignores_shared(&mut self.qmp), overlays(&self.folder()));
            let helpers = self.helpers();
            if status == "running" && own == self.before && !ignores && left.is_empty() && helpers.is_empty()
            {
                break;
            }
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            assert!(Instant::now() < until, "{status} {own} {ignores} {left:?} {helpers:?}: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let jobs = self.qmp.run("query-jobs", json!({})).unwrap();
        assert_eq!(jobs, json!([]));
        self.write();
    }

    /// Helpers of captures of this VM.
    pub fn helpers(&self) -> Vec<Pid> {
        let own = self.pid().to_string();
        let is_ours = |words: &[String]| words.contains(&"capture-watchdog".into()) && words.contains(&own);
        processes(is_ours)
    }

    /// Kills the only helper, but not within the end of a commit, when QEMU holds the disk.
    #[track_caller]
    pub fn kill_helper(&mut self) {
        let [helper] = self.helpers()[..] else { panic!("one helper") };
        patiently("a moment without a job", Duration::from_secs(10), || {
            kill_process(helper, Signal::STOP).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            let is_idle = self.qmp.run("query-jobs", json!({})).unwrap() == json!([]);
            kill_process(helper, if is_idle { Signal::KILL } else { Signal::CONT }).unwrap();
            is_idle.then_some(())
        });
        patiently("the helper's end", Duration::from_secs(5), || self.helpers().is_empty().then_some(()));
    }

    /// The qemu-img that reads for a capture.
    fn readers(&self) -> Vec<Pid> {
        let socket = self.qemu.socket().display().to_string();
        let captures = processes(|words| words.contains(&"capture".into()) && words.contains(&socket));
        // It reads through descriptors of the capture.
        let place = |capture: &Pid| format!("/proc/{}/fd/", capture.as_raw_nonzero());
        let places: Vec<String> = captures.iter().map(place).collect();
        let reads = |word: &String| places.iter().any(|place| word.contains(place));
        processes(|words| words[0].ends_with("qemu-img") && words.iter().any(reads))
    }

    pub fn log(&self) -> PathBuf {
        self.world.dir().join("capture.log")
    }

    pub fn capture(&self, more: &[&str]) -> Command {
        let mut command = self.world.command();
        command.arg("capture").arg(self.qemu.socket()).arg("vm:x").args(more);
        command
    }

    /// A capture that stands still at this moment, and its qemu-img with it; one that is faster is made again.
    #[track_caller]
    pub fn caught(&mut self, more: &[&str], moment: impl Fn(&mut Vm) -> bool) -> Capture {
        for _ in 0..20 {
            let log = fs::File::create(self.log()).unwrap();
            let mut child = self.capture(more).stdout(Stdio::null()).stderr(log).spawn().unwrap();
            let pid = Pid::from_raw(child.id() as i32).unwrap();
            while child.try_wait().unwrap().is_none() {
                if moment(self) {
                    kill_process(pid, Signal::STOP).unwrap();
                    let all = [vec![pid], self.readers()].concat();
                    signal(&all, Signal::STOP);
                    // Not in the middle of the end of a commit, when QEMU holds the disk.
                    std::thread::sleep(Duration::from_millis(50));
                    let jobs = self.qmp.run("query-jobs", json!({})).unwrap();
                    if jobs == json!([]) && moment(self) {
                        return Capture { child, all, log: self.log() };
                    }
                    signal(&all, Signal::CONT);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(child.wait().unwrap().success(), "{}", fs::read_to_string(self.log()).unwrap());
        }
        panic!("every capture was faster");
    }

    fn stands_still(&mut self) -> bool {
        matches!(self.qmp.status().unwrap().as_str(), "paused" | "postmigrate")
    }

    /// It stands still, and its device state has been taken.
    pub fn is_read(&mut self) -> bool {
        self.qmp.status().unwrap() == "postmigrate"
    }

    /// It runs on an overlay.
    pub fn disk_is_read(&mut self) -> bool {
        let on_overlay = media(&mut self.qmp).to_string().contains(".stencil-");
        on_overlay && self.qmp.status().unwrap() == "running"
    }
}

/// Processes with such a command line.
fn processes(is_it: impl Fn(&[String]) -> bool) -> Vec<Pid> {
    let mut found = vec![];
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> =
            words.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        if is_it(&words) {
            found.extend(Pid::from_raw(pid));
        }
    }
    found
}

/// Those that have ended meanwhile are no matter.
fn signal(processes: &[Pid], signal: Signal) {
    for &process in processes {
        let _ = kill_process(process, signal);
    }
}

/// A capture that stands still.
pub struct Capture {
    pub child: Child,
    /// Itself and its qemu-img.
    all: Vec<Pid>,
    log: PathBuf,
}

impl Capture {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    pub fn go_on(&self) {
        signal(&self.all, Signal::CONT);
    }

    /// Lets it go on to its end.
    pub fn goes_on(mut self) -> Run {
        self.go_on();
        let code = self.child.wait().unwrap().code().unwrap();
        let err = fs::read_to_string(&self.log).unwrap();
        Run { code, out: String::new(), err, words: "capture".into() }
    }

    /// Kills it, not its qemu-img.
    pub fn killed(mut self) {
        kill_process(self.pid(), Signal::KILL).unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn device_state_that_finds_no_room() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    let small = vm.world.dir().join("small");
    fs::create_dir(&small).unwrap();
    let place = small.to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", place]);
    let mounted = Mounted(small.clone());
    for more in [&[][..], &["--pause"], &["--quit"]] {
        let output = vm.capture(more).env("TMPDIR", &small).output().unwrap();
        // It is back when the capture has ended, without the helper.
        assert_eq!(vm.qmp.status().unwrap(), "running");
        assert!(!ignores_shared(&mut vm.qmp));
        let run = Run::of("capture".into(), &output).exits(1).says("cannot write device state");
        assert!(!run.err.contains("; also: "), "{}", run.err);
    }
    drop(mounted);
    vm.is_as_before();
    vm.world.stencil(&["inspect", "vm:x"]).exits(4);
    // It can be captured all the same.
    vm.world.json(&["capture", vm.qemu.socket().to_str().unwrap(), "vm:y"]);
    vm.is_as_before();
    vm.end();
}

#[test]
fn an_overlay_that_cannot_be_renamed() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    let folder = vm.folder();
    let fails = |vm: &mut Vm| {
        let capture = vm.caught(&[], Vm::disk_is_read);
        vm.write();
        let immutable = Immutable::make(&folder);
        let run = capture.goes_on().exits(1);
        assert!(run.err.contains("created template vm:x"), "{}", run.err);
        assert!(run.err.contains("cannot rename the overlay"), "{}", run.err);
        vm.world.stencil(&["verify", "vm:x"]).ok();
        // Nobody holds its writes back.
        vm.write();
        let [overlay] = &overlays(&folder)[..] else { panic!("one overlay") };
        assert!(run.err.contains(&format!("`qemu-img commit {}`", overlay.display())), "{}", run.err);
        (overlay.clone(), immutable)
    };
    // The helper tries again.
    drop(fails(&mut vm));
    vm.is_as_before();

    // Without a helper the next capture does it.
    let (_, immutable) = fails(&mut vm);
    vm.kill_helper();
    drop(immutable);
    vm.write();
    vm.world.json(&["capture", vm.qemu.socket().to_str().unwrap(), "vm:y"]);
    vm.is_as_before();

    // And without a VM the command of the message.
    let (overlay, immutable) = fails(&mut vm);
    vm.kill_helper();
    drop(immutable);
    vm.write();
    vm.qmp.run("quit", json!({})).unwrap();
    patiently("end of QEMU", Duration::from_secs(10), || vm.qemu.has_ended().then_some(()));
    run("qemu-img", &["commit", "-q", overlay.to_str().unwrap()]);
    vm.is_all_in_image();
}

#[test]
fn a_device_that_is_taken_out_while_its_disk_is_read() {
    let _host = host::shared();
    for (plug, killed) in [(Plug::Drive, false), (Plug::Drive, true), (Plug::Blockdev, false)] {
        let mut vm = Vm::start(plug);
        let capture = vm.caught(&[], Vm::disk_is_read);
        vm.write();
        vm.write();
        vm.qmp.run("device_del", json!({"id": "hd"})).unwrap();
        patiently("the device's end", Duration::from_secs(10), || {
            (!media(&mut vm.qmp).to_string().contains("\"hd\"")).then_some(())
        });
        match (plug, killed) {
            (_, true) => capture.killed(),
            (Plug::Drive, _) => drop(capture.goes_on().exits(0)),
            (Plug::Blockdev, _) => {
                let run = capture.goes_on().exits(1);
                let [overlay] = &overlays(&vm.folder())[..] else { panic!("one overlay") };
                assert!(run.err.contains(&format!("`qemu-img commit {}`", overlay.display())), "{}", run.err);
                vm.kill_helper();
                vm.qmp.run("blockdev-del", json!({"node-name": "root"})).unwrap();
                run_commit(overlay);
            }
        }
        patiently("the overlay's end", Duration::from_secs(20), || {
            overlays(&vm.folder()).is_empty().then_some(())
        });
        assert_eq!(vm.qmp.status().unwrap(), "running");
        vm.is_all_in_image();
    }
}

fn run_commit(overlay: &Path) {
    run("qemu-img", &["commit", "-q", overlay.to_str().unwrap()]);
    fs::remove_file(overlay).unwrap();
}

#[test]
fn a_vm_that_somebody_lets_run_is_no_template() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    for (more, command) in [(&[][..], "cont"), (&["--pause"], "cont"), (&["--pause"], "system_reset")] {
        let capture = vm.caught(more, Vm::is_read);
        vm.world.stencil(&["rm", "vm:x"]);
        vm.qmp.run(command, json!({})).unwrap();
        // A reset is done by QEMU's main loop.
        vm.qmp.status().unwrap();
        let run = capture.goes_on().exits(75);
        assert!(run.err.contains("no template was created"), "{}", run.err);
        vm.world.stencil(&["inspect", "vm:x"]).exits(4);
        vm.is_as_before();
    }
    vm.end();
}

#[test]
fn two_captures_of_one_vm() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    let first = vm.caught(&[], Vm::stands_still);
    let begin = Instant::now();
    let second = vm.capture(&[]).output().unwrap();
    // It does not wait for the session that the first one has.
    assert!(begin.elapsed() < Duration::from_secs(15));
    let run = Run::of("capture".into(), &second).exits(5);
    let holder = format!("is in use by another capture (process {})", first.child.id());
    assert!(run.err.contains(&holder), "{}", run.err);
    first.goes_on().exits(0);
    vm.is_as_before();
    vm.end();
}

fn ignore_shared(qmp: &mut Qmp, on: bool) {
    let wanted = json!({"capabilities": [{"capability": "x-ignore-shared", "state": on}]});
    qmp.run("migrate-set-capabilities", wanted).unwrap();
}

#[test]
fn a_killed_capture_leaves_settings_and_processes_as_they_were() {
    let _host = host::shared();
    let mut vm = Vm::start(Plug::Drive);
    // qemu-img ends with it.
    let capture = vm.caught(&[], |vm| vm.disk_is_read() && !vm.readers().is_empty());
    capture.killed();
    patiently("the end of qemu-img", Duration::from_secs(5), || vm.readers().is_empty().then_some(()));
    vm.is_as_before();

    // What was set before the capture is set after it, of a VM that ran and of one that did not.
    ignore_shared(&mut vm.qmp, true);
    for ran in [true, false] {
        vm.qmp.run(if ran { "cont" } else { "stop" }, json!({})).unwrap();
        vm.caught(&[], Vm::is_read).killed();
        patiently("the end of the helper", Duration::from_secs(20), || vm.helpers().is_empty().then_some(()));
        assert!(ignores_shared(&mut vm.qmp));
        assert_eq!(vm.qmp.status().unwrap() == "running", ran);
    }
    ignore_shared(&mut vm.qmp, false);
    vm.qmp.run("cont", json!({})).unwrap();
    // One that stood still before, whose setting was off.
    vm.qmp.run("stop", json!({})).unwrap();
    vm.caught(&[], Vm::is_read).killed();
    patiently("the setting as before", Duration::from_secs(20), || {
        (!ignores_shared(&mut vm.qmp) && vm.helpers().is_empty()).then_some(())
    });
    vm.qmp.run("cont", json!({})).unwrap();
    vm.is_as_before();
    vm.end();
}
