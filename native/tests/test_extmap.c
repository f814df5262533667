/* SPDX-License-Identifier: MIT
 *
 * Extent maps of a few files that share blocks, against one entry a file block and one counter a
 * device block.
 */
#include "tree_fixture.h"

#include <string.h>
#include <time.h>

#include "extmap.h"
#include "refcount.h"

#define FILES 3u
#define FILE_BLOCKS 600u

struct slot { fsblock_t block; uint8_t state, flags; };
struct file_model { struct slot of[FILE_BLOCKS]; };

struct world {
	struct fixture *f;
	struct inode in[FILES];
	struct file_model files[FILES];
	uint64_t rng;
};

static struct world *world_create(uint64_t seed)
{
	struct world *w = calloc(1, sizeof(*w));

	w->f = fixture_create(16384, 8192, 1024);
	w->rng = check_seed(seed);
	for (unsigned i = 0; i < FILES; i++) {
		w->in[i].fs = &w->f->fs;
		w->in[i].ino = 100 + i;
	}
	return w;
}

static void world_destroy(struct world *w)
{
	fixture_destroy(w->f);
	free(w);
}

/* Users of every device block, by the models. */
static void check_world(struct world *w)
{
	nblocks_t total = w->f->fs.super.total_blocks;
	uint32_t *users = calloc(total, sizeof(*users));
	uint8_t *mapped = calloc(total, 1);

	for (unsigned i = 0; i < FILES; i++) {
		nblocks_t blocks = 0;

		for (unsigned b = 0; b < FILE_BLOCKS; b++) {
			const struct slot *s = &w->files[i].of[b];

			if (s->state == EXT_HOLE)
				continue;
			blocks++;
			users[s->block]++;
			mapped[s->block] = 1;
		}
		assert_int_equal(w->in[i].core.blocks, blocks);
	}
	check_space(&w->f->fs, mapped);
	for (fsblock_t b = 0; b < total; b++) {
		uint32_t refs;
		nblocks_t run;

		assert_int_equal(refcount_query(&w->f->fs, b, 1, &refs, &run), 0);
		assert_int_equal(refs, MAX(users[b], 1));
	}
	free(users);
	free(mapped);
}

static bool continues(const struct slot *a, const struct slot *b)
{
	return a->state == b->state && (a->state == EXT_HOLE ||
		(a->flags == b->flags && a->block + 1 == b->block));
}

/* The list says what the model says, in as few extents as possible. */
static void check_file(struct world *w, unsigned i)
{
	struct extent list[FILE_BLOCKS];
	const struct slot *of = w->files[i].of;
	fileblk_t at = 0;
	int n = extmap_list(&w->in[i], FORK_DATA, 0, FILE_BLOCKS, true, list, FILE_BLOCKS), solid = 0;

	assert_true(n > 0);
	for (int k = 0; k < n; k++) {
		assert_int_equal(list[k].file, at);
		assert_true(list[k].len > 0);
		for (nblocks_t j = 0; j < list[k].len; j++, at++) {
			assert_int_equal(of[at].state, list[k].state);
			if (of[at].state == EXT_HOLE)
				continue;
			assert_int_equal(of[at].block, list[k].block + j);
			assert_int_equal(of[at].flags, list[k].flags);
		}
		if (at < FILE_BLOCKS)
			assert_false(continues(&of[at - 1], &of[at]));
		solid += list[k].state != EXT_HOLE;
	}
	assert_int_equal(at, FILE_BLOCKS);
	assert_int_equal(extmap_list(&w->in[i], FORK_DATA, 0, FILE_BLOCKS, false, list, FILE_BLOCKS),
			 solid);
}

static void check_lookup(struct world *w, unsigned i, fileblk_t at, nblocks_t max)
{
	const struct slot *of = w->files[i].of;
	struct extent e;
	nblocks_t n = 1;

	max = MIN(max, FILE_BLOCKS - at);
	while (n < max && continues(&of[at + n - 1], &of[at + n]))
		n++;
	assert_int_equal(extmap_lookup(&w->in[i], FORK_DATA, at, max, &e), 0);
	assert_int_equal(e.file, at);
	assert_int_equal(e.len, n);
	assert_int_equal(e.state, of[at].state);
	if (e.state == EXT_HOLE)
		return;
	assert_int_equal(e.block, of[at].block);
	if (e.state == EXT_WRITTEN) {
		bool shared;
		nblocks_t run;
		unsigned users = 0;

		for (unsigned k = 0; k < FILES; k++)
			for (unsigned b = 0; b < FILE_BLOCKS; b++)
				users += w->files[k].of[b].state && w->files[k].of[b].block == e.block;
		assert_int_equal(extmap_is_shared(&w->in[i], &e, &shared, &run), 0);
		assert_int_equal(shared, users > 1);
		assert_true(run > 0 && run <= e.len);
	}
}

enum map_op { OP_ALLOCATE, OP_STATE, OP_REMOVE, OP_SHARE, OP_REMAP, OP_COUNT };

/* Reads back what the core did, so that the model knows the blocks that were chosen; new ones must
 * be nobody's. */
static void learn_blocks(struct world *w, unsigned i, fileblk_t from, fileblk_t to, uint8_t flags)
{
	for (fileblk_t b = from; b < to; b++) {
		struct slot *s = &w->files[i].of[b];
		struct extent e;

		if (s->state != EXT_HOLE)
			continue;
		assert_int_equal(extmap_lookup(&w->in[i], FORK_DATA, b, 1, &e), 0);
		assert_int_equal(e.state, EXT_UNWRITTEN);
		*s = (struct slot){ e.block, EXT_UNWRITTEN, flags };
	}
}

static int do_allocate(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len,
		       unsigned max_records, bool apply)
{
	uint8_t flags = check_random(&w->rng) % 3 ? 0 : EXT_F_LAYOUT;
	nblocks_t done;
	int err = extmap_allocate(t, &w->in[i], FORK_DATA, at, len, flags, max_records, &done);

	if (err)
		return err;
	assert_true(done > 0 && done <= len);
	if (apply)
		learn_blocks(w, i, at, at + done, flags);
	return 0;
}

static int do_state(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len,
		    unsigned max_records, bool apply)
{
	struct slot *of = w->files[i].of;
	enum extent_state state = check_random(&w->rng) % 4 ? EXT_WRITTEN : EXT_UNWRITTEN;
	nblocks_t done, mapped = 0;
	int err;

	while (mapped < len && of[at + mapped].state != EXT_HOLE)
		mapped++;
	if (!mapped) {
		assert_int_equal(extmap_set_state(t, &w->in[i], FORK_DATA, at, len, state, 8, &done),
				 -ERR_MAP_OVERLAP);
		return -ERR_MAP_OVERLAP;
	}
	err = extmap_set_state(t, &w->in[i], FORK_DATA, at, mapped, state, max_records, &done);
	assert_int_equal(err, 0);
	assert_true(done > 0 && done <= mapped);
	for (nblocks_t k = 0; apply && k < done; k++) {
		if (state == EXT_WRITTEN && of[at + k].state != EXT_WRITTEN)
			of[at + k].flags = 0;
		of[at + k].state = state;
	}
	return 0;
}

static int do_remove(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len,
		     unsigned max_records, bool apply)
{
	fileblk_t rest, end = at + len;

	assert_int_equal(extmap_remove(t, &w->in[i], FORK_DATA, at, end, max_records, &rest), 0);
	assert_true(rest >= at && rest < end);
	if (apply)
		memset(w->files[i].of + rest, 0, (end - rest) * sizeof(struct slot));
	return 0;
}

static int do_share(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len,
		    unsigned max_records, bool apply)
{
	unsigned to = (unsigned)(check_random(&w->rng) % FILES);
	fileblk_t dst = check_random(&w->rng) % (FILE_BLOCKS - len + 1), rest;
	bool overlap = i == to && dst < at + len && at < dst + len;
	nblocks_t done;

	if (overlap)
		return -EINVAL;
	assert_int_equal(extmap_remove(t, &w->in[to], FORK_DATA, dst, dst + len, 1000, &rest), 0);
	assert_int_equal(rest, dst);
	assert_int_equal(extmap_share(t, &w->in[i], at, len, &w->in[to], dst, max_records, &done), 0);
	assert_true(done > 0 && done <= len);
	if (!apply)
		return 0;
	memset(w->files[to].of + dst, 0, len * sizeof(struct slot));
	for (nblocks_t k = 0; k < done; k++)
		if (w->files[i].of[at + k].state == EXT_WRITTEN)
			w->files[to].of[dst + k] = w->files[i].of[at + k];
	return 0;
}

/* Copy on write of a part of one extent. */
static int do_remap(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len,
		    bool apply)
{
	struct slot *of = w->files[i].of;
	fsblock_t to;
	nblocks_t got;
	struct extent e;
	int err;

	assert_int_equal(extmap_lookup(&w->in[i], FORK_DATA, at, len, &e), 0);
	if (e.state == EXT_HOLE)
		return -EINVAL;
	err = alloc_extent(t, 0, 1, e.len, &to, &got);
	if (err)
		return err;
	assert_int_equal(extmap_remap(t, &w->in[i], FORK_DATA, at, got, to), 0);
	for (nblocks_t k = 0; apply && k < got; k++)
		of[at + k] = (struct slot){ to + k, EXT_WRITTEN, 0 };
	return 0;
}

static void one_op(struct world *w, enum map_op op)
{
	unsigned i = (unsigned)(check_random(&w->rng) % FILES);
	fileblk_t at = check_random(&w->rng) % FILE_BLOCKS;
	nblocks_t len = 1 + check_random(&w->rng) % MIN(60, FILE_BLOCKS - at);
	unsigned max_records = check_random(&w->rng) % 4 ? 1000 : 1 + at % 3;
	bool cancel = check_random(&w->rng) % 10 == 0;
	uint64_t blocks[FILES];
	struct trans t;
	int err;

	for (unsigned k = 0; k < FILES; k++)
		blocks[k] = w->in[k].core.blocks;
	fixture_begin(w->f, &t, 512);
	switch (op) {
	case OP_ALLOCATE: err = do_allocate(w, &t, i, at, len, max_records, !cancel); break;
	case OP_STATE: err = do_state(w, &t, i, at, len, max_records, !cancel); break;
	case OP_REMOVE: err = do_remove(w, &t, i, at, len, max_records, !cancel); break;
	case OP_SHARE: err = do_share(w, &t, i, at, len, max_records, !cancel); break;
	default: err = do_remap(w, &t, i, at, len, !cancel); break;
	}
	if (err || cancel) {
		trans_cancel(&t);
		for (unsigned k = 0; k < FILES; k++)
			assert_int_equal(w->in[k].core.blocks, blocks[k]);
	} else {
		trans_commit(&t);
	}
	check_lookup(w, i, at, len);
}

static void property(uint64_t seed, const unsigned weights[OP_COUNT], unsigned ops)
{
	struct world *w = world_create(seed);

	for (unsigned n = 0; n < ops; n++) {
		unsigned dice = (unsigned)(check_random(&w->rng) % 100), op = 0;

		while (dice >= weights[op])
			dice -= weights[op++];
		one_op(w, op);
		if (n % 16 == 0)
			fixture_commit_group(w->f, n % 64 == 0);
		if (n % 100 == 0)
			for (unsigned i = 0; i < FILES; i++)
				check_file(w, i);
		if (n % 500 == 0)
			check_world(w);
	}
	fixture_reread(w->f);
	check_world(w);
	for (unsigned i = 0; i < FILES; i++) {
		fileblk_t rest = FILE_BLOCKS;

		check_file(w, i);
		while (rest) {
			struct trans t;

			fixture_begin(w->f, &t, EXTMAP_STEP_BLOCKS + 20);
			assert_int_equal(extmap_remove(&t, &w->in[i], FORK_DATA, 0, FILE_BLOCKS, 50, &rest), 0);
			trans_commit(&t);
		}
		memset(&w->files[i], 0, sizeof(w->files[i]));
	}
	assert_int_equal(bt_height(fs_tree(&w->f->fs, TREE_EXTENT)), 0);
	assert_int_equal(bt_height(fs_tree(&w->f->fs, TREE_REFCOUNT)), 0);
	check_world(w);
	world_destroy(w);
}

static void test_mixed(void **state)
{
	property(41, (const unsigned[]){ 25, 35, 20, 10, 10 }, 6000);
}
static void test_sharing(void **state)
{
	property(42, (const unsigned[]){ 20, 25, 10, 30, 15 }, 6000);
}
static void test_unshared(void **state)
{
	property(43, (const unsigned[]){ 30, 45, 25, 0, 0 }, 8000);
}

/* Sequential writes into a preallocation end as one record, whatever the order of conversion. */
static void test_convert_whole(void **state)
{
	struct world *w = world_create(44);
	struct extent list[4];
	nblocks_t done;
	struct trans t;

	for (unsigned order = 0; order < 3; order++) {
		fixture_begin(w->f, &t, 512);
		assert_int_equal(extmap_allocate(&t, &w->in[order], FORK_DATA, 10, 500, EXT_F_LAYOUT, 9,
						 &done), 0);
		assert_int_equal(done, 500);
		trans_commit(&t);
		for (unsigned i = 0; i < 500; i++) {
			fileblk_t at = order == 0 ? i : order == 1 ? 499 - i : i * 7 % 500;

			fixture_begin(w->f, &t, 512);
			assert_int_equal(extmap_set_state(&t, &w->in[order], FORK_DATA, 10 + at, 1,
							  EXT_WRITTEN, 1, &done), 0);
			trans_commit(&t);
		}
		assert_int_equal(extmap_list(&w->in[order], FORK_DATA, 0, 1000, true, list, 4), 3);
		assert_int_equal(list[0].len, 10);
		assert_int_equal(list[1].len, 500);
		assert_int_equal(list[1].state, EXT_WRITTEN);
		assert_int_equal(list[1].flags, 0);
		assert_int_equal(list[2].len, 490);
	}
	assert_int_equal(bt_records(fs_tree(&w->f->fs, TREE_EXTENT)), 3);
	world_destroy(w);
}

/* Forks of one inode do not see each other, nor neighbouring inodes. */
static void test_forks(void **state)
{
	struct world *w = world_create(45);
	struct extent e = { .file = 5, .block = 6000, .len = 10, .state = EXT_WRITTEN }, got;
	struct extent at_end = { .file = FILE_MAX_BLOCKS - 4, .block = 6100, .len = 4, .state = EXT_WRITTEN };
	fileblk_t rest;
	struct trans t;
	fsblock_t start;
	nblocks_t len;

	fixture_begin(w->f, &t, 256);
	assert_int_equal(alloc_extent(&t, 6000, 200, 200, &start, &len), 0);
	assert_int_equal(start, 6000);
	assert_int_equal(extmap_add(&t, &w->in[0], FORK_DATA, &e), 0);
	e.block = 6010;
	assert_int_equal(extmap_add(&t, &w->in[0], FORK_STAGING, &e), 0);
	assert_int_equal(extmap_add(&t, &w->in[0], FORK_DATA, &at_end), 0);
	trans_commit(&t);
	fixture_begin(w->f, &t, 256);
	e.file = 14;
	assert_int_equal(extmap_add(&t, &w->in[0], FORK_DATA, &e), -ERR_MAP_OVERLAP);
	e.file = 1;
	assert_int_equal(extmap_add(&t, &w->in[0], FORK_DATA, &e), -ERR_MAP_OVERLAP);
	at_end.file += 4;
	assert_int_equal(extmap_add(&t, &w->in[1], FORK_DATA, &at_end), -EFBIG);
	trans_cancel(&t);
	assert_int_equal(extmap_lookup(&w->in[0], FORK_DATA, 7, 100, &got), 0);
	assert_int_equal(got.block, 6002);
	assert_int_equal(extmap_lookup(&w->in[0], FORK_STAGING, 7, 100, &got), 0);
	assert_int_equal(got.block, 6012);
	assert_int_equal(extmap_lookup(&w->in[0], FORK_STAGING, 15, 100, &got), 0);
	assert_int_equal(got.state, EXT_HOLE);
	assert_int_equal(got.len, 100);
	assert_int_equal(extmap_lookup(&w->in[1], FORK_DATA, 7, 100, &got), 0);
	assert_int_equal(got.state, EXT_HOLE);
	fixture_begin(w->f, &t, 256);
	assert_int_equal(extmap_remove(&t, &w->in[0], FORK_DATA, 0, FILE_MAX_BLOCKS, 9, &rest), 0);
	assert_int_equal(rest, 0);
	trans_commit(&t);
	assert_int_equal(extmap_lookup(&w->in[0], FORK_STAGING, 7, 100, &got), 0);
	assert_int_equal(got.state, EXT_WRITTEN);
	assert_int_equal(w->in[0].core.blocks, 10);
	world_destroy(w);
}

/* The length field bounds a record; what continues it is another one. */
static void test_longest_record(void **state)
{
	const nblocks_t max = EXTENT_MAX_BLOCKS;
	struct fixture *f = fixture_create((nblocks_t)1 << 33, (nblocks_t)1 << 33, 1024);
	struct inode in = { .fs = &f->fs, .ino = 4 };
	struct extent first = { 0, 1 << 20, max - 5, EXT_UNWRITTEN, 0 }, second = first, list[4];
	nblocks_t done;
	struct trans t;

	second.file = first.len;
	second.block = first.block + first.len;
	second.len = 5;
	fixture_begin(f, &t, 64);
	assert_int_equal(extmap_add(&t, &in, FORK_DATA, &first), 0);
	assert_int_equal(extmap_add(&t, &in, FORK_DATA, &second), 0);
	trans_commit(&t);
	assert_int_equal(extmap_list(&in, FORK_DATA, 0, FILE_MAX_BLOCKS, false, list, 4), 1);
	second.file += 5;
	second.block += 5;
	second.len = max;
	fixture_begin(f, &t, 64);
	assert_int_equal(extmap_add(&t, &in, FORK_DATA, &second), 0);
	trans_commit(&t);
	assert_int_equal(extmap_list(&in, FORK_DATA, 0, FILE_MAX_BLOCKS, false, list, 4), 2);
	assert_int_equal(list[0].len, max);
	assert_int_equal(list[1].len, max);
	assert_int_equal(list[1].file, max);
	fixture_begin(f, &t, 64);
	assert_int_equal(extmap_set_state(&t, &in, FORK_DATA, max - 1, 2, EXT_WRITTEN, 9, &done), 0);
	assert_int_equal(done, 2);
	trans_commit(&t);
	assert_int_equal(extmap_list(&in, FORK_DATA, 0, FILE_MAX_BLOCKS, false, list, 4), 3);
	assert_int_equal(list[1].file, max - 1);
	assert_int_equal(list[1].len, 2);
	assert_int_equal(in.core.blocks, 2 * max);
	fixture_destroy(f);
}

/* Space runs out in the middle: what was done stands, and the next call says so. */
static void test_allocate_full(void **state)
{
	struct world *w = world_create(46);
	struct alloc_space sp;
	nblocks_t done, total = 0, avail;
	struct trans t;
	int err;

	alloc_statfs(&w->f->fs, &sp);
	avail = sp.avail;
	do {
		fixture_begin(w->f, &t, 512);
		err = extmap_allocate(&t, &w->in[0], FORK_DATA, total, 100000 - total, 0, 100, &done);
		total += err ? 0 : done;
		if (err)
			trans_cancel(&t);
		else
			trans_commit(&t);
	} while (!err);
	assert_int_equal(err, -ENOSPC);
	assert_int_equal(w->in[0].core.blocks, total);
	assert_in_range(total, avail - 8, avail);
	world_destroy(w);
}

/* A record that names an impossible place is an error, not a place. */
static void test_impossible_records(void **state)
{
	const struct { struct extent_disk rec; int err; } bad[] = {
		{ { put64(3), put32(1), EXT_WRITTEN, 0, { 0 } }, -ERR_META_RANGE },
		{ { put64(16383), put32(2), EXT_WRITTEN, 0, { 0 } }, -ERR_META_RANGE },
		{ { put64(UINT64_MAX), put32(2), EXT_WRITTEN, 0, { 0 } }, -ERR_META_RANGE },
		{ { put64(6000), put32(0), EXT_WRITTEN, 0, { 0 } }, -ERR_RECORD_SHAPE },
		{ { put64(6000), put32(0x80000000u), EXT_WRITTEN, 0, { 0 } }, -ERR_RECORD_SHAPE },
		{ { put64(6000), put32(1), EXT_HOLE, 0, { 0 } }, -ERR_RECORD_SHAPE },
		{ { put64(6000), put32(1), 7, 0, { 0 } }, -ERR_RECORD_SHAPE },
	};

	for (unsigned i = 0; i < ARRAY_LEN(bad); i++) {
		struct world *w = world_create(47);
		struct extent e;
		struct trans t;

		fixture_begin(w->f, &t, 64);
		assert_int_equal(bt_insert(&t, fs_tree(&w->f->fs, TREE_EXTENT), KEY(100, 5), &bad[i].rec,
					   sizeof(bad[i].rec)), 0);
		trans_commit(&t);
		assert_int_equal(extmap_lookup(&w->in[0], FORK_DATA, 5, 1, &e), bad[i].err);
		assert_true(fs_is_shutdown(&w->f->fs));
		world_destroy(w);
	}
}

static double seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* 10^5 extents in one file: built in random order, looked up, shared, removed by rolling
 * transactions that keep to their reservation. */
static void test_many_extents(void **state)
{
	const unsigned n = 100000;
	struct fixture *f = fixture_create(1u << 20, 1u << 20, 1024);
	struct inode in = { .fs = &f->fs, .ino = 9 }, copy = { .fs = &f->fs, .ino = 10 };
	double start = seconds(), built, looked, shared, removed;
	unsigned transactions = 0, joined_max = 0;
	nblocks_t done, free_before, all;
	struct alloc_space sp;
	struct extent e;
	struct trans t;
	fileblk_t rest, at;

	alloc_statfs(&f->fs, &sp);
	free_before = sp.free;
	for (unsigned i = 0; i < n; i++) {
		at = (uint64_t)i * 61169 % n * 2; /* every second block, in a scattered order */
		fixture_begin(f, &t, 128);
		assert_int_equal(extmap_allocate(&t, &in, FORK_DATA, at, 1, 0, 1, &done), 0);
		assert_int_equal(extmap_set_state(&t, &in, FORK_DATA, at, 1, EXT_WRITTEN, 1, &done), 0);
		trans_commit(&t);
		if (i % 1000 == 0)
			fixture_commit_group(f, true);
	}
	built = seconds();
	assert_int_equal(bt_records(fs_tree(&f->fs, TREE_EXTENT)), n);
	for (unsigned i = 0; i < 2 * n; i++) {
		assert_int_equal(extmap_lookup(&in, FORK_DATA, i, 10, &e), 0);
		assert_int_equal(e.len, i + 1 == 2 * n ? 10 : 1);
		assert_int_equal(e.state, i % 2 ? EXT_HOLE : EXT_WRITTEN);
	}
	looked = seconds();
	for (at = 0, all = 2 * n; at < all; at += done) {
		fixture_begin(f, &t, 400);
		assert_int_equal(extmap_share(&t, &in, at, all - at, &copy, at, 1000, &done), 0);
		joined_max = MAX(joined_max, t.joined);
		trans_commit(&t);
		transactions++;
	}
	shared = seconds();
	assert_true(joined_max <= 400);
	fixture_commit_group(f, true);
	for (unsigned k = 0; k < 2; k++) {
		rest = 2 * n;
		joined_max = 0;
		while (rest) {
			fixture_begin(f, &t, 400);
			assert_int_equal(extmap_remove(&t, k ? &in : &copy, FORK_DATA, 0, 2 * n, UINT32_MAX,
						       &rest), 0);
			joined_max = MAX(joined_max, t.joined);
			trans_commit(&t);
			transactions++;
		}
		assert_true(joined_max <= 400);
	}
	removed = seconds();
	print_message("%u extents: build %.2f us each, lookup %.0f ns, share %.2f us, remove %.2f us, "
		      "%u transactions\n", n, (built - start) * 1e6 / n, (looked - built) * 1e9 / (2 * n),
		      (shared - looked) * 1e6 / n, (removed - shared) * 1e6 / (2 * n), transactions);
	assert_int_equal(in.core.blocks, 0);
	fixture_reread(f);
	alloc_statfs(&f->fs, &sp);
	/* Nodes of the AG's own trees may be more than before; none of the others is left. */
	assert_true(free_before - sp.free < 2000);
	check_space(&f->fs, NULL);
	fixture_destroy(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_mixed),	       cmocka_unit_test(test_sharing),
		cmocka_unit_test(test_unshared),       cmocka_unit_test(test_convert_whole),
		cmocka_unit_test(test_forks),	       cmocka_unit_test(test_allocate_full),
		cmocka_unit_test(test_impossible_records), cmocka_unit_test(test_many_extents),
		cmocka_unit_test(test_longest_record),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
