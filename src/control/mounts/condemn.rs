//! Hides templates in mounts: lookups and opens of a hidden template fail while the condemnation exists.

use std::io;
use std::time::{Duration, Instant};

use super::client::{SUPERVISOR_LOST, reach};
use super::listing::lives;
use super::registry::{CONTROL_SOCKET, Mount};
use crate::control::protocol::messages::{MAX_INODES, Request, Response};
use crate::control::protocol::wire::Channel;
use crate::error::{Error, Result};
use crate::store::Digest;

/// Longest wait for a reply: a server may have to finish a backing first, and a killed server may have to exit.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the request is retried while the supervisor is replaced or the mount ends.
const RETRY_WINDOW: Duration = Duration::from_secs(10);

/// Templates that some mounts hide. The mounts show the templates again when this is dropped or its process exits.
#[derive(Debug)]
pub struct Condemnation {
    digests: Vec<Digest>,
    mounts: Vec<(Mount, Channel)>,
}

impl Condemnation {
    /// Creates a condemnation that no mount enforces yet.
    pub fn new(digests: Vec<Digest>) -> Condemnation {
        Condemnation { digests, mounts: Vec::new() }
    }

    /// Returns the condemned templates.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// Returns the mounts that hide the templates.
    pub fn mounts(&self) -> Vec<Mount> {
        self.mounts.iter().map(|(mount, _)| mount.clone()).collect()
    }

    /// Returns true if `mount` hides the templates.
    pub fn contains(&self, mount: &Mount) -> bool {
        self.mounts.iter().any(|(ours, _)| ours.device == mount.device)
    }

    /// Makes `mounts` hide the templates too. Returns when the templates can no longer be looked up or opened there.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) with the name of a mount that cannot be reached.
    pub fn extend(&mut self, mounts: Vec<Mount>) -> Result<()> {
        let mut grace = Duration::ZERO;
        for mount in mounts {
            if mount.foreign {
                return Err(Error::try_again(format!(
                    "the mount's supervisor (PID {} in its own PID namespace) is in another PID namespace; clones of {} \
                     may be invisible here",
                    mount.supervisor_pid,
                    Digest::describe_all(&self.digests)
                ))
                .at(&mount.mountpoint)
                .hint(format!(
                    "run the command in the PID namespace of that mount; if that namespace no longer exists, remove the \
                     mount's record, {}",
                    mount.dir.display()
                )));
            }
            if mount.orphaned {
                return Err(Error::try_again(format!(
                    "the mount's supervisor (process {}) is dead and cannot release {}",
                    mount.supervisor_pid,
                    Digest::describe_all(&self.digests)
                ))
                .at(&mount.mountpoint)
                .hint(format!(
                    "run 'stencil mount {0}' to start another supervisor, or 'stencil umount {0}' to unmount",
                    mount.mountpoint.display()
                )));
            }
            if let Some((channel, settle)) = condemned_by(&mount, &self.digests)? {
                self.mounts.push((mount, channel));
                grace = grace.max(settle);
            }
        }
        // After this time an open that was answered before the condemnation is visible in its process.
        std::thread::sleep(grace);
        Ok(())
    }

    /// Invalidates the kernel's directory entries of these templates again.
    ///
    /// # Errors
    /// Returns an error if a mount does not reply.
    pub fn repeat(&self, digests: &[Digest]) -> Result<()> {
        self.ask_all(&Request::Condemn { digests: digests.to_vec() })
    }

    /// Returns those of `inodes` that the kernel holds, each with its mount. An inode of a hidden template that the
    /// kernel holds is in use, even if no process shows the use.
    ///
    /// # Errors
    /// Returns an error if a mount does not reply.
    pub fn cached_inodes(&self, inodes: &[u64]) -> Result<Vec<(&Mount, u64)>> {
        let mut held = Vec::new();
        for (mount, channel) in &self.mounts {
            for numbers in inodes.chunks(MAX_INODES) {
                let of_mount = held_inodes(channel, numbers).map_err(|e| lost(mount, e))?;
                held.extend(of_mount.into_iter().map(|number| (mount, number)));
            }
        }
        Ok(held)
    }

    /// Returns true if every mount has hidden the templates without a break since [`extend`](Self::extend). A mount
    /// cannot confirm that after a replacement of its supervisor, or after its end.
    pub fn still_holds(&self) -> bool {
        self.ask_all(&Request::Confirm { digests: self.digests.clone() }).is_ok()
    }

    /// Makes the mounts show these templates again or, with `removed`, close the backings of the removed templates. The
    /// mounts do the same when the connection closes; after a takeover, 15 s later.
    ///
    /// # Errors
    /// Returns an error if a mount does not reply.
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

/// Makes one mount hide templates. Returns the connection, which keeps the templates hidden, and the settle time;
/// `None` if the mount ends instead.
fn condemned_by(mount: &Mount, digests: &[Digest]) -> Result<Option<(Channel, Duration)>> {
    let until = Instant::now() + RETRY_WINDOW;
    loop {
        let attempt = || -> io::Result<(Channel, Duration)> {
            let channel = reach(&mount.dir)?;
            channel.set_timeout(REPLY_TIMEOUT)?;
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
        if Instant::now() > until || is_timeout(&error) {
            return Err(lost(mount, error));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn unexpected(reply: &Response) -> io::Error {
    log::debug!("unexpected reply of the supervisor: {reply:?}");
    io::Error::other("the supervisor sent an unexpected reply")
}

fn ask(channel: &Channel, request: &Request) -> io::Result<Duration> {
    channel.send(request, None)?;
    match channel.receive::<Response>()? {
        Some((Response::Done, _)) => Ok(Duration::ZERO),
        Some((Response::Settled { milliseconds }, _)) => Ok(Duration::from_millis(milliseconds.min(1000))),
        Some((other, _)) => Err(unexpected(&other)),
        None => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
    }
}

fn held_inodes(channel: &Channel, numbers: &[u64]) -> io::Result<Vec<u64>> {
    channel.send(&Request::Inodes { numbers: numbers.to_vec() }, None)?;
    match channel.receive::<Response>()? {
        Some((Response::Inodes { known }, _)) => Ok(known),
        Some((other, _)) => Err(unexpected(&other)),
        None => Err(io::Error::from_raw_os_error(libc::ECONNRESET)),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn lost(mount: &Mount, error: io::Error) -> Error {
    let restart = format!("stencil restart {}", mount.mountpoint.display());
    let (what, remedy) = match is_timeout(&error) {
        true => (
            "timed out after 30 s waiting for the mount to hide the templates",
            format!("retry; if the server is stuck or of an older build, run '{restart}'"),
        ),
        // Every build supports the snapshot request.
        false if mount.snapshot().is_ok() => (
            "the mount's supervisor does not support this request",
            format!("the supervisor is of another build: run '{restart}'"),
        ),
        false => ("cannot reach the mount's supervisor", SUPERVISOR_LOST.to_owned()),
    };
    Error::try_again(what).at(mount.dir.join(CONTROL_SOCKET)).because(error).hint(remedy)
}
