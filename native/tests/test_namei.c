/* SPDX-License-Identifier: MIT
 *
 * test_namei.c - the rules of names and attributes one by one, a full device, a removed directory,
 * threads. The random operations against a model are in test_namei_model.c.
 */
#include "names_fixture.h"

#include <sys/sysmacros.h>

static int unlink_name(struct inode *dir, const char *name)
{
	int rc;

	RETRY(rc, namei_unlink(dir, name, strlen(name), NULL));
	return rc;
}

static int rmdir_name(struct inode *dir, const char *name)
{
	int rc;

	RETRY(rc, namei_rmdir(dir, name, strlen(name), NULL));
	return rc;
}

static int rename_name(struct inode *from, const char *a, struct inode *to, const char *b,
		       unsigned flags)
{
	int rc;

	RETRY(rc, namei_rename(from, a, strlen(a), to, b, strlen(b), flags, NULL));
	return rc;
}

static int link_name(struct inode *in, struct inode *dir, const char *name)
{
	int rc;

	RETRY(rc, namei_link(in, dir, name, strlen(name)));
	return rc;
}

static uint64_t inode_count(void)
{
	uint64_t n;

	reaper_drain(world.fs);
	fs_rdlock(world.fs);
	n = get64(fs_root(world.fs)->inodes);
	fs_unlock(world.fs);
	return n;
}

/* ---- lookup and creation ---- */

static void dot_and_dotdot(void **state)
{
	struct inode *a = make_dir(world.root, "a"), *b = make_dir(a, "b"), *in;

	assert_int_equal(number_of(b, "."), b->ino);
	assert_int_equal(number_of(b, ".."), a->ino);
	assert_int_equal(number_of(world.root, ".."), world.root->ino);
	OK(rename_name(a, "b", world.root, "c", 0));
	assert_int_equal(number_of(b, ".."), world.root->ino);
	assert_int_equal(namei_lookup(b, "x", 1, &in), -ENOENT);
	assert_int_equal(namei_create(b, ".", 1, S_IFREG, 0, &root_cred, &in), -EINVAL);
	assert_int_equal(namei_mkdir(b, "..", 2, 0, &root_cred, &in), -EINVAL);
	inode_put(a);
	inode_put(b);
}

static void every_type_is_kept(void **state)
{
	static const uint32_t types[] = {S_IFREG, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK};
	struct inode *in;
	struct cred cred = {7, 8, 022};
	char name[] = "0";

	for (unsigned i = 0; i < ARRAY_LEN(types); i++, name[0]++) {
		OK(namei_create(world.root, name, 1, types[i] | 04777, makedev(8, 300), &cred,
				&in));
		inode_put(in);
	}
	assert_int_equal(namei_create(world.root, "d", 1, S_IFDIR | 0755, 0, &cred, &in), -EINVAL);
	assert_int_equal(namei_create(world.root, "0", 1, S_IFREG, 0, &cred, &in), -EEXIST);
	world_remount();
	name[0] = '0';
	for (unsigned i = 0; i < ARRAY_LEN(types); i++, name[0]++) {
		struct inode_core core;

		OK(namei_lookup(world.root, name, 1, &in));
		core = core_of(in);
		assert_int_equal(core.mode, types[i] | 04755);
		assert_int_equal(core.uid, 7);
		assert_int_equal(core.gid, 8);
		assert_int_equal(core.nlink, 1);
		assert_int_equal(core.rdev, i >= 3 ? makedev(8, 300) : 0);
		assert_true(core.btime.sec > 0 && core.btime.sec == core.ctime.sec);
		inode_put(in);
	}
}

static void setgid_directories_hand_down_their_group(void **state)
{
	struct inode *dir = make_dir(world.root, "d"), *in;
	struct attr_change ch = {.valid = ATTR_MODE | ATTR_GID, .mode = 02775, .gid = 50};
	struct cred cred = {7, 8, 022};

	OK(namei_setattr(dir, &ch));
	assert_int_equal(core_of(dir).mode, S_IFDIR | 02775);
	OK(namei_create(dir, "f", 1, S_IFREG | 0644, 0, &cred, &in));
	assert_int_equal(core_of(in).gid, 50);
	assert_int_equal(core_of(in).mode, S_IFREG | 0644);
	inode_put(in);
	OK(namei_mkdir(dir, "s", 1, 0755, &cred, &in));
	assert_int_equal(core_of(in).gid, 50);
	assert_int_equal(core_of(in).mode, S_IFDIR | 02755);
	inode_put(in);
	OK(namei_symlink(dir, "l", 1, "t", 1, &cred, &in));
	assert_int_equal(core_of(in).gid, 50);
	inode_put(in);
	inode_put(dir);
}

static void symlinks_of_all_lengths(void **state)
{
	static const size_t lens[] = {1, 2, 1023, 1024, 1025, 2048, 3073, 4095};
	char target[SYMLINK_MAX + 2], back[SYMLINK_MAX + 1], name[8];
	struct inode *in;

	for (size_t i = 0; i < sizeof(target); i++)
		target[i] = (char)('a' + i % 26);
	for (unsigned i = 0; i < ARRAY_LEN(lens); i++) {
		snprintf(name, sizeof(name), "%zu", lens[i]);
		OK(namei_symlink(world.root, name, strlen(name), target, lens[i], &root_cred, &in));
		inode_put(in);
	}
	assert_int_equal(namei_symlink(world.root, "x", 1, target, SYMLINK_MAX + 1, &root_cred,
				       &in), -ENAMETOOLONG);
	assert_int_equal(namei_symlink(world.root, "x", 1, target, 0, &root_cred, &in), -ENOENT);
	world_remount();
	for (unsigned i = 0; i < ARRAY_LEN(lens); i++) {
		snprintf(name, sizeof(name), "%zu", lens[i]);
		OK(namei_lookup(world.root, name, strlen(name), &in));
		assert_int_equal(core_of(in).size, lens[i]);
		assert_int_equal(namei_readlink(in, back, sizeof(back)), lens[i]);
		assert_memory_equal(back, target, lens[i]);
		assert_int_equal(namei_readlink(in, back, 1), 1);
		inode_put(in);
	}
	assert_int_equal(namei_readlink(world.root, back, sizeof(back)), -EINVAL);
	for (unsigned i = 0; i < ARRAY_LEN(lens); i++) {
		snprintf(name, sizeof(name), "%zu", lens[i]);
		OK(unlink_name(world.root, name));
	}
	assert_int_equal(inode_count(), 1);
}

static void a_removed_directory_takes_nothing(void **state)
{
	struct inode *dir = make_dir(world.root, "d"), *f = make_file(world.root, "f"), *in;

	OK(rmdir_name(world.root, "d"));
	assert_int_equal(core_of(dir).nlink, 0);
	assert_int_equal(core_of(world.root).nlink, 2);
	assert_int_equal(namei_create(dir, "a", 1, S_IFREG, 0, &root_cred, &in), -ENOENT);
	assert_int_equal(namei_mkdir(dir, "a", 1, 0755, &root_cred, &in), -ENOENT);
	assert_int_equal(namei_tmpfile(dir, 0600, &root_cred, &in), -ENOENT);
	assert_int_equal(namei_lookup(dir, "..", 2, &in), -ENOENT);
	assert_int_equal(link_name(f, dir, "a"), -ENOENT);
	assert_int_equal(rename_name(world.root, "f", dir, "a", 0), -ENOENT);
	assert_int_equal(rename_name(dir, "a", world.root, "a", 0), -ENOENT);
	assert_int_equal(namei_create(f, "a", 1, S_IFREG, 0, &root_cred, &in), -ENOTDIR);
	assert_int_equal(namei_lookup(f, "a", 1, &in), -ENOTDIR);
	assert_int_equal(inode_count(), 3);
	inode_put(dir);
	assert_int_equal(inode_count(), 2);
	inode_put(f);
}

/* ---- links ---- */

static void tmpfiles_can_be_linked_once_made(void **state)
{
	struct inode *in, *lost, *gone;

	OK(namei_tmpfile(world.root, 0644, &root_cred, &in));
	OK(namei_tmpfile(world.root, 0644, &root_cred, &lost));
	assert_int_equal(core_of(in).nlink, 0);
	assert_int_equal(inode_count(), 3);
	OK(link_name(in, world.root, "t"));
	assert_int_equal(core_of(in).nlink, 1);
	assert_int_equal(link_name(in, world.root, "t"), -EEXIST);
	OK(link_name(in, world.root, "u"));
	OK(jrn_force_blocking(world.fs, in->xid));
	world_crash(1);
	assert_int_equal(inode_count(), 2); /* `lost` is gone */
	OK(namei_lookup(world.root, "t", 1, &in));
	assert_int_equal(core_of(in).nlink, 2);
	assert_int_equal(number_of(world.root, "u"), in->ino);
	/* A file whose names are gone gets none. */
	gone = make_file(world.root, "g");
	OK(unlink_name(world.root, "g"));
	assert_int_equal(link_name(gone, world.root, "h"), -ENOENT);
	inode_put(gone);
	OK(unlink_name(world.root, "t"));
	OK(unlink_name(world.root, "u"));
	assert_int_equal(link_name(in, world.root, "h"), -ENOENT);
	inode_put(in);
	assert_int_equal(inode_count(), 1);
}

static void set_nlink(struct inode *in, uint32_t nlink)
{
	struct trans t;

	OK(trans_begin(world.fs, &t, 1));
	OK(trans_join_inode(&t, in));
	in->core.nlink = nlink;
	if (inode_is_dir(in))
		in->core.subdirs = nlink - 2;
	OK(inode_write(&t, in));
	trans_commit(&t);
}

static void links_have_a_limit(void **state)
{
	struct inode *in = make_file(world.root, "a"), *dir = make_dir(world.root, "d"), *sub;

	assert_int_equal(link_name(dir, world.root, "e"), -EPERM);
	set_nlink(in, 0x7fffffff);
	assert_int_equal(link_name(in, world.root, "b"), -EMLINK);
	set_nlink(in, 1);
	OK(link_name(in, world.root, "b"));
	set_nlink(dir, 0x7fffffff);
	assert_int_equal(namei_mkdir(dir, "s", 1, 0755, &root_cred, &sub), -EMLINK);
	assert_int_equal(rename_name(world.root, "d", world.root, "e", 0), 0);
	set_nlink(dir, 2);
	OK(namei_mkdir(dir, "s", 1, 0755, &root_cred, &sub));
	inode_put(sub);
	inode_put(in);
	inode_put(dir);
}

/* ---- rename ---- */

static void rename_says_who_lost_its_name(void **state)
{
	struct inode *a = make_file(world.root, "a"), *b = make_file(world.root, "b"), *victim = a;

	OK(namei_rename(world.root, "a", 1, world.root, "c", 1, 0, &victim));
	assert_null(victim);
	OK(namei_rename(world.root, "c", 1, world.root, "b", 1, 0, &victim));
	assert_ptr_equal(victim, b);
	assert_int_equal(core_of(b).nlink, 0);
	inode_put(victim);
	OK(link_name(a, world.root, "d"));
	/* the same file: both stay */
	OK(namei_rename(world.root, "b", 1, world.root, "d", 1, 0, &victim));
	assert_null(victim);
	assert_int_equal(core_of(a).nlink, 2);
	assert_int_equal(namei_rename(world.root, "b", 1, world.root, "d", 1, 4, &victim), -EINVAL);
	assert_int_equal(namei_rename(world.root, "b", 1, world.root, "d", 1, 3, &victim), -EINVAL);
	OK(namei_unlink(world.root, "b", 1, &victim));
	assert_ptr_equal(victim, a);
	inode_put(victim);
	inode_put(a);
	inode_put(b);
	assert_int_equal(inode_count(), 2);
}

/* A server that looked at an inode changes that one, or nothing. */
static void others_have_the_name_by_now(void **state)
{
	struct inode *a = make_file(world.root, "a"), *b = make_file(world.root, "b");
	struct inode *d = make_dir(world.root, "d"), *victim;
	struct inode *root = world.root;

	assert_int_equal(namei_remove_meant(root, "a", 1, false, b->ino, NULL), -EAGAIN);
	assert_int_equal(namei_remove_meant(root, "d", 1, true, b->ino, NULL), -EAGAIN);
	assert_int_equal(namei_remove_meant(root, "d", 1, false, a->ino, NULL), -EAGAIN);
	assert_int_equal(namei_remove_meant(root, "x", 1, false, a->ino, NULL), -ENOENT);
	assert_int_equal(namei_rename_meant(root, "a", 1, d->ino, root, "b", 1, b->ino, 0, NULL), -EAGAIN);
	assert_int_equal(namei_rename_meant(root, "a", 1, a->ino, root, "b", 1, d->ino, 0, NULL), -EAGAIN);
	assert_int_equal(namei_rename_meant(root, "a", 1, a->ino, root, "b", 1, NAMEI_NOBODY, 0, NULL), -EAGAIN);
	assert_int_equal(number_of(root, "a"), a->ino);
	assert_int_equal(number_of(root, "b"), b->ino);
	/* A victim that is gone is no reason to refuse. */
	OK(namei_rename_meant(root, "a", 1, a->ino, root, "c", 1, b->ino, 0, &victim));
	assert_null(victim);
	OK(namei_rename_meant(root, "c", 1, a->ino, root, "b", 1, b->ino, 0, &victim));
	assert_ptr_equal(victim, b);
	inode_put(victim);
	OK(namei_remove_meant(root, "b", 1, false, a->ino, NULL));
	OK(namei_remove_meant(root, "d", 1, true, d->ino, NULL));
	inode_put(a);
	inode_put(b);
	inode_put(d);
}

static void exchange_of_directories_swaps_parents(void **state)
{
	struct inode *p = make_dir(world.root, "p"), *q = make_dir(world.root, "q");
	struct inode *a = make_dir(p, "a"), *b = make_dir(q, "b"), *f = make_file(q, "f");

	OK(rename_name(p, "a", q, "b", RENAME_F_EXCHANGE));
	assert_int_equal(number_of(a, ".."), q->ino);
	assert_int_equal(number_of(b, ".."), p->ino);
	assert_int_equal(core_of(p).nlink, 3);
	assert_int_equal(core_of(q).nlink, 3);
	/* A directory for a file: the link counts move. */
	OK(rename_name(p, "a", q, "f", RENAME_F_EXCHANGE));
	assert_int_equal(core_of(p).nlink, 2);
	assert_int_equal(core_of(q).nlink, 4);
	assert_int_equal(number_of(p, "a"), f->ino);
	assert_int_equal(number_of(b, ".."), q->ino);
	/* Nothing ends up below itself. */
	assert_int_equal(rename_name(world.root, "q", q, "b", RENAME_F_EXCHANGE), -EINVAL);
	assert_int_equal(rename_name(q, "b", world.root, "q", RENAME_F_EXCHANGE), -EINVAL);
	assert_int_equal(rename_name(world.root, "q", a, "x", 0), -EINVAL);
	assert_int_equal(rename_name(world.root, "q", q, "x", 0), -EINVAL);
	assert_int_equal(rename_name(world.root, "q", world.root, "x", RENAME_F_EXCHANGE), -ENOENT);
	inode_put(p);
	inode_put(q);
	inode_put(a);
	inode_put(b);
	inode_put(f);
}

/* ---- attributes ---- */

static void chown_takes_privileges_away(void **state)
{
	struct inode *in = make_file(world.root, "a"), *dir = make_dir(world.root, "d");
	struct attr_change mode = {.valid = ATTR_MODE, .mode = 06755}, owner = {.valid = ATTR_UID,
										.uid = 5};
	struct attr_change kill = {.valid = ATTR_KILL_PRIV};
	struct timestamp ctime;

	OK(xattr_set(in, "security.capability", "01234567890123456789", 20, 0));
	OK(xattr_set(in, "security.other", "x", 1, 0));
	OK(namei_setattr(in, &mode));
	OK(namei_setattr(in, &owner));
	assert_int_equal(core_of(in).mode, S_IFREG | 0755);
	assert_int_equal(core_of(in).uid, 5);
	assert_int_equal(xattr_get(in, "security.capability", NULL, 0), -ENODATA);
	assert_int_equal(xattr_get(in, "security.other", NULL, 0), 1);
	/* Setgid without group execution is mandatory locking's, not a privilege. */
	mode.mode = 06745;
	OK(namei_setattr(in, &mode));
	OK(namei_setattr(in, &kill));
	assert_int_equal(core_of(in).mode, S_IFREG | 02745);
	ctime = core_of(in).ctime;
	OK(namei_setattr(in, &kill)); /* nothing to do, nothing done */
	assert_int_equal(core_of(in).ctime.nsec, ctime.nsec);
	OK(xattr_set(in, "security.capability", "0", 1, 0));
	OK(namei_setattr(in, &kill));
	assert_int_equal(xattr_get(in, "security.capability", NULL, 0), -ENODATA);
	mode.mode = 06755;
	OK(namei_setattr(dir, &mode));
	OK(namei_setattr(dir, &owner));
	assert_int_equal(core_of(dir).mode, S_IFDIR | 06755);
	inode_put(in);
	inode_put(dir);
}

static void setattr_sets_what_is_asked(void **state)
{
	struct inode *in = make_file(world.root, "a");
	struct attr_change ch = {.valid = ATTR_ATIME | ATTR_MTIME | ATTR_GID, .gid = 9,
				 .atime = {-5, 999999999}, .mtime = {1ll << 40, 1}};
	struct inode_core core;
	uint64_t change = core_of(in).change;

	OK(namei_setattr(in, &ch));
	OK(jrn_force_blocking(world.fs, in->xid));
	world_crash(2);
	OK(namei_lookup(world.root, "a", 1, &in));
	core = core_of(in);
	assert_int_equal(core.atime.sec, -5);
	assert_int_equal(core.atime.nsec, 999999999);
	assert_int_equal(core.mtime.sec, 1ll << 40);
	assert_int_equal(core.gid, 9);
	assert_int_equal(core.mode, S_IFREG | 0644);
	assert_true(core.change > change);
	ch = (struct attr_change){.valid = ATTR_ATIME_NOW | ATTR_MTIME_NOW | ATTR_CTIME,
				  .ctime = {77, 0}};
	OK(namei_setattr(in, &ch));
	core = core_of(in);
	assert_true(core.atime.sec > 1000000 && core.mtime.sec == core.atime.sec);
	assert_int_equal(core.ctime.sec, 77);
	ch = (struct attr_change){.valid = ATTR_MTIME, .mtime = {0, 1000000000}};
	assert_int_equal(namei_setattr(in, &ch), -EINVAL);
	ch.valid = 1u << 20;
	assert_int_equal(namei_setattr(in, &ch), -EINVAL);
	inode_put(in);
}

static bool later(struct timestamp a, struct timestamp b)
{
	return a.sec > b.sec || (a.sec == b.sec && a.nsec > b.nsec);
}

static void names_touch_the_right_times(void **state)
{
	struct inode *dir = make_dir(world.root, "d"), *in = make_file(dir, "a");
	struct inode_core d0 = core_of(dir), i0 = core_of(in), r0 = core_of(world.root);

	OK(rename_name(dir, "a", world.root, "b", 0));
	assert_true(later(core_of(dir).mtime, d0.mtime) && later(core_of(dir).ctime, d0.ctime));
	assert_true(later(core_of(world.root).mtime, r0.mtime) &&
		    later(core_of(world.root).ctime, r0.ctime));
	assert_true(later(core_of(in).ctime, i0.ctime) && !later(core_of(in).mtime, i0.mtime));
	assert_true(core_of(dir).change > d0.change && core_of(world.root).change > r0.change);
	i0 = core_of(in);
	OK(link_name(in, dir, "c"));
	assert_true(later(core_of(in).ctime, i0.ctime));
	i0 = core_of(in);
	d0 = core_of(dir);
	OK(unlink_name(dir, "c"));
	assert_true(later(core_of(in).ctime, i0.ctime));
	assert_true(later(core_of(dir).mtime, d0.mtime));
	inode_put(in);
	inode_put(dir);
}

/* ---- a full device, a read-only one, a small journal ---- */

static void deleting_works_on_a_full_device(void **state)
{
	struct inode *dir, *in;
	unsigned files = 0;
	char name[256];
	int rc;

	world_unmount();
	sim_destroy(world.sim);
	world_format(DEVICE_MIN_BLOCKS * 4096ull, JOURNAL_MIN_BLOCKS);
	dir = make_dir(world.root, "d");
	memset(name, 'n', sizeof(name));
	for (;; files++) {
		/* Names all over the tree, so that its nodes split everywhere. */
		snprintf(name, sizeof(name), "%08x", files * 2654435761u);
		memset(name + 8, 'n', 240);
		name[248] = '\0';
		RETRY(rc,
		      namei_create(dir, name, strlen(name), S_IFREG | 0644, 0, &root_cred, &in));
		if (rc)
			break;
		inode_put(in);
	}
	assert_int_equal(rc, -ENOSPC);
	assert_true(files > 10000);
	assert_int_equal(core_of(dir).size, files);
	RETRY(rc, namei_mkdir(dir, "sub", 3, 0755, &root_cred, &in));
	for (unsigned i = 0; i < files; i++) {
		snprintf(name, sizeof(name), "%08x", i * 2654435761u);
		memset(name + 8, 'n', 240);
		name[248] = '\0';
		OK(unlink_name(dir, name));
	}
	if (!rc) {
		inode_put(in);
		OK(rmdir_name(dir, "sub"));
	}
	assert_int_equal(core_of(dir).size, 0);
	OK(rmdir_name(world.root, "d"));
	inode_put(dir);
	assert_int_equal(inode_count(), 1);
	in = make_file(world.root, "again");
	inode_put(in);
}

static void a_read_only_mount_changes_nothing(void **state)
{
	struct inode *in = make_file(world.root, "a"), *new;
	struct attr_change ch = {.valid = ATTR_MODE};

	inode_put(in);
	world_unmount();
	world.opt.read_only = true;
	world_mount();
	OK(namei_lookup(world.root, "a", 1, &in));
	assert_int_equal(namei_create(world.root, "b", 1, S_IFREG, 0, &root_cred, &new), -EROFS);
	assert_int_equal(namei_unlink(world.root, "a", 1, NULL), -EROFS);
	assert_int_equal(namei_rename(world.root, "a", 1, world.root, "b", 1, 0, NULL), -EROFS);
	assert_int_equal(namei_link(in, world.root, "b", 1), -EROFS);
	assert_int_equal(namei_setattr(in, &ch), -EROFS);
	assert_int_equal(xattr_set(in, "user.a", "", 0, 0), -EROFS);
	fs_rdlock(world.fs);
	assert_false(inode_wants_atime(in));
	inode_touch_lazy(in, TOUCH_ATIME);
	fs_unlock(world.fs);
	assert_false(in->lazy);
	inode_put(in);
}

/* ---- damage ---- */

/* An entry that contradicts its inode shuts writing down; the rest stays readable. */
static void a_false_entry_is_found(void **state)
{
	struct inode *dir, *in, *out;
	struct trans t;

	world_unmount();
	world.opt.commit_ms = 600000; /* nothing of this becomes durable */
	world_mount();
	dir = make_dir(world.root, "d");
	in = make_file(dir, "f");
	OK(trans_begin(world.fs, &t, 40));
	OK(dir_add(&t, dir, "nobody", 6, 999999, 8));
	OK(dir_add(&t, dir, "other", 5, in->ino, 4));
	OK(inode_write(&t, dir));
	trans_commit(&t);
	assert_int_equal(namei_lookup(dir, "nobody", 6, &out), -ERR_DIR_CORRUPT);
	assert_true(fs_is_shutdown(world.fs));
	assert_int_equal(namei_lookup(dir, "other", 5, &out), -ERR_DIR_CORRUPT);
	assert_int_equal(number_of(dir, "f"), in->ino);
	assert_int_equal(namei_create(dir, "g", 1, S_IFREG, 0, &root_cred, &out), -ERR_SHUTDOWN);
	assert_int_equal(namei_unlink(dir, "f", 1, NULL), -ERR_SHUTDOWN);
	inode_put(in);
	inode_put(dir);
	world_crash(1);
	assert_int_equal(number_of(world.root, "d"), 0);
}

/* ---- threads ---- */

#define THREAD_STEPS 4000u

static void *churn(void *arg)
{
	unsigned seed = *(unsigned *)arg;
	struct inode *in;
	char a[8], b[8];
	int rc;

	for (unsigned i = 0; i < THREAD_STEPS; i++) {
		snprintf(a, sizeof(a), "%d", rand_r(&seed) % 20);
		snprintf(b, sizeof(b), "%d", rand_r(&seed) % 20);
		in = NULL;
		switch (rand_r(&seed) % 5) {
		case 0:
			RETRY(rc,
			      namei_create(world.root, a, strlen(a), S_IFREG | 0600, 0, &root_cred,
					   &in));
			break;
		case 1:
			RETRY(rc, namei_unlink(world.root, a, strlen(a), &in));
			break;
		case 2:
			RETRY(rc,
			      namei_rename(world.root, a, strlen(a), world.root, b, strlen(b), 0,
					   &in));
			break;
		case 3:
			rc = namei_lookup(world.root, a, strlen(a), &in);
			if (!rc) {
				fs_rdlock(world.fs);
				inode_touch_lazy(in, TOUCH_ATIME);
				fs_unlock(world.fs);
			}
			break;
		default:
			RETRY(rc, inode_flush_lazy(world.fs, 10));
			if (rc > 0)
				rc = 0;
		}
		if (rc && rc != -ENOENT && rc != -EEXIST)
			return (void *)err_name(rc);
		if (in) {
			inode_lookup_add(world.fs, in->ino, 1);
			inode_put(in);
			inode_lookup_forget(world.fs, in->ino, 1);
		}
	}
	return NULL;
}

static void threads_leave_a_consistent_directory(void **state)
{
	unsigned seeds[3] = {1, 2, 3}, there = 0;
	pthread_t threads[3];
	char name[8];
	void *err;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, churn, &seeds[i]), 0);
	for (unsigned i = 0; i < 3; i++) {
		pthread_join(threads[i], &err);
		if (err)
			fail_msg("a thread met %s", (const char *)err);
	}
	for (unsigned i = 0; i < 20; i++) {
		snprintf(name, sizeof(name), "%u", i);
		there += number_of(world.root, name) != 0;
	}
	assert_int_equal(core_of(world.root).size, there);
	assert_int_equal(inode_count(), 1 + there);
	assert_int_equal(inode_lookup_entries(world.fs), 0);
}

int main(void)
{
#define NAMEI_TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
	const struct CMUnitTest tests[] = {
		NAMEI_TEST(dot_and_dotdot),
		NAMEI_TEST(every_type_is_kept),
		NAMEI_TEST(setgid_directories_hand_down_their_group),
		NAMEI_TEST(symlinks_of_all_lengths),
		NAMEI_TEST(a_removed_directory_takes_nothing),
		NAMEI_TEST(tmpfiles_can_be_linked_once_made),
		NAMEI_TEST(links_have_a_limit),
		NAMEI_TEST(rename_says_who_lost_its_name),
		NAMEI_TEST(others_have_the_name_by_now),
		NAMEI_TEST(exchange_of_directories_swaps_parents),
		NAMEI_TEST(chown_takes_privileges_away),
		NAMEI_TEST(setattr_sets_what_is_asked),
		NAMEI_TEST(names_touch_the_right_times),
		NAMEI_TEST(deleting_works_on_a_full_device),
		NAMEI_TEST(a_read_only_mount_changes_nothing),
		NAMEI_TEST(a_false_entry_is_found),
		NAMEI_TEST(threads_leave_a_consistent_directory),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
