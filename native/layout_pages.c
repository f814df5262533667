/* SPDX-License-Identifier: MIT
 *
 * layout_pages.c - what the kernel keeps of a range whose blocks a holder writes has to go.
 *
 * Definitions.
 *   stale     a page that was filled before the holder's commit or return, and is read without
 *             asking us. A page that is locked, or not filled, is not: whoever reads it
 *             waits, then asks.
 *   drop      the kernel goes through a range in ascending order, and waits at each page that is
 *             locked until it is not (struct cache_ops).
 *   parked    a READ or WRITE of the mount that waits for its segment, perhaps for a holder. All
 *             pages of a READ are locked, of a buffered WRITE at most the last one, if it
 *             covers a part of it and it was not filled; pages of a mapping that are
 *             written back belong to nobody else.
 *
 * A holder that commits or returns must not wait for parked ones: they may wait for this very
 * holder, who would miss the recall. But a reader that comes after the answer must not find a stale
 * page. So the range is cut up: parked ones and what lies between them are dropped on their own.
 *   1. what each parked one covers is dropped as far as it is not locked, which takes no longer
 *      than the write of the notification: it is given LOCKED_MS, and then goes on by itself.
 *   2. what lies between is waited for: nobody who waits for a holder has pages there, but one that
 *      came since 1. If it takes longer than LOCKED_MS, both are done again with what is parked
 *      then.
 * After ROUNDS of them, or with more than SPANS parked ones, what is left is waited for, be it
 * until a recall deadline: pages may also be locked by a request that has not reached us, as the
 * kernel sends only so many at a time in the background.
 */
#include <stdlib.h>
#include <unistd.h>

#include "layout_ops.h"

#define LOCKED_MS 5u
#define ROUNDS 8u
#define SPANS ARRAY_LEN(((struct page_drop *)NULL)->spans)

static uint64_t bytes_to(uint64_t start, uint64_t end)
{
	return end == UINT64_MAX ? 0 : end - start;
}

/* Some pages of the file may be left, of which nobody would know, if pages_cached were cleared. */
static void note_all_dropped(struct fs *fs, struct inode *in, uint64_t start, uint64_t end)
{
	uint64_t size;

	fs_rdlock(fs);
	size = in->core.size;
	fs_unlock(fs);
	if (start == 0 && end >= size)
		atomic_store(&in->pages_cached, false);
}

/* NULL: no page of the file is cached. */
static const struct cache_ops *has_pages(const struct fs *fs, struct inode *in)
{
	return atomic_load(&in->pages_cached) ? fs->cache_ops : NULL;
}

/* STEP_PARKED: r->step comes when they are gone, or so many ms are over. */
static enum step drop(struct file_run *r, const struct page_range *ranges, unsigned n, unsigned ms)
{
	const struct cache_ops *ops = r->fs->cache_ops;
	struct page_drop *pd = &r->pd;

	pd->wait = (struct page_wait){ .done = &r->fop->op, .patience_ms = ms };
	if (!ops || ops->pages(r->fs->cache_arg, pd->in->ino, ranges, n, &pd->wait)) {
		pd->wait.result = 0;
		atomic_store(&pd->in->pages_cached, true);
		return STEP_NEXT;
	}
	r->fop->layout->flags |= LAYOUT_F_INVALIDATED;
	return STEP_PARKED;
}

enum step layout_drop_pages(struct file_run *r, struct inode *in, uint64_t start, uint64_t end,
			    step_fn then)
{
	struct page_range all = { start, bytes_to(start, end) };

	r->step = then;
	if (!has_pages(r->fs, in))
		return STEP_NEXT;
	note_all_dropped(r->fs, in, start, end);
	r->pd.in = in;
	return drop(r, &all, 1, 0);
}

void layout_drop_later(struct fs *fs, struct inode *in, uint64_t start, uint64_t end)
{
	struct page_range all = { start, bytes_to(start, end) };
	const struct cache_ops *ops = has_pages(fs, in);

	if (ops)
		(void)ops->pages(fs->cache_arg, in->ino, &all, 1, NULL);
}

/* ---- around those who are parked
 * -------------------------------------------------------------- */

static enum step drop_parked(struct file_run *r);

static int by_start(const void *a, const void *b)
{
	const struct seg_span *x = a, *y = b;

	return x->start < y->start ? -1 : x->start > y->start;
}

/* Whole pages of the kernel. */
static uint64_t page_mask(void)
{
	return MAX((uint64_t)sysconf(_SC_PAGESIZE), BLOCK_SIZE) - 1;
}

static void look(struct page_drop *pd)
{
	uint64_t mask = page_mask();

	pd->n = seg_parked_io(pd->in, pd->start, pd->end, pd->spans, SPANS);
	pd->n = MIN(pd->n, SPANS);
	for (unsigned i = 0; i < pd->n; i++) {
		struct seg_span *s = &pd->spans[i];

		s->start = MAX(s->start & ~mask, pd->start);
		s->end = s->end < pd->end ? MIN((s->end + mask) & ~mask, pd->end) : pd->end;
	}
	qsort(pd->spans, pd->n, sizeof(pd->spans[0]), by_start);
}

static unsigned between(const struct page_drop *pd, struct page_range *out)
{
	uint64_t at = pd->start;
	unsigned n = 0;

	for (unsigned i = 0; i < pd->n; i++) {
		if (pd->spans[i].start > at)
			out[n++] = (struct page_range){ at, pd->spans[i].start - at };
		at = MAX(at, pd->spans[i].end);
	}
	if (at < pd->end)
		out[n++] = (struct page_range){ at, bytes_to(at, pd->end) };
	return n;
}

static enum step between_dropped(struct file_run *r)
{
	struct page_drop *pd = &r->pd;

	r->step = pd->wait.result ? drop_parked : pd->then;
	return STEP_NEXT;
}

static enum step drop_between(struct file_run *r)
{
	struct page_range ranges[SPANS + 1];
	struct page_drop *pd = &r->pd;
	unsigned n = between(pd, ranges);

	r->step = between_dropped;
	pd->wait.result = 0;
	return n ? drop(r, ranges, n, pd->rounds < ROUNDS ? LOCKED_MS : 0) : STEP_NEXT;
}

static enum step drop_parked(struct file_run *r)
{
	struct page_drop *pd = &r->pd;
	struct page_range ranges[SPANS];

	look(pd);
	pd->rounds++;
	r->step = drop_between;
	for (unsigned i = 0; i < pd->n; i++)
		ranges[i] = (struct page_range){ pd->spans[i].start,
						 bytes_to(pd->spans[i].start, pd->spans[i].end) };
	if (pd->n)
		return drop(r, ranges, pd->n, LOCKED_MS);
	note_all_dropped(r->fs, pd->in, pd->start, pd->end);
	return STEP_NEXT;
}

enum step layout_drop_stale(struct file_run *r, struct inode *in, uint64_t start, uint64_t end,
			    step_fn then)
{
	r->step = then;
	if (!has_pages(r->fs, in))
		return STEP_NEXT;
	r->pd = (struct page_drop){ .in = in, .start = start, .end = end, .then = then };
	r->step = drop_parked;
	return STEP_NEXT;
}
