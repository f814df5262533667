/* SPDX-License-Identifier: MIT
 *
 * bridge_mount.c - mount(2) and umount2(2) of a FUSE connection.
 *
 * extfs mounts by itself instead of through fusermount3: the descriptor of /dev/fuse is the
 * bridge's, and root is needed for the device anyway.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "bridge_mount.h"
#include "log.h"

#define CONNECTIONS "/sys/fs/fuse/connections"

static const struct { const char *word; unsigned long set, clear; } words[] = {
	{"rw", 0, MS_RDONLY}, {"ro", MS_RDONLY, 0},
	{"suid", 0, MS_NOSUID}, {"nosuid", MS_NOSUID, 0},
	{"dev", 0, MS_NODEV}, {"nodev", MS_NODEV, 0},
	{"exec", 0, MS_NOEXEC}, {"noexec", MS_NOEXEC, 0},
	{"atime", 0, MS_NOATIME}, {"noatime", MS_NOATIME, 0},
	{"diratime", 0, MS_NODIRATIME}, {"nodiratime", MS_NODIRATIME, 0},
	{"relatime", MS_RELATIME, 0}, {"norelatime", 0, MS_RELATIME},
	{"strictatime", MS_STRICTATIME, 0}, {"nostrictatime", 0, MS_STRICTATIME},
	{"async", 0, MS_SYNCHRONOUS}, {"sync", MS_SYNCHRONOUS, 0}, {"dirsync", MS_DIRSYNC, 0},
	{"silent", MS_SILENT, 0}, {"loud", 0, MS_SILENT},
	{"defaults", 0, 0},
};

static bool apply_word(const char *word, size_t len, unsigned long *flags)
{
	for (size_t i = 0; i < ARRAY_LEN(words); i++) {
		if (strlen(words[i].word) == len && !memcmp(words[i].word, word, len)) {
			*flags = (*flags & ~words[i].clear) | words[i].set;
			return true;
		}
	}
	return len == 0;
}

int mount_flags(const char *options, unsigned long *flags, char *bad, size_t bad_len)
{
	const char *at = options ? options : "";

	for (;;) {
		size_t len = strcspn(at, ",");

		if (!apply_word(at, len, flags)) {
			snprintf(bad, bad_len, "%.*s", (int)MIN(len, (size_t)200), at);
			return -EINVAL;
		}
		if (!at[len])
			return 0;
		at += len + 1;
	}
}

/* Undo the octal escapes of /proc/self/mountinfo, in place. */
static void unescape(char *s)
{
	char *to = s;

	while (*s) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
			*to++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 4;
		} else {
			*to++ = *s++;
		}
	}
	*to = 0;
}

/* The device number of the topmost mount at exactly this path; 0: nothing is mounted there. Asks
 * nobody but the kernel, so a dead or unserved mount does no harm. */
static dev_t mounted_device(const char *mountpoint)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t cap = 0;
	dev_t dev = 0;

	while (f && getline(&line, &cap, f) > 0) {
		unsigned maj, min;
		char *path = NULL;

		if (sscanf(line, "%*u %*u %u:%u %*s %ms", &maj, &min, &path) == 3) {
			unescape(path);
			if (!strcmp(path, mountpoint))
				dev = makedev(maj, min);
		}
		free(path);
	}
	free(line);
	if (f)
		fclose(f);
	return dev;
}

static int check_mountpoint(const char *mountpoint)
{
	struct stat st;

	if (mounted_device(mountpoint))
		return -EBUSY;
	if (stat(mountpoint, &st) < 0)
		return -errno;
	return S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
}

int mount_fuse(const struct mount_request *m, dev_t *dev)
{
	unsigned long flags = m->flags | (m->read_only ? MS_RDONLY : 0);
	char data[160];
	int fd, err = check_mountpoint(m->mountpoint);

	if (err)
		return err;
	fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return errno == ENOENT || errno == ENXIO ? -ENODEV : -errno;
	/* POSIX ACLs make default_permissions the kernel's own choice; asking for it says so in
	 * /proc/mounts. */
	snprintf(data, sizeof(data),
		 "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"
		 "max_read=%u",
		 fd, BRIDGE_MAX_IO);
	if (mount(m->fsname, m->mountpoint, "fuse.extfs", flags, data) < 0) {
		err = -errno;
		close(fd);
		return err;
	}
	*dev = mounted_device(m->mountpoint);
	return fd;
}

int unmount_fuse(const char *mountpoint, bool lazy)
{
	return umount2(mountpoint, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) < 0 ? -errno : 0;
}

static int write_abort(dev_t dev)
{
	char path[96];
	int fd, err = 0;

	/* A connection's name is the number that the kernel makes of the device, which is the
	 * minor: FUSE's major is 0. */
	snprintf(path, sizeof(path), CONNECTIONS "/%u/abort", minor(dev));
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (write(fd, "1", 1) < 0)
		err = -errno;
	close(fd);
	return err;
}

int abort_fuse(dev_t dev)
{
	int err;

	if (!dev)
		return -ENOENT;
	err = write_abort(dev);
	if (err == -ENOENT && access(CONNECTIONS, F_OK) == 0 &&
	    mount("none", CONNECTIONS, "fusectl", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0)
		err = write_abort(dev);
	return err;
}
