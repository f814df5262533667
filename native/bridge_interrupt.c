/* SPDX-License-Identifier: MIT
 *
 * bridge_interrupt.c - FUSE_INTERRUPT: finding the request that it names.
 *
 * Every request that may park is registered, by `unique`, in the pending table of its thread. The
 * interrupt is read by any thread. It can overtake its request: the kernel sends it as soon as the
 * request was copied out, which may be before the request's thread has registered it. So an
 * interrupt whose request is not found is remembered for a second (`early`), and registering looks
 * there. Either order is safe: the reader of the interrupt first remembers, then looks; the request
 * first registers, then looks.
 *
 * A request that is not parked when its interrupt comes goes on, and answers EINTR where it would
 * park the next time. The kernel sends an interrupt for the first signal only, of whatever kind;
 * whether the caller is being killed is told by its pending signals.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bridge.h"

#define EARLY_MS 1000

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static unsigned bucket_of(uint64_t unique)
{
	return (unsigned)(unique >> 1) % BRIDGE_PENDING_BUCKETS; /* bit 0 marks interrupts */
}

/* One of the masks of /proc/TID/status. */
static uint64_t signals_in(const char *text, const char *field)
{
	const char *at = strstr(text, field);

	return at ? strtoull(at + strlen(field), NULL, 16) : 0;
}

/* False: there is no such thread, or it is of a namespace that is not ours to see. */
static bool read_status(uint32_t tid, char text[4096])
{
	char path[40];
	ssize_t n;
	int fd;

	if (!tid)
		return false;
	snprintf(path, sizeof(path), "/proc/%u/status", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = read(fd, text, 4095);
	close(fd);
	text[MAX(n, 0)] = 0;
	return true;
}

/* Signals of the thread, and of its process. */
static uint64_t pending_signals(const char *text)
{
	return signals_in(text, "\nSigPnd:") | signals_in(text, "\nShdPnd:");
}

/* Any deadly signal becomes a pending SIGKILL, which stays so until we have answered. */
bool interrupt_is_fatal(uint32_t tid)
{
	char text[4096];

	return read_status(tid, text) && (pending_signals(text) >> (SIGKILL - 1) & 1);
}

bool interrupt_is_due(uint32_t tid)
{
	char text[4096];

	return read_status(tid, text) && (pending_signals(text) & ~signals_in(text, "\nSigBlk:"));
}

/* ---- interrupts that came first; early_mutex held ---- */

static void early_clear(struct bridge *b, struct early_interrupt *e)
{
	e->unique = 0;
	atomic_fetch_sub(&b->n_early, 1);
}

static void early_expire(struct bridge *b, int64_t now)
{
	for (unsigned i = 0; i < BRIDGE_EARLY; i++)
		if (b->early[i].unique && now - b->early[i].at_ms > EARLY_MS)
			early_clear(b, &b->early[i]);
}

static void early_remember(struct bridge *b, uint64_t unique)
{
	struct early_interrupt *place = &b->early[0];
	int64_t now = now_ms();

	pthread_mutex_lock(&b->early_mutex);
	early_expire(b, now);
	for (unsigned i = 0; i < BRIDGE_EARLY && place->unique; i++)
		if (!b->early[i].unique || b->early[i].at_ms < place->at_ms)
			place = &b->early[i];
	if (!place->unique)
		atomic_fetch_add(&b->n_early, 1);
	*place = (struct early_interrupt){unique, now};
	pthread_mutex_unlock(&b->early_mutex);
}

/* true: it was there; it no longer is. */
static bool early_take(struct bridge *b, uint64_t unique)
{
	bool found = false;

	pthread_mutex_lock(&b->early_mutex);
	for (unsigned i = 0; i < BRIDGE_EARLY && !found; i++) {
		found = b->early[i].unique == unique;
		if (found)
			early_clear(b, &b->early[i]);
	}
	if (!found)
		early_expire(b, now_ms());
	pthread_mutex_unlock(&b->early_mutex);
	return found;
}

/* ---- the pending table ---- */

void pending_add(struct request *r)
{
	struct bridge_thread *t = r->t;
	unsigned at = bucket_of(r->head.unique);

	xassert(!r->registered);
	pthread_mutex_lock(&t->pending_mutex);
	r->pending_next = t->pending[at];
	t->pending[at] = r;
	r->registered = true;
	pthread_mutex_unlock(&t->pending_mutex);
	if (unlikely(atomic_load(&t->b->n_early)) && early_take(t->b, r->head.unique))
		r->interrupted = true;
}

void pending_del(struct request *r)
{
	struct bridge_thread *t = r->t;
	struct request **at = &t->pending[bucket_of(r->head.unique)];

	pthread_mutex_lock(&t->pending_mutex);
	while (*at != r) {
		xassert(*at);
		at = &(*at)->pending_next;
	}
	*at = r->pending_next;
	r->registered = false;
	pthread_mutex_unlock(&t->pending_mutex);
}

static bool wake_pending(struct bridge_thread *t, uint64_t unique)
{
	struct request *r;

	pthread_mutex_lock(&t->pending_mutex);
	for (r = t->pending[bucket_of(unique)]; r && r->head.unique != unique; r = r->pending_next)
		;
	if (r && !r->interrupt_queued) {
		r->interrupt_queued = true;
		ioctx_wake(&r->interrupt);
	}
	pthread_mutex_unlock(&t->pending_mutex);
	return r != NULL;
}

void bridge_interrupt(struct bridge *b, uint64_t unique)
{
	bool found = false;

	early_remember(b, unique);
	for (unsigned i = 0; i < b->n_threads && !found; i++)
		found = wake_pending(&b->threads[i], unique);
	if (found)
		early_take(b, unique);
}

void serve_interrupt(struct request *r)
{
	const struct fuse_interrupt_in *in = r->arg;

	bridge_interrupt(r->t->b, in->unique);
	request_end(r); /* interrupts are answered only to say EAGAIN or ENOSYS */
}
