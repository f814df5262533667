/* SPDX-License-Identifier: MIT
 *
 * format.h - every byte that extfs writes to a device. FORMAT.md says the same in words.
 *
 * All integers are little-endian. Every metadata block starts with struct meta_hdr. Reserved
 * bytes are zero. Sizes and offsets are asserted at the end of this file; an independent decoder
 * in extfs/check/ is compared with them by a test.
 */
#ifndef EXTFS_FORMAT_H
#define EXTFS_FORMAT_H

#include <endian.h>

#include "types.h"

typedef struct { uint16_t v; } le16_t;
typedef struct { uint32_t v; } le32_t;
typedef struct { uint64_t v; } le64_t;

static inline uint16_t get16(le16_t x) { return le16toh(x.v); }
static inline uint32_t get32(le32_t x) { return le32toh(x.v); }
static inline uint64_t get64(le64_t x) { return le64toh(x.v); }
static inline le16_t put16(uint16_t x) { return (le16_t){htole16(x)}; }
static inline le32_t put32(uint32_t x) { return (le32_t){htole32(x)}; }
static inline le64_t put64(uint64_t x) { return (le64_t){htole64(x)}; }

#define FORMAT_VERSION 1u
#define FORMAT_UUID_LEN 16u
#define FORMAT_LABEL_LEN 64u /* NUL-padded; all 64 bytes may be used */

#define MAGIC_SUPER 0x62735845u     /* bytes "EXsb" */
#define MAGIC_HEARTBEAT 0x62685845u /* bytes "EXhb" */
#define MAGIC_ROOT 0x74725845u      /* bytes "EXrt" */
#define MAGIC_AG 0x67615845u        /* bytes "EXag" */
#define MAGIC_NODE 0x6e625845u      /* bytes "EXbn" */
#define MAGIC_JHEAD 0x686a5845u     /* bytes "EXjh" */
#define MAGIC_JDESC 0x646a5845u     /* bytes "EXjd" */

/* The head of every metadata block. */
struct meta_hdr {
	le32_t magic;
	le32_t crc;         /* crc32c of the whole block with this field zero */
	le64_t block;       /* where this block lives */
	uint8_t uuid[FORMAT_UUID_LEN]; /* of the filesystem */
	le64_t lsn;         /* log position of the record that last logged this block; 0: by mkfs */
	le64_t owner;       /* node: OWNER_NODE(tree, agno); AG header: agno; else 0 */
};

#define OWNER_NODE(tree, agno) ((uint64_t)(tree) | ((uint64_t)(agno) << 8))

/* Fixed places (blocks). */
#define SUPER_BLOCK 0u
#define HEARTBEAT_BLOCK 1u
#define ROOT_BLOCK 2u
#define AG0_HEADER_BLOCK 3u      /* AG n > 0: its first block */
#define SUPER_COPY_BLOCK 4096u   /* 16 MiB: far from what a stray partition tool overwrites */
#define JOURNAL_START_BLOCK 4097u
#define DEVICE_MIN_BLOCKS 8192u  /* 32 MiB */
#define JOURNAL_MIN_BLOCKS 1024u /* 4 MiB, headers included */
#define JOURNAL_MAX_BLOCKS 262144u
#define AG_MIN_BLOCKS 8192u
#define AG_MAX_COUNT 1024u

/* Superblock: written by mkfs and on a change of label or features; copy first, then the primary. */
struct super_disk {
	struct meta_hdr hdr;
	le32_t version;         /* FORMAT_VERSION */
	le32_t block_size;      /* 4096 */
	le64_t compat;          /* unknown bits: may be mounted */
	le64_t ro_compat;       /* unknown bits: read-only */
	le64_t incompat;        /* unknown bits: not at all */
	le64_t total_blocks;
	le64_t ag_blocks;       /* blocks of every AG but the last, which may be longer or shorter */
	le32_t ag_count;
	le32_t flags;
	le64_t journal_start;   /* first journal block (header copy 0) */
	le64_t journal_blocks;  /* both headers included */
	le64_t hash_key[2];     /* SipHash key of names */
	le64_t root_inode;      /* 1 */
	le64_t created_sec;
	le64_t super_copy;      /* SUPER_COPY_BLOCK */
	uint8_t label[FORMAT_LABEL_LEN];
	uint8_t reserved[4096 - 224];
};

/* Says that a host has the device mounted; rewritten every few seconds, not journaled. Fits a sector. */
struct heartbeat_disk {
	struct meta_hdr hdr;
	le64_t seq;             /* rises with every write */
	le64_t sec;             /* CLOCK_REALTIME of the write */
	le32_t state;           /* enum heartbeat_state */
	le32_t pid;
	uint8_t mount_id[16];   /* random, of this mount */
	uint8_t boot_id[16];
	uint8_t host[64];       /* NUL-padded */
	le32_t interval_ms;     /* promised distance of two writes */
	le32_t reserved;
};

enum heartbeat_state { HB_CLEAN = 0, HB_MOUNTED = 1 };

/* Root of one B+tree. block 0 and height 0: empty. height 1: the root is a leaf. */
struct tree_root_disk {
	le64_t block;
	le32_t height;
	le32_t reserved;
	le64_t records;         /* number of leaf records */
};

enum tree_type {
	TREE_INODE = 0,      /* (ino, 0) -> inode_disk */
	TREE_EXTENT = 1,     /* (ino, fork << 56 | file block) -> extent_disk */
	TREE_DIRENT = 2,     /* (directory ino, cookie) -> dirent_disk + name */
	TREE_XATTR = 3,      /* (ino, XATTR_KEY) -> xattr_disk + name + value, or further value bytes */
	TREE_SYMLINK = 4,    /* (ino, part) -> bytes of the target */
	TREE_REFCOUNT = 5,   /* (device block, 0) -> refcount_disk; only counts >= 2 */
	TREE_ORPHAN = 6,     /* (ino, 0) -> orphan_disk: link count 0, still in use or being freed */
	TREE_INTENT = 7,     /* (intent id, 0) -> intent_disk: to be finished by replay */
	TREE_QUARANTINE = 8, /* (device block, 0) -> quarantine_disk */
	TREE_HOLDER = 9,     /* (holder id, 0) -> holder_disk */
	TREE_FENCE = 10,     /* (holder id, 0) -> fence_disk */
	TREE_EXPOSURE = 11,  /* (ino, file block, or EXPOSURE_INODE_LO) -> exposure_disk */
	TREE_NFS_CLIENT = 12, /* (number, part) -> bytes; NFS_KIND of the number says whose */
	TREE_ROOT_COUNT = 16, /* slots in the root block; 13..15 reserved */
	TREE_FREE_BY_BLOCK = 16, /* per AG: (first block, 0) -> free_disk */
	TREE_FREE_BY_LEN = 17,   /* per AG: (length, first block) -> nothing */
};

/* Block ROOT_BLOCK: the roots of all global trees, and the counters. Journaled. */
struct root_disk {
	struct meta_hdr hdr;
	le64_t next_inode;      /* inode numbers are never reused */
	le64_t next_intent;
	le64_t next_holder;
	le64_t reserved0;
	le64_t free_blocks;     /* sum over all AGs, freelists included */
	le64_t inodes;
	le64_t quarantined_blocks;
	le32_t next_generation; /* of inodes */
	le32_t flags;
	struct tree_root_disk trees[TREE_ROOT_COUNT];
	uint8_t reserved[4096 - 48 - 64 - 24 * 16];
};

#define AG_FREELIST_MAX 64u

/* Allocation group. free_blocks counts the records of by_block plus the freelist. */
struct ag_disk {
	struct meta_hdr hdr;    /* owner: AG number */
	le64_t start;           /* first block of the AG */
	le64_t length;
	le64_t free_blocks;
	struct tree_root_disk by_block;
	struct tree_root_disk by_len;
	le32_t freelist_count;  /* blocks set aside for nodes of the two trees above */
	le32_t reserved0;
	le64_t freelist[AG_FREELIST_MAX];
	uint8_t reserved[4096 - 48 - 24 - 48 - 8 - 512];
};

/* A key of any tree; order is hi, then lo, unsigned. */
struct key_disk {
	le64_t hi;
	le64_t lo;
};

/* B+tree node. Slots grow up from the header, record bytes grow down from the end of the block. */
struct node_disk {
	struct meta_hdr hdr;
	le16_t level;           /* 0: leaf */
	le16_t count;           /* slots in use */
	le16_t heap;            /* leaf: offset of the lowest record byte; 4096 when empty */
	le16_t dead;            /* leaf: bytes above heap that no slot names, padding included */
	uint8_t reserved[8];
	uint8_t slots[4096 - 64];
};

struct leaf_slot {
	struct key_disk key;
	le16_t offset;          /* of the record, from the start of the block; a multiple of 8 */
	le16_t length;          /* of the record, in bytes; may be 0 (offset then 0) */
	le32_t reserved;
};

/* The key of a branch slot is the least key that its child may hold; slot 0 of the leftmost node
 * of a level is (0, 0). */
struct branch_slot {
	struct key_disk key;
	le64_t child;
};

#define NODE_SLOT_SIZE 24u
#define NODE_SLOT_MAX 168u
#define RECORD_MAX 1280u /* bytes; three of the largest fit a leaf */

/* Inode record. Times are seconds since the epoch, signed, and nanoseconds. */
struct inode_disk {
	le32_t generation;
	le32_t mode;            /* type and permission bits as in st_mode */
	le32_t uid;
	le32_t gid;
	le32_t nlink;
	le32_t flags;           /* INODE_F_* */
	le64_t size;            /* bytes; symlink: length of the target; directory: entries */
	le64_t blocks;          /* device blocks mapped, all forks */
	le64_t atime;
	le64_t mtime;
	le64_t ctime;
	le64_t btime;
	le32_t atime_ns;
	le32_t mtime_ns;
	le32_t ctime_ns;
	le32_t btime_ns;
	le64_t rdev;            /* makedev() encoding of the kernel's new_encode_dev */
	le64_t parent;          /* directory: its parent; root: itself; others 0 */
	le64_t change;          /* rises with every change (NFS change attribute) */
	le32_t subdirs;         /* directory: subdirectories */
	le32_t xattrs;          /* number of extended attributes, ACLs included */
	uint8_t reserved[72];
};

#define INODE_F_SHARED 0x1u   /* may map blocks with a reference count above 1 */
#define INODE_F_STAGING 0x2u  /* has extents in the staging fork */
#define INODE_F_ACL 0x4u      /* has a POSIX access ACL */
#define INODE_F_DEFACL 0x8u   /* directory: has a default ACL */
#define INODE_F_PREALLOC 0x10u /* has KEEP_SIZE preallocation past EOF */

enum fork { FORK_DATA = 0, FORK_STAGING = 1 };
#define EXTENT_KEY_LO(fork, fileblk) (((uint64_t)(fork) << 56) | (fileblk))

enum extent_state { EXT_HOLE = 0, EXT_UNWRITTEN = 1, EXT_WRITTEN = 2 }; /* HOLE: never on disk */

#define EXT_F_LAYOUT 0x1u /* allocated by LAYOUT_GET, not by fallocate: may be trimmed past EOF */

struct extent_disk {
	le64_t block;           /* first device block */
	le32_t length;          /* blocks, > 0 */
	uint8_t state;          /* enum extent_state */
	uint8_t flags;          /* EXT_F_* */
	le16_t reserved;
};
#define EXTENT_MAX_BLOCKS 0x7fffffffu

struct dirent_disk {
	le64_t ino;
	uint8_t type;           /* DT_* */
	uint8_t name_len;       /* 1..255 */
	uint8_t reserved[6];
	/* name bytes follow */
};
/* cookie: SipHash-2-4 of the name, low 47 bits (0 becomes 1), << 16 | collision number. So a
 * cookie is the readdir offset of its entry, stays the same while the entry lives, and is above
 * 2 (. and ..) and below 2^63. */
#define DIR_COOKIE_SEQ_BITS 16u
#define DIR_HASH_BITS 47u

struct xattr_disk {
	uint8_t ns;             /* enum xattr_ns */
	uint8_t name_len;       /* without the namespace prefix */
	le16_t reserved;
	le32_t value_len;       /* of the whole value */
	/* name bytes, then the value's first bytes, follow; further bytes in parts 1.. */
};
enum xattr_ns { XNS_USER = 1, XNS_TRUSTED = 2, XNS_SECURITY = 3, XNS_SYSTEM = 4 };
#define XATTR_PART_BYTES 1024u  /* bytes of every part after part 0; part 0 is filled to 1024 in all */
#define XATTR_VALUE_MAX 65536u
/* hash: low 40 bits of the SipHash of (ns, name) */
#define XATTR_KEY(hash40, seq, part) \
	(((uint64_t)(hash40) << 24) | ((uint64_t)(seq) << 16) | (uint64_t)(part))

/* Of TREE_NFS_CLIENT: every part has NFS_PART_BYTES, but the last one, which has less, maybe none. */
#define NFS_PART_BYTES 1024u
#define NFS_VALUE_MAX 65536u

#define SYMLINK_PART_BYTES 1024u
#define SYMLINK_MAX 4095u

struct refcount_disk {
	le64_t length;          /* blocks */
	le32_t refs;            /* >= 2 */
	le32_t reserved;
};

struct free_disk {
	le64_t length;
};

struct orphan_disk {
	le64_t since;           /* seconds */
	le64_t reserved;
};

enum intent_type {
	INTENT_FREE_TAIL = 1,   /* free every extent of ino at and past file block a */
	INTENT_PUNCH = 2,       /* free every extent of ino in file blocks [a, b) */
	INTENT_ATOMIC = 3,      /* what the staging fork of ino maps in [a, b) replaces the data fork; then its size is at least c */
	INTENT_EXCHANGE = 4,    /* d blocks from a of ino and from c of inode b change places: what is left to do */
	INTENT_COLLAPSE = 5,    /* what ino maps in [a - b, a) is freed, then everything from a on moves b blocks towards the start */
	INTENT_INSERT = 6,      /* everything of ino in [a, c) moves b blocks towards the end: what is left to do */
};

/* PUNCH: of the staging fork. A copy-on-write that a crash cut off: the new blocks were never mapped. */
#define INTENT_F_STAGING 0x1u

struct intent_disk {
	le32_t type;
	le32_t flags;
	le64_t ino;
	le64_t a;
	le64_t b;
	le64_t c;
	le64_t d;
};

struct quarantine_disk {
	le64_t length;
	le64_t holder;
	le64_t xid;
};

/* Quarantine of blocks that more than one lost holder may reach: free when none is left. */
#define QUARANTINE_ANY UINT64_MAX

struct holder_disk {
	le32_t kind;            /* 1 local, 2 layout server's client */
	le32_t state;           /* 1 live, 2 lost, 3 gone: only its quarantine is left to be freed */
	le64_t fence_key;
	le32_t pid;
	le32_t uid;
	le64_t pid_start;       /* start time of the process, clock ticks since boot */
	uint8_t boot_id[16];
	le64_t key;             /* proves who speaks for it */
	le32_t flags;
	le32_t reserved;
	uint8_t name[64];       /* NUL-padded */
	uint8_t fence[128];     /* NUL-padded: what a fence driver needs */
};

/* What was decided and done about the fence of a lost holder. Goes with the fence. */
struct fence_disk {
	le64_t holder;          /* as in the key */
	le32_t state;           /* enum fence_state */
	le32_t tries;           /* attempts that began */
	le64_t decided_sec;
	uint8_t reserved[40];
};

/* What a holder was told. Two kinds of records: unwritten blocks, key (ino, file block); and one for
 * each inode and holder, key (ino, EXPOSURE_INODE_LO(holder)), block and length 0. */
struct exposure_disk {
	le64_t block;
	le32_t length;
	le32_t flags;           /* EXPOSURE_F_* */
	le64_t holder;
};
#define EXPOSURE_F_STAGING 0x1u /* the blocks are mapped by the staging fork */
#define EXPOSURE_F_INODE 0x2u   /* of a whole inode */
#define EXPOSURE_F_RW 0x4u      /* of a whole inode: the holder has or had a RW grant */
#define EXPOSURE_INODE_LO(holder) ((1ull << 63) | (holder))

/* The top byte of a number in TREE_NFS_CLIENT. What the records say is the NFS server's business, but
 * for riders, which transactions of the core write. */
#define NFS_KIND(number) ((number) >> 56)
#define NFS_KIND_SERVER 0u
#define NFS_KIND_CLIENT 1u
#define NFS_KIND_STATE 2u
#define NFS_KIND_SESSION 3u
#define NFS_KIND_RIDER 4u
/* session: the lower 56 bits of the number of its record, at most 40 of them in use; slot below 2^16. */
#define NFS_RIDER_KEY(session, slot) ((4ull << 56) | (uint64_t)(session) << 16 | (slot))

/* A directory (of names), or a file (of its own attributes), on both sides of an operation. What is
 * before it is as the NFS server wrote it; the rest the core fills in. */
struct rider_place_disk {
	le64_t before;          /* inode_disk.change */
	le64_t before_value;    /* change attribute, as clients are told it */
	le64_t after;
	le64_t after_sec;       /* ctime */
	le32_t after_ns;
	le32_t reserved;
};

/* An operation of a COMPOUND that is done. */
struct rider_mark_disk {
	le16_t index;           /* its place in the COMPOUND */
	le16_t op;              /* nfs_opnum4 */
	le32_t generation;      /* of the inode that was made, moved, changed, or lost its name */
	le64_t ino;
	struct rider_place_disk places[2];
};

/* What a slot of a session has done, in the transaction that did it last. */
#define RIDER_MARKS 8u
struct rider_disk {
	le64_t session;         /* as in the key */
	le32_t slot;
	le32_t sequence;        /* of the request */
	le32_t digest;          /* of the request */
	le32_t count;           /* of marks, at least 1; the last one is of this transaction */
	uint8_t reserved[24];
	struct rider_mark_disk marks[RIDER_MARKS];
};

/* Journal header: two copies, in the first two journal blocks, written alternately (slot = seq mod 2).
 * The valid copy with the greater seq counts. All its fields lie in the first sector. */
struct jhead_disk {
	struct meta_hdr hdr;    /* crc over the block; lsn 0 */
	le64_t seq;
	le64_t tail_lsn;        /* first record that replay has to read */
	le64_t tail_xid;        /* its number */
	le64_t log_blocks;      /* journal_blocks - 2 */
};

/* A commit record: ndesc descriptor blocks, then nimages block images, all at consecutive log
 * positions (position = lsn mod log_blocks, + 2 for the headers). It counts when every
 * descriptor and every image verifies. hdr.lsn of descriptors and images is the record's lsn. */
struct jtag_disk {
	le64_t block;           /* home of the image */
	le32_t crc;             /* = meta_hdr.crc of the image */
	le32_t flags;
};
#define JDESC_TAGS 248u
struct jdesc_disk {
	struct meta_hdr hdr;    /* block: the log block's own place on the device */
	le64_t xid;
	le32_t index;           /* of this descriptor in the record */
	le32_t ndesc;
	le32_t nimages;         /* of the whole record */
	le32_t flags;
	le64_t sec;             /* time of the commit */
	le64_t tail_lsn;        /* the tail when this was written: a header that names an older one is stale */
	uint8_t reserved[40];
	struct jtag_disk tags[JDESC_TAGS];
};

#define ASSERT_SIZE(type, n) _Static_assert(sizeof(struct type) == (n), "size of " #type)
#define ASSERT_OFF(type, field, n) \
	_Static_assert(offsetof(struct type, field) == (n), "offset of " #type "." #field)

ASSERT_SIZE(meta_hdr, 48);
ASSERT_SIZE(super_disk, 4096);
ASSERT_SIZE(root_disk, 4096);
ASSERT_SIZE(ag_disk, 4096);
ASSERT_SIZE(node_disk, 4096);
ASSERT_SIZE(jdesc_disk, 4096);
ASSERT_SIZE(heartbeat_disk, 176);
ASSERT_SIZE(jhead_disk, 80);
ASSERT_SIZE(leaf_slot, NODE_SLOT_SIZE);
ASSERT_SIZE(branch_slot, NODE_SLOT_SIZE);
ASSERT_SIZE(tree_root_disk, 24);
ASSERT_SIZE(inode_disk, 192);
ASSERT_SIZE(extent_disk, 16);
ASSERT_SIZE(dirent_disk, 16);
ASSERT_SIZE(xattr_disk, 8);
ASSERT_SIZE(refcount_disk, 16);
ASSERT_SIZE(intent_disk, 48);
ASSERT_SIZE(quarantine_disk, 24);
ASSERT_SIZE(holder_disk, 256);
ASSERT_SIZE(fence_disk, 64);
ASSERT_SIZE(exposure_disk, 24);
ASSERT_SIZE(orphan_disk, 16);
ASSERT_SIZE(rider_place_disk, 40);
ASSERT_SIZE(rider_mark_disk, 96);
ASSERT_SIZE(rider_disk, 816);
ASSERT_OFF(super_disk, label, 160);
ASSERT_OFF(root_disk, trees, 112);
ASSERT_OFF(ag_disk, freelist, 128);
ASSERT_OFF(node_disk, slots, 64);
ASSERT_OFF(jdesc_disk, tags, 128);
ASSERT_OFF(inode_disk, rdev, 88);

#endif
