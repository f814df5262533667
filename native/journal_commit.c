/* SPDX-License-Identifier: MIT
 *
 * journal_commit.c - closing the running group and writing its record. Runs where the
 * turn is. The invariants are in journal.c.
 */
#include <string.h>
#include <time.h>

#include "journal_impl.h"

/* A closed group on its way to the log: copies, so that transactions go on meanwhile. */
struct closed_group {
	xid_t xid;
	lsn_t lsn;
	unsigned images, ndesc;
	char *record;                 /* descriptors, then images; group_max of them at most */
	const struct buf_type **types; /* of the images */
};

int commit_create(struct journal *j)
{
	struct closed_group *g = calloc(1, sizeof(*g));

	j->closed = g;
	if (!g)
		return -ENOMEM;
	g->record = io_alloc(jrn_record_blocks(j->group_max) << BLOCK_SHIFT);
	g->types = calloc(j->group_max, sizeof(g->types[0]));
	return g->record && g->types ? 0 : -ENOMEM;
}

void commit_destroy(struct journal *j)
{
	if (!j->closed)
		return;
	io_free(j->closed->record);
	free(j->closed->types);
	free(j->closed);
	j->closed = NULL;
}

static char *image_of(const struct closed_group *g, unsigned i)
{
	return g->record + ((size_t)(g->ndesc + i) << BLOCK_SHIFT);
}

/* fs->lock held exclusively. From here on the next group is running. */
static void close_group(struct journal *j, struct closed_group *g)
{
	struct buf *b;
	unsigned i = 0;

	pthread_mutex_lock(&j->mutex);
	assert_journal_state(j);
	pthread_mutex_unlock(&j->mutex);
	g->images = j->dirty.count;
	g->ndesc = jrn_descriptors(g->images);
	g->lsn = j->head;
	g->xid = j->running;
	while ((b = j->dirty.first)) {
		struct meta_hdr *h = b->data;

		/* In the buf too: the home write must be the very image of the log. */
		h->lsn = put64(g->lsn);
		memcpy(image_of(g, i), b->data, BLOCK_SIZE);
		g->types[i++] = b->type;
		buf_list_del(&j->dirty, b);
		buf_list_add(&j->logged, b);
		b->log_lsn = g->lsn;
		buf_set_state(b, BUF_LOGGED);
	}
	j->record_lsn[g->xid & j->record_mask] = g->lsn;
	pthread_mutex_lock(&j->mutex);
	j->head += g->ndesc + g->images;
	j->running++;
	j->in_flight = true;
	j->close_early = false;
	j->forgot_lsn = 0;
	atomic_store_explicit(&j->ndirty, 0, memory_order_relaxed);
	assert_journal_state(j);
	pthread_mutex_unlock(&j->mutex);
}

static uint64_t log_offset(const struct journal *j, lsn_t lsn)
{
	return jrn_log_offset(j->start, j->log_blocks, lsn);
}

/* Checksums and descriptors. A block that its verifier refuses is not logged: -ERR_*. */
static int seal_record(struct journal *j, struct closed_group *g)
{
	const struct fs *fs = j->fs;
	uint64_t now = (uint64_t)time(NULL);

	memset(g->record, 0, (size_t)g->ndesc << BLOCK_SHIFT);
	for (unsigned i = 0; i < g->images; i++) {
		struct jdesc_disk *d = (void *)(g->record + (size_t)(i / JDESC_TAGS) * BLOCK_SIZE);
		struct jtag_disk *tag = &d->tags[i % JDESC_TAGS];
		struct meta_hdr *h = (void *)image_of(g, i);

		if (g->types[i]->verify) {
			int err = g->types[i]->verify(fs, h);
			if (err)
				return err;
		}
		meta_seal(h, g->lsn);
		tag->block = h->block;
		tag->crc = h->crc;
	}
	for (unsigned i = 0; i < g->ndesc; i++) {
		struct jdesc_disk *d = (void *)(g->record + (size_t)i * BLOCK_SIZE);

		d->hdr.magic = put32(MAGIC_JDESC);
		d->hdr.block = put64(log_offset(j, g->lsn + i) >> BLOCK_SHIFT);
		memcpy(d->hdr.uuid, fs->super.uuid, FORMAT_UUID_LEN);
		d->xid = put64(g->xid);
		d->index = put32(i);
		d->ndesc = put32(g->ndesc);
		d->nimages = put32(g->images);
		d->sec = put64(now);
		d->tail_lsn = put64(j->tail);
		meta_seal(d, g->lsn);
	}
	return 0;
}

/* A piece of the record on its way. */
struct piece {
	struct dev_io io;
	bool done;
};

static void piece_done(struct dev_io *io)
{
	container_of(io, struct piece, io)->done = true;
}

/* A leader is a thread with little else to do: it looks for a while before it sleeps. */
static int await_piece(struct journal *j, struct ioctx *ctx, struct piece *p)
{
	uint64_t until = j->turn == TURN_LEADER ? jrn_now_ns() + LEAD_SPIN_NS : 0;

	while (!p->done) {
		int r = ioctx_run(ctx, !until || jrn_now_ns() >= until);
		/* I/O in flight uses our memory: no way out but its end. */
		xassert(r >= 0 || r == -EINTR);
	}
	return p->io.res;
}

/* Through a ring, not by a blocking write: that would be flushed twice where the device has no FUA. */
static int write_piece(struct journal *j, lsn_t lsn, char *from, nblocks_t blocks)
{
	struct device *dev = j->fs->dev;
	struct ioctx *ctx = ioctx_of_thread();
	struct piece p = {.io = {.kind = IO_WRITE, .flags = IO_FUA, .offset = log_offset(j, lsn), .buf = from,
				 .len = blocks << BLOCK_SHIFT, .done = piece_done}};

	if (!ctx)
		return dev_write(dev, p.io.offset, from, p.io.len, IO_FUA);
	dev_submit(dev, ctx, &p.io);
	return await_piece(j, ctx, &p);
}

/* Durable when this returns 0; in two pieces where the log wraps. */
static int write_record(struct journal *j, struct closed_group *g)
{
	nblocks_t total = g->ndesc + g->images;
	nblocks_t first = MIN(total, j->log_blocks - g->lsn % j->log_blocks);
	int err = write_piece(j, g->lsn, g->record, first);

	if (!err && first < total)
		err = write_piece(j, g->lsn + first, g->record + (first << BLOCK_SHIFT), total - first);
	return err;
}

/* Flush waiters that were there before the flush began come along. */
static int flush_before_record(struct journal *j)
{
	struct jrn_waiter *mine;
	int err;

	pthread_mutex_lock(&j->mutex);
	mine = j->flush_waiters;
	j->flush_waiters = NULL;
	pthread_mutex_unlock(&j->mutex);
	err = jrn_flush_device(j);
	jrn_wake(j, &mine, UINT64_MAX, err);
	return err;
}

static int flush_step(struct journal *j)
{
	int err = flush_before_record(j);

	if (err)
		jrn_fail(j, err, "the flush before a commit record failed");
	return err;
}

static int record_step(struct journal *j, struct closed_group *g)
{
	if (write_record(j, g) == 0)
		return 0;
	jrn_fail(j, -ERR_JOURNAL_WRITE, "a commit record could not be written");
	return -ERR_JOURNAL_WRITE;
}

/* Invariant 5: data first, then the record that names it. */
static int make_durable(struct journal *j, struct closed_group *g)
{
	int err = seal_record(j, g);

	if (err) {
		jrn_fail(j, err, "a changed block does not verify and is not logged");
		return err;
	}
	if (j->fs->opt.mutant == MUTANT_COMMIT_BEFORE_FLUSH) {
		err = record_step(j, g);
		return err ? err : flush_step(j);
	}
	err = flush_step(j);
	return err ? err : record_step(j, g);
}

int commit_group(struct journal *j)
{
	struct closed_group *g = j->closed;
	struct fs *fs = j->fs;
	int err;

	for (;;) {
		fs_wrlock(fs);
		if (j->dirty.count || jrn_free(j))
			break;
		/* A forced empty group: the one record without a reservation. */
		fs_unlock(fs);
		pthread_mutex_lock(&j->mutex);
		j->target = j->head;
		pthread_mutex_unlock(&j->mutex);
		err = checkpoint_batch(j);
		if (err)
			return err;
	}
	close_group(j, g);
	fs_unlock(fs);

	err = make_durable(j, g);
	if (err)
		return err; /* the waiters are told by the thread's next turn */
	pthread_mutex_lock(&j->mutex);
	j->in_flight = false;
	atomic_store(&j->durable, g->xid);
	j->stats.commits++;
	j->stats.images += g->images;
	pthread_mutex_unlock(&j->mutex);
	jrn_wake(j, &j->waiters, g->xid, 0);
	return 0;
}
