/* SPDX-License-Identifier: MIT
 *
 * reaper.c - the background thread that frees what orphans and cut-off intents left (reaper.h).
 * What there is to do for an intent is in reaper_intent.c.
 *
 * Definitions: an item is one inode to delete (orphan) or one intent found at mount. Items are
 * worked off in order, each in rolling transactions; the orphan or intent record disappears in the
 * last one, so a crash anywhere repeats only what is left.
 *
 * Invariants:
 *  1. An orphan item owns a reference to an inode without other users; nobody else changes it.
 *  2. An intent item owns a reference and a held MAP segment of each of its inodes, until it is
 *     finished or the thread stops.
 *  3. busy counts items queued or under way, and 1 for the scan of TREE_ORPHAN at mount until it
 *     has ended.
 *
 * The scan: what is on the orphan list and in use belongs to a user (unlinked while open,
 * O_TMPFILE). So the scan only takes and drops a reference; when that was the only one, inode_put()
 * itself hands the orphan over.
 */
#include "file_remap.h"
#include "log.h"
#include "reaper_priv.h"
#include "xattr.h"

#define SCAN_BATCH 64u
#define XATTRS_A_TRANS 16u
#define PARTS_A_TRANS 8u
#define EXPOSURES_A_TRANS 32u
#define GATHER_MAX 256u
#define GATHER_NS 5000000
struct reaper {
	struct fs *fs;
	pthread_t thread;
	pthread_mutex_t mutex; /* queue, waiters, stop */
	pthread_cond_t work, idle;
	struct item *head, *tail;
	struct reaper_waiter *waiters;
	unsigned queued;
	bool hurry; /* somebody waits: no gathering until the queue is empty */
	bool stop, running;
	_Atomic unsigned busy;
};

/* ---- rolling work, on the reaper's own thread ----------------------------------------------- */

static bool stopping(struct reaper *rp)
{
	bool stop;

	pthread_mutex_lock(&rp->mutex);
	stop = rp->stop;
	pthread_mutex_unlock(&rp->mutex);
	return stop;
}

static int begin(struct fs *fs, struct trans *t)
{
	int rc;

	while ((rc = trans_begin(fs, t, REMOVE_TRANS_BLOCKS)) == -ERR_JOURNAL_FULL) {
		rc = jrn_wait_space_blocking(fs);
		if (rc)
			return rc;
	}
	if (!rc)
		t->alloc_flags |= ALLOC_USE_RESERVE;
	return rc;
}

/* One piece of the work on an inode. 0: nothing is left, 1: more to do, or a negative code. */
typedef int (*piece_fn)(struct trans *t, struct item *it, bool *gone);

/* Repeats fn in transactions until it says 0. -ECANCELED: the thread is to stop. */
static int roll(struct reaper *rp, struct item *it, piece_fn fn)
{
	struct trans t;
	bool gone = false;
	int rc = 1;

	while (rc == 1) {
		if (stopping(rp))
			return -ECANCELED;
		rc = begin(rp->fs, &t);
		if (rc)
			return rc;
		rc = trans_join_inode(&t, it->in);
		if (!rc)
			rc = fn(&t, it, &gone);
		if (rc >= 0 && !gone) {
			int err = inode_write(&t, it->in);

			if (err)
				rc = err;
		}
		if (rc < 0) {
			trans_cancel(&t);
			return rc;
		}
		note_unshare(it->in);
		trans_commit(&t);
	}
	return rc;
}

static int free_fork(struct trans *t, struct item *it, enum fork fork)
{
	fileblk_t end = FILE_MAX_BLOCKS;
	int rc;

	rc = extmap_remove(t, it->in, fork, 0, end, 64, &end);
	if (rc < 0)
		return rc;
	return end > 0;
}

static int free_staging(struct trans *t, struct item *it, bool *gone)
{
	return free_fork(t, it, FORK_STAGING);
}

static int free_data(struct trans *t, struct item *it, bool *gone)
{
	return free_fork(t, it, FORK_DATA);
}

static int free_xattrs(struct trans *t, struct item *it, bool *gone)
{
	return xattr_remove_all(t, it->in, XATTRS_A_TRANS);
}

/* At most so many records of the inode in a tree whose keys begin with its number. */
static int free_records(struct trans *t, struct item *it, unsigned id, unsigned most)
{
	struct tree tree = fs_tree(t->fs, id);

	for (unsigned n = 0; n < most; n++) {
		struct bt_cursor c;
		struct key key;
		int rc;

		bt_cursor_init(&c, tree);
		rc = bt_seek(&c, KEY(it->in->ino, 0), BT_GE);
		key = rc ? KEY_MIN : bt_key(&c);
		bt_cursor_release(&c);
		if (rc == -ENOENT || (!rc && key.hi != it->in->ino))
			return 0;
		if (!rc)
			rc = bt_delete(t, tree, key);
		if (rc)
			return rc;
	}
	return 1;
}

static int free_symlink(struct trans *t, struct item *it, bool *gone)
{
	return free_records(t, it, TREE_SYMLINK, PARTS_A_TRANS);
}

/* What holders were told of it: nobody can ask for it any more. Their blocks have gone to
 * quarantine. */
static int free_exposures(struct trans *t, struct item *it, bool *gone)
{
	return free_records(t, it, TREE_EXPOSURE, EXPOSURES_A_TRANS);
}

static bool any_exposures(struct fs *fs)
{
	bool any;

	fs_rdlock(fs);
	any = bt_records(fs_tree(fs, TREE_EXPOSURE)) != 0;
	fs_unlock(fs);
	return any;
}

static int delete_inode(struct trans *t, struct item *it, bool *gone)
{
	*gone = true;
	return inode_delete(t, it->in);
}

static int reap_orphan(struct reaper *rp, struct item *it)
{
	static const piece_fn pieces[] = { free_staging, free_data, free_xattrs, free_symlink,
					   free_exposures, delete_inode };
	int rc = 0;

	for (unsigned i = 0; i < ARRAY_LEN(pieces) && !rc; i++) {
		if (pieces[i] == free_symlink && (it->in->core.mode & 0170000) != 0120000)
			continue;
		if (pieces[i] == free_exposures && !any_exposures(rp->fs))
			continue;
		rc = roll(rp, it, pieces[i]);
	}
	return rc;
}

static void finish_item(struct reaper *rp, struct item *it)
{
	int rc = it->is_intent ? roll(rp, it, intent_piece) : reap_orphan(rp, it);

	/* The segment goes, the intent stays: whoever extended the file now would find what was cut
	 * off, and the next mount would take away or move what he wrote. */
	if (rc && rc != -ECANCELED && it->is_intent)
		fs_shutdown_writes(rp->fs, rc,
				   "inode %llu: what a crash cut off could not be finished",
				   (unsigned long long)it->in->ino);
	if (rc && rc != -ECANCELED && !fs_is_shutdown(rp->fs))
		log_msg(LOG_ERROR, "inode %llu: its blocks could not be freed: %s",
			(unsigned long long)it->in->ino, err_text(rc));
}

static void item_free(struct item *it)
{
	if (it->seg.state == SEG_HELD)
		seg_release(it->in, &it->seg);
	inode_put(it->in);
	if (it->other) {
		if (it->other_seg.state == SEG_HELD)
			seg_release(it->other, &it->other_seg);
		inode_put(it->other);
	}
	free(it);
}

/* ---- the queue ------------------------------------------------------------------------------ */

void reaper_enqueue(struct reaper *rp, struct item *it)
{
	atomic_fetch_add(&rp->busy, 1);
	pthread_mutex_lock(&rp->mutex);
	it->next = NULL;
	*(rp->tail ? &rp->tail->next : &rp->head) = it;
	rp->tail = it;
	rp->queued++;
	if (rp->queued == 1 || rp->queued == GATHER_MAX || it->is_intent)
		pthread_cond_signal(&rp->work);
	pthread_mutex_unlock(&rp->mutex);
}

static struct item *dequeue(struct reaper *rp)
{
	struct item *it;

	pthread_mutex_lock(&rp->mutex);
	it = rp->stop ? NULL : rp->head;
	if (it) {
		rp->head = it->next;
		rp->queued--;
		if (!rp->head) {
			rp->tail = NULL;
			rp->hurry = false;
		}
	}
	pthread_mutex_unlock(&rp->mutex);
	return it;
}

static void wake_waiters(struct reaper *rp)
{
	struct reaper_waiter *w;

	pthread_mutex_lock(&rp->mutex);
	w = rp->waiters;
	rp->waiters = NULL;
	pthread_mutex_unlock(&rp->mutex);
	while (w) {
		struct reaper_waiter *next = w->next; /* w may be gone after the wake */

		ioctx_wake(w->op);
		w = next;
	}
}

/* One item (or the scan) has ended: busy falls, and whoever waits for space looks again. */
static void progress(struct reaper *rp)
{
	pthread_mutex_lock(&rp->mutex);
	if (atomic_fetch_sub(&rp->busy, 1) == 1)
		pthread_cond_broadcast(&rp->idle);
	pthread_mutex_unlock(&rp->mutex);
	wake_waiters(rp);
}

/* Next orphans on disk from *from on. How many; 0 at the end. */
static int scan_orphans(struct fs *fs, inum_t *from, inum_t *found)
{
	struct bt_cursor c;
	int n = 0, rc;

	fs_rdlock(fs);
	bt_cursor_init(&c, fs_tree(fs, TREE_ORPHAN));
	rc = bt_seek(&c, KEY(*from, 0), BT_GE);
	/* No inode has the greatest number: the scan could not go on behind it. */
	while (!rc && n < (int)SCAN_BATCH && bt_key(&c).hi < UINT64_MAX) {
		found[n++] = bt_key(&c).hi;
		rc = bt_next(&c);
	}
	bt_cursor_release(&c);
	fs_unlock(fs);
	if (n)
		*from = found[n - 1] + 1;
	return rc && rc != -ENOENT ? rc : n;
}

static void work_queue(struct reaper *rp)
{
	struct item *it;

	while ((it = dequeue(rp))) {
		finish_item(rp, it);
		item_free(it);
		progress(rp);
	}
}

static void scan(struct reaper *rp)
{
	inum_t found[SCAN_BATCH], from = 0;
	int n;

	work_queue(rp); /* intents first: file operations may be waiting for their segments */
	while (!stopping(rp) && (n = scan_orphans(rp->fs, &from, found)) > 0) {
		for (int i = 0; i < n; i++) {
			struct inode *in;
			int rc;

			fs_rdlock(rp->fs);
			rc = inode_get(rp->fs, found[i], &in);
			fs_unlock(rp->fs);
			if (!rc)
				inode_put(in);
		}
		work_queue(rp);
	}
	progress(rp);
}

/* Orphans come in crowds (rm -r), one every few microseconds: waking up for each would cost those
 * who unlink more than the work does. So the first of a crowd waits a little for the others. Mutex
 * held, queue not empty. */
static void gather(struct reaper *rp)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_nsec += GATHER_NS;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	while (!rp->stop && !rp->hurry && !rp->head->is_intent && rp->queued < GATHER_MAX)
		if (pthread_cond_timedwait(&rp->work, &rp->mutex, &until) == ETIMEDOUT)
			break;
}

static void *reaper_main(void *arg)
{
	struct reaper *rp = arg;

	scan(rp);
	pthread_mutex_lock(&rp->mutex);
	while (!rp->stop) {
		if (!rp->head) {
			pthread_cond_wait(&rp->work, &rp->mutex);
			continue;
		}
		gather(rp);
		pthread_mutex_unlock(&rp->mutex);
		work_queue(rp);
		pthread_mutex_lock(&rp->mutex);
	}
	pthread_mutex_unlock(&rp->mutex);
	return NULL;
}

void reaper_orphan(struct fs *fs, struct inode *in)
{
	struct reaper *rp = fs->reaper;
	struct item *it = rp ? calloc(1, sizeof(*it)) : NULL;

	if (!it) {
		inode_put(in); /* stays on the orphan list until the next mount */
		return;
	}
	it->in = in;
	reaper_enqueue(rp, it);
}

/* ---- start and stop ------------------------------------------------------------------------- */

int reaper_prepare(struct fs *fs)
{
	pthread_condattr_t attr;
	struct reaper *rp;
	int rc;

	if (fs->read_only)
		return intents_take(fs, NULL);
	rp = calloc(1, sizeof(*rp));
	if (!rp)
		return -ENOMEM;
	rp->fs = fs;
	pthread_mutex_init(&rp->mutex, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&rp->work, &attr);
	pthread_condattr_destroy(&attr);
	pthread_cond_init(&rp->idle, NULL);
	atomic_store(&rp->busy, 1);
	fs->reaper = rp;
	rc = intents_take(fs, rp);
	if (rc)
		reaper_destroy(fs);
	return rc;
}

int reaper_start(struct fs *fs)
{
	struct reaper *rp = fs->reaper;
	int rc;

	if (!rp)
		return 0;
	rc = -pthread_create(&rp->thread, NULL, reaper_main, rp);
	rp->running = !rc;
	if (rc)
		reaper_destroy(fs);
	return rc;
}

void reaper_stop(struct fs *fs)
{
	struct reaper *rp = fs->reaper;

	if (!rp)
		return;
	pthread_mutex_lock(&rp->mutex);
	rp->stop = true;
	pthread_cond_broadcast(&rp->work);
	pthread_mutex_unlock(&rp->mutex);
	if (rp->running)
		pthread_join(rp->thread, NULL);
	rp->running = false;
	wake_waiters(rp); /* they find that there is nothing left to wait for */
}

void reaper_destroy(struct fs *fs)
{
	struct reaper *rp = fs->reaper;

	if (!rp)
		return;
	fs->reaper = NULL; /* from here on orphans stay on their list */
	while (rp->head) {
		struct item *it = rp->head;

		rp->head = it->next;
		item_free(it);
	}
	pthread_cond_destroy(&rp->idle);
	pthread_cond_destroy(&rp->work);
	pthread_mutex_destroy(&rp->mutex);
	free(rp);
}

/* Mutex held. */
static void hurry(struct reaper *rp)
{
	rp->hurry = rp->head != NULL;
	pthread_cond_signal(&rp->work);
}

void reaper_drain(struct fs *fs)
{
	struct reaper *rp = fs->reaper;

	if (!rp)
		return;
	pthread_mutex_lock(&rp->mutex);
	while (atomic_load(&rp->busy) && !rp->stop) {
		hurry(rp);
		pthread_cond_wait(&rp->idle, &rp->mutex);
	}
	pthread_mutex_unlock(&rp->mutex);
}

bool reaper_busy(struct fs *fs)
{
	return fs->reaper && atomic_load(&fs->reaper->busy);
}

int reaper_wait(struct fs *fs, struct reaper_waiter *w)
{
	struct reaper *rp = fs->reaper;
	int rc = 0;

	if (!rp)
		return 0;
	pthread_mutex_lock(&rp->mutex);
	if (atomic_load(&rp->busy) && !rp->stop) {
		w->next = rp->waiters;
		rp->waiters = w;
		hurry(rp);
		rc = ERR_PARKED;
	}
	pthread_mutex_unlock(&rp->mutex);
	return rc;
}
