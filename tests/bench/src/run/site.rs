//! The directory of a run, and the programs that run in it. Everything in it disappears at the end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use stencilfs::error::{Error, Result};
use tempfile::TempDir;

use super::interrupt;

/// Time limit for a mount to serve a template in the wanted way.
const SERVING_TIMEOUT: Duration = Duration::from_secs(300);

/// The directory of a run.
pub struct Site {
    dir: TempDir,
    stencil: PathBuf,
    /// Program that touches pages of a file: `touch.c`.
    pub touch: PathBuf,
    /// Program that launches processes and does nothing else: `fork_loop.c`.
    pub fork_loop: PathBuf,
    /// Program that scans page tables and does nothing else: `scan_loop.c`.
    pub scan_loop: PathBuf,
}

impl Site {
    /// Creates the directory below `parent`, which must be on a disk, and compiles the C programs.
    pub fn new(parent: &Path, programs: &Path, sources: &Path) -> Result<Site> {
        let created = fs::create_dir_all(parent).and_then(|()| {
            let parent = parent.canonicalize()?;
            tempfile::Builder::new().prefix("bench.").tempdir_in(parent)
        });
        let dir = created.map_err(|e| Error::io("cannot create a directory in", parent, e))?;
        let stencil = programs.join("stencil");
        let stencil =
            stencil.canonicalize().map_err(|e| Error::io("cannot find the program", &stencil, e))?;
        let [touch, fork_loop, scan_loop] =
            ["touch", "fork_loop", "scan_loop"].map(|name| dir.path().join(name));
        let site = Site { dir, stencil, touch, fork_loop, scan_loop };
        site.create_dir("run")?;
        for (name, program) in
            [("touch.c", &site.touch), ("fork_loop.c", &site.fork_loop), ("scan_loop.c", &site.scan_loop)]
        {
            let mut cc = Command::new("cc");
            run(cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(program).arg(sources.join(name)))?;
        }
        Ok(site)
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn create_dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir(&path).map_err(|e| Error::io("cannot create the directory", &path, e))?;
        Ok(path)
    }

    /// The command `stencil` with these arguments.
    pub fn stencil(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.stencil);
        command.env("STENCIL_RUNTIME_DIR", self.path("run")).env_remove("STENCIL_STORE");
        command.arg("-q").args(words);
        command
    }

    /// Runs `stencil --json` with these arguments and returns what it prints.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        json_of(self.stencil(&[]).arg("--json").args(words))
    }

    /// A command line as it is recorded.
    pub fn recorded(&self, command: &Command) -> String {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let text: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        let text = self.shown(&text.join(" ")).replace(&*self.stencil.to_string_lossy(), "stencil");
        text.replace("stencil -q ", "stencil ")
    }

    /// A text as it is recorded: the directory of the run is `DIR`.
    pub fn shown(&self, text: &str) -> String {
        text.replace(&*self.dir.path().to_string_lossy(), "DIR")
    }

    /// Device and type of the file system of the directory.
    pub fn file_system(&self) -> Result<String> {
        let found =
            run(Command::new("findmnt").args(["-n", "-o", "FSTYPE,SOURCE", "-T"]).arg(self.dir.path()))?;
        Ok(found.split_ascii_whitespace().collect::<Vec<_>>().join(" on "))
    }

    /// `st_dev` of the directory.
    pub fn device(&self) -> Result<u64> {
        let stat = fs::metadata(self.dir.path());
        Ok(stat.map_err(|e| Error::io("cannot inspect", self.dir.path(), e))?.dev())
    }
}

/// A store of the run. Dropped after its mounts.
pub struct Store<'a> {
    pub site: &'a Site,
    pub dir: PathBuf,
}

impl<'a> Store<'a> {
    pub fn new(site: &'a Site, name: &str) -> Store<'a> {
        Store { site, dir: site.path(name) }
    }

    /// The command that imports a file as `bench:TAG`.
    pub fn import(&self, source: &Path, tag: &str, more: &[&str]) -> Command {
        let mut command = self.site.stencil(&["--store"]);
        command.arg(&self.dir).arg("import").arg(source).arg(format!("bench:{tag}"));
        command.args(["--format", "raw"]).args(more);
        command
    }

    /// The command that mounts the store.
    pub fn mounting(&self, mountpoint: &Path, serve: &str, more: &[&str]) -> Command {
        let mut command = self.site.stencil(&["--store"]);
        command.arg(&self.dir).arg("mount").arg(mountpoint).args(["--serve", serve]).args(more);
        command
    }

    /// Mounts the store.
    pub fn mount(&self, serve: &str) -> Result<Mount<'a>> {
        self.mount_as(serve, serve, &[])
    }

    /// Mounts the store with further options, at a place of that name.
    pub fn mount_as(&self, name: &str, serve: &str, more: &[&str]) -> Result<Mount<'a>> {
        let mountpoint = self.dir.with_extension(format!("mnt-{name}"));
        let created = fs::create_dir_all(&mountpoint);
        created.map_err(|e| Error::io("cannot create the mountpoint", &mountpoint, e))?;
        // The copy of a large file takes longer than the default time limit of the first open.
        let mut command = self.mounting(&mountpoint, serve, &[&["--hydrate-timeout", "600"], more].concat());
        let (name, serve, store) = (name.to_owned(), serve.to_owned(), self.dir.clone());
        // The guard exists before the command runs, so that the mount is removed if a signal ends this program.
        let mount = Mount { site: self.site, store, path: mountpoint, name, serve };
        run(&mut command)?;
        Ok(mount)
    }

    /// Makes sealed packs changeable again. What was verified before counts as unverified then.
    pub fn unseal(&self) -> Result<()> {
        run(self.site.stencil(&["store", "unseal"]).arg(&self.dir)).map(drop)
    }

    /// Bytes that the store's files occupy.
    pub fn stored_bytes(&self) -> Result<u64> {
        occupied(&self.dir)
    }
}

impl Drop for Store<'_> {
    fn drop(&mut self) {
        if self.dir.exists() {
            tidy(self.site.stencil(&["store", "unseal"]).arg(&self.dir));
            if let Err(error) = fs::remove_dir_all(&self.dir) {
                eprintln!("cannot remove {}: {error}", self.dir.display());
            }
        }
    }
}

/// A mount of a store.
pub struct Mount<'a> {
    site: &'a Site,
    pub store: PathBuf,
    pub path: PathBuf,
    pub name: String,
    pub serve: String,
}

impl Mount<'_> {
    /// The memory of the template `bench:TAG`.
    pub fn memory(&self, tag: &str) -> PathBuf {
        self.path.join("templates/bench").join(tag).join("memory")
    }

    /// What `stencil status` says about this mount.
    pub fn status(&self) -> Result<Value> {
        let all = self.site.json(&["status"])?;
        let mounts = all["mounts"].as_array().into_iter().flatten();
        let own =
            mounts.into_iter().find(|mount| mount["mountpoint"].as_str().map(Path::new) == Some(&self.path));
        own.cloned().ok_or_else(|| Error::failed("the mount is not in the status").at(&self.path))
    }

    /// READ requests so far.
    pub fn reads(&self) -> Result<u64> {
        let reads = self.status()?["counters"]["reads"].as_u64();
        reads.ok_or_else(|| Error::failed("the status lacks the counter of READs").at(&self.path))
    }

    /// Waits until a template is served as the mount was asked to, so that no measurement is about another way.
    pub fn wait_until_served(&self, digest: &str) -> Result<()> {
        let end = Instant::now() + SERVING_TIMEOUT;
        loop {
            let status = self.status()?;
            let mut templates = status["templates"].as_array().into_iter().flatten();
            let template = templates.find(|template| template["digest"] == digest);
            let (serving, why) =
                template.map_or((&Value::Null, &Value::Null), |t| (&t["serving"], &t["why"]));
            if *serving == *self.serve {
                return Ok(());
            }
            if Instant::now() > end {
                let text = format!("{digest} is served as {serving}, not as {}: {why}", self.serve);
                return Err(Error::failed(text).at(&self.path));
            }
            interrupt::check()?;
            // Each look starts a process, on the processors that verify.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Replaces the server, whose cache of blocks is then empty.
    pub fn restart(&self) -> Result<()> {
        run(self.site.stencil(&["restart"]).arg(&self.path)).map(drop)
    }

    pub fn umount(self) -> Result<()> {
        // Drop would unmount it again.
        let this = std::mem::ManuallyDrop::new(self);
        let result = run(this.site.stencil(&["umount"]).arg(&this.path)).map(drop);
        if result.is_err() {
            tidy(this.site.stencil(&["umount", "--force"]).arg(&this.path));
        }
        result
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let umount = self.site.stencil(&["umount"]).arg(&self.path).output();
        if umount.is_ok_and(|output| !output.status.success()) {
            tidy(self.site.stencil(&["umount", "--force"]).arg(&self.path));
        }
    }
}

/// An EROFS image on a loop device, which the kernel frees at the unmount.
pub struct Erofs {
    mountpoint: PathBuf,
}

impl Erofs {
    pub fn mount(image: &Path) -> Result<Erofs> {
        let mountpoint = image.with_extension("mnt");
        fs::create_dir(&mountpoint).map_err(|e| Error::io("cannot create the mountpoint", &mountpoint, e))?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(&mountpoint);
        let erofs = Erofs { mountpoint };
        run(&mut mount)?;
        Ok(erofs)
    }

    /// A file of the image.
    pub fn file(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }
}

impl Drop for Erofs {
    fn drop(&mut self) {
        tidy(Command::new("umount").arg(&self.mountpoint));
    }
}

/// Runs a command, which must succeed, and returns what it prints.
pub fn run(command: &mut Command) -> Result<String> {
    let output = interrupt::output(command)?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(failure(command, &output)),
    }
}

/// Runs a command that prints JSON.
pub fn json_of(command: &mut Command) -> Result<Value> {
    let text = run(command)?;
    let name = command.get_program().to_string_lossy().into_owned();
    serde_json::from_str(&text).map_err(|e| Error::failed(format!("{name} printed no JSON: {e}: {text}")))
}

fn failure(command: &Command, output: &Output) -> Error {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let text: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let error = String::from_utf8_lossy(&output.stderr);
    Error::failed(format!("{}: {}: {}", text.join(" "), output.status, error.trim()))
}

/// Runs a command that removes something. Its failure is reported and ends nothing: the rest must go too.
fn tidy(command: &mut Command) {
    match command.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => eprintln!("{}", failure(command, &output)),
        Err(error) => eprintln!("cannot run {}: {error}", command.get_program().to_string_lossy()),
    }
}

/// Bytes that the files below a directory, or one file, occupy.
pub fn occupied(path: &Path) -> Result<u64> {
    let text = run(Command::new("du").args(["-s", "--block-size=1"]).arg(path))?;
    let bytes = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
    bytes.ok_or_else(|| Error::failed(format!("du printed '{text}'")))
}
