/* SPDX-License-Identifier: MIT
 *
 * rider.h - marks of the NFS server that ride in the transaction of the operation that they are of.
 *
 * A persistent session promises that a request is done once, also when the server dies before it
 * has answered. For that it has to be known after a restart whether an operation that must not be
 * done twice was done: the transaction that does it also writes a struct rider_disk, in
 * TREE_NFS_CLIENT. Both are there after a crash, or neither is.
 *
 * Concurrency: a thread hands its rider over before it calls one operation, and takes it back after
 * the call; there is one at a time for each thread, and nobody else reads it meanwhile. The
 * operations that carry one are those of names (namei_create() and so on, but not the ones of a
 * file without a name), namei_setattr(), xattr_set() and xattr_remove(). One that was not done has
 * written none.
 */
#ifndef EXTFS_RIDER_H
#define EXTFS_RIDER_H

#include "inode.h"
#include "trans.h"

struct rider {
	uint64_t id;               /* NFS_RIDER_KEY() */
	uint32_t written;          /* 1: a transaction has it */
	uint32_t reserved;
	struct rider_disk record;  /* marks[count - 1] gets ino, generation and what is after */
};

/* NULL: none any more. */
void rider_set(struct rider *r);
/* Blocks that a transaction of this thread reserves for it: an insert, for the first one of a slot;
 * later ones overwrite a record of the same length in place. */
#define RIDER_BLOCKS (TRANS_TREE_OP + TRANS_ALLOC_OP)
unsigned rider_blocks(void);
/* The end of such a transaction: with err it is cancelled, else it takes the thread's rider along
 * and is committed. Returns err, or why there is no place for the rider; then nothing was done.
 * object: whose name or attributes it was about; from and to: the directories, or the object
 * itself; to may be NULL. */
int rider_end(struct trans *t, int err, const struct inode *object, const struct inode *from,
	      const struct inode *to);

#endif
