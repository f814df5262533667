/* SPDX-License-Identifier: MIT
 *
 * file_truncate.c - truncate both ways, and the machine that unmaps a range in rolling
 * transactions.
 *
 * Down: one transaction sets the size, unmaps what fits, and leaves an intent when there is more.
 * From its commit on the truncate cannot fail half-way: a crash is finished by the reaper at the
 * next mount, before anybody can extend the file over what is left (the reaper holds the segment).
 * The MAP segment to the end of all files is held until the last piece is gone. Nothing is zeroed
 * on the way down; the partial last block keeps its bytes, and shrink_xid says from when on they
 * may be overwritten.
 *
 * Up: the old tail is zeroed on the device, then the size moves. KEEP_SIZE preallocation below the
 * new size stays, as zeros.
 */
#include "file_run.h"

/* More records than this below the cut: an intent is written before the first removal. Up to this
 * many fit one transaction for certain: each costs a delete in the extent tree, one in the
 * reference counts, and one free. */
#define REMOVE_AT_ONCE 8u
#define REMOVE_RECORDS 64u

void note_unshare(struct inode *in)
{
	if (in->core.flags & INODE_F_SHARED)
		atomic_store(&in->fs->unshare_xid, jrn_running(in->fs));
}

int staging_end(struct trans *t, struct inode *in, uint64_t intent)
{
	struct extent left;
	int rc = extmap_lookup(in, FORK_STAGING, 0, FILE_MAX_BLOCKS, &left);

	if (rc < 0)
		return rc;
	if (left.state == EXT_HOLE && left.len == FILE_MAX_BLOCKS)
		in->core.flags &= ~INODE_F_STAGING;
	return intent_del(t, intent);
}

static int add_intent(struct trans *t, struct inode *in, enum fork fork, fileblk_t a, fileblk_t b,
		      uint32_t type, uint64_t *id)
{
	struct intent_disk rec = {
		.type = put32(type), .flags = put32(fork == FORK_STAGING ? INTENT_F_STAGING : 0),
		.ino = put64(in->ino), .a = put64(a), .b = put64(b),
	};

	return intent_add(t, &rec, id);
}

int remove_some(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, fileblk_t *end,
		uint32_t intent_type, uint64_t *intent)
{
	struct extent many[REMOVE_AT_ONCE + 1];
	fileblk_t rest = *end;
	int rc = 0;

	if (file >= *end)
		return 0;
	if (!*intent) {
		rc = extmap_list(in, fork, file, *end, false, many, ARRAY_LEN(many));
		if (rc < 0)
			return rc;
		if (rc > (int)REMOVE_AT_ONCE)
			rc = add_intent(t, in, fork, file, *end, intent_type, intent);
		else
			rc = 0;
	}
	if (!rc)
		rc = extmap_remove(t, in, fork, file, *end, REMOVE_RECORDS, &rest);
	if (rc < 0)
		return rc;
	rc = 0;
	if (rest > file && !*intent)
		rc = add_intent(t, in, fork, file, *end, intent_type, intent);
	else if (rest <= file && *intent && fork == FORK_STAGING)
		rc = staging_end(t, in, *intent);
	else if (rest <= file && *intent)
		rc = intent_del(t, *intent);
	if (rc)
		return rc;
	*end = MAX(rest, file);
	return 0;
}

static enum step remove_over(struct file_run *r, int rc)
{
	if (rc && !r->err)
		r->err = rc;
	/* The intent is left: the next mount would punch what is written there from now on. */
	if (rc && r->rm.intent && r->rm.fork == FORK_DATA)
		fs_shutdown_writes(r->fs, rc, "inode %llu: its blocks could not be freed to the end",
				   (unsigned long long)r->rm.in->ino);
	r->step = r->rm.then;
	return STEP_NEXT;
}

static enum step remove_step(struct file_run *r)
{
	struct remove_body *m = &r->rm;
	uint64_t intent = m->intent;
	fileblk_t end = m->end;
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, REMOVE_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = trans_join_inode(&t, m->in);
		if (!rc)
			rc = remove_some(&t, m->in, m->fork, m->file, &end, m->intent_type,
					 &intent);
		if (!rc)
			rc = inode_write(&t, m->in);
		if (rc) {
			run_trans_fail(r, &t, rc);
		} else {
			note_unshare(m->in);
			trans_commit(&t);
		}
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : remove_over(r, rc);
	m->end = end;
	m->intent = intent;
	if (end > m->file)
		return run_yield(r, remove_step);
	return remove_over(r, 0);
}

enum step remove_begin(struct file_run *r, struct inode *in, enum fork fork, fileblk_t file,
		       fileblk_t end,
		       uint32_t intent_type, uint64_t intent, step_fn then)
{
	r->rm = (struct remove_body){ .in = in, .fork = fork, .file = file, .end = end,
				      .intent_type = intent_type, .intent = intent, .then = then };
	r->step = file < end || intent ? remove_step : then;
	return STEP_NEXT;
}

/* ---- truncate ------------------------------------------------------------------------------- */

static enum step truncate_locked(struct file_run *r);

static enum step truncate_end(struct file_run *r)
{
	return run_end(r, r->err);
}

static enum step truncate_done(struct file_run *r)
{
	if (!r->err && (r->fop->flags & FILE_F_DSYNC))
		return run_durable(r, r->fop->in, truncate_end);
	r->step = truncate_end;
	return STEP_NEXT;
}

static enum step truncate_acquire(struct file_run *r)
{
	struct inode *in = r->fop->in;
	uint64_t low;

	fs_rdlock(r->fs);
	low = MIN(in->core.size, r->fop->offset);
	fs_unlock(r->fs);
	r->low = block_floor(low) << BLOCK_SHIFT;
	r->step = truncate_locked;
	return run_acquire(r, 0, SEG_MAP, r->low, UINT64_MAX);
}

/* The transaction of a truncate down or to the same size: size, and the first pieces. */
static int truncate_down(struct file_run *r, fileblk_t *end, uint64_t *intent)
{
	struct inode *in = r->fop->in;
	uint64_t size = r->fop->offset;
	struct extent tail = { 0 };
	struct trans t;
	bool shrinks;
	xid_t xid;
	int rc;

	rc = trans_begin(r->fs, &t, REMOVE_TRANS_BLOCKS);
	if (rc)
		return rc;
	shrinks = size < in->core.size;
	t.alloc_flags |= ALLOC_USE_RESERVE;
	rc = trans_join_inode(&t, in);
	if (!rc && shrinks && (size & BLOCK_MASK))
		rc = extmap_lookup(in, FORK_DATA, block_floor(size), 1, &tail);
	if (!rc) {
		in->core.size = size;
		in->core.flags &= ~INODE_F_PREALLOC;
		inode_touch(in, TOUCH_MTIME | TOUCH_CTIME);
		rc = remove_some(&t, in, FORK_DATA, block_ceil(size), end, INTENT_FREE_TAIL,
				 intent);
	}
	if (!rc)
		rc = inode_write(&t, in);
	if (rc)
		return run_trans_fail(r, &t, rc);
	note_unshare(in);
	xid = trans_commit(&t);
	/* Under the MAP segment: nobody else looks at these two now. */
	if (shrinks)
		in->tail_zero = false;
	if (tail.state == EXT_WRITTEN)
		in->shrink_xid = xid;
	return 0;
}

static enum step truncate_down_step(struct file_run *r)
{
	fileblk_t end = FILE_MAX_BLOCKS;
	uint64_t intent = 0;
	enum step how;
	int rc;

	rc = truncate_down(r, &end, &intent);
	if (rc) {
		if (run_retry(r, &rc, &how))
			return how;
		return run_end(r, rc);
	}
	return remove_begin(r, r->fop->in, FORK_DATA, block_ceil(r->fop->offset), end,
			    INTENT_FREE_TAIL,
			    intent, truncate_done);
}

/* Size and times, after the tail is zero. */
static enum step truncate_up_step(struct file_run *r)
{
	struct inode *in = r->fop->in;
	struct trans t;
	enum step how;
	int rc;

	if (r->err)
		return run_end(r, r->err);
	rc = trans_begin(r->fs, &t, INODE_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = trans_join_inode(&t, in);
		if (!rc) {
			in->core.size = r->fop->offset;
			inode_touch(in, TOUCH_MTIME | TOUCH_CTIME);
			rc = inode_write(&t, in);
		}
		if (rc)
			run_trans_fail(r, &t, rc);
		else
			trans_commit(&t);
	}
	if (rc) {
		if (run_retry(r, &rc, &how))
			return how;
		return run_end(r, rc);
	}
	r->step = truncate_done;
	return STEP_NEXT;
}

static enum step truncate_locked(struct file_run *r)
{
	struct inode *in = r->fop->in;
	uint64_t size;
	enum step s;

	fs_rdlock(r->fs);
	size = in->core.size;
	fs_unlock(r->fs);
	if ((block_floor(MIN(size, r->fop->offset)) << BLOCK_SHIFT) < r->low) {
		run_release(r, 0);
		r->step = truncate_acquire;
		return STEP_NEXT;
	}
	s = run_kill_priv(r, in);
	if (s != STEP_NEXT)
		return s;
	if (r->err)
		return run_end(r, r->err);
	if (r->fop->offset > size)
		return tail_begin(r, in, r->fop->offset, true, truncate_up_step);
	r->step = truncate_down_step;
	return STEP_NEXT;
}

enum step file_truncate_start(struct file_run *r)
{
	if (r->fop->offset > FILE_MAX_BYTES)
		return run_end(r, -EFBIG);
	r->step = truncate_acquire;
	return STEP_NEXT;
}
