/* SPDX-License-Identifier: MIT
 *
 * delegation.h - delegations of NFSv4 (RFC 8881 10.4) against what local users do with a file: a
 * client that has one need not ask before it reads (READ) or also changes (WRITE) the file in its
 * own cache, so nobody else may do what it would not notice before it has given the delegation
 * back.
 *
 * Words.
 *   delegation  of one inode to one holder (layout.h) of the kind CLIENT. In memory only: after a
 *               restart clients claim what they had (CLAIM_PREVIOUS), and the server grants again.
 *   operation   enum delegation_op, by what it does to the promise. READ delegations conflict with
 *               those that change the file, WRITE delegations with all.
 *   use         an operation of a local user that has begun and not ended. While it lasts no
 *               delegation is granted that conflicts with it; also while it waits for one to go, so
 *               that it does not wait for ever.
 *   open        a file that a local user has open. Counted with its access: O_RDWR has both.
 *
 * States, and who leaves them:
 *   GRANTED   -> RECALLED (delegation_wait(), delegation_break(): an operation conflicts),
 *                gone (delegation_return(); the same operations, when the holder is LOST: revoked
 *                at once, as its layouts are; the holder is GONE: dropped)
 *   RECALLED  -> gone (delegation_return(); revoked when recall_ms is over or the holder becomes
 *                LOST; dropped)
 * A revoke takes nothing but the record: a delegation gives no access to the device, so there is no
 * fence and no quarantine, and the holder stays LIVE.
 *
 * What waits for what.
 *   OPEN_READ, READ               WRITE delegations. OPEN for reading; LAYOUT_GET and remapping
 *                                 calls that read a file named by its handle.
 *   OPEN_WRITE, WRITE, SETATTR,   both. OPEN with write access or O_TRUNC; calls that change a file
 *   NAMESPACE                     named by its handle; SETATTR of any field, extended attributes;
 *                                 UNLINK, RENAME (of the file, or onto it), LINK.
 *   GETATTR, LOOKUP               never. The attributes of a write-delegated file are what the
 *                                 server knows, and the kernel does not keep them; each look at
 *                                 them sends EVENT_DELEGATION_ATTRS, at most once a second for an
 *                                 inode, for the server to ask the client (CB_GETATTR) and set
 *                                 them. The kernel also looks, to see who may, before it opens: the
 *                                 event may precede a recall.
 * READ and WRITE through an open file need no look: there is no conflicting delegation while it is
 * open (invariant 2), mapped or still being written back.
 *
 * Invariants.
 *   1. At most one delegation of an inode and holder; a WRITE one is the only one of its inode.
 *   2. No READ delegation with a local open for writing, a use that changes the file, or a RW
 *      layout of a LOCAL holder; no WRITE delegation with any local open, use, or layout of a LOCAL
 *      holder.
 *   3. Each is recalled once; from the recall to the end recall_ms pass at most, whether anybody
 *      waits or not.
 *   4. inode->delegated says which kinds there are; with fs->lock exclusive it does not rise, so a
 *      transaction that found none ends before one is granted.
 *   5. The inode is referenced while it is delegated.
 *
 * Events (layout.h) go to the holder's sink: DELEGATION_RECALL, DELEGATION_REVOKED,
 * DELEGATION_ATTRS, with grant_seq the number of the delegation and iomode READ or RW for its kind.
 * A drop is not told. Who finds an EVENT_OVERFLOW has to look for recalled ones
 * (delegation_list()); looks at attributes do not cause one, as they are not told when nobody keeps
 * up with the events.
 *
 * Concurrency: records, waits and `due` are under layouts->mutex; a grant also holds fs->lock
 * shared and inode->lock. Counts of opens and uses are atomics: a local operation counts first and
 * looks at inode->delegated then, a grant sets that first and looks at the counts then, so one of
 * them sees the other. The thread of layout_thread.c revokes. Nobody blocks: who has to wait parks.
 */
#ifndef EXTFS_DELEGATION_H
#define EXTFS_DELEGATION_H

#include "inode.h"

/* Bits of inode->delegated. */
#define DELEGATED_READ 1u
#define DELEGATED_WRITE 2u

enum delegation_op {
	DELEGATION_OPEN_READ = 1,
	DELEGATION_OPEN_WRITE = 2,
	DELEGATION_READ = 3,
	DELEGATION_WRITE = 4,
	DELEGATION_SETATTR = 5,
	DELEGATION_NAMESPACE = 6,
};
static inline bool delegation_op_valid(int op)
{
	return op >= DELEGATION_OPEN_READ && op <= DELEGATION_NAMESPACE;
}

/* Does it conflict with READ delegations, too? */
static inline bool delegation_op_changes(enum delegation_op op)
{
	return op != DELEGATION_OPEN_READ && op != DELEGATION_READ;
}

/* ---- what local users do ---- */

static inline bool delegation_any(const struct inode *in)
{
	return atomic_load(&((struct inode *)in)->delegated) != 0;
}
static inline bool delegation_of_writer(const struct inode *in)
{
	return atomic_load_explicit(&((struct inode *)in)->delegated, memory_order_relaxed) &
	       DELEGATED_WRITE;
}
/* The caller has a reference of the inode until the end. */
void local_open(struct inode *in, bool reads, bool writes);
void local_close(struct inode *in, bool reads, bool writes);
void local_use_begin(struct inode *in, enum delegation_op op);
void local_use_end(struct inode *in, enum delegation_op op);

struct delegation_wait {
	struct op *op; /* resumed when nothing is in the way any more */
	/* private */
	struct inode *in;
	enum delegation_op kind;
	bool parked;
	struct delegation_wait *next, **at;
};
/* Inside the use: recall what is in the way and wait until it is gone. 0: nothing is; ERR_PARKED.
 * w->op is the caller's; the inode stays referenced by it. */
int delegation_wait(struct inode *in, enum delegation_op op, struct delegation_wait *w);
/* Is there any that op conflicts with? */
bool delegation_conflicts(struct inode *in, enum delegation_op op);
/* true: w->op will not be resumed. */
bool delegation_cancel(struct delegation_wait *w);
/* Somebody looked at the attributes of a write-delegated file. */
void delegation_looked(struct inode *in);
/* Does anybody have a WRITE delegation of this number? fs->lock held (shared is enough). */
bool delegation_of_number(struct fs *fs, inum_t ino);

/* ---- what the server does; none of these waits ---- */

/* *seq: its number, which rises over all delegations and layouts, restarts too. A second one to the
 * same holder is the first, turned into a WRITE delegation when that is asked for and nothing
 * stands against it. -EAGAIN: refused, see invariants 1 and 2, or the holder's own is being
 * recalled; -ENOENT, -EOWNERDEAD: the holder is gone, or lost; -EINVAL: not of the kind CLIENT, not
 * a regular file; -EISDIR; -EROFS. */
int delegation_grant(struct inode *in, uint64_t holder, bool write, uint64_t *seq);
/* -ENOENT: it has none (any more). */
int delegation_return(struct inode *in, uint64_t holder);
/* Before an operation of the server itself for a client: has what is in its way recalled. 0:
 * nothing is; -EAGAIN. exempt: this holder's own is not in the way; 0: all are. */
int delegation_break(struct inode *in, uint64_t exempt, enum delegation_op op);

struct delegation_look {
	inum_t ino;
	uint32_t generation;
	bool write, recalled;
	uint64_t seq;
	uint64_t left_ms; /* recalled: until it is revoked */
};
/* Delegations of a holder with numbers above *seq, in order; 0 at the end. Sets *seq. */
unsigned delegation_list(struct fs *fs, uint64_t holder, uint64_t *seq, struct delegation_look *out,
			 unsigned n);

#endif
