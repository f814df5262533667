/* SPDX-License-Identifier: MIT
 *
 * bare_fs.h - the lowest layers of a filesystem on a simulated device, without allocator, inodes
 * and threads other than the journal's: what tests of buffers, transactions and the journal stand
 * on.
 */
#ifndef EXTFS_BARE_FS_H
#define EXTFS_BARE_FS_H

#include "device_sim.h"
#include "fs.h"
#include "journal.h"
#include "trans.h"

/* Blocks that tests use as they like: behind the journal of mkfs's smallest size. */
#define BARE_FIRST 5200u
#define BARE_OWNER 77u

extern const struct buf_type bare_type;

/* Formatted and settled; journal of 1024 blocks. */
struct sim *bare_sim(uint64_t seed);
/* Have the first record begin at this log position (1..1021), to meet the wrap early. */
void bare_set_log_position(struct sim *sim, lsn_t lsn);

/* Replay and start; a negative code leaves nothing open. commit_ms 0: only when forced. */
int bare_open(struct sim *sim, unsigned commit_ms, unsigned mutant, struct fs **out);
int bare_close(struct fs *fs);
void bare_abandon(struct fs *fs);

/* The value of a block is repeated in all its words behind the header. */
void bare_set(struct buf *b, uint64_t value);
/* True and *value when the words agree. */
bool bare_value(const void *block, uint64_t *value);
/* One transaction that sets blocks [BARE_FIRST + first, ... + n) to value; made anew when
 * create. */
int bare_write(struct fs *fs, unsigned first, unsigned n, uint64_t value, bool create, xid_t *xid);
uint64_t bare_read(struct fs *fs, unsigned index);

#endif
