/* SPDX-License-Identifier: MIT
 *
 * segment.c - held segments in an interval tree, parked ones in a queue.
 *
 * Definitions: two segments clash when their ranges overlap and their kinds conflict (table in
 * segment.h).
 *
 * Invariants, all under inode->lock:
 *  1. No two held segments clash.
 *  2. A parked segment clashes with a held one or with one that was parked before it.
 *  3. The queue is in order of arrival.
 *  4. The tree is a treap: ordered by (start, order), heap by priority, which is a hash of `order`;
 *     max_end of a node is the greatest end in its subtree.
 *
 * Whatever makes a segment smaller or go away (release, shrink, cancel) goes through the queue
 * once, in order, and grants what invariant 2 no longer holds back.
 */
#include "segment.h"

#include "device.h"

struct seg_tree {
	struct seg *root;
	struct seg *queue_head, *queue_tail;
	uint64_t arrivals;
	unsigned held[SEG_KINDS];
};

static const bool conflicts[SEG_KINDS][SEG_KINDS] = {
	[SEG_READ_IO] = { [SEG_MAP] = true },
	[SEG_WRITE_IO] = { [SEG_WRITE_IO] = true, [SEG_MAP] = true },
	[SEG_MAP] = { [SEG_READ_IO] = true, [SEG_WRITE_IO] = true, [SEG_MAP] = true },
};

static bool clash(const struct seg *a, const struct seg *b)
{
	return conflicts[a->kind][b->kind] && a->start < b->end && b->start < a->end;
}

/* ---- treap ---------------------------------------------------------------------------------- */

static bool before(const struct seg *a, const struct seg *b)
{
	if (a->start != b->start)
		return a->start < b->start;
	return a->order < b->order;
}

static void pull_max(struct seg *n)
{
	uint64_t max = n->end;

	if (n->left && n->left->max_end > max)
		max = n->left->max_end;
	if (n->right && n->right->max_end > max)
		max = n->right->max_end;
	n->max_end = max;
}

/* Everything in a precedes everything in b. Depth is logarithmic in expectation. */
static struct seg *treap_join(struct seg *a, struct seg *b)
{
	if (!a)
		return b;
	if (!b)
		return a;
	if (a->priority >= b->priority) {
		a->right = treap_join(a->right, b);
		pull_max(a);
		return a;
	}
	b->left = treap_join(a, b->left);
	pull_max(b);
	return b;
}

/* Nodes of n that precede s go to *low, the others to *high. */
static void treap_split(struct seg *n, const struct seg *s, struct seg **low, struct seg **high)
{
	if (!n) {
		*low = *high = NULL;
	} else if (before(n, s)) {
		treap_split(n->right, s, &n->right, high);
		pull_max(n);
		*low = n;
	} else {
		treap_split(n->left, s, low, &n->left);
		pull_max(n);
		*high = n;
	}
}

static struct seg *treap_insert(struct seg *n, struct seg *s)
{
	if (!n || s->priority > n->priority) {
		treap_split(n, s, &s->left, &s->right);
		pull_max(s);
		return s;
	}
	if (before(s, n))
		n->left = treap_insert(n->left, s);
	else
		n->right = treap_insert(n->right, s);
	pull_max(n);
	return n;
}

static struct seg *treap_remove(struct seg *n, struct seg *s)
{
	xassert(n);
	if (n == s)
		return treap_join(n->left, n->right);
	if (before(s, n))
		n->left = treap_remove(n->left, s);
	else
		n->right = treap_remove(n->right, s);
	pull_max(n);
	return n;
}

static bool treap_clashes(const struct seg *n, const struct seg *s)
{
	while (n && n->max_end > s->start) {
		if (clash(n, s) || treap_clashes(n->left, s))
			return true;
		if (n->start >= s->end)
			return false;
		n = n->right;
	}
	return false;
}

/* ---- granting ------------------------------------------------------------------------------- */

static bool held_clashes(const struct seg_tree *st, const struct seg *s)
{
	unsigned foes = 0;

	for (int k = 0; k < SEG_KINDS; k++)
		if (conflicts[s->kind][k])
			foes += st->held[k];
	return foes && treap_clashes(st->root, s);
}

/* Does s clash with one of the parked segments from the head up to, not including, stop? */
static bool queue_clashes(const struct seg_tree *st, const struct seg *s, const struct seg *stop)
{
	for (const struct seg *q = st->queue_head; q != stop; q = q->queue_next)
		if (clash(q, s))
			return true;
	return false;
}

static void grant(struct seg_tree *st, struct seg *s)
{
	s->priority = (uint32_t)((s->order * 0x9e3779b97f4a7c15u) >> 32);
	s->left = s->right = NULL;
	st->root = treap_insert(st->root, s);
	st->held[s->kind]++;
	s->state = SEG_HELD;
}

static void take_out(struct seg_tree *st, struct seg *s)
{
	st->root = treap_remove(st->root, s);
	st->held[s->kind]--;
	s->state = SEG_IDLE;
}

static void queue_remove(struct seg_tree *st, struct seg *s)
{
	*(s->queue_prev ? &s->queue_prev->queue_next : &st->queue_head) = s->queue_next;
	*(s->queue_next ? &s->queue_next->queue_prev : &st->queue_tail) = s->queue_prev;
	s->queue_prev = s->queue_next = NULL;
}

/* [start, end) has become freer: grant what only that held back. */
static void wake_queue(struct seg_tree *st, uint64_t start, uint64_t end)
{
	struct seg *next;

	for (struct seg *q = st->queue_head; q; q = next) {
		next = q->queue_next;
		if (q->start >= end || start >= q->end)
			continue;
		if (held_clashes(st, q) || queue_clashes(st, q, q))
			continue;
		queue_remove(st, q);
		grant(st, q);
		/* From here on the segment belongs to the thread of its op. */
		ioctx_wake(q->op);
	}
}

void seg_init(struct seg *s, enum seg_kind kind, uint64_t start, uint64_t end, struct op *op)
{
	xassert(start < end);
	*s = (struct seg){ .start = start, .end = end, .kind = kind, .state = SEG_IDLE, .op = op };
}

static int acquire(struct inode *in, struct seg *s, bool park)
{
	struct seg_tree *st;
	int rc = 0;

	xassert(s->start < s->end);
	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_IDLE);
	st = in->segs;
	if (unlikely(!st)) {
		st = in->segs = calloc(1, sizeof(*st));
		if (!st) {
			pthread_mutex_unlock(&in->lock);
			return -ENOMEM;
		}
	}
	if (!held_clashes(st, s) && !queue_clashes(st, s, NULL)) {
		s->order = ++st->arrivals;
		grant(st, s);
	} else if (!park) {
		rc = -EAGAIN;
	} else {
		xassert(s->op);
		s->order = ++st->arrivals;
		s->queue_prev = st->queue_tail;
		s->queue_next = NULL;
		*(st->queue_tail ? &st->queue_tail->queue_next : &st->queue_head) = s;
		st->queue_tail = s;
		s->state = SEG_PARKED;
		rc = ERR_PARKED;
	}
	pthread_mutex_unlock(&in->lock);
	return rc;
}

int seg_acquire(struct inode *in, struct seg *s)
{
	return acquire(in, s, true);
}

int seg_try(struct inode *in, struct seg *s)
{
	return acquire(in, s, false);
}

void seg_release(struct inode *in, struct seg *s)
{
	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_HELD);
	take_out(in->segs, s);
	wake_queue(in->segs, s->start, s->end);
	pthread_mutex_unlock(&in->lock);
}

void seg_shrink(struct inode *in, struct seg *s, uint64_t start, uint64_t end)
{
	uint64_t old_start, old_end;

	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_HELD);
	xassert(s->start <= start && start < end && end <= s->end);
	old_start = s->start;
	old_end = s->end;
	take_out(in->segs, s);
	s->start = start;
	s->end = end;
	grant(in->segs, s);
	wake_queue(in->segs, old_start, old_end);
	pthread_mutex_unlock(&in->lock);
}

bool seg_cancel(struct inode *in, struct seg *s)
{
	bool parked;

	pthread_mutex_lock(&in->lock);
	parked = s->state == SEG_PARKED;
	if (parked) {
		queue_remove(in->segs, s);
		s->state = SEG_IDLE;
		wake_queue(in->segs, s->start, s->end);
	}
	pthread_mutex_unlock(&in->lock);
	return parked;
}

bool seg_any(struct inode *in)
{
	bool any;

	pthread_mutex_lock(&in->lock);
	any = in->segs && (in->segs->root || in->segs->queue_head);
	pthread_mutex_unlock(&in->lock);
	return any;
}

void seg_tree_free(struct inode *in)
{
	if (!in->segs)
		return;
	xassert(!in->segs->root && !in->segs->queue_head);
	free(in->segs);
	in->segs = NULL;
}
