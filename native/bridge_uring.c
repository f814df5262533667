/* SPDX-License-Identifier: MIT
 *
 * bridge_uring.c - FUSE over io_uring: entries, and why they do not run out.
 *
 * Why no request waits for ever. A parked request keeps its entry, and the one that would resume it (an
 * unlock, the return of a layout) may come from the same CPU. So:
 *  1. A thread does not sleep while a queue of its has fewer than FREE_MIN free entries, unless no more are
 *     to be had (full). Then requests that would wait for any time are refused instead (uring_may_wait).
 *     The others end by themselves: by the device, by a recall's time limit.
 *  2. The kernel queues a request for which it finds no free entry, and takes it from there only when an
 *     answer is committed to this queue; a new entry is not enough. Until we registered one, a commit that finds the
 *     queue empty is followed by free entries: so requests are queued only if all entries were taken
 *     and more were registered since (suspect). Then a message without meaning is made to go through the queue
 *     (kick): the answer to it fetches what is queued. If its entry comes back at once, with the next
 *     request, there may be more, and another kick follows; else the queue was empty.
 *
 * The kick is FUSE_NOTIFY_RETRIEVE of no bytes of a regular file: the kernel puts NOTIFY_REPLY into the
 * queue of the CPU that the notification is written on. A thread that is not pinned to one CPU goes there for the
 * call. If it may not run there (cpusets), or nobody has a regular file open, what is queued waits for the next
 * answer to any request of that CPU. Kicks are for requests that wait in the kernel behind those that wait
 * here; as long as all go on, their answers fetch what is queued.
 *
 * Memory of an entry is touched when it is used first; what large payloads leave is given back before the
 * commit (request_shrink), but not under a large answer: its entry keeps it until its next small one.
 */
#include <fcntl.h>
#include <liburing.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bridge_uring.h"
#include "log.h"

#define FREE_MIN 8u
#define ENTRIES_ONLINE 32u  /* at the start, of a CPU that is online */
#define ENTRIES_ALL 1024u   /* at the start, about, where there are many */
#define ENTRIES_OFFLINE FREE_MIN
#define ENTRIES_MORE 32u
#define ENTRIES_MAX 16384u  /* of one queue */
#define KICK_UNIQUE (UINT64_C(1) << 62)
#define KICK_TRIES 16u      /* inodes */
#define IOVECS_AT 512u      /* in the memory of an entry; the message is made behind, next to the payload */

/* What one thread did before an answer happens before the request that the answer leads to, in whichever
 * thread: through the kernel, where the thread sanitizer sees nothing of it. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *address);
void __tsan_release(void *address);
static void before_answer(struct bridge *b) { __tsan_release(b); }
static void after_request(struct bridge *b) { __tsan_acquire(b); }
#else
static void before_answer(struct bridge *b) { (void)b; }
static void after_request(struct bridge *b) { (void)b; }
#endif

/* ---- commands ---- */

/* NULL: the ring is full, and the kernel takes nothing now. */
static struct io_uring_sqe *get_sqe(struct bridge_thread *t)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(t->ring);

	if (sqe)
		return sqe;
	io_uring_submit(t->ring);
	return io_uring_get_sqe(t->ring);
}

static bool command(struct request *r, enum fuse_uring_cmd op)
{
	struct bridge_thread *t = r->t;
	struct io_uring_sqe *sqe = get_sqe(t);
	struct fuse_uring_cmd_req *req;

	if (!sqe)
		return false;
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, t->fd, NULL, 0, 0);
	if (op == FUSE_IO_URING_CMD_REGISTER) {
		sqe->addr = (uintptr_t)(r->memory + IOVECS_AT);
		sqe->len = 2;
	}
	sqe->cmd_op = op;
	req = memset(sqe->cmd, 0, 80); /* what is left of 128 bytes */
	req->qid = r->queue->qid;
	if (op == FUSE_IO_URING_CMD_COMMIT_AND_FETCH)
		req->commit_id = r->head.unique;
	io_uring_sqe_set_data64(sqe, (uintptr_t)r | 1);
	r->with_kernel = true;
	r->queue->free++;
	t->n_with_kernel++;
	return true;
}

/* It is no entry any more. */
static void drop_entry(struct request *r)
{
	if (r->queue->probe == r)
		r->queue->probe = NULL;
	r->queue->entries--;
	if (r->fixed)
		ioctx_unfix(r->t->ctx, r->payload);
	request_destroy(r);
}

static bool register_entry(struct bridge_thread *t, struct uring_queue *q)
{
	struct request *r = request_create(t);
	struct iovec *iov;

	if (!r)
		return false;
	iov = (void *)(r->memory + IOVECS_AT);
	iov[0] = (struct iovec){r->memory, sizeof(struct fuse_uring_req_header)};
	iov[1] = (struct iovec){r->payload, BRIDGE_MAX_IO};
	r->queue = q;
	r->registering = true;
	/* These pages are never given back (request_shrink). */
	r->fixed = ioctx_fix(t->ctx, r->payload);
	q->entries++;
	if (command(r, FUSE_IO_URING_CMD_REGISTER))
		return true;
	drop_entry(r);
	return false;
}

/* Registrations run when they are submitted: those that fail have been completed when this returns. */
static int submit_registrations(struct bridge_thread *t)
{
	int rc = io_uring_submit(t->ring);

	while (rc == -EINTR)
		rc = io_uring_submit(t->ring);
	if (rc < 0)
		return rc;
	if (io_uring_sq_ready(t->ring))
		return -EAGAIN;
	ioctx_run(t->ctx, false);
	return t->register_error;
}

/* 0, or why the first entries could not be registered. */
int uring_register_first(struct bridge_thread *t)
{
	int err = t->ring ? 0 : -ENOSYS;

	if (t->ring)
		ioctx_fix_device(t->ctx, t->b->fs->dev);
	for (unsigned i = 0; i < t->n_queues && !err; i++) {
		err = register_entry(t, &t->queues[i]) ? 0 : -ENOMEM;
		if (!err)
			err = submit_registrations(t);
	}
	return err;
}

/* ---- more entries ---- */

static void stop_growing(struct uring_queue *q, const char *why)
{
	if (!q->full)
		log_msg(LOG_WARN, "no more than %u requests of CPU %u at a time: %s", q->entries,
			q->qid, why);
	q->full = true;
}

static void grow(struct bridge_thread *t, struct uring_queue *q, unsigned entries)
{
	int err = 0;

	while (entries-- && !err)
		err = register_entry(t, q) ? 0 : -ENOMEM;
	/* Runs callbacks, and so perhaps more than this: after it nothing is as it was. */
	if (!err)
		err = submit_registrations(t);
	q->suspect = true;
	q->kicked = false; /* an earlier one may be among what is queued */
	if (err && !t->gone)
		stop_growing(q, strerror(-err));
	else if (q->entries >= ENTRIES_MAX)
		stop_growing(q, "that is the limit");
}



/* Where its queues are, as far as it may run there. */
static void pin(const struct bridge_thread *t)
{
	cpu_set_t allowed, wanted;

	if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
		return; /* more CPUs than the set holds */
	CPU_ZERO(&wanted);
	for (unsigned i = 0; i < t->n_queues; i++)
		if (t->queues[i].qid < CPU_SETSIZE)
			CPU_SET(t->queues[i].qid, &wanted);
	CPU_AND(&wanted, &wanted, &allowed);
	if (CPU_COUNT(&wanted))
		sched_setaffinity(0, sizeof(wanted), &wanted); /* refused: it runs anywhere */
}

void uring_go_live(struct bridge_thread *t)
{
	unsigned share = ENTRIES_ALL / (t->n_queues * t->b->n_threads + 1);
	unsigned first = MIN(ENTRIES_ONLINE, MAX(ENTRIES_OFFLINE, share));

	pin(t);
	t->deaf = t->index != 0;
	for (unsigned i = 0; i < t->n_queues && !t->gone; i++) {
		struct uring_queue *q = &t->queues[i];
		unsigned wanted = q->online ? first : ENTRIES_OFFLINE;

		if (q->entries < wanted)
			grow(t, q, wanted - q->entries);
	}
}

bool uring_may_wait(const struct request *r)
{
	return !r->queue || !r->queue->full || r->queue->free >= FREE_MIN;
}

/* 0 or a negative errno: -EINVAL: not a regular file; -ENOENT: the kernel has no such inode. */
static int write_kick(struct bridge_thread *t, struct uring_queue *q, inum_t ino)
{
	struct {
		struct fuse_out_header head;
		struct fuse_notify_retrieve_out out;
	} m = {
		.head = {.len = sizeof(m), .error = FUSE_NOTIFY_RETRIEVE},
		.out = {.notify_unique = KICK_UNIQUE + 2 * q->kicks++, .nodeid = ino},
	};

	return write(t->fd, &m, sizeof(m)) < 0 ? -errno : 0;
}

static bool kick_one_of(struct bridge_thread *t, struct uring_queue *q, const inum_t *inos, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		if (write_kick(t, q, inos[i]) == 0)
			return true;
	return false;
}

/* Of those who wait in this queue: what they wait for is known to the kernel. */
static unsigned waiting_inos(const struct bridge_thread *t, const struct uring_queue *q, inum_t *inos)
{
	unsigned n = 0;

	for (unsigned i = 0; i < BRIDGE_PENDING_BUCKETS && n < KICK_TRIES; i++)
		for (struct request *r = t->pending[i]; r && n < KICK_TRIES; r = r->pending_next)
			if (r->queue == q && r->waiting != WAIT_NONE && (!n || inos[n - 1] != r->head.nodeid))
				inos[n++] = r->head.nodeid;
	return n;
}

/* Of regular files that somebody has open. */
static unsigned open_inos(struct bridge *b, inum_t *inos)
{
	unsigned n = 0;

	pthread_mutex_lock(&b->open_mutex);
	for (struct open_file *of = b->open; of && n < KICK_TRIES; of = of->next)
		inos[n++] = of->in->ino;
	pthread_mutex_unlock(&b->open_mutex);
	return n;
}

/* The kernel takes such a notification only for a regular file that it has in memory. */
static bool kick_here(struct bridge_thread *t, struct uring_queue *q)
{
	inum_t inos[KICK_TRIES];
	unsigned n = waiting_inos(t, q, inos);

	/* Without one that waits, answers follow, which fetch what is queued. */
	return n && (kick_one_of(t, q, inos, n) || kick_one_of(t, q, inos, open_inos(t->b, inos)));
}

/* The kick goes to the queue of the CPU that we are on. */
static void kick(struct bridge_thread *t, struct uring_queue *q)
{
	cpu_set_t before, there;
	bool moved = false;

	if (sched_getcpu() != q->qid && sched_getaffinity(0, sizeof(before), &before) == 0 &&
	    q->qid < CPU_SETSIZE) {
		CPU_ZERO(&there);
		CPU_SET(q->qid, &there);
		moved = sched_setaffinity(0, sizeof(there), &there) == 0;
	}
	if (sched_getcpu() == q->qid && kick_here(t, q)) {
		q->kicked = true;
		q->suspect = false;
	}
	if (moved)
		sched_setaffinity(0, sizeof(before), &before);
}

/* NOTIFY_REPLY, which is what a kick makes. */
static void kicked(struct request *r)
{
	struct uring_queue *q = r->queue;

	r->t->by_opcode[FUSE_NOTIFY_REPLY]++;
	r->answered = false;
	uring_answer(r, 0, NULL, 0);
	q->kicked = false;
	q->probe = r;
	q->probe_sent = false;
	uring_commit(r);
}

/* The answer to a kick is submitted by the round that follows. If it is still out the next time, it has
 * fetched nothing. */
static void look_at_probe(struct uring_queue *q)
{
	if (q->probe && q->probe_sent)
		q->probe = NULL;
	q->probe_sent = true;
}

static void commit_later(struct bridge_thread *t)
{
	while (t->uncommitted) {
		struct request *r = t->uncommitted;

		t->uncommitted = r->pool_next;
		uring_commit(r);
		if (t->uncommitted == r)
			return; /* still no room */
	}
}

void uring_keep(struct bridge_thread *t)
{
	if (unlikely(t->uncommitted))
		commit_later(t);
	if (t->gone || atomic_load(&t->b->transport) != TRANSPORT_URING)
		return;
	for (unsigned i = 0; i < t->n_queues; i++) {
		struct uring_queue *q = &t->queues[i];

		look_at_probe(q);
		if (unlikely(q->free < FREE_MIN && !q->full && q->entries))
			grow(t, q, ENTRIES_MORE);
		if (unlikely(q->suspect && !q->kicked && !q->probe && q->free) &&
		    atomic_load_explicit(&t->inflight, memory_order_relaxed))
			kick(t, q); /* somebody may wait */
	}
}

/* ---- requests ---- */

/* A command that failed, and is not just what is left of a connection that ended. */
static void failed(struct request *r, int err)
{
	struct bridge_thread *t = r->t;

	if (r->registering) {
		t->register_error = err; /* who submitted it looks */
		return;
	}
	log_msg(LOG_ERROR, "the kernel refused an answer over io_uring: %s; the mount is given up",
		strerror(-err));
	/* Its request would wait for ever, and there is no other way to answer it. */
	bridge_abort(t->b);
}

void uring_completed(struct request *r, int res)
{
	struct bridge_thread *t = r->t;

	r->with_kernel = false;
	r->queue->free--;
	t->n_with_kernel--;
	if (unlikely(r->queue->probe == r)) {
		r->queue->probe = NULL;
		r->queue->suspect = true; /* it came back at once, with a request: there may be more */
	}
	if (r->keeps_large) {
		r->keeps_large = false;
		t->large_free--;
	}
	after_request(t->b);
	if (res >= 0) {
		r->registering = false;
		r->pool_next = NULL;
		*t->arrived_tail = r;
		t->arrived_tail = &r->pool_next;
		return;
	}
	if (res == -ENOTCONN || res == -ECONNABORTED || res == -ECANCELED) {
		if (r->registering)
			t->register_error = res;
		bridge_gone(t);
	} else {
		failed(r, res);
	}
	drop_entry(r);
}

/* Header and first argument go where a message from /dev/fuse has them: in front of the payload. */
static void begin(struct request *r)
{
	struct fuse_uring_req_header h;
	struct fuse_in_header in;
	size_t payload, head;
	uint8_t *at;

	memcpy(&h, r->memory, sizeof(h));
	memcpy(&in, h.in_out, sizeof(in));
	payload = h.ring_ent_in_out.payload_sz;
	r->t->by_ring++;
	r->head = in;
	head = in.len - sizeof(in) - payload;
	if (in.opcode == FUSE_NOTIFY_REPLY) {
		kicked(r);
		return;
	}
	if (in.len < sizeof(in) + payload || head > sizeof(h.op_in) || payload > BRIDGE_MAX_IO) {
		log_msg(LOG_ERROR, "a malformed request over io_uring: opcode %u, %u bytes, payload %zu",
			in.opcode, in.len, payload);
		r->answered = false;
		uring_answer(r, -EIO, NULL, 0);
		uring_commit(r);
		return;
	}
	at = r->payload - head;
	memcpy(at, h.op_in, head);
	memcpy(at - sizeof(in), &in, sizeof(in));
	r->touched = MAX(r->touched, payload);
	request_begin(r, (const void *)(at - sizeof(in)), in.len);
}

unsigned uring_serve(struct bridge_thread *t)
{
	unsigned n = 0;

	while (t->arrived && n < BRIDGE_BATCH) {
		struct request *r = t->arrived;

		t->arrived = r->pool_next;
		if (!t->arrived)
			t->arrived_tail = &t->arrived;
		if (unlikely(t->gone))
			drop_entry(r); /* nobody waits for it any more */
		else
			begin(r);
		n++;
	}
	return n;
}

void uring_answer(struct request *r, int error, const void *out, size_t len)
{
	struct fuse_uring_req_header *h = (void *)r->memory;
	struct fuse_out_header head = {
		.len = (uint32_t)(sizeof(head) + len),
		.error = error,
		.unique = r->head.unique,
	};

	xassert(!r->answered);
	xassert(len <= BRIDGE_MAX_IO);
	if (len && out != r->payload)
		memmove(r->payload, out, len);
	r->touched = MAX(r->touched, len);
	memcpy(h->in_out, &head, sizeof(head));
	h->ring_ent_in_out = (struct fuse_uring_ent_in_out){
		.commit_id = r->head.unique,
		.payload_sz = (uint32_t)len,
	};
	r->answered = true;
}

static size_t answer_bytes(const struct request *r)
{
	const struct fuse_uring_req_header *h = (const void *)r->memory;

	return h->ring_ent_in_out.payload_sz;
}

void uring_commit(struct request *r)
{
	struct bridge_thread *t = r->t;

	xassert(r->answered);
	if (unlikely(t->gone)) {
		drop_entry(r);
		return;
	}
	/* The answer is in the payload until the kernel has copied it, and by then the next request may be. */
	r->keeps_large = request_shrink(r, answer_bytes(r), &t->large_free);
	before_answer(t->b);
	if (likely(command(r, FUSE_IO_URING_CMD_COMMIT_AND_FETCH)))
		return;
	if (r->keeps_large)
		t->large_free--;
	r->keeps_large = false;
	r->pool_next = t->uncommitted;
	t->uncommitted = r;
}
