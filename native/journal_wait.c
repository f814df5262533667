/* SPDX-License-Identifier: MIT
 *
 * journal_wait.c - asking the journal for durability or for room: who waits, who is resumed, and who
 * commits in its own thread (a leader). Definitions and invariants are in journal.c.
 */
#include "journal_impl.h"

bool jrn_foreign_writes(const struct journal *j)
{
	return atomic_load(&j->foreign_noted) != atomic_load(&j->foreign_flushed);
}

void jrn_wake(struct journal *j, struct jrn_waiter **list, xid_t upto, int err)
{
	struct jrn_waiter *resume = NULL, **tail = &resume, **p = list;

	pthread_mutex_lock(&j->mutex);
	while (*p) {
		struct jrn_waiter *w = *p;

		if (w->xid > upto) {
			p = &w->next;
			continue;
		}
		*p = w->next;
		w->next = NULL;
		w->err = err;
		w->queued = false;
		/* A blocking waiter's record may be gone as soon as the mutex is free. */
		if (w->op) {
			*tail = w;
			tail = &w->next;
		}
	}
	pthread_cond_broadcast(&j->done);
	pthread_mutex_unlock(&j->mutex);
	while (resume) {
		struct jrn_waiter *w = resume;

		resume = w->next;
		ioctx_wake(w->op);
	}
}

static void enqueue(struct journal *j, struct jrn_waiter **list, struct jrn_waiter *w)
{
	while (*list)
		list = &(*list)->next;
	w->next = NULL;
	w->err = 0;
	w->queued = true;
	*list = w;
	if (j->turn == TURN_NONE)
		pthread_cond_signal(&j->work);
}

/* May who asks do it? Mutex held. */
static bool may_lead(const struct journal *j, const struct jrn_waiter *w)
{
	if (!w->lead || j->stop || atomic_load(&j->fs->dev->held) ||
	    atomic_load(&j->flush_ns) >= LEAD_FLUSH_NS)
		return false;
	if (!w->xid)
		return true; /* flushes do not get in each other's way */
	return j->turn == TURN_NONE && !j->waiters && !j->space_waiters && j->target <= j->tail &&
	       jrn_free(j) > 0 &&
	       atomic_load_explicit(&j->ndirty, memory_order_relaxed) <= LEAD_IMAGES;
}

/* The running group, in the caller's thread. Mutex held, not meanwhile. */
static int lead_commit(struct journal *j)
{
	struct dev_block_hook hook = dev_before_blocking;
	int err;

	j->turn = TURN_LEADER;
	pthread_mutex_unlock(&j->mutex);
	dev_before_blocking = (struct dev_block_hook){0}; /* too short to call others for */
	err = commit_group(j);
	dev_before_blocking = hook;
	pthread_mutex_lock(&j->mutex);
	j->turn = TURN_NONE;
	j->after_commit = true;
	j->stats.led++;
	if (jrn_thread_due(j))
		pthread_cond_signal(&j->work);
	return err ? j->err : 0;
}

/* The same of a flush alone, which takes no turn. */
static int lead_flush(struct journal *j)
{
	struct dev_block_hook hook = dev_before_blocking;
	int err;

	j->stats.led++;
	j->stats.flush_only++;
	pthread_mutex_unlock(&j->mutex);
	dev_before_blocking = (struct dev_block_hook){0};
	err = jrn_flush_device(j);
	dev_before_blocking = hook;
	if (err)
		jrn_fail(j, err, "a flush failed");
	pthread_mutex_lock(&j->mutex);
	if (err)
		pthread_cond_signal(&j->work);
	return err;
}

/* Mutex held. ERR_PARKED: queued. */
static int force_locked(struct journal *j, struct jrn_waiter *w)
{
	struct device *dev = j->fs->dev;

	xassert(w->xid <= j->running);
	if (w->xid && w->xid <= atomic_load(&j->durable))
		return 0;
	if (!w->xid && !jrn_foreign_writes(j) &&
	    atomic_load(&dev->flushed_upto) >= atomic_load(&dev->writes_done))
		return 0;
	if (j->err)
		return j->err;
	if (!j->thread_runs)
		return -ERR_SHUTDOWN;
	if (may_lead(j, w))
		return w->xid ? lead_commit(j) : lead_flush(j);
	if (w->xid) {
		j->force_xid = MAX(j->force_xid, w->xid);
		enqueue(j, &j->waiters, w);
	} else {
		enqueue(j, &j->flush_waiters, w);
	}
	return ERR_PARKED;
}

int jrn_force(struct fs *fs, struct jrn_waiter *w)
{
	struct journal *j = fs->jrn;
	int r;

	if (fs->read_only)
		return 0;
	pthread_mutex_lock(&j->mutex);
	r = force_locked(j, w);
	pthread_mutex_unlock(&j->mutex);
	return r;
}

static int wait_space_locked(struct journal *j, struct jrn_waiter *w)
{
	if (j->err)
		return j->err;
	if (!j->space_waiters &&
	    jrn_fits(j, atomic_load_explicit(&j->ndirty, memory_order_relaxed) + TRANS_MAX_BLOCKS))
		return 0;
	if (!j->thread_runs)
		return -ERR_SHUTDOWN;
	w->xid = 0;
	j->close_early = true;
	j->stats.waits_for_space++;
	enqueue(j, &j->space_waiters, w);
	return ERR_PARKED;
}

int jrn_wait_space(struct fs *fs, struct jrn_waiter *w)
{
	struct journal *j = fs->jrn;
	int r;

	pthread_mutex_lock(&j->mutex);
	r = wait_space_locked(j, w);
	pthread_mutex_unlock(&j->mutex);
	return r;
}

/* Mutex held, w queued with no op. */
static int wait_blocking(struct journal *j, struct jrn_waiter *w)
{
	while (w->queued)
		pthread_cond_wait(&j->done, &j->mutex);
	return w->err;
}

int jrn_force_blocking(struct fs *fs, xid_t xid)
{
	struct journal *j = fs->jrn;
	struct jrn_waiter w = {.xid = xid, .lead = true};
	int r;

	if (fs->read_only)
		return 0;
	pthread_mutex_lock(&j->mutex);
	r = force_locked(j, &w);
	if (r == ERR_PARKED)
		r = wait_blocking(j, &w);
	pthread_mutex_unlock(&j->mutex);
	return r;
}

int jrn_wait_space_blocking(struct fs *fs)
{
	struct journal *j = fs->jrn;
	struct jrn_waiter w = {0};
	int r;

	pthread_mutex_lock(&j->mutex);
	r = wait_space_locked(j, &w);
	if (r == ERR_PARKED)
		r = wait_blocking(j, &w);
	pthread_mutex_unlock(&j->mutex);
	return r;
}

void jrn_note_foreign_write(struct fs *fs)
{
	atomic_fetch_add(&fs->jrn->foreign_noted, 1);
}

bool jrn_cancel(struct fs *fs, struct jrn_waiter *w)
{
	struct journal *j = fs->jrn;
	struct jrn_waiter **lists[] = {&j->waiters, &j->flush_waiters, &j->space_waiters};
	bool found = false;

	pthread_mutex_lock(&j->mutex);
	for (unsigned i = 0; i < ARRAY_LEN(lists) && !found; i++) {
		struct jrn_waiter **p = lists[i];

		while (*p && *p != w)
			p = &(*p)->next;
		if (*p) {
			*p = w->next;
			w->next = NULL;
			w->queued = false;
			found = true;
		}
	}
	pthread_mutex_unlock(&j->mutex);
	return found;
}
