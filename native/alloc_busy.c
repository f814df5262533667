/* SPDX-License-Identifier: MIT
 *
 * alloc_busy.c - free blocks that must not become data yet (alloc.h says why).
 *
 * Invariants:
 *   1. Entries do not overlap. A block freed again (it was metadata in between, or the transaction
 *      that freed it was cancelled) gets the newer xid, and stays metadata if it was.
 *   2. Each age list is in order of xid, so expiry looks at heads only.
 *   3. An entry says nothing about whether its blocks are free: a cancelled transaction leaves its
 *      entries behind, and metadata may be allocated out of them. They matter only where free space
 *      records say free.
 */
#include "alloc_priv.h"
#include "errors.h"

static int busy_cmp(const struct busy *a, const struct busy *b)
{
	return a->start < b->start ? -1 : a->start > b->start;
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
/* The STATIC form of the macro uses a name that libbsd leaves undefined on Linux. */
RB_GENERATE_INTERNAL(busy_tree, busy, tree, busy_cmp, static)
#pragma GCC diagnostic pop

void busy_init(struct busy_set *set)
{
	RB_INIT(&set->tree);
	TAILQ_INIT(&set->ages[0]);
	TAILQ_INIT(&set->ages[1]);
	atomic_store(&set->blocks, 0);
}

static void busy_drop(struct busy_set *set, struct busy *b)
{
	RB_REMOVE(busy_tree, &set->tree, b);
	TAILQ_REMOVE(&set->ages[b->meta], b, age);
	atomic_fetch_sub(&set->blocks, b->len);
	free(b);
}

void busy_clear(struct busy_set *set)
{
	for (unsigned i = 0; i < 2; i++)
		while (!TAILQ_EMPTY(&set->ages[i]))
			busy_drop(set, TAILQ_FIRST(&set->ages[i]));
}

/* First entry that ends behind `block`. */
static struct busy *busy_at(struct busy_set *set, fsblock_t block)
{
	struct busy key = { .start = block };
	struct busy *next = RB_NFIND(busy_tree, &set->tree, &key);
	struct busy *prev;

	if (next && next->start == block)
		return next;
	prev = next ? RB_PREV(busy_tree, &set->tree, next) : RB_MAX(busy_tree, &set->tree);
	return prev && prev->start + prev->len > block ? prev : next;
}

/* Cut [start, end) out of the entry b, which it overlaps. `spare` becomes the right part of a cut
 * in the middle. */
static bool busy_cut(struct busy_set *set, struct busy *b, fsblock_t start, fsblock_t end,
		     struct busy *spare)
{
	fsblock_t b_end = b->start + b->len;
	bool used = false;

	if (b->start >= start && b_end <= end) {
		busy_drop(set, b);
		return false;
	}
	if (b_end > end && b->start < start) {
		*spare = (struct busy){ .start = end, .len = b_end - end, .xid = b->xid,
					.meta = b->meta };
		TAILQ_INSERT_AFTER(&set->ages[b->meta], b, spare, age);
		RB_INSERT(busy_tree, &set->tree, spare);
		used = true;
	}
	/* Moving the start to the right keeps the order of the tree: nothing lies in what is cut
	 * off. */
	atomic_fetch_sub(&set->blocks, MIN(b_end, end) - MAX(b->start, start));
	if (b->start < start) {
		b->len = start - b->start;
	} else {
		b->start = end;
		b->len = b_end - end;
	}
	return used;
}

int busy_add(struct busy_set *set, fsblock_t start, nblocks_t len, bool meta, xid_t xid)
{
	struct busy *b, *prev, *n = malloc(sizeof(*n)), *spare = malloc(sizeof(*spare));
	fsblock_t end = start + len;

	if (!n || !spare) {
		free(n);
		free(spare);
		return -ENOMEM;
	}
	while ((b = busy_at(set, start)) && b->start < end) {
		meta |= b->meta;
		if (busy_cut(set, b, start, end, spare))
			spare = NULL;
	}
	free(spare);
	prev = b ? RB_PREV(busy_tree, &set->tree, b) : RB_MAX(busy_tree, &set->tree);
	atomic_fetch_add(&set->blocks, len);
	if (prev && prev->start + prev->len == start && prev->xid == xid && prev->meta == meta) {
		prev->len += len;
		free(n);
		return 0;
	}
	if (b && b->start == end && b->xid == xid && b->meta == meta) {
		b->start = start;
		b->len += len;
		free(n);
		return 0;
	}
	*n = (struct busy){ .start = start, .len = len, .xid = xid, .meta = meta };
	RB_INSERT(busy_tree, &set->tree, n);
	TAILQ_INSERT_TAIL(&set->ages[meta], n, age);
	return 0;
}

void busy_expire(struct busy_set *set, xid_t durable, xid_t checkpointed)
{
	xid_t limit[2] = { durable, checkpointed };

	for (unsigned i = 0; i < 2; i++) {
		struct busy *b;

		while ((b = TAILQ_FIRST(&set->ages[i])) && b->xid <= limit[i])
			busy_drop(set, b);
	}
}

void busy_find_run(struct busy_set *set, fsblock_t start, nblocks_t len, nblocks_t want,
		   fsblock_t *run_start, nblocks_t *run, unsigned *seen)
{
	fsblock_t at = start, end = start + len;
	struct busy *b = busy_at(set, start);

	*run = 0;
	*run_start = start;
	while (at < end) {
		fsblock_t stop = b ? MIN(MAX(b->start, at), end) : end;

		if (stop - at > *run) {
			*run = stop - at;
			*run_start = at;
		}
		if (*run >= want || stop == end)
			return;
		*seen |= b->meta ? BUSY_META : BUSY_DATA;
		at = b->start + b->len;
		b = RB_NEXT(busy_tree, &set->tree, b);
	}
}
