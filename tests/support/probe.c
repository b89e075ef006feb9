/* A user without read permission tries to get information about a file. The program opens two descriptors as root (R for
 * reading, N with O_PATH), changes to the user, and tries system calls. It prints one line for each: the call, and "ok",
 * "blind" or the name of an errno.
 *
 *     probe UID FILE TAGGED-FILE
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

static void print_result(const char *what, long result)
{
    printf("%s\t%s\n", what, result >= 0 ? "ok" : strerrorname_np(errno));
}

static long cachestat_of(int fd)
{
    uint64_t range[2] = {0, 0}, answer[5];
    return syscall(451, fd, range, answer, 0);
}

static int change_user(uid_t uid)
{
    return setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid);
}

int main(int argc, char **argv)
{
    char directory[4096];
    if (argc != 4 || strlen(argv[2]) >= sizeof directory)
        return 2;
    const char *file = argv[2];
    strcpy(directory, file);
    *strrchr(directory, '/') = 0;
    int reader = open(file, O_RDONLY), name = open(file, O_PATH);
    if (reader < 0 || name < 0 || change_user((uid_t)atoi(argv[1])))
        return 3;
    setvbuf(stdout, NULL, _IOLBF, 0);

    struct stat stat_;
    struct statx statx_;
    char byte, link[64];
    print_result("open(F, O_RDONLY)", open(file, O_RDONLY));
    print_result("open(F, O_RDWR)", open(file, O_RDWR));
    print_result("open(F, O_PATH)", open(file, O_PATH));
    print_result("open(T, O_RDONLY)", open(argv[3], O_RDONLY));
    print_result("stat(F)", stat(file, &stat_));
    print_result("statx(F)", statx(AT_FDCWD, file, 0, STATX_ALL, &statx_));
    print_result("access(F, F_OK)", access(file, F_OK));
    print_result("truncate(F)", truncate(file, 0));
    print_result("listxattr(F)", listxattr(file, NULL, 0));
    print_result("inotify_add_watch(F)", inotify_add_watch(inotify_init1(0), file, IN_OPEN));
    int mount_id;
    struct file_handle handle = {0};
    print_result("name_to_handle_at(F)", name_to_handle_at(AT_FDCWD, file, &handle, &mount_id, 0));
    DIR *listed = opendir(directory);
    print_result("opendir(D)", listed ? 0 : -1);
    print_result("open(D, O_PATH)", open(directory, O_PATH));
    print_result("inotify_add_watch(D)", inotify_add_watch(inotify_init1(0), directory, IN_OPEN));
    print_result("chdir(D)", chdir(directory));
    errno = ENOMEM;
    print_result("mincore() of what could not be mapped", mincore((void *)0x10000000, 4096, (unsigned char *)&byte));

    /* An O_PATH descriptor, received from another process. */
    print_result("cachestat(N)", cachestat_of(name));
    void *mapped = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, name, 0);
    print_result("mmap(N)", mapped == MAP_FAILED ? -1 : 0);
    print_result("read(N)", read(name, &byte, 1));
    snprintf(link, sizeof link, "/proc/self/fd/%d", name);
    print_result("open(/proc/self/fd/N)", open(link, O_RDONLY));
    print_result("readahead(N)", readahead(name, 0, 4096));

    /* A descriptor for reading, received from another process: it gives access to the bytes, but must not reveal which
     * pages are in use. */
    print_result("cachestat(R)", cachestat_of(reader));
    fstat(reader, &stat_);
    size_t pages = (size_t)stat_.st_size / 4096, blind = 0;
    unsigned char *resident = calloc(pages, 1);
    mapped = mmap(NULL, pages * 4096, PROT_READ, MAP_PRIVATE, reader, 0);
    if (mapped == MAP_FAILED || mincore(mapped, pages * 4096, resident))
        return 4;
    for (size_t i = 0; i < pages; i++)
        blind += resident[i] & 1;
    printf("mincore(R)\t%s\n", blind == pages ? "blind" : "ok");
    return 0;
}
