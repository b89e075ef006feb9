//! Who uses a mount, in the words of the command line.

use serde::Serialize;

use crate::error::Result;
use crate::sys::users::{self, PATIENCE};

/// A process that maps files of the mount, or has some open.
#[derive(Debug, Serialize)]
pub struct User {
    pid: u32,
    name: String,
    /// False where it has files open only.
    pub maps: bool,
}

/// Who uses the mount, as far as could be seen.
#[derive(Debug, Default)]
pub struct Users {
    /// Those that were seen to.
    pub found: Vec<User>,
    /// Processes that could not be looked into: each may be one more.
    pub unseen: Vec<u32>,
}

impl Users {
    /// The users of the file system with this device number, without its own processes. The mount itself is not
    /// asked: it may be dead.
    ///
    /// # Errors
    /// When `/proc` cannot be listed.
    pub fn of(device: u64, own: &[Option<u32>]) -> Result<Users> {
        let users = users::users_of(device, PATIENCE)?;
        let stranger = |pid: u32| !own.contains(&Some(pid));
        let user = |u: users::User| User { pid: u.pid, name: u.name, maps: !u.mapped.is_empty() };
        Ok(Users {
            found: users.found.into_iter().filter(|u| stranger(u.pid)).map(user).collect(),
            unseen: users.unseen.pids().into_iter().filter(|&pid| stranger(pid)).collect(),
        })
    }

    /// True where nobody can be a user.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty() && self.unseen.is_empty()
    }

    /// Says on standard error who will die when the mount's connection is aborted.
    pub fn announce(&self) {
        if !self.found.is_empty() {
            crate::say!(
                "stencil: {} users will die at the next page that they do not have: {}",
                self.found.len(),
                list(&self.found)
            );
        }
        if !self.unseen.is_empty() {
            crate::say!("stencil: {}", unseen(&self.unseen));
        }
    }
}

/// The users in one line.
pub fn list(found: &[User]) -> String {
    users::list(found.iter().map(|u| (u.pid, u.name.as_str())))
}

/// What is to be said of processes that nobody could look into.
pub fn unseen(pids: &[u32]) -> String {
    format!("processes that let nobody look may use it too: {}", users::list_pids(pids))
}
