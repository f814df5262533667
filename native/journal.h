/* SPDX-License-Identifier: MIT
 *
 * journal.h - write-ahead log of whole metadata blocks, with group commit, checkpoint and replay.
 *
 * All transactions since the last commit form the running group. The journal thread closes it
 * (under fs->lock, so between transactions), copies its dirty blocks, and without the lock: (1)
 * flushes the device if any data write completed since the last flush, (2) writes the commit record
 * with FUA. Then the group is durable and its waiters resume. One commit is in flight at a time;
 * everything that arrives meanwhile joins the next. A checkpoint writes LOGGED blocks home,
 * flushes, and then moves the tail in the journal header (FUA).
 *
 * Concurrency: journal state has its own mutex, taken after fs->lock. Waiters are records (struct
 * jrn_waiter) with an op that is resumed; no thread waits inside, except in jrn_force_blocking().
 */
#ifndef EXTFS_JOURNAL_H
#define EXTFS_JOURNAL_H

#include "device.h"
#include "format.h"

struct fs;
struct buf;

struct jrn_waiter {
	struct op *op;  /* resumed when done */
	/* The caller may do the journal's I/O itself, where a device answers faster than a thread wakes up. */
	bool lead;
	xid_t xid;      /* group to wait for; 0: only a device flush that begins after now */
	int err;        /* 0, or why it will never be durable */
	struct jrn_waiter *next;
	bool queued;
};

/* Create the on-disk journal (mkfs). */
int jrn_format(struct device *dev, const uint8_t *uuid, fsblock_t start, nblocks_t blocks);

struct jrn_replay_report {
	uint64_t records, images;
	lsn_t first, last; /* log positions */
	bool clean;        /* nothing to do */
};
/* Read the log, write every committed image home, flush, empty the log. Before anything else is
 * read from the device. read_only device with a non-empty log: -EROFS. -ERR_JOURNAL_CORRUPT. */
int jrn_open(struct fs *fs, struct jrn_replay_report *report);
/* Start the journal thread. commit_ms: the running group is committed after at most this long. */
int jrn_start(struct fs *fs, unsigned commit_ms);
/* Commit, checkpoint everything, leave an empty log (clean); stop the thread. With the fs shut
 * down: just stop. */
int jrn_stop(struct fs *fs);
/* Stop as a power cut would: no commit, no checkpoint. */
void jrn_abandon(struct fs *fs);
/* Free it; the thread has stopped or never ran. */
void jrn_close(struct fs *fs);

/* Called by trans.c with fs->lock held exclusively. */
int jrn_reserve(struct fs *fs, unsigned blocks);       /* -ERR_JOURNAL_FULL */
xid_t jrn_running(struct fs *fs);                       /* number of the running group */
void jrn_buf_dirty(struct fs *fs, struct buf *b);       /* joined buf of a committed transaction */

/* Joined buf whose block a committed transaction freed: leaves the cache. The tail stays before its
 * image in the log until the running group is durable. */
void jrn_buf_forget(struct fs *fs, struct buf *b);
/* Called in the journal thread before a group closes, without locks: writes back what is kept
 * lazily elsewhere (times). Set before jrn_start(). jrn_note_lazy(): something is kept lazily now;
 * the next timed commit is to come. Any thread, any lock. */
void jrn_set_prepare(struct fs *fs, void (*prepare)(struct fs *fs));
void jrn_note_lazy(struct fs *fs);

/* Ask for durability. Returns 0 when it holds, already or, with w->lead, by what this very call did;
 * ERR_PARKED when w->op will be resumed (w->err says how it went); or a negative code. Any thread;
 * fs->lock not held. */
int jrn_force(struct fs *fs, struct jrn_waiter *w);
/* A layout holder wrote to the device: this process did not see the write, so the next flush is not
 * to be spared. Before the transaction that converts what was written. Any thread. */
void jrn_note_foreign_write(struct fs *fs);
/* Take back a parked waiter; false: too late, it is being resumed. */
bool jrn_cancel(struct fs *fs, struct jrn_waiter *w);
/* Park until the log has room again (a checkpoint ended); 0 when it has room now, else
 * ERR_PARKED. */
int jrn_wait_space(struct fs *fs, struct jrn_waiter *w);
/* Blocking forms, for threads that serve nobody else (tests, tools, the reaper). */
int jrn_force_blocking(struct fs *fs, xid_t xid);
int jrn_wait_space_blocking(struct fs *fs);
/* Highest group that is durable. Lock-free. */
xid_t jrn_durable(struct fs *fs);
/* A group whose log images are all checkpointed: metadata blocks freed in it may become data.
 * Lock-free. */
xid_t jrn_checkpointed(struct fs *fs);
/* Have the next pass checkpoint as much as possible (fs full of busy blocks; tests). */
void jrn_kick_checkpoint(struct fs *fs);

struct jrn_stats {
	uint64_t commits, flush_only, images, checkpoints, home_writes;
	uint64_t led; /* commits and flushes, of those counted before, done by who asked for them */
	uint64_t log_blocks, log_used, waits_for_space;
};
void jrn_get_stats(struct fs *fs, struct jrn_stats *st);

/* Mutants for the power-loss proof; set in test builds only (EXTFS_MUTANTS). */
enum jrn_mutant { MUTANT_NONE, MUTANT_COMMIT_BEFORE_FLUSH, MUTANT_CHECKPOINT_NO_FLUSH,
		  MUTANT_META_REUSE_EARLY, MUTANT_TAIL_ZERO_EARLY,
		  /* of layouts (layout.h) */
		  MUTANT_STATE_BY_SIZE,      /* LAYOUT_GET calls blocks below EOF written, whatever the extent says */
		  MUTANT_COMMIT_UNCHECKED,   /* LAYOUT_COMMIT converts what nobody was granted */
		  MUTANT_QUARANTINE_DROPPED, /* what a lost holder can reach becomes free at once */
		  MUTANT_CONVERT_UNFLUSHED,  /* LAYOUT_COMMIT's conversion without a flush of the holder's data */
		  MUTANT_REVOKE_IN_PLACE,    /* a revoke leaves live blocks where they are */
		  MUTANT_HOLDERS_FORGOTTEN,  /* a restart forgets who held what */
		  MUTANT_READ_UNHELD,        /* the server's own reads hold no segment */
		  MUTANT_RIDER_APART };      /* a rider (rider.h) in a transaction of its own */

#endif
