/* SPDX-License-Identifier: MIT
 *
 * extfs_core.h - the core as Python sees it. cffi reads this file verbatim: no preprocessor but plain
 * #define NAME NUMBER, no includes. C files include types.h first.
 *
 * Calls return 0 or a count, or a negative code: extfs_errno() turns it into an errno, extfs_error_text() says what failed.
 * Names and paths are bytes with a length. Files are named by inode number.
 * Unless a comment says "waits", a call does nothing longer than reading metadata. Calls that change something may return the code of
 * ERR_JOURNAL_FULL (extfs_is_retry() is true): nothing was done; wait with extfs_wait_space() and call again.
 */

struct device;
struct sim;
struct fs;
struct bridge;

/* ---- errors and log ---- */
int extfs_errno(int code);
const char *extfs_error_text(int code);
const char *extfs_error_name(int code);
int extfs_is_retry(int code);
int extfs_log_next(char *buf, size_t len); /* level of the oldest line, 0: none */
int extfs_log_fd(void);                    /* readable while there are lines */

/* ---- devices ---- */
#define EXTFS_DEV_READ_ONLY 1
#define EXTFS_DEV_SHARED 2
int extfs_device_open(const char *path, unsigned flags, struct device **out);
void extfs_device_close(struct device *dev);
uint64_t extfs_device_size(struct device *dev);
int extfs_device_read(struct device *dev, uint64_t offset, void *buf, size_t len);
int extfs_device_write(struct device *dev, uint64_t offset, const void *buf, size_t len);

/* The simulated device, see device_sim.h. */
#define EXTFS_IO_READ 0
#define EXTFS_IO_WRITE 1
#define EXTFS_IO_FLUSH 2
int extfs_sim_create(uint64_t size, uint32_t align, uint64_t seed, struct sim **out);
void extfs_sim_destroy(struct sim *sim);
int extfs_sim_device(struct sim *sim, struct device **out);
uint64_t extfs_sim_events(struct sim *sim);
void extfs_sim_crash_at(struct sim *sim, uint64_t n);
int extfs_sim_crashed(struct sim *sim);
void extfs_sim_restart(struct sim *sim, uint64_t seed);
void extfs_sim_settle(struct sim *sim);
void extfs_sim_fail(struct sim *sim, int kind, uint64_t offset, uint64_t len, unsigned count);
void extfs_sim_shuffle(struct sim *sim, int shuffle);
int extfs_sim_peek(struct sim *sim, uint64_t offset, void *buf, size_t len);
int extfs_sim_poke(struct sim *sim, uint64_t offset, const void *buf, size_t len);
void extfs_sim_drop_flushes(struct sim *sim, uint64_t n);
int extfs_sim_clone(struct sim *sim, struct sim **out);

/* ---- format, open, close ---- */
struct extfs_mkfs_options {
	const char *label;       /* NULL: none; at most 64 bytes */
	uint64_t journal_blocks; /* 0: scaled with the device */
	int force;
	const uint8_t *uuid;     /* 16 bytes; NULL: random */
	int64_t now_sec;         /* 0: the clock */
	uint64_t size_blocks;    /* 0: the whole device */
};
int extfs_mkfs(struct device *dev, const struct extfs_mkfs_options *opt);

#define EXTFS_ATIME_RELATIME 0
#define EXTFS_ATIME_STRICT 1
#define EXTFS_ATIME_NONE 2
/* Mutants: deliberate violations that the proofs must catch; never set outside tests. */
#define EXTFS_MUTANT_NONE 0
#define EXTFS_MUTANT_COMMIT_BEFORE_FLUSH 1
#define EXTFS_MUTANT_CHECKPOINT_NO_FLUSH 2
#define EXTFS_MUTANT_META_REUSE_EARLY 3
#define EXTFS_MUTANT_TAIL_ZERO_EARLY 4
#define EXTFS_MUTANT_STATE_BY_SIZE 5
#define EXTFS_MUTANT_COMMIT_UNCHECKED 6
#define EXTFS_MUTANT_QUARANTINE_DROPPED 7
#define EXTFS_MUTANT_CONVERT_UNFLUSHED 8
#define EXTFS_MUTANT_REVOKE_IN_PLACE 9
#define EXTFS_MUTANT_HOLDERS_FORGOTTEN 10
#define EXTFS_MUTANT_READ_UNHELD 11
#define EXTFS_MUTANT_RIDER_APART 12
struct extfs_mount_options {
	int read_only;
	uint64_t cache_bytes; /* 0: default, 64 MiB */
	uint64_t inode_cache; /* 0: default */
	unsigned commit_ms;   /* 0: default, 1000 */
	int atime;
	int no_heartbeat;
	unsigned recall_ms;   /* 0: default, 10000 */
	uint64_t early_bytes; /* memory for buffered writes of the mount that are answered early; 0: none are */
	unsigned mutant;
};
/* Waits for replay. On success the fs owns the device; on failure the caller still does. */
int extfs_open(struct device *dev, const struct extfs_mount_options *opt, struct fs **out);
int extfs_close(struct fs *fs);    /* waits: commit, checkpoint; closes the device */
void extfs_abandon(struct fs *fs); /* as a power cut; closes the device handle */
void extfs_shutdown(struct fs *fs, const char *why); /* no change from now on; what was not durable is lost */
int extfs_is_shutdown(struct fs *fs); /* 0, or the code that turned it read-only */

struct extfs_super {
	uint8_t uuid[16];
	char label[65];
	uint64_t compat, ro_compat, incompat;
	uint64_t total_blocks, ag_blocks, journal_blocks, journal_start;
	uint32_t ag_count, block_size;
	int64_t created_sec;
	int from_copy;
};
int extfs_super_read(struct device *dev, struct extfs_super *out);
/* Who mounts it: 0: nobody; 1: somebody who is not heard of any more; -EBUSY: somebody, now. Can wait for seconds. */
int extfs_device_mounted(struct device *dev);
/* 1: nobody has mounted the device since this mount; 0: somebody has. Reads the device. */
int extfs_mount_stands(struct fs *fs);
/* Between the two no new I/O reaches the device: for a reset of its unit. Release it soon. -EBUSY: it is held. */
int extfs_device_hold(struct fs *fs);
void extfs_device_release(struct fs *fs);
void extfs_super_of(struct fs *fs, struct extfs_super *out);

struct extfs_space {
	uint64_t total, free, avail, busy, quarantined; /* blocks */
	uint64_t inodes;
};
void extfs_statfs(struct fs *fs, struct extfs_space *out);

struct extfs_stats {
	uint64_t commits, flush_only, images, checkpoints, home_writes, log_blocks, log_used, waits_for_space;
	uint64_t bufs, dirty, logged, hits, misses, evictions;
	uint64_t lookups;
	uint64_t dev_reads, dev_writes, dev_flushes;
	uint64_t durable_xid, running_xid;
	uint64_t early_writes, early_waits, early_errors, early_bytes; /* answered early; who met one; failed; memory */
};
void extfs_get_stats(struct fs *fs, struct extfs_stats *out);

/* Memory of the two caches. Bytes of metadata blocks: resident counts free pages, too; kept: dirty or only in the log,
 * so not evictable. Inodes: unused ones are what the limit is about. A limit is what holds now, asked what the mount
 * asked for. */
struct extfs_memory {
	uint64_t cache_bytes, cache_kept, cache_resident, cache_limit, cache_asked;
	uint64_t inodes, inodes_unused, inode_limit, inode_asked, inode_bytes; /* inode_bytes: of one */
	uint64_t lookup_bytes; /* of what the kernel knows of inodes: it forgets when it is short of memory itself */
};
void extfs_get_memory(struct fs *fs, struct extfs_memory *out);
/* New limits, never above those asked for, nor below 256 KiB. What is above leaves, if it is clean and unused; unless cache_bytes
 * rises, so does memory that is only kept for early writes to come, and what is free in the heap. It goes back to the kernel:
 * milliseconds, without I/O. Returns how many bytes left. */
uint64_t extfs_limit_caches(struct fs *fs, uint64_t cache_bytes, uint64_t inodes);
/* Before threads are made: this process serves file I/O, so that memory which it waits for must not in turn wait for file
 * I/O, which may be ours (prctl(2), PR_SET_IO_FLUSHER). Threads and children inherit it. 0, -EPERM, -EINVAL: an old kernel. */
int extfs_io_flusher(void);

/* ---- durability (these wait, except extfs_durable_now) ---- */
int extfs_sync(struct fs *fs);       /* everything done so far is durable */
int extfs_wait_space(struct fs *fs); /* until the journal has room */
void extfs_drain(struct fs *fs);     /* until the reaper has nothing to do */
void extfs_checkpoint(struct fs *fs); /* ask for one; does not wait */

/* ---- names and attributes ---- */
/* The kernel that has the filesystem mounted through this process hears of every change that these calls make, and is not waited
 * for. on: not of those of the calling thread, from now on: they are the mount's own requests. */
void extfs_of_mount(int on);

struct extfs_stat {
	uint64_t ino;
	uint32_t generation, mode, uid, gid, nlink, flags;
	uint64_t size, blocks; /* bytes; device blocks */
	int64_t atime, mtime, ctime, btime; /* seconds */
	uint32_t atime_ns, mtime_ns, ctime_ns, btime_ns;
	uint64_t rdev, parent, change;
	uint32_t subdirs, xattrs;
};
struct extfs_cred { uint32_t uid, gid, umask; };

int extfs_getattr(struct fs *fs, uint64_t ino, struct extfs_stat *out);
int extfs_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, struct extfs_stat *out);
/* mode with type: regular, fifo, socket, character or block device. */
int extfs_mknod(struct fs *fs, uint64_t dir, const char *name, size_t len, uint32_t mode, uint64_t rdev,
		const struct extfs_cred *cred, struct extfs_stat *out);
int extfs_mkdir(struct fs *fs, uint64_t dir, const char *name, size_t len, uint32_t mode,
		const struct extfs_cred *cred, struct extfs_stat *out);
int extfs_symlink(struct fs *fs, uint64_t dir, const char *name, size_t len, const char *target,
		  size_t target_len, const struct extfs_cred *cred, struct extfs_stat *out);
int extfs_tmpfile(struct fs *fs, uint64_t dir, uint32_t mode, const struct extfs_cred *cred,
		  struct extfs_stat *out); /* opened once: extfs_release() ends it */
int extfs_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, size_t len, struct extfs_stat *out);
/* lost, here and below, may be NULL: the inode that lost a name, as it is afterwards; ino 0: none did. meant: -EAGAIN when
 * the name leads to another inode; 0: whichever has it. */
int extfs_unlink(struct fs *fs, uint64_t dir, const char *name, size_t len, uint64_t meant, struct extfs_stat *lost);
int extfs_rmdir(struct fs *fs, uint64_t dir, const char *name, size_t len, uint64_t meant, struct extfs_stat *lost);
/* -EAGAIN when others have the names by now; victim 0: nobody had the new one. NULL: whoever has them. */
struct extfs_rename_meant {
	uint64_t moved, victim;
};
#define EXTFS_RENAME_NOREPLACE 1
#define EXTFS_RENAME_EXCHANGE 2
int extfs_rename(struct fs *fs, uint64_t from, const char *name, size_t len, uint64_t to,
		 const char *new_name, size_t new_len, unsigned flags, const struct extfs_rename_meant *meant,
		 struct extfs_stat *lost);
ssize_t extfs_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap);

#define EXTFS_ATTR_MODE 1
#define EXTFS_ATTR_UID 2
#define EXTFS_ATTR_GID 4
#define EXTFS_ATTR_ATIME 8
#define EXTFS_ATTR_MTIME 16
#define EXTFS_ATTR_KILL_PRIV 128
/* Fields of in that valid names; times from in's seconds and nanoseconds. */
int extfs_setattr(struct fs *fs, uint64_t ino, unsigned valid, const struct extfs_stat *in);

struct extfs_dirent {
	uint64_t ino, cookie;
	uint8_t type, name_len;
	char name[256];
};
/* Up to n entries with a cookie above `after`; without . and ..; returns how many. */
int extfs_readdir(struct fs *fs, uint64_t dir, uint64_t after, struct extfs_dirent *out, unsigned n);

/* Keep an inode whose names are gone: while open it is not freed. */
int extfs_open_inode(struct fs *fs, uint64_t ino);
int extfs_release(struct fs *fs, uint64_t ino);
int extfs_handle_check(struct fs *fs, uint64_t ino, uint32_t generation); /* 0 or the code of ESTALE */

#define EXTFS_ACCESS_R 4
#define EXTFS_ACCESS_W 2
#define EXTFS_ACCESS_X 1
/* What of mask mode and access ACL allow, see acl_access() in acl.h. Groups in any order. */
int extfs_access(struct fs *fs, uint64_t ino, uint32_t uid, const uint32_t *gids, unsigned n, unsigned mask);

ssize_t extfs_xattr_get(struct fs *fs, uint64_t ino, const char *name, void *value, size_t cap);
int extfs_xattr_set(struct fs *fs, uint64_t ino, const char *name, const void *value, size_t len, unsigned flags);
int extfs_xattr_remove(struct fs *fs, uint64_t ino, const char *name);
ssize_t extfs_xattr_list(struct fs *fs, uint64_t ino, char *names, size_t cap);

/* ---- file contents; all of these wait for device I/O: tools and tests, or a thread of their own ---- */
#define EXTFS_F_APPEND 1
#define EXTFS_F_DSYNC 2
#define EXTFS_F_KILL_PRIV 4
#define EXTFS_F_NOWAIT 128 /* -EAGAIN instead of a wait for a holder of layouts; see file.h */
int64_t extfs_read(struct fs *fs, uint64_t ino, uint64_t offset, void *buf, size_t len, unsigned flags);
int64_t extfs_write(struct fs *fs, uint64_t ino, uint64_t offset, const void *buf, size_t len, unsigned flags);
int extfs_truncate(struct fs *fs, uint64_t ino, uint64_t size, unsigned flags);
#define EXTFS_FALLOC_KEEP_SIZE 1
#define EXTFS_FALLOC_PUNCH_HOLE 2
#define EXTFS_FALLOC_ZERO_RANGE 16
int extfs_fallocate(struct fs *fs, uint64_t ino, unsigned mode, uint64_t offset, uint64_t len, unsigned flags);
int64_t extfs_copy(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t dst, uint64_t dst_offset, uint64_t len,
		   unsigned flags);
int extfs_fsync(struct fs *fs, uint64_t ino, int datasync);
#define EXTFS_SEEK_DATA 3
#define EXTFS_SEEK_HOLE 4
int64_t extfs_seek(struct fs *fs, uint64_t ino, uint64_t offset, int whence);

#define EXTFS_EXT_HOLE 0
#define EXTFS_EXT_UNWRITTEN 1
#define EXTFS_EXT_WRITTEN 2
struct extfs_extent {
	uint64_t file, block, len; /* blocks; block of a hole is 0 */
	uint8_t state, flags, shared;
};
/* Extents from file block `at` on below `end`, holes between them included when asked; returns how many. */
int extfs_map(struct fs *fs, uint64_t ino, uint64_t at, uint64_t end, int with_holes, struct extfs_extent *out,
	      unsigned n);

/* ---- layouts, see layout.h: for a layout server in this process, tools and tests ---- */
#define EXTFS_IOMODE_READ 1
#define EXTFS_IOMODE_RW 2
#define EXTFS_IOMODE_ANY 3
#define EXTFS_IOMODE_PIN 4
#define EXTFS_STATE_READ_WRITE 0
#define EXTFS_STATE_READ 1
#define EXTFS_STATE_INVALID 2
#define EXTFS_STATE_NONE 3
#define EXTFS_LAYOUT_F_WAIT 1
#define EXTFS_LAYOUT_F_RECALL 2
#define EXTFS_LAYOUT_F_ATOMIC 4
#define EXTFS_LAYOUT_F_LAZY 8
#define EXTFS_LAYOUT_F_MTIME 16
#define EXTFS_LAYOUT_F_ALL 32
struct extfs_core_layout_extent {
	uint64_t offset, device, length; /* bytes */
	int state;
};
struct extfs_core_range { uint64_t offset, length; };
struct extfs_layout_args {
	uint64_t holder;
	unsigned flags;
	int iomode;
	uint64_t offset, length, min_length, time_ms;
	struct extfs_core_layout_extent *extents; /* GET out */
	unsigned cap, count;
	uint64_t next, seq, map_gen; /* GET out; COMMIT: seq in */
	const struct extfs_core_range *ranges; /* COMMIT */
	unsigned nranges;
	uint64_t size; /* COMMIT in: last byte written + 1, or 0; out: the file's */
	int64_t mtime;
	uint32_t mtime_ns;
};
/* These wait for device I/O and durability; GET with WAIT also for other holders. -EAGAIN, -ENXIO, -ENOSPC, ... */
int extfs_layout_get(struct fs *fs, uint64_t ino, struct extfs_layout_args *args);
int extfs_layout_commit(struct fs *fs, uint64_t ino, struct extfs_layout_args *args);
int extfs_layout_return(struct fs *fs, uint64_t ino, struct extfs_layout_args *args); /* ino 0 with F_ALL */
/* The same for an event loop: calls that are begun in one thread, which also made the extfs_calls, and told there when they have ended.
 * They wait for nothing in that thread but metadata reads and, where the device answers faster than a thread wakes up, for the journal. */
struct extfs_calls;
int extfs_calls_create(struct fs *fs, struct extfs_calls **out);
void extfs_calls_destroy(struct extfs_calls *calls); /* none is running */
int extfs_calls_fd(struct extfs_calls *calls); /* readable while extfs_calls_ended() has something to do; only to be polled */
unsigned extfs_calls_running(struct extfs_calls *calls); /* begun and not told */
/* 1: it is running, *args and what it points to belong to it until it is told; else it is over, and this is the result. */
int extfs_calls_get(struct extfs_calls *calls, uint64_t ino, struct extfs_layout_args *args, uint64_t number);
int extfs_calls_commit(struct extfs_calls *calls, uint64_t ino, struct extfs_layout_args *args, uint64_t number);
int extfs_calls_return(struct extfs_calls *calls, uint64_t ino, struct extfs_layout_args *args, uint64_t number); /* not F_ALL */
/* The number of one that has ended, which is told by this, and its result; 0: none has. */
uint64_t extfs_calls_ended(struct extfs_calls *calls, int *result);
int extfs_calls_any(struct extfs_calls *calls); /* whether one has ended that is not told, and that the descriptor does not tell */
int extfs_layout_recall(struct fs *fs, uint64_t ino, uint64_t holder, int iomode, uint64_t offset, uint64_t length);
int extfs_layout_watch(struct fs *fs, uint64_t ino, uint64_t holder, int on);

#define EXTFS_HOLDER_LOCAL 1
#define EXTFS_HOLDER_CLIENT_KIND 2
#define EXTFS_HOLDER_LIVE 1
#define EXTFS_HOLDER_LOST 2
#define EXTFS_HOLDER_GONE 3
/* Why it is lost. */
#define EXTFS_LOST_NOT 0
#define EXTFS_LOST_RECALL 1
#define EXTFS_LOST_ENDED 2
#define EXTFS_LOST_MOUNT 3
struct extfs_holder {
	int kind, state;
	uint32_t uid, pid;
	uint64_t pid_start;
	uint8_t boot_id[16];
	uint64_t fence_key;
	char name[64];
	char fence[128];
	uint64_t id, key; /* key: out of register only */
	uint64_t grants, quarantined, recalls, missed;
	int cause; /* EXTFS_LOST_* */
	int returned; /* everything, since its fence was decided; forgotten at a restart */
};
/* Holders registered here send their events to extfs_layout_event(). These may ask for a retry. */
int extfs_holder_register(struct fs *fs, struct extfs_holder *holder);
int extfs_holder_resume(struct fs *fs, uint64_t id, uint64_t key);
int extfs_holder_check(struct fs *fs, uint64_t id, uint64_t key);
int extfs_holder_lost(struct fs *fs, uint64_t id);
int extfs_holder_gone(struct fs *fs, uint64_t id);
int extfs_holder_fenced(struct fs *fs, uint64_t id);
unsigned extfs_holder_list(struct fs *fs, uint64_t *id, struct extfs_holder *out, unsigned n);
/* ---- fences, see fence.h ---- */
#define EXTFS_FENCE_DECIDED 1
#define EXTFS_FENCE_ISSUED 2
#define EXTFS_FENCE_FAILED 4
struct extfs_fence {
	uint64_t holder;
	int state;
	uint32_t tries;
	int64_t decided; /* seconds since the epoch */
};
/* Durable at the return: waits. Before that it may ask for a retry. -ENOENT, -EBUSY: it is live; -EINVAL: not a step. */
int extfs_fence_put(struct fs *fs, uint64_t holder, int state, uint32_t tries);
/* Of holders with ids above *holder, in order; how many. Sets *holder. */
unsigned extfs_fence_list(struct fs *fs, uint64_t *holder, struct extfs_fence *out, unsigned n);
struct extfs_grant_look {
	uint64_t ino;
	uint32_t generation;
	uint64_t holder, offset, length, seq;
	int iomode;
	unsigned flags;
	uint64_t recalled_ns; /* since when a recall of it is not answered, on the layouts' clock; 0: none is */
};
int extfs_grant_list(struct fs *fs, uint64_t ino, uint64_t *offset, struct extfs_grant_look *out, unsigned n);
unsigned extfs_grant_inodes(struct fs *fs, uint64_t *ino, uint64_t *out, unsigned n);

#define EXTFS_EV_RECALL 1
#define EXTFS_EV_REVOKED 2
#define EXTFS_EV_MAP_CHANGED 3
#define EXTFS_EV_PIN_EXPIRED 4
#define EXTFS_EV_OVERFLOW 5
#define EXTFS_EV_FENCE_WANTED 6
#define EXTFS_EV_HOLDER_GONE 7
#define EXTFS_EV_LOCK_FREE 8
#define EXTFS_EV_DELEGATION_RECALL 9
#define EXTFS_EV_DELEGATION_REVOKED 10
#define EXTFS_EV_DELEGATION_ATTRS 11
#define EXTFS_EV_LOCK_WANTED 12
struct extfs_layout_event {
	int type;
	uint64_t seq, holder, ino;
	uint32_t generation;
	int iomode;
	uint64_t offset, length, grant_seq, left_ms;
};
int extfs_layout_event_fd(struct fs *fs); /* readable while there are events; read 8 bytes before taking them */
int extfs_layout_event(struct fs *fs, struct extfs_layout_event *out); /* 1, or 0: none */
uint64_t extfs_layout_now(struct fs *fs);
void extfs_layout_set_clock(struct fs *fs, uint64_t ns); /* virtual from now on */
void extfs_layout_settle(struct fs *fs); /* waits until nothing that is due now is left to be done */
/* Counters by name: NULL at the end. */
const char *extfs_layout_counter(struct fs *fs, unsigned i, uint64_t *value);
#define EXTFS_LATENCY_GET 0
#define EXTFS_LATENCY_COMMIT 1
#define EXTFS_LATENCY_RETURN 2
#define EXTFS_LATENCY_RECALL 3
#define EXTFS_LATENCY_BUCKETS 24
void extfs_layout_latency(struct fs *fs, int of, uint64_t *buckets); /* of powers of two of microseconds */

/* ---- delegations, see delegation.h; none of these waits. Events: grant_seq is the delegation's number ---- */
#define EXTFS_DELEGATION_OPEN_READ 1
#define EXTFS_DELEGATION_OPEN_WRITE 2
#define EXTFS_DELEGATION_READ 3
#define EXTFS_DELEGATION_WRITE 4
#define EXTFS_DELEGATION_SETATTR 5
#define EXTFS_DELEGATION_NAMESPACE 6
/* -EAGAIN: local users or another holder are against it, or the holder's own is being recalled; -ENOENT, -EOWNERDEAD: of the
 * holder; -EINVAL: no client, no regular file; -EISDIR; -EROFS. */
int extfs_delegation_grant(struct fs *fs, uint64_t ino, uint64_t holder, int write, uint64_t *seq);
int extfs_delegation_return(struct fs *fs, uint64_t ino, uint64_t holder); /* -ENOENT: it has none */
/* Before an operation of the caller itself: 0, or -EAGAIN, and what is in the way is recalled. exempt: whose own is not; 0: none. */
int extfs_delegation_break(struct fs *fs, uint64_t ino, uint64_t exempt, int op);
/* Open files of the local mount by their access; O_RDWR counts for both. */
int extfs_local_opens(struct fs *fs, uint64_t ino, uint32_t *readers, uint32_t *writers);
struct extfs_delegation_look {
	uint64_t ino;
	uint32_t generation;
	int write, recalled;
	uint64_t seq, left_ms; /* left_ms, of recalled ones: until it is revoked */
};
/* Of a holder, with numbers above *seq, in order; how many. Sets *seq. */
unsigned extfs_delegation_list(struct fs *fs, uint64_t holder, uint64_t *seq, struct extfs_delegation_look *out, unsigned n);

/* Whole blocks; see file.h. These wait. */
int extfs_exchange(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t other, uint64_t other_offset, uint64_t len);
int extfs_collapse(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t len);
int extfs_insert(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t len);
int64_t extfs_clone(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t dst, uint64_t dst_offset, uint64_t len,
		    unsigned flags);
int64_t extfs_dedupe(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t dst, uint64_t dst_offset, uint64_t len);
int extfs_map_generation(struct fs *fs, uint64_t ino, uint64_t *out);

/* ---- what the NFS server remembers over a restart, see nfs_record.h ---- */
#define EXTFS_NFS_VALUE_MAX 65536
struct extfs_nfs_record { uint64_t id; const void *value; size_t len; };
/* One transaction, durable at the return: waits. -E2BIG: too much for one. */
int extfs_nfs_put(struct fs *fs, const struct extfs_nfs_record *put, unsigned n, const uint64_t *del, unsigned m);
/* The first record of this or a higher number: its length, or -ENOENT. */
ssize_t extfs_nfs_next(struct fs *fs, uint64_t *id, void *value, size_t cap);

/* A mark that rides in the transaction of one of the caller's next calls, see rider.h: extfs_mknod, _mkdir, _symlink, _link,
 * _unlink, _rmdir, _rename, _setattr, _xattr_set, _xattr_remove. record: struct rider_disk of format.h. */
#define EXTFS_RIDER_BYTES 816
struct extfs_rider {
	uint64_t id;
	uint32_t written, reserved;
	uint8_t record[EXTFS_RIDER_BYTES];
};
/* For this thread, until it is called with NULL. */
void extfs_ride(struct extfs_rider *rider);

/* ---- record locks of the NFS server's owners, in one table with fcntl(2) locks of the mount; see plock.h ---- */
/* length UINT64_MAX: to the end. owner and pid: of the owner's own choice, or (local) of a process. */
struct extfs_lock {
	uint64_t owner, start, length;
	int write, local;
	uint32_t pid;
};
/* The inode is open (extfs_open_inode) as long as there are locks or watches. None of these waits. 1: *conflict is in the way. */
int extfs_lock_set(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length, int write,
		   struct extfs_lock *conflict);
int extfs_lock_test(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length, int write,
		    struct extfs_lock *conflict);
int extfs_lock_clear(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length);
int extfs_lock_release(struct fs *fs, uint64_t ino, uint64_t owner); /* its locks and its watch */
/* One event LOCK_FREE (holder: the owner) when it could be had. -EAGAIN: there are too many. */
int extfs_lock_watch(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length, int write);
int extfs_lock_unwatch(struct fs *fs, uint64_t ino, uint64_t owner);

/* ---- the bridge to /dev/fuse, see bridge.h ---- */
#define EXTFS_TRANSPORT_AUTO 0    /* FUSE over io_uring where the kernel offers it */
#define EXTFS_TRANSPORT_URING 1   /* or not at all */
#define EXTFS_TRANSPORT_CLASSIC 2 /* /dev/fuse */
struct extfs_bridge_options {
	const char *mountpoint;
	const char *fsname;   /* shown in /proc/mounts: the device */
	const char *options;  /* mount(8) options left for the kernel, comma separated; may be empty */
	unsigned threads;     /* 0: one for each CPU; without io_uring at most 4 */
	int writeback_cache;
	int read_only;
	int transport;
	char *why;            /* of -EOPNOTSUPP, a text; may be NULL */
	size_t why_len;
};
/* Mounts and starts serving. -ENOENT, -ENOTDIR, -EBUSY (mountpoint), -ENODEV (no /dev/fuse), -EPERM; -EOPNOTSUPP: no FUSE over
 * io_uring, which was demanded. */
int extfs_bridge_start(struct fs *fs, const struct extfs_bridge_options *opt, struct bridge **out);
int extfs_bridge_forward_fd(struct bridge *b); /* for pyfuse3, as /dev/fd/N; the caller's to close from then on */
int extfs_bridge_event_fd(struct bridge *b);   /* readable once unmounted */
int extfs_bridge_stop(struct bridge *b);       /* waits for requests under way; frees. Still mounted: detaches, aborts */
int extfs_bridge_unmount(struct bridge *b, int lazy); /* umount2(2): -EBUSY while files are open, unless lazy */
int extfs_bridge_abort(struct bridge *b);      /* every request fails from now on, as if unmounted */
/* While requests follow one another idle CPUs poll, by means of fd: /dev/cpu_dma_latency, open for writing; the bridge's from
 * then on. Once. -ENOMEM, -EAGAIN (no thread). See bridge_idle.h. */
int extfs_bridge_poll_when_idle(struct bridge *b, int fd);
/* A file's bytes (len 0: to the end; offset -1: attributes only) or a name changed behind the kernel's back. */
int extfs_bridge_notify_inode(struct bridge *b, uint64_t ino, int64_t offset, int64_t len);
int extfs_bridge_notify_entry(struct bridge *b, uint64_t dir, const char *name, size_t len);
#define EXTFS_OPCODE_NONE 0    /* not served: ENOSYS */
#define EXTFS_OPCODE_C 1
#define EXTFS_OPCODE_FORWARD 2 /* by pyfuse3 */
const char *extfs_bridge_opcode(unsigned opcode, int *server); /* name; NULL: no such opcode */
struct extfs_bridge_stats {
	uint64_t requests, forwarded, parked, interrupted;
	uint64_t by_ring; /* of the requests, those that came over io_uring */
	uint64_t by_opcode[64];
	uint64_t idle_polls;   /* how often idle CPUs were asked to poll; for how long in all */
	uint64_t idle_poll_ns;
	int idle_polling;      /* they do now */
	int idle_poll_error;   /* 0, or why they no longer will */
};
/* EXTFS_TRANSPORT_URING or _CLASSIC; why: what keeps it from io_uring, or "". */
int extfs_bridge_transport(struct bridge *b, const char **why);
void extfs_bridge_get_stats(struct bridge *b, struct extfs_bridge_stats *out);
