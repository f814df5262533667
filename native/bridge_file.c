/* SPDX-License-Identifier: MIT
 *
 * bridge_file.c - requests about open files: OPEN to RELEASE, READ, WRITE, FSYNC, FALLOCATE, LSEEK,
 * COPY_FILE_RANGE.
 *
 * Whatever may touch the device is a file operation (file.h) that answers from its done callback.
 */
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bridge.h"
#include "bridge_control.h"
#include "log.h"

/* ---- open files ---- */

/* Access mode 3 is for ioctl(2) only, which may do either. */
static bool open_reads(uint32_t flags)
{
	return (flags & O_ACCMODE) != O_WRONLY;
}

static bool open_writes(uint32_t flags)
{
	return (flags & O_ACCMODE) != O_RDONLY;
}

int open_file_create(struct bridge *b, struct inode *in, uint32_t flags, uint64_t *fh)
{
	struct open_file *of = calloc(1, sizeof(*of));

	if (!of)
		return -ENOMEM;
	inode_open(in);
	local_open(in, open_reads(flags), open_writes(flags));
	of->in = in;
	of->flags = flags;
	of->early_errors = atomic_load(&in->early_told); /* what nobody was told of is for whoever asks next */
	pthread_mutex_lock(&b->open_mutex);
	of->next = b->open;
	if (b->open)
		b->open->prev = of;
	b->open = of;
	pthread_mutex_unlock(&b->open_mutex);
	*fh = (uintptr_t)of;
	return 0;
}

void open_file_close(struct bridge *b, struct open_file *of)
{
	pthread_mutex_lock(&b->open_mutex);
	*(of->prev ? &of->prev->next : &b->open) = of->next;
	if (of->next)
		of->next->prev = of->prev;
	pthread_mutex_unlock(&b->open_mutex);
	open_file_release_owners(b, of);
	open_events_destroy(of->events);
	local_close(of->in, open_reads(of->flags), open_writes(of->flags));
	inode_close(of->in);
	of->in = NULL;
	free(of);
}

void serve_open(struct request *r)
{
	const struct fuse_open_in *in = r->arg;
	int err = request_inode(r, r->head.nodeid, &r->inode);

	/* Pages stay valid until somebody changes the file behind the kernel's back, and that
	 * notifies. */
	if (err)
		request_fail(r, err);
	else
		request_reply_open(r, r->inode, in->flags, FOPEN_KEEP_CACHE);
}

void serve_release(struct request *r)
{
	const struct fuse_release_in *in = r->arg;
	struct open_file *of = open_file_of(in->fh);

	if (in->release_flags & FUSE_RELEASE_FLOCK_UNLOCK)
		plock_release_owner(of->in, true, in->lock_owner);
	open_file_close(r->t->b, of);
	request_fail(r, 0);
}

/* A write that failed after its answer: told once to each open file, and at least to one. */
static int early_error(struct open_file *of)
{
	uint32_t now = early_errors(of->in);

	if (likely(atomic_exchange(&of->early_errors, now) == now))
		return 0;
	atomic_store(&of->in->early_told, now);
	return -err_errno(atomic_load(&of->in->early_code)); /* what failed is in the log */
}

/* Every close(2): its POSIX locks go. Not durable: that is what fsync is for. */
void serve_flush(struct request *r)
{
	const struct fuse_flush_in *in = r->arg;
	struct open_file *of = open_file_of(in->fh);

	open_file_flush_owner(r->t->b, of, in->lock_owner);
	request_fail(r, open_writes(of->flags) ? early_error(of) : 0); /* a reader does not ask */
}

/* ---- data ---- */

/* The kernel leaves it to us to clear setuid and setgid, and would go on running the file with the
 * mode it knows; so it has to hear of it before the writer can. Attributes only, of an inode that
 * the kernel holds for this request: the write takes no lock that waits for one of our answers. */
static void tell_privileges_are_gone(struct request *r, struct inode *in)
{
	struct fuse_notify_inval_inode_out out = {.ino = in->ino, .off = -1};
	struct fuse_out_header head = {
		.len = sizeof(head) + sizeof(out),
		.error = FUSE_NOTIFY_INVAL_INODE,
	};
	struct iovec parts[] = {{&head, sizeof(head)}, {&out, sizeof(out)}};

	if (!(r->fop.flags & FILE_F_PRIV_KILLED))
		return;
	if (writev(r->t->fd, parts, ARRAY_LEN(parts)) < 0 && !bridge_nobody_waits(errno))
		log_msg(LOG_WARN, "the kernel refused a notification: %s", strerror(errno));
}

/* Of calls whose message does not say whether privileges go: only root keeps them. */
static unsigned kill_by_caller(const struct request *r)
{
	return r->head.uid ? FILE_F_KILL_PRIV : 0;
}

static void done_empty(struct request *r, int64_t result)
{
	request_fail(r, result < 0 ? (int)result : 0);
}

static void done_fallocate(struct request *r, int64_t result)
{
	tell_privileges_are_gone(r, r->fop.in);
	done_empty(r, result);
}

static void done_read(struct request *r, int64_t result)
{
	if (result < 0)
		request_fail(r, (int)result);
	else
		request_reply_payload(r, (size_t)result);
}

/* Will pages of the kernel hold what is transferred? Only direct I/O says whose locks it is under, and
 * it says so always; the flags of open(2) do not tell: a file may be mapped through any of its
 * descriptors. */
static void note_pages(struct inode *in, bool direct)
{
	if (!direct && !atomic_load_explicit(&in->pages_cached, memory_order_relaxed))
		atomic_store(&in->pages_cached, true);
}

void serve_read(struct request *r)
{
	const struct fuse_read_in *in = r->arg;

	if (in->size > BRIDGE_MAX_IO || in->offset > FILE_MAX_BYTES) {
		request_fail(r, -EINVAL);
		return;
	}
	file_op_init(&r->fop, FILE_READ, open_file_of(in->fh)->in, r->t->ctx);
	r->fop.offset = in->offset;
	r->fop.len = in->size;
	r->fop.buf = r->payload;
	if (in->flags & O_NOATIME)
		r->fop.flags = FILE_F_NOATIME;
	note_pages(r->fop.in, in->read_flags & FUSE_READ_LOCKOWNER);
	request_start_file(r, done_read);
}

/* The kernel keeps the pages of an append where it thought the end was, and was wrong: the file had
 * grown behind its back. Nobody waits for the notification, as the writer has those pages locked. */
static void drop_misplaced(struct request *r)
{
	const struct fuse_write_in *in = r->arg;

	if (!(r->fop.flags & FILE_F_APPEND) || r->fop.offset == in->offset)
		return;
	if (bridge_notify_inode(r->t->b, r->fop.in->ino, (int64_t)in->offset, 0, NULL))
		log_msg(LOG_WARN, "no memory to say where an append went");
}

/* An operation that was answered early still belongs to the thread; and it counts as one under way, so that nobody lingers on the
 * CPU that its device or the answered client could use. */
static void early_begins(struct bridge_thread *t)
{
	t->inflight++;
}

static void early_ends(void *arg)
{
	struct bridge_thread *t = arg;

	t->inflight--;
}

static void done_write(struct request *r, int64_t result)
{
	struct fuse_write_out out = {.size = (uint32_t)result};

	if (r->fop.early)
		early_begins(r->t);
	tell_privileges_are_gone(r, r->fop.in);
	if (result < 0) {
		request_fail(r, (int)result);
		return;
	}
	drop_misplaced(r);
	request_reply(r, &out, sizeof(out));
}

/* A write for the end of the file. Not for our end, but where the kernel says: pages written back;
 * direct I/O, which comes in parallel pieces that would line up in the order of their arrival; and
 * with writeback_cache everything, since the kernel's file may be longer than ours. */
static bool goes_to_the_end(const struct bridge *b, const struct fuse_write_in *in)
{
	return (in->flags & O_APPEND) && !(in->flags & O_DIRECT) &&
	       !(in->write_flags & FUSE_WRITE_CACHE) && !b->writeback_cache;
}

static unsigned write_flags(const struct bridge *b, const struct fuse_write_in *in)
{
	unsigned flags = 0;

	if (goes_to_the_end(b, in))
		flags |= FILE_F_APPEND;
	if (in->flags & O_DSYNC) /* part of O_SYNC */
		flags |= FILE_F_DSYNC;
	if (in->write_flags & FUSE_WRITE_KILL_SUIDGID)
		flags |= FILE_F_KILL_PRIV;
	if (!(in->flags & (O_DIRECT | O_DSYNC)) && !(in->write_flags & FUSE_WRITE_CACHE))
		flags |= FILE_F_EARLY;
	/* Pages that the kernel writes back have nobody who could be told EBUSY. */
	if (!(in->write_flags & FUSE_WRITE_CACHE) && (in->flags & O_NONBLOCK))
		flags |= FILE_F_NOPIN;
	return flags;
}

void serve_write(struct request *r)
{
	const struct fuse_write_in *in = r->arg;

	if (in->size > BRIDGE_MAX_IO || in->size > r->arg_len - sizeof(*in)) {
		request_fail(r, -EINVAL);
		return;
	}
	if (in->offset > FILE_MAX_BYTES - in->size) {
		request_fail(r, -EFBIG);
		return;
	}
	xassert((const uint8_t *)(in + 1) == r->payload);
	file_op_init(&r->fop, FILE_WRITE, open_file_of(in->fh)->in, r->t->ctx);
	r->fop.offset = in->offset;
	r->fop.len = in->size;
	r->fop.buf = r->payload;
	r->fop.flags = write_flags(r->t->b, in);
	r->fop.ended = early_ends;
	r->fop.ended_arg = r->t;
	note_pages(r->fop.in, in->write_flags & FUSE_WRITE_LOCKOWNER);
	request_start_file(r, done_write);
}

static void done_fsync(struct request *r, int64_t result)
{
	const struct fuse_fsync_in *in = r->arg;
	int early = early_error(open_file_of(in->fh));

	request_fail(r, result < 0 ? (int)result : early);
}

void serve_fsync(struct request *r)
{
	const struct fuse_fsync_in *in = r->arg;

	file_op_init(&r->fop, FILE_FSYNC, open_file_of(in->fh)->in, r->t->ctx);
	if (in->fsync_flags & FUSE_FSYNC_FDATASYNC)
		r->fop.flags = FILE_F_DATASYNC;
	request_start_file(r, done_fsync);
}

void serve_fallocate(struct request *r)
{
	const struct fuse_fallocate_in *in = r->arg;
	uint64_t end;

	/* What the kernel passes on; the rest are calls of the control file. */
	_Static_assert(FALLOC_KEEP_SIZE == FALLOC_FL_KEEP_SIZE &&
			       FALLOC_PUNCH_HOLE == FALLOC_FL_PUNCH_HOLE &&
			       FALLOC_ZERO_RANGE == FALLOC_FL_ZERO_RANGE,
		       "modes are the kernel's");
	if (in->mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) {
		request_fail(r, -EOPNOTSUPP);
		return;
	}
	if (__builtin_add_overflow(in->offset, in->length, &end) || end > FILE_MAX_BYTES) {
		request_fail(r, -EFBIG);
		return;
	}
	file_op_init(&r->fop, FILE_FALLOCATE, open_file_of(in->fh)->in, r->t->ctx);
	r->fop.mode = in->mode;
	r->fop.offset = in->offset;
	r->fop.len = in->length;
	r->fop.flags = kill_by_caller(r);
	request_start_file(r, done_fallocate);
}

void serve_lseek(struct request *r)
{
	const struct fuse_lseek_in *in = r->arg;
	struct fuse_lseek_out out;
	int rc;

	/* What is still in the kernel's cache would be a hole. The kernel stops asking, and takes
	 * every file for data. */
	if (r->t->b->writeback_cache) {
		request_fail(r, -ENOSYS);
		return;
	}
	if (in->whence != SEEK_DATA && in->whence != SEEK_HOLE) {
		request_fail(r, -EINVAL);
		return;
	}
	if (request_await_early(r, open_file_of(in->fh)->in))
		return;
	/* A fragmented file is long to walk, and this thread serves others too: step by step. */
	if (!r->stage)
		r->fop.offset = in->offset;
	rc = file_seek_step(open_file_of(in->fh)->in, &r->fop.offset, (int)in->whence, !r->stage);
	if (!rc) {
		r->stage = 1;
		request_yield(r);
		return;
	}
	if (rc < 0) {
		request_fail(r, rc);
		return;
	}
	out.offset = r->fop.offset;
	request_reply(r, &out, sizeof(out));
}

static void done_copy(struct request *r, int64_t result)
{
	struct fuse_write_out out = {.size = (uint32_t)result};
	struct fuse_copy_file_range_out out64 = {.bytes_copied = (uint64_t)result};

	tell_privileges_are_gone(r, r->fop.dst);
	if (result < 0)
		request_fail(r, (int)result);
	else if (r->head.opcode == FUSE_COPY_FILE_RANGE_64)
		request_reply(r, &out64, sizeof(out64));
	else
		request_reply(r, &out, sizeof(out));
}

/* Nobody can interrupt what is copied by hand; who wants more asks again. */
#define COPY_BY_HAND_MAX (64u << 20)

void serve_copy_file_range(struct request *r)
{
	const struct fuse_copy_file_range_in *in = r->arg;
	uint64_t len = in->len, end;

	/* The answer of the old opcode has 32 bits. */
	if (r->head.opcode == FUSE_COPY_FILE_RANGE)
		len = MIN(len, UINT32_MAX & ~BLOCK_MASK);
	if ((in->off_in ^ in->off_out) & BLOCK_MASK)
		len = MIN(len, COPY_BY_HAND_MAX);
	if (in->flags || __builtin_add_overflow(in->off_in, len, &end) || end > FILE_MAX_BYTES) {
		request_fail(r, -EINVAL);
		return;
	}
	if (__builtin_add_overflow(in->off_out, len, &end) || end > FILE_MAX_BYTES) {
		request_fail(r, -EFBIG);
		return;
	}
	file_op_init(&r->fop, FILE_COPY, open_file_of(in->fh_in)->in, r->t->ctx);
	r->fop.offset = in->off_in;
	r->fop.dst = open_file_of(in->fh_out)->in;
	r->fop.dst_offset = in->off_out;
	r->fop.len = len;
	r->fop.flags = kill_by_caller(r);
	request_start_file(r, done_copy);
}

/* ---- the connection ---- */

void serve_destroy(struct request *r)
{
	request_fail(r, 0);
}
