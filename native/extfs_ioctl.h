/* SPDX-License-Identifier: MIT
 *
 * extfs_ioctl.h - the calls of a mounted extfs, for C and C++ programs. This header is all they
 * need.
 *
 * Two kinds of descriptors take them as ioctl(2). /.extfs/control in the root of the mount (not
 * listed; root only): calls on it name a file by its handle, read(2) returns events, write(2) takes
 * commits that are longer than an ioctl. And any regular file or directory: calls on it are about
 * that file; the handle is zero, or the file's own. On none of them poll(2) says anything: they are
 * always ready. Who wants to poll for events gives a socket (EVENT_SOCKET).
 *
 * Every struct begins with its own size in bytes, what follows in an array included (that is
 * _IOC_SIZE of the command), and with flags. Unknown flags and reserved fields that are not zero
 * are EINVAL, so that later versions can give them a meaning. Numbers are in the host's byte
 * order; offsets and lengths are bytes. Where blocks are meant they are multiples of the block
 * size (INFO), else EINVAL; LAYOUT_GET alone rounds. An answer fills the struct up to the last
 * array element that it counts; what is behind it is left as it was. After an error nothing is
 * written.
 *
 * The protocol. HOLDER_REGISTER makes a holder, which belongs to this open file. LAYOUT_GET hands
 * it a range of a file: extents on the device, which it then reads and writes itself, with
 * O_DIRECT, on the device (not through its page cache). LAYOUT_COMMIT says what it wrote: only
 * then others see blocks that were INVALID before, and the size grows. An event RECALL asks for a
 * range: stop I/O on it, commit what was written, LAYOUT_RETURN it. A holder that does not within
 * the time of the event loses it (event REVOKED): its blocks are taken out of the file, and what
 * it still writes there goes nowhere. Closing the open file (its last descriptor) with something
 * held is the same as not answering.
 *
 * Who may. "owner": the caller, not who opened the descriptor, is root or owns the file that is
 * meant. "writable": the descriptor is open for writing. "key": the caller knows the holder's.
 * Of a directory's own descriptor only INFO and HANDLE.
 *
 *                                      control              own descriptor
 *   INFO                               anybody              anybody
 *   HANDLE                             -                    anybody
 *   EVENTS, EVENT_SOCKET               anybody              anybody
 *   MAP, LIST                          owner                anybody
 *   WATCH                              key, owner           key
 *   HOLDER_REGISTER                    anybody              owner
 *   HOLDER_GONE, LAYOUT_RETURN         key                  key
 *   LAYOUT_GET, READ                   key, owner           key, owner
 *   LAYOUT_GET, RW and PIN             key, owner           key, owner, writable
 *   LAYOUT_COMMIT                      key                  key, writable
 *   RECALL                             owner                owner
 *   EXCHANGE, CLONE, DEDUPE (and       root                 writable (and owner of the other
 *     the other file), COLLAPSE, INSERT                     file)
 *   FENCED, SHUTDOWN                   root                 -
 *
 * Errors that all calls share: EINVAL (a size, flag, reserved field, range or alignment that
 * cannot be; not a regular file), EISDIR, ESTALE (the handle's file is gone, or not that of the
 * descriptor), ENOENT (no such holder), EKEYREJECTED (the key is not the holder's), EOWNERDEAD
 * (the holder was lost: resume it, or return everything), EACCES (not the owner), EPERM (not
 * root, or not on this kind of descriptor), EBADF (not writable), EROFS, EOPNOTSUPP (mounted with
 * writeback_cache: no layouts, no changes of maps), EFBIG (beyond 2^63 - 1), ENOTTY (not on
 * extfs; a call that this version does not know), EINTR (a signal came, nothing was done).
 */
#ifndef EXTFS_IOCTL_H
#define EXTFS_IOCTL_H

#include <stdint.h>
#include <sys/ioctl.h>

/* A struct that ends in an array of no fixed length, which C++ knows as an extension only. */
#ifdef __cplusplus
#define EXTFS_OPEN_STRUCT __extension__ struct
#else
#define EXTFS_OPEN_STRUCT struct
#endif

/* A file, as HANDLE tells it: stays valid over restarts, and never names another file. On a file's
 * own descriptor both may be 0. */
struct extfs_handle {
	uint64_t ino;
	uint32_t generation;
	uint32_t reserved;
};

/* ---- the map ---- */

enum extfs_ioc_state {
	EXTFS_IOC_UNWRITTEN = 1, /* allocated, reads as zeros */
	EXTFS_IOC_WRITTEN = 2,
};

#define EXTFS_IOC_EXT_SHARED 0x1u /* another file maps these blocks too: they are copied on write */
#define EXTFS_IOC_EXT_LAYOUT 0x2u /* allocated for a layout, not by fallocate */

struct extfs_ioc_extent {
	uint64_t offset;   /* in the file */
	uint64_t physical; /* on the device */
	uint64_t length;
	uint32_t state;    /* enum extfs_ioc_state */
	uint32_t flags;    /* EXTFS_IOC_EXT_* */
};

#define EXTFS_IOC_MAP_EXTENTS 500

/* MAP: the extents of a regular file in [start, start + length), in order; what no extent covers
 * is a hole. The answer is one consistent view, cut to whole blocks around the range. When `next`
 * is below the end of the range, there are more: ask again with start = next. The map may change
 * at any time afterwards, except while it is pinned (LAYOUT_GET with EXTFS_PIN). Two answers with
 * the same generation are of the same map. ENOTTY, not EINVAL: not a regular file. */
struct extfs_ioc_map {
	uint32_t size;
	uint32_t flags;     /* none defined: 0 */
	struct extfs_handle file;
	uint64_t start;
	uint64_t length;
	uint64_t next;      /* out: everything below it has been told; UINT64_MAX at the end of the map */
	uint64_t file_size; /* out */
	uint64_t generation; /* out: of the map */
	uint32_t count;     /* out: extents */
	uint32_t reserved[3];
	struct extfs_ioc_extent extents[EXTFS_IOC_MAP_EXTENTS]; /* out */
};
#define EXTFS_IOC_MAP _IOWR('X', 0xe1, struct extfs_ioc_map)

/* ---- the filesystem, and handles ---- */

struct extfs_ioc_info {
	uint32_t size;
	uint32_t flags;         /* 0 */
	uint8_t uuid[16];
	uint32_t block_size;    /* bytes: unit of all extents */
	uint32_t version;       /* of this interface: EXTFS_IOC_VERSION */
	uint64_t device_size;   /* bytes */
	uint64_t free;          /* bytes that may be allocated */
	uint64_t quarantined;   /* bytes that wait for a fence */
	uint64_t recall_ms;     /* a holder's time to answer a recall */
	char device[256];       /* path of the device, as the daemon opened it; NUL-terminated */
	uint64_t reserved[8];
};
#define EXTFS_IOC_VERSION 1
#define EXTFS_IOC_INFO _IOWR('X', 0xe2, struct extfs_ioc_info)

struct extfs_ioc_handle {
	uint32_t size;
	uint32_t flags;            /* 0 */
	struct extfs_handle file;  /* out; of a directory too */
	uint64_t reserved[2];
};
#define EXTFS_IOC_HANDLE _IOWR('X', 0xe3, struct extfs_ioc_handle)

/* ---- holders ---- */

#define EXTFS_HOLDER_RESUME 0x1u /* id and key are of a holder that was lost: go on as it, with what
                                  * it holds; name and fence are not looked at. EBUSY: it is not lost */
#define EXTFS_HOLDER_CLIENT 0x2u /* for a layout server's client; root on the control file only */

/* HOLDER_REGISTER: on success the holder belongs to this open file, where its events arrive: it
 * ends when the last descriptor of it is closed. EAGAIN: this user has too many. */
struct extfs_ioc_holder {
	uint32_t size;
	uint32_t flags;
	uint64_t id;            /* out; in with RESUME, and for HOLDER_GONE, FENCED */
	uint64_t key;           /* the same; keep it secret: whoever knows it speaks for the holder */
	uint64_t recall_ms;     /* out: time to answer a recall */
	char name[64];          /* for people; NUL-terminated */
	char fence[128];        /* "", or "cgroup:/PATH": the holder, and all that it gave descriptors to,
	                         * run in this cgroup (v2, below the root) and in no other, and may be
	                         * killed with it. EPERM: the caller is not root, and that cgroup's
	                         * cgroup.kill does not belong to it */
	uint64_t reserved[4];
};
#define EXTFS_IOC_HOLDER_REGISTER _IOWR('X', 0xe4, struct extfs_ioc_holder)
/* HOLDER_GONE: id and key; it has stopped, and holds nothing. EBUSY: it does. */
#define EXTFS_IOC_HOLDER_GONE _IOWR('X', 0xe5, struct extfs_ioc_holder)
/* FENCED: id; no key needed: it is certain that this lost holder cannot reach the device any more.
 * EBUSY: it is not lost. */
#define EXTFS_IOC_FENCED _IOWR('X', 0xe6, struct extfs_ioc_holder)

/* ---- layouts ---- */

enum extfs_iomode {
	EXTFS_READ = 1,
	EXTFS_RW = 2,
	EXTFS_ANY = 3,      /* in LAYOUT_RETURN and RECALL */
	EXTFS_PIN = 4,      /* nothing to write: the map and the contents stay as they are, for time_ms */
};

/* What the holder may do with an extent (RFC 5663 2.3). */
enum extfs_layout_state {
	EXTFS_READ_WRITE_DATA = 0, /* read and write in place */
	EXTFS_READ_DATA = 1,       /* read only; under a RW layout: the source of a copy-on-write, the
	                            * same file range follows as INVALID_DATA */
	EXTFS_INVALID_DATA = 2,    /* write, then commit; until then it reads as zeros, or as the
	                            * READ_DATA before it: do not read it from the device */
	EXTFS_NONE_DATA = 3,       /* READ layouts: reads as zeros, no device address */
};

struct extfs_layout_extent {
	uint64_t offset;
	uint64_t physical;
	uint64_t length;
	uint32_t state;     /* enum extfs_layout_state */
	uint32_t reserved;
};

#define EXTFS_LAYOUT_WAIT 0x1u   /* recall what is in the way, and wait; without: EAGAIN */
#define EXTFS_LAYOUT_RECALL 0x2u /* without WAIT: EAGAIN, but have it recalled */
#define EXTFS_LAYOUT_ATOMIC 0x4u /* RW: every block is new, readers see the old ones until one commit
                                  * exchanges all; wholly or not at all */

/* LAYOUT_GET: a grant of [offset, next), as extents that tile it. RW allocates what is missing;
 * READ never does. Less than was asked for is possible: go on with offset = next. EAGAIN: a
 * conflict (a foreign layout, or a recall of this range under way); ENOSPC: not min_length bytes,
 * nothing was allocated. A wait ends with EINTR at any signal. The room for the answer is in the
 * size: EXTFS_IOC_LAYOUT_GET(n) carries n extents, 1 <= n <= EXTFS_LAYOUT_EXTENTS_MAX. */
EXTFS_OPEN_STRUCT extfs_ioc_layout {
	uint32_t size;
	uint32_t flags;
	uint64_t holder, key;
	struct extfs_handle file;
	uint32_t iomode;      /* enum extfs_iomode */
	uint32_t count;       /* in: room in extents, n; out: used */
	uint64_t offset;      /* in; out: rounded down to blocks */
	uint64_t length;      /* rounded up to blocks; UINT64_MAX: to the end of the file (RW: EINVAL) */
	uint64_t min_length;  /* at most length; 0: one block */
	uint64_t time_ms;     /* PIN: 1 to EXTFS_PIN_MAX_MS; else 0 */
	uint64_t next;        /* out */
	uint64_t seq;         /* out: sequence number of the grant, for LAYOUT_COMMIT */
	uint64_t generation;  /* out: of the map */
	uint64_t file_size;   /* out */
	uint64_t reserved[2];
	struct extfs_layout_extent extents[];
};
#define EXTFS_PIN_MAX_MS 60000
#define EXTFS_LAYOUT_EXTENTS_MAX 400
#define EXTFS_IOC_LAYOUT_GET(n) \
	_IOC(_IOC_READ | _IOC_WRITE, 'X', 0xe7, \
	     sizeof(struct extfs_ioc_layout) + (n) * sizeof(struct extfs_layout_extent))

struct extfs_range {
	uint64_t offset;
	uint64_t length;
};

#define EXTFS_COMMIT_LAZY 0x8u   /* need not be durable when the call returns: a later fsync(2) of the
                                  * file makes it so */
#define EXTFS_COMMIT_MTIME 0x10u /* mtime is given; else now, and the fields are 0 */

/* LAYOUT_COMMIT: these ranges were written to the device, completely: whole blocks under RW
 * layouts that this holder holds now. Whole or nothing. ENXIO: not (or no longer) held: nothing
 * was changed. For blocks that were READ_WRITE_DATA no range is needed. ERANGE: file_size lies
 * outside the layouts and past the end, or a range (of an ATOMIC layout: any part) lies behind the
 * block in which the file then ends. An ATOMIC layout is committed whole by naming any range
 * of it (no other layout in the same call).
 *
 * EXTFS_IOC_LAYOUT_COMMIT(n) carries n ranges, up to EXTFS_COMMIT_IOCTL_MAX; more, up to
 * EXTFS_COMMIT_RANGES_MAX, go by one write(2) of the same struct to a control descriptor, which
 * returns its size. */
EXTFS_OPEN_STRUCT extfs_ioc_commit {
	uint32_t size;
	uint32_t flags;
	uint64_t holder, key;
	struct extfs_handle file;
	uint64_t seq;         /* 0, or the newest grant that the caller knows of: ranges under newer
	                       * ones are ENXIO */
	uint64_t file_size;   /* in: last byte written + 1, the file grows to it if it is shorter; 0: no
	                       * change. out (ioctl only): of the file now */
	int64_t mtime_sec;
	uint32_t mtime_nsec;
	uint32_t count;       /* ranges */
	uint64_t reserved[2];
	struct extfs_range ranges[];
};
#define EXTFS_COMMIT_IOCTL_MAX 1000
#define EXTFS_COMMIT_RANGES_MAX 65000 /* 1 MiB is one write(2), wherever in a page the struct begins */
#define EXTFS_IOC_LAYOUT_COMMIT(n) \
	_IOC(_IOC_READ | _IOC_WRITE, 'X', 0xe8, \
	     sizeof(struct extfs_ioc_commit) + (n) * sizeof(struct extfs_range))

#define EXTFS_RETURN_ALL 0x20u /* everything that the holder has, of all files: it has stopped. A lost
                                * holder is live again. File, iomode and range are not looked at */

/* LAYOUT_RETURN: I/O on the range has stopped; what was not committed is not part of the file.
 * Returning what is not held is no error. Part of an ATOMIC layout: EINVAL. */
struct extfs_ioc_return {
	uint32_t size;
	uint32_t flags;
	uint64_t holder, key;
	struct extfs_handle file;
	uint32_t iomode;      /* enum extfs_iomode */
	uint32_t reserved0;
	uint64_t offset;
	uint64_t length;      /* UINT64_MAX: to the end of every file */
	uint64_t reserved[2];
};
#define EXTFS_IOC_LAYOUT_RETURN _IOWR('X', 0xe9, struct extfs_ioc_return)

/* RECALL: have the holders (0: all) asked for a range; who does not answer in time loses it. Does
 * not wait for them. The range is rounded outwards. */
struct extfs_ioc_recall {
	uint32_t size;
	uint32_t flags;       /* 0 */
	uint64_t holder;
	struct extfs_handle file;
	uint32_t iomode;      /* enum extfs_iomode */
	uint32_t reserved0;
	uint64_t offset;
	uint64_t length;      /* UINT64_MAX: to the end of every file */
	uint64_t reserved[2];
};
#define EXTFS_IOC_RECALL _IOWR('X', 0xea, struct extfs_ioc_recall)

struct extfs_grant {
	uint64_t holder;
	uint64_t offset;
	uint64_t length;
	uint64_t seq;
	uint32_t iomode;
	uint32_t flags;       /* EXTFS_LAYOUT_ATOMIC */
};
#define EXTFS_LIST_GRANTS 300
/* LIST: grants on a file, by offset; go on with offset = next until it is UINT64_MAX. Grants come
 * and go meanwhile. */
struct extfs_ioc_list {
	uint32_t size;
	uint32_t flags;       /* 0 */
	struct extfs_handle file;
	uint64_t offset;
	uint64_t next;        /* out */
	uint32_t count;       /* out */
	uint32_t reserved[3];
	struct extfs_grant grants[EXTFS_LIST_GRANTS];
};
#define EXTFS_IOC_LIST _IOWR('X', 0xeb, struct extfs_ioc_list)

/* WATCH: one event MAP_CHANGED for this holder when the map of the file changes next. Whoever wants
 * another one asks again, and after that for the MAP. EAGAIN: this holder watches too many files. */
#define EXTFS_WATCH_OFF 0x1u
struct extfs_ioc_watch {
	uint32_t size;
	uint32_t flags;
	uint64_t holder, key;
	struct extfs_handle file;
	uint64_t reserved[2];
};
#define EXTFS_IOC_WATCH _IOWR('X', 0xec, struct extfs_ioc_watch)

/* ---- events ---- */

enum extfs_event_type {
	EXTFS_EVENT_RECALL = 1,      /* stop I/O on [offset, offset + length), commit, return */
	EXTFS_EVENT_REVOKED = 2,     /* it was taken: do not write there, a commit of it is refused */
	EXTFS_EVENT_MAP_CHANGED = 3, /* see WATCH */
	EXTFS_EVENT_PIN_EXPIRED = 4, /* the pin of the range has ended */
	EXTFS_EVENT_OVERFLOW = 5,    /* `length` events were lost before this one: look at everything that
	                              * is held */
};

/* read(2) on a control descriptor returns as many as fit, whole and in order; it blocks until there
 * is one (the whole thread, with io_uring too, unless IOSQE_ASYNC), or EAGAIN with O_NONBLOCK;
 * EINVAL: no room for one. On a file's own descriptor, where read(2) reads the file, EVENTS returns
 * them. */
struct extfs_event {
	uint32_t size;
	uint32_t type;        /* enum extfs_event_type */
	uint64_t seq;         /* rises by one with every event of the open file, lost ones included */
	uint64_t holder;
	struct extfs_handle file;
	uint64_t offset;
	uint64_t length;
	uint64_t grant_seq;   /* RECALL: the newest grant that is meant: newer ones may be kept */
	uint64_t left_ms;     /* RECALL: time to answer, from when it was sent */
	uint32_t iomode;      /* RECALL, REVOKED: of the grant */
	uint32_t reserved;
};

#define EXTFS_EVENTS_MAX 100
/* EVENTS: the same as an ioctl, on either kind of descriptor. Never waits: there may be none. */
struct extfs_ioc_events {
	uint32_t size;
	uint32_t flags;       /* 0 */
	uint32_t count;       /* out */
	uint32_t reserved[3];
	struct extfs_event events[EXTFS_EVENTS_MAX];
};
#define EXTFS_IOC_EVENTS _IOWR('X', 0xed, struct extfs_ioc_events)

/* EVENT_SOCKET: from now on the other end of this socket says when there are events of the open
 * file. `fd` is one end of a socketpair(AF_UNIX, SOCK_SEQPACKET) of the caller, which then closes
 * it and polls the other end. A datagram of one byte, 0, arrives there when there is an event where
 * there was none, and at once if there are events already. Whoever finds it readable takes the
 * datagrams first and then the events, until there are none (EAGAIN, or fewer than there was room
 * for): until then no other datagram is sent, and afterwards the next event sends one. In this order
 * no event is missed; a datagram without an event is possible. An open file has one socket, which
 * the next one replaces; -1: none. The other end sees the end of file (POLLHUP) when it was
 * replaced, taken away, or the mount is gone.
 *
 * The end that was given can only be written from then on; what there was to be read in it is lost.
 *
 * ENOTSOCK, EINVAL, ENOTCONN: not a connected socket of this kind. EBADF: not a descriptor of the
 * caller's. EAGAIN: this user has too many, or the server all that it can have. EOPNOTSUPP: the
 * server cannot reach descriptors of the caller: it runs in a pid namespace in which the caller is
 * not, without CAP_SYS_PTRACE, on a kernel before 5.6, or kernel.yama.ptrace_scope is 3. */
struct extfs_ioc_event_socket {
	uint32_t size;
	uint32_t flags;       /* 0 */
	int32_t fd;
	uint32_t reserved[3];
};
#define EXTFS_IOC_EVENT_SOCKET _IOWR('X', 0xf4, struct extfs_ioc_event_socket)

/* ---- changes of maps that FUSE has no call for ---- */

/* EXCHANGE: two ranges, of one file or two, change places, atomically. Whole blocks, below both
 * ends of file, no overlap. CLONE: `file`'s range becomes a copy of `other`'s that shares its
 * blocks: whole blocks, the source's last one excepted. DEDUPE: the same if the bytes are equal,
 * else EBADE; `done` says how many were shared. */
struct extfs_ioc_pair {
	uint32_t size;
	uint32_t flags;       /* 0 */
	struct extfs_handle file, other;
	uint64_t offset, other_offset;
	uint64_t length;
	uint64_t done;        /* out: bytes; may be less than length for CLONE and DEDUPE: go on there */
	uint64_t reserved[2];
};
#define EXTFS_IOC_EXCHANGE _IOWR('X', 0xee, struct extfs_ioc_pair)
#define EXTFS_IOC_CLONE _IOWR('X', 0xef, struct extfs_ioc_pair)
#define EXTFS_IOC_DEDUPE _IOWR('X', 0xf0, struct extfs_ioc_pair)

/* COLLAPSE, INSERT: as FALLOC_FL_COLLAPSE_RANGE and FALLOC_FL_INSERT_RANGE of fallocate(2). */
struct extfs_ioc_shift {
	uint32_t size;
	uint32_t flags;       /* 0 */
	struct extfs_handle file;
	uint64_t offset;
	uint64_t length;
	uint64_t reserved[2];
};
#define EXTFS_IOC_COLLAPSE _IOWR('X', 0xf1, struct extfs_ioc_shift)
#define EXTFS_IOC_INSERT _IOWR('X', 0xf2, struct extfs_ioc_shift)

/* SHUTDOWN: no change reaches the device any more, as if the power had failed; for tests. The
 * argument is the struct of HANDLE, handle 0. */
#define EXTFS_IOC_SHUTDOWN _IOWR('X', 0xf3, struct extfs_ioc_handle)

#endif
