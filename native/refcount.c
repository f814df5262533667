/* SPDX-License-Identifier: MIT
 *
 * refcount.c - counts of shared blocks.
 *
 * Invariants: records have length > 0 and refs >= 2, do not overlap, and two that touch differ in
 * refs. A block without record has one user, or is free: this module cannot tell, the extent maps
 * can.
 *
 * How a change goes: cut the records at both ends of the range, change every whole record inside,
 * join what has become equal at the two ends. Inside the range neighbours keep differing, since all
 * of them move by one.
 *
 * Blocks joined, for a range with one count throughout (callers cut their ranges so:
 * refcount_query(), refcount_query_back()): at most two cuts, one change, two joins, all on
 * neighbouring keys: two leaves, one split, their parent and the root: TRANS_TREE_OP +
 * TRANS_ALLOC_OP; a drop that frees adds TRANS_ALLOC_OP.
 */
#include "refcount.h"

#include "alloc.h"
#include "btree.h"
#include "errors.h"
#include "fs.h"

struct run {
	fsblock_t start;
	nblocks_t len;
	uint32_t refs;
};

static struct tree refcounts(struct fs *fs) { return fs_tree(fs, TREE_REFCOUNT); }

static int read_run(struct bt_cursor *c, struct run *r)
{
	nblocks_t total = c->tree.fs->super.total_blocks;
	unsigned len;
	const struct refcount_disk *rec = bt_record(c, &len);

	if (len != sizeof(*rec))
		return -ERR_RECORD_SHAPE;
	*r = (struct run){ bt_key(c).hi, get64(rec->length), get32(rec->refs) };
	if (!r->len || r->refs < 2 || r->start >= total || r->len > total - r->start ||
	    bt_key(c).lo) {
		fs_shutdown_writes(c->tree.fs, -ERR_RECORD_SHAPE,
				   "the reference count of block %llu is impossible",
				   (unsigned long long)r->start);
		return -ERR_RECORD_SHAPE;
	}
	return 0;
}

/* -ENOENT: none. */
static int find(struct fs *fs, fsblock_t block, enum bt_seek how, struct run *r)
{
	struct bt_cursor c;
	int err;

	bt_cursor_init(&c, refcounts(fs));
	err = bt_seek(&c, KEY(block, 0), how);
	if (!err)
		err = read_run(&c, r);
	bt_cursor_release(&c);
	return err;
}

int refcount_query(struct fs *fs, fsblock_t block, nblocks_t len, uint32_t *refs, nblocks_t *run)
{
	struct run r;
	int err;

	xassert(len);
	*refs = 1;
	*run = len;
	err = find(fs, block, BT_LE, &r);
	if (!err && r.start + r.len > block) {
		*refs = r.refs;
		*run = MIN(len, r.start + r.len - block);
		return 0;
	}
	if (err && err != -ENOENT)
		return err;
	err = find(fs, block, BT_GT, &r);
	if (!err)
		*run = MIN(len, r.start - block);
	return err == -ENOENT ? 0 : err;
}

int refcount_query_back(struct fs *fs, fsblock_t block, nblocks_t len, uint32_t *refs,
			nblocks_t *run)
{
	fsblock_t end = block + len;
	struct run r;
	int err;

	xassert(len);
	*refs = 1;
	*run = len;
	err = find(fs, end, BT_LT, &r);
	if (err)
		return err == -ENOENT ? 0 : err;
	if (r.start + r.len >= end) {
		*refs = r.refs;
		*run = MIN(len, end - r.start);
	} else {
		*run = MIN(len, end - (r.start + r.len));
	}
	return 0;
}

static int put_new(struct trans *t, struct run r)
{
	struct refcount_disk rec = { put64(r.len), put32(r.refs), { 0 } };

	return bt_insert(t, refcounts(t->fs), KEY(r.start, 0), &rec, sizeof(rec));
}

static int put_old(struct trans *t, struct run r)
{
	struct refcount_disk rec = { put64(r.len), put32(r.refs), { 0 } };

	return bt_update(t, refcounts(t->fs), KEY(r.start, 0), &rec, sizeof(rec));
}

/* A record that crosses `at` becomes two. */
static int cut(struct trans *t, fsblock_t at)
{
	struct run r, right;
	int err = find(t->fs, at, BT_LT, &r);

	if (err == -ENOENT || (!err && r.start + r.len <= at))
		return 0;
	if (err)
		return err;
	right = (struct run){ at, r.start + r.len - at, r.refs };
	r.len = at - r.start;
	err = put_old(t, r);
	return err ? err : put_new(t, right);
}

/* Records that touch at `at` and are equal become one. */
static int join(struct trans *t, fsblock_t at)
{
	struct run left, right;
	int err = find(t->fs, at, BT_LT, &left);

	if (!err)
		err = find(t->fs, at, BT_EQ, &right);
	if (err)
		return err == -ENOENT ? 0 : err;
	if (left.start + left.len != at || left.refs != right.refs)
		return 0;
	err = bt_delete(t, refcounts(t->fs), KEY(at, 0));
	left.len += right.len;
	return err ? err : put_old(t, left);
}

static int free_unshared(struct trans *t, fsblock_t start, nblocks_t len, uint64_t holder)
{
	return holder ? alloc_quarantine(t, start, len, holder) : alloc_free(t, start, len);
}

static int change_record(struct trans *t, struct run r, int delta)
{
	if (delta > 0) {
		if (r.refs == UINT32_MAX)
			return -EMLINK;
		r.refs++;
		return put_old(t, r);
	}
	if (--r.refs < 2)
		return bt_delete(t, refcounts(t->fs), KEY(r.start, 0));
	return put_old(t, r);
}

static int change(struct trans *t, fsblock_t start, nblocks_t len, int delta, uint64_t holder)
{
	fsblock_t end = start + len, at = start;
	int err;

	xassert(len);
	err = cut(t, start);
	if (!err)
		err = cut(t, end);
	while (!err && at < end) {
		struct run r;
		fsblock_t gap_end = end;

		err = find(t->fs, at, BT_GE, &r);
		if (err && err != -ENOENT)
			return err;
		if (!err)
			gap_end = MIN(r.start, end);
		if (gap_end > at) {
			err = delta > 0 ? put_new(t, (struct run){ at, gap_end - at, 2 })
					: free_unshared(t, at, gap_end - at, holder);
			at = gap_end;
		} else {
			err = change_record(t, r, delta);
			at = r.start + r.len;
		}
	}
	if (!err)
		err = join(t, start);
	return err ? err : join(t, end);
}

int refcount_add(struct trans *t, fsblock_t start, nblocks_t len)
{
	return change(t, start, len, 1, 0);
}

int refcount_drop(struct trans *t, fsblock_t start, nblocks_t len, uint64_t holder)
{
	return change(t, start, len, -1, holder);
}
