/* SPDX-License-Identifier: MIT
 *
 * journal_checkpoint.c - writing logged blocks home and moving the tail. Runs in the journal
 * thread, so no group is in flight: every LOGGED buf's image is durable in the log. The invariants
 * are in journal.c.
 */
#include <string.h>

#include "journal_impl.h"

struct home {
	struct buf *buf; /* pinned */
	lsn_t lsn;       /* of the image that is written */
	const struct buf_type *type;
};

static int by_block(const void *a, const void *b)
{
	const struct home *x = a, *y = b;

	return x->buf->block < y->buf->block ? -1 : x->buf->block > y->buf->block;
}

/* Oldest obligations first; copies in block order, so that neighbours can be written together. */
static unsigned collect(struct journal *j, lsn_t target, struct home *homes, fsblock_t *blocks)
{
	struct fs *fs = j->fs;
	unsigned n = 0;

	fs_rdlock(fs);
	for (struct buf *b = j->logged.first; b && n < CHECKPOINT_BATCH; b = b->list_next) {
		if (b->log_lsn >= target)
			break;
		xassert(b->state == BUF_LOGGED && b->log_lsn >= j->tail);
		buf_pin(b);
		homes[n++] = (struct home){b, b->log_lsn, b->type};
	}
	qsort(homes, n, sizeof(*homes), by_block);
	for (unsigned i = 0; i < n; i++) {
		blocks[i] = homes[i].buf->block;
		memcpy(j->home_images + (size_t)i * BLOCK_SIZE, homes[i].buf->data, BLOCK_SIZE);
	}
	fs_unlock(fs);
	return n;
}

struct run_io {
	struct dev_io io;
	struct write_batch *batch;
};

struct write_batch {
	unsigned pending;
	int err;
};

static void run_done(struct dev_io *io)
{
	struct run_io *run = container_of(io, struct run_io, io);

	if (io->res < 0 && !run->batch->err)
		run->batch->err = io->res;
	run->batch->pending--;
}

/* Write n images, which lie in a row and by rising block number, to their places. ctx: the caller's
 * own. */
int write_home(struct device *dev, struct ioctx *ctx, const fsblock_t *blocks, char *images,
	       unsigned n)
{
	struct write_batch batch = {0};
	struct run_io *runs = calloc(n ? n : 1, sizeof(*runs));
	unsigned used = 0;

	if (!runs)
		return -ENOMEM;
	for (unsigned i = 0; i < n;) {
		struct run_io *run = &runs[used++];
		unsigned end = i + 1;

		while (end < n && blocks[end] == blocks[end - 1] + 1)
			end++;
		run->batch = &batch;
		run->io = (struct dev_io){.kind = IO_WRITE, .offset = blocks[i] << BLOCK_SHIFT,
					  .buf = images + (size_t)i * BLOCK_SIZE,
					  .len = (size_t)(end - i) * BLOCK_SIZE, .done = run_done};
		batch.pending++;
		dev_submit(dev, ctx, &run->io);
		i = end;
	}
	while (batch.pending) {
		int r = ioctx_run(ctx, true);
		/* I/O in flight uses our memory: no way out but its end. */
		xassert(r >= 0 || r == -EINTR);
	}
	free(runs);
	return batch.err;
}

/* The images end their obligations: blocks not changed since are CLEAN. Returns the tail that is
 * possible now. fs->lock held exclusively. */
static lsn_t settle(struct journal *j, const struct home *homes, unsigned n)
{
	lsn_t tail = j->head;

	for (unsigned i = 0; i < n; i++) {
		struct buf *b = homes[i].buf;

		/* Logged again, or freed, meanwhile: another obligation, or none. */
		if (b->log_lsn != homes[i].lsn)
			continue;
		b->log_lsn = 0;
		if (b->state == BUF_LOGGED) {
			buf_list_del(&j->logged, b);
			buf_set_state(b, BUF_CLEAN);
		}
	}
	if (j->logged.first)
		tail = MIN(tail, j->logged.first->log_lsn);
	for (struct buf *b = j->dirty.first; b; b = b->list_next)
		if (b->log_lsn)
			tail = MIN(tail, b->log_lsn);
	if (j->forgot_lsn)
		tail = MIN(tail, j->forgot_lsn);
	xassert(tail >= j->tail);
	return tail;
}

/* Move the tail, durably; only then is the log before it free. head: of the moment when the tail
 * was found. */
static int move_tail(struct journal *j, lsn_t tail, xid_t running)
{
	struct fs *fs = j->fs;
	xid_t xid = j->tail_xid;
	int err;

	while (xid < running && j->record_lsn[xid & j->record_mask] < tail)
		xid++;
	err = jrn_write_header(fs->dev, fs->super.uuid, j->start, j->log_blocks, j->head_seq + 1,
			       tail, xid);
	if (err)
		return err;
	pthread_mutex_lock(&j->mutex);
	j->head_seq++;
	j->tail = tail;
	j->tail_xid = xid;
	atomic_store(&j->checkpointed, xid - 1);
	j->stats.checkpoints++;
	pthread_mutex_unlock(&j->mutex);
	return 0;
}

static int write_batch_home(struct journal *j, const struct home *homes, const fsblock_t *blocks,
			    unsigned n)
{
	struct fs *fs = j->fs;
	int err;

	for (unsigned i = 0; i < n; i++) {
		char *image = j->home_images + (size_t)i * BLOCK_SIZE;

		if (homes[i].type->verify) {
			err = homes[i].type->verify(fs, image);
			if (err)
				return err;
		}
		meta_seal(image, homes[i].lsn);
	}
	err = write_home(fs->dev, j->ioctx, blocks, j->home_images, n);
	if (err)
		return err;
	pthread_mutex_lock(&j->mutex);
	j->stats.home_writes += n;
	pthread_mutex_unlock(&j->mutex);
	if (!n || fs->opt.mutant == MUTANT_CHECKPOINT_NO_FLUSH)
		return 0;
	return dev_flush(fs->dev);
}

/* One step towards j->target: 0 when the tail moved, or when a commit was ordered that lets it
 * move. */
int checkpoint_batch(struct journal *j)
{
	struct home homes[CHECKPOINT_BATCH];
	fsblock_t blocks[CHECKPOINT_BATCH] = {0};
	struct fs *fs = j->fs;
	lsn_t tail, target;
	xid_t running;
	unsigned n;
	int err;

	pthread_mutex_lock(&j->mutex);
	target = j->target;
	pthread_mutex_unlock(&j->mutex);
	n = collect(j, target, homes, blocks);
	err = write_batch_home(j, homes, blocks, n);
	fs_wrlock(fs);
	tail = err ? j->tail : settle(j, homes, n);
	running = j->running;
	fs_unlock(fs);
	for (unsigned i = 0; i < n; i++)
		buf_put(homes[i].buf);
	if (!err && tail > j->tail)
		err = move_tail(j, tail, running);
	if (err) {
		jrn_fail(j, err, "a checkpoint failed");
		return err;
	}
	pthread_mutex_lock(&j->mutex);
	/* Nothing left to write home, yet short of the target: the running group holds the tail. */
	if (!n && j->tail < target)
		j->force_xid = j->running;
	pthread_mutex_unlock(&j->mutex);
	return 0;
}
