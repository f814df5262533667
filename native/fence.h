/* SPDX-License-Identifier: MIT
 *
 * fence.h - what was decided and done about the fence of a lost holder, so that it survives a
 * crash: TREE_FENCE, one record for a holder at most.
 *
 *     none --decided--> DECIDED --about to harm--> ISSUED <--the attempt failed, the next--> FAILED
 *     any --holder_fenced(): confirmed--> none, in the transaction that makes the holder GONE
 *
 * Invariants.
 *   1. Whoever harms a holder does so only after ISSUED is durable; and ISSUED follows a durable
 *      DECIDED. So after a crash a holder without a record was not harmed, one with DECIDED was not
 *      either, one with ISSUED or FAILED may have been.
 *   2. A holder with a record is LOST, and nothing makes it LIVE again: it may be cut off at any
 *      moment, so it would use what it cannot reach. It cannot resume (-EKEYREVOKED), and what it
 *      returns ends its grants but not its quarantine.
 *   3. FAILED and ISSUED never become DECIDED again, and tries never falls.
 *
 * What of it is in memory changes with fs->lock exclusive and layouts->mutex. Any thread may call;
 * none of the calls waits for durability. Errors are negative codes.
 */
#ifndef EXTFS_FENCE_H
#define EXTFS_FENCE_H

#include "fs.h"
#include "trans.h"

enum fence_state {
	FENCE_NONE = 0,
	FENCE_DECIDED = 1,
	FENCE_ISSUED = 2,
	FENCE_FAILED = 4, /* was issued, and the last attempt did not confirm */
};

struct fence {
	uint64_t holder;
	enum fence_state state;
	uint32_t tries;
	int64_t decided; /* seconds since the epoch */
};

/* Records a step, durable with *xid. -ENOENT: no such holder; -EBUSY: it is LIVE; -EINVAL: not a
 * step from where it is; -ERR_JOURNAL_FULL: nothing was done, wait and call again. */
int fence_put(struct fs *fs, uint64_t holder, enum fence_state state, uint32_t tries, xid_t *xid);
/* Fences of holders with an id above *holder, in order; 0 at the end. Sets *holder. */
unsigned fence_list(struct fs *fs, uint64_t *holder, struct fence *out, unsigned n);

#endif
