/* SPDX-License-Identifier: MIT
 *
 * test_revoke_crash.c - power cuts at every write while a range is taken back from a holder, and
 * while what a fenced one had becomes free: the next mount finds everything consistent, and the
 * holder in nobody's way.
 */
#include "revoke_fixture.h"
#include "tree_check.h"

/* Until the power goes, or to the end. */
static bool revoke_run(uint64_t h)
{
	struct flight *f = start_write(0, 0, B, 5);

	turn();
	now += 2 * RECALL_NS;
	layouts_set_clock(world.fs, now);
	finish(f);
	for (unsigned i = 1; i < 3 && !sim_crashed(world.sim); i++) {
		(void)do_fsync(0);
		(void)do_write(0, i * B, B, 5 + i);
	}
	(void)do_fsync(0);
	(void)do_write(0, 5 * B, B, 8);
	(void)do_fsync(0);
	return sim_crashed(world.sim);
}

static void check_after_cut(uint64_t h)
{
	uint64_t size;
	uint8_t *got = read_all(0, &size);

	assert_int_equal(size, 8 * B);
	assert_false(sim_shows_canary(got, size));
	for (uint64_t i = 0; i < size; i++) {
		bool old = i < 4 * B ? got[i] == pattern_byte(3, i) : got[i] == 0;
		bool new = (i < 3 * B && got[i] == pattern_byte(5 + i / B, i % B)) ||
			   (i >= 5 * B && i < 6 * B && got[i] == pattern_byte(8, i - 5 * B));

		if (!old && !new)
			fail_msg("byte %llu is %#x", (unsigned long long)i, got[i]);
	}
	io_free(got);
	check_disk();
	/* Whatever was reached, the holder is in nobody's way and in nobody's bytes. */
	assert_int_equal(do_write(0, 0, 8 * B, 9), 8 * B);
	write_stale(0xdd);
	expect(0, 0, 8 * B, 9);
	fence(h);
	check_all_free();
}

#define SEEDS 3u

static void power_cuts(void **state)
{
	unsigned cuts = 0, whole = 0;

	for (uint64_t n = 1; whole < SEEDS; n++) {
		uint64_t h = half_committed();
		bool crashed;

		OK(do_fsync(0));
		sim_settle(world.sim);
		sim_crash_at(world.sim, sim_events(world.sim) + 1 + n / SEEDS);
		crashed = revoke_run(h);
		sim_crash_at(world.sim, 0);
		cuts += crashed;
		whole += !crashed;
		put_files();
		inode_put(world.root);
		fs_abandon(world.fs);
		sinks_gone();
		sim_restart(world.sim, n);
		OK(world_open());
		set_clock();
		find_files();
		check_after_cut(h);
		teardown(NULL);
		setup(NULL);
	}
	assert_true(cuts > 10 * SEEDS);
}

/* Cuts between the decision that a holder is fenced and the end of what follows. */
static void power_cuts_of_a_fence(void **state)
{
	unsigned cuts = 0, whole = 0;

	for (uint64_t n = 1; whole < SEEDS; n++) {
		uint64_t h = half_committed();
		struct holder_look look;
		uint64_t from = 0;

		OK(get(1, h, IOMODE_RW, 0, 8 * B, LAYOUT_F_ATOMIC));
		OK(holder_lost(world.fs, h));
		assert_int_equal(do_write(0, 0, 4 * B, 5), 4 * B);
		OK(do_fsync(0));
		sim_settle(world.sim);
		sim_crash_at(world.sim, sim_events(world.sim) + 1 + n / SEEDS);
		(void)holder_fenced(world.fs, h);
		for (unsigned i = 0; i < 3 && !sim_crashed(world.sim); i++) {
			layouts_settle(world.fs);
			(void)do_write(2, 0, B, 6);
			(void)do_fsync(2);
		}
		cuts += sim_crashed(world.sim);
		whole += !sim_crashed(world.sim);
		sim_crash_at(world.sim, 0);
		put_files();
		inode_put(world.root);
		fs_abandon(world.fs);
		sinks_gone();
		sim_restart(world.sim, n);
		OK(world_open());
		set_clock();
		find_files();
		layouts_settle(world.fs);
		expect(0, 0, 4 * B, 5);
		if (holder_list(world.fs, &from, &look, 1) && look.state != HOLDER_GONE)
			fence(h);
		check_all_free();
		teardown(NULL);
		setup(NULL);
	}
	assert_true(cuts > 2 * SEEDS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(power_cuts, setup, teardown),
		cmocka_unit_test_setup_teardown(power_cuts_of_a_fence, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
