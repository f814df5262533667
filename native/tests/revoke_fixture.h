/* SPDX-License-Identifier: MIT
 *
 * revoke_fixture.h - on top of the layout fixture: holders that do not answer, a virtual clock, and
 * what they knew.
 */
#ifndef REVOKE_FIXTURE_H
#define REVOKE_FIXTURE_H

#include <unistd.h>

#include "layout_fixture.h"
#include "tree_check.h"

#define DEVICE (96u << 20)
#define RECALL_NS (10ull * 1000000000)
#define B BLOCK_SIZE

static uint64_t now;
static struct layout_extent told[LAYOUT_MAX_EXTENTS];
static unsigned ntold;

static inline void set_clock(void)
{
	now = now ? now : RECALL_NS;
	layouts_set_clock(world.fs, now);
}

static inline int setup(void **state)
{
	now = 0;
	world_new(DEVICE, 512, 7);
	make_files();
	/* The power may be cut before anything else is durable. */
	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	set_clock();
	return 0;
}

static inline int teardown(void **state)
{
	if (world.fs)
		world_close();
	sinks_gone();
	world_end();
	return 0;
}

static inline void pass(uint64_t ns)
{
	now += ns;
	layouts_set_clock(world.fs, now);
	layouts_settle(world.fs);
}

/* Whatever is under way on our own context gets on. */
static inline void turn(void)
{
	for (unsigned i = 0; i < 50; i++)
		OK(ioctx_run(world.ctx, false));
}

static inline nblocks_t quarantined(void)
{
	struct alloc_space sp;

	alloc_statfs(world.fs, &sp);
	return sp.quarantined;
}

static inline struct holder_look look_at(uint64_t id)
{
	struct holder_look look;
	uint64_t from = id - 1;

	assert_int_equal(holder_list(world.fs, &from, &look, 1), 1);
	assert_int_equal(look.id, id);
	return look;
}

static inline void remember(void)
{
	ntold = args.count;
	memcpy(told, ext, ntold * sizeof(*told));
}

/* The holder, which lost its layout and does not know, writes everything that it was told to
 * write. */
static inline void write_stale(uint8_t byte)
{
	static uint8_t block[BLOCK_SIZE];

	memset(block, byte, sizeof(block));
	for (unsigned i = 0; i < ntold; i++) {
		if (told[i].state != INVALID_DATA && told[i].state != READ_WRITE_DATA)
			continue;
		for (uint64_t at = 0; at < told[i].length; at += BLOCK_SIZE)
			OK(sim_poke(world.sim, told[i].device + at, block, BLOCK_SIZE));
	}
}

static inline bool was_told(fsblock_t block)
{
	for (unsigned i = 0; i < ntold; i++)
		if (told[i].state != NONE_DATA && told[i].device >> BLOCK_SHIFT <= block &&
		    block < (told[i].device + told[i].length) >> BLOCK_SHIFT)
			return true;
	return false;
}

/* Nothing that anybody reads or will write lies where the holder knows: blocks [from, to) of the
 * file. */
static inline void check_moved(unsigned file, fileblk_t from, fileblk_t to)
{
	for (fileblk_t at = from; at < to; at++) {
		struct extent e;

		if (state_at(file, FORK_DATA, at, &e) != EXT_HOLE && was_told(e.block))
			fail_msg("block %llu of the file is still where the holder knows it",
				 (unsigned long long)at);
	}
}

static inline void fence(uint64_t id)
{
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
}

/* Nothing is left of anything. */
static inline void check_all_free(void)
{
	check_disk();
	assert_int_equal(quarantined(), 0);
	delete_all();
}

static inline struct flight *start_write(unsigned file, uint64_t off, uint64_t len,
					 uint64_t pattern)
{
	struct flight *f = calloc(1, sizeof(*f));

	flight_start(f, &(struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len,
					.pattern = pattern });
	return f;
}

static inline int64_t finish(struct flight *f)
{
	int64_t rc;

	flight_wait(f);
	rc = f->fop.result;
	flight_end(f);
	free(f);
	return rc;
}

/* A holder with a layout of blocks [0, 8), all written by it (pattern 3), the first four
 * committed. */
static inline uint64_t half_committed(void)
{
	uint64_t h = new_holder(0);

	OK(get(0, h, IOMODE_RW, 0, 8 * B, 0));
	remember();
	holder_write(0, 8 * B, 3);
	OK(commit(0, h, 0, 4 * B, 8 * B));
	return h;
}

#endif
