/* SPDX-License-Identifier: MIT
 *
 * inode.h - inodes: on disk a record of TREE_INODE, in memory one object per number while anybody
 * uses it.
 *
 * Numbers rise and are never reused, so a number alone names a file for ever; generation is kept
 * for NFS handles.
 *
 * An inode lives in memory while it is referenced (inode_get/inode_put) and for a while after, as a
 * bounded cache. What the kernel knows of (FUSE lookup counts, up to millions) is kept apart, in a
 * compact table of (number, count): a file whose last name is gone stays on the orphan list until
 * neither a lookup count nor a reference is left; then the reaper frees it.
 *
 * Concurrency: `core` changes under fs->lock exclusive, inside a transaction that joined the inode
 * - except times, `change` and the lazy flag, which the data path changes under fs->lock shared
 * plus inode->lock (lazy: written back by the next transaction of the inode, by fsync, or before a
 * group closes). Readers hold fs->lock shared; for times also inode->lock.
 */
#ifndef EXTFS_INODE_H
#define EXTFS_INODE_H

#include <pthread.h>

#include "fs.h"
#include "trans.h"

struct timestamp { int64_t sec; uint32_t nsec; };

struct inode_core {
	uint32_t generation, mode, uid, gid, nlink, flags;
	uint64_t size, blocks;
	struct timestamp atime, mtime, ctime, btime;
	uint64_t rdev;
	inum_t parent;
	uint64_t change;
	uint32_t subdirs, xattrs;
};

struct seg_tree; /* segment.h */
struct watch;    /* layout.c */
struct plock_set; /* plock.h */
struct delegation;
struct delegation_wait; /* delegation.h */

struct inode {
	struct fs *fs;
	inum_t ino;
	struct inode_core core;
	/* core has times that are not in the tree yet. Set with fs->lock shared, inode->lock and
	 * the table mutex; cleared with fs->lock exclusive and the table mutex. */
	bool lazy;
	/* Somebody was told the times or `change` since they were set: the next change must show. */
	_Atomic bool told;
	bool deleted;         /* removed by the reaper, or its creation was cancelled */
	bool dying;           /* with the reaper: inode_get() does not find it; table mutex */
	bool hashed;          /* in the table; table mutex */
	xid_t xid;            /* group of its last metadata change; 0: none since mount */
	xid_t shrink_xid;     /* group of its last truncate-down that left a partial tail block */
	/* group of the last change that gave blocks with bytes in them another place, in this file or
	 * from another one: nothing is overwritten in place before it is durable */
	xid_t moved_xid;
	bool remapping;       /* such a change is between two transactions: the map is a mix; fs->lock */
	bool tmpfile;         /* of O_TMPFILE, no name yet: link(2) may give it one; fs->lock */
	/* bytes past EOF in the last block are known to be zero on the device */
	_Atomic bool tail_zero;
	/* file_early.h: writes that have been answered and are under way, oldest first, and who waits for them. While there
	 * are any: the size on disk stays below early_limit; but not when somebody else has set core.size, which
	 * is seen by its not being early_size: that begins a new epoch, in which older ones set no limit. lock */
	struct early_write *early, *early_last;
	struct early_waiter *early_waiters;
	uint64_t early_limit, early_size, early_epoch;
	_Atomic unsigned early_n;
	_Atomic uint32_t early_errors;   /* failed since the inode came to memory */
	_Atomic uint32_t early_told;     /* of these, somebody has been told */
	_Atomic int early_code;          /* how the last of these failed */
	pthread_mutex_t lock; /* segments, waiters, lazy times */
	struct seg_tree *segs;   /* NULL until the first segment */
	struct plock_set *locks; /* NULL until the first lock */
	/* Rises with every change of the map, never repeats, not even when the inode was out of memory. Changed under fs->lock
	 * exclusive. */
	_Atomic uint64_t map_gen;
	/* The kernel may hold pages of the file: set when a cached READ or WRITE is served; cleared by whoever has them all
	 * invalidated, before. */
	_Atomic bool pages_cached;
	struct watch *watches;   /* who wants to hear of changes of the map; layouts->mutex */
	/* delegation.h: the kinds of delegations that there are; open files, and operations under way, of local users */
	_Atomic uint32_t delegated, local_readers, local_writers, local_looks, local_changes;
	struct delegation *delegations;           /* layouts->mutex */
	struct delegation_wait *delegation_waits; /* layouts->mutex */
	/* Writes since the last fsync, and how many fsyncs in a row came after just one: racy, only a guess. */
	_Atomic uint8_t unsynced, fsync_habit;
	fsblock_t alloc_hint;    /* after the last allocated block; fs->lock */
	unsigned refs;           /* inode table mutex */
	unsigned opens;          /* open handles, inode table mutex */
	struct inode *hash_next, *lru_prev, *lru_next, *lazy_prev, *lazy_next; /* table mutex */
};

int inode_table_create(struct fs *fs);
void inode_table_destroy(struct fs *fs);

/* Reference to an inode. fs->lock held (shared is enough). -ENOENT: no such number. */
int inode_get(struct fs *fs, inum_t ino, struct inode **out);
/* The core of an inode for a look, without an object in memory: for listings, which would turn the cache over. fs->lock
 * held (shared is enough). -ENOENT. */
int inode_peek(struct fs *fs, inum_t ino, struct inode_core *core);
/* As inode_get() for a handle: -ERR_STALE_HANDLE when gone or of another generation. Takes fs->lock
 * shared itself. */
int inode_get_handle(struct fs *fs, inum_t ino, uint32_t generation, struct inode **out);
/* Referenced if it is in memory, else NULL. fs->lock not needed. */
struct inode *inode_get_cached(struct fs *fs, inum_t ino);
struct inode *inode_ref(struct inode *in);
/* fs->lock not needed, better not held; hands the inode to the reaper when it was an orphan's last
 * user. The reaper's own scan of the orphan tree is therefore inode_get() and inode_put() of each
 * number. A transaction's inodes are put after its end. */
void inode_put(struct inode *in);
/* An open file: a reference that is also counted in `opens`. The last close of a nameless one asks holders for
 * their layouts; so not with fs->lock held. */
void inode_open(struct inode *in);
void inode_close(struct inode *in);
bool inode_is_open(struct inode *in);

/* FUSE lookup counts. forget returns true when the count reached 0. */
void inode_lookup_add(struct fs *fs, inum_t ino, uint64_t n);
bool inode_lookup_forget(struct fs *fs, inum_t ino, uint64_t n);
void inode_lookup_forget_all(struct fs *fs); /* at unmount */
uint64_t inode_lookup_entries(struct fs *fs);
/* From now on keep no more than so many inodes without users, at most those that the mount asked
 * for. What is above leaves now, the longest unused first; lazy ones stay. Returns how many left.
 * Takes the table's mutex for short steps. No locks held. */
uint64_t inode_cache_limit(struct fs *fs, uint64_t inodes);
/* Memory and content of the inode table, for status and tests. limit: of unused, now. */
struct inode_stats { uint64_t cached, unused, lazy, lookups, lookup_bytes, limit; };
void inode_get_stats(struct fs *fs, struct inode_stats *st);

/* Inside a transaction. New inode, referenced, joined, record inserted; nlink as given; times =
 * now. After an error *out is NULL or to be put after the cancel. */
int inode_create(struct trans *t, uint32_t mode, uint32_t uid, uint32_t gid, uint64_t rdev,
		 inum_t parent, uint32_t nlink, struct inode **out);
/* Remember core for rollback (trans.c). Must precede the first change of core. */
int trans_join_inode(struct trans *t, struct inode *in);
/* Core of a joined inode to the tree; clears lazy (a cancel brings it back). */
int inode_write(struct trans *t, struct inode *in);
/* Link count reached 0 (or O_TMPFILE): on the orphan list; and off it again (linkat of a
 * tmpfile). */
int inode_orphan_add(struct trans *t, struct inode *in);
int inode_orphan_del(struct trans *t, struct inode *in);
/* Remove record, orphan entry: the last step of the reaper. Extents, attributes, a symlink's target
 * are gone already. */
int inode_delete(struct trans *t, struct inode *in);
#define INODE_TRANS_BLOCKS (2 * TRANS_TREE_OP + TRANS_ALLOC_OP)

enum { TOUCH_ATIME = 1, TOUCH_MTIME = 2, TOUCH_CTIME = 4 }; /* MTIME and CTIME raise change */
/* Inside a transaction, after trans_join_inode(). */
void inode_touch(struct inode *in, unsigned what);
/* Outside, with fs->lock shared: lazily. Changes within a tick that nobody could tell apart, because nobody looked in
 * between, are one: it costs a busy file nothing, and its fsync no transaction. */
void inode_touch_lazy(struct inode *in, unsigned what);
/* Does the atime option ask for an update by a read now? (relatime as mount(8) says.) fs->lock
 * shared; takes inode->lock. */
bool inode_wants_atime(const struct inode *in);
/* Write up to max lazy inodes in transactions of their own; returns how many are left or a negative
 * code. fs->lock not held. */
int inode_flush_lazy(struct fs *fs, unsigned max);
/* This inode only; 0 when it was not lazy. -ERR_JOURNAL_FULL. */
int inode_flush_lazy_one(struct inode *in);

/* Never earlier than what either of these two has answered before. time_coarse() moves with the kernel's
 * tick, milliseconds apart. */
struct timestamp time_now(void);
struct timestamp time_coarse(void);
static inline bool inode_is_dir(const struct inode *in)
{
	return (in->core.mode & 0170000) == 0040000;
}
static inline bool inode_is_reg(const struct inode *in)
{
	return (in->core.mode & 0170000) == 0100000;
}
void inode_decode(const struct inode_disk *d, struct inode_core *core);
void inode_encode(const struct inode_core *core, struct inode_disk *d);

#endif
