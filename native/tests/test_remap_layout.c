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
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
