/* SPDX-License-Identifier: MIT
 *
 * bridge_drop.h - what others than the mount changed, said to the kernel later: names (INVAL_ENTRY)
 * and bytes (INVAL_INODE).
 *
 * The kernel takes the directory's lock to drop a name, and the locks of pages to drop those. Both
 * may be held until we have answered some request, which may wait for a holder. So two threads of
 * this module say it, which nobody waits for: one names, the other one bytes. The notifier of
 * bridge_notify.h, for which grants wait, never has to wait for them.
 *
 * What is pending is kept by name and by inode, so that the same thing is said once, however often
 * it changed. Bytes of an inode are one range that covers all. There are as many inodes at most as
 * the kernel knows of, which the core remembers anyway. Names are bounded: at names_max all that
 * are pending are dropped together, by INC_EPOCH, which makes the kernel ask again for every name
 * that it meets, and takes no lock. A kernel that has no INC_EPOCH (before 6.16) gets them all, up
 * to DROPS_NAMES_HARD; beyond that names are forgotten, and the log says so.
 *
 * Concurrency: any thread; never waits for the kernel. Memory that cannot be had is treated as
 * names_max reached.
 */
#ifndef EXTFS_BRIDGE_DROP_H
#define EXTFS_BRIDGE_DROP_H

#include <sys/types.h>

#include "types.h"

#define DROPS_NAMES_MAX 65536u
#define DROPS_NAMES_HARD (1u << 20)

struct drops;

/* send: write(2) to fd, which is /dev/fuse. 0 or a negative code. */
int drops_create(int fd, unsigned names_max,
		 ssize_t (*send)(int fd, const void *message, size_t len), struct drops **out);
/* What is pending is forgotten. The connection has been aborted, or nobody holds what the
 * threads may wait for. */
void drops_destroy(struct drops *d);
void drops_name(struct drops *d, inum_t dir, const char *name, size_t len);
/* [start, end); end UINT64_MAX: to the end of the file, or a whole directory's listing. */
void drops_bytes(struct drops *d, inum_t ino, uint64_t start, uint64_t end);
struct drops_look {
	unsigned names, inodes;            /* pending */
	uint64_t sent, epochs, forgotten; /* since the start */
};
void drops_get(struct drops *d, struct drops_look *out);

#endif
