/* SPDX-License-Identifier: MIT
 *
 * test_dedupe.c - blocks become shared: because they are equal (dedupe), or to be (clone).
 */
#include "remap_fixture.h"
#include "tree_check.h"

#define BS ((uint64_t)BLOCK_SIZE)

static int setup(void **state)
{
	world_new(64u << 20, 512, 13);
	make_files();
	return 0;
}

static int teardown(void **state)
{
	world_end();
	return 0;
}

/* Are the device blocks of [a, a + n) of one file and [b, b + n) of the other the same? Unmapped or unwritten
 * ones are not. */
static unsigned shared_blocks(unsigned x, fileblk_t a, unsigned y, fileblk_t b, unsigned n)
{
	unsigned shared = 0;

	fs_rdlock(world.fs);
	for (unsigned i = 0; i < n; i++) {
		struct extent p, q;

		OK(extmap_lookup(world.file[x], FORK_DATA, a + i, 1, &p));
		OK(extmap_lookup(world.file[y], FORK_DATA, b + i, 1, &q));
		shared += p.state == EXT_WRITTEN && q.state == EXT_WRITTEN && p.block == q.block;
	}
	fs_unlock(world.fs);
	return shared;
}

static void expect_content(unsigned file, uint64_t off, uint64_t len, uint64_t pattern, uint64_t from)
{
	uint64_t size;
	uint8_t *got = content(file, &size);

	assert_true(off + len <= size);
	for (uint64_t i = 0; i < len; i++)
		if (got[off + i] != pattern_byte(pattern, from + i))
			fail_msg("byte %llu of %s", (unsigned long long)(off + i), name_of(file));
	free(got);
}

/* ---- dedupe ---- */

static void refuses_what_fidedupe_refuses(void **state)
{
	OK(do_write(0, 0, 4 * BS + 100, 1));
	OK(do_write(1, 0, 4 * BS + 200, 1));
	assert_int_equal(do_dedupe(0, 512, 1, 0, BS), -EINVAL);
	assert_int_equal(do_dedupe(0, 0, 1, 512, BS), -EINVAL);
	assert_int_equal(do_dedupe(0, 0, 1, 0, 100), -EINVAL);
	assert_int_equal(do_dedupe(0, 0, 1, 0, 5 * BS), -EINVAL);
	assert_int_equal(do_dedupe(0, 0, 1, 0, 4 * BS + 100), -EINVAL); /* the ends differ */
	assert_int_equal(do_dedupe(0, 0, 0, BS, 2 * BS), -EINVAL);
	assert_int_equal(do_dedupe(0, 0, 1, FILE_MAX_BYTES & ~BLOCK_MASK, BS), -EFBIG);
	assert_int_equal(do_dedupe(0, 0, 1, 0, 0), 0);
	assert_int_equal(shared_blocks(0, 0, 1, 0, 4), 0);
	delete_all();
	world_close();
}

static void equal_blocks_become_one(void **state)
{
	nblocks_t before;

	OK(do_write(0, 0, 16 * BS, 1));
	OK(do_write(1, 0, 16 * BS, 1));
	OK(do_fsync(1));
	before = free_blocks();
	assert_int_equal(do_dedupe(0, 0, 1, 0, 16 * BS), 16 * BS);
	assert_int_equal(shared_blocks(0, 0, 1, 0, 16), 16);
	assert_true(free_blocks() >= before + 15); /* a node for the counts */
	/* once more: nothing to do */
	assert_int_equal(do_dedupe(0, 0, 1, 0, 16 * BS), 16 * BS);
	OK(do_write(1, 0, BS, 5));
	expect_content(0, 0, BS, 1, 0);
	expect_content(1, 0, BS, 5, 0);
	delete_all();
	world_close();
}

static void stops_at_the_first_different_block(void **state)
{
	OK(do_write(0, 0, 8 * BS, 1));
	OK(do_write(1, 0, 8 * BS, 1));
	OK(do_write(1, 5 * BS + 77, 1, 2));
	assert_int_equal(do_dedupe(0, 0, 1, 0, 8 * BS), 5 * BS);
	assert_int_equal(shared_blocks(0, 0, 1, 0, 8), 5);
	assert_int_equal(do_dedupe(0, 5 * BS, 1, 5 * BS, 3 * BS), -EBADE);
	assert_int_equal(do_dedupe(0, 6 * BS, 1, 6 * BS, 2 * BS), 2 * BS);
	assert_int_equal(shared_blocks(0, 0, 1, 0, 8), 7);
	assert_int_equal(do_dedupe(0, BS, 0, 2 * BS, BS), -EBADE); /* one file */
	delete_all();
	world_close();
}

/* They are zeros, and stay what they are. */
static void holes_are_compared_and_left_alone(void **state)
{
	static const uint8_t zeros[BLOCK_SIZE];
	struct flight f;

	OK(do_truncate(0, 6 * BS));
	OK(do_truncate(1, 6 * BS));
	OK(do_one(&(struct todo){ .act = ACT_ALLOC, .file = 1, .off = 0, .len = 2 * BS }));
	flight_start(&f, &(struct todo){ .act = ACT_WRITE, .file = 0, .off = 2 * BS, .len = BS, .pattern = 1 });
	flight_wait(&f);
	flight_end(&f);
	file_op_init(&f.fop, FILE_WRITE, world.file[0], world.ctx);
	f.fop.offset = 2 * BS;
	f.fop.len = BS;
	f.fop.buf = (void *)zeros;
	assert_int_equal(file_run_blocking(&f.fop), BS);
	assert_int_equal(do_dedupe(0, 0, 1, 0, 6 * BS), 6 * BS);
	assert_int_equal(blocks_of(0), 1);
	assert_int_equal(blocks_of(1), 2);
	OK(do_write(1, 3 * BS, 1, 1));
	assert_int_equal(do_dedupe(0, 0, 1, 0, 6 * BS), 3 * BS);
	assert_int_equal(do_dedupe(1, 3 * BS, 0, 3 * BS, BS), -EBADE);
	delete_all();
	world_close();
}

/* The last block, when both files end in it at the same byte: what is behind is nobody's. */
static void the_last_block_may_be_partial(void **state)
{
	uint64_t size;
	uint8_t *got;

	OK(do_write(0, 0, 3 * BS, 1));
	OK(do_truncate(0, 2 * BS + 50)); /* old bytes behind EOF */
	OK(do_write(1, 0, 2 * BS + 50, 1));
	assert_int_equal(do_dedupe(0, 0, 1, 0, 2 * BS + 50), 2 * BS + 50);
	assert_int_equal(shared_blocks(0, 0, 1, 0, 3), 3);
	OK(do_truncate(1, 3 * BS));
	got = content(1, &size);
	for (uint64_t i = 0; i < 2 * BS + 50; i++)
		assert_int_equal(got[i], pattern_byte(1, i));
	for (uint64_t i = 2 * BS + 50; i < size; i++)
		assert_int_equal(got[i], 0);
	free(got);
	delete_all();
	world_close();
}

/* As the oracle says: how far are the blocks equal? */
static uint64_t equal_until(const struct model *x, uint64_t off, const struct model *y, uint64_t y_off,
			    uint64_t len)
{
	for (uint64_t at = 0; at < len; at += BS)
		if (memcmp(x->bytes + off + at, y->bytes + y_off + at, MIN(BS, len - at)))
			return at;
	return len;
}

static unsigned twins[2]; /* files that got the same bytes last */
static uint64_t twin_off;

static void random_dedupe(unsigned *shared)
{
	bool twin = below(4);
	unsigned x = twin ? twins[0] : below(FILES), y = twin ? twins[1] : below(FILES);
	uint64_t off = twin ? twin_off : below(10) * BS, y_off = below(5) ? off : below(10) * BS;
	uint64_t len = (1 + below(10)) * BS;
	uint64_t apart = off > y_off ? off - y_off : y_off - off;
	bool valid;
	int64_t rc;

	if (below(3) == 0 && files[x].size > off && files[x].size - off == files[y].size - y_off)
		len = files[x].size - off;
	valid = off + len <= files[x].size && y_off + len <= files[y].size &&
		(x != y || apart >= block_ceil(len) * BS) &&
		(!(len & BLOCK_MASK) || (off + len == files[x].size && y_off + len == files[y].size));
	rc = do_dedupe(x, off, y, y_off, len);
	if (!valid) {
		assert_int_equal(rc, -EINVAL);
		return;
	}
	len = equal_until(&files[x], off, &files[y], y_off, len);
	if (rc != (len ? (int64_t)len : -EBADE))
		fail_msg("%s at %llu with %s at %llu: %lld, not %llu", name_of(x), (unsigned long long)off,
			 name_of(y), (unsigned long long)y_off, (long long)rc, (unsigned long long)len);
	*shared += len > 0;
}

/* The same bytes to two files, here and there. */
static void twin_writes(void)
{
	unsigned x = below(FILES), y = (x + 1 + below(FILES - 1)) % FILES;
	struct todo t = { .act = ACT_WRITE, .file = x, .off = below(8) * BS, .len = 1 + below(9 * BS),
			  .pattern = rng() };

	both(&t);
	t.file = y;
	both(&t);
	twins[0] = x;
	twins[1] = y;
	twin_off = t.off;
}

static void random_operations(void **state)
{
	unsigned shared = 0;

	for (uint64_t seed = 1; seed <= 6; seed++) {
		begin(64u << 20, 512, seed);
		for (unsigned i = 0; i < 500; i++) {
			struct todo t = random_todo(files);

			switch (below(4)) {
			case 0: random_dedupe(&shared); break;
			case 1: twin_writes(); break;
			default: both(&t); break;
			}
			if (i % 25 == 0)
				compare_all("on the way");
		}
		compare_all("at the end");
		end();
	}
	assert_true(shared > 200);
}

#define EQUAL 30u

/* Neither before nor after a crash does either file hold anything else. */
static void a_cut_changes_no_bytes(void **state)
{
	struct sim *made = world.sim;
	nblocks_t empty = world.free_empty;
	bool cut = true;

	for (unsigned i = 0; i < EQUAL; i++)
		for (unsigned file = 0; file < 2; file++)
			OK(do_write(file, i * BS, BS, 100 + i));
	OK(do_fsync(0));
	OK(do_fsync(1));
	world_close();
	sim_settle(made);
	for (uint64_t n = 1; cut; n++) {
		struct ioctx *ctx;
		struct flight f;

		OK(sim_clone(made, &world.sim));
		OK(world_open());
		find_files();
		sim_crash_at(world.sim, sim_events(world.sim) + n);
		OK(ioctx_create(16, &ctx));
		remap_start(&f, ctx, FILE_DEDUPE, 0, 0, EQUAL * BS, 1, 0);
		while (!f.done) {
			if (!sim_crashed(world.sim))
				jrn_force_blocking(world.fs, jrn_running(world.fs));
			ioctx_run(ctx, true);
		}
		ioctx_destroy(ctx);
		cut = sim_crashed(world.sim);
		if (!cut)
			assert_int_equal(f.fop.result, EQUAL * BS);
		power_cut(n);
		OK(world_open());
		find_files();
		for (unsigned i = 0; i < EQUAL; i++) {
			expect_content(0, i * BS, BS, 100 + i, 0);
			expect_content(1, i * BS, BS, 100 + i, 0);
		}
		world.free_empty = empty;
		delete_all();
		world_close();
		sim_destroy(world.sim);
	}
	world.sim = made;
	OK(world_open());
	find_files();
	delete_all();
	world_close();
}

/* What a holder of a layout wrote in place, unseen by us, must be on the device before the only other copy
 * goes. */
static void foreign_writes_are_flushed_first(void **state)
{
	struct sim *made = world.sim;
	nblocks_t empty = world.free_empty;
	struct extent ext;
	uint8_t bytes[BLOCK_SIZE];

	OK(do_write(0, 0, BS, 1));
	OK(do_write(1, 0, BS, 2));
	OK(do_fsync(0));
	OK(do_fsync(1));
	world_close();
	sim_settle(made);
	for (uint64_t i = 0; i < BS; i++)
		bytes[i] = pattern_byte(2, i);
	for (uint64_t seed = 1; seed <= 12; seed++) {
		OK(sim_clone(made, &world.sim));
		OK(world_open());
		find_files();
		fs_rdlock(world.fs);
		OK(extmap_lookup(world.file[0], FORK_DATA, 0, 1, &ext));
		fs_unlock(world.fs);
		/* The first commit of a mount flushes in any case: not that one. */
		OK(do_write(2, 0, 1, 3));
		OK(do_fsync(2));
		OK(sim_poke(world.sim, ext.block << BLOCK_SHIFT, bytes, BS));
		assert_int_equal(do_dedupe(0, 0, 1, 0, BS), BS);
		OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
		power_cut(seed);
		OK(world_open());
		find_files();
		assert_int_equal(shared_blocks(0, 0, 1, 0, 1), 1);
		expect_content(1, 0, BS, 2, 0);
		world.free_empty = empty;
		delete_all();
		world_close();
		sim_destroy(world.sim);
	}
	world.sim = made;
	OK(world_open());
	find_files();
	delete_all();
	world_close();
}

/* ---- clone ---- */

static void clone_shares_or_fails(void **state)
{
	uint64_t size;
	uint8_t *got;

	OK(do_write(0, 0, 2 * BS, 1));
	OK(do_write(0, 3 * BS, BS + 100, 2)); /* block 2 is a hole */
	OK(do_write(1, 0, 8 * BS, 3));
	assert_int_equal(do_clone(0, 512, 1, 0, BS), -EINVAL);
	assert_int_equal(do_clone(0, 0, 1, 512, BS), -EINVAL);
	assert_int_equal(do_clone(0, 0, 1, 0, 100), -EINVAL);
	assert_int_equal(do_clone(0, 0, 1, 0, 8 * BS), -EINVAL); /* its last block would end in the middle */
	assert_int_equal(do_clone(0, 8 * BS, 1, 0, BS), -EINVAL);
	expect_content(1, 0, 8 * BS, 3, 0);
	assert_int_equal(do_clone(0, 0, 1, 0, 4 * BS), 4 * BS);
	assert_int_equal(shared_blocks(0, 0, 1, 0, 4), 3);
	got = content(1, &size);
	assert_int_equal(size, 8 * BS);
	for (uint64_t i = 2 * BS; i < 3 * BS; i++)
		assert_int_equal(got[i], 0);
	free(got);
	assert_int_equal(blocks_of(1), 7);
	/* with the last block, to the end of another file */
	assert_int_equal(do_clone(0, 0, 1, 6 * BS, 8 * BS), 4 * BS + 100);
	assert_int_equal(world.file[1]->core.size, 10 * BS + 100);
	assert_int_equal(shared_blocks(0, 0, 1, 6, 5), 4);
	expect_content(1, 9 * BS, BS + 100, 2, 0);
	delete_all();
	world_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(refuses_what_fidedupe_refuses, setup, teardown),
		cmocka_unit_test_setup_teardown(equal_blocks_become_one, setup, teardown),
		cmocka_unit_test_setup_teardown(stops_at_the_first_different_block, setup, teardown),
		cmocka_unit_test_setup_teardown(holes_are_compared_and_left_alone, setup, teardown),
		cmocka_unit_test_setup_teardown(the_last_block_may_be_partial, setup, teardown),
		cmocka_unit_test(random_operations),
		cmocka_unit_test_setup_teardown(a_cut_changes_no_bytes, setup, teardown),
		cmocka_unit_test_setup_teardown(foreign_writes_are_flushed_first, setup, teardown),
		cmocka_unit_test_setup_teardown(clone_shares_or_fails, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
