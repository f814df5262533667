/* SPDX-License-Identifier: MIT
 *
 * holder_disk.c - the records of holders, TREE_HOLDER, and what becomes of them at mount.
 *
 * Whoever has a record was there before: it is LOST, and counts as holding whatever it could. Record
 * state 3 says that it was fenced and only has to be released. States 1 and 2 mean the same.
 */
#include <string.h>

#include "btree.h"
#include "journal.h"
#include "layout_priv.h"
#include "log.h"

#define HOLDER_ID_END (1ull << 63) /* keys of exposures have that bit */
enum { RECORD_LIVE = 1, RECORD_GONE = 3 };

static struct tree records(struct fs *fs) { return fs_tree(fs, TREE_HOLDER); }

static struct holder_disk encode(const struct holder *h, uint32_t state)
{
	const struct holder_spec *spec = &h->spec;
	struct holder_disk rec = {
		.kind = put32(spec->kind), .state = put32(state),
		.fence_key = put64(spec->fence_key), .pid = put32(spec->pid),
		.uid = put32(spec->uid), .pid_start = put64(spec->pid_start),
		.key = put64(h->key),
	};

	memcpy(rec.boot_id, spec->boot_id, sizeof(rec.boot_id));
	memcpy(rec.name, spec->name, strlen(spec->name));
	memcpy(rec.fence, spec->fence, strlen(spec->fence));
	return rec;
}

static bool decode(const struct holder_disk *rec, struct holder *h)
{
	struct holder_spec *spec = &h->spec;

	*spec = (struct holder_spec){
		.kind = get32(rec->kind), .uid = get32(rec->uid), .pid = get32(rec->pid),
		.pid_start = get64(rec->pid_start), .fence_key = get64(rec->fence_key),
	};
	h->key = get64(rec->key);
	memcpy(spec->boot_id, rec->boot_id, sizeof(spec->boot_id));
	memcpy(spec->name, rec->name, sizeof(spec->name));
	memcpy(spec->fence, rec->fence, sizeof(spec->fence));
	return (spec->kind == HOLDER_LOCAL || spec->kind == HOLDER_CLIENT) &&
	       get32(rec->state) >= RECORD_LIVE && get32(rec->state) <= RECORD_GONE &&
	       !spec->name[sizeof(spec->name) - 1] && !spec->fence[sizeof(spec->fence) - 1];
}

int holder_record_add(struct trans *t, struct holder *h)
{
	struct root_disk *root = fs_root(t->fs);
	struct holder_disk rec;
	int rc = trans_join(t, t->fs->root);

	if (rc)
		return rc;
	h->id = get64(root->next_holder);
	if (!h->id || h->id >= HOLDER_ID_END) {
		fs_shutdown_writes(t->fs, -ERR_RECORD_SHAPE, "the next holder would be %llu",
				   (unsigned long long)h->id);
		return -ERR_RECORD_SHAPE;
	}
	root->next_holder = put64(h->id + 1);
	rec = encode(h, RECORD_LIVE);
	return bt_insert(t, records(t->fs), KEY(h->id, 0), &rec, sizeof(rec));
}

int holder_record_gone(struct trans *t, const struct holder *h)
{
	struct holder_disk rec = encode(h, RECORD_GONE);

	return bt_update(t, records(t->fs), KEY(h->id, 0), &rec, sizeof(rec));
}

int holder_record_delete(struct trans *t, const struct holder *h)
{
	return bt_delete(t, records(t->fs), KEY(h->id, 0));
}

/* ---- at mount -------------------------------------------------------------------------------- */

static int damaged(struct fs *fs, uint64_t id)
{
	log_msg(LOG_ERROR, "holder %llu: impossible record", (unsigned long long)id);
	return -ERR_RECORD_SHAPE;
}

static int load_record(struct fs *fs, uint64_t id, const struct holder_disk *rec)
{
	struct layouts *ls = fs->layouts;
	struct holder *h = holder_new(ls);

	if (!h)
		return -ENOMEM;
	h->id = id;
	if (!decode(rec, h) || !id || id >= get64(fs_root(fs)->next_holder) || id >= HOLDER_ID_END) {
		free(h);
		return damaged(fs, id);
	}
	h->state = get32(rec->state) == RECORD_GONE ? HOLDER_GONE : HOLDER_LOST;
	h->cause = h->state == HOLDER_LOST ? LOST_MOUNT : LOST_NOT;
	h->idle = true;
	holder_enter_table(ls, h);
	pthread_mutex_lock(&ls->mutex);
	holder_taint(ls, h);
	pthread_mutex_unlock(&ls->mutex);
	return 0;
}

static int load_records(struct fs *fs)
{
	struct bt_cursor c;
	int rc;

	bt_cursor_init(&c, records(fs));
	rc = bt_seek(&c, KEY_MIN, BT_GE);
	while (!rc) {
		unsigned len;
		const struct holder_disk *rec = bt_record(&c, &len);
		uint64_t id = bt_key(&c).hi;

		rc = len == sizeof(*rec) && !bt_key(&c).lo ? load_record(fs, id, rec) :
							     damaged(fs, id);
		if (!rc)
			rc = bt_next(&c);
	}
	bt_cursor_release(&c);
	return rc == -ENOENT ? 0 : rc;
}

/* How much is in quarantine under each name. */
static int load_quarantine(struct fs *fs)
{
	struct bt_cursor c;
	int rc;

	bt_cursor_init(&c, fs_tree(fs, TREE_QUARANTINE));
	rc = bt_seek(&c, KEY_MIN, BT_GE);
	while (!rc) {
		unsigned len;
		const struct quarantine_disk *rec = bt_record(&c, &len);

		if (len == sizeof(*rec))
			holder_count_quarantine(fs->layouts, get64(rec->holder),
					 (int64_t)get64(rec->length));
		else
			rc = -ERR_RECORD_SHAPE;
		if (!rc)
			rc = bt_next(&c);
	}
	bt_cursor_release(&c);
	return rc == -ENOENT ? 0 : rc;
}

int holders_load(struct fs *fs)
{
	struct layouts *ls = fs->layouts;
	struct holder *h;
	int rc;

	if (fs->opt.mutant == MUTANT_HOLDERS_FORGOTTEN)
		return 0;
	fs_rdlock(fs);
	rc = load_records(fs);
	if (!rc)
		rc = fences_load(fs);
	if (!rc && !RB_EMPTY(&ls->holders))
		rc = load_quarantine(fs);
	fs_unlock(fs);
	pthread_mutex_lock(&ls->mutex);
	RB_FOREACH(h, holder_tree, &ls->holders)
		if (!rc && h->state == HOLDER_GONE)
			holder_want_release(ls, h);
	pthread_mutex_unlock(&ls->mutex);
	return rc;
}
