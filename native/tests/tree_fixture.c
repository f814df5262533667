/* SPDX-License-Identifier: MIT */
#include "tree_fixture.h"

#include <string.h>

#include "journal.h"
#include "trans.h"

/* ---- the journal as a counter ---------------------------------------------------------------- */

struct journal {
	xid_t running, durable, checkpointed;
	unsigned kicks;
	struct buf *dirty; /* through list_next, list_prev; both ends point to themselves */
};

int jrn_reserve(struct fs *fs, unsigned blocks) { return 0; }
xid_t jrn_running(struct fs *fs) { return fs->jrn->running; }
xid_t jrn_durable(struct fs *fs) { return fs->jrn->durable; }
xid_t jrn_checkpointed(struct fs *fs) { return fs->jrn->checkpointed; }
void jrn_note_lazy(struct fs *fs) {}
void jrn_kick_checkpoint(struct fs *fs) { fs->jrn->kicks++; }

static void dirty_del(struct journal *j, struct buf *b)
{
	if (b->list_prev)
		b->list_prev->list_next = b->list_next;
	else
		j->dirty = b->list_next;
	if (b->list_next)
		b->list_next->list_prev = b->list_prev;
	b->list_prev = b->list_next = NULL;
}

void jrn_buf_dirty(struct fs *fs, struct buf *b)
{
	struct journal *j = fs->jrn;

	if (b->state == BUF_DIRTY)
		return;
	b->list_next = j->dirty;
	if (j->dirty)
		j->dirty->list_prev = b;
	j->dirty = b;
	buf_set_state(b, BUF_DIRTY);
}

void jrn_buf_forget(struct fs *fs, struct buf *b)
{
	if (b->state == BUF_DIRTY)
		dirty_del(fs->jrn, b);
	buf_set_state(b, BUF_CLEAN);
	buf_detach(b);
}

void fs_shutdown_writes(struct fs *fs, int code, const char *fmt, ...)
{
	atomic_store(&fs->shutdown, true);
	atomic_store(&fs->shutdown_code, code);
}

const struct buf_type buf_type_root = { .name = "root", .magic = MAGIC_ROOT };

/* ---- life ------------------------------------------------------------------------------------ */

static void format_headers(struct fixture *f)
{
	struct fs *fs = &f->fs;
	struct trans t;
	struct buf *b;

	fixture_begin(f, &t, TRANS_MAX_BLOCKS);
	assert_int_equal(buf_new(&t, ROOT_BLOCK, &buf_type_root, 0, &fs->root), 0);
	for (uint32_t no = 0; no < fs->super.ag_count; no++) {
		fsblock_t start = no * fs->super.ag_blocks;
		fsblock_t end = no + 1 == fs->super.ag_count ? fs->super.total_blocks
							     : start + fs->super.ag_blocks;
		struct ag_disk *ag;

		assert_int_equal(buf_new(&t, no ? start : AG0_HEADER_BLOCK, &buf_type_ag, no, &b), 0);
		ag = b->data;
		ag->start = put64(start);
		ag->length = put64(end - start);
		buf_put(b);
	}
	trans_commit(&t);
}

/* Free space begins as blocks that are given back. */
static void give_all(struct fixture *f)
{
	struct fs *fs = &f->fs;
	struct super *sb = &fs->super;
	fsblock_t after_journal = sb->journal_start + sb->journal_blocks;
	struct trans t;

	for (uint32_t no = 0; no < sb->ag_count; no++) {
		fsblock_t start = no ? no * sb->ag_blocks + 1 : AG0_HEADER_BLOCK + 1;
		fsblock_t end = no + 1 == sb->ag_count ? sb->total_blocks : (no + 1) * sb->ag_blocks;

		fixture_begin(f, &t, 64);
		if (!no) {
			assert_int_equal(alloc_free(&t, start, SUPER_COPY_BLOCK - start), 0);
			start = after_journal;
		}
		assert_int_equal(alloc_free(&t, start, end - start), 0);
		trans_commit(&t);
	}
}

struct fixture *fixture_create(nblocks_t total, nblocks_t ag_blocks, nblocks_t journal_blocks)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct fs *fs = &f->fs;

	assert_int_equal(sim_create(total << BLOCK_SHIFT, 4096, 1, &f->sim), 0);
	assert_int_equal(sim_device(f->sim, &fs->dev), 0);
	fs->super = (struct super){ .total_blocks = total,
				    .ag_blocks = ag_blocks,
				    .ag_count = (uint32_t)MAX(total / ag_blocks, 1),
				    .journal_start = JOURNAL_START_BLOCK,
				    .journal_blocks = journal_blocks };
	memset(fs->super.uuid, 0x5a, FORMAT_UUID_LEN);
	pthread_rwlock_init(&fs->lock, NULL);
	fs->jrn = calloc(1, sizeof(*fs->jrn));
	fs->jrn->running = 1;
	assert_int_equal(buf_cache_create(fs, 64 << 20), 0);
	assert_int_equal(trans_pool_create(fs), 0);
	format_headers(f);
	assert_int_equal(alloc_open(fs), 0);
	give_all(f);
	fixture_commit_group(f, true);
	return f;
}

void fixture_destroy(struct fixture *f)
{
	struct fs *fs = &f->fs;

	alloc_close(fs);
	buf_put(fs->root);
	buf_cache_destroy(fs);
	trans_pool_destroy(fs);
	free(fs->jrn);
	dev_close(fs->dev);
	sim_destroy(f->sim);
	pthread_rwlock_destroy(&fs->lock);
	free(f);
}

void fixture_begin(struct fixture *f, struct trans *t, unsigned blocks)
{
	assert_int_equal(trans_begin(&f->fs, t, blocks), 0);
}

void fixture_commit_group(struct fixture *f, bool checkpoint)
{
	struct fs *fs = &f->fs;
	struct journal *j = fs->jrn;

	j->durable = j->running++;
	if (!checkpoint)
		return;
	while (j->dirty) {
		struct buf *b = j->dirty;

		meta_seal(b->data, j->durable);
		/* What is written must pass its own verifier. */
		if (b->type->verify)
			assert_int_equal(b->type->verify(fs, b->data), 0);
		assert_int_equal(dev_write(fs->dev, b->block << BLOCK_SHIFT, b->data, BLOCK_SIZE, 0),
				 0);
		dirty_del(j, b);
		buf_set_state(b, BUF_CLEAN);
	}
	j->checkpointed = j->durable;
}

unsigned fixture_kicks(const struct fixture *f) { return f->fs.jrn->kicks; }

void fixture_reread(struct fixture *f)
{
	struct fs *fs = &f->fs;

	fixture_commit_group(f, true);
	alloc_close(fs);
	buf_put(fs->root);
	buf_cache_destroy(fs);
	assert_int_equal(buf_cache_create(fs, 64 << 20), 0);
	assert_int_equal(buf_get(fs, ROOT_BLOCK, &buf_type_root, 0, &fs->root), 0);
	assert_int_equal(alloc_open(fs), 0);
}
