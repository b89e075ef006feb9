//! The system calls that a server may make: exactly the list in docs/explanation/security.md.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use stencilfs::error::{Error, Result};

/// One system call that a server may make.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Name of the system call.
    pub name: &'static str,
    /// Number of the system call on this architecture.
    pub number: libc::c_long,
    /// Allowed arguments.
    pub allowed: Allowed,
    /// The purpose for which the server needs the call.
    pub purpose: &'static str,
}

/// Condition on the arguments of a system call.
#[derive(Debug, Clone, Copy)]
pub enum Allowed {
    /// All arguments are allowed.
    Always,
    /// One of the alternatives must match.
    If(&'static str, &'static [Bits]),
    /// The argument at this index must be the PID of the server itself.
    OwnProcess(&'static str, u8),
    /// The call always returns ENOSYS: the C library then uses an older call.
    Unknown(&'static str),
}

/// Matches if the bits of argument `arg` in `mask` have the value `value`.
#[derive(Debug, Clone, Copy)]
pub struct Bits {
    arg: u8,
    mask: u64,
    value: u64,
}

const fn bits(arg: u8, mask: i64, value: i64) -> Bits {
    Bits { arg, mask: mask as u64, value: value as u64 }
}

const fn call(name: &'static str, number: libc::c_long, purpose: &'static str) -> Call {
    Call { name, number, allowed: Allowed::Always, purpose }
}

const fn only(mut call: Call, allowed: Allowed) -> Call {
    call.allowed = allowed;
    call
}

/// Mask for `int` arguments: the kernel ignores the upper half of the register.
const INT: i64 = 0xFFFF_FFFF;

/// The flags that pthread_create(3) passes to clone(2): a thread of this process and nothing else. Bit 22 is
/// CLONE_DETACHED, which some C libraries set and the kernel ignores.
const THREAD: i64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as i64;
const DETACHED: i64 = 0x0040_0000;

/// The flags of open(2) that create, truncate or write a file; O_TMPFILE without the O_DIRECTORY bit that it includes.
const WRITING: i64 =
    (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as i64;

const NOT_CODE: Allowed = Allowed::If("without `PROT_EXEC`", &[bits(2, libc::PROT_EXEC as i64, 0)]);

/// All allowed calls. An addition needs a row in docs/explanation/security.md and a new count in the test scenario
/// `sandbox`.
pub const CALLS: &[Call] = &[
    call("read", libc::SYS_read, "requests of the kernel, files of the store, replies of the supervisor"),
    call(
        "write",
        libc::SYS_write,
        "the log, notifications to the kernel: resend requests, invalidate entries",
    ),
    call("writev", libc::SYS_writev, "replies to the kernel"),
    call("pread64", libc::SYS_pread64, "packs, verification of backings"),
    call("pwrite64", libc::SYS_pwrite64, "filling of backings"),
    only(
        call("openat", libc::SYS_openat, "files of the store"),
        Allowed::If(
            "for reading: without `O_WRONLY`, `O_RDWR`, `O_CREAT`, `O_TRUNC`, `O_TMPFILE`",
            &[bits(2, WRITING, 0)],
        ),
    ),
    only(
        call("openat2", libc::SYS_openat2, "files of the store"),
        Allowed::Unknown(
            "never; it returns ENOSYS, so that the server uses `openat` for each component, whose flags the filter can check",
        ),
    ),
    call("close", libc::SYS_close, "descriptors"),
    call("fstat", libc::SYS_fstat, "lengths of files"),
    call("newfstatat", libc::SYS_newfstatat, "names of the store"),
    call("statx", libc::SYS_statx, "names of the store"),
    #[cfg(target_arch = "x86_64")]
    call("readlink", libc::SYS_readlink, "canonical path of the store"),
    call("readlinkat", libc::SYS_readlinkat, "the same on architectures without `readlink`"),
    call("getdents64", libc::SYS_getdents64, "directories of the store"),
    call("lseek", libc::SYS_lseek, "lengths of files, holes of backings"),
    call("fadvise64", libc::SYS_fadvise64, "drops pages that the page cache would hold twice"),
    only(
        call("fcntl", libc::SYS_fcntl, "duplicates and flags of descriptors"),
        Allowed::If(
            "`F_DUPFD_CLOEXEC`, `F_GETFD`, `F_SETFD`, `F_GETFL`, `F_SETFL`, `F_GET_SEALS`",
            &[
                bits(1, INT, libc::F_DUPFD_CLOEXEC as i64),
                bits(1, INT, libc::F_GETFD as i64),
                bits(1, INT, libc::F_SETFD as i64),
                bits(1, INT, libc::F_GETFL as i64),
                bits(1, INT, libc::F_SETFL as i64),
                bits(1, INT, libc::F_GET_SEALS as i64),
            ],
        ),
    ),
    call("dup3", libc::SYS_dup3, "replaces the socket of the handshake by the connection"),
    only(call("mmap", libc::SYS_mmap, "memory, tables of templates"), NOT_CODE),
    only(call("mprotect", libc::SYS_mprotect, "stacks and heaps"), NOT_CODE),
    call("mremap", libc::SYS_mremap, "memory"),
    call("munmap", libc::SYS_munmap, "release of memory"),
    call("madvise", libc::SYS_madvise, "release of memory"),
    call("brk", libc::SYS_brk, "memory"),
    only(
        call("clone", libc::SYS_clone, "threads"),
        Allowed::If("the exact flags of pthread_create(3)", &[bits(0, !DETACHED, THREAD)]),
    ),
    only(
        call("clone3", libc::SYS_clone3, "threads"),
        Allowed::Unknown(
            "never; it returns ENOSYS, so that the C library uses `clone`, whose flags the filter can check",
        ),
    ),
    call("set_robust_list", libc::SYS_set_robust_list, "start of a thread"),
    call("rseq", libc::SYS_rseq, "start of a thread"),
    call("sigaltstack", libc::SYS_sigaltstack, "start and end of a thread"),
    call("sched_getaffinity", libc::SYS_sched_getaffinity, "start of a thread"),
    only(
        call("prctl", libc::SYS_prctl, "names of threads"),
        Allowed::If("`PR_SET_NAME`", &[bits(0, INT, libc::PR_SET_NAME as i64)]),
    ),
    call("gettid", libc::SYS_gettid, "process identity"),
    call("getpid", libc::SYS_getpid, "process identity"),
    call("geteuid", libc::SYS_geteuid, "process identity"),
    call("futex", libc::SYS_futex, "locks"),
    call("sched_yield", libc::SYS_sched_yield, "locks"),
    call("clock_nanosleep", libc::SYS_clock_nanosleep, "pauses"),
    call("clock_gettime", libc::SYS_clock_gettime, "time, without vDSO"),
    call("restart_syscall", libc::SYS_restart_syscall, "restart of a wait after SIGCONT"),
    #[cfg(target_arch = "x86_64")]
    call("poll", libc::SYS_poll, "waits"),
    call("ppoll", libc::SYS_ppoll, "waits on architectures without `poll`"),
    call("sendmsg", libc::SYS_sendmsg, "requests to the supervisor, with descriptors"),
    call("recvmsg", libc::SYS_recvmsg, "replies of the supervisor, with descriptors"),
    call("getrandom", libc::SYS_getrandom, "seeds of hash tables"),
    call("rt_sigaction", libc::SYS_rt_sigaction, "end of the process after a fault"),
    call("rt_sigprocmask", libc::SYS_rt_sigprocmask, "start of a thread, end of the process"),
    call("rt_sigreturn", libc::SYS_rt_sigreturn, "return from a signal"),
    only(call("tgkill", libc::SYS_tgkill, "abort(3)"), Allowed::OwnProcess("to the server itself", 0)),
    call("exit", libc::SYS_exit, "end of a thread"),
    call("exit_group", libc::SYS_exit_group, "end of the process"),
];

impl Call {
    /// Returns the row for the table in docs/explanation/security.md.
    pub fn row(&self) -> String {
        let when = match self.allowed {
            Allowed::Always => "always",
            Allowed::If(words, _) | Allowed::OwnProcess(words, _) | Allowed::Unknown(words) => words,
        };
        format!("| `{}` | {when} | {} |", self.name, self.purpose)
    }

    fn rules(&self) -> Result<Vec<SeccompRule>> {
        let alternatives: Vec<Bits> = match self.allowed {
            Allowed::Always | Allowed::Unknown(_) => Vec::new(),
            Allowed::If(_, alternatives) => alternatives.to_vec(),
            Allowed::OwnProcess(_, arg) => vec![bits(arg, INT, i64::from(std::process::id()))],
        };
        alternatives
            .into_iter()
            .map(|Bits { arg, mask, value }| {
                let compare = SeccompCmpOp::MaskedEq(mask);
                let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Qword, compare, value);
                SeccompRule::new(vec![condition.map_err(|e| wrong(self.name, &e))?])
                    .map_err(|e| wrong(self.name, &e))
            })
            .collect()
    }
}

fn wrong(name: &str, why: &dyn std::fmt::Display) -> Error {
    Error::failed(format!("cannot build the system call filter ({name}): {why}"))
        .remedy("this is a bug in Stencil: report it with the version")
}

/// The effect of a system call that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The call fails with EPERM.
    Eperm,
    /// The process is killed with SIGSYS.
    Kill,
}

/// Compiles the filters, in the order in which they must be installed; `None` on an architecture that seccompiler does
/// not support.
///
/// # Errors
/// Returns an error if the list cannot be compiled.
pub fn programs(refused: Refused) -> Result<Option<[BpfProgram; 2]>> {
    let Ok(arch) = std::env::consts::ARCH.try_into() else { return Ok(None) };
    let compile = |rules: BTreeMap<i64, Vec<SeccompRule>>, otherwise, then| {
        SeccompFilter::new(rules, otherwise, then, arch)
            .and_then(BpfProgram::try_from)
            .map_err(|e| wrong("all", &e))
    };
    let mut all = BTreeMap::new();
    let mut unknown = BTreeMap::new();
    for call in CALLS {
        all.insert(call.number, call.rules()?);
        if matches!(call.allowed, Allowed::Unknown(_)) {
            unknown.insert(call.number, Vec::new());
        }
    }
    let refuse = match refused {
        Refused::Eperm => SeccompAction::Errno(libc::EPERM as u32),
        Refused::Kill => SeccompAction::KillProcess,
    };
    // The kernel applies the most restrictive result of both filters: the first filter turns calls that return ENOSYS
    // from allowed (in the second one) to refused.
    Ok(Some([
        compile(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        compile(all, refuse, SeccompAction::Allow)?,
    ]))
}
