/* SPDX-License-Identifier: MIT
 *
 * rider.c - marks of the NFS server in transactions.
 *
 * Invariant: between rider_set(r) and rider_set(NULL) at most one transaction has written r; the
 * callers hand it over around calls that do one.
 */
#include "rider.h"

#include "btree.h"
#include "errors.h"
#include "fs.h"
#include "journal.h"

static _Thread_local struct rider *riding;

void rider_set(struct rider *r)
{
	riding = r;
	if (r)
		r->written = 0;
}

unsigned rider_blocks(void)
{
	return riding ? RIDER_BLOCKS : 0;
}

static void tell_place(struct rider_place_disk *place, const struct inode *in)
{
	place->after = put64(in->core.change);
	place->after_sec = put64((uint64_t)in->core.ctime.sec);
	place->after_ns = put32(in->core.ctime.nsec);
}

static void tell(struct rider_disk *record, const struct inode *object, const struct inode *from,
		 const struct inode *to)
{
	uint32_t count = get32(record->count);
	struct rider_mark_disk *mark;

	xassert(count > 0 && count <= RIDER_MARKS);
	mark = &record->marks[count - 1];
	mark->ino = put64(object->ino);
	mark->generation = put32(object->core.generation);
	tell_place(&mark->places[0], from);
	if (to)
		tell_place(&mark->places[1], to);
}

static int put(struct trans *t, const struct rider *r)
{
	struct tree tree = fs_tree(t->fs, TREE_NFS_CLIENT);
	int err = bt_update(t, tree, KEY(r->id, 0), &r->record, sizeof(r->record));

	if (err == -ENOENT)
		err = bt_insert(t, tree, KEY(r->id, 0), &r->record, sizeof(r->record));
	return err;
}

/* The mutant: durable, each by itself. */
static int end_apart(struct trans *t, struct rider *r)
{
	struct fs *fs = t->fs;
	int err = jrn_force_blocking(fs, trans_commit(t));

	if (!err)
		err = trans_begin(fs, t, RIDER_BLOCKS);
	if (err)
		return err;
	err = put(t, r);
	if (err)
		trans_cancel(t);
	else
		err = jrn_force_blocking(fs, trans_commit(t));
	r->written = !err;
	return err;
}

int rider_end(struct trans *t, int err, const struct inode *object, const struct inode *from,
	      const struct inode *to)
{
	struct rider *r = riding;

	if (!err && r) {
		xassert(!r->written);
		tell(&r->record, object, from, to);
		if (unlikely(t->fs->opt.mutant == MUTANT_RIDER_APART))
			return end_apart(t, r);
		err = put(t, r);
		r->written = !err;
	}
	if (err)
		trans_cancel(t);
	else
		trans_commit(t);
	return err;
}
