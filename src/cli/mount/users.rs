//! The processes that use a mount, as the command line lists them.

use serde::Serialize;

use crate::clones::counted;
use crate::clones::find::handlers::{self, ServedProcess};
use crate::error::Result;
use crate::sys::process::holders::{self, SCAN_TIMEOUT};

/// A process that maps or has open files of the mount.
#[derive(Debug, Serialize)]
pub struct User {
    pid: u32,
    name: String,
    /// True if the process maps a file; false if the process only has files open.
    pub maps: bool,
    /// The processes whose page faults this process handles.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    serves: Vec<ServedProcess>,
}

/// The processes that use a mount.
#[derive(Debug, Default)]
pub struct Users {
    /// Processes that were found to use the mount.
    pub found: Vec<User>,
    /// Processes that could not be inspected; each may also use the mount.
    pub unseen: Vec<u32>,
}

impl Users {
    /// Finds the users of the file system with this device number, except the processes in `own`, which serve the
    /// mount. Sends no request to the mount, because the mount may be dead.
    ///
    /// # Errors
    /// Returns an error if `/proc` cannot be listed.
    pub fn of(device: u64, own: &[Option<u32>]) -> Result<Users> {
        let users = holders::users_of(device, SCAN_TIMEOUT)?;
        let is_foreign = |pid: u32| !own.contains(&Some(pid));
        let user = |u: holders::User| -> Result<User> {
            let maps = !u.mapped.is_empty();
            let serves = if maps {
                handlers::served_by(u.pid, |dev, _| dev == device)?.unwrap_or_default()
            } else {
                vec![]
            };
            Ok(User { pid: u.pid, name: u.name, maps, serves })
        };
        let found = users.found.into_iter().filter(|u| is_foreign(u.pid));
        Ok(Users {
            found: found.map(user).collect::<Result<_>>()?,
            unseen: users.unseen.pids().into_iter().filter(|&pid| is_foreign(pid)).collect(),
        })
    }

    /// Returns true if no process uses the mount and every process could be inspected.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty() && self.unseen.is_empty()
    }

    /// Warns on standard error which processes are affected when the mount's connection is aborted.
    pub fn announce(&self) {
        if !self.found.is_empty() {
            let processes = counted(self.found.len() as u64, "process uses", "processes use");
            crate::print_line!(
                "warning: {processes} the mount; those that map files served by decode are killed at the \
                 next access to a page that is not in RAM: {}",
                list(&self.found)
            );
        }
        if !self.unseen.is_empty() {
            crate::print_line!("warning: {}", unseen(&self.unseen));
        }
    }
}

/// Formats the users as one line.
pub fn list(found: &[User]) -> String {
    let name = |user: &User| match handlers::served_list(&user.serves) {
        None => user.name.clone(),
        Some(served) => format!("{}, handles page faults of {served}", user.name),
    };
    let named: Vec<(u32, String)> = found.iter().map(|user| (user.pid, name(user))).collect();
    holders::list(named.iter().map(|(pid, name)| (*pid, name.as_str())))
}

/// Describes processes that could not be inspected.
pub fn unseen(pids: &[u32]) -> String {
    format!("processes that could not be inspected may also use the mount: {}", holders::list_pids(pids))
}
