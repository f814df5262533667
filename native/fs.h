/* SPDX-License-Identifier: MIT
 *
 * fs.h - one mounted filesystem: what the modules share, and the order of locks.
 *
 * Locks, in the order in which they may be taken (a holder of one may take those below it):
 *
 *   fs->lock (reader-writer)     all metadata: trees, buffers' contents, in-memory inodes' core.
 *                                Exclusive: inside a transaction, and when the journal closes a
 *                                group. Shared: lookups. Held for microseconds and metadata reads;
 *                                never across data I/O or a wait for anybody.
 *   inode->lock (mutex)          segments, waiters and lazily written times of one inode.
 *   inode table mutex            finding, counting and evicting in-memory inodes.
 *   journal mutex, buffer cache mutex, busy list mutex, ioctx wake mutex, log mutex: leaves, never
 *   nested in one another.
 *
 * Nothing calls out (op->resume, done callbacks) with any of them held.
 */
#ifndef EXTFS_FS_H
#define EXTFS_FS_H

#include <pthread.h>
#include <stdatomic.h>

#include "buffer.h"
#include "device.h"
#include "format.h"

struct journal;
struct buf_cache;
struct alloc_state;
struct inode_table;
struct reaper;
struct heartbeat;
struct trans_pool;
struct layouts;
struct early;
struct seg_hooks;
struct op;

/* The kernel's caches, as whoever serves the mount tells them of changes behind the kernel's back. Set by the bridge while it
 * runs; NULL: nobody caches. */
struct page_range { uint64_t offset, len; }; /* bytes; len 0: to the end */
struct page_wait {
	struct op *done;      /* is woken */
	unsigned patience_ms; /* after so long at the latest; 0: only when the pages are gone */
	int result;           /* then: 0: they are gone; -ETIMEDOUT: not all */
};
struct cache_ops {
	/* Drop the pages of the n ranges, in whatever order, and the attributes; wait may be NULL: nobody waits. A page that
	 * is locked is dropped as soon as it is not, those behind it in its range after it. 0: it will happen; negative: it
	 * will not. Never awaited with a lock held or by a thread that serves requests. */
	int (*pages)(void *arg, inum_t ino, const struct page_range *ranges, unsigned n, struct page_wait *wait);
	/* Attributes only, at once. Any thread. */
	void (*attributes)(void *arg, inum_t ino);
	/* What others than the mount changed, told later: nobody waits for it. A name of a directory; bytes [start, end) of a
	 * file (end UINT64_MAX: to the end), or, of a directory, [0, UINT64_MAX): its listing. Any thread, no locks. */
	void (*name_changed)(void *arg, inum_t dir, const char *name, size_t len);
	void (*bytes_changed)(void *arg, inum_t ino, uint64_t start, uint64_t end);
};

/* What the modules of files and free space ask those of layouts, which lie above them. Set once at mount; NULL: nobody holds
 * layouts. */
struct inode;
struct trans;
struct layout_hooks {
	/* Under which holder's name the blocks that `in` maps no more go to quarantine; 0: they become free. In a transaction. */
	uint64_t (*drop_holder)(struct fs *fs, const struct inode *in);
	/* In a transaction: so many blocks went to quarantine under this name, or (negative) left it. 0 or a code. */
	int (*quarantined)(struct trans *t, uint64_t holder, int64_t blocks);
	/* The last name and the last open are gone, a segment is left. No locks held. */
	void (*unlinked)(struct inode *in);
	/* The map of `in` changes: watchers are told. In a transaction. */
	void (*map_changed)(struct inode *in);
	/* A lock that an NFS owner watches for could be had. No locks held. */
	void (*lock_free)(struct inode *in, uint64_t owner);
	/* A local process wants what this NFS owner has locked; once for an owner. No locks held. */
	void (*lock_wanted)(struct inode *in, uint64_t owner);
};

struct fs_options {
	bool read_only;
	uint64_t cache_bytes;    /* metadata cache; default 64 MiB */
	uint64_t inode_cache;    /* in-memory inodes without users kept; default 16384 */
	unsigned commit_ms;      /* default 1000 */
	enum { ATIME_RELATIME, ATIME_STRICT, ATIME_NONE } atime;
	bool no_heartbeat;
	unsigned heartbeat_ms;   /* distance of two heartbeats; default 2000 */
	unsigned recall_ms;      /* a holder's time to answer a recall; default 10000 */
	uint64_t early_bytes;    /* memory for writes that are answered early (file_early.h); 0: none are */
	unsigned mutant;         /* enum jrn_mutant; test builds */
};

/* Superblock fields in host order. */
struct super {
	uint8_t uuid[FORMAT_UUID_LEN];
	char label[FORMAT_LABEL_LEN + 1];
	uint64_t compat, ro_compat, incompat;
	nblocks_t total_blocks, ag_blocks, journal_blocks;
	uint32_t ag_count;
	fsblock_t journal_start;
	uint64_t hash_key[2];
	inum_t root_inode;
	int64_t created_sec;
	bool from_copy; /* the primary was damaged */
};

struct fs {
	struct device *dev;
	struct super super;
	struct fs_options opt;
	pthread_rwlock_t lock; /* prefers writers */
	struct buf *root;      /* ROOT_BLOCK, pinned for the life of the mount */
	struct buf_cache *cache;
	struct journal *jrn;
	struct trans_pool *trans_pool;
	struct alloc_state *alloc;
	struct inode_table *inodes;
	struct reaper *reaper;
	struct heartbeat *heartbeat;
	struct layouts *layouts;
	struct early *early;
	const struct seg_hooks *seg_hooks;
	const struct layout_hooks *layout_hooks;
	/* NULL: no mount. Threads of the core go on while a bridge ends, so it is loaded once for a use; a call that comes late
	 * finds nobody. */
	_Atomic(const struct cache_ops *) cache_ops;
	void *cache_arg; /* stays */
	_Atomic uint64_t next_map_gen;
	bool read_only;                 /* asked for at mount */
	_Atomic bool shutdown;          /* writing became unsafe: every change is -ERR_SHUTDOWN */
	_Atomic int shutdown_code;
	/* Newest group in which blocks of a reflinked file lost a user. Blocks that look unshared
	 * now may be mapped by two files in the durable state until it is durable: no write in
	 * place before that. Rises under fs->lock exclusive. */
	_Atomic uint64_t unshare_xid;
};

/* Whose lock this thread holds. A second shared hold would wait for a writer who waits for the first: mostly it works, so
 * it is looked for each time. */
extern _Thread_local const struct fs *fs_locked;
/* Somebody else has it. */
void fs_lock_contended(struct fs *fs, bool exclusive);

static inline void fs_rdlock(struct fs *fs)
{
	xassert(fs_locked != fs);
	if (unlikely(pthread_rwlock_tryrdlock(&fs->lock)))
		fs_lock_contended(fs, false);
	fs_locked = fs;
}

static inline void fs_wrlock(struct fs *fs)
{
	xassert(fs_locked != fs);
	if (unlikely(pthread_rwlock_trywrlock(&fs->lock)))
		fs_lock_contended(fs, true);
	fs_locked = fs;
}

static inline void fs_unlock(struct fs *fs)
{
	xassert(fs_locked == fs);
	fs_locked = NULL;
	pthread_rwlock_unlock(&fs->lock);
}

static inline struct root_disk *fs_root(const struct fs *fs) { return fs->root->data; }

/* After an error that makes further changes unsafe (damaged metadata, failed journal write):
 * changes fail from now on, reads go on. The first call logs code and text. Any thread, any
 * lock. */
void fs_shutdown_writes(struct fs *fs, int code, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
static inline bool fs_is_shutdown(const struct fs *fs)
{
	return atomic_load(&((struct fs *)fs)->shutdown);
}
/* Why: a negative code, for those who have to be told that something will not become durable. */
static inline int fs_shutdown_cause(const struct fs *fs)
{
	int code = atomic_load(&((struct fs *)fs)->shutdown_code);

	return code < 0 ? code : -EIO; /* set just after the flag; an abandoned fs has none */
}

/* Superblock. */
/* -ERR_NOT_EXTFS, -ERR_SB_DAMAGED, -ERR_INCOMPAT, -ERR_DEV_SMALL */
int super_read(struct device *dev, struct super *out);
int super_write(struct device *dev, const struct super *sb); /* copy, flush, primary, flush */

struct mkfs_options {
	const char *label;
	nblocks_t journal_blocks; /* 0: scaled with the device */
	bool force;
	const uint8_t *uuid;       /* NULL: random */
	int64_t now_sec;           /* for reproducible images; 0: the clock */
	uint64_t size_blocks;      /* 0: the whole device */
};
int fs_mkfs(struct device *dev, const struct mkfs_options *opt);

/* Mount the core: superblock, replay, caches, orphans and intents are finished in the background.
 * dev is owned by the fs from success on. */
int fs_open(struct device *dev, const struct fs_options *opt, struct fs **out);
/* Everything durable, clean. All users must be gone. */
int fs_close(struct fs *fs);
/* Stop as a power cut would; frees memory. */
void fs_abandon(struct fs *fs);

extern const struct buf_type buf_type_root;

#endif
