/* A process that maps files, like any program; it contains nothing of Stencil. One command per line on standard
 * input, one reply per line on standard output: "ok", "ok NUMBER" or "error ERRNO".
 *
 *   map ID PATH OFFSET LENGTH rw|ro     private mapping
 *   shared ID PATH OFFSET LENGTH        shared read-only mapping
 *   shifted ID PATH OFFSET LENGTH       private mapping one page behind a multiple of 2 MiB
 *   anon ID LENGTH                      private anonymous memory, for comparison
 *   write ID PAGE [VALUE]               writes one byte in the middle of a page
 *   fill ID PAGE VALUE                  writes the whole page
 *   read ID PAGE                        replies with the first byte
 *   hash ID PAGE                        replies with 63 bits of FNV-1a of the page's words
 *   unmap ID FIRST COUNT                unmaps pages
 *   guard ID FIRST COUNT                MADV_GUARD_INSTALL
 *   pageout ID FIRST COUNT              MADV_PAGEOUT
 *   discard ID FIRST COUNT              MADV_DONTNEED
 *   huge ID LENGTH                      MADV_HUGEPAGE
 *   collapse ID FIRST COUNT             MADV_COLLAPSE
 *   nohuge ID LENGTH                    MADV_NOHUGEPAGE
 *   lock ID LENGTH                      mlock
 *   replace ID FIRST COUNT              maps anonymous memory over pages
 *   over ID FIRST COUNT PATH            maps these pages of another file over pages
 *   load ID FIRST COUNT PATH            reads these pages of a file into pages
 *   track ID LENGTH                     registers LENGTH bytes for asynchronous write protection; replies with the descriptor
 *   close FD                            closes a descriptor
 *   mergeable ID LENGTH                 MADV_MERGEABLE on LENGTH bytes
 *   open ID PATH                        opens a descriptor with O_CLOEXEC, maps nothing
 *   exec ID                             executes this program again; no reply
 *   fork ID PAGE...                     forks a child that writes these pages and stays; replies with its PID
 *   share ID                            starts a child with this address space (CLONE_VM); replies with its PID
 *   vfork ID                            vforks a child that replies with its PID and stays; reads no further command
 *   quit
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <signal.h>
#include <unistd.h>

#define PAGE 4096UL
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

static volatile unsigned char *maps[64];

static void reply(long result) {
    if (result < 0)
        printf("error %d\n", errno);
    else
        printf("ok %ld\n", result);
    fflush(stdout);
}

static long map_at(void *hint, int id, const char *path, unsigned long offset, unsigned long length, int prot,
                   int flags) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    void *at = mmap(hint, length, prot, flags, fd, (off_t)offset);
    close(fd);
    if (at == MAP_FAILED)
        return -1;
    maps[id] = at;
    return 0;
}

static long map_file(int id, const char *path, unsigned long offset, unsigned long length, int prot, int flags) {
    return map_at(NULL, id, path, offset, length, prot, flags);
}

static long map_shifted(int id, const char *path, unsigned long offset, unsigned long length) {
    unsigned long huge = 2UL << 20;
    char *space = mmap(NULL, length + 2 * huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED)
        return -1;
    char *at = space + (huge - (unsigned long)space % huge) + PAGE;
    return map_at(at, id, path, offset, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED);
}

static long track(int id, unsigned long length) {
    /* UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC */
    struct uffdio_api api = {.api = UFFD_API, .features = 1UL << 13 | 1UL << 15};
    struct uffdio_register range = {.range = {(unsigned long)maps[id], length}, .mode = UFFDIO_REGISTER_MODE_WP};
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */);
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) != 0 || ioctl(fd, UFFDIO_REGISTER, &range) != 0)
        return -1;
    return fd;
}

static long replace(int id, unsigned long first, unsigned long count) {
    void *at = mmap((void *)(maps[id] + first * PAGE), count * PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return at == MAP_FAILED ? -1 : 0;
}

static long over(int id, unsigned long first, unsigned long count, const char *path) {
    volatile unsigned char *map = maps[id];
    long result = map_at((void *)(map + first * PAGE), id, path, first * PAGE, count * PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_FIXED);
    maps[id] = map;
    return result;
}

static long load(int id, unsigned long first, unsigned long count, const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t length = pread(fd, (void *)(maps[id] + first * PAGE), count * PAGE, (off_t)(first * PAGE));
    close(fd);
    return length == (ssize_t)(count * PAGE) ? 0 : -1;
}

static int stay(void *parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != *(pid_t *)parent)
        _exit(1);
    for (;;)
        pause();
}

static long share(void) {
    static pid_t parent;
    static char stack[64 << 10] __attribute__((aligned(16)));
    parent = getpid();
    return clone(stay, stack + sizeof stack, CLONE_VM | SIGCHLD, &parent);
}

static long suspend_in_vfork(void) {
    pid_t parent = getpid();
    pid_t child = vfork();
    if (child == 0) {
        char line[32];
        int length = snprintf(line, sizeof line, "ok %d\n", (int)getpid());
        if (write(1, line, (size_t)length) != length)
            _exit(1);
        stay(&parent);
    }
    return child;
}

static long fork_writer(int id, char *pages) {
    int ready[2];
    if (pipe(ready) != 0)
        return -1;
    pid_t parent = getpid();
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        for (char *word = strtok(pages, " \n"); word; word = strtok(NULL, " \n"))
            maps[id][strtoul(word, NULL, 10) * PAGE + 99] = 0xC5;
        if (write(ready[1], "x", 1) != 1)
            _exit(1);
        for (;;)
            pause();
    }
    char byte;
    if (child > 0 && read(ready[0], &byte, 1) != 1)
        child = -1;
    close(ready[0]);
    close(ready[1]);
    return child;
}

static long hash_page(const volatile unsigned char *page) {
    unsigned long hash = 0xcbf29ce484222325UL;
    for (unsigned long at = 0; at < PAGE; at += 8)
        hash = (hash ^ *(const volatile unsigned long *)(page + at)) * 0x100000001b3UL;
    return (long)(hash >> 1);
}

int main(void) {
    static char line[1 << 16];
    while (fgets(line, sizeof line, stdin)) {
        char word[16], path[4096], prot[8];
        int id = 0, used = 0;
        unsigned long a = 0, b = 0;
        if (sscanf(line, "%15s %d%n", word, &id, &used) < 1 || id < 0 || id >= 64) {
            errno = EINVAL;
            reply(-1);
        } else if (strcmp(word, "quit") == 0) {
            return 0;
        } else if (strcmp(word, "map") == 0 && sscanf(line + used, "%4095s %lu %lu %7s", path, &a, &b, prot) == 4) {
            int both = strcmp(prot, "rw") == 0 ? PROT_READ | PROT_WRITE : PROT_READ;
            reply(map_file(id, path, a, b, both, MAP_PRIVATE));
        } else if (strcmp(word, "shifted") == 0 && sscanf(line + used, "%4095s %lu %lu", path, &a, &b) == 3) {
            reply(map_shifted(id, path, a, b));
        } else if (strcmp(word, "shared") == 0 && sscanf(line + used, "%4095s %lu %lu", path, &a, &b) == 3) {
            reply(map_file(id, path, a, b, PROT_READ, MAP_SHARED));
        } else if (strcmp(word, "anon") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            void *at = mmap(NULL, a, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            maps[id] = at;
            reply(at == MAP_FAILED ? -1 : 0);
        } else if (strcmp(word, "write") == 0 && sscanf(line + used, "%lu %lu", &a, &b) >= 1) {
            maps[id][a * PAGE + 2048] = b ? (unsigned char)b : 0x5A;
            reply(0);
        } else if (strcmp(word, "fill") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            memset((void *)(maps[id] + a * PAGE), (int)b, PAGE);
            reply(0);
        } else if (strcmp(word, "read") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(maps[id][a * PAGE]);
        } else if (strcmp(word, "hash") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(hash_page(maps[id] + a * PAGE));
        } else if (strcmp(word, "unmap") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            reply(munmap((void *)(maps[id] + a * PAGE), b * PAGE));
        } else if (strcmp(word, "guard") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            reply(madvise((void *)(maps[id] + a * PAGE), b * PAGE, MADV_GUARD_INSTALL));
        } else if (strcmp(word, "pageout") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            reply(madvise((void *)(maps[id] + a * PAGE), b * PAGE, MADV_PAGEOUT));
        } else if (strcmp(word, "discard") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            reply(madvise((void *)(maps[id] + a * PAGE), b * PAGE, MADV_DONTNEED));
        } else if (strcmp(word, "huge") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(madvise((void *)maps[id], a, MADV_HUGEPAGE));
        } else if (strcmp(word, "collapse") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            reply(madvise((void *)(maps[id] + a * PAGE), b * PAGE, MADV_COLLAPSE));
        } else if (strcmp(word, "nohuge") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(madvise((void *)maps[id], a, MADV_NOHUGEPAGE));
        } else if (strcmp(word, "replace") == 0 && sscanf(line + used, "%lu %lu", &a, &b) == 2) {
            reply(replace(id, a, b));
        } else if (strcmp(word, "over") == 0 && sscanf(line + used, "%lu %lu %4095s", &a, &b, path) == 3) {
            reply(over(id, a, b, path));
        } else if (strcmp(word, "load") == 0 && sscanf(line + used, "%lu %lu %4095s", &a, &b, path) == 3) {
            reply(load(id, a, b, path));
        } else if (strcmp(word, "track") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(track(id, a));
        } else if (strcmp(word, "close") == 0) {
            reply(close(id));
        } else if (strcmp(word, "lock") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(mlock((void *)maps[id], a));
        } else if (strcmp(word, "mergeable") == 0 && sscanf(line + used, "%lu", &a) == 1) {
            reply(madvise((void *)maps[id], a, MADV_MERGEABLE));
        } else if (strcmp(word, "open") == 0 && sscanf(line + used, "%4095s", path) == 1) {
            reply(open(path, O_RDONLY | O_CLOEXEC));
        } else if (strcmp(word, "exec") == 0) {
            execl("/proc/self/exe", "actor", (char *)NULL);
            reply(-1);
        } else if (strcmp(word, "share") == 0) {
            reply(share());
        } else if (strcmp(word, "vfork") == 0) {
            reply(suspend_in_vfork());
        } else if (strcmp(word, "fork") == 0) {
            reply(fork_writer(id, line + used));
        } else {
            errno = EINVAL;
            reply(-1);
        }
    }
    return 0;
}
