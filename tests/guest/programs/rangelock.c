/*
 * rangelock FILE read|write START LENGTH [SECONDS]: a POSIX lock on a byte range (LENGTH 0: to the
 * end of the file), by fcntl(2).
 *
 * Prints "locked", and keeps the lock for SECONDS; or "conflict", at once, and exits with 1.
 * Exit 2: something else went wrong, told on standard error.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct flock lock = { .l_whence = SEEK_SET };
	int fd;

	if (argc < 5) {
		fprintf(stderr, "usage: rangelock FILE read|write START LENGTH [SECONDS]\n");
		return 2;
	}
	fd = open(argv[1], O_RDWR);
	if (fd < 0) {
		perror(argv[1]);
		return 2;
	}
	lock.l_type = strcmp(argv[2], "write") ? F_RDLCK : F_WRLCK;
	lock.l_start = atoll(argv[3]);
	lock.l_len = atoll(argv[4]);
	if (fcntl(fd, F_SETLK, &lock) < 0) {
		if (errno == EAGAIN || errno == EACCES) {
			puts("conflict");
			return 1;
		}
		perror("fcntl");
		return 2;
	}
	puts("locked");
	fflush(stdout);
	if (argc > 5)
		sleep((unsigned int)atoi(argv[5]));
	return 0;
}
