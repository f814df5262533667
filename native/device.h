/* SPDX-License-Identifier: MIT
 *
 * device.h - the block device, and the thread's context for asynchronous I/O on it.
 *
 * One table of operations, several devices behind it: a raw device or image (O_DIRECT through io_uring,
 * device.c), the simulated device of the power-loss tests (device_sim.c).
 *
 * An ioctx belongs to one thread at a time: only that thread submits, polls and runs completions.
 * Any thread may ioctx_wake() an operation that is parked on it. Completions and resumed
 * operations run inside ioctx_run(), never inside dev_submit().
 *
 * Buffers, offsets and lengths of device I/O are multiples of dev->align (512 or 4096); buffers are aligned
 * in memory to the same. The device layer finishes short transfers; res is 0 or a negative code.
 */
#ifndef EXTFS_DEVICE_H
#define EXTFS_DEVICE_H

#include <stdatomic.h>

#include "errors.h"
#include "types.h"

struct device;
struct ioctx;
struct op;

enum io_kind { IO_READ, IO_WRITE, IO_FLUSH };
#define IO_FUA 0x1u /* the write is durable when it completes */

struct dev_io {
	enum io_kind kind;
	unsigned flags;
	uint64_t offset; /* bytes */
	void *buf;
	size_t len; /* bytes; at most 1 GiB */
	int res;
	void (*done)(struct dev_io *io); /* in the ioctx's thread; may submit again */
	/* private to the device */
	size_t moved;  /* bytes done so far */
	uint64_t mark; /* flush: dev->writes_done when it began */
	uint64_t cookie;
	struct device *dev;
	struct dev_io *next;
};

struct device_ops {
	const char *name;
	/* Queue; returns at once. The completion comes from ioctx_run(). Never fails: errors are in res. */
	void (*submit)(struct device *dev, struct ioctx *ctx, struct dev_io *io);
	/* Blocking, any thread. 0 or -ERR_DEV_*. */
	int (*rw)(struct device *dev, enum io_kind kind, uint64_t offset, void *buf, size_t len,
		  unsigned flags);
	int (*flush)(struct device *dev);
	/* In the ioctx's thread, just before done(): the device learns that the I/O is complete. May be NULL. */
	void (*complete)(struct device *dev, struct dev_io *io);
	/* No I/O is in flight. */
	void (*close)(struct device *dev);
};

struct device {
	const struct device_ops *ops;
	uint64_t size;  /* bytes */
	uint32_t align; /* logical block size, bytes */
	/* Bytes of scattered memory that the device takes in one piece; 0: no limit is known. Longer I/O is correct, but the kernel has
	 * to divide it, which io_uring leaves to a worker thread. */
	uint32_t piece;
	bool read_only;
	bool volatile_cache; /* writes need a flush to be durable */
	bool fua_flushes;    /* a FUA write that was submitted ends with a flush of everything: it counts as one */
	char path[256];
	/* Counts for "does a flush have anything to do": writes_done rises when a write without FUA completes;
	 * a flush covers what had completed when it began. flushed_upto is the greatest such count of
	 * a successful flush: it never falls. A FUA write covers itself and does not count among the writes. */
	_Atomic uint64_t writes_done;
	_Atomic uint64_t flushed_upto;
	_Atomic uint64_t stat_reads, stat_writes, stat_flushes; /* for status */
	/* device_gate.c */
	_Atomic bool held;
	struct op *parked;
};

/* Open a block device or image file. Takes O_EXCL on a block device and an exclusive lock on the image or on
 * the file behind a loop device, so that one device is never mounted twice on a host.
 * -ERR_DEV_IN_USE, -ENOENT, -EACCES, -ENOTBLK (neither block device nor regular file), ... */
#define DEV_READ_ONLY 0x1u
#define DEV_SHARED 0x2u /* tools that only look: no exclusive lock */
int dev_open(const char *path, unsigned flags, struct device **out);
void dev_close(struct device *dev);

/* Hand nothing more of a raw device to the kernel until it is released: blocking calls wait, what is submitted stays queued.
 * What the kernel has goes on. Whoever holds it must release it, whatever happens, and soon. Any thread.
 * -EBUSY: it is held. */
int dev_hold(struct device *dev);
void dev_release(struct device *dev);

/* A thread that others wait for is told before it blocks in one of the calls below. fn NULL: not interested. */
struct dev_block_hook {
	void (*fn)(void *arg);
	void *arg;
};
extern _Thread_local struct dev_block_hook dev_before_blocking;

/* Blocking forms; count statistics; any thread. */
int dev_read(struct device *dev, uint64_t offset, void *buf, size_t len);
int dev_write(struct device *dev, uint64_t offset, const void *buf, size_t len, unsigned flags);
int dev_flush(struct device *dev);
/* Flush only if a write has completed since the last flush began. */
int dev_flush_if_needed(struct device *dev);

/* An operation that can wait. resume() runs in the thread of its ioctx, from ioctx_run(). */
struct op {
	void (*resume)(struct op *op);
	struct ioctx *ctx;
	struct op *next; /* in the wake queue */
};

/* depth: I/Os in the kernel at a time; more may be submitted, they queue. */
int ioctx_create(unsigned depth, struct ioctx **out);
/* No I/O may be in flight and no op parked on it. */
void ioctx_destroy(struct ioctx *ctx);
void dev_submit(struct device *dev, struct ioctx *ctx, struct dev_io *io);
/* Hand queued I/O to the kernel, run completions and resumed ops. wait: block until at least one ran
 * (or a wake came). Returns how many ran, or a negative errno. With wait, what the completions
 * themselves submitted may stay queued until the next call (one system call serves both); without wait, or
 * once ioctx_eventfd() was called, nothing stays queued. May be nested. */
int ioctx_run(struct ioctx *ctx, bool wait);
/* Any thread: have op->resume(op) run in op->ctx's thread. Each op at most once per park. */
void ioctx_wake(struct op *op);
/* For an owner that polls other descriptors too (the bridge): readable when ioctx_run() has work. Only to be
 * polled, never read. Owned by the context; a negative errno when it cannot be made. I/O submitted
 * outside ioctx_run() needs an ioctx_run(ctx, false) before the owner polls. */
int ioctx_eventfd(struct ioctx *ctx);
/* The bridge adds its own poll and read/write requests to the same ring: io_uring pointer, made on first use
 * by the owner's thread; NULL when the kernel offers no io_uring. user_data with bit 0 set is the
 * foreign owner's: such completions are given to foreign(). They must have ended before ioctx_destroy(). */
struct io_uring;
struct io_uring *ioctx_ring(struct ioctx *ctx);
/* Before the ring is made: its SQEs have 128 bytes (IORING_SETUP_SQE128), for commands of files. */
void ioctx_want_long_sqes(struct ioctx *ctx);
void ioctx_set_foreign(struct ioctx *ctx, void (*foreign)(void *arg, uint64_t user_data, int res, unsigned cqe_flags),
		       void *arg);
/* With a ring: I/O of `dev`, which outlives the context, finds its file faster, and its memory where that was fixed.
 * Only saves time: where it is not to be had nothing changes. */
void ioctx_fix_device(struct ioctx *ctx, const struct device *dev);
/* IOCTX_FIXED_BYTES at `at`, which is aligned to IOCTX_FIXED_ALIGN. Their pages are pinned: until ioctx_unfix() they are neither
 * unmapped nor given back (madvise), or I/O would go to pages that nobody sees. true: they are fixed. */
#define IOCTX_FIXED_BYTES 16384u
#define IOCTX_FIXED_ALIGN 4096u
bool ioctx_fix(struct ioctx *ctx, void *at);
void ioctx_unfix(struct ioctx *ctx, void *at);
/* This thread's own context for blocking calls, made on first use, freed at thread exit. NULL: out of memory or
 * descriptors. */
struct ioctx *ioctx_of_thread(void);

/* Memory aligned for device I/O (4096); NULL when out of memory. */
void *io_alloc(size_t len);
void io_free(void *p);

#endif
