/* SPDX-License-Identifier: MIT
 *
 * bridge_ahead.h - the answer to a READDIR, and answers made before they are asked for.
 *
 * A process that goes through a large directory works on one answer while nobody makes the next, and then
 * waits for that to be made. So once a READDIR has been answered, a thread makes what will be asked for next;
 * of a directory that is not in memory it reads the blocks meanwhile, too.
 *
 * Only for READDIR: an answer to READDIRPLUS counts lookups, and is of attributes, which change without a change of
 * the directory.
 *
 * Locks: a mutex of its own, a leaf. Makes with fs->lock held shared, like any listing.
 */
#ifndef EXTFS_BRIDGE_AHEAD_H
#define EXTFS_BRIDGE_AHEAD_H

#include "inode.h"

/* The answer to a READDIR. */
struct listing {
	uint8_t *data;
	size_t cap, len; /* len 0: there is no entry behind the place asked for */
	uint64_t last;   /* offset of its last entry */
	bool cold;       /* blocks had to be read */
};

/* bridge_dir.c: what is behind the offset `after`, into out->data, at most out->cap bytes. 0 or a negative code.
 * *version: of the directory, as it was listed. */
int listing_make(struct inode *dir, uint64_t after, struct listing *out, uint64_t *version);
uint64_t listing_version(struct inode *dir);

struct ahead;
/* -ENOMEM, -EAGAIN. Starts a thread, which has the caller's signal mask. */
int ahead_create(struct ahead **out);
/* When nobody asks any more. NULL is nothing. */
void ahead_destroy(struct ahead *a);
/* out->data and cap are set; true: out is the answer, of the directory as it is now. Waits while it is being made;
 * fs->lock is not held. */
bool ahead_take(struct ahead *a, struct inode *dir, uint64_t after, struct listing *out);
/* This was given. here: the caller would make what follows, when it has sent this; true: so it shall. */
bool ahead_expect(struct ahead *a, struct inode *dir, const struct listing *given, bool here);
void ahead_make(struct ahead *a);
/* How many were taken, and how many were not what was asked for. */
void ahead_counts(struct ahead *a, uint64_t *used, uint64_t *useless);

#endif
