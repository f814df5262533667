/* SPDX-License-Identifier: MIT
 *
 * layout_release.c - where blocks go that a lost holder may still reach, and how they become free
 * again.
 *
 * A release is work of the layouts' thread for one holder, in rolling transactions; between them it
 * lets others run. It has phases, in this order, because each relies on those before:
 *   forget     GONE holders: the inodes it could reach are not lost to it any more, so nothing more
 *              goes to quarantine under its name;
 *   exposures  GONE: staged blocks are freed, its exposures and inode records go, while its grants
 *              still keep others from staging blocks in the same place;
 *   grants     GONE: they vanish, without copies; what it preallocated past EOF is to be trimmed;
 *   quarantine what is kept under its name becomes free, and, while nobody is tainted, what is kept
 *              under QUARANTINE_ANY;
 *   record     GONE: the holder itself.
 * Blocks that more than one holder could reach are kept under QUARANTINE_ANY. A holder is tainted
 * from the moment that it may reach such blocks (all that were there before the mount are) until it
 * has returned everything or is fenced; when nobody is tainted those blocks become free.
 *
 * A holder that returned everything is LIVE: only its quarantine is released. When it becomes LOST
 * once more meanwhile, new blocks may be kept under its name, so the release stops; the rest waits
 * for the next one.
 *
 * A crash, or an error, leaves a GONE holder with its record, and the next mount does the rest.
 */
#include <string.h>

#include "alloc.h"
#include "btree.h"
#include "file_run.h"
#include "journal.h"
#include "layout_priv.h"
#include "log.h"
#include "trans.h"

#define RELEASE_TRANS_BLOCKS 384u
/* Records looked at under one hold of fs->lock. */
#define SCAN_RECORDS 256u
#define LOOK_RECORDS 1024u /* the same, shared */
/* A record of quarantine deleted or cut, the free space around it joined. */
#define RELEASE_STEP_BLOCKS (2 * TRANS_TREE_OP + 2 * TRANS_ALLOC_OP)
/* Staged blocks of one extent unmapped, the exposure cut, the inode written. */
#define EXPOSURE_STEP_BLOCKS (EXTMAP_STEP_BLOCKS + 2 * TRANS_TREE_OP + TRANS_ALLOC_OP)
#define STAGED_RECORDS 4u

void holder_taint(struct layouts *ls, struct holder *h)
{
	if (!h->tainted)
		atomic_fetch_add(&ls->ntainted, 1);
	h->tainted = true;
}

static void holder_clean(struct layouts *ls, uint64_t id)
{
	struct holder *h;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, id);
	if (h && h->tainted) {
		h->tainted = false;
		atomic_fetch_sub(&ls->ntainted, 1);
	}
	pthread_mutex_unlock(&ls->mutex);
}

/* Whoever has lost this inode may reach what is kept from now on, or what its twins map. */
static void taint_all(struct layouts *ls, inum_t ino)
{
	struct lost_inode key = { .ino = ino }, *li;

	pthread_mutex_lock(&ls->mutex);
	for (li = RB_NFIND(lost_by_ino, &ls->lost, &key); li && li->ino == ino;
	     li = RB_NEXT(lost_by_ino, &ls->lost, li)) {
		struct holder *h = holder_find(ls, li->holder);

		if (h)
			holder_taint(ls, h);
	}
	pthread_mutex_unlock(&ls->mutex);
}

/* A holder that reads blocks of a reflinked file reads those of its twin. When the file it was told
 * about drops them they are still mapped by the other one, which knows nothing of the holder: so
 * while any holder is tainted, whatever reflinked files drop is kept. */
static uint64_t drop_holder(struct fs *fs, const struct inode *in)
{
	struct layouts *ls = fs->layouts;
	bool shared = in->core.flags & INODE_F_SHARED;
	uint64_t holder;

	if (likely(!ls || (!atomic_load(&ls->lost_count) && !atomic_load(&ls->ntainted))))
		return 0;
	if (fs->opt.mutant == MUTANT_QUARANTINE_DROPPED)
		return 0;
	holder = layouts_lost_holder(fs, in->ino);
	if (holder && (shared || holder == QUARANTINE_ANY))
		taint_all(ls, in->ino);
	if (!holder && shared && atomic_load(&ls->ntainted))
		holder = QUARANTINE_ANY;
	return holder;
}

static int quarantined(struct trans *t, uint64_t holder, int64_t blocks)
{
	if (blocks > 0)
		LAYOUT_COUNT(t->fs, quarantined_blocks, (uint64_t)blocks);
	return holder_quarantined(t, holder, blocks);
}

const struct layout_hooks layouts_hooks = {
	.drop_holder = drop_holder, .quarantined = quarantined, .unlinked = layout_unlinked,
	.map_changed = layout_map_changed, .lock_free = layout_lock_free,
	.lock_wanted = layout_lock_wanted,
};

/* ---- the machine ---------------------------------------------------------------------------- */

struct release {
	struct op op;
	struct jrn_waiter waiter;
	struct layouts *ls;
	uint64_t holder;
	bool gone;
	bool rescanned;
	/* 0: goes on (the phase may have changed); ERR_PARKED; a negative code: it is over. NULL:
	 * it is over. */
	int (*phase)(struct release *rl);
	struct key key;  /* exposures: where the scan goes on */
	fsblock_t at;    /* quarantine: the same */
};

static int release_begin(struct release *rl, struct trans *t)
{
	struct fs *fs = rl->ls->fs;
	int rc = trans_begin(fs, t, RELEASE_TRANS_BLOCKS);

	if (!rc) {
		t->alloc_flags |= ALLOC_USE_RESERVE;
		return 0;
	}
	if (rc != -ERR_JOURNAL_FULL)
		return rc;
	rl->waiter = (struct jrn_waiter){ .op = &rl->op };
	rc = jrn_wait_space(fs, &rl->waiter);
	return rc ? rc : -EAGAIN; /* there is room now */
}

static void release_over(struct release *rl, int rc)
{
	struct layouts *ls = rl->ls;

	if (rc && !fs_is_shutdown(ls->fs))
		log_msg(LOG_ERROR, "layouts: what holder %llu had could not be freed: %s",
			(unsigned long long)rl->holder, err_text(rc));
	release_ended(ls, rl->holder);
	free(rl);
	layouts_ran(ls);
}

static bool stopping(struct layouts *ls)
{
	bool stop;

	pthread_mutex_lock(&ls->mutex);
	stop = ls->stop;
	pthread_mutex_unlock(&ls->mutex);
	return stop;
}

static void release_go(struct op *op)
{
	struct release *rl = container_of(op, struct release, op);
	int rc;

	if (stopping(rl->ls) || fs_is_shutdown(rl->ls->fs)) {
		release_over(rl, 0);
		return;
	}
	rc = rl->phase(rl);
	if (rc == ERR_PARKED)
		return;
	if ((rc && rc != -EAGAIN) || !rl->phase)
		release_over(rl, rc);
	else
		ioctx_wake(&rl->op);
}

/* ---- quarantine ----------------------------------------------------------------------------- */

static int release_record(struct release *rl);

/* May a record of this name be released now? fs->lock exclusive. */
static bool releasable(struct release *rl, uint64_t holder)
{
	if (holder == QUARANTINE_ANY)
		return atomic_load(&rl->ls->ntainted) == 0;
	return holder == rl->holder;
}

/* The next run at or behind *at that is to become free, at most *budget records further; 0, -ENOENT
 * (at the end), -EAGAIN (budget spent). */
static int find_run(struct release *rl, fsblock_t *at, unsigned *budget, fsblock_t *start,
		    nblocks_t *len)
{
	struct bt_cursor c;
	int rc;

	bt_cursor_init(&c, fs_tree(rl->ls->fs, TREE_QUARANTINE));
	rc = bt_seek(&c, KEY(*at, 0), BT_GE);
	while (!rc) {
		struct quarantine_disk rec;
		unsigned size;
		const void *p = bt_record(&c, &size);

		if (size != sizeof(rec)) {
			rc = -ERR_RECORD_SHAPE;
			break;
		}
		memcpy(&rec, p, sizeof(rec));
		*start = bt_key(&c).hi;
		*len = get64(rec.length);
		*at = *start + *len;
		if (releasable(rl, get64(rec.holder)))
			break;
		if (!--*budget) {
			rc = -EAGAIN;
			break;
		}
		rc = bt_next(&c);
	}
	bt_cursor_release(&c);
	return rc;
}

static int release_runs(struct release *rl, struct trans *t, fsblock_t *at, nblocks_t *freed)
{
	unsigned budget = SCAN_RECORDS;
	int rc = 0;

	while (!rc && trans_room(t) > RELEASE_STEP_BLOCKS) {
		fsblock_t start, next = *at;
		nblocks_t len;

		rc = find_run(rl, &next, &budget, &start, &len);
		if (!rc)
			rc = alloc_quarantine_release(t, start, len);
		if (!rc)
			*freed += len;
		if (!rc || rc == -EAGAIN)
			*at = next;
	}
	return rc;
}

/* Can it reach something again? fs->lock held. */
static bool is_lost(struct release *rl)
{
	struct holder *h;
	bool lost;

	pthread_mutex_lock(&rl->ls->mutex);
	h = holder_find(rl->ls, rl->holder);
	lost = h && h->nlost_inodes;
	pthread_mutex_unlock(&rl->ls->mutex);
	return lost;
}

/* Is there anything to release behind rl->at? 0, -ENOENT, -EAGAIN or a code. */
static int look_for_run(struct release *rl)
{
	unsigned budget = LOOK_RECORDS;
	fsblock_t at = rl->at, start;
	nblocks_t len;
	int rc;

	fs_rdlock(rl->ls->fs);
	rc = find_run(rl, &at, &budget, &start, &len);
	fs_unlock(rl->ls->fs);
	rl->at = rc ? at : start;
	return rc;
}

static int release_quarantine(struct release *rl)
{
	fsblock_t at = rl->at;
	nblocks_t freed = 0;
	struct trans t;
	int rc = look_for_run(rl);

	if (rc == -ENOENT) {
		rl->phase = rl->gone ? release_record : NULL;
		return 0;
	}
	if (!rc)
		rc = release_begin(rl, &t);
	if (rc)
		return rc;
	/* Between two transactions it may have become LOST once more: what is kept under its name
	 * since is not to be freed. */
	at = rl->at;
	if (!rl->gone && is_lost(rl))
		rl->phase = NULL;
	else
		rc = release_runs(rl, &t, &at, &freed);
	if ((rc && rc != -ENOENT && rc != -EAGAIN) || !freed) {
		trans_cancel(&t);
	} else {
		trans_commit(&t);
		LAYOUT_COUNT(rl->ls->fs, released_blocks, freed);
	}
	rl->at = at;
	return rc == -ENOENT ? 0 : rc;
}

/* ---- the record ----------------------------------------------------------------------------- */

static int release_record(struct release *rl)
{
	struct holder *h;
	struct trans t;
	int rc = release_begin(rl, &t);

	if (rc)
		return rc;
	rl->phase = NULL;
	pthread_mutex_lock(&rl->ls->mutex);
	h = holder_find(rl->ls, rl->holder);
	pthread_mutex_unlock(&rl->ls->mutex);
	/* It stays: only this thread removes holders. */
	if (h && h->quarantined && !rl->rescanned) {
		rl->phase = release_quarantine; /* a cancelled transaction had it at the time */
		rl->rescanned = true;
		rl->at = 0;
	} else if (h) {
		rc = holder_forget(&t, h);
	}
	if (rc || !h || rl->phase)
		trans_cancel(&t);
	else
		trans_commit(&t);
	return rc;
}

/* ---- grants --------------------------------------------------------------------------------- */

#define ALL_GRANTS (1u << SEG_GRANT_READ | 1u << SEG_GRANT_RW | 1u << SEG_GRANT_PIN)

/* The number of an inode that it has a grant of; 0: none. */
static inum_t next_granted(struct release *rl)
{
	struct grant *g = NULL;
	struct holder *h;
	inum_t ino = 0;

	pthread_mutex_lock(&rl->ls->mutex);
	h = holder_find(rl->ls, rl->holder);
	if (h)
		g = TAILQ_FIRST(&h->grants);
	if (g)
		ino = g->in->ino; /* it holds a reference */
	pthread_mutex_unlock(&rl->ls->mutex);
	return ino;
}

static int release_grants(struct release *rl)
{
	struct fs *fs = rl->ls->fs;
	struct grant_list dead = { NULL };
	struct grant *spare = NULL;
	inum_t ino = next_granted(rl);
	bool preallocated;
	struct inode *in;
	int rc;

	if (!ino) {
		rl->phase = release_quarantine;
		return 0;
	}
	fs_wrlock(fs);
	rc = inode_get(fs, ino, &in);
	if (rc) {
		fs_unlock(fs);
		return rc == -ENOENT ? 0 : rc; /* it went between the two */
	}
	pthread_mutex_lock(&in->lock);
	preallocated = seg_next_grant_locked(in, 1u << SEG_GRANT_RW, rl->holder, 0, UINT64_MAX,
					     NULL);
	grant_cut_locked(in, rl->holder, ALL_GRANTS, 0, UINT64_MAX, &spare, &dead);
	pthread_mutex_unlock(&in->lock);
	fs_unlock(fs);
	grant_list_free(fs, &dead);
	if (preallocated)
		layouts_want_trim(in);
	inode_put(in);
	return 0;
}

/* ---- exposures ------------------------------------------------------------------------------ */

/* The record at or behind *key that is the holder's. 0, -ENOENT, -EAGAIN (budget spent), or a
 * code. */
static int find_exposure(struct release *rl, struct key *key, unsigned *budget,
			 struct exposure_disk *rec)
{
	struct bt_cursor c;
	int rc;

	bt_cursor_init(&c, fs_tree(rl->ls->fs, TREE_EXPOSURE));
	rc = bt_seek(&c, *key, BT_GE);
	while (!rc) {
		unsigned size;
		const void *p = bt_record(&c, &size);

		if (size != sizeof(*rec)) {
			rc = -ERR_RECORD_SHAPE;
			break;
		}
		memcpy(rec, p, sizeof(*rec));
		*key = bt_key(&c);
		if (get64(rec->holder) == rl->holder)
			break;
		if (!--*budget) {
			rc = -EAGAIN;
			break;
		}
		rc = bt_next(&c);
	}
	bt_cursor_release(&c);
	return rc;
}

/* Staged blocks of [file, *end), from the end: *end is where the next piece ends. */
static int free_staged(struct trans *t, struct inode *in, fileblk_t file, fileblk_t *end)
{
	struct extent left;
	int rc = trans_join_inode(t, in);

	if (!rc)
		rc = extmap_remove(t, in, FORK_STAGING, file, *end, STAGED_RECORDS, end);
	if (!rc)
		rc = extmap_lookup(in, FORK_STAGING, 0, FILE_MAX_BLOCKS, &left);
	if (!rc && left.state == EXT_HOLE && left.len == FILE_MAX_BLOCKS)
		in->core.flags &= ~INODE_F_STAGING;
	return rc ? rc : inode_write(t, in);
}

/* One record, or a piece of it. *in: the inode of the last one, to be put after the transaction; it
 * is got when needed. -EAGAIN: another inode's turn, in the next transaction. */
static int drop_exposure(struct release *rl, struct trans *t, struct key key,
			 const struct exposure_disk *rec, struct inode **in)
{
	struct tree tree = fs_tree(t->fs, TREE_EXPOSURE);
	fileblk_t end = key.lo + get32(rec->length), at = end;
	int rc;

	if (!(get32(rec->flags) & EXPOSURE_F_STAGING))
		return bt_delete(t, tree, key);
	if (*in && (*in)->ino != key.hi)
		return -EAGAIN;
	rc = *in ? 0 : inode_get(t->fs, key.hi, in);
	if (rc == -ENOENT) /* being deleted: its blocks are the reaper's */
		return bt_delete(t, tree, key);
	if (!rc)
		rc = free_staged(t, *in, key.lo, &at);
	return rc ? rc : exposure_remove(t, key.hi, at, end, rl->holder);
}

static int drop_exposures(struct release *rl, struct trans *t, struct inode **in, struct key *key,
			  bool *changed)
{
	unsigned budget = SCAN_RECORDS;
	int rc = 0;

	while (!rc && trans_room(t) > EXPOSURE_STEP_BLOCKS) {
		struct exposure_disk rec;

		rc = find_exposure(rl, key, &budget, &rec);
		if (!rc)
			rc = drop_exposure(rl, t, *key, &rec, in);
		*changed |= !rc;
	}
	return rc;
}

static int look_for_exposure(struct release *rl)
{
	unsigned budget = LOOK_RECORDS;
	struct exposure_disk rec;
	int rc;

	fs_rdlock(rl->ls->fs);
	rc = find_exposure(rl, &rl->key, &budget, &rec);
	fs_unlock(rl->ls->fs);
	return rc;
}

static int release_exposures(struct release *rl)
{
	struct inode *in = NULL;
	bool changed = false;
	struct key key;
	struct trans t;
	int rc = look_for_exposure(rl);

	if (rc == -ENOENT) {
		rl->phase = release_grants;
		return 0;
	}
	if (!rc)
		rc = release_begin(rl, &t);
	if (rc)
		return rc;
	key = rl->key;
	rc = drop_exposures(rl, &t, &in, &key, &changed);
	if (rc == -ENOENT || rc == -EAGAIN)
		rc = 0;
	if (changed && !rc) {
		if (in)
			note_unshare(in);
		trans_commit(&t);
	} else {
		trans_cancel(&t);
	}
	if (in)
		inode_put(in);
	rl->key = key;
	return rc;
}

/* ---- beginning ------------------------------------------------------------------------------ */

static int release_forget(struct release *rl)
{
	struct fs *fs = rl->ls->fs;

	fs_wrlock(fs);
	lost_del(fs, 0, rl->holder);
	fs_unlock(fs);
	holder_clean(rl->ls, rl->holder);
	rl->phase = release_exposures;
	return 0;
}

static int release_returned(struct release *rl)
{
	fs_wrlock(rl->ls->fs);
	if (!is_lost(rl))
		holder_clean(rl->ls, rl->holder);
	fs_unlock(rl->ls->fs);
	rl->phase = release_quarantine;
	return 0;
}

void release_start(struct layouts *ls, uint64_t holder)
{
	struct release *rl = calloc(1, sizeof(*rl));

	layouts_working(ls);
	if (!rl) {
		log_msg(LOG_ERROR, "layouts: no memory to free what holder %llu had",
			(unsigned long long)holder);
		release_ended(ls, holder);
		layouts_ran(ls);
		return;
	}
	*rl = (struct release){ .op = { .resume = release_go, .ctx = ls->ctx }, .ls = ls,
				.holder = holder };
	rl->gone = holder_state_of(ls, holder) == HOLDER_GONE;
	rl->phase = rl->gone ? release_forget : release_returned;
	ioctx_wake(&rl->op);
}
