/* SPDX-License-Identifier: MIT
 *
 * trans_pool.h - what a running transaction remembers, shared by trans.c and buffer.c only.
 *
 * One transaction runs at a time, so the lists live with the filesystem, keep their memory from one
 * transaction to the next, and the hot path allocates nothing. All of it belongs to the holder of
 * fs->lock (exclusive).
 */
#ifndef EXTFS_TRANS_POOL_H
#define EXTFS_TRANS_POOL_H

#include "trans.h"

struct trans_freed {
	fsblock_t start;
	nblocks_t len;
	bool meta;
};

/* Memory saved for a cancel: the copy lies in the arena at this offset. */
struct trans_saved {
	void *p;
	size_t len;
	size_t at;
};

struct trans_hook {
	void (*fn)(void *arg, xid_t xid);
	void *arg;
};

struct trans_pool {
	bool in_use;
	struct buf **bufs; /* joined, each with one pin of the transaction */
	unsigned bufs_cap;
	struct trans_freed *freed;
	unsigned nfreed, freed_cap;
	struct trans_saved *saved;
	unsigned nsaved, saved_cap;
	char *arena;
	size_t arena_used, arena_cap;
	struct trans_hook *hooks;
	unsigned nhooks, hooks_cap;
	void *free_pages; /* preimages, linked through their first word */
	unsigned nfree_pages;
};

/* trans_join(), for a buf that this transaction may have created (fresh: there is nothing to
 * restore). */
int trans_join_as(struct trans *t, struct buf *b, bool fresh);

#endif
