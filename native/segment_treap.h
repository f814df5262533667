/* SPDX-License-Identifier: MIT
 *
 * segment_treap.h - for segment.c: segments of one kind in order of (start, order, holder, kind),
 * which no two have in common (BY_START), or with the holder in front (BY_HOLDER; grants only).
 *
 * Heap by a random priority, so the depth is logarithmic in expectation. Every node knows the
 * greatest end of its subtree and, BY_START, the least and the greatest holder of grants.
 *
 * Concurrency: inode->lock of whoever owns the tree.
 */
#ifndef EXTFS_SEGMENT_TREAP_H
#define EXTFS_SEGMENT_TREAP_H

#include "segment.h"

enum { BY_START, BY_HOLDER };

struct overlap_query {
	unsigned by;
	uint64_t start, end;
	uint64_t holder;         /* BY_HOLDER: whose; BY_START: of anybody else (0: of anybody) */
	const struct seg *after; /* NULL: from the first */
};

static inline bool is_grant(const struct seg *s)
{
	return s->kind >= SEG_FIRST_GRANT;
}

bool seg_before(const struct seg *a, const struct seg *b, unsigned by);
/* Both return the new root. s->priority is set. */
struct seg *treap_insert(struct seg *n, struct seg *s, unsigned by);
struct seg *treap_remove(struct seg *n, struct seg *s, unsigned by);
/* The first of the subtree, in its order; NULL: none. */
struct seg *treap_overlap(struct seg *n, const struct overlap_query *q);

#endif
