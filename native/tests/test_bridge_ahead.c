/* SPDX-License-Identifier: MIT
 *
 * test_bridge_ahead.c - a listing that was made ahead is the one that would be made now, or is not given.
 */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "names_fixture.h"

#include "bridge_ahead.h"
#include "btree.h"
#include "fuse_abi.h"

#define CAP 4096u
#define NAMES 1000u
#define ANSWERS 9u /* of 128 entries each; the last is empty */
#define DOTS 2u
#define REST 65536u /* bytes, enough for all names */
#define KEPT 16u /* answers that are kept (bridge_ahead.c) */

static struct ahead *ahead;
static struct inode *dir;

static void add(unsigned i)
{
	char name[32];

	snprintf(name, sizeof(name), "name-%u", i);
	inode_put(make_file(dir, name));
}

static void take_away(unsigned i)
{
	char name[32];
	struct inode *victim = NULL;
	int rc, len = snprintf(name, sizeof(name), "name-%u", i);

	RETRY(rc, namei_unlink(dir, name, (size_t)len, &victim));
	OK(rc);
	inode_put(victim);
}

static int begin(void **state)
{
	setup(state);
	dir = make_dir(world.root, "dir");
	for (unsigned i = 0; i < NAMES; i++)
		add(i);
	return ahead_create(&ahead);
}

static int end(void **state)
{
	ahead_destroy(ahead);
	inode_put(dir);
	return teardown(state);
}

/* One answer as a mount gives it: made ahead, which *ahead_of_it says, or now; then it is checked. */
static struct listing answer(uint64_t after, uint8_t *data, bool here, bool *ahead_of_it)
{
	struct listing l = {.data = data, .cap = CAP};
	uint64_t version;

	*ahead_of_it = ahead_take(ahead, dir, after, &l);
	if (!*ahead_of_it)
		OK(listing_make(dir, after, &l, &version));
	ahead_expect(ahead, dir, &l, here);
	if (here)
		ahead_make(ahead);
	return l;
}

static unsigned entries(const struct listing *l)
{
	unsigned n = 0;

	for (size_t at = 0; at < l->len; n++) {
		const struct fuse_dirent *d = (const void *)(l->data + at);

		at += FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + d->namelen);
		if (at == l->len)
			assert_int_equal(d->off, l->last);
	}
	return n;
}

/* From the beginning to the end; how many entries, and how many answers were made ahead. */
static unsigned read_all(bool here, unsigned *ahead_of_it)
{
	_Alignas(8) uint8_t data[CAP], same[CAP];
	uint64_t after = 0, version;
	unsigned n = 0;

	for (;;) {
		struct listing now = {.data = same, .cap = CAP};
		bool was;
		struct listing l = answer(after, data, here, &was);

		OK(listing_make(dir, after, &now, &version));
		assert_int_equal(l.len, now.len);
		assert_memory_equal(l.data, now.data, now.len);
		*ahead_of_it += was;
		if (!l.len)
			return n;
		assert_int_equal(l.last, now.last);
		n += entries(&l);
		after = l.last;
	}
}

static void all_but_the_first_are_made_ahead(void **state)
{
	uint64_t used, useless;
	unsigned made = 0;

	assert_int_equal(read_all(true, &made), NAMES + DOTS);
	ahead_counts(ahead, &used, &useless);
	assert_int_equal(used, made);
	assert_int_equal(useless, 0);
	assert_int_equal(made, ANSWERS - 1);
}

static void the_thread_makes_them(void **state)
{
	struct timespec pause = {.tv_nsec = 1000000};
	_Alignas(8) uint8_t data[CAP];
	unsigned tries = 0;
	bool was = false;

	for (uint64_t after = 0; !was && tries < 20000; tries++) {
		struct listing l = answer(after, data, false, &was);

		after = l.len ? l.last : 0;
		nanosleep(&pause, NULL);
	}
	assert_true(was);
}

static void not_what_has_changed(void **state)
{
	_Alignas(8) uint8_t data[CAP];
	uint64_t used, useless;
	struct listing l;
	bool was;

	l = answer(0, data, true, &was);
	add(NAMES); /* at the end: what was made is another, or the same in an older directory */
	l = answer(l.last, data, true, &was);
	assert_false(was);
	take_away(0);
	l = answer(l.last, data, true, &was);
	assert_false(was);
	l = answer(l.last, data, true, &was);
	assert_true(was);
	ahead_counts(ahead, &used, &useless);
	assert_int_equal(used, 1);
	assert_int_equal(useless, 2);
}

static void not_what_was_not_asked_for(void **state)
{
	_Alignas(8) uint8_t data[CAP];
	struct listing l, small = {.data = data, .cap = CAP / 2};
	bool was;

	l = answer(0, data, true, &was);
	assert_false(ahead_take(ahead, dir, l.last, &small)); /* another size */
	l = answer(0, data, true, &was);
	assert_false(was); /* another place */
	l = answer(l.last, data, true, &was);
	assert_true(was);
	assert_false(ahead_take(ahead, world.root, l.last, &l)); /* another directory */
}

static void too_large_ones_are_not_made(void **state)
{
	struct listing l = {.cap = 1u << 20};
	uint64_t version;

	l.data = malloc(l.cap);
	OK(listing_make(dir, 0, &l, &version));
	ahead_expect(ahead, dir, &l, true);
	ahead_make(ahead);
	assert_false(ahead_take(ahead, dir, l.last, &l));
	free(l.data);
}

static void a_removed_directory_is_empty(void **state)
{
	_Alignas(8) uint8_t data[CAP];
	struct inode *victim = NULL;
	struct listing l;
	int rc;
	bool was;

	l = answer(0, data, true, &was);
	for (unsigned i = 0; i < NAMES; i++)
		take_away(i);
	RETRY(rc, namei_rmdir(world.root, "dir", 3, &victim));
	OK(rc);
	inode_put(victim);
	l = answer(l.last, data, true, &was);
	assert_int_equal(l.len, 0);
}

/* Changes in between, at random. The thread makes some of the later ones, if it gets a CPU. */
static void as_if_made_now(void **state)
{
	bool there[NAMES];
	unsigned made = 0, count = NAMES;
	_Alignas(8) uint8_t data[CAP], same[CAP];
	uint64_t after = 0;

	memset(there, 1, sizeof(there));
	srandom(7);
	for (unsigned step = 0; step < 3000; step++) {
		unsigned i = (unsigned)random() % NAMES;
		bool was;
		struct listing l = answer(after, data, step < 1000 || random() % 2, &was);
		struct listing now = {.data = same, .cap = CAP};
		uint64_t version;

		OK(listing_make(dir, after, &now, &version));
		assert_int_equal(l.len, now.len);
		assert_memory_equal(l.data, now.data, l.len);
		made += was;
		after = l.len && random() % 20 ? l.last : 0;
		if (random() % 4)
			continue;
		if (there[i])
			take_away(i);
		else
			add(i);
		there[i] = !there[i];
		count += there[i] ? 1 : -1u;
	}
	assert_true(made > 100);
	assert_int_equal(read_all(true, &made), count + DOTS);
}

static _Atomic bool stop;

static void *change(void *arg)
{
	for (unsigned i = NAMES; !stop; i++) {
		add(i);
		if (i > NAMES + 20)
			take_away(i - 20);
	}
	return NULL;
}

static void *read_again(void *arg)
{
	_Alignas(8) uint8_t data[CAP];

	for (unsigned round = 0; round < 30; round++) {
		uint64_t after = 0;
		unsigned n = 0;
		bool was;

		for (;;) {
			struct listing l = answer(after, data, round % 2, &was);

			if (!l.len)
				break;
			assert_true(l.last > after);
			n += entries(&l);
			after = l.last;
		}
		assert_true(n >= NAMES + DOTS); /* those that nobody touches, and some others */
	}
	return NULL;
}

static void many_readers_and_a_writer(void **state)
{
	pthread_t reader[3], writer;

	stop = false;
	assert_int_equal(pthread_create(&writer, NULL, change, NULL), 0);
	for (unsigned i = 0; i < ARRAY_LEN(reader); i++)
		assert_int_equal(pthread_create(&reader[i], NULL, read_again, NULL), 0);
	for (unsigned i = 0; i < ARRAY_LEN(reader); i++)
		pthread_join(reader[i], NULL);
	stop = true;
	pthread_join(writer, NULL);
}

/* ---- blocks that have to be read ---- */

static void get_dir(inum_t number)
{
	fs_rdlock(world.fs);
	OK(inode_get(world.fs, number, &dir));
	fs_unlock(world.fs);
}

static void drop_caches(void)
{
	inum_t number = dir->ino;

	inode_put(dir);
	world_remount();
	get_dir(number);
}

/* From the beginning, of a directory that is not in memory; returns how many blocks the thread read. */
static uint64_t list_cold(struct listing *l, bool reads_ahead)
{
	uint64_t version, before;

	drop_caches();
	before = buf_thread_misses;
	buf_reads_ahead = reads_ahead;
	OK(listing_make(dir, 0, l, &version));
	buf_reads_ahead = false;
	assert_true(l->cold);
	return buf_thread_misses - before;
}

static void several_blocks_are_read_at_once(void **state)
{
	_Alignas(8) static uint8_t one[1u << 20], many[1u << 20];
	struct listing l = {.data = one, .cap = 3 * CAP}, m = {.data = many, .cap = 3 * CAP};
	uint64_t version;

	/* Of a part: more than it needs. */
	assert_true(list_cold(&m, true) > list_cold(&l, false) + 2);
	assert_int_equal(m.len, l.len);
	assert_memory_equal(many, one, l.len);
	/* Of the whole: what it needs, and nothing of others. */
	l.cap = m.cap = sizeof(one);
	l.len = m.len = 0;
	assert_int_equal(list_cold(&m, true), list_cold(&l, false));
	assert_int_equal(entries(&m), NAMES + DOTS);
	assert_int_equal(m.len, l.len);
	assert_memory_equal(many, one, l.len);
	OK(listing_make(dir, 0, &l, &version));
	assert_false(l.cold);
}

/* The last leaf of the directory cannot be read. */
static void what_cannot_be_read(void **state)
{
	_Alignas(8) static uint8_t data[1u << 20];
	struct listing l = {.data = data, .cap = sizeof(data)};
	struct bt_cursor c;
	inum_t number = dir->ino;
	fsblock_t leaf;
	uint64_t version;
	char line[256];

	fs_rdlock(world.fs);
	bt_cursor_init(&c, fs_tree(world.fs, TREE_DIRENT));
	OK(bt_seek(&c, KEY(dir->ino, UINT64_MAX), BT_LE));
	leaf = c.path[0].buf->block;
	bt_cursor_release(&c);
	fs_unlock(world.fs);
	sim_fail(world.sim, IO_READ, leaf << BLOCK_SHIFT, BLOCK_SIZE, UINT32_MAX);
	/* Nobody asked for that one. */
	l.cap = 3 * CAP;
	list_cold(&l, true);
	assert_int_equal(l.len, l.cap);
	assert_false(fs_is_shutdown(world.fs));
	/* Nor for the rest of the directory, made ahead. */
	for (unsigned i = 0; i < 2; i++) {
		buf_reads_ahead = i;
		ahead_expect(ahead, dir, &(struct listing){.len = 1, .last = l.last, .cap = REST}, true);
		ahead_make(ahead);
		assert_false(fs_is_shutdown(world.fs));
	}
	/* Who asks gets what can be read before it, and then the error. */
	l.cap = sizeof(data);
	OK(listing_make(dir, 0, &l, &version));
	buf_reads_ahead = false;
	assert_true(entries(&l) > NAMES / 2);
	assert_true(entries(&l) < NAMES);
	assert_int_equal(listing_make(dir, l.last, &l, &version), -ERR_DEV_READ);
	assert_true(fs_is_shutdown(world.fs));
	sim_fail(world.sim, IO_READ, 0, 0, 0);
	while (log_next(line, sizeof(line)) > 0)
		;
	/* It was not kept: the next that asks reads it again. */
	OK(listing_make(dir, 0, &l, &version));
	assert_int_equal(entries(&l), NAMES + DOTS);
	inode_put(dir);
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	assert_true(fs_close(world.fs) < 0); /* it was shut down */
	world_mount();
	get_dir(number);
}

/* ---- what is being made ---- */

static _Atomic unsigned told;

static void count(void *arg)
{
	told++;
}

struct reader {
	pthread_t thread;
	uint64_t after;
	bool was;
};

static void *take_one(void *arg)
{
	struct reader *r = arg;
	_Alignas(8) uint8_t data[CAP];
	struct listing l = {.data = data, .cap = CAP};

	dev_before_blocking = (struct dev_block_hook){count, NULL};
	r->was = ahead_take(ahead, dir, r->after, &l);
	dev_before_blocking = (struct dev_block_hook){0};
	return NULL;
}

/* The thread is made to wait in the middle by the lock that it needs. */
static void a_reader_waits_for_it(void **state)
{
	struct timespec pause = {.tv_nsec = 20000000};
	_Alignas(8) uint8_t data[CAP];
	struct reader r = {0};
	bool was;

	told = 0;
	for (unsigned try = 0; !r.was && try < 100; try++) { /* the thread may be late */
		r.after = answer(0, data, true, &was).last;
		ahead_take(ahead, dir, r.after, &(struct listing){.data = data, .cap = CAP});
		fs_wrlock(world.fs);
		ahead_expect(ahead, dir, &(struct listing){.len = 1, .last = r.after, .cap = CAP}, false);
		nanosleep(&pause, NULL);
		assert_int_equal(pthread_create(&r.thread, NULL, take_one, &r), 0);
		nanosleep(&pause, NULL);
		fs_unlock(world.fs);
		pthread_join(r.thread, NULL);
	}
	assert_true(r.was);
	assert_true(told > 0);
}

static void many_readers_do_not_disturb_each_other(void **state)
{
	_Alignas(8) uint8_t data[CAP];
	uint64_t after[ANSWERS / 2] = {0}, before, used, useless;
	bool was;

	/* Each at another place, its next one made; the first goes first, for the others take what they pass. */
	for (unsigned i = ARRAY_LEN(after); i > 0; i--)
		for (unsigned j = 0; j < i; j++)
			after[i - 1] = answer(after[i - 1], data, true, &was).last;
	ahead_counts(ahead, &before, &useless);
	for (unsigned i = ARRAY_LEN(after); i > 0; i--)
		after[i - 1] = answer(after[i - 1], data, true, &was).last;
	ahead_counts(ahead, &used, &useless);
	assert_int_equal(useless, 0);
	assert_int_equal(used - before, ARRAY_LEN(after));
}

/* What nobody comes back for does not stay in the way. */
static void the_oldest_makes_room(void **state)
{
	struct inode *other = make_dir(world.root, "other");
	_Alignas(8) uint8_t data[CAP];
	struct listing first, l = {.data = data, .cap = CAP};
	bool was;

	first = answer(0, data, true, &was);
	for (unsigned i = 0; i < KEPT; i++) { /* places that nobody asks for */
		ahead_expect(ahead, other, &(struct listing){.len = 1, .last = i, .cap = CAP}, true);
		ahead_make(ahead);
	}
	assert_false(ahead_take(ahead, dir, first.last, &l));
	for (unsigned i = 0; i < KEPT; i++)
		assert_true(ahead_take(ahead, other, i, &l));
	inode_put(other);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(all_but_the_first_are_made_ahead, begin, end),
		cmocka_unit_test_setup_teardown(the_thread_makes_them, begin, end),
		cmocka_unit_test_setup_teardown(not_what_has_changed, begin, end),
		cmocka_unit_test_setup_teardown(not_what_was_not_asked_for, begin, end),
		cmocka_unit_test_setup_teardown(too_large_ones_are_not_made, begin, end),
		cmocka_unit_test_setup_teardown(a_removed_directory_is_empty, begin, end),
		cmocka_unit_test_setup_teardown(as_if_made_now, begin, end),
		cmocka_unit_test_setup_teardown(many_readers_and_a_writer, begin, end),
		cmocka_unit_test_setup_teardown(a_reader_waits_for_it, begin, end),
		cmocka_unit_test_setup_teardown(many_readers_do_not_disturb_each_other, begin, end),
		cmocka_unit_test_setup_teardown(the_oldest_makes_room, begin, end),
		cmocka_unit_test_setup_teardown(several_blocks_are_read_at_once, begin, end),
		cmocka_unit_test_setup_teardown(what_cannot_be_read, begin, end),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
