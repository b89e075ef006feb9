/* A process that uses a file in one way, and in no other. It contains nothing of Stencil.
 *
 *   holder WAY PATH [DIRECTORY]
 *
 * Prints "ready PID" when process PID uses the file. After the next line on standard input it reads the whole file in
 * that way, prints "hash NUMBER" (63 bits of FNV-1a of the 64-bit words), and exits. If the kernel does not support the
 * way, it prints "cannot ERRNO" instead of "ready". No byte is read earlier unless the way requires it; in the way
 * "first thread ended, mapping" one page has been written with its own content. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

static const char *way, *path, *directory;
static size_t size;

static void cannot(void) {
    printf("cannot %d\n", errno);
    fflush(stdout);
    _exit(0);
}

static long check(long result) {
    if (result < 0)
        cannot();
    return result;
}

static int is(const char *name) { return strcmp(way, name) == 0; }

static void ready(pid_t pid) {
    printf("ready %d\n", (int)pid);
    fflush(stdout);
}

/* Waits for a line; the end of input means that the parent has exited. */
static void wait_for_line(void) {
    char byte;
    do
        if (read(0, &byte, 1) != 1)
            _exit(0);
    while (byte != '\n');
}

static void print_hash(const volatile unsigned char *bytes) {
    uint64_t hash = 0xcbf29ce484222325UL;
    for (size_t at = 0; at < size; at += 8)
        hash = (hash ^ *(const volatile uint64_t *)(bytes + at)) * 0x100000001b3UL;
    printf("hash %lu\n", (unsigned long)(hash >> 1));
    fflush(stdout);
}

static int open_file(int flags) { return (int)check(open(path, flags | O_CLOEXEC)); }

static unsigned char *map_file(int prot) {
    int fd = open_file(O_RDONLY);
    void *at = mmap(NULL, size, prot, MAP_PRIVATE, fd, 0);
    if (at == MAP_FAILED)
        cannot();
    close(fd);
    return at;
}

/* Reads a pipe from its present position, a file from its beginning. */
static void print_hash_of_fd(int fd) {
    unsigned char *bytes = malloc(size);
    for (size_t at = 0; at < size;) {
        ssize_t got = pread(fd, bytes + at, size - at, (off_t)at);
        if (got < 0 && errno == ESPIPE)
            got = read(fd, bytes + at, size - at);
        if (got <= 0) {
            printf("error %d\n", errno);
            fflush(stdout);
            _exit(1);
        }
        at += (size_t)got;
    }
    print_hash(bytes);
}

/* Reports a mapping as held by process `pid`, and reads it after a line on standard input. */
static void hold_mapping(unsigned char *at, pid_t pid) {
    ready(pid);
    wait_for_line();
    print_hash(at);
}

static void hold_fd(int fd, pid_t pid) {
    ready(pid);
    wait_for_line();
    print_hash_of_fd(fd);
}

/* Runs in a thread after the first thread has ended. */
static void *thread_after_main(void *unused) {
    (void)unused;
    char state = 0;
    while (state != 'Z') {
        char name[64], text[512] = "";
        snprintf(name, sizeof name, "/proc/%d/task/%d/stat", getpid(), getpid());
        int fd = open(name, O_RDONLY);
        if (fd >= 0 && read(fd, text, sizeof text - 1) > 0 && strrchr(text, ')'))
            state = strrchr(text, ')')[2];
        close(fd);
    }
    if (is("first thread ended, mapping")) {
        volatile unsigned char *at = map_file(PROT_READ | PROT_WRITE);
        at[0] = at[0];
        hold_mapping((unsigned char *)at, getpid());
        _exit(0);
    }
    hold_fd(open_file(O_RDONLY), getpid());
    _exit(0);
}

static void *thread_with_unshared_files(void *unused) {
    (void)unused;
    check(unshare(CLONE_FILES));
    hold_fd(open_file(O_RDONLY), getpid());
    _exit(0);
}

static void in_thread(void *(*work)(void *)) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL) != 0)
        cannot();
}

/* Forks a child that prints for itself and dies with its parent. */
static pid_t fork_child(void) {
    pid_t parent = getpid(), child = (pid_t)check(fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent && getppid() != 0)
            _exit(1);
    }
    return child;
}

static void exit_with(pid_t child) {
    int status;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

static void in_namespace(int flags) {
    check(unshare(flags));
    pid_t child = fork_child();
    if (child == 0) {
        /* The PID differs in this PID namespace. */
        unsigned char *at = map_file(PROT_READ);
        ready(0);
        wait_for_line();
        print_hash(at);
        _exit(0);
    }
    exit_with(child);
}

static void in_flight(void) {
    int pair[2], fd = open_file(O_RDONLY);
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 'x';
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    check(sendmsg(pair[0], &message, 0));
    close(fd);
    ready(getpid());
    wait_for_line();
    message.msg_controllen = sizeof control;
    check(recvmsg(pair[1], &message, 0));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    print_hash_of_fd(fd);
}

/* A minimal ring without a kernel thread: it can register files and buffers. */
struct ring {
    int fd;
    unsigned char *queue, *done;
    struct io_uring_sqe *entries;
    struct io_uring_params about;
};

static struct ring ring_new(void) {
    struct ring ring = {0};
    ring.fd = (int)check(syscall(SYS_io_uring_setup, 4, &ring.about));
    size_t entries = ring.about.sq_entries * sizeof(struct io_uring_sqe);
    ring.queue = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQ_RING);
    ring.done = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_CQ_RING);
    ring.entries = mmap(NULL, entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQES);
    if (ring.queue == MAP_FAILED || ring.done == MAP_FAILED || ring.entries == MAP_FAILED)
        cannot();
    return ring;
}

static void ring_run(struct ring *ring, struct io_uring_sqe entry) {
    volatile unsigned *tail = (unsigned *)(ring->queue + ring->about.sq_off.tail);
    unsigned *array = (unsigned *)(ring->queue + ring->about.sq_off.array);
    unsigned at = *tail & (ring->about.sq_entries - 1);
    ring->entries[at] = entry;
    array[at] = at;
    __sync_synchronize();
    *tail += 1;
    check(syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0));
    volatile unsigned *head = (unsigned *)(ring->done + ring->about.cq_off.head);
    struct io_uring_cqe *completions = (struct io_uring_cqe *)(ring->done + ring->about.cq_off.cqes);
    int result = completions[*head & (ring->about.cq_entries - 1)].res;
    *head += 1;
    if (result != (int)entry.len) {
        printf("error %d\n", -result);
        fflush(stdout);
        _exit(1);
    }
}

static void in_ring(void) {
    struct ring ring = ring_new();
    int fd = open_file(O_RDONLY);
    check(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_FILES, &fd, 1));
    close(fd);
    unsigned char *bytes = malloc(size);
    ready(getpid());
    wait_for_line();
    for (size_t at = 0; at < size; at += 65536) {
        struct io_uring_sqe entry = {.opcode = IORING_OP_READ, .flags = IOSQE_FIXED_FILE, .fd = 0, .off = at};
        entry.addr = (uint64_t)(bytes + at);
        entry.len = size - at < 65536 ? size - at : 65536;
        ring_run(&ring, entry);
    }
    print_hash(bytes);
}

static void pinned_by_ring(void) {
    struct ring ring = ring_new();
    unsigned char *at = map_file(PROT_READ | PROT_WRITE);
    struct iovec part = {at, size};
    check(syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &part, 1));
    /* The ring still pins the pages that were mapped here. */
    munmap(at, size);
    ready(getpid());
    wait_for_line();
    int copy = (int)check(memfd_create("copy", MFD_CLOEXEC));
    struct io_uring_sqe entry = {.opcode = IORING_OP_WRITE_FIXED, .fd = copy, .addr = (uint64_t)at, .len = (unsigned)size};
    ring_run(&ring, entry);
    print_hash_of_fd(copy);
}

static void in_pipe(int by_splice) {
    int ends[2];
    check(pipe(ends));
    check(fcntl(ends[1], F_SETPIPE_SZ, (int)size));
    if (by_splice) {
        int fd = open_file(O_RDONLY);
        for (size_t at = 0; at < size;)
            at += (size_t)check(splice(fd, NULL, ends[1], NULL, size - at, 0));
        close(fd);
    } else {
        unsigned char *at = map_file(PROT_READ);
        struct iovec part = {at, size};
        while (part.iov_len > 0) {
            size_t put = (size_t)check(vmsplice(ends[1], &part, 1, 0));
            part.iov_base = (char *)part.iov_base + put;
            part.iov_len -= put;
        }
        munmap(at, size);
    }
    ready(getpid());
    wait_for_line();
    print_hash_of_fd(ends[0]);
}

static void stopped_by_tracer(void) {
    int line[2];
    check(pipe(line));
    pid_t child = fork_child();
    if (child == 0) {
        unsigned char *at = map_file(PROT_READ);
        if (write(line[1], "x", 1) != 1)
            _exit(1);
        close(line[1]);
        wait_for_line();
        print_hash(at);
        _exit(0);
    }
    char byte;
    close(line[1]);
    if (read(line[0], &byte, 1) != 1)
        _exit(1);
    int status;
    check(ptrace(PTRACE_SEIZE, child, 0, 0));
    check(ptrace(PTRACE_INTERRUPT, child, 0, 0));
    check(waitpid(child, &status, 0));
    ready(child);
    struct pollfd in = {.fd = 0, .events = POLLIN};
    poll(&in, 1, -1);
    check(ptrace(PTRACE_DETACH, child, 0, 0));
    exit_with(child);
}

static int hold_in_child(void *at) {
    hold_mapping(at, getpid());
    _exit(0);
}

static void with_kvm_machine(void) {
    int kvm = (int)check(open("/dev/kvm", O_RDWR | O_CLOEXEC));
    int machine = (int)check(ioctl(kvm, KVM_CREATE_VM, 0));
    unsigned char *at = map_file(PROT_READ | PROT_WRITE);
    struct kvm_userspace_memory_region region = {.memory_size = size, .userspace_addr = (uint64_t)at};
    check(ioctl(machine, KVM_SET_USER_MEMORY_REGION, &region));
    hold_mapping(at, getpid());
}

static void in_mount_namespace(void) {
    check(unshare(CLONE_NEWNS));
    check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    char place[4096];
    snprintf(place, sizeof place, "%s/place", directory);
    close((int)check(open(place, O_RDONLY | O_CREAT | O_CLOEXEC, 0644)));
    check(mount(path, place, NULL, MS_BIND, NULL));
    ready(getpid());
    wait_for_line();
    path = place;
    print_hash_of_fd(open_file(O_RDONLY));
}

static void copy_in_memfd(void) {
    int copy = (int)check(memfd_create("copy", MFD_CLOEXEC)), fd = open_file(O_RDONLY);
    check(ftruncate(copy, (off_t)size));
    for (size_t at = 0; at < size;)
        at += (size_t)check(sendfile(copy, fd, NULL, size - at));
    close(fd);
    unsigned char *at = mmap(NULL, size, PROT_READ, MAP_PRIVATE, copy, 0);
    hold_mapping(at, getpid());
}

int main(int argc, char **argv) {
    if (argc < 3)
        return 2;
    way = argv[1];
    path = argv[2];
    directory = argc > 3 ? argv[3] : ".";
    struct stat about;
    check(stat(path, &about));
    size = (size_t)about.st_size;
    pid_t me = getpid();
    if (is("mapping") || is("mapping of a stopped process")) {
        unsigned char *at = map_file(PROT_READ);
        ready(me);
        if (is("mapping of a stopped process"))
            raise(SIGSTOP);
        wait_for_line();
        print_hash(at);
    } else if (is("shared mapping")) {
        int fd = open_file(O_RDONLY);
        void *at = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        close(fd);
        hold_mapping(at, me);
    } else if (is("mapping that was moved")) {
        unsigned char *at = map_file(PROT_READ);
        void *to = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        hold_mapping(mremap(at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to), me);
    } else if (is("mapping that a child does not inherit")) {
        unsigned char *at = map_file(PROT_READ);
        check(madvise(at, size, MADV_DONTFORK));
        pid_t child = fork_child();
        if (child == 0)
            for (;;)
                pause();
        hold_mapping(at, me);
        kill(child, SIGKILL);
    } else if (is("mapping with a KVM machine")) {
        with_kvm_machine();
    } else if (is("first thread ended, mapping") || is("first thread ended, descriptor")) {
        in_thread(thread_after_main);
        pthread_exit(NULL);
    } else if (is("thread with its own descriptors")) {
        in_thread(thread_with_unshared_files);
        for (;;)
            pause();
    } else if (is("child in the parent's memory")) {
        unsigned char *at = map_file(PROT_READ);
        static char stack[1 << 16];
        exit_with((pid_t)check(clone(hold_in_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, at)));
    } else if (is("mapping of another user")) {
        unsigned char *at = map_file(PROT_READ);
        check(setresgid(12345, 12345, 12345));
        check(setresuid(12345, 12345, 12345));
        hold_mapping(at, me);
    } else if (is("mapping of a process that cannot be dumped")) {
        unsigned char *at = map_file(PROT_READ);
        check(setresuid(12345, 12345, 12345));
        check(prctl(PR_SET_DUMPABLE, 0));
        hold_mapping(at, me);
    } else if (is("mapping below another root")) {
        unsigned char *at = map_file(PROT_READ);
        check(chroot(directory));
        check(chdir("/"));
        hold_mapping(at, me);
    } else if (is("mapping of a traced process")) {
        stopped_by_tracer();
    } else if (is("mapping in other namespaces")) {
        in_namespace(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWTIME);
    } else if (is("descriptor")) {
        hold_fd(open_file(O_RDONLY), me);
    } else if (is("descriptor without access")) {
        int fd = open_file(O_PATH);
        ready(me);
        wait_for_line();
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        path = name;
        print_hash_of_fd(open_file(O_RDONLY));
    } else if (is("descriptor in flight")) {
        in_flight();
    } else if (is("descriptor in an io_uring")) {
        in_ring();
    } else if (is("mount of the file")) {
        in_mount_namespace();
    } else if (is("watch by inotify")) {
        int watcher = (int)check(inotify_init1(IN_CLOEXEC));
        check(inotify_add_watch(watcher, path, IN_CLOSE));
        ready(me);
        wait_for_line();
        print_hash_of_fd(open_file(O_RDONLY));
    } else if (is("pages in a pipe, by splice") || is("pages in a pipe, by vmsplice")) {
        in_pipe(is("pages in a pipe, by splice"));
    } else if (is("pages pinned by an io_uring")) {
        pinned_by_ring();
    } else if (is("copy in a memory file")) {
        copy_in_memfd();
    } else {
        return 2;
    }
    return 0;
}
