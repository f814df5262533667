/* SPDX-License-Identifier: MIT
 *
 * plock.h - POSIX record locks (fcntl) and flock locks of an inode, for the mount and for NFS
 * alike.
 *
 * In memory only. Owners are opaque 64-bit numbers: of the kernel's choice (FUSE lock_owner) or, in
 * a domain of their own, of the NFS server's; the same number in both is two owners. POSIX locks of
 * one owner merge and split by the rules of fcntl(2); flock locks belong to one open file and cover
 * the whole file; the two kinds do not see each other. A blocking request parks as a record, first
 * come first served among those whose owners hold nothing; an owner that holds a lock waits for
 * held locks only, since its wait behind another waiter could be a deadlock of our making.
 * Deadlocks of POSIX locks are found (-EDEADLK). A change of a flock lock's type gives the old lock
 * up first, as flock(2) says.
 *
 * Local locks and requests live in an inode that the caller keeps in memory by his reference. Locks
 * and watches of NFS owners keep it there themselves, until they go, plock_drop_nfs() at the
 * latest.
 *
 * That an NFS owner is in the way of a local one is told by layout_hooks->lock_wanted(), once as
 * long as it has locks: its client may be away for good, which the server knows.
 *
 * An NFS owner never waits. It may watch for a lock that it was refused: it is told once, by an
 * event, when the lock could be had, and has to ask again, like everybody else; those who wait here
 * go first.
 *
 * Concurrency: one mutex for the locks of all inodes, because a deadlock spans several; taken
 * inside, nothing else is taken under it.
 */
#ifndef EXTFS_PLOCK_H
#define EXTFS_PLOCK_H

#include "inode.h"

/* F_RDLCK, F_WRLCK, F_UNLCK */
enum plock_type { PLOCK_READ = 0, PLOCK_WRITE = 1, PLOCK_UNLOCK = 2 };
enum plock_domain { PLOCK_LOCAL = 0, PLOCK_NFS = 1 };

/* start and end are inclusive. Local ones are as FUSE says them: end UINT64_MAX >> 1 or more is
 * to the end, and what a local owner is told lies in that range, too. NFS ones have 64 bits, end
 * UINT64_MAX is to the end. */
struct plock {
	uint64_t start, end;
	enum plock_type type;
	uint64_t owner;
	uint32_t pid; /* local; 0 of an NFS owner */
	enum plock_domain domain;
};

struct plock_request {
	struct op *op;       /* resumed when granted or failed; NULL: do not wait */
	struct plock lock;
	bool flock;
	int result;
	struct plock *conflict; /* may be NULL. -EAGAIN: the first lock in the way */
	/* private */
	struct inode *in;
	struct plock_request *next, *prev, *owner_next;
	struct plock_held *spare[2]; /* so that granting needs no memory */
	bool parked;
};

/* 0, -EAGAIN (op NULL), ERR_PARKED (op is resumed with req->result 0), -EDEADLK, -ENOLCK, -EINVAL
 * (start > end, unknown type). */
int plock_set(struct inode *in, struct plock_request *req);
/* First lock of another owner that conflicts with *lock into it, or type PLOCK_UNLOCK. POSIX
 * locks of both domains; flock locks are local. */
void plock_get(struct inode *in, bool flock, struct plock *lock);
/* Close of a local owner: all its locks of this kind. */
void plock_release_owner(struct inode *in, bool flock, uint64_t owner);
/* An NFS owner's locks in this inode, and its watch. */
void plock_release_nfs(struct inode *in, uint64_t owner);
/* Tell the NFS owner once, by layout_hooks->lock_free(), when *lock could be had: now, or after
 * a change. It has one watch in an inode: the newest. -EAGAIN: there are PLOCK_WATCHES_MAX in
 * all, -ENOMEM, -EINVAL. */
#define PLOCK_WATCHES_MAX 65536u
int plock_watch(struct inode *in, const struct plock *lock);
void plock_unwatch(struct inode *in, uint64_t owner);
/* Everything that NFS owners have in inodes of this filesystem: before it is closed. */
void plock_drop_nfs(struct fs *fs);
/* Every lock of local owners: the mount is gone. No request may be parked. */
void plock_drop_local(struct inode *in);
/* true: taken out of the queue, op will not be resumed. */
bool plock_cancel(struct plock_request *req);
/* The inode leaves memory: no request is parked, no NFS owner has anything in it. */
void plock_set_free(struct inode *in);

#endif
