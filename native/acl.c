/* SPDX-License-Identifier: MIT
 *
 * acl.c - POSIX ACLs.
 *
 * Value: version (le32, 2), then entries of tag (le16), perm (le16), id (le32) in the order owner,
 * named users, owning group, named groups, mask, others. trivial: without named entries and mask,
 * so the mode says it all; it is not stored. The mode's group bits are the mask where there is one.
 */
#include "acl.h"

#include <string.h>
#include <sys/stat.h>

#include "errors.h"
#include "xattr.h"

#define ACL_VERSION 2u

struct acl_entry { le16_t tag, perm; le32_t id; };
struct acl_head { le32_t version; struct acl_entry entries[]; };
_Static_assert(sizeof(struct acl_entry) == 8, "ACL entry of the kernel's xattr form");

enum { TAG_USER_OBJ = 1, TAG_USER = 2, TAG_GROUP_OBJ = 4, TAG_GROUP = 8, TAG_MASK = 16,
      TAG_OTHER = 32 };

#define NAME_ACCESS "system.posix_acl_access"
#define NAME_DEFAULT "system.posix_acl_default"

/* Entries of a value that has an acceptable length. */
static unsigned entry_count(size_t len)
{
	return (unsigned)((len - sizeof(struct acl_head)) / sizeof(struct acl_entry));
}

static bool is_empty(const void *value, size_t len)
{
	return !value || len == sizeof(struct acl_head);
}

int acl_verify(const void *value, size_t len)
{
	const struct acl_head *acl = value;
	unsigned last = 0, named = 0, seen = 0;

	if (len < sizeof(*acl) || len > ACL_BYTES_MAX ||
	    (len - sizeof(*acl)) % sizeof(struct acl_entry) != 0 ||
	    get32(acl->version) != ACL_VERSION)
		return -EINVAL;
	for (unsigned i = 0; i < entry_count(len); i++) {
		unsigned tag = get16(acl->entries[i].tag);
		bool is_named = tag == TAG_USER || tag == TAG_GROUP;

		/* Tags are powers of two in their order; only named ones repeat. */
		if (tag == 0 || tag > TAG_OTHER || (tag & (tag - 1)) || tag < last ||
		    (tag == last && !is_named))
			return -EINVAL;
		if (get16(acl->entries[i].perm) > 7 ||
		    (is_named && get32(acl->entries[i].id) == UINT32_MAX))
			return -EINVAL;
		named += is_named;
		seen |= tag;
		last = tag;
	}
	if (entry_count(len) == 0)
		return 0;
	if ((seen & TAG_USER_OBJ) && (seen & TAG_GROUP_OBJ) && (seen & TAG_OTHER) &&
	    (!named || (seen & TAG_MASK)))
		return 0;
	return -EINVAL;
}

int acl_to_mode(const void *value, size_t len, uint32_t *perm, bool *trivial)
{
	const struct acl_head *acl = value;
	int err = acl_verify(value, len);

	if (err)
		return err;
	*perm = 0;
	*trivial = true;
	for (unsigned i = 0; i < entry_count(len); i++) {
		uint32_t bits = get16(acl->entries[i].perm);

		switch (get16(acl->entries[i].tag)) {
		case TAG_USER_OBJ:
			*perm |= bits << 6;
			break;
		case TAG_GROUP_OBJ:
			*perm |= bits << 3;
			break;
		case TAG_OTHER:
			*perm |= bits;
			break;
		case TAG_MASK: /* comes after the group */
			*perm = (*perm & ~070u) | bits << 3;
			*trivial = false;
			break;
		default:
			*trivial = false;
		}
	}
	return 0;
}

/* The entry that the mode's group bits stand for: mask, else owning group. */
static unsigned group_class_tag(const struct acl_head *acl, size_t len)
{
	for (unsigned i = 0; i < entry_count(len); i++)
		if (get16(acl->entries[i].tag) == TAG_MASK)
			return TAG_MASK;
	return TAG_GROUP_OBJ;
}

/* Owner, group class and others become what the mode says; keep: no more than they were. */
static void apply_mode(struct acl_head *acl, size_t len, uint32_t mode, bool keep)
{
	unsigned group_class = group_class_tag(acl, len);

	for (unsigned i = 0; i < entry_count(len); i++) {
		struct acl_entry *e = &acl->entries[i];
		unsigned tag = get16(e->tag);
		uint32_t bits;

		if (tag == TAG_USER_OBJ)
			bits = mode >> 6 & 7;
		else if (tag == group_class)
			bits = mode >> 3 & 7;
		else if (tag == TAG_OTHER)
			bits = mode & 7;
		else
			continue;
		e->perm = put16((uint16_t)(keep ? bits & get16(e->perm) : bits));
	}
}

/* An ACL from the device, verified; its length, or a negative code. */
static ssize_t read_acl(struct inode *in, const char *name, void *value)
{
	ssize_t len = xattr_get_locked(in, name, value, ACL_BYTES_MAX);

	if (len >= 0 && (acl_verify(value, (size_t)len) || is_empty(value, (size_t)len))) {
		fs_shutdown_writes(in->fs, -ERR_RECORD_SHAPE, "inode %llu: damaged ACL",
				   (unsigned long long)in->ino);
		return -ERR_RECORD_SHAPE;
	}
	return len;
}

int acl_inherit(struct trans *t, struct inode *dir, struct inode *in, uint32_t umask)
{
	_Alignas(8) uint8_t value[ACL_BYTES_MAX];
	struct acl_head *acl = (void *)value;
	uint32_t perm;
	bool trivial;
	ssize_t len;
	int err;

	if (S_ISLNK(in->core.mode))
		return 0;
	if (!(dir->core.flags & INODE_F_DEFACL)) {
		in->core.mode &= ~(umask & 0777);
		return 0;
	}
	len = read_acl(dir, NAME_DEFAULT, value);
	if (len < 0)
		return len == -ENODATA ? -ERR_RECORD_SHAPE : (int)len;
	err = trans_join_inode(t, in);
	if (!err && inode_is_dir(in)) {
		err = xattr_set_in(t, in, NAME_DEFAULT, value, (size_t)len, 0);
		in->core.flags |= INODE_F_DEFACL;
	}
	if (err)
		return err;
	apply_mode(acl, (size_t)len, in->core.mode, true);
	err = acl_to_mode(value, (size_t)len, &perm, &trivial);
	if (err)
		return err;
	in->core.mode = (in->core.mode & ~0777u) | perm;
	if (trivial)
		return 0;
	in->core.flags |= INODE_F_ACL;
	return xattr_set_in(t, in, NAME_ACCESS, value, (size_t)len, 0);
}

int acl_chmod(struct trans *t, struct inode *in)
{
	_Alignas(8) uint8_t value[ACL_BYTES_MAX];
	ssize_t len;

	if (!(in->core.flags & INODE_F_ACL))
		return 0;
	len = read_acl(in, NAME_ACCESS, value);
	if (len < 0)
		return len == -ENODATA ? -ERR_RECORD_SHAPE : (int)len;
	apply_mode((void *)value, (size_t)len, in->core.mode, false);
	return xattr_set_in(t, in, NAME_ACCESS, value, (size_t)len, XATTR_F_REPLACE);
}

/* Store or remove, keeping the flag in step. */
static int store(struct trans *t, struct inode *in, const char *name, uint32_t flag,
		 const void *value, size_t len, unsigned flags)
{
	int err;

	if (value) {
		err = xattr_set_in(t, in, name, value, len,
				   flags & (XATTR_F_CREATE | XATTR_F_REPLACE));
		if (!err)
			in->core.flags |= flag;
		return err;
	}
	err = xattr_remove_in(t, in, name);
	if (err && err != -ENODATA)
		return err;
	in->core.flags &= ~flag;
	return 0;
}

int acl_set_in(struct trans *t, struct inode *in, const char *name, const void *value, size_t len,
	       unsigned flags)
{
	bool access = strcmp(name, NAME_ACCESS) == 0, trivial;
	uint32_t perm;
	int err;

	if (S_ISLNK(in->core.mode) || (!access && strcmp(name, NAME_DEFAULT) != 0))
		return -EOPNOTSUPP;
	err = value ? acl_verify(value, len) : 0;
	if (err)
		return err;
	if (!access && !inode_is_dir(in))
		return is_empty(value, len) ? 0 : -EACCES;
	if (is_empty(value, len))
		return store(t, in, name, access ? INODE_F_ACL : INODE_F_DEFACL, NULL, 0, 0);
	if (!access)
		return store(t, in, name, INODE_F_DEFACL, value, len, flags);
	err = acl_to_mode(value, len, &perm, &trivial);
	if (!err)
		err = store(t, in, name, INODE_F_ACL, trivial ? NULL : value, len, flags);
	if (err)
		return err;
	in->core.mode = (in->core.mode & ~0777u) | perm;
	if (flags & XATTR_F_KILL_SGID)
		in->core.mode &= ~(uint32_t)S_ISGID;
	return 0;
}

/* ---- access check ---- */

static bool is_member(uint32_t gid, const uint32_t *gids, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		if (gids[i] == gid)
			return true;
	return false;
}

/* Of two parts of a request the one to be granted: more bits, or more important ones. */
static unsigned better(unsigned a, unsigned b)
{
	int more = __builtin_popcount(a) - __builtin_popcount(b);

	return more ? (more > 0 ? a : b) : MAX(a, b);
}

static unsigned mask_of(const struct acl_head *acl, size_t len)
{
	for (unsigned i = 0; i < entry_count(len); i++)
		if (get16(acl->entries[i].tag) == TAG_MASK)
			return get16(acl->entries[i].perm);
	return 7;
}

/* For who is not the owner. The entries come in the order of acl(5): named users, groups, mask,
 * others. */
static unsigned acl_allows(const struct inode_core *core, const struct acl_head *acl, size_t len,
			   uint32_t uid, const uint32_t *gids, unsigned n, unsigned want)
{
	unsigned allowed = 0, limited = want & mask_of(acl, len);
	bool user = false, group = false;

	for (unsigned i = 0; i < entry_count(len); i++) {
		uint32_t id = get32(acl->entries[i].id);
		unsigned perm = get16(acl->entries[i].perm);

		switch (get16(acl->entries[i].tag)) {
		case TAG_USER:
			if (id == uid) {
				allowed = perm & limited;
				user = true;
			}
			break;
		case TAG_GROUP_OBJ:
			id = core->gid;
			/* fallthrough */
		case TAG_GROUP:
			if (!user && is_member(id, gids, n)) {
				allowed = better(allowed, perm & limited);
				group = true;
			}
			break;
		case TAG_OTHER:
			if (!user && !group)
				return perm & want;
			break;
		default:
			break;
		}
	}
	return allowed;
}

static unsigned mode_allows(const struct inode_core *core, uint32_t uid, const uint32_t *gids,
			    unsigned n, unsigned want)
{
	if (uid == core->uid)
		return core->mode >> 6 & want;
	return (is_member(core->gid, gids, n) ? core->mode >> 3 : core->mode) & want;
}

int acl_access(struct inode *in, uint32_t uid, const uint32_t *gids, unsigned n, unsigned mask)
{
	_Alignas(8) uint8_t value[ACL_BYTES_MAX];
	ssize_t len = 0;
	unsigned allowed;

	fs_rdlock(in->fs);
	if (uid == 0)
		allowed = inode_is_dir(in) || (in->core.mode & 0111) ? mask :
									mask & ~ACCESS_EXECUTE;
	else if (uid == in->core.uid || !(in->core.flags & INODE_F_ACL))
		allowed = mode_allows(&in->core, uid, gids, n, mask);
	else if ((len = read_acl(in, NAME_ACCESS, value)) >= 0)
		allowed = acl_allows(&in->core, (void *)value, (size_t)len, uid, gids, n, mask);
	fs_unlock(in->fs);
	if (len < 0)
		return len == -ENODATA ? -ERR_RECORD_SHAPE : (int)len;
	return (int)allowed;
}
