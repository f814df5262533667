/* SPDX-License-Identifier: MIT
 *
 * journal.c - state of the journal: reservations, the journal thread. journal_wait.c has those who
 * wait for it, journal_commit.c writes records, journal_checkpoint.c writes blocks home,
 * journal_replay.c reads the log at mount.
 *
 * Definitions.
 *   lsn         log position: blocks ever written to the log. Its place is lsn mod log_blocks.
 *   tail, head  where replay begins, as the durable header says; where the next record goes.
 *   group       the transactions between two closings; its number is its xid. One is running.
 *   record      descriptors and images of one closed group.  live: it lies in [tail, head).
 *   obligation  of a buf: log_lsn != 0. The record there holds the newest durable (or in-flight)
 *               image of its block, and home is older. It ends when that image has been written
 *               home and flushed, or when the block was freed by a group that is durable.
 *
 * A group, and the function that takes each edge:
 *
 *   EMPTY --jrn_buf_dirty--> RUNNING --close_group--> CLOSED --commit_group--> DURABLE
 *                                                       |                         |
 *                                                   jrn_fail              checkpoint_batch
 *                                                       v                         v
 *                                                     FAILED                CHECKPOINTED
 *
 * close_group() begins the next one, EMPTY. A buf:
 *
 *   CLEAN --jrn_buf_dirty--> DIRTY --close_group--> LOGGED --checkpoint_batch--> CLEAN
 *                              ^-----jrn_buf_dirty-----+
 *   any --jrn_buf_forget--> detached from the cache
 *
 * Invariants.
 *   1. tail <= head <= tail + log_blocks. The blocks [head, tail + log_blocks) are free to be
 *      overwritten: the header with this tail was durable before j->tail was set.
 *   2. The running group always fits: jrn_record_blocks(dirty + reserved) <= free log.
 *      jrn_reserve() refuses what would break it; so a commit never waits for a checkpoint. (A
 *      forced empty group is the exception: its one block has no reservation, and it has no images,
 *      so it can wait for one.)
 *   3. Every buf with an obligation is cached (DIRTY or LOGGED), or counted in forgot_lsn; tail <=
 *      its log_lsn.
 *   4. A home write carries an image that is durable in the log. Images are copied from LOGGED bufs
 *      only, by the thread that also commits, so none is in flight then. A DIRTY buf is not written
 *      home at all.
 *   5. Data before conversion: a group is closed, then the device flushed if a write completed
 *      since the last flush began, then the record written. So every data write that completed
 *      before a transaction of the group is durable before the record.
 *   6. durable == running - 1 unless a group is in flight (running - 2 then); checkpointed ==
 *      tail_xid - 1.
 *   7. After j->err is set no group becomes durable, nothing is written home, the tail does not
 *      move.
 *
 * The log cannot dead-end because of 4 (a DIRTY buf pins the tail by the obligation of its older
 * image, and its image is not written home): when jrn_reserve() refuses, waiters are queued, and
 * while there are any it refuses everybody. So no new transaction dirties anything; the running
 * group fits by 2 and is committed, which makes every DIRTY buf LOGGED with a new log_lsn and
 * settles forgot_lsn; the checkpoint then finds LOGGED bufs only, writes all of them home, and the
 * tail reaches the head. An empty log holds any group (group_max is chosen so).
 *
 * Freed blocks. Between the transaction that frees a metadata block and the durability of its
 * group, a crash must find the block as it was: when home is older, the tail stays at or before its
 * image (forgot_lsn, per running group, since a commit settles all). After that nothing needs the
 * image.
 *
 * Turns. Commits and checkpoints are made by whoever has the turn, one at a time: the journal
 * thread, or a leader, who asked for durability while nobody had it and nobody waited. The leader
 * commits in its own thread and gives the turn back: no thread is woken for it. Whoever asks
 * meanwhile is queued for the journal thread, which the leader wakes at its end; so with many who
 * ask, groups fill while one is in flight. A leader makes no checkpoint, and leaves big groups and
 * slow devices to the thread, since it may be one that serves requests.
 *
 * Locks: fs->lock before the mutex; the mutex is a leaf. Who has the turn waits for I/O with
 * neither.
 */
#include "journal.h"

#include <string.h>
#include <time.h>

#include "journal_impl.h"
#include "log.h"

uint64_t jrn_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* fs->lock exclusive and the mutex held. */
void assert_journal_state(const struct journal *j)
{
	unsigned ndirty = atomic_load_explicit(&j->ndirty, memory_order_relaxed);
	xid_t durable = atomic_load(&j->durable);

	xassert(j->tail <= j->head && j->head - j->tail <= j->log_blocks);
	xassert(ndirty == j->dirty.count && ndirty <= j->group_max);
	xassert(j->err || ndirty == 0 || jrn_record_blocks(ndirty) <= jrn_free(j));
	xassert(j->err || durable + 1 + j->in_flight == j->running);
	xassert(atomic_load(&j->checkpointed) + 1 == j->tail_xid && j->tail_xid <= j->running);
	xassert(!j->logged.first || (j->logged.first->log_lsn >= j->tail &&
				     j->logged.last->log_lsn < j->head));
	/* Freeing a block changes its allocation group, so such a group is never empty. */
	xassert(!j->forgot_lsn || (j->forgot_lsn >= j->tail && ndirty));
}

void buf_list_add(struct buf_list *l, struct buf *b)
{
	b->list_prev = l->last;
	b->list_next = NULL;
	if (l->last)
		l->last->list_next = b;
	else
		l->first = b;
	l->last = b;
	l->count++;
}

void buf_list_del(struct buf_list *l, struct buf *b)
{
	if (b->list_prev)
		b->list_prev->list_next = b->list_next;
	else
		l->first = b->list_next;
	if (b->list_next)
		b->list_next->list_prev = b->list_prev;
	else
		l->last = b->list_prev;
	b->list_prev = b->list_next = NULL;
	l->count--;
}

/* The thread has to look at that time, or earlier. Mutex held. */
static void wake_for(struct journal *j, uint64_t deadline_ns)
{
	if (j->wakes_ns > deadline_ns)
		pthread_cond_signal(&j->work);
}

/* ---- transactions: fs->lock held exclusively ---- */

bool jrn_fits(const struct journal *j, unsigned images)
{
	return images <= j->group_max && jrn_record_blocks(images) <= jrn_free(j);
}

int jrn_reserve(struct fs *fs, unsigned blocks)
{
	struct journal *j = fs->jrn;
	int err = 0;

	pthread_mutex_lock(&j->mutex);
	assert_journal_state(j);
	if (j->err) {
		err = -ERR_SHUTDOWN;
	} else if (j->space_waiters || !jrn_fits(j, j->dirty.count + blocks)) {
		err = -ERR_JOURNAL_FULL;
		j->close_early = true;
		j->target = MAX(j->target, j->head);
		pthread_cond_signal(&j->work);
	}
	pthread_mutex_unlock(&j->mutex);
	return err;
}

xid_t jrn_running(struct fs *fs)
{
	return fs->jrn->running;
}

void jrn_buf_dirty(struct fs *fs, struct buf *b)
{
	struct journal *j = fs->jrn;

	if (b->state == BUF_DIRTY)
		return;
	if (b->state == BUF_LOGGED)
		buf_list_del(&j->logged, b);
	buf_list_add(&j->dirty, b);
	buf_set_state(b, BUF_DIRTY);
	atomic_store_explicit(&j->ndirty, j->dirty.count, memory_order_relaxed);
	if (j->dirty.count != 1 && j->dirty.count != j->group_max / 2)
		return;
	pthread_mutex_lock(&j->mutex);
	if (j->dirty.count == 1) {
		j->deadline_ns = jrn_now_ns() + (uint64_t)j->commit_ms * 1000000u;
		wake_for(j, j->deadline_ns);
	} else {
		j->close_early = true;
		pthread_cond_signal(&j->work);
	}
	pthread_mutex_unlock(&j->mutex);
}

void jrn_buf_forget(struct fs *fs, struct buf *b)
{
	struct journal *j = fs->jrn;

	if (b->state == BUF_DIRTY)
		buf_list_del(&j->dirty, b);
	else if (b->state == BUF_LOGGED)
		buf_list_del(&j->logged, b);
	atomic_store_explicit(&j->ndirty, j->dirty.count, memory_order_relaxed);
	if (b->log_lsn && (!j->forgot_lsn || b->log_lsn < j->forgot_lsn))
		j->forgot_lsn = b->log_lsn;
	b->log_lsn = 0;
	buf_set_state(b, BUF_CLEAN);
	buf_detach(b);
}

/* ---- state ---- */

xid_t jrn_durable(struct fs *fs)
{
	return atomic_load(&fs->jrn->durable);
}

xid_t jrn_checkpointed(struct fs *fs)
{
	return atomic_load(&fs->jrn->checkpointed);
}

void jrn_kick_checkpoint(struct fs *fs)
{
	struct journal *j = fs->jrn;

	pthread_mutex_lock(&j->mutex);
	/* Beyond the head: the running group is committed, and then included. */
	j->target = MAX(j->target, j->head + (atomic_load(&j->ndirty) != 0));
	pthread_cond_signal(&j->work);
	pthread_mutex_unlock(&j->mutex);
}

void jrn_note_lazy(struct fs *fs)
{
	struct journal *j = fs->jrn;

	pthread_mutex_lock(&j->mutex);
	if (!j->lazy) {
		j->lazy = true;
		j->lazy_deadline_ns = jrn_now_ns() + (uint64_t)j->commit_ms * 1000000u;
		wake_for(j, j->lazy_deadline_ns);
	}
	pthread_mutex_unlock(&j->mutex);
}

void jrn_set_prepare(struct fs *fs, void (*prepare)(struct fs *fs))
{
	fs->jrn->prepare = prepare;
}

void jrn_get_stats(struct fs *fs, struct jrn_stats *st)
{
	struct journal *j = fs->jrn;

	pthread_mutex_lock(&j->mutex);
	*st = j->stats;
	st->log_blocks = j->log_blocks;
	st->log_used = j->head - j->tail;
	pthread_mutex_unlock(&j->mutex);
}

/* ---- the journal thread ---- */

void jrn_fail(struct journal *j, int err, const char *what)
{
	fs_shutdown_writes(j->fs, err, "journal: %s", what);
	pthread_mutex_lock(&j->mutex);
	if (!j->err)
		j->err = err;
	pthread_mutex_unlock(&j->mutex);
}

/* Of two at a time the one that began first may end last. */
static void advance(_Atomic uint64_t *upto, uint64_t to)
{
	uint64_t seen = atomic_load(upto);

	while (seen < to && !atomic_compare_exchange_weak(upto, &seen, to))
		;
}

int jrn_flush_device(struct journal *j)
{
	struct device *dev = j->fs->dev;
	uint64_t noted = atomic_load(&j->foreign_noted), start, took, mean;
	int err;

	if (!jrn_foreign_writes(j) &&
	    atomic_load(&dev->flushed_upto) >= atomic_load(&dev->writes_done))
		return 0;
	start = jrn_now_ns();
	err = dev_flush(dev);
	if (err)
		return err;
	advance(&j->foreign_flushed, noted);
	/* One that took very long says little about the next. Of two at a time one is not counted. */
	took = MIN(jrn_now_ns() - start, 4 * (uint64_t)LEAD_FLUSH_NS);
	mean = atomic_load(&j->flush_ns);
	atomic_store(&j->flush_ns, (7 * mean + took) / 8);
	return 0;
}

enum work { WORK_NONE, WORK_PREPARE, WORK_COMMIT, WORK_FLUSH, WORK_CHECKPOINT, WORK_WAKE_SPACE,
	    WORK_FAILED, WORK_END };

/* Is there a reason to close the running group? Mutex held. */
static bool commit_due(const struct journal *j, unsigned ndirty, uint64_t now)
{
	if (j->force_xid >= j->running)
		return true;
	if (!ndirty)
		return false;
	return j->close_early || j->space_waiters || j->stop == JRN_STOP || now >= j->deadline_ns;
}

/* The next thing to do; the order is the priority. Mutex held. */
static enum work choose(struct journal *j)
{
	unsigned ndirty = atomic_load_explicit(&j->ndirty, memory_order_relaxed);
	uint64_t now = jrn_now_ns();
	bool commit, checkpoint;

	if (j->turn == TURN_LEADER)
		return WORK_NONE; /* it wakes the thread */
	if (j->stop == JRN_ABANDON)
		return WORK_END;
	if (j->err) {
		if (j->waiters || j->flush_waiters || j->space_waiters)
			return WORK_FAILED;
		return j->stop ? WORK_END : WORK_NONE;
	}
	if (!ndirty && !j->space_waiters)
		j->close_early = false;
	if (j->space_waiters && jrn_fits(j, ndirty + TRANS_MAX_BLOCKS))
		return WORK_WAKE_SPACE;
	if (j->lazy && j->prepare && now >= j->lazy_deadline_ns && !j->stop)
		return WORK_PREPARE;
	if (j->space_waiters || j->stop)
		j->target = MAX(j->target, j->head);
	else if (j->head - j->tail > j->log_blocks / 2)
		j->target = MAX(j->target, j->head - j->log_blocks / 4);
	commit = commit_due(j, ndirty, now);
	checkpoint = j->target > j->tail;
	if (commit && !(checkpoint && j->after_commit))
		return WORK_COMMIT;
	if (j->flush_waiters)
		return WORK_FLUSH;
	if (checkpoint)
		return WORK_CHECKPOINT;
	return j->stop ? WORK_END : WORK_NONE;
}

/* When the thread has to look by itself; UINT64_MAX: never. Mutex held. */
static uint64_t next_deadline(const struct journal *j)
{
	uint64_t until = UINT64_MAX;

	if (j->err)
		return until;
	if (atomic_load_explicit(&j->ndirty, memory_order_relaxed))
		until = j->deadline_ns;
	if (j->lazy && j->prepare)
		until = MIN(until, j->lazy_deadline_ns);
	return until;
}

bool jrn_thread_due(struct journal *j)
{
	return choose(j) != WORK_NONE || j->wakes_ns > next_deadline(j);
}

/* A group that begins within commit_ms of the last one finds a thread that is going to look in
 * time: it need not be woken for the first block of every group. */
static void sleep_until_work(struct journal *j)
{
	uint64_t until = next_deadline(j), period = (uint64_t)j->commit_ms * 1000000u;
	uint64_t now = jrn_now_ns();
	struct timespec ts;

	if (until == UINT64_MAX && now < j->deadline_ns + period)
		until = now + period;
	if (j->turn == TURN_LEADER)
		until = UINT64_MAX;
	j->wakes_ns = until;
	if (until == UINT64_MAX) {
		pthread_cond_wait(&j->work, &j->mutex);
	} else {
		ts.tv_sec = (time_t)(until / 1000000000u);
		ts.tv_nsec = (long)(until % 1000000000u);
		pthread_cond_timedwait(&j->work, &j->mutex, &ts);
	}
	j->wakes_ns = 0;
}

/* Those who came before the flush began are satisfied by it. */
static void flush_for_waiters(struct journal *j)
{
	struct jrn_waiter *mine;
	int err;

	pthread_mutex_lock(&j->mutex);
	mine = j->flush_waiters;
	j->flush_waiters = NULL;
	j->stats.flush_only++;
	pthread_mutex_unlock(&j->mutex);
	err = jrn_flush_device(j);
	if (err)
		jrn_fail(j, err, "a flush failed");
	jrn_wake(j, &mine, UINT64_MAX, err);
}

static void wake_all(struct journal *j, int err)
{
	jrn_wake(j, &j->waiters, UINT64_MAX, err);
	jrn_wake(j, &j->flush_waiters, UINT64_MAX, err);
	jrn_wake(j, &j->space_waiters, UINT64_MAX, err);
}

/* No locks held. */
static void perform(struct journal *j, enum work work)
{
	switch (work) {
	case WORK_PREPARE:
		j->prepare(j->fs);
		break;
	case WORK_COMMIT:
		commit_group(j);
		j->after_commit = true;
		break;
	case WORK_FLUSH:
		flush_for_waiters(j);
		break;
	case WORK_CHECKPOINT:
		checkpoint_batch(j);
		j->after_commit = false;
		break;
	case WORK_WAKE_SPACE:
		jrn_wake(j, &j->space_waiters, UINT64_MAX, 0);
		break;
	case WORK_FAILED:
		wake_all(j, j->err);
		break;
	case WORK_NONE:
	case WORK_END:
		xassert(!"nothing to perform");
	}
}

static void *journal_thread(void *arg)
{
	struct journal *j = arg;
	int err = ioctx_create(CHECKPOINT_DEPTH, &j->ioctx);

	if (err)
		jrn_fail(j, err, "no I/O context");
	pthread_mutex_lock(&j->mutex);
	for (;;) {
		enum work work = choose(j);

		if (work == WORK_END)
			break;
		if (work == WORK_NONE) {
			sleep_until_work(j);
			continue;
		}
		if (work == WORK_PREPARE)
			j->lazy = false;
		j->turn = TURN_THREAD;
		pthread_mutex_unlock(&j->mutex);
		perform(j, work);
		pthread_mutex_lock(&j->mutex);
		j->turn = TURN_NONE;
	}
	j->thread_runs = false;
	pthread_mutex_unlock(&j->mutex);
	wake_all(j, j->err ? j->err : -ERR_SHUTDOWN);
	if (!err)
		ioctx_destroy(j->ioctx);
	return NULL;
}

/* ---- life ---- */

int jrn_open(struct fs *fs, struct jrn_replay_report *report)
{
	struct journal *j = calloc(1, sizeof(*j));
	pthread_condattr_t attr;
	int err;

	if (!j)
		return -ENOMEM;
	j->fs = fs;
	j->start = fs->super.journal_start;
	j->log_blocks = fs->super.journal_blocks - 2;
	j->group_max = (unsigned)MIN(MAX(j->log_blocks / 4, TRANS_MAX_BLOCKS), JOURNAL_GROUP_MAX);
	xassert(jrn_record_blocks(j->group_max) <= j->log_blocks);
	pthread_mutex_init(&j->mutex, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&j->work, &attr);
	pthread_cond_init(&j->done, &attr);
	pthread_condattr_destroy(&attr);
	fs->jrn = j;
	err = replay(j, report);
	if (err) {
		jrn_close(fs);
		return err;
	}
	j->head = j->tail;
	j->running = j->tail_xid;
	atomic_store(&j->durable, j->running - 1);
	atomic_store(&j->checkpointed, j->running - 1);
	return 0;
}

int jrn_start(struct fs *fs, unsigned commit_ms)
{
	struct journal *j = fs->jrn;
	uint64_t slots = 1;
	int err;

	xassert(!fs->read_only && !j->thread_runs && !j->record_lsn);
	j->commit_ms = commit_ms;
	/* A record has at least one block, so no more of them are ever live. */
	while (slots < j->log_blocks + 1)
		slots *= 2;
	j->record_mask = slots - 1;
	j->record_lsn = calloc(slots, sizeof(*j->record_lsn));
	j->home_images = io_alloc((size_t)CHECKPOINT_BATCH * BLOCK_SIZE);
	if (!j->record_lsn || !j->home_images)
		return -ENOMEM;
	err = commit_create(j);
	if (err)
		return err;
	j->thread_runs = true;
	err = pthread_create(&j->thread, NULL, journal_thread, j);
	j->started = !err;
	if (err)
		j->thread_runs = false;
	return -err;
}

static void end_thread(struct journal *j, enum jrn_stop_how how)
{
	if (!j || !j->started)
		return;
	pthread_mutex_lock(&j->mutex);
	j->stop = how;
	pthread_cond_signal(&j->work);
	pthread_mutex_unlock(&j->mutex);
	pthread_join(j->thread, NULL);
	j->started = false;
}

int jrn_stop(struct fs *fs)
{
	struct journal *j = fs->jrn;

	end_thread(j, JRN_STOP);
	if (!j || !j->err)
		xassert(!j || (j->tail == j->head && !j->dirty.count));
	return j ? j->err : 0;
}

void jrn_abandon(struct fs *fs)
{
	end_thread(fs->jrn, JRN_ABANDON);
}

void jrn_close(struct fs *fs)
{
	struct journal *j = fs->jrn;

	if (!j)
		return;
	xassert(!j->thread_runs && !j->started);
	xassert(!j->waiters && !j->flush_waiters && !j->space_waiters);
	commit_destroy(j);
	io_free(j->home_images);
	free(j->record_lsn);
	pthread_cond_destroy(&j->work);
	pthread_cond_destroy(&j->done);
	pthread_mutex_destroy(&j->mutex);
	free(j);
	fs->jrn = NULL;
}
