/* SPDX-License-Identifier: MIT
 *
 * sim_pages.h - the memory of the simulated device: a sparse map from block number to page, cheap to copy.
 *
 * A tree of nodes with 64 slots; nodes and pages are counted and shared between trees, and whoever changes one that
 * others share copies it first. So copying a tree is one increment, and a write costs at most a path.
 *
 * Concurrency: a tree is changed by one thread at a time (the sim's mutex). Trees that share nodes
 * may be used by different threads at once. Out of memory is an assertion: this serves tests only.
 */
#ifndef EXTFS_SIM_PAGES_H
#define EXTFS_SIM_PAGES_H

#include <stdatomic.h>

#include "types.h"

struct sim_page {
	_Atomic uint32_t refs;
	_Alignas(16) uint8_t data[BLOCK_SIZE];
};

struct sim_tree {
	void *root; /* NULL: empty */
	unsigned levels;
};

/* A page nobody shares, one reference, content undefined. */
struct sim_page *sim_page_new(void);
struct sim_page *sim_page_get(struct sim_page *page);
void sim_page_put(struct sim_page *page);
/* What a block reads as before it is written. */
void sim_page_canary(uint8_t data[BLOCK_SIZE], uint64_t block);

void sim_tree_init(struct sim_tree *tree, uint64_t blocks);
void sim_tree_clear(struct sim_tree *tree);
/* dst becomes what src is; what dst was is dropped. */
void sim_tree_copy(struct sim_tree *dst, const struct sim_tree *src);
/* Borrowed; NULL: never written. */
const struct sim_page *sim_tree_find(const struct sim_tree *tree, uint64_t block);
/* The tree takes over the caller's reference. */
void sim_tree_set(struct sim_tree *tree, uint64_t block, struct sim_page *page);
/* The block's page, borrowed, for changing: the tree alone refers to it. */
struct sim_page *sim_tree_own(struct sim_tree *tree, uint64_t block);

#endif
