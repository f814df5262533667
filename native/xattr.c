/* SPDX-License-Identifier: MIT
 *
 * xattr.c - extended attributes as records of TREE_XATTR.
 *
 * An attribute is part 0 (head, name, first bytes of the value) and, when it is longer than
 * XATTR_PART_BYTES in all, parts 1.. with XATTR_PART_BYTES of the value each, the last one shorter.
 * Invariants:
 *  1. the parts of one attribute share (inode, hash, seq); part 0 says how long the value is, so
 *     how many there are;
 *  2. attributes whose names have one hash are told apart by seq; a search compares names with all
 *     of them;
 *  3. core.xattrs counts the parts 0; INODE_F_ACL and INODE_F_DEFACL say that the ACL of that kind
 *     is stored.
 */
#include "xattr.h"

#include <string.h>
#include <sys/stat.h>

#include "acl.h"
#include "alloc.h"
#include "btree.h"
#include "crc32c.h"
#include "errors.h"
#include "rider.h"

#define FULL_NAME_MAX 255u
#define SEQ_COUNT 256u
#define HASH_MASK ((1ULL << 40) - 1)

/* ---- names ---- */

struct xname {
	uint8_t ns;  /* enum xattr_ns */
	uint8_t len; /* without prefix, as name */
	const char *name;
};

static const struct { const char *text; uint8_t len, ns; } prefixes[] = {
	{"user.", 5, XNS_USER},
	{"trusted.", 8, XNS_TRUSTED},
	{"security.", 9, XNS_SECURITY},
	{"system.", 7, XNS_SYSTEM},
};

#define ACL_ACCESS "posix_acl_access"
#define ACL_DEFAULT "posix_acl_default"

static int parse_name(const char *full, struct xname *out)
{
	size_t len = strnlen(full, FULL_NAME_MAX + 1);

	if (len > FULL_NAME_MAX)
		return -ERANGE;
	for (unsigned i = 0; i < ARRAY_LEN(prefixes); i++) {
		if (strncmp(full, prefixes[i].text, prefixes[i].len) != 0)
			continue;
		out->ns = prefixes[i].ns;
		out->name = full + prefixes[i].len;
		out->len = (uint8_t)(len - prefixes[i].len);
		if (out->len == 0)
			return -EINVAL;
		if (out->ns == XNS_SYSTEM && strcmp(out->name, ACL_ACCESS) != 0 &&
		    strcmp(out->name, ACL_DEFAULT) != 0)
			return -EOPNOTSUPP;
		return 0;
	}
	return -EOPNOTSUPP;
}

static uint64_t hash_name(const struct fs *fs, const struct xname *xn)
{
	char buf[1 + FULL_NAME_MAX];

	buf[0] = (char)xn->ns;
	memcpy(buf + 1, xn->name, xn->len);
	return siphash24(fs->super.hash_key, buf, 1u + xn->len) & HASH_MASK;
}

/* ---- records ---- */

/* Where an attribute is, or could go. */
struct xplace {
	uint64_t lo;     /* low key of part 0 */
	uint32_t len;    /* of the value */
	bool room;       /* not found: there is a free seq, lo names it */
};

static unsigned head_bytes(unsigned name_len, size_t len)
{
	size_t room = XATTR_PART_BYTES - sizeof(struct xattr_disk) - name_len;

	return (unsigned)MIN(len, room);
}

static unsigned part_count(unsigned name_len, size_t len)
{
	size_t rest = len - head_bytes(name_len, len);

	return 1 + (unsigned)((rest + XATTR_PART_BYTES - 1) / XATTR_PART_BYTES);
}

static int corrupt(struct inode *in, uint64_t lo)
{
	fs_shutdown_writes(in->fs, -ERR_RECORD_SHAPE,
			   "inode %llu: attribute record %llx has an impossible shape",
			   (unsigned long long)in->ino, (unsigned long long)lo);
	return -ERR_RECORD_SHAPE;
}

/* Part 0 under the cursor, verified; the name follows *out in the tree. */
static int read_head(struct inode *in, struct bt_cursor *c, const struct xattr_disk **out)
{
	unsigned len;
	const struct xattr_disk *d = bt_record(c, &len);

	if ((bt_key(c).lo & 0xffff) != 0 || len < sizeof(*d) || d->name_len == 0 ||
	    d->ns < XNS_USER || d->ns > XNS_SYSTEM || get32(d->value_len) > XATTR_VALUE_MAX ||
	    len != sizeof(*d) + d->name_len + head_bytes(d->name_len, get32(d->value_len)))
		return corrupt(in, bt_key(c).lo);
	*out = d;
	return 0;
}

/* 0: *place is the attribute; -ENODATA: where it would go. */
static int find(struct inode *in, uint64_t hash, const struct xname *xn, struct xplace *place)
{
	const struct xattr_disk *d;
	struct bt_cursor c;
	unsigned next = 0;
	int err;

	bt_cursor_init(&c, fs_tree(in->fs, TREE_XATTR));
	err = bt_seek(&c, KEY(in->ino, XATTR_KEY(hash, 0, 0)), BT_GE);
	while (!err && bt_key(&c).hi == in->ino && bt_key(&c).lo >> 24 == hash) {
		uint64_t lo = bt_key(&c).lo;

		err = read_head(in, &c, &d);
		if (err)
			break;
		if (d->ns == xn->ns && d->name_len == xn->len &&
		    memcmp(d + 1, xn->name, xn->len) == 0) {
			*place = (struct xplace){.lo = lo, .len = get32(d->value_len)};
			bt_cursor_release(&c);
			return 0;
		}
		if ((lo >> 16 & 0xff) == next)
			next++;
		err = bt_seek(&c, KEY(in->ino, lo | 0xffff), BT_GT);
	}
	bt_cursor_release(&c);
	if (err && err != -ENOENT)
		return err;
	*place = (struct xplace){.lo = XATTR_KEY(hash, next & 0xff, 0), .room = next < SEQ_COUNT};
	return -ENODATA;
}

static int read_value(struct inode *in, const struct xname *xn, const struct xplace *place,
		      uint8_t *value)
{
	struct tree tree = fs_tree(in->fs, TREE_XATTR);
	uint8_t rec[XATTR_PART_BYTES];
	unsigned len, done, skip = (unsigned)sizeof(struct xattr_disk) + xn->len;
	int err = bt_lookup(tree, KEY(in->ino, place->lo), rec, sizeof(rec), &len);

	if (err)
		return err;
	done = head_bytes(xn->len, place->len);
	memcpy(value, rec + skip, done);
	for (uint64_t part = 1; done < place->len; part++) {
		err = bt_lookup(tree, KEY(in->ino, place->lo | part), rec, sizeof(rec), &len);
		if (err == -ENOENT || (!err && len != MIN(place->len - done, XATTR_PART_BYTES)))
			return corrupt(in, place->lo | part);
		if (err)
			return err;
		memcpy(value + done, rec, len);
		done += len;
	}
	return 0;
}

/* Write all parts of a value over the first old_parts that exist, and delete those of the old that
 * are too many. */
static int write_value(struct trans *t, struct inode *in, const struct xname *xn, uint64_t lo,
		       unsigned old_parts, const uint8_t *value, size_t len)
{
	struct tree tree = fs_tree(in->fs, TREE_XATTR);
	struct {
		struct xattr_disk d;
		uint8_t bytes[XATTR_PART_BYTES - sizeof(struct xattr_disk)];
	} head;
	unsigned parts = part_count(xn->len, len), done = head_bytes(xn->len, len), n;
	const void *rec = &head;
	int err = 0;

	head.d = (struct xattr_disk){.ns = xn->ns, .name_len = xn->len,
				     .value_len = put32((uint32_t)len)};
	memcpy(head.bytes, xn->name, xn->len);
	if (done)
		memcpy(head.bytes + xn->len, value, done);
	n = (unsigned)sizeof(head.d) + xn->len + done;
	for (unsigned part = 0; part < parts && !err; part++) {
		struct key key = KEY(in->ino, lo | part);

		if (part > 0) {
			rec = value + done;
			n = (unsigned)MIN(len - done, (size_t)XATTR_PART_BYTES);
			done += n;
		}
		err = part < old_parts ? bt_update(t, tree, key, rec, n)
				       : bt_insert(t, tree, key, rec, n);
	}
	for (unsigned part = parts; part < old_parts && !err; part++)
		err = bt_delete(t, tree, KEY(in->ino, lo | part));
	return err;
}

static int set_hashed(struct trans *t, struct inode *in, uint64_t hash, const struct xname *xn,
		      const void *value, size_t len, unsigned flags)
{
	struct xplace place;
	int err = find(in, hash, xn, &place);
	bool found = !err;

	if (err && err != -ENODATA)
		return err;
	if (found && (flags & XATTR_F_CREATE))
		return -EEXIST;
	if (!found && (flags & XATTR_F_REPLACE))
		return -ENODATA;
	if (!found && !place.room)
		return -ENOSPC;
	err = trans_join_inode(t, in);
	if (!err)
		err = write_value(t, in, xn, place.lo, found ? part_count(xn->len, place.len) : 0,
				  value, len);
	if (!err && !found)
		in->core.xattrs++;
	return err;
}

int xattr_set_in_hashed(struct trans *t, struct inode *in, uint64_t hash, const char *name,
			const void *value, size_t len, unsigned flags)
{
	struct xname xn;
	int err = parse_name(name, &xn);

	if (!err && len > XATTR_VALUE_MAX)
		err = -E2BIG;
	return err ? err : set_hashed(t, in, hash & HASH_MASK, &xn, value, len, flags);
}

int xattr_set_in(struct trans *t, struct inode *in, const char *name, const void *value, size_t len,
		 unsigned flags)
{
	struct xname xn;
	int err = parse_name(name, &xn);

	if (!err && len > XATTR_VALUE_MAX)
		err = -E2BIG;
	return err ? err : set_hashed(t, in, hash_name(in->fs, &xn), &xn, value, len, flags);
}

int xattr_remove_in(struct trans *t, struct inode *in, const char *name)
{
	struct tree tree = fs_tree(in->fs, TREE_XATTR);
	struct xplace place;
	struct xname xn;
	unsigned parts;
	int err = parse_name(name, &xn);

	if (!err)
		err = in->core.xattrs ? find(in, hash_name(in->fs, &xn), &xn, &place) : -ENODATA;
	if (!err)
		err = trans_join_inode(t, in);
	if (err)
		return err;
	parts = part_count(xn.len, place.len);
	for (unsigned part = 0; part < parts && !err; part++)
		err = bt_delete(t, tree, KEY(in->ino, place.lo | part));
	if (!err && in->core.xattrs == 0)
		return corrupt(in, place.lo);
	if (!err)
		in->core.xattrs--;
	return err;
}

int xattr_remove_all(struct trans *t, struct inode *in, unsigned max)
{
	struct tree tree = fs_tree(in->fs, TREE_XATTR);
	struct bt_cursor c;
	struct key key;
	int err = trans_join_inode(t, in);

	/* From the end, so that a value cut short still has its head. */
	for (unsigned n = 0; n < max && !err; n++) {
		bt_cursor_init(&c, tree);
		err = bt_seek(&c, KEY(in->ino, UINT64_MAX), BT_LE);
		key = err ? KEY_MIN : bt_key(&c);
		bt_cursor_release(&c);
		if (!err && key.hi != in->ino)
			err = -ENOENT;
		if (!err)
			err = bt_delete(t, tree, key);
		if (!err && (key.lo & 0xffff) == 0 && in->core.xattrs > 0)
			in->core.xattrs--;
	}
	if (err && err != -ENOENT)
		return err;
	if (err == -ENOENT) {
		in->core.xattrs = 0;
		in->core.flags &= ~(INODE_F_ACL | INODE_F_DEFACL);
	}
	return inode_write(t, in) ?: (err == -ENOENT ? 0 : 1);
}

/* ---- whole operations ---- */

ssize_t xattr_get_locked(struct inode *in, const char *name, void *value, size_t cap)
{
	struct xplace place;
	struct xname xn;
	int err = parse_name(name, &xn);

	if (!err)
		err = in->core.xattrs ? find(in, hash_name(in->fs, &xn), &xn, &place) : -ENODATA;
	if (err)
		return err;
	if (cap == 0)
		return place.len;
	if (cap < place.len)
		return -ERANGE;
	err = read_value(in, &xn, &place, value);
	return err ? err : (ssize_t)place.len;
}

ssize_t xattr_get(struct inode *in, const char *name, void *value, size_t cap)
{
	ssize_t n;

	fs_rdlock(in->fs);
	n = xattr_get_locked(in, name, value, cap);
	fs_unlock(in->fs);
	return n;
}

static ssize_t list_locked(struct inode *in, char *names, size_t cap)
{
	const struct xattr_disk *d;
	struct bt_cursor c;
	size_t used = 0;
	int err;

	bt_cursor_init(&c, fs_tree(in->fs, TREE_XATTR));
	err = bt_seek(&c, KEY(in->ino, 0), BT_GE);
	while (!err && bt_key(&c).hi == in->ino) {
		unsigned prefix;
		size_t need;

		err = read_head(in, &c, &d);
		if (err)
			break;
		prefix = d->ns - 1u;
		need = prefixes[prefix].len + (size_t)d->name_len + 1;
		if (cap > 0 && used + need > cap) {
			err = -ERANGE;
			break;
		}
		if (cap > 0) {
			memcpy(names + used, prefixes[prefix].text, prefixes[prefix].len);
			memcpy(names + used + prefixes[prefix].len, d + 1, d->name_len);
			names[used + need - 1] = '\0';
		}
		used += need;
		err = bt_seek(&c, KEY(in->ino, bt_key(&c).lo | 0xffff), BT_GT);
	}
	bt_cursor_release(&c);
	return err && err != -ENOENT ? err : (ssize_t)used;
}

ssize_t xattr_list(struct inode *in, char *names, size_t cap)
{
	ssize_t n = 0;

	fs_rdlock(in->fs);
	if (in->core.xattrs > 0)
		n = list_locked(in, names, cap);
	fs_unlock(in->fs);
	return n;
}

static int set_once(struct inode *in, const char *name, const void *value, size_t len,
		    unsigned flags, size_t old)
{
	struct trans t;
	ssize_t now;
	/* The attribute, and the inode's leaf. */
	int err = trans_begin(in->fs, &t, XATTR_TRANS_BLOCKS(len, old) + 1 + rider_blocks());

	if (err)
		return err;
	if (!value)
		t.alloc_flags |= ALLOC_USE_RESERVE;
	now = xattr_get_locked(in, name, NULL, 0);
	if (now > (ssize_t)old)
		err = -EAGAIN; /* grew since the reservation was computed */
	if (!err)
		err = trans_join_inode(&t, in);
	if (!err && strncmp(name, "system.", 7) == 0)
		err = acl_set_in(&t, in, name, value, len, flags);
	else if (!err && value)
		err = xattr_set_in(&t, in, name, value, len, flags);
	else if (!err)
		err = xattr_remove_in(&t, in, name);
	if (!err) {
		inode_touch(in, TOUCH_CTIME);
		err = inode_write(&t, in);
	}
	return rider_end(&t, err, in, in, NULL);
}

/* value NULL: remove */
static int change(struct inode *in, const char *name, const void *value, size_t len, unsigned flags)
{
	ssize_t old;
	int err;

	do {
		old = xattr_get(in, name, NULL, 0);
		/* Removing an ACL that is not there succeeds. */
		if (old == -ENODATA && (value || strncmp(name, "system.", 7) == 0))
			old = 0;
		if (old < 0)
			return (int)old;
		err = set_once(in, name, value, len, flags, (size_t)old);
	} while (err == -EAGAIN);
	return err;
}

int xattr_set(struct inode *in, const char *name, const void *value, size_t len, unsigned flags)
{
	if (len > XATTR_VALUE_MAX)
		return -E2BIG;
	if (flags & ~(XATTR_F_CREATE | XATTR_F_REPLACE | XATTR_F_KILL_SGID))
		return -EINVAL;
	return change(in, name, value ? value : "", len, flags);
}

int xattr_remove(struct inode *in, const char *name)
{
	return change(in, name, NULL, 0, 0);
}
