/* SPDX-License-Identifier: MIT
 *
 * test_journal.c - the journal without crashes: groups, waiters, space, failures, damage. What a
 * loss of power leaves is tested in test_journal_crash.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <pthread.h>

#include "bare_fs.h"
#include "journal_impl.h"
#include "log.h"

static void pause_ms(unsigned ms)
{
	struct timespec ts = {ms / 1000, (long)(ms % 1000) * 1000000};

	nanosleep(&ts, NULL);
}

static void wait_checkpointed(struct fs *fs, xid_t xid)
{
	jrn_kick_checkpoint(fs);
	for (unsigned i = 0; jrn_checkpointed(fs) < xid && i < 5000; i++)
		pause_ms(1);
	assert_true(jrn_checkpointed(fs) >= xid);
}

static struct jrn_stats stats_of(struct fs *fs)
{
	struct jrn_stats st;

	jrn_get_stats(fs, &st);
	return st;
}

static void committed_is_there_after_reopening(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 10, 100, true, &xid), 0);
	assert_int_equal(xid, 1);
	assert_int_equal(jrn_durable(fs), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(jrn_durable(fs), 1);
	assert_int_equal(bare_write(fs, 3, 1, 200, false, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(bare_write(fs, 4, 1, 300, false, &xid), 0); /* not durable */
	bare_abandon(fs);
	sim_restart(sim, 5);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 0), 100);
	assert_int_equal(bare_read(fs, 3), 200);
	assert_int_equal(bare_read(fs, 4), 100);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

static void clean_close_leaves_an_empty_log(void **state)
{
	struct sim *sim = bare_sim(1);
	struct jrn_replay_report report;
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 10, 100, true, &xid), 0);
	assert_int_equal(bare_close(fs), 0);

	fs = calloc(1, sizeof(*fs));
	assert_int_equal(sim_device(sim, &fs->dev), 0);
	assert_int_equal(super_read(fs->dev, &fs->super), 0);
	fs->read_only = true;
	assert_int_equal(jrn_open(fs, &report), 0);
	assert_true(report.clean);
	jrn_close(fs);
	dev_close(fs->dev);
	free(fs);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 9), 100);
	bare_abandon(fs);
	sim_destroy(sim);
}

static void read_only_open_refuses_a_log_with_records(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 1, 1, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	bare_abandon(fs);
	fs = calloc(1, sizeof(*fs));
	assert_int_equal(sim_device(sim, &fs->dev), 0);
	assert_int_equal(super_read(fs->dev, &fs->super), 0);
	fs->read_only = true;
	assert_int_equal(jrn_open(fs, NULL), -EROFS);
	dev_close(fs->dev);
	free(fs);
	sim_destroy(sim);
}

static void timer_commits_and_idle_thread_sleeps(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	uint64_t events;
	xid_t xid;

	assert_int_equal(bare_open(sim, 20, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 1, 1, true, &xid), 0);
	for (unsigned i = 0; jrn_durable(fs) < xid && i < 3000; i++)
		pause_ms(1);
	assert_int_equal(jrn_durable(fs), xid);
	events = sim_events(sim);
	pause_ms(100);
	assert_int_equal(sim_events(sim), events);
	bare_abandon(fs);
	sim_destroy(sim);
}

static void flush_is_spared_when_nothing_was_written(void **state)
{
	struct sim *sim = bare_sim(1);
	char *page = io_alloc(BLOCK_SIZE);
	struct fs *fs;
	uint64_t events;

	memset(page, 7, BLOCK_SIZE);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(jrn_force_blocking(fs, 0), 0);
	events = sim_events(sim);
	assert_int_equal(jrn_force_blocking(fs, 0), 0);
	assert_int_equal(sim_events(sim), events);
	assert_int_equal(dev_write(fs->dev, 6000ull << BLOCK_SHIFT, page, BLOCK_SIZE, 0), 0);
	assert_int_equal(jrn_force_blocking(fs, 0), 0);
	assert_int_equal(sim_events(sim), events + 2);
	/* Written past this process. */
	assert_int_equal(sim_poke(sim, 6001ull << BLOCK_SHIFT, page, BLOCK_SIZE), 0);
	jrn_note_foreign_write(fs);
	assert_int_equal(jrn_force_blocking(fs, 0), 0);
	assert_int_equal(sim_events(sim), events + 4);
	bare_abandon(fs);
	io_free(page);
	sim_destroy(sim);
}

static void empty_group_can_be_forced(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	/* Many more than the log has blocks: the tail must follow. */
	for (xid_t xid = 1; xid <= 1500; xid++)
		assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(jrn_durable(fs), 1500);
	bare_abandon(fs);
	sim_restart(sim, 1);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(jrn_durable(fs), 1500);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

struct parked {
	struct op op;
	struct jrn_waiter w;
	unsigned resumed;
};

static void on_resume(struct op *op)
{
	container_of(op, struct parked, op)->resumed++;
}

static void parked_operations_resume(void **state)
{
	struct sim *sim = bare_sim(1);
	struct ioctx *ctx;
	struct parked a = {.op.resume = on_resume}, b = a;
	struct fs *fs;
	xid_t xid;
	int second;

	assert_int_equal(ioctx_create(8, &ctx), 0);
	a.op.ctx = b.op.ctx = ctx;
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 1, 1, true, &xid), 0);
	a.w = (struct jrn_waiter){.op = &a.op, .xid = xid};
	b.w = (struct jrn_waiter){.op = &b.op, .xid = xid};
	assert_int_equal(jrn_force(fs, &a.w), ERR_PARKED);
	second = jrn_force(fs, &b.w);
	assert_true(second == ERR_PARKED || second == 0);
	while (!a.resumed || (second && !b.resumed))
		assert_true(ioctx_run(ctx, true) >= 0);
	assert_int_equal(a.resumed, 1);
	assert_int_equal(a.w.err, 0);
	assert_int_equal(jrn_durable(fs), xid);
	/* Durable already: not parked. */
	assert_int_equal(jrn_force(fs, &a.w), 0);
	/* A waiter that is not parked cannot be taken back. */
	assert_false(jrn_cancel(fs, &a.w));
	bare_abandon(fs);
	ioctx_destroy(ctx);
	sim_destroy(sim);
}

/* Who may lead commits by itself: nobody is woken, nothing is parked; but not on a slow device, not a big group, not out
 * of turn. */
static void leader_commits_in_its_own_thread(void **state)
{
	struct sim *sim = bare_sim(1);
	struct ioctx *ctx;
	struct parked a = {.op.resume = on_resume};
	struct jrn_stats st;
	struct fs *fs;
	xid_t xid;

	assert_int_equal(ioctx_create(8, &ctx), 0);
	a.op.ctx = ctx;
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 0; i < 10; i++) {
		assert_int_equal(bare_write(fs, 0, 3, i, i == 0, &xid), 0);
		a.w = (struct jrn_waiter){.op = &a.op, .xid = xid, .lead = true};
		assert_int_equal(jrn_force(fs, &a.w), 0);
		assert_int_equal(jrn_durable(fs), xid);
	}
	st = stats_of(fs);
	assert_int_equal(st.led, 10);
	assert_int_equal(st.commits, 10);

	assert_int_equal(bare_write(fs, 10, LEAD_IMAGES + 1, 1, true, &xid), 0);
	a.w = (struct jrn_waiter){.op = &a.op, .xid = xid, .lead = true};
	assert_int_equal(jrn_force(fs, &a.w), ERR_PARKED);
	while (!a.resumed)
		assert_true(ioctx_run(ctx, true) >= 0);
	assert_int_equal(bare_write(fs, 0, 1, 77, false, &xid), 0);
	atomic_store(&fs->jrn->flush_ns, LEAD_FLUSH_NS);
	a.w = (struct jrn_waiter){.op = &a.op, .xid = xid, .lead = true};
	assert_int_equal(jrn_force(fs, &a.w), ERR_PARKED);
	while (a.resumed < 2)
		assert_true(ioctx_run(ctx, true) >= 0);
	assert_int_equal(a.w.err, 0);
	assert_int_equal(stats_of(fs).led, 10);
	assert_int_equal(bare_close(fs), 0);
	ioctx_destroy(ctx);
	sim_destroy(sim);
}

/* What a leader finds that fails is told to it, and to those who come later. */
static void leader_is_told_of_a_failed_write(void **state)
{
	struct sim *sim = bare_sim(1);
	struct jrn_waiter w = {.lead = true};
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 1, 1, true, &xid), 0);
	sim_fail(sim, IO_WRITE, 0, UINT64_MAX, 1);
	w.xid = xid;
	assert_int_equal(jrn_force(fs, &w), -ERR_JOURNAL_WRITE);
	assert_true(fs_is_shutdown(fs));
	assert_int_equal(jrn_force(fs, &w), -ERR_JOURNAL_WRITE);
	assert_int_equal(jrn_durable(fs), xid - 1);
	assert_int_equal(bare_close(fs), -ERR_JOURNAL_WRITE);
	sim_destroy(sim);
}

static void full_log_goes_on(void **state)
{
	struct sim *sim = bare_sim(1);
	struct jrn_stats st;
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 0; i < 1300; i += 325)
		assert_int_equal(bare_write(fs, i, 325, 0, true, &xid), 0);
	for (unsigned round = 0; round < 40; round++)
		assert_int_equal(bare_write(fs, round % 3 * 400, 500, round, false, &xid), 0);
	st = stats_of(fs);
	assert_true(st.waits_for_space > 10);
	assert_true(st.images >= 39 * 500);
	assert_true(jrn_durable(fs) >= 39);
	assert_int_equal(bare_close(fs), 0);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 0), 39);
	assert_int_equal(bare_read(fs, 499), 39);
	assert_int_equal(bare_read(fs, 500), 37);
	assert_int_equal(bare_read(fs, 799), 37);
	assert_int_equal(bare_read(fs, 900), 38);
	assert_int_equal(bare_read(fs, 1299), 38);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

/* A block that is changed by every group holds the tail only until the next commit. */
static void hot_block_does_not_hold_the_tail(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 1, 1, true, &xid), 0);
	for (unsigned round = 0; round < 3000; round++) {
		assert_int_equal(bare_write(fs, 0, 1, round, false, &xid), 0);
		if (round % 3 == 0)
			assert_int_equal(jrn_force_blocking(fs, xid), 0);
		if (round % 100 == 0)
			jrn_kick_checkpoint(fs);
	}
	wait_checkpointed(fs, xid);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

static void failed_record_write_shuts_down(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	struct trans t;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 2, 1, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(bare_write(fs, 0, 1, 2, false, &xid), 0);
	sim_fail(sim, IO_WRITE, (uint64_t)JOURNAL_START_BLOCK << BLOCK_SHIFT, 1024u << BLOCK_SHIFT,
		 1);
	assert_int_equal(jrn_force_blocking(fs, xid), -ERR_JOURNAL_WRITE);
	assert_true(fs_is_shutdown(fs));
	assert_int_equal(trans_begin(fs, &t, 1), -ERR_SHUTDOWN);
	assert_int_equal(jrn_force_blocking(fs, xid), -ERR_JOURNAL_WRITE);
	assert_int_equal(jrn_wait_space_blocking(fs), -ERR_JOURNAL_WRITE);
	assert_int_equal(bare_read(fs, 0), 2); /* reads go on */
	assert_int_equal(bare_close(fs), -ERR_JOURNAL_WRITE);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 0), 1);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

static void failed_flush_shuts_down(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	jrn_note_foreign_write(fs);
	assert_int_equal(bare_write(fs, 0, 2, 1, true, &xid), 0);
	sim_fail(sim, IO_FLUSH, 0, UINT64_MAX, 1);
	assert_int_equal(jrn_force_blocking(fs, xid), -ERR_DEV_FLUSH);
	assert_int_equal(jrn_durable(fs), 0);
	assert_int_equal(bare_close(fs), -ERR_DEV_FLUSH);
	sim_destroy(sim);
}

static void failed_home_write_keeps_the_log(void **state)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 8, 1, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	sim_fail(sim, IO_WRITE, (uint64_t)BARE_FIRST << BLOCK_SHIFT, 8 * BLOCK_SIZE, 1);
	assert_int_equal(bare_close(fs), -ERR_DEV_WRITE);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 0; i < 8; i++)
		assert_int_equal(bare_read(fs, i), 1);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

static int refuse_all(const struct fs *fs, const void *block)
{
	return -ERR_RECORD_SHAPE;
}

static void block_that_does_not_verify_is_not_logged(void **state)
{
	static const struct buf_type refused = {"refused block", MAGIC_NODE, refuse_all};
	struct sim *sim = bare_sim(1);
	uint64_t events;
	struct trans t;
	struct buf *b;
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(trans_begin(fs, &t, 1), 0);
	assert_int_equal(buf_new(&t, BARE_FIRST, &refused, 0, &b), 0);
	buf_put(b);
	xid = trans_commit(&t);
	events = sim_events(sim);
	assert_int_equal(jrn_force_blocking(fs, xid), -ERR_RECORD_SHAPE);
	assert_int_equal(sim_events(sim), events);
	assert_true(fs_is_shutdown(fs));
	bare_abandon(fs);
	sim_destroy(sim);
}

/* Damage elsewhere ends all changes, but not the durability of those that were whole. */
static void shutdown_by_others_keeps_committed_groups(void **state)
{
	struct sim *sim = bare_sim(1);
	struct trans t;
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_write(fs, 0, 2, 1, true, &xid), 0);
	fs_shutdown_writes(fs, -ERR_META_CRC, "test");
	assert_int_equal(trans_begin(fs, &t, 1), -ERR_SHUTDOWN);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	assert_int_equal(bare_close(fs), 0);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 1), 1);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

/* ---- damage ---- */

static void spoil(struct sim *sim, fsblock_t block, unsigned at)
{
	uint8_t byte;

	assert_int_equal(sim_peek(sim, (block << BLOCK_SHIFT) + at, &byte, 1), 0);
	byte ^= 0x40;
	assert_int_equal(sim_poke(sim, (block << BLOCK_SHIFT) + at, &byte, 1), 0);
}

/* Three records of a descriptor and an image each, from the log's first position. */
static struct sim *three_records(void)
{
	struct sim *sim = bare_sim(1);
	struct fs *fs;
	xid_t xid;

	bare_set_log_position(sim, 1022);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 1; i <= 3; i++) {
		assert_int_equal(bare_write(fs, 0, 1, i, i == 1, &xid), 0);
		assert_int_equal(jrn_force_blocking(fs, xid), 0);
	}
	bare_abandon(fs);
	return sim;
}

#define LOG_BLOCK(n) (JOURNAL_START_BLOCK + 2 + (n))

static void torn_last_record_is_not_there(void **state)
{
	for (unsigned block = 4; block < 6; block++) {
		struct sim *sim = three_records();
		struct fs *fs;

		spoil(sim, LOG_BLOCK(block), 700);
		assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
		assert_int_equal(bare_read(fs, 0), 2);
		assert_int_equal(bare_close(fs), 0);
		sim_destroy(sim);
	}
}

/* What replay did not take never comes back, even when its missing piece does. */
static void position_is_used_once(void **state)
{
	struct sim *sim = three_records();
	struct fs *fs;

	spoil(sim, LOG_BLOCK(5), 700);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	bare_abandon(fs);
	spoil(sim, LOG_BLOCK(5), 700);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 0), 2);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

static void damage_before_a_whole_record_is_reported(void **state)
{
	for (unsigned block = 0; block < 4; block++) {
		struct sim *sim = three_records();
		struct fs *fs;

		spoil(sim, LOG_BLOCK(block), 700);
		assert_int_equal(bare_open(sim, 0, 0, &fs), -ERR_JOURNAL_CORRUPT);
		spoil(sim, LOG_BLOCK(block), 700); /* nothing was changed by the attempt */
		assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
		assert_int_equal(bare_read(fs, 0), 3);
		assert_int_equal(bare_close(fs), 0);
		sim_destroy(sim);
	}
}

/* Either copy says where the log goes on: after a replay the older one would name records that this
 * mount's own records do not continue. */
static void header_lost_right_after_a_mount_loses_nothing(void **state)
{
	for (unsigned slot = 0; slot < 2; slot++) {
		struct sim *sim = three_records();
		struct fs *fs;
		xid_t xid;

		assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
		assert_int_equal(bare_write(fs, 0, 1, 4, false, &xid), 0);
		assert_int_equal(jrn_force_blocking(fs, xid), 0);
		bare_abandon(fs);
		spoil(sim, JOURNAL_START_BLOCK + slot, 60);
		assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
		assert_int_equal(bare_read(fs, 0), 4);
		assert_int_equal(bare_close(fs), 0);
		sim_destroy(sim);
	}
}

static void lost_newest_header_is_made_up_for(void **state)
{
	struct sim *sim = three_records();
	const uint64_t place = (uint64_t)BARE_FIRST << BLOCK_SHIFT;
	char *page = io_alloc(BLOCK_SIZE);
	struct jrn_stats st;
	struct fs *fs;
	xid_t xid;

	assert_int_equal(bare_open(sim, 0, 0, &fs), 0); /* header seq 4 and 5 */
	assert_int_equal(bare_write(fs, 0, 1, 4, false, &xid), 0);
	wait_checkpointed(fs, xid); /* header seq 6, slot 0 */
	st = stats_of(fs);
	assert_int_equal(st.log_used, 0);
	/* Its place may become data now; and a later record tells the tail of its time. */
	memset(page, 0x55, BLOCK_SIZE);
	assert_int_equal(dev_write(fs->dev, place, page, BLOCK_SIZE, 0), 0);
	assert_int_equal(bare_write(fs, 1, 1, 5, true, &xid), 0);
	assert_int_equal(jrn_force_blocking(fs, xid), 0);
	bare_abandon(fs);

	spoil(sim, JOURNAL_START_BLOCK, 60);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	assert_int_equal(bare_read(fs, 1), 5);
	assert_int_equal(dev_read(fs->dev, place, page, BLOCK_SIZE), 0);
	assert_int_equal(page[0], 0x55);
	assert_int_equal(page[4095], 0x55);
	bare_abandon(fs);

	spoil(sim, JOURNAL_START_BLOCK, 60);
	spoil(sim, JOURNAL_START_BLOCK + 1, 60);
	assert_int_equal(bare_open(sim, 0, 0, &fs), -ERR_JOURNAL_CORRUPT);
	io_free(page);
	sim_destroy(sim);
}

/* ---- threads ---- */

struct worker {
	struct fs *fs;
	unsigned first;
	pthread_t thread;
	unsigned rounds;
};

static void *work(void *arg)
{
	struct worker *w = arg;
	xid_t xid;

	xassert(bare_write(w->fs, w->first, 7, 0, true, &xid) == 0);
	for (unsigned i = 1; i <= w->rounds; i++) {
		xassert(bare_write(w->fs, w->first, 1 + i % 7, i, false, &xid) == 0);
		if (i % 3 == 0)
			xassert(jrn_force_blocking(w->fs, xid) == 0);
		if (i % 5 == 0)
			xassert(jrn_force_blocking(w->fs, 0) == 0);
		if (i % 50 == 0)
			jrn_kick_checkpoint(w->fs);
		xassert(bare_read(w->fs, w->first) == i);
	}
	return NULL;
}

static void threads_share_groups(void **state)
{
	struct sim *sim = bare_sim(1);
	struct worker workers[4];
	struct fs *fs;

	sim_shuffle(sim, true);
	assert_int_equal(bare_open(sim, 1, 0, &fs), 0);
	for (unsigned i = 0; i < 4; i++) {
		workers[i] = (struct worker){.fs = fs, .first = i * 10, .rounds = 400};
		assert_int_equal(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(workers[i].thread, NULL);
	assert_int_equal(bare_close(fs), 0);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(bare_read(fs, i * 10), 400);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
}

static void *work_much(void *arg)
{
	struct worker *w = arg;
	xid_t xid;

	for (unsigned i = 1; i <= w->rounds; i++) {
		unsigned first = w->first + i % 2 * 120;

		xassert(bare_write(w->fs, first, 120, i, i <= 2, &xid) == 0);
		if (i % 20 == 0)
			xassert(jrn_force_blocking(w->fs, xid) == 0);
		xassert(bare_read(w->fs, first + 119) == i);
	}
	return NULL;
}

/* How often one of them had to wait for room. */
static uint64_t four_fill_the_log(void)
{
	struct sim *sim = bare_sim(1);
	struct worker workers[4];
	struct jrn_stats st;
	struct fs *fs;

	assert_int_equal(bare_open(sim, 1, 0, &fs), 0);
	for (unsigned i = 0; i < 4; i++) {
		/* They overlap in nothing, but share the log and the cache. */
		workers[i] = (struct worker){.fs = fs, .first = i * 240, .rounds = 100};
		assert_int_equal(
			pthread_create(&workers[i].thread, NULL, work_much, &workers[i]), 0);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(workers[i].thread, NULL);
	st = stats_of(fs);
	assert_true(st.checkpoints > 10);
	assert_int_equal(bare_close(fs), 0);
	assert_int_equal(bare_open(sim, 0, 0, &fs), 0);
	for (unsigned i = 0; i < 960; i++)
		assert_int_equal(bare_read(fs, i), 100 - i / 120 % 2);
	assert_int_equal(bare_close(fs), 0);
	sim_destroy(sim);
	return st.waits_for_space;
}

/* Nobody starves, and nothing dead-ends, when four fill the log at once. Whether anybody has to wait is up to the scheduler:
 * a journal thread that runs as soon as it is woken makes room before the other asks. */
static void threads_share_a_full_log(void **state)
{
	uint64_t waits = 0;

	for (unsigned i = 0; i < 10 && !waits; i++)
		waits = four_fill_the_log();
	assert_true(waits > 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(committed_is_there_after_reopening),
		cmocka_unit_test(clean_close_leaves_an_empty_log),
		cmocka_unit_test(read_only_open_refuses_a_log_with_records),
		cmocka_unit_test(timer_commits_and_idle_thread_sleeps),
		cmocka_unit_test(flush_is_spared_when_nothing_was_written),
		cmocka_unit_test(empty_group_can_be_forced),
		cmocka_unit_test(parked_operations_resume),
		cmocka_unit_test(leader_commits_in_its_own_thread),
		cmocka_unit_test(leader_is_told_of_a_failed_write),
		cmocka_unit_test(full_log_goes_on),
		cmocka_unit_test(hot_block_does_not_hold_the_tail),
		cmocka_unit_test(failed_record_write_shuts_down),
		cmocka_unit_test(failed_flush_shuts_down),
		cmocka_unit_test(failed_home_write_keeps_the_log),
		cmocka_unit_test(block_that_does_not_verify_is_not_logged),
		cmocka_unit_test(shutdown_by_others_keeps_committed_groups),
		cmocka_unit_test(torn_last_record_is_not_there),
		cmocka_unit_test(position_is_used_once),
		cmocka_unit_test(damage_before_a_whole_record_is_reported),
		cmocka_unit_test(header_lost_right_after_a_mount_loses_nothing),
		cmocka_unit_test(lost_newest_header_is_made_up_for),
		cmocka_unit_test(threads_share_groups),
		cmocka_unit_test(threads_share_a_full_log),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
