/* SPDX-License-Identifier: MIT
 *
 * layout_revoke.c - taking a range back from a holder that was asked and did not answer.
 *
 * Nothing stops the holder from using the addresses it knows, so whoever waits must not go on in
 * those blocks. From the first transaction on the inode counts as one that a lost holder can reach
 * (lost_add), and what is unmapped from it goes to quarantine. READ and PIN grants are then simply
 * cut. For RW grants the operation takes a MAP segment over the range, at the head of the queue, in
 * the name of the victim (so that its grants are not in the way), and walks through the file:
 *
 *   unwritten, exposed to it       leaves the map: a hole again
 *   staged for it                  leaves the staging fork
 *   written, not shared            copied: new blocks in the staging fork under an intent, written,
 *                                  then promoted
 *   written, shared                stays: nobody was told to write it
 *   staged for somebody else       stays: RW grants never overlap, so this one could not write
 *                                  there
 *
 * Each transaction also removes the exposures of its piece, and cuts the grant up to there: a
 * revoke that fails in the middle leaves the holder exactly what has not been touched. A crash
 * leaves it the same on disk, where the next mount finds it as a ghost.
 *
 * Ghosts of two holders overlap, because a ghost is everything that its holder could have had. The
 * revoke of each would wait for the other's grant; so what one that is parked takes is not in the
 * way of the others (segment.h, "Revokes").
 *
 * Failure. No space for a copy: once more whenever some may have become free, for recall_ms; then,
 * and at once for any other error, whoever waits for the range fails with -EIO and the grant stays.
 * The next one who wants the range begins anew.
 */
#include "layout_revoke.h"
#include "log.h"

#define RETRIES 8u      /* in recall_ms */
#define RW_GRANTS (1u << SEG_GRANT_RW)
#define OTHER_GRANTS (1u << SEG_GRANT_READ | 1u << SEG_GRANT_PIN)

static enum step revoke_begin(struct file_run *r);

bool revoke_stopping(struct layouts *ls)
{
	bool stop;

	pthread_mutex_lock(&ls->mutex);
	stop = ls->stop;
	pthread_mutex_unlock(&ls->mutex);
	return stop || fs_is_shutdown(ls->fs);
}

/* ---- grants; fs->lock exclusive
 * --------------------------------------------------------------- */

static void note_taken(struct revoke *rv, unsigned kinds, uint64_t start, uint64_t end)
{
	struct inode *in = rv->fop.in;

	rv->read |= kinds & (1u << SEG_GRANT_READ) &&
		    seg_next_grant_locked(in, 1u << SEG_GRANT_READ, rv->holder, start, end, NULL);
	rv->rw |= kinds & RW_GRANTS &&
		  seg_next_grant_locked(in, RW_GRANTS, rv->holder, start, end, NULL);
	rv->pin |= kinds & (1u << SEG_GRANT_PIN) &&
		   seg_next_grant_locked(in, 1u << SEG_GRANT_PIN, rv->holder, start, end, NULL);
}

static void cut(struct revoke *rv, unsigned kinds, uint64_t start, uint64_t end,
		struct grant_list *dead)
{
	struct inode *in = rv->fop.in;
	struct grant *spare = NULL;

	if (start >= end)
		return;
	pthread_mutex_lock(&in->lock);
	note_taken(rv, kinds, start, end);
	grant_cut_locked(in, rv->holder, kinds, start, end, &spare, dead);
	pthread_mutex_unlock(&in->lock);
}

void revoke_cut_before(struct revoke *rv, fileblk_t at, struct grant_list *dead)
{
	uint64_t end = at >= FILE_MAX_BLOCKS ? UINT64_MAX : at << BLOCK_SHIFT;

	cut(rv, RW_GRANTS, rv->start, MIN(end, rv->end), dead);
}

/* ---- the end
 * ---------------------------------------------------------------------------------- */

static void tell(struct revoke *rv)
{
	struct inode *in = rv->fop.in;
	struct layout_event ev = {
		.type = EVENT_REVOKED, .holder = rv->holder, .ino = in->ino,
		.offset = rv->start,
		.length = rv->end == UINT64_MAX ? UINT64_MAX : rv->end - rv->start,
		.iomode = (rv->read ? IOMODE_READ : 0) | (rv->rw ? IOMODE_RW : 0) |
			  (rv->pin ? IOMODE_PIN : 0),
	};
	struct holder *h;

	fs_rdlock(rv->ls->fs);
	ev.generation = in->core.generation;
	fs_unlock(rv->ls->fs);
	LAYOUT_COUNT(rv->ls->fs, revokes, 1);
	pthread_mutex_lock(&rv->ls->mutex);
	h = holder_find(rv->ls, rv->holder);
	if (h && h->sink)
		event_post(rv->ls, h->sink, &ev);
	pthread_mutex_unlock(&rv->ls->mutex);
}

/* Taken. What the kernel keeps of the range is of before the holder's writes; it is told after the
 * segment has gone, since it may write back pages, which wait for it. Nobody waits until it has:
 * locked pages may wait for another revoke, which may begin only when this one has ended. */
static enum step revoke_taken(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);

	run_release(r, 0);
	if (rv->read || rv->rw || rv->pin)
		tell(rv);
	if (rv->rw)
		layout_drop_later(r->fs, r->fop->in, rv->start, rv->end);
	return run_end(r, 0);
}

enum step revoke_finish(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct grant_list dead = { NULL };

	fs_wrlock(r->fs);
	cut(rv, RW_GRANTS, rv->start, rv->end, &dead);
	fs_unlock(r->fs);
	grant_list_free(r->fs, &dead);
	return revoke_taken(r);
}

/* ---- begin: what cannot be written is cut
 * ------------------------------------------------------- */

/* ATOMIC grants are taken whole. False: the holder has nothing here. */
static bool find_range(struct revoke *rv)
{
	struct inode *in = rv->fop.in;
	struct seg *g;
	bool any, wider;

	pthread_mutex_lock(&in->lock);
	any = seg_next_grant_locked(in, RW_GRANTS | OTHER_GRANTS, rv->holder, rv->start, rv->end,
				    NULL);
	do {
		wider = false;
		g = NULL;
		while ((g = seg_next_grant_locked(in, RW_GRANTS, rv->holder, rv->start, rv->end,
						  g))) {
			if (!(GRANT_OF(g)->flags & LAYOUT_F_ATOMIC) ||
			    (g->start >= rv->start && g->end <= rv->end))
				continue;
			rv->start = MIN(rv->start, g->start);
			rv->end = MAX(rv->end, g->end);
			wider = true;
			break;
		}
	} while (wider);
	pthread_mutex_unlock(&in->lock);
	return any;
}

bool revoke_of_dead(struct inode *in)
{
	return in->core.nlink == 0 && !inode_is_open(in);
}

static enum step revoke_held(struct file_run *r);

static enum step revoke_acquire(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct seg *s = &r->seg[0];
	int rc;

	seg_init(s, SEG_MAP, rv->start, rv->end, &r->fop->op);
	s->holder = rv->holder;
	s->revokes = true;
	r->step = revoke_held;
	r->lv.at = block_floor(rv->start);
	r->lv.b1 = rv->end == UINT64_MAX ? FILE_MAX_BLOCKS :
		MIN(block_ceil(rv->end), FILE_MAX_BLOCKS);
	rc = seg_acquire_front(r->fop->in, s);
	if (rc == ERR_PARKED) {
		rv->parked = true;
		rv->ls->nparked++;
		return STEP_PARKED;
	}
	return rc ? revoke_fail(r, rc) : STEP_NEXT;
}

/* First transaction: the inode is lost to the holder; READ and PIN grants go. */
static int take_trans(struct file_run *r, bool *rw_left)
{
	struct revoke *rv = revoke_of(r);
	struct inode *in = r->fop->in;
	struct grant_list dead = { NULL };
	unsigned kinds = OTHER_GRANTS;
	struct trans t;
	int rc;

	rc = trans_begin(r->fs, &t, REVOKE_TRANS_BLOCKS);
	if (rc)
		return rc;
	if (holder_state_of(rv->ls, rv->holder) == HOLDER_GONE)
		rc = -ENOENT; /* fenced: its grants are being dropped */
	if (!rc)
		rc = lost_add(&t, in->ino, rv->holder);
	if (rc)
		return run_trans_fail(r, &t, rc);
	if (revoke_of_dead(in) || r->fs->opt.mutant == MUTANT_REVOKE_IN_PLACE)
		kinds |= RW_GRANTS;
	cut(rv, kinds, rv->start, rv->end, &dead);
	pthread_mutex_lock(&in->lock);
	*rw_left = seg_next_grant_locked(in, RW_GRANTS, rv->holder, rv->start, rv->end, NULL);
	pthread_mutex_unlock(&in->lock);
	trans_commit(&t);
	grant_list_free(r->fs, &dead);
	return 0;
}

static enum step revoke_begin(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	bool rw_left = false;
	enum step how;
	int rc;

	r->err = 0;
	r->space_tries = r->reaper_tries = 0;
	rv->start = rv->asked_start;
	rv->end = rv->asked_end;
	if (revoke_stopping(rv->ls))
		return run_end(r, -ERR_SHUTDOWN);
	if (!find_range(rv))
		return run_end(r, 0); /* it has returned it */
	rc = take_trans(r, &rw_left);
	if (rc == -ENOENT)
		return run_end(r, 0);
	if (rc)
		return run_retry(r, &rc, &how) ? how : revoke_fail(r, rc);
	if (!rw_left)
		return revoke_taken(r);
	r->step = revoke_acquire;
	return STEP_NEXT;
}

static enum step revoke_held(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct inode *in = r->fop->in;
	bool any;

	rv->ls->nparked -= rv->parked;
	rv->parked = false;
	if (r->seg[0].state != SEG_HELD)
		return revoke_fail(r, r->seg[0].err ? r->seg[0].err : -EIO);
	pthread_mutex_lock(&in->lock);
	any = seg_next_grant_locked(in, RW_GRANTS, rv->holder, rv->start, rv->end, NULL);
	pthread_mutex_unlock(&in->lock);
	/* It may have returned the range while this was parked. */
	if (!any)
		return revoke_taken(r);
	in->tail_zero = false; /* the holder may have written behind EOF */
	r->step = revoke_look;
	return STEP_NEXT;
}

/* ---- failure
 * ------------------------------------------------------------------------------------ */

static enum step revoke_failed(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	uint64_t now = layouts_now(r->fs);
	int rc = (int)r->fop->result;

	r->lv.intent = 0;
	run_release(r, 0);
	if (!rv->give_up)
		rv->give_up = now + rv->ls->recall_ns;
	if (rc == -ENOSPC && now < rv->give_up && !revoke_stopping(rv->ls)) {
		uint64_t wait = rv->ls->recall_ns / RETRIES + 1;

		r->step = revoke_begin;
		layouts_nap(rv->ls, &rv->nap, &r->fop->op, MIN(rv->give_up, now + wait));
		return STEP_PARKED;
	}
	if (!revoke_stopping(rv->ls))
		log_msg(LOG_ERROR, "inode %llu: what holder %llu can write could not be moved: %s",
			(unsigned long long)r->fop->in->ino, (unsigned long long)rv->holder,
			err_text(rc));
	return run_end(r, rc);
}

enum step revoke_fail(struct file_run *r, int rc)
{
	r->fop->result = rc;
	run_mem_put(r->lv.mem, r->lv.len << BLOCK_SHIFT);
	r->lv.mem = NULL;
	if (r->lv.intent)
		return remove_begin(r, r->fop->in, FORK_STAGING, r->lv.at, r->lv.at + r->lv.len,
				    INTENT_PUNCH, r->lv.intent, revoke_failed);
	r->step = revoke_failed;
	return STEP_NEXT;
}

/* ---- beginning and end on the thread
 * ------------------------------------------------------------ */

enum step layout_revoke_start(struct file_run *r)
{
	r->step = revoke_begin;
	return STEP_NEXT;
}

static void revoke_done(struct file_op *fop)
{
	struct revoke *rv = fop->user;
	struct layouts *ls = rv->ls;

	/* Nobody goes on in blocks that the holder can write. */
	if (fop->result < 0) {
		LAYOUT_COUNT(ls->fs, revokes_failed, 1);
		seg_fail(fop->in, rv->holder, rv->asked_start, rv->asked_end, -EIO);
	}
	revoke_ended(ls, fop->in->ino, rv->holder, rv->asked_start, rv->asked_end);
	inode_put(fop->in);
	free(rv);
	layouts_ran(ls);
}

void revoke_start(struct layouts *ls, struct inode *in, uint64_t holder, uint64_t start,
		  uint64_t end)
{
	struct revoke *rv = calloc(1, sizeof(*rv));

	xassert(start < end);
	if (!rv) {
		seg_fail(in, holder, start, end, -ENOMEM);
		revoke_ended(ls, in->ino, holder, start, end);
		inode_put(in);
		return;
	}
	file_op_init(&rv->fop, FILE_LAYOUT_REVOKE, in, ls->ctx);
	rv->fop.done = revoke_done;
	rv->fop.user = rv;
	rv->ls = ls;
	rv->holder = holder;
	rv->asked_start = start;
	rv->asked_end = end;
	layouts_run(ls, &rv->fop);
}
