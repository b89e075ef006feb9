/* Maps a file privately, touches pages and prints what that took as one line of JSON. It contains nothing of Stencil.
 *
 *   touch claim BYTES                         takes that much memory and frees it, and prints nothing
 *   touch FILE first                          opens the file and reads its first word; the time includes the open
 *   touch FILE sweep ADVICE                   reads one word of each page, in order
 *   touch FILE random ADVICE SEED COUNT       reads one word of COUNT pages, in an order that SEED determines
 *   touch FILE copy ADVICE                    reads one word of each page, then writes a byte to each page of the last
 *                                             quarter; prints how much of the other 2 MiB ranges is mapped by 2 MiB
 *                                             entries
 *
 * ADVICE is normal, random (MADV_RANDOM) or huge (MADV_HUGEPAGE). The mapping begins at a multiple of 2 MiB. The checksum
 * covers all words that were read: the same pages of the same data have the same checksum.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define LARGE (2UL << 20)

static uint64_t checksum;

static void fail(const char *what) {
    fprintf(stderr, "touch: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000UL + (uint64_t)t.tv_nsec;
}

static uint64_t splitmix(uint64_t x) {
    x += 0x9E3779B97F4A7C15UL;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9UL;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBUL;
    return x ^ (x >> 31);
}

/* Reads one word of a page; which one depends on the page. */
static void read_page(const volatile char *map, uint64_t page) {
    uint64_t word = page % (PAGE / 8) * 8;
    checksum = checksum * 31 + *(const volatile uint64_t *)(map + page * PAGE + word) + page;
}

static int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Returns the bytes of this address range that 2 MiB entries map. The range is a mapping of its own. */
static uint64_t pmd_mapped(const volatile char *from, const volatile char *to) {
    FILE *maps = fopen("/proc/self/smaps", "r");
    if (!maps)
        fail("/proc/self/smaps");
    char line[4096];
    unsigned long begin, end, kib, total = 0;
    int inside = 0;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx ", &begin, &end) == 2)
            inside = begin >= (unsigned long)from && end <= (unsigned long)to;
        else if (inside && sscanf(line, "FilePmdMapped: %lu kB", &kib) == 1)
            total += kib << 10;
    }
    fclose(maps);
    return total;
}

int main(int argc, char **argv) {
    if (argc < 3)
        return 2;
    if (!strcmp(argv[1], "claim")) {
        void *memory = mmap(NULL, strtoull(argv[2], NULL, 10), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        return memory == MAP_FAILED;
    }
    const char *order = argv[2], *advice = argc > 3 ? argv[3] : "normal";
    uint64_t start = now();
    int fd = open(argv[1], O_RDONLY);
    struct stat stat;
    if (fd < 0 || fstat(fd, &stat) != 0)
        fail(argv[1]);
    uint64_t size = (uint64_t)stat.st_size, pages = size / PAGE, touched = 0;
    char *area = mmap(NULL, size + LARGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == 0 || area == MAP_FAILED)
        fail("no address range");
    area = (char *)(((uintptr_t)area + LARGE - 1) / LARGE * LARGE);
    char *map = mmap(area, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, 0);
    if (map == MAP_FAILED)
        fail("mmap");
    int number = !strcmp(advice, "random") ? MADV_RANDOM : !strcmp(advice, "huge") ? MADV_HUGEPAGE : MADV_NORMAL;
    if (madvise(map, size, number) != 0)
        fail("madvise");

    uint64_t *latencies = NULL, written = 0, writing = 0;
    if (!strcmp(order, "first")) {
        touched = 1;
        read_page(map, 0);
    } else if (!strcmp(order, "random") && argc == 6) {
        uint64_t state = splitmix(strtoull(argv[4], NULL, 10));
        touched = strtoull(argv[5], NULL, 10);
        latencies = malloc(touched * sizeof *latencies);
        if (!latencies || touched == 0)
            fail("no latencies");
        start = now();
        for (uint64_t i = 0; i < touched; i++) {
            uint64_t before = now();
            read_page(map, splitmix(state + i) % pages);
            latencies[i] = now() - before;
        }
    } else if (!strcmp(order, "sweep") || !strcmp(order, "copy")) {
        touched = pages;
        start = now();
        for (uint64_t i = 0; i < pages; i++)
            read_page(map, i);
    } else {
        return 2;
    }
    uint64_t end = now();
    if (!strcmp(order, "copy")) {
        uint64_t first = pages * 3 / 4 / (LARGE / PAGE) * (LARGE / PAGE);
        for (uint64_t i = first; i < pages; i++)
            ((volatile char *)map)[i * PAGE + i % PAGE] ^= 1;
        writing = now() - end;
        written = pages - first;
        /* An advice of its own splits the mapping, so that the counter of each part can be read. */
        if (madvise(map + first * PAGE, written * PAGE, MADV_DONTFORK) != 0)
            fail("madvise");
    }

    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"seconds\":%.6f,\"pages\":%lu,\"checksum\":%lu,\"major_faults\":%ld,\"minor_faults\":%ld",
           (double)(end - start) / 1e9, touched, checksum, usage.ru_majflt, usage.ru_minflt);
    if (latencies) {
        qsort(latencies, touched, sizeof *latencies, ascending);
        printf(",\"p50_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,\"max_us\":%.1f",
               (double)latencies[touched / 2] / 1e3, (double)latencies[touched * 99 / 100] / 1e3,
               (double)latencies[touched * 999 / 1000] / 1e3, (double)latencies[touched - 1] / 1e3);
    }
    if (written)
        printf(",\"write_seconds\":%.6f,\"written_pages\":%lu,\"unwritten_bytes\":%lu,\"pmd_mapped_bytes\":%lu",
               (double)writing / 1e9, written, (pages - written) * PAGE,
               pmd_mapped(map, map + (pages - written) * PAGE));
    printf("}\n");
    return 0;
}
