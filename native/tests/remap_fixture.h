/* SPDX-License-Identifier: MIT
 *
 * remap_fixture.h - exchange, collapse, insert, clone and dedupe for the tests of the data path: to
 * be run whole, or a transaction at a time; fragmented files; power cuts in the middle.
 */
#ifndef REMAP_FIXTURE_H
#define REMAP_FIXTURE_H

#include "btree.h"
#include "journal.h"
#include "layout_fixture.h"

static inline void remap_start(struct flight *f, struct ioctx *ctx, enum file_op_kind kind,
			       unsigned file,
			       uint64_t off, uint64_t len, unsigned dst, uint64_t dst_off)
{
	*f = (struct flight){ .done = false };
	file_op_init(&f->fop, kind, world.file[file], ctx);
	f->fop.offset = off;
	f->fop.len = len;
	f->fop.flags = kind == FILE_COPY ? FILE_F_CLONE : 0;
	if (kind == FILE_EXCHANGE || kind == FILE_DEDUPE || kind == FILE_COPY) {
		f->fop.dst = world.file[dst];
		f->fop.dst_offset = dst_off;
	}
	f->fop.done = flight_done;
	f->fop.user = f;
	file_start(&f->fop);
}

static inline int64_t remap(enum file_op_kind kind, unsigned file, uint64_t off, uint64_t len,
			    unsigned dst, uint64_t dst_off)
{
	struct flight f;

	remap_start(&f, world.ctx, kind, file, off, len, dst, dst_off);
	flight_wait(&f);
	return f.fop.result;
}

static inline int64_t do_exchange(unsigned file, uint64_t off, unsigned dst, uint64_t dst_off,
				  uint64_t len)
{
	return remap(FILE_EXCHANGE, file, off, len, dst, dst_off);
}

static inline int64_t do_clone(unsigned file, uint64_t off, unsigned dst, uint64_t dst_off,
			       uint64_t len)
{
	return remap(FILE_COPY, file, off, len, dst, dst_off);
}

static inline int64_t do_dedupe(unsigned file, uint64_t off, unsigned dst, uint64_t dst_off,
				uint64_t len)
{
	return remap(FILE_DEDUPE, file, off, len, dst, dst_off);
}

static inline int64_t do_collapse(unsigned file, uint64_t off, uint64_t len)
{
	return remap(FILE_COLLAPSE, file, off, len, 0, 0);
}

static inline int64_t do_insert(unsigned file, uint64_t off, uint64_t len)
{
	return remap(FILE_INSERT, file, off, len, 0, 0);
}

/* [0, MODEL_MAX) of a file, whatever its size: 0 behind it. Caller frees. */
static inline uint8_t *content(unsigned file, uint64_t *size)
{
	uint8_t *all = calloc(1, MODEL_MAX), *got = read_all(file, size);

	assert_true(*size <= MODEL_MAX);
	memcpy(all, got, *size);
	io_free(got);
	return all;
}

static inline uint64_t blocks_of(unsigned file)
{
	uint64_t n;

	fs_rdlock(world.fs);
	n = world.file[file]->core.blocks;
	fs_unlock(world.fs);
	return n;
}

static inline unsigned extents_of(unsigned file)
{
	struct extent ext[600];
	int n;

	fs_rdlock(world.fs);
	n = extmap_list(world.file[file], FORK_DATA, 0, FILE_MAX_BLOCKS, false, ext,
			ARRAY_LEN(ext));
	fs_unlock(world.fs);
	OK(n);
	return (unsigned)n;
}

static inline uint64_t intents(void)
{
	uint64_t n;

	fs_rdlock(world.fs);
	n = bt_records(fs_tree(world.fs, TREE_INTENT));
	fs_unlock(world.fs);
	return n;
}

/* ---- files of many extents, larger than the model ------------------------------------------- */

#define PIECES 260u /* five transactions move them */

/* Block i of file n. */
static inline uint64_t piece_pattern(unsigned file, unsigned i)
{
	return 1000 * (file + 1) + i;
}

/* Files 0 and 1, written from the end backwards, so that no block follows the one before it in the
 * file on the device, too. Every fifth block of file 1 is a hole, every seventh of file 0
 * unwritten. */
static inline void make_pieces(void)
{
	OK(do_write(0, (uint64_t)PIECES * BLOCK_SIZE, 100, 77)); /* the block of EOF */
	OK(do_truncate(1, (uint64_t)PIECES * BLOCK_SIZE + 50));
	for (unsigned i = PIECES; i-- > 0;) {
		uint64_t off = (uint64_t)i * BLOCK_SIZE;

		if (i % 7 == 3)
			OK(do_one(&(struct todo){ .act = ACT_ALLOC, .off = off,
						  .len = BLOCK_SIZE }));
		else
			OK(do_write(0, off, BLOCK_SIZE, piece_pattern(0, i)));
		if (i % 5 != 2)
			OK(do_write(1, off, BLOCK_SIZE, piece_pattern(1, i)));
	}
	for (unsigned i = 0; i < 2; i++)
		OK(do_fsync(i));
	assert_true(extents_of(0) > PIECES);
	assert_true(extents_of(1) > PIECES / 2);
}

/* What block `at` of file shows: 1 + the number of the piece that it is, of file 0 or 1 in *of; 0:
 * zeros. Anything else fails. */
static inline unsigned piece_at(unsigned file, unsigned at, unsigned *of)
{
	struct flight f;
	const uint8_t *got;
	unsigned found = 0;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file, .len = BLOCK_SIZE,
					 .off = (uint64_t)at * BLOCK_SIZE });
	flight_wait(&f);
	assert_int_equal(f.fop.result, BLOCK_SIZE);
	got = f.fop.buf;
	*of = 0;
	for (unsigned n = 0; n < 2 * PIECES && !found; n++) {
		uint64_t pattern = piece_pattern(n / PIECES, n % PIECES);
		unsigned i = 0;

		while (i < BLOCK_SIZE && got[i] == pattern_byte(pattern, i))
			i++;
		if (i == BLOCK_SIZE) {
			found = 1 + n % PIECES;
			*of = n / PIECES;
		}
	}
	for (unsigned i = 0; i < BLOCK_SIZE && !found; i++)
		if (got[i])
			fail_msg("block %u of %s is no piece: byte %u is %#x", at, name_of(file), i,
				 got[i]);
	flight_end(&f);
	return found;
}

/* The same as it was made: for piece i of file `of`. */
static inline unsigned piece_made(unsigned of, unsigned i)
{
	return (of == 0 ? i % 7 == 3 : i % 5 == 2) ? 0 : 1 + i;
}

/* ---- power cuts ----------------------------------------------------------------------------- */

struct cut_test {
	/* Starts the operation on this context. */
	void (*start)(struct flight *f, struct ioctx *ctx);
	/* Is everything as after the operation? fails when it is neither old nor new. */
	bool (*is_new)(void);
};

/* Each of its transactions becomes durable by itself. Returns true when a power cut ended it. */
static inline bool run_cut_up(const struct cut_test *ct, bool *rolled)
{
	struct ioctx *ctx;
	struct flight f;

	OK(ioctx_create(16, &ctx));
	ct->start(&f, ctx);
	*rolled = false;
	for (;;) {
		*rolled |= intents() > 0;
		if (!sim_crashed(world.sim))
			jrn_force_blocking(world.fs, jrn_running(world.fs));
		if (f.done)
			break;
		/* Somebody else's data, so that there is something to flush. */
		do_write(2, 0, BLOCK_SIZE, sim_events(world.sim));
		jrn_kick_checkpoint(world.fs);
		ioctx_run(ctx, true);
	}
	if (!sim_crashed(world.sim))
		OK(f.fop.result);
	ioctx_destroy(ctx);
	return sim_crashed(world.sim);
}

static inline void power_cut(uint64_t seed)
{
	put_files();
	inode_put(world.root);
	world.root = NULL;
	fs_abandon(world.fs);
	sinks_gone();
	sim_restart(world.sim, seed);
}

/* Mounts, and loses power while what was begun is being finished. */
static inline void cut_the_recovery(uint64_t events, uint64_t seed)
{
	sim_crash_at(world.sim, sim_events(world.sim) + events);
	if (world_open() == 0) {
		reaper_drain(world.fs);
		jrn_force_blocking(world.fs, jrn_running(world.fs));
		power_cut(seed);
	} else {
		sim_restart(world.sim, seed);
	}
}

struct cut_tally { unsigned olds, news; bool cut; };

static uint64_t cut_at; /* events from the start of the operation on */

static inline void cut_once(const struct cut_test *ct, uint64_t n, uint64_t seed,
			    struct cut_tally *tally)
{
	bool rolled;

	OK(world_open());
	find_files();
	cut_at = n;
	sim_crash_at(world.sim, sim_events(world.sim) + n);
	tally->cut = run_cut_up(ct, &rolled);
	if (!tally->cut)
		assert_true(rolled);
	power_cut(seed);
	if (seed % 2)
		cut_the_recovery(1 + seed % 11, seed);
	if (world_open())
		fail_msg("cut %llu, seed %llu: no mount", (unsigned long long)n,
			 (unsigned long long)seed);
	find_files();
	if (ct->is_new()) {
		tally->news++;
	} else {
		tally->olds++;
		/* Decided once, it stays. */
		assert_true(tally->cut);
	}
	check_disk();
	assert_int_equal(intents(), 0);
}

/* Cuts at the n-th write or flush for every n, with several seeds, until the operation ends before
 * the cut. Every second time the recovery is cut, too. The files are as they were afterwards. */
static inline void cut_everywhere(const struct cut_test *ct)
{
	struct sim *made = world.sim;
	nblocks_t empty = world.free_empty;
	struct cut_tally tally = { .cut = true };
	char line[256];

	world_close();
	sim_settle(made);
	for (uint64_t n = 1; tally.cut; n++)
		for (uint64_t seed = 4 * n; seed < 4 * n + 4; seed++) {
			OK(sim_clone(made, &world.sim));
			cut_once(ct, n, seed, &tally);
			world.free_empty = empty;
			delete_all();
			world_close();
			sinks_gone();
			sim_destroy(world.sim);
		}
	assert_true(tally.olds >= 4);
	assert_true(tally.news >= 12);
	while (log_next(line, sizeof(line)) > 0)
		if (strstr(line, "reserved") || strstr(line, "impossible") ||
		    strstr(line, "overlaps"))
			fail_msg("unexpected in the log: %s", line);
	world.sim = made;
	OK(world_open());
	find_files();
}

#endif
