/* SPDX-License-Identifier: MIT
 *
 * layout_ghosts.c - at mount: what holders of before may still have.
 *
 * Which ranges they had is not on disk, only of which inodes they had anything. So each such pair
 * gets a ghost: a grant of the whole file, of the greatest iomode that the holder had. Its inode
 * counts as one that a lost holder can reach from before anything is freed. The reaper has the
 * segments of the intents that it found already: ghosts are added beside them.
 */
#include "btree.h"
#include "journal.h"
#include "layout_priv.h"
#include "log.h"

#define INODE_RECORDS EXPOSURE_INODE_LO(0) /* keys of runs are below */

struct had {
	inum_t ino;
	uint64_t holder;
	bool rw;
};

/* The first record of a whole inode at or behind *key, which moves behind it. -ENOENT: no more. */
static int next_record(struct fs *fs, struct key *key, struct had *had)
{
	struct bt_cursor c;
	int rc;

	fs_rdlock(fs);
	bt_cursor_init(&c, fs_tree(fs, TREE_EXPOSURE));
	rc = bt_seek(&c, *key, BT_GE);
	while (!rc && bt_key(&c).lo < INODE_RECORDS)
		rc = bt_seek(&c, KEY(bt_key(&c).hi, INODE_RECORDS), BT_GE);
	if (!rc) {
		unsigned len;
		const struct exposure_disk *rec = bt_record(&c, &len);

		*had = (struct had){ .ino = bt_key(&c).hi,
				     .holder = bt_key(&c).lo - INODE_RECORDS };
		if (len == sizeof(*rec) && get64(rec->holder) == had->holder &&
		    (get32(rec->flags) & EXPOSURE_F_INODE))
			had->rw = get32(rec->flags) & EXPOSURE_F_RW;
		else
			rc = -ERR_RECORD_SHAPE;
		*key = KEY(had->ino, bt_key(&c).lo + 1);
	}
	bt_cursor_release(&c);
	fs_unlock(fs);
	return rc;
}

static int add_ghost(struct inode *in, const struct had *had, struct holder *h)
{
	enum seg_kind kind = had->rw ? SEG_GRANT_RW : SEG_GRANT_READ;
	struct grant *g = grant_alloc();
	int rc;

	if (!g)
		return -ENOMEM;
	pthread_mutex_lock(&in->lock);
	rc = grant_ghost_locked(in, h, kind, g);
	pthread_mutex_unlock(&in->lock);
	if (rc)
		grant_free(g);
	return rc;
}

static struct holder *holder_of(struct fs *fs, const struct had *had)
{
	struct holder *h;

	pthread_mutex_lock(&fs->layouts->mutex);
	h = holder_find(fs->layouts, had->holder); /* nobody removes any yet */
	pthread_mutex_unlock(&fs->layouts->mutex);
	return h;
}

static int load(struct fs *fs, const struct had *had)
{
	struct holder *h = holder_of(fs, had);
	struct inode *in = NULL;
	int rc = 0;

	fs_wrlock(fs);
	if (h && h->state == HOLDER_LOST)
		rc = lost_load(fs, had->ino, had->holder);
	if (h && !rc)
		rc = inode_get(fs, had->ino, &in);
	fs_unlock(fs);
	if (!h || rc == -ENOENT) {
		/* fsck says what is wrong; nobody can reach anything through it. */
		log_msg(LOG_WARN,
			"inode %llu: the exposure record of holder %llu names what is not there",
			(unsigned long long)had->ino, (unsigned long long)had->holder);
		return 0;
	}
	if (rc)
		return rc;
	rc = add_ghost(in, had, h);
	/* Nobody will want a file without a name, so nobody would ever ask for what is held of
	 * it. */
	if (!rc && in->core.nlink == 0)
		layout_unlinked(in);
	inode_put(in);
	return rc;
}

int exposures_load(struct fs *fs)
{
	struct key key = KEY_MIN;
	struct had had = { 0 };
	int rc;

	while (!(rc = next_record(fs, &key, &had)) && !(rc = load(fs, &had)))
		;
	if (rc == -ENOENT)
		return 0;
	if (rc == -ERR_RECORD_SHAPE)
		fs_shutdown_writes(fs, rc, "inode %llu: impossible record of a holder",
				   (unsigned long long)had.ino);
	return rc;
}
