/* SPDX-License-Identifier: MIT
 *
 * bridge_transport.c - FUSE over io_uring or /dev/fuse: whether it is to be had, the decision, and that all
 * threads hear of the end.
 *
 * INIT is answered and all threads run -> thread 0 registers the first entry of its queues and wakes
 * thread 1, and so on; the last one decides, and wakes all to register the rest. Meanwhile the kernel
 * lets no request begin.
 */
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bridge_uring.h"
#include "log.h"

#define PARAMETER "/sys/module/fuse/parameters/enable_uring"
#define POSSIBLE "/sys/devices/system/cpu/possible"

/* ---- what there is to be had ---- */

static int why_not(char *why, size_t len, const char *format, const char *detail)
{
	snprintf(why, len, format, detail);
	return -EOPNOTSUPP;
}

static int first_line(const char *path, char *text, size_t len)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return -errno;
	n = read(fd, text, len - 1);
	close(fd);
	text[MAX(n, 0)] = 0;
	return n > 0 ? 0 : -EIO;
}

/* "0-3" or "0,2-5": how many queues the kernel makes. 0: unknown. */
static unsigned possible_cpus(void)
{
	char text[256], *at = text;
	unsigned n = 0;

	if (first_line(POSSIBLE, text, sizeof(text)))
		return 0;
	while (*at >= '0' && *at <= '9') {
		unsigned long first = strtoul(at, &at, 10), last = first;

		if (*at == '-')
			last = strtoul(at + 1, &at, 10);
		if (last < first || last >= URING_QUEUES_MAX)
			return 0;
		n += (unsigned)(last - first + 1);
		at += *at == ',';
	}
	return n;
}

int uring_probe(char *why, size_t len)
{
	struct io_uring_params p = {.flags = IORING_SETUP_SQE128};
	struct io_uring ring;
	char text[16];
	int rc;

	if (first_line(PARAMETER, text, sizeof(text)))
		return why_not(why, len, "this kernel has no FUSE over io_uring (%s is missing)",
			       PARAMETER);
	if (text[0] != 'Y' && text[0] != '1')
		return why_not(why, len, "switched off in the kernel; echo Y >%s before the mount",
			       PARAMETER);
	rc = io_uring_queue_init_params(2, &ring, &p);
	if (rc < 0)
		return why_not(why, len, "no io_uring with commands: %s", strerror(-rc));
	io_uring_queue_exit(&ring);
	if (!possible_cpus())
		return why_not(why, len, "%s does not say which CPUs there can be", POSSIBLE);
	return 0;
}

/* ---- queues and threads ---- */

static bool online(unsigned cpu)
{
	char path[64], text[8];

	snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%u/online", cpu);
	return first_line(path, text, sizeof(text)) || text[0] == '1'; /* CPU 0 may have no such file */
}

static void step(struct op *op);
static void farewell(struct op *op);

int uring_prepare(struct bridge *b)
{
	unsigned cpus = possible_cpus();

	for (unsigned i = 0; i < b->n_threads; i++) {
		struct bridge_thread *t = &b->threads[i];

		t->arrived_tail = &t->arrived;
		t->step = (struct op){.resume = step, .ctx = t->ctx};
		t->farewell = (struct op){.resume = farewell, .ctx = t->ctx};
		if (!b->want_uring)
			continue;
		t->queues = calloc(cpus / b->n_threads + 1, sizeof(*t->queues));
		if (!t->queues)
			return -ENOMEM;
		for (unsigned cpu = i; cpu < cpus; cpu += b->n_threads)
			t->queues[t->n_queues++] =
				(struct uring_queue){.qid = (uint16_t)cpu, .online = online(cpu)};
		ioctx_want_long_sqes(t->ctx);
	}
	return 0;
}

void uring_destroy(struct bridge_thread *t)
{
	free(t->queues);
	t->queues = NULL;
}

/* ---- the decision ---- */

/* transport_mutex held. */
static void tell(struct bridge_thread *t, struct op *op)
{
	t->told++;
	ioctx_wake(op);
}

/* transport_mutex held. */
static void decide(struct bridge *b, enum transport_state state)
{
	atomic_store(&b->transport, state);
	pthread_cond_broadcast(&b->transport_decided);
}

/* transport_mutex held. `why` may be b->transport_why. */
static void stay_classic(struct bridge *b, const char *why)
{
	if (why != b->transport_why)
		snprintf(b->transport_why, sizeof(b->transport_why), "%s", why);
	decide(b, TRANSPORT_CLASSIC);
}

/* transport_mutex held. */
static void try_start(struct bridge *b)
{
	if (!b->all_run || !b->negotiated_uring ||
	    atomic_load(&b->transport) != TRANSPORT_UNDECIDED)
		return;
	atomic_store(&b->transport, TRANSPORT_REGISTERING);
	tell(&b->threads[0], &b->threads[0].step);
}

void uring_negotiated(struct bridge *b, bool offered)
{
	pthread_mutex_lock(&b->transport_mutex);
	if (atomic_load(&b->transport) == TRANSPORT_UNDECIDED) {
		b->negotiated_uring = offered;
		if (!b->want_uring)
			stay_classic(b, b->transport_why);
		else if (!offered)
			stay_classic(b, "the kernel did not offer it");
		else
			try_start(b);
	}
	pthread_mutex_unlock(&b->transport_mutex);
}

void uring_allow(struct bridge *b)
{
	pthread_mutex_lock(&b->transport_mutex);
	b->all_run = true;
	try_start(b);
	pthread_mutex_unlock(&b->transport_mutex);
}

bool uring_wait(struct bridge *b)
{
	bool is;

	pthread_mutex_lock(&b->transport_mutex);
	while (atomic_load(&b->transport) < TRANSPORT_CLASSIC)
		pthread_cond_wait(&b->transport_decided, &b->transport_mutex);
	is = atomic_load(&b->transport) == TRANSPORT_URING;
	pthread_mutex_unlock(&b->transport_mutex);
	return is;
}

/* Its turn: the first entry of each of its queues. */
static void take_turn(struct bridge_thread *t)
{
	struct bridge *b = t->b;
	int err = t->gone ? -ENOTCONN : uring_register_first(t);

	pthread_mutex_lock(&b->transport_mutex);
	if (err) {
		snprintf(b->transport_why, sizeof(b->transport_why),
			 "the kernel refused the ring of CPU %u: %s", t->index, strerror(-err));
		stay_classic(b, b->transport_why);
	} else if (t->index + 1 < b->n_threads) {
		tell(t + 1, &t[1].step);
	} else {
		decide(b, TRANSPORT_URING);
		for (unsigned i = 0; i < b->n_threads; i++)
			tell(&b->threads[i], &b->threads[i].step);
	}
	pthread_mutex_unlock(&b->transport_mutex);
	if (err && err != -ENOTCONN)
		log_msg(LOG_WARN, "%s; FUSE goes the classic way", b->transport_why);
}

static void step(struct op *op)
{
	struct bridge_thread *t = container_of(op, struct bridge_thread, step);

	t->heard++;
	if (atomic_load(&t->b->transport) == TRANSPORT_REGISTERING)
		take_turn(t);
	else
		uring_go_live(t);
}

/* ---- the end ---- */

static void farewell(struct op *op)
{
	struct bridge_thread *t = container_of(op, struct bridge_thread, farewell);

	t->heard++;
	t->farewelled = true;
	bridge_gone(t);
}

void uring_gone(struct bridge_thread *t)
{
	struct bridge *b = t->b;

	pthread_mutex_lock(&b->transport_mutex);
	if (!b->gone) {
		b->gone = true;
		if (atomic_load(&b->transport) == TRANSPORT_UNDECIDED)
			stay_classic(b, "the mount ended");
		for (unsigned i = 0; i < b->n_threads; i++)
			tell(&b->threads[i], &b->threads[i].farewell);
	}
	pthread_mutex_unlock(&b->transport_mutex);
}

bool uring_may_end(struct bridge_thread *t)
{
	bool may = t->farewelled && !t->n_with_kernel && !t->arrived && !t->uncommitted;

	if (may) {
		pthread_mutex_lock(&t->b->transport_mutex);
		may = t->told == t->heard && atomic_load(&t->b->transport) >= TRANSPORT_CLASSIC;
		pthread_mutex_unlock(&t->b->transport_mutex);
	}
	return may;
}
