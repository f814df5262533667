/* SPDX-License-Identifier: MIT
 *
 * layout_commit_check.c - may this holder commit that? Every range has to lie in RW grants that it
 * holds now, and the size too; what it says of the device plays no part.
 */
#include "layout_ops.h"

/* in->lock held. */
static int not_held(struct file_run *r)
{
	if (holder_state_of(r->fs->layouts, r->fop->layout->holder) == HOLDER_LOST) {
		LAYOUT_COUNT(r->fs, refused_lost, 1);
		return -EOWNERDEAD;
	}
	LAYOUT_COUNT(r->fs, refused_not_held, 1);
	return -ENXIO;
}

/* The grant is one that the commit is about. */
static int touch(struct file_run *r, const struct seg *s)
{
	struct layout_commit_state *lc = &r->lc;

	if (r->fop->layout->seq && GRANT_OF(s)->seq > r->fop->layout->seq) {
		LAYOUT_COUNT(r->fs, refused_stale, 1);
		return -ENXIO;
	}
	lc->ghost |= (GRANT_OF(s)->flags & GRANT_F_GHOST) != 0;
	lc->touched_start = MIN(lc->touched_start, s->start);
	lc->touched_end = MAX(lc->touched_end, s->end);
	return 0;
}

/* The grant holds a range of the commit. An ATOMIC one is committed whole, and alone. */
static int touch_range(struct file_run *r, const struct seg *s)
{
	struct layout_commit_state *lc = &r->lc;
	unsigned flags = GRANT_OF(s)->flags;

	if (flags & LAYOUT_F_ATOMIC) {
		if (lc->plain || (lc->atomic &&
				  (lc->hull_start != s->start || lc->hull_end != s->end)))
			return -EINVAL;
		lc->atomic = true;
		lc->hull_start = s->start;
		lc->hull_end = s->end;
	} else {
		if (lc->atomic)
			return -EINVAL;
		lc->plain = true;
	}
	return touch(r, s);
}

static int check_range(struct file_run *r, const struct layout_range *range)
{
	uint64_t at = range->offset, end = range->offset + range->length;
	struct seg *s = NULL;

	while (at < end) {
		int rc;

		s = seg_next_grant_locked(r->fop->in, RW_GRANT, r->fop->layout->holder,
					  range->offset, end, s);
		if (!s || s->start > at)
			return not_held(r);
		rc = touch_range(r, s);
		if (rc)
			return rc;
		at = MAX(at, s->end);
	}
	return 0;
}

static int check_ranges(struct file_run *r)
{
	struct layout_commit_state *lc = &r->lc;
	struct layout_args *a = r->fop->layout;
	struct seg *s = seg_next_grant_locked(r->fop->in, RW_GRANT, a->holder, lc->hull_start,
					      lc->hull_end, NULL);

	/* Mostly everything lies in one grant. */
	if (s && s->start <= lc->hull_start && lc->hull_end <= s->end)
		return touch_range(r, s);
	for (unsigned i = 0; i < a->nranges; i++) {
		int rc = check_range(r, &a->ranges[i]);

		if (rc)
			return rc;
	}
	return 0;
}

/* No ranges: blocks that were written before were rewritten, anywhere. When something of the inode
 * is being taken from the holder, or was, that may have been there, and nothing says that it was
 * not. */
static int check_any(struct file_run *r)
{
	struct seg *s = NULL;
	bool any = false;
	int rc = 0;

	while (!rc && (s = seg_next_grant_locked(r->fop->in, RW_GRANT, r->fop->layout->holder, 0,
						 UINT64_MAX, s))) {
		any = true;
		rc = touch(r, s);
	}
	if (rc || !any)
		return rc ? rc : not_held(r);
	if (holder_state_of(r->fs->layouts, r->fop->layout->holder) == HOLDER_LOST &&
	    lost_revoked(r->fs, r->fop->in->ino, r->fop->layout->holder))
		return not_held(r);
	return 0;
}

/* Nothing becomes written behind the end of the file: whoever moved EOF over it later would show
 * it, though a file that grows grows by zeros. */
static int check_size(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;
	uint64_t size = MAX(a->size, r->fop->in->core.size);
	struct seg *s;

	if (a->nranges && r->lc.hull_end > block_start(block_ceil(size))) {
		LAYOUT_COUNT(r->fs, refused_size, 1);
		return -ERANGE;
	}
	if (a->size <= r->fop->in->core.size)
		return 0;
	s = seg_next_grant_locked(r->fop->in, RW_GRANT, a->holder, a->size - 1, a->size, NULL);
	if (s)
		return touch(r, s);
	LAYOUT_COUNT(r->fs, refused_size, 1);
	return -ERANGE;
}

/* Under a ghost nobody knows what was granted, but the records say which unwritten blocks the
 * holder was told: only those become written. What is written already may be named again: an answer
 * may have been lost with the daemon. */
static int check_exposed(struct file_run *r, fileblk_t at, fileblk_t end)
{
	struct inode *in = r->fop->in;
	uint64_t holder = r->fop->layout->holder;

	while (at < end) {
		struct extent e, staged = { .len = end - at };
		int rc = 0;

		if (in->core.flags & INODE_F_STAGING)
			rc = extmap_lookup(in, FORK_STAGING, at, end - at, &staged);
		if (!rc)
			rc = extmap_lookup(in, FORK_DATA, at, staged.len, &e);
		if (rc)
			return rc;
		if (staged.state != EXT_HOLE) {
			staged.len = e.len;
			rc = exposure_covers(r->fs, in->ino, holder, &staged, true);
		} else {
			rc = e.state == EXT_WRITTEN ? 1 : e.state == EXT_HOLE ? 0 :
				exposure_covers(r->fs, in->ino, holder, &e, false);
		}
		if (rc <= 0)
			return rc ? rc : not_held(r);
		at += e.len;
	}
	return 0;
}

int commit_check(struct file_run *r)
{
	struct layout_commit_state *lc = &r->lc;
	struct layout_args *a = r->fop->layout;
	struct inode *in = r->fop->in;
	int rc;

	lc->atomic = lc->plain = lc->ghost = false;
	lc->touched_start = UINT64_MAX;
	lc->touched_end = 0;
	pthread_mutex_lock(&in->lock);
	rc = a->nranges ? check_ranges(r) : check_any(r);
	if (!rc)
		rc = check_size(r);
	pthread_mutex_unlock(&in->lock);
	if (rc || !lc->ghost)
		return rc;
	for (unsigned i = 0; !rc && i < a->nranges; i++)
		rc = check_exposed(r, block_floor(a->ranges[i].offset),
				   block_floor(a->ranges[i].offset + a->ranges[i].length));
	if (!rc && a->size > in->core.size)
		rc = check_exposed(r, block_floor(a->size - 1), block_ceil(a->size));
	return rc;
}
