/* SPDX-License-Identifier: MIT
 *
 * test_layout_crash.c - power cuts at every write and flush while a holder works: what was answered
 * is there afterwards, an ATOMIC commit is whole or nothing, nobody reads a block that was not
 * written to the file, and no block is lost.
 */
#include "layout_fixture.h"
#include "tree_check.h"

#define OLD 100u /* fragments of the file that is committed atomically */

static struct progress {
	bool atomic_begun, atomic_done, cow_begun, cow_done, hole_begun, hole_done, returned;
} done;

#define TRY(call)                                                                           \
	do {                                                                                \
		if ((call) < 0)                                                             \
			return;                                                             \
	} while (0)

/* One write for each extent; false: no power. */
static int write_answer(uint64_t pattern)
{
	for (unsigned i = 0; i < args.count; i++) {
		const struct layout_extent *e = &ext[i];
		uint8_t *mem;
		int rc;

		if (e->state == READ_DATA)
			continue;
		mem = malloc(e->length);
		for (uint64_t k = 0; k < e->length; k++)
			mem[k] = pattern_byte(pattern, e->offset - args.offset + k);
		rc = sim_poke(world.sim, e->device, mem, e->length);
		free(mem);
		if (rc)
			return rc;
	}
	return 0;
}

/* What a holder does, until the power goes. */
static void work(uint64_t h)
{
	TRY(get(0, h, IOMODE_RW, 0, BLOCKS(2 * OLD), LAYOUT_F_ATOMIC));
	TRY(write_answer(4));
	done.atomic_begun = true;
	TRY(commit(0, h, 0, BLOCKS(1), BLOCKS(2 * OLD)));
	done.atomic_done = true;
	TRY(get(1, h, IOMODE_RW, 0, BLOCKS(8), 0));
	TRY(write_answer(6));
	done.cow_begun = true;
	TRY(commit(1, h, BLOCKS(2), BLOCKS(3), 0));
	done.cow_done = true;
	TRY(get(2, h, IOMODE_RW, BLOCKS(20), BLOCKS(8), 0));
	TRY(write_answer(7));
	done.hole_begun = true;
	TRY(commit(2, h, BLOCKS(20), BLOCKS(3), BLOCKS(23)));
	done.hole_done = true;
	TRY(give_back_all(h));
	done.returned = true;
	TRY(do_fsync(0));
	TRY(do_write(2, BLOCKS(60), BLOCKS(8), 8));
	TRY(do_fsync(2));
}

static void prepare(void)
{
	memset(&done, 0, sizeof(done));
	world_new(64u << 20, 512, 7);
	new_holder(0);
	world.free_empty = free_blocks();
	make_files();
	for (unsigned i = OLD; i-- > 0;)
		OK(do_write(0, BLOCKS(2 * i), BLOCKS(1), 1000 + i));
	OK(do_write(2, 0, BLOCKS(8), 5));
	OK(do_one(&(struct todo){ .act = ACT_COPY, .file = 2, .dst = 1, .len = BLOCKS(8) }));
	OK(do_fsync(0));
	OK(do_fsync(1));
	OK(do_fsync(2));
}

static bool reads_as(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	struct flight f;
	bool same = true;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file, .off = off, .len = len });
	flight_wait(&f);
	assert_int_equal(f.fop.result, len);
	for (uint64_t i = 0; i < len && same; i++)
		same = ((uint8_t *)f.fop.buf)[i] == (pattern ? pattern_byte(pattern, i) : 0);
	flight_end(&f);
	return same;
}

static void check_atomic(void)
{
	bool new = reads_as(0, 0, BLOCKS(1), 4);

	if (done.atomic_done)
		assert_true(new);
	if (!done.atomic_begun)
		assert_false(new);
	if (new) {
		assert_int_equal(size_of(0), BLOCKS(2 * OLD));
		expect(0, 0, BLOCKS(2 * OLD), 4);
		return;
	}
	assert_int_equal(size_of(0), BLOCKS(2 * OLD - 1));
	for (unsigned i = 0; i < OLD; i++) {
		expect(0, BLOCKS(2 * i), BLOCKS(1), 1000 + i);
		if (i + 1 < OLD)
			expect(0, BLOCKS(2 * i + 1), BLOCKS(1), 0);
	}
}

/* Blocks 2..4 of the pattern, as one commit of them leaves them. */
static bool part_as(unsigned file, uint64_t pattern)
{
	struct flight f;
	bool same = true;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file, .len = BLOCKS(8) });
	flight_wait(&f);
	assert_int_equal(f.fop.result, BLOCKS(8));
	for (uint64_t i = 0; i < BLOCKS(8) && same; i++) {
		bool inside = i >= BLOCKS(2) && i < BLOCKS(5);

		same = ((uint8_t *)f.fop.buf)[i] == pattern_byte(inside ? pattern : 5, i);
	}
	flight_end(&f);
	return same;
}

static void check_cow(void)
{
	bool new = part_as(1, 6);

	assert_true(new || part_as(1, 5));
	if (done.cow_done)
		assert_true(new);
	if (!done.cow_begun)
		assert_false(new);
	expect(2, 0, BLOCKS(8), 5);
}

static void check_hole(void)
{
	if (done.hole_done)
		assert_true(size_of(2) >= BLOCKS(23));
	if (size_of(2) < BLOCKS(23)) {
		assert_int_equal(size_of(2), BLOCKS(8));
		return;
	}
	assert_true(done.hole_begun);
	expect(2, BLOCKS(8), BLOCKS(12), 0);
	expect(2, BLOCKS(20), BLOCKS(3), 7);
	if (size_of(2) > BLOCKS(23))
		expect(2, BLOCKS(23), MIN(size_of(2), BLOCKS(60)) - BLOCKS(23), 0);
}

/* The holder comes back, gives everything back; then nothing is missing. */
static void check_space_of_all(void)
{
	check_disk();
	come_back(0);
	OK(give_back_all(holder[0].id));
	for (unsigned i = 0; i < FILES; i++) {
		assert_int_equal(exposed(i, 0), 0);
		assert_false(noted(i, holder[0].id));
		assert_int_equal(world.file[i]->core.flags & INODE_F_STAGING, 0);
	}
	check_disk();
	delete_all();
	check_disk();
}

static void end_world(void)
{
	world_close();
	sinks_gone();
	world_end();
}

static void power_cuts(void **state)
{
	uint64_t n, first;
	bool cut = true;

	for (n = 1; cut; n++) {
		prepare();
		first = sim_events(world.sim);
		sim_crash_at(world.sim, first + n);
		work(holder[0].id);
		cut = sim_crashed(world.sim);
		put_files();
		inode_put(world.root);
		fs_abandon(world.fs);
		sinks_gone();
		sim_crash_at(world.sim, 0);
		sim_restart(world.sim, n);
		OK(world_open());
		find_files();
		check_atomic();
		check_cow();
		check_hole();
		check_space_of_all();
		end_world();
	}
	print_message("%llu power cuts\n", (unsigned long long)n - 2);
	assert_true(done.returned && n > 40);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(power_cuts) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
