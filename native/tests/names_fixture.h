/* SPDX-License-Identifier: MIT
 *
 * names_fixture.h - a filesystem on a simulated device, for the tests of names: format, mount,
 * remount, power cut.
 *
 * Brings cmocka and the core's headers with it.
 */
#ifndef NAMES_FIXTURE_H
#define NAMES_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "acl.h"
#include "alloc.h"
#include "device_sim.h"
#include "journal.h"
#include "log.h"
#include "namei.h"
#include "reaper.h"
#include "xattr.h"

/* A call of the core that must succeed. */
#define OK(call)                                                                            \
	do {                                                                                \
		long ok_rc_ = (call);                                                       \
		if (ok_rc_ < 0)                                                             \
			fail_msg("%s: %s", #call, err_name((int)ok_rc_));                   \
	} while (0)
/* Waits for log space as a front would; for calls that return -ERR_JOURNAL_FULL. */
#define RETRY(rc, call)                                                                     \
	while (((rc) = (call)) == -ERR_JOURNAL_FULL)                                        \
	OK(jrn_wait_space_blocking(world.fs))

#define DEVICE_BYTES (512ull << 20)

static const struct cred root_cred = {0, 0, 0};

static struct world {
	struct sim *sim;
	struct fs *fs;
	struct fs_options opt;
	struct inode *root;
} world;

static inline void world_mount(void)
{
	struct device *dev;

	OK(sim_device(world.sim, &dev));
	OK(fs_open(dev, &world.opt, &world.fs));
	OK(inode_get_handle(world.fs, 1, 1, &world.root) == 0 ? 0 : -ENOENT);
}

/* world.opt says how it is mounted. */
static inline void world_make(uint64_t bytes, nblocks_t journal_blocks)
{
	struct mkfs_options mk = {.label = "names", .journal_blocks = journal_blocks};
	struct device *dev;

	OK(sim_create(bytes, 4096, 1, &world.sim));
	OK(sim_device(world.sim, &dev));
	OK(fs_mkfs(dev, &mk));
	dev_close(dev);
	world_mount();
}

static inline void world_format(uint64_t bytes, nblocks_t journal_blocks)
{
	world.opt = (struct fs_options){.no_heartbeat = true};
	world_make(bytes, journal_blocks);
}

static inline void world_unmount(void)
{
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	OK(fs_close(world.fs));
	world.fs = NULL;
}

static inline void world_remount(void)
{
	world_unmount();
	world_mount();
}

/* Power cut: what was not durable may be lost. */
static inline void world_crash(uint64_t seed)
{
	fs_abandon(world.fs);
	sim_restart(world.sim, seed);
	world_mount();
}

static inline int setup(void **state)
{
	world_format(DEVICE_BYTES, 0);
	return 0;
}

static inline int teardown(void **state)
{
	char line[256];

	world_unmount();
	sim_destroy(world.sim);
	while (log_next(line, sizeof(line)) > 0)
		if (strstr(line, "reserved") || strstr(line, "damaged") ||
		    strstr(line, "impossible"))
			fail_msg("unexpected in the log: %s", line);
	return 0;
}

static inline struct inode *make_file(struct inode *dir, const char *name)
{
	struct inode *in = NULL;
	int rc;

	RETRY(rc, namei_create(dir, name, strlen(name), S_IFREG | 0644, 0, &root_cred, &in));
	OK(rc);
	return in;
}

static inline struct inode *make_dir(struct inode *dir, const char *name)
{
	struct inode *in = NULL;
	int rc;

	RETRY(rc, namei_mkdir(dir, name, strlen(name), 0755, &root_cred, &in));
	OK(rc);
	return in;
}

/* Number of what a name stands for; 0: nothing. */
static inline inum_t number_of(struct inode *dir, const char *name)
{
	struct inode *in;
	int rc = namei_lookup(dir, name, strlen(name), &in);
	inum_t ino;

	if (rc == -ENOENT)
		return 0;
	OK(rc);
	ino = in->ino;
	inode_put(in);
	return ino;
}

static inline struct inode_core core_of(struct inode *in)
{
	struct inode_stat st;

	namei_stat(in, &st);
	return st.core;
}

#endif
