/* SPDX-License-Identifier: MIT
 *
 * test_bridge_mount.c - a bridge from the mount to the end, used by shells: for the sanitizers, over
 * both transports. Without root, /dev/fuse, or FUSE over io_uring the tests are skipped. The kernel's
 * switch is left as it is found.
 */
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "bridge_mount.h"
#include "bridge_uring.h"
#include "fs.h"

#define SWITCH "/sys/module/fuse/parameters/enable_uring"
#define IMAGE_BYTES (UINT64_C(256) << 20)
#define USERS 5u

/* Names, data, locks that are waited for and given up, attributes; until told to end, or the mount has
 * gone. */
static const char user[] =
	"cd \"$0\" || exit; i=0; mkdir -p d$1; while [ -d . ]; do i=$((i + 1)); "
	"echo $i >d$1/f$i; cat d$1/f$i >/dev/null; mv d$1/f$i d$1/g; ln -s x d$1/l; rm d$1/l d$1/g; "
	"head -c 300000 /dev/zero >d$1/big; cat d$1/big >/dev/null; ls -l . d$1 >/dev/null; "
	"flock lock true; timeout -s INT 0.05 flock lock sleep 0.1; "
	"cat .extfs/control </dev/null >/dev/null & kill $! ; done 2>/dev/null";

static struct {
	char directory[64], image[96], mountpoint[96], before[4];
	struct device *dev;
	struct fs *fs;
	struct bridge *bridge;
	pid_t users[USERS];
} world;

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd >= 0) {
		if (write(fd, text, strlen(text)) < 0)
			print_message("%s: %s\n", path, strerror(errno));
		close(fd);
	}
}

static int set_up(void **state)
{
	const struct mkfs_options mkfs = {0};
	const struct fs_options opt = {0};
	int fd;

	memset(&world, 0, sizeof(world));
	strcpy(world.directory, "/dev/shm/extfs-test-XXXXXX");
	assert_non_null(mkdtemp(world.directory));
	snprintf(world.image, sizeof(world.image), "%s/image", world.directory);
	snprintf(world.mountpoint, sizeof(world.mountpoint), "%s/mnt", world.directory);
	assert_int_equal(mkdir(world.mountpoint, 0700), 0);
	fd = open(world.image, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	assert_int_equal(ftruncate(fd, IMAGE_BYTES), 0);
	close(fd);
	assert_int_equal(dev_open(world.image, 0, &world.dev), 0);
	assert_int_equal(fs_mkfs(world.dev, &mkfs), 0);
	assert_int_equal(fs_open(world.dev, &opt, &world.fs), 0);
	fd = open(SWITCH, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		assert_true(read(fd, world.before, 1) == 1);
		close(fd);
	}
	return 0;
}

static int tear_down(void **state)
{
	if (world.before[0])
		put(SWITCH, world.before);
	assert_int_equal(fs_close(world.fs), 0);
	unlink(world.image);
	rmdir(world.mountpoint);
	return rmdir(world.directory);
}

static void mount_it(enum transport_choice transport)
{
	char why[160];
	const struct mount_request m = {
		.mountpoint = world.mountpoint,
		.fsname = "test",
		.transport = transport,
		.why = why,
		.why_len = sizeof(why),
	};

	if (geteuid() || access("/dev/fuse", R_OK | W_OK))
		skip();
	if (transport == TRANSPORT_ONLY_URING) {
		put(SWITCH, "Y");
		if (uring_probe(why, sizeof(why))) {
			print_message("skipped: %s\n", why);
			skip();
		}
	}
	assert_int_equal(bridge_start(world.fs, &m, &world.bridge), 0);
}

static void start_users(void)
{
	char number[8];

	for (unsigned i = 0; i < USERS; i++) {
		snprintf(number, sizeof(number), "%u", i);
		world.users[i] = fork();
		if (!world.users[i]) {
			setpgid(0, 0);
			execl("/bin/sh", "sh", "-c", user, world.mountpoint, number, NULL);
			_exit(127);
		}
		setpgid(world.users[i], world.users[i]);
	}
	poll(NULL, 0, 1500);
}

static void end_users(void)
{
	for (unsigned i = 0; i < USERS; i++) {
		kill(-world.users[i], SIGKILL);
		waitpid(world.users[i], NULL, 0);
	}
}

static void wait_for_the_end(void)
{
	struct pollfd pfd = {.fd = world.bridge->event_fd, .events = POLLIN};

	assert_int_equal(poll(&pfd, 1, 60000), 1);
	bridge_stop(world.bridge);
}

static void unmounted(enum transport_choice transport)
{
	mount_it(transport);
	start_users();
	end_users();
	assert_int_equal(unmount_fuse(world.mountpoint, true), 0);
	wait_for_the_end();
}

static void aborted(enum transport_choice transport)
{
	mount_it(transport);
	start_users();
	assert_int_equal(bridge_abort(world.bridge), 0);
	wait_for_the_end();
	end_users();
	unmount_fuse(world.mountpoint, true);
}

/* Never unmounted: the bridge sees to that. */
static void stopped(enum transport_choice transport)
{
	mount_it(transport);
	start_users();
	bridge_stop(world.bridge);
	end_users();
}

static void classic_unmounted(void **state) { unmounted(TRANSPORT_ONLY_CLASSIC); }
static void classic_aborted(void **state) { aborted(TRANSPORT_ONLY_CLASSIC); }
static void classic_stopped(void **state) { stopped(TRANSPORT_ONLY_CLASSIC); }
static void uring_unmounted(void **state) { unmounted(TRANSPORT_ONLY_URING); }
static void uring_aborted(void **state) { aborted(TRANSPORT_ONLY_URING); }
static void uring_stopped(void **state) { stopped(TRANSPORT_ONLY_URING); }

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(classic_unmounted, set_up, tear_down),
		cmocka_unit_test_setup_teardown(classic_aborted, set_up, tear_down),
		cmocka_unit_test_setup_teardown(classic_stopped, set_up, tear_down),
		cmocka_unit_test_setup_teardown(uring_unmounted, set_up, tear_down),
		cmocka_unit_test_setup_teardown(uring_aborted, set_up, tear_down),
		cmocka_unit_test_setup_teardown(uring_stopped, set_up, tear_down),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
