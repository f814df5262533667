/* SPDX-License-Identifier: MIT
 *
 * test_device.c - I/O on raw devices and images, and the I/O context: completions, wakes.
 */
#include "device_fixture.h"

#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "ioctx.h"

#define DEPTH 4u
#define LONG_WAIT_MS 5000

static struct ioctx *new_context(bool ring)
{
	struct ioctx *ctx;

	assert_int_equal(ioctx_create(DEPTH, &ctx), 0);
	if (!ring)
		ioctx_refuse_ring(ctx);
	return ctx;
}

struct request {
	struct dev_io io;
	unsigned done;
};

static unsigned completions;

static void completed(struct dev_io *io)
{
	container_of(io, struct request, io)->done++;
	completions++;
}

static void submit(struct device *dev, struct ioctx *ctx, struct request *r, enum io_kind kind,
		   uint64_t offset, void *buf, size_t len, unsigned flags)
{
	*r = (struct request){.io = {.kind = kind, .flags = flags, .offset = offset, .buf = buf,
				     .len = len, .done = completed}};
	dev_submit(dev, ctx, &r->io);
	assert_int_equal(r->done, 0);
}

static void run_until(struct ioctx *ctx, unsigned count)
{
	while (completions < count)
		assert_true(ioctx_run(ctx, true) >= 0);
}

/* ---- I/O --------------------------------------------------------------------------------------- */

/* More I/Os than the context's depth, on the ring and without one. */
static void async_io_moves_every_byte(void **state)
{
	struct device *dev = open_device(image, 0);
	uint8_t *buf = io_alloc(BLOCKS * BLOCK_SIZE), *back = io_alloc(BLOCKS * BLOCK_SIZE);
	struct request r[BLOCKS];

	for (unsigned ring = 0; ring < 2; ring++) {
		struct ioctx *ctx = new_context(ring);

		for (unsigned i = 0; i < BLOCKS; i++)
			memset(buf + i * BLOCK_SIZE, (int)(i * 3 + ring + 1), BLOCK_SIZE);
		completions = 0;
		for (unsigned i = 0; i < BLOCKS; i++)
			submit(dev, ctx, &r[i], IO_WRITE, i * BLOCK_SIZE, buf + i * BLOCK_SIZE,
			       BLOCK_SIZE, i % 2 ? IO_FUA : 0);
		run_until(ctx, BLOCKS);
		submit(dev, ctx, &r[0], IO_FLUSH, 0, NULL, 0, 0);
		submit(dev, ctx, &r[1], IO_READ, 0, back, BLOCKS * BLOCK_SIZE, 0);
		run_until(ctx, BLOCKS + 2);
		assert_true(r[0].io.res == 0 && r[1].io.res == 0);
		assert_memory_equal(buf, back, BLOCKS * BLOCK_SIZE);
		assert_int_equal(ioctx_run(ctx, false), 0);
		ioctx_destroy(ctx);
	}
	assert_int_equal(dev->stat_writes, 2 * BLOCKS);
	io_free(buf);
	io_free(back);
	dev_close(dev);
}

static void blocking_io_moves_every_byte(void **state)
{
	struct device *dev = open_device(image, 0);
	uint8_t *buf = io_alloc(8 * BLOCK_SIZE), *back = io_alloc(8 * BLOCK_SIZE);

	assert_int_equal(dev->size, BLOCKS * BLOCK_SIZE);
	assert_true(dev->align == 512 || dev->align == 4096);
	assert_true(dev->volatile_cache);
	for (unsigned i = 0; i < 8 * BLOCK_SIZE; i++)
		buf[i] = (uint8_t)(i / 7);
	assert_int_equal(dev_write(dev, 3 * BLOCK_SIZE, buf, 8 * BLOCK_SIZE, IO_FUA), 0);
	assert_int_equal(dev_read(dev, 3 * BLOCK_SIZE, back, 8 * BLOCK_SIZE), 0);
	assert_memory_equal(buf, back, 8 * BLOCK_SIZE);
	assert_int_equal(dev_read(dev, 0, back, BLOCK_SIZE), 0);
	assert_int_equal(back[0] | back[BLOCK_SIZE - 1], 0);
	io_free(buf);
	io_free(back);
	dev_close(dev);
}

static void flush_accounting(void **state)
{
	struct device *dev = open_device(image, 0);
	uint8_t *buf = io_alloc(BLOCK_SIZE);
	struct ioctx *ctx = new_context(true);
	struct request w, f;

	memset(buf, 1, BLOCK_SIZE);
	/* What the last owner of the device left unflushed is unknown, so the first flush is needed. */
	assert_true(dev->writes_done > dev->flushed_upto);
	assert_int_equal(dev_flush_if_needed(dev), 0);
	assert_int_equal(dev_flush_if_needed(dev), 0);
	assert_int_equal(dev->stat_flushes, 1);
	assert_int_equal(dev_write(dev, 0, buf, BLOCK_SIZE, IO_FUA), 0);
	assert_int_equal(dev_flush_if_needed(dev), 0);
	assert_int_equal(dev->stat_flushes, 1);
	assert_int_equal(dev_write(dev, 0, buf, BLOCK_SIZE, 0), 0);
	assert_int_equal(dev->writes_done, dev->flushed_upto + 1);
	/* The write completes before the flush does, but not before the flush began. */
	completions = 0;
	submit(dev, ctx, &w, IO_WRITE, 0, buf, BLOCK_SIZE, 0);
	submit(dev, ctx, &f, IO_FLUSH, 0, NULL, 0, 0);
	run_until(ctx, 2);
	assert_int_equal(dev->writes_done, dev->flushed_upto + 1);
	submit(dev, ctx, &w, IO_WRITE, 0, buf, BLOCK_SIZE, IO_FUA);
	run_until(ctx, 3);
	assert_int_equal(dev->writes_done, dev->flushed_upto + 1);
	/* A flush that began earlier and ends later takes nothing back. */
	dev_flushed(dev, 10);
	dev_flushed(dev, 7);
	assert_int_equal(dev->flushed_upto, 10);
	io_free(buf);
	ioctx_destroy(ctx);
	dev_close(dev);
}

/* The kernel's answers, one by one: direct I/O continues at an aligned place. */
static void partial_transfers_are_continued(void **state)
{
	struct device *dev = open_device(image, 0);
	struct dev_io io = {.kind = IO_READ, .len = 4 * BLOCK_SIZE, .dev = dev};
	struct io_uring_sqe sqe;

	io.buf = io_alloc(io.len);
	assert_false(raw_finish(&io, BLOCK_SIZE));
	assert_false(raw_finish(&io, -EAGAIN));
	assert_false(raw_finish(&io, -EINTR));
	assert_false(raw_finish(&io, BLOCK_SIZE + 100));
	assert_int_equal(io.moved, 2 * BLOCK_SIZE);
	memset(&sqe, 0, sizeof(sqe));
	raw_prep(&io, &sqe);
	assert_int_equal(sqe.off, 2 * BLOCK_SIZE);
	assert_int_equal(sqe.len, 2 * BLOCK_SIZE);
	assert_int_equal(sqe.addr, (uintptr_t)io.buf + 2 * BLOCK_SIZE);
	assert_true(raw_finish(&io, 2 * BLOCK_SIZE));
	assert_int_equal(io.res, 0);
	io.moved = 0;
	assert_true(raw_finish(&io, 100));
	assert_int_equal(io.res, -ERR_DEV_READ);
	io.moved = 0;
	assert_true(raw_finish(&io, -EIO));
	assert_int_equal(io.res, -ERR_DEV_READ);
	io.kind = IO_FLUSH;
	assert_true(raw_finish(&io, -EIO));
	assert_int_equal(io.res, -ERR_DEV_FLUSH);
	io_free(io.buf);
	dev_close(dev);
}

/* A file size limit in the middle of a write: the kernel moves the first part, then refuses. */
static void write_cut_short_is_an_error(void **state)
{
	struct device *dev = open_device(image, 0);
	uint8_t *buf = io_alloc(4 * BLOCK_SIZE);
	struct rlimit old, limit;
	char line[512];
	int rc;

	memset(buf, 7, 4 * BLOCK_SIZE);
	getrlimit(RLIMIT_FSIZE, &old);
	signal(SIGXFSZ, SIG_IGN);
	limit = old;
	limit.rlim_cur = 2 * BLOCK_SIZE;
	setrlimit(RLIMIT_FSIZE, &limit);
	rc = dev_write(dev, BLOCK_SIZE, buf, 2 * BLOCK_SIZE, 0);
	setrlimit(RLIMIT_FSIZE, &old);
	signal(SIGXFSZ, SIG_DFL);
	assert_int_equal(rc, -ERR_DEV_WRITE);
	assert_int_equal(log_next(line, sizeof(line)), LOG_ERROR);
	assert_non_null(strstr(line, "write of 4096 bytes at byte 8192 failed: File too large"));
	assert_non_null(strstr(line, image));
	assert_int_equal(dev_read(dev, BLOCK_SIZE, buf + 2 * BLOCK_SIZE, 2 * BLOCK_SIZE), 0);
	assert_memory_equal(buf, buf + 2 * BLOCK_SIZE, BLOCK_SIZE);
	assert_int_equal(buf[3 * BLOCK_SIZE], 0);
	io_free(buf);
	dev_close(dev);
}

static void errors_name_device_and_place(void **state)
{
	struct device *dev = open_device(image, 0);
	struct ioctx *ctx = new_context(true);
	uint8_t *buf = io_alloc(2 * BLOCK_SIZE);
	struct request r[2];
	char line[512];

	assert_int_equal(dev_read(dev, dev->size, buf, BLOCK_SIZE), -ERR_DEV_READ);
	assert_int_equal(log_next(line, sizeof(line)), LOG_ERROR);
	assert_non_null(strstr(line, "read of 4096 bytes at byte 1048576 failed: beyond the end"));
	/* The image shrinks under us: half of a read is there. */
	assert_int_equal(truncate(image, 5 * BLOCK_SIZE), 0);
	completions = 0;
	submit(dev, ctx, &r[0], IO_READ, 4 * BLOCK_SIZE, buf, 2 * BLOCK_SIZE, 0);
	submit(dev, ctx, &r[1], IO_WRITE, UINT64_MAX - 4095, buf, BLOCK_SIZE, 0);
	run_until(ctx, 2);
	assert_int_equal(r[0].io.res, -ERR_DEV_READ);
	assert_int_equal(r[1].io.res, -ERR_DEV_WRITE);
	assert_int_equal(log_next(line, sizeof(line)), LOG_ERROR);
	assert_non_null(strstr(line, "write of 4096 bytes at byte 18446744073709547520 failed"));
	assert_int_equal(log_next(line, sizeof(line)), LOG_ERROR);
	assert_non_null(strstr(line, "read of 4096 bytes at byte 20480 failed: the device ends there"));
	io_free(buf);
	ioctx_destroy(ctx);
	dev_close(dev);
}

/* Runs f in a process of its own; its wait status. */
static int status_of(void (*f)(void))
{
	int status;
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (pid == 0) {
		freopen("/dev/null", "w", stderr);
		signal(SIGABRT, SIG_DFL);
		f();
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return status;
}

static void read_misaligned(void)
{
	struct device *dev;
	uint8_t *buf = io_alloc(BLOCK_SIZE);

	if (!dev_open(image, DEV_SHARED, &dev))
		dev_read(dev, 100, buf, BLOCK_SIZE);
}

static void misaligned_io_is_a_programmers_error(void **state)
{
	int status = status_of(read_misaligned);

	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

static void read_only_device_refuses_writes(void **state)
{
	struct device *dev = open_device(image, DEV_READ_ONLY);
	struct ioctx *ctx = new_context(true);
	uint8_t *buf = io_alloc(BLOCK_SIZE);
	struct request r;

	memset(buf, 0, BLOCK_SIZE);
	assert_int_equal(dev_write(dev, 0, buf, BLOCK_SIZE, 0), -EROFS);
	completions = 0;
	submit(dev, ctx, &r, IO_WRITE, 0, buf, BLOCK_SIZE, 0);
	run_until(ctx, 1);
	assert_int_equal(r.io.res, -EROFS);
	assert_int_equal(dev_read(dev, 0, buf, BLOCK_SIZE), 0);
	io_free(buf);
	ioctx_destroy(ctx);
	dev_close(dev);
}

/* ---- the context --------------------------------------------------------------------------------- */

struct sleeper {
	struct op op;
	unsigned resumed;
	unsigned wake_again;
};

static unsigned resumptions;

static void resumed(struct op *op)
{
	struct sleeper *s = container_of(op, struct sleeper, op);

	s->resumed = ++resumptions;
	if (s->wake_again) {
		s->wake_again--;
		ioctx_wake(op);
	}
}

static void *wake_later(void *arg)
{
	struct sleeper *s = arg;

	for (unsigned i = 0; i < 3; i++) {
		usleep(20000);
		ioctx_wake(&s[i].op);
	}
	return NULL;
}

/* The owner sleeps in the kernel; without ring, and with one that has nothing to do. */
static void wake_ends_a_wait(void **state)
{
	for (unsigned ring = 0; ring < 2; ring++) {
		struct ioctx *ctx = new_context(ring);
		struct sleeper s[3];
		pthread_t thread;

		if (ring && !ioctx_ring(ctx))
			skip();
		resumptions = 0;
		for (unsigned i = 0; i < 3; i++)
			s[i] = (struct sleeper){.op = {.resume = resumed, .ctx = ctx}};
		assert_int_equal(pthread_create(&thread, NULL, wake_later, s), 0);
		for (unsigned i = 0; i < 3; i++) {
			assert_int_equal(ioctx_run(ctx, true), 1);
			assert_int_equal(s[i].resumed, i + 1);
		}
		pthread_join(thread, NULL);
		assert_int_equal(ioctx_run(ctx, false), 0);
		ioctx_destroy(ctx);
	}
}

/* An op that wakes itself gets its turn again, and only one turn in each run. */
static void waking_oneself_starves_nobody(void **state)
{
	struct ioctx *ctx = new_context(false);
	struct sleeper s = {.op = {.resume = resumed, .ctx = ctx}, .wake_again = 2};

	resumptions = 0;
	ioctx_wake(&s.op);
	for (unsigned i = 1; i <= 3; i++) {
		assert_int_equal(ioctx_run(ctx, true), 1);
		assert_int_equal(resumptions, i);
	}
	assert_int_equal(ioctx_run(ctx, false), 0);
	ioctx_destroy(ctx);
}

static bool readable(int fd, int ms)
{
	struct pollfd pfd = {.fd = fd, .events = POLLIN};

	return poll(&pfd, 1, ms) == 1;
}

static void owner_may_poll_by_itself(void **state)
{
	struct device *dev = open_device(image, 0);
	uint8_t *buf = io_alloc(BLOCK_SIZE);

	for (unsigned ring = 0; ring < 2; ring++) {
		struct ioctx *ctx = new_context(ring);
		struct sleeper s[3];
		pthread_t thread;
		struct request r;
		int fd = ioctx_eventfd(ctx);

		assert_true(fd >= 0);
		assert_int_equal(ioctx_eventfd(ctx), fd);
		assert_int_equal(ioctx_run(ctx, false), 0);
		assert_false(readable(fd, 0));
		completions = resumptions = 0;
		submit(dev, ctx, &r, IO_READ, 0, buf, BLOCK_SIZE, 0);
		for (int rc; (rc = ioctx_run(ctx, false)) == 0 && !completions;) {
			assert_int_equal(rc, 0);
			assert_true(readable(fd, LONG_WAIT_MS));
		}
		assert_int_equal(completions, 1);
		for (unsigned i = 0; i < 3; i++)
			s[i] = (struct sleeper){.op = {.resume = resumed, .ctx = ctx}};
		assert_int_equal(pthread_create(&thread, NULL, wake_later, s), 0);
		while (resumptions < 3) {
			assert_true(readable(fd, LONG_WAIT_MS));
			assert_true(ioctx_run(ctx, false) >= 0);
		}
		pthread_join(thread, NULL);
		/* What woke the owner is used up: it may sleep. */
		ioctx_run(ctx, false);
		assert_false(readable(fd, 0));
		ioctx_destroy(ctx);
	}
	io_free(buf);
	dev_close(dev);
}

/* A context that is told to be polled when something waits already. */
static void poll_sees_earlier_wakes(void **state)
{
	struct ioctx *ctx = new_context(false);
	struct sleeper s = {.op = {.resume = resumed, .ctx = ctx}, .wake_again = 1};

	ioctx_wake(&s.op);
	assert_true(readable(ioctx_eventfd(ctx), 0));
	assert_int_equal(ioctx_run(ctx, false), 1);
	assert_true(readable(ioctx_eventfd(ctx), 0));
	assert_int_equal(ioctx_run(ctx, false), 1);
	assert_false(readable(ioctx_eventfd(ctx), 0));
	ioctx_destroy(ctx);
}

#define WAKERS 3u
#define WAKES 2000u

struct waker {
	pthread_t thread;
	struct sleeper *ops;
};

static void *wake_many(void *arg)
{
	struct waker *w = arg;

	for (unsigned i = 0; i < WAKES; i++)
		ioctx_wake(&w->ops[i].op);
	return NULL;
}

/* Three threads wake while I/O completes: every op exactly once, none forgotten. */
static void wakes_and_io_at_once(void **state)
{
	struct device *dev = open_device(image, 0);
	struct ioctx *ctx = new_context(true);
	struct sleeper *ops = calloc(WAKERS * WAKES, sizeof(*ops));
	uint8_t *buf = io_alloc(BLOCK_SIZE);
	struct waker w[WAKERS];
	struct request r[8];
	unsigned reads = 0;

	assert_non_null(ops);
	completions = resumptions = 0;
	for (unsigned i = 0; i < WAKERS * WAKES; i++)
		ops[i].op = (struct op){.resume = resumed, .ctx = ctx};
	for (unsigned i = 0; i < WAKERS; i++) {
		w[i].ops = ops + i * WAKES;
		assert_int_equal(pthread_create(&w[i].thread, NULL, wake_many, &w[i]), 0);
	}
	while (resumptions < WAKERS * WAKES) {
		if (completions == reads)
			for (unsigned i = 0; i < 8; i++, reads++)
				submit(dev, ctx, &r[i], IO_READ, i * BLOCK_SIZE, buf, BLOCK_SIZE, 0);
		assert_true(ioctx_run(ctx, true) > 0);
	}
	run_until(ctx, reads);
	for (unsigned i = 0; i < WAKERS; i++)
		pthread_join(w[i].thread, NULL);
	for (unsigned i = 0; i < WAKERS * WAKES; i++)
		assert_true(ops[i].resumed > 0);
	assert_int_equal(resumptions, WAKERS * WAKES);
	free(ops);
	io_free(buf);
	ioctx_destroy(ctx);
	dev_close(dev);
}

static uint64_t foreign_data;
static int foreign_res;

static void foreign(void *arg, uint64_t user_data, int res, unsigned cqe_flags)
{
	foreign_data = user_data;
	foreign_res = res;
	(*(unsigned *)arg)++;
}

static void foreign_completions_go_to_their_owner(void **state)
{
	struct ioctx *ctx = new_context(true);
	struct io_uring *ring = ioctx_ring(ctx);
	struct io_uring_sqe *sqe;
	unsigned calls = 0;

	if (!ring)
		skip();
	ioctx_set_foreign(ctx, foreign, &calls);
	sqe = io_uring_get_sqe(ring);
	io_uring_prep_close(sqe, 1 << 20);
	io_uring_sqe_set_data64(sqe, 0x1235);
	while (!calls)
		assert_true(ioctx_run(ctx, true) >= 0);
	assert_int_equal(calls, 1);
	assert_int_equal(foreign_data, 0x1235);
	assert_int_equal(foreign_res, -EBADF);
	ioctx_destroy(ctx);
}

static void *read_one(void *arg)
{
	struct device *dev = arg;
	struct ioctx *ctx = ioctx_of_thread();
	uint8_t *buf = io_alloc(BLOCK_SIZE);
	struct request r;

	*(struct request *)&r = (struct request){.io = {.kind = IO_READ, .len = BLOCK_SIZE, .buf = buf,
							 .done = completed}};
	xassert(ctx && ctx == ioctx_of_thread());
	dev_submit(dev, ctx, &r.io);
	while (!r.done)
		xassert(ioctx_run(ctx, true) >= 0);
	xassert(r.io.res == 0);
	io_free(buf);
	return ctx;
}

static void each_thread_has_its_own_context(void **state)
{
	struct device *dev = open_device(image, 0);
	struct ioctx *mine = read_one(dev);
	pthread_t thread;
	void *theirs;

	assert_int_equal(pthread_create(&thread, NULL, read_one, dev), 0);
	pthread_join(thread, &theirs);
	assert_true(mine && theirs && mine != theirs);
	dev_close(dev);
}

struct move {
	struct device *dev;
	struct ioctx *ctx;
};

static void *read_in_context(void *arg)
{
	struct move *m = arg;
	uint8_t *buf = io_alloc(BLOCK_SIZE);
	struct request r = {.io = {.kind = IO_READ, .len = BLOCK_SIZE, .buf = buf, .done = completed}};

	dev_submit(m->dev, m->ctx, &r.io);
	while (!r.done)
		xassert(ioctx_run(m->ctx, true) >= 0);
	io_free(buf);
	return NULL;
}

/* One thread at a time, not for ever the same. */
static void context_moves_between_threads(void **state)
{
	struct move m = {.dev = open_device(image, 0), .ctx = new_context(true)};

	read_in_context(&m);
	for (unsigned i = 0; i < 3; i++) {
		pthread_t thread;

		assert_int_equal(pthread_create(&thread, NULL, read_in_context, &m), 0);
		pthread_join(thread, NULL);
	}
	read_in_context(&m);
	ioctx_destroy(m.ctx);
	dev_close(m.dev);
}

static struct move nested;

static void read_inside(struct dev_io *io)
{
	read_in_context(&nested);
	completed(io);
}

static void runs_may_be_nested(void **state)
{
	uint8_t *buf = io_alloc(BLOCK_SIZE);
	struct request r[3];

	nested = (struct move){.dev = open_device(image, 0), .ctx = new_context(true)};
	completions = 0;
	for (unsigned i = 0; i < 3; i++) {
		r[i] = (struct request){.io = {.kind = IO_READ, .len = BLOCK_SIZE, .buf = buf,
					       .done = i == 0 ? read_inside : completed}};
		dev_submit(nested.dev, nested.ctx, &r[i].io);
	}
	run_until(nested.ctx, 4);
	assert_true(r[0].done == 1 && r[1].done == 1 && r[2].done == 1);
	io_free(buf);
	ioctx_destroy(nested.ctx);
	dev_close(nested.dev);
}
int main(void)
{
	const struct CMUnitTest tests[] = {
		CASE(async_io_moves_every_byte),
		CASE(blocking_io_moves_every_byte),
		CASE(flush_accounting),
		CASE(partial_transfers_are_continued),
		CASE(write_cut_short_is_an_error),
		CASE(errors_name_device_and_place),
		CASE(misaligned_io_is_a_programmers_error),
		CASE(read_only_device_refuses_writes),
		CASE(wake_ends_a_wait),
		CASE(waking_oneself_starves_nobody),
		CASE(owner_may_poll_by_itself),
		CASE(poll_sees_earlier_wakes),
		CASE(wakes_and_io_at_once),
		CASE(foreign_completions_go_to_their_owner),
		CASE(each_thread_has_its_own_context),
		CASE(context_moves_between_threads),
		CASE(runs_may_be_nested),
	};

	return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
