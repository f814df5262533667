/* SPDX-License-Identifier: MIT
 *
 * btree_node.c - bytes of one B+tree node: see btree_node.h.
 */
#include <string.h>

#include "btree_node.h"

static inline uint8_t *slot_at(struct node_disk *n, unsigned slot)
{
	return n->slots + (size_t)slot * NODE_SLOT_SIZE;
}

static inline unsigned leaf_gap(const struct node_disk *n)
{
	return get16(n->heap) - NODE_HEAD - node_count(n) * NODE_SLOT_SIZE;
}

void node_init(struct node_disk *n, unsigned level)
{
	memset((uint8_t *)n + sizeof(n->hdr), 0, BLOCK_SIZE - sizeof(n->hdr));
	n->level = put16((uint16_t)level);
	if (!level)
		n->heap = put16(BLOCK_SIZE);
}

unsigned node_lower_bound(const struct node_disk *n, struct key key, bool *exact)
{
	unsigned base = 0, len = node_count(n);

	while (len) {
		unsigned half = len / 2;
		struct key k = node_key(n, base + half);
		bool below = k.hi < key.hi || (k.hi == key.hi && k.lo < key.lo);

		base = below ? base + half + 1 : base;
		len = below ? len - half - 1 : half;
	}
	*exact = base < node_count(n) && key_cmp(node_key(n, base), key) == 0;
	return base;
}

unsigned branch_find(const struct node_disk *n, struct key key)
{
	bool exact;
	unsigned slot = node_lower_bound(n, key, &exact);

	return exact || !slot ? slot : slot - 1;
}

unsigned leaf_used(const struct node_disk *n)
{
	const struct leaf_slot *s = (const struct leaf_slot *)n->slots;
	unsigned count = node_count(n), used = count * NODE_SLOT_SIZE;

	for (unsigned i = 0; i < count; i++)
		used += record_space(get16(s[i].length));
	return used;
}

static unsigned leaf_put_bytes(struct node_disk *n, const void *rec, unsigned len)
{
	unsigned space = record_space(len);
	unsigned off = get16(n->heap) - space;

	memcpy((uint8_t *)n + off, rec, len);
	memset((uint8_t *)n + off + len, 0, space - len);
	n->heap = put16((uint16_t)off);
	n->dead = put16((uint16_t)(get16(n->dead) + space - len));
	return off;
}

static void leaf_compact(struct node_disk *n)
{
	uint64_t copy[BLOCK_SIZE / sizeof(uint64_t)];
	struct leaf_slot *s = leaf_slots(n);
	unsigned count = node_count(n);

	memcpy(copy, n, BLOCK_SIZE);
	n->heap = put16(BLOCK_SIZE);
	n->dead = put16(0);
	for (unsigned i = 0; i < count; i++) {
		unsigned len = get16(s[i].length);

		if (len)
			s[i].offset = put16((uint16_t)leaf_put_bytes(
				n, (uint8_t *)copy + get16(s[i].offset), len));
	}
	/* Bytes of removed records do not stay behind. */
	memset(slot_at(n, count), 0, leaf_gap(n));
}

bool leaf_fits(const struct node_disk *n, unsigned len)
{
	unsigned need = NODE_SLOT_SIZE + record_space(len);

	if (leaf_gap(n) >= need)
		return true;
	if (leaf_gap(n) + get16(n->dead) < need)
		return false;
	return leaf_used(n) + need <= NODE_BYTES;
}

bool leaf_make_room(struct node_disk *n, unsigned len)
{
	if (leaf_gap(n) >= NODE_SLOT_SIZE + record_space(len))
		return true;
	if (!leaf_fits(n, len))
		return false;
	leaf_compact(n);
	return true;
}

void leaf_insert(struct node_disk *n, unsigned slot, struct key key, const void *rec, unsigned len)
{
	unsigned count = node_count(n);
	struct leaf_slot *s = leaf_slots(n) + slot;

	xassert(slot <= count);
	xassert(leaf_gap(n) >= NODE_SLOT_SIZE + record_space(len));
	memmove(s + 1, s, (count - slot) * sizeof(*s));
	n->count = put16((uint16_t)(count + 1));
	*s = (struct leaf_slot){ .key = { put64(key.hi), put64(key.lo) },
				 .length = put16((uint16_t)len) };
	if (len)
		s->offset = put16((uint16_t)leaf_put_bytes(n, rec, len));
}

void leaf_remove(struct node_disk *n, unsigned slot)
{
	unsigned count = node_count(n);
	struct leaf_slot *s = leaf_slots(n) + slot;
	unsigned len = get16(s->length), off = get16(s->offset);

	xassert(slot < count);
	if (len && off == get16(n->heap)) {
		unsigned pad = record_space(len) - len;

		n->heap = put16((uint16_t)(off + record_space(len)));
		n->dead = put16((uint16_t)(get16(n->dead) - pad));
	} else {
		n->dead = put16((uint16_t)(get16(n->dead) + len));
	}
	memmove(s, s + 1, (count - slot - 1) * sizeof(*s));
	n->count = put16((uint16_t)(count - 1));
	if (count == 1) {
		n->heap = put16(BLOCK_SIZE);
		n->dead = put16(0);
	}
}

static void leaf_copy(struct node_disk *to, const struct node_disk *from, unsigned first)
{
	const struct leaf_slot *s = (const struct leaf_slot *)from->slots;
	unsigned at = node_count(to);

	for (unsigned i = first; i < node_count(from); i++)
		leaf_insert(to, at++, node_key(from, i), (const uint8_t *)from + get16(s[i].offset),
			    get16(s[i].length));
}

void leaf_split(struct node_disk *left, unsigned from, struct node_disk *right)
{
	const struct leaf_slot *s = leaf_slots(left);
	unsigned count = node_count(left), dead = get16(left->dead);

	xassert(node_count(right) == 0 && from <= count);
	leaf_copy(right, left, from);
	for (unsigned i = from; i < count; i++)
		dead += get16(s[i].length);
	left->count = put16((uint16_t)from);
	left->dead = put16((uint16_t)dead);
	leaf_compact(left);
}

void leaf_append(struct node_disk *left, const struct node_disk *right)
{
	unsigned need = leaf_used(right);

	if (leaf_gap(left) < need)
		leaf_compact(left);
	leaf_copy(left, right, 0);
}

void branch_insert(struct node_disk *n, unsigned slot, struct key key, fsblock_t child)
{
	unsigned count = node_count(n);
	struct branch_slot *s = branch_slots(n) + slot;

	xassert(slot <= count && count < NODE_SLOT_MAX);
	memmove(s + 1, s, (count - slot) * sizeof(*s));
	*s = (struct branch_slot){ { put64(key.hi), put64(key.lo) }, put64(child) };
	n->count = put16((uint16_t)(count + 1));
}

void branch_remove(struct node_disk *n, unsigned slot)
{
	unsigned count = node_count(n);
	struct branch_slot *s = branch_slots(n) + slot;

	xassert(slot < count);
	memmove(s, s + 1, (count - slot - 1) * sizeof(*s));
	n->count = put16((uint16_t)(count - 1));
	memset(slot_at(n, count - 1), 0, NODE_SLOT_SIZE);
}

void branch_set_key(struct node_disk *n, unsigned slot, struct key key)
{
	xassert(slot < node_count(n));
	branch_slots(n)[slot].key = (struct key_disk){ put64(key.hi), put64(key.lo) };
}

void branch_append(struct node_disk *left, const struct node_disk *right)
{
	unsigned lc = node_count(left), rc = node_count(right);

	xassert(lc + rc <= NODE_SLOT_MAX);
	memcpy(slot_at(left, lc), right->slots, (size_t)rc * NODE_SLOT_SIZE);
	left->count = put16((uint16_t)(lc + rc));
}

void branch_move_right(struct node_disk *left, struct node_disk *right, unsigned n)
{
	unsigned lc = node_count(left), rc = node_count(right);

	xassert(n <= lc && rc + n <= NODE_SLOT_MAX);
	memmove(slot_at(right, n), slot_at(right, 0), (size_t)rc * NODE_SLOT_SIZE);
	memcpy(slot_at(right, 0), slot_at(left, lc - n), (size_t)n * NODE_SLOT_SIZE);
	memset(slot_at(left, lc - n), 0, (size_t)n * NODE_SLOT_SIZE);
	left->count = put16((uint16_t)(lc - n));
	right->count = put16((uint16_t)(rc + n));
}

void branch_move_left(struct node_disk *left, struct node_disk *right, unsigned n)
{
	unsigned lc = node_count(left), rc = node_count(right);

	xassert(n <= rc && lc + n <= NODE_SLOT_MAX);
	memcpy(slot_at(left, lc), slot_at(right, 0), (size_t)n * NODE_SLOT_SIZE);
	memmove(slot_at(right, 0), slot_at(right, n), (size_t)(rc - n) * NODE_SLOT_SIZE);
	memset(slot_at(right, rc - n), 0, (size_t)n * NODE_SLOT_SIZE);
	left->count = put16((uint16_t)(lc + n));
	right->count = put16((uint16_t)(rc - n));
}
