//! Resources of one clone, allocated before its command starts: addresses, host ports, disks.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};

use super::target::Target;
use crate::clones::recipe::{Disk, Identity, Needs, Values};
use crate::clones::registry::{Entry, ports};
use crate::error::{Error, Result};
use crate::sys::process::procfs;

/// Maximum number of candidates for a free port.
const MAX_PORT_ATTEMPTS: usize = 100;

/// Bound sockets that keep the kernel from assigning their ports to others. A process that sets `SO_REUSEADDR`, as QEMU
/// does, can listen on these ports.
#[derive(Debug, Default)]
pub struct Reserved(Vec<OwnedFd>);

/// Allocates the resources that the clone's command line needs, stores them in the clone's record, and returns the
/// placeholder values.
///
/// # Errors
/// Returns an error if a disk cannot be created or the record cannot be written, and
/// [`Code::TryAgain`](crate::error::Code::TryAgain) if no port is free.
pub fn allocate(
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
    ports::release(&entry.id, &entry.ports);
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
        // Later attempts use the overlay that the first attempt has created.
        if attempt == 0 {
            overlay(target, disk, &path)?;
        }
        values = values.with(&format!("disk:{}", disk.name), path.display().to_string());
    }
    Ok((values, reserved))
}

/// Reserves a port that is free for TCP and UDP on all addresses of the host and that `claim` accepts.
fn free_port(claim: impl Fn(u16) -> Result<bool>) -> Result<(u16, OwnedFd)> {
    let failed = |e: rustix::io::Errno| {
        Error::failed("cannot reserve a host port")
            .because(e.into())
            .hint("check the limits on open files: ulimit -n, fs.file-max")
    };
    // Rejected sockets stay bound during the search, so that the kernel does not offer their ports again.
    let mut rejected = vec![];
    for _ in 0..MAX_PORT_ATTEMPTS {
        let held = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(failed)?;
        // The socket is bound and does not listen: the kernel assigns its port to no other socket, but a socket with
        // SO_REUSEADDR can listen on the port.
        sockopt::set_socket_reuseaddr(&held, true).map_err(failed)?;
        bind(&held, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)).map_err(failed)?;
        let address = getsockname(&held).map_err(failed)?;
        let port = SocketAddrV4::try_from(address).map_err(failed)?.port();
        if UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() && claim(port)? {
            return Ok((port, held));
        }
        rejected.push(held);
    }
    Err(Error::try_again("no host port is free for TCP and UDP")
        .hint("list the ports in use with `ss -tul`, or widen net.ipv4.ip_local_port_range"))
}

/// Creates an empty overlay with a template file as backing file.
fn overlay(target: &Target, disk: &Disk, path: &std::path::Path) -> Result<()> {
    let base = target.dir.join(&disk.base);
    // The directory may be shared with other users: O_EXCL overwrites no existing file, mode 0600 hides the guest's
    // disk.
    File::options().write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
        Error::io("cannot create the disk of a clone", path, e)
            .hint("choose another directory for disks with --disk-dir")
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
                .hint("install qemu-img (Debian: qemu-utils) in a directory of PATH")
        })?;
    match done.status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "qemu-img cannot create disk {} of the clone ({}): {}",
            disk.name,
            done.status,
            String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ")
        ))
        .at(path)
        .hint("check the reason that qemu-img reports; --disk-dir sets the directory for disks")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::TcpListener;

    use crate::clones::launch::clone_resources::*;

    #[test]
    fn reserved_port_is_assigned_to_no_other_socket_but_can_be_listened_on() {
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
