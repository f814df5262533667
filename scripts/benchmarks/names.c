/* SPDX-License-Identifier: MIT
 *
 * names.c DIRECTORY COUNT: create, stat, readdir, rename and unlink COUNT empty files; operations a second as JSON.
 * stat is of files just made: where the kernel may keep attributes it measures the kernel's cache.
 */
#include <dirent.h>
#include <fcntl.h>
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

int main(int argc, char **argv)
{
	char name[64], other[64];
	struct stat st;
	struct dirent *ent;
	double start, t[5];
	int count, i, fd, seen = 0;
	DIR *dir;

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
	dir = opendir(".");
	if (!dir)
		fail("opendir");
	while ((ent = readdir(dir)))
		seen++;
	closedir(dir);
	if (seen != count + 2) {
		fprintf(stderr, "readdir saw %d entries of %d\n", seen, count + 2);
		return 1;
	}
	t[2] = now() - start;

	start = now();
	for (i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "file-%d", i);
		snprintf(other, sizeof(other), "renamed-%d", i);
		if (rename(name, other))
			fail("rename");
	}
	t[3] = now() - start;

	start = now();
	for (i = 0; i < count; i++) {
		snprintf(other, sizeof(other), "renamed-%d", i);
		if (unlink(other))
			fail("unlink");
	}
	t[4] = now() - start;

	printf("{\"create\": %.1f, \"stat\": %.1f, \"readdir\": %.1f, \"rename\": %.1f, \"unlink\": %.1f}\n",
	       count / t[0], count / t[1], count / t[2], count / t[3], count / t[4]);
	return 0;
}
