/* SPDX-License-Identifier: MIT
 *
 * Blocks that change hands, on the real journal, with power lost at a random event: afterwards
 * every block has one owner, and every extent that was said to be written holds what was written to
 * it. With MUTANT_META_REUSE_EARLY the replay writes old images of freed metadata over data, and
 * this test must see it.
 *
 * The owner of the extents is a tree of their own, (first block, 0) -> length and stamp: stamp 0
 * while unwritten, else what every word of the extent holds.
 */
#include "tree_check.h"

#include <string.h>

#include "alloc.h"
#include "device_sim.h"
#include "errors.h"
#include "journal.h"
#include "trans.h"

#define TOTAL 8192u
#define BALLAST_KEY 1u
#define MAX_LEN 4u

struct owned { uint64_t len, stamp; };
struct world {
	struct fs *fs;
	uint64_t rng, stamp;
	xid_t xid; /* of the last transaction */
	uint64_t io[MAX_LEN * BLOCK_SIZE / 8] __attribute__((aligned(BLOCK_SIZE)));
};

static struct tree owners(struct fs *fs) { return fs_tree(fs, TREE_NFS_CLIENT); }
static struct tree churn(struct fs *fs) { return fs_tree(fs, TREE_SYMLINK); }

static int begin(struct world *w, struct trans *t)
{
	int err;

	while ((err = trans_begin(w->fs, t, 200)) == -ERR_JOURNAL_FULL)
		if (jrn_wait_space_blocking(w->fs))
			return -ERR_SHUTDOWN;
	return err;
}

static int end(struct world *w, struct trans *t, int err)
{
	if (err)
		trans_cancel(t);
	else
		w->xid = trans_commit(t);
	return err;
}

/* Most of the device is taken, so that what is freed is soon used again. */
static struct sim *formatted(void)
{
	struct mkfs_options opt = { .journal_blocks = 1024, .now_sec = 1, .uuid = (const uint8_t *)"0123456789abcdef" };
	struct fs_options fo = { .no_heartbeat = true, .commit_ms = 10000 };
	struct world w = { .rng = 0 };
	struct device *dev;
	struct sim *sim;
	struct trans t;
	nblocks_t want = 6200;

	assert_int_equal(sim_create((uint64_t)TOTAL << BLOCK_SHIFT, 4096, 3, &sim), 0);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_mkfs(dev, &opt), 0);
	assert_int_equal(fs_open(dev, &fo, &w.fs), 0);
	while (want) {
		struct owned rec = { 0 };
		fsblock_t start;

		assert_int_equal(begin(&w, &t), 0);
		assert_int_equal(alloc_extent(&t, 0, 1, want, &start, &rec.len), 0);
		assert_int_equal(bt_insert(&t, owners(w.fs), KEY(start, BALLAST_KEY), &rec, sizeof(rec)), 0);
		want -= rec.len;
		end(&w, &t, 0);
	}
	assert_int_equal(fs_close(w.fs), 0);
	sim_settle(sim);
	return sim;
}

static int write_extent(struct world *w, fsblock_t start, nblocks_t len, uint64_t stamp)
{
	for (size_t i = 0; i < len * BLOCK_SIZE / 8; i++)
		w->io[i] = stamp;
	return dev_write(w->fs->dev, start << BLOCK_SHIFT, w->io, len * BLOCK_SIZE, 0);
}

/* Allocate, write, convert: the order of the data path. */
static int add_extent(struct world *w)
{
	struct owned rec = { 0 };
	fsblock_t start;
	struct trans t;
	int err = begin(w, &t);

	if (err)
		return err;
	err = alloc_extent(&t, 4 + check_random(&w->rng) % TOTAL, 1, 1 + check_random(&w->rng) % MAX_LEN,
			   &start, &rec.len);
	if (!err)
		err = bt_insert(&t, owners(w->fs), KEY(start, 0), &rec, sizeof(rec));
	err = end(w, &t, err);
	if (err == -ERR_BUSY_BLOCKS)
		return jrn_force_blocking(w->fs, w->xid) ? -ERR_SHUTDOWN : 0;
	if (err)
		return err == -ENOSPC ? 0 : err;
	rec.stamp = ++w->stamp;
	err = write_extent(w, start, rec.len, rec.stamp);
	if (err)
		return err;
	err = begin(w, &t);
	return err ? err : end(w, &t, bt_update(&t, owners(w->fs), KEY(start, 0), &rec, sizeof(rec)));
}

static int drop_extent(struct world *w)
{
	struct owned rec;
	struct bt_cursor c;
	fsblock_t start = 0;
	struct trans t;
	unsigned len;
	int err = begin(w, &t);

	if (err)
		return err;
	bt_cursor_init(&c, owners(w->fs));
	err = bt_seek(&c, KEY(check_random(&w->rng) % TOTAL, 0), BT_GE);
	while (!err && bt_key(&c).lo == BALLAST_KEY)
		err = bt_next(&c);
	if (!err) {
		start = bt_key(&c).hi;
		memcpy(&rec, bt_record(&c, &len), sizeof(rec));
	}
	bt_cursor_release(&c);
	if (!err)
		err = bt_delete(&t, owners(w->fs), KEY(start, 0));
	if (!err)
		err = alloc_free(&t, start, rec.len);
	err = end(w, &t, err);
	return err == -ENOENT ? 0 : err;
}

/* Large records come and go, so that nodes do. */
static int churn_metadata(struct world *w, bool grow)
{
	static const uint8_t bytes[RECORD_MAX];
	struct trans t;
	int err = begin(w, &t);

	for (unsigned i = 0; i < 6 && !err; i++) {
		struct key key = KEY(check_random(&w->rng) % 400, 0);

		err = grow ? bt_insert(&t, churn(w->fs), key, bytes, RECORD_MAX)
			   : bt_delete(&t, churn(w->fs), key);
		if (err == -EEXIST || err == -ENOENT)
			err = 0;
	}
	if (err == -ERR_SHUTDOWN)
		return err;
	err = end(w, &t, err);
	return err == -ENOSPC ? 0 : err;
}

static void run_until_crash(struct world *w, struct sim *sim)
{
	int err = 0;

	for (unsigned i = 0; i < 4000 && !err && !sim_crashed(sim); i++) {
		unsigned dice = (unsigned)(check_random(&w->rng) % 100);

		if (dice < 40)
			err = add_extent(w);
		else if (dice < 65)
			err = drop_extent(w);
		else if (dice < 95)
			err = churn_metadata(w, (i / 60) % 2 == 0);
		else
			err = jrn_force_blocking(w->fs, w->xid);
	}
}

/* Blocks whose content is not what their record says. */
static unsigned check_after(struct world *w)
{
	uint8_t *mapped = calloc(TOTAL, 1);
	unsigned wrong = 0, len;
	struct bt_cursor c;

	bt_cursor_init(&c, owners(w->fs));
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		struct owned rec;
		fsblock_t start = bt_key(&c).hi;

		memcpy(&rec, bt_record(&c, &len), sizeof(rec));
		memset(mapped + start, 1, rec.len);
		if (!rec.stamp)
			continue;
		assert_int_equal(dev_read(w->fs->dev, start << BLOCK_SHIFT, w->io, rec.len * BLOCK_SIZE), 0);
		for (size_t i = 0; i < rec.len * BLOCK_SIZE / 8; i++)
			if (w->io[i] != rec.stamp) {
				wrong++;
				break;
			}
	}
	bt_cursor_release(&c);
	check_space(w->fs, mapped);
	free(mapped);
	return wrong;
}

static unsigned crash_runs(unsigned mutant, uint64_t seed, unsigned runs)
{
	struct sim *base = formatted();
	unsigned wrong = 0;

	for (unsigned r = 0; r < runs; r++) {
		struct fs_options fo = { .no_heartbeat = true, .commit_ms = 10000, .mutant = mutant };
		struct world *w = aligned_alloc(BLOCK_SIZE, (sizeof(*w) + BLOCK_MASK) & ~BLOCK_MASK);
		struct device *dev;
		struct sim *sim;

		memset(w, 0, sizeof(*w));
		w->rng = seed + r;
		assert_int_equal(sim_clone(base, &sim), 0);
		assert_int_equal(sim_device(sim, &dev), 0);
		assert_int_equal(fs_open(dev, &fo, &w->fs), 0);
		sim_crash_at(sim, sim_events(sim) + 200 + check_random(&w->rng) % 2500);
		run_until_crash(w, sim);
		fs_abandon(w->fs);
		sim_restart(sim, seed + r);
		assert_int_equal(sim_device(sim, &dev), 0);
		assert_int_equal(fs_open(dev, &fo, &w->fs), 0);
		unsigned bad = check_after(w);
		if (bad && !mutant)
			print_message("run %u: %u extents hold foreign bytes\n", r, bad);
		wrong += bad;
		assert_int_equal(fs_close(w->fs), 0);
		sim_destroy(sim);
		free(w);
	}
	sim_destroy(base);
	return wrong;
}

static void test_power_loss(void **state)
{
	assert_int_equal(crash_runs(MUTANT_NONE, check_seed(51), 60), 0);
}

static void test_mutant_is_caught(void **state)
{
	unsigned wrong = crash_runs(MUTANT_META_REUSE_EARLY, check_seed(52), 40);

	print_message("%u extents were overwritten\n", wrong);
	assert_true(wrong > 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_power_loss),
		cmocka_unit_test(test_mutant_is_caught),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
