/* SPDX-License-Identifier: MIT
 *
 * reaper_intent.c - intents: what operations of more than one transaction leave on disk, and what
 * the reaper does for those that a crash cut off (reaper.h).
 */
#include <string.h>

#include "file_remap.h"
#include "log.h"
#include "reaper_priv.h"

/* One transaction does for all of them. */
_Static_assert(REMOVE_TRANS_BLOCKS >= REMAP_TRANS_BLOCKS, "a piece of an intent fits");

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

/* ---- what is done for one ------------------------------------------------------------------- */

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

int intent_piece(struct trans *t, struct item *it, bool *gone)
{
	switch (get32(it->rec.type)) {
	case INTENT_ATOMIC: return atomic_piece(t, it);
	case INTENT_EXCHANGE: return exchange_piece(t, it);
	case INTENT_COLLAPSE:
	case INTENT_INSERT: return shift_piece(t, it);
	default: return remove_piece(t, it);
	}
}

/* ---- at mount ------------------------------------------------------------------------------- */

/* Between its first and its last transaction the map shows a mix of before and after. */
static bool shows_a_mix(uint32_t type)
{
	return type == INTENT_ATOMIC || type == INTENT_EXCHANGE || type == INTENT_COLLAPSE ||
	       type == INTENT_INSERT;
}

/* The blocks of ino that it is about (an exchange: its first side). false: no intent that this
 * version writes. */
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
static void hold_range(struct item *it, struct inode *in, struct seg *s, fileblk_t start,
		       fileblk_t end)
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
static int take_intent(struct fs *fs, struct reaper *rp, uint64_t id, const struct intent_disk *rec)
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
	rc = find_inodes(fs, it);
	if (rc) {
		free(it);
		if (rc == -ENOENT) /* and those behind it are still to be done */
			log_msg(LOG_ERROR, "intent %llu is of an inode that does not exist",
				(unsigned long long)id);
		return rc == -ENOENT ? 0 : rc;
	}
	hold_intent(it, start, end);
	reaper_enqueue(rp, it);
	return 0;
}

/* Read-only: nothing can be finished. */
static int refuse_intent(uint64_t id, const struct intent_disk *rec)
{
	if (!shows_a_mix(get32(rec->type)))
		return 0;
	log_msg(LOG_ERROR,
		"intent %llu is to be finished: a read-only mount must wait for a writable one",
		(unsigned long long)id);
	return -EROFS;
}

int intents_take(struct fs *fs, struct reaper *rp)
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
			rc = rp ? take_intent(fs, rp, from, &rec) : refuse_intent(from, &rec);
		if (rc)
			return rc == -ENOENT ? 0 : rc;
		if (++from == 0) /* no intent that we wrote: numbers begin at 1 */
			return -ERR_RECORD_SHAPE;
	}
}
