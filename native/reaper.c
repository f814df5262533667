/* SPDX-License-Identifier: MIT
 *
 * reaper.c - the background thread that frees what orphans and cut-off intents left (reaper.h).
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
#include "reaper.h"

#include <string.h>

#include "file_remap.h"
#include "log.h"
#include "xattr.h"

#define SCAN_BATCH 64u
#define XATTRS_A_TRANS 16u
#define PARTS_A_TRANS 8u
#define EXPOSURES_A_TRANS 32u
#define GATHER_MAX 256u
#define GATHER_NS 5000000
/* One transaction does for all of them. */
_Static_assert(REMOVE_TRANS_BLOCKS >= REMAP_TRANS_BLOCKS, "a piece of an intent fits");

struct item {
	struct item *next;
	struct inode *in;
	bool is_intent;
	uint64_t id;
	struct intent_disk rec; /* of an intent: what is left, as on disk */
	struct inode *other;    /* EXCHANGE between two files; else NULL */
	struct seg seg, other_seg;
};

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

/* ---- intents on disk ------------------------------------------------------------------------ */

int intent_add(struct trans *t, const struct intent_disk *rec, uint64_t *id)
{
	struct root_disk *root;
	int rc;

	rc = trans_join(t, t->fs->root);
	if (rc)
		return rc;
	root = fs_root(t->fs);
	*id = get64(root->next_intent);
	root->next_intent = put64(*id + 1);
	return bt_insert(t, fs_tree(t->fs, TREE_INTENT), KEY(*id, 0), rec, sizeof(*rec));
}

int intent_del(struct trans *t, uint64_t id)
{
	return bt_delete(t, fs_tree(t->fs, TREE_INTENT), KEY(id, 0));
}

int intent_keep(struct trans *t, const struct intent_disk *rec, bool left, uint64_t *id)
{
	if (!left)
		return *id ? intent_del(t, *id) : 0;
	if (!*id)
		return intent_add(t, rec, id);
	return bt_update(t, fs_tree(t->fs, TREE_INTENT), KEY(*id, 0), rec, sizeof(*rec));
}

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

static int free_symlink(struct trans *t, struct item *it, bool *gone)
{
	struct tree tree = fs_tree(t->fs, TREE_SYMLINK);

	for (unsigned n = 0; n < PARTS_A_TRANS; n++) {
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

/* What holders were told of it: nobody can ask for it any more. Their blocks have gone to quarantine. */
static int free_exposures(struct trans *t, struct item *it, bool *gone)
{
	struct tree tree = fs_tree(t->fs, TREE_EXPOSURE);

	for (unsigned n = 0; n < EXPOSURES_A_TRANS; n++) {
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

static int exchange_piece(struct trans *t, struct item *it)
{
	struct intent_disk *rec = &it->rec;
	struct exchange_state ex = { .a = get64(rec->a), .b = get64(rec->c), .left = get64(rec->d),
				     .intent = it->id };
	int rc = exchange_some(t, it->in, it->other ? it->other : it->in, &ex);

	rec->a = put64(ex.a);
	rec->c = put64(ex.b);
	rec->d = put64(ex.left);
	return rc ? rc : ex.left > 0;
}

static int shift_piece(struct trans *t, struct item *it)
{
	struct intent_disk *rec = &it->rec;
	struct shift_state sh = { .at = get64(rec->a), .by = get64(rec->b), .end = get64(rec->c),
				  .intent = it->id };
	bool collapse = get32(rec->type) == INTENT_COLLAPSE;
	int rc = collapse ? collapse_some(t, it->in, &sh) : insert_some(t, it->in, &sh);

	rec->a = put64(sh.at);
	rec->c = put64(sh.end);
	if (rc)
		return rc;
	return collapse ? sh.at < FILE_MAX_BLOCKS : sh.end > sh.at;
}

static int atomic_piece(struct trans *t, struct item *it)
{
	fileblk_t at = get64(it->rec.a), end = get64(it->rec.b);
	int rc = atomic_some(t, it->in, &at, end, get64(it->rec.c), it->id);

	it->rec.a = put64(at);
	return rc ? rc : at < end;
}

static int remove_piece(struct trans *t, struct item *it)
{
	enum fork fork = get32(it->rec.flags) & INTENT_F_STAGING ? FORK_STAGING : FORK_DATA;
	fileblk_t a = get64(it->rec.a), end = FILE_MAX_BLOCKS;
	struct extent left;
	int rc;

	if (get32(it->rec.type) == INTENT_PUNCH)
		end = get64(it->rec.b);
	rc = extmap_remove(t, it->in, fork, a, end, 64, &end);
	if (rc < 0)
		return rc;
	if (end > a)
		return 1;
	if (fork == FORK_STAGING) {
		rc = extmap_lookup(it->in, FORK_STAGING, 0, FILE_MAX_BLOCKS, &left);
		if (rc < 0)
			return rc;
		if (left.state == EXT_HOLE && left.len == FILE_MAX_BLOCKS)
			it->in->core.flags &= ~INODE_F_STAGING;
	}
	return intent_del(t, it->id);
}

static int intent_piece(struct trans *t, struct item *it, bool *gone)
{
	switch (get32(it->rec.type)) {
	case INTENT_ATOMIC: return atomic_piece(t, it);
	case INTENT_EXCHANGE: return exchange_piece(t, it);
	case INTENT_COLLAPSE:
	case INTENT_INSERT: return shift_piece(t, it);
	default: return remove_piece(t, it);
	}
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

static void enqueue(struct reaper *rp, struct item *it)
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

/* Orphans come in crowds (rm -r), one every few microseconds: waking up for each would cost those who unlink more than
 * the work does. So the first of a crowd waits a little for the others. Mutex held, queue not empty. */
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
	enqueue(rp, it);
}

/* ---- start and stop ------------------------------------------------------------------------- */

/* Between its first and its last transaction the map shows a mix of before and after. */
static bool shows_a_mix(uint32_t type)
{
	return type == INTENT_ATOMIC || type == INTENT_EXCHANGE || type == INTENT_COLLAPSE ||
	       type == INTENT_INSERT;
}

/* The blocks of ino that it is about (an exchange: its first side). false: no intent that this version
 * writes. */
static bool intent_range(const struct intent_disk *rec, fileblk_t *start, fileblk_t *end)
{
	const uint64_t most = FILE_MAX_BLOCKS;
	uint64_t a = get64(rec->a), b = get64(rec->b), c = get64(rec->c), d = get64(rec->d);

	*start = a;
	*end = most;
	switch (get32(rec->type)) {
	case INTENT_FREE_TAIL:
		return a <= most;
	case INTENT_PUNCH:
		*end = b;
		return a < b && b <= most;
	case INTENT_ATOMIC:
		*end = b;
		return a < b && b <= most && c <= FILE_MAX_BYTES;
	case INTENT_EXCHANGE:
		*end = a + d;
		return d && d <= most && a <= most - d && c <= most - d;
	case INTENT_COLLAPSE:
		*start = a - b;
		return b && b <= a && a <= most;
	case INTENT_INSERT:
		return b && b <= most && a <= c && c <= most - b;
	default:
		return false;
	}
}

/* Two intents of one range: both are done, in turn. */
static void hold_range(struct item *it, struct inode *in, struct seg *s, fileblk_t start, fileblk_t end)
{
	seg_init(s, SEG_MAP, start << BLOCK_SHIFT,
		 end < FILE_MAX_BLOCKS ? end << BLOCK_SHIFT : UINT64_MAX, NULL);
	if (seg_try(in, s))
		log_msg(LOG_WARN, "intent %llu overlaps another", (unsigned long long)it->id);
}

/* The inodes of an intent into memory. */
static int find_inodes(struct fs *fs, struct item *it)
{
	uint64_t other = get64(it->rec.b);
	bool two = get32(it->rec.type) == INTENT_EXCHANGE && other != get64(it->rec.ino);
	int rc;

	fs_rdlock(fs);
	rc = inode_get(fs, get64(it->rec.ino), &it->in);
	if (!rc && two)
		rc = inode_get(fs, other, &it->other);
	fs_unlock(fs);
	if (rc && it->in)
		inode_put(it->in);
	return rc;
}

static void hold_intent(struct item *it, fileblk_t start, fileblk_t end)
{
	fileblk_t c = get64(it->rec.c);
	nblocks_t d = get64(it->rec.d);

	if (shows_a_mix(get32(it->rec.type)))
		it->in->remapping = true;
	if (it->other) {
		it->other->remapping = true;
		hold_range(it, it->other, &it->other_seg, c, c + d);
	} else if (get32(it->rec.type) == INTENT_EXCHANGE) {
		start = MIN(start, c);
		end = MAX(end, c + d);
	}
	hold_range(it, it->in, &it->seg, start, end);
}

/* An intent of the mount. An intent without its inode cannot be: both change in one transaction. */
static int take_intent(struct reaper *rp, uint64_t id, const struct intent_disk *rec)
{
	fileblk_t start, end;
	struct item *it;
	int rc;

	if (!intent_range(rec, &start, &end)) {
		log_msg(LOG_ERROR, "intent %llu is of no kind that this version finishes",
			(unsigned long long)id);
		return 0;
	}
	it = calloc(1, sizeof(*it));
	if (!it)
		return -ENOMEM;
	it->is_intent = true;
	it->id = id;
	it->rec = *rec;
	rc = find_inodes(rp->fs, it);
	if (rc) {
		free(it);
		if (rc == -ENOENT) /* and those behind it are still to be done */
			log_msg(LOG_ERROR, "intent %llu is of an inode that does not exist",
				(unsigned long long)id);
		return rc == -ENOENT ? 0 : rc;
	}
	hold_intent(it, start, end);
	enqueue(rp, it);
	return 0;
}

/* Read-only: nothing can be finished. */
static int refuse_intent(uint64_t id, const struct intent_disk *rec)
{
	if (!shows_a_mix(get32(rec->type)))
		return 0;
	log_msg(LOG_ERROR, "intent %llu is to be finished: a read-only mount must wait for a writable one",
		(unsigned long long)id);
	return -EROFS;
}

/* rp NULL: read-only. */
static int take_intents(struct fs *fs, struct reaper *rp)
{
	uint64_t from = 0;
	int rc;

	for (;;) {
		struct intent_disk rec;
		struct bt_cursor c;
		unsigned len;

		fs_rdlock(fs);
		bt_cursor_init(&c, fs_tree(fs, TREE_INTENT));
		rc = bt_seek(&c, KEY(from, 0), BT_GE);
		if (!rc) {
			const void *p = bt_record(&c, &len);

			from = bt_key(&c).hi;
			if (len == sizeof(rec))
				memcpy(&rec, p, sizeof(rec));
			else
				rc = -ERR_RECORD_SHAPE;
		}
		bt_cursor_release(&c);
		fs_unlock(fs);
		if (!rc)
			rc = rp ? take_intent(rp, from, &rec) : refuse_intent(from, &rec);
		if (rc)
			return rc == -ENOENT ? 0 : rc;
		if (++from == 0) /* no intent that we wrote: numbers begin at 1 */
			return -ERR_RECORD_SHAPE;
	}
}

int reaper_prepare(struct fs *fs)
{
	pthread_condattr_t attr;
	struct reaper *rp;
	int rc;

	if (fs->read_only)
		return take_intents(fs, NULL);
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
	rc = take_intents(fs, rp);
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
