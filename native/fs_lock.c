/* SPDX-License-Identifier: MIT
 *
 * fs_lock.c - which filesystem's lock a thread holds (fs.h).
 */
#include "fs.h"

_Thread_local const struct fs *fs_locked;
