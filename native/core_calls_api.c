/* SPDX-License-Identifier: MIT
 *
 * core_calls_api.c - the calls of extfs_core.h that one thread begins and that end later: for an
 * event loop, which would otherwise hand each of them to a thread that does nothing but wait.
 *
 * Definitions. A call is running from its beginning until extfs_calls_ended() tells of it, or until
 * the beginning itself says that it is over; it has ended when its operation is done.
 *
 * Invariants. 1. All of a `struct extfs_calls` belongs to the thread that made it: operations run in
 * its ioctx, so in no other thread. 2. A call that has ended is in the list `ended`, once, until it
 * is told. 3. The arguments are the caller's memory, which is read when a call begins and written
 * when it is told, both in calls of this thread.
 */
#include <string.h>

#include "core_api.h"

#include "file.h"
#include "layout.h"

#define CALLS_DEPTH 64u /* I/Os in the kernel at a time */

struct call {
	struct extfs_calls *calls;
	struct file_op fop;
	struct layout_args layout;
	struct extfs_layout_args *args; /* of the caller */
	uint64_t number;
	bool over;
	struct call *next; /* of those that have ended */
};

struct extfs_calls {
	struct fs *fs;
	struct ioctx *ctx;
	int fd;
	unsigned running;
	struct call *ended, **tail;
};

int extfs_calls_create(struct fs *fs, struct extfs_calls **out)
{
	struct extfs_calls *calls = calloc(1, sizeof(*calls));
	int err;

	if (!calls)
		return -ENOMEM;
	calls->fs = fs;
	calls->tail = &calls->ended;
	err = ioctx_create(CALLS_DEPTH, &calls->ctx);
	if (!err) {
		calls->fd = ioctx_eventfd(calls->ctx);
		if (calls->fd >= 0) {
			*out = calls;
			return 0;
		}
		err = calls->fd;
		ioctx_destroy(calls->ctx);
	}
	free(calls);
	return err;
}

void extfs_calls_destroy(struct extfs_calls *calls)
{
	xassert(!calls->running);
	ioctx_destroy(calls->ctx);
	free(calls);
}

int extfs_calls_fd(struct extfs_calls *calls) { return calls->fd; }
unsigned extfs_calls_running(struct extfs_calls *calls) { return calls->running; }

static void call_done(struct file_op *fop)
{
	struct call *call = fop->user;
	struct extfs_calls *calls = call->calls;

	call->over = true;
	call->next = NULL;
	*calls->tail = call;
	calls->tail = &call->next;
}

/* The answer to the caller's memory. Returns 0 or a negative code. */
static int told(struct call *call)
{
	int64_t result = call->fop.result;

	core_layout_out(&call->layout, call->args, result);
	inode_put(call->fop.in);
	core_layout_free(&call->layout);
	call->calls->running--;
	free(call);
	return result < 0 ? (int)result : 0;
}

static void unlink_ended(struct extfs_calls *calls, struct call *call)
{
	struct call **at = &calls->ended;

	while (*at != call)
		at = &(*at)->next;
	*at = call->next;
	if (!*at)
		calls->tail = at;
}

static int begin(struct extfs_calls *calls, enum file_op_kind kind, uint64_t ino,
		 struct extfs_layout_args *args, uint64_t number)
{
	struct call *call = calloc(1, sizeof(*call));
	struct inode *in;
	int err;

	if (!call)
		return -ENOMEM;
	err = core_layout_in(args, kind == FILE_LAYOUT_GET, &call->layout);
	if (err)
		goto out_call;
	err = core_inode(calls->fs, ino, &in);
	if (err)
		goto out_layout;
	call->calls = calls;
	call->args = args;
	call->number = number;
	file_op_init(&call->fop, kind, in, calls->ctx);
	call->fop.layout = &call->layout;
	call->fop.done = call_done;
	call->fop.user = call;
	calls->running++;
	file_start(&call->fop);
	if (!call->over)
		ioctx_run(calls->ctx, false); /* I/O that it queued goes to the kernel */
	if (!call->over)
		return 1;
	unlink_ended(calls, call);
	return told(call);

out_layout:
	core_layout_free(&call->layout);
out_call:
	free(call);
	return err;
}

int extfs_calls_get(struct extfs_calls *calls, uint64_t ino, struct extfs_layout_args *args,
		    uint64_t number)
{
	return begin(calls, FILE_LAYOUT_GET, ino, args, number);
}

int extfs_calls_commit(struct extfs_calls *calls, uint64_t ino, struct extfs_layout_args *args,
		       uint64_t number)
{
	return begin(calls, FILE_LAYOUT_COMMIT, ino, args, number);
}

int extfs_calls_return(struct extfs_calls *calls, uint64_t ino, struct extfs_layout_args *args,
		       uint64_t number)
{
	return begin(calls, FILE_LAYOUT_RETURN, ino, args, number);
}

uint64_t extfs_calls_ended(struct extfs_calls *calls, int *result)
{
	struct call *call;
	uint64_t number;

	if (!calls->ended)
		ioctx_run(calls->ctx, false);
	call = calls->ended;
	if (!call)
		return 0;
	number = call->number;
	unlink_ended(calls, call);
	*result = told(call);
	return number;
}

int extfs_calls_any(struct extfs_calls *calls) { return calls->ended != NULL; }
