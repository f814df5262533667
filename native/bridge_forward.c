/* SPDX-License-Identifier: MIT
 *
 * bridge_forward.c - the requests that pyfuse3 serves: out over a socket pair as they are, and
 * their answers back to the kernel.
 *
 * SOCK_SEQPACKET keeps messages whole, so libfuse reads its end as it would read /dev/fuse. What is
 * sent is remembered by `unique` (struct sent): the answer goes to the descriptor that the request
 * came from, or, if it is an entry of a ring, to that, in its thread, where it is parked.
 *
 * INIT is answered here, because pyfuse3 cannot ask for what the bridge wants, and a mount is not to
 * wait for it; libfuse sees it too, and its answer is dropped.
 *
 * A full socket means that answers are due, so what did not fit (the backlog) is sent when the next
 * answer has come. Forwarded requests are short and never wait, so a FUSE_INTERRUPT of one is not
 * passed on.
 *
 * Concurrency: any thread sends, thread 0 receives; the mutex covers the table and the backlog, and
 * is a leaf.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "bridge_uring.h"
#include "log.h"

#define SENT_BUCKETS 64u
#define ANSWER_MAX (BRIDGE_MAX_IO + sizeof(struct fuse_out_header)) /* a READ of the status */
#define SOCKET_BYTES (4 << 20)
#define READ_AHEAD_BYTES (1u << 20)
/* Asynchronous direct I/O and read-ahead count as background; the default of 12 would be the depth
 * limit. */
#define MAX_BACKGROUND 64u

/* What pyfuse3 (libfuse 3.14) is shown of the kernel's abilities: what it insists on, and the
 * version it knows. What is in force is init_flags(); messages of features that libfuse does not
 * know must not reach it, so their opcodes are served here. */
#define SHOWN_MINOR 38u
#define SHOWN_FLAGS (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_DO_READDIRPLUS | FUSE_MAX_PAGES)

struct sent {
	uint64_t unique;
	int fd;            /* -1: nobody wants the answer */
	struct request *r; /* parked; NULL: the answer goes to fd */
	struct sent *next;
};

struct forwarded {
	size_t len;
	struct fuse_out_header head; /* and what follows */
};

struct backlog {
	struct backlog *next;
	size_t len;
	uint8_t message[];
};

struct forward {
	int fd, peer;
	bool peer_given; /* closing it is somebody else's business */
	pthread_mutex_t mutex;
	struct sent *sent[SENT_BUCKETS];
	struct backlog *head, **tail;
	bool closed; /* pyfuse3 has gone: everything is answered EIO */
	uint64_t count;
	uint8_t answer[ANSWER_MAX];
};

int forward_create(struct bridge *b)
{
	struct forward *f = calloc(1, sizeof(*f));
	int pair[2], size = SOCKET_BYTES;

	if (!f)
		return -ENOMEM;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
		int err = -errno;

		free(f);
		return err;
	}
	for (unsigned i = 0; i < 2; i++)
		if (setsockopt(pair[i], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0)
			setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	f->fd = pair[0];
	f->peer = pair[1];
	f->tail = &f->head;
	pthread_mutex_init(&f->mutex, NULL);
	b->forward = f;
	return 0;
}

static void drop_backlog(struct forward *f)
{
	while (f->head) {
		struct backlog *next = f->head->next;

		free(f->head);
		f->head = next;
	}
	f->tail = &f->head;
}

void forward_destroy(struct bridge *b)
{
	struct forward *f = b->forward;

	if (!f)
		return;
	drop_backlog(f);
	for (unsigned i = 0; i < SENT_BUCKETS; i++) {
		while (f->sent[i]) {
			struct sent *next = f->sent[i]->next;

			free(f->sent[i]);
			f->sent[i] = next;
		}
	}
	close(f->fd);
	if (!f->peer_given)
		close(f->peer);
	pthread_mutex_destroy(&f->mutex);
	free(f);
	b->forward = NULL;
}

int forward_peer_fd(struct bridge *b)
{
	b->forward->peer_given = true;
	return b->forward->peer;
}

int forward_fd(struct bridge *b)
{
	return b->forward->fd;
}

uint64_t forward_count(struct bridge *b)
{
	uint64_t count;

	pthread_mutex_lock(&b->forward->mutex);
	count = b->forward->count;
	pthread_mutex_unlock(&b->forward->mutex);
	return count;
}

/* ---- the table of what was sent; mutex held ---- */

static struct sent **bucket(struct forward *f, uint64_t unique)
{
	return &f->sent[(unique >> 1) % SENT_BUCKETS];
}

static struct sent *take_sent(struct forward *f, uint64_t unique)
{
	for (struct sent **at = bucket(f, unique); *at; at = &(*at)->next) {
		struct sent *s = *at;

		if (s->unique == unique) {
			*at = s->next;
			return s;
		}
	}
	return NULL;
}

/* ---- sending ---- */

/* 0, or a negative errno; -EAGAIN: no room now. */
static int push(struct forward *f, const void *message, size_t len)
{
	ssize_t n = send(f->fd, message, len, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (n < 0)
		return errno == EWOULDBLOCK || errno == ENOBUFS ? -EAGAIN : -errno;
	return 0;
}

static int push_or_queue(struct forward *f, const void *message, size_t len)
{
	int err = f->head ? -EAGAIN : push(f, message, len);
	struct backlog *later;

	if (err != -EAGAIN)
		return err;
	later = malloc(sizeof(*later) + len);
	if (!later)
		return -ENOMEM;
	later->next = NULL;
	later->len = len;
	memcpy(later->message, message, len);
	*f->tail = later;
	f->tail = &later->next;
	return 0;
}

static void push_backlog(struct forward *f)
{
	while (f->head) {
		struct backlog *first = f->head;
		int err = push(f, first->message, first->len);

		if (err == -EAGAIN)
			return;
		/* Any other failure means that the peer is gone, which the receiver sees too. */
		f->head = first->next;
		if (!f->head)
			f->tail = &f->head;
		free(first);
	}
}

static void show_less(struct fuse_init_in *in)
{
	in->minor = MIN(in->minor, SHOWN_MINOR);
	in->flags &= SHOWN_FLAGS;
	in->flags2 = 0;
}

/* 0: it is on its way, perhaps answered already. fd -1: the answer is dropped. */
static int send_message(struct request *r, const void *message, size_t len, int fd)
{
	struct forward *f = r->t->b->forward;
	struct sent *s = calloc(1, sizeof(*s));
	int err;

	if (!s)
		return -ENOMEM;
	*s = (struct sent){.unique = r->head.unique, .fd = fd, .r = fd < 0 || !r->queue ? NULL : r};
	pthread_mutex_lock(&f->mutex);
	f->count++;
	s->next = *bucket(f, s->unique);
	*bucket(f, s->unique) = s;
	err = f->closed ? -EIO : push_or_queue(f, message, len);
	if (err)
		take_sent(f, s->unique);
	pthread_mutex_unlock(&f->mutex);
	if (err)
		free(s);
	return err ? -EIO : 0;
}

static void serve_init(struct request *r);

void forward_send(struct request *r)
{
	bool stays = r->queue;
	int err;

	if (r->head.opcode == FUSE_INIT) {
		serve_init(r);
		return;
	}
	/* Parked first: the answer may be here at once. */
	if (stays) {
		r->forwarded = NULL;
		if (!request_park(r, WAIT_FORWARD))
			return;
	}
	err = send_message(r, r->in, sizeof(*r->in) + r->arg_len, r->t->fd);
	if (!err && !stays) {
		request_end(r); /* who answers it needs nothing of it */
		return;
	}
	if (err && stays)
		request_unpark(r);
	if (err)
		request_fail(r, err);
}

bool forward_cancel(struct request *r)
{
	struct forward *f = r->t->b->forward;
	bool found = false;

	pthread_mutex_lock(&f->mutex);
	for (struct sent *s = *bucket(f, r->head.unique); s && !found; s = s->next) {
		found = s->r == r;
		if (found) {
			s->r = NULL;
			s->fd = -1;
		}
	}
	pthread_mutex_unlock(&f->mutex);
	return found;
}

void forward_finish(struct request *r)
{
	struct forwarded *answer = r->forwarded;

	r->forwarded = NULL;
	if (!answer) {
		request_fail(r, -EIO);
		return;
	}
	request_answer_raw(r, answer->head.error, &answer->head + 1, answer->len - sizeof(answer->head));
	free(answer);
}

/* ---- the answer to INIT ---- */

#define COUNTED_ON (FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT | FUSE_POSIX_ACL)

static uint64_t init_flags(const struct bridge *b, uint64_t offered)
{
	uint64_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES;

	wanted |= FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS | FUSE_POSIX_ACL | FUSE_DONT_MASK;
	wanted |= FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT | FUSE_INIT_EXT;
	wanted |= FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_PARALLEL_DIROPS;
	/* Only this mount changes files, or notifies: nothing is to be dropped on suspicion. */
	wanted |= FUSE_EXPLICIT_INVAL_DATA | FUSE_CACHE_SYMLINKS;
	wanted |= FUSE_EXPORT_SUPPORT | FUSE_HAS_IOCTL_DIR;

	if (b->want_uring)
		wanted |= FUSE_OVER_IO_URING;
	if (b->writeback_cache)
		wanted |= FUSE_WRITEBACK_CACHE;
	return wanted & offered;
}

static struct fuse_init_out answer_init(struct bridge *b, const struct fuse_init_in *in)
{
	uint64_t offered = in->flags, flags;

	if (offered & FUSE_INIT_EXT)
		offered |= (uint64_t)in->flags2 << 32;
	flags = init_flags(b, offered);
	atomic_store(&b->negotiated, flags);
	if ((flags & COUNTED_ON) != COUNTED_ON)
		log_msg(LOG_WARN, "this kernel (FUSE 7.%u) lacks features that extfs counts on",
			in->minor);
	return (struct fuse_init_out){
		.major = FUSE_KERNEL_VERSION,
		.minor = MIN(in->minor, FUSE_ABI_MINOR),
		.max_readahead = READ_AHEAD_BYTES,
		.flags = (uint32_t)flags,
		.flags2 = (uint32_t)(flags >> 32),
		.max_background = MAX_BACKGROUND,
		.congestion_threshold = MAX_BACKGROUND * 3 / 4,
		.max_write = BRIDGE_MAX_IO,
		.max_pages = BRIDGE_MAX_IO / 4096,
		.time_gran = 1,
	};
}

static void set_bdi(const struct bridge *b, const char *name, unsigned value, const char *otherwise)
{
	char path[80], text[16];
	int fd, len;

	if (!b->dev)
		return;
	snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/%s", major(b->dev), minor(b->dev), name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	len = snprintf(text, sizeof(text), "%u", value);
	if (write(fd, text, (size_t)len) < 0)
		log_msg(LOG_NOTE, "%s: %s; %s", path, strerror(errno), otherwise);
	close(fd);
}

/* What only sysfs can change. The kernel starts with 128 KiB of read-ahead. And it lets a FUSE mount keep but a hundredth of
 * the memory dirty, because a daemon that never writes may be anybody's; who asks for the writeback cache trusts
 * this one, and it is to be held to the limits of any filesystem. */
static void tell_bdi(const struct bridge *b)
{
	set_bdi(b, "read_ahead_kb", READ_AHEAD_BYTES >> 10, "buffered reads stay slow");
	if (b->writeback_cache)
		set_bdi(b, "strict_limit", 0, "buffered writes stay slow");
}

static void serve_init(struct request *r)
{
	struct bridge *b = r->t->b;
	struct {
		struct fuse_in_header head;
		struct fuse_init_in init;
	} message = {.head = r->head};
	struct fuse_init_out out;
	size_t len = MIN(sizeof(message.init), r->arg_len);

	memcpy(&message.init, r->arg, len);
	if (message.init.major != FUSE_KERNEL_VERSION || len < offsetof(struct fuse_init_in, flags2)) {
		log_msg(LOG_ERROR, "this kernel speaks FUSE %u.%u: it is too old",
			message.init.major, message.init.minor);
		request_fail(r, -EPROTO);
		uring_negotiated(b, false);
		return;
	}
	out = answer_init(b, &message.init);
	show_less(&message.init);
	message.head.len = (uint32_t)(sizeof(message.head) + len);
	if (send_message(r, &message, message.head.len, -1))
		log_msg(LOG_ERROR, "pyfuse3 cannot be told of the mount");
	request_reply(r, &out, sizeof(out));
	tell_bdi(b);
	uring_negotiated(b, atomic_load(&b->negotiated) & FUSE_OVER_IO_URING);
}

/* ---- receiving ---- */

/* s is out of the table: the parked request is ours to wake. */
static void pass_to_ring(const struct sent *s, const struct fuse_out_header *head, size_t len)
{
	struct forwarded *answer = head ? malloc(offsetof(struct forwarded, head) + len) : NULL;

	if (answer) {
		answer->len = len;
		memcpy(&answer->head, head, len);
	}
	s->r->forwarded = answer; /* NULL: EIO */
	ioctx_wake(&s->r->op);
}

static void pass_on(const struct sent *s, const struct fuse_out_header *head, size_t len)
{
	if (s->r)
		pass_to_ring(s, head, len);
	else if (s->fd >= 0 && write(s->fd, head, len) < 0 && !bridge_nobody_waits(errno))
		log_msg(LOG_WARN, "the kernel refused a forwarded answer: %s", strerror(errno));
}

/* pyfuse3 is gone: whoever still waits for it gets an error. Returns what is to be freed. */
static struct sent *answer_all(struct forward *f)
{
	struct sent *all = NULL;

	for (unsigned i = 0; i < SENT_BUCKETS; i++) {
		while (f->sent[i]) {
			struct sent *s = f->sent[i];
			struct fuse_out_header head = {
				.len = sizeof(head),
				.error = -EIO,
				.unique = s->unique,
			};

			f->sent[i] = s->next;
			if (s->r)
				pass_to_ring(s, NULL, 0);
			else if (s->fd >= 0 && write(s->fd, &head, sizeof(head)) < 0)
				errno = 0; /* gone in the kernel too */
			s->next = all;
			all = s;
		}
	}
	return all;
}

static void peer_closed(struct bridge *b)
{
	struct forward *f = b->forward;
	struct sent *all, *next;

	pthread_mutex_lock(&f->mutex);
	f->closed = true;
	drop_backlog(f);
	all = answer_all(f);
	pthread_mutex_unlock(&f->mutex);
	for (; all; all = next) {
		next = all->next;
		free(all);
	}
	if (!atomic_load(&b->unmounted) && !b->threads[0].gone)
		log_msg(LOG_ERROR, "pyfuse3 stopped before the unmount: requests fail with EIO");
}

bool forward_receive(struct bridge *b)
{
	struct forward *f = b->forward;
	struct fuse_out_header *head = (void *)f->answer;

	for (;;) {
		ssize_t n = recv(f->fd, f->answer, sizeof(f->answer), MSG_DONTWAIT | MSG_TRUNC);
		struct sent *s;

		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return true;
		if (n <= 0) {
			peer_closed(b);
			return false;
		}
		if ((size_t)n < sizeof(*head) || (size_t)n > sizeof(f->answer) ||
		    head->len != (size_t)n) {
			log_msg(LOG_ERROR, "pyfuse3 sent a malformed answer of %zd bytes", n);
			continue;
		}
		if (head->unique == 0) {
			bridge_notify_raw(b, head, (size_t)n);
			continue;
		}
		pthread_mutex_lock(&f->mutex);
		s = take_sent(f, head->unique);
		push_backlog(f);
		pthread_mutex_unlock(&f->mutex);
		if (!s) {
			log_msg(LOG_ERROR, "pyfuse3 answered a request that it was not sent");
			continue;
		}
		pass_on(s, head, (size_t)n);
		free(s);
	}
}
