/* SPDX-License-Identifier: MIT
 *
 * core_file_api.c - the calls of extfs_core.h about the contents of files: each is one file
 * operation (file.h), run in the calling thread.
 */
#include "core_api.h"

#include "extmap.h"
#include "file.h"
#include "file_early.h"

/* Fill in what the kinds have in common, run, let go. prepare() sets the rest. */
static int64_t run_file_op(struct fs *fs, struct file_op *want)
{
	struct file_op fop;
	struct inode *in;
	int64_t res = core_inode(fs, (uint64_t)(uintptr_t)want->user, &in);

	if (res)
		return res;
	file_op_init(&fop, want->kind, in, ioctx_of_thread());
	fop.flags = want->flags;
	fop.mode = want->mode;
	fop.offset = want->offset;
	fop.len = want->len;
	fop.buf = want->buf;
	fop.dst = want->dst;
	fop.dst_offset = want->dst_offset;
	res = file_run_blocking(&fop);
	core_tell_operation(&fop);
	inode_put(in);
	return res;
}

#define FILE_OP(ino, ...) \
	(&(struct file_op){ .user = (void *)(uintptr_t)(ino), __VA_ARGS__ })

_Static_assert(EXTFS_F_APPEND == FILE_F_APPEND && EXTFS_F_DSYNC == FILE_F_DSYNC &&
	       EXTFS_F_KILL_PRIV == FILE_F_KILL_PRIV && EXTFS_F_NOWAIT == FILE_F_NOWAIT, "flags");
#define CHANGE_FLAGS ((unsigned)(FILE_F_DSYNC | FILE_F_KILL_PRIV | FILE_F_NOWAIT))

int64_t extfs_read(struct fs *fs, uint64_t ino, uint64_t offset, void *buf, size_t len,
		   unsigned flags)
{
	if (flags & ~(unsigned)FILE_F_NOWAIT)
		return -EINVAL;
	return run_file_op(fs, FILE_OP(ino, .kind = FILE_READ, .offset = offset, .buf = buf,
				       .len = len,
				       .flags = flags));
}

int64_t extfs_write(struct fs *fs, uint64_t ino, uint64_t offset, const void *buf, size_t len,
		    unsigned flags)
{
	if (flags & ~(CHANGE_FLAGS | FILE_F_APPEND))
		return -EINVAL;
	return run_file_op(fs, FILE_OP(ino, .kind = FILE_WRITE, .offset = offset,
				       .buf = (void *)buf,
				       .len = len, .flags = flags));
}

int extfs_truncate(struct fs *fs, uint64_t ino, uint64_t size, unsigned flags)
{
	if (flags & ~CHANGE_FLAGS)
		return -EINVAL;
	return (int)run_file_op(fs, FILE_OP(ino, .kind = FILE_TRUNCATE, .offset = size,
					    .flags = flags));
}

int extfs_fallocate(struct fs *fs, uint64_t ino, unsigned mode, uint64_t offset, uint64_t len,
		    unsigned flags)
{
	if (flags & ~CHANGE_FLAGS)
		return -EINVAL;
	return (int)run_file_op(fs, FILE_OP(ino, .kind = FILE_FALLOCATE, .mode = mode,
					    .offset = offset,
					    .len = len, .flags = flags));
}

static int64_t run_pair(struct fs *fs, enum file_op_kind kind, unsigned flags, uint64_t ino,
			uint64_t offset,
			uint64_t dst, uint64_t dst_offset, uint64_t len)
{
	struct inode *to;
	int64_t res = core_inode(fs, dst, &to);

	if (res)
		return res;
	res = run_file_op(fs, FILE_OP(ino, .kind = kind, .flags = flags, .offset = offset,
				      .len = len, .dst = to,
				      .dst_offset = dst_offset));
	inode_put(to);
	return res;
}

int64_t extfs_copy(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t dst, uint64_t dst_offset,
		   uint64_t len,
		   unsigned flags)
{
	if (flags & ~CHANGE_FLAGS)
		return -EINVAL;
	return run_pair(fs, FILE_COPY, flags, ino, offset, dst, dst_offset, len);
}

int extfs_exchange(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t other,
		   uint64_t other_offset, uint64_t len)
{
	return (int)run_pair(fs, FILE_EXCHANGE, 0, ino, offset, other, other_offset, len);
}

int extfs_collapse(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t len)
{
	return (int)run_file_op(fs, FILE_OP(ino, .kind = FILE_COLLAPSE, .offset = offset,
					    .len = len));
}

int extfs_insert(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t len)
{
	return (int)run_file_op(fs, FILE_OP(ino, .kind = FILE_INSERT, .offset = offset,
					    .len = len));
}

int64_t extfs_clone(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t dst, uint64_t dst_offset,
		    uint64_t len,
		    unsigned flags)
{
	if (flags & ~CHANGE_FLAGS)
		return -EINVAL;
	return run_pair(fs, FILE_COPY, flags | FILE_F_CLONE, ino, offset, dst, dst_offset, len);
}

int64_t extfs_dedupe(struct fs *fs, uint64_t ino, uint64_t offset, uint64_t dst,
		     uint64_t dst_offset, uint64_t len)
{
	return run_pair(fs, FILE_DEDUPE, 0, ino, offset, dst, dst_offset, len);
}

int extfs_map_generation(struct fs *fs, uint64_t ino, uint64_t *out)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	*out = atomic_load(&in->map_gen);
	inode_put(in);
	return 0;
}

int extfs_fsync(struct fs *fs, uint64_t ino, int datasync)
{
	return (int)run_file_op(fs, FILE_OP(ino, .kind = FILE_FSYNC,
					    .flags = datasync ? FILE_F_DATASYNC : 0));
}

int64_t extfs_seek(struct fs *fs, uint64_t ino, uint64_t offset, int whence)
{
	struct inode *in;
	int64_t res = core_inode(fs, ino, &in);

	if (res)
		return res;
	early_wait_blocking(in);
	res = file_seek(in, offset, whence);
	inode_put(in);
	return res;
}

/* Cut an extent to what one answer about sharing covers. */
static int map_shared(struct inode *in, struct extent *ext, bool *shared)
{
	nblocks_t run = ext->len;
	int err = 0;

	*shared = false;
	if (ext->state == EXT_WRITTEN && (in->core.flags & INODE_F_SHARED))
		err = extmap_is_shared(in, ext, shared, &run);
	ext->len = run;
	return err;
}

int extfs_map(struct fs *fs, uint64_t ino, uint64_t at, uint64_t end, int with_holes,
	      struct extfs_extent *out,
	      unsigned n)
{
	struct inode *in;
	unsigned got = 0;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	end = MIN(end, FILE_MAX_BLOCKS);
	early_wait_blocking(in);
	fs_rdlock(fs);
	while (got < n && at < end) {
		struct extent ext;
		bool shared;

		err = extmap_lookup(in, FORK_DATA, at, end - at, &ext);
		if (!err && ext.state != EXT_HOLE)
			err = map_shared(in, &ext, &shared);
		else
			shared = false;
		if (err)
			break;
		at = ext.file + ext.len;
		if (ext.state == EXT_HOLE && !with_holes)
			continue;
		out[got++] = (struct extfs_extent){
			.file = ext.file, .block = ext.state == EXT_HOLE ? 0 : ext.block,
			.len = ext.len, .state = (uint8_t)ext.state, .flags = ext.flags,
			.shared = shared,
		};
	}
	fs_unlock(fs);
	inode_put(in);
	return err ? err : (int)got;
}
