/* SPDX-License-Identifier: MIT
 *
 * segment.h - who is using which byte range of an inode right now: the tree that makes everybody
 * wait for everybody else.
 *
 * The server's own device I/O and map changes are short-lived segments in it; the grants of layout
 * holders are long-lived ones in the same tree (they join in the layout module). Ranges are
 * half-open [start, end) in bytes; end UINT64_MAX means "to the end of every file". Callers round
 * to blocks.
 *
 *   conflicts      READ_IO   WRITE_IO   MAP      (same inode, overlapping ranges)
 *   READ_IO           -         -        x
 *   WRITE_IO          -         x        x
 *   MAP               x         x        x
 *
 * A segment that conflicts parks: it keeps its place in the inode's queue (first come, first served
 * among those that overlap and conflict, so nobody starves), and its op is resumed when it has been
 * granted. An op holds at most one segment per inode, and takes segments of two inodes in order of
 * inode number, so there is no cycle of waiters.
 *
 * Concurrency: inode->lock, taken inside. fs->lock may be held shared or not at all.
 */
#ifndef EXTFS_SEGMENT_H
#define EXTFS_SEGMENT_H

#include "inode.h"

enum seg_kind { SEG_READ_IO, SEG_WRITE_IO, SEG_MAP };

struct seg {
	uint64_t start, end;
	enum seg_kind kind;
	enum { SEG_IDLE, SEG_PARKED, SEG_HELD } state;
	struct op *op;
	uint64_t order; /* arrival */
	/* held: links of the treap; max_end: greatest end in the subtree below */
	struct seg *left, *right;
	uint64_t max_end;
	uint32_t priority;
	/* parked: links of the queue */
	struct seg *queue_prev, *queue_next;
};

void seg_init(struct seg *s, enum seg_kind kind, uint64_t start, uint64_t end, struct op *op);
/* 0: held. ERR_PARKED: op will be resumed with it held. */
int seg_acquire(struct inode *in, struct seg *s);
/* 0 or -EAGAIN, never parks. */
int seg_try(struct inode *in, struct seg *s);
void seg_release(struct inode *in, struct seg *s);
/* Make a held segment smaller, keeping its kind; wakes who waited for the rest. */
void seg_shrink(struct inode *in, struct seg *s, uint64_t start, uint64_t end);
/* Interrupt: true if it was parked and is out of the queue now; its op will not be resumed. */
bool seg_cancel(struct inode *in, struct seg *s);
bool seg_any(struct inode *in); /* anything held or parked? */
void seg_tree_free(struct inode *in); /* when the inode leaves memory; must be empty */

#endif
