/* SPDX-License-Identifier: MIT
 *
 * test_layout_waiting.c - who waits for a layout, and what becomes of the kernel's pages of its
 * range.
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
	unsigned pages, attributes, timeouts;
	struct page_range dropped[32];
	uint64_t locked;       /* if locks: a page that is */
	bool locks;
	/* whose request it is: it comes to us when somebody has waited for the page */
	struct flight *late;
	struct todo arrives;
	struct flight dirty; /* a page of a mapping that is written back before it is dropped */
	bool write_back;
} kernel;

static void drop_range(uint64_t offset, uint64_t len)
{
	assert_true(kernel.pages < ARRAY_LEN(kernel.dropped));
	kernel.dropped[kernel.pages++] = (struct page_range){ offset, len };
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
}

/* A locked page keeps those behind it in its range. */
static int drop_pages(void *arg, inum_t ino, const struct page_range *ranges, unsigned n,
		      struct page_wait *wait)
{
	bool stuck = false;

	for (unsigned i = 0; i < n; i++) {
		stuck |= kernel.locks && ranges[i].offset <= kernel.locked &&
			 kernel.locked < ranges[i].offset + ranges[i].len;
		drop_range(ranges[i].offset, ranges[i].len);
	}
	if (!wait) /* nobody waits for what a revoke drops */
		return 0;
	assert_true(!stuck || wait->patience_ms);
	if (stuck) {
		kernel.timeouts++;
		if (kernel.late)
			flight_start(kernel.late, &kernel.arrives);
		kernel.late = NULL;
	}
	wait->result = stuck ? -ETIMEDOUT : 0;
	ioctx_wake(wait->done);
	return 0;
}

static void drop_attributes(void *arg, inum_t ino) { kernel.attributes++; }

static const struct cache_ops cache = { .pages = drop_pages, .attributes = drop_attributes };

static void expect_dropped(uint64_t offset, uint64_t len)
{
	assert_true(kernel.pages > 0);
	assert_int_equal(kernel.dropped[kernel.pages - 1].offset, offset);
	assert_int_equal(kernel.dropped[kernel.pages - 1].len, len);
}

static void pages(void **state)
{
	uint64_t h = holder[0].id;
	struct inode *in = world.file[0];

	OK(do_write(0, 0, BLOCKS(8), 5));
	memset(&kernel, 0, sizeof(kernel));
	world.fs->cache_ops = &cache;
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
		expect_dropped(BLOCKS(2), BLOCKS(2));
		assert_true(atomic_load(&in->pages_cached)); /* of the rest */
		assert_false(kernel.write_back);
		/* A commit, of whatever, drops all of the grant. */
		OK(commit(0, h, BLOCKS(3), BLOCKS(1), 0));
		assert_int_equal(kernel.pages, 2 + 3 * wait);
		expect_dropped(BLOCKS(2), BLOCKS(2));
		OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
		assert_int_equal(kernel.pages, 3 + 3 * wait);
		expect_dropped(BLOCKS(2), BLOCKS(2));
	}
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	assert_false(atomic_load(&in->pages_cached)); /* it was the whole file */
	atomic_store(&in->pages_cached, true);
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	world.fs->cache_ops = NULL;
}

/* A writer waits for this very holder, and has the page locked that it writes: what is around it is
 * waited for, and what it covers only for a while. */
static void pages_around_a_writer(void **state)
{
	struct inode *in = world.file[0];
	uint64_t h = holder[0].id;
	struct flight f;

	OK(do_write(0, 0, BLOCKS(8), 5));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	memset(&kernel, 0, sizeof(kernel));
	world.fs->cache_ops = &cache;
	atomic_store(&in->pages_cached, true);
	flight_start(&f, &(struct todo){ .act = ACT_WRITE, .off = BLOCKS(3) + 10, .len = 100,
					 .pattern = 3 });
	kernel.locks = true;
	kernel.locked = BLOCKS(3);
	for (unsigned i = 0; i < 2; i++) {
		kernel.pages = kernel.timeouts = kernel.attributes = 0;
		OK(commit(0, h, BLOCKS(3), BLOCKS(1), 0));
		assert_false(f.done);
		assert_int_equal(kernel.attributes, 1);
		assert_int_equal(kernel.timeouts, 1);
		assert_int_equal(kernel.pages, 3);
		assert_int_equal(kernel.dropped[0].offset, BLOCKS(3));
		assert_int_equal(kernel.dropped[0].len, BLOCKS(1));
		assert_int_equal(kernel.dropped[1].offset, 0);
		assert_int_equal(kernel.dropped[1].len, BLOCKS(3));
		expect_dropped(BLOCKS(4), BLOCKS(4));
		assert_true(atomic_load(&in->pages_cached)); /* one is left */
	}
	kernel.locks = false;
	kernel.pages = 0;
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	assert_int_equal(kernel.pages, 1); /* whom it kept waiting has gone on */
	expect_dropped(0, BLOCKS(8));
	flight_wait(&f);
	flight_end(&f);
	world.fs->cache_ops = NULL;
}

/* One that comes when its page is being waited for already. */
static void pages_around_a_late_writer(void **state)
{
	struct inode *in = world.file[0];
	uint64_t h = holder[0].id;
	struct flight f;

	OK(do_write(0, 0, BLOCKS(8), 5));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	memset(&kernel, 0, sizeof(kernel));
	world.fs->cache_ops = &cache;
	atomic_store(&in->pages_cached, true);
	kernel.locks = true;
	kernel.locked = BLOCKS(7);
	kernel.late = &f;
	kernel.arrives = (struct todo){ .act = ACT_WRITE, .off = BLOCKS(7), .len = 9,
					.pattern = 3 };
	OK(commit(0, h, BLOCKS(3), BLOCKS(1), 0));
	assert_false(f.done);
	assert_int_equal(kernel.timeouts, 2);
	assert_int_equal(kernel.pages, 3);
	assert_int_equal(kernel.dropped[0].len, BLOCKS(8));
	assert_int_equal(kernel.dropped[1].offset, BLOCKS(7));
	expect_dropped(0, BLOCKS(7));
	kernel.locks = false;
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	flight_wait(&f);
	flight_end(&f);
	world.fs->cache_ops = NULL;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(in_front_of_waiters), TEST(waits), TEST(pages),
		TEST(pages_around_a_writer), TEST(pages_around_a_late_writer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
