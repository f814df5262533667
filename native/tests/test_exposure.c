/* SPDX-License-Identifier: MIT
 *
 * Exposure records of a few inodes and holders, against one entry a file block.
 */
#include "tree_fixture.h"

#include "extmap.h"
#include "layout_priv.h"

#define INODES 3u
#define HOLDERS 3u /* ids 1..3 */
#define BLOCKS 300u
#define FIRST 6000u /* device blocks that runs name; the records alone are under test */

struct told { uint64_t holder; fsblock_t block; bool staging; };

struct world {
	struct fixture *f;
	struct told of[INODES][BLOCKS];
	unsigned noted[INODES][HOLDERS + 1]; /* 0, or the greatest iomode */
	uint64_t rng;
};

static inum_t ino_of(unsigned i) { return 50 + i; }

static bool continues(const struct told *a, const struct told *b)
{
	return a->holder && a->holder == b->holder && a->staging == b->staging &&
	       a->block + 1 == b->block;
}

/* What exposure_find() should say. */
static bool model_find(const struct world *w, unsigned i, uint64_t holder, fileblk_t at, fileblk_t end,
		       struct exposure *out)
{
	const struct told *of = w->of[i];

	while (at < end && (!of[at].holder || (holder && of[at].holder != holder)))
		at++;
	if (at >= end)
		return false;
	*out = (struct exposure){ at, 1, of[at].block, of[at].staging, of[at].holder };
	while (at + out->len < end && continues(&of[at + out->len - 1], &of[at + out->len]))
		out->len++;
	return true;
}

static void check_find(struct world *w, unsigned i, uint64_t holder, fileblk_t at, fileblk_t end)
{
	struct exposure want, got;
	int rc = exposure_find(&w->f->fs, ino_of(i), holder, at, end, &got);

	if (!model_find(w, i, holder, at, end, &want)) {
		assert_int_equal(rc, -ENOENT);
		return;
	}
	assert_int_equal(rc, 0);
	assert_int_equal(got.file, want.file);
	assert_int_equal(got.len, want.len);
	assert_int_equal(got.block, want.block);
	assert_int_equal(got.holder, want.holder);
	assert_int_equal(got.staging, want.staging);
}

static void check_covers(struct world *w, unsigned i, fileblk_t at, nblocks_t len)
{
	const struct told *first = &w->of[i][at];
	struct extent ext = { .file = at, .len = len, .block = first->holder ? first->block : FIRST };
	uint64_t holder = first->holder ? first->holder : 1;
	bool want = true;

	for (nblocks_t k = 0; k < len; k++) {
		const struct told *b = &w->of[i][at + k];

		want &= b->holder == holder && b->block == ext.block + k && b->staging == first->staging;
	}
	assert_int_equal(exposure_covers(&w->f->fs, ino_of(i), holder, &ext, first->staging), want);
	assert_int_equal(exposure_covers(&w->f->fs, ino_of(i), holder, &ext, !first->staging), 0);
	ext.block++;
	assert_int_equal(exposure_covers(&w->f->fs, ino_of(i), holder, &ext, first->staging), 0);
}

/* Every run is found, in as few records as possible; notes as they should be. */
static void check_world(struct world *w)
{
	uint64_t records = 0;

	for (unsigned i = 0; i < INODES; i++) {
		for (fileblk_t b = 0; b < BLOCKS; b++)
			records += w->of[i][b].holder &&
				   !(b && continues(&w->of[i][b - 1], &w->of[i][b]));
		for (fileblk_t at = 0; at < BLOCKS; at += 1 + check_random(&w->rng) % 7)
			for (uint64_t h = 0; h <= HOLDERS; h++)
				check_find(w, i, h, at, BLOCKS - check_random(&w->rng) % 40);
		for (uint64_t h = 1; h <= HOLDERS; h++) {
			records += w->noted[i][h] != 0;
			assert_int_equal(exposure_has_inode(&w->f->fs, ino_of(i), h, IOMODE_READ),
					 w->noted[i][h] != 0);
			assert_int_equal(exposure_has_inode(&w->f->fs, ino_of(i), h, IOMODE_RW),
					 w->noted[i][h] == IOMODE_RW);
		}
	}
	assert_int_equal(bt_records(fs_tree(&w->f->fs, TREE_EXPOSURE)), records);
	check_space(&w->f->fs, NULL);
}

static void do_add(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len, bool apply)
{
	uint64_t holder = 1 + check_random(&w->rng) % HOLDERS;
	bool staging = check_random(&w->rng) % 4 == 0;
	/* Mostly the same distance between file and device, so that runs meet and merge. */
	fsblock_t block = FIRST + 1000 * i + (staging ? 400 : 0) + at +
			  (check_random(&w->rng) % 5 == 0 ? 7 : 0);

	assert_int_equal(exposure_add(t, ino_of(i), at, len, block, staging, holder), 0);
	for (nblocks_t k = 0; apply && k < len; k++)
		w->of[i][at + k] = (struct told){ holder, block + k, staging };
}

static void do_remove(struct world *w, struct trans *t, unsigned i, fileblk_t at, nblocks_t len, bool apply)
{
	uint64_t holder = check_random(&w->rng) % (HOLDERS + 1);

	assert_int_equal(exposure_remove(t, ino_of(i), at, at + len, holder), 0);
	for (nblocks_t k = 0; apply && k < len; k++)
		if (!holder || w->of[i][at + k].holder == holder)
			w->of[i][at + k].holder = 0;
}

static void do_note(struct world *w, struct trans *t, unsigned i, bool apply)
{
	uint64_t holder = 1 + check_random(&w->rng) % HOLDERS;
	enum layout_iomode iomode = check_random(&w->rng) % 2 ? IOMODE_RW : IOMODE_READ;
	unsigned *noted = &w->noted[i][holder];
	bool added;

	if (check_random(&w->rng) % 3 == 0) {
		assert_int_equal(exposure_forget_inode(t, ino_of(i), holder), 0);
		if (apply)
			*noted = 0;
		return;
	}
	assert_int_equal(exposure_note_inode(t, ino_of(i), holder, iomode, &added), 0);
	assert_int_equal(added, *noted < (unsigned)iomode);
	if (apply)
		*noted = MAX(*noted, (unsigned)iomode);
}

static void random_changes(void **state)
{
	struct world *w = calloc(1, sizeof(*w));

	w->f = fixture_create(16384, 16384, 1024);
	w->rng = check_seed(4711);
	for (unsigned n = 0; n < 6000; n++) {
		unsigned i = check_random(&w->rng) % INODES;
		fileblk_t at = check_random(&w->rng) % BLOCKS;
		nblocks_t max = MIN(BLOCKS - at, 60), len = 1 + check_random(&w->rng) % max;
		bool apply = check_random(&w->rng) % 10 != 0;
		struct trans t;

		fixture_begin(w->f, &t, 256);
		switch (check_random(&w->rng) % 5) {
		case 0:
			do_note(w, &t, i, apply);
			break;
		case 1:
			do_remove(w, &t, i, at, len, apply);
			break;
		default:
			do_add(w, &t, i, at, len, apply);
		}
		if (apply)
			trans_commit(&t);
		else
			trans_cancel(&t);
		check_find(w, i, check_random(&w->rng) % (HOLDERS + 1), at, BLOCKS);
		check_covers(w, i, at, len);
		if (n % 200 == 0)
			check_world(w);
		if (n % 1000 == 999)
			fixture_reread(w->f);
	}
	check_world(w);
	fixture_destroy(w->f);
	free(w);
}

/* What a grant of 10^5 separate blocks costs: no step grows with the number of records. */
static void many_runs(void **state)
{
	struct fixture *f = fixture_create(16384, 16384, 1024);
	const unsigned n = 20000;
	struct exposure e;
	struct trans t;

	for (unsigned i = 0; i < n; i++) {
		fixture_begin(f, &t, 64);
		assert_int_equal(exposure_add(&t, 9, 2 * i, 1, FIRST + i % 1000, false, 1), 0);
		trans_commit(&t);
	}
	assert_int_equal(bt_records(fs_tree(&f->fs, TREE_EXPOSURE)), n);
	assert_int_equal(exposure_find(&f->fs, 9, 1, n + 1, UINT64_MAX >> 20, &e), 0);
	assert_int_equal(e.file, n + 2);
	fixture_begin(f, &t, 64);
	assert_int_equal(exposure_remove(&t, 9, n, n + 20, 1), 0);
	trans_commit(&t);
	assert_int_equal(bt_records(fs_tree(&f->fs, TREE_EXPOSURE)), n - 10);
	fixture_destroy(f);
}

/* A record that cannot be is noticed, and nothing is changed any more. */
static void impossible(void **state)
{
	const struct exposure_disk bad[] = {
		{ put64(FIRST), put32(0), put32(0), put64(1) },
		{ put64(1), put32(5), put32(0), put64(1) },
		{ put64(FIRST), put32(0x7fffffff), put32(0), put64(1) },
		{ put64(FIRST), put32(5), put32(EXPOSURE_F_INODE), put64(1) },
	};

	for (unsigned i = 0; i < ARRAY_LEN(bad); i++) {
		struct fixture *f = fixture_create(16384, 16384, 1024);
		struct exposure e;
		struct trans t;

		fixture_begin(f, &t, 64);
		assert_int_equal(bt_insert(&t, fs_tree(&f->fs, TREE_EXPOSURE), KEY(9, 4), &bad[i],
					   sizeof(bad[i])), 0);
		trans_commit(&t);
		assert_int_equal(exposure_find(&f->fs, 9, 0, 0, 100, &e), -ERR_RECORD_SHAPE);
		assert_true(atomic_load(&f->fs.shutdown));
		fixture_destroy(f);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(random_changes),
		cmocka_unit_test(many_runs),
		cmocka_unit_test(impossible),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
