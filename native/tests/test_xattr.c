/* SPDX-License-Identifier: MIT
 *
 * test_xattr.c - attributes of all sizes against a model, collisions, a full device, power cuts;
 * ACLs.
 */
#include "names_fixture.h"

static struct inode *file;

static int setup_file(void **state)
{
	setup(state);
	file = make_file(world.root, "a");
	return 0;
}

static int teardown_file(void **state)
{
	inode_put(file);
	return teardown(state);
}

static int set(struct inode *in, const char *name, const void *value, size_t len, unsigned flags)
{
	int rc;

	RETRY(rc, xattr_set(in, name, value, len, flags));
	return rc;
}

static int del(struct inode *in, const char *name)
{
	int rc;

	RETRY(rc, xattr_remove(in, name));
	return rc;
}

/* ---- model ---- */

#define NAMES 24u
static struct { char name[256]; uint8_t *value; size_t len; bool there; } model[NAMES];

static void model_make(void)
{
	static const char *const prefix[] = {"user.", "trusted.", "security."};

	for (unsigned i = 0; i < NAMES; i++) {
		size_t pad = i < 8 ? i * 30 : 3;

		snprintf(model[i].name, sizeof(model[i].name), "%sn%02u", prefix[i % 3], i);
		memset(model[i].name + strlen(model[i].name), 'x', pad);
		model[i].name[strlen(prefix[i % 3]) + 3 + pad] = '\0';
		free(model[i].value);
		model[i].value = calloc(1, XATTR_VALUE_MAX);
		model[i].there = false;
	}
}

static void check_model(void)
{
	static uint8_t value[XATTR_VALUE_MAX];
	static char names[NAMES * 256];
	unsigned there = 0;
	ssize_t total;

	for (unsigned i = 0; i < NAMES; i++) {
		ssize_t len = xattr_get(file, model[i].name, value, sizeof(value));

		there += model[i].there;
		assert_int_equal(len, model[i].there ? (ssize_t)model[i].len : -ENODATA);
		if (!model[i].there)
			continue;
		assert_memory_equal(value, model[i].value, model[i].len);
		assert_int_equal(xattr_get(file, model[i].name, NULL, 0), model[i].len);
		if (model[i].len > 1)
			assert_int_equal(xattr_get(file, model[i].name, value, model[i].len - 1),
					 -ERANGE);
	}
	assert_int_equal(core_of(file).xattrs, there);
	total = xattr_list(file, names, sizeof(names));
	assert_int_equal(xattr_list(file, NULL, 0), total);
	if (total > 1)
		assert_int_equal(xattr_list(file, names, (size_t)total - 1), -ERANGE);
	for (char *n = names; n < names + total; n += strlen(n) + 1, there--) {
		unsigned i = 0;

		while (i < NAMES && strcmp(n, model[i].name) != 0)
			i++;
		assert_true(i < NAMES && model[i].there);
	}
	assert_int_equal(there, 0);
}

static size_t random_len(void)
{
	static const size_t limits[] = {0, 1, 760, 1010, 1016, 1017, 2040, 65535, 65536};

	switch (random() % 3) {
	case 0:
		return limits[random() % (long)ARRAY_LEN(limits)];
	case 1:
		return (size_t)random() % 64;
	default:
		return (size_t)random() % (XATTR_VALUE_MAX + 1);
	}
}

static void step(void)
{
	static uint8_t value[XATTR_VALUE_MAX];
	unsigned i = (unsigned)random() % NAMES, flags = (unsigned)random() % 3;
	size_t len = random_len();
	int rc;

	if (random() % 3 == 0) {
		assert_int_equal(del(file, model[i].name), model[i].there ? 0 : -ENODATA);
		model[i].there = false;
		return;
	}
	for (size_t at = 0; at < len; at++)
		value[at] = (uint8_t)random();
	rc = set(file, model[i].name, value, len, flags);
	if (flags == XATTR_F_CREATE && model[i].there) {
		assert_int_equal(rc, -EEXIST);
	} else if (flags == XATTR_F_REPLACE && !model[i].there) {
		assert_int_equal(rc, -ENODATA);
	} else {
		assert_int_equal(rc, 0);
		memcpy(model[i].value, value, len);
		model[i].len = len;
		model[i].there = true;
	}
}

static void reopen(bool crash, unsigned seed)
{
	if (crash) {
		OK(jrn_force_blocking(world.fs, file->xid));
		world_crash(seed);
	} else {
		inode_put(file);
		world_remount();
	}
	OK(namei_lookup(world.root, "a", 1, &file));
}

static void attributes_agree_with_a_model(void **state)
{
	for (unsigned seed = 1; seed <= 4; seed++) {
		model_make();
		srandom(seed);
		for (unsigned n = 0; n < 400; n++) {
			step();
			if (n % 20 == 0)
				check_model();
			if (n % 100 == 99)
				reopen(n % 200 == 99, seed);
		}
		check_model();
		for (unsigned i = 0; i < NAMES; i++)
			del(file, model[i].name);
	}
	for (unsigned i = 0; i < NAMES; i++) {
		free(model[i].value);
		model[i].value = NULL;
	}
	assert_int_equal(core_of(file).xattrs, 0);
	assert_int_equal(xattr_list(file, NULL, 0), 0);
}

/* ---- edges ---- */

static void names_are_checked(void **state)
{
	char longest[300];

	assert_int_equal(set(file, "user.", "", 0, 0), -EINVAL);
	assert_int_equal(set(file, "user", "", 0, 0), -EOPNOTSUPP);
	assert_int_equal(set(file, "other.x", "", 0, 0), -EOPNOTSUPP);
	assert_int_equal(set(file, "system.x", "", 0, 0), -EOPNOTSUPP);
	assert_int_equal(xattr_get(file, "system.x", NULL, 0), -EOPNOTSUPP);
	memset(longest, 'a', sizeof(longest));
	memcpy(longest, "user.", 5);
	longest[256] = '\0';
	assert_int_equal(set(file, longest, "", 0, 0), -ERANGE);
	longest[255] = '\0';
	OK(set(file, longest, "v", 1, 0));
	assert_int_equal(xattr_get(file, longest, NULL, 0), 1);
	assert_int_equal(xattr_list(file, NULL, 0), 256);
	assert_int_equal(set(file, "user.big", longest, XATTR_VALUE_MAX + 1, 0), -E2BIG);
	assert_int_equal(set(file, "user.x", "", 0, 64), -EINVAL);
}

static void names_of_one_hash_are_told_apart(void **state)
{
	static uint8_t value[5000];
	struct trans t;
	char name[32];

	for (unsigned i = 0; i < 257; i++) {
		int rc;

		snprintf(name, sizeof(name), "user.%03u", i);
		memset(value, (int)i, sizeof(value));
		RETRY(rc, trans_begin(world.fs, &t, XATTR_TRANS_BLOCKS(sizeof(value), 0) + 1));
		OK(rc);
		OK(trans_join_inode(&t, file));
		rc = xattr_set_in_hashed(&t, file, 42, name, value, i % 2 ? sizeof(value) : 1, 0);
		if (i == 256) {
			assert_int_equal(rc, -ENOSPC);
			trans_cancel(&t);
			break;
		}
		OK(rc);
		OK(inode_write(&t, file));
		trans_commit(&t);
	}
	assert_int_equal(core_of(file).xattrs, 256);
	assert_int_equal(xattr_list(file, NULL, 0), 256 * 9);
	/* Overwriting finds the right one and adds none. */
	OK(trans_begin(world.fs, &t, XATTR_TRANS_BLOCKS(10, sizeof(value)) + 1));
	OK(xattr_set_in_hashed(&t, file, 42, "user.101", "0123456789", 10, XATTR_F_REPLACE));
	assert_int_equal(xattr_set_in_hashed(&t, file, 42, "user.102", "", 0, XATTR_F_CREATE),
			 -EEXIST);
	OK(inode_write(&t, file));
	trans_commit(&t);
	assert_int_equal(core_of(file).xattrs, 256);
}

static void setting_touches_ctime_alone(void **state)
{
	struct inode_core before = core_of(file), after;

	OK(set(file, "user.a", "v", 1, 0));
	after = core_of(file);
	assert_int_equal(after.mtime.nsec, before.mtime.nsec);
	assert_true(after.ctime.sec > before.ctime.sec || after.ctime.nsec > before.ctime.nsec);
	assert_true(after.change > before.change);
}

static void a_deleted_file_takes_its_attributes_along(void **state)
{
	static uint8_t value[XATTR_VALUE_MAX];
	struct alloc_space before, after;
	struct inode *in;

	OK(jrn_force_blocking(world.fs, file->xid));
	alloc_statfs(world.fs, &before);
	in = make_file(world.root, "b");
	for (unsigned i = 0; i < 20; i++) {
		char name[16];

		snprintf(name, sizeof(name), "user.%u", i);
		OK(set(in, name, value, sizeof(value), 0));
	}
	OK(namei_unlink(world.root, "b", 1, NULL));
	inode_put(in);
	reaper_drain(world.fs);
	alloc_statfs(world.fs, &after);
	/* But for a node or two of trees that have become higher. */
	assert_true(after.free + 8 >= before.free);
}

/* A full device: -ENOSPC, the old value stays whole, removing works. */
static void a_full_device_keeps_the_old_value(void **state)
{
	static uint8_t value[XATTR_VALUE_MAX], back[XATTR_VALUE_MAX];
	unsigned count = 0;
	char name[32];
	int rc;

	inode_put(file);
	world_unmount();
	sim_destroy(world.sim);
	world_format(DEVICE_MIN_BLOCKS * 4096ull, JOURNAL_MIN_BLOCKS);
	file = make_file(world.root, "a");
	memset(value, 1, sizeof(value));
	OK(set(file, "user.first", value, 100, 0));
	/* Large values, then small ones into what they left. */
	for (size_t len = sizeof(value); len > 0; len = len > 1000 ? 1000 : 0) {
		do {
			snprintf(name, sizeof(name), "user.%u", count);
			rc = set(file, name, value, len, 0);
			count += !rc;
		} while (!rc);
		assert_int_equal(rc, -ENOSPC);
	}
	assert_true(count > 50);
	memset(value, 2, sizeof(value));
	rc = set(file, "user.first", value, sizeof(value), 0);
	assert_int_equal(rc, -ENOSPC);
	assert_int_equal(xattr_get(file, "user.first", back, sizeof(back)), 100);
	for (unsigned i = 0; i < 100; i++)
		assert_int_equal(back[i], 1);
	assert_int_equal(xattr_get(file, name, NULL, 0), -ENODATA);
	for (unsigned i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "user.%u", i);
		OK(del(file, name));
	}
	OK(set(file, "user.first", value, sizeof(value), 0));
	assert_int_equal(core_of(file).xattrs, 1);
}

/* ---- ACLs ---- */

#define ACCESS "system.posix_acl_access"
#define DEFAULT "system.posix_acl_default"

struct entry { uint16_t tag, perm; uint32_t id; };
enum { USER_OBJ = 1, USER = 2, GROUP_OBJ = 4, GROUP = 8, MASK = 16, OTHER = 32 };

static size_t build(uint8_t *out, const struct entry *e, unsigned n)
{
	le32_t version = put32(2);

	memcpy(out, &version, 4);
	for (unsigned i = 0; i < n; i++) {
		le16_t tag = put16(e[i].tag), perm = put16(e[i].perm);
		le32_t id = put32(e[i].id);

		memcpy(out + 4 + 8 * i, &tag, 2);
		memcpy(out + 6 + 8 * i, &perm, 2);
		memcpy(out + 8 + 8 * i, &id, 4);
	}
	return 4 + 8 * n;
}

static const struct entry plain[] = {{USER_OBJ, 6, 0}, {GROUP_OBJ, 4, 0}, {OTHER, 0, 0}};
static const struct entry named[] = {{USER_OBJ, 7, 0}, {USER, 6, 1000}, {GROUP_OBJ, 5, 0},
				     {MASK, 7, 0}, {OTHER, 1, 0}};

static void acls_are_verified(void **state)
{
	uint8_t acl[256];
	size_t len = build(acl, named, 5);
	struct entry e[5];

	assert_int_equal(acl_verify(acl, len), 0);
	assert_int_equal(acl_verify(acl, len - 1), -EINVAL);
	assert_int_equal(acl_verify(acl, len - 8), -EINVAL); /* others missing */
	assert_int_equal(acl_verify(acl, 3), -EINVAL);
	assert_int_equal(acl_verify(acl, 4), 0);
	acl[0] = 1;
	assert_int_equal(acl_verify(acl, len), -EINVAL);
	for (unsigned bad = 0; bad < 5; bad++) {
		memcpy(e, named, sizeof(e));
		if (bad == 0)
			e[1].perm = 8;
		else if (bad == 1)
			e[1].id = UINT32_MAX;
		else if (bad == 2)
			e[3].tag = USER; /* no mask, and out of order */
		else if (bad == 3)
			e[1].tag = USER_OBJ;
		else
			e[1].tag = 3;
		len = build(acl, e, 5);
		assert_int_equal(acl_verify(acl, len), -EINVAL);
	}
	assert_int_equal(set(file, ACCESS, acl, len, 0), -EINVAL);
}

static void an_access_acl_and_the_mode_agree(void **state)
{
	struct attr_change ch = {.valid = ATTR_MODE, .mode = 0640};
	uint8_t acl[256], back[256];
	size_t len = build(acl, named, 5);

	OK(set(file, ACCESS, acl, len, 0));
	assert_int_equal(core_of(file).mode, S_IFREG | 0771);
	assert_true(core_of(file).flags & INODE_F_ACL);
	assert_int_equal(xattr_get(file, ACCESS, back, sizeof(back)), len);
	assert_memory_equal(acl, back, len);
	/* chmod: owner, mask, others; the owning group's entry stays. */
	OK(namei_setattr(file, &ch));
	assert_int_equal(xattr_get(file, ACCESS, back, sizeof(back)), len);
	assert_int_equal(back[4 + 2], 6);
	assert_int_equal(back[4 + 16 + 2], 5);
	assert_int_equal(back[4 + 24 + 2], 4);
	assert_int_equal(back[4 + 32 + 2], 0);
	/* What the mode can say is not stored. */
	len = build(acl, plain, 3);
	OK(set(file, ACCESS, acl, len, 0));
	assert_int_equal(core_of(file).mode, S_IFREG | 0640);
	assert_false(core_of(file).flags & INODE_F_ACL);
	assert_int_equal(xattr_get(file, ACCESS, NULL, 0), -ENODATA);
	assert_int_equal(core_of(file).xattrs, 0);
	OK(del(file, ACCESS));
}

static void setting_an_acl_can_clear_setgid(void **state)
{
	struct attr_change ch = {.valid = ATTR_MODE, .mode = 02755};
	uint8_t acl[256];
	size_t len = build(acl, named, 5);

	OK(namei_setattr(file, &ch));
	OK(set(file, ACCESS, acl, len, 0));
	assert_int_equal(core_of(file).mode, S_IFREG | 02771);
	OK(set(file, ACCESS, acl, len, XATTR_F_KILL_SGID));
	assert_int_equal(core_of(file).mode, S_IFREG | 0771);
}

static void default_acls_are_inherited(void **state)
{
	struct inode *dir = make_dir(world.root, "d"), *in;
	struct cred cred = {5, 6, 077};
	uint8_t acl[256], back[256];
	size_t len = build(acl, named, 5);

	assert_int_equal(set(file, DEFAULT, acl, len, 0), -EACCES);
	OK(set(dir, DEFAULT, acl, len, 0));
	assert_int_equal(core_of(dir).mode, S_IFDIR | 0755);
	OK(namei_create(dir, "f", 1, S_IFREG | 0666, 0, &cred, &in));
	/* The umask does not count where there is a default ACL; group bits are its mask. */
	assert_int_equal(core_of(in).mode, S_IFREG | 0660);
	assert_int_equal(xattr_get(in, ACCESS, back, sizeof(back)), len);
	assert_int_equal(back[4 + 24 + 2], 6);
	assert_int_equal(xattr_get(in, DEFAULT, NULL, 0), -ENODATA);
	inode_put(in);
	OK(namei_mkdir(dir, "s", 1, 0777, &cred, &in));
	assert_int_equal(core_of(in).mode, S_IFDIR | 0771);
	assert_int_equal(xattr_get(in, DEFAULT, back, sizeof(back)), len);
	assert_memory_equal(acl, back, len);
	inode_put(in);
	OK(namei_symlink(dir, "l", 1, "x", 1, &cred, &in));
	assert_int_equal(core_of(in).mode, S_IFLNK | 0777);
	assert_int_equal(set(in, ACCESS, acl, len, 0), -EOPNOTSUPP);
	inode_put(in);
	OK(namei_tmpfile(dir, 0666, &cred, &in));
	assert_int_equal(core_of(in).mode, S_IFREG | 0660);
	inode_put(in);
	/* A default ACL without named entries gives modes only. */
	len = build(acl, plain, 3);
	OK(set(dir, DEFAULT, acl, len, 0));
	OK(namei_create(dir, "p", 1, S_IFREG | 0666, 0, &cred, &in));
	assert_int_equal(core_of(in).mode, S_IFREG | 0640);
	assert_int_equal(core_of(in).xattrs, 0);
	inode_put(in);
	OK(del(dir, DEFAULT));
	assert_false(core_of(dir).flags & INODE_F_DEFACL);
	OK(namei_create(dir, "q", 1, S_IFREG | 0666, 0, &cred, &in));
	assert_int_equal(core_of(in).mode, S_IFREG | 0600);
	inode_put(in);
	OK(del(dir, DEFAULT));
	inode_put(dir);
}

static void the_largest_acl_is_inherited(void **state)
{
	struct inode *dir = make_dir(world.root, "d"), *in;
	static uint8_t acl[ACL_BYTES_MAX + 8], back[ACL_BYTES_MAX];
	static struct entry e[ACL_ENTRIES_MAX + 1];
	size_t len;

	e[0] = (struct entry){USER_OBJ, 7, 0};
	for (unsigned i = 1; i < ACL_ENTRIES_MAX - 3; i++)
		e[i] = (struct entry){USER, 7, i};
	e[ACL_ENTRIES_MAX - 3] = (struct entry){GROUP_OBJ, 5, 0};
	e[ACL_ENTRIES_MAX - 2] = (struct entry){MASK, 7, 0};
	e[ACL_ENTRIES_MAX - 1] = (struct entry){OTHER, 5, 0};
	len = build(acl, e, ACL_ENTRIES_MAX);
	OK(set(dir, DEFAULT, acl, len, 0));
	for (unsigned i = 0; i < 20; i++) {
		char name[8];
		int rc;

		snprintf(name, sizeof(name), "%u", i);
		RETRY(rc, namei_mkdir(dir, name, strlen(name), 0777, &root_cred, &in));
		OK(rc);
		assert_int_equal(xattr_get(in, DEFAULT, back, sizeof(back)), len);
		assert_memory_equal(acl, back, len);
		assert_int_equal(xattr_get(in, ACCESS, back, sizeof(back)), len);
		inode_put(in);
	}
	e[ACL_ENTRIES_MAX] = e[ACL_ENTRIES_MAX - 1];
	e[ACL_ENTRIES_MAX - 1] = (struct entry){MASK, 7, 0};
	len = build(acl, e, ACL_ENTRIES_MAX + 1);
	assert_int_equal(set(dir, DEFAULT, acl, len, 0), -EINVAL);
	inode_put(dir);
}

int main(void)
{
#define XATTR_TEST(f) cmocka_unit_test_setup_teardown(f, setup_file, teardown_file)
	const struct CMUnitTest tests[] = {
		XATTR_TEST(attributes_agree_with_a_model),
		XATTR_TEST(names_are_checked),
		XATTR_TEST(names_of_one_hash_are_told_apart),
		XATTR_TEST(setting_touches_ctime_alone),
		XATTR_TEST(a_deleted_file_takes_its_attributes_along),
		XATTR_TEST(a_full_device_keeps_the_old_value),
		XATTR_TEST(acls_are_verified),
		XATTR_TEST(an_access_acl_and_the_mode_agree),
		XATTR_TEST(setting_an_acl_can_clear_setgid),
		XATTR_TEST(default_acls_are_inherited),
		XATTR_TEST(the_largest_acl_is_inherited),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
