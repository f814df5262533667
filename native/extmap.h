/* SPDX-License-Identifier: MIT
 *
 * extmap.h - which device blocks a file's blocks live in, and whether they have been written.
 *
 * Invariants: records of one (inode, fork) never overlap; length > 0; neighbours that continue each
 * other (file block, device block, state, flags) are one record up to EXTENT_MAX_BLOCKS; a file
 * block without record is a hole.
 *
 * Concurrency: changes inside a transaction, and only while a segment of the inode excludes
 * everybody whom the change would surprise (segment.h); lookups with fs->lock at least shared.
 * inode->core.blocks and flags are kept by these functions: they join the inode, and the caller
 * writes it (inode_write()) before the transaction ends.
 */
#ifndef EXTFS_EXTMAP_H
#define EXTFS_EXTMAP_H

#include "btree.h"
#include "inode.h"

struct extent {
	fileblk_t file;
	fsblock_t block; /* meaningless for a hole */
	nblocks_t len;
	enum extent_state state;
	uint8_t flags; /* EXT_F_* */
};

/* Room that one step of a changing call may take; rolling calls stop when the transaction has less,
 * except for their first step. extmap_change.c says why. Beside it the caller reserves for the
 * inode's own record. */
#define EXTMAP_STEP_BLOCKS (3 * TRANS_TREE_OP + 3 * TRANS_ALLOC_OP)

/* What covers file block `at`: an extent cut to begin there, or a hole up to the next extent. len
 * <= max. */
int extmap_lookup(struct inode *in, enum fork fork, fileblk_t at, nblocks_t max, struct extent *out);
/* Up to n extents (holes left out unless with_holes) from `at` on below `end`; returns how many. */
int extmap_list(struct inode *in, enum fork fork, fileblk_t at, fileblk_t end, bool with_holes,
		struct extent *out, unsigned n);
/* The last extent of [at, end), cut to it. -ENOENT: it is a hole. */
int extmap_last(struct inode *in, enum fork fork, fileblk_t at, fileblk_t end, struct extent *out);
/* Add a mapping where there is a hole. Merges with neighbours. -ERR_MAP_OVERLAP. */
int extmap_add(struct trans *t, struct inode *in, enum fork fork, const struct extent *ext);
/* Unmap [file, file + len), part of one extent, and keep the references of its blocks: the caller maps them elsewhere in
 * the same transaction. -ERR_MAP_OVERLAP. */
int extmap_detach(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, nblocks_t len);
/* Change the state of [file, file + len), all of it mapped (a hole is -ERR_MAP_OVERLAP), splitting
 * and merging. WRITTEN clears EXT_F_LAYOUT. Touches at most max_records records; *done says how
 * many blocks from `file` on are finished. */
int extmap_set_state(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, nblocks_t len,
		     enum extent_state state, unsigned max_records, nblocks_t *done);
/* Unmap what is mapped in [file, end), from the end backwards, dropping one reference of every
 * block; stops after max_records or when the transaction's room runs low. *rest: everything at and
 * past this file block (below end) is unmapped; == file when finished. */
int extmap_remove(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, fileblk_t end,
		  unsigned max_records, fileblk_t *rest);
/* The blocks under [file, file + len) (one extent's part, best of one reference count) become new
 * ones at `to`, state written; the old lose a reference. */
int extmap_remap(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, nblocks_t len,
		 fsblock_t to);
/* What the staging fork maps at [file, file + len) (part of one extent there, and part of one extent or hole
 * of the data fork) moves to the data fork, written; what was there loses a reference. Costs two steps:
 * 2 * EXTMAP_STEP_BLOCKS. */
int extmap_promote(struct trans *t, struct inode *in, fileblk_t file, nblocks_t len);
/* Allocate unwritten extents for every hole in [file, file + len); stops like extmap_remove; *done
 * as in set_state. With EXT_F_LAYOUT in flags or 0. -ENOSPC, -ERR_BUSY_BLOCKS: only when nothing
 * was done, else it stops short. */
int extmap_allocate(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, nblocks_t len,
		    uint8_t flags, unsigned max_records, nblocks_t *done);
/* Share src's mapped, written blocks of [file, file + len) with dst at dst_file (holes in dst
 * there); unwritten stay holes. Stops like extmap_remove; *done blocks are finished. Sets
 * INODE_F_SHARED on both. */
int extmap_share(struct trans *t, struct inode *src, fileblk_t file, nblocks_t len, struct inode *dst,
		 fileblk_t dst_file, unsigned max_records, nblocks_t *done);
/* Is every block of a written extent used by this mapping alone? *run: how many from the start on
 * share the answer. */
int extmap_is_shared(struct inode *in, const struct extent *ext, bool *shared, nblocks_t *run);

#endif
