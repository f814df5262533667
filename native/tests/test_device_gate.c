/* SPDX-License-Identifier: MIT
 *
 * test_device_gate.c - a device that is held takes no I/O until it is released, and then all of it.
 */
#include "device_fixture.h"

#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>

#include "ioctx.h"

#define DEPTH 2u
#define IOS 5u
#define HELD_MS 100

static struct device *device;
static struct ioctx *context;
static struct dev_io ios[IOS];
static char *blocks;
static _Atomic unsigned completions;

static void completed(struct dev_io *io)
{
	assert_int_equal(io->res, 0);
	completions++;
}

static void begin(bool ring)
{
	device = open_device(image, 0);
	assert_int_equal(ioctx_create(DEPTH, &context), 0);
	if (!ring)
		ioctx_refuse_ring(context);
	blocks = io_alloc(IOS * BLOCK_SIZE);
	for (unsigned i = 0; i < IOS; i++) {
		memset(blocks + i * BLOCK_SIZE, 'a' + (int)i, BLOCK_SIZE);
		ios[i] = (struct dev_io){.kind = IO_WRITE, .offset = i * BLOCK_SIZE, .done = completed,
					 .buf = blocks + i * BLOCK_SIZE, .len = BLOCK_SIZE};
	}
	completions = 0;
}

static void end(void)
{
	ioctx_destroy(context);
	io_free(blocks);
	dev_close(device);
}

static char on_disk(unsigned block)
{
	int fd = open(image, O_RDONLY | O_CLOEXEC);
	char byte;

	assert_int_equal(pread(fd, &byte, 1, block * BLOCK_SIZE), 1);
	close(fd);
	return byte;
}

static void *release_later(void *arg)
{
	poll(NULL, 0, HELD_MS);
	for (unsigned i = 0; i < IOS; i++)
		assert_int_equal(on_disk(i), 0);
	assert_int_equal(completions, 0);
	dev_release(device);
	return NULL;
}

static double cpu_seconds(void)
{
	struct rusage used;

	assert_int_equal(getrusage(RUSAGE_THREAD, &used), 0);
	return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
	       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* The thread that waits for completions sleeps meanwhile, on a ring and without one. */
static void submitted_io_waits(void **state)
{
	for (unsigned ring = 0; ring < 2; ring++) {
		pthread_t thread;
		double before;

		begin(ring);
		assert_int_equal(dev_hold(device), 0);
		assert_int_equal(dev_hold(device), -EBUSY);
		for (unsigned i = 0; i < IOS; i++)
			dev_submit(device, context, &ios[i]);
		assert_true(ioctx_run(context, false) >= 0);
		assert_int_equal(pthread_create(&thread, NULL, release_later, NULL), 0);
		before = cpu_seconds();
		while (completions < IOS)
			assert_true(ioctx_run(context, true) >= 0);
		assert_true(cpu_seconds() - before < HELD_MS / 2000.0);
		assert_int_equal(pthread_join(thread, NULL), 0);
		for (unsigned i = 0; i < IOS; i++)
			assert_int_equal(on_disk(i), 'a' + (int)i);
		end();
		assert_int_equal(truncate(image, 0), 0);
		assert_int_equal(truncate(image, BLOCKS * BLOCK_SIZE), 0);
	}
}

/* An owner that polls by itself is told of the release, and of nothing before. */
static void who_polls_is_told(void **state)
{
	struct pollfd pfd = {.events = POLLIN};

	begin(true);
	pfd.fd = ioctx_eventfd(context);
	assert_int_equal(dev_hold(device), 0);
	dev_submit(device, context, &ios[0]);
	while (poll(&pfd, 1, 0))
		assert_true(ioctx_run(context, false) >= 0);
	assert_true(ioctx_run(context, false) >= 0);
	assert_int_equal(poll(&pfd, 1, HELD_MS), 0);
	dev_release(device);
	while (!completions) {
		assert_int_equal(poll(&pfd, 1, 5000), 1);
		assert_true(ioctx_run(context, false) >= 0);
	}
	end();
}

/* What was handed over before the device was held goes on, and completes. */
static void what_is_under_way_goes_on(void **state)
{
	begin(true);
	dev_submit(device, context, &ios[0]);
	assert_true(ioctx_run(context, false) >= 0);
	assert_int_equal(dev_hold(device), 0);
	dev_submit(device, context, &ios[1]);
	while (!completions)
		assert_true(ioctx_run(context, true) >= 0);
	assert_true(ioctx_run(context, false) >= 0);
	assert_int_equal(completions, 1);
	assert_int_equal(on_disk(1), 0);
	dev_release(device);
	while (completions < 2)
		assert_true(ioctx_run(context, true) >= 0);
	end();
}

static void *write_block(void *arg)
{
	assert_int_equal(dev_write(device, 0, blocks, BLOCK_SIZE, 0), 0);
	completions++;
	return NULL;
}

static void a_call_that_blocks_waits(void **state)
{
	pthread_t thread;

	begin(true);
	assert_int_equal(dev_hold(device), 0);
	assert_int_equal(pthread_create(&thread, NULL, write_block, NULL), 0);
	poll(NULL, 0, HELD_MS);
	assert_int_equal(completions, 0);
	assert_int_equal(on_disk(0), 0);
	dev_release(device);
	assert_int_equal(pthread_join(thread, NULL), 0);
	assert_int_equal(on_disk(0), 'a');
	/* Held and released again: as before. */
	assert_int_equal(dev_hold(device), 0);
	dev_release(device);
	assert_int_equal(dev_write(device, 0, blocks + BLOCK_SIZE, BLOCK_SIZE, 0), 0);
	end();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(submitted_io_waits, set_up, tear_down),
		cmocka_unit_test_setup_teardown(who_polls_is_told, set_up, tear_down),
		cmocka_unit_test_setup_teardown(what_is_under_way_goes_on, set_up, tear_down),
		cmocka_unit_test_setup_teardown(a_call_that_blocks_waits, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
