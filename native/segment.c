/* SPDX-License-Identifier: MIT
 *
 * segment.c - held segments in interval trees, parked ones in a queue.
 *
 * Definitions: two segments clash when their ranges overlap and the rule for their kinds (table in
 * segment.h) says so.
 *
 * Invariants, all under inode->lock:
 *  1. No two held segments clash, except grants that were added without a segment (a restart), and
 *     READ_IO with the MAP of a write that was answered early (seg_harden()).
 *  2. A parked segment clashes with a held one or, if it is no revoke, with one before it in the
 *     queue.
 *  3. The queue is in order of arrival, behind those that were put at its head.
 *  4. Each kind has a treap (segment_treap.h). Grants are in a second one for their kind as well,
 *     where the holder comes first.
 *  5. `present` has a bit for every kind that has a treap: an inode without grants pays nothing for
 *     the kinds of grants.
 *
 * Whatever makes a segment smaller, weaker or go away (release, shrink, change, cancel, fail) goes
 * through the queue once, in order, and lets in what invariant 2 no longer holds back.
 */
#include "segment.h"

#include "device.h"
#include "segment_treap.h"

#define GRANT_KINDS (SEG_KINDS - SEG_FIRST_GRANT)

struct seg_tree {
	struct seg *root[SEG_KINDS];
	struct seg *of_holder[GRANT_KINDS];
	uint32_t present;
	struct seg *queue_head, *queue_tail;
	uint64_t arrivals, priorities;
	unsigned nowait;  /* parked ones that do not wait for holders */
	unsigned stalled; /* held ones whose operation waits elsewhere */
};

/* ---- the table ------------------------------------------------------------------------------ */

enum rule { NO, YES, HOLDER }; /* -, x, h of segment.h */

#define N NO
#define X YES
#define H HOLDER
static const uint8_t rules[SEG_FIRST_GRANT][SEG_KINDS] = {
	[SEG_READ_IO] =   { N, N, N, X, N, N, N, N, N, N, X, N, N, N },
	[SEG_WRITE_IO] =  { N, X, X, X, X, N, N, X, X, X, X, N, H, X },
	[SEG_WRITE_MAP] = { N, X, X, X, X, X, N, X, X, X, X, H, H, X },
	[SEG_MAP] =       { X, X, X, X, X, X, N, X, X, X, X, H, H, X },
	[SEG_SHARE] =     { N, X, X, X, X, N, N, X, X, N, X, N, H, N },
	[SEG_GET_READ] =  { N, N, X, X, N, N, N, N, X, N, X, N, N, N },
	[SEG_PENDING] =   { N, N, N, N, N, N, X, N, N, N, N, N, N, N },
	[SEG_GET_RW] =    { N, X, X, X, X, N, N, X, X, X, X, N, H, X },
	[SEG_GET_MAP] =   { N, X, X, X, X, X, N, X, X, X, X, H, H, X },
	[SEG_GET_PIN] =   { N, X, X, X, N, N, N, X, X, N, X, N, X, N },
	[SEG_SWAP] =      { X, X, X, X, X, X, N, X, X, X, X, H, H, X },
};
#undef N
#undef X
#undef H

/* The kinds that a kind has anything against: the rows above as bit masks. */
static const uint16_t foes_of[SEG_FIRST_GRANT] = {
	[SEG_READ_IO] = 0x0408, [SEG_WRITE_IO] = 0x379e, [SEG_WRITE_MAP] = 0x3fbe,
	[SEG_MAP] = 0x3fbf, [SEG_SHARE] = 0x159e, [SEG_GET_READ] = 0x050c,
	[SEG_PENDING] = 0x0040, [SEG_GET_RW] = 0x379e, [SEG_GET_MAP] = 0x3fbe,
	[SEG_GET_PIN] = 0x158e, [SEG_SWAP] = 0x3fbf,
};

/* Do parked revokes take all of [start, end) from the holder? */
static bool being_revoked(const struct seg_tree *st, uint64_t holder, uint64_t start, uint64_t end)
{
	while (start < end) {
		uint64_t reached = start;

		for (const struct seg *q = st->queue_head; q; q = q->queue_next)
			if (q->revokes && q->holder == holder && q->start <= start)
				reached = MAX(reached, q->end);
		if (reached == start)
			return false;
		start = reached;
	}
	return true;
}

/* Is the grant, where s overlaps it, about to go just as s wants to make others go? */
static bool both_revoked(const struct seg *s, const struct seg *grant)
{
	return s->revokes && grant->kind == SEG_GRANT_RW &&
	       being_revoked(s->in->segs, grant->holder, MAX(s->start, grant->start),
			     MIN(s->end, grant->end));
}

/* s is no grant. */
static bool clash(const struct seg *s, const struct seg *other)
{
	if (s->start >= other->end || other->start >= s->end || both_revoked(s, other))
		return false;
	switch ((enum rule)rules[s->kind][other->kind]) {
	case NO:
		return false;
	case HOLDER:
		return s->holder != other->holder;
	case YES:
		break;
	}
	return true;
}

/* ---- held and parked ------------------------------------------------------------------------ */

/* The first held segment of a kind that clashes with s, after `after`. */
static struct seg *foe_of_kind(const struct seg_tree *st, const struct seg *s, unsigned kind,
			       const struct seg *after)
{
	enum rule rule = rules[s->kind][kind];
	struct overlap_query q = { .by = BY_START, .start = s->start, .end = s->end,
				   .holder = rule == HOLDER ? s->holder : 0, .after = after };
	struct seg *found;

	while ((found = treap_overlap(st->root[kind], &q)) && s->revokes &&
	       !clash(s, found))
		q.after = found;
	return found;
}

static bool held_clashes(const struct seg_tree *st, const struct seg *s)
{
	for (uint32_t foes = foes_of[s->kind] & st->present; foes; foes &= foes - 1)
		if (foe_of_kind(st, s, (unsigned)__builtin_ctz(foes), NULL))
			return true;
	return false;
}

/* Does s clash with one of the parked segments from the head up to, not including, stop? What
 * others wait for must not wait for them: a revoke waits only for what is held, whoever got in
 * front of it since. */
static bool queue_clashes(const struct seg_tree *st, const struct seg *s, const struct seg *stop)
{
	if (s->revokes)
		return false;
	for (const struct seg *q = st->queue_head; q != stop; q = q->queue_next)
		if (clash(q, s))
			return true;
	return false;
}

static void put_in(struct seg_tree *st, struct seg *s)
{
	s->priority = (uint32_t)((++st->priorities * 0x9e3779b97f4a7c15u) >> 32);
	st->root[s->kind] = treap_insert(st->root[s->kind], s, BY_START);
	st->present |= 1u << s->kind;
	if (is_grant(s)) {
		struct seg **root = &st->of_holder[s->kind - SEG_FIRST_GRANT];

		*root = treap_insert(*root, s, BY_HOLDER);
	}
	s->state = SEG_HELD;
}

static void take_out(struct seg_tree *st, struct seg *s)
{
	st->root[s->kind] = treap_remove(st->root[s->kind], s, BY_START);
	if (!st->root[s->kind])
		st->present &= ~(1u << s->kind);
	if (is_grant(s)) {
		struct seg **root = &st->of_holder[s->kind - SEG_FIRST_GRANT];

		*root = treap_remove(*root, s, BY_HOLDER);
	}
	st->stalled -= s->stalled;
	s->stalled = false;
	s->state = SEG_IDLE;
}

static const struct seg_hooks *hooks_of(const struct inode *in)
{
	return in->fs ? in->fs->seg_hooks : NULL;
}

static void tell(struct inode *in, struct seg *waiter, struct seg *grant)
{
	waiter->recalled = waiter->state == SEG_PARKED;
	hooks_of(in)->recall(in, waiter, grant);
}

/* Every grant in the way of s. */
static void tell_grants(struct inode *in, struct seg *s)
{
	const struct seg_tree *st = in->segs;
	uint32_t foes = foes_of[s->kind] & st->present & ~((1u << SEG_FIRST_GRANT) - 1);

	if (!hooks_of(in))
		return;
	for (; foes; foes &= foes - 1) {
		unsigned kind = (unsigned)__builtin_ctz(foes);

		for (struct seg *g = NULL; (g = foe_of_kind(st, s, kind, g));)
			tell(in, s, g);
	}
}

/* A revoke has ended, or left the queue. Other revokes may be parked in a range where its holder
 * still has grants: those are in their way now, and nobody was told. */
static void tell_revokes(struct inode *in, const struct seg *ended)
{
	if (!ended->revokes || !hooks_of(in))
		return;
	for (struct seg *q = in->segs->queue_head; q; q = q->queue_next) {
		struct seg *g = NULL;

		if (!q->revokes || q->start >= ended->end || ended->start >= q->end)
			continue;
		while ((g = seg_next_grant_locked(in, 1u << SEG_GRANT_RW, ended->holder,
						  MAX(q->start, ended->start),
						  MIN(q->end, ended->end), g)))
			if (clash(q, g))
				tell(in, q, g);
	}
}

static void fail_nowait(struct inode *in);
static void wake_queue(struct inode *in, uint64_t start, uint64_t end);

static void park(struct inode *in, struct seg *s, bool front)
{
	struct seg_tree *st = in->segs;

	xassert(s->op);
	s->queue_prev = front ? NULL : st->queue_tail;
	s->queue_next = front ? st->queue_head : NULL;
	*(s->queue_prev ? &s->queue_prev->queue_next : &st->queue_head) = s;
	*(s->queue_next ? &s->queue_next->queue_prev : &st->queue_tail) = s;
	s->state = SEG_PARKED;
	st->nowait += s->nowait;
	tell_grants(in, s);
	if (s->recalled)
		fail_nowait(in);
	if (s->revokes) /* what its holder has is no longer in the way of other revokes */
		wake_queue(in, s->start, s->end);
}

static void unpark(struct inode *in, struct seg *s)
{
	struct seg_tree *st = in->segs;

	*(s->queue_prev ? &s->queue_prev->queue_next : &st->queue_head) = s->queue_next;
	*(s->queue_next ? &s->queue_next->queue_prev : &st->queue_tail) = s->queue_prev;
	s->queue_prev = s->queue_next = NULL;
	s->state = SEG_IDLE;
	st->nowait -= s->nowait;
	if (s->recalled)
		hooks_of(in)->unpark(in, s);
	s->recalled = false;
}

/* [start, end) has become freer: let in what only that held back. */
static void wake_queue(struct inode *in, uint64_t start, uint64_t end)
{
	struct seg_tree *st = in->segs;
	struct seg *next;

	for (struct seg *q = st->queue_head; q; q = next) {
		next = q->queue_next;
		if (q->start >= end || start >= q->end)
			continue;
		if (held_clashes(st, q) || queue_clashes(st, q, q))
			continue;
		unpark(in, q);
		put_in(st, q);
		/* From here on the segment belongs to the thread of its op. */
		ioctx_wake(q->op);
	}
}

/* ---- who does not wait ---------------------------------------------------------------------- */

static bool grant_clashes(const struct seg_tree *st, const struct seg *s)
{
	uint32_t foes = foes_of[s->kind] & st->present & ~((1u << SEG_FIRST_GRANT) - 1);

	for (; foes; foes &= foes - 1)
		if (foe_of_kind(st, s, (unsigned)__builtin_ctz(foes), NULL))
			return true;
	return false;
}

static bool stalled_clashes(const struct seg_tree *st, const struct seg *s)
{
	uint32_t foes = foes_of[s->kind] & st->present & ((1u << SEG_FIRST_GRANT) - 1);

	if (!st->stalled)
		return false;
	for (; foes; foes &= foes - 1) {
		unsigned kind = (unsigned)__builtin_ctz(foes);

		for (struct seg *h = NULL; (h = foe_of_kind(st, s, kind, h));)
			if (h->stalled)
				return true;
	}
	return false;
}

/* Would s, parked behind all of the queue up to `stop`, wait for a holder? Of one that it is
 * parked behind it is not asked what that one is parked behind: that anybody before it waits for
 * a holder is enough. */
static bool waits_for_holder(const struct seg_tree *st, const struct seg *s, const struct seg *stop)
{
	bool somebody = st->stalled > 0, behind = false;

	if (grant_clashes(st, s) || stalled_clashes(st, s))
		return true;
	for (const struct seg *q = st->queue_head; q != stop; q = q->queue_next) {
		somebody |= q->recalled;
		behind |= clash(q, s);
	}
	return somebody && behind;
}

/* Somebody who is held or parked has begun to wait for a holder: out of the queue with those who
 * would wait for him. The grants in their way stay recalled. */
static void fail_nowait(struct inode *in)
{
	struct seg_tree *st = in->segs;
	uint64_t low = UINT64_MAX, high = 0;
	struct seg *next;

	if (!st->nowait)
		return;
	for (struct seg *q = st->queue_head; q; q = next) {
		next = q->queue_next;
		if (!q->nowait || !waits_for_holder(st, q, q))
			continue;
		unpark(in, q);
		low = MIN(low, q->start);
		high = MAX(high, q->end);
		q->err = -EAGAIN;
		tell_grants(in, q);
		ioctx_wake(q->op);
	}
	if (low < high)
		wake_queue(in, low, high);
}

/* ---- segments of operations ----------------------------------------------------------------- */

void seg_init(struct seg *s, enum seg_kind kind, uint64_t start, uint64_t end, struct op *op)
{
	xassert(start < end);
	*s = (struct seg){ .start = start, .end = end, .kind = kind, .state = SEG_IDLE, .op = op };
}

static struct seg_tree *tree_of(struct inode *in)
{
	if (unlikely(!in->segs))
		in->segs = calloc(1, sizeof(*in->segs));
	return in->segs;
}

enum { AT_TAIL, AT_HEAD, TRY, TRY_RECALL };

static int acquire(struct inode *in, struct seg *s, unsigned how)
{
	struct seg_tree *st;
	int rc = 0;

	xassert(s->start < s->end && !is_grant(s));
	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_IDLE);
	st = tree_of(in);
	if (unlikely(!st)) {
		pthread_mutex_unlock(&in->lock);
		return -ENOMEM;
	}
	s->in = in;
	s->err = 0;
	s->recalled = false;
	s->order = ++st->arrivals;
	if (!held_clashes(st, s) && (how == AT_HEAD || !queue_clashes(st, s, NULL))) {
		put_in(st, s);
	} else if (how == TRY || how == TRY_RECALL) {
		if (how == TRY_RECALL)
			tell_grants(in, s);
		rc = -EAGAIN;
	} else if (s->nowait && waits_for_holder(st, s, NULL)) {
		tell_grants(in, s);
		rc = -EAGAIN;
	} else {
		park(in, s, how == AT_HEAD);
		rc = ERR_PARKED;
	}
	pthread_mutex_unlock(&in->lock);
	return rc;
}

int seg_acquire(struct inode *in, struct seg *s)
{
	return acquire(in, s, AT_TAIL);
}

int seg_acquire_front(struct inode *in, struct seg *s)
{
	return acquire(in, s, AT_HEAD);
}

int seg_try(struct inode *in, struct seg *s)
{
	return acquire(in, s, TRY);
}

int seg_try_recall(struct inode *in, struct seg *s)
{
	return acquire(in, s, TRY_RECALL);
}

int seg_change(struct inode *in, struct seg *s, enum seg_kind kind)
{
	uint64_t start = s->start, end = s->end;
	enum seg_kind old = s->kind;
	int rc = 0;

	xassert(!is_grant(s) && kind < SEG_FIRST_GRANT);
	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_HELD);
	take_out(in->segs, s);
	s->kind = kind;
	if (!held_clashes(in->segs, s)) {
		put_in(in->segs, s);
	} else if (s->nowait && waits_for_holder(in->segs, s, in->segs->queue_head)) {
		tell_grants(in, s);
		s->kind = old;
		put_in(in->segs, s);
		rc = -EAGAIN;
	} else {
		park(in, s, true);
		rc = ERR_PARKED;
	}
	wake_queue(in, start, end);
	pthread_mutex_unlock(&in->lock);
	return rc;
}

bool seg_harden(struct inode *in, struct seg *s, struct op *op)
{
	enum seg_kind old = s->kind;
	bool alone = true;

	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_HELD && !is_grant(s) && !s->stalled);
	take_out(in->segs, s);
	s->kind = SEG_MAP;
	for (uint32_t foes = foes_of[SEG_MAP] & in->segs->present & ~(1u << SEG_READ_IO);
	     foes && alone; foes &= foes - 1)
		alone = !foe_of_kind(in->segs, s, (unsigned)__builtin_ctz(foes), NULL);
	if (alone)
		s->op = op;
	else
		s->kind = old;
	put_in(in->segs, s);
	pthread_mutex_unlock(&in->lock);
	return alone;
}

void seg_release(struct inode *in, struct seg *s)
{
	pthread_mutex_lock(&in->lock);
	xassert(s->state == SEG_HELD && !is_grant(s));
	take_out(in->segs, s);
	tell_revokes(in, s);
	wake_queue(in, s->start, s->end);
	pthread_mutex_unlock(&in->lock);
}

void seg_stall(struct inode *in, struct seg *s, bool stalled)
{
	pthread_mutex_lock(&in->lock);
	if (s->state == SEG_HELD && s->stalled != stalled) {
		s->stalled = stalled;
		if (stalled)
			in->segs->stalled++;
		else
			in->segs->stalled--;
		if (stalled)
			fail_nowait(in);
	}
	pthread_mutex_unlock(&in->lock);
}

static void shrink(struct inode *in, struct seg *s, uint64_t start, uint64_t end)
{
	uint64_t old_start = s->start, old_end = s->end;

	xassert(s->state == SEG_HELD);
	xassert(s->start <= start && start < end && end <= s->end);
	take_out(in->segs, s);
	s->start = start;
	s->end = end;
	put_in(in->segs, s);
	wake_queue(in, old_start, old_end);
}

void seg_shrink(struct inode *in, struct seg *s, uint64_t start, uint64_t end)
{
	pthread_mutex_lock(&in->lock);
	xassert(!is_grant(s) && !s->revokes);
	shrink(in, s, start, end);
	pthread_mutex_unlock(&in->lock);
}

bool seg_cancel(struct inode *in, struct seg *s)
{
	bool parked;

	pthread_mutex_lock(&in->lock);
	parked = s->state == SEG_PARKED;
	if (parked) {
		unpark(in, s);
		tell_revokes(in, s);
		wake_queue(in, s->start, s->end);
	}
	pthread_mutex_unlock(&in->lock);
	return parked;
}

/* Is a grant of holder in [start, end) in the way of s? */
static bool blocked_by(struct inode *in, const struct seg *s, uint64_t holder, uint64_t start,
		       uint64_t end)
{
	unsigned kinds = 0;

	for (unsigned k = SEG_FIRST_GRANT; k < SEG_KINDS; k++)
		if (rules[s->kind][k] == YES ||
		    (rules[s->kind][k] == HOLDER && s->holder != holder))
			kinds |= 1u << k;
	start = MAX(start, s->start);
	end = MIN(end, s->end);
	return start < end && seg_next_grant_locked(in, kinds, holder, start, end, NULL);
}

unsigned seg_fail(struct inode *in, uint64_t holder, uint64_t start, uint64_t end, int err)
{
	uint64_t low = UINT64_MAX, high = 0;
	unsigned failed = 0;
	struct seg *next;

	xassert(holder && err < 0);
	pthread_mutex_lock(&in->lock);
	for (struct seg *q = in->segs ? in->segs->queue_head : NULL; q; q = next) {
		next = q->queue_next;
		if (!blocked_by(in, q, holder, start, end))
			continue;
		low = MIN(low, q->start);
		high = MAX(high, q->end);
		failed++;
		unpark(in, q);
		tell_revokes(in, q);
		q->err = err;
		ioctx_wake(q->op);
	}
	if (failed)
		wake_queue(in, low, high);
	pthread_mutex_unlock(&in->lock);
	return failed;
}

bool seg_clashes(const struct seg *s, const struct seg *other)
{
	return clash(s, other);
}

unsigned seg_parked_io(struct inode *in, uint64_t start, uint64_t end, struct seg_span *out,
		       unsigned n)
{
	const uint32_t kinds = 1u << SEG_READ_IO | 1u << SEG_WRITE_IO | 1u << SEG_WRITE_MAP;
	unsigned found = 0;

	pthread_mutex_lock(&in->lock);
	for (const struct seg *q = in->segs ? in->segs->queue_head : NULL; q; q = q->queue_next) {
		if (!(kinds & 1u << q->kind) || q->end <= start || end <= q->start)
			continue;
		if (found < n)
			out[found] = (struct seg_span){ q->start, q->end };
		found++;
	}
	pthread_mutex_unlock(&in->lock);
	return found;
}

bool seg_any(struct inode *in)
{
	bool any;

	pthread_mutex_lock(&in->lock);
	any = in->segs && (in->segs->present || in->segs->queue_head);
	pthread_mutex_unlock(&in->lock);
	return any;
}

void seg_tree_free(struct inode *in)
{
	if (!in->segs)
		return;
	xassert(!in->segs->present && !in->segs->queue_head);
	free(in->segs);
	in->segs = NULL;
}

/* ---- grants --------------------------------------------------------------------------------- */

int seg_grant_locked(struct inode *in, struct seg *s, struct seg *grant)
{
	struct seg_tree *st = tree_of(in);

	xassert(is_grant(grant) && grant->holder && grant->state == SEG_IDLE);
	xassert(grant->start < grant->end);
	if (!st)
		return -ENOMEM;
	grant->op = NULL;
	grant->in = in;
	if (!grant->order)
		grant->order = ++st->arrivals;
	if (!s) {
		put_in(st, grant);
		return 0;
	}
	xassert(s->state == SEG_HELD && !is_grant(s));
	xassert(s->start <= grant->start && grant->end <= s->end);
	take_out(st, s);
	put_in(st, grant);
	if (hooks_of(in))
		for (struct seg *q = st->queue_head; q; q = q->queue_next)
			if (clash(q, grant))
				tell(in, q, grant);
	fail_nowait(in);
	wake_queue(in, s->start, s->end);
	return 0;
}

void seg_ungrant_locked(struct inode *in, struct seg *grant)
{
	xassert(is_grant(grant) && grant->state == SEG_HELD);
	take_out(in->segs, grant);
	wake_queue(in, grant->start, grant->end);
}

void seg_shrink_locked(struct inode *in, struct seg *grant, uint64_t start, uint64_t end)
{
	xassert(is_grant(grant));
	shrink(in, grant, start, end);
}

struct seg *seg_next_grant_locked(struct inode *in, unsigned kinds, uint64_t holder, uint64_t start,
				  uint64_t end, struct seg *prev)
{
	struct overlap_query q = { .by = holder ? BY_HOLDER : BY_START, .start = start, .end = end,
				   .holder = holder, .after = prev };
	struct seg *first = NULL;

	xassert(!(kinds & ((1u << SEG_FIRST_GRANT) - 1)));
	if (!in->segs)
		return NULL;
	for (kinds &= in->segs->present; kinds; kinds &= kinds - 1) {
		unsigned k = (unsigned)__builtin_ctz(kinds);
		struct seg *found = treap_overlap(holder ? in->segs->of_holder[k - SEG_FIRST_GRANT] :
						  in->segs->root[k], &q);

		if (found && (!first || seg_before(found, first, BY_START)))
			first = found;
	}
	return first;
}

bool seg_covered_locked(struct inode *in, uint64_t holder, uint64_t start, uint64_t end,
			uint64_t *newest)
{
	struct seg *g = NULL;

	*newest = 0;
	while (start < end) {
		g = seg_next_grant_locked(in, 1u << SEG_GRANT_RW, holder, start, end, g);
		if (!g || g->start > start)
			return false;
		*newest = MAX(*newest, g->order);
		start = MAX(start, g->end);
	}
	return true;
}
