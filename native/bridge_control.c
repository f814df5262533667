/* SPDX-License-Identifier: MIT
 *
 * bridge_control.c - the inodes that exist in the mount only: /.extfs, /.extfs/control and
 * /.extfs/status.
 *
 * Everything that names them, by inode number or as ".extfs" in the root, is taken here before the
 * handlers that know only the core's inodes: their `fh` is not what those expect. Nobody can make,
 * remove, rename or change one. ".extfs" is not listed in the root.
 *
 * No answer here is ENOSYS, for which the kernel would stop to send that opcode for all files, but
 * that to POLL, where it is to stop.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "bridge_control.h"

#define RESERVED_NAME ".extfs"
/* A READ that Python answers: what its socket carries in one message. */
#define STATUS_READ_MAX (128u << 10)

static const struct virtual_inode {
	const char *name;
	uint32_t mode, nlink;
	uint64_t size;
} inodes[] = {
	[CONTROL_DIR] = {RESERVED_NAME, S_IFDIR | 0755, 2, 0},
	/* Not empty: only writes below the end of a file may run side by side. */
	[CONTROL_FILE] = {"control", S_IFREG | 0600, 1, BRIDGE_MAX_IO},
	[CONTROL_STATUS] = {"status", S_IFREG | 0444, 1, 0},
};

static struct bridge *bridge_of(const struct request *r) { return r->t->b; }
static uint64_t node_number(enum control_node node) { return CONTROL_FIRST_NODE + node; }

/* ---- attributes ---- */

static void stat_of(const struct request *r, enum control_node node, struct inode_stat *st)
{
	struct timestamp made = {.sec = bridge_of(r)->fs->super.created_sec};

	*st = (struct inode_stat){
		.ino = node_number(node),
		.core = {
			.generation = 1,
			.mode = inodes[node].mode,
			.nlink = inodes[node].nlink,
			.size = inodes[node].size,
			.atime = made, .mtime = made, .ctime = made, .btime = made,
		},
	};
}

static void reply_entry(struct request *r, enum control_node node)
{
	struct fuse_entry_out out;
	struct inode_stat st;

	stat_of(r, node, &st);
	bridge_entry(&st, &out);
	request_reply(r, &out, sizeof(out));
}

static void reply_attr(struct request *r, enum control_node node)
{
	struct fuse_attr_out out = {.attr_valid = BRIDGE_VALID_SECONDS};
	struct inode_stat st;

	stat_of(r, node, &st);
	bridge_attr(&st, &out.attr);
	request_reply(r, &out, sizeof(out));
}

static void reply_statx(struct request *r, enum control_node node)
{
	struct fuse_statx_out out = {.attr_valid = BRIDGE_VALID_SECONDS};
	struct inode_stat st;
	struct fuse_sx_time made;

	stat_of(r, node, &st);
	made = (struct fuse_sx_time){.tv_sec = st.core.ctime.sec};
	out.stat = (struct fuse_statx){
		.mask = STATX_BASIC_STATS | STATX_BTIME,
		.blksize = BLOCK_SIZE,
		.nlink = st.core.nlink,
		.mode = (uint16_t)st.core.mode,
		.ino = st.ino,
		.size = st.core.size,
		.atime = made, .btime = made, .ctime = made, .mtime = made,
	};
	request_reply(r, &out, sizeof(out));
}

/* ---- the directory ---- */

static void lookup(struct request *r, enum control_node node)
{
	size_t at = 0, len;
	const char *name = request_name(r, &at, &len);

	if (!name) {
		request_fail(r, -EINVAL);
	} else if (!strcmp(name, ".")) { /* a file handle being opened: the inode itself */
		reply_entry(r, node);
	} else if (node != CONTROL_DIR) {
		request_fail(r, -ENOTDIR);
	} else if (!strcmp(name, "..")) {
		int err = request_inode(r, bridge_of(r)->fs->super.root_inode, &r->inode);

		if (err)
			request_fail(r, err);
		else
			request_reply_entry(r, r->inode);
	} else if (!strcmp(name, inodes[CONTROL_FILE].name)) {
		reply_entry(r, CONTROL_FILE);
	} else if (!strcmp(name, inodes[CONTROL_STATUS].name)) {
		reply_entry(r, CONTROL_STATUS);
	} else {
		request_reply_negative(r);
	}
}

/* The offset of an entry is its place, from 1. With attributes asked for, the entries come without:
 * the kernel looks them up. */
static void readdir(struct request *r, bool plus)
{
	const struct { const char *name; uint64_t ino; uint32_t mode; } entries[] = {
		{".", node_number(CONTROL_DIR), S_IFDIR},
		{"..", bridge_of(r)->fs->super.root_inode, S_IFDIR},
		{inodes[CONTROL_FILE].name, node_number(CONTROL_FILE), S_IFREG},
		{inodes[CONTROL_STATUS].name, node_number(CONTROL_STATUS), S_IFREG},
	};
	const struct fuse_read_in *in = r->arg;
	size_t cap = MIN(in->size, BRIDGE_MAX_IO), len = 0;
	size_t head = plus ? sizeof(struct fuse_entry_out) : 0;

	for (uint64_t i = in->offset; i < ARRAY_LEN(entries); i++) {
		size_t name_len = strlen(entries[i].name);
		size_t need = FUSE_DIRENT_ALIGN(head + FUSE_NAME_OFFSET + name_len);
		struct fuse_dirent *d = (void *)(r->payload + len + head);

		if (need > cap - len)
			break;
		memset(r->payload + len, 0, need);
		d->ino = entries[i].ino;
		d->off = i + 1;
		d->namelen = (uint32_t)name_len;
		d->type = entries[i].mode >> 12;
		memcpy(d->name, entries[i].name, name_len);
		len += need;
	}
	request_reply_payload(r, len);
}

/* Requests that have the same answer for all of them; 1: not one of these. */
static int same_for_all(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_SETATTR:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_SYMLINK:
	case FUSE_LINK:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_CREATE:
	case FUSE_TMPFILE:
	case FUSE_SETXATTR:
	case FUSE_REMOVEXATTR:
		return -EPERM;
	case FUSE_GETXATTR:
		return -ENODATA;
	case FUSE_FALLOCATE:
		return -EOPNOTSUPP;
	case FUSE_LSEEK:
		return -ESPIPE;
	case FUSE_GETLK:
	case FUSE_SETLK:
	case FUSE_SETLKW:
		return -ENOLCK;
	case FUSE_POLL:
		return -ENOSYS;
	case FUSE_FSYNCDIR:
		return 0;
	case FUSE_IOCTL:
		return -ENOTTY;
	case FUSE_READ:
	case FUSE_WRITE:
	case FUSE_FSYNC:
	case FUSE_READLINK:
	case FUSE_COPY_FILE_RANGE:
	case FUSE_COPY_FILE_RANGE_64:
		return -EINVAL;
	default:
		return 1;
	}
}

static void list_no_xattrs(struct request *r)
{
	const struct fuse_getxattr_in *in = r->arg;
	struct fuse_getxattr_out out = {0};

	if (r->arg_len >= sizeof(*in) && in->size)
		request_reply_payload(r, 0);
	else
		request_reply(r, &out, sizeof(out));
}

static void serve_any(struct request *r, enum control_node node)
{
	int same = same_for_all(r->head.opcode);

	if (same <= 0) {
		request_fail(r, same);
		return;
	}
	switch (r->head.opcode) {
	case FUSE_LOOKUP: lookup(r, node); return;
	case FUSE_GETATTR: reply_attr(r, node); return;
	case FUSE_STATX: reply_statx(r, node); return;
	case FUSE_FORGET: request_end(r); return; /* they stay anyway: nobody counts */
	case FUSE_LISTXATTR: list_no_xattrs(r); return;
	case FUSE_STATFS: serve_statfs(r); return;
	default: request_fail(r, -EINVAL);
	}
}

static void serve_dir(struct request *r)
{
	struct fuse_open_out opened = {.open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR};

	switch (r->head.opcode) {
	case FUSE_OPENDIR: request_reply(r, &opened, sizeof(opened)); return;
	case FUSE_READDIR: readdir(r, false); return;
	case FUSE_READDIRPLUS: readdir(r, true); return;
	case FUSE_RELEASEDIR: request_fail(r, 0); return;
	default: serve_any(r, CONTROL_DIR);
	}
}

/* ---- control ---- */

/* An open control file stands for no inode; it holds the root's, so that it is an open file like
 * others. */
static void open_control(struct request *r)
{
	const struct fuse_open_in *in = r->arg;
	int err = request_inode(r, bridge_of(r)->fs->super.root_inode, &r->inode);

	if (err)
		request_fail(r, err);
	else
		request_reply_open(r, r->inode, in->flags,
				   FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE | FOPEN_STREAM |
					   FOPEN_PARALLEL_DIRECT_WRITES);
}

static void serve_control(struct request *r)
{
	switch (r->head.opcode) {
	case FUSE_OPEN: open_control(r); return;
	case FUSE_READ: serve_events_read(r); return;
	case FUSE_WRITE: serve_control_write(r); return;
	case FUSE_IOCTL: serve_ioctl(r); return;
	case FUSE_FLUSH: request_fail(r, 0); return;
	case FUSE_RELEASE: serve_release(r); return;
	default: serve_any(r, CONTROL_FILE);
	}
}

/* ---- status ---- */

static void serve_status(struct request *r)
{
	struct fuse_read_in *read = (void *)(uintptr_t)r->arg;

	switch (r->head.opcode) {
	case FUSE_READ:
		read->size = MIN(read->size, STATUS_READ_MAX);
		forward_send(r);
		return;
	case FUSE_OPEN:
	case FUSE_RELEASE:
	case FUSE_FLUSH: forward_send(r); return;
	default: serve_any(r, CONTROL_STATUS);
	}
}

/* ---- the name in the root ---- */

bool control_hides(const struct inode *dir, const char *name, size_t len)
{
	return dir->ino == dir->fs->super.root_inode && len == strlen(RESERVED_NAME) &&
	       !memcmp(name, RESERVED_NAME, len);
}

static bool is_reserved(struct request *r, uint64_t dir, size_t at)
{
	size_t len;
	const char *name;

	if (dir != bridge_of(r)->fs->super.root_inode)
		return false;
	name = request_name(r, &at, &len);
	return name && !strcmp(name, RESERVED_NAME);
}

/* Is the second name of a rename, or the file of a link, ours? */
static bool other_is_reserved(struct request *r)
{
	const struct fuse_rename_in *rename = r->arg;
	const struct fuse_rename2_in *rename2 = r->arg;
	const struct fuse_link_in *link = r->arg;
	const struct fuse_copy_file_range_in *copy = r->arg;
	size_t at = r->head.opcode == FUSE_RENAME ? sizeof(*rename) : sizeof(*rename2), len;
	uint64_t dir;

	switch (r->head.opcode) {
	case FUSE_RENAME:
	case FUSE_RENAME2:
		dir = r->head.opcode == FUSE_RENAME ? rename->newdir : rename2->newdir;
		return control_is_node(dir) ||
		       (request_name(r, &at, &len) && is_reserved(r, dir, at));
	case FUSE_LINK: return r->arg_len >= sizeof(*link) && control_is_node(link->oldnodeid);
	case FUSE_COPY_FILE_RANGE:
	case FUSE_COPY_FILE_RANGE_64: return control_is_node(copy->nodeid_out);
	default: return false;
	}
}

/* Where the arguments of the opcode have a name in the request's directory; SIZE_MAX: nowhere. */
static size_t name_at(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_LOOKUP:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_SYMLINK: return 0;
	case FUSE_MKNOD: return sizeof(struct fuse_mknod_in);
	case FUSE_MKDIR: return sizeof(struct fuse_mkdir_in);
	case FUSE_CREATE: return sizeof(struct fuse_create_in);
	case FUSE_LINK: return sizeof(struct fuse_link_in);
	case FUSE_RENAME: return sizeof(struct fuse_rename_in);
	case FUSE_RENAME2: return sizeof(struct fuse_rename2_in);
	default: return SIZE_MAX;
	}
}

/* A request that names the directory /.extfs. */
static void serve_name(struct request *r)
{
	switch (r->head.opcode) {
	case FUSE_LOOKUP: reply_entry(r, CONTROL_DIR); return;
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_CREATE:
	case FUSE_SYMLINK:
	case FUSE_LINK: request_fail(r, -EEXIST); return;
	default: request_fail(r, -EPERM);
	}
}

static void serve_node(struct request *r)
{
	switch (r->head.nodeid - CONTROL_FIRST_NODE) {
	case CONTROL_DIR: serve_dir(r); return;
	case CONTROL_FILE: serve_control(r); return;
	case CONTROL_STATUS: serve_status(r); return;
	default: request_fail(r, -ESTALE);
	}
}

bool control_serve(struct request *r)
{
	size_t at;

	if (unlikely(control_is_node(r->head.nodeid))) {
		serve_node(r);
		return true;
	}
	if (unlikely(other_is_reserved(r))) {
		request_fail(r, r->head.opcode == FUSE_COPY_FILE_RANGE ||
						r->head.opcode == FUSE_COPY_FILE_RANGE_64
					? -EINVAL
					: -EPERM);
		return true;
	}
	if (likely(r->head.nodeid != bridge_of(r)->fs->super.root_inode))
		return false;
	at = name_at(r->head.opcode);
	if (at == SIZE_MAX || at > r->arg_len || !is_reserved(r, r->head.nodeid, at))
		return false;
	serve_name(r);
	return true;
}
