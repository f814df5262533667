/* SPDX-License-Identifier: MIT
 *
 * layout_commit.c - LAYOUT_COMMIT: what a holder wrote becomes part of the file.
 *
 * The usual commit is one transaction and takes no segment: commit_once checks everything under
 * fs->lock exclusive, converts, and sets size and times. It waits for nobody. What it meets that
 * does not go this way sends it through other steps first:
 *   setuid bits            commit_kill, then again
 *   bytes behind EOF       commit_tail: zeroed under a segment of EOF's block, then again. Only
 *                          when EOF leaves a block that no holder writes: see layout.h invariant 5
 *   staged blocks, or more than one transaction
 *                          commit_swap takes a SWAP segment of everything named, in front of
 *                          whoever waits for this holder's grants, and commit_roll goes on under
 *                          it. The segment keeps LAYOUT_RETURN and revokes away, so the check
 *                          holds.
 *   ATOMIC, more than one transaction
 *                          commit_intent decides it, commit_roll finishes it, or the reaper does
 *
 * The journal flushes the device before it logs the conversion: jrn_note_foreign_write() tells it
 * that there is something to be flushed which it did not see.
 */
#include "layout_ops.h"

#define COMMIT_TRANS_BLOCKS 384u
/* A step of the extent map, and the inode's record. */
#define CONVERT_STEP_BLOCKS (EXTMAP_STEP_BLOCKS + TRANS_TREE_OP)
#define STEP_RECORDS 64u

/* Why a transaction did not become the commit. Positive, beside negative codes. */
enum need { NEED_UNPRIVILEGED = 1, NEED_TAIL, NEED_SEGMENT, NEED_INTENT };

static enum step commit_once(struct file_run *r);
static enum step commit_roll(struct file_run *r);

static bool unchecked(const struct file_run *r)
{
	return unlikely(r->fs->opt.mutant == MUTANT_COMMIT_UNCHECKED);
}

/* ---- end ------------------------------------------------------------------------------------ */

static void commit_leave(struct file_run *r)
{
	if (r->lc.holder)
		holder_leave(r->fs->layouts, r->lc.holder);
	r->lc.holder = NULL;
}

static enum step commit_fail(struct file_run *r, int rc)
{
	commit_leave(r);
	/* Decided, and not undone: the next mount would finish it over whatever comes now. */
	if (r->lc.intent)
		fs_shutdown_writes(r->fs, rc, "inode %llu: an atomic commit could not be finished",
				   (unsigned long long)r->fop->in->ino);
	if (rc == -EINVAL)
		LAYOUT_COUNT(r->fs, refused_invalid, 1);
	return run_end(r, rc);
}

static enum step commit_over(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;

	fs_rdlock(r->fs);
	a->size = r->fop->in->core.size;
	fs_unlock(r->fs);
	LAYOUT_COUNT(r->fs, commits, 1);
	if (a->flags & LAYOUT_F_LAZY)
		LAYOUT_COUNT(r->fs, commits_lazy, 1);
	LAYOUT_COUNT(r->fs, commit_ranges, a->nranges);
	LAYOUT_COUNT(r->fs, commit_blocks, r->lc.blocks);
	layouts_note_latency(r->fs, LATENCY_COMMIT, layout_ticks() - r->lc.began);
	return run_end(r, 0);
}

static enum step commit_settle(struct file_run *r)
{
	enum step s = STEP_NEXT;

	if (!(r->fop->layout->flags & LAYOUT_F_LAZY))
		s = run_await_xid(r, r->lc.xid);
	if (s == STEP_DONE)
		return run_end(r, r->err);
	if (s == STEP_NEXT)
		r->step = commit_over;
	return s;
}

/* Done, but for those who have to hear of it: whoever reads from the answer on finds what the
 * holder wrote. */
static enum step commit_tell(struct file_run *r)
{
	const struct cache_ops *ops = r->fs->cache_ops;
	struct inode *in = r->fop->in;

	commit_leave(r);
	run_release(r, 0);
	r->step = commit_settle;
	if (ops)
		ops->attributes(r->fs->cache_arg, in->ino);
	if (r->lc.touched_start >= r->lc.touched_end)
		return STEP_NEXT;
	return layout_drop_stale(r, in, r->lc.touched_start, r->lc.touched_end, commit_settle);
}

/* ---- what this holder may commit: layout_commit_check.c ------------------------------------ */

/* Whole, before anything changes. fs->lock exclusive. */
static int check(struct file_run *r)
{
	return r->lc.valid || unchecked(r) ? 0 : commit_check(r);
}

/* ---- what has to be done before ------------------------------------------------------------- */

/* EOF moves out of its block, which may have bytes behind EOF that nobody answers for: no holder
 * writes that block. */
static int tail_unknown(struct file_run *r)
{
	struct inode *in = r->fop->in;
	uint64_t size = in->core.size;
	fileblk_t eof = block_floor(size);
	struct extent e;
	bool held;
	int rc;

	if (r->fop->layout->size <= size || in->tail_zero || !(size & BLOCK_MASK))
		return 0;
	pthread_mutex_lock(&in->lock);
	held = seg_next_grant_locked(in, RW_GRANT, 0, block_start(eof), block_start(eof + 1), NULL);
	pthread_mutex_unlock(&in->lock);
	if (held)
		return 0;
	rc = extmap_lookup(in, FORK_DATA, eof, 1, &e);
	return rc ? rc : e.state == EXT_WRITTEN;
}

static int any_staged(struct file_run *r)
{
	struct layout_args *a = r->fop->layout;
	struct inode *in = r->fop->in;
	struct extent e;
	int rc = 0;

	if (!(in->core.flags & INODE_F_STAGING))
		return 0;
	for (unsigned i = 0; i < a->nranges && !rc; i++)
		rc = extmap_list(in, FORK_STAGING, block_floor(a->ranges[i].offset),
				 block_floor(a->ranges[i].offset + a->ranges[i].length), false, &e,
				 1);
	return rc;
}

static int needs(struct file_run *r)
{
	const struct inode_core *core = &r->fop->in->core;
	int rc;

	if (((core->mode & 06000) || core->xattrs) && !r->lc.unprivileged)
		return NEED_UNPRIVILEGED;
	rc = tail_unknown(r);
	if (rc)
		return rc < 0 ? rc : NEED_TAIL;
	if (r->lc.atomic)
		return NEED_SEGMENT;
	rc = any_staged(r);
	return rc > 0 ? NEED_SEGMENT : rc;
}

static enum step commit_kill(struct file_run *r)
{
	enum step s;

	r->fop->flags |= FILE_F_KILL_PRIV;
	s = run_kill_priv(r, r->fop->in);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return commit_fail(r, r->err);
	r->lc.unprivileged = true;
	r->step = commit_once;
	return STEP_NEXT;
}

/* In front of everybody who waits for this holder to return something. */
static enum step acquire_front(struct file_run *r, enum seg_kind kind, uint64_t start, uint64_t end,
			       step_fn then)
{
	struct seg *s = &r->seg[0];
	int rc;

	s->kind = kind;
	s->start = start;
	s->end = end;
	s->op = &r->fop->op;
	s->holder = r->fop->layout->holder;
	r->step = then;
	rc = seg_acquire_front(r->fop->in, s);
	if (rc == ERR_PARKED)
		return STEP_PARKED;
	return rc ? commit_fail(r, rc) : STEP_NEXT;
}

static enum step commit_tail_end(struct file_run *r)
{
	if (r->err)
		return commit_fail(r, r->err);
	run_release(r, 0);
	r->step = commit_once;
	return STEP_NEXT;
}

static enum step commit_tail_held(struct file_run *r)
{
	uint64_t size;
	bool shared;

	fs_rdlock(r->fs);
	size = r->fop->in->core.size;
	shared = r->fop->in->core.flags & INODE_F_SHARED;
	fs_unlock(r->fs);
	/* EOF has moved, or the file was cloned meanwhile: look again */
	if (block_start(block_floor(size)) != r->seg[0].start || (shared && r->seg[0].kind != SEG_MAP))
		return commit_tail_end(r);
	return tail_begin(r, r->fop->in, r->fop->layout->size, true, commit_tail_end);
}

static enum step commit_tail(struct file_run *r)
{
	struct inode *in = r->fop->in;
	bool shared;
	fileblk_t eof;

	fs_rdlock(r->fs);
	eof = block_floor(in->core.size);
	shared = in->core.flags & INODE_F_SHARED;
	fs_unlock(r->fs);
	return acquire_front(r, shared ? SEG_MAP : SEG_WRITE_IO, block_start(eof),
			     block_start(eof + 1), commit_tail_held);
}

static enum step commit_swap(struct file_run *r)
{
	return acquire_front(r, SEG_SWAP, r->lc.hull_start, r->lc.hull_end, commit_roll);
}

/* ---- conversion ----------------------------------------------------------------------------- */

/* One piece of [*at, end): *at is behind it. */
static int convert_piece(struct file_run *r, struct trans *t, fileblk_t *at, fileblk_t end)
{
	struct inode *in = r->fop->in;
	nblocks_t done;
	int rc;

	if (in->core.flags & INODE_F_STAGING) {
		struct extent staged;

		rc = extmap_lookup(in, FORK_STAGING, *at, end - *at, &staged);
		if (!rc && staged.state != EXT_HOLE)
			rc = swap_piece(t, in, at, end, r->fop->layout->holder, &done);
		if (rc || staged.state != EXT_HOLE)
			return rc;
		end = staged.file + staged.len;
	}
	if (unchecked(r)) {
		struct extent e;

		rc = extmap_lookup(in, FORK_DATA, *at, end - *at, &e);
		if (rc || e.state == EXT_HOLE) {
			*at += rc ? 0 : e.len;
			return rc;
		}
		end = e.file + e.len;
	}
	rc = extmap_set_state(t, in, FORK_DATA, *at, end - *at, EXT_WRITTEN, STEP_RECORDS, &done);
	*at += done;
	return rc;
}

/* Ranges from (*i, *block) on, as many as fit. */
static int convert(struct file_run *r, struct trans *t, unsigned *i, fileblk_t *block,
		   nblocks_t *blocks)
{
	const struct layout_args *a = r->fop->layout;
	bool first = true;

	for (; *i < a->nranges; (*i)++) {
		fileblk_t at = MAX(*block, block_floor(a->ranges[*i].offset));
		fileblk_t end = block_floor(a->ranges[*i].offset + a->ranges[*i].length);

		while (at < end) {
			fileblk_t from = at;
			int rc;

			if (!first && trans_room(t) < (r->fop->in->core.flags & INODE_F_STAGING ?
						       SWAP_STEP_BLOCKS : CONVERT_STEP_BLOCKS)) {
				*block = at;
				return 0;
			}
			rc = convert_piece(r, t, &at, end);
			if (rc)
				return rc == -ERR_MAP_OVERLAP ? -ENXIO : rc;
			*blocks += at - from;
			first = false;
		}
		*block = 0;
	}
	return 0;
}

/* Size and times, with the last piece. Nothing fails after it. */
static int finish(struct file_run *r, struct trans *t)
{
	struct layout_args *a = r->fop->layout;
	struct inode *in = r->fop->in;
	int rc = staging_settle(in);

	if (rc)
		return rc;
	inode_touch(in, TOUCH_MTIME | TOUCH_CTIME);
	if (a->flags & LAYOUT_F_MTIME)
		in->core.mtime = a->mtime;
	if (a->size > in->core.size)
		in->core.size = a->size;
	rc = inode_write(t, in);
	/* EOF may lie now in a block that the holder wrote behind it, too. */
	if (!rc && a->size == in->core.size)
		in->tail_zero = false;
	return rc;
}

/* ---- one transaction ------------------------------------------------------------------------ */

static int try_once(struct file_run *r, struct trans *t, nblocks_t *blocks)
{
	fileblk_t block = 0;
	unsigned i = 0;
	int rc = trans_join_inode(t, r->fop->in);

	if (!rc)
		rc = check(r);
	if (!rc)
		rc = needs(r);
	if (!rc)
		rc = convert(r, t, &i, &block, blocks);
	if (!rc && i < r->fop->layout->nranges)
		rc = NEED_SEGMENT;
	return rc ? rc : finish(r, t);
}

static enum step commit_once(struct file_run *r)
{
	static const step_fn before[] = {
		[NEED_UNPRIVILEGED] = commit_kill, [NEED_TAIL] = commit_tail,
		[NEED_SEGMENT] = commit_swap,
	};
	nblocks_t blocks = 0;
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, COMMIT_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE; /* tree nodes only: the data has its place */
		rc = try_once(r, &t, &blocks);
		if (rc)
			run_trans_fail(r, &t, rc);
		else
			r->lc.xid = trans_commit(&t);
	}
	if (rc < 0)
		return run_retry(r, &rc, &how) ? how : commit_fail(r, rc);
	r->lc.blocks = rc ? 0 : blocks;
	r->step = rc ? before[rc] : commit_tell;
	return STEP_NEXT;
}

/* ---- under a segment ------------------------------------------------------------------------ */

/* Everything of an ATOMIC grant. */
static int roll_atomic(struct file_run *r, struct trans *t, nblocks_t *blocks, bool *over)
{
	fileblk_t at = block_floor(r->lc.hull_start), end = block_floor(r->lc.hull_end);
	int rc;

	*blocks = end - at;
	rc = atomic_some(t, r->fop->in, &at, end, 0, r->lc.intent);
	*over = at == end;
	return rc || *over || r->lc.intent ? rc : NEED_INTENT;
}

static int try_roll(struct file_run *r, struct trans *t, unsigned *i, fileblk_t *block,
		    nblocks_t *blocks)
{
	struct inode *in = r->fop->in;
	bool over = false;
	int rc = trans_join_inode(t, in);

	if (!rc)
		rc = check(r);
	/* The segment was for less than an ATOMIC grant. */
	if (!rc && (r->lc.hull_start < r->seg[0].start || r->lc.hull_end > r->seg[0].end))
		return NEED_SEGMENT;
	if (rc)
		return rc;
	r->lc.valid = true;
	if (r->lc.atomic) {
		rc = roll_atomic(r, t, blocks, &over);
	} else {
		rc = convert(r, t, i, block, blocks);
		over = *i == r->fop->layout->nranges;
	}
	if (rc)
		return rc;
	if (over) {
		*i = r->fop->layout->nranges;
		rc = finish(r, t);
	} else {
		rc = inode_write(t, in);
	}
	if (!rc)
		note_unshare(in);
	return rc;
}

/* From here on it cannot fail half-way. */
static enum step commit_intent(struct file_run *r)
{
	struct intent_disk rec = {
		.type = put32(INTENT_ATOMIC), .ino = put64(r->fop->in->ino),
		.a = put64(block_floor(r->lc.hull_start)), .b = put64(block_floor(r->lc.hull_end)),
		.c = put64(r->fop->layout->size),
	};
	uint64_t intent = 0;
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, TRANS_TREE_OP + TRANS_ALLOC_OP);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = intent_add(&t, &rec, &intent);
		if (rc)
			run_trans_fail(r, &t, rc);
		else
			trans_commit(&t);
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : commit_fail(r, rc);
	r->lc.intent = intent;
	r->step = commit_roll;
	return STEP_NEXT;
}

static enum step commit_roll(struct file_run *r)
{
	struct layout_commit_state *lc = &r->lc;
	unsigned i = lc->at;
	fileblk_t block = lc->block;
	nblocks_t blocks = 0;
	struct trans t;
	enum step how;
	int rc = 0;

	if (!lc->holder)
		rc = holder_enter(r->fs->layouts, r->fop->layout->holder, false, &lc->holder);
	if (!rc)
		rc = trans_begin(r->fs, &t, COMMIT_TRANS_BLOCKS);
	else
		return commit_fail(r, rc);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = try_roll(r, &t, &i, &block, &blocks);
		if (rc)
			run_trans_fail(r, &t, rc);
		else
			lc->xid = trans_commit(&t);
	}
	if (rc < 0)
		return run_retry(r, &rc, &how) ? how : commit_fail(r, rc);
	if (rc == NEED_SEGMENT) {
		commit_leave(r);
		run_release(r, 0);
	}
	if (rc) {
		r->step = rc == NEED_INTENT ? commit_intent : commit_swap;
		return STEP_NEXT;
	}
	lc->at = i;
	lc->block = block;
	lc->blocks = lc->atomic ? blocks : lc->blocks + blocks;
	r->space_tries = r->reaper_tries = 0;
	if (i < r->fop->layout->nranges)
		return run_yield(r, commit_roll);
	lc->intent = 0;
	r->step = commit_tell;
	return STEP_NEXT;
}

/* ---- start ---------------------------------------------------------------------------------- */

static int check_args(struct file_run *r)
{
	const uint64_t limit = block_start(FILE_MAX_BLOCKS);
	struct layout_args *a = r->fop->layout;

	if (a->nranges > LAYOUT_MAX_RANGES || !a->holder ||
	    (a->flags & ~(LAYOUT_F_LAZY | LAYOUT_F_MTIME | LAYOUT_F_INVALIDATED)) ||
	    ((a->flags & LAYOUT_F_MTIME) && a->mtime.nsec >= 1000000000u))
		return -EINVAL;
	r->lc.hull_start = UINT64_MAX;
	for (unsigned i = 0; i < a->nranges; i++) {
		const struct layout_range *range = &a->ranges[i];

		if (!range->length || ((range->offset | range->length) & BLOCK_MASK) ||
		    range->offset >= limit || range->length > limit - range->offset)
			return -EINVAL;
		r->lc.hull_start = MIN(r->lc.hull_start, range->offset);
		r->lc.hull_end = MAX(r->lc.hull_end, range->offset + range->length);
	}
	if (a->size > FILE_MAX_BYTES) {
		LAYOUT_COUNT(r->fs, refused_size, 1);
		return -ERANGE;
	}
	return 0;
}

enum step layout_commit_start(struct file_run *r)
{
	int rc;

	r->lc.began = layout_ticks();
	rc = check_args(r);
	if (rc)
		return commit_fail(r, rc);
	r->fop->layout->flags &= ~LAYOUT_F_INVALIDATED;
	if (r->fs->opt.mutant != MUTANT_CONVERT_UNFLUSHED)
		jrn_note_foreign_write(r->fs);
	r->step = commit_once;
	return STEP_NEXT;
}
