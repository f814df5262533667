/* SPDX-License-Identifier: MIT
 *
 * nfs_calls.c - sends the same RPC record again and again over a connected socket and tells how long each answer took.
 *
 *   nfs_calls FD RECORD COUNT [POSITION:WIDTH:STEP]...
 *
 * RECORD: file with the marked record. Before each call after the first, the big-endian number of WIDTH (4 or 8) bytes at
 * POSITION grows by STEP. The status of the COMPOUND must be 0 each time. Prints the times in nanoseconds, one a line.
 */
#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define REPLY_STATUS 24 /* behind xid, REPLY, MSG_ACCEPTED, verifier, SUCCESS */

static void die(const char *what)
{
	fprintf(stderr, "nfs_calls: %s\n", what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void all(int fd, unsigned char *at, size_t len, int out)
{
	while (len) {
		ssize_t n = out ? write(fd, at, len) : read(fd, at, len);

		if (n <= 0)
			die(out ? "write failed" : "the server closed the connection");
		at += n;
		len -= (size_t)n;
	}
}

static void grow(unsigned char *record, size_t len, const char *patch)
{
	unsigned long position, width, step;

	if (sscanf(patch, "%lu:%lu:%lu", &position, &width, &step) != 3 || position + width > len)
		die("bad patch");
	if (width == 4) {
		uint32_t v;

		memcpy(&v, record + position, 4);
		v = htobe32(be32toh(v) + (uint32_t)step);
		memcpy(record + position, &v, 4);
	} else {
		uint64_t v;

		memcpy(&v, record + position, 8);
		v = htobe64(be64toh(v) + step);
		memcpy(record + position, &v, 8);
	}
}

static uint32_t call(int fd, unsigned char *record, size_t len, unsigned char *reply, size_t cap)
{
	uint32_t mark, status;

	all(fd, record, len, 1);
	all(fd, (unsigned char *)&mark, 4, 0);
	mark = be32toh(mark) & 0x7fffffff;
	if (mark > cap || mark < REPLY_STATUS + 4)
		die("bad reply");
	all(fd, reply, mark, 0);
	memcpy(&status, reply + REPLY_STATUS, 4);
	return be32toh(status);
}

int main(int argc, char **argv)
{
	static unsigned char record[1 << 16], reply[1 << 20];
	int fd = argc > 3 ? atoi(argv[1]) : -1;
	long count = argc > 3 ? atol(argv[3]) : 0;
	FILE *file = argc > 3 ? fopen(argv[2], "rb") : NULL;
	uint64_t *times = calloc((size_t)(count > 0 ? count : 1), sizeof(*times));
	size_t len;

	if (!file || !times)
		die("usage: FD RECORD COUNT [POSITION:WIDTH:STEP]...");
	len = fread(record, 1, sizeof(record), file);
	for (long i = 0; i < count; i++) {
		uint64_t begin;
		uint32_t status;

		for (int p = 4; i && p < argc; p++)
			grow(record, len, argv[p]);
		begin = now();
		status = call(fd, record, len, reply, sizeof(reply));
		times[i] = now() - begin;
		if (status) {
			fprintf(stderr, "nfs_calls: status %u at call %ld\n", status, i);
			return 1;
		}
	}
	for (long i = 0; i < count; i++)
		printf("%lu\n", (unsigned long)times[i]);
	return 0;
}
