/* SPDX-License-Identifier: MIT
 *
 * heartbeat.h - says on the device that it is mounted, and finds out whether another host says so.
 *
 * On one host dev_open()'s locks keep a device from being mounted twice. Between hosts that share a
 * device there is only this: block HEARTBEAT_BLOCK is rewritten every interval while mounted;
 * whoever wants to mount and finds it MOUNTED watches for one interval whether it changes. It
 * cannot fence and does not arbitrate two mounts that begin in the same moment; it finds mistakes.
 *
 * Concurrency: one thread of its own, which touches nothing but the device and its own state.
 */
#ifndef EXTFS_HEARTBEAT_H
#define EXTFS_HEARTBEAT_H

#include "fs.h"

#define HEARTBEAT_MS_DEFAULT 2000u
#define HEARTBEAT_MS_MAX 10000u

/* Is the device mounted now? 0: no; -ERR_DEV_IN_USE: yes, and the log says where. Can wait for one
 * interval of the other host. */
int heartbeat_check(struct device *dev, const uint8_t *uuid);
/* The same in more words: 0: not mounted; 1: it is marked as mounted by somebody who says no more; -ERR_DEV_IN_USE. */
int heartbeat_look(struct device *dev, const uint8_t *uuid);
/* Is the last heartbeat on the device ours? 1 or 0: somebody else mounted it since. Reads the device. */
int heartbeat_ours(struct fs *fs);
/* First heartbeat, then the thread. interval_ms 0: default. A heartbeat that cannot be written is
 * logged, and the mount goes on. */
int heartbeat_start(struct fs *fs, unsigned interval_ms);
/* clean: leave a CLEAN heartbeat. Else leave the last one, as a power cut would. */
void heartbeat_stop(struct fs *fs, bool clean);
/* A CLEAN heartbeat for a new filesystem. */
int heartbeat_format(struct device *dev, const uint8_t *uuid);

#endif
