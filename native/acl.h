/* SPDX-License-Identifier: MIT
 *
 * acl.h - POSIX ACLs in the kernel's xattr form (linux/posix_acl_xattr.h, version 2): the kernel
 * enforces them; the filesystem keeps mode bits and access ACL in step and inherits default ACLs
 * (FUSE_POSIX_ACL makes that the server's duty).
 */
#ifndef EXTFS_ACL_H
#define EXTFS_ACL_H

#include "inode.h"
#include "xattr.h"

#define ACL_ENTRIES_MAX 1024u

/* Well-formed? 0 or -EINVAL. */
int acl_verify(const void *value, size_t len);
/* Permission bits that an access ACL stands for; *trivial: it says no more than the mode, need not
 * be stored. */
int acl_to_mode(const void *value, size_t len, uint32_t *perm, bool *trivial);
/* Inside a transaction: give a new inode what its directory's default ACL says, else apply umask to
 * *mode. Call before inode_write. */
int acl_inherit(struct trans *t, struct inode *dir, struct inode *in, uint32_t umask);
/* Inside a transaction: after chmod, bring the access ACL's mask (or group) and others in line with
 * core.mode. */
int acl_chmod(struct trans *t, struct inode *in);
/* Inside a transaction, inode joined: "system.posix_acl_access" or "_default" set (value NULL, or
 * no entries: removed) with all that follows for mode and flags; the caller touches ctime and
 * writes the inode. -EOPNOTSUPP for symlinks, -EACCES for a default ACL of what is no directory,
 * -EINVAL. Removing what is not there is no error, as in the kernel's filesystems. flags:
 * XATTR_F_*. */
int acl_set_in(struct trans *t, struct inode *in, const char *name, const void *value, size_t len,
	       unsigned flags);
#define ACCESS_READ 4u
#define ACCESS_WRITE 2u
#define ACCESS_EXECUTE 1u
/* What of mask somebody with this uid and these groups (the first and the supplementary ones
 * alike) may do, as acl(5) says: the greatest part of mask that is allowed as a whole. Bits that
 * only different groups grant are not allowed together; of parts of equal size reading goes
 * first, then writing. uid 0 may do everything, but execute only directories and what has an
 * execute bit. Stricter than the kernel in one case: with an empty mask entry the kernel does
 * not look at the ACL and treats those who have an entry of their own as others. Takes fs->lock
 * shared. A negative code: the ACL could not be read. */
int acl_access(struct inode *in, uint32_t uid, const uint32_t *gids, unsigned n, unsigned mask);
/* Blocks that acl_inherit() may change: for a directory it writes two ACLs. */
#define ACL_BYTES_MAX (4u + 8u * ACL_ENTRIES_MAX)
#define ACL_INHERIT_BLOCKS (2 * XATTR_TRANS_BLOCKS(ACL_BYTES_MAX, 0))

#endif
