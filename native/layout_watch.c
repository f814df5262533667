/* SPDX-License-Identifier: MIT
 *
 * layout_watch.c - holders that want to hear when the map of an inode changes.
 *
 * A watch is armed: the next change is told; told once, it waits until somebody asks for the map
 * again. It holds a reference of its inode, but does not keep a file whose last name and open are
 * gone.
 *
 * Lists of watches, both ways, and `armed` are under layouts->mutex. nwatches of the module is how
 * changes of the map on an unwatched filesystem cost nothing.
 */
#include "layout_priv.h"

#define WATCHES_PER_HOLDER 4096u

struct watch {
	struct inode_work work; /* first: what is left of it when it has ended is the reference */
	struct holder *holder;
	bool armed;
	struct watch *next_of_inode, *next_of_holder;
};

static struct watch *find(struct inode *in, const struct holder *h)
{
	struct watch *w = in->watches;

	while (w && w->holder != h)
		w = w->next_of_inode;
	return w;
}

/* Out of both lists; the reference is still to be put. */
static void unlink_watch(struct layouts *ls, struct watch *w)
{
	struct watch **at = &w->work.in->watches;

	while (*at != w)
		at = &(*at)->next_of_inode;
	*at = w->next_of_inode;
	at = &w->holder->watches;
	while (*at != w)
		at = &(*at)->next_of_holder;
	*at = w->next_of_holder;
	w->holder->nwatches--;
	atomic_fetch_sub(&ls->nwatches, 1);
}

static int add(struct layouts *ls, struct inode *in, struct holder *h, struct watch **spare)
{
	struct watch *w = find(in, h);

	if (w) {
		w->armed = true;
		return 0;
	}
	if (h->nwatches >= WATCHES_PER_HOLDER)
		return -EAGAIN;
	w = *spare;
	*spare = NULL;
	*w = (struct watch){ .work = { .in = in }, .holder = h, .armed = true,
			     .next_of_inode = in->watches,
			     .next_of_holder = h->watches };
	in->watches = h->watches = w;
	h->nwatches++;
	atomic_fetch_add(&ls->nwatches, 1);
	return 0;
}

static void tell_of_lock(struct inode *in, uint64_t owner, enum layout_event_type type)
{
	struct layouts *ls = in->fs->layouts;
	struct layout_event ev = { .type = type, .holder = owner, .ino = in->ino,
				   .generation = in->core.generation };

	pthread_mutex_lock(&ls->mutex);
	event_post(ls, ls->sink, &ev);
	pthread_mutex_unlock(&ls->mutex);
}

void layout_lock_free(struct inode *in, uint64_t owner)
{
	tell_of_lock(in, owner, EVENT_LOCK_FREE);
}

void layout_lock_wanted(struct inode *in, uint64_t owner)
{
	tell_of_lock(in, owner, EVENT_LOCK_WANTED);
}

int layout_watch(struct inode *in, uint64_t holder, bool on)
{
	struct layouts *ls = in->fs->layouts;
	struct watch *w = NULL, *spare = on ? malloc(sizeof(*spare)) : NULL;
	struct holder *h;
	int rc = 0;

	if (on && !spare)
		return -ENOMEM;
	if (on)
		inode_ref(in);
	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, holder);
	if (!h || h->state == HOLDER_GONE)
		rc = -ENOENT;
	else if (h->state == HOLDER_LOST)
		rc = -EOWNERDEAD;
	else if (on)
		rc = add(ls, in, h, &spare);
	else if ((w = find(in, h)))
		unlink_watch(ls, w);
	pthread_mutex_unlock(&ls->mutex);
	if (spare || w)
		inode_put(in);
	free(spare);
	free(w);
	return rc;
}

void watches_drop(struct layouts *ls, struct holder *h)
{
	struct watch *w;

	while ((w = h->watches)) {
		unlink_watch(ls, w);
		inode_work_add(ls, &w->work);
	}
}

static void post(struct layouts *ls, const struct watch *w)
{
	event_post(ls, w->holder->sink,
		   &(struct layout_event){ .type = EVENT_MAP_CHANGED, .holder = w->holder->id,
					   .ino = w->work.in->ino,
					   .generation = w->work.in->core.generation,
					   .length = UINT64_MAX });
}

void layout_map_changed(struct inode *in)
{
	struct layouts *ls = in->fs->layouts;

	if (!ls || likely(!atomic_load_explicit(&ls->nwatches, memory_order_relaxed)))
		return;
	pthread_mutex_lock(&ls->mutex);
	for (struct watch *w = in->watches; w; w = w->next_of_inode) {
		if (w->armed)
			post(ls, w);
		w->armed = false;
	}
	pthread_mutex_unlock(&ls->mutex);
}

void layout_map_asked(struct inode *in)
{
	struct layouts *ls = in->fs->layouts;

	if (!atomic_load_explicit(&ls->nwatches, memory_order_relaxed))
		return;
	pthread_mutex_lock(&ls->mutex);
	for (struct watch *w = in->watches; w; w = w->next_of_inode)
		w->armed = true;
	pthread_mutex_unlock(&ls->mutex);
}

void watches_drop_inode(struct inode *in)
{
	struct layouts *ls = in->fs->layouts;
	struct watch *w;

	if (!atomic_load_explicit(&ls->nwatches, memory_order_relaxed))
		return;
	pthread_mutex_lock(&ls->mutex);
	while ((w = in->watches)) {
		if (w->armed)
			post(ls, w);
		unlink_watch(ls, w);
		inode_work_add(ls, &w->work);
	}
	pthread_mutex_unlock(&ls->mutex);
}
