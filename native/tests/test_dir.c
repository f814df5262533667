/* SPDX-License-Identifier: MIT
 *
 * test_dir.c - directory entries: names of any bytes, hash collisions, readdir while entries come
 * and go.
 */
#include "names_fixture.h"

#include "btree.h"

#define BATCH 16u
#define BATCH_BLOCKS (BATCH * (TRANS_TREE_OP + 1) + TRANS_ALLOC_OP)

static struct inode *dir;

static int setup_dir(void **state)
{
	setup(state);
	dir = make_dir(world.root, "d");
	return 0;
}

static int teardown_dir(void **state)
{
	inode_put(dir);
	return teardown(state);
}

static void begin(struct trans *t, unsigned blocks)
{
	int rc;

	RETRY(rc, trans_begin(world.fs, t, blocks));
	OK(rc);
}

static int add(const char *name, size_t len, inum_t ino)
{
	struct trans t;
	int rc;

	begin(&t, BATCH_BLOCKS);
	rc = dir_add(&t, dir, name, len, ino, 8);
	if (!rc)
		rc = inode_write(&t, dir);
	if (rc)
		trans_cancel(&t);
	else
		trans_commit(&t);
	return rc;
}

static int find(const char *name, size_t len, struct dirent *ent)
{
	int rc;

	fs_rdlock(world.fs);
	rc = dir_lookup(dir, name, len, ent);
	fs_unlock(world.fs);
	return rc;
}

static void del(const char *name, size_t len)
{
	struct dirent ent;
	struct trans t;

	begin(&t, BATCH_BLOCKS);
	OK(dir_lookup(dir, name, len, &ent));
	OK(dir_remove(&t, dir, &ent));
	OK(inode_write(&t, dir));
	trans_commit(&t);
}

static void names_of_all_bytes(void **state)
{
	struct dirent ent;
	char name[NAME_LEN_MAX + 1];

	for (unsigned byte = 0; byte < 256; byte++) {
		name[0] = (char)byte;
		if (byte == 0 || byte == '/' || byte == '.') {
			assert_int_equal(add(name, 1, 9), -EINVAL);
			continue;
		}
		OK(add(name, 1, 1000 + byte));
		assert_int_equal(add(name, 1, 9), -EEXIST);
	}
	for (unsigned byte = 1; byte < 256; byte++) {
		name[0] = (char)byte;
		if (byte == '/' || byte == '.')
			continue;
		OK(find(name, 1, &ent));
		assert_int_equal(ent.ino, 1000 + byte);
		assert_int_equal(ent.name_len, 1);
		assert_true(ent.cookie > 2 && ent.cookie >> 63 == 0);
	}
	assert_int_equal(dir->core.size, 253);
	for (unsigned len = 1; len <= NAME_LEN_MAX; len++) {
		memset(name, 0xff, len);
		name[0] = 'x';
		assert_int_equal(add(name, len, len + 5000), len == 1 ? -EEXIST : 0);
	}
	for (unsigned len = 2; len <= NAME_LEN_MAX; len++) {
		memset(name, 0xff, len);
		name[0] = 'x';
		OK(find(name, len, &ent));
		assert_int_equal(ent.ino, len + 5000);
		assert_memory_equal(ent.name, name, len);
	}
}

static void bad_names_are_refused(void **state)
{
	char longest[NAME_LEN_MAX + 1];
	struct dirent ent;

	memset(longest, 'a', sizeof(longest));
	assert_int_equal(add(longest, sizeof(longest), 9), -ENAMETOOLONG);
	assert_int_equal(find(longest, sizeof(longest), &ent), -ENAMETOOLONG);
	assert_int_equal(add("", 0, 9), -EINVAL);
	assert_int_equal(add(".", 1, 9), -EINVAL);
	assert_int_equal(add("..", 2, 9), -EINVAL);
	assert_int_equal(add("a/b", 3, 9), -EINVAL);
	assert_int_equal(add("a\0b", 3, 9), -EINVAL);
	OK(add("...", 3, 9));
	OK(add(".a", 2, 9));
	assert_int_equal(find("nothing", 7, &ent), -ENOENT);
	assert_int_equal(dir->core.size, 2);
}

/* ---- collisions ---- */

#define HASH 0x123456789abull

static int add_hashed(const char *name, inum_t ino)
{
	struct trans t;
	int rc;

	begin(&t, BATCH_BLOCKS);
	rc = dir_add_hashed(&t, dir, HASH, name, strlen(name), ino, 8);
	if (!rc)
		rc = inode_write(&t, dir);
	if (rc)
		trans_cancel(&t);
	else
		trans_commit(&t);
	return rc;
}

static void names_of_one_hash_are_told_apart(void **state)
{
	uint64_t cookies[300];
	struct dirent ent;
	struct trans t;
	char name[16];

	for (unsigned i = 0; i < 300; i++) {
		snprintf(name, sizeof(name), "name%u", i);
		OK(add_hashed(name, 100 + i));
		assert_int_equal(add_hashed(name, 9), -EEXIST);
		OK(dir_lookup_hashed(dir, HASH, name, strlen(name), &ent));
		cookies[i] = ent.cookie;
	}
	/* Every third goes; the others keep cookie and inode. */
	for (unsigned i = 0; i < 300; i += 3) {
		snprintf(name, sizeof(name), "name%u", i);
		begin(&t, BATCH_BLOCKS);
		OK(dir_lookup_hashed(dir, HASH, name, strlen(name), &ent));
		OK(dir_remove(&t, dir, &ent));
		OK(inode_write(&t, dir));
		trans_commit(&t);
	}
	for (unsigned i = 0; i < 300; i++) {
		int rc;

		snprintf(name, sizeof(name), "name%u", i);
		fs_rdlock(world.fs);
		rc = dir_lookup_hashed(dir, HASH, name, strlen(name), &ent);
		fs_unlock(world.fs);
		assert_int_equal(rc, i % 3 ? 0 : -ENOENT);
		if (!rc) {
			assert_int_equal(ent.cookie, cookies[i]);
			assert_int_equal(ent.ino, 100 + i);
		}
	}
	/* The gaps are used again, lowest first. */
	OK(add_hashed("again", 5));
	OK(dir_lookup_hashed(dir, HASH, "again", 5, &ent));
	assert_int_equal(ent.cookie, cookies[0]);
	assert_int_equal(dir->core.size, 201);
}

static void a_full_hash_is_enospc(void **state)
{
	struct { struct dirent_disk d; char name[5]; } rec = {.d = {.type = 8, .name_len = 5}};
	struct dirent ent;
	struct trans t;

	for (unsigned seq = 0; seq < 1u << DIR_COOKIE_SEQ_BITS;) {
		begin(&t, BATCH_BLOCKS);
		for (unsigned i = 0; i < BATCH; i++, seq++) {
			char name[8];

			snprintf(name, sizeof(name), "%05x", seq);
			memcpy(rec.name, name, 5);
			OK(bt_insert(&t, fs_tree(world.fs, TREE_DIRENT),
				     KEY(dir->ino, HASH << DIR_COOKIE_SEQ_BITS | seq), &rec,
				     sizeof(rec.d) + 5));
		}
		trans_commit(&t);
	}
	assert_int_equal(add_hashed("more", 9), -ENOSPC);
	OK(dir_lookup_hashed(dir, HASH, "0ffff", 5, &ent));
	assert_int_equal(dir_lookup_hashed(dir, HASH + 1, "0ffff", 5, &ent), -ENOENT);
}

/* ---- readdir ---- */

#define BIG 100000u
#define PAGE 512u

struct reading {
	uint64_t after;
	unsigned page, total;
	uint8_t *seen; /* by inode number - 1 */
};

static int on_entry(void *arg, const struct dirent_view *ent)
{
	struct reading *r = arg;

	if (r->page == PAGE)
		return 1;
	assert_true(ent->cookie > r->after);
	r->after = ent->cookie;
	r->page++;
	r->total++;
	r->seen[ent->ino - 1]++;
	return 0;
}

static void number_name(char *name, unsigned i)
{
	snprintf(name, 16, "file-%u", i);
}

static void add_many(unsigned from, unsigned to)
{
	char name[16];
	struct trans t;

	for (unsigned i = from; i < to;) {
		begin(&t, BATCH_BLOCKS);
		for (unsigned n = 0; n < BATCH && i < to; n++, i++) {
			number_name(name, i);
			OK(dir_add(&t, dir, name, strlen(name), i + 1, 8));
		}
		OK(inode_write(&t, dir));
		trans_commit(&t);
	}
}

/* Entries 0 .. BIG stay; others are added and removed between the pages. */
static void readdir_shows_what_stays_exactly_once(void **state)
{
	struct reading r = {.seen = calloc(2 * BIG, 1)};
	unsigned extra = BIG, oldest = BIG;
	char name[16];
	int rc;

	add_many(0, BIG);
	do {
		r.page = 0;
		fs_rdlock(world.fs);
		rc = dir_iterate(dir, r.after, on_entry, &r);
		fs_unlock(world.fs);
		add_many(extra, extra + 20);
		extra += 20;
		for (unsigned i = 0; i < 10; i++, oldest++) {
			number_name(name, oldest);
			del(name, strlen(name));
		}
	} while (rc == 1);
	OK(rc);
	for (unsigned i = 0; i < BIG; i++)
		assert_int_equal(r.seen[i], 1);
	for (unsigned i = BIG; i < 2 * BIG; i++)
		assert_true(r.seen[i] <= 1);
	assert_true(r.total >= BIG);
	free(r.seen);
}

static int stop_with(void *arg, const struct dirent_view *ent)
{
	return *(int *)arg;
}

static void iterate_returns_what_stopped_it(void **state)
{
	int code = -ENOENT;

	fs_rdlock(world.fs);
	assert_int_equal(dir_iterate(dir, 0, stop_with, &code), 0); /* nothing to call it for */
	fs_unlock(world.fs);
	OK(add("a", 1, 5));
	fs_rdlock(world.fs);
	assert_int_equal(dir_iterate(dir, 0, stop_with, &code), -ENOENT);
	code = 7;
	assert_int_equal(dir_iterate(dir, 0, stop_with, &code), 7);
	code = 0;
	assert_int_equal(dir_iterate(dir, 0, stop_with, &code), 0);
	fs_unlock(world.fs);
}

static void replace_keeps_cookie_and_name(void **state)
{
	struct dirent before, after;
	struct trans t;

	OK(add("a", 1, 5));
	OK(find("a", 1, &before));
	begin(&t, BATCH_BLOCKS);
	OK(dir_replace(&t, dir, &before, 6, 4));
	trans_commit(&t);
	OK(find("a", 1, &after));
	assert_int_equal(after.ino, 6);
	assert_int_equal(after.type, 4);
	assert_int_equal(after.cookie, before.cookie);
	assert_int_equal(dir->core.size, 1);
}

int main(void)
{
#define DIR_TEST(f) cmocka_unit_test_setup_teardown(f, setup_dir, teardown_dir)
	const struct CMUnitTest tests[] = {
		DIR_TEST(names_of_all_bytes),
		DIR_TEST(bad_names_are_refused),
		DIR_TEST(names_of_one_hash_are_told_apart),
		DIR_TEST(a_full_hash_is_enospc),
		DIR_TEST(readdir_shows_what_stays_exactly_once),
		DIR_TEST(iterate_returns_what_stopped_it),
		DIR_TEST(replace_keeps_cookie_and_name),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
