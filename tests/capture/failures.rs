//! Captures that fail after they have paused the VM: the VM runs again with its own disk and settings, no write of the
//! guest is lost, and the error has a hint.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stencilfs::clones::qmp::Qmp;

use crate::support::daemon::passing::{Immutable, Mounted};
use crate::support::host;
use crate::support::mount::{Run, TestMount, run};
use crate::support::store::random;
use crate::support::vm::guest::{Qemu, ignores_shared, media, overlays, patiently, qemu_words};

/// The QEMU option that defines the disk of a VM.
#[derive(Clone, Copy, PartialEq)]
pub enum DiskOption {
    Drive,
    Blockdev,
}

/// A VM without a guest: the firmware runs, the RAM is large enough that reading takes a while, and the `qemu-io`
/// command of the QEMU monitor writes to the disk in place of a guest.
pub struct Vm {
    pub world: TestMount,
    pub qemu: Qemu,
    /// A session on a second QMP socket: captures use the first socket.
    pub qmp: Qmp,
    media_before: Value,
    /// Number of written steps of `STEP` bytes.
    written: u64,
}

const STEP: u64 = 64 << 10;

impl Vm {
    pub fn start(option: DiskOption) -> Vm {
        let world = TestMount::unmounted();
        let dir = world.dir().join("vm");
        fs::create_dir(&dir).unwrap();
        let raw = dir.join("raw");
        fs::write(&raw, [random(3, 24 << 20), vec![0; 40 << 20]].concat()).unwrap();
        let image = dir.join("disk.qcow2");
        run("qemu-img", &["convert", "-O", "qcow2", raw.to_str().unwrap(), image.to_str().unwrap()]);
        fs::remove_file(raw).unwrap();
        // A path relative to the working directory of QEMU, as a user types it.
        let relative = image.strip_prefix(std::env::current_dir().unwrap()).unwrap_or(&image).display();
        let disk = match option {
            DiskOption::Drive => format!("-drive if=none,id=root,format=qcow2,file={relative}"),
            DiskOption::Blockdev => format!(
                "-blockdev driver=file,node-name=f,filename={relative} -blockdev driver=qcow2,node-name=root,file=f"
            ),
        };
        let extra = format!(
            "-qmp unix:{}/qmp2,server=on,wait=off -device virtio-scsi-pci,id=s {disk} \
             -device scsi-hd,drive=root,id=hd,bus=s.0",
            world.dir().display()
        );
        let mut words = qemu_words(world.dir(), "192M");
        words.extend(extra.split_ascii_whitespace().map(str::to_owned));
        let qemu = Qemu::start(world.dir(), &words);
        let ram = fs::OpenOptions::new().write(true).open(world.dir().join("ram")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&ram, &random(5, 64 << 20), 100 << 20).unwrap();
        let mut qmp = Qmp::connect(&world.dir().join("qmp2")).unwrap();
        let media_before = media(&mut qmp);
        Vm { world, qemu, qmp, media_before, written: 0 }
    }

    pub fn dir(&self) -> PathBuf {
        self.world.dir().join("vm")
    }

    pub fn image(&self) -> PathBuf {
        self.dir().join("disk.qcow2")
    }

    fn pid(&self) -> u32 {
        self.qmp.peer_pid().unwrap()
    }

    /// Writes the next step of the disk asynchronously, as a guest does. Panics if the write takes longer than 10 s.
    #[track_caller]
    pub fn write(&mut self) {
        let writes = self.writes();
        let (pattern, offset) = (self.written + 1, self.written * STEP);
        let line = format!("qemu-io -d hd \"aio_write -P {pattern} {offset} {STEP}\"");
        let output = self.qmp.run("human-monitor-command", json!({"command-line": line})).unwrap();
        assert_eq!(output, "");
        patiently("completion of the write", Duration::from_secs(10), || {
            (self.writes() > writes).then_some(())
        });
        self.written += 1;
    }

    fn writes(&mut self) -> u64 {
        let all = self.qmp.run("query-blockstats", json!({})).unwrap();
        all.as_array().unwrap().iter().map(|b| b["stats"]["wr_operations"].as_u64().unwrap()).sum()
    }

    /// Asserts that the image is consistent and has every write.
    #[track_caller]
    pub fn assert_image_has_all_writes(&self) {
        let image = self.image();
        run("qemu-img", &["check", "-q", image.to_str().unwrap()]);
        for step in 0..self.written {
            let read = format!("read -P {} {} {STEP}", step + 1, step * STEP);
            let output = run("qemu-io", &["-r", "-f", "qcow2", "-c", &read, image.to_str().unwrap()]);
            assert!(!output.contains("failed"), "step {step}: {output}");
        }
    }

    /// Ends QEMU, and asserts that the image has every write.
    #[track_caller]
    pub fn quit(mut self) {
        self.write();
        self.qmp.run("quit", json!({})).unwrap();
        patiently("the exit of QEMU", Duration::from_secs(10), || self.qemu.has_ended().then_some(()));
        self.assert_image_has_all_writes();
    }

    /// Waits until the VM runs with its own disk and settings and no overlay, job or helper of a capture is left; then
    /// writes to the disk.
    #[track_caller]
    pub fn wait_restored(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            let (status, current) = (self.qmp.status().unwrap(), media(&mut self.qmp));
            let (ignores, left) = (ignores_shared(&mut self.qmp), overlays(&self.dir()));
            let helpers = self.helpers();
            if status == "running"
                && current == self.media_before
                && !ignores
                && left.is_empty()
                && helpers.is_empty()
            {
                break;
            }
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            assert!(Instant::now() < deadline, "{status} {current} {ignores} {left:?} {helpers:?}: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let jobs = self.qmp.run("query-jobs", json!({})).unwrap();
        assert_eq!(jobs, json!([]));
        self.write();
    }

    /// The helper processes (`capture-watchdog`) of captures of this VM.
    pub fn helpers(&self) -> Vec<Pid> {
        let pid = self.pid().to_string();
        processes(|args| args.contains(&"capture-watchdog".into()) && args.contains(&pid))
    }

    /// Kills the only helper at a moment without a block job: at the end of a commit QEMU holds back writes of the
    /// guest.
    #[track_caller]
    pub fn kill_helper(&mut self) {
        let [helper] = self.helpers()[..] else { panic!("not exactly one helper") };
        patiently("a moment without a block job", Duration::from_secs(10), || {
            kill_process(helper, Signal::STOP).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            let is_idle = self.qmp.run("query-jobs", json!({})).unwrap() == json!([]);
            kill_process(helper, if is_idle { Signal::KILL } else { Signal::CONT }).unwrap();
            is_idle.then_some(())
        });
        patiently("the exit of the helper", Duration::from_secs(5), || {
            self.helpers().is_empty().then_some(())
        });
    }

    /// The qemu-img processes that read disks for captures of this VM.
    fn readers(&self) -> Vec<Pid> {
        let socket = self.qemu.socket().display().to_string();
        let captures = processes(|args| args.contains(&"capture".into()) && args.contains(&socket));
        // qemu-img opens the image through a descriptor of the capture.
        let fd_dir = |capture: &Pid| format!("/proc/{}/fd/", capture.as_raw_nonzero());
        let fd_dirs: Vec<String> = captures.iter().map(fd_dir).collect();
        let is_in_fd_dir = |arg: &String| fd_dirs.iter().any(|dir| arg.contains(dir));
        processes(|args| args[0].ends_with("qemu-img") && args.iter().any(is_in_fd_dir))
    }

    pub fn log(&self) -> PathBuf {
        self.world.dir().join("capture.log")
    }

    pub fn capture(&self, extra: &[&str]) -> Command {
        let mut command = self.world.command();
        command.arg("capture").arg(self.qemu.socket()).arg("vm:x").args(extra);
        command
    }

    /// Starts a capture and stops it, with its qemu-img, once `moment` is true. If a capture completes earlier, another
    /// capture is started.
    #[track_caller]
    pub fn stop_capture_at(&mut self, extra: &[&str], moment: impl Fn(&mut Vm) -> bool) -> StoppedCapture {
        for _ in 0..20 {
            let log = fs::File::create(self.log()).unwrap();
            let mut child = self.capture(extra).stdout(Stdio::null()).stderr(log).spawn().unwrap();
            let pid = Pid::from_raw(child.id() as i32).unwrap();
            while child.try_wait().unwrap().is_none() {
                if moment(self) {
                    kill_process(pid, Signal::STOP).unwrap();
                    let processes = [vec![pid], self.readers()].concat();
                    signal(&processes, Signal::STOP);
                    // The stop must not come at the end of a commit, when QEMU holds back writes of the guest.
                    std::thread::sleep(Duration::from_millis(50));
                    let jobs = self.qmp.run("query-jobs", json!({})).unwrap();
                    if jobs == json!([]) && moment(self) {
                        return StoppedCapture { child, processes, log: self.log() };
                    }
                    signal(&processes, Signal::CONT);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(child.wait().unwrap().success(), "{}", fs::read_to_string(self.log()).unwrap());
        }
        panic!("every capture completed before the wanted moment");
    }

    fn is_paused(&mut self) -> bool {
        matches!(self.qmp.status().unwrap().as_str(), "paused" | "postmigrate")
    }

    /// True if the VM is paused and its device state has been written.
    pub fn state_is_written(&mut self) -> bool {
        self.qmp.status().unwrap() == "postmigrate"
    }

    /// True if the VM runs on an overlay, while the capture reads its image.
    pub fn runs_on_overlay(&mut self) -> bool {
        let has_overlay = media(&mut self.qmp).to_string().contains(".stencil-");
        has_overlay && self.qmp.status().unwrap() == "running"
    }
}

/// Returns the processes whose command line matches.
fn processes(matches: impl Fn(&[String]) -> bool) -> Vec<Pid> {
    let mut found = vec![];
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let args: Vec<String> =
            cmdline.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        if matches(&args) {
            found.extend(Pid::from_raw(pid));
        }
    }
    found
}

/// Sends a signal to processes, except those that have exited.
fn signal(processes: &[Pid], signal: Signal) {
    for &process in processes {
        let _ = kill_process(process, signal);
    }
}

/// A capture that is stopped by SIGSTOP.
pub struct StoppedCapture {
    pub child: Child,
    /// The capture and its qemu-img.
    processes: Vec<Pid>,
    log: PathBuf,
}

impl StoppedCapture {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    pub fn resume(&self) {
        signal(&self.processes, Signal::CONT);
    }

    /// Resumes the capture and waits for its exit.
    pub fn finish(mut self) -> Run {
        self.resume();
        let code = self.child.wait().unwrap().code().unwrap();
        let err = fs::read_to_string(&self.log).unwrap();
        Run { code, out: String::new(), err, words: "capture".into() }
    }

    /// Kills the capture, but not its qemu-img.
    pub fn kill(mut self) {
        kill_process(self.pid(), Signal::KILL).unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn capture_restores_the_vm_if_device_state_does_not_fit() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let small = vm.world.dir().join("small");
    fs::create_dir(&small).unwrap();
    let small_path = small.to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", small_path]);
    let mounted = Mounted(small.clone());
    for extra in [&[][..], &["--pause"], &["--quit"]] {
        let output = vm.capture(extra).env("TMPDIR", &small).output().unwrap();
        // The capture itself restores the VM before it exits; the helper is not needed.
        assert_eq!(vm.qmp.status().unwrap(), "running");
        assert!(!ignores_shared(&mut vm.qmp));
        let run = Run::of("capture".into(), &output).exits(1).says("cannot write device state");
        assert!(!run.err.contains("; also: "), "{}", run.err);
    }
    drop(mounted);
    vm.wait_restored();
    vm.world.stencil(&["inspect", "vm:x"]).exits(4);
    // The next capture succeeds.
    vm.world.json(&["capture", vm.qemu.socket().to_str().unwrap(), "vm:y"]);
    vm.wait_restored();
    vm.quit();
}

#[test]
fn an_overlay_that_cannot_be_renamed_is_committed_later() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let dir = vm.dir();
    let fail_to_rename = |vm: &mut Vm| {
        let capture = vm.stop_capture_at(&[], Vm::runs_on_overlay);
        vm.write();
        let immutable = Immutable::make(&dir);
        let run = capture.finish().exits(1);
        assert!(run.err.contains("created template vm:x"), "{}", run.err);
        assert!(run.err.contains("cannot rename the overlay"), "{}", run.err);
        vm.world.stencil(&["verify", "vm:x"]).ok();
        // The guest can still write.
        vm.write();
        let [overlay] = &overlays(&dir)[..] else { panic!("not exactly one overlay") };
        assert!(run.err.contains(&format!("'qemu-img commit {}'", overlay.display())), "{}", run.err);
        (overlay.clone(), immutable)
    };
    // The helper retries the commit.
    drop(fail_to_rename(&mut vm));
    vm.wait_restored();

    // Without a helper, the next capture commits the overlay.
    let (_, immutable) = fail_to_rename(&mut vm);
    vm.kill_helper();
    drop(immutable);
    vm.write();
    vm.world.json(&["capture", vm.qemu.socket().to_str().unwrap(), "vm:y"]);
    vm.wait_restored();

    // Without a VM, the command in the hint commits the overlay.
    let (overlay, immutable) = fail_to_rename(&mut vm);
    vm.kill_helper();
    drop(immutable);
    vm.write();
    vm.qmp.run("quit", json!({})).unwrap();
    patiently("the exit of QEMU", Duration::from_secs(10), || vm.qemu.has_ended().then_some(()));
    run("qemu-img", &["commit", "-q", overlay.to_str().unwrap()]);
    vm.assert_image_has_all_writes();
}

#[test]
fn unplugging_a_disk_during_its_read_loses_no_writes() {
    let _host = host::shared();
    for (option, killed) in
        [(DiskOption::Drive, false), (DiskOption::Drive, true), (DiskOption::Blockdev, false)]
    {
        let mut vm = Vm::start(option);
        let capture = vm.stop_capture_at(&[], Vm::runs_on_overlay);
        vm.write();
        vm.write();
        vm.qmp.run("device_del", json!({"id": "hd"})).unwrap();
        patiently("the removal of the device", Duration::from_secs(10), || {
            (!media(&mut vm.qmp).to_string().contains("\"hd\"")).then_some(())
        });
        match (option, killed) {
            (_, true) => capture.kill(),
            (DiskOption::Drive, _) => drop(capture.finish().exits(0)),
            (DiskOption::Blockdev, _) => {
                let run = capture.finish().exits(1);
                let [overlay] = &overlays(&vm.dir())[..] else { panic!("not exactly one overlay") };
                assert!(run.err.contains(&format!("'qemu-img commit {}'", overlay.display())), "{}", run.err);
                vm.kill_helper();
                vm.qmp.run("blockdev-del", json!({"node-name": "root"})).unwrap();
                run_commit(overlay);
            }
        }
        patiently("the removal of the overlay", Duration::from_secs(20), || {
            overlays(&vm.dir()).is_empty().then_some(())
        });
        assert_eq!(vm.qmp.status().unwrap(), "running");
        vm.assert_image_has_all_writes();
    }
}

fn run_commit(overlay: &Path) {
    run("qemu-img", &["commit", "-q", overlay.to_str().unwrap()]);
    fs::remove_file(overlay).unwrap();
}

#[test]
fn capture_fails_if_the_vm_runs_before_its_ram_is_read() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    for (extra, command) in [(&[][..], "cont"), (&["--pause"], "cont"), (&["--pause"], "system_reset")] {
        let capture = vm.stop_capture_at(extra, Vm::state_is_written);
        vm.world.stencil(&["rm", "vm:x"]);
        vm.qmp.run(command, json!({})).unwrap();
        // The main loop of QEMU executes a reset before it answers the next QMP command.
        vm.qmp.status().unwrap();
        let run = capture.finish().exits(75);
        assert!(run.err.contains("no template was created"), "{}", run.err);
        vm.world.stencil(&["inspect", "vm:x"]).exits(4);
        vm.wait_restored();
    }
    vm.quit();
}

#[test]
fn a_second_capture_of_the_same_vm_is_refused() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    let first = vm.stop_capture_at(&[], Vm::is_paused);
    let start = Instant::now();
    let second = vm.capture(&[]).output().unwrap();
    // The second capture does not wait for the QMP session of the first.
    assert!(start.elapsed() < Duration::from_secs(15));
    let run = Run::of("capture".into(), &second).exits(5);
    let holder = format!("is in use by another capture (process {})", first.child.id());
    assert!(run.err.contains(&holder), "{}", run.err);
    first.finish().exits(0);
    vm.wait_restored();
    vm.quit();
}

fn ignore_shared(qmp: &mut Qmp, on: bool) {
    let capabilities = json!({"capabilities": [{"capability": "x-ignore-shared", "state": on}]});
    qmp.run("migrate-set-capabilities", capabilities).unwrap();
}

#[test]
fn settings_and_run_state_are_restored_after_a_killed_capture() {
    let _host = host::shared();
    let mut vm = Vm::start(DiskOption::Drive);
    // The qemu-img of a killed capture exits too.
    let capture = vm.stop_capture_at(&[], |vm| vm.runs_on_overlay() && !vm.readers().is_empty());
    capture.kill();
    patiently("the exit of qemu-img", Duration::from_secs(5), || vm.readers().is_empty().then_some(()));
    vm.wait_restored();

    // A capability that was set before the capture is set after it, for a running and for a paused VM.
    ignore_shared(&mut vm.qmp, true);
    for was_running in [true, false] {
        vm.qmp.run(if was_running { "cont" } else { "stop" }, json!({})).unwrap();
        vm.stop_capture_at(&[], Vm::state_is_written).kill();
        patiently("the exit of the helper", Duration::from_secs(20), || {
            vm.helpers().is_empty().then_some(())
        });
        assert!(ignores_shared(&mut vm.qmp));
        assert_eq!(vm.qmp.status().unwrap() == "running", was_running);
    }
    ignore_shared(&mut vm.qmp, false);
    vm.qmp.run("cont", json!({})).unwrap();
    // A VM that was paused, with the capability off.
    vm.qmp.run("stop", json!({})).unwrap();
    vm.stop_capture_at(&[], Vm::state_is_written).kill();
    patiently("the restored capability", Duration::from_secs(20), || {
        (!ignores_shared(&mut vm.qmp) && vm.helpers().is_empty()).then_some(())
    });
    vm.qmp.run("cont", json!({})).unwrap();
    vm.wait_restored();
    vm.quit();
}
