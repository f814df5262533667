/* SPDX-License-Identifier: MIT
 *
 * test_holder.c - holders: their records over restarts, their states, their events, and what the lost ones
 * leave behind.
 */
#include "holder_fixture.h"

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
		T(lost_inodes_are_known_by_number),
		T(quarantine_is_counted_by_name),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
