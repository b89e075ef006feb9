/* The least that launching clones can cost: processes that map a file privately and touch pages, and nothing else.
 *
 *   fork_loop FILE CLONES READ WRITE PARALLEL
 *
 * Forks CLONES children, at most PARALLEL of which are not ready yet. Each opens and maps FILE, reads READ pages and
 * writes to WRITE others, which differ from child to child, reports through a pipe, and sleeps. When all are ready, all
 * are killed and reaped. Prints the seconds of both as one line of JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t splitmix(uint64_t x) {
    x += 0x9E3779B97F4A7C15UL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9UL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBUL;
    return x ^ (x >> 31);
}

/* The child. Reports 'r' when the pages are touched, 'f' if that fails. */
static void run_child(const char *path, uint64_t index, uint64_t reads, uint64_t writes, int ready) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct stat stat;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &stat) != 0 || stat.st_size < (off_t)PAGE) {
        (void)!write(ready, "f", 1);
        _exit(1);
    }
    uint64_t pages = (uint64_t)stat.st_size / PAGE, seed = splitmix(index);
    volatile char *map = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (map == MAP_FAILED) {
        (void)!write(ready, "f", 1);
        _exit(1);
    }
    /* Reads first, as simulated clones do: a read after a write to the same 2 MiB range maps 16 pages, not a folio. */
    for (uint64_t i = writes; i < writes + reads; i++)
        (void)map[splitmix(seed + i) % pages * PAGE];
    for (uint64_t i = 0; i < writes; i++)
        map[splitmix(seed + i) % pages * PAGE] = 1;
    (void)!write(ready, "r", 1);
    for (;;)
        pause();
}

int main(int argc, char **argv) {
    if (argc != 6)
        return 2;
    uint64_t clones = strtoull(argv[2], NULL, 10), reads = strtoull(argv[3], NULL, 10);
    uint64_t writes = strtoull(argv[4], NULL, 10), parallel = strtoull(argv[5], NULL, 10);
    int ready[2], failed = 0;
    pid_t *pids = calloc(clones, sizeof *pids);
    if (!pids || parallel == 0 || pipe(ready) != 0)
        return 2;
    /* If a child never reports. The death of this process kills all children. */
    alarm(600);
    double start = now();
    for (uint64_t started = 0, done = 0; done < clones && !failed;) {
        if (started < clones && started - done < parallel) {
            pids[started] = fork();
            if (pids[started] == 0)
                run_child(argv[1], started, reads, writes, ready[1]);
            failed = pids[started] < 0;
            started += !failed;
        } else {
            char answer = 'f';
            failed = read(ready[0], &answer, 1) != 1 || answer != 'r';
            done++;
        }
    }
    double launched = now();
    for (uint64_t i = 0; i < clones && pids[i] > 0; i++)
        kill(pids[i], SIGKILL);
    for (uint64_t i = 0; i < clones && pids[i] > 0; i++)
        waitpid(pids[i], NULL, 0);
    if (failed) {
        fprintf(stderr, "fork_loop: a process cannot touch %s\n", argv[1]);
        return 1;
    }
    printf("{\"seconds\":%.6f,\"stop_seconds\":%.6f}\n", launched - start, now() - launched);
    return 0;
}
