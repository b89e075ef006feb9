//! Starts programs in new sessions, without a copy of this process's page tables.
//!
//! A [`Command`](std::process::Command) that runs a function before the exec forks. A fork copies the page tables, and
//! each later write of this process to its memory is a page fault. posix_spawn(3) of glibc starts the child in
//! the memory of this process (`CLONE_VM | CLONE_VFORK`), whose calling thread waits until the exec.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A program that is to run in a new session, so that neither a hangup nor keys of a terminal affect it, with default
/// signal dispositions and only the standard streams open: a daemon must not keep the pipes of its caller open.
#[derive(Debug)]
pub struct Session {
    program: OsString,
    arguments: Vec<OsString>,
    environment: BTreeMap<OsString, OsString>,
    directory: Option<PathBuf>,
    inherited: Vec<OwnedFd>,
}

impl Session {
    /// Creates a description of the program: a path, or a name in `PATH`.
    pub fn new(program: impl AsRef<OsStr>) -> Session {
        Session {
            program: program.as_ref().to_owned(),
            arguments: vec![],
            environment: std::env::vars_os().collect(),
            directory: None,
            inherited: vec![],
        }
    }

    /// Returns the program.
    pub fn program(&self) -> &OsStr {
        &self.program
    }

    /// Adds an argument.
    pub fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub fn env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.environment.insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }

    /// Sets environment variables.
    pub fn envs(
        &mut self,
        variables: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
    ) -> &mut Self {
        for (name, value) in variables {
            self.env(name, value);
        }
        self
    }

    /// Removes all environment variables.
    pub fn clear_env(&mut self) -> &mut Self {
        self.environment.clear();
        self
    }

    /// Sets the working directory.
    pub fn current_dir(&mut self, directory: impl AsRef<Path>) -> &mut Self {
        self.directory = Some(directory.as_ref().to_owned());
        self
    }

    /// Passes a descriptor to the program under its number.
    pub fn inherit(&mut self, fd: OwnedFd) -> &mut Self {
        self.inherited.push(fd);
        self
    }

    /// Starts the program with these standard streams.
    ///
    /// # Errors
    /// Returns an error if the program cannot be executed, or the directory does not exist.
    pub fn spawn(&self, streams: [BorrowedFd<'_>; 3]) -> io::Result<Child> {
        let text = |text: &OsStr| CString::new(text.as_bytes()).map_err(io::Error::from);
        let program = text(&self.program)?;
        let words = std::iter::once(&self.program).chain(&self.arguments);
        let words = words.map(|word| text(word)).collect::<io::Result<Vec<_>>>()?;
        let variables = self.environment.iter().map(|(name, value)| {
            let mut line = name.clone();
            line.push("=");
            line.push(value);
            text(&line)
        });
        let variables = variables.collect::<io::Result<Vec<_>>>()?;
        let directory = self.directory.as_ref().map(|path| text(path.as_os_str())).transpose()?;
        let pointers = |texts: &[CString]| -> Vec<*mut libc::c_char> {
            let each = texts.iter().map(|text| text.as_ptr().cast_mut());
            each.chain([std::ptr::null_mut()]).collect()
        };
        let (words, variables) = (pointers(&words), pointers(&variables));
        let mut parts = Parts::new()?;
        if let Some(directory) = &directory {
            parts.enter(directory)?;
        }
        for (number, stream) in (0..).zip(streams) {
            parts.duplicate(stream.as_raw_fd(), number)?;
        }
        for fd in &self.inherited {
            // Duplicating a descriptor to its own number only makes the descriptor inheritable.
            parts.duplicate(fd.as_raw_fd(), fd.as_raw_fd())?;
        }
        close_others_on_exec()?;
        let mut pid = 0;
        // SAFETY: the program, and each array and its elements, are terminated by zero, and live until the call
        // returns, which is after the exec; the other arguments are initialised.
        let result = unsafe {
            libc::posix_spawnp(
                &raw mut pid,
                program.as_ptr(),
                &raw const parts.actions,
                &raw const parts.attributes,
                words.as_ptr(),
                variables.as_ptr(),
            )
        };
        match (result, Pid::from_raw(pid)) {
            (0, Some(pid)) => Ok(Child { pid, status: None }),
            (error, _) => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Marks all descriptors of this process but the standard streams close-on-exec: the caller of this program may have
/// passed some.
fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: the call closes no descriptor and accesses no memory.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The attributes and file actions of posix_spawn(3).
struct Parts {
    attributes: libc::posix_spawnattr_t,
    actions: libc::posix_spawn_file_actions_t,
}

impl Parts {
    fn new() -> io::Result<Parts> {
        // SAFETY: all-zero bytes are valid for both C structures, which the first two calls initialise before any other
        // use. The sets are initialised before they are read.
        unsafe {
            let mut parts: Parts = std::mem::zeroed();
            done(libc::posix_spawnattr_init(&raw mut parts.attributes))?;
            done(libc::posix_spawn_file_actions_init(&raw mut parts.actions))?;
            let (mut all, mut none): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::sigemptyset(&raw mut none);
            done(libc::posix_spawnattr_setsigdefault(&raw mut parts.attributes, &raw const all))?;
            done(libc::posix_spawnattr_setsigmask(&raw mut parts.attributes, &raw const none))?;
            let flags = i32::from(libc::POSIX_SPAWN_SETSID)
                | libc::POSIX_SPAWN_SETSIGDEF
                | libc::POSIX_SPAWN_SETSIGMASK;
            let flags = libc::c_short::try_from(flags).unwrap_or_default();
            done(libc::posix_spawnattr_setflags(&raw mut parts.attributes, flags))?;
            Ok(parts)
        }
    }

    fn enter(&mut self, directory: &CString) -> io::Result<()> {
        // SAFETY: the actions are initialised, and the call copies the path.
        done(unsafe { libc::posix_spawn_file_actions_addchdir_np(&raw mut self.actions, directory.as_ptr()) })
    }

    fn duplicate(&mut self, from: i32, to: i32) -> io::Result<()> {
        // SAFETY: the actions are initialised.
        done(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.actions, from, to) })
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // SAFETY: both structures are initialised, or all zero, which glibc accepts.
        unsafe {
            libc::posix_spawn_file_actions_destroy(&raw mut self.actions);
            libc::posix_spawnattr_destroy(&raw mut self.attributes);
        }
    }
}

fn done(error: i32) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// A child process of [`Session::spawn`]. Dropping it neither ends nor reaps the process.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// Set when the process has been reaped.
    status: Option<ExitStatus>,
}

impl Child {
    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().cast_unsigned()
    }

    /// Returns the exit status, `None` while the process lives.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.reap(WaitOptions::NOHANG)
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// Returns an error if the system call fails.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.reap(WaitOptions::empty())?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Kills the process (SIGKILL), unless it has been reaped.
    ///
    /// # Errors
    /// Returns an error without permission to signal the process.
    pub fn kill(&mut self) -> io::Result<()> {
        if self.status.is_none() { Ok(kill_process(self.pid, Signal::KILL)?) } else { Ok(()) }
    }

    fn reap(&mut self, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
        while self.status.is_none() {
            match waitpid(Some(self.pid), options) {
                Ok(None) => break,
                Ok(Some((_, status))) => self.status = Some(ExitStatus::from_raw(status.as_raw())),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(self.status)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::process::ProcessId;

    fn run(session: &Session) -> (String, Child) {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (mut output, input) = io::pipe().unwrap();
        let child = session.spawn([null.as_fd(), input.as_fd(), null.as_fd()]).unwrap();
        drop(input);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        (text, child)
    }

    #[test]
    fn a_program_gets_its_session_directory_environment_and_descriptors_alone() {
        let (_kept, passed) = io::pipe().unwrap();
        let number = passed.as_raw_fd();
        // A descriptor of the caller that is inheritable.
        let other = rustix::io::fcntl_dupfd_cloexec(&passed, 50).unwrap();
        rustix::io::fcntl_setfd(&other, rustix::io::FdFlags::empty()).unwrap();
        let mut session = Session::new("sh");
        let script = "set -- $(cat /proc/self/stat); echo $6 $$; pwd; echo $A; ls /proc/$$/fd | tr '\\n' ' '";
        session.args(["-c", script]).env("A", "b c").current_dir("/proc").inherit(passed.into());
        let (text, mut child) = run(&session);
        assert!(child.wait().unwrap().success() && child.try_wait().unwrap().is_some());
        let lines: Vec<&str> = text.lines().collect();
        let pid = child.id();
        assert_eq!(lines[..3], [format!("{pid} {pid}"), "/proc".into(), "b c".into()], "{text}");
        let fds: BTreeSet<i32> = lines[3].split_whitespace().map(|fd| fd.parse().unwrap()).collect();
        assert_eq!(fds, BTreeSet::from([0, 1, 2, number]), "{text}");
        session.clear_env();
        assert!(!run(&session).0.contains("b c"));
    }

    #[test]
    fn signals_are_those_of_a_new_program() {
        crate::sys::process::inherited::reset(false);
        let (text, mut child) = run(Session::new("cat").arg("/proc/self/status"));
        child.wait().unwrap();
        for field in ["SigBlk:\t", "SigIgn:\t"] {
            let value = text.split(field).nth(1).unwrap().split('\n').next().unwrap();
            // glibc ignores the two signals that it uses itself, 32 and 33, until a program needs them.
            assert_eq!(u64::from_str_radix(value, 16).unwrap() & !(3 << 31), 0, "{field}");
        }
    }

    #[test]
    fn errors_of_the_start_are_returned_and_a_child_can_be_killed() {
        let null = File::open("/dev/null").unwrap();
        let streams = [null.as_fd(); 3];
        let missing = Session::new("/no/program").spawn(streams).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let no_directory = Session::new("true").current_dir("/no/directory").spawn(streams).unwrap_err();
        assert_eq!(no_directory.kind(), io::ErrorKind::NotFound);
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "x").unwrap();
        assert_eq!(
            Session::new(file.path()).spawn(streams).unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );

        let mut child = Session::new("sleep").arg("100").spawn(streams).unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(ProcessId::of(child.id()).unwrap().is_some_and(|process| process.is_alive()));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        child.kill().unwrap();
    }
}
