/* SPDX-License-Identifier: MIT
 *
 * tree_fixture.h - a formatted filesystem on a simulated device for the tests of trees and space: real buffers and
 * transactions, and a journal that is a counter, so that the test decides what is durable and checkpointed.
 *
 * Not to be linked with fs.c or journal*.c: it defines their functions.
 */
#ifndef EXTFS_TREE_FIXTURE_H
#define EXTFS_TREE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "alloc.h"
#include "btree.h"
#include "device_sim.h"
#include "errors.h"
#include "fs.h"

struct fixture {
	struct fs fs;
	struct sim *sim;
};

struct fixture *fixture_create(nblocks_t total, nblocks_t ag_blocks, nblocks_t journal_blocks);
void fixture_destroy(struct fixture *f);
void fixture_begin(struct fixture *f, struct trans *t, unsigned blocks);
/* The running group becomes durable; with checkpoint also written home. */
void fixture_commit_group(struct fixture *f, bool checkpoint);
unsigned fixture_kicks(const struct fixture *f); /* calls of jrn_kick_checkpoint() */
/* Write everything home and forget it, so that all that follows is read and verified. */
void fixture_reread(struct fixture *f);

/* Splitmix64. */
uint64_t fixture_random(uint64_t *state);
/* Seed of this run: EXTFS_TEST_SEED or the given one; printed when a test fails. */
uint64_t fixture_seed(uint64_t otherwise);

struct tree_shape {
	uint64_t records, nodes, leaves;
	uint64_t leaf_bytes; /* used in leaves, for the fill */
};
/* Verify a whole tree: every invariant of btree.c. Marks the nodes' blocks in `used` (one byte a block) when not NULL. */
struct tree_shape fixture_check_tree(struct fixture *f, struct tree tree, uint8_t *used);
/* Verify all free space and all trees: every block of the device is either fixed, or free, or on a freelist, or a
 * node, or quarantined, or marked by the caller in `mapped` (one byte a block; NULL: none), and never two of them. */
void fixture_check_space(struct fixture *f, const uint8_t *mapped);

#endif
