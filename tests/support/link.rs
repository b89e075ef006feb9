//! The way from a server to its supervisor, used by somebody else: as a server that was taken over would.

use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};
use stencilfs::control::Channel;

/// The server's end of its link to the supervisor, taken from it.
pub fn link_of(server: u32) -> Channel {
    Channel::new(descriptor_of(server, "link"))
}

/// A descriptor that its arguments name.
pub fn descriptor_of(server: u32, name: &str) -> OwnedFd {
    let line = std::fs::read(format!("/proc/{server}/cmdline")).unwrap();
    let line = String::from_utf8_lossy(&line).into_owned();
    let item = line.split(['\0', '=', ',']).find_map(|item| item.strip_prefix(&format!("{name}:")));
    let number = item.unwrap_or_else(|| panic!("no {name} by number in {line:?}")).parse().unwrap();
    let process = pidfd_open(Pid::from_raw(server as i32).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap()
}

/// A numbered request.
pub fn request(number: u64, body: &Value) -> Value {
    json!({ "number": number, "body": body })
}

/// The file `memory` of a template that nobody has.
pub fn nobodys(n: u32) -> Value {
    json!({ "digest": format!("{n:064x}"), "file": "memory" })
}
