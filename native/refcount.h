/* SPDX-License-Identifier: MIT
 *
 * refcount.h - blocks that several extents share. Only counts of 2 and more have a record; records
 * never overlap and neighbours with equal counts are merged.
 *
 * Concurrency: changes inside a transaction; queries with fs->lock at least shared.
 */
#ifndef EXTFS_REFCOUNT_H
#define EXTFS_REFCOUNT_H

#include "trans.h"

/* Length of the run from block on that has the same count; *refs is that count (1 when there is no
 * record). */
int refcount_query(struct fs *fs, fsblock_t block, nblocks_t len, uint32_t *refs, nblocks_t *run);
/* The same seen from the end: length of the run that ends at block + len. */
int refcount_query_back(struct fs *fs, fsblock_t block, nblocks_t len, uint32_t *refs,
			nblocks_t *run);
/* One more user of [start, start + len). */
int refcount_add(struct trans *t, fsblock_t start, nblocks_t len);
/* One user less; blocks that had one user are freed (or quarantined: holder != 0). */
int refcount_drop(struct trans *t, fsblock_t start, nblocks_t len, uint64_t holder);

#endif
