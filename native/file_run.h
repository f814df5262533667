/* SPDX-License-Identifier: MIT
 *
 * file_run.h - private to file*.c: the running state of one file operation and the machines that
 * operations are put together from.
 *
 * An operation is a chain of steps. A step does what it can without waiting, sets r->step to the
 * one that follows, and says STEP_NEXT (go on now), STEP_PARKED (whatever it parked on will resume
 * the operation at r->step) or STEP_DONE. A step that finds the journal full or blocks busy parks
 * and is run again from its beginning: so a step changes its own progress fields only after its
 * transaction was committed.
 *
 * Machines (read_begin, write_begin, tail_begin, remove_begin) are chains that end in the step the
 * caller gave as `then`, with r->err set when they failed. They expect the segments to be held. At
 * most one of each kind runs at a time in an operation; write uses its own reads.
 *
 * Concurrency: a run belongs to the thread of its ioctx. Only file_cancel() looks at it from
 * elsewhere, at the segments alone, through inode->lock. A run goes back to its thread's pool after
 * done() returned, so a caller that takes an operation out of its table inside done() may call
 * file_cancel() under that table's lock.
 */
#ifndef EXTFS_FILE_RUN_H
#define EXTFS_FILE_RUN_H

#include "alloc.h"
#include "extmap.h"
#include "refcount.h"
#include "file.h"
#include "file_early.h"
#include "reaper.h"

enum step { STEP_NEXT, STEP_PARKED, STEP_DONE };
struct file_run;
typedef enum step (*step_fn)(struct file_run *r);

/* One device transfer, or (zero) a piece of memory to be cleared in its place. */
struct part {
	struct dev_io io;
	struct file_run *run;
	bool zero;
};
#define PARTS_KEPT 64u /* a pooled run keeps room for so many */

/* Read [off, off + len) of in to buf, zeros where nothing was written. got: bytes, cut at EOF. */
struct read_body {
	struct inode *in;
	uint64_t off, len;
	uint8_t *buf;
	size_t cap; /* bytes at buf that may be overwritten, >= len */
	bool atime;
	step_fn then;
	uint64_t got;
	void *bounce;
	size_t bounce_len, pad;
};

/* Write buf (NULL: zeros) to [off, end). Old EOF must not lie in a block before that of off, unless
 * !grow. */
struct write_body {
	struct inode *in;
	uint64_t off, end; /* end shrinks when space runs out after the first block */
	const void *buf;
	bool grow;         /* the size may rise to end */
	unsigned touch;    /* TOUCH_*; what the conversion writes along with it */
	step_fn then;
	bool touched;      /* a transaction has set the times */
	bool early;        /* it may be answered before its data is written */
	/* progress */
	uint64_t size;     /* before */
	fileblk_t b0, b1, at, stage_end;
	bool cow, unwritten;
	bool settling;     /* settle_xid is final */
	xid_t settle_xid;  /* nothing is overwritten in place before this group is durable */
	uint64_t intent;   /* id; 0: none */
	const uint8_t *out; /* what goes to the device from byte b0 on */
	void *bounce;
	size_t bounce_len;
};

/* Unmap [file, end) of a fork, in as many transactions as it takes. */
struct remove_body {
	struct inode *in;
	enum fork fork;
	fileblk_t file, end;
	uint32_t intent_type;
	uint64_t intent; /* id of the record that a crash leaves; 0: none yet */
	step_fn then;
};

struct hole { fileblk_t file; nblocks_t len; };

struct fallocate_state {
	fileblk_t b0, b1;   /* blocks touched at all */
	uint64_t off, end;  /* bytes, end clamped */
	fileblk_t at;
	nblocks_t needed;
	struct hole *holes; /* filled so far, for the way back */
	size_t nholes, cap;
	int undo_err;
};

struct copy_state {
	uint64_t pos, len;
	uint64_t piece;
	nblocks_t limit; /* blocks that one transaction can share: it falls and rises by trying */
	bool whole_tail; /* the source's partial last block may be shared */
	void *mem;
};

/* file_remap.h. The id of the intent comes first in both. */
struct exchange_state { uint64_t intent; fileblk_t a, b; nblocks_t left; };
struct shift_state { uint64_t intent; fileblk_t at, end; nblocks_t by; };
union remap_state { uint64_t intent; struct exchange_state ex; struct shift_state sh; };
struct remap_kind;
struct remap_run { const struct remap_kind *kind; union remap_state state; };
struct dedupe_state { uint64_t pos, end; nblocks_t limit; void *mem[2]; };
/* layout_get.c, layout_commit.c, layout_return.c: private to them */
struct layout_get_state {
	struct holder *holder; /* holder_enter() */
	struct grant *spare[3];
	fileblk_t b0, b1;      /* wanted; b1 falls */
	uint64_t low;          /* the segment begins here: at b0, or at EOF's block */
	xid_t xid;             /* durable before the answer */
	bool settling;         /* xid knows what was there when the segment was held */
	bool tail_done;
	nblocks_t allocated;
	uint64_t began;        /* layout_ticks() */
};
struct layout_commit_state {
	struct holder *holder;
	unsigned at;           /* range, and block in it, that come next */
	fileblk_t block;
	nblocks_t blocks;      /* converted so far */
	uint64_t hull_start, hull_end;       /* of the ranges; of the whole grant when that is ATOMIC */
	uint64_t touched_start, touched_end; /* of the grants */
	bool valid;            /* checked under the segment that is held */
	bool atomic, plain, ghost; /* what kinds of grants */
	bool unprivileged;     /* setuid and the like are gone */
	uint64_t intent;
	xid_t xid;
	uint64_t began;
};
struct layout_return_state {
	uint64_t start, stop;  /* of the grants that go */
	unsigned kinds;
	bool rw;
	struct file_op *one;   /* RETURN of everything: of one inode after the other */
	struct layout_args *one_args;
	uint64_t began;
};
struct layout_revoke_state { fileblk_t at, b1; nblocks_t len; fsblock_t from; void *mem; uint64_t intent; };
struct layout_trim_state { fileblk_t at; };

/* layout_pages.c: what of [start, end) the kernel is to drop for an operation. */
struct page_drop {
	struct inode *in;
	uint64_t start, end;
	struct seg_span spans[16]; /* of those who are parked, as they were looked at last */
	unsigned n, rounds;
	struct page_wait wait;
	step_fn then;
};

struct file_run {
	struct file_op *fop;
	struct fs *fs;
	step_fn step;
	int err;
	_Atomic bool cancelled;
	struct seg seg[2];
	struct inode *seg_in[2]; /* constant from file_start() on */
	/* waiting */
	struct jrn_waiter waiter;
	struct reaper_waiter reaper_waiter;
	unsigned space_tries, reaper_tries; /* since the last allocation that succeeded */
	xid_t busy_xid;
	uint64_t flush_mark; /* dev->writes_done that must be flushed */
	bool fua;            /* data goes to stable storage at once: an fsync is going to follow */
	step_fn durable_then, tail_then;
	struct inode *durable_of;
	/* device I/O */
	unsigned ios_left;
	int io_err;
	unsigned nparts;
	struct early_waiter early_waiter;
	struct early_write *early; /* its caller has the answer */
	/* what the operation is doing */
	uint64_t low; /* the segment has to begin at or below this byte */
	enum seg_kind kind;
	unsigned edge;
	union {
		struct fallocate_state fa;
		struct copy_state cp;
		struct remap_run mv;
		struct dedupe_state de;
		struct layout_get_state lg;
		struct layout_commit_state lc;
		struct layout_return_state lr;
		struct layout_revoke_state lv;
		struct layout_trim_state lt;
	};
	struct read_body rd;
	struct write_body wr;
	struct remove_body rm;
	/* survives reuse */
	struct part *parts;
	unsigned parts_cap;
	struct file_run *pool_next;
	struct page_drop pd; /* set by whoever needs it: too large to be cleared each time */
};

/* file_run.c: the pool, parking, device I/O */
void run_go(struct file_run *r);
void run_resume(struct op *op);
struct file_run *run_get(void);
void run_put(struct file_run *r);
/* Memory aligned for I/O from the thread's cache; give it back in the same thread. NULL when out of
 * memory. */
void *run_mem_get(size_t len);
void run_mem_put(void *mem, size_t len);

/* Segment i on `in`. STEP_NEXT: held. */
enum step run_acquire(struct file_run *r, unsigned i, enum seg_kind kind, uint64_t start,
		      uint64_t end);
void run_release(struct file_run *r, unsigned i);

/* Device transfers: list them (memory stays valid until they are complete), then submit all at
 * once. */
int run_part(struct file_run *r, enum io_kind kind, uint64_t dev_offset, void *mem, uint64_t len);
int run_part_zero(struct file_run *r, void *mem, uint64_t len);
/* How many transfers a run_part() of so many bytes is, and room for so many when none is listed: then run_part() does not fail. */
nblocks_t run_pieces(const struct file_run *r, uint64_t len);
bool run_parts_room(struct file_run *r, nblocks_t n);
enum step run_submit(struct file_run *r, step_fn then);

enum step run_end(struct file_run *r, int64_t result);
/* Give others a turn between the transactions of a long operation. */
enum step run_yield(struct file_run *r, step_fn next);
/* The step failed with rc. true: it can be tried again: *how says whether it parked (r->step
 * unchanged). false: rc stands (busy blocks have become -ENOSPC in *rc). */
bool run_retry(struct file_run *r, int *rc, enum step *how);
/* Cancel the transaction; remembers which group makes busy blocks free. Returns rc. */
int run_trans_fail(struct file_run *r, struct trans *t, int rc);
/* Wait until the group is durable. STEP_NEXT: it is. Otherwise parked, or r->err is set and
 * STEP_DONE means "do not go on". */
enum step run_await_xid(struct file_run *r, xid_t xid);
/* Everything of `in` (its metadata up to xid, and data written so far) on stable storage, then the
 * step. r->err. */
enum step run_durable(struct file_run *r, struct inode *in, step_fn then);

/* Bytes of a file that must not be rewritten in place yet: a truncate that cut them off is not
 * durable (file.h rule 3). */
static inline bool shrink_pending(struct inode *in)
{
	return unlikely(in->shrink_xid > jrn_durable(in->fs)) &&
	       in->fs->opt.mutant != MUTANT_TAIL_ZERO_EARLY;
}

/* file_read.c */
void read_setup(struct file_run *r, struct inode *in, uint64_t off, uint64_t len, void *buf,
		size_t cap,
		step_fn then);
enum step read_begin(struct file_run *r);
enum step file_read_start(struct file_run *r);

/* file_put.c */
enum step write_begin(struct file_run *r, struct inode *in, uint64_t off, uint64_t end,
		      const void *buf,
		      bool grow, unsigned touch, step_fn then);
/* Is any written block of [b0, b1) shared? fs->lock held. */
int range_shared(struct inode *in, fileblk_t b0, fileblk_t b1, bool *shared);
/* Is every block of [b0, b1) written? fs->lock held. */
int range_written(struct inode *in, fileblk_t b0, fileblk_t b1, bool *written);
/* file_tail.c. Zero the written bytes past EOF in its block when EOF is about to move up to `to`
 * (or a write to begin there). Within the same block only if asked: a write that begins there does
 * it itself. */
enum step tail_begin(struct file_run *r, struct inode *in, uint64_t to, bool same_block,
		     step_fn then);
/* file_early.c: the last step of a write that was answered early. */
enum step early_over(struct file_run *r);
/* file_write.c. Clear setuid, setgid and capabilities as FILE_F_KILL_PRIV asks. STEP_NEXT with
 * r->err: done or failed. */
enum step run_kill_priv(struct file_run *r, struct inode *in);

/* file_write.c, file_truncate.c, file_fallocate.c, file_copy.c, file_fsync.c */
enum step file_write_start(struct file_run *r);
enum step file_truncate_start(struct file_run *r);
enum step file_fallocate_start(struct file_run *r);
enum step file_copy_start(struct file_run *r);
enum step file_fsync_start(struct file_run *r);
enum step file_exchange_start(struct file_run *r);
enum step file_shift_start(struct file_run *r); /* COLLAPSE, INSERT */
enum step file_dedupe_start(struct file_run *r);

/* file_truncate.c. Inside a transaction of REMOVE_TRANS_BLOCKS: unmap what fits, keep the intent
 * record: added when something is left, removed with the last piece. *end: where the next call goes
 * on; == file when finished. */
#define REMOVE_TRANS_BLOCKS 384u
int remove_some(struct trans *t, struct inode *in, enum fork fork, fileblk_t file, fileblk_t *end,
		uint32_t intent_type, uint64_t *intent);
enum step remove_begin(struct file_run *r, struct inode *in, enum fork fork, fileblk_t file,
		       fileblk_t end,
		       uint32_t intent_type, uint64_t intent, step_fn then);
/* In the transaction that removes the last staged extent of an operation. */
int staging_end(struct trans *t, struct inode *in, uint64_t intent);
/* To be called in a transaction that may have dropped references of the inode's blocks, before its
 * commit. */
void note_unshare(struct inode *in);

/* layout_swap.c. Inside a transaction of REMOVE_TRANS_BLOCKS that joined the inode, with readers of [*a, end) kept out: what the
 * staging fork maps there replaces the data fork, as much as fits. *a: where the next call goes on. With the last piece the size
 * grows to `size` and the intent (id; 0: none) is removed; *a == end. The caller writes the inode. */
int atomic_some(struct trans *t, struct inode *in, fileblk_t *a, fileblk_t end, uint64_t size, uint64_t intent);

#endif
