/* SPDX-License-Identifier: MIT
 *
 * alloc.h - free space: allocation groups with two B+trees each (by block, by length).
 *
 * Nodes of the free trees come from the AG's freelist, which every allocation or free first fills
 * to what its splits could need; so changing free space never recurses. Nodes of other trees come
 * from alloc_meta().
 *
 * Busy extents: a freed extent is free on disk at once (in the transaction), but must not be handed
 * out before
 *   data block -> data:      the freeing group is durable;
 *   metadata block -> data:  also every log image of it is checkpointed (replay must not write over
 *   data);
 *   anything -> metadata:    at once (its new content goes through the log, which keeps the order).
 * An in-memory interval tree remembers them; it is empty after mount, because replay empties the
 * log. Quarantined blocks are not free: they live in TREE_QUARANTINE until
 * alloc_quarantine_release().
 *
 * Reserve: the last blocks (alloc reserve, scaled with the device) serve only metadata of
 * operations that free space or finish intents, so deletion works on a full filesystem.
 *
 * Concurrency: everything here runs under fs->lock held exclusively, except alloc_statfs(), which
 * takes it shared itself.
 */
#ifndef EXTFS_ALLOC_H
#define EXTFS_ALLOC_H

#include "trans.h"

#define ALLOC_USE_RESERVE 0x1u /* trans.alloc_flags: this operation frees space or finishes one that does */

int alloc_open(struct fs *fs); /* read all AG headers */
void alloc_close(struct fs *fs);

/* Allocate one data extent of min..max blocks, preferably at goal (0: none), else near it, else the
 * best fit for max, else the longest there is. -ENOSPC: no free extent of min blocks;
 * -ERR_BUSY_BLOCKS: there would be one after the next commit (cancel, jrn_force the running group,
 * start over). */
int alloc_extent(struct trans *t, fsblock_t goal, nblocks_t min, nblocks_t max, fsblock_t *start,
		 nblocks_t *len);
/* The file is not going to grow soon: what was kept free behind it (trans.grows) is anybody's. Any thread. */
void alloc_grown(struct fs *fs, inum_t ino);
/* Free data blocks: they become busy until the transaction's group is durable. Shared blocks go
 * through refcount_drop(), not here. Freeing a block that is free already is -ERR_FREE_CORRUPT. */
int alloc_free(struct trans *t, fsblock_t start, nblocks_t len);
/* One metadata block near goal; and its return. */
int alloc_meta(struct trans *t, fsblock_t goal, fsblock_t *block);
int alloc_meta_free(struct trans *t, fsblock_t block);
/* Where a new file's first extent should go: spreads files over AGs, keeps a directory's files
 * together. */
fsblock_t alloc_goal_for_inode(struct fs *fs, inum_t ino, inum_t parent);

/* Move mapped data blocks into quarantine instead of freeing them; and free them from it. */
int alloc_quarantine(struct trans *t, fsblock_t start, nblocks_t len, uint64_t holder);
int alloc_quarantine_release(struct trans *t, fsblock_t start, nblocks_t len);

/* Used by btree.c for nodes of the AG trees. */
int alloc_freelist_take(struct trans *t, uint32_t agno, fsblock_t *block);
int alloc_freelist_give(struct trans *t, uint32_t agno, fsblock_t block);
struct buf *alloc_ag_buf(struct fs *fs, uint32_t agno); /* pinned for the life of the mount */
uint32_t alloc_agno(const struct fs *fs, fsblock_t block);
/* May data or a tree node live in this block: on the device and not a superblock, AG header,
 * journal ...? */
bool alloc_block_usable(const struct fs *fs, fsblock_t block);

struct alloc_space { nblocks_t total, free, avail /* to users: without the reserve */, busy, quarantined; };
/* Is there no room beyond the reserve for what is under way? With the lock, shared is enough. */
bool alloc_nearly_full(struct fs *fs);
void alloc_statfs(struct fs *fs, struct alloc_space *sp);
/* At commit of a transaction: its frees become busy. With the lock. */
void alloc_busy_add(struct fs *fs, fsblock_t start, nblocks_t len, bool meta, xid_t xid);

extern const struct buf_type buf_type_ag;

#endif
