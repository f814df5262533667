/* SPDX-License-Identifier: MIT
 *
 * file.h - the data path: read, write, truncate, fallocate, copy, seek, fsync of regular files.
 *
 * Each is an operation record (struct file_op) that runs on an ioctx: it starts in the caller's
 * thread (the ioctx's owner), may park (segments, journal space, durability, device I/O), goes on
 * from ioctx_run() and ends with one call of done(). done may run inside file_start(). Nothing
 * blocks a thread except metadata reads.
 *
 * Rules that keep old bytes from ever being seen (DESIGN 4):
 *  1. A hole becomes unwritten (transaction), the data is written, the extent becomes written
 *     (transaction) after the device said the write is complete; the journal flushes the device
 *     before it logs that.
 *  2. A partial write into a block that is not written writes the whole block, with zeros around;
 *     into a written one it reads, merges and writes the block, under a WRITE_IO segment rounded to
 *     blocks.
 *  3. Bytes past EOF in the last block are undefined on the device. Whoever moves EOF up zeroes
 *     them first, and the zeroing is complete before the size changes. It never zeroes in place
 *     before the truncate that cut the file there is durable (shrink_xid).
 *  4. Shared blocks are never written in place: new blocks, then the mapping is swapped under a MAP
 *     segment.
 *  5. The size grows in the transaction that converts, after the data is on the device.
 *
 * At the same time: operations on overlapping ranges have the effect of one after the other, for all of
 * their bytes and of both files; for their segments (segment.h) are held from the first look to the last
 * change. But two read beside WRITEs of the range: READ, and a COPY between two files whose offsets disagree
 * within a block (it moves bytes, piece by piece, and locks no writer out for as long as that takes). What
 * they see of each WRITE that is under way while they are:
 *  a. each byte is the old or the new one, by itself, and of several WRITEs perhaps those of a later one only;
 *  b. EOF is where it was before or afterwards, or (a WRITE of many extents) on its way, where they look for it
 *     once; who finds it moved sees all bytes of that WRITE up to there, and zeros in front of them.
 * COPY's own destination, and all that is not WRITE, comes before or after the whole of them. (Beside holders
 * of layouts, who write by themselves, they read in the same way.)
 *
 * FILE_F_NOWAIT, of READ, WRITE, TRUNCATE, FALLOCATE, COPY, DEDUPE, EXCHANGE, COLLAPSE and INSERT:
 * the operation waits for the device, the journal and other operations that wait for no more than
 * these, and never for a holder of grants. Where it would, it asks the holders in its way to return
 * what it needs, and ends with -EAGAIN. Then nothing was changed, seen through the file or on a
 * second attempt: all its segments, in the kinds that it needs to the end, are acquired before its
 * first change; only zeros behind EOF may have been written, which nobody sees. So it ends with
 * -EAGAIN or runs to its end, and an operation of many transactions never stops between two of them
 * because of a holder.
 */
#ifndef EXTFS_FILE_H
#define EXTFS_FILE_H

#include "inode.h"
#include "journal.h"
#include "segment.h"

enum file_op_kind {
	FILE_READ, FILE_WRITE, FILE_TRUNCATE, FILE_FALLOCATE, FILE_COPY, FILE_FSYNC,
	FILE_EXCHANGE, FILE_COLLAPSE, FILE_INSERT, FILE_DEDUPE,
	FILE_LAYOUT_GET, FILE_LAYOUT_COMMIT, FILE_LAYOUT_RETURN, FILE_LAYOUT_REVOKE, FILE_LAYOUT_TRIM,
};

#define FILE_F_APPEND 0x1u     /* write at EOF, whatever offset says; offset becomes that */
#define FILE_F_DSYNC 0x2u      /* done only when durable */
#define FILE_F_KILL_PRIV 0x4u  /* clear setuid/setgid/capability (HANDLE_KILLPRIV_V2) */
#define FILE_F_DATASYNC 0x8u   /* fsync: times may be left out */
#define FILE_F_NOATIME 0x10u
#define FILE_F_PRIV_KILLED 0x20u /* set by the operation: KILL_PRIV found something to clear */
#define FILE_F_NOPIN 0x40u       /* WRITE: -EBUSY instead of waiting for a pinned range */
#define FILE_F_NOWAIT 0x80u      /* -EAGAIN instead of waiting for a holder; see below */
#define FILE_F_RETURNS_ALL 0x200u /* LAYOUT_RETURN: one of all that return everything of a holder */
#define FILE_F_EARLY 0x400u      /* WRITE: may be answered early, see file_early.h */
#define FILE_F_CLONE 0x100u      /* COPY: share or fail: -EINVAL unless both offsets, and len or the source's end, are whole blocks */

#define FALLOC_KEEP_SIZE 0x1u
#define FALLOC_PUNCH_HOLE 0x2u
#define FALLOC_ZERO_RANGE 0x10u

struct file_op {
	struct op op;
	enum file_op_kind kind;
	unsigned flags;      /* FILE_F_* */
	unsigned mode;       /* FALLOC_* */
	struct inode *in;    /* referenced by the caller until done */
	uint64_t offset;     /* bytes; TRUNCATE: the new size */
	uint64_t len;
	void *buf;           /* len bytes; I/O-aligned memory avoids a copy */
	struct inode *dst;   /* COPY: in -> dst */
	uint64_t dst_offset;
	struct layout_args *layout; /* FILE_LAYOUT_* */
	int64_t result;      /* bytes, 0, or a negative code */
	void (*done)(struct file_op *fop);
	void *user;
	/* EARLY: `early` is set when done() is called and the operation goes on, without the caller and without this struct, in the
	 * thread of its ioctx; then ended(ended_arg) says that it has ended. */
	bool early;
	void (*ended)(void *arg);
	void *ended_arg;
	/* private; file_op_init() clears it */
	struct file_run *run;
};

void file_op_init(struct file_op *fop, enum file_op_kind kind, struct inode *in, struct ioctx *ctx);
/* Begin. READ: bytes up to EOF; len <= 1 MiB + anything reasonable (limit FILE_IO_MAX). -EINVAL,
 * -EFBIG (beyond 2^63-1), -EISDIR, -ENOSPC, -EIO, ... come in result. COPY: shares whole blocks
 * where offsets agree modulo the block size, copies the rest; result: bytes. EXCHANGE: [offset,
 * +len) of in and [dst_offset, +len) of dst change places, whole blocks below both EOFs; DEDUPE:
 * shares in's blocks with dst as far as the bytes are the same, result: so many bytes (at most
 * 16 MiB in one operation), -EBADE: not even the first block; COLLAPSE, INSERT: as fallocate(2)
 * says, whole blocks. */
void file_start(struct file_op *fop);
#define FILE_IO_MAX (16u << 20)
/* Interrupt a parked operation: true: done() has been or will be called with -EINTR and nothing was
 * done; false: it goes on. */
bool file_cancel(struct file_op *fop);
/* lseek SEEK_DATA (3) / SEEK_HOLE (4): offset or -ENXIO. Unwritten counts as a hole. Blocking
 * metadata reads only. */
int64_t file_seek(struct inode *in, uint64_t offset, int whence);
/* The same for who must not stay away long: *pos begins as the offset. 0: walked a few hundred
 * extents, *pos is where to go on (first false); 1: *pos is the answer. */
int file_seek_step(struct inode *in, uint64_t *pos, int whence, bool first);

/* The same, waiting in the calling thread on its own ioctx (ioctx_of_thread): tools and tests;
 * never a thread that serves requests. */
int64_t file_run_blocking(struct file_op *fop);

#endif
