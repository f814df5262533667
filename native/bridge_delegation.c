/* SPDX-License-Identifier: MIT
 *
 * bridge_delegation.c - requests of local users and the delegations of clients (delegation.h).
 *
 * A request that would not leave a file as a client may count on begins a use of the inode, which
 * lasts until the request is answered; then it looks. While a delegation is in the way it is parked
 * (WAIT_DELEGATION); it goes on from its beginning, or where request_admit_then() was told, and
 * finds none, since its use keeps new ones away.
 *
 * OPEN and CREATE of a file without delegations need no use: the open file itself is counted before
 * the look. UNLINK and RENAME, which know their inodes only in the transaction, look there, and
 * come here for the inode that was delegated.
 *
 * The kernel holds locks of its own while it waits for an answer: of the directory for a name, of
 * the file for its attributes. Other local users of these wait with it, for recall_ms at most.
 */
#include <fcntl.h>

#include "bridge.h"
#include "delegation.h"

/* ---- uses ----------------------------------------------------------------------------------- */

static void end_first(struct request_uses *uses)
{
	local_use_end(uses->use[0].in, uses->use[0].op);
	inode_put(uses->use[0].in);
	uses->n--;
	for (unsigned i = 0; i < uses->n; i++)
		uses->use[i] = uses->use[i + 1];
}

void request_uses_end(struct request_uses *uses)
{
	while (uses->n)
		end_first(uses);
}

static bool has_use(const struct request_uses *uses, const struct inode *in, enum delegation_op op)
{
	for (unsigned i = 0; i < uses->n; i++)
		if (uses->use[i].in == in &&
		    (delegation_op_changes(uses->use[i].op) || !delegation_op_changes(op)))
			return true;
	return false;
}

static void begin_use(struct request_uses *uses, struct inode *in, enum delegation_op op)
{
	if (has_use(uses, in, op))
		return;
	/* Names that others change meanwhile: the oldest inode is no longer what is meant. */
	if (uses->n == REQUEST_USES)
		end_first(uses);
	local_use_begin(in, op);
	uses->use[uses->n].in = inode_ref(in);
	uses->use[uses->n].op = op;
	uses->n++;
}

/* ---- waiting -------------------------------------------------------------------------------- */

bool request_admit_then(struct request *r, struct inode *in, enum delegation_op op,
			void (*then)(struct request *r))
{
	begin_use(&r->uses, in, op);
	if (likely(!delegation_any(in)))
		return true;
	if (!request_park(r, WAIT_DELEGATION))
		return false;
	r->admitted = then;
	r->delegation = (struct delegation_wait){.op = &r->op};
	if (delegation_wait(in, op, &r->delegation) != ERR_PARKED) {
		request_unpark(r);
		return true;
	}
	r->t->parked++;
	if (!then)
		request_drop_references(r);
	return false;
}

bool request_admit(struct request *r, struct inode *in, enum delegation_op op)
{
	return request_admit_then(r, in, op, NULL);
}

void request_wait_undelegated(struct request *r, struct inode *in)
{
	bool returned = request_admit(r, in, DELEGATION_NAMESPACE);

	inode_put(in);
	if (returned)
		request_yield(r); /* in the meantime: the handler runs again */
}

enum delegation_op delegation_op_of_open(uint32_t flags)
{
	bool writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);

	return writes ? DELEGATION_OPEN_WRITE : DELEGATION_OPEN_READ;
}

bool request_admit_now(struct request *r, struct inode *in, enum delegation_op op, bool recall)
{
	bool refused;

	begin_use(&r->uses, in, op);
	refused = recall ? delegation_break(in, 0, op) != 0 : delegation_conflicts(in, op);
	if (refused)
		request_fail(r, -EAGAIN);
	return !refused;
}

bool request_admit_open(struct request *r, struct inode *in, uint32_t flags)
{
	enum delegation_op op = delegation_op_of_open(flags);

	return flags & O_NONBLOCK ? request_admit_now(r, in, op, true) : request_admit(r, in, op);
}
