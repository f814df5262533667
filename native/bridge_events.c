/* SPDX-License-Identifier: MIT
 *
 * bridge_events.c - events of the holders that belong to an open file: read(2) of the control file,
 * the call EVENTS, and poll(2) of everything.
 *
 * A read that finds no event is parked on the list of its open file (struct open_events); the
 * sink's wake() takes all from the list and has them look again, in their threads. So a parked
 * request is on the list or its op is on its way, never both, and who takes it off the list wakes
 * it.
 *
 * No event is missed between the look and the parking: a reader looks once more after it is on the
 * list, a poll after it has left its notification. Both may then be woken for nothing.
 */
#include <fcntl.h>
#include <poll.h>
#include <string.h>

#include "bridge_control.h"

struct open_events {
	struct bridge *b;
	_Atomic(struct event_sink *) sink; /* NULL until the first holder; then constant */
	pthread_mutex_t mutex;
	struct request *readers;    /* parked */
	bool polled;                /* the kernel is to be told of the next event, as: */
	uint64_t poll_kh;
};

/* ---- the sink ---- */

/* layouts->mutex is held. */
static void wake(void *arg)
{
	struct open_events *ev = arg;
	struct request *r;
	uint64_t kh;
	bool polled;

	pthread_mutex_lock(&ev->mutex);
	polled = ev->polled;
	kh = ev->poll_kh;
	ev->polled = false;
	while ((r = ev->readers)) {
		ev->readers = r->event_next;
		ioctx_wake(&r->op);
	}
	pthread_mutex_unlock(&ev->mutex);
	if (polled)
		bridge_notify_poll(ev->b, kh);
}

struct open_events *open_events_get(struct bridge *b, struct open_file *of)
{
	struct open_events *ev, *made = NULL;

	pthread_mutex_lock(&b->open_mutex);
	ev = of->events;
	if (!ev && (ev = made = calloc(1, sizeof(*ev)))) {
		ev->b = b;
		pthread_mutex_init(&ev->mutex, NULL);
		of->events = ev;
	}
	pthread_mutex_unlock(&b->open_mutex);
	return ev;
}

struct event_sink *open_events_sink(struct open_events *ev)
{
	struct event_sink *sink = atomic_load(&ev->sink), *made;

	if (sink)
		return sink;
	made = event_sink_create(ev->b->fs, wake, ev);
	if (!made)
		return NULL;
	/* Two threads may come here at once. No mutex: wake() is called with those of layouts held. */
	if (atomic_compare_exchange_strong(&ev->sink, &sink, made))
		return made;
	event_sink_destroy(ev->b->fs, made);
	return sink;
}

void open_events_destroy(struct open_events *ev)
{
	struct event_sink *sink;

	if (!ev)
		return;
	sink = atomic_load(&ev->sink);
	if (sink)
		event_sink_destroy(ev->b->fs, sink);
	xassert(!ev->readers); /* a reader keeps its file open */
	pthread_mutex_destroy(&ev->mutex);
	free(ev);
}

static bool any(struct open_events *ev)
{
	struct event_sink *sink = atomic_load(&ev->sink);

	return sink && event_any(ev->b->fs, sink);
}

static struct extfs_event event_of(const struct layout_event *from)
{
	_Static_assert((int)EXTFS_EVENT_RECALL == (int)EVENT_RECALL &&
			       (int)EXTFS_EVENT_REVOKED == (int)EVENT_REVOKED &&
			       (int)EXTFS_EVENT_MAP_CHANGED == (int)EVENT_MAP_CHANGED &&
			       (int)EXTFS_EVENT_PIN_EXPIRED == (int)EVENT_PIN_EXPIRED &&
			       (int)EXTFS_EVENT_OVERFLOW == (int)EVENT_OVERFLOW,
		       "events");
	return (struct extfs_event){
		.size = sizeof(struct extfs_event),
		.type = (uint32_t)from->type,
		.seq = from->seq,
		.holder = from->holder,
		.file = {.ino = from->ino, .generation = from->generation},
		.offset = from->offset,
		.length = from->length,
		.grant_seq = from->grant_seq,
		.left_ms = from->left_ms,
		.iomode = (uint32_t)from->iomode,
	};
}

unsigned open_events_take(struct open_events *ev, struct extfs_event *out, unsigned n)
{
	struct event_sink *sink = ev ? atomic_load(&ev->sink) : NULL;
	struct layout_event next;
	unsigned taken = 0;

	while (sink && taken < n && event_next(ev->b->fs, sink, &next))
		out[taken++] = event_of(&next);
	return taken;
}

/* ---- read(2) ---- */

/* Off the list; false: it was not on it. */
static bool take_reader(struct open_events *ev, struct request *r)
{
	struct request **at;

	pthread_mutex_lock(&ev->mutex);
	for (at = &ev->readers; *at && *at != r; at = &(*at)->event_next)
		;
	if (*at)
		*at = r->event_next;
	else
		at = NULL;
	pthread_mutex_unlock(&ev->mutex);
	return at != NULL;
}

bool open_events_cancel(struct request *r)
{
	return take_reader(r->events, r);
}

static void wait_for_event(struct request *r, struct open_events *ev)
{
	if (!request_park(r, WAIT_EVENT))
		return;
	r->t->parked++;
	r->events = ev;
	pthread_mutex_lock(&ev->mutex);
	r->event_next = ev->readers;
	ev->readers = r;
	pthread_mutex_unlock(&ev->mutex);
	if (any(ev) && take_reader(ev, r))
		ioctx_wake(&r->op);
}

void serve_events_read(struct request *r)
{
	const struct fuse_read_in *in = r->arg;
	struct extfs_event *out = (void *)r->payload;
	unsigned n, room = MIN(in->size, BRIDGE_MAX_IO) / sizeof(*out);
	struct open_events *ev = open_events_get(r->t->b, open_file_of(in->fh));

	if (!room || !ev) {
		request_fail(r, ev ? -EINVAL : -ENOMEM);
		return;
	}
	n = open_events_take(ev, out, room);
	if (n)
		request_reply_payload(r, n * sizeof(*out));
	else if (in->flags & O_NONBLOCK)
		request_fail(r, -EAGAIN);
	else
		wait_for_event(r, ev);
}

/* ---- poll(2) ---- */

/* Leave word that the kernel wants to hear of the next event. */
static void schedule(struct open_events *ev, uint64_t kh)
{
	pthread_mutex_lock(&ev->mutex);
	ev->polled = true;
	ev->poll_kh = kh; /* always the same: the kernel has one for each open file */
	pthread_mutex_unlock(&ev->mutex);
}

/* The control file is readable when there are events. Other files are always ready, as if nobody
 * served this opcode; events are what is exceptional about them. (ENOSYS would end polling of all
 * files of the mount.) */
void serve_poll(struct request *r)
{
	const struct fuse_poll_in *in = r->arg;
	bool control = request_on_control(r), later = in->flags & FUSE_POLL_SCHEDULE_NOTIFY;
	uint32_t on_event = control ? POLLIN | POLLRDNORM : POLLPRI;
	struct fuse_poll_out out = {.revents = POLLOUT | POLLWRNORM};
	struct open_file *of;
	struct open_events *ev;
	int err = 0;

	if (!control)
		out.revents |= POLLIN | POLLRDNORM;
	if (in->events & on_event) {
		of = open_file_of(in->fh);
		ev = open_events_get(r->t->b, of);
		err = ev ? 0 : -ENOMEM;
		if (!err && later)
			schedule(ev, in->kh);
		if (!err && any(ev))
			out.revents |= on_event;
	}
	if (err)
		request_fail(r, err);
	else
		request_reply(r, &out, sizeof(out));
}
