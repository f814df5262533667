/* SPDX-License-Identifier: MIT
 *
 * test_grant.c - grants of holders: cut, split, replaced; lists, references and the listing that
 * goes with them.
 */
#include "file_fixture.h"

#include "layout_priv.h"

#define HOLDERS 3u

static const struct seg_hooks *their_hooks;
static struct holder holders[HOLDERS];
static struct grant_list dead;

/* The table is tested alone: with holders that nobody else knows, and without recalls. */
static int setup(void **state)
{
	world_new(64u << 20, 512, 1);
	make_files();
	their_hooks = world.fs->seg_hooks;
	world.fs->seg_hooks = NULL;
	memset(holders, 0, sizeof(holders));
	for (unsigned i = 0; i < HOLDERS; i++) {
		holders[i].id = 10 + i;
		TAILQ_INIT(&holders[i].grants);
	}
	return 0;
}

static int teardown(void **state)
{
	inum_t ino = 0, found;

	grant_list_free(world.fs, &dead);
	for (unsigned i = 0; i < HOLDERS; i++) {
		assert_int_equal(holders[i].ngrants, 0);
		assert_true(TAILQ_EMPTY(&holders[i].grants));
	}
	assert_int_equal(grant_inodes(world.fs, &ino, &found, 1), 0);
	for (unsigned i = 0; i < FILES; i++) {
		assert_false(seg_any(world.file[i]));
		assert_int_equal(world.file[i]->refs, 1);
	}
	world.fs->seg_hooks = their_hooks;
	delete_all();
	world_close();
	world_end();
	return 0;
}

static void spares(struct grant *spare[3])
{
	for (unsigned i = 0; i < 3; i++)
		assert_non_null(spare[i] = grant_alloc());
}

static void spares_free(struct grant *spare[3])
{
	for (unsigned i = 0; i < 3; i++)
		grant_free(spare[i]);
}

static struct grant *add(unsigned file, unsigned holder, enum seg_kind kind, uint64_t start,
			 uint64_t end, unsigned flags)
{
	struct inode *in = world.file[file];
	struct grant *spare[3], *g;
	struct seg s;

	spares(spare);
	g = spare[0];
	seg_init(&s, kind == SEG_GRANT_READ ? SEG_GET_READ : SEG_GET_RW, start, end, NULL);
	s.holder = holders[holder].id;
	assert_int_equal(seg_try(in, &s), 0);
	pthread_mutex_lock(&in->lock);
	assert_ptr_equal(grant_add_locked(in, &holders[holder], &s, kind, start, end, flags, spare,
					  &dead), g);
	pthread_mutex_unlock(&in->lock);
	assert_int_equal(s.state, SEG_IDLE);
	assert_null(spare[0]);
	spares_free(spare);
	return g;
}

static uint64_t cut(unsigned file, unsigned holder, unsigned kinds, uint64_t start, uint64_t end)
{
	struct inode *in = world.file[file];
	struct grant *spare = grant_alloc();
	uint64_t taken;

	pthread_mutex_lock(&in->lock);
	taken = grant_cut_locked(in, holders[holder].id, kinds, start, end, &spare, &dead);
	pthread_mutex_unlock(&in->lock);
	grant_free(spare);
	return taken;
}

#define READ (1u << SEG_GRANT_READ)
#define RW (1u << SEG_GRANT_RW)
#define PIN (1u << SEG_GRANT_PIN)

/* The grants of a file, as "holder:start-end" with r or w, in order. */
static void expect(unsigned file, const char *want)
{
	struct grant_look look[16];
	uint64_t offset = 0;
	char got[512];
	size_t at = 0;
	unsigned n = grant_list(world.file[file], &offset, look, ARRAY_LEN(look));

	got[0] = 0;
	for (unsigned i = 0; i < n; i++) {
		assert_int_equal(look[i].ino, world.file[file]->ino);
		assert_int_equal(look[i].generation, world.file[file]->core.generation);
		at += (size_t)snprintf(got + at, sizeof(got) - at, "%s%llu:%llu-%lld%c",
				       i ? " " : "", (unsigned long long)look[i].holder - 10,
				       (unsigned long long)look[i].offset,
				       look[i].length == UINT64_MAX ?
					       -1ll : (long long)(look[i].offset + look[i].length),
				       look[i].iomode == IOMODE_READ ? 'r' :
				       look[i].iomode == IOMODE_RW ? 'w' : 'p');
	}
	assert_string_equal(got, want);
	assert_int_equal(offset, UINT64_MAX);
}

static void cut_out_of_the_middle(void **state)
{
	struct grant *g = add(0, 0, SEG_GRANT_RW, 0, 100, 0);
	uint64_t seq = g->seq, newest;

	g->recalled_start = 5;
	g->recalled_end = 50;
	g->recalled_at = 77;
	assert_int_equal(cut(0, 0, RW, 40, 60), 20);
	expect(0, "0:0-40w 0:60-100w");
	assert_int_equal(holders[0].ngrants, 2);
	assert_int_equal(world.file[0]->refs, 3);
	g = TAILQ_LAST(&holders[0].grants, grant_queue);
	assert_int_equal(g->seq, seq);
	assert_int_equal(g->recalled_at, 77);
	assert_true(seg_covered_locked(world.file[0], 10, 60, 100, &newest));
	assert_int_equal(newest, seq);
	assert_false(seg_covered_locked(world.file[0], 10, 30, 70, &newest));
	/* Of nobody else, of no other kind. */
	assert_int_equal(cut(0, 1, RW | READ | PIN, 0, UINT64_MAX), 0);
	assert_int_equal(cut(0, 0, READ | PIN, 0, UINT64_MAX), 0);
	/* Ends, and what lies between. */
	assert_int_equal(cut(0, 0, RW, 30, 70), 20);
	expect(0, "0:0-30w 0:70-100w");
	assert_int_equal(cut(0, 0, RW | READ, 0, UINT64_MAX), 60);
	expect(0, "");
}

static void everything_of_both_kinds(void **state)
{
	add(0, 0, SEG_GRANT_READ, 0, UINT64_MAX, 0);
	add(0, 0, SEG_GRANT_RW, 10, 90, 0);
	add(0, 1, SEG_GRANT_READ, 0, UINT64_MAX, 0);
	/* Both are cut in the middle, with memory for one at hand. */
	assert_int_equal(cut(0, 0, RW | READ, 40, 50), 20);
	expect(0, "0:0-40r 1:0--1r 0:10-40w 0:50--1r 0:50-90w");
	assert_int_equal(cut(0, 0, RW | READ, 0, UINT64_MAX), UINT64_MAX);
	expect(0, "1:0--1r");
	assert_int_equal(cut(0, 1, READ, 0, UINT64_MAX), UINT64_MAX);
}

/* An ATOMIC grant is taken whole or not at all. */
static void atomic_goes_whole(void **state)
{
	add(0, 0, SEG_GRANT_RW, 10, 20, LAYOUT_F_ATOMIC);
	add(0, 0, SEG_GRANT_RW, 20, 30, 0);
	assert_int_equal(cut(0, 0, RW, 12, 14), 0);
	assert_int_equal(cut(0, 0, RW, 0, 15), 0);
	assert_int_equal(cut(0, 0, RW, 15, 25), 5);
	expect(0, "0:10-20w 0:25-30w");
	assert_int_equal(cut(0, 0, RW, 10, 30), 15);
	expect(0, "");
}

/* What a holder asks for again replaces what it had, and is the newest. */
static void own_overlap_is_replaced(void **state)
{
	struct grant *old = add(0, 0, SEG_GRANT_RW, 0, 100, 0), *g;
	uint64_t newest;

	g = add(0, 0, SEG_GRANT_RW, 40, 60, 0);
	assert_true(g->seq > old->seq);
	assert_int_equal(g->seg.order, g->seq);
	expect(0, "0:0-40w 0:40-60w 0:60-100w");
	assert_true(seg_covered_locked(world.file[0], 10, 0, 100, &newest));
	assert_int_equal(newest, g->seq);
	add(0, 0, SEG_GRANT_RW, 40, 60, 0);
	expect(0, "0:0-40w 0:40-60w 0:60-100w");
	add(0, 0, SEG_GRANT_RW, 0, 100, 0);
	expect(0, "0:0-100w");
	assert_int_equal(holders[0].ngrants, 1);
	add(0, 0, SEG_GRANT_READ, 50, 150, 0);
	add(0, 1, SEG_GRANT_RW, 100, 200, 0);
	expect(0, "0:0-100w 0:50-150r 1:100-200w");
	cut(0, 0, RW | READ, 0, UINT64_MAX);
	cut(0, 1, RW | READ, 0, UINT64_MAX);
}

static unsigned resumed;

static void count(struct op *op)
{
	resumed++;
}

/* Who waits for a part that is cut goes on; who waits for another part does not. */
static void waiters_get_what_was_cut(void **state)
{
	struct op op[2] = { { .ctx = world.ctx, .resume = count },
			    { .ctx = world.ctx, .resume = count } };
	struct seg middle, rest;

	resumed = 0;
	add(0, 0, SEG_GRANT_RW, 0, 100, 0);
	seg_init(&middle, SEG_WRITE_IO, 40, 60, &op[0]);
	seg_init(&rest, SEG_WRITE_IO, 80, 90, &op[1]);
	assert_int_equal(seg_acquire(world.file[0], &middle), ERR_PARKED);
	assert_int_equal(seg_acquire(world.file[0], &rest), ERR_PARKED);
	cut(0, 0, RW, 40, 60);
	assert_int_equal(middle.state, SEG_HELD);
	assert_int_equal(rest.state, SEG_PARKED);
	seg_release(world.file[0], &middle);
	cut(0, 0, RW, 0, 85);
	assert_int_equal(rest.state, SEG_PARKED);
	cut(0, 0, RW, 85, 100);
	assert_int_equal(rest.state, SEG_HELD);
	seg_release(world.file[0], &rest);
	while (ioctx_run(world.ctx, false) > 0)
		;
	assert_int_equal(resumed, 2);
}

static void ghosts(void **state)
{
	struct grant *g[2] = { grant_alloc(), grant_alloc() }, *newer;
	struct inode *in = world.file[1];
	uint64_t newest;

	pthread_mutex_lock(&in->lock);
	assert_int_equal(grant_ghost_locked(in, &holders[0], SEG_GRANT_RW, g[0]), 0);
	assert_int_equal(grant_ghost_locked(in, &holders[1], SEG_GRANT_RW, g[1]), 0);
	pthread_mutex_unlock(&in->lock);
	expect(1, "0:0--1w 1:0--1w");
	assert_int_equal(cut(1, 1, RW, 0, UINT64_MAX), UINT64_MAX);
	/* It came back, and takes a new layout: the ghost stays around it. */
	newer = add(1, 0, SEG_GRANT_RW, 40, 60, 0);
	assert_false(newer->flags & GRANT_F_GHOST);
	expect(1, "0:0-40w 0:40-60w 0:60--1w");
	assert_true(seg_covered_locked(in, 10, 0, 40, &newest));
	assert_true(newest < newer->seq);
	assert_true(TAILQ_LAST(&holders[0].grants, grant_queue)->flags & GRANT_F_GHOST ||
		    TAILQ_FIRST(&holders[0].grants)->flags & GRANT_F_GHOST);
	cut(1, 0, RW, 0, UINT64_MAX);
}

static void which_inodes(void **state)
{
	inum_t ino = 0, found[8];

	add(2, 0, SEG_GRANT_READ, 0, 10, 0);
	add(0, 0, SEG_GRANT_READ, 0, 10, 0);
	add(0, 1, SEG_GRANT_READ, 0, 10, 0);
	assert_int_equal(grant_inodes(world.fs, &ino, found, 8), 2);
	assert_int_equal(ino, MAX(world.file[0]->ino, world.file[2]->ino));
	assert_int_equal(grant_inodes(world.fs, &ino, found, 8), 0);
	/* The one that stood for the inode goes, another takes its place. */
	cut(0, 0, READ, 0, 10);
	ino = 0;
	assert_int_equal(grant_inodes(world.fs, &ino, found, 1), 1);
	assert_int_equal(found[0], MIN(world.file[0]->ino, world.file[2]->ino));
	assert_int_equal(grant_inodes(world.fs, &ino, found, 1), 1);
	assert_int_equal(found[0], MAX(world.file[0]->ino, world.file[2]->ino));
	cut(0, 1, READ, 0, 10);
	ino = 0;
	assert_int_equal(grant_inodes(world.fs, &ino, found, 8), 1);
	assert_int_equal(found[0], world.file[2]->ino);
	cut(2, 0, READ, 0, 10);
}

#define MANY 100000u

/* 10^5 segments by cuts: every second block of a large grant is returned. */
static void many_segments(void **state)
{
	struct grant_look look[1000];
	uint64_t offset = 0, at = 0, newest;
	unsigned n;

	add(0, 0, SEG_GRANT_RW, 0, 2 * MANY * BLOCK_SIZE, 0);
	for (uint64_t i = 0; i < MANY; i++) {
		uint64_t block = 2 * (i * 7919 % MANY) + 1;

		assert_int_equal(cut(0, 0, RW, block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE),
				 BLOCK_SIZE);
	}
	assert_int_equal(holders[0].ngrants, MANY);
	while ((n = grant_list(world.file[0], &offset, look, ARRAY_LEN(look))))
		for (unsigned i = 0; i < n; i++, at += 2) {
			assert_int_equal(look[i].offset, at * BLOCK_SIZE);
			assert_int_equal(look[i].length, BLOCK_SIZE);
		}
	assert_int_equal(at, 2 * MANY);
	assert_true(seg_covered_locked(world.file[0], 10, 8 * BLOCK_SIZE, 9 * BLOCK_SIZE, &newest));
	assert_false(seg_covered_locked(world.file[0], 10, 8 * BLOCK_SIZE, 10 * BLOCK_SIZE,
					&newest));
	assert_int_equal(cut(0, 0, RW, 0, UINT64_MAX), MANY * BLOCK_SIZE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(cut_out_of_the_middle, setup, teardown),
		cmocka_unit_test_setup_teardown(everything_of_both_kinds, setup, teardown),
		cmocka_unit_test_setup_teardown(atomic_goes_whole, setup, teardown),
		cmocka_unit_test_setup_teardown(own_overlap_is_replaced, setup, teardown),
		cmocka_unit_test_setup_teardown(waiters_get_what_was_cut, setup, teardown),
		cmocka_unit_test_setup_teardown(ghosts, setup, teardown),
		cmocka_unit_test_setup_teardown(which_inodes, setup, teardown),
		cmocka_unit_test_setup_teardown(many_segments, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
