/* SPDX-License-Identifier: MIT
 *
 * test_layout_waiting.c - who waits for a layout, and what becomes of the kernel's pages of its range.
 */
#include "layout_world.h"
#include "tree_check.h"

/* ---- waiting -------------------------------------------------------------------------------- */

/* A writer waits for the holder; the holder's commit and return do not wait behind it. */
static void in_front_of_waiters(void **state)
{
	uint64_t h = holder[0].id;
	struct flight f;

	OK(do_write(0, 0, BLOCKS(8), 5));
	OK(do_copy(0, 1, BLOCKS(8)));
	OK(get(1, h, IOMODE_RW, 0, BLOCKS(8), 0));
	holder_write(0, BLOCKS(8), 6);
	flight_start(&f, &(struct todo){ .act = ACT_TRUNCATE, .file = 1, .off = BLOCKS(2) });
	while (ioctx_run(world.ctx, false) > 0)
		;
	assert_false(f.done);
	OK(commit(1, h, 0, BLOCKS(4), 0));
	assert_false(f.done);
	OK(give_back(1, h, IOMODE_RW, 0, UINT64_MAX));
	flight_wait(&f);
	assert_int_equal(f.fop.result, 0);
	flight_end(&f);
	assert_int_equal(size_of(1), BLOCKS(2));
	expect(1, 0, BLOCKS(2), 6);
}

/* With WAIT the grant comes when the other has returned. */
static void waits(void **state)
{
	struct layout_args mine;
	struct flight f;

	OK(get(0, holder[0].id, IOMODE_RW, 0, BLOCKS(8), 0));
	set_get(holder[1].id, IOMODE_RW, BLOCKS(4), BLOCKS(8), LAYOUT_F_WAIT);
	mine = args;
	file_op_init(&f.fop, FILE_LAYOUT_GET, world.file[0], world.ctx);
	f.done = false;
	f.fop.layout = &mine;
	f.fop.done = flight_done;
	f.fop.user = &f;
	file_start(&f.fop);
	while (ioctx_run(world.ctx, false) > 0)
		;
	assert_false(f.done);
	OK(give_back(0, holder[0].id, IOMODE_RW, 0, UINT64_MAX));
	flight_wait(&f);
	assert_int_equal(f.fop.result, 0);
	args = mine;
	check_tiles();
	/* And it can be given up. */
	set_get(holder[0].id, IOMODE_RW, BLOCKS(4), BLOCKS(8), LAYOUT_F_WAIT);
	mine = args;
	file_op_init(&f.fop, FILE_LAYOUT_GET, world.file[0], world.ctx);
	f.done = false;
	f.fop.layout = &mine;
	f.fop.done = flight_done;
	f.fop.user = &f;
	file_start(&f.fop);
	while (ioctx_run(world.ctx, false) > 0)
		;
	assert_false(f.done);
	assert_true(file_cancel(&f.fop));
	flight_wait(&f);
	assert_int_equal(f.fop.result, -EINTR);
}

/* ---- the kernel's pages --------------------------------------------------------------------- */

static struct kernel {
	unsigned pages, attributes;
	uint64_t offset, len;
	struct flight dirty; /* a page of a mapping that is written back before it is dropped */
	bool write_back;
} kernel;

static int drop_pages(void *arg, inum_t ino, uint64_t offset, uint64_t len, struct op *op)
{
	kernel.pages++;
	kernel.offset = offset;
	kernel.len = len;
	if (kernel.write_back) {
		struct flight *f = &kernel.dirty;

		kernel.write_back = f->done = false;
		f->mem = io_alloc(BLOCK_SIZE);
		memset(f->mem, 0x77, BLOCK_SIZE);
		file_op_init(&f->fop, FILE_WRITE, world.file[0], world.ctx);
		f->fop.offset = offset;
		f->fop.len = BLOCK_SIZE;
		f->fop.buf = f->mem;
		f->fop.done = flight_done;
		f->fop.user = f;
		file_start(&f->fop);
		flight_wait(f); /* the grant does not keep it waiting */
		assert_int_equal(f->fop.result, BLOCK_SIZE);
		flight_end(f);
	}
	if (op) /* nobody waits for what a revoke drops */
		ioctx_wake(op);
	return 0;
}

static void drop_attributes(void *arg, inum_t ino) { kernel.attributes++; }

static void pages(void **state)
{
	static const struct cache_ops ops = { .pages = drop_pages, .attributes = drop_attributes };
	uint64_t h = holder[0].id;
	struct inode *in = world.file[0];
	struct flight f;

	OK(do_write(0, 0, BLOCKS(8), 5));
	memset(&kernel, 0, sizeof(kernel));
	world.fs->cache_ops = &ops;
	/* Nothing is cached: nobody is asked. */
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	assert_int_equal(kernel.pages, 0);
	for (unsigned wait = 0; wait < 2; wait++) {
		atomic_store(&in->pages_cached, true);
		kernel.write_back = true;
		OK(get(0, h, IOMODE_RW, BLOCKS(2), BLOCKS(2), wait ? LAYOUT_F_WAIT : 0));
		assert_true(args.flags & LAYOUT_F_INVALIDATED);
		assert_int_equal(kernel.pages, 1 + 3 * wait);
		assert_int_equal(kernel.offset, BLOCKS(2));
		assert_int_equal(kernel.len, BLOCKS(2));
		assert_true(atomic_load(&in->pages_cached)); /* of the rest */
		assert_false(kernel.write_back);
		/* A commit, of whatever, drops all of the grant. */
		OK(commit(0, h, BLOCKS(3), BLOCKS(1), 0));
		assert_int_equal(kernel.pages, 2 + 3 * wait);
		assert_int_equal(kernel.offset, BLOCKS(2));
		OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
		assert_int_equal(kernel.pages, 3 + 3 * wait);
		assert_int_equal(kernel.len, BLOCKS(2));
	}
	/* Somebody waits for the grant: pages go with the return. */
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	assert_false(atomic_load(&in->pages_cached)); /* it was the whole file */
	atomic_store(&in->pages_cached, true);
	kernel.pages = kernel.attributes = 0;
	flight_start(&f, &(struct todo){ .act = ACT_WRITE, .len = BLOCKS(1), .pattern = 3 });
	OK(commit(0, h, BLOCKS(3), BLOCKS(1), 0));
	assert_int_equal(kernel.pages, 0);
	assert_int_equal(kernel.attributes, 1);
	assert_false(f.done);
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	assert_int_equal(kernel.pages, 1);
	flight_wait(&f);
	flight_end(&f);
	world.fs->cache_ops = NULL;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(in_front_of_waiters), TEST(waits), TEST(pages),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
