/* SPDX-License-Identifier: MIT
 *
 * test_trans.c - transactions and the buffer cache: what a cancel brings back, what a commit makes
 * of a block, what is verified, what is evicted.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>
#include <pthread.h>

#include "bare_fs.h"
#include "log.h"

static struct sim *sim;
static struct fs *fs;

static int set_up(void **state)
{
	sim = bare_sim(1);
	return bare_open(sim, 0, 0, &fs);
}

static int tear_down(void **state)
{
	bare_abandon(fs);
	sim_destroy(sim);
	return 0;
}

static struct buf *get(unsigned i)
{
	struct buf *b;

	assert_int_equal(buf_get(fs, BARE_FIRST + i, &bare_type, BARE_OWNER, &b), 0);
	return b;
}

static void join_and_set(struct trans *t, unsigned i, uint64_t value)
{
	struct buf *b = get(i);

	assert_int_equal(trans_join(t, b), 0);
	bare_set(b, value);
	buf_put(b);
}

static enum buf_state state_of(unsigned i)
{
	struct buf *b = get(i);
	enum buf_state s = b->state;

	buf_put(b);
	return s;
}

static void cancel_restores_contents_and_states(void **state)
{
	struct trans t;
	xid_t xid;

	assert_int_equal(bare_write(fs, 0, 3, 7, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(bare_write(fs, 1, 1, 8, false, &xid), 0);
	assert_int_equal(state_of(0), BUF_LOGGED);
	assert_int_equal(state_of(1), BUF_DIRTY);

	assert_int_equal(trans_begin(fs, &t, 8), 0);
	join_and_set(&t, 0, 100);
	join_and_set(&t, 0, 101); /* a second join changes nothing */
	join_and_set(&t, 1, 102);
	assert_int_equal(t.joined, 2);
	trans_cancel(&t);
	assert_int_equal(bare_read(fs, 0), 7);
	assert_int_equal(bare_read(fs, 1), 8);
	assert_int_equal(bare_read(fs, 2), 7);
	assert_int_equal(state_of(0), BUF_LOGGED);
	assert_int_equal(state_of(1), BUF_DIRTY);
}

static void cancel_brings_back_a_forgotten_block(void **state)
{
	struct trans t;
	struct buf *b;
	xid_t xid;

	assert_int_equal(bare_write(fs, 0, 2, 7, true, &xid), 0);
	assert_int_equal(trans_begin(fs, &t, 8), 0);
	assert_int_equal(buf_forget(&t, BARE_FIRST), 0);
	assert_int_equal(buf_forget(&t, BARE_FIRST + 1), 0);
	/* Allocated again, as something else. */
	assert_int_equal(buf_new(&t, BARE_FIRST, &bare_type, 12345, &b), 0);
	bare_set(b, 9);
	buf_put(b);
	/* New, freed, new. */
	assert_int_equal(buf_new(&t, BARE_FIRST + 5, &bare_type, BARE_OWNER, &b), 0);
	buf_put(b);
	assert_int_equal(buf_forget(&t, BARE_FIRST + 5), 0);
	assert_int_equal(buf_new(&t, BARE_FIRST + 5, &bare_type, BARE_OWNER, &b), 0);
	buf_put(b);
	trans_cancel(&t);
	assert_int_equal(bare_read(fs, 0), 7);
	assert_int_equal(bare_read(fs, 1), 7);
	/* The block that was made is not cached: the device never had it. */
	fs_rdlock(fs);
	assert_true(buf_get(fs, BARE_FIRST + 5, &bare_type, BARE_OWNER, &b) < 0);
	fs_unlock(fs);
}

static void forgotten_block_leaves_the_cache_at_commit(void **state)
{
	struct buf_stats before, after;
	struct trans t;
	struct buf *b;
	xid_t xid;

	assert_int_equal(bare_write(fs, 0, 3, 7, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	buf_get_stats(fs, &before);
	assert_int_equal(trans_begin(fs, &t, 8), 0);
	assert_int_equal(buf_forget(&t, BARE_FIRST), 0);
	join_and_set(&t, 1, 8);
	/* Freed and allocated again in one transaction. */
	assert_int_equal(buf_forget(&t, BARE_FIRST + 2), 0);
	assert_int_equal(buf_new(&t, BARE_FIRST + 2, &bare_type, BARE_OWNER, &b), 0);
	bare_set(b, 9);
	buf_put(b);
	xid = trans_commit(&t);
	buf_get_stats(fs, &after);
	assert_int_equal(after.bufs, before.bufs - 1);
	assert_int_equal(after.dirty, 2);
	assert_int_equal(bare_read(fs, 2), 9);
	/* Its image is not logged again, and another transaction may have the block. */
	assert_int_equal(bare_write(fs, 0, 1, 10, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(bare_read(fs, 0), 10);
	bare_abandon(fs);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 0), 10);
	assert_int_equal(bare_read(fs, 1), 8);
	assert_int_equal(bare_read(fs, 2), 9);
}

struct memo { uint64_t a, b; };

static xid_t told;
static unsigned order;

static void on_end(void *arg, xid_t xid)
{
	told = xid;
	*(unsigned *)arg = ++order;
}

static void saved_memory_and_hooks_follow_the_outcome(void **state)
{
	struct memo m = {1, 2};
	unsigned first = 0, second = 0;
	struct trans t;
	xid_t xid;

	assert_int_equal(trans_begin(fs, &t, 1), 0);
	assert_int_equal(trans_save(&t, &m, sizeof(m)), 0);
	m.a = 10;
	assert_int_equal(trans_save(&t, &m, sizeof(m)), 0);
	m.b = 11;
	assert_int_equal(trans_on_end(&t, on_end, &first), 0);
	assert_int_equal(trans_on_end(&t, on_end, &second), 0);
	told = 99;
	trans_cancel(&t);
	assert_int_equal(m.a, 1);
	assert_int_equal(m.b, 2);
	assert_int_equal(told, 0);
	assert_true(second < first);

	assert_int_equal(trans_begin(fs, &t, 1), 0);
	assert_int_equal(trans_save(&t, &m, sizeof(m)), 0);
	m.a = 10;
	assert_int_equal(trans_on_end(&t, on_end, &first), 0);
	assert_int_equal(trans_on_end(&t, on_end, &second), 0);
	xid = trans_commit(&t);
	assert_int_equal(m.a, 10);
	assert_int_equal(told, xid);
	assert_true(first < second);
}

/* The worst case of a caller was wrong: the operation is whole all the same, and the log says
 * so. */
static void reservation_is_extended(void **state)
{
	char line[256];
	bool said = false;
	struct trans t;
	xid_t xid;

	assert_int_equal(bare_write(fs, 0, 40, 7, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	while (log_next(line, sizeof(line)))
		;
	assert_int_equal(trans_begin(fs, &t, 2), 0);
	assert_int_equal(trans_room(&t), 2);
	for (unsigned i = 0; i < 40; i++)
		join_and_set(&t, i, 8);
	trans_commit(&t);
	assert_int_equal(bare_read(fs, 39), 8);
	while (log_next(line, sizeof(line)))
		said = said || strstr(line, "reserved");
	assert_true(said);
}

static void refusals(void **state)
{
	struct trans t;

	fs->read_only = true;
	assert_int_equal(trans_begin(fs, &t, 1), -EROFS);
	fs->read_only = false;
	fs_shutdown_writes(fs, -ERR_META_CRC, "test");
	assert_int_equal(trans_begin(fs, &t, 1), -ERR_SHUTDOWN);
	fs_wrlock(fs); /* refused without the lock */
	fs_unlock(fs);
}

/* ---- buffers ---- */

static void write_raw(unsigned i, void (*spoil)(struct meta_hdr *h), bool seal)
{
	char *page = io_alloc(BLOCK_SIZE);
	struct meta_hdr *h = (void *)page;

	memset(page, 0, BLOCK_SIZE);
	h->magic = put32(MAGIC_NODE);
	h->block = put64(BARE_FIRST + i);
	memcpy(h->uuid, fs->super.uuid, FORMAT_UUID_LEN);
	h->owner = put64(BARE_OWNER);
	meta_seal(page, 0);
	spoil(h);
	if (seal)
		meta_seal(page, 0);
	assert_int_equal(dev_write(fs->dev, (uint64_t)(BARE_FIRST + i) << BLOCK_SHIFT, page, BLOCK_SIZE, 0),
			 0);
	io_free(page);
}

static void spoil_nothing(struct meta_hdr *h) {}
static void spoil_magic(struct meta_hdr *h) { h->magic = put32(MAGIC_AG); }
static void spoil_block(struct meta_hdr *h) { h->block = put64(1); }
static void spoil_uuid(struct meta_hdr *h) { h->uuid[15] ^= 1; }
static void spoil_owner(struct meta_hdr *h) { h->owner = put64(1); }
static void spoil_body(struct meta_hdr *h) { ((char *)h)[4095] ^= 1; }
static void spoil_crc_field(struct meta_hdr *h) { h->crc.v ^= 1; }

static void damaged_block_is_named(void **state)
{
	static const struct {
		void (*spoil)(struct meta_hdr *h);
		bool seal;
		int err;
		const char *name;
	} cases[] = {
		{spoil_nothing, false, 0, NULL},
		{spoil_magic, true, -ERR_META_MAGIC, "ERR_META_MAGIC"},
		{spoil_block, true, -ERR_META_BLOCKNO, "ERR_META_BLOCKNO"},
		{spoil_uuid, true, -ERR_META_UUID, "ERR_META_UUID"},
		{spoil_owner, true, -ERR_META_OWNER, "ERR_META_OWNER"},
		{spoil_body, false, -ERR_META_CRC, "ERR_META_CRC"},
		{spoil_crc_field, false, -ERR_META_CRC, "ERR_META_CRC"},
	};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		char line[256], block[32];
		bool said = false;
		struct buf *b;

		while (log_next(line, sizeof(line)))
			;
		write_raw(i, cases[i].spoil, cases[i].seal);
		assert_int_equal(buf_get(fs, BARE_FIRST + i, &bare_type, BARE_OWNER, &b), cases[i].err);
		if (!cases[i].err) {
			buf_put(b);
			assert_false(fs_is_shutdown(fs));
			continue;
		}
		assert_true(fs_is_shutdown(fs));
		snprintf(block, sizeof(block), "block %u", BARE_FIRST + i);
		while (log_next(line, sizeof(line)))
			said = said || (strstr(line, block) && strstr(line, cases[i].name));
		assert_true(said);
	}
	/* What is good stays readable. */
	buf_put(get(0));
}

static void wrong_expectations_of_a_cached_block(void **state)
{
	static const struct buf_type other = {"other", MAGIC_NODE, NULL};
	struct buf *b;
	xid_t xid;

	assert_int_equal(bare_write(fs, 0, 1, 7, true, &xid), 0);
	assert_int_equal(buf_get(fs, BARE_FIRST, &bare_type, BARE_OWNER + 1, &b), -ERR_META_OWNER);
	assert_int_equal(buf_get(fs, BARE_FIRST, &other, BARE_OWNER, &b), -ERR_META_MAGIC);
	assert_int_equal(buf_get(fs, fs->super.total_blocks, &bare_type, BARE_OWNER, &b), -ERR_META_RANGE);
	assert_int_equal(bare_read(fs, 0), 7);
}

static void failed_read_is_not_cached(void **state)
{
	struct buf *b;

	write_raw(0, spoil_nothing, false);
	sim_fail(sim, IO_READ, (uint64_t)BARE_FIRST << BLOCK_SHIFT, BLOCK_SIZE, 1);
	assert_int_equal(buf_get(fs, BARE_FIRST, &bare_type, BARE_OWNER, &b), -ERR_DEV_READ);
	buf_put(get(0));
}

static void cache_stays_within_its_limit(void **state)
{
	struct buf_stats st;
	xid_t xid;

	for (unsigned i = 0; i < 1000; i += 100)
		assert_int_equal(bare_write(fs, i, 100, i, true, &xid), 0);
	assert_int_equal(bare_close(fs), 0);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	struct buf *pinned = get(500);
	for (unsigned round = 0; round < 3; round++)
		for (unsigned i = 0; i < 1000; i++)
			assert_int_equal(bare_read(fs, i), i / 100 * 100);
	buf_get_stats(fs, &st);
	assert_int_equal(st.bufs, 256); /* 1 MiB */
	assert_true(st.evictions > 2000);
	assert_int_equal(st.dirty + st.logged, 0);
	/* A pinned one stays. */
	struct buf *again = get(500);
	assert_ptr_equal(again, pinned);
	buf_put(again);
	buf_put(pinned);
}

static void *read_all(void *arg)
{
	for (unsigned i = 0; i < 1000; i++)
		xassert(bare_read(fs, i) == i / 100 * 100);
	return NULL;
}

static void readers_fault_in_together(void **state)
{
	pthread_t threads[4];
	xid_t xid;

	for (unsigned i = 0; i < 1000; i += 100)
		assert_int_equal(bare_write(fs, i, 100, i, true, &xid), 0);
	assert_int_equal(bare_close(fs), 0);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, read_all, NULL), 0);
	for (unsigned i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		CASE(cancel_restores_contents_and_states),
		CASE(cancel_brings_back_a_forgotten_block),
		CASE(forgotten_block_leaves_the_cache_at_commit),
		CASE(saved_memory_and_hooks_follow_the_outcome),
		CASE(reservation_is_extended),
		CASE(refusals),
		CASE(damaged_block_is_named),
		CASE(wrong_expectations_of_a_cached_block),
		CASE(failed_read_is_not_cached),
		CASE(cache_stays_within_its_limit),
		CASE(readers_fault_in_together),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
