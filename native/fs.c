/* SPDX-License-Identifier: MIT
 *
 * fs.c - opening and closing a filesystem: the order in which its modules come and go.
 *
 * Opening goes up the layers, closing down again; whatever fails half-way is undone in the same
 * order. Nothing but the superblock, the heartbeat and the journal is read before the replay.
 */
#include "fs.h"

#include <stdarg.h>
#include <string.h>

#include "alloc.h"
#include "file_early.h"
#include "heartbeat.h"
#include "inode.h"
#include "journal.h"
#include "layout.h"
#include "log.h"
#include "reaper.h"

#define CACHE_DEFAULT (64u << 20)
#define INODE_CACHE_DEFAULT 16384u
#define COMMIT_MS_DEFAULT 1000u
#define RECALL_MS_DEFAULT 10000u
/* Inodes whose times are written back at once, before a timed commit. */
#define LAZY_BATCH 256u

void fs_shutdown_writes(struct fs *fs, int code, const char *fmt, ...)
{
	char what[256];
	va_list ap;

	if (buf_unasked || atomic_exchange(&fs->shutdown, true))
		return;
	atomic_store(&fs->shutdown_code, code);
	va_start(ap, fmt);
	vsnprintf(what, sizeof(what), fmt, ap);
	va_end(ap);
	log_msg(LOG_ERROR, "%s: %s (%s); the filesystem is read-only from now on", what,
		err_text(code), err_name(code));
}

/* Journal thread, before a timed commit. */
static void write_lazy_times(struct fs *fs)
{
	int left = inode_flush_lazy(fs, LAZY_BATCH);

	while (left > 0) {
		int now = inode_flush_lazy(fs, LAZY_BATCH);

		if (now >= left)
			break;
		left = now;
	}
	/* Errors (a full journal, too) leave them lazy: the next time will do. */
	if (left)
		jrn_note_lazy(fs);
}

/* The last ones, at unmount, in a thread that may wait. */
static void write_last_lazy_times(struct fs *fs)
{
	for (;;) {
		int left = inode_flush_lazy(fs, LAZY_BATCH);

		if (left == -ERR_JOURNAL_FULL && jrn_wait_space_blocking(fs) == 0)
			continue;
		if (left > 0)
			continue;
		if (left < 0 && !fs_is_shutdown(fs))
			log_msg(LOG_WARN, "times of files could not be written: %s",
				err_text(left));
		return;
	}
}

static int check_features(const struct fs *fs)
{
	if (fs->super.ro_compat && !fs->read_only) {
		log_msg(LOG_ERROR, "features %#llx allow this version to mount read-only only",
			(unsigned long long)fs->super.ro_compat);
		return -EROFS;
	}
	return 0;
}

static void set_defaults(struct fs_options *opt)
{
	if (!opt->cache_bytes)
		opt->cache_bytes = CACHE_DEFAULT;
	if (!opt->inode_cache)
		opt->inode_cache = INODE_CACHE_DEFAULT;
	if (!opt->commit_ms)
		opt->commit_ms = COMMIT_MS_DEFAULT;
	if (!opt->recall_ms)
		opt->recall_ms = RECALL_MS_DEFAULT;
}

static struct fs *fs_new(struct device *dev, const struct fs_options *opt)
{
	struct fs *fs = calloc(1, sizeof(*fs));
	pthread_rwlockattr_t attr;

	if (!fs)
		return NULL;
	fs->dev = dev;
	if (opt)
		fs->opt = *opt;
	set_defaults(&fs->opt);
	fs->read_only = fs->opt.read_only;
	pthread_rwlockattr_init(&attr);
	/* Readers come without end; the journal must not starve. */
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&fs->lock, &attr);
	pthread_rwlockattr_destroy(&attr);
	return fs;
}

/* Everything that has been opened, from the top down. Threads have stopped. */
static void fs_free(struct fs *fs)
{
	reaper_destroy(fs);
	layouts_destroy(fs); /* its grants hold inodes */
	early_destroy(fs);
	if (fs->inodes)
		inode_table_destroy(fs);
	if (fs->alloc)
		alloc_close(fs);
	if (fs->root)
		buf_put(fs->root);
	jrn_close(fs);
	buf_cache_destroy(fs);
	trans_pool_destroy(fs);
	pthread_rwlock_destroy(&fs->lock);
	free(fs);
}

static int open_journal(struct fs *fs)
{
	struct jrn_replay_report report;
	int err = jrn_open(fs, &report);

	if (err == -EROFS)
		log_msg(LOG_ERROR,
			"the journal has %llu records to replay: a read-only mount must wait for a "
			"writable one",
			(unsigned long long)report.records);
	if (!err && !report.clean)
		log_msg(LOG_NOTE, "journal replayed: %llu records, %llu blocks",
			(unsigned long long)report.records, (unsigned long long)report.images);
	return err;
}

static int open_layers(struct fs *fs)
{
	int err = super_read(fs->dev, &fs->super);

	if (!err)
		err = check_features(fs);
	if (!err && fs->dev->read_only && !fs->read_only)
		err = -EROFS;
	if (!err && !fs->opt.no_heartbeat)
		err = heartbeat_check(fs->dev, fs->super.uuid);
	if (!err)
		err = open_journal(fs);
	if (!err)
		err = trans_pool_create(fs);
	if (!err)
		err = buf_cache_create(fs, fs->opt.cache_bytes);
	if (!err)
		err = buf_get(fs, ROOT_BLOCK, &buf_type_root, 0, &fs->root);
	if (!err)
		err = alloc_open(fs);
	if (!err)
		err = inode_table_create(fs);
	if (!err)
		err = early_create(fs);
	if (!err)
		err = reaper_prepare(fs);
	/* Who held what before: known before anything is freed. */
	if (!err)
		err = layouts_open(fs);
	if (!err)
		fs->layout_hooks = &layouts_hooks;
	return err;
}

static int start_threads(struct fs *fs)
{
	int err;

	if (fs->read_only)
		return 0;
	jrn_set_prepare(fs, write_lazy_times);
	err = jrn_start(fs, fs->opt.commit_ms);
	if (!err && !fs->opt.no_heartbeat)
		err = heartbeat_start(fs, fs->opt.heartbeat_ms);
	if (!err)
		err = reaper_start(fs);
	if (!err)
		err = layouts_start(fs);
	return err;
}

int fs_open(struct device *dev, const struct fs_options *opt, struct fs **out)
{
	struct fs *fs = fs_new(dev, opt);
	int err;

	if (!fs)
		return -ENOMEM;
	log_forget_repeats();
	err = open_layers(fs);
	if (!err)
		err = start_threads(fs);
	if (err) {
		atomic_store(&fs->shutdown, true);
		jrn_abandon(fs);
		layouts_stop(fs);
		reaper_stop(fs);
		heartbeat_stop(fs, true);
		fs_free(fs);
		return err;
	}
	*out = fs;
	return 0;
}

int fs_close(struct fs *fs)
{
	struct device *dev = fs->dev;
	int err = 0;

	layouts_stop(fs);
	if (!fs->read_only) {
		reaper_stop(fs);
		write_last_lazy_times(fs);
		err = jrn_stop(fs);
		if (!err && fs_is_shutdown(fs))
			err = fs_shutdown_cause(fs);
		heartbeat_stop(fs, true);
	}
	fs_free(fs);
	dev_close(dev);
	return err;
}

void fs_abandon(struct fs *fs)
{
	struct device *dev = fs->dev;

	if (!fs->read_only) {
		/* First nothing may change or become durable any more; then the reaper, which may
		 * wait for it, ends. */
		atomic_store(&fs->shutdown, true);
		jrn_abandon(fs);
		layouts_stop(fs);
		reaper_stop(fs);
		heartbeat_stop(fs, false);
	}
	fs_free(fs);
	dev_close(dev);
}
