/* SPDX-License-Identifier: MIT
 *
 * file_write.c - write: which bytes to lock, the fast path of an aligned rewrite, and what follows
 * the data.
 *
 * Segment: WRITE_IO over the blocks written; from the block of EOF on when the write begins behind
 * EOF, because the tail there has to be zeroed. So the size changes only under a segment that
 * covers the block of the old EOF. It becomes WRITE_MAP when there are holes or unwritten blocks
 * (file_put.c, write_look()): what a READ grant says of them would no longer be true. Blocks that
 * are shared need a MAP segment (their mapping changes under readers).
 */
#include "file_run.h"

#include "namei.h"
#include "xattr.h"

#define FUA_BYTES (64u << 10) /* longer writes are worth a flush of their own */
#define FUA_HABIT 3u

static enum step write_acquire(struct file_run *r);

static enum step write_finish(struct file_run *r)
{
	struct write_body *w = &r->wr;

	if (r->err)
		return run_end(r, r->err);
	return run_end(r, (int64_t)(w->end - w->off));
}

/* The data is in place, and converted where it had to be. */
static enum step write_done(struct file_run *r)
{
	struct inode *in = r->fop->in;

	if (r->early)
		return early_over(r);
	if (r->err)
		return run_end(r, r->err);
	if (!r->wr.touched) {
		fs_rdlock(r->fs);
		inode_touch_lazy(in, TOUCH_MTIME | TOUCH_CTIME);
		fs_unlock(r->fs);
	}
	r->step = write_finish;
	if (r->fop->flags & FILE_F_DSYNC)
		return run_durable(r, in, write_finish);
	return STEP_NEXT;
}

static enum step write_in_place_end(struct file_run *r)
{
	if (unlikely(r->io_err))
		r->err = r->io_err;
	return write_done(r);
}

/* Not if somebody waits for the data itself, or will at once by his habit (fua); nor (NOWAIT) for a client, who has caches of
 * his own. */
static bool may_be_early(const struct file_run *r)
{
	return !r->fua && (r->fop->flags & (FILE_F_EARLY | FILE_F_DSYNC | FILE_F_NOWAIT)) == FILE_F_EARLY;
}

static enum step write_general(struct file_run *r)
{
	struct file_op *fop = r->fop;
	enum step s;

	if (r->err)
		return run_end(r, r->err);
	s = write_begin(r, fop->in, fop->offset, fop->offset + fop->len, fop->buf, true,
			TOUCH_MTIME | TOUCH_CTIME, write_done);
	r->wr.early = may_be_early(r);
	return s;
}

/* One written, unshared extent below EOF, and memory that the device can use. fs->lock shared. */
static bool in_place(struct file_run *r, uint64_t *dev_offset)
{
	struct file_op *fop = r->fop;
	struct inode *in = fop->in;
	uint64_t end = fop->offset + fop->len;
	nblocks_t len = block_ceil(end) - block_floor(fop->offset);
	struct extent ext;

	if ((((uintptr_t)fop->buf | fop->offset | fop->len) & (r->fs->dev->align - 1)) ||
	    end > in->core.size || (in->core.flags & INODE_F_SHARED) || fs_is_shutdown(r->fs))
		return false;
	if (unlikely(in->moved_xid) && in->moved_xid > jrn_durable(r->fs))
		return false;
	if (extmap_lookup(in, FORK_DATA, block_floor(fop->offset), len, &ext) < 0)
		return false;
	*dev_offset = (ext.block << BLOCK_SHIFT) + (fop->offset & BLOCK_MASK);
	return ext.state == EXT_WRITTEN && ext.len == len;
}

/* -EFBIG, or the length cut so that the file stays below the greatest size. */
static int clamp_len(struct file_op *fop)
{
	if (fop->offset >= FILE_MAX_BYTES)
		return -EFBIG;
	fop->len = MIN(fop->len, FILE_MAX_BYTES - fop->offset);
	return 0;
}

/* fs->lock shared, segment held. STEP_NEXT: it covers what is needed. */
static bool covers(struct file_run *r, uint64_t size)
{
	struct file_op *fop = r->fop;

	if (fop->flags & FILE_F_APPEND) {
		if ((block_floor(size) << BLOCK_SHIFT) >= r->seg[0].start)
			return true;
	} else if (fop->offset <= size || (block_floor(size) << BLOCK_SHIFT) >= r->seg[0].start) {
		return true;
	}
	r->low = size;
	return false;
}

static enum step write_again(struct file_run *r, enum seg_kind kind)
{
	run_release(r, 0);
	r->kind = kind;
	r->step = write_acquire;
	return STEP_NEXT;
}

/* What write_look() would find later, when privileges are gone: that the map changes. 0: the
 * segment allows all that is to come. */
static int convert_early(struct file_run *r)
{
	struct file_op *fop = r->fop;
	bool written;
	int rc;

	if (r->seg[0].kind != SEG_WRITE_IO)
		return 0;
	fs_rdlock(r->fs);
	rc = range_written(fop->in, block_floor(fop->offset), block_ceil(fop->offset + fop->len),
			   &written);
	fs_unlock(r->fs);
	if (rc || written)
		return rc;
	return seg_change(fop->in, &r->seg[0], SEG_WRITE_MAP);
}

/* Segment held, and its range is right: sharing, privileges, tail. */
static enum step write_prepare(struct file_run *r)
{
	struct file_op *fop = r->fop;
	struct inode *in = fop->in;
	uint64_t end = fop->offset + fop->len;
	bool shared;
	enum step s;
	int rc;

	if (r->kind != SEG_MAP) {
		fs_rdlock(r->fs);
		rc = range_shared(in, block_floor(r->seg[0].start), block_ceil(end), &shared);
		fs_unlock(r->fs);
		if (rc)
			return run_end(r, rc);
		if (shared)
			return write_again(r, SEG_MAP);
	}
	if ((fop->flags & FILE_F_NOWAIT) && (fop->flags & FILE_F_KILL_PRIV)) {
		rc = convert_early(r);
		if (rc)
			return rc == ERR_PARKED ? STEP_PARKED : run_end(r, rc);
	}
	s = run_kill_priv(r, in);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return run_end(r, r->err);
	return tail_begin(r, in, fop->offset, false, write_general);
}

static int append_place(struct file_run *r, uint64_t size)
{
	struct file_op *fop = r->fop;
	int rc;

	fop->offset = size;
	rc = clamp_len(fop);
	if (!rc)
		seg_shrink(fop->in, &r->seg[0], block_floor(size) << BLOCK_SHIFT,
			   block_ceil(size + fop->len) << BLOCK_SHIFT);
	return rc;
}

static enum step write_in_place(struct file_run *r, uint64_t dev_offset)
{
	struct file_op *fop = r->fop;
	uint64_t off = fop->offset, end = off + fop->len;
	const void *buf = fop->buf;
	int rc;

	r->wr.off = off;
	r->wr.end = end;
	if (may_be_early(r) && run_parts_room(r, run_pieces(r, end - off)) && early_answer(r, off, end, false, &buf))
		r->wr.touched = true;
	rc = run_part(r, IO_WRITE, dev_offset, (void *)(uintptr_t)buf, end - off);
	if (rc) {
		r->nparts = 0;
		r->err = rc;
		return write_done(r);
	}
	return run_submit(r, write_in_place_end);
}

static enum step write_locked(struct file_run *r)
{
	struct file_op *fop = r->fop;
	struct inode *in = fop->in;
	uint64_t size, dev_offset;
	int rc = 0;

	fs_rdlock(r->fs);
	size = in->core.size;
	if (unlikely(!covers(r, size))) {
		fs_unlock(r->fs);
		return write_again(r, r->kind);
	}
	if (likely(!(fop->flags & (FILE_F_APPEND | FILE_F_KILL_PRIV)) && in_place(r,
		&dev_offset))) {
		fs_unlock(r->fs);
		return write_in_place(r, dev_offset);
	}
	fs_unlock(r->fs);
	if (fop->flags & FILE_F_APPEND)
		rc = append_place(r, size);
	if (!rc && fs_is_shutdown(r->fs))
		rc = -ERR_SHUTDOWN;
	if (rc)
		return run_end(r, rc);
	r->step = write_prepare;
	return STEP_NEXT;
}

/* For who does not want to wait for it. A PIN that is granted a moment later is waited for. */
static bool pinned(struct inode *in, uint64_t start, uint64_t end)
{
	bool found;

	pthread_mutex_lock(&in->lock);
	found = seg_next_grant_locked(in, 1u << SEG_GRANT_PIN, 0, start, end, NULL);
	pthread_mutex_unlock(&in->lock);
	return found;
}

static enum step write_acquire(struct file_run *r)
{
	struct file_op *fop = r->fop;
	uint64_t start = block_floor(MIN(fop->offset, r->low)) << BLOCK_SHIFT;
	uint64_t end = block_ceil(fop->offset + fop->len) << BLOCK_SHIFT;

	if (fop->flags & FILE_F_APPEND) {
		start = block_floor(r->low) << BLOCK_SHIFT;
		end = UINT64_MAX;
	}
	if (unlikely(fop->flags & FILE_F_NOPIN) && pinned(fop->in, start, end))
		return run_end(r, -EBUSY);
	r->step = write_locked;
	return run_acquire(r, 0, r->kind, start, end);
}

/* Is this write to be durable when it is answered? By O_DSYNC, or because its caller writes and
 * fsyncs by turns, as logs of databases do: then one command does what would be two. */
static bool wants_fua(struct file_op *fop)
{
	struct inode *in = fop->in;

	if (fop->len > FUA_BYTES)
		return false;
	if (atomic_load_explicit(&in->unsynced, memory_order_relaxed))
		atomic_store_explicit(&in->fsync_habit, 0, memory_order_relaxed);
	else
		atomic_store_explicit(&in->unsynced, 1, memory_order_relaxed);
	return (fop->flags & FILE_F_DSYNC) ||
	       atomic_load_explicit(&in->fsync_habit, memory_order_relaxed) >= FUA_HABIT;
}

enum step file_write_start(struct file_run *r)
{
	struct file_op *fop = r->fop;

	r->fua = wants_fua(fop);
	if (fop->len > FILE_IO_MAX)
		return run_end(r, -EINVAL);
	if (fop->len == 0)
		return run_end(r, 0);
	if (fop->flags & FILE_F_APPEND) {
		fs_rdlock(r->fs);
		r->low = fop->in->core.size;
		fs_unlock(r->fs);
	} else {
		int rc = clamp_len(fop);

		if (rc)
			return run_end(r, rc);
		r->low = UINT64_MAX;
	}
	r->kind = SEG_WRITE_IO;
	r->step = write_acquire;
	return STEP_NEXT;
}

/* ---- setuid, setgid, capabilities ----------------------------------------------------------- */

#define CAPABILITY "security.capability"

static bool has_privileges(struct inode *in)
{
	bool has;

	fs_rdlock(in->fs);
	has = (in->core.mode & 04000) || (in->core.mode & 02010) == 02010 ||
	      (in->core.xattrs && xattr_get_locked(in, CAPABILITY, NULL, 0) > 0);
	fs_unlock(in->fs);
	return has;
}

enum step run_kill_priv(struct file_run *r, struct inode *in)
{
	struct attr_change change = { .valid = ATTR_KILL_PRIV };
	enum step how;
	int rc;

	if (!(r->fop->flags & FILE_F_KILL_PRIV) || !has_privileges(in))
		return STEP_NEXT;
	do {
		rc = namei_setattr(in, &change);
		if (!rc) {
			r->fop->flags |= FILE_F_PRIV_KILLED;
			return STEP_NEXT;
		}
		if (rc != -ERR_JOURNAL_FULL || !run_retry(r, &rc, &how)) {
			r->err = rc;
			return STEP_NEXT;
		}
	} while (how == STEP_NEXT);
	return STEP_PARKED;
}
