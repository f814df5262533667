/* SPDX-License-Identifier: MIT
 *
 * alloc_priv.h - what the files of the allocator share.
 *
 *   alloc.c            opening, choice of an AG, the reserve, the public calls
 *   alloc_ag.c         the free trees and the freelist of one AG
 *   alloc_busy.c       free blocks that must not be handed out yet
 *   alloc_window.c     free blocks kept for files that grow
 *   alloc_quarantine.c blocks that a holder may still reach
 *
 * All under fs->lock held exclusively.
 */
#ifndef EXTFS_ALLOC_PRIV_H
#define EXTFS_ALLOC_PRIV_H

#include <bsd/sys/tree.h>
#include <sys/queue.h>

#include "alloc.h"
#include "btree.h"
#include "fs.h"

/* ---- busy extents ---- */

struct busy {
	RB_ENTRY(busy) tree; /* by start; entries never overlap */
	TAILQ_ENTRY(busy) age; /* by xid, never falling */
	fsblock_t start;
	nblocks_t len;
	xid_t xid;
	bool meta;
};
RB_HEAD(busy_tree, busy);
TAILQ_HEAD(busy_list, busy);

struct busy_set {
	struct busy_tree tree;
	struct busy_list ages[2]; /* [meta] */
	_Atomic uint64_t blocks;
};

#define BUSY_DATA 0x1u
#define BUSY_META 0x2u

void busy_init(struct busy_set *set);
void busy_clear(struct busy_set *set);
/* Newest xid so far. 0 or -ENOMEM. */
int busy_add(struct busy_set *set, fsblock_t start, nblocks_t len, bool meta, xid_t xid);
/* Forget entries whose group has come far enough. */
void busy_expire(struct busy_set *set, xid_t durable, xid_t checkpointed);
/* Within [start, start + len): the first piece of at least `want` blocks that is not busy, else the
 * longest piece (*run 0: none). *seen gets BUSY_* for what was cut off on the way. */
void busy_find_run(struct busy_set *set, fsblock_t start, nblocks_t len, nblocks_t want,
		   fsblock_t *run_start, nblocks_t *run, unsigned *seen);

/* ---- windows ---- */

struct free_extent { fsblock_t start; nblocks_t len; };

#define WINDOWS_MAX 64u

struct window {
	fsblock_t start;
	nblocks_t len, grown; /* grown: what the file was given in a row before it */
	inum_t ino;
};

struct window_set {
	pthread_mutex_t mutex;
	struct window windows[WINDOWS_MAX];
	unsigned count;
};

void window_init(struct window_set *set);
void window_destroy(struct window_set *set);
/* `run` was given to the file; what follows it is free up to free_end. avail: blocks that users may have. */
void window_grow(struct window_set *set, inum_t ino, struct free_extent run, fsblock_t free_end, nblocks_t avail);
void window_drop(struct window_set *set, inum_t ino);
void window_clear(struct window_set *set);
/* Blocks from start on, at most len, that are in no window of another inode. */
nblocks_t window_room(struct window_set *set, inum_t ino, fsblock_t start, nblocks_t len);
/* The longest part of [start, start + len) without windows of others; false: there is none. */
bool window_gap(struct window_set *set, inum_t ino, fsblock_t start, nblocks_t len, struct free_extent *gap);

/* ---- allocation groups ---- */

struct ag {
	uint32_t no;
	struct buf *buf;       /* header, pinned */
	nblocks_t longest_max; /* no free extent of this AG is longer; UINT64_MAX: not known */
};

struct alloc_state {
	struct ag *ags;
	uint32_t count;
	nblocks_t reserve;
	_Atomic nblocks_t freelists; /* blocks on all freelists */
	struct busy_set busy;
	struct window_set windows;
	inum_t grows;         /* whose window does not count in the search that runs; 0: nobody's */
	bool windows_hold;    /* the search leaves the windows of others alone */
	uint32_t rotor;       /* AG of the last data allocation without goal */
	bool hooked;          /* the running transaction will tell us how it ended */
	bool stale;           /* it was cancelled: freelists and longest_max are to be found again */
};

static inline struct ag_disk *ag_disk(const struct ag *ag) { return ag->buf->data; }
static inline struct alloc_state *alloc_of(const struct fs *fs) { return fs->alloc; }

/* Bring the freelist to what one allocation or free can take from it. -ENOSPC: the AG has not
 * enough. */
int ag_fill(struct trans *t, struct ag *ag);
/* Free blocks without the freelist. */
nblocks_t ag_tree_blocks(const struct ag *ag);
/* Where to allocate: a run of `want` non-busy blocks; if there is none run->len is 0. */
int ag_find_near(struct fs *fs, struct ag *ag, fsblock_t goal, nblocks_t min, nblocks_t want,
		 struct free_extent *ext, struct free_extent *run, unsigned *seen);
int ag_find_fit(struct fs *fs, struct ag *ag, nblocks_t want, struct free_extent *ext,
		struct free_extent *run, unsigned *seen);
/* The longest run of at least min, roughly: of the longest extents the best run. */
int ag_find_longest(struct fs *fs, struct ag *ag, nblocks_t min, struct free_extent *ext,
		    struct free_extent *run, unsigned *seen);
/* The shortest free extent, busy or not. -ENOENT. */
int ag_find_shortest(struct fs *fs, struct ag *ag, struct free_extent *ext);
/* Take `run` out of the free extent `ext`, counters included. */
int ag_take(struct trans *t, struct ag *ag, struct free_extent ext, struct free_extent run);
/* Give blocks back: double free check, coalescing, counters, busy, freelist. */
int ag_give(struct trans *t, struct ag *ag, struct free_extent ext, bool meta);

#endif
