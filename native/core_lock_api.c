/* SPDX-License-Identifier: MIT
 *
 * core_lock_api.c - the calls of extfs_core.h about record locks of the NFS server's owners.
 */
#include "core_api.h"

#include "plock.h"

/* -EINVAL: no byte, or beyond the last one of 64 bits. */
static int lock_in(uint64_t owner, uint64_t start, uint64_t length, enum plock_type type,
		   struct plock *lock)
{
	*lock = (struct plock){ .start = start, .end = UINT64_MAX, .type = type, .owner = owner,
				.domain = PLOCK_NFS };
	if (length == UINT64_MAX)
		return 0;
	return !length || __builtin_add_overflow(start, length - 1, &lock->end) ? -EINVAL : 0;
}

static void lock_out(const struct plock *lock, struct extfs_lock *out)
{
	*out = (struct extfs_lock){
		.owner = lock->owner, .start = lock->start,
		.length = lock->end == UINT64_MAX ? UINT64_MAX : lock->end - lock->start + 1,
		.write = lock->type == PLOCK_WRITE, .pid = lock->pid,
		.local = lock->domain == PLOCK_LOCAL,
	};
}

int extfs_lock_set(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length,
		   int write,
		   struct extfs_lock *conflict)
{
	struct plock in_the_way;
	struct plock_request req = { .conflict = &in_the_way };
	struct inode *in;
	int err = lock_in(owner, start, length, write ? PLOCK_WRITE : PLOCK_READ, &req.lock);

	if (!err)
		err = core_inode(fs, ino, &in);
	if (err)
		return err;
	err = plock_set(in, &req);
	inode_put(in);
	if (err != -EAGAIN)
		return err;
	lock_out(&in_the_way, conflict);
	return 1;
}

int extfs_lock_clear(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length)
{
	struct plock_request req = { 0 };
	struct inode *in;
	int err = lock_in(owner, start, length, PLOCK_UNLOCK, &req.lock);

	if (!err)
		err = core_inode(fs, ino, &in);
	if (err)
		return err;
	err = plock_set(in, &req);
	inode_put(in);
	return err;
}

int extfs_lock_test(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length,
		    int write,
		    struct extfs_lock *conflict)
{
	struct plock lock;
	struct inode *in;
	int err = lock_in(owner, start, length, write ? PLOCK_WRITE : PLOCK_READ, &lock);

	if (!err)
		err = core_inode(fs, ino, &in);
	if (err)
		return err;
	plock_get(in, false, &lock);
	inode_put(in);
	if (lock.type == PLOCK_UNLOCK)
		return 0;
	lock_out(&lock, conflict);
	return 1;
}

int extfs_lock_release(struct fs *fs, uint64_t ino, uint64_t owner)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	plock_release_nfs(in, owner);
	inode_put(in);
	return 0;
}

int extfs_lock_watch(struct fs *fs, uint64_t ino, uint64_t owner, uint64_t start, uint64_t length,
		     int write)
{
	struct plock lock;
	struct inode *in;
	int err = lock_in(owner, start, length, write ? PLOCK_WRITE : PLOCK_READ, &lock);

	if (!err)
		err = core_inode(fs, ino, &in);
	if (err)
		return err;
	err = plock_watch(in, &lock);
	inode_put(in);
	return err;
}

int extfs_lock_unwatch(struct fs *fs, uint64_t ino, uint64_t owner)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	plock_unwatch(in, owner);
	inode_put(in);
	return 0;
}
