/* SPDX-License-Identifier: MIT
 *
 * layout_skeleton.c - keeps the tree linking until every part of the layout module is written: weak definitions that
 * refuse. To be deleted.
 */
#include <string.h>

#include "types.h"

#include "extfs_core.h"
#include "file_run.h"
#include "layout_priv.h"

#define WEAK __attribute__((weak))
#define STEP(name) WEAK enum step name(struct file_run *r) { return run_end(r, -EOPNOTSUPP); }
STEP(file_exchange_start)
STEP(file_shift_start)
STEP(file_dedupe_start)

