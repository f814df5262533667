/* SPDX-License-Identifier: MIT
 *
 * test_no_alloc.c - reading, writing and fsyncing what is mapped and cached allocates no memory, once pools are warm.
 *
 * malloc() and its kin are counted while `counting` is set in the calling thread. An image on the disk, since the
 * simulated device allocates for each write.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "file.h"
#include "journal.h"
#include "log.h"
#include "namei.h"

static __thread unsigned counting, counted;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS false /* malloc() is the sanitizer's */
#else
#define COUNTS true

void *__libc_malloc(size_t len);
void *__libc_calloc(size_t n, size_t len);
void *__libc_realloc(void *p, size_t len);
void *__libc_memalign(size_t align, size_t len);

__attribute__((visibility("default"))) void *malloc(size_t len)
{
	counted += counting;
	return __libc_malloc(len);
}

__attribute__((visibility("default"))) void *calloc(size_t n, size_t len)
{
	counted += counting;
	return __libc_calloc(n, len);
}

__attribute__((visibility("default"))) void *realloc(void *p, size_t len)
{
	counted += counting;
	return __libc_realloc(p, len);
}

__attribute__((visibility("default"))) void *aligned_alloc(size_t align, size_t len)
{
	counted += counting;
	return __libc_memalign(align, len);
}

__attribute__((visibility("default"))) int posix_memalign(void **p, size_t align, size_t len)
{
	counted += counting;
	*p = __libc_memalign(align, len);
	return *p ? 0 : ENOMEM;
}
#endif

#define FILE_BYTES (8u << 20)
#define OK(call) assert_true((call) >= 0)

static struct fs *fs;
static struct inode *root, *file;
static char *memory;
static uint64_t rng = 88172645463325252u;

static uint64_t below(uint64_t n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng % n;
}

static void run(enum file_op_kind kind, uint64_t offset, uint64_t len, unsigned skew, int64_t result)
{
	struct file_op fop;

	file_op_init(&fop, kind, file, ioctx_of_thread());
	fop.offset = offset;
	fop.len = len;
	fop.buf = memory + skew;
	assert_int_equal(file_run_blocking(&fop), result);
}

static int set_up(void **state)
{
	struct mkfs_options mk = {.journal_blocks = JOURNAL_MIN_BLOCKS};
	struct fs_options opt = {.no_heartbeat = true, .commit_ms = 3600 * 1000};
	char path[] = "/var/tmp/extfs-no-alloc-XXXXXX";
	const struct cred cred = {0, 0, 0};
	struct device *dev;
	int fd = mkstemp(path);

	assert_true(fd >= 0);
	OK(ftruncate(fd, 256 << 20));
	close(fd);
	OK(dev_open(path, 0, &dev));
	unlink(path);
	OK(fs_mkfs(dev, &mk));
	OK(fs_open(dev, &opt, &fs));
	OK(inode_get_handle(fs, 1, 1, &root));
	OK(namei_create(root, "file", 4, S_IFREG | 0644, 0, &cred, &file));
	memory = io_alloc((1 << 20) + 4096);
	memset(memory, 7, (1 << 20) + 4096);
	for (uint64_t at = 0; at < FILE_BYTES; at += 1 << 20)
		run(FILE_WRITE, at, 1 << 20, 0, 1 << 20);
	run(FILE_FSYNC, 0, 0, 0, 0);
	return 0;
}

static int tear_down(void **state)
{
	inode_put(file);
	inode_put(root);
	inode_lookup_forget_all(fs);
	OK(fs_close(fs));
	io_free(memory);
	return 0;
}

/* Aligned and not, long and short, with fsyncs in between. */
static void some_operations(unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		uint64_t len = below(8) ? 4096 : 128 << 10, at = below((FILE_BYTES - len) / 4096) * 4096;
		unsigned skew = below(4) ? 0 : 512 + (unsigned)below(100);

		run(below(2) ? FILE_READ : FILE_WRITE, at + skew, len, skew, (int64_t)len);
		if (below(10) == 0)
			run(FILE_FSYNC, 0, 0, 0, 0);
	}
}

static void reads_and_writes_allocate_nothing(void **state)
{
	if (!COUNTS) {
		print_message("not counted: the sanitizer has malloc() to itself\n");
		skip();
	}
	counting = 1;
	io_free(io_alloc(4096));
	assert_int_equal(counted, 1); /* or nothing is counted at all */
	counting = counted = 0;
	some_operations(200);
	counting = 1;
	some_operations(1000);
	counting = 0;
	assert_int_equal(counted, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads_and_writes_allocate_nothing),
	};

	return cmocka_run_group_tests(tests, set_up, tear_down);
}
