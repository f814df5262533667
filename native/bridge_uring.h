/* SPDX-License-Identifier: MIT
 *
 * bridge_uring.h - FUSE over io_uring: requests that come as completions in a thread's ring, and go
 * back as commands in it.
 *
 * The kernel has a queue for each CPU that there can be, and puts a request into that of the CPU on
 * which its caller runs. A queue consists of entries that we register. An entry is a struct request
 * with its memory: the kernel has it (free), or a request is in it, from its completion until the
 * answer is committed, which gives the entry back at once. FORGET, INTERRUPT and what raced the
 * switch-over still come over /dev/fuse, and notifications go there.
 *
 * A thread serves one queue, that of the CPU it is pinned to, or several where there are more CPUs than
 * threads. All here runs in that thread, but for uring_probe(), uring_allow() and uring_wait().
 *
 * Which transport it is (bridge.transport), is decided once, after the answer to INIT: every queue
 * gets one entry, thread after thread. The kernel switches over when the last queue has one, and to
 * /dev/fuse for good when a registration fails before that. So no entry is registered after one
 * that failed, and what we say is what the kernel does.
 */
#ifndef EXTFS_BRIDGE_URING_H
#define EXTFS_BRIDGE_URING_H

#include "bridge.h"

#define URING_QUEUES_MAX 4096u /* CPUs */

/* The field that holds the entries of one CPU. */
struct uring_queue {
	uint16_t qid;     /* the CPU's number */
	bool online;      /* it was at the mount */
	unsigned entries; /* registered, and not ended */
	unsigned free;    /* of them, those that the kernel has */
	bool full;        /* no more are to be had */
	/* Requests may wait in the kernel, although entries are free: see bridge_uring.c. */
	bool suspect, kicked;
	struct request *probe; /* its answer shows whether any do */
	bool probe_sent;
	uint64_t kicks;
};

/* bridge_transport.c */

/* Before the mount: 0, or why it cannot be had (-EOPNOTSUPP), as a text. */
int uring_probe(char *why, size_t len);
/* Before the threads run: the queues are divided among them. */
int uring_prepare(struct bridge *b);
void uring_destroy(struct bridge_thread *t);
/* The kernel has the answer to INIT; it is said whether it offered the ring. Any thread. */
void uring_negotiated(struct bridge *b, bool offered);
/* All threads run. */
void uring_allow(struct bridge *b);
/* Until it is decided; true: it is the ring. */
bool uring_wait(struct bridge *b);

/* Ends of threads: each is told once that the connection is gone, however it learns it first. */
void uring_gone(struct bridge_thread *t);
/* Nobody will tell it anything more, and the kernel has none of its entries. */
bool uring_may_end(struct bridge_thread *t);

/* bridge_uring.c */

/* One entry for each of its queues. 0, or why not: then the kernel has not switched over. */
int uring_register_first(struct bridge_thread *t);
/* The rest of them; the thread goes to its CPU. */
void uring_go_live(struct bridge_thread *t);
/* A completion of an entry: it waits in t->arrived. */
void uring_completed(struct request *r, int res);
/* Serve what has arrived, BRIDGE_BATCH at most. How many. */
unsigned uring_serve(struct bridge_thread *t);
/* Once in each round of the thread, before it sleeps. */
void uring_keep(struct bridge_thread *t);

/* The answer, kept in the entry; request_end() sends it. */
void uring_answer(struct request *r, int error, const void *out, size_t len);
void uring_commit(struct request *r);
/* May it wait for somebody, for any time? Not on the last entries of a queue that cannot have more. */
bool uring_may_wait(const struct request *r);

#endif
