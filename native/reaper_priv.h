/* SPDX-License-Identifier: MIT
 *
 * reaper_priv.h - private to reaper.c, which works off items, and reaper_intent.c, which knows what
 * intents are and what is to be done for them. Invariants: reaper.c.
 */
#ifndef EXTFS_REAPER_PRIV_H
#define EXTFS_REAPER_PRIV_H

#include "segment.h"

struct reaper;

struct item {
	struct item *next;
	struct inode *in;
	bool is_intent;
	uint64_t id;
	struct intent_disk rec; /* of an intent: what is left, as on disk */
	struct inode *other;    /* EXCHANGE between two files; else NULL */
	struct seg seg, other_seg;
};

/* ---- reaper.c ---- */
void reaper_enqueue(struct reaper *rp, struct item *it);

/* ---- reaper_intent.c ---- */
/* In a transaction that joined it->in: 0: nothing is left, 1: more to do, or a negative code. */
int intent_piece(struct trans *t, struct item *it, bool *gone);
/* At mount: every intent on disk becomes an item that holds its range. rp NULL: read-only, -EROFS
 * when there is one whose range shows a mix of before and after. */
int intents_take(struct fs *fs, struct reaper *rp);

#endif
