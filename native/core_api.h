/* SPDX-License-Identifier: MIT
 *
 * core_api.h - private to core_*api.c: what the calls of extfs_core.h have in common. Any thread;
 * takes fs->lock. extfs_core.h, which has no guard against a second time, is included here only.
 */
#ifndef EXTFS_CORE_API_H
#define EXTFS_CORE_API_H

#include "types.h"

#include "extfs_core.h"

#include "inode.h"

/* Referenced. -ENOENT, or what reading it met. */
int core_inode(struct fs *fs, uint64_t ino, struct inode **out);
void core_stat(struct inode *in, struct extfs_stat *out);

/* core_layout_api.c. The arguments of a layout call; GET has room for what it answers, to be freed. */
struct layout_args;
int core_layout_in(const struct extfs_layout_args *a, bool get, struct layout_args *out);
void core_layout_out(const struct layout_args *a, struct extfs_layout_args *args, int64_t result);
void core_layout_free(struct layout_args *a);

/* core_tell.c. The kernel's caches follow what these calls change: attributes at once, names and
 * bytes later, so no call waits for the kernel. Not when the calling thread speaks for the mount
 * itself (extfs_of_mount()): the kernel knows, and holds locks until it has its answer. After
 * the change; the inodes are referenced. */
bool core_tells(struct fs *fs);
void core_tell_attributes(struct inode *in);
/* The name, the listing and the attributes of dir. */
void core_tell_name(struct inode *dir, const char *name, size_t len);
/* [start, end), end UINT64_MAX: to the end; the attributes, too. */
void core_tell_bytes(struct inode *in, uint64_t start, uint64_t end);
struct file_op;
void core_tell_operation(const struct file_op *fop); /* that has ended */

#endif
