/* SPDX-License-Identifier: MIT */
#include "tree_fixture.h"

#include <inttypes.h>
#include <string.h>

#include "btree_node.h"
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

uint64_t fixture_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

uint64_t fixture_seed(uint64_t otherwise)
{
	const char *s = getenv("EXTFS_TEST_SEED");
	uint64_t seed = s ? strtoull(s, NULL, 0) : otherwise;

	print_message("repeat with EXTFS_TEST_SEED=%" PRIu64 "\n", seed);
	return seed;
}

/* ---- verification ---------------------------------------------------------------------------- */

static void mark(uint8_t *used, fsblock_t block, nblocks_t len)
{
	for (nblocks_t i = 0; used && i < len; i++) {
		if (used[block + i])
			fail_msg("block %" PRIu64 " has two owners", block + i);
		used[block + i] = 1;
	}
}

struct walk {
	struct fixture *f;
	struct tree tree;
	struct tree_shape shape;
	uint8_t *used;
};

static void walk_node(struct walk *w, fsblock_t block, unsigned level, struct key low,
		      struct key high, bool bounded)
{
	struct buf *b;

	assert_int_equal(buf_get(&w->f->fs, block, &buf_type_node,
				 OWNER_NODE(w->tree.type, w->tree.agno), &b), 0);
	struct node_disk *n = b->data;
	unsigned count = node_count(n);

	mark(w->used, block, 1);
	w->shape.nodes++;
	assert_int_equal(buf_type_node.verify(&w->f->fs, n), 0);
	assert_int_equal(node_level(n), level);
	assert_true(count >= (level ? 2 : 1));
	assert_true(key_cmp(node_key(n, 0), low) >= 0);
	if (level)
		assert_int_equal(key_cmp(node_key(n, 0), low), 0);
	if (bounded)
		assert_true(key_cmp(node_key(n, count - 1), high) < 0);
	if (!level) {
		w->shape.leaves++;
		w->shape.records += count;
		w->shape.leaf_bytes += leaf_used(n);
	}
	for (unsigned i = 0; level && i < count; i++) {
		bool last = i + 1 == count;

		walk_node(w, branch_child(n, i), level - 1, node_key(n, i),
			  last ? high : node_key(n, i + 1), last ? bounded : true);
	}
	buf_put(b);
}

struct tree_shape fixture_check_tree(struct fixture *f, struct tree tree, uint8_t *used)
{
	struct walk w = { .f = f, .tree = tree, .used = used };
	const struct tree_root_disk *root;

	if (tree.type < TREE_ROOT_COUNT) {
		root = &fs_root(&f->fs)->trees[tree.type];
	} else {
		const struct ag_disk *ag = alloc_ag_buf(&f->fs, tree.agno)->data;

		root = tree.type == TREE_FREE_BY_BLOCK ? &ag->by_block : &ag->by_len;
	}
	if (get32(root->height))
		walk_node(&w, get64(root->block), get32(root->height) - 1, KEY_MIN, KEY_MAX,
			  false);
	else
		assert_int_equal(get64(root->block), 0);
	assert_int_equal(w.shape.records, get64(root->records));
	return w.shape;
}

static nblocks_t check_ag(struct fixture *f, uint32_t agno, uint8_t *used)
{
	struct tree by_block = { &f->fs, TREE_FREE_BY_BLOCK, agno };
	struct tree by_len = { &f->fs, TREE_FREE_BY_LEN, agno };
	const struct ag_disk *ag = alloc_ag_buf(&f->fs, agno)->data;
	nblocks_t free = get32(ag->freelist_count);
	fsblock_t last_end = 0;
	struct bt_cursor c;

	fixture_check_tree(f, by_block, used);
	fixture_check_tree(f, by_len, used);
	assert_int_equal(bt_records(by_block), bt_records(by_len));
	for (uint32_t i = 0; i < get32(ag->freelist_count); i++)
		mark(used, get64(ag->freelist[i]), 1);
	bt_cursor_init(&c, by_block);
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		fsblock_t start = bt_key(&c).hi;
		unsigned len;
		const struct free_disk *rec = bt_record(&c, &len);
		nblocks_t blocks = get64(rec->length);

		assert_int_equal(len, sizeof(*rec));
		assert_true(start > last_end || !last_end);
		assert_int_equal(bt_lookup(by_len, KEY(blocks, start), NULL, 0, &len), 0);
		mark(used, start, blocks);
		free += blocks;
		last_end = start + blocks;
	}
	bt_cursor_release(&c);
	assert_int_equal(free, get64(ag->free_blocks));
	return free;
}

static nblocks_t check_quarantine(struct fixture *f, uint8_t *used)
{
	nblocks_t total = 0;
	struct bt_cursor c;

	bt_cursor_init(&c, fs_tree(&f->fs, TREE_QUARANTINE));
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		unsigned len;
		const struct quarantine_disk *rec = bt_record(&c, &len);

		mark(used, bt_key(&c).hi, get64(rec->length));
		total += get64(rec->length);
	}
	bt_cursor_release(&c);
	return total;
}

void fixture_check_space(struct fixture *f, const uint8_t *mapped)
{
	struct fs *fs = &f->fs;
	struct super *sb = &fs->super;
	uint8_t *used = calloc(sb->total_blocks, 1);
	nblocks_t sum = 0;

	mark(used, 0, AG0_HEADER_BLOCK + 1);
	mark(used, SUPER_COPY_BLOCK, 1 + sb->journal_blocks);
	for (uint32_t no = 1; no < sb->ag_count; no++)
		mark(used, no * sb->ag_blocks, 1);
	for (unsigned type = 0; type < TREE_ROOT_COUNT; type++)
		fixture_check_tree(f, fs_tree(fs, type), used);
	for (uint32_t no = 0; no < sb->ag_count; no++)
		sum += check_ag(f, no, used);
	assert_int_equal(sum, get64(fs_root(fs)->free_blocks));
	assert_int_equal(check_quarantine(f, used), get64(fs_root(fs)->quarantined_blocks));
	for (fsblock_t b = 0; mapped && b < sb->total_blocks; b++)
		if (mapped[b])
			mark(used, b, 1);
	for (fsblock_t b = 0; b < sb->total_blocks; b++)
		if (!used[b])
			fail_msg("block %" PRIu64 " belongs to nobody", b);
	free(used);
}
