//! Has mounts find and open a template no more, for as long as this process wants it.

use std::io;
use std::time::{Duration, Instant};

use super::client::{SUPERVISOR_LOST, reach};
use super::listing::lives;
use super::protocol::{Request, Response};
use super::registry::{CONTROL_SOCKET, Mount};
use super::wire::Channel;
use crate::error::{Error, Result};
use crate::store::Digest;

/// A server that makes backings may have to end that first, and one that was killed may have to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// A supervisor that is replaced, or whose mount ends, is asked again for so long.
const AGAIN: Duration = Duration::from_secs(10);

/// Templates that some mounts have condemned. When this is dropped, or its process ends, they find them again.
#[derive(Debug)]
pub struct Condemnation {
    digests: Vec<Digest>,
    mounts: Vec<(Mount, Channel)>,
}

impl Condemnation {
    /// By no mount yet.
    pub fn new(digests: Vec<Digest>) -> Condemnation {
        Condemnation { digests, mounts: Vec::new() }
    }

    /// The templates.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// The mounts that have condemned them.
    pub fn mounts(&self) -> Vec<Mount> {
        self.mounts.iter().map(|(mount, _)| mount.clone()).collect()
    }

    /// True when that mount has condemned them.
    pub fn has(&self, mount: &Mount) -> bool {
        self.mounts.iter().any(|(ours, _)| ours.device == mount.device)
    }

    /// Has these mounts condemn them too; comes back when nobody can find or open them in any of these mounts.
    ///
    /// # Errors
    /// [`Code::TryAgain`](crate::error::Code::TryAgain) that names the mount which cannot be asked.
    pub fn extend(&mut self, mounts: Vec<Mount>) -> Result<()> {
        let mut grace = Duration::ZERO;
        for mount in mounts {
            if mount.foreign {
                return Err(Error::try_again(format!(
                    "the mount's supervisor (there process {}) is in another PID namespace, so clones of {} \
                     may be out of sight",
                    mount.supervisor_pid,
                    Digest::describe_all(&self.digests)
                ))
                .at(&mount.mountpoint)
                .remedy(format!(
                    "run it where that mount was made; if nobody lives there any more, remove {}",
                    mount.dir.display()
                )));
            }
            if mount.orphaned {
                return Err(Error::try_again(format!(
                    "the mount's supervisor (process {}) is dead, so it cannot be asked to let go of {}",
                    mount.supervisor_pid,
                    Digest::describe_all(&self.digests)
                ))
                .at(&mount.mountpoint)
                .remedy(format!(
                    "give it another one: stencil mount {0}; or end it: stencil umount {0}",
                    mount.mountpoint.display()
                )));
            }
            if let Some((channel, moment)) = condemned_by(&mount, &self.digests)? {
                self.mounts.push((mount, channel));
                grace = grace.max(moment);
            }
        }
        // Who was answered just before can be seen then.
        std::thread::sleep(grace);
        Ok(())
    }

    /// Has the mounts' servers make the kernel forget once more what nobody uses of a template.
    ///
    /// # Errors
    /// When one of them does not answer.
    pub fn repeat(&self, digest: &Digest) -> Result<()> {
        self.ask_all(&Request::Condemn { digest: *digest })
    }

    /// The mount whose kernel connection has an inode with one of these numbers, and the number: while the template is
    /// condemned somebody uses it, whether or not a process shows that.
    ///
    /// # Errors
    /// When a mount does not answer.
    pub fn used(&self, inodes: &[u64]) -> Result<Option<(&Mount, u64)>> {
        for (mount, channel) in &self.mounts {
            for &number in inodes {
                if has_inode(channel, number).map_err(|e| lost(mount, e))? {
                    return Ok(Some((mount, number)));
                }
            }
        }
        Ok(None)
    }

    /// True when a template has been condemned in all of these mounts ever since. A supervisor that was replaced
    /// meanwhile does not know, and a mount that has ended cannot say so.
    pub fn still_holds(&self, digest: &Digest) -> bool {
        self.ask_all(&Request::Confirm { digest: *digest }).is_ok()
    }

    /// The mounts find a template again; or, where it is removed, they give back what they have of it. Without this they
    /// would do so a moment later.
    ///
    /// # Errors
    /// When one of them does not answer.
    pub fn release(&mut self, digest: &Digest, removed: bool) -> Result<()> {
        self.digests.retain(|ours| ours != digest);
        self.ask_all(&Request::Release { digest: *digest, removed })
    }

    fn ask_all(&self, request: &Request) -> Result<()> {
        let ask = |(mount, channel): &(Mount, Channel)| ask(channel, request).map_err(|e| lost(mount, e));
        self.mounts.iter().try_for_each(|mount| ask(mount).map(drop))
    }
}

/// Has one mount condemn templates, and gives the connection for as long as which it does; nothing when the mount ends
/// instead.
fn condemned_by(mount: &Mount, digests: &[Digest]) -> Result<Option<(Channel, Duration)>> {
    let until = Instant::now() + AGAIN;
    loop {
        let attempt = || -> io::Result<(Channel, Duration)> {
            let channel = reach(&mount.dir)?;
            channel.set_patience(PATIENCE)?;
            let mut grace = Duration::ZERO;
            for &digest in digests {
                grace = grace.max(ask(&channel, &Request::Condemn { digest })?);
            }
            Ok((channel, grace))
        };
        let error = match attempt() {
            Ok(condemned) => return Ok(Some(condemned)),
            Err(error) => error,
        };
        if !lives(mount)? {
            return Ok(None);
        }
        if Instant::now() > until || is_late(&error) {
            return Err(lost(mount, error));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ask(channel: &Channel, request: &Request) -> io::Result<Duration> {
    channel.send(request, None)?;
    match channel.receive::<Response>()? {
        Some((Response::Done, _)) => Ok(Duration::ZERO),
        Some((Response::Settled { milliseconds }, _)) => Ok(Duration::from_millis(milliseconds.min(1000))),
        Some((other, _)) => Err(io::Error::other(format!("it answers {other:?}"))),
        None => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
    }
}

fn has_inode(channel: &Channel, number: u64) -> io::Result<bool> {
    channel.send(&Request::Inode { number }, None)?;
    match channel.receive::<Response>()? {
        Some((Response::Inode { known }, _)) => Ok(known),
        Some((other, _)) => Err(io::Error::other(format!("it answers {other:?}"))),
        None => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
    }
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn lost(mount: &Mount, error: io::Error) -> Error {
    let restart = format!("stencil restart {}", mount.mountpoint.display());
    let (what, remedy) = match is_late(&error) {
        true => (
            "the mount does not say within 30 s that nobody can open the template",
            format!("run it again; if its server is stuck, or of an older build, replace it: {restart}"),
        ),
        // It answers what every build knows.
        false if mount.snapshot().is_ok() => (
            "the mount's supervisor does not answer this question",
            format!("it is of an older build: {restart}"),
        ),
        false => ("the mount's supervisor cannot be asked", SUPERVISOR_LOST.to_owned()),
    };
    Error::try_again(what).at(mount.dir.join(CONTROL_SOCKET)).because(error).remedy(remedy)
}
