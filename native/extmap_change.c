/* SPDX-License-Identifier: MIT
 *
 * extmap_change.c - changes of extent maps. Each step replaces at most three neighbouring records.
 *
 * Reservation. One step changes at most three neighbouring records to at most five: two leaves, a
 * split with its new node, their parent and the root block (TRANS_TREE_OP), the allocation of that
 * node (TRANS_ALLOC_OP), the same for the refcount tree where blocks are shared, and one allocation
 * or free of data blocks (TRANS_ALLOC_OP) or their record in quarantine (TRANS_TREE_OP, TRANS_ALLOC_OP). Together EXTMAP_STEP_BLOCKS. Steps share most blocks
 * (the root block, the AG headers, leaves), so a rolling operation that stops when less than that
 * is left of its reservation does many steps in a transaction: see trans_room(). The first step of
 * a call is always done: callers begin their transaction with at least EXTMAP_STEP_BLOCKS for it.
 */
#include "alloc.h"
#include "errors.h"
#include "extmap_priv.h"
#include "fs.h"
#include "refcount.h"

/* Holes up to so many blocks before a new extent keep their place on the device, in case they are
 * filled later. */
#define GOAL_GAP_MAX 64u

/* May a rolling operation that did `steps` do another one? */
static bool may_step(const struct trans *t, unsigned steps, unsigned max_records)
{
	return !steps || (steps < max_records && trans_room(t) >= EXTMAP_STEP_BLOCKS);
}

static int count_blocks(struct trans *t, struct inode *in, int64_t delta)
{
	int err = trans_join_inode(t, in);

	if (!err)
		in->core.blocks += (uint64_t)delta;
	return err;
}

/* The one place where blocks lose a mapping. What nobody maps any more becomes free, or, while a lost
 * holder can reach it, goes to quarantine (layout.h invariant 3). */
static int drop_blocks(struct trans *t, struct inode *in, fsblock_t block, nblocks_t len)
{
	const struct layout_hooks *hooks = in->fs->layout_hooks;
	uint64_t holder = hooks ? hooks->drop_holder(in->fs, in) : 0;

	if (in->core.flags & INODE_F_SHARED)
		return refcount_drop(t, block, len, holder);
	return holder ? alloc_quarantine(t, block, len, holder) : alloc_free(t, block, len);
}

/* The record that ends at `file`, if `at` would continue it and it is worth looking for. */
static int find_left(struct inode *in, enum fork fork, fileblk_t file, struct extent *e)
{
	int err = file ? extmap_find(in, fork, file, BT_LT, e) : -ENOENT;

	return !err && extent_end(e) != file ? -ENOENT : err;
}

/* Replace `piece` of the record `whole` by `now` (same file range), joining with what is next to
 * it. */
static int replace_piece(struct trans *t, struct inode *in, enum fork fork,
			 const struct extent *whole, struct extent now)
{
	struct extmap_edit ed = { .nold = 0 };
	struct extent left, right, rest;
	int has_left = -ENOENT, has_right = -ENOENT;
	fileblk_t end = extent_end(&now);

	if (now.file == whole->file)
		has_left = find_left(in, fork, now.file, &left);
	if (end == extent_end(whole))
		has_right = extmap_find(in, fork, end, BT_EQ, &right);
	if ((has_left && has_left != -ENOENT) || (has_right && has_right != -ENOENT))
		return has_left && has_left != -ENOENT ? has_left : has_right;

	if (!has_left) {
		edit_old(&ed, &left);
		edit_new(&ed, left);
	}
	edit_old(&ed, whole);
	rest = *whole;
	rest.len = now.file - whole->file;
	edit_new(&ed, rest);
	edit_new(&ed, now);
	rest = *whole;
	rest.len = extent_end(whole) - end;
	rest.file = end;
	rest.block += end - whole->file;
	edit_new(&ed, rest);
	if (!has_right) {
		edit_old(&ed, &right);
		edit_new(&ed, right);
	}
	return extmap_apply(t, in, fork, &ed);
}

int extmap_add(struct trans *t, struct inode *in, enum fork fork, const struct extent *ext)
{
	struct extmap_edit ed = { .nold = 0 };
	struct extent left, right;
	int err, has_left, has_right;

	xassert(ext->len && ext->len <= EXTENT_MAX_BLOCKS && ext->state != EXT_HOLE);
	if (ext->file >= FILE_MAX_BLOCKS || ext->len > FILE_MAX_BLOCKS - ext->file)
		return -EFBIG;
	has_left = extmap_find(in, fork, ext->file, BT_LE, &left);
	has_right = extmap_find(in, fork, ext->file, BT_GT, &right);
	if ((has_left && has_left != -ENOENT) || (has_right && has_right != -ENOENT))
		return has_left && has_left != -ENOENT ? has_left : has_right;
	if ((!has_left && extent_end(&left) > ext->file) ||
	    (!has_right && right.file < extent_end(ext)))
		return -ERR_MAP_OVERLAP;
	if (!has_left && extent_end(&left) == ext->file) {
		edit_old(&ed, &left);
		edit_new(&ed, left);
	}
	edit_new(&ed, *ext);
	if (!has_right && right.file == extent_end(ext)) {
		edit_old(&ed, &right);
		edit_new(&ed, right);
	}
	err = extmap_apply(t, in, fork, &ed);
	return err ? err : count_blocks(t, in, (int64_t)ext->len);
}

/* The part of `e` inside [from, to). */
static struct extent extent_part(const struct extent *e, fileblk_t from, fileblk_t to)
{
	struct extent part = *e;

	part.file = MAX(e->file, from);
	part.block = e->block + (part.file - e->file);
	part.len = MIN(extent_end(e), to) - part.file;
	return part;
}

int extmap_detach(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, nblocks_t len)
{
	struct extmap_edit ed = { .nold = 0 };
	struct extent whole;
	int err = extmap_find(in, fork, file, BT_LE, &whole);

	if (err == -ENOENT || (!err && extent_end(&whole) < file + len))
		return -ERR_MAP_OVERLAP;
	if (err)
		return err;
	edit_old(&ed, &whole);
	edit_new(&ed, extent_part(&whole, whole.file, file));
	edit_new(&ed, extent_part(&whole, file + len, extent_end(&whole)));
	err = extmap_apply(t, in, fork, &ed);
	return err ? err : count_blocks(t, in, -(int64_t)len);
}

int extmap_set_state(struct trans *t, struct inode *in, enum fork fork, fileblk_t file,
		     nblocks_t len, enum extent_state state, unsigned max_records, nblocks_t *done)
{
	fileblk_t at = file, end = file + len;

	xassert(state == EXT_UNWRITTEN || state == EXT_WRITTEN);
	*done = 0;
	for (unsigned steps = 0; at < end && may_step(t, steps, max_records); steps++) {
		struct extent whole, piece;
		int err = extmap_find(in, fork, at, BT_LE, &whole);

		if (err == -ENOENT || (!err && extent_end(&whole) <= at))
			return -ERR_MAP_OVERLAP;
		if (err)
			return err;
		piece = extent_part(&whole, at, end);
		if (piece.state != state) {
			piece.state = state;
			/* What tells preallocations apart is of no use once they are written. */
			if (state == EXT_WRITTEN)
				piece.flags = 0;
			err = replace_piece(t, in, fork, &whole, piece);
			if (err)
				return err;
		}
		at = extent_end(&piece);
		*done = at - file;
	}
	return 0;
}

int extmap_remove(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, fileblk_t end,
		  unsigned max_records, fileblk_t *rest)
{
	*rest = end;
	for (unsigned steps = 0; *rest > file && may_step(t, steps, max_records); steps++) {
		struct extmap_edit ed = { .nold = 0 };
		struct extent whole, piece;
		int err = extmap_find(in, fork, *rest, BT_LT, &whole);

		if (err == -ENOENT || (!err && extent_end(&whole) <= file)) {
			*rest = file;
			return 0;
		}
		if (err)
			return err;
		piece = extent_part(&whole, file, *rest);
		if (in->core.flags & INODE_F_SHARED) {
			/* One count at a time, or one extent could be a million records of the
			 * other tree. */
			uint32_t refs;
			nblocks_t run;

			err = refcount_query_back(in->fs, piece.block, piece.len, &refs, &run);
			if (err)
				return err;
			piece = extent_part(&whole, extent_end(&piece) - run, extent_end(&piece));
		}
		edit_old(&ed, &whole);
		edit_new(&ed, extent_part(&whole, whole.file, piece.file));
		edit_new(&ed, extent_part(&whole, extent_end(&piece), extent_end(&whole)));
		err = extmap_apply(t, in, fork, &ed);
		if (!err)
			err = drop_blocks(t, in, piece.block, piece.len);
		if (!err)
			err = count_blocks(t, in, -(int64_t)piece.len);
		if (err)
			return err;
		*rest = piece.file;
	}
	return 0;
}

int extmap_remap(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, nblocks_t len,
		 fsblock_t to)
{
	struct extent whole, piece;
	int err = extmap_find(in, fork, file, BT_LE, &whole);
	fsblock_t from;

	if (err == -ENOENT || (!err && extent_end(&whole) < file + len))
		return -ERR_MAP_OVERLAP;
	if (err)
		return err;
	piece = extent_part(&whole, file, file + len);
	from = piece.block;
	piece.block = to;
	piece.state = EXT_WRITTEN;
	piece.flags = 0;
	err = replace_piece(t, in, fork, &whole, piece);
	return err ? err : drop_blocks(t, in, from, len);
}

int extmap_promote(struct trans *t, struct inode *in, fileblk_t file, nblocks_t len)
{
	struct extmap_edit ed = { .nold = 0 };
	struct extent staged, piece, old;
	int err = extmap_find(in, FORK_STAGING, file, BT_LE, &staged);

	xassert(len);
	if (err == -ENOENT || (!err && extent_end(&staged) < file + len))
		return -ERR_MAP_OVERLAP;
	if (!err)
		err = extmap_lookup(in, FORK_DATA, file, len, &old);
	if (err)
		return err;
	if (old.len != len)
		return -ERR_MAP_OVERLAP;
	piece = extent_part(&staged, file, file + len);
	piece.state = EXT_WRITTEN;
	piece.flags = 0;
	edit_old(&ed, &staged);
	edit_new(&ed, extent_part(&staged, staged.file, file));
	edit_new(&ed, extent_part(&staged, file + len, extent_end(&staged)));
	err = extmap_apply(t, in, FORK_STAGING, &ed);
	if (!err)
		err = count_blocks(t, in, -(int64_t)len);
	if (err)
		return err;
	if (old.state == EXT_HOLE)
		return extmap_add(t, in, FORK_DATA, &piece);
	return extmap_remap(t, in, FORK_DATA, file, len, piece.block);
}

/* Where the blocks of the hole at `file` should go: behind what is before it in the file. */
static int hole_goal(struct inode *in, enum fork fork, fileblk_t file, fsblock_t *goal, bool *continues)
{
	struct extent prev;
	int err = extmap_find(in, fork, file, BT_LT, &prev);

	if (err && err != -ENOENT)
		return err;
	*continues = !err && file == extent_end(&prev);
	if (!err && file - extent_end(&prev) <= GOAL_GAP_MAX)
		*goal = prev.block + (file - prev.file);
	else if (in->alloc_hint)
		*goal = in->alloc_hint;
	else
		*goal = alloc_goal_for_inode(in->fs, in->ino,
					     in->core.parent ? in->core.parent : in->ino);
	return 0;
}

/* *placed: blocks were taken, so an error leaves the transaction half done, whatever it is. */
static int fill_hole(struct trans *t, struct inode *in, enum fork fork, struct extent *hole,
		     uint8_t flags, bool *placed)
{
	fsblock_t goal;
	int err = hole_goal(in, fork, hole->file, &goal, &t->continues);

	t->grows = in->ino;
	if (!err)
		err = alloc_extent(t, goal, 1, MIN(hole->len, EXTENT_MAX_BLOCKS), &hole->block,
				   &hole->len);
	*placed = !err;
	if (err)
		return err;
	hole->state = EXT_UNWRITTEN;
	hole->flags = flags;
	in->alloc_hint = hole->block + hole->len;
	return extmap_add(t, in, fork, hole);
}

int extmap_allocate(struct trans *t, struct inode *in, enum fork fork, fileblk_t file,
		    nblocks_t len, uint8_t flags, unsigned max_records, nblocks_t *done)
{
	fileblk_t at = file, end = file + len;

	*done = 0;
	for (unsigned steps = 0; at < end && may_step(t, steps, max_records); steps++) {
		struct extent e;
		bool placed = false;
		int err = extmap_lookup(in, fork, at, end - at, &e);

		if (!err && e.state == EXT_HOLE)
			err = fill_hole(t, in, fork, &e, flags, &placed);
		/* What was allocated before space ran out stands; the next call fails at once. A
		 * tree node that found no space is another matter: the blocks it should have mapped
		 * are taken. */
		if ((err == -ENOSPC || err == -ERR_BUSY_BLOCKS) && *done && !placed)
			return 0;
		if (err)
			return err;
		at = extent_end(&e);
		*done = at - file;
	}
	return 0;
}

static int mark_shared(struct trans *t, struct inode *in)
{
	int err = trans_join_inode(t, in);

	if (!err)
		in->core.flags |= INODE_F_SHARED;
	return err;
}

int extmap_share(struct trans *t, struct inode *src, fileblk_t file, nblocks_t len,
		 struct inode *dst, fileblk_t dst_file, unsigned max_records, nblocks_t *done)
{
	fileblk_t at = file, end = file + len;
	int err = mark_shared(t, src);

	*done = 0;
	if (!err)
		err = mark_shared(t, dst);
	if (err)
		return err;
	for (unsigned steps = 0; at < end && may_step(t, steps, max_records); steps++) {
		struct extent e;
		uint32_t refs;

		err = extmap_lookup(src, FORK_DATA, at, end - at, &e);
		if (!err && e.state == EXT_WRITTEN)
			err = refcount_query(src->fs, e.block, e.len, &refs, &e.len);
		if (!err && e.state == EXT_WRITTEN)
			err = refcount_add(t, e.block, e.len);
		if (!err && e.state == EXT_WRITTEN) {
			struct extent copy = e;

			copy.file = dst_file + (e.file - file);
			copy.flags = 0;
			err = extmap_add(t, dst, FORK_DATA, &copy);
		}
		if (err)
			return err;
		at = extent_end(&e);
		*done = at - file;
	}
	return 0;
}
