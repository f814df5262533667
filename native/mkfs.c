/* SPDX-License-Identifier: MIT
 *
 * mkfs.c - a new filesystem on a device.
 *
 * Layout. AG 0: superblock, heartbeat, root block, AG header, then as below; the superblock's copy
 * and the journal lie inside it from SUPER_COPY_BLOCK on. Every AG: header, the leaf of each free
 * tree, (AG 0: the leaf of the inode tree,) the first freelist, free blocks. Whatever the size,
 * little is written: a few blocks for each AG.
 *
 * Order: the old superblock is destroyed durably before anything else, the new one is written when
 * all the rest is durable. So an interrupted mkfs leaves no filesystem at all.
 */
#include <blkid/blkid.h>
#include <fcntl.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "btree_node.h"
#include "crc32c.h"
#include "fs.h"
#include "heartbeat.h"
#include "inode.h"
#include "journal.h"
#include "log.h"

#define WIPE_BYTES 65536u
#define ZERO_BYTES (1u << 20)
/* What an allocation in trees of height 1 can need, and some more (alloc_ag.c fills it up as trees
 * grow). */
#define FIRST_FREELIST 16u
#define FIRST_INODE 16u /* numbers 2..15 are reserved */
/* An AG has about 1 GiB, but devices are divided into no more than 64 until that makes an AG 1 TiB
 * large. */
#define AG_NOMINAL_BLOCKS ((nblocks_t)1 << 18)
#define AG_LARGE_BLOCKS ((nblocks_t)1 << 28)
#define AG_COUNT_USUAL 64u
/* Blocks behind the journal that AG 0 keeps for others. */
#define AG0_REST 64u

struct mkfs {
	struct device *dev;
	struct super sb;
	int64_t now_sec;
	nblocks_t free_blocks;
	char *row; /* the first blocks of an AG, written at once */
};

#define ROW_BLOCKS 4u

/* ---- what is on the device now ---- */

static int refuse(const char *what)
{
	log_msg(LOG_ERROR, "the device carries %s; mkfs would destroy it (force is needed)", what);
	return -ERR_FOREIGN_FS;
}

/* Another filesystem, RAID member, partition table ..., as libblkid knows them. */
static int probe_foreign(struct device *dev)
{
	const char *value = NULL;
	char what[160];
	struct stat st;
	blkid_probe pr;
	int r, err = 0;

	/* The simulated device has no path. */
	if (stat(dev->path, &st) || !(S_ISBLK(st.st_mode) || S_ISREG(st.st_mode)))
		return 0;
	pr = blkid_new_probe_from_filename(dev->path);
	if (!pr)
		return -errno ? -errno : -EIO;
	blkid_probe_enable_superblocks(pr, 1);
	blkid_probe_set_superblocks_flags(pr, BLKID_SUBLKS_TYPE | BLKID_SUBLKS_LABEL);
	blkid_probe_enable_partitions(pr, 1);
	r = blkid_do_safeprobe(pr);
	if (r == -2) {
		err = refuse("signatures of several filesystems");
	} else if (r == 0) {
		if (!blkid_probe_lookup_value(pr, "TYPE", &value, NULL))
			snprintf(what, sizeof(what), "a filesystem of type %.100s", value);
		else if (!blkid_probe_lookup_value(pr, "PTTYPE", &value, NULL))
			snprintf(what, sizeof(what), "a partition table of type %.100s", value);
		else
			snprintf(what, sizeof(what), "something that libblkid knows");
		err = refuse(what);
	} else if (r < 0) {
		err = -EIO;
	}
	blkid_free_probe(pr);
	return err;
}

static int check_old_content(struct device *dev, bool force)
{
	struct super old;
	int err = super_read(dev, &old);

	if (err == -ERR_DEV_READ || err == -ENOMEM)
		return err;
	if (!err) {
		/* Never over a mounted one, force or not. */
		err = heartbeat_check(dev, old.uuid);
		if (err || force)
			return err;
		return refuse("an extfs filesystem");
	}
	if (force)
		return 0;
	if (err != -ERR_NOT_EXTFS)
		return refuse("an extfs filesystem (damaged, or of another version)");
	return probe_foreign(dev);
}

/* ---- layout ---- */

static nblocks_t choose_ag_blocks(nblocks_t total)
{
	nblocks_t count;

	if (total < 4 * (nblocks_t)AG_MIN_BLOCKS)
		return MAX(total / MAX(total / AG_MIN_BLOCKS, 1), AG_MIN_BLOCKS);
	count = MIN(MAX(total / AG_NOMINAL_BLOCKS, 4), AG_COUNT_USUAL);
	count = MIN(MAX(count, total / AG_LARGE_BLOCKS), AG_MAX_COUNT);
	return total / count;
}

static int choose_layout(struct super *sb, nblocks_t total, nblocks_t journal)
{
	nblocks_t need;
	uint64_t rest;

	if (total < DEVICE_MIN_BLOCKS) {
		log_msg(LOG_ERROR,
			"a filesystem needs at least %u blocks of 4096 bytes, there are %llu",
			DEVICE_MIN_BLOCKS, (unsigned long long)total);
		return -ERR_DEV_TINY;
	}
	if (!journal)
		journal = MIN(MAX(total / 64, JOURNAL_MIN_BLOCKS), 65536);
	if (journal < JOURNAL_MIN_BLOCKS || journal > JOURNAL_MAX_BLOCKS) {
		log_msg(LOG_ERROR, "a journal has %u to %u blocks", JOURNAL_MIN_BLOCKS,
			JOURNAL_MAX_BLOCKS);
		return -EINVAL;
	}
	/* The journal lies in AG 0 as a whole. */
	need = JOURNAL_START_BLOCK + journal + AG0_REST;
	if (need > total) {
		log_msg(LOG_ERROR, "a journal of %llu blocks does not fit the device",
			(unsigned long long)journal);
		return -ERR_DEV_TINY;
	}
	sb->total_blocks = total;
	sb->ag_blocks = MAX(choose_ag_blocks(total), need);
	sb->ag_count = (uint32_t)(total / sb->ag_blocks);
	rest = total % sb->ag_blocks;
	/* A short rest becomes part of the last AG. */
	if (rest >= AG_MIN_BLOCKS)
		sb->ag_count++;
	if (sb->ag_count > AG_MAX_COUNT)
		sb->ag_count = AG_MAX_COUNT;
	sb->journal_start = JOURNAL_START_BLOCK;
	sb->journal_blocks = journal;
	return 0;
}

static int choose_identity(struct mkfs *m, const struct mkfs_options *opt)
{
	struct super *sb = &m->sb;

	if (opt->label && strlen(opt->label) > FORMAT_LABEL_LEN) {
		log_msg(LOG_ERROR, "a label has at most %u bytes", FORMAT_LABEL_LEN);
		return -ENAMETOOLONG;
	}
	memcpy(sb->label, opt->label ? opt->label : "", opt->label ? strlen(opt->label) : 0);
	m->now_sec = opt->now_sec ? opt->now_sec : (int64_t)time(NULL);
	sb->created_sec = m->now_sec;
	sb->root_inode = 1;
	if (opt->uuid) {
		/* A reproducible image: nothing in it is random. */
		const uint64_t k[2] = {1, 2};

		memcpy(sb->uuid, opt->uuid, FORMAT_UUID_LEN);
		sb->hash_key[0] = siphash24(k, sb->uuid, FORMAT_UUID_LEN);
		sb->hash_key[1] = siphash24(sb->hash_key, sb->uuid, FORMAT_UUID_LEN);
		return 0;
	}
	if (getrandom(sb->uuid, sizeof(sb->uuid), 0) != sizeof(sb->uuid) ||
	    getrandom(sb->hash_key, sizeof(sb->hash_key), 0) != sizeof(sb->hash_key))
		return -EIO;
	sb->uuid[6] = (uint8_t)((sb->uuid[6] & 0x0f) | 0x40); /* RFC 9562: version 4, */
	sb->uuid[8] = (uint8_t)((sb->uuid[8] & 0x3f) | 0x80); /* variant 10 */
	return 0;
}

/* ---- blocks ---- */

static void *new_meta(struct mkfs *m, unsigned at, uint32_t magic, fsblock_t block, uint64_t owner)
{
	struct meta_hdr *h = (void *)(m->row + (size_t)at * BLOCK_SIZE);

	memset(h, 0, BLOCK_SIZE);
	h->magic = put32(magic);
	h->block = put64(block);
	memcpy(h->uuid, m->sb.uuid, FORMAT_UUID_LEN);
	h->owner = put64(owner);
	return h;
}

static struct node_disk *new_leaf(struct mkfs *m, unsigned at, fsblock_t block, enum tree_type tree,
				  uint32_t agno)
{
	struct node_disk *n = new_meta(m, at, MAGIC_NODE, block, OWNER_NODE(tree, agno));

	node_init(n, 0);
	return n;
}

/* Seal and write the first n blocks of the row, which begin at block. */
static int write_row(struct mkfs *m, fsblock_t block, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		meta_seal(m->row + (size_t)i * BLOCK_SIZE, 0);
	return dev_write(m->dev, block << BLOCK_SHIFT, m->row, (size_t)n * BLOCK_SIZE, 0);
}

static int write_zeros(struct mkfs *m, uint64_t offset, uint64_t len)
{
	char *zeros = io_alloc(ZERO_BYTES);
	int err = zeros ? 0 : -ENOMEM;

	if (zeros)
		memset(zeros, 0, ZERO_BYTES);
	while (len && !err) {
		uint64_t n = MIN(len, ZERO_BYTES);

		err = dev_write(m->dev, offset, zeros, n, 0);
		offset += n;
		len -= n;
	}
	io_free(zeros);
	return err;
}

struct free_run { fsblock_t start; nblocks_t len; };

static void set_root(struct tree_root_disk *root, fsblock_t block, uint64_t records)
{
	root->block = put64(block);
	root->height = put32(records ? 1 : 0);
	root->records = put64(records);
}

/* Header and free trees of an AG whose free runs, at most two, are given by rising block number. */
static void build_ag(struct mkfs *m, uint32_t agno, fsblock_t start, nblocks_t length,
		     fsblock_t header, fsblock_t freelist, const struct free_run *runs,
		     unsigned nruns)
{
	struct ag_disk *ag = new_meta(m, 0, MAGIC_AG, header, agno);
	struct node_disk *blocks = new_leaf(m, 1, header + 1, TREE_FREE_BY_BLOCK, agno);
	struct node_disk *lens = new_leaf(m, 2, header + 2, TREE_FREE_BY_LEN, agno);
	nblocks_t free = FIRST_FREELIST;

	for (unsigned i = 0; i < nruns; i++) {
		struct free_disk rec = {put64(runs[i].len)};
		bool longest = i && runs[i].len >= runs[0].len;

		leaf_insert(blocks, i, KEY(runs[i].start, 0), &rec, sizeof(rec));
		leaf_insert(lens, longest ? i : 0, KEY(runs[i].len, runs[i].start), NULL, 0);
		free += runs[i].len;
	}
	ag->start = put64(start);
	ag->length = put64(length);
	ag->free_blocks = put64(free);
	set_root(&ag->by_block, header + 1, nruns);
	set_root(&ag->by_len, header + 2, nruns);
	ag->freelist_count = put32(FIRST_FREELIST);
	for (unsigned i = 0; i < FIRST_FREELIST; i++)
		ag->freelist[i] = put64(freelist + i);
	m->free_blocks += free;
}

static void build_root_directory(struct mkfs *m, unsigned at, fsblock_t block)
{
	struct node_disk *n = new_leaf(m, at, block, TREE_INODE, 0);
	struct timestamp now = {m->now_sec, 0};
	struct inode_core core = {.generation = 1, .mode = 0040755, .nlink = 2, .parent = 1,
				  .change = 1, .atime = now, .mtime = now, .ctime = now,
				  .btime = now};
	struct inode_disk rec;

	inode_encode(&core, &rec);
	leaf_insert(n, 0, KEY(1, 0), &rec, sizeof(rec));
}

static int write_ags(struct mkfs *m)
{
	const struct super *sb = &m->sb;
	int err = 0;

	for (uint32_t i = 0; i < sb->ag_count && !err; i++) {
		fsblock_t start = i * sb->ag_blocks;
		fsblock_t end = i + 1 == sb->ag_count ? sb->total_blocks : start + sb->ag_blocks;
		fsblock_t header = i ? start : AG0_HEADER_BLOCK;
		fsblock_t freelist = header + (i ? 3 : 4);
		fsblock_t free = freelist + FIRST_FREELIST;
		fsblock_t journal_end = sb->journal_start + sb->journal_blocks;
		struct free_run whole = {free, end - free};
		struct free_run around[] = {{free, SUPER_COPY_BLOCK - free},
					    {journal_end, end - journal_end}};

		if (i) {
			build_ag(m, i, start, end - start, header, freelist, &whole, 1);
		} else {
			build_ag(m, i, start, end - start, header, freelist, around, 2);
			build_root_directory(m, 3, header + 3);
		}
		err = write_row(m, header, i ? 3 : 4);
	}
	return err;
}

static int write_root(struct mkfs *m)
{
	struct root_disk *r = new_meta(m, 0, MAGIC_ROOT, ROOT_BLOCK, 0);

	r->next_inode = put64(FIRST_INODE);
	r->next_intent = r->next_holder = put64(1);
	r->free_blocks = put64(m->free_blocks);
	r->inodes = put64(1);
	r->next_generation = put32(2);
	set_root(&r->trees[TREE_INODE], AG0_HEADER_BLOCK + 3, 1);
	return write_row(m, ROOT_BLOCK, 1);
}

/* Durably before anything else changes: until both are gone the old filesystem is whole. */
static int destroy_superblocks(struct mkfs *m)
{
	int err = write_zeros(m, (uint64_t)SUPER_BLOCK << BLOCK_SHIFT, BLOCK_SIZE);

	if (!err)
		err = write_zeros(m, (uint64_t)SUPER_COPY_BLOCK << BLOCK_SHIFT, BLOCK_SIZE);
	return err ? err : dev_flush(m->dev);
}

/* Signatures that others would find: the first and the last 64 KiB. */
static int wipe(struct mkfs *m)
{
	uint64_t last = (m->dev->size & ~BLOCK_MASK) - WIPE_BYTES;
	int err = write_zeros(m, 0, WIPE_BYTES);

	return err ? err : write_zeros(m, last, m->dev->size - last);
}

static int write_everything(struct mkfs *m, const struct mkfs_options *opt)
{
	const struct super *sb = &m->sb;
	int err = destroy_superblocks(m);

	if (!err)
		err = wipe(m);
	/* With a UUID of old, records of an older journal would verify. */
	if (!err && opt->uuid)
		err = write_zeros(m, sb->journal_start << BLOCK_SHIFT,
				  sb->journal_blocks << BLOCK_SHIFT);
	if (!err)
		err = jrn_format(m->dev, sb->uuid, sb->journal_start, sb->journal_blocks);
	if (!err)
		err = heartbeat_format(m->dev, sb->uuid);
	if (!err)
		err = write_ags(m);
	if (!err)
		err = write_root(m);
	if (!err)
		err = dev_flush(m->dev);
	return err ? err : super_write(m->dev, sb);
}

int fs_mkfs(struct device *dev, const struct mkfs_options *opt)
{
	nblocks_t total = MIN(dev->size >> BLOCK_SHIFT, DEVICE_MAX_BLOCKS);
	struct mkfs m = {.dev = dev};
	int err;

	if (dev->read_only)
		return -EROFS;
	if (opt->size_blocks > total)
		return -ERR_DEV_SMALL;
	if (opt->size_blocks)
		total = opt->size_blocks;
	err = choose_layout(&m.sb, total, opt->journal_blocks);
	if (!err)
		err = choose_identity(&m, opt);
	if (!err)
		err = check_old_content(dev, opt->force);
	if (err)
		return err;
	m.row = io_alloc(ROW_BLOCKS * BLOCK_SIZE);
	if (!m.row)
		return -ENOMEM;
	err = write_everything(&m, opt);
	io_free(m.row);
	return err;
}
