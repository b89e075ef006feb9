//! The system calls that a server may make: exactly the list in docs/explanation/security.md, which has the purpose of
//! each.

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
}

/// Condition on the arguments of a system call.
#[derive(Debug, Clone, Copy)]
pub enum Allowed {
    /// All arguments are allowed.
    Always,
    /// One of the alternatives must match.
    If(&'static [Bits]),
    /// The argument at this index must be the PID of the server itself.
    OwnProcess(u8),
    /// The call always returns ENOSYS: the server or its C library then uses an older call, whose flags the filter can
    /// check.
    Unknown,
}

/// Matches if the bits of argument `arg` in `mask` have the value `value`.
#[derive(Debug, Clone, Copy)]
pub struct Bits {
    arg: u8,
    mask: u64,
    value: u64,
}

const fn bits(arg: u8, mask: i64, value: i64) -> Bits {
    Bits { arg, mask: mask.cast_unsigned(), value: value.cast_unsigned() }
}

const fn call(name: &'static str, number: libc::c_long) -> Call {
    Call { name, number, allowed: Allowed::Always }
}

const fn only(name: &'static str, number: libc::c_long, allowed: Allowed) -> Call {
    Call { name, number, allowed }
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

const NOT_CODE: Allowed = Allowed::If(&[bits(2, libc::PROT_EXEC as i64, 0)]);

/// All allowed calls. An addition needs a row in docs/explanation/security.md and a new count in the test scenario
/// `sandbox`.
pub const CALLS: &[Call] = &[
    call("read", libc::SYS_read),
    call("write", libc::SYS_write),
    call("writev", libc::SYS_writev),
    call("pread64", libc::SYS_pread64),
    call("pwrite64", libc::SYS_pwrite64),
    only("openat", libc::SYS_openat, Allowed::If(&[bits(2, WRITING, 0)])),
    only("openat2", libc::SYS_openat2, Allowed::Unknown),
    call("close", libc::SYS_close),
    call("fstat", libc::SYS_fstat),
    call("newfstatat", libc::SYS_newfstatat),
    call("statx", libc::SYS_statx),
    #[cfg(target_arch = "x86_64")]
    call("readlink", libc::SYS_readlink),
    call("readlinkat", libc::SYS_readlinkat),
    call("getdents64", libc::SYS_getdents64),
    call("lseek", libc::SYS_lseek),
    call("fadvise64", libc::SYS_fadvise64),
    only(
        "fcntl",
        libc::SYS_fcntl,
        Allowed::If(&[
            bits(1, INT, libc::F_DUPFD_CLOEXEC as i64),
            bits(1, INT, libc::F_GETFD as i64),
            bits(1, INT, libc::F_SETFD as i64),
            bits(1, INT, libc::F_GETFL as i64),
            bits(1, INT, libc::F_SETFL as i64),
            bits(1, INT, libc::F_GET_SEALS as i64),
        ]),
    ),
    call("dup3", libc::SYS_dup3),
    only("mmap", libc::SYS_mmap, NOT_CODE),
    only("mprotect", libc::SYS_mprotect, NOT_CODE),
    call("mremap", libc::SYS_mremap),
    call("munmap", libc::SYS_munmap),
    call("madvise", libc::SYS_madvise),
    call("brk", libc::SYS_brk),
    only("clone", libc::SYS_clone, Allowed::If(&[bits(0, !DETACHED, THREAD)])),
    only("clone3", libc::SYS_clone3, Allowed::Unknown),
    call("set_robust_list", libc::SYS_set_robust_list),
    call("rseq", libc::SYS_rseq),
    call("sigaltstack", libc::SYS_sigaltstack),
    call("sched_getaffinity", libc::SYS_sched_getaffinity),
    only("prctl", libc::SYS_prctl, Allowed::If(&[bits(0, INT, libc::PR_SET_NAME as i64)])),
    call("gettid", libc::SYS_gettid),
    call("getpid", libc::SYS_getpid),
    call("geteuid", libc::SYS_geteuid),
    call("futex", libc::SYS_futex),
    call("sched_yield", libc::SYS_sched_yield),
    call("clock_nanosleep", libc::SYS_clock_nanosleep),
    call("clock_gettime", libc::SYS_clock_gettime),
    call("restart_syscall", libc::SYS_restart_syscall),
    #[cfg(target_arch = "x86_64")]
    call("poll", libc::SYS_poll),
    call("ppoll", libc::SYS_ppoll),
    call("sendmsg", libc::SYS_sendmsg),
    call("recvmsg", libc::SYS_recvmsg),
    call("getrandom", libc::SYS_getrandom),
    call("rt_sigaction", libc::SYS_rt_sigaction),
    call("rt_sigprocmask", libc::SYS_rt_sigprocmask),
    call("rt_sigreturn", libc::SYS_rt_sigreturn),
    only("tgkill", libc::SYS_tgkill, Allowed::OwnProcess(0)),
    call("exit", libc::SYS_exit),
    call("exit_group", libc::SYS_exit_group),
];

impl Call {
    fn rules(&self) -> Result<Vec<SeccompRule>> {
        let alternatives: Vec<Bits> = match self.allowed {
            Allowed::Always | Allowed::Unknown => Vec::new(),
            Allowed::If(alternatives) => alternatives.to_vec(),
            Allowed::OwnProcess(arg) => vec![bits(arg, INT, i64::from(std::process::id()))],
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
        .hint("report this bug of Stencil, with the version")
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
        if matches!(call.allowed, Allowed::Unknown) {
            unknown.insert(call.number, Vec::new());
        }
    }
    let refuse = match refused {
        Refused::Eperm => SeccompAction::Errno(libc::EPERM as u32),
        Refused::Kill => SeccompAction::KillProcess,
    };
    // The kernel applies the most restrictive result of both filters: the second filter allows the calls that return
    // ENOSYS, and the first filter refuses them.
    Ok(Some([
        compile(unknown, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?,
        compile(all, refuse, SeccompAction::Allow)?,
    ]))
}
