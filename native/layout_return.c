/* SPDX-License-Identifier: MIT
 *
 * layout_return.c - LAYOUT_RETURN: a holder has stopped using a range.
 *
 * Chain: return_start -> return_acquire -> return_roll ... -> return_pages -> return_over; for
 * everything of a holder, return_each runs the same on one inode after the other.
 *
 * return_roll removes the exposures of the range and frees what is staged there, in as many
 * transactions as it takes; the grants leave with the last one, under the same hold of fs->lock. So
 * whatever is exposed or staged is under a grant until then. Meanwhile a segment keeps commits that
 * swap and grants that allocate away (a GET_READ, which no grant and no data transfer minds), taken
 * in front of everybody who is parked: they wait for us.
 *
 * Unwritten blocks stay: below EOF as zeros, behind EOF until the file is trimmed.
 */
#include "layout_ops.h"

#include <stdlib.h>

#define RETURN_STEP_BLOCKS (EXTMAP_STEP_BLOCKS + 2 * TRANS_TREE_OP + TRANS_ALLOC_OP)

static enum step return_roll(struct file_run *r);
static enum step return_each(struct file_run *r);

static enum step return_fail(struct file_run *r, int rc)
{
	struct layout_return_state *lr = &r->lr;

	free(lr->one);
	free(lr->one_args);
	if (rc == -EINVAL)
		LAYOUT_COUNT(r->fs, refused_invalid, 1);
	return run_end(r, rc);
}

static enum step return_over(struct file_run *r)
{
	LAYOUT_COUNT(r->fs, returns, 1);
	layouts_note_latency(r->fs, LATENCY_RETURN, layout_ticks() - r->lr.began);
	return return_fail(r, 0);
}

/* ---- of one inode --------------------------------------------------------------------------- */

static unsigned kinds_of(enum layout_iomode iomode)
{
	switch (iomode) {
	case IOMODE_READ:
		return 1u << SEG_GRANT_READ;
	case IOMODE_RW:
		return RW_GRANT;
	case IOMODE_PIN:
		return 1u << SEG_GRANT_PIN;
	default:
		return ANY_GRANT;
	}
}

static uint64_t wanted_end(const struct layout_args *a)
{
	return a->length == UINT64_MAX ? UINT64_MAX : a->offset + a->length;
}

/* What of the holder's grants lies in the range: [lr->start, lr->stop), nothing when they are
 * equal. -EINVAL: it would cut an ATOMIC one. */
static int find_range(struct file_run *r)
{
	struct layout_return_state *lr = &r->lr;
	struct layout_args *a = r->fop->layout;
	struct inode *in = r->fop->in;
	uint64_t end = wanted_end(a);
	struct seg *s = NULL;
	int rc = 0;

	lr->start = lr->stop = end;
	lr->rw = false;
	pthread_mutex_lock(&in->lock);
	while ((s = seg_next_grant_locked(in, lr->kinds, a->holder, a->offset, end, s))) {
		uint64_t from = MAX(s->start, a->offset), to = MIN(s->end, end);

		if ((GRANT_OF(s)->flags & LAYOUT_F_ATOMIC) && (s->start < from || to < s->end)) {
			rc = -EINVAL;
			break;
		}
		lr->rw |= s->kind == SEG_GRANT_RW;
		lr->stop = lr->start == end ? to : MAX(lr->stop, to);
		lr->start = MIN(lr->start, from);
	}
	pthread_mutex_unlock(&in->lock);
	return rc;
}

/* Will the holder have anything of the inode when the range is gone? in->lock held. */
static bool keeps_any(struct file_run *r)
{
	struct layout_return_state *lr = &r->lr;
	struct seg *s = NULL;

	while ((s = seg_next_grant_locked(r->fop->in, ANY_GRANT, r->fop->layout->holder, 0,
					  UINT64_MAX, s)))
		if (!(lr->kinds & 1u << s->kind) || s->start < lr->start || s->end > lr->stop)
			return true;
	return false;
}

/* Takes away what fits the transaction, from one run of exposures after the other. *over: nothing
 * is left. */
static int unexpose(struct file_run *r, struct trans *t, bool *over)
{
	fileblk_t b0 = block_floor(r->lr.start), b1 = block_floor(r->lr.stop);
	uint64_t holder = r->fop->layout->holder;
	struct inode *in = r->fop->in;

	*over = false;
	for (unsigned n = 0; n == 0 || trans_room(t) >= RETURN_STEP_BLOCKS; n++) {
		struct exposure x;
		fileblk_t rest;
		int rc = exposure_find(r->fs, in->ino, holder, b0, b1, &x);

		*over = rc == -ENOENT;
		if (rc)
			return *over ? 0 : rc;
		rest = x.file;
		if (x.staging)
			rc = extmap_remove(t, in, FORK_STAGING, x.file, x.file + x.len, 16, &rest);
		if (!rc)
			rc = exposure_remove(t, in->ino, rest, x.file + x.len, holder);
		if (rc)
			return rc;
	}
	return 0;
}

/* The grants leave. fs->lock held. */
static void cut(struct file_run *r, struct grant_list *dead, bool *trim)
{
	struct layout_return_state *lr = &r->lr;
	struct inode *in = r->fop->in;
	struct grant *spare = NULL;

	pthread_mutex_lock(&in->lock);
	grant_cut_locked(in, r->fop->layout->holder, lr->kinds, lr->start, lr->stop, &spare, dead);
	*trim = lr->rw && !seg_next_grant_locked(in, RW_GRANT, 0, 0, UINT64_MAX, NULL);
	pthread_mutex_unlock(&in->lock);
}

static bool blocks_past_eof(struct inode *in)
{
	struct extent e;

	return extmap_list(in, FORK_DATA, block_ceil(in->core.size), FILE_MAX_BLOCKS, false, &e,
			   1) > 0;
}

static enum step return_pages(struct file_run *r)
{
	struct layout_return_state *lr = &r->lr;

	run_release(r, 0);
	if (lr->rw)
		return layout_drop_stale(r, r->fop->in, lr->start, lr->stop, return_over);
	r->step = return_over;
	return STEP_NEXT;
}

/* Must the record stay that the holder had something of the inode? It must while it has a grant,
 * and while it is lost, or was when something of the inode was taken from it: then it reaches
 * blocks that the revoke left in the map for the reaper, and after a restart nothing but the record
 * tells it. Unless it returns everything, which ends that, if no fence is decided. fs->lock held. */
static bool keeps_record(struct file_run *r)
{
	uint64_t holder = r->fop->layout->holder;
	struct inode *in = r->fop->in;
	bool any;

	if ((!(r->fop->flags & FILE_F_RETURNS_ALL) || fence_decided(r->fs->layouts, holder)) &&
	    (holder_state_of(r->fs->layouts, holder) == HOLDER_LOST ||
	     lost_has(r->fs, in->ino, holder)))
		return true;
	pthread_mutex_lock(&in->lock);
	any = keeps_any(r);
	pthread_mutex_unlock(&in->lock);
	return any;
}

/* Nothing on disk says anything about the range. fs->lock exclusive when t, else shared. */
static int forget(struct file_run *r, struct trans *t, bool *needed)
{
	struct inode *in = r->fop->in;
	bool any = keeps_record(r);

	*needed = !any;
	return any || !t ? 0 : exposure_forget_inode(t, in->ino, r->fop->layout->holder);
}

static int try_roll(struct file_run *r, struct trans *t, bool *over)
{
	struct inode *in = r->fop->in;
	uint32_t staging = in->core.flags & INODE_F_STAGING;
	bool needed;
	int rc = trans_join_inode(t, in);

	if (!rc && r->lr.rw)
		rc = unexpose(r, t, over);
	if (!rc && *over)
		rc = staging_settle(in);
	if (!rc && *over)
		rc = forget(r, t, &needed);
	if (!rc && staging) {
		rc = inode_write(t, in);
		note_unshare(in);
	}
	return rc;
}

/* Grants that leave nothing to be changed on disk: part of what the holder has, without
 * exposures. */
static int without_trans(struct file_run *r, struct grant_list *dead, bool *done, bool *trim)
{
	struct inode *in = r->fop->in;
	struct exposure x;
	bool needed;
	int rc;

	*done = false;
	fs_rdlock(r->fs);
	rc = forget(r, NULL, &needed);
	if (!rc && !needed && r->lr.rw)
		rc = exposure_find(r->fs, in->ino, r->fop->layout->holder, block_floor(r->lr.start),
				   block_floor(r->lr.stop), &x);
	else if (!rc)
		rc = needed ? 0 : -ENOENT;
	if (rc == -ENOENT) {
		cut(r, dead, trim);
		*trim = *trim && blocks_past_eof(in);
		*done = true;
	}
	fs_unlock(r->fs);
	return rc == -ENOENT ? 0 : rc;
}

static enum step return_gone(struct file_run *r, struct grant_list *dead, bool trim)
{
	run_release(r, 0); /* before the trim, which takes only what nobody uses */
	if (trim)
		layouts_want_trim(r->fop->in);
	grant_list_free(r->fs, dead);
	r->step = return_pages;
	return STEP_NEXT;
}

static enum step return_roll(struct file_run *r)
{
	struct grant_list dead = { NULL };
	bool over = !r->lr.rw, done = false, trim = false;
	struct trans t;
	enum step how;
	int rc = without_trans(r, &dead, &done, &trim);

	if (rc)
		return return_fail(r, rc);
	if (done)
		return return_gone(r, &dead, trim);
	rc = trans_begin(r->fs, &t, REMOVE_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = try_roll(r, &t, &over);
		if (rc) {
			run_trans_fail(r, &t, rc);
		} else {
			if (over) {
				trim = blocks_past_eof(r->fop->in);
				cut(r, &dead, &done);
			}
			trans_commit(&t);
		}
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : return_fail(r, rc);
	r->space_tries = r->reaper_tries = 0;
	return over ? return_gone(r, &dead, trim && done) : run_yield(r, return_roll);
}

static enum step return_acquire(struct file_run *r)
{
	struct layout_return_state *lr = &r->lr;
	struct seg *s = &r->seg[0];
	int rc = find_range(r);

	if (rc)
		return return_fail(r, rc);
	if (lr->start == lr->stop) {
		r->step = return_over;
		return STEP_NEXT;
	}
	s->kind = SEG_GET_READ;
	s->start = lr->start;
	s->end = lr->stop;
	s->op = &r->fop->op;
	s->holder = r->fop->layout->holder;
	r->step = return_roll;
	rc = seg_acquire_front(r->fop->in, s);
	if (rc == ERR_PARKED)
		return STEP_PARKED;
	return rc ? return_fail(r, rc) : STEP_NEXT;
}

/* ---- of every inode ------------------------------------------------------------------------- */

static void one_done(struct file_op *one)
{
	ioctx_wake(one->user);
}

static enum step each_end(struct file_run *r)
{
	inode_put(r->lr.one->in);
	if (r->lr.one->result < 0)
		return return_fail(r, (int)r->lr.one->result);
	r->step = return_each;
	return STEP_NEXT;
}

static struct inode *some_inode(struct layouts *ls, uint64_t holder)
{
	struct inode *in = NULL;
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, holder);
	if (h && !TAILQ_EMPTY(&h->grants))
		in = inode_ref(TAILQ_FIRST(&h->grants)->in);
	pthread_mutex_unlock(&ls->mutex);
	return in;
}

static enum step return_each(struct file_run *r)
{
	struct layout_return_state *lr = &r->lr;
	uint64_t holder = r->fop->layout->holder;
	struct inode *in = some_inode(r->fs->layouts, holder);

	if (!in) {
		holder_returned_all(r->fs, holder);
		r->step = return_over;
		return STEP_NEXT;
	}
	*lr->one_args = (struct layout_args){ .holder = holder, .iomode = IOMODE_ANY,
					      .length = UINT64_MAX };
	file_op_init(lr->one, FILE_LAYOUT_RETURN, in, r->fop->op.ctx);
	lr->one->flags = FILE_F_RETURNS_ALL;
	lr->one->layout = lr->one_args;
	lr->one->done = one_done;
	lr->one->user = &r->fop->op;
	r->step = each_end;
	file_start(lr->one);
	return STEP_PARKED;
}

/* ---- start ---------------------------------------------------------------------------------- */

static int check_args(const struct layout_args *a)
{
	if (a->flags & ~(LAYOUT_F_LAZY | LAYOUT_F_ALL | LAYOUT_F_INVALIDATED))
		return -EINVAL;
	if (a->flags & LAYOUT_F_ALL)
		return 0;
	if (a->iomode < IOMODE_READ || a->iomode > IOMODE_PIN || !a->length ||
	    (a->offset & BLOCK_MASK))
		return -EINVAL;
	if (a->length == UINT64_MAX)
		return 0;
	return (a->length & BLOCK_MASK) || a->length > UINT64_MAX - a->offset ? -EINVAL : 0;
}

enum step layout_return_start(struct file_run *r)
{
	struct layout_return_state *lr = &r->lr;
	struct layout_args *a = r->fop->layout;
	int rc = check_args(a);

	lr->began = layout_ticks();
	if (!rc)
		rc = holder_state_of(r->fs->layouts, a->holder) == HOLDER_GONE ? -ENOENT : 0;
	if (rc)
		return return_fail(r, rc);
	a->flags &= ~LAYOUT_F_INVALIDATED;
	lr->kinds = kinds_of(a->iomode);
	r->step = return_acquire;
	if (!(a->flags & LAYOUT_F_ALL))
		return STEP_NEXT;
	lr->one = malloc(sizeof(*lr->one));
	lr->one_args = malloc(sizeof(*lr->one_args));
	r->step = return_each;
	return lr->one && lr->one_args ? STEP_NEXT : return_fail(r, -ENOMEM);
}
