/* SPDX-License-Identifier: MIT
 *
 * ioctx.c - a thread's asynchronous I/O: io_uring, posted completions, and the wake queue.
 *
 * The owner is the one thread that uses the context. It is idle while it sleeps inside ioctx_run(), and always
 * when it polls ioctx_eventfd() itself. A wake appends to the queue; only when the owner is
 * idle does it also write wake_fd, once until the owner drains it (signalled).
 *
 * Invariants:
 * 1. An op in the wake queue while the owner is idle implies signalled, and so a readable wake_fd: the owner
 *    declares itself idle only under wake_lock, with the queue empty.
 * 2. While the owner sleeps in the ring, a poll of wake_fd is armed there.
 * 3. in_kernel <= depth; what is above stays in the queued list, in order.
 * 4. pending = queued + in_kernel + posted. The ring belongs to the thread that made it (ring_owner).
 * 5. While the device of the first queued I/O is held (device_gate.h), gate_op is parked there and gated is set: nothing
 *    queued is handed over until the release has woken gate_op.
 * 6. wake_lock is a leaf; no callback runs with it held. It protects wake_head, wake_tail, wakes, idle and
 *    signalled; everything else is the owner's.
 */
#include "ioctx.h"

#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "device_gate.h"
#include "ioctx_fixed.h"
#include "log.h"

#define THREAD_DEPTH 32u
#define DEPTH_MAX 4096u
#define RING_MIN_ENTRIES 64u

struct io_list {
	struct dev_io *head, **tail;
	size_t count;
};

struct ioctx {
	unsigned depth;
	struct io_list queued;
	struct io_list posted;
	unsigned in_kernel;
	size_t pending;

	struct io_uring ring;
	bool ring_up, ring_refused, wake_armed;
	bool long_sqes;
	struct fixed *fixed; /* NULL: nothing */
	uint64_t ring_owner;
	void (*foreign)(void *arg, uint64_t user_data, int res, unsigned cqe_flags);
	void *foreign_arg;

	int wake_fd;
	int epoll_fd; /* of wake_fd and ring_fd; -1: the owner does not poll by itself */
	int ring_fd;  /* eventfd of completions; -1 likewise */

	pthread_mutex_t wake_lock;
	struct op *wake_head, **wake_tail;
	size_t wakes;
	bool idle, signalled;

	struct op gate_op;
	bool gated;
};

static void list_init(struct io_list *list)
{
	list->head = NULL;
	list->tail = &list->head;
	list->count = 0;
}

static void list_insert(struct io_list *list, struct dev_io *io, size_t place)
{
	struct dev_io **at = &list->head;

	xassert(place <= list->count);
	if (place == list->count)
		at = list->tail;
	else
		while (place--)
			at = &(*at)->next;
	io->next = *at;
	*at = io;
	if (!io->next)
		list->tail = &io->next;
	list->count++;
}

static struct dev_io *list_pop(struct io_list *list)
{
	struct dev_io *io = list->head;

	if (io) {
		list->head = io->next;
		if (!list->head)
			list->tail = &list->head;
		list->count--;
		io->next = NULL;
	}
	return io;
}

/* Thread ids of the system are reused; these are not. */
static uint64_t this_thread(void)
{
	static _Atomic uint64_t last;
	static _Thread_local uint64_t id;

	if (!id)
		id = atomic_fetch_add(&last, 1) + 1;
	return id;
}

static void gate_opened(struct op *op)
{
	container_of(op, struct ioctx, gate_op)->gated = false;
}

/* Whether what is queued has to stay there. */
static bool held_back(struct ioctx *ctx)
{
	if (!ctx->gated)
		ctx->gated = dev_park(ctx->queued.head->dev, &ctx->gate_op);
	return ctx->gated;
}

int ioctx_create(unsigned depth, struct ioctx **out)
{
	struct ioctx *ctx;

	xassert(depth > 0 && depth <= DEPTH_MAX);
	ctx = calloc(1, sizeof(*ctx));
	if (!ctx)
		return -ENOMEM;
	ctx->depth = depth;
	list_init(&ctx->queued);
	list_init(&ctx->posted);
	ctx->wake_tail = &ctx->wake_head;
	ctx->gate_op = (struct op){.resume = gate_opened, .ctx = ctx};
	ctx->epoll_fd = ctx->ring_fd = -1;
	ctx->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (ctx->wake_fd < 0) {
		int err = -errno;

		free(ctx);
		return err;
	}
	pthread_mutex_init(&ctx->wake_lock, NULL);
	*out = ctx;
	return 0;
}

void ioctx_destroy(struct ioctx *ctx)
{
	/* The last waker may still be inside ioctx_wake(), which ends with the unlock. */
	pthread_mutex_lock(&ctx->wake_lock);
	xassert(!ctx->wake_head);
	pthread_mutex_unlock(&ctx->wake_lock);
	xassert(ctx->pending == 0);
	fixed_destroy(ctx->fixed, &ctx->ring);
	if (ctx->ring_up)
		io_uring_queue_exit(&ctx->ring);
	if (ctx->epoll_fd >= 0) {
		close(ctx->epoll_fd);
		close(ctx->ring_fd);
	}
	close(ctx->wake_fd);
	pthread_mutex_destroy(&ctx->wake_lock);
	free(ctx);
}

/* ---- the ring ---------------------------------------------------------------------------------- */

static int ring_init(struct ioctx *ctx)
{
	static const unsigned flag_sets[] = {
		IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
		0,
	};
	unsigned entries = MAX(RING_MIN_ENTRIES, 2 * ctx->depth);
	int rc = -ENOSYS;

	for (unsigned i = 0; i < ARRAY_LEN(flag_sets); i++) {
		struct io_uring_params p = {
			.flags = flag_sets[i] | IORING_SETUP_CLAMP | IORING_SETUP_CQSIZE,
			.cq_entries = 4 * entries,
		};

		if (ctx->long_sqes)
			p.flags |= IORING_SETUP_SQE128;

		rc = io_uring_queue_init_params(entries, &ctx->ring, &p);
		if (rc != -EINVAL)
			break;
	}
	return rc;
}

/* For an owner that polls: completions write ring_fd. (Polling the ring's own descriptor through epoll
 * misses completions that wait for their task to come by, as IORING_SETUP_DEFER_TASKRUN has them.) */
static void signal_completions(struct ioctx *ctx)
{
	if (ctx->ring_up && ctx->epoll_fd >= 0)
		xassert(!io_uring_register_eventfd(&ctx->ring, ctx->ring_fd));
}

/* True when the context has a ring of this thread. */
static bool ring_ready(struct ioctx *ctx)
{
	int rc;

	if (ctx->ring_up && likely(ctx->ring_owner == this_thread()))
		return true;
	if (ctx->ring_refused)
		return false;
	if (ctx->ring_up) {
		/* The context moved to another thread, which may not use the old thread's ring. */
		xassert(ctx->in_kernel == 0 && !ctx->foreign && !ctx->fixed);
		io_uring_queue_exit(&ctx->ring);
		ctx->ring_up = ctx->wake_armed = false;
	}
	rc = ring_init(ctx);
	if (rc < 0) {
		log_msg(LOG_WARN, "no io_uring (%s): device I/O is done by blocking calls", strerror(-rc));
		ctx->ring_refused = true;
		return false;
	}
	ctx->ring_up = true;
	ctx->ring_owner = this_thread();
	io_uring_register_ring_fd(&ctx->ring); /* only saves time: may fail */
	signal_completions(ctx);
	return true;
}

void ioctx_refuse_ring(struct ioctx *ctx)
{
	xassert(!ctx->ring_up);
	ctx->ring_refused = true;
}

void ioctx_want_long_sqes(struct ioctx *ctx)
{
	xassert(!ctx->ring_up);
	ctx->long_sqes = true;
}

void ioctx_fix_device(struct ioctx *ctx, const struct device *dev)
{
	xassert(!ctx->fixed);
	if (ring_ready(ctx))
		ctx->fixed = fixed_create(&ctx->ring, dev);
}

bool ioctx_fix(struct ioctx *ctx, void *at)
{
	return ctx->fixed && fixed_add(ctx->fixed, &ctx->ring, at);
}

void ioctx_unfix(struct ioctx *ctx, void *at)
{
	if (ctx->fixed)
		fixed_remove(ctx->fixed, &ctx->ring, at);
}

struct io_uring *ioctx_ring(struct ioctx *ctx)
{
	return ring_ready(ctx) ? &ctx->ring : NULL;
}

void ioctx_set_foreign(struct ioctx *ctx,
		       void (*foreign)(void *arg, uint64_t user_data, int res, unsigned cqe_flags),
		       void *arg)
{
	ctx->foreign = foreign;
	ctx->foreign_arg = arg;
}

static int make_poll_fds(struct ioctx *ctx)
{
	struct epoll_event ev = {.events = EPOLLIN};
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC), ring_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

	if (epoll_fd < 0 || ring_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, ctx->wake_fd, &ev) < 0 ||
	    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, ring_fd, &ev) < 0) {
		int err = -errno;

		if (epoll_fd >= 0)
			close(epoll_fd);
		if (ring_fd >= 0)
			close(ring_fd);
		return err;
	}
	ctx->epoll_fd = epoll_fd;
	ctx->ring_fd = ring_fd;
	return 0;
}

/* ---- waking ------------------------------------------------------------------------------------ */

static void signal_locked(struct ioctx *ctx)
{
	if (!ctx->signalled) {
		ctx->signalled = true;
		xassert(!eventfd_write(ctx->wake_fd, 1));
	}
}

int ioctx_eventfd(struct ioctx *ctx)
{
	int rc;

	if (ctx->epoll_fd >= 0)
		return ctx->epoll_fd;
	rc = make_poll_fds(ctx);
	if (rc)
		return rc;
	signal_completions(ctx);
	/* From now on a wake has to be seen without the owner being asleep in here; and what there is
	 * already was not signalled. */
	pthread_mutex_lock(&ctx->wake_lock);
	ctx->idle = true;
	signal_locked(ctx);
	pthread_mutex_unlock(&ctx->wake_lock);
	return ctx->epoll_fd;
}

void ioctx_wake(struct op *op)
{
	struct ioctx *ctx = op->ctx;

	op->next = NULL;
	pthread_mutex_lock(&ctx->wake_lock);
	*ctx->wake_tail = op;
	ctx->wake_tail = &op->next;
	ctx->wakes++;
	/* Written under the lock: once it is released, the owner may destroy the context. */
	if (ctx->idle)
		signal_locked(ctx);
	pthread_mutex_unlock(&ctx->wake_lock);
}

/* False: there are ops to resume, do not sleep. */
static bool go_idle(struct ioctx *ctx)
{
	bool idle;

	pthread_mutex_lock(&ctx->wake_lock);
	idle = !ctx->wake_head;
	if (idle)
		ctx->idle = true;
	pthread_mutex_unlock(&ctx->wake_lock);
	return idle;
}

static void leave_idle(struct ioctx *ctx)
{
	pthread_mutex_lock(&ctx->wake_lock);
	ctx->idle = ctx->epoll_fd >= 0;
	pthread_mutex_unlock(&ctx->wake_lock);
}

static size_t drain_signal(struct ioctx *ctx)
{
	eventfd_t value;
	size_t wakes;

	if (ctx->ring_fd >= 0 && eventfd_read(ctx->ring_fd, &value))
		xassert(errno == EAGAIN);
	pthread_mutex_lock(&ctx->wake_lock);
	if (ctx->signalled) {
		ctx->signalled = false;
		xassert(!eventfd_read(ctx->wake_fd, &value));
	}
	wakes = ctx->wakes;
	pthread_mutex_unlock(&ctx->wake_lock);
	return wakes;
}

static struct op *pop_wake(struct ioctx *ctx)
{
	struct op *op;

	pthread_mutex_lock(&ctx->wake_lock);
	op = ctx->wake_head;
	if (op) {
		ctx->wake_head = op->next;
		if (!ctx->wake_head)
			ctx->wake_tail = &ctx->wake_head;
		ctx->wakes--;
	}
	pthread_mutex_unlock(&ctx->wake_lock);
	return op;
}

/* Only those queued by now: an op that wakes itself must not starve the rest. */
static int run_wakes(struct ioctx *ctx)
{
	size_t limit = drain_signal(ctx);
	struct op *op;
	int ran = 0;

	while (limit-- && (op = pop_wake(ctx))) {
		op->resume(op);
		ran++;
	}
	return ran;
}

/* ---- I/O --------------------------------------------------------------------------------------- */

static void complete(struct ioctx *ctx, struct dev_io *io)
{
	struct device *dev = io->dev;

	if (dev->ops->complete)
		dev->ops->complete(dev, io);
	if (io->kind == IO_WRITE && !(io->flags & IO_FUA))
		atomic_fetch_add(&dev->writes_done, 1);
	else if (io->res == 0 && (io->kind == IO_FLUSH || (io->kind == IO_WRITE && dev->fua_flushes)))
		dev_flushed(dev, io->mark);
	ctx->pending--;
	io->done(io);
}

void ioctx_queue(struct ioctx *ctx, struct dev_io *io)
{
	ctx->pending++;
	list_insert(&ctx->queued, io, ctx->queued.count);
}

void ioctx_post(struct ioctx *ctx, struct dev_io *io, size_t place)
{
	ctx->pending++;
	list_insert(&ctx->posted, io, place);
}

size_t ioctx_posted(const struct ioctx *ctx)
{
	return ctx->posted.count;
}

static int run_posted(struct ioctx *ctx)
{
	size_t limit = ctx->posted.count;
	struct dev_io *io;
	int ran = 0;

	while (limit-- && (io = list_pop(&ctx->posted))) {
		complete(ctx, io);
		ran++;
	}
	return ran;
}

static int run_blocking(struct ioctx *ctx)
{
	size_t limit = ctx->queued.count;
	struct dev_io *io;
	int ran = 0;

	while (limit-- && ctx->queued.head && !held_back(ctx)) {
		io = list_pop(&ctx->queued);
		raw_blocking(io);
		complete(ctx, io);
		ran++;
	}
	return ran;
}

static void fill_ring(struct ioctx *ctx)
{
	struct io_uring_sqe *sqe;

	if (!ctx->wake_armed && (sqe = io_uring_get_sqe(&ctx->ring))) {
		io_uring_prep_poll_add(sqe, ctx->wake_fd, POLLIN);
		io_uring_sqe_set_data(sqe, ctx);
		ctx->wake_armed = true;
	}
	while (ctx->queued.head && ctx->in_kernel < ctx->depth && !held_back(ctx) &&
	       (sqe = io_uring_get_sqe(&ctx->ring))) {
		struct dev_io *io = list_pop(&ctx->queued);

		raw_prep(io, sqe);
		if (ctx->fixed)
			fixed_apply(ctx->fixed, &ctx->ring, io->dev, sqe);
		io_uring_sqe_set_data(sqe, io);
		ctx->in_kernel++;
	}
}

/* One completion at a time leaves the ring before its callback runs, so that ioctx_run() can be nested. */
static int reap(struct ioctx *ctx)
{
	unsigned limit = io_uring_cq_ready(&ctx->ring);
	struct io_uring_cqe *cqe;
	int ran = 0;

	while (limit-- && io_uring_cq_ready(&ctx->ring) && !io_uring_peek_cqe(&ctx->ring, &cqe)) {
		uint64_t data = cqe->user_data;
		unsigned flags = cqe->flags;
		int res = cqe->res;
		struct dev_io *io = (struct dev_io *)(uintptr_t)data;

		io_uring_cqe_seen(&ctx->ring, cqe);
		if (data & 1) {
			xassert(ctx->foreign);
			ctx->foreign(ctx->foreign_arg, data, res, flags);
			ran++;
		} else if (data == (uintptr_t)ctx) {
			ctx->wake_armed = false;
		} else {
			ctx->in_kernel--;
			if (raw_finish(io, res)) {
				complete(ctx, io);
				ran++;
			} else {
				list_insert(&ctx->queued, io, 0);
			}
		}
	}
	return ran;
}

/* What the kernel may answer to an enter without anything being lost: reap, and try again. */
static bool enter_again(int rc)
{
	return rc == -EINTR || rc == -EAGAIN || rc == -EBUSY;
}

static bool kernel_has_work(struct ioctx *ctx)
{
	return io_uring_sq_ready(&ctx->ring) > 0 ||
	       (IO_URING_READ_ONCE(*ctx->ring.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

/* One enter: hand over, wait if asked, and complete what is there. */
static int ring_round(struct ioctx *ctx, bool wait)
{
	int rc = 0, ran;

	fill_ring(ctx);
	if (wait && io_uring_cq_ready(&ctx->ring) == 0 && go_idle(ctx)) {
		rc = io_uring_submit_and_wait(&ctx->ring, 1);
		leave_idle(ctx);
	} else if (kernel_has_work(ctx)) {
		rc = io_uring_submit_and_get_events(&ctx->ring);
	}
	if (rc < 0 && !enter_again(rc))
		return rc;
	ran = reap(ctx);
	/* Without memory in the kernel nothing may be in flight whose completion would end a wait. */
	if (!ran && wait && (rc == -EAGAIN || rc == -EBUSY))
		poll(NULL, 0, 1);
	return ran;
}

/* A context without a ring has only wakes to wait for. */
static int sleep_without_ring(struct ioctx *ctx)
{
	struct pollfd pfd = {.fd = ctx->wake_fd, .events = POLLIN};
	int rc = 0;

	if (go_idle(ctx)) {
		rc = poll(&pfd, 1, -1);
		leave_idle(ctx);
	}
	return rc < 0 && errno != EINTR ? -errno : 0;
}

static int run_round(struct ioctx *ctx, bool wait)
{
	int ran = run_wakes(ctx) + run_posted(ctx), rc = 0;

	if (ctx->queued.head && !ring_ready(ctx))
		ran += run_blocking(ctx);
	wait = wait && ran == 0 && !ctx->posted.head;
	if (ctx->ring_up && ring_ready(ctx))
		rc = ring_round(ctx, wait);
	else if (wait)
		rc = sleep_without_ring(ctx);
	return rc < 0 && ran == 0 ? rc : ran + MAX(rc, 0);
}

static bool more_to_run(struct ioctx *ctx)
{
	return ctx->posted.head || (ctx->queued.head && ctx->in_kernel == 0 && !ctx->gated) ||
	       (ctx->ring_up && (kernel_has_work(ctx) || io_uring_cq_ready(&ctx->ring) > 0));
}

/* The owner is going to poll: whatever needs another ioctx_run() must show, all else must be on its way. */
static int leave_nothing_queued(struct ioctx *ctx)
{
	int rc = 0;

	if (ctx->ring_up) {
		fill_ring(ctx);
		if (io_uring_sq_ready(&ctx->ring))
			rc = io_uring_submit(&ctx->ring);
		if (enter_again(rc))
			rc = 0;
	}
	if (ctx->epoll_fd >= 0 && more_to_run(ctx)) {
		pthread_mutex_lock(&ctx->wake_lock);
		signal_locked(ctx);
		pthread_mutex_unlock(&ctx->wake_lock);
	}
	return rc;
}

int ioctx_run(struct ioctx *ctx, bool wait)
{
	int ran, rc;

	do
		ran = run_round(ctx, wait);
	while (wait && ran == 0);
	if (ran < 0 || (wait && ctx->epoll_fd < 0))
		return ran;
	rc = leave_nothing_queued(ctx);
	return rc < 0 ? rc : ran;
}

/* ---- a thread's own context ----------------------------------------------------------------------- */

static pthread_key_t thread_key;
static pthread_once_t thread_once = PTHREAD_ONCE_INIT;

static void thread_ended(void *arg)
{
	ioctx_destroy(arg);
}

static void make_thread_key(void)
{
	xassert(!pthread_key_create(&thread_key, thread_ended));
}

struct ioctx *ioctx_of_thread(void)
{
	struct ioctx *ctx;

	pthread_once(&thread_once, make_thread_key);
	ctx = pthread_getspecific(thread_key);
	if (ctx || ioctx_create(THREAD_DEPTH, &ctx))
		return ctx;
	if (pthread_setspecific(thread_key, ctx)) {
		ioctx_destroy(ctx);
		return NULL;
	}
	return ctx;
}
