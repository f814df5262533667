/* SPDX-License-Identifier: MIT
 *
 * The allocator against one byte a block, and its rules one by one: busy extents, reserve,
 * quarantine.
 */
#include "alloc_fixture.h"
#include "tree_fixture.h"

#include <string.h>
#include <time.h>

#include "alloc_priv.h"
#include "journal.h"
#include "trans.h"

struct held { fsblock_t start; nblocks_t len; };
struct space_model {
	struct held *list;
	size_t n, cap;
	uint8_t *mapped;
};

static void model_add(struct space_model *m, fsblock_t start, nblocks_t len)
{
	if (m->n == m->cap) {
		m->cap = m->cap ? m->cap * 2 : 256;
		m->list = realloc(m->list, m->cap * sizeof(*m->list));
	}
	m->list[m->n++] = (struct held){ start, len };
	for (nblocks_t i = 0; i < len; i++) {
		assert_int_equal(m->mapped[start + i], 0);
		m->mapped[start + i] = 1;
	}
}

/* Part of extent i is given back: its front, tail or all of it. */
static struct held model_cut(struct space_model *m, size_t i, uint64_t r)
{
	struct held *h = &m->list[i], cut = *h;

	cut.len = r % 3 == 0 ? h->len : 1 + (r >> 8) % h->len;
	if (r % 3 == 1)
		cut.start = h->start + h->len - cut.len;
	if (cut.len == h->len) {
		*h = m->list[--m->n];
	} else {
		h->len -= cut.len;
		if (cut.start == h->start)
			h->start += cut.len;
	}
	memset(m->mapped + cut.start, 0, cut.len);
	return cut;
}

static nblocks_t free_blocks(struct fixture *f) { return get64(fs_root(&f->fs)->free_blocks); }

/* What users are told they may have is what is free without reserve and freelists. */
static void check_avail(struct fixture *f)
{
	nblocks_t keep = MIN(f->fs.super.total_blocks / 50, 4096), free = free_blocks(f);
	struct alloc_space sp;

	for (uint32_t no = 0; no < f->fs.super.ag_count; no++)
		keep += get32(((struct ag_disk *)alloc_ag_buf(&f->fs, no)->data)->freelist_count);
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.free, free);
	assert_int_equal(sp.avail, free > keep ? free - keep : 0);
}

/* Random extents come and go, some transactions are cancelled, groups become durable and are
 * checkpointed now and then. */
static void churn(uint64_t seed, nblocks_t total, nblocks_t ag_blocks, unsigned ops, nblocks_t max_len,
		  bool gets_full)
{
	struct fixture *f = fixture_create(total, ag_blocks, 1024);
	struct space_model m = { .mapped = calloc(total, 1) };
	uint64_t rng = check_seed(seed);
	unsigned full = 0;

	for (unsigned i = 0; i < ops; i++) {
		/* Waves of filling and emptying. */
		unsigned fill = (i / (ops / 6 + 1)) % 2 ? 25 : 75;
		bool cancel = check_random(&rng) % 10 == 0;
		nblocks_t before = free_blocks(f);
		struct trans t;

		fixture_begin(f, &t, 128);
		if (check_random(&rng) % 100 < fill || !m.n) {
			nblocks_t max = 1 + check_random(&rng) % max_len, len = 0;
			nblocks_t min = 1 + check_random(&rng) % max;
			fsblock_t goal = check_random(&rng) % 4 ? check_random(&rng) % total : 0;
			fsblock_t start;
			int err;

			/* Windows of growing files come in the way, and go. */
			t.grows = i % 3 ? 1 + i % 97 : 0;
			t.continues = i % 2;
			err = alloc_extent(&t, goal, min, max, &start, &len);
			if (i % 29 == 0)
				alloc_grown(&f->fs, 1 + i % 97);
			if (err) {
				assert_true(err == -ENOSPC || err == -ERR_BUSY_BLOCKS);
				full++;
				cancel = true;
			} else {
				assert_true(len >= min && len <= max);
				if (!cancel)
					model_add(&m, start, len);
			}
		} else if (cancel) {
			struct held h = m.list[check_random(&rng) % m.n];

			assert_int_equal(alloc_free(&t, h.start, h.len), 0);
		} else {
			struct held cut = model_cut(&m, check_random(&rng) % m.n,
						    check_random(&rng));

			assert_int_equal(alloc_free(&t, cut.start, cut.len), 0);
		}
		if (cancel)
			trans_cancel(&t);
		else
			trans_commit(&t);
		if (cancel)
			assert_int_equal(free_blocks(f), before);
		else
			check_avail(f);
		if (check_random(&rng) % 8 == 0)
			fixture_commit_group(f, check_random(&rng) % 4 == 0);
		if (i % (ops / 8) == 0)
			check_space(&f->fs, m.mapped);
	}
	assert_int_equal(full > 0, gets_full);
	fixture_reread(f);
	check_space(&f->fs, m.mapped);
	while (m.n) {
		struct held cut = model_cut(&m, m.n - 1, 0);
		struct trans t;

		fixture_begin(f, &t, 128);
		assert_int_equal(alloc_free(&t, cut.start, cut.len), 0);
		trans_commit(&t);
	}
	check_space(&f->fs, m.mapped);
	/* All is one again, but for the blocks that nodes and freelist keep, wherever they are. */
	for (uint32_t no = 0; no < f->fs.super.ag_count; no++)
		assert_true(bt_records((struct tree){ &f->fs, TREE_FREE_BY_BLOCK, no }) <= 40);
	free(m.list);
	free(m.mapped);
	fixture_destroy(f);
}

static void test_churn_small(void **state) { churn(11, 16384, 8192, 12000, 40, true); }
static void test_churn_ags(void **state) { churn(12, 65536, 8192, 12000, 3000, true); }
static void test_churn_fragments(void **state) { churn(13, 40000, 40000, 30000, 6, false); }

/* A freed data extent is not handed out before its group is durable, not even by the transaction
 * that freed it. */
static void test_busy_data(void **state)
{
	struct fixture *f = fixture_create(16384, 16384, 1024);
	struct alloc_space sp;
	fsblock_t start, again;
	nblocks_t len, n;
	struct trans t;

	assert_int_equal(extent_of(f, 9000, 100, 100, &start, &len), 0);
	assert_int_equal(start, 9000);
	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_free(&t, start, len), 0);
	assert_int_equal(alloc_extent(&t, start, 1, 100, &again, &n), 0);
	assert_true(again + n <= start || again >= start + len);
	assert_int_equal(alloc_free(&t, again, n), 0);
	trans_commit(&t);
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.busy, 200);
	assert_int_equal(extent_of(f, start, 1, 100, &again, &n), 0);
	assert_true(again + n <= start || again >= start + len);
	fixture_commit_group(f, false);
	assert_int_equal(extent_of(f, start, 1, 100, &again, &n), 0);
	assert_int_equal(again, start);
	assert_int_equal(n, 100);
	fixture_destroy(f);
}

/* Fill a small device with data; *first: some extent of it. */
static unsigned fill_up(struct fixture *f, struct held *held, unsigned cap)
{
	unsigned n = 0;

	while (n < cap && !extent_of(f, 0, 1, 512, &held[n].start, &held[n].len))
		n++;
	assert_true(n < cap);
	return n;
}

/* With nothing but busy blocks left the caller is told to wait; a commit helps where data was
 * freed. */
static void test_busy_full(void **state)
{
	struct fixture *f = fixture_create(8192, 8192, 1024);
	static struct held held[4096];
	unsigned n = fill_up(f, held, 4096);
	struct alloc_space sp;
	fsblock_t start;
	nblocks_t len;

	assert_int_equal(extent_of(f, 0, 1, 1, &start, &len), -ENOSPC);
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.avail, 0);
	assert_true(sp.free >= 8192 / 50);
	give_back(f, held[n / 2].start, held[n / 2].len);
	/* The reserve is free and not busy, so ask for more than its pieces have. */
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.avail, held[n / 2].len);
	int err = extent_of(f, held[n / 2].start, held[n / 2].len, held[n / 2].len, &start, &len);
	assert_int_equal(err, -ERR_BUSY_BLOCKS);
	assert_int_equal(fixture_kicks(f), 0);
	fixture_commit_group(f, false);
	assert_int_equal(extent_of(f, held[n / 2].start, held[n / 2].len, held[n / 2].len, &start, &len),
			 0);
	assert_int_equal(start, held[n / 2].start);
	fixture_destroy(f);
}

/* Freed metadata becomes data only when checkpointed, metadata again at once; the mutant forgets
 * the checkpoint. */
static void busy_meta(bool mutant)
{
	struct fixture *f = fixture_create(8192, 8192, 1024);
	struct { fsblock_t block; } meta[600];
	static struct held held[4096];
	nblocks_t len, run = 0;
	fsblock_t start, lowest = UINT64_MAX, block;
	struct trans t;

	f->fs.opt.mutant = mutant ? MUTANT_META_REUSE_EARLY : MUTANT_NONE;
	for (unsigned i = 0; i < 600; i++) {
		fixture_begin(f, &t, 64);
		assert_int_equal(alloc_meta(&t, 6000, &meta[i].block), 0);
		trans_commit(&t);
		lowest = MIN(lowest, meta[i].block);
	}
	fill_up(f, held, 4096);
	for (unsigned i = 0; i < 600; i++) {
		fixture_begin(f, &t, 64);
		assert_int_equal(alloc_meta_free(&t, meta[i].block), 0);
		trans_commit(&t);
	}
	fixture_commit_group(f, false);
	/* As data: wait for the checkpoint. */
	while (!extent_of(f, lowest, 1, 1, &start, &len)) {
		for (unsigned i = 0; i < 600; i++)
			run += meta[i].block == start;
		if (mutant && run)
			break;
	}
	if (mutant) {
		assert_true(run > 0);
	} else {
		assert_int_equal(run, 0);
		assert_int_equal(extent_of(f, lowest, 1, 1, &start, &len), -ERR_BUSY_BLOCKS);
		assert_true(fixture_kicks(f) > 0);
		/* As metadata: now. */
		fixture_begin(f, &t, 64);
		assert_int_equal(alloc_meta(&t, lowest, &block), 0);
		trans_commit(&t);
		fixture_commit_group(f, true);
		assert_int_equal(extent_of(f, lowest, 1, 1, &start, &len), 0);
		for (unsigned i = 0; i < 600; i++)
			run += meta[i].block == start;
		assert_int_equal(run, 1);
	}
	fixture_destroy(f);
}

static void test_busy_meta(void **state) { busy_meta(false); }
static void test_busy_meta_mutant(void **state) { busy_meta(true); }

/* Data stops at the reserve, ordinary metadata at half of it, operations that free space use
 * all. */
static void test_reserve(void **state)
{
	struct fixture *f = fixture_create(65536, 32768, 1024);
	const nblocks_t reserve = 65536 / 50;
	static struct held held[4096];
	struct alloc_space sp;
	unsigned n = 0, got = 0;
	fsblock_t start, b;
	nblocks_t len;
	struct trans t;
	int err;

	while (!extent_of(f, 0, 1, 700, &start, &len))
		held[n++] = (struct held){ start, len };
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.avail, 0);
	assert_true(sp.free >= reserve && sp.free < reserve + 100);
	for (;;) {
		fixture_begin(f, &t, 64);
		err = alloc_meta(&t, 0, &b);
		if (err)
			break;
		trans_commit(&t);
		got++;
	}
	trans_cancel(&t);
	assert_int_equal(err, -ENOSPC);
	assert_in_range(got, reserve / 2 - 40, reserve / 2 + 40);
	fixture_begin(f, &t, 512);
	t.alloc_flags = ALLOC_USE_RESERVE;
	for (unsigned i = 0; i < 400; i++)
		assert_int_equal(alloc_meta(&t, 0, &b), 0);
	trans_cancel(&t);
	/* Freeing goes on whatever happened. */
	while (n)
		n--, give_back(f, held[n].start, held[n].len);
	fixture_commit_group(f, true);
	assert_int_equal(extent_of(f, 0, 20000, 20000, &start, &len), 0);
	fixture_destroy(f);
}

/* Not one block free in any tree: giving back still works, in any order. */
static void test_free_when_full(void **state)
{
	struct fixture *f = fixture_create(16384, 8192, 1024);
	struct space_model m = { .mapped = calloc(16384, 1) };
	uint64_t rng = check_seed(21);
	fsblock_t start;
	nblocks_t len;
	struct trans t;

	for (;;) {
		int err;

		fixture_begin(f, &t, 128);
		t.alloc_flags = ALLOC_USE_RESERVE;
		err = alloc_extent(&t, 0, 1, 1 + check_random(&rng) % 3, &start, &len);
		if (err) {
			assert_int_equal(err, -ENOSPC);
			trans_cancel(&t);
			break;
		}
		trans_commit(&t);
		model_add(&m, start, len);
	}
	assert_true(free_blocks(f) < 128);
	check_space(&f->fs, m.mapped);
	while (m.n) {
		struct held cut = model_cut(&m, check_random(&rng) % m.n, 0);

		give_back(f, cut.start, cut.len);
	}
	check_space(&f->fs, m.mapped);
	free(m.list);
	free(m.mapped);
	fixture_destroy(f);
}

/* What a cancelled transaction learnt about the longest extent is forgotten. */
static void test_cancelled_hint(void **state)
{
	struct fixture *f = fixture_create(65536, 65536, 1024);
	fsblock_t start, again;
	nblocks_t len, n;
	struct trans t;

	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_extent(&t, 0, 58000, 58000, &start, &len), 0);
	assert_int_equal(alloc_extent(&t, 0, 20000, 20000, &start, &len), -ENOSPC);
	trans_cancel(&t);
	assert_int_equal(extent_of(f, 0, 50000, 50000, &start, &len), 0);
	/* And a search that failed does not hide what is freed later. */
	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_extent(&t, 0, 1, 20000, &again, &n), 0);
	trans_commit(&t);
	give_back(f, start, len);
	fixture_commit_group(f, false);
	assert_int_equal(extent_of(f, 0, 50000, 50000, &start, &len), 0);
	fixture_destroy(f);
}

#define BUSY_SPAN 300u

static void check_busy(struct busy_set *set, const xid_t *xid, const bool *meta, unsigned at,
		       unsigned len)
{
	nblocks_t run, want = 0, longest = 0, total = 0;
	unsigned seen = 0, seen_want = 0;
	fsblock_t start;

	for (unsigned b = 0; b < BUSY_SPAN; b++)
		total += xid[b] != 0;
	assert_int_equal(atomic_load(&set->blocks), total);
	for (unsigned b = at; b < at + len; b++) {
		want = xid[b] ? 0 : want + 1;
		longest = MAX(longest, want);
		if (xid[b])
			seen_want |= meta[b] ? BUSY_META : BUSY_DATA;
	}
	busy_find_run(set, 1000 + at, len, len, &start, &run, &seen);
	assert_int_equal(run, longest);
	assert_int_equal(seen, seen_want);
	for (nblocks_t i = 0; i < run; i++)
		assert_int_equal(xid[start - 1000 + i], 0);
}

/* The set of busy extents against one xid a block: overlaps, both kinds, expiry. */
static void test_busy_set(void **state)
{
	uint64_t rng = check_seed(14);
	xid_t xid[BUSY_SPAN] = { 0 }, now = 1, durable = 0, checkpointed = 0;
	bool meta[BUSY_SPAN] = { 0 };
	struct busy_set set;

	busy_init(&set);
	for (unsigned i = 0; i < 20000; i++) {
		unsigned at = (unsigned)(check_random(&rng) % BUSY_SPAN);
		unsigned len = 1 + (unsigned)(check_random(&rng) % MIN(20, BUSY_SPAN - at));
		bool is_meta = check_random(&rng) % 2;

		now += check_random(&rng) % 2;
		for (unsigned b = at; b < at + len; b++)
			is_meta |= xid[b] && meta[b];
		/* One whole range gets one kind: the stricter one. */
		assert_int_equal(busy_add(&set, 1000 + at, len, is_meta, now), 0);
		for (unsigned b = at; b < at + len; b++) {
			xid[b] = now;
			meta[b] = is_meta;
		}
		if (check_random(&rng) % 4 == 0) {
			durable = MAX(durable, now - check_random(&rng) % MIN(now, 12));
			checkpointed = MAX(checkpointed, durable - MIN(durable, check_random(&rng) % 9));
			busy_expire(&set, durable, checkpointed);
			for (unsigned b = 0; b < BUSY_SPAN; b++)
				if (xid[b] <= (meta[b] ? checkpointed : durable))
					xid[b] = 0;
		}
		check_busy(&set, xid, meta, at, len);
	}
	/* Data over metadata stays metadata, until the checkpoint. */
	busy_clear(&set);
	assert_int_equal(busy_add(&set, 10, 10, true, now), 0);
	assert_int_equal(busy_add(&set, 5, 20, false, now + 1), 0);
	busy_expire(&set, now + 1, now);
	assert_int_equal(atomic_load(&set.blocks), 20);
	busy_expire(&set, now + 1, now + 1);
	assert_int_equal(atomic_load(&set.blocks), 0);
	busy_clear(&set);
}

/* Trees that grew over many single blocks shrink again when these are used up, block by block. */
static void test_shrinking_trees(void **state)
{
	struct fixture *f = fixture_create(65536, 65536, 1024);
	struct tree by_block = { &f->fs, TREE_FREE_BY_BLOCK, 0 };
	uint8_t *mapped = calloc(65536, 1);
	fsblock_t start, block;
	struct trans t;
	nblocks_t len;

	assert_int_equal(extent_of(f, 0, 50000, 50000, &start, &len), 0);
	memset(mapped + start, 1, len);
	for (fsblock_t b = start; b < start + len; b += 2) {
		give_back(f, b, 1);
		mapped[b] = 0;
	}
	fixture_commit_group(f, true);
	assert_true(bt_records(by_block) > 24000);
	for (unsigned i = 0; i < 24000; i++) {
		if (i % 2) {
			assert_int_equal(extent_of(f, 0, 1, 1, &block, &len), 0);
		} else {
			fixture_begin(f, &t, 64);
			assert_int_equal(alloc_meta(&t, 0, &block), 0);
			trans_commit(&t);
		}
		mapped[block] = 1;
		if (i % 6000 == 0)
			check_space(&f->fs, mapped);
	}
	assert_true(bt_records(by_block) < 2000);
	check_space(&f->fs, mapped);
	free(mapped);
	fixture_destroy(f);
}

static void test_double_free(void **state)
{
	const struct { fsblock_t start; nblocks_t len; } bad[] = {
		{ 9000, 100 }, { 8990, 11 }, { 9099, 2 }, { 8990, 200 }, { 9050, 1 }, /* 9000 + 100 is free inside 8900 + 300 */
		{ 2, 1 }, { SUPER_COPY_BLOCK, 1 }, { SUPER_COPY_BLOCK - 2, 5 },
		{ JOURNAL_START_BLOCK + 5, 1 }, { 16384, 1 }, { 16383, 2 }, { 40000, 1 },
		{ UINT64_MAX, 1 }, { 9000, UINT64_MAX }, { 0, 0 },
	};

	for (unsigned i = 0; i < ARRAY_LEN(bad); i++) {
		struct fixture *f = fixture_create(32768, 16384, 1024);
		fsblock_t start;
		nblocks_t len;
		struct trans t;

		assert_int_equal(extent_of(f, 8900, 300, 300, &start, &len), 0);
		assert_int_equal(start, 8900);
		give_back(f, 9000, 100);
		fixture_begin(f, &t, 128);
		assert_int_equal(alloc_free(&t, bad[i].start, bad[i].len), -ERR_FREE_CORRUPT);
		trans_cancel(&t);
		assert_true(fs_is_shutdown(&f->fs));
		fixture_destroy(f);
	}
}

/* 1,024 groups: opening reads every header, quickly; directories spread over groups. */
static void test_many_groups(void **state)
{
	struct fixture *f = fixture_create((nblocks_t)1 << 32, (nblocks_t)1 << 22, 65536); /* 16 TiB */
	struct timespec a, b;
	uint8_t seen[1024] = { 0 };
	unsigned groups = 0;
	fsblock_t start;
	nblocks_t len;

	assert_int_equal(f->fs.super.ag_count, 1024);
	fixture_commit_group(f, true);
	clock_gettime(CLOCK_MONOTONIC, &a);
	fixture_reread(f);
	clock_gettime(CLOCK_MONOTONIC, &b);
	double ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
	print_message("1024 group headers read in %.1f ms\n", ms);
	assert_true(ms < 400);
	for (inum_t dir = 1; dir < 2000; dir++) {
		fsblock_t goal = alloc_goal_for_inode(&f->fs, dir * 10, dir);

		assert_true(alloc_block_usable(&f->fs, goal));
		groups += !seen[alloc_agno(&f->fs, goal)]++;
	}
	assert_true(groups > 700);
	assert_int_equal(extent_of(f, 0, 1, (nblocks_t)1 << 18, &start, &len), 0);
	assert_int_equal(len, 1 << 18);
	/* More than any group has: the longest there is. */
	assert_int_equal(extent_of(f, 0, 1, (nblocks_t)1 << 31, &start, &len), 0);
	assert_true(len > (1 << 22) - 100);
	fixture_destroy(f);
}

static void test_quarantine(void **state)
{
	struct fixture *f = fixture_create(16384, 16384, 1024);
	uint8_t *mapped = calloc(16384, 1);
	struct alloc_space sp;
	fsblock_t start, again;
	nblocks_t len, n, before;
	struct trans t;

	assert_int_equal(extent_of(f, 9000, 100, 100, &start, &len), 0);
	alloc_statfs(&f->fs, &sp);
	before = sp.free;
	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_quarantine(&t, 9000, 60, 5), 0);
	assert_int_equal(alloc_quarantine(&t, 9060, 40, 6), 0);
	trans_commit(&t);
	fixture_reread(f);
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.quarantined, 100);
	assert_in_range(sp.free, before - 1, before); /* one node of the quarantine tree */
	assert_int_equal(extent_of(f, 9000, 1, 100, &again, &n), 0);
	assert_true(again + n <= 9000 || again >= 9100);
	memset(mapped + again, 1, n);
	check_space(&f->fs, mapped);
	/* The middle of both, then the rest. */
	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_quarantine_release(&t, 9010, 70), 0);
	trans_commit(&t);
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.quarantined, 30);
	check_space(&f->fs, mapped);
	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_quarantine_release(&t, 9000, 10), 0);
	assert_int_equal(alloc_quarantine_release(&t, 9080, 20), 0);
	trans_commit(&t);
	alloc_statfs(&f->fs, &sp);
	assert_int_equal(sp.quarantined, 0);
	check_space(&f->fs, mapped);
	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_quarantine_release(&t, 9000, 10), -ERR_FREE_CORRUPT);
	trans_cancel(&t);
	free(mapped);
	fixture_destroy(f);
}

/* A header that contradicts the superblock or itself is refused. */
static void test_header_verifier(void **state)
{
	struct fixture *f = fixture_create(32768, 16384, 1024);
	struct ag_disk copy, *ag = &copy;

#define CHECK_BAD(change, code)                                                     \
	do {                                                                        \
		memcpy(ag, alloc_ag_buf(&f->fs, 1)->data, sizeof(*ag));             \
		assert_int_equal(buf_type_ag.verify(&f->fs, ag), 0);                \
		change;                                                             \
		assert_int_equal(buf_type_ag.verify(&f->fs, ag), -(code));          \
	} while (0)
	CHECK_BAD(ag->hdr.owner = put64(2), ERR_META_RANGE);
	CHECK_BAD(ag->start = put64(16385), ERR_META_RANGE);
	CHECK_BAD(ag->length = put64(16385), ERR_META_RANGE);
	CHECK_BAD(ag->freelist_count = put32(65), ERR_FREE_CORRUPT);
	CHECK_BAD(ag->free_blocks = put64(16385), ERR_FREE_CORRUPT);
	CHECK_BAD(ag->free_blocks = put64(3), ERR_FREE_CORRUPT);
	CHECK_BAD(ag->freelist[0] = put64(16384), ERR_FREE_CORRUPT);
	CHECK_BAD(ag->freelist[0] = put64(12000), ERR_FREE_CORRUPT);
	fixture_destroy(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_churn_small),	 cmocka_unit_test(test_churn_ags),
		cmocka_unit_test(test_churn_fragments),	 cmocka_unit_test(test_busy_data),
		cmocka_unit_test(test_busy_full),	 cmocka_unit_test(test_busy_meta),
		cmocka_unit_test(test_busy_meta_mutant), cmocka_unit_test(test_reserve),
		cmocka_unit_test(test_free_when_full),	 cmocka_unit_test(test_double_free),
		cmocka_unit_test(test_many_groups),	 cmocka_unit_test(test_quarantine),
		cmocka_unit_test(test_header_verifier),
		cmocka_unit_test(test_shrinking_trees),	 cmocka_unit_test(test_cancelled_hint),
		cmocka_unit_test(test_busy_set),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
