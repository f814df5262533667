/* SPDX-License-Identifier: MIT
 *
 * reaper.h - the thread that finishes in the background what was decided in one transaction:
 * freeing the blocks of orphans whose last user has gone, and intents (truncate, punch, moves of
 * many extents) that a crash cut off. Works in rolling transactions with ALLOC_USE_RESERVE; after a
 * crash the orphan and intent trees say what is left.
 *
 * While the system runs, the operation that wrote an intent finishes it itself. Those found at
 * mount hold a MAP segment of their range from before fs_open() returns until they are finished, so
 * nobody sees the extents that are still to go or to move. A read-only mount, which cannot finish
 * them, is refused while there are some that would show a mix of old and new.
 *
 * Concurrency: a mutex of its own, a leaf, for the queue and the waiters.
 */
#ifndef EXTFS_REAPER_H
#define EXTFS_REAPER_H

#include "inode.h"

/* Takes the intents of TREE_INTENT, with their segments: before the grants of before the restart
 * enter the trees, which would keep them out. Read-only: -EROFS when there is one that has to be
 * finished first. */
int reaper_prepare(struct fs *fs);
/* Starts the thread, which works off the intents and goes through TREE_ORPHAN: after
 * layouts_open(), which knows what must not become free. */
int reaper_start(struct fs *fs);
/* Finishes the transaction it is in, then stops; what is left stays on disk. */
void reaper_stop(struct fs *fs);
/* Once no other thread of the filesystem runs: until then the journal thread may still hand over an
 * orphan. */
void reaper_destroy(struct fs *fs);
/* An orphan without users; takes over the caller's reference. Any thread, no locks. */
void reaper_orphan(struct fs *fs, struct inode *in);
/* Wait until nothing is queued (tests, unmount, ENOSPC). Blocking. */
void reaper_drain(struct fs *fs);
/* True while something is queued or under way: an allocation that fails may be worth a wait.
 * Lock-free. */
bool reaper_busy(struct fs *fs);

/* Park until the reaper has finished one more file or intent. 0: it is idle; else ERR_PARKED, op
 * will be resumed. */
struct reaper_waiter {
	struct op *op;
	struct reaper_waiter *next;
};
int reaper_wait(struct fs *fs, struct reaper_waiter *w);

/* Record an intent in a transaction; its id to *id. And remove it in the last one. */
int intent_add(struct trans *t, const struct intent_disk *rec, uint64_t *id);
int intent_del(struct trans *t, uint64_t id);
/* After each piece of the work: when something is left, *id (0: none yet) says now what; else it is
 * removed. */
int intent_keep(struct trans *t, const struct intent_disk *rec, bool left, uint64_t *id);

#endif
