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
STEP(layout_get_start)
STEP(layout_commit_start)
STEP(layout_return_start)
STEP(layout_revoke_start)
STEP(layout_trim_start)
STEP(file_exchange_start)
STEP(file_shift_start)
STEP(file_dedupe_start)

WEAK uint64_t layouts_next_seq(struct layouts *ls) { return atomic_fetch_add(&ls->next_seq, 1); }
WEAK void layout_map_changed(struct inode *in) {}
WEAK int layouts_open(struct fs *fs) { return 0; }
WEAK int layouts_start(struct fs *fs) { return 0; }
WEAK void layouts_stop(struct fs *fs) {}
WEAK void layouts_destroy(struct fs *fs) {}
WEAK uint64_t layouts_lost_holder(struct fs *fs, inum_t ino) { return 0; }
WEAK void layout_unlinked(struct inode *in) {}
WEAK int layout_recall(struct inode *in, uint64_t holder, enum layout_iomode iomode, uint64_t offset, uint64_t length) { return -EOPNOTSUPP; }
WEAK int layout_watch(struct inode *in, uint64_t holder, bool on) { return -EOPNOTSUPP; }
WEAK uint64_t layouts_now(struct fs *fs) { return 0; }
WEAK void layouts_set_clock(struct fs *fs, uint64_t ns) {}
WEAK void layouts_settle(struct fs *fs) {}
WEAK struct event_sink *event_sink_create(struct fs *fs, void (*wake)(void *arg), void *arg) { return NULL; }
WEAK void event_sink_destroy(struct fs *fs, struct event_sink *sink) {}
WEAK bool event_next(struct fs *fs, struct event_sink *sink, struct layout_event *out) { return false; }
WEAK bool event_any(struct fs *fs, struct event_sink *sink) { return false; }
WEAK int holder_register(struct fs *fs, const struct holder_spec *spec, struct event_sink *sink, uint64_t *id, uint64_t *key) { return -EOPNOTSUPP; }
WEAK int holder_resume(struct fs *fs, uint64_t id, uint64_t key, struct event_sink *sink) { return -EOPNOTSUPP; }
WEAK int holder_check(struct fs *fs, uint64_t id, uint64_t key) { return -ENOENT; }
WEAK int holder_lost(struct fs *fs, uint64_t id) { return -ENOENT; }
WEAK int holder_gone(struct fs *fs, uint64_t id) { return -ENOENT; }
WEAK int holder_fenced(struct fs *fs, uint64_t id) { return -ENOENT; }
WEAK unsigned holder_list(struct fs *fs, uint64_t *id, struct holder_look *out, unsigned n) { return 0; }
WEAK void revoke_start(struct layouts *ls, struct inode *in, uint64_t holder, uint64_t start, uint64_t end) { inode_put(in); }
WEAK void release_start(struct layouts *ls, uint64_t holder) {}
WEAK void trim_start(struct layouts *ls, struct inode *in) { inode_put(in); }
WEAK struct event_sink *layouts_sink(struct fs *fs) { return NULL; }
WEAK int layouts_event_fd(struct fs *fs) { return -1; }
WEAK struct layout_counters *layouts_counters(struct fs *fs) { static struct layout_counters none; return &none; }
WEAK void layouts_latency(struct fs *fs, enum latency_of of, uint64_t out[LATENCY_BUCKETS]) { memset(out, 0, LATENCY_BUCKETS * sizeof(*out)); }
WEAK void layouts_note_latency(struct fs *fs, enum latency_of of, uint64_t ns) {}
WEAK int holder_quarantined(struct trans *t, uint64_t id, int64_t blocks) { return 0; }
