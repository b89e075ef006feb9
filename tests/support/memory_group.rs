//! A memory cgroup for the processes of one scenario.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A cgroup without a limit at first. Removed on drop, when its processes must have exited.
pub struct MemoryGroup {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl MemoryGroup {
    /// Creates a cgroup, of version 1 if it has the memory controller.
    pub fn new() -> MemoryGroup {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("stencil-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let group = if v1.join("memory.limit_in_bytes").exists() {
            MemoryGroup { dir: v1.join(name), limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes" }
        } else {
            MemoryGroup {
                dir: Path::new("/sys/fs/cgroup").join(name),
                limit: "memory.max",
                usage: "memory.current",
            }
        };
        fs::create_dir(&group.dir).unwrap_or_else(|e| panic!("{}: {e}", group.dir.display()));
        group
    }

    /// Creates a cgroup with this limit in bytes, whose memory is never swapped.
    pub fn limited(bytes: u64) -> MemoryGroup {
        let group = MemoryGroup::new();
        let swap = if group.is_v2() { "memory.swap.max" } else { "memory.swappiness" };
        // Without swap in the kernel the file does not exist.
        let _ = fs::write(group.dir.join(swap), "0");
        group.set_limit(&bytes.to_string()).unwrap();
        group
    }

    /// True for version 2.
    pub fn is_v2(&self) -> bool {
        self.limit == "memory.max"
    }

    /// The directory of the cgroup.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The memory that counts for the limit, in bytes.
    pub fn usage(&self) -> u64 {
        fs::read_to_string(self.dir.join(self.usage)).unwrap().trim().parse().unwrap()
    }

    /// Sets the limit.
    pub fn set_limit(&self, limit: &str) -> std::io::Result<()> {
        fs::write(self.dir.join(self.limit), limit)
    }

    /// Removes the limit.
    pub fn unlimit(&self) {
        self.set_limit(if self.is_v2() { "max" } else { "-1" }).unwrap();
    }

    /// Makes a command run in this cgroup.
    pub fn command(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        inside.args(["-c", "echo $$ >\"$0\"/cgroup.procs && exec \"$@\""]).arg(&self.dir);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            inside.current_dir(directory);
        }
        inside
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
