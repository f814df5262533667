/* SPDX-License-Identifier: MIT
 *
 * test_holder.c - holders: their records over restarts, their states, events, and what happens when
 * the time for a recall is over. Grants are made by hand; time is virtual.
 */
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

static void wake(void *arg)
{
	woken++;
}

static int setup(void **state)
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

static int teardown(void **state)
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
static void restart(void)
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

static void forward(uint64_t ns)
{
	layouts_set_clock(world.fs, layouts_now(world.fs) + ns);
	layouts_settle(world.fs);
}

static uint64_t reg_key;

static uint64_t reg(void)
{
	uint64_t id;

	OK(holder_register(world.fs, &some_spec, sink, &id, &reg_key));
	return id;
}

static struct holder_look look(uint64_t id)
{
	struct holder_look out;
	uint64_t at = id - 1;

	if (holder_list(world.fs, &at, &out, 1) != 1 || out.id != id)
		out = (struct holder_look){ .state = HOLDER_GONE };
	return out;
}

static uint64_t holders_on_disk(void)
{
	uint64_t n;

	fs_rdlock(world.fs);
	n = bt_records(fs_tree(world.fs, TREE_HOLDER));
	fs_unlock(world.fs);
	return n;
}

static uint64_t counter(const _Atomic uint64_t *c)
{
	return atomic_load(c);
}
#define COUNTER(name) counter(&layouts_counters(world.fs)->name)

/* The events of a type that are in the sink now; the last one to *out. Others are dropped. */
static unsigned events(struct event_sink *from, enum layout_event_type type,
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

static void grant(unsigned file, uint64_t id, enum seg_kind kind, uint64_t start, uint64_t end)
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

static uint64_t give_back(unsigned file, uint64_t id, uint64_t start, uint64_t end)
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

static void start_write(struct flight *f, unsigned file, uint64_t off, uint64_t len)
{
	flight_start(f, &(struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len,
					.pattern = 7 });
	OK(ioctx_run(world.ctx, false));
}

/* ---- records -------------------------------------------------------------------------------- */

static void a_record_outlives_a_power_cut(void **state)
{
	uint64_t id = reg(), key = reg_key, other;
	struct holder_look was;

	assert_true(id > 0 && key != 0);
	assert_int_equal(holder_check(world.fs, id, key), 0);
	assert_int_equal(holder_check(world.fs, id, key + 1), -EKEYREJECTED);
	assert_int_equal(holder_check(world.fs, id + 1, key), -ENOENT);
	OK(jrn_force_blocking(world.fs, holder_find(world.fs->layouts, id)->xid));
	restart();
	was = look(id);
	assert_int_equal(was.state, HOLDER_LOST);
	assert_memory_equal(&was.spec, &some_spec, sizeof(some_spec));
	assert_int_equal(world.fs->layouts->nlost, 1);
	assert_int_equal(holder_check(world.fs, id, key), -EOWNERDEAD);
	assert_int_equal(holder_resume(world.fs, id, key ^ 1, sink), -EKEYREJECTED);
	assert_int_equal(holder_resume(world.fs, id + 7, key, sink), -ENOENT);
	assert_int_equal(holder_resume(world.fs, id, key, sink), 0);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(world.fs->layouts->nlost, 0);
	assert_int_equal(holder_resume(world.fs, id, key, sink), -EBUSY);
	other = reg();
	assert_true(other > id);
	assert_int_not_equal(reg_key, key);
	/* It was resumed: the end of the grace leaves it alone. */
	forward(RECALL_NS);
	assert_int_equal(look(id).state, HOLDER_LIVE);
}

static void who_held_nothing_and_does_not_come_back_goes(void **state)
{
	uint64_t id = reg();

	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	restart();
	/* Nothing to fence. */
	assert_int_equal(events(layouts_sink(world.fs), EVENT_FENCE_WANTED, NULL), 0);
	forward(RECALL_NS - SECOND); /* the mount itself took some time */
	assert_int_equal(look(id).state, HOLDER_LOST);
	forward(SECOND);
	assert_int_equal(look(id).state, HOLDER_GONE);
	assert_int_equal(holders_on_disk(), 0);
	assert_true(reg() > id);
}

static void gone_needs_empty_hands(void **state)
{
	uint64_t id = reg();
	struct layout_event ev;

	grant(0, id, SEG_GRANT_READ, 0, 8192);
	assert_int_equal(look(id).grants, 1);
	assert_int_equal(holder_gone(world.fs, id), -EBUSY);
	assert_int_equal(give_back(0, id, 0, 8192), 8192);
	assert_int_equal(holder_gone(world.fs, id), 0);
	assert_int_equal(holder_check(world.fs, id, reg_key), -ENOENT);
	assert_int_equal(holder_gone(world.fs, id), -ENOENT);
	assert_int_equal(holders_on_disk(), 0);
	assert_int_equal(events(layouts_sink(world.fs), EVENT_HOLDER_GONE, &ev), 1);
	assert_int_equal(ev.holder, id);
	assert_true(reg() > id);
}

static void an_operation_under_way_keeps_its_holder(void **state)
{
	struct layouts *ls = world.fs->layouts;
	uint64_t id = reg();
	struct holder *h, *none;

	OK(holder_enter(ls, id, true, &h));
	assert_int_equal(holder_gone(world.fs, id), -EBUSY);
	OK(holder_lost(world.fs, id));
	assert_int_equal(look(id).state, HOLDER_LOST); /* not GONE: it may still get something */
	assert_int_equal(holder_enter(ls, id, true, &none), -EOWNERDEAD);
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(h->state, HOLDER_GONE);
	assert_int_equal(holders_on_disk(), 1);
	assert_int_equal(holder_enter(ls, id, false, &none), -ENOENT);
	holder_leave(ls, h);
	layouts_settle(world.fs);
	assert_int_equal(holders_on_disk(), 0);
}

static void fenced_holders_vanish_with_their_grants(void **state)
{
	uint64_t id = reg();
	struct layout_event ev;

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	grant(1, id, SEG_GRANT_READ, 0, 4096);
	assert_int_equal(holder_fenced(world.fs, id), -EBUSY);
	assert_int_equal(holder_fenced(world.fs, id + 1), -ENOENT);
	OK(holder_lost(world.fs, id));
	assert_int_equal(look(id).state, HOLDER_LOST);
	assert_int_equal(look(id).grants, 2);
	assert_int_equal(events(layouts_sink(world.fs), EVENT_FENCE_WANTED, &ev), 1);
	assert_int_equal(ev.holder, id);
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(look(id).state, HOLDER_GONE);
	assert_int_equal(holders_on_disk(), 0);
	assert_int_equal(events(layouts_sink(world.fs), EVENT_HOLDER_GONE, &ev), 1);
	assert_false(seg_any(world.file[0]));
	assert_false(seg_any(world.file[1]));
	assert_int_equal(world.fs->layouts->nlost, 0);
	assert_int_equal(COUNTER(fences), 1);
}

static void a_user_has_so_many_holders(void **state)
{
	struct holder_spec spec = some_spec;
	uint64_t first = 0, id, key;

	spec.uid = 1000;
	for (unsigned i = 0; i < HOLDERS_PER_UID; i++) {
		OK(holder_register(world.fs, &spec, sink, &id, &key));
		first = i ? first : id;
	}
	assert_int_equal(holder_register(world.fs, &spec, sink, &id, &key), -EAGAIN);
	spec.uid = 1001;
	OK(holder_register(world.fs, &spec, sink, &id, &key));
	spec.uid = 0;
	OK(holder_register(world.fs, &spec, sink, &id, &key));
	OK(holder_gone(world.fs, first));
	spec.uid = 1000;
	OK(holder_register(world.fs, &spec, sink, &id, &key));
	assert_int_equal(holder_register(world.fs, &spec, sink, &id, &key), -EAGAIN);
}

static void closing_the_sink_ends_its_holders(void **state)
{
	struct event_sink *mine = event_sink_create(world.fs, NULL, NULL);
	uint64_t with, without, key, other = reg();

	OK(holder_register(world.fs, &some_spec, mine, &with, &key));
	OK(holder_register(world.fs, &some_spec, mine, &without, &key));
	grant(0, with, SEG_GRANT_READ, 0, 4096);
	event_sink_destroy(world.fs, mine);
	layouts_settle(world.fs);
	assert_int_equal(look(with).state, HOLDER_LOST);
	assert_int_equal(look(without).state, HOLDER_GONE);
	assert_int_equal(look(other).state, HOLDER_LIVE);
	assert_int_equal(holders_on_disk(), 2);
}

static void nothing_starts_on_a_read_only_mount(void **state)
{
	uint64_t id, key;

	event_sink_destroy(world.fs, sink);
	put_files();
	world_close();
	world.opt.read_only = true;
	OK(world_open());
	find_files();
	sink = event_sink_create(world.fs, wake, NULL);
	assert_int_equal(holder_register(world.fs, &some_spec, sink, &id, &key), -EROFS);
	assert_int_equal(layout_recall(world.file[0], 0, IOMODE_ANY, 0, 4096), -EROFS);
	layouts_settle(world.fs);
	assert_false(world.fs->layouts->running);
}

/* ---- events --------------------------------------------------------------------------------- */

static void post(uint64_t n)
{
	struct layouts *ls = world.fs->layouts;

	pthread_mutex_lock(&ls->mutex);
	event_post(ls, sink, &(struct layout_event){ .type = EVENT_REVOKED, .offset = n });
	pthread_mutex_unlock(&ls->mutex);
}

static void expect(enum layout_event_type type, uint64_t seq, uint64_t offset, uint64_t length)
{
	struct layout_event ev;

	assert_true(event_next(world.fs, sink, &ev));
	assert_int_equal(ev.type, type);
	assert_int_equal(ev.seq, seq);
	assert_int_equal(ev.offset, offset);
	assert_int_equal(ev.length, length);
}

static void events_are_told_in_order_and_lost_ones_counted(void **state)
{
	struct layout_event ev;

	assert_false(event_any(world.fs, sink));
	for (uint64_t n = 1; n <= EVENT_RING + 10; n++)
		post(n);
	assert_int_equal(woken, 1);
	assert_int_equal(COUNTER(events_lost), 10);
	expect(EVENT_REVOKED, 1, 1, 0);
	post(EVENT_RING + 11); /* there is no room for the gap and for this one */
	for (uint64_t n = 2; n <= 4; n++)
		expect(EVENT_REVOKED, n, n, 0);
	post(EVENT_RING + 12);
	post(EVENT_RING + 13);
	post(EVENT_RING + 14);
	post(EVENT_RING + 15);
	for (uint64_t n = 5; n <= EVENT_RING; n++)
		expect(EVENT_REVOKED, n, n, 0);
	expect(EVENT_OVERFLOW, EVENT_RING + 11, 0, 11);
	for (uint64_t n = 12; n <= 14; n++)
		expect(EVENT_REVOKED, EVENT_RING + n, EVENT_RING + n, 0);
	/* The fourth found the ring full again, and nothing came after it. */
	assert_true(event_any(world.fs, sink));
	expect(EVENT_OVERFLOW, EVENT_RING + 15, 0, 1);
	assert_false(event_next(world.fs, sink, &ev));
	assert_int_equal(woken, 1);
	post(1);
	assert_int_equal(woken, 2);
	expect(EVENT_REVOKED, EVENT_RING + 16, 1, 0);
}

static void the_daemon_sees_its_events(void **state)
{
	struct pollfd pfd = { .fd = layouts_event_fd(world.fs), .events = POLLIN };
	uint64_t id = reg(), value;
	struct layout_event ev;

	assert_int_equal(poll(&pfd, 1, 0), 0);
	grant(0, id, SEG_GRANT_READ, 0, 4096);
	OK(holder_lost(world.fs, id));
	assert_int_equal(poll(&pfd, 1, 0), 1);
	assert_int_equal(read(pfd.fd, &value, sizeof(value)), sizeof(value));
	assert_true(event_next(world.fs, layouts_sink(world.fs), &ev));
	assert_int_equal(ev.type, EVENT_FENCE_WANTED);
	assert_int_equal(poll(&pfd, 1, 0), 0);
}

static void a_change_of_the_map_is_told_until_asked_again(void **state)
{
	uint64_t id = reg();
	struct layout_event ev;

	OK(layout_watch(world.file[0], id, true));
	OK(do_write(0, 0, 4096, 3));
	assert_int_equal(events(sink, EVENT_MAP_CHANGED, &ev), 1);
	assert_int_equal(ev.ino, world.file[0]->ino);
	assert_int_equal(ev.holder, id);
	OK(do_write(0, 8192, 4096, 3));
	assert_int_equal(events(sink, EVENT_MAP_CHANGED, NULL), 0);
	layout_map_asked(world.file[0]);
	OK(do_write(0, 8192, 4096, 3)); /* in place: no change */
	assert_int_equal(events(sink, EVENT_MAP_CHANGED, NULL), 0);
	OK(do_truncate(0, 0));
	assert_int_equal(events(sink, EVENT_MAP_CHANGED, NULL), 1);
	layout_map_asked(world.file[0]);
	OK(layout_watch(world.file[0], id, false));
	OK(do_write(0, 0, 4096, 3));
	assert_int_equal(events(sink, EVENT_MAP_CHANGED, NULL), 0);
	OK(layout_watch(world.file[0], id, true));
	OK(layout_watch(world.file[1], id, true));
	assert_int_equal(world.file[1]->refs, 2);
	OK(holder_lost(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(world.file[1]->refs, 1);
	assert_int_equal(layout_watch(world.file[0], id, true), -ENOENT);
}

/* ---- recalls -------------------------------------------------------------------------------- */

static void a_return_in_time_lets_the_writer_go_on(void **state)
{
	uint64_t id = reg(), buckets[LATENCY_BUCKETS], n = 0;
	struct layout_event ev;
	struct flight f;

	grant(0, id, SEG_GRANT_RW, 0, 1u << 20);
	start_write(&f, 0, 8192, 4096);
	assert_false(f.done);
	assert_int_equal(events(sink, EVENT_RECALL, &ev), 1);
	assert_int_equal(ev.ino, world.file[0]->ino);
	assert_int_equal(ev.generation, world.file[0]->core.generation);
	assert_int_equal(ev.offset, 8192);
	assert_int_equal(ev.length, 4096);
	assert_int_equal(ev.iomode, IOMODE_RW);
	assert_int_equal(ev.left_ms, RECALL_NS / 1000000);
	forward(RECALL_NS - 1);
	OK(ioctx_run(world.ctx, false));
	assert_false(f.done);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(give_back(0, id, 8192, 12288), 4096);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	flight_end(&f);
	forward(10 * RECALL_NS);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(look(id).grants, 2);
	assert_int_equal(COUNTER(recalls_answered), 1);
	assert_int_equal(COUNTER(recalls_missed), 0);
	layouts_latency(world.fs, LATENCY_RECALL, buckets);
	for (unsigned i = 0; i < LATENCY_BUCKETS; i++)
		n += buckets[i];
	assert_int_equal(n, 1);
	assert_int_equal(buckets[23], 1); /* 10 s is more than 2^23 us */
	give_back(0, id, 0, UINT64_MAX);
}

static void a_missed_deadline_takes_the_range(void **state)
{
	uint64_t id = reg();
	struct layout_event ev;
	struct flight f;

	grant(0, id, SEG_GRANT_RW, 0, 1u << 20);
	start_write(&f, 0, 8192, 4096);
	events(sink, EVENT_RECALL, NULL);
	forward(RECALL_NS);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	flight_end(&f);
	assert_int_equal(look(id).state, HOLDER_LOST);
	assert_int_equal(look(id).missed, 1);
	assert_int_equal(COUNTER(recalls_missed), 1);
	assert_int_equal(events(sink, EVENT_REVOKED, &ev), 1);
	assert_int_equal(ev.offset, 8192);
	assert_int_equal(ev.length, 4096);
	assert_int_equal(look(id).grants, 2); /* the rest is still its own */
	assert_int_equal(events(layouts_sink(world.fs), EVENT_FENCE_WANTED, NULL), 1);
	/* The next range of a lost holder goes at once, and it is not asked. */
	start_write(&f, 0, 65536, 4096);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	flight_end(&f);
	assert_int_equal(COUNTER(recalls), 1);
	assert_int_equal(look(id).grants, 3);
	assert_int_equal(layouts_lost_holder(world.fs, world.file[0]->ino), id);
}

/* The clock that was in use before counts no more, but what was on its way still is. */
static void deadlines_outlive_the_change_of_clocks(void **state)
{
	struct layouts *ls = world.fs->layouts;
	uint64_t id, key;
	struct flight f;

	atomic_store(&ls->virtual_ns, 0);
	OK(holder_register(world.fs, &some_spec, sink, &id, &key));
	grant(0, id, SEG_GRANT_RW, 0, 65536);
	start_write(&f, 0, 0, 4096);
	assert_int_equal(events(sink, EVENT_RECALL, NULL), 1);
	layouts_set_clock(world.fs, SECOND);
	assert_int_equal(layouts_now(world.fs), SECOND);
	forward(RECALL_NS - SECOND); /* less than a second has gone by on the other clock */
	assert_int_equal(look(id).state, HOLDER_LIVE);
	layouts_set_clock(world.fs, SECOND / 2); /* it does not go back */
	forward(SECOND);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	flight_end(&f);
	assert_int_equal(look(id).state, HOLDER_LOST);
}

static void waiters_have_deadlines_of_their_own(void **state)
{
	uint64_t slow = reg(), prompt = reg();
	struct flight a, b;

	grant(0, slow, SEG_GRANT_RW, 0, 65536);
	grant(1, prompt, SEG_GRANT_RW, 0, 65536);
	start_write(&a, 0, 0, 4096);
	forward(RECALL_NS / 2);
	start_write(&b, 1, 0, 4096);
	forward(RECALL_NS / 2);
	flight_wait(&a);
	OK(ioctx_run(world.ctx, false));
	assert_false(b.done);
	assert_int_equal(look(slow).state, HOLDER_LOST);
	assert_int_equal(look(prompt).state, HOLDER_LIVE);
	assert_null(world.fs->layouts->due_head->due_next);
	give_back(1, prompt, 0, 65536);
	flight_wait(&b);
	assert_null(world.fs->layouts->due_head);
	assert_null(world.fs->layouts->due_tail);
	flight_end(&a);
	flight_end(&b);
}

/* Two in the way: the lost one is no reason to hurry the other. */
static void each_holder_has_its_time(void **state)
{
	uint64_t lost = reg(), live = reg();
	struct flight f;

	grant(0, lost, SEG_GRANT_READ, 0, 65536);
	grant(0, live, SEG_GRANT_READ, 0, 65536);
	OK(holder_lost(world.fs, lost));
	start_write(&f, 0, 0, 4096); /* a hole: contradicts READ grants */
	layouts_settle(world.fs);
	assert_int_equal(look(lost).grants, 1); /* [4096, 65536) */
	assert_int_equal(COUNTER(revokes), 1);
	assert_int_equal(look(live).state, HOLDER_LIVE);
	assert_false(f.done);
	forward(RECALL_NS - 1);
	assert_int_equal(look(live).state, HOLDER_LIVE);
	forward(1);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	assert_int_equal(look(live).state, HOLDER_LOST);
	assert_int_equal(layouts_lost_holder(world.fs, world.file[0]->ino), QUARANTINE_ANY);
	flight_end(&f);
}

static void a_resumed_holder_is_asked_anew(void **state)
{
	uint64_t id = reg(), key = reg_key;
	struct flight f;

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	start_write(&f, 0, 0, 4096);
	assert_true(file_cancel(&f.fop));
	flight_wait(&f);
	assert_int_equal(f.fop.result, -EINTR);
	flight_end(&f);
	assert_null(world.fs->layouts->due_head);
	forward(2 * RECALL_NS); /* nobody wants it any more: nothing is taken */
	assert_int_equal(look(id).state, HOLDER_LIVE);
	OK(holder_lost(world.fs, id));
	OK(holder_resume(world.fs, id, key, sink));
	events(sink, EVENT_RECALL, NULL);
	start_write(&f, 0, 0, 4096);
	layouts_settle(world.fs);
	assert_int_equal(events(sink, EVENT_RECALL, NULL), 1);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	give_back(0, id, 0, 65536);
	flight_wait(&f);
	flight_end(&f);
}

/* Who waits for a holder that is lost meanwhile waits no longer; but not if it came back. */
static void a_loss_ends_the_waiting(void **state)
{
	uint64_t id = reg(), other = reg(), key = reg_key;
	struct flight a, b, c;

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	grant(1, other, SEG_GRANT_RW, 0, 65536);
	start_write(&b, 1, 0, 4096);
	start_write(&a, 0, 0, 4096);
	OK(holder_lost(world.fs, id));
	layouts_settle(world.fs);
	flight_wait(&a);
	assert_int_equal(a.fop.result, 4096);
	assert_int_equal(look(id).grants, 1);
	assert_false(b.done);
	/* A lost one is served before those who still have to wait. */
	start_write(&c, 0, 8192, 4096);
	layouts_settle(world.fs);
	flight_wait(&c);
	assert_int_equal(c.fop.result, 4096);
	/* Without the thread in between: it was away, and has its time from now on. */
	forward(RECALL_NS - 1);
	pthread_mutex_lock(&world.fs->layouts->mutex);
	holder_find(world.fs->layouts, other)->state = HOLDER_LOST;
	world.fs->layouts->nlost++;
	pthread_mutex_unlock(&world.fs->layouts->mutex);
	OK(holder_resume(world.fs, other, key, sink));
	events(sink, EVENT_RECALL, NULL);
	forward(1);
	assert_int_equal(events(sink, EVENT_RECALL, NULL), 1);
	assert_int_equal(look(other).state, HOLDER_LIVE);
	forward(RECALL_NS - 1);
	assert_int_equal(look(other).state, HOLDER_LIVE);
	forward(1);
	assert_int_equal(look(other).state, HOLDER_LOST);
	flight_wait(&b);
	assert_int_equal(b.fop.result, 4096);
	flight_end(&a);
	flight_end(&b);
	flight_end(&c);
}

static void asked_again_it_is_told_once(void **state)
{
	uint64_t id = reg();
	struct layout_event ev;

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	for (unsigned i = 0; i < 100; i++)
		OK(layout_recall(world.file[0], 0, IOMODE_ANY, 4096, 8192));
	assert_int_equal(events(sink, EVENT_RECALL, &ev), 1);
	assert_int_equal(ev.offset, 4096);
	assert_int_equal(ev.length, 8192);
	assert_int_equal(COUNTER(recalls_asked), 1);
	assert_int_equal(world.fs->layouts->timed_serial, 1);
	OK(layout_recall(world.file[0], id, IOMODE_READ, 0, 65536));
	OK(layout_recall(world.file[0], id + 1, IOMODE_ANY, 0, 65536));
	assert_int_equal(events(sink, EVENT_RECALL, NULL), 0);
	forward(RECALL_NS - 1);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	forward(1); /* nobody waits, and it is taken all the same */
	assert_int_equal(look(id).state, HOLDER_LOST);
	assert_int_equal(events(sink, EVENT_REVOKED, &ev), 1);
	assert_int_equal(ev.offset, 4096);
	assert_int_equal(ev.length, 8192);
	assert_true(RB_EMPTY(&world.fs->layouts->timed));
}

static void an_answer_ends_a_recall_that_was_asked_for(void **state)
{
	uint64_t id = reg();

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	OK(layout_recall(world.file[0], id, IOMODE_RW, 4096, 8192));
	give_back(0, id, 4096, 12288);
	grant(0, id, SEG_GRANT_RW, 4096, 12288); /* newer than the recall */
	forward(RECALL_NS);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(look(id).grants, 3);
	OK(layout_recall(world.file[0], id, IOMODE_RW, 4096, 8192));
	forward(RECALL_NS);
	assert_int_equal(look(id).state, HOLDER_LOST);
	assert_int_equal(look(id).grants, 2);
}

static void an_unlinked_file_is_asked_for(void **state)
{
	uint64_t id = reg();
	struct layout_event ev;

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	OK(layout_watch(world.file[0], id, true));
	OK(namei_unlink(world.root, name_of(0), strlen(name_of(0)), NULL));
	assert_int_equal(events(sink, EVENT_RECALL, &ev), 1);
	assert_int_equal(ev.offset, 0);
	assert_int_equal(ev.length, 65536);
	assert_int_equal(COUNTER(recalls_unlink), 1);
	give_back(0, id, 0, 65536);
	layouts_settle(world.fs); /* the watch, too, is over */
	inode_put(world.file[0]);
	world.file[0] = NULL;
	reaper_drain(world.fs);
	OK(namei_create(world.root, name_of(0), strlen(name_of(0)), S_IFREG | 0644, 0, &root_cred,
			&world.file[0]));
}

static void a_pin_ends_by_itself(void **state)
{
	uint64_t id = reg(), until = layouts_now(world.fs) + SECOND;
	struct layouts *ls = world.fs->layouts;
	struct layout_event ev;
	struct flight f;
	struct seg *s;

	OK(pin_timer(ls, world.file[0]->ino, id, until));
	grant(0, id, SEG_GRANT_PIN, 0, 65536);
	pthread_mutex_lock(&world.file[0]->lock);
	s = seg_next_grant_locked(world.file[0], ALL_GRANTS, id, 0, UINT64_MAX, NULL);
	GRANT_OF(s)->until = until;
	pthread_mutex_unlock(&world.file[0]->lock);
	start_write(&f, 0, 0, 4096);
	assert_int_equal(events(sink, EVENT_RECALL, NULL), 1);
	forward(SECOND - 1);
	assert_int_equal(look(id).grants, 1);
	forward(1);
	assert_int_equal(look(id).grants, 0);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(events(sink, EVENT_PIN_EXPIRED, &ev), 1);
	assert_int_equal(ev.length, 65536);
	assert_int_equal(COUNTER(pins_expired), 1);
	assert_int_equal(COUNTER(recalls_answered), 0);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	flight_end(&f);
}

static void a_pin_in_the_way_is_dropped_at_the_deadline(void **state)
{
	uint64_t id = reg();
	struct flight f;

	grant(0, id, SEG_GRANT_PIN, 0, 65536);
	start_write(&f, 0, 0, 4096);
	forward(RECALL_NS);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 4096);
	assert_int_equal(look(id).state, HOLDER_LIVE); /* it could not have changed anything */
	assert_int_equal(look(id).grants, 0);
	assert_int_equal(COUNTER(revokes), 0);
	flight_end(&f);
}

static void stopping_ends_all_waiting(void **state)
{
	uint64_t id = reg();
	struct flight f[3];

	grant(0, id, SEG_GRANT_RW, 0, 65536);
	for (unsigned i = 0; i < 3; i++)
		start_write(&f[i], 0, i * 4096, 4096);
	layouts_stop(world.fs);
	for (unsigned i = 0; i < 3; i++) {
		flight_wait(&f[i]);
		assert_int_equal(f[i].fop.result, -EIO);
		flight_end(&f[i]);
	}
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(COUNTER(revokes), 0);
}

/* ---- threads -------------------------------------------------------------------------------- */

static _Atomic bool over;
static _Atomic unsigned written, failed;

static void stress_done(struct file_op *fop)
{
	atomic_store((_Atomic bool *)fop->user, true);
}

static void *write_all_the_time(void *arg)
{
	uint8_t *mem = io_alloc(BLOCK_SIZE);
	uint64_t n = (uintptr_t)arg;
	struct ioctx *ctx;

	OK(ioctx_create(8, &ctx));
	memset(mem, 0x55, BLOCK_SIZE);
	while (!atomic_load(&over)) {
		_Atomic bool done = false;
		struct file_op fop;

		n = n * 6364136223846793005u + 1442695040888963407u;
		file_op_init(&fop, FILE_WRITE, world.file[(n >> 60) % 2], ctx);
		fop.offset = ((n >> 40) % 32) * BLOCK_SIZE;
		fop.len = BLOCK_SIZE;
		fop.buf = mem;
		fop.done = stress_done;
		fop.user = &done;
		file_start(&fop);
		while (!atomic_load(&done)) {
			if ((n >> 33) % 16 == 0)
				file_cancel(&fop);
			OK(ioctx_run(ctx, true));
		}
		atomic_fetch_add(fop.result == BLOCK_SIZE ? &written : &failed, 1);
		if (fop.result < 0 && fop.result != -EINTR)
			fail_msg("write: %s", err_name((int)fop.result));
	}
	ioctx_destroy(ctx);
	io_free(mem);
	return NULL;
}

static bool try_grant(uint64_t id, struct inode *in, uint64_t start, uint64_t end)
{
	struct layouts *ls = world.fs->layouts;
	struct grant *spare[3] = { grant_alloc(), grant_alloc(), grant_alloc() };
	struct grant_list dead = { NULL };
	struct holder *h;
	struct seg s;
	bool ok;

	ok = holder_enter(ls, id, true, &h) == 0;
	if (ok) {
		seg_init(&s, SEG_GET_RW, start, end, NULL);
		s.holder = id;
		ok = seg_try(in, &s) == 0;
		if (ok) {
			pthread_mutex_lock(&in->lock);
			grant_add_locked(in, h, &s, SEG_GRANT_RW, start, end, 0, spare, &dead);
			pthread_mutex_unlock(&in->lock);
		}
		holder_leave(ls, h);
	}
	for (unsigned i = 0; i < 3; i++)
		grant_free(spare[i]);
	grant_list_free(world.fs, &dead);
	return ok;
}

/* Writers on two threads; a holder that answers some recalls and misses others, and comes back. */
static void threads_and_a_real_clock(void **state)
{
	struct timespec pause = { 0, 200000 };
	uint64_t id, key, granted = 0, resumed = 0;
	struct layout_event ev;
	pthread_t threads[2];

	event_sink_destroy(world.fs, sink);
	put_files();
	world_close();
	world.opt.recall_ms = 5;
	OK(world_open());
	find_files();
	sink = event_sink_create(world.fs, NULL, NULL);
	id = reg();
	key = reg_key;
	rng_seed(5);
	atomic_store(&over, false);
	atomic_store(&written, 0);
	atomic_store(&failed, 0);
	for (uintptr_t i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, write_all_the_time,
						(void *)(i + 1)), 0);
	for (unsigned i = 0; i < 4000; i++) {
		uint64_t start = below(32) * BLOCK_SIZE;

		granted += try_grant(id, world.file[i & 1], start, start + (1 + below(8)) * BLOCK_SIZE);
		while (event_next(world.fs, sink, &ev))
			if (ev.type == EVENT_RECALL && below(8))
				give_back(world.file[0]->ino == ev.ino ? 0 : 1, id, ev.offset,
					  ev.offset + ev.length);
		resumed += holder_resume(world.fs, id, key, sink) == 0;
		nanosleep(&pause, NULL);
	}
	atomic_store(&over, true);
	OK(holder_lost(world.fs, id));
	for (unsigned i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	print_message("%u writes, %u interrupted, %llu grants, %llu recalls, %llu answered, "
		      "%llu missed, %llu came back\n", atomic_load(&written), atomic_load(&failed),
		      (unsigned long long)granted, (unsigned long long)COUNTER(recalls),
		      (unsigned long long)COUNTER(recalls_answered),
		      (unsigned long long)COUNTER(recalls_missed), (unsigned long long)resumed);
	assert_true(granted > 10 && atomic_load(&written) > 10);
	assert_true(COUNTER(recalls_answered) > 0 && COUNTER(recalls_missed) > 0 && resumed > 0);
	layouts_settle(world.fs);
	assert_null(world.fs->layouts->due_head);
	assert_int_equal(world.fs->layouts->working, 0);
	if (look(id).state == HOLDER_LOST)
		OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(holders_on_disk(), 0);
	assert_false(seg_any(world.file[0]));
	assert_false(seg_any(world.file[1]));
}

/* ---- the lost set --------------------------------------------------------------------------- */

static void add_lost(inum_t ino, uint64_t id)
{
	struct trans t;

	OK(trans_begin(world.fs, &t, 1));
	OK(lost_add(&t, ino, id));
	trans_commit(&t);
}

static void lost_inodes_are_known_by_number(void **state)
{
	uint64_t a = reg(), key = reg_key, b = reg();
	inum_t one = world.file[0]->ino, two = world.file[1]->ino;

	assert_int_equal(layouts_lost_holder(world.fs, one), 0);
	grant(0, a, SEG_GRANT_READ, 0, 4096);
	OK(holder_lost(world.fs, a));
	add_lost(one, a);
	add_lost(one, a);
	assert_int_equal(layouts_lost_holder(world.fs, one), a);
	assert_int_equal(layouts_lost_holder(world.fs, two), 0);
	add_lost(one, b);
	add_lost(two, b);
	assert_int_equal(layouts_lost_holder(world.fs, one), QUARANTINE_ANY);
	assert_int_equal(layouts_lost_holder(world.fs, two), b);
	assert_int_equal(lost_next(world.fs, b, 0), one);
	assert_int_equal(lost_next(world.fs, b, one), two);
	assert_int_equal(lost_next(world.fs, b, two), 0);
	fs_wrlock(world.fs);
	OK(lost_load(world.fs, two, a));
	fs_unlock(world.fs);
	assert_int_equal(layouts_lost_holder(world.fs, two), QUARANTINE_ANY);
	/* Something of `one` was taken from it: that stays until it has returned everything. */
	OK(holder_resume(world.fs, a, key, sink));
	assert_int_equal(layouts_lost_holder(world.fs, two), b);
	assert_int_equal(layouts_lost_holder(world.fs, one), QUARANTINE_ANY);
	holder_returned_all(world.fs, a);
	assert_int_equal(layouts_lost_holder(world.fs, one), b);
	fs_wrlock(world.fs);
	lost_del(world.fs, one, b);
	fs_unlock(world.fs);
	assert_int_equal(layouts_lost_holder(world.fs, one), 0);
	assert_int_equal(layouts_lost_holder(world.fs, two), b);
	assert_int_equal(atomic_load(&world.fs->layouts->lost_count), 1);
}

static void quarantine_is_counted_by_name(void **state)
{
	uint64_t id = reg();
	struct trans t;

	OK(trans_begin(world.fs, &t, 1));
	OK(holder_quarantined(&t, id, 5));
	assert_int_equal(look(id).quarantined, 5);
	trans_cancel(&t);
	assert_int_equal(look(id).quarantined, 0);
	OK(trans_begin(world.fs, &t, 1));
	OK(holder_quarantined(&t, id, 5));
	OK(holder_quarantined(&t, id, -2));
	trans_commit(&t);
	assert_int_equal(look(id).quarantined, 3);
	assert_int_equal(holder_gone(world.fs, id), -EBUSY);
	OK(trans_begin(world.fs, &t, 1));
	OK(holder_quarantined(&t, id, -3));
	trans_commit(&t);
	OK(holder_gone(world.fs, id));
}

#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(a_record_outlives_a_power_cut),
		T(who_held_nothing_and_does_not_come_back_goes),
		T(gone_needs_empty_hands),
		T(an_operation_under_way_keeps_its_holder),
		T(fenced_holders_vanish_with_their_grants),
		T(a_user_has_so_many_holders),
		T(closing_the_sink_ends_its_holders),
		T(nothing_starts_on_a_read_only_mount),
		T(events_are_told_in_order_and_lost_ones_counted),
		T(the_daemon_sees_its_events),
		T(a_change_of_the_map_is_told_until_asked_again),
		T(a_return_in_time_lets_the_writer_go_on),
		T(a_missed_deadline_takes_the_range),
		T(deadlines_outlive_the_change_of_clocks),
		T(waiters_have_deadlines_of_their_own),
		T(threads_and_a_real_clock),
		T(each_holder_has_its_time),
		T(a_resumed_holder_is_asked_anew),
		T(a_loss_ends_the_waiting),
		T(asked_again_it_is_told_once),
		T(an_answer_ends_a_recall_that_was_asked_for),
		T(an_unlinked_file_is_asked_for),
		T(a_pin_ends_by_itself),
		T(a_pin_in_the_way_is_dropped_at_the_deadline),
		T(stopping_ends_all_waiting),
		T(lost_inodes_are_known_by_number),
		T(quarantine_is_counted_by_name),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
