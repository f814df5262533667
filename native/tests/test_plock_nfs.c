/* SPDX-License-Identifier: MIT
 *
 * test_plock_nfs.c - locks of NFS owners among those of local ones: two domains, ranges of 64 bits,
 * watches, and inodes that stay in memory.
 */
#include "names_fixture.h"

#include "plock.h"

#define LAST ((uint64_t)INT64_MAX)

static struct ioctx *ctx;
static struct inode *file;
static struct layout_hooks hooks;
static const struct layout_hooks *their_hooks;
static uint64_t told[16];
static _Atomic unsigned ntold;

static void on_lock_free(struct inode *in, uint64_t owner)
{
	told[atomic_fetch_add(&ntold, 1) % ARRAY_LEN(told)] = owner;
}

static uint64_t wanted[32];
static _Atomic unsigned nwanted;

static void on_lock_wanted(struct inode *in, uint64_t owner)
{
	wanted[atomic_fetch_add(&nwanted, 1) % ARRAY_LEN(wanted)] = owner;
}

static int setup_file(void **state)
{
	setup(state);
	file = make_file(world.root, "a");
	OK(ioctx_create(8, &ctx));
	their_hooks = world.fs->layout_hooks;
	hooks = *their_hooks;
	hooks.lock_free = on_lock_free;
	hooks.lock_wanted = on_lock_wanted;
	world.fs->layout_hooks = &hooks;
	ntold = 0;
	nwanted = 0;
	return 0;
}

static int teardown_file(void **state)
{
	world.fs->layout_hooks = their_hooks;
	ioctx_destroy(ctx);
	if (file)
		inode_put(file);
	return teardown(state);
}

static struct plock lock_of(enum plock_domain domain, uint64_t owner, enum plock_type type,
			    uint64_t start, uint64_t end)
{
	return (struct plock){ .start = start, .end = end, .type = type, .owner = owner,
			       .domain = domain,
			       .pid = domain == PLOCK_LOCAL ? 77 : 0 };
}

static int set(enum plock_domain domain, uint64_t owner, enum plock_type type, uint64_t start,
	       uint64_t end)
{
	struct plock_request req = { .lock = lock_of(domain, owner, type, start, end) };

	return plock_set(file, &req);
}

static int set_flock(enum plock_domain domain)
{
	struct plock_request req = { .flock = true,
				     .lock = lock_of(domain, 9, PLOCK_WRITE, 0, LAST) };

	return plock_set(file, &req);
}

static struct plock probe(enum plock_domain domain, uint64_t owner, uint64_t start, uint64_t end)
{
	struct plock lock = lock_of(domain, owner, PLOCK_WRITE, start, end);

	plock_get(file, false, &lock);
	return lock;
}

static int watch(uint64_t owner, enum plock_type type, uint64_t start, uint64_t end)
{
	struct plock lock = lock_of(PLOCK_NFS, owner, type, start, end);

	return plock_watch(file, &lock);
}

struct waiter {
	struct op op;
	struct plock_request req;
	bool resumed;
};

static void on_resume(struct op *op)
{
	container_of(op, struct waiter, op)->resumed = true;
}

static int wait_for(struct waiter *w, uint64_t owner, enum plock_type type, uint64_t start,
		    uint64_t end)
{
	*w = (struct waiter){ .op = { .resume = on_resume, .ctx = ctx },
			      .req = { .lock = lock_of(PLOCK_LOCAL, owner, type, start, end) } };
	w->req.op = &w->op;
	return plock_set(file, &w->req);
}

static bool resumed(struct waiter *w)
{
	while (ioctx_run(ctx, false) > 0)
		;
	return w->resumed;
}

static void two_domains(void **state)
{
	struct plock in_the_way = { 0 };
	struct plock_request req = { .lock = lock_of(PLOCK_NFS, 5, PLOCK_READ, 3, 4),
				     .conflict = &in_the_way };

	assert_int_equal(set(PLOCK_LOCAL, 5, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(plock_set(file, &req), -EAGAIN);
	assert_int_equal(in_the_way.domain, PLOCK_LOCAL);
	assert_int_equal(in_the_way.owner, 5);
	assert_int_equal(in_the_way.pid, 77);
	assert_int_equal(in_the_way.end, 9);
	/* A close of the one is none of the other. */
	plock_release_nfs(file, 5);
	assert_int_equal(plock_set(file, &req), -EAGAIN);
	plock_release_owner(file, false, 5);
	assert_int_equal(plock_set(file, &req), 0);
	assert_int_equal(set(PLOCK_NFS, 5, PLOCK_WRITE, 3, 3), 0);
	plock_release_owner(file, false, 5);
	in_the_way = probe(PLOCK_LOCAL, 5, 0, LAST);
	assert_int_equal(in_the_way.type, PLOCK_WRITE);
	assert_int_equal(in_the_way.domain, PLOCK_NFS);
	assert_int_equal(in_the_way.pid, 0);
	assert_int_equal(probe(PLOCK_NFS, 5, 0, UINT64_MAX).type, PLOCK_UNLOCK);
	assert_int_equal(set(PLOCK_LOCAL, 1, PLOCK_READ, 4, 4), 0);
	assert_int_equal(set(PLOCK_LOCAL, 1, PLOCK_READ, 3, 4), -EAGAIN);
	/* flock is another kind, and local. */
	assert_int_equal(set_flock(PLOCK_LOCAL), 0);
	assert_int_equal(set_flock(PLOCK_NFS), -EINVAL);
	plock_drop_local(file);
	assert_int_equal(probe(PLOCK_NFS, 6, 4, 4).domain, PLOCK_NFS);
	plock_release_nfs(file, 5);
	assert_int_equal(probe(PLOCK_NFS, 6, 0, UINT64_MAX).type, PLOCK_UNLOCK);
}

static void ranges(void **state)
{
	struct plock found;

	/* To the end is to the end for both, and 64 bits do not wrap. */
	assert_int_equal(set(PLOCK_LOCAL, 1, PLOCK_WRITE, 100, LAST), 0);
	assert_int_equal(set(PLOCK_NFS, 2, PLOCK_WRITE, UINT64_MAX, UINT64_MAX), -EAGAIN);
	found = probe(PLOCK_NFS, 2, UINT64_MAX, UINT64_MAX);
	assert_true(found.start == 100 && found.end == UINT64_MAX);
	found = probe(PLOCK_LOCAL, 3, 100, 100);
	assert_true(found.start == 100 && found.end == LAST);
	plock_release_owner(file, false, 1);
	assert_int_equal(set(PLOCK_NFS, 2, PLOCK_WRITE, UINT64_MAX, UINT64_MAX), 0);
	assert_int_equal(set(PLOCK_NFS, 2, PLOCK_WRITE, 0, 0), 0);
	assert_int_equal(set(PLOCK_LOCAL, 1, PLOCK_WRITE, 1, LAST - 1), 0);
	assert_int_equal(set(PLOCK_LOCAL, 1, PLOCK_WRITE, 1, LAST), -EAGAIN);
	found = probe(PLOCK_LOCAL, 1, 1, LAST);
	assert_true(found.start == LAST && found.end == LAST);
	assert_int_equal(set(PLOCK_NFS, 3, PLOCK_READ, LAST + 1, UINT64_MAX - 1), 0);
	assert_int_equal(set(PLOCK_NFS, 3, PLOCK_UNLOCK, LAST + 2, UINT64_MAX), 0);
	found = probe(PLOCK_NFS, 2, LAST, UINT64_MAX);
	assert_true(found.start == LAST + 1 && found.end == LAST + 1 && found.type == PLOCK_READ);
	assert_int_equal(set(PLOCK_NFS, 3, PLOCK_READ, 5, 4), -EINVAL);
	assert_int_equal(set(PLOCK_LOCAL, 3, PLOCK_READ, LAST + 1, UINT64_MAX), -EINVAL);
	assert_int_equal(set(PLOCK_NFS, 3, (enum plock_type)3, 5, 5), -EINVAL);
	plock_drop_local(file);
	plock_drop_nfs(world.fs);
	assert_int_equal(set(PLOCK_LOCAL, 1, PLOCK_WRITE, 0, LAST), 0);
	plock_release_owner(file, false, 1);
}

static void local_waiters(void **state)
{
	struct waiter w;

	assert_int_equal(set(PLOCK_NFS, 1, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(wait_for(&w, 1, PLOCK_READ, 5, 20), ERR_PARKED);
	assert_int_equal(set(PLOCK_NFS, 1, PLOCK_UNLOCK, 0, 4), 0);
	assert_false(resumed(&w));
	assert_int_equal(set(PLOCK_NFS, 1, PLOCK_UNLOCK, 0, UINT64_MAX), 0);
	assert_true(resumed(&w));
	assert_int_equal(w.req.result, 0);
	plock_release_owner(file, false, 1);
	assert_int_equal(set(PLOCK_NFS, 1, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(wait_for(&w, 2, PLOCK_READ, 5, 20), ERR_PARKED);
	plock_drop_nfs(world.fs);
	assert_true(resumed(&w));
	plock_release_owner(file, false, 2);
}

static void watches(void **state)
{
	struct waiter w;

	/* It could be had: told at once, and once. */
	assert_int_equal(watch(1, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(ntold, 1);
	assert_int_equal(told[0], 1);
	assert_int_equal(set(PLOCK_LOCAL, 7, PLOCK_READ, 0, 9), 0);
	assert_int_equal(set(PLOCK_LOCAL, 8, PLOCK_READ, 5, 5), 0);
	assert_int_equal(ntold, 1);
	assert_int_equal(watch(2, PLOCK_READ, 5, 5), 0);
	assert_int_equal(ntold, 2);
	assert_int_equal(watch(2, PLOCK_WRITE, 5, 5), 0);
	plock_release_owner(file, false, 7);
	assert_int_equal(ntold, 2);
	plock_release_owner(file, false, 8);
	assert_int_equal(ntold, 3);
	assert_int_equal(told[2], 2);
	/* Who waits goes first. */
	assert_int_equal(set(PLOCK_NFS, 9, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(wait_for(&w, 7, PLOCK_WRITE, 3, 3), ERR_PARKED);
	assert_int_equal(watch(2, PLOCK_WRITE, 3, 3), 0);
	assert_int_equal(watch(3, PLOCK_WRITE, 4, 4), 0);
	assert_int_equal(set(PLOCK_NFS, 9, PLOCK_UNLOCK, 0, UINT64_MAX), 0);
	assert_true(resumed(&w));
	assert_int_equal(ntold, 4);
	assert_int_equal(told[3], 3);
	/* The newest wish of an owner counts; a wish taken back counts nothing. */
	assert_int_equal(watch(4, PLOCK_WRITE, 3, 3), 0);
	assert_int_equal(watch(2, PLOCK_WRITE, 3, 9), 0);
	plock_unwatch(file, 4);
	plock_release_owner(file, false, 7);
	assert_int_equal(ntold, 5);
	assert_int_equal(told[4], 2);
	/* Its own lock is in nobody's way but others'. */
	assert_int_equal(set(PLOCK_NFS, 2, PLOCK_READ, 0, 9), 0);
	assert_int_equal(watch(2, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(ntold, 6);
	assert_int_equal(watch(3, PLOCK_WRITE, 0, 9), 0);
	plock_release_nfs(file, 3);
	plock_release_nfs(file, 2);
	assert_int_equal(ntold, 6);
	assert_int_equal(watch(3, PLOCK_UNLOCK, 0, 9), -EINVAL);
	assert_int_equal(watch(3, PLOCK_READ, 9, 0), -EINVAL);
}

static void many_watches(void **state)
{
	assert_int_equal(set(PLOCK_LOCAL, 7, PLOCK_WRITE, 0, 0), 0);
	for (unsigned i = 0; i < 2000; i++)
		assert_int_equal(watch(i, PLOCK_WRITE, 0, 0), 0);
	plock_release_owner(file, false, 7);
	assert_int_equal(ntold, 2000);
}

/* Nobody else has a reference; others come and go. */
static void they_keep_the_inode(void **state)
{
	inum_t ino = file->ino;
	struct inode *in;

	assert_int_equal(set(PLOCK_NFS, 1, PLOCK_WRITE, 0, 9), 0);
	assert_int_equal(set(PLOCK_LOCAL, 3, PLOCK_WRITE, 20, 20), 0);
	assert_int_equal(watch(2, PLOCK_WRITE, 20, 20), 0);
	plock_drop_local(file);
	assert_int_equal(ntold, 1);
	inode_put(file);
	file = NULL;
	for (unsigned i = 0; i < 200; i++) {
		char name[16];

		snprintf(name, sizeof(name), "f%u", i);
		inode_put(make_file(world.root, name));
	}
	fs_rdlock(world.fs);
	OK(inode_get(world.fs, ino, &in));
	fs_unlock(world.fs);
	file = in;
	assert_int_equal(probe(PLOCK_LOCAL, 1, 0, LAST).end, 9);
	inode_put(in);
	file = NULL;
	plock_drop_nfs(world.fs);
	fs_rdlock(world.fs);
	OK(inode_get(world.fs, ino, &file));
	fs_unlock(world.fs);
	assert_int_equal(probe(PLOCK_LOCAL, 1, 0, LAST).type, PLOCK_UNLOCK);
}

static int setup_small(void **state)
{
	world.opt = (struct fs_options){ .no_heartbeat = true, .inode_cache = 4 };
	world_make(DEVICE_BYTES, 0);
	file = make_file(world.root, "a");
	OK(ioctx_create(8, &ctx));
	their_hooks = world.fs->layout_hooks;
	hooks = *their_hooks;
	hooks.lock_free = on_lock_free;
	hooks.lock_wanted = on_lock_wanted;
	world.fs->layout_hooks = &hooks;
	ntold = 0;
	nwanted = 0;
	return 0;
}

/* Those in the way of local owners are told, each once, also of requests that wait. */
static void wanted_by_local_ones(void **state)
{
	struct waiter w;

	for (uint64_t owner = 1; owner <= 20; owner++)
		assert_int_equal(set(PLOCK_NFS, owner, PLOCK_READ, owner, owner), 0);
	assert_int_equal(set(PLOCK_NFS, 30, PLOCK_WRITE, 5, 5), -EAGAIN);
	assert_int_equal(set(PLOCK_LOCAL, 7, PLOCK_READ, 0, LAST), 0);
	assert_int_equal(nwanted, 0);
	assert_int_equal(set(PLOCK_LOCAL, 8, PLOCK_WRITE, 100, 110), -EAGAIN);
	assert_int_equal(nwanted, 0);
	plock_release_owner(file, false, 7);
	/* Some at a time; none twice. */
	assert_int_equal(set(PLOCK_LOCAL, 8, PLOCK_WRITE, 5, 6), -EAGAIN);
	assert_int_equal(nwanted, 2);
	assert_int_equal(wanted[0], 5);
	assert_int_equal(wanted[1], 6);
	assert_int_equal(set(PLOCK_LOCAL, 8, PLOCK_WRITE, 5, 6), -EAGAIN);
	assert_int_equal(nwanted, 2);
	assert_int_equal(wait_for(&w, 8, PLOCK_WRITE, 0, LAST), ERR_PARKED);
	assert_int_equal(nwanted, 18);
	/* One that comes while somebody waits. */
	assert_int_equal(set(PLOCK_NFS, 40, PLOCK_READ, 200, 200), 0);
	assert_int_equal(nwanted, 21);
	assert_int_equal(wanted[20], 40);
	for (uint64_t owner = 1; owner <= 20; owner++)
		plock_release_nfs(file, owner);
	assert_false(resumed(&w));
	plock_release_nfs(file, 40);
	assert_true(resumed(&w));
	/* It has begun anew. */
	plock_release_owner(file, false, 8);
	assert_int_equal(set(PLOCK_NFS, 5, PLOCK_READ, 5, 5), 0);
	assert_int_equal(set(PLOCK_LOCAL, 8, PLOCK_WRITE, 5, 5), -EAGAIN);
	assert_int_equal(nwanted, 22);
	plock_release_nfs(file, 5);
}

/* ---- threads --------------------------------------------------------------------------------- */

#define ROUNDS 3000u

static _Atomic int inside[8];

/* Exclusive locks of eight bytes, of both domains; a watch here and there. */
static void *worker(void *arg)
{
	uint64_t me = (uintptr_t)arg;
	enum plock_domain domain = me & 1 ? PLOCK_NFS : PLOCK_LOCAL;
	unsigned seed = (unsigned)me;

	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t at = (uint64_t)rand_r(&seed) % 8;

		if (set(domain, me / 2, PLOCK_WRITE, at, at) == 0) {
			if (atomic_fetch_add(&inside[at], 1) != 0)
				return (void *)"two inside";
			atomic_fetch_sub(&inside[at], 1);
			if (domain == PLOCK_NFS && i % 3)
				plock_release_nfs(file, me / 2);
			else
				set(domain, me / 2, PLOCK_UNLOCK, at, at);
		} else if (domain == PLOCK_NFS && watch(me / 2, PLOCK_WRITE, at, at)) {
			return (void *)"no watch";
		}
	}
	if (domain == PLOCK_NFS)
		plock_release_nfs(file, me / 2);
	else
		plock_release_owner(file, false, me / 2);
	return NULL;
}

static void threads(void **state)
{
	pthread_t thread[4];
	void *said;

	for (uintptr_t i = 0; i < ARRAY_LEN(thread); i++)
		assert_int_equal(pthread_create(&thread[i], NULL, worker, (void *)i), 0);
	for (unsigned i = 0; i < ARRAY_LEN(thread); i++) {
		pthread_join(thread[i], &said);
		if (said)
			fail_msg("%s", (char *)said);
	}
	assert_int_equal(probe(PLOCK_LOCAL, 99, 0, LAST).type, PLOCK_UNLOCK);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(two_domains, setup_file, teardown_file),
		cmocka_unit_test_setup_teardown(ranges, setup_file, teardown_file),
		cmocka_unit_test_setup_teardown(local_waiters, setup_file, teardown_file),
		cmocka_unit_test_setup_teardown(watches, setup_file, teardown_file),
		cmocka_unit_test_setup_teardown(many_watches, setup_file, teardown_file),
		cmocka_unit_test_setup_teardown(wanted_by_local_ones, setup_file, teardown_file),
		cmocka_unit_test_setup_teardown(they_keep_the_inode, setup_small, teardown_file),
		cmocka_unit_test_setup_teardown(threads, setup_file, teardown_file),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
