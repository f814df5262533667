/* SPDX-License-Identifier: MIT
 *
 * core_memory_api.c - the calls of extfs_core.h about memory: of the caches, and how the process gets it.
 */
#include "core_api.h"

#include <errno.h>
#include <malloc.h>
#include <sys/prctl.h>

#include "buffer.h"
#include "file_early.h"
#include "inode.h"

void extfs_get_memory(struct fs *fs, struct extfs_memory *out)
{
	struct buf_stats b;
	struct inode_stats i;

	buf_get_stats(fs, &b);
	inode_get_stats(fs, &i);
	*out = (struct extfs_memory){
		.cache_bytes = b.bufs * BLOCK_SIZE,
		.cache_kept = (b.dirty + b.logged) * BLOCK_SIZE,
		.cache_resident = b.resident,
		.cache_limit = b.limit * BLOCK_SIZE,
		.cache_asked = b.asked * BLOCK_SIZE,
		.inodes = i.cached, .inodes_unused = i.unused,
		.inode_limit = i.limit, .inode_asked = fs->opt.inode_cache,
		.inode_bytes = sizeof(struct inode),
		.lookup_bytes = i.lookup_bytes,
	};
}

uint64_t extfs_limit_caches(struct fs *fs, uint64_t cache_bytes, uint64_t inodes)
{
	struct buf_stats before;
	uint64_t bytes;

	buf_get_stats(fs, &before);
	bytes = buf_cache_limit(fs, cache_bytes) * BLOCK_SIZE;
	bytes += inode_cache_limit(fs, inodes) * sizeof(struct inode);
	if (cache_bytes > before.limit * BLOCK_SIZE)
		return bytes;
	/* Memory is short. */
	bytes += early_drop_kept(fs);
	/* Inodes, and what describes a block, lie in the heap: whole pages of it that are free now.
	 * An allocation of another thread may wait for it, a heap at a time. */
	malloc_trim(0);
	return bytes;
}

int extfs_io_flusher(void)
{
	return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0 ? -errno : 0;
}
