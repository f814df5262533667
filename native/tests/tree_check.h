/* SPDX-License-Identifier: MIT
 *
 * tree_check.h - verifying trees and space whole, in any filesystem that is open and at rest;
 * random numbers by seed.
 */
#ifndef EXTFS_TREE_CHECK_H
#define EXTFS_TREE_CHECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "btree.h"
#include "fs.h"

/* Splitmix64. */
uint64_t check_random(uint64_t *state);
/* Seed of this run: EXTFS_TEST_SEED or the given one; printed, so that a failure can be
 * repeated. */
uint64_t check_seed(uint64_t otherwise);

struct tree_shape {
	uint64_t records, nodes, leaves;
	uint64_t leaf_bytes; /* used in leaves, for the fill */
};
/* Verify a whole tree: every invariant of btree.c. Marks the nodes' blocks in `used` (one byte a
 * block) when not NULL. */
struct tree_shape check_tree(struct fs *fs, struct tree tree, uint8_t *used);
/* Verify all free space and all trees: every block of the device is either fixed, or free, or on a
 * freelist, or a node, or quarantined, or marked by the caller in `mapped` (one byte a block; NULL:
 * none), and never two of them. */
void check_space(struct fs *fs, const uint8_t *mapped);

#endif
