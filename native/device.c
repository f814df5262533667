/* SPDX-License-Identifier: MIT
 *
 * device.c - raw devices and image files, and what all kinds of devices have in common.
 *
 * Exclusion: a block device is opened O_EXCL, which excludes mounts and other exclusive openers, partitions and whole
 * disk included. An image file is locked by flock(). A loop device also holds the flock() of its backing
 * file, so that an image and its loop device exclude one another, and two loop devices of one image too; and an
 * image is not opened while a loop device over it is mounted or otherwise held. The
 * locks belong to open files: they end with the process, however it ends.
 *
 * These open files are never used for I/O: a worker of io_uring may hold the file of a request for a moment after
 * its completion was seen, and closing the descriptor would not yet end the exclusion that the caller of
 * dev_close() may count on ("unmount, then fsck").
 */
#include "device.h"

#include <fcntl.h>
#include <glob.h>
#include <liburing.h>
#include <limits.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "device_gate.h"
#include "ioctx.h"
#include "log.h"

#define IO_ALIGN 4096u
#define IO_MAX ((size_t)1 << 30)

struct raw_device {
	struct device dev;
	int fd;		/* all I/O */
	int claim_fd;	/* the block device opened O_EXCL, or the locked image; -1: shared */
	int backing_fd; /* locked file behind a loop device; -1: none */
};

static inline struct raw_device *raw_of(struct device *dev)
{
	return container_of(dev, struct raw_device, dev);
}

void *io_alloc(size_t len)
{
	if (len > SIZE_MAX - IO_ALIGN)
		return NULL;
	return aligned_alloc(IO_ALIGN, (len + IO_ALIGN - 1) & ~(size_t)(IO_ALIGN - 1));
}

void io_free(void *p)
{
	free(p);
}

/* ---- what all devices share ----------------------------------------------------------------------- */

static int kind_error(enum io_kind kind)
{
	return kind == IO_READ ? -ERR_DEV_READ : kind == IO_WRITE ? -ERR_DEV_WRITE : -ERR_DEV_FLUSH;
}

static int io_failed(struct device *dev, enum io_kind kind, uint64_t offset, size_t len, const char *why)
{
	if (kind == IO_FLUSH)
		log_msg(LOG_ERROR, "%s: flush failed: %s", dev->path, why);
	else
		log_msg(LOG_ERROR, "%s: %s of %zu bytes at byte %llu failed: %s", dev->path,
			kind == IO_READ ? "read" : "write", len, (unsigned long long)offset, why);
	return kind_error(kind);
}

/* 0, or why the device is not even asked. A misaligned request is a programmer's error. */
static int check_request(struct device *dev, enum io_kind kind, uint64_t offset, const void *buf, size_t len)
{
	uint64_t mask = dev->align - 1;

	if (kind == IO_WRITE && dev->read_only)
		return -EROFS;
	if (kind == IO_FLUSH)
		return 0;
	xassert(len > 0 && len <= IO_MAX);
	xassert(((offset | len | (uintptr_t)buf) & mask) == 0);
	if (offset > dev->size || len > dev->size - offset)
		return io_failed(dev, kind, offset, len, "beyond the end of the device");
	return 0;
}

static void count_request(struct device *dev, enum io_kind kind)
{
	_Atomic uint64_t *stat = kind == IO_READ ? &dev->stat_reads :
				 kind == IO_WRITE ? &dev->stat_writes : &dev->stat_flushes;

	atomic_fetch_add_explicit(stat, 1, memory_order_relaxed);
}

void dev_submit(struct device *dev, struct ioctx *ctx, struct dev_io *io)
{
	xassert(io->done);
	io->dev = dev;
	io->moved = 0;
	io->cookie = 0;
	io->mark = atomic_load(&dev->writes_done);
	io->res = check_request(dev, io->kind, io->offset, io->buf, io->len);
	if (io->res) {
		ioctx_post(ctx, io, ioctx_posted(ctx));
		return;
	}
	count_request(dev, io->kind);
	dev->ops->submit(dev, ctx, io);
}

static int dev_rw(struct device *dev, enum io_kind kind, uint64_t offset, void *buf, size_t len,
		  unsigned flags)
{
	int rc = check_request(dev, kind, offset, buf, len);

	if (rc)
		return rc;
	count_request(dev, kind);
	rc = dev->ops->rw(dev, kind, offset, buf, len, flags);
	/* A failed write may have reached the device in part: it counts. */
	if (kind == IO_WRITE && !(flags & IO_FUA))
		atomic_fetch_add(&dev->writes_done, 1);
	return rc;
}

_Thread_local struct dev_block_hook dev_before_blocking;

static void before_blocking(void)
{
	if (dev_before_blocking.fn)
		dev_before_blocking.fn(dev_before_blocking.arg);
}

int dev_read(struct device *dev, uint64_t offset, void *buf, size_t len)
{
	before_blocking();
	return dev_rw(dev, IO_READ, offset, buf, len, 0);
}

int dev_write(struct device *dev, uint64_t offset, const void *buf, size_t len, unsigned flags)
{
	before_blocking();
	return dev_rw(dev, IO_WRITE, offset, (void *)buf, len, flags);
}

void dev_flushed(struct device *dev, uint64_t mark)
{
	uint64_t seen = atomic_load(&dev->flushed_upto);

	/* Of two concurrent flushes the one that began first may end last. */
	while (seen < mark && !atomic_compare_exchange_weak(&dev->flushed_upto, &seen, mark))
		;
}

int dev_flush(struct device *dev)
{
	uint64_t mark = atomic_load(&dev->writes_done);
	int rc = check_request(dev, IO_FLUSH, 0, NULL, 0);

	if (rc)
		return rc;
	count_request(dev, IO_FLUSH);
	before_blocking();
	rc = dev->ops->flush(dev);
	if (rc == 0)
		dev_flushed(dev, mark);
	return rc;
}

int dev_flush_if_needed(struct device *dev)
{
	uint64_t done = atomic_load(&dev->writes_done);

	return atomic_load(&dev->flushed_upto) >= done ? 0 : dev_flush(dev);
}

void dev_close(struct device *dev)
{
	xassert(!dev->held);
	dev->ops->close(dev);
}

/* ---- raw device: I/O ---------------------------------------------------------------------------- */

void raw_prep(struct dev_io *io, struct io_uring_sqe *sqe)
{
	int fd = raw_of(io->dev)->fd;
	char *at = (char *)io->buf + io->moved;
	unsigned left = (unsigned)(io->len - io->moved);
	uint64_t offset = io->offset + io->moved;

	switch (io->kind) {
	case IO_READ:
		io_uring_prep_read(sqe, fd, at, left, offset);
		break;
	case IO_WRITE:
		io_uring_prep_write(sqe, fd, at, left, offset);
		if (io->flags & IO_FUA)
			sqe->rw_flags = RWF_DSYNC;
		break;
	case IO_FLUSH:
		io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
		break;
	}
}

bool raw_finish(struct dev_io *io, int res)
{
	size_t moved;

	if (res == -EINTR || res == -EAGAIN)
		return false;
	if (res >= 0 && io->kind == IO_FLUSH) {
		io->res = 0;
		return true;
	}
	if (res > 0) {
		xassert((size_t)res <= io->len - io->moved);
		/* Direct I/O goes on at an aligned place: what lies behind it is moved again. */
		moved = (size_t)res & ~(size_t)(io->dev->align - 1);
		io->moved += moved;
		if (io->moved < io->len && moved)
			return false;
		if (io->moved == io->len) {
			io->res = 0;
			return true;
		}
	}
	io->res = io_failed(io->dev, io->kind, io->offset + io->moved, io->len - io->moved,
			    res < 0 ? strerror(-res) : "the device ends there");
	return true;
}

static void raw_submit(struct device *dev, struct ioctx *ctx, struct dev_io *io)
{
	ioctx_queue(ctx, io);
}

/* The same, piece by piece, by system calls that block. */
void raw_blocking(struct dev_io *io)
{
	int fd = raw_of(io->dev)->fd;
	ssize_t n;

	do {
		struct iovec iov = {(char *)io->buf + io->moved, io->len - io->moved};
		off_t offset = (off_t)(io->offset + io->moved);

		if (io->kind == IO_FLUSH)
			n = fdatasync(fd);
		else if (io->kind == IO_READ)
			n = pread(fd, iov.iov_base, iov.iov_len, offset);
		else
			n = pwritev2(fd, &iov, 1, offset, io->flags & IO_FUA ? RWF_DSYNC : 0);
	} while (!raw_finish(io, n < 0 ? -errno : (int)n));
}

static int raw_rw(struct device *dev, enum io_kind kind, uint64_t offset, void *buf, size_t len,
		  unsigned flags)
{
	struct dev_io io = {.kind = kind, .flags = flags, .offset = offset, .buf = buf, .len = len,
			    .dev = dev};

	dev_pass(dev);
	raw_blocking(&io);
	return io.res;
}

static int raw_flush(struct device *dev)
{
	return raw_rw(dev, IO_FLUSH, 0, NULL, 0, 0);
}

static void raw_close(struct device *dev)
{
	struct raw_device *raw = raw_of(dev);

	if (raw->fd >= 0)
		close(raw->fd);
	if (raw->claim_fd >= 0)
		close(raw->claim_fd);
	if (raw->backing_fd >= 0)
		close(raw->backing_fd);
	free(raw);
}

static const struct device_ops raw_ops = {
	.name = "raw",
	.submit = raw_submit,
	.rw = raw_rw,
	.flush = raw_flush,
	.close = raw_close,
};

/* ---- raw device: open --------------------------------------------------------------------------- */

/* False: no such file, or nothing in it. */
static bool first_line(const char *path, char *buf, size_t len)
{
	FILE *f = fopen(path, "re");
	bool ok;

	if (!f)
		return false;
	ok = fgets(buf, (int)len, f) != NULL;
	fclose(f);
	if (ok)
		buf[strcspn(buf, "\n")] = '\0';
	return ok;
}

/* An attribute of the block device, or of the disk that it is a partition of. */
static bool sysfs_line(dev_t rdev, const char *attr, char *buf, size_t len)
{
	static const char *const places[] = {"", "../"};

	for (unsigned i = 0; i < ARRAY_LEN(places); i++) {
		char path[128];

		snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%s%s", major(rdev), minor(rdev),
			 places[i], attr);
		if (first_line(path, buf, len))
			return true;
	}
	return false;
}

/* Device-mapper and md: a request goes to the device that its blocks lie on. Unknown counts as stacked. */
static bool stacked(dev_t rdev)
{
	static const char *const places[] = {"", "../"};

	for (unsigned i = 0; i < ARRAY_LEN(places); i++) {
		char path[128];
		glob_t below;
		bool empty;

		snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/%sslaves", major(rdev), minor(rdev), places[i]);
		if (access(path, F_OK) < 0)
			continue;
		strcat(path, "/*");
		empty = glob(path, GLOB_NOSORT, NULL, &below) == GLOB_NOMATCH;
		if (!empty)
			globfree(&below);
		return !empty;
	}
	return true;
}

/* What one request of the queue can hold, when no two pages of the memory are neighbours. */
static uint32_t queue_piece(dev_t rdev)
{
	char line[32];
	uint64_t bytes = 0;

	if (sysfs_line(rdev, "queue/max_segments", line, sizeof(line)))
		bytes = strtoul(line, NULL, 10) * 4096;
	if (bytes && sysfs_line(rdev, "queue/max_sectors_kb", line, sizeof(line)))
		bytes = MIN(bytes, strtoul(line, NULL, 10) << 10);
	return (uint32_t)MIN(bytes & ~BLOCK_MASK, 1u << 30);
}

static int lock_file(int fd)
{
	while (flock(fd, LOCK_EX | LOCK_NB) < 0)
		if (errno != EINTR)
			return errno == EWOULDBLOCK ? -ERR_DEV_IN_USE : -errno;
	return 0;
}

static int lock_backing_file(struct raw_device *raw, dev_t rdev)
{
	char path[PATH_MAX + 32];

	if (!sysfs_line(rdev, "loop/backing_file", path, sizeof(path)))
		return 0; /* not a loop device */
	raw->backing_fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
	if (raw->backing_fd < 0) {
		/* Deleted, or of another mount namespace: then nobody opens it by name either. */
		log_msg(LOG_NOTE, "%s: the backing file %s cannot be locked: %s", raw->dev.path, path,
			strerror(errno));
		return 0;
	}
	return lock_file(raw->backing_fd);
}

/* Open for exclusion only. `st` is of the file that I/O goes to, which it must be. */
static int open_claim(struct raw_device *raw, const char *path, int excl, const struct stat *st)
{
	struct stat claimed;

	raw->claim_fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | excl);
	if (raw->claim_fd < 0)
		return errno == EBUSY ? -ERR_DEV_IN_USE : -errno;
	if (fstat(raw->claim_fd, &claimed) < 0)
		return -errno;
	if (claimed.st_mode != st->st_mode || claimed.st_rdev != st->st_rdev ||
	    claimed.st_dev != st->st_dev || claimed.st_ino != st->st_ino)
		return -ENOENT; /* replaced since it was opened */
	return 0;
}

static int open_block(struct raw_device *raw, const char *path, int mode, unsigned flags)
{
	int sector = 0, read_only = 0, rc;
	char cache[32];
	uint64_t size;
	struct stat st;

	raw->fd = open(path, mode | O_DIRECT);
	if (raw->fd < 0)
		return errno == EBUSY ? -ERR_DEV_IN_USE : -errno;
	if (fstat(raw->fd, &st) < 0 || ioctl(raw->fd, BLKGETSIZE64, &size) < 0 ||
	    ioctl(raw->fd, BLKSSZGET, &sector) < 0 || ioctl(raw->fd, BLKROGET, &read_only) < 0)
		return -errno;
	if (!S_ISBLK(st.st_mode))
		return -ENOTBLK; /* replaced since it was looked at */
	if (read_only && !(flags & DEV_READ_ONLY))
		return -EROFS;
	if (sector > (int)BLOCK_SIZE)
		return -EINVAL;
	/* The kernel's block layer follows a FUA write with a flush where the device knows none, but of one device below a
	 * stack of several only. */
	raw->dev.fua_flushes = sysfs_line(st.st_rdev, "queue/fua", cache, sizeof(cache)) && !strcmp(cache, "0") &&
			       !stacked(st.st_rdev);
	rc = flags & DEV_SHARED ? 0 : open_claim(raw, path, O_EXCL, &st);
	if (rc)
		return rc;
	raw->dev.size = size;
	raw->dev.align = sector <= 512 ? 512 : BLOCK_SIZE;
	raw->dev.piece = queue_piece(st.st_rdev);
	/* Unknown counts as volatile: a flush too many costs time, one too few costs files. */
	raw->dev.volatile_cache = !sysfs_line(st.st_rdev, "queue/write_cache", cache, sizeof(cache)) ||
				  strcmp(cache, "write through") != 0;
	return flags & DEV_SHARED ? 0 : lock_backing_file(raw, st.st_rdev);
}

/* A loop device over this image that somebody holds exclusively, as the kernel does while it is mounted. Only
 * looked at now: who takes the loop device later must look at the image's lock. */
static int loop_over_image_in_use(const struct stat *image)
{
	glob_t loops;
	int rc = 0;

	if (glob("/sys/block/loop*/loop/backing_file", GLOB_NOSORT, NULL, &loops))
		return 0;
	for (size_t i = 0; i < loops.gl_pathc && !rc; i++) {
		char backing[PATH_MAX + 32], node[64];
		struct stat st;
		unsigned number;
		int fd;

		if (sscanf(loops.gl_pathv[i], "/sys/block/loop%u/", &number) != 1 ||
		    !first_line(loops.gl_pathv[i], backing, sizeof(backing)) || stat(backing, &st) ||
		    st.st_dev != image->st_dev || st.st_ino != image->st_ino)
			continue;
		snprintf(node, sizeof(node), "/dev/loop%u", number);
		fd = open(node, O_RDONLY | O_EXCL | O_CLOEXEC);
		if (fd >= 0)
			close(fd);
		else if (errno == EBUSY)
			rc = -ERR_DEV_IN_USE;
	}
	globfree(&loops);
	return rc;
}

static uint32_t image_align(int fd)
{
#ifdef STATX_DIOALIGN
	struct statx stx;

	if (!statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) && (stx.stx_mask & STATX_DIOALIGN) &&
	    stx.stx_dio_offset_align && MAX(stx.stx_dio_offset_align, stx.stx_dio_mem_align) <= 512)
		return 512;
#endif
	return BLOCK_SIZE;
}

static int open_image(struct raw_device *raw, const char *path, int mode, unsigned flags)
{
	struct stat st;
	int rc;

	raw->fd = open(path, mode | O_DIRECT);
	if (raw->fd < 0 && errno == EINVAL) {
		log_msg(LOG_NOTE, "%s: no direct I/O on this file, going through the page cache", path);
		raw->fd = open(path, mode);
	}
	if (raw->fd < 0 || fstat(raw->fd, &st) < 0)
		return -errno;
	if (!S_ISREG(st.st_mode))
		return -ENOTBLK;
	raw->dev.align = image_align(raw->fd);
	raw->dev.size = (uint64_t)st.st_size & ~(uint64_t)(raw->dev.align - 1);
	raw->dev.volatile_cache = true;
	if (flags & DEV_SHARED)
		return 0;
	rc = open_claim(raw, path, 0, &st);
	if (!rc)
		rc = lock_file(raw->claim_fd);
	return rc ? rc : loop_over_image_in_use(&st);
}

int dev_open(const char *path, unsigned flags, struct device **out)
{
	int mode = (flags & DEV_READ_ONLY ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY;
	struct raw_device *raw;
	struct stat st;
	int rc;

	if (stat(path, &st) < 0)
		return -errno;
	if (!S_ISBLK(st.st_mode) && !S_ISREG(st.st_mode))
		return -ENOTBLK;
	raw = calloc(1, sizeof(*raw));
	if (!raw)
		return -ENOMEM;
	raw->fd = raw->claim_fd = raw->backing_fd = -1;
	raw->dev.ops = &raw_ops;
	raw->dev.read_only = flags & DEV_READ_ONLY;
	/* What an earlier owner wrote may still need a flush. */
	atomic_init(&raw->dev.writes_done, 1);
	snprintf(raw->dev.path, sizeof(raw->dev.path), "%s", path);
	rc = S_ISBLK(st.st_mode) ? open_block(raw, path, mode, flags) :
				   open_image(raw, path, mode, flags);
	if (rc) {
		raw_close(&raw->dev);
		return rc;
	}
	*out = &raw->dev;
	return 0;
}
