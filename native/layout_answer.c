/* SPDX-License-Identifier: MIT
 *
 * layout_answer.c - what LAYOUT_GET tells of each block, and what has to change for it.
 *
 * What each block becomes in a RW answer:
 *   staged for this holder     READ_DATA where the file has written blocks, and INVALID
 *   hole                       allocated, exposed: INVALID
 *   unwritten                  exposed: INVALID
 *   written, shared            a staged block is allocated and exposed: READ_DATA and INVALID
 *   written                    READ_WRITE
 * With ATOMIC every block is staged. In a READ answer: READ_DATA or NONE_DATA.
 */
#include "layout_get.h"

#define LOOK_BATCH 32u

static bool slots_left(const struct walk *w, unsigned n)
{
	return w->a->cap - w->a->count >= n;
}

static void say(struct walk *w, fileblk_t file, nblocks_t len, fsblock_t block,
		enum layout_state state)
{
	struct layout_extent *last = w->a->count ? &w->a->extents[w->a->count - 1] : NULL;
	uint64_t offset = block_start(file), device = state == NONE_DATA ? 0 : block_start(block);

	if (last && !w->pair && last->state == state && last->offset + last->length == offset &&
	    (state == NONE_DATA || last->device + last->length == device)) {
		last->length += block_start(len);
		return;
	}
	w->a->extents[w->a->count++] = (struct layout_extent){
		.offset = offset, .device = device, .length = block_start(len), .state = state,
	};
	w->pair = false;
}

/* [w->at, w->at + len) is told: from the old blocks on, when there are any to be read, and the
 * new. */
static void say_new(struct walk *w, const struct extent *old, nblocks_t len, fsblock_t block)
{
	if (old->state == EXT_WRITTEN) {
		w->pair = true; /* nothing joins across the edge of a pair */
		say(w, w->at, len, old->block, READ_DATA);
		w->pair = true;
		w->cow = true;
	}
	say(w, w->at, len, block, INVALID_DATA);
	w->pair = old->state == EXT_WRITTEN;
	w->at += len;
}

/* May the transaction take one more piece that needs up to two extents of the answer? */
static bool may_change(struct walk *w)
{
	if (!w->t)
		w->map = true;
	w->stop |= !w->t || trans_room(w->t) < GET_STEP_BLOCKS;
	return !w->stop;
}

/* e is exposed to the holder from now on; *done: as much as fits. */
static int expose(struct walk *w, const struct extent *e, bool staging, nblocks_t *done)
{
	uint64_t holder = w->a->holder;
	fileblk_t at = e->file, end = e->file + e->len;

	while (at < end && (at == e->file || trans_room(w->t) >= GET_STEP_BLOCKS)) {
		struct exposure x = { .file = end };
		fsblock_t block = e->block + (at - e->file);
		fileblk_t to;
		int rc = exposure_find(w->in->fs, w->in->ino, 0, at, end, &x);

		if (rc && rc != -ENOENT)
			return rc;
		to = x.file > at ? x.file : at + x.len;
		if (x.file > at || x.holder != holder || x.block != block || x.staging != staging) {
			rc = exposure_add(w->t, w->in->ino, at, to - at, block, staging, holder);
			if (rc)
				return rc;
		}
		at = to;
	}
	*done = at - e->file;
	return 0;
}

/* A new block beside the old one, which may be anything. */
static int stage(struct walk *w, const struct extent *old)
{
	struct extent e;
	nblocks_t done;
	int rc;

	if (!may_change(w))
		return 0;
	rc = extmap_allocate(w->t, w->in, FORK_STAGING, old->file, old->len, EXT_F_LAYOUT, 1,
			     &done);
	if (!rc)
		rc = extmap_lookup(w->in, FORK_STAGING, old->file, done, &e);
	if (!rc)
		rc = expose(w, &e, true, &done);
	if (rc)
		return rc;
	if (done < e.len) /* what it was told there before does not fit the transaction */
		return -ENOSPC;
	w->in->core.flags |= INODE_F_STAGING;
	w->allocated += done;
	say_new(w, old, done, e.block);
	return 0;
}

/* Mutant STATE_BY_SIZE: what is below EOF is called written. */
static bool by_size(const struct walk *w, fileblk_t file)
{
	return w->in->fs->opt.mutant == MUTANT_STATE_BY_SIZE && file < block_ceil(w->in->core.size);
}

static int call_written(struct walk *w, const struct extent *e, nblocks_t len)
{
	nblocks_t done;
	int rc = extmap_set_state(w->t, w->in, FORK_DATA, e->file, len, EXT_WRITTEN, 8, &done);

	if (rc)
		return rc;
	say(w, w->at, done, e->block, READ_WRITE_DATA);
	w->at += done;
	return 0;
}

/* Mapped and unwritten, but not, or not all of it, exposed to this holder. */
static int expose_unwritten(struct walk *w, const struct extent *e)
{
	nblocks_t done;
	int rc;

	if (!may_change(w))
		return 0;
	if (unlikely(by_size(w, e->file)))
		return call_written(w, e, MIN(e->len, block_ceil(w->in->core.size) - e->file));
	rc = expose(w, e, false, &done);
	if (rc)
		return rc;
	say(w, w->at, done, e->block, INVALID_DATA);
	w->at += done;
	return 0;
}

static int fill(struct walk *w, const struct extent *hole)
{
	struct extent e;
	nblocks_t done;
	int rc;

	if (!may_change(w))
		return 0;
	rc = extmap_allocate(w->t, w->in, FORK_DATA, hole->file, hole->len, EXT_F_LAYOUT, 1, &done);
	if (!rc)
		rc = extmap_lookup(w->in, FORK_DATA, hole->file, done, &e);
	if (rc)
		return rc;
	w->allocated += done;
	return expose_unwritten(w, &e);
}

static int rw_unwritten(struct walk *w, const struct extent *e)
{
	int rc = exposure_covers(w->in->fs, w->in->ino, w->a->holder, e, false);

	if (rc < 0)
		return rc;
	if (!rc || unlikely(by_size(w, e->file)))
		return expose_unwritten(w, e);
	say(w, w->at, e->len, e->block, INVALID_DATA);
	w->at += e->len;
	return 0;
}

static int rw_written(struct walk *w, struct extent *e)
{
	nblocks_t run;
	bool shared;
	int rc = extmap_is_shared(w->in, e, &shared, &run);

	if (rc)
		return rc;
	e->len = MIN(e->len, run);
	if (shared)
		return stage(w, e);
	say(w, w->at, e->len, e->block, READ_WRITE_DATA);
	w->in_place = true;
	w->at += e->len;
	return 0;
}

static int rw_piece(struct walk *w, struct extent e)
{
	struct extent staged = { .len = e.len };
	int rc = 0;

	bool pairs = (w->in->core.flags & (INODE_F_STAGING | INODE_F_SHARED)) ||
		     (w->a->flags & LAYOUT_F_ATOMIC);

	if (!slots_left(w, pairs ? 2 : 1)) {
		w->stop = true;
		return 0;
	}
	if (w->in->core.flags & INODE_F_STAGING)
		rc = extmap_lookup(w->in, FORK_STAGING, e.file, e.len, &staged);
	if (rc)
		return rc;
	e.len = staged.len;
	if (staged.state != EXT_HOLE) {
		rc = exposure_covers(w->in->fs, w->in->ino, w->a->holder, &staged, true);
		if (rc > 0)
			say_new(w, &e, e.len, staged.block);
		return rc > 0 ? 0 : rc < 0 ? rc : -EBUSY;
	}
	if (w->a->flags & LAYOUT_F_ATOMIC)
		return stage(w, &e);
	if (e.state == EXT_WRITTEN)
		return rw_written(w, &e);
	return e.state == EXT_HOLE ? fill(w, &e) : rw_unwritten(w, &e);
}

/* *len falls to what is before the first block that a foreign holder writes: in place, where it
 * will become written, or beside, where it will be swapped in. */
static int before_foreign(struct walk *w, const struct extent *e, nblocks_t *len)
{
	fileblk_t at = e->file, end = e->file + e->len;

	while (at < end) {
		struct exposure x;
		int rc = exposure_find(w->in->fs, w->in->ino, 0, at, end, &x);

		if (rc)
			return rc == -ENOENT ? 0 : rc;
		if (x.holder != w->a->holder && (x.staging || e->state == EXT_UNWRITTEN)) {
			*len = x.file - e->file;
			w->conflict = w->stop = true;
			return 0;
		}
		at = x.file + x.len;
	}
	return 0;
}

static int read_piece(struct walk *w, const struct extent *e)
{
	nblocks_t len = e->len;
	int rc = 0;

	if (!slots_left(w, 1)) {
		w->stop = true;
		return 0;
	}
	if (e->state == EXT_UNWRITTEN || (w->in->core.flags & INODE_F_STAGING))
		rc = before_foreign(w, e, &len);
	if (rc || !len)
		return rc;
	say(w, w->at, len, e->block, e->state == EXT_WRITTEN ? READ_DATA : NONE_DATA);
	w->at += len;
	return 0;
}

int answer_walk(struct walk *w, fileblk_t end)
{
	struct extent batch[LOOK_BATCH];

	w->a->count = 0;
	while (w->at < end && !w->stop) {
		int n = extmap_list(w->in, FORK_DATA, w->at, end, true, batch,
				    w->t ? 1 : LOOK_BATCH);

		if (n < 0)
			return n;
		for (int i = 0; i < n; i++) {
			struct extent *e = &batch[i];

			while (e->len && !w->stop) {
				fileblk_t at = w->at;
				bool rw = w->a->iomode == IOMODE_RW;
				int rc = rw ? rw_piece(w, *e) : read_piece(w, e);

				if (rc)
					return rc;
				xassert(w->at > at || w->stop);
				e->file += w->at - at;
				e->block += w->at - at;
				e->len -= w->at - at;
			}
		}
	}
	return 0;
}
