/* SPDX-License-Identifier: MIT
 *
 * layout_due.c - what the thread does when the time that a holder had is over.
 *
 * Definitions (the others in layout_recall.c).
 *   want  what is taken from a holder: a range that is revoked, or a PIN that ends.
 *
 * Invariants.
 *  1. A LIVE holder loses a range only if it was recalled at least recall_ns before, and since it
 *     last became LIVE; a LOST one at once; from a GONE one nothing is taken: its grants are being
 *     dropped.
 *  2. A range is never revoked twice at a time (layouts->revokes).
 *  3. A waiter that was looked at is looked at again after recall_ns, should it still be there.
 *
 * Locks: what is to be taken is decided under inode->lock and layouts->mutex, and taken with
 * neither.
 */
#include "journal.h"
#include "layout_priv.h"
#include "log.h"

/* Revokes under way at most: each copies blocks through memory. One that is parked does not, and
 * may wait for a grant that only another revoke takes: those must find a place, or none goes on. */
#define REVOKES_MAX 16u
/* Taken from holders in one look at an inode. */
#define WANTS_MAX 16u

struct want {
	uint64_t holder, start, end, seq;
	bool pin, live;
};

/* ---- what is to be taken -------------------------------------------------------------------- */

static bool being_revoked(struct layouts *ls, inum_t ino, const struct want *want)
{
	struct revoking *r;

	TAILQ_FOREACH(r, &ls->revokes, link)
		if (r->ino == ino && r->holder == want->holder && r->start <= want->start &&
		    want->end <= r->end)
			return true;
	return false;
}

/* A PIN that ends is told once. */
static bool expire(struct layouts *ls, struct grant *g)
{
	struct layout_event ev = grant_event(g, EVENT_PIN_EXPIRED, g->seg.start, g->seg.end);

	if (g->flags & GRANT_F_EXPIRED)
		return false;
	g->flags |= GRANT_F_EXPIRED;
	atomic_fetch_add_explicit(&ls->counters.pins_expired, 1, memory_order_relaxed);
	event_post(ls, g->holder->sink, &ev);
	return true;
}

/* Both locks held. False: there is no room for more wants. */
static bool add_want(struct layouts *ls, struct grant *g, uint64_t start, uint64_t end,
		     struct want *wants, unsigned *n)
{
	struct want want = { .holder = g->holder->id, .seq = g->seq,
			     .pin = g->seg.kind == SEG_GRANT_PIN,
			     .live = g->holder->state == HOLDER_LIVE };

	if (*n == WANTS_MAX)
		return false;
	grant_meant(g, &start, &end);
	want.start = want.pin ? g->seg.start : start;
	want.end = want.pin ? g->seg.end : end;
	if (want.pin ? expire(ls, g) : !being_revoked(ls, g->in->ino, &want))
		wants[(*n)++] = want;
	return true;
}

/* It came into being, or its holder back to life, after what was recalled for the waiter. */
static bool never_asked(const struct layouts *ls, const struct seg *w, const struct grant *g)
{
	return g->holder->state == HOLDER_LIVE &&
	       (g->seq > w->recall_seq || g->holder->live_since + ls->recall_ns > w->due_at);
}

/* A waiter whose deadline has come: what is to be taken for it, and when to look again. */
static unsigned wants_of_waiter(struct layouts *ls, struct seg *w, uint64_t now,
				struct want *wants)
{
	uint64_t next = now + ls->recall_ns;
	struct seg *s = NULL;
	unsigned n = 0;

	while ((s = seg_next_grant_locked(w->in, ALL_GRANTS, 0, w->start, w->end, s))) {
		struct grant *g = GRANT_OF(s);

		if (!seg_clashes(w, s) || g->holder->state == HOLDER_GONE)
			continue;
		if (never_asked(ls, w, g))
			recall_for(ls, w, g);
		if (g->holder->state == HOLDER_LIVE && w->due_at > now) {
			next = MIN(next, w->due_at);
		} else if (!add_want(ls, g, w->start, w->end, wants, &n)) {
			next = now;
			break;
		}
	}
	due_remove(ls, w);
	due_insert(ls, w, next);
	return n;
}

static unsigned wants_of_timed(struct layouts *ls, struct inode *in, struct timed *tm, uint64_t now,
			       struct want *wants, bool *more)
{
	struct seg *s = NULL;
	unsigned n = 0;

	*more = false;
	while ((s = seg_next_grant_locked(in, tm->kinds, tm->holder, tm->start, tm->end, s))) {
		struct grant *g = GRANT_OF(s);

		if (g->seq > tm->recall_seq || g->holder->state == HOLDER_GONE)
			continue;
		if (tm->pin && g->until > now)
			continue;
		/* Came back meanwhile: it has not been asked. */
		if (!tm->pin && g->recalled_at < g->holder->live_since)
			continue;
		if (!add_want(ls, g, tm->start, tm->end, wants, &n)) {
			*more = true;
			break;
		}
		g->flags &= ~GRANT_F_STANDING;
	}
	return n;
}

/* ---- taking ---------------------------------------------------------------------------------- */

struct pin_end {
	struct file_op fop;
	struct layout_args args;
};

static void pin_ended(struct file_op *fop)
{
	struct pin_end *pe = container_of(fop, struct pin_end, fop);
	struct layouts *ls = fop->in->fs->layouts;

	if (fop->result < 0 && !fs_is_shutdown(fop->in->fs))
		log_msg(LOG_WARN, "inode %llu: a pin that has ended could not be dropped: %s",
			(unsigned long long)fop->in->ino, err_text((int)fop->result));
	inode_put(fop->in);
	free(pe);
	layouts_ran(ls);
}

/* The end of a PIN is a return that the holder did not have to make. */
static void end_pin(struct layouts *ls, struct inode *in, const struct want *want)
{
	struct pin_end *pe = calloc(1, sizeof(*pe));

	if (!pe) {
		log_msg(LOG_WARN, "inode %llu: no memory to drop a pin that has ended",
			(unsigned long long)in->ino);
		return;
	}
	file_op_init(&pe->fop, FILE_LAYOUT_RETURN, inode_ref(in), ls->ctx);
	pe->args = (struct layout_args){ .holder = want->holder, .iomode = IOMODE_PIN,
					 .flags = LAYOUT_F_LAZY, .offset = want->start,
					 .length = want->end - want->start, .seq = want->seq };
	pe->fop.layout = &pe->args;
	pe->fop.done = pin_ended;
	layouts_run(ls, &pe->fop);
}

static void revoke(struct layouts *ls, struct inode *in, const struct want *want)
{
	struct revoking *r = malloc(sizeof(*r));

	if (!r) {
		seg_fail(in, want->holder, want->start, want->end, -ENOMEM);
		return;
	}
	*r = (struct revoking){ .ino = in->ino, .holder = want->holder, .start = want->start,
				.end = want->end };
	TAILQ_INSERT_TAIL(&ls->revokes, r, link);
	ls->nrevokes++;
	revoke_start(ls, inode_ref(in), want->holder, want->start, want->end);
}

/* No lock held. */
static void take(struct layouts *ls, struct inode *in, const struct want *wants, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		const struct want *want = &wants[i];

		if (fs_is_shutdown(ls->fs)) {
			seg_fail(in, want->holder, want->start, want->end, -ERR_SHUTDOWN);
		} else if (want->pin) {
			end_pin(ls, in, want);
		} else {
			if (want->live)
				holder_missed(ls->fs, want->holder);
			revoke(ls, in, want);
		}
	}
}

/* The first waiter of the inode that is due; what was at the head may have left since. Both locks
 * held. */
static struct seg *due_of(struct layouts *ls, const struct inode *in, uint64_t now)
{
	struct seg *w = ls->due_head;

	while (w && w->deadline <= now && w->in != in)
		w = w->due_next;
	return w && w->deadline <= now ? w : NULL;
}

/* False: no waiter is due. */
static bool serve_waiter(struct layouts *ls, uint64_t now)
{
	struct want wants[WANTS_MAX];
	struct inode *in = NULL;
	struct seg *w;
	unsigned n = 0;

	pthread_mutex_lock(&ls->mutex);
	w = ls->due_head;
	if (w && w->deadline <= now)
		in = inode_ref(w->in); /* invariant 1 */
	pthread_mutex_unlock(&ls->mutex);
	if (!in)
		return false;
	pthread_mutex_lock(&in->lock);
	pthread_mutex_lock(&ls->mutex);
	w = due_of(ls, in, now);
	if (w)
		n = wants_of_waiter(ls, w, now, wants);
	pthread_mutex_unlock(&ls->mutex);
	pthread_mutex_unlock(&in->lock);
	take(ls, in, wants, n);
	inode_put(in);
	return true;
}

static struct timed *timed_take(struct layouts *ls, uint64_t now)
{
	struct timed *tm;

	pthread_mutex_lock(&ls->mutex);
	tm = RB_MIN(timed_tree, &ls->timed);
	if (tm && tm->deadline <= now)
		RB_REMOVE(timed_tree, &ls->timed, tm);
	else
		tm = NULL;
	pthread_mutex_unlock(&ls->mutex);
	return tm;
}

static bool serve_timed(struct layouts *ls, uint64_t now)
{
	struct timed *tm = timed_take(ls, now);
	struct want wants[WANTS_MAX];
	struct inode *in;
	bool more = false;
	unsigned n;
	int rc;

	if (!tm)
		return false;
	fs_rdlock(ls->fs);
	rc = inode_get(ls->fs, tm->ino, &in);
	fs_unlock(ls->fs);
	if (!rc) {
		pthread_mutex_lock(&in->lock);
		pthread_mutex_lock(&ls->mutex);
		n = wants_of_timed(ls, in, tm, now, wants, &more);
		if (more)
			timed_insert(ls, tm);
		pthread_mutex_unlock(&ls->mutex);
		pthread_mutex_unlock(&in->lock);
		take(ls, in, wants, n);
		inode_put(in);
	}
	if (!more)
		free(tm);
	return true;
}

static bool may_revoke(const struct layouts *ls)
{
	return ls->nrevokes - ls->nparked < REVOKES_MAX;
}

uint64_t recalls_due(struct layouts *ls, uint64_t now)
{
	uint64_t next = UINT64_MAX;
	struct timed *tm;

	while (may_revoke(ls) && (serve_waiter(ls, now) || serve_timed(ls, now)))
		;
	if (!may_revoke(ls))
		return UINT64_MAX; /* the end of one is when to look */
	pthread_mutex_lock(&ls->mutex);
	if (ls->due_head)
		next = ls->due_head->deadline;
	tm = RB_MIN(timed_tree, &ls->timed);
	if (tm)
		next = MIN(next, tm->deadline);
	pthread_mutex_unlock(&ls->mutex);
	return next;
}

/* ---- the end -------------------------------------------------------------------------------- */

/* Both locks held. Grants in the way of w. */
static unsigned foes_of(struct seg *w, struct want *wants)
{
	struct seg *s = NULL;
	unsigned n = 0;

	while (n < WANTS_MAX &&
	       (s = seg_next_grant_locked(w->in, ALL_GRANTS, 0, w->start, w->end, s)))
		if (seg_clashes(w, s))
			wants[n++] = (struct want){ .holder = s->holder, .start = s->start,
						    .end = s->end };
	return n;
}

bool recalls_fail_waiters(struct layouts *ls)
{
	bool any = false;

	for (;;) {
		struct want wants[WANTS_MAX];
		struct inode *in = NULL;
		struct seg *w;
		unsigned n = 0;

		pthread_mutex_lock(&ls->mutex);
		if (ls->due_head)
			in = inode_ref(ls->due_head->in);
		pthread_mutex_unlock(&ls->mutex);
		if (!in)
			return any;
		any = true;
		pthread_mutex_lock(&in->lock);
		pthread_mutex_lock(&ls->mutex);
		w = due_of(ls, in, UINT64_MAX);
		if (w)
			n = foes_of(w, wants);
		if (w && !n)
			due_remove(ls, w); /* behind another waiter only, which leaves, too */
		pthread_mutex_unlock(&ls->mutex);
		pthread_mutex_unlock(&in->lock);
		for (unsigned i = 0; i < n; i++)
			seg_fail(in, wants[i].holder, wants[i].start, wants[i].end, -EIO);
		inode_put(in);
	}
}
