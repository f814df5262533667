/* SPDX-License-Identifier: MIT
 *
 * test_file_early_memory.c - writes that are answered early when memory runs out: whoever has the answer needs no more.
 *
 * Memory for I/O, and more of what there is, are refused while `refusing` is set in the calling thread.
 */
#include "file_fixture.h"

#include <stdlib.h>

static __thread bool refusing;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define REFUSES false /* the sanitizer's own functions */
#else
#define REFUSES true

void *__libc_memalign(size_t align, size_t len);

void *__libc_realloc(void *p, size_t len);

__attribute__((visibility("default"))) void *realloc(void *p, size_t len)
{
	return refusing ? NULL : __libc_realloc(p, len);
}

__attribute__((visibility("default"))) void *aligned_alloc(size_t align, size_t len)
{
	return refusing ? NULL : __libc_memalign(align, len);
}
#endif

#define LEN (5u * BLOCK_SIZE)
#define EXTENTS 12u

static int setup(void **state)
{
	early_memory = 4u << 20;
	begin(64u << 20, 512, 1);
	return 0;
}

static int teardown(void **state)
{
	end();
	return 0;
}

/* A write of file 0 that gets no memory. */
static void refused(const struct todo *t)
{
	uint8_t *mem = io_alloc(t->len + BLOCK_SIZE);
	struct flight f = { 0 };

	if (!REFUSES) {
		io_free(mem);
		print_message("memory is the sanitizer's\n");
		skip();
	}
	file_op_init(&f.fop, FILE_WRITE, world.file[0], world.ctx);
	f.fop.flags = FILE_F_EARLY;
	f.fop.offset = t->off;
	f.fop.len = t->len;
	f.fop.buf = memset(mem, 0x77, t->len);
	f.fop.done = flight_done;
	f.fop.ended = early_ended;
	f.fop.user = &f;
	refusing = true;
	file_start(&f.fop);
	flight_wait(&f);
	early_run_out();
	refusing = false;
	io_free(mem);
	assert_int_equal(early_errors(world.file[0]), 0);
	assert_false(f.fop.early);
	assert_int_equal(f.fop.result, -ENOMEM);
	same_as_model(0, &files[0], "after the refusal");
}

static void write_early(const struct todo *t)
{
	struct flight f;

	model_do(files, t);
	flight_start(&f, t);
	assert_true(f.fop.early);
	early_run_out();
	flight_end(&f);
}

/* Its first and last block are to be merged with what is there, in memory of their own. */
static void a_write_that_cannot_merge_is_told_so(void **state)
{
	struct todo part = { .act = ACT_WRITE, .off = 100, .len = LEN - 200, .pattern = 4 };

	/* Its copy's memory is kept, and of the size that the next one needs. */
	write_early(&(struct todo){ .act = ACT_WRITE, .len = LEN, .pattern = 3 });
	refused(&part);
	both(&part);
	early_run_out();
	same_as_model(0, &files[0], "with memory");
}

/* More extents than a new operation has room for. */
static void a_write_of_many_extents_is_told_so(void **state)
{
	struct todo all = { .act = ACT_WRITE, .len = EXTENTS * BLOCK_SIZE, .pattern = 9 };

	for (unsigned i = EXTENTS; i-- > 0;)
		write_early(&(struct todo){ .act = ACT_WRITE, .off = i * BLOCK_SIZE, .len = BLOCK_SIZE,
					    .pattern = 30 + i });
	write_early(&(struct todo){ .act = ACT_WRITE, .file = 1, .len = EXTENTS * BLOCK_SIZE, .pattern = 3 });
	refused(&all);
	write_early(&all);
	same_as_model(0, &files[0], "with memory");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(a_write_that_cannot_merge_is_told_so, setup, teardown),
		cmocka_unit_test_setup_teardown(a_write_of_many_extents_is_told_so, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
