/* SPDX-License-Identifier: MIT
 *
 * test_bridge_notify.c - the threads that write notifications, on a socket pair in the place of
 * /dev/fuse: while nobody reads the other end, every write waits, as one does that waits for a
 * page.
 */
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "bridge.h"

static struct {
	struct bridge bridge;
	struct bridge_thread thread;
	int kernel;
	struct ioctx *ctx;
} world;

static int set_up(void **state)
{
	int ends[2], room = 1;

	memset(&world, 0, sizeof(world));
	assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
	assert_int_equal(setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)), 0);
	world.kernel = ends[0];
	world.thread.fd = ends[1];
	world.bridge.threads = &world.thread;
	assert_int_equal(ioctx_create(4, &world.ctx), 0);
	return notifier_create(&world.bridge);
}

static int tear_down(void **state)
{
	notifier_destroy(&world.bridge);
	close(world.kernel);
	close(world.thread.fd);
	ioctx_destroy(world.ctx);
	return 0;
}

struct waiter {
	struct op op;
	struct page_wait wait;
	unsigned woken;
};

static void woken(struct op *op)
{
	container_of(op, struct waiter, op)->woken++;
}

static void waiter_init(struct waiter *w, unsigned patience_ms)
{
	*w = (struct waiter){ .op = { .resume = woken, .ctx = world.ctx } };
	w->wait = (struct page_wait){ .done = &w->op, .patience_ms = patience_ms, .result = 1 };
}

static void send_pages(inum_t ino, uint64_t offset, struct waiter *w)
{
	struct page_range range = { offset, 1 };

	assert_int_equal(bridge_notify_pages(&world.bridge, ino, &range, 1, &w->wait), 0);
}

static void until_woken(struct waiter *w)
{
	while (!w->woken)
		assert_true(ioctx_run(world.ctx, true) >= 0);
}

/* The next message; false: none comes. */
static bool receive(struct fuse_notify_inval_inode_out *out)
{
	struct {
		struct fuse_out_header head;
		struct fuse_notify_inval_inode_out out;
	} message;
	struct pollfd ready = { .fd = world.kernel, .events = POLLIN };

	if (poll(&ready, 1, 300) <= 0)
		return false;
	assert_int_equal(read(world.kernel, &message, sizeof(message)), sizeof(message));
	assert_int_equal(message.head.error, FUSE_NOTIFY_INVAL_INODE);
	assert_int_equal(message.head.len, sizeof(message));
	*out = message.out;
	return true;
}

/* As many notifications as it takes until the next one is not written. How many were. */
static unsigned stuff(void)
{
	unsigned n = 0;

	for (;;) {
		struct timespec soon = { .tv_nsec = 20000000 };
		struct waiter w;

		waiter_init(&w, 20);
		send_pages(7, n, &w);
		n++;
		until_woken(&w);
		if (w.wait.result) {
			nanosleep(&soon, NULL);
			return n;
		}
		assert_true(n < 10000);
	}
}

static void all_ranges_then_the_wake(void **state)
{
	struct page_range ranges[3] = { { 0, 4096 }, { 8192, 0 }, { UINT64_MAX - 4096, 4096 } };
	struct fuse_notify_inval_inode_out out;
	unsigned seen = 0;
	struct waiter w;

	waiter_init(&w, 0);
	assert_int_equal(bridge_notify_pages(&world.bridge, 5, ranges, 3, &w.wait), 0);
	until_woken(&w);
	assert_int_equal(w.wait.result, 0);
	for (unsigned i = 0; i < 3; i++) {
		assert_true(receive(&out));
		assert_int_equal(out.ino, 5);
		if (out.off == 0 && out.len == 4096)
			seen |= 1;
		else if (out.off == 8192 && out.len == 0)
			seen |= 2;
		else if (out.off > 0 && out.len == 0) /* the kernel's offsets are signed */
			seen |= 4;
	}
	assert_int_equal(seen, 7);
}

/* Who has no more patience goes on; what was sent is written all the same, once. */
static void patience(void **state)
{
	unsigned stuffed = stuff(), n = 0;
	struct fuse_notify_inval_inode_out out;
	struct waiter hasty, patient;

	waiter_init(&hasty, 10);
	waiter_init(&patient, 0);
	send_pages(8, 0, &patient);
	send_pages(8, 0, &hasty);
	until_woken(&hasty);
	assert_int_equal(hasty.wait.result, -ETIMEDOUT);
	assert_int_equal(patient.woken, 0);
	while (receive(&out))
		n++;
	assert_int_equal(n, stuffed + 2);
	until_woken(&patient);
	assert_int_equal(patient.wait.result, 0);
	assert_int_equal(hasty.woken, 1);
}

/* More than there are threads: one of them keeps the time, and all are written in the end. */
static void more_than_threads(void **state)
{
	unsigned stuffed = stuff(), n = 0;
	struct fuse_notify_inval_inode_out out;
	struct waiter many[40];

	for (unsigned i = 0; i < ARRAY_LEN(many); i++) {
		waiter_init(&many[i], i % 2 ? 30 : 0);
		send_pages(9, i, &many[i]);
	}
	for (unsigned i = 1; i < ARRAY_LEN(many); i += 2) {
		until_woken(&many[i]);
		assert_int_equal(many[i].wait.result, -ETIMEDOUT);
	}
	for (unsigned i = 0; i < ARRAY_LEN(many); i += 2)
		assert_int_equal(many[i].woken, 0);
	while (receive(&out))
		n++;
	assert_int_equal(n, stuffed + ARRAY_LEN(many));
	for (unsigned i = 0; i < ARRAY_LEN(many); i++) {
		until_woken(&many[i]);
		assert_int_equal(many[i].woken, 1);
		assert_int_equal(many[i].wait.result, i % 2 ? -ETIMEDOUT : 0);
	}
}

/* What is queued is written before the threads end. */
static void the_end(void **state)
{
	struct fuse_notify_inval_inode_out out;

	for (unsigned i = 0; i < 5; i++)
		assert_int_equal(bridge_notify_inode(&world.bridge, i, 0, 1, NULL), 0);
	notifier_destroy(&world.bridge);
	for (unsigned i = 0; i < 5; i++)
		assert_true(receive(&out));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(all_ranges_then_the_wake, set_up, tear_down),
		cmocka_unit_test_setup_teardown(patience, set_up, tear_down),
		cmocka_unit_test_setup_teardown(more_than_threads, set_up, tear_down),
		cmocka_unit_test_setup_teardown(the_end, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
