/* SPDX-License-Identifier: MIT
 *
 * test_image_fuzz.c - images that lie: metadata with correct checksums and wrong contents must end
 * in errors, never in a crash or a loop. Each image is used in a process of its own, because an
 * assertion that fails, or a loop, is what is looked for.
 *
 * EXTFS_FUZZ_SEED and EXTFS_FUZZ_COUNT choose other images.
 */
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dir.h"
#include "file_fixture.h"

#define DEVICE_BYTES (48u << 20)
#define SECONDS 10u /* an image takes milliseconds */

/* ---- the image ------------------------------------------------------------------------------ */

static int64_t do_copy(unsigned src, unsigned dst, uint64_t off, uint64_t dst_off, uint64_t len)
{
	return do_one(&(struct todo){ .act = ACT_COPY, .file = src, .dst = dst, .off = off,
				      .dst_off = dst_off, .len = len });
}

/* As world_new(), but with the same names' hashes each time: a seed names an image. */
static void new_world(void)
{
	static const uint8_t uuid[FORMAT_UUID_LEN] = "image that lies";
	struct mkfs_options mk = { .journal_blocks = JOURNAL_MIN_BLOCKS, .uuid = uuid,
				   .now_sec = 1 };
	struct device *dev;

	world.opt = (struct fs_options){ .no_heartbeat = true, .commit_ms = 3600 * 1000 };
	OK(sim_create(DEVICE_BYTES, 512, 3, &world.sim));
	OK(sim_device(world.sim, &dev));
	OK(fs_mkfs(dev, &mk));
	dev_close(dev);
	sim_settle(world.sim);
	OK(ioctx_create(64, &world.ctx));
	OK(world_open());
}

static void fill(void)
{
	static uint8_t value[5000];
	struct inode *dir, *in;
	char name[32];

	make_files();
	for (unsigned i = 0; i < 60; i++)
		OK(do_write(0, (uint64_t)i * 2 * BLOCK_SIZE, BLOCK_SIZE, i + 1));
	OK(do_copy(0, 1, 0, 0, 40 * BLOCK_SIZE));
	OK(do_write(1, 8 * BLOCK_SIZE, BLOCK_SIZE, 99));
	OK(do_write(2, 100, 5000, 98));
	OK(xattr_set(world.file[0], "user.long", value, sizeof(value), 0));
	OK(xattr_set(world.file[2], "user.short", "x", 1, 0));
	OK(namei_mkdir(world.root, "dir", 3, 0755, &root_cred, &dir));
	for (unsigned i = 0; i < 150; i++) {
		snprintf(name, sizeof(name), "entry%u", i);
		OK(namei_create(dir, name, strlen(name), S_IFREG | 0644, 0, &root_cred, &in));
		inode_put(in);
	}
	OK(namei_mkdir(dir, "sub", 3, 0755, &root_cred, &in));
	inode_put(in);
	OK(namei_symlink(world.root, "link", 4, name, strlen(name), &root_cred, &in));
	inode_put(in);
	inode_put(dir);
	/* An orphan that is left behind: the mount has something to reap. */
	OK(namei_create(world.root, "gone", 4, S_IFREG | 0644, 0, &root_cred, &in));
	inode_lookup_add(world.fs, in->ino, 1);
	OK(namei_unlink(world.root, "gone", 4, NULL));
	inode_put(in);
}

/* ---- lying ---------------------------------------------------------------------------------- */

static struct sim *template;
static fsblock_t places[512];
static unsigned nplaces;

static void find_metadata(void)
{
	uint8_t *block = io_alloc(BLOCK_SIZE);
	const struct meta_hdr *h = (void *)block;

	for (fsblock_t b = ROOT_BLOCK;
	     b < DEVICE_BYTES >> BLOCK_SHIFT && nplaces < ARRAY_LEN(places); b++) {
		if (b == SUPER_COPY_BLOCK)
			b = JOURNAL_START_BLOCK + JOURNAL_MIN_BLOCKS;
		OK(sim_peek(template, b << BLOCK_SHIFT, block, BLOCK_SIZE));
		if ((get32(h->magic) == MAGIC_ROOT || get32(h->magic) == MAGIC_AG ||
		     get32(h->magic) == MAGIC_NODE) && get64(h->block) == b)
			places[nplaces++] = b;
	}
	io_free(block);
	assert_true(nplaces > 12);
}

static uint64_t odd_value(const uint8_t *block)
{
	uint64_t other;

	switch (below(10)) {
	case 0:
		return 0;
	case 1:
		return below(4);
	case 2:
		return UINT64_MAX - below(3);
	case 3:
		return 1ull << below(64);
	case 4:
	case 5:
		return places[below(nplaces)];
	case 6:
		return below(DEVICE_BYTES >> BLOCK_SHIFT);
	case 7:
		return rng();
	default: /* what stands elsewhere in the block, or nearly */
		memcpy(&other, block + 48 + below((BLOCK_SIZE - 56) / 8) * 8, 8);
		return other + below(3) - 1;
	}
}

/* Most of a block is not in use: half of the lies go where something is. */
static unsigned odd_place(const uint8_t *block)
{
	uint64_t word;
	unsigned at;

	for (unsigned i = 0; i < 100; i++) {
		at = 48 + (unsigned)below((BLOCK_SIZE - 48) / 4) * 4;
		memcpy(&word, block + (at & ~7u), 8);
		if (word)
			return at;
	}
	return 48 + (unsigned)below(16);
}

static void lie(struct sim *sim)
{
	uint8_t *block = io_alloc(BLOCK_SIZE);
	unsigned lies = 1 + (unsigned)below(3);

	while (lies--) {
		fsblock_t b = places[below(nplaces)];
		unsigned width = 1u << below(4), at;
		uint64_t value;

		OK(sim_peek(sim, b << BLOCK_SHIFT, block, BLOCK_SIZE));
		at = below(2) ? odd_place(block) : 48 + (unsigned)below(400);
		at = MIN(at, BLOCK_SIZE - 8);
		value = odd_value(block);
		if (width == 8)
			at &= ~7u;
		memcpy(block + at, &value, width);
		meta_seal(block, get64(((struct meta_hdr *)block)->lsn));
		OK(sim_poke(sim, b << BLOCK_SHIFT, block, BLOCK_SIZE));
	}
	io_free(block);
}

/* ---- using it, whatever it says ------------------------------------------------------------- */

static int count_entry(void *arg, const struct dirent_view *ent)
{
	return ++*(unsigned *)arg > 100000;
}

static void use_file(struct inode *in)
{
	static uint8_t value[XATTR_VALUE_MAX];
	struct inode_stat st;

	for (unsigned f = 0; f < FILES; f++)
		if (!world.file[f])
			return;
	namei_stat(in, &st);
	file_seek(in, 0, 3);
	file_seek(in, 0, 4);
	xattr_list(in, (char *)value, sizeof(value));
	xattr_get(in, "user.long", value, sizeof(value));
	xattr_set(in, "user.long", value, below(9000), 0);
	xattr_set(in, "user.new", value, 3, 0);
	xattr_remove(in, "user.short");
}

static void use_data(void)
{
	for (unsigned i = 0; i < 24; i++) {
		struct todo t = { .act = (enum act)below(ACTS), .file = below(FILES),
				  .dst = below(FILES), .off = below(60) * 2048,
				  .len = 1 + below(100000), .dst_off = below(30) * BLOCK_SIZE,
				  .pattern = 77 };
		struct inode *in = world.file[t.file];

		if (!in || !world.file[t.dst])
			continue;
		if (t.act == ACT_COPY && below(2))
			t.off &= ~BLOCK_MASK;
		do_one(&t);
	}
}

static void use_names(void)
{
	struct inode *dir = NULL, *in;
	char name[32], buf[4200];
	unsigned entries = 0;

	namei_lookup(world.root, "dir", 3, &dir);
	if (!namei_lookup(world.root, "link", 4, &in)) {
		namei_readlink(in, buf, sizeof(buf));
		inode_put(in);
	}
	fs_rdlock(world.fs);
	dir_iterate(dir ? dir : world.root, 0, count_entry, &entries);
	fs_unlock(world.fs);
	for (unsigned i = 0; i < 40 && dir; i++) {
		snprintf(name, sizeof(name), "entry%u", (unsigned)below(160));
		switch (below(5)) {
		case 0:
			namei_unlink(dir, name, strlen(name), NULL);
			break;
		case 1:
			namei_rename(dir, name, strlen(name), world.root, "moved", 5, 0, NULL);
			break;
		case 2:
			namei_rename(world.root, "moved", 5, dir, name, strlen(name), 0, NULL);
			break;
		case 3:
			if (!namei_lookup(dir, name, strlen(name), &in)) {
				inode_lookup_add(world.fs, in->ino, 1);
				namei_link(in, dir, "linked", 6);
				inode_lookup_forget(world.fs, in->ino, 1);
				inode_put(in);
			}
			break;
		default:
			if (!namei_create(dir, name, strlen(name), S_IFREG | 0644, 0, &root_cred,
					  &in)) {
				inode_lookup_add(world.fs, in->ino, 1);
				inode_lookup_forget(world.fs, in->ino, 1);
				inode_put(in);
			}
		}
	}
	if (dir) {
		namei_rename(world.root, "dir", 3, dir, "below", 5, 0, NULL);
		namei_rmdir(dir, "sub", 3, NULL);
		namei_rmdir(world.root, "dir", 3, NULL);
		inode_put(dir);
	}
}

static void use_image(uint64_t seed)
{
	struct rlimit no_core = { 0, 0 };

	setrlimit(RLIMIT_CORE, &no_core);
	alarm(SECONDS);
	rng_seed(seed);
	OK(sim_clone(template, &world.sim));
	lie(world.sim);
	world.opt = (struct fs_options){ .no_heartbeat = true, .commit_ms = 3600 * 1000 };
	OK(ioctx_create(64, &world.ctx));
	if (world_open())
		_exit(0);
	for (unsigned i = 0; i < FILES; i++)
		namei_lookup(world.root, name_of(i), strlen(name_of(i)), &world.file[i]);
	for (unsigned round = 0; round < 2; round++) {
		use_data();
		for (unsigned i = 0; i < FILES; i++)
			if (world.file[i])
				use_file(world.file[i]);
		use_names();
		jrn_force_blocking(world.fs, jrn_running(world.fs));
	}
	put_files();
	for (unsigned i = 0; i < FILES; i++)
		namei_unlink(world.root, name_of(i), strlen(name_of(i)), NULL);
	reaper_drain(world.fs);
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	fs_close(world.fs);
	_exit(0);
}

static uint64_t number(const char *name, uint64_t otherwise)
{
	const char *text = getenv(name);

	return text ? strtoull(text, NULL, 0) : otherwise;
}

static void lying_images_do_no_harm(void **state)
{
	uint64_t first = number("EXTFS_FUZZ_SEED", 1), n = number("EXTFS_FUZZ_COUNT", 400);
	unsigned failed = 0;

	new_world();
	fill();
	put_files();
	inode_put(world.root);
	/* Without forgetting: the orphan stays. */
	OK(fs_close(world.fs));
	OK(sim_clone(world.sim, &template));
	find_metadata();
	for (uint64_t seed = first; seed < first + n; seed++) {
		pid_t pid = fork();
		int status;

		assert_true(pid >= 0);
		if (!pid)
			use_image(seed);
		assert_int_equal(waitpid(pid, &status, 0), pid);
		if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
			continue;
		print_message("seed %llu: %s %d\n", (unsigned long long)seed,
			      WIFSIGNALED(status) ? "signal" : "status",
			      WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
		failed++;
	}
	sim_destroy(template);
	world_end();
	assert_int_equal(failed, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(lying_images_do_no_harm),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
