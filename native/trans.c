/* SPDX-License-Identifier: MIT
 *
 * trans.c - transactions: joining, committing to the running group, undoing.
 *
 * Invariants, while a transaction runs:
 *  1. fs->lock is held exclusively by its thread, from trans_begin() to trans_commit() or
 *     trans_cancel().
 *  2. Every joined buf is pinned once by the transaction, has owner set, and a preimage unless it
 *     is fresh.
 *  3. The state of a joined buf (CLEAN, DIRTY, LOGGED) is that of before the join: only the commit
 *     changes it. So a cancel restores contents and types alone, and no journal work ever sees half
 *     a transaction.
 *  4. running group + joined blocks fit the log: reserved blocks were promised by jrn_reserve(),
 *     and a join beyond them asks again.
 */
#include "trans.h"

#include <string.h>

#include "alloc.h"
#include "fs.h"
#include "journal.h"
#include "log.h"
#include "trans_pool.h"

/* Pages kept for the next transaction; beyond that they go back to the system. */
#define PREIMAGES_KEPT 128u

int trans_pool_create(struct fs *fs)
{
	fs->trans_pool = calloc(1, sizeof(*fs->trans_pool));
	return fs->trans_pool ? 0 : -ENOMEM;
}

void trans_pool_destroy(struct fs *fs)
{
	struct trans_pool *p = fs->trans_pool;

	if (!p)
		return;
	xassert(!p->in_use);
	while (p->free_pages) {
		void *page = p->free_pages;
		p->free_pages = *(void **)page;
		io_free(page);
	}
	free(p->bufs);
	free(p->freed);
	free(p->saved);
	free(p->arena);
	free(p->hooks);
	free(p);
	fs->trans_pool = NULL;
}

/* Room for one more element; *array keeps its old content when this fails. */
static int grow(void *array, unsigned used, unsigned *cap, size_t size)
{
	unsigned want = *cap ? *cap * 2 : 64;
	void **a = array;
	void *p;

	if (used < *cap)
		return 0;
	p = realloc(*a, want * size);
	if (!p)
		return -ENOMEM;
	*a = p;
	*cap = want;
	return 0;
}

static void *preimage_get(struct trans_pool *p)
{
	void *page = p->free_pages;

	if (!page)
		return io_alloc(BLOCK_SIZE);
	p->free_pages = *(void **)page;
	p->nfree_pages--;
	return page;
}

static void preimage_put(struct trans_pool *p, void *page)
{
	if (!page)
		return;
	if (p->nfree_pages >= PREIMAGES_KEPT) {
		io_free(page);
		return;
	}
	*(void **)page = p->free_pages;
	p->free_pages = page;
	p->nfree_pages++;
}

int trans_begin(struct fs *fs, struct trans *t, unsigned blocks)
{
	int err;

	xassert(blocks > 0 && blocks <= TRANS_MAX_BLOCKS);
	if (fs->read_only)
		return -EROFS;
	fs_wrlock(fs);
	err = fs_is_shutdown(fs) ? -ERR_SHUTDOWN : jrn_reserve(fs, blocks);
	if (err) {
		fs_unlock(fs);
		return err;
	}
	xassert(!fs->trans_pool->in_use);
	*t = (struct trans){.fs = fs, .reserved = blocks, .pool = fs->trans_pool};
	t->pool->in_use = true;
	t->pool->nfreed = t->pool->nsaved = t->pool->nhooks = 0;
	t->pool->arena_used = 0;
	return 0;
}

/* The caller's worst case was wrong. The operation can still be whole: ask for a little more. */
static int extend_reservation(struct trans *t)
{
	int err = jrn_reserve(t->fs, t->joined + 16);

	if (err)
		return err;
	log_msg(LOG_WARN, "a transaction needs more than the %u blocks it reserved", t->reserved);
	t->reserved = t->joined + 16;
	return 0;
}

int trans_join_as(struct trans *t, struct buf *b, bool fresh)
{
	struct trans_pool *p = t->pool;
	int err;

	if (b->owner) {
		xassert(b->owner == t);
		return 0;
	}
	xassert(!b->detached && !b->preimage && !b->forgotten);
	if (t->joined >= t->reserved) {
		err = extend_reservation(t);
		if (err)
			return err;
	}
	err = grow(&p->bufs, t->joined, &p->bufs_cap, sizeof(*p->bufs));
	if (err)
		return err;
	if (!fresh) {
		b->preimage = preimage_get(p);
		if (!b->preimage)
			return -ENOMEM;
		memcpy(b->preimage, b->data, BLOCK_SIZE);
	}
	b->pre_type = b->type;
	b->fresh = fresh;
	b->owner = t;
	buf_pin(b);
	p->bufs[t->joined++] = b;
	return 0;
}

int trans_join(struct trans *t, struct buf *b)
{
	/* The block is free in this transaction: only buf_new() makes it something again. Who comes
	 * here has followed a second pointer to it. */
	if (unlikely(b->forgotten)) {
		fs_shutdown_writes(t->fs, -ERR_FREE_CORRUPT, "metadata block %llu has two owners",
				   (unsigned long long)b->block);
		return -ERR_FREE_CORRUPT;
	}
	return trans_join_as(t, b, false);
}

int trans_on_end(struct trans *t, void (*fn)(void *arg, xid_t xid), void *arg)
{
	struct trans_pool *p = t->pool;
	int err = grow(&p->hooks, p->nhooks, &p->hooks_cap, sizeof(*p->hooks));

	if (!err)
		p->hooks[p->nhooks++] = (struct trans_hook){fn, arg};
	return err;
}

int trans_note_free(struct trans *t, fsblock_t start, nblocks_t len, bool meta)
{
	struct trans_pool *p = t->pool;
	int err = grow(&p->freed, p->nfreed, &p->freed_cap, sizeof(*p->freed));

	if (!err)
		p->freed[p->nfreed++] = (struct trans_freed){start, len, meta};
	return err;
}

int trans_save(struct trans *t, void *mem, size_t len)
{
	struct trans_pool *p = t->pool;
	int err;

	for (unsigned i = 0; i < p->nsaved; i++)
		if (p->saved[i].p == mem) {
			xassert(p->saved[i].len == len);
			return 0;
		}
	err = grow(&p->saved, p->nsaved, &p->saved_cap, sizeof(*p->saved));
	if (err)
		return err;
	if (p->arena_cap - p->arena_used < len) {
		size_t want = (p->arena_cap + len) * 2;
		char *arena = realloc(p->arena, want);
		if (!arena)
			return -ENOMEM;
		p->arena = arena;
		p->arena_cap = want;
	}
	memcpy(p->arena + p->arena_used, mem, len);
	p->saved[p->nsaved++] = (struct trans_saved){mem, len, p->arena_used};
	p->arena_used += len;
	return 0;
}

static void leave(struct trans *t, struct buf *b)
{
	preimage_put(t->pool, b->preimage);
	b->preimage = NULL;
	b->owner = NULL;
	b->fresh = false;
	b->forgotten = false;
}

static void finish(struct trans *t)
{
	struct fs *fs = t->fs;

	t->pool->in_use = false;
	t->pool = NULL;
	fs_unlock(fs);
}

xid_t trans_commit(struct trans *t)
{
	struct trans_pool *p = t->pool;
	struct fs *fs = t->fs;
	xid_t xid = jrn_running(fs);

	for (unsigned i = 0; i < t->joined; i++) {
		struct buf *b = p->bufs[i];
		bool forgotten = b->forgotten;

		leave(t, b);
		if (forgotten)
			jrn_buf_forget(fs, b);
		else
			jrn_buf_dirty(fs, b);
		buf_put(b);
	}
	for (unsigned i = 0; i < p->nfreed; i++)
		alloc_busy_add(fs, p->freed[i].start, p->freed[i].len, p->freed[i].meta, xid);
	for (unsigned i = 0; i < p->nhooks; i++)
		p->hooks[i].fn(p->hooks[i].arg, xid);
	finish(t);
	return xid;
}

void trans_cancel(struct trans *t)
{
	struct trans_pool *p = t->pool;

	for (unsigned i = t->joined; i-- > 0;) {
		struct buf *b = p->bufs[i];
		bool fresh = b->fresh;

		if (!fresh) {
			memcpy(b->data, b->preimage, BLOCK_SIZE);
			b->type = b->pre_type;
		}
		leave(t, b);
		if (fresh)
			buf_detach(b);
		buf_put(b);
	}
	for (unsigned i = p->nsaved; i-- > 0;)
		memcpy(p->saved[i].p, p->arena + p->saved[i].at, p->saved[i].len);
	for (unsigned i = p->nhooks; i-- > 0;)
		p->hooks[i].fn(p->hooks[i].arg, 0);
	finish(t);
}
