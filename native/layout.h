/* SPDX-License-Identifier: MIT
 *
 * layout.h - layouts: parts of a file's extent map in the hands of holders, who then read and write
 * the device themselves (DESIGN 5).
 *
 * Words.
 *   holder     somebody who may hold grants: a process that opened the control file, a client of
 *              the layout server. Has an id, a key that proves who speaks for it, and a
 *              record on disk that is durable before its first grant.
 *   grant      a segment (segment.h) that belongs to a holder: byte range, iomode, sequence number.
 *   exposure   a record on disk: unwritten blocks that a holder was told, and (one for each inode
 *              and holder) that it holds anything of the inode at all, with the greatest
 *              iomode.
 *   recall     the holder is asked to return a range; it has recall_ms to do so.
 *   revoke     it did not: we take the range back. Unwritten exposed blocks leave the map, written
 *              ones under a RW grant are copied to new blocks; the old ones enter the quarantine.
 *   lost       a holder that missed a recall, closed its descriptor holding something, or was there
 *              before the restart. It keeps its grants (those after a restart: the whole of every
 *              inode that it had anything of) until somebody wants the range: then that is revoked
 *              at once, without a recall.
 *   fenced     the storage cannot be reached by it any more, confirmed. Its grants vanish without a
 *              copy, its quarantine becomes free space, its record goes.
 *
 * States of a holder, and who leaves them:
 *   LIVE    -> LOST (recall deadline, holder_lost()), GONE (holder_gone())
 *   LOST    -> LIVE (holder_resume(), or LAYOUT_RETURN of everything: neither once its fence is
 *              decided, see fence.h), GONE (holder_fenced())
 *   GONE    record removed, object freed when its last quarantined block is released
 *
 * Invariants.
 *   1. Before LAYOUT_GET answers, everything it tells is durable: blocks, exposures, holder.
 *   2. An unwritten block under a grant is converted only by that holder's commit; without grant
 *      only by the server's own writes.
 *   3. Blocks that a lost holder can reach are never free and never mapped where anybody reads:
 *      while an inode has lost holders (layouts_lost_holder()), what is unmapped from it goes to
 *      quarantine.
 *   4. Only holder_fenced() or the holder's own return of everything empties its quarantine; once
 *      its fence is decided, only holder_fenced().
 *   5. RW grants of two holders never overlap. While a RW grant reaches past EOF, the bytes behind
 *      EOF in its block are zero, or the block is under that grant.
 *
 * Operations are file operations (file.h) of the kinds FILE_LAYOUT_*, with fop->layout. The thread
 * of this module ("extfs-layout") does what nobody waits for: deadlines, revokes, release of
 * quarantines, trimming of preallocation.
 *
 * Concurrency: holders, events and deadlines have one mutex (layouts->mutex), a leaf below
 * inode->lock; ioctx_wake() and inode_ref() may be called with it. Disk records change in
 * transactions. The set of inodes with lost holders changes with fs->lock exclusive and is read
 * with it at least shared.
 */
#ifndef EXTFS_LAYOUT_H
#define EXTFS_LAYOUT_H

#include "file.h"
#include "fs.h"

enum layout_iomode { IOMODE_READ = 1, IOMODE_RW = 2, IOMODE_ANY = 3, IOMODE_PIN = 4 };
/* RFC 5663 2.3, pnfs_block_extent_state4 */
enum layout_state { READ_WRITE_DATA = 0, READ_DATA = 1, INVALID_DATA = 2, NONE_DATA = 3 };

struct layout_extent {
	uint64_t offset, device, length; /* bytes; device is meaningless for NONE_DATA */
	enum layout_state state;
};
struct layout_range { uint64_t offset, length; };

#define LAYOUT_F_WAIT 0x1u    /* GET: recall what is in the way and wait for it; else -EAGAIN */
#define LAYOUT_F_RECALL 0x2u  /* GET without WAIT: recall, and -EAGAIN */
#define LAYOUT_F_ATOMIC 0x4u  /* GET: all blocks new, one commit swaps everything */
#define LAYOUT_F_LAZY 0x8u    /* COMMIT, RETURN: need not be durable at the answer */
#define LAYOUT_F_MTIME 0x10u  /* COMMIT: mtime is given */
#define LAYOUT_F_ALL 0x20u    /* RETURN: everything of this holder on every file; fop->in is any
			       * inode, the root's say, and plays no part */
#define LAYOUT_F_INVALIDATED 0x40u /* out: the kernel was told about pages */
#define LAYOUT_MAX_EXTENTS 512u /* in one answer; COW counts twice */
#define LAYOUT_MAX_RANGES 65536u /* in one commit */

struct layout_args {
	uint64_t holder;
	unsigned flags;
	enum layout_iomode iomode;
	/* GET, RETURN: rounded outwards by the caller to blocks; length UINT64_MAX: to the end */
	uint64_t offset, length;
	uint64_t min_length;     /* GET: less than this is no answer (0: one block) */
	uint64_t time_ms;        /* GET with PIN: how long at most */
	struct layout_extent *extents; /* GET out, room for `cap` */
	unsigned cap, count;
	uint64_t next;           /* GET out: [offset, next) was granted */
	/* GET out: of the grant. COMMIT in: 0, or newer grants do not count */
	uint64_t seq;
	uint64_t map_gen;        /* GET out */
	const struct layout_range *ranges; /* COMMIT; may be none (only size or mtime) */
	unsigned nranges;
	/* COMMIT: last byte written + 1; 0: leave. Out (all): the file's size */
	uint64_t size;
	struct timestamp mtime;
};

/* ---- lifetime; called by fs_open() and fs_close() ---- */
/* Before reaper_start(): reads holder and exposure records; holders found are LOST. */
int layouts_open(struct fs *fs);
int layouts_start(struct fs *fs);   /* the thread; not on a read-only mount */
void layouts_stop(struct fs *fs);   /* waits park for nobody from now on: they fail with -EIO */
void layouts_destroy(struct fs *fs);

/* ---- events ---- */
enum layout_event_type {
	EVENT_RECALL = 1,      /* return [offset, offset+length) of ino, iomode, until deadline */
	EVENT_REVOKED = 2,     /* it was taken back */
	EVENT_MAP_CHANGED = 3, /* of a watched inode; once until the map is asked for again */
	EVENT_PIN_EXPIRED = 4,
	EVENT_OVERFLOW = 5,    /* length events were lost before this one */
	/* to the daemon's sink: holder became LOST and can reach something */
	EVENT_FENCE_WANTED = 6,
	/* to the daemon's sink: fenced (length 1) or nothing held (0); quarantine is released */
	EVENT_HOLDER_GONE = 7,
	/* to the daemon's sink: what the NFS lock owner `holder` watches for (plock.h) could be
	 * had */
	EVENT_LOCK_FREE = 8,
	/* delegation.h */
	EVENT_DELEGATION_RECALL = 9,   /* return it until the deadline */
	EVENT_DELEGATION_REVOKED = 10, /* it is gone */
	/* a local user looked at the attributes of a write-delegated file */
	EVENT_DELEGATION_ATTRS = 11,
	/* to the daemon's sink: a local process waits for what the NFS lock owner `holder` has */
	EVENT_LOCK_WANTED = 12,
};
struct layout_event {
	enum layout_event_type type;
	uint64_t seq;          /* rises by one with every event of the sink, lost ones included */
	uint64_t holder;
	inum_t ino;
	uint32_t generation;
	enum layout_iomode iomode;
	uint64_t offset, length;
	uint64_t grant_seq;    /* RECALL: of the newest grant that is meant */
	uint64_t left_ms;      /* until the deadline, when it was sent */
};
/* Where events of holders go: a bounded ring (EVENT_RING). wake() is called with layouts->mutex
 * held whenever it stops being empty. Freed by event_sink_destroy(), after its holders were
 * lost. */
#define EVENT_RING 1024u
struct event_sink;
struct event_sink *event_sink_create(struct fs *fs, void (*wake)(void *arg), void *arg);
/* its holders become LOST, or GONE with nothing held */
void event_sink_destroy(struct fs *fs, struct event_sink *sink);
bool event_next(struct fs *fs, struct event_sink *sink, struct layout_event *out);
bool event_any(struct fs *fs, struct event_sink *sink);
/* The daemon's own (made by layouts_open): an eventfd says when it is not empty. */
struct event_sink *layouts_sink(struct fs *fs);
int layouts_event_fd(struct fs *fs);

/* ---- holders ---- */
enum holder_kind { HOLDER_LOCAL = 1, HOLDER_CLIENT = 2 };
enum holder_state { HOLDER_LIVE = 1, HOLDER_LOST = 2, HOLDER_GONE = 3 };
/* Why it is LOST: it did not answer a recall, nobody speaks for it any more, or it was there before
 * the mount. */
enum lost_cause { LOST_NOT = 0, LOST_RECALL = 1, LOST_ENDED = 2, LOST_MOUNT = 3 };
#define HOLDER_NAME_LEN 64u
#define HOLDER_FENCE_LEN 128u
struct holder_spec {
	enum holder_kind kind;
	uint32_t uid, pid;
	uint64_t pid_start;      /* clock ticks since boot, /proc/PID/stat 22 */
	uint8_t boot_id[16];
	/* client: what the storage knows it by; local: which host, 0: unknown */
	uint64_t fence_key;
	char name[HOLDER_NAME_LEN];   /* NUL-terminated */
	/* what a fence driver needs: for local ones "cgroup:PATH" or empty */
	char fence[HOLDER_FENCE_LEN];
};
/* Calls that change records may return -ERR_JOURNAL_FULL: nothing was done. */
/* -EAGAIN: this uid has HOLDERS_PER_UID already (uid 0: no limit). */
#define HOLDERS_PER_UID 256u
int holder_register(struct fs *fs, const struct holder_spec *spec, struct event_sink *sink,
		    uint64_t *id, uint64_t *key);
/* The same process, or its successor that stands for all it did, speaks again: LOST -> LIVE, with
 * its grants. -ENOENT, -EKEYREJECTED, -EBUSY (LIVE), -EKEYREVOKED (its fence is decided). */
int holder_resume(struct fs *fs, uint64_t id, uint64_t key, struct event_sink *sink);
/* 0, -ENOENT, -EKEYREJECTED; -EOWNERDEAD: LOST */
int holder_check(struct fs *fs, uint64_t id, uint64_t key);
/* LIVE -> LOST; with nothing held: GONE. */
int holder_lost(struct fs *fs, uint64_t id);
/* Says that it has stopped and holds nothing: -EBUSY while it has grants or quarantined blocks, or
 * its fence is decided. */
int holder_gone(struct fs *fs, uint64_t id);
/* Confirmed: it reaches nothing any more. Works off in the background (layouts_settle()). -ENOENT;
 * -EBUSY: it is LIVE. */
int holder_fenced(struct fs *fs, uint64_t id);

struct holder_look { /* for status */
	struct holder_spec spec;
	uint64_t id;
	enum holder_state state;
	uint64_t grants, quarantined; /* quarantined: blocks under its name */
	uint64_t recalls, missed;
	enum lost_cause cause;
	/* everything, since its fence was decided; forgotten at a restart */
	bool returned;
};
/* Holders with an id above *id, in order; 0 at the end. Sets *id. */
unsigned holder_list(struct fs *fs, uint64_t *id, struct holder_look *out, unsigned n);
struct grant_look {
	inum_t ino;
	uint32_t generation;
	uint64_t holder, offset, length, seq;
	enum layout_iomode iomode;
	unsigned flags; /* LAYOUT_F_ATOMIC */
	uint64_t recalled_at; /* ns of the clock: a recall of it is not answered yet; 0: none is */
};
/* Grants of one inode, in order of offset. *offset is a cursor: 0 to begin with, UINT64_MAX when
 * there are no more. */
unsigned grant_list(struct inode *in, uint64_t *offset, struct grant_look *out, unsigned n);
/* Inodes that have grants, in order of number, above *ino, which becomes the last. */
unsigned grant_inodes(struct fs *fs, inum_t *ino, inum_t *out, unsigned n);

/* ---- what else there is ---- */
/* Ask the holders for a range, without anybody waiting: they have recall_ms. iomode ANY: all.
 * holder 0: all. */
int layout_recall(struct inode *in, uint64_t holder, enum layout_iomode iomode, uint64_t offset,
		  uint64_t length);
/* The last name and the last open are gone: the holders are asked for everything. */
void layout_unlinked(struct inode *in);
/* MAP_CHANGED for this holder: 0. On until unwatched or the holder is gone. */
int layout_watch(struct inode *in, uint64_t holder, bool on);
/* The map of the inode has changed: fs->lock held exclusively. And: somebody asked for it, so the
 * next change is told again. */
void layout_map_changed(struct inode *in);
void layout_map_asked(struct inode *in);

/* An event LOCK_FREE, or LOCK_WANTED. */
void layout_lock_free(struct inode *in, uint64_t owner);
void layout_lock_wanted(struct inode *in, uint64_t owner);

/* Under which name blocks unmapped from this inode go to quarantine; 0: nobody lost can reach them.
 * fs->lock held. QUARANTINE_ANY: more than one. */
uint64_t layouts_lost_holder(struct fs *fs, inum_t ino);
extern const struct layout_hooks layouts_hooks; /* fs.h */

/* The clock of deadlines: monotonic, or, once set, virtual (tests): ns. Setting it wakes the
 * thread. */
uint64_t layouts_now(struct fs *fs);
void layouts_set_clock(struct fs *fs, uint64_t ns);
/* Wait until the thread has done all that is due now: revokes, releases, trims. Blocking; tests. */
void layouts_settle(struct fs *fs);

/* Counters; each rises for ever. */
#define LAYOUT_COUNTERS(X)                                                                       \
	X(gets) X(gets_failed) X(granted_read) X(granted_rw) X(granted_pin) X(granted_cow) \
	X(granted_atomic) X(allocated_blocks) X(conflicts) X(recalls) X(recalls_write) \
	X(recalls_map) X(recalls_share) X(recalls_get) X(recalls_asked) X(recalls_unlink) \
	X(recalls_answered) X(recalls_missed) X(returns) X(commits) X(commits_lazy) \
	X(commit_ranges) X(commit_blocks) X(refused_not_held) X(refused_stale) X(refused_size) \
	X(refused_lost) X(refused_invalid) X(revokes) X(revoked_blocks) X(relocated_blocks) \
	X(revokes_failed) X(fences) X(quarantined_blocks) X(released_blocks) X(trimmed_blocks) \
	X(events) X(events_lost) X(holders) X(holders_lost) X(pins_expired) \
	X(delegations_read) X(delegations_write) X(delegations_refused_open) \
	X(delegations_refused_use) X(delegations_refused_layout) X(delegations_refused_held) \
	X(delegation_recalls) X(delegation_recalls_open_read) X(delegation_recalls_open_write) \
	X(delegation_recalls_read) X(delegation_recalls_write) X(delegation_recalls_setattr) \
	X(delegation_recalls_namespace) X(delegations_returned) X(delegations_revoked) \
	X(delegations_dropped) X(delegation_attrs)
struct layout_counters {
#define X(name) _Atomic uint64_t name;
	LAYOUT_COUNTERS(X)
#undef X
};
struct layout_counters *layouts_counters(struct fs *fs);
#define LAYOUT_COUNT(fs, name, n) \
	atomic_fetch_add_explicit(&layouts_counters(fs)->name, (n), memory_order_relaxed)
/* Time from a recall to the return that ended it, and of the three calls: powers of two of
 * microseconds. */
#define LATENCY_BUCKETS 24u
enum latency_of { LATENCY_GET, LATENCY_COMMIT, LATENCY_RETURN, LATENCY_RECALL, LATENCY_KINDS };
void layouts_latency(struct fs *fs, enum latency_of of, uint64_t out[LATENCY_BUCKETS]);
void layouts_note_latency(struct fs *fs, enum latency_of of, uint64_t ns);

#endif
