/* SPDX-License-Identifier: MIT
 *
 * buffer.h - the verified cache of metadata blocks.
 *
 * A buf is one metadata block in memory. It is read once, verified (magic, block number, uuid, crc,
 * owner; then the structure's own verifier), and from then on trusted until it is written.
 *
 * States: CLEAN (same as home on the device, evictable when unpinned) -> DIRTY (changed by the
 * running transaction group) -> LOGGED (its image is in the log, durable or being written; home is
 * older) -> CLEAN (checkpointed). A LOGGED buf that is changed again is DIRTY and still owes a home
 * write for its image: log_lsn says which record holds its newest image, 0 when home is current.
 *
 * Concurrency: contents and state change only under fs->lock held exclusively; contents are read
 * under fs->lock held at least shared, or, by the journal, from copies. Finding, pinning and
 * evicting use the cache's own mutex (a leaf), so shared holders of fs->lock may fault blocks in at
 * the same time. A buf must be pinned to be used.
 */
#ifndef EXTFS_BUFFER_H
#define EXTFS_BUFFER_H

#include "format.h"

struct buf_cache;
struct page_slab;
struct fs;
struct trans;

enum buf_state { BUF_CLEAN, BUF_DIRTY, BUF_LOGGED };

/* Checks a block after the header has been verified; 0 or a negative code. */
typedef int (*buf_verify_fn)(const struct fs *fs, const void *block);

/* What a caller expects to find. */
struct buf_type {
	const char *name;
	uint32_t magic;
	buf_verify_fn verify; /* after read and before write; may be NULL */
};

struct buf {
	struct buf_cache *cache;
	fsblock_t block;
	void *data; /* BLOCK_SIZE bytes, aligned for I/O */
	struct page_slab *slab; /* where that memory came from */
	const struct buf_type *type;
	enum buf_state state;
	unsigned pins;     /* under the cache mutex */
	bool referenced;   /* for the clock; under the cache mutex, as are the next three */
	bool loading;      /* being read; others wait until it is not */
	bool detached;     /* no longer in the cache: freed with its last pin */
	int load_error;    /* why the read failed; the buf is then detached */
	lsn_t log_lsn;     /* record with the newest image in the log; 0: none needed */
	struct trans *owner; /* transaction that has it joined now, else NULL */
	void *preimage;    /* content before that transaction; NULL when not joined, or fresh */
	const struct buf_type *pre_type; /* type before that transaction */
	bool fresh;        /* the transaction created it: nothing to restore */
	bool forgotten;    /* the transaction freed its block */
	struct buf *hash_next;
	struct buf *ring_prev, *ring_next;   /* clock ring of the CLEAN bufs */
	struct buf *list_prev, *list_next;   /* the journal's dirty or logged list, by state */
};

/* limit: bytes of block data that the cache may hold; dirty and logged blocks may exceed it up to
 * the journal's size, and then others may have an eighth of it beside them. */
int buf_cache_create(struct fs *fs, uint64_t limit);
/* From now on hold no more than so many bytes: never above the limit of creation, nor below 64
 * blocks. Clean unpinned blocks above it leave now, and the memory of whatever is free goes back to
 * the kernel; dirty, logged and pinned ones stay. Returns how many blocks left. Takes the mutex for
 * short steps, so others are not held up; milliseconds in all. No locks held. */
uint64_t buf_cache_limit(struct fs *fs, uint64_t bytes);
void buf_cache_destroy(struct fs *fs); /* drops everything, dirty or not */

/* Pinned buf of a block; read and verified when not cached. owner is compared with meta_hdr.owner.
 * fs->lock held (shared is enough). -ERR_META_*, -ERR_DEV_READ, -ENOMEM. On a verification error
 * the failed check and the block go to the log, and the filesystem turns read-only
 * (fs_shutdown_writes()). */
int buf_get(struct fs *fs, fsblock_t block, const struct buf_type *type, uint64_t owner,
	    struct buf **out);
/* Those of up to BUF_MANY blocks that are not cached are read at once, for buf_get() to find them. What fails is not kept,
 * and not told of: whoever waited for it meanwhile does that. Nothing is done when the first of them is cached, or the
 * thread has not set buf_reads_ahead. fs->lock held. */
#define BUF_MANY 16u
void buf_get_ready(struct fs *fs, const fsblock_t *blocks, unsigned n, const struct buf_type *type,
		   uint64_t owner);
/* Set by a thread that starts no I/O on ioctx_of_thread(): it reads blocks there that a tree's cursor comes to next. */
extern _Thread_local bool buf_reads_ahead;
/* Set while a thread works on what nobody has asked for: damage that it finds is left for whoever asks to find. */
extern _Thread_local bool buf_unasked;
/* Blocks that the thread had to read. */
extern _Thread_local uint64_t buf_thread_misses;
/* Pinned, zeroed buf for a block that was just allocated, joined to the transaction; header filled
 * in. -ERR_FREE_CORRUPT: it is in use, the free space records lie. */
int buf_new(struct trans *t, fsblock_t block, const struct buf_type *type, uint64_t owner,
	    struct buf **out);
void buf_put(struct buf *b);
/* The transaction frees this metadata block. When it commits, a cached buf of the block leaves the
 * cache: it is neither logged nor written home any more (until the transaction is durable, the log
 * keeps the image it had). Cancelling the transaction brings it back. buf_new() on the same block,
 * in the same transaction or later, starts afresh. The caller may still hold pins; the buf must not
 * be changed. 0 or -ENOMEM. */
int buf_forget(struct trans *t, fsblock_t block);
static inline void *buf_data(const struct buf *b) { return b->data; }

/* The header checks alone, on a raw image: used by the cache, the journal replay and mkfs. */
int meta_verify(const void *block, uint32_t magic, fsblock_t blockno, const uint8_t *uuid,
		uint64_t owner_or_any);
#define OWNER_ANY UINT64_MAX
/* Fill crc (and lsn) of an image that is about to be written. */
void meta_seal(void *block, lsn_t lsn);

/* For journal.c and trans.c. A further pin of a pinned buf, or of one whose state keeps it
 * cached. */
void buf_pin(struct buf *b);
/* Change of state; keeps the clock ring. fs->lock held exclusively. */
void buf_set_state(struct buf *b, enum buf_state state);
/* Take a pinned buf out of the cache; its memory goes with the last pin. fs->lock held
 * exclusively. */
void buf_detach(struct buf *b);

/* limit, asked: blocks; now, and at creation. resident: bytes that blocks and free pages take. */
struct buf_stats {
	uint64_t bufs, dirty, logged, hits, misses, evictions;
	uint64_t limit, asked, resident;
};
void buf_get_stats(struct fs *fs, struct buf_stats *st);

#endif
