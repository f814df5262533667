/* SPDX-License-Identifier: MIT
 *
 * plock.h - POSIX record locks (fcntl) and flock locks of an inode, for the mount and later for NFS
 * alike.
 *
 * In memory only. Owners are opaque 64-bit numbers (FUSE lock_owner). POSIX locks of one owner
 * merge and split by the rules of fcntl(2); flock locks belong to one open file and cover the whole
 * file; the two kinds do not see each other. A blocking request parks as a record, first come first
 * served among those whose owners hold nothing; an owner that holds a lock waits for held locks
 * only, since its wait behind another waiter could be a deadlock of our making. Deadlocks of POSIX
 * locks are found (-EDEADLK). A change of a flock lock's type gives the old lock up first, as
 * flock(2) says. The caller's reference keeps the inode in memory while it has locks or requests in
 * it.
 *
 * Concurrency: one mutex for the locks of all inodes, because a deadlock spans several; taken
 * inside, nothing else is taken under it.
 */
#ifndef EXTFS_PLOCK_H
#define EXTFS_PLOCK_H

#include "inode.h"

/* F_RDLCK, F_WRLCK, F_UNLCK */
enum plock_type { PLOCK_READ = 0, PLOCK_WRITE = 1, PLOCK_UNLOCK = 2 };

struct plock {
	uint64_t start, end; /* inclusive, as FUSE says it; end UINT64_MAX >> 1: to the end */
	enum plock_type type;
	uint64_t owner;
	uint32_t pid;
};

struct plock_request {
	struct op *op;       /* resumed when granted or failed; NULL: do not wait */
	struct plock lock;
	bool flock;
	int result;
	/* private */
	struct inode *in;
	struct plock_request *next, *prev, *owner_next;
	struct plock_held *spare[2]; /* so that granting needs no memory */
	bool parked;
};

/* 0, -EAGAIN (op NULL), ERR_PARKED (op is resumed with req->result 0), -EDEADLK, -ENOLCK, -EINVAL
 * (start > end, unknown type). */
int plock_set(struct inode *in, struct plock_request *req);
/* First lock of another owner that conflicts with *lock into it, or type PLOCK_UNLOCK. */
void plock_get(struct inode *in, bool flock, struct plock *lock);
/* Close of an owner: all its locks of this kind. */
void plock_release_owner(struct inode *in, bool flock, uint64_t owner);
/* true: taken out of the queue, op will not be resumed. */
bool plock_cancel(struct plock_request *req);
/* The inode leaves memory: no request may be parked. */
void plock_set_free(struct inode *in);

#endif
