/* SPDX-License-Identifier: MIT
 *
 * test_inode.c - records, lookup counts, the in-memory table, orphans, lazily written times.
 */
#include "names_fixture.h"

#include "btree.h"
#include "lookup_table.h"

/* ---- lookup counts ---- */

static uint64_t rng_state;

static uint64_t rng(void)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return rng_state;
}

#define MODEL 5000u

static void counts_agree_with_a_plain_array(void **state)
{
	for (uint64_t seed = 1; seed <= 20; seed++) {
		static uint64_t model[MODEL];
		struct lookup_table lt = {0};
		uint64_t entries = 0;

		memset(model, 0, sizeof(model));
		rng_state = seed * 0x1234567;
		for (unsigned i = 0; i < 40000; i++) {
			/* Mostly growing, then mostly shrinking, so that it is resized both
			 * ways. */
			bool grow = rng() % 10 < (i < 20000 ? 7 : 3);
			uint64_t at = rng() % MODEL, n = rng() % 4, before = model[at];

			if (grow) {
				OK(lookup_table_add(&lt, at + 1, n));
				model[at] += n;
			} else {
				model[at] = n >= before ? 0 : before - n;
				assert_int_equal(lookup_table_sub(&lt, at + 1, n), model[at]);
			}
			entries += (model[at] != 0) - (before != 0);
			assert_int_equal(lt.entries, entries);
		}
		for (unsigned at = 0; at < MODEL; at++)
			assert_int_equal(lookup_table_count(&lt, at + 1), model[at]);
		lookup_table_clear(&lt);
	}
}

static void a_million_lookups_fit_32_megabytes(void **state)
{
	struct inode_stats st;

	for (inum_t ino = 100; ino < 100 + 1000000; ino++)
		inode_lookup_add(world.fs, ino, 1);
	inode_get_stats(world.fs, &st);
	assert_int_equal(st.lookups, 1000000);
	assert_true(st.lookup_bytes <= 32 << 20);
	for (inum_t ino = 100; ino < 100 + 1000000; ino++)
		assert_true(inode_lookup_forget(world.fs, ino, 1));
	inode_get_stats(world.fs, &st);
	assert_int_equal(st.lookups, 0);
	assert_true(st.lookup_bytes <= 1 << 20);
}

static void forgetting_too_much_is_harmless(void **state)
{
	inode_lookup_add(world.fs, 77, 3);
	assert_false(inode_lookup_forget(world.fs, 77, 2));
	assert_true(inode_lookup_forget(world.fs, 77, 5));
	assert_true(inode_lookup_forget(world.fs, 77, 1));
	assert_int_equal(inode_lookup_entries(world.fs), 0);
}

/* ---- records ---- */

static void a_record_keeps_every_field(void **state)
{
	struct inode_core a, b;
	struct inode_disk d;

	memset(&a, 0, sizeof(a));
	a = (struct inode_core){
		.generation = 1, .mode = 0100644, .uid = 2, .gid = 3, .nlink = 4, .flags = 5,
		.size = 1ull << 62, .blocks = 7,
		.atime = {-8, 9}, .mtime = {10, 11}, .ctime = {12, 13}, .btime = {14, 999999999},
		.rdev = 16, .parent = 1ull << 63, .change = 18, .subdirs = 19, .xattrs = 20,
	};
	inode_encode(&a, &d);
	memset(&b, 0xff, sizeof(b));
	inode_decode(&d, &b);
	assert_int_equal(b.atime.sec, -8);
	assert_int_equal(b.btime.nsec, 999999999);
	assert_int_equal(b.parent, 1ull << 63);
	inode_encode(&b, &d);
	inode_decode(&d, &a);
	assert_int_equal(a.size, b.size);
	assert_int_equal(a.mode, b.mode);
	assert_int_equal(a.nlink, b.nlink);
	assert_int_equal(a.change, b.change);
	assert_int_equal(a.xattrs, b.xattrs);
	assert_int_equal(a.rdev, b.rdev);
	assert_int_equal(a.blocks, b.blocks);
	assert_int_equal(a.subdirs, b.subdirs);
}

static void numbers_rise_and_a_cancel_takes_its_number_back(void **state)
{
	struct inode *a = make_file(world.root, "a"), *gone = NULL, *b, *other;
	uint64_t inodes = get64(fs_root(world.fs)->inodes);
	struct trans t;
	inum_t number;

	OK(trans_begin(world.fs, &t, INODE_TRANS_BLOCKS));
	OK(inode_create(&t, S_IFREG | 0600, 0, 0, 0, 0, 1, &gone));
	number = gone->ino;
	assert_int_equal(number, a->ino + 1);
	trans_cancel(&t);
	/* The number is free again while the object that had it still lives. */
	b = make_file(world.root, "b");
	assert_int_equal(b->ino, number);
	assert_ptr_not_equal(b, gone);
	inode_put(gone);
	OK(inode_get_handle(world.fs, number, b->core.generation, &other));
	assert_ptr_equal(other, b);
	assert_int_equal(get64(fs_root(world.fs)->inodes), inodes + 1);
	inode_put(other);
	inode_put(b);
	inode_put(a);
}

static void a_handle_of_another_generation_is_stale(void **state)
{
	struct inode *a = make_file(world.root, "a"), *found;

	assert_int_equal(inode_get_handle(world.fs, a->ino, a->core.generation + 1, &found),
			 -ERR_STALE_HANDLE);
	assert_int_equal(inode_get_handle(world.fs, 99999, 1, &found), -ERR_STALE_HANDLE);
	OK(inode_get_handle(world.fs, a->ino, a->core.generation, &found));
	assert_ptr_equal(found, a);
	inode_put(found);
	inode_put(a);
}

static void unused_inodes_are_bounded(void **state)
{
	struct inode_stats st;
	char name[16];
	inum_t first = 0;

	world_unmount();
	world.opt.inode_cache = 50;
	world_mount();
	for (unsigned i = 0; i < 500; i++) {
		struct inode *in;

		snprintf(name, sizeof(name), "f%u", i);
		in = make_file(world.root, name);
		if (i == 0)
			first = in->ino;
		inode_put(in);
	}
	inode_get_stats(world.fs, &st);
	assert_int_equal(st.unused, 50);
	assert_true(st.cached <= 52);
	assert_int_equal(number_of(world.root, "f0"), first);
}

/* What a file has still to wait for is not forgotten with its object. */
static void fsync_of_an_evicted_inode_waits_for_its_group(void **state)
{
	struct inode *in;
	char name[16];

	world_unmount();
	world.opt.inode_cache = 4;
	world.opt.commit_ms = 600000;
	world_mount();
	for (unsigned i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "f%u", i);
		inode_put(make_file(world.root, name));
	}
	OK(namei_lookup(world.root, "f0", 2, &in));
	assert_true(in->xid > 0);
	OK(jrn_force_blocking(world.fs, in->xid));
	world_crash(9);
	assert_true(number_of(world.root, "f0") != 0);
}

/* ---- orphans ---- */

static uint64_t inode_count(void)
{
	uint64_t n;

	reaper_drain(world.fs);
	fs_rdlock(world.fs);
	n = get64(fs_root(world.fs)->inodes);
	fs_unlock(world.fs);
	return n;
}

static void an_orphan_lives_until_its_last_user_goes(void **state)
{
	uint64_t before = inode_count();
	struct inode *in = make_file(world.root, "a"), *again;
	uint32_t generation = in->core.generation;
	inum_t ino = in->ino;

	inode_lookup_add(world.fs, ino, 2);
	inode_open(in);
	OK(namei_unlink(world.root, "a", 1, NULL));
	inode_put(in);
	assert_int_equal(inode_count(), before + 1); /* open and known */
	inode_close(in);
	assert_int_equal(inode_count(), before + 1); /* known */
	OK(inode_get_handle(world.fs, ino, generation, &again));
	assert_false(inode_lookup_forget(world.fs, ino, 1));
	assert_true(inode_lookup_forget(world.fs, ino, 1));
	assert_int_equal(inode_count(), before + 1); /* referenced */
	inode_put(again);
	assert_int_equal(inode_count(), before);
	assert_int_equal(inode_get_handle(world.fs, ino, generation, &again), -ERR_STALE_HANDLE);
}

static void the_last_forget_frees_an_orphan(void **state)
{
	uint64_t before = inode_count();
	struct inode *in = make_file(world.root, "a");
	inum_t ino = in->ino;

	inode_lookup_add(world.fs, ino, 1);
	inode_put(in);
	OK(namei_unlink(world.root, "a", 1, NULL));
	assert_int_equal(inode_count(), before + 1);
	assert_true(inode_lookup_forget(world.fs, ino, 1));
	assert_int_equal(inode_count(), before);
}

static void a_crash_frees_orphans_at_the_next_mount(void **state)
{
	uint64_t before = inode_count();
	struct inode *in = make_file(world.root, "a");

	OK(namei_unlink(world.root, "a", 1, NULL));
	OK(jrn_force_blocking(world.fs, in->xid));
	world_crash(5);
	assert_int_equal(inode_count(), before);
	assert_int_equal(number_of(world.root, "a"), 0);
}

/* ---- times ---- */

static void lazy_times_survive_a_clean_unmount(void **state)
{
	struct inode *in = make_file(world.root, "a");
	struct timestamp before = in->core.mtime, now;
	uint64_t change = in->core.change;

	fs_rdlock(world.fs);
	inode_touch_lazy(in, TOUCH_MTIME | TOUCH_CTIME);
	fs_unlock(world.fs);
	now = core_of(in).mtime;
	assert_true(now.sec > before.sec || now.nsec > before.nsec);
	assert_int_equal(core_of(in).change, change + 1);
	inode_put(in);
	world_remount();
	OK(namei_lookup(world.root, "a", 1, &in));
	assert_int_equal(core_of(in).mtime.sec, now.sec);
	assert_int_equal(core_of(in).mtime.nsec, now.nsec);
	inode_put(in);
}

static void flushing_lazy_times_makes_them_durable(void **state)
{
	struct inode *in[100];
	struct inode_stats st;
	struct timestamp now;
	char name[8];

	for (unsigned i = 0; i < ARRAY_LEN(in); i++) {
		snprintf(name, sizeof(name), "%u", i);
		in[i] = make_file(world.root, name);
		fs_rdlock(world.fs);
		inode_touch_lazy(in[i], TOUCH_ATIME);
		fs_unlock(world.fs);
	}
	now = core_of(in[42]).atime;
	OK(inode_flush_lazy_one(in[42]));
	OK(jrn_force_blocking(world.fs, in[42]->xid));
	for (unsigned i = 0; i < ARRAY_LEN(in); i++)
		inode_put(in[i]);
	OK(inode_flush_lazy(world.fs, UINT32_MAX));
	inode_get_stats(world.fs, &st);
	assert_int_equal(st.lazy, 0);
	world_crash(3);
	OK(namei_lookup(world.root, "42", 2, &in[0]));
	assert_int_equal(core_of(in[0]).atime.nsec, now.nsec);
	inode_put(in[0]);
}

static void a_cancelled_write_leaves_the_inode_lazy(void **state)
{
	struct inode_stats st;
	struct inode *in;
	struct trans t;

	world_unmount();
	world.opt.commit_ms = 600000; /* the journal's thread writes no times meanwhile */
	world_mount();
	in = make_file(world.root, "a");
	fs_rdlock(world.fs);
	inode_touch_lazy(in, TOUCH_ATIME);
	fs_unlock(world.fs);
	OK(trans_begin(world.fs, &t, 1));
	assert_true(in->lazy);
	OK(trans_join_inode(&t, in));
	OK(inode_write(&t, in));
	assert_false(in->lazy);
	trans_cancel(&t);
	assert_true(in->lazy);
	inode_get_stats(world.fs, &st);
	assert_int_equal(st.lazy, 1);
	OK(inode_flush_lazy_one(in));
	assert_false(in->lazy);
	inode_put(in);
}

static void relatime_follows_mount_8(void **state)
{
	struct inode *in = make_file(world.root, "a");
	struct timestamp now = time_now();
	struct attr_change ch = {.valid = ATTR_ATIME | ATTR_MTIME | ATTR_CTIME};

	/* as old as mtime */
	ch.atime = ch.mtime = ch.ctime = (struct timestamp){now.sec - 3600, 5};
	OK(namei_setattr(in, &ch));
	assert_true(inode_wants_atime(in));
	/* newer than both, within a day */
	ch.atime.nsec = 6;
	OK(namei_setattr(in, &ch));
	assert_false(inode_wants_atime(in));
	/* ctime newer */
	ch.ctime.nsec = 7;
	OK(namei_setattr(in, &ch));
	assert_true(inode_wants_atime(in));
	/* newer than both, but more than a day old */
	ch.atime = (struct timestamp){now.sec - 90000, 6};
	ch.mtime = ch.ctime = (struct timestamp){now.sec - 90001, 0};
	OK(namei_setattr(in, &ch));
	assert_true(inode_wants_atime(in));
	world.fs->opt.atime = ATIME_NONE;
	assert_false(inode_wants_atime(in));
	ch.atime = now;
	OK(namei_setattr(in, &ch));
	world.fs->opt.atime = ATIME_STRICT;
	assert_true(inode_wants_atime(in));
	world.fs->opt.atime = ATIME_RELATIME;
	inode_put(in);
}

int main(void)
{
#define INODE_TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(counts_agree_with_a_plain_array),
		cmocka_unit_test(a_record_keeps_every_field),
		INODE_TEST(a_million_lookups_fit_32_megabytes),
		INODE_TEST(forgetting_too_much_is_harmless),
		INODE_TEST(numbers_rise_and_a_cancel_takes_its_number_back),
		INODE_TEST(a_handle_of_another_generation_is_stale),
		INODE_TEST(unused_inodes_are_bounded),
		INODE_TEST(fsync_of_an_evicted_inode_waits_for_its_group),
		INODE_TEST(an_orphan_lives_until_its_last_user_goes),
		INODE_TEST(the_last_forget_frees_an_orphan),
		INODE_TEST(a_crash_frees_orphans_at_the_next_mount),
		INODE_TEST(lazy_times_survive_a_clean_unmount),
		INODE_TEST(flushing_lazy_times_makes_them_durable),
		INODE_TEST(a_cancelled_write_leaves_the_inode_lazy),
		INODE_TEST(relatime_follows_mount_8),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
