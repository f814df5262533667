/* SPDX-License-Identifier: MIT
 *
 * test_nfs_record.c - records of the NFS server: values of all lengths against a model, what is
 * refused, several threads, and power cuts: each put is there whole or not at all, and what was
 * durable stays.
 *
 * RECORD_CUTS=n sets the number of cuts; a failure names the cut.
 */
#include <pthread.h>
#include <stdlib.h>

#include "names_fixture.h"

#include "nfs_record.h"
#include "tree_check.h"

#define IDS 8u
#define PART NFS_PART_BYTES

/* Record i has number id_of(i). */
static uint64_t id_of(unsigned i)
{
	return i == 0 ? 0 : i == 1 ? UINT64_MAX : 1000 + 7 * i;
}

/* length -1: no such record. All bytes of a value are told by its number and its version. */
struct value { long len; uint32_t version; };
static struct value model[IDS];
static uint64_t rnd;

static uint64_t below(uint64_t n)
{
	return check_random(&rnd) % n;
}

static uint8_t byte_of(unsigned i, uint32_t version, size_t at)
{
	return (uint8_t)(1 + (i * 31 + version * 7 + at / 3 + at) % 255);
}

static long random_length(void)
{
	static const long edges[] = { 0, 1, PART - 1, PART, PART + 1, 2 * PART, NFS_VALUE_MAX - 1,
				      NFS_VALUE_MAX };

	switch (below(4)) {
	case 0:
		return edges[below(ARRAY_LEN(edges))];
	case 1:
		return (long)below(NFS_VALUE_MAX + 1);
	default:
		return (long)below(3 * PART);
	}
}

static uint8_t memory[IDS][NFS_VALUE_MAX];

/* Put what `want` says differently from the model; -1 in len deletes. */
static int change_to(const struct value *want, xid_t *xid)
{
	struct nfs_record put[IDS];
	uint64_t del[IDS];
	unsigned n = 0, m = 0;
	int rc;

	for (unsigned i = 0; i < IDS; i++) {
		if (want[i].version == model[i].version)
			continue;
		if (want[i].len < 0) {
			del[m++] = id_of(i);
			continue;
		}
		for (size_t at = 0; at < (size_t)want[i].len; at++)
			memory[i][at] = byte_of(i, want[i].version, at);
		put[n++] = (struct nfs_record){ id_of(i), memory[i], (size_t)want[i].len };
	}
	RETRY(rc, nfs_record_put(world.fs, put, n, del, m, xid));
	return rc;
}

/* Does the tree hold just this? */
static bool holds(const struct value *want)
{
	static uint8_t got[NFS_VALUE_MAX];
	bool seen[IDS] = { false };
	uint64_t id = 0;

	for (;;) {
		ssize_t len = nfs_record_next(world.fs, &id, got, sizeof(got));
		unsigned i = 0;

		if (len == -ENOENT)
			break;
		OK(len);
		while (i < IDS && id_of(i) != id)
			i++;
		assert_true(i < IDS && !seen[i]);
		if (len != want[i].len)
			return false;
		for (ssize_t at = 0; at < len; at++)
			if (got[at] != byte_of(i, want[i].version, (size_t)at))
				return false;
		seen[i] = true;
		if (++id == 0)
			break;
	}
	for (unsigned i = 0; i < IDS; i++)
		if (!seen[i] && want[i].len >= 0)
			return false;
	return true;
}

static void forget_all(void)
{
	for (unsigned i = 0; i < IDS; i++)
		model[i] = (struct value){ -1, 0 };
}

/* One to three records become something else. */
static void random_step(struct value *want, uint32_t version)
{
	memcpy(want, model, sizeof(model));
	for (unsigned n = 1 + below(3); n > 0; n--)
		want[below(IDS)] = (struct value){ below(4) ? random_length() : -1, version };
}

static void lengths(void **state)
{
	static const long steps[] = { 0, PART - 1, PART, PART + 1, 0, 3 * PART, NFS_VALUE_MAX, 5,
				      NFS_VALUE_MAX - 1,
				      -1, -1, 7 };
	struct value want[IDS];
	xid_t xid;

	forget_all();
	assert_true(holds(model));
	for (unsigned s = 0; s < ARRAY_LEN(steps); s++) {
		memcpy(want, model, sizeof(want));
		want[s % 3].len = steps[s];
		want[s % 3].version = s + 1;
		OK(change_to(want, &xid));
		memcpy(model, want, sizeof(model));
		assert_true(holds(model));
		check_tree(world.fs, fs_tree(world.fs, TREE_NFS_CLIENT), NULL);
	}
	world_remount();
	assert_true(holds(model));
	for (unsigned i = 0; i < IDS; i++)
		want[i] = (struct value){ -1, 100 + i };
	OK(change_to(want, &xid));
	forget_all();
	assert_true(holds(model));
	assert_int_equal(bt_records(fs_tree(world.fs, TREE_NFS_CLIENT)), 0);
}

static void refusals(void **state)
{
	static uint8_t big[NFS_VALUE_MAX + 1];
	struct nfs_record many[26];
	uint64_t id = 0, twice[] = { 5, 5 };
	xid_t xid;

	for (unsigned i = 0; i < ARRAY_LEN(many); i++)
		many[i] = (struct nfs_record){ i, big, PART - 1 };
	assert_int_equal(nfs_record_put(world.fs, NULL, 0, NULL, 0, &xid), 0);
	assert_int_equal(xid, 0);
	assert_int_equal(nfs_record_put(world.fs, many, 26, NULL, 0, &xid), -E2BIG);
	assert_int_equal(nfs_record_put(world.fs, &(struct nfs_record){ 1, big, sizeof(big) }, 1,
					NULL, 0, &xid), -EINVAL);
	assert_int_equal(nfs_record_put(world.fs, NULL, 0, twice, 2, &xid), -EINVAL);
	assert_int_equal(nfs_record_put(world.fs, many, 6, twice, 1, &xid), -EINVAL);
	assert_int_equal(nfs_record_next(world.fs, &id, big, 1), -ENOENT);
	OK(nfs_record_put(world.fs, many, 25, NULL, 0, &xid));
	assert_int_equal(nfs_record_next(world.fs, &id, big, PART - 2), -ERANGE);
	assert_int_equal(nfs_record_next(world.fs, &id, NULL, 0), PART - 1);
	/* Those 25 again, each as long as can be: more than fits, and nothing has changed. */
	for (unsigned i = 0; i < 25; i++)
		many[i].len = NFS_VALUE_MAX;
	assert_int_equal(nfs_record_put(world.fs, many, 25, NULL, 0, &xid), -E2BIG);
	OK(nfs_record_put(world.fs, many, 3, NULL, 0, &xid));
	/* What they were counts, too. */
	for (unsigned i = 0; i < 25; i++)
		many[i].len = 1;
	assert_int_equal(nfs_record_put(world.fs, many, 25, NULL, 0, &xid), -E2BIG);
	id = 3;
	assert_int_equal(nfs_record_next(world.fs, &id, big, sizeof(big)), PART - 1);
	id = 2;
	assert_int_equal(nfs_record_next(world.fs, &id, big, sizeof(big)), NFS_VALUE_MAX);
}

/* A part that is not there, or too many. */
static void damage(void **state)
{
	static uint8_t big[3 * PART];
	uint64_t id = 0;
	struct trans t;
	xid_t xid;

	OK(nfs_record_put(world.fs, &(struct nfs_record){ 9, big, sizeof(big) }, 1, NULL, 0, &xid));
	for (unsigned part = 0; part < 4; part++) {
		OK(trans_begin(world.fs, &t, 64));
		OK(bt_delete(&t, fs_tree(world.fs, TREE_NFS_CLIENT), KEY(9, part)));
		trans_commit(&t);
		assert_int_equal(nfs_record_next(world.fs, &id, NULL, 0), -ERR_RECORD_SHAPE);
		OK(trans_begin(world.fs, &t, 64));
		OK(bt_insert(&t, fs_tree(world.fs, TREE_NFS_CLIENT), KEY(9, part), big,
			     part < 3 ? PART : 0));
		trans_commit(&t);
		assert_int_equal(nfs_record_next(world.fs, &id, NULL, 0), sizeof(big));
	}
	OK(trans_begin(world.fs, &t, 64));
	OK(bt_insert(&t, fs_tree(world.fs, TREE_NFS_CLIENT), KEY(9, 4), big, 1));
	trans_commit(&t);
	assert_int_equal(nfs_record_next(world.fs, &id, NULL, 0), -ERR_RECORD_SHAPE);
	/* It can be put anew all the same. */
	OK(nfs_record_put(world.fs, &(struct nfs_record){ 9, big, 1 }, 1, NULL, 0, &xid));
	assert_int_equal(nfs_record_next(world.fs, &id, NULL, 0), 1);
}

/* What the log says of damage is as it should be. */
static int damage_teardown(void **state)
{
	char line[256];

	while (log_next(line, sizeof(line)) > 0)
		;
	return teardown(state);
}

static void random_changes(void **state)
{
	struct value want[IDS];
	xid_t xid;

	rnd = check_seed(11);
	forget_all();
	for (uint32_t step = 1; step < 300; step++) {
		random_step(want, step);
		OK(change_to(want, &xid));
		memcpy(model, want, sizeof(model));
		if (step % 10 == 0)
			assert_true(holds(model));
		if (step % 100 == 0)
			world_remount();
	}
	check_tree(world.fs, fs_tree(world.fs, TREE_NFS_CLIENT), NULL);
	check_space(world.fs, NULL);
}

/* ---- threads -------------------------------------------------------------------------------- */

#define THREADS 4u
#define ROUNDS 40u

/* All put the same two records, together. */
static void *put_pairs(void *arg)
{
	static uint8_t bytes[THREADS][5 * PART];
	unsigned me = (unsigned)(uintptr_t)arg;
	xid_t xid;
	int rc;

	memset(bytes[me], 'a' + (int)me, sizeof(bytes[me]));
	for (unsigned round = 0; round < ROUNDS; round++) {
		size_t len = (round % 5 + 1) * PART - me;
		struct nfs_record pair[] = { { 1, bytes[me], len }, { 2, bytes[me], len } };
		uint64_t ids[] = { 1, 2 };

		if (round % 7 == 6)
			RETRY(rc, nfs_record_put(world.fs, NULL, 0, ids, 2, &xid));
		else
			RETRY(rc, nfs_record_put(world.fs, pair, 2, NULL, 0, &xid));
		if (!rc)
			rc = jrn_force_blocking(world.fs, xid);
		if (rc)
			return (void *)"failed";
	}
	return NULL;
}

static void threads(void **state)
{
	static uint8_t one[NFS_VALUE_MAX], two[NFS_VALUE_MAX];
	pthread_t thread[THREADS];
	ssize_t a, b;
	uint64_t id;
	void *said;

	for (unsigned i = 0; i < THREADS; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, put_pairs, (void *)(uintptr_t)i),
				 0);
	for (unsigned i = 0; i < THREADS; i++) {
		pthread_join(thread[i], &said);
		assert_null(said);
	}
	id = 0;
	a = nfs_record_next(world.fs, &id, one, sizeof(one));
	id = 2;
	b = nfs_record_next(world.fs, &id, two, sizeof(two));
	assert_int_equal(a, b);
	if (a > 0)
		assert_memory_equal(one, two, (size_t)a);
}

/* ---- power cuts ------------------------------------------------------------------------------ */

#define STEPS 25u

static struct sim *formatted;
static struct value at_start[IDS];

static int power_setup(void **state)
{
	struct value want[IDS];
	xid_t xid;

	world.opt = (struct fs_options){ .no_heartbeat = true, .commit_ms = 3600 * 1000 };
	world_make(64u << 20, JOURNAL_MIN_BLOCKS);
	rnd = 5;
	forget_all();
	for (uint32_t step = 1; step < 8; step++) {
		random_step(want, step);
		OK(change_to(want, &xid));
		memcpy(model, want, sizeof(model));
	}
	memcpy(at_start, model, sizeof(model));
	world_unmount();
	sim_settle(world.sim);
	formatted = world.sim;
	return 0;
}

static int power_teardown(void **state)
{
	sim_destroy(formatted);
	return 0;
}

/* What the tree was after each step since the last durable one, that one first, and what was
 * under way. */
static struct value states[STEPS + 1][IDS];
static unsigned nstates;

/* Some steps are made durable, the others go with them, together. Ends early when the device
 * dies. */
static void script(void)
{
	xid_t xid;
	int rc;

	rnd = 1;
	memcpy(model, at_start, sizeof(model));
	memcpy(states[0], model, sizeof(model));
	nstates = 1;
	for (uint32_t step = 10; step < 10 + STEPS; step++) {
		random_step(states[nstates], step);
		rc = change_to(states[nstates], &xid);
		nstates++;
		if (!rc && step % 3)
			rc = jrn_force_blocking(world.fs, xid);
		if (sim_crashed(world.sim))
			return;
		OK(rc);
		memcpy(model, states[nstates - 1], sizeof(model));
		if (step % 3) {
			memcpy(states[0], model, sizeof(model));
			nstates = 1;
		}
	}
}

static void cut_at(uint64_t n, uint64_t seed)
{
	unsigned found = 0;

	OK(sim_clone(formatted, &world.sim));
	world_mount();
	sim_crash_at(world.sim, sim_events(world.sim) + n);
	script();
	inode_put(world.root);
	fs_abandon(world.fs);
	sim_restart(world.sim, seed);
	world_mount();
	while (found < nstates && !holds(states[found]))
		found++;
	if (found == nstates)
		fail_msg("cut %llu, seed %llu: none of %u states that may be there",
			 (unsigned long long)n,
			 (unsigned long long)seed, nstates);
	check_tree(world.fs, fs_tree(world.fs, TREE_NFS_CLIENT), NULL);
	check_space(world.fs, NULL);
	world_unmount();
	sim_destroy(world.sim);
}

static void power_cuts(void **state)
{
	const char *many = getenv("RECORD_CUTS");
	uint64_t cuts = many ? strtoull(many, NULL, 10) : 100, last;

	OK(sim_clone(formatted, &world.sim));
	world_mount();
	last = sim_events(world.sim);
	script();
	last = sim_events(world.sim) - last;
	world_unmount();
	sim_destroy(world.sim);
	assert_true(last > STEPS / 2);
	for (uint64_t i = 0; i < cuts; i++)
		cut_at(1 + i % last, i);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(lengths, setup, teardown),
		cmocka_unit_test_setup_teardown(refusals, setup, teardown),
		cmocka_unit_test_setup_teardown(random_changes, setup, teardown),
		cmocka_unit_test_setup_teardown(threads, setup, teardown),
		cmocka_unit_test_setup_teardown(damage, setup, damage_teardown),
		cmocka_unit_test_setup_teardown(power_cuts, power_setup, power_teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
