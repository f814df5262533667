/* SPDX-License-Identifier: MIT
 *
 * bridge_name.c - requests about names: LOOKUP, FORGET, CREATE, MKNOD, MKDIR, SYMLINK, READLINK,
 * LINK, UNLINK, RMDIR, RENAME, TMPFILE.
 *
 * Each handler is one call of namei.h. When that finds the journal full, nothing was done, and
 * request_fail() has the handler run again from its first line when there is room: so no handler
 * keeps anything across that call but request.stage.
 */
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <sys/stat.h>

#include "bridge.h"

/* Directory of the request and the name at `at` of its arguments; false: answered. */
static bool directory_and_name(struct request *r, size_t at, const char **name, size_t *len)
{
	int err = request_inode(r, r->head.nodeid, &r->inode);

	if (!err) {
		*name = request_name(r, &at, len);
		if (!*name)
			err = -EINVAL;
	}
	if (err)
		request_fail(r, err);
	return !err;
}

void serve_lookup(struct request *r)
{
	const char *name;
	size_t len;
	int err;

	if (!directory_and_name(r, 0, &name, &len))
		return;
	if (len == 1 && name[0] == '.') {
		/* A file handle being opened: the inode itself is meant, and it need not be a
		 * directory. */
		request_reply_entry(r, r->inode);
		return;
	}
	err = namei_lookup(r->inode, name, len, &r->inode2);
	if (err) {
		r->inode2 = NULL;
		if (err == -ENOENT)
			request_reply_negative(r);
		else
			request_fail(r, err);
		return;
	}
	request_reply_entry(r, r->inode2);
}

void serve_forget(struct request *r)
{
	const struct fuse_forget_in *in = r->arg;

	inode_lookup_forget(r->t->b->fs, r->head.nodeid, in->nlookup);
	request_end(r);
}

void serve_batch_forget(struct request *r)
{
	const struct fuse_batch_forget_in *in = r->arg;
	const struct fuse_forget_one *one = (const void *)(in + 1);
	size_t room = (r->arg_len - sizeof(*in)) / sizeof(*one);

	for (size_t i = 0; i < MIN(in->count, room); i++)
		inode_lookup_forget(r->t->b->fs, one[i].nodeid, one[i].nlookup);
	request_end(r);
}

/* The new inode of a MKNOD or MKDIR. */
static void made(struct request *r, int err)
{
	if (err) {
		r->inode2 = NULL;
		request_fail(r, err);
		return;
	}
	request_reply_entry(r, r->inode2);
}

void serve_mknod(struct request *r)
{
	const struct fuse_mknod_in *in = r->arg;
	struct cred cred = request_cred(r, in->umask);
	const char *name;
	size_t len;

	if (!directory_and_name(r, sizeof(*in), &name, &len))
		return;
	made(r, namei_create(r->inode, name, len, in->mode, in->rdev, &cred, &r->inode2));
}

void serve_mkdir(struct request *r)
{
	const struct fuse_mkdir_in *in = r->arg;
	struct cred cred = request_cred(r, in->umask);
	const char *name;
	size_t len;

	if (!directory_and_name(r, sizeof(*in), &name, &len))
		return;
	made(r, namei_mkdir(r->inode, name, len, in->mode & ALLPERMS, &cred, &r->inode2));
}

void serve_symlink(struct request *r)
{
	struct cred cred = request_cred(r, 0);
	const char *name, *target;
	size_t at = 0, len, target_len;

	name = request_name(r, &at, &len);
	target = name ? request_name(r, &at, &target_len) : NULL;
	if (!target) {
		request_fail(r, -EINVAL);
		return;
	}
	if (!directory_and_name(r, 0, &name, &len))
		return;
	made(r, namei_symlink(r->inode, name, len, target, target_len, &cred, &r->inode2));
}

void serve_readlink(struct request *r)
{
	ssize_t n = request_inode(r, r->head.nodeid, &r->inode);

	if (!n)
		n = namei_readlink(r->inode, (char *)r->payload, PATH_MAX);
	if (n < 0)
		request_fail(r, (int)n);
	else
		request_reply_payload(r, (size_t)n);
}

void serve_link(struct request *r)
{
	const struct fuse_link_in *in = r->arg;
	const char *name;
	size_t len;
	int err;

	if (!directory_and_name(r, sizeof(*in), &name, &len))
		return;
	err = request_inode(r, in->oldnodeid, &r->inode2);
	if (err) {
		request_fail(r, err);
		return;
	}
	if (!request_admit(r, r->inode2, DELEGATION_NAMESPACE))
		return;
	err = namei_link(r->inode2, r->inode, name, len);
	if (err)
		request_fail(r, err);
	else
		request_reply_entry(r, r->inode2);
}

static void truncated(struct request *r, int64_t result)
{
	const struct fuse_create_in *in = r->arg;

	if (result < 0)
		request_fail(r, (int)result);
	else
		request_reply_create(r, r->inode2, in->flags);
}

/* The kernel did not know of the name, but it is there: open it as open(2) would. */
static void create_found(struct request *r, const struct fuse_create_in *in)
{
	if (!inode_is_reg(r->inode2)) {
		request_fail(r, inode_is_dir(r->inode2) ? -EISDIR : -ESTALE);
		return;
	}
	if (!request_admit_open(r, r->inode2, in->flags))
		return;
	if (!(in->flags & O_TRUNC)) {
		request_reply_create(r, r->inode2, in->flags);
		return;
	}
	/* The kernel takes a file that CREATE answered for new, and does not truncate it itself. */
	file_op_init(&r->fop, FILE_TRUNCATE, r->inode2, r->t->ctx);
	r->fop.flags = FILE_F_KILL_PRIV;
	request_start_file(r, truncated);
}

void serve_create(struct request *r)
{
	const struct fuse_create_in *in = r->arg;
	struct cred cred = request_cred(r, in->umask);
	const char *name;
	size_t len;
	int err;

	if (!directory_and_name(r, sizeof(*in), &name, &len))
		return;
	err = namei_create(r->inode, name, len, S_IFREG | (in->mode & ALLPERMS), 0, &cred,
			   &r->inode2);
	if (!err) {
		request_reply_create(r, r->inode2, in->flags);
		return;
	}
	r->inode2 = NULL;
	if (err == -EEXIST && !(in->flags & O_EXCL)) {
		err = namei_lookup(r->inode, name, len, &r->inode2);
		if (!err) {
			create_found(r, in);
			return;
		}
		r->inode2 = NULL;
	}
	request_fail(r, err);
}

void serve_tmpfile(struct request *r)
{
	const struct fuse_create_in *in = r->arg;
	struct cred cred = request_cred(r, in->umask);
	int err = request_inode(r, r->head.nodeid, &r->inode);

	if (!err) {
		err = namei_tmpfile(r->inode, S_IFREG | (in->mode & ALLPERMS), &cred, &r->inode2);
		if (err)
			r->inode2 = NULL;
	}
	if (err)
		request_fail(r, err);
	else
		request_reply_create(r, r->inode2, in->flags);
}

/* A removed inode that nobody knows any more is freed by inode_put() of the last reference. */
static void removed(struct request *r, int err, struct inode *victim)
{
	if (!err && victim)
		r->inode2 = victim;
	request_fail(r, err);
}

void serve_unlink(struct request *r)
{
	struct inode *victim = NULL, *delegated;
	const char *name;
	size_t len;
	int err;

	if (!directory_and_name(r, 0, &name, &len))
		return;
	err = namei_unlink_undelegated(r->inode, name, len, &victim, &delegated);
	if (err == -ERR_DELEGATED)
		request_wait_undelegated(r, delegated);
	else
		removed(r, err, victim);
}

void serve_rmdir(struct request *r)
{
	struct inode *victim = NULL;
	const char *name;
	size_t len;
	int err;

	if (!directory_and_name(r, 0, &name, &len))
		return;
	err = namei_rmdir(r->inode, name, len, &victim);
	removed(r, err, victim);
}

static void rename_names(struct request *r, uint64_t newdir, uint32_t flags, size_t at)
{
	struct inode *victim = NULL, *delegated;
	const char *name, *new_name;
	size_t len, new_len;
	int err;

	if (flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE)) {
		request_fail(r, -EINVAL);
		return;
	}
	err = request_inode(r, r->head.nodeid, &r->inode);
	if (!err)
		err = request_inode(r, newdir, &r->inode2);
	if (err) {
		request_fail(r, err);
		return;
	}
	name = request_name(r, &at, &len);
	new_name = name ? request_name(r, &at, &new_len) : NULL;
	if (!new_name) {
		request_fail(r, -EINVAL);
		return;
	}
	err = namei_rename_undelegated(r->inode, name, len, r->inode2, new_name, new_len,
				       (flags & RENAME_NOREPLACE ? RENAME_F_NOREPLACE : 0) |
					       (flags & RENAME_EXCHANGE ? RENAME_F_EXCHANGE : 0),
				       &victim, &delegated);
	if (err == -ERR_DELEGATED) {
		request_wait_undelegated(r, delegated);
		return;
	}
	if (!err && victim)
		inode_put(victim);
	request_fail(r, err);
}

void serve_rename(struct request *r)
{
	const struct fuse_rename_in *in = r->arg;

	rename_names(r, in->newdir, 0, sizeof(*in));
}

void serve_rename2(struct request *r)
{
	const struct fuse_rename2_in *in = r->arg;

	rename_names(r, in->newdir, in->flags, sizeof(*in));
}
