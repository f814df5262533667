/* SPDX-License-Identifier: MIT
 *
 * test_commit_race.c - a lost holder commits while what it can write is being copied away: what a
 * commit acknowledged is what anybody reads.
 */
#include "revoke_fixture.h"
#include "tree_check.h"

#define SPAN 256u /* blocks */
#define ROUNDS 60u

static uint64_t read_number(uint64_t off)
{
	struct flight f;
	uint64_t number;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = 0, .off = off, .len = B });
	flight_wait(&f);
	assert_int_equal(f.fop.result, B);
	memcpy(&number, f.fop.buf, sizeof(number));
	flight_end(&f);
	return number;
}

static void rewrites(bool named)
{
	static uint64_t block[B / 8];

	for (unsigned round = 0; round < ROUNDS; round++) {
		uint64_t h = new_holder(0), number = 0, acked = 0, at = below(SPAN) * B, device;
		struct layout_range range = { at, B };
		int rc = 0;

		if (!round)
			assert_int_equal(do_write(0, 0, SPAN * B, 3), SPAN * B);
		OK(get(0, h, IOMODE_RW, 0, SPAN * B, 0));
		device = target(at)->device + (at - target(at)->offset);
		OK(holder_lost(world.fs, h));
		OK(layout_recall(world.file[0], h, IOMODE_ANY, 0, SPAN * B));
		while (!rc) {
			block[0] = ++number;
			OK(sim_poke(world.sim, device, block, B));
			rc = named ? commit_ranges(0, h, &range, 1, 0, 0, LAYOUT_F_LAZY) :
				     commit_ranges(0, h, NULL, 0, 0, 0, LAYOUT_F_LAZY);
			acked = rc ? acked : number;
		}
		layouts_settle(world.fs);
		if (acked && read_number(at) < acked)
			fail_msg("round %u: %llu was acknowledged, %llu is read", round,
				 (unsigned long long)acked, (unsigned long long)read_number(at));
		fence(h);
		event_sink_destroy(world.fs, holder[0].sink);
		holder[0].sink = NULL;
	}
}

static void named_blocks(void **state)
{
	rewrites(true);
}

/* What was written before needs no name. */
static void unnamed_blocks(void **state)
{
	rewrites(false);
}

/* Some was taken: nobody knows that the rewritten blocks were not among them. */
static void unnamed_blocks_after_a_revoke(void **state)
{
	uint64_t h = new_holder(0);

	assert_int_equal(do_write(0, 0, 8 * B, 3), 8 * B);
	OK(get(0, h, IOMODE_RW, 0, 8 * B, 0));
	OK(holder_lost(world.fs, h));
	OK(commit_ranges(0, h, NULL, 0, 0, 0, 0));
	assert_int_equal(do_write(0, 0, B, 5), B);
	assert_int_equal(commit_ranges(0, h, NULL, 0, 0, 0, 0), -EOWNERDEAD);
	OK(commit(0, h, 4 * B, B, 0));
	fence(h);
	check_all_free();
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(named_blocks), T(unnamed_blocks),
		T(unnamed_blocks_after_a_revoke),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
