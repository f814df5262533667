/* SPDX-License-Identifier: MIT
 *
 * log.c - the ring of log lines.
 *
 * Definitions: a line is one stored message. A recent entry remembers a line that was stored less than REPEAT_NS ago,
 * and counts its repeats meanwhile.
 *
 * Invariants, all under log_lock:
 * 1. used lines follow first in the ring, oldest first.
 * 2. The eventfd is readable exactly when used > 0.
 * 3. Lines that found no room are in dropped; they are reported once, when the ring has room again.
 */
#include "log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define LOG_LINES 256u
#define LOG_LINE_LEN 480u
#define RECENT_LINES 8u
#define REPEAT_NS 1000000000ull

struct line {
	enum log_level level;
	char text[LOG_LINE_LEN];
};

struct recent {
	struct line line;
	uint64_t stored_ns; /* 0: entry not in use */
	uint64_t repeats;
};

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static struct line ring[LOG_LINES];
static unsigned first, used;
static uint64_t dropped;
static struct recent recents[RECENT_LINES];
static unsigned next_recent;
static int event_fd = -1;

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static void signal_readable(void)
{
	uint64_t one = 1;

	if (event_fd >= 0 && write(event_fd, &one, sizeof(one)) < 0)
		xassert(errno == EAGAIN); /* counter full: readable already */
}

static void store(enum log_level level, const char *text)
{
	struct line *line;

	if (used == LOG_LINES) {
		dropped++;
		return;
	}
	line = &ring[(first + used) % LOG_LINES];
	line->level = level;
	snprintf(line->text, sizeof(line->text), "%s", text);
	if (used++ == 0)
		signal_readable();
}

static void store_repeats(struct recent *r)
{
	char text[LOG_LINE_LEN + 64];

	snprintf(text, sizeof(text), "%llu more: %s", (unsigned long long)r->repeats, r->line.text);
	r->repeats = 0;
	store(r->line.level, text);
}

static struct recent *find_recent(enum log_level level, const char *text)
{
	for (unsigned i = 0; i < RECENT_LINES; i++) {
		struct recent *r = &recents[i];

		if (r->stored_ns && r->line.level == level && !strcmp(r->line.text, text))
			return r;
	}
	return NULL;
}

static void remember(struct recent *r, enum log_level level, const char *text, uint64_t now)
{
	if (!r) {
		r = &recents[next_recent++ % RECENT_LINES];
		snprintf(r->line.text, sizeof(r->line.text), "%s", text);
		r->line.level = level;
	}
	/* Before the line itself, so that the order of the ring is the order of events. */
	if (r->repeats)
		store_repeats(r);
	r->stored_ns = now;
}

void log_msg(enum log_level level, const char *fmt, ...)
{
	char text[LOG_LINE_LEN];
	struct recent *r;
	uint64_t now = now_ns();
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);

	pthread_mutex_lock(&log_lock);
	r = find_recent(level, text);
	if (r && now - r->stored_ns < REPEAT_NS) {
		r->repeats++;
	} else {
		if (!r && recents[next_recent % RECENT_LINES].repeats)
			store_repeats(&recents[next_recent % RECENT_LINES]);
		remember(r, level, text, now);
		store(level, text);
	}
	pthread_mutex_unlock(&log_lock);
}

void log_forget_repeats(void)
{
	pthread_mutex_lock(&log_lock);
	for (unsigned i = 0; i < RECENT_LINES; i++) {
		if (recents[i].repeats)
			store_repeats(&recents[i]);
		recents[i].stored_ns = 0;
	}
	pthread_mutex_unlock(&log_lock);
}

/* An empty ring is the moment to report what was counted instead of stored. */
static void store_counted(void)
{
	uint64_t now = now_ns();

	if (dropped) {
		char text[80];

		snprintf(text, sizeof(text), "%llu log lines were dropped",
			 (unsigned long long)dropped);
		dropped = 0;
		store(LOG_WARN, text);
	}
	for (unsigned i = 0; i < RECENT_LINES; i++)
		if (recents[i].repeats && now - recents[i].stored_ns >= REPEAT_NS)
			store_repeats(&recents[i]);
}

int log_next(char *buf, size_t len)
{
	int level = 0;
	uint64_t count;

	pthread_mutex_lock(&log_lock);
	if (!used)
		store_counted();
	if (used) {
		struct line *line = &ring[first];

		level = (int)line->level;
		if (len)
			snprintf(buf, len, "%s", line->text);
		first = (first + 1) % LOG_LINES;
		if (--used == 0 && event_fd >= 0 && read(event_fd, &count, sizeof(count)) < 0)
			xassert(errno == EAGAIN);
	}
	pthread_mutex_unlock(&log_lock);
	return level;
}

int log_eventfd(void)
{
	int fd;

	pthread_mutex_lock(&log_lock);
	if (event_fd < 0) {
		event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (used)
			signal_readable();
	}
	fd = event_fd;
	pthread_mutex_unlock(&log_lock);
	return fd;
}
