/* SPDX-License-Identifier: MIT
 *
 * file_early.h - buffered writes that are answered before their data is on the device, as a page
 * cache would.
 *
 * A WRITE with FILE_F_EARLY is answered as soon as nothing can go wrong any more but the device: it
 * holds its segment, its blocks are allocated, a copy of its data is in memory of our own, and so is all the
 * memory that writing it takes. Then
 * the operation goes on without its caller. From the answer on
 *  - its segment is of kind MAP: whoever touches these bytes through a segment waits for it, readers
 *    too;
 *  - the file has its size and times for everybody, and they do not change again when it ends;
 *  - on disk the size stays what it was until the data is converted: a crash shows no zeros where
 *    data was to be. (Where another operation has set the size meanwhile, that one counts.) Those
 *    that make the file grow are converted in the order of their answers.
 *
 * Durable is only what an fsync said: run_durable() waits for the early writes of the file that were
 * answered before it, and early_sync() for those of all files. Who looks at the map without a segment
 * (seek, map) waits, too. A device that fails then has failed a write(2) that had succeeded: it is
 * logged, counted (inode->early_errors, for fsync and close to tell), and the bytes are what they
 * were, or zeros where nothing was.
 *
 * Answered late, as if the flag were not there: when there is no memory, or that of copies or the number of those
 * under way is at its bound; when space is so low that the conversion might not find a tree node; on shared blocks; where a
 * client of a layout reads the blocks by itself; when bytes behind EOF in its block are not known to
 * be zero, which a write that fails would show; when a client's commit has moved EOF since it looked.
 *
 * Locks: an inode's list, fields early_*, and those of its early writes that others look at: inode->lock; joined with
 * fs->lock held, exclusively by those that grow the file. Memory, counters, and the list of all: early->mutex, a leaf.
 */
#ifndef EXTFS_FILE_EARLY_H
#define EXTFS_FILE_EARLY_H

#include "inode.h"

struct file_run;
struct early;
struct early_write;

int early_create(struct fs *fs);
void early_destroy(struct fs *fs); /* nothing is under way */

/* Who waits for early writes. */
struct early_waiter {
	struct op *op;
	uint64_t before; /* of those answered before this number */
	struct early_waiter *next;
};
/* For those of `in` that have been answered. ERR_PARKED: op is resumed when they are over; 0: there are none. */
int early_wait(struct inode *in, struct early_waiter *w);
/* The same in a thread of the caller's own, which runs no early writes. */
void early_wait_blocking(struct inode *in);
/* For all of the filesystem; likewise. */
void early_sync(struct fs *fs);

struct early_stats { uint64_t writes, waits, errors, bytes; };
void early_get_stats(struct fs *fs, struct early_stats *st);
/* Memory that is kept for the next ones goes; returns how many bytes. */
uint64_t early_drop_kept(struct fs *fs);
/* How many early writes of this file have failed since it came to memory. */
static inline uint32_t early_errors(const struct inode *in)
{
	return atomic_load_explicit(&((struct inode *)in)->early_errors, memory_order_acquire);
}

/* ---- for the data path ---- */

/* A write of [off, end) holds its segment and has its blocks; grows: the file, by fs->lock exclusive soon. true: its caller has
 * the answer, the operation is on its own, and *buf is the copy: of whole blocks from that of off on. No lock is held. */
bool early_answer(struct file_run *r, uint64_t off, uint64_t end, bool grows, const void **buf);
/* A write that makes the file grow converts, whether it was answered early or not, after all that came before it have done so:
 * nothing may be written behind the size on disk, or a crash would leave it to whoever moves EOF over it. ERR_PARKED: for them. */
int early_turn(struct file_run *r, struct inode *in);
/* In the transaction that converts it up to that byte, from which the size on disk may be; UINT64_MAX: all of it. Returns what it
 * was, for when the transaction is cancelled. */
uint64_t early_settle(struct file_run *r, uint64_t from);
/* In a transaction: a write that was not answered early has made the file grow. */
void early_grown(struct inode *in);
/* The size that a read of [off, end) goes by, which may have got its segment before a write there was answered early.
 * fs->lock shared. */
uint64_t early_visible_size(struct inode *in, uint64_t off, uint64_t end);
/* An operation parked behind somebody: perhaps an early write. */
void early_note_wait(struct inode *in);

#endif
