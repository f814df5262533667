/* SPDX-License-Identifier: MIT
 *
 * file_shift.c - fallocate's COLLAPSE_RANGE and INSERT_RANGE: a range of blocks leaves a file, or a
 * hole comes in, and everything behind it changes its place.
 *
 * One MAP segment from the range to the end of all files, held until everything has moved. The
 * first transaction sets the size and decides; what it leaves is in its intent.
 *
 * Bytes behind EOF: the block that the file ends in moves along with EOF, by whole blocks, so it
 * stays the last one, and what is known of its tail (tail_zero, shrink_xid) stays true.
 * Preallocation behind EOF moves too.
 *
 * Collapse, invariant: before a block at `at` moves, [at - by, at) is empty: of what was to go, it
 * has been freed; the rest was filled from [.., at) up to at - by only. So freeing what is there
 * comes first, every time, and the intent needs no word about how far that came.
 * Insert, from the end backwards: [end, end + by) is empty.
 */
#include "file_remap.h"

#define STEP_BLOCKS (2 * REMAP_EDIT_BLOCKS)

static bool collapse_done(const struct shift_state *sh) { return sh->at >= FILE_MAX_BLOCKS; }
static bool insert_done(const struct shift_state *sh) { return sh->end <= sh->at; }

static bool may_step(const struct trans *t, unsigned steps, unsigned blocks)
{
	return steps < REMAP_STEPS && trans_room(t) >= blocks + REMAP_END_BLOCKS;
}

/* `e` to another place, which is empty but for itself. */
static int move(struct trans *t, struct inode *in, struct extent e, fileblk_t to)
{
	int rc = extmap_detach(t, in, FORK_DATA, e.file, e.len);

	e.file = to;
	return rc ? rc : extmap_add(t, in, FORK_DATA, &e);
}

static int shift_end(struct trans *t, struct inode *in, enum intent_type type, bool left,
		     struct shift_state *sh)
{
	struct intent_disk rec = {
		.type = put32(type), .ino = put64(in->ino), .a = put64(sh->at), .b = put64(sh->by),
		.c = put64(type == INTENT_INSERT ? sh->end : 0),
	};
	int rc = intent_keep(t, &rec, left, &sh->intent);

	if (!rc)
		rc = note_moved(t, in, left);
	return rc ? rc : inode_write(t, in);
}

/* One reference count's part of an extent at a time, so that there is always room for the next. */
static int free_collapsed(struct trans *t, struct inode *in, const struct shift_state *sh,
			  unsigned *steps, bool *left)
{
	fileblk_t start = sh->at - sh->by, rest = sh->at;
	int rc = 0;

	for (; !rc && rest > start && may_step(t, *steps, EXTMAP_STEP_BLOCKS); ++*steps)
		rc = extmap_remove(t, in, FORK_DATA, start, rest, 1, &rest);
	*left = rest > start;
	return rc;
}

int collapse_some(struct trans *t, struct inode *in, struct shift_state *sh)
{
	unsigned steps = 0;
	bool left = false;
	int rc = trans_join_inode(t, in);

	if (!rc)
		rc = free_collapsed(t, in, sh, &steps, &left);
	for (; !rc && !left && !collapse_done(sh) && may_step(t, steps, STEP_BLOCKS); steps++) {
		struct extent e;

		rc = extmap_list(in, FORK_DATA, sh->at, FILE_MAX_BLOCKS, false, &e, 1);
		if (rc < 0)
			return rc;
		if (rc == 0) {
			sh->at = FILE_MAX_BLOCKS;
			break;
		}
		rc = move(t, in, e, e.file - sh->by);
		sh->at = e.file + e.len;
	}
	if (rc)
		return rc;
	note_unshare(in);
	return shift_end(t, in, INTENT_COLLAPSE, !collapse_done(sh), sh);
}

int insert_some(struct trans *t, struct inode *in, struct shift_state *sh)
{
	int rc = trans_join_inode(t, in);

	for (unsigned n = 0; !rc && !insert_done(sh) && may_step(t, n, STEP_BLOCKS); n++) {
		struct extent e;

		rc = extmap_last(in, FORK_DATA, sh->at, sh->end, &e);
		if (rc == -ENOENT) {
			sh->end = sh->at;
			rc = 0;
			break;
		}
		if (!rc)
			rc = move(t, in, e, e.file + sh->by);
		sh->end = e.file;
	}
	return rc ? rc : shift_end(t, in, INTENT_INSERT, !insert_done(sh), sh);
}

/* ---- the operation -------------------------------------------------------------------------- */

static bool collapses(const struct file_run *r) { return r->fop->kind == FILE_COLLAPSE; }

static void shift_first(struct file_run *r)
{
	r->fop->in->core.size += collapses(r) ? -r->fop->len : r->fop->len;
	inode_touch(r->fop->in, TOUCH_MTIME | TOUCH_CTIME);
}

static int shift_next(struct file_run *r, struct trans *t, union remap_state *state)
{
	return collapses(r) ? collapse_some(t, r->fop->in, &state->sh) :
			      insert_some(t, r->fop->in, &state->sh);
}

static bool shift_done(const struct file_run *r, const union remap_state *state)
{
	return collapses(r) ? collapse_done(&state->sh) : insert_done(&state->sh);
}

static const struct remap_kind shift = {
	.first = shift_first, .some = shift_next, .done = shift_done,
	.unfinished = "its blocks could not be moved to the end",
};

/* -EFBIG: the last block, or EOF, would come to lie too far. *end: of everything mapped. fs->lock
 * shared. */
static int insert_fits(const struct file_op *fop, fileblk_t *end)
{
	struct extent last;
	int rc = extmap_last(fop->in, FORK_DATA, 0, FILE_MAX_BLOCKS, &last);

	*end = rc ? 0 : last.file + last.len;
	if (rc && rc != -ENOENT)
		return rc;
	if (fop->len > FILE_MAX_BYTES - fop->in->core.size ||
	    block_floor(fop->len) > FILE_MAX_BLOCKS - *end)
		return -EFBIG;
	return 0;
}

static enum step shift_locked(struct file_run *r)
{
	struct file_op *fop = r->fop;
	fileblk_t end = FILE_MAX_BLOCKS, at = block_floor(fop->offset);
	nblocks_t by;
	uint64_t size;
	enum step s;
	int rc = 0;

	fs_rdlock(r->fs);
	size = fop->in->core.size;
	if (collapses(r))
		rc = fop->offset + fop->len >= size ? -EINVAL : 0;
	else
		rc = fop->offset >= size ? -EINVAL : insert_fits(fop, &end);
	fs_unlock(r->fs);
	if (rc)
		return run_end(r, rc);
	s = run_kill_priv(r, fop->in);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return run_end(r, r->err);
	by = block_floor(fop->len);
	return remap_begin(r, &shift, (union remap_state){
		.sh = { .at = collapses(r) ? at + by : at, .end = MAX(end, at), .by = by },
	});
}

enum step file_shift_start(struct file_run *r)
{
	struct file_op *fop = r->fop;

	if (!fop->len || ((fop->offset | fop->len) & BLOCK_MASK))
		return run_end(r, -EINVAL);
	if (fop->offset > FILE_MAX_BYTES || fop->len > FILE_MAX_BYTES - fop->offset)
		return run_end(r, -EFBIG);
	r->step = shift_locked;
	return run_acquire(r, 0, SEG_MAP, fop->offset, UINT64_MAX);
}
