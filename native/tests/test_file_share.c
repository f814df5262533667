/* SPDX-License-Identifier: MIT
 *
 * test_file_share.c - writes to a file of which another shares blocks, while that one lets go of
 * them: what is durable of the other must not change, and nobody waits for ever.
 */
#include "file_fixture.h"

#define ISLANDS 40u /* written blocks with holes between: more than one transaction stages */
#define LAST ((uint64_t)(2 * (ISLANDS - 1)) * BLOCK_SIZE)

static int setup(void **state)
{
	world_new(64u << 20, 512, 7);
	make_files();
	return 0;
}

static int teardown(void **state)
{
	world_end();
	return 0;
}

static int64_t do_copy(unsigned src, unsigned dst, uint64_t len)
{
	return do_one(&(struct todo){ .act = ACT_COPY, .file = src, .dst = dst, .len = len });
}

/* Start on a context of its own, so that other operations do not drive it. */
static void start_on(struct ioctx *ctx, struct flight *f, const struct todo *t)
{
	struct ioctx *usual = world.ctx;

	world.ctx = ctx;
	flight_start(f, t);
	world.ctx = usual;
}

static void drive(struct ioctx *ctx, struct flight *f)
{
	while (!f->done)
		OK(ioctx_run(ctx, true));
}

static void expect_block(unsigned file, uint64_t off, uint64_t pattern)
{
	struct flight f;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file, .off = off,
					 .len = BLOCK_SIZE });
	flight_wait(&f);
	/* 0: the truncate has become durable, which is right as well. */
	if (f.fop.result != 0) {
		assert_int_equal(f.fop.result, BLOCK_SIZE);
		for (unsigned i = 0; i < BLOCK_SIZE; i++)
			if (((uint8_t *)f.fop.buf)[i] != pattern_byte(pattern, i))
				fail_msg("byte %u of %s is not its own", i, name_of(file));
	}
	flight_end(&f);
}

/* A long copy-on-write begins while everything is shared. Before it comes to the last block, the
 * other file lets go of that one, not durably: now it looks unshared. */
static void block_let_go_during_staging(void **state)
{
	struct ioctx *ctx;
	struct flight f;

	for (unsigned i = 0; i < ISLANDS; i++)
		OK(do_write(0, (uint64_t)i * 2 * BLOCK_SIZE, BLOCK_SIZE, 100 + i));
	OK(do_copy(0, 1, LAST + BLOCK_SIZE));
	OK(do_fsync(1));
	OK(do_fsync(0));
	OK(ioctx_create(16, &ctx));
	start_on(ctx, &f, &(struct todo){ .act = ACT_WRITE, .file = 0, .len = LAST + BLOCK_SIZE,
					  .pattern = 999 });
	assert_false(f.done);
	OK(do_truncate(1, LAST));
	drive(ctx, &f);
	assert_int_equal(f.fop.result, LAST + BLOCK_SIZE);
	flight_end(&f);
	ioctx_destroy(ctx);
	lose_power_keeping_data();
	expect_block(1, LAST, 100 + ISLANDS - 1);
	world_close();
}

/* Somebody else lets go of shared blocks in every group, and always gets in between. */
static void writer_is_not_starved_by_others(void **state)
{
	struct ioctx *ctx;
	struct flight f;

	OK(do_write(0, 0, 32 * BLOCK_SIZE, 5));
	OK(do_copy(0, 1, 32 * BLOCK_SIZE));
	OK(do_write(1, 0, BLOCK_SIZE, 6));
	OK(ioctx_create(16, &ctx));
	start_on(ctx, &f, &(struct todo){ .act = ACT_WRITE, .file = 0, .len = BLOCK_SIZE,
					  .pattern = 7 });
	for (unsigned i = 1; i < 12 && !f.done; i++) {
		OK(do_write(1, (uint64_t)i * BLOCK_SIZE, BLOCK_SIZE, 6));
		/* Once: it finds what that write has just unshared, not what the commit that it
		 * then asks for makes durable. */
		ioctx_run(ctx, false);
	}
	assert_true(f.done);
	assert_int_equal(f.fop.result, BLOCK_SIZE);
	flight_end(&f);
	ioctx_destroy(ctx);
	world_close();
}

#define PIECES 64u

/* Blocks alternate between one user and two, so one transaction cannot replace them all. After any
 * crash a block holds what it held, or what was to be copied: never zeros. */
static void copy_over_many_pieces(unsigned alternating)
{
	const uint64_t len = (uint64_t)PIECES * BLOCK_SIZE;
	struct flight f;
	struct ioctx *ctx;

	for (unsigned i = 0; i < PIECES; i++) {
		OK(do_write(0, (uint64_t)i * BLOCK_SIZE, BLOCK_SIZE, 100 + i));
		OK(do_write(1, (uint64_t)i * BLOCK_SIZE, BLOCK_SIZE, 300 + i));
	}
	OK(do_copy(alternating, 2, len));
	for (unsigned i = 0; i < PIECES; i += 2)
		OK(do_write(2, (uint64_t)i * BLOCK_SIZE, BLOCK_SIZE, 500));
	OK(do_fsync(1));
	OK(ioctx_create(16, &ctx));
	start_on(ctx, &f, &(struct todo){ .act = ACT_COPY, .file = 0, .dst = 1, .len = len });
	assert_false(f.done); /* after its first transaction */
	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	sim_crash_at(world.sim, sim_events(world.sim) + 1);
	jrn_kick_checkpoint(world.fs);
	drive(ctx, &f);
	flight_end(&f);
	ioctx_destroy(ctx);
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sim_restart(world.sim, 5);
	OK(world_open());
	find_files();
	for (unsigned i = 0; i < PIECES; i++) {
		uint8_t *mem;

		flight_start(&f, &(struct todo){ .act = ACT_READ, .file = 1, .len = BLOCK_SIZE,
						 .off = (uint64_t)i * BLOCK_SIZE });
		flight_wait(&f);
		assert_int_equal(f.fop.result, BLOCK_SIZE);
		mem = f.fop.buf;
		if (mem[9] != pattern_byte(100 + i, 9) &&
		    mem[9] != pattern_byte(300 + i, 9))
			fail_msg("block %u holds %#x: neither old nor new", i, mem[9]);
		flight_end(&f);
	}
	world_close();
}

static void copied_pieces_are_old_or_new_destination(void **state)
{
	copy_over_many_pieces(1);
}

static void copied_pieces_are_old_or_new_source(void **state)
{
	copy_over_many_pieces(0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(block_let_go_during_staging, setup, teardown),
		cmocka_unit_test_setup_teardown(copied_pieces_are_old_or_new_destination, setup,
						teardown),
		cmocka_unit_test_setup_teardown(copied_pieces_are_old_or_new_source, setup,
						teardown),
		cmocka_unit_test_setup_teardown(writer_is_not_starved_by_others, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
