/* SPDX-License-Identifier: MIT
 *
 * bridge_api.c - the bridge's calls of extfs_core.h.
 */
#include <stdlib.h>
#include <string.h>

#include "types.h"

#include "extfs_core.h"

#include "bridge_mount.h"
#include "log.h"

int extfs_bridge_start(struct fs *fs, const struct extfs_bridge_options *opt, struct bridge **out)
{
	struct mount_request m = {
		.read_only = opt->read_only,
		.writeback_cache = opt->writeback_cache,
		.threads = opt->threads,
		.transport = (enum transport_choice)opt->transport,
		.why = opt->why,
		.why_len = opt->why_len,
		.fsname = opt->fsname ? opt->fsname : "extfs",
	};
	char bad[208], *path;

	_Static_assert(TRANSPORT_ONLY_URING == EXTFS_TRANSPORT_URING &&
		       TRANSPORT_ONLY_CLASSIC == EXTFS_TRANSPORT_CLASSIC, "the same choices");
	int err = mount_flags(opt->options, &m.flags, bad, sizeof(bad));

	if (err) {
		log_msg(LOG_ERROR, "unknown mount option: %s", bad);
		return err;
	}
	path = realpath(opt->mountpoint, NULL);
	if (!path)
		return -errno;
	m.mountpoint = path;
	err = bridge_start(fs, &m, out);
	free(path);
	return err;
}

int extfs_bridge_forward_fd(struct bridge *b) { return forward_peer_fd(b); }
int extfs_bridge_event_fd(struct bridge *b) { return b->event_fd; }

int extfs_bridge_unmount(struct bridge *b, int lazy) { return unmount_fuse(b->mountpoint, lazy); }
int extfs_bridge_abort(struct bridge *b) { return bridge_abort(b); }

int extfs_bridge_stop(struct bridge *b)
{
	bridge_stop(b);
	return 0;
}

int extfs_bridge_notify_inode(struct bridge *b, uint64_t ino, int64_t offset, int64_t len)
{
	return bridge_notify_inode(b, ino, offset, len, NULL);
}

int extfs_bridge_notify_entry(struct bridge *b, uint64_t dir, const char *name, size_t len)
{
	return bridge_notify_entry(b, dir, name, len, NULL);
}

int extfs_bridge_poll_when_idle(struct bridge *b, int fd)
{
	struct idle_poll *p;
	int err = idle_poll_create(fd, &p);

	if (!err)
		atomic_store_explicit(&b->idle, p, memory_order_release);
	return err;
}

static void idle_stats(struct bridge *b, struct extfs_bridge_stats *out)
{
	struct idle_stats s;

	idle_poll_stats(atomic_load(&b->idle), &s);
	out->idle_polls = s.times;
	out->idle_poll_ns = s.held_ns;
	out->idle_polling = s.held;
	out->idle_poll_error = s.error;
}

void extfs_bridge_get_stats(struct bridge *b, struct extfs_bridge_stats *out)
{
	_Static_assert(ARRAY_LEN(out->by_opcode) >= FUSE_ABI_OPCODES, "an opcode has no counter");
	memset(out, 0, sizeof(*out));
	out->forwarded = forward_count(b);
	idle_stats(b, out);
	for (unsigned i = 0; i < b->n_threads; i++) {
		const struct bridge_thread *t = &b->threads[i];

		out->parked += __atomic_load_n(&t->parked, __ATOMIC_RELAXED);
		out->by_ring += __atomic_load_n(&t->by_ring, __ATOMIC_RELAXED);
		out->interrupted += __atomic_load_n(&t->interrupted, __ATOMIC_RELAXED);
		for (unsigned op = 0; op < FUSE_ABI_OPCODES; op++) {
			uint64_t n = __atomic_load_n(&t->by_opcode[op], __ATOMIC_RELAXED);

			out->by_opcode[op] += n;
			out->requests += n;
		}
	}
}

int extfs_bridge_transport(struct bridge *b, const char **why)
{
	bool uring = atomic_load(&b->transport) == TRANSPORT_URING;

	*why = uring ? "" : b->transport_why;
	return uring ? EXTFS_TRANSPORT_URING : EXTFS_TRANSPORT_CLASSIC;
}

const char *extfs_bridge_opcode(unsigned opcode, int *server)
{
	const struct opcode_row *row = bridge_opcode(opcode);

	*server = row ? (int)row->server : 0;
	return row ? row->name : NULL;
}
