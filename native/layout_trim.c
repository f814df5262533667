/* SPDX-License-Identifier: MIT
 *
 * layout_trim.c - preallocation past EOF that LAYOUT_GET left behind becomes free when no RW grant
 * is left.
 *
 * Only extents marked EXT_F_LAYOUT that are still unwritten: what fallocate(2) put there stays, and
 * inside EOF unwritten blocks are zeros that somebody may count on. Nobody waits for this and it
 * waits for nobody: a range that is in use is left for the next time.
 */
#include "file_run.h"
#include "layout_priv.h"

#define TRIM_LOOK 32u
#define TRIM_RECORDS 8u

static enum step trim_step(struct file_run *r);

static bool to_trim(const struct extent *e)
{
	return e->state == EXT_UNWRITTEN && (e->flags & EXT_F_LAYOUT);
}

/* The first extent at or behind *at that is to go. 0: found; -ENOENT; or another code. fs->lock
 * held. */
static int find_extent(struct inode *in, fileblk_t *at, struct extent *out)
{
	struct extent many[TRIM_LOOK];

	for (;;) {
		int n = extmap_list(in, FORK_DATA, *at, FILE_MAX_BLOCKS, false, many, TRIM_LOOK);

		for (int i = 0; i < n; i++) {
			*at = many[i].file + many[i].len;
			if (!to_trim(&many[i]))
				continue;
			*out = many[i];
			return 0;
		}
		if (n <= 0)
			return n ? n : -ENOENT;
	}
}

static enum step trim_acquire(struct file_run *r)
{
	struct inode *in = r->fop->in;
	uint64_t size, low;
	bool useful;

	fs_rdlock(r->fs);
	size = in->core.size;
	useful = in->core.nlink != 0; /* else the reaper frees everything */
	fs_unlock(r->fs);
	if (!useful || size > FILE_MAX_BYTES)
		return run_end(r, 0);
	/* From the block of EOF on: whoever moves EOF has to wait. */
	low = block_floor(size) << BLOCK_SHIFT;
	seg_init(&r->seg[0], SEG_MAP, low, UINT64_MAX, &r->fop->op);
	if (seg_try(in, &r->seg[0]))
		return run_end(r, 0);
	fs_rdlock(r->fs);
	size = in->core.size;
	fs_unlock(r->fs);
	if ((block_floor(size) << BLOCK_SHIFT) < low) {
		run_release(r, 0);
		return STEP_NEXT; /* it was cut meanwhile */
	}
	r->lt.at = block_ceil(size);
	r->step = trim_step;
	return STEP_NEXT;
}

/* In a transaction: as much as fits. */
static int trim_some(struct trans *t, struct inode *in, fileblk_t *at, nblocks_t *freed)
{
	int rc = 0;

	while (!rc && trans_room(t) > 2 * EXTMAP_STEP_BLOCKS) {
		struct extent e;
		fileblk_t rest, next = *at;

		rc = find_extent(in, &next, &e);
		if (rc)
			break;
		rest = e.file + e.len;
		rc = extmap_remove(t, in, FORK_DATA, e.file, rest, TRIM_RECORDS, &rest);
		if (rc)
			break;
		*freed += e.file + e.len - rest;
		if (rest > e.file)
			return 0; /* room is low; its beginning is left */
		*at = next;
	}
	return rc == -ENOENT ? 0 : rc;
}

static enum step trim_step(struct file_run *r)
{
	struct inode *in = r->fop->in;
	fileblk_t at = r->lt.at, first = at;
	nblocks_t freed = 0;
	struct extent e;
	struct trans t;
	enum step how;
	int rc;

	fs_rdlock(r->fs);
	rc = find_extent(in, &first, &e);
	fs_unlock(r->fs);
	if (rc)
		return run_end(r, rc == -ENOENT ? 0 : rc);
	rc = trans_begin(r->fs, &t, REMOVE_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = trans_join_inode(&t, in);
		if (!rc)
			rc = trim_some(&t, in, &at, &freed);
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
		return run_retry(r, &rc, &how) ? how : run_end(r, rc);
	LAYOUT_COUNT(r->fs, trimmed_blocks, freed);
	r->lt.at = at;
	return run_yield(r, trim_step);
}

enum step layout_trim_start(struct file_run *r)
{
	r->step = trim_acquire;
	return STEP_NEXT;
}

static void trim_done(struct file_op *fop)
{
	struct layouts *ls = fop->user;

	inode_put(fop->in);
	free(fop);
	layouts_ran(ls);
}

void trim_start(struct layouts *ls, struct inode *in)
{
	struct file_op *fop = malloc(sizeof(*fop));

	if (!fop) {
		inode_put(in); /* the next return of a layout tries again */
		return;
	}
	file_op_init(fop, FILE_LAYOUT_TRIM, in, ls->ctx);
	fop->done = trim_done;
	fop->user = ls;
	layouts_run(ls, fop);
}
