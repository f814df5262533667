/* SPDX-License-Identifier: MIT
 *
 * layout_ops.c - what LAYOUT_GET, LAYOUT_COMMIT and LAYOUT_RETURN have in common.
 */
#include "layout_ops.h"

#include <time.h>

uint64_t layout_ticks(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

enum step layout_drop_pages(struct file_run *r, struct inode *in, uint64_t start, uint64_t end,
			    step_fn then)
{
	const struct cache_ops *ops = r->fs->cache_ops;
	uint64_t size;

	r->step = then;
	if (!ops || !atomic_load(&in->pages_cached))
		return STEP_NEXT;
	fs_rdlock(r->fs);
	size = in->core.size;
	fs_unlock(r->fs);
	if (start == 0 && end >= size)
		atomic_store(&in->pages_cached, false);
	if (ops->pages(r->fs->cache_arg, in->ino, start, end == UINT64_MAX ? 0 : end - start,
		       &r->fop->op)) {
		atomic_store(&in->pages_cached, true);
		return STEP_NEXT;
	}
	r->fop->layout->flags |= LAYOUT_F_INVALIDATED;
	return STEP_PARKED;
}
