/* SPDX-License-Identifier: MIT
 *
 * holder_lost.c - the set of inodes whose blocks a lost holder can reach: invariant 3 of layout.h.
 *
 * An inode enters it when something of it is revoked, and, for every inode that a holder had
 * anything of, at mount. It leaves when the holder returned everything or was fenced, and those of
 * the mount also when the holder resumes: it then holds what it held.
 *
 * Both trees have the same entries, and change with fs->lock held exclusively. An entry that a
 * cancelled transaction added stays: one too many only keeps blocks in quarantine for a while.
 */
#include "journal.h"
#include "layout_priv.h"

static int by_ino(const struct lost_inode *a, const struct lost_inode *b)
{
	if (a->ino != b->ino)
		return a->ino < b->ino ? -1 : 1;
	return a->holder < b->holder ? -1 : a->holder > b->holder;
}

static int by_holder(const struct lost_inode *a, const struct lost_inode *b)
{
	if (a->holder != b->holder)
		return a->holder < b->holder ? -1 : 1;
	return a->ino < b->ino ? -1 : a->ino > b->ino;
}

RB_GENERATE(lost_by_ino, lost_inode, by_ino, by_ino)
RB_GENERATE(lost_by_holder, lost_inode, by_holder, by_holder)

static void count(struct layouts *ls, uint64_t holder, int delta)
{
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, holder);
	if (h)
		h->nlost_inodes += (uint64_t)(int64_t)delta;
	pthread_mutex_unlock(&ls->mutex);
	atomic_fetch_add(&ls->lost_count, (uint64_t)(int64_t)delta);
}

static int add(struct fs *fs, inum_t ino, uint64_t holder, bool revoked)
{
	struct layouts *ls = fs->layouts;
	struct lost_inode key = { .ino = ino, .holder = holder };
	struct lost_inode *li = RB_FIND(lost_by_ino, &ls->lost, &key);

	if (!li) {
		li = calloc(1, sizeof(*li));
		if (!li)
			return -ENOMEM;
		*li = key;
		RB_INSERT(lost_by_ino, &ls->lost, li);
		RB_INSERT(lost_by_holder, &ls->lost_of, li);
		count(ls, holder, 1);
	}
	li->revoked |= revoked;
	return 0;
}

int lost_add(struct trans *t, inum_t ino, uint64_t holder)
{
	return add(t->fs, ino, holder, true);
}

int lost_load(struct fs *fs, inum_t ino, uint64_t holder)
{
	return add(fs, ino, holder, false);
}

static void drop(struct layouts *ls, struct lost_inode *li)
{
	RB_REMOVE(lost_by_ino, &ls->lost, li);
	RB_REMOVE(lost_by_holder, &ls->lost_of, li);
	count(ls, li->holder, -1);
	free(li);
}

/* The holder's entries, of all inodes or of one. */
static void drop_all(struct layouts *ls, inum_t ino, uint64_t holder, bool revoked_too)
{
	struct lost_inode key = { .ino = ino, .holder = holder };
	struct lost_inode *li = RB_NFIND(lost_by_holder, &ls->lost_of, &key), *next;

	for (; li && li->holder == holder && (!ino || li->ino == ino); li = next) {
		next = RB_NEXT(lost_by_holder, &ls->lost_of, li);
		if (revoked_too || !li->revoked)
			drop(ls, li);
	}
}

void lost_del(struct fs *fs, inum_t ino, uint64_t holder)
{
	drop_all(fs->layouts, ino, holder, true);
}

void lost_del_unrevoked(struct fs *fs, uint64_t holder)
{
	drop_all(fs->layouts, 0, holder, false);
}

inum_t lost_next(struct fs *fs, uint64_t holder, inum_t ino)
{
	struct lost_inode key = { .ino = ino + 1, .holder = holder };
	struct lost_inode *li = RB_NFIND(lost_by_holder, &fs->layouts->lost_of, &key);

	return li && li->holder == holder ? li->ino : 0;
}

bool lost_has(struct fs *fs, inum_t ino, uint64_t holder)
{
	struct lost_inode key = { .ino = ino, .holder = holder };

	return RB_FIND(lost_by_ino, &fs->layouts->lost, &key);
}

bool lost_revoked(struct fs *fs, inum_t ino, uint64_t holder)
{
	struct lost_inode key = { .ino = ino, .holder = holder };
	struct lost_inode *li = RB_FIND(lost_by_ino, &fs->layouts->lost, &key);

	return li && li->revoked;
}

uint64_t layouts_lost_holder(struct fs *fs, inum_t ino)
{
	struct layouts *ls = fs->layouts;
	struct lost_inode key = { .ino = ino }, *li, *next;

	if (likely(!ls || !atomic_load_explicit(&ls->lost_count, memory_order_relaxed)))
		return 0;
	li = RB_NFIND(lost_by_ino, &ls->lost, &key);
	if (!li || li->ino != ino)
		return 0;
	next = RB_NEXT(lost_by_ino, &ls->lost, li);
	return next && next->ino == ino ? QUARANTINE_ANY : li->holder;
}

void lost_destroy(struct layouts *ls)
{
	struct lost_inode *li;

	while ((li = RB_MIN(lost_by_ino, &ls->lost))) {
		RB_REMOVE(lost_by_ino, &ls->lost, li);
		free(li);
	}
	RB_INIT(&ls->lost_of);
	atomic_store(&ls->lost_count, 0);
}
