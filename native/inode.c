/* SPDX-License-Identifier: MIT
 *
 * inode.c - inode records, times and their lazy writing.
 *
 * Lazy: `core` differs from the record in times and `change` only. A crash may lose that and
 * nothing else. Invariants:
 *  1. a change of anything else is followed by inode_write() in the same transaction;
 *  2. in->lazy is set under inode->lock with fs->lock shared, cleared with fs->lock exclusive, so
 *     while a transaction is open nobody makes an inode lazy;
 *  3. a lazy inode stays in memory until it has been written (inode_table.c).
 */
#include "inode.h"

#include <string.h>
#include <time.h>

#include "alloc.h"
#include "btree.h"
#include "errors.h"
#include "inode_table.h"
#include "journal.h"

/* ---- record ---- */

static struct timestamp decode_time(le64_t sec, le32_t nsec)
{
	return (struct timestamp){(int64_t)get64(sec), get32(nsec)};
}

void inode_decode(const struct inode_disk *d, struct inode_core *core)
{
	*core = (struct inode_core){
		.generation = get32(d->generation),
		.mode = get32(d->mode),
		.uid = get32(d->uid),
		.gid = get32(d->gid),
		.nlink = get32(d->nlink),
		.flags = get32(d->flags),
		.size = get64(d->size),
		.blocks = get64(d->blocks),
		.atime = decode_time(d->atime, d->atime_ns),
		.mtime = decode_time(d->mtime, d->mtime_ns),
		.ctime = decode_time(d->ctime, d->ctime_ns),
		.btime = decode_time(d->btime, d->btime_ns),
		.rdev = get64(d->rdev),
		.parent = get64(d->parent),
		.change = get64(d->change),
		.subdirs = get32(d->subdirs),
		.xattrs = get32(d->xattrs),
	};
}

void inode_encode(const struct inode_core *core, struct inode_disk *d)
{
	*d = (struct inode_disk){
		.generation = put32(core->generation),
		.mode = put32(core->mode),
		.uid = put32(core->uid),
		.gid = put32(core->gid),
		.nlink = put32(core->nlink),
		.flags = put32(core->flags),
		.size = put64(core->size),
		.blocks = put64(core->blocks),
		.atime = put64((uint64_t)core->atime.sec),
		.mtime = put64((uint64_t)core->mtime.sec),
		.ctime = put64((uint64_t)core->ctime.sec),
		.btime = put64((uint64_t)core->btime.sec),
		.atime_ns = put32(core->atime.nsec),
		.mtime_ns = put32(core->mtime.nsec),
		.ctime_ns = put32(core->ctime.nsec),
		.btime_ns = put32(core->btime.nsec),
		.rdev = put64(core->rdev),
		.parent = put64(core->parent),
		.change = put64(core->change),
		.subdirs = put32(core->subdirs),
		.xattrs = put32(core->xattrs),
	};
}

static void on_create_end(void *arg, xid_t xid)
{
	struct inode *in = arg;

	if (xid == 0)
		inode_table_withdraw(in);
	in->xid = xid;
}

int inode_create(struct trans *t, uint32_t mode, uint32_t uid, uint32_t gid, uint64_t rdev,
		 inum_t parent, uint32_t nlink, struct inode **out)
{
	struct fs *fs = t->fs;
	struct root_disk *root = fs_root(fs);
	struct timestamp now = time_now();
	struct inode_disk d;
	struct inode *in;
	int err = trans_join(t, fs->root);

	*out = NULL;
	if (err)
		return err;
	in = inode_alloc(fs, get64(root->next_inode));
	if (!in)
		return -ENOMEM;
	in->core = (struct inode_core){
		.generation = get32(root->next_generation),
		.mode = mode,
		.uid = uid,
		.gid = gid,
		.nlink = nlink,
		.atime = now, .mtime = now, .ctime = now, .btime = now,
		.rdev = rdev,
		.parent = parent,
		.change = 1,
	};
	in->tail_zero = true; /* there is no tail */
	err = trans_on_end(t, on_create_end, in);
	if (err) {
		inode_free(in);
		return err;
	}
	/* From here on a cancel withdraws it, and the caller's inode_put() after that frees it. */
	pthread_mutex_lock(&fs->inodes->mutex);
	inode_table_insert(fs->inodes, in);
	pthread_mutex_unlock(&fs->inodes->mutex);
	root->next_inode = put64(in->ino + 1);
	root->next_generation = put32(in->core.generation + 1);
	root->inodes = put64(get64(root->inodes) + 1);
	inode_encode(&in->core, &d);
	*out = in;
	err = bt_insert(t, fs_tree(fs, TREE_INODE), KEY(in->ino, 0), &d, sizeof(d));
	return err ? err : trans_join_inode(t, in);
}

/* Somebody who is no early write has set the size: those before him set no limit any more. */
static void note_size_set(struct inode *in)
{
	pthread_mutex_lock(&in->lock);
	if (in->core.size != in->early_size) {
		in->early_size = in->core.size;
		in->early_limit = UINT64_MAX;
		in->early_epoch++;
	}
	pthread_mutex_unlock(&in->lock);
}

static void on_write_end(void *arg, xid_t xid)
{
	struct inode *in = arg;

	if (xid == 0)
		return;
	in->xid = xid;
	if (unlikely(atomic_load_explicit(&in->early_n, memory_order_relaxed)))
		note_size_set(in);
}

static void on_lazy_write_end(void *arg, xid_t xid)
{
	struct inode *in = arg;

	if (xid == 0 && !in->deleted)
		inode_table_set_lazy(in, true);
}

/* Writes are under way that have their answers. */
static uint64_t size_on_disk(struct inode *in)
{
	uint64_t size;

	pthread_mutex_lock(&in->lock);
	size = in->core.size == in->early_size ? MIN(in->core.size, in->early_limit) : in->core.size;
	pthread_mutex_unlock(&in->lock);
	return size;
}

int inode_write(struct trans *t, struct inode *in)
{
	struct bt_cursor c;
	struct inode_disk d;
	int err;

	xassert(!in->deleted);
	err = trans_on_end(t, on_write_end, in);
	if (err)
		return err;
	if (in->lazy) {
		err = trans_on_end(t, on_lazy_write_end, in);
		if (err)
			return err;
		inode_table_set_lazy(in, false);
	}
	inode_encode(&in->core, &d);
	if (unlikely(atomic_load_explicit(&in->early_n, memory_order_relaxed)))
		d.size = put64(size_on_disk(in));
	bt_cursor_init(&c, fs_tree(in->fs, TREE_INODE));
	err = bt_seek(&c, KEY(in->ino, 0), BT_EQ);
	if (!err)
		err = bt_overwrite(t, &c, &d, sizeof(d));
	bt_cursor_release(&c);
	return err;
}

int inode_orphan_add(struct trans *t, struct inode *in)
{
	struct orphan_disk d = {.since = put64((uint64_t)time_now().sec)};

	xassert(in->core.nlink == 0);
	return bt_insert(t, fs_tree(t->fs, TREE_ORPHAN), KEY(in->ino, 0), &d, sizeof(d));
}

int inode_orphan_del(struct trans *t, struct inode *in)
{
	return bt_delete(t, fs_tree(t->fs, TREE_ORPHAN), KEY(in->ino, 0));
}

static void on_delete_end(void *arg, xid_t xid)
{
	if (xid != 0)
		inode_table_withdraw(arg);
}

int inode_delete(struct trans *t, struct inode *in)
{
	struct root_disk *root = fs_root(t->fs);
	int err = trans_join(t, t->fs->root);

	xassert(in->core.nlink == 0 && in->core.xattrs == 0);
	if (!err)
		err = bt_delete(t, fs_tree(t->fs, TREE_INODE), KEY(in->ino, 0));
	if (!err)
		err = inode_orphan_del(t, in);
	if (!err)
		err = trans_on_end(t, on_delete_end, in);
	if (err)
		return err;
	if (get64(root->inodes) == 0) {
		fs_shutdown_writes(t->fs, -ERR_RECORD_SHAPE, "more inodes than are counted");
		return -ERR_RECORD_SHAPE;
	}
	root->inodes = put64(get64(root->inodes) - 1);
	return 0;
}

/* ---- times ---- */

#define NSEC_PER_SEC 1000000000

/* The newest time answered, in ns since 1970. A clock that is set back takes it along. */
static _Atomic int64_t newest;

static struct timestamp not_before(clockid_t clock)
{
	int64_t seen = atomic_load_explicit(&newest, memory_order_relaxed), now;
	struct timespec ts;

	clock_gettime(clock, &ts);
	now = (int64_t)ts.tv_sec * NSEC_PER_SEC + ts.tv_nsec;
	while (now > seen || seen - now > NSEC_PER_SEC)
		if (atomic_compare_exchange_weak(&newest, &seen, now))
			seen = now;
	return (struct timestamp){seen / NSEC_PER_SEC, (uint32_t)(seen % NSEC_PER_SEC)};
}

struct timestamp time_now(void)
{
	return not_before(CLOCK_REALTIME);
}

struct timestamp time_coarse(void)
{
	return not_before(CLOCK_REALTIME_COARSE);
}

static void touch(struct inode *in, unsigned what, struct timestamp now)
{
	if (what & TOUCH_ATIME)
		in->core.atime = now;
	if (what & TOUCH_MTIME)
		in->core.mtime = now;
	if (what & TOUCH_CTIME)
		in->core.ctime = now;
	if (what & (TOUCH_MTIME | TOUCH_CTIME))
		in->core.change++;
}

void inode_touch(struct inode *in, unsigned what)
{
	touch(in, what, time_now());
}

static bool same_time(struct timestamp a, struct timestamp b)
{
	return a.sec == b.sec && a.nsec == b.nsec;
}

/* Would the inode look the same afterwards, but for `change`? */
static bool touched_at(const struct inode_core *core, unsigned what, struct timestamp now)
{
	return (!(what & TOUCH_ATIME) || same_time(core->atime, now)) &&
	       (!(what & TOUCH_MTIME) || same_time(core->mtime, now)) &&
	       (!(what & TOUCH_CTIME) || same_time(core->ctime, now));
}

void inode_touch_lazy(struct inode *in, unsigned what)
{
	struct timestamp now;

	if (in->fs->read_only || fs_is_shutdown(in->fs))
		return;
	pthread_mutex_lock(&in->lock);
	now = atomic_load(&in->told) ? time_now() : time_coarse();
	if (!in->deleted && (atomic_load(&in->told) || !touched_at(&in->core, what, now))) {
		touch(in, what, now);
		atomic_store(&in->told, false);
		if (!in->lazy) {
			inode_table_set_lazy(in, true);
			jrn_note_lazy(in->fs); /* the next timed commit writes it */
		}
	}
	pthread_mutex_unlock(&in->lock);
}

/* a not later than b */
static bool time_not_after(struct timestamp a, struct timestamp b)
{
	return a.sec < b.sec || (a.sec == b.sec && a.nsec <= b.nsec);
}

#define RELATIME_SEC (24 * 60 * 60)

bool inode_wants_atime(const struct inode *in)
{
	pthread_mutex_t *lock = (pthread_mutex_t *)&in->lock;
	struct timestamp atime, mtime, ctime;

	if (in->fs->read_only || in->fs->opt.atime == ATIME_NONE)
		return false;
	if (in->fs->opt.atime == ATIME_STRICT)
		return true;
	pthread_mutex_lock(lock);
	atime = in->core.atime;
	mtime = in->core.mtime;
	ctime = in->core.ctime;
	pthread_mutex_unlock(lock);
	if (time_not_after(atime, mtime) || time_not_after(atime, ctime))
		return true;
	return time_now().sec - atime.sec >= RELATIME_SEC;
}

/* ---- lazy writing ---- */

#define LAZY_BATCH 32u
/* Overwriting a record in place changes its leaf and nothing else: one block for each inode. */
#define LAZY_TRANS_BLOCKS(n) (n)

/* One transaction for the given inodes; those that a transaction has written meanwhile are passed
 * over. */
static int write_lazy(struct fs *fs, struct inode **in, unsigned n)
{
	struct trans t;
	int err = trans_begin(fs, &t, LAZY_TRANS_BLOCKS(n));

	if (err)
		return err;
	for (unsigned i = 0; i < n && !err; i++) {
		if (!in[i]->lazy)
			continue;
		err = trans_join_inode(&t, in[i]);
		if (!err)
			err = inode_write(&t, in[i]);
	}
	if (err)
		trans_cancel(&t);
	else
		trans_commit(&t);
	return err;
}

int inode_flush_lazy(struct fs *fs, unsigned max)
{
	struct inode *batch[LAZY_BATCH];
	struct inode_stats st;
	unsigned n;
	int err = 0;

	while (max > 0 && !err) {
		n = inode_table_oldest_lazy(fs->inodes, batch, MIN(max, LAZY_BATCH));
		if (n == 0)
			break;
		max -= n;
		err = write_lazy(fs, batch, n);
		for (unsigned i = 0; i < n; i++)
			inode_put(batch[i]);
	}
	if (err)
		return err;
	inode_get_stats(fs, &st);
	return (int)MIN(st.lazy, (uint64_t)INT32_MAX);
}

int inode_flush_lazy_one(struct inode *in)
{
	bool lazy;

	fs_rdlock(in->fs);
	pthread_mutex_lock(&in->lock);
	lazy = in->lazy;
	pthread_mutex_unlock(&in->lock);
	fs_unlock(in->fs);
	return lazy ? write_lazy(in->fs, &in, 1) : 0;
}
