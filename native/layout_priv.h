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

#include "layout.h"

struct holder;

struct grant {
	struct seg seg; /* kind GRANT_*; holder is holder->id */
	struct inode *in; /* referenced */
	struct holder *holder;
	unsigned flags;   /* LAYOUT_F_ATOMIC; GRANT_F_* */
	uint64_t seq;     /* layouts->next_seq when it was granted; a split keeps it */
	uint64_t until;   /* PIN: ns of the clock */
	/* last RECALL event sent for it and not answered: not to be said twice; time for the latency */
	uint64_t recalled_start, recalled_end, recalled_at;
	TAILQ_ENTRY(grant) of_holder;
	struct grant *next_dead; /* in a grant_list */
};
#define GRANT_F_GHOST 0x1000u /* of before the restart: stands for everything that the holder could have had of the inode; what
			       * a commit may convert under it is what its exposures say */
#define GRANT_OF(segment) container_of(segment, struct grant, seg)

struct grant_list { struct grant *head; };

struct holder {
	uint64_t id, key;
	struct holder_spec spec;
	enum holder_state state;
	struct event_sink *sink; /* NULL: LOST without anybody to tell */
	TAILQ_HEAD(, grant) grants;
	uint64_t ngrants;
	uint64_t quarantined;  /* blocks in TREE_QUARANTINE under its id */
	uint64_t recalls, missed;
	xid_t xid;             /* its record's group: durable before its first grant */
	bool releasing;        /* the thread empties its quarantine */
	bool fence_told;
	RB_ENTRY(holder) by_id;
};

/* An inode whose blocks a LOST holder can reach (invariant 3 of layout.h). */
struct lost_inode {
	inum_t ino;
	uint64_t holder;
	RB_ENTRY(lost_inode) node; /* by (ino, holder) */
};

struct layouts {
	struct fs *fs;
	pthread_mutex_t mutex;
	RB_HEAD(holder_tree, holder) holders;
	uint64_t nlost;
	RB_HEAD(lost_tree, lost_inode) lost; /* fs->lock, not the mutex */
	_Atomic uint64_t lost_count;         /* of lost: 0 is the fast way */
	uint64_t next_seq;                   /* of grants; mutex */
	struct seg *due_head, *due_tail;     /* parked segments in order of deadline; mutex */
	struct standing *standing;           /* recalls that nobody waits for; mutex */
	uint64_t recall_ns;
	_Atomic uint64_t virtual_ns;         /* 0: monotonic */
	struct event_sink *sink;
	int event_fd;
	struct layout_counters counters;
	_Atomic uint64_t latency[LATENCY_KINDS][LATENCY_BUCKETS];
	/* the thread */
	pthread_t thread;
	bool running;
	bool stop;            /* mutex */
	pthread_cond_t settled;
	uint64_t rounds, wanted; /* mutex: layouts_settle() */
	unsigned working;     /* operations of the thread under way; mutex */
	struct ioctx *ctx;    /* the thread's */
	struct op kick;       /* wakes it; mutex: kicked */
	bool kicked;
};

/* ---- layout.c ---- */
void layouts_kick(struct layouts *ls); /* mutex held: there is something for the thread */
uint64_t layouts_next_seq(struct layouts *ls);
/* Run a file operation on the thread; done is called there. Only from the thread. */
void layouts_run(struct layouts *ls, struct file_op *fop);

/* ---- grant.c ---- */
/* From the held op segment `s` to a grant: cuts what this holder has of the same kind in the range, adds one grant. spare:
 * allocated before (grant_alloc), two more for a cut in the middle; what was not used is freed by the caller.
 * in->lock held; layouts->mutex not. */
struct grant *grant_alloc(void);
void grant_free(struct grant *g);
void grant_add_locked(struct inode *in, struct holder *h, struct seg *s, enum seg_kind kind, uint64_t start, uint64_t end,
		      unsigned flags, struct grant *spare[3], struct grant_list *dead);
/* Take [start, end) from the holder's grants of the kinds (bit mask): whole ones go to dead, others shrink or split (spare as
 * above, one is enough: only one can be cut in the middle). Returns bytes taken. in->lock held. */
uint64_t grant_cut_locked(struct inode *in, uint64_t holder, unsigned kinds, uint64_t start, uint64_t end,
			  struct grant **spare, struct grant_list *dead);
void grant_list_free(struct fs *fs, struct grant_list *dead); /* no lock held: puts inodes */

/* ---- holder.c ---- */
/* mutex held */
struct holder *holder_find(struct layouts *ls, uint64_t id);
/* It missed a deadline (mutex not held, fs->lock not held). LIVE -> LOST. */
void holder_missed(struct fs *fs, uint64_t id);
int holders_load(struct fs *fs); /* at mount: records -> LOST holders */
/* In a transaction: this inode can be reached by the lost holder from now on. And no more (0: all inodes). */
int lost_add(struct trans *t, inum_t ino, uint64_t holder);
void lost_del(struct fs *fs, inum_t ino, uint64_t holder); /* fs->lock exclusive */
/* In a transaction: remove the record; the object when nothing is quarantined. */
int holder_forget(struct trans *t, struct holder *h);

/* ---- exposure.c: TREE_EXPOSURE, in transactions or (queries) with fs->lock shared ---- */
/* The holder has anything of the inode: recorded with its greatest iomode (RW above READ). Changes nothing when it is there. *added */
int exposure_note_inode(struct trans *t, inum_t ino, uint64_t holder, enum layout_iomode iomode, bool *added);
/* Is it recorded, at least with this iomode? fs->lock shared. 1, 0 or a code. */
int exposure_has_inode(struct fs *fs, inum_t ino, uint64_t holder, enum layout_iomode iomode);
int exposure_forget_inode(struct trans *t, inum_t ino, uint64_t holder); /* with its extents, none of which are left */
/* [file, file+len) is mapped at block, unwritten (or in the staging fork), and was told to the holder. Replaces what is there. */
int exposure_add(struct trans *t, inum_t ino, fileblk_t file, nblocks_t len, fsblock_t block, bool staging, uint64_t holder);
int exposure_remove(struct trans *t, inum_t ino, fileblk_t file, fileblk_t end, uint64_t holder);
/* First exposed run at or after `at` below end of this holder (0: of any). -ENOENT. */
struct exposure { fileblk_t file; nblocks_t len; fsblock_t block; bool staging; uint64_t holder; };
int exposure_find(struct fs *fs, inum_t ino, uint64_t holder, fileblk_t at, fileblk_t end, struct exposure *out);
/* Are all of them this holder's exposures, at these very blocks? 1, 0 or a code. */
int exposure_covers(struct fs *fs, inum_t ino, uint64_t holder, const struct extent *ext, bool staging);
/* At mount: inodes of a holder become ghosts. */
int exposures_load(struct fs *fs);

/* ---- event.c ---- mutex held */
void event_post(struct layouts *ls, struct event_sink *sink, const struct layout_event *ev);

/* ---- layout_revoke.c ---- on the thread */
/* Begin to take [start, end) of in from the holder: asynchronous; layouts->working counts it. Takes over the reference. */
void revoke_start(struct layouts *ls, struct inode *in, uint64_t holder, uint64_t start, uint64_t end);
/* ---- layout_release.c ---- on the thread */
void release_start(struct layouts *ls, uint64_t holder); /* quarantine of a fenced or returned holder becomes free */
void trim_start(struct layouts *ls, struct inode *in);   /* EXT_F_LAYOUT blocks past EOF; takes over the reference */

/* ---- the operations ---- */
struct layout_state_run; /* in file_run */
enum step layout_get_start(struct file_run *r);
enum step layout_commit_start(struct file_run *r);
enum step layout_return_start(struct file_run *r);
enum step layout_revoke_start(struct file_run *r);
enum step layout_trim_start(struct file_run *r);

#endif
