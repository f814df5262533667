/* SPDX-License-Identifier: MIT
 *
 * test_log.c - the log ring, and the error table.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include "errors.h"
#include "log.h"

static bool readable(void)
{
	struct pollfd pfd = {.fd = log_eventfd(), .events = POLLIN};

	return poll(&pfd, 1, 0) == 1;
}

static int empty_ring(void **state)
{
	char buf[16];

	while (log_next(buf, sizeof(buf)))
		;
	return 0;
}

static void lines_come_back_in_order(void **state)
{
	char buf[64];

	assert_false(readable());
	log_msg(LOG_WARN, "first %d", 1);
	log_msg(LOG_ERROR, "second %s", "x");
	assert_true(readable());
	assert_int_equal(log_next(buf, sizeof(buf)), LOG_WARN);
	assert_string_equal(buf, "first 1");
	assert_true(readable());
	assert_int_equal(log_next(buf, 4), LOG_ERROR);
	assert_string_equal(buf, "sec");
	assert_false(readable());
	assert_int_equal(log_next(buf, sizeof(buf)), 0);
}

static void repeats_are_counted(void **state)
{
	char buf[64];

	for (int i = 0; i < 100; i++)
		log_msg(LOG_WARN, "again");
	assert_int_equal(log_next(buf, sizeof(buf)), LOG_WARN);
	assert_string_equal(buf, "again");
	assert_int_equal(log_next(buf, sizeof(buf)), 0);
	usleep(1050000);
	assert_int_equal(log_next(buf, sizeof(buf)), LOG_WARN);
	assert_string_equal(buf, "99 more: again");
	log_msg(LOG_WARN, "again");
	assert_int_equal(log_next(buf, sizeof(buf)), LOG_WARN);
	assert_string_equal(buf, "again");
	assert_int_equal(log_next(buf, sizeof(buf)), 0);
}

/* A counted line that is pushed out of memory by others is reported then. */
static void repeats_survive_other_lines(void **state)
{
	char buf[64];
	bool told = false;

	log_msg(LOG_NOTE, "counted");
	log_msg(LOG_NOTE, "counted");
	for (int i = 0; i < 8; i++)
		log_msg(LOG_NOTE, "other %d", i);
	while (log_next(buf, sizeof(buf)))
		told = told || !strcmp(buf, "1 more: counted");
	assert_true(told);
}

static void full_ring_drops_and_says_so(void **state)
{
	char buf[64];
	int lines = 0;

	for (int i = 0; i < 300; i++)
		log_msg(LOG_NOTE, "line %d", i);
	while (log_next(buf, sizeof(buf)) == LOG_NOTE)
		assert_int_equal(atoi(buf + 5), lines++);
	assert_int_equal(lines, 256);
	assert_string_equal(buf, "44 log lines were dropped");
	assert_false(readable());
}

static void *log_many(void *arg)
{
	for (int i = 0; i < 1000; i++)
		log_msg(LOG_DEBUG, "%s %d", (char *)arg, i);
	return NULL;
}

static void threads_log_at_once(void **state)
{
	pthread_t a, b;
	char buf[64];
	uint64_t seen = 0;

	assert_int_equal(pthread_create(&a, NULL, log_many, "a"), 0);
	assert_int_equal(pthread_create(&b, NULL, log_many, "b"), 0);
	for (int i = 0; i < 100; i++)
		seen += log_next(buf, sizeof(buf)) == LOG_DEBUG;
	pthread_join(a, NULL);
	pthread_join(b, NULL);
	for (int level; (level = log_next(buf, sizeof(buf))) != 0;)
		seen += level == LOG_DEBUG ? 1 : strtoull(buf, NULL, 10);
	assert_int_equal(seen, 2000);
}

static void errors_have_names(void **state)
{
	assert_int_equal(err_errno(0), 0);
	assert_int_equal(err_errno(-ENOSPC), ENOSPC);
	assert_string_equal(err_name(-ENOSPC), "ENOSPC");
	assert_int_equal(err_errno(-ERR_JOURNAL_FULL), EAGAIN);
	assert_int_equal(err_errno(-ERR_SHUTDOWN), EROFS);
	assert_string_equal(err_name(-ERR_META_CRC), "ERR_META_CRC");
	assert_string_equal(err_text(-ERR_DEV_IN_USE), "the device is in use");
	assert_string_equal(err_text(-3000), "unknown error");
	for (int code = -ERR_FIRST_PRIVATE - 1; code > -ERR_END; code--) {
		assert_in_range(err_errno(code), 1, 4095);
		assert_true(!strncmp(err_name(code), "ERR_", 4));
		assert_true(strlen(err_text(code)) > 10);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(lines_come_back_in_order, empty_ring),
		cmocka_unit_test_setup(repeats_are_counted, empty_ring),
		cmocka_unit_test_setup(repeats_survive_other_lines, empty_ring),
		cmocka_unit_test_setup(full_ring_drops_and_says_so, empty_ring),
		cmocka_unit_test_setup(threads_log_at_once, empty_ring),
		cmocka_unit_test(errors_have_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
