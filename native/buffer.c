/* SPDX-License-Identifier: MIT
 *
 * buffer.c - the verified cache of metadata blocks.
 *
 * Definitions. A buf is cached when the hash table finds it; detached when not, and then it only
 * lives for those who still pin it. It is loading from its insertion until its read was verified.
 *
 * Invariants:
 *  1. At most one cached buf for a block.
 *  2. Cached and CLEAN and not loading <=> in the clock ring. So eviction never walks over blocks
 *     that it must not drop, however many the journal keeps here.
 *  3. A buf that is joined, DIRTY or LOGGED is cached, or pinned by the journal's checkpoint.
 *  4. pins, the ring, the hash table, loading and detached change under the cache mutex only.
 *     No I/O happens under it.
 *  5. A loading buf is pinned by its reader. Whoever finds it waits for the end of the read.
 */
#include "buffer.h"

#include <pthread.h>
#include <sched.h>
#include <string.h>

#include "buffer_pages.h"
#include "crc32c.h"
#include "device.h"
#include "fs.h"
#include "log.h"
#include "trans_pool.h"

#define LIMIT_MIN 64u
/* Steps of the clock at one hold of the mutex: when a block is wanted, and when the cache shrinks. */
#define EVICT_STEPS 256u
#define SHRINK_STEPS 512u

struct buf_cache {
	struct fs *fs;
	pthread_mutex_t mutex;
	pthread_cond_t loaded;
	struct buf **hash;
	uint64_t hash_mask;
	uint64_t limit, asked; /* bufs; limit <= asked: less while memory is short */
	uint64_t bufs, dirty, logged;
	uint64_t ring_count;
	struct buf *hand; /* of the clock; NULL: ring empty */
	struct page_pool pages;
	uint64_t hits, misses, evictions;
};

static uint64_t block_hash(const struct buf_cache *c, fsblock_t block)
{
	return (block * 0x9e3779b97f4a7c15ULL >> 20) & c->hash_mask;
}

/* ---- clock ring and hash table. Mutex held. ---- */

static void ring_add(struct buf_cache *c, struct buf *b)
{
	xassert(!b->ring_next);
	if (!c->hand) {
		b->ring_prev = b->ring_next = b;
		c->hand = b;
	} else {
		/* Just behind the hand: looked at last. */
		b->ring_next = c->hand;
		b->ring_prev = c->hand->ring_prev;
		b->ring_prev->ring_next = b;
		c->hand->ring_prev = b;
	}
	c->ring_count++;
}

static void ring_del(struct buf_cache *c, struct buf *b)
{
	if (!b->ring_next)
		return;
	if (b->ring_next == b) {
		c->hand = NULL;
	} else {
		b->ring_prev->ring_next = b->ring_next;
		b->ring_next->ring_prev = b->ring_prev;
		if (c->hand == b)
			c->hand = b->ring_next;
	}
	b->ring_prev = b->ring_next = NULL;
	c->ring_count--;
}

static struct buf *hash_find(struct buf_cache *c, fsblock_t block)
{
	struct buf *b = c->hash[block_hash(c, block)];

	while (b && b->block != block)
		b = b->hash_next;
	return b;
}

static void hash_add(struct buf_cache *c, struct buf *b)
{
	struct buf **head = &c->hash[block_hash(c, b->block)];

	b->hash_next = *head;
	*head = b;
}

static void hash_del(struct buf_cache *c, struct buf *b)
{
	struct buf **p = &c->hash[block_hash(c, b->block)];

	while (*p != b) {
		xassert(*p);
		p = &(*p)->hash_next;
	}
	*p = b->hash_next;
	b->hash_next = NULL;
}

static void buf_free(struct buf_cache *c, struct buf *b)
{
	xassert(b->pins == 0 && !b->ring_next && !b->list_next);
	pages_put(&c->pages, b->slab, b->data);
	free(b);
	c->bufs--;
}

static void detach_locked(struct buf_cache *c, struct buf *b)
{
	xassert(!b->detached);
	ring_del(c, b);
	hash_del(c, b);
	b->detached = true;
}

/* Make room for `more`, in so many steps of the clock; where that was not enough, the cache grows, and
 * whoever comes next goes on. What the journal keeps may fill the limit alone: an eighth of it
 * remains for the others, else each new block would push out the one before. */
static uint64_t evict(struct buf_cache *c, uint64_t more, uint64_t steps)
{
	uint64_t before = c->evictions;

	while (c->bufs + more > c->limit && c->ring_count > c->limit / 8 && steps--) {
		struct buf *b = c->hand;

		c->hand = b->ring_next;
		if (b->pins)
			continue;
		if (b->referenced) {
			b->referenced = false;
			continue;
		}
		xassert(b->state == BUF_CLEAN && b->log_lsn == 0 && !b->owner);
		detach_locked(c, b);
		buf_free(c, b);
		c->evictions++;
	}
	return c->evictions - before;
}

static struct buf *buf_create(struct buf_cache *c, fsblock_t block, const struct buf_type *type)
{
	evict(c, 1, EVICT_STEPS);
	struct buf *b = calloc(1, sizeof(*b));
	if (!b)
		return NULL;
	b->data = pages_get(&c->pages, &b->slab);
	if (!b->data) {
		free(b);
		return NULL;
	}
	b->cache = c;
	b->block = block;
	b->type = type;
	b->state = BUF_CLEAN;
	b->pins = 1;
	c->bufs++;
	hash_add(c, b);
	return b;
}

/* ---- life of the cache ---- */

int buf_cache_create(struct fs *fs, uint64_t limit)
{
	struct buf_cache *c = calloc(1, sizeof(*c));
	uint64_t slots = 1024;

	if (!c)
		return -ENOMEM;
	c->fs = fs;
	c->limit = c->asked = MAX(limit / BLOCK_SIZE, LIMIT_MIN);
	while (slots < c->limit && slots < (1u << 24))
		slots *= 2;
	c->hash = calloc(slots, sizeof(*c->hash));
	if (!c->hash) {
		free(c);
		return -ENOMEM;
	}
	c->hash_mask = slots - 1;
	pthread_mutex_init(&c->mutex, NULL);
	pthread_cond_init(&c->loaded, NULL);
	fs->cache = c;
	return 0;
}

void buf_cache_destroy(struct fs *fs)
{
	struct buf_cache *c = fs->cache;

	if (!c)
		return;
	for (uint64_t i = 0; i <= c->hash_mask; i++) {
		while (c->hash[i]) {
			struct buf *b = c->hash[i];

			xassert(!b->loading && !b->owner);
			detach_locked(c, b);
			b->pins = 0;
			b->list_prev = b->list_next = NULL;
			buf_free(c, b);
		}
	}
	xassert(c->bufs == 0); /* a detached buf is still pinned: somebody lost a pin */
	pages_destroy(&c->pages);
	pthread_cond_destroy(&c->loaded);
	pthread_mutex_destroy(&c->mutex);
	free(c->hash);
	free(c);
	fs->cache = NULL;
}

/* ---- shrinking ---- */

/* Whoever waits for the mutex gets it between two steps. */
static void step_aside(struct buf_cache *c)
{
	pthread_mutex_unlock(&c->mutex);
	sched_yield();
	pthread_mutex_lock(&c->mutex);
}

uint64_t buf_cache_limit(struct fs *fs, uint64_t bytes)
{
	struct buf_cache *c = fs->cache;
	struct page_slab *slab;
	uint64_t left = 0, taken, steps, slabs;

	pthread_mutex_lock(&c->mutex);
	c->limit = MIN(MAX(bytes / BLOCK_SIZE, LIMIT_MIN), c->asked);
	/* Two turns: the first may only clear what tells that blocks are used. */
	for (steps = 2 * c->ring_count; steps && c->bufs > c->limit;) {
		uint64_t now = MIN(steps, SHRINK_STEPS);

		left += evict(c, 0, now);
		steps -= now;
		step_aside(c);
	}
	/* Others free pages meanwhile: no more turns than there are slabs. */
	for (slabs = c->pages.slabs; slabs; slabs--) {
		slab = pages_take_warm(&c->pages, &taken);
		if (!slab)
			break;
		pthread_mutex_unlock(&c->mutex);
		pages_return(slab, taken);
		pthread_mutex_lock(&c->mutex);
		pages_put_cold(&c->pages, slab, taken);
	}
	pthread_mutex_unlock(&c->mutex);
	return left;
}

/* ---- verification ---- */

int meta_verify(const void *block, uint32_t magic, fsblock_t blockno, const uint8_t *uuid,
		uint64_t owner_or_any)
{
	const struct meta_hdr *h = block;
	static const uint32_t zero;
	uint32_t crc;

	if (get32(h->magic) != magic)
		return -ERR_META_MAGIC;
	crc = crc32c(0, block, offsetof(struct meta_hdr, crc));
	crc = crc32c(crc, &zero, sizeof(zero));
	crc = crc32c(crc, &h->block, BLOCK_SIZE - offsetof(struct meta_hdr, block));
	if (crc != get32(h->crc))
		return -ERR_META_CRC;
	if (get64(h->block) != blockno)
		return -ERR_META_BLOCKNO;
	if (memcmp(h->uuid, uuid, FORMAT_UUID_LEN))
		return -ERR_META_UUID;
	if (owner_or_any != OWNER_ANY && get64(h->owner) != owner_or_any)
		return -ERR_META_OWNER;
	return 0;
}

void meta_seal(void *block, lsn_t lsn)
{
	struct meta_hdr *h = block;

	h->lsn = put64(lsn);
	h->crc = put32(0);
	h->crc = put32(crc32c(0, block, BLOCK_SIZE));
}

_Thread_local bool buf_unasked;

static void report_damage(struct fs *fs, fsblock_t block, const struct buf_type *type, int err)
{
	if (buf_unasked)
		return;
	log_msg(LOG_ERROR, "metadata block %llu (%s): %s (%s)", (unsigned long long)block,
		type->name, err_text(err), err_name(err));
	fs_shutdown_writes(fs, err, "metadata block %llu (%s) is unusable",
			   (unsigned long long)block, type->name);
}

static int verify(struct fs *fs, const struct buf *b, uint64_t owner)
{
	int err = meta_verify(b->data, b->type->magic, b->block, fs->super.uuid, owner);

	if (!err && b->type->verify)
		err = b->type->verify(fs, b->data);
	return err;
}

static int buf_load(struct fs *fs, struct buf *b, uint64_t owner)
{
	int err = dev_read(fs->dev, b->block << BLOCK_SHIFT, b->data, BLOCK_SIZE);

	buf_thread_misses++;
	return err ? err : verify(fs, b, owner);
}

/* ---- finding ---- */

/* A cached buf is what its first reader asked for; whoever asks for something else has followed a
 * wrong pointer. */
static int check_expectation(const struct buf *b, const struct buf_type *type, uint64_t owner)
{
	const struct meta_hdr *h = b->data;

	if (b->type != type)
		return -ERR_META_MAGIC;
	if (owner != OWNER_ANY && get64(h->owner) != owner)
		return -ERR_META_OWNER;
	return 0;
}

static void unpin_locked(struct buf_cache *c, struct buf *b)
{
	xassert(b->pins > 0);
	if (--b->pins == 0 && b->detached)
		buf_free(c, b);
}

/* Mutex held; b was found cached. Returns with the mutex released. */
static int get_cached(struct buf_cache *c, struct buf *b, const struct buf_type *type,
		      uint64_t owner, struct buf **out)
{
	fsblock_t block = b->block;
	int err;

	b->pins++;
	b->referenced = true;
	c->hits++;
	if (b->loading && dev_before_blocking.fn) {
		pthread_mutex_unlock(&c->mutex);
		dev_before_blocking.fn(dev_before_blocking.arg);
		pthread_mutex_lock(&c->mutex);
	}
	while (b->loading)
		pthread_cond_wait(&c->loaded, &c->mutex);
	err = b->load_error;
	if (err)
		unpin_locked(c, b);
	pthread_mutex_unlock(&c->mutex);
	if (err) { /* whoever read it may not have asked for it */
		if (!fs_is_shutdown(c->fs))
			report_damage(c->fs, block, type, err);
		return err;
	}
	err = check_expectation(b, type, owner);
	if (err) {
		report_damage(c->fs, block, type, err);
		buf_put(b);
		return err;
	}
	*out = b;
	return 0;
}

int buf_get(struct fs *fs, fsblock_t block, const struct buf_type *type, uint64_t owner,
	    struct buf **out)
{
	struct buf_cache *c = fs->cache;
	struct buf *b;
	int err;

	if (block >= fs->super.total_blocks) {
		report_damage(fs, block, type, -ERR_META_RANGE);
		return -ERR_META_RANGE;
	}
	pthread_mutex_lock(&c->mutex);
	b = hash_find(c, block);
	if (b)
		return get_cached(c, b, type, owner, out);
	c->misses++;
	b = buf_create(c, block, type);
	if (!b) {
		pthread_mutex_unlock(&c->mutex);
		return -ENOMEM;
	}
	b->loading = true;
	pthread_mutex_unlock(&c->mutex);

	err = buf_load(fs, b, owner);

	pthread_mutex_lock(&c->mutex);
	b->loading = false;
	b->load_error = err;
	pthread_cond_broadcast(&c->loaded);
	if (err) {
		detach_locked(c, b);
		unpin_locked(c, b);
	} else {
		ring_add(c, b);
	}
	pthread_mutex_unlock(&c->mutex);
	if (err) {
		report_damage(fs, block, type, err);
		return err;
	}
	*out = b;
	return 0;
}

/* ---- several at once ---- */

struct load {
	struct dev_io io;
	struct buf *b;
	unsigned *pending;
	int err;
};

static void load_done(struct dev_io *io)
{
	struct load *l = container_of(io, struct load, io);

	--*l->pending;
}

/* Buffers, loading, for those that nobody has. Returns how many. */
static unsigned create_many(struct buf_cache *c, const fsblock_t *blocks, unsigned n,
			    const struct buf_type *type, struct load *loads)
{
	unsigned m = 0;

	pthread_mutex_lock(&c->mutex);
	for (unsigned i = 0; i < n; i++) {
		struct buf *b = hash_find(c, blocks[i]);

		if (b && !i)
			break;
		if (b || blocks[i] >= c->fs->super.total_blocks)
			continue;
		b = buf_create(c, blocks[i], type);
		if (!b)
			break;
		b->loading = true;
		c->misses++;
		loads[m++].b = b;
	}
	pthread_mutex_unlock(&c->mutex);
	return m;
}

static void read_many(struct fs *fs, struct ioctx *ctx, struct load *loads, unsigned n)
{
	unsigned pending = n;

	for (unsigned i = 0; i < n; i++) {
		struct load *l = &loads[i];

		l->pending = &pending;
		l->io = (struct dev_io){.kind = IO_READ, .offset = l->b->block << BLOCK_SHIFT,
					.buf = l->b->data, .len = BLOCK_SIZE, .done = load_done};
		dev_submit(fs->dev, ctx, &l->io);
	}
	while (pending) {
		int ran = ioctx_run(ctx, true);

		xassert(ran >= 0 || ran == -EINTR);
	}
}

static void loaded_many(struct buf_cache *c, struct load *loads, unsigned n)
{
	pthread_mutex_lock(&c->mutex);
	for (unsigned i = 0; i < n; i++) {
		struct buf *b = loads[i].b;

		b->loading = false;
		b->load_error = loads[i].err;
		if (b->load_error)
			detach_locked(c, b);
		else
			ring_add(c, b);
		unpin_locked(c, b);
	}
	pthread_cond_broadcast(&c->loaded);
	pthread_mutex_unlock(&c->mutex);
}

_Thread_local bool buf_reads_ahead;
_Thread_local uint64_t buf_thread_misses;

void buf_get_ready(struct fs *fs, const fsblock_t *blocks, unsigned n, const struct buf_type *type,
		   uint64_t owner)
{
	struct ioctx *ctx = buf_reads_ahead ? ioctx_of_thread() : NULL;
	struct load loads[BUF_MANY] = {0};

	if (!ctx)
		return;
	n = create_many(fs->cache, blocks, MIN(n, BUF_MANY), type, loads);
	read_many(fs, ctx, loads, n);
	buf_thread_misses += n;
	for (unsigned i = 0; i < n; i++) {
		struct load *l = &loads[i];

		l->err = l->io.res ? l->io.res : verify(fs, l->b, owner);
	}
	loaded_many(fs->cache, loads, n);
}

void buf_pin(struct buf *b)
{
	pthread_mutex_lock(&b->cache->mutex);
	xassert(!b->loading && !b->detached);
	b->pins++;
	pthread_mutex_unlock(&b->cache->mutex);
}

void buf_put(struct buf *b)
{
	struct buf_cache *c = b->cache;

	pthread_mutex_lock(&c->mutex);
	unpin_locked(c, b);
	pthread_mutex_unlock(&c->mutex);
}

/* ---- changing ---- */

void buf_set_state(struct buf *b, enum buf_state state)
{
	struct buf_cache *c = b->cache;

	if (b->state == state)
		return;
	pthread_mutex_lock(&c->mutex);
	xassert(!b->detached && !b->loading);
	c->dirty += (uint64_t)(state == BUF_DIRTY) - (uint64_t)(b->state == BUF_DIRTY);
	c->logged += (uint64_t)(state == BUF_LOGGED) - (uint64_t)(b->state == BUF_LOGGED);
	if (state == BUF_CLEAN)
		ring_add(c, b);
	else
		ring_del(c, b);
	b->state = state;
	pthread_mutex_unlock(&c->mutex);
}

void buf_detach(struct buf *b)
{
	struct buf_cache *c = b->cache;

	pthread_mutex_lock(&c->mutex);
	xassert(b->pins > 0 && b->state == BUF_CLEAN && b->log_lsn == 0);
	detach_locked(c, b);
	pthread_mutex_unlock(&c->mutex);
}

int buf_new(struct trans *t, fsblock_t block, const struct buf_type *type, uint64_t owner,
	    struct buf **out)
{
	struct fs *fs = t->fs;
	struct buf_cache *c = fs->cache;
	struct meta_hdr *h;
	struct buf *b;
	bool fresh = false;
	int err;

	xassert(block < fs->super.total_blocks);
	pthread_mutex_lock(&c->mutex);
	b = hash_find(c, block);
	if (b) {
		/* Freed before in this very transaction: its old content is kept for a cancel. */
		xassert(!b->loading);
		if (!b->forgotten) {
			pthread_mutex_unlock(&c->mutex);
			fs_shutdown_writes(fs, -ERR_FREE_CORRUPT,
					   "metadata block %llu is in use and was free",
					   (unsigned long long)block);
			return -ERR_FREE_CORRUPT;
		}
		b->pins++;
	} else {
		b = buf_create(c, block, type);
		if (!b) {
			pthread_mutex_unlock(&c->mutex);
			return -ENOMEM;
		}
		ring_add(c, b);
		fresh = true;
	}
	pthread_mutex_unlock(&c->mutex);

	err = trans_join_as(t, b, fresh);
	if (err) {
		if (fresh)
			buf_detach(b);
		buf_put(b);
		return err;
	}
	b->type = type;
	b->forgotten = false;
	b->referenced = true;
	memset(b->data, 0, BLOCK_SIZE);
	h = b->data;
	h->magic = put32(type->magic);
	h->block = put64(block);
	memcpy(h->uuid, fs->super.uuid, FORMAT_UUID_LEN);
	h->owner = put64(owner);
	*out = b;
	return 0;
}

int buf_forget(struct trans *t, fsblock_t block)
{
	struct buf_cache *c = t->fs->cache;
	struct buf *b;
	int err = 0;

	pthread_mutex_lock(&c->mutex);
	b = hash_find(c, block);
	if (b) {
		xassert(!b->loading);
		b->pins++;
	}
	pthread_mutex_unlock(&c->mutex);
	if (!b)
		return 0;
	err = trans_join_as(t, b, false);
	if (!err)
		b->forgotten = true;
	buf_put(b);
	return err;
}

void buf_get_stats(struct fs *fs, struct buf_stats *st)
{
	struct buf_cache *c = fs->cache;

	pthread_mutex_lock(&c->mutex);
	*st = (struct buf_stats){.bufs = c->bufs, .dirty = c->dirty, .logged = c->logged,
				 .hits = c->hits, .misses = c->misses, .evictions = c->evictions,
				 .limit = c->limit, .asked = c->asked,
				 .resident = pages_resident(&c->pages, c->bufs)};
	pthread_mutex_unlock(&c->mutex);
}
