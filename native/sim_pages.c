/* SPDX-License-Identifier: MIT
 *
 * sim_pages.c - counted pages in a shared radix tree.
 *
 * Invariants:
 * 1. refs of a node or page is the number of slots, roots and other holders that point to it.
 * 2. An object is changed only by a tree that reaches it through objects with refs == 1: nobody else sees it. The
 *    acquire load of refs pairs with the release of whoever dropped the last other reference.
 */
#include "sim_pages.h"

#include <pthread.h>
#include <string.h>

#include "device_sim.h"

#define NODE_BITS 6u
#define NODE_SLOTS (1u << NODE_BITS)

/* Pages and nodes begin alike. */
struct counted {
	_Atomic uint32_t refs;
};

struct node {
	_Atomic uint32_t refs;
	void *slots[NODE_SLOTS]; /* nodes; at level 0 pages */
};

static void *get(void *object)
{
	if (object)
		atomic_fetch_add_explicit(&((struct counted *)object)->refs, 1, memory_order_relaxed);
	return object;
}

static bool shared(const void *object)
{
	return atomic_load_explicit(&((struct counted *)object)->refs, memory_order_acquire) > 1;
}

static bool put_last(void *object)
{
	return atomic_fetch_sub_explicit(&((struct counted *)object)->refs, 1, memory_order_acq_rel) == 1;
}

/* Freed pages are kept, up to a limit: getting fresh memory from the kernel costs several times the copy that a
 * write is. Linked through their data. */
#define SPARE_PAGES 4096u

static pthread_mutex_t spare_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_page *spare;
static unsigned spares;

static struct sim_page *take_spare(void)
{
	struct sim_page *page;

	pthread_mutex_lock(&spare_lock);
	page = spare;
	if (page) {
		memcpy(&spare, page->data, sizeof(spare));
		spares--;
	}
	pthread_mutex_unlock(&spare_lock);
	return page;
}

static void free_page(struct sim_page *page)
{
	bool kept;

	pthread_mutex_lock(&spare_lock);
	kept = spares < SPARE_PAGES;
	if (kept) {
		memcpy(page->data, &spare, sizeof(spare));
		spare = page;
		spares++;
	}
	pthread_mutex_unlock(&spare_lock);
	if (!kept)
		free(page);
}

struct sim_page *sim_page_new(void)
{
	struct sim_page *page = take_spare();

	if (!page)
		page = malloc(sizeof(*page));
	xassert(page);
	atomic_init(&page->refs, 1);
	return page;
}

struct sim_page *sim_page_get(struct sim_page *page)
{
	return get(page);
}

void sim_page_put(struct sim_page *page)
{
	if (page && put_last(page))
		free_page(page);
}

void sim_page_canary(uint8_t data[BLOCK_SIZE], uint64_t block)
{
	const uint64_t pair[2] = {SIM_CANARY, block};

	for (size_t i = 0; i < BLOCK_SIZE; i += sizeof(pair))
		memcpy(data + i, pair, sizeof(pair));
}

/* level: of the node; pages are below level 0. */
static void put_node(struct node *node, unsigned level)
{
	if (!node || !put_last(node))
		return;
	for (unsigned i = 0; i < NODE_SLOTS; i++) {
		if (level)
			put_node(node->slots[i], level - 1);
		else
			sim_page_put(node->slots[i]);
	}
	free(node);
}

void sim_tree_init(struct sim_tree *tree, uint64_t blocks)
{
	tree->root = NULL;
	tree->levels = 1;
	while (NODE_BITS * tree->levels < 64 && blocks > (uint64_t)1 << (NODE_BITS * tree->levels))
		tree->levels++;
}

void sim_tree_clear(struct sim_tree *tree)
{
	put_node(tree->root, tree->levels - 1);
	tree->root = NULL;
}

void sim_tree_copy(struct sim_tree *dst, const struct sim_tree *src)
{
	void *root = get(src->root);

	sim_tree_clear(dst);
	dst->root = root;
	dst->levels = src->levels;
}

static unsigned slot_of(uint64_t block, unsigned level)
{
	return (unsigned)(block >> (NODE_BITS * level)) & (NODE_SLOTS - 1);
}

const struct sim_page *sim_tree_find(const struct sim_tree *tree, uint64_t block)
{
	const void *object = tree->root;

	for (unsigned level = tree->levels; object && level--;)
		object = ((const struct node *)object)->slots[slot_of(block, level)];
	return object;
}

static struct node *own_node(void **slot, unsigned level)
{
	struct node *old = *slot, *node;

	if (old && !shared(old))
		return old;
	node = calloc(1, sizeof(*node));
	xassert(node);
	atomic_init(&node->refs, 1);
	for (unsigned i = 0; old && i < NODE_SLOTS; i++)
		node->slots[i] = get(old->slots[i]);
	put_node(old, level);
	*slot = node;
	return node;
}

/* The slot of a page, below nodes that are this tree's own. */
static void **own_slot(struct sim_tree *tree, uint64_t block)
{
	void **slot = &tree->root;

	for (unsigned level = tree->levels; level--;)
		slot = &own_node(slot, level)->slots[slot_of(block, level)];
	return slot;
}

void sim_tree_set(struct sim_tree *tree, uint64_t block, struct sim_page *page)
{
	void **slot = own_slot(tree, block);

	sim_page_put(*slot);
	*slot = page;
}

struct sim_page *sim_tree_own(struct sim_tree *tree, uint64_t block)
{
	void **slot = own_slot(tree, block);
	struct sim_page *old = *slot, *page;

	if (old && !shared(old))
		return old;
	page = sim_page_new();
	if (old)
		memcpy(page->data, old->data, BLOCK_SIZE);
	else
		sim_page_canary(page->data, block);
	sim_page_put(old);
	*slot = page;
	return page;
}
