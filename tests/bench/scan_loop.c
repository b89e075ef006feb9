/* The least that measuring clones can cost: one scan of the page tables of each mapping, and nothing else.
 *
 *   scan_loop FILE
 *
 * Reads lines "PID START END" (addresses hexadecimal) from a file, and counts the copied pages of each mapping by
 * PAGEMAP_SCAN. Prints the seconds and the number of pages as one line of JSON.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define REGIONS 1024

/* struct pm_scan_arg and struct page_region of linux/fs.h, which old headers do not have. */
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, mask, anyof, returned;
};
struct region {
    uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan)
enum { FILE_PAGE = 4, PRESENT = 8, SWAPPED = 16, ZERO_PAGE = 32 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    if (argc != 2 || !freopen(argv[1], "r", stdin))
        return 2;
    struct mapping {
        unsigned pid;
        unsigned long start, end;
    } *mappings = NULL, next;
    size_t count = 0;
    while (scanf("%u %lx %lx", &next.pid, &next.start, &next.end) == 3) {
        mappings = realloc(mappings, (count + 1) * sizeof *mappings);
        if (!mappings)
            return 1;
        mappings[count++] = next;
    }
    static struct region regions[REGIONS];
    uint64_t copied = 0;
    double start = now();
    for (size_t i = 0; i < count; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%u/pagemap", mappings[i].pid);
        int fd = open(path, O_RDONLY), found;
        struct scan scan = {.size = sizeof scan, .start = mappings[i].start, .end = mappings[i].end,
            .vec = (uintptr_t)regions, .vec_len = REGIONS, .inverted = FILE_PAGE | ZERO_PAGE,
            .mask = FILE_PAGE | ZERO_PAGE, .anyof = PRESENT | SWAPPED, .returned = SWAPPED};
        do {
            found = ioctl(fd, SCAN, &scan);
            if (found < 0) {
                perror(path);
                return 1;
            }
            for (int r = 0; r < found; r++)
                copied += (regions[r].end - regions[r].start) / PAGE;
            scan.start = found > 0 ? regions[found - 1].end : scan.end;
        } while (found == REGIONS && scan.start < scan.end);
        close(fd);
    }
    printf("{\"seconds\":%.6f,\"copied_pages\":%lu}\n", now() - start, (unsigned long)copied);
    free(mappings);
    return 0;
}
