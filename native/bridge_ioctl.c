/* SPDX-License-Identifier: MIT
 *
 * bridge_ioctl.c - the calls of extfs_ioctl.h: who serves which, what every call has to be checked
 * for, and those about the filesystem itself.
 *
 * FUSE's restricted ioctls carry their argument by the size that the command number encodes, in and
 * out; so one request is one struct, at most 16383 bytes, and a longer answer continues from a
 * cursor. An answer may be shorter than its struct: the kernel copies to the caller what it gets.
 */
#include <fcntl.h>
#include <linux/ioctl.h>
#include <string.h>

#include "alloc.h"
#include "bridge_control.h"
#include "errors.h"
#include "extmap.h"

#define IOC_MAX 16383u
_Static_assert(sizeof(struct extfs_ioc_map) <= IOC_MAX &&
		       sizeof(struct extfs_ioc_list) <= IOC_MAX &&
		       sizeof(struct extfs_ioc_events) <= IOC_MAX &&
		       _IOC_SIZE(EXTFS_IOC_LAYOUT_GET(EXTFS_LAYOUT_EXTENTS_MAX)) <= IOC_MAX &&
		       _IOC_SIZE(EXTFS_IOC_LAYOUT_COMMIT(EXTFS_COMMIT_IOCTL_MAX)) <= IOC_MAX,
	       "what an ioctl can carry");
/* Its buffer may begin anywhere in a page, and a request carries so many pages. */
_Static_assert(sizeof(struct extfs_ioc_commit) +
			       EXTFS_COMMIT_RANGES_MAX * sizeof(struct extfs_range) <=
		       BRIDGE_MAX_IO - 4095,
	       "what a write request can carry");
_Static_assert(EXTFS_COMMIT_RANGES_MAX <= LAYOUT_MAX_RANGES, "what the core takes");
_Static_assert(sizeof(struct extfs_ioc_extent) == 32 &&
		       sizeof(struct extfs_ioc_map) == 80 + 32 * EXTFS_IOC_MAP_EXTENTS &&
		       sizeof(struct extfs_ioc_info) == 384 &&
		       sizeof(struct extfs_ioc_handle) == 40 &&
		       sizeof(struct extfs_ioc_holder) == 256 &&
		       sizeof(struct extfs_ioc_layout) == 128 &&
		       sizeof(struct extfs_ioc_commit) == 88 &&
		       sizeof(struct extfs_ioc_return) == 80 &&
		       sizeof(struct extfs_ioc_recall) == 72 &&
		       sizeof(struct extfs_ioc_list) == 56 + 40 * EXTFS_LIST_GRANTS &&
		       sizeof(struct extfs_ioc_watch) == 56 &&
		       sizeof(struct extfs_event) == 80 &&
		       sizeof(struct extfs_ioc_event_socket) == 24 &&
		       sizeof(struct extfs_ioc_pair) == 88 && sizeof(struct extfs_ioc_shift) == 56,
	       "layout of the interface");
_Static_assert((int)EXTFS_IOC_UNWRITTEN == (int)EXT_UNWRITTEN &&
		       (int)EXTFS_IOC_WRITTEN == (int)EXT_WRITTEN,
	       "states");

static struct bridge *bridge_of(const struct request *r) { return r->t->b; }

static bool all_zero(const void *p, size_t len)
{
	const uint8_t *b = p;

	while (len && !*b)
		b++, len--;
	return len == 0;
}

/* ---- what handlers need ---- */

struct open_file *call_open_file(const struct request *r)
{
	const uint64_t *fh = r->arg; /* first of fuse_ioctl_in and of fuse_write_in */

	_Static_assert(offsetof(struct fuse_ioctl_in, fh) == 0 &&
			       offsetof(struct fuse_write_in, fh) == 0,
		       "fh");
	return open_file_of(*fh);
}

static int check_regular(const struct inode *in)
{
	if (inode_is_reg(in))
		return 0;
	return inode_is_dir(in) ? -EISDIR : -EINVAL;
}

int call_handle_inode(struct request *r, const struct extfs_handle *h, struct inode **slot)
{
	int err = h->reserved || !h->ino ? -EINVAL : 0;

	xassert(!*slot);
	if (!err)
		err = inode_get_handle(bridge_of(r)->fs, h->ino, h->generation, slot);
	if (err)
		*slot = NULL;
	/* Nothing that the administrator has to hear of. */
	return err == -ERR_STALE_HANDLE ? -ESTALE : err;
}

int call_file(struct request *r, const struct extfs_handle *h, bool reg, struct inode **in)
{
	int err;

	if (h->reserved)
		return -EINVAL;
	if (request_on_control(r)) {
		struct inode **slot = r->inode ? &r->inode2 : &r->inode;

		err = call_handle_inode(r, h, slot);
		if (err)
			return err;
		*in = *slot;
	} else {
		*in = call_open_file(r)->in;
		if ((h->ino || h->generation) &&
		    (h->ino != (*in)->ino || h->generation != (*in)->core.generation))
			return -ESTALE;
	}
	return reg ? check_regular(*in) : 0;
}

int call_owner(const struct request *r, struct inode *in)
{
	bool owner;

	if (!r->head.uid)
		return 0;
	fs_rdlock(in->fs);
	owner = in->core.uid == r->head.uid;
	fs_unlock(in->fs);
	return owner ? 0 : -EACCES;
}

int call_writable(const struct request *r)
{
	if (request_on_control(r) || (call_open_file(r)->flags & O_ACCMODE) != O_RDONLY)
		return 0;
	return -EBADF;
}

int call_range(uint64_t offset, uint64_t length, bool to_end_allowed)
{
	uint64_t end;

	if (!length || (offset & BLOCK_MASK))
		return -EINVAL;
	if (length == UINT64_MAX && to_end_allowed)
		return 0;
	if ((length & BLOCK_MASK) || __builtin_add_overflow(offset, length, &end))
		return -EINVAL;
	return block_floor(end) > FILE_MAX_BLOCKS ? -EFBIG : 0;
}

void *call_room(struct request *r, size_t len)
{
	uint8_t *end = (uint8_t *)(uintptr_t)r->arg + r->arg_len;
	size_t used = end > r->payload ? (size_t)(end - r->payload) : 0;
	size_t at = ((used + 15) & ~(size_t)15) + sizeof(struct fuse_ioctl_out);

	_Static_assert(sizeof(struct fuse_ioctl_out) == 16, "keeps what follows aligned");
	xassert(at + len <= BRIDGE_MAX_IO + 4096);
	r->touched = MAX(r->touched, at + len);
	return memset(r->payload + at - sizeof(struct fuse_ioctl_out), 0,
		      sizeof(struct fuse_ioctl_out) + len) +
	       sizeof(struct fuse_ioctl_out);
}

void call_reply(struct request *r, size_t len)
{
	uint8_t *end = (uint8_t *)(uintptr_t)r->arg + r->arg_len;
	size_t used = end > r->payload ? (size_t)(end - r->payload) : 0;

	request_reply(r, r->payload + ((used + 15) & ~(size_t)15),
		      sizeof(struct fuse_ioctl_out) + len);
}

/* ---- INFO, HANDLE, SHUTDOWN, EVENTS ---- */

static void call_info(struct request *r, const void *arg)
{
	struct fs *fs = bridge_of(r)->fs;
	struct extfs_ioc_info *out = call_room(r, sizeof(*out));
	struct alloc_space space;

	_Static_assert(sizeof(out->uuid) == FORMAT_UUID_LEN, "uuid");
	alloc_statfs(fs, &space); /* takes the lock: twice would wait for a writer in between */
	*out = (struct extfs_ioc_info){
		.size = sizeof(*out),
		.block_size = BLOCK_SIZE,
		.version = EXTFS_IOC_VERSION,
		.device_size = fs->super.total_blocks << BLOCK_SHIFT,
		.free = space.avail << BLOCK_SHIFT,
		.quarantined = space.quarantined << BLOCK_SHIFT,
		.recall_ms = fs->opt.recall_ms,
	};
	memcpy(out->uuid, fs->super.uuid, sizeof(out->uuid));
	snprintf(out->device, sizeof(out->device), "%s", fs->dev->path);
	call_reply(r, sizeof(*out));
}

static void call_handle(struct request *r, const void *arg)
{
	const struct extfs_ioc_handle *call = arg;
	struct extfs_ioc_handle *out;
	struct inode *in;
	int err = request_on_control(r) ? -EPERM : call_file(r, &call->file, false, &in);

	if (err) {
		request_fail(r, err);
		return;
	}
	out = call_room(r, sizeof(*out));
	*out = (struct extfs_ioc_handle){
		.size = sizeof(*out),
		.file = {.ino = in->ino, .generation = in->core.generation},
	};
	call_reply(r, sizeof(*out));
}

static void call_shutdown(struct request *r, const void *arg)
{
	const struct extfs_ioc_handle *call = arg;

	if (!all_zero(&call->file, sizeof(call->file))) {
		request_fail(r, -EINVAL);
		return;
	}
	fs_shutdown_writes(bridge_of(r)->fs, -ECANCELED, "shutdown asked for by process %u",
			   r->head.pid);
	call_room(r, 0);
	call_reply(r, 0);
}

static void call_events(struct request *r, const void *arg)
{
	struct extfs_ioc_events *out = call_room(r, sizeof(*out));

	out->size = sizeof(*out);
	out->count = open_events_take(call_open_file(r)->events, out->events, EXTFS_EVENTS_MAX);
	call_reply(r, offsetof(struct extfs_ioc_events, events[out->count]));
}

/* ---- MAP ---- */

/* What of [start, start + length) is asked for, in blocks; the map ends where files end. */
static void map_range(const struct extfs_ioc_map *call, fileblk_t *at, fileblk_t *end)
{
	uint64_t last;

	if (__builtin_add_overflow(call->start, call->length, &last))
		last = UINT64_MAX;
	*at = block_floor(call->start);
	*end = MIN(block_ceil(last), FILE_MAX_BLOCKS);
}

/* What covers file block `at`, cut to what one answer about sharing holds for. */
static int map_one(struct inode *in, fileblk_t at, fileblk_t end, struct extent *ext, bool *shared)
{
	nblocks_t run;
	int err = extmap_lookup(in, FORK_DATA, at, end - at, ext);

	*shared = false;
	if (err || ext->state != EXT_WRITTEN || !(in->core.flags & INODE_F_SHARED))
		return err;
	run = ext->len;
	err = extmap_is_shared(in, ext, shared, &run);
	ext->len = MIN(run, ext->len);
	return err;
}

static int map_fill(struct inode *in, fileblk_t at, fileblk_t end, struct extfs_ioc_map *map)
{
	uint32_t n = 0;

	while (at < end && n < EXTFS_IOC_MAP_EXTENTS) {
		struct extent ext;
		bool shared;
		int err = map_one(in, at, end, &ext, &shared);

		if (err)
			return err;
		xassert(ext.len > 0);
		at = ext.file + ext.len;
		if (ext.state == EXT_HOLE)
			continue;
		map->extents[n++] = (struct extfs_ioc_extent){
			.offset = ext.file << BLOCK_SHIFT,
			.physical = ext.block << BLOCK_SHIFT,
			.length = ext.len << BLOCK_SHIFT,
			.state = (uint32_t)ext.state,
			.flags = (shared ? EXTFS_IOC_EXT_SHARED : 0) |
				 (ext.flags & EXT_F_LAYOUT ? EXTFS_IOC_EXT_LAYOUT : 0),
		};
	}
	map->count = n;
	map->next = at < FILE_MAX_BLOCKS ? at << BLOCK_SHIFT : UINT64_MAX;
	return 0;
}

void call_map(struct request *r, const void *arg)
{
	const struct extfs_ioc_map *call = arg;
	struct extfs_ioc_map *out;
	struct inode *in;
	fileblk_t at, end;
	int err = call_file(r, &call->file, false, &in);

	if (!err && !inode_is_reg(in))
		err = -ENOTTY;
	if (!err && request_on_control(r))
		err = call_owner(r, in);
	if (err) {
		request_fail(r, err);
		return;
	}
	if (request_await_early(r, in))
		return;
	map_range(call, &at, &end);
	out = call_room(r, sizeof(*out));
	memcpy(out, call, offsetof(struct extfs_ioc_map, next));
	fs_rdlock(in->fs);
	out->file_size = in->core.size;
	out->generation = atomic_load(&in->map_gen);
	err = map_fill(in, at, end, out);
	fs_unlock(in->fs);
	if (err)
		request_fail(r, err);
	else
		call_reply(r, offsetof(struct extfs_ioc_map, extents[out->count]));
}

/* ---- the table ---- */

#define CALL_CONTROL 0x1u   /* on the control file only: -EPERM */
#define CALL_ROOT 0x2u      /* root only: -EPERM */
#define CALL_WRITES 0x4u    /* not on a read-only mount: -EROFS; nor with writeback_cache */

struct call_row {
	uint32_t len;            /* of the struct, without entries */
	uint32_t entry;          /* bytes of each; 0: there are none */
	uint32_t count;          /* offset of their number */
	uint32_t flags;          /* of the interface that are known */
	uint32_t reserved, reserved_len;
	uint32_t rules;          /* CALL_* */
	void (*serve)(struct request *r, const void *arg);
};

#define ROW(nr, type, known, what, handler)                                                     \
	[nr - CALL_FIRST] = {                                                                   \
		.len = sizeof(struct type), .flags = known, .rules = what, .serve = handler,    \
		.reserved = offsetof(struct type, reserved),                                    \
		.reserved_len = sizeof(((struct type *)0)->reserved),                           \
	}
#define ROW_OF(nr, type, entries, known, what, handler)                                         \
	[nr - CALL_FIRST] = {                                                                   \
		.len = offsetof(struct type, entries), .flags = known, .rules = what,           \
		.entry = sizeof(((struct type *)0)->entries[0]),                                \
		.count = offsetof(struct type, count), .serve = handler,                        \
		.reserved = offsetof(struct type, reserved),                                    \
		.reserved_len = sizeof(((struct type *)0)->reserved),                           \
	}
#define CALL_FIRST 0xe1u
#define CALL_COMMIT 0xe8u
#define GET_FLAGS (EXTFS_LAYOUT_WAIT | EXTFS_LAYOUT_RECALL | EXTFS_LAYOUT_ATOMIC)
#define COMMIT_FLAGS (EXTFS_COMMIT_LAZY | EXTFS_COMMIT_MTIME)
#define HOLDER_FLAGS (EXTFS_HOLDER_RESUME | EXTFS_HOLDER_CLIENT)
#define ROOT_CONTROL (CALL_ROOT | CALL_CONTROL)

/* clang-format off */
static const struct call_row calls[] = {
	ROW(0xe1, extfs_ioc_map, 0, 0, call_map),
	ROW(0xe2, extfs_ioc_info, 0, 0, call_info),
	ROW(0xe3, extfs_ioc_handle, 0, 0, call_handle),
	ROW(0xe4, extfs_ioc_holder, HOLDER_FLAGS, CALL_WRITES, call_holder_register),
	ROW(0xe5, extfs_ioc_holder, 0, CALL_WRITES, call_holder_gone),
	ROW(0xe6, extfs_ioc_holder, 0, CALL_WRITES | ROOT_CONTROL, call_fenced),
	ROW_OF(0xe7, extfs_ioc_layout, extents, GET_FLAGS, CALL_WRITES, call_layout_get),
	ROW_OF(CALL_COMMIT, extfs_ioc_commit, ranges, COMMIT_FLAGS, CALL_WRITES, call_layout_commit),
	ROW(0xe9, extfs_ioc_return, EXTFS_RETURN_ALL, CALL_WRITES, call_layout_return),
	ROW(0xea, extfs_ioc_recall, 0, CALL_WRITES, call_recall),
	ROW(0xeb, extfs_ioc_list, 0, CALL_WRITES, call_list),
	ROW(0xec, extfs_ioc_watch, EXTFS_WATCH_OFF, CALL_WRITES, call_watch),
	ROW(0xed, extfs_ioc_events, 0, 0, call_events),
	ROW(0xee, extfs_ioc_pair, 0, CALL_WRITES, call_exchange),
	ROW(0xef, extfs_ioc_pair, 0, CALL_WRITES, call_clone),
	ROW(0xf0, extfs_ioc_pair, 0, CALL_WRITES, call_dedupe),
	ROW(0xf1, extfs_ioc_shift, 0, CALL_WRITES, call_collapse),
	ROW(0xf2, extfs_ioc_shift, 0, CALL_WRITES, call_insert),
	ROW(0xf3, extfs_ioc_handle, 0, ROOT_CONTROL, call_shutdown),
	ROW(0xf4, extfs_ioc_event_socket, 0, 0, call_event_socket),
};
/* clang-format on */

/* 0, or what is wrong with the struct as such. */
static int check_struct(const struct call_row *row, const uint8_t *arg, size_t len)
{
	uint32_t head[2], count = 0; /* size, flags */

	if (len < row->len)
		return -EINVAL;
	memcpy(head, arg, sizeof(head));
	if (row->entry)
		memcpy(&count, arg + row->count, sizeof(count));
	if (head[0] != len || len != row->len + (uint64_t)count * row->entry)
		return -EINVAL;
	if (head[1] & ~row->flags || !all_zero(arg + row->reserved, row->reserved_len))
		return -EINVAL;
	return 0;
}

static int check_caller(const struct request *r, const struct call_row *row)
{
	const struct bridge *b = bridge_of(r);

	if ((row->rules & CALL_CONTROL) && !request_on_control(r))
		return -EPERM;
	if ((row->rules & CALL_ROOT) && r->head.uid)
		return -EPERM;
	if ((row->rules & CALL_WRITES) && (b->read_only || b->fs->read_only))
		return -EROFS;
	if ((row->rules & CALL_WRITES) && b->writeback_cache)
		return -EOPNOTSUPP;
	return 0;
}

static void serve_call(struct request *r, const struct call_row *row, const void *arg, size_t len)
{
	int err = check_struct(row, arg, len);

	if (!err)
		err = check_caller(r, row);
	if (err)
		request_fail(r, err);
	else
		row->serve(r, arg);
}

void serve_ioctl(struct request *r)
{
	const struct fuse_ioctl_in *in = r->arg;
	size_t len = MIN(in->in_size, r->arg_len - sizeof(*in));
	unsigned nr = _IOC_NR(in->cmd);

	if ((in->flags & (FUSE_IOCTL_COMPAT | FUSE_IOCTL_UNRESTRICTED)) ||
	    _IOC_TYPE(in->cmd) != 'X' || _IOC_DIR(in->cmd) != (_IOC_READ | _IOC_WRITE) ||
	    nr < CALL_FIRST || nr - CALL_FIRST >= ARRAY_LEN(calls))
		request_fail(r, -ENOTTY);
	else
		serve_call(r, &calls[nr - CALL_FIRST], in + 1, len);
}

void serve_control_write(struct request *r)
{
	const struct fuse_write_in *in = r->arg;

	if (in->size > r->arg_len - sizeof(*in))
		request_fail(r, -EINVAL);
	else
		serve_call(r, &calls[CALL_COMMIT - CALL_FIRST], in + 1, in->size);
}
