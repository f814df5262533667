/* SPDX-License-Identifier: MIT
 *
 * extmap.c - looking into extent maps, and replacing a few neighbouring records.
 */
#include "extmap.h"

#include "alloc.h"
#include "errors.h"
#include "extmap_priv.h"
#include "fs.h"
#include "refcount.h"

static int damaged(const struct inode *in, const struct extent *e, int code)
{
	fs_shutdown_writes(in->fs, code, "inode %llu: extent record at file block %llu is impossible",
			   (unsigned long long)in->ino, (unsigned long long)e->file);
	return code;
}

int extmap_read(struct bt_cursor *c, const struct inode *in, enum fork fork, struct extent *out)
{
	struct key key = bt_key(c);
	const nblocks_t total = in->fs->super.total_blocks;
	const struct extent_disk *rec;
	unsigned len;

	if (key.hi != in->ino || key.lo >> 56 != (uint64_t)fork)
		return -ENOENT;
	rec = bt_record(c, &len);
	out->file = key.lo & ~((uint64_t)0xff << 56);
	if (len != sizeof(*rec))
		return damaged(in, out, -ERR_RECORD_SHAPE);
	out->block = get64(rec->block);
	out->len = get32(rec->length);
	out->state = rec->state;
	out->flags = rec->flags;
	if (!out->len || out->len > EXTENT_MAX_BLOCKS || extent_end(out) > FILE_MAX_BLOCKS ||
	    (out->state != EXT_UNWRITTEN && out->state != EXT_WRITTEN))
		return damaged(in, out, -ERR_RECORD_SHAPE);
	if (!alloc_block_usable(in->fs, out->block) || out->len > total - out->block)
		return damaged(in, out, -ERR_META_RANGE);
	return 0;
}

int extmap_find(struct inode *in, enum fork fork, fileblk_t file, enum bt_seek how,
		struct extent *out)
{
	struct bt_cursor c;
	int err;

	bt_cursor_init(&c, extmap_tree(in));
	err = bt_seek(&c, extmap_key(in, fork, file), how);
	if (!err)
		err = extmap_read(&c, in, fork, out);
	bt_cursor_release(&c);
	return err;
}

static void cut_front(struct extent *e, fileblk_t at)
{
	if (at > e->file) {
		e->len -= at - e->file;
		e->block += at - e->file;
		e->file = at;
	}
}

/* Cursor on the first record that ends behind `at`. 0, or -ENOENT: there is none. */
static int seek_covering(struct bt_cursor *c, struct inode *in, enum fork fork, fileblk_t at,
			 struct extent *e)
{
	int err = bt_seek(c, extmap_key(in, fork, at), BT_LE);

	if (err == -ENOENT) {
		err = bt_seek(c, extmap_key(in, fork, at), BT_GT);
		return err ? err : extmap_read(c, in, fork, e);
	}
	if (err)
		return err;
	err = extmap_read(c, in, fork, e);
	if (!err && extent_end(e) > at)
		return 0;
	if (err && err != -ENOENT)
		return err;
	err = bt_next(c);
	return err ? err : extmap_read(c, in, fork, e);
}

int extmap_lookup(struct inode *in, enum fork fork, fileblk_t at, nblocks_t max, struct extent *out)
{
	struct extent e = { 0 };
	struct bt_cursor c;
	int err;

	xassert(max);
	bt_cursor_init(&c, extmap_tree(in));
	err = seek_covering(&c, in, fork, at, &e);
	bt_cursor_release(&c);
	if (err && err != -ENOENT)
		return err;
	if (!err && e.file <= at) {
		cut_front(&e, at);
		e.len = MIN(e.len, max);
		*out = e;
		return 0;
	}
	*out = (struct extent){ .file = at, .len = err ? max : MIN(max, e.file - at) };
	return 0;
}

int extmap_list(struct inode *in, enum fork fork, fileblk_t at, fileblk_t end, bool with_holes,
		struct extent *out, unsigned n)
{
	struct extent e = { 0 };
	struct bt_cursor c;
	unsigned got = 0;
	int err;

	bt_cursor_init(&c, extmap_tree(in));
	err = at < end ? seek_covering(&c, in, fork, at, &e) : -ENOENT;
	while (!err && at < end && got < n) {
		if (e.file >= end)
			break;
		if (e.file > at && with_holes) {
			out[got++] = (struct extent){ .file = at, .len = e.file - at };
			at = e.file;
			continue;
		}
		cut_front(&e, at);
		e.len = MIN(e.len, end - e.file);
		at = extent_end(&e);
		out[got++] = e;
		err = bt_next(&c);
		if (!err)
			err = extmap_read(&c, in, fork, &e);
	}
	bt_cursor_release(&c);
	if (err && err != -ENOENT)
		return err;
	if (with_holes && at < end && got < n)
		out[got++] = (struct extent){ .file = at, .len = end - at };
	return (int)got;
}

int extmap_last(struct inode *in, enum fork fork, fileblk_t at, fileblk_t end, struct extent *out)
{
	int err = at < end ? extmap_find(in, fork, end, BT_LT, out) : -ENOENT;

	if (err)
		return err;
	if (extent_end(out) <= at)
		return -ENOENT;
	out->len = MIN(out->len, end - out->file);
	cut_front(out, at);
	return 0;
}

int extmap_is_shared(struct inode *in, const struct extent *ext, bool *shared, nblocks_t *run)
{
	uint32_t refs;
	int err;

	*shared = false;
	*run = ext->len;
	if (!(in->core.flags & INODE_F_SHARED) || ext->state == EXT_HOLE)
		return 0;
	err = refcount_query(in->fs, ext->block, ext->len, &refs, run);
	*shared = refs > 1;
	return err;
}

/* ---- replacing ------------------------------------------------------------------------------- */

bool extent_continues(const struct extent *a, const struct extent *b)
{
	return extent_end(a) == b->file && a->block + a->len == b->block && a->state == b->state &&
	       a->flags == b->flags && a->len + b->len <= EXTENT_MAX_BLOCKS;
}

void edit_old(struct extmap_edit *ed, const struct extent *e)
{
	xassert(ed->nold < ARRAY_LEN(ed->old));
	ed->old[ed->nold++] = *e;
}

void edit_new(struct extmap_edit *ed, struct extent e)
{
	struct extent *last = ed->nnew ? &ed->new[ed->nnew - 1] : NULL;

	if (!e.len)
		return;
	if (last && extent_continues(last, &e)) {
		last->len += e.len;
		return;
	}
	xassert(ed->nnew < ARRAY_LEN(ed->new));
	ed->new[ed->nnew++] = e;
}

static const struct extent *find_file(const struct extent *list, unsigned n, fileblk_t file)
{
	for (unsigned i = 0; i < n; i++)
		if (list[i].file == file)
			return &list[i];
	return NULL;
}

static bool same_extent(const struct extent *a, const struct extent *b)
{
	return a->file == b->file && a->block == b->block && a->len == b->len &&
	       a->state == b->state && a->flags == b->flags;
}

int extmap_apply(struct trans *t, struct inode *in, enum fork fork, const struct extmap_edit *ed)
{
	struct tree tree = extmap_tree(in);
	int err = 0;

	if (fork == FORK_DATA) {
		atomic_store(&in->map_gen, atomic_fetch_add(&in->fs->next_map_gen, 1) + 1);
		if (in->fs->layout_hooks)
			in->fs->layout_hooks->map_changed(in);
	}
	for (unsigned i = 0; i < ed->nold && !err; i++)
		if (!find_file(ed->new, ed->nnew, ed->old[i].file))
			err = bt_delete(t, tree, extmap_key(in, fork, ed->old[i].file));
	for (unsigned i = 0; i < ed->nnew && !err; i++) {
		const struct extent *e = &ed->new[i];
		const struct extent *was = find_file(ed->old, ed->nold, e->file);
		struct extent_disk rec = { .block = put64(e->block),
					   .length = put32((uint32_t)e->len),
					   .state = (uint8_t)e->state,
					   .flags = e->flags };
		struct key key = extmap_key(in, fork, e->file);

		if (!was)
			err = bt_insert(t, tree, key, &rec, sizeof(rec));
		else if (!same_extent(was, e))
			err = bt_update(t, tree, key, &rec, sizeof(rec));
	}
	return err;
}
