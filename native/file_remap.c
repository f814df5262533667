/* SPDX-License-Identifier: MIT
 *
 * file_remap.c - operations that move blocks, one transaction after the other (file_remap.h).
 */
#include "file_remap.h"

int note_moved(struct trans *t, struct inode *in, bool left)
{
	int rc = trans_save(t, &in->remapping, sizeof(in->remapping));

	if (rc)
		return rc;
	in->remapping = left;
	in->moved_xid = jrn_running(in->fs);
	return 0;
}

static enum step remap_over(struct file_run *r)
{
	return run_end(r, r->err);
}

/* Both inodes are in the same groups. */
static enum step remap_moved(struct file_run *r)
{
	if (r->fop->flags & FILE_F_DSYNC)
		return run_durable(r, r->fop->in, remap_over);
	r->step = remap_over;
	return STEP_NEXT;
}

static int remap_trans(struct file_run *r, union remap_state *state)
{
	struct inode *in = r->fop->in, *dst = r->fop->dst;
	struct trans t;
	int rc = trans_begin(r->fs, &t, REMAP_TRANS_BLOCKS);

	if (rc)
		return rc;
	t.alloc_flags |= ALLOC_USE_RESERVE;
	rc = trans_join_inode(&t, in);
	if (!rc && dst)
		rc = trans_join_inode(&t, dst);
	if (!rc && !state->intent)
		r->mv.kind->first(r);
	if (!rc)
		rc = r->mv.kind->some(r, &t, state);
	if (rc)
		return run_trans_fail(r, &t, rc);
	trans_commit(&t);
	return 0;
}

static enum step remap_step(struct file_run *r)
{
	union remap_state state = r->mv.state;
	int rc = remap_trans(r, &state);
	enum step how;

	if (rc) {
		if (run_retry(r, &rc, &how))
			return how;
		/* The intent is left: the next mount finishes it, whatever is written until
		 * then. */
		if (r->mv.state.intent)
			fs_shutdown_writes(r->fs, rc, "inode %llu: %s",
					   (unsigned long long)r->fop->in->ino,
					   r->mv.kind->unfinished);
		return run_end(r, rc);
	}
	r->mv.state = state;
	r->space_tries = r->reaper_tries = 0;
	return r->mv.kind->done(r, &state) ? remap_moved(r) : run_yield(r, remap_step);
}

enum step remap_begin(struct file_run *r, const struct remap_kind *kind, union remap_state state)
{
	r->mv = (struct remap_run){ .kind = kind, .state = state };
	r->step = remap_step;
	return STEP_NEXT;
}
