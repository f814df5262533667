/* SPDX-License-Identifier: MIT
 *
 * errors.h - how the core says that something went wrong.
 *
 * Functions return 0 (or a count) or a negative code. Codes below 4096 are errno values.
 * Codes from 4096 are private: one for each distinct failure that an administrator has to be able to tell from
 * the others; err_errno() maps them to an errno at the front (bridge, public API), err_text()
 * says what failed. Two codes never leave the core's async paths:
 *   -ERR_JOURNAL_FULL  trans_begin() found no log space: wait (jrn_wait_space), start over;
 *   ERR_PARKED (positive) the operation's record waits and will be resumed.
 */
#ifndef EXTFS_ERRORS_H
#define EXTFS_ERRORS_H

#include <errno.h>

#define ERR_PARKED 1

/* name, errno, text */
#define EXTFS_ERROR_TABLE(X)                                                              \
	X(ERR_JOURNAL_FULL, EAGAIN, "journal is full until the next checkpoint")          \
	X(ERR_BUSY_BLOCKS, EAGAIN, "free blocks are busy until the next commit")          \
	X(ERR_META_MAGIC, EIO, "metadata block has the wrong magic")                      \
	X(ERR_META_CRC, EIO, "metadata block checksum does not match")                    \
	X(ERR_META_BLOCKNO, EIO, "metadata block carries another block number")           \
	X(ERR_META_UUID, EIO, "metadata block belongs to another filesystem")             \
	X(ERR_META_OWNER, EIO, "metadata block belongs to another structure")             \
	X(ERR_META_RANGE, EIO, "metadata points outside the device")                      \
	X(ERR_NODE_LEVEL, EIO, "tree node has an unexpected level")                       \
	X(ERR_NODE_ORDER, EIO, "keys of a tree node are not in order")                    \
	X(ERR_NODE_BOUNDS, EIO, "a record lies outside its tree node")                    \
	X(ERR_RECORD_SHAPE, EIO, "a record has an impossible size or value")              \
	X(ERR_MAP_OVERLAP, EIO, "extent map records overlap")                             \
	X(ERR_FREE_CORRUPT, EIO, "free space records contradict each other")              \
	X(ERR_DIR_CORRUPT, EIO, "a directory entry contradicts the inode it names")       \
	X(ERR_DEV_READ, EIO, "the device failed a read")                                  \
	X(ERR_DEV_WRITE, EIO, "the device failed a write")                                \
	X(ERR_DEV_FLUSH, EIO, "the device failed a flush")                                \
	X(ERR_JOURNAL_WRITE, EIO, "the journal could not be written")                     \
	X(ERR_JOURNAL_CORRUPT, EIO, "the journal is damaged")                             \
	X(ERR_NOT_EXTFS, EINVAL, "not an extfs device")                                   \
	X(ERR_SB_DAMAGED, EUCLEAN, "both superblock copies are damaged")                  \
	X(ERR_INCOMPAT, ENOTSUP, "the filesystem uses features that this version does not know") \
	X(ERR_DEV_SMALL, ENOSPC, "the device is smaller than the filesystem on it")       \
	X(ERR_DEV_TINY, ENOSPC, "the device is too small for a filesystem")               \
	X(ERR_DEV_IN_USE, EBUSY, "the device is in use")                                  \
	X(ERR_FOREIGN_FS, EEXIST, "the device carries another filesystem")                \
	X(ERR_STALE_HANDLE, ESTALE, "the file of this handle is gone")                    \
	X(ERR_DELEGATED, EAGAIN, "a client has a delegation of the file")                 \
	X(ERR_SHUTDOWN, EROFS, "the filesystem is read-only after an error")

enum extfs_error {
	ERR_FIRST_PRIVATE = 4095,
#define X(name, no, text) name,
	EXTFS_ERROR_TABLE(X)
#undef X
	ERR_END
};

/* Errno value (positive) of a negative return code; 0 for 0. */
int err_errno(int code);
/* Static text of a negative return code. */
const char *err_text(int code);
/* Symbol ("ERR_META_CRC", or "ENOSPC") of a negative return code. */
const char *err_name(int code);

#endif
