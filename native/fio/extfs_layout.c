/* SPDX-License-Identifier: MIT
 *
 * extfs_layout.c - a fio engine that reads and writes files of a mounted extfs through layouts: it
 * takes a layout of each file that a job opens (RW if the job writes), maps file offsets to the
 * device, and does the I/O there with io_uring. Any job file runs with it unchanged:
 *
 *     fio --ioengine=external:native/fio/extfs_layout.so job.fio
 *
 * Built by scripts/fio-layout from the source of the installed fio, whose headers it needs (an
 * engine has to be of the same version).
 *
 * What was written to blocks that had never been written is committed at every fsync and at close;
 * then the layout is returned. Blocks that are INVALID and were not written by this job read as
 * zeros, from memory. Recalls are not answered: use it on files that nobody else changes while the
 * job runs. Needs the right to open the device: root.
 *
 * Concurrency: fio calls an engine's functions for one thread_data from one thread. With several
 * jobs on one file each has its own holder, and the later one waits for the earlier one's layout:
 * give jobs files of their own, or use numjobs=1.
 */
#include "config-host.h"
#include "fio.h"
#include "optgroup.h"

#include <liburing.h>

#include "extfs_ioctl.h"

#define EXTENTS_AT_ONCE 100u
#define BLOCK 4096u
#ifdef IORING_SETUP_DEFER_TASKRUN
#define RING_OWN_WORK (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
#else
#define RING_OWN_WORK 0u
#endif
#define LESS(a, b) ((a) < (b) ? (a) : (b))

struct map_extent {
	uint64_t offset, physical, length;
	bool invalid;
};

/* Per open file. */
struct held_file {
	int fd;
	uint64_t holder, key, size;
	struct map_extent *extents;
	unsigned count, cap, last; /* last: where find() was right */
	unsigned char *written; /* a bit for each block of INVALID extents */
	uint64_t blocks;
	bool dirty;
};

/* Per job. */
struct engine {
	struct io_uring ring;
	int device;
	struct io_u **done, **fresh; /* fresh: not handed to the kernel yet */
	unsigned ndone, nfresh, queued;
};

/* How many parts of an io_u are still in the kernel, and what went wrong. */
struct parts {
	unsigned left;
	int error;
};

/* ---- layouts -------------------------------------------------------------------------------- */

static int add_extents(struct held_file *h, const struct extfs_ioc_layout *l)
{
	for (unsigned i = 0; i < l->count; i++) {
		const struct extfs_layout_extent *e = &l->extents[i];

		if (e->state == EXTFS_READ_DATA && l->iomode == EXTFS_RW)
			/* the source of a copy-on-write: what follows is where to write */
			continue;
		if (h->count == h->cap) {
			unsigned cap = h->cap ? 2 * h->cap : 64;
			struct map_extent *more = realloc(h->extents, cap * sizeof(*more));

			if (!more)
				return ENOMEM;
			h->extents = more;
			h->cap = cap;
		}
		h->extents[h->count++] = (struct map_extent){ e->offset, e->physical, e->length,
							      e->state == EXTFS_INVALID_DATA ||
								      e->state == EXTFS_NONE_DATA };
	}
	return 0;
}

static int get_layout(struct held_file *h, enum extfs_iomode iomode, uint64_t size)
{
	size_t bytes = sizeof(struct extfs_ioc_layout) +
		       EXTENTS_AT_ONCE * sizeof(struct extfs_layout_extent);
	struct extfs_ioc_layout *l = malloc(bytes);
	uint64_t at = 0;
	int err = l ? 0 : ENOMEM;

	while (!err && at < size) {
		memset(l, 0, bytes);
		l->size = bytes;
		l->flags = EXTFS_LAYOUT_WAIT;
		l->holder = h->holder;
		l->key = h->key;
		l->iomode = iomode;
		l->count = EXTENTS_AT_ONCE;
		l->offset = at;
		l->length = size - at;
		if (ioctl(h->fd, EXTFS_IOC_LAYOUT_GET(EXTENTS_AT_ONCE), l) < 0)
			err = errno;
		else
			err = add_extents(h, l);
		if (!err && l->next <= at)
			err = EIO;
		at = l->next;
	}
	free(l);
	return err;
}

static int commit_some(struct held_file *h, const struct extfs_range *ranges, unsigned n)
{
	struct {
		struct extfs_ioc_commit c;
		struct extfs_range ranges[64];
	} call = { .c = { .size = _IOC_SIZE(EXTFS_IOC_LAYOUT_COMMIT(n)), .holder = h->holder,
			  .key = h->key,
			  .count = n } };

	memcpy(call.ranges, ranges, n * sizeof(*ranges));
	if (n)
		call.c.file_size = LESS(h->size, ranges[n - 1].offset + ranges[n - 1].length);
	return ioctl(h->fd, EXTFS_IOC_LAYOUT_COMMIT(n), &call) < 0 ? errno : 0;
}

/* Everything written to INVALID blocks since the last time. */
static int commit(struct held_file *h)
{
	struct extfs_range ranges[64];
	unsigned n = 0;
	int err = 0;

	if (!h->dirty)
		return 0;
	for (uint64_t b = 0; b < h->blocks && !err; b++) {
		if (!(h->written[b / 8] & (1u << b % 8)))
			continue;
		h->written[b / 8] &= ~(1u << b % 8);
		if (n && ranges[n - 1].offset + ranges[n - 1].length == b * BLOCK) {
			ranges[n - 1].length += BLOCK;
			continue;
		}
		if (n == 64) {
			err = commit_some(h, ranges, n);
			n = 0;
		}
		ranges[n++] = (struct extfs_range){ b * BLOCK, BLOCK };
	}
	if (!err && n)
		err = commit_some(h, ranges, n);
	h->dirty = false;
	return err;
}

static const struct map_extent *find(struct held_file *h, uint64_t offset)
{
	const struct map_extent *last = &h->extents[h->last];
	unsigned low = 0, high = h->count;

	if (h->last < h->count && offset - last->offset < last->length)
		return last;
	while (low < high) {
		unsigned mid = (low + high) / 2;

		if (h->extents[mid].offset + h->extents[mid].length <= offset)
			low = mid + 1;
		else
			high = mid;
	}
	if (low == h->count || h->extents[low].offset > offset)
		return NULL;
	h->last = low;
	return &h->extents[low];
}

/* ---- files ---------------------------------------------------------------------------------- */

static int open_device(struct engine *e, int fd)
{
	struct extfs_ioc_info info = { .size = sizeof(info) };

	if (e->device >= 0)
		return 0;
	if (ioctl(fd, EXTFS_IOC_INFO, &info) < 0)
		return errno;
	e->device = open(info.device, O_RDWR | O_DIRECT | O_CLOEXEC);
	return e->device < 0 ? errno : 0;
}

static void free_file(struct held_file *h)
{
	free(h->extents);
	free(h->written);
	free(h);
}

static int engine_open(struct thread_data *td, struct fio_file *f)
{
	struct extfs_ioc_holder reg = { .size = sizeof(reg), .name = "fio" };
	struct held_file *h = calloc(1, sizeof(*h));
	uint64_t end = f->file_offset + f->io_size;
	int err = h ? generic_open_file(td, f) : ENOMEM;

	if (err) {
		free(h);
		return err;
	}
	h->fd = f->fd;
	h->size = f->real_file_size == -1ULL || f->real_file_size < end ? end : f->real_file_size;
	h->blocks = (h->size + BLOCK - 1) / BLOCK;
	h->written = calloc(1, h->blocks / 8 + 1);
	err = h->written ? open_device(td->io_ops_data, f->fd) : ENOMEM;
	if (!err && ioctl(h->fd, EXTFS_IOC_HOLDER_REGISTER, &reg) < 0)
		err = errno;
	h->holder = reg.id;
	h->key = reg.key;
	if (!err)
		err = get_layout(h, td_write(td) ? EXTFS_RW : EXTFS_READ, h->blocks * BLOCK);
	if (err) {
		td_verror(td, err, "layout of the file");
		free_file(h);
		if (generic_close_file(td, f))
			log_err("extfs_layout: %s could not be closed\n", f->file_name);
		return 1;
	}
	FILE_SET_ENG_DATA(f, h);
	return 0;
}

static int engine_close(struct thread_data *td, struct fio_file *f)
{
	struct held_file *h = FILE_ENG_DATA(f);
	struct extfs_ioc_return ret = {
		.size = sizeof(ret), .flags = EXTFS_RETURN_ALL, .iomode = EXTFS_ANY,
		.length = UINT64_MAX,
	};
	int err = 0;

	if (h) {
		err = commit(h);
		ret.holder = h->holder;
		ret.key = h->key;
		if (ioctl(h->fd, EXTFS_IOC_LAYOUT_RETURN, &ret) < 0 && !err)
			err = errno;
		free_file(h);
		FILE_SET_ENG_DATA(f, NULL);
	}
	if (err)
		td_verror(td, err, "commit and return");
	return generic_close_file(td, f) || err;
}

/* ---- I/O ------------------------------------------------------------------------------------ */

static void note_written(struct held_file *h, uint64_t offset, uint64_t length)
{
	for (uint64_t b = offset / BLOCK; b < (offset + length + BLOCK - 1) / BLOCK; b++)
		h->written[b / 8] |= 1u << b % 8;
	h->dirty = true;
}

static bool never_written(const struct held_file *h, const struct map_extent *m, uint64_t offset)
{
	uint64_t b = offset / BLOCK;

	return m->invalid && !(h->written[b / 8] & (1u << b % 8));
}

/* One part, up to the end of its extent. Bytes done or queued; 0: the ring is full; negative: an
 * errno. */
static int64_t queue_part(struct engine *e, struct held_file *h, struct io_u *io_u, uint64_t at)
{
	uint64_t offset = io_u->offset + at;
	const struct map_extent *m = find(h, offset);
	char *buf = (char *)io_u->xfer_buf + at;
	struct io_uring_sqe *sqe;
	uint64_t len, place;

	if (!m)
		return -ENXIO;
	len = LESS(m->offset + m->length - offset, (uint64_t)io_u->xfer_buflen - at);
	place = m->physical + (offset - m->offset);
	if (io_u->ddir == DDIR_READ && m->invalid) {
		len = LESS(len, BLOCK - offset % BLOCK);
		if (never_written(h, m, offset)) {
			memset(buf, 0, len);
			return len;
		}
	}
	sqe = io_uring_get_sqe(&e->ring);
	if (!sqe)
		return 0;
	if (io_u->ddir == DDIR_READ)
		io_uring_prep_read(sqe, e->device, buf, len, place);
	else
		io_uring_prep_write(sqe, e->device, buf, len, place);
	io_uring_sqe_set_data(sqe, io_u);
	((struct parts *)io_u->engine_data)->left++;
	e->queued++;
	if (io_u->ddir == DDIR_WRITE && m->invalid)
		note_written(h, offset, len);
	return len;
}

/* Nothing of it is in the kernel: it ends here, with an error or without. */
static enum fio_q_status at_once(struct thread_data *td, struct io_u *io_u, int err)
{
	if (fio_fill_issue_time(td))
		fio_gettime(&io_u->issue_time, NULL);
	io_u->error = err;
	return FIO_Q_COMPLETED;
}

static enum fio_q_status sync_file(struct thread_data *td, struct held_file *h, struct io_u *io_u)
{
	struct engine *e = td->io_ops_data;

	return at_once(td, io_u, fdatasync(e->device) < 0 ? errno : commit(h));
}

static enum fio_q_status engine_queue(struct thread_data *td, struct io_u *io_u)
{
	struct engine *e = td->io_ops_data;
	struct held_file *h = FILE_ENG_DATA(io_u->file);
	struct parts *p = io_u->engine_data;
	uint64_t at = 0;

	if (ddir_sync(io_u->ddir)) {
		if (e->queued)
			return FIO_Q_BUSY;
		return sync_file(td, h, io_u);
	}
	if (io_u->ddir != DDIR_READ && io_u->ddir != DDIR_WRITE)
		return at_once(td, io_u, EOPNOTSUPP);
	if (io_uring_sq_space_left(&e->ring) < 8)
		return FIO_Q_BUSY;
	*p = (struct parts){ 0 };
	while (at < io_u->xfer_buflen) {
		int64_t n = queue_part(e, h, io_u, at);

		/* more extents in one transfer than the ring has room for: hand over what there
		 * is */
		if (n == 0) {
			io_uring_submit(&e->ring);
			continue;
		}
		if (n < 0) {
			p->error = (int)-n;
			break;
		}
		at += n;
	}
	if (!p->left)
		return at_once(td, io_u, p->error);
	e->fresh[e->nfresh++] = io_u;
	return FIO_Q_QUEUED;
}

/* The time of issue of what is in the kernel now: one look at the clock for all of it. */
static void note_issued(struct thread_data *td, struct engine *e)
{
	struct timespec now;

	if (e->nfresh && fio_fill_issue_time(td)) {
		fio_gettime(&now, NULL);
		for (unsigned i = 0; i < e->nfresh; i++) {
			e->fresh[i]->issue_time = now;
			io_u_queued(td, e->fresh[i]);
		}
		if (td->o.read_iolog_file)
			td->last_issue = now;
	}
	io_u_mark_submit(td, e->nfresh);
	e->nfresh = 0;
}

/* What has been queued goes to the kernel, and in the same system call it posts what has
 * completed. */
static int engine_commit(struct thread_data *td)
{
	struct engine *e = td->io_ops_data;

	while (io_uring_sq_ready(&e->ring)) {
		int rc = io_uring_submit_and_get_events(&e->ring);

		if (rc == -EAGAIN || rc == -EBUSY || rc == -EINTR)
			usleep(1); /* no memory for more, or too many that wait to be looked at */
		else if (rc < 0)
			return rc;
	}
	note_issued(td, e);
	return 0;
}

static void finish_part(struct engine *e, struct io_uring_cqe *cqe)
{
	struct io_u *io_u = io_uring_cqe_get_data(cqe);
	struct parts *p = io_u->engine_data;

	if (cqe->res < 0 && !p->error)
		p->error = -cqe->res;
	e->queued--;
	if (--p->left)
		return;
	io_u->error = p->error;
	e->done[e->ndone++] = io_u;
}

/* All that the kernel has posted, but no more than max io_u's. */
static void reap(struct engine *e, unsigned max)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0;

	io_uring_for_each_cqe(&e->ring, head, cqe) {
		if (e->ndone == max)
			break;
		finish_part(e, cqe);
		seen++;
	}
	io_uring_cq_advance(&e->ring, seen);
}

static int engine_getevents(struct thread_data *td, unsigned int min, unsigned int max,
			    const struct timespec *t)
{
	struct engine *e = td->io_ops_data;
	struct io_uring_cqe *cqe;

	e->ndone = 0;
	for (;;) {
		int rc;

		reap(e, max);
		if (e->ndone >= min)
			return (int)e->ndone;
		rc = io_uring_wait_cqe_nr(&e->ring, &cqe, min - e->ndone);
		if (rc < 0 && rc != -EINTR && rc != -EAGAIN)
			return rc;
	}
}

static struct io_u *engine_event(struct thread_data *td, int event)
{
	struct engine *e = td->io_ops_data;

	return e->done[event];
}

static int engine_io_u_init(struct thread_data *td, struct io_u *io_u)
{
	io_u->engine_data = calloc(1, sizeof(struct parts));
	return io_u->engine_data ? 0 : ENOMEM;
}

static void engine_io_u_free(struct thread_data *td, struct io_u *io_u)
{
	free(io_u->engine_data);
	io_u->engine_data = NULL;
}

/* The best ring that this kernel has: no interrupt for a completion that we come for anyway (5.19),
 * and all work of completions in our own calls (6.1). As fio's own engine does. */
static int make_ring(struct thread_data *td, struct io_uring *ring)
{
	static const unsigned flags[] = {
		IORING_SETUP_COOP_TASKRUN | RING_OWN_WORK, IORING_SETUP_COOP_TASKRUN, 0,
	};
	int rc = -EINVAL;

	for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]) && rc == -EINVAL; i++)
		rc = io_uring_queue_init(4 * td->o.iodepth + 64, ring, flags[i]);
	return rc;
}

static int engine_init(struct thread_data *td)
{
	struct engine *e = calloc(1, sizeof(*e));
	int rc;

	if (!e)
		return ENOMEM;
	e->device = -1;
	e->done = calloc(td->o.iodepth + 1, sizeof(*e->done));
	e->fresh = calloc(td->o.iodepth + 1, sizeof(*e->fresh));
	rc = e->done && e->fresh ? make_ring(td, &e->ring) : -ENOMEM;
	if (rc < 0) {
		td_verror(td, -rc, "io_uring");
		free(e->done);
		free(e->fresh);
		free(e);
		return 1;
	}
	td->io_ops_data = e;
	return 0;
}

static void engine_cleanup(struct thread_data *td)
{
	struct engine *e = td->io_ops_data;

	if (!e)
		return;
	io_uring_queue_exit(&e->ring);
	if (e->device >= 0)
		close(e->device);
	free(e->done);
	free(e->fresh);
	free(e);
	td->io_ops_data = NULL;
}

struct ioengine_ops ioengine = {
	.name = "extfs_layout",
	.version = FIO_IOOPS_VERSION,
	.flags = FIO_RAWIO | FIO_MEMALIGN | FIO_NO_OFFLOAD | FIO_ASYNCIO_SETS_ISSUE_TIME,
	.init = engine_init,
	.io_u_init = engine_io_u_init,
	.io_u_free = engine_io_u_free,
	.queue = engine_queue,
	.commit = engine_commit,
	.getevents = engine_getevents,
	.event = engine_event,
	.open_file = engine_open,
	.close_file = engine_close,
	.get_file_size = generic_get_file_size,
	.cleanup = engine_cleanup,
};
