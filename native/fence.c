/* SPDX-License-Identifier: MIT
 *
 * fence.c - records of fences.
 */
#include "fence.h"

#include <string.h>
#include <time.h>

#include "alloc.h"
#include "btree.h"
#include "layout_priv.h"
#include "log.h"

/* One record is inserted or replaced. */
#define FENCE_TRANS_BLOCKS (TRANS_TREE_OP + TRANS_ALLOC_OP)

static struct tree records(struct fs *fs) { return fs_tree(fs, TREE_FENCE); }

/* ---- a step --------------------------------------------------------------------------------- */

/* Invariants 1 and 3. */
static bool follows(const struct fence *now, enum fence_state state, uint32_t tries)
{
	if (tries < now->tries)
		return false;
	switch (state) {
	case FENCE_DECIDED:
		return now->state == FENCE_NONE || now->state == FENCE_DECIDED;
	case FENCE_ISSUED:
		return now->state != FENCE_NONE;
	case FENCE_FAILED:
		return now->state == FENCE_ISSUED || now->state == FENCE_FAILED;
	default:
		return false;
	}
}

/* In the transaction: the object stays until its end. */
static int may_step(struct layouts *ls, uint64_t id, enum fence_state state, uint32_t tries,
		    struct holder **out)
{
	struct holder *h;
	int rc = 0;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, id);
	if (!h || h->state == HOLDER_GONE)
		rc = -ENOENT;
	else if (h->state != HOLDER_LOST)
		rc = -EBUSY;
	else if (!follows(&h->fence, state, tries))
		rc = -EINVAL;
	pthread_mutex_unlock(&ls->mutex);
	*out = h;
	return rc;
}

static int write_record(struct trans *t, const struct fence *fence, bool exists)
{
	struct fence_disk rec = {
		.holder = put64(fence->holder), .state = put32(fence->state),
		.tries = put32(fence->tries), .decided_sec = put64((uint64_t)fence->decided),
	};
	struct key key = KEY(fence->holder, 0);

	/* A full filesystem is no reason to let a holder go on. */
	t->alloc_flags |= ALLOC_USE_RESERVE;
	return exists ? bt_update(t, records(t->fs), key, &rec, sizeof(rec)) :
			bt_insert(t, records(t->fs), key, &rec, sizeof(rec));
}

struct change {
	struct holder *h;
	struct fence fence;
};

static void step_ended(void *arg, xid_t xid)
{
	struct change *change = arg;
	struct layouts *ls = change->h->ls;

	if (!xid)
		return;
	pthread_mutex_lock(&ls->mutex);
	change->h->fence = change->fence;
	pthread_mutex_unlock(&ls->mutex);
}

int fence_put(struct fs *fs, uint64_t holder, enum fence_state state, uint32_t tries, xid_t *xid)
{
	struct change change;
	struct trans t;
	bool exists;
	int rc = trans_begin(fs, &t, FENCE_TRANS_BLOCKS);

	if (rc)
		return rc;
	rc = may_step(fs->layouts, holder, state, tries, &change.h);
	if (!rc) {
		exists = change.h->fence.state != FENCE_NONE;
		change.fence = (struct fence){
			.holder = holder, .state = state, .tries = tries,
			.decided = exists ? change.h->fence.decided : (int64_t)time(NULL),
		};
		rc = write_record(&t, &change.fence, exists);
	}
	if (!rc)
		rc = trans_on_end(&t, step_ended, &change);
	if (rc)
		trans_cancel(&t);
	else
		*xid = trans_commit(&t);
	return rc;
}

/* ---- the end -------------------------------------------------------------------------------- */

int fence_record_delete(struct trans *t, const struct holder *h)
{
	return h->fence.state ? bt_delete(t, records(t->fs), KEY(h->id, 0)) : 0;
}

static void over(void *arg, xid_t xid)
{
	struct holder *h = arg;

	if (!xid)
		return;
	pthread_mutex_lock(&h->ls->mutex);
	h->fence = (struct fence){ .state = FENCE_NONE };
	pthread_mutex_unlock(&h->ls->mutex);
}

int fence_over(struct trans *t, struct holder *h)
{
	int rc = fence_record_delete(t, h);

	return rc || !h->fence.state ? rc : trans_on_end(t, over, h);
}

/* ---- at mount ------------------------------------------------------------------------------- */

static bool decode(uint64_t id, const struct fence_disk *rec, struct fence *out)
{
	*out = (struct fence){
		.holder = get64(rec->holder), .state = (enum fence_state)get32(rec->state),
		.tries = get32(rec->tries), .decided = (int64_t)get64(rec->decided_sec),
	};
	return out->holder == id && (out->state == FENCE_DECIDED || out->state == FENCE_ISSUED ||
				     out->state == FENCE_FAILED);
}

/* Whose fence it is was loaded before. Invariant 2. */
static int load_record(struct fs *fs, struct key key, const struct fence_disk *rec, unsigned len)
{
	struct layouts *ls = fs->layouts;
	struct fence fence;
	struct holder *h;
	bool ok = len == sizeof(*rec) && !key.lo && decode(key.hi, rec, &fence);

	pthread_mutex_lock(&ls->mutex);
	h = ok ? holder_find(ls, key.hi) : NULL;
	ok = h && h->state == HOLDER_LOST;
	if (ok)
		h->fence = fence;
	pthread_mutex_unlock(&ls->mutex);
	if (ok)
		return 0;
	log_msg(LOG_ERROR, "fence of holder %llu: impossible record", (unsigned long long)key.hi);
	return -ERR_RECORD_SHAPE;
}

int fences_load(struct fs *fs)
{
	struct bt_cursor c;
	int rc;

	bt_cursor_init(&c, records(fs));
	rc = bt_seek(&c, KEY_MIN, BT_GE);
	while (!rc) {
		unsigned len;
		const struct fence_disk *rec = bt_record(&c, &len);

		rc = load_record(fs, bt_key(&c), rec, len);
		if (!rc)
			rc = bt_next(&c);
	}
	bt_cursor_release(&c);
	return rc == -ENOENT ? 0 : rc;
}

/* ---- for status ----------------------------------------------------------------------------- */

bool fence_decided(struct layouts *ls, uint64_t holder)
{
	struct holder *h;
	bool decided;

	pthread_mutex_lock(&ls->mutex);
	h = holder_find(ls, holder);
	decided = h && h->fence.state;
	pthread_mutex_unlock(&ls->mutex);
	return decided;
}

unsigned fence_list(struct fs *fs, uint64_t *holder, struct fence *out, unsigned n)
{
	struct layouts *ls = fs->layouts;
	struct holder key = { .id = *holder + 1 }, *h = NULL;
	unsigned got = 0;

	pthread_mutex_lock(&ls->mutex);
	if (*holder != UINT64_MAX)
		h = RB_NFIND(holder_tree, &ls->holders, &key);
	for (; h && got < n; h = RB_NEXT(holder_tree, &ls->holders, h))
		if (h->fence.state)
			out[got++] = h->fence;
	pthread_mutex_unlock(&ls->mutex);
	if (got)
		*holder = out[got - 1].holder;
	return got;
}
