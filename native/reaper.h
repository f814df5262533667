/* SPDX-License-Identifier: MIT
 *
 * reaper.h - the thread that finishes in the background what was decided in one transaction: freeing the blocks of orphans whose last
 * user has gone, and intents (truncate, punch of many extents). Works in rolling transactions with ALLOC_USE_RESERVE;
 * after a crash the orphan and intent trees say what is left.
 */
#ifndef EXTFS_REAPER_H
#define EXTFS_REAPER_H

#include "inode.h"

/* Starts the thread and has it go through TREE_INTENT and TREE_ORPHAN. Not on a read-only mount. */
int reaper_start(struct fs *fs);
/* Finishes the transaction it is in, then stops; what is left stays on disk. */
void reaper_stop(struct fs *fs);
/* An orphan without users; takes over the caller's reference. Any thread, no locks. */
void reaper_orphan(struct fs *fs, struct inode *in);
/* Wait until nothing is queued (tests, unmount, ENOSPC). Blocking. */
void reaper_drain(struct fs *fs);
/* True while something is queued or under way: an allocation that fails may be worth a wait. Lock-free. */
bool reaper_busy(struct fs *fs);

/* Record an intent in a transaction; its id to *id. And remove it in the last one. */
int intent_add(struct trans *t, const struct intent_disk *rec, uint64_t *id);
int intent_del(struct trans *t, uint64_t id);

#endif
