/* SPDX-License-Identifier: MIT
 *
 * layout_world.h - a world with two holders, which is checked and emptied after each test.
 */
#ifndef LAYOUT_WORLD_H
#define LAYOUT_WORLD_H

#include "layout_fixture.h"

static inline void begin_world(uint64_t bytes)
{
	world_new(bytes, 512, 7);
	new_holder(0);
	new_holder(1);
	world.free_empty = free_blocks();
	make_files();
}

static inline int setup(void **state)
{
	begin_world(64u << 20);
	return 0;
}

/* Whatever the test left: everything can be returned, and every block is free again then. */
static inline int teardown(void **state)
{
	if (world.fs) {
		check_disk();
		OK(give_back_all(holder[0].id));
		OK(give_back_all(holder[1].id));
		check_disk();
		delete_all();
		check_disk();
		world_close();
	}
	sinks_gone();
	world_end();
	return 0;
}

static inline int64_t do_copy(unsigned src, unsigned dst, uint64_t len)
{
	return do_one(&(struct todo){ .act = ACT_COPY, .file = src, .dst = dst, .len = len });
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

#endif
