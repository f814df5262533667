/* SPDX-License-Identifier: MIT
 *
 * test_remap_layout.c - exchange and collapse of files that holders have layouts of, or had.
 */
#include "remap_fixture.h"
#include "tree_check.h"

#define RECALL_NS (10ull * 1000000000)
#define B BLOCK_SIZE

static uint64_t now;

static void set_clock(uint64_t ns)
{
	now = ns;
	layouts_set_clock(world.fs, now);
	layouts_settle(world.fs);
}

static int setup(void **state)
{
	world_new(96u << 20, 512, 17);
	make_files();
	set_clock(RECALL_NS);
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

static nblocks_t quarantined(void)
{
	struct alloc_space sp;

	layouts_settle(world.fs);
	alloc_statfs(world.fs, &sp);
	return sp.quarantined;
}

static void turn(void)
{
	for (unsigned i = 0; i < 50; i++)
		OK(ioctx_run(world.ctx, false));
}

static void fence(uint64_t h)
{
	OK(holder_fenced(world.fs, h));
	layouts_settle(world.fs);
}

static void all_free(void)
{
	check_disk();
	assert_int_equal(quarantined(), 0);
	delete_all();
}

/* On either side, whatever they may do with it. */
static void holders_are_asked_first(void **state)
{
	uint64_t h = new_holder(0);

	OK(do_write(0, 0, 4 * B, 3));
	OK(do_write(1, 0, 4 * B, 4));
	for (unsigned i = 0; i < 4; i++) {
		enum layout_iomode mode = i < 2 ? IOMODE_RW : IOMODE_READ;
		struct flight f;

		OK(get(i % 2, h, mode, 0, B, LAYOUT_F_WAIT));
		remap_start(&f, world.ctx, FILE_EXCHANGE, 0, 0, 2 * B, 1, 0);
		turn();
		assert_false(f.done);
		OK(give_back(i % 2, h, IOMODE_ANY, 0, B));
		flight_wait(&f);
		OK(f.fop.result);
	}
	/* What lies elsewhere is nobody's business. */
	OK(get(0, h, IOMODE_RW, 3 * B, B, LAYOUT_F_WAIT));
	OK(do_exchange(0, 0, 1, 0, 2 * B));
	OK(do_exchange(0, 0, 1, 0, 2 * B));
	OK(give_back_all(h));
	OK(holder_gone(world.fs, h));
	expect(0, 0, 2 * B, 3);
	all_free();
}

/* A reader that does not answer: what it read goes to another file, and is freed there. */
static uint64_t lost_reader_exchanged(void)
{
	uint64_t h = new_holder(0);
	struct flight f;

	OK(do_write(0, 0, 4 * B, 3));
	OK(do_write(1, 0, 4 * B, 4));
	OK(get(0, h, IOMODE_READ, 0, 4 * B, LAYOUT_F_WAIT));
	remap_start(&f, world.ctx, FILE_EXCHANGE, 0, 0, 4 * B, 1, 0);
	turn();
	assert_false(f.done);
	set_clock(now + RECALL_NS + 1);
	flight_wait(&f);
	OK(f.fop.result);
	expect(1, 0, 4 * B, 3);
	return h;
}

static void what_a_lost_reader_knows_is_kept_wherever_it_goes(void **state)
{
	uint64_t h = lost_reader_exchanged();

	OK(do_truncate(1, 0));
	assert_int_equal(quarantined(), 4);
	fence(h);
	all_free();
}

static void and_after_a_restart(void **state)
{
	uint64_t h = lost_reader_exchanged();

	OK(do_fsync(0));
	OK(do_fsync(1));
	lose_power(true);
	set_clock(RECALL_NS);
	OK(do_truncate(1, 0));
	assert_int_equal(quarantined(), 4);
	fence(h);
	all_free();
}

static void a_collapse_frees_into_quarantine(void **state)
{
	uint64_t h = new_holder(0);
	struct flight f;

	OK(do_write(0, 0, 8 * B, 3));
	OK(get(0, h, IOMODE_READ, 0, 4 * B, LAYOUT_F_WAIT));
	remap_start(&f, world.ctx, FILE_COLLAPSE, 0, 0, 3 * B, 0, 0);
	turn();
	assert_false(f.done);
	set_clock(now + RECALL_NS + 1);
	flight_wait(&f);
	OK(f.fop.result);
	assert_int_equal(quarantined(), 3);
	fence(h);
	all_free();
}

/* A writer that does not answer: its blocks are moved away before anything changes places. */
static void a_lost_writer_writes_into_nobodys_file(void **state)
{
	uint64_t h = new_holder(0);
	struct flight f;

	OK(do_write(0, 0, 2 * B, 3));
	OK(do_write(1, 0, 2 * B, 4));
	OK(get(0, h, IOMODE_RW, 0, 2 * B, LAYOUT_F_WAIT));
	remap_start(&f, world.ctx, FILE_EXCHANGE, 0, 0, 2 * B, 1, 0);
	turn();
	assert_false(f.done);
	set_clock(now + RECALL_NS + 1);
	flight_wait(&f);
	OK(f.fop.result);
	holder_write(0, 2 * B, 99);
	expect(0, 0, 2 * B, 4);
	expect(1, 0, 2 * B, 3);
	assert_int_equal(quarantined(), 2);
	fence(h);
	all_free();
}

/* A crash in the middle of an exchange that waited for a holder who is still there: the intent comes first. */
static void an_intent_and_a_ghost(void **state)
{
	uint64_t h = new_holder(0);
	struct ioctx *ctx;
	struct flight f;

	make_pieces();
	OK(get(0, h, IOMODE_READ, 0, 4 * B, LAYOUT_F_WAIT));
	OK(give_back(0, h, IOMODE_ANY, 0, B));
	OK(ioctx_create(16, &ctx));
	remap_start(&f, ctx, FILE_EXCHANGE, 0, 8 * B, (PIECES - 8) * (uint64_t)B, 1, 8 * B);
	assert_false(f.done);
	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	sim_crash_at(world.sim, sim_events(world.sim) + 1);
	while (!f.done)
		OK(ioctx_run(ctx, true));
	ioctx_destroy(ctx);
	lose_power(false);
	set_clock(RECALL_NS);
	for (unsigned i = 8; i < PIECES; i++) {
		unsigned of;

		assert_int_equal(piece_at(0, i, &of), piece_made(1, i));
		assert_int_equal(piece_at(1, i, &of), piece_made(0, i));
	}
	assert_int_equal(intents(), 0);
	come_back(0);
	OK(give_back_all(h));
	OK(holder_gone(world.fs, h));
	all_free();
}

/* An ATOMIC commit that takes several transactions, each durable by itself. */
#define ATOMIC_BLOCKS 200u

static void start_commit(struct flight *f, struct ioctx *ctx)
{
	static const struct layout_range range = { 0, B };
	struct ioctx *usual = world.ctx;
	uint64_t h;

	sim_crash_at(world.sim, 0);
	h = new_holder(0);
	OK(get(0, h, IOMODE_RW, 0, BLOCKS(ATOMIC_BLOCKS), LAYOUT_F_ATOMIC | LAYOUT_F_WAIT));
	assert_int_equal(args.next, BLOCKS(ATOMIC_BLOCKS));
	holder_write(0, BLOCKS(ATOMIC_BLOCKS), 4);
	sim_crash_at(world.sim, sim_events(world.sim) + cut_at);
	args = (struct layout_args){ .holder = h, .ranges = &range, .nranges = 1 };
	world.ctx = ctx;
	layout_start(f, FILE_LAYOUT_COMMIT, 0);
	world.ctx = usual;
}

static bool is_committed(void)
{
	uint64_t size;
	uint8_t *got;
	bool new;

	got = read_all(0, &size);
	new = got[0] == pattern_byte(4, 0) && got[1] == pattern_byte(4, 1) && got[2] == pattern_byte(4, 2);
	io_free(got);
	if (new)
		expect(0, 0, BLOCKS(ATOMIC_BLOCKS), 4);
	for (unsigned i = new ? ATOMIC_BLOCKS : 0; i < PIECES; i++) {
		unsigned of;

		assert_int_equal(piece_at(0, i, &of), piece_made(0, i));
	}
	come_back(0);
	OK(give_back_all(holder[0].id));
	layouts_settle(world.fs); /* what the old blocks were kept for */
	OK(holder_gone(world.fs, holder[0].id));
	return new;
}

static void a_commit_cut_anywhere_is_all_or_nothing(void **state)
{
	make_pieces();
	cut_everywhere(&(struct cut_test){ .start = start_commit, .is_new = is_committed });
	delete_all();
	world_close();
	world.fs = NULL;
}

/* ---- EOF moves, or blocks are shared, while another waits ---- */

/* The last block of the source has bytes behind EOF that were cut off. */
static void a_source_with_a_tail(void)
{
	OK(do_write(0, B, B, 7));
	OK(do_write(0, 0, B, 6));
	assert_true(extents_of(0) > 1);
	OK(do_truncate(0, 5000));
}

static void no_byte_of_the_tail_shows(unsigned file)
{
	uint64_t size;
	uint8_t *bytes = content(file, &size);

	assert_true(size > 2 * B);
	for (unsigned i = 5000; i < 2 * B; i++)
		assert_int_equal(bytes[i], 0);
	free(bytes);
}

/* After the first of two transactions the holder's commit moves the destination's EOF. */
static void the_destination_grows(enum file_op_kind kind)
{
	uint64_t h = new_holder(0);
	struct flight f;

	a_source_with_a_tail();
	OK(do_fsync(0));
	OK(do_fsync(1));
	OK(get(1, h, IOMODE_RW, 4 * B, 4 * B, LAYOUT_F_WAIT));
	holder_write(4 * B, B, 5);
	remap_start(&f, world.ctx, kind, 0, 0, 5000, 1, 0);
	while (!f.done && !(world.file[1]->core.flags & INODE_F_SHARED))
		OK(ioctx_run(world.ctx, false));
	assert_false(f.done);
	OK(commit(1, h, 4 * B, B, 5 * B));
	flight_wait(&f);
	assert_int_equal(f.fop.result, kind == FILE_DEDUPE ? B : 5000);
	OK(give_back_all(h));
	no_byte_of_the_tail_shows(1);
}

static void a_clone_whose_destination_grows(void **state)
{
	OK(do_write(1, 0, 100, 9));
	the_destination_grows(FILE_COPY);
}

static void a_dedupe_whose_destination_grows(void **state)
{
	OK(do_write(1, 0, B, 6));
	OK(do_write(1, B, 5000 - B, 7));
	the_destination_grows(FILE_DEDUPE);
}

/* The commit has found the file unshared, and waits for the clone that shares the block of its EOF. */
static void a_commit_beside_a_clone(void **state)
{
	uint64_t h = new_holder(0), other = new_holder(1);
	struct layout_range range = { 2 * B, B };
	struct layout_args args = { .holder = h, .ranges = &range, .nranges = 1, .size = 3 * B };
	struct flight f, c = { .done = false };

	OK(get(0, h, IOMODE_RW, 0, 16 * B, LAYOUT_F_WAIT));
	holder_write(0, 3 * B, 5);
	OK(commit(0, h, 0, 2 * B, 5000));
	OK(give_back(0, h, IOMODE_RW, 0, 2 * B));
	OK(do_write(1, 0, B, 4));
	OK(get(1, other, IOMODE_RW, 0, B, LAYOUT_F_WAIT));
	remap_start(&f, world.ctx, FILE_COPY, 0, 0, 5000, 1, 0);
	turn();
	assert_false(f.done);
	file_op_init(&c.fop, FILE_LAYOUT_COMMIT, world.file[0], world.ctx);
	c.fop.layout = &args;
	c.fop.done = flight_done;
	c.fop.user = &c;
	file_start(&c.fop);
	turn();
	assert_false(c.done);
	OK(give_back(1, other, IOMODE_ANY, 0, B));
	flight_wait(&f);
	assert_int_equal(f.fop.result, 5000);
	flight_wait(&c);
	OK(c.fop.result);
	assert_int_equal(size_of(0), 3 * B);
	OK(give_back_all(h));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(holders_are_asked_first, setup, teardown),
		cmocka_unit_test_setup_teardown(what_a_lost_reader_knows_is_kept_wherever_it_goes, setup, teardown),
		cmocka_unit_test_setup_teardown(and_after_a_restart, setup, teardown),
		cmocka_unit_test_setup_teardown(a_collapse_frees_into_quarantine, setup, teardown),
		cmocka_unit_test_setup_teardown(a_lost_writer_writes_into_nobodys_file, setup, teardown),
		cmocka_unit_test_setup_teardown(a_commit_cut_anywhere_is_all_or_nothing, setup, teardown),
		cmocka_unit_test_setup_teardown(an_intent_and_a_ghost, setup, teardown),
		cmocka_unit_test_setup_teardown(a_clone_whose_destination_grows, setup, teardown),
		cmocka_unit_test_setup_teardown(a_dedupe_whose_destination_grows, setup, teardown),
		cmocka_unit_test_setup_teardown(a_commit_beside_a_clone, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
