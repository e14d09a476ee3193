/* An echo server that gets its clients over the line protocol (docs/MIGRATE_FROM_ACL.md).
 * cc -o worker worker.c && ./worker /run/dispatcher/line.sock [TYPE] */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MOST 1000
static struct pollfd fds[1 + MOST] = {{.fd = -1}}; /* The stream to the dispatcher, then the clients. */
static int count, used;

static int join(const char *path) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    strncpy(to.sun_path, path, sizeof to.sun_path - 1);
    int stream = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(stream, (struct sockaddr *)&to, sizeof to) == 0) return stream;
    return close(stream), -1;
}

static int report(const char *type) { /* At least `count`; the type is URL-encoded. */
    char line[512];
    int len = snprintf(line, sizeof line, "count=%d&used=%d&pid=%d&type=%s\r\n", count, used, (int)getpid(), type);
    return send(fds[0].fd, line, len, MSG_NOSIGNAL) == len;
}

static int take(void) { /* One message: the client's address as text, and its descriptor. */
    char address[255], control[CMSG_SPACE(sizeof(int))]; /* Not less than 255 bytes. */
    struct iovec text = {address, sizeof address};
    struct msghdr message = {.msg_iov = &text, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    if (recvmsg(fds[0].fd, &message, MSG_CMSG_CLOEXEC) <= 0) return 0;
    if (CMSG_FIRSTHDR(&message)) memcpy(&fds[++count].fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int)), used++;
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 2) return fprintf(stderr, "usage: %s SOCKET [TYPE]\n", argv[0]), 2;
    for (time_t last = 0;;) {
        int well = 1;
        if (time(NULL) != last) { /* Once a second; without the dispatcher, serve on and try to join. */
            last = time(NULL);
            if (fds[0].fd < 0) fds[0].fd = join(argv[1]);
            well = fds[0].fd < 0 || report(argc > 2 ? argv[2] : "echo");
        }
        for (int i = 0; i <= count; i++) fds[i].events = i || count < MOST ? POLLIN : 0;
        poll(fds, 1 + count, 1000);
        for (int i = count; i > 0; i--) {
            char data[4096];
            ssize_t len = fds[i].revents ? recv(fds[i].fd, data, sizeof data, 0) : 1;
            if (len > 0 && (!fds[i].revents || send(fds[i].fd, data, len, MSG_NOSIGNAL) == len)) continue;
            close(fds[i].fd);
            fds[i] = fds[count--];
        }
        if (well && fds[0].revents) well = take();
        if (!well) close(fds[0].fd), fds[0].fd = -1;
    }
}
