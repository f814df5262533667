/* SPDX-License-Identifier: MIT
 *
 * bridge_ioctl.c - the calls of extfs_ioctl.h.
 *
 * FUSE's restricted ioctls carry their argument by the size that the command number encodes, in and
 * out; so one request is one struct, at most 16383 bytes, and a longer answer continues from a
 * cursor.
 */
#include "bridge_ioctl.h"

#include <string.h>

#include "extfs_ioctl.h"
#include "extmap.h"

_Static_assert(sizeof(struct extfs_ioc_extent) == 32, "layout");
_Static_assert(sizeof(struct extfs_ioc_map) == 80 + 32 * EXTFS_IOC_MAP_EXTENTS, "layout");
_Static_assert(sizeof(struct extfs_ioc_map) <= 16383, "what an ioctl can carry");
_Static_assert((int)EXTFS_IOC_UNWRITTEN == (int)EXT_UNWRITTEN && (int)EXTFS_IOC_WRITTEN == (int)EXT_WRITTEN, "states");

static bool all_zero(const void *p, size_t len)
{
	const uint8_t *b = p;

	while (len && !*b)
		b++, len--;
	return len == 0;
}

/* What of [start, start + length) is asked for, in blocks; the map ends where files end. */
static int map_range(const struct extfs_ioc_map *req, fileblk_t *at, fileblk_t *end)
{
	uint64_t last;

	if (req->flags || !all_zero(req->reserved, sizeof(req->reserved)))
		return -EINVAL;
	if (__builtin_add_overflow(req->start, req->length, &last))
		last = UINT64_MAX;
	*at = block_floor(req->start);
	*end = MIN(block_ceil(last), FILE_MAX_BLOCKS);
	return 0;
}

/* What covers file block `at`, cut to what one answer about sharing holds for. */
static int map_one(struct inode *in, fileblk_t at, fileblk_t end, struct extent *ext, bool *shared)
{
	nblocks_t run;
	int err = extmap_lookup(in, FORK_DATA, at, end - at, ext);

	*shared = false;
	if (err || ext->state != EXT_WRITTEN || !(in->core.flags & INODE_F_SHARED))
		return err;
	run = ext->len;
	err = extmap_is_shared(in, ext, shared, &run);
	ext->len = MIN(run, ext->len);
	return err;
}

static int map_fill(struct inode *in, fileblk_t at, fileblk_t end, struct extfs_ioc_map *map)
{
	uint32_t n = 0;

	while (at < end && n < EXTFS_IOC_MAP_EXTENTS) {
		struct extent ext;
		bool shared;
		int err = map_one(in, at, end, &ext, &shared);

		if (err)
			return err;
		xassert(ext.len > 0);
		at = ext.file + ext.len;
		if (ext.state == EXT_HOLE)
			continue;
		map->extents[n++] = (struct extfs_ioc_extent){
			.offset = ext.file << BLOCK_SHIFT,
			.physical = ext.block << BLOCK_SHIFT,
			.length = ext.len << BLOCK_SHIFT,
			.state = (uint32_t)ext.state,
			.flags = (shared ? EXTFS_IOC_EXT_SHARED : 0) |
				 (ext.flags & EXT_F_LAYOUT ? EXTFS_IOC_EXT_LAYOUT : 0),
		};
	}
	map->count = n;
	map->next = at < FILE_MAX_BLOCKS ? at << BLOCK_SHIFT : UINT64_MAX;
	return 0;
}

static ssize_t ioctl_map(struct inode *in, const void *arg, size_t in_len, void *out, size_t cap)
{
	struct extfs_ioc_map *map;
	fileblk_t at, end;
	int err;

	if (in_len < sizeof(*map) || cap < sizeof(*map))
		return -EINVAL;
	if (!inode_is_reg(in))
		return -ENOTTY;
	map = malloc(sizeof(*map));
	if (!map)
		return -ENOMEM;
	memcpy(map, arg, sizeof(*map));
	err = map->size == sizeof(*map) ? map_range(map, &at, &end) : -EINVAL;
	if (!err) {
		memset(map->extents, 0, sizeof(map->extents));
		fs_rdlock(in->fs);
		map->file_size = in->core.size;
		err = map_fill(in, at, end, map);
		fs_unlock(in->fs);
	}
	if (!err)
		memcpy(out, map, sizeof(*map));
	free(map);
	return err ? err : (ssize_t)sizeof(*map);
}

ssize_t bridge_ioctl(struct inode *in, uint32_t cmd, const void *arg, size_t in_len, void *out, size_t cap)
{
	switch (cmd) {
	case EXTFS_IOC_MAP: return ioctl_map(in, arg, in_len, out, cap);
	default: return -ENOTTY;
	}
}
