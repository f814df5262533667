/* SPDX-License-Identifier: MIT
 *
 * test_delegation.c - delegations: who gets one, what waits for it, how it ends, in virtual time;
 * and threads that open, grant and return at once.
 */
#include "holder_fixture.h"

#include <pthread.h>

#include "delegation_priv.h"
#include "errors.h"
#include "namei.h"

static struct inode *file(unsigned i) { return world.file[i]; }

static uint64_t local_holder(void)
{
	struct holder_spec spec = some_spec;
	uint64_t id, key;

	spec.kind = HOLDER_LOCAL;
	OK(holder_register(world.fs, &spec, sink, &id, &key));
	return id;
}

static uint64_t seq_of(unsigned i, uint64_t holder, bool write)
{
	uint64_t seq = 0;

	OK(delegation_grant(file(i), holder, write, &seq));
	assert_int_not_equal(seq, 0);
	return seq;
}

static int try_grant(unsigned i, uint64_t holder, bool write)
{
	uint64_t seq;

	return delegation_grant(file(i), holder, write, &seq);
}

/* An operation of a local user that waits. */
struct local {
	struct op op;
	struct delegation_wait wait;
	struct inode *in;
	enum delegation_op kind;
	bool went_on;
};

static void resumed(struct op *op)
{
	container_of(op, struct local, op)->went_on = true;
}

static int begin_local(struct local *l, unsigned i, enum delegation_op kind)
{
	*l = (struct local){ .op = { .resume = resumed, .ctx = world.ctx }, .in = file(i),
			     .kind = kind };
	l->wait.op = &l->op;
	local_use_begin(l->in, kind);
	return delegation_wait(l->in, kind, &l->wait);
}

static void end_local(struct local *l)
{
	local_use_end(l->in, l->kind);
}

static bool runs(struct local *l)
{
	assert_true(ioctx_run(world.ctx, false) >= 0);
	return l->went_on;
}

/* ---- who gets one --------------------------------------------------------------------------- */

static void readers_share_and_a_writer_does_not(void **state)
{
	uint64_t a = reg(), b = reg(), first = seq_of(0, a, false), second = seq_of(0, b, false);

	assert_true(second > first);
	assert_int_equal(try_grant(0, a, true), -EAGAIN);
	assert_int_equal(COUNTER(delegations_refused_held), 1);
	assert_int_equal(seq_of(0, a, false), first); /* it has it already */
	OK(delegation_return(file(0), b));
	assert_int_equal(delegation_return(file(0), b), -ENOENT);
	assert_int_equal(atomic_load(&file(0)->delegated), DELEGATED_READ);
	assert_true(seq_of(0, a, true) > second); /* turned into a WRITE one */
	assert_int_equal(atomic_load(&file(0)->delegated), DELEGATED_WRITE);
	assert_int_equal(try_grant(0, b, false), -EAGAIN);
	assert_int_equal(try_grant(0, b, true), -EAGAIN);
	OK(delegation_return(file(0), a));
	assert_int_equal(atomic_load(&file(0)->delegated), 0);
	assert_int_equal(delegation_return(file(0), a), -ENOENT);
	seq_of(0, b, true);
	OK(delegation_return(file(0), b));
	assert_int_equal(COUNTER(delegations_read), 2);
	assert_int_equal(COUNTER(delegations_write), 2);
	assert_int_equal(COUNTER(delegations_returned), 3);
	assert_int_equal(COUNTER(delegation_recalls), 0);
}

static void only_clients_and_regular_files(void **state)
{
	uint64_t client = reg(), local = local_holder(), seq;

	assert_int_equal(try_grant(0, local, false), -EINVAL);
	assert_int_equal(try_grant(0, 4711, false), -ENOENT);
	assert_int_equal(delegation_grant(world.root, client, false, &seq), -EISDIR);
	seq_of(0, client, false);
	OK(holder_lost(world.fs, client)); /* it holds no layout, so it is gone */
	assert_int_equal(try_grant(1, client, false), -ENOENT);
	assert_int_equal(atomic_load(&file(0)->delegated), 0);
	assert_int_equal(COUNTER(delegations_dropped), 1);
	client = reg();
	grant(1, client, SEG_GRANT_READ, 0, 4096);
	OK(holder_lost(world.fs, client));
	assert_int_equal(try_grant(0, client, false), -EOWNERDEAD);
}

static void open_files_are_against_it(void **state)
{
	uint64_t a = reg();

	local_open(file(0), true, false);
	OK(try_grant(0, a, false));
	assert_int_equal(try_grant(0, a, true), -EAGAIN);
	assert_int_equal(atomic_load(&file(0)->delegated), DELEGATED_READ);
	OK(delegation_return(file(0), a));
	local_open(file(0), true, true);
	local_close(file(0), true, false);
	assert_int_equal(try_grant(0, a, false), -EAGAIN);
	assert_int_equal(try_grant(0, a, true), -EAGAIN);
	assert_int_equal(COUNTER(delegations_refused_open), 3);
	local_close(file(0), true, true);
	OK(try_grant(0, a, true));
	OK(delegation_return(file(0), a));
}

static void operations_under_way_are_against_it(void **state)
{
	uint64_t a = reg();

	local_use_begin(file(0), DELEGATION_OPEN_READ);
	OK(try_grant(0, a, false));
	assert_int_equal(try_grant(0, a, true), -EAGAIN);
	local_use_end(file(0), DELEGATION_OPEN_READ);
	OK(delegation_return(file(0), a));
	for (enum delegation_op op = DELEGATION_OPEN_WRITE; op <= DELEGATION_NAMESPACE; op++) {
		bool changes = op != DELEGATION_READ;

		local_use_begin(file(0), op);
		assert_int_equal(try_grant(0, a, false), changes ? -EAGAIN : 0);
		assert_int_equal(try_grant(0, a, true), -EAGAIN);
		local_use_end(file(0), op);
		if (!changes)
			OK(delegation_return(file(0), a));
	}
	assert_int_equal(COUNTER(delegations_refused_use), 10);
}

static void layouts_of_local_processes_are_against_it(void **state)
{
	uint64_t a = reg(), local = local_holder();

	grant(0, a, SEG_GRANT_RW, 0, 4096); /* of a client: the server knows what it lets it do */
	OK(try_grant(0, a, true));
	OK(delegation_return(file(0), a));
	give_back(0, a, 0, UINT64_MAX);
	grant(0, local, SEG_GRANT_READ, 0, 4096);
	assert_int_equal(try_grant(0, a, true), -EAGAIN);
	OK(try_grant(0, a, false));
	OK(delegation_return(file(0), a));
	grant(0, local, SEG_GRANT_RW, 8192, 12288);
	assert_int_equal(try_grant(0, a, false), -EAGAIN);
	assert_int_equal(COUNTER(delegations_refused_layout), 2);
	give_back(0, local, 0, UINT64_MAX);
	OK(try_grant(0, a, true));
	OK(delegation_return(file(0), a));
}

/* ---- what waits ----------------------------------------------------------------------------- */

static void what_conflicts_waits_until_it_is_returned(void **state)
{
	for (int write = 0; write < 2; write++) {
		for (enum delegation_op op = 1; delegation_op_valid(op); op++) {
			bool reads = op == DELEGATION_OPEN_READ || op == DELEGATION_READ;
			uint64_t a = reg(), seq = seq_of(0, a, write);
			struct layout_event ev;
			struct local l;

			if (reads && !write) {
				assert_int_equal(begin_local(&l, 0, op), 0);
				assert_int_equal(events(sink, EVENT_DELEGATION_RECALL, &ev), 0);
			} else {
				assert_int_equal(begin_local(&l, 0, op), ERR_PARKED);
				assert_int_equal(events(sink, EVENT_DELEGATION_RECALL, &ev), 1);
				assert_int_equal(ev.holder, a);
				assert_int_equal(ev.ino, file(0)->ino);
				assert_int_equal(ev.generation, file(0)->core.generation);
				assert_int_equal(ev.grant_seq, seq);
				assert_int_equal(ev.iomode, write ? IOMODE_RW : IOMODE_READ);
				assert_int_equal(ev.left_ms, RECALL_NS / 1000000);
				forward(RECALL_NS - 1);
				assert_false(runs(&l));
				/* it is being recalled */
				assert_int_equal(try_grant(0, a, write), -EAGAIN);
			}
			OK(delegation_return(file(0), a));
			assert_int_equal(runs(&l), !reads || write);
			assert_int_equal(try_grant(0, a, true), -EAGAIN); /* nobody comes between */
			end_local(&l);
		}
	}
	assert_int_equal(COUNTER(delegation_recalls), 10);
	assert_int_equal(COUNTER(delegation_recalls_open_read), 1);
	assert_int_equal(COUNTER(delegation_recalls_open_write), 2);
	assert_int_equal(COUNTER(delegation_recalls_read), 1);
	assert_int_equal(COUNTER(delegation_recalls_write), 2);
	assert_int_equal(COUNTER(delegation_recalls_setattr), 2);
	assert_int_equal(COUNTER(delegation_recalls_namespace), 2);
	assert_int_equal(COUNTER(delegations_returned), 12);
	assert_int_equal(COUNTER(delegations_revoked), 0);
}

static void all_readers_are_asked_once_and_waited_for(void **state)
{
	uint64_t a = reg(), b = reg();
	struct local first, second;

	seq_of(0, a, false);
	seq_of(0, b, false);
	assert_int_equal(begin_local(&first, 0, DELEGATION_OPEN_WRITE), ERR_PARKED);
	assert_int_equal(begin_local(&second, 0, DELEGATION_SETATTR), ERR_PARKED);
	assert_int_equal(delegation_break(file(0), 0, DELEGATION_WRITE), -EAGAIN);
	assert_int_equal(events(sink, EVENT_DELEGATION_RECALL, NULL), 2);
	OK(delegation_return(file(0), a));
	assert_false(runs(&first) || runs(&second));
	OK(delegation_return(file(0), b));
	assert_true(runs(&first) && runs(&second));
	end_local(&first);
	end_local(&second);
	assert_int_equal(look(a).recalls, 1);
}

static void a_cancelled_wait_does_not_go_on(void **state)
{
	uint64_t a = reg();
	struct local l[3];

	seq_of(0, a, true);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(begin_local(&l[i], 0, DELEGATION_READ), ERR_PARKED);
	assert_true(delegation_cancel(&l[1].wait)); /* in the middle of the list */
	assert_false(delegation_cancel(&l[1].wait));
	OK(delegation_return(file(0), a));
	assert_false(delegation_cancel(&l[0].wait)); /* it is being resumed */
	assert_true(runs(&l[0]));
	assert_false(l[1].went_on);
	assert_true(l[2].went_on);
	for (unsigned i = 0; i < 3; i++)
		end_local(&l[i]);
}

static void the_server_is_told_to_come_again(void **state)
{
	uint64_t a = reg(), b = reg();

	seq_of(0, a, true);
	OK(delegation_break(file(0), a, DELEGATION_WRITE)); /* its own */
	assert_int_equal(events(sink, EVENT_DELEGATION_RECALL, NULL), 0);
	assert_int_equal(delegation_break(file(0), b, DELEGATION_OPEN_READ), -EAGAIN);
	assert_int_equal(events(sink, EVENT_DELEGATION_RECALL, NULL), 1);
	OK(delegation_return(file(0), a));
	OK(delegation_break(file(0), b, DELEGATION_OPEN_READ));
	seq_of(0, a, false);
	OK(delegation_break(file(0), b, DELEGATION_READ));
	assert_int_equal(delegation_break(file(0), b, DELEGATION_NAMESPACE), -EAGAIN);
	/* Nobody waits, and yet it ends in time. */
	forward(RECALL_NS);
	OK(delegation_break(file(0), b, DELEGATION_NAMESPACE));
	assert_int_equal(COUNTER(delegations_revoked), 1);
	assert_int_equal(look(a).state, HOLDER_LIVE);
}

/* ---- ends ----------------------------------------------------------------------------------- */

static void it_is_revoked_at_the_deadline(void **state)
{
	uint64_t a = reg(), seq = seq_of(0, a, false);
	struct layout_event ev;
	struct local l;

	assert_int_equal(begin_local(&l, 0, DELEGATION_NAMESPACE), ERR_PARKED);
	forward(RECALL_NS - 1);
	assert_false(runs(&l));
	assert_int_equal(events(sink, EVENT_DELEGATION_REVOKED, NULL), 0);
	forward(1);
	assert_true(runs(&l));
	end_local(&l);
	assert_int_equal(events(sink, EVENT_DELEGATION_REVOKED, &ev), 1);
	assert_int_equal(ev.holder, a);
	assert_int_equal(ev.grant_seq, seq);
	assert_int_equal(delegation_return(file(0), a), -ENOENT);
	assert_int_equal(look(a).state, HOLDER_LIVE); /* it only lost the promise */
	assert_int_equal(events(layouts_sink(world.fs), EVENT_FENCE_WANTED, NULL), 0);
	seq_of(0, a, true);
	OK(delegation_return(file(0), a));
}

static void each_has_its_own_deadline(void **state)
{
	uint64_t a = reg();
	struct local l[FILES];

	for (unsigned i = 0; i < FILES; i++) {
		seq_of(i, a, true);
		assert_int_equal(begin_local(&l[i], i, DELEGATION_SETATTR), ERR_PARKED);
		forward(SECOND);
	}
	OK(delegation_return(file(1), a));
	for (unsigned i = 0; i < FILES; i++) {
		forward(i ? SECOND : RECALL_NS - FILES * SECOND);
		for (unsigned j = 0; j < FILES; j++)
			assert_int_equal(runs(&l[j]), j <= i || j == 1);
	}
	for (unsigned i = 0; i < FILES; i++)
		end_local(&l[i]);
	assert_int_equal(COUNTER(delegations_revoked), FILES - 1);
}

static void a_change_of_clocks_moves_the_deadline(void **state)
{
	struct layouts *ls = world.fs->layouts;
	struct delegation_look d;
	uint64_t a, seq = 0;
	struct local l;

	atomic_store(&ls->virtual_ns, 0);
	a = reg();
	seq_of(0, a, true);
	assert_int_equal(begin_local(&l, 0, DELEGATION_WRITE), ERR_PARKED);
	layouts_settle(world.fs); /* nobody is at work with the time of before */
	layouts_set_clock(world.fs, SECOND);
	assert_int_equal(delegation_list(world.fs, a, &seq, &d, 1), 1);
	assert_in_range(d.left_ms, RECALL_NS / 1000000 - 900, RECALL_NS / 1000000);
	forward(RECALL_NS - SECOND);
	assert_false(runs(&l));
	forward(SECOND);
	assert_true(runs(&l));
	end_local(&l);
}

static void a_lost_holder_is_not_asked(void **state)
{
	uint64_t a = reg();
	struct local l, later;

	grant(0, a, SEG_GRANT_READ, 0, 4096); /* so that it is lost, and not gone */
	seq_of(0, a, false);
	seq_of(1, a, true);
	assert_int_equal(begin_local(&l, 0, DELEGATION_OPEN_WRITE), ERR_PARKED);
	OK(holder_lost(world.fs, a));
	layouts_settle(world.fs);
	assert_true(runs(&l)); /* what was recalled is due */
	end_local(&l);
	/* nobody wants this one yet */
	assert_int_equal(atomic_load(&file(1)->delegated), DELEGATED_WRITE);
	assert_int_equal(begin_local(&later, 1, DELEGATION_OPEN_READ), 0);
	end_local(&later);
	assert_int_equal(atomic_load(&file(1)->delegated), 0);
	assert_int_equal(COUNTER(delegations_revoked), 2);
	assert_int_equal(COUNTER(delegation_recalls), 1);
}

static void who_is_gone_has_none(void **state)
{
	uint64_t a = reg(), b = reg();
	struct local l;

	seq_of(0, a, true);
	seq_of(1, b, true);
	assert_int_equal(begin_local(&l, 0, DELEGATION_READ), ERR_PARKED);
	OK(holder_gone(world.fs, a));
	assert_true(runs(&l));
	end_local(&l);
	grant(1, b, SEG_GRANT_READ, 0, 4096);
	OK(holder_lost(world.fs, b));
	OK(holder_fenced(world.fs, b));
	assert_int_equal(atomic_load(&file(1)->delegated), 0);
	assert_int_equal(COUNTER(delegations_dropped), 2);
	assert_int_equal(events(sink, EVENT_DELEGATION_REVOKED, NULL), 0);
	layouts_settle(world.fs);
}

static void the_end_of_the_mount_ends_all(void **state)
{
	uint64_t a = reg();
	struct local l;

	seq_of(0, a, true);
	seq_of(1, a, false);
	assert_int_equal(begin_local(&l, 0, DELEGATION_READ), ERR_PARKED);
	layouts_stop(world.fs);
	assert_true(runs(&l));
	end_local(&l);
	assert_int_equal(atomic_load(&file(1)->delegated), 0);
	assert_int_equal(try_grant(0, a, false), -EAGAIN);
}

/* ---- the inode ------------------------------------------------------------------------------ */

static void it_keeps_an_unlinked_file(void **state)
{
	uint64_t a = reg();
	inum_t ino = file(0)->ino;
	struct inode *in;

	seq_of(0, a, false);
	inode_lookup_add(world.fs, ino, 1);
	OK(namei_unlink(world.root, name_of(0), strlen(name_of(0)), NULL));
	inode_put(world.file[0]);
	inode_lookup_forget(world.fs, ino, 1);
	reaper_drain(world.fs);
	fs_rdlock(world.fs);
	OK(inode_get(world.fs, ino, &in));
	fs_unlock(world.fs);
	OK(delegation_return(in, a));
	inode_put(in);
	reaper_drain(world.fs);
	fs_rdlock(world.fs);
	assert_int_equal(inode_get(world.fs, ino, &in), -ENOENT);
	fs_unlock(world.fs);
	OK(namei_create(world.root, name_of(0), strlen(name_of(0)), S_IFREG | 0600, 0,
			&(struct cred){ 0 }, &world.file[0]));
}

static void looks_at_attributes_are_told_once_a_second(void **state)
{
	uint64_t a = reg(), seq;
	struct layout_event ev;

	delegation_looked(file(0));
	seq_of(0, a, false);
	delegation_looked(file(0));
	assert_int_equal(events(sink, EVENT_DELEGATION_ATTRS, NULL), 0);
	seq = seq_of(0, a, true);
	assert_true(delegation_of_number(world.fs, file(0)->ino));
	assert_false(delegation_of_number(world.fs, file(1)->ino));
	for (unsigned i = 0; i < 100; i++)
		delegation_looked(file(0));
	assert_int_equal(events(sink, EVENT_DELEGATION_ATTRS, &ev), 1);
	assert_int_equal(ev.holder, a);
	assert_int_equal(ev.ino, file(0)->ino);
	assert_int_equal(ev.grant_seq, seq);
	forward(SECOND - 1);
	delegation_looked(file(0));
	assert_int_equal(events(sink, EVENT_DELEGATION_ATTRS, NULL), 0);
	forward(1);
	delegation_looked(file(0));
	delegation_looked(file(0));
	assert_int_equal(events(sink, EVENT_DELEGATION_ATTRS, NULL), 1);
	assert_int_equal(COUNTER(delegation_attrs), 2);
	OK(delegation_return(file(0), a));
	assert_false(delegation_of_number(world.fs, file(0)->ino));
}

static void looks_leave_room_for_recalls(void **state)
{
	uint64_t a = reg();
	unsigned told = 0;

	seq_of(0, a, true);
	for (unsigned i = 0; i < 2 * EVENT_RING; i++) {
		delegation_looked(file(0));
		layouts_set_clock(world.fs, layouts_now(world.fs) + SECOND);
	}
	assert_int_equal(delegation_break(file(0), 0, DELEGATION_READ), -EAGAIN);
	assert_int_equal(COUNTER(events_lost), 0);
	for (struct layout_event ev; event_next(world.fs, sink, &ev);) {
		told += ev.type == EVENT_DELEGATION_ATTRS;
		if (ev.type == EVENT_DELEGATION_RECALL)
			assert_int_equal(ev.seq, told + 1);
	}
	assert_int_equal(told, EVENT_RING / 2 + 1);
	delegation_looked(file(0));
	assert_int_equal(events(sink, EVENT_DELEGATION_ATTRS, NULL), 1);
}

static void they_are_listed_by_number(void **state)
{
	struct delegation_look d[FILES];
	uint64_t a = reg(), b = reg(), seq = 0, first = seq_of(0, a, false), second;

	seq_of(1, b, false);
	second = seq_of(1, a, false);
	assert_int_equal(delegation_break(file(1), b, DELEGATION_WRITE), -EAGAIN);
	assert_int_equal(delegation_list(world.fs, a, &seq, d, 1), 1);
	assert_int_equal(seq, first);
	assert_int_equal(d[0].ino, file(0)->ino);
	assert_false(d[0].recalled || d[0].write);
	assert_int_equal(delegation_list(world.fs, a, &seq, d, FILES), 1);
	assert_int_equal(d[0].seq, second);
	assert_true(d[0].recalled);
	assert_int_equal(d[0].left_ms, RECALL_NS / 1000000);
	assert_int_equal(delegation_list(world.fs, a, &seq, d, FILES), 0);
	seq = 0;
	first = seq_of(0, a, true); /* the newest from now on */
	assert_int_equal(delegation_list(world.fs, a, &seq, d, FILES), 2);
	assert_int_equal(d[1].seq, first);
	assert_int_equal(delegation_list(world.fs, 4711, &seq, d, FILES), 0);
}

/* ---- names ---------------------------------------------------------------------------------- */

static void no_name_of_it_changes(void **state)
{
	const char *a_name = name_of(0), *b_name = name_of(1);
	uint64_t a = reg();
	struct inode *victim = NULL, *busy = NULL;

	seq_of(1, a, false);
	assert_int_equal(namei_unlink_undelegated(world.root, b_name, strlen(b_name), &victim,
						  &busy), -ERR_DELEGATED);
	assert_ptr_equal(busy, file(1));
	assert_null(victim);
	inode_put(busy);
	for (unsigned flags = 0; flags <= RENAME_F_EXCHANGE; flags += RENAME_F_EXCHANGE) {
		for (int onto = 0; onto < 2; onto++) {
			const char *from = onto ? a_name : b_name, *to = onto ? b_name : a_name;
			int rc;

			busy = NULL;
			rc = namei_rename_undelegated(world.root, from, strlen(from), world.root,
						      to, strlen(to), flags, &victim, &busy);
			assert_int_equal(rc, -ERR_DELEGATED);
			assert_ptr_equal(busy, file(1));
			inode_put(busy);
		}
	}
	/* the server */
	OK(namei_rename(world.root, b_name, strlen(b_name), world.root, "other", 5, 0, NULL));
	OK(delegation_return(file(1), a));
	OK(namei_rename_undelegated(world.root, "other", 5, world.root, b_name, strlen(b_name), 0,
				    &victim, &busy));
	assert_null(victim);
	OK(namei_unlink_undelegated(world.root, b_name, strlen(b_name), &victim, &busy));
	assert_ptr_equal(victim, file(1));
	inode_put(victim);
	inode_put(world.file[1]);
	OK(namei_create(world.root, b_name, strlen(b_name), S_IFREG | 0600, 0, &(struct cred){ 0 },
			&world.file[1]));
}

/* ---- all at once ---------------------------------------------------------------------------- */

#define USERS 3u
#define WAITS 100u   /* of all users: enough was seen */

struct user {
	pthread_t thread;
	unsigned index;
};

static _Atomic bool server_stops;
static _Atomic uint64_t waited;

/* Opens a file for reading or writing as the bridge does, and closes it. */
static void open_once(struct ioctx *ctx, struct inode *in, bool writes)
{
	enum delegation_op op = writes ? DELEGATION_OPEN_WRITE : DELEGATION_OPEN_READ;
	struct local l = { .op = { .resume = resumed, .ctx = ctx }, .in = in, .kind = op };

	l.wait.op = &l.op;
	local_use_begin(in, op);
	if (delegation_any(in) && delegation_wait(in, op, &l.wait) == ERR_PARKED) {
		atomic_fetch_add(&waited, 1);
		while (!l.went_on)
			assert_true(ioctx_run(ctx, true) >= 0);
	}
	local_open(in, !writes, writes);
	local_use_end(in, op);
	for (unsigned i = 0; i < 20; i++) {
		pthread_mutex_lock(&in->fs->layouts->mutex);
		for (struct delegation *d = in->delegations; d; d = d->next_of_inode)
			assert_false(d->write || writes);
		pthread_mutex_unlock(&in->fs->layouts->mutex);
	}
	local_close(in, !writes, writes);
}

static void *user_main(void *arg)
{
	struct user *u = arg;
	struct ioctx *ctx;

	assert_int_equal(ioctx_create(8, &ctx), 0);
	for (unsigned i = 0; atomic_load(&waited) < WAITS; i++) /* soon, or the test's time is over */
		open_once(ctx, file((u->index + i) % FILES), (i * 7 + u->index) % 3 == 0);
	ioctx_destroy(ctx);
	return NULL;
}

/* Grants what it can, and answers every recall. */
static void *server_main(void *arg)
{
	const uint64_t *clients = arg;
	struct layout_event ev;
	uint64_t seq;

	for (unsigned i = 0; !atomic_load(&server_stops); i++) {
		int rc = delegation_grant(file(i % FILES), clients[i % 2], i % 5 == 0, &seq);

		assert_true(!rc || rc == -EAGAIN);
		while (event_next(world.fs, sink, &ev))
			if (ev.type == EVENT_DELEGATION_RECALL)
				for (unsigned f = 0; f < FILES; f++)
					if (file(f)->ino == ev.ino)
						delegation_return(file(f), ev.holder);
		if (i % 64 == 63)
			for (unsigned f = 0; f < FILES; f++)
				delegation_return(file(f), clients[i / 64 % 2]);
	}
	return NULL;
}

static void an_open_file_is_never_delegated(void **state)
{
	uint64_t clients[2] = { reg(), reg() };
	struct user users[USERS];
	pthread_t server;

	atomic_store(&server_stops, false);
	atomic_store(&waited, 0);
	OK(pthread_create(&server, NULL, server_main, clients));
	for (unsigned i = 0; i < USERS; i++) {
		users[i] = (struct user){ .index = i };
		OK(pthread_create(&users[i].thread, NULL, user_main, &users[i]));
	}
	for (unsigned i = 0; i < USERS; i++)
		OK(pthread_join(users[i].thread, NULL));
	atomic_store(&server_stops, true);
	OK(pthread_join(server, NULL));
	assert_in_range(atomic_load(&waited), WAITS, WAITS + USERS);
	assert_true(COUNTER(delegations_read) > 0 && COUNTER(delegations_write) > 0);
	assert_int_equal(COUNTER(delegations_revoked), 0); /* the clock stands still */
	for (unsigned f = 0; f < FILES; f++) {
		assert_int_equal(atomic_load(&file(f)->local_readers), 0);
		assert_int_equal(atomic_load(&file(f)->local_writers), 0);
		assert_int_equal(atomic_load(&file(f)->local_looks), 0);
		assert_int_equal(atomic_load(&file(f)->local_changes), 0);
		for (unsigned i = 0; i < 2; i++)
			delegation_return(file(f), clients[i]);
		assert_int_equal(atomic_load(&file(f)->delegated), 0);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(readers_share_and_a_writer_does_not),
		T(only_clients_and_regular_files),
		T(open_files_are_against_it),
		T(operations_under_way_are_against_it),
		T(layouts_of_local_processes_are_against_it),
		T(what_conflicts_waits_until_it_is_returned),
		T(all_readers_are_asked_once_and_waited_for),
		T(a_cancelled_wait_does_not_go_on),
		T(the_server_is_told_to_come_again),
		T(it_is_revoked_at_the_deadline),
		T(each_has_its_own_deadline),
		T(a_change_of_clocks_moves_the_deadline),
		T(a_lost_holder_is_not_asked),
		T(who_is_gone_has_none),
		T(the_end_of_the_mount_ends_all),
		T(it_keeps_an_unlinked_file),
		T(looks_at_attributes_are_told_once_a_second),
		T(looks_leave_room_for_recalls),
		T(they_are_listed_by_number),
		T(no_name_of_it_changes),
		T(an_open_file_is_never_delegated),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
