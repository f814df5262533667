/* SPDX-License-Identifier: MIT
 *
 * alloc_window.c - free blocks that are kept for files which grow, in memory only.
 *
 * Files that are written side by side ask for their next blocks by turns. Without more, each would get what lies behind
 * the other's last ones, and all would end up in pieces. So behind the blocks that a file was given, a window of free
 * blocks is its own: others allocate elsewhere while there is anything elsewhere. A window doubles as its file grows into it,
 * and is gone when the file is closed, when WINDOWS_MAX other files have grown since, or when free space is short.
 *
 * Invariants: 1. A window says nothing about whether its blocks are free: metadata, freed and reallocated blocks may lie in
 * it. It only turns the search away. 2. Of one inode there is at most one. 3. No two windows overlap. 4. `count` is
 * the number of windows; they stand in the order of their last growth.
 *
 * Concurrency: windows are made, met and cleared under fs->lock held exclusively; window_drop() may come from anywhere. Their
 * own mutex is a leaf.
 */
#include "alloc_priv.h"

#include <string.h>

#define WINDOW_FIRST 64u    /* blocks */
#define WINDOW_LARGEST 8192u
/* Of the space that users may have: windows altogether take no more than a quarter. */
#define WINDOW_SHARE (4u * WINDOWS_MAX)

void window_init(struct window_set *set)
{
	pthread_mutex_init(&set->mutex, NULL);
	set->count = 0;
}

void window_destroy(struct window_set *set)
{
	pthread_mutex_destroy(&set->mutex);
}

/* Mutex held. */
static unsigned find(const struct window_set *set, inum_t ino)
{
	unsigned i = 0;

	while (i < set->count && set->windows[i].ino != ino)
		i++;
	return i;
}

/* Mutex held. */
static void delete(struct window_set *set, unsigned i)
{
	set->count--;
	memmove(&set->windows[i], &set->windows[i + 1], (set->count - i) * sizeof(set->windows[0]));
}

/* The first window of another inode that ends behind `at`; NULL: none. Mutex held. */
static const struct window *next_of_others(const struct window_set *set, inum_t ino, fsblock_t at)
{
	const struct window *first = NULL;

	for (unsigned i = 0; i < set->count; i++) {
		const struct window *w = &set->windows[i];

		if (w->ino != ino && w->start + w->len > at && (!first || w->start < first->start))
			first = w;
	}
	return first;
}

void window_grow(struct window_set *set, inum_t ino, struct free_extent run, fsblock_t free_end, nblocks_t avail)
{
	fsblock_t start = run.start + run.len;
	const struct window *next;
	nblocks_t grown = run.len, len;
	unsigned i;

	pthread_mutex_lock(&set->mutex);
	i = find(set, ino);
	if (i < set->count) {
		if (set->windows[i].start == run.start)
			grown += set->windows[i].grown;
		delete(set, i);
	}
	len = MIN(MIN(MAX(2 * grown, WINDOW_FIRST), WINDOW_LARGEST), avail / WINDOW_SHARE);
	next = next_of_others(set, ino, start);
	if (next && next->start <= start)
		len = 0;
	else if (next)
		len = MIN(len, next->start - start);
	len = MIN(len, free_end - start);
	if (len) {
		if (set->count == WINDOWS_MAX)
			delete(set, 0);
		set->windows[set->count++] = (struct window){ start, len, grown, ino };
	}
	pthread_mutex_unlock(&set->mutex);
}

void window_drop(struct window_set *set, inum_t ino)
{
	unsigned i;

	pthread_mutex_lock(&set->mutex);
	i = find(set, ino);
	if (i < set->count)
		delete(set, i);
	pthread_mutex_unlock(&set->mutex);
}

void window_clear(struct window_set *set)
{
	pthread_mutex_lock(&set->mutex);
	set->count = 0;
	pthread_mutex_unlock(&set->mutex);
}

nblocks_t window_room(struct window_set *set, inum_t ino, fsblock_t start, nblocks_t len)
{
	const struct window *w;
	nblocks_t room = len;

	pthread_mutex_lock(&set->mutex);
	w = next_of_others(set, ino, start);
	if (w)
		room = w->start <= start ? 0 : MIN(len, w->start - start);
	pthread_mutex_unlock(&set->mutex);
	return room;
}

bool window_gap(struct window_set *set, inum_t ino, fsblock_t start, nblocks_t len, struct free_extent *gap)
{
	fsblock_t at = start, end = start + len;

	gap->len = 0;
	pthread_mutex_lock(&set->mutex);
	while (at < end) {
		const struct window *w = next_of_others(set, ino, at);
		fsblock_t stop = w ? MIN(MAX(w->start, at), end) : end;

		if (stop - at > gap->len)
			*gap = (struct free_extent){ at, stop - at };
		at = w ? w->start + w->len : end;
	}
	pthread_mutex_unlock(&set->mutex);
	return gap->len > 0;
}
