/* SPDX-License-Identifier: MIT
 *
 * grant.c - grants: where a segment, a holder and a reference of the inode belong together.
 *
 * Invariants, whenever inode->lock and layouts->mutex are free:
 *  1. A grant is in its inode's tree of segments and in its holder's list, or in neither.
 *  2. Grants of one holder and kind do not overlap, except with ATOMIC ones.
 *  3. Of the grants of an inode exactly one is in layouts->by_inode.
 *  4. seg.order is seq: pieces of a grant that was cut have the same, at different offsets.
 */
#include <stdlib.h>

#include "layout_priv.h"

static int by_number(const struct grant *a, const struct grant *b)
{
	return a->in->ino < b->in->ino ? -1 : a->in->ino > b->in->ino;
}

#define UNUSED __attribute__((unused)) static
RB_GENERATE_INTERNAL(grant_tree, grant, by_inode, by_number, UNUSED)

#define GHOST_SEQ 1u /* older than any that a holder can name */
#define ANY_GRANT (1u << SEG_GRANT_READ | 1u << SEG_GRANT_RW | 1u << SEG_GRANT_PIN)

struct grant *grant_alloc(void)
{
	return calloc(1, sizeof(struct grant));
}

void grant_free(struct grant *g)
{
	free(g);
}

/* mutex held */
static void list_in(struct layouts *ls, struct grant *g)
{
	TAILQ_INSERT_TAIL(&g->holder->grants, g, of_holder);
	g->holder->ngrants++;
	g->indexed = !RB_INSERT(grant_tree, &ls->by_inode, g);
}

/* In the tree and in the lists; what it is has been filled in. */
static int enter(struct inode *in, struct seg *s, struct grant *g)
{
	struct layouts *ls = in->fs->layouts;
	int rc;

	g->in = inode_ref(in);
	if (!g->seq)
		g->seq = layouts_next_seq(ls);
	/* Listed first: the hooks of the tree look at the holder. */
	pthread_mutex_lock(&ls->mutex);
	list_in(ls, g);
	pthread_mutex_unlock(&ls->mutex);
	g->seg.order = g->seq;
	rc = seg_grant_locked(in, s, &g->seg);
	xassert(!rc || !s);
	return rc;
}

/* It is out of the tree of segments already. */
static void leave(struct inode *in, struct grant *g, struct grant_list *dead)
{
	struct seg *other = seg_next_grant_locked(in, ANY_GRANT, 0, 0, UINT64_MAX, NULL);
	struct layouts *ls = in->fs->layouts;

	pthread_mutex_lock(&ls->mutex);
	TAILQ_REMOVE(&g->holder->grants, g, of_holder);
	xassert(g->holder->ngrants > 0);
	g->holder->ngrants--;
	if (g->indexed) {
		RB_REMOVE(grant_tree, &ls->by_inode, g);
		g->indexed = false;
		if (other) {
			xassert(!RB_INSERT(grant_tree, &ls->by_inode, GRANT_OF(other)));
			GRANT_OF(other)->indexed = true;
		}
	}
	pthread_mutex_unlock(&ls->mutex);
	g->next_dead = dead->head;
	dead->head = g;
}

struct grant *grant_add_locked(struct inode *in, struct holder *h, struct seg *s, enum seg_kind kind,
			       uint64_t start, uint64_t end, unsigned flags, struct grant *spare[3],
			       struct grant_list *dead)
{
	struct grant *g = spare[0];

	xassert(g && s && kind >= SEG_FIRST_GRANT);
	spare[0] = NULL;
	/* Nobody gets in: s still keeps out whom these grants keep out. */
	grant_cut_locked(in, h->id, 1u << kind, start, end, &spare[1], dead);
	seg_init(&g->seg, kind, start, end, NULL);
	g->seg.holder = h->id;
	g->holder = h;
	g->flags = flags;
	g->seq = 0;
	enter(in, s, g);
	return g;
}

int grant_ghost_locked(struct inode *in, struct holder *h, enum seg_kind kind, struct grant *g)
{
	struct grant_list none = { NULL };
	int rc;

	xassert(kind >= SEG_FIRST_GRANT);
	seg_init(&g->seg, kind, 0, UINT64_MAX, NULL);
	g->seg.holder = h->id;
	g->holder = h;
	g->flags = GRANT_F_GHOST;
	g->seq = GHOST_SEQ;
	rc = enter(in, NULL, g);
	if (rc) { /* g is the caller's again; the inode is referenced by the caller as well */
		leave(in, g, &none);
		inode_put(in);
	}
	return rc;
}

/* Cut [start, end) out of the middle: what is behind it becomes a grant of its own. It is added
 * before g is made smaller, so that nobody gets in between. */
static bool split(struct inode *in, struct grant *g, uint64_t start, uint64_t end,
		  struct grant **spare)
{
	struct grant *rest = *spare ? *spare : grant_alloc();

	if (!rest)
		return false;
	*spare = NULL;
	*rest = (struct grant){ .holder = g->holder, .flags = g->flags, .seq = g->seq,
				.until = g->until, .recalled_start = g->recalled_start,
				.recalled_end = g->recalled_end, .recalled_at = g->recalled_at };
	seg_init(&rest->seg, g->seg.kind, end, g->seg.end, NULL);
	rest->seg.holder = g->seg.holder;
	enter(in, NULL, rest); /* the tree is there */
	seg_shrink_locked(in, &g->seg, g->seg.start, start);
	return true;
}

/* A cut is the answer to a recall of what it takes. */
static void answered(struct inode *in, struct grant *g, uint64_t start, uint64_t end)
{
	struct layouts *ls = in->fs->layouts;

	if (!g->recalled_at)
		return;
	pthread_mutex_lock(&ls->mutex);
	recall_answered(ls, g, start, end);
	pthread_mutex_unlock(&ls->mutex);
}

uint64_t grant_cut_locked(struct inode *in, uint64_t holder, unsigned kinds, uint64_t start,
			  uint64_t end, struct grant **spare, struct grant_list *dead)
{
	struct seg *kept = NULL, *s;
	uint64_t taken = 0;

	xassert(holder && start < end);
	while ((s = seg_next_grant_locked(in, kinds, holder, start, end, kept))) {
		uint64_t from = MAX(start, s->start), to = MIN(end, s->end);
		struct grant *g = GRANT_OF(s);
		bool head = s->start < from, tail = to < s->end;

		if ((head || tail) && (g->flags & LAYOUT_F_ATOMIC)) {
			kept = s;
			continue;
		}
		answered(in, g, from, to);
		if (head && tail && !split(in, g, from, to, spare)) {
			kept = s;
			continue;
		}
		if (!head && !tail) {
			seg_ungrant_locked(in, s);
			leave(in, g, dead);
		} else if (!(head && tail)) {
			seg_shrink_locked(in, s, head ? s->start : to, head ? from : s->end);
		}
		taken = taken > UINT64_MAX - (to - from) ? UINT64_MAX : taken + (to - from);
	}
	return taken;
}

void grant_list_free(struct fs *fs, struct grant_list *dead)
{
	while (dead->head) {
		struct grant *g = dead->head;

		dead->head = g->next_dead;
		inode_put(g->in);
		grant_free(g);
	}
}

/* ---- for status ----------------------------------------------------------------------------- */

static struct grant_look look_at(const struct grant *g)
{
	static const enum layout_iomode iomodes[SEG_KINDS] = {
		[SEG_GRANT_READ] = IOMODE_READ, [SEG_GRANT_RW] = IOMODE_RW,
		[SEG_GRANT_PIN] = IOMODE_PIN,
	};
	struct layouts *ls = g->in->fs->layouts;
	const struct seg *s = &g->seg;
	uint64_t recalled_at;

	pthread_mutex_lock(&ls->mutex);
	recalled_at = g->recalled_at;
	pthread_mutex_unlock(&ls->mutex);
	return (struct grant_look){
		.ino = g->in->ino, .generation = g->in->core.generation, .holder = s->holder,
		.offset = s->start, .seq = g->seq, .iomode = iomodes[s->kind],
		.length = s->end == UINT64_MAX ? UINT64_MAX : s->end - s->start,
		.flags = g->flags & LAYOUT_F_ATOMIC, .recalled_at = recalled_at,
	};
}

/* The cursor counts grants, because many begin at the same offset: one that comes or goes in
 * between moves the others. */
unsigned grant_list(struct inode *in, uint64_t *offset, struct grant_look *out, unsigned n)
{
	struct seg *s = NULL;
	uint64_t at = 0;
	unsigned got = 0;

	if (*offset == UINT64_MAX)
		return 0;
	pthread_mutex_lock(&in->lock);
	while ((s = seg_next_grant_locked(in, ANY_GRANT, 0, 0, UINT64_MAX, s))) {
		if (at >= *offset + n)
			break;
		if (at++ >= *offset)
			out[got++] = look_at(GRANT_OF(s));
	}
	pthread_mutex_unlock(&in->lock);
	*offset = s ? at : UINT64_MAX;
	return got;
}

unsigned grant_inodes(struct fs *fs, inum_t *ino, inum_t *out, unsigned n)
{
	struct inode number = { .ino = *ino + 1 };
	struct grant key = { .in = &number }, *g = NULL;
	struct layouts *ls = fs->layouts;
	unsigned got = 0;

	if (!ls)
		return 0;
	pthread_mutex_lock(&ls->mutex);
	if (*ino != UINT64_MAX)
		g = RB_NFIND(grant_tree, &ls->by_inode, &key);
	for (; g && got < n; g = RB_NEXT(grant_tree, &ls->by_inode, g))
		out[got++] = g->in->ino;
	pthread_mutex_unlock(&ls->mutex);
	if (got)
		*ino = out[got - 1];
	return got;
}
