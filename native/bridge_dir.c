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

uint64_t listing_version(struct inode *dir)
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
	uint64_t version = listing_version(dir);
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
	struct listed now = {dir->ino, listing_version(dir)};

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
struct filling {
	struct inode *dir;
	struct listing l;
	bool plus;
};

/* Place for one entry, to be filled but for the padding at its end; NULL: full. */
static struct fuse_dirent *place(struct filling *f, size_t name_len, struct fuse_entry_out **entry)
{
	size_t head = f->plus ? sizeof(struct fuse_entry_out) : 0;
	size_t need = FUSE_DIRENT_ALIGN(head + FUSE_NAME_OFFSET + name_len);
	uint8_t *at = f->l.data + f->l.len;

	if (need > f->l.cap - f->l.len)
		return NULL;
	memset(at + need - 8, 0, 8);
	f->l.len += need;
	*entry = f->plus ? (void *)at : NULL;
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
	struct filling *f = arg;
	struct fuse_entry_out *entry;
	struct fuse_dirent *d;

	if (control_hides(f->dir, ent->name, ent->name_len))
		return 0;
	d = place(f, ent->name_len, &entry);
	if (!d)
		return 1;
	*d = (struct fuse_dirent){
		.ino = ent->ino,
		.off = ent->cookie,
		.namelen = ent->name_len,
		.type = ent->type,
	};
	memcpy(d->name, ent->name, ent->name_len);
	f->l.last = ent->cookie;
	if (entry)
		fill_entry(f->dir->fs, ent->ino, entry);
	return 0;
}

/* "." and ".." carry no lookup, so no attributes either. */
static bool add_dot(struct filling *f, inum_t ino, uint64_t offset)
{
	struct fuse_entry_out *entry;
	struct fuse_dirent *d = place(f, (size_t)offset, &entry);

	if (!d)
		return false;
	*d = (struct fuse_dirent){
		.ino = ino,
		.off = offset,
		.namelen = (uint32_t)offset,
		.type = S_IFDIR >> 12,
	};
	memcpy(d->name, "..", (size_t)offset);
	f->l.last = offset;
	if (entry)
		*entry = (struct fuse_entry_out){0};
	return true;
}

/* *version: of the directory, then. A removed directory is empty. */
static int fill(struct filling *f, uint64_t after, uint64_t *version)
{
	struct fs *fs = f->dir->fs;
	uint64_t misses = buf_thread_misses;
	int err = 0;

	fs_rdlock(fs);
	*version = f->dir->core.change;
	if ((after >= OFFSET_DOT || add_dot(f, f->dir->ino, OFFSET_DOT)) &&
	    (after >= OFFSET_DOTDOT || add_dot(f, f->dir->core.parent, OFFSET_DOTDOT)))
		err = dir_iterate(f->dir, MAX(after, OFFSET_DOTDOT), add_entry, f);
	fs_unlock(fs);
	f->l.cold = buf_thread_misses != misses;
	if (err == -ENOENT || (err < 0 && f->l.len)) /* the next one, which begins with what is damaged, fails */
		return 0;
	return MIN(err, 0);
}

int listing_make(struct inode *dir, uint64_t after, struct listing *out, uint64_t *version)
{
	struct filling f = {.dir = dir, .l = {.data = out->data, .cap = out->cap}};
	int err = fill(&f, after, version);

	*out = f.l;
	return err;
}

/* Take back the lookups of an answer that did not arrive. */
static void forget_listing(struct fs *fs, const struct filling *f)
{
	size_t at = 0;

	while (f->plus && at < f->l.len) {
		const struct fuse_direntplus *d = (const void *)(f->l.data + at);

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

/* Names only: made ahead, or now. *here: may this thread make the next (bridge_ahead.h)? Whether it will. */
static int list_names(struct bridge *b, struct filling *f, uint64_t after, bool *here)
{
	uint64_t version;
	int err = 0;

	if (!ahead_take(b->ahead, f->dir, after, &f->l))
		err = fill(f, after, &version);
	if (err)
		return err;
	/* The kernel asks for the first with attributes, so after these there is more than one answer. */
	*here = ahead_expect(b->ahead, f->dir, &f->l, *here && !f->l.cold);
	return 0;
}

static void read_directory(struct request *r, bool plus)
{
	const struct fuse_read_in *in = r->arg;
	struct bridge *b = r->t->b;
	struct filling f = {
		.dir = open_file_of(in->fh)->in,
		.l = {.data = r->payload, .cap = MIN(in->size, BRIDGE_MAX_IO)},
		.plus = plus,
	};
	uint64_t version, after = in->offset;
	bool here = !plus && !r->queue;
	int err = plus ? fill(&f, after, &version) : list_names(b, &f, after, &here);

	if (err) {
		forget_listing(b->fs, &f);
		request_fail(r, err);
		return;
	}
	touch_atime(f.dir);
	if (!f.l.len && after)
		listed_to_its_end(b, f.dir);
	if (!request_send_payload(r, f.l.len))
		forget_listing(b->fs, &f);
	request_end(r);
	if (here)
		ahead_make(b->ahead);
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
