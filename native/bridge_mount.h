/* SPDX-License-Identifier: MIT
 *
 * bridge_mount.h - mount(2) and umount2(2) of a FUSE connection, and the beginning and end of a
 * bridge.
 *
 * Errors: negative errno values. No locks.
 */
#ifndef EXTFS_BRIDGE_MOUNT_H
#define EXTFS_BRIDGE_MOUNT_H

#include "bridge.h"

enum transport_choice { TRANSPORT_AUTO, TRANSPORT_ONLY_URING, TRANSPORT_ONLY_CLASSIC };

struct mount_request {
	const char *mountpoint; /* absolute, without symbolic links */
	const char *fsname;
	unsigned long flags; /* MS_* */
	bool read_only, writeback_cache;
	unsigned threads; /* 0: as the transport needs */
	enum transport_choice transport;
	char *why; /* of -EOPNOTSUPP: why there is no ring; may be NULL */
	size_t why_len;
};

/* Words of mount(8)'s -o into MS_* flags: ro, rw, nosuid, nodev, noexec, noatime, ... -EINVAL: one
 * that the kernel does not take as a flag; it is copied to `bad`. */
int mount_flags(const char *options, unsigned long *flags, char *bad, size_t bad_len);
/* Opens /dev/fuse and mounts; returns its descriptor, and the device number of the mount. -EBUSY:
 * something is mounted there already; -ENODEV: no /dev/fuse. */
int mount_fuse(const struct mount_request *m, dev_t *dev);
/* lazy: the mountpoint is free at once, the connection ends when the last user has gone. */
int unmount_fuse(const char *mountpoint, bool lazy);
/* Every request fails from now on, and reads of /dev/fuse say ENODEV. */
int abort_fuse(dev_t dev);

/* Mounts and serves; returns when it is decided how requests come. -EOPNOTSUPP: not over io_uring, as
 * m->transport demands. */
int bridge_start(struct fs *fs, const struct mount_request *m, struct bridge **out);
/* Waits until all requests have ended; frees. A mount that is still there is detached and aborted
 * first. */
void bridge_stop(struct bridge *b);

#endif
