/* SPDX-License-Identifier: MIT
 *
 * test_journal_crash.c - the journal loses power at every event, and in the middle of replay.
 *
 * A workload of random transactions on PLACES blocks, each metadata, data or free, described by an
 * index block that changes in the same transactions. After each crash the index must be that of a
 * group's last transaction, not older than what was reported durable, and every place must hold
 * what the index says: metadata of that moment, data as written before the transaction that names
 * it. Then the same must be found after a second loss of power during replay.
 *
 * A failure prints  JOURNAL_CRASH="SEED EVENT MUTANT"; with that in the environment only this case
 * runs.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <pthread.h>

#include "bare_fs.h"
#include "journal_impl.h"

#define PLACES 24u
#define TRANSACTIONS 60u
#define INDEX PLACES /* the index block's own number */
/* Not a mutant: a second thread makes commits and checkpoints meet transactions; such a case
 * repeats roughly only. */
#define NOISY 101u
/* A mutant of this test: data may reuse a freed metadata block as soon as the free is durable. */
#define REUSE_EARLY 100u

enum kind { FREE, META, DATA };

struct place {
	uint64_t kind;
	uint64_t value;
};

/* What the index block says, behind the header. */
struct index {
	uint64_t number; /* of the transaction */
	struct place places[PLACES];
};

struct world {
	struct sim *sim;
	struct fs *fs;
	struct device *dev;
	unsigned mutant;
	uint64_t rng;
	char *page;
	struct index now;
	xid_t freed[PLACES];      /* group that freed a place */
	bool freed_meta[PLACES];
	struct index history[TRANSACTIONS + 1];
	xid_t xids[TRANSACTIONS + 1];
	unsigned last;            /* transaction committed last */
	unsigned durable;         /* and last reported durable */
	_Atomic bool noise;       /* another thread forces and checkpoints meanwhile */
};

static uint64_t rnd(struct world *w, uint64_t n)
{
	w->rng ^= w->rng << 13;
	w->rng ^= w->rng >> 7;
	w->rng ^= w->rng << 17;
	return w->rng % n;
}

static uint64_t place_offset(unsigned i)
{
	return (uint64_t)(BARE_FIRST + i) << BLOCK_SHIFT;
}

static void fill(char *page, uint64_t value)
{
	for (size_t i = 0; i < BLOCK_SIZE; i += 8)
		memcpy(page + i, &value, 8);
}

/* ---- workload ---- */

static bool may_hold_data(struct world *w, unsigned i)
{
	xid_t xid = w->freed[i];

	if (w->now.places[i].kind != FREE)
		return false;
	if (!xid)
		return true;
	if (w->freed_meta[i] && w->mutant != REUSE_EARLY)
		return jrn_checkpointed(w->fs) >= xid;
	return jrn_durable(w->fs) >= xid;
}

static int set_meta(struct world *w, struct trans *t, unsigned i, bool create, uint64_t value)
{
	struct buf *b;
	int err = create ? buf_new(t, BARE_FIRST + i, &bare_type, BARE_OWNER, &b) :
			   buf_get(w->fs, BARE_FIRST + i, &bare_type, BARE_OWNER, &b);

	if (err)
		return err;
	err = trans_join(t, b);
	if (!err)
		bare_set(b, value);
	buf_put(b);
	return err;
}

/* One random change of one place in a transaction. */
static int change(struct world *w, struct trans *t, struct index *next, bool *frees, unsigned i,
		  uint64_t value)
{
	struct place *p = &next->places[i];
	bool to_free = rnd(w, 3) == 0;
	int err;

	if (p->kind == META && to_free) {
		p->kind = FREE;
		frees[i] = true;
		return buf_forget(t, BARE_FIRST + i);
	}
	if (p->kind == DATA && to_free) {
		p->kind = FREE;
		frees[i] = true;
		return 0;
	}
	err = set_meta(w, t, i, p->kind != META, value);
	p->kind = META;
	p->value = value;
	return err;
}

static int write_index(struct world *w, struct trans *t, const struct index *next)
{
	struct buf *b;
	int err = w->last ? buf_get(w->fs, BARE_FIRST + INDEX, &bare_type, BARE_OWNER, &b) :
			    buf_new(t, BARE_FIRST + INDEX, &bare_type, BARE_OWNER, &b);

	if (err)
		return err;
	err = trans_join(t, b);
	if (!err)
		memcpy((char *)b->data + sizeof(struct meta_hdr), next, sizeof(*next));
	buf_put(b);
	return err;
}

/* After a cancel everything must be as before. */
static void check_memory(struct world *w)
{
	for (unsigned i = 0; i < PLACES; i++)
		if (w->now.places[i].kind == META)
			assert_int_equal(bare_read(w->fs, i), w->now.places[i].value);
}

static int one_transaction(struct world *w)
{
	uint64_t number = w->last + 1, value = number << 8;
	struct index next = w->now;
	bool frees[PLACES] = {false};
	unsigned changes = 1 + (unsigned)rnd(w, 5);
	struct trans t;
	int err;

	/* Data first: its conversion follows in the transaction. */
	for (unsigned k = 0; k < 2; k++) {
		unsigned i = (unsigned)rnd(w, PLACES);

		if (!may_hold_data(w, i))
			continue;
		fill(w->page, value + i);
		err = dev_write(w->fs->dev, place_offset(i), w->page, BLOCK_SIZE, 0);
		if (err)
			return err;
		next.places[i] = (struct place){DATA, value + i};
	}
	err = trans_begin(w->fs, &t, 16);
	if (err)
		return err;
	for (unsigned k = 0; k < changes && !err; k++) {
		unsigned i = (unsigned)rnd(w, PLACES);

		err = change(w, &t, &next, frees, i, value + i);
	}
	next.number = number;
	if (!err)
		err = write_index(w, &t, &next);
	if (err || rnd(w, 5) == 0) {
		trans_cancel(&t);
		if (!err)
			check_memory(w);
		return err;
	}
	w->last++;
	w->xids[w->last] = trans_commit(&t);
	for (unsigned i = 0; i < PLACES; i++) {
		if (!frees[i])
			continue;
		/* Freed and made anew in one transaction counts: the older content is what
		 * matters. */
		w->freed[i] = w->xids[w->last];
		w->freed_meta[i] = w->freed_meta[i] || w->now.places[i].kind == META;
	}
	for (unsigned i = 0; i < PLACES; i++)
		if (next.places[i].kind == META)
			w->freed_meta[i] = true;
	w->now = next;
	w->history[w->last] = next;
	return 0;
}

/* Kick, then wait: what the journal thread does is over before the workload goes on. */
static int checkpoint_all(struct world *w)
{
	xid_t upto = w->xids[w->last];
	struct timespec ts = {0, 50000};

	jrn_kick_checkpoint(w->fs);
	while (jrn_checkpointed(w->fs) < upto && !fs_is_shutdown(w->fs))
		nanosleep(&ts, NULL);
	return fs_is_shutdown(w->fs) ? -ERR_SHUTDOWN : 0;
}

static void note_durable(struct world *w)
{
	xid_t durable = jrn_durable(w->fs);

	while (w->durable < w->last && w->xids[w->durable + 1] <= durable)
		w->durable++;
}

static void run_workload(struct world *w)
{
	int err = 0;

	while (w->last < TRANSACTIONS && !err) {
		err = one_transaction(w);
		if (!err && w->last && rnd(w, 4) == 0) {
			/* By this thread, or by the journal's. */
			atomic_store(&w->fs->jrn->flush_ns, rnd(w, 3) ? 0 : LEAD_FLUSH_NS);
			err = jrn_force_blocking(w->fs, w->xids[w->last]);
			if (!err)
				xassert(jrn_durable(w->fs) >= w->xids[w->last]);
		}
		if (!err && w->last && rnd(w, 5) == 0)
			err = checkpoint_all(w);
		note_durable(w);
	}
}

static void *make_noise(void *arg)
{
	struct world *w = arg;
	struct timespec ts = {0, 20000};

	while (atomic_load(&w->noise) && !fs_is_shutdown(w->fs)) {
		jrn_kick_checkpoint(w->fs);
		jrn_force_blocking(w->fs, 0);
		nanosleep(&ts, NULL);
	}
	return NULL;
}

static void run_noisy_workload(struct world *w)
{
	pthread_t thread;

	atomic_store(&w->noise, true);
	xassert(pthread_create(&thread, NULL, make_noise, w) == 0);
	run_workload(w);
	atomic_store(&w->noise, false);
	pthread_join(thread, NULL);
}

/* ---- what is found ---- */

/* 0, or a description of what is wrong. */
static const char *verify_world(struct world *w, struct device *dev, const uint8_t *uuid)
{
	struct index found;
	uint64_t value;

	if (dev_read(dev, place_offset(INDEX), w->page, BLOCK_SIZE))
		return "the index cannot be read";
	if (meta_verify(w->page, MAGIC_NODE, BARE_FIRST + INDEX, uuid, BARE_OWNER))
		return w->durable ? "the index is gone" : NULL;
	memcpy(&found, w->page + sizeof(struct meta_hdr), sizeof(found));
	if (found.number < w->durable)
		return "a durable transaction is lost";
	if (!found.number || found.number > w->last ||
	    memcmp(&found, &w->history[found.number], sizeof(found)))
		return "the index is none that was written";
	if (found.number < w->last && w->xids[found.number + 1] == w->xids[found.number])
		return "half a group was replayed";
	for (unsigned i = 0; i < PLACES; i++) {
		const struct place *p = &found.places[i];

		if (p->kind == FREE)
			continue;
		if (dev_read(dev, place_offset(i), w->page, BLOCK_SIZE))
			return "a place cannot be read";
		if (p->kind == META) {
			if (meta_verify(w->page, MAGIC_NODE, BARE_FIRST + i, uuid, BARE_OWNER))
				return "a metadata block does not verify";
			if (!bare_value(w->page, &value) || value != p->value)
				return "a metadata block is of another time";
			continue;
		}
		for (size_t k = 0; k < BLOCK_SIZE; k += 8)
			if (memcmp(w->page + k, &p->value, 8))
				return "data is not what was written before its transaction";
	}
	return NULL;
}

static const char *replay_and_verify(struct world *w, struct sim *sim)
{
	const char *wrong;
	struct fs *fs;

	if (bare_open(sim, 0, 0, &fs))
		return "replay fails";
	wrong = verify_world(w, fs->dev, fs->super.uuid);
	bare_abandon(fs);
	return wrong;
}

/* Lose power at every event of the replay; then replay the rest. */
static const char *crash_in_replay(struct world *w, struct sim *crashed, uint64_t seed)
{
	for (uint64_t n = 1; n < 100; n++) {
		const char *wrong;
		struct sim *sim;
		struct fs *fs;
		int err;

		xassert(sim_clone(crashed, &sim) == 0);
		sim_crash_at(sim, sim_events(sim) + n);
		err = bare_open(sim, 0, 0, &fs);
		if (!err) {
			bare_abandon(fs);
			sim_destroy(sim);
			return n > 1 ? NULL : "replay wrote nothing";
		}
		sim_restart(sim, seed + n);
		wrong = replay_and_verify(w, sim);
		sim_destroy(sim);
		if (wrong)
			return wrong;
	}
	return "replay does not end";
}

/* One crash. Returns what is wrong, or NULL; *over: the workload ended before the event. */
static const char *crash_case(const struct sim *base, uint64_t seed, uint64_t event, unsigned mutant,
			      bool *over)
{
	struct world *w = calloc(1, sizeof(*w));
	const char *wrong = NULL;

	xassert(w);
	w->rng = seed * 0x9e3779b97f4a7c15ULL + 1;
	w->mutant = mutant;
	w->page = io_alloc(BLOCK_SIZE);
	xassert(sim_clone(base, &w->sim) == 0);
	sim_crash_at(w->sim, sim_events(w->sim) + event);
	if (bare_open(w->sim, 0, mutant >= REUSE_EARLY ? 0 : mutant, &w->fs) == 0) {
		if (mutant == NOISY)
			run_noisy_workload(w);
		else
			run_workload(w);
		bare_abandon(w->fs);
	}
	*over = !sim_crashed(w->sim);
	sim_restart(w->sim, seed * 31 + event);
	if (event % 7 == 0)
		wrong = crash_in_replay(w, w->sim, seed + event);
	if (!wrong)
		wrong = replay_and_verify(w, w->sim);
	sim_destroy(w->sim);
	io_free(w->page);
	free(w);
	return wrong;
}

/* Number of cases that went wrong; stops at the first unless all are wanted. */
static unsigned run_seed(uint64_t seed, unsigned mutant, unsigned step)
{
	const char *only = getenv("JOURNAL_CRASH");
	unsigned long long only_seed = 0, only_event = 0;
	unsigned only_mutant = 0;
	struct sim *base;
	bool over = false;

	if (only)
		xassert(sscanf(only, "%llu %llu %u", &only_seed, &only_event, &only_mutant) == 3);
	if (only && (only_seed != seed || only_mutant != mutant))
		return 0;
	base = bare_sim(seed);
	sim_fua_flushes(base, seed % 2);
	/* So that the log wraps in the middle. */
	bare_set_log_position(base, 1022 - 40 + seed % 30);
	for (uint64_t event = only ? only_event : 1 + seed % step; !over; event += step) {
		const char *wrong = crash_case(base, seed, event, mutant, &over);

		if (wrong && (!mutant || mutant == NOISY))
			print_error("%s: JOURNAL_CRASH=\"%llu %llu %u\"\n", wrong,
				    (unsigned long long)seed, (unsigned long long)event, mutant);
		if (wrong || only) {
			sim_destroy(base);
			return wrong != NULL;
		}
	}
	sim_destroy(base);
	return 0;
}

static void every_crash_leaves_a_prefix(void **state)
{
	for (uint64_t seed = 1; seed <= 4; seed++)
		assert_int_equal(run_seed(seed, MUTANT_NONE, 1), 0);
	for (uint64_t seed = 5; seed <= 20; seed++)
		assert_int_equal(run_seed(seed, MUTANT_NONE, 17), 0);
}

static void every_crash_with_another_thread(void **state)
{
	for (uint64_t seed = 1; seed <= 10; seed++)
		assert_int_equal(run_seed(seed, NOISY, 11), 0);
}

static void must_be_caught(unsigned mutant)
{
	unsigned caught = 0;

	for (uint64_t seed = 1; seed <= 12 && !caught; seed++)
		caught = run_seed(seed, mutant, 1);
	if (!getenv("JOURNAL_CRASH"))
		assert_true(caught);
}

static void mutant_commit_before_flush_is_caught(void **state)
{
	must_be_caught(MUTANT_COMMIT_BEFORE_FLUSH);
}

static void mutant_checkpoint_without_flush_is_caught(void **state)
{
	must_be_caught(MUTANT_CHECKPOINT_NO_FLUSH);
}

static void mutant_early_reuse_of_metadata_is_caught(void **state)
{
	must_be_caught(REUSE_EARLY);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_crash_leaves_a_prefix),
		cmocka_unit_test(every_crash_with_another_thread),
		cmocka_unit_test(mutant_commit_before_flush_is_caught),
		cmocka_unit_test(mutant_checkpoint_without_flush_is_caught),
		cmocka_unit_test(mutant_early_reuse_of_metadata_is_caught),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
