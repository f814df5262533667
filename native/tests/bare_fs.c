/* SPDX-License-Identifier: MIT */
#include "bare_fs.h"

#include <string.h>

#include "journal_impl.h"

const struct buf_type bare_type = {"test block", MAGIC_NODE, NULL};

struct sim *bare_sim(uint64_t seed)
{
	static const uint8_t uuid[FORMAT_UUID_LEN] = "bare filesystem";
	const struct mkfs_options opt = {.uuid = uuid, .now_sec = 1, .journal_blocks = JOURNAL_MIN_BLOCKS};
	struct device *dev;
	struct sim *sim;

	xassert(sim_create(48u << 20, 512, seed, &sim) == 0);
	xassert(sim_device(sim, &dev) == 0);
	xassert(fs_mkfs(dev, &opt) == 0);
	dev_close(dev);
	sim_settle(sim);
	return sim;
}

void bare_set_log_position(struct sim *sim, lsn_t lsn)
{
	struct device *dev;
	struct super sb;

	xassert(sim_device(sim, &dev) == 0);
	xassert(super_read(dev, &sb) == 0);
	for (unsigned seq = 2; seq < 4; seq++)
		xassert(jrn_write_header(dev, sb.uuid, sb.journal_start, sb.journal_blocks - 2, seq, lsn,
					 1) == 0);
	dev_close(dev);
	sim_settle(sim);
}

int bare_open(struct sim *sim, unsigned commit_ms, unsigned mutant, struct fs **out)
{
	struct fs *fs = calloc(1, sizeof(*fs));
	int err;

	xassert(fs);
	pthread_rwlock_init(&fs->lock, NULL);
	err = sim_device(sim, &fs->dev);
	xassert(!err);
	fs->opt.mutant = mutant;
	err = super_read(fs->dev, &fs->super);
	if (!err)
		err = jrn_open(fs, NULL);
	if (!err)
		err = trans_pool_create(fs);
	if (!err)
		err = buf_cache_create(fs, 1u << 20);
	if (!err)
		err = jrn_start(fs, commit_ms ? commit_ms : 3600000u);
	if (err)
		bare_abandon(fs);
	else
		*out = fs;
	return err;
}

static void bare_free(struct fs *fs)
{
	jrn_close(fs);
	buf_cache_destroy(fs);
	trans_pool_destroy(fs);
	dev_close(fs->dev);
	pthread_rwlock_destroy(&fs->lock);
	free(fs);
}

int bare_close(struct fs *fs)
{
	int err = jrn_stop(fs);

	bare_free(fs);
	return err;
}

void bare_abandon(struct fs *fs)
{
	jrn_abandon(fs);
	bare_free(fs);
}

void bare_set(struct buf *b, uint64_t value)
{
	char *words = (char *)b->data + sizeof(struct meta_hdr);

	for (size_t i = 0; i < BLOCK_SIZE - sizeof(struct meta_hdr); i += 8)
		memcpy(words + i, &value, 8);
}

bool bare_value(const void *block, uint64_t *value)
{
	const char *words = (const char *)block + sizeof(struct meta_hdr);

	memcpy(value, words, 8);
	for (size_t i = 8; i < BLOCK_SIZE - sizeof(struct meta_hdr); i += 8)
		if (memcmp(words, words + i, 8))
			return false;
	return true;
}

static int begin_waiting(struct fs *fs, struct trans *t, unsigned blocks)
{
	for (;;) {
		int err = trans_begin(fs, t, blocks);

		if (err != -ERR_JOURNAL_FULL)
			return err;
		err = jrn_wait_space_blocking(fs);
		if (err)
			return err;
	}
}

int bare_write(struct fs *fs, unsigned first, unsigned n, uint64_t value, bool create, xid_t *xid)
{
	struct trans t;
	int err = begin_waiting(fs, &t, n);

	if (err)
		return err;
	for (unsigned i = first; i < first + n && !err; i++) {
		struct buf *b;

		err = create ? buf_new(&t, BARE_FIRST + i, &bare_type, BARE_OWNER, &b) :
			       buf_get(fs, BARE_FIRST + i, &bare_type, BARE_OWNER, &b);
		if (err)
			break;
		err = trans_join(&t, b);
		if (!err)
			bare_set(b, value);
		buf_put(b);
	}
	if (err) {
		trans_cancel(&t);
		return err;
	}
	*xid = trans_commit(&t);
	return 0;
}

uint64_t bare_read(struct fs *fs, unsigned index)
{
	uint64_t value;
	struct buf *b;

	fs_rdlock(fs);
	xassert(buf_get(fs, BARE_FIRST + index, &bare_type, BARE_OWNER, &b) == 0);
	xassert(bare_value(b->data, &value));
	buf_put(b);
	fs_unlock(fs);
	return value;
}
