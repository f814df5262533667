/* SPDX-License-Identifier: MIT
 *
 * core_record_api.c - the calls of extfs_core.h about the records of the NFS server.
 */
#include "core_api.h"

#include "journal.h"
#include "nfs_record.h"
#include "rider.h"

_Static_assert(EXTFS_NFS_VALUE_MAX == NFS_VALUE_MAX, "length of a value");
_Static_assert(sizeof(struct extfs_nfs_record) == sizeof(struct nfs_record) &&
	       offsetof(struct extfs_nfs_record, value) == offsetof(struct nfs_record, value) &&
	       offsetof(struct extfs_nfs_record, len) == offsetof(struct nfs_record,
								  len), "a record is a record");

_Static_assert(sizeof(struct extfs_rider) == sizeof(struct rider) &&
	       offsetof(struct extfs_rider, record) == offsetof(struct rider, record) &&
	       offsetof(struct extfs_rider, written) == offsetof(struct rider, written) &&
	       sizeof(struct rider_disk) == EXTFS_RIDER_BYTES, "a rider is a rider");

int extfs_nfs_put(struct fs *fs, const struct extfs_nfs_record *put, unsigned n,
		  const uint64_t *del, unsigned m)
{
	xid_t xid;
	int err = nfs_record_put(fs, (const struct nfs_record *)put, n, del, m, &xid);

	return err || !xid ? err : jrn_force_blocking(fs, xid);
}

ssize_t extfs_nfs_next(struct fs *fs, uint64_t *id, void *value, size_t cap)
{
	return nfs_record_next(fs, id, value, cap);
}

void extfs_ride(struct extfs_rider *rider) { rider_set((struct rider *)rider); }
