/* SPDX-License-Identifier: MIT */
#include "tree_check.h"

#include <inttypes.h>
#include <string.h>

#include "alloc.h"
#include "btree_node.h"

uint64_t check_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

uint64_t check_seed(uint64_t otherwise)
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
	struct fs *fs;
	struct tree tree;
	struct tree_shape shape;
	uint8_t *used;
};

static void walk_node(struct walk *w, fsblock_t block, unsigned level, struct key low,
		      struct key high, bool bounded)
{
	struct buf *b;

	assert_int_equal(buf_get(w->fs, block, &buf_type_node,
				 OWNER_NODE(w->tree.type, w->tree.agno), &b), 0);
	struct node_disk *n = b->data;
	unsigned count = node_count(n);

	mark(w->used, block, 1);
	w->shape.nodes++;
	assert_int_equal(buf_type_node.verify(w->fs, n), 0);
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

struct tree_shape check_tree(struct fs *fs, struct tree tree, uint8_t *used)
{
	struct walk w = { .fs = fs, .tree = tree, .used = used };
	const struct tree_root_disk *root;

	if (tree.type < TREE_ROOT_COUNT) {
		root = &fs_root(fs)->trees[tree.type];
	} else {
		const struct ag_disk *ag = alloc_ag_buf(fs, tree.agno)->data;

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

static nblocks_t check_ag(struct fs *fs, uint32_t agno, uint8_t *used)
{
	struct tree by_block = { fs, TREE_FREE_BY_BLOCK, agno };
	struct tree by_len = { fs, TREE_FREE_BY_LEN, agno };
	const struct ag_disk *ag = alloc_ag_buf(fs, agno)->data;
	nblocks_t free = get32(ag->freelist_count);
	fsblock_t last_end = 0;
	struct bt_cursor c;

	check_tree(fs, by_block, used);
	check_tree(fs, by_len, used);
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

static nblocks_t check_quarantine(struct fs *fs, uint8_t *used)
{
	nblocks_t total = 0;
	struct bt_cursor c;

	bt_cursor_init(&c, fs_tree(fs, TREE_QUARANTINE));
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		unsigned len;
		const struct quarantine_disk *rec = bt_record(&c, &len);

		mark(used, bt_key(&c).hi, get64(rec->length));
		total += get64(rec->length);
	}
	bt_cursor_release(&c);
	return total;
}

void check_space(struct fs *fs, const uint8_t *mapped)
{
	struct super *sb = &fs->super;
	uint8_t *used = calloc(sb->total_blocks, 1);
	nblocks_t sum = 0;

	mark(used, 0, AG0_HEADER_BLOCK + 1);
	mark(used, SUPER_COPY_BLOCK, 1 + sb->journal_blocks);
	for (uint32_t no = 1; no < sb->ag_count; no++)
		mark(used, no * sb->ag_blocks, 1);
	for (unsigned type = 0; type < TREE_ROOT_COUNT; type++)
		check_tree(fs, fs_tree(fs, type), used);
	for (uint32_t no = 0; no < sb->ag_count; no++)
		sum += check_ag(fs, no, used);
	assert_int_equal(sum, get64(fs_root(fs)->free_blocks));
	assert_int_equal(check_quarantine(fs, used), get64(fs_root(fs)->quarantined_blocks));
	for (fsblock_t b = 0; mapped && b < sb->total_blocks; b++)
		if (mapped[b])
			mark(used, b, 1);
	for (fsblock_t b = 0; b < sb->total_blocks; b++)
		if (!used[b])
			fail_msg("block %" PRIu64 " belongs to nobody", b);
	free(used);
}
