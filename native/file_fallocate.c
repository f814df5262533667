/* SPDX-License-Identifier: MIT
 *
 * file_fallocate.c - fallocate: allocate, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE.
 *
 * One MAP segment over the blocks (from the block of EOF on when the size grows). Definitions: the
 * range in bytes is [off, end); its edges are the parts of its first and last block that it covers
 * only partly; the rest are whole blocks.
 *
 *   punch      edges that are written are rewritten with zeros, whole blocks are unmapped (with an
 *              intent when there are many)
 *   zero       edges as above; whole written blocks become unwritten, shared ones are unmapped;
 *              then as allocate
 *   allocate   holes become unwritten; on failure the holes that were filled are holes again
 *
 * An edge whose rest lies behind EOF is no edge: the whole block goes.
 */
#include "file_run.h"

#include <string.h>

#define STEP_TRANS_BLOCKS 256u
#define STEP_RECORDS 64u
#define COUNT_BATCH 256u
#define MODES (FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE)

static enum step fa_locked(struct file_run *r);
static enum step fa_edges(struct file_run *r);
static enum step fa_zero(struct file_run *r);
static enum step fa_count(struct file_run *r);
static enum step fa_allocate(struct file_run *r);
static enum step fa_undo(struct file_run *r);

static bool grows(const struct file_op *fop, uint64_t size)
{
	return !(fop->mode & FALLOC_KEEP_SIZE) && fop->offset + fop->len > size;
}

static enum step fa_over(struct file_run *r)
{
	free(r->fa.holes);
	r->fa.holes = NULL;
	return run_end(r, r->err);
}

static enum step fa_fail(struct file_run *r, int rc)
{
	if (rc && !r->err)
		r->err = rc;
	r->step = fa_over;
	return STEP_NEXT;
}

static enum step fa_acquire(struct file_run *r)
{
	struct file_op *fop = r->fop;
	uint64_t size;

	fs_rdlock(r->fs);
	size = fop->in->core.size;
	fs_unlock(r->fs);
	r->low = grows(fop, size) ? MIN(size, fop->offset) : fop->offset;
	r->low = block_floor(r->low) << BLOCK_SHIFT;
	r->step = fa_locked;
	return run_acquire(r, 0, SEG_MAP, r->low,
			   block_ceil(fop->offset + fop->len) << BLOCK_SHIFT);
}

static enum step fa_locked(struct file_run *r)
{
	struct file_op *fop = r->fop;
	struct inode *in = fop->in;
	struct fallocate_state *fa = &r->fa;
	uint64_t size;
	bool grow;
	enum step s;

	fs_rdlock(r->fs);
	size = in->core.size;
	fs_unlock(r->fs);
	grow = grows(fop, size);
	if (grow && (block_floor(size) << BLOCK_SHIFT) < r->low) {
		run_release(r, 0);
		r->step = fa_acquire;
		return STEP_NEXT;
	}
	s = run_kill_priv(r, in);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return fa_fail(r, 0);
	fa->off = fop->offset;
	fa->end = fop->offset + fop->len;
	fa->b0 = block_floor(fa->off);
	fa->b1 = block_ceil(fa->end);
	fa->at = fa->b0;
	/* The rest of the last block is behind EOF, before and after: no bytes to keep. */
	if (fa->end >= size && !grow)
		fa->end = fa->b1 << BLOCK_SHIFT;
	r->edge = 0;
	if (fop->mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE))
		return tail_begin(r, in, grow ? fop->offset + fop->len : 0, true, fa_edges);
	return tail_begin(r, in, grow ? fop->offset + fop->len : 0, true, fa_count);
}

/* ---- edges ---------------------------------------------------------------------------------- */

/* First and last whole block (exclusive) of the range. */
static void whole_blocks(const struct fallocate_state *fa, fileblk_t *b0, fileblk_t *b1)
{
	*b0 = block_ceil(fa->off);
	*b1 = MAX(block_floor(fa->end), *b0);
}

/* Edge n (0, 1) as bytes; false: there is none. */
static bool edge_of(const struct fallocate_state *fa, unsigned n, uint64_t *from, uint64_t *to)
{
	if (n == 0) {
		*from = fa->off;
		*to = MIN(fa->end, block_ceil(fa->off) << BLOCK_SHIFT);
	} else {
		*from = MAX(block_floor(fa->end), block_ceil(fa->off)) << BLOCK_SHIFT;
		*to = fa->end;
	}
	return *from < *to;
}

static enum step fa_edges_done(struct file_run *r)
{
	fileblk_t b0, b1;

	if (!(r->fop->mode & FALLOC_PUNCH_HOLE)) {
		r->step = fa_zero;
		return STEP_NEXT;
	}
	whole_blocks(&r->fa, &b0, &b1);
	return remove_begin(r, r->fop->in, FORK_DATA, b0, b1, INTENT_PUNCH, 0, fa_count);
}

static enum step fa_edges(struct file_run *r)
{
	struct inode *in = r->fop->in;
	uint64_t from, to;
	struct extent ext;
	int rc;

	if (r->err)
		return fa_fail(r, 0);
	while (r->edge < 2) {
		if (!edge_of(&r->fa, r->edge++, &from, &to))
			continue;
		fs_rdlock(r->fs);
		rc = extmap_lookup(in, FORK_DATA, block_floor(from), 1, &ext);
		fs_unlock(r->fs);
		if (rc < 0)
			return fa_fail(r, rc);
		if (ext.state == EXT_WRITTEN)
			return write_begin(r, in, from, to, NULL, false, 0, fa_edges);
	}
	return fa_edges_done(r);
}

/* ---- zero: written to unwritten ------------------------------------------------------------- */

static int zero_some(struct trans *t, struct inode *in, fileblk_t *at, fileblk_t b1)
{
	for (unsigned n = 0; *at < b1 && n < STEP_RECORDS && (n == 0 || trans_room(t) > 96); n++) {
		struct extent ext;
		bool shared;
		nblocks_t len;
		fileblk_t rest = *at;
		int rc = extmap_lookup(in, FORK_DATA, *at, b1 - *at, &ext);

		if (rc < 0)
			return rc;
		len = ext.len;
		if (ext.state == EXT_WRITTEN) {
			rc = extmap_is_shared(in, &ext, &shared, &len);
			if (rc < 0)
				return rc;
			len = MIN(len, ext.len);
			if (shared)
				rc = extmap_remove(t, in, FORK_DATA, *at, *at + len, STEP_RECORDS,
						   &rest);
			else
				rc = extmap_set_state(t, in, FORK_DATA, *at, len, EXT_UNWRITTEN,
						      STEP_RECORDS, &len);
			if (rc < 0)
				return rc;
			if (rest > *at)
				return 0;
		}
		*at += len;
	}
	return 0;
}

static enum step fa_zero(struct file_run *r)
{
	struct inode *in = r->fop->in;
	fileblk_t b0, b1, at;
	struct trans t;
	enum step how;
	int rc;

	whole_blocks(&r->fa, &b0, &b1);
	at = MAX(r->fa.at, b0);
	if (at < b1) {
		rc = trans_begin(r->fs, &t, STEP_TRANS_BLOCKS);
		if (!rc) {
			t.alloc_flags |= ALLOC_USE_RESERVE;
			rc = trans_join_inode(&t, in);
			if (!rc)
				rc = zero_some(&t, in, &at, b1);
			if (!rc)
				rc = inode_write(&t, in);
			if (rc) {
				run_trans_fail(r, &t, rc);
			} else {
				note_unshare(in);
				trans_commit(&t);
			}
		}
		if (rc)
			return run_retry(r, &rc, &how) ? how : fa_fail(r, rc);
		r->fa.at = at;
		if (at < b1)
			return run_yield(r, fa_zero);
	}
	r->fa.at = r->fa.b0;
	r->step = fa_count;
	return STEP_NEXT;
}

/* ---- allocate ------------------------------------------------------------------------------- */

/* Is there room for every hole? Under the MAP segment the answer stays true but for other files'
 * allocations. */
static enum step fa_count(struct file_run *r)
{
	struct fallocate_state *fa = &r->fa;
	struct alloc_space space;
	enum step how;
	int rc = 0;

	if (r->err)
		return fa_fail(r, 0);
	if (r->fop->mode & FALLOC_PUNCH_HOLE) {
		r->step = fa_allocate;
		return STEP_NEXT;
	}
	fs_rdlock(r->fs);
	for (unsigned n = 0; fa->at < fa->b1 && n < COUNT_BATCH; n++) {
		struct extent ext;

		rc = extmap_lookup(r->fop->in, FORK_DATA, fa->at, fa->b1 - fa->at, &ext);
		if (rc < 0)
			break;
		fa->needed += ext.state == EXT_HOLE ? ext.len : 0;
		fa->at += ext.len;
	}
	fs_unlock(r->fs);
	if (rc < 0)
		return fa_fail(r, rc);
	if (fa->at < fa->b1)
		return run_yield(r, fa_count);
	alloc_statfs(r->fs, &space);
	if (fa->needed > space.avail) {
		rc = -ENOSPC;
		return run_retry(r, &rc, &how) ? how : fa_fail(r, rc);
	}
	fa->at = fa->b0;
	r->step = fa_allocate;
	return STEP_NEXT;
}

static int remember_hole(struct fallocate_state *fa, fileblk_t at, nblocks_t len)
{
	struct hole *last = fa->nholes ? &fa->holes[fa->nholes - 1] : NULL;

	if (last && last->file + last->len == at) {
		last->len += len;
		return 0;
	}
	if (fa->nholes == fa->cap) {
		size_t cap = fa->cap ? 2 * fa->cap : 16;
		struct hole *more = realloc(fa->holes, cap * sizeof(*more));

		if (!more)
			return -ENOMEM;
		fa->holes = more;
		fa->cap = cap;
	}
	fa->holes[fa->nholes++] = (struct hole){ at, len };
	return 0;
}

/* Fill the next hole at or behind *at. */
static int fill_one(struct trans *t, struct inode *in, struct fallocate_state *fa, fileblk_t *at)
{
	struct extent ext;
	nblocks_t done;
	int rc = extmap_lookup(in, FORK_DATA, *at, fa->b1 - *at, &ext);

	if (rc < 0)
		return rc;
	done = ext.len;
	if (ext.state == EXT_HOLE) {
		done = 0;
		rc = extmap_allocate(t, in, FORK_DATA, *at, ext.len, 0, STEP_RECORDS, &done);
		if (rc < 0)
			return rc;
		/* Noted before the commit; one too many is harmless, because undo skips what is a
		 * hole again. */
		if (done)
			rc = remember_hole(fa, *at, done);
		else
			rc = -ENOSPC;
	}
	*at += done;
	return MIN(rc, 0);
}

/* What the last transaction of each mode does besides: size, flag, times. */
static void settle(struct file_run *r, bool last)
{
	struct inode *in = r->fop->in;
	uint64_t end = r->fop->offset + r->fop->len;

	if (!(r->fop->mode & FALLOC_PUNCH_HOLE) && end > in->core.size)
		in->core.flags |= INODE_F_PREALLOC;
	if (!last)
		return;
	if (grows(r->fop, in->core.size))
		in->core.size = end;
	inode_touch(in, TOUCH_MTIME | TOUCH_CTIME);
}

static int fill_trans(struct file_run *r, fileblk_t *at)
{
	struct inode *in = r->fop->in;
	struct fallocate_state *fa = &r->fa;
	struct trans t;
	size_t nholes = fa->nholes;
	struct hole last = nholes ? fa->holes[nholes - 1] : (struct hole){ 0 };
	int rc;

	rc = trans_begin(r->fs, &t, STEP_TRANS_BLOCKS);
	if (rc)
		return rc;
	if (r->fop->mode & FALLOC_PUNCH_HOLE) { /* nothing to fill: only the times */
		t.alloc_flags |= ALLOC_USE_RESERVE;
		*at = fa->b1;
	}
	rc = trans_join_inode(&t, in);
	for (unsigned n = 0; !rc && *at < fa->b1 && n < STEP_RECORDS && (n == 0 ||
		trans_room(&t) > 96); n++)
		rc = fill_one(&t, in, fa, at);
	if (!rc) {
		settle(r, *at >= fa->b1);
		rc = inode_write(&t, in);
	}
	if (rc) {
		fa->nholes = nholes;
		if (nholes)
			fa->holes[nholes - 1] = last;
		return run_trans_fail(r, &t, rc);
	}
	trans_commit(&t);
	return 0;
}

static enum step fa_done(struct file_run *r)
{
	if (r->fop->flags & FILE_F_DSYNC)
		return run_durable(r, r->fop->in, fa_over);
	r->step = fa_over;
	return STEP_NEXT;
}

static enum step fa_allocate(struct file_run *r)
{
	fileblk_t at = r->fa.at;
	enum step how;
	int rc = fill_trans(r, &at);

	if (rc) {
		if (run_retry(r, &rc, &how))
			return how;
		r->fa.undo_err = rc;
		r->step = fa_undo;
		return STEP_NEXT;
	}
	r->space_tries = r->reaper_tries = 0;
	r->fa.at = at;
	if (at < r->fa.b1)
		return run_yield(r, fa_allocate);
	return fa_done(r);
}

/* The holes that were filled become holes again; the caller sees the failure that led here. */
static enum step fa_undo(struct file_run *r)
{
	struct fallocate_state *fa = &r->fa;
	struct hole h;

	if (r->err || fa->nholes == 0)
		return fa_fail(r, fa->undo_err);
	h = fa->holes[--fa->nholes];
	return remove_begin(r, r->fop->in, FORK_DATA, h.file, h.file + h.len, INTENT_PUNCH, 0,
			    fa_undo);
}

enum step file_fallocate_start(struct file_run *r)
{
	struct file_op *fop = r->fop;
	bool punch = fop->mode & FALLOC_PUNCH_HOLE;

	if ((fop->mode & ~MODES) || (punch && fop->mode != (FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE)))
		return run_end(r, -EOPNOTSUPP);
	if (fop->len == 0)
		return run_end(r, -EINVAL);
	if (fop->offset > FILE_MAX_BYTES || fop->len > FILE_MAX_BYTES - fop->offset)
		return run_end(r, -EFBIG);
	r->step = fa_acquire;
	return STEP_NEXT;
}
