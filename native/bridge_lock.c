/* SPDX-License-Identifier: MIT
 *
 * bridge_lock.c - POSIX and flock locks: GETLK, SETLK, SETLKW. A SETLKW that must wait is parked;
 * nobody waits for it here.
 */
#include <fcntl.h>
#include <string.h>

#include "bridge.h"

_Static_assert((int)PLOCK_READ == F_RDLCK && (int)PLOCK_WRITE == F_WRLCK &&
		       (int)PLOCK_UNLOCK == F_UNLCK,
	       "FUSE says lock types as fcntl does");

static bool lock_of(const struct fuse_lk_in *in, struct plock *lock)
{
	if (in->lk.type > F_UNLCK || in->lk.start > in->lk.end)
		return false;
	*lock = (struct plock){
		.start = in->lk.start,
		.end = in->lk.end,
		.type = (enum plock_type)in->lk.type,
		.owner = in->owner,
		.pid = in->lk.pid,
	};
	return true;
}

void serve_getlk(struct request *r)
{
	const struct fuse_lk_in *in = r->arg;
	struct fuse_lk_out out = {0};
	struct plock lock;

	if (!lock_of(in, &lock)) {
		request_fail(r, -EINVAL);
		return;
	}
	plock_get(open_file_of(in->fh)->in, in->lk_flags & FUSE_LK_FLOCK, &lock);
	out.lk = (struct fuse_file_lock){lock.start, lock.end, (uint32_t)lock.type, lock.pid};
	request_reply(r, &out, sizeof(out));
}

static void set_lock(struct request *r, bool wait)
{
	const struct fuse_lk_in *in = r->arg;
	struct plock_request req = {
		.op = wait ? &r->op : NULL,
		.flock = in->lk_flags & FUSE_LK_FLOCK,
	};
	int err;

	if (!lock_of(in, &req.lock)) {
		request_fail(r, -EINVAL);
		return;
	}
	r->lock = req;
	/* Registered first: once it is parked, another thread's unlock may grant it. */
	if (wait && !request_park(r, WAIT_LOCK))
		return;
	err = plock_set(open_file_of(in->fh)->in, &r->lock);
	if (err == ERR_PARKED) {
		r->t->parked++;
		return;
	}
	if (wait)
		request_unpark(r);
	request_fail(r, err);
}

void serve_setlk(struct request *r)
{
	set_lock(r, false);
}

void serve_setlkw(struct request *r)
{
	const struct fuse_lk_in *in = r->arg;

	set_lock(r, in->lk.type != F_UNLCK);
}
