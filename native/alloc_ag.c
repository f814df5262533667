/* SPDX-License-Identifier: MIT
 *
 * alloc_ag.c - free space of one allocation group: two trees and a freelist.
 *
 * Definitions. A free extent has a record in by_block, (start, 0) -> length, and one in by_len,
 * (length, start) -> nothing. The freelist holds single blocks for nodes of these two trees.
 *
 * Invariants, between operations:
 *   1. The two trees name the same extents; extents do not touch each other (neighbours are one).
 *   2. ag_disk.free_blocks = lengths of all extents + freelist_count; root_disk.free_blocks is the
 *      sum over AGs.
 *   3. The freelist can pay for the worst that one operation does to the trees. Taking a run from
 *      the middle of an extent is one insert into by_block and two into by_len; giving back is one
 *      of each; filling the freelist itself is at most one insert into by_len. An insert into a
 *      tree of height h takes at most h + 1 nodes. Hence freelist_need(): (hb + 2) + 3 * (hl + 2),
 *      one more a tree because it may grow on the way. At most 3 * h nodes come back by merging,
 *      for which AG_FREELIST_MAX leaves room.
 *   4. An AG too full to fill its freelist hands out nothing; giving back works always, because the
 *      blocks that come back may go to the freelist themselves.
 *
 * Blocks joined by one take or give: header, root block, by_block leaf, up to three by_len leaves
 * (two deletes, one insert), and rarely a split or merge with its parent and the nodes that a
 * trimmed freelist block touches: 4 to 6 nearly always, 10 (TRANS_ALLOC_OP) but for one in a
 * hundred thousand operations on badly fragmented groups, for which trans_join() finds room.
 */
#include <inttypes.h>

#include "alloc_priv.h"
#include "errors.h"
#include "journal.h"

#define FREELIST_SLACK 8u  /* above the need, before blocks go back to the trees */
#define FREELIST_HIGH 40u  /* never trimmed above this: room for what merges give back */
#define NEAR_STEPS 8u      /* extents looked at on each side of the goal */
#define FIT_STEPS 64u      /* extents of sufficient length looked at for one that is not busy */
#define LONGEST_STEPS 1024u

static struct tree by_block(struct fs *fs, const struct ag *ag)
{
	return (struct tree){ fs, TREE_FREE_BY_BLOCK, ag->no };
}

static struct tree by_len(struct fs *fs, const struct ag *ag)
{
	return (struct tree){ fs, TREE_FREE_BY_LEN, ag->no };
}

static unsigned freelist_need(const struct ag *ag)
{
	const struct ag_disk *d = ag_disk(ag);
	unsigned need = get32(d->by_block.height) + 2 + 3 * (get32(d->by_len.height) + 2);

	return MIN(need, FREELIST_HIGH);
}

static unsigned freelist_count(const struct ag *ag)
{
	return get32(ag_disk(ag)->freelist_count);
}

nblocks_t ag_tree_blocks(const struct ag *ag)
{
	nblocks_t free = get64(ag_disk(ag)->free_blocks), list = freelist_count(ag);

	return free > list ? free - list : 0;
}

static int corrupt(struct fs *fs, const struct ag *ag, const char *what, fsblock_t start,
		   nblocks_t len)
{
	fs_shutdown_writes(fs, -ERR_FREE_CORRUPT, "AG %u: %s: blocks %" PRIu64 " + %" PRIu64, ag->no,
			   what, start, len);
	return -ERR_FREE_CORRUPT;
}

static bool inside(const struct ag *ag, fsblock_t start, nblocks_t len)
{
	fsblock_t first = get64(ag_disk(ag)->start);
	nblocks_t size = get64(ag_disk(ag)->length);

	return len && start >= first && start - first < size && len <= size - (start - first);
}

/* The extent under a cursor of by_block. */
static int read_block_record(struct bt_cursor *c, const struct ag *ag, struct free_extent *ext)
{
	unsigned len;
	const struct free_disk *rec = bt_record(c, &len);

	ext->start = bt_key(c).hi;
	ext->len = len == sizeof(*rec) ? get64(rec->length) : 0;
	if (!inside(ag, ext->start, ext->len))
		return corrupt(c->tree.fs, ag, "impossible free extent", ext->start, ext->len);
	return 0;
}

static int read_len_record(struct bt_cursor *c, const struct ag *ag, struct free_extent *ext)
{
	*ext = (struct free_extent){ .start = bt_key(c).lo, .len = bt_key(c).hi };
	if (!inside(ag, ext->start, ext->len))
		return corrupt(c->tree.fs, ag, "impossible free extent", ext->start, ext->len);
	return 0;
}

/* ---- the two trees --------------------------------------------------------------------------- */

static int free_insert(struct trans *t, struct ag *ag, struct free_extent e)
{
	struct free_disk rec = { put64(e.len) };
	int err = bt_insert(t, by_block(t->fs, ag), KEY(e.start, 0), &rec, sizeof(rec));

	if (!err)
		err = bt_insert(t, by_len(t->fs, ag), KEY(e.len, e.start), NULL, 0);
	return err == -EEXIST ? corrupt(t->fs, ag, "free twice", e.start, e.len) : err;
}

static int free_delete(struct trans *t, struct ag *ag, struct free_extent e)
{
	int err = bt_delete(t, by_block(t->fs, ag), KEY(e.start, 0));

	if (!err)
		err = bt_delete(t, by_len(t->fs, ag), KEY(e.len, e.start));
	return err == -ENOENT ? corrupt(t->fs, ag, "trees differ", e.start, e.len) : err;
}

/* The extent at e.start has e.len blocks, and shall have `len`. */
static int free_resize(struct trans *t, struct ag *ag, struct free_extent e, nblocks_t len)
{
	struct free_disk rec = { put64(len) };
	int err = bt_update(t, by_block(t->fs, ag), KEY(e.start, 0), &rec, sizeof(rec));

	if (!err)
		err = bt_delete(t, by_len(t->fs, ag), KEY(e.len, e.start));
	if (err == -ENOENT)
		return corrupt(t->fs, ag, "trees differ", e.start, e.len);
	return err ? err : bt_insert(t, by_len(t->fs, ag), KEY(len, e.start), NULL, 0);
}

/* `run` leaves the trees; counters stay. */
static int tree_take(struct trans *t, struct ag *ag, struct free_extent ext, struct free_extent run)
{
	struct free_extent rest = { .start = run.start + run.len };
	int err;

	xassert(run.len && run.start >= ext.start && rest.start <= ext.start + ext.len);
	rest.len = ext.start + ext.len - rest.start;
	if (run.start > ext.start)
		err = free_resize(t, ag, ext, run.start - ext.start);
	else
		err = free_delete(t, ag, ext);
	if (!err && rest.len)
		err = free_insert(t, ag, rest);
	return err;
}

/* Extents before and behind [start, start + len): len 0 when they do not touch it. */
static int find_neighbours(struct fs *fs, struct ag *ag, struct free_extent e,
			   struct free_extent *prev, struct free_extent *next)
{
	struct bt_cursor c;
	int err;

	*prev = *next = (struct free_extent){ 0 };
	bt_cursor_init(&c, by_block(fs, ag));
	err = bt_seek(&c, KEY(e.start + e.len, 0), BT_LE);
	if (!err)
		err = read_block_record(&c, ag, next);
	if (!err && next->start == e.start + e.len) {
		err = bt_prev(&c);
		if (!err)
			err = read_block_record(&c, ag, prev);
	} else if (!err) {
		*prev = *next;
		next->len = 0;
	}
	bt_cursor_release(&c);
	if (err && err != -ENOENT)
		return err;
	if (prev->len && prev->start + prev->len > e.start)
		return corrupt(fs, ag, "freed twice", e.start, e.len);
	if (prev->start + prev->len != e.start)
		prev->len = 0;
	return 0;
}

/* `e` enters the trees, joined with its neighbours; counters stay. */
static int tree_give(struct trans *t, struct ag *ag, struct free_extent e)
{
	struct free_extent prev, next;
	int err = find_neighbours(t->fs, ag, e, &prev, &next);
	nblocks_t total;

	if (err)
		return err;
	total = prev.len + e.len + next.len;
	if (next.len)
		err = free_delete(t, ag, next);
	if (!err && prev.len)
		err = free_resize(t, ag, prev, total);
	else if (!err)
		err = free_insert(t, ag, (struct free_extent){ e.start, total });
	if (ag->longest_max < total)
		ag->longest_max = total;
	return err;
}

/* ---- counters and freelist ------------------------------------------------------------------- */

static int join_counters(struct trans *t, struct ag *ag)
{
	int err = trans_join(t, ag->buf);

	return err ? err : trans_join(t, t->fs->root);
}

/* Joined already. */
static void count_free(struct trans *t, struct ag *ag, int64_t delta)
{
	struct root_disk *root = fs_root(t->fs);
	struct ag_disk *d = ag_disk(ag);

	d->free_blocks = put64(get64(d->free_blocks) + (uint64_t)delta);
	root->free_blocks = put64(get64(root->free_blocks) + (uint64_t)delta);
}

static int list_push(struct trans *t, struct ag *ag, fsblock_t block)
{
	struct ag_disk *d = ag_disk(ag);
	unsigned n = freelist_count(ag);
	int err = trans_join(t, ag->buf);

	if (err)
		return err;
	/* Never with trees that we wrote: FREELIST_HIGH leaves room. */
	if (n >= AG_FREELIST_MAX)
		return corrupt(t->fs, ag, "freelist is full", block, 1);
	d->freelist[n] = put64(block);
	d->freelist_count = put32(n + 1);
	atomic_fetch_add(&alloc_of(t->fs)->freelists, 1);
	return 0;
}

static int list_pop(struct trans *t, struct ag *ag, fsblock_t *block)
{
	struct ag_disk *d = ag_disk(ag);
	unsigned n = freelist_count(ag);
	int err = trans_join(t, ag->buf);

	if (err)
		return err;
	if (!n)
		return corrupt(t->fs, ag, "freelist is empty", 0, 0);
	*block = get64(d->freelist[n - 1]);
	d->freelist[n - 1] = put64(0);
	d->freelist_count = put32(n - 1);
	atomic_fetch_sub(&alloc_of(t->fs)->freelists, 1);
	return 0;
}

int alloc_freelist_take(struct trans *t, uint32_t agno, fsblock_t *block)
{
	struct ag *ag = &alloc_of(t->fs)->ags[agno];
	int err = join_counters(t, ag);

	if (!err)
		err = list_pop(t, ag, block);
	if (!err)
		count_free(t, ag, -1);
	return err;
}

int alloc_freelist_give(struct trans *t, uint32_t agno, fsblock_t block)
{
	struct ag *ag = &alloc_of(t->fs)->ags[agno];
	int err = join_counters(t, ag);

	if (!err)
		err = buf_forget(t, block);
	if (!err)
		err = list_push(t, ag, block);
	if (!err)
		count_free(t, ag, 1);
	return err;
}

static int push_run(struct trans *t, struct ag *ag, struct free_extent run)
{
	int err = 0;

	for (nblocks_t i = 0; i < run.len && !err; i++)
		err = list_push(t, ag, run.start + i);
	return err;
}

int ag_fill(struct trans *t, struct ag *ag)
{
	while (freelist_count(ag) < freelist_need(ag)) {
		nblocks_t missing = freelist_need(ag) - freelist_count(ag);
		struct free_extent ext, run;
		struct bt_cursor c;
		int err;

		/* Out of the shortest that suffices, from its end: data grows at the front of
		 * extents. */
		bt_cursor_init(&c, by_len(t->fs, ag));
		err = bt_seek(&c, KEY(missing, 0), BT_GE);
		if (err == -ENOENT)
			err = bt_seek(&c, KEY_MAX, BT_LE);
		if (!err)
			err = read_len_record(&c, ag, &ext);
		bt_cursor_release(&c);
		if (err)
			return err == -ENOENT ? -ENOSPC : err;
		run.len = MIN(missing, ext.len);
		run.start = ext.start + ext.len - run.len;
		err = tree_take(t, ag, ext, run);
		if (!err)
			err = push_run(t, ag, run);
		if (err)
			return err;
	}
	return 0;
}

/* Blocks that merged nodes gave back return to the trees. They are metadata still, for the log. */
static int ag_trim(struct trans *t, struct ag *ag)
{
	struct alloc_state *st = alloc_of(t->fs);
	int err = 0;

	while (!err && freelist_count(ag) > MIN(freelist_need(ag) + FREELIST_SLACK, FREELIST_HIGH)) {
		struct free_extent e = { .len = 1 };

		err = list_pop(t, ag, &e.start);
		if (!err)
			err = busy_add(&st->busy, e.start, 1, true, jrn_running(t->fs));
		if (!err)
			err = tree_give(t, ag, e);
	}
	return err;
}

/* ---- taking ---------------------------------------------------------------------------------- */

/* busy_find_run() in what the windows of others leave. */
static void find_run(struct fs *fs, struct free_extent in, nblocks_t want, struct free_extent *run, unsigned *seen)
{
	struct alloc_state *st = alloc_of(fs);
	struct free_extent gap = in;

	run->len = 0;
	if (st->windows_hold && !window_gap(&st->windows, st->grows, in.start, in.len, &gap))
		return;
	busy_find_run(&st->busy, gap.start, gap.len, want, &run->start, &run->len, seen);
}

/* Best run inside ext into *run, if it is better than what is there already; true when it has
 * `want`. */
static bool consider(struct fs *fs, struct free_extent ext, nblocks_t want,
		     struct free_extent *best_ext, struct free_extent *best, unsigned *seen)
{
	struct free_extent run;

	find_run(fs, ext, want, &run, seen);
	if (run.len > best->len) {
		*best = run;
		*best_ext = ext;
	}
	return best->len >= want;
}

/* From the goal on itself: all that is wanted, or, where the goal continues something (the block
 * before it is in use), what there is. */
static bool at_goal(struct fs *fs, struct free_extent ext, fsblock_t goal, nblocks_t min,
		    nblocks_t want, struct free_extent *run, unsigned *seen)
{
	struct alloc_state *st = alloc_of(fs);
	nblocks_t rest = ext.start + ext.len - goal;

	rest = MIN(rest, want);
	if (st->windows_hold)
		rest = window_room(&st->windows, st->grows, goal, rest);
	busy_find_run(&st->busy, goal, rest, rest, &run->start, &run->len, seen);
	if (rest && run->start == goal && (run->len >= want || (ext.start == goal && run->len >= min)))
		return true;
	run->len = 0;
	return false;
}

int ag_find_near(struct fs *fs, struct ag *ag, fsblock_t goal, nblocks_t min, nblocks_t want,
		 struct free_extent *ext, struct free_extent *run, unsigned *seen)
{
	struct free_extent e;
	struct bt_cursor c;
	int err;

	run->len = 0;
	bt_cursor_init(&c, by_block(fs, ag));
	err = bt_seek(&c, KEY(goal, 0), BT_LE);
	if (!err)
		err = read_block_record(&c, ag, &e);
	if (!err && e.start + e.len > goal && at_goal(fs, e, goal, min, want, run, seen)) {
		*ext = e;
		bt_cursor_release(&c);
		return 0;
	}
	for (int dir = 0; dir < 2; dir++) {
		err = bt_seek(&c, KEY(goal, 0), dir ? BT_LT : BT_GE);
		for (unsigned i = 0; !err && i < NEAR_STEPS; i++) {
			err = read_block_record(&c, ag, &e);
			if (!err && e.len >= want && consider(fs, e, want, ext, run, seen))
				goto out;
			if (!err)
				err = dir ? bt_prev(&c) : bt_next(&c);
		}
		if (err && err != -ENOENT)
			break;
	}
	run->len = 0;
out:
	bt_cursor_release(&c);
	return err == -ENOENT ? 0 : err;
}

int ag_find_fit(struct fs *fs, struct ag *ag, nblocks_t want, struct free_extent *ext,
		struct free_extent *run, unsigned *seen)
{
	struct free_extent e;
	struct bt_cursor c;
	bool found = false;
	int err;

	run->len = 0;
	bt_cursor_init(&c, by_len(fs, ag));
	err = bt_seek(&c, KEY(want, 0), BT_GE);
	if (err == -ENOENT)
		ag->longest_max = want - 1;
	for (unsigned i = 0; !err && !found && i < FIT_STEPS; i++) {
		err = read_len_record(&c, ag, &e);
		if (!err)
			found = consider(fs, e, want, ext, run, seen);
		if (!err && !found)
			err = bt_next(&c);
	}
	bt_cursor_release(&c);
	if (!found)
		run->len = 0;
	return err == -ENOENT ? 0 : err;
}

int ag_find_longest(struct fs *fs, struct ag *ag, nblocks_t min, struct free_extent *ext,
		    struct free_extent *run, unsigned *seen)
{
	struct free_extent e;
	struct bt_cursor c;
	int err;

	run->len = 0;
	bt_cursor_init(&c, by_len(fs, ag));
	err = bt_seek(&c, KEY_MAX, BT_LE);
	ag->longest_max = 0;
	for (unsigned i = 0; !err && i < LONGEST_STEPS; i++) {
		err = read_len_record(&c, ag, &e);
		if (!err)
			ag->longest_max = MAX(ag->longest_max, e.len);
		if (err || e.len <= run->len || e.len < min)
			break;
		consider(fs, e, e.len, ext, run, seen);
		err = bt_prev(&c);
	}
	bt_cursor_release(&c);
	if (run->len < min)
		run->len = 0;
	return err == -ENOENT ? 0 : err;
}

int ag_find_shortest(struct fs *fs, struct ag *ag, struct free_extent *ext)
{
	struct bt_cursor c;
	int err;

	bt_cursor_init(&c, by_len(fs, ag));
	err = bt_seek(&c, KEY_MIN, BT_GE);
	if (!err)
		err = read_len_record(&c, ag, ext);
	bt_cursor_release(&c);
	return err;
}

int ag_take(struct trans *t, struct ag *ag, struct free_extent ext, struct free_extent run)
{
	int err = join_counters(t, ag);

	if (!err)
		err = tree_take(t, ag, ext, run);
	if (err)
		return err;
	count_free(t, ag, -(int64_t)run.len);
	/* Trees that lose their last small extents give nodes back. */
	return ag_trim(t, ag);
}

/* ---- giving back ----------------------------------------------------------------------------- */

static bool on_freelist(const struct ag *ag, struct free_extent e)
{
	for (unsigned i = 0; i < freelist_count(ag); i++)
		if (get64(ag_disk(ag)->freelist[i]) - e.start < e.len)
			return true;
	return false;
}

int ag_give(struct trans *t, struct ag *ag, struct free_extent e, bool meta)
{
	struct alloc_state *st = alloc_of(t->fs);
	struct free_extent prev, next;
	int err;

	if (!inside(ag, e.start, e.len) || on_freelist(ag, e))
		return corrupt(t->fs, ag, "impossible free", e.start, e.len);
	err = find_neighbours(t->fs, ag, e, &prev, &next);
	if (!err)
		err = join_counters(t, ag);
	if (!err)
		err = ag_fill(t, ag);
	if (err && err != -ENOSPC)
		return err;
	err = busy_add(&st->busy, e.start, e.len, meta, jrn_running(t->fs));
	if (err)
		return err;
	count_free(t, ag, (int64_t)e.len);
	/* A full AG: what comes back pays for its own bookkeeping first. */
	while (e.len && freelist_count(ag) < freelist_need(ag)) {
		err = list_push(t, ag, e.start);
		if (err)
			return err;
		e.start++;
		e.len--;
	}
	if (e.len)
		err = tree_give(t, ag, e);
	return err ? err : ag_trim(t, ag);
}
