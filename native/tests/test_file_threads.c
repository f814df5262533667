/* SPDX-License-Identifier: MIT
 *
 * test_file_threads.c - threads that do whatever they like to the same files, while another interrupts them: nobody
 * sees a byte that was never written, every operation ends once, and no block is lost. With the thread sanitizer it
 * is also a test of the locks.
 *
 * FILE_SEEDS=n repeats it with n seeds; FILE_ROUNDS=n operations of each thread.
 */
#include "file_fixture.h"

#include <unistd.h>

#define THREADS 4u
#define SPAN (48u * BLOCK_SIZE)
#define LEN_MAX (12u * BLOCK_SIZE)

static unsigned number(const char *name, unsigned normal)
{
	const char *s = getenv(name);

	return s ? (unsigned)atoi(s) : normal;
}

struct worker {
	unsigned index, rounds, left;
	uint64_t random;
	struct ioctx *ctx;
	pthread_mutex_t lock; /* of fop */
	struct file_op *fop;  /* under way */
	bool done;
	unsigned interrupted, early;
};

static struct worker workers[THREADS];
static _Atomic bool over;

static uint64_t pick(struct worker *w, uint64_t n)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random % n;
}

static void has_ended(void *arg)
{
	((struct worker *)arg)->left--;
}

static void is_done(struct file_op *fop)
{
	struct worker *w = fop->user;

	pthread_mutex_lock(&w->lock);
	w->fop = NULL;
	pthread_mutex_unlock(&w->lock);
	xassert(!w->done);
	w->done = true;
	w->left += fop->early;
	w->early += fop->early;
}

static int64_t run(struct worker *w, struct file_op *fop)
{
	fop->user = fop->ended_arg = w;
	fop->done = is_done;
	fop->ended = has_ended;
	w->done = false;
	file_start(fop);
	pthread_mutex_lock(&w->lock);
	w->fop = w->done ? NULL : fop;
	pthread_mutex_unlock(&w->lock);
	while (!w->done)
		xassert(ioctx_run(w->ctx, true) >= 0);
	w->interrupted += fop->result == -EINTR;
	return fop->result;
}

static uint64_t size_of(struct inode *in)
{
	struct inode_stat st;

	namei_stat(in, &st);
	return st.core.size;
}

static bool has_canary(const uint8_t *mem, size_t len)
{
	uint64_t canary = SIM_CANARY;

	return memmem(mem, len, &canary, sizeof(canary)) != NULL;
}

static void one(struct worker *w, uint8_t *mem)
{
	static const enum file_op_kind kinds[] = {
		FILE_READ, FILE_READ, FILE_WRITE, FILE_WRITE, FILE_WRITE, FILE_WRITE, FILE_TRUNCATE,
		FILE_FALLOCATE, FILE_COPY, FILE_COPY, FILE_EXCHANGE, FILE_DEDUPE, FILE_FSYNC,
	};
	static const unsigned modes[] = { 0, FALLOC_KEEP_SIZE, FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE,
					  FALLOC_ZERO_RANGE };
	enum file_op_kind kind = kinds[pick(w, ARRAY_LEN(kinds))];
	struct file_op fop;
	int64_t rc;

	file_op_init(&fop, kind, world.file[pick(w, FILES)], w->ctx);
	fop.dst = world.file[pick(w, FILES)];
	fop.offset = pick(w, SPAN);
	fop.dst_offset = pick(w, SPAN);
	fop.len = 1 + pick(w, LEN_MAX);
	fop.buf = mem + (pick(w, 2) ? 512 * pick(w, 8) : pick(w, BLOCK_SIZE));
	if (pick(w, 2) || kind == FILE_EXCHANGE || kind == FILE_DEDUPE) {
		fop.offset &= ~BLOCK_MASK;
		fop.dst_offset &= ~BLOCK_MASK;
		fop.len = (fop.len + BLOCK_MASK) & ~BLOCK_MASK;
	}
	fop.mode = kind == FILE_FALLOCATE ? modes[pick(w, ARRAY_LEN(modes))] : 0;
	if (kind == FILE_WRITE) {
		fop.flags = FILE_F_EARLY | (pick(w, 4) ? 0 : FILE_F_APPEND) | (pick(w, 16) ? 0 : FILE_F_DSYNC);
		if (size_of(fop.in) > 4 * SPAN)
			fop.flags &= ~FILE_F_APPEND;
		memset(fop.buf, (int)(1 + pick(w, 250)), fop.len);
	} else if (kind == FILE_READ) {
		memset(fop.buf, 0, fop.len);
	}
	rc = run(w, &fop);
	if (rc < 0 && rc != -EINTR && rc != -EINVAL && rc != -EBADE)
		fail_msg("kind %d: %s", kind, err_name((int)rc));
	if (kind == FILE_READ && rc > 0)
		xassert(!has_canary(fop.buf, (size_t)rc));
}

static void *work(void *arg)
{
	struct worker *w = arg;
	uint8_t *mem = io_alloc(LEN_MAX + 2 * BLOCK_SIZE);

	xassert(mem && ioctx_create(64, &w->ctx) == 0);
	for (unsigned i = 0; i < w->rounds; i++)
		one(w, mem);
	while (w->left)
		xassert(ioctx_run(w->ctx, true) >= 0);
	ioctx_destroy(w->ctx);
	io_free(mem);
	return NULL;
}

static void *interrupt(void *arg)
{
	for (unsigned i = 0; !atomic_load(&over); i++) {
		struct worker *w = &workers[i % THREADS];

		pthread_mutex_lock(&w->lock);
		if (w->fop)
			file_cancel(w->fop);
		pthread_mutex_unlock(&w->lock);
		usleep(200);
	}
	return NULL;
}

static void everything_at_once(void **state)
{
	for (uint64_t seed = 1; seed <= number("FILE_SEEDS", 4); seed++) {
		pthread_t t[THREADS], other;
		unsigned early = 0;

		early_memory = seed % 4 ? 4u << 20 : 0;
		begin(64u << 20, seed % 2 ? 512 : 4096, 3000 + seed);
		sim_shuffle(world.sim, seed % 3 != 0);
		atomic_store(&over, false);
		for (unsigned i = 0; i < THREADS; i++) {
			workers[i] = (struct worker){ .index = i, .rounds = number("FILE_ROUNDS", 300),
						      .random = seed * 1000003 + i * 7919 + 1,
						      .lock = PTHREAD_MUTEX_INITIALIZER };
			assert_int_equal(pthread_create(&t[i], NULL, work, &workers[i]), 0);
		}
		assert_int_equal(pthread_create(&other, NULL, interrupt, NULL), 0);
		for (unsigned i = 0; i < THREADS; i++) {
			pthread_join(t[i], NULL);
			early += workers[i].early;
		}
		atomic_store(&over, true);
		pthread_join(other, NULL);
		assert_true(early_memory ? early > 20 : early == 0);
		end();
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(everything_at_once),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
