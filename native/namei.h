/* SPDX-License-Identifier: MIT
 *
 * namei.h - operations on names and attributes, each one transaction: what FUSE, the control file
 * and the NFS server call.
 *
 * Rights are checked by the caller (the kernel with default_permissions, the NFS server itself);
 * the sticky bit too. Every call takes and releases its locks; returned inodes are referenced.
 * -ERR_JOURNAL_FULL: nothing was done, wait (jrn_wait_space) and call again. Directories are given
 * as referenced inodes; -ENOTDIR when they are not, -ENOENT when removed already (link count 0).
 */
#ifndef EXTFS_NAMEI_H
#define EXTFS_NAMEI_H

#include "dir.h"
#include "inode.h"
#include "xattr.h"

struct cred {
	uint32_t uid, gid; /* filesystem ids of the caller */
	uint32_t umask;
};

/* "." and ".." work. */
int namei_lookup(struct inode *dir, const char *name, size_t len, struct inode **out);
/* Regular file, fifo, socket, device (mode says which). S_ISGID directories hand down their
 * group. */
int namei_create(struct inode *dir, const char *name, size_t len, uint32_t mode, uint64_t rdev,
		 const struct cred *cred, struct inode **out);
int namei_mkdir(struct inode *dir, const char *name, size_t len, uint32_t mode,
		const struct cred *cred, struct inode **out);
int namei_symlink(struct inode *dir, const char *name, size_t len, const char *target,
		  size_t target_len, const struct cred *cred, struct inode **out);
int namei_tmpfile(struct inode *dir, uint32_t mode, const struct cred *cred, struct inode **out);
/* -EMLINK, -EPERM for directories, -ENOENT when the last name is gone; an O_TMPFILE inode leaves
 * the orphan list. */
int namei_link(struct inode *in, struct inode *dir, const char *name, size_t len);
/* *victim (may be NULL): the inode that lost the name, referenced, for notifications. */
int namei_unlink(struct inode *dir, const char *name, size_t len, struct inode **victim);
int namei_rmdir(struct inode *dir, const char *name, size_t len, struct inode **victim);
/* The same for a local user, who has to wait while a client has a delegation (delegation.h) of the inode that
 * would lose the name: -ERR_DELEGATED, nothing was done, and *delegated is that inode, referenced. */
int namei_unlink_undelegated(struct inode *dir, const char *name, size_t len, struct inode **victim,
			     struct inode **delegated);
/* The same of one inode, want_dir saying which of the two: -EAGAIN, and nothing was done, when the name leads to
 * another inode than `meant`. */
int namei_remove_meant(struct inode *dir, const char *name, size_t len, bool want_dir, inum_t meant,
		       struct inode **victim);
#define RENAME_F_NOREPLACE 1u
#define RENAME_F_EXCHANGE 2u
/* Refuses to move a directory below itself (-EINVAL). *victim as above. Other flags: -EINVAL. */
int namei_rename(struct inode *from, const char *name, size_t len, struct inode *to,
		 const char *new_name, size_t new_len, unsigned flags, struct inode **victim);
/* The same, as above: for both inodes that lose a name. */
int namei_rename_undelegated(struct inode *from, const char *name, size_t len, struct inode *to,
			     const char *new_name, size_t new_len, unsigned flags, struct inode **victim,
			     struct inode **delegated);
/* namei_rename() of one inode over another (NAMEI_NOBODY: over none), as above. */
#define NAMEI_NOBODY 0u
int namei_rename_meant(struct inode *from, const char *name, size_t len, inum_t meant, struct inode *to,
		       const char *new_name, size_t new_len, inum_t meant_victim, unsigned flags,
		       struct inode **victim);
ssize_t namei_readlink(struct inode *in, char *buf, size_t cap);

#define ATTR_MODE 1u
#define ATTR_UID 2u
#define ATTR_GID 4u
#define ATTR_ATIME 8u
#define ATTR_MTIME 16u
#define ATTR_ATIME_NOW 32u
#define ATTR_MTIME_NOW 64u
#define ATTR_KILL_PRIV 128u /* clear setuid, setgid (if group-executable) and security.capability */
#define ATTR_CTIME 256u
struct attr_change {
	unsigned valid;
	uint32_t mode, uid, gid;
	struct timestamp atime, mtime, ctime;
};
/* Everything but the size (file.h truncates). chmod keeps the ACL in step. */
int namei_setattr(struct inode *in, const struct attr_change *change);

/* Inside a transaction, inode joined: clear setuid, setgid (if group-executable) and
 * security.capability; the caller writes the inode. */
int namei_kill_priv_in(struct trans *t, struct inode *in);
#define NAMEI_KILL_PRIV_BLOCKS XATTR_TRANS_BLOCKS(0, XATTR_PART_BYTES)
/* Is there anything that a write has to clear? fs->lock at least shared. A negative code: could not
 * be found out. */
int namei_has_priv(struct inode *in);

/* Consistent snapshot for stat. */
struct inode_stat { inum_t ino; struct inode_core core; };
void namei_stat(struct inode *in, struct inode_stat *out);

#endif
