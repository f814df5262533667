/* SPDX-License-Identifier: MIT
 *
 * btree_node.h - one node of a B+tree as bytes: finding, adding and removing slots. Private to
 * btree*.c.
 *
 * Nothing here knows of buffers or transactions. Callers have joined the block that they change.
 *
 * Leaf: record bytes lie at offsets that are multiples of 8, so that callers may look at them
 * through structs; the padding counts as dead. Always: sum of record lengths + dead == BLOCK_SIZE -
 * heap.
 */
#ifndef EXTFS_BTREE_NODE_H
#define EXTFS_BTREE_NODE_H

#include "btree.h"

#define NODE_HEAD 64u
#define NODE_BYTES (BLOCK_SIZE - NODE_HEAD)

static inline struct node_disk *buf_node(const struct buf *b) { return b->data; }
static inline unsigned node_count(const struct node_disk *n) { return get16(n->count); }
static inline unsigned node_level(const struct node_disk *n) { return get16(n->level); }
static inline struct leaf_slot *leaf_slots(struct node_disk *n)
{
	return (struct leaf_slot *)n->slots;
}
static inline struct branch_slot *branch_slots(struct node_disk *n)
{
	return (struct branch_slot *)n->slots;
}
/* Both kinds of slot begin with their key and have the same size. */
static inline struct key node_key(const struct node_disk *n, unsigned slot)
{
	const struct key_disk *k = (const struct key_disk *)(n->slots + slot * NODE_SLOT_SIZE);

	return KEY(get64(k->hi), get64(k->lo));
}
static inline fsblock_t branch_child(const struct node_disk *n, unsigned slot)
{
	return get64(((const struct branch_slot *)n->slots)[slot].child);
}
static inline void *leaf_record(const struct node_disk *n, unsigned slot, unsigned *len)
{
	const struct leaf_slot *s = (const struct leaf_slot *)n->slots + slot;

	*len = get16(s->length);
	return (uint8_t *)n + get16(s->offset);
}
static inline unsigned record_space(unsigned len) { return (len + 7u) & ~7u; }

void node_init(struct node_disk *n, unsigned level);
/* First slot whose key is not below `key` (count when there is none); *exact: it is equal. */
unsigned node_lower_bound(const struct node_disk *n, struct key key, bool *exact);
/* Slot of the child that may hold `key`. */
unsigned branch_find(const struct node_disk *n, struct key key);

/* Bytes that the slots and records would take after compaction. */
unsigned leaf_used(const struct node_disk *n);
/* Is there room for one more record of len bytes? Compacts the node when that makes the room. */
bool leaf_make_room(struct node_disk *n, unsigned len);
/* Does it fit, perhaps after compaction? Changes nothing. */
bool leaf_fits(const struct node_disk *n, unsigned len);
void leaf_insert(struct node_disk *n, unsigned slot, struct key key, const void *rec, unsigned len);
void leaf_remove(struct node_disk *n, unsigned slot);
/* Move slots [from, count) of `left` to the empty leaf `right`. */
void leaf_split(struct node_disk *left, unsigned from, struct node_disk *right);
/* Append all records of `right` to `left`, where they fit. */
void leaf_append(struct node_disk *left, const struct node_disk *right);

void branch_insert(struct node_disk *n, unsigned slot, struct key key, fsblock_t child);
void branch_remove(struct node_disk *n, unsigned slot);
void branch_set_key(struct node_disk *n, unsigned slot, struct key key);
/* Copy all slots of right behind those of left. */
void branch_append(struct node_disk *left, const struct node_disk *right);
/* Move the last n slots of left to the front of right, or the first n of right to the end of
 * left. */
void branch_move_right(struct node_disk *left, struct node_disk *right, unsigned n);
void branch_move_left(struct node_disk *left, struct node_disk *right, unsigned n);

#endif
