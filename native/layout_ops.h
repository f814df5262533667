/* SPDX-License-Identifier: MIT
 *
 * layout_ops.h - what LAYOUT_GET, LAYOUT_COMMIT and LAYOUT_RETURN have in common.
 */
#ifndef EXTFS_LAYOUT_OPS_H
#define EXTFS_LAYOUT_OPS_H

#include "file_run.h"
#include "layout_priv.h"

#define ANY_GRANT (1u << SEG_GRANT_READ | 1u << SEG_GRANT_RW | 1u << SEG_GRANT_PIN)
#define RW_GRANT (1u << SEG_GRANT_RW)

/* ns of the monotonic clock, for latencies: real time, whatever the clock of deadlines says. */
uint64_t layout_ticks(void);
/* Bytes of blocks [at, end) begin and end here. */
static inline uint64_t block_start(fileblk_t at) { return at << BLOCK_SHIFT; }

/* Have the kernel drop its pages of [start, end) (UINT64_MAX: to the end) and the attributes, if it
 * may have any; then `then`. No lock held. */
enum step layout_drop_pages(struct file_run *r, struct inode *in, uint64_t start, uint64_t end,
			    step_fn then);
/* The same in the name of a holder, whom others may wait for: without waiting for those pages that
 * are locked by a READ or WRITE of this file which waits for somebody. Whoever reads afterwards
 * finds nothing that was there before, all the same: see layout_pages.c. */
enum step layout_drop_stale(struct file_run *r, struct inode *in, uint64_t start, uint64_t end,
			    step_fn then);
/* The same with nobody waiting. */
void layout_drop_later(struct fs *fs, struct inode *in, uint64_t start, uint64_t end);

/* ---- layout_commit_check.c ---- */
/* All of a commit's ranges and its size, and of what kinds of grants they are (r->lc). fs->lock
 * exclusive. 0 or a code: nothing may change. */
int commit_check(struct file_run *r);

/* ---- layout_swap.c: staged blocks take their place; in a transaction, with readers kept out by a
 * SWAP or MAP segment ---- */
/* Room for one call of swap_piece(): two steps of the extent map, an exposure, the inode's
 * record. */
#define SWAP_STEP_BLOCKS (2 * EXTMAP_STEP_BLOCKS + 2 * TRANS_TREE_OP + TRANS_ALLOC_OP)
/* The first staged piece at or behind *at, below end, replaces what the data fork has there; it is
 * no exposure any more (of `holder`; 0: of anybody). *at: behind it; end, and *moved 0, when there
 * is none. */
int swap_piece(struct trans *t, struct inode *in, fileblk_t *at, fileblk_t end, uint64_t holder,
	       nblocks_t *moved);
/* After staged blocks went: INODE_F_STAGING goes with the last of them. */
int staging_settle(struct inode *in);

#endif
