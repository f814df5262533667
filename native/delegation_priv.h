/* SPDX-License-Identifier: MIT
 *
 * delegation_priv.h - private to delegation.c and the modules of layouts: the record of a
 * delegation, and what holders and the thread have to do with it. Rules and locks as in
 * delegation.h.
 */
#ifndef EXTFS_DELEGATION_PRIV_H
#define EXTFS_DELEGATION_PRIV_H

#include "delegation.h"
#include "layout_priv.h"

struct delegation {
	struct inode_work work; /* first: what is left of it when it has left is the reference */
	struct holder *holder;
	bool write;
	uint64_t seq;
	uint64_t due;  /* RECALLED: when it is revoked, ns of the clock; 0: GRANTED */
	uint64_t told; /* when DELEGATION_ATTRS was sent last; 0: never */
	struct delegation *next_of_inode;
	TAILQ_ENTRY(delegation) of_holder; /* in order of seq */
	RB_ENTRY(delegation) by_due;
};

RB_PROTOTYPE(recalled_tree, delegation, by_due, );

/* mutex held: the holder is GONE. */
void delegations_drop(struct layouts *ls, struct holder *h);
/* mutex held: the mount ends. */
void delegations_drop_all(struct layouts *ls);
/* mutex held: the holder is LOST: what was recalled is due. */
void delegations_hurry(struct layouts *ls, struct holder *h);
/* Thread, no lock held: revokes what is due at `now`. The next deadline, UINT64_MAX: none. */
uint64_t delegations_due(struct layouts *ls, uint64_t now);
/* mutex held: the clock is another one now: see recalls_shift(). */
void delegations_shift(struct layouts *ls,
		       uint64_t (*shift)(uint64_t at, uint64_t from, uint64_t to), uint64_t from,
		       uint64_t to);

#endif
