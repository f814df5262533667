/* SPDX-License-Identifier: MIT
 *
 * test_segment.c - segments against a list that is searched by brute force; order of arrival;
 * cancel, shrink; threads.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "device.h"
#include "segment.h"

#define SEGS 40u
#define SPACE 64u /* small, so that most ranges overlap */

struct actor {
	struct op op;
	struct seg seg;
	bool woken;
	uint64_t arrived;
};

static struct inode file;
static struct ioctx *ctx;
static struct actor actors[SEGS];
static uint64_t rng_state, arrivals;

static uint64_t rng(void)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return rng_state;
}

static void resume(struct op *op)
{
	struct actor *a = container_of(op, struct actor, op);

	assert_false(a->woken);
	a->woken = true;
}

static int setup(void **state)
{
	memset(&file, 0, sizeof(file));
	pthread_mutex_init(&file.lock, NULL);
	assert_int_equal(ioctx_create(8, &ctx), 0);
	for (unsigned i = 0; i < SEGS; i++)
		actors[i] = (struct actor){ .op = { .resume = resume, .ctx = ctx } };
	arrivals = 0;
	return 0;
}

static int teardown(void **state)
{
	assert_false(seg_any(&file));
	seg_tree_free(&file);
	ioctx_destroy(ctx);
	pthread_mutex_destroy(&file.lock);
	return 0;
}

/* The table of segment.h, written down a second time. */
static bool foes(const struct seg *a, const struct seg *b)
{
	bool kinds = a->kind == SEG_MAP || b->kind == SEG_MAP || (a->kind == SEG_WRITE_IO &&
								  b->kind == SEG_WRITE_IO);

	return kinds && a->start < b->end && b->start < a->end;
}

static void check_all(void)
{
	for (unsigned i = 0; i < SEGS; i++) {
		struct seg *a = &actors[i].seg;
		bool blocked = false;

		for (unsigned j = 0; j < SEGS; j++) {
			struct seg *b = &actors[j].seg;

			if (i == j || a->state == SEG_IDLE || b->state == SEG_IDLE || !foes(a, b))
				continue;
			/* No two foes are held together; who waits, waits for somebody that is held
			 * or came before. */
			assert_false(a->state == SEG_HELD && b->state == SEG_HELD);
			blocked |= b->state == SEG_HELD || actors[j].arrived < actors[i].arrived;
		}
		if (a->state == SEG_PARKED)
			assert_true(blocked);
	}
}

static void random_range(struct actor *a, uint64_t within_start, uint64_t within_end,
			 uint64_t *start, uint64_t *end)
{
	uint64_t width = MIN(within_end, SPACE) - within_start;

	*start = within_start + rng() % width;
	*end = *start + 1 + rng() % (MIN(within_end, SPACE) - *start);
	if (within_end == UINT64_MAX && rng() % 8 == 0)
		*end = UINT64_MAX;
}

static void acquire_one(struct actor *a)
{
	uint64_t start, end;
	bool only_try = rng() % 4 == 0;
	int rc;

	random_range(a, 0, UINT64_MAX, &start, &end);
	seg_init(&a->seg, rng() % 3, start, end, &a->op);
	a->arrived = ++arrivals;
	a->woken = false;
	rc = only_try ? seg_try(&file, &a->seg) : seg_acquire(&file, &a->seg);
	if (rc == -EAGAIN) {
		assert_true(only_try);
		assert_int_equal(a->seg.state, SEG_IDLE);
	} else {
		assert_int_equal(a->seg.state, rc == ERR_PARKED ? SEG_PARKED : SEG_HELD);
		assert_false(only_try && rc);
	}
}

static void step(struct actor *a)
{
	bool was_parked = a->seg.state == SEG_PARKED;
	uint64_t start, end;

	if (a->seg.state == SEG_IDLE) {
		acquire_one(a);
	} else if (was_parked) {
		if (rng() % 3 == 0) {
			assert_true(seg_cancel(&file, &a->seg));
			assert_int_equal(a->seg.state, SEG_IDLE);
		}
	} else if (rng() % 3 == 0) {
		random_range(a, a->seg.start, a->seg.end, &start, &end);
		if (start < a->seg.start || end > a->seg.end)
			return;
		seg_shrink(&file, &a->seg, start, end);
	} else {
		assert_false(seg_cancel(&file, &a->seg));
		seg_release(&file, &a->seg);
	}
}

static void agrees_with_brute_force(void **state)
{
	for (uint64_t seed = 1; seed <= 20; seed++) {
		rng_state = seed * 0x9e3779b97f4a7c15;
		for (unsigned i = 0; i < 3000; i++) {
			struct actor *a = &actors[rng() % SEGS];
			bool waiting[SEGS];

			/* A range that begins behind SPACE cannot be drawn from. */
			if (a->seg.state == SEG_HELD && a->seg.start >= SPACE)
				continue;
			for (unsigned k = 0; k < SEGS; k++)
				waiting[k] = actors[k].seg.state == SEG_PARKED;
			step(a);
			check_all();
			while (ioctx_run(ctx, false) > 0)
				;
			/* Whoever was granted from the queue was woken, nobody else. */
			for (unsigned k = 0; k < SEGS; k++)
				if (&actors[k] != a)
					assert_int_equal(waiting[k] &&
							 actors[k].seg.state == SEG_HELD,
							 waiting[k] && actors[k].woken);
		}
		for (unsigned pass = 0; pass < SEGS; pass++)
			for (unsigned k = 0; k < SEGS; k++)
				if (actors[k].seg.state == SEG_HELD)
					seg_release(&file, &actors[k].seg);
		while (ioctx_run(ctx, false) > 0)
			;
		assert_false(seg_any(&file));
	}
}

/* Readers that keep coming do not starve a writer of the map: they queue behind it. */
static void first_come_first_served(void **state)
{
	seg_init(&actors[0].seg, SEG_READ_IO, 0, 10, &actors[0].op);
	assert_int_equal(seg_acquire(&file, &actors[0].seg), 0);
	seg_init(&actors[1].seg, SEG_MAP, 5, UINT64_MAX, &actors[1].op);
	assert_int_equal(seg_acquire(&file, &actors[1].seg), ERR_PARKED);
	seg_init(&actors[2].seg, SEG_READ_IO, 8, 9, &actors[2].op);
	assert_int_equal(seg_acquire(&file, &actors[2].seg), ERR_PARKED);
	seg_init(&actors[3].seg, SEG_READ_IO, 0, 5, &actors[3].op);
	assert_int_equal(seg_acquire(&file, &actors[3].seg), 0);
	seg_release(&file, &actors[0].seg);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	assert_int_equal(actors[2].seg.state, SEG_PARKED);
	seg_shrink(&file, &actors[1].seg, 20, 30);
	assert_int_equal(actors[2].seg.state, SEG_HELD);
	for (unsigned i = 1; i <= 3; i++)
		seg_release(&file, &actors[i].seg);
	assert_int_equal(ioctx_run(ctx, false), 2);
	assert_true(actors[1].woken && actors[2].woken);
}

#define THREADS 3u
#define TURNS 4000u

static unsigned long plain_counter; /* protected by the MAP segment alone */

static void granted(struct op *op)
{
	container_of(op, struct actor, op)->woken = true;
}

static void *contender(void *arg)
{
	struct ioctx *mine;
	struct actor a = { 0 };

	xassert(ioctx_create(8, &mine) == 0);
	a.op = (struct op){ .resume = granted, .ctx = mine };
	for (unsigned i = 0; i < TURNS; i++) {
		a.woken = false;
		seg_init(&a.seg, SEG_MAP, i % 7, 8 + i % 5, &a.op);
		if (seg_acquire(&file, &a.seg) == ERR_PARKED)
			while (!a.woken)
				ioctx_run(mine, true);
		plain_counter++;
		seg_release(&file, &a.seg);
	}
	ioctx_destroy(mine);
	return NULL;
}

static void threads_exclude_each_other(void **state)
{
	pthread_t t[THREADS];

	plain_counter = 0;
	for (unsigned i = 0; i < THREADS; i++)
		assert_int_equal(pthread_create(&t[i], NULL, contender, NULL), 0);
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	assert_int_equal(plain_counter, THREADS * TURNS);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(agrees_with_brute_force, setup, teardown),
		cmocka_unit_test_setup_teardown(first_come_first_served, setup, teardown),
		cmocka_unit_test_setup_teardown(threads_exclude_each_other, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
