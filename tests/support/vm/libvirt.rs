//! libvirt domains, run by `virt-qemu-run`.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::daemon::passing::Running;
use crate::support::mount::{TestMount, without_others};
use crate::support::vm::guest::patiently;

/// A libvirt domain without libvirtd; ends on drop.
pub struct Domain {
    name: String,
    /// The process of `virt-qemu-run`.
    pub libvirt: Running,
    /// The PID of its QEMU.
    pub qemu: u32,
}

impl Domain {
    /// Starts a domain in a mount namespace where the user `libvirt-qemu` exists.
    #[track_caller]
    pub fn start(world: &TestMount, domain: &str) -> Domain {
        let name = domain.split("<name>").nth(1).unwrap().split("</name>").next().unwrap();
        let path = |name: &str| world.dir().join(name).display().to_string();
        // libvirt looks up a user and a group that the package of libvirtd would create.
        for (file, line) in
            [("passwd", "libvirt-qemu:x:0:0::/:/usr/sbin/nologin\n"), ("group", "libvirt-qemu:x:0:\n")]
        {
            let text = fs::read_to_string(format!("/etc/{file}")).unwrap();
            let others = text.lines().filter(|l| !l.starts_with("libvirt-qemu:")).map(|l| format!("{l}\n"));
            fs::write(path(file), others.collect::<String>() + line).unwrap();
        }
        fs::create_dir_all(path("libvirt/etc")).unwrap();
        let settings =
            "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nuser = \"+0\"\ngroup = \"+0\"\n";
        fs::write(path("libvirt/etc/qemu.conf"), settings).unwrap();
        // TCG, because not every host has KVM.
        fs::write(path("run.xml"), domain.replace("<domain type='kvm'", "<domain type='qemu'")).unwrap();
        let script = format!(
            "{} && mount --bind \"$1/passwd\" /etc/passwd && mount --bind \"$1/group\" /etc/group && \
             exec virt-qemu-run -v -r \"$1/libvirt\" \"$1/run.xml\"",
            without_others(world.dir())
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(world.dir());
        let libvirt = Running::start(&mut command, &world.dir().join("qemu.log"));
        let mut domain = Domain { name: name.to_owned(), libvirt, qemu: 0 };
        domain.qemu = patiently("QEMU started by libvirt", Duration::from_secs(120), || {
            let log = fs::read_to_string(path("qemu.log")).unwrap();
            assert!(
                domain.libvirt.0.try_wait().unwrap().is_none(),
                "virt-qemu-run exited (make setup installs it): {log}"
            );
            let said = domain.said(world);
            assert!(!said.contains("shutting down"), "{said}");
            fs::read_to_string(path(&format!("libvirt/run/qemu/{name}.pid"))).ok()?.trim().parse().ok()
        });
        domain
    }

    /// Returns QEMU's log.
    pub fn said(&self, world: &TestMount) -> String {
        let log = format!("libvirt/log/qemu/{}.log", self.name);
        fs::read_to_string(world.dir().join(log)).unwrap_or_default()
    }

    /// Returns true until the domain's QEMU exits.
    pub fn is_alive(&self) -> bool {
        Path::new(&format!("/proc/{}", self.qemu)).exists()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // On SIGTERM virt-qemu-run ends its QEMU too; SIGKILL would leave QEMU running.
        let pid = self.libvirt.0.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &pid]).status();
        let end = Instant::now() + Duration::from_secs(30);
        while matches!(self.libvirt.0.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
