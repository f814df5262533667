/* SPDX-License-Identifier: MIT
 *
 * device_fixture.h - an image file of its own for each case of a test of raw devices.
 */
#ifndef EXTFS_TEST_DEVICE_FIXTURE_H
#define EXTFS_TEST_DEVICE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>
#include <fcntl.h>
#include <unistd.h>

#include "device.h"
#include "log.h"

#define BLOCKS 256u

static char directory[128], image[160];

static int make_directory(void **state)
{
	const char *tmp = getenv("TMPDIR");

	snprintf(directory, sizeof(directory), "%s/test_device.XXXXXX", tmp ? tmp : "/tmp");
	return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state)
{
	return rmdir(directory);
}

static int set_up(void **state)
{
	char line[512];
	int fd;

	snprintf(image, sizeof(image), "%s/image", directory);
	fd = open(image, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, BLOCKS * BLOCK_SIZE))
		return -1;
	close(fd);
	while (log_next(line, sizeof(line)))
		;
	return 0;
}

static int tear_down(void **state)
{
	return unlink(image);
}

static struct device *open_device(const char *path, unsigned flags)
{
	struct device *dev;
	int rc = dev_open(path, flags, &dev);

	if (rc)
		print_error("open %s: %s\n", path, err_name(rc));
	assert_int_equal(rc, 0);
	return dev;
}


#define CASE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

#endif
