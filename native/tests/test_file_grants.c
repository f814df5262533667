/* SPDX-License-Identifier: MIT
 *
 * test_file_grants.c - the data path in front of grants: who waits for which, what changes a map,
 * and that a wait can end in an error or an interrupt with nothing done.
 */
#include "file_fixture.h"

#include "layout.h"

#define MiB (1u << 20)
#define WRITTEN (16 * BLOCK_SIZE) /* of alpha: written below, a hole above */

static struct seg grant;
static const struct seg_hooks *their_hooks;
static unsigned recalls;

static void on_recall(struct inode *in, struct seg *waiter, struct seg *g)
{
	assert_ptr_equal(g, &grant);
	recalls++;
}

static void on_unpark(struct inode *in, struct seg *waiter)
{
}

static const struct seg_hooks hooks = { .recall = on_recall, .unpark = on_unpark };

static int setup(void **state)
{
	world_new(64u << 20, 512, 3);
	make_files();
	their_hooks = world.fs->seg_hooks;
	world.fs->seg_hooks = &hooks;
	recalls = 0;
	assert_int_equal(do_write(0, 0, WRITTEN, 1), WRITTEN);
	assert_int_equal(do_truncate(0, 2 * WRITTEN), 0);
	return 0;
}

static int teardown(void **state)
{
	world.fs->seg_hooks = their_hooks;
	for (unsigned i = 0; i < FILES; i++)
		assert_false(seg_any(world.file[i]));
	delete_all();
	world_close();
	world_end();
	return 0;
}

/* Somebody else's grant of [start, end) of alpha. */
static void give(enum seg_kind kind, uint64_t start, uint64_t end)
{
	struct inode *in = world.file[0];

	seg_init(&grant, kind, start, end, NULL);
	grant.holder = 77;
	pthread_mutex_lock(&in->lock);
	assert_int_equal(seg_grant_locked(in, NULL, &grant), 0);
	pthread_mutex_unlock(&in->lock);
}

static void take_back(void)
{
	struct inode *in = world.file[0];

	pthread_mutex_lock(&in->lock);
	seg_ungrant_locked(in, &grant);
	pthread_mutex_unlock(&in->lock);
}

/* Nothing but the grant can be in its way: it runs until it ends or does no more. */
static void until_stuck(struct flight *f)
{
	unsigned idle = 0;

	while (!f->done && idle < 3) {
		struct timespec moment = { .tv_nsec = 2000000 };

		if (ioctx_run(world.ctx, false) > 0) {
			idle = 0;
			continue;
		}
		nanosleep(&moment, NULL);
		idle++;
	}
}

static void goes_on(const struct todo *t, int64_t result)
{
	struct flight f;
	unsigned before = recalls;

	flight_start(&f, t);
	flight_wait(&f);
	assert_int_equal(f.fop.result, result);
	assert_int_equal(recalls, before);
	flight_end(&f);
}

/* It waits for the grant, which is recalled, and ends well after that was returned. */
static void waits(const struct todo *t, int64_t result)
{
	struct flight f;
	unsigned before = recalls;

	flight_start(&f, t);
	until_stuck(&f);
	assert_false(f.done);
	assert_true(recalls > before);
	take_back();
	flight_wait(&f);
	assert_int_equal(f.fop.result, result);
	flight_end(&f);
	give(grant.kind, grant.start, grant.end);
}

#define IN_PLACE { .act = ACT_WRITE, .off = 5000, .len = 3000, .pattern = 2 }
#define WHOLE { .act = ACT_WRITE, .off = BLOCK_SIZE, .len = BLOCK_SIZE, .pattern = 2 }
#define INTO_HOLE { .act = ACT_WRITE, .off = WRITTEN, .len = 100, .pattern = 3 }
#define READ_IT { .act = ACT_READ, .off = 0, .len = 2 * WRITTEN }
#define CLONE { .act = ACT_COPY, .len = 2 * BLOCK_SIZE, .dst = 1 }
#define COPY { .act = ACT_COPY, .off = 1, .len = 2 * BLOCK_SIZE, .dst = 1, .dst_off = 5 }

static void in_front_of_a_read_grant(void **state)
{
	give(SEG_GRANT_READ, 0, UINT64_MAX);
	goes_on(&(struct todo)READ_IT, 2 * WRITTEN);
	goes_on(&(struct todo)IN_PLACE, 3000);
	goes_on(&(struct todo)WHOLE, BLOCK_SIZE);
	goes_on(&(struct todo)COPY, 2 * BLOCK_SIZE);
	goes_on(&(struct todo)CLONE, 2 * BLOCK_SIZE);
	/* Its blocks are shared now: the next write changes the map. */
	waits(&(struct todo)IN_PLACE, 3000);
	waits(&(struct todo)INTO_HOLE, 100);
	goes_on(&(struct todo)INTO_HOLE, 100);
	waits(&(struct todo){ .act = ACT_ALLOC, .off = WRITTEN + 4 * BLOCK_SIZE, .len = BLOCK_SIZE },
	      0);
	waits(&(struct todo){ .act = ACT_WRITE, .off = WRITTEN + 4 * BLOCK_SIZE, .len = BLOCK_SIZE,
			      .pattern = 4 }, BLOCK_SIZE);
	waits(&(struct todo){ .act = ACT_PUNCH, .off = 0, .len = BLOCK_SIZE }, 0);
	waits(&(struct todo){ .act = ACT_ZERO, .off = BLOCK_SIZE, .len = BLOCK_SIZE }, 0);
	waits(&(struct todo){ .act = ACT_APPEND, .len = 10, .pattern = 5 }, 10);
	waits(&(struct todo){ .act = ACT_TRUNCATE, .off = 3 * WRITTEN }, 0);
	waits(&(struct todo){ .act = ACT_TRUNCATE, .off = 5 }, 0);
	waits(&(struct todo){ .act = ACT_COPY, .file = 1, .dst = 0, .len = 2 * BLOCK_SIZE },
	      2 * BLOCK_SIZE);
	take_back();
}

static void in_front_of_a_rw_grant(void **state)
{
	give(SEG_GRANT_RW, 0, WRITTEN);
	goes_on(&(struct todo)READ_IT, 2 * WRITTEN);
	goes_on(&(struct todo)INTO_HOLE, 100);
	goes_on(&(struct todo)COPY, 2 * BLOCK_SIZE);
	waits(&(struct todo)IN_PLACE, 3000);
	waits(&(struct todo)CLONE, 2 * BLOCK_SIZE);
	waits(&(struct todo){ .act = ACT_TRUNCATE, .off = 5 }, 0);
	take_back();
}

static void in_front_of_a_pin(void **state)
{
	struct todo in_place = IN_PLACE, into_hole = INTO_HOLE;

	give(SEG_GRANT_PIN, 0, 2 * BLOCK_SIZE);
	goes_on(&(struct todo)READ_IT, 2 * WRITTEN);
	goes_on(&(struct todo)CLONE, 2 * BLOCK_SIZE);
	waits(&in_place, 3000);
	in_place.flags = into_hole.flags = FILE_F_NOPIN;
	goes_on(&in_place, -EBUSY);
	goes_on(&into_hole, 100);
	/* It does not wait for a PIN; for other grants it does. */
	take_back();
	give(SEG_GRANT_RW, 0, WRITTEN);
	waits(&in_place, 3000);
	take_back();
}

/* What the kernel keeps pages locked for passes a grant that waits for just those. */
static void pages_on_their_way(void **state)
{
	struct todo in_place = IN_PLACE, into_hole = INTO_HOLE;
	struct flight f;
	struct op op = { .ctx = world.ctx };
	struct seg pending;

	seg_init(&pending, SEG_PENDING, 0, UINT64_MAX, &op);
	pending.holder = 77;
	assert_int_equal(seg_acquire(world.file[0], &pending), 0);
	goes_on(&in_place, 3000);
	goes_on(&into_hole, 100);
	assert_int_equal(seg_change(world.file[0], &pending, SEG_GET_RW), 0);
	flight_start(&f, &(struct todo)IN_PLACE);
	until_stuck(&f);
	assert_false(f.done);
	seg_release(world.file[0], &pending);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 3000);
	flight_end(&f);
}

/* A wait that ends in an error or an interrupt: nothing was changed, nothing is held. */
static void a_wait_that_fails(void **state)
{
	static const struct todo todos[] = {
		IN_PLACE, INTO_HOLE, CLONE, { .act = ACT_TRUNCATE, .off = 5 },
		{ .act = ACT_ZERO, .off = 1, .len = 9000 },
	};
	struct model m = { .size = 2 * WRITTEN };
	struct flight f;

	for (uint64_t i = 0; i < WRITTEN; i++)
		m.bytes[i] = pattern_byte(1, i);
	for (unsigned i = 0; i < 2 * ARRAY_LEN(todos); i++) {
		bool read = todos[i / 2].off == WRITTEN; /* a RW grant would stop it at the start */

		give(read ? SEG_GRANT_READ : SEG_GRANT_RW, 0, UINT64_MAX);
		flight_start(&f, &todos[i / 2]);
		until_stuck(&f);
		assert_false(f.done);
		if (i % 2)
			assert_true(file_cancel(&f.fop));
		else
			assert_int_equal(seg_fail(world.file[0], 77, 0, WRITTEN + 1, -EIO), 1);
		flight_wait(&f);
		assert_int_equal(f.fop.result, i % 2 ? -EINTR : -EIO);
		flight_end(&f);
		take_back();
		assert_false(seg_any(world.file[0]) || seg_any(world.file[1]));
		same_as_model(0, &m, "after a wait that failed");
		assert_int_equal(world.file[1]->core.size, 0);
	}
}

static uint64_t generation(unsigned file)
{
	return atomic_load(&world.file[file]->map_gen);
}

/* Rises with every change of the map, and only then; does not come again. */
static void generation_of_the_map(void **state)
{
	uint64_t alpha = generation(0), beta = generation(1);

	assert_true(alpha && beta && alpha != beta);
	goes_on(&(struct todo)IN_PLACE, 3000);
	goes_on(&(struct todo)READ_IT, 2 * WRITTEN);
	goes_on(&(struct todo)COPY, 2 * BLOCK_SIZE);
	assert_int_equal(generation(0), alpha);
	assert_true(generation(1) > beta);
	goes_on(&(struct todo)INTO_HOLE, 100);
	assert_true(generation(0) > alpha);
	alpha = generation(0);
	assert_int_equal(do_truncate(0, 5), 0);
	assert_true(generation(0) > alpha);
	alpha = generation(0);
	world_close();
	OK(world_open());
	find_files();
	world.fs->seg_hooks = NULL;
	assert_true(generation(0) > 0 && generation(0) != alpha);
}

/* The mutant's reads hold nothing: a change of the map does not wait for them. Others' do. */
static void reads_hold_their_blocks(void **state)
{
	for (unsigned mutant = 0; mutant < 2; mutant++) {
		struct todo t = READ_IT;
		struct flight f;

		world.fs->opt.mutant = mutant ? MUTANT_READ_UNHELD : MUTANT_NONE;
		flight_start(&f, &t);
		if (!f.done)
			assert_int_equal(seg_any(world.file[0]), !mutant);
		flight_wait(&f);
		assert_int_equal(f.fop.result, 2 * WRITTEN);
		flight_end(&f);
		assert_false(seg_any(world.file[0]));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(in_front_of_a_read_grant, setup, teardown),
		cmocka_unit_test_setup_teardown(in_front_of_a_rw_grant, setup, teardown),
		cmocka_unit_test_setup_teardown(in_front_of_a_pin, setup, teardown),
		cmocka_unit_test_setup_teardown(pages_on_their_way, setup, teardown),
		cmocka_unit_test_setup_teardown(a_wait_that_fails, setup, teardown),
		cmocka_unit_test_setup_teardown(generation_of_the_map, setup, teardown),
		cmocka_unit_test_setup_teardown(reads_hold_their_blocks, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
