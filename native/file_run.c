/* SPDX-License-Identifier: MIT
 *
 * file_run.c - how a file operation runs: its pool, its waits, its device transfers (file_run.h).
 *
 * Invariants:
 *  1. A run that returned STEP_PARKED is resumed exactly once: by a segment, a journal waiter, the
 *     reaper, its own wake, or the completion of its last transfer.
 *  2. Between run_submit() and that completion nothing else touches the run.
 *  3. Nothing is allocated in steady state: runs with their parts, and buffers of the two usual
 *     sizes, come from the thread's pool.
 */
#include "file_run.h"

#include <limits.h>
#include <string.h>

#include "layout.h"

#define POOL_RUNS 256u
#define SMALL_BYTES (2 * BLOCK_SIZE)
#define SMALL_KEPT 64u
#define LARGE_BYTES ((1u << 20) + 2 * BLOCK_SIZE) /* the largest FUSE write and its two edges */
#define LARGE_KEPT 8u
#define PARTS_FIRST 4u
#define BUSY_TRIES 12u
#define REAPER_TRIES 10000u

/* ---- pools of a thread ---------------------------------------------------------------------- */

struct mem_cache {
	void *kept[SMALL_KEPT];
	unsigned n;
};

struct run_pool {
	struct file_run *runs;
	unsigned nruns;
	struct mem_cache small, large;
};

static pthread_key_t pool_key;
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static __thread struct run_pool *pool;

static void run_free(struct file_run *r)
{
	free(r->parts);
	free(r);
}

static void pool_free(void *arg)
{
	struct run_pool *p = arg;

	while (p->runs) {
		struct file_run *r = p->runs;

		p->runs = r->pool_next;
		run_free(r);
	}
	while (p->small.n)
		io_free(p->small.kept[--p->small.n]);
	while (p->large.n)
		io_free(p->large.kept[--p->large.n]);
	free(p);
	pool = NULL;
}

static void pool_key_make(void)
{
	xassert(pthread_key_create(&pool_key, pool_free) == 0);
}

static struct run_pool *pool_get(void)
{
	if (likely(pool))
		return pool;
	pthread_once(&pool_once, pool_key_make);
	pool = calloc(1, sizeof(*pool));
	if (pool)
		pthread_setspecific(pool_key, pool);
	return pool;
}

struct file_run *run_get(void)
{
	struct run_pool *p = pool_get();
	struct file_run *r;

	if (p && p->runs) {
		r = p->runs;
		p->runs = r->pool_next;
		p->nruns--;
		memset(r, 0, offsetof(struct file_run, parts));
		return r;
	}
	r = calloc(1, sizeof(*r));
	if (!r)
		return NULL;
	r->parts = malloc(PARTS_FIRST * sizeof(*r->parts));
	r->parts_cap = PARTS_FIRST;
	if (!r->parts) {
		free(r);
		return NULL;
	}
	return r;
}

void run_put(struct file_run *r)
{
	struct run_pool *p = pool_get();

	if (!p || p->nruns >= POOL_RUNS || r->parts_cap > PARTS_KEPT) {
		run_free(r);
		return;
	}
	r->pool_next = p->runs;
	p->runs = r;
	p->nruns++;
}

void *run_mem_get(size_t len)
{
	struct run_pool *p = pool_get();
	struct mem_cache *c = NULL;
	size_t size = len;

	if (p && len <= LARGE_BYTES) {
		c = len <= SMALL_BYTES ? &p->small : &p->large;
		size = len <= SMALL_BYTES ? SMALL_BYTES : LARGE_BYTES;
		if (c->n)
			return c->kept[--c->n];
	}
	return io_alloc(size);
}

void run_mem_put(void *mem, size_t len)
{
	struct run_pool *p = pool_get();

	if (!mem)
		return;
	if (p && len <= SMALL_BYTES && p->small.n < SMALL_KEPT)
		p->small.kept[p->small.n++] = mem;
	else if (p && len > SMALL_BYTES && len <= LARGE_BYTES && p->large.n < LARGE_KEPT)
		p->large.kept[p->large.n++] = mem;
	else
		io_free(mem);
}

/* ---- steps ---------------------------------------------------------------------------------- */

static void run_finish(struct file_run *r)
{
	struct file_op *fop = r->fop;

	for (unsigned i = 0; i < ARRAY_LEN(r->seg); i++)
		run_release(r, i);
	fop->done(fop);
	/* fop may be gone. */
	run_put(r);
}

void run_go(struct file_run *r)
{
	enum step s;

	do {
		s = r->step(r);
	} while (s == STEP_NEXT);
	/* After STEP_PARKED the run may already be running again in no other thread than this one,
	 * but later. */
	if (s == STEP_DONE)
		run_finish(r);
}

enum step run_end(struct file_run *r, int64_t result)
{
	r->fop->result = result;
	return STEP_DONE;
}

void run_resume(struct op *op)
{
	struct file_run *r = container_of(op, struct file_op, op)->run;
	int err = r->seg[0].err ? r->seg[0].err : r->seg[1].err; /* seg_fail() */

	if (atomic_load_explicit(&r->cancelled, memory_order_acquire))
		err = -EINTR;
	if (unlikely(r->seg[0].stalled))
		seg_stall(r->seg_in[0], &r->seg[0], false);
	if (unlikely(err)) {
		r->fop->result = err;
		run_finish(r);
		return;
	}
	run_go(r);
}

enum step run_yield(struct file_run *r, step_fn next)
{
	r->step = next;
	ioctx_wake(&r->fop->op);
	return STEP_PARKED;
}

enum step run_acquire(struct file_run *r, unsigned i, enum seg_kind kind, uint64_t start,
		      uint64_t end)
{
	struct seg *s = &r->seg[i];
	int rc;

	s->kind = kind;
	s->start = start;
	s->end = end;
	s->op = &r->fop->op;
	s->holder = r->fop->layout ? r->fop->layout->holder : 0;
	s->nowait = r->fop->flags & FILE_F_NOWAIT;
	rc = seg_acquire(r->seg_in[i], s);
	/* Resumed in this thread only: it is still parked, or will be held, as far as others can
	 * see. */
	if (rc == ERR_PARKED && i == 1)
		seg_stall(r->seg_in[0], &r->seg[0], true);
	if (rc == ERR_PARKED) {
		early_note_wait(r->seg_in[i]);
		return STEP_PARKED;
	}
	if (rc)
		return run_end(r, rc);
	return STEP_NEXT;
}

void run_release(struct file_run *r, unsigned i)
{
	if (r->seg[i].state == SEG_HELD)
		seg_release(r->seg_in[i], &r->seg[i]);
}

/* ---- device transfers ----------------------------------------------------------------------- */

static struct part *part_new(struct file_run *r)
{
	if (unlikely(r->nparts == r->parts_cap)) {
		struct part *more = realloc(r->parts, 2 * r->parts_cap * sizeof(*more));

		if (!more)
			return NULL;
		r->parts = more;
		r->parts_cap *= 2;
	}
	return &r->parts[r->nparts++];
}

nblocks_t run_pieces(const struct file_run *r, uint64_t len)
{
	uint64_t piece = r->fs->dev->piece;

	return piece ? (len + piece - 1) / piece : 1;
}

bool run_parts_room(struct file_run *r, nblocks_t n)
{
	struct part *more;

	if (likely(n <= r->parts_cap))
		return true;
	xassert(!r->nparts);
	more = n <= UINT_MAX / sizeof(*more) ? realloc(r->parts, n * sizeof(*more)) : NULL;
	if (!more)
		return false;
	r->parts = more;
	r->parts_cap = (unsigned)n;
	return true;
}

static void part_done(struct dev_io *io)
{
	struct file_run *r = container_of(io, struct part, io)->run;

	if (unlikely(io->res) && !r->io_err)
		r->io_err = io->res;
	xassert(r->ios_left > 0);
	if (--r->ios_left == 0)
		run_go(r);
}

int run_part(struct file_run *r, enum io_kind kind, uint64_t dev_offset, void *mem, uint64_t len)
{
	uint64_t piece = r->fs->dev->piece ? r->fs->dev->piece : len;

	for (uint64_t at = 0; at < len; at += piece) {
		struct part *p = part_new(r);

		if (!p)
			return -ENOMEM;
		*p = (struct part){
			.io = { .kind = kind, .flags = kind == IO_WRITE && r->fua ? IO_FUA : 0,
				.offset = dev_offset + at, .buf = (uint8_t *)mem + at,
				.len = MIN(piece, len - at), .done = part_done },
			.run = r,
		};
	}
	return 0;
}

int run_part_zero(struct file_run *r, void *mem, uint64_t len)
{
	struct part *p = part_new(r);

	if (!p)
		return -ENOMEM;
	*p = (struct part){ .io = { .buf = mem, .len = len }, .zero = true };
	return 0;
}

enum step run_submit(struct file_run *r, step_fn then)
{
	unsigned n = r->nparts;

	r->step = then;
	r->nparts = 0;
	r->io_err = 0;
	r->ios_left = 0;
	for (unsigned i = 0; i < n; i++)
		r->ios_left += !r->parts[i].zero;
	for (unsigned i = 0; i < n; i++) {
		struct part *p = &r->parts[i];

		if (p->zero)
			memset(p->io.buf, 0, p->io.len);
		else
			dev_submit(r->fs->dev, r->fop->op.ctx, &p->io);
	}
	/* Completions come from ioctx_run() only. */
	return r->ios_left ? STEP_PARKED : STEP_NEXT;
}

/* ---- waits ---------------------------------------------------------------------------------- */

int run_trans_fail(struct file_run *r, struct trans *t, int rc)
{
	r->busy_xid = jrn_running(r->fs);
	trans_cancel(t);
	return rc;
}

/* *parked says how a wait for the journal began. */
static int park_journal(struct file_run *r, xid_t xid, bool space)
{
	r->waiter = (struct jrn_waiter){ .op = &r->fop->op, .xid = xid, .lead = true };
	return space ? jrn_wait_space(r->fs, &r->waiter) : jrn_force(r->fs, &r->waiter);
}

static int wait_busy(struct file_run *r)
{
	/* The first commit makes freed data blocks available; freed metadata blocks also need a
	 * checkpoint. */
	if (++r->space_tries > BUSY_TRIES)
		return -ENOSPC;
	if (r->space_tries > 1)
		jrn_kick_checkpoint(r->fs);
	return park_journal(r, r->busy_xid, false);
}

static int wait_reaper(struct file_run *r)
{
	if (++r->reaper_tries > REAPER_TRIES)
		return -ENOSPC;
	if (!reaper_busy(r->fs)) /* it may have become idle since: look once more */
		return r->reaper_tries == 1 ? 0 : -ENOSPC;
	r->space_tries = 0;
	r->reaper_waiter = (struct reaper_waiter){ .op = &r->fop->op };
	return reaper_wait(r->fs, &r->reaper_waiter);
}

bool run_retry(struct file_run *r, int *rc, enum step *how)
{
	int w;

	if (*rc == -ERR_JOURNAL_FULL)
		w = park_journal(r, 0, true);
	else if (*rc == -ERR_BUSY_BLOCKS)
		w = wait_busy(r);
	else if (*rc == -ENOSPC)
		w = wait_reaper(r);
	else
		return false;
	if (w < 0) {
		*rc = w;
		return false;
	}
	*how = w == ERR_PARKED ? STEP_PARKED : STEP_NEXT;
	return true;
}

enum step run_await_xid(struct file_run *r, xid_t xid)
{
	int rc;

	if (xid <= jrn_durable(r->fs))
		return STEP_NEXT;
	if (fs_is_shutdown(r->fs)) {
		r->err = fs_shutdown_cause(r->fs);
		return STEP_DONE;
	}
	rc = park_journal(r, xid, false);
	if (rc < 0) {
		r->err = rc;
		return STEP_DONE;
	}
	return rc == ERR_PARKED ? STEP_PARKED : STEP_NEXT;
}

static enum step durable_end(struct file_run *r)
{
	r->err = r->waiter.err;
	r->step = r->durable_then;
	return STEP_NEXT;
}

/* The group is durable. Its flush may have begun before our last data write completed: look. */
static enum step durable_flush(struct file_run *r)
{
	struct device *dev = r->fs->dev;
	int rc;

	r->step = durable_end;
	if (r->waiter.err || !dev->volatile_cache ||
	    atomic_load(&dev->flushed_upto) >= r->flush_mark)
		return STEP_NEXT;
	rc = park_journal(r, 0, false);
	if (rc < 0)
		r->waiter.err = rc;
	return rc == ERR_PARKED ? STEP_PARKED : STEP_NEXT;
}

/* All of it has been written, and is part of a group. */
static enum step durable_begin(struct file_run *r)
{
	struct inode *in = r->durable_of;
	xid_t xid;
	int rc;

	r->flush_mark = atomic_load(&r->fs->dev->writes_done);
	fs_rdlock(r->fs);
	xid = in->xid;
	fs_unlock(r->fs);
	r->waiter = (struct jrn_waiter){ 0 };
	r->step = durable_flush;
	if (xid == 0 || xid <= jrn_durable(r->fs))
		return STEP_NEXT;
	rc = park_journal(r, xid, false);
	if (rc < 0)
		r->waiter.err = rc;
	return rc == ERR_PARKED ? STEP_PARKED : STEP_NEXT;
}

enum step run_durable(struct file_run *r, struct inode *in, step_fn then)
{
	r->durable_then = then;
	r->durable_of = in;
	r->step = durable_begin;
	r->early_waiter = (struct early_waiter){ .op = &r->fop->op };
	return early_wait(in, &r->early_waiter) == ERR_PARKED ? STEP_PARKED : STEP_NEXT;
}
