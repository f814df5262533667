/* SPDX-License-Identifier: MIT
 *
 * test_ioctx_fixed.c - I/O of memory that is fixed goes to the pages that were there when it was fixed, any
 * other to those that are there now: so the tests put other pages under an address, and look which were read into.
 */
#include "device_fixture.h"

#include <sys/mman.h>

#include "ioctx.h"

#define BUFFERS 300u /* more than there are slots */
#define STRIDE (2 * IOCTX_FIXED_BYTES)

static struct device *device;
static struct ioctx *context;
static uint8_t *memory;
static unsigned completions;

static void completed(struct dev_io *io)
{
	assert_int_equal(io->res, 0);
	completions++;
}

static void move(enum io_kind kind, uint64_t offset, void *buf, size_t len)
{
	struct dev_io io = {.kind = kind, .offset = offset, .buf = buf, .len = len, .done = completed};

	completions = 0;
	dev_submit(device, context, &io);
	while (!completions)
		assert_true(ioctx_run(context, true) >= 0);
}

static void renew(uint8_t *at, size_t len)
{
	assert_ptr_equal(mmap(at, len, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), at);
}

static int begin(void **state)
{
	uint8_t *block = io_alloc(BLOCK_SIZE);

	if (set_up(state))
		return -1;
	device = open_device(image, 0);
	for (unsigned i = 0; i < BLOCKS; i++) {
		memset(block, (int)(i % 255 + 1), BLOCK_SIZE);
		assert_int_equal(dev_write(device, i * BLOCK_SIZE, block, BLOCK_SIZE, 0), 0);
	}
	io_free(block);
	assert_int_equal(ioctx_create(8, &context), 0);
	memory = mmap(NULL, BUFFERS * STRIDE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	assert_ptr_not_equal(memory, MAP_FAILED);
	return 0;
}

static int end(void **state)
{
	ioctx_destroy(context);
	munmap(memory, BUFFERS * STRIDE);
	dev_close(device);
	return tear_down(state);
}

/* Of this thread, to which the ring then belongs. */
static void need_ring(void)
{
	if (!ioctx_ring(context))
		skip();
	ioctx_fix_device(context, device);
}

static void what_is_fixed_is_used_until_it_is_let_go(void **state)
{
	need_ring();
	assert_true(ioctx_fix(context, memory));
	for (unsigned i = 0; i < IOCTX_FIXED_BYTES / BLOCK_SIZE; i++) {
		uint8_t *at = memory + i * BLOCK_SIZE;

		renew(at, BLOCK_SIZE);
		move(IO_READ, i * BLOCK_SIZE, at, BLOCK_SIZE);
		assert_int_equal(at[0], 0);
	}
	ioctx_unfix(context, memory);
	move(IO_READ, BLOCK_SIZE, memory, BLOCK_SIZE);
	assert_int_equal(memory[0], 2);
	/* And again, with the pages of now. */
	assert_true(ioctx_fix(context, memory));
	move(IO_READ, 2 * BLOCK_SIZE, memory, BLOCK_SIZE);
	assert_int_equal(memory[0], 3);
	assert_int_equal(memory[BLOCK_SIZE - 1], 3);
}

static void writes_and_flushes_too(void **state)
{
	uint8_t *block = io_alloc(BLOCK_SIZE);

	need_ring();
	memset(memory, 'x', BLOCK_SIZE);
	assert_true(ioctx_fix(context, memory));
	renew(memory, BLOCK_SIZE);
	memset(memory, 'y', BLOCK_SIZE);
	move(IO_WRITE, 3 * BLOCK_SIZE, memory, BLOCK_SIZE);
	move(IO_FLUSH, 0, NULL, 0);
	assert_int_equal(dev_read(device, 3 * BLOCK_SIZE, block, BLOCK_SIZE), 0);
	assert_int_equal(block[0], 'x');
	io_free(block);
}

static void what_goes_beyond_is_not(void **state)
{
	need_ring();
	assert_true(ioctx_fix(context, memory));
	renew(memory, IOCTX_FIXED_BYTES + BLOCK_SIZE);
	move(IO_READ, 0, memory, IOCTX_FIXED_BYTES + BLOCK_SIZE);
	assert_int_equal(memory[0], 1);
	assert_int_equal(memory[IOCTX_FIXED_BYTES], IOCTX_FIXED_BYTES / BLOCK_SIZE + 1);
	move(IO_READ, BLOCK_SIZE, memory + IOCTX_FIXED_BYTES - BLOCK_SIZE, 2 * BLOCK_SIZE);
	assert_int_equal(memory[IOCTX_FIXED_BYTES], 3);
	move(IO_READ, BLOCK_SIZE, memory + IOCTX_FIXED_BYTES, BLOCK_SIZE);
	assert_int_equal(memory[IOCTX_FIXED_BYTES], 2);
}

/* Pages with one hash, more buffers than slots, slots that are used again: every I/O arrives at its own. */
static void many_come_and_go(void **state)
{
	bool fixed[BUFFERS] = {false};
	unsigned n = 0;

	need_ring();
	for (unsigned turn = 0; turn < 3; turn++) {
		for (unsigned i = turn; i < BUFFERS; i += turn + 1)
			if (fixed[i]) {
				ioctx_unfix(context, memory + i * STRIDE);
				renew(memory + i * STRIDE, STRIDE);
				fixed[i] = false;
				n--;
			}
		for (unsigned i = BUFFERS; i-- > 0;)
			if (!fixed[i] && ioctx_fix(context, memory + i * STRIDE)) {
				fixed[i] = true;
				n++;
			}
		assert_in_range(n, 200, BUFFERS - 1);
		for (unsigned i = 0; i < BUFFERS; i++)
			for (unsigned page = 0; page < 5; page++) {
				uint8_t *at = memory + i * STRIDE + page * BLOCK_SIZE;
				unsigned block = (i + page + turn) % BLOCKS;

				move(IO_READ, block * BLOCK_SIZE, at, BLOCK_SIZE);
				assert_int_equal(at[0], block % 255 + 1);
				assert_int_equal(at[BLOCK_SIZE - 1], block % 255 + 1);
			}
	}
}

static void another_device_is_not_mistaken_for_it(void **state)
{
	struct device *fixed_one = device, *other;
	char path[200];
	int fd;

	need_ring();
	move(IO_READ, 0, memory, BLOCK_SIZE);
	snprintf(path, sizeof(path), "%s.other", image);
	fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_int_equal(ftruncate(fd, BLOCKS * BLOCK_SIZE), 0);
	close(fd);
	other = open_device(path, 0);
	assert_true(ioctx_fix(context, memory));
	device = other;
	memset(memory, 'z', BLOCK_SIZE);
	move(IO_WRITE, 0, memory, BLOCK_SIZE);
	device = fixed_one;
	move(IO_READ, 0, memory, BLOCK_SIZE);
	assert_int_equal(memory[0], 1);
	dev_close(other);
	unlink(path);
}

static void without_a_ring_nothing_changes(void **state)
{
	ioctx_refuse_ring(context);
	ioctx_fix_device(context, device);
	assert_false(ioctx_fix(context, memory));
	move(IO_READ, BLOCK_SIZE, memory, BLOCK_SIZE);
	assert_int_equal(memory[0], 2);
	ioctx_unfix(context, memory);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(what_is_fixed_is_used_until_it_is_let_go, begin, end),
		cmocka_unit_test_setup_teardown(writes_and_flushes_too, begin, end),
		cmocka_unit_test_setup_teardown(what_goes_beyond_is_not, begin, end),
		cmocka_unit_test_setup_teardown(many_come_and_go, begin, end),
		cmocka_unit_test_setup_teardown(another_device_is_not_mistaken_for_it, begin, end),
		cmocka_unit_test_setup_teardown(without_a_ring_nothing_changes, begin, end),
	};

	return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
