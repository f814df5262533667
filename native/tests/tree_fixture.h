/* SPDX-License-Identifier: MIT
 *
 * tree_fixture.h - a formatted filesystem on a simulated device for the tests of trees and space:
 * real buffers and transactions, and a journal that is a counter, so that the test decides what is
 * durable and checkpointed.
 *
 * Not to be linked with fs.c or journal*.c: it defines their functions.
 */
#ifndef EXTFS_TREE_FIXTURE_H
#define EXTFS_TREE_FIXTURE_H

#include "alloc.h"
#include "btree.h"
#include "device_sim.h"
#include "errors.h"
#include "fs.h"
#include "tree_check.h"

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

#endif
