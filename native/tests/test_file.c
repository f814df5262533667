/* SPDX-License-Identifier: MIT
 *
 * test_file.c - the rules of the data path one by one: preallocation, sharing, limits, no space,
 * device errors, many extents, cancelling, threads.
 */
#include "file_fixture.h"

#include "btree.h"

static int setup(void **state)
{
	begin(64u << 20, 4096, 1);
	return 0;
}

static int teardown(void **state)
{
	end();
	return 0;
}

static void model_write(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	model_do(files, &(struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len,
					.pattern = pattern });
}

/* ---- rules one by one ----------------------------------------------------------------------- */

static struct todo fallocate_todo(enum act act, unsigned file, uint64_t off, uint64_t len,
				  bool keep)
{
	return (struct todo){ .act = act, .file = file, .off = off, .len = len, .keep_size = keep };
}

static nblocks_t blocks_of(unsigned file)
{
	struct inode_stat st;

	namei_stat(world.file[file], &st);
	return st.core.blocks;
}

static void holes_and_preallocation_seek(void **state)
{
	struct inode *in = world.file[0];
	struct todo t = fallocate_todo(ACT_ALLOC, 0, 8 * BLOCK_SIZE, 4 * BLOCK_SIZE, false);

	assert_int_equal(file_seek(in, 0, 3), -ENXIO);
	assert_int_equal(do_write(0, 2 * BLOCK_SIZE, 100, 7), 100);
	assert_int_equal(do_one(&t), 0);
	assert_int_equal(file_seek(in, 0, 3), 2 * BLOCK_SIZE);
	assert_int_equal(file_seek(in, 0, 4), 0);
	assert_int_equal(file_seek(in, 2 * BLOCK_SIZE + 5, 3), 2 * BLOCK_SIZE + 5);
	assert_int_equal(file_seek(in, 2 * BLOCK_SIZE, 4), 3 * BLOCK_SIZE);
	assert_int_equal(file_seek(in, 3 * BLOCK_SIZE, 3), -ENXIO);
	assert_int_equal(file_seek(in, 12 * BLOCK_SIZE, 4), -ENXIO);
	assert_int_equal(do_write(0, 0, 12 * BLOCK_SIZE, 7), 12 * BLOCK_SIZE);
	assert_int_equal(file_seek(in, 5, 4), 12 * BLOCK_SIZE);
	assert_int_equal(file_seek(in, 5, 9), -EINVAL);
}

static void preallocation_past_eof_ends_with_truncate(void **state)
{
	struct todo t = fallocate_todo(ACT_ALLOC, 0, 0, 40 * BLOCK_SIZE, true);

	assert_int_equal(do_write(0, 0, 100, 3), 100);
	assert_int_equal(do_one(&t), 0);
	assert_int_equal(blocks_of(0), 40);
	model_write(0, 0, 100, 3);
	same_as_model(0, &files[0], "preallocated");
	assert_int_equal(do_truncate(0, 100), 0);
	assert_int_equal(blocks_of(0), 1);
	same_as_model(0, &files[0], "truncated to its size");
}

static void limits_are_refused(void **state)
{
	struct todo t = { .act = ACT_WRITE, .file = 0, .off = FILE_MAX_BYTES - 10, .len = 100,
			  .pattern = 9 };

	assert_int_equal(do_one(&t), 10);
	t.off = FILE_MAX_BYTES;
	assert_int_equal(do_one(&t), -EFBIG);
	assert_int_equal(do_truncate(0, FILE_MAX_BYTES), 0);
	assert_int_equal(do_truncate(0, FILE_MAX_BYTES + 1), -EFBIG);
	t = fallocate_todo(ACT_ALLOC, 0, FILE_MAX_BYTES - 100, 200, false);
	assert_int_equal(do_one(&t), -EFBIG);
	t = fallocate_todo(ACT_ALLOC, 0, 0, FILE_MAX_BYTES, false);
	assert_int_equal(do_one(&t), -ENOSPC);
	t = fallocate_todo(ACT_PUNCH, 0, 0, FILE_MAX_BYTES, true);
	assert_int_equal(do_one(&t), 0);
	assert_int_equal(blocks_of(0), 0);
	t = fallocate_todo(ACT_ALLOC, 0, 0, 0, false);
	assert_int_equal(do_one(&t), -EINVAL);
	assert_int_equal(do_write(0, 0, 6000, 3), 6000);
	t = (struct todo){ .act = ACT_COPY, .file = 0, .dst = 0, .len = 9000, .dst_off = 5999 };
	assert_int_equal(do_one(&t), -EINVAL);
	assert_int_equal(do_truncate(0, 0), 0);
}

static void copies_share_blocks_until_written(void **state)
{
	struct todo copy = { .act = ACT_COPY, .file = 0, .dst = 1, .len = 32 * BLOCK_SIZE };
	nblocks_t before;

	both(&(struct todo){ .act = ACT_WRITE, .len = 20 * BLOCK_SIZE + 77, .pattern = 5 });
	before = free_blocks();
	both(&copy);
	/* Tree nodes, but none of the 21 data blocks. */
	assert_true(before - free_blocks() <= 3);
	compare_all("copied");
	both(&(struct todo){ .act = ACT_WRITE, .file = 1, .off = 5000, .len = 3000, .pattern = 6 });
	both(&(struct todo){ .act = ACT_WRITE, .file = 0, .off = 20 * BLOCK_SIZE + 1000,
			     .len = 5000, .pattern = 8 });
	both(&(struct todo){ .act = ACT_TRUNCATE, .file = 1, .off = 30 * BLOCK_SIZE });
	both(&(struct todo){ .act = ACT_PUNCH, .file = 1, .off = 100, .len = 100,
			     .keep_size = true });
	both(&(struct todo){ .act = ACT_ZERO, .file = 0, .off = 3 * BLOCK_SIZE + 9,
			     .len = 4 * BLOCK_SIZE });
	compare_all("written apart");
	world_close();
	OK(world_open());
	find_files();
	compare_all("after the remount");
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(world.file[i]->core.flags & INODE_F_STAGING, 0);
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_INTENT)), 0);
}

/* ---- the device fails ----------------------------------------------------------------------- */

static void failed_write_changes_nothing(void **state)
{
	both(&(struct todo){ .act = ACT_WRITE, .len = 3 * BLOCK_SIZE + 10, .pattern = 5 });
	both(&(struct todo){ .act = ACT_FSYNC });
	sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 1);
	assert_true(do_write(0, 10 * BLOCK_SIZE, 9000, 6) < 0);
	sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 0);
	compare_all("after the failed write");
	both(&(struct todo){ .act = ACT_TRUNCATE, .off = 20 * BLOCK_SIZE });
	compare_all("the blocks of the failed write read as zeros");
	sim_fail(world.sim, IO_READ, BEHIND_LOG, UINT32_MAX, 1);
	assert_int_equal(do_one(&(struct todo){ .act = ACT_READ, .len = 4096 }), -ERR_DEV_READ);
	compare_all("after the failed read");
	/* A partial write that cannot read what it has to merge. */
	sim_fail(world.sim, IO_READ, BEHIND_LOG, UINT32_MAX, 1);
	assert_int_equal(do_write(0, 5, 10, 9), -ERR_DEV_READ);
	compare_all("after the failed merge");
}

static void failed_copy_on_write_leaves_the_old_blocks(void **state)
{
	both(&(struct todo){ .act = ACT_WRITE, .len = 8 * BLOCK_SIZE, .pattern = 5 });
	both(&(struct todo){ .act = ACT_COPY, .dst = 1, .len = 8 * BLOCK_SIZE });
	sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 1);
	assert_true(do_write(1, BLOCK_SIZE, 3 * BLOCK_SIZE, 6) < 0);
	sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 0);
	compare_all("after the failed copy on write");
	assert_int_equal(world.file[1]->core.flags & INODE_F_STAGING, 0);
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_INTENT)), 0);
}

/* ---- no space ------------------------------------------------------------------------------- */

#define PIECE (1u << 20)

static uint64_t fill_up(unsigned file)
{
	uint64_t at = 0;
	int64_t n;

	while ((n = do_write(file, at, PIECE, 11)) > 0)
		at += (uint64_t)n;
	assert_int_equal(n, -ENOSPC);
	return at;
}

static void full_device_refuses_and_recovers(void **state)
{
	struct todo t = fallocate_todo(ACT_ALLOC, 1, 0, 8 * PIECE, false);
	struct alloc_space sp;
	uint64_t size;

	both(&(struct todo){ .act = ACT_WRITE, .file = 2, .len = 50000, .pattern = 5 });
	size = fill_up(0);
	alloc_statfs(world.fs, &sp);
	assert_int_equal(sp.avail, 0);
	assert_true(size > 20 * PIECE);
	assert_int_equal(do_one(&t), -ENOSPC);
	assert_int_equal(blocks_of(1), 0);
	/* What is written stays writable, and what is shared cannot be. */
	both(&(struct todo){ .act = ACT_WRITE, .file = 2, .off = 100, .len = 30000, .pattern = 6 });
	assert_int_equal(do_write(0, 5000, 70000, 12), 70000);
	both(&(struct todo){ .act = ACT_PUNCH, .file = 2, .off = 5000, .len = 9000,
			     .keep_size = true });
	same_as_model(2, &files[2], "full");
	assert_int_equal(do_fsync(0), 0);
	assert_int_equal(do_truncate(0, 10 * PIECE), 0);
	/* The freed blocks are busy until the commit: the write waits for it. */
	assert_int_equal(do_one(&t), 0);
	both(&(struct todo){ .act = ACT_WRITE, .file = 2, .len = 60000, .pattern = 7 });
	same_as_model(2, &files[2], "room again");
}

/* A deleted file's blocks come back to a writer that finds none, without anybody waiting for the
 * reaper by hand. */
static void writer_waits_for_the_reaper(void **state)
{
	fill_up(0);
	inode_put(world.file[0]);
	world.file[0] = NULL;
	OK(namei_unlink(world.root, name_of(0), strlen(name_of(0)), NULL));
	assert_int_equal(do_write(1, 0, PIECE, 3), PIECE);
}

static void failed_fallocate_takes_nothing(void **state)
{
	/* Passes the count, because it asks for what avail promises, to the last block: the map
	 * itself needs nodes. */
	struct alloc_space sp;
	struct todo t;
	nblocks_t before;
	int64_t rc;

	for (unsigned i = 0; i < 600; i++)
		assert_int_equal(do_write(1, (uint64_t)i * 2 * BLOCK_SIZE, BLOCK_SIZE, 3),
				 BLOCK_SIZE);
	for (unsigned i = 0; i < 600; i += 2)
		assert_int_equal(do_one(&(struct todo){ .act = ACT_PUNCH, .file = 1,
							.off = (uint64_t)i * 2 * BLOCK_SIZE,
							.len = BLOCK_SIZE }), 0);
	alloc_statfs(world.fs, &sp);
	before = blocks_of(1);
	t = fallocate_todo(ACT_ALLOC, 1, 0, (sp.avail + 300 + 1) << BLOCK_SHIFT, true);
	rc = do_one(&t);
	if (rc == -ENOSPC)
		assert_int_equal(blocks_of(1), before);
	else
		assert_int_equal(rc, 0);
	t.len += 1000 * BLOCK_SIZE;
	assert_int_equal(do_one(&t), -ENOSPC);
}

/* ---- threads -------------------------------------------------------------------------------- */

#define THREADS 3u
#define REGION 20000u /* bytes; neighbours meet in the middle of a block */

static void wait_here(struct file_op *fop)
{
	*(bool *)fop->user = true;
}

static void run_on(struct ioctx *ctx, struct file_op *fop)
{
	bool done = false;

	fop->done = wait_here;
	fop->user = &done;
	file_start(fop);
	while (!done)
		ioctx_run(ctx, true);
	xassert(fop->result >= 0);
}

/* Each thread writes its own region of one file and reads it back, while the others do the same
 * beside it. */
static void *neighbour(void *arg)
{
	unsigned me = (unsigned)(uintptr_t)arg;
	uint8_t *mine = io_alloc(REGION), *got = io_alloc(REGION);
	uint64_t x = me + 77;
	struct ioctx *ctx;

	xassert(ioctx_create(16, &ctx) == 0);
	memset(mine, 0, REGION);
	for (unsigned i = 0; i < 300; i++) {
		struct file_op fop;
		uint64_t off, len;

		x = x * 6364136223846793005u + 1442695040888963407u;
		off = (x >> 33) % REGION;
		len = 1 + (x >> 20) % (REGION - off);
		memset(mine + off, 1 + (int)(x >> 50) % 255, len);
		file_op_init(&fop, FILE_WRITE, world.file[0], ctx);
		fop.offset = me * REGION + off;
		fop.len = len;
		fop.buf = mine + off;
		fop.flags = i % 50 == 0 ? FILE_F_DSYNC : 0;
		run_on(ctx, &fop);
		file_op_init(&fop, i % 40 ? FILE_READ : FILE_FSYNC, world.file[0], ctx);
		fop.offset = me * REGION;
		fop.len = REGION;
		fop.buf = got;
		run_on(ctx, &fop);
		/* The end of the file is where the last of the others has written, so the read may
		 * be short. */
		if (i % 40)
			xassert(memcmp(got, mine, (size_t)fop.result) == 0);
	}
	ioctx_destroy(ctx);
	io_free(mine);
	io_free(got);
	return NULL;
}

static void threads_write_beside_each_other(void **state)
{
	pthread_t t[THREADS];

	for (uintptr_t i = 0; i < THREADS; i++)
		assert_int_equal(pthread_create(&t[i], NULL, neighbour, (void *)i), 0);
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
}

/* ---- many extents --------------------------------------------------------------------------- */

#define MANY 3000u

static void scatter(unsigned file)
{
	for (unsigned i = 0; i < MANY; i++)
		assert_int_equal(do_write(file, (uint64_t)i * 2 * BLOCK_SIZE, BLOCK_SIZE, i + 1),
				 BLOCK_SIZE);
	assert_int_equal(blocks_of(file), MANY);
}

static void many_extents_roll_through_transactions(void **state)
{
	struct todo t = { .act = ACT_COPY, .dst = 1, .len = MANY * 2ull * BLOCK_SIZE };
	uint64_t size;
	uint8_t *got;

	scatter(0);
	assert_int_equal(do_one(&t), (MANY * 2 - 1) * (int64_t)BLOCK_SIZE);
	assert_int_equal(blocks_of(1), MANY);
	t = fallocate_todo(ACT_PUNCH, 0, 100, MANY * (uint64_t)BLOCK_SIZE, true);
	assert_int_equal(do_one(&t), 0);
	t = fallocate_todo(ACT_ZERO, 1, BLOCK_SIZE, MANY * (uint64_t)BLOCK_SIZE, true);
	assert_int_equal(do_one(&t), 0);
	got = read_all(1, &size);
	for (unsigned i = 0; i < BLOCK_SIZE; i++)
		assert_int_equal(got[i], pattern_byte(1, i));
	for (uint64_t i = BLOCK_SIZE; i < MODEL_MAX; i++)
		assert_int_equal(got[i], 0);
	io_free(got);
	assert_int_equal(do_truncate(1, 0), 0);
	assert_int_equal(blocks_of(1), 0);
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_INTENT)), 0);
}

/* Freeing many blocks that only the truncate's intent remembers. */
static void cut_off_truncate_is_finished_at_mount(void **state)
{
	struct flight f;

	scatter(0);
	assert_int_equal(do_fsync(0), 0);
	flight_start(&f, &(struct todo){ .act = ACT_TRUNCATE, .file = 0, .off = 5000 });
	assert_false(f.done); /* it yields between its transactions */
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_INTENT)), 1);
	OK(jrn_force_blocking(world.fs, world.file[0]->xid));
	sim_crash_at(world.sim, sim_events(world.sim) + 1);
	flight_wait(&f);
	flight_end(&f);
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sim_restart(world.sim, 5);
	OK(world_open());
	find_files();
	/* Nobody gets at the extents behind the cut before they are gone. */
	assert_int_equal(do_truncate(0, 30 * BLOCK_SIZE), 0);
	model_write(0, 0, BLOCK_SIZE, 1);
	model_do(files, &(struct todo){ .act = ACT_TRUNCATE, .off = 30 * BLOCK_SIZE });
	same_as_model(0, &files[0], "after the power cut");
	reaper_drain(world.fs);
	assert_int_equal(blocks_of(0), 1);
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_INTENT)), 0);
}

/* ---- cancelling ----------------------------------------------------------------------------- */

static void parked_operation_can_be_cancelled(void **state)
{
	struct flight writes[2], read;

	both(&(struct todo){ .act = ACT_WRITE, .len = 4 * BLOCK_SIZE, .pattern = 5 });
	flight_start(&writes[0], &(struct todo){ .act = ACT_WRITE, .len = 2 * BLOCK_SIZE,
						 .pattern = 6 });
	flight_start(&writes[1], &(struct todo){ .act = ACT_WRITE, .off = 100, .len = 10,
						 .pattern = 7 });
	flight_start(&read, &(struct todo){ .act = ACT_READ, .off = 3 * BLOCK_SIZE, .len = 10 });
	assert_false(writes[1].done);
	assert_false(file_cancel(&writes[0].fop)); /* with the device */
	assert_true(file_cancel(&writes[1].fop));
	assert_false(file_cancel(&writes[1].fop));
	flight_wait(&writes[0]);
	flight_wait(&writes[1]);
	flight_wait(&read);
	assert_int_equal(writes[0].fop.result, 2 * BLOCK_SIZE);
	assert_int_equal(writes[1].fop.result, -EINTR);
	assert_int_equal(read.fop.result, 10);
	flight_end(&writes[0]);
	flight_end(&writes[1]);
	flight_end(&read);
	model_write(0, 0, 2 * BLOCK_SIZE, 6);
	compare_all("cancelled");
}

static void appends_at_once_do_not_overwrite_each_other(void **state)
{
	struct flight f[FLIGHT];
	uint64_t size, seen = 0;
	uint8_t *got;

	sim_shuffle(world.sim, true);
	for (unsigned i = 0; i < FLIGHT; i++)
		flight_start(&f[i], &(struct todo){ .act = ACT_APPEND, .len = 1000 + i,
						    .pattern = i + 1 });
	for (unsigned i = 0; i < FLIGHT; i++)
		flight_wait(&f[i]);
	got = read_all(0, &size);
	assert_int_equal(size, 1000 * FLIGHT + 6);
	for (unsigned i = 0; i < FLIGHT; i++) {
		for (unsigned k = 0; k < 1000 + i; k++)
			assert_int_equal(got[f[i].fop.offset + k], pattern_byte(i + 1, k));
		seen += f[i].fop.len;
		flight_end(&f[i]);
	}
	assert_int_equal(seen, size);
	io_free(got);
}

static void writing_clears_setuid(void **state)
{
	struct attr_change change = { .valid = ATTR_MODE, .mode = 06775 };
	struct inode_stat st;
	struct flight f;
	char byte = 1;

	OK(namei_setattr(world.file[0], &change));
	file_op_init(&f.fop, FILE_WRITE, world.file[0], NULL);
	f.fop.buf = &byte;
	f.fop.len = 1;
	f.fop.flags = FILE_F_KILL_PRIV;
	assert_int_equal(file_run_blocking(&f.fop), 1);
	namei_stat(world.file[0], &st);
	assert_int_equal(st.core.mode & 07777, 0775);
}

int main(void)
{
#define RULE(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = {
		RULE(holes_and_preallocation_seek),
		RULE(preallocation_past_eof_ends_with_truncate),
		RULE(limits_are_refused),
		RULE(copies_share_blocks_until_written),
		RULE(failed_write_changes_nothing),
		RULE(failed_copy_on_write_leaves_the_old_blocks),
		RULE(full_device_refuses_and_recovers),
		RULE(writer_waits_for_the_reaper),
		RULE(failed_fallocate_takes_nothing),
		RULE(threads_write_beside_each_other),
		RULE(many_extents_roll_through_transactions),
		RULE(cut_off_truncate_is_finished_at_mount),
		RULE(parked_operation_can_be_cancelled),
		RULE(appends_at_once_do_not_overwrite_each_other),
		RULE(writing_clears_setuid),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
