/* SPDX-License-Identifier: MIT
 *
 * device_sim.h - a device in memory that can lose power, fail and lie in wait.
 *
 * It holds every write in a volatile cache until a flush (or FUA) makes it durable. sim_restart() decides by
 * seed, for each held write, whether it is kept, dropped or torn at 512 bytes (a random subset of
 * its sectors survives); the result is a new device content to mount again. Writes after the crash point
 * fail as on a device without power. "Held" also covers the order: held writes are kept or dropped independently of each other.
 * Data is sparse in memory: a 16 TiB device costs what was written to it, and a clone costs what differs.
 *
 * What readers see changes when a write is submitted. What is durable changes when a completion is delivered (a blocking
 * call: before it returns): a flush makes durable the writes whose completions had been delivered when
 * the flush was submitted, a FUA write itself, and nothing else. A write in flight when the
 * power goes stays held, the write that met the crash point too; their callers get an error.
 *
 * Every unwritten sector reads as the canary pattern (SIM_CANARY repeated, with the block number in every other
 * word), so a reader that is shown a byte never written can tell.
 *
 * All functions may be called from any thread, except sim_destroy() (nobody else may use the sim then).
 */
#ifndef EXTFS_DEVICE_SIM_H
#define EXTFS_DEVICE_SIM_H

#include "device.h"

#define SIM_CANARY 0xdeadca9a7e5eedULL

struct sim;

/* size in bytes (multiple of 4096); align 512 or 4096. */
int sim_create(uint64_t size, uint32_t align, uint64_t seed, struct sim **out);
void sim_destroy(struct sim *sim);
/* A device handle on it (closed by dev_close, without I/O in flight; the sim lives on). One at a time, else
 * -ERR_DEV_IN_USE. */
int sim_device(struct sim *sim, struct device **out);

/* Crash points are numbered by durability-relevant events: every write and flush that reaches the sim counts
 * one, across all threads, in the order of arrival. The count goes on after a restart. */
uint64_t sim_events(const struct sim *sim);
/* Lose power when the event counter reaches n (0: never): that event and all later ones, reads too, fail with
 * -ERR_DEV_*. An n that has passed already: at the next event. */
void sim_crash_at(struct sim *sim, uint64_t n);
bool sim_crashed(const struct sim *sim);
/* Power comes back: apply the fate of each held write by the seed, clear the crash. No device handle may be open.
 * Some seeds keep all or drop all; the others lean to keeping or to dropping, with torn writes between. */
void sim_restart(struct sim *sim, uint64_t seed);
/* Everything held becomes durable (as a clean power-off). */
void sim_settle(struct sim *sim);
/* Fault injection: the next count I/Os of this kind that touch [offset, offset + len) fail; for flushes the range
 * means nothing. A write that fails this way changes nothing. At most 16 rules at a time; count 0: forget all rules. */
void sim_fail(struct sim *sim, enum io_kind kind, uint64_t offset, uint64_t len, unsigned count);
/* A device without FUA behind a block layer that makes up for it: each FUA write is followed by a flush (device.h). While no
 * device handle is open; default false. */
void sim_fua_flushes(struct sim *sim, bool fua_flushes);
/* Completion order of asynchronous I/O: false in order, else shuffled by the sim's seed. */
void sim_shuffle(struct sim *sim, bool shuffle);
/* Direct access for test holders and decoders: sees what a reader of the device sees now; a write goes through the cache
 * and counts as an event, but is not in the counts of any struct device. Any offset and length;
 * -EINVAL beyond the end, -ERR_DEV_* without power. */
int sim_peek(struct sim *sim, uint64_t offset, void *buf, size_t len);
int sim_poke(struct sim *sim, uint64_t offset, const void *buf, size_t len);
/* Drop a flush: mutants of the power-loss tests. The next n flushes and FUA writes succeed without making anything durable;
 * n = UINT64_MAX: all. */
void sim_drop_flushes(struct sim *sim, uint64_t n);
/* True when an aligned 8-byte word of buf is SIM_CANARY. buf: aligned to 8. */
bool sim_shows_canary(const void *buf, size_t len);
/* Independent copy of the whole state, without a device handle (what is in flight stays held in it), for running the same prefix to many crash points. */
int sim_clone(const struct sim *sim, struct sim **out);

#endif
