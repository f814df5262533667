/* SPDX-License-Identifier: MIT
 *
 * test_bridge_drop.c - what the kernel is told later: once for each name and inode, by two threads
 * that do not wait for each other, in bounded memory.
 *
 * The kernel here is a function that remembers what it was told, and can be made to hold on to a
 * message.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "bridge_drop.h"
#include "device.h"
#include "fuse_abi.h"

#define NAMES_MAX 50u

static struct kernel {
	pthread_mutex_t mutex;
	pthread_cond_t moved;
	bool names_held, bytes_held; /* messages of the kind do not come back */
	unsigned names_in, bytes_in; /* so many have begun */
	unsigned names, bytes, epochs;
	char last_name[256];
	uint64_t last_dir, last_ino;
	int64_t last_off, last_len;
	_Atomic int error; /* of INVAL_*: errno, 0: none */
	int epoch_error;
} kernel = { .mutex = PTHREAD_MUTEX_INITIALIZER, .moved = PTHREAD_COND_INITIALIZER };
static struct drops *d;

static ssize_t told(int fd, const void *message, size_t len)
{
	const struct fuse_out_header *head = message;
	const void *body = head + 1;
	int err = kernel.error;

	assert_int_equal(fd, 77);
	assert_int_equal(head->len, len);
	assert_int_equal(head->unique, 0);
	pthread_mutex_lock(&kernel.mutex);
	switch (head->error) {
	case FUSE_NOTIFY_INVAL_ENTRY: {
		const struct fuse_notify_inval_entry_out *out = body;

		assert_int_equal(len, sizeof(*head) + sizeof(*out) + out->namelen + 1);
		assert_int_equal(strlen((const char *)(out + 1)), out->namelen);
		kernel.names_in++;
		pthread_cond_broadcast(&kernel.moved);
		while (kernel.names_held)
			pthread_cond_wait(&kernel.moved, &kernel.mutex);
		kernel.names++;
		kernel.last_dir = out->parent;
		strcpy(kernel.last_name, (const char *)(out + 1));
		break;
	}
	case FUSE_NOTIFY_INVAL_INODE: {
		const struct fuse_notify_inval_inode_out *out = body;

		assert_int_equal(len, sizeof(*head) + sizeof(*out));
		kernel.bytes_in++;
		pthread_cond_broadcast(&kernel.moved);
		while (kernel.bytes_held)
			pthread_cond_wait(&kernel.moved, &kernel.mutex);
		kernel.bytes++;
		kernel.last_ino = out->ino;
		kernel.last_off = out->off;
		kernel.last_len = out->len;
		break;
	}
	case FUSE_NOTIFY_INC_EPOCH:
		assert_int_equal(len, sizeof(*head));
		err = kernel.epoch_error;
		kernel.epochs += !err;
		break;
	default:
		fail_msg("notification %d", head->error);
	}
	pthread_cond_broadcast(&kernel.moved);
	pthread_mutex_unlock(&kernel.mutex);
	errno = err;
	return err ? -1 : (ssize_t)len;
}

static void hold(bool names, bool bytes)
{
	pthread_mutex_lock(&kernel.mutex);
	kernel.names_held = names;
	kernel.bytes_held = bytes;
	pthread_cond_broadcast(&kernel.moved);
	pthread_mutex_unlock(&kernel.mutex);
}

/* Until so many have been told in all. */
static void until(const unsigned *count, unsigned n)
{
	struct timespec late;
	unsigned have;

	clock_gettime(CLOCK_REALTIME, &late);
	late.tv_sec += 20;
	pthread_mutex_lock(&kernel.mutex);
	while (*count < n && !pthread_cond_timedwait(&kernel.moved, &kernel.mutex, &late))
		;
	have = *count;
	pthread_mutex_unlock(&kernel.mutex);
	assert_int_equal(have, n);
}

static struct drops_look look(void)
{
	struct drops_look l;

	drops_get(d, &l);
	return l;
}

static void name(uint64_t dir, unsigned i)
{
	char text[32];

	drops_name(d, dir, text, (size_t)snprintf(text, sizeof(text), "name-%u", i));
}

static int setup(void **state)
{
	kernel.names = kernel.bytes = kernel.epochs = kernel.names_in = kernel.bytes_in = 0;
	kernel.error = kernel.epoch_error = 0;
	return drops_create(77, NAMES_MAX, told, &d);
}

static int teardown(void **state)
{
	hold(false, false);
	drops_destroy(d);
	return 0;
}

static void they_are_told(void **state)
{
	char longest[255];

	name(5, 1);
	until(&kernel.names, 1);
	assert_string_equal(kernel.last_name, "name-1");
	assert_int_equal(kernel.last_dir, 5);
	memset(longest, 'x', sizeof(longest));
	drops_name(d, 6, longest, sizeof(longest));
	until(&kernel.names, 2);
	assert_int_equal(strlen(kernel.last_name), 255);
	drops_bytes(d, 9, 4096, 5000);
	until(&kernel.bytes, 1);
	assert_true(kernel.last_ino == 9 && kernel.last_off == 4096 && kernel.last_len == 904);
	drops_bytes(d, 9, 7, UINT64_MAX);
	until(&kernel.bytes, 2);
	assert_true(kernel.last_off == 7 && kernel.last_len == 0);
	/* What the kernel does not know does not matter. */
	kernel.error = ENOENT;
	name(5, 2);
	until(&kernel.names, 3);
	kernel.error = 0;
	name(5, 3);
	until(&kernel.names, 4);
}

/* While the one is held up, by a directory's lock or a page's, the other goes on; and what comes
 * often is told once. */
static void they_merge(void **state)
{
	hold(true, true);
	name(5, 0);
	drops_bytes(d, 8, 0, 1);
	until(&kernel.names_in, 1);
	until(&kernel.bytes_in, 1);
	for (unsigned i = 0; i < 1000; i++) {
		name(5, i % 7);
		name(6, 1);
		drops_bytes(d, 8, 5000 + i, 5001 + i);
		drops_bytes(d, 9, 0, UINT64_MAX);
	}
	/* The first ones are being told: what came since is told again. */
	assert_int_equal(look().names, 8);
	assert_int_equal(look().inodes, 2);
	hold(true, false);
	until(&kernel.bytes, 3);
	assert_int_equal(kernel.names, 0);
	assert_int_equal(kernel.last_ino, 9);
	hold(false, true);
	drops_bytes(d, 7, 0, 1);
	until(&kernel.bytes_in, 4);
	drops_bytes(d, 8, 100, 200);
	drops_bytes(d, 8, 50, 60);
	until(&kernel.names, 9);
	hold(false, false);
	until(&kernel.bytes, 5);
	assert_true(kernel.last_off == 50 && kernel.last_len == 150);
	name(5, 0);
	until(&kernel.names, 10);
	assert_int_equal(look().epochs, 0);
}

static void too_many_names(void **state)
{
	hold(true, false);
	name(5, 0);
	until(&kernel.names_in, 1);
	for (unsigned i = 1; i <= NAMES_MAX; i++)
		name(5, i);
	assert_int_equal(look().names, NAMES_MAX);
	assert_int_equal(kernel.epochs, 0);
	name(5, 17); /* is among them */
	assert_int_equal(kernel.epochs, 0);
	name(5, NAMES_MAX + 1);
	assert_int_equal(kernel.epochs, 1);
	assert_int_equal(look().names, 0);
	/* Told already, but it has changed since. */
	name(5, 17);
	assert_int_equal(look().names, 1);
	hold(false, false);
	until(&kernel.names, 2);
	assert_string_equal(kernel.last_name, "name-17");
	assert_int_equal(look().forgotten, 0);
}

/* A kernel before 6.16 is told of each, in order. */
static void without_epochs(void **state)
{
	kernel.epoch_error = EINVAL;
	hold(true, false);
	for (unsigned i = 0; i < 10 * NAMES_MAX; i++)
		name(5, i);
	assert_true(look().names >= 10 * NAMES_MAX - 1);
	assert_int_equal(kernel.epochs, 0);
	hold(false, false);
	until(&kernel.names, 10 * NAMES_MAX);
	assert_int_equal(look().forgotten, 0);
}

/* The mount is gone: whatever was pending is no longer of interest. */
static void ends_with_some_pending(void **state)
{
	hold(true, true);
	for (unsigned i = 0; i < 20; i++) {
		name(5, i);
		drops_bytes(d, i + 1, 0, 1);
	}
	kernel.error = ENODEV;
}

static void *changer(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;

	for (unsigned i = 0; i < 20000; i++) {
		name(1 + seed % 3, (unsigned)rand_r(&seed) % (3 * NAMES_MAX));
		drops_bytes(d, 1 + (uint64_t)rand_r(&seed) % 20, i, i + 10);
	}
	return NULL;
}

static void threads(void **state)
{
	pthread_t thread[3];

	for (uintptr_t i = 0; i < ARRAY_LEN(thread); i++)
		assert_int_equal(pthread_create(&thread[i], NULL, changer, (void *)(i + 1)), 0);
	for (unsigned i = 0; i < ARRAY_LEN(thread); i++)
		pthread_join(thread[i], NULL);
	assert_true(look().names <= NAMES_MAX && look().inodes <= 20);
	while (look().names || look().inodes)
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	assert_int_equal(look().forgotten, 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(they_are_told, setup, teardown),
		cmocka_unit_test_setup_teardown(they_merge, setup, teardown),
		cmocka_unit_test_setup_teardown(too_many_names, setup, teardown),
		cmocka_unit_test_setup_teardown(without_epochs, setup, teardown),
		cmocka_unit_test_setup_teardown(ends_with_some_pending, setup, teardown),
		cmocka_unit_test_setup_teardown(threads, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
