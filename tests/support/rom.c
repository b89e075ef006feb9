/* Runs in a guest with a read-only NVDIMM: reads all of it, tries to write all of it, reads it again, and repeats that
 * with one piece at a time. Prints:
 *
 *     rom BASE LENGTH DIGEST
 *     stores COUNT DIGEST
 *     beat COUNT ok | beat COUNT changed
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t digest(const volatile uint64_t *words, size_t count)
{
    uint64_t sum = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++)
        sum = (sum ^ words[i]) * 0x100000001b3u;
    return sum;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Reads base and length of the first range in the NFIT: a header of 40 bytes, then structures of type, length, … */
static void read_nfit(uint64_t *base, uint64_t *length)
{
    unsigned char nfit[4096];
    int file = open("/sys/firmware/acpi/tables/NFIT", O_RDONLY);
    ssize_t got = file < 0 ? -1 : read(file, nfit, sizeof nfit);
    if (got < 0)
        fail("NFIT");
    for (ssize_t at = 40; at + 56 <= got;) {
        uint16_t type, size;
        memcpy(&type, nfit + at, 2);
        memcpy(&size, nfit + at + 2, 2);
        if (type == 0) {
            memcpy(base, nfit + at + 32, 8);
            memcpy(length, nfit + at + 40, 8);
            return;
        }
        if (size == 0)
            break;
        at += size;
    }
    fputs("NFIT without a range\n", stderr);
    exit(1);
}

int main(void)
{
    uint64_t base, length;
    setvbuf(stdout, NULL, _IOLBF, 0);
    read_nfit(&base, &length);
    int memory = open("/dev/mem", O_RDWR);
    if (memory < 0)
        fail("/dev/mem");
    volatile uint64_t *rom = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memory, (off_t)base);
    if (rom == MAP_FAILED)
        fail("mmap");
    size_t count = length / 8;
    uint64_t before = digest(rom, count);
    printf("rom %#llx %llu %#llx\n", (unsigned long long)base, (unsigned long long)length, (unsigned long long)before);
    for (size_t i = 0; i < count; i++)
        rom[i] = ~(uint64_t)i;
    printf("stores %zu %#llx\n", count, (unsigned long long)digest(rom, count));
    for (unsigned long beat = 1;; beat++) {
        size_t first = beat * 7919 % (count / 4096) * 4096;
        uint64_t piece = digest(rom + first, 4096);
        for (size_t i = first; i < first + 4096; i++)
            rom[i] = beat;
        printf("beat %lu %s\n", beat, digest(rom + first, 4096) == piece ? "ok" : "changed");
        usleep(100000);
    }
}
