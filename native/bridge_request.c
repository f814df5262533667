/* SPDX-License-Identifier: MIT
 *
 * bridge_request.c - the life of a request in its thread: memory, answers, parking, starting over.
 *
 * Memory of a request, one mapping:
 *
 *     | unused | message header, arguments | payload, page-aligned        |
 *     0        4016                        4096                  8192 + BRIDGE_MAX_IO
 *
 * A message is read to 4096 - 80: header and write_in are 80 bytes, so the data of a WRITE is
 * aligned for O_DIRECT. The answer of a READ is written from 4080 on: its 16 header bytes end where
 * the payload begins. A request that never has a large payload touches two pages of its mapping. Of an
 * entry of a ring the kernel writes header and first argument to the beginning of the mapping, and what follows
 * to the payload; bridge_uring.c puts the former in front of the latter.
 *
 * States of a request:
 *   reading  in request_buffer();
 *            -> served (request_begin) | pooled (request_free)
 *   served   its handler runs;
 *            -> parked (request_park) | ended (request_reply*, request_fail, request_end)
 *   parked   registered in the pending table; also between two steps of a long walk (request_yield);
 *            -> served (its op or file operation is resumed) | ended (EINTR)
 *   ended    -> pooled at once, or when the interrupt op that is on its way has arrived. An entry of a
 *            ring is given back to the kernel instead, which takes the answer along.
 */
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bridge_control.h"
#include "bridge_uring.h"
#include "log.h"

#define HEAD_BYTES REQUEST_HEAD_BYTES
#define MESSAGE_AT (HEAD_BYTES - sizeof(struct fuse_in_header) - sizeof(struct fuse_write_in))
#define MEMORY_BYTES (HEAD_BYTES + BRIDGE_MAX_IO + 4096u)
/* Mappings that a thread keeps for reuse; and how many of these may keep a large payload
 * resident. */
#define POOL_MAX 64u
#define POOL_LARGE 8u
#define LARGE_BYTES (64u << 10)
_Static_assert(LARGE_BYTES >= IOCTX_FIXED_BYTES, "what is fixed is never given back");
#define REAPER_TRIES 10000u

static struct bridge *bridge_of(const struct request *r) { return r->t->b; }

/* ---- memory ---- */

struct request *request_alloc(struct bridge_thread *t)
{
	struct request *r = t->pool;

	if (r) {
		t->pool = r->pool_next;
		t->pooled--;
		t->pooled_large -= r->touched > LARGE_BYTES;
		return r;
	}
	return request_create(t);
}

struct request *request_create(struct bridge_thread *t)
{
	struct request *r = calloc(1, sizeof(*r));

	if (!r)
		return NULL;
	r->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			 -1, 0);
	if (r->memory == MAP_FAILED) {
		free(r);
		return NULL;
	}
	r->t = t;
	r->payload = r->memory + HEAD_BYTES;
	return r;
}

void request_destroy(struct request *r)
{
	munmap(r->memory, MEMORY_BYTES);
	free(r);
}

/* Some stay as they are, for the next ones of their kind; a burst of large requests must not stay in
 * memory. */
bool request_shrink(struct request *r, size_t needed, unsigned *n_large)
{
	if (r->touched <= LARGE_BYTES)
		return false;
	if (*n_large < POOL_LARGE || needed > LARGE_BYTES) {
		++*n_large;
		return true;
	}
	madvise(r->payload + LARGE_BYTES, BRIDGE_MAX_IO - LARGE_BYTES, MADV_DONTNEED);
	r->touched = LARGE_BYTES;
	return false;
}

void request_free(struct request *r)
{
	struct bridge_thread *t = r->t;

	if (t->pooled >= POOL_MAX) {
		request_destroy(r);
		return;
	}
	request_shrink(r, 0, &t->pooled_large);
	r->pool_next = t->pool;
	t->pool = r;
	t->pooled++;
}

void request_pool_destroy(struct bridge_thread *t)
{
	while (t->pool) {
		struct request *r = t->pool;

		t->pool = r->pool_next;
		request_destroy(r);
	}
	t->pooled = t->pooled_large = 0;
}

void *request_buffer(struct request *r, size_t *len)
{
	*len = MEMORY_BYTES - MESSAGE_AT;
	return r->memory + MESSAGE_AT;
}

/* ---- begin and end ---- */

void request_drop_references(struct request *r)
{
	if (r->inode)
		inode_put(r->inode);
	if (r->inode2)
		inode_put(r->inode2);
	r->inode = r->inode2 = NULL;
}

static void dispose(struct request *r)
{
	r->t->inflight--;
	if (r->queue)
		uring_commit(r);
	else
		request_free(r);
}

void request_end(struct request *r)
{
	bool linger;

	xassert(r->waiting == WAIT_NONE && !r->ended);
	request_drop_references(r);
	if (unlikely(r->uses.n))
		request_uses_end(&r->uses);
	pthread_mutex_lock(&r->t->pending_mutex);
	linger = r->ended = r->interrupt_queued;
	pthread_mutex_unlock(&r->t->pending_mutex);
	if (!linger) /* else the thread stays, until the interrupt op has arrived */
		dispose(r);
}

/* Runs the handler until it has answered or parked. */
static void serve(struct request *r)
{
	if (control_serve(r))
		return;
	if (r->row->server == OPCODE_FORWARD)
		forward_send(r);
	else
		r->row->serve(r);
}

static void interrupt_arrived(struct op *op);
static void wait_over(struct op *op);

void request_begin(struct request *r, const struct fuse_in_header *in, size_t len)
{
	struct bridge_thread *t = r->t;
	size_t head = sizeof(*in);

	t->inflight++;
	idle_poll_count(atomic_load_explicit(&t->b->idle, memory_order_acquire), &t->meter);
	r->in = in;
	r->head = *in;
	r->arg = in + 1;
	r->arg_len = len - head;
	r->touched = MAX(r->touched, len);
	r->waiting = WAIT_NONE;
	r->answered = r->early_waited = false;
	r->interrupted = r->interrupt_queued = r->ended = r->registered = r->file_ran = false;
	r->stage = r->reaper_tries = 0;
	r->inode = r->inode2 = NULL;
	r->op = (struct op){.resume = wait_over, .ctx = t->ctx};
	r->interrupt = (struct op){.resume = interrupt_arrived, .ctx = t->ctx};
	r->row = bridge_opcode(in->opcode);
	if (in->opcode < FUSE_ABI_OPCODES)
		t->by_opcode[in->opcode]++;
	if (!r->row || r->row->server == OPCODE_UNKNOWN)
		request_fail(r, -ENOSYS);
	else if (r->arg_len < r->row->arg_len)
		request_fail(r, -EINVAL);
	else
		serve(r);
}

/* ---- answers ---- */

/* false: the request is gone in the kernel (aborted, unmounted), nobody takes the answer. */
static bool taken(const struct request *r, ssize_t n, size_t len)
{
	if (n < 0 && !bridge_nobody_waits(errno))
		log_msg(LOG_WARN, "the kernel refused the answer to %s (%zu bytes): %s",
			r->row ? r->row->name : "an unknown opcode", len, strerror(errno));
	return n >= 0;
}

static bool answer(struct request *r, int error, const void *out, size_t len)
{
	struct fuse_out_header head = {
		.len = (uint32_t)(sizeof(head) + len),
		.error = error,
		.unique = r->head.unique,
	};
	struct iovec iov[2] = {{&head, sizeof(head)}, {(void *)(uintptr_t)out, len}};

	/* All is done: whoever hears of it finds nothing of it in the way any more. */
	if (unlikely(r->uses.n))
		request_uses_end(&r->uses);
	if (r->queue) {
		uring_answer(r, error, out, len);
		return true; /* unless the connection goes, and everything with it */
	}
	return taken(r, writev(r->t->fd, iov, len ? 2 : 1), len);
}

void request_answer_raw(struct request *r, int error, const void *out, size_t len)
{
	answer(r, error, out, len);
	request_end(r);
}

void request_reply(struct request *r, const void *out, size_t len)
{
	answer(r, 0, out, len);
	request_end(r);
}

bool request_send_payload(struct request *r, size_t len)
{
	struct fuse_out_header *head = (void *)(r->payload - sizeof(*head));

	if (r->queue) {
		r->touched = MAX(r->touched, len);
		return answer(r, 0, r->payload, len);
	}
	*head = (struct fuse_out_header){
		.len = (uint32_t)(sizeof(*head) + len),
		.unique = r->head.unique,
	};
	r->touched = MAX(r->touched, len);
	return taken(r, write(r->t->fd, head, sizeof(*head) + len), len);
}

void request_reply_payload(struct request *r, size_t len)
{
	request_send_payload(r, len);
	request_end(r);
}

static void log_failure(struct request *r, int code)
{
	/* Plain errno values are the caller's business; what is private is the administrator's. */
	if (code > -ERR_FIRST_PRIVATE || code == -ERR_SHUTDOWN)
		return;
	log_msg(LOG_ERROR, "%s of inode %llu: %s", r->row ? r->row->name : "request",
		(unsigned long long)r->head.nodeid, err_text(code));
}

static void wait_for_space(struct request *r);
static bool wait_for_reaper(struct request *r);

void request_fail(struct request *r, int code)
{
	if (code == -ERR_JOURNAL_FULL) {
		wait_for_space(r);
		return;
	}
	if (code == -ENOSPC && wait_for_reaper(r))
		return;
	if (code)
		log_failure(r, code);
	answer(r, code ? -err_errno(code) : 0, NULL, 0);
	request_end(r);
}

void bridge_attr(const struct inode_stat *st, struct fuse_attr *out)
{
	const struct inode_core *c = &st->core;

	*out = (struct fuse_attr){
		.ino = st->ino,
		.size = c->size,
		.blocks = c->blocks << (BLOCK_SHIFT - 9),
		.atime = (uint64_t)c->atime.sec,
		.mtime = (uint64_t)c->mtime.sec,
		.ctime = (uint64_t)c->ctime.sec,
		.atimensec = c->atime.nsec,
		.mtimensec = c->mtime.nsec,
		.ctimensec = c->ctime.nsec,
		.mode = c->mode,
		.nlink = c->nlink,
		.uid = c->uid,
		.gid = c->gid,
		.rdev = (uint32_t)c->rdev,
		.blksize = BLOCK_SIZE,
	};
}

void bridge_entry(const struct inode_stat *st, struct fuse_entry_out *out)
{
	*out = (struct fuse_entry_out){
		.nodeid = st->ino,
		.generation = st->core.generation,
		.entry_valid = BRIDGE_VALID_SECONDS,
		.attr_valid = BRIDGE_VALID_SECONDS,
	};
	bridge_attr(st, &out->attr);
}

void request_reply_entry(struct request *r, struct inode *in)
{
	struct fs *fs = bridge_of(r)->fs;
	struct fuse_entry_out out;
	struct inode_stat st;

	namei_stat(in, &st);
	bridge_entry(&st, &out);
	out.attr_valid = bridge_attr_valid(in);
	/* Counted before the kernel can know of it, or a FORGET could come first. */
	inode_lookup_add(fs, st.ino, 1);
	if (!answer(r, 0, &out, sizeof(out)))
		inode_lookup_forget(fs, st.ino, 1);
	request_end(r);
}

void request_reply_negative(struct request *r)
{
	struct fuse_entry_out out = {.entry_valid = BRIDGE_VALID_SECONDS};

	request_reply(r, &out, sizeof(out));
}

void request_reply_open(struct request *r, struct inode *in, uint32_t open_flags,
			uint32_t fopen_flags)
{
	struct fuse_open_out out = {.open_flags = fopen_flags};
	struct bridge *b = bridge_of(r);
	int err = open_file_create(b, in, open_flags, &out.fh);

	if (err) {
		request_fail(r, err);
		return;
	}
	/* Counted before the look: delegation.h. */
	if (unlikely(delegation_any(in)) && !request_admit_open(r, in, open_flags)) {
		open_file_close(b, open_file_of(out.fh));
		return;
	}
	/* It waited for a client, and what that wrote the kernel has perhaps not been told of yet. */
	if (unlikely(r->uses.n))
		out.open_flags &= ~FOPEN_KEEP_CACHE;
	if (!answer(r, 0, &out, sizeof(out)))
		open_file_close(b, open_file_of(out.fh));
	request_end(r);
}

static void reply_created(struct request *r)
{
	const struct fuse_create_in *in = r->arg;

	request_reply_create(r, r->inode2, in->flags);
}

void request_reply_create(struct request *r, struct inode *in, uint32_t open_flags)
{
	struct bridge *b = bridge_of(r);
	struct {
		struct fuse_entry_out entry;
		struct fuse_open_out open;
	} out = {.open.open_flags = FOPEN_KEEP_CACHE};
	struct inode_stat st;
	int err = open_file_create(b, in, open_flags, &out.open.fh);

	if (err) {
		request_fail(r, err);
		return;
	}
	/* A client may have found the new file already. It cannot be made once more. */
	if (unlikely(delegation_any(in)) &&
	    !request_admit_then(r, in, delegation_op_of_open(open_flags), reply_created)) {
		open_file_close(b, open_file_of(out.open.fh));
		return;
	}
	if (unlikely(r->uses.n)) /* as above */
		out.open.open_flags &= ~FOPEN_KEEP_CACHE;
	namei_stat(in, &st);
	bridge_entry(&st, &out.entry);
	inode_lookup_add(b->fs, st.ino, 1);
	if (!answer(r, 0, &out, sizeof(out))) {
		inode_lookup_forget(b->fs, st.ino, 1);
		open_file_close(b, open_file_of(out.open.fh));
	}
	request_end(r);
}

/* ---- what handlers need ---- */

int request_inode(struct request *r, inum_t ino, struct inode **slot)
{
	struct fs *fs = bridge_of(r)->fs;
	int err;

	xassert(!*slot);
	fs_rdlock(fs);
	err = inode_get(fs, ino, slot);
	fs_unlock(fs);
	if (err)
		*slot = NULL;
	return err;
}

const char *request_name(struct request *r, size_t *at, size_t *len)
{
	const char *name = (const char *)r->arg + *at;

	if (*at >= r->arg_len)
		return NULL;
	*len = strnlen(name, r->arg_len - *at);
	if (*len == r->arg_len - *at)
		return NULL;
	*at += *len + 1;
	return name;
}

struct cred request_cred(const struct request *r, uint32_t umask)
{
	return (struct cred){.uid = r->head.uid, .gid = r->head.gid, .umask = umask};
}

/* ---- parking ---- */

/* A request that programs expect EINTR of when it waits for another. */
static bool may_be_interrupted(const struct request *r)
{
	return r->head.opcode == FUSE_OPEN || r->head.opcode == FUSE_CREATE ||
	       r->head.opcode == FUSE_IOCTL;
}

/* Waiting for a lock, an event, another holder's layout or, to open a file, a delegation ends with any signal. Nothing else may:
 * programs do not expect EINTR of write(2), fsync(2) or unlink(2), and the kernel sends its interrupt for every signal, even one that is
 * handled with SA_RESTART. So what waits otherwise goes on unless its caller is being killed. */
static bool gives_up(const struct request *r, enum request_wait what)
{
	bool any_signal = what == WAIT_LOCK || what == WAIT_EVENT ||
			  (what == WAIT_FILE && r->fop.kind == FILE_LAYOUT_GET) ||
			  (what == WAIT_DELEGATION && may_be_interrupted(r));

	if (any_signal || r->t->gone)
		return true;
	/* Whose descriptor is being fetched has to be there until it is: its number must mean it. */
	return what != WAIT_FORWARD && what != WAIT_SOCKET && interrupt_is_fatal(r->head.pid);
}

/* A signal of which the kernel does not tell us: one that comes after a thread of ours was woken for the
 * request, and before it had the request. It is still there, then. Only calls that wait for somebody
 * are worth the look. */
static bool missed_interrupt(const struct request *r, enum request_wait what)
{
	if (!r->queue || r->interrupted)
		return false;
	if (what != WAIT_LOCK && what != WAIT_EVENT && what != WAIT_DELEGATION &&
	    (what != WAIT_FILE || r->fop.kind != FILE_LAYOUT_GET))
		return false;
	return interrupt_is_due(r->head.pid);
}

/* For seconds at least: nothing that a lingering thread should count with. */
static bool is_dormant(enum request_wait what)
{
	return what == WAIT_EVENT || what == WAIT_DELEGATION;
}

bool request_park(struct request *r, enum request_wait what)
{
	xassert(r->waiting == WAIT_NONE && what != WAIT_NONE);
	if (!r->registered)
		pending_add(r);
	if (unlikely((what == WAIT_LOCK || what == WAIT_EVENT || what == WAIT_SOCKET) &&
		     !uring_may_wait(r))) {
		pending_del(r);
		request_fail(r, what == WAIT_LOCK ? -ENOLCK : -ENOMEM);
		return false;
	}
	if (unlikely(missed_interrupt(r, what)))
		r->interrupted = true;
	if (unlikely(r->interrupted) && gives_up(r, what)) {
		r->t->interrupted++;
		pending_del(r);
		request_fail(r, -EINTR);
		return false;
	}
	r->waiting = what;
	r->t->dormant += is_dormant(what);
	return true;
}

void request_unpark(struct request *r)
{
	xassert(r->waiting != WAIT_NONE);
	r->t->dormant -= is_dormant(r->waiting);
	r->waiting = WAIT_NONE;
	pending_del(r);
}

static void file_done(struct file_op *fop)
{
	struct request *r = fop->user;

	request_unpark(r);
	r->done(r, fop->result);
}

void request_start_file(struct request *r, void (*done)(struct request *r, int64_t result))
{
	r->file_ran = true;
	r->done = done;
	r->fop.done = file_done;
	r->fop.user = r;
	if (request_park(r, WAIT_FILE))
		file_start(&r->fop);
}

void request_drop_pages(struct request *r, struct inode *in, uint64_t offset, uint64_t len,
			void (*done)(struct request *r, int64_t result))
{
	struct bridge *b = bridge_of(r);
	inum_t ino = in->ino;
	bool waits;
	int err;

	r->done = done;
	waits = request_park(r, WAIT_CACHE); /* false: it has its answer, and in may be gone */
	err = bridge_notify_inode(b, ino, (int64_t)offset, (int64_t)len, waits ? &r->op : NULL);
	if (err)
		log_msg(LOG_WARN, "no memory to tell the kernel that a file has changed");
	if (err && waits) {
		request_unpark(r);
		done(r, r->fop.result);
	}
}

static void wait_for_space(struct request *r)
{
	int err;

	request_drop_references(r);
	if (!request_park(r, WAIT_JOURNAL))
		return;
	r->t->parked++;
	r->wait = (struct jrn_waiter){.op = &r->op};
	err = jrn_wait_space(bridge_of(r)->fs, &r->wait);
	if (err == ERR_PARKED)
		return;
	/* There is room already. Through the wake queue all the same, so that handlers never
	 * recurse. */
	r->wait.err = err;
	ioctx_wake(&r->op);
}

/* Space of what was removed comes back a little later, but who removed it counts on it now. Data
 * waits in its operation (file_run.c), names and attributes here: their calls did nothing. Each
 * time something is freed they try again. false: there is nothing to wait for. */
static bool wait_for_reaper(struct request *r)
{
	struct fs *fs = bridge_of(r)->fs;

	if (r->file_ran || r->reaper_tries >= REAPER_TRIES)
		return false;
	/* It may have become idle since the call: so look once more. */
	if (r->reaper_tries++ && !reaper_busy(fs))
		return false;
	request_drop_references(r);
	if (!request_park(r, WAIT_REAPER))
		return true;
	r->t->parked++;
	r->reaper_wait = (struct reaper_waiter){.op = &r->op};
	if (reaper_wait(fs, &r->reaper_wait) != ERR_PARKED)
		ioctx_wake(&r->op);
	return true;
}

bool request_await_early(struct request *r, struct inode *in)
{
	if (r->early_waited || !atomic_load(&in->early_n))
		return false;
	r->early_waited = true;
	if (!request_park(r, WAIT_TURN))
		return true;
	r->early_wait = (struct early_waiter){.op = &r->op};
	if (early_wait(in, &r->early_wait) != ERR_PARKED)
		ioctx_wake(&r->op);
	request_drop_references(r); /* what it waits for has its own */
	return true;
}

void request_yield(struct request *r)
{
	request_drop_references(r);
	r->t->yields = true;
	if (request_park(r, WAIT_TURN))
		ioctx_wake(&r->op);
}

/* The op of a parked request was resumed. */
static void wait_over(struct op *op)
{
	struct request *r = container_of(op, struct request, op);
	enum request_wait what = r->waiting;

	request_unpark(r);
	if (what == WAIT_LOCK)
		request_fail(r, r->lock.result);
	else if (what == WAIT_TURN || what == WAIT_REAPER || what == WAIT_EVENT)
		serve(r);
	else if (what == WAIT_CACHE)
		r->done(r, r->fop.result);
	else if (what == WAIT_FORWARD)
		forward_finish(r);
	else if (what == WAIT_SOCKET)
		event_socket_finish(r);
	else if (what == WAIT_DELEGATION && r->admitted)
		r->admitted(r);
	else if (what == WAIT_DELEGATION)
		serve(r);
	else if (r->wait.err)
		request_fail(r, r->wait.err);
	else if (r->wait.xid)
		request_fail(r, 0); /* a group that is durable now */
	else
		serve(r);
}

/* ---- interrupts, in the request's own thread ---- */

static void interrupt(struct request *r)
{
	bool out = false;

	r->interrupted = true;
	if (r->waiting == WAIT_NONE || !gives_up(r, r->waiting))
		return;
	switch (r->waiting) {
	case WAIT_NONE:
	case WAIT_REAPER: /* soon over */
	case WAIT_CACHE:  /* as soon as others have their answers */
	case WAIT_TURN:   /* these give up when they park the next time */
		return;
	case WAIT_FILE:
		/* Answers through file_done(), perhaps within this call: r may be gone
		 * afterwards. */
		file_cancel(&r->fop);
		return;
	case WAIT_LOCK:
		out = plock_cancel(&r->lock);
		break;
	case WAIT_JOURNAL:
		out = jrn_cancel(bridge_of(r)->fs, &r->wait);
		break;
	case WAIT_EVENT:
		out = open_events_cancel(r);
		break;
	case WAIT_DELEGATION:
		out = delegation_cancel(&r->delegation);
		break;
	case WAIT_FORWARD:
		out = forward_cancel(r);
		break;
	case WAIT_SOCKET:
		out = event_socket_cancel(r);
		break;
	}
	if (!out)
		return; /* it is being resumed already, and answers */
	r->t->interrupted++;
	request_unpark(r);
	request_fail(r, -EINTR);
}

static void interrupt_arrived(struct op *op)
{
	struct request *r = container_of(op, struct request, interrupt);
	bool ended;

	pthread_mutex_lock(&r->t->pending_mutex);
	r->interrupt_queued = false;
	ended = r->ended;
	pthread_mutex_unlock(&r->t->pending_mutex);
	if (ended)
		dispose(r);
	else
		interrupt(r);
}

void request_interrupt_all(struct bridge_thread *t)
{
	pthread_mutex_lock(&t->pending_mutex);
	for (unsigned i = 0; i < BRIDGE_PENDING_BUCKETS; i++) {
		for (struct request *r = t->pending[i]; r; r = r->pending_next) {
			if (!r->interrupt_queued) {
				r->interrupt_queued = true;
				ioctx_wake(&r->interrupt);
			}
		}
	}
	pthread_mutex_unlock(&t->pending_mutex);
}
