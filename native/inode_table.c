/* SPDX-License-Identifier: MIT
 *
 * inode_table.c - the in-memory inodes: finding, counting, evicting, and who is the last user of an
 * orphan.
 *
 * used: an inode with refs > 0. nameless: core.nlink == 0. known: its lookup count is above 0.
 * Invariants, whenever the mutex is free:
 *  1. at most one object of a number is in the hash;
 *  2. an object is on the LRU list exactly when it is unused, not lazy, not nameless; only those
 *     are evicted;
 *  3. an object is on the lazy list exactly when in->lazy;
 *  4. nameless, unused and not known: the object is handed to the reaper (dying) at that very
 *     moment, once, by whoever took away the last use (inode_put) or the last lookup
 *     (inode_lookup_forget). From then on inode_get() answers -ENOENT, so nobody revives it;
 *  5. an object that is read again has xid, shrink_xid and moved_xid no older than the evicted one had, or
 *     fsync would return too early;
 *  6. core.nlink of an unused object does not change: who changes it holds a reference. So it may
 *     be read here without fs->lock.
 */
#include "inode_table.h"

#include <string.h>
#include <sys/stat.h>

#include "alloc.h"
#include "btree.h"
#include "errors.h"
#include "log.h"
#include "plock.h"
#include "reaper.h"
#include "segment.h"

#define BUCKETS_MIN 1024u
/* Objects that leave at one hold of the mutex: when a reference is given back, and when the cache
 * shrinks. */
#define EVICT_AT_ONCE 16u
#define SHRINK_AT_ONCE 256u

struct inode *inode_alloc(struct fs *fs, inum_t ino)
{
	struct inode *in = calloc(1, sizeof(*in));

	if (!in)
		return NULL;
	in->fs = fs;
	in->ino = ino;
	in->refs = 1;
	atomic_store(&in->told, true); /* by an earlier object, for all we know */
	atomic_store(&in->map_gen, atomic_fetch_add(&fs->next_map_gen, 1) + 1);
	pthread_mutex_init(&in->lock, NULL);
	return in;
}

void inode_free(struct inode *in)
{
	xassert(!in->delegations && !in->delegation_waits);
	alloc_grown(in->fs, in->ino);
	if (in->segs)
		seg_tree_free(in);
	if (in->locks)
		plock_set_free(in);
	pthread_mutex_destroy(&in->lock);
	free(in);
}

static uint64_t free_list(struct inode *in)
{
	uint64_t n = 0;

	for (; in; n++) {
		struct inode *next = in->hash_next;

		inode_free(in);
		in = next;
	}
	return n;
}

/* ---- lists; all with the mutex held ---- */

static uint64_t bucket_of(const struct inode_table *it, inum_t ino)
{
	return (ino * 0x9e3779b97f4a7c15ULL >> 20) & (it->buckets - 1);
}

static struct inode *find(const struct inode_table *it, inum_t ino)
{
	struct inode *in = it->hash[bucket_of(it, ino)];

	while (in && in->ino != ino)
		in = in->hash_next;
	return in;
}

static void rehash(struct inode_table *it, uint64_t buckets)
{
	struct inode **old = it->hash, **bigger = calloc(buckets, sizeof(*bigger));
	uint64_t old_buckets = it->buckets;

	if (!bigger)
		return; /* longer chains, nothing worse */
	it->hash = bigger;
	it->buckets = buckets;
	for (uint64_t i = 0; i < old_buckets; i++) {
		while (old[i]) {
			struct inode *in = old[i];
			uint64_t to = bucket_of(it, in->ino);

			old[i] = in->hash_next;
			in->hash_next = bigger[to];
			bigger[to] = in;
		}
	}
	free(old);
}

void inode_table_insert(struct inode_table *it, struct inode *in)
{
	uint64_t to;

	if (it->count >= it->buckets)
		rehash(it, it->buckets * 2);
	to = bucket_of(it, in->ino);
	in->hash_next = it->hash[to];
	it->hash[to] = in;
	in->hashed = true;
	it->count++;
}

static void unhash(struct inode_table *it, struct inode *in)
{
	struct inode **at = &it->hash[bucket_of(it, in->ino)];

	while (*at != in) {
		xassert(*at != NULL);
		at = &(*at)->hash_next;
	}
	*at = in->hash_next;
	in->hash_next = NULL;
	in->hashed = false;
	it->count--;
	if (it->buckets > BUCKETS_MIN && it->count < it->buckets / 8)
		rehash(it, it->buckets / 2);
}

static bool on_lru(const struct inode_table *it, const struct inode *in)
{
	return in->lru_prev || in->lru_next || it->lru_head == in;
}

static void lru_add(struct inode_table *it, struct inode *in)
{
	xassert(!on_lru(it, in));
	in->lru_next = it->lru_head;
	if (it->lru_head)
		it->lru_head->lru_prev = in;
	else
		it->lru_tail = in;
	it->lru_head = in;
	it->lru_count++;
}

static void lru_del(struct inode_table *it, struct inode *in)
{
	if (!on_lru(it, in))
		return;
	*(in->lru_prev ? &in->lru_prev->lru_next : &it->lru_head) = in->lru_next;
	*(in->lru_next ? &in->lru_next->lru_prev : &it->lru_tail) = in->lru_prev;
	in->lru_prev = in->lru_next = NULL;
	it->lru_count--;
}

static void lazy_del(struct inode_table *it, struct inode *in)
{
	*(in->lazy_prev ? &in->lazy_prev->lazy_next : &it->lazy_head) = in->lazy_next;
	*(in->lazy_next ? &in->lazy_next->lazy_prev : &it->lazy_tail) = in->lazy_prev;
	in->lazy_prev = in->lazy_next = NULL;
	it->lazy_count--;
	in->lazy = false;
}

static void lazy_add(struct inode_table *it, struct inode *in)
{
	in->lazy_prev = it->lazy_tail;
	*(it->lazy_tail ? &it->lazy_tail->lazy_next : &it->lazy_head) = in;
	it->lazy_tail = in;
	it->lazy_count++;
	in->lazy = true;
}

static void use(struct inode_table *it, struct inode *in)
{
	lru_del(it, in);
	in->refs++;
}

/* Take evicted objects out of the table, at most so many; the caller frees the list (by hash_next)
 * without the mutex. */
static struct inode *evict(struct inode_table *it, unsigned most)
{
	struct inode *victims = NULL;

	while (it->lru_count > it->limit && most--) {
		struct inode *in = it->lru_tail;

		xassert(in->refs == 0 && !in->lazy);
		lru_del(it, in);
		unhash(it, in);
		it->evicted_xid = MAX(it->evicted_xid, in->xid);
		it->evicted_shrink_xid = MAX(it->evicted_shrink_xid, in->shrink_xid);
		it->evicted_moved_xid = MAX(it->evicted_moved_xid, in->moved_xid);
		in->hash_next = victims;
		victims = in;
	}
	return victims;
}

/* Invariant 4. True: dying and referenced for the reaper, which the caller calls without the
 * mutex. */
static bool claim_orphan(struct inode_table *it, struct inode *in)
{
	struct fs *fs = it->fs;

	if (in->refs != 0 || in->core.nlink != 0 || in->dying || in->deleted || !fs->reaper ||
	    fs->read_only)
		return false;
	if (lookup_table_count(&it->lookups, in->ino) != 0)
		return false;
	lru_del(it, in);
	if (in->lazy)
		lazy_del(it, in); /* nobody will ask for its times */
	in->dying = true;
	in->refs = 1;
	return true;
}

/* ---- the table ---- */

int inode_table_create(struct fs *fs)
{
	struct inode_table *it = calloc(1, sizeof(*it));

	if (!it)
		return -ENOMEM;
	it->fs = fs;
	it->limit = fs->opt.inode_cache;
	it->buckets = BUCKETS_MIN;
	it->hash = calloc(it->buckets, sizeof(*it->hash));
	if (!it->hash) {
		free(it);
		return -ENOMEM;
	}
	pthread_mutex_init(&it->mutex, NULL);
	/* Not those of an earlier mount either. */
	atomic_store(&fs->next_map_gen, (uint64_t)time_now().sec << 24);
	fs->inodes = it;
	return 0;
}

void inode_table_destroy(struct fs *fs)
{
	struct inode_table *it = fs->inodes;

	if (!it)
		return;
	for (uint64_t i = 0; i < it->buckets; i++)
		free_list(it->hash[i]);
	lookup_table_clear(&it->lookups);
	pthread_mutex_destroy(&it->mutex);
	free(it->hash);
	free(it);
	fs->inodes = NULL;
}

/* What the code relies on: sizes that can be rounded up and added to, times that are times. */
static bool plausible(const struct inode_core *core)
{
	static const uint32_t nsec_end = 1000000000;

	if (core->atime.nsec >= nsec_end || core->mtime.nsec >= nsec_end ||
	    core->ctime.nsec >= nsec_end || core->btime.nsec >= nsec_end)
		return false;
	switch (core->mode & S_IFMT) {
	case S_IFREG:
		return core->size <= FILE_MAX_BYTES;
	case S_IFLNK:
		return core->size <= SYMLINK_MAX;
	case S_IFDIR:
	case S_IFCHR:
	case S_IFBLK:
	case S_IFIFO:
	case S_IFSOCK:
		return true;
	default:
		return false;
	}
}

static int read_core(struct fs *fs, inum_t ino, struct inode_core *core)
{
	struct inode_disk d;
	unsigned len;
	/* 0 is none everywhere, whatever the tree holds. */
	int err = !ino ? -ENOENT :
			 bt_lookup(fs_tree(fs, TREE_INODE), KEY(ino, 0), &d, sizeof(d), &len);

	if (err)
		return err;
	if (len != sizeof(d)) {
		fs_shutdown_writes(fs, -ERR_RECORD_SHAPE, "inode %llu: record of %u bytes",
				   (unsigned long long)ino, len);
		return -ERR_RECORD_SHAPE;
	}
	inode_decode(&d, core);
	if (!plausible(core)) {
		fs_shutdown_writes(fs, -ERR_RECORD_SHAPE, "inode %llu: impossible record",
				   (unsigned long long)ino);
		return -ERR_RECORD_SHAPE;
	}
	return 0;
}

/* 0: referenced; -ENOENT: being deleted; -EAGAIN: not in memory. */
static int get_cached(struct inode_table *it, inum_t ino, struct inode **out)
{
	struct inode *in;
	int err = -EAGAIN;

	pthread_mutex_lock(&it->mutex);
	in = find(it, ino);
	if (in && (in->dying || in->deleted)) {
		err = -ENOENT;
	} else if (in) {
		use(it, in);
		*out = in;
		err = 0;
	}
	pthread_mutex_unlock(&it->mutex);
	return err;
}

int inode_get(struct fs *fs, inum_t ino, struct inode **out)
{
	struct inode_table *it = fs->inodes;
	struct inode *in, *other;
	int err = get_cached(it, ino, out);

	if (err != -EAGAIN)
		return err;
	in = inode_alloc(fs, ino);
	if (!in)
		return -ENOMEM;
	/* The record cannot change before the object is in the table: fs->lock is held. */
	err = read_core(fs, ino, &in->core);
	if (err) {
		inode_free(in);
		return err;
	}
	pthread_mutex_lock(&it->mutex);
	other = find(it, ino);
	if (!other) {
		in->xid = it->evicted_xid;
		in->shrink_xid = it->evicted_shrink_xid;
		in->moved_xid = it->evicted_moved_xid;
		/* While it was out of memory the kernel may have kept pages of it. */
		atomic_store(&in->pages_cached, lookup_table_count(&it->lookups, ino) != 0);
		inode_table_insert(it, in);
	} else if (other->dying || other->deleted) {
		err = -ENOENT;
	} else {
		use(it, other);
	}
	pthread_mutex_unlock(&it->mutex);
	if (other) {
		inode_free(in);
		in = other;
	}
	if (!err)
		*out = in;
	return err;
}

int inode_peek(struct fs *fs, inum_t ino, struct inode_core *core)
{
	struct inode *in;
	int err = get_cached(fs->inodes, ino, &in);

	if (err == -EAGAIN)
		return read_core(fs, ino, core);
	if (err)
		return err;
	pthread_mutex_lock(&in->lock);
	*core = in->core;
	atomic_store(&in->told, true);
	pthread_mutex_unlock(&in->lock);
	inode_put(in);
	return 0;
}

struct inode *inode_get_cached(struct fs *fs, inum_t ino)
{
	struct inode *in;

	return get_cached(fs->inodes, ino, &in) ? NULL : in;
}

int inode_get_handle(struct fs *fs, inum_t ino, uint32_t generation, struct inode **out)
{
	struct inode *in = NULL;
	int err;

	fs_rdlock(fs);
	err = inode_get(fs, ino, &in);
	if (!err && in->core.generation != generation)
		err = -ENOENT;
	fs_unlock(fs);
	if (!err)
		*out = in;
	else if (in)
		inode_put(in);
	return err == -ENOENT ? -ERR_STALE_HANDLE : err;
}

struct inode *inode_ref(struct inode *in)
{
	struct inode_table *it = in->fs->inodes;

	pthread_mutex_lock(&it->mutex);
	xassert(in->refs > 0);
	in->refs++;
	pthread_mutex_unlock(&it->mutex);
	return in;
}

static void put_counted(struct inode *in)
{
	struct inode_table *it = in->fs->inodes;
	struct inode *victims = NULL;
	bool orphan = false;

	pthread_mutex_lock(&it->mutex);
	xassert(in->refs > in->opens);
	if (--in->refs == 0) {
		if (in->deleted || in->dying) {
			/* dying, not deleted: the reaper gave up (stopped, or an error); what is
			 * left stays on disk. */
			if (in->lazy)
				lazy_del(it, in);
			if (in->hashed)
				unhash(it, in);
			victims = in;
		} else if (in->core.nlink == 0) {
			orphan = claim_orphan(it, in);
		} else if (!in->lazy) {
			lru_add(it, in);
			victims = evict(it, EVICT_AT_ONCE);
		}
	}
	pthread_mutex_unlock(&it->mutex);
	free_list(victims);
	if (orphan)
		reaper_orphan(in->fs, in);
}

void inode_put(struct inode *in)
{
	put_counted(in);
}

uint64_t inode_cache_limit(struct fs *fs, uint64_t inodes)
{
	struct inode_table *it = fs->inodes;
	struct inode *victims;
	uint64_t left = 0;

	do {
		pthread_mutex_lock(&it->mutex);
		it->limit = MIN(inodes, fs->opt.inode_cache);
		victims = evict(it, SHRINK_AT_ONCE);
		pthread_mutex_unlock(&it->mutex);
		left += free_list(victims);
	} while (victims);
	return left;
}

void inode_open(struct inode *in)
{
	struct inode_table *it = in->fs->inodes;

	pthread_mutex_lock(&it->mutex);
	xassert(in->refs > 0);
	in->refs++;
	in->opens++;
	pthread_mutex_unlock(&it->mutex);
}

bool inode_is_open(struct inode *in)
{
	struct inode_table *it = in->fs->inodes;
	bool open;

	pthread_mutex_lock(&it->mutex);
	open = in->opens > 0;
	pthread_mutex_unlock(&it->mutex);
	return open;
}

void inode_close(struct inode *in)
{
	struct inode_table *it = in->fs->inodes;
	bool last, nameless = false;

	/* The open goes first, its reference later: in between the holders of layouts are told. */
	pthread_mutex_lock(&it->mutex);
	xassert(in->opens > 0);
	last = --in->opens == 0;
	pthread_mutex_unlock(&it->mutex);
	if (last)
		alloc_grown(in->fs, in->ino);
	if (last && in->fs->layout_hooks && seg_any(in)) {
		fs_rdlock(in->fs);
		nameless = in->core.nlink == 0;
		fs_unlock(in->fs);
	}
	if (nameless)
		in->fs->layout_hooks->unlinked(in);
	put_counted(in);
}

void inode_table_withdraw(struct inode *in)
{
	struct inode_table *it = in->fs->inodes;

	pthread_mutex_lock(&it->mutex);
	in->deleted = true;
	if (in->lazy)
		lazy_del(it, in);
	if (in->hashed)
		unhash(it, in);
	pthread_mutex_unlock(&it->mutex);
}

/* ---- lazily written inodes ---- */

void inode_table_set_lazy(struct inode *in, bool lazy)
{
	struct inode_table *it = in->fs->inodes;

	pthread_mutex_lock(&it->mutex);
	if (lazy && !in->lazy) {
		xassert(in->refs > 0);
		lazy_add(it, in);
	} else if (!lazy && in->lazy) {
		lazy_del(it, in);
	}
	pthread_mutex_unlock(&it->mutex);
}

unsigned inode_table_oldest_lazy(struct inode_table *it, struct inode **out, unsigned max)
{
	unsigned n = 0;

	pthread_mutex_lock(&it->mutex);
	for (struct inode *in = it->lazy_head; in && n < max; in = in->lazy_next) {
		use(it, in);
		out[n++] = in;
	}
	pthread_mutex_unlock(&it->mutex);
	return n;
}

/* ---- lookup counts ---- */

void inode_lookup_add(struct fs *fs, inum_t ino, uint64_t n)
{
	struct inode_table *it = fs->inodes;
	int err;

	pthread_mutex_lock(&it->mutex);
	err = lookup_table_add(&it->lookups, ino, n);
	pthread_mutex_unlock(&it->mutex);
	/* The kernel may then ask for a number that is gone, and is told so: numbers are not
	 * reused. */
	if (err)
		log_msg(LOG_ERROR, "no memory to count lookups of inode %llu",
			(unsigned long long)ino);
}

bool inode_lookup_forget(struct fs *fs, inum_t ino, uint64_t n)
{
	struct inode_table *it = fs->inodes;
	struct inode *in = NULL;
	bool orphan = false, gone;

	pthread_mutex_lock(&it->mutex);
	gone = lookup_table_sub(&it->lookups, ino, n) == 0;
	if (gone) {
		/* A nameless inode with lookups is always in memory (invariant 2). */
		in = find(it, ino);
		orphan = in && claim_orphan(it, in);
	}
	pthread_mutex_unlock(&it->mutex);
	if (orphan)
		reaper_orphan(fs, in);
	return gone;
}

void inode_lookup_forget_all(struct fs *fs)
{
	struct inode_table *it = fs->inodes;
	struct inode *orphans = NULL, *next;

	pthread_mutex_lock(&it->mutex);
	lookup_table_clear(&it->lookups);
	/* lazy_next links what was claimed: claimed objects are not on the lazy list. */
	for (uint64_t i = 0; i < it->buckets; i++) {
		for (struct inode *in = it->hash[i]; in; in = in->hash_next) {
			if (claim_orphan(it, in)) {
				in->lazy_next = orphans;
				orphans = in;
			}
		}
	}
	pthread_mutex_unlock(&it->mutex);
	for (; orphans; orphans = next) {
		next = orphans->lazy_next;
		orphans->lazy_next = NULL;
		reaper_orphan(fs, orphans);
	}
}

uint64_t inode_lookup_entries(struct fs *fs)
{
	struct inode_stats st;

	inode_get_stats(fs, &st);
	return st.lookups;
}

void inode_get_stats(struct fs *fs, struct inode_stats *st)
{
	struct inode_table *it = fs->inodes;

	pthread_mutex_lock(&it->mutex);
	*st = (struct inode_stats){
		.cached = it->count,
		.unused = it->lru_count,
		.lazy = it->lazy_count,
		.lookups = it->lookups.entries,
		.lookup_bytes = it->lookups.capacity * sizeof(struct lookup_slot),
		.limit = it->limit,
	};
	pthread_mutex_unlock(&it->mutex);
}
