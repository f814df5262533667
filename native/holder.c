/* SPDX-License-Identifier: MIT
 *
 * holder.c - holders: how they come, are lost and go. Their records are in holder_disk.c.
 *
 * A holder's record in TREE_HOLDER is made before its first grant and removed when nothing is left
 * that it could reach. Numbers come from the root block and are never used again.
 *
 *     LIVE --missed, ended--> LOST --resumed, returned all; not once its fence is decided--> LIVE
 *     LIVE, LOST --holder_gone()--> record removed
 *     LOST --holder_fenced(); ended with nothing held--> GONE --release--> record removed
 *
 * Invariants, under layouts->mutex:
 *  1. An object is in the tree from the commit of its record to the commit that removes it. Pointers
 *     to it are good as long as the mutex is held, one of its grants exists, or a user is counted
 *     (holder_enter()). GONE ones get no users and no grants, except by users of before.
 *  2. nlost counts the LOST ones.
 *  3. On the release list (queued) only without users; releasing from then to release_ended(): only
 *     once at a time.
 *  4. A change to GONE that is to survive a crash is in the record (state 3) before anything is
 *     released. A holder that ends with nothing held needs no such change: at the next mount it
 *     holds nothing either.
 *
 * GONE and LIVE are also changed with fs->lock held exclusively, so that a transaction that looked
 * at the state may rely on it.
 */
#include <string.h>
#include <sys/random.h>

#include "delegation_priv.h"
#include "journal.h"
#include "layout_priv.h"

/* One record of TREE_HOLDER, and the root block. */
#define HOLDER_TRANS_BLOCKS (TRANS_TREE_OP + TRANS_ALLOC_OP)
/* The same, and the record of its fence. */
#define GO_TRANS_BLOCKS (HOLDER_TRANS_BLOCKS + TRANS_TREE_OP + TRANS_ALLOC_OP)

static int by_id(const struct holder *a, const struct holder *b)
{
	return a->id < b->id ? -1 : a->id > b->id;
}

RB_GENERATE(holder_tree, holder, by_id, by_id)

/* ---- looking: mutex held -------------------------------------------------------------------- */

struct holder *holder_find(struct layouts *ls, uint64_t id)
{
	struct holder key = { .id = id };

	return RB_FIND(holder_tree, &ls->holders, &key);
}

static struct holder *find_here(struct layouts *ls, uint64_t id)
{
	struct holder *h = holder_find(ls, id);

	return h && h->state != HOLDER_GONE ? h : NULL;
}

/* Could it still touch anything of ours? What is kept from more than one holder names none: any
 * that is tainted may. */
static bool reaches(const struct holder *h)
{
	return h->ngrants || h->quarantined || h->nlost_inodes ||
	       (h->tainted && h->ls->quarantined_any);
}

void holder_tell_fence(struct layouts *ls, struct holder *h)
{
	if (h->state != HOLDER_LOST || h->fence_told || (!reaches(h) && !h->fence.state))
		return;
	h->fence_told = true;
	event_post(ls, ls->sink,
		   &(struct layout_event){ .type = EVENT_FENCE_WANTED, .holder = h->id });
}

void holder_want_release(struct layouts *ls, struct holder *h)
{
	if (h->users || h->releasing) {
		h->release_again = true;
		return;
	}
	h->release_again = false;
	h->releasing = h->queued = true;
	TAILQ_INSERT_TAIL(&ls->to_release, h, to_release);
	layouts_kick(ls);
}

static void set_state(struct layouts *ls, struct holder *h, enum holder_state state)
{
	ls->nlost -= h->state == HOLDER_LOST;
	ls->nlost += state == HOLDER_LOST;
	h->state = state;
}

/* Nobody speaks for it, and it has nothing: it goes without anybody being asked. A fence that is
 * decided is brought to its end. */
static void end_if_empty(struct layouts *ls, struct holder *h)
{
	if (h->state != HOLDER_LOST || !h->ended || h->users || h->fence.state || reaches(h))
		return;
	set_state(ls, h, HOLDER_GONE);
	delegations_drop(ls, h);
	holder_want_release(ls, h);
}

void holder_was_released(struct layouts *ls, struct holder *h)
{
	h->releasing = false;
	if (h->release_again)
		holder_want_release(ls, h);
	else
		end_if_empty(ls, h);
}

static void become_lost(struct layouts *ls, struct holder *h, enum lost_cause cause)
{
	set_state(ls, h, HOLDER_LOST);
	h->cause = cause;
	atomic_fetch_add_explicit(&ls->counters.holders_lost, 1, memory_order_relaxed);
	watches_drop(ls, h);
	delegations_hurry(ls, h);
	end_if_empty(ls, h);
	holder_tell_fence(ls, h);
	recalls_hurry(ls);
}

/* ---- users ---------------------------------------------------------------------------------- */

int holder_enter(struct layouts *ls, uint64_t id, bool live, struct holder **out)
{
	struct holder *h;
	int rc = 0;

	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	if (!h)
		rc = -ENOENT;
	else if (live && h->state == HOLDER_LOST)
		rc = -EOWNERDEAD;
	else
		h->users++;
	pthread_mutex_unlock(&ls->mutex);
	if (!rc)
		*out = h;
	return rc;
}

void holder_leave(struct layouts *ls, struct holder *h)
{
	pthread_mutex_lock(&ls->mutex);
	xassert(h->users > 0);
	if (--h->users == 0) {
		end_if_empty(ls, h);
		holder_tell_fence(ls, h);
		if (h->release_again && !h->releasing)
			holder_want_release(ls, h);
	}
	pthread_mutex_unlock(&ls->mutex);
}

enum holder_state holder_state_of(struct layouts *ls, uint64_t id)
{
	enum holder_state state;
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, id);
	state = h ? h->state : HOLDER_GONE;
	pthread_mutex_unlock(&ls->mutex);
	return state;
}

int holder_check(struct fs *fs, uint64_t id, uint64_t key)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;
	int rc;

	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	rc = !h ? -ENOENT : h->key != key ? -EKEYREJECTED :
	     h->state == HOLDER_LOST ? -EOWNERDEAD : 0;
	pthread_mutex_unlock(&ls->mutex);
	return rc;
}

struct holder *holder_new(struct layouts *ls)
{
	struct holder *h = calloc(1, sizeof(*h));

	if (!h)
		return NULL;
	h->ls = ls;
	TAILQ_INIT(&h->grants);
	TAILQ_INIT(&h->delegations);
	return h;
}

/* ---- coming --------------------------------------------------------------------------------- */

static int make_key(uint64_t *key)
{
	do {
		ssize_t n = getrandom(key, sizeof(*key), 0);

		if (n < 0 && errno != EINTR)
			return -errno;
		if (n != (ssize_t)sizeof(*key))
			*key = 0;
	} while (!*key);
	return 0;
}

static bool too_many(struct layouts *ls, uint32_t uid)
{
	struct holder *h;
	unsigned n = 0;

	if (!uid)
		return false;
	pthread_mutex_lock(&ls->mutex);
	RB_FOREACH(h, holder_tree, &ls->holders)
		n += h->spec.uid == uid && h->state != HOLDER_GONE;
	pthread_mutex_unlock(&ls->mutex);
	return n >= HOLDERS_PER_UID;
}

void holder_enter_table(struct layouts *ls, struct holder *h)
{
	pthread_mutex_lock(&ls->mutex);
	xassert(!RB_INSERT(holder_tree, &ls->holders, h));
	ls->nlost += h->state == HOLDER_LOST;
	pthread_mutex_unlock(&ls->mutex);
	atomic_fetch_add_explicit(&ls->counters.holders, 1, memory_order_relaxed);
}

static int register_in(struct fs *fs, struct holder *h)
{
	struct trans t;
	int rc = trans_begin(fs, &t, HOLDER_TRANS_BLOCKS);

	if (rc)
		return rc;
	/* In the transaction: two at a time are counted both. */
	rc = too_many(fs->layouts, h->spec.uid) ? -EAGAIN : holder_record_add(&t, h);
	if (rc) {
		trans_cancel(&t);
		return rc;
	}
	h->xid = jrn_running(fs);
	holder_enter_table(fs->layouts, h);
	trans_commit(&t);
	return 0;
}

int holder_register(struct fs *fs, const struct holder_spec *spec, struct event_sink *sink,
		    uint64_t *id, uint64_t *key)
{
	struct holder *h;
	int rc;

	if (fs->read_only)
		return -EROFS;
	if ((spec->kind != HOLDER_LOCAL && spec->kind != HOLDER_CLIENT) ||
	    spec->name[sizeof(spec->name) - 1] || spec->fence[sizeof(spec->fence) - 1])
		return -EINVAL;
	h = holder_new(fs->layouts);
	if (!h)
		return -ENOMEM;
	h->spec = *spec;
	h->sink = sink;
	h->state = HOLDER_LIVE;
	h->live_since = layouts_now(fs);
	rc = make_key(&h->key);
	*key = h->key;
	if (!rc)
		rc = register_in(fs, h);
	if (rc) {
		free(h);
		return rc;
	}
	*id = h->id;
	return 0;
}

/* mutex held; fs->lock exclusive */
static void come_back(struct layouts *ls, struct holder *h)
{
	xassert(h->state == HOLDER_LOST && !h->fence.state);
	set_state(ls, h, HOLDER_LIVE);
	h->cause = LOST_NOT;
	h->fence_told = h->ended = h->idle = false;
	h->live_since = layouts_now(ls->fs);
}

int holder_resume(struct fs *fs, uint64_t id, uint64_t key, struct event_sink *sink)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;
	int rc;

	fs_wrlock(fs);
	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	rc = !h ? -ENOENT : h->key != key ? -EKEYREJECTED : h->state == HOLDER_LIVE ? -EBUSY :
	     h->fence.state ? -EKEYREVOKED : 0;
	if (!rc) {
		come_back(ls, h);
		h->sink = sink;
	}
	pthread_mutex_unlock(&ls->mutex);
	if (!rc)
		lost_del_unrevoked(fs, id);
	fs_unlock(fs);
	return rc;
}

void holder_returned_all(struct fs *fs, uint64_t id)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;
	bool counts;

	fs_wrlock(fs);
	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	counts = h && !h->fence.state;
	if (h && !counts)
		h->returned = true;
	if (counts && h->state == HOLDER_LOST)
		come_back(ls, h);
	pthread_mutex_unlock(&ls->mutex);
	if (counts)
		lost_del(fs, 0, id);
	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	if (h && counts && (h->quarantined || h->tainted))
		holder_want_release(ls, h);
	pthread_mutex_unlock(&ls->mutex);
	fs_unlock(fs);
}

/* ---- being lost ----------------------------------------------------------------------------- */

void holder_missed(struct fs *fs, uint64_t id)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	if (h && h->state == HOLDER_LIVE) {
		h->missed++;
		atomic_fetch_add_explicit(&ls->counters.recalls_missed, 1, memory_order_relaxed);
		become_lost(ls, h, LOST_RECALL);
	}
	pthread_mutex_unlock(&ls->mutex);
}

/* mutex held */
static void ended(struct layouts *ls, struct holder *h)
{
	h->ended = true;
	if (h->state == HOLDER_LIVE)
		become_lost(ls, h, LOST_ENDED);
	else
		end_if_empty(ls, h);
}

int holder_lost(struct fs *fs, uint64_t id)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	if (h)
		ended(ls, h);
	pthread_mutex_unlock(&ls->mutex);
	return h ? 0 : -ENOENT;
}

void event_sink_destroy(struct fs *fs, struct event_sink *sink)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;

	if (!sink)
		return;
	pthread_mutex_lock(&ls->mutex);
	RB_FOREACH(h, holder_tree, &ls->holders) {
		if (h->sink != sink)
			continue;
		h->sink = NULL;
		if (h->state != HOLDER_GONE)
			ended(ls, h);
	}
	pthread_mutex_unlock(&ls->mutex);
	sink_free(sink);
}

/* ---- going ---------------------------------------------------------------------------------- */

/* With fs->lock held, at the end of the transaction that removed the record. */
static void forgotten(void *arg, xid_t xid)
{
	struct holder *h = arg;
	struct layouts *ls = h->ls;

	if (!xid)
		return;
	pthread_mutex_lock(&ls->mutex);
	xassert(h->state == HOLDER_GONE && !h->users && !h->ngrants);
	RB_REMOVE(holder_tree, &ls->holders, h);
	if (h->queued)
		TAILQ_REMOVE(&ls->to_release, h, to_release);
	watches_drop(ls, h);
	delegations_drop(ls, h);
	event_post(ls, ls->sink,
		   &(struct layout_event){ .type = EVENT_HOLDER_GONE, .holder = h->id,
					   .length = h->confirmed });
	pthread_mutex_unlock(&ls->mutex);
	lost_del(ls->fs, 0, h->id);
	free(h);
}

int holder_forget(struct trans *t, struct holder *h)
{
	int rc = holder_record_delete(t, h);

	if (!rc)
		rc = fence_record_delete(t, h);
	return rc ? rc : trans_on_end(t, forgotten, h);
}

/* GONE in memory and, with something to be released first (also what a revoke left of its
 * records), on disk; else the record goes at once. That of its fence goes in any case. The state is
 * as before if that fails. may() is asked in the transaction, with the mutex held. */
static int go(struct fs *fs, uint64_t id, int (*may)(const struct holder *h), bool confirmed)
{
	struct layouts *ls = fs->layouts;
	enum holder_state before = HOLDER_GONE;
	bool empty = false, told;
	struct holder *h;
	struct trans t;
	int rc = trans_begin(fs, &t, GO_TRANS_BLOCKS);

	if (rc)
		return rc;
	told = exposures_any(fs, id);
	pthread_mutex_lock(&ls->mutex);
	h = find_here(ls, id);
	rc = h ? may(h) : -ENOENT;
	if (!rc) {
		before = h->state;
		empty = !told && !reaches(h) && !h->tainted && !h->users && !h->releasing;
		set_state(ls, h, HOLDER_GONE);
		h->confirmed = confirmed;
	}
	pthread_mutex_unlock(&ls->mutex);
	if (!rc)
		rc = empty ? holder_forget(&t, h) : holder_record_gone(&t, h);
	if (!rc && !empty)
		rc = fence_over(&t, h);
	if (rc) {
		trans_cancel(&t);
		if (before != HOLDER_GONE) {
			pthread_mutex_lock(&ls->mutex);
			set_state(ls, h, before);
			h->confirmed = false;
			pthread_mutex_unlock(&ls->mutex);
		}
		return rc;
	}
	if (!empty) {
		pthread_mutex_lock(&ls->mutex);
		watches_drop(ls, h);
		delegations_drop(ls, h);
		holder_want_release(ls, h);
		pthread_mutex_unlock(&ls->mutex);
	}
	trans_commit(&t);
	return 0;
}

static int may_go(const struct holder *h)
{
	return h->ngrants || h->quarantined || h->users || h->fence.state ? -EBUSY : 0;
}

int holder_gone(struct fs *fs, uint64_t id)
{
	return go(fs, id, may_go, false);
}

static int may_be_fenced(const struct holder *h)
{
	return h->state == HOLDER_LIVE ? -EBUSY : 0;
}

int holder_fenced(struct fs *fs, uint64_t id)
{
	int rc = go(fs, id, may_be_fenced, true);

	if (!rc)
		LAYOUT_COUNT(fs, fences, 1);
	return rc;
}

struct quarantine_change {
	struct layouts *ls;
	uint64_t id;
	int64_t blocks;
};

void holder_count_quarantine(struct layouts *ls, uint64_t id, int64_t blocks)
{
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = id == QUARANTINE_ANY ? NULL : holder_find(ls, id);
	if (h)
		h->quarantined += (uint64_t)blocks;
	else if (id == QUARANTINE_ANY)
		ls->quarantined_any += (uint64_t)blocks;
	pthread_mutex_unlock(&ls->mutex);
}

static void quarantine_ended(void *arg, xid_t xid)
{
	struct quarantine_change *change = arg;

	if (!xid)
		holder_count_quarantine(change->ls, change->id, -change->blocks);
	free(change);
}

int holder_quarantined(struct trans *t, uint64_t id, int64_t blocks)
{
	struct quarantine_change *change = malloc(sizeof(*change));
	int rc;

	if (!change)
		return -ENOMEM;
	*change = (struct quarantine_change){ t->fs->layouts, id, blocks };
	rc = trans_on_end(t, quarantine_ended, change);
	if (rc) {
		free(change);
		return rc;
	}
	holder_count_quarantine(t->fs->layouts, id, blocks);
	return 0;
}

void holders_drop_idle(struct layouts *ls)
{
	struct holder *h, *next;

	pthread_mutex_lock(&ls->mutex);
	if (ls->idle_at && ls->idle_at <= layouts_now(ls->fs)) {
		ls->idle_at = 0;
		RB_FOREACH_SAFE(h, holder_tree, &ls->holders, next) {
			h->ended |= h->idle;
			end_if_empty(ls, h);
		}
	}
	pthread_mutex_unlock(&ls->mutex);
}

/* ---- for status ----------------------------------------------------------------------------- */

unsigned holder_list(struct fs *fs, uint64_t *id, struct holder_look *out, unsigned n)
{
	struct layouts *ls = fs->layouts;
	struct holder key = { .id = *id + 1 }, *h = NULL;
	unsigned got = 0;

	pthread_mutex_lock(&ls->mutex);
	if (*id != UINT64_MAX)
		h = RB_NFIND(holder_tree, &ls->holders, &key);
	for (; h && got < n; h = RB_NEXT(holder_tree, &ls->holders, h))
		out[got++] = (struct holder_look){
			.spec = h->spec, .id = h->id, .state = h->state, .grants = h->ngrants,
			.quarantined = h->quarantined, .recalls = h->recalls, .missed = h->missed,
			.cause = h->cause, .returned = h->returned,
		};
	pthread_mutex_unlock(&ls->mutex);
	if (got)
		*id = out[got - 1].id;
	return got;
}

/* ---- unmount -------------------------------------------------------------------------------- */

static void drop_grants(struct holder *h)
{
	struct grant_list dead = { NULL };
	struct grant *g, *spare = NULL;

	while ((g = TAILQ_FIRST(&h->grants))) {
		struct inode *in = g->in;

		pthread_mutex_lock(&in->lock);
		grant_cut_locked(in, h->id, 1u << g->seg.kind, g->seg.start, g->seg.end, &spare, &dead);
		pthread_mutex_unlock(&in->lock);
		grant_list_free(h->ls->fs, &dead);
	}
}

void holders_destroy(struct layouts *ls)
{
	struct holder *h;

	while ((h = RB_MIN(holder_tree, &ls->holders))) {
		xassert(!h->users);
		drop_grants(h);
		watches_drop(ls, h);
		delegations_drop(ls, h);
		RB_REMOVE(holder_tree, &ls->holders, h);
		free(h);
	}
	TAILQ_INIT(&ls->to_release);
	work_inodes(ls, false);
}
