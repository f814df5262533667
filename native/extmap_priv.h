/* SPDX-License-Identifier: MIT
 *
 * extmap_priv.h - what extmap.c and extmap_change.c share: reading a record, and replacing a few
 * neighbours by others.
 */
#ifndef EXTFS_EXTMAP_PRIV_H
#define EXTFS_EXTMAP_PRIV_H

#include "extmap.h"

static inline struct tree extmap_tree(const struct inode *in)
{
	return fs_tree(in->fs, TREE_EXTENT);
}
static inline struct key extmap_key(const struct inode *in, enum fork fork, fileblk_t file)
{
	return KEY(in->ino, EXTENT_KEY_LO(fork, file));
}
static inline fileblk_t extent_end(const struct extent *e) { return e->file + e->len; }

/* Record under the cursor. -ENOENT: it belongs to another inode or fork. -ERR_RECORD_SHAPE,
 * -ERR_META_RANGE. */
int extmap_read(struct bt_cursor *c, const struct inode *in, enum fork fork, struct extent *out);
/* Seek and read. */
int extmap_find(struct inode *in, enum fork fork, fileblk_t file, enum bt_seek how,
		struct extent *out);
/* Does b continue a? */
bool extent_continues(const struct extent *a, const struct extent *b);

/* A replacement: `old` records become `new` ones. Both in order of file block; new ones that
 * continue each other are joined. */
struct extmap_edit {
	struct extent old[3], new[5];
	unsigned nold, nnew;
};
void edit_old(struct extmap_edit *ed, const struct extent *e);
void edit_new(struct extmap_edit *ed, struct extent e);
/* The one place where a map changes: raises in->map_gen, also when the transaction is cancelled. */
int extmap_apply(struct trans *t, struct inode *in, enum fork fork, const struct extmap_edit *ed);

#endif
