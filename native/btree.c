/* SPDX-License-Identifier: MIT
 *
 * btree.c - B+tree: the node verifier, descent, cursors, lookups. Changes are in btree_change.c.
 *
 * Invariants of a tree on disk (test_btree.c checks them whole, buf_type_node.verify node by node):
 *   1. Height h > 0: every path from the root has h nodes; a node at distance d from the root has
 *      level h - 1 - d.
 *   2. Keys of a node ascend strictly. Slot i of a branch with child c: every key in c's subtree is
 *      >= key i and < key i + 1. Key 0 of a branch equals the key that its parent has for it; along
 *      the left edge it is (0, 0).
 *   3. No leaf is empty, and a branch has at least two children, the root included.
 *   4. root.records is the number of leaf records.
 */
#include <string.h>

#include "alloc.h"
#include "btree_node.h"
#include "btree_priv.h"
#include "errors.h"
#include "fs.h"

struct tree fs_tree(struct fs *fs, enum tree_type type)
{
	xassert(type < TREE_ROOT_COUNT);
	return (struct tree){ .fs = fs, .type = type };
}

/* ---- verification ---------------------------------------------------------------------------- */

static int leaf_verify(const struct node_disk *n)
{
	const struct leaf_slot *s = (const struct leaf_slot *)n->slots;
	unsigned count = node_count(n), heap = get16(n->heap), bytes = get16(n->dead), space = 0;

	if (heap > BLOCK_SIZE || heap < NODE_HEAD + count * NODE_SLOT_SIZE)
		return -ERR_NODE_BOUNDS;
	for (unsigned i = 0; i < count; i++) {
		unsigned off = get16(s[i].offset), len = get16(s[i].length);

		if (len > RECORD_MAX)
			return -ERR_RECORD_SHAPE;
		if (len ? off < heap || off + len > BLOCK_SIZE || (off & 7) : off != 0)
			return -ERR_NODE_BOUNDS;
		bytes += len;
		space += record_space(len);
	}
	/* A compaction has room for them all, each padded. */
	if (space > BLOCK_SIZE - heap)
		return -ERR_NODE_BOUNDS;
	/* Overlapping records would make the sum too large, unless a hole makes up for it. */
	return bytes == BLOCK_SIZE - heap ? 0 : -ERR_NODE_BOUNDS;
}

static int branch_verify(const struct fs *fs, const struct node_disk *n)
{
	for (unsigned i = 0; i < node_count(n); i++)
		if (!alloc_block_usable(fs, branch_child(n, i)))
			return -ERR_META_RANGE;
	return 0;
}

static int node_verify(const struct fs *fs, const void *block)
{
	const struct node_disk *n = block;
	unsigned count = node_count(n);

	if (node_level(n) >= BT_MAX_HEIGHT)
		return -ERR_NODE_LEVEL;
	if (count > NODE_SLOT_MAX || count < 1)
		return -ERR_NODE_BOUNDS;
	for (unsigned i = 1; i < count; i++)
		if (key_cmp(node_key(n, i - 1), node_key(n, i)) >= 0)
			return -ERR_NODE_ORDER;
	return node_level(n) ? branch_verify(fs, n) : leaf_verify(n);
}

const struct buf_type buf_type_node = {
	.name = "tree node",
	.magic = MAGIC_NODE,
	.verify = node_verify,
};

/* ---- roots and nodes ------------------------------------------------------------------------- */

struct buf *bt_root_buf(struct tree tree)
{
	return tree.type < TREE_ROOT_COUNT ? tree.fs->root : alloc_ag_buf(tree.fs, tree.agno);
}

struct tree_root_disk *bt_root(struct tree tree)
{
	struct ag_disk *ag;

	if (tree.type < TREE_ROOT_COUNT)
		return &fs_root(tree.fs)->trees[tree.type];
	ag = alloc_ag_buf(tree.fs, tree.agno)->data;
	return tree.type == TREE_FREE_BY_BLOCK ? &ag->by_block : &ag->by_len;
}

unsigned bt_height(struct tree tree)
{
	return get32(bt_root(tree)->height);
}

uint64_t bt_records(struct tree tree)
{
	return get64(bt_root(tree)->records);
}

/* Children were checked when their parent was verified; the root's place is checked here. */
static int root_place(struct tree tree, unsigned *height, fsblock_t *block)
{
	const struct tree_root_disk *root = bt_root(tree);

	*height = get32(root->height);
	*block = get64(root->block);
	if (!*height)
		return -ENOENT;
	if (unlikely(*height > BT_MAX_HEIGHT))
		return -ERR_NODE_LEVEL;
	return likely(alloc_block_usable(tree.fs, *block)) ? 0 : -ERR_META_RANGE;
}

int bt_node_get(struct tree tree, fsblock_t block, unsigned level, struct buf **out)
{
	int err;

	err = buf_get(tree.fs, block, &buf_type_node, OWNER_NODE(tree.type, tree.agno), out);
	if (err)
		return err;
	if (unlikely(node_level(buf_node(*out)) != level)) {
		fs_shutdown_writes(tree.fs, -ERR_NODE_LEVEL,
				   "block %llu of tree %u: level %u where %u belongs",
				   (unsigned long long)block, tree.type,
				   node_level(buf_node(*out)), level);
		buf_put(*out);
		*out = NULL; /* or the cursor, whose path it lies in, would put it again */
		return -ERR_NODE_LEVEL;
	}
	return 0;
}

/* ---- cursors --------------------------------------------------------------------------------- */

void bt_cursor_init(struct bt_cursor *c, struct tree tree)
{
	c->tree = tree;
	c->height = c->turns = 0;
}

void bt_cursor_release(struct bt_cursor *c)
{
	for (unsigned l = 0; l < c->height; l++)
		if (c->path[l].buf)
			buf_put(c->path[l].buf);
	c->height = 0;
}

static int cursor_fail(struct bt_cursor *c, int err)
{
	bt_cursor_release(c);
	return err;
}

/* Load the child under path[level] into path[level - 1], which holds no buf. */
static int cursor_down(struct bt_cursor *c, unsigned level)
{
	fsblock_t child = branch_child(buf_node(c->path[level].buf), c->path[level].slot);

	return bt_node_get(c->tree, child, level - 1, &c->path[level - 1].buf);
}

int bt_descend(struct bt_cursor *c, struct key key, bool *exact)
{
	unsigned height, level;
	fsblock_t root;
	int err;

	bt_cursor_release(c);
	*exact = false;
	err = root_place(c->tree, &height, &root);
	if (err)
		return err;
	level = height - 1;
	err = bt_node_get(c->tree, root, level, &c->path[level].buf);
	if (err)
		return err;
	for (unsigned l = 0; l < level; l++)
		c->path[l].buf = NULL;
	c->height = height;
	for (; level; level--) {
		c->path[level].slot = branch_find(buf_node(c->path[level].buf), key);
		err = cursor_down(c, level);
		if (err)
			return cursor_fail(c, err);
	}
	c->path[0].slot = node_lower_bound(buf_node(c->path[0].buf), key, exact);
	return 0;
}

/* path[1].slot leads to the next leaf. Whoever came from leaf to leaf before is likely to want those behind it, too, as far
 * as they are of the same file or directory. */
static void read_ahead(struct bt_cursor *c)
{
	const struct node_disk *parent = buf_node(c->path[1].buf);
	unsigned slot = c->path[1].slot, n = node_count(parent) - slot;
	fsblock_t blocks[BUF_MANY];

	if (!buf_reads_ahead || !c->turns++)
		return;
	n = MIN(n, BUF_MANY);
	for (unsigned i = 0; i < n; i++) {
		if (node_key(parent, slot + i).hi != node_key(parent, slot).hi)
			n = i;
		else
			blocks[i] = branch_child(parent, slot + i);
	}
	buf_get_ready(c->tree.fs, blocks, n, &buf_type_node, OWNER_NODE(c->tree.type, c->tree.agno));
}

/* To the neighbouring leaf: its first record (forward) or its last. */
static int cursor_turn(struct bt_cursor *c, bool forward)
{
	unsigned level = 1;
	int err;

	for (; level < c->height; level++) {
		struct bt_path *p = &c->path[level];

		if (forward && p->slot + 1 < node_count(buf_node(p->buf))) {
			p->slot++;
			break;
		}
		if (!forward && p->slot > 0) {
			p->slot--;
			break;
		}
	}
	if (level >= c->height)
		return cursor_fail(c, -ENOENT);
	for (; level; level--) {
		struct bt_path *p = &c->path[level - 1];

		buf_put(p->buf);
		p->buf = NULL;
		if (forward && level == 1)
			read_ahead(c);
		err = cursor_down(c, level);
		if (err)
			return cursor_fail(c, err);
		p->slot = forward ? 0 : node_count(buf_node(p->buf)) - 1;
	}
	return 0;
}

int bt_next(struct bt_cursor *c)
{
	xassert(c->height);
	if (c->path[0].slot + 1 < node_count(buf_node(c->path[0].buf))) {
		c->path[0].slot++;
		return 0;
	}
	return cursor_turn(c, true);
}

int bt_prev(struct bt_cursor *c)
{
	xassert(c->height);
	if (c->path[0].slot) {
		c->path[0].slot--;
		return 0;
	}
	return cursor_turn(c, false);
}

int bt_seek(struct bt_cursor *c, struct key key, enum bt_seek how)
{
	bool exact;
	int err = bt_descend(c, key, &exact);
	struct bt_path *leaf = &c->path[0];

	if (err)
		return err;
	switch (how) {
	case BT_EQ:
		return exact ? 0 : cursor_fail(c, -ENOENT);
	case BT_GE:
	case BT_GT:
		if (exact && how == BT_GT)
			leaf->slot++;
		if (leaf->slot < node_count(buf_node(leaf->buf)))
			return 0;
		return cursor_turn(c, true);
	case BT_LE:
		if (exact)
			return 0;
		break;
	case BT_LT:
		break;
	}
	return bt_prev(c);
}

struct key bt_key(const struct bt_cursor *c)
{
	xassert(c->height);
	return node_key(buf_node(c->path[0].buf), c->path[0].slot);
}

const void *bt_record(const struct bt_cursor *c, unsigned *len)
{
	xassert(c->height);
	return leaf_record(buf_node(c->path[0].buf), c->path[0].slot, len);
}

int bt_lookup(struct tree tree, struct key key, void *rec, unsigned cap, unsigned *len)
{
	unsigned level, slot;
	fsblock_t block;
	struct buf *b;
	bool exact;
	int err;

	*len = 0;
	err = root_place(tree, &level, &block);
	if (err)
		return err;
	for (level--; level; level--) {
		err = bt_node_get(tree, block, level, &b);
		if (err)
			return err;
		block = branch_child(buf_node(b), branch_find(buf_node(b), key));
		buf_put(b);
	}
	err = bt_node_get(tree, block, 0, &b);
	if (err)
		return err;
	slot = node_lower_bound(buf_node(b), key, &exact);
	if (exact) {
		const void *found = leaf_record(buf_node(b), slot, len);

		if (cap)
			memcpy(rec, found, MIN(cap, *len));
	}
	buf_put(b);
	return exact ? 0 : -ENOENT;
}
