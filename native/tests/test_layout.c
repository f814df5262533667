/* SPDX-License-Identifier: MIT
 *
 * test_layout.c - LAYOUT_GET, LAYOUT_COMMIT, LAYOUT_RETURN: what holders are told, what of their
 * writes becomes part of the file and when, and that nobody ever reads a block that was not written
 * to it.
 */
#include "layout_world.h"
#include "tree_check.h"

#include <time.h>

static int64_t do_alloc(unsigned file, uint64_t off, uint64_t len)
{
	return do_one(&(struct todo){ .act = ACT_ALLOC, .file = file, .off = off, .len = len });
}

/* ---- GET ------------------------------------------------------------------------------------ */

static void hole(void **state)
{
	uint64_t h = holder[0].id;
	nblocks_t before = free_blocks();
	xid_t xid;

	OK(get(0, h, IOMODE_RW, BLOCKS(4), BLOCKS(16), 0));
	assert_int_equal(args.next, BLOCKS(20));
	assert_int_equal(args.count, 1);
	assert_int_equal(ext[0].state, INVALID_DATA);
	assert_int_equal(size_of(0), 0);
	assert_int_equal(exposed(0, h), 16);
	assert_true(noted(0, h));
	assert_true(before - free_blocks() >= 16);
	/* Durable, all of it. */
	xid = world.file[0]->xid;
	assert_true(xid && xid <= jrn_durable(world.fs));
	/* The same again needs no transaction. */
	OK(get(0, h, IOMODE_RW, BLOCKS(4), BLOCKS(16), 0));
	assert_int_equal(world.file[0]->xid, xid);
	assert_int_equal(ext[0].state, INVALID_DATA);

	holder_write(BLOCKS(4), BLOCKS(16), 99);
	OK(commit(0, h, BLOCKS(6), BLOCKS(4), BLOCKS(10)));
	assert_int_equal(args.size, BLOCKS(10));
	assert_int_equal(size_of(0), BLOCKS(10));
	expect(0, 0, BLOCKS(6), 0);
	for (unsigned b = 6; b < 10; b++)
		assert_int_equal(state_of(0, b), EXT_WRITTEN);
	assert_int_equal(state_of(0, 5), EXT_UNWRITTEN);
	assert_int_equal(state_of(0, 10), EXT_UNWRITTEN);
}

static void written_and_unwritten(void **state)
{
	uint64_t h = holder[0].id;

	OK(do_write(0, 0, BLOCKS(4), 11));
	OK(do_alloc(0, BLOCKS(4), BLOCKS(4)));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	assert_int_equal(args.count, 2);
	assert_int_equal(ext[0].state, READ_WRITE_DATA);
	assert_int_equal(ext[1].state, INVALID_DATA);
	assert_int_equal(exposed(0, h), 4);
	/* Written blocks: no commit is needed for others to see it. */
	holder_write(0, BLOCKS(2), 22);
	expect(0, 0, BLOCKS(2), 22);
	holder_write(BLOCKS(4), BLOCKS(4), 33);
	expect(0, BLOCKS(4), BLOCKS(4), 0);
	OK(commit(0, h, BLOCKS(4), BLOCKS(4), 0));
	expect(0, BLOCKS(4), BLOCKS(4), 33);
	/* A commit of no ranges says that written ones were rewritten. */
	OK(commit_ranges(0, h, NULL, 0, 0, 0, 0));
}

/* A file that shares blocks: pairs; the commit takes the new blocks, the other file keeps the
 * old. */
static void copy_on_write(void **state)
{
	uint64_t h = holder[0].id;
	nblocks_t before;

	OK(do_write(0, 0, BLOCKS(8), 5));
	OK(do_copy(0, 1, BLOCKS(8)));
	before = free_blocks();
	OK(get(1, h, IOMODE_RW, 0, BLOCKS(8), 0));
	assert_int_equal(args.count, 2);
	assert_int_equal(ext[0].state, READ_DATA);
	assert_int_equal(ext[1].state, INVALID_DATA);
	assert_true(ext[0].device != ext[1].device);
	check_disk();
	holder_write(0, BLOCKS(8), 6);
	expect(1, 0, BLOCKS(8), 5);
	OK(commit(1, h, BLOCKS(2), BLOCKS(3), 0));
	expect(1, 0, BLOCKS(2), 5);
	expect(0, 0, BLOCKS(8), 5);
	for (unsigned b = 0; b < 8; b++) {
		struct extent e;

		assert_int_equal(state_at(1, FORK_STAGING, b, &e),
				 b >= 2 && b < 5 ? EXT_HOLE : EXT_UNWRITTEN);
	}
	check_disk();
	/* The rest goes back, and is free. */
	OK(give_back(1, h, IOMODE_RW, 0, UINT64_MAX));
	assert_int_equal(world.file[1]->core.flags & INODE_F_STAGING, 0);
	assert_int_equal(exposed(1, 0), 0);
	assert_true(before - free_blocks() <= 3 + 4);
	check_disk();
	OK(get(1, h, IOMODE_RW, 0, BLOCKS(8), 0));
	assert_int_equal(ext[0].state, READ_DATA);
	assert_int_equal(ext[2].state, READ_WRITE_DATA);
	assert_int_equal(ext[2].length, BLOCKS(3));
}

/* All blocks new, one commit; readers see the old ones until then. */
static void atomic(void **state)
{
	uint64_t h = holder[0].id;
	struct layout_range two[2] = { { 0, BLOCKS(1) }, { BLOCKS(40), BLOCKS(1) } };

	OK(do_write(0, 0, BLOCKS(4), 5));
	OK(do_alloc(0, BLOCKS(4), BLOCKS(4)));
	OK(get(0, h, IOMODE_RW, BLOCKS(40), BLOCKS(4), 0));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(12), LAYOUT_F_ATOMIC));
	assert_int_equal(args.next, BLOCKS(12));
	assert_int_equal(ext[0].state, READ_DATA);
	assert_int_equal(ext[1].state, INVALID_DATA);
	holder_write(0, BLOCKS(12), 8);
	expect(0, 0, BLOCKS(4), 5);
	expect(0, BLOCKS(4), BLOCKS(4), 0);
	check_disk();
	/* Not in parts, not with another layout, not overlapped by one. */
	assert_int_equal(give_back(0, h, IOMODE_RW, 0, BLOCKS(2)), -EINVAL);
	assert_int_equal(commit_ranges(0, h, two, 2, 0, 0, 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, BLOCKS(11), BLOCKS(4), 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, BLOCKS(39), BLOCKS(4), LAYOUT_F_ATOMIC), -EINVAL);
	OK(commit(0, h, BLOCKS(3), BLOCKS(1), BLOCKS(12)));
	expect(0, 0, BLOCKS(12), 8);
	assert_int_equal(world.file[0]->core.flags & INODE_F_STAGING, 0);
	check_disk();
}

static void atomic_returned(void **state)
{
	uint64_t h = holder[0].id;
	nblocks_t before;

	OK(do_write(0, 0, BLOCKS(8), 5));
	OK(do_fsync(0));
	before = free_blocks();
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), LAYOUT_F_ATOMIC));
	holder_write(0, BLOCKS(8), 8);
	OK(give_back(0, h, IOMODE_RW, 0, BLOCKS(8)));
	expect(0, 0, BLOCKS(8), 5);
	assert_int_equal(exposed(0, 0), 0);
	assert_false(noted(0, h));
	assert_true(before - free_blocks() <= 4); /* nodes of trees */
}

/* Many old and new extents: more than one transaction, decided by an intent. */
static void atomic_many(void **state)
{
	uint64_t h = holder[0].id;
	const unsigned n = 300;
	uint64_t intents;

	/* Old extents in reverse order on the device, holes between them. */
	for (unsigned i = n; i-- > 0;)
		OK(do_write(0, BLOCKS(2 * i), BLOCKS(1), 1000 + i));
	OK(do_copy(0, 1, BLOCKS(2 * n)));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(200), LAYOUT_F_ATOMIC));
	assert_int_equal(args.next, BLOCKS(200));
	holder_write(0, BLOCKS(200), 4);
	for (unsigned i = 0; i < 100; i++)
		expect(0, BLOCKS(2 * i), BLOCKS(1), 1000 + i);
	intents = get64(fs_root(world.fs)->next_intent);
	OK(commit(0, h, 0, BLOCKS(1), 0));
	assert_int_equal(get64(fs_root(world.fs)->next_intent), intents + 1);
	expect(0, 0, BLOCKS(200), 4);
	expect(0, BLOCKS(200), BLOCKS(1), 1000 + 100);
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_INTENT)), 0);
	check_disk();
}

static void read_iomode(void **state)
{
	uint64_t a = holder[0].id, b = holder[1].id;
	nblocks_t blocks;

	OK(do_write(0, 0, BLOCKS(4), 5));
	OK(do_write(0, BLOCKS(8), BLOCKS(4), 6));
	blocks = world.file[0]->core.blocks;
	OK(get(0, b, IOMODE_READ, 0, UINT64_MAX, 0));
	assert_int_equal(args.next, BLOCKS(12));
	assert_int_equal(args.count, 3);
	assert_int_equal(ext[0].state, READ_DATA);
	assert_int_equal(ext[1].state, NONE_DATA);
	assert_int_equal(world.file[0]->core.blocks, blocks);
	OK(give_back(0, b, IOMODE_READ, 0, UINT64_MAX));
	assert_false(noted(0, b));
	/* A foreign holder may write there: shorter, or not at all. */
	OK(get(0, a, IOMODE_RW, BLOCKS(4), BLOCKS(4), 0));
	OK(get(0, b, IOMODE_READ, 0, BLOCKS(12), 0));
	assert_int_equal(args.next, BLOCKS(4));
	assert_int_equal(get(0, b, IOMODE_READ, BLOCKS(5), BLOCKS(2), 0), -EAGAIN);
	assert_int_equal(get(0, b, IOMODE_READ, BLOCKS(5), BLOCKS(2), LAYOUT_F_WAIT), -EAGAIN);
	/* Written by then: told. */
	OK(get(0, a, IOMODE_RW, BLOCKS(4), BLOCKS(4), 0));
	holder_write(BLOCKS(4), BLOCKS(4), 7);
	OK(commit(0, a, BLOCKS(4), BLOCKS(4), 0));
	OK(get(0, b, IOMODE_READ, 0, BLOCKS(12), 0));
	assert_int_equal(args.next, BLOCKS(12));
	OK(get(0, b, IOMODE_READ, BLOCKS(100), UINT64_MAX, 0));
	assert_int_equal(args.next, BLOCKS(101));
}

static void pin(void **state)
{
	uint64_t h = holder[0].id;

	OK(do_write(0, 0, BLOCKS(4), 5));
	OK(get(0, h, IOMODE_PIN, 0, BLOCKS(8), 0));
	assert_int_equal(args.count, 2);
	assert_int_equal(ext[0].state, READ_DATA);
	assert_int_equal(ext[1].state, NONE_DATA);
	assert_false(noted(0, h));
	assert_int_equal(get(0, holder[1].id, IOMODE_RW, 0, BLOCKS(1), 0), -EAGAIN);
	OK(get(0, holder[1].id, IOMODE_PIN, 0, BLOCKS(1), 0));
	OK(give_back(0, h, IOMODE_PIN, 0, UINT64_MAX));
	OK(give_back(0, holder[1].id, IOMODE_PIN, 0, UINT64_MAX));
	OK(get(0, holder[1].id, IOMODE_RW, 0, BLOCKS(1), 0));
}

/* As many extents as there is room for; then on from `next`. */
static void cursor(void **state)
{
	uint64_t h = holder[0].id, at = 0;

	for (unsigned i = 20; i-- > 0;)
		OK(do_write(0, BLOCKS(2 * i), BLOCKS(1), 1000 + i));
	while (at < BLOCKS(40)) {
		set_get(h, IOMODE_RW, at, BLOCKS(40) - at, 0);
		args.cap = 3;
		OK(layout_call(FILE_LAYOUT_GET, 0));
		check_tiles();
		assert_true(args.next > at && args.next <= BLOCKS(40));
		at = args.next;
	}
	assert_int_equal(exposed(0, h), 20);
	/* Nothing was allocated beyond what was told, and too little room is no answer. */
	set_get(h, IOMODE_RW, BLOCKS(100), BLOCKS(2), 0);
	args.min_length = BLOCKS(2);
	OK(layout_call(FILE_LAYOUT_GET, 0));
	set_get(h, IOMODE_READ, 0, BLOCKS(40), 0);
	args.cap = 3;
	args.min_length = BLOCKS(40);
	assert_int_equal(layout_call(FILE_LAYOUT_GET, 0), -ENOSPC);
}

static void no_space(void **state)
{
	uint64_t h = holder[0].id;
	struct alloc_space sp;
	nblocks_t before, records;

	/* An answer that can be shorter is. */
	alloc_statfs(world.fs, &sp);
	OK(do_alloc(2, 0, BLOCKS(sp.avail - 200)));
	OK(do_fsync(2));
	before = free_blocks();
	records = bt_records(fs_tree(world.fs, TREE_EXPOSURE));
	set_get(h, IOMODE_RW, 0, BLOCKS(100000), 0);
	args.min_length = BLOCKS(5000);
	assert_int_equal(layout_call(FILE_LAYOUT_GET, 0), -ENOSPC);
	assert_int_equal(free_blocks(), before);
	assert_int_equal(world.file[0]->core.blocks, 0);
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_EXPOSURE)), records);
	assert_int_equal(get(0, h, IOMODE_RW, 0, BLOCKS(100000), LAYOUT_F_ATOMIC), -ENOSPC);
	assert_int_equal(free_blocks(), before);
	assert_int_equal(world.file[0]->core.flags & INODE_F_STAGING, 0);
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(100000), 0));
	assert_true(args.next >= BLOCKS(50) && args.next <= BLOCKS(220));
	assert_int_equal(world.file[0]->core.blocks, block_floor(args.next));
}

/* 1 GiB on an empty filesystem. */
static void large(void **state)
{
	world_close();
	sinks_gone();
	world_end();
	begin_world(3ull << 30);
	OK(get(0, holder[0].id, IOMODE_RW, 0, 1u << 30, 0));
	assert_int_equal(args.next, 1u << 30);
	print_message("1 GiB in %u extents\n", args.count);
	assert_true(args.count <= 2);
}

static void bad_arguments(void **state)
{
	uint64_t h = holder[0].id;

	assert_int_equal(get(0, h, IOMODE_ANY, 0, BLOCKS(1), 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, 1, BLOCKS(1), 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, 0, 0, 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, 0, 100, 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, 0, UINT64_MAX, 0), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_READ, 0, BLOCKS(1), LAYOUT_F_ATOMIC), -EINVAL);
	assert_int_equal(get(0, h, IOMODE_RW, BLOCKS(1), UINT64_MAX - BLOCKS(1) + 1, 0), -EFBIG);
	assert_int_equal(get(0, h, IOMODE_RW, 1ull << 63, BLOCKS(1), 0), -EFBIG);
	assert_int_equal(get(0, 12345, IOMODE_RW, 0, BLOCKS(1), 0), -ENOENT);
	assert_int_equal(commit(0, h, 0, 0, 0), -EINVAL);
	assert_int_equal(commit(0, h, 1, BLOCKS(1), 0), -EINVAL);
	assert_int_equal(commit(0, h, BLOCKS(1), UINT64_MAX - BLOCKS(1) + 1, 0), -EINVAL);
	assert_int_equal(commit(0, h, 0, BLOCKS(1), UINT64_MAX), -ERANGE);
	assert_int_equal(give_back(0, h, 0, 0, BLOCKS(1)), -EINVAL);
	assert_int_equal(give_back(0, h, IOMODE_RW, 1, BLOCKS(1)), -EINVAL);
	assert_int_equal(give_back(0, h, IOMODE_RW, 0, 0), -EINVAL);
	OK(give_back(0, h, IOMODE_ANY, 0, UINT64_MAX)); /* nothing is held: no error */
	assert_int_equal(exposed(0, 0), 0);
	assert_int_equal(world.file[0]->core.blocks, 0);
}

/* ---- COMMIT --------------------------------------------------------------------------------- */

/* Refused whole: what was there before is there after. */
static void not_held(void **state)
{
	uint64_t a = holder[0].id, b = holder[1].id, seq;
	struct layout_range ranges[3] =
		{ { 0, BLOCKS(2) }, { BLOCKS(6), BLOCKS(4) }, { BLOCKS(3), BLOCKS(1) } };

	OK(do_alloc(0, 0, BLOCKS(20)));
	OK(get(0, a, IOMODE_RW, 0, BLOCKS(8), 0));
	seq = args.seq;
	OK(get(0, b, IOMODE_RW, BLOCKS(8), BLOCKS(4), 0));
	assert_int_equal(commit_ranges(0, a, ranges, 3, 0, 0, 0), -ENXIO);
	assert_int_equal(commit(0, a, BLOCKS(8), BLOCKS(1), 0), -ENXIO);
	assert_int_equal(commit(0, b, 0, BLOCKS(1), 0), -ENXIO);
	assert_int_equal(commit(0, a, 0, BLOCKS(13), 0), -ENXIO);
	assert_int_equal(commit(1, a, 0, BLOCKS(1), 0), -ENXIO);
	assert_int_equal(commit_ranges(1, a, NULL, 0, 0, 0, 0), -ENXIO);
	assert_int_equal(commit(0, a, 0, BLOCKS(2), BLOCKS(200)), -ERANGE);
	/* Granted after what the caller knows of. */
	OK(get(0, a, IOMODE_RW, BLOCKS(14), BLOCKS(2), 0));
	ranges[1] = (struct layout_range){ BLOCKS(15), BLOCKS(1) };
	assert_int_equal(commit_ranges(0, a, ranges, 2, 0, seq, 0), -ENXIO);
	for (unsigned i = 0; i < 20; i++)
		assert_int_equal(state_of(0, i), EXT_UNWRITTEN);
	expect(0, 0, BLOCKS(20), 0);
	OK(get(0, a, IOMODE_RW, 0, BLOCKS(4), 0));
	holder_write(0, BLOCKS(4), 3);
	OK(commit_ranges(0, a, ranges + 2, 1, 0, args.seq, 0));
	assert_int_equal(state_of(0, 3), EXT_WRITTEN);
	/* Returned. */
	OK(give_back(0, a, IOMODE_RW, BLOCKS(1), BLOCKS(1)));
	assert_int_equal(commit(0, a, 0, BLOCKS(3), 0), -ENXIO);
	assert_int_equal(state_of(0, 0), EXT_UNWRITTEN);
}

static void sizes(void **state)
{
	uint64_t h = holder[0].id;

	OK(do_write(0, 0, BLOCKS(3), 5));
	OK(get(0, h, IOMODE_RW, BLOCKS(3), BLOCKS(4), 0));
	holder_write(BLOCKS(3), BLOCKS(4), 6);
	OK(commit(0, h, BLOCKS(3), BLOCKS(2), BLOCKS(4) + 100));
	assert_int_equal(size_of(0), BLOCKS(4) + 100);
	/* Never smaller; below EOF it need not be held. */
	OK(commit_ranges(0, h, NULL, 0, 10, 0, 0));
	assert_int_equal(args.size, BLOCKS(4) + 100);
	assert_int_equal(commit_ranges(0, h, NULL, 0, BLOCKS(7) + 1, 0, 0), -ERANGE);
	assert_int_equal(size_of(0), BLOCKS(4) + 100);
	OK(commit_ranges(0, h, NULL, 0, BLOCKS(7), 0, 0));
	expect(0, BLOCKS(3), BLOCKS(2), 6);
	expect(0, BLOCKS(5), BLOCKS(2), 0);
	args.mtime = (struct timestamp){ 0 };
	args = (struct layout_args){ .holder = h, .flags = LAYOUT_F_MTIME, .mtime = { 1000, 7 } };
	OK(layout_call(FILE_LAYOUT_COMMIT, 0));
	assert_int_equal(world.file[0]->core.mtime.sec, 1000);
	assert_int_equal(world.file[0]->core.mtime.nsec, 7);
}

/* Bytes behind EOF: whoever will move EOF finds zeros there, whatever was there once. */
static void tail(void **state)
{
	uint64_t h = holder[0].id;

	OK(do_write(0, 0, BLOCKS(2), 5));
	OK(do_truncate(0, BLOCKS(1) + 100));
	/* EOF's block inside the range. */
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(6), 0));
	holder_write(BLOCKS(2), BLOCKS(4), 6);
	OK(commit(0, h, BLOCKS(2), BLOCKS(4), BLOCKS(6)));
	expect(0, BLOCKS(1) + 100, BLOCK_SIZE - 100, 0);
	/* And before it. */
	OK(do_write(1, 0, BLOCKS(2), 5));
	OK(do_truncate(1, BLOCKS(1) + 100));
	OK(get(1, h, IOMODE_RW, BLOCKS(4), BLOCKS(2), 0));
	holder_write(BLOCKS(4), BLOCKS(2), 6);
	OK(commit(1, h, BLOCKS(4), BLOCKS(2), BLOCKS(6)));
	expect(1, BLOCKS(1) + 100, BLOCK_SIZE - 100, 0);
	expect(1, BLOCKS(4), BLOCKS(2), 6);
	/* Shared: the other file's block is not touched. */
	OK(do_write(2, 0, BLOCKS(2), 5));
	OK(do_truncate(2, BLOCKS(1) + 100));
	OK(give_back(1, h, IOMODE_RW, 0, UINT64_MAX));
	OK(do_truncate(1, 0));
	OK(do_copy(2, 1, BLOCKS(1) + 100));
	OK(get(1, h, IOMODE_RW, BLOCKS(4), BLOCKS(2), 0));
	holder_write(BLOCKS(4), BLOCKS(2), 6);
	OK(commit(1, h, BLOCKS(4), BLOCKS(2), BLOCKS(6)));
	expect(1, BLOCKS(1) + 100, BLOCK_SIZE - 100, 0);
	expect(1, 0, BLOCKS(1) + 100, 5);
	expect(2, 0, BLOCKS(1) + 100, 5);
}

/* The holder wrote behind EOF in its block and returned it: whoever goes on finds zeros. */
static void tail_of_a_holder(void **state)
{
	uint64_t h = holder[0].id;

	OK(get(0, h, IOMODE_RW, 0, BLOCKS(2), 0));
	holder_write(0, BLOCKS(2), 6);
	OK(commit(0, h, 0, BLOCKS(2), BLOCKS(1) + 10));
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	OK(do_truncate(0, BLOCKS(2)));
	expect(0, BLOCKS(1) + 10, BLOCK_SIZE - 10, 0);
}

static void setuid_goes(void **state)
{
	uint64_t h = holder[0].id;
	struct attr_change change = { .valid = ATTR_MODE, .mode = 04755 };

	OK(do_write(0, 0, BLOCKS(1), 5));
	OK(namei_setattr(world.file[0], &change));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(2), 0));
	holder_write(0, BLOCKS(2), 6);
	assert_int_equal(commit(0, h, BLOCKS(4), BLOCKS(1), 0), -ENXIO);
	assert_int_equal(world.file[0]->core.mode & 07777, 04755);
	OK(commit(0, h, BLOCKS(1), BLOCKS(1), BLOCKS(2)));
	assert_int_equal(world.file[0]->core.mode & 07777, 0755);
}

/* Ranges in any order, overlapping, in one extent and across many. */
static void many_ranges(void **state)
{
	const unsigned n = 1024;
	struct layout_range *ranges = calloc(n, sizeof(*ranges));
	uint64_t h = holder[0].id;
	struct timespec t0, t1;

	OK(get(0, h, IOMODE_RW, 0, BLOCKS(3 * n), 0));
	holder_write(0, BLOCKS(3 * n), 6);
	for (unsigned i = 0; i < n; i++)
		ranges[i] = (struct layout_range){ BLOCKS(3 * i), BLOCKS(1) };
	clock_gettime(CLOCK_MONOTONIC, &t0);
	OK(commit_ranges(0, h, ranges, n, BLOCKS(3 * n), 0, LAYOUT_F_LAZY));
	clock_gettime(CLOCK_MONOTONIC, &t1);
	print_message("commit of %u ranges of one extent: %ld us\n", n,
		      (t1.tv_sec - t0.tv_sec) * 1000000 + (t1.tv_nsec - t0.tv_nsec) / 1000);
	for (unsigned i = 0; i < 3 * n; i++)
		assert_int_equal(state_of(0, i), i % 3 ? EXT_UNWRITTEN : EXT_WRITTEN);
	/* Backwards, and each twice. */
	for (unsigned i = 0; i < n; i++)
		ranges[i] = (struct layout_range){ BLOCKS(3 * (n / 2 - 1 - i / 2)), BLOCKS(2) };
	OK(commit_ranges(0, h, ranges, n, 0, 0, 0));
	for (unsigned i = 0; i < 3 * n; i++)
		assert_int_equal(state_of(0, i), i % 3 == 0 || (i % 3 == 1 && i < 3 * n / 2) ?
				 EXT_WRITTEN : EXT_UNWRITTEN);
	check_disk();
	free(ranges);
}

/* More than one transaction holds; readers in between. */
static void very_many_ranges(void **state)
{
	const unsigned n = 5000;
	struct layout_range *ranges = calloc(n, sizeof(*ranges));
	uint64_t h = holder[0].id;

	OK(get(0, h, IOMODE_RW, 0, BLOCKS(2 * n), 0));
	holder_write(0, BLOCKS(2 * n), 6);
	for (unsigned i = 0; i < n; i++)
		ranges[i] = (struct layout_range){ BLOCKS(2 * ((i * 7) % n)), BLOCKS(1) };
	OK(commit_ranges(0, h, ranges, n, BLOCKS(2 * n), 0, 0));
	for (unsigned i = 0; i < 2 * n; i++)
		assert_int_equal(state_of(0, i), i % 2 ? EXT_UNWRITTEN : EXT_WRITTEN);
	check_disk();
	free(ranges);
}

/* ---- RETURN --------------------------------------------------------------------------------- */

static void return_splits(void **state)
{
	uint64_t h = holder[0].id, at = 0;
	struct grant_look look[8];

	OK(get(0, h, IOMODE_RW, 0, BLOCKS(10), 0));
	holder_write(0, BLOCKS(10), 6);
	OK(give_back(0, h, IOMODE_RW, BLOCKS(4), BLOCKS(2)));
	assert_int_equal(grant_list(world.file[0], &at, look, 8), 2);
	assert_int_equal(look[0].length, BLOCKS(4));
	assert_int_equal(look[1].offset, BLOCKS(6));
	assert_int_equal(look[0].seq, look[1].seq);
	assert_int_equal(exposed(0, h), 8);
	assert_int_equal(commit(0, h, BLOCKS(3), BLOCKS(4), 0), -ENXIO);
	OK(commit(0, h, 0, BLOCKS(4), BLOCKS(4)));
	OK(commit(0, h, BLOCKS(6), BLOCKS(4), BLOCKS(10)));
	expect(0, 0, BLOCKS(4), 6);
	expect(0, BLOCKS(4), BLOCKS(2), 0);
	/* The middle is free for another. */
	OK(get(0, holder[1].id, IOMODE_RW, BLOCKS(4), BLOCKS(2), 0));
	assert_int_equal(get(0, holder[1].id, IOMODE_RW, BLOCKS(3), BLOCKS(2), 0), -EAGAIN);
	OK(give_back(0, h, IOMODE_ANY, 0, UINT64_MAX));
	assert_false(noted(0, h));
	assert_true(noted(0, holder[1].id));
	assert_int_equal(exposed(0, h), 0);
	assert_int_equal(exposed(0, 0), 2);
}

/* What nobody committed is no part of the file: zeros below EOF, nothing behind it. */
static void uncommitted(void **state)
{
	uint64_t h = holder[0].id;

	OK(do_truncate(0, BLOCKS(4)));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	holder_write(0, BLOCKS(8), 6);
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	layouts_settle(world.fs);
	expect(0, 0, BLOCKS(4), 0);
	assert_int_equal(state_of(0, 3), EXT_UNWRITTEN);
	assert_int_equal(state_of(0, 4), EXT_HOLE);
	assert_int_equal(world.file[0]->core.blocks, 4);
}

/* More exposures than a transaction removes. */
static void return_many(void **state)
{
	uint64_t h = holder[0].id;

	for (unsigned i = 0; i < 600; i++)
		OK(do_write(0, BLOCKS(2 * i), BLOCKS(1), 7));
	OK(do_copy(0, 1, BLOCKS(1200)));
	for (uint64_t at = 0; at < BLOCKS(1200); at = args.next)
		OK(get(0, h, IOMODE_RW, at, BLOCKS(1200) - at, 0));
	assert_int_equal(exposed(0, h), 1200);
	OK(give_back(0, h, IOMODE_RW, 0, UINT64_MAX));
	assert_int_equal(exposed(0, h), 0);
	assert_int_equal(world.file[0]->core.flags & INODE_F_STAGING, 0);
	check_disk();
}

/* ---- after a restart ------------------------------------------------------------------------ */

static void restart(void **state)
{
	uint64_t h = holder[0].id, key = BLOCKS(8);

	OK(do_alloc(0, 0, BLOCKS(16)));
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	holder_write(0, BLOCKS(8), 6);
	OK(commit(0, h, 0, BLOCKS(2), 0));
	lose_power(true);
	assert_int_equal(holder_check(world.fs, h, holder[0].key), -EOWNERDEAD);
	expect(0, 0, BLOCKS(2), 6);
	expect(0, BLOCKS(2), BLOCKS(6), 0);
	/* Lost, but what it was told before can be committed, and nothing else. */
	assert_int_equal(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0), -EOWNERDEAD);
	OK(commit(0, h, BLOCKS(2), BLOCKS(2), 0));
	assert_int_equal(commit(0, h, BLOCKS(7), BLOCKS(2), 0), -EOWNERDEAD);
	come_back(0);
	OK(commit(0, h, BLOCKS(4), BLOCKS(2), 0));
	assert_int_equal(commit(0, h, key, BLOCKS(1), 0), -ENXIO);
	assert_int_equal(commit(0, h, BLOCKS(6), BLOCKS(3), 0), -ENXIO);
	assert_int_equal(commit(0, h, BLOCKS(20), BLOCKS(1), 0), -ERANGE);
	assert_int_equal(commit(0, h, BLOCKS(20), BLOCKS(1), BLOCKS(21)), -ENXIO);
	assert_int_equal(commit_ranges(0, h, NULL, 0, BLOCKS(40), 0, 0), -ENXIO);
	assert_int_equal(size_of(0), BLOCKS(16));
	expect(0, 0, BLOCKS(1), 6);
	expect(0, BLOCKS(6), BLOCKS(10), 0);
	/* And it goes on as before. */
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(16), 0));
	holder_write(0, BLOCKS(16), 9);
	OK(commit(0, h, BLOCKS(6), BLOCKS(10), 0));
	expect(0, 0, BLOCKS(16), 9);
	OK(give_back(0, h, IOMODE_ANY, 0, UINT64_MAX));
	assert_int_equal(exposed(0, 0), 0);
	assert_false(noted(0, h));
	come_back(1);
}

static void restart_staged(void **state)
{
	uint64_t h = holder[0].id;

	OK(do_write(0, 0, BLOCKS(8), 5));
	OK(do_copy(0, 1, BLOCKS(8)));
	OK(do_fsync(0));
	OK(do_fsync(1));
	OK(get(1, h, IOMODE_RW, 0, BLOCKS(8), 0));
	holder_write(0, BLOCKS(8), 6);
	lose_power(true);
	come_back(0);
	come_back(1);
	check_disk();
	expect(1, 0, BLOCKS(8), 5);
	OK(commit(1, h, 0, BLOCKS(4), 0));
	expect(1, 0, BLOCKS(4), 6);
	expect(0, 0, BLOCKS(8), 5);
	check_disk();
	OK(give_back_all(h));
	assert_int_equal(exposed(1, 0), 0);
	assert_int_equal(world.file[1]->core.flags & INODE_F_STAGING, 0);
}

/* A clean remount forgets nothing either; a lost holder that returns everything is as new. */
static void restart_clean(void **state)
{
	uint64_t h = holder[0].id;

	OK(get(0, h, IOMODE_RW, 0, BLOCKS(8), 0));
	OK(get(2, h, IOMODE_READ, 0, BLOCKS(8), 0));
	holder_write(0, 0, 6);
	remount();
	assert_int_equal(holder_check(world.fs, h, holder[0].key), -EOWNERDEAD);
	assert_true(noted(0, h) && noted(2, h));
	OK(give_back_all(h));
	assert_false(noted(0, h) || noted(2, h));
	layouts_settle(world.fs);
	OK(holder_check(world.fs, h, holder[0].key));
	come_back(1);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(hole), TEST(written_and_unwritten), TEST(copy_on_write), TEST(atomic),
		TEST(atomic_returned), TEST(atomic_many), TEST(read_iomode), TEST(pin),
		TEST(cursor), TEST(no_space), TEST(large), TEST(bad_arguments), TEST(not_held),
		TEST(sizes), TEST(tail), TEST(tail_of_a_holder), TEST(setuid_goes),
		TEST(many_ranges), TEST(very_many_ranges), TEST(return_splits),
		TEST(uncommitted), TEST(return_many), TEST(restart), TEST(restart_staged),
		TEST(restart_clean),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
