/* SPDX-License-Identifier: MIT
 *
 * segment_treap.c - interval trees of segments: see segment_treap.h.
 *
 * A search for an overlap goes down one path of a treap, whatever is in it: of the nodes that begin
 * before the range ends, one whose subtree reaches past the start of the range has an overlap in
 * it. Only a search for a foreign holder may have to look at more: at each of its own segments that
 * overlaps the start of the range.
 */
#include "segment_treap.h"

bool seg_before(const struct seg *a, const struct seg *b, unsigned by)
{
	if (by == BY_HOLDER && a->holder != b->holder)
		return a->holder < b->holder;
	if (a->start != b->start)
		return a->start < b->start;
	if (a->order != b->order)
		return a->order < b->order;
	if (a->holder != b->holder)
		return a->holder < b->holder;
	return a->kind < b->kind;
}

static void pull_holders(struct seg *n)
{
	const struct seg *l = n->link[BY_START].left, *r = n->link[BY_START].right;

	n->min_holder = n->max_holder = n->holder;
	if (l) {
		n->min_holder = MIN(n->min_holder, l->min_holder);
		n->max_holder = MAX(n->max_holder, l->max_holder);
	}
	if (r) {
		n->min_holder = MIN(n->min_holder, r->min_holder);
		n->max_holder = MAX(n->max_holder, r->max_holder);
	}
}

static void pull(struct seg *n, unsigned by)
{
	struct seg_link *l = &n->link[by];
	uint64_t max = n->end;

	if (l->left && l->left->link[by].max_end > max)
		max = l->left->link[by].max_end;
	if (l->right && l->right->link[by].max_end > max)
		max = l->right->link[by].max_end;
	l->max_end = max;
	if (by == BY_START && is_grant(n))
		pull_holders(n);
}

/* Everything in a precedes everything in b. Depth is logarithmic in expectation. */
static struct seg *treap_join(struct seg *a, struct seg *b, unsigned by)
{
	if (!a)
		return b;
	if (!b)
		return a;
	if (a->priority >= b->priority) {
		a->link[by].right = treap_join(a->link[by].right, b, by);
		pull(a, by);
		return a;
	}
	b->link[by].left = treap_join(a, b->link[by].left, by);
	pull(b, by);
	return b;
}

/* Nodes of n that precede s go to *low, the others to *high. */
static void treap_split(struct seg *n, const struct seg *s, unsigned by, struct seg **low,
			struct seg **high)
{
	if (!n) {
		*low = *high = NULL;
	} else if (seg_before(n, s, by)) {
		treap_split(n->link[by].right, s, by, &n->link[by].right, high);
		pull(n, by);
		*low = n;
	} else {
		treap_split(n->link[by].left, s, by, low, &n->link[by].left);
		pull(n, by);
		*high = n;
	}
}

struct seg *treap_insert(struct seg *n, struct seg *s, unsigned by)
{
	if (!n || s->priority > n->priority) {
		treap_split(n, s, by, &s->link[by].left, &s->link[by].right);
		pull(s, by);
		return s;
	}
	if (seg_before(s, n, by))
		n->link[by].left = treap_insert(n->link[by].left, s, by);
	else
		n->link[by].right = treap_insert(n->link[by].right, s, by);
	pull(n, by);
	return n;
}

struct seg *treap_remove(struct seg *n, struct seg *s, unsigned by)
{
	xassert(n);
	if (n == s)
		return treap_join(n->link[by].left, n->link[by].right, by);
	if (seg_before(s, n, by))
		n->link[by].left = treap_remove(n->link[by].left, s, by);
	else
		n->link[by].right = treap_remove(n->link[by].right, s, by);
	pull(n, by);
	return n;
}

static bool too_low(const struct overlap_query *q, const struct seg *n)
{
	if (q->by == BY_HOLDER && n->holder != q->holder)
		return n->holder < q->holder;
	return q->after && !seg_before(q->after, n, BY_START);
}

/* The first of the subtree, in its order. */
struct seg *treap_overlap(struct seg *n, const struct overlap_query *q)
{
	bool foreign = q->by == BY_START && q->holder;
	struct seg *found;

	while (n && n->link[q->by].max_end > q->start) {
		if (foreign && n->min_holder == q->holder && n->max_holder == q->holder)
			return NULL;
		if (!too_low(q, n)) {
			found = treap_overlap(n->link[q->by].left, q);
			if (found)
				return found;
			if (n->start >= q->end || (q->by == BY_HOLDER && n->holder != q->holder))
				return NULL;
			if (n->end > q->start && !(foreign && n->holder == q->holder))
				return n;
		}
		n = n->link[q->by].right;
	}
	return NULL;
}
