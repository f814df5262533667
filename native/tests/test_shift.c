/* SPDX-License-Identifier: MIT
 *
 * test_shift.c - collapse and insert: against a model, and with the power failing at every write of
 * those that take several transactions.
 */
#include "remap_fixture.h"
#include "tree_check.h"

#define BS ((uint64_t)BLOCK_SIZE)

static int setup(void **state)
{
	world_new(64u << 20, 512, 12);
	make_files();
	return 0;
}

static int teardown(void **state)
{
	world_end();
	return 0;
}

/* ---- requests that cannot be ---- */

static void refuses_what_fallocate_refuses(void **state)
{
	OK(do_write(0, 0, 4 * BS + 100, 1));
	assert_int_equal(do_collapse(0, 0, 100), -EINVAL);
	assert_int_equal(do_collapse(0, 512, BS), -EINVAL);
	assert_int_equal(do_collapse(0, 0, 0), -EINVAL);
	assert_int_equal(do_collapse(0, 0, 5 * BS), -EINVAL);
	assert_int_equal(do_collapse(0, 4 * BS, BS), -EINVAL);
	assert_int_equal(do_collapse(0, 8 * BS, BS), -EINVAL);
	assert_int_equal(do_collapse(0, 0, UINT64_MAX & ~BLOCK_MASK), -EFBIG);
	assert_int_equal(do_insert(0, 0, 100), -EINVAL);
	assert_int_equal(do_insert(0, 512, BS), -EINVAL);
	assert_int_equal(do_insert(0, 0, 0), -EINVAL);
	assert_int_equal(do_insert(0, 5 * BS, BS), -EINVAL);
	assert_int_equal(do_insert(0, 0, FILE_MAX_BYTES & ~BLOCK_MASK), -EFBIG);
	assert_int_equal(do_insert(0, BS, UINT64_MAX & ~BLOCK_MASK), -EFBIG);
	assert_int_equal(world.file[0]->core.size, 4 * BS + 100);
	/* A collapse up to EOF, even of a whole last block. */
	OK(do_truncate(0, 4 * BS));
	assert_int_equal(do_collapse(0, 3 * BS, BS), -EINVAL);
	assert_int_equal(do_insert(0, 4 * BS, BS), -EINVAL);
	assert_int_equal(do_collapse(0, 2 * BS, BS), 0);
	delete_all();
	world_close();
}

/* Preallocation behind EOF would come to lie behind the last block there is. */
static void an_insert_moves_no_block_too_far(void **state)
{
	uint64_t far = FILE_MAX_BYTES & ~BLOCK_MASK;

	OK(do_write(0, 0, BS, 1));
	OK(do_one(&(struct todo){ .act = ACT_ALLOC, .keep_size = true, .off = far - 4 * BS,
				  .len = BS }));
	assert_int_equal(do_insert(0, 0, 8 * BS), -EFBIG);
	assert_int_equal(do_insert(0, 0, 4 * BS), 0);
	assert_int_equal(do_insert(0, 0, BS), -EFBIG);
	assert_int_equal(blocks_of(0), 2);
	assert_int_equal(do_collapse(0, 0, 4 * BS), 0);
	assert_int_equal(blocks_of(0), 2);
	delete_all();
	world_close();
}

/* ---- against a model ---- */

static void model_collapse(struct model *m, uint64_t off, uint64_t len)
{
	memmove(m->bytes + off, m->bytes + off + len, m->size - off - len);
	m->size -= len;
}

static void model_insert(struct model *m, uint64_t off, uint64_t len)
{
	memmove(m->bytes + off + len, m->bytes + off, m->size - off);
	memset(m->bytes + off, 0, len);
	m->size += len;
}

static bool random_shift(void)
{
	unsigned file = below(FILES);
	struct model *m = &files[file];
	uint64_t off = below(block_ceil(m->size) + 1) * BS, len = (1 + below(6)) * BS;
	bool collapse = m->size + len > MODEL_MAX / 2 || below(2), valid;
	int64_t rc = collapse ? do_collapse(file, off, len) : do_insert(file, off, len);

	valid = collapse ? off + len < m->size : off < m->size;
	if (rc != (valid ? 0 : -EINVAL))
		fail_msg("%s at %llu, %llu bytes, of %llu: %lld", collapse ? "collapse" : "insert",
			 (unsigned long long)off, (unsigned long long)len,
			 (unsigned long long)m->size, (long long)rc);
	if (valid && collapse)
		model_collapse(m, off, len);
	else if (valid)
		model_insert(m, off, len);
	return valid;
}

static void random_operations(void **state)
{
	unsigned shifted = 0;

	for (uint64_t seed = 1; seed <= 6; seed++) {
		begin(64u << 20, 512, seed);
		for (unsigned i = 0; i < 500; i++) {
			if (below(3) == 0) {
				shifted += random_shift();
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
	assert_true(shifted > 200);
}

/* ---- what it costs ---- */

static void moves_blocks_and_copies_none(void **state)
{
	OK(do_write(0, 0, 32 * BS + 10, 1));
	assert_int_equal(do_insert(0, 16 * BS, 8 * BS), 0);
	assert_int_equal(blocks_of(0), 33);
	assert_int_equal(extents_of(0), 2);
	assert_int_equal(do_collapse(0, 16 * BS, 8 * BS), 0);
	assert_int_equal(blocks_of(0), 33);
	assert_int_equal(extents_of(0), 1);
	assert_int_equal(do_collapse(0, 0, 30 * BS), 0);
	assert_int_equal(blocks_of(0), 3);
	delete_all();
	world_close();
}

/* Others keep the blocks that a collapse lets go. */
static void shared_blocks_lose_one_user(void **state)
{
	uint64_t size;
	uint8_t *got;

	OK(do_write(0, 0, 8 * BS, 1));
	OK(do_clone(0, 0, 1, 0, 8 * BS));
	assert_int_equal(do_collapse(0, 0, 4 * BS), 0);
	got = content(1, &size);
	assert_int_equal(size, 8 * BS);
	for (uint64_t i = 0; i < size; i++)
		assert_int_equal(got[i], pattern_byte(1, i));
	free(got);
	got = content(0, &size);
	assert_int_equal(size, 4 * BS);
	for (uint64_t i = 0; i < size; i++)
		assert_int_equal(got[i], pattern_byte(1, 4 * BS + i));
	free(got);
	delete_all();
	world_close();
}

/* What is durable has the block in its old place: a write to the new one must not show there. */
static void writes_in_place_wait_for_the_collapse(void **state)
{
	uint64_t size;
	uint8_t *got;

	OK(do_write(0, 0, 3 * BS, 1));
	OK(do_fsync(0));
	assert_int_equal(do_collapse(0, 0, BS), 0);
	OK(do_write(0, 0, BS, 9));
	lose_power_keeping_data();
	got = content(0, &size);
	if (size == 3 * BS) { /* as before the collapse: then whole */
		for (uint64_t i = 0; i < size; i++)
			assert_int_equal(got[i], pattern_byte(1, i));
	} else {
		assert_int_equal(size, 2 * BS);
		for (uint64_t i = 0; i < BS; i++)
			assert_int_equal(got[BS + i], pattern_byte(1, 2 * BS + i));
	}
	free(got);
	delete_all();
	world_close();
}

/* The bytes behind EOF stay what they are: undefined, and never seen. */
static void the_tail_is_zero_when_the_file_grows(void **state)
{
	uint64_t size;
	uint8_t *got;

	OK(do_write(0, 0, 4 * BS, 3));
	OK(do_truncate(0, 3 * BS + 100)); /* 3996 old bytes behind EOF */
	assert_int_equal(do_insert(0, BS, 2 * BS), 0);
	OK(do_truncate(0, 6 * BS));
	got = content(0, &size);
	for (uint64_t i = 5 * BS + 100; i < 6 * BS; i++)
		assert_int_equal(got[i], 0);
	free(got);
	OK(do_truncate(0, 5 * BS + 100));
	assert_int_equal(do_collapse(0, 0, 4 * BS), 0);
	OK(do_write(0, 2 * BS, 10, 4));
	got = content(0, &size);
	for (uint64_t i = 0; i < 100; i++)
		assert_int_equal(got[BS + i], pattern_byte(3, 3 * BS + i));
	for (uint64_t i = BS + 100; i < 2 * BS; i++)
		assert_int_equal(got[i], 0);
	free(got);
	delete_all();
	world_close();
}

/* ---- several transactions ---- */

#define AT 20u
#define BY 70u /* collapse: more pieces than one transaction frees */
#define TAIL (PIECES * BS + 100) /* make_pieces() */

/* File 0 as it was made, but for `gap` holes at AT, or with BY blocks at AT gone. */
static bool looks(uint64_t size, const char *what)
{
	uint64_t is = world.file[0]->core.size;

	if (is != size)
		return false;
	for (unsigned i = 0; i < block_floor(size); i++) {
		unsigned of, found = piece_at(0, i, &of), want;

		if (size == TAIL || i < AT)
			want = piece_made(0, i);
		else if (size < TAIL)
			want = piece_made(0, i + BY);
		else
			want = i < AT + BY ? 0 : piece_made(0, i - BY);
		if (found != want || of)
			fail_msg("%s: block %u is piece %u, not %u", what, i, found, want);
	}
	return true;
}

static bool is_collapsed(void)
{
	if (looks(TAIL - BY * BS, "collapsed"))
		return true;
	assert_true(looks(TAIL, "as it was"));
	return false;
}

static bool is_inserted(void)
{
	if (looks(TAIL + BY * BS, "inserted"))
		return true;
	assert_true(looks(TAIL, "as it was"));
	return false;
}

static void start_collapse(struct flight *f, struct ioctx *ctx)
{
	remap_start(f, ctx, FILE_COLLAPSE, 0, AT * BS, BY * BS, 0, 0);
}

static void start_insert(struct flight *f, struct ioctx *ctx)
{
	remap_start(f, ctx, FILE_INSERT, 0, AT * BS, BY * BS, 0, 0);
}

static void a_collapse_cut_anywhere_is_all_or_nothing(void **state)
{
	make_pieces();
	cut_everywhere(&(struct cut_test){ .start = start_collapse, .is_new = is_collapsed });
	delete_all();
	world_close();
}

/* Its blocks have a second user each: freeing them is bookkeeping of another kind. */
static void the_same_of_shared_blocks(void **state)
{
	make_pieces();
	OK(do_clone(0, 0, 2, 4 * BS, PIECES * BS));
	cut_everywhere(&(struct cut_test){ .start = start_collapse, .is_new = is_collapsed });
	delete_all();
	world_close();
}

static void an_insert_cut_anywhere_is_all_or_nothing(void **state)
{
	make_pieces();
	cut_everywhere(&(struct cut_test){ .start = start_insert, .is_new = is_inserted });
	delete_all();
	world_close();
}

static void nobody_reads_in_the_middle(void **state)
{
	struct ioctx *ctx;
	struct flight f, reader, before;

	make_pieces();
	OK(ioctx_create(16, &ctx));
	start_insert(&f, ctx);
	assert_false(f.done);
	assert_int_equal(intents(), 1);
	flight_start(&reader, &(struct todo){ .act = ACT_READ, .off = (AT + BY) * BS, .len = BS });
	flight_start(&before, &(struct todo){ .act = ACT_READ, .off = (AT - 1) * BS, .len = BS });
	flight_wait(&before); /* what does not move is free for all */
	assert_false(reader.done);
	while (!f.done)
		OK(ioctx_run(ctx, true));
	OK(f.fop.result);
	flight_wait(&reader);
	assert_int_equal(((uint8_t *)reader.fop.buf)[7], pattern_byte(piece_pattern(0, AT), 7));
	flight_end(&reader);
	flight_end(&before);
	ioctx_destroy(ctx);
	assert_true(is_inserted());
	delete_all();
	world_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(refuses_what_fallocate_refuses, setup, teardown),
		cmocka_unit_test_setup_teardown(an_insert_moves_no_block_too_far, setup, teardown),
		cmocka_unit_test(random_operations),
		cmocka_unit_test_setup_teardown(moves_blocks_and_copies_none, setup, teardown),
		cmocka_unit_test_setup_teardown(shared_blocks_lose_one_user, setup, teardown),
		cmocka_unit_test_setup_teardown(writes_in_place_wait_for_the_collapse, setup,
						teardown),
		cmocka_unit_test_setup_teardown(the_tail_is_zero_when_the_file_grows, setup,
						teardown),
		cmocka_unit_test_setup_teardown(a_collapse_cut_anywhere_is_all_or_nothing, setup,
						teardown),
		cmocka_unit_test_setup_teardown(the_same_of_shared_blocks, setup, teardown),
		cmocka_unit_test_setup_teardown(an_insert_cut_anywhere_is_all_or_nothing, setup,
						teardown),
		cmocka_unit_test_setup_teardown(nobody_reads_in_the_middle, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
