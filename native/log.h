/* SPDX-License-Identifier: MIT
 *
 * log.h - messages for the administrator: a bounded ring that Python drains into its logging.
 *
 * Any thread may log at any time, under any lock (the ring has its own mutex, a leaf). A full ring
 * drops the newest line and counts it. Repeats of one line within a second are counted, not stored.
 */
#ifndef EXTFS_LOG_H
#define EXTFS_LOG_H

#include "types.h"

enum log_level { LOG_DEBUG = 10, LOG_NOTE = 20, LOG_WARN = 30, LOG_ERROR = 40 }; /* = Python's */

void log_msg(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* What was said before does not count as a repeat any more: a filesystem that is opened says everything anew. */
void log_forget_repeats(void);
/* Oldest line into buf (NUL-terminated, truncated to len); returns its level, 0 when empty. */
int log_next(char *buf, size_t len);
/* eventfd that is readable while the ring has lines; owned by the ring. */
int log_eventfd(void);

#endif
