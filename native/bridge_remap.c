/* SPDX-License-Identifier: MIT
 *
 * bridge_remap.c - calls that change maps and that FUSE has no opcode for: EXCHANGE, CLONE, DEDUPE,
 * COLLAPSE, INSERT.
 *
 * The kernel knows nothing of these changes. So its pages of the ranges are dropped twice: before,
 * which writes back what was changed through a mapping, and after, since it may have read old ones
 * meanwhile. Each is skipped when it has no pages of the file.
 */
#include <string.h>

#include "bridge_control.h"

enum { DROP_FIRST, DROP_SECOND, CHANGE, CHANGED, DROP_FIRST_AGAIN, DROP_SECOND_AGAIN, REPLY };

static bool is_shift(const struct request *r)
{
	return r->fop.kind == FILE_COLLAPSE || r->fop.kind == FILE_INSERT;
}

/* Behind a place where blocks come or go everything moves; 0 is to the end. */
static uint64_t changed_len(const struct request *r)
{
	return is_shift(r) ? 0 : r->fop.len;
}

static void reply(struct request *r)
{
	const void *call = (const struct fuse_ioctl_in *)r->arg + 1;
	size_t len = is_shift(r) ? sizeof(struct extfs_ioc_shift) : sizeof(struct extfs_ioc_pair);
	struct extfs_ioc_pair *out = call_room(r, sizeof(*out));

	memcpy(out, call, len);
	if (!is_shift(r))
		out->done = r->fop.kind == FILE_EXCHANGE ? r->fop.len : (uint64_t)r->fop.result;
	call_reply(r, len);
}

/* The sizes that the kernel believes. */
static void drop_attributes(struct request *r)
{
	struct fs *fs = r->t->b->fs;
	const struct cache_ops *ops = fs->cache_ops;

	if (!ops)
		return;
	ops->attributes(fs->cache_arg, r->fop.in->ino);
	if (r->fop.dst && r->fop.dst != r->fop.in)
		ops->attributes(fs->cache_arg, r->fop.dst->ino);
}

static void step(struct request *r, int64_t result)
{
	struct file_op *fop = &r->fop;
	struct inode *in;

	for (;;) {
		switch (r->stage++) {
		case CHANGE: request_start_file(r, step); return;
		case CHANGED:
			if (fop->result < 0) {
				request_fail(r, (int)fop->result);
				return;
			}
			drop_attributes(r);
			break;
		case DROP_FIRST:
		case DROP_FIRST_AGAIN:
			if (!atomic_load(&fop->in->pages_cached))
				break;
			request_drop_pages(r, fop->in, fop->offset, changed_len(r), step);
			return;
		case DROP_SECOND:
		case DROP_SECOND_AGAIN:
			in = fop->dst;
			if (!in || !atomic_load(&in->pages_cached))
				break;
			request_drop_pages(r, in, fop->dst_offset, changed_len(r), step);
			return;
		case REPLY: reply(r); return;
		}
	}
}

static void begin(struct request *r, enum file_op_kind kind, struct inode *in, uint64_t offset,
		  uint64_t len)
{
	file_op_init(&r->fop, kind, in, r->t->ctx);
	r->fop.offset = offset;
	r->fop.len = len;
	if (r->head.uid) /* as with a write, only root keeps setuid and capabilities */
		r->fop.flags = FILE_F_KILL_PRIV;
}

/* Root on the control file, anybody to whom the file is open for writing. */
static int check_caller(const struct request *r)
{
	if (request_on_control(r))
		return r->head.uid ? -EPERM : 0;
	return call_writable(r);
}

/* The other file: on a file's own descriptor always by its handle, unless it is the same. */
static int other_file(struct request *r, const struct extfs_ioc_pair *call, struct inode *file,
		      struct inode **other)
{
	int err;

	if (!call->other.ino && !call->other.generation && !request_on_control(r)) {
		*other = file;
		return call->other.reserved ? -EINVAL : 0;
	}
	err = call_handle_inode(r, &call->other, &r->inode2);
	if (err)
		return err;
	*other = r->inode2;
	if (!inode_is_reg(*other))
		return inode_is_dir(*other) ? -EISDIR : -EINVAL;
	return call_owner(r, *other);
}

static int check_pair(const struct extfs_ioc_pair *call, bool whole_blocks)
{
	/* The last block of a source may be partly filled: the operation looks. */
	uint64_t len = whole_blocks ? call->length : call->length & ~BLOCK_MASK;
	int err;

	if (!call->length || call->done)
		return -EINVAL;
	if (call->length > FILE_MAX_BYTES)
		return -EFBIG;
	len = MAX(len, whole_blocks ? 0 : (uint64_t)BLOCK_SIZE);
	err = call_range(call->offset, len, false);
	return err ? err : call_range(call->other_offset, len, false);
}

static int pair_files(struct request *r, const struct extfs_ioc_pair *call, bool whole_blocks,
		      struct inode **file, struct inode **other)
{
	int err = check_pair(call, whole_blocks);

	if (!err)
		err = check_caller(r);
	if (!err)
		err = call_file(r, &call->file, true, file);
	return err ? err : other_file(r, call, *file, other);
}

void call_exchange(struct request *r, const void *arg)
{
	const struct extfs_ioc_pair *call = arg;
	struct inode *file, *other;
	int err = pair_files(r, call, true, &file, &other);

	if (err) {
		request_fail(r, err);
		return;
	}
	if (!request_admit(r, file, DELEGATION_WRITE) || !request_admit(r, other, DELEGATION_WRITE))
		return;
	begin(r, FILE_EXCHANGE, file, call->offset, call->length);
	r->fop.dst = other;
	r->fop.dst_offset = call->other_offset;
	step(r, 0);
}

/* From the other file to this one. */
static void call_share(struct request *r, const struct extfs_ioc_pair *call, enum file_op_kind kind,
		       unsigned flags)
{
	struct inode *file, *other;
	int err = pair_files(r, call, false, &file, &other);

	if (err) {
		request_fail(r, err);
		return;
	}
	if (!request_admit(r, other, DELEGATION_READ) ||
	    !request_admit(r, file, kind == FILE_DEDUPE ? DELEGATION_READ : DELEGATION_WRITE))
		return;
	begin(r, kind, other, call->other_offset, call->length);
	r->fop.flags |= flags;
	r->fop.dst = file;
	r->fop.dst_offset = call->offset;
	step(r, 0);
}

void call_clone(struct request *r, const void *arg)
{
	call_share(r, arg, FILE_COPY, FILE_F_CLONE);
}

void call_dedupe(struct request *r, const void *arg)
{
	call_share(r, arg, FILE_DEDUPE, 0);
}

static void call_shift(struct request *r, const struct extfs_ioc_shift *call, enum file_op_kind kind)
{
	struct inode *file;
	int err = call_range(call->offset, call->length, false);

	if (!err)
		err = check_caller(r);
	if (!err)
		err = call_file(r, &call->file, true, &file);
	if (err) {
		request_fail(r, err);
		return;
	}
	if (!request_admit(r, file, DELEGATION_WRITE))
		return;
	begin(r, kind, file, call->offset, call->length);
	step(r, 0);
}

void call_collapse(struct request *r, const void *arg)
{
	call_shift(r, arg, FILE_COLLAPSE);
}

void call_insert(struct request *r, const void *arg)
{
	call_shift(r, arg, FILE_INSERT);
}
