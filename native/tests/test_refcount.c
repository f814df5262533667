/* SPDX-License-Identifier: MIT
 *
 * Reference counts against one counter a block.
 */
#include "tree_fixture.h"

#include <string.h>

#include "refcount.h"

#define TOTAL 16384u
#define AREA 8192u /* blocks under test, from FIRST on */
#define FIRST 6000u

struct counts { uint32_t of[AREA]; }; /* users of each block; 0: free */

/* All AREA blocks mapped once. */
static struct fixture *setup(struct counts *m)
{
	struct fixture *f = fixture_create(TOTAL, TOTAL, 1024);
	fsblock_t start;
	nblocks_t len;
	struct trans t;

	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_extent(&t, FIRST, AREA, AREA, &start, &len), 0);
	trans_commit(&t);
	assert_int_equal(start, FIRST);
	for (unsigned i = 0; i < AREA; i++)
		m->of[i] = 1;
	return f;
}

static void check(struct fixture *f, const struct counts *m)
{
	uint8_t *mapped = calloc(TOTAL, 1);
	struct bt_cursor c;
	uint64_t end = 0, last_refs = 0, shared = 0, recorded = 0;

	for (unsigned i = 0; i < AREA; i++) {
		mapped[FIRST + i] = m->of[i] > 0;
		shared += m->of[i] > 1;
	}
	check_space(&f->fs, mapped);
	bt_cursor_init(&c, fs_tree(&f->fs, TREE_REFCOUNT));
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		unsigned len;
		const struct refcount_disk *rec = bt_record(&c, &len);
		uint64_t start = bt_key(&c).hi, n = get64(rec->length);

		assert_int_equal(len, sizeof(*rec));
		assert_true(n > 0 && start >= end);
		if (start == end)
			assert_int_not_equal(last_refs, get32(rec->refs));
		for (uint64_t i = 0; i < n; i++)
			assert_int_equal(m->of[start - FIRST + i], get32(rec->refs));
		recorded += n;
		end = start + n;
		last_refs = get32(rec->refs);
	}
	bt_cursor_release(&c);
	assert_int_equal(recorded, shared);
	free(mapped);
}

/* What the queries must say, from the counters; free blocks count as one. */
static void check_query(struct fixture *f, const struct counts *m, unsigned at, unsigned len)
{
	uint32_t refs, want = MAX(m->of[at], 1), want_back = MAX(m->of[at + len - 1], 1);
	nblocks_t run, n = 0;

	while (n < len && MAX(m->of[at + n], 1) == want)
		n++;
	assert_int_equal(refcount_query(&f->fs, FIRST + at, len, &refs, &run), 0);
	assert_int_equal(refs, want);
	assert_int_equal(run, n);
	for (n = 0; n < len && MAX(m->of[at + len - 1 - n], 1) == want_back; n++)
		;
	assert_int_equal(refcount_query_back(&f->fs, FIRST + at, len, &refs, &run), 0);
	assert_int_equal(refs, want_back);
	assert_int_equal(run, n);
}

static void property(uint64_t seed, unsigned ops, unsigned max_len, unsigned add_percent)
{
	struct counts *m = calloc(1, sizeof(*m));
	struct fixture *f = setup(m);
	uint64_t rng = check_seed(seed);

	for (unsigned i = 0; i < ops; i++) {
		unsigned at = (unsigned)(check_random(&rng) % AREA);
		unsigned len = 1 + (unsigned)(check_random(&rng) % MIN(max_len, AREA - at));
		bool add = check_random(&rng) % 100 < add_percent;
		bool cancel = check_random(&rng) % 12 == 0;
		struct trans t;

		for (unsigned k = 0; k < len; k++) /* free blocks have no users to add or drop */
			if (!m->of[at + k])
				len = k;
		if (!len)
			continue;
		fixture_begin(f, &t, 512);
		assert_int_equal(add ? refcount_add(&t, FIRST + at, len)
				     : refcount_drop(&t, FIRST + at, len, 0), 0);
		if (cancel) {
			trans_cancel(&t);
		} else {
			trans_commit(&t);
			for (unsigned k = 0; k < len; k++)
				m->of[at + k] += add ? 1 : (uint32_t)-1;
		}
		check_query(f, m, at, len);
		if (i % 256 == 0)
			fixture_commit_group(f, true);
		if (i % (ops / 6) == 0)
			check(f, m);
	}
	fixture_reread(f);
	check(f, m);
	for (unsigned i = 0; i < AREA; i++) {
		while (m->of[i]) {
			struct trans t;
			uint32_t refs;
			nblocks_t run;

			assert_int_equal(refcount_query(&f->fs, FIRST + i, AREA - i, &refs, &run), 0);
			for (unsigned k = 0; k < run; k++)
				if (!m->of[i + k])
					run = k;
			fixture_begin(f, &t, 512);
			assert_int_equal(refcount_drop(&t, FIRST + i, run, 0), 0);
			trans_commit(&t);
			for (unsigned k = 0; k < run; k++)
				m->of[i + k]--;
		}
	}
	assert_int_equal(bt_height(fs_tree(&f->fs, TREE_REFCOUNT)), 0);
	check(f, m);
	fixture_destroy(f);
	free(m);
}

static void test_small_ranges(void **state) { property(31, 6000, 12, 62); }
static void test_large_ranges(void **state) { property(32, 3000, 900, 60); }
static void test_single_blocks(void **state) { property(33, 12000, 1, 60); }

static void test_drop_to_quarantine(void **state)
{
	struct counts *m = calloc(1, sizeof(*m));
	struct fixture *f = setup(m);
	struct trans t;

	fixture_begin(f, &t, 256);
	assert_int_equal(refcount_add(&t, FIRST + 100, 50), 0);
	assert_int_equal(refcount_drop(&t, FIRST + 80, 100, 9), 0);
	trans_commit(&t);
	/* The shared ones lost a user, the others are in quarantine, none is free. */
	assert_int_equal(get64(fs_root(&f->fs)->quarantined_blocks), 50);
	assert_int_equal(bt_records(fs_tree(&f->fs, TREE_QUARANTINE)), 2);
	for (unsigned i = 80; i < 180; i++)
		if (i < 100 || i >= 150)
			m->of[i] = 0;
	check(f, m);
	fixture_destroy(f);
	free(m);
}

static void test_no_overflow(void **state)
{
	struct counts *m = calloc(1, sizeof(*m));
	struct fixture *f = setup(m);
	struct refcount_disk rec = { put64(10), put32(UINT32_MAX), { 0 } };
	struct trans t;

	fixture_begin(f, &t, 256);
	assert_int_equal(bt_insert(&t, fs_tree(&f->fs, TREE_REFCOUNT), KEY(FIRST, 0), &rec, sizeof(rec)), 0);
	trans_commit(&t);
	fixture_begin(f, &t, 256);
	assert_int_equal(refcount_add(&t, FIRST + 5, 20), -EMLINK);
	trans_cancel(&t);
	fixture_destroy(f);
	free(m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_small_ranges),	   cmocka_unit_test(test_large_ranges),
		cmocka_unit_test(test_single_blocks),	   cmocka_unit_test(test_drop_to_quarantine),
		cmocka_unit_test(test_no_overflow),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
