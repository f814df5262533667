/* SPDX-License-Identifier: MIT
 *
 * bridge_dir.c - directories: OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR.
 *
 * An open directory has no position: the offset of an entry is its cookie, which never changes
 * while the entry lives, so a reading goes on at the right place whatever came and went in between.
 * 1 and 2 are the offsets of "." and ".."; cookies of names start above.
 *
 * What the kernel keeps: with FOPEN_CACHE_DIR it copies every entry into the page cache as it reads
 * them, which costs as much again as the reading, and pays only if the same listing is read again.
 * So the first reading of a directory is without; one that is opened again as it was when it was
 * last read to its end is likely to be read often. The kernel drops its copy when names change
 * through the mount, at an INVAL_ENTRY and at an INVAL_INODE.
 *
 * READDIRPLUS collects entries under fs->lock held shared, then their inodes, still under it; an
 * entry that the answer cannot carry with attributes (its inode is damaged) is sent without, and
 * the kernel looks it up and gets the error.
 */
#include <string.h>
#include <sys/stat.h>

#include "bridge_control.h"

enum { OFFSET_DOT = 1, OFFSET_DOTDOT = 2 };

static uint64_t version_of(struct inode *dir)
{
	uint64_t version;

	fs_rdlock(dir->fs);
	version = dir->core.change;
	fs_unlock(dir->fs);
	return version;
}

/* Open files mutex held. Directories that share a slot push each other out. */
static struct listed *listed_slot(struct bridge *b, inum_t ino)
{
	return &b->listed[ino % BRIDGE_LISTED];
}

static bool was_listed(struct bridge *b, struct inode *dir)
{
	uint64_t version = version_of(dir);
	const struct listed *last;
	bool same;

	pthread_mutex_lock(&b->open_mutex);
	last = listed_slot(b, dir->ino);
	same = last->ino == dir->ino && last->version == version;
	pthread_mutex_unlock(&b->open_mutex);
	return same;
}

static void listed_to_its_end(struct bridge *b, struct inode *dir)
{
	struct listed now = {dir->ino, version_of(dir)};

	pthread_mutex_lock(&b->open_mutex);
	*listed_slot(b, dir->ino) = now;
	pthread_mutex_unlock(&b->open_mutex);
}

void serve_opendir(struct request *r)
{
	const struct fuse_open_in *in = r->arg;
	uint32_t keep = FOPEN_KEEP_CACHE;
	int err = request_inode(r, r->head.nodeid, &r->inode);

	if (!err && !inode_is_dir(r->inode))
		err = -ENOTDIR;
	if (err) {
		request_fail(r, err);
		return;
	}
	if (was_listed(r->t->b, r->inode))
		keep |= FOPEN_CACHE_DIR;
	request_reply_open(r, r->inode, in->flags, keep);
}

void serve_releasedir(struct request *r)
{
	const struct fuse_release_in *in = r->arg;

	open_file_close(r->t->b, open_file_of(in->fh));
	request_fail(r, 0);
}

/* An answer under construction. */
struct listing {
	struct inode *dir;
	uint8_t *out;
	size_t cap, len;
	bool plus;
};

/* Place for one entry, to be filled but for the padding at its end; NULL: full. */
static struct fuse_dirent *listing_place(struct listing *l, size_t name_len,
					 struct fuse_entry_out **entry)
{
	size_t head = l->plus ? sizeof(struct fuse_entry_out) : 0;
	size_t need = FUSE_DIRENT_ALIGN(head + FUSE_NAME_OFFSET + name_len);
	uint8_t *at = l->out + l->len;

	if (need > l->cap - l->len)
		return NULL;
	memset(at + need - 8, 0, 8);
	l->len += need;
	*entry = l->plus ? (void *)at : NULL;
	return (void *)(at + head);
}

/* Attributes of a listed entry; fs->lock held shared. An entry_out of zeros means "look it up
 * yourself". */
static void fill_entry(struct fs *fs, inum_t ino, struct fuse_entry_out *entry)
{
	struct inode_stat st;

	st.ino = ino;
	if (inode_peek(fs, ino, &st.core)) {
		*entry = (struct fuse_entry_out){0};
		return;
	}
	bridge_entry(&st, entry);
	if (delegation_of_number(fs, ino))
		entry->attr_valid = 0;
	inode_lookup_add(fs, ino, 1);
}

static int add_entry(void *arg, const struct dirent_view *ent)
{
	struct listing *l = arg;
	struct fuse_entry_out *entry;
	struct fuse_dirent *d;

	if (control_hides(l->dir, ent->name, ent->name_len))
		return 0;
	d = listing_place(l, ent->name_len, &entry);
	if (!d)
		return 1;
	*d = (struct fuse_dirent){
		.ino = ent->ino,
		.off = ent->cookie,
		.namelen = ent->name_len,
		.type = ent->type,
	};
	memcpy(d->name, ent->name, ent->name_len);
	if (entry)
		fill_entry(l->dir->fs, ent->ino, entry);
	return 0;
}

/* "." and ".." carry no lookup, so no attributes either. */
static bool add_dot(struct listing *l, inum_t ino, uint64_t offset)
{
	struct fuse_entry_out *entry;
	struct fuse_dirent *d = listing_place(l, (size_t)offset, &entry);

	if (!d)
		return false;
	*d = (struct fuse_dirent){
		.ino = ino,
		.off = offset,
		.namelen = (uint32_t)offset,
		.type = S_IFDIR >> 12,
	};
	memcpy(d->name, "..", (size_t)offset);
	if (entry)
		*entry = (struct fuse_entry_out){0};
	return true;
}

static int list(struct listing *l, uint64_t after)
{
	struct fs *fs = l->dir->fs;
	int err = 0;

	fs_rdlock(fs);
	if ((after >= OFFSET_DOT || add_dot(l, l->dir->ino, OFFSET_DOT)) &&
	    (after >= OFFSET_DOTDOT || add_dot(l, l->dir->core.parent, OFFSET_DOTDOT)))
		err = dir_iterate(l->dir, MAX(after, OFFSET_DOTDOT), add_entry, l);
	fs_unlock(fs);
	return MIN(err, 0);
}

/* Take back the lookups of an answer that did not arrive. */
static void forget_listing(struct fs *fs, const struct listing *l)
{
	size_t at = 0;

	while (l->plus && at < l->len) {
		const struct fuse_direntplus *d = (const void *)(l->out + at);

		if (d->entry_out.nodeid)
			inode_lookup_forget(fs, d->entry_out.nodeid, 1);
		at += FUSE_DIRENTPLUS_SIZE(d);
	}
}

static void touch_atime(struct inode *dir)
{
	struct fs *fs = dir->fs;

	if (fs->read_only || fs_is_shutdown(fs))
		return;
	fs_rdlock(fs);
	if (inode_wants_atime(dir))
		inode_touch_lazy(dir, TOUCH_ATIME);
	fs_unlock(fs);
}

static void read_directory(struct request *r, bool plus)
{
	const struct fuse_read_in *in = r->arg;
	struct fs *fs = r->t->b->fs;
	struct listing l = {
		.dir = open_file_of(in->fh)->in,
		.out = r->payload,
		.cap = MIN(in->size, BRIDGE_MAX_IO),
		.plus = plus,
	};
	int err = list(&l, in->offset);

	/* A removed directory is empty. */
	if (err == -ENOENT)
		err = 0;
	if (err) {
		forget_listing(fs, &l);
		request_fail(r, err);
		return;
	}
	touch_atime(l.dir);
	if (!l.len && in->offset)
		listed_to_its_end(r->t->b, l.dir);
	if (!request_send_payload(r, l.len))
		forget_listing(fs, &l);
	request_end(r);
}

void serve_readdir(struct request *r)
{
	read_directory(r, false);
}

void serve_readdirplus(struct request *r)
{
	read_directory(r, true);
}

void serve_fsyncdir(struct request *r)
{
	const struct fuse_fsync_in *in = r->arg;
	struct inode *dir = open_file_of(in->fh)->in;
	int err;

	/* The times of a directory that is only read are lazy; its names never are. */
	if (!(in->fsync_flags & FUSE_FSYNC_FDATASYNC)) {
		err = dir->fs->read_only ? 0 : inode_flush_lazy_one(dir);
		if (err) {
			request_fail(r, err);
			return;
		}
	}
	if (!request_park(r, WAIT_JOURNAL))
		return;
	fs_rdlock(dir->fs);
	r->wait = (struct jrn_waiter){.op = &r->op, .xid = dir->xid};
	fs_unlock(dir->fs);
	err = r->wait.xid ? jrn_force(dir->fs, &r->wait) : 0;
	if (err == ERR_PARKED) {
		r->t->parked++;
		return;
	}
	request_unpark(r);
	request_fail(r, err);
}
