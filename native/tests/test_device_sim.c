/* SPDX-License-Identifier: MIT
 *
 * test_device_sim.c - what the simulated device promises: the power-loss tests are worth no more than this.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>
#include <pthread.h>

#include "device_sim.h"

#define SIZE (64 * BLOCK_SIZE)
#define SEEDS 400u

/* One sim, its handle, and aligned memory. */
struct bench {
	struct sim *sim;
	struct device *dev;
	struct ioctx *ctx;
	uint8_t *a, *b;
};

static int set_up(void **state)
{
	struct bench *t = calloc(1, sizeof(*t));

	assert_non_null(t);
	assert_int_equal(sim_create(SIZE, 512, 1, &t->sim), 0);
	assert_int_equal(sim_device(t->sim, &t->dev), 0);
	assert_int_equal(ioctx_create(8, &t->ctx), 0);
	t->a = io_alloc(4 * BLOCK_SIZE);
	t->b = io_alloc(4 * BLOCK_SIZE);
	assert_true(t->a && t->b);
	*state = t;
	return 0;
}

static int tear_down(void **state)
{
	struct bench *t = *state;

	io_free(t->a);
	io_free(t->b);
	ioctx_destroy(t->ctx);
	if (t->dev)
		dev_close(t->dev);
	sim_destroy(t->sim);
	free(t);
	return 0;
}

static int write_byte(struct bench *t, uint64_t offset, size_t len, uint8_t byte, unsigned flags)
{
	memset(t->a, byte, len);
	return dev_write(t->dev, offset, t->a, len, flags);
}

/* The byte that all of [offset, offset + len) holds; -1: more than one. */
static int byte_at(struct sim *sim, uint64_t offset, size_t len)
{
	uint8_t buf[2 * BLOCK_SIZE];

	assert_true(len <= sizeof(buf));
	assert_int_equal(sim_peek(sim, offset, buf, len), 0);
	for (size_t i = 1; i < len; i++)
		if (buf[i] != buf[0])
			return -1;
	return buf[0];
}

/* The sim as it would be after a power cut now. */
static struct sim *after_cut(struct sim *sim, uint64_t seed)
{
	struct sim *copy;

	assert_int_equal(sim_clone(sim, &copy), 0);
	sim_restart(copy, seed);
	return copy;
}

/* How often, over all seeds, the range holds this byte after a cut now. */
static unsigned survivals(struct sim *sim, uint64_t offset, size_t len, int byte)
{
	unsigned n = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct sim *cut = after_cut(sim, seed);

		n += byte_at(cut, offset, len) == byte;
		sim_destroy(cut);
	}
	return n;
}

static void unwritten_reads_as_canary(void **state)
{
	struct bench *t = *state;
	uint64_t *words = (uint64_t *)t->b;

	assert_int_equal(dev_read(t->dev, 5 * BLOCK_SIZE, t->b, BLOCK_SIZE), 0);
	for (unsigned i = 0; i < BLOCK_SIZE / 8; i += 2) {
		assert_true(words[i] == SIM_CANARY);
		assert_true(words[i + 1] == 5);
	}
	assert_true(sim_shows_canary(t->b, BLOCK_SIZE));
	/* A written sector leaves its neighbours unwritten. */
	assert_int_equal(write_byte(t, 5 * BLOCK_SIZE + 512, 512, 0x11, 0), 0);
	assert_int_equal(dev_read(t->dev, 5 * BLOCK_SIZE, t->b, BLOCK_SIZE), 0);
	assert_true(sim_shows_canary(t->b, 512));
	assert_false(sim_shows_canary(t->b + 512, 512));
	assert_true(sim_shows_canary(t->b + 1024, BLOCK_SIZE - 1024));
}

static void reads_see_writes(void **state)
{
	struct bench *t = *state;

	assert_int_equal(write_byte(t, 512 * 5, 512 * 20, 1, 0), 0);
	assert_int_equal(write_byte(t, 512 * 7, 512, 2, 0), 0);
	assert_int_equal(byte_at(t->sim, 512 * 5, 1024), 1);
	assert_int_equal(byte_at(t->sim, 512 * 7, 512), 2);
	assert_int_equal(byte_at(t->sim, 512 * 8, 8192), 1);
	assert_int_equal(dev_read(t->dev, 512 * 7, t->b, 1024), 0);
	assert_int_equal(t->b[0], 2);
	assert_int_equal(t->b[512], 1);
	assert_int_equal(t->dev->stat_writes, 2);
	assert_int_equal(t->dev->stat_reads, 1);
}

static void held_write_is_kept_dropped_or_torn(void **state)
{
	struct bench *t = *state;
	unsigned kept = 0, dropped = 0, torn = 0;

	assert_int_equal(write_byte(t, 0, 2 * BLOCK_SIZE, 1, 0), 0);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(write_byte(t, 0, 2 * BLOCK_SIZE, 2, 0), 0);
	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct sim *cut = after_cut(t->sim, seed);
		int all = byte_at(cut, 0, 2 * BLOCK_SIZE);

		kept += all == 2;
		dropped += all == 1;
		torn += all == -1;
		for (unsigned s = 0; s < 16; s++)
			assert_in_range(byte_at(cut, s * 512, 512), 1, 2);
		sim_destroy(cut);
	}
	assert_true(kept > SEEDS / 10 && dropped > SEEDS / 10 && torn > SEEDS / 10);
}

static void flushed_write_survives(void **state)
{
	struct bench *t = *state;

	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, 0), 0);
	assert_true(survivals(t->sim, 0, BLOCK_SIZE, 1) < SEEDS);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(write_byte(t, BLOCK_SIZE, BLOCK_SIZE, 2, 0), 0);
	assert_int_equal(survivals(t->sim, 0, BLOCK_SIZE, 1), SEEDS);
	assert_true(survivals(t->sim, BLOCK_SIZE, BLOCK_SIZE, 2) < SEEDS);
}

/* Fates are independent: a later held write may be kept where an earlier one is dropped, and the other way round. */
static void held_writes_have_no_order(void **state)
{
	struct bench *t = *state;
	unsigned seen[4] = {0};

	assert_int_equal(write_byte(t, 0, 1024, 9, IO_FUA), 0);
	assert_int_equal(write_byte(t, 0, 512, 1, 0), 0);
	assert_int_equal(write_byte(t, 512, 512, 2, 0), 0);
	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct sim *cut = after_cut(t->sim, seed);

		seen[(byte_at(cut, 0, 512) == 1) + 2 * (byte_at(cut, 512, 512) == 2)]++;
		sim_destroy(cut);
	}
	assert_true(seen[0] && seen[1] && seen[2] && seen[3]);
	/* Of two writes to one place either may be what is left. */
	assert_int_equal(write_byte(t, 0, 512, 3, 0), 0);
	assert_true(survivals(t->sim, 0, 512, 9) && survivals(t->sim, 0, 512, 1) &&
		    survivals(t->sim, 0, 512, 3));
}

static void fua_covers_itself_only(void **state)
{
	struct bench *t = *state;
	uint64_t done = t->dev->writes_done, flushed = t->dev->flushed_upto;

	assert_int_equal(write_byte(t, BLOCK_SIZE, BLOCK_SIZE, 1, 0), 0);
	assert_int_equal(write_byte(t, 2 * BLOCK_SIZE, BLOCK_SIZE, 2, IO_FUA), 0);
	assert_int_equal(survivals(t->sim, 2 * BLOCK_SIZE, BLOCK_SIZE, 2), SEEDS);
	assert_true(survivals(t->sim, BLOCK_SIZE, BLOCK_SIZE, 1) < SEEDS);
	assert_int_equal(t->dev->writes_done, done + 1);
	assert_int_equal(t->dev->flushed_upto, flushed);
}

/* Once durable, a sector never goes back to what an older held write would put there. */
static void fua_outlives_older_held_write(void **state)
{
	struct bench *t = *state;

	assert_int_equal(write_byte(t, 0, 2 * BLOCK_SIZE, 1, 0), 0);
	assert_int_equal(write_byte(t, 512, 1024, 2, IO_FUA), 0);
	assert_int_equal(survivals(t->sim, 512, 1024, 2), SEEDS);
	assert_true(survivals(t->sim, 0, 512, 1) > 0);
	/* A newer one may replace it, as any write. */
	assert_int_equal(write_byte(t, 512, 512, 3, 0), 0);
	assert_true(survivals(t->sim, 512, 512, 3) > 0);
	assert_int_equal(survivals(t->sim, 512, 512, 3) + survivals(t->sim, 512, 512, 2), SEEDS);
}

/* ---- asynchronous I/O ----------------------------------------------------------------------------- */

struct request {
	struct dev_io io;
	unsigned order; /* of completion, from 1 */
};

static unsigned completions;

static void completed(struct dev_io *io)
{
	container_of(io, struct request, io)->order = ++completions;
}

static void submit(struct bench *t, struct request *r, enum io_kind kind, uint64_t offset, void *buf,
		   size_t len, unsigned flags)
{
	*r = (struct request){.io = {.kind = kind, .flags = flags, .offset = offset, .buf = buf,
				     .len = len, .done = completed}};
	dev_submit(t->dev, t->ctx, &r->io);
	assert_int_equal(r->order, 0);
}

static void submit_byte(struct bench *t, struct request *r, uint64_t offset, size_t len, uint8_t byte,
			unsigned flags)
{
	memset(t->a, byte, len);
	submit(t, r, IO_WRITE, offset, t->a, len, flags);
}

static void drain(struct bench *t)
{
	while (ioctx_run(t->ctx, false) > 0)
		;
}

/* The heart of the ordering proof: a flush submitted while the write is in flight does not cover it. */
static void flush_does_not_cover_writes_in_flight(void **state)
{
	struct bench *t = *state;
	struct request w, f;
	uint64_t done = t->dev->writes_done;

	submit_byte(t, &w, 0, BLOCK_SIZE, 1, 0);
	submit(t, &f, IO_FLUSH, 0, NULL, 0, 0);
	drain(t);
	assert_true(w.order == 1 && f.order == 2 && w.io.res == 0 && f.io.res == 0);
	assert_int_equal(t->dev->writes_done, done + 1);
	assert_int_equal(t->dev->flushed_upto, done);
	assert_true(survivals(t->sim, 0, BLOCK_SIZE, 1) < SEEDS);
	/* So this is needed, and it covers. */
	assert_int_equal(dev_flush_if_needed(t->dev), 0);
	assert_int_equal(t->dev->flushed_upto, done + 1);
	assert_int_equal(survivals(t->sim, 0, BLOCK_SIZE, 1), SEEDS);
	assert_int_equal(t->dev->stat_flushes, 2);
	assert_int_equal(dev_flush_if_needed(t->dev), 0);
	assert_int_equal(t->dev->stat_flushes, 2);
}

static void flush_covers_what_completed_before_it_began(void **state)
{
	struct bench *t = *state;
	struct request w1, w2, f;

	submit_byte(t, &w1, 0, BLOCK_SIZE, 1, 0);
	drain(t);
	submit(t, &f, IO_FLUSH, 0, NULL, 0, 0);
	submit_byte(t, &w2, BLOCK_SIZE, BLOCK_SIZE, 2, 0);
	/* In flight it guarantees nothing yet. */
	assert_true(survivals(t->sim, 0, BLOCK_SIZE, 1) < SEEDS);
	drain(t);
	assert_int_equal(survivals(t->sim, 0, BLOCK_SIZE, 1), SEEDS);
	assert_true(survivals(t->sim, BLOCK_SIZE, BLOCK_SIZE, 2) < SEEDS);
}

/* An older write in flight does not come back over a newer one that a flush made durable. */
static void flush_outlives_older_write_in_flight(void **state)
{
	struct bench *t = *state;
	struct request w;

	submit_byte(t, &w, 0, BLOCK_SIZE, 1, 0);
	assert_int_equal(write_byte(t, 0, 512, 2, 0), 0);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(survivals(t->sim, 0, 512, 2), SEEDS);
	assert_true(survivals(t->sim, 512, 512, 1) < SEEDS);
	drain(t);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(survivals(t->sim, 0, 512, 2), SEEDS);
	assert_int_equal(survivals(t->sim, 512, BLOCK_SIZE - 512, 1), SEEDS);
}

static void async_fua_is_durable_at_completion(void **state)
{
	struct bench *t = *state;
	struct request w;

	submit_byte(t, &w, 0, BLOCK_SIZE, 1, IO_FUA);
	assert_true(survivals(t->sim, 0, BLOCK_SIZE, 1) < SEEDS);
	drain(t);
	assert_int_equal(survivals(t->sim, 0, BLOCK_SIZE, 1), SEEDS);
}

static void shuffle_changes_the_order_of_completion(void **state)
{
	struct bench *t = *state;
	struct request r[16];
	unsigned in_place[2] = {0, 0};

	for (unsigned shuffle = 0; shuffle < 2; shuffle++) {
		sim_shuffle(t->sim, shuffle);
		completions = 0;
		for (unsigned i = 0; i < 16; i++)
			submit(t, &r[i], IO_READ, i * BLOCK_SIZE, t->a, 512, 0);
		drain(t);
		assert_int_equal(completions, 16);
		for (unsigned i = 0; i < 16; i++)
			in_place[shuffle] += r[i].order == i + 1;
	}
	assert_int_equal(in_place[0], 16);
	assert_in_range(in_place[1], 0, 12);
}

/* ---- power and faults -------------------------------------------------------------------------------- */

static void crash_point_stops_everything(void **state)
{
	struct bench *t = *state;
	unsigned kept = 0, dropped = 0, torn = 0;

	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, 0), 0);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(sim_events(t->sim), 2);
	sim_crash_at(t->sim, 4);
	assert_int_equal(write_byte(t, BLOCK_SIZE, BLOCK_SIZE, 2, IO_FUA), 0);
	assert_false(sim_crashed(t->sim));
	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 3, IO_FUA), -ERR_DEV_WRITE);
	assert_true(sim_crashed(t->sim));
	assert_int_equal(dev_flush(t->dev), -ERR_DEV_FLUSH);
	assert_int_equal(write_byte(t, BLOCK_SIZE, BLOCK_SIZE, 4, 0), -ERR_DEV_WRITE);
	assert_int_equal(dev_read(t->dev, 0, t->b, 512), -ERR_DEV_READ);
	assert_int_equal(sim_peek(t->sim, 0, t->b, 512), -ERR_DEV_READ);
	assert_int_equal(sim_poke(t->sim, 0, t->b, 512), -ERR_DEV_WRITE);
	assert_int_equal(sim_events(t->sim), 4);
	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct sim *cut = after_cut(t->sim, seed);
		int met = byte_at(cut, 0, BLOCK_SIZE);

		kept += met == 3;
		dropped += met == 1;
		torn += met == -1;
		assert_int_equal(byte_at(cut, BLOCK_SIZE, BLOCK_SIZE), 2);
		assert_false(sim_crashed(cut));
		sim_destroy(cut);
	}
	assert_true(kept && dropped && torn);
	dev_close(t->dev);
	sim_restart(t->sim, 7);
	assert_int_equal(sim_device(t->sim, &t->dev), 0);
	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 5, 0), 0);
	assert_int_equal(sim_events(t->sim), 5);
}

static void crash_fails_what_is_in_flight(void **state)
{
	struct bench *t = *state;
	struct request w, f, r;

	assert_int_equal(write_byte(t, BLOCK_SIZE, BLOCK_SIZE, 1, 0), 0);
	sim_crash_at(t->sim, 4);
	submit_byte(t, &w, 0, BLOCK_SIZE, 2, IO_FUA);
	submit(t, &f, IO_FLUSH, 0, NULL, 0, 0);
	submit(t, &r, IO_READ, 0, t->b, 512, 0);
	assert_int_equal(write_byte(t, 2 * BLOCK_SIZE, 512, 3, 0), -ERR_DEV_WRITE);
	drain(t);
	assert_int_equal(w.io.res, -ERR_DEV_WRITE);
	assert_int_equal(f.io.res, -ERR_DEV_FLUSH);
	assert_int_equal(r.io.res, -ERR_DEV_READ);
	assert_in_range(survivals(t->sim, 0, BLOCK_SIZE, 2), 1, SEEDS - 1);
	assert_in_range(survivals(t->sim, BLOCK_SIZE, BLOCK_SIZE, 1), 1, SEEDS - 1);
}

static void failures_are_injected_by_range_and_count(void **state)
{
	struct bench *t = *state;

	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, 0), 0);
	sim_fail(t->sim, IO_WRITE, 512, 512, 2);
	assert_int_equal(write_byte(t, 1024, 512, 2, 0), 0);
	assert_int_equal(write_byte(t, 0, 512, 2, 0), 0);
	assert_int_equal(write_byte(t, 0, 1024, 3, 0), -ERR_DEV_WRITE);
	assert_int_equal(write_byte(t, 512, 512, 3, 0), -ERR_DEV_WRITE);
	assert_int_equal(byte_at(t->sim, 512, 512), 1);
	assert_int_equal(write_byte(t, 512, 512, 4, 0), 0);
	sim_fail(t->sim, IO_READ, 0, 512, 1);
	sim_fail(t->sim, IO_FLUSH, 0, 0, 1);
	assert_int_equal(dev_read(t->dev, 512, t->b, 512), 0);
	assert_int_equal(dev_read(t->dev, 0, t->b, 512), -ERR_DEV_READ);
	assert_int_equal(dev_flush(t->dev), -ERR_DEV_FLUSH);
	/* A failed flush covered nothing, and the next attempt is not saved. */
	assert_true(survivals(t->sim, 512, 512, 4) < SEEDS);
	assert_int_equal(dev_flush_if_needed(t->dev), 0);
	assert_int_equal(survivals(t->sim, 512, 512, 4), SEEDS);
	sim_fail(t->sim, IO_READ, 0, 512, 1000);
	sim_fail(t->sim, IO_READ, 0, 0, 0);
	assert_int_equal(dev_read(t->dev, 0, t->b, 512), 0);
}

static void dropped_flushes_lie(void **state)
{
	struct bench *t = *state;

	sim_drop_flushes(t->sim, 2);
	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, IO_FUA), 0);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(t->dev->flushed_upto, t->dev->writes_done);
	assert_true(survivals(t->sim, 0, BLOCK_SIZE, 1) < SEEDS);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(survivals(t->sim, 0, BLOCK_SIZE, 1), SEEDS);
	sim_drop_flushes(t->sim, UINT64_MAX);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 2, 0), 0);
		assert_int_equal(dev_flush(t->dev), 0);
	}
	assert_true(survivals(t->sim, 0, BLOCK_SIZE, 2) < SEEDS);
}

static void settled_is_durable(void **state)
{
	struct bench *t = *state;
	struct request w;

	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, 0), 0);
	submit_byte(t, &w, BLOCK_SIZE, BLOCK_SIZE, 2, IO_FUA);
	sim_settle(t->sim);
	assert_int_equal(survivals(t->sim, 0, BLOCK_SIZE, 1), SEEDS);
	assert_int_equal(survivals(t->sim, BLOCK_SIZE, BLOCK_SIZE, 2), SEEDS);
	drain(t);
	assert_int_equal(w.io.res, 0);
}

/* ---- clones and direct access --------------------------------------------------------------------------- */

static void clones_are_independent(void **state)
{
	struct bench *t = *state;
	struct sim *copy, *again;
	struct device *dev;

	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, 0), 0);
	assert_int_equal(sim_clone(t->sim, &copy), 0);
	assert_int_equal(sim_device(copy, &dev), 0);
	memset(t->b, 2, 512);
	assert_int_equal(dev_write(dev, 512, t->b, 512, IO_FUA), 0);
	assert_int_equal(write_byte(t, 1024, 512, 3, 0), 0);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(byte_at(t->sim, 0, 1024), 1);
	assert_int_equal(byte_at(t->sim, 1024, 512), 3);
	assert_int_equal(byte_at(copy, 512, 512), 2);
	assert_int_equal(byte_at(copy, 1024, 512), 1);
	assert_int_equal(sim_events(copy), 2);
	assert_int_equal(sim_events(t->sim), 3);
	assert_int_equal(sim_clone(copy, &again), 0);
	dev_close(dev);
	sim_destroy(copy);
	assert_int_equal(byte_at(again, 512, 512), 2);
	sim_destroy(again);
}

static void equal_seeds_give_equal_devices(void **state)
{
	struct bench *t = *state;
	unsigned different = 0;

	for (unsigned i = 0; i < 40; i++)
		assert_int_equal(write_byte(t, (i * 7 % 60) * 1024, 2048, (uint8_t)(i + 1), 0), 0);
	for (uint64_t seed = 0; seed < 50; seed++) {
		struct sim *x = after_cut(t->sim, seed), *y = after_cut(t->sim, seed);
		struct sim *z = after_cut(t->sim, seed + 1);
		uint8_t bx[BLOCK_SIZE], by[BLOCK_SIZE], bz[BLOCK_SIZE];

		for (unsigned i = 0; i < 16; i++) {
			assert_int_equal(sim_peek(x, i * BLOCK_SIZE, bx, sizeof(bx)), 0);
			assert_int_equal(sim_peek(y, i * BLOCK_SIZE, by, sizeof(by)), 0);
			assert_int_equal(sim_peek(z, i * BLOCK_SIZE, bz, sizeof(bz)), 0);
			assert_memory_equal(bx, by, sizeof(bx));
			different += memcmp(bx, bz, sizeof(bx)) != 0;
		}
		sim_destroy(x);
		sim_destroy(y);
		sim_destroy(z);
	}
	assert_true(different > 50);
}

static void poke_goes_through_the_cache_unseen_by_the_device(void **state)
{
	struct bench *t = *state;
	uint64_t done = t->dev->writes_done;
	uint8_t buf[700];

	assert_int_equal(write_byte(t, 0, BLOCK_SIZE, 1, 0), 0);
	memset(buf, 2, sizeof(buf));
	assert_int_equal(sim_poke(t->sim, 100, buf, sizeof(buf)), 0);
	assert_int_equal(byte_at(t->sim, 0, 100), 1);
	assert_int_equal(byte_at(t->sim, 100, 700), 2);
	assert_int_equal(byte_at(t->sim, 800, BLOCK_SIZE - 800), 1);
	assert_int_equal(sim_events(t->sim), 2);
	assert_int_equal(t->dev->writes_done, done + 1);
	assert_true(survivals(t->sim, 100, 700, 2) < SEEDS);
	assert_int_equal(dev_flush(t->dev), 0);
	assert_int_equal(survivals(t->sim, 100, 700, 2), SEEDS);
	assert_int_equal(sim_poke(t->sim, SIZE - 1, buf, 2), -EINVAL);
	assert_int_equal(sim_peek(t->sim, UINT64_MAX, buf, 2), -EINVAL);
	assert_int_equal(sim_poke(t->sim, SIZE - 1, buf, 1), 0);
	assert_int_equal(sim_poke(t->sim, SIZE, buf, 0), 0);
}

static void one_handle_at_a_time(void **state)
{
	struct bench *t = *state;
	struct device *second;

	assert_int_equal(sim_device(t->sim, &second), -ERR_DEV_IN_USE);
	dev_close(t->dev);
	assert_int_equal(sim_device(t->sim, &t->dev), 0);
}

static void out_of_range_is_an_error(void **state)
{
	struct bench *t = *state;
	struct request r;

	assert_int_equal(dev_read(t->dev, SIZE, t->b, 512), -ERR_DEV_READ);
	assert_int_equal(write_byte(t, SIZE - 512, 1024, 1, 0), -ERR_DEV_WRITE);
	submit(t, &r, IO_WRITE, SIZE - 512, t->a, 1024, 0);
	drain(t);
	assert_int_equal(r.io.res, -ERR_DEV_WRITE);
	assert_int_equal(sim_events(t->sim), 0);
}

static void huge_device_costs_what_is_written(void **state)
{
	struct sim *sim;
	struct device *dev;
	uint64_t size = (uint64_t)1 << 60, step = size / 64;
	uint8_t *buf = io_alloc(BLOCK_SIZE);

	assert_int_equal(sim_create(size, 4096, 1, &sim), 0);
	assert_int_equal(sim_device(sim, &dev), 0);
	for (uint64_t i = 0; i < 64; i++) {
		memset(buf, (int)i + 1, BLOCK_SIZE);
		assert_int_equal(dev_write(dev, i * step, buf, BLOCK_SIZE, 0), 0);
	}
	assert_int_equal(dev_write(dev, size - BLOCK_SIZE, buf, BLOCK_SIZE, 0), 0);
	for (uint64_t i = 0; i < 64; i++)
		assert_int_equal(byte_at(sim, i * step, BLOCK_SIZE), i + 1);
	assert_int_equal(dev_read(dev, BLOCK_SIZE, buf, BLOCK_SIZE), 0);
	assert_true(sim_shows_canary(buf, BLOCK_SIZE));
	io_free(buf);
	dev_close(dev);
	sim_destroy(sim);
}

/* ---- threads ------------------------------------------------------------------------------------------ */

struct worker {
	pthread_t thread;
	struct sim *sim;
	struct device *dev;
	uint8_t byte;
};

/* Writes its own blocks of a shared device, and crashes clones of it meanwhile. */
static void *work(void *arg)
{
	struct worker *w = arg;
	uint8_t *buf = io_alloc(BLOCK_SIZE);

	memset(buf, w->byte, BLOCK_SIZE);
	for (unsigned i = 0; i < 200; i++) {
		uint64_t offset = ((i % 10) * 4 + w->byte) * BLOCK_SIZE;

		xassert(!dev_write(w->dev, offset, buf, BLOCK_SIZE, 0));
		if (i % 10 == 9) {
			struct sim *cut;

			xassert(!dev_flush(w->dev));
			cut = after_cut(w->sim, i);
			xassert(!sim_poke(cut, offset + 5, "x", 1));
			for (unsigned k = 0; k < 10; k++)
				xassert(byte_at(cut, (k * 4 + w->byte) * BLOCK_SIZE + 512, 512) == w->byte);
			sim_destroy(cut);
		}
	}
	io_free(buf);
	return NULL;
}

static void threads_share_a_device_and_its_pages(void **state)
{
	struct bench *t = *state;
	struct worker w[4];

	for (unsigned i = 0; i < 4; i++) {
		w[i] = (struct worker){.sim = t->sim, .dev = t->dev, .byte = (uint8_t)i};
		assert_int_equal(pthread_create(&w[i].thread, NULL, work, &w[i]), 0);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(w[i].thread, NULL);
	assert_int_equal(sim_events(t->sim), 4 * (200 + 20));
	assert_int_equal(t->dev->writes_done, 801);
	for (unsigned k = 0; k < 40; k++)
		assert_int_equal(byte_at(t->sim, k * BLOCK_SIZE, BLOCK_SIZE), k % 4);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		CASE(unwritten_reads_as_canary),
		CASE(reads_see_writes),
		CASE(held_write_is_kept_dropped_or_torn),
		CASE(flushed_write_survives),
		CASE(held_writes_have_no_order),
		CASE(fua_covers_itself_only),
		CASE(fua_outlives_older_held_write),
		CASE(flush_does_not_cover_writes_in_flight),
		CASE(flush_covers_what_completed_before_it_began),
		CASE(flush_outlives_older_write_in_flight),
		CASE(async_fua_is_durable_at_completion),
		CASE(shuffle_changes_the_order_of_completion),
		CASE(crash_point_stops_everything),
		CASE(crash_fails_what_is_in_flight),
		CASE(failures_are_injected_by_range_and_count),
		CASE(dropped_flushes_lie),
		CASE(settled_is_durable),
		CASE(clones_are_independent),
		CASE(equal_seeds_give_equal_devices),
		CASE(poke_goes_through_the_cache_unseen_by_the_device),
		CASE(one_handle_at_a_time),
		CASE(out_of_range_is_an_error),
		cmocka_unit_test(huge_device_costs_what_is_written),
		CASE(threads_share_a_device_and_its_pages),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
