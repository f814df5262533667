/* SPDX-License-Identifier: MIT
 *
 * core_api.c - the calls of extfs_core.h about devices, the whole filesystem, names and attributes:
 * each finds the inodes that it is given by number, does one operation of the core, and lets go of
 * them. No policy, no state.
 */
#include "core_api.h"

#include <string.h>

#include "acl.h"
#include "alloc.h"
#include "device_sim.h"
#include "file_early.h"
#include "heartbeat.h"
#include "journal.h"
#include "log.h"
#include "namei.h"
#include "plock.h"
#include "reaper.h"
#include "xattr.h"

int extfs_errno(int code) { return err_errno(code); }
const char *extfs_error_text(int code) { return err_text(code); }
const char *extfs_error_name(int code) { return err_name(code); }
int extfs_is_retry(int code) { return code == -ERR_JOURNAL_FULL; }
int extfs_log_next(char *buf, size_t len) { return log_next(buf, len); }
int extfs_log_fd(void) { return log_eventfd(); }

/* ---- devices ---- */

int extfs_device_open(const char *path, unsigned flags, struct device **out)
{
	_Static_assert(EXTFS_DEV_READ_ONLY == DEV_READ_ONLY && EXTFS_DEV_SHARED == DEV_SHARED,
		       "flags");
	return dev_open(path, flags, out);
}
void extfs_device_close(struct device *dev) { dev_close(dev); }
uint64_t extfs_device_size(struct device *dev) { return dev->size; }
int extfs_device_read(struct device *dev, uint64_t offset, void *buf, size_t len)
{
	return dev_read(dev, offset, buf, len);
}
int extfs_device_write(struct device *dev, uint64_t offset, const void *buf, size_t len)
{
	return dev_write(dev, offset, buf, len, 0);
}

int extfs_sim_create(uint64_t size, uint32_t align, uint64_t seed, struct sim **out)
{
	return sim_create(size, align, seed, out);
}
void extfs_sim_destroy(struct sim *sim) { sim_destroy(sim); }
int extfs_sim_device(struct sim *sim, struct device **out) { return sim_device(sim, out); }
uint64_t extfs_sim_events(struct sim *sim) { return sim_events(sim); }
void extfs_sim_crash_at(struct sim *sim, uint64_t n) { sim_crash_at(sim, n); }
int extfs_sim_crashed(struct sim *sim) { return sim_crashed(sim); }
void extfs_sim_restart(struct sim *sim, uint64_t seed) { sim_restart(sim, seed); }
void extfs_sim_settle(struct sim *sim) { sim_settle(sim); }
void extfs_sim_fail(struct sim *sim, int kind, uint64_t offset, uint64_t len, unsigned count)
{
	sim_fail(sim, (enum io_kind)kind, offset, len, count);
}
void extfs_sim_shuffle(struct sim *sim, int shuffle) { sim_shuffle(sim, shuffle); }
int extfs_sim_peek(struct sim *sim, uint64_t offset, void *buf, size_t len)
{
	return sim_peek(sim, offset, buf, len);
}
int extfs_sim_poke(struct sim *sim, uint64_t offset, const void *buf, size_t len)
{
	return sim_poke(sim, offset, buf, len);
}
void extfs_sim_drop_flushes(struct sim *sim, uint64_t n) { sim_drop_flushes(sim, n); }
int extfs_sim_clone(struct sim *sim, struct sim **out) { return sim_clone(sim, out); }

/* ---- format, open, close ---- */

int extfs_mkfs(struct device *dev, const struct extfs_mkfs_options *opt)
{
	struct mkfs_options o = {
		.label = opt->label,
		.journal_blocks = opt->journal_blocks,
		.force = opt->force != 0,
		.uuid = opt->uuid,
		.now_sec = opt->now_sec,
		.size_blocks = opt->size_blocks,
	};

	return fs_mkfs(dev, &o);
}

int extfs_open(struct device *dev, const struct extfs_mount_options *opt, struct fs **out)
{
	struct fs_options o = {
		.read_only = opt->read_only != 0,
		.cache_bytes = opt->cache_bytes ? opt->cache_bytes : 64u << 20,
		.inode_cache = opt->inode_cache ? opt->inode_cache : 16384,
		.commit_ms = opt->commit_ms ? opt->commit_ms : 1000,
		.no_heartbeat = opt->no_heartbeat != 0,
		.recall_ms = opt->recall_ms ? opt->recall_ms : 10000,
		.early_bytes = opt->early_bytes,
		.mutant = opt->mutant,
	};

	_Static_assert(EXTFS_ATIME_NONE == ATIME_NONE && EXTFS_ATIME_STRICT == ATIME_STRICT,
		       "atime");
	_Static_assert(EXTFS_MUTANT_RIDER_APART == MUTANT_RIDER_APART, "mutants");
	switch (opt->atime) {
	case EXTFS_ATIME_RELATIME: o.atime = ATIME_RELATIME; break;
	case EXTFS_ATIME_STRICT: o.atime = ATIME_STRICT; break;
	case EXTFS_ATIME_NONE: o.atime = ATIME_NONE; break;
	default: return -EINVAL;
	}
	return fs_open(dev, &o, out);
}

int extfs_close(struct fs *fs)
{
	plock_drop_nfs(fs);
	return fs_close(fs);
}

void extfs_abandon(struct fs *fs)
{
	plock_drop_nfs(fs);
	fs_abandon(fs);
}

int extfs_is_shutdown(struct fs *fs)
{
	return fs_is_shutdown(fs) ? fs_shutdown_cause(fs) : 0;
}

static void super_out(const struct super *sb, struct extfs_super *out)
{
	memset(out, 0, sizeof(*out));
	memcpy(out->uuid, sb->uuid, sizeof(out->uuid));
	memcpy(out->label, sb->label, sizeof(out->label));
	out->compat = sb->compat;
	out->ro_compat = sb->ro_compat;
	out->incompat = sb->incompat;
	out->total_blocks = sb->total_blocks;
	out->ag_blocks = sb->ag_blocks;
	out->ag_count = sb->ag_count;
	out->journal_start = sb->journal_start;
	out->journal_blocks = sb->journal_blocks;
	out->block_size = BLOCK_SIZE;
	out->created_sec = sb->created_sec;
	out->from_copy = sb->from_copy;
}

int extfs_super_read(struct device *dev, struct extfs_super *out)
{
	struct super sb;
	int err = super_read(dev, &sb);

	if (!err)
		super_out(&sb, out);
	return err;
}

int extfs_device_mounted(struct device *dev)
{
	struct super sb;
	int err = super_read(dev, &sb);

	return err ? err : heartbeat_look(dev, sb.uuid);
}

void extfs_shutdown(struct fs *fs, const char *why)
{
	fs_shutdown_writes(fs, -ECANCELED, "%s", why);
}

int extfs_mount_stands(struct fs *fs)
{
	return heartbeat_ours(fs);
}

int extfs_device_hold(struct fs *fs) { return dev_hold(fs->dev); }

void extfs_device_release(struct fs *fs) { dev_release(fs->dev); }

void extfs_super_of(struct fs *fs, struct extfs_super *out) { super_out(&fs->super, out); }

void extfs_statfs(struct fs *fs, struct extfs_space *out)
{
	struct alloc_space sp;

	alloc_statfs(fs, &sp);
	out->total = sp.total;
	out->free = sp.free;
	out->avail = sp.avail;
	out->busy = sp.busy;
	out->quarantined = sp.quarantined;
	fs_rdlock(fs);
	out->inodes = get64(fs_root(fs)->inodes);
	fs_unlock(fs);
}

void extfs_get_stats(struct fs *fs, struct extfs_stats *out)
{
	struct jrn_stats j;
	struct buf_stats b;
	struct early_stats e;

	early_get_stats(fs, &e);
	jrn_get_stats(fs, &j);
	buf_get_stats(fs, &b);
	*out = (struct extfs_stats){
		.commits = j.commits, .flush_only = j.flush_only, .images = j.images,
		.checkpoints = j.checkpoints, .home_writes = j.home_writes,
		.log_blocks = j.log_blocks, .log_used = j.log_used,
		.waits_for_space = j.waits_for_space,
		.bufs = b.bufs, .dirty = b.dirty, .logged = b.logged,
		.hits = b.hits, .misses = b.misses, .evictions = b.evictions,
		.lookups = inode_lookup_entries(fs),
		.dev_reads = atomic_load(&fs->dev->stat_reads),
		.dev_writes = atomic_load(&fs->dev->stat_writes),
		.dev_flushes = atomic_load(&fs->dev->stat_flushes),
		.durable_xid = jrn_durable(fs),
		.early_writes = e.writes, .early_waits = e.waits, .early_errors = e.errors,
		.early_bytes = e.bytes,
	};
	fs_rdlock(fs);
	out->running_xid = jrn_running(fs);
	fs_unlock(fs);
}

/* ---- durability ---- */

int extfs_sync(struct fs *fs)
{
	xid_t xid;
	int err;

	if (fs->read_only)
		return 0;
	early_sync(fs);
	do {
		err = inode_flush_lazy(fs, UINT32_MAX);
		if (err == -ERR_JOURNAL_FULL) {
			err = jrn_wait_space_blocking(fs);
			if (!err)
				err = 1;
		}
	} while (err > 0);
	if (err)
		return err;
	fs_rdlock(fs);
	xid = jrn_running(fs);
	fs_unlock(fs);
	return jrn_force_blocking(fs, xid);
}

int extfs_wait_space(struct fs *fs) { return jrn_wait_space_blocking(fs); }
void extfs_drain(struct fs *fs) { reaper_drain(fs); }
void extfs_checkpoint(struct fs *fs) { jrn_kick_checkpoint(fs); }

/* ---- names and attributes ---- */

int core_inode(struct fs *fs, uint64_t ino, struct inode **out)
{
	int err;

	fs_rdlock(fs);
	err = inode_get(fs, ino, out);
	fs_unlock(fs);
	return err;
}

void core_stat(struct inode *in, struct extfs_stat *out)
{
	struct inode_stat st;
	const struct inode_core *c = &st.core;

	namei_stat(in, &st);
	*out = (struct extfs_stat){
		.ino = st.ino, .generation = c->generation, .mode = c->mode, .uid = c->uid,
		.gid = c->gid, .nlink = c->nlink, .flags = c->flags, .size = c->size,
		.blocks = c->blocks, .atime = c->atime.sec, .mtime = c->mtime.sec,
		.ctime = c->ctime.sec, .btime = c->btime.sec, .atime_ns = c->atime.nsec,
		.mtime_ns = c->mtime.nsec, .ctime_ns = c->ctime.nsec, .btime_ns = c->btime.nsec,
		.rdev = c->rdev, .parent = c->parent, .change = c->change,
		.subdirs = c->subdirs, .xattrs = c->xattrs,
	};
}

/* What every call that returns a new, a found or a lost inode ends with. */
static int put_with_stat(int err, struct inode *in, struct extfs_stat *out)
{
	if (err)
		return err;
	core_stat(in, out);
	inode_put(in);
	return 0;
}

static struct cred cred_in(const struct extfs_cred *c)
{
	return (struct cred){ .uid = c->uid, .gid = c->gid, .umask = c->umask };
}

int extfs_getattr(struct fs *fs, uint64_t ino, struct extfs_stat *out)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	return put_with_stat(err, in, out);
}

int extfs_lookup(struct fs *fs, uint64_t dir, const char *name, size_t len, struct extfs_stat *out)
{
	struct inode *d, *in;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = namei_lookup(d, name, len, &in);
	inode_put(d);
	return put_with_stat(err, in, out);
}

int extfs_mknod(struct fs *fs, uint64_t dir, const char *name, size_t len, uint32_t mode,
		uint64_t rdev,
		const struct extfs_cred *cred, struct extfs_stat *out)
{
	struct cred c = cred_in(cred);
	struct inode *d, *in;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = namei_create(d, name, len, mode, rdev, &c, &in);
	if (!err)
		core_tell_name(d, name, len);
	inode_put(d);
	return put_with_stat(err, in, out);
}

int extfs_mkdir(struct fs *fs, uint64_t dir, const char *name, size_t len, uint32_t mode,
		const struct extfs_cred *cred, struct extfs_stat *out)
{
	struct cred c = cred_in(cred);
	struct inode *d, *in;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = namei_mkdir(d, name, len, mode, &c, &in);
	if (!err)
		core_tell_name(d, name, len);
	inode_put(d);
	return put_with_stat(err, in, out);
}

int extfs_symlink(struct fs *fs, uint64_t dir, const char *name, size_t len, const char *target,
		  size_t target_len, const struct extfs_cred *cred, struct extfs_stat *out)
{
	struct cred c = cred_in(cred);
	struct inode *d, *in;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = namei_symlink(d, name, len, target, target_len, &c, &in);
	if (!err)
		core_tell_name(d, name, len);
	inode_put(d);
	return put_with_stat(err, in, out);
}

int extfs_tmpfile(struct fs *fs, uint64_t dir, uint32_t mode, const struct extfs_cred *cred,
		  struct extfs_stat *out)
{
	struct cred c = cred_in(cred);
	struct inode *d, *in;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = namei_tmpfile(d, mode, &c, &in);
	inode_put(d);
	if (err)
		return err;
	core_stat(in, out);
	inode_lookup_add(fs, in->ino, 1); /* extfs_release() takes it back */
	inode_put(in);
	return 0;
}

int extfs_link(struct fs *fs, uint64_t ino, uint64_t dir, const char *name, size_t len,
	       struct extfs_stat *out)
{
	struct inode *d, *in;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = core_inode(fs, ino, &in);
	if (err) {
		inode_put(d);
		return err;
	}
	err = namei_link(in, d, name, len);
	if (!err) {
		core_tell_name(d, name, len);
		core_tell_attributes(in);
		core_stat(in, out);
	}
	inode_put(d);
	inode_put(in);
	return err;
}

/* The inode that lost a name; NULL: none did. */
static void lost_out(struct inode *in, struct extfs_stat *out)
{
	if (out)
		memset(out, 0, sizeof(*out));
	if (!in)
		return;
	core_tell_attributes(in);
	if (out)
		core_stat(in, out);
	inode_put(in);
}

static int remove_name(struct fs *fs, uint64_t dir, const char *name, size_t len, bool want_dir,
		       uint64_t meant, struct extfs_stat *lost)
{
	struct inode *d, *victim = NULL;
	int err = core_inode(fs, dir, &d);

	if (err)
		return err;
	err = namei_remove_meant(d, name, len, want_dir, meant, &victim);
	if (!err)
		core_tell_name(d, name, len);
	inode_put(d);
	if (!err)
		lost_out(victim, lost);
	return err;
}

int extfs_unlink(struct fs *fs, uint64_t dir, const char *name, size_t len, uint64_t meant,
		 struct extfs_stat *lost)
{
	return remove_name(fs, dir, name, len, false, meant, lost);
}

int extfs_rmdir(struct fs *fs, uint64_t dir, const char *name, size_t len, uint64_t meant,
		struct extfs_stat *lost)
{
	return remove_name(fs, dir, name, len, true, meant, lost);
}

/* Who has got a name, or, if somebody was quick, who has it now. */
static void tell_moved(struct inode *dir, const char *name, size_t len)
{
	struct inode *in;

	if (!core_tells(dir->fs) || namei_lookup(dir, name, len, &in))
		return;
	core_tell_attributes(in);
	inode_put(in);
}

int extfs_rename(struct fs *fs, uint64_t from, const char *name, size_t len, uint64_t to,
		 const char *new_name, size_t new_len, unsigned flags,
		 const struct extfs_rename_meant *meant, struct extfs_stat *lost)
{
	struct inode *f, *t, *victim = NULL;
	int err = core_inode(fs, from, &f);

	if (err)
		return err;
	err = core_inode(fs, to, &t);
	if (err) {
		inode_put(f);
		return err;
	}
	if (meant)
		err = namei_rename_meant(f, name, len, meant->moved, t, new_name, new_len,
					 meant->victim, flags, &victim);
	else
		err = namei_rename(f, name, len, t, new_name, new_len, flags, &victim);
	if (!err) {
		core_tell_name(f, name, len);
		core_tell_name(t, new_name, new_len);
		tell_moved(t, new_name, new_len);
		if (flags & EXTFS_RENAME_EXCHANGE)
			tell_moved(f, name, len);
	}
	inode_put(t);
	inode_put(f);
	if (!err)
		lost_out(victim, lost);
	return err;
}

ssize_t extfs_readlink(struct fs *fs, uint64_t ino, char *buf, size_t cap)
{
	struct inode *in;
	ssize_t n = core_inode(fs, ino, &in);

	if (n)
		return n;
	n = namei_readlink(in, buf, cap);
	inode_put(in);
	return n;
}

int extfs_setattr(struct fs *fs, uint64_t ino, unsigned valid, const struct extfs_stat *st)
{
	struct attr_change ch = {
		.valid = valid, .mode = st->mode, .uid = st->uid, .gid = st->gid,
		.atime = { st->atime, st->atime_ns }, .mtime = { st->mtime, st->mtime_ns },
	};
	struct inode *in;
	int err;

	_Static_assert(EXTFS_ATTR_MTIME == ATTR_MTIME && EXTFS_ATTR_KILL_PRIV == ATTR_KILL_PRIV,
		       "bits");
	if (valid & ~(ATTR_MODE | ATTR_UID | ATTR_GID | ATTR_ATIME | ATTR_MTIME | ATTR_KILL_PRIV))
		return -EINVAL;
	err = core_inode(fs, ino, &in);
	if (err)
		return err;
	err = namei_setattr(in, &ch);
	if (!err)
		core_tell_attributes(in);
	inode_put(in);
	return err;
}

struct readdir_fill {
	struct extfs_dirent *out;
	unsigned n, max;
};

static int readdir_add(void *arg, const struct dirent_view *ent)
{
	struct readdir_fill *fill = arg;
	struct extfs_dirent *d;

	if (fill->n == fill->max)
		return 1;
	d = &fill->out[fill->n++];
	d->ino = ent->ino;
	d->cookie = ent->cookie;
	d->type = ent->type;
	d->name_len = ent->name_len;
	memcpy(d->name, ent->name, ent->name_len);
	d->name[ent->name_len] = '\0';
	return 0;
}

int extfs_readdir(struct fs *fs, uint64_t dir, uint64_t after, struct extfs_dirent *out, unsigned n)
{
	struct readdir_fill fill = { out, 0, MIN(n, (unsigned)INT32_MAX) };
	struct inode *d;
	int err;

	fs_rdlock(fs);
	err = inode_get(fs, dir, &d);
	if (!err) {
		err = inode_is_dir(d) ? dir_iterate(d, after, readdir_add, &fill) : -ENOTDIR;
		fs_unlock(fs);
		inode_put(d);
	} else {
		fs_unlock(fs);
	}
	return err < 0 ? err : (int)fill.n;
}

int extfs_open_inode(struct fs *fs, uint64_t ino)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	inode_lookup_add(fs, ino, 1);
	inode_put(in);
	return 0;
}

int extfs_release(struct fs *fs, uint64_t ino)
{
	inode_lookup_forget(fs, ino, 1);
	return 0;
}

int extfs_handle_check(struct fs *fs, uint64_t ino, uint32_t generation)
{
	struct inode *in;
	int err = inode_get_handle(fs, ino, generation, &in);

	if (!err)
		inode_put(in);
	return err;
}

int extfs_access(struct fs *fs, uint64_t ino, uint32_t uid, const uint32_t *gids, unsigned n,
		 unsigned mask)
{
	struct inode *in;
	int res;

	_Static_assert(EXTFS_ACCESS_R == ACCESS_READ && EXTFS_ACCESS_W == ACCESS_WRITE &&
		       EXTFS_ACCESS_X == ACCESS_EXECUTE, "bits");
	if (mask & ~(unsigned)(ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE))
		return -EINVAL;
	res = core_inode(fs, ino, &in);
	if (res)
		return res;
	res = acl_access(in, uid, gids, n, mask);
	inode_put(in);
	return res;
}

ssize_t extfs_xattr_get(struct fs *fs, uint64_t ino, const char *name, void *value, size_t cap)
{
	struct inode *in;
	ssize_t n = core_inode(fs, ino, &in);

	if (n)
		return n;
	n = xattr_get(in, name, value, cap);
	inode_put(in);
	return n;
}

int extfs_xattr_set(struct fs *fs, uint64_t ino, const char *name, const void *value, size_t len,
		    unsigned flags)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	err = xattr_set(in, name, value, len, flags);
	if (!err)
		core_tell_attributes(in);
	inode_put(in);
	return err;
}

int extfs_xattr_remove(struct fs *fs, uint64_t ino, const char *name)
{
	struct inode *in;
	int err = core_inode(fs, ino, &in);

	if (err)
		return err;
	err = xattr_remove(in, name);
	if (!err)
		core_tell_attributes(in);
	inode_put(in);
	return err;
}

ssize_t extfs_xattr_list(struct fs *fs, uint64_t ino, char *names, size_t cap)
{
	struct inode *in;
	ssize_t n = core_inode(fs, ino, &in);

	if (n)
		return n;
	n = xattr_list(in, names, cap);
	inode_put(in);
	return n;
}
