/* SPDX-License-Identifier: MIT
 *
 * layout_priv.h - private to layout*.c, holder.c, exposure.c, event.c: the grant table's objects.
 *
 * Locks: fs->lock, inode->lock, then layouts->mutex (a leaf). A grant belongs to its inode's tree
 * (inode->lock) and to its holder's list (layouts->mutex); it holds a reference of the inode, which
 * is put with no lock held: grants that leave are gathered in a grant_list and freed at the end.
 */
#ifndef EXTFS_LAYOUT_PRIV_H
#define EXTFS_LAYOUT_PRIV_H

#include <bsd/sys/queue.h>
#include <bsd/sys/tree.h>

#include "extmap.h"
#include "fence.h"
#include "layout.h"

struct holder;
struct delegation;

struct grant {
	struct seg seg; /* kind GRANT_*; holder is holder->id */
	struct inode *in; /* referenced */
	struct holder *holder;
	unsigned flags;   /* LAYOUT_F_ATOMIC; GRANT_F_* */
	uint64_t seq;     /* layouts->next_seq when it was granted; a split keeps it */
	uint64_t until;   /* PIN: ns of the clock; set before it is added, after pin_timer() */
	/* last RECALL event sent for it and not answered: not to be said twice; time for the
	 * latency. at 0: none. Both locks to change it. A split copies it */
	uint64_t recalled_start, recalled_end, recalled_at;
	TAILQ_ENTRY(grant) of_holder;
	/* in layouts->by_inode: one grant of each inode that has any; mutex */
	bool indexed;
	RB_ENTRY(grant) by_inode;
	struct grant *next_dead; /* in a grant_list */
};
#define GRANT_F_GHOST 0x1000u /* of before the restart: stands for everything that the holder could
			       * have had of the inode; what a commit may convert under it is what
			       * its exposures say */
#define GRANT_F_STANDING 0x2000u /* a timed entry covers its recalled range; layout_recall.c */
#define GRANT_F_EXPIRED 0x4000u  /* a PIN that is being dropped */
#define GRANT_OF(segment) container_of(segment, struct grant, seg)

struct grant_list { struct grant *head; };

struct holder {
	struct layouts *ls;
	uint64_t id, key;
	struct holder_spec spec;
	enum holder_state state;
	struct event_sink *sink; /* NULL: LOST without anybody to tell */
	TAILQ_HEAD(grant_queue, grant) grants;
	uint64_t ngrants;
	uint64_t quarantined;  /* blocks in TREE_QUARANTINE under its id */
	uint64_t recalls, missed;
	enum lost_cause cause; /* LOST: why */
	struct fence fence;    /* fs->lock exclusive and mutex to change; see fence.h */
	xid_t xid;             /* its record's group: durable before its first grant */
	bool queued;           /* on layouts->to_release */
	bool ended;            /* nobody speaks for it: with nothing held it goes */
	bool idle;             /* of before the mount, and nobody has spoken for it since */
	uint64_t live_since;   /* ns of the clock: recalls of before are forgotten */
	/* on the release list, or release_start() is at work on it; release_ended() clears it */
	bool releasing;
	bool release_again;    /* wanted once more meanwhile */
	bool fence_told;
	bool confirmed;        /* GONE: holder_fenced() said so */
	bool returned;         /* LOST: everything, when its fence was decided already */
	bool tainted;          /* may reach blocks under QUARANTINE_ANY: layout_release.c */
	/* operations under way: holder_enter(). The object stays, and is not released, until 0 */
	unsigned users;
	uint64_t nlost_inodes; /* of layouts->lost; fs->lock exclusive and mutex to change */
	struct watch *watches;
	unsigned nwatches;
	TAILQ_HEAD(, delegation) delegations; /* delegation.c */
	RB_ENTRY(holder) by_id;
	TAILQ_ENTRY(holder) to_release;
};

/* An inode whose blocks a LOST holder can reach (invariant 3 of layout.h). */
struct lost_inode {
	inum_t ino;
	uint64_t holder;
	/* something of it was taken back; else it is of the restart, and holder_resume() removes
	 * it */
	bool revoked;
	RB_ENTRY(lost_inode) by_ino, by_holder; /* by (ino, holder); by (holder, ino) */
};

/* Something that is due at a time although nobody waits for it: a recall that was asked for, or the
 * end of a PIN. */
struct timed {
	uint64_t deadline, serial; /* order */
	inum_t ino;
	uint64_t holder;
	bool pin;
	unsigned kinds;            /* of grants, bit mask */
	uint64_t start, end, recall_seq;
	RB_ENTRY(timed) node;
};

/* A revoke under way. */
struct revoking {
	inum_t ino;
	uint64_t holder, start, end;
	TAILQ_ENTRY(revoking) link;
};

/* An operation of the thread that waits for a time: woken then, or earlier when space may have
 * become free (a holder was fenced, a release ended). Memory of the caller; thread only. */
struct nap {
	uint64_t deadline;
	struct op *op;
	TAILQ_ENTRY(nap) link;
};

/* An inode that the thread is to trim, or only to put. */
struct inode_work { struct inode *in; bool trim; struct inode_work *next; };

struct layouts {
	struct fs *fs;
	pthread_mutex_t mutex;
	RB_HEAD(holder_tree, holder) holders;
	uint64_t nlost;
	RB_HEAD(lost_by_ino, lost_inode) lost;       /* both trees: fs->lock, not the mutex */
	RB_HEAD(lost_by_holder, lost_inode) lost_of;
	_Atomic uint64_t lost_count;         /* of lost: 0 is the fast way */
	_Atomic uint64_t ntainted;           /* holders that are; changed with the mutex */
	uint64_t quarantined_any;            /* blocks under QUARANTINE_ANY; mutex */
	_Atomic uint64_t next_seq;           /* of grants */
	RB_HEAD(grant_tree, grant) by_inode; /* grant.c; mutex */
	struct seg *due_head, *due_tail;     /* parked segments in order of deadline; mutex */
	unsigned due_own;                    /* of them, operations of the thread */
	RB_HEAD(timed_tree, timed) timed;    /* mutex */
	uint64_t timed_serial;
	TAILQ_HEAD(, holder) to_release;     /* mutex */
	struct inode_work *inode_work;       /* mutex */
	_Atomic uint64_t nwatches;
	RB_HEAD(recalled_tree, delegation) recalled; /* delegation.c; mutex */
	_Atomic uint64_t nwrite_delegations; /* changed with the mutex */
	/* LOST holders of before the mount that hold nothing go then; 0: done; mutex */
	uint64_t idle_at;
	uint64_t recall_ns;
	_Atomic uint64_t virtual_ns;         /* 0: monotonic */
	struct event_sink *sink;
	int event_fd;
	struct layout_counters counters;
	_Atomic uint64_t latency[LATENCY_KINDS][LATENCY_BUCKETS];
	/* the thread */
	pthread_t thread;
	bool running;         /* mutex */
	bool joinable;
	bool stop;            /* mutex */
	pthread_cond_t settled;
	uint64_t rounds, wanted; /* mutex: layouts_settle() */
	pthread_mutex_t awake; /* the thread's while it does not sleep; outermost */
	unsigned working;     /* operations of the thread under way; mutex */
	unsigned napping;     /* of them, in naps; mutex */
	struct ioctx *ctx;    /* the thread's */
	struct op kick;       /* wakes it; mutex: kicked */
	bool kicked;
	/* the thread's own */
	TAILQ_HEAD(, revoking) revokes;
	unsigned nrevokes;
	unsigned nparked;     /* of them, waiting for their segment */
	TAILQ_HEAD(, nap) naps;
};

RB_PROTOTYPE(holder_tree, holder, by_id, );
RB_PROTOTYPE(timed_tree, timed, node, );
RB_PROTOTYPE(lost_by_ino, lost_inode, by_ino, );
RB_PROTOTYPE(lost_by_holder, lost_inode, by_holder, );

/* ---- layout.c ---- */
uint64_t layouts_next_seq(struct layouts *ls); /* any locks */

/* ---- layout_thread.c ---- */
void layouts_kick(struct layouts *ls); /* mutex held: there is something for the thread */
/* Run a file operation (file_op_init() with ls->ctx) on the thread; done is called there, possibly
 * inside. Counted in `working` from here on: done calls layouts_ran() as its last act. Only from
 * the thread. */
void layouts_run(struct layouts *ls, struct file_op *fop);
void layouts_ran(struct layouts *ls);
/* The same count for work of the thread that is no file operation: +1, and layouts_ran() at its
 * end. No mutex held. */
void layouts_working(struct layouts *ls);
/* Park an operation of the thread until a time of the clock (or earlier, see struct nap): op is
 * woken. */
void layouts_nap(struct layouts *ls, struct nap *nap, struct op *op, uint64_t deadline);
/* Have blocks past EOF that LAYOUT_GET allocated freed in the background (trim_start()). Takes a
 * reference of its own; the mutex not held, in->lock may be. */
void layouts_want_trim(struct inode *in);
/* For inodes that are to be put (or trimmed) where no lock is held: takes over the reference, and
 * the memory of `work`. Mutex held. */
void inode_work_add(struct layouts *ls, struct inode_work *work);
void work_inodes(struct layouts *ls, bool trim); /* the list; no lock held */
/* A revoke that revoke_start() began has ended, however: its range may be asked for again. Thread;
 * no lock held. Not instead of layouts_ran(). */
void revoke_ended(struct layouts *ls, inum_t ino, uint64_t holder, uint64_t start, uint64_t end);
/* release_start() has done its work: no lock held; thread. The holder may be gone by now
 * (holder_forget()). Not instead of layouts_ran(). */
void release_ended(struct layouts *ls, uint64_t holder);

/* ---- layout_recall.c ---- */
extern const struct seg_hooks layout_hooks;
#define ALL_GRANTS (1u << SEG_GRANT_READ | 1u << SEG_GRANT_RW | 1u << SEG_GRANT_PIN)
/* The due list; mutex held. */
void due_insert(struct layouts *ls, struct seg *w, uint64_t deadline);
void due_remove(struct layouts *ls, struct seg *w);
/* mutex held: a holder became LOST. */
void recalls_hurry(struct layouts *ls);
void timed_insert(struct layouts *ls, struct timed *tm);
/* inode->lock and mutex held. The part of the grant that [start, end) means: of ATOMIC ones the
 * whole. */
void grant_meant(const struct grant *g, uint64_t *start, uint64_t *end);
struct layout_event grant_event(const struct grant *g, enum layout_event_type type, uint64_t start,
				uint64_t end);
/* Have what is in a parked waiter's way returned. Until when. */
uint64_t recall_for(struct layouts *ls, struct seg *w, struct grant *g);
/* ---- layout_due.c ---- */
/* Thread: whatever is due at `now`. Returns the next deadline, UINT64_MAX: none. */
uint64_t recalls_due(struct layouts *ls, uint64_t now);
/* Thread, at the end: whoever waits for a holder fails with -EIO. True: somebody did. */
bool recalls_fail_waiters(struct layouts *ls);
/* ---- layout_recall.c again ---- */
/* mutex held: the clock is another one now: what was `from` is `to`. */
void recalls_shift(struct layouts *ls, uint64_t from, uint64_t to);
/* mutex held: what is due at `from` or later becomes due so much later that `from` is `to`. */
void recalls_postpone(struct layouts *ls, uint64_t from, uint64_t to);
void recalls_destroy(struct layouts *ls);
/* PINs of this holder whose `until` has come are to be dropped then; to be called before the grant
 * is made. -ENOMEM. The mutex not held. */
int pin_timer(struct layouts *ls, inum_t ino, uint64_t holder, uint64_t until);
/* [start, end) of a grant is being returned (it goes, or will be cut): the latency and the end of
 * its recall. in->lock held, and the mutex. */
void recall_answered(struct layouts *ls, struct grant *g, uint64_t start, uint64_t end);

/* ---- grant.c ---- in->lock held, layouts->mutex not, unless said otherwise */
/* No lock needed. */
struct grant *grant_alloc(void);
void grant_free(struct grant *g);
/* From the held op segment `s` to a grant: cuts what this holder has of the same kind in [start,
 * end), adds one grant and returns it. spare[0] becomes it (`until` as the caller set it), spare[1]
 * may be needed for a cut in the middle (NULL: memory is got then); what was used is set to NULL,
 * the rest is freed by the caller. Its seq, which is also seg.order, is the newest. */
struct grant *grant_add_locked(struct inode *in, struct holder *h, struct seg *s,
			       enum seg_kind kind, uint64_t start, uint64_t end, unsigned flags,
			       struct grant *spare[3], struct grant_list *dead);
/* At mount: everything of the inode, as a GHOST. g becomes it. 0 or -ENOMEM. */
int grant_ghost_locked(struct inode *in, struct holder *h, enum seg_kind kind, struct grant *g);
/* Take [start, end) from the holder's grants of the kinds (bit mask): whole ones go to dead, others
 * shrink or split. An ATOMIC one goes whole or stays as it is. *spare: used for a cut in the
 * middle, of which there is at most one for each kind; more is got when needed (no memory: that
 * grant stays as it is). Returns bytes taken, at most UINT64_MAX. */
uint64_t grant_cut_locked(struct inode *in, uint64_t holder, unsigned kinds, uint64_t start,
			  uint64_t end, struct grant **spare, struct grant_list *dead);
void grant_list_free(struct fs *fs, struct grant_list *dead); /* no lock held: puts inodes */

/* ---- holder.c ---- */
/* mutex held; GONE ones, too, until their record is removed */
struct holder *holder_find(struct layouts *ls, uint64_t id);
/* An operation in the name of a holder begins: until holder_leave() the object stays and what it
 * holds is not released, so that it may record exposures and add grants even if the holder becomes
 * LOST or is fenced meanwhile. -ENOENT; -EOWNERDEAD: it is LOST, with `live` only. The mutex not
 * held. */
int holder_enter(struct layouts *ls, uint64_t id, bool live, struct holder **out);
void holder_leave(struct layouts *ls, struct holder *h);
/* GONE: no such holder. The mutex not held */
enum holder_state holder_state_of(struct layouts *ls, uint64_t id);
/* It missed a deadline (mutex not held, fs->lock not held). LIVE -> LOST. */
void holder_missed(struct fs *fs, uint64_t id);
/* It returned all that it had, on every file: LOST -> LIVE, nothing of it is lost any more, the
 * thread releases its quarantine. Nothing of that if its fence is decided: see fence.h. After the
 * last transaction of the return; no lock held. */
void holder_returned_all(struct fs *fs, uint64_t id);
/* Blocks went to quarantine under its name (QUARANTINE_ANY too), or left it. fs->lock exclusive,
 * before the commit (a cancel undoes it). 0 or -ENOMEM. */
int holder_quarantined(struct trans *t, uint64_t id, int64_t blocks);
/* In a transaction: remove the record, and with the commit the object, whose users are 0; posts
 * HOLDER_GONE. */
int holder_forget(struct trans *t, struct holder *h);
/* mutex held. FENCE_WANTED to the daemon, once, if it is LOST and can reach something. */
void holder_tell_fence(struct layouts *ls, struct holder *h);
/* Thread: what has been waiting for its time. */
void holders_drop_idle(struct layouts *ls);
void holders_destroy(struct layouts *ls);
/* mutex held: release_start() for it on the thread. For a GONE holder that is: drop its grants
 * without copies, free staged blocks, remove exposures and inode records, release the quarantine,
 * lost_del(), holder_forget(). For a LIVE one (it returned all): only the quarantine. */
void holder_want_release(struct layouts *ls, struct holder *h);
/* mutex held: release_start() has come to its end. One that ended meanwhile may have nothing now. */
void holder_was_released(struct layouts *ls, struct holder *h);

/* ---- holder_disk.c ---- */
/* In a transaction; add: gives it its id. */
int holder_record_add(struct trans *t, struct holder *h);
int holder_record_gone(struct trans *t, const struct holder *h);
int holder_record_delete(struct trans *t, const struct holder *h);
/* at mount: records -> LOST holders, with their fences; GONE ones on the release list */
int holders_load(struct fs *fs);
/* ---- fence.c, for holders ---- */
/* In a transaction that removes the holder, or makes it GONE: with its end the fence is over. */
int fence_record_delete(struct trans *t, const struct holder *h);
int fence_over(struct trans *t, struct holder *h);
bool fence_decided(struct layouts *ls, uint64_t holder); /* it has a record; mutex not held */
int fences_load(struct fs *fs); /* fs->lock held */
/* holder.c, for it */
struct holder *holder_new(struct layouts *ls);
void holder_enter_table(struct layouts *ls, struct holder *h);
void holder_count_quarantine(struct layouts *ls, uint64_t id, int64_t blocks);

/* ---- holder_lost.c ---- inodes that lost holders can reach */
/* In a transaction: this inode can be reached by the lost holder from now on: something is taken
 * back. */
int lost_add(struct trans *t, inum_t ino, uint64_t holder);
/* the same at mount, for what its record says */
int lost_load(struct fs *fs, inum_t ino, uint64_t holder);
/* fs->lock exclusive; ino 0: all inodes */
void lost_del(struct fs *fs, inum_t ino, uint64_t holder);
bool lost_has(struct fs *fs, inum_t ino, uint64_t holder); /* fs->lock */
bool lost_revoked(struct fs *fs, inum_t ino, uint64_t holder); /* something was taken; fs->lock */
/* First inode above ino that is in the set for this holder; 0: none. fs->lock. */
inum_t lost_next(struct fs *fs, uint64_t holder, inum_t ino);
/* holder_resume(): what only the restart put there. fs->lock exclusive. */
void lost_del_unrevoked(struct fs *fs, uint64_t holder);
void lost_destroy(struct layouts *ls);

/* ---- exposure.c: TREE_EXPOSURE, in transactions or (queries) with fs->lock shared ---- */
/* The holder has anything of the inode: recorded with its greatest iomode (RW above READ). Changes
 * nothing when it is there. *added */
int exposure_note_inode(struct trans *t, inum_t ino, uint64_t holder, enum layout_iomode iomode,
			bool *added);
/* Is it recorded, at least with this iomode? fs->lock shared. 1, 0 or a code. */
int exposure_has_inode(struct fs *fs, inum_t ino, uint64_t holder, enum layout_iomode iomode);
/* with its extents, none of which are left */
int exposure_forget_inode(struct trans *t, inum_t ino, uint64_t holder);
/* [file, file+len) is mapped at block, unwritten (or in the staging fork), and was told to the
 * holder. Replaces what is there. */
int exposure_add(struct trans *t, inum_t ino, fileblk_t file, nblocks_t len, fsblock_t block,
		 bool staging, uint64_t holder);
int exposure_remove(struct trans *t, inum_t ino, fileblk_t file, fileblk_t end, uint64_t holder);
/* Is anything recorded of this holder, of any inode? True also when it would take long to find
 * out. fs->lock. */
bool exposures_any(struct fs *fs, uint64_t holder);
/* First exposed run at or after `at` below end of this holder (0: of any). -ENOENT. */
struct exposure { fileblk_t file; nblocks_t len; fsblock_t block; bool staging; uint64_t holder; };
int exposure_find(struct fs *fs, inum_t ino, uint64_t holder, fileblk_t at, fileblk_t end,
		  struct exposure *out);
/* Are all of them this holder's exposures, at these very blocks? 1, 0 or a code. */
int exposure_covers(struct fs *fs, inum_t ino, uint64_t holder, const struct extent *ext,
		    bool staging);
/* At mount: inodes of a holder become ghosts. */
int exposures_load(struct fs *fs); /* layout_ghosts.c */

/* ---- layout_watch.c ---- */
/* mutex held; references are put by the thread */
void watches_drop(struct layouts *ls, struct holder *h);
void watches_drop_inode(struct inode *in);               /* mutex not held */

/* ---- event.c ---- mutex held */
struct event_sink *sink_new(void (*wake)(void *arg), void *arg);
void sink_free(struct event_sink *sink);
void event_post(struct layouts *ls, struct event_sink *sink, const struct layout_event *ev);
/* Nobody keeps up with it: what can be said later should not take the room of what cannot. */
bool event_crowded(const struct event_sink *sink);

/* ---- layout_revoke.c ---- on the thread */
/* Begin to take [start, end) of in from the holder: asynchronous, by layouts_run(); revoke_ended()
 * at the end. Takes over the reference. */
void revoke_start(struct layouts *ls, struct inode *in, uint64_t holder, uint64_t start,
		  uint64_t end);
/* ---- layout_release.c ---- */
/* mutex held: the holder may reach blocks that are kept under QUARANTINE_ANY, until it has returned
 * everything or is fenced. */
void holder_taint(struct layouts *ls, struct holder *h);
/* on the thread */
/* What a fenced or returned holder had becomes free, see holder_want_release(): asynchronous
 * (counted by layouts_working() or layouts_run()); release_ended() at the end. */
void release_start(struct layouts *ls, uint64_t holder);
/* EXT_F_LAYOUT blocks past EOF; takes over the reference */
void trim_start(struct layouts *ls, struct inode *in);

/* ---- the operations ---- */
struct layout_state_run; /* in file_run */
enum step layout_get_start(struct file_run *r);
enum step layout_commit_start(struct file_run *r);
enum step layout_return_start(struct file_run *r);
enum step layout_revoke_start(struct file_run *r);
enum step layout_trim_start(struct file_run *r);

#endif
