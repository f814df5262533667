/* SPDX-License-Identifier: MIT
 *
 * bridge.h - the way between /dev/fuse and the core: what the bridge's own files share. The public
 * calls are in extfs_core.h.
 *
 * A bridge mounts one filesystem and serves it with a few threads. Each thread has its own file
 * descriptor of the connection (FUSE_DEV_IOC_CLONE), its own ioctx, its own pool of requests. It
 * reads requests until there are none, then hands all their device I/O to the kernel in one call
 * and waits for completions, wakes and the next request at once.
 *
 * A request belongs to the thread that read it, from begin to end: every step of it runs there, so
 * it needs no lock. It is answered where it came from. Nothing waits on a
 * bridge thread: what has to wait (locks, journal space, segments, durability) is parked as a
 * record in the request and resumed from ioctx_run(). Other threads touch a request in one way
 * only: the reader of a FUSE_INTERRUPT finds it in the pending table of its thread and wakes its
 * `interrupt` op.
 *
 * Where the kernel offers it, requests come over io_uring (bridge_uring.h), each in an entry of the
 * ring that the answer gives back; handlers do not notice. Then thread 0 alone reads /dev/fuse.
 *
 * Requests that the opcode table (bridge_dispatch.c) gives to pyfuse3 go through a socket pair as
 * they are; thread 0 receives the answers and passes them on. Notifications are written by threads
 * of their own, because the kernel may answer one only after we served a request (bridge_notify.c).
 *
 * While requests follow one another idle CPUs are asked to poll (bridge_idle.h).
 *
 * Locks: pending table mutexes, forward mutex, open files mutex, notification mutex, those of open
 * files' events, that of event sockets: leaves all, except that ioctx_wake() may be called with a
 * pending table's mutex, that of events, of event sockets or of notifications held.
 *
 * Errors: negative codes of errors.h inside; request_fail() maps them for the kernel.
 */
#ifndef EXTFS_BRIDGE_H
#define EXTFS_BRIDGE_H

#include <pthread.h>
#include <stdatomic.h>

#include "bridge_ahead.h"
#include "bridge_idle.h"
#include "delegation.h"
#include "file.h"
#include "file_early.h"
#include "fs.h"
#include "fuse_abi.h"
#include "layout.h"
#include "namei.h"
#include "plock.h"
#include "reaper.h"

#define BRIDGE_MAX_IO (1u << 20) /* bytes in one READ or WRITE */
#define BRIDGE_THREADS_MAX 64u
#define BRIDGE_BATCH 8u          /* requests read before their I/O is handed over */
#define BRIDGE_PENDING_BUCKETS 1024u
#define BRIDGE_EARLY 64u
#define BRIDGE_LISTED 256u       /* directories whose last listing is remembered */

/* Seconds for which the kernel may believe names and attributes. Long, because whatever changes a
 * file behind the kernel's back has to notify it (bridge_notify_*). */
#define BRIDGE_VALID_SECONDS 86400u

struct bridge;
struct bridge_thread;
struct request;

enum opcode_server {
	OPCODE_UNKNOWN = 0, /* ENOSYS: the kernel stops asking, or does it itself */
	OPCODE_C,           /* served here */
	OPCODE_FORWARD,     /* passed to pyfuse3 */
};

struct opcode_row {
	const char *name;
	enum opcode_server server;
	size_t arg_len;                  /* bytes that must follow the header at least */
	void (*serve)(struct request *r); /* OPCODE_C only */
};
/* The table: who serves what. NULL for numbers that are not opcodes. */
const struct opcode_row *bridge_opcode(uint32_t opcode);

/* ---- open files ---- */

struct open_file {
	struct inode *in; /* opened (inode_open) */
	uint32_t flags;   /* of open(2) */
	_Atomic uint32_t early_errors; /* of its inode's, those that it need not be told of */
	struct lock_owner *lock_owners; /* of POSIX locks set through it; open files mutex */
	struct open_events *events; /* of holders; NULL until needed, then constant; open files mutex */
	struct open_file *prev, *next;
};

int open_file_create(struct bridge *b, struct inode *in, uint32_t flags, uint64_t *fh);
void open_file_close(struct bridge *b, struct open_file *of);
/* Locks of open file descriptions (F_OFD_SETLK) arrive as POSIX locks of an owner of their own, for
 * which no FLUSH ever comes: they go with the RELEASE. So whoever sets a lock is remembered, and
 * forgotten at its FLUSH. -ENOLCK. */
int open_file_add_owner(struct bridge *b, struct open_file *of, uint64_t owner);
void open_file_flush_owner(struct bridge *b, struct open_file *of, uint64_t owner);
/* All that are left, and their locks. */
void open_file_release_owners(struct bridge *b, struct open_file *of);
static inline struct open_file *open_file_of(uint64_t fh)
{
	/* the kernel gives back what we gave it */
	struct open_file *of = (struct open_file *)(uintptr_t)fh;

	xassert(of && of->in);
	return of;
}

/* ---- requests ---- */

enum request_wait { WAIT_NONE, WAIT_FILE, WAIT_LOCK, WAIT_JOURNAL, WAIT_REAPER, WAIT_TURN,
		    WAIT_EVENT, WAIT_CACHE, WAIT_DELEGATION, WAIT_FORWARD, WAIT_SOCKET };

/* Uses (delegation.h) of a request, each with a reference of its inode. */
#define REQUEST_USES 3u
struct request_uses {
	unsigned n;
	struct { struct inode *in; enum delegation_op op; } use[REQUEST_USES];
};

struct request {
	struct op op;        /* lock granted, journal has room, group durable */
	struct op interrupt; /* woken by whoever read the FUSE_INTERRUPT */
	struct bridge_thread *t;
	const struct opcode_row *row;
	/* The message. Untouched until the answer, so a request can start over: arguments end
	 * before `payload`, or are names that no answer overwrites before the end. */
	const struct fuse_in_header *in;
	const void *arg; /* after the header */
	size_t arg_len;
	/* BRIDGE_MAX_IO bytes, page-aligned: data of a WRITE, answer of a READ or READDIR. */
	uint8_t *payload;
	struct fuse_in_header head; /* copy: `in` is overwritten by an answer in place */
	enum request_wait waiting;
	bool interrupted;      /* an interrupt came: park only as long as gives_up() says */
	bool interrupt_queued; /* op `interrupt` is on its way; pending table's mutex */
	bool ended;            /* only the interrupt op is still on its way */
	bool registered;
	unsigned stage; /* how far a request that starts over had come */
	struct inode *inode, *inode2; /* referenced; dropped at the end and before starting over */
	void (*done)(struct request *r, int64_t result); /* after a file operation */
	struct file_op fop;
	struct plock_request lock;
	struct layout_args layout;
	struct open_events *events; /* WAIT_EVENT: whose */
	struct request *event_next; /* on their list; their mutex */
	struct request_uses uses; /* until it ends */
	struct delegation_wait delegation;
	void (*admitted)(struct request *r); /* after WAIT_DELEGATION; NULL: the handler, from its beginning */
	struct jrn_waiter wait;
	struct reaper_waiter reaper_wait;
	unsigned reaper_tries;
	struct early_waiter early_wait;
	bool early_waited; /* for the early writes of the file that it looks at */
	bool file_ran; /* a file operation: what it said about space is final */
	struct request *pending_next;
	struct request *pool_next; /* of those pooled, or arrived */
	struct uring_queue *queue; /* of whose entries it is one; NULL: read from /dev/fuse */
	bool with_kernel;          /* an entry: it is free */
	bool registering;          /* it was never completed */
	bool fixed;                /* ioctx_fix() of its payload */
	bool answered;             /* the answer is in it */
	bool keeps_large;          /* counted in large_free */
	struct forwarded *forwarded; /* WAIT_FORWARD: the answer of pyfuse3; NULL: none will come */
	struct fetch *fetch;       /* WAIT_SOCKET: what it waits for */
	int fetched;               /* its end: a descriptor of ours, or a negative code */
	uint8_t *memory;
	size_t touched; /* bytes of the payload that are resident, at most; rounded up */
};

/* After a failed write of an answer: nobody waits for it any more, or the mount is gone. */
static inline bool bridge_nobody_waits(int error)
{
	return error == ENOENT || error == ENODEV || error == ENOTCONN || error == ECONNABORTED;
}

/* Answers. Each ends the request. */
void request_reply(struct request *r, const void *out, size_t len);
void request_reply_payload(struct request *r, size_t len); /* bytes at r->payload */
/* The same without ending the request; false: nobody took it. */
bool request_send_payload(struct request *r, size_t len);
void request_reply_entry(struct request *r, struct inode *in);
/* CREATE, TMPFILE: entry and open file in one. */
void request_reply_create(struct request *r, struct inode *in, uint32_t open_flags);
void request_reply_open(struct request *r, struct inode *in, uint32_t open_flags,
			uint32_t fopen_flags);
void request_reply_negative(struct request *r);
/* code <= 0; 0 is success without content. -ERR_JOURNAL_FULL: not an answer: parks until there is
 * room, then starts over; -ENOSPC likewise, while the reaper frees what was removed. */
void request_fail(struct request *r, int code);
void request_end(struct request *r); /* without an answer: FORGET and its like */
/* 0, or what inode_get() said; into r->inode or r->inode2, which keep the reference. */
int request_inode(struct request *r, inum_t ino, struct inode **slot);
/* NUL-terminated name at *at of the arguments; NULL when it does not end inside. *at moves past
 * it. */
const char *request_name(struct request *r, size_t *at, size_t *len);
struct cred request_cred(const struct request *r, uint32_t umask);

/* Run r->fop (set up with file_op_init()), then done(r, result). */
void request_start_file(struct request *r, void (*done)(struct request *r, int64_t result));
/* After it: the pages of [offset, offset + len) (0: to the end) that the kernel has of a file are
 * dropped, then done(r, r->fop.result) runs. */
void request_drop_pages(struct request *r, struct inode *in, uint64_t offset, uint64_t len,
			void (*done)(struct request *r, int64_t result));
/* For the parking of other things: true: registered; false: interrupted already (answered
 * EINTR). */
bool request_park(struct request *r, enum request_wait what);
void request_unpark(struct request *r);
/* Not done yet: the other requests of the thread have their turn, then the handler runs again. */
void request_yield(struct request *r);

/* Is what has been written and answered early in the map of `in`? true: not yet, and the handler starts over. */
bool request_await_early(struct request *r, struct inode *in);

/* r->inode and r->inode2 are put: it starts over. */
void request_drop_references(struct request *r);

/* bridge_delegation.c. While the request lasts nobody is granted a delegation of `in` that op conflicts
 * with. true: and there is none; false: it waits for one and then starts over, or has its answer. in is
 * referenced by the caller. */
bool request_admit(struct request *r, struct inode *in, enum delegation_op op);
/* The same, but after the wait then(r) goes on; r->inode and r->inode2 stay. */
bool request_admit_then(struct request *r, struct inode *in, enum delegation_op op,
			void (*then)(struct request *r));
/* The same without waiting: false: answered EAGAIN; recall: and what is in the way is recalled. */
bool request_admit_now(struct request *r, struct inode *in, enum delegation_op op, bool recall);
/* For an open; with O_NONBLOCK it does not wait, but has recalled what is in the way, as open(2) says of leases. */
bool request_admit_open(struct request *r, struct inode *in, uint32_t flags);
/* After -ERR_DELEGATED: start over when nobody has a delegation of it. Takes over the reference. */
void request_wait_undelegated(struct request *r, struct inode *in);
void request_uses_end(struct request_uses *uses);
enum delegation_op delegation_op_of_open(uint32_t flags);

/* For how long the kernel may believe the attributes of an inode. */
static inline uint64_t bridge_attr_valid(const struct inode *in)
{
	return unlikely(delegation_of_writer(in)) ? 0 : BRIDGE_VALID_SECONDS;
}

/* Attributes as FUSE says them. */
void bridge_attr(const struct inode_stat *st, struct fuse_attr *out);
void bridge_entry(const struct inode_stat *st, struct fuse_entry_out *out);

/* ---- threads ---- */

struct bridge_thread {
	struct bridge *b;
	unsigned index;
	int fd;
	pthread_t thread;
	bool started;
	struct ioctx *ctx;
	struct io_uring *ring; /* NULL: poll(2) */
	bool readable;         /* there may be requests */
	bool armed;            /* a poll of fd is out */
	bool only_forgets;     /* what was read last */
	bool pausing;          /* it does not look at fd until the timer ends */
	bool not_exclusive;    /* the kernel refused an exclusive poll */
	bool gone;             /* ENODEV: unmounted */
	bool lingering;        /* it is the one that b->lingering speaks of */
	bool resting;          /* rest_mutex: sleeps without a poll of fd, until called */
	bool called;           /* rest_mutex: `help` is on its way */
	struct op help;
	bool forward_open, forward_armed; /* thread 0: pyfuse3's socket */
	bool yields;           /* there was a request_yield() */
	struct idle_meter meter;
	bool deaf;             /* another thread reads /dev/fuse */
	/* FUSE over io_uring. */
	struct uring_queue *queues;
	unsigned n_queues;
	struct request *arrived, **arrived_tail;
	struct request *uncommitted; /* there was no room in the ring */
	unsigned n_with_kernel;      /* entries */
	unsigned large_free;         /* of them, with a large payload resident */
	int register_error;
	struct op step;              /* towards the ring */
	struct op farewell;          /* the connection is gone */
	unsigned told, heard;        /* ops of the two above; told: transport_mutex */
	bool farewelled;
	_Atomic uint64_t inflight; /* requests begun and not ended; changed by the thread alone */
	_Atomic uint64_t dormant;  /* of them, waiting for a holder: for hours, perhaps */
	struct request *pool;
	unsigned pooled, pooled_large;
	pthread_mutex_t pending_mutex;
	struct request *pending[BRIDGE_PENDING_BUCKETS];
	/* Statistics: written by the thread, read by anybody. */
	uint64_t by_opcode[FUSE_ABI_OPCODES];
	uint64_t parked, interrupted, by_ring;
};

/* An interrupt that overtook the registration of its request. */
struct early_interrupt {
	uint64_t unique; /* 0: free */
	int64_t at_ms;
};

/* A directory that was read to its end, and its inode_core.change then. */
struct listed {
	inum_t ino; /* 0: none */
	uint64_t version;
};

enum transport_state {
	TRANSPORT_UNDECIDED, /* no answer to INIT yet */
	TRANSPORT_REGISTERING,
	TRANSPORT_CLASSIC,
	TRANSPORT_URING,
};

struct drops;
struct fetch;
struct forward;
struct forwarded;
struct notifier;
struct open_events;

struct bridge {
	struct fs *fs;
	char *mountpoint;
	bool read_only, writeback_cache;
	bool want_uring;
	_Atomic enum transport_state transport; /* changed under transport_mutex */
	char transport_why[160];  /* constant once it is decided */
	bool negotiated_uring, all_run, gone; /* transport_mutex */
	pthread_mutex_t transport_mutex; /* before the ioctx's wake mutex */
	pthread_cond_t transport_decided;
	_Atomic uint64_t negotiated; /* FUSE_* flags of the answer to INIT */
	int event_fd;
	unsigned n_threads;
	struct bridge_thread *threads;
	_Atomic unsigned running; /* threads that have not ended */
	_Atomic bool unmounted;
	bool may_linger;          /* there is a CPU for those that a lingering thread waits for */
	_Atomic bool lingering;   /* a thread does; the others may rest. Set without, cleared with rest_mutex */
	pthread_mutex_t rest_mutex; /* before the ioctx's wake mutex */
	_Atomic unsigned n_resting; /* changed under rest_mutex */
	dev_t dev;                /* of the mount; 0: unknown */
	pthread_mutex_t early_mutex;
	struct early_interrupt early[BRIDGE_EARLY];
	_Atomic unsigned n_early;
	pthread_mutex_t open_mutex;
	struct open_file *open;
	struct listed listed[BRIDGE_LISTED]; /* open_mutex */
	struct forward *forward;
	struct notifier *notifier;
	struct drops *drops;
	struct ahead *ahead;
	_Atomic(struct idle_poll *) idle; /* set once, or NULL */
};

/* The connection is gone, as a thread has learned. bridge.c */
void bridge_gone(struct bridge_thread *t);
/* Every request fails from now on. */
int bridge_abort(struct bridge *b);

/* bridge_request.c */
void request_answer_raw(struct request *r, int error, const void *out, size_t len);
#define REQUEST_HEAD_BYTES 4096u /* of r->memory, before the payload */
struct request *request_alloc(struct bridge_thread *t);
struct request *request_create(struct bridge_thread *t); /* never from the pool */
void request_destroy(struct request *r);
/* A message of len bytes is in it. */
void request_begin(struct request *r, const struct fuse_in_header *in, size_t len);
void request_free(struct request *r);              /* to the pool, nothing was read */
/* It is unused now, but for the first bytes of the payload: give memory back, if *n_large others keep more than
 * small ones need. Counts it. true: it is one of these. */
bool request_shrink(struct request *r, size_t needed, unsigned *n_large);
void request_pool_destroy(struct bridge_thread *t);
/* At the end of the connection: nothing stays parked. */
void request_interrupt_all(struct bridge_thread *t);
/* Where a message is read to, and how many bytes it may have. */
void *request_buffer(struct request *r, size_t *len);
/* bridge_interrupt.c */
/* Is the caller, a thread, being killed? Otherwise it was some other signal. */
bool interrupt_is_fatal(uint32_t tid);
/* Has it a signal that would interrupt its call? */
bool interrupt_is_due(uint32_t tid);
void bridge_interrupt(struct bridge *b, uint64_t unique);
void pending_add(struct request *r);
void pending_del(struct request *r);

/* bridge_forward.c */
int forward_create(struct bridge *b);
void forward_destroy(struct bridge *b);
int forward_peer_fd(struct bridge *b); /* for pyfuse3; the caller's from then on */
int forward_fd(struct bridge *b);      /* ours, polled by thread 0 */
void forward_send(struct request *r);
/* The answer to r is no longer wanted; false: it is on its way to it. */
bool forward_cancel(struct request *r);
/* WAIT_FORWARD is over. */
void forward_finish(struct request *r);
/* Readable: pass on what came. false: pyfuse3 has closed its end. */
bool forward_receive(struct bridge *b);
uint64_t forward_count(struct bridge *b);

/* bridge_notify.c: any thread; they return at once, the notifier writes. done, unless NULL, is
 * woken when the kernel has acted. 0 or -ENOMEM: nothing was sent. */
int notifier_create(struct bridge *b);
void notifier_destroy(struct bridge *b);
/* Bytes of a file changed behind the kernel's back; len 0: to the end; offset -1: attributes
 * only. */
int bridge_notify_inode(struct bridge *b, inum_t ino, int64_t offset, int64_t len, struct op *done);
/* As struct cache_ops has it. */
int bridge_notify_pages(struct bridge *b, inum_t ino, const struct page_range *ranges, unsigned n,
			struct page_wait *wait);
/* A name did. */
int bridge_notify_entry(struct bridge *b, inum_t dir, const char *name, size_t len,
			struct op *done);
/* A notification as it is, header included; copied. */
int bridge_notify_raw(struct bridge *b, const void *message, size_t len);

/* handlers, in the files of their subject */
void serve_lookup(struct request *r);
void serve_forget(struct request *r);
void serve_batch_forget(struct request *r);
void serve_getattr(struct request *r);
void serve_setattr(struct request *r);
void serve_statx(struct request *r);
void serve_create(struct request *r);
void serve_mknod(struct request *r);
void serve_mkdir(struct request *r);
void serve_unlink(struct request *r);
void serve_rmdir(struct request *r);
void serve_rename(struct request *r);
void serve_rename2(struct request *r);
void serve_symlink(struct request *r);
void serve_readlink(struct request *r);
void serve_link(struct request *r);
void serve_tmpfile(struct request *r);
void serve_open(struct request *r);
void serve_release(struct request *r);
void serve_flush(struct request *r);
void serve_read(struct request *r);
void serve_write(struct request *r);
void serve_fsync(struct request *r);
void serve_fallocate(struct request *r);
void serve_lseek(struct request *r);
void serve_copy_file_range(struct request *r);
void serve_ioctl(struct request *r);
void serve_opendir(struct request *r);
void serve_readdir(struct request *r);
void serve_readdirplus(struct request *r);
void serve_releasedir(struct request *r);
void serve_fsyncdir(struct request *r);
void serve_getlk(struct request *r);
void serve_setlk(struct request *r);
void serve_setlkw(struct request *r);
void serve_interrupt(struct request *r);
void serve_getxattr(struct request *r);
void serve_setxattr(struct request *r);
void serve_listxattr(struct request *r);
void serve_removexattr(struct request *r);
void serve_statfs(struct request *r);
void serve_destroy(struct request *r);

/* bridge_control.c: requests about /.extfs, by node or by name. true: it was one, and is served. */
bool control_serve(struct request *r);

#endif
