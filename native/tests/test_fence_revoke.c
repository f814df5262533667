/* SPDX-License-Identifier: MIT
 *
 * test_fence_revoke.c - a fence is confirmed milliseconds after the deadline of a recall, when the
 * revoke of what was recalled has hardly begun: whichever comes first, nobody's bytes change, and
 * every block is free in the end.
 *
 * The revoke runs on the layouts' thread; the fence comes when the device has seen so many writes
 * and flushes since the deadline, and, for the moments between those, after a little while more.
 */
#include "revoke_fixture.h"
#include "tree_check.h"

#define BIG 320u   /* blocks of the file; every other one is a piece of its own to the revoke */
#define FROM 32u   /* somebody writes [FROM, TO) */
#define TO 288u
#define MOMENTS 40u
#define WAIT_NS 20000000ull

static uint64_t ticks(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static void wait_for_events(uint64_t n, uint64_t then_ns)
{
	uint64_t end = ticks() + WAIT_NS;

	while (sim_events(world.sim) < n && ticks() < end)
		;
	for (end = ticks() + then_ns; ticks() < end;)
		;
}

/* ---- what the holder has -------------------------------------------------------------------- */

/* It has written all (pattern 3), and committed the even blocks: to be copied; the odd ones are to
 * leave the map. */
static uint64_t every_other(void)
{
	static struct layout_range ranges[BIG / 2];
	uint64_t h = new_holder(0);

	OK(get(0, h, IOMODE_RW, 0, BIG * B, 0));
	holder_write(0, BIG * B, 3);
	for (unsigned i = 0; i < BIG / 2; i++)
		ranges[i] = (struct layout_range){ 2 * i * B, B };
	OK(commit_ranges(0, h, ranges, BIG / 2, BIG * B, 0, 0));
	return h;
}

/* The even blocks were written before (pattern 3); then it got new blocks for all, and wrote
 * them. */
static uint64_t atomic(void)
{
	uint64_t h;

	for (unsigned i = 0; i < BIG; i += 2)
		assert_int_equal(do_write(0, i * B, B, 3), B);
	OK(do_truncate(0, BIG * B));
	h = new_holder(0);
	OK(get(0, h, IOMODE_RW, 0, BIG * B, LAYOUT_F_ATOMIC));
	holder_write(0, BIG * B, 9);
	return h;
}

/* Of the pattern that the holder wrote over the whole range. */
static void expect_at(unsigned block)
{
	struct flight f;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = 0, .off = block * B, .len = B });
	flight_wait(&f);
	assert_int_equal(f.fop.result, B);
	for (unsigned i = 0; i < B; i++)
		assert_int_equal(((uint8_t *)f.fop.buf)[i], pattern_byte(3, block * B + i));
	flight_end(&f);
}

static void expect_blocks(uint64_t (*prepare)(void))
{
	for (unsigned i = 0; i < BIG; i++) {
		if (i >= FROM && i < TO)
			continue;
		if (i % 2)
			expect(0, i * B, B, 0);
		else if (prepare == atomic)
			expect(0, i * B, B, 3);
		else
			expect_at(i);
	}
	expect(0, FROM * B, (TO - FROM) * B, 5);
}

/* ---- the race ------------------------------------------------------------------------------- */

static struct { unsigned before, middle, after; } came;

static void fenced_at(uint64_t (*prepare)(void), uint64_t events, uint64_t then_ns)
{
	uint64_t h = prepare(), before, revokes;
	struct flight *f = start_write(0, FROM * B, (TO - FROM) * B, 5);
	const struct layout_counters *c = layouts_counters(world.fs);

	turn();
	before = sim_events(world.sim);
	now += 2 * RECALL_NS;
	layouts_set_clock(world.fs, now);
	wait_for_events(before + events, then_ns);
	while (holder_fenced(world.fs, h) == -EBUSY)
		; /* the deadline has not been seen yet */
	revokes = atomic_load(&c->revokes);
	if (revokes)
		came.after++;
	else if (atomic_load(&c->relocated_blocks) + atomic_load(&c->revoked_blocks))
		came.middle++;
	else
		came.before++;
	assert_int_equal(finish(f), (TO - FROM) * B);
	layouts_settle(world.fs);
	assert_int_equal(quarantined(), 0);
	expect_blocks(prepare);
	/* The same client, as a new holder, in the same range. */
	h = new_holder(1);
	OK(get(0, h, IOMODE_RW, 0, BIG * B, 0));
	OK(give_back_all(h));
	OK(holder_gone(world.fs, h));
	check_all_free();
	teardown(NULL);
	setup(NULL);
}

static void fenced_while_blocks_are_copied(void **state)
{
	memset(&came, 0, sizeof(came));
	for (unsigned n = 0; n < MOMENTS; n++)
		fenced_at(every_other, n, n % 2 ? 10000 * (1 + n % 7) : 0);
	print_message("fenced before the revoke %u, in it %u, after it %u times\n", came.before,
		      came.middle, came.after);
	assert_true(came.middle >= 2);
}

/* That needs no device: a few transactions, and it is over. */
static void fenced_while_staged_blocks_leave(void **state)
{
	for (unsigned n = 0; n < MOMENTS; n++)
		fenced_at(atomic, 0, n * 5000);
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(fenced_while_blocks_are_copied),
		T(fenced_while_staged_blocks_leave),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
