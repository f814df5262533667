/* SPDX-License-Identifier: MIT
 *
 * test_exchange.c - two ranges of blocks change places: against a model, and with the power failing
 * at every write of an exchange of several transactions.
 */
#include "remap_fixture.h"
#include "tree_check.h"

#define BS ((uint64_t)BLOCK_SIZE)

static int setup(void **state)
{
	world_new(64u << 20, 512, 11);
	make_files();
	return 0;
}

static int teardown(void **state)
{
	world_end();
	return 0;
}

/* ---- requests that cannot be ---- */

static void refuses_what_is_not_whole_blocks_below_eof(void **state)
{
	OK(do_write(0, 0, 4 * BS + 100, 1));
	OK(do_write(1, 0, 2 * BS, 2));
	assert_int_equal(do_exchange(0, 0, 1, 0, 100), -EINVAL);
	assert_int_equal(do_exchange(0, 512, 1, 0, BS), -EINVAL);
	assert_int_equal(do_exchange(0, 0, 1, 512, BS), -EINVAL);
	assert_int_equal(do_exchange(0, 0, 1, 0, 0), -EINVAL);
	assert_int_equal(do_exchange(0, 0, 1, 0, 3 * BS), -EINVAL);   /* past the end of one */
	assert_int_equal(do_exchange(0, 4 * BS, 1, 0, BS), -EINVAL);  /* the block of EOF */
	assert_int_equal(do_exchange(0, 0, 0, BS, 2 * BS), -EINVAL);  /* overlap */
	assert_int_equal(do_exchange(0, 0, 0, 0, BS), -EINVAL);
	assert_int_equal(do_exchange(0, FILE_MAX_BYTES & ~BLOCK_MASK, 1, 0, BS), -EFBIG);
	assert_int_equal(do_exchange(0, UINT64_MAX & ~BLOCK_MASK, 1, 0, BS), -EFBIG);
	assert_int_equal(do_exchange(0, 0, 1, 0, 2 * BS), 0);
	delete_all();
	world_close();
}

/* ---- against a model ---- */

static void model_exchange(struct model *x, uint64_t off, struct model *y, uint64_t y_off,
			   uint64_t len)
{
	for (uint64_t i = 0; i < len; i++) {
		uint8_t byte = x->bytes[off + i];

		x->bytes[off + i] = y->bytes[y_off + i];
		y->bytes[y_off + i] = byte;
	}
}

static bool random_exchange(void)
{
	unsigned x = below(FILES), y = below(FILES);
	uint64_t off = below(20) * BS, y_off = below(20) * BS, len = (1 + below(12)) * BS;
	uint64_t apart = off > y_off ? off - y_off : y_off - off;
	bool valid = off + len <= files[x].size && y_off + len <= files[y].size &&
		     (x != y || apart >= len);
	int64_t rc = do_exchange(x, off, y, y_off, len);

	assert_int_equal(rc, valid ? 0 : -EINVAL);
	if (valid)
		model_exchange(&files[x], off, &files[y], y_off, len);
	return valid;
}

static void random_operations(void **state)
{
	unsigned exchanged = 0;

	for (uint64_t seed = 1; seed <= 6; seed++) {
		begin(64u << 20, 512, seed);
		for (unsigned i = 0; i < 500; i++) {
			if (below(3) == 0) {
				exchanged += random_exchange();
			} else {
				struct todo t = random_todo(files);

				both(&t);
			}
			if (i % 25 == 0)
				compare_all("on the way");
		}
		compare_all("at the end");
		put_files();
		inode_put(world.root);
		inode_lookup_forget_all(world.fs);
		OK(fs_close(world.fs));
		OK(world_open());
		find_files();
		compare_all("after a mount");
		end();
	}
	assert_true(exchanged > 200);
}

/* ---- flags and counts ---- */

static void blocks_are_counted_where_they_are(void **state)
{
	OK(do_write(0, 0, 8 * BS, 1));
	OK(do_truncate(1, 8 * BS));
	OK(do_write(1, 0, BS, 2));
	assert_int_equal(do_exchange(0, 0, 1, 0, 4 * BS), 0);
	assert_int_equal(blocks_of(0), 5);
	assert_int_equal(blocks_of(1), 4);
	assert_int_equal(world.file[0]->core.size, 8 * BS);
	/* back: the pieces join again */
	assert_int_equal(do_exchange(1, 0, 0, 0, 4 * BS), 0);
	assert_int_equal(extents_of(0), 1);
	assert_int_equal(extents_of(1), 1);
	delete_all();
	world_close();
}

/* Shared blocks stay shared: a write to one user is not seen by the other. */
static void shared_blocks_are_still_copied_on_write(void **state)
{
	uint64_t size;
	uint8_t *got;

	OK(do_write(0, 0, 4 * BS, 1));
	OK(do_write(1, 0, 4 * BS, 2));
	OK(do_clone(0, 0, 2, 0, 4 * BS));
	assert_int_equal(do_exchange(0, 0, 1, 0, 2 * BS), 0);
	OK(do_write(1, 0, BS, 5)); /* shared with file 2 */
	got = content(2, &size);
	for (uint64_t i = 0; i < 4 * BS; i++)
		assert_int_equal(got[i], pattern_byte(1, i));
	free(got);
	delete_all();
	world_close();
}

/* ---- in place, after an exchange that is not durable ---- */

static void expect_bytes(unsigned file, uint64_t off, uint64_t len, uint64_t pattern,
			 const char *what)
{
	uint64_t size;
	uint8_t *got = content(file, &size);

	for (uint64_t i = 0; i < len; i++)
		if (got[off + i] != pattern_byte(pattern, i))
			fail_msg("%s: byte %llu of %s", what, (unsigned long long)(off + i),
				 name_of(file));
	free(got);
}

/* What is written to a file's new blocks must not turn up in the file that had them before. */
static void writes_in_place_wait_for_the_exchange(void **state)
{
	OK(do_write(0, 0, BS, 1));
	OK(do_write(1, 0, BS, 2));
	OK(do_fsync(0));
	OK(do_fsync(1));
	assert_int_equal(do_exchange(0, 0, 1, 0, BS), 0);
	OK(do_write(0, 0, BS, 9));
	lose_power_keeping_data();
	expect_bytes(1, 0, BS, 1, "the exchange is durable, or the write had to wait");
	delete_all();
	world_close();
}

/* In memory the block is unwritten; in what is durable it is still the other file's, and written. */
static void zeroed_blocks_wait_for_the_exchange(void **state, bool zero_first)
{
	struct todo zero = { .act = ACT_ZERO, .file = zero_first, .off = 0, .len = BS };
	uint64_t size;
	uint8_t *bytes;

	OK(do_write(0, 0, BS, 1));
	OK(do_write(1, 0, BS, 2));
	OK(do_fsync(0));
	OK(do_fsync(1));
	if (zero_first)
		OK(do_one(&zero));
	assert_int_equal(do_exchange(0, 0, 1, 0, BS), 0);
	if (!zero_first)
		OK(do_one(&zero));
	OK(do_write(0, 0, BS, 9));
	lose_power_keeping_data();
	bytes = content(1, &size);
	for (unsigned i = 0; i < BS; i += 64)
		assert_false(bytes[i] == pattern_byte(9, i) && bytes[i + 1] == pattern_byte(9, i + 1) &&
			     bytes[i + 2] == pattern_byte(9, i + 2));
	free(bytes);
	delete_all();
	world_close();
}

static void zeroed_afterwards(void **state)
{
	zeroed_blocks_wait_for_the_exchange(state, false);
}

static void zeroed_before(void **state)
{
	zeroed_blocks_wait_for_the_exchange(state, true);
}

static void the_same_when_the_inode_was_out_of_memory(void **state)
{
	OK(do_write(0, 0, BS, 1));
	OK(do_write(1, 0, BS, 2));
	OK(do_fsync(0));
	OK(do_fsync(1));
	assert_int_equal(do_exchange(0, 0, 1, 0, BS), 0);
	inode_cache_limit(world.fs, 0);
	put_files();
	find_files();
	/* One block's part: not the way of aligned whole writes. */
	OK(do_write(0, 100, 50, 9));
	lose_power_keeping_data();
	expect_bytes(1, 0, BS, 1, "the exchange is durable, or the write had to wait");
	delete_all();
	world_close();
}

/* ---- several transactions ---- */

static bool exchanged_pieces(void)
{
	unsigned new = 0, old = 0;

	for (unsigned file = 0; file < 2; file++)
		for (unsigned i = 0; i < PIECES; i++) {
			unsigned of, found = piece_at(file, i, &of);
			unsigned was = piece_made(file, i), is = piece_made(!file, i);

			if (found == was && (!found || of == file))
				old += found || is;
			else if (found == is && (!found || of == !file))
				new += 1;
			else
				fail_msg("block %u of file %u: piece %u of %u", i, file, found, of);
		}
	if (old && new)
		fail_msg("%u blocks are old, %u new", old, new);
	return new > 0;
}

static void start_pieces(struct flight *f, struct ioctx *ctx)
{
	remap_start(f, ctx, FILE_EXCHANGE, 0, 0, PIECES * BS, 1, 0);
}

static void cut_anywhere_it_is_all_or_nothing(void **state)
{
	make_pieces();
	cut_everywhere(&(struct cut_test){ .start = start_pieces, .is_new = exchanged_pieces });
	delete_all();
	world_close();
}

static bool turned_pieces(void)
{
	unsigned new = 0, old = 0;
	const unsigned half = PIECES / 2;

	for (unsigned i = 0; i < PIECES; i++) {
		unsigned of, found = piece_at(0, i, &of), was = piece_made(0, i);
		unsigned is = piece_made(0, (i + half) % PIECES);

		if (found != was && found != is)
			fail_msg("block %u: piece %u", i, found);
		old += found == was && was != is;
		new += found == is && was != is;
	}
	if (old && new)
		fail_msg("%u blocks are old, %u new", old, new);
	return new > 0;
}

static void start_halves(struct flight *f, struct ioctx *ctx)
{
	remap_start(f, ctx, FILE_EXCHANGE, 0, 0, PIECES / 2 * BS, 0, PIECES / 2 * BS);
}

static void the_same_within_one_file(void **state)
{
	make_pieces();
	cut_everywhere(&(struct cut_test){ .start = start_halves, .is_new = turned_pieces });
	delete_all();
	world_close();
}

/* Who reads or seeks in the middle of it. */
static void readers_wait_and_see_the_end(void **state)
{
	struct ioctx *ctx;
	struct flight f, reader;
	uint64_t size;

	make_pieces();
	OK(ioctx_create(16, &ctx));
	start_pieces(&f, ctx);
	assert_false(f.done);
	assert_int_equal(intents(), 1);
	flight_start(&reader, &(struct todo){ .act = ACT_READ, .file = 1, .off = 0, .len = BS });
	while (ioctx_run(world.ctx, false) > 0)
		;
	assert_false(reader.done);
	/* Block 2 of file 1 is a hole before, block 3 of file 0 unwritten; in the middle nobody can
	 * tell. */
	size = world.file[1]->core.size;
	assert_int_equal(file_seek(world.file[1], 2 * BS, 3), 2 * BS);
	assert_int_equal(file_seek(world.file[1], 0, 4), size);
	assert_int_equal(file_seek(world.file[1], size, 3), -ENXIO);
	assert_int_equal(file_seek(world.file[1], size, 4), -ENXIO);
	while (!f.done)
		OK(ioctx_run(ctx, true));
	OK(f.fop.result);
	flight_wait(&reader);
	assert_int_equal(((uint8_t *)reader.fop.buf)[5], pattern_byte(piece_pattern(0, 0), 5));
	flight_end(&reader);
	ioctx_destroy(ctx);
	assert_true(exchanged_pieces());
	assert_int_equal(file_seek(world.file[1], 3 * BS, 3), 4 * BS);
	assert_int_equal(file_seek(world.file[1], 0, 4), 3 * BS);
	assert_int_equal(intents(), 0);
	delete_all();
	world_close();
}

/* Stopped between two transactions by the end of the mount: the next one finishes it, and a
 * read-only one in between is refused. */
static void a_read_only_mount_does_not_show_a_mix(void **state)
{
	struct ioctx *ctx;
	struct flight f;

	make_pieces();
	OK(ioctx_create(16, &ctx));
	start_pieces(&f, ctx);
	assert_false(f.done);
	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	jrn_kick_checkpoint(world.fs);
	sim_crash_at(world.sim, sim_events(world.sim) + 200);
	while (!f.done)
		OK(ioctx_run(ctx, true));
	ioctx_destroy(ctx);
	power_cut(3);
	/* A mount that ends before its reaper has begun leaves a clean log and the intent. */
	OK(world_open());
	reaper_stop(world.fs);
	inode_put(world.root);
	OK(fs_close(world.fs));
	world.opt.read_only = true;
	if (world_open() == 0) { /* the reaper was faster */
		assert_int_equal(intents(), 0);
		inode_put(world.root);
		OK(fs_close(world.fs));
	}
	world.opt.read_only = false;
	OK(world_open());
	find_files();
	assert_true(exchanged_pieces());
	delete_all();
	world_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(refuses_what_is_not_whole_blocks_below_eof, setup,
						teardown),
		cmocka_unit_test(random_operations),
		cmocka_unit_test_setup_teardown(blocks_are_counted_where_they_are, setup, teardown),
		cmocka_unit_test_setup_teardown(shared_blocks_are_still_copied_on_write, setup,
						teardown),
		cmocka_unit_test_setup_teardown(writes_in_place_wait_for_the_exchange, setup,
						teardown),
		cmocka_unit_test_setup_teardown(the_same_when_the_inode_was_out_of_memory, setup,
						teardown),
		cmocka_unit_test_setup_teardown(zeroed_afterwards, setup, teardown),
		cmocka_unit_test_setup_teardown(zeroed_before, setup, teardown),
		cmocka_unit_test_setup_teardown(cut_anywhere_it_is_all_or_nothing, setup, teardown),
		cmocka_unit_test_setup_teardown(the_same_within_one_file, setup, teardown),
		cmocka_unit_test_setup_teardown(readers_wait_and_see_the_end, setup, teardown),
		cmocka_unit_test_setup_teardown(a_read_only_mount_does_not_show_a_mix, setup,
						teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
