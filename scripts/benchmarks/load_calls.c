/* SPDX-License-Identifier: MIT
 *
 * load_calls.c - the workloads of scripts/bench load. Each prints lines of JSON.
 *
 *   append DIR FILES MIB KIB       FILES threads append KIB at a time to a file of MIB each
 *   fsync DIR THREADS SECONDS      4 KiB write and fsync, each thread in a file of its own
 *   churn DIR SECONDS              files of 64 KiB are written and deleted
 *   fill DIR PERCENT               files of 4 to 64 KiB, every second one deleted, until so much is in use
 *   sparse FILE GIB SECONDS STEP   random direct 4 KiB writes of zeros; a line every STEP seconds
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096u
#define CHURN_BYTES (64u << 10)
#define CHURN_FILES 64u

static char memory[1 << 20] __attribute__((aligned(BLOCK)));

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t random_below(uint64_t *state, uint64_t n)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state % n;
}

static int open_file(const char *dir, const char *name, unsigned long i, int flags)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s%lu", dir, name, i);
	fd = open(path, flags | O_CREAT, 0644);
	if (fd < 0)
		die(path);
	return fd;
}

static void write_all(int fd, size_t len, off_t at)
{
	if (pwrite(fd, memory, len, at) != (ssize_t)len)
		die("write");
}

struct worker {
	pthread_t thread;
	const char *dir;
	unsigned index;
	uint64_t bytes, step, ops;
	double seconds;
};

static void run_workers(struct worker *w, unsigned n, void *(*work)(void *))
{
	for (unsigned i = 0; i < n; i++) {
		w[i].index = i;
		if (pthread_create(&w[i].thread, NULL, work, &w[i]))
			die("thread");
	}
	for (unsigned i = 0; i < n; i++)
		pthread_join(w[i].thread, NULL);
}

static void *append(void *arg)
{
	struct worker *w = arg;
	int fd = open_file(w->dir, "append", w->index, O_WRONLY | O_APPEND);

	for (uint64_t at = 0; at < w->bytes; at += w->step)
		if (write(fd, memory, w->step) != (ssize_t)w->step)
			die("append");
	if (fsync(fd) || close(fd))
		die("fsync");
	return NULL;
}

static void *write_and_fsync(void *arg)
{
	struct worker *w = arg;
	int fd = open_file(w->dir, "fsync", w->index, O_WRONLY);
	uint64_t state = w->index + 1;
	double end;

	for (off_t at = 0; at < (off_t)sizeof(memory); at += sizeof(memory))
		write_all(fd, sizeof(memory), at);
	if (fsync(fd))
		die("fsync");
	end = now() + w->seconds;
	while (now() < end) {
		write_all(fd, BLOCK, (off_t)(random_below(&state, sizeof(memory) / BLOCK) * BLOCK));
		if (fsync(fd))
			die("fsync");
		w->ops++;
	}
	close(fd);
	return NULL;
}

static void churn(const char *dir, double seconds)
{
	double start = now(), t = start;
	unsigned long i = 0;
	char path[4096];

	for (; t < start + seconds; t = now(), i++) {
		int fd;

		if (i >= CHURN_FILES) {
			snprintf(path, sizeof(path), "%s/churn%lu", dir, i % CHURN_FILES);
			unlink(path);
		}
		fd = open_file(dir, "churn", i % CHURN_FILES, O_WRONLY);
		write_all(fd, CHURN_BYTES, 0);
		close(fd);
	}
	printf("{\"files_s\": %.1f}\n", (double)i / (t - start));
	while (i--) {
		snprintf(path, sizeof(path), "%s/churn%lu", dir, i % CHURN_FILES);
		if (unlink(path))
			break;
	}
}

static double used_percent(const char *dir)
{
	struct statvfs st;

	if (statvfs(dir, &st))
		die(dir);
	return 100.0 * (1.0 - (double)st.f_bavail / (double)st.f_blocks);
}

/* Half of what is written goes again, so that what stays lies in pieces. */
static void fill(const char *dir, double percent)
{
	uint64_t state = (uint64_t)(percent * 1000) + 1;
	char path[4096];

	for (unsigned long i = 0; used_percent(dir) < percent; i++) {
		unsigned long name = (unsigned long)(percent * 1000) * 1000000 + i;

		for (unsigned k = 0; k < 2; k++) {
			int fd = open_file(dir, k ? "gone" : "fill", name, O_WRONLY);

			write_all(fd, BLOCK * (1 + random_below(&state, 16)), 0);
			close(fd);
		}
		if (i % 256 == 255) {
			for (unsigned long d = name - 255; d <= name; d++) {
				snprintf(path, sizeof(path), "%s/gone%lu", dir, d);
				unlink(path);
			}
		}
	}
	printf("{\"used\": %.1f}\n", used_percent(dir));
}

static void sparse(const char *path, uint64_t bytes, double seconds, double step)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_DIRECT, 0644); /* or it is the page cache that is measured */
	double start = now(), last = start, t = start, longest = 0;
	uint64_t state = 88172645463325252u, ops = 0, before = 0;
	double begun;

	if (fd < 0 || ftruncate(fd, (off_t)bytes))
		die(path);
	memset(memory, 0, BLOCK); /* the device may hold them without memory (thin.py) */
	while (t < start + seconds) {
		if (pwrite(fd, memory, BLOCK, (off_t)(random_below(&state, bytes / BLOCK) * BLOCK)) != BLOCK) {
			if (errno == ENOSPC)
				break;
			die("write");
		}
		ops++;
		begun = t;
		t = now();
		if (t - begun > longest)
			longest = t - begun;
		if (t < last + step)
			continue;
		printf("{\"seconds\": %.1f, \"writes\": %lu, \"us\": %.2f, \"longest_us\": %.0f}\n", t - start,
		       (unsigned long)ops, (t - last) * 1e6 / (double)(ops - before), longest * 1e6);
		fflush(stdout);
		longest = 0;
		last = t;
		before = ops;
	}
	close(fd);
}

int main(int argc, char **argv)
{
	struct worker *w;
	uint64_t ops = 0;
	double start;
	unsigned n;

	memset(memory, 0x5a, sizeof(memory));
	if (argc >= 4 && !strcmp(argv[1], "churn"))
		churn(argv[2], atof(argv[3]));
	else if (argc >= 4 && !strcmp(argv[1], "fill"))
		fill(argv[2], atof(argv[3]));
	else if (argc >= 6 && !strcmp(argv[1], "sparse"))
		sparse(argv[2], strtoull(argv[3], NULL, 10) << 30, atof(argv[4]), atof(argv[5]));
	if (argc < 5 || (strcmp(argv[1], "append") && strcmp(argv[1], "fsync")))
		return argc < 4;
	n = (unsigned)atoi(argv[3]);
	w = calloc(n, sizeof(*w));
	if (!w)
		die("memory");
	start = now();
	for (unsigned i = 0; i < n; i++)
		w[i] = (struct worker){ .dir = argv[2], .seconds = atof(argv[4]),
					.bytes = strtoull(argv[4], NULL, 10) << 20,
					.step = argc > 5 ? strtoull(argv[5], NULL, 10) << 10 : 0 };
	if (!strcmp(argv[1], "append")) {
		run_workers(w, n, append);
		printf("{\"mib_s\": %.1f}\n", (double)n * (double)(w[0].bytes >> 20) / (now() - start));
	} else {
		run_workers(w, n, write_and_fsync);
		for (unsigned i = 0; i < n; i++)
			ops += w[i].ops;
		printf("{\"iops\": %.1f}\n", (double)ops / w[0].seconds);
	}
	free(w);
	return 0;
}
