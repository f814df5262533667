/* SPDX-License-Identifier: MIT
 *
 * file_copy.c - copy_file_range: whole blocks are shared where both offsets have the same place in
 * a block, the rest is read and written.
 *
 * Segments, from the first piece to the last: SHARE on the source (its blocks become shared: no write in
 * place may be under way, by nobody), or READ_IO where no block can be shared, beside which others write
 * (file.h, "At the same time"); MAP on the destination; in order of inode number; one MAP over both ranges
 * when the files are the same.
 *
 * Each step replaces one run of destination blocks in one transaction (unmap, share, size), so
 * after a crash every block holds what it held before or what was to be copied.
 *
 * The source's last block may be shared although it is partly filled when the destination ends at
 * the same byte: what is behind EOF on the device then is behind EOF in both. Such a destination
 * inherits the source's rule about overwriting those bytes (shrink_xid).
 *
 * FILE_F_CLONE: the same, but what could not be shared whole is refused before anything happens.
 */
#include "file_remap.h"

#include <string.h>

#define COPY_RECORDS 8u          /* destination records unmapped in a transaction */
#define COPY_PIECE (1u << 20)    /* bytes read and written at a time */

static enum step copy_locked(struct file_run *r);
static enum step copy_next(struct file_run *r);

static unsigned index_of(const struct file_run *r, const struct inode *in)
{
	return r->seg_in[0] == in ? 0 : 1;
}

static enum step copy_end(struct file_run *r)
{
	struct copy_state *cp = &r->cp;

	run_mem_put(cp->mem, COPY_PIECE + BLOCK_SIZE);
	cp->mem = NULL;
	if (r->err && cp->pos == 0)
		return run_end(r, r->err);
	return run_end(r, (int64_t)cp->pos);
}

static enum step copy_fail(struct file_run *r, int rc)
{
	if (rc && !r->err)
		r->err = rc;
	r->step = copy_end;
	return STEP_NEXT;
}

/* ---- segments ------------------------------------------------------------------------------- */

/* Do bytes keep their place in a block? */
static bool may_share(const struct file_op *fop)
{
	return ((fop->offset ^ fop->dst_offset) & BLOCK_MASK) == 0;
}

static enum step acquire_on(struct file_run *r, unsigned i)
{
	struct file_op *fop = r->fop;
	uint64_t src = block_floor(fop->offset), src_end = block_ceil(fop->offset + fop->len);
	uint64_t dst = MIN(block_floor(fop->dst_offset), block_floor(r->low));
	uint64_t dst_end = block_ceil(fop->dst_offset + fop->len);

	if (fop->in == fop->dst)
		return run_acquire(r, 0, SEG_MAP, MIN(src, dst) << BLOCK_SHIFT,
				   MAX(src_end, dst_end) << BLOCK_SHIFT);
	if (r->seg_in[i] == fop->in)
		return run_acquire(r, i, may_share(fop) ? SEG_SHARE : SEG_READ_IO,
				   src << BLOCK_SHIFT, src_end << BLOCK_SHIFT);
	return run_acquire(r, i, SEG_MAP, dst << BLOCK_SHIFT, dst_end << BLOCK_SHIFT);
}

static enum step copy_acquire_second(struct file_run *r)
{
	r->step = copy_locked;
	return r->fop->in == r->fop->dst ? STEP_NEXT : acquire_on(r, 1);
}

static enum step copy_acquire(struct file_run *r)
{
	fs_rdlock(r->fs);
	r->low = r->fop->dst->core.size;
	fs_unlock(r->fs);
	r->step = copy_acquire_second;
	return acquire_on(r, 0);
}

/* Ranges of one file, after they were cut at its end as copy_file_range(2) does before it compares
 * them. */
static bool overlaps(const struct file_op *fop, uint64_t len)
{
	uint64_t apart = fop->offset > fop->dst_offset ? fop->offset - fop->dst_offset :
							 fop->dst_offset - fop->offset;

	return fop->in == fop->dst && apart < len;
}

static enum step copy_locked(struct file_run *r)
{
	struct file_op *fop = r->fop;
	struct copy_state *cp = &r->cp;
	uint64_t src_size, dst_size;
	enum step s;

	fs_rdlock(r->fs);
	/* Our segment of the source may be older than the answer of a write there, whose bytes we would not find. */
	src_size = early_visible_size(fop->in, fop->offset, fop->offset + fop->len);
	dst_size = fop->dst->core.size;
	fs_unlock(r->fs);
	if (fop->dst_offset > dst_size &&
	    (block_floor(dst_size) << BLOCK_SHIFT) < r->seg[index_of(r, fop->dst)].start) {
		run_release(r, 1);
		run_release(r, 0);
		r->step = copy_acquire;
		return STEP_NEXT;
	}
	if (fop->offset >= src_size)
		return copy_fail(r, fop->flags & FILE_F_CLONE ? -EINVAL : 0);
	cp->len = MIN(fop->len, src_size - fop->offset);
	if (overlaps(fop, cp->len))
		return copy_fail(r, -EINVAL);
	cp->whole_tail = fop->offset + cp->len == src_size && fop->dst_offset + cp->len >= dst_size;
	if ((fop->flags & FILE_F_CLONE) && (cp->len & BLOCK_MASK) && !cp->whole_tail)
		return copy_fail(r, -EINVAL);
	s = run_kill_priv(r, fop->dst);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return copy_fail(r, 0);
	return tail_begin(r, fop->dst, fop->dst_offset, false, copy_next);
}

/* ---- sharing -------------------------------------------------------------------------------- */

/* Blocks that one transaction can do at (s, d), at most max: as far as one source extent and
 * COPY_RECORDS of the destination go. */
static int share_len(struct inode *in, fileblk_t s, struct inode *to, fileblk_t d, nblocks_t max,
		     struct extent *src, nblocks_t *len)
{
	struct extent dst[COPY_RECORDS];
	int rc = extmap_lookup(in, FORK_DATA, s, max, src);

	if (rc < 0)
		return rc;
	*len = src->len;
	rc = extmap_list(to, FORK_DATA, d, d + *len, false, dst, COPY_RECORDS);
	if (rc == (int)COPY_RECORDS)
		*len = MIN(*len, dst[rc - 1].file + dst[rc - 1].len - d);
	return MIN(rc, 0);
}

/* -SHARE_PIECES: what was unmapped would be holes at the end of the transaction. */
int share_blocks(struct trans *t, struct inode *src, fileblk_t s, struct inode *dst, fileblk_t d,
		 nblocks_t max, nblocks_t *len)
{
	fileblk_t rest = d;
	nblocks_t shared;
	struct extent ext;
	int rc = share_len(src, s, dst, d, max, &ext, len);

	if (!rc)
		rc = extmap_remove(t, dst, FORK_DATA, d, d + *len, 4 * COPY_RECORDS, &rest);
	if (rc < 0)
		return rc;
	if (rest > d)
		return -SHARE_PIECES;
	if (ext.state == EXT_WRITTEN) {
		rc = extmap_share(t, src, s, *len, dst, d, 4 * COPY_RECORDS, &shared);
		if (!rc && shared < *len)
			return -SHARE_PIECES;
	}
	return MIN(rc, 0);
}

/* *bytes: how far the copy got. *blocks: what was tried. */
static int share_trans(struct file_run *r, nblocks_t max, uint64_t *bytes, nblocks_t *blocks)
{
	struct file_op *fop = r->fop;
	struct copy_state *cp = &r->cp;
	struct inode *dst = fop->dst;
	uint64_t d = fop->dst_offset + cp->pos;
	nblocks_t len = 0;
	struct trans t;
	xid_t xid;
	int rc;

	rc = trans_begin(r->fs, &t, COPY_TRANS_BLOCKS);
	if (rc)
		return rc;
	rc = trans_join_inode(&t, fop->in);
	if (!rc && dst != fop->in)
		rc = trans_join_inode(&t, dst);
	if (!rc && cp->whole_tail && (cp->len & BLOCK_MASK) && dst->core.size > fop->dst_offset + cp->len)
		rc = -SHARE_GROWN;
	if (!rc)
		rc = share_blocks(&t, fop->in, block_floor(fop->offset + cp->pos), dst,
				  block_floor(d), max, &len);
	*blocks = len;
	if (!rc) {
		*bytes = MIN(len << BLOCK_SHIFT, cp->len - cp->pos);
		if (*bytes) {
			dst->core.size = MAX(dst->core.size, d + *bytes);
			inode_touch(dst, TOUCH_MTIME | TOUCH_CTIME);
		}
		rc = inode_write(&t, dst);
	}
	if (!rc && dst != fop->in)
		rc = inode_write(&t, fop->in);
	if (rc)
		return run_trans_fail(r, &t, rc);
	note_unshare(dst);
	xid = trans_commit(&t);
	if (*bytes & BLOCK_MASK) {
		dst->tail_zero = false;
		dst->shrink_xid = xid;
	}
	return 0;
}

static enum step copy_share(struct file_run *r)
{
	struct copy_state *cp = &r->cp;
	uint64_t left = cp->len - cp->pos, bytes = 0;
	nblocks_t max = cp->whole_tail ? block_ceil(left) : block_floor(left), blocks = 0;
	enum step how;
	int rc = share_trans(r, MIN(max, cp->limit), &bytes, &blocks);

	if (rc == -SHARE_PIECES && blocks > 1) {
		cp->limit = blocks / 2;
		return run_yield(r, copy_share);
	}
	if (rc == -SHARE_GROWN) { /* the last bytes are read and written */
		cp->whole_tail = false;
		r->step = copy_next;
		return STEP_NEXT;
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : copy_fail(r, rc);
	cp->limit = MIN(2 * cp->limit, FILE_MAX_BLOCKS);
	cp->pos += bytes;
	return run_yield(r, copy_next);
}

/* ---- reading and writing -------------------------------------------------------------------- */

static enum step copy_written(struct file_run *r)
{
	struct copy_state *cp = &r->cp;

	if (r->err)
		return copy_fail(r, 0);
	cp->pos += r->wr.end - r->wr.off;
	r->step = copy_next;
	return STEP_NEXT;
}

static enum step copy_read(struct file_run *r)
{
	struct file_op *fop = r->fop;
	struct copy_state *cp = &r->cp;
	uint64_t d = fop->dst_offset + cp->pos;

	if (r->err)
		return copy_fail(r, 0);
	xassert(r->rd.got == cp->piece);
	return write_begin(r, fop->dst, d, d + cp->piece, cp->mem, true, TOUCH_MTIME | TOUCH_CTIME,
			   copy_written);
}

/* Copied, but not on stable storage, is a failure of the whole. */
static enum step copy_durable(struct file_run *r)
{
	if (r->err)
		r->cp.pos = 0;
	r->step = copy_end;
	return STEP_NEXT;
}

static enum step copy_done(struct file_run *r)
{
	if (r->cp.pos && (r->fop->flags & FILE_F_DSYNC))
		return run_durable(r, r->fop->dst, copy_durable);
	r->step = copy_end;
	return STEP_NEXT;
}

static enum step copy_next(struct file_run *r)
{
	struct file_op *fop = r->fop;
	struct copy_state *cp = &r->cp;
	uint64_t left = cp->len - cp->pos;
	uint64_t s = (fop->offset + cp->pos) & BLOCK_MASK;
	uint64_t d = (fop->dst_offset + cp->pos) & BLOCK_MASK;

	if (r->err)
		return copy_fail(r, 0);
	if (left == 0)
		return copy_done(r);
	if (s == 0 && d == 0 && (left >= BLOCK_SIZE || cp->whole_tail)) {
		r->step = copy_share;
		return STEP_NEXT;
	}
	cp->piece = MIN(left, COPY_PIECE);
	if (s == d)
		cp->piece = MIN(left, BLOCK_SIZE - s);
	if (!cp->mem)
		cp->mem = run_mem_get(COPY_PIECE + BLOCK_SIZE);
	if (!cp->mem)
		return copy_fail(r, -ENOMEM);
	read_setup(r, fop->in, fop->offset + cp->pos, cp->piece, cp->mem, COPY_PIECE + BLOCK_SIZE,
		   copy_read);
	return STEP_NEXT;
}

enum step file_copy_start(struct file_run *r)
{
	struct file_op *fop = r->fop;

	if (fop->in->fs != fop->dst->fs)
		return run_end(r, -EXDEV);
	if (fop->len == 0)
		return run_end(r, 0);
	if ((fop->flags & FILE_F_CLONE) && ((fop->offset | fop->dst_offset) & BLOCK_MASK))
		return run_end(r, -EINVAL);
	if (fop->dst_offset >= FILE_MAX_BYTES || fop->offset > FILE_MAX_BYTES)
		return run_end(r, fop->offset > FILE_MAX_BYTES ? 0 : -EFBIG);
	fop->len = MIN(fop->len, FILE_MAX_BYTES - MAX(fop->dst_offset, fop->offset));
	if (fop->len == 0)
		return run_end(r, 0);
	r->cp.limit = FILE_MAX_BLOCKS;
	r->step = copy_acquire;
	return STEP_NEXT;
}
