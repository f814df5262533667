/* SPDX-License-Identifier: MIT
 *
 * lost_fixture.h - on top of the revoke fixture: what lost holders were told, where it is, and what
 * comes after a power cut.
 */
#ifndef LOST_FIXTURE_H
#define LOST_FIXTURE_H

#include "journal.h"
#include "revoke_fixture.h"
#include "tree_check.h"

#define TOLD_MAX 64u

/* What each holder was told to write. */
static struct memory {
	fsblock_t block[TOLD_MAX];
	unsigned n;
} memories[2];
static inum_t doomed; /* the file they were told about */

static inline void memorize(struct memory *m)
{
	for (unsigned i = 0; i < args.count; i++) {
		if (ext[i].state != INVALID_DATA && ext[i].state != READ_WRITE_DATA)
			continue;
		for (uint64_t at = 0; at < ext[i].length; at += B) {
			assert_true(m->n < TOLD_MAX);
			m->block[m->n++] = (ext[i].device + at) >> BLOCK_SHIFT;
		}
	}
}

static inline bool in_quarantine(fsblock_t block)
{
	struct bt_cursor c;
	bool found = false;

	bt_cursor_init(&c, fs_tree(world.fs, TREE_QUARANTINE));
	if (!bt_seek(&c, KEY(block, UINT64_MAX), BT_LE)) {
		unsigned len;
		const struct quarantine_disk *rec = bt_record(&c, &len);

		found = block < bt_key(&c).hi + get64(rec->length);
	}
	bt_cursor_release(&c);
	return found;
}

/* The inode that maps it; 0: none. */
static inline inum_t owner_of(fsblock_t block)
{
	struct bt_cursor c;
	inum_t owner = 0;

	bt_cursor_init(&c, fs_tree(world.fs, TREE_EXTENT));
	for (int err = bt_seek(&c, KEY_MIN, BT_GE); !err && !owner; err = bt_next(&c)) {
		unsigned len;
		const struct extent_disk *rec = bt_record(&c, &len);

		if (get64(rec->block) <= block && block < get64(rec->block) + get32(rec->length))
			owner = bt_key(&c).hi;
	}
	bt_cursor_release(&c);
	return owner;
}

static inline void check_kept(const struct memory *m, const char *who)
{
	for (unsigned i = 0; i < m->n; i++) {
		inum_t owner;
		bool kept;

		fs_rdlock(world.fs);
		owner = owner_of(m->block[i]);
		kept = owner == doomed || (!owner && in_quarantine(m->block[i]));
		fs_unlock(world.fs);
		if (!kept)
			fail_msg("block %llu, which %s may write, is %s",
				 (unsigned long long)m->block[i], who,
				 owner ? "another file's" : "free");
	}
}

/* What was done is durable, unless the power goes. */
static inline void settle_on_disk(void)
{
	(void)jrn_force_blocking(world.fs, jrn_running(world.fs));
}

static inline void tick(uint64_t ns)
{
	now += ns;
	layouts_set_clock(world.fs, now);
	layouts_settle(world.fs);
}

static inline void unlink_doomed(void)
{
	(void)namei_unlink(world.root, name_of(0), strlen(name_of(0)), NULL);
}

/* Its last user goes: the reaper's turn. */
static inline void put_doomed(void)
{
	inode_put(world.file[0]);
	world.file[0] = NULL;
	layouts_settle(world.fs);
	reaper_drain(world.fs);
}

/* After the cut, or what would have been one. Long after: what nobody speaks for has gone. */
static inline void reopen(uint64_t seed)
{
	sim_crash_at(world.sim, 0);
	put_files();
	inode_put(world.root);
	fs_abandon(world.fs);
	sinks_gone();
	sim_restart(world.sim, seed);
	OK(world_open());
	set_clock();
	for (unsigned i = 0; i < FILES; i++)
		if (namei_lookup(world.root, name_of(i), strlen(name_of(i)), &world.file[i]))
			world.file[i] = NULL;
	tick(3 * RECALL_NS);
	reaper_drain(world.fs);
	layouts_settle(world.fs);
}

/* One that went by itself had nothing left. */
static inline void fence_if_there(uint64_t id)
{
	struct holder_look look;
	uint64_t from = id - 1;

	if (holder_list(world.fs, &from, &look, 1) && look.id == id && look.state == HOLDER_LOST)
		fence(id);
}

#endif
