/* SPDX-License-Identifier: MIT
 *
 * device_gate.c - keeps new I/O of a device back from the kernel while its unit is reset.
 *
 * A command for which the unit still waits for data delays a LOGICAL UNIT RESET, and its initiator sends none until
 * the reset is done: some targets end that by dropping the session, seconds later. So whoever resets the unit holds
 * the device first, waits until the kernel has nothing of it under way, and releases it afterwards.
 *
 * Invariants, under gate_lock: 1. A parked op is of a context that has queued I/O of the device, and it is woken by
 * the release. 2. Nothing is parked at a device that is not held. gate_lock is taken before a wake_lock (ioctx.c).
 */
#include "device_gate.h"

#include <pthread.h>

static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_opens = PTHREAD_COND_INITIALIZER;

int dev_hold(struct device *dev)
{
	bool was;

	pthread_mutex_lock(&gate_lock);
	was = atomic_exchange(&dev->held, true);
	pthread_mutex_unlock(&gate_lock);
	return was ? -EBUSY : 0;
}

void dev_release(struct device *dev)
{
	struct op *op, *next;

	pthread_mutex_lock(&gate_lock);
	xassert(dev->held);
	atomic_store(&dev->held, false);
	for (op = dev->parked; op; op = next) {
		next = op->next;
		ioctx_wake(op);
	}
	dev->parked = NULL;
	pthread_cond_broadcast(&gate_opens);
	pthread_mutex_unlock(&gate_lock);
}

void dev_pass(struct device *dev)
{
	if (likely(!atomic_load(&dev->held)))
		return;
	pthread_mutex_lock(&gate_lock);
	while (dev->held)
		pthread_cond_wait(&gate_opens, &gate_lock);
	pthread_mutex_unlock(&gate_lock);
}

bool dev_park(struct device *dev, struct op *op)
{
	bool held;

	if (likely(!atomic_load(&dev->held)))
		return false;
	pthread_mutex_lock(&gate_lock);
	held = dev->held;
	if (held) {
		op->next = dev->parked;
		dev->parked = op;
	}
	pthread_mutex_unlock(&gate_lock);
	return held;
}
