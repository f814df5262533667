/* SPDX-License-Identifier: MIT
 *
 * delegation.c - delegations: granting, recalling, ending.
 *
 * Definitions.
 *   to leave   a record goes out of all its lists; what is left of it is the reference of its
 *              inode, put with no lock held: by who asked for it to go, or by the thread.
 *   dropped    it left without having been returned or revoked: its holder is GONE, or the mount
 *              ends.
 *
 * Invariants, under layouts->mutex:
 *  1. A record is on the lists of its inode and of its holder until it leaves; on
 *     layouts->recalled, by (due, seq), exactly while due is set.
 *  2. A record's holder is there: whoever makes a holder GONE has its records dropped before the
 *     object is freed.
 *  3. A wait is on the list of its inode exactly while it is parked, and only while a delegation of
 *     the inode is in its way.
 *  4. nwrite_delegations counts the WRITE ones, so that listings of directories need not look.
 */
#include "delegation_priv.h"

#define ATTRS_NS 1000000000u /* distance of two DELEGATION_ATTRS of an inode */

static int in_order_of_due(const struct delegation *a, const struct delegation *b)
{
	if (a->due != b->due)
		return a->due < b->due ? -1 : 1;
	return a->seq < b->seq ? -1 : a->seq > b->seq;
}

RB_GENERATE(recalled_tree, delegation, by_due, in_order_of_due)

#define COUNT(ls, name) atomic_fetch_add_explicit(&(ls)->counters.name, 1, memory_order_relaxed)

static bool conflicts(const struct delegation *d, enum delegation_op op)
{
	return d->write || delegation_op_changes(op);
}

/* ---- opens and uses ------------------------------------------------------------------------- */

void local_open(struct inode *in, bool reads, bool writes)
{
	if (reads)
		atomic_fetch_add(&in->local_readers, 1);
	if (writes)
		atomic_fetch_add(&in->local_writers, 1);
}

static void count_down(_Atomic uint32_t *count)
{
	uint32_t before = atomic_fetch_sub(count, 1);

	xassert(before > 0);
}

void local_close(struct inode *in, bool reads, bool writes)
{
	if (reads)
		count_down(&in->local_readers);
	if (writes)
		count_down(&in->local_writers);
}

void local_use_begin(struct inode *in, enum delegation_op op)
{
	atomic_fetch_add(delegation_op_changes(op) ? &in->local_changes : &in->local_looks, 1);
}

void local_use_end(struct inode *in, enum delegation_op op)
{
	count_down(delegation_op_changes(op) ? &in->local_changes : &in->local_looks);
}

/* ---- lists: mutex held ---------------------------------------------------------------------- */

static struct layouts *layouts_of(const struct inode *in) { return in->fs->layouts; }

static struct delegation *find(const struct inode *in, uint64_t holder)
{
	struct delegation *d = in->delegations;

	while (d && d->holder->id != holder)
		d = d->next_of_inode;
	return d;
}

/* What the list says. */
static void set_delegated(struct inode *in)
{
	uint32_t kinds = 0;

	for (struct delegation *d = in->delegations; d; d = d->next_of_inode)
		kinds |= d->write ? DELEGATED_WRITE : DELEGATED_READ;
	atomic_store(&in->delegated, kinds);
}

static bool in_the_way(const struct inode *in, enum delegation_op op)
{
	const struct delegation *d = in->delegations;

	while (d && !conflicts(d, op))
		d = d->next_of_inode;
	return d != NULL;
}

static void wait_add(struct inode *in, struct delegation_wait *w)
{
	w->next = in->delegation_waits;
	w->at = &in->delegation_waits;
	if (w->next)
		w->next->at = &w->next;
	in->delegation_waits = w;
	w->parked = true;
}

static void wait_del(struct delegation_wait *w)
{
	*w->at = w->next;
	if (w->next)
		w->next->at = w->at;
	w->parked = false;
}

/* Those that nothing keeps any more go on. */
static void wake_waits(struct inode *in)
{
	struct delegation_wait *w, *next;

	for (w = in->delegation_waits; w; w = next) {
		next = w->next;
		if (in_the_way(in, w->kind))
			continue;
		wait_del(w);
		ioctx_wake(w->op);
	}
}

static void leave(struct layouts *ls, struct delegation *d)
{
	struct inode *in = d->work.in;
	struct delegation **at = &in->delegations;

	while (*at != d)
		at = &(*at)->next_of_inode;
	*at = d->next_of_inode;
	TAILQ_REMOVE(&d->holder->delegations, d, of_holder);
	if (d->due)
		RB_REMOVE(recalled_tree, &ls->recalled, d);
	if (d->write)
		atomic_fetch_sub(&ls->nwrite_delegations, 1);
	set_delegated(in);
	wake_waits(in);
}

static void post(struct layouts *ls, const struct delegation *d, enum layout_event_type type,
		 uint64_t left_ms)
{
	const struct inode *in = d->work.in;

	event_post(ls, d->holder->sink,
		   &(struct layout_event){ .type = type, .holder = d->holder->id, .ino = in->ino,
					   .generation = in->core.generation,
					   .iomode = d->write ? IOMODE_RW : IOMODE_READ,
					   .length = UINT64_MAX, .grant_seq = d->seq,
					   .left_ms = left_ms });
}

static void revoke(struct layouts *ls, struct delegation *d)
{
	COUNT(ls, delegations_revoked);
	post(ls, d, EVENT_DELEGATION_REVOKED, 0);
	leave(ls, d);
	inode_work_add(ls, &d->work);
}

/* ---- recalls: mutex held -------------------------------------------------------------------- */

static void count_recall(struct layouts *ls, enum delegation_op op)
{
	struct layout_counters *c = &ls->counters;
	_Atomic uint64_t *const of[] = {
		[DELEGATION_OPEN_READ] = &c->delegation_recalls_open_read,
		[DELEGATION_OPEN_WRITE] = &c->delegation_recalls_open_write,
		[DELEGATION_READ] = &c->delegation_recalls_read,
		[DELEGATION_WRITE] = &c->delegation_recalls_write,
		[DELEGATION_SETATTR] = &c->delegation_recalls_setattr,
		[DELEGATION_NAMESPACE] = &c->delegation_recalls_namespace,
	};

	COUNT(ls, delegation_recalls);
	atomic_fetch_add_explicit(of[op], 1, memory_order_relaxed);
}

static void set_due(struct layouts *ls, struct delegation *d, uint64_t due)
{
	if (d->due)
		RB_REMOVE(recalled_tree, &ls->recalled, d);
	d->due = MAX(due, 1);
	RB_INSERT(recalled_tree, &ls->recalled, d);
	if (RB_MIN(recalled_tree, &ls->recalled) == d)
		layouts_kick(ls);
}

static void recall(struct layouts *ls, struct delegation *d, enum delegation_op op)
{
	if (d->due)
		return;
	set_due(ls, d, layouts_now(ls->fs) + ls->recall_ns);
	d->holder->recalls++;
	count_recall(ls, op);
	post(ls, d, EVENT_DELEGATION_RECALL, ls->recall_ns / 1000000);
}

/* Have what is in the way of op returned. False: nothing is left of it. */
static bool make_way(struct inode *in, uint64_t exempt, enum delegation_op op)
{
	struct layouts *ls = layouts_of(in);
	struct delegation *d, *next;
	bool left = false;

	for (d = in->delegations; d; d = next) {
		next = d->next_of_inode;
		if (!conflicts(d, op) || d->holder->id == exempt)
			continue;
		if (d->holder->state == HOLDER_LIVE) {
			recall(ls, d, op);
			left = true;
		} else {
			revoke(ls, d);
		}
	}
	return left;
}

int delegation_wait(struct inode *in, enum delegation_op op, struct delegation_wait *w)
{
	struct layouts *ls = layouts_of(in);
	bool parked;

	w->in = in;
	w->kind = op;
	w->parked = false;
	pthread_mutex_lock(&ls->mutex);
	parked = make_way(in, 0, op);
	if (parked)
		wait_add(in, w);
	pthread_mutex_unlock(&ls->mutex);
	return parked ? ERR_PARKED : 0;
}

bool delegation_conflicts(struct inode *in, enum delegation_op op)
{
	struct layouts *ls = layouts_of(in);
	bool found;

	if (!delegation_any(in))
		return false;
	pthread_mutex_lock(&ls->mutex);
	found = in_the_way(in, op);
	pthread_mutex_unlock(&ls->mutex);
	return found;
}

bool delegation_cancel(struct delegation_wait *w)
{
	struct layouts *ls = layouts_of(w->in);
	bool parked;

	pthread_mutex_lock(&ls->mutex);
	parked = w->parked;
	if (parked)
		wait_del(w);
	pthread_mutex_unlock(&ls->mutex);
	return parked;
}

int delegation_break(struct inode *in, uint64_t exempt, enum delegation_op op)
{
	struct layouts *ls = layouts_of(in);
	bool left;

	if (!delegation_any(in))
		return 0;
	pthread_mutex_lock(&ls->mutex);
	left = make_way(in, exempt, op);
	pthread_mutex_unlock(&ls->mutex);
	return left ? -EAGAIN : 0;
}

/* ---- granting: fs->lock shared, inode->lock and mutex held ---------------------------------- */

/* A process of this host that reads or writes the device itself, and perhaps has no file open. */
static bool has_local_layout(struct inode *in, bool any_kind)
{
	unsigned kinds = any_kind ? ALL_GRANTS : 1u << SEG_GRANT_RW;
	struct seg *s = NULL;

	while ((s = seg_next_grant_locked(in, kinds, 0, 0, UINT64_MAX, s)))
		if (GRANT_OF(s)->holder->spec.kind == HOLDER_LOCAL)
			return true;
	return false;
}

/* Invariants 1 and 2 of delegation.h; inode->delegated says already what is to be granted. */
static int may_grant(struct layouts *ls, struct inode *in, const struct delegation *own, bool write)
{
	uint32_t uses = atomic_load(&in->local_changes), opens;

	/* Opens last, since a use becomes an open before it ends. */
	uses += write ? atomic_load(&in->local_looks) : 0;
	opens = atomic_load(&in->local_writers);
	opens += write ? atomic_load(&in->local_readers) : 0;
	if (opens) {
		COUNT(ls, delegations_refused_open);
		return -EAGAIN;
	}
	if (uses) {
		COUNT(ls, delegations_refused_use);
		return -EAGAIN;
	}
	if (has_local_layout(in, write)) {
		COUNT(ls, delegations_refused_layout);
		return -EAGAIN;
	}
	for (struct delegation *d = in->delegations; d; d = d->next_of_inode) {
		if (d == own ? d->due != 0 : write || d->write) {
			COUNT(ls, delegations_refused_held);
			return -EAGAIN;
		}
	}
	return 0;
}

static int client(struct layouts *ls, uint64_t id, struct holder **out)
{
	struct holder *h = holder_find(ls, id);

	if (!h || h->state == HOLDER_GONE)
		return -ENOENT;
	if (h->state == HOLDER_LOST)
		return -EOWNERDEAD;
	*out = h;
	return h->spec.kind == HOLDER_CLIENT ? 0 : -EINVAL;
}

/* d: its record, or memory for it, with which the reference goes over. */
static void give(struct layouts *ls, struct inode *in, struct holder *h, struct delegation *d,
		 bool write)
{
	if (d->holder) { /* the newest of its holder from now on */
		TAILQ_REMOVE(&h->delegations, d, of_holder);
	} else {
		d->holder = h;
		d->work.in = in;
		d->next_of_inode = in->delegations;
		in->delegations = d;
	}
	d->seq = layouts_next_seq(ls);
	d->write = write;
	TAILQ_INSERT_TAIL(&h->delegations, d, of_holder);
	if (write) {
		atomic_fetch_add(&ls->nwrite_delegations, 1);
		COUNT(ls, delegations_write);
	} else {
		COUNT(ls, delegations_read);
	}
}

static int grant(struct inode *in, uint64_t holder, bool write, struct delegation **spare,
		 uint64_t *seq)
{
	struct layouts *ls = layouts_of(in);
	struct delegation *d;
	struct holder *h;
	int rc = client(ls, holder, &h);

	if (rc || ls->stop)
		return rc ? rc : -EAGAIN;
	d = find(in, holder);
	if (!d || d->due || (write && !d->write)) {
		atomic_fetch_or(&in->delegated, write ? DELEGATED_WRITE : DELEGATED_READ);
		rc = may_grant(ls, in, d, write);
		if (!rc && !d) {
			d = *spare;
			*spare = NULL;
		}
		if (!rc)
			give(ls, in, h, d, write);
		set_delegated(in);
	}
	if (!rc)
		*seq = d->seq;
	return rc;
}

/* With nothing locked: the kernel asks for the attributes from now on. */
static void forget_attributes(struct inode *in)
{
	const struct cache_ops *ops = in->fs->cache_ops;

	if (ops)
		ops->attributes(in->fs->cache_arg, in->ino);
}

int delegation_grant(struct inode *in, uint64_t holder, bool write, uint64_t *seq)
{
	struct layouts *ls = layouts_of(in);
	struct delegation *spare;
	int rc;

	if (in->fs->read_only)
		return -EROFS;
	spare = calloc(1, sizeof(*spare));
	if (!spare)
		return -ENOMEM;
	inode_ref(in);
	fs_rdlock(in->fs);
	if (!inode_is_reg(in)) {
		rc = inode_is_dir(in) ? -EISDIR : -EINVAL;
	} else {
		pthread_mutex_lock(&in->lock);
		pthread_mutex_lock(&ls->mutex);
		rc = grant(in, holder, write, &spare, seq);
		pthread_mutex_unlock(&ls->mutex);
		pthread_mutex_unlock(&in->lock);
	}
	fs_unlock(in->fs);
	if (!rc && write)
		forget_attributes(in);
	if (spare)
		inode_put(in);
	free(spare);
	return rc;
}

int delegation_return(struct inode *in, uint64_t holder)
{
	struct layouts *ls = layouts_of(in);
	struct delegation *d;

	pthread_mutex_lock(&ls->mutex);
	d = find(in, holder);
	if (d) {
		COUNT(ls, delegations_returned);
		leave(ls, d);
	}
	pthread_mutex_unlock(&ls->mutex);
	if (!d)
		return -ENOENT;
	inode_put(in);
	free(d);
	return 0;
}

/* ---- looks ---------------------------------------------------------------------------------- */

void delegation_looked(struct inode *in)
{
	struct layouts *ls = layouts_of(in);
	struct delegation *d;
	uint64_t now;

	pthread_mutex_lock(&ls->mutex);
	d = in->delegations;
	now = layouts_now(ls->fs);
	if (d && d->write && d->holder->state == HOLDER_LIVE &&
	    (!d->told || now - d->told >= ATTRS_NS) && !event_crowded(d->holder->sink)) {
		d->told = MAX(now, 1);
		COUNT(ls, delegation_attrs);
		post(ls, d, EVENT_DELEGATION_ATTRS, 0);
	}
	pthread_mutex_unlock(&ls->mutex);
}

bool delegation_of_number(struct fs *fs, inum_t ino)
{
	struct inode *in;
	bool writer;

	if (likely(!atomic_load_explicit(&fs->layouts->nwrite_delegations, memory_order_relaxed)))
		return false;
	in = inode_get_cached(fs, ino);
	if (!in)
		return false; /* invariant 5 of delegation.h */
	writer = delegation_of_writer(in);
	inode_put(in);
	return writer;
}

unsigned delegation_list(struct fs *fs, uint64_t holder, uint64_t *seq, struct delegation_look *out,
			 unsigned n)
{
	struct layouts *ls = fs->layouts;
	struct delegation *d = NULL;
	struct holder *h;
	unsigned got = 0;
	uint64_t now;

	pthread_mutex_lock(&ls->mutex);
	now = layouts_now(fs);
	h = holder_find(ls, holder);
	if (h)
		d = TAILQ_FIRST(&h->delegations);
	for (; d && got < n; d = TAILQ_NEXT(d, of_holder)) {
		if (d->seq <= *seq)
			continue;
		out[got++] = (struct delegation_look){
			.ino = d->work.in->ino, .generation = d->work.in->core.generation,
			.write = d->write, .recalled = d->due != 0, .seq = d->seq,
			.left_ms = d->due > now ? (d->due - now) / 1000000 : 0,
		};
	}
	pthread_mutex_unlock(&ls->mutex);
	if (got)
		*seq = out[got - 1].seq;
	return got;
}

/* ---- what happens to holders, and time: mutex held unless said otherwise --------------------- */

void delegations_drop(struct layouts *ls, struct holder *h)
{
	struct delegation *d;

	while ((d = TAILQ_FIRST(&h->delegations))) {
		COUNT(ls, delegations_dropped);
		leave(ls, d);
		inode_work_add(ls, &d->work);
	}
}

void delegations_drop_all(struct layouts *ls)
{
	struct holder *h;

	RB_FOREACH(h, holder_tree, &ls->holders)
		delegations_drop(ls, h);
}

void delegations_hurry(struct layouts *ls, struct holder *h)
{
	uint64_t now = layouts_now(ls->fs);
	struct delegation *d;

	TAILQ_FOREACH(d, &h->delegations, of_holder)
		if (d->due > now)
			set_due(ls, d, now);
}

uint64_t delegations_due(struct layouts *ls, uint64_t now)
{
	struct delegation *d;
	uint64_t next;

	pthread_mutex_lock(&ls->mutex);
	now = MIN(now, layouts_now(ls->fs)); /* the clock may have become virtual since */
	while ((d = RB_MIN(recalled_tree, &ls->recalled)) && d->due <= now)
		revoke(ls, d);
	next = d ? d->due : UINT64_MAX;
	pthread_mutex_unlock(&ls->mutex);
	return next;
}

void delegations_shift(struct layouts *ls,
		       uint64_t (*shift)(uint64_t at, uint64_t from, uint64_t to), uint64_t from,
		       uint64_t to)
{
	struct delegation *d;
	struct holder *h;

	/* Times that were long ago become one, so the order may be another. */
	while ((d = RB_MIN(recalled_tree, &ls->recalled)))
		RB_REMOVE(recalled_tree, &ls->recalled, d);
	RB_FOREACH(h, holder_tree, &ls->holders) {
		TAILQ_FOREACH(d, &h->delegations, of_holder) {
			d->told = shift(d->told, from, to);
			d->due = shift(d->due, from, to);
			if (d->due)
				RB_INSERT(recalled_tree, &ls->recalled, d);
		}
	}
}
