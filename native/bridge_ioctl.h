/* SPDX-License-Identifier: MIT
 *
 * bridge_ioctl.h - what ioctl(2) on a file of the mount does. Internal to the bridge.
 *
 * Concurrency: takes fs->lock shared itself; metadata reads only, never parks.
 */
#ifndef EXTFS_BRIDGE_IOCTL_H
#define EXTFS_BRIDGE_IOCTL_H

#include "inode.h"

/* One FUSE_IOCTL request: cmd as in fuse_ioctl_in, `in_len` bytes of argument, up to `cap` bytes of
 * room for the result at `out` (may be the same memory as `arg`). Returns the number of result
 * bytes (the ioctl itself then returns 0), or a negative code: -ENOTTY for commands that nobody
 * knows, -EINVAL. */
ssize_t bridge_ioctl(struct inode *in, uint32_t cmd, const void *arg, size_t in_len, void *out, size_t cap);

#endif
