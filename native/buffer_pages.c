/* SPDX-License-Identifier: MIT
 *
 * buffer_pages.c - pages for cached blocks, and how their memory goes back to the kernel.
 *
 * A free page is warm when it was used since the kernel gave or took its memory, else cold. A page
 * that is taken from a cold one faults once, which is little beside the read that fills it.
 *
 * Invariants, whenever the mutex is free:
 *  1. cold is a part of free: a page in use is neither;
 *  2. a slab is on the list warm when it has a free page that is warm, else on cold when it has a
 *     free one, else on none;
 *  3. pages taken by pages_take_warm() are not free: nobody gets them while the kernel drops them.
 */
#include "buffer_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

_Static_assert(SLAB_PAGES == 64, "a bit of a word for each page");

struct page_slab {
	struct page_slab *all_next;
	struct page_slab *prev, *next; /* on warm or cold */
	char *pages;
	uint64_t free, cold; /* bit i: page i */
};

#if defined(__SANITIZE_ADDRESS__)
/* One allocation each, so that a use after free is seen. */
void *pages_get(struct page_pool *p, struct page_slab **slab)
{
	*slab = NULL;
	return io_alloc(BLOCK_SIZE);
}

void pages_put(struct page_pool *p, struct page_slab *slab, void *page)
{
	io_free(page);
}
#else
static struct page_slab **list_of(struct page_pool *p, const struct page_slab *s)
{
	return s->free & ~s->cold ? &p->warm : s->free ? &p->cold : NULL;
}

static void unlist(struct page_pool *p, struct page_slab *s)
{
	struct page_slab **list = list_of(p, s);

	if (!list)
		return;
	*(s->prev ? &s->prev->next : list) = s->next;
	if (s->next)
		s->next->prev = s->prev;
	s->prev = s->next = NULL;
}

static void enlist(struct page_pool *p, struct page_slab *s)
{
	struct page_slab **list = list_of(p, s);

	if (!list)
		return;
	s->next = *list;
	if (s->next)
		s->next->prev = s;
	*list = s;
}

static struct page_slab *slab_add(struct page_pool *p)
{
	struct page_slab *s = calloc(1, sizeof(*s));

	if (!s)
		return NULL;
	s->pages = mmap(NULL, (size_t)SLAB_PAGES * BLOCK_SIZE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (s->pages == MAP_FAILED) {
		free(s);
		return NULL;
	}
	s->free = s->cold = UINT64_MAX;
	s->all_next = p->all;
	p->all = s;
	p->slabs++;
	p->cold_pages += SLAB_PAGES;
	enlist(p, s);
	return s;
}

void *pages_get(struct page_pool *p, struct page_slab **slab)
{
	struct page_slab *s = p->warm ? p->warm : p->cold ? p->cold : slab_add(p);
	uint64_t from, bit;

	if (!s)
		return NULL;
	from = s->free & ~s->cold ? s->free & ~s->cold : s->free;
	bit = from & -from;
	unlist(p, s);
	p->cold_pages -= (s->cold & bit) != 0;
	s->free &= ~bit;
	s->cold &= ~bit;
	enlist(p, s);
	*slab = s;
	return s->pages + (size_t)__builtin_ctzll(bit) * BLOCK_SIZE;
}

void pages_put(struct page_pool *p, struct page_slab *s, void *page)
{
	size_t i = (size_t)((char *)page - s->pages) / BLOCK_SIZE;

	xassert(i < SLAB_PAGES && !(s->free >> i & 1));
	unlist(p, s);
	s->free |= 1ULL << i;
	enlist(p, s);
}
#endif

struct page_slab *pages_take_warm(struct page_pool *p, uint64_t *taken)
{
	struct page_slab *s = p->warm;

#if !defined(__SANITIZE_ADDRESS__)
	if (s) {
		*taken = s->free & ~s->cold;
		unlist(p, s);
		s->free &= ~*taken;
		enlist(p, s);
	}
#endif
	return s;
}

void pages_put_cold(struct page_pool *p, struct page_slab *s, uint64_t taken)
{
#if !defined(__SANITIZE_ADDRESS__)
	xassert(!(s->free & taken));
	unlist(p, s);
	s->free |= taken;
	s->cold |= taken;
	p->cold_pages += (unsigned)__builtin_popcountll(taken);
	enlist(p, s);
#endif
}

/* Pages of the kernel may be larger than ours: only what fills one can go. */
static void return_run(char *begin, char *end)
{
	uintptr_t mask = (uintptr_t)sysconf(_SC_PAGESIZE) - 1;
	uintptr_t from = ((uintptr_t)begin + mask) & ~mask, to = (uintptr_t)end & ~mask;

	if (from < to)
		madvise((void *)from, to - from, MADV_DONTNEED);
}

void pages_return(struct page_slab *s, uint64_t taken)
{
	while (taken) {
		unsigned first = (unsigned)__builtin_ctzll(taken);
		uint64_t after = ~(taken >> first);
		unsigned n = after ? (unsigned)__builtin_ctzll(after) : SLAB_PAGES;

		return_run(s->pages + (size_t)first * BLOCK_SIZE,
			   s->pages + (size_t)(first + n) * BLOCK_SIZE);
		taken = n == SLAB_PAGES ? 0 : taken & ~(((1ULL << n) - 1) << first);
	}
}

uint64_t pages_resident(const struct page_pool *p, uint64_t in_use)
{
	uint64_t pages = p->slabs ? p->slabs * SLAB_PAGES - p->cold_pages : in_use;

	return pages * BLOCK_SIZE;
}

void pages_destroy(struct page_pool *p)
{
	while (p->all) {
		struct page_slab *s = p->all;

		p->all = s->all_next;
		munmap(s->pages, (size_t)SLAB_PAGES * BLOCK_SIZE);
		free(s);
	}
	*p = (struct page_pool){0};
}
