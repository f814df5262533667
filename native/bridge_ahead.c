/* SPDX-License-Identifier: MIT
 *
 * bridge_ahead.c - listings made ahead of the READDIR that asks for them (bridge_ahead.h).
 *
 * What is kept is keyed by directory, place and size, with the version of the directory (inode_core.change) as of
 * the moment it was made: names that came and went since make it worthless. Numbers of inodes are never used
 * again. A few are kept, and the oldest of them makes room.
 *
 * Who makes them: a thread of its own, one at a time, where the scheduler finds a CPU for it, when the reader shares
 * its CPU with the thread that serves it (FUSE over io_uring); else that thread itself, which would wait for the next
 * request on a CPU of its own, unless blocks have to be read: the other thread reads many at once. What is expected
 * while one is made waits; what is expected then replaces that.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bridge_ahead.h"
#include "device.h"
#include "fuse_abi.h"

#define SLOTS 16u
#define BYTES_MAX 65536u

struct made {
	uint64_t version, last;
	size_t cap, len;
	bool cold;
	_Alignas(struct fuse_dirent) uint8_t data[BYTES_MAX];
};

struct slot {
	struct made *made; /* NULL: none; the rest means nothing then */
	inum_t ino;
	uint64_t after; /* the READDIR's offset */
	uint64_t turn;  /* of all that were made, which */
};

struct ahead {
	pthread_t thread;
	pthread_mutex_t mutex; /* all below */
	pthread_cond_t work, done;
	bool stop;
	struct inode *dir; /* referenced; NULL: nothing is to be made */
	uint64_t after;
	size_t cap;
	bool here;     /* by who expects it, not by the thread */
	inum_t making; /* by the thread; 0: nothing */
	uint64_t making_after;
	struct slot slots[SLOTS];
	uint64_t turns;
	struct made *spare;
	uint64_t used, useless;
};

/* By place too: there may be many readers of one directory. Mutex held. */
static struct slot *slot_of(struct ahead *a, inum_t ino, uint64_t after)
{
	for (struct slot *s = a->slots; s < a->slots + SLOTS; s++)
		if (s->made && s->ino == ino && s->after == after)
			return s;
	return NULL;
}

/* An empty one, or that of the oldest. Mutex held. */
static struct slot *slot_for_new(struct ahead *a)
{
	struct slot *oldest = a->slots;

	for (struct slot *s = a->slots; s < a->slots + SLOTS; s++) {
		if (!s->made)
			return s;
		if (s->turn < oldest->turn)
			oldest = s;
	}
	return oldest;
}

/* Mutex held. One is enough: it is what the next is made in. */
static void put_aside(struct ahead *a, struct made *m)
{
	if (a->spare)
		free(m);
	else
		a->spare = m;
}

/* It is nearly made: to make it again would take longer, the more so when blocks have to be read. Mutex held. */
static void wait_for(struct ahead *a, inum_t ino, uint64_t after)
{
	if (a->making != ino || a->making_after != after)
		return;
	if (dev_before_blocking.fn) {
		pthread_mutex_unlock(&a->mutex);
		dev_before_blocking.fn(dev_before_blocking.arg);
		pthread_mutex_lock(&a->mutex);
	}
	while (a->making == ino && a->making_after == after)
		pthread_cond_wait(&a->done, &a->mutex);
}

bool ahead_take(struct ahead *a, struct inode *dir, uint64_t after, struct listing *out)
{
	struct made *m = NULL;
	struct slot *s;
	bool good;

	pthread_mutex_lock(&a->mutex);
	wait_for(a, dir->ino, after);
	s = slot_of(a, dir->ino, after);
	if (s) {
		m = s->made;
		s->made = NULL;
	}
	pthread_mutex_unlock(&a->mutex);
	if (!m)
		return false;
	good = m->cap == out->cap && m->version == listing_version(dir);
	if (good) {
		memcpy(out->data, m->data, m->len);
		out->len = m->len;
		out->last = m->last;
		out->cold = m->cold;
	}
	pthread_mutex_lock(&a->mutex);
	put_aside(a, m);
	*(good ? &a->used : &a->useless) += 1;
	pthread_mutex_unlock(&a->mutex);
	return good;
}

bool ahead_expect(struct ahead *a, struct inode *dir, const struct listing *given, bool here)
{
	struct inode *other;

	if (!given->len || given->cap > BYTES_MAX)
		return false;
	inode_ref(dir);
	pthread_mutex_lock(&a->mutex);
	other = a->dir;
	if (other && here && !a->here) {
		other = dir; /* the thread's goes first */
		here = false;
	} else {
		a->dir = dir;
		a->after = given->last;
		a->cap = given->cap;
		a->here = here;
		if (!here)
			pthread_cond_signal(&a->work);
	}
	pthread_mutex_unlock(&a->mutex);
	if (other)
		inode_put(other);
	return here;
}

/* m, or NULL: it could not be made. Who asks will see why. */
static struct made *make(struct made *m, struct inode *dir, uint64_t after, size_t cap)
{
	struct listing l = {.data = m->data, .cap = cap};
	int err;

	buf_unasked = true;
	err = listing_make(dir, after, &l, &m->version);
	buf_unasked = false;
	if (err) {
		free(m);
		return NULL;
	}
	m->cap = cap;
	m->len = l.len;
	m->last = l.last;
	m->cold = l.cold;
	return m;
}

/* Mutex held. */
static void keep(struct ahead *a, struct slot new)
{
	struct slot *s = slot_of(a, new.ino, new.after);

	if (!s)
		s = slot_for_new(a);
	if (s->made)
		put_aside(a, s->made);
	new.turn = ++a->turns;
	*s = new;
}

/* Mutex held, and released meanwhile. told: others may wait for it. */
static void work(struct ahead *a, bool told)
{
	struct made *m = a->spare;
	struct inode *dir = a->dir;
	inum_t ino = dir->ino;
	uint64_t after = a->after;
	size_t cap = a->cap;

	a->spare = NULL;
	a->dir = NULL;
	if (told) {
		a->making = ino;
		a->making_after = after;
	}
	pthread_mutex_unlock(&a->mutex);
	if (!m)
		m = malloc(sizeof(*m));
	if (m)
		m = make(m, dir, after, cap);
	inode_put(dir);
	pthread_mutex_lock(&a->mutex);
	if (told) {
		a->making = 0;
		pthread_cond_broadcast(&a->done);
	}
	if (m)
		keep(a, (struct slot){.made = m, .ino = ino, .after = after});
}

void ahead_make(struct ahead *a)
{
	pthread_mutex_lock(&a->mutex);
	if (a->dir && a->here)
		work(a, false);
	pthread_mutex_unlock(&a->mutex);
}

static void *ahead_thread(void *arg)
{
	struct ahead *a = arg;

	pthread_setname_np(pthread_self(), "extfs-ahead");
	buf_reads_ahead = true;
	pthread_mutex_lock(&a->mutex);
	while (!a->stop) {
		if (a->dir && !a->here)
			work(a, true);
		else
			pthread_cond_wait(&a->work, &a->mutex);
	}
	pthread_mutex_unlock(&a->mutex);
	return NULL;
}

/* Signals are blocked. */
int ahead_create(struct ahead **out)
{
	struct ahead *a = calloc(1, sizeof(*a));
	int err;

	if (!a)
		return -ENOMEM;
	pthread_mutex_init(&a->mutex, NULL);
	pthread_cond_init(&a->work, NULL);
	pthread_cond_init(&a->done, NULL);
	err = -pthread_create(&a->thread, NULL, ahead_thread, a);
	if (err) {
		pthread_cond_destroy(&a->work);
		pthread_cond_destroy(&a->done);
		pthread_mutex_destroy(&a->mutex);
		free(a);
		return err;
	}
	*out = a;
	return 0;
}

void ahead_destroy(struct ahead *a)
{
	if (!a)
		return;
	pthread_mutex_lock(&a->mutex);
	a->stop = true;
	pthread_cond_signal(&a->work);
	pthread_mutex_unlock(&a->mutex);
	pthread_join(a->thread, NULL);
	if (a->dir)
		inode_put(a->dir);
	for (unsigned i = 0; i < SLOTS; i++)
		free(a->slots[i].made);
	free(a->spare);
	pthread_cond_destroy(&a->work);
	pthread_cond_destroy(&a->done);
	pthread_mutex_destroy(&a->mutex);
	free(a);
}

void ahead_counts(struct ahead *a, uint64_t *used, uint64_t *useless)
{
	pthread_mutex_lock(&a->mutex);
	*used = a->used;
	*useless = a->useless;
	pthread_mutex_unlock(&a->mutex);
}
