/* SPDX-License-Identifier: MIT
 *
 * plock.c - POSIX record locks and flock locks.
 *
 * held: a lock that an owner has. parked: a request that waits in its inode's queue, in order of
 * arrival. Two of them conflict when they are of one kind (POSIX or flock), overlap, belong to
 * different owners, and one is PLOCK_WRITE. Invariants, whenever the mutex is free:
 *  1. held locks of an inode and kind are sorted by start; those of one owner neither overlap nor,
 *     with equal type, touch;
 *  2. held locks never conflict;
 *  3. a parked request conflicts with a held lock; or its owner holds nothing and it conflicts with
 *     a request parked before it;
 *  4. owner->held counts the held locks of the owner in all inodes; an owner record exists while it
 *     holds or waits;
 *  5. a watch conflicts with a held lock. Its number is not of an owner record;
 *  6. a set is pinned, on the list of such sets and with a reference of its inode (to be taken or
 *     put right after the mutex was free), as long as an NFS owner has a lock or a watch in it.
 *
 * No deadlock comes from invariant 3's second case: who waits behind a request holds nothing, so
 * nobody waits for a lock of his, and along a queue everybody waits for earlier ones. The first
 * case is checked for cycles over owners when a request parks.
 */
#include "plock_impl.h"

#include <string.h>

#include "device.h"
#include "errors.h"

#define OWNER_BUCKETS 1024u

pthread_mutex_t plock_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct plock_owner *owners[OWNER_BUCKETS];
static uint64_t searches;

/* ---- owners ---- */

static struct plock_owner **owner_slot(const struct fs *fs, bool flock, enum plock_domain domain,
				       uint64_t id)
{
	uint64_t hash = (id + (uintptr_t)fs + flock + 2 * domain) * 0x9e3779b97f4a7c15ULL;
	struct plock_owner **at = &owners[hash >> 54];

	while (*at && ((*at)->fs != fs || (*at)->flock != flock || (*at)->domain != domain ||
		       (*at)->id != id))
		at = &(*at)->next;
	return at;
}
_Static_assert(OWNER_BUCKETS == 1u << (64 - 54), "bucket is the hash's top bits");

static struct plock_owner *owner_of(const struct plock_request *req)
{
	return *owner_slot(req->in->fs, req->flock, req->lock.domain, req->lock.owner);
}

static struct plock_owner *owner_make(const struct fs *fs, bool flock, const struct plock *lock)
{
	struct plock_owner **at = owner_slot(fs, flock, lock->domain, lock->owner);

	if (!*at) {
		*at = calloc(1, sizeof(**at));
		if (*at)
			**at = (struct plock_owner){.fs = fs, .flock = flock, .id = lock->owner,
						    .domain = lock->domain};
	}
	return *at;
}

static void owner_drop_unused(struct plock_owner *o)
{
	struct plock_owner **at;

	if (o->held > 0 || o->waiting)
		return;
	at = owner_slot(o->fs, o->flock, o->domain, o->id);
	xassert(*at == o);
	*at = o->next;
	free(o);
}

/* ---- held locks ---- */

static bool overlap(uint64_t a_start, uint64_t a_end, uint64_t b_start, uint64_t b_end)
{
	return a_start <= b_end && b_start <= a_end;
}

struct plock_held *plock_conflict_from(struct plock_held *h, const struct plock *lock)
{
	for (; h && h->start <= lock->end; h = h->next)
		if ((h->owner->id != lock->owner || h->owner->domain != lock->domain) &&
		    h->end >= lock->start &&
		    (h->type == PLOCK_WRITE || lock->type == PLOCK_WRITE))
			return h;
	return NULL;
}

/* Does one end where the other begins? */
static bool touch(uint64_t end, uint64_t start)
{
	return end != TO_THE_END && end + 1 == start;
}

static void insert_held(struct plock_held **list, struct plock_held *h)
{
	while (*list && (*list)->start <= h->start)
		list = &(*list)->next;
	h->next = *list;
	*list = h;
	h->owner->held++;
}

static struct plock_held *take_spare(struct plock_request *req)
{
	struct plock_held *h = req->spare[0] ? req->spare[0] : req->spare[1];

	xassert(h != NULL);
	req->spare[h == req->spare[0] ? 0 : 1] = NULL;
	return h;
}

static void free_spares(struct plock_request *req)
{
	free(req->spare[0]);
	free(req->spare[1]);
	req->spare[0] = req->spare[1] = NULL;
}

/* Cut [start, end] out of a held lock that is off the list; what is left goes back. At most one
 * part more than before. */
static void put_back_rest(struct plock_held **list, struct plock_held *h, uint64_t start,
			  uint64_t end, struct plock_request *req)
{
	bool left = h->start < start, right = h->end > end;
	struct plock_held *second = h;

	if (left && right) {
		second = take_spare(req);
		*second = *h;
	}
	if (right) {
		second->start = end + 1;
		insert_held(list, second);
	}
	if (left) {
		h->end = start - 1;
		insert_held(list, h);
	}
	if (!left && !right)
		free(h);
}

/* Make the owner's locks what the request says. No conflict with others; uses the spares. The owner
 * record stays for the caller. */
static void apply(struct plock_set *set, struct plock_request *req, struct plock_owner *owner)
{
	struct plock_held **list = &set->held[req->flock], **at = list, *h, *cut = NULL;
	uint64_t start = req->lock.start, end = req->lock.end;

	/* Touching ones of equal type become part of the new lock; overlapping ones are cut. */
	while ((h = *at)) {
		bool same = h->type == req->lock.type;

		if (h->owner != owner ||
		    !(overlap(h->start, h->end, start, end) ||
		      (same && (touch(h->end, start) || touch(end, h->start))))) {
			at = &h->next;
			continue;
		}
		*at = h->next;
		owner->held--;
		if (same) {
			start = MIN(start, h->start);
			end = MAX(end, h->end);
			free(h);
		} else {
			h->next = cut;
			cut = h;
		}
	}
	while (cut) {
		h = cut;
		cut = h->next;
		put_back_rest(list, h, req->lock.start, req->lock.end, req);
	}
	if (req->lock.type == PLOCK_UNLOCK)
		return;
	h = take_spare(req);
	*h = (struct plock_held){.start = start, .end = end, .type = req->lock.type,
				 .pid = req->lock.pid, .owner = owner};
	insert_held(list, h);
}

/* ---- the queue ---- */

static void enqueue(struct plock_set *set, struct plock_request *req, struct plock_owner *owner)
{
	req->next = NULL;
	req->prev = set->tail;
	*(set->tail ? &set->tail->next : &set->head) = req;
	set->tail = req;
	req->parked = true;
	req->owner_next = owner->waiting;
	owner->waiting = req;
}

static void dequeue(struct plock_set *set, struct plock_request *req, struct plock_owner *owner)
{
	struct plock_request **at = &owner->waiting;

	while (*at != req) {
		xassert(*at != NULL);
		at = &(*at)->owner_next;
	}
	*at = req->owner_next;
	*(req->prev ? &req->prev->next : &set->head) = req->next;
	*(req->next ? &req->next->prev : &set->tail) = req->prev;
	req->next = req->prev = req->owner_next = NULL;
	req->parked = false;
}

/* Is there a parked request before `before` (NULL: any) that this one has to let pass? */
static bool behind_waiter(const struct plock_set *set, const struct plock_request *req,
			  const struct plock_owner *owner, const struct plock_request *before)
{
	if (owner->held > 0)
		return false;
	for (const struct plock_request *r = set->head; r && r != before; r = r->next)
		if (r->flock == req->flock &&
		    (r->lock.owner != req->lock.owner || r->lock.domain != req->lock.domain) &&
		    overlap(r->lock.start, r->lock.end, req->lock.start, req->lock.end) &&
		    (r->lock.type == PLOCK_WRITE || req->lock.type == PLOCK_WRITE))
			return true;
	return false;
}

/* Owners of held POSIX locks that stand in the way of a request, if not visited by this search:
 * onto its list. True: one is `target`. */
static bool visit_blockers(const struct plock_set *set, const struct plock *lock,
			   const struct plock_owner *target, struct plock_owner **todo)
{
	struct plock_held *h = set->held[0];

	while ((h = plock_conflict_from(h, lock))) {
		if (h->owner == target)
			return true;
		if (h->owner->visited != searches) {
			h->owner->visited = searches;
			h->owner->todo = *todo;
			*todo = h->owner;
		}
		h = h->next;
	}
	return false;
}

/* Would the owner wait, through others, for itself? Owners wait in any inode. */
static bool is_deadlock(const struct plock_set *set, const struct plock *lock,
			const struct plock_owner *owner)
{
	struct plock_owner *todo = NULL;

	searches++;
	/* Its own locks are no conflict here, so target is found only through others. */
	if (visit_blockers(set, lock, owner, &todo))
		return true;
	while (todo) {
		struct plock_owner *o = todo;

		todo = o->todo;
		for (struct plock_request *r = o->waiting; r; r = r->owner_next)
			if (visit_blockers(r->in->locks, &r->lock, owner, &todo))
				return true;
	}
	return false;
}

/* NFS owners in the way of a local request are told of it, each once: whether they are still there
 * is for the server to find out. */
static void note_wanted(const struct plock_set *set, const struct plock_request *req,
			struct aftermath *after)
{
	struct plock_held *h = set->held[0];

	if (!set->nfs || req->flock || req->lock.domain != PLOCK_LOCAL)
		return;
	while (after->nwanted < WANTED_MAX && (h = plock_conflict_from(h, &req->lock))) {
		if (h->owner->domain == PLOCK_NFS && !h->owner->wanted) {
			h->owner->wanted = true;
			after->wanted[after->nwanted++] = h->owner->id;
		}
		h = h->next;
	}
}

/* Grant what can be granted, in order of arrival; the granted, by `next`, to after->granted, for
 * wake_all() without the mutex. */
static void grant_parked(struct plock_set *set, struct aftermath *after)
{
	struct plock_request *req = set->head, *last = NULL;

	while (req) {
		struct plock_owner *owner = owner_of(req);
		struct plock_request *next = req->next;
		bool converts = owner->held > 0;

		if (plock_conflict_from(set->held[req->flock], &req->lock) ||
		    behind_waiter(set, req, owner, req)) {
			note_wanted(set, req, after);
			req = next;
			continue;
		}
		dequeue(set, req, owner);
		apply(set, req, owner);
		free_spares(req);
		req->result = 0;
		*(last ? &last->next : &after->granted) = req;
		last = req;
		/* A conversion may have made room for an earlier one. */
		req = converts ? set->head : next;
	}
}

void plock_look_round(struct plock_set *set, struct aftermath *after)
{
	after->in = set->in;
	grant_parked(set, after);
	plock_settle_nfs(set, after);
}

/* ---- interface ---- */

struct plock_set *plock_set_of(struct inode *in, bool make)
{
	struct plock_set *set = in->locks;

	if (!set && make && (set = calloc(1, sizeof(*set)))) {
		set->in = in;
		__atomic_store_n(&in->locks, set, __ATOMIC_RELEASE);
	}
	return set;
}

/* All locks of an owner but those of one type (PLOCK_UNLOCK: of any). */
static void drop_held(struct plock_held **at, struct plock_owner *owner, enum plock_type keep)
{
	struct plock_held *h;

	while ((h = *at)) {
		if (h->owner != owner || h->type == keep) {
			at = &h->next;
			continue;
		}
		*at = h->next;
		owner->held--;
		free(h);
	}
}

void plock_drop_domain(struct plock_held **at, enum plock_domain domain)
{
	struct plock_held *h;

	while ((h = *at)) {
		if (h->owner->domain != domain) {
			at = &h->next;
			continue;
		}
		*at = h->next;
		h->owner->held--;
		owner_drop_unused(h->owner);
		free(h);
	}
}

/* What the domain of *lock is told of h. */
static void describe(const struct plock_held *h, struct plock *lock, enum plock_domain to)
{
	*lock = (struct plock){.start = h->start, .end = h->end, .type = h->type,
			       .owner = h->owner->id, .pid = h->pid, .domain = h->owner->domain};
	if (to == PLOCK_LOCAL) {
		lock->start = MIN(lock->start, OFFSET_LAST);
		lock->end = MIN(lock->end, OFFSET_LAST);
	}
}

/* Into the form of the table. */
static int check_range(struct plock *lock, bool flock)
{
	if (flock)
		lock->start = 0;
	if (flock || (lock->domain == PLOCK_LOCAL && lock->end >= OFFSET_LAST))
		lock->end = TO_THE_END;
	if (lock->start > lock->end || (unsigned)lock->type > PLOCK_UNLOCK ||
	    (lock->domain == PLOCK_LOCAL && lock->start > OFFSET_LAST) ||
	    (unsigned)lock->domain > PLOCK_NFS || (flock && lock->domain != PLOCK_LOCAL))
		return -EINVAL;
	return 0;
}

/* With the mutex, spares and owner record at hand. */
static int set_or_park(struct plock_set *set, struct plock_request *req, struct plock_owner *owner,
		       struct aftermath *after)
{
	bool unlock = req->lock.type == PLOCK_UNLOCK;
	struct plock_held *h;

	if (req->flock)
		/* before another type is asked for */
		drop_held(&set->held[1], owner, req->lock.type);
	h = unlock ? NULL : plock_conflict_from(set->held[req->flock], &req->lock);
	if (unlock || (!h && (!req->op || !behind_waiter(set, req, owner, NULL)))) {
		apply(set, req, owner);
		return 0;
	}
	note_wanted(set, req, after);
	if (!req->op) {
		if (req->conflict)
			describe(h, req->conflict, req->lock.domain);
		return -EAGAIN;
	}
	if (!req->flock && is_deadlock(set, &req->lock, owner))
		return -EDEADLK;
	enqueue(set, req, owner);
	return ERR_PARKED;
}

int plock_set(struct inode *in, struct plock_request *req)
{
	struct aftermath after = { 0 };
	struct plock_owner *owner;
	struct plock_set *set;
	int err = check_range(&req->lock, req->flock);

	if (err)
		return err;
	xassert(!req->op || req->lock.domain == PLOCK_LOCAL);
	err = -ENOLCK;
	req->in = in;
	req->result = 0;
	req->parked = false;
	req->next = req->prev = req->owner_next = NULL;
	req->spare[0] = calloc(1, sizeof(struct plock_held));
	req->spare[1] = calloc(1, sizeof(struct plock_held));
	pthread_mutex_lock(&plock_mutex);
	set = plock_set_of(in, true);
	owner = owner_make(in->fs, req->flock, &req->lock);
	if (req->spare[0] && req->spare[1] && set && owner) {
		set->nfs |= req->lock.domain == PLOCK_NFS;
		err = set_or_park(set, req, owner, &after);
		plock_look_round(set, &after);
	}
	if (owner)
		owner_drop_unused(owner);
	pthread_mutex_unlock(&plock_mutex);
	/* Parked, it may be granted, resumed and gone by now. */
	if (err != ERR_PARKED)
		free_spares(req);
	plock_finish(&after);
	return err;
}

void plock_get(struct inode *in, bool flock, struct plock *lock)
{
	enum plock_domain domain = lock->domain;
	struct plock_held *h = NULL;
	struct plock_set *set;

	if (domain == PLOCK_LOCAL && lock->end >= OFFSET_LAST)
		lock->end = TO_THE_END;
	pthread_mutex_lock(&plock_mutex);
	set = plock_set_of(in, false);
	if (set)
		h = plock_conflict_from(set->held[flock], lock);
	if (h)
		describe(h, lock, domain);
	else
		lock->type = PLOCK_UNLOCK;
	pthread_mutex_unlock(&plock_mutex);
}

void plock_release(struct plock_set *set, bool flock, enum plock_domain domain, uint64_t id,
		    struct aftermath *after)
{
	struct plock_owner *owner = *owner_slot(set->in->fs, flock, domain, id);

	if (owner) {
		drop_held(&set->held[flock], owner, PLOCK_UNLOCK);
		owner_drop_unused(owner);
	}
	plock_look_round(set, after);
}

void plock_release_owner(struct inode *in, bool flock, uint64_t id)
{
	struct aftermath after = { 0 };

	/* Every close comes here; most files have never been locked. */
	if (!__atomic_load_n(&in->locks, __ATOMIC_ACQUIRE))
		return;
	pthread_mutex_lock(&plock_mutex);
	plock_release(in->locks, flock, PLOCK_LOCAL, id, &after);
	pthread_mutex_unlock(&plock_mutex);
	plock_finish(&after);
}

bool plock_cancel(struct plock_request *req)
{
	struct aftermath after = { 0 };
	struct plock_owner *owner;
	bool parked;

	pthread_mutex_lock(&plock_mutex);
	parked = req->parked;
	if (parked) {
		owner = owner_of(req);
		dequeue(req->in->locks, req, owner);
		free_spares(req);
		req->result = -EINTR;
		owner_drop_unused(owner);
		plock_look_round(req->in->locks, &after);
	}
	pthread_mutex_unlock(&plock_mutex);
	plock_finish(&after);
	return parked;
}

void plock_drop_local(struct inode *in)
{
	struct aftermath after = { 0 };

	pthread_mutex_lock(&plock_mutex);
	if (in->locks) {
		xassert(in->locks->head == NULL);
		for (unsigned kind = 0; kind < ARRAY_LEN(in->locks->held); kind++)
			plock_drop_domain(&in->locks->held[kind], PLOCK_LOCAL);
		plock_look_round(in->locks, &after);
	}
	pthread_mutex_unlock(&plock_mutex);
	plock_finish(&after);
}

void plock_set_free(struct inode *in)
{
	struct plock_set *set = in->locks;

	pthread_mutex_lock(&plock_mutex);
	xassert(set->head == NULL && !set->pinned);
	for (unsigned kind = 0; kind < ARRAY_LEN(set->held); kind++)
		plock_drop_domain(&set->held[kind], PLOCK_LOCAL);
	xassert(!set->held[0] && !set->held[1]);
	pthread_mutex_unlock(&plock_mutex);
	free(set);
	in->locks = NULL;
}
