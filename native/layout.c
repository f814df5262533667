/* SPDX-License-Identifier: MIT
 *
 * layout.c - the layout module as a whole: its lifetime, its clock, its numbers.
 *
 * Opening reads who held what before (holder_disk.c, layout_ghosts.c) and lets the segments of all
 * inodes ask here before an operation waits for a grant; the thread starts when the journal and the
 * reaper run. Closing first ends all waiting (layouts_stop()), then drops the grants in memory: on
 * disk every holder stays what it was, and is LOST after the next mount.
 *
 * The clock. Times are nanoseconds of CLOCK_MONOTONIC until layouts_set_clock() is called; from
 * then on time stands still between two such calls, and all that was to come is as far away as
 * before.
 */
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "journal.h"
#include "layout_priv.h"

static void daemon_wake(void *arg)
{
	struct layouts *ls = arg;

	xassert(!eventfd_write(ls->event_fd, 1));
}

/* ---- clock ---------------------------------------------------------------------------------- */

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t layouts_now(struct fs *fs)
{
	uint64_t ns = fs->layouts ? atomic_load(&fs->layouts->virtual_ns) : 0;

	return ns ? ns : clock_ns(CLOCK_MONOTONIC);
}

void layouts_set_clock(struct fs *fs, uint64_t ns)
{
	struct layouts *ls = fs->layouts;
	uint64_t before;

	/* The thread is not at work with a time of the other clock, by which all may be due. */
	pthread_mutex_lock(&ls->awake);
	pthread_mutex_lock(&ls->mutex);
	before = layouts_now(fs);
	if (!atomic_load(&ls->virtual_ns)) {
		ns = MAX(ns, 1);
		recalls_shift(ls, before, ns);
	}
	ns = MAX(ns, atomic_load(&ls->virtual_ns)); /* never back */
	atomic_store(&ls->virtual_ns, ns);
	layouts_kick(ls);
	pthread_mutex_unlock(&ls->mutex);
	pthread_mutex_unlock(&ls->awake);
}

uint64_t layouts_next_seq(struct layouts *ls)
{
	return atomic_fetch_add(&ls->next_seq, 1);
}

/* ---- lifetime ------------------------------------------------------------------------------- */

static void free_layouts(struct layouts *ls)
{
	sink_free(ls->sink);
	if (ls->event_fd >= 0)
		close(ls->event_fd);
	if (ls->ctx)
		ioctx_destroy(ls->ctx);
	pthread_cond_destroy(&ls->settled);
	pthread_mutex_destroy(&ls->awake);
	pthread_mutex_destroy(&ls->mutex);
	free(ls);
}

static struct layouts *new_layouts(struct fs *fs)
{
	struct layouts *ls = calloc(1, sizeof(*ls));

	if (!ls)
		return NULL;
	ls->fs = fs;
	pthread_mutex_init(&ls->mutex, NULL);
	pthread_mutex_init(&ls->awake, NULL);
	pthread_cond_init(&ls->settled, NULL);
	RB_INIT(&ls->holders);
	RB_INIT(&ls->lost);
	RB_INIT(&ls->timed);
	RB_INIT(&ls->recalled);
	TAILQ_INIT(&ls->to_release);
	TAILQ_INIT(&ls->revokes);
	TAILQ_INIT(&ls->naps);
	ls->recall_ns = (uint64_t)fs->opt.recall_ms * 1000000u;
	/* A holder remembers numbers of grants over a restart: they must not come again. Grants of
	 * before are 1. */
	atomic_store(&ls->next_seq, (clock_ns(CLOCK_REALTIME) / 1000000000u) << 24);
	ls->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	ls->sink = sink_new(daemon_wake, ls);
	if (ls->event_fd < 0 || !ls->sink) {
		free_layouts(ls);
		return NULL;
	}
	return ls;
}

/* The daemon decides what to do about those that have not come back. */
static void tell_who_was_here(struct layouts *ls)
{
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	RB_FOREACH(h, holder_tree, &ls->holders)
		holder_tell_fence(ls, h);
	pthread_mutex_unlock(&ls->mutex);
}

int layouts_open(struct fs *fs)
{
	struct layouts *ls = new_layouts(fs);
	int rc;

	if (!ls)
		return -ENOMEM;
	fs->layouts = ls;
	if (fs->read_only)
		return 0;
	ls->idle_at = layouts_now(fs) + ls->recall_ns;
	fs->seg_hooks = &layout_hooks;
	rc = holders_load(fs);
	if (!rc && !RB_EMPTY(&ls->holders))
		rc = exposures_load(fs);
	if (rc)
		return rc;
	tell_who_was_here(ls);
	return 0;
}

void layouts_destroy(struct fs *fs)
{
	struct layouts *ls = fs->layouts;

	if (!ls)
		return;
	xassert(!ls->running);
	holders_destroy(ls);
	recalls_destroy(ls);
	lost_destroy(ls);
	fs->seg_hooks = NULL;
	fs->layouts = NULL;
	free_layouts(ls);
}

struct event_sink *layouts_sink(struct fs *fs)
{
	return fs->layouts->sink;
}

int layouts_event_fd(struct fs *fs)
{
	return fs->layouts->event_fd;
}

/* ---- numbers -------------------------------------------------------------------------------- */

struct layout_counters *layouts_counters(struct fs *fs)
{
	return &fs->layouts->counters;
}

void layouts_latency(struct fs *fs, enum latency_of of, uint64_t out[LATENCY_BUCKETS])
{
	for (unsigned i = 0; i < LATENCY_BUCKETS; i++)
		out[i] = atomic_load_explicit(&fs->layouts->latency[of][i], memory_order_relaxed);
}

/* Bucket i counts what took at least 2^i and less than 2^(i+1) microseconds; 0 also what was
 * faster, the last also what was slower. */
void layouts_note_latency(struct fs *fs, enum latency_of of, uint64_t ns)
{
	uint64_t us = ns / 1000;
	unsigned bucket = us ? 63u - (unsigned)__builtin_clzll(us) : 0;

	bucket = MIN(bucket, LATENCY_BUCKETS - 1);
	atomic_fetch_add_explicit(&fs->layouts->latency[of][bucket], 1, memory_order_relaxed);
}
