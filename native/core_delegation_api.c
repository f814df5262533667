/* SPDX-License-Identifier: MIT
 *
 * core_delegation_api.c - the calls of extfs_core.h about delegations: inodes by number, structs of
 * that header.
 */
#include "types.h"

#include "extfs_core.h"

#include "delegation.h"
#include "layout.h"

_Static_assert(EXTFS_DELEGATION_OPEN_READ == (int)DELEGATION_OPEN_READ &&
	       EXTFS_DELEGATION_OPEN_WRITE == (int)DELEGATION_OPEN_WRITE &&
	       EXTFS_DELEGATION_READ == (int)DELEGATION_READ &&
	       EXTFS_DELEGATION_WRITE == (int)DELEGATION_WRITE &&
	       EXTFS_DELEGATION_SETATTR == (int)DELEGATION_SETATTR &&
	       EXTFS_DELEGATION_NAMESPACE == (int)DELEGATION_NAMESPACE, "operations");
_Static_assert(EXTFS_EV_DELEGATION_RECALL == (int)EVENT_DELEGATION_RECALL &&
	       EXTFS_EV_DELEGATION_REVOKED == (int)EVENT_DELEGATION_REVOKED &&
	       EXTFS_EV_DELEGATION_ATTRS == (int)EVENT_DELEGATION_ATTRS, "events");

static int get_inode(struct fs *fs, uint64_t ino, struct inode **out)
{
	int err;

	fs_rdlock(fs);
	err = inode_get(fs, ino, out);
	fs_unlock(fs);
	return err;
}

int extfs_delegation_grant(struct fs *fs, uint64_t ino, uint64_t holder, int write, uint64_t *seq)
{
	struct inode *in;
	int err = get_inode(fs, ino, &in);

	if (err)
		return err;
	err = delegation_grant(in, holder, write != 0, seq);
	inode_put(in);
	return err;
}

int extfs_delegation_return(struct fs *fs, uint64_t ino, uint64_t holder)
{
	struct inode *in;
	int err = get_inode(fs, ino, &in);

	if (err)
		return err;
	err = delegation_return(in, holder);
	inode_put(in);
	return err;
}

int extfs_delegation_break(struct fs *fs, uint64_t ino, uint64_t exempt, int op)
{
	struct inode *in;
	int err = delegation_op_valid(op) ? get_inode(fs, ino, &in) : -EINVAL;

	if (err)
		return err;
	err = delegation_break(in, exempt, (enum delegation_op)op);
	inode_put(in);
	return err;
}

int extfs_local_opens(struct fs *fs, uint64_t ino, uint32_t *readers, uint32_t *writers)
{
	struct inode *in;
	int err = get_inode(fs, ino, &in);

	if (err)
		return err;
	*readers = atomic_load(&in->local_readers);
	*writers = atomic_load(&in->local_writers);
	inode_put(in);
	return 0;
}

unsigned extfs_delegation_list(struct fs *fs, uint64_t holder, uint64_t *seq,
			       struct extfs_delegation_look *out, unsigned n)
{
	unsigned count = 0;

	while (count < n) {
		struct delegation_look look[64];
		unsigned room = MIN(n - count, (unsigned)ARRAY_LEN(look));
		unsigned got = delegation_list(fs, holder, seq, look, room);

		if (!got)
			break;
		for (unsigned i = 0; i < got; i++)
			out[count++] = (struct extfs_delegation_look){
				.ino = look[i].ino, .generation = look[i].generation,
				.write = look[i].write, .recalled = look[i].recalled,
				.seq = look[i].seq, .left_ms = look[i].left_ms,
			};
	}
	return count;
}
