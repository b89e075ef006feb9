//! Hides templates in mounts: nobody finds or opens them, as long as this process lives and wants it.

use std::io;
use std::time::{Duration, Instant};

use super::client::{SUPERVISOR_LOST, reach};
use super::listing::lives;
use super::protocol::{MAX_INODES, Request, Response};
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
        // An open that was answered just before is visible in its process after this time.
        std::thread::sleep(grace);
        Ok(())
    }

    /// Takes the names of these templates from the kernel once more.
    ///
    /// # Errors
    /// When a mount does not answer.
    pub fn repeat(&self, digests: &[Digest]) -> Result<()> {
        self.ask_all(&Request::Condemn { digests: digests.to_vec() })
    }

    /// Those of these inodes that the kernel has, each with its mount. While a template is hidden, an inode of its files
    /// that the kernel has is in use, whether or not a process shows that.
    ///
    /// # Errors
    /// When a mount does not answer.
    pub fn known_inodes(&self, inodes: &[u64]) -> Result<Vec<(&Mount, u64)>> {
        let mut known = Vec::new();
        for (mount, channel) in &self.mounts {
            for numbers in inodes.chunks(MAX_INODES) {
                let of_these = known_of(channel, numbers).map_err(|e| lost(mount, e))?;
                known.extend(of_these.into_iter().map(|number| (mount, number)));
            }
        }
        Ok(known)
    }

    /// True if all these mounts have hidden the templates since [`extend`](Self::extend). False if a supervisor was
    /// replaced meanwhile, or a mount has ended: they cannot tell.
    pub fn still_holds(&self) -> bool {
        self.ask_all(&Request::Confirm { digests: self.digests.clone() }).is_ok()
    }

    /// The mounts show these templates again; or, if the templates are removed, they close what they have of them.
    /// Without this they do so some seconds later.
    ///
    /// # Errors
    /// When a mount does not answer.
    pub fn release(&mut self, digests: &[Digest], removed: bool) -> Result<()> {
        if digests.is_empty() {
            return Ok(());
        }
        self.digests.retain(|ours| !digests.contains(ours));
        self.ask_all(&Request::Release { digests: digests.to_vec(), removed })
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
            let grace = ask(&channel, &Request::Condemn { digests: digests.to_vec() })?;
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

fn known_of(channel: &Channel, numbers: &[u64]) -> io::Result<Vec<u64>> {
    channel.send(&Request::Inodes { numbers: numbers.to_vec() }, None)?;
    match channel.receive::<Response>()? {
        Some((Response::Inodes { known }, _)) => Ok(known),
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
            "the mount does not say within 30 s that nobody can open the templates",
            format!("run it again; if its server is stuck, or of an older build, replace it: {restart}"),
        ),
        // It answers what every build knows.
        false if mount.snapshot().is_ok() => (
            "the mount's supervisor does not answer this question",
            format!("it is of another build: {restart}"),
        ),
        false => ("the mount's supervisor cannot be asked", SUPERVISOR_LOST.to_owned()),
    };
    Error::try_again(what).at(mount.dir.join(CONTROL_SOCKET)).because(error).remedy(remedy)
}
