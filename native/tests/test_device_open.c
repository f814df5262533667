/* SPDX-License-Identifier: MIT
 *
 * test_device_open.c - what may be opened as a device, and that one device has one owner: images, loop devices over
 * them, partitions, processes that died.
 */
#include "device_fixture.h"

#include <linux/blkpg.h>
#include <linux/loop.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

static void one_owner_at_a_time(void **state)
{
	struct device *dev = open_device(image, 0), *second;
	struct device *looking = open_device(image, DEV_SHARED | DEV_READ_ONLY);

	assert_int_equal(dev_open(image, 0, &second), -ERR_DEV_IN_USE);
	assert_int_equal(dev_open(image, DEV_READ_ONLY, &second), -ERR_DEV_IN_USE);
	dev_close(dev);
	dev = open_device(image, DEV_READ_ONLY);
	assert_int_equal(dev_open(image, 0, &second), -ERR_DEV_IN_USE);
	dev_close(looking);
	dev_close(dev);
}

static unsigned flushes;

static void flushed(struct dev_io *io)
{
	flushes++;
}

/* Also right after I/O: a flush goes through a worker thread of io_uring. */
static void closed_device_is_free_at_once(void **state)
{
	struct device *dev;
	struct ioctx *ctx;

	flushes = 0;
	for (unsigned round = 0; round < 300; round++) {
		struct dev_io io = {.kind = IO_FLUSH, .done = flushed};

		assert_int_equal(dev_open(image, 0, &dev), 0);
		assert_int_equal(ioctx_create(4, &ctx), 0);
		dev_submit(dev, ctx, &io);
		while (flushes == round)
			ioctx_run(ctx, true);
		dev_close(dev);
		assert_int_equal(dev_open(image, 0, &dev), 0);
		dev_close(dev);
		ioctx_destroy(ctx);
	}
}

/* The lock of a process that was killed is gone with it. */
static void lock_dies_with_its_process(void **state)
{
	struct device *dev;
	int ready[2], status;
	char byte;
	pid_t pid;

	assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		byte = dev_open(image, 0, &dev) ? 'n' : 'y';
		if (write(ready[1], &byte, 1) == 1)
			pause();
		_exit(1);
	}
	assert_int_equal(read(ready[0], &byte, 1), 1);
	assert_int_equal(byte, 'y');
	assert_int_equal(dev_open(image, 0, &dev), -ERR_DEV_IN_USE);
	kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(dev_open(image, 0, &dev), 0);
	dev_close(dev);
	close(ready[0]);
	close(ready[1]);
}

static void what_is_no_device(void **state)
{
	struct device *dev;
	char path[200];

	assert_int_equal(dev_open("/nonexistent/device", 0, &dev), -ENOENT);
	assert_int_equal(dev_open(directory, 0, &dev), -ENOTBLK);
	assert_int_equal(dev_open("/dev/null", 0, &dev), -ENOTBLK);
	snprintf(path, sizeof(path), "%s/fifo", directory);
	assert_int_equal(mkfifo(path, 0600), 0);
	assert_int_equal(dev_open(path, 0, &dev), -ENOTBLK);
	unlink(path);
	if (geteuid() != 0) {
		assert_int_equal(chmod(image, 0), 0);
		assert_int_equal(dev_open(image, 0, &dev), -EACCES);
	}
}

/* A loop device over the image; -1 where none can be had. */
static int attach_loop(char *path, size_t len, unsigned flags)
{
	struct loop_config config = {.info = {.lo_flags = LO_FLAGS_AUTOCLEAR | flags}};
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), file, loop = -1;

	if (control < 0)
		return -1;
	file = open(image, O_RDWR | O_CLOEXEC);
	config.fd = (uint32_t)file;
	/* Others take loop devices too: try again when one was faster. */
	for (unsigned tries = 0; tries < 20; tries++) {
		int number = ioctl(control, LOOP_CTL_GET_FREE);

		snprintf(path, len, "/dev/loop%d", number);
		loop = number < 0 ? -1 : open(path, O_RDWR | O_CLOEXEC);
		if (loop >= 0 && !ioctl(loop, LOOP_CONFIGURE, &config))
			break;
		if (loop >= 0)
			close(loop);
		loop = -1;
		usleep(10000);
	}
	close(file);
	close(control);
	return loop;
}

static void loop_device_and_image_exclude_each_other(void **state)
{
	char path[2][32];
	int loop[2], mount_like;
	struct device *dev, *second;
	uint8_t *buf;

	loop[0] = geteuid() == 0 ? attach_loop(path[0], sizeof(path[0]), 0) : -1;
	if (loop[0] < 0) {
		print_message("needs root and a loop device\n");
		skip();
	}
	loop[1] = attach_loop(path[1], sizeof(path[1]), 0);
	assert_true(loop[1] >= 0);

	dev = open_device(path[0], 0);
	assert_int_equal(dev_open(path[0], 0, &second), -ERR_DEV_IN_USE);
	assert_int_equal(dev_open(path[1], 0, &second), -ERR_DEV_IN_USE);
	assert_int_equal(dev_open(image, 0, &second), -ERR_DEV_IN_USE);
	second = open_device(path[0], DEV_SHARED | DEV_READ_ONLY);
	dev_close(second);

	assert_int_equal(dev->size, BLOCKS * BLOCK_SIZE);
	assert_int_equal(dev->align, 512);
	assert_true(dev->volatile_cache);
	buf = io_alloc(2 * BLOCK_SIZE);
	memset(buf, 5, BLOCK_SIZE);
	assert_int_equal(dev_write(dev, 512, buf, 1024, IO_FUA), 0);
	assert_int_equal(dev_flush(dev), 0);
	assert_int_equal(dev_read(dev, 512, buf + BLOCK_SIZE, 1024), 0);
	assert_memory_equal(buf, buf + BLOCK_SIZE, 1024);
	io_free(buf);
	dev_close(dev);

	dev = open_device(image, 0);
	assert_int_equal(dev_open(path[0], 0, &second), -ERR_DEV_IN_USE);
	dev_close(dev);
	dev = open_device(path[1], 0);
	dev_close(dev);

	/* Somebody who knows nothing of our locks, as a mount of the loop device by the kernel. */
	mount_like = open(path[1], O_RDWR | O_EXCL | O_CLOEXEC);
	assert_true(mount_like >= 0);
	assert_int_equal(dev_open(image, 0, &dev), -ERR_DEV_IN_USE);
	close(mount_like);
	dev = open_device(image, 0);
	dev_close(dev);
	close(loop[0]);
	close(loop[1]);
}

/* A partition of a loop device, without a partition table: the kernel is told. Its node is made here. */
static void partition_locks_the_file_behind_its_disk(void **state)
{
	char path[32], node[200], attr[96], line[32] = "";
	struct blkpg_partition part = {.start = 64 * BLOCK_SIZE, .length = 32 * BLOCK_SIZE, .pno = 1};
	struct blkpg_ioctl_arg arg = {.op = BLKPG_ADD_PARTITION, .datalen = sizeof(part), .data = &part};
	int loop = geteuid() == 0 ? attach_loop(path, sizeof(path), LO_FLAGS_PARTSCAN) : -1;
	struct device *dev, *second;
	unsigned major_no, minor_no;
	FILE *f;

	if (loop < 0 || ioctl(loop, BLKPG, &arg)) {
		print_message("needs root and a loop device with partitions\n");
		skip();
	}
	snprintf(attr, sizeof(attr), "/sys/block/%s/%sp1/dev", path + 5, path + 5);
	f = fopen(attr, "re");
	assert_true(f && fgets(line, sizeof(line), f));
	fclose(f);
	assert_int_equal(sscanf(line, "%u:%u", &major_no, &minor_no), 2);
	snprintf(node, sizeof(node), "%s/partition", directory);
	assert_int_equal(mknod(node, S_IFBLK | 0600, makedev(major_no, minor_no)), 0);

	dev = open_device(node, 0);
	assert_int_equal(dev->size, 32 * BLOCK_SIZE);
	assert_int_equal(dev_open(path, 0, &second), -ERR_DEV_IN_USE);
	assert_int_equal(dev_open(image, 0, &second), -ERR_DEV_IN_USE);
	dev_close(dev);
	dev = open_device(image, 0);
	assert_int_equal(dev_open(node, 0, &second), -ERR_DEV_IN_USE);
	dev_close(dev);
	assert_int_equal(unlink(node), 0);
	arg.op = BLKPG_DEL_PARTITION;
	assert_int_equal(ioctl(loop, BLKPG, &arg), 0);
	close(loop);
}

static void read_only_loop_device_is_told_apart(void **state)
{
	struct device *dev;
	char path[32];
	int loop = geteuid() == 0 ? attach_loop(path, sizeof(path), LO_FLAGS_READ_ONLY) : -1;

	if (loop < 0) {
		print_message("needs root and a loop device\n");
		skip();
	}
	assert_int_equal(dev_open(path, 0, &dev), -EROFS);
	dev = open_device(path, DEV_READ_ONLY);
	dev_close(dev);
	close(loop);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		CASE(one_owner_at_a_time),
		CASE(closed_device_is_free_at_once),
		CASE(lock_dies_with_its_process),
		CASE(what_is_no_device),
		CASE(loop_device_and_image_exclude_each_other),
		CASE(partition_locks_the_file_behind_its_disk),
		CASE(read_only_loop_device_is_told_apart),
	};

	return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
