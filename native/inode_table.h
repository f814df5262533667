/* SPDX-License-Identifier: MIT
 *
 * inode_table.h - private to inode.c and inode_table.c: the in-memory inodes of a filesystem.
 *
 * Concurrency: everything under `mutex`, which is taken after fs->lock and inode->lock. Errors as
 * in inode.h.
 */
#ifndef EXTFS_INODE_TABLE_H
#define EXTFS_INODE_TABLE_H

#include "inode.h"
#include "lookup_table.h"

struct inode_table {
	struct fs *fs;
	pthread_mutex_t mutex;
	struct inode **hash;
	uint64_t buckets, count; /* buckets: a power of two */
	struct inode *lru_head, *lru_tail; /* head: used last */
	uint64_t lru_count, limit; /* limit: of lru_count; at most fs->opt.inode_cache */
	struct inode *lazy_head, *lazy_tail; /* head: lazy first */
	uint64_t lazy_count;
	struct lookup_table lookups;
	/* The newest groups of objects that were evicted: what an inode that comes back may still
	 * wait for. */
	xid_t evicted_xid, evicted_shrink_xid, evicted_moved_xid;
};

/* A new object of one number, reference 1, not in the table yet; NULL: no memory. */
struct inode *inode_alloc(struct fs *fs, inum_t ino);
void inode_free(struct inode *in);
/* Into the hash. With the mutex held. */
void inode_table_insert(struct inode_table *it, struct inode *in);
/* Takes the mutex: the inode does not exist (any more); its number may come back when a creation
 * was cancelled, so it leaves the hash at once. */
void inode_table_withdraw(struct inode *in);
/* Takes the mutex: set or clear in->lazy and its place in the list. fs->lock held: exclusively, or
 * shared plus inode->lock. */
void inode_table_set_lazy(struct inode *in, bool lazy);
/* Takes the mutex: reference up to max of the inodes that are lazy longest; they stay in the list.
 * Returns how many. */
unsigned inode_table_oldest_lazy(struct inode_table *it, struct inode **out, unsigned max);

#endif
