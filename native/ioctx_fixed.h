/* SPDX-License-Identifier: MIT
 *
 * ioctx_fixed.h - a file and memory that the kernel keeps at hand for a ring: fixed files and buffers of io_uring.
 *
 * An I/O that uses them saves the look-up of the file and of the pages. All of it only saves time: what cannot be had,
 * or lies elsewhere, is done as otherwise. For the thread that owns the ring.
 */
#ifndef EXTFS_IOCTX_FIXED_H
#define EXTFS_IOCTX_FIXED_H

#include "device.h"

struct fixed;
struct io_uring;
struct io_uring_sqe;

/* NULL: not to be had. `dev` is the one whose I/O uses it; it is closed after fixed_destroy(). */
struct fixed *fixed_create(struct io_uring *ring, const struct device *dev);
/* Before the ring goes. What still is fixed is let go. */
void fixed_destroy(struct fixed *f, struct io_uring *ring);
/* As ioctx_fix() and ioctx_unfix(). */
bool fixed_add(struct fixed *f, struct io_uring *ring, void *at);
void fixed_remove(struct fixed *f, struct io_uring *ring, void *at);
/* Change a prepared read, write or flush of `dev` to what is fixed of it. */
void fixed_apply(struct fixed *f, struct io_uring *ring, const struct device *dev,
		 struct io_uring_sqe *sqe);

#endif
