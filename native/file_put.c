/* SPDX-License-Identifier: MIT
 *
 * file_put.c - the machine that puts bytes into a file: allocate, merge, write, convert.
 *
 * Chain: write_begin -> write_look -> [write_stage] -> [write_allocate] -> write_settle ->
 * write_merge -> write_out -> write_convert -> then.
 *
 * A block of the range is, when it begins:
 *   written, unshared  rewritten in place;
 *   unwritten          written, then converted (a WRITE_IO segment becomes WRITE_MAP before that);
 *   hole               allocated unwritten (a transaction), then as above;
 *   written, shared    a new block is allocated in the staging fork, written, and takes the old
 *                      one's place in the map (remapped) in the transaction that removes it from
 *                      the staging fork.
 *
 * Copy on write and crashes: the first staging transaction also writes an intent (PUNCH of the
 * staging fork), the last remap removes it. Whatever the crash leaves in the staging fork in
 * between was never mapped, and the reaper frees it at the next mount: no leak, and no reader ever
 * saw it.
 *
 * Space that runs out after the first block shortens the write; before it, it fails. What was
 * allocated past EOF for a write that then fails stays as unwritten preallocation, until truncate
 * or deletion.
 */
#include "file_run.h"

#include <string.h>

/* One conversion or allocation changes the records around it (a split into three), and with them
 * the inode; a remap also the reference counts and the free space of the old block. */
#define STEP_TRANS_BLOCKS 256u
#define STEP_RECORDS 64u

static enum step write_look(struct file_run *r);
static enum step write_allocate(struct file_run *r);
static enum step write_merge(struct file_run *r);
static enum step write_convert(struct file_run *r);

static bool grows(const struct write_body *w)
{
	return w->grow && w->end > w->size;
}

static enum step write_over(struct file_run *r, int rc)
{
	struct write_body *w = &r->wr;

	run_mem_put(w->bounce, w->bounce_len);
	w->bounce = NULL;
	r->nparts = 0;
	if (rc && !r->err)
		r->err = rc;
	if (r->err && w->grow)
		w->in->tail_zero = false;
	r->step = w->then;
	return STEP_NEXT;
}

int range_shared(struct inode *in, fileblk_t b0, fileblk_t b1, bool *shared)
{
	*shared = false;
	if (!(in->core.flags & INODE_F_SHARED))
		return 0;
	while (b0 < b1) {
		struct extent ext;
		nblocks_t run;
		int rc = extmap_lookup(in, FORK_DATA, b0, b1 - b0, &ext);

		if (rc < 0)
			return rc;
		if (ext.state == EXT_WRITTEN) {
			rc = extmap_is_shared(in, &ext, shared, &run);
			if (rc < 0 || *shared)
				return rc;
			xassert(run > 0);
			ext.len = MIN(ext.len, run);
		}
		b0 += ext.len;
	}
	return 0;
}

int range_written(struct inode *in, fileblk_t b0, fileblk_t b1, bool *written)
{
	*written = true;
	while (b0 < b1 && *written) {
		struct extent ext;
		int rc = extmap_lookup(in, FORK_DATA, b0, b1 - b0, &ext);

		if (rc < 0)
			return rc;
		*written = ext.state == EXT_WRITTEN;
		b0 += ext.len;
	}
	return 0;
}

enum step write_begin(struct file_run *r, struct inode *in, uint64_t off, uint64_t end,
		      const void *buf,
		      bool grow, unsigned touch, step_fn then)
{
	xassert(off < end);
	r->wr = (struct write_body){ .in = in, .off = off, .end = end, .buf = buf, .grow = grow,
				     .touch = touch, .then = then, .touched = r->wr.touched,
				     .b0 = block_floor(off), .b1 = block_ceil(end) };
	r->space_tries = r->reaper_tries = 0;
	r->step = write_look;
	return STEP_NEXT;
}

/* ---- look: what kind of blocks are these? --------------------------------------------------- */

struct looks { bool holes, unwritten, written, shared, eof_written; };

static int look(struct write_body *w, struct looks *l)
{
	struct inode *in = w->in;
	fileblk_t eof = block_floor(w->size), at = w->b0;
	int rc;

	*l = (struct looks){ 0 };
	while (at < w->b1) {
		struct extent ext;

		rc = extmap_lookup(in, FORK_DATA, at, w->b1 - at, &ext);
		if (rc < 0)
			return rc;
		l->holes |= ext.state == EXT_HOLE;
		l->unwritten |= ext.state != EXT_WRITTEN;
		l->written |= ext.state == EXT_WRITTEN;
		if (ext.state == EXT_WRITTEN && (w->size & BLOCK_MASK) && at <= eof &&
		    eof < at + ext.len)
			l->eof_written = true;
		at += ext.len;
	}
	return range_shared(in, w->b0, w->b1, &l->shared);
}

static enum step stage_or_allocate(struct file_run *r, const struct looks *l);

static struct seg *seg_on(struct file_run *r, const struct inode *in)
{
	return &r->seg[r->seg_in[0] == in ? 0 : 1];
}

/* Readers of the range are kept out. */
static bool may_remap(struct file_run *r, const struct inode *in)
{
	const struct seg *s = seg_on(r, in);

	return s->state == SEG_HELD && (s->kind == SEG_MAP || s->kind == SEG_SWAP);
}

/* Holes and unwritten blocks become written: who was told of them has to give that back first. */
static int may_convert(struct file_run *r, struct inode *in)
{
	struct seg *s = seg_on(r, in);

	xassert(s->state == SEG_HELD);
	return s->kind == SEG_WRITE_IO ? seg_change(in, s, SEG_WRITE_MAP) : 0;
}

static enum step write_look(struct file_run *r)
{
	struct write_body *w = &r->wr;
	struct fs *fs = r->fs;
	struct looks l;
	int rc;

	fs_rdlock(fs);
	w->size = w->in->core.size;
	rc = look(w, &l);
	/* Of unwritten blocks, too: they may have been written, and another's, in what is durable. */
	w->settle_xid = w->in->moved_xid;
	fs_unlock(fs);
	if (rc)
		return write_over(r, rc);
	xassert(!l.shared || may_remap(r, w->in));
	/* Only the first look of a write parks here: nothing is allocated yet, and it looks again. */
	rc = l.unwritten ? may_convert(r, w->in) : 0;
	if (rc)
		return rc == ERR_PARKED ? STEP_PARKED : write_over(r, rc);
	if (l.eof_written && shrink_pending(w->in))
		w->settle_xid = MAX(w->settle_xid, w->in->shrink_xid);
	w->unwritten = l.unwritten;
	w->cow = l.shared;
	w->at = w->b0;
	w->stage_end = w->b1;
	return stage_or_allocate(r, &l);
}

static enum step write_leave(struct file_run *r, int rc);

static bool bounce_get(struct write_body *w)
{
	if (w->bounce)
		return true;
	w->bounce_len = (w->b1 - w->b0) << BLOCK_SHIFT;
	w->bounce = run_mem_get(w->bounce_len);
	return w->bounce;
}

static bool merges(const struct write_body *w);

/* Transfers of a write that stages nothing. */
static int count_parts(struct file_run *r, nblocks_t *n)
{
	struct write_body *w = &r->wr;
	struct extent ext;
	int rc = 0;

	*n = 0;
	fs_rdlock(r->fs);
	for (fileblk_t at = w->b0; at < w->b1 && !rc; at += ext.len) {
		rc = extmap_lookup(w->in, FORK_DATA, at, w->b1 - at, &ext);
		*n += rc ? 0 : run_pieces(r, ext.len << BLOCK_SHIFT);
	}
	fs_unlock(r->fs);
	return rc;
}

/* All the memory that the data needs on its way: it is not to be missing after the answer. */
static bool memory_get(struct file_run *r)
{
	struct write_body *w = &r->wr;
	nblocks_t n = (w->b1 - w->b0) * run_pieces(r, BLOCK_SIZE);

	if (n > r->parts_cap && count_parts(r, &n))
		return false;
	return run_parts_room(r, n) && (!merges(w) || bounce_get(w));
}

/* Where every block goes is decided. What is durable may still need the bytes that we would
 * overwrite in place: file.h rule 3, and fs.h unshare_xid. A block may have lost its other user
 * after write_look(), while others were staged, so this comes last; and it asks once, or whoever
 * unshares other files all the time would keep us waiting. */
static enum step write_settle(struct file_run *r)
{
	struct write_body *w = &r->wr;
	enum step s;

	if (!w->settling) {
		fs_rdlock(r->fs);
		if (w->in->core.flags & INODE_F_SHARED)
			w->settle_xid = MAX(w->settle_xid, atomic_load(&r->fs->unshare_xid));
		fs_unlock(r->fs);
		w->settling = true;
		/* From here on nothing can go wrong but the device. */
		if (w->early && !w->cow && memory_get(r) &&
		    early_answer(r, w->off, w->end, grows(w), &w->buf)) {
			w->touch = 0;
			w->touched = true;
		}
	}
	s = run_await_xid(r, w->settle_xid);
	if (s == STEP_DONE)
		return write_leave(r, r->err);
	if (s == STEP_NEXT)
		r->step = write_merge;
	return s;
}

/* ---- allocate ------------------------------------------------------------------------------- */

static int stage_some(struct trans *t, struct write_body *w, uint64_t *intent, fileblk_t *at)
{
	struct inode *in = w->in;
	int rc;

	if (!*intent) {
		struct intent_disk rec = {
			.type = put32(INTENT_PUNCH), .flags = put32(INTENT_F_STAGING),
			.ino = put64(in->ino), .a = put64(w->b0), .b = put64(w->b1),
		};

		rc = intent_add(t, &rec, intent);
		if (rc)
			return rc;
		in->core.flags |= INODE_F_STAGING;
	}
	for (unsigned n = 0; *at < w->b1 && n < STEP_RECORDS && trans_room(t) > 64; n++) {
		struct extent ext;
		bool shared = false;
		nblocks_t done;

		rc = extmap_lookup(in, FORK_DATA, *at, w->b1 - *at, &ext);
		if (rc < 0)
			return rc;
		done = ext.len;
		if (ext.state == EXT_WRITTEN) {
			rc = extmap_is_shared(in, &ext, &shared, &done);
			done = MIN(done, ext.len);
		}
		if (rc >= 0 && shared) {
			rc = extmap_allocate(t, in, FORK_STAGING, *at, done, 0, STEP_RECORDS,
					     &done);
			if (rc >= 0 && done == 0)
				return 0; /* room is low */
		}
		if (rc < 0)
			return rc;
		*at += done;
	}
	return 0;
}

static enum step write_unstage(struct file_run *r);

/* The write is over, well or not (rc): what is left in the staging fork goes back. */
static enum step write_leave(struct file_run *r, int rc)
{
	if (!r->err)
		r->err = rc;
	if (!r->wr.intent)
		return write_over(r, rc);
	r->step = write_unstage;
	return STEP_NEXT;
}

static enum step write_stage(struct file_run *r)
{
	struct write_body *w = &r->wr;
	uint64_t intent = w->intent;
	fileblk_t at = w->at;
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, STEP_TRANS_BLOCKS);
	if (!rc) {
		rc = trans_join_inode(&t, w->in);
		if (!rc)
			rc = stage_some(&t, w, &intent, &at);
		if (!rc)
			rc = inode_write(&t, w->in);
		if (rc)
			run_trans_fail(r, &t, rc);
		else
			trans_commit(&t);
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : write_leave(r, rc);
	w->intent = intent;
	w->at = at;
	r->space_tries = r->reaper_tries = 0;
	if (at < w->b1)
		return run_yield(r, write_stage);
	w->at = w->b0;
	r->step = write_allocate;
	return STEP_NEXT;
}

static enum step write_unstage_end(struct file_run *r)
{
	return write_over(r, r->err);
}

static enum step write_unstage(struct file_run *r)
{
	struct write_body *w = &r->wr;

	return remove_begin(r, w->in, FORK_STAGING, w->b0, w->stage_end, INTENT_PUNCH, w->intent,
			    write_unstage_end);
}

static enum step stage_or_allocate(struct file_run *r, const struct looks *l)
{
	if (l->shared)
		r->step = write_stage;
	else
		r->step = l->holes ? write_allocate : write_settle;
	return STEP_NEXT;
}

/* No space for the blocks from w->at on: write what there is place for. */
static enum step allocate_failed(struct file_run *r, int rc)
{
	struct write_body *w = &r->wr;

	if (rc == -ENOSPC && w->at > w->b0 && w->buf) {
		w->end = MIN(w->end, w->at << BLOCK_SHIFT);
		w->b1 = w->at;
		r->step = write_settle;
		return STEP_NEXT;
	}
	return write_leave(r, rc);
}

static enum step write_allocate(struct file_run *r)
{
	struct write_body *w = &r->wr;
	struct trans t;
	nblocks_t done = 0;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, STEP_TRANS_BLOCKS);
	if (!rc) {
		rc = trans_join_inode(&t, w->in);
		if (!rc)
			rc = extmap_allocate(&t, w->in, FORK_DATA, w->at, w->b1 - w->at, 0,
					     STEP_RECORDS,
					     &done);
		if (rc >= 0 && done == 0)
			rc = -ENOSPC;
		if (rc >= 0)
			rc = inode_write(&t, w->in);
		if (rc < 0)
			run_trans_fail(r, &t, rc);
		else
			trans_commit(&t);
	}
	if (rc < 0)
		return run_retry(r, &rc, &how) ? how : allocate_failed(r, rc);
	w->at += done;
	r->space_tries = r->reaper_tries = 0;
	if (w->at < w->b1)
		return run_yield(r, write_allocate);
	r->step = write_settle;
	return STEP_NEXT;
}

/* ---- merge: whole blocks in memory ---------------------------------------------------------- */

static bool head_partial(const struct write_body *w)
{
	return w->off & BLOCK_MASK;
}

/* Bytes behind the write in its last block, still below EOF, are kept. */
static bool tail_partial(const struct write_body *w)
{
	return (w->end & BLOCK_MASK) && w->end < w->size;
}

static bool merges(const struct write_body *w)
{
	return head_partial(w) || tail_partial(w);
}

/* Transfer of one old block into the bounce buffer, or zeros. fs->lock shared. */
static int merge_read(struct file_run *r, fileblk_t at)
{
	struct write_body *w = &r->wr;
	uint8_t *mem = (uint8_t *)w->bounce + ((at - w->b0) << BLOCK_SHIFT);
	struct extent ext;
	int rc = extmap_lookup(w->in, FORK_DATA, at, 1, &ext);

	if (rc < 0)
		return rc;
	if (ext.state == EXT_WRITTEN)
		return run_part(r, IO_READ, ext.block << BLOCK_SHIFT, mem, BLOCK_SIZE);
	return run_part_zero(r, mem, BLOCK_SIZE);
}

static enum step write_out(struct file_run *r);

static enum step write_compose(struct file_run *r)
{
	struct write_body *w = &r->wr;
	uint64_t start = w->b0 << BLOCK_SHIFT, stop = w->b1 << BLOCK_SHIFT;
	uint64_t dead = MAX(w->end, w->size); /* from here on nothing is this file's */
	uint8_t *mem = w->bounce;

	if (r->io_err)
		return write_leave(r, r->io_err);
	if (w->size < w->off) {
		uint64_t from = MAX(start, w->size);

		memset(mem + (from - start), 0, w->off - from);
	}
	if (w->buf)
		memcpy(mem + (w->off - start), w->buf, w->end - w->off);
	else
		memset(mem + (w->off - start), 0, w->end - w->off);
	if (dead < stop)
		memset(mem + (dead - start), 0, stop - dead);
	w->out = mem;
	r->step = write_out;
	return STEP_NEXT;
}

static enum step write_merge(struct file_run *r)
{
	struct write_body *w = &r->wr;
	uintptr_t odd = ((uintptr_t)w->buf & (r->fs->dev->align - 1)) | ((w->off |
		w->end) & BLOCK_MASK);
	int rc = 0;

	if (w->buf && !odd) {
		w->out = w->buf;
		r->step = write_out;
		return STEP_NEXT;
	}
	/* Our own copy is of whole blocks: when nothing old is to be kept, zeros behind it do. */
	if (r->early && !merges(w)) {
		uint64_t len = w->end - w->off;

		memset((uint8_t *)(uintptr_t)w->buf + len, 0, ((w->b1 - w->b0) << BLOCK_SHIFT) - len);
		w->out = w->buf;
		r->step = write_out;
		return STEP_NEXT;
	}
	if (!bounce_get(w))
		return write_leave(r, -ENOMEM);
	fs_rdlock(r->fs);
	if (head_partial(w))
		rc = merge_read(r, w->b0);
	if (!rc && tail_partial(w) && !(head_partial(w) && w->b1 == w->b0 + 1))
		rc = merge_read(r, w->b1 - 1);
	fs_unlock(r->fs);
	if (rc) {
		r->nparts = 0;
		return write_leave(r, rc);
	}
	return run_submit(r, write_compose);
}

/* ---- write ---------------------------------------------------------------------------------- */

/* Where block `at` is to be written, staging before data: *len blocks at *block. fs->lock shared.
 */
static int place_of(struct write_body *w, fileblk_t at, fsblock_t *block, nblocks_t *len)
{
	nblocks_t max = w->b1 - at;
	struct extent ext;
	int rc;

	if (w->cow) {
		rc = extmap_lookup(w->in, FORK_STAGING, at, max, &ext);
		if (rc < 0)
			return rc;
		if (ext.state != EXT_HOLE) {
			*block = ext.block;
			*len = ext.len;
			return 0;
		}
		max = ext.len;
	}
	rc = extmap_lookup(w->in, FORK_DATA, at, max, &ext);
	if (rc < 0)
		return rc;
	xassert(ext.state != EXT_HOLE);
	*block = ext.block;
	*len = ext.len;
	return 0;
}

/* The last block was composed with zeros behind its bytes, or ends at EOF. */
static void tail_written(struct write_body *w)
{
	if (w->end < w->size && w->b1 <= block_floor(w->size))
		return;
	/* An early write may have moved EOF on, and says itself what is behind it. */
	fs_rdlock(w->in->fs);
	if (w->in->core.size == MAX(w->size, w->end))
		w->in->tail_zero = true;
	fs_unlock(w->in->fs);
}

static enum step write_out_end(struct file_run *r)
{
	struct write_body *w = &r->wr;

	run_mem_put(w->bounce, w->bounce_len);
	w->bounce = NULL;
	if (r->io_err)
		return write_leave(r, r->io_err);
	w->at = w->b0;
	if (w->unwritten || w->cow || grows(w)) {
		r->step = write_convert;
		return STEP_NEXT;
	}
	tail_written(w);
	return write_over(r, 0);
}

static enum step write_out(struct file_run *r)
{
	struct write_body *w = &r->wr;
	int rc = 0;

	if (grows(w))
		w->in->tail_zero = false;
	fs_rdlock(r->fs);
	for (fileblk_t at = w->b0; at < w->b1 && !rc;) {
		fsblock_t block;
		nblocks_t len;

		rc = place_of(w, at, &block, &len);
		if (rc)
			break;
		rc = run_part(r, IO_WRITE, block << BLOCK_SHIFT,
			      (uint8_t *)w->out + ((at - w->b0) << BLOCK_SHIFT),
			      len << BLOCK_SHIFT);
		at += len;
	}
	fs_unlock(r->fs);
	if (rc) {
		r->nparts = 0;
		return write_leave(r, rc);
	}
	return run_submit(r, write_out_end);
}

/* ---- convert -------------------------------------------------------------------------------- */

/* Blocks staged at *at take the place of the shared ones; others become written. One extent's
 * worth. */
static int convert_one(struct trans *t, struct write_body *w, fileblk_t *at)
{
	struct inode *in = w->in;
	struct extent staged, old;
	nblocks_t n;
	int rc;

	rc = extmap_lookup(in, FORK_STAGING, *at, w->b1 - *at, &staged);
	if (rc < 0)
		return rc;
	rc = extmap_lookup(in, FORK_DATA, *at, staged.len, &old);
	if (rc < 0)
		return rc;
	n = old.len;
	if (staged.state != EXT_HOLE) {
		fileblk_t rest = *at;

		/* The new blocks change forks: for a moment they have two users, so that neither
		 * step frees them. */
		rc = refcount_add(t, staged.block, n);
		if (!rc)
			rc = extmap_remap(t, in, FORK_DATA, *at, n, staged.block);
		if (!rc)
			rc = extmap_remove(t, in, FORK_STAGING, *at, *at + n, 1, &rest);
		if (rc >= 0 && rest != *at) {
			fs_shutdown_writes(t->fs, -ERR_FREE_CORRUPT,
					   "block %llu was free and has reference counts",
					   (unsigned long long)staged.block);
			rc = -ERR_FREE_CORRUPT;
		}
	} else if (old.state == EXT_UNWRITTEN) {
		rc = extmap_set_state(t, in, FORK_DATA, *at, n, EXT_WRITTEN, STEP_RECORDS, &n);
	}
	if (rc >= 0)
		*at += n;
	return MIN(rc, 0);
}

static int convert_some(struct trans *t, struct write_body *w, fileblk_t *at)
{
	nblocks_t done = 0;
	int rc = 0;

	if (w->cow) {
		for (unsigned n = 0; *at < w->b1 && !rc && (n == 0 || trans_room(t) > 96); n++)
			rc = convert_one(t, w, at);
	} else if (w->unwritten) {
		rc = extmap_set_state(t, w->in, FORK_DATA, *at, w->b1 - *at, EXT_WRITTEN,
				      STEP_RECORDS,
				      &done);
		*at += done;
	} else {
		*at = w->b1;
	}
	return MIN(rc, 0);
}

static void write_grow(struct write_body *w, uint64_t size)
{
	if (size <= w->in->core.size)
		return;
	w->in->core.size = size;
	early_grown(w->in);
}

static int convert_trans(struct file_run *r, fileblk_t *at)
{
	struct write_body *w = &r->wr;
	struct inode *in = w->in;
	uint64_t from = 0;
	struct trans t;
	int rc;

	rc = trans_begin(r->fs, &t, STEP_TRANS_BLOCKS);
	if (rc)
		return rc;
	t.alloc_flags |= ALLOC_USE_RESERVE; /* tree nodes only: the data has its place */
	rc = trans_join_inode(&t, in);
	if (!rc)
		rc = convert_some(&t, w, at);
	/* A write that was cut short has staged more than it wrote: write_unstage() takes it from
	 * there. */
	if (!rc && w->intent && *at == w->stage_end)
		rc = staging_end(&t, in, w->intent);
	if (!rc) {
		if (w->grow)
			write_grow(w, MIN(w->end, *at << BLOCK_SHIFT));
		if (r->early && grows(w))
			from = early_settle(r, *at < w->b1 ? MAX(w->size, *at << BLOCK_SHIFT) : UINT64_MAX);
		if (w->touch)
			inode_touch(in, w->touch);
		rc = inode_write(&t, in);
		if (rc && r->early && grows(w))
			early_settle(r, from);
	}
	if (rc)
		return run_trans_fail(r, &t, rc);
	note_unshare(in);
	trans_commit(&t);
	return 0;
}

static enum step write_convert(struct file_run *r)
{
	struct write_body *w = &r->wr;
	fileblk_t at = w->at;
	int rc;

	if (grows(w) && early_turn(r, w->in) == ERR_PARKED)
		return STEP_PARKED;
	rc = convert_trans(r, &at);
	if (rc) {
		enum step how;

		if (run_retry(r, &rc, &how))
			return how;
		return write_leave(r, rc);
	}
	xassert(at > w->at);
	w->at = at;
	w->touched |= w->touch != 0;
	if (at < w->b1)
		return run_yield(r, write_convert);
	tail_written(w);
	return w->b1 < w->stage_end ? write_leave(r, 0) : write_over(r, 0);
}
