//! Character devices of a captured VM: a socket becomes a socket in the clone's directory, an output becomes a file
//! there.

use super::props::{Props, is_on};

/// The backend of a clone's character device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A listening Unix socket.
    Socket,
    /// A log file.
    File,
    /// No backend: output is discarded.
    Null,
    /// A ring buffer in QEMU's memory.
    Ring,
}

/// Returns the kind for a backend of `-chardev`; `None` for a backend that is a host resource.
pub fn kind(backend: &str) -> Option<Kind> {
    match backend {
        "socket" | "pty" | "udp" => Some(Kind::Socket),
        "file" | "stdio" | "pipe" => Some(Kind::File),
        "null" | "vc" | "mouse" => Some(Kind::Null),
        "ringbuf" | "memory" => Some(Kind::Ring),
        _ => None,
    }
}

/// Returns the `-chardev` of clones. Keeps `mux=`, drops `logfile=`.
pub fn option(id: &str, kind: Kind, props: &Props) -> String {
    let mux = if is_on(props.get("mux")) { ",mux=on" } else { "" };
    match kind {
        Kind::Socket => format!("socket,id={id},path={{dir}}/{},server=on,wait=off{mux}", socket_name(id)),
        Kind::File => format!("file,id={id},path={{dir}}/chardev-{id}.log{mux}"),
        Kind::Null => format!("null,id={id}{mux}"),
        Kind::Ring => {
            let size = props.get("size").unwrap_or("64K");
            format!("ringbuf,id={id},size={size}{mux}")
        }
    }
}

/// Returns the name of a socket in the clone's directory, distinct from those of the monitor and of `-serial`.
fn socket_name(id: &str) -> String {
    let is_taken = id == "qmp" || ["serial", "chardev-"].iter().any(|stem| id.starts_with(stem));
    if is_taken { format!("chardev-{id}.sock") } else { format!("{id}.sock") }
}

/// Returns the `-serial` of clones for that of the VM; `number` counts the serial lines before this one.
pub fn serial(value: &str, number: usize) -> Option<String> {
    let stem = if number == 0 { "serial".to_owned() } else { format!("serial-{number}") };
    let backend = value.split([':', ',']).next().unwrap_or_default();
    match backend {
        "unix" | "tcp" | "telnet" | "websocket" | "udp" | "pty" => {
            Some(format!("unix:{{dir}}/{stem}.sock,server=on,wait=off"))
        }
        "null" => Some("null".into()),
        "file" | "stdio" | "mon" | "vc" | "pipe" | "con" => Some(format!("file:{{dir}}/{stem}.log")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::clones::recipe::chardevs::*;

    #[test]
    fn keeps_sockets_and_refuses_host_serial_lines() {
        assert_eq!(
            serial("unix:/tmp/s,server=on,wait=off", 1).unwrap(),
            "unix:{dir}/serial-1.sock,server=on,wait=off"
        );
        assert_eq!(serial("file:/tmp/x", 0).unwrap(), "file:{dir}/serial.log");
        assert_eq!(serial("mon:stdio", 2).unwrap(), "file:{dir}/serial-2.log");
        assert_eq!(serial("/dev/ttyS0", 0), None);
        let props = Props::parse("socket,id=agent,path=/x,server=on,mux=on", "backend").unwrap();
        assert_eq!(
            option("agent", Kind::Socket, &props),
            "socket,id=agent,path={dir}/agent.sock,server=on,wait=off,mux=on"
        );
        for id in ["qmp", "serial", "serial-1", "chardev-qmp"] {
            assert!(option(id, Kind::Socket, &props).contains(&format!("/chardev-{id}.sock")));
        }
        assert_eq!(kind("serial"), None);
        assert_eq!(kind("spicevmc"), None);
    }
}
