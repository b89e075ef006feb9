//! QEMU by TCG with the Linux guest of `tests/support/guest.sh`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;
use stencilfs::clones::migration::{Settings, wait_end};
use stencilfs::clones::qmp::Qmp;
use stencilfs::error::{Error, Result};

use super::{Kind, Running, TIMEOUT, export, wait_for};
use crate::run::site::{Site, Store, run};

/// A captured guest.
pub struct Qemu {
    program: String,
    /// Arguments of a clone, with placeholders for the memory and for the directory of the clone.
    arguments: Vec<String>,
    /// Device state of the guest.
    state: PathBuf,
    command: String,
}

impl Qemu {
    /// Boots the guest, captures it as `bench:guest` and writes its files to `raw`.
    pub fn capture(site: &Site, store: &Store, raw: &Path) -> Result<Qemu> {
        let dir = site.create_dir("qemu.source")?;
        let text = run(&mut Command::new("tests/support/guest.sh"))?;
        let linux: Vec<&str> = text.lines().collect();
        let [kernel, initramfs, append] = linux[..] else {
            return Err(Error::failed("guest.sh did not print three lines"));
        };
        let mut words: Vec<String> = "-M q35,memory-backend=ram0 -accel tcg -cpu max -m 256M -nodefaults \
                                      -no-user-config -display none -device vmgenid,guid=auto \
                                      -object rng-random,id=rng0,filename=/dev/urandom \
                                      -device virtio-rng-pci,rng=rng0 -serial file:serial"
            .split_ascii_whitespace()
            .map(str::to_owned)
            .collect();
        let socket = |name: &str| format!("unix:{name},server=on,wait=off");
        let memory = format!("memory-backend-file,id=ram0,size=256M,mem-path={}/ram,share=on", dir.display());
        let (second, qmp) = (socket(&dir.join("second.sock").display().to_string()), socket("qmp"));
        let more = ["-object", &memory, "-serial", &second, "-qmp", &qmp];
        words.extend(more.map(str::to_owned));
        words.extend(["-kernel", kernel, "-initrd", initramfs, "-append", append].map(str::to_owned));
        let guest = start("qemu-system-x86_64", &words, &dir)?;
        wait_for("three heartbeats of the guest", || {
            let text = fs::read(dir.join("serial")).unwrap_or_default();
            (String::from_utf8_lossy(&text).matches("heartbeat").count() >= 3).then_some(())
        })?;
        let mut capture = site.stencil(&["--store"]);
        run(capture.arg(&store.dir).arg("capture").arg(dir.join("qmp")).args(["bench:guest", "--quit"]))?;
        drop(guest);
        export(site, store, raw)?;
        Qemu::of_recipe(site, store, raw)
    }

    /// The command line of the template's recipe, with the files in `raw`.
    fn of_recipe(site: &Site, store: &Store, raw: &Path) -> Result<Qemu> {
        let store = store.dir.to_string_lossy();
        let found = site.json(&["--store", &store, "inspect", "bench:guest", "--recipe"])?;
        let recipe = &found["recipe"];
        let program = recipe["program"].as_str();
        let file = |name: &str| raw.join(name).display().to_string();
        let words = recipe["argv"].as_array().into_iter().flatten().filter_map(|word| word.as_str());
        let arguments: Vec<String> = words
            .map(|word| {
                word.replace("{file:kernel}", &file("kernel")).replace("{file:initrd}", &file("initrd"))
            })
            .map(|word| {
                word.replace("{uuid}", "8e7a1d0e-6f0c-4d8e-9c52-0b1f5a6c7d8e").replace("{id}", "bench")
            })
            .collect();
        let unknown = arguments.iter().find(|word| {
            let word = word.replace("{memory}", "").replace("{dir}", "");
            word.contains('{')
        });
        match (program, unknown) {
            (Some(program), None) => Ok(Qemu {
                program: program.to_owned(),
                command: "the template's recipe for QEMU, with the memory {memory}; migrate-incoming; cont; a line to \
                          the second serial port; stop"
                    .to_owned(),
                arguments,
                state: raw.join("state"),
            }),
            _ => Err(Error::failed(format!("cannot run the recipe of the guest: {recipe}"))),
        }
    }
}

impl Kind for Qemu {
    fn name(&self) -> &'static str {
        "QEMU"
    }

    fn command(&self) -> &str {
        &self.command
    }

    fn resume(&self, memory: &Path, dir: &Path) -> Result<Running> {
        let (memory, place) = (memory.display().to_string(), dir.display().to_string());
        let fill = |word: &String| word.replace("{memory}", &memory).replace("{dir}", &place);
        let words: Vec<String> = self.arguments.iter().map(fill).collect();
        let running = start(&self.program, &words, dir)?;
        let qmp = dir.join("qmp.sock");
        let mut qmp = wait_for("the QMP socket", || Qmp::connect(&qmp).ok())?;
        Settings::of(&mut qmp)?.for_device_state().apply(&mut qmp)?;
        qmp.run("migrate-incoming", json!({"uri": format!("file:{}", self.state.display())}))?;
        wait_end(&mut qmp, Instant::now() + TIMEOUT)?;
        qmp.run("cont", json!({}))?;
        ask(&dir.join("serial-1.sock"))?;
        // A guest that runs by TCG would take processor time from guests that are still starting.
        qmp.run("stop", json!({}))?;
        Ok(running)
    }
}

/// Sends a line to the second serial port; the guest answers with its last heartbeat.
fn ask(socket: &Path) -> Result<()> {
    let ask = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        (&stream).write_all(b"ping\n")?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|e| Error::io("cannot ask the guest", socket, e))?;
    match answer.starts_with("ping: ") {
        true => Ok(()),
        false => Err(Error::failed(format!("the guest answered '{}'", answer.trim())).at(socket)),
    }
}

fn start(program: &str, words: &[String], dir: &Path) -> Result<Running> {
    let failed = |e| Error::io("cannot run QEMU in", dir, e);
    let log = File::create(dir.join("log")).map_err(failed)?;
    let mut command = Command::new(program);
    command.args(words).current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    Ok(Running(command.spawn().map_err(failed)?))
}
