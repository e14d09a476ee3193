/*
 * An echo server for x86-64 without libc: cc -static -nostdlib -O1 -o static static.c
 * Argument: the port at 127.0.0.1.
 */
#define CONNECTIONS 4096

static long call(long number, long a, long b, long c, long d)
{
	long result;
	register long r10 asm("r10") = d;

	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
		     : "rcx", "r11", "memory");
	return result;
}

enum { READ = 0, WRITE = 1, CLOSE = 3, SOCKET = 41, ACCEPT = 43, BIND = 49, LISTEN = 50,
       EXIT = 60, EPOLL_WAIT = 232, EPOLL_CTL = 233, EPOLL_CREATE1 = 291 };

struct address {
	unsigned short family, port;
	unsigned int host;
	char zero[8];
};

struct __attribute__((packed)) event {
	unsigned int events;
	unsigned long data;
};

static struct event ready[64];
static char bytes[4096];

static int serve(char **arguments)
{
	struct address address = { 2, 0, 0x0100007f, { 0 } };
	unsigned int port = 0;

	for (char *at = arguments[1]; at && *at; at++)
		port = port * 10 + (*at - '0');
	address.port = (unsigned short)((port >> 8) | (port << 8));
	long listener = call(SOCKET, 2, 1, 0, 0);
	long poll = call(EPOLL_CREATE1, 0, 0, 0, 0);
	struct event event = { 1, (unsigned long)listener };

	if (call(BIND, listener, (long)&address, sizeof(address), 0) < 0)
		return 1;
	if (call(LISTEN, listener, CONNECTIONS, 0, 0) < 0)
		return 1;
	call(EPOLL_CTL, poll, 1, listener, (long)&event);
	for (;;) {
		long count = call(EPOLL_WAIT, poll, (long)ready, 64, -1);

		for (long at = 0; at < count; at++) {
			long socket = (long)ready[at].data;

			if (socket == listener) {
				socket = call(ACCEPT, listener, 0, 0, 0);
				event.data = (unsigned long)socket;
				if (socket >= 0)
					call(EPOLL_CTL, poll, 1, socket, (long)&event);
				continue;
			}
			long length = call(READ, socket, (long)bytes, sizeof(bytes), 0);

			if (length <= 0 || call(WRITE, socket, (long)bytes, length, 0) != length)
				call(CLOSE, socket, 0, 0, 0);
		}
	}
}

void enter(char **stack)
{
	call(EXIT, serve(stack + 1), 0, 0, 0);
}

asm(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall enter\n");
