/* SPDX-License-Identifier: MIT
 *
 * names.c DIRECTORY COUNT: create, stat, readdir, list, rename and unlink COUNT empty files; operations a second as JSON.
 * stat is of files just made: where the kernel may keep attributes it measures the kernel's cache.
 * readdir is the first listing of a directory that changed; list is the next, with a stat of every entry, as ls -l does.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void list(int count, bool with_attributes)
{
	struct dirent *ent;
	struct stat st;
	int seen = 0;
	DIR *dir = opendir(".");

	if (!dir)
		fail("opendir");
	for (; (ent = readdir(dir)); seen++)
		if (with_attributes && fstatat(dirfd(dir), ent->d_name, &st, AT_SYMLINK_NOFOLLOW))
			fail("fstatat");
	closedir(dir);
	if (seen != count + 2) {
		fprintf(stderr, "readdir saw %d entries of %d\n", seen, count + 2);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	char name[64], other[64];
	struct stat st;
	double start, t[6];
	int count, i, fd;

	if (argc != 3)
		return 2;
	count = atoi(argv[2]);
	if (chdir(argv[1]))
		fail("chdir");

	start = now();
	for (i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "file-%d", i);
		fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
		if (fd < 0)
			fail("create");
		close(fd);
	}
	t[0] = now() - start;

	start = now();
	for (i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "file-%d", i);
		if (stat(name, &st))
			fail("stat");
	}
	t[1] = now() - start;

	start = now();
	list(count, false);
	t[2] = now() - start;

	start = now();
	list(count, true);
	t[3] = now() - start;

	start = now();
	for (i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "file-%d", i);
		snprintf(other, sizeof(other), "renamed-%d", i);
		if (rename(name, other))
			fail("rename");
	}
	t[4] = now() - start;

	start = now();
	for (i = 0; i < count; i++) {
		snprintf(other, sizeof(other), "renamed-%d", i);
		if (unlink(other))
			fail("unlink");
	}
	t[5] = now() - start;

	printf("{\"create\": %.1f, \"stat\": %.1f, \"readdir\": %.1f, \"list\": %.1f, \"rename\": %.1f, \"unlink\": %.1f}\n",
	       count / t[0], count / t[1], count / t[2], count / t[3], count / t[4], count / t[5]);
	return 0;
}
