/* SPDX-License-Identifier: MIT
 *
 * test_revoke.c - holders that do not answer: what they could write moves away, what they knew is
 * kept in quarantine until they are fenced, over restarts and power cuts.
 *
 * Time is the virtual clock of the layouts. Holders write the simulated device itself, before and
 * after they lost their layouts.
 */
#include "revoke_fixture.h"
#include "tree_check.h"

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

		flight_start(&f, &(struct todo){ .act = ACT_READ, .file = 0, .off = i * B,
						 .len = B });
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

/* What it had is taken, a PIN by a return in its name, but its blocks are still to be unmapped when
 * the power goes: who comes up knows that it reaches them. */
static void unlinked_then_a_power_cut(void **state)
{
	uint64_t h = half_committed();
	struct inode *in = inode_ref(world.file[0]);

	OK(get(0, h, IOMODE_PIN, 16 * B, B, 0));
	OK(do_fsync(0));
	OK(holder_lost(world.fs, h));
	OK(namei_unlink(world.root, name_of(0), strlen(name_of(0)), NULL));
	pass(1); /* our reference keeps the reaper away */
	assert_int_equal(look_at(h).grants, 0);
	inode_put(world.file[0]);
	OK(namei_create(world.root, name_of(0), strlen(name_of(0)), S_IFREG | 0644, 0, &root_cred,
			&world.file[0]));
	OK(do_fsync(0));
	inode_put(in);
	lose_power(false);
	set_clock();
	layouts_settle(world.fs);
	reaper_drain(world.fs);
	assert_int_equal(look_at(h).state, HOLDER_LOST);
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

/* ---- mutants: the tests above would see them
 * ---------------------------------------------------- */

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

int main(void)
{
	const struct CMUnitTest tests[] = {
#define CASE(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		CASE(writer_goes_on_elsewhere), CASE(quarantine_is_not_reused),
		CASE(many_extents), CASE(reader_is_lost), CASE(reader_of_blocks_that_move),
		CASE(shared_blocks),
		CASE(atomic_goes_whole), CASE(fenced_with_everything), CASE(ghost_after_restart),
		CASE(two_ghosts),
		CASE(returned_while_it_waits), CASE(unlinked_file),
		CASE(unlinked_then_a_power_cut), CASE(copy_fails),
		CASE(no_space_for_the_copy), CASE(never_space_for_the_copy),
		CASE(fenced_while_it_waits), CASE(closed_in_the_middle),
		CASE(preallocation_is_trimmed), CASE(mutants_are_caught),
#undef CASE
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
