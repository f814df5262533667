/* SPDX-License-Identifier: MIT
 *
 * bridge_layout.c - calls about layouts: LAYOUT_GET, LAYOUT_COMMIT, LAYOUT_RETURN, RECALL, LIST,
 * WATCH.
 *
 * The first three are file operations on request.layout, whose arrays lie in the message and in the
 * room behind it (call_room()), and answer from their done callbacks.
 */
#include <string.h>

#include "bridge_control.h"

_Static_assert(EXTFS_LAYOUT_WAIT == LAYOUT_F_WAIT && EXTFS_LAYOUT_RECALL == LAYOUT_F_RECALL &&
		       EXTFS_LAYOUT_ATOMIC == LAYOUT_F_ATOMIC &&
		       EXTFS_COMMIT_LAZY == LAYOUT_F_LAZY && EXTFS_COMMIT_MTIME == LAYOUT_F_MTIME &&
		       EXTFS_RETURN_ALL == LAYOUT_F_ALL,
	       "flags");
_Static_assert((int)EXTFS_READ == (int)IOMODE_READ && (int)EXTFS_RW == (int)IOMODE_RW &&
		       (int)EXTFS_ANY == (int)IOMODE_ANY && (int)EXTFS_PIN == (int)IOMODE_PIN,
	       "iomodes");
_Static_assert((int)EXTFS_READ_WRITE_DATA == (int)READ_WRITE_DATA &&
		       (int)EXTFS_READ_DATA == (int)READ_DATA &&
		       (int)EXTFS_INVALID_DATA == (int)INVALID_DATA &&
		       (int)EXTFS_NONE_DATA == (int)NONE_DATA,
	       "states");
_Static_assert(sizeof(struct extfs_range) == sizeof(struct layout_range) &&
		       offsetof(struct extfs_range, length) == offsetof(struct layout_range, length),
	       "ranges are passed on as they came");
_Static_assert(sizeof(struct extfs_layout_extent) == sizeof(struct layout_extent),
	       "extents are translated in place");

static void start(struct request *r, enum file_op_kind kind, struct inode *in,
		  void (*done)(struct request *r, int64_t result))
{
	file_op_init(&r->fop, kind, in, r->t->ctx);
	r->fop.layout = &r->layout;
	request_start_file(r, done);
}

static bool iomode_of(uint32_t given, enum layout_iomode *iomode)
{
	*iomode = (enum layout_iomode)given;
	return given >= IOMODE_READ && given <= IOMODE_PIN;
}

/* ---- LAYOUT_GET ---- */

static int get_range(const struct extfs_ioc_layout *call, struct layout_args *args)
{
	uint64_t end, begin = call->offset & ~BLOCK_MASK;

	if (!call->length || call->min_length > call->length || call->offset > FILE_MAX_BYTES)
		return call->offset > FILE_MAX_BYTES ? -EFBIG : -EINVAL;
	args->offset = begin;
	args->min_length = block_ceil(call->min_length) << BLOCK_SHIFT;
	if (call->length == UINT64_MAX) {
		args->length = UINT64_MAX;
		return call->iomode == EXTFS_RW ? -EINVAL : 0;
	}
	if (__builtin_add_overflow(call->offset, call->length, &end))
		return -EINVAL;
	if (end > FILE_MAX_BYTES + 1)
		return -EFBIG;
	args->length = (block_ceil(end) << BLOCK_SHIFT) - begin;
	return 0;
}

static int get_args(const struct extfs_ioc_layout *call, struct layout_args *args)
{
	*args = (struct layout_args){
		.holder = call->holder, .flags = call->flags, .time_ms = call->time_ms,
		.cap = call->count,
	};
	if (!iomode_of(call->iomode, &args->iomode) || args->iomode == IOMODE_ANY)
		return -EINVAL;
	if (!call->count || call->count > EXTFS_LAYOUT_EXTENTS_MAX)
		return -EINVAL;
	if ((call->flags & EXTFS_LAYOUT_ATOMIC) && args->iomode != IOMODE_RW)
		return -EINVAL;
	if (args->iomode == IOMODE_PIN ? !call->time_ms || call->time_ms > EXTFS_PIN_MAX_MS
				       : call->time_ms != 0)
		return -EINVAL;
	return get_range(call, args);
}

static void done_get(struct request *r, int64_t result)
{
	const struct extfs_ioc_layout *call = (const void *)((const struct fuse_ioctl_in *)r->arg + 1);
	struct layout_args *args = &r->layout;
	struct extfs_ioc_layout *out = (void *)((uint8_t *)args->extents -
						offsetof(struct extfs_ioc_layout, extents));

	if (result < 0) {
		request_fail(r, (int)result);
		return;
	}
	xassert(args->count <= args->cap);
	for (unsigned i = 0; i < args->count; i++) {
		struct layout_extent from;
		struct extfs_layout_extent to;

		memcpy(&from, &out->extents[i], sizeof(from));
		to = (struct extfs_layout_extent){
			.offset = from.offset,
			.physical = from.state == NONE_DATA ? 0 : from.device,
			.length = from.length,
			.state = (uint32_t)from.state,
		};
		memcpy(&out->extents[i], &to, sizeof(to));
	}
	memcpy(out, call, sizeof(*out));
	out->count = args->count;
	out->offset = args->offset;
	out->next = args->next;
	out->seq = args->seq;
	out->generation = args->map_gen;
	out->file_size = args->size;
	call_reply(r, offsetof(struct extfs_ioc_layout, extents[args->count]));
}

/* Delegations of clients are in the way as layouts of others are, and the flags mean them, too. */
static bool admit_get(struct request *r, struct inode *in)
{
	enum delegation_op op = r->layout.iomode == IOMODE_RW ? DELEGATION_WRITE : DELEGATION_READ;

	if (r->layout.flags & LAYOUT_F_WAIT)
		return request_admit(r, in, op);
	return request_admit_now(r, in, op, r->layout.flags & LAYOUT_F_RECALL);
}

void call_layout_get(struct request *r, const void *arg)
{
	const struct extfs_ioc_layout *call = arg;
	struct extfs_ioc_layout *out;
	struct inode *in;
	int err = get_args(call, &r->layout);

	if (!err)
		err = call_file(r, &call->file, true, &in);
	if (!err && r->layout.iomode != IOMODE_READ)
		err = call_writable(r);
	if (!err)
		err = call_owner(r, in);
	if (!err)
		err = holder_check(in->fs, call->holder, call->key);
	if (err) {
		request_fail(r, err);
		return;
	}
	if (!admit_get(r, in))
		return;
	out = call_room(r, offsetof(struct extfs_ioc_layout, extents[call->count]));
	r->layout.extents = (void *)out->extents;
	start(r, FILE_LAYOUT_GET, in, done_get);
}

/* ---- LAYOUT_COMMIT ---- */

static int commit_args(const struct extfs_ioc_commit *call, struct layout_args *args)
{
	*args = (struct layout_args){
		.holder = call->holder, .flags = call->flags, .seq = call->seq,
		.ranges = (const void *)call->ranges, .nranges = call->count,
		.size = call->file_size,
		.mtime = {.sec = call->mtime_sec, .nsec = call->mtime_nsec},
	};
	if (call->count > EXTFS_COMMIT_RANGES_MAX || call->mtime_nsec > 999999999)
		return -EINVAL;
	if (!(call->flags & EXTFS_COMMIT_MTIME) && (call->mtime_sec || call->mtime_nsec))
		return -EINVAL;
	if (call->file_size > FILE_MAX_BYTES)
		return -EFBIG;
	for (uint32_t i = 0; i < call->count; i++) {
		int err = call_range(call->ranges[i].offset, call->ranges[i].length, false);

		if (err)
			return err;
	}
	return 0;
}

static void done_commit(struct request *r, int64_t result)
{
	const struct fuse_write_in *write = r->arg;
	struct fuse_write_out written = {.size = write->size};
	struct extfs_ioc_commit *out;

	if (result < 0) {
		request_fail(r, (int)result);
	} else if (r->head.opcode == FUSE_WRITE) {
		request_reply(r, &written, sizeof(written));
	} else {
		out = call_room(r, sizeof(*out));
		memcpy(out, (const struct fuse_ioctl_in *)r->arg + 1, sizeof(*out));
		out->file_size = r->layout.size;
		call_reply(r, sizeof(*out));
	}
}

void call_layout_commit(struct request *r, const void *arg)
{
	const struct extfs_ioc_commit *call = arg;
	struct inode *in;
	int err = commit_args(call, &r->layout);

	if (!err)
		err = call_file(r, &call->file, true, &in);
	if (!err)
		err = call_writable(r);
	if (!err)
		err = holder_check(in->fs, call->holder, call->key);
	/* A lost holder may commit what nobody has taken from it: the operation looks. */
	if (err && err != -EOWNERDEAD)
		request_fail(r, err);
	else
		start(r, FILE_LAYOUT_COMMIT, in, done_commit);
}

/* ---- LAYOUT_RETURN ---- */

static void done_return(struct request *r, int64_t result)
{
	struct extfs_ioc_return *out;

	if (result < 0) {
		request_fail(r, (int)result);
		return;
	}
	out = call_room(r, sizeof(*out));
	memcpy(out, (const struct fuse_ioctl_in *)r->arg + 1, sizeof(*out));
	call_reply(r, sizeof(*out));
}

static int return_args(struct request *r, const struct extfs_ioc_return *call, struct inode **in)
{
	struct layout_args *args = &r->layout;
	int err;

	*args = (struct layout_args){.holder = call->holder, .flags = call->flags};
	if (call->reserved0)
		return -EINVAL;
	if (call->flags & EXTFS_RETURN_ALL) {
		args->iomode = IOMODE_ANY;
		args->length = UINT64_MAX;
		err = request_inode(r, r->t->b->fs->super.root_inode, &r->inode);
		*in = r->inode;
		return err;
	}
	args->offset = call->offset;
	args->length = call->length;
	if (!iomode_of(call->iomode, &args->iomode))
		return -EINVAL;
	err = call_range(call->offset, call->length, true);
	return err ? err : call_file(r, &call->file, true, in);
}

void call_layout_return(struct request *r, const void *arg)
{
	const struct extfs_ioc_return *call = arg;
	struct inode *in;
	int err = return_args(r, call, &in);

	if (!err)
		err = holder_check(in->fs, call->holder, call->key);
	/* Lost holders too give back. */
	if (err && err != -EOWNERDEAD)
		request_fail(r, err);
	else
		start(r, FILE_LAYOUT_RETURN, in, done_return);
}

/* ---- RECALL, LIST, WATCH ---- */

/* Rounded outwards: who asks for a byte asks for its block. */
static int recall_range(const struct extfs_ioc_recall *call, uint64_t *offset, uint64_t *length)
{
	uint64_t end;

	*offset = call->offset & ~BLOCK_MASK;
	*length = UINT64_MAX;
	if (!call->length || call->reserved0)
		return -EINVAL;
	if (call->length == UINT64_MAX)
		return 0;
	if (__builtin_add_overflow(call->offset, call->length, &end))
		return -EINVAL;
	if (end > FILE_MAX_BYTES + 1)
		return -EFBIG;
	*length = (block_ceil(end) << BLOCK_SHIFT) - *offset;
	return 0;
}

void call_recall(struct request *r, const void *arg)
{
	const struct extfs_ioc_recall *call = arg;
	enum layout_iomode iomode;
	uint64_t offset, length;
	struct inode *in;
	int err = recall_range(call, &offset, &length);

	if (!err && !iomode_of(call->iomode, &iomode))
		err = -EINVAL;
	if (!err)
		err = call_file(r, &call->file, true, &in);
	if (!err)
		err = call_owner(r, in);
	if (!err)
		err = layout_recall(in, call->holder, iomode, offset, length);
	if (err < 0) {
		request_fail(r, err);
		return;
	}
	memcpy(call_room(r, sizeof(*call)), call, sizeof(*call));
	call_reply(r, sizeof(*call));
}

static void list_fill(struct inode *in, struct extfs_ioc_list *out)
{
	while (out->next != UINT64_MAX && out->count < EXTFS_LIST_GRANTS) {
		struct grant_look look[32];
		unsigned n = MIN(ARRAY_LEN(look), EXTFS_LIST_GRANTS - out->count);

		n = grant_list(in, &out->next, look, n);
		if (!n) {
			out->next = UINT64_MAX;
			return;
		}
		for (unsigned i = 0; i < n; i++)
			out->grants[out->count++] = (struct extfs_grant){
				.holder = look[i].holder,
				.offset = look[i].offset,
				.length = look[i].length,
				.seq = look[i].seq,
				.iomode = (uint32_t)look[i].iomode,
				.flags = look[i].flags & LAYOUT_F_ATOMIC,
			};
	}
}

void call_list(struct request *r, const void *arg)
{
	const struct extfs_ioc_list *call = arg;
	struct extfs_ioc_list *out;
	struct inode *in;
	int err = call_file(r, &call->file, true, &in);

	if (!err && request_on_control(r))
		err = call_owner(r, in);
	if (err) {
		request_fail(r, err);
		return;
	}
	out = call_room(r, sizeof(*out));
	memcpy(out, call, offsetof(struct extfs_ioc_list, next));
	out->next = call->offset;
	list_fill(in, out);
	call_reply(r, offsetof(struct extfs_ioc_list, grants[out->count]));
}

void call_watch(struct request *r, const void *arg)
{
	const struct extfs_ioc_watch *call = arg;
	struct inode *in;
	int err = call_file(r, &call->file, true, &in);

	if (!err && request_on_control(r))
		err = call_owner(r, in);
	if (!err)
		err = holder_check(in->fs, call->holder, call->key);
	if (!err)
		err = layout_watch(in, call->holder, !(call->flags & EXTFS_WATCH_OFF));
	if (err) {
		request_fail(r, err);
		return;
	}
	memcpy(call_room(r, sizeof(*call)), call, sizeof(*call));
	call_reply(r, sizeof(*call));
}
