/* SPDX-License-Identifier: MIT
 *
 * test_file_early.c - writes that are answered before their data is on the device: what is seen of them at once, who
 * waits for them, what is durable, what a device that fails leaves, and which writes are answered late.
 *
 * Completions of the simulated device come from ioctx_run() only: until then a write stays under way.
 */
#include "file_fixture.h"

#include "namei.h"

#define MEMORY (4u << 20)

static int setup(void **state)
{
	early_memory = MEMORY;
	begin(64u << 20, 512, 1);
	return 0;
}

static int teardown(void **state)
{
	end();
	return 0;
}

static const struct inode_core *look(unsigned file)
{
	static struct inode_stat st;

	namei_stat(world.file[file], &st);
	return &st.core;
}

static struct todo a_write(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	return (struct todo){ .act = ACT_WRITE, .file = file, .off = off, .len = len, .pattern = pattern };
}

/* It has its answer and goes on. */
static void write_early(unsigned file, uint64_t off, uint64_t len, uint64_t pattern)
{
	struct todo t = a_write(file, off, len, pattern);
	unsigned left = world.early_left;
	struct flight f;

	model_do(files, &t);
	flight_start(&f, &t);
	assert_true(f.done);
	assert_true(f.fop.early);
	assert_int_equal(f.fop.result, len);
	assert_int_equal(world.early_left, left + 1);
	memset(f.fop.buf, 0xdd, len); /* the memory is its caller's again */
	flight_end(&f);
}

/* It is answered, but not before it has ended. */
static void write_late(const struct todo *t)
{
	unsigned left = world.early_left;
	struct flight f;

	model_do(files, t);
	flight_start(&f, t);
	flight_wait(&f);
	assert_false(f.fop.early);
	assert_true(world.early_left <= left);
	assert_int_equal(f.fop.result, t->len);
	flight_end(&f);
}

static void file_is(unsigned file, const char *when)
{
	same_as_model(file, &files[file], when);
}

/* ---- what is seen --------------------------------------------------------------------------- */

static void attributes_are_those_of_the_end_at_once(void **state)
{
	struct attr_change utimens = { .valid = ATTR_MTIME, .mtime = { 1000, 5 } };
	struct inode_core early, over;

	early = *look(0);
	write_early(0, 0, 3 * BLOCK_SIZE + 77, 3);
	assert_true(look(0)->change > early.change);
	assert_true(look(0)->mtime.sec > early.mtime.sec || look(0)->mtime.nsec > early.mtime.nsec);
	OK(namei_setattr(world.file[0], &utimens));
	early = *look(0);
	assert_int_equal(early.size, 3 * BLOCK_SIZE + 77);
	assert_int_equal(early.blocks, 4);
	early_run_out();
	over = *look(0);
	assert_memory_equal(&early, &over, sizeof(early));
	assert_int_equal(over.mtime.sec, 1000);
	file_is(0, "grown");
	write_early(0, BLOCK_SIZE, BLOCK_SIZE, 4);
	early = *look(0);
	early_run_out();
	over = *look(0);
	assert_memory_equal(&early, &over, sizeof(early));
	assert_true(over.mtime.sec > 1000);
	file_is(0, "in place");
}

static void readers_wait_for_the_bytes(void **state)
{
	struct todo holes = { .act = ACT_READ, .len = BLOCK_SIZE, .off = 8 * BLOCK_SIZE };
	struct todo read = { .act = ACT_READ, .len = 4 * BLOCK_SIZE };
	struct flight f, other;

	OK(do_truncate(0, 16 * BLOCK_SIZE));
	model_do(files, &(struct todo){ .act = ACT_TRUNCATE, .off = 16 * BLOCK_SIZE });
	write_early(0, 0, 2 * BLOCK_SIZE, 3);
	flight_start(&other, &holes);
	assert_true(other.done); /* there is nothing to read, and nobody in the way */
	flight_end(&other);
	holes.off = 0;
	flight_start(&f, &read);
	assert_false(f.done); /* these were zeros just before */
	flight_start(&other, &holes);
	assert_false(other.done);
	flight_wait(&f);
	flight_wait(&other);
	check_read(&f, &files[0]);
	check_read(&other, &files[0]);
	flight_end(&f);
	flight_end(&other);
	early_run_out();
	/* In place: what is on the device is old until it is written. */
	write_early(0, 0, 2 * BLOCK_SIZE, 4);
	flight_start(&f, &read);
	assert_int_equal(world.early_left, 1);
	flight_wait(&f);
	check_read(&f, &files[0]);
	flight_end(&f);
}

/* A reader that had its segment before the answer does not take the blocks that are not written yet for zeros. */
static void earlier_readers_see_the_earlier_size(void **state)
{
	struct todo read = { .act = ACT_READ, .len = 4 * BLOCK_SIZE };
	struct seg s;
	struct flight f;

	write_early(0, 0, BLOCK_SIZE, 3);
	early_run_out();
	seg_init(&s, SEG_MAP, BLOCK_SIZE, 4 * BLOCK_SIZE, NULL);
	assert_int_equal(seg_acquire(world.file[0], &s), 0);
	flight_start(&f, &read);
	seg_release(world.file[0], &s); /* the reader has it now, and goes on later */
	write_early(0, BLOCK_SIZE, BLOCK_SIZE, 4);
	flight_wait(&f);
	assert_int_equal(f.fop.result, BLOCK_SIZE);
	flight_end(&f);
	file_is(0, "after both");
}

static void overlapping_writes_keep_their_order(void **state)
{
	struct todo second = a_write(0, 1000, 9000, 4), third = a_write(0, 5000, 20000, 5);
	struct flight f, g;

	write_early(0, 0, 3 * BLOCK_SIZE, 3);
	model_do(files, &second);
	model_do(files, &third);
	flight_start(&f, &second);
	flight_start(&g, &third);
	assert_false(f.done || g.done);
	flight_wait(&g);
	assert_true(f.done);
	flight_end(&f);
	flight_end(&g);
	file_is(0, "three writes");
	early_run_out();
}

static void appends_follow_one_another(void **state)
{
	struct todo t = { .act = ACT_APPEND, .len = BLOCK_SIZE };
	struct flight f[8];

	for (unsigned i = 0; i < ARRAY_LEN(f); i++) {
		t.pattern = i + 1;
		model_do(files, &t);
		flight_start(&f[i], &t);
		assert_true(f[i].done);
		assert_int_equal(f[i].fop.offset, i * BLOCK_SIZE);
		flight_end(&f[i]);
	}
	assert_int_equal(world.early_left, ARRAY_LEN(f));
	t.len = 100;
	for (unsigned i = 0; i < ARRAY_LEN(f); i++) {
		t.pattern = i + 100;
		model_do(files, &t);
		flight_start(&f[i], &t);
	}
	for (unsigned i = 0; i < ARRAY_LEN(f); i++) {
		flight_wait(&f[i]);
		flight_end(&f[i]);
	}
	file_is(0, "appended");
}

static void truncation_comes_after(void **state)
{
	write_early(0, 0, 3 * BLOCK_SIZE, 3);
	both(&(struct todo){ .act = ACT_TRUNCATE, .off = 5000 });
	assert_int_equal(look(0)->size, 5000);
	file_is(0, "cut");
	both(&(struct todo){ .act = ACT_TRUNCATE, .off = 9000 });
	file_is(0, "grown again");
	write_early(0, 3 * BLOCK_SIZE, 2 * BLOCK_SIZE, 4);
	both(&(struct todo){ .act = ACT_COPY, .dst = 1, .len = 5 * BLOCK_SIZE });
	file_is(1, "a copy of what was under way");
}

/* The last name and the last user go. */
static void deletion_waits_for_the_end(void **state)
{
	struct todo t = a_write(0, 0, 2 * BLOCK_SIZE, 3);
	struct inode *in = NULL, *kept = world.file[0];
	nblocks_t before = free_blocks();
	struct flight f;

	OK(namei_create(world.root, "gone", 4, S_IFREG | 0644, 0, &root_cred, &in));
	world.file[0] = in;
	flight_start(&f, &t);
	flight_end(&f);
	world.file[0] = kept;
	inode_put(in);
	OK(namei_unlink(world.root, "gone", 4, NULL));
	assert_int_equal(world.early_left, 1);
	early_run_out();
	reaper_drain(world.fs);
	assert_int_equal(free_blocks(), before);
}

/* ---- what is durable ------------------------------------------------------------------------ */

static void power_cut(void)
{
	sim_crash_at(world.sim, sim_events(world.sim) + 1);
	put_files(); /* what is under way fails */
	inode_put(world.root);
	inode_lookup_forget_all(world.fs);
	fs_abandon(world.fs);
	sim_restart(world.sim, 2); /* a seed that drops */
	OK(world_open());
	find_files();
}

static void commit(void)
{
	xid_t xid;

	fs_rdlock(world.fs);
	xid = jrn_running(world.fs);
	fs_unlock(world.fs);
	OK(jrn_force_blocking(world.fs, xid));
}

static void fsync_waits_and_then_it_is_durable(void **state)
{
	struct flight f;

	write_early(0, 0, 5000, 3);
	write_early(1, 0, 3 * BLOCK_SIZE, 4);
	flight_start(&f, &(struct todo){ .act = ACT_FSYNC, .file = 0 });
	assert_int_equal(world.early_left, 2);
	assert_false(f.done);
	flight_wait(&f);
	assert_int_equal(f.fop.result, 0);
	assert_int_equal(do_fsync(1), 0);
	assert_int_equal(world.early_left, 0);
	write_early(1, 0, BLOCK_SIZE, 5); /* in place */
	assert_int_equal(do_fsync(1), 0);
	power_cut();
	file_is(0, "after the power cut");
	file_is(1, "after the power cut");
}

static void written_durably_means_all_before(void **state)
{
	struct todo t = a_write(0, 2 * BLOCK_SIZE, 100, 4);

	t.dsync = true;
	write_early(0, 0, 2 * BLOCK_SIZE, 3);
	both(&t);
	power_cut();
	file_is(0, "after the power cut");
}

static void a_crash_shows_no_zeros_for_data(void **state)
{
	struct attr_change chmod = { .valid = ATTR_MODE, .mode = 0600 };

	write_early(0, 0, BLOCK_SIZE, 3);
	assert_int_equal(do_fsync(0), 0);
	write_early(0, BLOCK_SIZE, BLOCK_SIZE, 4);
	write_early(0, 2 * BLOCK_SIZE, 100, 5);
	OK(namei_setattr(world.file[0], &chmod)); /* writes the inode */
	assert_int_equal(look(0)->size, 2 * BLOCK_SIZE + 100);
	commit();
	power_cut();
	assert_int_equal(look(0)->mode & 07777, 0600);
	assert_int_equal(look(0)->size, BLOCK_SIZE);
	files[0].size = BLOCK_SIZE;
	file_is(0, "after the power cut");
}

static void a_size_that_was_set_is_the_size(void **state)
{
	write_early(0, 0, BLOCK_SIZE, 3);
	both(&(struct todo){ .act = ACT_TRUNCATE, .off = 3 * BLOCK_SIZE });
	assert_int_equal(world.early_left, 1);
	write_early(0, 3 * BLOCK_SIZE, BLOCK_SIZE, 4);
	commit();
	power_cut();
	assert_int_equal(look(0)->size, 3 * BLOCK_SIZE);
	memset(files[0].bytes, 0, MODEL_MAX);
	files[0].size = 3 * BLOCK_SIZE;
	file_is(0, "after the power cut");
}

/* A size that was set by a transaction that then failed counts for nothing. */
static void a_size_that_was_taken_back_is_not(void **state)
{
	struct attr_change chmod = { .valid = ATTR_MODE, .mode = 0600 };
	struct inode *in = world.file[0];
	struct trans t;

	write_early(0, 0, BLOCK_SIZE, 3);
	assert_int_equal(do_fsync(0), 0);
	write_early(0, BLOCK_SIZE, BLOCK_SIZE, 4);
	OK(trans_begin(world.fs, &t, 16));
	OK(trans_join_inode(&t, in));
	in->core.size = 3 * BLOCK_SIZE;
	OK(inode_write(&t, in));
	trans_cancel(&t);
	OK(namei_setattr(in, &chmod));
	assert_int_equal(look(0)->size, 2 * BLOCK_SIZE);
	commit();
	power_cut();
	assert_int_equal(look(0)->mode & 07777, 0600);
	assert_int_equal(look(0)->size, BLOCK_SIZE);
	files[0].size = BLOCK_SIZE;
	file_is(0, "after the power cut");
}

/* The power goes after so many turns of the loop; what was behind EOF then does not come back when the file grows. */
static void cut_and_grow(unsigned turns, uint64_t size)
{
	for (; turns && world.early_left; turns--)
		OK(ioctx_run(world.ctx, true));
	commit();
	power_cut();
	files[0].size = look(0)->size;
	assert_true(files[0].size <= size);
	file_is(0, "after the power cut");
	memset(files[0].bytes + files[0].size, 0, MODEL_MAX - files[0].size);
	both(&(struct todo){ .act = ACT_TRUNCATE, .off = size });
	file_is(0, "grown by zeros");
	both(&(struct todo){ .act = ACT_TRUNCATE });
}

/* The second write is over sooner: the first has to read. */
static void later_ones_leave_nothing_behind_eof(void **state)
{
	for (unsigned turns = 0; turns < 8; turns++) {
		write_early(0, 0, 100, 3);
		assert_int_equal(do_fsync(0), 0);
		write_early(0, 100, BLOCK_SIZE - 100, 4);
		write_early(0, BLOCK_SIZE, 2 * BLOCK_SIZE, 5);
		cut_and_grow(turns, 3 * BLOCK_SIZE);
	}
}

/* The second waits for the first, which has read and fails to write. */
static void later_ones_wait_for_one_that_fails(void **state)
{
	for (unsigned turns = 0; turns < 6; turns++) {
		write_early(0, 0, 100, 3);
		assert_int_equal(do_fsync(0), 0);
		write_early(0, 100, BLOCK_SIZE - 100, 4);
		memset(files[0].bytes + 100, 0, BLOCK_SIZE - 100);
		sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 1);
		OK(ioctx_run(world.ctx, true));
		sim_fail(world.sim, IO_WRITE, 0, 0, 0);
		write_early(0, BLOCK_SIZE, 2 * BLOCK_SIZE, 5);
		cut_and_grow(turns, 3 * BLOCK_SIZE);
	}
}

#define MANY 100u /* more records than one transaction converts, or allocates */

/* Converted by several transactions: the size follows them. */
static void a_fragmented_one_leaves_nothing_behind_eof(void **state)
{
	struct todo keep = { .act = ACT_ALLOC, .len = BLOCK_SIZE, .keep_size = true };
	struct todo write = a_write(0, 0, MANY * BLOCK_SIZE, 3);
	struct todo read = { .act = ACT_READ, .len = MANY * BLOCK_SIZE };
	unsigned between = 0;

	for (unsigned turns = 0; turns < 8; turns++) {
		struct flight f;
		uint64_t size;

		for (unsigned i = MANY; i-- > 0;) { /* downwards, so that no two are one extent */
			keep.off = i * BLOCK_SIZE;
			assert_int_equal(do_one(&keep), 0);
		}
		flight_start(&f, &write);
		assert_true(f.fop.early);
		flight_end(&f);
		for (unsigned i = turns; i && world.early_left; i--)
			OK(ioctx_run(world.ctx, true));
		commit();
		power_cut();
		size = look(0)->size;
		between += size > 0 && size < MANY * BLOCK_SIZE;
		assert_int_equal(do_truncate(0, MANY * BLOCK_SIZE), 0);
		flight_start(&f, &read);
		flight_wait(&f);
		assert_int_equal(f.fop.result, MANY * BLOCK_SIZE);
		for (uint64_t i = 0; i < MANY * BLOCK_SIZE; i++)
			assert_int_equal(f.mem[i], i < size ? pattern_byte(3, i) : 0);
		flight_end(&f);
		assert_int_equal(do_truncate(0, 0), 0);
	}
	assert_true(between > 0);
}

/* A client's commit needs no segment of the block of EOF. */
static void a_commit_may_move_eof_before_the_answer(void **state)
{
	struct todo one = a_write(0, 0, BLOCK_SIZE, 4), all = a_write(0, 0, (2 * MANY + 1) * BLOCK_SIZE, 3);
	struct inode *in = world.file[0];
	struct trans t;
	struct flight f;

	for (unsigned i = 0; i < MANY; i++) {
		one.off = 2 * i * BLOCK_SIZE;
		assert_int_equal(do_one(&one), BLOCK_SIZE);
	}
	early_run_out();
	all.flags = FILE_F_EARLY;
	flight_start(&f, &all);
	assert_false(f.done); /* it needs several transactions to allocate */
	OK(trans_begin(world.fs, &t, 16));
	OK(trans_join_inode(&t, in));
	in->core.size = 3 * MANY * BLOCK_SIZE;
	OK(inode_write(&t, in));
	trans_commit(&t);
	flight_wait(&f);
	assert_false(f.fop.early);
	assert_int_equal(f.fop.result, all.len);
	assert_int_equal(look(0)->size, 3 * MANY * BLOCK_SIZE);
	flight_end(&f);
}

struct waiting { struct fs *fs; _Atomic bool over; };

static void *wait_for_all(void *arg)
{
	struct waiting *w = arg;

	early_sync(w->fs);
	atomic_store(&w->over, true);
	return NULL;
}

static void all_of_them_can_be_waited_for(void **state)
{
	struct waiting w = { .fs = world.fs };
	struct early_stats st;
	pthread_t t;

	early_sync(world.fs);
	write_early(0, 0, BLOCK_SIZE, 3);
	write_early(1, 0, BLOCK_SIZE, 3);
	assert_int_equal(pthread_create(&t, NULL, wait_for_all, &w), 0);
	do
		early_get_stats(world.fs, &st);
	while (!st.waits);
	assert_false(atomic_load(&w.over));
	early_run_out();
	pthread_join(t, NULL);
	early_get_stats(world.fs, &st);
	assert_int_equal(st.writes, 2);
	assert_int_equal(st.waits, 1);
	assert_int_equal(st.errors, 0);
}

/* ---- a device that fails -------------------------------------------------------------------- */

static void nothing_stale_is_seen_when_a_write_fails(void **state)
{
	struct early_stats st;

	write_early(0, 0, 2 * BLOCK_SIZE + 9, 3);
	write_early(1, 0, BLOCK_SIZE, 3);
	assert_int_equal(early_errors(world.file[0]), 0);
	early_run_out();
	sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 1);
	write_early(1, 0, BLOCK_SIZE, 8); /* submitted with the answer: this one fails */
	files[1].bytes[0] = 0;
	write_early(0, 2 * BLOCK_SIZE, BLOCK_SIZE, 6);
	early_run_out();
	sim_fail(world.sim, IO_WRITE, 0, 0, 0);
	assert_int_equal(early_errors(world.file[1]), 1);
	assert_int_equal(atomic_load(&world.file[1]->early_code), -ERR_DEV_WRITE);
	model_do(files, &(struct todo){ .act = ACT_WRITE, .file = 1, .len = BLOCK_SIZE, .pattern = 3 });
	file_is(0, "not touched by it");
	file_is(1, "not overwritten");
	sim_fail(world.sim, IO_WRITE, BEHIND_LOG, UINT32_MAX, 1);
	write_early(2, 0, 3 * BLOCK_SIZE, 5);
	early_run_out();
	sim_fail(world.sim, IO_WRITE, 0, 0, 0);
	assert_int_equal(early_errors(world.file[2]), 1);
	memset(files[2].bytes, 0, MODEL_MAX);
	file_is(2, "zeros, no canary");
	early_get_stats(world.fs, &st);
	assert_int_equal(st.errors, 2);
	/* What was said of the size stands, and becomes durable. */
	assert_int_equal(do_fsync(2), 0);
	power_cut();
	file_is(2, "zeros after the power cut");
}

/* ---- answered late -------------------------------------------------------------------------- */

static void some_are_answered_late(void **state)
{
	struct todo t = a_write(0, 0, BLOCK_SIZE, 3);

	t.dsync = true;
	write_late(&t);
	t.dsync = false;
	t.flags = FILE_F_NOWAIT | FILE_F_EARLY;
	write_late(&t);
	t.flags = 0;
	both(&(struct todo){ .act = ACT_COPY, .dst = 1, .len = BLOCK_SIZE });
	write_late(&t); /* shared */
	write_early(0, 0, BLOCK_SIZE, 9);
	early_run_out();
	/* What is behind EOF in its block is not known: the size came from a client. */
	both(&(struct todo){ .act = ACT_TRUNCATE, .off = 100 });
	world.file[0]->tail_zero = false;
	t = a_write(0, 200, 50, 4);
	write_late(&t);
	write_early(0, 300, 50, 4);
	file_is(0, "written late");
}

static void clients_that_read_by_themselves_find_it_on_the_device(void **state)
{
	struct todo t = a_write(0, 0, BLOCK_SIZE, 4);
	struct inode *in = world.file[0];
	struct seg grant;

	write_early(0, 0, 2 * BLOCK_SIZE, 3);
	early_run_out();
	seg_init(&grant, SEG_GRANT_READ, 0, BLOCK_SIZE, NULL);
	grant.holder = 77;
	pthread_mutex_lock(&in->lock);
	assert_int_equal(seg_grant_locked(in, NULL, &grant), 0);
	pthread_mutex_unlock(&in->lock);
	write_late(&t);
	write_early(0, BLOCK_SIZE, BLOCK_SIZE, 5); /* not theirs */
	pthread_mutex_lock(&in->lock);
	seg_ungrant_locked(in, &grant);
	pthread_mutex_unlock(&in->lock);
	write_early(0, 0, BLOCK_SIZE, 6);
	file_is(0, "written");
}

static void memory_is_bounded(void **state)
{
	struct todo t = a_write(0, 0, 1u << 20, 3);
	struct early_stats st;
	struct flight f;
	unsigned early = 0;

	for (unsigned i = 0; i < 40; i++) {
		t.off = (uint64_t)i << 20;
		if (i == 20)
			early_run_out();
		if (i >= 20) /* memory of one size becomes that of another */
			t.len = 3 * BLOCK_SIZE;
		flight_start(&f, &t);
		early += f.fop.early;
		flight_wait(&f);
		flight_end(&f);
		early_get_stats(world.fs, &st);
		assert_true(st.bytes <= MEMORY);
	}
	assert_true(early >= 2 + 20 && early < 40);
	early_run_out();
	/* So is their number, of a file. */
	early = 0;
	for (unsigned i = 0; i < 100; i++) {
		struct todo small = a_write(0, i * BLOCK_SIZE, BLOCK_SIZE, 3);

		flight_start(&f, &small);
		early += f.fop.early;
		if (!f.fop.early)
			break;
		flight_end(&f);
	}
	assert_int_equal(early, 32);
	flight_wait(&f);
	flight_end(&f);
	/* What is kept may go, and then there is memory again. */
	early_run_out();
	early_get_stats(world.fs, &st);
	assert_true(st.bytes >= 32 * 2 * BLOCK_SIZE);
	assert_int_equal(early_drop_kept(world.fs), st.bytes);
	early_get_stats(world.fs, &st);
	assert_int_equal(st.bytes, 0);
	assert_int_equal(early_drop_kept(world.fs), 0);
	t = a_write(0, 0, BLOCK_SIZE, 3);
	flight_start(&f, &t);
	assert_true(f.fop.early);
	assert_int_equal(early_drop_kept(world.fs), 0); /* not what is under way */
	flight_end(&f);
	early_run_out();
}

/* ---- threads -------------------------------------------------------------------------------- */

#define THREADS 3u
#define ROUNDS 400u
#define STRIPES 24u

struct one_of {
	unsigned index, left;
	struct ioctx *ctx;
};

static void has_ended(void *arg)
{
	((struct one_of *)arg)->left--;
}

struct awaited { bool done; struct one_of *of; };

static void is_done(struct file_op *fop)
{
	struct awaited *a = fop->user;

	a->done = true;
	a->of->left += fop->early;
}

static int64_t run(struct one_of *o, enum file_op_kind kind, uint64_t off, void *buf, uint64_t len)
{
	struct awaited a = { .of = o };
	struct file_op fop;

	file_op_init(&fop, kind, world.file[0], o->ctx);
	fop.offset = off;
	fop.len = len;
	fop.buf = buf;
	fop.flags = kind == FILE_WRITE ? FILE_F_EARLY : 0;
	fop.ended = has_ended;
	fop.ended_arg = o;
	fop.done = is_done;
	fop.user = &a;
	file_start(&fop);
	while (!a.done)
		xassert(ioctx_run(o->ctx, true) >= 0);
	return fop.result;
}

/* Each has blocks of its own, and finds in them what it wrote last; one of them cuts the file in between. */
static void *writer(void *arg)
{
	struct one_of *o = arg;
	uint8_t *mem = io_alloc(2 * BLOCK_SIZE), *got = io_alloc(2 * BLOCK_SIZE);

	xassert(ioctx_create(64, &o->ctx) == 0);
	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t len = i % 3 ? BLOCK_SIZE : 1000 + i;
		uint64_t off = ((i * 7 % STRIPES) * THREADS + o->index) * BLOCK_SIZE;

		memset(mem, (int)(1 + i % 250), len);
		xassert(run(o, FILE_WRITE, off, mem, len) == (int64_t)len);
		if (i % 2) {
			xassert(run(o, FILE_READ, off, got, len) == (int64_t)len);
			xassert(!memcmp(mem, got, len));
		}
		if (i % 29 == 0)
			xassert(run(o, FILE_FSYNC, 0, NULL, 0) == 0);
		if (o->index == 0 && i % 13 == 0)
			xassert(run(o, FILE_TRUNCATE, (uint64_t)(STRIPES * THREADS + i) * BLOCK_SIZE, NULL,
				    0) == 0);
	}
	while (o->left)
		xassert(ioctx_run(o->ctx, true) >= 0);
	ioctx_destroy(o->ctx);
	io_free(mem);
	io_free(got);
	return NULL;
}

static void threads_find_what_they_wrote(void **state)
{
	struct one_of of[THREADS] = { 0 };
	struct early_stats st;
	pthread_t t[THREADS];

	for (unsigned i = 0; i < THREADS; i++) {
		of[i].index = i;
		assert_int_equal(pthread_create(&t[i], NULL, writer, &of[i]), 0);
	}
	for (unsigned i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	early_get_stats(world.fs, &st);
	assert_true(st.writes > THREADS * ROUNDS / 2);
	assert_int_equal(st.errors, 0);
}

#define RULE(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		RULE(attributes_are_those_of_the_end_at_once),
		RULE(readers_wait_for_the_bytes),
		RULE(earlier_readers_see_the_earlier_size),
		RULE(overlapping_writes_keep_their_order),
		RULE(appends_follow_one_another),
		RULE(truncation_comes_after),
		RULE(deletion_waits_for_the_end),
		RULE(fsync_waits_and_then_it_is_durable),
		RULE(written_durably_means_all_before),
		RULE(a_crash_shows_no_zeros_for_data),
		RULE(a_size_that_was_set_is_the_size),
		RULE(a_size_that_was_taken_back_is_not),
		RULE(later_ones_leave_nothing_behind_eof),
		RULE(later_ones_wait_for_one_that_fails),
		RULE(a_fragmented_one_leaves_nothing_behind_eof),
		RULE(a_commit_may_move_eof_before_the_answer),
		RULE(all_of_them_can_be_waited_for),
		RULE(nothing_stale_is_seen_when_a_write_fails),
		RULE(some_are_answered_late),
		RULE(clients_that_read_by_themselves_find_it_on_the_device),
		RULE(memory_is_bounded),
		RULE(threads_find_what_they_wrote),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
