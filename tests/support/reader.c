/* A process that reads a file whose bytes it can compute, repeatedly, after it has dropped the pages from the page
 * cache, until its standard input is closed. It contains nothing of Stencil; it exits at an error, a wrong byte or a
 * SIGBUS. Readers of one file use separate ranges, so that no page has been read by another reader.
 *
 *   reader PROGRESS INDEX PAUSE WAY SALT PATH FIRST COUNT      pages FIRST to FIRST+COUNT of PATH, by WAY:
 *       map        private mapping, scattered page faults, MADV_RANDOM
 *       readahead  private mapping, page faults in order
 *       pread      buffered, 4 KiB, scattered, FADV_RANDOM
 *       stream     buffered, 128 KiB, in order
 *       direct     O_DIRECT, 4 KiB, scattered
 *       direct1m   O_DIRECT, 1 MiB, in order
 *       populate   private mapping, MADV_POPULATE_READ of 2 MiB at a time, in order
 *       willneed   private mapping, MADV_WILLNEED of 2 MiB and page faults behind it, in order
 *   reader PROGRESS INDEX PAUSE names SALT PATH FIRST COUNT    opens, lookups and listings; PATH is a file of a template
 *
 * PROGRESS is a file of 64-bit numbers; number INDEX counts the pages read. After each read the process sleeps for
 * PAUSE microseconds, like a guest that computes: the readers then wait for the server and not for a CPU. Page P of the
 * file with salt S has the number splitmix64(512 P + 2k + S) in word 2k, and the number P in word 2k+1.
 *
 * At the end it prints "stall BEGIN END PAGE" for each read that took SLOW nanoseconds or longer (times of
 * CLOCK_MONOTONIC), then "read COUNT"; or "failed PAGE REASON", and exits with 1.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define SLOW 1000000UL
#define MAX_STALLS 65536UL
#define MAX_READ (2UL << 20)
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static volatile uint64_t *progress;
static uint64_t salt, first, count, pause_us;
static const char *path;
static struct { uint64_t begin, end, page; } stalls[MAX_STALLS];
static unsigned long stalled;

static uint64_t splitmix(uint64_t x) {
    x += 0x9E3779B97F4A7C15UL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9UL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBUL;
    return x ^ (x >> 31);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000UL + (uint64_t)t.tv_nsec;
}

static void fail(uint64_t page, const char *what) {
    printf("failed %lu %s\n", page, what);
    fflush(stdout);
    _exit(1);
}

static void check(uint64_t page, const volatile uint64_t *words) {
    for (unsigned long w = 0; w < WORDS; w += 2)
        if (words[w] != splitmix(page * WORDS + w + salt) || words[w + 1] != page)
            fail(page, "wrong bytes");
}

static void record_stall(uint64_t begin, uint64_t page) {
    uint64_t end = now();
    if (end - begin >= SLOW && stalled < MAX_STALLS) {
        stalls[stalled].begin = begin;
        stalls[stalled].end = end;
        stalls[stalled++].page = page;
    }
}

static int is_over(void) {
    if (pause_us)
        usleep(pause_us);
    struct pollfd in = {.fd = 0, .events = POLLIN};
    return poll(&in, 1, 0) != 0;
}

static void read_at(int fd, void *buffer, uint64_t page, uint64_t pages) {
    uint64_t begin = now();
    ssize_t got = pread(fd, buffer, pages * PAGE, (off_t)(page * PAGE));
    record_stall(begin, page);
    if (got != (ssize_t)(pages * PAGE))
        fail(page, got < 0 ? strerror(errno) : "short read");
    for (uint64_t i = 0; i < pages; i++)
        check(page + i, (const uint64_t *)((char *)buffer + i * PAGE));
    *progress += pages;
}

static void by_pread(int fd, uint64_t pages, int scattered) {
    static void *buffer;
    if (!buffer && posix_memalign(&buffer, PAGE, MAX_READ) != 0)
        fail(0, "no memory");
    for (uint64_t i = 0; i + pages <= count && !is_over(); i += pages)
        read_at(fd, buffer, first + (scattered ? i * 6151 % count : i), pages);
}

static void by_map(int fd, int scattered, int advice, uint64_t ahead) {
    uint64_t length = count * PAGE;
    char *map = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, (off_t)(first * PAGE));
    if (map == MAP_FAILED || (scattered && madvise(map, length, MADV_RANDOM) != 0))
        fail(first, strerror(errno));
    for (uint64_t i = 0; i < count && !is_over(); i++) {
        uint64_t at = scattered ? i * 6151 % count : i;
        uint64_t begin = now();
        if (ahead && at % ahead == 0) {
            uint64_t left = length - at * PAGE, part = ahead * PAGE;
            if (madvise(map + at * PAGE, left < part ? left : part, advice) != 0)
                fail(first + at, strerror(errno));
        }
        volatile uint64_t *words = (uint64_t *)(map + at * PAGE);
        (void)words[1];
        record_stall(begin, first + at);
        check(first + at, words);
        ++*progress;
    }
    munmap(map, length);
}

/* Lists the template's directory and the two above it, and opens the template's file, each by a new lookup. */
static void by_names(void) {
    static void *buffer;
    if (!buffer && posix_memalign(&buffer, PAGE, PAGE) != 0)
        fail(0, "no memory");
    char directory[4096];
    uint64_t page = first + splitmix(*progress) % count;
    for (int up = 1; up <= 3; up++) {
        snprintf(directory, sizeof directory, "%s", path);
        for (int i = 0; i < up; i++)
            *strrchr(directory, '/') = 0;
        uint64_t begin = now();
        DIR *dir = opendir(directory);
        if (!dir)
            fail(page, strerror(errno));
        int entries = 0;
        errno = 0;
        while (readdir(dir))
            entries++;
        if (errno || entries < 2)
            fail(page, errno ? strerror(errno) : "an empty listing");
        closedir(dir);
        record_stall(begin, page);
        struct stat about;
        if (stat(directory, &about) != 0)
            fail(page, strerror(errno));
    }
    uint64_t begin = now();
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    record_stall(begin, page);
    if (fd < 0)
        fail(page, strerror(errno));
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
    read_at(fd, buffer, page, 1);
    posix_fadvise(fd, (off_t)(page * PAGE), PAGE, POSIX_FADV_DONTNEED);
    close(fd);
}

int main(int argc, char **argv) {
    if (argc != 9)
        return 2;
    const char *way = argv[4];
    int is_direct = strncmp(way, "direct", 6) == 0, is_names = strcmp(way, "names") == 0;
    pause_us = strtoull(argv[3], NULL, 10);
    salt = strtoull(argv[5], NULL, 10);
    path = argv[6];
    first = strtoull(argv[7], NULL, 10);
    count = strtoull(argv[8], NULL, 10);
    int shared = open(argv[1], O_RDWR | O_CLOEXEC);
    void *numbers = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, shared, 0);
    if (numbers == MAP_FAILED)
        fail(0, strerror(errno));
    progress = (uint64_t *)numbers + strtoul(argv[2], NULL, 10);
    int fd = is_names ? -1 : open(path, O_RDONLY | O_CLOEXEC | (is_direct ? O_DIRECT : 0));
    if (fd < 0 && !is_names)
        fail(0, strerror(errno));
    while (!is_over()) {
        int scattered = strcmp(way, "pread") == 0;
        if (fd >= 0)
            posix_fadvise(fd, 0, 0, scattered ? POSIX_FADV_RANDOM : POSIX_FADV_NORMAL);
        if (is_names)
            by_names();
        else if (strcmp(way, "map") == 0)
            by_map(fd, 1, 0, 0);
        else if (strcmp(way, "readahead") == 0)
            by_map(fd, 0, 0, 0);
        else if (strcmp(way, "populate") == 0)
            by_map(fd, 0, MADV_POPULATE_READ, 512);
        else if (strcmp(way, "willneed") == 0)
            by_map(fd, 0, MADV_WILLNEED, 512);
        else if (scattered || strcmp(way, "direct") == 0)
            by_pread(fd, 1, 1);
        else if (strcmp(way, "stream") == 0)
            by_pread(fd, 32, 0);
        else if (strcmp(way, "direct1m") == 0)
            by_pread(fd, 256, 0);
        else
            return 2;
        if (fd >= 0)
            posix_fadvise(fd, (off_t)(first * PAGE), (off_t)(count * PAGE), POSIX_FADV_DONTNEED);
    }
    for (unsigned long i = 0; i < stalled; i++)
        printf("stall %lu %lu %lu\n", stalls[i].begin, stalls[i].end, stalls[i].page);
    printf("read %lu\n", *progress);
    return 0;
}
