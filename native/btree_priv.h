/* SPDX-License-Identifier: MIT
 *
 * btree_priv.h - what btree.c and btree_change.c share.
 */
#ifndef EXTFS_BTREE_PRIV_H
#define EXTFS_BTREE_PRIV_H

#include "btree.h"

struct buf *bt_root_buf(struct tree tree);
struct tree_root_disk *bt_root(struct tree tree);
/* Pinned node, verified, of this tree and level. */
int bt_node_get(struct tree tree, fsblock_t block, unsigned level, struct buf **out);
/* Path to where `key` is or would be; path[0].slot may be the leaf's count. -ENOENT: empty tree. */
int bt_descend(struct bt_cursor *c, struct key key, bool *exact);

#endif
