/* SPDX-License-Identifier: MIT
 *
 * bridge_events.c - events of the holders that belong to an open file: read(2) of the control file,
 * the call EVENTS, and telling a socket that there are some (bridge_socket.c).
 *
 * A read that finds no event is parked on the list of its open file (struct open_events); the
 * sink's wake() takes all from the list and has them look again, in their threads. So a parked
 * request is on the list or its op is on its way, never both, and who takes it off the list wakes
 * it.
 *
 * No event is missed between the look and the parking: a reader looks once more after it is on the
 * list, and whoever gives a socket after it is in its place. Both may then be woken for nothing.
 *
 * wake() is called when the first event comes where there was none, and only then; so a socket is
 * told once until all events were taken.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>

#include "bridge_control.h"

struct open_events {
	struct bridge *b;
	_Atomic(struct event_sink *) sink; /* NULL until the first holder; then constant */
	pthread_mutex_t mutex;
	struct request *readers;    /* parked */
	struct event_socket socket;
};

/* ---- the sink ---- */

/* mutex held. What is returned is for event_socket_close(). */
static struct event_socket tell(struct open_events *ev)
{
	struct event_socket s = ev->socket;

	if (s.fd < 0 || send(s.fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return NO_EVENT_SOCKET;
	/* Full: there is something to be read in it. */
	if (errno == EAGAIN)
		return NO_EVENT_SOCKET;
	/* The other end is gone. Or memory is short: then its end of file says that there is something
	 * to look at. */
	ev->socket = NO_EVENT_SOCKET;
	return s;
}

/* layouts->mutex is held. */
static void wake(void *arg)
{
	struct open_events *ev = arg;
	struct event_socket dropped;
	struct request *r;

	pthread_mutex_lock(&ev->mutex);
	dropped = tell(ev);
	while ((r = ev->readers)) {
		ev->readers = r->event_next;
		ioctx_wake(&r->op);
	}
	pthread_mutex_unlock(&ev->mutex);
	event_socket_close(dropped);
}

struct open_events *open_events_get(struct bridge *b, struct open_file *of)
{
	struct open_events *ev, *made = NULL;

	pthread_mutex_lock(&b->open_mutex);
	ev = of->events;
	if (!ev && (ev = made = calloc(1, sizeof(*ev)))) {
		ev->b = b;
		ev->socket = NO_EVENT_SOCKET;
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
	event_socket_close(ev->socket);
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

/* ---- the socket ---- */

void open_events_set_socket(struct open_events *ev, struct event_socket s)
{
	struct event_socket old;

	pthread_mutex_lock(&ev->mutex);
	old = ev->socket;
	ev->socket = s;
	pthread_mutex_unlock(&ev->mutex);
	event_socket_close(old);
	if (s.fd < 0 || !any(ev))
		return;
	pthread_mutex_lock(&ev->mutex);
	old = tell(ev); /* of another one, perhaps: that has been given meanwhile */
	pthread_mutex_unlock(&ev->mutex);
	event_socket_close(old);
}
