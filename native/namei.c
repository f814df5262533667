/* SPDX-License-Identifier: MIT
 *
 * namei.c - making, finding and removing names.
 *
 * Invariants between transactions:
 *  1. a directory has nlink == 2 + subdirs while it has its name, and 0 after; then it has no
 *     entries and gets none;
 *  2. another inode has as many names as nlink says; with none it is on the orphan list;
 *  3. core.parent of a directory names the directory that holds its entry.
 */
#include "namei.h"

#include <string.h>
#include <sys/stat.h>

#include "acl.h"
#include "alloc.h"
#include "btree.h"
#include "errors.h"
#include "rider.h"
#include "segment.h"
#include "namei_priv.h"

/* An insert into the inode tree and one into the entries; the directory's own record in another
 * leaf; node splits of both allocate near each other. */
#define CREATE_BLOCKS (2 * TRANS_TREE_OP + 1 + TRANS_ALLOC_OP)
/* The up to four parts of a target are neighbours: one place in the tree, at most three leaves
 * more. */
#define SYMLINK_BLOCKS (CREATE_BLOCKS + TRANS_TREE_OP + 3)
/* A record of the inode tree and one of the orphan tree. */
#define TMPFILE_BLOCKS (2 * TRANS_TREE_OP + TRANS_ALLOC_OP)
/* An entry inserted, an orphan record deleted, two inode records overwritten. What splits allocate and what
 * merges free lies apart: in two groups, or far from each other in the free trees of one. */
#define LINK_BLOCKS (2 * TRANS_TREE_OP + 2 + 2 * TRANS_ALLOC_OP)
/* An entry deleted, an orphan record inserted, two inode records overwritten; likewise. (With one TRANS_ALLOC_OP one
 * of a million removals from a directory of a million names once needed more.) */
#define UNLINK_BLOCKS (2 * TRANS_TREE_OP + 2 + 2 * TRANS_ALLOC_OP)

/* ---- shared with the other namei files ---- */

int namei_check_dir(const struct inode *dir)
{
	if (!inode_is_dir(dir))
		return -ENOTDIR;
	return dir->core.nlink == 0 ? -ENOENT : 0;
}

int namei_corrupt(const struct inode *dir, const struct inode *in, const char *what)
{
	fs_shutdown_writes(dir->fs, -ERR_DIR_CORRUPT, "directory %llu, inode %llu: %s",
			   (unsigned long long)dir->ino,
			   (unsigned long long)(in ? in->ino : 0), what);
	return -ERR_DIR_CORRUPT;
}

int namei_find(struct inode *dir, const char *name, size_t len, struct dirent *ent,
	       struct inode **out)
{
	struct inode *in;
	int err = dir_lookup(dir, name, len, ent);

	if (err)
		return err;
	err = inode_get(dir->fs, ent->ino, &in);
	if (err == -ENOENT)
		return namei_corrupt(dir, NULL, "an entry names an inode that does not exist");
	if (err)
		return err;
	if (in->core.nlink == 0 || DT_OF_MODE(in->core.mode) != ent->type) {
		err = namei_corrupt(dir, in, "an entry and its inode differ in type or link count");
		inode_put(in);
		return err;
	}
	*out = in;
	return 0;
}

int namei_subdir_add(struct inode *dir)
{
	if (dir->core.subdirs >= NLINK_MAX - 2)
		return -EMLINK;
	dir->core.subdirs++;
	dir->core.nlink++;
	return 0;
}

int namei_subdir_del(struct inode *dir)
{
	if (dir->core.subdirs == 0 || dir->core.nlink != dir->core.subdirs + 2)
		return namei_corrupt(dir, NULL, "more subdirectories than it counts");
	dir->core.subdirs--;
	dir->core.nlink--;
	return 0;
}

int namei_drop_link(struct trans *t, struct inode *in)
{
	int err = 0;

	if (inode_is_dir(in)) {
		xassert(in->core.size == 0);
		if (in->core.subdirs != 0 || in->core.nlink != 2)
			return namei_corrupt(in, NULL, "an empty directory counts subdirectories");
		in->core.nlink = 0;
	} else {
		in->core.nlink--;
	}
	inode_touch(in, TOUCH_CTIME);
	if (in->core.nlink == 0)
		err = inode_orphan_add(t, in);
	return err ? err : inode_write(t, in);
}

void namei_unlinked(struct inode *in)
{
	bool nameless;

	if (!in->fs->layout_hooks || !seg_any(in))
		return;
	fs_rdlock(in->fs);
	nameless = in->core.nlink == 0;
	fs_unlock(in->fs);
	if (nameless && !inode_is_open(in))
		in->fs->layout_hooks->unlinked(in);
}

int namei_end(struct trans *t, int err)
{
	if (err)
		trans_cancel(t);
	else
		trans_commit(t);
	return err;
}

/* ---- lookup ---- */

static int lookup_locked(struct inode *dir, const char *name, size_t len, struct inode **out)
{
	struct dirent ent;
	int err = namei_check_dir(dir);

	if (err)
		return err;
	if (len == 1 && name[0] == '.') {
		*out = inode_ref(dir);
		return 0;
	}
	if (len == 2 && name[0] == '.' && name[1] == '.') {
		err = inode_get(dir->fs, dir->core.parent, out);
		return err == -ENOENT ? namei_corrupt(dir, NULL, "its parent does not exist") : err;
	}
	return namei_find(dir, name, len, &ent, out);
}

int namei_lookup(struct inode *dir, const char *name, size_t len, struct inode **out)
{
	int err;

	fs_rdlock(dir->fs);
	err = lookup_locked(dir, name, len, out);
	fs_unlock(dir->fs);
	return err;
}

/* ---- creation ---- */

struct creation {
	struct inode *dir;
	const char *name; /* NULL: O_TMPFILE */
	size_t len;
	uint32_t mode;
	uint64_t rdev;
	const struct cred *cred;
	const char *target; /* symlink */
	size_t target_len;
	unsigned blocks;    /* without inherited ACLs */
};

/* The inode, with what its directory hands down. */
static int make_inode(struct trans *t, const struct creation *cr, struct inode **out)
{
	struct inode *dir = cr->dir;
	bool inherit = (dir->core.flags & INODE_F_DEFACL) && !S_ISLNK(cr->mode);
	uint32_t mode = cr->mode & (S_IFMT | 07777), gid = cr->cred->gid;
	int err;

	if (dir->core.mode & S_ISGID) {
		gid = dir->core.gid;
		if (S_ISDIR(mode))
			mode |= S_ISGID;
	}
	if (!inherit && !S_ISLNK(mode))
		mode &= ~(cr->cred->umask & 0777);
	err = inode_create(t, mode, cr->cred->uid, gid, cr->rdev, S_ISDIR(mode) ? dir->ino : 0,
			   !cr->name ? 0 : S_ISDIR(mode) ? 2 : 1, out);
	if (!err && inherit)
		err = acl_inherit(t, dir, *out, cr->cred->umask);
	if (!err && inherit)
		err = inode_write(t, *out);
	return err;
}

static int put_target(struct trans *t, struct inode *in, const char *target, size_t len)
{
	int err = 0;

	for (size_t at = 0; at < len && !err; at += SYMLINK_PART_BYTES)
		err = bt_insert(t, fs_tree(t->fs, TREE_SYMLINK),
				KEY(in->ino, at / SYMLINK_PART_BYTES),
				target + at, (unsigned)MIN(len - at, (size_t)SYMLINK_PART_BYTES));
	in->core.size = len;
	return err ? err : inode_write(t, in);
}

static int create_in(struct trans *t, const struct creation *cr, struct inode **out)
{
	struct inode *dir = cr->dir;
	struct dirent found;
	int err = namei_check_dir(dir);

	if (!err && cr->name) {
		/* Before the inode is made: the common failure should cost nothing. */
		err = dir_lookup(dir, cr->name, cr->len, &found);
		err = err == 0 ? -EEXIST : err == -ENOENT ? 0 : err;
	}
	if (!err)
		err = make_inode(t, cr, out);
	if (!err && cr->target)
		err = put_target(t, *out, cr->target, cr->target_len);
	if (err)
		return err;
	if (!cr->name) {
		(*out)->tmpfile = true;
		return inode_orphan_add(t, *out);
	}
	err = dir_add(t, dir, cr->name, cr->len, (*out)->ino, DT_OF_MODE(cr->mode)); /* joins dir */
	if (!err && S_ISDIR(cr->mode))
		err = namei_subdir_add(dir);
	if (err)
		return err;
	inode_touch(dir, TOUCH_MTIME | TOUCH_CTIME);
	return inode_write(t, dir);
}

static int create(const struct creation *cr, struct inode **out)
{
	struct inode *in = NULL;
	struct trans t;
	bool inherit;
	int err;

	do {
		fs_rdlock(cr->dir->fs);
		inherit = cr->dir->core.flags & INODE_F_DEFACL;
		fs_unlock(cr->dir->fs);
		err = trans_begin(cr->dir->fs, &t, cr->blocks + (inherit ? ACL_INHERIT_BLOCKS : 0) +
				  (cr->name ? rider_blocks() : 0));
		if (err)
			return err;
		/* A default ACL set meanwhile: the reservation is too small. */
		if (!inherit && (cr->dir->core.flags & INODE_F_DEFACL))
			err = namei_end(&t, -EAGAIN);
	} while (err == -EAGAIN);
	err = create_in(&t, cr, &in);
	err = cr->name ? rider_end(&t, err, in, cr->dir, NULL) : namei_end(&t, err);
	if (!err)
		*out = in;
	else if (in)
		inode_put(in);
	return err;
}

int namei_create(struct inode *dir, const char *name, size_t len, uint32_t mode, uint64_t rdev,
		 const struct cred *cred, struct inode **out)
{
	if ((mode & S_IFMT) == 0)
		mode |= S_IFREG;
	if (!S_ISREG(mode) && !S_ISFIFO(mode) && !S_ISSOCK(mode) && !S_ISCHR(mode) &&
	    !S_ISBLK(mode))
		return -EINVAL;
	if (!S_ISCHR(mode) && !S_ISBLK(mode))
		rdev = 0;
	return create(&(struct creation){.dir = dir, .name = name, .len = len, .mode = mode,
					 .rdev = rdev, .cred = cred, .blocks = CREATE_BLOCKS}, out);
}

int namei_mkdir(struct inode *dir, const char *name, size_t len, uint32_t mode,
		const struct cred *cred, struct inode **out)
{
	return create(&(struct creation){.dir = dir, .name = name, .len = len,
					 .mode = (mode & 07777) | S_IFDIR, .cred = cred,
					 .blocks = CREATE_BLOCKS}, out);
}

int namei_symlink(struct inode *dir, const char *name, size_t len, const char *target,
		  size_t target_len, const struct cred *cred, struct inode **out)
{
	if (target_len == 0)
		return -ENOENT;
	if (target_len > SYMLINK_MAX)
		return -ENAMETOOLONG;
	if (memchr(target, '\0', target_len))
		return -EINVAL;
	return create(&(struct creation){.dir = dir, .name = name, .len = len,
					 .mode = S_IFLNK | 0777,
					 .cred = cred, .target = target, .target_len = target_len,
					 .blocks = SYMLINK_BLOCKS}, out);
}

int namei_tmpfile(struct inode *dir, uint32_t mode, const struct cred *cred, struct inode **out)
{
	return create(&(struct creation){.dir = dir, .mode = (mode & 07777) | S_IFREG, .cred = cred,
					 .blocks = TMPFILE_BLOCKS}, out);
}

ssize_t namei_readlink(struct inode *in, char *buf, size_t cap)
{
	struct tree tree = fs_tree(in->fs, TREE_SYMLINK);
	char part[SYMLINK_PART_BYTES];
	size_t size, at = 0;
	unsigned len;
	int err = 0;

	fs_rdlock(in->fs);
	size = in->core.size;
	if (!S_ISLNK(in->core.mode))
		err = -EINVAL;
	while (!err && at < size) {
		err = bt_lookup(tree, KEY(in->ino, at / SYMLINK_PART_BYTES), part, sizeof(part),
				&len);
		if (err == -ENOENT || (!err && len != MIN(size - at, (size_t)SYMLINK_PART_BYTES))) {
			fs_shutdown_writes(in->fs, -ERR_RECORD_SHAPE,
					   "symlink %llu: damaged target",
					   (unsigned long long)in->ino);
			err = -ERR_RECORD_SHAPE;
		} else if (!err) {
			if (at < cap)
				memcpy(buf + at, part, MIN((size_t)len, cap - at));
			at += len;
		}
	}
	fs_unlock(in->fs);
	return err ? err : (ssize_t)MIN(size, cap);
}

/* ---- links ---- */

static int link_in(struct trans *t, struct inode *in, struct inode *dir, const char *name,
		   size_t len)
{
	bool orphan = in->core.nlink == 0;
	int err = namei_check_dir(dir);

	if (err)
		return err;
	if (inode_is_dir(in))
		return -EPERM;
	if (orphan && !in->tmpfile)
		return -ENOENT;
	if (in->core.nlink >= NLINK_MAX)
		return -EMLINK;
	err = dir_add(t, dir, name, len, in->ino, DT_OF_MODE(in->core.mode)); /* joins dir */
	if (!err)
		err = trans_join_inode(t, in);
	if (!err && orphan)
		err = inode_orphan_del(t, in);
	if (err)
		return err;
	in->core.nlink++;
	inode_touch(in, TOUCH_CTIME);
	inode_touch(dir, TOUCH_MTIME | TOUCH_CTIME);
	err = inode_write(t, in);
	if (!err)
		err = inode_write(t, dir);
	if (!err)
		in->tmpfile = false;
	return err;
}

int namei_link(struct inode *in, struct inode *dir, const char *name, size_t len)
{
	struct trans t;
	int err = trans_begin(dir->fs, &t, LINK_BLOCKS + rider_blocks());

	return err ? err : rider_end(&t, link_in(&t, in, dir, name, len), in, dir, NULL);
}

/* ---- removal ---- */

/* What is to be removed. */
struct removal {
	bool want_dir;
	bool undelegated; /* not while a client has a delegation of it */
	inum_t meant;     /* 0: whatever has the name */
};

static int remove_in(struct trans *t, struct inode *dir, const char *name, size_t len,
		     const struct removal *what, struct inode **in)
{
	bool want_dir = what->want_dir;
	struct dirent ent;
	int err = namei_check_dir(dir);

	if (!err)
		err = namei_find(dir, name, len, &ent, in);
	if (err)
		return err;
	if (what->meant && (*in)->ino != what->meant)
		return -EAGAIN;
	if (inode_is_dir(*in) != want_dir)
		return want_dir ? -ENOTDIR : -EISDIR;
	if (want_dir && (*in)->core.size != 0)
		return -ENOTEMPTY;
	if (what->undelegated && atomic_load(&(*in)->delegated))
		return -ERR_DELEGATED;
	err = dir_remove(t, dir, &ent); /* joins dir */
	if (!err)
		err = trans_join_inode(t, *in);
	if (!err && want_dir)
		err = namei_subdir_del(dir);
	if (!err)
		err = namei_drop_link(t, *in);
	if (err)
		return err;
	inode_touch(dir, TOUCH_MTIME | TOUCH_CTIME);
	return inode_write(t, dir);
}

/* delegated is needed with what.undelegated. */
static int remove_name(struct inode *dir, const char *name, size_t len, struct removal what,
		       struct inode **victim, struct inode **delegated)
{
	struct inode *in = NULL;
	struct trans t;
	int err = trans_begin(dir->fs, &t, UNLINK_BLOCKS + rider_blocks());

	if (err)
		return err;
	t.alloc_flags |= ALLOC_USE_RESERVE;
	err = remove_in(&t, dir, name, len, &what, &in);
	err = rider_end(&t, err, in, dir, NULL);
	if (!err)
		namei_unlinked(in);
	if (err == -ERR_DELEGATED)
		*delegated = in;
	else if (!err && victim)
		*victim = in;
	else if (in)
		inode_put(in);
	return err;
}

int namei_unlink(struct inode *dir, const char *name, size_t len, struct inode **victim)
{
	return remove_name(dir, name, len, (struct removal){ .want_dir = false }, victim, NULL);
}

int namei_unlink_undelegated(struct inode *dir, const char *name, size_t len, struct inode **victim,
			     struct inode **delegated)
{
	return remove_name(dir, name, len, (struct removal){ .undelegated = true }, victim,
			   delegated);
}

int namei_rmdir(struct inode *dir, const char *name, size_t len, struct inode **victim)
{
	return remove_name(dir, name, len, (struct removal){ .want_dir = true }, victim, NULL);
}

int namei_remove_meant(struct inode *dir, const char *name, size_t len, bool want_dir, inum_t meant,
		       struct inode **victim)
{
	return remove_name(dir, name, len,
			   (struct removal){ .want_dir = want_dir, .meant = meant }, victim, NULL);
}
