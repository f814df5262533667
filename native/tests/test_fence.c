/* SPDX-License-Identifier: MIT
 *
 * test_fence.c - records of fences: which step follows which, what a holder with a record may still
 * do, and what is left at the end.
 */
#include "holder_fixture.h"

/* Waits for log space as a front would. */
#define RETRY(rc, call)                                                                     \
	while (((rc) = (call)) == -ERR_JOURNAL_FULL)                                        \
		OK(jrn_wait_space_blocking(world.fs))

static int put(uint64_t id, enum fence_state state, uint32_t tries)
{
	xid_t xid = 0;
	int rc;

	RETRY(rc, fence_put(world.fs, id, state, tries, &xid));
	assert_int_equal(!xid, rc != 0);
	return rc ? rc : jrn_force_blocking(world.fs, xid);
}

static struct fence fence_of(uint64_t id)
{
	struct fence fence;
	uint64_t from = id - 1;

	if (!fence_list(world.fs, &from, &fence, 1) || fence.holder != id)
		fence = (struct fence){ .state = FENCE_NONE };
	return fence;
}

static uint64_t fences_on_disk(void)
{
	uint64_t n;

	fs_rdlock(world.fs);
	n = bt_records(fs_tree(world.fs, TREE_FENCE));
	fs_unlock(world.fs);
	return n;
}

/* A lost one that has something. */
static uint64_t lost(void)
{
	uint64_t id;
	int rc;

	RETRY(rc, holder_register(world.fs, &some_spec, sink, &id, &reg_key));
	assert_int_equal(rc, 0);
	grant(0, id, SEG_GRANT_READ, 0, BLOCK_SIZE);
	OK(holder_lost(world.fs, id));
	return id;
}

static int return_all(uint64_t id)
{
	struct layout_args args = { .holder = id, .flags = LAYOUT_F_ALL };
	struct flight f = { .mem = NULL };

	file_op_init(&f.fop, FILE_LAYOUT_RETURN, world.root, world.ctx);
	f.fop.layout = &args;
	f.fop.done = flight_done;
	f.fop.user = &f;
	file_start(&f.fop);
	flight_wait(&f);
	return (int)f.fop.result;
}

/* ---- steps ---------------------------------------------------------------------------------- */

static void which_step_follows_which(void **state)
{
	static const struct { enum fence_state state; bool from[5]; } steps[] = {
		{ FENCE_DECIDED, { true, true, false, false, false } },
		{ FENCE_ISSUED, { false, true, true, false, true } },
		{ FENCE_FAILED, { false, false, true, false, true } },
		{ (enum fence_state)3, { false } },
		{ FENCE_NONE, { false } },
		{ (enum fence_state)5, { false } },
	};
	static const enum fence_state way[] = { FENCE_DECIDED, FENCE_ISSUED, FENCE_FAILED };

	for (unsigned from = 0; from <= 3; from++)
		for (unsigned i = 0; i < ARRAY_LEN(steps); i++) {
			uint64_t id = lost();
			enum fence_state at = from ? way[from - 1] : FENCE_NONE;

			for (unsigned n = 0; n < from; n++)
				assert_int_equal(put(id, way[n], 3), 0);
			assert_int_equal(put(id, steps[i].state, 3),
					 steps[i].from[at] ? 0 : -EINVAL);
			assert_int_equal(fence_of(id).state, steps[i].from[at] ? steps[i].state : at);
		}
}

static void tries_never_fall(void **state)
{
	uint64_t id = lost();

	assert_int_equal(put(id, FENCE_DECIDED, 5), 0);
	assert_int_equal(put(id, FENCE_ISSUED, 4), -EINVAL);
	assert_int_equal(put(id, FENCE_ISSUED, 6), 0);
	assert_int_equal(put(id, FENCE_FAILED, 6), 0);
	assert_int_equal(put(id, FENCE_FAILED, UINT32_MAX), 0);
	assert_int_equal(fence_of(id).tries, UINT32_MAX);
}

static void only_lost_ones_are_fenced(void **state)
{
	uint64_t id = reg();

	assert_int_equal(put(id, FENCE_DECIDED, 0), -EBUSY);
	assert_int_equal(put(id + 1, FENCE_DECIDED, 0), -ENOENT);
	grant(0, id, SEG_GRANT_READ, 0, BLOCK_SIZE);
	OK(holder_lost(world.fs, id));
	assert_int_equal(put(id, FENCE_DECIDED, 0), 0);
	OK(holder_fenced(world.fs, id));
	assert_int_equal(put(id, FENCE_ISSUED, 0), -ENOENT);
	assert_int_equal(fences_on_disk(), 0);
}

static void records_outlive_a_power_cut(void **state)
{
	static const enum fence_state way[] = { FENCE_DECIDED, FENCE_ISSUED, FENCE_FAILED };
	struct fence was[3], is[4];
	uint64_t from = 0;

	for (unsigned i = 0; i < 3; i++) {
		uint64_t id = lost();

		for (unsigned n = 0; n <= i; n++)
			assert_int_equal(put(id, way[n], n), 0);
		was[i] = fence_of(id);
		assert_true(was[i].decided > 1600000000 && was[i].tries == i);
		lost(); /* one without */
	}
	restart();
	assert_int_equal(fence_list(world.fs, &from, is, 2), 2);
	assert_int_equal(fence_list(world.fs, &from, is + 2, 2), 1);
	assert_int_equal(fence_list(world.fs, &from, is, 1), 0);
	from = 0;
	assert_int_equal(fence_list(world.fs, &from, is, 4), 3);
	for (unsigned i = 0; i < 3; i++) {
		assert_memory_equal(&is[i], &was[i], sizeof(is[i]));
		assert_int_equal(look(is[i].holder).cause, LOST_MOUNT);
	}
	from = UINT64_MAX;
	assert_int_equal(fence_list(world.fs, &from, is, 4), 0);
}

/* No space is no excuse. */
static void a_full_filesystem_can_record_fences(void **state)
{
	static uint64_t id[2000]; /* leaves enough that the tree has to grow */
	unsigned n = ARRAY_LEN(id);

	for (unsigned i = 0; i < n; i++)
		id[i] = lost();
	for (uint64_t off = 0, len = 1u << 20; len >= BLOCK_SIZE;) {
		int64_t rc = do_one(&(struct todo){ .act = ACT_ALLOC, .file = 1, .off = off,
						    .len = len });

		if (rc)
			len /= 2;
		else
			off += len;
	}
	for (unsigned i = 0; i < n; i++) {
		xid_t xid;
		int rc;

		RETRY(rc, fence_put(world.fs, id[i], FENCE_DECIDED, 0, &xid));
		assert_int_equal(rc, 0);
	}
	assert_int_equal(fences_on_disk(), n);
	for (unsigned i = 0; i < n; i++) {
		int rc;

		RETRY(rc, holder_fenced(world.fs, id[i]));
		assert_int_equal(rc, 0);
	}
	layouts_settle(world.fs);
	assert_int_equal(fences_on_disk() + holders_on_disk(), 0);
}

/* ---- what a holder may still do -------------------------------------------------------------- */

static void who_is_decided_does_not_resume(void **state)
{
	uint64_t id = lost(), key = reg_key;

	assert_int_equal(put(id, FENCE_DECIDED, 0), 0);
	assert_int_equal(holder_resume(world.fs, id, key ^ 1, sink), -EKEYREJECTED);
	assert_int_equal(holder_resume(world.fs, id, key, sink), -EKEYREVOKED);
	assert_int_equal(look(id).state, HOLDER_LOST);
	restart();
	assert_int_equal(holder_resume(world.fs, id, key, sink), -EKEYREVOKED);
	assert_int_equal(holder_gone(world.fs, id), -EBUSY);
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(holder_resume(world.fs, id, key, sink), -ENOENT);
	/* The same client is welcome as a new one, while its server still knows it. */
	assert_true(reg() > id);
}

/* It returns everything and ends; its fence is brought to its end all the same, over a restart. */
static void who_returns_too_late_is_still_fenced(void **state)
{
	uint64_t id = lost(), key = reg_key;

	assert_int_equal(put(id, FENCE_DECIDED, 0), 0);
	assert_int_equal(return_all(id), 0);
	OK(holder_lost(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(look(id).state, HOLDER_LOST);
	assert_int_equal(look(id).grants, 0);
	assert_true(look(id).returned);
	assert_int_equal(holder_gone(world.fs, id), -EBUSY);
	OK(jrn_force_blocking(world.fs, jrn_running(world.fs)));
	restart();
	assert_int_equal(events(layouts_sink(world.fs), EVENT_FENCE_WANTED, NULL), 1);
	assert_false(look(id).returned);
	forward(2 * RECALL_NS); /* others that hold nothing would go */
	assert_int_equal(look(id).state, HOLDER_LOST);
	assert_int_equal(holder_resume(world.fs, id, key, sink), -EKEYREVOKED);
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(fences_on_disk() + holders_on_disk(), 0);
}

/* Confirmed when it has nothing: all goes at once. */
static void who_has_returned_all_is_fenced(void **state)
{
	uint64_t id = lost();

	assert_int_equal(put(id, FENCE_DECIDED, 0), 0);
	assert_int_equal(return_all(id), 0);
	layouts_settle(world.fs);
	OK(holder_fenced(world.fs, id));
	assert_int_equal(fences_on_disk() + holders_on_disk(), 0);
}

/* The same without a record: it is live again, and may go. */
static void who_returns_in_time_is_not(void **state)
{
	uint64_t id = lost();

	assert_int_equal(look(id).cause, LOST_ENDED);
	assert_int_equal(return_all(id), 0);
	layouts_settle(world.fs);
	assert_int_equal(look(id).state, HOLDER_LIVE);
	assert_int_equal(look(id).cause, LOST_NOT);
	assert_int_equal(put(id, FENCE_DECIDED, 0), -EBUSY);
	OK(holder_gone(world.fs, id));
}

/* ---- the end -------------------------------------------------------------------------------- */

static void how_it_went_is_told(void **state)
{
	uint64_t id = lost(), other = reg();
	struct layout_event ev = { 0 };

	assert_int_equal(put(id, FENCE_DECIDED, 0), 0);
	OK(holder_fenced(world.fs, id));
	layouts_settle(world.fs);
	assert_int_equal(events(layouts_sink(world.fs), EVENT_HOLDER_GONE, &ev), 1);
	assert_true(ev.holder == id && ev.length == 1);
	OK(holder_lost(world.fs, other));
	layouts_settle(world.fs);
	assert_int_equal(events(layouts_sink(world.fs), EVENT_HOLDER_GONE, &ev), 1);
	assert_true(ev.holder == other && ev.length == 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(which_step_follows_which),
		T(tries_never_fall),
		T(only_lost_ones_are_fenced),
		T(records_outlive_a_power_cut),
		T(a_full_filesystem_can_record_fences),
		T(who_is_decided_does_not_resume),
		T(who_returns_too_late_is_still_fenced),
		T(who_has_returned_all_is_fenced),
		T(who_returns_in_time_is_not),
		T(how_it_went_is_told),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
