/* SPDX-License-Identifier: MIT
 *
 * device_gate.h - the gate of a device as those see it who hand I/O to the kernel (device.c, ioctx.c).
 *
 * Any thread; nothing here fails. dev_hold() and dev_release() are in device.h.
 */
#ifndef EXTFS_DEVICE_GATE_H
#define EXTFS_DEVICE_GATE_H

#include "device.h"

/* Wait while the device is held. */
void dev_pass(struct device *dev);
/* True: it is held, and the release wakes op, which must be parked nowhere. */
bool dev_park(struct device *dev, struct op *op);

#endif
