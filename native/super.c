/* SPDX-License-Identifier: MIT
 *
 * super.c - the superblock's two copies, and the verifier of the root block.
 */
#include <string.h>

#include "btree.h"
#include "fs.h"
#include "log.h"

/* Features this version knows: none beyond version 1 yet. */
#define COMPAT_KNOWN 0u
#define RO_COMPAT_KNOWN 0u
#define INCOMPAT_KNOWN 0u

static int check_shape(const struct super_disk *d)
{
	uint64_t total = get64(d->total_blocks), ag = get64(d->ag_blocks);
	uint64_t start = get64(d->journal_start), blocks = get64(d->journal_blocks);
	uint32_t count = get32(d->ag_count);

	if (get32(d->block_size) != BLOCK_SIZE || total < DEVICE_MIN_BLOCKS ||
	    total > DEVICE_MAX_BLOCKS)
		return -ERR_RECORD_SHAPE;
	/* The last AG has at least one block, and less than two AGs' worth. */
	if (!count || count > AG_MAX_COUNT || ag < AG_MIN_BLOCKS || ag > total ||
	    (uint64_t)(count - 1) * ag >= total || total - (uint64_t)(count - 1) * ag >= 2 * ag)
		return -ERR_RECORD_SHAPE;
	if (start != JOURNAL_START_BLOCK || blocks < JOURNAL_MIN_BLOCKS ||
	    blocks > JOURNAL_MAX_BLOCKS || start + blocks > (count == 1 ? total : ag))
		return -ERR_RECORD_SHAPE;
	if (get64(d->root_inode) != 1 || get64(d->super_copy) != SUPER_COPY_BLOCK)
		return -ERR_RECORD_SHAPE;
	return 0;
}

static int check_copy(const struct super_disk *d, fsblock_t place)
{
	int err = meta_verify(d, MAGIC_SUPER, place, d->hdr.uuid, OWNER_ANY);
	bool known = get32(d->version) == FORMAT_VERSION &&
		     !(get64(d->incompat) & ~(uint64_t)INCOMPAT_KNOWN);

	/* A later version may have another shape: that is no damage. */
	return err || !known ? err : check_shape(d);
}

static void decode(const struct super_disk *d, struct super *out)
{
	memset(out, 0, sizeof(*out));
	memcpy(out->uuid, d->hdr.uuid, FORMAT_UUID_LEN);
	memcpy(out->label, d->label, FORMAT_LABEL_LEN);
	out->compat = get64(d->compat);
	out->ro_compat = get64(d->ro_compat);
	out->incompat = get64(d->incompat);
	out->total_blocks = get64(d->total_blocks);
	out->ag_blocks = get64(d->ag_blocks);
	out->ag_count = get32(d->ag_count);
	out->journal_start = get64(d->journal_start);
	out->journal_blocks = get64(d->journal_blocks);
	out->hash_key[0] = get64(d->hash_key[0]);
	out->hash_key[1] = get64(d->hash_key[1]);
	out->root_inode = get64(d->root_inode);
	out->created_sec = (int64_t)get64(d->created_sec);
}

/* Read one copy into block. -ERR_META_*, -ERR_RECORD_SHAPE: not usable; else -ERR_DEV_READ. */
static int read_copy(struct device *dev, fsblock_t place, void *block)
{
	int err;

	if ((place + 1) << BLOCK_SHIFT > dev->size)
		return -ERR_META_MAGIC;
	err = dev_read(dev, place << BLOCK_SHIFT, block, BLOCK_SIZE);
	return err ? err : check_copy(block, place);
}

static int accept(struct device *dev, const struct super_disk *d, struct super *out)
{
	uint64_t unknown = get64(d->incompat) & ~(uint64_t)INCOMPAT_KNOWN;

	if (get32(d->version) != FORMAT_VERSION || unknown) {
		log_msg(LOG_ERROR,
			"the filesystem has format version %u and features %#llx that this version "
			"does not know",
			get32(d->version), (unsigned long long)unknown);
		return -ERR_INCOMPAT;
	}
	decode(d, out);
	if (dev->size >> BLOCK_SHIFT < out->total_blocks) {
		log_msg(LOG_ERROR, "the filesystem has %llu blocks, the device only %llu",
			(unsigned long long)out->total_blocks,
			(unsigned long long)(dev->size >> BLOCK_SHIFT));
		return -ERR_DEV_SMALL;
	}
	return 0;
}

int super_read(struct device *dev, struct super *out)
{
	void *block = io_alloc(BLOCK_SIZE);
	int first, err;

	if (!block)
		return -ENOMEM;
	first = err = read_copy(dev, SUPER_BLOCK, block);
	if (err)
		err = read_copy(dev, SUPER_COPY_BLOCK, block);
	if (!err) {
		err = accept(dev, block, out);
		if (!err && first) {
			out->from_copy = true;
			log_msg(LOG_WARN,
				"superblock (block %u): %s (%s); using the copy in block %u",
				SUPER_BLOCK, err_text(first), err_name(first), SUPER_COPY_BLOCK);
		}
	} else if (first == -ERR_META_MAGIC && err == -ERR_META_MAGIC) {
		err = -ERR_NOT_EXTFS;
	} else {
		log_msg(LOG_ERROR, "superblock: %s; its copy: %s", err_text(first), err_text(err));
		err = -ERR_SB_DAMAGED;
	}
	io_free(block);
	return err;
}

/* What a rewrite keeps although this version does not know it (compat features may use reserved
 * bytes) is not kept: compat features unknown here must not depend on bytes of the superblock. */
static void encode(const struct super *sb, fsblock_t place, struct super_disk *d)
{
	memset(d, 0, sizeof(*d));
	d->hdr.magic = put32(MAGIC_SUPER);
	d->hdr.block = put64(place);
	memcpy(d->hdr.uuid, sb->uuid, FORMAT_UUID_LEN);
	d->version = put32(FORMAT_VERSION);
	d->block_size = put32(BLOCK_SIZE);
	d->compat = put64(sb->compat);
	d->ro_compat = put64(sb->ro_compat);
	d->incompat = put64(sb->incompat);
	d->total_blocks = put64(sb->total_blocks);
	d->ag_blocks = put64(sb->ag_blocks);
	d->ag_count = put32(sb->ag_count);
	d->journal_start = put64(sb->journal_start);
	d->journal_blocks = put64(sb->journal_blocks);
	d->hash_key[0] = put64(sb->hash_key[0]);
	d->hash_key[1] = put64(sb->hash_key[1]);
	d->root_inode = put64(sb->root_inode);
	d->created_sec = put64((uint64_t)sb->created_sec);
	d->super_copy = put64(SUPER_COPY_BLOCK);
	memcpy(d->label, sb->label, FORMAT_LABEL_LEN);
	meta_seal(d, 0);
}

int super_write(struct device *dev, const struct super *sb)
{
	static const fsblock_t order[] = {SUPER_COPY_BLOCK, SUPER_BLOCK};
	void *block = io_alloc(BLOCK_SIZE);
	int err = 0;

	if (!block)
		return -ENOMEM;
	for (unsigned i = 0; i < ARRAY_LEN(order) && !err; i++) {
		encode(sb, order[i], block);
		err = dev_write(dev, order[i] << BLOCK_SHIFT, block, BLOCK_SIZE, 0);
		if (!err)
			err = dev_flush(dev);
	}
	io_free(block);
	return err;
}

/* ---- root block ---- */

/* Numbers rise by one from FIRST_INODE: nobody comes near. */
#define NEXT_INODE_MAX ((uint64_t)1 << 62)
/* A record takes more than 200 bytes of a leaf. */
#define INODES_A_BLOCK 20u

static int verify_root(const struct fs *fs, const void *block)
{
	const struct root_disk *r = block;
	nblocks_t total = fs->super.total_blocks;

	if (get64(r->free_blocks) > total || get64(r->quarantined_blocks) > total ||
	    get64(r->next_inode) < 2 || get64(r->next_inode) > NEXT_INODE_MAX ||
	    get64(r->inodes) / INODES_A_BLOCK > total)
		return -ERR_RECORD_SHAPE;
	for (unsigned i = 0; i < TREE_ROOT_COUNT; i++) {
		const struct tree_root_disk *t = &r->trees[i];
		uint32_t height = get32(t->height);

		if (height > BT_MAX_HEIGHT || (height == 0) != (get64(t->block) == 0))
			return -ERR_NODE_LEVEL;
		if (get64(t->block) >= total)
			return -ERR_META_RANGE;
	}
	return 0;
}

const struct buf_type buf_type_root = {"root", MAGIC_ROOT, verify_root};
