/* SPDX-License-Identifier: MIT
 *
 * file_read.c - reading: straight from the device into the caller's memory where alignment allows,
 * else through a bounce buffer; zeros for everything that was never written.
 *
 * The READ_IO segment keeps the map and the blocks from changing hands between the lookup and the
 * last completion.
 */
#include "file_run.h"

#include <string.h>

static enum step read_fail(struct file_run *r, int rc)
{
	run_mem_put(r->rd.bounce, r->rd.bounce_len);
	r->rd.bounce = NULL;
	r->nparts = 0;
	r->err = rc;
	r->step = r->rd.then;
	return STEP_NEXT;
}

static enum step read_end(struct file_run *r)
{
	struct read_body *b = &r->rd;

	if (unlikely(r->io_err))
		return read_fail(r, r->io_err);
	if (b->bounce) {
		memcpy(b->buf, (uint8_t *)b->bounce + (b->off & BLOCK_MASK), b->got);
		run_mem_put(b->bounce, b->bounce_len);
		b->bounce = NULL;
	} else if (b->pad) {
		/* Transfers are whole sectors: what lies past EOF was never this file's. */
		memset(b->buf + b->got, 0, b->pad);
	}
	r->step = b->then;
	return STEP_NEXT;
}

/* List the transfers for bytes [pos, end) into mem; fs->lock shared. pos and end are multiples of
 * the device's alignment. */
static int read_gather(struct file_run *r, uint64_t pos, uint64_t end, uint8_t *mem)
{
	struct inode *in = r->rd.in;
	struct extent ext;
	int rc;

	while (pos < end) {
		fileblk_t at = block_floor(pos);
		uint64_t stop;

		rc = extmap_lookup(in, FORK_DATA, at, block_ceil(end) - at, &ext);
		if (unlikely(rc < 0))
			return rc;
		stop = MIN(end, (at + ext.len) << BLOCK_SHIFT);
		if (ext.state == EXT_WRITTEN)
			rc = run_part(r, IO_READ, (ext.block << BLOCK_SHIFT) + (pos & BLOCK_MASK),
				      mem,
				      stop - pos);
		else
			rc = run_part_zero(r, mem, stop - pos);
		if (unlikely(rc))
			return rc;
		mem += stop - pos;
		pos = stop;
	}
	return 0;
}

void read_setup(struct file_run *r, struct inode *in, uint64_t off, uint64_t len, void *buf,
		size_t cap,
		step_fn then)
{
	r->rd = (struct read_body){ .in = in, .off = off, .len = len, .buf = buf, .cap = cap,
				    .then = then };
	r->step = read_begin;
}

/* Where the transfers begin and end, and into which memory. */
static int read_place(struct file_run *r, uint64_t *pos, uint64_t *end, uint8_t **mem)
{
	struct read_body *b = &r->rd;
	uint64_t mask = r->fs->dev->align - 1;
	uint64_t whole = (b->got + mask) & ~mask;

	if (likely((((uintptr_t)b->buf | b->off) & mask) == 0 && whole <= b->cap)) {
		b->pad = whole - b->got;
		*pos = b->off;
		*end = b->off + whole;
		*mem = b->buf;
		return 0;
	}
	*pos = block_floor(b->off) << BLOCK_SHIFT;
	*end = block_ceil(b->off + b->got) << BLOCK_SHIFT;
	b->bounce_len = *end - *pos;
	b->bounce = run_mem_get(b->bounce_len);
	*mem = b->bounce;
	return b->bounce ? 0 : -ENOMEM;
}

enum step read_begin(struct file_run *r)
{
	struct read_body *b = &r->rd;
	struct inode *in = b->in;
	uint64_t pos, end, size;
	uint8_t *mem;
	int rc;

	fs_rdlock(r->fs);
	size = early_visible_size(in, b->off, b->off + b->len);
	if (b->off >= size || b->len == 0) {
		fs_unlock(r->fs);
		r->step = b->then;
		return STEP_NEXT;
	}
	b->got = MIN(b->len, size - b->off);
	rc = read_place(r, &pos, &end, &mem);
	if (!rc)
		rc = read_gather(r, pos, end, mem);
	if (!rc && b->atime && inode_wants_atime(in))
		inode_touch_lazy(in, TOUCH_ATIME);
	fs_unlock(r->fs);
	if (unlikely(rc))
		return read_fail(r, rc);
	return run_submit(r, read_end);
}

static enum step file_read_end(struct file_run *r)
{
	return run_end(r, r->err ? r->err : (int64_t)r->rd.got);
}

enum step file_read_start(struct file_run *r)
{
	struct file_op *fop = r->fop;
	uint64_t end;
	enum step s;

	if (fop->len > FILE_IO_MAX)
		return run_end(r, -EINVAL);
	if (fop->len == 0 || fop->offset >= FILE_MAX_BYTES)
		return run_end(r, 0);
	fop->len = MIN(fop->len, FILE_MAX_BYTES - fop->offset);
	end = block_ceil(fop->offset + fop->len) << BLOCK_SHIFT;
	read_setup(r, fop->in, fop->offset, fop->len, fop->buf, fop->len, file_read_end);
	r->rd.atime = !(fop->flags & FILE_F_NOATIME) && !r->fs->read_only && !fs_is_shutdown(r->fs);
	if (unlikely(r->fs->opt.mutant == MUTANT_READ_UNHELD))
		return STEP_NEXT;
	s = run_acquire(r, 0, SEG_READ_IO, block_floor(fop->offset) << BLOCK_SHIFT, end);
	return s;
}
