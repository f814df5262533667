/* SPDX-License-Identifier: MIT
 *
 * test_segment_revokes.c - segments of revokes: whom they wait for, and who hears of it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "device.h"
#include "segment.h"

#define ACTORS 4u
#define GRANTS 2u

struct actor {
	struct op op;
	struct seg seg;
	bool told[GRANTS], told_any;
};

static struct fs fs;
static struct inode file;
static struct ioctx *ctx;
static struct actor actors[ACTORS];
static struct seg grants[GRANTS];

static void resume(struct op *op)
{
}

/* Revokes are told again what one leaves that ends. */
static void on_recall(struct inode *in, struct seg *waiter, struct seg *grant)
{
	struct actor *a = container_of(waiter, struct actor, seg);

	assert_in_range(grant - grants, 0, GRANTS - 1);
	assert_int_equal(grant->state, SEG_HELD);
	a->told[grant - grants] = a->told_any = true;
}

static void on_unpark(struct inode *in, struct seg *waiter)
{
	assert_true(container_of(waiter, struct actor, seg)->told_any);
}

static const struct seg_hooks hooks = { .recall = on_recall, .unpark = on_unpark };

static int setup(void **state)
{
	memset(&file, 0, sizeof(file));
	memset(&fs, 0, sizeof(fs));
	memset(grants, 0, sizeof(grants));
	fs.seg_hooks = &hooks;
	file.fs = &fs;
	pthread_mutex_init(&file.lock, NULL);
	assert_int_equal(ioctx_create(8, &ctx), 0);
	for (unsigned i = 0; i < ACTORS; i++)
		actors[i] = (struct actor){ .op = { .resume = resume, .ctx = ctx } };
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

static void add_grant(unsigned i, uint64_t holder, enum seg_kind kind, uint64_t start, uint64_t end)
{
	seg_init(&grants[i], kind, start, end, NULL);
	grants[i].holder = holder;
	pthread_mutex_lock(&file.lock);
	assert_int_equal(seg_grant_locked(&file, NULL, &grants[i]), 0);
	pthread_mutex_unlock(&file.lock);
}

static void drop_grant(unsigned i)
{
	pthread_mutex_lock(&file.lock);
	seg_ungrant_locked(&file, &grants[i]);
	pthread_mutex_unlock(&file.lock);
}

static int begin_revoke(unsigned i, uint64_t holder, uint64_t start, uint64_t end)
{
	seg_init(&actors[i].seg, SEG_MAP, start, end, &actors[i].op);
	actors[i].seg.holder = holder;
	actors[i].seg.revokes = true;
	return seg_acquire_front(&file, &actors[i].seg);
}

/* A revoke waits for what is held only. One that is parked waits for a holder, as long as that has
 * time; who waited for it behind nothing else would be on no list of deadlines. */
static void revokes_pass_parked_revokes(void **state)
{
	add_grant(0, 7, SEG_GRANT_READ, 8, 10);
	assert_int_equal(begin_revoke(0, 1, 0, 4), 0);
	assert_int_equal(begin_revoke(1, 2, 2, 6), ERR_PARKED);
	assert_int_equal(begin_revoke(2, 3, 1, 10), ERR_PARKED);
	assert_false(actors[1].told_any);
	assert_true(actors[2].told[0]);
	seg_release(&file, &actors[0].seg);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	drop_grant(0);
	assert_int_equal(actors[2].seg.state, SEG_PARKED);
	seg_release(&file, &actors[1].seg);
	assert_int_equal(actors[2].seg.state, SEG_HELD);
	assert_int_equal(ioctx_run(ctx, false), 2);
	seg_release(&file, &actors[2].seg);
}

/* What revokes take together is not in the way of others; a gap between two of them is. */
static void revokes_between_revokes(void **state)
{
	add_grant(0, 1, SEG_GRANT_RW, 0, 40);
	add_grant(1, 2, SEG_GRANT_RW, 0, 40);
	assert_int_equal(begin_revoke(0, 2, 0, 10), ERR_PARKED); /* behind grant 0 */
	assert_int_equal(begin_revoke(1, 2, 20, 30), ERR_PARKED);
	assert_true(actors[0].told[0] && actors[1].told[0]);
	assert_int_equal(begin_revoke(2, 1, 0, 30), ERR_PARKED); /* the gap is [10, 20) */
	assert_true(actors[2].told[1]);
	/* Those two now pass under this one. */
	assert_int_equal(actors[0].seg.state, SEG_HELD);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	assert_int_equal(begin_revoke(3, 2, 10, 20), 0);
	for (unsigned i = 0; i < 3; i++) { /* as if they had failed: what they leave is told again */
		static const unsigned order[] = { 0, 3, 1 };

		actors[2].told[1] = false;
		seg_release(&file, &actors[order[i]].seg);
		assert_true(actors[2].told[1]);
		assert_int_equal(actors[2].seg.state, SEG_PARKED);
	}
	drop_grant(1);
	assert_int_equal(actors[2].seg.state, SEG_HELD);
	assert_int_equal(ioctx_run(ctx, false), 3);
	seg_release(&file, &actors[2].seg);
	drop_grant(0);
}

/* Two revokes that are parked and side by side are as good as one over both. */
static void revokes_side_by_side(void **state)
{
	add_grant(0, 1, SEG_GRANT_RW, 0, 40);
	add_grant(1, 2, SEG_GRANT_RW, 0, 40);
	seg_init(&actors[3].seg, SEG_READ_IO, 0, 40, &actors[3].op);
	assert_int_equal(seg_acquire(&file, &actors[3].seg), 0);
	assert_int_equal(begin_revoke(0, 2, 20, 30), ERR_PARKED);
	assert_int_equal(begin_revoke(1, 2, 10, 20), ERR_PARKED);
	assert_int_equal(begin_revoke(2, 1, 12, 28), ERR_PARKED); /* behind the READ_IO alone */
	assert_false(actors[2].told_any);
	seg_release(&file, &actors[3].seg);
	assert_int_equal(actors[2].seg.state, SEG_HELD);
	seg_release(&file, &actors[2].seg);
	drop_grant(0);
	assert_int_equal(actors[0].seg.state, SEG_HELD);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	assert_int_equal(ioctx_run(ctx, false), 3);
	seg_release(&file, &actors[0].seg);
	seg_release(&file, &actors[1].seg);
	drop_grant(1);
}

/* A revoke that ends and leaves the grant leaves it in the way of others, which hear of it. */
static void a_revoke_that_fails(void **state)
{
	add_grant(0, 1, SEG_GRANT_RW, 0, 40);
	add_grant(1, 2, SEG_GRANT_RW, 0, 40);
	seg_init(&actors[3].seg, SEG_READ_IO, 0, 40, &actors[3].op);
	assert_int_equal(seg_acquire(&file, &actors[3].seg), 0);
	assert_int_equal(begin_revoke(0, 2, 0, 20), ERR_PARKED);
	assert_int_equal(begin_revoke(1, 1, 0, 20), ERR_PARKED);
	assert_false(actors[1].told_any);
	seg_release(&file, &actors[3].seg);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	actors[0].told[0] = false;
	seg_release(&file, &actors[1].seg);
	assert_true(actors[0].told[0]);
	assert_int_equal(actors[0].seg.state, SEG_PARKED);
	drop_grant(0);
	assert_int_equal(actors[0].seg.state, SEG_HELD);
	assert_int_equal(ioctx_run(ctx, false), 2);
	seg_release(&file, &actors[0].seg);
	drop_grant(1);
}

/* So does one that leaves the queue. */
static void a_revoke_that_is_cancelled(void **state)
{
	add_grant(0, 1, SEG_GRANT_RW, 0, 40);
	add_grant(1, 2, SEG_GRANT_RW, 0, 40);
	seg_init(&actors[3].seg, SEG_READ_IO, 0, 40, &actors[3].op);
	assert_int_equal(seg_acquire(&file, &actors[3].seg), 0);
	assert_int_equal(begin_revoke(0, 2, 0, 20), ERR_PARKED);
	assert_int_equal(begin_revoke(1, 1, 0, 20), ERR_PARKED);
	assert_false(actors[1].told_any);
	assert_true(seg_cancel(&file, &actors[0].seg));
	assert_true(actors[1].told[1]);
	seg_release(&file, &actors[3].seg);
	assert_int_equal(actors[1].seg.state, SEG_PARKED);
	drop_grant(1);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	assert_int_equal(ioctx_run(ctx, false), 1);
	seg_release(&file, &actors[1].seg);
	drop_grant(0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(revokes_pass_parked_revokes, setup, teardown),
		cmocka_unit_test_setup_teardown(revokes_between_revokes, setup, teardown),
		cmocka_unit_test_setup_teardown(revokes_side_by_side, setup, teardown),
		cmocka_unit_test_setup_teardown(a_revoke_that_fails, setup, teardown),
		cmocka_unit_test_setup_teardown(a_revoke_that_is_cancelled, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
