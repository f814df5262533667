/* SPDX-License-Identifier: MIT
 *
 * file_exchange.c - two ranges of blocks change places, of two files or one, whole or not at all.
 *
 * Segments: MAP on both ranges in order of inode number; one over both ranges when the files are the
 * same. They are held until everything has moved.
 *
 * Only whole blocks below both ends of file take part: the block that a file ends in, whose bytes
 * behind EOF are undefined, never does. Sizes stay, and whatever is behind EOF.
 *
 * A block keeps its users, its state and its flags. What the inodes say of their blocks follows:
 *   - shared blocks: both files may map some from then on;
 *   - a lost holder may reach blocks of one of the files: whoever frees a block later sees the other
 *     one, of which that holder knows nothing. So both count as files that share blocks, whose
 *     blocks are kept as long as any holder is lost (layout_release.c).
 */
#include "file_remap.h"

#define STEP_BLOCKS (4 * REMAP_EDIT_BLOCKS)

int note_moved(struct trans *t, struct inode *in, bool left)
{
	int rc = trans_save(t, &in->remapping, sizeof(in->remapping));

	if (rc)
		return rc;
	in->remapping = left;
	in->moved_xid = jrn_running(in->fs);
	return 0;
}

/* One extent or hole of each file, *len blocks of it. */
static int exchange_one(struct trans *t, struct inode *in, fileblk_t a, struct inode *dst, fileblk_t b,
			nblocks_t max, nblocks_t *len)
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

static enum step exchange_end(struct file_run *r)
{
	return run_end(r, r->err);
}

static enum step exchange_done(struct file_run *r)
{
	/* Both inodes are in the same groups. */
	if (r->fop->flags & FILE_F_DSYNC)
		return run_durable(r, r->fop->in, exchange_end);
	r->step = exchange_end;
	return STEP_NEXT;
}

static int exchange_trans(struct file_run *r, struct exchange_state *ex)
{
	struct inode *in = r->fop->in, *dst = r->fop->dst;
	bool first = !ex->intent;
	struct trans t;
	int rc = trans_begin(r->fs, &t, REMAP_TRANS_BLOCKS);

	if (rc)
		return rc;
	t.alloc_flags |= ALLOC_USE_RESERVE;
	rc = trans_join_inode(&t, in);
	if (!rc)
		rc = trans_join_inode(&t, dst);
	if (!rc && first) {
		inode_touch(in, TOUCH_MTIME | TOUCH_CTIME);
		if (dst != in)
			inode_touch(dst, TOUCH_MTIME | TOUCH_CTIME);
	}
	if (!rc)
		rc = exchange_some(&t, in, dst, ex);
	if (rc)
		return run_trans_fail(r, &t, rc);
	trans_commit(&t);
	return 0;
}

static enum step exchange_step(struct file_run *r)
{
	struct exchange_state ex = r->ex;
	enum step how;
	int rc = exchange_trans(r, &ex);

	if (rc) {
		if (run_retry(r, &rc, &how))
			return how;
		/* The intent is left: the next mount finishes it, whatever is written until then. */
		if (r->ex.intent)
			fs_shutdown_writes(r->fs, rc, "inode %llu: an exchange could not be finished",
					   (unsigned long long)r->fop->in->ino);
		return run_end(r, rc);
	}
	r->ex = ex;
	r->space_tries = r->reaper_tries = 0;
	if (ex.left)
		return run_yield(r, exchange_step);
	return exchange_done(r);
}

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
	r->ex = (struct exchange_state){ .a = block_floor(fop->offset), .b = block_floor(fop->dst_offset),
					 .left = block_floor(fop->len) };
	r->step = exchange_step;
	return STEP_NEXT;
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
