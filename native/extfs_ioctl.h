/* SPDX-License-Identifier: MIT
 *
 * extfs_ioctl.h - ioctl(2) calls on files of a mounted extfs, for C programs.
 *
 * Every struct begins with its own size and with flags. The size is sizeof the struct of this header;
 * unknown flags and non-zero reserved fields are EINVAL, so that later versions can give them a
 * meaning. All numbers are in the host's byte order; offsets and lengths are bytes. A file that is
 * not on extfs answers ENOTTY.
 */
#ifndef EXTFS_IOCTL_H
#define EXTFS_IOCTL_H

#include <stdint.h>
#include <sys/ioctl.h>

enum extfs_ioc_state {
	EXTFS_IOC_UNWRITTEN = 1, /* allocated, reads as zeros */
	EXTFS_IOC_WRITTEN = 2,
};

#define EXTFS_IOC_EXT_SHARED 0x1u /* another file maps these blocks too: they are copied on write */
#define EXTFS_IOC_EXT_LAYOUT 0x2u /* allocated for a layout, not by fallocate */

struct extfs_ioc_extent {
	uint64_t offset;   /* in the file */
	uint64_t physical; /* on the device */
	uint64_t length;
	uint32_t state;    /* enum extfs_ioc_state */
	uint32_t flags;    /* EXTFS_IOC_EXT_* */
};

#define EXTFS_IOC_MAP_EXTENTS 500

/* MAP: the extents of a regular file in [start, start + length), in order; what no extent covers is
 * a hole. The answer is one consistent view, cut to whole blocks around the range. When `next` is
 * below the end of the range, there are more: ask again with start = next. The map may change at
 * any time afterwards. */
struct extfs_ioc_map {
	uint32_t size;
	uint32_t flags;     /* none defined: 0 */
	uint64_t start;
	uint64_t length;
	uint64_t next;      /* out: everything below it has been told; UINT64_MAX at the end of the map */
	uint64_t file_size; /* out */
	uint32_t count;     /* out: extents */
	uint32_t reserved[5];
	struct extfs_ioc_extent extents[EXTFS_IOC_MAP_EXTENTS]; /* out */
};

#define EXTFS_IOC_MAP _IOWR('X', 0xe1, struct extfs_ioc_map)

#endif
