/* SPDX-License-Identifier: MIT
 *
 * file_fsync.c - fsync: times that are only in memory become a transaction, then the journal makes
 * everything of the inode durable, its data with it.
 */
#include "file_run.h"

static enum step fsync_end(struct file_run *r)
{
	return run_end(r, r->err);
}

static enum step fsync_flush_times(struct file_run *r)
{
	struct inode *in = r->fop->in;
	enum step how;
	int rc;

	if (!(r->fop->flags & FILE_F_DATASYNC) && !fs_is_shutdown(r->fs)) {
		rc = inode_flush_lazy_one(in);
		if (rc < 0) {
			if (run_retry(r, &rc, &how))
				return how;
			return run_end(r, rc);
		}
	}
	return run_durable(r, in, fsync_end);
}

/* file_write.c asks whether the next write will be followed by an fsync, too. */
static void note_habit(struct inode *in)
{
	uint8_t habit = atomic_load_explicit(&in->fsync_habit, memory_order_relaxed);

	if (atomic_exchange_explicit(&in->unsynced, 0, memory_order_relaxed) && habit < UINT8_MAX)
		atomic_store_explicit(&in->fsync_habit, habit + 1, memory_order_relaxed);
}

enum step file_fsync_start(struct file_run *r)
{
	if (r->fs->read_only)
		return run_end(r, 0);
	note_habit(r->fop->in);
	if (fs_is_shutdown(r->fs))
		return run_end(r, fs_shutdown_cause(r->fs));
	r->step = fsync_flush_times;
	return STEP_NEXT;
}
