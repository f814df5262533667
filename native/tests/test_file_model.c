/* SPDX-License-Identifier: MIT
 *
 * test_file_model.c - random file operations against a model of plain bytes: one by one, two and three at once,
 * on a full device, with a device that fails. The device starts full of a canary; the model has
 * zeros there, so a comparison with it is also the proof that no old byte is ever seen.
 *
 * FILE_SEEDS=n repeats each test with n seeds; a failure names its seed.
 */
#include "file_fixture.h"

static uint64_t early_writes;

static unsigned seeds(unsigned normal)
{
	const char *s = getenv("FILE_SEEDS");

	return s ? (unsigned)atoi(s) : normal;
}

/* ---- random operations ---------------------------------------------------------------------- */

static void random_operations_agree_with_the_model(void **state)
{
	for (uint64_t seed = 1; seed <= seeds(10); seed++) {
		char when[64];

		begin(64u << 20, seed % 2 ? 512 : 4096, seed);
		sim_shuffle(world.sim, seed % 3);
		for (unsigned i = 0; i < 300; i++) {
			struct todo t = random_todo(files);

			both(&t);
			snprintf(when, sizeof(when), "seed %llu, operation %u, act %d",
				 (unsigned long long)seed, i,
				 t.act);
			if (t.act != ACT_READ) {
				same_as_model(t.file, &files[t.file], when);
				same_as_model(t.dst, &files[t.dst], when);
			}
		}
		compare_all(when);
		early_writes += world.early_done;
		world_close();
		OK(world_open());
		find_files();
		compare_all("after the remount");
		end();
	}
	assert_true(early_memory ? early_writes > 20 * seeds(10) : early_writes == 0);
}

/* ---- several at once ------------------------------------------------------------------------ */

#define ORDERS 6u /* of AT_ONCE_MAX */
#define AT_ONCE_MAX 3u

/* What one order of the operations comes to. */
struct order {
	unsigned turn[AT_ONCE_MAX];       /* who comes first, second, ... */
	struct model after[FILES];
	struct model source[AT_ONCE_MAX]; /* its file, when the operation's turn has come */
	int64_t result[AT_ONCE_MAX];
};

static void order_do(struct order *o, const struct todo *t, unsigned n)
{
	memcpy(o->after, files, sizeof(o->after));
	for (unsigned i = 0; i < n; i++) {
		unsigned k = o->turn[i];

		o->source[k] = o->after[t[k].file];
		o->result[k] = model_do(o->after, &t[k]);
	}
}

static const uint8_t permutations[ORDERS][AT_ONCE_MAX] = {
	{ 0, 1, 2 }, { 1, 0, 2 }, { 0, 2, 1 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 },
};

static struct order *orders_of(const struct todo *t, unsigned n)
{
	unsigned count = n == 2 ? 2 : ORDERS;
	struct order *orders = calloc(count, sizeof(*orders));

	assert_non_null(orders);
	for (unsigned o = 0; o < count; o++) {
		for (unsigned i = 0; i < n; i++)
			orders[o].turn[i] = permutations[o][i];
		order_do(&orders[o], t, n);
	}
	return orders;
}

/* What there is. */
struct found {
	uint64_t size[FILES];
	uint8_t *bytes[FILES];
};

static bool same_file(const struct found *got, const struct order *o, unsigned file)
{
	const struct model *m = &o->after[file];

	return got->size[file] == m->size && memcmp(got->bytes[file], m->bytes, m->size) == 0;
}

static bool read_that(const struct flight *f, const struct order *o, unsigned k)
{
	return f->todo.act != ACT_READ || f->fop.result <= 0 ||
	       memcmp(f->fop.buf, o->source[k].bytes + f->todo.off, (size_t)f->fop.result) == 0;
}

static bool is_the_order(const struct found *got, const struct flight *f, unsigned n, const struct order *o)
{
	for (unsigned i = 0; i < FILES; i++)
		if (!same_file(got, o, i))
			return false;
	for (unsigned k = 0; k < n; k++)
		if (f[k].fop.result != o->result[k] || !read_that(&f[k], o, k))
			return false;
	return true;
}

static bool is_write(const struct todo *t)
{
	return t->act == ACT_WRITE || t->act == ACT_APPEND;
}

/* Does `t` read beside writes? */
static bool reads_beside(const struct todo *t)
{
	return t->act == ACT_READ ||
	       (t->act == ACT_COPY && t->file != t->dst && ((t->off ^ t->dst_off) & BLOCK_MASK));
}

static bool mixed(const uint8_t *got, const uint8_t *before, const uint8_t *after, uint64_t len)
{
	for (uint64_t i = 0; i < len; i++)
		if (got[i] != before[i] && got[i] != after[i])
			return false;
	return true;
}

/* file.h, "At the same time", of a reader k that goes beside one write: it found EOF where it was, and each byte
 * below it as it was or as it is. EOF moved means all bytes, which is one of the orders. */
static bool is_beside(const struct found *got, const struct flight *f, unsigned k, const struct order *first,
		      const struct order *last)
{
	const struct todo *t = &f[k].todo;
	const struct model *before = &first->source[k], *after = &last->source[k];
	uint64_t len = (uint64_t)first->result[k];

	if (!reads_beside(t) || !is_write(&f[!k].todo) || f[!k].todo.file != t->file ||
	    f[k].fop.result != first->result[k] || f[!k].fop.result != first->result[!k])
		return false;
	for (unsigned i = 0; i < FILES; i++)
		if (!(t->act == ACT_COPY && i == t->dst) && !same_file(got, first, i))
			return false;
	if (t->act == ACT_READ)
		return mixed(f[k].fop.buf, before->bytes + t->off, after->bytes + t->off, len);
	if (got->size[t->dst] != first->after[t->dst].size)
		return false;
	for (uint64_t i = 0; i < got->size[t->dst]; i++) {
		bool copied = i >= t->dst_off && i < t->dst_off + len;

		if (got->bytes[t->dst][i] != first->after[t->dst].bytes[i] &&
		    !(copied && got->bytes[t->dst][i] == after->bytes[t->off + (i - t->dst_off)]))
			return false;
	}
	return true;
}

static void explain(const struct found *got, const struct flight *f, unsigned n, const struct order *orders,
		    unsigned count)
{
	for (unsigned i = 0; i < n; i++) {
		const struct todo *t = &f[i].todo;

		print_error("act %d file %u dst %u off %llu len %llu dst_off %llu: %lld%s\n", t->act, t->file,
			    t->dst, (unsigned long long)t->off, (unsigned long long)t->len,
			    (unsigned long long)t->dst_off, (long long)f[i].fop.result,
			    f[i].fop.early ? ", early" : "");
	}
	for (unsigned o = 0; o < count; o++) {
		for (unsigned i = 0; i < n; i++)
			print_error("order %u: act %d: %lld%s\n", o, f[orders[o].turn[i]].todo.act,
				    (long long)orders[o].result[orders[o].turn[i]],
				    read_that(&f[orders[o].turn[i]], &orders[o], orders[o].turn[i]) ? "" :
				    ", other bytes");
		for (unsigned i = 0; i < FILES; i++) {
			const struct model *m = &orders[o].after[i];
			uint64_t at;

			for (at = 0; at < MIN(got->size[i], m->size) && got->bytes[i][at] == m->bytes[at]; at++)
				;
			print_error("  file %u: was %llu, is %llu, not %llu, same to %llu\n", i,
				    (unsigned long long)files[i].size, (unsigned long long)got->size[i],
				    (unsigned long long)m->size, (unsigned long long)at);
		}
	}
}

/* The files go on as they are. */
static void check_orders(const struct flight *f, unsigned n, uint64_t seed)
{
	struct todo t[AT_ONCE_MAX];
	struct order *orders;
	struct found got;
	unsigned count = n == 2 ? 2 : ORDERS;
	bool fits = false;

	for (unsigned i = 0; i < n; i++)
		t[i] = f[i].todo;
	orders = orders_of(t, n);
	for (unsigned i = 0; i < FILES; i++)
		got.bytes[i] = read_all(i, &got.size[i]);
	for (unsigned o = 0; o < count && !fits; o++)
		fits = is_the_order(&got, f, n, &orders[o]);
	for (unsigned k = 0; n == 2 && k < 2 && !fits; k++)
		fits = is_beside(&got, f, k, &orders[k], &orders[!k]);
	if (!fits) {
		explain(&got, f, n, orders, count);
		fail_msg("seed %llu: acts %d, %d, ... at once have the effect of no order", (unsigned long long)seed,
			 t[0].act, t[1].act);
	}
	for (unsigned i = 0; i < FILES; i++) {
		memcpy(files[i].bytes, got.bytes[i], got.size[i]);
		files[i].size = got.size[i];
		io_free(got.bytes[i]);
	}
	free(orders);
}

static void run_at_once(const struct todo *t, unsigned n, uint64_t seed)
{
	struct flight f[AT_ONCE_MAX];

	for (unsigned i = 0; i < n; i++)
		flight_start(&f[i], &t[i]);
	for (unsigned i = 0; i < n; i++)
		flight_wait(&f[i]);
	for (unsigned i = 0; i < n; i++)
		if (f[i].fop.result < 0)
			fail_msg("seed %llu, act %d: %s", (unsigned long long)seed, t[i].act,
				 err_name((int)f[i].fop.result));
	check_orders(f, n, seed);
	for (unsigned i = 0; i < n; i++)
		flight_end(&f[i]);
}

/* Likely to overlap t. */
static void move_onto(struct todo *other, const struct todo *t)
{
	other->file = t->file;
	other->off = t->off + below(4096);
	if (other->act == ACT_COPY && other->file == other->dst)
		other->act = ACT_READ;
}

static void keep_small(struct todo *t)
{
	if (t->act == ACT_APPEND && files[t->file].size > MODEL_MAX / 4)
		t->act = ACT_PUNCH;
}

/* Two operations at once have the effect of one after the other, or what file.h allows instead. */
static void pair_is_serial(uint64_t seed)
{
	struct todo t[2];

	t[0] = random_todo(files);
	t[1] = random_todo(files);
	if (below(2))
		move_onto(&t[1], &t[0]);
	for (unsigned i = 0; i < 2; i++)
		keep_small(&t[i]);
	run_at_once(t, 2, seed);
}

/* Three, of which none reads beside another's writes. */
static void three_are_serial(uint64_t seed)
{
	struct todo t[3];

	for (unsigned i = 0; i < 3; i++) {
		t[i] = random_todo(files);
		if (i && below(2))
			move_onto(&t[i], &t[i - 1]);
		keep_small(&t[i]);
		if (t[i].act == ACT_COPY && reads_beside(&t[i])) {
			t[i].off &= ~BLOCK_MASK;
			t[i].dst_off &= ~BLOCK_MASK;
		}
		if (t[i].act == ACT_READ)
			t[i].act = ACT_FSYNC;
	}
	run_at_once(t, 3, seed);
}

static void two_at_once_are_one_after_the_other(void **state)
{
	for (uint64_t seed = 1; seed <= seeds(8); seed++) {
		begin(64u << 20, seed % 2 ? 512 : 4096, 1000 + seed);
		sim_shuffle(world.sim, true);
		for (unsigned i = 0; i < 150; i++)
			pair_is_serial(seed);
		end();
	}
}

static void three_at_once_are_one_after_the_other(void **state)
{
	for (uint64_t seed = 1; seed <= seeds(8); seed++) {
		begin(64u << 20, seed % 2 ? 512 : 4096, 2000 + seed);
		sim_shuffle(world.sim, true);
		for (unsigned i = 0; i < 100; i++)
			three_are_serial(seed);
		end();
	}
}

/* ---- when something fails ---------------------------------------------------------------- */

/* After a failure each byte is the old or the new one; the model goes on with what is there. */
static void adopt(unsigned file, const struct model *before)
{
	struct model *now = &files[file];
	uint64_t size;
	uint8_t *got = read_all(file, &size);

	assert_true(size >= MIN(before->size, now->size) && size <= MAX(before->size, now->size));
	for (uint64_t i = 0; i < size; i++)
		if (got[i] != (i < before->size ? before->bytes[i] : 0) &&
		    got[i] != (i < now->size ? now->bytes[i] : 0))
			fail_msg("byte %llu of %s is %#x", (unsigned long long)i, name_of(file),
				 got[i]);
	memcpy(now->bytes, got, size);
	now->size = size;
	io_free(got);
}

static void random_operations_on_a_full_device(void **state)
{
	unsigned refused = 0;

	for (uint64_t seed = 1; seed <= seeds(4); seed++) {
		struct model *before = malloc(FILES * sizeof(*before));
		struct inode *in;
		struct alloc_space sp;
		struct file_op fop;

		begin(DEVICE_MIN_BLOCKS * (uint64_t)BLOCK_SIZE, 4096, 500 + seed);
		OK(namei_create(world.root, "ballast", 7, S_IFREG | 0600, 0, &root_cred, &in));
		alloc_statfs(world.fs, &sp);
		file_op_init(&fop, FILE_FALLOCATE, in, NULL);
		fop.len = (sp.avail - 50) << BLOCK_SHIFT;
		assert_int_equal(file_run_blocking(&fop), 0);
		for (unsigned i = 0; i < 300; i++) {
			struct todo t = random_todo(files);
			unsigned changed = t.act == ACT_COPY ? t.dst : t.file;
			int64_t want, got;

			memcpy(before, files, FILES * sizeof(*before));
			want = model_do(files, &t);
			got = do_one(&t);
			if (got == want) {
				same_as_model(changed, &files[changed], "full");
				continue;
			}
			if (got < 0 && got != -ENOSPC)
				fail_msg("act %d: %s", t.act, err_name((int)got));
			refused++;
			adopt(changed, &before[changed]);
		}
		compare_all("full");
		free(before);
		inode_put(in);
		OK(namei_unlink(world.root, "ballast", 7, NULL));
		end();
	}
	assert_true(refused > 20);
}

/* The filesystem has turned read-only; everybody leaves. */
static void end_shut_down(void)
{
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	world_end();
	free(files);
}

/* Nearly all errors hit data; one that hits a checkpoint shuts the filesystem down, which ends the
 * round: reads still show nothing that was not written. */
static void random_operations_with_device_errors(void **state)
{
	unsigned failed = 0;

	for (uint64_t seed = 1; seed <= seeds(6); seed++) {
		struct model *before = malloc(FILES * sizeof(*before));

		begin(64u << 20, 4096, 700 + seed);
		for (unsigned i = 0; i < 200; i++) {
			struct todo t = random_todo(files);
			unsigned changed = t.act == ACT_COPY ? t.dst : t.file;
			bool faulty = below(3) == 0 && t.act != ACT_FSYNC;
			uint32_t lost = early_errors(world.file[changed]);
			int64_t want, got;

			t.dsync = false;
			memcpy(before, files, FILES * sizeof(*before));
			want = model_do(files, &t);
			if (faulty)
				sim_fail(world.sim, below(3) ? IO_WRITE : IO_READ, BEHIND_LOG, UINT32_MAX, 1);
			got = do_one(&t);
			early_run_out();
			lost = early_errors(world.file[changed]) - lost;
			sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 0);
			sim_fail(world.sim, IO_READ, BEHIND_LOG, UINT32_MAX, 0);
			if (got == want && !lost) {
				same_as_model(changed, &files[changed], "sound");
				continue;
			}
			if (fs_is_shutdown(world.fs)) {
				if (t.act != ACT_READ)
					adopt(changed, &before[changed]);
				break;
			}
			if (!faulty || (got < 0 && !lost && got != -ERR_DEV_WRITE && got != -ERR_DEV_READ))
				fail_msg("seed %llu, act %d: %lld", (unsigned long long)seed, t.act,
					 (long long)got);
			failed++;
			if (t.act != ACT_READ)
				adopt(changed, &before[changed]);
		}
		compare_all("after all errors");
		free(before);
		if (fs_is_shutdown(world.fs))
			end_shut_down();
		else
			end();
	}
	assert_true(failed > 50);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(random_operations_agree_with_the_model),
		cmocka_unit_test(two_at_once_are_one_after_the_other),
		cmocka_unit_test(three_at_once_are_one_after_the_other),
		cmocka_unit_test(random_operations_on_a_full_device),
		cmocka_unit_test(random_operations_with_device_errors),
	};

	int failed = cmocka_run_group_tests_name("answered late", tests, NULL, NULL);

	early_memory = 4u << 20;
	return failed + cmocka_run_group_tests_name("answered early", tests, NULL, NULL);
}
