/* SPDX-License-Identifier: MIT
 *
 * test_file_beside.c - who reads beside a write that is under way (file.h, "At the same time"): READ, and COPY
 * where the offsets disagree within a block, so that it reads and writes. What they may see of it, whom they
 * keep waiting, and where they find the end of the file.
 *
 * Completions of the simulated device come from ioctx_run() only, and nothing here runs by itself.
 */
#include "file_fixture.h"

#define PIECE (1u << 20) /* what COPY reads at a time */
#define SHIFT 512u       /* between the offsets of a copy: nothing can be shared */

static int setup(void **state)
{
	early_memory = 0;
	world_new(64u << 20, 512, 3);
	make_files();
	return 0;
}

static int setup_early(void **state)
{
	early_memory = 4u << 20;
	world_new(64u << 20, 512, 3);
	make_files();
	return 0;
}

static int teardown(void **state)
{
	delete_all();
	world_close();
	world_end();
	return 0;
}

static struct todo a_copy(uint64_t len)
{
	return (struct todo){ .act = ACT_COPY, .file = 0, .dst = 1, .dst_off = SHIFT, .len = len };
}

static uint8_t byte_of(unsigned file, uint64_t off)
{
	struct flight f;
	uint8_t got;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file, .off = off, .len = 1 });
	flight_wait(&f);
	assert_int_equal(f.fop.result, 1);
	got = *(uint8_t *)f.fop.buf;
	flight_end(&f);
	return got;
}

static uint64_t size_of(unsigned file)
{
	struct inode_stat st;

	namei_stat(world.file[file], &st);
	return st.core.size;
}

/* Another thread's operation. */
static void start_on(struct ioctx *ctx, struct flight *f, const struct todo *t)
{
	struct ioctx *usual = world.ctx;

	world.ctx = ctx;
	flight_start(f, t);
	world.ctx = usual;
}

/* Until the first piece of the copy is on the device. */
static void drive_one_piece(struct ioctx *ctx, const struct flight *f)
{
	while (size_of(1) < PIECE && !f->done)
		OK(ioctx_run(ctx, true));
	assert_false(f->done);
}

/* A long copy does not lock writers out of its source: it goes beside them, and each byte is the old or the new
 * one. Here the first piece is old and the third new: the effect of neither order. */
static void a_copy_that_moves_bytes_goes_beside_writes(void **state)
{
	struct ioctx *ctx;
	struct flight copy;
	struct todo t = a_copy(3 * PIECE);

	for (unsigned i = 0; i < 3; i++)
		OK(do_write(0, (uint64_t)i * PIECE, PIECE, 10 + i));
	OK(ioctx_create(16, &ctx));
	start_on(ctx, &copy, &t);
	drive_one_piece(ctx, &copy);
	OK(do_write(0, PIECE - BLOCK_SIZE, 2 * PIECE, 20));
	assert_false(copy.done);
	while (!copy.done)
		OK(ioctx_run(ctx, true));
	assert_int_equal(copy.fop.result, 3 * PIECE);
	flight_end(&copy);
	ioctx_destroy(ctx);
	assert_int_equal(byte_of(1, SHIFT + PIECE - BLOCK_SIZE), pattern_byte(10, PIECE - BLOCK_SIZE));
	assert_int_equal(byte_of(1, SHIFT + PIECE - 1), pattern_byte(10, PIECE - 1));
	assert_int_equal(byte_of(1, SHIFT + 2 * PIECE), pattern_byte(20, PIECE + BLOCK_SIZE));
	assert_int_equal(byte_of(1, SHIFT + 3 * PIECE - 1), pattern_byte(12, PIECE - 1));
}

/* Whoever changes the map of the source does wait for it, and then it is as if the copy had come first. */
static void a_copy_keeps_the_map_of_its_source(void **state)
{
	static const struct todo later[] = {
		{ .act = ACT_PUNCH, .off = PIECE, .len = PIECE },
		{ .act = ACT_TRUNCATE, .off = PIECE },
		{ .act = ACT_ZERO, .off = PIECE, .len = 2 * PIECE },
	};
	struct ioctx *ctx;

	OK(ioctx_create(16, &ctx));
	for (unsigned i = 0; i < ARRAY_LEN(later); i++) {
		struct flight copy, other;
		struct todo t = a_copy(3 * PIECE);

		OK(do_truncate(0, 0));
		OK(do_truncate(1, 0));
		for (unsigned k = 0; k < 3; k++)
			OK(do_write(0, (uint64_t)k * PIECE, PIECE, 10 + k));
		start_on(ctx, &copy, &t);
		drive_one_piece(ctx, &copy);
		flight_start(&other, &later[i]);
		assert_int_equal(ioctx_run(world.ctx, false), 0);
		assert_false(other.done);
		while (!copy.done)
			OK(ioctx_run(ctx, true));
		flight_wait(&other);
		assert_int_equal(copy.fop.result, 3 * PIECE);
		assert_int_equal(other.fop.result, 0);
		flight_end(&copy);
		flight_end(&other);
		assert_int_equal(byte_of(1, SHIFT + PIECE + 7), pattern_byte(11, 7));
		assert_int_equal(byte_of(1, SHIFT + 3 * PIECE - 1), pattern_byte(12, PIECE - 1));
	}
	ioctx_destroy(ctx);
}

/* Where whole blocks are shared the copy is of one moment: writers wait for it, and it for them. */
static void a_copy_that_shares_comes_before_or_after(void **state)
{
	struct flight copy, write;
	struct todo t = a_copy(2 * PIECE);
	struct ioctx *ctx;

	t.dst_off = 0;
	t.off = t.dst_off = 100; /* a part of a block at both ends is read and written */
	OK(do_write(0, 0, PIECE, 10));
	OK(do_write(0, PIECE, PIECE, 11));
	OK(ioctx_create(16, &ctx));
	start_on(ctx, &copy, &t);
	assert_false(copy.done);
	flight_start(&write, &(struct todo){ .act = ACT_WRITE, .off = 0, .len = PIECE, .pattern = 20 });
	assert_int_equal(ioctx_run(world.ctx, false), 0);
	assert_false(write.done);
	while (!copy.done)
		OK(ioctx_run(ctx, true));
	flight_wait(&write);
	assert_int_equal(copy.fop.result, 2 * PIECE - 100);
	flight_end(&copy);
	flight_end(&write);
	ioctx_destroy(ctx);
	assert_int_equal(byte_of(1, 100), pattern_byte(10, 100));
	assert_int_equal(byte_of(1, PIECE - 1), pattern_byte(10, PIECE - 1));
	assert_int_equal(byte_of(0, PIECE - 1), pattern_byte(20, PIECE - 1));
}

/* The copy has its segment of the source and waits for the one of the destination; then a write makes the source
 * longer and is answered before its bytes are there: for the copy the file ends where it did. */
static void a_copy_ends_where_the_file_did_before_an_early_write(void **state)
{
	struct todo t = a_copy(8 * BLOCK_SIZE);
	struct flight copy, write;
	struct seg s;

	OK(do_write(0, 0, BLOCK_SIZE, 10));
	early_run_out();
	seg_init(&s, SEG_MAP, 0, UINT64_MAX, NULL);
	assert_int_equal(seg_acquire(world.file[1], &s), 0);
	flight_start(&copy, &t);
	flight_start(&write, &(struct todo){ .act = ACT_WRITE, .off = BLOCK_SIZE, .len = BLOCK_SIZE,
					     .pattern = 20 });
	assert_true(write.done && write.fop.early);
	flight_end(&write);
	seg_release(world.file[1], &s);
	flight_wait(&copy);
	assert_int_equal(copy.fop.result, BLOCK_SIZE);
	flight_end(&copy);
	early_run_out();
	assert_int_equal(size_of(0), 2 * BLOCK_SIZE);
	assert_int_equal(size_of(1), SHIFT + BLOCK_SIZE);
	assert_int_equal(byte_of(1, SHIFT + BLOCK_SIZE - 1), pattern_byte(10, BLOCK_SIZE - 1));
	/* And after it: all of it. */
	flight_start(&copy, &t);
	flight_wait(&copy);
	assert_int_equal(copy.fop.result, 2 * BLOCK_SIZE);
	flight_end(&copy);
	assert_int_equal(byte_of(1, SHIFT + 2 * BLOCK_SIZE - 1), pattern_byte(20, BLOCK_SIZE - 1));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(a_copy_that_moves_bytes_goes_beside_writes, setup, teardown),
		cmocka_unit_test_setup_teardown(a_copy_keeps_the_map_of_its_source, setup, teardown),
		cmocka_unit_test_setup_teardown(a_copy_that_shares_comes_before_or_after, setup, teardown),
		cmocka_unit_test_setup_teardown(a_copy_ends_where_the_file_did_before_an_early_write, setup_early,
						teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
