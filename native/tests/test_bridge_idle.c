/* SPDX-License-Identifier: MIT
 *
 * test_bridge_idle.c - when idle CPUs are asked to poll, and when no longer: the other end of a pipe has what
 * /dev/cpu_dma_latency would be told.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "bridge_idle.h"

#define NO_LIMIT 2000000000
#define NOTHING (-1)
#define END (-2)

static struct idle_poll *polling;
static struct idle_meter meter;
static int told;

static int begin(void **state)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -1;
	told = ends[0];
	meter = (struct idle_meter){0};
	return idle_poll_create(ends[1], &polling);
}

static int end(void **state)
{
	idle_poll_destroy(polling);
	polling = NULL;
	return close(told);
}

/* What the kernel is told next, within so many milliseconds. */
static int32_t next(int ms)
{
	struct pollfd fd = {.fd = told, .events = POLLIN};
	int32_t value;

	if (poll(&fd, 1, ms) <= 0)
		return NOTHING;
	return read(told, &value, sizeof(value)) == sizeof(value) ? value : END;
}

static void requests(struct idle_meter *m, unsigned n)
{
	while (n--)
		idle_poll_count(polling, m);
}

static struct idle_stats stats(void)
{
	struct idle_stats s;

	idle_poll_stats(polling, &s);
	return s;
}

static void asks_while_requests_follow_one_another(void **state)
{
	struct idle_stats s;

	requests(&meter, IDLE_REQUESTS); /* since the beginning of time: slow */
	assert_int_equal(next(0), NOTHING);
	while (!stats().times) /* the thread may lose its CPU in the middle */
		requests(&meter, IDLE_REQUESTS);
	assert_int_equal(next(0), 0);
	assert_int_equal(next(20000), NO_LIMIT);
	s = stats();
	assert_int_equal(s.times, 1);
	assert_false(s.held);
	assert_true(s.held_ns >= IDLE_NS);
	assert_int_equal(next(2 * IDLE_END_NS / 1000000), NOTHING); /* and that is all */
}

static void does_not_ask_for_slow_requests(void **state)
{
	struct timespec pause = {.tv_nsec = IDLE_NS / 2};

	for (unsigned round = 0; round < 5; round++) {
		requests(&meter, IDLE_REQUESTS / 2);
		nanosleep(&pause, NULL);
		requests(&meter, IDLE_REQUESTS / 2 - 1);
		nanosleep(&pause, NULL);
		requests(&meter, 1);
	}
	assert_int_equal(next(0), NOTHING);
	assert_int_equal(stats().times, 0);
}

static void asks_again(void **state)
{
	for (unsigned round = 1; round <= 3; round++) {
		while (stats().times < round)
			requests(&meter, IDLE_REQUESTS);
		assert_int_equal(next(20000), 0);
		assert_int_equal(next(20000), NO_LIMIT);
		assert_int_equal(stats().times, round);
	}
}

static void the_end_takes_it_back(void **state)
{
	while (!stats().times)
		requests(&meter, IDLE_REQUESTS);
	idle_poll_destroy(polling);
	polling = NULL;
	assert_int_equal(next(0), 0);
	for (int32_t v = next(0); v != END; v = next(0))
		assert_true(v == NO_LIMIT || v == 0); /* a slow machine: it was over before */
}

static void a_refusal_is_the_end(void **state)
{
	idle_poll_destroy(polling);
	assert_int_equal(idle_poll_create(open("/dev/null", O_RDONLY | O_CLOEXEC), &polling), 0);
	while (!stats().error)
		requests(&meter, IDLE_REQUESTS);
	requests(&meter, 10 * IDLE_REQUESTS);
	assert_int_equal(stats().error, -EBADF);
	assert_int_equal(stats().times, 0);
	assert_false(stats().held);
}

static void *serve(void *arg)
{
	struct idle_meter own = {0};

	for (unsigned i = 0; i < 20000; i++)
		requests(&own, IDLE_REQUESTS);
	return NULL;
}

static void threads_ask_once(void **state)
{
	pthread_t thread[4];
	int32_t value, last = NO_LIMIT;
	uint64_t zeros = 0;

	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, serve, NULL), 0);
	for (unsigned i = 0; i < 4; i++)
		pthread_join(thread[i], NULL);
	while ((value = next(20 * IDLE_END_NS / 1000000)) != NOTHING) {
		assert_int_equal(value, last ? 0 : NO_LIMIT); /* in turns */
		last = value;
		zeros += !value;
	}
	assert_int_equal(last, NO_LIMIT);
	assert_true(zeros > 0);
	assert_int_equal(stats().times, zeros);
}

static void nobody_asks_without(void **state)
{
	struct idle_meter m = {0};

	for (unsigned i = 0; i < 1000; i++)
		idle_poll_count(NULL, &m);
	assert_int_equal(m.requests, 0);
	idle_poll_destroy(NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(asks_while_requests_follow_one_another, begin, end),
		cmocka_unit_test_setup_teardown(does_not_ask_for_slow_requests, begin, end),
		cmocka_unit_test_setup_teardown(asks_again, begin, end),
		cmocka_unit_test_setup_teardown(the_end_takes_it_back, begin, end),
		cmocka_unit_test_setup_teardown(a_refusal_is_the_end, begin, end),
		cmocka_unit_test_setup_teardown(threads_ask_once, begin, end),
		cmocka_unit_test(nobody_asks_without),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
