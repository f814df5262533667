/* SPDX-License-Identifier: MIT
 *
 * file_remap.h - private to file_*.c and reaper.c: what moves blocks from one place of a map to
 * another, in as many transactions as it takes.
 *
 * The first transaction that leaves something to be done adds an intent, each further one brings it
 * up to date, the last one removes it: so a crash is finished by the reaper, which calls the same
 * functions. Who calls them holds MAP segments of everything that is still to move, so no reader
 * sees a mix; inode->remapping tells those who look at the map without a segment.
 *
 * Both functions run in a transaction of REMAP_TRANS_BLOCKS, write the inodes, and change the state
 * that they are given: the caller keeps it when it commits.
 */
#ifndef EXTFS_FILE_REMAP_H
#define EXTFS_FILE_REMAP_H

#include "file_run.h"

#define REMAP_TRANS_BLOCKS 384u
/* Extents that one transaction moves at most: it keeps everybody else out. */
#define REMAP_STEPS 64u
/* A mapping taken or added: its leaf, a split. */
#define REMAP_EDIT_BLOCKS (TRANS_TREE_OP + TRANS_ALLOC_OP)
/* The intent and two inodes' records. */
#define REMAP_END_BLOCKS (3 * (TRANS_TREE_OP + TRANS_ALLOC_OP))

/* file_remap.c: the operations themselves, which have their segments: one transaction after the
 * other, then the end of the operation. */
struct remap_kind {
	/* Sizes and times, in the first transaction, which joined the inodes. */
	void (*first)(struct file_run *r);
	/* The next piece: one of the functions below. */
	int (*some)(struct file_run *r, struct trans *t, union remap_state *state);
	bool (*done)(const struct file_run *r, const union remap_state *state);
	/* what is said of the inode when it fails after the first transaction */
	const char *unfinished;
};
enum step remap_begin(struct file_run *r, const struct remap_kind *kind, union remap_state state);

/* file_exchange.c. Exchange the next blocks of what is left: ex->left blocks from ex->a of in and
 * from ex->b of dst on, which may be the same inode. ex->left 0: finished. */
int exchange_some(struct trans *t, struct inode *in, struct inode *dst, struct exchange_state *ex);

/* file_shift.c. Collapse: what is mapped in [at - by, at) goes, then everything from `at` on moves
 * `by` blocks towards the start; finished when at == FILE_MAX_BLOCKS. Insert: everything in [at,
 * end) moves `by` blocks towards the end, where nothing is mapped; finished when end == at. */
int collapse_some(struct trans *t, struct inode *in, struct shift_state *sh);
int insert_some(struct trans *t, struct inode *in, struct shift_state *sh);

/* In a transaction, for an inode whose written blocks change places. left: not with this one. */
int note_moved(struct trans *t, struct inode *in, bool left);

/* file_copy.c. In a transaction of COPY_TRANS_BLOCKS that joined both: blocks [d, d + *len) of dst
 * become those of src at s, shared; *len <= max is as far as one transaction may get.
 * -SHARE_PIECES: not this time, try fewer than *len. */
#define COPY_TRANS_BLOCKS 384u
#define SHARE_PIECES E2BIG
/* The destination has grown since its end was looked at (LAYOUT_COMMIT has no segment of the block that was its last):
 * what the source has behind EOF would be seen. */
#define SHARE_GROWN ESTALE
int share_blocks(struct trans *t, struct inode *src, fileblk_t s, struct inode *dst, fileblk_t d,
		 nblocks_t max, nblocks_t *len);

#endif
