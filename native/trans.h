/* SPDX-License-Identifier: MIT
 *
 * trans.h - a transaction: a change of metadata that happens whole or not at all.
 *
 * trans_begin() takes fs->lock exclusively and trans_commit() or trans_cancel() releases it:
 * transactions run one at a time and never wait for anything but metadata reads while they hold it.
 * So between two transactions the metadata in memory is always consistent, and the journal may
 * close the running group there.
 *
 * Every block a transaction changes is joined with trans_join() before the first change; the first
 * join keeps the block's previous content, so trans_cancel() restores everything, whatever failed
 * half-way: an operation may simply return its error. The same holds for in-memory inodes
 * (trans_join_inode).
 *
 * Commit here means: becomes part of the running group. It is durable when the journal has written
 * the group: jrn_*.
 */
#ifndef EXTFS_TRANS_H
#define EXTFS_TRANS_H

#include "buffer.h"

struct trans_pool;

struct trans {
	struct fs *fs;
	unsigned reserved;        /* blocks this transaction may dirty */
	unsigned joined;          /* blocks it has */
	unsigned alloc_flags;     /* ALLOC_* policy for metadata, set by the caller */
	/* For alloc_extent(): the file that is going to need the blocks behind, too (0: none), and whether the goal is just
	 * behind what it has. */
	inum_t grows;
	bool continues;
	struct trans_pool *pool;  /* its lists; lent by the filesystem: one runs at a time */
};

/* Worst-case number of blocks that an operation changes; each caller writes out why beside its
 * constant. One insert or delete in a global tree: height + 1 splits + the parent, about
 * TRANS_TREE_OP; each block allocated or freed changes one AG header and two free trees: about
 * TRANS_ALLOC_OP; both include the root block's share. */
#define TRANS_TREE_OP 8u
#define TRANS_ALLOC_OP 10u
#define TRANS_MAX_BLOCKS 512u

/* 0 with fs->lock held exclusively; or, with the lock not held: -ERR_JOURNAL_FULL (park with
 * jrn_wait_space(), start over), -EROFS, -ERR_SHUTDOWN. blocks <= TRANS_MAX_BLOCKS. */
int trans_begin(struct fs *fs, struct trans *t, unsigned blocks);
/* The lists of the running transaction: created and destroyed with the filesystem. */
int trans_pool_create(struct fs *fs);
void trans_pool_destroy(struct fs *fs);
/* Join a pinned buf: must precede the first change. The transaction takes its own pin.
 * -ENOMEM; -ERR_JOURNAL_FULL when the reservation was too small and the log has no more room. */
int trans_join(struct trans *t, struct buf *b);
/* Returns the group number in which the change becomes durable; releases the lock. Never fails. */
xid_t trans_commit(struct trans *t);
/* Undo everything; releases the lock. */
void trans_cancel(struct trans *t);
/* Call fn(arg, xid) at commit (xid > 0) or cancel (xid 0), with the lock still held: for in-memory
 * state that follows the outcome. */
int trans_on_end(struct trans *t, void (*fn)(void *arg, xid_t xid), void *arg);
/* An extent was freed: at commit it goes to alloc_busy_add() with the group's number. 0 or
 * -ENOMEM. */
int trans_note_free(struct trans *t, fsblock_t start, nblocks_t len, bool meta);
/* Keep a copy of len bytes at p, put back when the transaction is cancelled: for in-memory state
 * that mirrors metadata. The memory must outlive the transaction. 0 or -ENOMEM. */
int trans_save(struct trans *t, void *p, size_t len);
/* Blocks left of the reservation; rolling operations stop when it runs low. */
static inline unsigned trans_room(const struct trans *t)
{
	return t->reserved > t->joined ? t->reserved - t->joined : 0;
}

#endif
