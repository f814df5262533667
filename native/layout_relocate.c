/* SPDX-License-Identifier: MIT
 *
 * layout_relocate.c - a revoke (layout_revoke.c) goes through the file: what the holder can write
 * leaves the map, or is copied to other blocks.
 */
#include "layout_revoke.h"

#define COPY_BLOCKS 256u
/* Extents of a copy: each is promoted in the same transaction (2 steps of the map). */
#define COPY_EXTENTS 3u
#define LOOKS 256u      /* pieces looked at under one hold of fs->lock */
#define DROP_RECORDS 4u
/* One extent unmapped, its exposure cut; the inode. */
#define DROP_STEP_BLOCKS (EXTMAP_STEP_BLOCKS + 2 * TRANS_TREE_OP + 2 * TRANS_ALLOC_OP)

enum piece_kind { PIECE_SKIP, PIECE_DROP, PIECE_COPY };
struct piece {
	enum piece_kind kind;
	fileblk_t end;
	bool staging;     /* DROP: of the staging fork */
	bool unmap;       /* DROP: blocks, too; else only the exposure goes */
	fsblock_t block;  /* COPY: from here */
};

/* ---- look
 * ------------------------------------------------------------------------------------- */

/* What is written at `at`: to be copied, unless it is nobody's to write. fs->lock held. */
static int written_piece(struct revoke *rv, const struct extent *ext, bool exposed, struct piece *p)
{
	struct inode *in = rv->fop.in;
	struct extent staged;
	bool shared = false;
	nblocks_t run;
	int rc;

	rc = extmap_lookup(in, FORK_STAGING, ext->file, ext->len, &staged);
	if (rc < 0)
		return rc;
	p->end = ext->file + staged.len;
	p->kind = exposed ? PIECE_DROP : PIECE_SKIP;
	if (staged.state != EXT_HOLE)
		return 0;
	rc = 0;
	run = staged.len;
	if (in->core.flags & INODE_F_SHARED)
		rc = extmap_is_shared(in, ext, &shared, &run);
	if (rc < 0)
		return rc;
	p->end = ext->file + MIN(run, staged.len);
	if (!shared) {
		p->kind = PIECE_COPY;
		p->block = ext->block;
		p->end = MIN(p->end, ext->file + COPY_BLOCKS);
	}
	return 0;
}

/* What lies at `at`, and how far that is so. fs->lock held. */
static int piece_at(struct revoke *rv, fileblk_t at, fileblk_t stop, struct piece *p)
{
	struct inode *in = rv->fop.in;
	struct exposure e;
	struct extent ext;
	bool exposed;
	int rc;

	*p = (struct piece){ .kind = PIECE_SKIP };
	rc = exposure_find(rv->ls->fs, in->ino, rv->holder, at, stop, &e);
	if (rc == -ENOENT)
		e = (struct exposure){ .file = stop };
	else if (rc)
		return rc;
	exposed = e.file == at && e.len;
	rc = extmap_lookup(in, FORK_DATA, at, (exposed ? at + e.len : e.file) - at, &ext);
	if (rc < 0)
		return rc;
	p->end = at + ext.len;
	if (exposed && e.staging) {
		p->kind = PIECE_DROP;
		p->staging = p->unmap = true;
	} else if (ext.state == EXT_WRITTEN) {
		return written_piece(rv, &ext, exposed, p);
	} else if (exposed) {
		p->kind = PIECE_DROP;
		p->unmap = ext.state == EXT_UNWRITTEN && ext.block == e.block;
	}
	return 0;
}

/* ---- drop: unwritten and staged blocks leave the map
 * -------------------------------------------- */

/* From the end; *at is where to go on: behind the piece, or still at it when its beginning is
 * left. */
static int drop_piece(struct trans *t, struct revoke *rv, const struct piece *p, fileblk_t *at,
		      nblocks_t *dropped)
{
	struct inode *in = rv->fop.in;
	fileblk_t rest = p->unmap ? p->end : *at;
	int rc = 0;

	if (p->unmap)
		rc = extmap_remove(t, in, p->staging ? FORK_STAGING : FORK_DATA, *at, p->end,
				   DROP_RECORDS, &rest);
	if (!rc)
		rc = exposure_remove(t, in->ino, rest, p->end, rv->holder);
	if (rc)
		return rc;
	if (p->unmap)
		*dropped += p->end - rest;
	if (rest == *at)
		*at = p->end;
	return 0;
}

static int drop_some(struct trans *t, struct file_run *r, fileblk_t *at, nblocks_t *dropped)
{
	struct revoke *rv = revoke_of(r);
	struct inode *in = r->fop->in;
	struct extent left;
	int rc = 0;

	for (unsigned n = 0; !rc && n < LOOKS && *at < r->lv.b1; n++) {
		struct piece p;

		if (trans_room(t) < DROP_STEP_BLOCKS)
			break;
		rc = piece_at(rv, *at, r->lv.b1, &p);
		if (!rc && p.kind == PIECE_COPY)
			break;
		if (!rc && p.kind == PIECE_DROP)
			rc = drop_piece(t, rv, &p, at, dropped);
		else if (!rc)
			*at = p.end;
	}
	if (rc || !(in->core.flags & INODE_F_STAGING))
		return rc;
	rc = extmap_lookup(in, FORK_STAGING, 0, FILE_MAX_BLOCKS, &left);
	if (!rc && left.state == EXT_HOLE && left.len == FILE_MAX_BLOCKS)
		in->core.flags &= ~INODE_F_STAGING;
	return rc;
}

static enum step revoke_drop(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct inode *in = r->fop->in;
	struct grant_list dead = { NULL };
	fileblk_t at = r->lv.at;
	nblocks_t dropped = 0;
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, REVOKE_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE;
		rc = trans_join_inode(&t, in);
		if (!rc)
			rc = drop_some(&t, r, &at, &dropped);
		if (!rc)
			rc = inode_write(&t, in);
		if (rc) {
			run_trans_fail(r, &t, rc);
		} else {
			note_unshare(in);
			revoke_cut_before(rv, at, &dead);
			trans_commit(&t);
		}
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : revoke_fail(r, rc);
	grant_list_free(r->fs, &dead);
	LAYOUT_COUNT(r->fs, revoked_blocks, dropped);
	r->lv.at = at;
	return run_yield(r, revoke_look);
}

static enum step revoke_remap(struct file_run *r);

/* ---- copy: written blocks move
 * ------------------------------------------------------------------ */

static enum step copy_written(struct file_run *r)
{
	if (r->io_err)
		return revoke_fail(r, r->io_err);
	r->step = revoke_remap;
	return STEP_NEXT;
}

static enum step copy_read(struct file_run *r)
{
	fileblk_t at = r->lv.at, end = at + r->lv.len;
	uint8_t *mem = r->lv.mem;
	int rc = 0;

	if (r->io_err)
		return revoke_fail(r, r->io_err);
	fs_rdlock(r->fs);
	while (at < end && !rc) {
		struct extent ext;

		rc = extmap_lookup(r->fop->in, FORK_STAGING, at, end - at, &ext);
		if (rc)
			break;
		xassert(ext.state != EXT_HOLE);
		rc = run_part(r, IO_WRITE, ext.block << BLOCK_SHIFT, mem, ext.len << BLOCK_SHIFT);
		mem += ext.len << BLOCK_SHIFT;
		at += ext.len;
	}
	fs_unlock(r->fs);
	if (rc) {
		r->nparts = 0;
		return revoke_fail(r, rc);
	}
	return run_submit(r, copy_written);
}

/* New blocks, in the staging fork, under an intent that frees them after a crash. */
static int stage(struct trans *t, struct file_run *r, uint64_t *intent, nblocks_t *len)
{
	struct inode *in = r->fop->in;
	struct intent_disk rec = {
		.type = put32(INTENT_PUNCH), .flags = put32(INTENT_F_STAGING),
		.ino = put64(in->ino),
		.a = put64(r->lv.at), .b = put64(r->lv.at + r->lv.len),
	};
	int rc = trans_join_inode(t, in);

	if (!rc)
		rc = intent_add(t, &rec, intent);
	if (rc)
		return rc;
	in->core.flags |= INODE_F_STAGING;
	rc = extmap_allocate(t, in, FORK_STAGING, r->lv.at, r->lv.len, 0, COPY_EXTENTS, len);
	if (!rc && !*len)
		rc = -ENOSPC;
	return rc ? rc : inode_write(t, in);
}

static enum step revoke_copy(struct file_run *r)
{
	uint64_t intent = 0;
	nblocks_t len = 0;
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, REVOKE_TRANS_BLOCKS);
	if (!rc) {
		rc = stage(&t, r, &intent, &len);
		if (rc)
			run_trans_fail(r, &t, rc);
		else
			trans_commit(&t);
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : revoke_fail(r, rc);
	r->space_tries = r->reaper_tries = 0;
	r->lv.intent = intent;
	r->lv.len = len;
	r->lv.mem = run_mem_get(len << BLOCK_SHIFT);
	rc = r->lv.mem ? run_part(r, IO_READ, r->lv.from << BLOCK_SHIFT, r->lv.mem,
				  len << BLOCK_SHIFT) : -ENOMEM;
	if (rc) {
		r->nparts = 0;
		return revoke_fail(r, rc);
	}
	return run_submit(r, copy_read);
}

static int remap(struct trans *t, struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct inode *in = r->fop->in;
	fileblk_t at = r->lv.at, end = at + r->lv.len;
	int rc = trans_join_inode(t, in);

	while (!rc && at < end) {
		struct extent ext;

		rc = extmap_lookup(in, FORK_STAGING, at, end - at, &ext);
		if (!rc)
			rc = extmap_promote(t, in, at, ext.len);
		at += ext.len;
	}
	if (!rc)
		rc = exposure_remove(t, in->ino, r->lv.at, end, rv->holder);
	if (!rc)
		rc = staging_end(t, in, r->lv.intent);
	return rc ? rc : inode_write(t, in);
}

static enum step revoke_remap(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct grant_list dead = { NULL };
	struct trans t;
	enum step how;
	int rc;

	rc = trans_begin(r->fs, &t, REVOKE_TRANS_BLOCKS);
	if (!rc) {
		t.alloc_flags |= ALLOC_USE_RESERVE; /* tree nodes only */
		rc = remap(&t, r);
		if (rc) {
			run_trans_fail(r, &t, rc);
		} else {
			note_unshare(r->fop->in);
			revoke_cut_before(rv, r->lv.at + r->lv.len, &dead);
			trans_commit(&t);
		}
	}
	if (rc)
		return run_retry(r, &rc, &how) ? how : revoke_fail(r, rc);
	grant_list_free(r->fs, &dead);
	LAYOUT_COUNT(r->fs, relocated_blocks, r->lv.len);
	run_mem_put(r->lv.mem, r->lv.len << BLOCK_SHIFT);
	r->lv.mem = NULL;
	r->lv.intent = 0;
	r->lv.at += r->lv.len;
	return run_yield(r, revoke_look);
}

enum step revoke_look(struct file_run *r)
{
	struct revoke *rv = revoke_of(r);
	struct piece p = { .kind = PIECE_SKIP };
	bool dead;
	int rc = 0;

	if (revoke_stopping(rv->ls))
		return revoke_fail(r, -ERR_SHUTDOWN);
	fs_rdlock(r->fs);
	dead = revoke_of_dead(r->fop->in);
	for (unsigned n = 0; !rc && !dead && n < LOOKS && r->lv.at < r->lv.b1; n++) {
		rc = piece_at(rv, r->lv.at, r->lv.b1, &p);
		if (!rc && p.kind != PIECE_SKIP)
			break;
		if (!rc)
			r->lv.at = p.end;
	}
	fs_unlock(r->fs);
	if (rc)
		return revoke_fail(r, rc);
	if (dead || r->lv.at >= r->lv.b1) {
		r->step = revoke_finish;
		return STEP_NEXT;
	}
	if (p.kind == PIECE_SKIP)
		return run_yield(r, revoke_look);
	r->lv.len = p.end - r->lv.at;
	r->lv.from = p.block;
	r->step = p.kind == PIECE_COPY ? revoke_copy : revoke_drop;
	return STEP_NEXT;
}
