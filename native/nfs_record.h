/* SPDX-License-Identifier: MIT
 *
 * nfs_record.h - what the NFS server has to remember over a restart: byte strings by number, in
 * TREE_NFS_CLIENT. What they say is the server's business.
 *
 * A value is cut into parts of NFS_PART_BYTES, numbered from 0; the last one is shorter, so that a
 * missing end is noticed. A put is one transaction: after a crash all of it is there or nothing.
 *
 * Concurrency: any thread; fs->lock is taken inside. Errors: negative codes; -ERR_RECORD_SHAPE: the
 * parts of a value do not fit together.
 */
#ifndef EXTFS_NFS_RECORD_H
#define EXTFS_NFS_RECORD_H

#include "fs.h"
#include "types.h"

struct nfs_record { uint64_t id; const void *value; size_t len; };

/* Set n records and delete m (those that do not exist are no error), together. *xid: durable
 * with this group. -EINVAL: a value is longer than NFS_VALUE_MAX, or an id comes twice. -E2BIG:
 * too much for one transaction; any three records fit, and any 25 that have, and had, less than
 * NFS_PART_BYTES. -ERR_JOURNAL_FULL: nothing was done, wait and call again. */
int nfs_record_put(struct fs *fs, const struct nfs_record *put, unsigned n, const uint64_t *del,
		   unsigned m, xid_t *xid);
/* The first record with this or a higher number, which becomes *id. Its length; copies it when
 * cap > 0. -ENOENT: there is none; -ERANGE: it is longer than cap. */
ssize_t nfs_record_next(struct fs *fs, uint64_t *id, void *value, size_t cap);

#endif
