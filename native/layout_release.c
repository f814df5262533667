/* SPDX-License-Identifier: MIT
 *
 * layout_release.c - where blocks go that a lost holder may still reach, and how they come back.
 */
#include "layout_priv.h"

/* A holder that reads blocks of a reflinked file reads those of its twin. When the file it was told about drops them
 * they are still mapped by the other one, which knows nothing of the holder: from the first such drop on,
 * whatever any reflinked file drops is kept until nobody is left who could be meant (shared_reachable). */
static uint64_t drop_holder(struct fs *fs, const struct inode *in)
{
	struct layouts *ls = fs->layouts;
	uint64_t holder;

	if (likely(!ls || !atomic_load(&ls->lost_count)))
		return 0;
	if (fs->opt.mutant == MUTANT_QUARANTINE_DROPPED)
		return 0;
	holder = layouts_lost_holder(fs, in->ino);
	if (!(in->core.flags & INODE_F_SHARED))
		return holder;
	if (holder)
		atomic_store(&ls->shared_reachable, true);
	else if (atomic_load(&ls->shared_reachable))
		holder = QUARANTINE_ANY;
	return holder;
}

/* QUARANTINE_ANY is nobody's count. */
static int quarantined(struct trans *t, uint64_t holder, int64_t blocks)
{
	if (blocks > 0)
		LAYOUT_COUNT(t->fs, quarantined_blocks, (uint64_t)blocks);
	return holder == QUARANTINE_ANY ? 0 : holder_quarantined(t, holder, blocks);
}

const struct layout_hooks layouts_hooks = {
	.drop_holder = drop_holder, .quarantined = quarantined, .unlinked = layout_unlinked,
	.map_changed = layout_map_changed,
};
