/* SPDX-License-Identifier: MIT
 *
 * journal_impl.h - the journal's state, shared by journal*.c only. journal.c opens with definitions
 * and invariants.
 */
#ifndef EXTFS_JOURNAL_IMPL_H
#define EXTFS_JOURNAL_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "fs.h"
#include "journal.h"
#include "trans.h"

/* Images of one record. A format constant in effect: replay looks this far behind a break for a
 * sign of damage. */
#define JOURNAL_GROUP_MAX 4096u
/* Images written home between two looks at what else is to be done: bounds what a commit waits for
 * a checkpoint. */
#define CHECKPOINT_BATCH 1024u
#define CHECKPOINT_DEPTH 128u

struct buf_list {
	struct buf *first, *last;
	unsigned count;
};

/* A commit of more images is left to the journal thread: sealing them takes too long for a thread that
 * serves requests. */
#define LEAD_IMAGES 32u
/* As is one on a device whose flushes take longer: waking a thread twice is little beside them. */
#define LEAD_FLUSH_NS 300000u
#define LEAD_SPIN_NS 60000u

enum jrn_stop_how { JRN_RUN, JRN_STOP, JRN_ABANDON };
enum jrn_turn { TURN_NONE, TURN_THREAD, TURN_LEADER };

struct closed_group;

struct journal {
	struct fs *fs;
	fsblock_t start;       /* of the journal: header copy 0 */
	nblocks_t log_blocks;
	unsigned group_max;    /* images of a group at most */
	void (*prepare)(struct fs *fs);
	unsigned commit_ms;

	/* Change under fs->lock exclusive alone. */
	struct buf_list dirty;  /* the running group */
	struct buf_list logged; /* by rising log_lsn */
	lsn_t forgot_lsn;       /* oldest image of a block that the running group freed; 0: none */

	/* Change under fs->lock exclusive and the mutex: may be read under either. */
	lsn_t head;       /* where the next record begins */
	xid_t running;

	pthread_mutex_t mutex;
	pthread_cond_t work; /* for the journal thread */
	pthread_cond_t done; /* for blocking waiters */
	/* Under the mutex; tail and tail_xid are changed by the journal thread alone. */
	lsn_t tail;          /* of the durable header: replay would begin here */
	xid_t tail_xid;
	uint64_t head_seq;   /* of the header written last */
	bool in_flight;      /* a closed group is not durable yet */
	enum jrn_turn turn;  /* who commits, flushes for waiters or checkpoints just now */
	xid_t force_xid;     /* newest group that somebody waits for */
	bool close_early;    /* the running group has become big, or somebody needs its space */
	lsn_t target;        /* the tail is to move up to here */
	bool lazy;
	uint64_t deadline_ns, lazy_deadline_ns; /* CLOCK_MONOTONIC; of the running group */
	uint64_t wakes_ns;   /* when the sleeping thread looks by itself; 0: it does not sleep */
	struct jrn_waiter *waiters, *flush_waiters, *space_waiters;
	enum jrn_stop_how stop;
	bool thread_runs;
	int err;             /* why nothing becomes durable any more */
	struct jrn_stats stats;

	_Atomic unsigned ndirty; /* = dirty.count */
	_Atomic xid_t durable, checkpointed;
	/* Writes past the device's counts that were noted, and how many of them a flush has covered. */
	_Atomic uint64_t foreign_noted, foreign_flushed;
	_Atomic uint64_t flush_ns; /* what a flush takes: a moving mean */

	pthread_t thread;
	bool started;        /* to be joined; belongs to who starts and stops */

	/* Of whose turn it is. */
	bool after_commit;   /* the last thing done was a commit: a checkpoint comes first */
	lsn_t *record_lsn;   /* [xid & record_mask]: where the record of a live group begins */
	uint64_t record_mask;
	struct closed_group *closed;
	char *home_images;   /* CHECKPOINT_BATCH blocks */
	struct ioctx *ioctx;
};

/* Descriptors of a record with this many images; a forced group may have none. */
static inline unsigned jrn_descriptors(unsigned images)
{
	return images ? (images + JDESC_TAGS - 1) / JDESC_TAGS : 1;
}

static inline nblocks_t jrn_record_blocks(unsigned images)
{
	return images + jrn_descriptors(images);
}

/* Device offset of a log position, in bytes. */
static inline uint64_t jrn_log_offset(fsblock_t start, nblocks_t log_blocks, lsn_t lsn)
{
	return (start + 2 + lsn % log_blocks) << BLOCK_SHIFT;
}

static inline nblocks_t jrn_free(const struct journal *j)
{
	return j->log_blocks - (j->head - j->tail);
}

void assert_journal_state(const struct journal *j);

/* CLOCK_MONOTONIC */
uint64_t jrn_now_ns(void);
void buf_list_add(struct buf_list *l, struct buf *b);
void buf_list_del(struct buf_list *l, struct buf *b);

/* Would a group of this many images, at most, fit? Mutex held. */
bool jrn_fits(const struct journal *j, unsigned images);
/* Is the sleeping thread to be woken at the end of a turn? Mutex held. */
bool jrn_thread_due(struct journal *j);
/* Has anybody written past the device's counts since the last flush? */
bool jrn_foreign_writes(const struct journal *j);

/* A failed write, flush or verifier: nothing becomes durable from now on. No locks. */
void jrn_fail(struct journal *j, int err, const char *what);
/* Flush what was written before the call, by whomever. Any thread. */
int jrn_flush_device(struct journal *j);
/* Resume those waiters of a list whose group is at most upto. The mutex must not be held. */
void jrn_wake(struct journal *j, struct jrn_waiter **list, xid_t upto, int err);

/* journal_commit.c */
int commit_create(struct journal *j);
void commit_destroy(struct journal *j);
int commit_group(struct journal *j);

/* journal_checkpoint.c */
int checkpoint_batch(struct journal *j);
int write_home(struct device *dev, struct ioctx *ctx, const fsblock_t *blocks, char *images,
	       unsigned n);

/* journal_replay.c */
int jrn_write_header(struct device *dev, const uint8_t *uuid, fsblock_t start, nblocks_t log_blocks,
		     uint64_t seq, lsn_t tail, xid_t tail_xid);
int replay(struct journal *j, struct jrn_replay_report *report);

#endif
