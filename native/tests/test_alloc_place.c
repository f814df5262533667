/* SPDX-License-Identifier: MIT
 *
 * test_alloc_place.c - where the allocator puts what grows, and what it takes when that is busy.
 */
#include "alloc_fixture.h"
#include "tree_fixture.h"

/* A GiB on an empty filesystem comes in at most two extents; appends continue where the file
 * ended. */
static void test_large_and_append(void **state)
{
	struct fixture *f = fixture_create(2u << 20, 1u << 20, 4096); /* 8 GiB */
	nblocks_t want = 1u << 18, len;
	unsigned extents = 0;
	fsblock_t start, goal = alloc_goal_for_inode(&f->fs, 77, 1);

	while (want) {
		assert_int_equal(extent_of(f, goal, 1, want, &start, &len), 0);
		want -= len;
		goal = start + len;
		extents++;
	}
	assert_true(extents <= 2);
	for (unsigned i = 0; i < 2000; i++) {
		assert_int_equal(extent_of(f, goal, 1, 8, &start, &len), 0);
		assert_int_equal(start, goal);
		goal += len;
	}
	fixture_destroy(f);
}

/* Two files that grow side by side from their own goals stay in one piece each; metadata does not
 * come between. */
static void test_side_by_side(void **state)
{
	struct fixture *f = fixture_create(8u << 20, 8u << 20, 4096); /* 32 GiB in one group */
	fsblock_t goal[4], start, meta;
	unsigned breaks = 0;
	nblocks_t len;

	for (unsigned i = 0; i < 4; i++)
		goal[i] = alloc_goal_for_inode(&f->fs, 100 + i, 1);
	for (unsigned i = 0; i < 4000; i++) {
		struct trans t;

		assert_int_equal(extent_of(f, goal[i % 4], 1, 4, &start, &len), 0);
		breaks += start != goal[i % 4];
		goal[i % 4] = start + len;
		fixture_begin(f, &t, 64);
		assert_int_equal(alloc_meta(&t, goal[0], &meta), 0);
		trans_commit(&t);
	}
	assert_true(breaks <= 4);
	fixture_destroy(f);
}

#define GROWERS 12u

/* In how many pieces are files that grow by turns? */
static unsigned grow_by_turns(struct fixture *f, bool windows, unsigned rounds)
{
	fsblock_t next[GROWERS] = { 0 };
	unsigned pieces = 0;

	for (unsigned i = 0; i < rounds * GROWERS; i++) {
		unsigned k = i % GROWERS;
		fsblock_t goal = next[k] ? next[k] : alloc_goal_for_inode(&f->fs, 500 + k, 1), start;
		struct trans t;
		nblocks_t len;

		fixture_begin(f, &t, 128);
		t.grows = windows ? 500 + k : 0;
		t.continues = next[k];
		assert_int_equal(alloc_extent(&t, goal, 1, 8, &start, &len), 0);
		trans_commit(&t);
		pieces += start != next[k];
		next[k] = start + len;
	}
	return pieces;
}

static void test_grow_by_turns(void **state)
{
	for (unsigned windows = 0; windows < 2; windows++) {
		struct fixture *f = fixture_create(1u << 18, 1u << 18, 4096);
		unsigned pieces = grow_by_turns(f, windows, 1000);

		print_message("%u files in %u pieces\n", GROWERS, pieces);
		if (windows)
			assert_true(pieces <= 3 * GROWERS);
		else
			assert_true(pieces > 100); /* or the test shows nothing */
		fixture_destroy(f);
	}
}

/* Blocks in windows are nobody's when there are no others: everybody gets the last one. */
static void test_windows_give_way(void **state)
{
	struct fixture *f = fixture_create(65536, 16384, 1024);
	nblocks_t len, avail;
	struct alloc_space sp;
	fsblock_t start;
	int err;

	grow_by_turns(f, true, 200);
	do {
		alloc_statfs(&f->fs, &sp);
		avail = sp.avail;
		err = extent_of(f, 0, 1, 100, &start, &len);
	} while (!err);
	assert_int_equal(err, -ENOSPC);
	assert_true(avail < 8);
	fixture_destroy(f);
}

/* A file that does not grow any more keeps nothing: the next one comes right behind it. */
static void test_window_ends_with_the_file(void **state)
{
	struct fixture *f = fixture_create(65536, 65536, 1024);

	for (unsigned closed = 0; closed < 2; closed++) {
		fsblock_t first, second;
		nblocks_t len;
		struct trans t;

		fixture_begin(f, &t, 128);
		t.grows = 10 + closed;
		assert_int_equal(alloc_extent(&t, 20000 + closed * 10000, 8, 8, &first, &len), 0);
		trans_commit(&t);
		if (closed)
			alloc_grown(&f->fs, 10 + closed);
		assert_int_equal(extent_of(f, first + len, 8, 8, &second, &len), 0);
		assert_int_equal(second == first + 8, closed);
	}
	fixture_destroy(f);
}

/* All that is near, and all that is short, is busy: a long extent gives the block, and nothing has to be committed first. */
static void test_one_block_among_busy_ones(void **state)
{
	struct fixture *f = fixture_create(65536, 65536, 1024);
	fsblock_t start, first = 0;
	nblocks_t len;

	for (unsigned i = 0; i < 400; i++) {
		assert_int_equal(extent_of(f, i ? first + i : 20000, 1, 1, &start, &len), 0);
		if (!i)
			first = start;
		assert_int_equal(start, first + i);
	}
	fixture_commit_group(f, true);
	for (unsigned i = 0; i < 400; i += 2)
		give_back(f, first + i, 1);
	assert_int_equal(extent_of(f, first + 200, 1, 1, &start, &len), 0);
	assert_int_equal(extent_of(f, 0, 1, 1, &start, &len), 0);
	assert_true(start < first || start >= first + 400);
	fixture_destroy(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_large_and_append),
		cmocka_unit_test(test_side_by_side),
		cmocka_unit_test(test_grow_by_turns),
		cmocka_unit_test(test_windows_give_way),
		cmocka_unit_test(test_window_ends_with_the_file),
		cmocka_unit_test(test_one_block_among_busy_ones),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
