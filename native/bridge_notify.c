/* SPDX-License-Identifier: MIT
 *
 * bridge_notify.c - telling the kernel that a file or a name changed behind its back.
 *
 * The write of an invalidation returns only after the kernel has dropped its pages, which may take
 * locks that are held until we have answered some other request, and may write dirty pages of a
 * mapping first, as WRITE requests to us. So a thread that serves nothing writes them, one after
 * the other, in the order in which they were asked for.
 */
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bridge.h"
#include "log.h"

struct notification {
	struct notification *next;
	struct op *done;
	size_t len;
	uint8_t message[]; /* fuse_out_header and what follows */
};

struct notifier {
	pthread_t thread;
	pthread_mutex_t mutex;
	pthread_cond_t wake;
	struct notification *head, **tail;
	bool stop;
	int fd;
};

static struct notification *next_notification(struct notifier *n)
{
	struct notification *first;

	pthread_mutex_lock(&n->mutex);
	while (!n->head && !n->stop)
		pthread_cond_wait(&n->wake, &n->mutex);
	first = n->head;
	if (first) {
		n->head = first->next;
		if (!n->head)
			n->tail = &n->head;
	}
	pthread_mutex_unlock(&n->mutex);
	return first;
}

static void *notify(void *arg)
{
	struct notifier *n = arg;
	struct notification *first;

	pthread_setname_np(pthread_self(), "extfs-notify");
	while ((first = next_notification(n))) {
		/* ENOENT: the kernel knows nothing of it, as good as done. */
		if (write(n->fd, first->message, first->len) < 0 && !bridge_nobody_waits(errno) &&
		    errno != ENOTDIR)
			log_msg(LOG_WARN, "the kernel refused a notification: %s", strerror(errno));
		if (first->done)
			ioctx_wake(first->done);
		free(first);
	}
	return NULL;
}

int notifier_create(struct bridge *b)
{
	struct notifier *n = calloc(1, sizeof(*n));
	int err;

	if (!n)
		return -ENOMEM;
	n->tail = &n->head;
	n->fd = b->threads[0].fd;
	pthread_mutex_init(&n->mutex, NULL);
	pthread_cond_init(&n->wake, NULL);
	err = -pthread_create(&n->thread, NULL, notify, n);
	if (err) {
		free(n);
		return err;
	}
	b->notifier = n;
	return 0;
}

void notifier_destroy(struct bridge *b)
{
	struct notifier *n = b->notifier;

	if (!n)
		return;
	pthread_mutex_lock(&n->mutex);
	n->stop = true;
	pthread_cond_signal(&n->wake);
	pthread_mutex_unlock(&n->mutex);
	pthread_join(n->thread, NULL);
	xassert(!n->head);
	pthread_cond_destroy(&n->wake);
	pthread_mutex_destroy(&n->mutex);
	free(n);
	b->notifier = NULL;
}

static struct notification *make(const struct iovec *parts, unsigned n_parts, struct op *done)
{
	struct notification *new;
	size_t len = 0, at = 0;

	for (unsigned i = 0; i < n_parts; i++)
		len += parts[i].iov_len;
	new = malloc(sizeof(*new) + len);
	if (!new)
		return NULL;
	new->next = NULL;
	new->done = done;
	new->len = len;
	for (unsigned i = 0; i < n_parts; i++) {
		memcpy(new->message + at, parts[i].iov_base, parts[i].iov_len);
		at += parts[i].iov_len;
	}
	return new;
}

void notification_send(struct bridge *b, struct notification *new)
{
	struct notifier *n = b->notifier;

	pthread_mutex_lock(&n->mutex);
	*n->tail = new;
	n->tail = &new->next;
	pthread_cond_signal(&n->wake);
	pthread_mutex_unlock(&n->mutex);
}

void notification_free(struct notification *n)
{
	free(n);
}

static int enqueue(struct bridge *b, const struct iovec *parts, unsigned n_parts, struct op *done)
{
	struct notification *new = make(parts, n_parts, done);

	if (!new)
		return -ENOMEM;
	notification_send(b, new);
	return 0;
}

/* The error field of a notification is its code, and unique is 0. */
static struct fuse_out_header notify_head(int code, size_t len)
{
	return (struct fuse_out_header){
		.len = (uint32_t)(sizeof(struct fuse_out_header) + len),
		.error = code,
	};
}

int bridge_notify_inode(struct bridge *b, inum_t ino, int64_t offset, int64_t len, struct op *done)
{
	struct fuse_notify_inval_inode_out out = {.ino = ino, .off = offset, .len = len};
	struct fuse_out_header head = notify_head(FUSE_NOTIFY_INVAL_INODE, sizeof(out));
	struct iovec parts[] = {{&head, sizeof(head)}, {&out, sizeof(out)}};

	return enqueue(b, parts, ARRAY_LEN(parts), done);
}

int bridge_notify_entry(struct bridge *b, inum_t dir, const char *name, size_t len, struct op *done)
{
	struct fuse_notify_inval_entry_out out = {.parent = dir, .namelen = (uint32_t)len};
	struct fuse_out_header head = notify_head(FUSE_NOTIFY_INVAL_ENTRY, sizeof(out) + len + 1);
	struct iovec parts[] = {
		{&head, sizeof(head)},
		{&out, sizeof(out)},
		{(void *)(uintptr_t)name, len},
		{(void *)"", 1},
	};

	return enqueue(b, parts, ARRAY_LEN(parts), done);
}

struct notification *notification_of_poll(uint64_t kh)
{
	struct fuse_notify_poll_wakeup_out out = {.kh = kh};
	struct fuse_out_header head = notify_head(FUSE_NOTIFY_POLL, sizeof(out));
	struct iovec parts[] = {{&head, sizeof(head)}, {&out, sizeof(out)}};

	return make(parts, ARRAY_LEN(parts), NULL);
}

int bridge_notify_raw(struct bridge *b, const void *message, size_t len)
{
	struct iovec part = {(void *)(uintptr_t)message, len};

	return enqueue(b, &part, 1, NULL);
}
