/* SPDX-License-Identifier: MIT
 *
 * bridge_idle.h - while requests follow one another, idle CPUs poll instead of halting.
 *
 * A process and the thread that serves it sleep and wake in turns, and so does whoever moves the data.
 * To wake a CPU that has halted takes about 1 us on hardware and 20 us in a virtual machine, where it is an
 * exit to the hypervisor and back: many times what a request takes. The kernel lets idle CPUs poll for as long as
 * somebody holds /dev/cpu_dma_latency open with 0 us written to it (Documentation/power/pm_qos_interface.rst).
 * So that is asked for while a thread serves IDLE_REQUESTS in less than IDLE_NS, and taken back soon after.
 * When the process ends, however it does, the kernel takes it back.
 *
 * It is for all CPUs, and takes their power while it lasts: who decides whether is extfs/fuse/idle.py.
 *
 * Locks: a mutex of its own, a leaf.
 */
#ifndef EXTFS_BRIDGE_IDLE_H
#define EXTFS_BRIDGE_IDLE_H

#include <stdint.h>

#include "types.h"

#define IDLE_REQUESTS 64u
#define IDLE_NS 32000000
/* It ends when for so long no thread has been so busy. */
#define IDLE_END_NS (2 * IDLE_NS)

struct idle_poll;

/* Of one thread. */
struct idle_meter {
	unsigned requests;
	int64_t since; /* monotonic, ns */
};

struct idle_stats {
	uint64_t times; /* it was asked for */
	uint64_t held_ns;
	bool held;
	int error; /* 0, or the negative errno value that ended it for good */
};

/* fd: /dev/cpu_dma_latency, open for writing; closed with it, not when this fails. Starts a thread. */
int idle_poll_create(int fd, struct idle_poll **out);
/* NULL is nothing. */
void idle_poll_destroy(struct idle_poll *p);
void idle_poll_stats(struct idle_poll *p, struct idle_stats *out);

/* What idle_poll_count() does now and then. */
void idle_poll_look(struct idle_poll *p, struct idle_meter *m);

/* The meter's thread begins to serve a request. p may be NULL. */
static inline void idle_poll_count(struct idle_poll *p, struct idle_meter *m)
{
	if (p && unlikely(++m->requests >= IDLE_REQUESTS))
		idle_poll_look(p, m);
}

#endif
