/* SPDX-License-Identifier: MIT
 *
 * bridge_attr.c - requests about attributes: GETATTR, STATX, SETATTR, GETXATTR, SETXATTR, LISTXATTR,
 * REMOVEXATTR; of the filesystem: STATFS.
 */
#include <linux/limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "alloc.h"
#include "bridge.h"
#include "xattr.h"

static void reply_attr(struct request *r, struct inode *in)
{
	struct fuse_attr_out out = {.attr_valid = bridge_attr_valid(in)};
	struct inode_stat st;

	namei_stat(in, &st);
	bridge_attr(&st, &out.attr);
	request_reply(r, &out, sizeof(out));
}

void serve_getattr(struct request *r)
{
	int err = request_inode(r, r->head.nodeid, &r->inode);

	if (err) {
		request_fail(r, err);
		return;
	}
	if (unlikely(delegation_of_writer(r->inode)))
		delegation_looked(r->inode);
	reply_attr(r, r->inode);
}

static struct fuse_sx_time sx_time(const struct timestamp *t)
{
	return (struct fuse_sx_time){.tv_sec = t->sec, .tv_nsec = t->nsec};
}

void serve_statx(struct request *r)
{
	struct fuse_statx_out out = {0};
	struct inode_stat st;
	const struct inode_core *c = &st.core;
	int err = request_inode(r, r->head.nodeid, &r->inode);

	if (err) {
		request_fail(r, err);
		return;
	}
	if (unlikely(delegation_of_writer(r->inode)))
		delegation_looked(r->inode);
	out.attr_valid = bridge_attr_valid(r->inode);
	namei_stat(r->inode, &st);
	out.stat = (struct fuse_statx){
		.mask = STATX_BASIC_STATS | STATX_BTIME,
		.blksize = BLOCK_SIZE,
		.nlink = c->nlink,
		.uid = c->uid,
		.gid = c->gid,
		.mode = (uint16_t)c->mode,
		.ino = st.ino,
		.size = c->size,
		.blocks = c->blocks << (BLOCK_SHIFT - 9),
		.atime = sx_time(&c->atime),
		.btime = sx_time(&c->btime),
		.ctime = sx_time(&c->ctime),
		.mtime = sx_time(&c->mtime),
		/* the kernel's new_encode_dev, taken apart */
		.rdev_major = (uint32_t)(c->rdev >> 8 & 0xfff),
		.rdev_minor = (uint32_t)((c->rdev & 0xff) | (c->rdev >> 12 & 0xfff00)),
	};
	request_reply(r, &out, sizeof(out));
}

/* ---- SETATTR ---- */

static void set_others(struct request *r);

enum { STAGE_SIZE = 0, STAGE_OTHERS = 1 };

static void size_set(struct request *r, int64_t result)
{
	if (result < 0) {
		request_fail(r, (int)result);
		return;
	}
	r->stage = STAGE_OTHERS; /* whatever starts over from here must not cut the file again */
	set_others(r);
}

/* A new owner takes away setuid, setgid and capabilities; the kernel leaves that to us
 * (HANDLE_KILLPRIV_V2). */
static unsigned kills_privileges(const struct fuse_setattr_in *in, const struct inode *inode)
{
	bool owner = in->valid & (FATTR_UID | FATTR_GID), kill = in->valid & FATTR_KILL_SUIDGID;

	return (owner || kill) && !inode_is_dir(inode) ? ATTR_KILL_PRIV : 0;
}

static void set_others(struct request *r)
{
	static const struct { uint32_t fattr; unsigned attr; } bits[] = {
		{FATTR_MODE, ATTR_MODE}, {FATTR_UID, ATTR_UID}, {FATTR_GID, ATTR_GID},
		{FATTR_CTIME, ATTR_CTIME},
	};
	const struct fuse_setattr_in *in = r->arg;
	struct attr_change change = {
		.valid = kills_privileges(in, r->inode),
		.mode = in->mode & ALLPERMS,
		.uid = in->uid,
		.gid = in->gid,
		.atime = {(int64_t)in->atime, in->atimensec},
		.mtime = {(int64_t)in->mtime, in->mtimensec},
		.ctime = {(int64_t)in->ctime, in->ctimensec},
	};
	int err = 0;

	for (unsigned i = 0; i < ARRAY_LEN(bits); i++)
		if (in->valid & bits[i].fattr)
			change.valid |= bits[i].attr;
	if (in->valid & (FATTR_ATIME | FATTR_ATIME_NOW))
		change.valid |= in->valid & FATTR_ATIME_NOW ? ATTR_ATIME_NOW : ATTR_ATIME;
	if (in->valid & (FATTR_MTIME | FATTR_MTIME_NOW))
		change.valid |= in->valid & FATTR_MTIME_NOW ? ATTR_MTIME_NOW : ATTR_MTIME;
	/* The truncation has killed what it had to. */
	if (change.valid == ATTR_KILL_PRIV && (in->valid & FATTR_SIZE))
		change.valid = 0;
	if (change.valid)
		err = namei_setattr(r->inode, &change);
	if (err)
		request_fail(r, err);
	else
		reply_attr(r, r->inode);
}

void serve_setattr(struct request *r)
{
	const struct fuse_setattr_in *in = r->arg;
	uint32_t most = MAX(in->atimensec, MAX(in->mtimensec, in->ctimensec));
	int err = request_inode(r, r->head.nodeid, &r->inode);

	if (!err && most > 999999999)
		err = -EINVAL;
	if (!err && (in->valid & FATTR_SIZE) && in->size > FILE_MAX_BYTES)
		err = -EFBIG;
	if (err) {
		request_fail(r, err);
		return;
	}
	if (!request_admit(r, r->inode, DELEGATION_SETATTR))
		return;
	if (!(in->valid & FATTR_SIZE) || r->stage == STAGE_OTHERS) {
		set_others(r);
		return;
	}
	file_op_init(&r->fop, FILE_TRUNCATE, r->inode, r->t->ctx);
	r->fop.offset = in->size;
	if (in->valid & FATTR_KILL_SUIDGID)
		r->fop.flags |= FILE_F_KILL_PRIV;
	request_start_file(r, size_set);
}

/* ---- extended attributes ---- */

void serve_getxattr(struct request *r)
{
	const struct fuse_getxattr_in *in = r->arg;
	struct fuse_getxattr_out out = {0};
	size_t at = sizeof(*in), len, cap = MIN(in->size, XATTR_VALUE_MAX);
	int err = request_inode(r, r->head.nodeid, &r->inode);
	char name[XATTR_NAME_MAX + 1];
	const char *given;
	ssize_t n;

	given = err ? NULL : request_name(r, &at, &len);
	if (!given || len > XATTR_NAME_MAX) {
		request_fail(r, err ? err : given ? -ERANGE : -EINVAL);
		return;
	}
	memcpy(name, given, len + 1); /* it may reach into the payload, where the value goes */
	n = xattr_get(r->inode, name, r->payload, cap);
	if (n < 0) {
		request_fail(r, (int)n);
	} else if (cap) {
		request_reply_payload(r, (size_t)n);
	} else {
		out.size = (uint32_t)n;
		request_reply(r, &out, sizeof(out));
	}
}

/* The value, which follows a name of any length, copied to where it is aligned, since ACLs are read
 * in place: behind the message, which stays as it is in case the request starts over. */
static const void *aligned_value(struct request *r, const void *value, size_t len)
{
	const uint8_t *end = (const uint8_t *)r->arg + r->arg_len;
	size_t used = end > r->payload ? (size_t)(end - r->payload) : 0;
	uint8_t *at = r->payload + ((used + 15) & ~(size_t)15);

	xassert(at + len <= r->payload + BRIDGE_MAX_IO);
	r->touched = MAX(r->touched, (size_t)(at + len - r->payload));
	return memcpy(at, value, len);
}

/* The arguments; kernels before 7.33 send a shorter form, without setxattr_flags. */
static struct fuse_setxattr_in setxattr_in(const struct request *r, size_t *len)
{
	struct fuse_setxattr_in in = {0};
	bool extended = atomic_load(&r->t->b->negotiated) & FUSE_SETXATTR_EXT;

	*len = MIN(extended ? sizeof(in) : FUSE_COMPAT_SETXATTR_IN_SIZE, r->arg_len);
	memcpy(&in, r->arg, *len);
	return in;
}

static int check_setxattr(const struct fuse_setxattr_in *in, size_t value_room)
{
	if (in->size > XATTR_VALUE_MAX)
		return -E2BIG;
	if (in->size > value_room || (in->flags & ~(XATTR_F_CREATE | XATTR_F_REPLACE)))
		return -EINVAL;
	return 0;
}

void serve_setxattr(struct request *r)
{
	size_t at, len;
	const struct fuse_setxattr_in in = setxattr_in(r, &at);
	const char *name = request_name(r, &at, &len);
	const uint8_t *value = (const uint8_t *)r->arg + at;
	int err = name ? check_setxattr(&in, r->arg_len - at) : -EINVAL;
	unsigned flags = in.flags;

	if (in.setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID)
		flags |= XATTR_F_KILL_SGID;
	if (!err)
		err = request_inode(r, r->head.nodeid, &r->inode);
	if (!err && !request_admit(r, r->inode, DELEGATION_SETATTR))
		return;
	if (!err)
		err = xattr_set(r->inode, name, aligned_value(r, value, in.size), in.size, flags);
	request_fail(r, err);
}

/* Takes the names that begin with `prefix` out of a list; its new length. */
static size_t without_prefix(char *names, size_t len, const char *prefix)
{
	size_t kept = 0;

	for (size_t at = 0, n; at < len; at += n) {
		n = strlen(names + at) + 1;
		if (!strncmp(names + at, prefix, strlen(prefix)))
			continue;
		memmove(names + kept, names + at, n);
		kept += n;
	}
	return kept;
}

/* Who may not read trusted attributes is not told of them. */
void serve_listxattr(struct request *r)
{
	const struct fuse_getxattr_in *in = r->arg;
	struct fuse_getxattr_out out = {0};
	uint32_t room = in->size; /* before the names take the message's place */
	char *names = (char *)r->payload;
	ssize_t n = request_inode(r, r->head.nodeid, &r->inode);

	if (!n)
		n = xattr_list(r->inode, names, XATTR_LIST_MAX);
	if (n > 0) {
		r->touched = MAX(r->touched, (size_t)n);
		if (r->head.uid)
			n = (ssize_t)without_prefix(names, (size_t)n, "trusted.");
	}
	if (n < 0) {
		request_fail(r, (int)n);
	} else if (!room) {
		out.size = (uint32_t)n;
		request_reply(r, &out, sizeof(out));
	} else if ((size_t)n > room) {
		request_fail(r, -ERANGE);
	} else {
		request_reply_payload(r, (size_t)n);
	}
}

void serve_removexattr(struct request *r)
{
	size_t at = 0, len;
	const char *name = request_name(r, &at, &len);
	int err = name ? request_inode(r, r->head.nodeid, &r->inode) : -EINVAL;

	if (!err && !request_admit(r, r->inode, DELEGATION_SETATTR))
		return;
	request_fail(r, err ? err : xattr_remove(r->inode, name));
}

/* Inodes are made as needed: each takes at most a block. */
void serve_statfs(struct request *r)
{
	struct fs *fs = r->t->b->fs;
	struct fuse_statfs_out out = {0};
	struct alloc_space space;

	alloc_statfs(fs, &space);
	out.st = (struct fuse_kstatfs){
		.bsize = BLOCK_SIZE, .frsize = BLOCK_SIZE, .blocks = space.total,
		.bfree = space.free, .bavail = space.avail, .ffree = space.free,
		.namelen = NAME_MAX,
	};
	fs_rdlock(fs);
	out.st.files = get64(fs_root(fs)->inodes) + space.free;
	fs_unlock(fs);
	request_reply(r, &out, sizeof(out));
}
