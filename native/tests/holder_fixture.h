/* SPDX-License-Identifier: MIT
 *
 * holder_fixture.h - on top of the file fixture: holders with grants that are made by hand, in virtual time.
 */
#ifndef HOLDER_FIXTURE_H
#define HOLDER_FIXTURE_H

#include "file_fixture.h"

#include <poll.h>
#include <time.h>
#include <unistd.h>

#include "btree.h"
#include "layout_priv.h"

#define SECOND 1000000000ull
#define RECALL_NS (10 * SECOND)
#define START_NS (1000 * SECOND)

static const struct holder_spec some_spec = {
	.kind = HOLDER_CLIENT, .uid = 0, .pid = 4711, .pid_start = 99, .boot_id = { 1, 2, 3 },
	.fence_key = 0x1234, .name = "a client", .fence = "cgroup:/some/where",
};

static struct event_sink *sink;
static unsigned woken;

static inline void wake(void *arg)
{
	woken++;
}

static inline int setup(void **state)
{
	world_new(64u << 20, 512, 1);
	make_files();
	for (unsigned i = 0; i < FILES; i++)
		OK(do_truncate(i, 1u << 20)); /* all that is written lies below EOF */
	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	layouts_set_clock(world.fs, START_NS);
	sink = event_sink_create(world.fs, wake, NULL);
	assert_non_null(sink);
	woken = 0;
	return 0;
}

static inline int teardown(void **state)
{
	if (!world.fs)
		return 0;
	event_sink_destroy(world.fs, sink);
	put_files();
	world_close();
	world_end();
	return 0;
}

/* After a power cut nothing in memory is left. */
static inline void restart(void)
{
	event_sink_destroy(world.fs, sink);
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sim_restart(world.sim, 1);
	OK(world_open());
	find_files();
	layouts_set_clock(world.fs, START_NS);
	sink = event_sink_create(world.fs, wake, NULL);
}

static inline void forward(uint64_t ns)
{
	layouts_set_clock(world.fs, layouts_now(world.fs) + ns);
	layouts_settle(world.fs);
}

static uint64_t reg_key;

static inline uint64_t reg(void)
{
	uint64_t id;

	OK(holder_register(world.fs, &some_spec, sink, &id, &reg_key));
	return id;
}

static inline struct holder_look look(uint64_t id)
{
	struct holder_look out;
	uint64_t at = id - 1;

	if (holder_list(world.fs, &at, &out, 1) != 1 || out.id != id)
		out = (struct holder_look){ .state = HOLDER_GONE };
	return out;
}

static inline uint64_t holders_on_disk(void)
{
	uint64_t n;

	fs_rdlock(world.fs);
	n = bt_records(fs_tree(world.fs, TREE_HOLDER));
	fs_unlock(world.fs);
	return n;
}

static inline uint64_t counter(const _Atomic uint64_t *c)
{
	return atomic_load(c);
}
#define COUNTER(name) counter(&layouts_counters(world.fs)->name)

/* The events of a type that are in the sink now; the last one to *out. Others are dropped. */
static inline unsigned events(struct event_sink *from, enum layout_event_type type,
		       struct layout_event *out)
{
	struct layout_event ev;
	unsigned n = 0;

	while (event_next(world.fs, from, &ev))
		if (ev.type == type) {
			n++;
			if (out)
				*out = ev;
		}
	return n;
}

static inline void grant(unsigned file, uint64_t id, enum seg_kind kind, uint64_t start, uint64_t end)
{
	struct layouts *ls = world.fs->layouts;
	struct inode *in = world.file[file];
	struct grant *spare[3] = { grant_alloc(), grant_alloc(), grant_alloc() };
	struct grant_list dead = { NULL };
	struct holder *h;
	struct seg s;

	OK(holder_enter(ls, id, true, &h));
	seg_init(&s, kind == SEG_GRANT_READ ? SEG_GET_READ : kind == SEG_GRANT_RW ? SEG_GET_RW :
		 SEG_GET_PIN, start, end, NULL);
	s.holder = id;
	OK(seg_try(in, &s));
	pthread_mutex_lock(&in->lock);
	grant_add_locked(in, h, &s, kind, start, end, 0, spare, &dead);
	pthread_mutex_unlock(&in->lock);
	holder_leave(ls, h);
	for (unsigned i = 0; i < 3; i++)
		grant_free(spare[i]);
	grant_list_free(world.fs, &dead);
}

static inline uint64_t give_back(unsigned file, uint64_t id, uint64_t start, uint64_t end)
{
	struct inode *in = world.file[file];
	struct grant_list dead = { NULL };
	struct grant *spare = NULL;
	uint64_t taken;

	pthread_mutex_lock(&in->lock);
	taken = grant_cut_locked(in, id, ALL_GRANTS, start, end, &spare, &dead);
	pthread_mutex_unlock(&in->lock);
	grant_list_free(world.fs, &dead);
	return taken;
}

static inline void start_write(struct flight *f, unsigned file, uint64_t off, uint64_t len)
{
	flight_start(f, &(struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len,
					.pattern = 7 });
	OK(ioctx_run(world.ctx, false));
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

#endif
