/* SPDX-License-Identifier: MIT
 *
 * exposure.c - what holders were told, on disk: TREE_EXPOSURE.
 *
 * Two kinds of records share the tree. Runs, key (inode, file block): so many blocks from there on
 * are unwritten (or in the staging fork) at these device blocks, and this holder knows them. And
 * one record for each inode and holder, key (inode, EXPOSURE_INODE_LO(holder)), which sorts behind
 * every run of the inode: the holder has, or had since it last returned everything of the inode, a
 * grant of it.
 *
 * Invariants: runs of one inode never overlap, whoever they belong to (RW grants of two holders do
 * not either); length > 0; neighbours that continue each other (file block, device block, flags,
 * holder) are one record up to EXTENT_MAX_BLOCKS.
 *
 * Blocks joined: adding a run replaces at most two neighbours by one, a removal splits at most one:
 * two leaves, one split, their parent and the root: TRANS_TREE_OP + TRANS_ALLOC_OP. Runs that are
 * in the way of another are removed one by one, so callers that cannot bound their number go
 * forward run by run (exposure_find()).
 */
#include "alloc.h"
#include "btree.h"
#include "errors.h"
#include "extmap.h"
#include "layout_priv.h"

#define LOOKS 256u /* records looked at before exposures_any() gives up */

struct run {
	fileblk_t file;
	nblocks_t len;
	fsblock_t block;
	uint32_t flags;
	uint64_t holder;
};

static struct tree exposures(struct fs *fs) { return fs_tree(fs, TREE_EXPOSURE); }
static fileblk_t run_end(const struct run *r) { return r->file + r->len; }

static int damaged(struct fs *fs, struct key key)
{
	fs_shutdown_writes(fs, -ERR_RECORD_SHAPE, "inode %llu: exposure record %#llx is impossible",
			   (unsigned long long)key.hi, (unsigned long long)key.lo);
	return -ERR_RECORD_SHAPE;
}

/* Run under the cursor. -ENOENT: none of this inode. */
static int read_run(struct bt_cursor *c, inum_t ino, struct run *r)
{
	struct key key = bt_key(c);
	struct fs *fs = c->tree.fs;
	const nblocks_t total = fs->super.total_blocks;
	const struct exposure_disk *rec;
	unsigned len;

	if (key.hi != ino || key.lo >> 63)
		return -ENOENT;
	rec = bt_record(c, &len);
	if (len != sizeof(*rec))
		return damaged(fs, key);
	*r = (struct run){ key.lo, get32(rec->length), get64(rec->block), get32(rec->flags),
			   get64(rec->holder) };
	if (!r->len || r->file >= FILE_MAX_BLOCKS || r->len > FILE_MAX_BLOCKS - r->file ||
	    (r->flags & ~EXPOSURE_F_STAGING) || !alloc_block_usable(fs, r->block) ||
	    r->len > total - r->block)
		return damaged(fs, key);
	return 0;
}

static struct exposure_disk encode(const struct run *r)
{
	return (struct exposure_disk){ put64(r->block), put32((uint32_t)r->len), put32(r->flags),
				       put64(r->holder) };
}

static int run_insert(struct trans *t, inum_t ino, const struct run *r)
{
	struct exposure_disk rec = encode(r);

	return bt_insert(t, exposures(t->fs), KEY(ino, r->file), &rec, sizeof(rec));
}

static int run_update(struct trans *t, inum_t ino, const struct run *r)
{
	struct exposure_disk rec = encode(r);

	return bt_update(t, exposures(t->fs), KEY(ino, r->file), &rec, sizeof(rec));
}

static int run_delete(struct trans *t, inum_t ino, fileblk_t file)
{
	return bt_delete(t, exposures(t->fs), KEY(ino, file));
}

/* Last run that begins below `end`, and the one that begins at `end` (len 0: none). -ENOENT: no
 * first one. */
static int runs_around(struct fs *fs, inum_t ino, fileblk_t end, struct run *below,
		       struct run *at_end)
{
	struct bt_cursor c;
	int err, next;

	at_end->len = 0;
	bt_cursor_init(&c, exposures(fs));
	err = bt_seek(&c, KEY(ino, end), BT_LT);
	if (!err)
		err = read_run(&c, ino, below);
	if (!err || (err == -ENOENT && c.height))
		next = bt_next(&c);
	else
		next = err == -ENOENT ? bt_seek(&c, KEY(ino, end), BT_EQ) : err;
	if (!next)
		next = read_run(&c, ino, at_end);
	if (next || at_end->file != end)
		at_end->len = 0;
	bt_cursor_release(&c);
	return next && next != -ENOENT ? next : err;
}

/* The part of the run in [file, end) goes, the rest stays. */
static int run_cut(struct trans *t, inum_t ino, const struct run *r, fileblk_t file, fileblk_t end)
{
	struct run left = *r, right = *r;
	int err;

	if (r->file < file) {
		left.len = file - r->file;
		err = run_update(t, ino, &left);
	} else {
		err = run_delete(t, ino, r->file);
	}
	if (err || run_end(r) <= end)
		return err;
	right.file = end;
	right.len = run_end(r) - end;
	right.block = r->block + (end - r->file);
	return run_insert(t, ino, &right);
}

int exposure_remove(struct trans *t, inum_t ino, fileblk_t file, fileblk_t end, uint64_t holder)
{
	fileblk_t at = end;

	while (at > file) {
		struct run r, next;
		int err = runs_around(t->fs, ino, at, &r, &next);

		if (err == -ENOENT || (!err && run_end(&r) <= file))
			return 0;
		if (!err && (!holder || r.holder == holder) && run_end(&r) > file)
			err = run_cut(t, ino, &r, file, end);
		if (err)
			return err;
		at = r.file;
	}
	return 0;
}

/* Does b continue a? */
static bool continues(const struct run *a, const struct run *b)
{
	return a->len && b->len && run_end(a) == b->file && a->block + a->len == b->block &&
	       a->flags == b->flags && a->holder == b->holder &&
	       a->len + b->len <= EXTENT_MAX_BLOCKS;
}

/* Does a say what b says, over all of it? */
static bool says(const struct run *a, const struct run *b)
{
	return a->file <= b->file && run_end(a) >= run_end(b) &&
	       a->block + (b->file - a->file) == b->block && a->flags == b->flags &&
	       a->holder == b->holder;
}

int exposure_add(struct trans *t, inum_t ino, fileblk_t file, nblocks_t len, fsblock_t block,
		 bool staging, uint64_t holder)
{
	struct run now = { file, len, block, staging ? EXPOSURE_F_STAGING : 0, holder };
	struct run left = { 0 }, right;
	int err;

	xassert(len && len <= EXTENT_MAX_BLOCKS && holder && !(holder >> 63));
	err = runs_around(t->fs, ino, run_end(&now), &left, &right);
	if (!err && run_end(&left) > file) {
		if (says(&left, &now))
			return 0;
		err = exposure_remove(t, ino, file, run_end(&now), 0);
		if (!err)
			err = runs_around(t->fs, ino, run_end(&now), &left, &right);
	}
	if (err == -ENOENT)
		left.len = 0;
	else if (err)
		return err;
	err = 0;
	if (continues(&now, &right)) {
		now.len += right.len;
		err = run_delete(t, ino, right.file);
	}
	if (err)
		return err;
	if (continues(&left, &now)) {
		left.len += now.len;
		return run_update(t, ino, &left);
	}
	return run_insert(t, ino, &now);
}

/* Cursor on the first run that ends behind `at`. */
static int seek_run(struct bt_cursor *c, inum_t ino, fileblk_t at, struct run *r)
{
	int err = bt_seek(c, KEY(ino, at), BT_LE);

	if (err == -ENOENT) {
		err = bt_seek(c, KEY(ino, at), BT_GT);
		return err ? err : read_run(c, ino, r);
	}
	if (err)
		return err;
	err = read_run(c, ino, r);
	if (!err && run_end(r) > at)
		return 0;
	if (err && err != -ENOENT)
		return err;
	err = bt_next(c);
	return err ? err : read_run(c, ino, r);
}

int exposure_find(struct fs *fs, inum_t ino, uint64_t holder, fileblk_t at, fileblk_t end,
		  struct exposure *out)
{
	struct bt_cursor c;
	struct run r;
	int err;

	if (at >= end)
		return -ENOENT;
	bt_cursor_init(&c, exposures(fs));
	err = seek_run(&c, ino, at, &r);
	while (!err && holder && r.holder != holder && r.file < end) {
		err = bt_next(&c);
		if (!err)
			err = read_run(&c, ino, &r);
	}
	bt_cursor_release(&c);
	if (err || r.file >= end)
		return err ? err : -ENOENT;
	*out = (struct exposure){ .file = MAX(r.file, at), .holder = r.holder,
				  .staging = r.flags & EXPOSURE_F_STAGING };
	out->len = MIN(run_end(&r), end) - out->file;
	out->block = r.block + (out->file - r.file);
	return 0;
}

int exposure_covers(struct fs *fs, inum_t ino, uint64_t holder, const struct extent *ext,
		    bool staging)
{
	fileblk_t at = ext->file, end = ext->file + ext->len;
	struct bt_cursor c;
	struct run r;
	int err;

	bt_cursor_init(&c, exposures(fs));
	err = seek_run(&c, ino, at, &r);
	while (!err && at < end) {
		if (r.holder != holder || r.file > at ||
		    (r.flags & EXPOSURE_F_STAGING) != (staging ? EXPOSURE_F_STAGING : 0) ||
		    r.block + (at - r.file) != ext->block + (at - ext->file))
			break;
		at = run_end(&r);
		if (at >= end)
			break;
		err = bt_next(&c);
		if (!err)
			err = read_run(&c, ino, &r);
	}
	bt_cursor_release(&c);
	if (err && err != -ENOENT)
		return err;
	return at >= end;
}

/* ---- whole inodes --------------------------------------------------------------------------- */

static int inode_record(struct fs *fs, inum_t ino, uint64_t holder, uint32_t *flags)
{
	struct key key = KEY(ino, EXPOSURE_INODE_LO(holder));
	struct exposure_disk rec;
	unsigned len;
	int err;

	xassert(holder && !(holder >> 63));
	err = bt_lookup(exposures(fs), key, &rec, sizeof(rec), &len);
	if (err)
		return err;
	if (len != sizeof(rec) || !(get32(rec.flags) & EXPOSURE_F_INODE))
		return damaged(fs, key);
	*flags = get32(rec.flags);
	return 0;
}

static uint32_t flags_of(enum layout_iomode iomode)
{
	return EXPOSURE_F_INODE | (iomode == IOMODE_RW ? EXPOSURE_F_RW : 0);
}

int exposure_note_inode(struct trans *t, inum_t ino, uint64_t holder, enum layout_iomode iomode,
			bool *added)
{
	struct exposure_disk rec = { .flags = put32(flags_of(iomode)), .holder = put64(holder) };
	struct key key = KEY(ino, EXPOSURE_INODE_LO(holder));
	uint32_t flags = 0;
	int err = inode_record(t->fs, ino, holder, &flags);

	*added = false;
	if (!err && (flags | flags_of(iomode)) == flags)
		return 0;
	if (!err)
		err = bt_update(t, exposures(t->fs), key, &rec, sizeof(rec));
	else if (err == -ENOENT)
		err = bt_insert(t, exposures(t->fs), key, &rec, sizeof(rec));
	*added = !err;
	return err;
}

int exposure_has_inode(struct fs *fs, inum_t ino, uint64_t holder, enum layout_iomode iomode)
{
	uint32_t flags;
	int err = inode_record(fs, ino, holder, &flags);

	if (err)
		return err == -ENOENT ? 0 : err;
	return (flags | flags_of(iomode)) == flags;
}

int exposure_forget_inode(struct trans *t, inum_t ino, uint64_t holder)
{
	int err = bt_delete(t, exposures(t->fs), KEY(ino, EXPOSURE_INODE_LO(holder)));

	return err == -ENOENT ? 0 : err;
}

bool exposures_any(struct fs *fs, uint64_t holder)
{
	unsigned looks = LOOKS;
	struct bt_cursor c;
	bool any = false;
	int err;

	if (!bt_records(exposures(fs)))
		return false;
	bt_cursor_init(&c, exposures(fs));
	err = bt_seek(&c, KEY_MIN, BT_GE);
	while (!err && !any) {
		unsigned len;
		const struct exposure_disk *rec = bt_record(&c, &len);

		any = len != sizeof(*rec) || get64(rec->holder) == holder || !--looks;
		if (!any)
			err = bt_next(&c);
	}
	bt_cursor_release(&c);
	return any || (err && err != -ENOENT);
}
