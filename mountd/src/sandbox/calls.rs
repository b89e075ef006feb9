//! The system calls that a server may make: the list of docs/explanation/security.md, and nothing else.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use stencilfs::error::{Error, Result};

/// One system call that a server may make.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number on this processor.
    pub number: libc::c_long,
    /// With which arguments.
    pub allowed: Allowed,
    /// What the server needs it for.
    pub purpose: &'static str,
}

/// With which arguments a call is allowed.
#[derive(Debug, Clone, Copy)]
pub enum Allowed {
    /// With any.
    Always,
    /// When one of the alternatives holds.
    If(&'static str, &'static [Bits]),
    /// When this argument is the server's own process.
    OwnProcess(&'static str, u8),
    /// Never, but the answer is ENOSYS: the C library then takes an older call.
    Unknown(&'static str),
}

/// Argument `arg` has `value` in the bits of `mask`.
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

/// `int` arguments: the upper half of the register says nothing.
const INT: i64 = 0xFFFF_FFFF;

/// What pthread_create asks for: a thread of this process and nothing more. Bit 22 is CLONE_DETACHED, which some C
/// libraries set and the kernel ignores.
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

/// The flags of open(2) that make, change or write a file. O_TMPFILE without its O_DIRECTORY.
const WRITING: i64 =
    (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as i64;

const NOT_CODE: Allowed = Allowed::If("without `PROT_EXEC`", &[bits(2, libc::PROT_EXEC as i64, 0)]);

/// All of them. One more is a decision: it needs a row in docs/explanation/security.md and a new count in the scenario `sandbox`.
pub const CALLS: &[Call] = &[
    call("read", libc::SYS_read, "requests of the kernel, files of the store, answers of the supervisor"),
    call("write", libc::SYS_write, "the log, notices that ask for requests again and take names back"),
    call("writev", libc::SYS_writev, "replies to the kernel"),
    call("pread64", libc::SYS_pread64, "packs; backings that are verified"),
    call("pwrite64", libc::SYS_pwrite64, "backings that are filled"),
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
            "never; the answer is ENOSYS, so that the server takes `openat` for each component, whose flags can be seen",
        ),
    ),
    call("close", libc::SYS_close, "descriptors"),
    call("fstat", libc::SYS_fstat, "lengths of files"),
    call("newfstatat", libc::SYS_newfstatat, "names of the store"),
    call("statx", libc::SYS_statx, "names of the store"),
    #[cfg(target_arch = "x86_64")]
    call("readlink", libc::SYS_readlink, "the path of the store without symbolic links"),
    call("readlinkat", libc::SYS_readlinkat, "the same, where there is no `readlink`"),
    call("getdents64", libc::SYS_getdents64, "folders of the store"),
    call("lseek", libc::SYS_lseek, "lengths of files, holes of backings"),
    call("fadvise64", libc::SYS_fadvise64, "drops what the page cache would hold twice"),
    only(
        call("fcntl", libc::SYS_fcntl, "copies of descriptors, their flags"),
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
    call("dup3", libc::SYS_dup3, "puts the connection in the place of the handshake's socket"),
    only(call("mmap", libc::SYS_mmap, "memory, tables of templates"), NOT_CODE),
    only(call("mprotect", libc::SYS_mprotect, "stacks and heaps"), NOT_CODE),
    call("mremap", libc::SYS_mremap, "memory that grows"),
    call("munmap", libc::SYS_munmap, "memory that is given back"),
    call("madvise", libc::SYS_madvise, "memory that is given back"),
    call("brk", libc::SYS_brk, "memory"),
    only(
        call("clone", libc::SYS_clone, "threads"),
        Allowed::If("a thread, exactly as pthread_create asks for it", &[bits(0, !DETACHED, THREAD)]),
    ),
    only(
        call("clone3", libc::SYS_clone3, "threads"),
        Allowed::Unknown(
            "never; the answer is ENOSYS, so that the C library takes `clone`, whose flags can be seen",
        ),
    ),
    call("set_robust_list", libc::SYS_set_robust_list, "begin of a thread"),
    call("rseq", libc::SYS_rseq, "begin of a thread"),
    call("sigaltstack", libc::SYS_sigaltstack, "begin and end of a thread"),
    call("sched_getaffinity", libc::SYS_sched_getaffinity, "begin of a thread"),
    only(
        call("prctl", libc::SYS_prctl, "names of threads"),
        Allowed::If("`PR_SET_NAME`", &[bits(0, INT, libc::PR_SET_NAME as i64)]),
    ),
    call("gettid", libc::SYS_gettid, "who it is"),
    call("getpid", libc::SYS_getpid, "who it is"),
    call("geteuid", libc::SYS_geteuid, "who it is"),
    call("futex", libc::SYS_futex, "locks"),
    call("sched_yield", libc::SYS_sched_yield, "locks"),
    call("clock_nanosleep", libc::SYS_clock_nanosleep, "pauses"),
    call("clock_gettime", libc::SYS_clock_gettime, "time, where it costs a call"),
    call("restart_syscall", libc::SYS_restart_syscall, "a wait that a stop signal interrupted"),
    #[cfg(target_arch = "x86_64")]
    call("poll", libc::SYS_poll, "waits"),
    call("ppoll", libc::SYS_ppoll, "waits, where there is no `poll`"),
    call("sendmsg", libc::SYS_sendmsg, "questions to the supervisor, with descriptors"),
    call("recvmsg", libc::SYS_recvmsg, "answers of the supervisor, with descriptors"),
    call("getrandom", libc::SYS_getrandom, "seeds of hash tables"),
    call("rt_sigaction", libc::SYS_rt_sigaction, "end of the process after a fault"),
    call("rt_sigprocmask", libc::SYS_rt_sigprocmask, "begin of a thread, end of the process"),
    call("rt_sigreturn", libc::SYS_rt_sigreturn, "return from a signal"),
    only(call("tgkill", libc::SYS_tgkill, "abort(3)"), Allowed::OwnProcess("to the server itself", 0)),
    call("exit", libc::SYS_exit, "end of a thread"),
    call("exit_group", libc::SYS_exit_group, "end of the process"),
];

impl Call {
    /// The row of docs/explanation/security.md.
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
    Error::failed(format!("the filter of system calls cannot be made ({name}): {why}"))
        .remedy("this is a fault of Stencil: report it with its version")
}

/// What becomes of a call that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It fails with EPERM.
    Eperm,
    /// It ends the process with SIGSYS.
    Kill,
}

/// The programs of the filter, in the order in which they must be installed; `None` on a processor for which none can
/// be made.
///
/// # Errors
/// When the list cannot be compiled.
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
    // The kernel takes the sharpest answer of both: what the list lets through as unknown, the first one refuses.
    Ok(Some([
        compile(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        compile(all, refuse, SeccompAction::Allow)?,
    ]))
}
