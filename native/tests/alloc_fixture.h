/* SPDX-License-Identifier: MIT
 *
 * alloc_fixture.h - an extent in a transaction of its own: for the tests of the allocator.
 */
#ifndef ALLOC_FIXTURE_H
#define ALLOC_FIXTURE_H

#include "tree_fixture.h"

#include "alloc_priv.h"
#include "trans.h"

static inline int extent_of(struct fixture *f, fsblock_t goal, nblocks_t min, nblocks_t max,
		     fsblock_t *start, nblocks_t *len)
{
	struct trans t;
	int err;

	fixture_begin(f, &t, 128);
	err = alloc_extent(&t, goal, min, max, start, len);
	if (err)
		trans_cancel(&t);
	else
		trans_commit(&t);
	return err;
}

static inline void give_back(struct fixture *f, fsblock_t start, nblocks_t len)
{
	struct trans t;

	fixture_begin(f, &t, 128);
	assert_int_equal(alloc_free(&t, start, len), 0);
	trans_commit(&t);
}

#endif
