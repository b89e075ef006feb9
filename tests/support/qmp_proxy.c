/* qmp_proxy MODE LISTEN REAL COMMAND…
 *
 * Listens at LISTEN and then executes COMMAND, a QEMU with its QMP socket at REAL: the peer credentials (SO_PEERCRED)
 * of a connection to LISTEN name that QEMU. A child forwards messages and descriptors. In the first session that sends
 * "stop" the child adds something before the reply:
 *
 *     flood    12 MiB of events, each a long list of lists, which take ten times that size in memory
 *     endless  64 MiB without a newline
 *     deep     an event with a million levels of nesting
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static char buffer[1 << 16];

static int fail(const char *what) {
    perror(what);
    exit(1);
}

static struct sockaddr_un address(const char *path) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strncpy(a.sun_path, path, sizeof a.sun_path - 1);
    return a;
}

static int all(int fd, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t done = write(fd, bytes, length);
        if (done <= 0)
            return 0;
        bytes += done;
        length -= done;
    }
    return 1;
}

/* Forwards the available bytes and descriptors; returns the length, 0 at the end of the stream. */
static ssize_t pass(int from, int to) {
    char control[256];
    struct iovec part = {buffer, sizeof buffer - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t got = recvmsg(from, &message, 0);
    if (got <= 0)
        return 0;
    buffer[got] = 0;
    part.iov_len = got;
    if (sendmsg(to, &message, MSG_NOSIGNAL) != got)
        return 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_type == SCM_RIGHTS)
            for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int))
                close(*(int *)(CMSG_DATA(c) + at));
    return got;
}

static int add(const char *mode, int client) {
    static char much[2 << 20];
    int ok = 1;
    if (!strcmp(mode, "flood")) {
        size_t length = sizeof much / 3 * 3;
        for (size_t at = 0; at < length; at++)
            much[at] = "[],"[at % 3];
        for (int n = 0; ok && n < 6; n++)
            ok = all(client, "{\"event\":\"FLOOD\",\"data\":[", 25) && all(client, much, length - 1) &&
                 all(client, "]}\n", 3);
    } else if (!strcmp(mode, "endless")) {
        memset(much, ' ', sizeof much);
        for (int n = 0; ok && n < 32; n++)
            ok = all(client, much, sizeof much);
    } else {
        memset(much, '[', sizeof much);
        ok = all(client, "{\"event\":\"DEEP\",\"data\":", 23) && all(client, much, 1 << 20) && all(client, "\n", 1);
    }
    return ok;
}

static void proxy(const char *mode, int listener, const char *real) {
    for (int armed = 1;;) {
        int client = accept(listener, NULL, NULL), qemu = socket(AF_UNIX, SOCK_STREAM, 0);
        struct sockaddr_un a = address(real);
        while (connect(qemu, (struct sockaddr *)&a, sizeof a) < 0)
            usleep(10000);
        struct pollfd ends[] = {{client, POLLIN, 0}, {qemu, POLLIN, 0}};
        for (int open = 1; open && poll(ends, 2, -1) > 0;) {
            if (ends[0].revents) {
                open = pass(client, qemu) > 0;
                if (open && armed && strstr(buffer, "\"execute\":\"stop\"")) {
                    armed = 0;
                    open = add(mode, client);
                }
            }
            if (open && ends[1].revents)
                open = pass(qemu, client) > 0;
        }
        close(client);
        close(qemu);
    }
}

int main(int argc, char **argv) {
    if (argc < 5)
        return 2;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un a = address(argv[2]);
    if (bind(listener, (struct sockaddr *)&a, sizeof a) < 0 || listen(listener, 16) < 0)
        fail(argv[2]);
    signal(SIGPIPE, SIG_IGN);
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        proxy(argv[1], listener, argv[3]);
    }
    signal(SIGPIPE, SIG_DFL);
    close(listener);
    execvp(argv[4], argv + 4);
    return fail(argv[4]);
}
