/* SPDX-License-Identifier: MIT
 *
 * test_revoke.c - holders that do not answer: what they could write moves away, what they knew is kept in quarantine until they
 * are fenced, over restarts and power cuts.
 *
 * Time is the virtual clock of the layouts. Holders write the simulated device itself, before and after they lost their layouts.
 */
#include <unistd.h>

#include "layout_fixture.h"
#include "tree_check.h"

#define DEVICE (96u << 20)
#define RECALL_NS (10ull * 1000000000)
#define B BLOCK_SIZE

static uint64_t now;
static struct layout_extent told[LAYOUT_MAX_EXTENTS];
static unsigned ntold;

static void set_clock(void)
{
	now = now ? now : RECALL_NS;
	layouts_set_clock(world.fs, now);
}

static int setup(void **state)
{
	now = 0;
	world_new(DEVICE, 512, 7);
	make_files();
	set_clock();
	return 0;
}

static int teardown(void **state)
{
	if (world.fs)
		world_close();
	sinks_gone();
	world_end();
	return 0;
}

static void pass(uint64_t ns)
{
	now += ns;
	layouts_set_clock(world.fs, now);
	layouts_settle(world.fs);
}

/* Whatever is under way on our own context gets on. */
static void turn(void)
{
	for (unsigned i = 0; i < 50; i++)
		OK(ioctx_run(world.ctx, false));
}

static nblocks_t quarantined(void)
{
	struct alloc_space sp;

	alloc_statfs(world.fs, &sp);
	return sp.quarantined;
}

static struct holder_look look_at(uint64_t id)
{
	struct holder_look look;
	uint64_t from = id - 1;

	assert_int_equal(holder_list(world.fs, &from, &look, 1), 1);
	assert_int_equal(look.id, id);
	return look;
}

static void remember(void)
{
	ntold = args.count;
	memcpy(told, ext, ntold * sizeof(*told));
}

/* The holder, which lost its layout and does not know, writes everything that it was told to write. */
static void write_stale(uint8_t byte)
{
	static uint8_t block[BLOCK_SIZE];

	memset(block, byte, sizeof(block));
	for (unsigned i = 0; i < ntold; i++) {
		if (told[i].state != INVALID_DATA && told[i].state != READ_WRITE_DATA)
			continue;
		for (uint64_t at = 0; at < told[i].length; at += BLOCK_SIZE)
			OK(sim_poke(world.sim, told[i].device + at, block, BLOCK_SIZE));
	}
}

static bool was_told(fsblock_t block)
{
	for (unsigned i = 0; i < ntold; i++)
		if (told[i].state != NONE_DATA && told[i].device >> BLOCK_SHIFT <= block &&
		    block < (told[i].device + told[i].length) >> BLOCK_SHIFT)
			return true;
	return false;
}

/* Nothing that anybody reads or will write lies where the holder knows: blocks [from, to) of the file. */
static void check_moved(unsigned file, fileblk_t from, fileblk_t to)
{
	for (fileblk_t at = from; at < to; at++) {
		struct extent e;

		if (state_at(file, FORK_DATA, at, &e) != EXT_HOLE && was_told(e.block))
			fail_msg("block %llu of the file is still where the holder knows it",
				 (unsigned long long)at);
	}
}

static void fence(uint64_t id)
{
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
}

/* Nothing is left of anything. */
static void check_all_free(void)
{
	check_disk();
	assert_int_equal(quarantined(), 0);
	delete_all();
}

static struct flight *start_write(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	struct flight *f = calloc(1, sizeof(*f));

	flight_start(f, &(struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len,
					.pattern = pattern });
	return f;
}

static int64_t finish(struct flight *f)
{
	int64_t rc;

	flight_wait(f);
	rc = f->fop.result;
	flight_end(f);
	free(f);
	return rc;
}

/* A holder with a layout of blocks [0, 8), all written by it (pattern 3), the first four committed. */
static uint64_t half_committed(void)
{
	uint64_t h = new_holder(0);

	OK(get(0, h, IOMODE_RW, 0, 8 * B, 0));
	remember();
	holder_write(0, 8 * B, 3);
	OK(commit(0, h, 0, 4 * B, 8 * B));
	return h;
}

/* ---- ------------------------------------------------------------------------------------------ */

static void writer_goes_on_elsewhere(void **state)
{
	uint64_t h = half_committed();
	struct flight *f = start_write(0, 0, 2 * B, 5);

	turn();
	assert_false(f->done);
	pass(RECALL_NS / 2);
	turn();
	assert_false(f->done);
	pass(RECALL_NS);
	assert_int_equal(finish(f), 2 * B);
	assert_int_equal(look_at(h).state, HOLDER_LOST);
	check_moved(0, 0, 2);
	/* It keeps what nobody wanted. */
	assert_int_equal(look_at(h).grants, 1);
	assert_int_equal(quarantined(), 2);
	/* An unwritten block that it knows; it is lost, so nobody waits for it. */
	assert_int_equal(do_write(0, 6 * B, B, 7), B);
	check_moved(0, 6, 7);
	assert_int_equal(quarantined(), 3);
	assert_int_equal(look_at(h).quarantined, 3);
	/* Only in the blocks that it still has may its writes show. */
	write_stale(0xdd);
	expect(0, 0, 2 * B, 5);
	expect(0, 4 * B, 2 * B, 0);
	expect(0, 6 * B, B, 7);
	expect(0, 7 * B, B, 0);
	/* What it did not commit in time is refused, what it has is not. */
	assert_int_equal(commit(0, h, 6 * B, B, 0), -EOWNERDEAD);
	OK(commit(0, h, 4 * B, 2 * B, 0));
	fence(h);
	assert_int_equal(quarantined(), 0);
	assert_int_equal(layouts_counters(world.fs)->relocated_blocks, 2);
	check_all_free();
}

static void quarantine_is_not_reused(void **state)
{
	uint64_t h = half_committed();
	struct alloc_space sp;

	pass(1);
	OK(holder_lost(world.fs, h));
	assert_int_equal(do_write(0, 0, 8 * B, 5), 8 * B);
	assert_int_equal(quarantined(), 8);
	/* All that is free, and nothing more. */
	alloc_statfs(world.fs, &sp);
	for (uint64_t at = 0; ; at += 64) {
		int64_t rc = do_one(&(struct todo){ .act = ACT_ALLOC, .file = 1, .off = at * B,
						    .len = 64 * B, .keep_size = true });

		if (rc) {
			assert_int_equal(rc, -ENOSPC);
			break;
		}
	}
	for (fileblk_t at = 0; at < DEVICE / B;) {
		struct extent e;

		fs_rdlock(world.fs);
		OK(extmap_lookup(world.file[1], FORK_DATA, at, DEVICE / B, &e));
		fs_unlock(world.fs);
		for (nblocks_t i = 0; e.state != EXT_HOLE && i < e.len; i++)
			assert_false(was_told(e.block + i));
		at += e.len;
	}
	write_stale(0xdd);
	expect(0, 0, 8 * B, 5);
	assert_int_equal(quarantined(), 8);
	fence(h);
	check_all_free();
}

/* More pieces than one transaction, or one hold of the lock, takes. */
static void many_extents(void **state)
{
	static struct layout_range ranges[1024];
	uint64_t h = new_holder(0);

	OK(get(0, h, IOMODE_RW, 0, 2048 * B, 0));
	remember();
	holder_write(0, 2048 * B, 3);
	for (unsigned i = 0; i < 1024; i++)
		ranges[i] = (struct layout_range){ 2 * i * B, B };
	OK(commit_ranges(0, h, ranges, 1024, 2048 * B, 0, 0));
	OK(get(1, h, IOMODE_RW, 0, 512 * B, LAYOUT_F_ATOMIC));
	OK(holder_lost(world.fs, h));
	OK(layout_recall(world.file[0], h, IOMODE_ANY, 0, UINT64_MAX));
	layouts_settle(world.fs);
	assert_int_equal(look_at(h).grants, 1);
	assert_int_equal(exposed(0, h), 0);
	check_moved(0, 0, 2048);
	assert_int_equal(quarantined(), 2048);
	write_stale(0xdd);
	for (unsigned i = 0; i < 2048; i++) {
		struct flight f;

		flight_start(&f, &(struct todo){ .act = ACT_READ, .file = 0, .off = i * B, .len = B });
		flight_wait(&f);
		for (unsigned j = 0; j < B; j++)
			assert_int_equal(((uint8_t *)f.fop.buf)[j],
					 i & 1 ? 0 : pattern_byte(3, i * B + j));
		flight_end(&f);
	}
	assert_int_equal(do_truncate(0, 0), 0);
	assert_int_equal(quarantined(), 2048 + 1024);
	fence(h);
	check_all_free();
}

static void reader_is_lost(void **state)
{
	uint64_t h = new_holder(0);
	struct flight f;

	assert_int_equal(do_write(0, 0, 4 * B, 3), 4 * B);
	OK(get(0, h, IOMODE_READ, 0, 4 * B, 0));
	remember();
	/* A write in place does not disturb it. */
	assert_int_equal(do_write(0, 0, B, 5), B);
	flight_start(&f, &(struct todo){ .act = ACT_PUNCH, .file = 0, .off = 0, .len = 4 * B });
	turn();
	assert_false(f.done);
	pass(RECALL_NS + 1);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 0);
	flight_end(&f);
	assert_int_equal(quarantined(), 4);
	assert_int_equal(look_at(h).grants, 0);
	expect(0, 0, 4 * B, 0);
	assert_int_equal(do_write(0, 0, 4 * B, 7), 4 * B);
	check_moved(0, 0, 4);
	fence(h);
	check_all_free();
}

static void ghost_after_restart(void **state)
{
	uint64_t h = half_committed();

	OK(do_fsync(0));
	lose_power(true);
	set_clock();
	assert_int_equal(look_at(h).state, HOLDER_LOST);
	/* In place would be where the holder writes. */
	assert_int_equal(do_write(0, 0, B, 5), B);
	check_moved(0, 0, 1);
	assert_int_equal(quarantined(), 1);
	write_stale(0xdd);
	expect(0, 0, B, 5);
	come_back(0);
	/* What it wrote before, and committed afterwards. */
	OK(commit(0, h, 4 * B, 2 * B, 0));
	assert_int_equal(state_of(0, 4), EXT_WRITTEN);
	assert_int_equal(state_of(0, 6), EXT_UNWRITTEN);
	assert_int_not_equal(commit(0, h, 0, B, 0), 0);
	/* Before it has returned everything nothing is released. */
	layouts_settle(world.fs);
	assert_int_equal(quarantined(), 1);
	OK(give_back_all(h));
	layouts_settle(world.fs);
	assert_int_equal(quarantined(), 0);
	expect(0, 0, B, 5);
	OK(holder_gone(world.fs, h));
	check_all_free();
}

/* Readers of written blocks that move are asked too, and have their own time. */
static void reader_of_blocks_that_move(void **state)
{
	for (unsigned answers = 0; answers < 2; answers++) {
		uint64_t h = half_committed(), reader = new_holder(1);
		struct flight *f;

		OK(get(0, reader, IOMODE_READ, 0, 4 * B, 0));
		f = start_write(0, 0, 2 * B, 5);
		turn();
		pass(RECALL_NS + 1);
		turn();
		assert_int_equal(look_at(h).state, HOLDER_LOST);
		assert_int_equal(look_at(reader).state, HOLDER_LIVE);
		assert_false(f->done);
		if (answers)
			OK(give_back(0, reader, IOMODE_ANY, 0, 4 * B));
		else
			pass(RECALL_NS);
		assert_int_equal(finish(f), 2 * B);
		layouts_settle(world.fs);
		check_moved(0, 0, 2);
		assert_int_equal(quarantined(), 2);
		fence(h);
		assert_int_equal(quarantined(), answers ? 0 : 2); /* kept for both */
		if (!answers)
			fence(reader);
		else
			OK(holder_gone(world.fs, reader));
		assert_int_equal(do_truncate(0, 0), 0);
		for (unsigned i = 0; i < 2; i++) {
			event_sink_destroy(world.fs, holder[i].sink);
			holder[i].sink = NULL;
		}
	}
	check_all_free();
}

static void clone_file(unsigned from, unsigned to, uint64_t len)
{
	assert_int_equal(do_one(&(struct todo){ .act = ACT_COPY, .file = from, .dst = to,
						.len = len }), len);
}

/* Copy on write: what it was to write was never mapped; what it read stays with the twin. */
static void shared_blocks(void **state)
{
	uint64_t h = new_holder(0);
	struct event_sink *sink = holder[0].sink;
	struct layout_event ev;

	assert_int_equal(do_write(0, 0, 4 * B, 3), 4 * B);
	clone_file(0, 1, 4 * B);
	OK(get(0, h, IOMODE_RW, 0, 4 * B, 0));
	assert_int_equal(ext[0].state, READ_DATA);
	remember();
	OK(layout_recall(world.file[0], h, IOMODE_RW, 0, 4 * B));
	pass(RECALL_NS + 1);
	assert_int_equal(look_at(h).grants, 0);
	assert_int_equal(quarantined(), 4);
	assert_true(event_next(world.fs, sink, &ev) && ev.type == EVENT_RECALL);
	assert_true(event_next(world.fs, sink, &ev) && ev.type == EVENT_REVOKED);
	assert_true(ev.iomode == IOMODE_RW && ev.offset == 0 && ev.length == 4 * B);
	write_stale(0xdd);
	expect(0, 0, 4 * B, 3);
	expect(1, 0, 4 * B, 3);
	/* The twin knows nothing of the holder, which can read its blocks all the same. */
	assert_int_equal(do_truncate(0, 0), 0);
	assert_int_equal(quarantined(), 4);
	assert_int_equal(do_truncate(1, 0), 0);
	assert_int_equal(quarantined(), 8);
	fence(h);
	check_all_free();
}

static void atomic_goes_whole(void **state)
{
	uint64_t h = new_holder(0);

	assert_int_equal(do_write(0, 0, 4 * B, 3), 4 * B);
	OK(get(0, h, IOMODE_RW, 0, 8 * B, LAYOUT_F_ATOMIC));
	remember();
	OK(holder_lost(world.fs, h));
	assert_int_equal(do_write(0, 7 * B, B, 5), B);
	layouts_settle(world.fs);
	assert_int_equal(look_at(h).grants, 0);
	assert_int_equal(quarantined(), 8);
	assert_int_not_equal(commit(0, h, 0, 8 * B, 0), 0);
	write_stale(0xdd);
	expect(0, 0, 4 * B, 3);
	expect(0, 4 * B, 3 * B, 0);
	expect(0, 7 * B, B, 5);
	fence(h);
	check_all_free();
}

/* Fenced before anybody wanted its range: nothing is copied. */
static void fenced_with_everything(void **state)
{
	uint64_t h = new_holder(0);

	assert_int_equal(do_write(1, 0, 4 * B, 3), 4 * B);
	OK(get(0, h, IOMODE_RW, 0, 4 * B, 0));
	OK(get(1, h, IOMODE_RW, 0, 8 * B, LAYOUT_F_ATOMIC));
	OK(get(2, h, IOMODE_READ, 0, 4 * B, 0));
	OK(holder_lost(world.fs, h));
	fence(h);
	assert_int_equal(layouts_counters(world.fs)->relocated_blocks, 0);
	assert_int_equal(exposed(0, h) + exposed(1, h), 0);
	assert_false(noted(0, h) || noted(1, h) || noted(2, h));
	assert_int_equal(state_of(0, 0), EXT_HOLE); /* past EOF */
	expect(1, 0, 4 * B, 3);
	check_all_free();
}

static void two_ghosts(void **state)
{
	uint64_t a = new_holder(0), b = new_holder(1);

	OK(get(0, a, IOMODE_RW, 0, 4 * B, 0));
	holder_write(0, 4 * B, 3);
	OK(commit(0, a, 0, 4 * B, 4 * B));
	OK(get(0, b, IOMODE_RW, 4 * B, 4 * B, 0));
	holder_write(4 * B, 4 * B, 4);
	OK(commit(0, b, 4 * B, 4 * B, 8 * B));
	lose_power(true);
	set_clock();
	/* Each ghost is in the way of the other's revoke. */
	assert_int_equal(do_write(0, 2 * B, 4 * B, 5), 4 * B);
	expect(0, 0, 2 * B, 3);
	expect(0, 2 * B, 4 * B, 5);
	assert_true(quarantined() >= 4);
	fence(a);
	/* The other one may reach what was kept for both. */
	assert_true(quarantined() >= 4);
	fence(b);
	assert_int_equal(quarantined(), 0);
	check_all_free();
}

static void returned_while_it_waits(void **state)
{
	uint64_t h = half_committed();
	struct flight *f;
	struct seg reading;

	seg_init(&reading, SEG_READ_IO, 0, 8 * B, NULL);
	OK(seg_try(world.file[0], &reading));
	f = start_write(0, 0, 2 * B, 5);
	turn();
	now += 2 * RECALL_NS;
	layouts_set_clock(world.fs, now); /* the revoke parks behind the reader */
	for (unsigned i = 0; look_at(h).state != HOLDER_LOST; i++) {
		assert_true(i < 5000);
		usleep(1000);
	}
	OK(give_back_all(h));
	assert_int_equal(look_at(h).state, HOLDER_LIVE);
	seg_release(world.file[0], &reading);
	assert_int_equal(finish(f), 2 * B);
	layouts_settle(world.fs);
	assert_int_equal(quarantined(), 0);
	assert_int_equal(layouts_counters(world.fs)->relocated_blocks, 0);
	OK(holder_gone(world.fs, h));
	check_all_free();
}

static void unlinked_file(void **state)
{
	uint64_t h = half_committed();

	OK(namei_unlink(world.root, name_of(0), strlen(name_of(0)), NULL));
	inode_put(world.file[0]);
	world.file[0] = NULL;
	pass(1);
	assert_int_equal(look_at(h).state, HOLDER_LIVE);
	pass(RECALL_NS);
	assert_int_equal(look_at(h).state, HOLDER_LOST);
	assert_int_equal(look_at(h).grants, 0);
	reaper_drain(world.fs);
	assert_int_equal(quarantined(), 8);
	write_stale(0xdd);
	fence(h);
	assert_int_equal(quarantined(), 0);
	check_all_free();
}

static void copy_fails(void **state)
{
	uint64_t h = half_committed();
	struct flight *f;

	f = start_write(0, 0, 4 * B, 5);
	turn();
	sim_fail(world.sim, IO_READ, told[0].device, 4 * B, 1000);
	pass(RECALL_NS + 1);
	assert_int_equal(err_errno((int)finish(f)), EIO);
	assert_int_equal(look_at(h).grants, 1);
	sim_fail(world.sim, IO_READ, 0, 0, 0);
	expect(0, 0, 4 * B, 3);
	/* The next one begins anew. */
	assert_int_equal(do_write(0, 0, 4 * B, 5), 4 * B);
	check_moved(0, 0, 4);
	write_stale(0xdd);
	expect(0, 0, 4 * B, 5);
	fence(h);
	check_all_free();
}

static void fill_device(unsigned file)
{
	for (uint64_t len = 4096; len; len /= 4)
		for (uint64_t at = 0; do_one(&(struct todo){ .act = ACT_ALLOC, .file = file,
							     .off = at * B, .len = len * B,
							     .keep_size = true }) == 0;)
			at += len;
}

static void no_space_for_the_copy(void **state)
{
	uint64_t h = half_committed();
	struct flight *f;

	fill_device(1);
	f = start_write(0, 0, 4 * B, 5);
	turn();
	pass(RECALL_NS + 1);
	turn();
	assert_false(f->done); /* some may become free */
	assert_int_equal(do_truncate(1, 0), 0);
	pass(RECALL_NS / 2);
	assert_int_equal(finish(f), 4 * B);
	check_moved(0, 0, 4);
	fence(h);
	check_all_free();
}

static void never_space_for_the_copy(void **state)
{
	uint64_t h = half_committed();
	struct flight *f;

	fill_device(1);
	f = start_write(0, 0, 4 * B, 5);
	turn();
	pass(RECALL_NS + 1);
	turn();
	assert_false(f->done);
	for (unsigned i = 0; i < 12; i++)
		pass(RECALL_NS / 8);
	assert_int_equal(finish(f), -EIO);
	expect(0, 0, 4 * B, 3);
	/* Fenced: nothing has to be copied any more. */
	fence(h);
	assert_int_equal(do_write(0, 0, 4 * B, 5), 4 * B);
	expect(0, 0, 4 * B, 5);
	check_all_free();
}

/* Fenced while the copy waits for space: nothing has to be copied. */
static void fenced_while_it_waits(void **state)
{
	uint64_t h = half_committed();
	struct flight *f;

	fill_device(1);
	f = start_write(0, 0, 4 * B, 5);
	turn();
	pass(RECALL_NS + 1);
	turn();
	assert_false(f->done);
	fence(h);
	assert_int_equal(finish(f), 4 * B);
	assert_int_equal(layouts_counters(world.fs)->relocated_blocks, 0);
	expect(0, 0, 4 * B, 5);
	check_all_free();
}

/* A revoke that waits for space does not keep the filesystem from closing. */
static void closed_in_the_middle(void **state)
{
	uint64_t h = half_committed();

	fill_device(1);
	OK(layout_recall(world.file[0], h, IOMODE_ANY, 0, UINT64_MAX));
	pass(RECALL_NS + 1);
	remount();
	set_clock();
	assert_int_equal(look_at(h).state, HOLDER_LOST);
	expect(0, 0, 4 * B, 3);
	fence(h);
	check_all_free();
}

static void preallocation_is_trimmed(void **state)
{
	uint64_t h = new_holder(0);
	nblocks_t before;

	assert_int_equal(do_write(0, 0, B, 3), B);
	assert_int_equal(do_one(&(struct todo){ .act = ACT_ALLOC, .file = 0, .off = 32 * B,
						.len = 4 * B, .keep_size = true }), 0);
	before = free_blocks();
	OK(get(0, h, IOMODE_RW, B, 16 * B, 0));
	assert_true(free_blocks() < before);
	OK(give_back(0, h, IOMODE_ANY, 0, UINT64_MAX));
	layouts_settle(world.fs);
	assert_int_equal(state_of(0, 1), EXT_HOLE);
	assert_int_equal(state_of(0, 16), EXT_HOLE);
	assert_int_equal(state_of(0, 32), EXT_UNWRITTEN); /* fallocate put it there */
	assert_int_equal(layouts_counters(world.fs)->trimmed_blocks, 16);
	OK(holder_gone(world.fs, h));
	check_all_free();
}

/* ---- mutants: the tests above would see them ---------------------------------------------------- */

static void mutants_are_caught(void **state)
{
	struct extent e;
	uint64_t h;

	/* A revoke that leaves live blocks in place. */
	world.fs->opt.mutant = MUTANT_REVOKE_IN_PLACE;
	h = half_committed();
	OK(holder_lost(world.fs, h));
	assert_int_equal(do_write(0, 0, 2 * B, 5), 2 * B);
	state_at(0, FORK_DATA, 0, &e);
	assert_true(was_told(e.block));
	fence(h);
	/* Quarantine dropped. */
	world.fs->opt.mutant = MUTANT_QUARANTINE_DROPPED;
	h = new_holder(1);
	OK(get(1, h, IOMODE_RW, 0, 4 * B, 0));
	OK(holder_lost(world.fs, h));
	assert_int_equal(do_write(1, 0, 4 * B, 5), 4 * B);
	assert_int_equal(quarantined(), 0);
	fence(h);
	world.fs->opt.mutant = MUTANT_NONE;
	check_all_free();
}

/* ---- power cuts --------------------------------------------------------------------------------- */

/* Until the power goes, or to the end. */
static bool revoke_run(uint64_t h)
{
	struct flight *f = start_write(0, 0, B, 5);

	turn();
	now += 2 * RECALL_NS;
	layouts_set_clock(world.fs, now);
	finish(f);
	for (unsigned i = 1; i < 3 && !sim_crashed(world.sim); i++) {
		(void)do_fsync(0);
		(void)do_write(0, i * B, B, 5 + i);
	}
	(void)do_fsync(0);
	(void)do_write(0, 5 * B, B, 8);
	(void)do_fsync(0);
	return sim_crashed(world.sim);
}

static void check_after_cut(uint64_t h)
{
	uint64_t size;
	uint8_t *got = read_all(0, &size);

	assert_int_equal(size, 8 * B);
	assert_false(sim_shows_canary(got, size));
	for (uint64_t i = 0; i < size; i++) {
		bool old = i < 4 * B ? got[i] == pattern_byte(3, i) : got[i] == 0;
		bool new = (i < 3 * B && got[i] == pattern_byte(5 + i / B, i % B)) ||
			   (i >= 5 * B && i < 6 * B && got[i] == pattern_byte(8, i - 5 * B));

		if (!old && !new)
			fail_msg("byte %llu is %#x", (unsigned long long)i, got[i]);
	}
	io_free(got);
	check_disk();
	/* Whatever was reached, the holder is in nobody's way and in nobody's bytes. */
	assert_int_equal(do_write(0, 0, 8 * B, 9), 8 * B);
	write_stale(0xdd);
	expect(0, 0, 8 * B, 9);
	fence(h);
	check_all_free();
}

#define SEEDS 3u

static void power_cuts(void **state)
{
	unsigned cuts = 0, whole = 0;

	for (uint64_t n = 1; whole < SEEDS; n++) {
		uint64_t h = half_committed();
		bool crashed;

		OK(do_fsync(0));
		sim_settle(world.sim);
		sim_crash_at(world.sim, sim_events(world.sim) + 1 + n / SEEDS);
		crashed = revoke_run(h);
		sim_crash_at(world.sim, 0);
		cuts += crashed;
		whole += !crashed;
		put_files();
		inode_put(world.root);
		fs_abandon(world.fs);
		sinks_gone();
		sim_restart(world.sim, n);
		OK(world_open());
		set_clock();
		find_files();
		check_after_cut(h);
		teardown(NULL);
		setup(NULL);
	}
	assert_true(cuts > 10 * SEEDS);
}

/* Cuts between the decision that a holder is fenced and the end of what follows. */
static void power_cuts_of_a_fence(void **state)
{
	unsigned cuts = 0, whole = 0;

	for (uint64_t n = 1; whole < SEEDS; n++) {
		uint64_t h = half_committed();
		struct holder_look look;
		uint64_t from = 0;

		OK(get(1, h, IOMODE_RW, 0, 8 * B, LAYOUT_F_ATOMIC));
		OK(holder_lost(world.fs, h));
		assert_int_equal(do_write(0, 0, 4 * B, 5), 4 * B);
		OK(do_fsync(0));
		sim_settle(world.sim);
		sim_crash_at(world.sim, sim_events(world.sim) + 1 + n / SEEDS);
		(void)holder_fenced(world.fs, h);
		for (unsigned i = 0; i < 3 && !sim_crashed(world.sim); i++) {
			layouts_settle(world.fs);
			(void)do_write(2, 0, B, 6);
			(void)do_fsync(2);
		}
		cuts += sim_crashed(world.sim);
		whole += !sim_crashed(world.sim);
		sim_crash_at(world.sim, 0);
		put_files();
		inode_put(world.root);
		fs_abandon(world.fs);
		sinks_gone();
		sim_restart(world.sim, n);
		OK(world_open());
		set_clock();
		find_files();
		layouts_settle(world.fs);
		expect(0, 0, 4 * B, 5);
		if (holder_list(world.fs, &from, &look, 1) && look.state != HOLDER_GONE)
			fence(h);
		check_all_free();
		teardown(NULL);
		setup(NULL);
	}
	assert_true(cuts > 2 * SEEDS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		CASE(writer_goes_on_elsewhere), CASE(quarantine_is_not_reused),
		CASE(many_extents), CASE(reader_is_lost), CASE(reader_of_blocks_that_move), CASE(shared_blocks),
		CASE(atomic_goes_whole), CASE(fenced_with_everything), CASE(ghost_after_restart), CASE(two_ghosts),
		CASE(returned_while_it_waits), CASE(unlinked_file), CASE(copy_fails),
		CASE(no_space_for_the_copy), CASE(never_space_for_the_copy),
		CASE(fenced_while_it_waits), CASE(closed_in_the_middle), CASE(preallocation_is_trimmed),
		CASE(mutants_are_caught), CASE(power_cuts), CASE(power_cuts_of_a_fence),
#undef CASE
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
