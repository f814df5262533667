/* SPDX-License-Identifier: MIT
 *
 * file.c - the entry of the data path: starting, cancelling, waiting for an operation; seek.
 */
#include "file_run.h"
#include "layout_priv.h"

#include <string.h>

void file_op_init(struct file_op *fop, enum file_op_kind kind, struct inode *in, struct ioctx *ctx)
{
	*fop = (struct file_op){ .kind = kind, .in = in };
	fop->op = (struct op){ .resume = run_resume, .ctx = ctx };
}

static bool changes(enum file_op_kind kind)
{
	return kind != FILE_READ && kind != FILE_FSYNC;
}

static bool of_two_files(enum file_op_kind kind)
{
	return kind == FILE_COPY || kind == FILE_EXCHANGE || kind == FILE_DEDUPE;
}

/* What is wrong with the request as such. */
static int check(const struct file_op *fop)
{
	struct inode *in = fop->in;

	if (fop->kind == FILE_FSYNC)
		return 0;
	if (fop->kind == FILE_LAYOUT_RETURN && (fop->layout->flags & LAYOUT_F_ALL))
		return in->fs->read_only ? -EROFS : 0;
	if (!inode_is_reg(in))
		return inode_is_dir(in) ? -EISDIR : -EINVAL;
	if (of_two_files(fop->kind) && !inode_is_reg(fop->dst))
		return inode_is_dir(fop->dst) ? -EISDIR : -EINVAL;
	if (changes(fop->kind) && in->fs->read_only)
		return -EROFS;
	if (changes(fop->kind) && fs_is_shutdown(in->fs))
		return -ERR_SHUTDOWN;
	return 0;
}

void file_start(struct file_op *fop)
{
	static const step_fn start[] = {
		[FILE_READ] = file_read_start, [FILE_WRITE] = file_write_start,
		[FILE_TRUNCATE] = file_truncate_start, [FILE_FALLOCATE] = file_fallocate_start,
		[FILE_COPY] = file_copy_start, [FILE_FSYNC] = file_fsync_start,
		[FILE_EXCHANGE] = file_exchange_start, [FILE_COLLAPSE] = file_shift_start,
		[FILE_INSERT] = file_shift_start, [FILE_DEDUPE] = file_dedupe_start,
		[FILE_LAYOUT_GET] = layout_get_start, [FILE_LAYOUT_COMMIT] = layout_commit_start,
		[FILE_LAYOUT_RETURN] = layout_return_start,
		[FILE_LAYOUT_REVOKE] = layout_revoke_start, [FILE_LAYOUT_TRIM] = layout_trim_start,
	};
	struct file_run *r;
	int rc = check(fop);

	fop->result = 0;
	fop->run = r = rc ? NULL : run_get();
	if (unlikely(!r)) {
		fop->result = rc ? rc : -ENOMEM;
		fop->done(fop);
		return;
	}
	r->fop = fop;
	r->fs = fop->in->fs;
	r->seg_in[0] = fop->in;
	r->step = start[fop->kind];
	if (of_two_files(fop->kind) && fop->dst != fop->in) {
		bool forward = fop->in->ino < fop->dst->ino;

		r->seg_in[0] = forward ? fop->in : fop->dst;
		r->seg_in[1] = forward ? fop->dst : fop->in;
	}
	run_go(r);
}

bool file_cancel(struct file_op *fop)
{
	struct file_run *r = fop->run;
	bool taken = false;

	if (!r)
		return false;
	for (unsigned i = 0; i < ARRAY_LEN(r->seg) && !taken; i++)
		if (r->seg_in[i])
			taken = seg_cancel(r->seg_in[i], &r->seg[i]);
	if (!taken && fop->kind == FILE_FSYNC)
		taken = jrn_cancel(r->fs, &r->waiter);
	if (!taken)
		return false;
	/* Nobody else resumes it now; its own thread finds the mark. */
	atomic_store_explicit(&r->cancelled, true, memory_order_release);
	ioctx_wake(&fop->op);
	return true;
}

/* ---- in the calling thread ------------------------------------------------------------------ */

static void blocking_done(struct file_op *fop)
{
	*(bool *)fop->user = true;
}

int64_t file_run_blocking(struct file_op *fop)
{
	void (*done)(struct file_op *) = fop->done;
	void *user = fop->user;
	bool finished = false;

	fop->op.ctx = ioctx_of_thread();
	if (!fop->op.ctx)
		return fop->result = -ENOMEM;
	fop->done = blocking_done;
	fop->user = &finished;
	file_start(fop);
	while (!finished)
		ioctx_run(fop->op.ctx, true);
	fop->done = done;
	fop->user = user;
	return fop->result;
}

/* ---- seek ----------------------------------------------------------------------------------- */

#define SEEK_BATCH 256u /* extents looked at under one hold of the lock */

/* Walk on from *pos. 1: *pos is the answer; 0: not yet; -ENXIO or another code. fs->lock shared. */
static int seek_some(struct inode *in, uint64_t *pos, bool data)
{
	uint64_t size = in->core.size;

	for (unsigned n = 0; n < SEEK_BATCH; n++) {
		struct extent ext;
		fileblk_t at = block_floor(*pos);
		int rc;

		if (*pos >= size) {
			*pos = size;
			return data ? -ENXIO : 1;
		}
		rc = extmap_lookup(in, FORK_DATA, at, block_ceil(size) - at, &ext);
		if (rc < 0)
			return rc;
		if ((ext.state == EXT_WRITTEN) == data)
			return 1;
		*pos = (at + ext.len) << BLOCK_SHIFT;
	}
	return 0;
}

/* Where the holes are will be known only when the map is of one piece again: until then all may be data. */
static int seek_blindly(const struct inode *in, uint64_t *pos, bool data)
{
	if (data)
		return *pos < in->core.size ? 1 : -ENXIO;
	*pos = in->core.size;
	return 1;
}

int file_seek_step(struct inode *in, uint64_t *pos, int whence, bool first)
{
	int rc;

	if (whence != 3 && whence != 4)
		return -EINVAL;
	fs_rdlock(in->fs);
	if (first && *pos >= in->core.size)
		rc = -ENXIO;
	else if (in->remapping)
		rc = seek_blindly(in, pos, whence == 3);
	else
		rc = seek_some(in, pos, whence == 3);
	fs_unlock(in->fs);
	return rc;
}

int64_t file_seek(struct inode *in, uint64_t offset, int whence)
{
	uint64_t pos = offset;
	int rc = file_seek_step(in, &pos, whence, true);

	while (!rc)
		rc = file_seek_step(in, &pos, whence, false);
	return rc < 0 ? rc : (int64_t)pos;
}
