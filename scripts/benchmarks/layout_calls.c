/* SPDX-License-Identifier: MIT
 *
 * layout_calls.c - times the calls of the control file, round trip included, from a client without any library.
 *
 *     layout_calls CONTROL DIRECTORY ROUNDS calls          medians of each call
 *     layout_calls CONTROL DIRECTORY ROUNDS growth MAX     GET and COMMIT against the number of extents, to MAX
 *     layout_calls CONTROL DIRECTORY ROUNDS segments MAX   GET, COMMIT, RETURN against the number of grants on the file
 *
 * Prints JSON: microseconds. The files it makes in DIRECTORY are removed. Blocks are committed without having been written:
 * for measurements only.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "extfs_ioctl.h"

#define BLOCK 4096ull
#define PIECE (16 * BLOCK)

static int control;
static uint64_t holder, key;
static const char *directory;

static void die(const char *what)
{
	fprintf(stderr, "layout_calls: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

struct series {
	double *us;
	unsigned n;
};

static struct series series_new(unsigned room)
{
	struct series s = { .us = malloc(room * sizeof(double)) };

	if (!s.us)
		die("memory");
	return s;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double at(struct series *s, double share)
{
	qsort(s->us, s->n, sizeof(double), by_value);
	return s->n ? s->us[(unsigned)(share * (s->n - 1))] : 0;
}

static void say(const char *name, struct series *s, bool last)
{
	printf("  \"%s\": {\"n\": %u, \"median\": %.2f, \"p90\": %.2f, \"p99\": %.2f}%s\n", name, s->n, at(s, 0.5),
	       at(s, 0.9), at(s, 0.99), last ? "" : ",");
	free(s->us);
}

/* ---- the calls ------------------------------------------------------------------------------ */

static struct extfs_handle handle_of(int fd)
{
	struct extfs_ioc_handle h = { .size = sizeof(h) };

	if (ioctl(fd, EXTFS_IOC_HANDLE, &h) < 0)
		die("HANDLE");
	return h.file;
}

static uint64_t register_holder(int fd, uint64_t *k)
{
	struct extfs_ioc_holder reg = { .size = sizeof(reg), .name = "layout_calls" };

	if (ioctl(fd, EXTFS_IOC_HOLDER_REGISTER, &reg) < 0)
		die("HOLDER_REGISTER");
	*k = reg.key;
	return reg.id;
}

#define ROOM 8
union get_call {
	struct extfs_ioc_layout l;
	char room[sizeof(struct extfs_ioc_layout) + ROOM * sizeof(struct extfs_layout_extent)];
};

static double get(struct extfs_handle file, uint64_t offset, uint64_t length, unsigned flags)
{
	union get_call c = { .l = { .size = sizeof(c), .flags = flags, .holder = holder, .key = key, .file = file,
				    .iomode = EXTFS_RW, .count = ROOM, .offset = offset, .length = length } };
	double t = now_us();

	if (ioctl(control, EXTFS_IOC_LAYOUT_GET(ROOM), &c) < 0)
		die("LAYOUT_GET");
	return now_us() - t;
}

static double commit(struct extfs_handle file, uint64_t offset, uint64_t length, unsigned flags)
{
	struct {
		struct extfs_ioc_commit c;
		struct extfs_range range[1];
	} call = { .c = { .size = sizeof(call), .flags = flags, .holder = holder, .key = key, .file = file,
			  .file_size = offset + length, .count = 1 } };
	double t;

	call.range[0] = (struct extfs_range){ offset, length };
	t = now_us();
	if (ioctl(control, EXTFS_IOC_LAYOUT_COMMIT(1), &call) < 0)
		die("LAYOUT_COMMIT");
	return now_us() - t;
}

static double commit_many(struct extfs_handle file, const struct extfs_range *ranges, unsigned n, unsigned flags)
{
	size_t bytes = sizeof(struct extfs_ioc_commit) + n * sizeof(*ranges);
	struct extfs_ioc_commit *c = calloc(1, bytes);
	double t;

	*c = (struct extfs_ioc_commit){ .size = bytes, .flags = flags, .holder = holder, .key = key, .file = file,
					.file_size = ranges[n - 1].offset + ranges[n - 1].length, .count = n };
	memcpy(c->ranges, ranges, n * sizeof(*ranges));
	t = now_us();
	if (write(control, c, bytes) != (ssize_t)bytes)
		die("write of a commit");
	t = now_us() - t;
	free(c);
	return t;
}

static double give_back(int ctl, uint64_t who, uint64_t k, struct extfs_handle file, uint64_t offset, uint64_t length)
{
	struct extfs_ioc_return r = { .size = sizeof(r), .holder = who, .key = k, .file = file, .iomode = EXTFS_ANY,
				      .offset = offset, .length = length };
	double t = now_us();

	if (ioctl(ctl, EXTFS_IOC_LAYOUT_RETURN, &r) < 0)
		die("LAYOUT_RETURN");
	return now_us() - t;
}

static int make_file(const char *name, int flags)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	unlink(path);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | flags, 0600);
	if (fd < 0)
		die(path);
	return fd;
}

static void remove_file(const char *name, int fd)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	close(fd);
	unlink(path);
}

static void *aligned(size_t len)
{
	void *p;

	if (posix_memalign(&p, 4096, len))
		die("memory");
	memset(p, 0x5a, len);
	return p;
}

/* ---- recall --------------------------------------------------------------------------------- */

struct responder {
	int control, told;
	uint64_t holder, key;
	volatile bool stop;
};

static void *respond(void *arg)
{
	struct responder *r = arg;
	struct pollfd p = { .fd = r->told, .events = POLLIN };
	struct extfs_event ev;
	char word;

	while (!r->stop) {
		if (poll(&p, 1, 100) <= 0 || read(r->told, &word, 1) != 1)
			continue;
		while (read(r->control, &ev, sizeof(ev)) == sizeof(ev))
			if (ev.type == EXTFS_EVENT_RECALL)
				give_back(r->control, r->holder, r->key, ev.file, ev.offset, ev.length);
	}
	return NULL;
}

/* A socket that is readable when there are events. */
static int event_socket(int fd)
{
	struct extfs_ioc_event_socket c = { .size = sizeof(c) };
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) < 0)
		die("socketpair");
	c.fd = ends[1];
	if (ioctl(fd, EXTFS_IOC_EVENT_SOCKET, &c) < 0)
		die("EVENT_SOCKET");
	close(ends[1]);
	return ends[0];
}

/* A write through the mount that meets a layout, from its beginning to its end; and the same write without one. */
static void time_recall(const char *path, unsigned rounds, struct series *with, struct series *without)
{
	int fd = make_file("recall", O_DIRECT);
	struct extfs_handle file = handle_of(fd);
	struct responder r = { .control = open(path, O_RDWR | O_NONBLOCK) };
	void *buf = aligned(PIECE);
	pthread_t thread;

	if (r.control < 0)
		die(path);
	r.told = event_socket(r.control);
	r.holder = register_holder(r.control, &r.key);
	for (unsigned i = 0; i < 64; i++)
		if (pwrite(fd, buf, PIECE, i * PIECE) != (ssize_t)PIECE)
			die("write");
	if (pthread_create(&thread, NULL, respond, &r))
		die("thread");
	for (unsigned i = 0; i < rounds; i++) {
		uint64_t offset = i % 64 * PIECE;
		union get_call c = { .l = { .size = sizeof(c), .holder = r.holder, .key = r.key, .file = file,
					    .iomode = EXTFS_RW, .count = ROOM, .offset = offset, .length = PIECE } };
		double t;

		if (ioctl(r.control, EXTFS_IOC_LAYOUT_GET(ROOM), &c) < 0)
			die("LAYOUT_GET");
		t = now_us();
		if (pwrite(fd, buf, BLOCK, offset) != (ssize_t)BLOCK)
			die("write");
		with->us[with->n++] = now_us() - t;
		t = now_us();
		if (pwrite(fd, buf, BLOCK, offset) != (ssize_t)BLOCK)
			die("write");
		without->us[without->n++] = now_us() - t;
	}
	r.stop = true;
	pthread_join(thread, NULL);
	close(r.told);
	close(r.control);
	free(buf);
	remove_file("recall", fd);
}

/* ---- calls ---------------------------------------------------------------------------------- */

static void time_mapped(unsigned rounds, struct series *gets, struct series *returns, struct series *trips)
{
	int fd = make_file("mapped", O_DIRECT);
	struct extfs_handle file = handle_of(fd);
	void *buf = aligned(1 << 20);

	for (unsigned i = 0; i < 64; i++)
		if (pwrite(fd, buf, 1 << 20, (uint64_t)i << 20) != 1 << 20)
			die("write");
	fsync(fd);
	get(file, 0, PIECE, 0); /* the first of a file says durably who is there */
	for (unsigned i = 0; i < rounds; i++) {
		uint64_t offset = (uint64_t)(rand() % 1024) * PIECE;
		double t = now_us();

		handle_of(fd);
		trips->us[trips->n++] = now_us() - t;
		gets->us[gets->n++] = get(file, offset, PIECE, 0);
		returns->us[returns->n++] = give_back(control, holder, key, file, offset, PIECE);
	}
	free(buf);
	remove_file("mapped", fd);
}

static void time_new(unsigned rounds, struct series *gets, struct series *durable, struct series *lazy)
{
	int fd = make_file("new", 0);
	struct extfs_handle file = handle_of(fd);

	for (unsigned i = 0; i < rounds; i++) {
		uint64_t offset = (uint64_t)i * 2 * PIECE;

		gets->us[gets->n++] = get(file, offset, 2 * PIECE, 0);
		durable->us[durable->n++] = commit(file, offset, PIECE, 0);
		lazy->us[lazy->n++] = commit(file, offset + PIECE, PIECE, EXTFS_COMMIT_LAZY);
	}
	give_back(control, holder, key, file, 0, UINT64_MAX);
	remove_file("new", fd);
}

static void time_vector(unsigned rounds, struct series *many)
{
	struct extfs_range ranges[1024];

	for (unsigned i = 0; i < rounds; i++) {
		int fd = make_file("vector", 0);
		struct extfs_handle file = handle_of(fd);

		get(file, 0, 2 * 1024 * BLOCK, 0);
		for (unsigned k = 0; k < 1024; k++)
			ranges[k] = (struct extfs_range){ 2 * k * BLOCK, BLOCK };
		many->us[many->n++] = commit_many(file, ranges, 1024, 0);
		give_back(control, holder, key, file, 0, UINT64_MAX);
		remove_file("vector", fd);
	}
}

static void calls(const char *path, unsigned rounds)
{
	struct series trips = series_new(rounds), gets = series_new(rounds), returns = series_new(rounds);
	struct series news = series_new(rounds), durable = series_new(rounds), lazy = series_new(rounds);
	struct series many = series_new(rounds), with = series_new(rounds), without = series_new(rounds);

	time_mapped(rounds, &gets, &returns, &trips);
	time_new(rounds, &news, &durable, &lazy);
	time_vector(rounds / 20 + 5, &many);
	time_recall(path, rounds / 4 + 10, &with, &without);
	printf("{\n");
	say("round trip of an ioctl", &trips, false);
	say("LAYOUT_GET, mapped", &gets, false);
	say("LAYOUT_RETURN", &returns, false);
	say("LAYOUT_GET, allocates, durable", &news, false);
	say("LAYOUT_COMMIT, durable", &durable, false);
	say("LAYOUT_COMMIT, lazy", &lazy, false);
	say("LAYOUT_COMMIT of 1,024 ranges", &many, false);
	say("write that recalls a layout", &with, false);
	say("the same write, nothing to recall", &without, true);
	printf("}\n");
}

/* ---- growth --------------------------------------------------------------------------------- */

static void point(struct extfs_handle file, uint64_t blocks, uint64_t extents, unsigned rounds, bool first)
{
	struct series gets = series_new(rounds), commits = series_new(rounds);

	for (unsigned i = 0; i < rounds; i++) {
		uint64_t block = ((uint64_t)rand() << 8 ^ rand()) % (blocks / 4) * 4;

		gets.us[gets.n++] = get(file, block * BLOCK, 2 * BLOCK, 0);
		commits.us[commits.n++] = commit(file, block * BLOCK, BLOCK, EXTFS_COMMIT_LAZY);
	}
	printf("%s  {\"extents\": %llu, \"get\": %.2f, \"commit\": %.2f}", first ? "" : ",\n",
	       (unsigned long long)extents, at(&gets, 0.5), at(&commits, 0.5));
	free(gets.us);
	free(commits.us);
}

/* Every second block of a file becomes written, so each block is an extent record of its own. */
static void growth(uint64_t max, unsigned rounds)
{
	struct extfs_range *ranges = calloc(16384, sizeof(*ranges));
	int fd = make_file("growth", 0);
	struct extfs_handle file = handle_of(fd);
	uint64_t done = 0, next = 1000;
	bool first = true;

	if (!ranges)
		die("memory");
	printf("[\n");
	for (uint64_t block = 0; done < max;) {
		unsigned n = 0;
		uint64_t want = next - done < 16384 ? next - done : 16384;

		get(file, block * BLOCK, 2 * ((want + 1) / 2) * BLOCK, 0);
		for (; n < (want + 1) / 2; n++, block += 2)
			ranges[n] = (struct extfs_range){ block * BLOCK, BLOCK };
		commit_many(file, ranges, n, EXTFS_COMMIT_LAZY);
		done += 2 * n;
		if (done >= next) {
			point(file, block, done, rounds, first);
			first = false;
			next = done * 10 / 3;
			if (next > max && done < max)
				next = max;
		}
	}
	printf("\n]\n");
	give_back(control, holder, key, file, 0, UINT64_MAX);
	free(ranges);
	remove_file("growth", fd);
}

/* Grants that do not touch: each a segment. */
static void segments(uint64_t max, unsigned rounds)
{
	int fd = make_file("segments", 0);
	struct extfs_handle file = handle_of(fd);
	uint64_t next = 1000;
	bool first = true;

	if (posix_fallocate(fd, 0, (off_t)(2 * max * BLOCK)))
		die("fallocate");
	printf("[\n");
	for (uint64_t i = 0; i < max; i++) {
		get(file, 2 * i * BLOCK, BLOCK, 0);
		if (i + 1 < next && i + 1 < max)
			continue;
		struct series gets = series_new(rounds), returns = series_new(rounds);

		for (unsigned k = 0; k < rounds; k++) {
			uint64_t block = ((uint64_t)rand() << 8 ^ rand()) % i * 2 + 1;

			gets.us[gets.n++] = get(file, block * BLOCK, BLOCK, 0);
			returns.us[returns.n++] = give_back(control, holder, key, file, block * BLOCK, BLOCK);
		}
		printf("%s  {\"segments\": %llu, \"get\": %.2f, \"return\": %.2f}", first ? "" : ",\n",
		       (unsigned long long)(i + 1), at(&gets, 0.5), at(&returns, 0.5));
		first = false;
		next = (i + 1) * 10 / 3;
		free(gets.us);
		free(returns.us);
	}
	printf("\n]\n");
	give_back(control, holder, key, file, 0, UINT64_MAX);
	remove_file("segments", fd);
}

int main(int argc, char **argv)
{
	unsigned rounds = argc > 3 ? (unsigned)atoi(argv[3]) : 0;

	if (argc < 5 || !rounds) {
		fprintf(stderr, "usage: layout_calls CONTROL DIRECTORY ROUNDS calls | growth MAX | segments MAX\n");
		return 2;
	}
	directory = argv[2];
	control = open(argv[1], O_RDWR);
	if (control < 0)
		die(argv[1]);
	holder = register_holder(control, &key);
	if (!strcmp(argv[4], "calls"))
		calls(argv[1], rounds);
	else if (!strcmp(argv[4], "growth") && argc > 5)
		growth(strtoull(argv[5], NULL, 10), rounds);
	else if (!strcmp(argv[4], "segments") && argc > 5)
		segments(strtoull(argv[5], NULL, 10), rounds);
	else
		return 2;
	return 0;
}
