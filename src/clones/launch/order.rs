//! The request and the result of a launch.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::simulate::Simulate;
use super::target::Target;
use crate::clones::agent::Clock;
use crate::clones::recipe::Recipe;
use crate::clones::registry::{Entry, Kind};
use crate::clones::vmm::Served;
use crate::sys::process::session::Child;

/// The kind of the clones to launch.
#[derive(Debug, Clone)]
pub enum How {
    /// Simulated clones: processes of this program that touch pages like a guest.
    Simulated(Simulate),
    /// QEMU processes, resumed by this recipe.
    Qemu(Recipe),
    /// Firecracker processes that load the template's snapshot.
    Firecracker(Microvm),
    /// Cloud Hypervisor processes that restore the template's snapshot.
    CloudHypervisor(CloudHypervisor),
    /// Processes of a command with placeholders.
    Command(Vec<String>, Ready),
}

impl How {
    /// Returns the kind of the clones' processes.
    pub fn kind(&self) -> Kind {
        match self {
            How::Simulated(_) => Kind::Simulated,
            How::Qemu(_) => Kind::Qemu,
            How::Firecracker(_) => Kind::Firecracker,
            How::CloudHypervisor(_) => Kind::CloudHypervisor,
            How::Command(..) => Kind::Command,
        }
    }
}

/// The program and the requests with which a launch starts its Firecracker processes.
#[derive(Debug, Clone)]
pub struct Microvm {
    /// Absolute path of Firecracker.
    pub program: PathBuf,
    /// Body of `PUT /snapshot/load`.
    pub body: serde_json::Value,
    /// The id of each network interface, and the device of the host for that interface, with placeholders.
    pub networks: Vec<(String, String)>,
    /// Path of each clone's vsock socket, relative to its directory or jail; `None` for the path in the snapshot.
    pub vsock: Option<String>,
    /// Starts each Firecracker in a jail; `None` to start Firecracker itself.
    pub jailer: Option<Jailer>,
}

/// The program and the snapshot with which a launch starts its Cloud Hypervisor processes.
#[derive(Debug, Clone)]
pub struct CloudHypervisor {
    /// Absolute path of Cloud Hypervisor.
    pub program: PathBuf,
    /// The template, with the files of the snapshot.
    pub template: Box<Served>,
    /// The id of each network device, and the TAP device of the host for that device, with placeholders.
    pub networks: Vec<(String, String)>,
}

/// Firecracker's jailer, and its options.
#[derive(Debug, Clone)]
pub struct Jailer {
    /// Absolute path of the jailer.
    pub program: PathBuf,
    /// User id of Firecracker in the jail.
    pub uid: u32,
    /// Group id of Firecracker in the jail.
    pub gid: u32,
    /// Absolute path of the directory in which the jailer makes a directory for each jail.
    pub chroot_base_dir: PathBuf,
}

/// The condition for a command to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// A process of the command maps the template's memory.
    Mapped,
    /// The command has written to the file descriptor whose number is in `STENCIL_NOTIFY`.
    Notify,
}

/// The parameters of a launch.
#[derive(Debug)]
pub struct LaunchRequest<'a> {
    /// The template.
    pub target: &'a Target,
    /// The kind of the clones.
    pub how: How,
    /// Number of clones.
    pub count: u32,
    /// Maximum number of clones that start at the same time.
    pub parallel: u32,
    /// Keeps the clones that become ready if others fail.
    pub keep_going: bool,
    /// Timeout for one clone to become ready.
    pub ready_timeout: Duration,
    /// Labels of the clones.
    pub labels: BTreeMap<String, String>,
    /// Absolute path of the directory for the clones' disks; `None` for each clone's own directory.
    pub disk_dir: Option<PathBuf>,
    /// For simulated clones: pages of each file to copy before the clone touches others.
    pub prefault: BTreeMap<String, Vec<Range<u64>>>,
    /// Cancels the launch when set.
    pub cancel: &'a AtomicBool,
}

/// A clone that did not become ready.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Failure {
    /// Index of the clone within the launch.
    pub index: u32,
    /// The reason.
    pub message: String,
    /// The remedy.
    #[serde(skip)]
    pub hint: Option<String>,
}

/// The result of a launch.
#[derive(Debug)]
pub struct Launched {
    /// The ready clones, sorted by index.
    pub clones: Vec<Entry>,
    /// The failed clones; empty without `keep_going`.
    pub failures: Vec<Failure>,
    /// Outcomes of setting the clocks of QEMU clones, in no particular order.
    pub clocks: Vec<Clock>,
    /// The clones that are children of this process, for a caller that waits for them.
    pub children: Vec<Child>,
}
