/* SPDX-License-Identifier: MIT
 *
 * file_tail.c - before EOF moves up: the written bytes behind it in its block become zeros on the
 * device (file.h rule 3).
 *
 * A write that begins in the block of EOF does without: it rewrites that block whole. The zeroing
 * itself is an ordinary write without growth, so it waits for shrink_xid and copies a shared block
 * like any other.
 */
#include "file_run.h"

static enum step tail_end(struct file_run *r)
{
	if (!r->err)
		r->wr.in->tail_zero = true;
	r->step = r->tail_then;
	return STEP_NEXT;
}

enum step tail_begin(struct file_run *r, struct inode *in, uint64_t to, bool same_block,
		     step_fn then)
{
	struct extent ext = { 0 };
	uint64_t size;
	bool dirty;
	int rc = 0;

	fs_rdlock(r->fs);
	size = in->core.size;
	dirty = to > size && (size & BLOCK_MASK) && !in->tail_zero &&
		(same_block || block_floor(size) < block_floor(to));
	if (dirty)
		rc = extmap_lookup(in, FORK_DATA, block_floor(size), 1, &ext);
	fs_unlock(r->fs);
	if (rc < 0)
		r->err = rc;
	if (rc < 0 || !dirty || ext.state != EXT_WRITTEN) {
		r->step = then;
		return STEP_NEXT;
	}
	r->tail_then = then;
	return write_begin(r, in, size, (block_floor(size) + 1) << BLOCK_SHIFT, NULL, false, 0,
			   tail_end);
}
