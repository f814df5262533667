/* SPDX-License-Identifier: MIT
 *
 * layout_swap.c - blocks that a holder wrote beside the file take the place of the old ones.
 *
 * One piece is part of one staged extent, of one extent or hole of the data fork, and, where blocks
 * are shared, of one reference count.
 *
 * An ATOMIC commit that does not fit a transaction is decided by its intent: from that record on it
 * goes forward only, here or in the reaper after a crash, and a segment keeps readers out until the
 * last piece. What has been swapped has left the staging fork, so the intent needs no progress.
 */
#include "file_remap.h"
#include "layout_ops.h"

#define PIECES_AT_ONCE 64u /* of an ATOMIC commit, so that others get a turn at fs->lock */

int staging_settle(struct inode *in)
{
	struct extent left;
	int rc;

	if (!(in->core.flags & INODE_F_STAGING))
		return 0;
	rc = extmap_list(in, FORK_STAGING, 0, FILE_MAX_BLOCKS, false, &left, 1);
	if (rc == 0)
		in->core.flags &= ~INODE_F_STAGING;
	return MIN(rc, 0);
}

int swap_piece(struct trans *t, struct inode *in, fileblk_t *at, fileblk_t end, uint64_t holder,
	       nblocks_t *moved)
{
	struct extent staged, old;
	nblocks_t len, run;
	bool shared;
	int rc;

	*moved = 0;
	rc = *at < end ? extmap_list(in, FORK_STAGING, *at, end, false, &staged, 1) : 0;
	if (rc <= 0) {
		*at = rc ? *at : end;
		return rc;
	}
	rc = extmap_lookup(in, FORK_DATA, staged.file, staged.len, &old);
	if (rc)
		return rc;
	len = old.len;
	if (old.state == EXT_WRITTEN) {
		rc = extmap_is_shared(in, &old, &shared, &run);
		if (rc)
			return rc;
		len = MIN(len, run);
	}
	rc = extmap_promote(t, in, staged.file, len);
	if (!rc)
		rc = exposure_remove(t, in->ino, staged.file, staged.file + len, holder);
	if (rc)
		return rc;
	*at = staged.file + len;
	*moved = len;
	return 0;
}

int atomic_some(struct trans *t, struct inode *in, fileblk_t *a, fileblk_t end, uint64_t size,
		uint64_t intent)
{
	fileblk_t at = *a;
	int rc = 0;

	for (unsigned n = 0; at < end && n < PIECES_AT_ONCE &&
	     (n == 0 || trans_room(t) >= SWAP_STEP_BLOCKS); n++) {
		nblocks_t moved;

		rc = swap_piece(t, in, &at, end, 0, &moved);
		if (rc)
			return rc;
	}
	if (at >= end) {
		in->core.size = MAX(in->core.size, size);
		rc = staging_settle(in);
		if (!rc && intent)
			rc = intent_del(t, intent);
	}
	if (!rc)
		rc = note_moved(t, in, at < end);
	if (!rc)
		*a = at;
	return rc;
}
