/* SPDX-License-Identifier: MIT
 *
 * test_file_nowait.c - FILE_F_NOWAIT: whatever would wait for a holder, itself or behind somebody
 * who does, ends with -EAGAIN at once, the holder is asked, nothing has changed; and what waits for
 * the device alone just waits.
 */
#include "file_fixture.h"

#include "layout.h"

#define WRITTEN (16 * BLOCK_SIZE) /* of alpha: written below, a hole above */
#define SIZE (2 * WRITTEN)

static struct seg grant, busy;
static struct inode *granted_in;
static const struct seg_hooks *their_hooks;
static unsigned recalls;
static struct model model;

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
	memset(&model, 0, sizeof(model));
	model.size = SIZE;
	for (uint64_t i = 0; i < WRITTEN; i++)
		model.bytes[i] = pattern_byte(1, i);
	assert_int_equal(do_write(0, 0, WRITTEN, 1), WRITTEN);
	assert_int_equal(do_write(1, 0, WRITTEN, 2), WRITTEN);
	assert_int_equal(do_truncate(0, SIZE), 0);
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

static void give(unsigned file, enum seg_kind kind, uint64_t start, uint64_t end)
{
	granted_in = world.file[file];
	seg_init(&grant, kind, start, end, NULL);
	grant.holder = 77;
	pthread_mutex_lock(&granted_in->lock);
	assert_int_equal(seg_grant_locked(granted_in, NULL, &grant), 0);
	pthread_mutex_unlock(&granted_in->lock);
}

static void take_back(void)
{
	pthread_mutex_lock(&granted_in->lock);
	seg_ungrant_locked(granted_in, &grant);
	pthread_mutex_unlock(&granted_in->lock);
}

static void until_stuck(struct flight *f)
{
	unsigned idle = 0;

	while (!f->done && idle < 3) {
		struct timespec moment = { .tv_nsec = 2000000 };

		idle = ioctx_run(world.ctx, false) > 0 ? 0 : idle + 1;
		nanosleep(&moment, NULL);
	}
}

static void set_mode(uint32_t mode)
{
	struct attr_change change = { .valid = ATTR_MODE, .mode = S_IFREG | mode };

	OK(namei_setattr(world.file[0], &change));
	OK(namei_setattr(world.file[1], &change));
}

/* It ends where it begins, and nobody could tell that it was there. */
static void refused(const struct todo *t, bool asks)
{
	uint64_t change[2] = { world.file[0]->core.change, world.file[1]->core.change };
	struct todo todo = *t;
	unsigned before = recalls;
	struct flight f;

	todo.flags |= FILE_F_NOWAIT | FILE_F_KILL_PRIV;
	flight_start(&f, &todo);
	until_stuck(&f);
	assert_true(f.done);
	assert_int_equal(f.fop.result, -EAGAIN);
	assert_int_equal(recalls > before, asks);
	flight_end(&f);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(world.file[i]->core.mode & 07777, 04755);
		assert_int_equal(world.file[i]->core.change, change[i]);
	}
	same_as_model(0, &model, "refused");
}

static void allowed(const struct todo *t, int64_t result)
{
	struct todo todo = *t;

	todo.flags |= FILE_F_NOWAIT;
	assert_int_equal(do_one(&todo), result);
}

#define IN_PLACE { .act = ACT_WRITE, .off = 5000, .len = 3000, .pattern = 7 }
#define INTO_HOLE { .act = ACT_WRITE, .off = WRITTEN, .len = 100, .pattern = 3 }
#define APPEND { .act = ACT_APPEND, .len = 100, .pattern = 3 }
#define CUT { .act = ACT_TRUNCATE, .off = 5 }
#define GROW { .act = ACT_TRUNCATE, .off = SIZE + 5 }
#define FILL { .act = ACT_ALLOC, .off = 1, .len = SIZE }
#define PUNCH { .act = ACT_PUNCH, .off = 1, .len = SIZE - 2 }
#define ZERO { .act = ACT_ZERO, .off = 1, .len = SIZE - 2 }
#define CLONE_FROM { .act = ACT_COPY, .len = SIZE, .dst = 1 }
#define CLONE_INTO { .act = ACT_COPY, .file = 1, .dst = 0, .len = WRITTEN, .flags = FILE_F_CLONE }
#define COPY_INTO { .act = ACT_COPY, .file = 1, .off = 1, .dst = 0, .len = 9000 }
#define WITHIN { .act = ACT_COPY, .dst_off = WRITTEN, .len = WRITTEN }
#define READ_IT { .act = ACT_READ, .len = 9000 }

static const struct todo map_changes[] = {
	INTO_HOLE, APPEND, CUT, GROW, FILL, PUNCH, ZERO, CLONE_INTO, COPY_INTO, WITHIN,
};

static void in_front_of_grants(void **state)
{
	static const enum seg_kind kinds[] = { SEG_GRANT_READ, SEG_GRANT_RW, SEG_GRANT_PIN };

	set_mode(04755);
	for (unsigned k = 0; k < ARRAY_LEN(kinds); k++) {
		give(0, kinds[k], 0, UINT64_MAX);
		for (unsigned i = 0; i < ARRAY_LEN(map_changes); i++)
			refused(&map_changes[i], true);
		if (kinds[k] != SEG_GRANT_READ)
			refused(&(struct todo)IN_PLACE, true);
		if (kinds[k] == SEG_GRANT_RW)
			refused(&(struct todo)CLONE_FROM, true);
		allowed(&(struct todo)READ_IT, 9000);
		take_back();
	}
	/* Elsewhere in the file it is in nobody's way. */
	give(0, SEG_GRANT_RW, WRITTEN, UINT64_MAX);
	allowed(&(struct todo)IN_PLACE, 3000);
	take_back();
}

/* Blocks that are shared need another segment than the first one that a write takes. */
static void shared_blocks(void **state)
{
	assert_int_equal(do_one(&(struct todo){ .act = ACT_COPY, .len = WRITTEN, .dst = 2 }),
			 WRITTEN);
	set_mode(04755);
	give(0, SEG_GRANT_READ, 0, UINT64_MAX);
	refused(&(struct todo)IN_PLACE, true);
	take_back();
	allowed(&(struct todo)IN_PLACE, 3000);
}

/* A file that ends within a block; its tail is zeroed for whoever writes behind it. */
static void behind_the_end(void **state)
{
	assert_int_equal(do_truncate(0, WRITTEN + 100), 0);
	assert_int_equal(do_write(0, WRITTEN, 50, 9), 50);
	assert_int_equal(do_truncate(0, WRITTEN + 20), 0);
	OK(do_fsync(0));
	model.size = WRITTEN + 20;
	for (unsigned i = 0; i < 20; i++)
		model.bytes[WRITTEN + i] = pattern_byte(9, i);
	set_mode(04755);
	give(0, SEG_GRANT_READ, SIZE, UINT64_MAX);
	refused(&(struct todo){ .act = ACT_WRITE, .off = SIZE, .len = 10, .pattern = 4 }, true);
	take_back();
	assert_int_equal(do_truncate(0, WRITTEN + 200), 0);
	model.size = WRITTEN + 200;
	same_as_model(0, &model, "after a truncate up");
}

static void behind_who_waits(void **state)
{
	static const struct todo todos[] = { IN_PLACE, READ_IT, CUT, PUNCH };
	struct flight first, f;

	give(0, SEG_GRANT_RW, WRITTEN, UINT64_MAX);
	flight_start(&first, &(struct todo){ .act = ACT_ZERO, .len = SIZE });
	until_stuck(&first);
	assert_false(first.done);
	for (unsigned i = 0; i < ARRAY_LEN(todos); i++) {
		struct todo t = todos[i];

		t.flags = FILE_F_NOWAIT;
		flight_start(&f, &t);
		assert_true(f.done);
		assert_int_equal(f.fop.result, -EAGAIN);
		flight_end(&f);
	}
	assert_true(file_cancel(&first.fop));
	flight_wait(&first);
	same_as_model(0, &model, "after it was interrupted");
	allowed(&(struct todo)IN_PLACE, 3000);
	take_back();
}

static void occupy(unsigned file, enum seg_kind kind)
{
	static struct op op;

	op.ctx = world.ctx;
	seg_init(&busy, kind, 0, UINT64_MAX, &op);
	assert_int_equal(seg_acquire(world.file[file], &busy), 0);
}

static void behind_device_io(void **state)
{
	struct todo t = IN_PLACE;
	struct flight f;

	t.flags = FILE_F_NOWAIT;
	occupy(0, SEG_WRITE_IO);
	flight_start(&f, &t);
	until_stuck(&f);
	assert_false(f.done);
	seg_release(world.file[0], &busy);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 3000);
	flight_end(&f);
}

/* What it is parked behind is a grant in the end: it hears of it, and so does the holder. Who
 * came behind it is let in. */
static void a_grant_comes_in_between(void **state)
{
	struct todo t = IN_PLACE, elsewhere = INTO_HOLE;
	struct flight f, g;

	t.flags = FILE_F_NOWAIT;
	t.len = WRITTEN;
	occupy(0, SEG_GET_RW);
	seg_shrink(world.file[0], &busy, 0, WRITTEN);
	busy.holder = 77;
	flight_start(&f, &t);
	flight_start(&g, &elsewhere);
	until_stuck(&f);
	assert_false(f.done);
	seg_init(&grant, SEG_GRANT_RW, 0, WRITTEN, NULL);
	grant.holder = 77;
	granted_in = world.file[0];
	recalls = 0;
	pthread_mutex_lock(&granted_in->lock);
	assert_int_equal(seg_grant_locked(granted_in, &busy, &grant), 0);
	pthread_mutex_unlock(&granted_in->lock);
	flight_wait(&f);
	assert_int_equal(f.fop.result, -EAGAIN);
	assert_true(recalls > 0);
	flight_wait(&g);
	assert_int_equal(g.fop.result, 100);
	take_back();
	flight_end(&f);
	flight_end(&g);
}

/* An operation that has its segment of one inode waits for a holder of the other one. */
static void behind_who_waits_elsewhere(void **state)
{
	struct todo t = { .act = ACT_TRUNCATE, .off = WRITTEN / 2, .flags = FILE_F_NOWAIT };
	struct flight copy, f;

	assert_true(world.file[0]->ino < world.file[1]->ino);
	set_mode(04755);
	give(1, SEG_GRANT_RW, 0, UINT64_MAX);
	flight_start(&copy, &(struct todo)CLONE_FROM);
	until_stuck(&copy);
	assert_false(copy.done);
	refused(&t, false);
	take_back();
	flight_wait(&copy);
	assert_int_equal(copy.fop.result, SIZE);
	/* The same in the other order: it was there first. */
	occupy(0, SEG_SHARE);
	flight_start(&copy, &(struct todo){ .act = ACT_COPY, .off = 1, .len = WRITTEN, .dst = 1 });
	flight_wait(&copy);
	give(1, SEG_GRANT_RW, 0, UINT64_MAX);
	flight_start(&copy, &(struct todo){ .act = ACT_COPY, .off = 1, .len = WRITTEN, .dst = 1 });
	until_stuck(&copy);
	assert_false(copy.done);
	flight_start(&f, &t);
	flight_wait(&f);
	assert_int_equal(f.fop.result, -EAGAIN);
	seg_release(world.file[0], &busy);
	take_back();
	flight_wait(&copy);
	allowed(&t, 0);
}

/* It was parked first, behind I/O; then an operation that is parked before it gets its segment
 * and waits on. */
static void somebody_begins_to_wait(void **state)
{
	struct todo t = { .act = ACT_TRUNCATE, .off = WRITTEN / 2, .flags = FILE_F_NOWAIT };
	struct flight copy, f;

	occupy(0, SEG_WRITE_IO);
	give(1, SEG_GRANT_RW, 0, UINT64_MAX);
	flight_start(&copy, &(struct todo)CLONE_FROM);
	flight_start(&f, &t);
	until_stuck(&f);
	assert_false(f.done || copy.done);
	seg_release(world.file[0], &busy);
	flight_wait(&f);
	assert_int_equal(f.fop.result, -EAGAIN);
	assert_false(copy.done);
	take_back();
	flight_wait(&copy);
	assert_int_equal(copy.fop.result, SIZE);
	same_as_model(0, &model, "after all");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(in_front_of_grants, setup, teardown),
		cmocka_unit_test_setup_teardown(shared_blocks, setup, teardown),
		cmocka_unit_test_setup_teardown(behind_the_end, setup, teardown),
		cmocka_unit_test_setup_teardown(behind_who_waits, setup, teardown),
		cmocka_unit_test_setup_teardown(behind_device_io, setup, teardown),
		cmocka_unit_test_setup_teardown(a_grant_comes_in_between, setup, teardown),
		cmocka_unit_test_setup_teardown(behind_who_waits_elsewhere, setup, teardown),
		cmocka_unit_test_setup_teardown(somebody_begins_to_wait, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
