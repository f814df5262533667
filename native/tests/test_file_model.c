/* SPDX-License-Identifier: MIT
 *
 * test_file_model.c - random file operations against a model of plain bytes: one by one, two at once,
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

static bool agrees(unsigned file, const struct model *m)
{
	uint64_t size;
	uint8_t *got = read_all(file, &size);
	bool same = size == m->size && memcmp(got, m->bytes, size) == 0;

	io_free(got);
	return same;
}

static void explain(const struct todo *t, struct model **orders)
{
	for (unsigned i = 0; i < 2; i++)
		print_error("act %d file %u dst %u off %llu len %llu dst_off %llu\n", t[i].act,
			    t[i].file, t[i].dst,
			    (unsigned long long)t[i].off, (unsigned long long)t[i].len,
			    (unsigned long long)t[i].dst_off);
	for (unsigned i = 0; i < FILES; i++) {
		uint64_t size, n;
		uint8_t *got = read_all(i, &size);

		for (unsigned o = 0; o < 2; o++) {
			for (n = 0; n < MIN(size, orders[o][i].size) &&
			     got[n] == orders[o][i].bytes[n]; n++)
				;
			print_error("file %u: was %llu, is %llu; order %u: %llu, same to %llu\n", i,
				    (unsigned long long)files[i].size, (unsigned long long)size, o,
				    (unsigned long long)orders[o][i].size, (unsigned long long)n);
		}
		io_free(got);
	}
}

/* Two operations at once have the effect of one after the other. */
static void pair_is_serial(uint64_t seed)
{
	struct model *orders[2];
	struct flight f[2];
	struct todo t[2];
	bool fits = false;

	t[0] = random_todo(files);
	t[1] = random_todo(files);
	if (below(2)) { /* likely to overlap */
		t[1].file = t[0].file;
		t[1].off = t[0].off + below(4096);
	}
	if (t[1].act == ACT_COPY && t[1].file == t[1].dst)
		t[1].act = ACT_READ;
	for (unsigned i = 0; i < 2; i++)
		if (t[i].act == ACT_APPEND && files[t[i].file].size > MODEL_MAX / 4)
			t[i].act = ACT_PUNCH;
	for (unsigned o = 0; o < 2; o++) {
		orders[o] = malloc(FILES * sizeof(**orders));
		memcpy(orders[o], files, FILES * sizeof(*files));
		model_do(orders[o], &t[o]);
		model_do(orders[o], &t[!o]);
	}
	flight_start(&f[0], &t[0]);
	flight_start(&f[1], &t[1]);
	flight_wait(&f[0]);
	flight_wait(&f[1]);
	for (unsigned i = 0; i < 2; i++) {
		if (f[i].fop.result < 0)
			fail_msg("seed %llu, act %d: %s", (unsigned long long)seed, t[i].act,
				 err_name((int)f[i].fop.result));
		flight_end(&f[i]);
	}
	for (unsigned o = 0; o < 2 && !fits; o++) {
		fits = true;
		for (unsigned i = 0; i < FILES; i++)
			fits = fits && agrees(i, &orders[o][i]);
		if (fits)
			memcpy(files, orders[o], FILES * sizeof(*files));
	}
	if (!fits)
		explain(t, orders);
	if (!fits)
		fail_msg("seed %llu: acts %d and %d at once have the effect of neither order",
			 (unsigned long long)seed, t[0].act, t[1].act);
	free(orders[0]);
	free(orders[1]);
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
		cmocka_unit_test(random_operations_on_a_full_device),
		cmocka_unit_test(random_operations_with_device_errors),
	};

	int failed = cmocka_run_group_tests_name("answered late", tests, NULL, NULL);

	early_memory = 4u << 20;
	return failed + cmocka_run_group_tests_name("answered early", tests, NULL, NULL);
}
