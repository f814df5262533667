/* SPDX-License-Identifier: MIT
 *
 * fuse_abi.h - the kernel interface of FUSE up to 7.45: <linux/fuse.h>, and what Debian 12's copy
 * of it (7.38) does not know yet. Names are the kernel's, so that a newer <linux/fuse.h> replaces
 * each of them here.
 */
#ifndef EXTFS_FUSE_ABI_H
#define EXTFS_FUSE_ABI_H

#include <linux/fuse.h>
#include <stddef.h>

/* The newest minor version whose messages the bridge speaks. */
#define FUSE_ABI_MINOR 45u

#if FUSE_KERNEL_MINOR_VERSION < 39
#define FUSE_STATX 52

struct fuse_sx_time {
	int64_t tv_sec;
	uint32_t tv_nsec;
	int32_t __reserved;
};

struct fuse_statx {
	uint32_t mask;
	uint32_t blksize;
	uint64_t attributes;
	uint32_t nlink;
	uint32_t uid;
	uint32_t gid;
	uint16_t mode;
	uint16_t __spare0[1];
	uint64_t ino;
	uint64_t size;
	uint64_t blocks;
	uint64_t attributes_mask;
	struct fuse_sx_time atime;
	struct fuse_sx_time btime;
	struct fuse_sx_time ctime;
	struct fuse_sx_time mtime;
	uint32_t rdev_major;
	uint32_t rdev_minor;
	uint32_t dev_major;
	uint32_t dev_minor;
	uint64_t __spare2[14];
};

struct fuse_statx_in {
	uint32_t getattr_flags;
	uint32_t reserved;
	uint64_t fh;
	uint32_t sx_flags;
	uint32_t sx_mask;
};

struct fuse_statx_out {
	uint64_t attr_valid;
	uint32_t attr_valid_nsec;
	uint32_t flags;
	uint64_t spare[2];
	struct fuse_statx stat;
};
#endif

#if FUSE_KERNEL_MINOR_VERSION < 42
#define FUSE_OVER_IO_URING (1ULL << 41)

struct fuse_uring_ent_in_out {
	uint64_t flags;
	uint64_t commit_id;
	uint32_t payload_sz;
	uint32_t padding;
	uint64_t reserved;
};

struct fuse_uring_req_header {
	char in_out[128]; /* fuse_in_header, fuse_out_header */
	char op_in[128];  /* the first argument */
	struct fuse_uring_ent_in_out ring_ent_in_out;
};

enum fuse_uring_cmd {
	FUSE_IO_URING_CMD_INVALID = 0,
	FUSE_IO_URING_CMD_REGISTER = 1,
	FUSE_IO_URING_CMD_COMMIT_AND_FETCH = 2,
};

/* In the second half of an SQE of 128 bytes. */
struct fuse_uring_cmd_req {
	uint64_t flags;
	uint64_t commit_id;
	uint16_t qid;
	uint8_t padding[6];
};
#endif

#if FUSE_KERNEL_MINOR_VERSION < 45
#define FUSE_COPY_FILE_RANGE_64 53

struct fuse_copy_file_range_out {
	uint64_t bytes_copied;
};
#endif

#if FUSE_KERNEL_MINOR_VERSION < 44
#define FUSE_NOTIFY_INC_EPOCH 8 /* no payload: every dentry is looked up anew */
#endif

/* One above the highest opcode of 7.45. */
#define FUSE_ABI_OPCODES 54u

_Static_assert(sizeof(struct fuse_in_header) == 40, "payload placement counts on it");
_Static_assert(sizeof(struct fuse_out_header) == 16, "payload placement counts on it");
_Static_assert(sizeof(struct fuse_write_in) == 40, "payload placement counts on it");
_Static_assert(sizeof(struct fuse_statx) == 256, "fuse_statx");
_Static_assert(offsetof(struct fuse_statx, atime) == 64, "fuse_statx.atime");
_Static_assert(sizeof(struct fuse_statx_out) == 288, "fuse_statx_out");
_Static_assert(sizeof(struct fuse_init_out) == 64, "fuse_init_out");
_Static_assert(sizeof(struct fuse_uring_req_header) == 288, "fuse_uring_req_header");
_Static_assert(sizeof(struct fuse_uring_cmd_req) == 24, "fuse_uring_cmd_req");

#endif
