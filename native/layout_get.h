/* SPDX-License-Identifier: MIT
 *
 * layout_get.h - between the operation (layout_get.c) and the answer that it builds
 * (layout_answer.c).
 */
#ifndef EXTFS_LAYOUT_GET_H
#define EXTFS_LAYOUT_GET_H

#include "layout_ops.h"

/* One piece: a step of the extent map, an exposure, the inode's record and that of the holder. What
 * does not fit shortens the answer. */
#define GET_STEP_BLOCKS (EXTMAP_STEP_BLOCKS + 2 * TRANS_TREE_OP + 2 * TRANS_ALLOC_OP)

struct walk {
	struct file_run *r;
	struct layout_args *a;
	struct inode *in;
	struct trans *t; /* NULL: look only */
	fileblk_t at;    /* what is before it is in the answer */
	bool stop;
	bool map;        /* the map has to change, or what is said of it */
	bool conflict;   /* cut short by what a foreign holder may write */
	bool pair;       /* the last extent is the second half of a copy-on-write pair */
	bool in_place, cow;
	nblocks_t allocated;
};

/* Tell what is mapped from w->at to `end`, or until something stops it. The segment is held, and
 * fs->lock. Without a transaction it only looks, and says in w->map that there is something to be
 * changed; with one it changes it. A code when it cannot. */
int answer_walk(struct walk *w, fileblk_t end);

#endif
