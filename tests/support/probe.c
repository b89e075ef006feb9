/* A stranger tries to learn something of a file that it may not read. It opens two descriptors while it is still root (a
 * reader's, and one of the name only), becomes the user, and tries. One line for each: what, and "ok", "blind" or an errno's name.
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

static void said(const char *what, long result)
{
    printf("%s\t%s\n", what, result >= 0 ? "ok" : strerrorname_np(errno));
}

static long cached(int fd)
{
    uint64_t range[2] = {0, 0}, answer[5];
    return syscall(451, fd, range, answer, 0);
}

static int drop_to(uid_t uid)
{
    return setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid);
}

int main(int argc, char **argv)
{
    char folder[4096];
    if (argc != 4 || strlen(argv[2]) >= sizeof folder)
        return 2;
    const char *file = argv[2];
    strcpy(folder, file);
    *strrchr(folder, '/') = 0;
    int reader = open(file, O_RDONLY), name = open(file, O_PATH);
    if (reader < 0 || name < 0 || drop_to((uid_t)atoi(argv[1])))
        return 3;
    setvbuf(stdout, NULL, _IOLBF, 0);

    struct stat stat_;
    struct statx statx_;
    char byte, link[64];
    said("open(F, O_RDONLY)", open(file, O_RDONLY));
    said("open(F, O_RDWR)", open(file, O_RDWR));
    said("open(F, O_PATH)", open(file, O_PATH));
    said("open(T, O_RDONLY)", open(argv[3], O_RDONLY));
    said("stat(F)", stat(file, &stat_));
    said("statx(F)", statx(AT_FDCWD, file, 0, STATX_ALL, &statx_));
    said("access(F, F_OK)", access(file, F_OK));
    said("truncate(F)", truncate(file, 0));
    said("listxattr(F)", listxattr(file, NULL, 0));
    said("inotify_add_watch(F)", inotify_add_watch(inotify_init1(0), file, IN_OPEN));
    int mount_id;
    struct file_handle handle = {0};
    said("name_to_handle_at(F)", name_to_handle_at(AT_FDCWD, file, &handle, &mount_id, 0));
    DIR *listed = opendir(folder);
    said("opendir(D)", listed ? 0 : -1);
    said("open(D, O_PATH)", open(folder, O_PATH));
    said("inotify_add_watch(D)", inotify_add_watch(inotify_init1(0), folder, IN_OPEN));
    said("chdir(D)", chdir(folder));
    errno = ENOMEM;
    said("mincore() of what could not be mapped", mincore((void *)0x10000000, 4096, (unsigned char *)&byte));

    /* A descriptor of the name only, from somebody else. */
    said("cachestat(N)", cached(name));
    void *mapped = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, name, 0);
    said("mmap(N)", mapped == MAP_FAILED ? -1 : 0);
    said("read(N)", read(name, &byte, 1));
    snprintf(link, sizeof link, "/proc/self/fd/%d", name);
    said("open(/proc/self/fd/N)", open(link, O_RDONLY));
    said("readahead(N)", readahead(name, 0, 4096));

    /* A descriptor for reading, from somebody else: the bytes are given away with it, who uses which pages is not. */
    said("cachestat(R)", cached(reader));
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
