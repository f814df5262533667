/* SPDX-License-Identifier: MIT
 *
 * test_namei_model.c - random operations on names, against a tree in memory: every result code,
 * then the whole tree; across remounts and power cuts.
 *
 * After a power cut the filesystem must equal the model as it was after some operation that is not
 * older than the last durable one: the model's digest after each operation is kept, and the digest
 * of what is found must be among them.
 *
 *   test_namei_model [SEED]     that seed alone, of every test
 */
#include "names_fixture.h"

#define NAMES 10u
#define NODES_MAX 20000u

struct node {
	inum_t ino;
	uint32_t generation, mode, uid, nlink;
	struct node *parent; /* directory */
	struct node *child[NAMES];
};

static struct node *nodes[NODES_MAX];
static unsigned node_count;
static struct node *root;
static unsigned long only_seed;

/* ---- model ---- */

static const char *name_of(unsigned i)
{
	static const char *const names[NAMES] = {"a", "b", "c.txt", "\xff\xfe",
						 "a name with spaces", "-", "...",
		"long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-name",
		"\n", "z"};

	return names[i];
}

static struct node *node_new(struct inode *in, uint32_t nlink)
{
	struct node *n = calloc(1, sizeof(*n));

	assert_true(n && node_count < NODES_MAX);
	*n = (struct node){.ino = in->ino, .generation = core_of(in).generation,
			   .mode = core_of(in).mode, .nlink = nlink};
	nodes[node_count++] = n;
	return n;
}

static bool is_dir(const struct node *n) { return S_ISDIR(n->mode); }

static bool is_empty(const struct node *n)
{
	for (unsigned i = 0; i < NAMES; i++)
		if (n->child[i])
			return false;
	return true;
}

static bool is_below(const struct node *n, const struct node *top)
{
	while (n != top && n != root)
		n = n->parent;
	return n == top;
}

static uint64_t mix(uint64_t hash, uint64_t x)
{
	hash = (hash ^ x) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 29;
}

static uint64_t digest_model(const struct node *n)
{
	uint64_t hash = mix(mix(mix(n->ino, n->mode), n->uid), n->nlink);

	for (unsigned i = 0; i < NAMES && is_dir(n); i++)
		hash = mix(hash, n->child[i] ? digest_model(n->child[i]) : i);
	return hash;
}

static void model_free(void)
{
	while (node_count > 0)
		free(nodes[--node_count]);
}

/* ---- the filesystem ---- */

static struct inode *open_node(const struct node *n)
{
	struct inode *in;

	OK(inode_get_handle(world.fs, n->ino, n->generation, &in));
	return in;
}

/* The same digest of what is on the device; and what must hold of every tree. */
static uint64_t digest_fs(struct inode *in, inum_t parent)
{
	struct inode_core core = core_of(in);
	uint64_t hash = mix(mix(mix(in->ino, core.mode), core.uid), core.nlink);
	unsigned entries = 0, subdirs = 0;

	if (!S_ISDIR(core.mode))
		return hash;
	assert_int_equal(core.parent, parent);
	for (unsigned i = 0; i < NAMES; i++) {
		struct inode *child;
		int rc = namei_lookup(in, name_of(i), strlen(name_of(i)), &child);

		if (rc == -ENOENT) {
			hash = mix(hash, i);
			continue;
		}
		OK(rc);
		entries++;
		subdirs += inode_is_dir(child);
		hash = mix(hash, digest_fs(child, in->ino));
		inode_put(child);
	}
	assert_int_equal(core.size, entries);
	assert_int_equal(core.subdirs, subdirs);
	assert_int_equal(core.nlink, 2 + subdirs);
	return hash;
}

static void check_all(void)
{
	assert_int_equal(digest_fs(world.root, 1), digest_model(root));
}

/* ---- operations ---- */

static unsigned rnd(unsigned n) { return (unsigned)(random() % n); }

static struct node *random_dir(void)
{
	struct node *n = root;

	for (unsigned steps = rnd(8); steps > 0; steps--) {
		unsigned i = rnd(NAMES);

		if (n->child[i] && is_dir(n->child[i]))
			n = n->child[i];
	}
	return n;
}

static void drop(struct node *dir, unsigned name)
{
	struct node *n = dir->child[name];

	dir->child[name] = NULL;
	if (is_dir(n)) {
		dir->nlink--;
		n->nlink = 0;
	} else {
		n->nlink--;
	}
}

static void do_create(struct node *dir, unsigned name)
{
	static const uint32_t types[] = {S_IFREG, S_IFREG, S_IFIFO, S_IFSOCK, S_IFCHR};
	struct inode *d = open_node(dir), *in = NULL;
	const char *text = name_of(name);
	size_t len = strlen(text);
	unsigned kind = rnd(4);
	int rc;

	if (kind < 2)
		RETRY(rc,
		      namei_create(d, text, len, types[rnd(ARRAY_LEN(types))] | rnd(01000), 0,
				   &root_cred, &in));
	else if (kind == 2)
		RETRY(rc, namei_mkdir(d, text, len, rnd(01000), &root_cred, &in));
	else
		RETRY(rc, namei_symlink(d, text, len, text, len, &root_cred, &in));
	assert_int_equal(rc, dir->child[name] ? -EEXIST : 0);
	if (!rc) {
		dir->child[name] = node_new(in, kind == 2 ? 2 : 1);
		dir->child[name]->parent = dir;
		dir->nlink += kind == 2;
		inode_put(in);
	}
	inode_put(d);
}

static void do_tmpfile(struct node *dir, unsigned name)
{
	struct inode *d = open_node(dir), *in;
	int rc;

	RETRY(rc, namei_tmpfile(d, rnd(01000), &root_cred, &in));
	OK(rc);
	if (rnd(2)) {
		RETRY(rc, namei_link(in, d, name_of(name), strlen(name_of(name))));
		assert_int_equal(rc, dir->child[name] ? -EEXIST : 0);
		if (!rc)
			dir->child[name] = node_new(in, 1);
	}
	inode_put(in);
	inode_put(d);
}

static void do_link(struct node *dir, unsigned name)
{
	struct node *from = random_dir(), *n = from->child[rnd(NAMES)];
	struct inode *d, *in;
	int rc;

	if (!n)
		return;
	d = open_node(dir);
	in = open_node(n);
	RETRY(rc, namei_link(in, d, name_of(name), strlen(name_of(name))));
	assert_int_equal(rc, is_dir(n) ? -EPERM : dir->child[name] ? -EEXIST : 0);
	if (!rc) {
		dir->child[name] = n;
		n->nlink++;
	}
	inode_put(in);
	inode_put(d);
}

static void do_remove(struct node *dir, unsigned name)
{
	struct inode *d = open_node(dir);
	struct node *n = dir->child[name];
	bool want_dir = rnd(2);
	const char *text = name_of(name);
	int rc;

	if (want_dir)
		RETRY(rc, namei_rmdir(d, text, strlen(text), NULL));
	else
		RETRY(rc, namei_unlink(d, text, strlen(text), NULL));
	if (!n)
		assert_int_equal(rc, -ENOENT);
	else if (is_dir(n) != want_dir)
		assert_int_equal(rc, want_dir ? -ENOTDIR : -EISDIR);
	else
		assert_int_equal(rc, want_dir && !is_empty(n) ? -ENOTEMPTY : 0);
	if (!rc)
		drop(dir, name);
	inode_put(d);
}

static int expect_rename(const struct node *from, const struct node *m, const struct node *to,
			 const struct node *v, unsigned flags)
{
	if (!m || (!v && (flags & RENAME_F_EXCHANGE)))
		return -ENOENT;
	if (v && (flags & RENAME_F_NOREPLACE))
		return -EEXIST;
	if (m == v)
		return 0;
	if (is_dir(m) && is_below(to, m))
		return -EINVAL;
	if (flags & RENAME_F_EXCHANGE)
		return is_dir(v) && is_below(from, v) ? -EINVAL : 0;
	if (!v)
		return 0;
	if (is_dir(m) != is_dir(v))
		return is_dir(m) ? -ENOTDIR : -EISDIR;
	return is_dir(v) && !is_empty(v) ? -ENOTEMPTY : 0;
}

static void place(struct node *dir, unsigned name, struct node *n)
{
	dir->child[name] = n;
	if (is_dir(n)) {
		n->parent = dir;
		dir->nlink++;
	}
}

static void do_rename(struct node *from, unsigned a)
{
	static const unsigned flag_choice[] = {0, 0, RENAME_F_NOREPLACE, RENAME_F_EXCHANGE};
	struct node *to = rnd(3) ? random_dir() : from, *m, *v;
	unsigned b = rnd(NAMES), flags = flag_choice[rnd(4)];
	struct inode *f = open_node(from), *t = open_node(to);
	int rc;

	m = from->child[a];
	v = to->child[b];
	RETRY(rc,
	      namei_rename(f, name_of(a), strlen(name_of(a)), t, name_of(b), strlen(name_of(b)),
			   flags, NULL));
	assert_int_equal(rc, expect_rename(from, m, to, v, flags));
	inode_put(f);
	inode_put(t);
	if (rc || m == v)
		return;
	from->nlink -= is_dir(m);
	from->child[a] = NULL;
	if (v && (flags & RENAME_F_EXCHANGE)) {
		to->nlink -= is_dir(v);
		place(from, a, v);
	} else if (v) {
		drop(to, b);
	}
	place(to, b, m);
}

static void do_setattr(struct node *dir, unsigned name)
{
	struct attr_change ch = {.valid = ATTR_MODE | ATTR_UID, .mode = rnd(01000), .uid = rnd(10)};
	struct node *n = dir->child[name];
	struct inode *in;
	int rc;

	if (!n)
		return;
	in = open_node(n);
	RETRY(rc, namei_setattr(in, &ch));
	OK(rc);
	n->mode = (n->mode & S_IFMT) | ch.mode;
	n->uid = ch.uid;
	inode_put(in);
}

static void step(void)
{
	struct node *dir = random_dir();
	unsigned name = rnd(NAMES), what = rnd(20);

	if (what < 8)
		do_create(dir, name);
	else if (what < 12)
		do_remove(dir, name);
	else if (what < 16)
		do_rename(dir, name);
	else if (what < 18)
		do_link(dir, name);
	else if (what < 19)
		do_setattr(dir, name);
	else
		do_tmpfile(dir, name);
}

/* ---- tests ---- */

static unsigned long first_seed(void) { return only_seed ? only_seed : 1; }
static unsigned long last_seed(unsigned long n) { return only_seed ? only_seed : n; }

static void start(unsigned long seed)
{
	print_message("seed %lu\n", seed);
	world_make(DEVICE_BYTES, 0);
	srandom((unsigned)seed);
	root = node_new(world.root, 2);
	root->parent = root;
}

static void end(void)
{
	uint64_t inodes = 0;

	check_all();
	reaper_drain(world.fs);
	for (unsigned i = 0; i < node_count; i++)
		inodes += nodes[i]->nlink > 0;
	/* A directory of the model that lost its name has nlink 0, and nobody else's names are in
	 * it. */
	fs_rdlock(world.fs);
	assert_int_equal(get64(fs_root(world.fs)->inodes), inodes);
	fs_unlock(world.fs);
	model_free();
	teardown(NULL);
}

static void durable_cut(unsigned long seed)
{
	xid_t xid;

	fs_rdlock(world.fs);
	xid = jrn_running(world.fs);
	fs_unlock(world.fs);
	OK(jrn_force_blocking(world.fs, xid));
	world_crash(seed);
}

static void operations_agree_with_the_model(void **state)
{
	for (unsigned long seed = first_seed(); seed <= last_seed(8); seed++) {
		/* Every other time hardly an inode stays in memory without a user. */
		world.opt = (struct fs_options){.no_heartbeat = true,
						.inode_cache = seed % 2 ? 2 : 0};
		start(seed);
		for (unsigned n = 0; n < 3000; n++) {
			step();
			if (n % 50 == 0)
				check_all();
			if (n % 1000 == 499)
				world_remount();
			if (n % 1000 == 999)
				durable_cut(seed);
		}
		end();
	}
}

#define CUT_STEPS 400u

/* Newest step with this digest; -1: none. */
static int find_digest(const uint64_t *digests, unsigned steps, uint64_t digest)
{
	int at = (int)steps;

	while (at >= 0 && digests[at] != digest)
		at--;
	return at;
}

static bool force_now(void)
{
	xid_t xid;

	fs_rdlock(world.fs);
	xid = jrn_running(world.fs);
	fs_unlock(world.fs);
	return jrn_force_blocking(world.fs, xid) == 0;
}

/* Power fails during a force, at a random event; *durable: the last step that a force acknowledged.
 * Returns the number of steps. */
static unsigned run_until_power_fails(uint64_t *digests, unsigned *durable)
{
	unsigned n = 0, since = 0;

	digests[0] = digest_model(root);
	*durable = 0;
	while (n < CUT_STEPS) {
		step();
		digests[++n] = digest_model(root);
		/* A group that becomes large closes early, by itself: none may. */
		if (rnd(8) != 0 && ++since < 12)
			continue;
		since = 0;
		if (!force_now())
			break;
		*durable = n;
	}
	return n;
}

static void a_power_cut_leaves_a_state_that_was(void **state)
{
	static uint64_t digests[CUT_STEPS + 1];
	unsigned lost = 0, partly = 0;

	for (unsigned long seed = first_seed(); seed <= last_seed(60); seed++) {
		unsigned steps, durable;
		int found;

		/* Commits only when forced: power then fails inside a force, and steps go on in
		 * memory until one. */
		world.opt = (struct fs_options){.no_heartbeat = true, .commit_ms = 600000};
		start(seed);
		sim_crash_at(world.sim, sim_events(world.sim) + 2 + rnd(80));
		steps = run_until_power_fails(digests, &durable);
		world_crash(seed);
		found = find_digest(digests, steps, digest_fs(world.root, 1));
		if (found < (int)durable)
			fail_msg("seed %lu: step %u was durable, found %d of %u", seed, durable,
				 found, steps);
		lost += (unsigned)found < steps;
		partly += (unsigned)found > durable;
		model_free();
		teardown(NULL);
	}
	/* The cuts hit something. */
	if (!only_seed)
		assert_true(lost > 5 && partly > 5);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(operations_agree_with_the_model),
		cmocka_unit_test(a_power_cut_leaves_a_state_that_was),
	};

	if (argc > 1)
		only_seed = strtoul(argv[1], NULL, 10);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
