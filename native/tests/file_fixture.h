/* SPDX-License-Identifier: MIT
 *
 * file_fixture.h - a filesystem on a simulated device, a model of files as plain bytes, and one
 * description of an operation that both can be given: for the tests of the data path.
 */
#ifndef FILE_FIXTURE_H
#define FILE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "alloc.h"
#include "device_sim.h"
#include "extmap.h"
#include "file.h"
#include "file_early.h"
#include "log.h"
#include "namei.h"
#include "reaper.h"

#define OK(call)                                                                            \
	do {                                                                                \
		long ok_rc_ = (call);                                                       \
		if (ok_rc_ < 0)                                                             \
			fail_msg("%s: %s", #call, err_name((int)ok_rc_));                   \
	} while (0)

#define FILES 3u
#define MODEL_MAX (160u << 10) /* bytes; operations of the random tests stay below */
#define FLIGHT 4u              /* operations under way at once */

static const struct cred root_cred = { 0, 0, 0 };

/* ---- random numbers, repeatable ------------------------------------------------------------- */

static uint64_t rng_state;

static inline void rng_seed(uint64_t seed)
{
	rng_state = seed * 0x9e3779b97f4a7c15 + 0x1234567;
}

static inline uint64_t rng(void)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return rng_state;
}

static inline uint64_t below(uint64_t n)
{
	return rng() % n;
}

/* ---- the world ------------------------------------------------------------------------------ */

static struct world {
	struct sim *sim;
	struct fs *fs;
	struct fs_options opt;
	struct inode *root;
	struct inode *file[FILES];
	struct ioctx *ctx;
	nblocks_t free_empty; /* of the empty filesystem */
	unsigned early_left;  /* early writes that have not ended */
	uint64_t early_done;
} world;

/* Memory for early writes of the next world; 0: writes are answered late. */
static uint64_t early_memory;

static inline void early_ended(void *arg)
{
	world.early_left--;
	world.early_done++;
}

/* What was answered early comes to its end. */
static inline void early_run_out(void)
{
	while (world.early_left)
		OK(ioctx_run(world.ctx, true));
}

static inline const char *name_of(unsigned i)
{
	static const char *const names[FILES] = { "alpha", "beta", "gamma" };

	return names[i];
}

/* *rc < 0: not mounted (the power may have gone during the replay). */
static inline int world_open(void)
{
	struct device *dev;
	int rc;

	OK(sim_device(world.sim, &dev));
	rc = fs_open(dev, &world.opt, &world.fs);
	if (rc) {
		dev_close(dev);
		return rc;
	}
	return inode_get_handle(world.fs, 1, 1, &world.root);
}

static inline nblocks_t free_blocks(void)
{
	struct alloc_space sp;

	alloc_statfs(world.fs, &sp);
	return sp.free;
}

static inline void make_files(void)
{
	for (unsigned i = 0; i < FILES; i++)
		OK(namei_create(world.root, name_of(i), strlen(name_of(i)), S_IFREG | 0644, 0,
				&root_cred,
				&world.file[i]));
}

static inline void find_files(void)
{
	for (unsigned i = 0; i < FILES; i++)
		OK(namei_lookup(world.root, name_of(i), strlen(name_of(i)), &world.file[i]));
}

static inline void put_files(void)
{
	early_run_out();
	for (unsigned i = 0; i < FILES; i++) {
		if (world.file[i])
			inode_put(world.file[i]);
		world.file[i] = NULL;
	}
}

/* The whole cache reaches the device, but no further commit record: the worst order of a power
 * cut. */
static inline void lose_power_keeping_data(void)
{
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sim_settle(world.sim);
	OK(world_open());
	find_files();
}

static inline void world_new(uint64_t bytes, uint32_t align, uint64_t seed)
{
	struct mkfs_options mk = { .label = "files", .journal_blocks = JOURNAL_MIN_BLOCKS };
	struct device *dev;

	world.opt = (struct fs_options){ .no_heartbeat = true, .commit_ms = 3600 * 1000,
					   .early_bytes = early_memory };
	OK(sim_create(bytes, align, seed, &world.sim));
	OK(sim_device(world.sim, &dev));
	OK(fs_mkfs(dev, &mk));
	dev_close(dev);
	sim_settle(world.sim);
	OK(ioctx_create(64, &world.ctx));
	OK(world_open());
	world.free_empty = free_blocks();
}

static inline void world_end(void)
{
	ioctx_destroy(world.ctx);
	sim_destroy(world.sim);
	memset(&world, 0, sizeof(world));
}

static inline void world_close(void)
{
	put_files();
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	OK(fs_close(world.fs));
	world.fs = NULL;
}

/* Every block is free again when every file is gone. */
static inline void delete_all(void)
{
	put_files();
	for (unsigned i = 0; i < FILES; i++)
		namei_unlink(world.root, name_of(i), strlen(name_of(i)), NULL);
	reaper_drain(world.fs);
	assert_int_equal(free_blocks(), world.free_empty);
}

/* ---- operations, as both sides understand them ---------------------------------------------- */

enum act { ACT_READ, ACT_WRITE, ACT_APPEND, ACT_TRUNCATE, ACT_ALLOC, ACT_PUNCH, ACT_ZERO, ACT_COPY,
	   ACT_FSYNC, ACTS };

struct todo {
	enum act act;
	unsigned file, dst;
	uint64_t off, len, dst_off;
	bool keep_size, dsync;
	uint64_t pattern; /* of the bytes written; never 0 */
	unsigned skew;    /* bytes by which the memory misses alignment */
	unsigned flags;   /* FILE_F_*, more than the others say */
};

struct model {
	uint64_t size;
	uint8_t bytes[MODEL_MAX];
};

/* No byte is 0, so that zeros are always told from data; near patterns differ, too. */
static inline uint8_t pattern_byte(uint64_t pattern, uint64_t i)
{
	uint64_t mixed = pattern * 0x9e3779b97f4a7c15 ^ i * 0x2545f4914f6cdd1d;

	return (uint8_t)(1 + (mixed >> 24) % 255);
}

static inline void model_grow(struct model *m, uint64_t size)
{
	if (size > m->size) {
		memset(m->bytes + m->size, 0, size - m->size);
		m->size = size;
	}
}

static inline int64_t model_do(struct model *files, const struct todo *t)
{
	struct model *m = &files[t->file], *d = &files[t->dst];
	uint64_t off = t->act == ACT_APPEND ? m->size : t->off, len = t->len;

	switch (t->act) {
	case ACT_READ:
		return off >= m->size ? 0 : (int64_t)MIN(len, m->size - off);
	case ACT_WRITE:
	case ACT_APPEND:
		model_grow(m, off);
		for (uint64_t i = 0; i < len; i++)
			m->bytes[off + i] = pattern_byte(t->pattern, i);
		m->size = MAX(m->size, off + len);
		return (int64_t)len;
	case ACT_TRUNCATE:
		model_grow(m, off);
		m->size = off;
		return 0;
	case ACT_ALLOC:
		if (!t->keep_size)
			model_grow(m, off + len);
		return 0;
	case ACT_PUNCH:
	case ACT_ZERO:
		if (t->act == ACT_ZERO && !t->keep_size)
			model_grow(m, off + len);
		if (off < m->size)
			memset(m->bytes + off, 0, MIN(len, m->size - off));
		return 0;
	case ACT_COPY:
		if (off >= m->size)
			return 0;
		len = MIN(len, m->size - off);
		model_grow(d, t->dst_off);
		memmove(d->bytes + t->dst_off, m->bytes + off, len);
		d->size = MAX(d->size, t->dst_off + len);
		return (int64_t)len;
	default:
		return 0;
	}
}

/* ---- the real thing ------------------------------------------------------------------------- */

struct flight {
	struct file_op fop;
	struct todo todo;
	uint8_t *mem;
	bool done;
};

static inline void flight_done(struct file_op *fop)
{
	((struct flight *)fop->user)->done = true;
	world.early_left += fop->early;
}

static inline void flight_start(struct flight *f, const struct todo *t)
{
	static const enum file_op_kind kinds[ACTS] = {
		[ACT_READ] = FILE_READ, [ACT_WRITE] = FILE_WRITE, [ACT_APPEND] = FILE_WRITE,
		[ACT_TRUNCATE] = FILE_TRUNCATE, [ACT_ALLOC] = FILE_FALLOCATE,
		[ACT_PUNCH] = FILE_FALLOCATE,
		[ACT_ZERO] = FILE_FALLOCATE, [ACT_COPY] = FILE_COPY, [ACT_FSYNC] = FILE_FSYNC,
	};
	bool memory = t->act <= ACT_APPEND;

	f->todo = *t;
	f->done = false;
	f->mem = memory ? io_alloc(t->len + BLOCK_SIZE) : NULL;
	file_op_init(&f->fop, kinds[t->act], world.file[t->file], world.ctx);
	f->fop.offset = t->off;
	f->fop.len = t->len;
	f->fop.buf = memory ? f->mem + t->skew : NULL;
	f->fop.dst = t->act == ACT_COPY ? world.file[t->dst] : NULL;
	f->fop.dst_offset = t->dst_off;
	f->fop.flags = t->flags | (t->dsync ? FILE_F_DSYNC : 0) |
		       (t->act == ACT_APPEND ? FILE_F_APPEND : 0);
	f->fop.mode = (t->keep_size || t->act == ACT_PUNCH ? FALLOC_KEEP_SIZE : 0) |
		      (t->act == ACT_PUNCH ? FALLOC_PUNCH_HOLE : 0) |
		      (t->act == ACT_ZERO ? FALLOC_ZERO_RANGE : 0);
	if (memory && t->act != ACT_READ && !t->dsync && !(t->flags & FILE_F_NOWAIT))
		f->fop.flags |= FILE_F_EARLY;
	f->fop.ended = early_ended;
	f->fop.done = flight_done;
	f->fop.user = f;
	if (t->act == ACT_WRITE || t->act == ACT_APPEND)
		for (uint64_t i = 0; i < t->len; i++)
			((uint8_t *)f->fop.buf)[i] = pattern_byte(t->pattern, i);
	if (t->act == ACT_READ)
		memset(f->fop.buf, 0xee, t->len);
	file_start(&f->fop);
}

static inline void flight_wait(struct flight *f)
{
	while (!f->done)
		OK(ioctx_run(world.ctx, true));
}

static inline void flight_end(struct flight *f)
{
	io_free(f->mem);
	f->mem = NULL;
}

static inline int64_t do_one(const struct todo *t)
{
	struct flight f;

	flight_start(&f, t);
	flight_wait(&f);
	flight_end(&f);
	return f.fop.result;
}

static inline int64_t do_write(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	return do_one(&(struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len,
				      .pattern = pattern });
}

static inline int64_t do_truncate(unsigned file, uint64_t size)
{
	return do_one(&(struct todo){ .act = ACT_TRUNCATE, .file = file, .off = size });
}

static inline int64_t do_fsync(unsigned file)
{
	return do_one(&(struct todo){ .act = ACT_FSYNC, .file = file });
}

/* The whole file as read(2) would show it; NULL with *size for an error code. Caller frees with
 * io_free. */
static inline uint8_t *read_all(unsigned file, uint64_t *size)
{
	struct flight f;

	flight_start(&f, &(struct todo){ .act = ACT_READ, .file = file,
					 .len = MODEL_MAX + BLOCK_SIZE });
	flight_wait(&f);
	OK(f.fop.result);
	*size = (uint64_t)f.fop.result;
	return f.mem;
}

static inline void same_as_model(unsigned file, const struct model *m, const char *when)
{
	uint64_t size;
	uint8_t *got = read_all(file, &size);

	if (size != m->size)
		fail_msg("%s: %s has %llu bytes, not %llu", when, name_of(file),
			 (unsigned long long)size,
			 (unsigned long long)m->size);
	for (uint64_t i = 0; i < size; i++)
		if (got[i] != m->bytes[i])
			fail_msg("%s: %s differs at byte %llu: %#x, not %#x", when, name_of(file),
				 (unsigned long long)i, got[i], m->bytes[i]);
	io_free(got);
}

/* ---- random operations ---------------------------------------------------------------------- */

static inline uint64_t random_off(const struct model *m)
{
	uint64_t off = below(MODEL_MAX / 2);

	switch (below(6)) {
	case 0:
		return off & ~BLOCK_MASK;
	case 1:
		return off & ~(uint64_t)511;
	case 2:
		return MIN(m->size, MODEL_MAX / 2);
	case 3:
		return below(MIN(m->size, MODEL_MAX / 2) + 1);
	case 4: /* a little behind EOF */
		return MIN(m->size + below(9000), MODEL_MAX / 2);
	default:
		return off;
	}
}

static inline uint64_t random_len(void)
{
	switch (below(5)) {
	case 0:
		return 1 + below(600);
	case 1:
		return (1 + below(6)) * BLOCK_SIZE;
	case 2:
		return (1 + below(20)) * 512;
	case 3:
		return 1 + below(30000);
	default:
		return 1 + below(5000);
	}
}

static inline struct todo random_todo(const struct model *files)
{
	static const enum act often[] = {
		ACT_READ, ACT_WRITE, ACT_WRITE, ACT_WRITE, ACT_WRITE, ACT_APPEND, ACT_TRUNCATE,
		ACT_TRUNCATE, ACT_ALLOC, ACT_PUNCH, ACT_ZERO, ACT_COPY, ACT_COPY, ACT_FSYNC,
	};
	struct todo t = { .act = often[below(ARRAY_LEN(often))], .file = below(FILES),
			  .dst = below(FILES) };

	t.off = random_off(&files[t.file]);
	t.len = random_len();
	t.pattern = rng() | 1;
	t.keep_size = below(2);
	t.dsync = below(12) == 0;
	t.skew = below(3) == 0 ? 1 + below(4095) : below(3) == 0 ? 512 : 0;
	if (t.act == ACT_APPEND && files[t.file].size + t.len > MODEL_MAX)
		t.act = ACT_TRUNCATE;
	if (t.act == ACT_COPY) {
		t.dst_off = random_off(&files[t.dst]);
		if (below(2)) {
			t.off &= ~BLOCK_MASK;
			t.dst_off &= ~BLOCK_MASK;
		}
		if (below(3) == 0) /* to the end of the source */
			t.len = MODEL_MAX / 4;
		t.len = MIN(t.len, MODEL_MAX / 4);
		if (t.file == t.dst && t.off < t.dst_off + t.len && t.dst_off < t.off + t.len)
			t.dst = (t.dst + 1) % FILES;
	}
	return t;
}

/* ---- one round of a test ---- */

/* What the files should hold. */
static struct model *files;

static inline void begin(uint64_t bytes, uint32_t align, uint64_t seed)
{
	world_new(bytes, align, seed);
	make_files();
	files = calloc(FILES, sizeof(*files));
	assert_non_null(files);
	rng_seed(seed);
}

static inline void end(void)
{
	char line[256];

	delete_all();
	world_close();
	world_end();
	free(files);
	while (log_next(line, sizeof(line)) > 0)
		if (strstr(line, "reserved") || strstr(line, "damaged") ||
		    strstr(line, "impossible"))
			fail_msg("unexpected in the log: %s", line);
}

static inline void compare_all(const char *when)
{
	for (unsigned i = 0; i < FILES; i++)
		same_as_model(i, &files[i], when);
}

static inline void check_read(const struct flight *f, const struct model *m)
{
	const uint8_t *got = f->fop.buf;

	for (int64_t i = 0; i < f->fop.result; i++)
		if (got[i] != m->bytes[f->todo.off + (uint64_t)i])
			fail_msg("read of %s: byte %llu is %#x", name_of(f->todo.file),
				 (unsigned long long)(f->todo.off + (uint64_t)i), got[i]);
}

/* Both sides, which must agree. */
static inline void both(const struct todo *t)
{
	struct flight f;
	int64_t want = model_do(files, t);

	flight_start(&f, t);
	flight_wait(&f);
	if (f.fop.result != want)
		fail_msg("act %d on %s: %lld, not %lld", t->act, name_of(t->file),
			 (long long)f.fop.result,
			 (long long)want);
	if (t->act == ACT_READ)
		check_read(&f, &files[t->file]);
	flight_end(&f);
}

/* Everything behind the log of the smallest size. */
#define BEHIND_LOG ((JOURNAL_START_BLOCK + (uint64_t)JOURNAL_MIN_BLOCKS) * BLOCK_SIZE)

#endif
