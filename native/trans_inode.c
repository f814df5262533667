/* SPDX-License-Identifier: MIT
 *
 * trans_inode.c - an in-memory inode in a transaction: its core follows the outcome, like a block.
 */
#include "inode.h"

int trans_join_inode(struct trans *t, struct inode *in)
{
	return trans_save(t, &in->core, sizeof(in->core));
}
