/* SPDX-License-Identifier: MIT
 *
 * test_lost_crash.c - power cuts at every write while a file that lost holders were told about goes
 * away: until a holder is fenced, no block that it was told to write is free or of another file.
 */
#include "lost_fixture.h"
#include "tree_check.h"

#define SEEDS 3u
#define LONG_MS 3600000u

/* prepare() ends with what is durable; act() runs until the power goes, or to its end. */
static void cut_everywhere(unsigned holders, void (*prepare)(void), void (*act)(void))
{
	unsigned cuts = 0, whole = 0;

	for (uint64_t n = 1; whole < SEEDS; n++) {
		bool crashed;

		memset(memories, 0, sizeof(memories));
		doomed = world.file[0]->ino;
		prepare();
		OK(do_fsync(0));
		sim_settle(world.sim);
		sim_crash_at(world.sim, sim_events(world.sim) + 1 + n / SEEDS);
		act();
		settle_on_disk();
		crashed = sim_crashed(world.sim);
		cuts += crashed;
		whole += !crashed;
		reopen(n);
		for (unsigned i = 0; i < holders; i++) {
			for (unsigned j = i; j < holders; j++)
				check_kept(&memories[j], j ? "the second holder" : "the holder");
			fence_if_there(holder[i].id);
		}
		tick(3 * RECALL_NS);
		reaper_drain(world.fs);
		check_all_free();
		teardown(NULL);
		setup(NULL);
	}
	assert_true(cuts >= 2 * SEEDS);
}

/* ---- the end of a PIN ----------------------------------------------------------------------- */

static void rw_and_pin(void)
{
	uint64_t h = new_holder(0);

	OK(get(0, h, IOMODE_RW, 0, 8 * B, 0));
	memorize(&memories[0]);
	set_get(h, IOMODE_PIN, 16 * B, 8 * B, 0);
	args.time_ms = LONG_MS;
	OK(layout_call(FILE_LAYOUT_GET, 0));
}

/* Some is taken for a writer, the rest by the unlink; then the PIN is over, the last thing that the
 * holder had. Each durable before the next. */
static void pin_ends(void)
{
	struct flight *f = start_write(0, 0, B, 5);

	turn();
	now += 2 * RECALL_NS;
	layouts_set_clock(world.fs, now);
	finish(f);
	settle_on_disk();
	unlink_doomed();
	layouts_settle(world.fs);
	settle_on_disk();
	tick(2 * LONG_MS * 1000000ull);
	settle_on_disk();
	put_doomed();
	settle_on_disk();
}

static void pin_of_a_lost_holder(void **state)
{
	cut_everywhere(1, rw_and_pin, pin_ends);
}

/* ---- a holder that came back ---------------------------------------------------------------- */

static void only_rw(void)
{
	OK(get(0, new_holder(0), IOMODE_RW, 0, 8 * B, 0));
	memorize(&memories[0]);
}

/* It does not hear of what was taken, takes something else and returns that. */
static void comes_back(void)
{
	OK(holder_lost(world.fs, holder[0].id));
	unlink_doomed();
	layouts_settle(world.fs);
	settle_on_disk();
	if (holder_resume(world.fs, holder[0].id, holder[0].key, holder[0].sink))
		return;
	(void)get(0, holder[0].id, IOMODE_READ, 16 * B, 8 * B, 0);
	(void)give_back(0, holder[0].id, IOMODE_READ, 16 * B, 8 * B);
	settle_on_disk();
	put_doomed();
	settle_on_disk();
}

static void return_of_a_resumed_holder(void **state)
{
	cut_everywhere(1, only_rw, comes_back);
}

/* ---- blocks that more than one holder could reach ------------------------------------------- */

/* How they got their halves. */
static enum { PLAIN, COMMITTED, ATOMIC, WAYS } way;

static void two_halves(void)
{
	if (way == ATOMIC)
		assert_int_equal(do_write(0, 0, 16 * B, 4), 16 * B);
	for (unsigned i = 0; i < 2; i++) {
		OK(get(0, new_holder(i), IOMODE_RW, i * 8 * B, 8 * B,
		       way == ATOMIC ? LAYOUT_F_ATOMIC : 0));
		memorize(&memories[i]);
		if (way == COMMITTED)
			OK(commit(0, holder[i].id, i * 8 * B, 4 * B, (i * 8 + 4) * B));
	}
	assert_true(memories[0].n == 8 && memories[1].n == 8);
}

static void both_lost(void)
{
	OK(holder_lost(world.fs, holder[0].id));
	OK(holder_lost(world.fs, holder[1].id));
	unlink_doomed();
	layouts_settle(world.fs);
	settle_on_disk();
	put_doomed();
	settle_on_disk();
}

static void one_fenced(void)
{
	both_lost();
	memories[0].n = 0; /* whenever the cut comes: it has stopped */
	(void)holder_fenced(world.fs, holder[0].id);
	layouts_settle(world.fs);
	settle_on_disk();
}

static void one_returns(void)
{
	both_lost();
	memories[0].n = 0;
	if (sim_crashed(world.sim))
		return;
	args = (struct layout_args){ .holder = holder[0].id, .flags = LAYOUT_F_ALL };
	(void)layout_call(FILE_LAYOUT_RETURN, 1);
	layouts_settle(world.fs);
	settle_on_disk();
}

/* What is not for nothing: a cut, a hole and a file of the same size in between. */
static void cut_and_punched(void)
{
	OK(holder_lost(world.fs, holder[0].id));
	OK(holder_lost(world.fs, holder[1].id));
	(void)do_truncate(0, 6 * B);
	settle_on_disk();
	(void)do_one(&(struct todo){ .act = ACT_PUNCH, .file = 0, .off = 0, .len = 4 * B });
	settle_on_disk();
	(void)do_write(1, 0, 32 * B, 6);
	settle_on_disk();
	both_lost();
}

static void everyway(void (*act)(void))
{
	for (way = 0; way < WAYS; way++)
		cut_everywhere(2, two_halves, act);
	way = 0;
}

/* The file and all records of it are gone; what is kept names nobody. */
static void kept_from_two_holders(void **state)
{
	everyway(both_lost);
}

static void one_of_two_is_fenced(void **state)
{
	everyway(one_fenced);
}

static void one_of_two_returns(void **state)
{
	everyway(one_returns);
}

static void map_changes_of_others(void **state)
{
	everyway(cut_and_punched);
}

/* ---- records of a holder that goes ---------------------------------------------------------- */

static uint64_t records_of_exposure(void)
{
	uint64_t n;

	fs_rdlock(world.fs);
	n = bt_records(fs_tree(world.fs, TREE_EXPOSURE));
	fs_unlock(world.fs);
	return n;
}

/* A record of what a holder was told does not outlive the holder's own. */
static void nothing_outlives_a_holder(void **state)
{
	uint64_t h = new_holder(0);

	OK(get(0, h, IOMODE_RW, 0, 8 * B, 0));
	OK(holder_lost(world.fs, h));
	assert_int_equal(do_write(0, 0, 16 * B, 5), 16 * B);
	OK(give_back_all(h));
	layouts_settle(world.fs);
	OK(holder_gone(world.fs, h));
	layouts_settle(world.fs);
	assert_int_equal(records_of_exposure(), 0);
	check_all_free();
}

/* It returned everything, and ended while its quarantine was being released: then it has nothing,
 * and nobody need fence it. */
static void returned_and_ended(void **state)
{
	for (unsigned n = 0; n < 50; n++) {
		uint64_t h = new_holder(0), from = h - 1;
		struct holder_look look;

		OK(get(0, h, IOMODE_RW, 0, 64 * B, 0));
		OK(holder_lost(world.fs, h));
		assert_int_equal(do_truncate(0, 0), 0);
		assert_int_equal(do_write(0, 0, 64 * B, 5), 64 * B);
		OK(give_back_all(h));
		OK(holder_lost(world.fs, h));
		layouts_settle(world.fs);
		layouts_settle(world.fs);
		if (holder_list(world.fs, &from, &look, 1) && look.id == h)
			fail_msg("round %u: it is still there", n);
		event_sink_destroy(world.fs, holder[0].sink);
		holder[0].sink = NULL;
	}
	check_all_free();
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(pin_of_a_lost_holder),
		T(return_of_a_resumed_holder),
		T(kept_from_two_holders),
		T(one_of_two_is_fenced),
		T(one_of_two_returns),
		T(map_changes_of_others),
		T(nothing_outlives_a_holder),
		T(returned_and_ended),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
