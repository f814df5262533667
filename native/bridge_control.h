/* SPDX-License-Identifier: MIT
 *
 * bridge_control.h - the control file of a mount: /.extfs and what is in it, events, and the calls
 * of extfs_ioctl.h. Internal to the bridge.
 *
 * Three inodes exist in the mount only, with numbers that no file gets: /.extfs, /.extfs/control
 * and /.extfs/status. bridge_control.c takes every request that names them, by number or by name,
 * before the core sees it; status is then read in Python, like other forwarded requests.
 *
 * A call (ioctl(2), or write(2) on the control file) is decoded and checked by bridge_ioctl.c,
 * which knows sizes, flags and who may, and served by the handler of its row, in the files of
 * their subject. A handler answers with call_reply() or request_fail(), at once or after a file
 * operation; when the journal is full it runs again from its beginning, so the arguments stay as
 * they came until the answer.
 *
 * Concurrency: as bridge.h says. Events are posted by any thread, with layouts->mutex held; the
 * mutex of struct open_events is a leaf below it, and below nothing else.
 */
#ifndef EXTFS_BRIDGE_CONTROL_H
#define EXTFS_BRIDGE_CONTROL_H

#include "bridge.h"
#include "extfs_ioctl.h"

/* ---- bridge_control.c ---- */
#define CONTROL_FIRST_NODE ((uint64_t)1 << 62)
enum control_node {
	CONTROL_DIR = 1,    /* /.extfs */
	CONTROL_FILE = 2,   /* /.extfs/control */
	CONTROL_STATUS = 3, /* /.extfs/status */
};
/* An entry of the root that no name leads to, since /.extfs has it. */
bool control_hides(const struct inode *dir, const char *name, size_t len);
static inline bool control_is_node(uint64_t nodeid) { return nodeid >= CONTROL_FIRST_NODE; }
static inline bool request_on_control(const struct request *r)
{
	return r->head.nodeid == CONTROL_FIRST_NODE + CONTROL_FILE;
}

/* ---- bridge_events.c: events of the holders of one open file ---- */
/* Events of an open file, made when first needed. NULL: no memory. */
struct open_events *open_events_get(struct bridge *b, struct open_file *of);
/* At the end of the open file: its holders are lost. May be NULL. */
void open_events_destroy(struct open_events *ev);
/* Where its holders' events go. NULL: no memory. */
struct event_sink *open_events_sink(struct open_events *ev);
/* Up to n events, oldest first; how many. ev may be NULL. */
unsigned open_events_take(struct open_events *ev, struct extfs_event *out, unsigned n);
void serve_events_read(struct request *r); /* READ of the control file */
/* What is told of events, by one byte where there was none; ours, whoever gave it. */
struct event_socket {
	int fd; /* -1: none */
	uint32_t uid;
};
#define NO_EVENT_SOCKET ((struct event_socket){.fd = -1})
/* In the place of the one before, and told at once if there are events. */
void open_events_set_socket(struct open_events *ev, struct event_socket s);
/* WAIT_EVENT is over by an interrupt: true: the request is in no list any more. */
bool open_events_cancel(struct request *r);

/* ---- bridge_socket.c ---- */
void event_socket_close(struct event_socket s); /* waits for nobody */
/* WAIT_SOCKET is over: because it is done; because the connection is: true: nothing comes of it. */
void event_socket_finish(struct request *r);
bool event_socket_cancel(struct request *r);

/* ---- bridge_ioctl.c ---- */
/* WRITE of the control file: a commit. */
void serve_control_write(struct request *r);

/* Which file a call is about: referenced until the request ends. reg: only a regular one will do.
 * -EINVAL, -ESTALE, -EISDIR, ... */
int call_file(struct request *r, const struct extfs_handle *h, bool reg, struct inode **in);
/* The inode of a handle, into r->inode or r->inode2. -EINVAL, -ESTALE. */
int call_handle_inode(struct request *r, const struct extfs_handle *h, struct inode **slot);
/* -EACCES unless the caller is root or owns the file. */
int call_owner(const struct request *r, struct inode *in);
/* -EBADF on a file's own descriptor that is not open for writing. */
int call_writable(const struct request *r);
/* The file that was opened for this request's descriptor. */
struct open_file *call_open_file(const struct request *r);
/* len bytes (zeroed) behind the message, for the struct of the answer and what a handler needs
 * until then. */
void *call_room(struct request *r, size_t len);
/* Ends the request: the first len bytes of call_room() are the answer. */
void call_reply(struct request *r, size_t len);

/* One handler for each call. arg: the whole struct, its size, flags and reserved fields checked. */
void call_map(struct request *r, const void *arg);
/* bridge_socket.c */
void call_event_socket(struct request *r, const void *arg);
/* bridge_holder.c */
/* The process of a thread; 0: it cannot be told. */
uint32_t call_process(uint32_t tid);
void call_holder_register(struct request *r, const void *arg);
void call_holder_gone(struct request *r, const void *arg);
void call_fenced(struct request *r, const void *arg);
/* bridge_layout.c */
void call_layout_get(struct request *r, const void *arg);
void call_layout_commit(struct request *r, const void *arg);
void call_layout_return(struct request *r, const void *arg);
void call_recall(struct request *r, const void *arg);
void call_list(struct request *r, const void *arg);
void call_watch(struct request *r, const void *arg);
/* bridge_remap.c */
void call_exchange(struct request *r, const void *arg);
void call_clone(struct request *r, const void *arg);
void call_dedupe(struct request *r, const void *arg);
void call_collapse(struct request *r, const void *arg);
void call_insert(struct request *r, const void *arg);

/* Whole blocks, not empty, within what a file can have. end: UINT64_MAX stands for "to the end"
 * where that is allowed. -EINVAL, -EFBIG. */
int call_range(uint64_t offset, uint64_t length, bool to_end_allowed);

/* ---- bridge_cache.c: struct cache_ops of fs.h ---- */
/* From now on the core can tell this mount's kernel caches; -ENOMEM. */
int cache_attach(struct bridge *b);
/* Not any more, and nobody is in a call that uses the bridge. */
void cache_detach(struct bridge *b);

#endif
