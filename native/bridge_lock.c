/* SPDX-License-Identifier: MIT
 *
 * bridge_lock.c - POSIX and flock locks: GETLK, SETLK, SETLKW. A SETLKW that must wait is parked;
 * nobody waits for it here.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "bridge.h"

_Static_assert((int)PLOCK_READ == F_RDLCK && (int)PLOCK_WRITE == F_WRLCK &&
		       (int)PLOCK_UNLOCK == F_UNLCK,
	       "FUSE says lock types as fcntl does");

struct lock_owner {
	uint64_t id;
	struct lock_owner *next;
};

int open_file_add_owner(struct bridge *b, struct open_file *of, uint64_t owner)
{
	struct lock_owner *o;

	pthread_mutex_lock(&b->open_mutex);
	for (o = of->lock_owners; o && o->id != owner; o = o->next)
		;
	if (!o && (o = malloc(sizeof(*o)))) {
		*o = (struct lock_owner){owner, of->lock_owners};
		of->lock_owners = o;
	}
	pthread_mutex_unlock(&b->open_mutex);
	return o ? 0 : -ENOLCK;
}

void open_file_flush_owner(struct bridge *b, struct open_file *of, uint64_t owner)
{
	plock_release_owner(of->in, false, owner);
	pthread_mutex_lock(&b->open_mutex);
	for (struct lock_owner **at = &of->lock_owners, *o; (o = *at); at = &o->next) {
		if (o->id == owner) {
			*at = o->next;
			free(o);
			break;
		}
	}
	pthread_mutex_unlock(&b->open_mutex);
}

void open_file_release_owners(struct bridge *b, struct open_file *of)
{
	struct lock_owner *o;

	while ((o = of->lock_owners)) {
		plock_release_owner(of->in, false, o->id);
		of->lock_owners = o->next;
		free(o);
	}
}

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
	struct open_file *of = open_file_of(in->fh);
	struct plock_request req = {
		.op = wait ? &r->op : NULL,
		.flock = in->lk_flags & FUSE_LK_FLOCK,
	};
	int err;

	if (!lock_of(in, &req.lock)) {
		request_fail(r, -EINVAL);
		return;
	}
	if (!req.flock && req.lock.type != PLOCK_UNLOCK) {
		err = open_file_add_owner(r->t->b, of, req.lock.owner);
		if (err) {
			request_fail(r, err);
			return;
		}
	}
	r->lock = req;
	/* Registered first: once it is parked, another thread's unlock may grant it. */
	if (wait && !request_park(r, WAIT_LOCK))
		return;
	err = plock_set(of->in, &r->lock);
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
