/* SPDX-License-Identifier: MIT
 *
 * test_file_power.c - power cuts in the middle of file operations.
 *
 * A script of operations, chosen by seed, runs until the device loses power at the n-th write or
 * flush; then the filesystem is mounted again and every file is compared with what may be there:
 * since its last successful fsync a file has had a row of versions; each byte must be that byte in
 * one of them, and the size that of one of them. A canary is in none. Afterwards everything is
 * deleted, and every block must be free again.
 *
 * FILE_CUTS=n sets the number of cuts; a failure names seed and cut.
 */
#include "remap_fixture.h"

#define STEPS 40u
#define VERSIONS (STEPS + 2)

struct history {
	unsigned n;
	struct model *version[VERSIONS]; /* [0] is durable */
	/* Written by those whose size did not count (file_early.h), as another operation has set one while they were under way. */
	bool zeros[MODEL_MAX];
};

static struct history histories[FILES];
static struct sim *formatted;
static char where[128];

static void history_add(struct history *h, const struct model *m)
{
	xassert(h->n < VERSIONS);
	h->version[h->n] = malloc(sizeof(*m));
	memcpy(h->version[h->n++], m, sizeof(*m));
}

static void history_clear(struct history *h)
{
	while (h->n)
		free(h->version[--h->n]);
}

static void now_durable(unsigned file, const struct model *m)
{
	history_clear(&histories[file]);
	memset(histories[file].zeros, 0, sizeof(histories[file].zeros));
	history_add(&histories[file], m);
}

static bool allowed(const struct history *h, uint64_t pos, uint8_t byte)
{
	for (unsigned v = 0; v < h->n; v++)
		if (pos < h->version[v]->size && byte == h->version[v]->bytes[pos])
			return true;
	return !byte && h->zeros[pos];
}

/* NULL, or what is wrong. */
static const char *judge(unsigned file)
{
	static char text[160];
	struct history *h = &histories[file];
	uint64_t size;
	uint8_t *got = read_all(file, &size);
	bool size_known = false;
	const char *wrong = NULL;
	uint64_t least = UINT64_MAX, most = 0;

	for (unsigned v = 0; v < h->n; v++) {
		least = MIN(least, h->version[v]->size);
		most = MAX(most, h->version[v]->size);
		size_known |= h->version[v]->size == size;
	}
	/* A write of many extents lets the size grow with them. */
	if (!size_known && (size < least || size > most || (size & BLOCK_MASK)))
		wrong = "size";
	for (uint64_t i = 0; i < size && !wrong; i++)
		if (!allowed(h, i, got[i]))
			wrong = "byte";
	if (wrong) {
		uint64_t i = 0;

		while (i < size && allowed(h, i, got[i]))
			i++;
		snprintf(text, sizeof(text),
			 "%s: wrong %s: size %llu (known %llu to %llu), byte %llu is %#x",
			 name_of(file), wrong, (unsigned long long)size,
			 (unsigned long long)least, (unsigned long long)most,
			 (unsigned long long)i, i < size ? got[i] : 0);
		wrong = text;
	}
	io_free(got);
	return wrong;
}

/* In the middle of early writes: fsync would wait for them. */
static void commit_what_there_is(void)
{
	xid_t xid;

	fs_rdlock(world.fs);
	xid = jrn_running(world.fs);
	fs_unlock(world.fs);
	jrn_force_blocking(world.fs, xid); /* fails when the power goes */
}

/* Runs one operation; false: the device is dead. */
static bool perform(struct model *files, const struct todo *t)
{
	unsigned changed = t->act == ACT_COPY ? t->dst : t->file;
	struct inode *in = world.file[changed];
	uint64_t epoch = in->early_epoch, size = files[changed].size;
	uint64_t limit = in->early_n ? in->early_limit : UINT64_MAX; /* nobody else is running */
	int64_t rc;

	model_do(files, t);
	if (t->act != ACT_READ && t->act != ACT_FSYNC)
		history_add(&histories[changed], &files[changed]);
	rc = do_one(t);
	if (in->early_epoch != epoch && limit < size)
		memset(histories[changed].zeros + limit, true, size - limit);
	if (sim_crashed(world.sim))
		return false;
	OK(rc);
	if (t->act == ACT_FSYNC)
		now_durable(t->file, &files[t->file]);
	else if (t->dsync && t->act != ACT_READ && !(t->act == ACT_COPY && rc == 0))
		now_durable(t->act == ACT_COPY ? t->dst : t->file,
			    &files[t->act == ACT_COPY ? t->dst : t->file]);
	return true;
}

typedef bool (*script_fn)(struct model *files);

static bool random_script(struct model *files)
{
	for (unsigned i = 0; i < STEPS; i++) {
		struct todo t = random_todo(files);

		if (below(5) == 0)
			t = (struct todo){ .act = ACT_FSYNC, .file = below(FILES) };
		if (!perform(files, &t))
			return false;
	}
	return true;
}

/* Many of them are under way at once: those that begin inside a block are over later than those behind them. */
static bool append_script(struct model *files)
{
	for (unsigned i = 0; i < STEPS; i++) {
		struct todo t = { .act = ACT_APPEND, .pattern = rng() | 1 };
		uint64_t in_block = files[0].size & BLOCK_MASK;

		t.len = in_block ? BLOCK_SIZE - in_block : below(2) ? 100 : 2 * BLOCK_SIZE;
		if (files[0].size > MODEL_MAX / 2)
			t = (struct todo){ .act = ACT_TRUNCATE };
		else if (below(8) == 0)
			t = (struct todo){ .act = ACT_FSYNC };
		if (!perform(files, &t))
			return false;
		if (below(2) && world.early_left)
			OK(ioctx_run(world.ctx, false));
		if (below(2))
			commit_what_there_is();
		if (sim_crashed(world.sim))
			return false;
	}
	return true;
}

/* Anything that does not set a greater size by itself (then zeros may be there after a cut), while earlier writes are under
 * way, and commits in the middle of it. */
static bool busy_script(struct model *files)
{
	for (unsigned i = 0; i < STEPS; i++) {
		struct todo t = random_todo(files);

		t.file %= 2;
		t.keep_size = true;
		if (t.act == ACT_TRUNCATE)
			t.off = MIN(t.off, files[t.file].size);
		else if (t.act == ACT_COPY || below(8) == 0)
			t = (struct todo){ .act = ACT_FSYNC, .file = t.file };
		if (!perform(files, &t))
			return false;
		for (unsigned n = (unsigned)below(3); n && world.early_left; n--)
			OK(ioctx_run(world.ctx, false));
		if (below(3) == 0)
			commit_what_there_is();
		if (sim_crashed(world.sim))
			return false;
	}
	return true;
}

/* The last block is cut, and EOF moves up again before that is durable. */
static bool shrink_script(struct model *files)
{
	static const struct todo ups[] = {
		{ .act = ACT_TRUNCATE, .off = 9000 },
		{ .act = ACT_WRITE, .off = 8192, .len = 50, .pattern = 77 },
		{ .act = ACT_WRITE, .off = 2000, .len = 50, .pattern = 77 },
		{ .act = ACT_ALLOC, .off = 0, .len = 9000 },
		{ .act = ACT_TRUNCATE, .off = 3000 },
		{ .act = ACT_APPEND, .len = 5000, .pattern = 78 },
	};
	struct todo steps[] = {
		{ .act = ACT_WRITE, .len = 4096, .pattern = 3 }, { .act = ACT_FSYNC },
		{ .act = ACT_TRUNCATE, .off = 100 }, ups[below(ARRAY_LEN(ups))],
		{ .act = ACT_WRITE, .file = 1, .off = 0, .len = 10,
		  .pattern = 5 }, { .act = ACT_FSYNC, .file = 1 },
	};

	for (unsigned i = 0; i < ARRAY_LEN(steps); i++)
		if (!perform(files, &steps[i]))
			return false;
	return true;
}

/* Sharing and unsharing: blocks that two files map in one state and one in the next. */
static bool share_script(struct model *files)
{
	struct todo steps[] = {
		{ .act = ACT_WRITE, .file = 0, .len = 5 * BLOCK_SIZE + 123,
		  .pattern = 3 }, { .act = ACT_FSYNC, .file = 0 },
		{ .act = ACT_COPY, .file = 0, .dst = 1, .len = 1 << 17 }, { .act = ACT_FSYNC,
			.file = 1 },
		below(2) ? (struct todo){ .act = ACT_TRUNCATE, .file = 0, .off = below(9000) } :
			   (struct todo){ .act = ACT_PUNCH, .file = 0, .off = 0, .len = 30000 },
		{ .act = ACT_WRITE, .file = 1, .off = below(9000), .len = 1 + below(20000),
		  .pattern = 9 },
		{ .act = ACT_APPEND, .file = 1, .len = 300, .pattern = 12 },
		{ .act = ACT_WRITE, .file = 0, .off = below(9000), .len = 1 + below(20000),
		  .pattern = 10 },
		{ .act = ACT_FSYNC, .file = below(2) },
		{ .act = ACT_WRITE, .file = 1, .off = below(9000), .len = 1 + below(20000),
		  .pattern = 11 },
	};

	for (unsigned i = 0; i < ARRAY_LEN(steps); i++)
		if (!perform(files, &steps[i]))
			return false;
	return true;
}

/* ---- blocks that change places ---- */

#define FEW 4u /* blocks, so that much meets in them */

struct remap {
	enum file_op_kind kind;
	unsigned file, dst;
	uint64_t off, dst_off, len;
};

static struct remap random_remap(void)
{
	static const enum file_op_kind kinds[] = {FILE_EXCHANGE, FILE_EXCHANGE, FILE_COPY, FILE_COLLAPSE, FILE_INSERT};

	return (struct remap){
		.kind = kinds[below(ARRAY_LEN(kinds))],
		.file = (unsigned)below(2), .dst = (unsigned)below(2),
		.off = below(FEW) * BLOCK_SIZE, .dst_off = below(FEW) * BLOCK_SIZE,
		.len = (1 + below(3)) * BLOCK_SIZE,
	};
}

/* false: it would be refused. */
static bool model_remap(struct model *files, const struct remap *m)
{
	struct model *x = &files[m->file], *y = &files[m->dst];
	uint64_t end = m->off + m->len, apart = m->off > m->dst_off ? m->off - m->dst_off : m->dst_off - m->off;
	bool two = m->kind == FILE_EXCHANGE || m->kind == FILE_COPY;

	if (end > x->size || (two && (m->dst_off + m->len > y->size || (x == y && apart < m->len))))
		return false;
	if (m->kind == FILE_EXCHANGE) {
		for (uint64_t i = 0; i < m->len; i++) {
			uint8_t byte = x->bytes[m->off + i];

			x->bytes[m->off + i] = y->bytes[m->dst_off + i];
			y->bytes[m->dst_off + i] = byte;
		}
	} else if (m->kind == FILE_COPY) {
		memcpy(y->bytes + m->dst_off, x->bytes + m->off, m->len);
	} else if (m->kind == FILE_COLLAPSE) {
		if (end == x->size)
			return false;
		memmove(x->bytes + m->off, x->bytes + end, x->size - end);
		x->size -= m->len;
		memset(x->bytes + x->size, 0, m->len);
	} else {
		if (x->size + m->len > MODEL_MAX)
			return false;
		memmove(x->bytes + end, x->bytes + m->off, x->size - m->off);
		memset(x->bytes + m->off, 0, m->len);
		x->size += m->len;
	}
	return true;
}

/* Zeros that a cut may leave move with the blocks: then they are allowed everywhere. */
static void allow_zeros(unsigned file, unsigned other)
{
	bool any = world.file[file]->early_n || world.file[other]->early_n;

	for (unsigned i = 0; i < MODEL_MAX && !any; i++)
		any = histories[file].zeros[i] || histories[other].zeros[i];
	memset(histories[file].zeros, any, MODEL_MAX);
	memset(histories[other].zeros, any, MODEL_MAX);
}

static bool perform_remap(struct model *files)
{
	struct remap m = random_remap();
	int64_t rc;

	if (!model_remap(files, &m))
		return true;
	allow_zeros(m.file, m.dst);
	history_add(&histories[m.file], &files[m.file]);
	if (m.dst != m.file)
		history_add(&histories[m.dst], &files[m.dst]);
	rc = remap(m.kind, m.file, m.off, m.len, m.dst, m.dst_off);
	if (!sim_crashed(world.sim))
		OK(rc);
	return !sim_crashed(world.sim);
}

/* Of whole blocks, which may have been moved. */
static struct todo whole_blocks(void)
{
	static const enum act acts[] = {ACT_WRITE, ACT_WRITE, ACT_WRITE, ACT_ZERO, ACT_ZERO, ACT_PUNCH, ACT_FSYNC};

	return (struct todo){
		.act = acts[below(ARRAY_LEN(acts))], .file = (unsigned)below(2), .pattern = rng() | 1,
		.off = below(FEW) * BLOCK_SIZE, .len = (1 + below(2)) * BLOCK_SIZE,
	};
}

/* Exchanges, clones, shifts, with everything else in between. */
static bool remap_script(struct model *files)
{
	for (unsigned i = 0; i < STEPS; i++) {
		struct todo t = below(4) ? whole_blocks() : random_todo(files);

		if (i < 2)
			t = (struct todo){ .act = ACT_WRITE, .file = i, .len = 2 * FEW * BLOCK_SIZE, .pattern = i + 1 };
		if (i > 2 && below(3) == 0 ? !perform_remap(files) : !perform(files, &t))
			return false;
		if (below(12) == 0)
			commit_what_there_is();
		if (sim_crashed(world.sim))
			return false;
	}
	return true;
}

#ifdef __SANITIZE_THREAD__ /* it takes 20 times as long, and looks for something else */
#define REMAP_CUTS 150u
#else
#define REMAP_CUTS 1500u
#endif

#define DOOMED "doomed"

/* A file of many extents, some of them shared, loses its name, and the reaper takes it apart. */
static bool delete_script(struct model *files)
{
	struct inode *in = NULL, *kept = world.file[2];
	int rc;

	do_write(0, 0, 5000, 3);
	rc = namei_create(world.root, DOOMED, strlen(DOOMED), S_IFREG | 0600, 0, &root_cred, &in);
	if (rc)
		return false;
	world.file[2] = in;
	for (unsigned i = 0; i < 60; i++)
		do_write(2, (uint64_t)i * 2 * BLOCK_SIZE, BLOCK_SIZE, 9);
	do_one(&(struct todo){ .act = ACT_COPY, .file = 2, .dst = 1, .len = 40 * BLOCK_SIZE });
	do_fsync(2);
	world.file[2] = kept;
	inode_put(in);
	namei_unlink(world.root, DOOMED, strlen(DOOMED), NULL);
	reaper_drain(world.fs);
	do_truncate(1, 0);
	do_fsync(0);
	return !sim_crashed(world.sim);
}

/* What was behind EOF does not come back when EOF moves over it. NULL, or what is wrong. */
static const char *grown(unsigned file)
{
	static char text[160];
	uint64_t old, size;
	uint8_t *got;

	io_free(read_all(file, &old));
	OK(do_truncate(file, MODEL_MAX));
	got = read_all(file, &size);

	text[0] = 0;
	for (uint64_t i = old; i < size && !text[0]; i++)
		if (got[i])
			snprintf(text, sizeof(text), "%s: grew from %llu bytes, byte %llu is %#x",
				 name_of(file), (unsigned long long)old, (unsigned long long)i, got[i]);
	io_free(got);
	return text[0] ? text : NULL;
}

/* The script to the cut, the mount after it, the judgement. NULL: as it should be. *whole: the
 * script ended before the cut. */
static const char *one_cut(script_fn script, uint64_t seed, uint64_t cut, unsigned mutant,
			   bool *whole)
{
	struct model *files = calloc(FILES, sizeof(*files));
	const char *wrong = NULL;
	nblocks_t empty = world.free_empty;

	snprintf(where, sizeof(where), "seed %llu, cut %llu", (unsigned long long)seed,
		 (unsigned long long)cut);
	OK(sim_clone(formatted, &world.sim));
	world.opt.mutant = mutant;
	OK(world_open());
	find_files();
	for (unsigned i = 0; i < FILES; i++)
		now_durable(i, &files[i]);
	rng_seed(seed);
	sim_crash_at(world.sim, sim_events(world.sim) + cut);
	*whole = script(files);
	early_run_out();
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sim_restart(world.sim, seed * 1000 + cut);
	world.opt.mutant = MUTANT_NONE;
	OK(world_open());
	find_files();
	for (unsigned i = 0; i < FILES && !wrong && script != delete_script; i++)
		wrong = judge(i);
	for (unsigned i = 0; i < FILES && !wrong && script != delete_script; i++)
		wrong = grown(i);
	namei_unlink(world.root, DOOMED, strlen(DOOMED), NULL);
	if (!wrong) {
		world.free_empty = empty;
		delete_all();
	}
	for (unsigned i = 0; i < FILES; i++)
		history_clear(&histories[i]);
	world_close();
	sim_destroy(world.sim);
	free(files);
	return wrong;
}

static int setup(void **state)
{
	world_new(DEVICE_MIN_BLOCKS * (uint64_t)BLOCK_SIZE, 4096, 1);
	make_files();
	world_close();
	sim_settle(world.sim);
	formatted = world.sim;
	return 0;
}

static int teardown(void **state)
{
	ioctx_destroy(world.ctx);
	sim_destroy(formatted);
	memset(&world, 0, sizeof(world));
	return 0;
}

static unsigned cuts(unsigned normal)
{
	const char *s = getenv("FILE_CUTS");

	return s ? (unsigned)atoi(s) : normal;
}

/* Runs cuts 1, 1 + stride, ... of seeds 1, 2, ... until n cuts have been made; NULL or the first
 * complaint. */
static const char *many_cuts(script_fn script, unsigned n, unsigned stride, unsigned mutant)
{
	uint64_t seed = 1, cut = 1;

	for (unsigned i = 0; i < n; i++) {
		bool whole;
		const char *wrong = one_cut(script, seed, cut, mutant, &whole);

		if (wrong)
			return wrong;
		cut += stride;
		if (whole) {
			seed++;
			cut = 1 + seed % stride;
		}
	}
	return NULL;
}

static void run_script(script_fn script, unsigned n, unsigned stride)
{
	const char *wrong = many_cuts(script, cuts(n), stride, MUTANT_NONE);

	if (wrong)
		fail_msg("%s: %s", where, wrong);
}

static void random_operations_survive_power_cuts(void **state)
{
	run_script(random_script, 200, 7);
}

static void appends_survive_power_cuts(void **state)
{
	run_script(append_script, 200, 3);
}

static void commits_amid_writes_survive_power_cuts(void **state)
{
	run_script(busy_script, 200, 5);
}

static void shared_blocks_survive_power_cuts(void **state)
{
	run_script(share_script, 200, 3);
}

static void cut_tails_survive_power_cuts(void **state)
{
	run_script(shrink_script, 200, 1);
}

static void deletion_cut_anywhere_leaks_nothing(void **state)
{
	run_script(delete_script, 150, 3);
}

static void blocks_that_change_places_survive_power_cuts(void **state)
{
	run_script(remap_script, REMAP_CUTS, 11);
}

static void zeroing_a_tail_too_early_is_caught(void **state)
{
	assert_non_null(many_cuts(shrink_script, 400, 1, MUTANT_TAIL_ZERO_EARLY));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(random_operations_survive_power_cuts, setup,
						teardown),
		cmocka_unit_test_setup_teardown(appends_survive_power_cuts, setup, teardown),
		cmocka_unit_test_setup_teardown(commits_amid_writes_survive_power_cuts, setup, teardown),
		cmocka_unit_test_setup_teardown(shared_blocks_survive_power_cuts, setup, teardown),
		cmocka_unit_test_setup_teardown(cut_tails_survive_power_cuts, setup, teardown),
		cmocka_unit_test_setup_teardown(blocks_that_change_places_survive_power_cuts, setup, teardown),
		cmocka_unit_test_setup_teardown(deletion_cut_anywhere_leaks_nothing, setup,
						teardown),
		cmocka_unit_test_setup_teardown(zeroing_a_tail_too_early_is_caught, setup,
						teardown),
	};

	int failed = cmocka_run_group_tests_name("answered late", tests, NULL, NULL);

	early_memory = 4u << 20;
	return failed + cmocka_run_group_tests_name("answered early", tests, NULL, NULL);
}
