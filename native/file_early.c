/* SPDX-License-Identifier: MIT
 *
 * file_early.c - writes that are answered before their data is on the device (file_early.h).
 *
 * Definitions: an early write is under way from early_answer() until early_done(). It is settled when the size
 * that it gave the file may be on disk; one that did not make the file grow is from the beginning. `from` is
 * the size before it, and then how far it has been converted; UINT64_MAX when it is settled.
 *
 * Invariants:
 *  1. The list of an inode is in the order of the answers, which `seq` counts.
 *  2. in->early_limit is the least `from` of those that are not settled and of the present epoch. A write that
 *     makes the file grow covers the block of EOF with its segment, so `from` rises along the list, and
 *     truncation takes away only sizes above the `from` of those it did not have to wait for.
 *  3. An early write waits for nothing but the device, the journal, the reaper, and early writes of its file
 *     that were answered before it: who waits for it while holding segments makes no cycle.
 *  4. Memory of copies, in use or kept for the next ones, is at most opt.early_bytes.
 *  5. What is between early_limit and core.size is covered by segments of those that are not settled
 *     (early_turn()), so no block there is written but by the one whose transaction moves early_limit.
 */
#include "file_early.h"

#include <string.h>

#include "file_run.h"
#include "log.h"

#define PER_FILE 32u  /* under way at once; more would only wait for the device in another place */
#define IN_ALL 256u
#define CLASSES 5u
static const uint32_t class_blocks[CLASSES] = { 2, 8, 32, 128, (1u << 20 >> BLOCK_SHIFT) + 2 };

struct early_write {
	struct file_op fop;    /* what goes on */
	uint64_t from, epoch;  /* of the inode's lock */
	uint64_t seq;
	struct early_write *prev, *next;         /* of the inode; its lock */
	struct early_write *all_prev, *all_next; /* early->mutex */
	uint8_t *mem;
	unsigned class;
	struct early_write *free_next;
};

struct early {
	pthread_mutex_t mutex;
	pthread_cond_t over;  /* one of them is */
	unsigned blocked;     /* threads that wait for it */
	struct early_write *first, *last;
	unsigned n;
	uint64_t seq, bytes, limit;
	struct early_write *kept[CLASSES];
	struct early_stats stats;
};

int early_create(struct fs *fs)
{
	struct early *es = calloc(1, sizeof(*es));

	if (!es)
		return -ENOMEM;
	pthread_mutex_init(&es->mutex, NULL);
	pthread_cond_init(&es->over, NULL);
	es->limit = fs->opt.early_bytes;
	fs->early = es;
	return 0;
}

static void release(struct early_write *e)
{
	io_free(e->mem);
	free(e);
}

void early_destroy(struct fs *fs)
{
	struct early *es = fs->early;

	if (!es)
		return;
	xassert(!es->n);
	for (unsigned i = 0; i < CLASSES; i++) {
		while (es->kept[i]) {
			struct early_write *e = es->kept[i];

			es->kept[i] = e->free_next;
			release(e);
		}
	}
	pthread_cond_destroy(&es->over);
	pthread_mutex_destroy(&es->mutex);
	free(es);
	fs->early = NULL;
}

void early_get_stats(struct fs *fs, struct early_stats *st)
{
	struct early *es = fs->early;

	pthread_mutex_lock(&es->mutex);
	*st = es->stats;
	st->bytes = es->bytes;
	pthread_mutex_unlock(&es->mutex);
}

void early_note_wait(struct inode *in)
{
	struct early *es = in->fs->early;

	if (!atomic_load_explicit(&in->early_n, memory_order_relaxed))
		return;
	pthread_mutex_lock(&es->mutex);
	es->stats.waits++;
	pthread_mutex_unlock(&es->mutex);
}

/* ---- memory --------------------------------------------------------------------------------- */

static uint64_t class_bytes(unsigned class)
{
	return (uint64_t)class_blocks[class] << BLOCK_SHIFT;
}

/* Memory that nobody uses goes, one piece at a time. early->mutex. */
static struct early_write *take_kept(struct early *es)
{
	for (unsigned i = CLASSES; i-- > 0;) {
		struct early_write *e = es->kept[i];

		if (e) {
			es->kept[i] = e->free_next;
			es->bytes -= class_bytes(i);
			return e;
		}
	}
	return NULL;
}

static struct early_write *make(unsigned class)
{
	struct early_write *e = calloc(1, sizeof(*e));

	if (!e)
		return NULL;
	e->class = class;
	e->mem = io_alloc(class_bytes(class));
	if (!e->mem) {
		free(e);
		return NULL;
	}
	return e;
}

/* One with room for so many blocks, counted as under way; NULL: there is none. */
static struct early_write *get(struct early *es, nblocks_t blocks)
{
	struct early_write *e = NULL, *gone = NULL;
	unsigned class = 0;
	bool room = false;

	while (class < CLASSES && class_blocks[class] < blocks)
		class++;
	if (class == CLASSES || class_bytes(class) > es->limit)
		return NULL;
	pthread_mutex_lock(&es->mutex);
	if (es->n < IN_ALL) {
		e = es->kept[class];
		if (e)
			es->kept[class] = e->free_next;
		while (!e && es->bytes + class_bytes(class) > es->limit) {
			struct early_write *other = take_kept(es);

			if (!other)
				break;
			other->free_next = gone;
			gone = other;
		}
		room = !e && es->bytes + class_bytes(class) <= es->limit;
		if (room)
			es->bytes += class_bytes(class);
		es->n += e || room;
	}
	pthread_mutex_unlock(&es->mutex);
	while (gone) {
		struct early_write *next = gone->free_next;

		release(gone);
		gone = next;
	}
	if (!room)
		return e;
	e = make(class);
	if (!e) {
		pthread_mutex_lock(&es->mutex);
		es->bytes -= class_bytes(class);
		es->n--;
		pthread_mutex_unlock(&es->mutex);
	}
	return e;
}

static void put(struct early *es, struct early_write *e)
{
	pthread_mutex_lock(&es->mutex);
	e->free_next = es->kept[e->class];
	es->kept[e->class] = e;
	es->n--;
	pthread_mutex_unlock(&es->mutex);
}

uint64_t early_drop_kept(struct fs *fs)
{
	struct early *es = fs->early;
	struct early_write *e;
	uint64_t bytes = 0, most = es->limit;

	/* Writers keep more meanwhile: there is an end to it. */
	do {
		pthread_mutex_lock(&es->mutex);
		e = take_kept(es);
		pthread_mutex_unlock(&es->mutex);
		if (e) {
			bytes += class_bytes(e->class);
			release(e);
		}
	} while (e && bytes < most);
	return bytes;
}

/* ---- the size on disk ----------------------------------------------------------------------- */

/* inode->lock. */
static void set_limit(struct inode *in)
{
	in->early_limit = UINT64_MAX;
	for (const struct early_write *e = in->early; e; e = e->next)
		if (e->epoch == in->early_epoch)
			in->early_limit = MIN(in->early_limit, e->from);
}

uint64_t early_settle(struct file_run *r, uint64_t from)
{
	struct inode *in = r->fop->in;
	uint64_t old;

	pthread_mutex_lock(&in->lock);
	old = r->early->from;
	r->early->from = from;
	set_limit(in);
	pthread_mutex_unlock(&in->lock);
	return old;
}

void early_grown(struct inode *in)
{
	if (!atomic_load_explicit(&in->early_n, memory_order_relaxed))
		return;
	pthread_mutex_lock(&in->lock);
	in->early_size = in->core.size;
	pthread_mutex_unlock(&in->lock);
}

uint64_t early_visible_size(struct inode *in, uint64_t off, uint64_t end)
{
	uint64_t size = in->core.size;

	if (likely(!atomic_load_explicit(&in->early_n, memory_order_relaxed)))
		return size;
	pthread_mutex_lock(&in->lock);
	for (const struct early_write *e = in->early; e; e = e->next)
		if (e->fop.offset < end && off < e->fop.offset + e->fop.len)
			size = MIN(size, e->from);
	pthread_mutex_unlock(&in->lock);
	return size;
}

/* ---- waiting -------------------------------------------------------------------------------- */

int early_wait(struct inode *in, struct early_waiter *w)
{
	if (likely(!atomic_load(&in->early_n)))
		return 0;
	pthread_mutex_lock(&in->lock);
	if (!in->early) {
		pthread_mutex_unlock(&in->lock);
		return 0;
	}
	early_note_wait(in);
	w->before = in->early_last->seq + 1;
	w->next = in->early_waiters;
	in->early_waiters = w;
	pthread_mutex_unlock(&in->lock);
	return ERR_PARKED;
}

int early_turn(struct file_run *r, struct inode *in)
{
	const struct early_write *e, *last = NULL;

	if (!atomic_load(&in->early_n))
		return 0;
	pthread_mutex_lock(&in->lock);
	for (e = in->early; e && e != r->early; e = e->next)
		if (e->from != UINT64_MAX && e->epoch == in->early_epoch)
			last = e;
	if (last) {
		r->early_waiter = (struct early_waiter){ .op = &r->fop->op, .before = last->seq + 1,
							 .next = in->early_waiters };
		in->early_waiters = &r->early_waiter;
	}
	pthread_mutex_unlock(&in->lock);
	return last ? ERR_PARKED : 0;
}

/* inode->lock. */
static void wake_waiters(struct inode *in)
{
	uint64_t oldest = in->early ? in->early->seq : UINT64_MAX;
	struct early_waiter **at = &in->early_waiters;

	while (*at) {
		struct early_waiter *w = *at;

		if (w->before > oldest) {
			at = &w->next;
			continue;
		}
		*at = w->next;
		ioctx_wake(w->op); /* from here on w is its thread's */
	}
}

/* early->mutex. in NULL: any. */
static bool any_before(const struct early *es, const struct inode *in, uint64_t seq)
{
	for (const struct early_write *e = es->first; e && e->seq <= seq; e = e->all_next)
		if (!in || e->fop.in == in)
			return true;
	return false;
}

static void block(struct fs *fs, const struct inode *in)
{
	struct early *es = fs->early;
	uint64_t seq;

	pthread_mutex_lock(&es->mutex);
	seq = es->seq;
	es->blocked++;
	es->stats.waits += any_before(es, in, seq);
	while (any_before(es, in, seq))
		pthread_cond_wait(&es->over, &es->mutex);
	es->blocked--;
	pthread_mutex_unlock(&es->mutex);
}

void early_wait_blocking(struct inode *in)
{
	if (atomic_load(&in->early_n))
		block(in->fs, in);
}

void early_sync(struct fs *fs)
{
	block(fs, NULL);
}

/* ---- beginning and end ---------------------------------------------------------------------- */

static void join(struct early *es, struct inode *in, struct early_write *e)
{
	e->next = e->all_next = NULL;
	pthread_mutex_lock(&in->lock);
	in->early_size = in->core.size;
	e->epoch = in->early_epoch;
	e->prev = in->early_last;
	*(e->prev ? &e->prev->next : &in->early) = e;
	in->early_last = e;
	atomic_fetch_add(&in->early_n, 1);
	set_limit(in);
	pthread_mutex_lock(&es->mutex);
	e->seq = ++es->seq;
	e->all_prev = es->last;
	*(e->all_prev ? &e->all_prev->all_next : &es->first) = e;
	es->last = e;
	es->stats.writes++;
	pthread_mutex_unlock(&es->mutex);
	pthread_mutex_unlock(&in->lock);
}

static void leave(struct early *es, struct inode *in, struct early_write *e)
{
	pthread_mutex_lock(&in->lock);
	*(e->prev ? &e->prev->next : &in->early) = e->next;
	*(e->next ? &e->next->prev : &in->early_last) = e->prev;
	atomic_fetch_sub(&in->early_n, 1);
	set_limit(in);
	wake_waiters(in);
	pthread_mutex_unlock(&in->lock);
	pthread_mutex_lock(&es->mutex);
	*(e->all_prev ? &e->all_prev->all_next : &es->first) = e->all_next;
	*(e->all_next ? &e->all_next->all_prev : &es->last) = e->all_prev;
	if (es->blocked)
		pthread_cond_broadcast(&es->over);
	pthread_mutex_unlock(&es->mutex);
}

/* The segments are released. */
static void early_done(struct file_op *fop)
{
	struct early_write *e = container_of(fop, struct early_write, fop);
	struct inode *in = fop->in;
	struct early *es = in->fs->early;
	void (*ended)(void *arg) = fop->ended;
	void *arg = fop->ended_arg;

	leave(es, in, e);
	put(es, e);
	inode_put(in);
	if (ended)
		ended(arg);
}

/* What of the file's state lets this write be answered. fs->lock: exclusive if it makes the file grow. */
static bool enter(struct file_run *r, struct early_write *e, uint64_t end, bool grows)
{
	struct inode *in = r->fop->in;
	uint64_t size = in->core.size;

	if (fs_is_shutdown(r->fs) || in->deleted || (grows && (size & BLOCK_MASK) && !in->tail_zero) ||
	    (grows && size != r->wr.size) || (r->wr.unwritten && alloc_nearly_full(r->fs)))
		return false;
	if (!seg_harden(in, &r->seg[0], &e->fop.op))
		return false;
	e->from = grows ? size : UINT64_MAX;
	if (grows) {
		xassert(end > size);
		in->core.size = end;
		in->tail_zero = false;
	}
	join(r->fs->early, in, e);
	inode_touch_lazy(in, TOUCH_MTIME | TOUCH_CTIME);
	return true;
}

bool early_answer(struct file_run *r, uint64_t off, uint64_t end, bool grows, const void **buf)
{
	struct file_op *fop = r->fop;
	struct inode *in = fop->in;
	struct early_write *e;
	bool entered;

	if (atomic_load_explicit(&in->early_n, memory_order_relaxed) >= PER_FILE)
		return false;
	e = get(r->fs->early, block_ceil(end) - block_floor(off));
	if (!e)
		return false;
	e->fop = *fop;
	e->fop.op = (struct op){ .resume = fop->op.resume, .ctx = fop->op.ctx };
	e->fop.offset = off;
	e->fop.len = end - off;
	e->fop.buf = e->mem + (off & (r->fs->dev->align - 1));
	e->fop.done = early_done;
	memcpy(e->fop.buf, *buf, end - off);
	if (grows)
		fs_wrlock(r->fs);
	else
		fs_rdlock(r->fs);
	entered = enter(r, e, end, grows);
	fs_unlock(r->fs);
	if (!entered) {
		put(r->fs->early, e);
		return false;
	}
	inode_ref(in);
	*buf = e->fop.buf;
	r->early = e;
	r->fop = &e->fop;
	fop->early = true; /* fop->run stays: file_cancel() may look at it until done() has returned, and finds nothing parked */
	fop->result = (int64_t)(end - off);
	fop->done(fop);
	return true;
}

static void failed(struct file_run *r)
{
	const struct file_op *fop = r->fop;
	struct inode *in = fop->in;
	struct early *es = r->fs->early;

	atomic_store(&in->early_code, r->err);
	atomic_fetch_add_explicit(&in->early_errors, 1, memory_order_release);
	pthread_mutex_lock(&es->mutex);
	es->stats.errors++;
	pthread_mutex_unlock(&es->mutex);
	if (r->err != -ERR_SHUTDOWN)
		log_msg(LOG_ERROR, "%llu bytes at %llu of inode %llu were not written, after the answer: %s",
			(unsigned long long)fop->len, (unsigned long long)fop->offset,
			(unsigned long long)in->ino, err_text(r->err));
}

/* The file keeps the size that its writer was told of. */
static enum step give_size(struct file_run *r)
{
	struct trans t;
	enum step how;
	uint64_t from;
	int rc;

	if (early_turn(r, r->fop->in) == ERR_PARKED)
		return STEP_PARKED;
	rc = trans_begin(r->fs, &t, 1); /* the record's leaf */
	if (!rc) {
		rc = trans_join_inode(&t, r->fop->in);
		from = early_settle(r, UINT64_MAX);
		if (!rc)
			rc = inode_write(&t, r->fop->in);
		if (!rc) {
			trans_commit(&t);
			return run_end(r, r->err);
		}
		early_settle(r, from);
		run_trans_fail(r, &t, rc);
	}
	if (run_retry(r, &rc, &how))
		return how;
	early_settle(r, UINT64_MAX);
	return run_end(r, r->err);
}

enum step early_over(struct file_run *r)
{
	if (likely(!r->err))
		return run_end(r, r->fop->result);
	failed(r);
	if (r->early->from == UINT64_MAX)
		return run_end(r, r->err);
	r->space_tries = r->reaper_tries = 0;
	r->step = give_size;
	return STEP_NEXT;
}
