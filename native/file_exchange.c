/* SPDX-License-Identifier: MIT
 *
 * file_exchange.c - two ranges of blocks change places, of two files or one, whole or not at all.
 *
 * Segments: MAP on both ranges in order of inode number; one over both ranges when the files are
 * the same. They are held until everything has moved.
 *
 * Only whole blocks below both ends of file take part: the block that a file ends in, whose bytes
 * behind EOF are undefined, never does. Sizes stay, and whatever is behind EOF.
 *
 * A block keeps its users, its state and its flags. What the inodes say of their blocks follows:
 *   - shared blocks: both files may map some from then on;
 *   - a lost holder may reach blocks of one of the files: whoever frees a block later sees the
 *     other one, of which that holder knows nothing. So both count as files that share blocks,
 *     whose blocks are kept as long as any holder is lost (layout_release.c).
 */
#include "file_remap.h"

#define STEP_BLOCKS (4 * REMAP_EDIT_BLOCKS)

/* One extent or hole of each file, *len blocks of it. */
static int exchange_one(struct trans *t, struct inode *in, fileblk_t a, struct inode *dst,
			fileblk_t b, nblocks_t max, nblocks_t *len)
{
	struct extent x, y;
	int rc = extmap_lookup(in, FORK_DATA, a, max, &x);

	if (rc >= 0)
		rc = extmap_lookup(dst, FORK_DATA, b, x.len, &y);
	if (rc < 0)
		return rc;
	*len = x.len = y.len;
	if (x.state != EXT_HOLE)
		rc = extmap_detach(t, in, FORK_DATA, a, *len);
	if (!rc && y.state != EXT_HOLE)
		rc = extmap_detach(t, dst, FORK_DATA, b, *len);
	x.file = b;
	y.file = a;
	if (!rc && x.state != EXT_HOLE)
		rc = extmap_add(t, dst, FORK_DATA, &x);
	if (!rc && y.state != EXT_HOLE)
		rc = extmap_add(t, in, FORK_DATA, &y);
	return rc;
}

static void note_users(struct inode *in, struct inode *dst)
{
	const struct layout_hooks *hooks = in->fs->layout_hooks;
	uint32_t shared = (in->core.flags | dst->core.flags) & INODE_F_SHARED;
	bool reached = in != dst && hooks && (hooks->drop_holder(in->fs, in) ||
					      hooks->drop_holder(in->fs, dst));

	if (reached)
		shared = INODE_F_SHARED;
	in->core.flags |= shared;
	dst->core.flags |= shared;
	/* Asked about them as they are now, it remembers that blocks outlive their file. */
	if (reached) {
		hooks->drop_holder(in->fs, in);
		hooks->drop_holder(in->fs, dst);
	}
}

static int keep_intent(struct trans *t, struct inode *in, struct inode *dst,
		       struct exchange_state *ex)
{
	struct intent_disk rec = {
		.type = put32(INTENT_EXCHANGE), .ino = put64(in->ino), .a = put64(ex->a),
		.b = put64(dst->ino), .c = put64(ex->b), .d = put64(ex->left),
	};

	return intent_keep(t, &rec, ex->left > 0, &ex->intent);
}

int exchange_some(struct trans *t, struct inode *in, struct inode *dst, struct exchange_state *ex)
{
	int rc = trans_join_inode(t, in);

	if (!rc)
		rc = trans_join_inode(t, dst);
	if (!rc)
		note_users(in, dst);
	for (unsigned n = 0; !rc && ex->left && n < REMAP_STEPS &&
	     trans_room(t) >= STEP_BLOCKS + REMAP_END_BLOCKS; n++) {
		nblocks_t len = 0;

		rc = exchange_one(t, in, ex->a, dst, ex->b, ex->left, &len);
		ex->a += len;
		ex->b += len;
		ex->left -= len;
	}
	if (!rc)
		rc = keep_intent(t, in, dst, ex);
	if (!rc)
		rc = note_moved(t, in, ex->left > 0);
	if (!rc)
		rc = note_moved(t, dst, ex->left > 0);
	if (!rc)
		rc = inode_write(t, in);
	if (!rc && dst != in)
		rc = inode_write(t, dst);
	return rc;
}

/* ---- the operation -------------------------------------------------------------------------- */

static void exchange_first(struct file_run *r)
{
	inode_touch(r->fop->in, TOUCH_MTIME | TOUCH_CTIME);
	if (r->fop->dst != r->fop->in)
		inode_touch(r->fop->dst, TOUCH_MTIME | TOUCH_CTIME);
}

static int exchange_next(struct file_run *r, struct trans *t, union remap_state *state)
{
	return exchange_some(t, r->fop->in, r->fop->dst, &state->ex);
}

static bool exchange_done(const struct file_run *r, const union remap_state *state)
{
	return !state->ex.left;
}

static const struct remap_kind exchange = {
	.first = exchange_first, .some = exchange_next, .done = exchange_done,
	.unfinished = "an exchange could not be finished",
};

static enum step exchange_locked(struct file_run *r)
{
	struct file_op *fop = r->fop;
	bool inside;
	enum step s;

	fs_rdlock(r->fs);
	inside = fop->offset + fop->len <= fop->in->core.size &&
		 fop->dst_offset + fop->len <= fop->dst->core.size;
	fs_unlock(r->fs);
	if (!inside)
		return run_end(r, -EINVAL);
	s = run_kill_priv(r, fop->in);
	if (s == STEP_NEXT && !r->err)
		s = run_kill_priv(r, fop->dst);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return run_end(r, r->err);
	return remap_begin(r, &exchange, (union remap_state){
		.ex = { .a = block_floor(fop->offset), .b = block_floor(fop->dst_offset),
			.left = block_floor(fop->len) },
	});
}

static enum step acquire_on(struct file_run *r, unsigned i)
{
	struct file_op *fop = r->fop;
	uint64_t start = r->seg_in[i] == fop->in ? fop->offset : fop->dst_offset;
	uint64_t end = start + fop->len;

	if (fop->in == fop->dst) {
		start = MIN(fop->offset, fop->dst_offset);
		end = MAX(fop->offset, fop->dst_offset) + fop->len;
	}
	return run_acquire(r, i, SEG_MAP, start, end);
}

static enum step exchange_acquire_second(struct file_run *r)
{
	r->step = exchange_locked;
	return r->fop->in == r->fop->dst ? STEP_NEXT : acquire_on(r, 1);
}

enum step file_exchange_start(struct file_run *r)
{
	struct file_op *fop = r->fop;
	uint64_t apart = fop->offset > fop->dst_offset ? fop->offset - fop->dst_offset :
							 fop->dst_offset - fop->offset;
	uint64_t last = MAX(fop->offset, fop->dst_offset);

	if (fop->in->fs != fop->dst->fs)
		return run_end(r, -EXDEV);
	if (!fop->len || ((fop->offset | fop->dst_offset | fop->len) & BLOCK_MASK))
		return run_end(r, -EINVAL);
	if (last > FILE_MAX_BYTES || fop->len > FILE_MAX_BYTES - last)
		return run_end(r, -EFBIG);
	if (fop->in == fop->dst && apart < fop->len)
		return run_end(r, -EINVAL);
	r->step = exchange_acquire_second;
	return acquire_on(r, 0);
}
