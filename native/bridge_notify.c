/* SPDX-License-Identifier: MIT
 *
 * bridge_notify.c - telling the kernel that a file or a name changed behind its back.
 *
 * The write of an invalidation returns only after the kernel has dropped its pages, which may take
 * locks that are held until we have answered some other request, and may write dirty pages of a
 * mapping first, as WRITE requests to us. So threads that serve nothing write them. They begin in the
 * order in which they were asked for; one that the kernel keeps, because it waits for a page of a
 * request that waits for somebody, keeps only its own thread.
 *
 * Invariants.
 *  1. While a notification is being written, another thread is idle or on its way to be, unless none
 *     could be started: it takes the next notification, and serves those whose patience ends.
 *  2. The last of NOTIFIERS threads takes nothing as long as all others write.
 *  3. A `waiting` is freed with its last notification; its op is woken once, before, when the time is
 *     over, or then.
 */
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "bridge.h"
#include "log.h"

#define NOTIFIERS 16u

/* Somebody waits for some notifications. */
struct waiting {
	struct op *done;    /* NULL: it was woken */
	int *result;        /* may be NULL; not to be touched after the wake */
	unsigned left;      /* not written yet */
	uint64_t deadline;  /* ns, monotonic; UINT64_MAX: none */
	struct waiting *next; /* of those with a deadline, as long as done is set */
};

struct notification {
	struct notification *next;
	struct waiting *waiting; /* may be NULL */
	size_t len;
	uint8_t message[]; /* fuse_out_header and what follows */
};

struct notifier {
	pthread_mutex_t mutex;
	pthread_cond_t wake;
	pthread_t threads[NOTIFIERS];
	unsigned n_threads, idle;
	struct notification *head, **tail;
	struct waiting *impatient;
	bool stop;
	int fd;
};

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- those who wait; mutex held --------------------------------------------------------------- */

static void wake(struct waiting *w, int result)
{
	struct op *done = w->done;

	w->done = NULL;
	if (w->result)
		*w->result = result;
	if (done)
		ioctx_wake(done);
}

/* Wakes whose time is over. The next deadline; UINT64_MAX: none. */
static uint64_t serve_impatient(struct notifier *n)
{
	uint64_t now = n->impatient ? now_ns() : 0, next = UINT64_MAX;
	struct waiting **at = &n->impatient, *w;

	while ((w = *at)) {
		if (w->deadline > now) {
			next = MIN(next, w->deadline);
			at = &w->next;
			continue;
		}
		*at = w->next;
		wake(w, -ETIMEDOUT);
		w->result = NULL;
	}
	return next;
}

static void one_less(struct notifier *n, struct waiting *w)
{
	struct waiting **at = &n->impatient;

	if (!w || --w->left)
		return;
	while (*at && *at != w)
		at = &(*at)->next;
	if (*at)
		*at = w->next;
	wake(w, 0);
	free(w);
}

/* ---- threads ---------------------------------------------------------------------------------- */

static void *notify(void *arg);

/* mutex held. */
static int start_notifier(struct notifier *n)
{
	int err = -pthread_create(&n->threads[n->n_threads], NULL, notify, n);

	if (!err)
		n->n_threads++;
	return err;
}

/* mutex held. */
static void rest(struct notifier *n)
{
	uint64_t until = serve_impatient(n);
	struct timespec at = {.tv_sec = (time_t)(until / 1000000000u),
			      .tv_nsec = (long)(until % 1000000000u)};

	n->idle++;
	if (until == UINT64_MAX)
		pthread_cond_wait(&n->wake, &n->mutex);
	else
		pthread_cond_timedwait(&n->wake, &n->mutex, &at);
	n->idle--;
	serve_impatient(n);
}

/* mutex held. NULL: it is over. */
static struct notification *take(struct notifier *n)
{
	struct notification *first;

	while (!n->head || (!n->idle && n->n_threads == NOTIFIERS)) {
		if (n->stop && !n->head)
			return NULL;
		rest(n);
	}
	first = n->head;
	n->head = first->next;
	if (!n->head)
		n->tail = &n->head;
	if (!n->idle && !n->stop && start_notifier(n))
		log_msg(LOG_WARN, "no thread to notify the kernel while another one waits for it");
	return first;
}

static void *notify(void *arg)
{
	struct notifier *n = arg;
	struct notification *first;

	pthread_setname_np(pthread_self(), "extfs-notify");
	pthread_mutex_lock(&n->mutex);
	while ((first = take(n))) {
		pthread_mutex_unlock(&n->mutex);
		/* ENOENT: the kernel knows nothing of it, as good as done. */
		if (write(n->fd, first->message, first->len) < 0 && !bridge_nobody_waits(errno) &&
		    errno != ENOTDIR)
			log_msg(LOG_WARN, "the kernel refused a notification: %s", strerror(errno));
		pthread_mutex_lock(&n->mutex);
		one_less(n, first->waiting);
		free(first);
	}
	/* Whoever is left may be the one that takes nothing while all others write. */
	pthread_cond_broadcast(&n->wake);
	pthread_mutex_unlock(&n->mutex);
	return NULL;
}

int notifier_create(struct bridge *b)
{
	struct notifier *n = calloc(1, sizeof(*n));
	pthread_condattr_t monotonic;
	int err;

	if (!n)
		return -ENOMEM;
	n->tail = &n->head;
	n->fd = b->threads[0].fd;
	pthread_mutex_init(&n->mutex, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&n->wake, &monotonic);
	pthread_condattr_destroy(&monotonic);
	pthread_mutex_lock(&n->mutex);
	err = start_notifier(n);
	pthread_mutex_unlock(&n->mutex);
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
	n->stop = true; /* none is started from here on */
	pthread_cond_broadcast(&n->wake);
	pthread_mutex_unlock(&n->mutex);
	for (unsigned i = 0; i < n->n_threads; i++)
		pthread_join(n->threads[i], NULL);
	xassert(!n->head && !n->impatient);
	pthread_cond_destroy(&n->wake);
	pthread_mutex_destroy(&n->mutex);
	free(n);
	b->notifier = NULL;
}

/* ---- sending ---------------------------------------------------------------------------------- */

/* Message of several parts, and room for it to be queued. NULL: no memory. */
static struct notification *make(const struct iovec *parts, unsigned n_parts)
{
	struct notification *new;
	size_t len = 0, at = 0;

	for (unsigned i = 0; i < n_parts; i++)
		len += parts[i].iov_len;
	new = malloc(sizeof(*new) + len);
	if (!new)
		return NULL;
	new->next = NULL;
	new->waiting = NULL;
	new->len = len;
	for (unsigned i = 0; i < n_parts; i++) {
		memcpy(new->message + at, parts[i].iov_base, parts[i].iov_len);
		at += parts[i].iov_len;
	}
	return new;
}

static void free_list(struct notification *list)
{
	while (list) {
		struct notification *next = list->next;

		free(list);
		list = next;
	}
}

/* `list`, NULL-terminated; all of them are what `waiting` (may be NULL) waits for. */
static void queue(struct bridge *b, struct notification *list, struct waiting *waiting)
{
	struct notifier *n = b->notifier;

	pthread_mutex_lock(&n->mutex);
	*n->tail = list;
	for (; list; list = list->next) {
		list->waiting = waiting;
		n->tail = &list->next;
	}
	if (waiting && waiting->deadline != UINT64_MAX) {
		waiting->next = n->impatient;
		n->impatient = waiting;
	}
	if (waiting)
		pthread_cond_broadcast(&n->wake); /* one takes the first, another one knows the time */
	else
		pthread_cond_signal(&n->wake);
	pthread_mutex_unlock(&n->mutex);
}

/* n of them; wait may be NULL. 0 or -ENOMEM: the list is freed. */
static int send_list(struct bridge *b, struct notification *list, unsigned n,
		     const struct waiting *wait)
{
	struct waiting *waiting = NULL;

	if (wait) {
		waiting = malloc(sizeof(*waiting));
		if (!waiting) {
			free_list(list);
			return -ENOMEM;
		}
		*waiting = *wait;
		waiting->left = n;
	}
	queue(b, list, waiting);
	return 0;
}

static int enqueue(struct bridge *b, const struct iovec *parts, unsigned n_parts, struct op *done)
{
	struct waiting wait = {.done = done, .deadline = UINT64_MAX};
	struct notification *new = make(parts, n_parts);

	return new ? send_list(b, new, 1, done ? &wait : NULL) : -ENOMEM;
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

static struct notification *pages_of(inum_t ino, struct page_range range)
{
	struct fuse_notify_inval_inode_out out = {.ino = ino};
	struct fuse_out_header head = notify_head(FUSE_NOTIFY_INVAL_INODE, sizeof(out));
	struct iovec parts[] = {{&head, sizeof(head)}, {&out, sizeof(out)}};
	uint64_t end;

	/* The kernel's offsets are signed, and a length of 0 is to the end. */
	if (range.offset > FILE_MAX_BYTES)
		range.offset = FILE_MAX_BYTES & ~BLOCK_MASK;
	if (__builtin_add_overflow(range.offset, range.len, &end) || end > FILE_MAX_BYTES)
		range.len = 0;
	out.off = (int64_t)range.offset;
	out.len = (int64_t)range.len;
	return make(parts, ARRAY_LEN(parts));
}

int bridge_notify_pages(struct bridge *b, inum_t ino, const struct page_range *ranges, unsigned n,
			struct page_wait *wait)
{
	struct notification *list = NULL, **tail = &list;
	struct waiting waiting = {.deadline = UINT64_MAX};

	xassert(n);
	for (unsigned i = 0; i < n; i++) {
		*tail = pages_of(ino, ranges[i]);
		if (!*tail) {
			free_list(list);
			return -ENOMEM;
		}
		tail = &(*tail)->next;
	}
	if (!wait)
		return send_list(b, list, n, NULL);
	waiting.done = wait->done;
	waiting.result = &wait->result;
	if (wait->patience_ms)
		waiting.deadline = now_ns() + wait->patience_ms * UINT64_C(1000000);
	return send_list(b, list, n, &waiting);
}

int bridge_notify_raw(struct bridge *b, const void *message, size_t len)
{
	struct iovec part = {(void *)(uintptr_t)message, len};

	return enqueue(b, &part, 1, NULL);
}
