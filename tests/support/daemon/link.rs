//! Uses the link from a server to its supervisor from outside, as a compromised server would.

use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};
use stencilfs::control::Channel;

/// Takes the server's end of its link to the supervisor.
pub fn link_of(server: u32) -> Channel {
    Channel::new(descriptor_of(server, "link"))
}

/// Takes a descriptor that the server's arguments name.
pub fn descriptor_of(server: u32, name: &str) -> OwnedFd {
    let line = std::fs::read(format!("/proc/{server}/cmdline")).unwrap();
    let line = String::from_utf8_lossy(&line).into_owned();
    let item = line.split(['\0', '=', ',']).find_map(|item| item.strip_prefix(&format!("{name}:")));
    let number = item.unwrap_or_else(|| panic!("no descriptor '{name}' in {line:?}")).parse().unwrap();
    let process = pidfd_open(Pid::from_raw(server as i32).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap()
}

/// Returns a numbered request.
pub fn request(number: u64, body: &Value) -> Value {
    json!({ "number": number, "body": body })
}

/// The key of the file `memory` of a template that does not exist.
pub fn absent_key(n: u32) -> Value {
    json!({ "digest": format!("{n:064x}"), "file": "memory" })
}
