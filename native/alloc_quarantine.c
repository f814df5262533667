/* SPDX-License-Identifier: MIT
 *
 * alloc_quarantine.c - blocks that left the map of a file while a holder may still write them.
 *
 * TREE_QUARANTINE has a record (first block, 0) -> length, holder, group for each run. Runs never
 * overlap; they are not merged, because each names its holder. They are not free space, and survive
 * a restart.
 */
#include "alloc_priv.h"
#include "errors.h"
#include "journal.h"

static struct tree quarantine(struct fs *fs) { return fs_tree(fs, TREE_QUARANTINE); }

static int overlap(struct fs *fs, fsblock_t start, nblocks_t len)
{
	fs_shutdown_writes(fs, -ERR_FREE_CORRUPT, "quarantine: blocks %llu + %llu contradict it",
			   (unsigned long long)start, (unsigned long long)len);
	return -ERR_FREE_CORRUPT;
}

/* Last run that begins below `end`, whole. -ENOENT. */
static int run_below(struct fs *fs, fsblock_t end, fsblock_t *start, struct quarantine_disk *rec)
{
	struct bt_cursor c;
	unsigned len;
	int err;

	bt_cursor_init(&c, quarantine(fs));
	err = bt_seek(&c, KEY(end, 0), BT_LT);
	if (!err) {
		const struct quarantine_disk *found = bt_record(&c, &len);

		*start = bt_key(&c).hi;
		if (len != sizeof(*rec))
			err = -ERR_RECORD_SHAPE;
		else
			*rec = *found;
	}
	bt_cursor_release(&c);
	return err;
}

static int count(struct trans *t, uint64_t holder, int64_t delta)
{
	struct root_disk *root = fs_root(t->fs);
	int err = trans_join(t, t->fs->root);

	if (err)
		return err;
	root->quarantined_blocks = put64(get64(root->quarantined_blocks) + (uint64_t)delta);
	return t->fs->layout_hooks ? t->fs->layout_hooks->quarantined(t, holder, delta) : 0;
}

int alloc_quarantine(struct trans *t, fsblock_t start, nblocks_t len, uint64_t holder)
{
	struct quarantine_disk rec;
	fsblock_t found;
	int err = run_below(t->fs, start + len, &found, &rec);

	xassert(len);
	if (!err && found + get64(rec.length) > start)
		return overlap(t->fs, start, len);
	if (err && err != -ENOENT)
		return err;
	rec = (struct quarantine_disk){ put64(len), put64(holder), put64(jrn_running(t->fs)) };
	err = bt_insert(t, quarantine(t->fs), KEY(start, 0), &rec, sizeof(rec));
	return err ? err : count(t, holder, (int64_t)len);
}

/* From the end backwards, run by run; a run keeps what lies outside. */
int alloc_quarantine_release(struct trans *t, fsblock_t start, nblocks_t len)
{
	fsblock_t end = start + len;

	while (end > start) {
		struct quarantine_disk rec, rest;
		fsblock_t first, from, run_end;
		int err = run_below(t->fs, end, &first, &rec);

		if (err == -ENOENT || (!err && first + get64(rec.length) < end))
			return overlap(t->fs, start, len);
		if (err)
			return err;
		run_end = first + get64(rec.length);
		from = MAX(first, start);
		rest = rec;
		if (first < start) {
			rest.length = put64(start - first);
			err = bt_update(t, quarantine(t->fs), KEY(first, 0), &rest, sizeof(rest));
		} else {
			err = bt_delete(t, quarantine(t->fs), KEY(first, 0));
		}
		if (!err && run_end > end) {
			rest.length = put64(run_end - end);
			err = bt_insert(t, quarantine(t->fs), KEY(end, 0), &rest, sizeof(rest));
		}
		if (!err)
			err = count(t, get64(rec.holder), -(int64_t)(end - from));
		if (!err)
			err = alloc_free(t, from, end - from);
		if (err)
			return err;
		end = from;
	}
	return 0;
}
