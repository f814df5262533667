/* SPDX-License-Identifier: MIT
 *
 * test_segment.c - segments and grants against a list that is searched by brute force; order of
 * arrival; the head of the queue; change, cancel, shrink, fail; what the hooks are told; the cost of
 * many grants; threads.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "device.h"
#include "segment.h"

#define SEGS 30u
#define GRANTS 24u
#define HOLDERS 4u
#define SPACE 64u /* small, so that most ranges overlap */

struct actor {
	struct op op;
	struct seg seg;
	bool woken;
	uint64_t place; /* in the queue; less is further ahead */
	bool told[GRANTS];
	bool told_any;
	unsigned unparked;
};

static struct fs fs;
static struct inode file;
static struct ioctx *ctx;
static struct actor actors[SEGS];
static struct seg grants[GRANTS];
static uint64_t rng_state, arrivals, fronts;

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

static void on_recall(struct inode *in, struct seg *waiter, struct seg *grant)
{
	struct actor *a = container_of(waiter, struct actor, seg);

	assert_ptr_equal(in, &file);
	assert_ptr_equal(waiter->in, &file);
	assert_in_range(grant - grants, 0, GRANTS - 1);
	assert_int_equal(grant->state, SEG_HELD);
	assert_false(a->told[grant - grants]);
	a->told[grant - grants] = a->told_any = true;
}

static void on_unpark(struct inode *in, struct seg *waiter)
{
	struct actor *a = container_of(waiter, struct actor, seg);

	assert_ptr_equal(in, &file);
	assert_true(a->told_any);
	a->unparked++;
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
	for (unsigned i = 0; i < SEGS; i++)
		actors[i] = (struct actor){ .op = { .resume = resume, .ctx = ctx } };
	arrivals = fronts = UINT32_MAX;
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

/* The table of segment.h, copied from its comment: READ_IO WRITE_IO WRITE_MAP MAP SHARE GET_READ
 * PENDING GET_RW GET_MAP GET_PIN SWAP | GRANT_READ GRANT_RW GRANT_PIN. */
static const char *const table[SEG_FIRST_GRANT] = {
	"- - - x - - - - - - x - - -",
	"- x x x x - - x x x x - h x",
	"- x x x x x - x x x x h h x",
	"x x x x x x - x x x x h h x",
	"- x x x x - - x x - x - h -",
	"- - x x - - - - x - x - - -",
	"- - - - - - x - - - - - - -",
	"- x x x x - - x x x x - h x",
	"- x x x x x - x x x x h h x",
	"- x x x - - - x x - x - x -",
	"x x x x x x - x x x x h h x",
};

static bool foes(const struct seg *a, const struct seg *b)
{
	if (a->start >= b->end || b->start >= a->end)
		return false;
	if (a->kind >= SEG_FIRST_GRANT) {
		const struct seg *swap = a;

		if (b->kind >= SEG_FIRST_GRANT)
			return false;
		a = b;
		b = swap;
	}
	switch (table[a->kind][2 * b->kind]) {
	case 'x':
		return true;
	case 'h':
		return a->holder != b->holder;
	default:
		return false;
	}
}

static void check_told(const struct actor *a)
{
	for (unsigned g = 0; g < GRANTS; g++)
		if (grants[g].state == SEG_HELD && a->told[g] != foes(&a->seg, &grants[g]))
			assert_true(a->told[g]); /* it has become smaller since */
}

static void check_all(void)
{
	for (unsigned i = 0; i < SEGS; i++) {
		struct seg *a = &actors[i].seg;
		bool blocked = false;

		if (a->state == SEG_IDLE)
			continue;
		for (unsigned j = 0; j < SEGS; j++) {
			struct seg *b = &actors[j].seg;

			if (i == j || b->state == SEG_IDLE || !foes(a, b))
				continue;
			/* No two foes are held together; who waits, waits for somebody that is held
			 * or came before. */
			assert_false(a->state == SEG_HELD && b->state == SEG_HELD);
			blocked |= b->state == SEG_HELD || actors[j].place < actors[i].place;
		}
		for (unsigned g = 0; g < GRANTS; g++)
			if (grants[g].state == SEG_HELD && foes(a, &grants[g])) {
				assert_int_equal(a->state, SEG_PARKED);
				blocked = true;
			}
		if (a->state == SEG_PARKED) {
			assert_true(blocked);
			check_told(&actors[i]);
		}
	}
}

static void random_range(uint64_t within_start, uint64_t within_end, uint64_t *start, uint64_t *end)
{
	uint64_t width = MIN(within_end, SPACE) - within_start;

	*start = within_start + rng() % width;
	*end = *start + 1 + rng() % (MIN(within_end, SPACE) - *start);
	if (within_end == UINT64_MAX && rng() % 8 == 0)
		*end = UINT64_MAX;
}

static void forget_told(struct actor *a)
{
	memset(a->told, 0, sizeof(a->told));
	a->told_any = false;
	a->unparked = 0;
	a->woken = false;
}

/* Is somebody in the way of a right now? */
static bool must_wait(const struct actor *a, bool queue_too)
{
	for (unsigned j = 0; j < SEGS; j++) {
		const struct seg *b = &actors[j].seg;

		if (&actors[j] == a || !foes(&a->seg, b))
			continue;
		if (b->state == SEG_HELD || (queue_too && b->state == SEG_PARKED))
			return true;
	}
	for (unsigned g = 0; g < GRANTS; g++)
		if (grants[g].state == SEG_HELD && foes(&a->seg, &grants[g]))
			return true;
	return false;
}

static void acquire_one(struct actor *a)
{
	int (*const ways[])(struct inode *, struct seg *) = {
		seg_acquire, seg_acquire, seg_acquire, seg_acquire_front, seg_try, seg_try_recall,
	};
	unsigned way = rng() % ARRAY_LEN(ways);
	uint64_t start, end;
	bool wait;
	int rc;

	random_range(0, UINT64_MAX, &start, &end);
	seg_init(&a->seg, rng() % SEG_FIRST_GRANT, start, end, &a->op);
	a->seg.holder = rng() % 2 ? 0 : 1 + rng() % HOLDERS;
	a->place = way == 3 ? --fronts : ++arrivals;
	forget_told(a);
	wait = must_wait(a, way != 3);
	rc = ways[way](&file, &a->seg);
	if (way >= 4) {
		assert_int_equal(rc, wait ? -EAGAIN : 0);
		if (way == 4 || !wait)
			assert_false(a->told_any);
		if (way == 5 && wait)
			for (unsigned g = 0; g < GRANTS; g++)
				assert_int_equal(a->told[g], grants[g].state == SEG_HELD &&
							     foes(&a->seg, &grants[g]));
		assert_int_equal(a->seg.state, wait ? SEG_IDLE : SEG_HELD);
		return;
	}
	assert_int_equal(rc, wait ? ERR_PARKED : 0);
	assert_int_equal(a->seg.state, wait ? SEG_PARKED : SEG_HELD);
}

/* A held operation leaves a grant of a part of it behind; or a grant appears from nowhere, where it
 * is in nobody's way. */
static void make_grant(struct actor *a)
{
	static const enum seg_kind becomes[SEG_FIRST_GRANT] = {
		[SEG_GET_READ] = SEG_GRANT_READ, [SEG_GET_RW] = SEG_GRANT_RW,
		[SEG_GET_MAP] = SEG_GRANT_RW, [SEG_GET_PIN] = SEG_GRANT_PIN,
	};
	struct seg *g = &grants[rng() % GRANTS];
	uint64_t start, end;

	if (g->state != SEG_IDLE || !becomes[a->seg.kind] || !a->seg.holder)
		return;
	random_range(a->seg.start, a->seg.end, &start, &end);
	if (end > a->seg.end)
		return;
	for (unsigned i = 0; i < SEGS; i++)
		actors[i].told[g - grants] = false;
	seg_init(g, becomes[a->seg.kind], start, end, NULL);
	g->holder = a->seg.holder;
	pthread_mutex_lock(&file.lock);
	assert_int_equal(seg_grant_locked(&file, &a->seg, g), 0);
	pthread_mutex_unlock(&file.lock);
	assert_int_equal(a->seg.state, SEG_IDLE);
	assert_int_equal(g->state, SEG_HELD);
}

static void change_one(struct actor *a)
{
	enum seg_kind old = a->seg.kind, kind = rng() % SEG_FIRST_GRANT;
	bool wait;

	forget_told(a);
	a->seg.kind = kind;
	wait = must_wait(a, false);
	a->seg.kind = old;
	if (wait)
		a->place = --fronts;
	assert_int_equal(seg_change(&file, &a->seg, kind), wait ? ERR_PARKED : 0);
	assert_int_equal(a->seg.kind, kind);
	if (!wait)
		assert_int_equal(a->seg.state, SEG_HELD);
}

static void step(struct actor *a)
{
	uint64_t start, end;

	if (a->seg.state == SEG_IDLE) {
		acquire_one(a);
	} else if (a->seg.state == SEG_PARKED) {
		if (rng() % 3)
			return;
		assert_true(seg_cancel(&file, &a->seg));
		assert_int_equal(a->seg.state, SEG_IDLE);
		assert_int_equal(a->unparked, a->told_any);
	} else if (a->seg.start < SPACE && rng() % 4 == 0) {
		random_range(a->seg.start, a->seg.end, &start, &end);
		if (end <= a->seg.end)
			seg_shrink(&file, &a->seg, start, end);
	} else if (rng() % 4 == 0) {
		change_one(a);
	} else if (a->seg.start < SPACE && rng() % 2) {
		make_grant(a);
	} else {
		assert_false(seg_cancel(&file, &a->seg));
		seg_release(&file, &a->seg);
	}
}

static void step_grant(struct seg *g)
{
	uint64_t start, end;

	if (g->state != SEG_HELD)
		return;
	pthread_mutex_lock(&file.lock);
	if (rng() % 2) {
		random_range(g->start, g->end, &start, &end);
		if (end <= g->end)
			seg_shrink_locked(&file, g, start, end);
	} else {
		seg_ungrant_locked(&file, g);
	}
	pthread_mutex_unlock(&file.lock);
}

/* Everything parked that a grant of the holder in the range holds back, and nothing else. */
static void fail_some(void)
{
	uint64_t holder = 1 + rng() % HOLDERS, start, end;
	bool fails[SEGS] = { false };
	unsigned expected = 0;

	random_range(0, UINT64_MAX, &start, &end);
	for (unsigned i = 0; i < SEGS; i++) {
		for (unsigned g = 0; g < GRANTS; g++)
			fails[i] |= actors[i].seg.state == SEG_PARKED &&
				    grants[g].state == SEG_HELD && grants[g].holder == holder &&
				    foes(&actors[i].seg, &grants[g]) &&
				    MAX(MAX(start, grants[g].start), actors[i].seg.start) <
					    MIN(MIN(end, grants[g].end), actors[i].seg.end);
		expected += fails[i];
	}
	assert_int_equal(seg_fail(&file, holder, start, end, -EIO), expected);
	for (unsigned i = 0; i < SEGS; i++) {
		if (!fails[i])
			continue;
		assert_int_equal(actors[i].seg.err, -EIO);
		assert_int_equal(actors[i].seg.state, SEG_IDLE);
		assert_int_equal(actors[i].unparked, actors[i].told_any);
	}
}

static int by_start(const void *a, const void *b)
{
	const struct seg *x = *(struct seg *const *)a, *y = *(struct seg *const *)b;

	if (x->start != y->start)
		return x->start < y->start ? -1 : 1;
	return x->order < y->order ? -1 : 1;
}

static void ask(void)
{
	unsigned kinds = (rng() % 7 + 1) << SEG_FIRST_GRANT, n = 0;
	uint64_t holder = rng() % (HOLDERS + 1), start, end, newest, model_newest = 0;
	struct seg *list[GRANTS], *g = NULL;
	bool covered = true;

	random_range(0, UINT64_MAX, &start, &end);
	for (unsigned i = 0; i < GRANTS; i++)
		if (grants[i].state == SEG_HELD && (kinds & (1u << grants[i].kind)) &&
		    (!holder || grants[i].holder == holder) && grants[i].start < end &&
		    start < grants[i].end)
			list[n++] = &grants[i];
	qsort(list, n, sizeof(*list), by_start);
	for (unsigned i = 0; i < n; i++) {
		g = seg_next_grant_locked(&file, kinds, holder, start, end, g);
		assert_ptr_equal(g, list[i]);
	}
	assert_null(seg_next_grant_locked(&file, kinds, holder, start, end, g));
	if (!holder)
		return;
	end = MIN(end, SPACE + 1);
	for (uint64_t at = start; at < end; at++) {
		bool here = false;

		for (unsigned i = 0; i < GRANTS; i++)
			if (grants[i].state == SEG_HELD && grants[i].kind == SEG_GRANT_RW &&
			    grants[i].holder == holder && grants[i].start <= at &&
			    at < grants[i].end) {
				here = true;
				model_newest = MAX(model_newest, grants[i].order);
			}
		covered &= here;
	}
	assert_int_equal(seg_covered_locked(&file, holder, start, end, &newest), covered);
	if (covered) /* grants of one holder overlap here, which they do not in real life */
		assert_true(newest > 0 && newest <= model_newest);
}

static void release_all(void)
{
	for (unsigned g = 0; g < GRANTS; g++)
		if (grants[g].state == SEG_HELD) {
			pthread_mutex_lock(&file.lock);
			seg_ungrant_locked(&file, &grants[g]);
			pthread_mutex_unlock(&file.lock);
		}
	for (unsigned pass = 0; pass < SEGS; pass++)
		for (unsigned k = 0; k < SEGS; k++)
			if (actors[k].seg.state == SEG_HELD)
				seg_release(&file, &actors[k].seg);
	while (ioctx_run(ctx, false) > 0)
		;
	assert_false(seg_any(&file));
}

static void agrees_with_brute_force(void **state)
{
	unsigned parked = 0, granted = 0, failed = 0;

	for (uint64_t seed = 1; seed <= 20; seed++) {
		rng_state = seed * 0x9e3779b97f4a7c15;
		for (unsigned i = 0; i < 4000; i++) {
			unsigned what = rng() % 16;
			struct actor *a = what < 12 ? &actors[rng() % SEGS] : NULL;
			bool waiting[SEGS];

			for (unsigned k = 0; k < SEGS; k++) {
				waiting[k] = actors[k].seg.state == SEG_PARKED;
				parked += waiting[k];
			}
			if (a)
				step(a);
			else if (what < 15)
				step_grant(&grants[rng() % GRANTS]);
			else if (rng() % 4 == 0)
				fail_some();
			check_all();
			ask();
			while (ioctx_run(ctx, false) > 0)
				;
			/* Whoever was let in from the queue or failed was woken, nobody else. */
			for (unsigned k = 0; k < SEGS; k++) {
				struct actor *b = &actors[k];

				if (b == a || !waiting[k])
					continue;
				assert_int_equal(b->woken, b->seg.state != SEG_PARKED);
				if (b->woken)
					assert_int_equal(b->unparked, b->told_any);
				failed += b->seg.err != 0 && b->woken;
			}
			for (unsigned g = 0; g < GRANTS; g++)
				granted += grants[g].state == SEG_HELD;
		}
		release_all();
	}
	/* The random steps do reach what is to be tested. */
	assert_true(parked > 50000 && granted > 50000 && failed > 100);
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

/* What is parked at the head goes before all that wait, and a change gives nobody a gap. */
static void head_of_the_queue(void **state)
{
	seg_init(&actors[0].seg, SEG_READ_IO, 0, 10, &actors[0].op);
	assert_int_equal(seg_acquire(&file, &actors[0].seg), 0);
	seg_init(&actors[1].seg, SEG_MAP, 0, 10, &actors[1].op);
	assert_int_equal(seg_acquire(&file, &actors[1].seg), ERR_PARKED);
	seg_init(&actors[2].seg, SEG_MAP, 0, 10, &actors[2].op);
	assert_int_equal(seg_acquire_front(&file, &actors[2].seg), ERR_PARKED);
	seg_init(&actors[3].seg, SEG_PENDING, 20, 30, &actors[3].op);
	assert_int_equal(seg_acquire(&file, &actors[3].seg), 0);
	seg_init(&actors[4].seg, SEG_WRITE_IO, 20, 30, &actors[4].op);
	assert_int_equal(seg_acquire(&file, &actors[4].seg), 0);
	assert_int_equal(seg_change(&file, &actors[3].seg, SEG_GET_RW), ERR_PARKED);
	seg_init(&actors[5].seg, SEG_WRITE_IO, 20, 21, &actors[5].op);
	assert_int_equal(seg_acquire(&file, &actors[5].seg), ERR_PARKED);
	seg_release(&file, &actors[0].seg);
	assert_int_equal(actors[2].seg.state, SEG_HELD);
	assert_int_equal(actors[1].seg.state, SEG_PARKED);
	seg_release(&file, &actors[4].seg);
	assert_int_equal(actors[3].seg.state, SEG_HELD);
	assert_int_equal(actors[5].seg.state, SEG_PARKED);
	seg_release(&file, &actors[3].seg);
	seg_release(&file, &actors[2].seg);
	assert_int_equal(ioctx_run(ctx, false), 4);
	seg_release(&file, &actors[5].seg);
	seg_release(&file, &actors[1].seg);
}

/* Who waits for an operation that becomes a grant waits for the grant then, and is told so once. */
static void a_grant_in_front_of_waiters(void **state)
{
	seg_init(&actors[0].seg, SEG_GET_MAP, 0, 100, &actors[0].op);
	actors[0].seg.holder = 7;
	assert_int_equal(seg_acquire(&file, &actors[0].seg), 0);
	seg_init(&actors[1].seg, SEG_WRITE_IO, 10, 20, &actors[1].op);
	assert_int_equal(seg_acquire(&file, &actors[1].seg), ERR_PARKED);
	seg_init(&actors[2].seg, SEG_WRITE_IO, 60, 70, &actors[2].op);
	assert_int_equal(seg_acquire(&file, &actors[2].seg), ERR_PARKED);
	assert_false(actors[1].told_any || actors[2].told_any);
	seg_init(&grants[0], SEG_GRANT_RW, 0, 50, NULL);
	grants[0].holder = 7;
	grants[0].order = 12345;
	pthread_mutex_lock(&file.lock);
	assert_int_equal(seg_grant_locked(&file, &actors[0].seg, &grants[0]), 0);
	pthread_mutex_unlock(&file.lock);
	assert_int_equal(grants[0].order, 12345);
	assert_true(actors[1].told[0]);
	assert_int_equal(actors[1].seg.state, SEG_PARKED);
	assert_false(actors[2].told_any);
	assert_int_equal(actors[2].seg.state, SEG_HELD);
	/* A piece of it is split off: nobody is told again (on_recall() would see it). */
	seg_init(&grants[1], SEG_GRANT_RW, 15, 50, NULL);
	grants[1].holder = 7;
	grants[1].order = 12345;
	pthread_mutex_lock(&file.lock);
	assert_int_equal(seg_grant_locked(&file, NULL, &grants[1]), 0);
	seg_shrink_locked(&file, &grants[0], 0, 5);
	pthread_mutex_unlock(&file.lock);
	assert_int_equal(actors[1].seg.state, SEG_PARKED);
	assert_false(actors[1].told[1]);
	pthread_mutex_lock(&file.lock);
	seg_ungrant_locked(&file, &grants[1]);
	seg_ungrant_locked(&file, &grants[0]);
	pthread_mutex_unlock(&file.lock);
	assert_int_equal(actors[1].seg.state, SEG_HELD);
	assert_int_equal(actors[1].unparked, 1);
	assert_int_equal(ioctx_run(ctx, false), 2);
	seg_release(&file, &actors[1].seg);
	seg_release(&file, &actors[2].seg);
}

/* Ghosts: the same range and the same number, but another holder or kind. */
static void equal_places(void **state)
{
	uint64_t newest;

	pthread_mutex_lock(&file.lock);
	for (unsigned i = 0; i < GRANTS; i++) {
		seg_init(&grants[i], SEG_FIRST_GRANT + i % 3, 0, UINT64_MAX, NULL);
		grants[i].holder = 1 + i / 3;
		grants[i].order = 1;
		assert_int_equal(seg_grant_locked(&file, NULL, &grants[i]), 0);
	}
	for (unsigned left = GRANTS; left; left--) {
		struct seg *s = NULL;
		unsigned seen = 0, victim = 7 * left % GRANTS;

		while ((s = seg_next_grant_locked(&file, 7u << SEG_FIRST_GRANT, 0, 5, 6, s)))
			seen++;
		assert_int_equal(seen, left);
		while (grants[victim].state != SEG_HELD)
			victim = (victim + 1) % GRANTS;
		s = seg_next_grant_locked(&file, 1u << grants[victim].kind, grants[victim].holder, 5,
					  6, NULL);
		assert_ptr_equal(s, &grants[victim]);
		assert_int_equal(seg_covered_locked(&file, s->holder, 5, 6, &newest),
				 grants[(s->holder - 1) * 3 + 1].state == SEG_HELD);
		seg_ungrant_locked(&file, s);
	}
	pthread_mutex_unlock(&file.lock);
}

/* ---- cost ----------------------------------------------------------------------------------- */

#define MANY 100000u
#define MANY_HOLDERS 10000u
#define WIDTH 4096u

/* Of this thread alone: others may have the processor as long as they like. */
static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void look_around(uint64_t n, unsigned holders, unsigned turns)
{
	uint64_t newest;

	for (unsigned i = 0; i < turns; i++) {
		uint64_t at = rng() % n, holder = 1 + at % holders;
		struct seg s, *g;

		/* One clashes with its foreign neighbour only, one with nothing, from one end to the
		 * other: what is its own is not walked through. */
		seg_init(&s, SEG_GET_RW, at * WIDTH, (at + 1) * WIDTH, NULL);
		s.holder = holder;
		assert_int_equal(seg_try(&file, &s), 0);
		seg_release(&file, &s);
		s.end += WIDTH;
		if (at + 1 < n)
			assert_int_equal(seg_try(&file, &s), holders == 1 ? 0 : -EAGAIN);
		if (s.state == SEG_HELD)
			seg_release(&file, &s);
		seg_init(&s, SEG_GET_READ, 0, UINT64_MAX, NULL);
		assert_int_equal(seg_try(&file, &s), 0);
		seg_release(&file, &s);
		g = seg_next_grant_locked(&file, 1u << SEG_GRANT_RW, holder, at * WIDTH, UINT64_MAX,
					  NULL);
		assert_int_equal(g->start, at * WIDTH);
		g = seg_next_grant_locked(&file, 1u << SEG_GRANT_RW, holder, 0, UINT64_MAX, g);
		if (at + holders < n)
			assert_int_equal(g->start, (at + holders) * WIDTH);
		else
			assert_null(g);
		assert_true(seg_covered_locked(&file, holder, at * WIDTH, at * WIDTH + 1, &newest));
		assert_false(seg_covered_locked(&file, holder + 1, at * WIDTH, at * WIDTH + 1,
						&newest));
	}
}

/* Time of `turns` looks at a table of n grants. */
static double cost_of(struct seg *many, unsigned n, unsigned holders, unsigned turns)
{
	double began;

	pthread_mutex_lock(&file.lock);
	for (unsigned i = 0; i < n; i++) {
		seg_init(&many[i], SEG_GRANT_RW, (uint64_t)i * WIDTH, (uint64_t)(i + 1) * WIDTH, NULL);
		many[i].holder = 1 + i % holders;
		assert_int_equal(seg_grant_locked(&file, NULL, &many[i]), 0);
	}
	pthread_mutex_unlock(&file.lock);
	began = seconds();
	look_around(n, holders, turns);
	began = seconds() - began;
	pthread_mutex_lock(&file.lock);
	for (unsigned i = 0; i < n; i++)
		seg_ungrant_locked(&file, &many[i * 7919ull % n]);
	pthread_mutex_unlock(&file.lock);
	return began;
}

/* 10^5 grants of 10^4 holders: a linear search anywhere would cost a thousand times what 10^2 cost. */
static void many_grants_are_cheap(void **state)
{
	struct seg *many = calloc(MANY, sizeof(*many));

	assert_non_null(many);
	rng_state = 42;
	for (unsigned one = 0; one < 2; one++) {
		double few = cost_of(many, 100, one ? 1 : 10, 2000);
		double lots = cost_of(many, MANY, one ? 1 : MANY_HOLDERS, 2000);

		print_message("%s: 10^2 grants %.2f us, 10^5 grants %.2f us a turn\n",
			      one ? "one holder" : "many holders", few * 500, lots * 500);
		assert_true(lots < 60 * few);
	}
	free(many);
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
		cmocka_unit_test_setup_teardown(head_of_the_queue, setup, teardown),
		cmocka_unit_test_setup_teardown(a_grant_in_front_of_waiters, setup, teardown),
		cmocka_unit_test_setup_teardown(equal_places, setup, teardown),
		cmocka_unit_test_setup_teardown(many_grants_are_cheap, setup, teardown),
		cmocka_unit_test_setup_teardown(threads_exclude_each_other, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
