/* SPDX-License-Identifier: MIT
 *
 * nfs_samples.c - tells where the kernel of a machine with one CPU spends its time while a command runs.
 *
 *   nfs_samples MICROSECONDS OUTPUT COMMAND...
 *
 * Samples the CPU at this interval, by the kernel's software clock event (perf_event_open(2)): an emulated CPU has no
 * counters. OUTPUT gets a line for each stack that was seen: how often, and its functions from the innermost outwards, with
 * the module of those that are in one. Samples of user space are one line, "user"; of the idle task, "idle".
 */
#include <errno.h>
#include <linux/perf_event.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define RING_PAGES 256 /* a power of two */
#define PAGE 4096
#define DEPTH 64 /* functions of a stack */
#define STACKS (1 << 16)

struct symbol {
	uint64_t address;
	char *name;
};

struct stack {
	uint64_t count;
	uint32_t depth;
	uint64_t functions[DEPTH]; /* addresses of their symbols; 0: idle; 1: user */
};

struct sample {
	struct perf_event_header header;
	uint64_t ip;
	uint32_t pid, tid;
	uint64_t depth;
	uint64_t chain[];
};

static struct symbol *symbols;
static size_t symbol_count;
static struct stack stacks[STACKS];
static uint64_t lost;

static void die(const char *what)
{
	fprintf(stderr, "nfs_samples: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int by_address(const void *a, const void *b)
{
	uint64_t x = ((const struct symbol *)a)->address, y = ((const struct symbol *)b)->address;

	return x < y ? -1 : x > y;
}

static void read_symbols(void)
{
	FILE *file = fopen("/proc/kallsyms", "r");
	char line[512], name[256], module[128], kind;
	unsigned long long address;
	size_t room = 0;

	if (!file)
		die("/proc/kallsyms");
	while (fgets(line, sizeof(line), file)) {
		int fields = sscanf(line, "%llx %c %255s [%127[^]]", &address, &kind, name, module);

		if (fields < 3 || (kind != 't' && kind != 'T'))
			continue;
		if (symbol_count == room) {
			room = room ? room * 2 : 1 << 16;
			symbols = realloc(symbols, room * sizeof(*symbols));
			if (!symbols)
				die("memory");
		}
		symbols[symbol_count].address = address;
		if (asprintf(&symbols[symbol_count].name, fields == 4 ? "%s[%s]" : "%s", name, module) < 0)
			die("memory");
		symbol_count++;
	}
	fclose(file);
	qsort(symbols, symbol_count, sizeof(*symbols), by_address);
}

/* The last symbol that is not behind the address. */
static const struct symbol *symbol_of(uint64_t address)
{
	size_t low = 0, high = symbol_count;

	while (high - low > 1) {
		size_t middle = (low + high) / 2;

		if (symbols[middle].address <= address)
			low = middle;
		else
			high = middle;
	}
	return &symbols[low];
}

static void add(const struct stack *seen)
{
	uint64_t hash = 14695981039346656037u;
	size_t slot;

	for (uint32_t i = 0; i < seen->depth; i++)
		hash = (hash ^ seen->functions[i]) * 1099511628211u;
	slot = hash % STACKS;
	for (size_t i = 0; i < STACKS; i++, slot = (slot + 1) % STACKS) {
		struct stack *at = &stacks[slot];

		if (!at->count)
			*at = *seen;
		if (at->depth == seen->depth &&
		    !memcmp(at->functions, seen->functions, seen->depth * sizeof(seen->functions[0]))) {
			at->count++;
			return;
		}
	}
	lost++;
}

static void take(const struct sample *sample)
{
	struct stack seen = { .count = 0 };
	int user = (sample->header.misc & PERF_RECORD_MISC_CPUMODE_MASK) != PERF_RECORD_MISC_KERNEL;

	if (user || !sample->pid) {
		seen.functions[seen.depth++] = user;
	} else {
		for (uint64_t i = 0; i < sample->depth && seen.depth < DEPTH; i++)
			if (sample->chain[i] < PERF_CONTEXT_MAX)
				seen.functions[seen.depth++] = symbol_of(sample->chain[i])->address;
	}
	if (seen.depth)
		add(&seen);
}

static void drain(struct perf_event_mmap_page *ring)
{
	static unsigned char record[1 << 16];
	unsigned char *bytes = (unsigned char *)ring + PAGE;
	uint64_t size = (uint64_t)RING_PAGES * PAGE, tail = ring->data_tail;
	uint64_t head = __atomic_load_n(&ring->data_head, __ATOMIC_ACQUIRE);

	while (tail < head) {
		struct perf_event_header header;

		for (size_t i = 0; i < sizeof(header); i++)
			record[i] = bytes[(tail + i) % size];
		memcpy(&header, record, sizeof(header));
		for (size_t i = sizeof(header); i < header.size; i++)
			record[i] = bytes[(tail + i) % size];
		if (header.type == PERF_RECORD_SAMPLE)
			take((const struct sample *)record);
		else if (header.type == PERF_RECORD_LOST)
			lost += *(uint64_t *)(record + sizeof(header) + 8);
		tail += header.size;
	}
	__atomic_store_n(&ring->data_tail, tail, __ATOMIC_RELEASE);
}

static void write_stacks(const char *path)
{
	FILE *file = fopen(path, "w");

	if (!file)
		die(path);
	for (size_t i = 0; i < STACKS; i++) {
		if (!stacks[i].count)
			continue;
		fprintf(file, "%lu", (unsigned long)stacks[i].count);
		for (uint32_t j = 0; j < stacks[i].depth; j++) {
			uint64_t at = stacks[i].functions[j];

			fprintf(file, "%c%s", j ? ';' : ' ', at == 0 ? "idle" : at == 1 ? "user" : symbol_of(at)->name);
		}
		fputc('\n', file);
	}
	if (lost)
		fprintf(file, "%lu lost\n", (unsigned long)lost);
	if (fclose(file))
		die(path);
}

int main(int argc, char **argv)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_SOFTWARE,
		.size = sizeof(attr),
		.config = PERF_COUNT_SW_CPU_CLOCK,
		.sample_type = PERF_SAMPLE_IP | PERF_SAMPLE_TID | PERF_SAMPLE_CALLCHAIN,
		.exclude_callchain_user = 1,
		.watermark = 1,
		.wakeup_watermark = RING_PAGES * PAGE / 2,
	};
	struct perf_event_mmap_page *ring;
	int fd, status = 0;
	pid_t child;

	if (argc < 4) {
		fprintf(stderr, "usage: nfs_samples MICROSECONDS OUTPUT COMMAND...\n");
		return 2;
	}
	attr.sample_period = strtoull(argv[1], NULL, 10) * 1000;
	read_symbols();
	fd = (int)syscall(SYS_perf_event_open, &attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC);
	if (fd < 0)
		die("perf_event_open");
	ring = mmap(NULL, (RING_PAGES + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ring == MAP_FAILED)
		die("mmap");
	child = fork();
	if (child < 0)
		die("fork");
	if (!child) {
		execvp(argv[3], argv + 3);
		die(argv[3]);
	}
	while (waitpid(child, &status, WNOHANG) == 0) {
		struct pollfd ready = { .fd = fd, .events = POLLIN };

		poll(&ready, 1, 100);
		drain(ring);
	}
	ioctl(fd, PERF_EVENT_IOC_DISABLE, 0);
	drain(ring);
	write_stacks(argv[2]);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
