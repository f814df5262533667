/* SPDX-License-Identifier: MIT
 *
 * xattr.h - extended attributes: full names with prefix ("user.x", "trusted.x", "security.x",
 * "system.posix_acl_access", "system.posix_acl_default"); other prefixes are -EOPNOTSUPP. Rights
 * are the kernel's business (default_permissions); setting ACLs keeps mode and ACL in step (acl.c).
 *
 * Each call is a whole operation: takes fs->lock or a transaction itself; -ERR_JOURNAL_FULL: wait
 * and start over.
 */
#ifndef EXTFS_XATTR_H
#define EXTFS_XATTR_H

#include "inode.h"

#define XATTR_F_CREATE 1u  /* as in setxattr(2) */
#define XATTR_F_REPLACE 2u
/* Clear S_ISGID when setting an access ACL (FUSE_SETXATTR_ACL_KILL_SGID). */
#define XATTR_F_KILL_SGID 4u

/* Length of the value; copies it when cap > 0. -ENODATA, -ERANGE. */
ssize_t xattr_get(struct inode *in, const char *name, void *value, size_t cap);
int xattr_set(struct inode *in, const char *name, const void *value, size_t len, unsigned flags);
int xattr_remove(struct inode *in, const char *name);
/* NUL-separated names; length; copies when cap > 0. -ERANGE. */
ssize_t xattr_list(struct inode *in, char *names, size_t cap);

/* Blocks that writing one attribute may change. A value of len bytes replaces one of old bytes: at
 * most XATTR_PARTS of the longer one are inserted, overwritten or deleted. They are neighbours in
 * the tree; at worst each lies in a leaf of its own, and each leaf made or given back changes a
 * block more (branch or free tree). */
#define XATTR_PARTS(len) (2u + (unsigned)((len) / XATTR_PART_BYTES))
#define XATTR_TRANS_BLOCKS(len, old) \
	(2 * XATTR_PARTS(MAX(len, old)) + TRANS_TREE_OP + TRANS_ALLOC_OP)

/* Inside a transaction (creation with a default ACL, the reaper). They store and remove, and change
 * core.xattrs; flags and mode that go with an ACL, ctime and inode_write() are the caller's. */
int xattr_set_in(struct trans *t, struct inode *in, const char *name, const void *value, size_t len,
		 unsigned flags);
/* fs->lock held */
ssize_t xattr_get_locked(struct inode *in, const char *name, void *value, size_t cap);
/* The 40-bit hash of the name as an argument: collisions cannot be had otherwise in a test. */
int xattr_set_in_hashed(struct trans *t, struct inode *in, uint64_t hash, const char *name,
			const void *value, size_t len, unsigned flags);
int xattr_remove_in(struct trans *t, struct inode *in, const char *name);
/* Remove up to max records and write the inode; 0 when none is left, else 1. */
int xattr_remove_all(struct trans *t, struct inode *in, unsigned max);

#endif
