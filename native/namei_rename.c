/* SPDX-License-Identifier: MIT
 *
 * namei_rename.c - rename and exchange.
 *
 * Two names, each with the inode it stands for: `moved` under (from, name), `victim` (may be
 * absent) under (to, new name). An exchange moves both. All in one transaction, so no moment shows
 * neither or both names.
 */
#include "namei.h"

#include <string.h>

#include "alloc.h"
#include "errors.h"
#include "rider.h"
#include "namei_priv.h"

/* An entry deleted, one inserted (or overwritten), an orphan record inserted; four inode records
 * overwritten. What is allocated and freed lies apart (namei.c). */
#define RENAME_BLOCKS (3 * TRANS_TREE_OP + 4 + 2 * TRANS_ALLOC_OP)

struct renaming {
	struct inode *from, *to;
	const char *name, *new_name;
	size_t len, new_len;
	unsigned flags;
	bool undelegated; /* not while a client has a delegation of one of them */
	bool meant; /* only these two inodes; no victim is always fine */
	inum_t meant_moved, meant_victim;
	struct inode *moved, *victim;
	struct inode *delegated; /* one of them, to which that happened */
	struct dirent src, dst;
};

/* -EINVAL when `dir` is `top` or below it. Live directories have live parents up to the root. */
static int check_not_below(struct inode *dir, const struct inode *top)
{
	struct fs *fs = dir->fs;
	uint64_t steps = get64(fs_root(fs)->inodes);
	inum_t at = dir->ino;
	struct inode *in;
	int err;

	while (at != top->ino) {
		if (at == fs->super.root_inode)
			return 0;
		if (steps-- == 0)
			return namei_corrupt(dir, NULL, "its parents form a loop");
		err = inode_get(fs, at, &in);
		if (err == -ENOENT)
			return namei_corrupt(dir, NULL, "one of its parents does not exist");
		if (err)
			return err;
		at = in->core.parent;
		inode_put(in);
	}
	return -EINVAL;
}

/* Both names looked up, with everything that forbids the rename but space; 0 with moved == victim:
 * nothing to do. */
static int find_both(struct renaming *r)
{
	int err = namei_check_dir(r->from);

	if (!err)
		err = namei_check_dir(r->to);
	if (!err)
		err = namei_find(r->from, r->name, r->len, &r->src, &r->moved);
	if (err)
		return err;
	err = namei_find(r->to, r->new_name, r->new_len, &r->dst, &r->victim);
	if (err == -ENOENT && !(r->flags & RENAME_F_EXCHANGE))
		err = 0;
	else if (!err && (r->flags & RENAME_F_NOREPLACE))
		err = -EEXIST;
	if (!err && r->meant && (r->moved->ino != r->meant_moved ||
				 (r->victim && r->victim->ino != r->meant_victim)))
		err = -EAGAIN;
	if (err || r->moved == r->victim)
		return err;
	if (inode_is_dir(r->moved))
		err = check_not_below(r->to, r->moved);
	if (err || !r->victim)
		return err;
	if (r->flags & RENAME_F_EXCHANGE)
		return inode_is_dir(r->victim) ? check_not_below(r->from, r->victim) : 0;
	if (inode_is_dir(r->moved) && !inode_is_dir(r->victim))
		return -ENOTDIR;
	if (!inode_is_dir(r->moved) && inode_is_dir(r->victim))
		return -EISDIR;
	return r->victim->core.size != 0 && inode_is_dir(r->victim) ? -ENOTEMPTY : 0;
}

static int join_all(struct trans *t, struct renaming *r)
{
	int err = trans_join_inode(t, r->from);

	if (!err)
		err = trans_join_inode(t, r->to);
	if (!err)
		err = trans_join_inode(t, r->moved);
	if (!err && r->victim)
		err = trans_join_inode(t, r->victim);
	return err;
}

/* A joined directory changes its parent. */
static int reparent(struct inode *in, struct inode *from, struct inode *to)
{
	int err;

	if (!inode_is_dir(in) || from == to)
		return 0;
	err = namei_subdir_del(from);
	if (!err)
		err = namei_subdir_add(to);
	in->core.parent = to->ino;
	return err;
}

static int exchange(struct trans *t, struct renaming *r)
{
	int err = dir_replace(t, r->from, &r->src, r->victim->ino, r->dst.type);

	if (!err)
		err = dir_replace(t, r->to, &r->dst, r->moved->ino, r->src.type);
	/* Two directories: the counts come out even, whichever moves first. */
	if (!err && inode_is_dir(r->moved) && inode_is_dir(r->victim)) {
		r->moved->core.parent = r->to->ino;
		r->victim->core.parent = r->from->ino;
	} else if (!err) {
		err = reparent(r->moved, r->from, r->to);
		if (!err)
			err = reparent(r->victim, r->to, r->from);
	}
	if (err)
		return err;
	inode_touch(r->victim, TOUCH_CTIME);
	return inode_write(t, r->victim);
}

static int move(struct trans *t, struct renaming *r)
{
	int err;

	if (r->victim) {
		t->alloc_flags |= ALLOC_USE_RESERVE;
		err = dir_replace(t, r->to, &r->dst, r->moved->ino, r->src.type);
		if (!err && inode_is_dir(r->victim))
			err = namei_subdir_del(r->to);
		if (!err)
			err = namei_drop_link(t, r->victim);
	} else {
		err = dir_add(t, r->to, r->new_name, r->new_len, r->moved->ino, r->src.type);
	}
	if (!err)
		err = dir_remove(t, r->from, &r->src);
	return err ? err : reparent(r->moved, r->from, r->to);
}

/* The inode of which a client has a delegation; NULL: of none. */
static struct inode *delegated_one(const struct renaming *r)
{
	if (atomic_load(&r->moved->delegated))
		return r->moved;
	return r->victim && atomic_load(&r->victim->delegated) ? r->victim : NULL;
}

static int rename_in(struct trans *t, struct renaming *r)
{
	int err = find_both(r);

	if (err || r->moved == r->victim)
		return err;
	if (r->undelegated && (r->delegated = delegated_one(r)))
		return -ERR_DELEGATED;
	err = join_all(t, r);
	if (!err)
		err = r->flags & RENAME_F_EXCHANGE ? exchange(t, r) : move(t, r);
	if (err)
		return err;
	inode_touch(r->moved, TOUCH_CTIME);
	inode_touch(r->from, TOUCH_MTIME | TOUCH_CTIME);
	if (r->to != r->from)
		inode_touch(r->to, TOUCH_MTIME | TOUCH_CTIME);
	err = inode_write(t, r->moved);
	if (!err)
		err = inode_write(t, r->from);
	if (!err && r->to != r->from)
		err = inode_write(t, r->to);
	return err;
}

static int rename_names(struct renaming r, struct inode **victim, struct inode **delegated)
{
	unsigned flags = r.flags;
	struct trans t;
	int err;

	if (victim)
		*victim = NULL;
	if ((flags & ~(RENAME_F_NOREPLACE | RENAME_F_EXCHANGE)) ||
	    flags == (RENAME_F_NOREPLACE | RENAME_F_EXCHANGE))
		return -EINVAL;
	err = trans_begin(r.from->fs, &t, RENAME_BLOCKS + rider_blocks());
	if (err)
		return err;
	r.undelegated = delegated != NULL;
	err = rename_in(&t, &r);
	err = rider_end(&t, err, r.moved, r.from, r.to);
	if (err == -ERR_DELEGATED)
		*delegated = inode_ref(r.delegated);
	if (!err && r.victim && r.victim != r.moved)
		namei_unlinked(r.victim);
	if (!err && victim && r.victim && r.victim != r.moved && !(flags & RENAME_F_EXCHANGE)) {
		*victim = r.victim;
		r.victim = NULL;
	}
	if (r.moved)
		inode_put(r.moved);
	if (r.victim)
		inode_put(r.victim);
	return err;
}

int namei_rename(struct inode *from, const char *name, size_t len, struct inode *to,
		 const char *new_name, size_t new_len, unsigned flags, struct inode **victim)
{
	return rename_names((struct renaming){.from = from, .to = to, .name = name, .len = len,
					      .new_name = new_name, .new_len = new_len, .flags = flags},
			    victim, NULL);
}

int namei_rename_meant(struct inode *from, const char *name, size_t len, inum_t meant, struct inode *to,
		       const char *new_name, size_t new_len, inum_t meant_victim, unsigned flags,
		       struct inode **victim)
{
	return rename_names((struct renaming){.from = from, .to = to, .name = name, .len = len,
					      .new_name = new_name, .new_len = new_len, .flags = flags,
					      .meant = true, .meant_moved = meant,
					      .meant_victim = meant_victim},
			    victim, NULL);
}

int namei_rename_undelegated(struct inode *from, const char *name, size_t len, struct inode *to,
			     const char *new_name, size_t new_len, unsigned flags, struct inode **victim,
			     struct inode **delegated)
{
	return rename_names((struct renaming){.from = from, .to = to, .name = name, .len = len,
					      .new_name = new_name, .new_len = new_len, .flags = flags},
			    victim, delegated);
}
