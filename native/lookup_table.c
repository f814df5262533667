/* SPDX-License-Identifier: MIT
 *
 * lookup_table.c - see lookup_table.h.
 *
 * home(ino): the slot where a search for ino begins. Invariants:
 *  1. no slot between home(ino) and the slot of ino (cyclically) is free;
 *  2. entries < capacity, so every search ends;
 *  3. capacity 0 exactly when slots is NULL.
 */
#include "lookup_table.h"

#include "errors.h"

#define CAPACITY_MIN 1024u

/* Fibonacci hashing spreads neighbouring numbers; the multiplication maps to any capacity without a
 * division. */
static uint64_t home_slot(const struct lookup_table *lt, inum_t ino)
{
	uint64_t hash = ino * 0x9e3779b97f4a7c15ULL;

	hash ^= hash >> 32;
	hash *= 0xd6e8feb86659fd93ULL;
	return (uint64_t)(((unsigned __int128)hash * lt->capacity) >> 64);
}

/* The slot of ino, or the free slot where it would go. */
static uint64_t find_slot(const struct lookup_table *lt, inum_t ino)
{
	uint64_t at = home_slot(lt, ino);

	while (lt->slots[at].ino != 0 && lt->slots[at].ino != ino)
		at = at + 1 == lt->capacity ? 0 : at + 1;
	return at;
}

static int resize(struct lookup_table *lt, uint64_t capacity)
{
	struct lookup_table bigger = {.capacity = capacity, .entries = lt->entries};

	xassert(capacity > lt->entries);
	bigger.slots = calloc(capacity, sizeof(*bigger.slots));
	if (!bigger.slots)
		return -ENOMEM;
	for (uint64_t i = 0; i < lt->capacity; i++)
		if (lt->slots[i].ino != 0)
			bigger.slots[find_slot(&bigger, lt->slots[i].ino)] = lt->slots[i];
	free(lt->slots);
	*lt = bigger;
	return 0;
}

int lookup_table_add(struct lookup_table *lt, inum_t ino, uint64_t n)
{
	uint64_t at;
	int err;

	xassert(ino != 0);
	if (n == 0)
		return 0;
	if (lt->capacity == 0 || lt->entries + 1 > lt->capacity / 8 * 7) {
		err = resize(lt, lt->capacity ? lt->capacity + lt->capacity / 2 : CAPACITY_MIN);
		/* Without memory the table may be used until one slot is left. */
		if (err && lt->entries + 2 > lt->capacity)
			return err;
	}
	at = find_slot(lt, ino);
	if (lt->slots[at].ino == 0) {
		lt->slots[at] = (struct lookup_slot){ino, 0};
		lt->entries++;
	}
	lt->slots[at].count = lt->slots[at].count > UINT64_MAX - n ? UINT64_MAX
								   : lt->slots[at].count + n;
	return 0;
}

/* Free a slot and move back whoever could not be found any more (invariant 1). */
static void remove_slot(struct lookup_table *lt, uint64_t hole)
{
	uint64_t at = hole, home;

	for (;;) {
		at = at + 1 == lt->capacity ? 0 : at + 1;
		if (lt->slots[at].ino == 0)
			break;
		home = home_slot(lt, lt->slots[at].ino);
		/* It stays when its home lies cyclically in (hole, at]. */
		if (hole < at ? (home > hole && home <= at) : (home > hole || home <= at))
			continue;
		lt->slots[hole] = lt->slots[at];
		hole = at;
	}
	lt->slots[hole] = (struct lookup_slot){0, 0};
	lt->entries--;
}

uint64_t lookup_table_sub(struct lookup_table *lt, inum_t ino, uint64_t n)
{
	uint64_t at;

	if (lt->capacity == 0)
		return 0;
	at = find_slot(lt, ino);
	if (lt->slots[at].ino == 0)
		return 0;
	if (lt->slots[at].count > n) {
		lt->slots[at].count -= n;
		return lt->slots[at].count;
	}
	remove_slot(lt, at);
	/* A failure to shrink only costs memory. */
	if (lt->capacity > CAPACITY_MIN && lt->entries < lt->capacity / 4)
		(void)resize(lt, MAX(lt->capacity / 2, (uint64_t)CAPACITY_MIN));
	return 0;
}

uint64_t lookup_table_count(const struct lookup_table *lt, inum_t ino)
{
	return lt->capacity ? lt->slots[find_slot(lt, ino)].count : 0;
}

void lookup_table_clear(struct lookup_table *lt)
{
	free(lt->slots);
	*lt = (struct lookup_table){0};
}
