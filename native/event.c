/* SPDX-License-Identifier: MIT
 *
 * event.c - what holders are told, in order: bounded rings, one for each descriptor or server that
 * speaks for holders.
 *
 * Invariants, under layouts->mutex:
 *  1. used events follow `first` in the ring, oldest first; room is a power of two, at most
 *     EVENT_RING, and grows as it is needed.
 *  2. `lost` events were posted after all that are in the ring. They are told as one OVERFLOW: put
 *     before the next event that finds room, or, once the ring is empty, by event_next() itself.
 *  3. seq counts the events of the sink, lost ones too; an OVERFLOW carries that of the last it
 *     stands for.
 *  4. wake() is called when the sink stops being empty, and only then.
 */
#include <string.h>

#include "layout_priv.h"

#define ROOM_FIRST 16u

struct event_sink {
	void (*wake)(void *arg);
	void *arg;
	struct layout_event *ring;
	unsigned room, first, used;
	uint64_t seq, lost;
};

struct event_sink *sink_new(void (*wake)(void *arg), void *arg)
{
	struct event_sink *sink = calloc(1, sizeof(*sink));

	if (!sink)
		return NULL;
	sink->wake = wake;
	sink->arg = arg;
	sink->room = ROOM_FIRST;
	sink->ring = calloc(sink->room, sizeof(*sink->ring));
	if (!sink->ring) {
		free(sink);
		return NULL;
	}
	return sink;
}

void sink_free(struct event_sink *sink)
{
	if (sink)
		free(sink->ring);
	free(sink);
}

struct event_sink *event_sink_create(struct fs *fs, void (*wake)(void *arg), void *arg)
{
	return sink_new(wake, arg);
}

static bool grow(struct event_sink *sink)
{
	unsigned room = 2 * sink->room;
	struct layout_event *ring = room > EVENT_RING ? NULL : calloc(room, sizeof(*ring));

	if (!ring)
		return false;
	for (unsigned i = 0; i < sink->used; i++)
		ring[i] = sink->ring[(sink->first + i) & (sink->room - 1)];
	free(sink->ring);
	sink->ring = ring;
	sink->room = room;
	sink->first = 0;
	return true;
}

static void append(struct event_sink *sink, const struct layout_event *ev)
{
	xassert(sink->used < sink->room);
	sink->ring[(sink->first + sink->used++) & (sink->room - 1)] = *ev;
}

static struct layout_event overflow(const struct event_sink *sink)
{
	return (struct layout_event){ .type = EVENT_OVERFLOW, .seq = sink->seq,
				      .length = sink->lost };
}

void event_post(struct layouts *ls, struct event_sink *sink, const struct layout_event *ev)
{
	struct layout_event copy = *ev;
	unsigned need;
	bool empty;

	if (!sink)
		return;
	atomic_fetch_add_explicit(&ls->counters.events, 1, memory_order_relaxed);
	empty = !sink->used && !sink->lost;
	need = sink->lost ? 2 : 1;
	while (sink->room - sink->used < need && grow(sink))
		;
	if (sink->room - sink->used < need) {
		atomic_fetch_add_explicit(&ls->counters.events_lost, 1, memory_order_relaxed);
		sink->lost++;
		sink->seq++;
		return;
	}
	if (sink->lost) {
		struct layout_event gap = overflow(sink);

		append(sink, &gap);
		sink->lost = 0;
	}
	copy.seq = ++sink->seq;
	append(sink, &copy);
	if (empty && sink->wake)
		sink->wake(sink->arg);
}

bool event_crowded(const struct event_sink *sink)
{
	return sink && (sink->lost || sink->used > EVENT_RING / 2);
}

bool event_next(struct fs *fs, struct event_sink *sink, struct layout_event *out)
{
	bool any;

	pthread_mutex_lock(&fs->layouts->mutex);
	any = sink->used || sink->lost;
	if (sink->used) {
		*out = sink->ring[sink->first];
		sink->first = (sink->first + 1) & (sink->room - 1);
		sink->used--;
	} else if (sink->lost) {
		*out = overflow(sink);
		sink->lost = 0;
	}
	pthread_mutex_unlock(&fs->layouts->mutex);
	return any;
}

bool event_any(struct fs *fs, struct event_sink *sink)
{
	bool any;

	pthread_mutex_lock(&fs->layouts->mutex);
	any = sink->used || sink->lost;
	pthread_mutex_unlock(&fs->layouts->mutex);
	return any;
}
