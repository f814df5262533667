/* SPDX-License-Identifier: MIT
 *
 * bridge_cache.c - the kernel's caches as the core sees them: struct cache_ops of fs.h.
 *
 * The core calls from any thread, also while the bridge stops: so it holds no pointer to the
 * bridge, only the filesystem's, by which a call finds the bridge here, and keeps it as long as
 * it lasts.
 */
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "bridge_control.h"
#include "bridge_drop.h"
#include "log.h"

struct attached {
	struct bridge *b;
	struct attached *next;
};

/* Shared: somebody uses a bridge of the list. */
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
static struct attached *list;

/* lock held. */
static struct bridge *bridge_of(const struct fs *fs)
{
	struct attached *a = list;

	while (a && a->b->fs != fs)
		a = a->next;
	return a ? a->b : NULL;
}

static int drop_pages(void *arg, inum_t ino, const struct page_range *ranges, unsigned n,
		      struct page_wait *wait)
{
	struct bridge *b;
	int err;

	pthread_rwlock_rdlock(&lock);
	b = bridge_of(arg);
	err = b ? bridge_notify_pages(b, ino, ranges, n, wait) : -ENODEV;
	pthread_rwlock_unlock(&lock);
	return err;
}

/* Written here and now, so that whoever is told next finds the new size. The kernel takes no lock
 * for it that one of our answers must set free: it drops no page, and an inode that it is about
 * to forget has been written before. */
static void drop_attributes(void *arg, inum_t ino)
{
	struct fuse_notify_inval_inode_out out = {.ino = ino, .off = -1};
	struct fuse_out_header head = {
		.len = sizeof(head) + sizeof(out),
		.error = FUSE_NOTIFY_INVAL_INODE,
	};
	struct iovec parts[] = {{&head, sizeof(head)}, {&out, sizeof(out)}};
	struct bridge *b;

	pthread_rwlock_rdlock(&lock);
	b = bridge_of(arg);
	if (b && writev(b->threads[0].fd, parts, ARRAY_LEN(parts)) < 0 &&
	    !bridge_nobody_waits(errno))
		log_msg(LOG_WARN, "the kernel refused a notification: %s", strerror(errno));
	pthread_rwlock_unlock(&lock);
}

static void name_changed(void *arg, inum_t dir, const char *name, size_t len)
{
	struct bridge *b;

	pthread_rwlock_rdlock(&lock);
	b = bridge_of(arg);
	if (b && b->drops)
		drops_name(b->drops, dir, name, len);
	pthread_rwlock_unlock(&lock);
}

static void bytes_changed(void *arg, inum_t ino, uint64_t start, uint64_t end)
{
	struct bridge *b;

	pthread_rwlock_rdlock(&lock);
	b = bridge_of(arg);
	if (b && b->drops && start < FILE_MAX_BYTES)
		drops_bytes(b->drops, ino, start, end);
	pthread_rwlock_unlock(&lock);
}

static const struct cache_ops ops = {
	.pages = drop_pages, .attributes = drop_attributes, .name_changed = name_changed,
	.bytes_changed = bytes_changed,
};

int cache_attach(struct bridge *b)
{
	struct attached *a = malloc(sizeof(*a));

	if (!a)
		return -ENOMEM;
	pthread_rwlock_wrlock(&lock);
	xassert(!bridge_of(b->fs));
	*a = (struct attached){b, list};
	list = a;
	b->fs->cache_arg = b->fs;
	b->fs->cache_ops = &ops;
	pthread_rwlock_unlock(&lock);
	return 0;
}

void cache_detach(struct bridge *b)
{
	struct attached **at, *a;

	pthread_rwlock_wrlock(&lock);
	for (at = &list; *at && (*at)->b != b; at = &(*at)->next)
		;
	a = *at;
	if (a) {
		b->fs->cache_ops = NULL;
		*at = a->next;
	}
	pthread_rwlock_unlock(&lock);
	free(a);
}
