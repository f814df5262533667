/* SPDX-License-Identifier: MIT
 *
 * alloc.c - where blocks come from: choice of an allocation group, the reserve, the public calls.
 *
 * The reserve. Data may use all but the last R = min(total / 50, 4096) blocks, metadata of ordinary
 * operations all but R / 2, operations with ALLOC_USE_RESERVE everything. Why this size:
 * transactions run one at a time and change at most TRANS_MAX_BLOCKS (512) blocks, so one that
 * frees space allocates fewer than 512, and what it frees can become metadata at once, without a
 * commit. R / 2 = 2048 is four such transactions, whatever the device's size; a device under 800
 * MiB gives 2 %, and its trees are low. The blocks on the AGs' freelists count as used here: nobody
 * else can have them.
 *
 * Placement. Data goes to the front of free extents, metadata to the end of the shortest one of its
 * AG: so metadata fills the small holes and does not come between the extents of a growing file.
 *
 * Invariant: ag.longest_max and alloc_state.freelists are derived from the headers; a cancelled
 * transaction makes them stale, and the next call finds them anew.
 *
 * Blocks joined: alloc_extent(), alloc_free(), alloc_meta(), alloc_meta_free(): TRANS_ALLOC_OP each
 * (alloc_ag.c), plus the node itself for metadata. alloc_quarantine(): TRANS_TREE_OP.
 * alloc_quarantine_release(): per record touched 2 * TRANS_TREE_OP + TRANS_ALLOC_OP.
 */
#include <pthread.h>

#include "alloc_priv.h"
#include "errors.h"
#include "journal.h"

#define RESERVE_MAX 4096u
#define RESERVE_SHARE 50u
#define ROOM_BLOCKS 1024u /* four tree nodes for each of the writes that file_early.c lets be under way */
/* Files of one directory start in so many places of an AG, at least 64 MiB apart, so that files
 * which grow side by side do not interleave, and free space stays in large pieces. */
#define LANES_MAX 8u
#define LANE_BLOCKS ((nblocks_t)1 << 14)
/* Windows hold while more than 1 / WINDOWS_NEED of the device is free. */
#define WINDOWS_NEED 16u
#define OPEN_THREADS 8u

/* ---- geometry -------------------------------------------------------------------------------- */

uint32_t alloc_agno(const struct fs *fs, fsblock_t block)
{
	uint64_t no = block / fs->super.ag_blocks;

	return (uint32_t)MIN(no, fs->super.ag_count - 1);
}

static fsblock_t ag_start(const struct fs *fs, uint32_t agno)
{
	return (fsblock_t)agno * fs->super.ag_blocks;
}

static nblocks_t ag_length(const struct fs *fs, uint32_t agno)
{
	fsblock_t end = agno + 1 == fs->super.ag_count ? fs->super.total_blocks
						       : ag_start(fs, agno + 1);
	return end - ag_start(fs, agno);
}

static fsblock_t ag_header_block(const struct fs *fs, uint32_t agno)
{
	return agno ? ag_start(fs, agno) : AG0_HEADER_BLOCK;
}

bool alloc_block_usable(const struct fs *fs, fsblock_t block)
{
	const struct super *sb = &fs->super;
	fsblock_t journal_end = sb->journal_start + sb->journal_blocks;

	if (block <= AG0_HEADER_BLOCK || block >= sb->total_blocks || block == SUPER_COPY_BLOCK)
		return false;
	if (block >= sb->journal_start && block < journal_end)
		return false;
	return block != ag_header_block(fs, alloc_agno(fs, block));
}

/* Can all of [start, start + len) be free or mapped? It lies in one AG. */
static bool range_usable(const struct fs *fs, fsblock_t start, nblocks_t len)
{
	const struct super *sb = &fs->super;
	fsblock_t end = start + len;

	if (!len || len > sb->total_blocks || start >= sb->total_blocks ||
	    end > sb->total_blocks || !alloc_block_usable(fs, start) ||
	    alloc_agno(fs, start) != alloc_agno(fs, end - 1))
		return false;
	if (start <= SUPER_COPY_BLOCK && end > SUPER_COPY_BLOCK)
		return false;
	return end <= sb->journal_start || start >= sb->journal_start + sb->journal_blocks;
}

static int ag_verify(const struct fs *fs, const void *block)
{
	const struct ag_disk *d = block;
	uint64_t agno = get64(d->hdr.owner);
	uint32_t count = get32(d->freelist_count);

	if (agno >= fs->super.ag_count || get64(d->start) != ag_start(fs, (uint32_t)agno) ||
	    get64(d->length) != ag_length(fs, (uint32_t)agno))
		return -ERR_META_RANGE;
	if (count > AG_FREELIST_MAX || get64(d->free_blocks) > get64(d->length) ||
	    get64(d->free_blocks) < count)
		return -ERR_FREE_CORRUPT;
	for (uint32_t i = 0; i < count; i++) {
		fsblock_t b = get64(d->freelist[i]);

		if (!alloc_block_usable(fs, b) || alloc_agno(fs, b) != agno)
			return -ERR_FREE_CORRUPT;
	}
	return 0;
}

const struct buf_type buf_type_ag = {
	.name = "allocation group",
	.magic = MAGIC_AG,
	.verify = ag_verify,
};

/* ---- opening --------------------------------------------------------------------------------- */

struct open_work {
	struct fs *fs;
	_Atomic uint32_t next;
	_Atomic int err;
};

static void *read_headers(void *arg)
{
	struct open_work *w = arg;
	struct alloc_state *st = alloc_of(w->fs);
	uint32_t no;

	while ((no = atomic_fetch_add(&w->next, 1)) < st->count && !atomic_load(&w->err)) {
		int err = buf_get(w->fs, ag_header_block(w->fs, no), &buf_type_ag, no,
				  &st->ags[no].buf);
		if (err)
			atomic_store(&w->err, err);
	}
	return NULL;
}

/* One header a read: a few threads keep the device's queue filled when there are many. */
static int open_headers(struct fs *fs)
{
	struct open_work w = { .fs = fs };
	pthread_t threads[OPEN_THREADS];
	unsigned started = 0, want = alloc_of(fs)->count < 32 ? 0 : OPEN_THREADS;

	while (started < want && !pthread_create(&threads[started], NULL, read_headers, &w))
		started++;
	read_headers(&w);
	while (started)
		pthread_join(threads[--started], NULL);
	return atomic_load(&w.err);
}

/* Find what is derived from the headers again. */
static void refresh(struct alloc_state *st)
{
	nblocks_t lists = 0;

	for (uint32_t i = 0; i < st->count; i++) {
		lists += get32(ag_disk(&st->ags[i])->freelist_count);
		st->ags[i].longest_max = UINT64_MAX;
	}
	atomic_store(&st->freelists, lists);
	st->stale = false;
}

int alloc_open(struct fs *fs)
{
	struct alloc_state *st = calloc(1, sizeof(*st));
	int err;

	if (!st)
		return -ENOMEM;
	busy_init(&st->busy);
	window_init(&st->windows);
	st->count = fs->super.ag_count;
	st->reserve = MIN(fs->super.total_blocks / RESERVE_SHARE, RESERVE_MAX);
	st->ags = calloc(st->count, sizeof(*st->ags));
	if (!st->ags) {
		window_destroy(&st->windows);
		free(st);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < st->count; i++)
		st->ags[i].no = i;
	fs->alloc = st;
	err = open_headers(fs);
	if (err)
		alloc_close(fs);
	else
		refresh(st);
	return err;
}

void alloc_close(struct fs *fs)
{
	struct alloc_state *st = alloc_of(fs);

	if (!st)
		return;
	for (uint32_t i = 0; i < st->count; i++)
		if (st->ags[i].buf)
			buf_put(st->ags[i].buf);
	busy_clear(&st->busy);
	window_destroy(&st->windows);
	free(st->ags);
	free(st);
	fs->alloc = NULL;
}

struct buf *alloc_ag_buf(struct fs *fs, uint32_t agno)
{
	xassert(agno < alloc_of(fs)->count);
	return alloc_of(fs)->ags[agno].buf;
}

/* ---- the running transaction ----------------------------------------------------------------- */

static void trans_ended(void *arg, xid_t xid)
{
	struct alloc_state *st = arg;

	st->hooked = false;
	if (!xid)
		st->stale = true;
}

/* Before anything is changed or looked for in a transaction. */
static int begin(struct trans *t)
{
	struct alloc_state *st = alloc_of(t->fs);
	xid_t durable = jrn_durable(t->fs), checkpointed = jrn_checkpointed(t->fs);
	int err;

	if (st->stale)
		refresh(st);
	if (t->fs->opt.mutant == MUTANT_META_REUSE_EARLY)
		checkpointed = durable;
	busy_expire(&st->busy, durable, checkpointed);
	if (st->hooked)
		return 0;
	err = trans_on_end(t, trans_ended, st);
	st->hooked = !err;
	return err;
}

/* Free blocks that may be used down to `keep`. */
static nblocks_t available(struct fs *fs, nblocks_t keep)
{
	nblocks_t free = get64(fs_root(fs)->free_blocks);

	keep += atomic_load(&alloc_of(fs)->freelists);
	return free > keep ? free - keep : 0;
}

static int no_space(struct fs *fs, unsigned seen)
{
	if (seen & BUSY_META)
		jrn_kick_checkpoint(fs);
	return seen ? -ERR_BUSY_BLOCKS : -ENOSPC;
}

/* ---- data ------------------------------------------------------------------------------------ */

/* A run of `want` in this AG; run->len 0: none. */
static int try_ag(struct trans *t, struct ag *ag, fsblock_t goal, nblocks_t min, nblocks_t want,
		  struct free_extent *ext, struct free_extent *run, unsigned *seen)
{
	int err;

	run->len = 0;
	if (ag_tree_blocks(ag) < (goal ? min : want))
		return 0;
	err = ag_fill(t, ag);
	if (err)
		return err == -ENOSPC ? 0 : err;
	if (goal) {
		err = ag_find_near(t->fs, ag, goal, min, want, ext, run, seen);
		if (err || run->len)
			return err;
	}
	if (ag->longest_max < want || ag_tree_blocks(ag) < want)
		return 0;
	return ag_find_fit(t->fs, ag, want, ext, run, seen);
}

/* No AG has a run of all that is wanted: the longest of the AG that promises the longest. */
static int try_longest(struct trans *t, nblocks_t min, struct ag **from, struct free_extent *ext,
		       struct free_extent *run, unsigned *seen)
{
	struct alloc_state *st = alloc_of(t->fs);

	run->len = 0;
	for (uint32_t i = 0; i < st->count; i++) {
		struct ag *ag = &st->ags[i];
		struct free_extent e, r;
		int err;

		if (ag->longest_max <= run->len || ag->longest_max < min ||
		    ag_tree_blocks(ag) < MAX(min, run->len + 1))
			continue;
		err = ag_fill(t, ag);
		if (err == -ENOSPC)
			continue;
		if (!err)
			err = ag_find_longest(t->fs, ag, min, &e, &r, seen);
		if (err)
			return err;
		if (r.len > run->len) {
			*run = r;
			*ext = e;
			*from = ag;
		}
	}
	return 0;
}

/* A file that grew up to the goal, and finds it taken, goes on where it has room before it meets another that grows. */
static fsblock_t other_goal(struct trans *t, fsblock_t goal)
{
	struct alloc_state *st = alloc_of(t->fs);
	uint32_t no = alloc_agno(t->fs, goal);
	struct free_extent gap;

	if (!window_gap(&st->windows, t->grows, ag_start(t->fs, no), ag_length(t->fs, no), &gap))
		return goal;
	goal = gap.start + gap.len / 2;
	return alloc_block_usable(t->fs, goal) ? goal : goal + 1;
}

/* The goal is free and in nobody's window, so that the file will be continued there. */
static int goal_is_free(struct trans *t, fsblock_t goal, bool *is_free)
{
	struct ag *ag = &alloc_of(t->fs)->ags[alloc_agno(t->fs, goal)];
	struct free_extent ext, run;
	unsigned seen = 0;
	int err = ag_find_near(t->fs, ag, goal, 1, 1, &ext, &run, &seen);

	*is_free = !err && run.len && run.start == goal;
	return err;
}

/* In the AG of the goal, then in all others; last the longest there is: what was looked at, the neighbours and the shortest
 * that would do, may all be busy. */
static int search(struct trans *t, fsblock_t goal, nblocks_t min, nblocks_t max, struct ag **from,
		  struct free_extent *ext, struct free_extent *run, unsigned *seen)
{
	struct alloc_state *st = alloc_of(t->fs);
	uint32_t first = goal ? alloc_agno(t->fs, goal) : st->rotor;
	int err;

	run->len = 0;
	for (uint32_t i = 0; i < st->count && !run->len; i++) {
		*from = &st->ags[(first + i) % st->count];
		err = try_ag(t, *from, i ? 0 : goal, min, max, ext, run, seen);
		if (err)
			return err;
	}
	return !run->len ? try_longest(t, min, from, ext, run, seen) : 0;
}

int alloc_extent(struct trans *t, fsblock_t goal, nblocks_t min, nblocks_t max, fsblock_t *start,
		 nblocks_t *len)
{
	struct fs *fs = t->fs;
	struct alloc_state *st = alloc_of(fs);
	struct free_extent ext, run = { 0 };
	struct ag *ag = NULL;
	unsigned seen = 0;
	nblocks_t avail;
	bool is_free = true;
	int err;

	xassert(min && min <= max);
	err = begin(t);
	if (err)
		return err;
	avail = available(fs, t->alloc_flags & ALLOC_USE_RESERVE ? 0 : st->reserve);
	if (avail < min)
		return -ENOSPC;
	max = MIN(max, avail);
	if (goal && !alloc_block_usable(fs, goal))
		goal = 0;
	st->grows = t->grows;
	st->windows_hold = avail > fs->super.total_blocks / WINDOWS_NEED;
	if (goal && t->continues && st->windows_hold)
		err = goal_is_free(t, goal, &is_free);
	if (!err)
		err = search(t, is_free ? goal : other_goal(t, goal), min, max, &ag, &ext, &run, &seen);
	if (!err && !run.len && st->windows_hold) {
		st->windows_hold = false;
		err = search(t, goal, min, max, &ag, &ext, &run, &seen);
	}
	if (err)
		return err;
	if (!run.len)
		return no_space(fs, seen);
	run.len = MIN(run.len, max);
	st->rotor = ag->no;
	*start = run.start;
	*len = run.len;
	if (!st->windows_hold)
		window_clear(&st->windows);
	else if (t->grows)
		window_grow(&st->windows, t->grows, run, ext.start + ext.len, avail);
	return ag_take(t, ag, ext, run);
}

void alloc_grown(struct fs *fs, inum_t ino)
{
	if (fs->alloc)
		window_drop(&alloc_of(fs)->windows, ino);
}

static int give(struct trans *t, fsblock_t start, nblocks_t len, bool meta)
{
	int err = begin(t);

	if (err)
		return err;
	if (!range_usable(t->fs, start, len)) {
		fs_shutdown_writes(t->fs, -ERR_FREE_CORRUPT,
				   "blocks %llu + %llu to be freed are not in one group's free area",
				   (unsigned long long)start, (unsigned long long)len);
		return -ERR_FREE_CORRUPT;
	}
	return ag_give(t, &alloc_of(t->fs)->ags[alloc_agno(t->fs, start)],
		       (struct free_extent){ start, len }, meta);
}

int alloc_free(struct trans *t, fsblock_t start, nblocks_t len)
{
	return give(t, start, len, false);
}

/* ---- metadata -------------------------------------------------------------------------------- */

int alloc_meta(struct trans *t, fsblock_t goal, fsblock_t *block)
{
	struct fs *fs = t->fs;
	struct alloc_state *st = alloc_of(fs);
	uint32_t first;
	int err = begin(t);

	if (err)
		return err;
	if (!available(fs, t->alloc_flags & ALLOC_USE_RESERVE ? 0 : st->reserve / 2))
		return -ENOSPC;
	first = alloc_block_usable(fs, goal) ? alloc_agno(fs, goal) : 0;
	for (uint32_t i = 0; i < st->count; i++) {
		struct ag *ag = &st->ags[(first + i) % st->count];
		struct free_extent ext, run;

		if (!ag_tree_blocks(ag))
			continue;
		err = ag_fill(t, ag);
		if (!err)
			err = ag_find_shortest(fs, ag, &ext);
		if (err == -ENOSPC || err == -ENOENT)
			continue;
		if (err)
			return err;
		run = (struct free_extent){ ext.start + ext.len - 1, 1 };
		*block = run.start;
		return ag_take(t, ag, ext, run);
	}
	return -ENOSPC;
}

int alloc_meta_free(struct trans *t, fsblock_t block)
{
	int err = buf_forget(t, block);

	return err ? err : give(t, block, 1, true);
}

/* ---- policy and report ----------------------------------------------------------------------- */

static uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 32)) * 0x9e3779b97f4a7c15ULL;
	return x ^ (x >> 29);
}

fsblock_t alloc_goal_for_inode(struct fs *fs, inum_t ino, inum_t parent)
{
	struct alloc_state *st = alloc_of(fs);
	nblocks_t mean = get64(fs_root(fs)->free_blocks) / st->count;
	uint32_t no = (uint32_t)(mix(parent) % st->count);
	nblocks_t length, lanes;
	fsblock_t goal = 0;

	/* Not into a group that is nearly full while others are not. */
	for (uint32_t i = 0; i < st->count && ag_tree_blocks(&st->ags[no]) < mean / 4; i++)
		no = (no + 1) % st->count;
	length = ag_length(fs, no);
	lanes = MIN(MAX(length / LANE_BLOCKS, 1), LANES_MAX);
	for (nblocks_t i = 0, lane = mix(ino); i < lanes; i++) {
		fsblock_t start = ag_start(fs, no) + (lane + i) % lanes * (length / lanes);

		/* Not beside another that grows, if there is a place without. */
		goal = i ? goal : start + 1;
		if (window_room(&st->windows, ino, start, length / lanes) == length / lanes) {
			goal = start + 1;
			break;
		}
	}
	return alloc_block_usable(fs, goal) ? goal : fs->super.journal_start + fs->super.journal_blocks;
}

bool alloc_nearly_full(struct fs *fs)
{
	struct alloc_state *st = alloc_of(fs);

	return get64(fs_root(fs)->free_blocks) < st->reserve + atomic_load(&st->freelists) + ROOM_BLOCKS;
}

void alloc_statfs(struct fs *fs, struct alloc_space *sp)
{
	struct alloc_state *st = alloc_of(fs);
	nblocks_t keep;

	fs_rdlock(fs);
	keep = st->reserve + atomic_load(&st->freelists);
	sp->total = fs->super.total_blocks;
	sp->free = get64(fs_root(fs)->free_blocks);
	sp->quarantined = get64(fs_root(fs)->quarantined_blocks);
	sp->avail = sp->free > keep ? sp->free - keep : 0;
	sp->busy = atomic_load(&st->busy.blocks);
	fs_unlock(fs);
}

/* Frees are busy from the moment they happen (ag_give); trans_commit() may repeat them. */
void alloc_busy_add(struct fs *fs, fsblock_t start, nblocks_t len, bool meta, xid_t xid)
{
	if (busy_add(&alloc_of(fs)->busy, start, len, meta, xid))
		fs_shutdown_writes(fs, -ENOMEM, "no memory to remember freed blocks");
}
