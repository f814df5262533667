/* SPDX-License-Identifier: MIT
 *
 * ioctx.h - the side of an ioctx that only devices see.
 *
 * An I/O is pending from dev_submit() to the return of its done(). It is queued (not yet handed to the kernel), then in
 * the kernel, or posted (its result is known, done() has not been called). All functions here are
 * for the thread that owns the context. They cannot fail.
 */
#ifndef EXTFS_IOCTX_H
#define EXTFS_IOCTX_H

#include "device.h"

struct io_uring_sqe;

/* Hand io to the kernel at the next ioctx_run(); only for devices of device.c. */
void ioctx_queue(struct ioctx *ctx, struct dev_io *io);
/* io->res is final: done() runs in ioctx_run(), after the first place I/Os of those posted now. */
void ioctx_post(struct ioctx *ctx, struct dev_io *io, size_t place);
size_t ioctx_posted(const struct ioctx *ctx);
/* Never make a ring, as on a kernel that has none: I/O is then done by blocking calls in ioctx_run(). Before
 * the first use; for tests. */
void ioctx_refuse_ring(struct ioctx *ctx);

/* Implemented by device.c. raw_finish() takes a result of the kernel: true when the I/O is over and io->res is
 * set, false when the rest has to be queued again. raw_blocking() does the I/O at once. */
void raw_prep(struct dev_io *io, struct io_uring_sqe *sqe);
bool raw_finish(struct dev_io *io, int res);
void raw_blocking(struct dev_io *io);
/* A flush that began when writes_done was mark has succeeded. Any thread. */
void dev_flushed(struct device *dev, uint64_t mark);

#endif
