/* SPDX-License-Identifier: MIT
 *
 * bridge_socket.c - EVENT_SOCKET: how a socket of a caller becomes one of ours, that says when
 * there are events. (Not by poll(2) of what we serve: as soon as a mount answers one POLL, the
 * kernel sends one before every io_uring read and write of any file.)
 *
 * A number in the caller's table of descriptors is fetched with pidfd_getfd(2). What it names is
 * the caller's choice: closing it may flush a file of a server that never answers, or of this
 * mount; taking a message from a socket may close what the message carries. So a thread that is
 * made for the call does all that until the descriptor is known to be harmless, and no thread of
 * the bridge ever waits for it. While it works, the request is parked (WAIT_SOCKET).
 *
 * Harmless means:
 *  1. It is a connected SOCK_SEQPACKET of AF_UNIX: it can neither be connected again nor listen.
 *  2. It is shut down for reading, which nobody can take back: nothing is put into it any more.
 *  3. It is empty: nothing else ends with it. A message in it could carry the very descriptor whose
 *     open file holds the socket, and both would stay for ever.
 * Then send(2) with MSG_DONTWAIT and close(2) wait for nobody.
 *
 * Whose table. The number of the thread that calls comes with the request; it is not used again
 * before the call has ended, and that ends with our answer: the kernel lets nobody go whose request
 * we have read, killed or not, and interrupts are not heeded meanwhile (gives_up()). The exception is a
 * connection that is aborted under the call. Its number may be another thread's then, a moment
 * later, with a socket of the same kind under the same number: it would be shut down for reading.
 *
 * Concurrency: the mutex is a leaf, but for ioctx_wake(). A thread that got stuck outlives its
 * request and the bridge, and touches neither.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "bridge_control.h"
#include "log.h"

#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL /* Linux 6.9 */
#endif

/* Sockets of one user, those included that are being fetched; root: any number. */
#define SOCKETS_PER_UID 256u
/* Less than a message counts against the buffer of the socket that it was sent from. */
#define MESSAGE_MEMORY 512u

struct fetch {
	struct request *r; /* NULL: given up */
	uint32_t tid, uid;
	int number;
};

struct user {
	uint32_t uid;
	unsigned sockets;
	struct user *next;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct user *users; /* with sockets */

/* ---- how many --------------------------------------------------------------------------------- */

/* -EAGAIN, -ENOMEM. */
static int count_socket(uint32_t uid)
{
	struct user *user;
	int err = 0;

	if (!uid)
		return 0;
	pthread_mutex_lock(&mutex);
	for (user = users; user && user->uid != uid; user = user->next)
		;
	if (!user && (user = calloc(1, sizeof(*user)))) {
		user->uid = uid;
		user->next = users;
		users = user;
	}
	if (!user)
		err = -ENOMEM;
	else if (user->sockets == SOCKETS_PER_UID)
		err = -EAGAIN;
	else
		user->sockets++;
	pthread_mutex_unlock(&mutex);
	return err;
}

static void one_less(uint32_t uid)
{
	struct user **at = &users, *user = NULL;

	if (!uid)
		return;
	pthread_mutex_lock(&mutex);
	while (*at && (*at)->uid != uid)
		at = &(*at)->next;
	xassert(*at && (*at)->sockets);
	if (!--(*at)->sockets) {
		user = *at;
		*at = user->next;
	}
	pthread_mutex_unlock(&mutex);
	free(user);
}

void event_socket_close(struct event_socket s)
{
	if (s.fd < 0)
		return;
	close(s.fd);
	one_less(s.uid);
}

/* ---- fetching, in a thread of its own --------------------------------------------------------- */

/* The table of a process is that of its first thread where the kernel cannot name another. */
static int open_caller(uint32_t tid)
{
	int pidfd = (int)syscall(SYS_pidfd_open, tid, PIDFD_THREAD);

	if (pidfd < 0 && errno == EINVAL)
		pidfd = (int)syscall(SYS_pidfd_open, call_process(tid), 0);
	return pidfd < 0 ? -errno : pidfd;
}

static int error_of_fetching(int err)
{
	switch (err) {
	case -EBADF: return -EBADF;
	case -EMFILE:
	case -ENFILE:
	case -ENOMEM:
		log_msg(LOG_WARN, "no event socket for a process: %s", strerror(-err));
		return -EAGAIN;
	default: return -EOPNOTSUPP; /* EPERM, ENOSYS, ESRCH */
	}
}

/* A descriptor of ours, of anything, or a negative errno. */
static int get(const struct fetch *f)
{
	int pidfd, fd, err;

	if (!f->tid)
		return -EOPNOTSUPP;
	pidfd = open_caller(f->tid);
	if (pidfd < 0)
		return error_of_fetching(pidfd);
	fd = (int)syscall(SYS_pidfd_getfd, pidfd, f->number, 0);
	err = fd < 0 ? error_of_fetching(-errno) : 0;
	close(pidfd);
	return err ? err : fd;
}

static unsigned number_in(const char *path)
{
	char text[32];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	text[MAX(n, 0)] = 0;
	return (unsigned)MIN(strtoul(text, NULL, 10), 1ul << 30);
}

/* The end of what is there looks like an empty message. So as many are taken as there may be. */
static void drain(int fd)
{
	unsigned buffer = MAX(number_in("/proc/sys/net/core/wmem_max"),
			      number_in("/proc/sys/net/core/wmem_default"));
	unsigned most = buffer / MESSAGE_MEMORY * 2 + 16; /* the kernel doubles what is asked for */
	struct mmsghdr messages[64];

	for (unsigned n = 0; n < most;) {
		int got;

		memset(messages, 0, sizeof(messages));
		got = recvmmsg(fd, messages, ARRAY_LEN(messages), MSG_DONTWAIT, NULL);
		n += (unsigned)MAX(got, 1); /* an error of the other end comes once, before messages */
	}
}

/* 0: it is harmless now. */
static int examine(int fd)
{
	int domain, type;
	socklen_t len = sizeof(int);
	struct sockaddr_un peer;

	if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) < 0 ||
	    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) < 0)
		return -errno;
	if (domain != AF_UNIX || type != SOCK_SEQPACKET)
		return -EINVAL;
	len = sizeof(peer);
	if (getpeername(fd, (struct sockaddr *)&peer, &len) < 0 || shutdown(fd, SHUT_RD) < 0)
		return -errno;
	drain(fd);
	return 0;
}

/* false: nobody waits for it any more. */
static bool hand_over(struct fetch *f, int fetched)
{
	struct request *r;

	pthread_mutex_lock(&mutex);
	r = f->r;
	if (r) {
		r->fetch = NULL;
		r->fetched = fetched;
		ioctx_wake(&r->op);
	}
	pthread_mutex_unlock(&mutex);
	return r != NULL;
}

static void *fetch(void *arg)
{
	struct fetch *f = arg;
	int fd = get(f), err = fd < 0 ? fd : examine(fd);

	if (!hand_over(f, err ? err : fd) || err) {
		if (fd >= 0)
			close(fd);
		one_less(f->uid);
	}
	free(f);
	return NULL;
}

static int start_fetch(struct fetch *f)
{
	pthread_attr_t detached;
	pthread_t thread;
	int err;

	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	err = -pthread_create(&thread, &detached, fetch, f);
	pthread_attr_destroy(&detached);
	return err;
}

/* ---- the call --------------------------------------------------------------------------------- */

static void set_socket(struct request *r, struct event_socket s)
{
	struct open_events *ev = open_events_get(r->t->b, call_open_file(r));
	struct extfs_ioc_event_socket *out;

	if (!ev) {
		event_socket_close(s);
		request_fail(r, -ENOMEM);
		return;
	}
	open_events_set_socket(ev, s);
	out = call_room(r, sizeof(*out));
	memcpy(out, (const struct fuse_ioctl_in *)r->arg + 1, sizeof(*out));
	call_reply(r, sizeof(*out));
}

void event_socket_finish(struct request *r)
{
	if (r->fetched < 0)
		request_fail(r, r->fetched);
	else
		set_socket(r, (struct event_socket){r->fetched, r->head.uid});
}

bool event_socket_cancel(struct request *r)
{
	bool found;

	pthread_mutex_lock(&mutex);
	found = r->fetch != NULL;
	if (found)
		r->fetch->r = NULL;
	r->fetch = NULL;
	pthread_mutex_unlock(&mutex);
	return found;
}

static void begin_fetch(struct request *r, int number)
{
	struct fetch *f = malloc(sizeof(*f));
	int err = f ? count_socket(r->head.uid) : -ENOMEM;

	if (err) {
		free(f);
		request_fail(r, err);
		return;
	}
	*f = (struct fetch){.r = r, .tid = r->head.pid, .uid = r->head.uid, .number = number};
	r->fetch = f;
	if (!request_park(r, WAIT_SOCKET)) {
		err = -EINTR; /* or another; it has its answer */
	} else if (start_fetch(f)) {
		err = -EAGAIN;
		request_unpark(r);
		request_fail(r, err);
	}
	if (err) {
		one_less(f->uid);
		free(f);
	}
}

void call_event_socket(struct request *r, const void *arg)
{
	const struct extfs_ioc_event_socket *call = arg;

	if (!request_on_control(r) && !inode_is_reg(call_open_file(r)->in))
		request_fail(r, -EISDIR);
	else if (call->fd == -1)
		set_socket(r, NO_EVENT_SOCKET);
	else if (call->fd < 0)
		request_fail(r, -EBADF);
	else
		begin_fetch(r, call->fd);
}
