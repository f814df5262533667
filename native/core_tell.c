/* SPDX-License-Identifier: MIT
 *
 * core_tell.c - what a call of extfs_core.h has changed, for the kernel that caches it
 * (core_api.h).
 */
#include "core_api.h"

#include "file.h"

static _Thread_local int of_mount;

void extfs_of_mount(int on) { of_mount = on; }

/* NULL: nobody has to be told. */
static const struct cache_ops *who_caches(struct fs *fs)
{
	return of_mount ? NULL : fs->cache_ops;
}

bool core_tells(struct fs *fs)
{
	return who_caches(fs);
}

void core_tell_attributes(struct inode *in)
{
	const struct cache_ops *ops = who_caches(in->fs);

	if (ops)
		ops->attributes(in->fs->cache_arg, in->ino);
}

void core_tell_name(struct inode *dir, const char *name, size_t len)
{
	const struct cache_ops *ops = who_caches(dir->fs);

	if (!ops)
		return;
	ops->attributes(dir->fs->cache_arg, dir->ino);
	ops->name_changed(dir->fs->cache_arg, dir->ino, name, len);
	ops->bytes_changed(dir->fs->cache_arg, dir->ino, 0, UINT64_MAX);
}

void core_tell_bytes(struct inode *in, uint64_t start, uint64_t end)
{
	const struct cache_ops *ops = who_caches(in->fs);

	if (!ops)
		return;
	ops->attributes(in->fs->cache_arg, in->ino);
	/* Without the mark the kernel has no page yet, and those that it asks for from now on it
	 * gets as they are now. */
	if (start < end && atomic_load(&in->pages_cached))
		ops->bytes_changed(in->fs->cache_arg, in->ino, start, end);
}

/* As far as it may have come: operations that fail have changed nothing, or something. */
static bool did_nothing(int64_t result)
{
	return result == -EAGAIN || result == -ERR_JOURNAL_FULL || result == -EINVAL ||
	       result == -EROFS;
}

void core_tell_operation(const struct file_op *fop)
{
	uint64_t end = fop->offset + fop->len; /* of what a file cannot have, it does not matter */

	if (did_nothing(fop->result))
		return;
	switch (fop->kind) {
	case FILE_WRITE:
	case FILE_FALLOCATE:
		core_tell_bytes(fop->in, fop->offset, end < fop->offset ? UINT64_MAX : end);
		break;
	case FILE_TRUNCATE: /* the kernel itself drops what is behind a new end that it learns of */
	case FILE_COLLAPSE:
	case FILE_INSERT:
		core_tell_bytes(fop->in, fop->offset, UINT64_MAX);
		break;
	case FILE_EXCHANGE:
		core_tell_bytes(fop->in, fop->offset, end);
		/* fallthrough */
	case FILE_COPY:
		end = fop->dst_offset + fop->len;
		core_tell_bytes(fop->dst, fop->dst_offset,
				end < fop->dst_offset ? UINT64_MAX : end);
		break;
	default:
		break;
	}
}
