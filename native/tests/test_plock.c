/* SPDX-License-Identifier: MIT
 *
 * test_plock.c - record locks against a byte map, waiting, fairness, deadlock, cancel; flock.
 */
#include "names_fixture.h"

#include "plock.h"

#define LAST ((uint64_t)INT64_MAX)

static struct ioctx *ctx;
static struct inode *file, *file2;

static int setup_files(void **state)
{
	setup(state);
	file = make_file(world.root, "a");
	file2 = make_file(world.root, "b");
	OK(ioctx_create(8, &ctx));
	return 0;
}

static int teardown_files(void **state)
{
	ioctx_destroy(ctx);
	inode_put(file);
	inode_put(file2);
	return teardown(state);
}

static int set(struct inode *in, enum plock_type type, uint64_t start, uint64_t end, uint64_t owner)
{
	struct plock_request req = {.lock = {start, end, type, owner, 1, PLOCK_LOCAL}};

	return plock_set(in, &req);
}

static int set_flock(enum plock_type type, uint64_t owner)
{
	struct plock_request req = {.lock = {0, LAST, type, owner, 1, PLOCK_LOCAL}, .flock = true};

	return plock_set(file, &req);
}

struct waiter {
	struct op op;
	struct plock_request req;
	bool resumed;
};

static void on_resume(struct op *op)
{
	container_of(op, struct waiter, op)->resumed = true;
}

static int wait_for(struct waiter *w, struct inode *in, bool flock, enum plock_type type,
		    uint64_t start, uint64_t end, uint64_t owner)
{
	*w = (struct waiter){.op = {.resume = on_resume, .ctx = ctx},
			     .req = {.lock = {start, end, type, owner, 1, PLOCK_LOCAL}, .flock = flock}};
	w->req.op = &w->op;
	return plock_set(in, &w->req);
}

/* Run what has been woken; whether this one was. */
static bool resumed(struct waiter *w)
{
	while (ioctx_run(ctx, false) > 0)
		;
	return w->resumed;
}

/* ---- POSIX locks against a map ---- */

#define BYTES 40u
#define OWNERS 4u

static uint8_t held[OWNERS][BYTES]; /* 0 none, 1 read, 2 write */

static bool model_conflicts(unsigned owner, unsigned start, unsigned end, uint8_t want)
{
	for (unsigned o = 0; o < OWNERS; o++)
		for (unsigned at = start; o != owner && at <= end; at++)
			if (held[o][at] && (held[o][at] == 2 || want == 2))
				return true;
	return false;
}

/* Byte by byte, what another owner would meet. */
static void check_map(void)
{
	for (unsigned o = 0; o < OWNERS; o++)
		for (unsigned at = 0; at < BYTES; at++) {
			struct plock probe = {at, at, PLOCK_WRITE, o + 1, 0, PLOCK_LOCAL};

			plock_get(file, false, &probe);
			assert_int_equal(probe.type != PLOCK_UNLOCK, model_conflicts(o, at, at, 2));
			if (probe.type != PLOCK_UNLOCK) {
				uint8_t have = held[probe.owner - 1][at];

				assert_int_equal(have, probe.type == PLOCK_WRITE ? 2 : 1);
				/* It is merged as far as it goes. */
				assert_true(probe.start == 0 ||
					    held[probe.owner - 1][probe.start - 1] != have);
				assert_true(probe.end == BYTES - 1 ||
					    held[probe.owner - 1][probe.end + 1] != have);
			}
		}
}

static void locks_agree_with_a_byte_map(void **state)
{
	memset(held, 0, sizeof(held));
	srandom(11);
	for (unsigned step = 0; step < 20000; step++) {
		unsigned owner = (unsigned)random() % OWNERS, start = (unsigned)random() % BYTES;
		unsigned end = start + (unsigned)random() % (BYTES - start);
		enum plock_type type = (enum plock_type)(random() % 3);
		uint8_t want = type == PLOCK_UNLOCK ? 0 : type == PLOCK_WRITE ? 2 : 1;
		bool conflict = want && model_conflicts(owner, start, end, want);

		assert_int_equal(set(file, type, start, end, owner + 1), conflict ? -EAGAIN : 0);
		if (!conflict)
			memset(&held[owner][start], want, end - start + 1);
		if (random() % 200 == 0) {
			plock_release_owner(file, false, owner + 1);
			memset(held[owner], 0, BYTES);
		}
		if (step % 20 == 0)
			check_map();
	}
}

static void bad_ranges_are_refused_and_the_end_is_bounded(void **state)
{
	struct plock probe = {LAST, LAST, PLOCK_READ, 2, 0, PLOCK_LOCAL};

	assert_int_equal(set(file, PLOCK_READ, 5, 4, 1), -EINVAL);
	OK(set(file, PLOCK_WRITE, 5, UINT64_MAX, 1));
	OK(set(file, PLOCK_UNLOCK, 100, 200, 1));
	plock_get(file, false, &probe);
	assert_int_equal(probe.start, 201);
	assert_int_equal(probe.end, LAST);
	assert_int_equal(probe.pid, 1);
}

/* ---- waiting ---- */

static void a_waiter_is_resumed_when_its_range_is_free(void **state)
{
	struct waiter w;

	OK(set(file, PLOCK_WRITE, 0, 9, 1));
	assert_int_equal(wait_for(&w, file, false, PLOCK_WRITE, 5, 14, 2), ERR_PARKED);
	OK(set(file, PLOCK_UNLOCK, 0, 4, 1));
	assert_false(resumed(&w));
	OK(set(file, PLOCK_UNLOCK, 5, 9, 1));
	assert_true(resumed(&w));
	assert_int_equal(w.req.result, 0);
	assert_int_equal(set(file, PLOCK_READ, 14, 14, 1), -EAGAIN);
	plock_release_owner(file, false, 2);
	OK(set(file, PLOCK_READ, 14, 14, 1));
}

static void waiters_are_served_in_order(void **state)
{
	struct waiter writer, reader, other;

	OK(set(file, PLOCK_READ, 0, 9, 1));
	assert_int_equal(wait_for(&writer, file, false, PLOCK_WRITE, 0, 9, 2), ERR_PARKED);
	/* A reader that comes later waits behind the writer; one elsewhere does not. */
	assert_int_equal(wait_for(&reader, file, false, PLOCK_READ, 0, 9, 3), ERR_PARKED);
	assert_int_equal(wait_for(&other, file, false, PLOCK_READ, 10, 19, 4), 0);
	/* Who asks without waiting takes what is free. */
	OK(set(file, PLOCK_READ, 0, 9, 5));
	plock_release_owner(file, false, 5);
	assert_false(resumed(&writer));
	plock_release_owner(file, false, 1);
	assert_true(resumed(&writer));
	assert_false(resumed(&reader));
	plock_release_owner(file, false, 2);
	assert_true(resumed(&reader));
}

static void an_owner_with_locks_does_not_wait_behind_a_waiter(void **state)
{
	struct waiter writer, again;

	OK(set(file, PLOCK_READ, 0, 9, 1));
	assert_int_equal(wait_for(&writer, file, false, PLOCK_WRITE, 0, 9, 2), ERR_PARKED);
	assert_int_equal(wait_for(&again, file, false, PLOCK_READ, 5, 12, 1), 0);
	plock_release_owner(file, false, 1);
	assert_true(resumed(&writer));
}

static void a_downgrade_lets_readers_in(void **state)
{
	struct waiter reader;

	OK(set(file, PLOCK_WRITE, 0, 9, 1));
	assert_int_equal(wait_for(&reader, file, false, PLOCK_READ, 0, 9, 2), ERR_PARKED);
	OK(set(file, PLOCK_READ, 0, 9, 1));
	assert_true(resumed(&reader));
}

static void a_cancelled_request_is_not_resumed(void **state)
{
	struct waiter writer, reader;

	OK(set(file, PLOCK_READ, 0, 9, 1));
	assert_int_equal(wait_for(&writer, file, false, PLOCK_WRITE, 0, 9, 2), ERR_PARKED);
	assert_int_equal(wait_for(&reader, file, false, PLOCK_READ, 0, 9, 3), ERR_PARKED);
	assert_true(plock_cancel(&writer.req));
	assert_true(resumed(&reader)); /* nothing stands in its way any more */
	plock_release_owner(file, false, 1);
	assert_false(resumed(&writer));
	assert_false(plock_cancel(&writer.req));
	assert_false(plock_cancel(&reader.req));
}

/* ---- deadlock ---- */

static void a_cycle_of_two_is_a_deadlock(void **state)
{
	struct waiter a, b;

	OK(set(file, PLOCK_WRITE, 0, 0, 1));
	OK(set(file, PLOCK_WRITE, 1, 1, 2));
	assert_int_equal(wait_for(&a, file, false, PLOCK_WRITE, 1, 1, 1), ERR_PARKED);
	assert_int_equal(wait_for(&b, file, false, PLOCK_WRITE, 0, 0, 2), -EDEADLK);
	plock_release_owner(file, false, 2);
	assert_true(resumed(&a));
}

static void a_cycle_over_files_is_a_deadlock(void **state)
{
	struct waiter w[8];
	char name[8];
	struct inode *in[8];

	for (unsigned i = 0; i < 8; i++) {
		snprintf(name, sizeof(name), "f%u", i);
		in[i] = make_file(world.root, name);
		OK(set(in[i], PLOCK_WRITE, 0, LAST, i + 1));
	}
	for (unsigned i = 0; i < 7; i++)
		assert_int_equal(wait_for(&w[i], in[i + 1], false, PLOCK_READ, 5, 5, i + 1),
				 ERR_PARKED);
	assert_int_equal(wait_for(&w[7], in[0], false, PLOCK_READ, 5, 5, 8), -EDEADLK);
	/* Without the closing edge it is a chain that unwinds. */
	for (unsigned i = 8; i-- > 0;) {
		plock_release_owner(in[i], false, i + 1);
		if (i > 0)
			assert_true(resumed(&w[i - 1]));
	}
	for (unsigned i = 1; i < 8; i++)
		plock_release_owner(in[i], false, i);
	for (unsigned i = 0; i < 8; i++)
		inode_put(in[i]);
}

static void two_upgrading_readers_are_a_deadlock(void **state)
{
	struct waiter a, b;

	OK(set(file, PLOCK_READ, 0, 9, 1));
	OK(set(file, PLOCK_READ, 0, 9, 2));
	assert_int_equal(wait_for(&a, file, false, PLOCK_WRITE, 0, 9, 1), ERR_PARKED);
	assert_int_equal(wait_for(&b, file, false, PLOCK_WRITE, 0, 9, 2), -EDEADLK);
	plock_release_owner(file, false, 2);
	assert_true(resumed(&a));
}

/* ---- flock ---- */

static void flock_locks_are_a_kind_of_their_own(void **state)
{
	struct waiter w, w2;

	OK(set(file, PLOCK_WRITE, 0, LAST, 1));
	OK(set_flock(PLOCK_READ, 1));
	OK(set_flock(PLOCK_READ, 2));
	assert_int_equal(set_flock(PLOCK_WRITE, 3), -EAGAIN);
	/* A change gives up the old lock first: of two that upgrade, one gets it and the other
	 * waits. */
	assert_int_equal(wait_for(&w, file, true, PLOCK_WRITE, 0, 0, 1), ERR_PARKED);
	assert_int_equal(wait_for(&w2, file, true, PLOCK_WRITE, 0, 0, 2), ERR_PARKED);
	assert_true(resumed(&w));
	assert_false(resumed(&w2));
	plock_release_owner(file, true, 1);
	assert_true(resumed(&w2));
	plock_release_owner(file, true, 2);
	OK(set_flock(PLOCK_WRITE, 3));
	OK(set_flock(PLOCK_UNLOCK, 3));
	OK(set_flock(PLOCK_READ, 4));
	/* the POSIX lock is still there */
	assert_int_equal(set(file, PLOCK_READ, 0, 0, 9), -EAGAIN);
}

/* ---- threads ---- */

#define ROUNDS 1000u

static unsigned counter; /* under the write lock of file alone */

static void *count_up(void *arg)
{
	struct waiter w;
	struct ioctx *own;
	uint64_t owner = *(uint64_t *)arg;

	if (ioctx_create(8, &own) != 0)
		return "no context";
	for (unsigned i = 0; i < ROUNDS; i++) {
		int rc;

		w = (struct waiter){.op = {.resume = on_resume, .ctx = own},
				    .req = {.lock = {0, 9, PLOCK_WRITE, owner, 1, PLOCK_LOCAL}}};
		w.req.op = &w.op;
		rc = plock_set(file, &w.req);
		if (rc != 0 && rc != ERR_PARKED)
			return "refused";
		while (rc == ERR_PARKED && !w.resumed)
			ioctx_run(own, true);
		counter++;
		plock_release_owner(file, false, owner);
	}
	ioctx_destroy(own);
	return NULL;
}

static void a_lock_excludes_threads_and_wakes_them_all(void **state)
{
	uint64_t ids[3] = {11, 12, 13};
	pthread_t threads[3];
	void *err;

	counter = 0;
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, count_up, &ids[i]), 0);
	for (unsigned i = 0; i < 3; i++) {
		pthread_join(threads[i], &err);
		if (err)
			fail_msg("%s", (const char *)err);
	}
	assert_int_equal(counter, 3 * ROUNDS);
}

int main(void)
{
#define LOCK_TEST(f) cmocka_unit_test_setup_teardown(f, setup_files, teardown_files)
	const struct CMUnitTest tests[] = {
		LOCK_TEST(locks_agree_with_a_byte_map),
		LOCK_TEST(bad_ranges_are_refused_and_the_end_is_bounded),
		LOCK_TEST(a_waiter_is_resumed_when_its_range_is_free),
		LOCK_TEST(waiters_are_served_in_order),
		LOCK_TEST(an_owner_with_locks_does_not_wait_behind_a_waiter),
		LOCK_TEST(a_downgrade_lets_readers_in),
		LOCK_TEST(a_cancelled_request_is_not_resumed),
		LOCK_TEST(a_cycle_of_two_is_a_deadlock),
		LOCK_TEST(a_cycle_over_files_is_a_deadlock),
		LOCK_TEST(two_upgrading_readers_are_a_deadlock),
		LOCK_TEST(a_lock_excludes_threads_and_wakes_them_all),
		LOCK_TEST(flock_locks_are_a_kind_of_their_own),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
