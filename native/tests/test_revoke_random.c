/* SPDX-License-Identifier: MIT
 *
 * test_revoke_random.c - random lives of four holders and three files: layouts, stale writes,
 * recalls that nobody answers, truncates, clones, restarts. Whatever was written through the
 * filesystem stays what it was while every lost holder writes whatever it ever knew; nothing shows
 * what was never written; in the end every block is free again.
 *
 * REVOKE_SEEDS=n sets the number of runs; the last seed printed is that of a failure, REVOKE_SEED=n
 * repeats it.
 */
#include "revoke_fixture.h"
#include "tree_check.h"

#define HOLDERS 4u
#define SPAN 24u /* blocks of a file */
#define STEPS 60u
#define KNOWN 64u

/* All that a holder was told to write since it came; void once it returned everything. */
static struct known {
	uint64_t id;
	unsigned n;
	struct layout_extent ext[KNOWN];
} known[HOLDERS];

/* 0: it is no more. One that has nothing goes by itself when it is lost. */
static enum holder_state state_of_holder(unsigned i)
{
	struct holder_look look;
	uint64_t from = known[i].id - 1;

	if (!known[i].id)
		return 0;
	if (holder_list(world.fs, &from, &look, 1) && look.id == known[i].id &&
	    look.state != HOLDER_GONE)
		return look.state;
	event_sink_destroy(world.fs, holder[i].sink);
	holder[i].sink = NULL;
	known[i] = (struct known){ 0 };
	return 0;
}

static struct known *pick(void)
{
	unsigned i = (unsigned)below(HOLDERS);

	(void)state_of_holder(i);

	if (!known[i].id) {
		known[i].id = new_holder(i);
		known[i].n = 0;
	}
	return &known[i];
}

static void lost_ones_write(void)
{
	for (unsigned i = 0; i < HOLDERS; i++) {
		if (state_of_holder(i) != HOLDER_LOST)
			continue;
		ntold = known[i].n;
		memcpy(told, known[i].ext, ntold * sizeof(*told));
		write_stale(0xdd);
	}
}

static void take(unsigned file)
{
	struct known *k = pick();
	fileblk_t at = below(SPAN), len = 1 + below(SPAN - at);
	unsigned flags = below(5) ? 0 : LAYOUT_F_ATOMIC;

	if (k->n > KNOWN / 2 || get(file, k->id, below(3) ? IOMODE_RW : IOMODE_READ, at * B,
				    len * B, flags))
		return;
	for (unsigned i = 0; i < args.count && args.iomode == IOMODE_RW; i++)
		if (ext[i].state != READ_DATA && k->n < KNOWN)
			k->ext[k->n++] = ext[i];
	for (uint64_t off = args.offset; off < args.next && args.iomode == IOMODE_RW; off += B)
		holder_write(off, B, 0x77);
	if (args.iomode == IOMODE_RW && below(2))
		(void)commit(file, k->id, args.offset, args.next - args.offset, args.next);
}

/* Through the filesystem, against everybody. */
static int64_t change(const struct todo *t)
{
	struct flight f;
	int64_t rc;

	flight_start(&f, t);
	/* It may wait for a holder, which only our clock ends, or for the journal. */
	for (unsigned i = 1; !f.done; i++) {
		assert_true(i < 100000);
		turn();
		if (i % 8 == 0)
			pass(RECALL_NS / 4);
		else if (!f.done)
			usleep(100);
	}
	rc = f.fop.result;
	flight_end(&f);
	return rc;
}

static void overwrite(unsigned file)
{
	fileblk_t at = below(SPAN), len = 1 + below(SPAN - at);

	assert_int_equal(change(&(struct todo){ .act = ACT_WRITE, .file = file, .off = at * B,
						.len = len * B, .pattern = 1 + at }), len * B);
	lost_ones_write();
	expect(file, at * B, len * B, 1 + at);
}

static void holder_life(void)
{
	unsigned i = (unsigned)below(HOLDERS);

	switch (state_of_holder(i)) {
	case HOLDER_LIVE:
		if (below(2)) {
			OK(holder_lost(world.fs, known[i].id));
			layouts_settle(world.fs);
		} else {
			OK(give_back_all(known[i].id));
			known[i].n = 0;
		}
		break;
	case HOLDER_LOST:
		if (below(2)) {
			fence(known[i].id);
			break;
		}
		if (holder[i].sink)
			event_sink_destroy(world.fs, holder[i].sink);
		holder[i].sink = NULL;
		if (state_of_holder(i))
			come_back(i);
		break;
	default:
		break;
	}
}

static void restart(void)
{
	lost_ones_write();
	lose_power(true);
	now += RECALL_NS / 4;
	set_clock();
}

static void no_canary(void)
{
	for (unsigned i = 0; i < FILES; i++) {
		uint64_t size;
		uint8_t *got = read_all(i, &size);

		assert_false(sim_shows_canary(got, size & ~7ull));
		io_free(got);
	}
}

static void step(void)
{
	unsigned file = (unsigned)below(FILES), other = (unsigned)below(FILES);

	switch (below(10)) {
	case 0: case 1: case 2: case 3:
		take(file);
		break;
	case 4: case 5:
		overwrite(file);
		break;
	case 6:
		OK(change(&(struct todo){ .act = below(2) ? ACT_TRUNCATE : ACT_PUNCH, .file = file,
					  .off = below(SPAN) * B, .len = (1 + below(8)) * B }));
		break;
	case 7:
		if (other != file)
			OK(change(&(struct todo){ .act = ACT_COPY, .file = file, .dst = other,
						  .len = SPAN * B }));
		break;
	case 8:
		holder_life();
		break;
	default:
		if (below(3) == 0)
			restart();
		lost_ones_write();
	}
}

static void run(uint64_t seed)
{
	struct holder_look look;
	uint64_t from = 0;

	rng_seed(seed);
	memset(known, 0, sizeof(known));
	OK(do_fsync(0)); /* the names, too */
	for (unsigned n = 0; n < STEPS; n++) {
		step();
		no_canary();
		if (n % 8 == 0)
			check_disk();
	}
	for (unsigned i = 0; i < HOLDERS; i++)
		if (state_of_holder(i) == HOLDER_LIVE)
			OK(holder_lost(world.fs, known[i].id));
	layouts_settle(world.fs);
	/* Also those whose end was not durable. */
	while (holder_list(world.fs, &from, &look, 1))
		fence(look.id);
	check_all_free();
}

static void random_lives(void **state)
{
	const char *text = getenv("REVOKE_SEEDS");
	uint64_t seeds = text ? strtoull(text, NULL, 0) : 60, first = 1;

	if (getenv("REVOKE_SEED")) {
		first = strtoull(getenv("REVOKE_SEED"), NULL, 0);
		seeds = 1;
	}
	for (uint64_t seed = first; seed < first + seeds; seed++) {
		print_message("seed %llu\n", (unsigned long long)seed);
		run(seed);
		teardown(NULL);
		setup(NULL);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(random_lives, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
