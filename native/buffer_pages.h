/* SPDX-License-Identifier: MIT
 *
 * buffer_pages.h - private to buffer.c: the memory of the cached blocks, one page each.
 *
 * Concurrency: under the mutex of the cache, but for pages_return(), which makes system calls and
 * touches only what its caller has taken. No error but NULL: no memory.
 */
#ifndef EXTFS_BUFFER_PAGES_H
#define EXTFS_BUFFER_PAGES_H

#include "types.h"

/* Memory comes from the kernel in slabs of this many pages, and stays mapped until the end. */
#define SLAB_PAGES 64u

struct page_slab;

struct page_pool {
	struct page_slab *all;
	/* Slabs with free pages. warm: of some free page the memory is still ours. cold: of none. */
	struct page_slab *warm, *cold;
	uint64_t slabs, cold_pages; /* cold_pages: without memory of their own, free or taken */
};

/* One page, aligned for I/O, content undefined. *slab goes back with it. */
void *pages_get(struct page_pool *p, struct page_slab **slab);
void pages_put(struct page_pool *p, struct page_slab *slab, void *page);

/* Giving back what is free and warm, in three steps, a slab at a time: take it (NULL: there is
 * none), return it to the kernel without the mutex, put it back as cold. */
struct page_slab *pages_take_warm(struct page_pool *p, uint64_t *taken);
void pages_return(struct page_slab *slab, uint64_t taken);
void pages_put_cold(struct page_pool *p, struct page_slab *slab, uint64_t taken);

/* Bytes that have memory behind them: pages in use, and free warm ones. */
uint64_t pages_resident(const struct page_pool *p, uint64_t in_use);
/* With every page put. */
void pages_destroy(struct page_pool *p);

#endif
