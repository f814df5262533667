/* SPDX-License-Identifier: MIT
 *
 * test_recall.c - recalls: holders that answer in time, too late, never, and what happens when the time is over.
 */
#include "holder_fixture.h"

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

int main(void)
{
	const struct CMUnitTest tests[] = {
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
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
