/* SPDX-License-Identifier: MIT
 *
 * dir.c - directory entries.
 *
 * cookie = hash of the name (47 bits, not 0) << 16 | seq. Invariants:
 *  1. the entries of one hash lie side by side in the tree, told apart by seq; a search compares
 *     names with all of them;
 *  2. a cookie never changes while its entry lives, so readdir continues behind it whatever comes
 *     and goes;
 *  3. core.size of a directory is the number of its records.
 * A name takes the lowest free seq of its hash, so 2^16 names of one hash are possible; more are
 * -ENOSPC.
 */
#include "dir.h"

#include <string.h>

#include "btree.h"
#include "crc32c.h"
#include "errors.h"

#define SEQ_COUNT (1u << DIR_COOKIE_SEQ_BITS)

uint64_t dir_hash(const struct fs *fs, const char *name, size_t len)
{
	uint64_t hash = siphash24(fs->super.hash_key, name, len) & ((1ULL << DIR_HASH_BITS) - 1);

	return hash ? hash : 1;
}

static uint64_t cookie_of(uint64_t hash, unsigned seq)
{
	xassert(hash != 0 && hash >> DIR_HASH_BITS == 0 && seq < SEQ_COUNT);
	return hash << DIR_COOKIE_SEQ_BITS | seq;
}

static int corrupt(struct inode *dir, uint64_t cookie)
{
	fs_shutdown_writes(dir->fs, -ERR_RECORD_SHAPE,
			   "directory %llu: entry %llx has an impossible shape",
			   (unsigned long long)dir->ino, (unsigned long long)cookie);
	return -ERR_RECORD_SHAPE;
}

/* The record under the cursor, verified; *name points into the tree. */
static int read_record(struct inode *dir, struct bt_cursor *c, const struct dirent_disk **rec,
		       const char **name)
{
	unsigned len;
	const struct dirent_disk *d = bt_record(c, &len);

	if (len < sizeof(*d) || d->name_len == 0 || len != sizeof(*d) + d->name_len)
		return corrupt(dir, bt_key(c).lo);
	*rec = d;
	*name = (const char *)(d + 1);
	return 0;
}

static void fill(struct dirent *ent, const struct dirent_disk *d, const char *name, uint64_t cookie)
{
	ent->ino = get64(d->ino);
	ent->cookie = cookie;
	ent->type = d->type;
	ent->name_len = d->name_len;
	memcpy(ent->name, name, d->name_len);
	ent->name[d->name_len] = '\0';
}

/* -ENOENT with *free_seq the lowest unused seq of the hash (SEQ_COUNT: none); 0 with *out
 * filled. */
static int search(struct inode *dir, uint64_t hash, const char *name, size_t len,
		  struct dirent *out, unsigned *free_seq)
{
	const struct dirent_disk *d;
	const char *have;
	struct bt_cursor c;
	unsigned next = 0;
	int err;

	bt_cursor_init(&c, fs_tree(dir->fs, TREE_DIRENT));
	err = bt_seek(&c, KEY(dir->ino, cookie_of(hash, 0)), BT_GE);
	while (!err) {
		struct key key = bt_key(&c);

		if (key.hi != dir->ino || key.lo >> DIR_COOKIE_SEQ_BITS != hash) {
			err = -ENOENT;
			break;
		}
		err = read_record(dir, &c, &d, &have);
		if (err)
			break;
		if (d->name_len == len && memcmp(have, name, len) == 0) {
			fill(out, d, have, key.lo);
			break;
		}
		/* next stops at the first gap. */
		if ((key.lo & (SEQ_COUNT - 1)) == next)
			next++;
		err = bt_next(&c);
	}
	bt_cursor_release(&c);
	*free_seq = next;
	return err;
}

int dir_lookup_hashed(struct inode *dir, uint64_t hash, const char *name, size_t len,
		      struct dirent *out)
{
	unsigned unused;

	return search(dir, hash, name, len, out, &unused);
}

int dir_lookup(struct inode *dir, const char *name, size_t len, struct dirent *out)
{
	if (len > NAME_LEN_MAX)
		return -ENAMETOOLONG;
	if (len == 0)
		return -ENOENT;
	return dir_lookup_hashed(dir, dir_hash(dir->fs, name, len), name, len, out);
}

static int check_name(const char *name, size_t len)
{
	if (len > NAME_LEN_MAX)
		return -ENAMETOOLONG;
	if (len == 0 || memchr(name, '/', len) || memchr(name, '\0', len))
		return -EINVAL;
	if (name[0] == '.' && (len == 1 || (len == 2 && name[1] == '.')))
		return -EINVAL;
	return 0;
}

int dir_add_hashed(struct trans *t, struct inode *dir, uint64_t hash, const char *name, size_t len,
		   inum_t ino, uint8_t type)
{
	struct { struct dirent_disk d; char name[NAME_LEN_MAX]; } rec;
	struct dirent found;
	unsigned seq;
	int err;

	err = check_name(name, len);
	if (err)
		return err;
	err = search(dir, hash, name, len, &found, &seq);
	if (err != -ENOENT)
		return err ? err : -EEXIST;
	if (seq == SEQ_COUNT)
		return -ENOSPC;
	err = trans_join_inode(t, dir);
	if (err)
		return err;
	rec.d = (struct dirent_disk){.ino = put64(ino), .type = type, .name_len = (uint8_t)len};
	memcpy(rec.name, name, len);
	err = bt_insert(t, fs_tree(dir->fs, TREE_DIRENT), KEY(dir->ino, cookie_of(hash, seq)), &rec,
			(unsigned)(sizeof(rec.d) + len));
	if (!err)
		dir->core.size++;
	return err;
}

int dir_add(struct trans *t, struct inode *dir, const char *name, size_t len, inum_t ino,
	    uint8_t type)
{
	/* The hash of a bad name is not computed: its length is not to be trusted. */
	int err = check_name(name, len);

	return err ? err : dir_add_hashed(t, dir, dir_hash(dir->fs, name, len), name, len, ino,
					  type);
}

int dir_remove(struct trans *t, struct inode *dir, const struct dirent *ent)
{
	int err = trans_join_inode(t, dir);

	if (!err)
		err = bt_delete(t, fs_tree(dir->fs, TREE_DIRENT), KEY(dir->ino, ent->cookie));
	if (err)
		return err;
	if (dir->core.size == 0)
		return corrupt(dir, ent->cookie);
	dir->core.size--;
	return 0;
}

int dir_replace(struct trans *t, struct inode *dir, const struct dirent *ent, inum_t ino,
		uint8_t type)
{
	struct { struct dirent_disk d; char name[NAME_LEN_MAX]; } rec;

	rec.d = (struct dirent_disk){.ino = put64(ino), .type = type, .name_len = ent->name_len};
	memcpy(rec.name, ent->name, ent->name_len);
	return bt_update(t, fs_tree(dir->fs, TREE_DIRENT), KEY(dir->ino, ent->cookie), &rec,
			 (unsigned)sizeof(rec.d) + ent->name_len);
}

int dir_iterate(struct inode *dir, uint64_t after,
		int (*fn)(void *arg, const struct dirent_view *ent), void *arg)
{
	const struct dirent_disk *d;
	struct dirent_view ent;
	struct bt_cursor c;
	int err, stop = 0;

	bt_cursor_init(&c, fs_tree(dir->fs, TREE_DIRENT));
	err = bt_seek(&c, KEY(dir->ino, after), BT_GT);
	while (!err && bt_key(&c).hi == dir->ino) {
		err = read_record(dir, &c, &d, &ent.name);
		if (err)
			break;
		ent.ino = get64(d->ino);
		ent.cookie = bt_key(&c).lo;
		ent.type = d->type;
		ent.name_len = d->name_len;
		stop = fn(arg, &ent);
		if (stop)
			break;
		err = bt_next(&c);
	}
	bt_cursor_release(&c);
	return stop || err == -ENOENT ? stop : err;
}
