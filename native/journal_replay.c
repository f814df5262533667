/* SPDX-License-Identifier: MIT
 *
 * journal_replay.c - the journal on disk: its header, and reading the log at mount.
 *
 * Replay begins at the tail of the newest valid header and takes records while they verify whole:
 * descriptors, images, their checksums, and the log position in each block. Every position (lsn) is
 * used once in the life of a filesystem, because an opened journal goes on one whole turn of the
 * log further: so nothing older, nor the remains of a torn record, ever verifies at a later
 * record's place.
 *
 * The first record that does not verify is the end. One record is in flight at a time, and the next
 * is written only after it is durable; so a valid record behind the end says that the end is
 * damage, not a crash.
 *
 * Until the new header is durable nothing that replay read has changed: losing power meanwhile only
 * means to replay again.
 */
#include <string.h>

#include "journal_impl.h"
#include "log.h"

#define READ_BLOCKS 256u
/* Log positions and group numbers that a header may name: they rise by one a block and a group, so
 * none comes near, and sums do not overflow. */
#define POSITION_MAX ((uint64_t)1 << 62)

int jrn_write_header(struct device *dev, const uint8_t *uuid, fsblock_t start, nblocks_t log_blocks,
		     uint64_t seq, lsn_t tail, xid_t tail_xid)
{
	char *block = io_alloc(BLOCK_SIZE);
	struct jhead_disk *h = (void *)block;
	fsblock_t place = start + (seq & 1);
	int err;

	if (!block)
		return -ENOMEM;
	memset(block, 0, BLOCK_SIZE);
	h->hdr.magic = put32(MAGIC_JHEAD);
	h->hdr.block = put64(place);
	memcpy(h->hdr.uuid, uuid, FORMAT_UUID_LEN);
	h->seq = put64(seq);
	h->tail_lsn = put64(tail);
	h->tail_xid = put64(tail_xid);
	h->log_blocks = put64(log_blocks);
	meta_seal(block, 0);
	err = dev_write(dev, place << BLOCK_SHIFT, block, BLOCK_SIZE, IO_FUA);
	io_free(block);
	return err;
}

int jrn_format(struct device *dev, const uint8_t *uuid, fsblock_t start, nblocks_t blocks)
{
	int err;

	xassert(blocks >= JOURNAL_MIN_BLOCKS && blocks <= JOURNAL_MAX_BLOCKS);
	/* Position 0 is none, so the first record is at 1. */
	err = jrn_write_header(dev, uuid, start, blocks - 2, 0, 1, 1);
	if (!err)
		err = jrn_write_header(dev, uuid, start, blocks - 2, 1, 1, 1);
	return err;
}

struct image_at {
	fsblock_t home;
	lsn_t at; /* log position of the image itself */
};

struct replay {
	struct journal *j;
	char *blocks;      /* READ_BLOCKS */
	char *descriptors; /* of the record being read */
	lsn_t begin, end;  /* records found; end: behind the last */
	xid_t xid;         /* of the next record */
	uint64_t seq;
	bool header_lost;  /* one header copy does not verify */
	lsn_t tail_seen;   /* newest tail that a record tells */
	uint64_t records;
	struct image_at *images;
	size_t nimages, cap;
};

static int read_log(struct replay *r, lsn_t lsn, unsigned n, char *buf)
{
	const struct journal *j = r->j;
	unsigned first = (unsigned)MIN(n, j->log_blocks - lsn % j->log_blocks);
	struct device *dev = j->fs->dev;
	int err;

	err = dev_read(dev, jrn_log_offset(j->start, j->log_blocks, lsn), buf,
		       (size_t)first << BLOCK_SHIFT);
	if (!err && first < n)
		err = dev_read(dev, jrn_log_offset(j->start, j->log_blocks, lsn + first),
			       buf + ((size_t)first << BLOCK_SHIFT),
			       (size_t)(n - first) << BLOCK_SHIFT);
	return err;
}

static int read_headers(struct replay *r)
{
	struct journal *j = r->j;
	struct jhead_disk *h = (void *)r->blocks;
	bool found = false;

	for (unsigned i = 0; i < 2; i++) {
		fsblock_t place = j->start + i;
		int err = dev_read(j->fs->dev, place << BLOCK_SHIFT, r->blocks, BLOCK_SIZE);

		if (err)
			return err;
		err = meta_verify(r->blocks, MAGIC_JHEAD, place, j->fs->super.uuid, OWNER_ANY);
		if (!err && (get64(h->log_blocks) != j->log_blocks || (get64(h->seq) & 1) != i ||
			     !get64(h->tail_lsn) || get64(h->tail_lsn) > POSITION_MAX ||
			     !get64(h->tail_xid) || get64(h->tail_xid) > POSITION_MAX))
			err = -ERR_RECORD_SHAPE;
		if (err) {
			log_msg(LOG_NOTE, "journal header copy %u: %s", i, err_text(err));
			r->header_lost = true;
			continue;
		}
		if (found && get64(h->seq) < r->seq)
			continue;
		found = true;
		r->seq = get64(h->seq);
		r->begin = get64(h->tail_lsn);
		r->xid = get64(h->tail_xid);
	}
	if (!found) {
		log_msg(LOG_ERROR, "both copies of the journal header are damaged");
		return -ERR_JOURNAL_CORRUPT;
	}
	return 0;
}

/* Is this the descriptor with this index of the record at lsn? Only what its own block can tell. */
static bool descriptor_valid(const struct replay *r, const void *block, lsn_t lsn, unsigned index)
{
	const struct journal *j = r->j;
	const struct jdesc_disk *d = block;
	fsblock_t place = jrn_log_offset(j->start, j->log_blocks, lsn + index) >> BLOCK_SHIFT;

	return !meta_verify(block, MAGIC_JDESC, place, j->fs->super.uuid, OWNER_ANY) &&
	       get64(d->hdr.lsn) == lsn && get32(d->index) == index &&
	       get32(d->nimages) <= JOURNAL_GROUP_MAX &&
	       get32(d->ndesc) == jrn_descriptors(get32(d->nimages)) &&
	       get32(d->ndesc) + get32(d->nimages) <= j->log_blocks;
}

static bool image_valid(const struct replay *r, const void *block, lsn_t lsn,
			const struct jtag_disk *tag)
{
	const struct meta_hdr *h = block;
	uint32_t magic = get32(h->magic);

	if (magic != MAGIC_ROOT && magic != MAGIC_AG && magic != MAGIC_NODE)
		return false;
	return get32(tag->crc) == get32(h->crc) && get64(h->lsn) == lsn &&
	       !meta_verify(block, magic, get64(tag->block), r->j->fs->super.uuid, OWNER_ANY);
}

/* May metadata live there? */
static bool home_plausible(const struct journal *j, fsblock_t home)
{
	const struct super *sb = &j->fs->super;

	return home >= ROOT_BLOCK && home < sb->total_blocks && home != SUPER_COPY_BLOCK &&
	       (home < sb->journal_start || home >= sb->journal_start + sb->journal_blocks);
}

static int remember(struct replay *r, fsblock_t home, lsn_t at)
{
	if (r->nimages == r->cap) {
		size_t cap = r->cap ? r->cap * 2 : 1024;
		struct image_at *p = realloc(r->images, cap * sizeof(*p));

		if (!p)
			return -ENOMEM;
		r->images = p;
		r->cap = cap;
	}
	r->images[r->nimages++] = (struct image_at){home, at};
	return 0;
}

/* Verify images [0, n) of the record at lsn, whose descriptors are read. 1: all; 0: not. */
static int read_images(struct replay *r, lsn_t lsn, unsigned ndesc, unsigned n)
{
	const struct jdesc_disk *desc = (const void *)r->descriptors;

	for (unsigned i = 0; i < n; i += READ_BLOCKS) {
		unsigned count = MIN(READ_BLOCKS, n - i);
		int err = read_log(r, lsn + ndesc + i, count, r->blocks);

		if (err)
			return err;
		for (unsigned k = i; k < i + count; k++) {
			const struct jtag_disk *tag = &desc[k / JDESC_TAGS].tags[k % JDESC_TAGS];

			if (!image_valid(r, r->blocks + (size_t)(k - i) * BLOCK_SIZE, lsn, tag))
				return 0;
			if (!home_plausible(r->j, get64(tag->block))) {
				log_msg(LOG_ERROR,
					"journal position %llu: a record names block %llu, where no "
					"metadata can be", (unsigned long long)lsn,
					(unsigned long long)get64(tag->block));
				return -ERR_JOURNAL_CORRUPT;
			}
			err = remember(r, get64(tag->block), lsn + ndesc + k);
			if (err)
				return err;
		}
	}
	return 1;
}

/* 1: a whole record lies at lsn, its images are remembered, *xid and *blocks are set. 0: none. */
static int read_record(struct replay *r, lsn_t lsn, xid_t *xid, nblocks_t *blocks)
{
	const struct jdesc_disk *d = (const void *)r->descriptors;
	size_t nimages = r->nimages;
	unsigned ndesc, n;
	int err;

	err = read_log(r, lsn, 1, r->descriptors);
	if (err)
		return err;
	if (!descriptor_valid(r, d, lsn, 0))
		return 0;
	ndesc = get32(d->ndesc);
	n = get32(d->nimages);
	if (ndesc > 1) {
		err = read_log(r, lsn + 1, ndesc - 1, r->descriptors + BLOCK_SIZE);
		if (err)
			return err;
	}
	for (unsigned i = 1; i < ndesc; i++) {
		if (!descriptor_valid(r, &d[i], lsn, i) || get64(d[i].xid) != get64(d->xid) ||
		    get32(d[i].nimages) != n)
			return 0;
	}
	err = read_images(r, lsn, ndesc, n);
	if (err != 1) {
		r->nimages = nimages;
		return err;
	}
	*xid = get64(d->xid);
	*blocks = ndesc + n;
	return 1;
}

static int read_records(struct replay *r)
{
	const struct journal *j = r->j;
	const struct jdesc_disk *d = (const void *)r->descriptors;

	r->end = r->tail_seen = r->begin;
	for (;;) {
		nblocks_t blocks;
		xid_t xid;
		int found = read_record(r, r->end, &xid, &blocks);

		if (found <= 0)
			return found;
		if (xid != r->xid || r->end + blocks > r->begin + j->log_blocks) {
			log_msg(LOG_ERROR, "journal record %llu has number %llu, expected %llu",
				(unsigned long long)r->end, (unsigned long long)xid,
				(unsigned long long)r->xid);
			return -ERR_JOURNAL_CORRUPT;
		}
		r->tail_seen = MAX(r->tail_seen, get64(d->tail_lsn));
		r->end += blocks;
		r->xid++;
		r->records++;
	}
}

/* Nothing whole may lie behind the end. A record that does not verify has at most as many blocks as
 * a record can have, so looking that far is enough - unless a header copy is lost, and the other
 * may be older than what was overwritten. */
static int look_behind_end(struct replay *r)
{
	const struct journal *j = r->j;
	lsn_t limit = r->begin + j->log_blocks;
	size_t nimages = r->nimages;

	if (!r->header_lost)
		limit = MIN(limit, r->end + jrn_record_blocks(JOURNAL_GROUP_MAX) + 1);
	for (lsn_t at = r->end + 1; at < limit; at += READ_BLOCKS) {
		unsigned n = (unsigned)MIN(READ_BLOCKS, limit - at);
		lsn_t suspects[READ_BLOCKS];
		unsigned nsuspects = 0;
		int err = read_log(r, at, n, r->blocks);

		if (err)
			return err;
		for (unsigned i = 0; i < n; i++) {
			const struct jdesc_disk *d = (void *)(r->blocks + (size_t)i * BLOCK_SIZE);

			if (get32(d->hdr.magic) == MAGIC_JDESC && get64(d->xid) > r->xid &&
			    descriptor_valid(r, d, at + i, 0))
				suspects[nsuspects++] = at + i;
		}
		for (unsigned i = 0; i < nsuspects; i++) {
			nblocks_t blocks;
			xid_t xid;

			err = read_record(r, suspects[i], &xid, &blocks);
			r->nimages = nimages;
			if (err < 0)
				return err;
			if (err == 0)
				continue;
			log_msg(LOG_ERROR,
				"journal record %llu (position %llu) is damaged: record %llu "
				"behind it is whole",
				(unsigned long long)r->xid, (unsigned long long)r->end,
				(unsigned long long)xid);
			return -ERR_JOURNAL_CORRUPT;
		}
	}
	return 0;
}

static int by_home_newest_first(const void *a, const void *b)
{
	const struct image_at *x = a, *y = b;

	if (x->home != y->home)
		return x->home < y->home ? -1 : 1;
	return x->at > y->at ? -1 : x->at < y->at;
}

/* Leave the newest image of each block. Images before the newest tail are home already, and their
 * blocks may have become data since (they are here only when the header that we found is stale). */
static void reduce(struct replay *r)
{
	size_t kept = 0;

	if (!r->nimages)
		return;
	qsort(r->images, r->nimages, sizeof(*r->images), by_home_newest_first);
	for (size_t i = 0; i < r->nimages; i++) {
		if (r->images[i].at < r->tail_seen)
			continue;
		if (kept && r->images[kept - 1].home == r->images[i].home)
			continue;
		r->images[kept++] = r->images[i];
	}
	r->nimages = kept;
}

struct gather_io {
	struct dev_io io;
	unsigned *pending;
	int *err;
};

static void gather_done(struct dev_io *io)
{
	struct gather_io *g = container_of(io, struct gather_io, io);

	if (io->res < 0 && !*g->err)
		*g->err = io->res;
	(*g->pending)--;
}

/* Images [first, first + n) from the log into a row of blocks. */
static int gather(struct replay *r, struct ioctx *ctx, size_t first, unsigned n)
{
	const struct journal *j = r->j;
	struct gather_io reads[READ_BLOCKS];
	unsigned pending = 0;
	int err = 0;

	for (unsigned i = 0; i < n; i++) {
		reads[i] = (struct gather_io){.pending = &pending, .err = &err};
		reads[i].io = (struct dev_io){
			.kind = IO_READ,
			.offset = jrn_log_offset(j->start, j->log_blocks, r->images[first + i].at),
			.buf = r->blocks + (size_t)i * BLOCK_SIZE, .len = BLOCK_SIZE,
			.done = gather_done};
		pending++;
		dev_submit(j->fs->dev, ctx, &reads[i].io);
	}
	while (pending) {
		int n_ran = ioctx_run(ctx, true);
		xassert(n_ran >= 0 || n_ran == -EINTR);
	}
	return err;
}

static int write_images_home(struct replay *r)
{
	struct journal *j = r->j;
	fsblock_t homes[READ_BLOCKS];
	struct ioctx *ctx;
	int err = ioctx_create(CHECKPOINT_DEPTH, &ctx);

	if (err)
		return err;
	for (size_t first = 0; first < r->nimages && !err; first += READ_BLOCKS) {
		unsigned n = (unsigned)MIN(READ_BLOCKS, r->nimages - first);

		err = gather(r, ctx, first, n);
		for (unsigned i = 0; i < n && !err; i++) {
			const struct meta_hdr *h = (void *)(r->blocks + (size_t)i * BLOCK_SIZE);

			homes[i] = r->images[first + i].home;
			/* Read a second time: what is written home is what verifies now. */
			err = meta_verify(h, get32(h->magic), homes[i], j->fs->super.uuid,
					  OWNER_ANY);
		}
		if (!err)
			err = write_home(j->fs->dev, ctx, homes, r->blocks, n);
	}
	ioctx_destroy(ctx);
	return err ? err : dev_flush(j->fs->dev);
}

static int apply(struct replay *r, bool may_write)
{
	struct journal *j = r->j;
	int err = 0;

	if (!may_write) {
		j->tail = r->end;
		j->tail_xid = r->xid;
		return r->records ? -EROFS : 0;
	}
	if (r->tail_seen > r->begin)
		log_msg(LOG_WARN,
			"the newest journal header was lost; the log itself tells its tail, %llu",
			(unsigned long long)r->tail_seen);
	reduce(r);
	if (r->nimages)
		err = write_images_home(r);
	if (err)
		return err;
	/* One turn further: no position is used twice, and the place on the device is the same.
	 * In both copies: after the jump the older one would name a log that ends where this
	 * mount's records begin, and nothing would tell that they are missing. */
	j->tail = r->end + j->log_blocks;
	j->tail_xid = r->xid;
	j->head_seq = r->seq;
	for (unsigned i = 0; i < 2 && !err; i++)
		err = jrn_write_header(j->fs->dev, j->fs->super.uuid, j->start, j->log_blocks,
				       ++j->head_seq, j->tail, j->tail_xid);
	return err;
}

int replay(struct journal *j, struct jrn_replay_report *report)
{
	struct replay r = {.j = j};
	int err;

	r.blocks = io_alloc((size_t)READ_BLOCKS * BLOCK_SIZE);
	r.descriptors = io_alloc((size_t)jrn_descriptors(JOURNAL_GROUP_MAX) * BLOCK_SIZE);
	err = r.blocks && r.descriptors ? 0 : -ENOMEM;
	if (!err)
		err = read_headers(&r);
	if (!err)
		err = read_records(&r);
	if (!err)
		err = look_behind_end(&r);
	if (!err)
		err = apply(&r, !j->fs->read_only && !j->fs->dev->read_only);
	if (report)
		*report = (struct jrn_replay_report){.records = r.records, .images = r.nimages,
						     .first = r.begin, .last = r.end,
						     .clean = !r.records};
	free(r.images);
	io_free(r.blocks);
	io_free(r.descriptors);
	return err;
}
