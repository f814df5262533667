/* SPDX-License-Identifier: MIT
 *
 * btree.h - the one B+tree: 128-bit keys, records of 0 to RECORD_MAX bytes.
 *
 * Concurrency: changes need a transaction (fs->lock exclusive); lookups and cursors need fs->lock
 * at least shared, and are void once it is released. A cursor is also void after any change of its
 * tree, unless the call says otherwise. Pointers to records point into pinned blocks and live as
 * long as the cursor's position.
 *
 * Every node is verified when read (order of keys, bounds of records, level). Nodes split when
 * full, at the insertion point when it is the rightmost (ascending inserts leave full nodes), and
 * are merged with a neighbour when both fit one; an empty tree has no block.
 */
#ifndef EXTFS_BTREE_H
#define EXTFS_BTREE_H

#include "buffer.h"
#include "trans.h"

#define BT_MAX_HEIGHT 12u

struct key { uint64_t hi, lo; };
static inline int key_cmp(struct key a, struct key b)
{
	if (a.hi != b.hi)
		return a.hi < b.hi ? -1 : 1;
	return a.lo < b.lo ? -1 : a.lo > b.lo;
}
#define KEY(h, l) ((struct key){(h), (l)})
#define KEY_MIN KEY(0, 0)
#define KEY_MAX KEY(UINT64_MAX, UINT64_MAX)

/* Which tree: a global one (agno 0, root in the root block), or TREE_FREE_* of an AG (root in its
 * header). */
struct tree {
	struct fs *fs;
	enum tree_type type;
	uint32_t agno;
};
struct tree fs_tree(struct fs *fs, enum tree_type type);

struct bt_path { struct buf *buf; unsigned slot; };
struct bt_cursor {
	struct tree tree;
	unsigned height; /* 0: not positioned */
	unsigned turns;  /* leaves that it came to from a neighbour */
	struct bt_path path[BT_MAX_HEIGHT]; /* [0] is the leaf; pinned */
};

enum bt_seek { BT_EQ, BT_GE, BT_GT, BT_LE, BT_LT };

void bt_cursor_init(struct bt_cursor *c, struct tree tree);
/* Always to be called in the end, positioned or not. Cursor may be used again after it. */
void bt_cursor_release(struct bt_cursor *c);
/* 0 and positioned on a record, or -ENOENT, or -ERR_*. */
int bt_seek(struct bt_cursor *c, struct key key, enum bt_seek how);
int bt_next(struct bt_cursor *c); /* -ENOENT at the end; then not positioned */
int bt_prev(struct bt_cursor *c);
struct key bt_key(const struct bt_cursor *c);
const void *bt_record(const struct bt_cursor *c, unsigned *len);

/* Exact lookup; copies up to cap bytes, sets *len to the record's length. -ENOENT. */
int bt_lookup(struct tree tree, struct key key, void *rec, unsigned cap, unsigned *len);
/* Change. rec must not point into the tree. -EEXIST, -ENOENT, -ENOSPC, -ERR_*. After an error the
 * transaction must be cancelled. */
int bt_insert(struct trans *t, struct tree tree, struct key key, const void *rec, unsigned len);
int bt_update(struct trans *t, struct tree tree, struct key key, const void *rec, unsigned len);
int bt_delete(struct trans *t, struct tree tree, struct key key);
/* Overwrite the record under a cursor, same length; the cursor stays valid. Saves the second
 * descent. */
int bt_overwrite(struct trans *t, struct bt_cursor *c, const void *rec, unsigned len);

unsigned bt_height(struct tree tree);
uint64_t bt_records(struct tree tree);

extern const struct buf_type buf_type_node;

#endif
