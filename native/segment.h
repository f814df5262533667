/* SPDX-License-Identifier: MIT
 *
 * segment.h - who is using which byte range of an inode right now: the tree that makes everybody
 * wait for everybody else.
 *
 * The server's own device I/O and map changes are short-lived segments in it; the grants of layout
 * holders are long-lived ones in the same tree (layout.h). Ranges are half-open [start, end) in
 * bytes; end UINT64_MAX means "to the end of every file". Callers round to blocks.
 *
 * Two segments clash when their ranges overlap and the table says x; h: only when they are of
 * different holders (an operation that comes through the mount is of no holder, 0, and so differs
 * from all of them).
 *
 *                  READ WRITE WRITE MAP SHARE GET_ PEND- GET_ GET_ GET_ SWAP | GRANT_ GRANT_ GRANT_
 *                  _IO  _IO   _MAP            READ ING   RW   MAP  PIN       | READ   RW     PIN
 *   READ_IO         -    -     -     x   -     -    -     -    -    -    x   |  -      -      -
 *   WRITE_IO        -    x     x     x   x     -    -     x    x    x    x   |  -      h      x
 *   WRITE_MAP       -    x     x     x   x     x    -     x    x    x    x   |  h      h      x
 *   MAP             x    x     x     x   x     x    -     x    x    x    x   |  h      h      x
 *   SHARE           -    x     x     x   x     -    -     x    x    -    x   |  -      h      -
 *   GET_READ        -    -     x     x   -     -    -     -    x    -    x   |  -      -      -
 *   PENDING         -    -     -     -   -     -    x     -    -    -    -   |  -      -      -
 *   GET_RW          -    x     x     x   x     -    -     x    x    x    x   |  -      h      x
 *   GET_MAP         -    x     x     x   x     x    -     x    x    x    x   |  h      h      x
 *   GET_PIN         -    x     x     x   -     -    -     x    x    -    x   |  -      x      -
 *   SWAP            x    x     x     x   x     x    -     x    x    x    x   |  h      h      x
 *
 * A PENDING grant waits until the kernel has dropped its pages, one after the other, and those are
 * locked while a READ or WRITE of them is not answered: by us, after it had its segment. So nobody
 * but another PENDING one may wait for it; not even who only stands before a READ or WRITE
 * in the queue, or has a segment of another inode: notifications may wait for one another (bridge_notify.c).
 * Its GET_RW segment comes afterwards, at the end of the queue: in front of those who wait it would
 * keep them waiting for one grant after the other. Grants do not clash with one another: they were let in as GET_*.
 *
 *   READ_IO    the server reads                       SHARE    clone from here: blocks become shared
 *   WRITE_IO   writes blocks in place                 GET_*    a LAYOUT_GET under way: READ; PENDING (RW, the kernel's
 *   WRITE_MAP  writes holes or unwritten blocks                pages are being dropped); RW over written, unshared
 *   MAP        changes the map under everybody                 blocks only; MAP when the map changes; PIN
 *                                                     SWAP     a LAYOUT_COMMIT that exchanges blocks
 *
 * A segment that clashes parks: it keeps its place in the inode's queue (first come, first served
 * among those that clash, so nobody starves), and its op is resumed when it has been granted. When
 * a grant is in its way, the hooks of layout.c are told, which recall it. An op holds at most one
 * segment per inode, and takes segments of two inodes in order of inode number, so there is no
 * cycle of waiters; what a grant makes us wait for ends by the recall deadline.
 *
 * Who does not wait (seg->nowait): it parks behind segments of operations that need nothing but the
 * device, the journal and the kernel's pages, and never where it would wait for a holder, be it
 * that a parked segment in front of it does, or a held one whose operation waits for a segment of
 * another inode (stalled). Then, on arrival, when it changes its kind, or later, when what it is
 * parked behind begins to wait for a holder, it ends with -EAGAIN; the grants in its own way are
 * recalled. Where that is hard to tell it errs on the side of -EAGAIN.
 *
 * Revokes (seg->revokes): a MAP segment in the name of the holder that it takes from. Others wait for
 * what it takes, so it waits only for what is held. RW grants of two holders overlap after a restart,
 * and the revoke of each would wait for the grant of the other: so the RW grants of a holder, where
 * revokes that are parked in its name cover them, are not in the way of other revokes. The first that
 * gets its segment keeps the others out as any MAP does. A revoke that ends and leaves grants there,
 * having failed, has them told to those that are parked.
 *
 * Concurrency: inode->lock, taken inside. fs->lock may be held shared or not at all; grants are
 * removed by a revoke with fs->lock held exclusively.
 */
#ifndef EXTFS_SEGMENT_H
#define EXTFS_SEGMENT_H

#include "inode.h"

enum seg_kind {
	SEG_READ_IO, SEG_WRITE_IO, SEG_WRITE_MAP, SEG_MAP, SEG_SHARE,
	SEG_GET_READ, SEG_PENDING, SEG_GET_RW, SEG_GET_MAP, SEG_GET_PIN, SEG_SWAP,
	SEG_GRANT_READ, SEG_GRANT_RW, SEG_GRANT_PIN,
	SEG_KINDS
};
#define SEG_FIRST_GRANT SEG_GRANT_READ

struct seg {
	uint64_t start, end;
	enum seg_kind kind;
	bool revokes;    /* MAP of a revoke, in the name of the holder it takes from; see "Revokes" */
	bool nowait;     /* -EAGAIN instead of a wait for a holder; see "Who does not wait" */
	bool stalled;    /* held: seg_stall() */
	enum { SEG_IDLE, SEG_PARKED, SEG_HELD } state;
	uint64_t holder; /* id; 0: none */
	struct op *op;   /* grants: NULL */
	bool recalled;   /* parked, and hooks->recall() was called for it */
	int err;         /* why it was taken out of the queue: seg_fail(), or -EAGAIN (nowait) */
	/* arrival; of a grant: what its maker says (its sequence number), or, for 0, arrival. No two
	 * grants of one holder and kind have both start and order in common. */
	uint64_t order;
	/* held: links of the treap of its kind and, grants only, of the one by holder */
	struct seg_link {
		struct seg *left, *right;
		uint64_t max_end; /* greatest end in the subtree below */
	} link[2];
	uint64_t min_holder, max_holder; /* of the subtree below in the treap of its kind */
	uint32_t priority;
	/* parked: links of the queue */
	struct seg *queue_prev, *queue_next;
	/* parked behind a grant: for layout.c's list of deadlines */
	struct inode *in;
	struct seg *due_prev, *due_next;
	uint64_t deadline; /* ns of the layouts' clock; 0: not on the list */
	uint64_t due_at;     /* all that was recalled for it has to be returned by then */
	uint64_t recall_seq; /* grants newer than this were not recalled for it */
};

/* Called with in->lock held; leaf locks only inside. */
struct seg_hooks {
	/* waiter parks; grant (held, clashing, at least one) is in its way. Once for each; again for
	 * one that is made, or left by a revoke that failed, while waiter is parked. Must not change
	 * the tree. */
	void (*recall)(struct inode *in, struct seg *waiter, struct seg *grant);
	/* A waiter that recall() was called for leaves the queue, however. */
	void (*unpark)(struct inode *in, struct seg *waiter);
};

void seg_init(struct seg *s, enum seg_kind kind, uint64_t start, uint64_t end, struct op *op);
/* 0: held. ERR_PARKED: op will be resumed with it held, or with s->err set. -EAGAIN: nowait. */
int seg_acquire(struct inode *in, struct seg *s);
/* The same at the head of the queue: before all that are parked (a revoke, on which they wait). */
int seg_acquire_front(struct inode *in, struct seg *s);
/* 0 or -EAGAIN, never parks, recalls nothing. */
int seg_try(struct inode *in, struct seg *s);
/* 0 or -EAGAIN; on -EAGAIN hooks->recall() was called for the grants in the way, with a waiter that
 * does not park. */
int seg_try_recall(struct inode *in, struct seg *s);
/* A held segment changes its kind, at once or parked at the head of the queue (nobody parked gets
 * in between). Like seg_acquire(). While it is parked, its new kind keeps others out, as the kind of
 * a parked segment does, and its old kind does not. -EAGAIN: nowait; it is held with its old kind. */
int seg_change(struct inode *in, struct seg *s, enum seg_kind kind);
void seg_release(struct inode *in, struct seg *s);
/* A held segment becomes a MAP one on the spot, of another op, where none but a READ_IO is against it: that one goes on
 * beside it. false: nothing has changed. */
bool seg_harden(struct inode *in, struct seg *s, struct op *op);
/* While it holds s, the op of s waits for a segment of another inode, and so may wait for a
 * holder; or (!stalled) it does no more. */
void seg_stall(struct inode *in, struct seg *s, bool stalled);
/* Make a held segment smaller, keeping its kind; wakes who waited for the rest. */
void seg_shrink(struct inode *in, struct seg *s, uint64_t start, uint64_t end);
/* Interrupt: true if it was parked and is out of the queue now; its op will not be resumed. */
bool seg_cancel(struct inode *in, struct seg *s);
/* Everything parked that overlaps and clashes with a grant of `holder` in [start, end) ends with
 * err: its op is resumed with s->err. Returns how many. */
unsigned seg_fail(struct inode *in, uint64_t holder, uint64_t start, uint64_t end, int err);
/* Is `other` in the way of s, which is no grant? */
bool seg_clashes(const struct seg *s, const struct seg *other);
bool seg_any(struct inode *in); /* anything held or parked? */
/* Ranges of the parked READ_IO, WRITE_IO and WRITE_MAP that overlap [start, end): the first n in the order of the queue. How many
 * there are. */
struct seg_span { uint64_t start, end; };
unsigned seg_parked_io(struct inode *in, uint64_t start, uint64_t end, struct seg_span *out, unsigned n);
void seg_tree_free(struct inode *in); /* when the inode leaves memory; must be empty */

/* ---- grants: the same with in->lock held by the caller (layout_*.c) ---- */

/* The held op segment `s` leaves the tree and `grant` (IDLE, ranges within s, kind GRANT_*) enters
 * it, without anybody getting in between; who is parked and clashes with it is told to the hooks.
 * s may be NULL: added as it is, and nobody is told (a restart, a piece of another grant, which is to
 * be added before that one is made smaller). 0 or -ENOMEM (only when s is NULL and nothing was
 * ever held). */
int seg_grant_locked(struct inode *in, struct seg *s, struct seg *grant);
/* A grant leaves, or keeps [start, end) of itself; whoever waited for the rest is woken. */
void seg_ungrant_locked(struct inode *in, struct seg *grant);
void seg_shrink_locked(struct inode *in, struct seg *grant, uint64_t start, uint64_t end);
/* Of kind (a bit mask of 1u << SEG_GRANT_*) and holder (0: any), the first grant in order of
 * (start, order, holder, kind) that overlaps [start, end) and comes after `prev` (NULL: the first),
 * of which only these four are looked at. O(log n). */
struct seg *seg_next_grant_locked(struct inode *in, unsigned kinds, uint64_t holder, uint64_t start,
				  uint64_t end, struct seg *prev);
/* Do RW grants of this holder cover all of [start, end)? Newest order among them to *newest. */
bool seg_covered_locked(struct inode *in, uint64_t holder, uint64_t start, uint64_t end, uint64_t *newest);

#endif
