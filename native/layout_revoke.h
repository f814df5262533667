/* SPDX-License-Identifier: MIT
 *
 * layout_revoke.h - private to layout_revoke.c and layout_relocate.c: a revoke under way.
 *
 * The first has its beginning, its segment and its ends; the second goes through the file and takes
 * one piece after the other, from revoke_look() on, until revoke_finish() or revoke_fail().
 */
#ifndef EXTFS_LAYOUT_REVOKE_H
#define EXTFS_LAYOUT_REVOKE_H

#include "layout_ops.h"

#define REVOKE_TRANS_BLOCKS 384u

struct revoke {
	struct file_op fop;
	struct layouts *ls;
	uint64_t holder;
	uint64_t asked_start, asked_end;
	uint64_t start, end;           /* whole ATOMIC grants */
	bool parked;                   /* counted in layouts->nparked */
	bool read, rw, pin;            /* of what it took something */
	uint64_t give_up;              /* ns of the clock; 0: no failure yet */
	struct nap nap;
};

static inline struct revoke *revoke_of(struct file_run *r)
{
	return r->fop->user;
}

/* ---- layout_revoke.c ---- */
bool revoke_stopping(struct layouts *ls);
/* Nobody can read it any more: the blocks need no copy, and the reaper's frees go to quarantine.
 * fs->lock held. */
bool revoke_of_dead(struct inode *in);
/* Everything before file block `at` has been dealt with: the grant is cut up to there. Always from
 * the start on: an ATOMIC grant is cut only whole. In a transaction. */
void revoke_cut_before(struct revoke *rv, fileblk_t at, struct grant_list *dead);
enum step revoke_finish(struct file_run *r);
enum step revoke_fail(struct file_run *r, int rc);

/* ---- layout_relocate.c ---- */
enum step revoke_look(struct file_run *r);

#endif
