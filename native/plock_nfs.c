/* SPDX-License-Identifier: MIT
 *
 * plock_nfs.c - what only NFS owners have: watches, and that their locks keep the inode in memory.
 */
#include "plock_impl.h"

#include "device.h"
#include "errors.h"
#include "fs.h"

static struct plock_set *pinned_sets;
static unsigned nwatches;

static struct plock as_lock(const struct plock_watch *w)
{
	return (struct plock){.start = w->start, .end = w->end, .type = w->type, .owner = w->owner,
			      .domain = PLOCK_NFS};
}

static void move_watch(struct plock_watch **at, struct plock_watch **to)
{
	struct plock_watch *w = *at;

	*at = w->next;
	w->next = *to;
	*to = w;
	nwatches--;
}

/* Those that nothing is in the way of any more. */
static void take_free_watches(struct plock_set *set, struct plock_watch **told)
{
	struct plock_watch **at = &set->watches;

	while (*at) {
		struct plock lock = as_lock(*at);

		if (plock_conflict_from(set->held[0], &lock))
			at = &(*at)->next;
		else
			move_watch(at, told);
	}
}

static void drop_watches(struct plock_set *set, bool all, uint64_t owner)
{
	struct plock_watch **at = &set->watches, *gone = NULL;

	while (*at) {
		if (all || (*at)->owner == owner)
			move_watch(at, &gone);
		else
			at = &(*at)->next;
	}
	while ((*at = gone)) {
		gone = gone->next;
		free(*at);
	}
}

static bool has_nfs(const struct plock_set *set)
{
	if (!set->nfs)
		return false;
	for (const struct plock_held *h = set->held[0]; h; h = h->next)
		if (h->owner->domain == PLOCK_NFS)
			return true;
	return set->watches;
}

/* Whether a reference is to be put, which may free the inode, once the mutex is given up. One is
 * taken at once: somebody else might put it first, and the caller's own with it. */
static bool settle_pin(struct plock_set *set)
{
	if (has_nfs(set) == set->pinned)
		return false;
	set->pinned = !set->pinned;
	if (!set->pinned) {
		*(set->pinned_prev ? &set->pinned_prev->pinned_next : &pinned_sets) =
			set->pinned_next;
		if (set->pinned_next)
			set->pinned_next->pinned_prev = set->pinned_prev;
		return true;
	}
	inode_ref(set->in);
	set->pinned_prev = NULL;
	set->pinned_next = pinned_sets;
	if (pinned_sets)
		pinned_sets->pinned_prev = set;
	pinned_sets = set;
	return false;
}

void plock_settle_nfs(struct plock_set *set, struct aftermath *after)
{
	take_free_watches(set, &after->told);
	after->unpinned = settle_pin(set);
}

void plock_finish(const struct aftermath *after)
{
	struct plock_request *req = after->granted;
	struct plock_watch *w = after->told;

	while (req) {
		struct plock_request *next = req->next;

		req->next = NULL;
		ioctx_wake(req->op);
		req = next;
	}
	while (w) {
		struct plock_watch *next = w->next;

		if (after->in->fs->layout_hooks)
			after->in->fs->layout_hooks->lock_free(after->in, w->owner);
		free(w);
		w = next;
	}
	for (unsigned i = 0; i < after->nwanted; i++)
		if (after->in->fs->layout_hooks)
			after->in->fs->layout_hooks->lock_wanted(after->in, after->wanted[i]);
	if (after->unpinned)
		inode_put(after->in);
}

void plock_release_nfs(struct inode *in, uint64_t id)
{
	struct aftermath after = { 0 };

	pthread_mutex_lock(&plock_mutex);
	if (in->locks) {
		drop_watches(in->locks, false, id);
		plock_release(in->locks, false, PLOCK_NFS, id, &after);
	}
	pthread_mutex_unlock(&plock_mutex);
	plock_finish(&after);
}

int plock_watch(struct inode *in, const struct plock *lock)
{
	struct plock_watch *w = malloc(sizeof(*w));
	struct aftermath after = { 0 };
	struct plock_set *set;
	int err = 0;

	if (!w)
		return -ENOMEM;
	*w = (struct plock_watch){.start = lock->start, .end = lock->end, .type = lock->type,
				  .owner = lock->owner};
	if (lock->start > lock->end || (unsigned)lock->type > PLOCK_WRITE) {
		free(w);
		return -EINVAL;
	}
	pthread_mutex_lock(&plock_mutex);
	set = plock_set_of(in, true);
	if (set)
		drop_watches(set, false, w->owner);
	if (!set || nwatches >= PLOCK_WATCHES_MAX) {
		err = set ? -EAGAIN : -ENOMEM;
	} else {
		set->nfs = true;
		w->next = set->watches;
		set->watches = w;
		nwatches++;
	}
	if (set)
		plock_look_round(set, &after);
	pthread_mutex_unlock(&plock_mutex);
	if (err)
		free(w);
	plock_finish(&after);
	return err;
}

void plock_unwatch(struct inode *in, uint64_t owner)
{
	struct aftermath after = { 0 };

	pthread_mutex_lock(&plock_mutex);
	if (in->locks) {
		drop_watches(in->locks, false, owner);
		plock_look_round(in->locks, &after);
	}
	pthread_mutex_unlock(&plock_mutex);
	plock_finish(&after);
}

static struct plock_set *pinned_of(const struct fs *fs)
{
	struct plock_set *set = pinned_sets;

	while (set && set->in->fs != fs)
		set = set->pinned_next;
	return set;
}

void plock_drop_nfs(struct fs *fs)
{
	struct plock_set *set;
	bool more;

	do {
		struct aftermath after = { 0 };

		pthread_mutex_lock(&plock_mutex);
		set = pinned_of(fs);
		more = set;
		if (set) {
			drop_watches(set, true, 0);
			plock_drop_domain(&set->held[0], PLOCK_NFS);
			plock_look_round(set, &after);
		}
		pthread_mutex_unlock(&plock_mutex);
		plock_finish(&after);
	} while (more);
}
