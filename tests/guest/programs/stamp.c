/*
 * stamp write [-d] [-f] [-a LOG] FILE SEED OFFSET LENGTH BLOCK: write sectors that tell where they
 * belong. Sector N of a file is 32 times the two little-endian 64-bit words SEED and N + 1.
 *
 *	-d	O_DIRECT
 *	-f	fsync(2) after each block, else once at the end
 *	-a LOG	after each fsync of a block append a line with the end of what is now durable
 *	-t	truncate the file first
 *	-l	write it all again and again, until that fails
 *
 * stamp check [-d] FILE SEED OFFSET LENGTH: compare; prints the first sector that differs, exit 1.
 *
 * OFFSET, LENGTH, BLOCK: bytes, multiples of 512. Exit 2: an operation failed.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR 512
#define BUFFER (1 << 20)

static int failed(const char *what)
{
	fprintf(stderr, "stamp: %s: %s\n", what, strerror(errno));
	return 2;
}

static void fill(uint64_t *buffer, uint64_t seed, uint64_t offset, size_t length)
{
	size_t i;

	for (i = 0; i < length / 16; i++) {
		buffer[2 * i] = seed;
		buffer[2 * i + 1] = (offset + 16 * i) / SECTOR + 1;
	}
}

static int write_all(int fd, const char *buffer, size_t length, off_t offset)
{
	while (length) {
		ssize_t done = pwrite(fd, buffer, length, offset);

		if (done < 0)
			return -1;
		buffer += done;
		length -= (size_t)done;
		offset += done;
	}
	return 0;
}

static int do_write(int fd, uint64_t *buffer, char **argv, int each, int again, int log)
{
	uint64_t seed = strtoull(argv[0], NULL, 0), begin = strtoull(argv[1], NULL, 0);
	uint64_t end = begin + strtoull(argv[2], NULL, 0), block = strtoull(argv[3], NULL, 0);
	uint64_t offset = begin;

	while (offset < end) {
		size_t length = end - offset < block ? end - offset : block;

		fill(buffer, seed, offset, length);
		if (write_all(fd, (char *)buffer, length, (off_t)offset) < 0)
			return failed("write");
		offset += length;
		if (each && fsync(fd) < 0)
			return failed("fsync");
		if (log >= 0)
			dprintf(log, "%llu\n", (unsigned long long)offset);
		if (again && offset == end)
			offset = begin;
	}
	return fsync(fd) < 0 ? failed("fsync") : 0;
}

static int do_check(int fd, uint64_t *buffer, uint64_t *expected, char **argv)
{
	uint64_t seed = strtoull(argv[0], NULL, 0), offset = strtoull(argv[1], NULL, 0);
	uint64_t end = offset + strtoull(argv[2], NULL, 0);
	size_t i;

	while (offset < end) {
		size_t length = end - offset < BUFFER ? end - offset : BUFFER;
		ssize_t got = pread(fd, buffer, length, (off_t)offset);

		if (got < 0)
			return failed("read");
		fill(expected, seed, offset, length);
		for (i = 0; i < length; i += SECTOR) {
			if ((size_t)got >= i + SECTOR &&
			    !memcmp((char *)buffer + i, (char *)expected + i, SECTOR))
				continue;
			printf("differs at byte %llu: ", (unsigned long long)(offset + i));
			if ((size_t)got < i + SECTOR)
				puts("behind the end of the file");
			else
				printf("%016llx %016llx\n", (unsigned long long)buffer[i / 8],
				       (unsigned long long)buffer[i / 8 + 1]);
			return 1;
		}
		offset += length;
	}
	return 0;
}

int main(int argc, char **argv)
{
	int each = 0, again = 0, log = -1, flags = 0, option, writes, fd;
	uint64_t *buffer, *expected;

	if (argc < 2)
		return 2;
	writes = !strcmp(argv[1], "write");
	optind = 2;
	while ((option = getopt(argc, argv, "dftla:")) != -1) {
		if (option == 'd')
			flags |= O_DIRECT;
		else if (option == 'f')
			each = 1;
		else if (option == 't')
			flags |= O_TRUNC;
		else if (option == 'l')
			again = 1;
		else if (option == 'a')
			log = open(optarg, O_WRONLY | O_CREAT | O_APPEND, 0644);
		else
			return 2;
	}
	if (argc - optind != (writes ? 5 : 4)) {
		fprintf(stderr, "usage: stamp write|check [options] FILE SEED OFFSET LENGTH [BLOCK]\n");
		return 2;
	}
	if (posix_memalign((void **)&buffer, 4096, BUFFER) ||
	    posix_memalign((void **)&expected, 4096, BUFFER))
		return failed("memory");
	fd = open(argv[optind], (writes ? O_WRONLY | O_CREAT : O_RDONLY) | flags, 0644);
	if (fd < 0)
		return failed(argv[optind]);
	return writes ? do_write(fd, buffer, argv + optind + 1, each, again, log) :
			do_check(fd, buffer, expected, argv + optind + 1);
}
