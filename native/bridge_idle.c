/* SPDX-License-Identifier: MIT
 *
 * bridge_idle.c - asks for CPUs that poll when idle, and takes it back (bridge_idle.h).
 *
 * The threads that serve only ask. The thread of this file takes back: it sleeps without a time limit while
 * nothing is asked for, so a mount that is not used costs nothing.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bridge_idle.h"
#include "log.h"

#define NS 1000000000
/* PM_QOS_CPU_LATENCY_DEFAULT_VALUE: no wish. */
#define NO_LIMIT_US 2000000000

struct idle_poll {
	int fd;
	pthread_t thread;
	pthread_mutex_t mutex; /* all below but the atomics' readers */
	pthread_cond_t changed;
	_Atomic bool held;     /* changed under the mutex */
	_Atomic int64_t busy;  /* when a thread was last found busy */
	bool stop;
	int error;
	uint64_t times, held_ns;
	int64_t held_since;
};

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * NS + ts.tv_nsec;
}

/* Mutex held. */
static bool tell(struct idle_poll *p, int32_t us)
{
	ssize_t n = write(p->fd, &us, sizeof(us));

	if (n == sizeof(us))
		return true;
	p->error = n < 0 ? -errno : -EIO;
	log_msg(LOG_WARN, "idle CPUs halt again: /dev/cpu_dma_latency: %s", strerror(-p->error));
	return false;
}

/* Mutex held. When it fails nobody tries again. */
static void hold(struct idle_poll *p, int64_t now)
{
	if (p->held || p->error || !tell(p, 0))
		return;
	p->times++;
	p->held_since = now;
	atomic_store(&p->held, true);
	pthread_cond_signal(&p->changed);
}

/* Mutex held. */
static void let_go(struct idle_poll *p)
{
	p->held_ns += (uint64_t)(now_ns() - p->held_since);
	atomic_store(&p->held, false);
	if (tell(p, NO_LIMIT_US))
		return;
	close(p->fd); /* which takes it back, too */
	p->fd = -1;
}

void idle_poll_look(struct idle_poll *p, struct idle_meter *m)
{
	int64_t now = now_ns(), took = now - m->since;

	m->requests = 0;
	m->since = now;
	if (took >= IDLE_NS)
		return;
	atomic_store_explicit(&p->busy, now, memory_order_relaxed);
	if (likely(atomic_load_explicit(&p->held, memory_order_relaxed)))
		return;
	pthread_mutex_lock(&p->mutex);
	hold(p, now);
	pthread_mutex_unlock(&p->mutex);
}

static void *watch(void *arg)
{
	struct idle_poll *p = arg;

	pthread_setname_np(pthread_self(), "extfs-idle");
	pthread_mutex_lock(&p->mutex);
	while (!p->stop) {
		int64_t end = atomic_load_explicit(&p->busy, memory_order_relaxed) + IDLE_END_NS;
		struct timespec until = {.tv_sec = end / NS, .tv_nsec = end % NS};

		if (!p->held)
			pthread_cond_wait(&p->changed, &p->mutex);
		else if (now_ns() >= end)
			let_go(p);
		else
			pthread_cond_timedwait(&p->changed, &p->mutex, &until);
	}
	pthread_mutex_unlock(&p->mutex);
	return NULL;
}

/* Signals are the business of the interpreter's thread. */
static int start(struct idle_poll *p)
{
	sigset_t all, old;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	err = -pthread_create(&p->thread, NULL, watch, p);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return err;
}

int idle_poll_create(int fd, struct idle_poll **out)
{
	struct idle_poll *p = calloc(1, sizeof(*p));
	pthread_condattr_t attr;
	int err;

	if (!p)
		return -ENOMEM;
	p->fd = fd;
	pthread_mutex_init(&p->mutex, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&p->changed, &attr);
	pthread_condattr_destroy(&attr);
	err = start(p);
	if (err) {
		pthread_cond_destroy(&p->changed);
		pthread_mutex_destroy(&p->mutex);
		free(p);
		return err;
	}
	*out = p;
	return 0;
}

void idle_poll_destroy(struct idle_poll *p)
{
	if (!p)
		return;
	pthread_mutex_lock(&p->mutex);
	p->stop = true;
	pthread_cond_signal(&p->changed);
	pthread_mutex_unlock(&p->mutex);
	pthread_join(p->thread, NULL);
	if (p->fd >= 0)
		close(p->fd);
	pthread_cond_destroy(&p->changed);
	pthread_mutex_destroy(&p->mutex);
	free(p);
}

void idle_poll_stats(struct idle_poll *p, struct idle_stats *out)
{
	*out = (struct idle_stats){0};
	if (!p)
		return;
	pthread_mutex_lock(&p->mutex);
	out->times = p->times;
	out->held = p->held;
	out->held_ns = p->held_ns + (p->held ? (uint64_t)(now_ns() - p->held_since) : 0);
	out->error = p->error;
	pthread_mutex_unlock(&p->mutex);
}
