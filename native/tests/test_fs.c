/* SPDX-License-Identifier: MIT
 *
 * test_fs.c - mkfs, superblock, heartbeat, opening and closing.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <pthread.h>

#include "alloc.h"
#include "device_sim.h"
#include "heartbeat.h"
#include "inode.h"
#include "journal.h"
#include "log.h"

static const struct fs_options quiet = {.no_heartbeat = true};

static struct sim *new_sim(uint64_t blocks)
{
	struct sim *sim;

	assert_int_equal(sim_create(blocks << BLOCK_SHIFT, 512, 1, &sim), 0);
	return sim;
}

static int format(struct sim *sim, const struct mkfs_options *opt)
{
	static const struct mkfs_options none;
	struct device *dev;
	int err;

	assert_int_equal(sim_device(sim, &dev), 0);
	err = fs_mkfs(dev, opt ? opt : &none);
	dev_close(dev);
	return err;
}

/* Opens and closes; returns the first error. */
static int open_close(struct sim *sim, const struct fs_options *opt)
{
	struct device *dev;
	struct fs *fs;
	int err;

	assert_int_equal(sim_device(sim, &dev), 0);
	err = fs_open(dev, opt, &fs);
	if (err) {
		dev_close(dev);
		return err;
	}
	return fs_close(fs);
}

static bool log_says(const char *what)
{
	char line[512];
	bool said = false;

	while (log_next(line, sizeof(line)))
		said = said || strstr(line, what);
	return said;
}

static void poke_sealed(struct sim *sim, fsblock_t place, void *page)
{
	meta_seal(page, get64(((struct meta_hdr *)page)->lsn));
	assert_int_equal(sim_poke(sim, place << BLOCK_SHIFT, page, BLOCK_SIZE), 0);
}

static void spoil(struct sim *sim, fsblock_t block)
{
	uint8_t byte;

	assert_int_equal(sim_peek(sim, (block << BLOCK_SHIFT) + 100, &byte, 1), 0);
	byte ^= 1;
	assert_int_equal(sim_poke(sim, (block << BLOCK_SHIFT) + 100, &byte, 1), 0);
}

/* ---- mkfs ---- */

static void new_filesystem_has_a_root_directory(void **state)
{
	struct sim *sim = new_sim(16384);
	struct alloc_space space;
	struct device *dev;
	struct inode *root;
	struct fs *fs;

	assert_int_equal(format(sim, &(struct mkfs_options){.label = "a label", .now_sec = 1234}), 0);
	sim_settle(sim);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &quiet, &fs), 0);
	assert_string_equal(fs->super.label, "a label");
	assert_int_equal(fs->super.total_blocks, 16384);
	fs_rdlock(fs);
	assert_int_equal(inode_get(fs, 1, &root), 0);
	assert_int_equal(inode_get(fs, 2, &(struct inode *){NULL}), -ENOENT);
	fs_unlock(fs);
	assert_int_equal(root->core.mode, 0040755);
	assert_int_equal(root->core.nlink, 2);
	assert_int_equal(root->core.parent, 1);
	assert_int_equal(root->core.mtime.sec, 1234);
	inode_put(root);
	assert_int_equal(get64(fs_root(fs)->next_inode), 16);
	alloc_statfs(fs, &space);
	assert_true(space.free > 16384 - 1024 - 200 && space.free < 16384 - 1024);
	assert_int_equal(fs_close(fs), 0);
	sim_destroy(sim);
}

/* Free space and what the layout uses add up in every shape of device. */
static void every_size_mounts(void **state)
{
	static const uint64_t sizes[] = {
		8192, 8193, 12000, 16383, 16384, 20000, 32767, 32768, 32769, 40960, 65536, 100001,
		262144, 1000003, (1u << 22) + 5000, (1u << 24) + 8191, 1ull << 28, 1ull << 32, 1ull << 40,
	};

	for (unsigned i = 0; i < ARRAY_LEN(sizes); i++) {
		struct sim *sim = new_sim(sizes[i]);
		struct alloc_space space;
		struct device *dev;
		struct fs *fs;
		nblocks_t used;

		assert_int_equal(format(sim, NULL), 0);
		assert_int_equal(sim_device(sim, &dev), 0);
		assert_int_equal(fs_open(dev, &quiet, &fs), 0);
		assert_true(fs->super.ag_count <= AG_MAX_COUNT);
		assert_true(sizes[i] < 4 * AG_MIN_BLOCKS || fs->super.ag_count >= 4 ||
			    sizes[i] / 4 < JOURNAL_START_BLOCK + 2048);
		alloc_statfs(fs, &space);
		/* superblocks, heartbeat, root, journal, the inode leaf, three blocks for each
		 * AG */
		used = 2 + 1 + 1 + fs->super.journal_blocks + 1 + 3 * (nblocks_t)fs->super.ag_count;
		assert_int_equal(get64(fs_root(fs)->free_blocks), sizes[i] - used);
		assert_int_equal(fs_close(fs), 0);
		sim_destroy(sim);
	}
}

static void large_device_is_formatted_with_few_writes(void **state)
{
	struct sim *sim = new_sim(1ull << 32); /* 16 TiB */
	struct timespec begin, end;
	uint64_t events = sim_events(sim);

	clock_gettime(CLOCK_MONOTONIC, &begin);
	assert_int_equal(format(sim, NULL), 0);
	clock_gettime(CLOCK_MONOTONIC, &end);
	assert_true(end.tv_sec - begin.tv_sec <= 1);
	assert_true(sim_events(sim) - events < 150);
	sim_destroy(sim);
}

static void impossible_wishes_are_refused(void **state)
{
	struct sim *sim = new_sim(16384), *tiny = new_sim(8191);
	char label[FORMAT_LABEL_LEN + 2];

	memset(label, 'x', sizeof(label));
	label[FORMAT_LABEL_LEN + 1] = 0;
	assert_int_equal(format(tiny, NULL), -ERR_DEV_TINY);
	assert_int_equal(format(sim, &(struct mkfs_options){.label = label}), -ENAMETOOLONG);
	assert_int_equal(format(sim, &(struct mkfs_options){.journal_blocks = 1023}), -EINVAL);
	assert_int_equal(format(sim, &(struct mkfs_options){.journal_blocks = 300000}), -EINVAL);
	assert_int_equal(format(sim, &(struct mkfs_options){.journal_blocks = 15000}), -ERR_DEV_TINY);
	assert_int_equal(format(sim, &(struct mkfs_options){.size_blocks = 20000}), -ERR_DEV_SMALL);
	assert_int_equal(open_close(sim, &quiet), -ERR_NOT_EXTFS); /* nothing was written */
	label[FORMAT_LABEL_LEN] = 0;
	assert_int_equal(format(sim, &(struct mkfs_options){.label = label, .journal_blocks = 12000}), 0);
	assert_int_equal(open_close(sim, &quiet), 0);
	log_says("");
	sim_destroy(sim);
	sim_destroy(tiny);
}

static void interrupted_mkfs_leaves_none_or_all(void **state)
{
	struct sim *old = new_sim(16384);
	unsigned none = 0, whole = 0;

	assert_int_equal(format(old, &(struct mkfs_options){.label = "old"}), 0);
	sim_settle(old);
	for (uint64_t n = 1; n < 200; n++) {
		struct device *dev;
		struct super sb;
		struct sim *sim;
		int err, made;

		assert_int_equal(sim_clone(old, &sim), 0);
		sim_crash_at(sim, sim_events(sim) + n);
		made = format(sim, &(struct mkfs_options){.label = "new", .force = true});
		sim_restart(sim, n);
		assert_int_equal(sim_device(sim, &dev), 0);
		err = super_read(dev, &sb);
		dev_close(dev);
		if (err) {
			assert_true(made < 0);
			none++;
		} else {
			/* The old one is whole until it is destroyed. */
			assert_true(!strcmp(sb.label, "new") || none == 0);
			assert_int_equal(open_close(sim, &quiet), 0);
			whole += !strcmp(sb.label, "new");
		}
		sim_destroy(sim);
		if (!made)
			break;
	}
	assert_true(none > 5 && whole >= 1);
	log_says("");
	sim_destroy(old);
}

static void mkfs_refuses_what_is_in_use(void **state)
{
	struct sim *sim = new_sim(16384);

	assert_int_equal(format(sim, NULL), 0);
	assert_int_equal(format(sim, NULL), -ERR_FOREIGN_FS);
	assert_true(log_says("extfs"));
	spoil(sim, SUPER_BLOCK);
	spoil(sim, SUPER_COPY_BLOCK);
	assert_int_equal(format(sim, NULL), -ERR_FOREIGN_FS);
	assert_int_equal(format(sim, &(struct mkfs_options){.force = true}), 0);
	assert_int_equal(open_close(sim, &quiet), 0);
	log_says("");
	sim_destroy(sim);
}

static void mkfs_names_a_foreign_signature(void **state)
{
	char path[] = "/tmp/extfs-test-XXXXXX";
	struct device *dev;
	struct super sb;
	int fd = mkstemp(path);

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, 64 << 20), 0);
	assert_int_equal(pwrite(fd, "SWAPSPACE2", 10, 4096 - 10), 10);
	/* What makes libblkid believe it: version 1, some pages. */
	assert_int_equal(pwrite(fd, "\1\0\0\0\377\77\0\0", 8, 1024), 8);
	close(fd);
	assert_int_equal(dev_open(path, 0, &dev), 0);
	log_says("");
	assert_int_equal(fs_mkfs(dev, &(struct mkfs_options){0}), -ERR_FOREIGN_FS);
	assert_true(log_says("swap"));
	assert_int_equal(fs_mkfs(dev, &(struct mkfs_options){.force = true}), 0);
	assert_int_equal(super_read(dev, &sb), 0);
	dev_close(dev);
	unlink(path);
}

static void same_wishes_same_bytes(void **state)
{
	static const uint8_t uuid[16] = "0123456789abcde";
	const struct mkfs_options opt = {.uuid = uuid, .now_sec = 7};
	struct sim *a = new_sim(16384), *b = new_sim(16384);
	char *pages = malloc(2 * BLOCK_SIZE);

	assert_int_equal(format(a, &opt), 0);
	assert_int_equal(format(b, &opt), 0);
	for (fsblock_t i = 0; i < 16384; i++) {
		assert_int_equal(sim_peek(a, i << BLOCK_SHIFT, pages, BLOCK_SIZE), 0);
		assert_int_equal(sim_peek(b, i << BLOCK_SHIFT, pages + BLOCK_SIZE, BLOCK_SIZE), 0);
		assert_memory_equal(pages, pages + BLOCK_SIZE, BLOCK_SIZE);
	}
	free(pages);
	sim_destroy(a);
	sim_destroy(b);
}

/* ---- superblock ---- */

static void damaged_superblocks(void **state)
{
	struct sim *sim = new_sim(16384);

	assert_int_equal(open_close(sim, &quiet), -ERR_NOT_EXTFS);
	assert_int_equal(format(sim, NULL), 0);
	log_says("");
	spoil(sim, SUPER_BLOCK);
	assert_int_equal(open_close(sim, &quiet), 0);
	assert_true(log_says("ERR_META_CRC"));
	spoil(sim, SUPER_COPY_BLOCK);
	assert_int_equal(open_close(sim, &quiet), -ERR_SB_DAMAGED);
	spoil(sim, SUPER_BLOCK);
	assert_int_equal(open_close(sim, &quiet), 0);
	log_says("");
	sim_destroy(sim);
}

static void change_super(struct sim *sim, void (*change)(struct super_disk *d))
{
	static const fsblock_t places[] = {SUPER_BLOCK, SUPER_COPY_BLOCK};
	struct super_disk d;

	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(sim_peek(sim, places[i] << BLOCK_SHIFT, &d, BLOCK_SIZE), 0);
		change(&d);
		poke_sealed(sim, places[i], &d);
	}
}

static void set_incompat(struct super_disk *d) { d->incompat = put64(1ull << 40); }
static void set_version(struct super_disk *d) { d->version = put32(2); }
static void set_ro_compat(struct super_disk *d) { d->ro_compat = put64(2); }
static void set_compat(struct super_disk *d) { d->compat = put64(2); }
static void set_total(struct super_disk *d) { d->total_blocks = put64(16384 + 4096); }
static void set_nonsense(struct super_disk *d) { d->ag_count = put32(0); }

static void features_and_sizes_of_others(void **state)
{
	static const struct {
		void (*change)(struct super_disk *d);
		int err, err_read_only;
	} cases[] = {
		{set_incompat, -ERR_INCOMPAT, -ERR_INCOMPAT}, {set_version, -ERR_INCOMPAT, -ERR_INCOMPAT},
		{set_ro_compat, -EROFS, 0}, {set_compat, 0, 0}, {set_total, -ERR_DEV_SMALL, -ERR_DEV_SMALL},
		{set_nonsense, -ERR_SB_DAMAGED, -ERR_SB_DAMAGED},
	};
	struct fs_options read_only = {.no_heartbeat = true, .read_only = true};

	for (unsigned i = 0; i < ARRAY_LEN(cases); i++) {
		struct sim *sim = new_sim(16384);

		assert_int_equal(format(sim, NULL), 0);
		change_super(sim, cases[i].change);
		assert_int_equal(open_close(sim, &quiet), cases[i].err);
		assert_int_equal(open_close(sim, &read_only), cases[i].err_read_only);
		sim_destroy(sim);
	}
	log_says("");
}

/* ---- opening and closing ---- */

static xid_t make_file(struct fs *fs, inum_t *ino)
{
	struct inode *in;
	struct trans t;
	xid_t xid;

	assert_int_equal(trans_begin(fs, &t, INODE_TRANS_BLOCKS), 0);
	assert_int_equal(inode_create(&t, 0100644, 1, 1, 0, 1, 1, &in), 0);
	assert_int_equal(inode_write(&t, in), 0);
	*ino = in->ino;
	xid = trans_commit(&t);
	inode_put(in);
	return xid;
}

static bool inode_exists(struct sim *sim, inum_t ino)
{
	struct device *dev;
	struct inode *in;
	struct fs *fs;
	int err;

	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &quiet, &fs), 0);
	fs_rdlock(fs);
	err = inode_get(fs, ino, &in);
	fs_unlock(fs);
	if (!err)
		inode_put(in);
	assert_int_equal(fs_close(fs), 0);
	return !err;
}

static void close_keeps_abandon_loses_what_is_not_durable(void **state)
{
	struct sim *sim = new_sim(16384);
	struct fs_options slow = {.no_heartbeat = true, .commit_ms = 3600000};
	inum_t forced, lost, kept;
	struct device *dev;
	struct fs *fs;

	assert_int_equal(format(sim, NULL), 0);
	sim_settle(sim);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &slow, &fs), 0);
	assert_int_equal(jrn_force_blocking(fs, make_file(fs, &forced)), 0);
	make_file(fs, &lost);
	fs_abandon(fs);
	sim_restart(sim, 3);
	assert_true(inode_exists(sim, forced));
	assert_false(inode_exists(sim, lost));

	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &slow, &fs), 0);
	make_file(fs, &kept);
	assert_int_equal(fs_close(fs), 0);
	sim_restart(sim, 3);
	assert_true(inode_exists(sim, kept));
	sim_destroy(sim);
}

/* On an idle filesystem they get there without anybody's fsync. */
static void lazy_times_are_written(void **state)
{
	struct sim *sim = new_sim(16384);
	struct fs_options fast = {.no_heartbeat = true, .commit_ms = 20};
	struct inode_stats st;
	struct device *dev;
	struct inode *root;
	struct fs *fs;
	uint64_t change;

	assert_int_equal(format(sim, &(struct mkfs_options){.now_sec = 1}), 0);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &fast, &fs), 0);
	fs_rdlock(fs);
	assert_int_equal(inode_get(fs, 1, &root), 0);
	inode_touch_lazy(root, TOUCH_MTIME);
	change = root->core.change;
	fs_unlock(fs);
	for (unsigned i = 0; i < 3000 && !jrn_durable(fs); i++)
		nanosleep(&(struct timespec){0, 1000000}, NULL);
	assert_int_equal(jrn_durable(fs), 1);
	inode_get_stats(fs, &st);
	assert_int_equal(st.lazy, 0);
	inode_put(root);
	fs_abandon(fs);
	sim_restart(sim, 1);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &quiet, &fs), 0);
	fs_rdlock(fs);
	assert_int_equal(inode_get(fs, 1, &root), 0);
	assert_int_equal(root->core.change, change);
	/* And the last ones are written when it is closed. */
	inode_touch_lazy(root, TOUCH_MTIME);
	fs_unlock(fs);
	inode_put(root);
	assert_int_equal(fs_close(fs), 0);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &quiet, &fs), 0);
	fs_rdlock(fs);
	assert_int_equal(inode_get(fs, 1, &root), 0);
	assert_int_equal(root->core.change, change + 1);
	fs_unlock(fs);
	inode_put(root);
	assert_int_equal(fs_close(fs), 0);
	sim_destroy(sim);
}

static void open_survives_a_failure_of_any_io(void **state)
{
	struct sim *base = new_sim(16384);

	assert_int_equal(format(base, NULL), 0);
	sim_settle(base);
	for (unsigned n = 1; n < 60; n++) {
		struct sim *sim;
		int err;

		assert_int_equal(sim_clone(base, &sim), 0);
		sim_crash_at(sim, sim_events(sim) + n);
		err = open_close(sim, &quiet);
		if (sim_crashed(sim))
			sim_restart(sim, n);
		else
			n = 60;
		sim_crash_at(sim, 0);
		assert_true(err <= 0);
		assert_int_equal(open_close(sim, &quiet), 0);
		sim_destroy(sim);
	}
	for (fsblock_t block = 0; block < 8; block++) {
		struct sim *sim;

		assert_int_equal(sim_clone(base, &sim), 0);
		sim_fail(sim, IO_READ, block << BLOCK_SHIFT, BLOCK_SIZE, 1);
		assert_true(open_close(sim, &(struct fs_options){.heartbeat_ms = 50}) <= 0);
		sim_fail(sim, IO_READ, 0, 0, 0);
		assert_int_equal(open_close(sim, &quiet), 0);
		sim_destroy(sim);
	}
	log_says("");
	sim_destroy(base);
}

/* ---- heartbeat ---- */

static void read_beat(struct sim *sim, struct heartbeat_disk *h)
{
	assert_int_equal(sim_peek(sim, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, h, sizeof(*h)), 0);
}

static double seconds_since(const struct timespec *begin)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)(now.tv_sec - begin->tv_sec) + (double)(now.tv_nsec - begin->tv_nsec) / 1e9;
}

static void heartbeat_moves_while_mounted(void **state)
{
	struct sim *sim = new_sim(16384);
	const struct fs_options opt = {.heartbeat_ms = 10};
	struct heartbeat_disk a, b;
	struct timespec begin;
	struct device *dev;
	struct fs *fs;

	assert_int_equal(format(sim, NULL), 0);
	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(fs_open(dev, &opt, &fs), 0);
	read_beat(sim, &a);
	assert_int_equal(get32(a.state), HB_MOUNTED);
	assert_int_equal(get32(a.pid), getpid());
	nanosleep(&(struct timespec){0, 200000000}, NULL);
	read_beat(sim, &b);
	assert_true(get64(b.seq) > get64(a.seq));
	fs_abandon(fs);
	read_beat(sim, &b);
	assert_int_equal(get32(b.state), HB_MOUNTED);
	/* Our own remains need no waiting. */
	clock_gettime(CLOCK_MONOTONIC, &begin);
	assert_int_equal(open_close(sim, &(struct fs_options){.heartbeat_ms = 5000}), 0);
	read_beat(sim, &b);
	assert_int_equal(get32(b.state), HB_CLEAN);
	assert_int_equal(open_close(sim, &opt), 0);
	assert_true(seconds_since(&begin) < 2);
	sim_destroy(sim);
}

struct other_host {
	struct sim *sim;
	char page[BLOCK_SIZE];
	_Atomic bool stop;
	bool beats;
};

static void beat(struct other_host *o)
{
	struct heartbeat_disk *h = (void *)o->page;

	h->seq = put64(get64(h->seq) + 1);
	h->state = put32(HB_MOUNTED);
	h->pid = put32(4711);
	h->interval_ms = put32(100);
	memset(h->boot_id, 9, sizeof(h->boot_id));
	strcpy((char *)h->host, "elsewhere");
	poke_sealed(o->sim, HEARTBEAT_BLOCK, o->page);
}

static void *other_host_thread(void *arg)
{
	struct other_host *o = arg;

	while (!atomic_load(&o->stop)) {
		nanosleep(&(struct timespec){0, 20000000}, NULL);
		beat(o);
	}
	return NULL;
}

static int look(struct sim *sim)
{
	struct device *dev;
	struct super sb;
	int how;

	assert_int_equal(sim_device(sim, &dev), 0);
	assert_int_equal(super_read(dev, &sb), 0);
	how = heartbeat_look(dev, sb.uuid);
	dev_close(dev);
	return how;
}

/* A mount whose device another host has taken sees it on the device. */
static void a_mount_knows_when_it_was_replaced(void **state)
{
	struct other_host o = {.sim = new_sim(16384)};
	const struct fs_options opt = {.heartbeat_ms = 5000};
	struct device *dev;
	struct fs *fs;

	assert_int_equal(format(o.sim, NULL), 0);
	assert_int_equal(sim_device(o.sim, &dev), 0);
	assert_int_equal(fs_open(dev, &opt, &fs), 0);
	assert_int_equal(heartbeat_ours(fs), 1);
	assert_int_equal(sim_peek(o.sim, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, o.page, BLOCK_SIZE), 0);
	memset(((struct heartbeat_disk *)o.page)->mount_id, 7,
	       sizeof(((struct heartbeat_disk *)o.page)->mount_id));
	beat(&o);
	assert_int_equal(heartbeat_ours(fs), 0);
	fs_abandon(fs);
	sim_destroy(o.sim);
}

/* One that was away while another host took the device, and comes back, leaves that one's mark. */
static void a_replaced_mount_says_nothing_any_more(void **state)
{
	struct other_host o = {.sim = new_sim(16384)};
	const struct fs_options opt = {.heartbeat_ms = 100};
	struct heartbeat_disk now, *other = (void *)o.page;
	struct device *dev;
	struct fs *fs;

	assert_int_equal(format(o.sim, NULL), 0);
	assert_int_equal(sim_device(o.sim, &dev), 0);
	assert_int_equal(fs_open(dev, &opt, &fs), 0);
	assert_int_equal(sim_peek(o.sim, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, o.page, BLOCK_SIZE), 0);
	memset(other->mount_id, 7, sizeof(other->mount_id));
	log_says("");
	beat(&o);
	nanosleep(&(struct timespec){0, 350000000}, NULL);
	read_beat(o.sim, &now);
	assert_memory_equal(now.mount_id, other->mount_id, sizeof(now.mount_id));
	assert_int_equal(heartbeat_ours(fs), 0);
	assert_int_equal(fs_close(fs), 0);
	read_beat(o.sim, &now);
	assert_memory_equal(now.mount_id, other->mount_id, sizeof(now.mount_id));
	assert_int_equal(get32(now.state), HB_MOUNTED);
	assert_true(log_says("elsewhere by process 4711"));
	sim_destroy(o.sim);
}

static void mounted_elsewhere_is_refused(void **state)
{
	struct other_host o = {.sim = new_sim(16384)};
	struct timespec begin;
	pthread_t thread;

	assert_int_equal(format(o.sim, NULL), 0);
	assert_int_equal(sim_peek(o.sim, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, o.page, BLOCK_SIZE), 0);
	beat(&o);
	assert_int_equal(pthread_create(&thread, NULL, other_host_thread, &o), 0);
	log_says("");
	assert_int_equal(open_close(o.sim, NULL), -ERR_DEV_IN_USE);
	assert_true(log_says("elsewhere by process 4711"));
	assert_int_equal(look(o.sim), -ERR_DEV_IN_USE);
	assert_int_equal(format(o.sim, &(struct mkfs_options){.force = true}), -ERR_DEV_IN_USE);
	atomic_store(&o.stop, true);
	pthread_join(thread, NULL);
	/* It has died: one interval of waiting. */
	assert_int_equal(look(o.sim), 1);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	assert_int_equal(open_close(o.sim, NULL), 0);
	assert_true(seconds_since(&begin) >= 0.1);
	assert_int_equal(look(o.sim), 0);
	log_says("");
	sim_destroy(o.sim);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(new_filesystem_has_a_root_directory),
		cmocka_unit_test(every_size_mounts),
		cmocka_unit_test(large_device_is_formatted_with_few_writes),
		cmocka_unit_test(impossible_wishes_are_refused),
		cmocka_unit_test(interrupted_mkfs_leaves_none_or_all),
		cmocka_unit_test(mkfs_refuses_what_is_in_use),
		cmocka_unit_test(mkfs_names_a_foreign_signature),
		cmocka_unit_test(same_wishes_same_bytes),
		cmocka_unit_test(damaged_superblocks),
		cmocka_unit_test(features_and_sizes_of_others),
		cmocka_unit_test(close_keeps_abandon_loses_what_is_not_durable),
		cmocka_unit_test(lazy_times_are_written),
		cmocka_unit_test(open_survives_a_failure_of_any_io),
		cmocka_unit_test(heartbeat_moves_while_mounted),
		cmocka_unit_test(a_replaced_mount_says_nothing_any_more),
		cmocka_unit_test(a_mount_knows_when_it_was_replaced),
		cmocka_unit_test(mounted_elsewhere_is_refused),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
