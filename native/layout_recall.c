/* SPDX-License-Identifier: MIT
 *
 * layout_recall.c - asking holders for ranges, and keeping in mind until when. What happens then is
 * in layout_due.c.
 *
 * Definitions.
 *   recall    an event RECALL to the holder of a grant, for the part of it that somebody wants (the
 *             whole of an ATOMIC one); remembered in the grant until it is answered.
 *   waiter    a parked segment with at least one grant in its way. On the due list in order of
 *             deadline: when the thread has to look at it next. due_at: when all has to be returned
 *             that was recalled for it; recall_seq: the newest grant of those.
 *   timed     the same for what nobody waits for: a recall that was asked for, the end of a PIN.
 *
 * Invariants.
 *  1. A waiter is on the due list from its first recall to its leaving the queue of its inode; its
 *     inode is referenced that long. deadline is 0 for all other segments.
 *  2. A LIVE holder loses a range only if it was recalled at least recall_ns before, and since the
 *     holder last became LIVE; a LOST one at once; from a GONE one nothing is taken: its grants are
 *     being dropped.
 *  3. GRANT_F_STANDING: a timed entry covers the recalled range of the grant, so that asking over
 *     and over again adds none.
 *
 * Locks: the due list, the timed tree and recalled_* of grants are under layouts->mutex (recalled_*
 * under inode->lock as well).
 */
#include <string.h>

#include "delegation_priv.h"
#include "journal.h"
#include "layout_priv.h"
#include "log.h"

static int by_deadline(const struct timed *a, const struct timed *b)
{
	if (a->deadline != b->deadline)
		return a->deadline < b->deadline ? -1 : 1;
	return a->serial < b->serial ? -1 : a->serial > b->serial;
}

RB_GENERATE(timed_tree, timed, node, by_deadline)

/* ---- the due list: mutex held --------------------------------------------------------------- */

static bool is_own(const struct layouts *ls, const struct seg *w)
{
	return w->op && w->op->ctx == ls->ctx;
}

void due_remove(struct layouts *ls, struct seg *w)
{
	*(w->due_prev ? &w->due_prev->due_next : &ls->due_head) = w->due_next;
	*(w->due_next ? &w->due_next->due_prev : &ls->due_tail) = w->due_prev;
	w->due_prev = w->due_next = NULL;
	w->deadline = 0;
	ls->due_own -= is_own(ls, w);
}

/* recall_ms is the same for all, so nearly always this is the end of the list. */
void due_insert(struct layouts *ls, struct seg *w, uint64_t deadline)
{
	struct seg *after = ls->due_tail;

	while (after && after->deadline > deadline)
		after = after->due_prev;
	w->deadline = deadline;
	w->due_prev = after;
	w->due_next = after ? after->due_next : ls->due_head;
	*(after ? &after->due_next : &ls->due_head) = w;
	*(w->due_next ? &w->due_next->due_prev : &ls->due_tail) = w;
	ls->due_own += is_own(ls, w);
}

/* Who was to have time has none any more: all waiters are looked at now. */
void recalls_hurry(struct layouts *ls)
{
	uint64_t now = layouts_now(ls->fs);

	for (struct seg *w = ls->due_head; w; w = w->due_next)
		w->deadline = MIN(w->deadline, now);
	if (ls->due_head)
		layouts_kick(ls);
}

/* ---- timed: mutex held ---------------------------------------------------------------------- */

void timed_insert(struct layouts *ls, struct timed *tm)
{
	tm->serial = ++ls->timed_serial;
	RB_INSERT(timed_tree, &ls->timed, tm);
	if (RB_MIN(timed_tree, &ls->timed) == tm)
		layouts_kick(ls);
}

int pin_timer(struct layouts *ls, inum_t ino, uint64_t holder, uint64_t until)
{
	struct timed *tm = malloc(sizeof(*tm));

	if (!tm)
		return -ENOMEM;
	*tm = (struct timed){ .deadline = until, .ino = ino, .holder = holder, .pin = true,
			      .kinds = 1u << SEG_GRANT_PIN, .end = UINT64_MAX,
			      .recall_seq = UINT64_MAX };
	pthread_mutex_lock(&ls->mutex);
	timed_insert(ls, tm);
	pthread_mutex_unlock(&ls->mutex);
	return 0;
}

/* ---- recalls: inode->lock and mutex held ---------------------------------------------------- */

enum cause { CAUSE_WRITE, CAUSE_MAP, CAUSE_SHARE, CAUSE_GET, CAUSE_ASKED, CAUSE_UNLINK };

static void count(struct layouts *ls, enum cause cause)
{
	struct layout_counters *c = &ls->counters;
	_Atomic uint64_t *const of[] = {
		[CAUSE_WRITE] = &c->recalls_write, [CAUSE_MAP] = &c->recalls_map,
		[CAUSE_SHARE] = &c->recalls_share, [CAUSE_GET] = &c->recalls_get,
		[CAUSE_ASKED] = &c->recalls_asked, [CAUSE_UNLINK] = &c->recalls_unlink,
	};

	atomic_fetch_add_explicit(&c->recalls, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(of[cause], 1, memory_order_relaxed);
}

static enum cause cause_of(enum seg_kind kind)
{
	switch (kind) {
	case SEG_WRITE_IO:
		return CAUSE_WRITE;
	case SEG_SHARE:
		return CAUSE_SHARE;
	case SEG_GET_READ:
	case SEG_PENDING:
	case SEG_GET_RW:
	case SEG_GET_MAP:
	case SEG_GET_PIN:
		return CAUSE_GET;
	default:
		return CAUSE_MAP;
	}
}

static enum layout_iomode iomode_of(const struct grant *g)
{
	return g->seg.kind == SEG_GRANT_READ ? IOMODE_READ :
	       g->seg.kind == SEG_GRANT_RW ? IOMODE_RW : IOMODE_PIN;
}

/* The part of the grant that [start, end) means. */
void grant_meant(const struct grant *g, uint64_t *start, uint64_t *end)
{
	bool whole = g->flags & LAYOUT_F_ATOMIC;

	*start = whole ? g->seg.start : MAX(*start, g->seg.start);
	*end = whole ? g->seg.end : MIN(*end, g->seg.end);
}

struct layout_event grant_event(const struct grant *g, enum layout_event_type type,
				    uint64_t start, uint64_t end)
{
	return (struct layout_event){
		.type = type, .holder = g->holder->id, .ino = g->in->ino,
		.generation = g->in->core.generation, .iomode = iomode_of(g), .offset = start,
		.length = end == UINT64_MAX ? UINT64_MAX : end - start, .grant_seq = g->seq,
	};
}

static bool was_recalled(const struct grant *g, uint64_t start, uint64_t end)
{
	return g->recalled_at && g->recalled_at >= g->holder->live_since &&
	       g->recalled_start <= start && end <= g->recalled_end;
}

static void remember(struct grant *g, uint64_t start, uint64_t end, uint64_t now)
{
	bool joins = g->recalled_at && g->recalled_at >= g->holder->live_since &&
		     start <= g->recalled_end && g->recalled_start <= end;

	g->recalled_start = joins ? MIN(start, g->recalled_start) : start;
	g->recalled_end = joins ? MAX(end, g->recalled_end) : end;
	g->recalled_at = now;
	g->flags &= ~GRANT_F_STANDING;
}

/* Have [start, end) of a grant returned. When that has to have happened; UINT64_MAX: it happens by
 * itself. */
static uint64_t recall(struct layouts *ls, struct grant *g, uint64_t start, uint64_t end,
		       enum cause cause)
{
	uint64_t now = layouts_now(ls->fs);
	struct holder *h = g->holder;
	struct layout_event ev;

	grant_meant(g, &start, &end);
	if (h->state == HOLDER_GONE)
		return UINT64_MAX;
	if (was_recalled(g, start, end))
		return h->state == HOLDER_LOST ? now : g->recalled_at + ls->recall_ns;
	remember(g, start, end, now);
	if (h->state == HOLDER_LOST)
		return now;
	count(ls, cause);
	h->recalls++;
	ev = grant_event(g, EVENT_RECALL, start, end);
	ev.left_ms = ls->recall_ns / 1000000;
	event_post(ls, h->sink, &ev);
	return now + ls->recall_ns;
}

/* The same with nobody waiting. */
static int recall_standing(struct layouts *ls, struct grant *g, uint64_t start, uint64_t end,
			   enum cause cause)
{
	uint64_t deadline = recall(ls, g, start, end, cause);
	struct timed *tm;

	if (deadline == UINT64_MAX || (g->flags & GRANT_F_STANDING))
		return 0;
	tm = malloc(sizeof(*tm));
	if (!tm)
		return -ENOMEM;
	*tm = (struct timed){ .deadline = deadline, .ino = g->in->ino, .holder = g->holder->id,
			      .kinds = 1u << g->seg.kind, .start = g->recalled_start,
			      .end = g->recalled_end, .recall_seq = g->seq };
	g->flags |= GRANT_F_STANDING;
	timed_insert(ls, tm);
	return 0;
}

/* For a parked waiter; both locks held. Until when; a grant that goes by itself counts like one
 * that was recalled. */
uint64_t recall_for(struct layouts *ls, struct seg *w, struct grant *g)
{
	uint64_t deadline = recall(ls, g, w->start, w->end, cause_of(w->kind));

	if (deadline == UINT64_MAX)
		return layouts_now(ls->fs) + ls->recall_ns;
	if (g->holder->state == HOLDER_LIVE) {
		w->recall_seq = MAX(w->recall_seq, g->seq);
		w->due_at = MAX(w->due_at, deadline);
	}
	return deadline;
}

void recall_answered(struct layouts *ls, struct grant *g, uint64_t start, uint64_t end)
{
	if (!g->recalled_at || end <= g->recalled_start || g->recalled_end <= start)
		return;
	if (start <= g->recalled_start && g->recalled_end <= end) {
		uint64_t now = layouts_now(ls->fs);

		if (g->holder->state == HOLDER_LIVE && !(g->flags & GRANT_F_EXPIRED)) {
			atomic_fetch_add_explicit(&ls->counters.recalls_answered, 1,
						  memory_order_relaxed);
			layouts_note_latency(ls->fs, LATENCY_RECALL, now - g->recalled_at);
		}
		g->recalled_at = 0;
	} else if (start <= g->recalled_start) {
		g->recalled_start = end;
	} else if (g->recalled_end <= end) {
		g->recalled_end = start;
	}
}

/* ---- hooks of the segments: inode->lock held ------------------------------------------------ */

static void hook_recall(struct inode *in, struct seg *waiter, struct seg *grant)
{
	struct layouts *ls = in->fs->layouts;
	struct grant *g = GRANT_OF(grant);
	uint64_t deadline;

	pthread_mutex_lock(&ls->mutex);
	if (waiter->state != SEG_PARKED) {
		/* Without memory it is asked again when the caller comes again. */
		(void)recall_standing(ls, g, waiter->start, waiter->end,
				      cause_of(waiter->kind));
	} else {
		deadline = recall_for(ls, waiter, g);
		if (waiter->deadline && waiter->deadline > deadline)
			due_remove(ls, waiter);
		if (!waiter->deadline)
			due_insert(ls, waiter, deadline);
		if (ls->due_head == waiter || ls->stop)
			layouts_kick(ls);
	}
	pthread_mutex_unlock(&ls->mutex);
}

static void hook_unpark(struct inode *in, struct seg *waiter)
{
	struct layouts *ls = in->fs->layouts;

	pthread_mutex_lock(&ls->mutex);
	if (waiter->deadline)
		due_remove(ls, waiter);
	waiter->recall_seq = waiter->due_at = 0;
	pthread_mutex_unlock(&ls->mutex);
}

const struct seg_hooks layout_hooks = { .recall = hook_recall, .unpark = hook_unpark };

/* ---- asked for ------------------------------------------------------------------------------ */

static int recall_range(struct inode *in, unsigned kinds, uint64_t holder, uint64_t start,
			uint64_t end, enum cause cause)
{
	struct layouts *ls = in->fs->layouts;
	struct seg *s = NULL;
	int rc = 0;

	pthread_mutex_lock(&in->lock);
	while (!rc && (s = seg_next_grant_locked(in, kinds, holder, start, end, s))) {
		pthread_mutex_lock(&ls->mutex);
		rc = recall_standing(ls, GRANT_OF(s), start, end, cause);
		pthread_mutex_unlock(&ls->mutex);
	}
	pthread_mutex_unlock(&in->lock);
	return rc;
}

int layout_recall(struct inode *in, uint64_t holder, enum layout_iomode iomode, uint64_t offset,
		  uint64_t length)
{
	static const unsigned kinds[] = {
		[IOMODE_READ] = 1u << SEG_GRANT_READ, [IOMODE_RW] = 1u << SEG_GRANT_RW,
		[IOMODE_ANY] = ALL_GRANTS, [IOMODE_PIN] = 1u << SEG_GRANT_PIN,
	};
	uint64_t end = length > UINT64_MAX - offset ? UINT64_MAX : offset + length;

	if (in->fs->read_only)
		return -EROFS;
	if (fs_is_shutdown(in->fs))
		return -ERR_SHUTDOWN;
	if (iomode < IOMODE_READ || iomode > IOMODE_PIN || end <= offset)
		return -EINVAL;
	return recall_range(in, kinds[iomode], holder, offset, end, CAUSE_ASKED);
}

void layout_unlinked(struct inode *in)
{
	int rc;

	if (!in->fs->seg_hooks)
		return;
	watches_drop_inode(in);
	rc = recall_range(in, ALL_GRANTS, 0, 0, UINT64_MAX, CAUSE_UNLINK);
	if (rc)
		log_msg(LOG_WARN, "inode %llu: its holders could not all be asked for it: %s",
			(unsigned long long)in->ino, err_text(rc));
}

/* Times long ago become 1: before everything that is to come, and not `never`. */
static uint64_t shift(uint64_t at, uint64_t from, uint64_t to)
{
	if (!at || at == UINT64_MAX)
		return at;
	if (at >= from)
		return at - from > UINT64_MAX - 1 - to ? UINT64_MAX - 1 : to + (at - from);
	return from - at < to ? to - (from - at) : 1;
}

static void shift_grants(struct holder *h, uint64_t from, uint64_t to)
{
	struct grant *g;

	TAILQ_FOREACH(g, &h->grants, of_holder) {
		g->until = shift(g->until, from, to);
		g->recalled_at = shift(g->recalled_at, from, to);
	}
}

void recalls_shift(struct layouts *ls, uint64_t from, uint64_t to)
{
	struct timed *tm;
	struct holder *h;

	for (struct seg *w = ls->due_head; w; w = w->due_next) {
		w->deadline = shift(w->deadline, from, to);
		w->due_at = shift(w->due_at, from, to);
	}
	RB_FOREACH(tm, timed_tree, &ls->timed) /* in the same order as before */
		tm->deadline = shift(tm->deadline, from, to);
	RB_FOREACH(h, holder_tree, &ls->holders) {
		h->live_since = shift(h->live_since, from, to);
		shift_grants(h, from, to);
	}
	delegations_shift(ls, shift, from, to);
	ls->idle_at = shift(ls->idle_at, from, to);
}

/* What is earlier stays: order is kept. */
static uint64_t later(uint64_t at, uint64_t from, uint64_t to)
{
	return at < from || at > UINT64_MAX - 1 - (to - from) ? at : at + (to - from);
}

void recalls_postpone(struct layouts *ls, uint64_t from, uint64_t to)
{
	struct timed *tm;

	xassert(from && from <= to);
	for (struct seg *w = ls->due_head; w; w = w->due_next) {
		w->deadline = later(w->deadline, from, to);
		w->due_at = later(w->due_at, from, to);
	}
	RB_FOREACH(tm, timed_tree, &ls->timed)
		tm->deadline = later(tm->deadline, from, to);
	delegations_shift(ls, later, from, to);
}

void recalls_destroy(struct layouts *ls)
{
	struct timed *tm;

	while ((tm = RB_MIN(timed_tree, &ls->timed))) {
		RB_REMOVE(timed_tree, &ls->timed, tm);
		free(tm);
	}
}
