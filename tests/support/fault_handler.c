/* A page-fault handler for the UFFD backend of Firecracker, after Firecracker's docs/snapshotting/handling-page-faults-on-snapshot-resume.md:
 *
 *   fault_handler SOCKET MEMORY
 *
 * Maps the file MEMORY, accepts one connection on SOCKET, receives the layout of the guest's memory and a userfaultfd,
 * and copies each page that faults. Prints "ready" when it listens. */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096UL

static unsigned long field(const char *json, const char *name) {
    const char *at = strstr(json, name);
    if (!at || !(at = strchr(at, ':')))
        errx(1, "no %s in %s", name, json);
    return strtoul(at + 1, NULL, 10);
}

static int receive(int connection, char *json, size_t size) {
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {json, size - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(connection, &message, 0);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (length <= 0 || !header || header->cmsg_type != SCM_RIGHTS)
        errx(1, "no descriptor");
    json[length] = 0;
    int fd;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    return fd;
}

int main(int count, char **words) {
    if (count != 3)
        errx(2, "usage: fault_handler SOCKET MEMORY");
    int file = open(words[2], O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (file < 0 || fstat(file, &info) != 0)
        err(1, "%s", words[2]);
    char *memory = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (memory == MAP_FAILED)
        err(1, "mmap");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, words[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 1) != 0)
        err(1, "%s", words[1]);
    puts("ready");
    fflush(stdout);
    static char json[1 << 16];
    int connection = accept(listener, NULL, NULL);
    int fd = receive(connection, json, sizeof json);
    /* One region: the guest has less than 3 GiB. */
    unsigned long base = field(json, "base_host_virt_addr"), offset = field(json, "offset");
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    struct uffd_msg event;
    while (read(fd, &event, sizeof event) == sizeof event) {
        if (event.event != UFFD_EVENT_PAGEFAULT)
            errx(1, "event %d", event.event);
        unsigned long at = event.arg.pagefault.address & ~(PAGE - 1);
        struct uffdio_copy copy = {.dst = at, .src = (unsigned long)memory + offset + (at - base), .len = PAGE};
        /* A page that another fault has filled exists already. */
        if (ioctl(fd, UFFDIO_COPY, &copy) != 0 && copy.copy != -17)
            err(1, "UFFDIO_COPY");
    }
    return 0;
}
