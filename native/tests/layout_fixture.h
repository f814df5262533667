/* SPDX-License-Identifier: MIT
 *
 * layout_fixture.h - on top of the file fixture: holders that take, write, commit and return
 * layouts of the simulated device, and a look at everything on disk afterwards.
 */
#ifndef LAYOUT_FIXTURE_H
#define LAYOUT_FIXTURE_H

#include "file_fixture.h"
#include "layout_priv.h"
#include "tree_check.h"

#define BLOCKS(n) ((uint64_t)(n) * BLOCK_SIZE)

/* The last answer. */
static struct layout_extent ext[LAYOUT_MAX_EXTENTS];
static struct layout_args args;
static struct { uint64_t id, key; struct event_sink *sink; } holder[4];

static inline uint64_t new_holder(unsigned i)
{
	struct holder_spec spec = { .kind = HOLDER_LOCAL, .name = "test" };

	holder[i].sink = event_sink_create(world.fs, NULL, NULL);
	assert_non_null(holder[i].sink);
	OK(holder_register(world.fs, &spec, holder[i].sink, &holder[i].id, &holder[i].key));
	return holder[i].id;
}

/* After a restart the same holder goes on. */
static inline void come_back(unsigned i)
{
	holder[i].sink = event_sink_create(world.fs, NULL, NULL);
	assert_non_null(holder[i].sink);
	OK(holder_resume(world.fs, holder[i].id, holder[i].key, holder[i].sink));
}

/* The filesystem is gone, and nobody was told. */
static inline void sinks_gone(void)
{
	for (unsigned i = 0; i < ARRAY_LEN(holder); i++) {
		if (holder[i].sink)
			sink_free(holder[i].sink);
		holder[i].sink = NULL;
	}
}

static inline void layout_start(struct flight *f, enum file_op_kind kind, unsigned file)
{
	f->done = false;
	f->mem = NULL;
	file_op_init(&f->fop, kind, world.file[file], world.ctx);
	f->fop.layout = &args;
	f->fop.done = flight_done;
	f->fop.user = f;
	file_start(&f->fop);
}

static inline int layout_call(enum file_op_kind kind, unsigned file)
{
	struct flight f;

	layout_start(&f, kind, file);
	flight_wait(&f);
	return (int)f.fop.result;
}

static inline void set_get(uint64_t h, enum layout_iomode iomode, uint64_t off, uint64_t len,
			   unsigned flags)
{
	memset(ext, 0xee, sizeof(ext));
	args = (struct layout_args){ .holder = h, .iomode = iomode, .offset = off, .length = len,
				     .flags = flags, .extents = ext, .cap = LAYOUT_MAX_EXTENTS,
				     .time_ms = iomode == IOMODE_PIN ? 1000 : 0 };
}

/* The extents tile [offset, next): pairs of the same range count once. */
static inline void check_tiles(void)
{
	uint64_t at = args.offset;
	bool pair = false;

	assert_true(args.count > 0 && args.count <= args.cap);
	for (unsigned i = 0; i < args.count; i++) {
		const struct layout_extent *e = &ext[i];

		assert_true(e->length > 0 &&
			    ((e->offset | e->length | e->device) & BLOCK_MASK) == 0);
		if (pair) {
			assert_int_equal(e->state, INVALID_DATA);
			assert_int_equal(e->offset, ext[i - 1].offset);
			assert_int_equal(e->length, ext[i - 1].length);
			pair = false;
			continue;
		}
		assert_int_equal(e->offset, at);
		at += e->length;
		pair = args.iomode == IOMODE_RW && e->state == READ_DATA;
		if (args.iomode == IOMODE_RW)
			assert_int_not_equal(e->state, NONE_DATA);
		else
			assert_true(e->state == READ_DATA || e->state == NONE_DATA);
		if (e->state == NONE_DATA)
			assert_int_equal(e->device, 0);
	}
	assert_false(pair);
	assert_int_equal(at, args.next);
}

static inline int get(unsigned file, uint64_t h, enum layout_iomode iomode, uint64_t off,
		      uint64_t len, unsigned flags)
{
	int rc;

	set_get(h, iomode, off, len, flags);
	rc = layout_call(FILE_LAYOUT_GET, file);
	if (!rc)
		check_tiles();
	return rc;
}

static inline int commit_ranges(unsigned file, uint64_t h, const struct layout_range *ranges,
				unsigned n, uint64_t size, uint64_t seq, unsigned flags)
{
	args = (struct layout_args){ .holder = h, .ranges = ranges, .nranges = n, .size = size,
				     .seq = seq, .flags = flags };
	return layout_call(FILE_LAYOUT_COMMIT, file);
}

static inline int commit(unsigned file, uint64_t h, uint64_t off, uint64_t len, uint64_t size)
{
	struct layout_range range = { off, len };

	return commit_ranges(file, h, &range, 1, size, 0, 0);
}

static inline int give_back(unsigned file, uint64_t h, enum layout_iomode iomode, uint64_t off,
			    uint64_t len)
{
	args = (struct layout_args){ .holder = h, .iomode = iomode, .offset = off, .length = len };
	return layout_call(FILE_LAYOUT_RETURN, file);
}

static inline int give_back_all(uint64_t h)
{
	args = (struct layout_args){ .holder = h, .flags = LAYOUT_F_ALL };
	return layout_call(FILE_LAYOUT_RETURN, 0);
}

/* Extent of the last answer that a holder writes for this offset. */
static inline const struct layout_extent *target(uint64_t off)
{
	for (unsigned i = 0; i < args.count; i++)
		if (ext[i].offset <= off && off < ext[i].offset + ext[i].length &&
		    (ext[i].state == INVALID_DATA || ext[i].state == READ_WRITE_DATA))
			return &ext[i];
	fail_msg("nothing to write at %llu", (unsigned long long)off);
	return NULL;
}

/* As a holder: to the device, at the addresses of the last GET. */
static inline void holder_write(uint64_t off, uint64_t len, uint64_t pattern)
{
	uint8_t block[BLOCK_SIZE];

	for (uint64_t at = off; at < off + len; at += BLOCK_SIZE) {
		const struct layout_extent *e = target(at);

		for (unsigned i = 0; i < BLOCK_SIZE; i++)
			block[i] = pattern_byte(pattern, at - off + i);
		OK(sim_poke(world.sim, e->device + (at - e->offset), block, BLOCK_SIZE));
	}
}

/* What anybody reads there now: bytes of the pattern, or zeros (pattern 0). */
static inline void expect(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	struct flight f;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file, .off = off, .len = len });
	flight_wait(&f);
	assert_int_equal(f.fop.result, len);
	for (uint64_t i = 0; i < len; i++) {
		uint8_t want = pattern ? pattern_byte(pattern, i) : 0;

		if (((uint8_t *)f.fop.buf)[i] != want)
			fail_msg("byte %llu of file %u is %#x, not %#x",
				 (unsigned long long)(off + i), file,
				 ((uint8_t *)f.fop.buf)[i], want);
	}
	flight_end(&f);
}

static inline uint64_t size_of(unsigned file) { return world.file[file]->core.size; }

static inline int state_at(unsigned file, enum fork fork, fileblk_t at, struct extent *e)
{
	fs_rdlock(world.fs);
	OK(extmap_lookup(world.file[file], fork, at, 1, e));
	fs_unlock(world.fs);
	return e->state;
}

static inline int state_of(unsigned file, fileblk_t at)
{
	struct extent e;

	return state_at(file, FORK_DATA, at, &e);
}

static inline nblocks_t exposed(unsigned file, uint64_t h)
{
	struct exposure x;
	nblocks_t sum = 0;

	fs_rdlock(world.fs);
	for (fileblk_t at = 0; !exposure_find(world.fs, world.file[file]->ino, h, at,
					      FILE_MAX_BLOCKS, &x);
	     at = x.file + x.len)
		sum += x.len;
	fs_unlock(world.fs);
	return sum;
}

static inline bool noted(unsigned file, uint64_t h)
{
	int rc;

	fs_rdlock(world.fs);
	rc = exposure_has_inode(world.fs, world.file[file]->ino, h, IOMODE_READ);
	fs_unlock(world.fs);
	OK(rc);
	return rc;
}

/* Every extent on disk, by its tree. */
static inline void check_disk(void)
{
	uint8_t *mapped = calloc(world.fs->super.total_blocks, 1);
	struct bt_cursor c;

	layouts_settle(world.fs);
	reaper_drain(world.fs);
	fs_wrlock(world.fs);
	bt_cursor_init(&c, fs_tree(world.fs, TREE_EXTENT));
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err; err = bt_next(&c)) {
		unsigned len;
		const struct extent_disk *rec = bt_record(&c, &len);
		struct extent e = { .file = bt_key(&c).lo & (((uint64_t)1 << 56) - 1),
				    .block = get64(rec->block), .len = get32(rec->length) };
		bool staged = bt_key(&c).lo >> 56 == FORK_STAGING;
		struct exposure x;

		memset(mapped + e.block, 1, e.len);
		for (fileblk_t at = e.file; staged && at < e.file + e.len; at = x.file + x.len) {
			OK(exposure_find(world.fs, bt_key(&c).hi, 0, at, e.file + e.len, &x));
			assert_true(x.staging && x.file == at &&
				    x.block == e.block + (at - e.file));
		}
	}
	bt_cursor_release(&c);
	check_space(world.fs, mapped);
	fs_unlock(world.fs);
	free(mapped);
}

/* What is durable now, and nothing else. */
static inline void lose_power(bool keep_data)
{
	static uint64_t seed = 77;

	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sinks_gone();
	if (keep_data)
		sim_settle(world.sim);
	else
		sim_restart(world.sim, seed++);
	OK(world_open());
	find_files();
}

static inline void remount(void)
{
	put_files();
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	OK(fs_close(world.fs));
	sinks_gone();
	OK(world_open());
	find_files();
}

#endif
