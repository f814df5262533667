/* SPDX-License-Identifier: MIT
 *
 * nfs_record.c - records of the NFS server.
 */
#include "nfs_record.h"

#include <string.h>

#include "btree.h"
#include "errors.h"
#include "journal.h"
#include "log.h"
#include "trans.h"

#define PARTS_MAX (NFS_VALUE_MAX / NFS_PART_BYTES + 1)

/* Parts of one value are neighbours; at worst each of them lies in a leaf of its own, and each
 * leaf that is made or given back changes a block more (branch or free tree). One way down the
 * tree and one allocation for all of them. */
static unsigned blocks_for(unsigned parts)
{
	return 2 * parts + TRANS_TREE_OP + TRANS_ALLOC_OP;
}

static unsigned parts_of(size_t len)
{
	return (unsigned)(len / NFS_PART_BYTES) + 1;
}

static struct tree records(struct fs *fs)
{
	return fs_tree(fs, TREE_NFS_CLIENT);
}

static int damaged(uint64_t id, const char *what)
{
	log_msg(LOG_ERROR, "NFS record %llu: %s", (unsigned long long)id, what);
	return -ERR_RECORD_SHAPE;
}

/* How many parts there are. fs->lock held. */
static int count_parts(struct fs *fs, uint64_t id, unsigned *parts)
{
	struct bt_cursor c;
	int rc;

	*parts = 0;
	bt_cursor_init(&c, records(fs));
	rc = bt_seek(&c, KEY(id, UINT64_MAX), BT_LE);
	if (!rc && bt_key(&c).hi == id) {
		if (bt_key(&c).lo < PARTS_MAX)
			*parts = (unsigned)bt_key(&c).lo + 1;
		else
			rc = damaged(id, "impossible part");
	}
	bt_cursor_release(&c);
	return rc == -ENOENT ? 0 : rc;
}

struct putting {
	struct fs *fs;
	const struct nfs_record *put;
	unsigned n;
	const uint64_t *del;
	unsigned m;
};

static int check(const struct putting *p)
{
	uint64_t total = (uint64_t)p->n + p->m;

	if (total * blocks_for(1) > TRANS_MAX_BLOCKS)
		return -E2BIG;
	for (unsigned i = 0; i < total; i++) {
		uint64_t id = i < p->n ? p->put[i].id : p->del[i - p->n];

		if (i < p->n && p->put[i].len > NFS_VALUE_MAX)
			return -EINVAL;
		for (unsigned j = 0; j < i; j++)
			if (id == (j < p->n ? p->put[j].id : p->del[j - p->n]))
				return -EINVAL;
	}
	return 0;
}

/* What the transaction may change at most, as the tree is now. fs->lock held. */
static int reservation(const struct putting *p, unsigned *blocks)
{
	unsigned old;
	int rc = 0;

	*blocks = 0;
	for (unsigned i = 0; i < p->n && !rc; i++) {
		rc = count_parts(p->fs, p->put[i].id, &old);
		*blocks += blocks_for(MAX(parts_of(p->put[i].len), old));
	}
	for (unsigned i = 0; i < p->m && !rc; i++) {
		rc = count_parts(p->fs, p->del[i], &old);
		*blocks += old ? blocks_for(old) : 0;
	}
	return rc;
}

static int write_record(struct trans *t, const struct nfs_record *r)
{
	struct tree tree = records(t->fs);
	unsigned parts = parts_of(r->len), old;
	int rc = count_parts(t->fs, r->id, &old);

	for (unsigned part = 0; part < parts && !rc; part++) {
		size_t at = (size_t)part * NFS_PART_BYTES;
		unsigned len = (unsigned)MIN(r->len - at, (size_t)NFS_PART_BYTES);
		const void *bytes = len ? (const uint8_t *)r->value + at : (const void *)"";

		rc = part < old ? bt_update(t, tree, KEY(r->id, part), bytes, len) :
				  bt_insert(t, tree, KEY(r->id, part), bytes, len);
	}
	for (unsigned part = parts; part < old && !rc; part++)
		rc = bt_delete(t, tree, KEY(r->id, part));
	return rc;
}

static int delete_record(struct trans *t, uint64_t id)
{
	unsigned old;
	int rc = count_parts(t->fs, id, &old);

	for (unsigned part = 0; part < old && !rc; part++)
		rc = bt_delete(t, records(t->fs), KEY(id, part));
	return rc;
}

static int change(struct trans *t, const struct putting *p)
{
	int rc = 0;

	for (unsigned i = 0; i < p->m && !rc; i++)
		rc = delete_record(t, p->del[i]);
	for (unsigned i = 0; i < p->n && !rc; i++)
		rc = write_record(t, &p->put[i]);
	/* A part that is missing in the middle. */
	return rc == -ENOENT || rc == -EEXIST ? -ERR_RECORD_SHAPE : rc;
}

/* *again: what was counted before the transaction is no longer true. */
static int put_once(const struct putting *p, xid_t *xid, bool *again)
{
	unsigned blocks, now;
	struct trans t;
	int rc;

	*again = false;
	fs_rdlock(p->fs);
	rc = reservation(p, &blocks);
	fs_unlock(p->fs);
	if (!rc && blocks > TRANS_MAX_BLOCKS)
		rc = -E2BIG;
	if (!rc)
		rc = trans_begin(p->fs, &t, MAX(blocks, 1u));
	if (rc)
		return rc;
	rc = reservation(p, &now);
	*again = !rc && now > blocks;
	if (!rc && !*again)
		rc = change(&t, p);
	if (rc || *again)
		trans_cancel(&t);
	else
		*xid = trans_commit(&t);
	return rc;
}

int nfs_record_put(struct fs *fs, const struct nfs_record *put, unsigned n, const uint64_t *del,
		   unsigned m, xid_t *xid)
{
	struct putting p = { fs, put, n, del, m };
	bool again;
	int rc = check(&p);

	*xid = 0;
	if (rc || !(n + m))
		return rc;
	do {
		rc = put_once(&p, xid, &again);
	} while (again);
	return rc;
}

/* All parts of *id, where the cursor stands on the first one. */
static ssize_t gather(struct bt_cursor *c, uint64_t id, uint8_t *value, size_t cap)
{
	size_t done = 0;
	unsigned len = NFS_PART_BYTES;
	int rc = 0;

	for (unsigned part = 0; len == NFS_PART_BYTES; part++) {
		const void *bytes;

		if (rc || bt_key(c).hi != id || bt_key(c).lo != part)
			return rc && rc != -ENOENT ? rc : damaged(id, "a part is missing");
		bytes = bt_record(c, &len);
		if (len > NFS_PART_BYTES || done + len > NFS_VALUE_MAX)
			return damaged(id, "a part is too long");
		if (cap && done + len > cap)
			return -ERANGE;
		if (cap && len)
			memcpy(value + done, bytes, len);
		done += len;
		rc = bt_next(c);
	}
	if (rc && rc != -ENOENT)
		return rc;
	if (!rc && bt_key(c).hi == id)
		return damaged(id, "a part behind the last one");
	return (ssize_t)done;
}

ssize_t nfs_record_next(struct fs *fs, uint64_t *id, void *value, size_t cap)
{
	struct bt_cursor c;
	ssize_t res;

	fs_rdlock(fs);
	bt_cursor_init(&c, records(fs));
	res = bt_seek(&c, KEY(*id, 0), BT_GE);
	if (!res) {
		*id = bt_key(&c).hi;
		res = gather(&c, *id, value, cap);
	}
	bt_cursor_release(&c);
	fs_unlock(fs);
	return res;
}
