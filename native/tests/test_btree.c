/* SPDX-License-Identifier: MIT
 *
 * The B+tree against a sorted array: the same random operations on both, some of them cancelled.
 */
#include "tree_fixture.h"

#include <string.h>

#include "btree_node.h"
#include "trans.h"

struct entry { struct key key; uint16_t len; uint8_t fill; };
struct model { struct entry *list; size_t n, cap; };

static size_t model_find(const struct model *m, struct key key, bool *exact)
{
	size_t lo = 0, hi = m->n;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;

		if (key_cmp(m->list[mid].key, key) < 0)
			lo = mid + 1;
		else
			hi = mid;
	}
	*exact = lo < m->n && !key_cmp(m->list[lo].key, key);
	return lo;
}

static void model_insert(struct model *m, struct entry e)
{
	bool exact;
	size_t at = model_find(m, e.key, &exact);

	if (m->n == m->cap) {
		m->cap = m->cap ? m->cap * 2 : 1024;
		m->list = realloc(m->list, m->cap * sizeof(*m->list));
	}
	memmove(m->list + at + 1, m->list + at, (m->n - at) * sizeof(*m->list));
	m->list[at] = e;
	m->n++;
}

static void model_delete(struct model *m, struct key key)
{
	bool exact;
	size_t at = model_find(m, key, &exact);

	memmove(m->list + at, m->list + at + 1, (m->n - at - 1) * sizeof(*m->list));
	m->n--;
}

static const void *bytes_of(const struct entry *e)
{
	static uint8_t rec[RECORD_MAX];

	memset(rec, e->fill, e->len);
	return rec;
}

static void check_record(const struct entry *e, const void *rec, unsigned len)
{
	assert_int_equal(len, e->len);
	assert_memory_equal(rec, bytes_of(e), len);
}

static void check_all(struct fixture *f, struct tree tree, const struct model *m)
{
	struct bt_cursor c;
	size_t i = 0;
	unsigned len;
	int err;

	check_tree(&f->fs, tree, NULL);
	assert_int_equal(bt_records(tree), m->n);
	bt_cursor_init(&c, tree);
	for (err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c), i++) {
		assert_true(i < m->n && !key_cmp(bt_key(&c), m->list[i].key));
		const void *rec = bt_record(&c, &len);
		check_record(&m->list[i], rec, len);
	}
	assert_int_equal(err, -ENOENT);
	assert_int_equal(i, m->n);
	for (err = bt_seek(&c, KEY_MAX, BT_LE); !err; err = bt_prev(&c))
		assert_int_equal(key_cmp(bt_key(&c), m->list[--i].key), 0);
	assert_int_equal(err, -ENOENT);
	assert_int_equal(i, 0);
	bt_cursor_release(&c);
}

static void check_seeks(struct tree tree, const struct model *m, struct key key)
{
	struct bt_cursor c;
	bool exact;
	size_t at = model_find(m, key, &exact);
	const size_t none = SIZE_MAX;
	const size_t want[] = {
		[BT_EQ] = exact ? at : none,
		[BT_GE] = at < m->n ? at : none,
		[BT_GT] = at + exact < m->n ? at + exact : none,
		[BT_LE] = exact ? at : at ? at - 1 : none,
		[BT_LT] = at ? at - 1 : none,
	};
	uint8_t rec[RECORD_MAX];
	unsigned len;

	bt_cursor_init(&c, tree);
	for (unsigned how = 0; how < ARRAY_LEN(want); how++) {
		int err = bt_seek(&c, key, how);

		assert_int_equal(err, want[how] == none ? -ENOENT : 0);
		if (!err)
			assert_int_equal(key_cmp(bt_key(&c), m->list[want[how]].key), 0);
	}
	bt_cursor_release(&c);
	assert_int_equal(bt_lookup(tree, key, rec, sizeof(rec), &len), exact ? 0 : -ENOENT);
	if (exact)
		check_record(&m->list[at], rec, len);
}

enum shape { SHAPE_RANDOM, SHAPE_ASCENDING, SHAPE_DESCENDING, SHAPE_FILES };

/* Keys of one kind of use; small universes make hits of existing keys likely. */
static struct key make_key(enum shape shape, uint64_t *rng, uint64_t serial)
{
	switch (shape) {
	case SHAPE_ASCENDING:
		return KEY(7, serial);
	case SHAPE_DESCENDING:
		return KEY(1000000 - serial, 3);
	case SHAPE_FILES: /* several files that grow side by side */
		return KEY(check_random(rng) % 5, serial);
	default:
		return KEY(check_random(rng) % 64, check_random(rng) % 400);
	}
}

static unsigned make_len(unsigned max_len, uint64_t *rng)
{
	uint64_t r = check_random(rng);

	if (r % 16 == 0)
		return max_len;
	return (unsigned)(r >> 8) % (max_len + 1);
}

/* One operation on both; weights in percent for insert and delete, the rest updates. */
static void one_op(struct trans *t, struct tree tree, struct model *m, struct entry e,
		   unsigned insert, unsigned delete, uint64_t *rng, bool apply)
{
	unsigned dice = (unsigned)(check_random(rng) % 100);
	bool exact;
	size_t at;

	if (dice >= insert && m->n && check_random(rng) % 8)
		e.key = m->list[check_random(rng) % m->n].key;
	at = model_find(m, e.key, &exact);
	if (dice < insert) {
		assert_int_equal(bt_insert(t, tree, e.key, bytes_of(&e), e.len), exact ? -EEXIST : 0);
		if (!exact && apply)
			model_insert(m, e);
	} else if (dice < insert + delete) {
		assert_int_equal(bt_delete(t, tree, e.key), exact ? 0 : -ENOENT);
		if (exact && apply)
			model_delete(m, e.key);
	} else {
		assert_int_equal(bt_update(t, tree, e.key, bytes_of(&e), e.len), exact ? 0 : -ENOENT);
		if (exact && apply)
			m->list[at] = e;
	}
}

static void run_phase(struct fixture *f, struct tree tree, struct model *m, enum shape shape,
		      unsigned max_len, unsigned ops, unsigned insert, unsigned delete, uint64_t *rng)
{
	static uint64_t serial;

	for (unsigned i = 0; i < ops; i++) {
		bool cancel = check_random(rng) % 16 == 0;
		struct entry e = { make_key(shape, rng, ++serial),
				   (uint16_t)make_len(max_len, rng), (uint8_t)check_random(rng) };
		struct trans t;

		fixture_begin(f, &t, 128);
		one_op(&t, tree, m, e, insert, delete, rng, !cancel);
		if (cancel)
			trans_cancel(&t);
		else
			trans_commit(&t);
		if (i % 64 == 0)
			check_seeks(tree, m, make_key(shape, rng, serial));
		if (i % 500 == 0)
			fixture_commit_group(f, i % 1000 == 0);
	}
	check_all(f, tree, m);
}

static void property(unsigned max_len, enum shape shape, uint64_t seed)
{
	struct fixture *f = fixture_create(32768, 16384, 1024);
	struct tree tree = fs_tree(&f->fs, TREE_DIRENT);
	uint64_t rng = check_seed(seed);
	struct model m = { 0 };

	run_phase(f, tree, &m, shape, max_len, 3000, 90, 5, &rng);
	run_phase(f, tree, &m, shape, max_len, 3000, 40, 40, &rng);
	fixture_reread(f);
	check_all(f, tree, &m);
	run_phase(f, tree, &m, SHAPE_RANDOM, max_len, 2000, 50, 20, &rng);
	run_phase(f, tree, &m, SHAPE_RANDOM, max_len, 4000, 5, 90, &rng);
	check_space(&f->fs, NULL);
	while (m.n) {
		struct trans t;

		fixture_begin(f, &t, 64);
		assert_int_equal(bt_delete(&t, tree, m.list[m.n / 2].key), 0);
		trans_commit(&t);
		model_delete(&m, m.list[m.n / 2].key);
	}
	assert_int_equal(bt_height(tree), 0);
	fixture_reread(f);
	check_space(&f->fs, NULL);
	free(m.list);
	fixture_destroy(f);
}

static void test_random_small(void **state) { property(24, SHAPE_RANDOM, 1); }
static void test_random_large(void **state) { property(RECORD_MAX, SHAPE_RANDOM, 2); }
static void test_random_mixed(void **state) { property(280, SHAPE_RANDOM, 3); }
static void test_ascending(void **state) { property(16, SHAPE_ASCENDING, 4); }
static void test_descending(void **state) { property(40, SHAPE_DESCENDING, 5); }
static void test_files(void **state) { property(16, SHAPE_FILES, 6); }

/* Average bytes used of the leaves, in percent. */
static unsigned fill_percent(struct fixture *f, struct tree tree)
{
	struct tree_shape s = check_tree(&f->fs, tree, NULL);

	return (unsigned)(s.leaf_bytes * 100 / (s.leaves * NODE_BYTES));
}

/* Ascending inserts leave full leaves, at the end of the tree and in its middle; deletion of most
 * records gives blocks back. */
static void test_fill(void **state)
{
	struct fixture *f = fixture_create(65536, 65536, 1024);
	struct tree tree = fs_tree(&f->fs, TREE_EXTENT);
	uint64_t rec[2] = { 1, 2 }, rng = 9;
	struct trans t;
	struct tree_shape before, after;

	for (uint64_t file = 0; file < 3; file++) {
		for (unsigned i = 0; i < 20000; i++) {
			if (i % 50 == 0)
				fixture_begin(f, &t, 256);
			/* 5, then 3 before it, then 4 between them */
			uint64_t hi = file == 0 ? 5 : file == 1 ? 3 : 4;
			assert_int_equal(bt_insert(&t, tree, KEY(hi, i), rec, sizeof(rec)), 0);
			if (i % 50 == 49)
				trans_commit(&t);
		}
		assert_true(fill_percent(f, tree) >= 97);
	}
	before = check_tree(&f->fs, tree, NULL);
	assert_int_equal(bt_height(tree), 3);
	for (unsigned i = 0; i < 60000; i++) {
		uint64_t hi = 3 + i % 3;

		if (check_random(&rng) % 10 == 0)
			continue;
		fixture_begin(f, &t, 64);
		assert_int_equal(bt_delete(&t, tree, KEY(hi, i / 3)), 0);
		trans_commit(&t);
	}
	after = check_tree(&f->fs, tree, NULL);
	assert_true(after.nodes * 4 < before.nodes);
	check_space(&f->fs, NULL);
	fixture_destroy(f);
}

/* A branch that has lost all children but one, beside a full one that cannot take it in, gets its
 * share. */
static void test_redistribute(void **state)
{
	struct fixture *f = fixture_create(65536, 65536, 1024);
	struct tree tree = fs_tree(&f->fs, TREE_EXTENT);
	uint64_t rec[2] = { 1, 2 };
	struct tree_shape before;
	unsigned n = 0;
	struct trans t;

	/* Ascending keys: the left branch keeps all children but one when the right one begins with
	 * two. */
	for (; bt_height(tree) < 3; n++) {
		fixture_begin(f, &t, 64);
		assert_int_equal(bt_insert(&t, tree, KEY(1, 2 * n), rec, sizeof(rec)), 0);
		trans_commit(&t);
	}
	/* Now the left one is full. */
	fixture_begin(f, &t, 64);
	assert_int_equal(bt_insert(&t, tree, KEY(1, 101), rec, sizeof(rec)), 0);
	trans_commit(&t);
	before = check_tree(&f->fs, tree, NULL);
	/* The last leaf goes, then all the others. */
	for (unsigned i = n; i-- > 0;) {
		fixture_begin(f, &t, 64);
		assert_int_equal(bt_delete(&t, tree, KEY(1, 2 * i)), 0);
		trans_commit(&t);
		if (i == n - 1) {
			struct tree_shape after = check_tree(&f->fs, tree, NULL);

			assert_int_equal(after.leaves, before.leaves - 1);
			assert_int_equal(after.nodes, before.nodes - 1); /* the branch is still there */
		}
		if (i % 50 == 0)
			check_tree(&f->fs, tree, NULL);
	}
	assert_int_equal(bt_records(tree), 1);
	check_space(&f->fs, NULL);
	fixture_destroy(f);
}

/* Overwriting under a cursor keeps it valid. */
static void test_overwrite(void **state)
{
	struct fixture *f = fixture_create(32768, 32768, 1024);
	struct tree tree = fs_tree(&f->fs, TREE_ORPHAN);
	struct bt_cursor c;
	struct trans t;
	uint64_t rec = 0;
	unsigned len, n = 0;

	fixture_begin(f, &t, 256);
	for (uint64_t i = 0; i < 1000; i++)
		assert_int_equal(bt_insert(&t, tree, KEY(i, 0), &rec, sizeof(rec)), 0);
	trans_commit(&t);
	fixture_begin(f, &t, 256);
	bt_cursor_init(&c, tree);
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		rec = bt_key(&c).hi * 3;
		assert_int_equal(bt_overwrite(&t, &c, &rec, sizeof(rec)), 0);
		n++;
	}
	bt_cursor_release(&c);
	trans_commit(&t);
	assert_int_equal(n, 1000);
	for (uint64_t i = 0; i < 1000; i++) {
		assert_int_equal(bt_lookup(tree, KEY(i, 0), &rec, sizeof(rec), &len), 0);
		assert_int_equal(rec, i * 3);
	}
	fixture_destroy(f);
}

/* ---- damage ---------------------------------------------------------------------------------- */

static void build_leaf(struct node_disk *n)
{
	memset(n, 0, sizeof(*n));
	node_init(n, 0);
	for (unsigned i = 0; i < 5; i++)
		leaf_insert(n, i, KEY(i, 0), "abcdefghijklm", 9 + i);
}

static void build_branch(struct node_disk *n)
{
	memset(n, 0, sizeof(*n));
	node_init(n, 1);
	for (unsigned i = 0; i < 5; i++)
		branch_insert(n, i, KEY(i, 0), 9000 + i);
}

static void test_verifier(void **state)
{
	struct fixture *f = fixture_create(32768, 16384, 1024);
	buf_verify_fn verify = buf_type_node.verify;
	union { struct node_disk node; uint64_t align; } u;
	struct node_disk *n = &u.node;
	const fsblock_t bad[] = { 0, 2, 3, SUPER_COPY_BLOCK, JOURNAL_START_BLOCK, 16384, 32768,
				  UINT64_MAX };
	const struct fs *fs = &f->fs;

	build_leaf(n);
	assert_int_equal(verify(fs, n), 0);
	leaf_slots(n)[2].key.hi = put64(1);
	assert_int_equal(verify(fs, n), -ERR_NODE_ORDER);
	build_leaf(n);
	leaf_slots(n)[2].length = put16(RECORD_MAX + 1);
	assert_int_equal(verify(fs, n), -ERR_RECORD_SHAPE);
	build_leaf(n);
	leaf_slots(n)[2].length = put16(12);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	leaf_slots(n)[0].offset = put16(4096 - 8);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	leaf_slots(n)[4].offset = put16(64);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	leaf_slots(n)[1].offset = put16(get16(leaf_slots(n)[1].offset) + 4);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	n->heap = put16(100);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	n->dead = put16(1);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	n->count = put16(0);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	n->count = put16(NODE_SLOT_MAX + 1);
	assert_int_equal(verify(fs, n), -ERR_NODE_BOUNDS);
	build_leaf(n);
	n->level = put16(BT_MAX_HEIGHT);
	assert_int_equal(verify(fs, n), -ERR_NODE_LEVEL);

	build_branch(n);
	assert_int_equal(verify(fs, n), 0);
	for (unsigned i = 0; i < ARRAY_LEN(bad); i++) {
		branch_slots(n)[i % 5].child = put64(bad[i]);
		assert_int_equal(verify(fs, n), -ERR_META_RANGE);
		branch_slots(n)[i % 5].child = put64(9000);
	}
	fixture_destroy(f);
}

/* A child of the wrong level, with a good checksum, stops the descent and all writing. */
static void test_wrong_level(void **state)
{
	struct fixture *f = fixture_create(32768, 32768, 1024);
	struct tree tree = fs_tree(&f->fs, TREE_INODE);
	uint64_t rec = 0;
	struct trans t;
	struct buf *b;
	unsigned len;

	fixture_begin(f, &t, 256);
	for (uint64_t i = 0; i < 1000; i++)
		assert_int_equal(bt_insert(&t, tree, KEY(i, 0), &rec, sizeof(rec)), 0);
	trans_commit(&t);
	assert_int_equal(bt_height(tree), 2);
	fixture_begin(f, &t, 16);
	assert_int_equal(buf_get(&f->fs, get64(fs_root(&f->fs)->trees[TREE_INODE].block),
				 &buf_type_node, OWNER_NODE(TREE_INODE, 0), &b), 0);
	assert_int_equal(trans_join(&t, b), 0);
	branch_slots(b->data)[0].child = put64(b->block); /* its own child */
	buf_put(b);
	trans_commit(&t);
	fixture_reread(f);
	assert_int_equal(bt_lookup(tree, KEY(0, 0), &rec, sizeof(rec), &len), -ERR_NODE_LEVEL);
	assert_true(fs_is_shutdown(&f->fs));
	assert_int_equal(trans_begin(&f->fs, &t, 8), -ERR_SHUTDOWN);
	assert_int_equal(bt_lookup(tree, KEY(999, 0), &rec, sizeof(rec), &len), 0);
	fixture_destroy(f);
}

static void test_bad_checksum(void **state)
{
	struct fixture *f = fixture_create(32768, 32768, 1024);
	struct tree tree = fs_tree(&f->fs, TREE_INODE);
	uint8_t block[BLOCK_SIZE] __attribute__((aligned(BLOCK_SIZE)));
	uint64_t rec = 0, at;
	struct bt_cursor c;
	struct trans t;

	fixture_begin(f, &t, 64);
	assert_int_equal(bt_insert(&t, tree, KEY(1, 0), &rec, sizeof(rec)), 0);
	trans_commit(&t);
	at = get64(fs_root(&f->fs)->trees[TREE_INODE].block) << BLOCK_SHIFT;
	fixture_reread(f);
	assert_int_equal(sim_peek(f->sim, at, block, sizeof(block)), 0);
	block[4000] ^= 4;
	assert_int_equal(sim_poke(f->sim, at, block, sizeof(block)), 0);
	bt_cursor_init(&c, tree);
	assert_int_equal(bt_seek(&c, KEY(1, 0), BT_EQ), -ERR_META_CRC);
	bt_cursor_release(&c);
	assert_true(fs_is_shutdown(&f->fs));
	fixture_destroy(f);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_random_small), cmocka_unit_test(test_random_large),
		cmocka_unit_test(test_random_mixed), cmocka_unit_test(test_ascending),
		cmocka_unit_test(test_descending),   cmocka_unit_test(test_files),
		cmocka_unit_test(test_fill),	     cmocka_unit_test(test_overwrite),
		cmocka_unit_test(test_verifier),     cmocka_unit_test(test_wrong_level),
		cmocka_unit_test(test_bad_checksum), cmocka_unit_test(test_redistribute),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
