/* SPDX-License-Identifier: MIT
 *
 * layout_thread.c - the thread "extfs-layout": deadlines, revokes, releases of quarantines, trims.
 *
 * It has an I/O context of its own and sleeps in poll(2) until that is readable or the next
 * deadline has come; layouts_kick() makes it look at its lists again. What takes long are
 * operations on that context, which never block it.
 *
 * Invariants:
 *  1. `kick` is in the wake queue of the context exactly while kicked is set. `running` falls with
 *     the mutex held, kicked clear and nothing under way: after that nobody wakes the context.
 *  2. working counts operations from layouts_run() or layouts_working() to layouts_ran(); those of
 *     them that can go on only when time passes are in napping (naps) or in due_own (parked behind
 *     a grant whose recall runs).
 *  3. rounds follows wanted when nothing is due and working is no more than those: settled.
 */
#include <limits.h>
#include <poll.h>
#include <string.h>

#include "delegation_priv.h"
#include "journal.h"
#include "layout_priv.h"
#include "log.h"

#define THREAD_IO_DEPTH 64u
#define STANDSTILL_NS 500000000ull
#define STANDSTILL_MORE_NS 1000000000ull

static void kicked(struct op *op)
{
	struct layouts *ls = container_of(op, struct layouts, kick);

	pthread_mutex_lock(&ls->mutex);
	ls->kicked = false;
	pthread_mutex_unlock(&ls->mutex);
}

void layouts_kick(struct layouts *ls)
{
	if (!ls->running || ls->kicked)
		return;
	ls->kicked = true;
	ioctx_wake(&ls->kick);
}

/* ---- operations of the thread --------------------------------------------------------------- */

void layouts_working(struct layouts *ls)
{
	pthread_mutex_lock(&ls->mutex);
	ls->working++;
	pthread_mutex_unlock(&ls->mutex);
}

void layouts_run(struct layouts *ls, struct file_op *fop)
{
	xassert(fop->op.ctx == ls->ctx);
	layouts_working(ls);
	file_start(fop);
}

void layouts_ran(struct layouts *ls)
{
	pthread_mutex_lock(&ls->mutex);
	xassert(ls->working > 0);
	ls->working--;
	layouts_kick(ls); /* what was held back by it */
	pthread_mutex_unlock(&ls->mutex);
}

void layouts_nap(struct layouts *ls, struct nap *nap, struct op *op, uint64_t deadline)
{
	xassert(op->ctx == ls->ctx);
	nap->op = op;
	nap->deadline = deadline;
	TAILQ_INSERT_TAIL(&ls->naps, nap, link);
	pthread_mutex_lock(&ls->mutex);
	ls->napping++;
	pthread_mutex_unlock(&ls->mutex);
}

static void wake_naps(struct layouts *ls, uint64_t now)
{
	struct nap *nap, *next;

	for (nap = TAILQ_FIRST(&ls->naps); nap; nap = next) {
		next = TAILQ_NEXT(nap, link);
		if (nap->deadline > now)
			continue;
		TAILQ_REMOVE(&ls->naps, nap, link);
		pthread_mutex_lock(&ls->mutex);
		ls->napping--;
		pthread_mutex_unlock(&ls->mutex);
		ioctx_wake(nap->op);
	}
}

static uint64_t next_nap(const struct layouts *ls)
{
	uint64_t next = UINT64_MAX;
	const struct nap *nap;

	TAILQ_FOREACH(nap, &ls->naps, link)
		next = MIN(next, nap->deadline);
	return next;
}

void revoke_ended(struct layouts *ls, inum_t ino, uint64_t holder, uint64_t start, uint64_t end)
{
	struct revoking *r;

	TAILQ_FOREACH(r, &ls->revokes, link)
		if (r->ino == ino && r->holder == holder && r->start == start && r->end == end)
			break;
	xassert(r);
	TAILQ_REMOVE(&ls->revokes, r, link);
	ls->nrevokes--;
	free(r);
}

void release_ended(struct layouts *ls, uint64_t holder)
{
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, holder);
	if (h)
		holder_was_released(ls, h);
	pthread_mutex_unlock(&ls->mutex);
	wake_naps(ls, UINT64_MAX);
}

/* ---- lists ---------------------------------------------------------------------------------- */

void inode_work_add(struct layouts *ls, struct inode_work *work)
{
	work->next = ls->inode_work;
	ls->inode_work = work;
	layouts_kick(ls);
}

void layouts_want_trim(struct inode *in)
{
	struct layouts *ls = in->fs->layouts;
	struct inode_work *work = malloc(sizeof(*work));

	if (!work)
		return; /* preallocation stays until the next time */
	*work = (struct inode_work){ .in = inode_ref(in), .trim = true };
	pthread_mutex_lock(&ls->mutex);
	inode_work_add(ls, work);
	pthread_mutex_unlock(&ls->mutex);
}

void work_inodes(struct layouts *ls, bool trim)
{
	struct inode_work *work, *next;

	pthread_mutex_lock(&ls->mutex);
	work = ls->inode_work;
	ls->inode_work = NULL;
	pthread_mutex_unlock(&ls->mutex);
	for (; work; work = next) {
		next = work->next;
		if (work->trim && trim)
			trim_start(ls, work->in);
		else
			inode_put(work->in);
		free(work);
	}
}

static void work_releases(struct layouts *ls)
{
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	while ((h = TAILQ_FIRST(&ls->to_release))) {
		uint64_t id = h->id;

		TAILQ_REMOVE(&ls->to_release, h, to_release);
		h->queued = false;
		pthread_mutex_unlock(&ls->mutex);
		release_start(ls, id);
		pthread_mutex_lock(&ls->mutex);
	}
	pthread_mutex_unlock(&ls->mutex);
}

/* ---- the thread ----------------------------------------------------------------------------- */

/* Everything that is due. Returns when to look again. */
static uint64_t work(struct layouts *ls)
{
	uint64_t now = layouts_now(ls->fs), next, due;

	wake_naps(ls, now);
	holders_drop_idle(ls);
	work_releases(ls);
	work_inodes(ls, true);
	next = MIN(recalls_due(ls, now), next_nap(ls));
	due = delegations_due(ls, now);
	next = MIN(next, due);
	pthread_mutex_lock(&ls->mutex);
	if (ls->idle_at)
		next = MIN(next, ls->idle_at);
	pthread_mutex_unlock(&ls->mutex);
	return next;
}

/* Nothing is left of what was due when settling was asked for: tell those who wait. */
static void note_settled(struct layouts *ls, uint64_t wanted, uint64_t next)
{
	pthread_mutex_lock(&ls->mutex);
	if (ls->rounds < wanted && next > layouts_now(ls->fs) && !ls->inode_work &&
	    TAILQ_EMPTY(&ls->to_release) && ls->working <= ls->napping + ls->due_own) {
		ls->rounds = wanted;
		pthread_cond_broadcast(&ls->settled);
	}
	pthread_mutex_unlock(&ls->mutex);
}

/* Ends all waiting. True: nothing is under way any more, and the thread is over. */
static bool finish(struct layouts *ls)
{
	bool over;

	recalls_fail_waiters(ls);
	pthread_mutex_lock(&ls->mutex);
	delegations_drop_all(ls);
	pthread_mutex_unlock(&ls->mutex);
	wake_naps(ls, UINT64_MAX);
	work_inodes(ls, false);
	pthread_mutex_lock(&ls->mutex);
	over = !ls->working && !ls->due_head && !ls->kicked && !ls->inode_work;
	if (over) {
		ls->running = false;
		pthread_cond_broadcast(&ls->settled);
	}
	pthread_mutex_unlock(&ls->mutex);
	return over;
}

/* It slept longer than it wanted to by so much that the whole process stood still: stopped, or
 * without a processor. What holders answered meanwhile has not been read, and a fence would harm
 * them for it: they have some more time. */
static void note_standstill(struct layouts *ls, uint64_t next)
{
	uint64_t now = layouts_now(ls->fs);

	if (atomic_load(&ls->virtual_ns) || now < next || now - next < STANDSTILL_NS)
		return;
	log_msg(LOG_NOTE, "layouts: nothing ran for %llu ms: holders have %llu ms more to answer",
		(unsigned long long)((now - next) / 1000000),
		(unsigned long long)(MIN(ls->recall_ns, STANDSTILL_MORE_NS) / 1000000));
	pthread_mutex_lock(&ls->mutex);
	recalls_postpone(ls, next, now + MIN(ls->recall_ns, STANDSTILL_MORE_NS));
	pthread_mutex_unlock(&ls->mutex);
}

static void sleep_until(struct layouts *ls, uint64_t next)
{
	struct pollfd pfd = { .fd = ioctx_eventfd(ls->ctx), .events = POLLIN };
	uint64_t now = layouts_now(ls->fs);
	int ms = -1;

	if (next <= now)
		return;
	if (next != UINT64_MAX && !atomic_load(&ls->virtual_ns))
		ms = (int)MIN((next - now + 999999) / 1000000, INT_MAX);
	poll(&pfd, 1, ms);
	if (ms >= 0)
		note_standstill(ls, next);
}

static void run_ops(struct layouts *ls, int *ran)
{
	*ran = ioctx_run(ls->ctx, false);
	/* Device I/O of nobody else goes on; without it no revoke can. */
	if (*ran < 0)
		log_msg(LOG_ERROR, "layouts: I/O context: %s", err_text(*ran));
}

static void *thread_main(void *arg)
{
	struct layouts *ls = arg;
	int ran;

	pthread_setname_np(pthread_self(), "extfs-layout");
	for (;;) {
		uint64_t wanted, next = UINT64_MAX;
		bool stop;

		pthread_mutex_lock(&ls->awake);
		run_ops(ls, &ran);
		pthread_mutex_lock(&ls->mutex);
		wanted = ls->wanted;
		stop = ls->stop;
		pthread_mutex_unlock(&ls->mutex);
		if (!stop) {
			next = work(ls);
			note_settled(ls, wanted, next);
		} else if (finish(ls)) {
			pthread_mutex_unlock(&ls->awake);
			return NULL;
		}
		/* What the above submitted must be on its way before the poll. */
		run_ops(ls, &ran);
		pthread_mutex_unlock(&ls->awake);
		if (ran <= 0)
			sleep_until(ls, next);
	}
}

int layouts_start(struct fs *fs)
{
	struct layouts *ls = fs->layouts;
	int rc;

	if (fs->read_only)
		return 0;
	rc = ioctx_create(THREAD_IO_DEPTH, &ls->ctx);
	if (!rc) {
		rc = ioctx_eventfd(ls->ctx);
		rc = MIN(rc, 0);
	}
	if (rc)
		return rc;
	ls->kick = (struct op){ .resume = kicked, .ctx = ls->ctx };
	ls->running = true;
	rc = -pthread_create(&ls->thread, NULL, thread_main, ls);
	if (rc)
		ls->running = false;
	ls->joinable = !rc;
	return rc;
}

void layouts_stop(struct fs *fs)
{
	struct layouts *ls = fs->layouts;

	if (!ls || !ls->joinable)
		return;
	pthread_mutex_lock(&ls->mutex);
	ls->stop = true;
	layouts_kick(ls);
	pthread_mutex_unlock(&ls->mutex);
	pthread_join(ls->thread, NULL);
	ls->joinable = false;
}

void layouts_settle(struct fs *fs)
{
	struct layouts *ls = fs->layouts;
	uint64_t round;

	pthread_mutex_lock(&ls->mutex);
	round = ++ls->wanted;
	layouts_kick(ls);
	while (ls->running && ls->rounds < round)
		pthread_cond_wait(&ls->settled, &ls->mutex);
	pthread_mutex_unlock(&ls->mutex);
}
