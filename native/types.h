/* SPDX-License-Identifier: MIT
 *
 * types.h - the units of extfs, and the few macros that everything uses.
 *
 * A type says its unit: a device block number is never a file block number. All are plain
 * integers, so the compiler does not keep them apart, but the reader can.
 */
#ifndef EXTFS_TYPES_H
#define EXTFS_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/types.h>

#include <linux/fs.h>

typedef uint64_t fsblock_t; /* block number on the device, in filesystem blocks */
typedef uint64_t fileblk_t; /* block number inside a file */
typedef uint64_t nblocks_t; /* a number of blocks */
typedef uint64_t inum_t; /* inode number; never reused */
typedef uint64_t xid_t; /* number of a journal transaction group, from 1, rising by 1 */
typedef uint64_t lsn_t; /* position in the log: log blocks written since mkfs */

/* Both headers above define a BLOCK_SIZE of 1024, and liburing.h includes one: read here, they cannot
 * change ours later. */
#undef BLOCK_SIZE
#define BLOCK_SHIFT 12u
#define BLOCK_SIZE 4096u
#define BLOCK_MASK ((uint64_t)BLOCK_SIZE - 1)
#define SECTOR_SIZE 512u

/* Files hold at most 2^63 - 1 bytes, so file blocks stay below 2^51. */
#define FILE_MAX_BYTES ((uint64_t)INT64_MAX)
#define FILE_MAX_BLOCKS ((uint64_t)1 << 51)
#define DEVICE_MAX_BLOCKS ((uint64_t)1 << 48)

static inline uint64_t block_floor(uint64_t bytes) { return bytes >> BLOCK_SHIFT; }
/* Safe up to 2^64 - 1: never overflows. */
static inline uint64_t block_ceil(uint64_t bytes)
{
	return (bytes >> BLOCK_SHIFT) + ((bytes & BLOCK_MASK) != 0);
}

#undef MIN
#undef MAX
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* A violated invariant of our own. Stays on in production: going on would corrupt the device. */
#define xassert(cond)                                                                    \
	do {                                                                             \
		if (unlikely(!(cond))) {                                                 \
			fprintf(stderr, "extfs: assertion failed: %s, %s:%d (%s)\n",     \
				#cond, __FILE__, __LINE__, __func__);                    \
			abort();                                                         \
		}                                                                        \
	} while (0)

#endif
