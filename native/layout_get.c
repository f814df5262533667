/* SPDX-License-Identifier: MIT
 *
 * layout_get.c - LAYOUT_GET: from a segment of an operation to a grant.
 *
 * Chain: get_acquire -> [get_pages] -> get_look -> [get_tail] -> [get_allocate] -> [get_settle] ->
 * get_look, which grants.
 *
 * get_look walks over the range with the segment held, builds the answer, and says what is missing:
 * blocks, exposures, the inode's record, zeros behind EOF, durability. It is run again after each
 * of these has been done. When nothing is missing, the grant takes the segment's place under the
 * same hold of fs->lock, so what the answer says is true when the grant begins: nobody can change
 * the map or remove exposures in between, not even the same holder with a LAYOUT_RETURN. An answer
 * that needs nothing costs one walk.
 */
#include "layout_get.h"

#define GET_TRANS_BLOCKS 384u

static enum step get_look(struct file_run *r);
static enum step get_acquire(struct file_run *r);

static uint64_t bytes_end(const struct layout_args *a)
{
	return a->length == UINT64_MAX ? UINT64_MAX : a->offset + a->length;
}

/* ---- beginning and end ---------------------------------------------------------------------- */

static int get_enter(struct file_run *r)
{
	struct layout_get_state *lg = &r->lg;
	int rc = 0;

	if (!lg->holder)
		rc = holder_enter(r->fs->layouts, r->fop->layout->holder, true, &lg->holder);
	if (!rc && !lg->spare[0]) {
		lg->spare[0] = grant_alloc();
		if (!lg->spare[0])
			rc = -ENOMEM;
	}
	return rc;
}

/* Before the operation ends, and before it parks where file_cancel() can end it. */
static void get_leave(struct file_run *r)
{
	struct layout_get_state *lg = &r->lg;

	for (unsigned i = 0; i < ARRAY_LEN(lg->spare); i++) {
		if (lg->spare[i])
			grant_free(lg->spare[i]);
		lg->spare[i] = NULL;
	}
	if (lg->holder)
		holder_leave(r->fs->layouts, lg->holder);
	lg->holder = NULL;
}

static enum step get_fail(struct file_run *r, int rc)
{
	get_leave(r);
	r->fop->layout->count = 0;
	r->fop->layout->next = r->fop->layout->offset;
	LAYOUT_COUNT(r->fs, gets_failed, 1);
	if (rc == -EAGAIN)
		LAYOUT_COUNT(r->fs, conflicts, 1);
	else if (rc == -EOWNERDEAD)
		LAYOUT_COUNT(r->fs, refused_lost, 1);
	else if (rc == -EINVAL || rc == -EFBIG)
		LAYOUT_COUNT(r->fs, refused_invalid, 1);
	return run_end(r, rc);
}

/* ---- segments ------------------------------------------------------------------------------- */

/* Take the segment of this kind, without waiting for anybody. */
static int get_try(struct file_run *r, enum seg_kind kind)
{
	struct layout_args *a = r->fop->layout;
	struct seg *s = &r->seg[0];

	if (s->state == SEG_HELD)
		seg_release(r->fop->in, s);
	s->kind = kind;
	s->start = r->lg.low;
	s->end = bytes_end(a);
	s->op = &r->fop->op;
	s->holder = a->holder;
	return a->flags & LAYOUT_F_RECALL ? seg_try_recall(r->fop->in, s) : seg_try(r->fop->in, s);
}

/* The held segment changes its kind; then `then`. */
static enum step get_change(struct file_run *r, enum seg_kind kind, step_fn then)
{
	int rc;

	get_leave(r);
	r->step = then;
	if (r->fop->layout->flags & LAYOUT_F_WAIT)
		rc = seg_change(r->fop->in, &r->seg[0], kind);
	else
		rc = get_try(r, kind);
	if (rc == ERR_PARKED)
		return STEP_PARKED;
	return rc ? get_fail(r, rc) : STEP_NEXT;
}

static enum step get_pages_gone(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;

	if (!(a->flags & LAYOUT_F_WAIT))
		return get_change(r, SEG_GET_RW, get_look);
	get_leave(r);
	run_release(r, 0);
	r->step = get_look;
	return run_acquire(r, 0, SEG_GET_RW, r->lg.low, bytes_end(a));
}

/* READs and WRITEs of pages that are locked now are answered first: PENDING is in nobody's way. */
static enum step get_pages(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;

	return layout_drop_pages(r, r->fop->in, a->offset, bytes_end(a), get_pages_gone);
}

static enum seg_kind first_kind(struct file_run *r)
{
	switch (r->fop->layout->iomode) {
	case IOMODE_READ:
		return SEG_GET_READ;
	case IOMODE_PIN:
		return SEG_GET_PIN;
	default:
		break;
	}
	if (r->fs->cache_ops && atomic_load(&r->fop->in->pages_cached))
		return SEG_PENDING;
	return SEG_GET_RW;
}

static enum step get_acquire(struct file_run *r)
{
	enum seg_kind kind = first_kind(r);
	int rc;

	r->step = kind == SEG_PENDING ? get_pages : get_look;
	if (r->fop->layout->flags & LAYOUT_F_WAIT)
		return run_acquire(r, 0, kind, r->lg.low, bytes_end(r->fop->layout));
	rc = get_try(r, kind);
	return rc ? get_fail(r, rc) : STEP_NEXT;
}

/* ---- zeros behind EOF ----------------------------------------------------------------------- */

/* The grant will reach past EOF: do bytes behind it have to be zeroed first (layout.h invariant 5)?
 * Not where this holder writes already. fs->lock shared. 1: yes, *eof is the block and *shared what
 * it is. */
static int tail_wanted(struct file_run *r, fileblk_t *eof, bool *shared)
{
	struct inode *in = r->fop->in;
	uint64_t size = in->core.size;
	struct extent e;
	bool own;
	int rc;

	if (r->fop->layout->iomode != IOMODE_RW || r->lg.tail_done || in->tail_zero ||
	    !(size & BLOCK_MASK) || block_start(r->lg.b1) <= size)
		return 0;
	*eof = block_floor(size);
	rc = extmap_lookup(in, FORK_DATA, *eof, 1, &e);
	if (rc || e.state != EXT_WRITTEN)
		return rc;
	pthread_mutex_lock(&in->lock);
	own = seg_next_grant_locked(in, RW_GRANT, r->fop->layout->holder, block_start(*eof),
				    block_start(*eof + 1), NULL);
	pthread_mutex_unlock(&in->lock);
	if (own)
		return 0;
	rc = range_shared(in, *eof, *eof + 1, shared);
	return rc ? rc : 1;
}

static enum step get_tail_end(struct file_run *r)
{
	if (r->err)
		return get_fail(r, r->err);
	r->lg.tail_done = true;
	r->step = get_look;
	return STEP_NEXT;
}

/* The segment has to hold EOF's block; readers, too, are kept out when that is to be copied. */
static enum step get_tail(struct file_run *r, fileblk_t eof, bool shared)
{
	struct seg *s = &r->seg[0];

	if (block_start(eof) < s->start) {
		get_leave(r);
		run_release(r, 0);
		r->lg.low = block_start(eof);
		r->step = get_acquire;
		return STEP_NEXT;
	}
	if (shared && s->kind != SEG_MAP)
		return get_change(r, SEG_MAP, get_look);
	return tail_begin(r, r->fop->in, block_start(r->lg.b1), true, get_tail_end);
}

/* ---- look, and grant ------------------------------------------------------------------------ */

/* ATOMIC grants are whole: they neither replace others nor are replaced. */
static int check_own(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;
	struct inode *in = r->fop->in;
	struct seg *s = NULL;
	int rc = 0;

	if (a->iomode != IOMODE_RW)
		return 0;
	pthread_mutex_lock(&in->lock);
	while ((s = seg_next_grant_locked(in, RW_GRANT, a->holder, a->offset, bytes_end(a), s))) {
		unsigned flags = GRANT_OF(s)->flags;

		if ((flags & LAYOUT_F_ATOMIC) ||
		    ((a->flags & LAYOUT_F_ATOMIC) && !(flags & GRANT_F_GHOST))) {
			rc = -EINVAL;
			break;
		}
	}
	pthread_mutex_unlock(&in->lock);
	return rc;
}

/* Bytes below which an answer is none. */
static uint64_t least(const struct file_run *r)
{
	const struct layout_args *a = r->fop->layout;

	if (a->flags & LAYOUT_F_ATOMIC)
		return a->length;
	return MAX(a->min_length, BLOCK_SIZE);
}

static int too_short(const struct walk *w)
{
	if (block_start(w->at - w->r->lg.b0) >= least(w->r))
		return 0;
	return w->conflict ? -EAGAIN : -ENOSPC;
}

/* Everything that the answer relies on is durable with this group. fs->lock shared. */
static xid_t relies_on(const struct walk *w)
{
	const struct inode *in = w->in;
	xid_t xid = MAX(in->xid, w->r->lg.holder->xid);

	/* What the holder will overwrite must not be part of the durable state in another place. */
	if (w->in_place) {
		xid = MAX(xid, in->shrink_xid);
		if (in->core.flags & INODE_F_SHARED)
			xid = MAX(xid, atomic_load(&in->fs->unshare_xid));
	}
	return xid;
}

static void count_grant(const struct walk *w)
{
	struct fs *fs = w->in->fs;

	switch (w->a->iomode) {
	case IOMODE_READ:
		LAYOUT_COUNT(fs, granted_read, 1);
		break;
	case IOMODE_PIN:
		LAYOUT_COUNT(fs, granted_pin, 1);
		break;
	default:
		LAYOUT_COUNT(fs, granted_rw, 1);
		if (w->a->flags & LAYOUT_F_ATOMIC)
			LAYOUT_COUNT(fs, granted_atomic, 1);
		else if (w->cow)
			LAYOUT_COUNT(fs, granted_cow, 1);
	}
}

/* The segment becomes the grant. fs->lock shared. */
static int grant(struct walk *w, struct grant_list *dead)
{
	static const enum seg_kind kinds[] = {
		[IOMODE_READ] = SEG_GRANT_READ, [IOMODE_RW] = SEG_GRANT_RW,
		[IOMODE_PIN] = SEG_GRANT_PIN,
	};
	struct layout_get_state *lg = &w->r->lg;
	struct layout_args *a = w->a;
	struct inode *in = w->in;
	uint64_t eof = block_start(block_floor(in->core.size));
	int rc = 0;

	a->next = block_start(w->at);
	a->size = in->core.size;
	a->map_gen = atomic_load(&in->map_gen);
	if (a->iomode == IOMODE_PIN) {
		lg->spare[0]->until = layouts_now(in->fs) + a->time_ms * 1000000u;
		rc = pin_timer(in->fs->layouts, in->ino, a->holder, lg->spare[0]->until);
		if (rc)
			return rc;
	}
	if (a->iomode == IOMODE_RW && a->offset <= eof && eof < a->next)
		in->tail_zero = false; /* the holder may write behind EOF */
	pthread_mutex_lock(&in->lock);
	a->seq = grant_add_locked(in, lg->holder, &w->r->seg[0], kinds[a->iomode], a->offset,
				  a->next, a->flags & LAYOUT_F_ATOMIC, lg->spare, dead)->seq;
	pthread_mutex_unlock(&in->lock);
	return 0;
}

static enum step get_over(struct file_run *r, struct walk *w, struct grant_list *dead)
{
	count_grant(w);
	LAYOUT_COUNT(r->fs, allocated_blocks, r->lg.allocated);
	get_leave(r);
	grant_list_free(r->fs, dead);
	layouts_note_latency(r->fs, LATENCY_GET, layout_ticks() - r->lg.began);
	return run_end(r, 0);
}

static enum step get_allocate(struct file_run *r);

/* Wait for what relies_on() says, and for our own transactions. */
static enum step get_settle(struct file_run *r)
{
	enum step s = run_await_xid(r, r->lg.xid);

	if (s == STEP_DONE)
		return get_fail(r, r->err);
	if (s == STEP_NEXT)
		r->step = get_look;
	return s;
}

/* What is still to be done before the grant. */
enum missing { NOTHING, TAIL, BLOCKS, NOTE, DURABILITY };

/* fs->lock shared. enum missing, or a code. */
static int look(struct walk *w, fileblk_t *eof, bool *shared)
{
	struct layout_get_state *lg = &w->r->lg;
	struct layout_args *a = w->a;
	struct inode *in = w->in;
	int rc = check_own(w->r), noted = 1;

	if (a->length == UINT64_MAX)
		lg->b1 = MAX(block_ceil(in->core.size), lg->b0 + 1);
	if (!rc)
		rc = tail_wanted(w->r, eof, shared);
	if (rc)
		return rc > 0 ? TAIL : rc;
	if (a->iomode != IOMODE_PIN)
		noted = exposure_has_inode(in->fs, in->ino, a->holder, a->iomode);
	rc = noted < 0 ? noted : answer_walk(w, lg->b1);
	if (rc)
		return rc;
	if (w->map)
		return BLOCKS;
	rc = too_short(w);
	if (rc)
		return rc;
	if (!noted)
		return NOTE;
	if (!lg->settling)
		lg->xid = MAX(lg->xid, relies_on(w));
	lg->settling = true;
	return lg->xid > jrn_durable(in->fs) ? DURABILITY : NOTHING;
}

static enum step get_look(struct file_run *r)
{
	struct grant_list dead = { NULL };
	bool shared = false;
	fileblk_t eof = 0;
	struct walk w;
	int rc = get_enter(r);

	if (rc)
		return get_fail(r, rc);
	w = (struct walk){ .r = r, .a = r->fop->layout, .in = r->fop->in, .at = r->lg.b0 };
	fs_rdlock(r->fs);
	rc = look(&w, &eof, &shared);
	if (rc == NOTHING && r->seg[0].kind != SEG_MAP)
		rc = grant(&w, &dead);
	fs_unlock(r->fs);
	if (rc < 0)
		return get_fail(r, rc);
	if (rc == TAIL)
		return get_tail(r, eof, shared);
	if (r->seg[0].kind == SEG_MAP || (rc == BLOCKS && r->seg[0].kind != SEG_GET_MAP))
		return get_change(r, SEG_GET_MAP, get_look);
	if (rc == NOTHING)
		return get_over(r, &w, &dead);
	r->step = rc == DURABILITY ? get_settle : get_allocate;
	return STEP_NEXT;
}

/* ---- the transaction ------------------------------------------------------------------------ */

static int allocate(struct walk *w)
{
	bool added;
	int rc = trans_join_inode(w->t, w->in);

	if (!rc)
		rc = exposure_note_inode(w->t, w->in->ino, w->a->holder, w->a->iomode, &added);
	if (!rc && w->a->iomode == IOMODE_RW)
		rc = answer_walk(w, w->r->lg.b1);
	/* Also when the map is as it was: in->xid tells others when the note is durable. */
	return rc ? rc : inode_write(w->t, w->in);
}

/* No space from w->at on. The answer ends there if that is enough; else everything was undone. */
static enum step allocate_failed(struct file_run *r, int rc, const struct walk *w)
{
	enum step how;

	if (rc != -ENOSPC && run_retry(r, &rc, &how))
		return how;
	if (rc == -ENOSPC && w->at > r->lg.b0 && block_start(w->at - r->lg.b0) >= least(r)) {
		r->lg.b1 = w->at;
		return STEP_NEXT;
	}
	if (rc == -ENOSPC && run_retry(r, &rc, &how))
		return how;
	return get_fail(r, rc);
}

static enum step get_allocate(struct file_run *r)
{
	struct layout_get_state *lg = &r->lg;
	struct trans t;
	struct walk w = { .r = r, .a = r->fop->layout, .in = r->fop->in, .t = &t, .at = lg->b0 };
	xid_t xid;
	int rc;

	rc = trans_begin(r->fs, &t, GET_TRANS_BLOCKS);
	if (rc)
		return allocate_failed(r, rc, &w);
	rc = allocate(&w);
	if (!rc && w.a->iomode == IOMODE_RW && too_short(&w)) {
		trans_cancel(&t); /* not even an empty disk would do */
		return get_fail(r, -ENOSPC);
	}
	if (rc) {
		run_trans_fail(r, &t, rc);
		return allocate_failed(r, rc, &w);
	}
	xid = trans_commit(&t);
	lg->xid = MAX(lg->xid, xid);
	lg->settling = true;
	lg->allocated += w.allocated;
	if (w.a->iomode == IOMODE_RW)
		lg->b1 = w.at;
	r->space_tries = r->reaper_tries = 0;
	r->step = get_settle;
	return STEP_NEXT;
}

/* ---- start ---------------------------------------------------------------------------------- */

static int check_args(const struct layout_args *a)
{
	const uint64_t limit = block_start(FILE_MAX_BLOCKS);
	bool rw = a->iomode == IOMODE_RW, pin = a->iomode == IOMODE_PIN;

	if ((!rw && !pin && a->iomode != IOMODE_READ) || !a->cap || !a->length ||
	    (a->flags & ~(LAYOUT_F_WAIT | LAYOUT_F_RECALL | LAYOUT_F_ATOMIC |
			  LAYOUT_F_INVALIDATED)) ||
	    (!rw && (a->flags & LAYOUT_F_ATOMIC)) || pin != (a->time_ms != 0) ||
	    a->time_ms > UINT32_MAX || (a->offset & BLOCK_MASK) || a->min_length > a->length)
		return -EINVAL;
	if (a->offset >= limit)
		return -EFBIG;
	if (a->length == UINT64_MAX)
		return rw ? -EINVAL : 0;
	if (a->length & BLOCK_MASK)
		return -EINVAL;
	return a->length > limit - a->offset ? -EFBIG : 0;
}

enum step layout_get_start(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;
	struct layout_get_state *lg = &r->lg;
	int rc = check_args(a);

	lg->began = layout_ticks();
	LAYOUT_COUNT(r->fs, gets, 1);
	a->flags &= ~LAYOUT_F_INVALIDATED;
	if (!rc)
		rc = get_enter(r); /* a holder that is lost waits for nobody */
	if (rc)
		return get_fail(r, rc);
	get_leave(r);
	lg->b0 = block_floor(a->offset);
	lg->b1 = a->length == UINT64_MAX ? lg->b0 + 1 : lg->b0 + block_floor(a->length);
	lg->low = a->offset;
	r->step = get_acquire;
	/* Who wants to wait for nobody means holders, not the ends of writes that have been answered. */
	r->early_waiter = (struct early_waiter){ .op = &r->fop->op };
	return early_wait(r->fop->in, &r->early_waiter) == ERR_PARKED ? STEP_PARKED : STEP_NEXT;
}
