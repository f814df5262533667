/* SPDX-License-Identifier: MIT
 *
 * test_fence_crash.c - power cuts at every write of the life of a fence, and again while it goes on
 * after the restart: a holder that was harmed has a record that says so or is gone, one with a
 * record does not come back, and as long as the storage lets it write, no block that it was told to
 * write is free or of another file.
 */
#include "lost_fixture.h"
#include "tree_check.h"

#define SEEDS 2u

/* The storage, which no power cut of the server changes. */
static struct { bool registered; } unit;
static unsigned cuts_before_harm, cuts_after_harm;

enum { PLAIN, FAILS, RETURNS, WAYS };
static unsigned way;

static int put(uint64_t id, enum fence_state state, uint32_t tries)
{
	xid_t xid;
	int rc = fence_put(world.fs, id, state, tries, &xid);

	return rc ? rc : jrn_force_blocking(world.fs, xid);
}

static bool record_of(uint64_t id, struct fence *fence)
{
	uint64_t from = id - 1;

	return fence_list(world.fs, &from, fence, 1) && fence->holder == id;
}

static enum holder_state state_of_holder(uint64_t id)
{
	struct holder_look look;
	uint64_t from = id - 1;

	return holder_list(world.fs, &from, &look, 1) && look.id == id ? look.state : HOLDER_GONE;
}

/* ---- the life ------------------------------------------------------------------------------- */

static void prepare(void)
{
	unit.registered = true;
	OK(get(0, new_holder(0), IOMODE_RW, 0, 16 * B, 0));
	memorize(&memories[0]);
	holder_write(0, 16 * B, 3);
	OK(commit(0, holder[0].id, 0, 8 * B, 16 * B));
}

/* It does not answer: what somebody wants is taken from it. */
static void misses_a_recall(void)
{
	struct flight *f = start_write(0, 4 * B, 8 * B, 5);

	turn();
	now += 2 * RECALL_NS;
	layouts_set_clock(world.fs, now);
	(void)finish(f);
	layouts_settle(world.fs);
	settle_on_disk();
}

/* It does after all, when its fence is decided; and what it had goes. */
static void returns_too_late(uint64_t id)
{
	args = (struct layout_args){ .holder = id, .flags = LAYOUT_F_ALL };
	(void)layout_call(FILE_LAYOUT_RETURN, 1);
	(void)holder_lost(world.fs, id);
	unlink_doomed();
	layouts_settle(world.fs);
	settle_on_disk();
	if (world.file[0])
		put_doomed();
	settle_on_disk();
	if (unit.registered && !sim_crashed(world.sim)) {
		assert_int_equal(state_of_holder(id), HOLDER_LOST);
		check_kept(&memories[0], "the holder");
	}
}

/* Durable before anything is released: somebody still uses the holder. */
static bool confirm(uint64_t id)
{
	struct layouts *ls = world.fs->layouts;
	struct holder *h;
	int rc;

	OK(holder_enter(ls, id, false, &h));
	rc = holder_fenced(world.fs, id);
	if (!rc)
		settle_on_disk();
	holder_leave(ls, h);
	layouts_settle(world.fs);
	settle_on_disk();
	return !rc && !sim_crashed(world.sim);
}

/* From wherever it is to its end; false: the power went. */
static bool fence_it(uint64_t id)
{
	struct fence fence = { .state = FENCE_NONE };

	if (state_of_holder(id) != HOLDER_LOST)
		return true;
	if (!record_of(id, &fence) && put(id, FENCE_DECIDED, 0))
		return false;
	if (way == RETURNS)
		returns_too_late(id);
	if (put(id, FENCE_ISSUED, fence.tries + 1))
		return false;
	unit.registered = false;
	/* It is done, but the answer is lost. */
	if (way == FAILS && (put(id, FENCE_FAILED, fence.tries + 1) ||
			     put(id, FENCE_ISSUED, fence.tries + 2)))
		return false;
	return confirm(id);
}

static void life(void)
{
	misses_a_recall();
	if (!fence_it(holder[0].id))
		return;
	/* The blocks may be anybody's. */
	(void)do_write(1, 0, 64 * B, 6);
	settle_on_disk();
}

/* ---- what is true after a cut --------------------------------------------------------------- */

static void check_after_cut(void)
{
	uint64_t id = holder[0].id, records;
	enum holder_state state = state_of_holder(id);
	struct fence fence;
	bool recorded = record_of(id, &fence);

	if (unit.registered)
		check_kept(&memories[0], "the holder");
	fs_rdlock(world.fs);
	records = bt_records(fs_tree(world.fs, TREE_FENCE));
	fs_unlock(world.fs);
	assert_int_equal(records, recorded);
	if (state != HOLDER_LOST) {
		assert_false(unit.registered || recorded);
		return;
	}
	if (!unit.registered && (!recorded || fence.state == FENCE_DECIDED))
		fail_msg("the holder was harmed, and nothing says so");
	if (recorded)
		assert_int_equal(holder_resume(world.fs, id, holder[0].key, holder[0].sink),
				 -EKEYREVOKED);
	if (recorded && fence.state != FENCE_DECIDED)
		assert_int_equal(put(id, FENCE_DECIDED, 9), -EINVAL);
}

static void restart(uint64_t seed)
{
	if (unit.registered)
		cuts_before_harm++;
	else
		cuts_after_harm++;
	reopen(seed);
	check_after_cut();
}

/* Once more, at a place of the seed's choice. */
static void cut_again(uint64_t seed)
{
	sim_crash_at(world.sim, sim_events(world.sim) + 1 + seed * 7 % 23);
	(void)fence_it(holder[0].id);
	restart(seed + 1000);
}

static void at_every_write(void **state)
{
	unsigned whole = 0;

	for (uint64_t n = 1; whole < SEEDS; n++) {
		memset(memories, 0, sizeof(memories));
		doomed = world.file[0]->ino;
		prepare();
		OK(do_fsync(0));
		sim_settle(world.sim);
		sim_crash_at(world.sim, sim_events(world.sim) + 1 + n / SEEDS);
		life();
		whole += !sim_crashed(world.sim);
		restart(n);
		if (n % 2)
			cut_again(n);
		assert_true(fence_it(holder[0].id));
		check_after_cut();
		assert_int_equal(state_of_holder(holder[0].id), HOLDER_GONE);
		tick(3 * RECALL_NS);
		reaper_drain(world.fs);
		check_all_free();
		teardown(NULL);
		setup(NULL);
	}
}

static void cuts_everywhere(void **state)
{
	for (way = 0; way < WAYS; way++) {
		cuts_before_harm = cuts_after_harm = 0;
		at_every_write(state);
		assert_true(cuts_before_harm >= 10 && cuts_after_harm >= 5);
	}
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = { T(cuts_everywhere) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
