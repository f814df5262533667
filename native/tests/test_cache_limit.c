/* SPDX-License-Identifier: MIT
 *
 * test_cache_limit.c - lower limits of the caches, as memory pressure sets them: what leaves, what
 * stays, that the memory goes back to the kernel, and that nobody who works meanwhile sees it.
 */
#include <unistd.h>

#include "bare_fs.h"
#include "core_api.h"
#include "file_fixture.h"

#define MANY 10000u

static struct sim *sim;
static struct fs *fs;

static struct buf_stats bufs_of(struct fs *of)
{
	struct buf_stats st;

	buf_get_stats(of, &st);
	return st;
}

static struct inode_stats inodes_now(void)
{
	struct inode_stats st;

	inode_get_stats(world.fs, &st);
	return st;
}

/* ---- metadata blocks ---- */

static int set_up(void **state)
{
	sim = bare_sim(1);
	return bare_open(sim, 0, 0, &fs); /* a cache of 256 blocks */
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

static void write_blocks(unsigned first, unsigned n, bool durable)
{
	xid_t xid;

	for (unsigned i = first; i < first + n; i += 100)
		OK(bare_write(fs, i, 100, i / 100, true, &xid));
	if (durable)
		OK(jrn_force_blocking(fs, xid));
}

static void read_blocks(unsigned first, unsigned n)
{
	for (unsigned i = first; i < first + n; i++)
		assert_int_equal(bare_read(fs, i), i / 100);
}

static void clean_blocks_at_home(unsigned n)
{
	write_blocks(0, n, true);
	OK(bare_close(fs));
	OK(bare_open(sim, 0, 0, &fs));
	read_blocks(0, n);
}

static void clean_blocks_leave_and_the_limit_comes_back(void **state)
{
	struct buf_stats before, st;

	clean_blocks_at_home(300);
	before = bufs_of(fs);
	assert_int_equal(before.bufs, 256);
	assert_int_equal(before.limit, 256);
	assert_int_equal(buf_cache_limit(fs, 128 * BLOCK_SIZE), 256 - 128);
	st = bufs_of(fs);
	assert_int_equal(st.bufs, 128);
	assert_int_equal(st.limit, 128);
	assert_int_equal(st.asked, 256);
	assert_true(st.resident <= before.resident - (256 - 128) * BLOCK_SIZE || st.resident == 128 * BLOCK_SIZE);
	read_blocks(0, 300);
	assert_in_range(bufs_of(fs).bufs, 120, 128);
	/* Never below 64, never above what was asked for. */
	buf_cache_limit(fs, 0);
	assert_int_equal(bufs_of(fs).limit, 64);
	assert_in_range(bufs_of(fs).bufs, 50, 64);
	assert_int_equal(buf_cache_limit(fs, 1ULL << 40), 0);
	assert_int_equal(bufs_of(fs).limit, 256);
	read_blocks(0, 300);
	assert_in_range(bufs_of(fs).bufs, 250, 256);
}

static void what_the_journal_keeps_stays(void **state)
{
	struct buf_stats st;

	write_blocks(0, 300, true);
	OK(bare_close(fs));
	OK(bare_open(sim, 0, 0, &fs));
	write_blocks(300, 200, false);
	st = bufs_of(fs);
	assert_int_equal(st.dirty, 200);
	buf_cache_limit(fs, 0);
	st = bufs_of(fs);
	assert_int_equal(st.dirty, 200);
	/* Beside them the others have an eighth of the limit, which was long reached. */
	read_blocks(0, 200);
	st = bufs_of(fs);
	assert_in_range(st.bufs - st.dirty - st.logged, 8, 10);
	read_blocks(300, 200);
	OK(jrn_force_blocking(fs, jrn_running(fs)));
	assert_int_equal(bufs_of(fs).logged, 200);
	buf_cache_limit(fs, 0);
	assert_int_equal(bufs_of(fs).logged, 200);
	bare_abandon(fs);
	OK(bare_open(sim, 0, 0, &fs));
	read_blocks(300, 200);
}

static void pinned_blocks_stay(void **state)
{
	struct buf *pinned[100], *again;

	clean_blocks_at_home(200);
	for (unsigned i = 0; i < 100; i++)
		pinned[i] = get(2 * i);
	buf_cache_limit(fs, 0);
	assert_in_range(bufs_of(fs).bufs, 100, 108);
	for (unsigned i = 0; i < 100; i++) {
		uint64_t value;

		assert_true(bare_value(buf_data(pinned[i]), &value));
		assert_int_equal(value, 2 * i / 100);
		again = get(2 * i);
		assert_ptr_equal(again, pinned[i]);
		buf_put(again);
		buf_put(pinned[i]);
	}
	buf_cache_limit(fs, 0);
	assert_in_range(bufs_of(fs).bufs, 8, 64);
	read_blocks(0, 200);
}

/* ---- inodes, and the memory of both ---- */

static int make_one(const char *name, struct inode **in)
{
	int rc;

	do {
		rc = namei_create(world.root, name, strlen(name), S_IFREG | 0644, 0, &root_cred, in);
		if (rc == -ERR_JOURNAL_FULL)
			OK(jrn_wait_space_blocking(world.fs));
	} while (rc == -ERR_JOURNAL_FULL);
	return rc;
}

static void make_many(unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		struct inode *in;
		char name[16];

		snprintf(name, sizeof(name), "f%u", i);
		OK(make_one(name, &in));
		inode_put(in);
	}
}

static void find_many(unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		struct inode *in;
		char name[16];
		int len = snprintf(name, sizeof(name), "f%u", i);

		OK(namei_lookup(world.root, name, (size_t)len, &in));
		inode_put(in);
	}
}

/* All of it clean, nothing of it in memory. */
static void world_with_many(unsigned n)
{
	world_new(256u << 20, 512, 1);
	make_many(n);
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	OK(fs_close(world.fs));
	OK(world_open());
}

static void unused_inodes_leave_and_others_stay(void **state)
{
	struct inode *held;
	xid_t xid;

	world_with_many(2000);
	find_many(2000);
	assert_in_range(inodes_now().unused, 1990, 2001);
	assert_int_equal(inodes_now().limit, world.fs->opt.inode_cache);
	OK(namei_lookup(world.root, "f0", 2, &held));
	held->xid = 77;
	xid = held->xid;
	assert_true(inode_cache_limit(world.fs, 500) >= 1490);
	assert_int_equal(inodes_now().unused, 500);
	inode_cache_limit(world.fs, 0);
	assert_int_equal(inodes_now().unused, 0);
	assert_ptr_equal(inode_get_cached(world.fs, held->ino), held);
	inode_put(held);
	inode_put(held);
	/* Out of memory at once; what its fsync has to wait for is not forgotten. */
	assert_int_equal(inodes_now().unused, 0);
	OK(namei_lookup(world.root, "f0", 2, &held));
	assert_true(held->xid >= xid);
	inode_put(held);
	inode_cache_limit(world.fs, UINT64_MAX);
	assert_int_equal(inodes_now().limit, world.fs->opt.inode_cache);
	find_many(2000);
	assert_in_range(inodes_now().unused, 1990, 2001);
	world_close();
	world_end();
}

/* Resident memory of this process, exactly. */
static uint64_t resident(void)
{
	unsigned long kib = 0;
	char line[128];
	FILE *f = fopen("/proc/self/smaps_rollup", "re");

	assert_non_null(f);
	while (fgets(line, sizeof(line), f) && !sscanf(line, "Rss: %lu", &kib))
		;
	fclose(f);
	return (uint64_t)kib << 10;
}

static void memory_goes_back_to_the_kernel(void **state)
{
	struct extfs_memory before, after;
	uint64_t rss, left, fallen;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	print_message("not measured: the sanitizer keeps what is freed\n");
	skip();
#endif
	world_with_many(MANY);
	find_many(MANY);
	extfs_get_memory(world.fs, &before);
	rss = resident();
	left = extfs_limit_caches(world.fs, 0, 0);
	fallen = rss - resident();
	extfs_get_memory(world.fs, &after);
	print_message("%lu KiB of blocks and %lu inodes before, %lu KiB and %lu after: %lu KiB less resident\n",
		      before.cache_bytes >> 10, before.inodes, after.cache_bytes >> 10, after.inodes,
		      fallen >> 10);
	assert_int_equal(left, before.cache_bytes - after.cache_bytes +
				       (before.inodes - after.inodes) * sizeof(struct inode));
	assert_true(left > MANY * sizeof(struct inode));
	assert_true(fallen >= left * 3 / 4);
	assert_true(after.cache_resident <= after.cache_bytes + 64 * BLOCK_SIZE);
	find_many(MANY);
	world_close();
	world_end();
}

/* ---- while others work ---- */

static _Atomic bool over;

static void *look(void *arg)
{
	const inum_t *expected = arg;

	for (unsigned i = 0; !atomic_load(&over); i = (i + 7) % MANY) {
		struct inode *in;
		char name[16];
		int len = snprintf(name, sizeof(name), "f%u", i);

		OK(namei_lookup(world.root, name, (size_t)len, &in));
		xassert(in->ino == expected[i]);
		inode_put(in);
	}
	return NULL;
}

static void *make_and_remove(void *arg)
{
	for (unsigned i = 0; !atomic_load(&over); i++) {
		struct inode *in;
		char name[16];
		int rc;

		snprintf(name, sizeof(name), "new%u", i % 50);
		OK(make_one(name, &in));
		inode_put(in);
		do {
			rc = namei_unlink(world.root, name, strlen(name), NULL);
			if (rc == -ERR_JOURNAL_FULL)
				OK(jrn_wait_space_blocking(world.fs));
		} while (rc == -ERR_JOURNAL_FULL);
		OK(rc);
	}
	return NULL;
}

static void *shrink(void *arg)
{
	for (unsigned i = 0; !atomic_load(&over); i++) {
		extfs_limit_caches(world.fs, 0, 0);
		extfs_limit_caches(world.fs, i % 2 ? UINT64_MAX : 80 * BLOCK_SIZE, i % 100);
	}
	return NULL;
}

static void nobody_sees_it(void **state)
{
	static inum_t expected[MANY];
	pthread_t threads[5];
	unsigned n = 0;

	world_with_many(MANY);
	for (unsigned i = 0; i < MANY; i++) {
		struct inode *in;
		char name[16];
		int len = snprintf(name, sizeof(name), "f%u", i);

		OK(namei_lookup(world.root, name, (size_t)len, &in));
		expected[i] = in->ino;
		inode_put(in);
	}
	atomic_store(&over, false);
	OK(-pthread_create(&threads[n++], NULL, look, expected));
	OK(-pthread_create(&threads[n++], NULL, look, expected));
	OK(-pthread_create(&threads[n++], NULL, make_and_remove, NULL));
	OK(-pthread_create(&threads[n++], NULL, shrink, NULL));
	OK(-pthread_create(&threads[n++], NULL, shrink, NULL));
	usleep(2000000);
	atomic_store(&over, true);
	while (n)
		pthread_join(threads[--n], NULL);
	assert_true(bufs_of(world.fs).evictions > 100);
	find_many(MANY);
	world_close();
	world_end();
}

#define BARE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		BARE(clean_blocks_leave_and_the_limit_comes_back),
		BARE(what_the_journal_keeps_stays),
		BARE(pinned_blocks_stay),
		cmocka_unit_test(unused_inodes_leave_and_others_stay),
		cmocka_unit_test(memory_goes_back_to_the_kernel),
		cmocka_unit_test(nobody_sees_it),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
