/* SPDX-License-Identifier: MIT
 *
 * bridge_drop.c - names and bytes that the kernel is told about later.
 *
 * Invariants, under the mutex:
 *  1. A pending drop is on the list of its lane and in the table; one that is being sent is in
 *     neither, so what changes then is pending anew.
 *  2. No two pending drops of a lane are of the same name or inode, but after an INC_EPOCH that
 *     failed.
 */
#include "bridge_drop.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "bridge.h"
#include "log.h"

#define BUCKETS 4096u
enum { NAMES, BYTES, LANES };

struct drop {
	struct drop *next, *hash_next; /* of the lane, oldest first; of the bucket */
	inum_t ino;                    /* names: the directory */
	uint64_t start, end;           /* bytes */
	unsigned name_len;
	char name[];
};

struct lane {
	struct drops *d;
	pthread_t thread;
	bool started;
	pthread_cond_t wake;
	struct drop *head, **tail;
	struct drop *table[BUCKETS];
	unsigned n;
};

struct drops {
	int fd;
	unsigned names_max;
	ssize_t (*send)(int fd, const void *message, size_t len);
	pthread_mutex_t mutex;
	bool stop;
	bool no_epoch; /* the kernel does not know INC_EPOCH */
	bool warned;
	struct lane lane[LANES];
	uint64_t sent, epochs, forgotten;
};

/* ---- what is pending: mutex held ------------------------------------------------------------- */

static struct drop **bucket(struct lane *l, inum_t ino, const char *name, unsigned len)
{
	uint64_t hash = ino * 0x9e3779b97f4a7c15u;

	for (unsigned i = 0; i < len; i++)
		hash = (hash ^ (uint8_t)name[i]) * 0x100000001b3u;
	return &l->table[(hash ^ hash >> 32) % BUCKETS];
}

static struct drop *find(struct lane *l, inum_t ino, const char *name, unsigned len)
{
	struct drop *d = *bucket(l, ino, name, len);

	while (d && (d->ino != ino || d->name_len != len || memcmp(d->name, name, len) != 0))
		d = d->hash_next;
	return d;
}

static void append(struct lane *l, struct drop *d)
{
	struct drop **b = bucket(l, d->ino, d->name, d->name_len);

	d->next = NULL;
	*l->tail = d;
	l->tail = &d->next;
	d->hash_next = *b;
	*b = d;
	l->n++;
	pthread_cond_signal(&l->wake);
}

static struct drop *take_first(struct lane *l)
{
	struct drop *d = l->head, **at;

	if (!d)
		return NULL;
	l->head = d->next;
	if (!l->head)
		l->tail = &l->head;
	for (at = bucket(l, d->ino, d->name, d->name_len); *at != d; at = &(*at)->hash_next)
		;
	*at = d->hash_next;
	l->n--;
	return d;
}

/* All of them, by next. */
static struct drop *take_all(struct lane *l)
{
	struct drop *first = l->head;

	l->head = NULL;
	l->tail = &l->head;
	memset(l->table, 0, sizeof(l->table));
	l->n = 0;
	return first;
}

static void free_all(struct drop *d)
{
	while (d) {
		struct drop *next = d->next;

		free(d);
		d = next;
	}
}

/* ---- saying it: without the mutex ----------------------------------------------------------- */

struct message {
	struct fuse_out_header head;
	union {
		struct fuse_notify_inval_entry_out entry;
		struct fuse_notify_inval_inode_out inode;
	};
	char name[256 + 8];
};

static size_t compose(const struct drop *d, struct message *m)
{
	size_t len;

	if (d->name_len) {
		char *name = (char *)&m->entry + sizeof(m->entry);

		m->entry = (struct fuse_notify_inval_entry_out){ .parent = d->ino,
								 .namelen = d->name_len };
		memcpy(name, d->name, d->name_len);
		name[d->name_len] = '\0';
		len = sizeof(m->head) + sizeof(m->entry) + d->name_len + 1;
		m->head = (struct fuse_out_header){ .error = FUSE_NOTIFY_INVAL_ENTRY };
	} else {
		bool to_the_end = d->end > FILE_MAX_BYTES;

		m->inode = (struct fuse_notify_inval_inode_out){
			.ino = d->ino, .off = (int64_t)d->start,
			.len = to_the_end ? 0 : (int64_t)(d->end - d->start),
		};
		len = sizeof(m->head) + sizeof(m->inode);
		m->head = (struct fuse_out_header){ .error = FUSE_NOTIFY_INVAL_INODE };
	}
	m->head.len = (uint32_t)len;
	return len;
}

/* ENOENT, ENOTDIR: the kernel knows nothing of it. */
static void say(struct drops *d, const struct drop *drop)
{
	struct message m;
	size_t len = compose(drop, &m);

	if (d->send(d->fd, &m, len) < 0 && !bridge_nobody_waits(errno) && errno != ENOTDIR)
		log_msg(LOG_WARN, "the kernel refused a notification: %s", strerror(errno));
}

static void *run(void *arg)
{
	struct lane *l = arg;
	struct drops *d = l->d;

	pthread_setname_np(pthread_self(), l == &d->lane[NAMES] ? "extfs-names" : "extfs-bytes");
	pthread_mutex_lock(&d->mutex);
	while (!d->stop) {
		struct drop *drop = take_first(l);

		if (!drop) {
			pthread_cond_wait(&l->wake, &d->mutex);
			continue;
		}
		pthread_mutex_unlock(&d->mutex);
		say(d, drop);
		free(drop);
		pthread_mutex_lock(&d->mutex);
		d->sent++;
	}
	pthread_mutex_unlock(&d->mutex);
	return NULL;
}

/* ---- too many names ------------------------------------------------------------------------- */

static bool inc_epoch(struct drops *d)
{
	struct fuse_out_header head = { .len = sizeof(head), .error = FUSE_NOTIFY_INC_EPOCH };

	return d->send(d->fd, &head, sizeof(head)) >= 0 || bridge_nobody_waits(errno);
}

/* mutex held, and free for a moment. True: the kernel will ask for every name anew, also for
 * those that have changed just now and are not pending yet. */
static bool drop_all_names(struct drops *d)
{
	struct lane *l = &d->lane[NAMES];
	struct drop *all, *next;
	bool done;

	if (d->no_epoch)
		return false;
	all = take_all(l);
	pthread_mutex_unlock(&d->mutex);
	done = inc_epoch(d);
	if (done)
		free_all(all);
	pthread_mutex_lock(&d->mutex);
	if (done) {
		d->epochs++;
		return true;
	}
	d->no_epoch = true;
	for (; all; all = next) {
		next = all->next;
		append(l, all);
	}
	return false;
}

/* mutex held. */
static void forget(struct drops *d)
{
	d->forgotten++;
	if (!d->warned)
		log_msg(LOG_WARN,
			"too many names changed over NFS while a directory was in use: some may "
			"look unchanged here");
	d->warned = true;
}

/* ---- interface ------------------------------------------------------------------------------ */

static int start(struct drops *d, unsigned i)
{
	struct lane *l = &d->lane[i];
	int err;

	l->d = d;
	l->tail = &l->head;
	pthread_cond_init(&l->wake, NULL);
	err = -pthread_create(&l->thread, NULL, run, l);
	l->started = !err;
	return err;
}

int drops_create(int fd, unsigned names_max,
		 ssize_t (*send)(int fd, const void *message, size_t len), struct drops **out)
{
	struct drops *d = calloc(1, sizeof(*d));
	int err = 0;

	if (!d)
		return -ENOMEM;
	d->fd = fd;
	d->names_max = names_max;
	d->send = send;
	pthread_mutex_init(&d->mutex, NULL);
	for (unsigned i = 0; i < LANES && !err; i++)
		err = start(d, i);
	if (err) {
		drops_destroy(d);
		return err;
	}
	*out = d;
	return 0;
}

void drops_destroy(struct drops *d)
{
	if (!d)
		return;
	pthread_mutex_lock(&d->mutex);
	d->stop = true;
	for (unsigned i = 0; i < LANES; i++)
		if (d->lane[i].started)
			pthread_cond_signal(&d->lane[i].wake);
	pthread_mutex_unlock(&d->mutex);
	for (unsigned i = 0; i < LANES; i++) {
		if (!d->lane[i].d)
			continue;
		if (d->lane[i].started)
			pthread_join(d->lane[i].thread, NULL);
		free_all(d->lane[i].head);
		pthread_cond_destroy(&d->lane[i].wake);
	}
	pthread_mutex_destroy(&d->mutex);
	free(d);
}

void drops_name(struct drops *d, inum_t dir, const char *name, size_t len)
{
	struct lane *l = &d->lane[NAMES];
	struct drop *drop;

	xassert(len > 0 && len < 256);
	pthread_mutex_lock(&d->mutex);
	if (!find(l, dir, name, (unsigned)len)) {
		drop = malloc(sizeof(*drop) + len);
		if ((drop && l->n < d->names_max) || !drop_all_names(d)) {
			if (drop && l->n < DROPS_NAMES_HARD) {
				*drop = (struct drop){ .ino = dir, .name_len = (unsigned)len };
				memcpy(drop->name, name, len);
				append(l, drop);
				drop = NULL;
			} else {
				forget(d);
			}
		}
		free(drop);
	}
	pthread_mutex_unlock(&d->mutex);
}

void drops_bytes(struct drops *d, inum_t ino, uint64_t start, uint64_t end)
{
	struct lane *l = &d->lane[BYTES];
	struct drop *drop;

	xassert(start < end);
	pthread_mutex_lock(&d->mutex);
	drop = find(l, ino, "", 0);
	if (drop) {
		drop->start = MIN(drop->start, start);
		drop->end = MAX(drop->end, end);
	} else if ((drop = malloc(sizeof(*drop)))) {
		*drop = (struct drop){ .ino = ino, .start = start, .end = end };
		append(l, drop);
	} else {
		forget(d);
	}
	pthread_mutex_unlock(&d->mutex);
}

void drops_get(struct drops *d, struct drops_look *out)
{
	pthread_mutex_lock(&d->mutex);
	*out = (struct drops_look){ .names = d->lane[NAMES].n, .inodes = d->lane[BYTES].n,
				    .sent = d->sent,
				    .epochs = d->epochs, .forgotten = d->forgotten };
	pthread_mutex_unlock(&d->mutex);
}
