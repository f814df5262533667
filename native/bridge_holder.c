/* SPDX-License-Identifier: MIT
 *
 * bridge_holder.c - calls about holders: HOLDER_REGISTER, HOLDER_GONE, FENCED.
 *
 * A local holder is a process, known by its number, the time of its start, the boot and the host:
 * after a restart of the daemon that tells whether it can still be there. (extfs/layout/cgroups.py
 * asks.)
 */
#include <fcntl.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bridge_control.h"

#define FENCE_CGROUP "cgroup:"

/* The whole of a small file; its length, or -1. */
static ssize_t read_text(const char *path, char *text, size_t room)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return -1;
	n = read(fd, text, room - 1);
	close(fd);
	if (n >= 0)
		text[n] = 0;
	return n;
}

uint32_t call_process(uint32_t tid)
{
	char path[40], text[4096];
	const char *at;

	snprintf(path, sizeof(path), "/proc/%u/status", tid);
	if (!tid || read_text(path, text, sizeof(text)) < 0)
		return 0;
	at = strstr(text, "\nTgid:");
	return at ? (uint32_t)strtoul(at + 6, NULL, 10) : tid;
}

/* The process of a thread, and when it began, in clock ticks since the boot. What cannot be told is
 * 0: the holder then counts as possibly alive. */
static void identify(uint32_t tid, uint32_t *pid, uint64_t *start)
{
	char path[40], text[4096];
	const char *at;

	*start = 0;
	*pid = call_process(tid);
	snprintf(path, sizeof(path), "/proc/%u/stat", *pid);
	if (!*pid || read_text(path, text, sizeof(text)) < 0)
		return;
	/* Field 22; the second is a name in brackets, which may contain anything. */
	at = strrchr(text, ')');
	for (unsigned field = 2; at && field < 22; field++)
		at = strchr(at + 1, ' ');
	if (at)
		*start = strtoull(at + 1, NULL, 10);
}

/* 8-4-4-4-12 hexadecimal digits. */
static void read_boot_id(uint8_t id[16])
{
	char text[64];
	unsigned n = 0;

	memset(id, 0, 16);
	if (read_text("/proc/sys/kernel/random/boot_id", text, sizeof(text)) < 0)
		return;
	for (const char *at = text; *at && n < 32; at++) {
		const char *digits = "0123456789abcdef", *d = strchr(digits, *at);

		if (!d)
			continue;
		id[n / 2] = (uint8_t)(id[n / 2] << 4 | (d - digits));
		n++;
	}
}

/* Tells this host from others after both have been restarted: FNV-1a of its machine id, or 0. */
static uint64_t machine_key(void)
{
	uint64_t key = 0xcbf29ce484222325;
	char text[64];
	ssize_t n = read_text("/etc/machine-id", text, sizeof(text));
	unsigned digits = 0;

	for (ssize_t i = 0; i < n && text[i] != '\n'; i++, digits++)
		key = (key ^ (uint8_t)text[i]) * 0x100000001b3;
	return digits == 32 ? key : 0;
}

/* Where cgroup v2 is mounted: beside the directories of v1 on some hosts. -EPERM: nowhere. */
static int find_cgroup_root(char *root, size_t room)
{
	FILE *mounts = setmntent("/proc/mounts", "re");
	char text[4096];
	struct mntent entry;
	int err = -EPERM;

	while (err && mounts && getmntent_r(mounts, &entry, text, sizeof(text)))
		if (!strcmp(entry.mnt_type, "cgroup2") && strlen(entry.mnt_dir) < room) {
			strcpy(root, entry.mnt_dir);
			err = 0;
		}
	if (mounts)
		endmntent(mounts);
	return err;
}

/* Whoever may be killed in place of the holder must be in the hands of who says so: root, or the
 * owner of the file that kills the cgroup. -EINVAL, -EPERM. */
static int check_fence(const struct request *r, const char *fence)
{
	const char *path = fence + strlen(FENCE_CGROUP);
	char root[256], kill[sizeof(root) + HOLDER_FENCE_LEN + sizeof("/cgroup.kill")];
	struct stat st;

	if (!fence[0])
		return 0;
	if (strncmp(fence, FENCE_CGROUP, strlen(FENCE_CGROUP)) || path[0] != '/' || !path[1] ||
	    strstr(path, "/../") || strstr(path, "//") ||
	    (strlen(path) >= 3 && !strcmp(path + strlen(path) - 3, "/..")))
		return -EINVAL;
	if (!r->head.uid)
		return 0;
	if (find_cgroup_root(root, sizeof(root)) < 0)
		return -EPERM;
	snprintf(kill, sizeof(kill), "%s%s/cgroup.kill", root, path);
	if (lstat(kill, &st) < 0 || st.st_uid != r->head.uid)
		return -EPERM;
	return 0;
}

static int check_texts(const struct request *r, const struct extfs_ioc_holder *call)
{
	if (!memchr(call->name, 0, sizeof(call->name)) ||
	    !memchr(call->fence, 0, sizeof(call->fence)))
		return -EINVAL;
	return check_fence(r, call->fence);
}

static int register_new(struct request *r, const struct extfs_ioc_holder *call,
			struct event_sink *sink, uint64_t *id, uint64_t *key)
{
	struct holder_spec spec = {
		.kind = call->flags & EXTFS_HOLDER_CLIENT ? HOLDER_CLIENT : HOLDER_LOCAL,
		.uid = r->head.uid,
	};
	int err = check_texts(r, call);

	_Static_assert(sizeof(spec.name) == sizeof(call->name) &&
			       sizeof(spec.fence) == sizeof(call->fence),
		       "texts");
	if (err)
		return err;
	identify(r->head.pid, &spec.pid, &spec.pid_start);
	read_boot_id(spec.boot_id);
	if (spec.kind == HOLDER_LOCAL)
		spec.fence_key = machine_key();
	/* Not what is behind the end of the texts: it goes to the disk. */
	snprintf(spec.name, sizeof(spec.name), "%s", call->name);
	snprintf(spec.fence, sizeof(spec.fence), "%s", call->fence);
	return holder_register(r->t->b->fs, &spec, sink, id, key);
}

static int check_register(struct request *r, const struct extfs_ioc_holder *call)
{
	struct open_file *of = call_open_file(r);

	if ((call->flags & EXTFS_HOLDER_CLIENT) && (call->flags & EXTFS_HOLDER_RESUME))
		return -EINVAL;
	if (request_on_control(r))
		return (call->flags & EXTFS_HOLDER_CLIENT) && r->head.uid ? -EPERM : 0;
	if (call->flags & EXTFS_HOLDER_CLIENT)
		return -EPERM;
	if (!inode_is_reg(of->in))
		return -EISDIR;
	return call_owner(r, of->in);
}

void call_holder_register(struct request *r, const void *arg)
{
	const struct extfs_ioc_holder *call = arg;
	struct fs *fs = r->t->b->fs;
	struct extfs_ioc_holder *out;
	struct open_events *ev = NULL;
	struct event_sink *sink = NULL;
	uint64_t id = call->id, key = call->key;
	int err = check_register(r, call);

	if (!err) {
		ev = open_events_get(r->t->b, call_open_file(r));
		sink = ev ? open_events_sink(ev) : NULL;
		err = sink ? 0 : -ENOMEM;
	}
	if (!err && (call->flags & EXTFS_HOLDER_RESUME))
		err = holder_resume(fs, id, key, sink);
	else if (!err)
		err = register_new(r, call, sink, &id, &key);
	if (err) {
		request_fail(r, err);
		return;
	}
	out = call_room(r, sizeof(*out));
	*out = *call;
	out->id = id;
	out->key = key;
	out->recall_ms = fs->opt.recall_ms;
	call_reply(r, sizeof(*out));
}

static void reply_as_it_came(struct request *r, const struct extfs_ioc_holder *call, int err)
{
	if (err) {
		request_fail(r, err);
		return;
	}
	memcpy(call_room(r, sizeof(*call)), call, sizeof(*call));
	call_reply(r, sizeof(*call));
}

void call_holder_gone(struct request *r, const void *arg)
{
	const struct extfs_ioc_holder *call = arg;
	struct fs *fs = r->t->b->fs;
	int err = holder_check(fs, call->id, call->key);

	/* That it is lost shows in what it holds. */
	if (!err || err == -EOWNERDEAD)
		err = holder_gone(fs, call->id);
	reply_as_it_came(r, call, err);
}

void call_fenced(struct request *r, const void *arg)
{
	const struct extfs_ioc_holder *call = arg;

	reply_as_it_came(r, call, holder_fenced(r->t->b->fs, call->id));
}
