/* SPDX-License-Identifier: MIT
 *
 * core_layout_api.c - the calls of extfs_core.h about layouts, and about changes of maps that only
 * they and the control file know: each turns its arguments into those of the core, waits for one
 * operation, and turns the answer back.
 */
#include <string.h>

#include "core_api.h"

#include "fence.h"
#include "journal.h"
#include "layout.h"

_Static_assert(EXTFS_IOMODE_READ == (int)IOMODE_READ && EXTFS_IOMODE_RW == (int)IOMODE_RW &&
	       EXTFS_IOMODE_ANY == (int)IOMODE_ANY && EXTFS_IOMODE_PIN == (int)IOMODE_PIN,
	       "iomodes");
_Static_assert(EXTFS_STATE_READ_WRITE == (int)READ_WRITE_DATA &&
	       EXTFS_STATE_READ == (int)READ_DATA &&
	       EXTFS_STATE_INVALID == (int)INVALID_DATA && EXTFS_STATE_NONE == (int)NONE_DATA,
	       "states");
_Static_assert(EXTFS_LAYOUT_F_WAIT == LAYOUT_F_WAIT && EXTFS_LAYOUT_F_RECALL == LAYOUT_F_RECALL &&
	       EXTFS_LAYOUT_F_ATOMIC == LAYOUT_F_ATOMIC && EXTFS_LAYOUT_F_LAZY == LAYOUT_F_LAZY &&
	       EXTFS_LAYOUT_F_MTIME == LAYOUT_F_MTIME && EXTFS_LAYOUT_F_ALL == LAYOUT_F_ALL,
	       "flags");
_Static_assert(EXTFS_HOLDER_CLIENT_KIND == (int)HOLDER_CLIENT &&
	       EXTFS_HOLDER_LOST == (int)HOLDER_LOST &&
	       EXTFS_HOLDER_GONE == (int)HOLDER_GONE, "holders");
_Static_assert(EXTFS_LOST_MOUNT == (int)LOST_MOUNT && EXTFS_LOST_ENDED == (int)LOST_ENDED &&
	       EXTFS_FENCE_DECIDED == (int)FENCE_DECIDED &&
	       EXTFS_FENCE_ISSUED == (int)FENCE_ISSUED &&
	       EXTFS_FENCE_FAILED == (int)FENCE_FAILED, "holders and fences");
_Static_assert(EXTFS_EV_HOLDER_GONE == (int)EVENT_HOLDER_GONE &&
	       EXTFS_EV_OVERFLOW == (int)EVENT_OVERFLOW &&
	       EXTFS_EV_LOCK_FREE == (int)EVENT_LOCK_FREE &&
	       EXTFS_EV_LOCK_WANTED == (int)EVENT_LOCK_WANTED, "events");
_Static_assert(EXTFS_LATENCY_BUCKETS == LATENCY_BUCKETS &&
	       EXTFS_LATENCY_RECALL == (int)LATENCY_RECALL, "latencies");
_Static_assert(sizeof(struct extfs_core_range) == sizeof(struct layout_range) &&
	       offsetof(struct extfs_core_range, length) == offsetof(struct layout_range, length),
	       "a range is a range");

static int64_t run(struct fs *fs, uint64_t ino, struct file_op template)
{
	struct inode *in;
	int64_t res = core_inode(fs, ino, &in);
	struct file_op fop;

	if (res)
		return res;
	file_op_init(&fop, template.kind, in, NULL);
	fop.offset = template.offset;
	fop.len = template.len;
	fop.layout = template.layout;
	res = file_run_blocking(&fop);
	inode_put(in);
	return res;
}

/* ---- layouts -------------------------------------------------------------------------------- */

int core_layout_in(const struct extfs_layout_args *a, bool get, struct layout_args *out)
{
	*out = (struct layout_args){
		.holder = a->holder, .flags = a->flags, .iomode = (enum layout_iomode)a->iomode,
		.offset = a->offset, .length = a->length, .min_length = a->min_length,
		.time_ms = a->time_ms, .seq = a->seq, .nranges = a->nranges, .size = a->size,
		.ranges = (const struct layout_range *)a->ranges,
		.mtime = { .sec = a->mtime, .nsec = a->mtime_ns },
	};
	if (!get)
		return 0;
	out->cap = MIN(a->cap, LAYOUT_MAX_EXTENTS);
	if (!out->cap)
		return -EINVAL;
	out->extents = malloc(out->cap * sizeof(*out->extents));
	return out->extents ? 0 : -ENOMEM;
}

void core_layout_out(const struct layout_args *a, struct extfs_layout_args *args, int64_t result)
{
	args->size = a->size;
	if (!a->extents)
		return;
	for (unsigned i = 0; result >= 0 && i < a->count; i++)
		args->extents[i] = (struct extfs_core_layout_extent){
			.offset = a->extents[i].offset, .device = a->extents[i].device,
			.length = a->extents[i].length, .state = (int)a->extents[i].state,
		};
	args->count = a->count;
	args->next = a->next;
	args->seq = a->seq;
	args->map_gen = a->map_gen;
}

void core_layout_free(struct layout_args *a)
{
	free(a->extents);
}

static int layout_call(struct fs *fs, uint64_t ino, struct extfs_layout_args *args,
		       enum file_op_kind kind)
{
	struct layout_args a;
	int err = core_layout_in(args, kind == FILE_LAYOUT_GET, &a);

	if (err)
		return err;
	err = (int)run(fs, ino, (struct file_op){ .kind = kind, .layout = &a });
	core_layout_out(&a, args, err);
	core_layout_free(&a);
	return err;
}

int extfs_layout_get(struct fs *fs, uint64_t ino, struct extfs_layout_args *args)
{
	return layout_call(fs, ino, args, FILE_LAYOUT_GET);
}

int extfs_layout_commit(struct fs *fs, uint64_t ino, struct extfs_layout_args *args)
{
	return layout_call(fs, ino, args, FILE_LAYOUT_COMMIT);
}

int extfs_layout_return(struct fs *fs, uint64_t ino, struct extfs_layout_args *args)
{
	if (!ino && (args->flags & LAYOUT_F_ALL))
		ino = fs->super.root_inode;
	return layout_call(fs, ino, args, FILE_LAYOUT_RETURN);
}

int extfs_layout_recall(struct fs *fs, uint64_t ino, uint64_t holder, int iomode, uint64_t offset,
			uint64_t length)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	err = layout_recall(in, holder, (enum layout_iomode)iomode, offset, length);
	inode_put(in);
	return err;
}

int extfs_layout_watch(struct fs *fs, uint64_t ino, uint64_t holder, int on)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	err = layout_watch(in, holder, on != 0);
	inode_put(in);
	return err;
}

/* ---- holders -------------------------------------------------------------------------------- */

int extfs_holder_register(struct fs *fs, struct extfs_holder *holder)
{
	struct holder_spec spec = {
		.kind = (enum holder_kind)holder->kind, .uid = holder->uid, .pid = holder->pid,
		.pid_start = holder->pid_start, .fence_key = holder->fence_key,
	};

	_Static_assert(sizeof(spec.name) == sizeof(holder->name) &&
		       sizeof(spec.fence) == sizeof(holder->fence), "texts");
	if ((spec.kind != HOLDER_LOCAL && spec.kind != HOLDER_CLIENT) ||
	    !memchr(holder->name, 0, sizeof(holder->name)) ||
	    !memchr(holder->fence, 0, sizeof(holder->fence)))
		return -EINVAL;
	memcpy(spec.boot_id, holder->boot_id, sizeof(spec.boot_id));
	memcpy(spec.name, holder->name, sizeof(spec.name));
	memcpy(spec.fence, holder->fence, sizeof(spec.fence));
	return holder_register(fs, &spec, layouts_sink(fs), &holder->id, &holder->key);
}

int extfs_holder_resume(struct fs *fs, uint64_t id, uint64_t key)
{
	return holder_resume(fs, id, key, layouts_sink(fs));
}

int extfs_holder_check(struct fs *fs, uint64_t id, uint64_t key)
{
	return holder_check(fs, id, key);
}
int extfs_holder_lost(struct fs *fs, uint64_t id) { return holder_lost(fs, id); }
int extfs_holder_gone(struct fs *fs, uint64_t id) { return holder_gone(fs, id); }
int extfs_holder_fenced(struct fs *fs, uint64_t id) { return holder_fenced(fs, id); }

unsigned extfs_holder_list(struct fs *fs, uint64_t *id, struct extfs_holder *out, unsigned n)
{
	unsigned count = 0;

	while (count < n) {
		struct holder_look look;

		if (!holder_list(fs, id, &look, 1))
			break;
		out[count] = (struct extfs_holder){
			.kind = (int)look.spec.kind, .state = (int)look.state, .uid = look.spec.uid,
			.pid = look.spec.pid, .pid_start = look.spec.pid_start,
			.fence_key = look.spec.fence_key, .id = look.id, .grants = look.grants,
			.quarantined = look.quarantined, .recalls = look.recalls,
			.missed = look.missed, .cause = (int)look.cause,
			.returned = look.returned,
		};
		memcpy(out[count].boot_id, look.spec.boot_id, sizeof(look.spec.boot_id));
		memcpy(out[count].name, look.spec.name, sizeof(look.spec.name));
		memcpy(out[count].fence, look.spec.fence, sizeof(look.spec.fence));
		count++;
	}
	return count;
}

int extfs_fence_put(struct fs *fs, uint64_t holder, int state, uint32_t tries)
{
	xid_t xid;
	int err = fence_put(fs, holder, (enum fence_state)state, tries, &xid);

	return err ? err : jrn_force_blocking(fs, xid);
}

unsigned extfs_fence_list(struct fs *fs, uint64_t *holder, struct extfs_fence *out, unsigned n)
{
	unsigned count = 0;
	struct fence fence;

	while (count < n && fence_list(fs, holder, &fence, 1))
		out[count++] = (struct extfs_fence){
			.holder = fence.holder, .state = (int)fence.state, .tries = fence.tries,
			.decided = fence.decided,
		};
	return count;
}

int extfs_grant_list(struct fs *fs, uint64_t ino, uint64_t *offset, struct extfs_grant_look *out,
		     unsigned n)
{
	struct grant_look look[64];
	struct inode *in;
	unsigned count;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	count = grant_list(in, offset, look, MIN(n, ARRAY_LEN(look)));
	inode_put(in);
	for (unsigned i = 0; i < count; i++)
		out[i] = (struct extfs_grant_look){
			.ino = look[i].ino, .generation = look[i].generation,
			.holder = look[i].holder,
			.offset = look[i].offset, .length = look[i].length, .seq = look[i].seq,
			.iomode = (int)look[i].iomode, .flags = look[i].flags,
			.recalled_ns = look[i].recalled_at,
		};
	return (int)count;
}

unsigned extfs_grant_inodes(struct fs *fs, uint64_t *ino, uint64_t *out, unsigned n)
{
	return grant_inodes(fs, ino, out, n);
}

/* ---- events, clock, counters ---------------------------------------------------------------- */

int extfs_layout_event_fd(struct fs *fs) { return layouts_event_fd(fs); }

int extfs_layout_event(struct fs *fs, struct extfs_layout_event *out)
{
	struct layout_event ev;

	if (!event_next(fs, layouts_sink(fs), &ev))
		return 0;
	*out = (struct extfs_layout_event){
		.type = (int)ev.type, .seq = ev.seq, .holder = ev.holder, .ino = ev.ino,
		.generation = ev.generation, .iomode = (int)ev.iomode, .offset = ev.offset,
		.length = ev.length, .grant_seq = ev.grant_seq,
		.left_ms = ev.left_ms,
	};
	return 1;
}

uint64_t extfs_layout_now(struct fs *fs) { return layouts_now(fs); }
void extfs_layout_set_clock(struct fs *fs, uint64_t ns) { layouts_set_clock(fs, ns); }
void extfs_layout_settle(struct fs *fs) { layouts_settle(fs); }

const char *extfs_layout_counter(struct fs *fs, unsigned i, uint64_t *value)
{
	static const struct { const char *name; size_t offset; } counters[] = {
#define X(field) { #field, offsetof(struct layout_counters, field) },
		LAYOUT_COUNTERS(X)
#undef X
	};

	if (i >= ARRAY_LEN(counters))
		return NULL;
	*value = atomic_load((_Atomic uint64_t *)((char *)layouts_counters(fs) +
						  counters[i].offset));
	return counters[i].name;
}

void extfs_layout_latency(struct fs *fs, int of, uint64_t *buckets)
{
	xassert(of >= 0 && of < LATENCY_KINDS);
	layouts_latency(fs, (enum latency_of)of, buckets);
}
