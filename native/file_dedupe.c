/* SPDX-License-Identifier: MIT
 *
 * file_dedupe.c - blocks of two files that hold the same bytes become shared ones, as FIDEDUPERANGE
 * asks for it: compared by us, under segments that keep writers away until the blocks are shared.
 *
 * Segments: SHARE on the source, MAP on the destination; in order of inode number; one MAP over both
 * ranges when the files are the same. One operation does at most DEDUPE_MAX bytes, so that readers of
 * the destination are not kept away for long; the caller asks again for the rest.
 *
 * Holes and unwritten blocks are zeros. Where one of the two is none, nothing is gained by sharing:
 * such blocks are compared and left alone. Bytes, sizes and times of both files stay what they are.
 *
 * The last block of the source may be shared when both files end at the same byte of it; the
 * destination then has the source's bytes behind EOF, see file_copy.c.
 */
#include <string.h>

#include "file_remap.h"

#define DEDUPE_MAX (16u << 20)
#define DEDUPE_PIECE (1u << 20) /* bytes compared at a time */
#define SKIP_BATCH 64u          /* extents looked at under one hold of the lock */

static enum step dedupe_next(struct file_run *r);
static enum step dedupe_share(struct file_run *r);

/* What has been shared counts, whatever came after it. len has been cut to 0 by a difference in the first
 * block. */
static enum step dedupe_end(struct file_run *r)
{
	struct dedupe_state *de = &r->de;
	int64_t result = (int64_t)de->pos;

	run_mem_put(de->mem[0], DEDUPE_PIECE + BLOCK_SIZE);
	run_mem_put(de->mem[1], DEDUPE_PIECE + BLOCK_SIZE);
	de->mem[0] = de->mem[1] = NULL;
	if (de->pos == 0)
		result = r->err ? r->err : -EBADE;
	return run_end(r, result);
}

static enum step dedupe_fail(struct file_run *r, int rc)
{
	if (rc && !r->err)
		r->err = rc;
	r->step = dedupe_end;
	return STEP_NEXT;
}

enum pair { PAIR_SAME, PAIR_COMPARE, PAIR_BOTH_WRITTEN };

/* What the maps say of the blocks at pos, *len of them, at most max. fs->lock held. */
static int look(struct file_run *r, uint64_t pos, nblocks_t max, enum pair *what, nblocks_t *len)
{
	struct file_op *fop = r->fop;
	struct extent s, d;
	int rc = extmap_lookup(fop->in, FORK_DATA, block_floor(fop->offset + pos), max, &s);

	if (rc >= 0)
		rc = extmap_lookup(fop->dst, FORK_DATA, block_floor(fop->dst_offset + pos), s.len, &d);
	if (rc < 0)
		return rc;
	*len = d.len;
	if (s.state == EXT_WRITTEN && d.state == EXT_WRITTEN)
		*what = s.block == d.block ? PAIR_SAME : PAIR_BOTH_WRITTEN;
	else
		*what = s.state == EXT_WRITTEN || d.state == EXT_WRITTEN ? PAIR_COMPARE : PAIR_SAME;
	return 0;
}

/* Go on from *pos over blocks that need nothing, up to `end`. `wanted` or better is worth a stop. */
static int skip(struct file_run *r, uint64_t *pos, uint64_t end, enum pair wanted, bool *stopped)
{
	int rc = 0;

	*stopped = false;
	fs_rdlock(r->fs);
	for (unsigned n = 0; n < SKIP_BATCH && *pos < end && !*stopped; n++) {
		enum pair what;
		nblocks_t len;

		rc = look(r, *pos, block_ceil(end - *pos), &what, &len);
		if (rc)
			break;
		*stopped = what >= wanted;
		if (!*stopped)
			*pos = MIN(*pos + (len << BLOCK_SHIFT), end);
	}
	fs_unlock(r->fs);
	return rc;
}

/* ---- sharing what has been found equal: [pos, end) ------------------------------------------ */

static int share_trans(struct file_run *r, uint64_t *pos, nblocks_t *blocks)
{
	struct file_op *fop = r->fop;
	struct inode *in = fop->in, *dst = fop->dst;
	uint64_t left = r->de.end - *pos, done = 0;
	nblocks_t len = 0;
	enum pair what;
	struct trans t;
	xid_t xid;
	int rc;

	/* What a holder wrote in place of the source, unseen by us, has to be on the device before the
	 * destination's own blocks go. */
	jrn_note_foreign_write(r->fs);
	rc = trans_begin(r->fs, &t, COPY_TRANS_BLOCKS);
	if (rc)
		return rc;
	rc = trans_join_inode(&t, in);
	if (!rc)
		rc = trans_join_inode(&t, dst);
	if (!rc)
		rc = look(r, *pos, MIN(block_ceil(left), r->de.limit), &what, &len);
	if (!rc && (len << BLOCK_SHIFT) > left && dst->core.size != fop->dst_offset + *pos + left)
		rc = -SHARE_GROWN;
	if (!rc)
		rc = share_blocks(&t, in, block_floor(fop->offset + *pos), dst,
				  block_floor(fop->dst_offset + *pos), len, &len);
	*blocks = len;
	if (!rc)
		rc = inode_write(&t, dst);
	if (!rc && dst != in)
		rc = inode_write(&t, in);
	if (rc)
		return run_trans_fail(r, &t, rc);
	done = MIN(len << BLOCK_SHIFT, left);
	note_unshare(dst);
	xid = trans_commit(&t);
	if (done & BLOCK_MASK) {
		dst->tail_zero = false;
		dst->shrink_xid = xid;
	}
	*pos += done;
	return 0;
}

static enum step dedupe_share(struct file_run *r)
{
	struct dedupe_state *de = &r->de;
	uint64_t pos = de->pos;
	nblocks_t blocks = 0;
	bool stopped;
	enum step how;
	int rc = skip(r, &pos, de->end, PAIR_BOTH_WRITTEN, &stopped);

	if (rc)
		return dedupe_fail(r, rc);
	if (!stopped) {
		de->pos = pos;
		return run_yield(r, pos < de->end ? dedupe_share : dedupe_next);
	}
	rc = share_trans(r, &pos, &blocks);
	if (rc == -SHARE_PIECES && blocks > 1) {
		de->limit = blocks / 2;
		return run_yield(r, dedupe_share);
	}
	if (rc == -SHARE_GROWN) { /* the last bytes are another call's */
		de->end = r->fop->len = block_floor(de->end) << BLOCK_SHIFT;
		return run_yield(r, pos < de->end ? dedupe_share : dedupe_next);
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : dedupe_fail(r, rc);
	r->space_tries = r->reaper_tries = 0;
	de->limit = MIN(2 * de->limit, FILE_MAX_BLOCKS);
	de->pos = pos;
	return run_yield(r, pos < de->end ? dedupe_share : dedupe_next);
}

/* ---- comparing ------------------------------------------------------------------------------ */

static enum step dedupe_compare(struct file_run *r)
{
	struct dedupe_state *de = &r->de;
	const uint8_t *a = de->mem[0], *b = de->mem[1];
	uint64_t len = de->end - de->pos, same = 0;

	if (r->err)
		return dedupe_fail(r, 0);
	xassert(r->rd.got == len);
	while (same < len && !memcmp(a + same, b + same, MIN(BLOCK_SIZE, len - same)))
		same += MIN(BLOCK_SIZE, len - same);
	if (same < len)
		de->end = r->fop->len = de->pos + same; /* the rest is another call's */
	r->step = dedupe_share;
	return STEP_NEXT;
}

static enum step dedupe_read_dst(struct file_run *r)
{
	struct dedupe_state *de = &r->de;
	uint64_t len = de->end - de->pos;

	if (r->err)
		return dedupe_fail(r, 0);
	xassert(r->rd.got == len);
	read_setup(r, r->fop->dst, r->fop->dst_offset + de->pos, len, de->mem[1],
		   DEDUPE_PIECE + BLOCK_SIZE, dedupe_compare);
	return STEP_NEXT;
}

static enum step dedupe_next(struct file_run *r)
{
	struct dedupe_state *de = &r->de;
	uint64_t len = r->fop->len;
	bool stopped;
	int rc = skip(r, &de->pos, len, PAIR_COMPARE, &stopped);

	if (rc)
		return dedupe_fail(r, rc);
	if (de->pos >= len)
		return dedupe_fail(r, 0);
	if (!stopped)
		return run_yield(r, dedupe_next);
	for (unsigned i = 0; i < ARRAY_LEN(de->mem); i++) {
		if (!de->mem[i])
			de->mem[i] = run_mem_get(DEDUPE_PIECE + BLOCK_SIZE);
		if (!de->mem[i])
			return dedupe_fail(r, -ENOMEM);
	}
	de->end = MIN(len, de->pos + DEDUPE_PIECE);
	read_setup(r, r->fop->in, r->fop->offset + de->pos, de->end - de->pos, de->mem[0],
		   DEDUPE_PIECE + BLOCK_SIZE, dedupe_read_dst);
	return STEP_NEXT;
}

/* ---- beginning ------------------------------------------------------------------------------ */

static enum step dedupe_locked(struct file_run *r)
{
	struct file_op *fop = r->fop;
	uint64_t end = fop->offset + fop->len, dst_end = fop->dst_offset + fop->len;
	uint64_t size, dst_size;

	fs_rdlock(r->fs);
	size = fop->in->core.size;
	dst_size = fop->dst->core.size;
	fs_unlock(r->fs);
	if (end > size || dst_end > dst_size)
		return run_end(r, -EINVAL);
	if ((fop->len & BLOCK_MASK) && (end != size || dst_end != dst_size))
		return run_end(r, -EINVAL);
	r->de.limit = FILE_MAX_BLOCKS;
	r->step = dedupe_next;
	return STEP_NEXT;
}

static enum step acquire_on(struct file_run *r, unsigned i)
{
	struct file_op *fop = r->fop;
	bool source = r->seg_in[i] == fop->in;
	uint64_t len = block_ceil(fop->len) << BLOCK_SHIFT;
	uint64_t start = source ? fop->offset : fop->dst_offset;

	if (fop->in == fop->dst)
		return run_acquire(r, 0, SEG_MAP, MIN(fop->offset, fop->dst_offset),
				   MAX(fop->offset, fop->dst_offset) + len);
	return run_acquire(r, i, source ? SEG_SHARE : SEG_MAP, start, start + len);
}

static enum step dedupe_acquire_second(struct file_run *r)
{
	r->step = dedupe_locked;
	return r->fop->in == r->fop->dst ? STEP_NEXT : acquire_on(r, 1);
}

enum step file_dedupe_start(struct file_run *r)
{
	struct file_op *fop = r->fop;
	uint64_t apart = fop->offset > fop->dst_offset ? fop->offset - fop->dst_offset :
							 fop->dst_offset - fop->offset;
	uint64_t last = MAX(fop->offset, fop->dst_offset);

	if (fop->in->fs != fop->dst->fs)
		return run_end(r, -EXDEV);
	if ((fop->offset | fop->dst_offset) & BLOCK_MASK)
		return run_end(r, -EINVAL);
	if (last > FILE_MAX_BYTES || fop->len > FILE_MAX_BYTES - last)
		return run_end(r, -EFBIG);
	if (fop->in == fop->dst && apart < block_ceil(fop->len) << BLOCK_SHIFT)
		return run_end(r, -EINVAL);
	if (fop->len == 0)
		return run_end(r, 0);
	fop->len = MIN(fop->len, DEDUPE_MAX);
	r->step = dedupe_acquire_second;
	return acquire_on(r, 0);
}
