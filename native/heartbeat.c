/* SPDX-License-Identifier: MIT
 *
 * heartbeat.c - the mounted mark on the device: see heartbeat.h.
 */
#include "heartbeat.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "log.h"

struct heartbeat {
	struct device *dev;
	unsigned interval_ms;
	struct heartbeat_disk *block; /* the whole block; the thread's while it runs */
	struct heartbeat_disk *there; /* what is on the device; the thread's while it runs */
	_Atomic bool replaced;        /* it was somebody else's once: nothing is written any more */
	pthread_t thread;
	pthread_mutex_t mutex;
	pthread_cond_t wake;
	bool stop;
};

/* Identity of this boot; zeros when unknown. */
static void read_boot_id(uint8_t out[16])
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	char text[40];
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text));
	unsigned digits = 0;

	memset(out, 0, 16);
	if (fd >= 0)
		close(fd);
	for (ssize_t i = 0; i < n && digits < 32; i++) {
		char c = text[i];
		unsigned v;

		if (c >= '0' && c <= '9')
			v = (unsigned)(c - '0');
		else if (c >= 'a' && c <= 'f')
			v = (unsigned)(c - 'a' + 10);
		else
			continue;
		out[digits / 2] |= (uint8_t)(digits & 1 ? v : v << 4);
		digits++;
	}
}

static bool all_zero(const uint8_t *p, size_t n)
{
	while (n && !*p)
		p++, n--;
	return n == 0;
}

static int write_beat(struct device *dev, struct heartbeat_disk *h, enum heartbeat_state state)
{
	h->seq = put64(get64(h->seq) + 1);
	h->sec = put64((uint64_t)time(NULL));
	h->state = put32(state);
	meta_seal(h, 0);
	return dev_write(dev, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, h, BLOCK_SIZE, 0);
}

static struct heartbeat_disk *new_block(const uint8_t *uuid)
{
	struct heartbeat_disk *h = io_alloc(BLOCK_SIZE);

	if (!h)
		return NULL;
	memset(h, 0, BLOCK_SIZE);
	h->hdr.magic = put32(MAGIC_HEARTBEAT);
	h->hdr.block = put64(HEARTBEAT_BLOCK);
	memcpy(h->hdr.uuid, uuid, FORMAT_UUID_LEN);
	return h;
}

int heartbeat_format(struct device *dev, const uint8_t *uuid)
{
	struct heartbeat_disk *h = new_block(uuid);
	int err;

	if (!h)
		return -ENOMEM;
	h->interval_ms = put32(HEARTBEAT_MS_DEFAULT);
	meta_seal(h, 0);
	err = dev_write(dev, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, h, BLOCK_SIZE, 0);
	io_free(h);
	return err;
}

/* ---- looking ---- */

static bool valid(const struct heartbeat_disk *h, const uint8_t *uuid)
{
	return meta_verify(h, MAGIC_HEARTBEAT, HEARTBEAT_BLOCK, uuid, OWNER_ANY) == 0;
}

/* Can we know without waiting that whoever wrote it does not run any more? Not from a block we
 * cannot read. */
static bool writer_gone(const struct heartbeat_disk *h)
{
	uint8_t boot_id[16];
	char host[64] = "";
	pid_t pid = (pid_t)get32(h->pid);

	read_boot_id(boot_id);
	gethostname(host, sizeof(host));
	if (all_zero(boot_id, 16) || memcmp(boot_id, h->boot_id, 16) ||
	    strncmp(host, (const char *)h->host, sizeof(host)))
		return false;
	/* Our own process: the device's lock says that this is a mount that was abandoned. */
	return pid == getpid() || (kill(pid, 0) && errno == ESRCH);
}

static void sleep_ms(unsigned ms)
{
	struct timespec ts = {ms / 1000, (long)(ms % 1000) * 1000000};

	while (nanosleep(&ts, &ts) && errno == EINTR)
		;
}

static int read_beat(struct device *dev, struct heartbeat_disk *h)
{
	return dev_read(dev, (uint64_t)HEARTBEAT_BLOCK << BLOCK_SHIFT, h, BLOCK_SIZE);
}

int heartbeat_look(struct device *dev, const uint8_t *uuid)
{
	char *blocks = io_alloc(2 * BLOCK_SIZE);
	struct heartbeat_disk *before = (void *)blocks, *now = (void *)(blocks + BLOCK_SIZE);
	unsigned watch = HEARTBEAT_MS_DEFAULT, waited = 0;
	int err;

	if (!blocks)
		return -ENOMEM;
	err = read_beat(dev, before);
	if (err)
		goto out;
	if (valid(before, uuid)) {
		err = get32(before->state) == HB_MOUNTED;
		if (!err || writer_gone(before))
			goto out;
		watch = MIN(MAX(get32(before->interval_ms), 1), HEARTBEAT_MS_MAX);
	}
	/* Half an interval more than promised: the writer may be a little late. */
	for (int rc; err >= 0 && waited < watch + watch / 2;) {
		unsigned step = MIN(watch / 8 + 1, 250);

		sleep_ms(step);
		waited += step;
		rc = read_beat(dev, now);
		if (rc)
			err = rc;
		if (rc || !memcmp(before, now, BLOCK_SIZE))
			continue;
		err = -ERR_DEV_IN_USE;
		log_msg(LOG_ERROR, "the device is mounted on host %.64s by process %u",
			valid(now, uuid) ? (const char *)now->host : "(unknown)", get32(now->pid));
	}
out:
	io_free(blocks);
	return err;
}

int heartbeat_check(struct device *dev, const uint8_t *uuid)
{
	int how = heartbeat_look(dev, uuid);

	return how < 0 ? how : 0;
}

/* ---- saying ---- */

static bool same_mount(const struct heartbeat_disk *a, const struct heartbeat_disk *b)
{
	return !memcmp(a->mount_id, b->mount_id, sizeof(a->mount_id));
}

/* One more heartbeat, but never over that of another mount: that one would no longer know its
 * device for its own, and we, late by any time, would take it for ours again. */
static int next_beat(struct heartbeat *hb, enum heartbeat_state state)
{
	int err;

	if (atomic_load(&hb->replaced))
		return 0;
	err = read_beat(hb->dev, hb->there);
	if (err)
		return err;
	if (valid(hb->there, hb->block->hdr.uuid) && !same_mount(hb->there, hb->block)) {
		atomic_store(&hb->replaced, true);
		log_msg(LOG_ERROR, "the device was mounted meanwhile on host %.64s by process %u",
			(const char *)hb->there->host, get32(hb->there->pid));
		return 0;
	}
	return write_beat(hb->dev, hb->block, state);
}

static void *heartbeat_thread(void *arg)
{
	struct heartbeat *hb = arg;
	bool failed = false;

	pthread_mutex_lock(&hb->mutex);
	while (!hb->stop) {
		struct timespec until;
		int err;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += hb->interval_ms / 1000;
		until.tv_nsec += (long)(hb->interval_ms % 1000) * 1000000;
		if (until.tv_nsec >= 1000000000) {
			until.tv_sec++;
			until.tv_nsec -= 1000000000;
		}
		while (!hb->stop &&
		       pthread_cond_timedwait(&hb->wake, &hb->mutex, &until) != ETIMEDOUT)
			;
		if (hb->stop)
			break;
		pthread_mutex_unlock(&hb->mutex);
		err = next_beat(hb, HB_MOUNTED);
		if (err && !failed)
			log_msg(LOG_WARN, "the heartbeat cannot be written: %s", err_text(err));
		failed = err != 0;
		pthread_mutex_lock(&hb->mutex);
	}
	pthread_mutex_unlock(&hb->mutex);
	return NULL;
}

static void heartbeat_free(struct heartbeat *hb)
{
	pthread_cond_destroy(&hb->wake);
	pthread_mutex_destroy(&hb->mutex);
	io_free(hb->block);
	io_free(hb->there);
	free(hb);
}

static struct heartbeat *heartbeat_new(struct fs *fs, unsigned interval_ms)
{
	struct heartbeat *hb = calloc(1, sizeof(*hb));
	pthread_condattr_t attr;

	if (!hb)
		return NULL;
	hb->block = new_block(fs->super.uuid);
	hb->there = io_alloc(BLOCK_SIZE);
	if (!hb->block || !hb->there) {
		io_free(hb->block);
		io_free(hb->there);
		free(hb);
		return NULL;
	}
	hb->dev = fs->dev;
	hb->interval_ms = MIN(interval_ms ? interval_ms : HEARTBEAT_MS_DEFAULT, HEARTBEAT_MS_MAX);
	pthread_mutex_init(&hb->mutex, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&hb->wake, &attr);
	pthread_condattr_destroy(&attr);
	return hb;
}

int heartbeat_start(struct fs *fs, unsigned interval_ms)
{
	struct heartbeat *hb = heartbeat_new(fs, interval_ms);
	struct heartbeat_disk *h;
	int err;

	if (!hb)
		return -ENOMEM;
	h = hb->block;
	h->interval_ms = put32(hb->interval_ms);
	h->pid = put32((uint32_t)getpid());
	read_boot_id(h->boot_id);
	gethostname((char *)h->host, sizeof(h->host));
	if (getrandom(h->mount_id, sizeof(h->mount_id), 0) != sizeof(h->mount_id)) {
		heartbeat_free(hb);
		return -EIO;
	}
	err = write_beat(hb->dev, h, HB_MOUNTED);
	if (!err)
		err = -pthread_create(&hb->thread, NULL, heartbeat_thread, hb);
	if (err) {
		heartbeat_free(hb);
		return err;
	}
	fs->heartbeat = hb;
	return 0;
}

/* mount_id never changes while the thread runs. */
int heartbeat_ours(struct fs *fs)
{
	struct heartbeat_disk *h;
	int err;

	if (!fs->heartbeat || atomic_load(&fs->heartbeat->replaced))
		return 0;
	h = io_alloc(BLOCK_SIZE);
	if (!h)
		return -ENOMEM;
	err = read_beat(fs->dev, h);
	if (!err)
		err = valid(h, fs->super.uuid) && get32(h->state) == HB_MOUNTED &&
		      same_mount(h, fs->heartbeat->block);
	io_free(h);
	return err;
}

void heartbeat_stop(struct fs *fs, bool clean)
{
	struct heartbeat *hb = fs->heartbeat;

	if (!hb)
		return;
	pthread_mutex_lock(&hb->mutex);
	hb->stop = true;
	pthread_cond_signal(&hb->wake);
	pthread_mutex_unlock(&hb->mutex);
	pthread_join(hb->thread, NULL);
	if (clean) {
		int err = next_beat(hb, HB_CLEAN);

		if (!err)
			err = dev_flush(hb->dev);
		if (err)
			log_msg(LOG_WARN, "the last heartbeat cannot be written: %s",
				err_text(err));
	}
	heartbeat_free(hb);
	fs->heartbeat = NULL;
}
