/* SPDX-License-Identifier: MIT
 *
 * namei_priv.h - what the namei_*.c files share. fs->lock held in all of them.
 */
#ifndef EXTFS_NAMEI_PRIV_H
#define EXTFS_NAMEI_PRIV_H

#include "namei.h"

/* Links of a file, and subdirectories of a directory. */
#define NLINK_MAX 0x7fffffffu

#define DT_OF_MODE(mode) ((uint8_t)(((mode) >> 12) & 15))

/* -ENOTDIR, or -ENOENT for a directory that has been removed. */
int namei_check_dir(const struct inode *dir);
/* Entry and inode of a name; the inode is referenced. -ERR_DIR_CORRUPT (and the filesystem shut
 * down) when they contradict each other. */
int namei_find(struct inode *dir, const char *name, size_t len, struct dirent *ent,
	       struct inode **out);
/* The entry contradicts the inode: log, shut down, -ERR_DIR_CORRUPT. */
int namei_corrupt(const struct inode *dir, const struct inode *in, const char *what);
/* A joined directory gains or loses a subdirectory: its link count. -EMLINK, -ERR_DIR_CORRUPT. */
int namei_subdir_add(struct inode *dir);
int namei_subdir_del(struct inode *dir);
/* A joined inode lost a name: link count, ctime, orphan list; written. A directory loses its last
 * one. */
int namei_drop_link(struct trans *t, struct inode *in);
/* After that transaction, without fs->lock: when that was the last name and nobody has the file open, the
 * holders of its layouts are asked for them. */
void namei_unlinked(struct inode *in);
/* Commit, or cancel on an error; returns err. */
int namei_end(struct trans *t, int err);

#endif
