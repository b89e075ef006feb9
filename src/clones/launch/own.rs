//! What a clone has of its own, made before its command starts: addresses, ports of the host, disks.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};

use super::Target;
use crate::clones::ports;
use crate::clones::recipe::{Disk, Identity, Needs, Values};
use crate::clones::registry::Entry;
use crate::error::{Error, Result};
use crate::sys::procfs;

/// How often another free port is looked for.
const TRIES: usize = 100;

/// Ports that nobody else gets while this lives. Whoever sets `SO_REUSEADDR`, as QEMU does, may listen on them.
#[derive(Debug, Default)]
pub struct Reserved(Vec<OwnedFd>);

/// Makes what the clone's command line names, notes it in its record, and gives the values to fill in.
///
/// # Errors
/// When there is no free port, or a disk cannot be made.
pub fn make(
    target: &Target,
    disks: &[Disk],
    needs: &Needs,
    entry: &mut Entry,
    attempt: u32,
    is_over: impl Fn() -> bool,
) -> Result<(Values, Reserved)> {
    let identity = Identity::of(&entry.id, attempt);
    let uuid = match &entry.uuid {
        Some(uuid) => uuid.clone(),
        None => procfs::read_text("/proc/sys/kernel/random/uuid".as_ref())?.trim().to_owned(),
    };
    let mut values = target.values().of_clone(&entry.id, entry.index, &entry.dir);
    values = values.with("uuid", uuid.as_str()).with("cid", identity.cid().to_string());
    values = values.with("mac", identity.mac(0));
    for card in Identity::cards() {
        values = values.with(&format!("mac:{card}"), identity.mac(card));
    }
    let mut reserved = Reserved::default();
    ports::give_back(entry);
    entry.ports.clear();
    for name in &needs.ports {
        let (port, held) = free_port(|port| ports::claim(port, &entry.id, &is_over))?;
        reserved.0.push(held);
        values = values.with(&format!("port:{name}"), port.to_string());
        entry.ports.insert(name.clone(), port);
    }
    let disks = || disks.iter().filter(|disk| needs.disks.contains(&disk.name));
    entry.disks = disks().map(|disk| disk.name.clone()).collect();
    entry.uuid = Some(uuid);
    entry.save()?;
    for disk in disks() {
        let path = entry.disk_path(&disk.name);
        // An attempt before has made it.
        if attempt == 0 {
            overlay(target, disk, &path)?;
        }
        values = values.with(&format!("disk:{}", disk.name), path.display().to_string());
    }
    Ok((values, reserved))
}

/// A port that is free for TCP and for UDP at every address of the host, and that this lets us have.
fn free_port(may_have: impl Fn(u16) -> Result<bool>) -> Result<(u16, OwnedFd)> {
    let failed = |e: rustix::io::Errno| {
        Error::failed("cannot reserve a port of the host")
            .because(e.into())
            .remedy("see the limit on open files: ulimit -n, fs.file-max")
    };
    // Held until another one is found, or the kernel would offer them again.
    let mut refused = vec![];
    for _ in 0..TRIES {
        let held = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
        // Bound and not listening: nobody is given this port, and who shares the address may still listen.
        sockopt::set_socket_reuseaddr(&held, true).map_err(failed)?;
        bind(&held, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)).map_err(failed)?;
        let address = getsockname(&held).map_err(failed)?;
        let port = SocketAddrV4::try_from(address).map_err(failed)?.port();
        if UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() && may_have(port)? {
            return Ok((port, held));
        }
        refused.push(held);
    }
    Err(Error::try_again("no port of the host is free for TCP and UDP")
        .remedy("see which are in use with `ss -tul`, or widen net.ipv4.ip_local_port_range"))
}

/// An empty image over a file of the template.
fn overlay(target: &Target, disk: &Disk, path: &std::path::Path) -> Result<()> {
    let base = target.dir.join(&disk.base);
    // In a folder that others use, nobody else's file is written over, and nobody else reads a guest's disk.
    File::options().write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
        Error::io("cannot make a clone's disk", path, e).remedy("--disk-dir says where disks are made")
    })?;
    let done = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", &disk.format, "-b"])
        .arg(&base)
        .arg(path)
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            Error::io("cannot start", "qemu-img", e)
                .remedy("install it (Debian: qemu-utils) and put it into PATH")
        })?;
    match done.status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "qemu-img cannot make the clone's disk {} ({}): {}",
            disk.name,
            done.status,
            String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ")
        ))
        .at(path)
        .remedy("the words are qemu-img's; --disk-dir says where disks are made")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_reserved_port_is_given_to_nobody_but_may_be_listened_on() {
        let held: Vec<(u16, OwnedFd)> = (0..50).map(|_| free_port(|_| Ok(true)).unwrap()).collect();
        let ports: BTreeSet<u16> = held.iter().map(|(port, _)| *port).collect();
        assert_eq!(ports.len(), 50);
        for _ in 0..200 {
            let other = TcpListener::bind(("0.0.0.0", 0)).unwrap();
            assert!(!ports.contains(&other.local_addr().unwrap().port()));
        }
        // std sets SO_REUSEADDR, as QEMU does.
        let _all = TcpListener::bind(("0.0.0.0", held[0].0)).unwrap();
        let _one = TcpListener::bind(("127.0.0.1", held[1].0)).unwrap();
    }
}
