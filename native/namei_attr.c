/* SPDX-License-Identifier: MIT
 *
 * namei_attr.c - attributes: mode, owner, times; stat.
 *
 * Privileges (setuid, setgid of a group-executable file, security.capability) go with a change of
 * owner of anything but a directory, whoever asks, and wherever the front says ATTR_KILL_PRIV.
 */
#include "namei.h"

#include <sys/stat.h>

#include "acl.h"
#include "errors.h"
#include "rider.h"
#include "namei_priv.h"

/* The inode's record, overwritten in place. */
#define PLAIN_BLOCKS 1u
/* And, where it has attributes: an ACL overwritten, a capability removed. */
#define XATTR_BLOCKS (XATTR_TRANS_BLOCKS(ACL_BYTES_MAX, ACL_BYTES_MAX) + NAMEI_KILL_PRIV_BLOCKS)

#define NAME_CAPABILITY "security.capability"
#define ATTR_ALL 511u
#define NSEC_PER_SEC 1000000000u

static uint32_t mode_without_priv(uint32_t mode)
{
	mode &= ~(uint32_t)S_ISUID;
	if (mode & S_IXGRP)
		mode &= ~(uint32_t)S_ISGID;
	return mode;
}

int namei_has_priv(struct inode *in)
{
	ssize_t n;

	if (inode_is_dir(in))
		return 0;
	if (mode_without_priv(in->core.mode) != in->core.mode)
		return 1;
	n = xattr_get_locked(in, NAME_CAPABILITY, NULL, 0);
	return n >= 0 ? 1 : n == -ENODATA ? 0 : (int)n;
}

int namei_kill_priv_in(struct trans *t, struct inode *in)
{
	int err;

	if (inode_is_dir(in))
		return 0;
	in->core.mode = mode_without_priv(in->core.mode);
	err = xattr_remove_in(t, in, NAME_CAPABILITY);
	return err == -ENODATA ? 0 : err;
}

static void set_times(struct inode_core *core, const struct attr_change *ch, struct timestamp now)
{
	if (ch->valid & (ATTR_ATIME | ATTR_ATIME_NOW))
		core->atime = ch->valid & ATTR_ATIME_NOW ? now : ch->atime;
	if (ch->valid & (ATTR_MTIME | ATTR_MTIME_NOW))
		core->mtime = ch->valid & ATTR_MTIME_NOW ? now : ch->mtime;
	core->ctime = ch->valid & ATTR_CTIME ? ch->ctime : now;
	core->change++;
}

static int setattr_in(struct trans *t, struct inode *in, const struct attr_change *ch)
{
	int err = trans_join_inode(t, in);

	if (err)
		return err;
	if (ch->valid & (ATTR_UID | ATTR_GID | ATTR_KILL_PRIV)) {
		err = namei_kill_priv_in(t, in);
		if (err)
			return err;
	}
	if (ch->valid & ATTR_UID)
		in->core.uid = ch->uid;
	if (ch->valid & ATTR_GID)
		in->core.gid = ch->gid;
	if (ch->valid & ATTR_MODE) {
		in->core.mode = (in->core.mode & S_IFMT) | (ch->mode & 07777);
		err = acl_chmod(t, in);
		if (err)
			return err;
	}
	set_times(&in->core, ch, time_now());
	return inode_write(t, in);
}

/* Nothing to do, -EINVAL, or 1: go on; *blocks: what the transaction needs. */
static int prepare(struct inode *in, const struct attr_change *ch, unsigned *blocks)
{
	int go = 1;

	if (ch->valid & ~ATTR_ALL || ((ch->valid & ATTR_ATIME) && ch->atime.nsec >= NSEC_PER_SEC) ||
	    ((ch->valid & ATTR_MTIME) && ch->mtime.nsec >= NSEC_PER_SEC) ||
	    ((ch->valid & ATTR_CTIME) && ch->ctime.nsec >= NSEC_PER_SEC))
		return -EINVAL;
	if (ch->valid == 0)
		return 0;
	fs_rdlock(in->fs);
	*blocks = in->core.xattrs ? PLAIN_BLOCKS + XATTR_BLOCKS : PLAIN_BLOCKS;
	if (ch->valid == ATTR_KILL_PRIV)
		go = namei_has_priv(in);
	fs_unlock(in->fs);
	return go;
}

int namei_setattr(struct inode *in, const struct attr_change *change)
{
	unsigned blocks = 0;
	struct trans t;
	int err;

	for (;;) {
		err = prepare(in, change, &blocks);
		if (err <= 0)
			return err;
		err = trans_begin(in->fs, &t, blocks + rider_blocks());
		if (err)
			return err;
		if (blocks != PLAIN_BLOCKS || in->core.xattrs == 0)
			return rider_end(&t, setattr_in(&t, in, change), in, in, NULL);
		/* An attribute came meanwhile: the reservation is too small. */
		trans_cancel(&t);
	}
}

void namei_stat(struct inode *in, struct inode_stat *out)
{
	fs_rdlock(in->fs);
	pthread_mutex_lock(&in->lock);
	out->ino = in->ino;
	out->core = in->core;
	atomic_store(&in->told, true);
	pthread_mutex_unlock(&in->lock);
	fs_unlock(in->fs);
}
