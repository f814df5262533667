/* SPDX-License-Identifier: MIT
 *
 * dir.h - directory entries: records of TREE_DIRENT under (directory, cookie). The cookie comes
 * from the name's hash, so lookup is one descent and the readdir offset of an entry never changes.
 *
 * Concurrency: changes inside a transaction, lookups with fs->lock at least shared.
 * dir_add/dir_remove keep the directory's core.size (entries); the caller keeps link counts,
 * subdirs and times, and writes the inode.
 */
#ifndef EXTFS_DIR_H
#define EXTFS_DIR_H

#include "inode.h"

#define NAME_LEN_MAX 255u

struct dirent {
	inum_t ino;
	uint64_t cookie;
	uint8_t type; /* DT_* */
	uint8_t name_len;
	/* NUL-terminated for convenience; any bytes but '/' and NUL inside */
	char name[NAME_LEN_MAX + 1];
};

/* An entry where it lies in the tree: valid as long as the callback runs that is shown it. */
struct dirent_view {
	inum_t ino;
	uint64_t cookie;
	const char *name; /* not terminated */
	uint8_t type, name_len;
};

/* -ENOENT, -ENAMETOOLONG. */
int dir_lookup(struct inode *dir, const char *name, size_t len, struct dirent *out);
/* -EEXIST, -ENOSPC (also when 2^16 names share one hash), -ENAMETOOLONG, -EINVAL (empty, ".", "..",
 * '/' or NUL inside). */
int dir_add(struct trans *t, struct inode *dir, const char *name, size_t len, inum_t ino,
	    uint8_t type);
int dir_remove(struct trans *t, struct inode *dir, const struct dirent *ent);
/* The entry names another inode from now on (rename over it, exchange). */
int dir_replace(struct trans *t, struct inode *dir, const struct dirent *ent, inum_t ino,
		uint8_t type);
/* Entries with cookie > after, in cookie order, until fn returns non-zero (that value is returned).
 * fn runs under the lock. */
int dir_iterate(struct inode *dir, uint64_t after,
		int (*fn)(void *arg, const struct dirent_view *ent), void *arg);

/* What the functions above are made of, with the 47-bit hash of the name as an argument: collisions
 * cannot be had otherwise in a test. */
uint64_t dir_hash(const struct fs *fs, const char *name, size_t len);
int dir_lookup_hashed(struct inode *dir, uint64_t hash, const char *name, size_t len,
		      struct dirent *out);
int dir_add_hashed(struct trans *t, struct inode *dir, uint64_t hash, const char *name, size_t len,
		   inum_t ino, uint8_t type);

#endif
