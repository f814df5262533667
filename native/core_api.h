/* SPDX-License-Identifier: MIT
 *
 * core_api.h - private to core_*api.c: what the calls of extfs_core.h have in common. Any thread; takes fs->lock.
 * extfs_core.h, which has no guard against a second time, is included here only.
 */
#ifndef EXTFS_CORE_API_H
#define EXTFS_CORE_API_H

#include "types.h"

#include "extfs_core.h"

#include "inode.h"

/* Referenced. -ENOENT, or what reading it met. */
int core_inode(struct fs *fs, uint64_t ino, struct inode **out);
void core_stat(struct inode *in, struct extfs_stat *out);

#endif
