/* SPDX-License-Identifier: MIT
 *
 * test_rider.c - riders: every operation that carries one writes it with what it did, one that
 * fails writes none, and neither other threads nor other operations do. The teardown looks for
 * transactions that changed more blocks than they had reserved.
 */
#include <pthread.h>

#include "names_fixture.h"

#include "nfs_record.h"
#include "rider.h"
#include "tree_check.h"

static struct rider make_rider(unsigned slot, unsigned marks)
{
	struct rider r = { .id = NFS_RIDER_KEY(5, slot) };

	r.record.session = put64(5);
	r.record.slot = put32(slot);
	r.record.sequence = put32(77);
	r.record.count = put32(marks);
	for (unsigned i = 0; i < marks; i++)
		r.record.marks[i].index = put16((uint16_t)i);
	return r;
}

/* What is stored of a slot; false: nothing. */
static bool stored(unsigned slot, struct rider_disk *out)
{
	uint64_t id = NFS_RIDER_KEY(5, slot), found = id;
	ssize_t n = nfs_record_next(world.fs, &found, out, sizeof(*out));

	if (n == -ENOENT || found != id)
		return false;
	assert_int_equal(n, sizeof(*out));
	return true;
}

static void expect_written(const struct rider *r, unsigned slot, const struct inode *object,
			   const struct inode *from, const struct inode *to)
{
	unsigned last = get32(r->record.count) - 1;
	const struct rider_mark_disk *mark;
	struct rider_disk found;

	assert_true(r->written);
	assert_true(stored(slot, &found));
	assert_memory_equal(&found, &r->record, sizeof(found));
	mark = &found.marks[last];
	assert_int_equal(get64(mark->ino), object->ino);
	assert_int_equal(get32(mark->generation), object->core.generation);
	assert_int_equal(get64(mark->places[0].after), from->core.change);
	assert_int_equal(get64(mark->places[0].after_sec), from->core.ctime.sec);
	assert_int_equal(get32(mark->places[0].after_ns), from->core.ctime.nsec);
	assert_int_equal(get64(mark->places[1].after), to ? to->core.change : 0);
	for (unsigned i = 0; i < last; i++)
		assert_int_equal(get64(found.marks[i].ino), 0);
}

/* One operation with a rider; the journal may have to make room first. */
#define RIDE(r, rc, call)                                                                   \
	do {                                                                                \
		rider_set(&(r));                                                            \
		RETRY(rc, call);                                                            \
		rider_set(NULL);                                                            \
	} while (0)

static void each_operation(void **state)
{
	struct inode *root = world.root, *dir = make_dir(root, "dir"), *made, *other;
	struct attr_change change = { .valid = ATTR_MODE, .mode = 0600 };
	struct rider r = make_rider(0, 1);
	int rc;

	RIDE(r, rc, namei_create(root, "file", 4, S_IFREG | 0644, 0, &root_cred, &made));
	OK(rc);
	expect_written(&r, 0, made, root, NULL);
	r = make_rider(0, 2);
	RIDE(r, rc, namei_link(made, dir, "link", 4));
	OK(rc);
	expect_written(&r, 0, made, dir, NULL);
	RIDE(r, rc, namei_rename(dir, "link", 4, root, "moved", 5, 0, NULL));
	OK(rc);
	expect_written(&r, 0, made, dir, root);
	r = make_rider(0, 3);
	RIDE(r, rc, namei_setattr(made, &change));
	OK(rc);
	expect_written(&r, 0, made, made, NULL);
	RIDE(r, rc, xattr_set(made, "user.x", "value", 5, XATTR_F_CREATE));
	OK(rc);
	expect_written(&r, 0, made, made, NULL);
	RIDE(r, rc, xattr_remove(made, "user.x"));
	OK(rc);
	expect_written(&r, 0, made, made, NULL);
	r = make_rider(0, RIDER_MARKS);
	RIDE(r, rc, namei_unlink(root, "file", 4, NULL));
	OK(rc);
	expect_written(&r, 0, made, root, NULL);
	r = make_rider(1, 1);
	RIDE(r, rc, namei_mkdir(root, "sub", 3, 0755, &root_cred, &other));
	OK(rc);
	expect_written(&r, 1, other, root, NULL);
	r = make_rider(2, 1);
	RIDE(r, rc, namei_rmdir(root, "sub", 3, NULL));
	OK(rc);
	expect_written(&r, 2, other, root, NULL);
	inode_put(other);
	r = make_rider(3, 1);
	RIDE(r, rc, namei_symlink(dir, "symlink", 7, "to", 2, &root_cred, &other));
	OK(rc);
	expect_written(&r, 3, other, dir, NULL);
	inode_put(other);
	inode_put(made);
	inode_put(dir);
	check_tree(world.fs, fs_tree(world.fs, TREE_NFS_CLIENT), NULL);
}

static void failures(void **state)
{
	struct inode *root = world.root, *dir = make_dir(root, "dir"), *made = NULL;
	struct rider r = make_rider(9, 1);
	struct rider_disk found;
	int rc;

	RIDE(r, rc, namei_mkdir(root, "dir", 3, 0755, &root_cred, &made));
	assert_int_equal(rc, -EEXIST);
	RIDE(r, rc, namei_unlink(root, "none", 4, NULL));
	assert_int_equal(rc, -ENOENT);
	RIDE(r, rc, namei_rename(root, "none", 4, root, "new", 3, 0, NULL));
	assert_int_equal(rc, -ENOENT);
	RIDE(r, rc, namei_link(dir, root, "new", 3));
	assert_int_equal(rc, -EPERM);
	RIDE(r, rc, xattr_remove(dir, "user.none"));
	assert_int_equal(rc, -ENODATA);
	assert_false(r.written);
	assert_false(stored(9, &found));
	/* A file without a name is nobody's answer. */
	RIDE(r, rc, namei_tmpfile(root, 0600, &root_cred, &made));
	OK(rc);
	assert_false(r.written);
	inode_put(made);
	inode_put(dir);
}

static void *without(void *arg)
{
	inode_put(make_file(world.root, arg));
	return NULL;
}

static void one_thread_alone(void **state)
{
	struct rider r = make_rider(1, 1);
	struct rider_disk found;
	pthread_t thread;

	rider_set(&r);
	assert_int_equal(pthread_create(&thread, NULL, without, "other"), 0);
	pthread_join(thread, NULL);
	rider_set(NULL);
	inode_put(make_file(world.root, "mine"));
	assert_false(r.written);
	assert_false(stored(1, &found));
}

/* So many that their leaves are split, and overwritten, in operations of every size. */
static void many_slots(void **state)
{
	struct inode *root = world.root, *made;
	char name[32];
	int rc;

	for (unsigned round = 0; round < 3; round++)
		for (unsigned slot = 0; slot < 300; slot++) {
			struct rider r = make_rider((slot * 37) % 300, 1 + slot % RIDER_MARKS);
			int len = snprintf(name, sizeof(name), "%u-%u", round, slot);

			RIDE(r, rc, namei_mkdir(root, name, (size_t)len, 0755, &root_cred, &made));
			OK(rc);
			expect_written(&r, (slot * 37) % 300, made, root, NULL);
			inode_put(made);
			r = make_rider((slot * 91) % 300, 1);
			RIDE(r, rc, namei_rmdir(root, name, (size_t)len, NULL));
			OK(rc);
			assert_true(r.written);
		}
	reaper_drain(world.fs);
	check_tree(world.fs, fs_tree(world.fs, TREE_NFS_CLIENT), NULL);
	world_remount();
	reaper_drain(world.fs);
	check_space(world.fs, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(each_operation, setup, teardown),
		cmocka_unit_test_setup_teardown(failures, setup, teardown),
		cmocka_unit_test_setup_teardown(one_thread_alone, setup, teardown),
		cmocka_unit_test_setup_teardown(many_slots, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
