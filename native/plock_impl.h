/* SPDX-License-Identifier: MIT
 *
 * plock_impl.h - private to plock*.c: the table of locks. Everything here is under plock_mutex;
 * plock.c has its invariants.
 */
#ifndef EXTFS_PLOCK_IMPL_H
#define EXTFS_PLOCK_IMPL_H

#include "plock.h"

#define OFFSET_LAST ((uint64_t)INT64_MAX) /* of FUSE */
#define TO_THE_END UINT64_MAX

struct plock_owner {
	const struct fs *fs;
	uint64_t id;
	enum plock_domain domain;
	bool flock;
	bool wanted;                   /* NFS: a local owner waits for it, which was told */
	uint64_t held;
	struct plock_request *waiting; /* parked, by owner_next */
	uint64_t visited;      /* by the search with this number */
	struct plock_owner *todo;      /* of that search */
	struct plock_owner *next; /* in its bucket */
};

struct plock_held {
	uint64_t start, end;   /* inclusive */
	enum plock_type type;
	uint32_t pid;
	struct plock_owner *owner;
	struct plock_held *next;
};

struct plock_watch {
	uint64_t start, end; /* inclusive */
	enum plock_type type;
	uint64_t owner;
	struct plock_watch *next;
};

struct plock_set {
	struct plock_held *held[2]; /* by kind: POSIX, flock */
	struct plock_request *head, *tail;
	struct plock_watch *watches;
	struct inode *in;
	bool nfs;    /* an NFS owner has been here */
	bool pinned;
	struct plock_set *pinned_next, *pinned_prev;
};

#define WANTED_MAX 16u

/* What is to be done when the mutex is free. */
struct aftermath {
	struct inode *in;
	struct plock_request *granted; /* by next */
	struct plock_watch *told;
	bool unpinned; /* put a reference */
	uint64_t wanted[WANTED_MAX]; /* NFS owners in the way of local ones; more are told later */
	unsigned nwanted;
};

extern pthread_mutex_t plock_mutex;

/* The first held lock from *h on that conflicts with a lock of this owner. */
struct plock_held *plock_conflict_from(struct plock_held *h, const struct plock *lock);
/* NULL: there is none, or (make) no memory. */
struct plock_set *plock_set_of(struct inode *in, bool make);
/* All locks of one owner, or of everybody of a domain; the second leaves the rest to
 * plock_look_round(). */
void plock_release(struct plock_set *set, bool flock, enum plock_domain domain, uint64_t id,
		   struct aftermath *after);
void plock_drop_domain(struct plock_held **at, enum plock_domain domain);
/* Locks or watches have changed: who may go on or is to be told. Once before each unlock of the
 * mutex that follows a change. */
void plock_look_round(struct plock_set *set, struct aftermath *after);
/* The part of it that is about NFS owners. */
void plock_settle_nfs(struct plock_set *set, struct aftermath *after);
/* With the mutex free. The caller's reference of the inode, or the set's own, is still there. */
void plock_finish(const struct aftermath *after);

#endif
