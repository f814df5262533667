/* SPDX-License-Identifier: MIT
 *
 * bridge.c - the bridge's threads: read, serve, submit, wait; from the mount to the unmount.
 *
 * One round of a thread: read requests until there are none or the batch is full, then ioctx_run():
 * one system call that submits the device I/O of all of them and reaps completions. It sleeps
 * there, with a poll of its /dev/fuse descriptor in the same ring. The poll is armed only by a
 * thread that is about to sleep and is exclusive, so a request wakes one idle thread and no busy
 * one.
 *
 * States of a thread:
 *   serving  reads and serves;                         -> leaving, when the read says ENODEV
 *   leaving  interrupts what is parked, finishes I/O;  -> ended, when no request is in flight
 *   ended    the last one makes event_fd readable
 */
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "bridge_control.h"
#include "bridge_drop.h"
#include "bridge_mount.h"
#include "bridge_uring.h"
#include "log.h"

#define RING_DEPTH 256u
/* Twice what waking an idle CPU costs in a virtual machine; and a process that goes through an answer
 * of READDIR, as long as the kernel asks for, takes half of it before it asks again. */
#define LINGER_NS 100000
#define LINGER_INFLIGHT 2u
#define CALL_AT 4u
/* For how long FORGETs may gather. What waits for them: space of files that nobody has any more. */
#define PAUSE_NS 1000000
/* Tags of our completions in the thread's ring; bit 0 says that they are ours (device.h). Above them:
 * entries (bridge_uring.c). */
enum { TAG_FUSE = 1, TAG_FORWARD = 3, TAG_PAUSE = 5, TAG_LAST = TAG_PAUSE };

/* ---- reading ---- */

/* ---- who looks for requests ----
 *
 * While a thread lingers, the others do not poll /dev/fuse: each request would wake one of them, to find it taken.
 * They rest, and are called when there is more to do than one thread should (CALL_AT requests at a
 * time), when the one that looks is about to block on the device, and at the unmount. So there is always a
 * thread that looks: one that runs, or lingers, or has a poll out.
 */

static void come(struct op *op)
{
	struct bridge_thread *t = container_of(op, struct bridge_thread, help);

	pthread_mutex_lock(&t->b->rest_mutex);
	t->called = false;
	pthread_mutex_unlock(&t->b->rest_mutex);
	t->readable = true;
}

/* rest_mutex held. */
static void end_rest(struct bridge_thread *t)
{
	if (!t->resting)
		return;
	t->resting = false;
	atomic_fetch_sub(&t->b->n_resting, 1);
}

static void call_others(struct bridge_thread *t)
{
	struct bridge *b = t->b;

	if (!atomic_load(&b->n_resting))
		return;
	pthread_mutex_lock(&b->rest_mutex);
	for (unsigned i = 0; i < b->n_threads; i++) {
		struct bridge_thread *u = &b->threads[i];

		if (!u->resting)
			continue;
		end_rest(u);
		u->called = true;
		ioctx_wake(&u->help);
	}
	pthread_mutex_unlock(&b->rest_mutex);
}

static void stop_lingering(struct bridge_thread *t)
{
	t->lingering = false;
	pthread_mutex_lock(&t->b->rest_mutex);
	atomic_store(&t->b->lingering, false);
	pthread_mutex_unlock(&t->b->rest_mutex);
}

/* Before a blocking read of metadata, in the thread. */
static void about_to_block(void *arg)
{
	struct bridge_thread *t = arg;

	if (t->lingering)
		stop_lingering(t);
	call_others(t);
}

/* Will the lingering thread see to it that this one is called when it is needed? */
static bool may_rest(struct bridge_thread *t)
{
	struct bridge *b = t->b;
	bool rest;

	if (!atomic_load(&b->lingering))
		return false;
	pthread_mutex_lock(&b->rest_mutex);
	rest = atomic_load(&b->lingering) && !t->called;
	if (rest) {
		t->resting = true;
		atomic_fetch_add(&b->n_resting, 1);
	}
	pthread_mutex_unlock(&b->rest_mutex);
	return rest;
}

static void rested(struct bridge_thread *t)
{
	pthread_mutex_lock(&t->b->rest_mutex);
	end_rest(t);
	pthread_mutex_unlock(&t->b->rest_mutex);
}

/* Nobody may call it any more. */
static void leave(struct bridge_thread *t)
{
	bool called = true;

	while (called) {
		pthread_mutex_lock(&t->b->rest_mutex);
		end_rest(t);
		called = t->called;
		pthread_mutex_unlock(&t->b->rest_mutex);
		if (called)
			ioctx_run(t->ctx, true);
	}
}

void bridge_gone(struct bridge_thread *t)
{
	if (t->gone)
		return;
	t->gone = true;
	call_others(t);
	request_interrupt_all(t);
	uring_gone(t);
}

static bool is_forget(const void *message)
{
	const struct fuse_in_header *in = message;

	return in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET;
}

/* Read and serve one request; false: there is none. */
static bool serve_one(struct bridge_thread *t)
{
	struct request *r = request_alloc(t);
	size_t room;
	void *buf;
	ssize_t n;

	if (!r) {
		poll(NULL, 0, 1); /* no memory: the requests in flight have to give some back */
		return false;
	}
	buf = request_buffer(r, &room);
	n = read(t->fd, buf, room);
	if (n >= (ssize_t)sizeof(struct fuse_in_header)) {
		t->only_forgets = t->only_forgets && is_forget(buf);
		request_begin(r, buf, (size_t)n);
		return true;
	}
	request_free(r);
	if (n < 0 && (errno == ENOENT || errno == EINTR))
		return true; /* ENOENT: its caller was killed before we could read it */
	if (n < 0 && errno == ENOMEM) {
		poll(NULL, 0, 1); /* no page for the message: the kernel has failed that request */
		return false;
	}
	t->readable = false;
	if (n < 0 && errno == EAGAIN)
		return false;
	if (n >= 0 || errno != ENODEV)
		log_msg(LOG_ERROR, "reading /dev/fuse: %s",
			n < 0 ? strerror(errno) : "a short message");
	bridge_gone(t);
	return false;
}

/* How many it served. */
static unsigned read_batch(struct bridge_thread *t)
{
	unsigned n = 0;

	t->only_forgets = true;
	while (n < BRIDGE_BATCH && serve_one(t))
		if (++n == CALL_AT)
			call_others(t);
	t->only_forgets = t->only_forgets && n;
	return n;
}

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static bool may_end(struct bridge_thread *t)
{
	return t->gone && !t->inflight && uring_may_end(t);
}

/* ---- sleeping with a ring ---- */

static void completed(void *arg, uint64_t tag, int res, unsigned flags)
{
	struct bridge_thread *t = arg;

	if (tag > TAG_LAST) {
		uring_completed((struct request *)(uintptr_t)(tag & ~UINT64_C(1)), res);
	} else if (tag == TAG_FUSE) {
		t->armed = false;
		if (res == -EINVAL)
			t->not_exclusive = true; /* older kernels: all idle threads wake up */
		else
			t->readable = true;
	} else if (tag == TAG_PAUSE) {
		t->pausing = false;
		t->readable = true;
	} else {
		t->forward_armed = false;
		t->forward_open = forward_receive(t->b);
	}
}

static void arm(struct bridge_thread *t, int fd, unsigned events, uint64_t tag, bool *armed)
{
	struct io_uring_sqe *sqe;

	if (*armed)
		return;
	sqe = io_uring_get_sqe(t->ring);
	if (!sqe) {
		io_uring_submit(t->ring);
		sqe = io_uring_get_sqe(t->ring);
	}
	if (!sqe)
		return; /* the ring is full of I/O, whose completions end the next sleep */
	io_uring_prep_poll_add(sqe, fd, events);
	io_uring_sqe_set_data64(sqe, tag);
	*armed = true;
}

/* Over io_uring nearly all that comes by /dev/fuse are FORGETs, one for each file that is removed, and each
 * would wake this thread. Nobody waits for its effect, and the kernel hands over all that it has in one message:
 * so after one with nothing else they may gather. */
static void pause_reading(struct bridge_thread *t)
{
	static struct __kernel_timespec time = {.tv_nsec = PAUSE_NS};
	struct io_uring_sqe *sqe = io_uring_get_sqe(t->ring);

	if (!sqe)
		return; /* polls instead */
	io_uring_prep_timeout(sqe, &time, 0, 0);
	io_uring_sqe_set_data64(sqe, TAG_PAUSE);
	t->pausing = true;
}

static bool wants_pause(const struct bridge_thread *t)
{
	return t->only_forgets && !t->pausing && !t->gone && !t->readable &&
	       atomic_load(&t->b->transport) == TRANSPORT_URING;
}

static void arm_forward(struct bridge_thread *t)
{
	if (t->ring && t->forward_open && !t->gone)
		arm(t, forward_fd(t->b), POLLIN, TAG_FORWARD, &t->forward_armed);
}

static void sleep_in_ring(struct bridge_thread *t)
{
	bool rest = !t->gone && !t->readable && !t->armed && may_rest(t);

	if (wants_pause(t))
		pause_reading(t);
	if (!t->gone && !t->readable && !rest && !t->deaf && !t->pausing)
		arm(t, t->fd, POLLIN | (t->not_exclusive ? 0 : EPOLLEXCLUSIVE), TAG_FUSE,
		    &t->armed);
	arm_forward(t);
	ioctx_run(t->ctx, !t->readable && !t->arrived);
	if (rest)
		rested(t);
}

/* ---- sleeping without ---- */

static void sleep_in_poll(struct bridge_thread *t)
{
	bool rest = !t->gone && !t->readable && may_rest(t);
	struct pollfd fds[3] = {
		{.fd = ioctx_eventfd(t->ctx), .events = POLLIN},
		{.fd = t->gone || rest ? -1 : t->fd, .events = POLLIN},
		{.fd = t->forward_open && !t->gone ? forward_fd(t->b) : -1, .events = POLLIN},
	};

	if (ioctx_run(t->ctx, false) == 0 && !t->readable && !may_end(t)) {
		poll(fds, 3, -1);
		if (fds[1].revents)
			t->readable = true;
		if (fds[2].revents)
			t->forward_open = forward_receive(t->b);
	}
	if (rest)
		rested(t);
}

/* The two counters of a thread are read one after the other: a little too many or too few. */
static uint64_t requests_inflight(struct bridge *b)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < b->n_threads; i++)
		n += atomic_load_explicit(&b->threads[i].inflight, memory_order_relaxed) -
		     atomic_load_explicit(&b->threads[i].dormant, memory_order_relaxed);
	return n;
}

/* A process that works alone sends its next request microseconds after the last answer, a device answers as
 * soon, and waking a thread on an idle CPU costs more than either. So a thread with little to do looks a
 * little longer before it sleeps; one thread at a time, or idle threads would take the CPUs from those
 * that they wait for. (Not to linger for a while after a preemption, because then the CPUs are busy anyway,
 * was tried: on a quiet machine it cost a fifth of the reads a second at depth 1.) */
static void linger(struct bridge_thread *t)
{
	struct bridge *b = t->b;
	int64_t end;

	if (!b->may_linger || t->readable || atomic_load(&b->transport) == TRANSPORT_URING || requests_inflight(b) > LINGER_INFLIGHT ||
	    atomic_exchange(&b->lingering, true))
		return;
	t->lingering = true;
	end = now_ns() + LINGER_NS;
	while (t->lingering && !t->gone && now_ns() < end) {
		bool found = serve_one(t);

		arm_forward(t);
		if (ioctx_run(t->ctx, false) > 0)
			found = true;
		if (requests_inflight(b) > LINGER_INFLIGHT) {
			t->readable = true; /* no longer little to do: the usual way again */
			break;
		}
		if (found)
			end = now_ns() + LINGER_NS;
	}
	if (t->lingering)
		stop_lingering(t);
	if (t->readable || t->gone)
		call_others(t);
}

/* ---- threads ---- */

static void ended(struct bridge *b)
{
	if (atomic_fetch_sub(&b->running, 1) != 1)
		return;
	atomic_store(&b->unmounted, true);
	xassert(!eventfd_write(b->event_fd, 1));
}

/* Other requests have their turn only if their callers have: on the CPU that a thread is pinned to they would
 * wait until its time slice is over. */
static void give_way(struct bridge_thread *t)
{
	if (likely(!t->yields))
		return;
	t->yields = false;
	if (t->n_with_kernel)
		sched_yield();
}

static void *serve_thread(void *arg)
{
	struct bridge_thread *t = arg;
	char name[16];

	snprintf(name, sizeof(name), "extfs-fuse/%u", t->index % 100);
	pthread_setname_np(pthread_self(), name);
	t->ring = ioctx_ring(t->ctx); /* made by the thread that uses it */
	if (t->ring)
		ioctx_set_foreign(t->ctx, completed, t);
	dev_before_blocking = (struct dev_block_hook){about_to_block, t};
	t->readable = true;
	t->forward_open = t->index == 0;
	while (!may_end(t)) {
		if (t->arrived)
			uring_serve(t);
		if (t->readable && !t->gone && read_batch(t))
			linger(t);
		uring_keep(t);
		give_way(t);
		if (may_end(t))
			break;
		if (t->ring)
			sleep_in_ring(t);
		else
			sleep_in_poll(t);
	}
	leave(t);
	dev_before_blocking = (struct dev_block_hook){0};
	request_pool_destroy(t);
	ioctx_set_foreign(t->ctx, NULL, NULL);
	ioctx_destroy(t->ctx);
	t->ctx = NULL;
	ended(t->b);
	return NULL;
}

static int clone_descriptor(int fd)
{
	uint32_t from = (uint32_t)fd;
	int clone = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);

	if (clone < 0)
		return -errno;
	if (ioctl(clone, FUSE_DEV_IOC_CLONE, &from) < 0) {
		int err = -errno;

		close(clone);
		return err;
	}
	return clone;
}

static int prepare_thread(struct bridge *b, unsigned index, int fd)
{
	struct bridge_thread *t = &b->threads[index];
	int err;

	t->b = b;
	t->index = index;
	t->fd = index ? clone_descriptor(fd) : fd;
	if (t->fd < 0)
		return t->fd;
	pthread_mutex_init(&t->pending_mutex, NULL);
	err = ioctx_create(RING_DEPTH, &t->ctx);
	t->help = (struct op){.resume = come, .ctx = t->ctx};
	return err;
}

/* Signals are the business of the interpreter's thread. */
static int start_thread(struct bridge_thread *t)
{
	int err = -pthread_create(&t->thread, NULL, serve_thread, t);

	t->started = !err;
	return err;
}

static int start_threads(struct bridge *b)
{
	sigset_t all, old;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	atomic_store(&b->running, b->n_threads);
	err = uring_prepare(b);
	if (!err)
		err = notifier_create(b);
	if (!err)
		err = ahead_create(&b->ahead);
	if (!err)
		err = drops_create(b->threads[0].fd, DROPS_NAMES_MAX, write, &b->drops);
	for (unsigned i = 0; i < b->n_threads && !err; i++)
		err = start_thread(&b->threads[i]);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return err;
}

/* ---- the bridge ---- */

static void destroy(struct bridge *b)
{
	cache_detach(b);
	ahead_destroy(b->ahead);
	idle_poll_destroy(atomic_load(&b->idle));
	while (b->open) { /* the connection was aborted with files open */
		struct open_file *of = b->open;

		plock_drop_local(of->in);
		open_file_close(b, of);
	}
	drops_destroy(b->drops);
	notifier_destroy(b); /* events come until their files are closed */
	inode_lookup_forget_all(b->fs);
	for (unsigned i = 0; i < b->n_threads; i++) {
		struct bridge_thread *t = &b->threads[i];

		if (!t->b)
			continue;
		if (t->ctx) { /* it never ran, but may have been told of the end */
			ioctx_run(t->ctx, false);
			ioctx_destroy(t->ctx);
		}
		uring_destroy(t);
		if (t->fd >= 0)
			close(t->fd);
		pthread_mutex_destroy(&t->pending_mutex);
	}
	if (b->forward)
		forward_destroy(b);
	if (b->event_fd >= 0)
		close(b->event_fd);
	pthread_mutex_destroy(&b->early_mutex);
	pthread_mutex_destroy(&b->rest_mutex);
	pthread_mutex_destroy(&b->transport_mutex);
	pthread_cond_destroy(&b->transport_decided);
	pthread_mutex_destroy(&b->open_mutex);
	free(b->threads);
	free(b->mountpoint);
	free(b);
}

/* With the ring each CPU has its own, else a few are enough. */
static unsigned default_threads(bool uring)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	return cpus < 1 ? 1 : (unsigned)MIN(cpus, uring ? (long)BRIDGE_THREADS_MAX : 4);
}

/* -EOPNOTSUPP: only the ring will do, and it is not to be had; b->transport_why says why. */
static int choose_transport(struct bridge *b, enum transport_choice choice)
{
	int err = 0;

	if (choice == TRANSPORT_ONLY_CLASSIC)
		snprintf(b->transport_why, sizeof(b->transport_why), "not asked for");
	else
		err = uring_probe(b->transport_why, sizeof(b->transport_why));
	b->want_uring = choice != TRANSPORT_ONLY_CLASSIC && !err;
	return choice == TRANSPORT_ONLY_URING ? err : 0;
}

static int create(struct fs *fs, const struct mount_request *m, struct bridge **out)
{
	struct bridge *b = calloc(1, sizeof(*b));
	int err;

	if (!b)
		return -ENOMEM;
	b->fs = fs;
	b->read_only = m->read_only;
	b->may_linger = sysconf(_SC_NPROCESSORS_ONLN) > 1;
	b->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	err = b->event_fd < 0 ? -errno : 0;
	pthread_mutex_init(&b->early_mutex, NULL);
	pthread_mutex_init(&b->rest_mutex, NULL);
	pthread_mutex_init(&b->transport_mutex, NULL);
	pthread_cond_init(&b->transport_decided, NULL);
	pthread_mutex_init(&b->open_mutex, NULL);
	b->mountpoint = strdup(m->mountpoint);
	if (!err && !b->mountpoint)
		err = -ENOMEM;
	if (!err)
		err = choose_transport(b, m->transport);
	if (err && m->why)
		snprintf(m->why, m->why_len, "%s", b->transport_why);
	if (!err) {
		b->n_threads = MIN(m->threads ? m->threads : default_threads(b->want_uring),
				   BRIDGE_THREADS_MAX);
		b->threads = calloc(b->n_threads, sizeof(*b->threads));
		err = b->threads ? 0 : -ENOMEM;
	}
	if (!b->threads)
		b->n_threads = 0;
	if (!err)
		err = forward_create(b);
	if (err)
		destroy(b);
	else
		*out = b;
	return err;
}

int bridge_start(struct fs *fs, const struct mount_request *m, struct bridge **out)
{
	struct bridge *b = NULL;
	int fd, err = create(fs, m, &b);

	if (err)
		return err;
	b->writeback_cache = m->writeback_cache;
	fd = mount_fuse(m, &b->dev);
	if (fd < 0) {
		destroy(b);
		return fd;
	}
	for (unsigned i = 0; i < b->n_threads && !err; i++)
		err = prepare_thread(b, i, fd);
	if (!err)
		err = cache_attach(b);
	if (!err)
		err = start_threads(b);
	if (!err) {
		uring_allow(b);
		if (!uring_wait(b) && m->transport == TRANSPORT_ONLY_URING) {
			if (m->why)
				snprintf(m->why, m->why_len, "%s", b->transport_why);
			err = -EOPNOTSUPP;
		}
	}
	if (err) {
		/* Threads that run already leave when the connection is gone. */
		bridge_stop(b);
		return err;
	}
	*out = b;
	return 0;
}

int bridge_abort(struct bridge *b)
{
	return abort_fuse(b->dev);
}

void bridge_stop(struct bridge *b)
{
	if (!atomic_load(&b->unmounted)) {
		unmount_fuse(b->mountpoint, true);
		abort_fuse(b->dev);
	}
	for (unsigned i = 0; i < b->n_threads; i++)
		if (b->threads[i].started)
			pthread_join(b->threads[i].thread, NULL);
	destroy(b);
}
