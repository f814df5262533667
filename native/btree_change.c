/* SPDX-License-Identifier: MIT
 *
 * btree_change.c - insert, update and delete: splits on the way up, merges on the way up.
 *
 * Definitions. h: height of the tree. Path: the h nodes from the root to the leaf of a key.
 *
 * Blocks joined by one change of a tree, beside those that allocating or freeing nodes joins
 * (alloc.c):
 *   insert, no split          leaf + root block                                       2
 *   insert, k nodes split     k + k new + 1 (parent, or new root) + root block        2k + 2, k <= h
 *   delete, k nodes merged    per merge the left one; the parent; root block          k + 2 (k <= h)
 * A tree of 10^7 records has h = 4 at most, and a second split in one insert happens once in about
 * a hundred splits: TRANS_TREE_OP is the bound for k = 3, and k = 1 is what rolling operations meet
 * in practice. An insert allocates at most h + 1 nodes, a delete frees at most h.
 *
 * Where a full leaf splits:
 *   - insertion at its end: the new record alone goes right, so ascending keys leave full leaves;
 *   - insertion behind a long run of records with the same key.hi (one file's extents), before
 *     another hi: there, so that a file that is appended to leaves full leaves too when other
 *     files' records follow;
 *   - else in the middle, by bytes.
 * Merging: a node below 2/5 full joins a neighbour when the two fill at most 4/5 of one; the gap to
 * a full node keeps a delete and an insert that alternate from splitting and merging each time.
 */
#include <string.h>

#include "alloc.h"
#include "btree_node.h"
#include "btree_priv.h"
#include "errors.h"
#include "fs.h"

#define LEAF_SPARSE (NODE_BYTES * 2 / 5)
#define LEAF_MERGED_MAX (NODE_BYTES * 4 / 5)
#define BRANCH_SPARSE (NODE_SLOT_MAX * 2 / 5)
#define BRANCH_MERGED_MAX (NODE_SLOT_MAX * 4 / 5)

static int node_new(struct trans *t, struct tree tree, unsigned level, fsblock_t goal,
		    struct buf **out)
{
	fsblock_t block;
	int err = tree.type < TREE_ROOT_COUNT ? alloc_meta(t, goal, &block)
					      : alloc_freelist_take(t, tree.agno, &block);

	if (err)
		return err;
	err = buf_new(t, block, &buf_type_node, OWNER_NODE(tree.type, tree.agno), out);
	if (!err)
		node_init(buf_node(*out), level);
	return err;
}

static int node_free(struct trans *t, struct tree tree, fsblock_t block)
{
	return tree.type < TREE_ROOT_COUNT ? alloc_meta_free(t, block)
					   : alloc_freelist_give(t, tree.agno, block);
}

static int root_count_records(struct trans *t, struct tree tree, int delta)
{
	struct tree_root_disk *root = bt_root(tree);
	int err = trans_join(t, bt_root_buf(tree));

	if (!err)
		root->records = put64(get64(root->records) + (uint64_t)(int64_t)delta);
	return err;
}

/* The root block or AG header is joined already: every change counts records first. */
static void root_set(struct tree tree, fsblock_t block, unsigned height)
{
	struct tree_root_disk *root = bt_root(tree);

	xassert(height <= BT_MAX_HEIGHT);
	root->block = put64(block);
	root->height = put32(height);
}

/* ---- insert ---------------------------------------------------------------------------------- */

/* A new root above the old one and `right`. */
static int root_grow(struct trans *t, struct tree tree, struct key key, fsblock_t right)
{
	fsblock_t old = get64(bt_root(tree)->block);
	unsigned height = bt_height(tree);
	struct buf *b;
	int err;

	if (height == BT_MAX_HEIGHT)
		return -ENOSPC;
	err = node_new(t, tree, height, old, &b);
	if (err)
		return err;
	branch_insert(buf_node(b), 0, KEY_MIN, old);
	branch_insert(buf_node(b), 1, key, right);
	root_set(tree, b->block, height + 1);
	buf_put(b);
	return 0;
}

/* Add (key, child) behind the path's slot at `level` and upwards, splitting what is full. */
static int insert_up(struct trans *t, struct bt_cursor *c, unsigned level, struct key key,
		     fsblock_t child)
{
	for (; level < c->height; level++) {
		struct buf *b = c->path[level].buf, *nb;
		unsigned slot = c->path[level].slot + 1, keep;
		struct node_disk *left = buf_node(b), *right;
		int err = trans_join(t, b);

		if (err)
			return err;
		if (node_count(left) < NODE_SLOT_MAX) {
			branch_insert(left, slot, key, child);
			return 0;
		}
		err = node_new(t, c->tree, level, b->block, &nb);
		if (err)
			return err;
		right = buf_node(nb);
		/* At the end: as few as may stand alone go right. */
		keep = slot == NODE_SLOT_MAX ? NODE_SLOT_MAX - 1 : NODE_SLOT_MAX / 2;
		branch_move_right(left, right, NODE_SLOT_MAX - keep);
		if (slot > keep)
			branch_insert(right, slot - keep, key, child);
		else
			branch_insert(left, slot, key, child);
		key = node_key(right, 0);
		child = nb->block;
		buf_put(nb);
	}
	return root_grow(t, c->tree, key, child);
}

/* Is slot - 1 the last of a run of one key.hi that takes a good part of the leaf, to which `key`
 * belongs? */
static bool ends_long_run(const struct node_disk *n, unsigned slot, struct key key)
{
	unsigned quarter = node_count(n) / 4 + 1;

	return slot >= quarter && node_key(n, slot - quarter).hi == key.hi &&
	       node_key(n, slot).hi != key.hi;
}

/* First slot that goes right, counted before the insertion; *right_too: the new record goes right
 * as well. */
static unsigned split_point(const struct node_disk *n, unsigned slot, struct key key, unsigned len,
			    bool *right_too)
{
	const struct leaf_slot *s = (const struct leaf_slot *)n->slots;
	unsigned count = node_count(n), add = NODE_SLOT_SIZE + record_space(len);
	unsigned half = (leaf_used(n) + add) / 2, left = 0, i;

	if (slot == count) {
		*right_too = true;
		return count;
	}
	if (ends_long_run(n, slot, key)) {
		for (i = 0; i < slot; i++)
			left += NODE_SLOT_SIZE + record_space(get16(s[i].length));
		*right_too = left + add > NODE_BYTES;
		return slot;
	}
	for (i = 0; i < count && left < half; i++) {
		if (i == slot) {
			left += add;
			if (left >= half) {
				*right_too = false;
				return i;
			}
		}
		left += NODE_SLOT_SIZE + record_space(get16(s[i].length));
	}
	*right_too = slot >= i;
	return i;
}

static int leaf_split_insert(struct trans *t, struct bt_cursor *c, struct key key, const void *rec,
			     unsigned len)
{
	struct buf *b = c->path[0].buf, *nb;
	struct node_disk *left = buf_node(b), *target;
	unsigned slot = c->path[0].slot, from;
	struct key sep;
	bool right_too, fits;
	int err = node_new(t, c->tree, 0, b->block, &nb);

	if (err)
		return err;
	from = split_point(left, slot, key, len, &right_too);
	leaf_split(left, from, buf_node(nb));
	target = right_too ? buf_node(nb) : left;
	fits = leaf_make_room(target, len);
	xassert(fits);
	leaf_insert(target, right_too ? slot - from : slot, key, rec, len);
	xassert(node_count(left) && node_count(buf_node(nb)));
	sep = node_key(buf_node(nb), 0);
	err = insert_up(t, c, 1, sep, nb->block);
	buf_put(nb);
	return err;
}

static int insert_at(struct trans *t, struct bt_cursor *c, struct key key, const void *rec,
		     unsigned len)
{
	struct buf *b = c->path[0].buf;
	int err = trans_join(t, b);

	if (err)
		return err;
	if (!leaf_make_room(buf_node(b), len))
		return leaf_split_insert(t, c, key, rec, len);
	leaf_insert(buf_node(b), c->path[0].slot, key, rec, len);
	return 0;
}

static int insert_first(struct trans *t, struct tree tree, struct key key, const void *rec,
			unsigned len)
{
	struct buf *b;
	int err = node_new(t, tree, 0, bt_root_buf(tree)->block, &b);

	if (err)
		return err;
	leaf_insert(buf_node(b), 0, key, rec, len);
	root_set(tree, b->block, 1);
	buf_put(b);
	return 0;
}

int bt_insert(struct trans *t, struct tree tree, struct key key, const void *rec, unsigned len)
{
	struct bt_cursor c;
	bool exact;
	int err;

	xassert(len <= RECORD_MAX);
	bt_cursor_init(&c, tree);
	err = bt_descend(&c, key, &exact);
	if (err && err != -ENOENT)
		return err;
	if (exact) {
		bt_cursor_release(&c);
		return -EEXIST;
	}
	err = root_count_records(t, tree, 1);
	if (!err)
		err = c.height ? insert_at(t, &c, key, rec, len)
			       : insert_first(t, tree, key, rec, len);
	bt_cursor_release(&c);
	return err;
}

int bt_overwrite(struct trans *t, struct bt_cursor *c, const void *rec, unsigned len)
{
	unsigned old;
	int err;

	xassert(c->height);
	err = trans_join(t, c->path[0].buf);
	if (err)
		return err;
	void *to = leaf_record(buf_node(c->path[0].buf), c->path[0].slot, &old);
	xassert(old == len);
	if (len)
		memcpy(to, rec, len);
	return 0;
}

int bt_update(struct trans *t, struct tree tree, struct key key, const void *rec, unsigned len)
{
	struct bt_cursor c;
	unsigned old;
	int err;

	xassert(len <= RECORD_MAX);
	bt_cursor_init(&c, tree);
	err = bt_seek(&c, key, BT_EQ);
	if (err)
		return err;
	leaf_record(buf_node(c.path[0].buf), c.path[0].slot, &old);
	if (old == len) {
		err = bt_overwrite(t, &c, rec, len);
	} else {
		/* The root is joined for insert_up(), which may replace it. */
		err = trans_join(t, bt_root_buf(tree));
		if (!err)
			err = trans_join(t, c.path[0].buf);
		if (!err) {
			leaf_remove(buf_node(c.path[0].buf), c.path[0].slot);
			err = insert_at(t, &c, key, rec, len);
		}
	}
	bt_cursor_release(&c);
	return err;
}

/* ---- delete ---------------------------------------------------------------------------------- */

static unsigned node_fill(const struct node_disk *n)
{
	return node_level(n) ? node_count(n) : leaf_used(n);
}

static bool node_sparse(const struct node_disk *n)
{
	return node_fill(n) < (node_level(n) ? BRANCH_SPARSE : LEAF_SPARSE);
}

/* Merging leaves nothing behind that may not stand alone: empty leaves always merge, single
 * children too if they can. */
static bool may_merge(const struct node_disk *a, const struct node_disk *b)
{
	unsigned fill = node_fill(a) + node_fill(b);

	if (node_level(a))
		return fill <= (node_count(a) < 2 || node_count(b) < 2 ? NODE_SLOT_MAX :
									 BRANCH_MERGED_MAX);
	return !node_count(a) || !node_count(b) || fill <= LEAF_MERGED_MAX;
}

/* `right`, the child in slot `slot` of the path's parent at `level`, goes into `left`. */
static int merge(struct trans *t, struct bt_cursor *c, unsigned level, unsigned slot,
		 struct buf *left, struct buf *right)
{
	struct buf *parent = c->path[level].buf;
	int err = 0;

	if (node_count(buf_node(right)))
		err = trans_join(t, left);
	if (!err)
		err = trans_join(t, parent);
	if (err)
		return err;
	if (level > 1)
		branch_append(buf_node(left), buf_node(right));
	else
		leaf_append(buf_node(left), buf_node(right));
	branch_remove(buf_node(parent), slot);
	return node_free(t, c->tree, right->block);
}

/* A branch with a single child whose neighbour is too full to take it: share evenly. */
static int redistribute(struct trans *t, struct bt_cursor *c, unsigned level, unsigned slot,
			struct buf *left, struct buf *right)
{
	struct buf *parent = c->path[level].buf;
	unsigned lc = node_count(buf_node(left)), rc = node_count(buf_node(right));
	unsigned half = (lc + rc) / 2;
	int err = trans_join(t, left);

	if (!err)
		err = trans_join(t, right);
	if (!err)
		err = trans_join(t, parent);
	if (err)
		return err;
	if (lc < half)
		branch_move_left(buf_node(left), buf_node(right), half - lc);
	else
		branch_move_right(buf_node(left), buf_node(right), lc - half);
	branch_set_key(buf_node(parent), slot, node_key(buf_node(right), 0));
	return 0;
}

/* Try to join the path's node at `level` with its neighbour on one side. *done: the parent lost a
 * child. */
static int rebalance_with(struct trans *t, struct bt_cursor *c, unsigned level, bool with_left,
			  bool *done)
{
	struct bt_path *p = &c->path[level + 1];
	unsigned slot = with_left ? p->slot : p->slot + 1; /* of the right one of the two */
	struct buf *b = c->path[level].buf, *other, *left, *right;
	fsblock_t block = branch_child(buf_node(p->buf), with_left ? slot - 1 : slot);
	int err = bt_node_get(c->tree, block, level, &other);

	if (err)
		return err;
	left = with_left ? other : b;
	right = with_left ? b : other;
	if (may_merge(buf_node(left), buf_node(right))) {
		err = merge(t, c, level + 1, slot, left, right);
		*done = true;
	} else if (level && node_count(buf_node(b)) < 2) {
		err = redistribute(t, c, level + 1, slot, left, right);
	}
	buf_put(other);
	return err;
}

static int root_shrink(struct trans *t, struct tree tree, struct buf *root)
{
	struct node_disk *n = buf_node(root);
	unsigned level = node_level(n);

	if (!level && !node_count(n)) {
		root_set(tree, 0, 0);
		return node_free(t, tree, root->block);
	}
	/* The child has two children or is a leaf: one step is enough. */
	if (level && node_count(n) == 1) {
		root_set(tree, branch_child(n, 0), level);
		return node_free(t, tree, root->block);
	}
	return 0;
}

static int rebalance(struct trans *t, struct bt_cursor *c)
{
	for (unsigned level = 0; level + 1 < c->height; level++) {
		struct bt_path *p = &c->path[level + 1];
		bool done = false;
		int err = 0;

		if (!node_sparse(buf_node(c->path[level].buf)))
			return 0;
		if (p->slot > 0)
			err = rebalance_with(t, c, level, true, &done);
		if (!err && !done && p->slot + 1 < node_count(buf_node(p->buf)))
			err = rebalance_with(t, c, level, false, &done);
		if (err || !done)
			return err;
	}
	return root_shrink(t, c->tree, c->path[c->height - 1].buf);
}

int bt_delete(struct trans *t, struct tree tree, struct key key)
{
	struct bt_cursor c;
	int err;

	bt_cursor_init(&c, tree);
	err = bt_seek(&c, key, BT_EQ);
	if (err)
		return err;
	err = root_count_records(t, tree, -1);
	if (!err)
		err = trans_join(t, c.path[0].buf);
	if (!err) {
		leaf_remove(buf_node(c.path[0].buf), c.path[0].slot);
		err = rebalance(t, &c);
	}
	bt_cursor_release(&c);
	return err;
}
