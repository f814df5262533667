/* SPDX-License-Identifier: MIT
 *
 * device_sim.c - the simulated device.
 *
 * Definitions:
 * current   what a reader sees: every write that arrived.
 * durable   what is certain to survive a power cut.
 * held      a write that arrived and is not durable; in the list in order of arrival. A held write keeps its own
 *           content (shared pages), because a newer write to the same place does not take it out of the
 *           game: the cache may have written the older one only.
 * completed its completion was delivered; done_seq numbers the completions from 1, 0 is not completed.
 *
 * Invariants, under sim->lock:
 * 1. current = durable with all held writes applied in order.
 * 2. A flush makes durable exactly the held writes with 0 < done_seq <= the count at the flush's submission.
 * 3. When a sector becomes durable, older held writes lose that sector: the medium cannot go back.
 * 4. A page that a held write refers to never changes (sim_tree_own() copies shared pages).
 * 5. A held write in flight is named by the cookie of its dev_io and stays allocated until it completes.
 */
#include "device_sim.h"

#include <pthread.h>
#include <string.h>

#include "ioctx.h"
#include "sim_pages.h"

#define SECTORS_PER_BLOCK (BLOCK_SIZE / SECTOR_SIZE)
#define ALL_SECTORS 0xffu
#define FAIL_RULES 16u
/* dev_io.cookie of what reached the sim and has no held write: reads and failures. Flushes: + done_seq. */
#define COOKIE_BASE 1u

_Static_assert(SECTORS_PER_BLOCK == 8, "a byte of sector bits for each block");

struct held_block {
	struct sim_page *page;
	uint8_t sectors; /* bit n: sector n of the block belongs to this write, and still counts */
};

struct held {
	struct held *prev, *next;
	uint64_t done_seq;
	uint64_t flush_upto; /* FUA that flushes: writes done by then become durable with it */
	bool in_flight, fua;
	uint64_t first; /* block */
	size_t count;
	struct held_block blocks[];
};

struct fail_rule {
	enum io_kind kind;
	uint64_t offset, len;
	unsigned count;
};

struct sim {
	pthread_mutex_t lock;
	uint64_t size;
	uint32_t align;
	uint64_t rng; /* of the completion order */
	struct sim_tree durable, current;
	struct held *oldest, *newest;
	uint64_t done_seq; /* completed writes so far */
	uint64_t events, crash_at;
	uint64_t drop_flushes;
	struct fail_rule rules[FAIL_RULES];
	bool crashed, fua_flushes, shuffle, open;
	size_t in_flight;
};

struct sim_handle {
	struct device dev;
	struct sim *sim;
};

static struct sim *sim_of(struct device *dev)
{
	return container_of(dev, struct sim_handle, dev)->sim;
}

/* The lock is no part of a sim's value. */
static void lock_sim(const struct sim *sim)
{
	pthread_mutex_lock(&((struct sim *)sim)->lock);
}

static void unlock_sim(const struct sim *sim)
{
	pthread_mutex_unlock(&((struct sim *)sim)->lock);
}

/* splitmix64 */
static uint64_t random_next(uint64_t *state)
{
	uint64_t x = *state += 0x9e3779b97f4a7c15ull;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t random_below(uint64_t *state, uint64_t n)
{
	return random_next(state) % n;
}

/* ---- held writes ---------------------------------------------------------------------------------- */

static struct held *held_new(struct sim *sim, uint64_t first, size_t count)
{
	struct held *h = calloc(1, sizeof(*h) + count * sizeof(h->blocks[0]));

	xassert(h);
	h->first = first;
	h->count = count;
	h->prev = sim->newest;
	*(sim->newest ? &sim->newest->next : &sim->oldest) = h;
	sim->newest = h;
	return h;
}

static void held_free(struct sim *sim, struct held *h)
{
	*(h->prev ? &h->prev->next : &sim->oldest) = h->next;
	*(h->next ? &h->next->prev : &sim->newest) = h->prev;
	for (size_t i = 0; i < h->count; i++)
		sim_page_put(h->blocks[i].page);
	free(h);
}

static void copy_sectors(uint8_t *to, const uint8_t *from, unsigned sectors)
{
	for (unsigned s = 0; s < SECTORS_PER_BLOCK; s++)
		if (sectors & (1u << s))
			memcpy(to + s * SECTOR_SIZE, from + s * SECTOR_SIZE, SECTOR_SIZE);
}

static void apply_block(struct sim_tree *tree, uint64_t block, struct sim_page *page, unsigned sectors)
{
	if (sectors == ALL_SECTORS)
		sim_tree_set(tree, block, sim_page_get(page));
	else if (sectors)
		copy_sectors(sim_tree_own(tree, block)->data, page->data, sectors);
}

/* Invariant 3. */
static void supersede_older(struct held *h, uint64_t block, unsigned sectors)
{
	for (h = h->prev; h; h = h->prev)
		if (block >= h->first && block - h->first < h->count)
			h->blocks[block - h->first].sectors &= (uint8_t)~sectors;
}

static void make_durable(struct sim *sim, struct held *h)
{
	for (size_t i = 0; i < h->count; i++) {
		struct held_block *b = &h->blocks[i];

		apply_block(&sim->durable, h->first + i, b->page, b->sectors);
		if (h->prev && b->sectors)
			supersede_older(h, h->first + i, b->sectors);
		b->sectors = 0;
	}
}

/* Oldest first, so what stays in the list before a write is in flight only: supersede_older() is short. */
static void flush_held(struct sim *sim, uint64_t done_seq)
{
	for (struct held *h = sim->oldest, *next; h; h = next) {
		next = h->next;
		if (h->done_seq == 0 || h->done_seq > done_seq)
			continue;
		make_durable(sim, h);
		held_free(sim, h);
	}
}

/* offset and len: multiples of SECTOR_SIZE, inside the device. */
static struct held *hold_write(struct sim *sim, uint64_t offset, const uint8_t *buf, size_t len)
{
	uint64_t first = offset / BLOCK_SIZE, end = offset + len;
	struct held *h = held_new(sim, first, (size_t)(block_ceil(end) - first));

	for (size_t i = 0; i < h->count; i++) {
		uint64_t start = MAX(offset, (first + i) * BLOCK_SIZE);
		size_t bytes = (size_t)(MIN(end, (first + i + 1) * BLOCK_SIZE) - start);
		size_t inside = (size_t)(start % BLOCK_SIZE);
		struct held_block *b = &h->blocks[i];

		if (bytes == BLOCK_SIZE) {
			b->page = sim_page_new();
			sim_tree_set(&sim->current, first + i, sim_page_get(b->page));
		} else {
			b->page = sim_page_get(sim_tree_own(&sim->current, first + i));
		}
		/* Nobody has read the page through the other reference yet: we hold the lock. */
		memcpy(b->page->data + inside, buf + (start - offset), bytes);
		b->sectors = (uint8_t)(((1u << (bytes / SECTOR_SIZE)) - 1) << (inside / SECTOR_SIZE));
	}
	return h;
}

static void read_current(const struct sim *sim, uint64_t offset, uint8_t *buf, size_t len)
{
	while (len) {
		uint64_t block = offset / BLOCK_SIZE;
		size_t inside = (size_t)(offset % BLOCK_SIZE), bytes = MIN(len, BLOCK_SIZE - inside);
		const struct sim_page *page = sim_tree_find(&sim->current, block);

		if (page) {
			memcpy(buf, page->data + inside, bytes);
		} else {
			_Alignas(16) uint8_t canary[BLOCK_SIZE];

			sim_page_canary(canary, block);
			memcpy(buf, canary + inside, bytes);
		}
		offset += bytes;
		buf += bytes;
		len -= bytes;
	}
}

/* ---- I/O: begin() at submission, finish() at completion, both under the lock ---------------------------- */

static int power_error(enum io_kind kind)
{
	return kind == IO_READ ? -ERR_DEV_READ : kind == IO_WRITE ? -ERR_DEV_WRITE : -ERR_DEV_FLUSH;
}

static bool told_to_fail(struct sim *sim, enum io_kind kind, uint64_t offset, size_t len)
{
	for (unsigned i = 0; i < FAIL_RULES; i++) {
		struct fail_rule *r = &sim->rules[i];

		if (!r->count || r->kind != kind)
			continue;
		if (kind != IO_FLUSH && !(offset < r->offset ? r->offset - offset < len :
							       offset - r->offset < r->len))
			continue;
		r->count--;
		return true;
	}
	return false;
}

/* *cookie: for finish(). 0 or a negative code. */
static int begin(struct sim *sim, enum io_kind kind, uint64_t offset, void *buf, size_t len, bool fua,
		 uint64_t *cookie)
{
	struct held *h;

	*cookie = COOKIE_BASE;
	if (kind != IO_READ && !sim->crashed) {
		sim->events++;
		if (sim->crash_at && sim->events >= sim->crash_at) {
			sim->crashed = true;
			if (kind == IO_WRITE)
				hold_write(sim, offset, buf, len);
		}
	}
	if (sim->crashed || told_to_fail(sim, kind, offset, len))
		return power_error(kind);
	if (kind == IO_READ) {
		read_current(sim, offset, buf, len);
	} else if (kind == IO_WRITE) {
		h = hold_write(sim, offset, buf, len);
		h->in_flight = true;
		h->fua = fua;
		h->flush_upto = fua && sim->fua_flushes ? sim->done_seq : 0;
		*cookie = (uint64_t)(uintptr_t)h;
	} else {
		*cookie += sim->done_seq;
	}
	return 0;
}

static bool lie_about_flush(struct sim *sim)
{
	if (!sim->drop_flushes)
		return false;
	if (sim->drop_flushes != UINT64_MAX)
		sim->drop_flushes--;
	return true;
}

/* res: what begin() returned. Returns what the caller is told. */
static int finish(struct sim *sim, enum io_kind kind, uint64_t cookie, int res)
{
	struct held *h = (struct held *)(uintptr_t)cookie;

	if (res)
		return res;
	if (kind == IO_WRITE)
		h->in_flight = false;
	if (sim->crashed)
		return power_error(kind);
	if (kind == IO_WRITE) {
		h->done_seq = ++sim->done_seq;
		if (h->fua && !lie_about_flush(sim)) {
			flush_held(sim, h->flush_upto);
			make_durable(sim, h);
			held_free(sim, h);
		}
	} else if (kind == IO_FLUSH && !lie_about_flush(sim)) {
		flush_held(sim, cookie - COOKIE_BASE);
	}
	return 0;
}

static int do_blocking(struct sim *sim, enum io_kind kind, uint64_t offset, void *buf, size_t len, bool fua)
{
	uint64_t cookie;
	int rc;

	lock_sim(sim);
	rc = begin(sim, kind, offset, buf, len, fua, &cookie);
	rc = finish(sim, kind, cookie, rc);
	unlock_sim(sim);
	return rc;
}

static int sim_rw(struct device *dev, enum io_kind kind, uint64_t offset, void *buf, size_t len,
		  unsigned flags)
{
	return do_blocking(sim_of(dev), kind, offset, buf, len, flags & IO_FUA);
}

static int sim_flush(struct device *dev)
{
	return do_blocking(sim_of(dev), IO_FLUSH, 0, NULL, 0, false);
}

static void sim_submit(struct device *dev, struct ioctx *ctx, struct dev_io *io)
{
	struct sim *sim = sim_of(dev);
	size_t place = ioctx_posted(ctx);

	lock_sim(sim);
	io->res = begin(sim, io->kind, io->offset, io->buf, io->len, io->flags & IO_FUA, &io->cookie);
	sim->in_flight++;
	if (sim->shuffle)
		place = (size_t)random_below(&sim->rng, place + 1);
	unlock_sim(sim);
	ioctx_post(ctx, io, place);
}

static void sim_complete(struct device *dev, struct dev_io *io)
{
	struct sim *sim = sim_of(dev);

	if (!io->cookie)
		return; /* refused before it reached us */
	lock_sim(sim);
	io->res = finish(sim, io->kind, io->cookie, io->res);
	sim->in_flight--;
	unlock_sim(sim);
}

static void sim_close(struct device *dev)
{
	struct sim *sim = sim_of(dev);

	lock_sim(sim);
	xassert(sim->in_flight == 0);
	sim->open = false;
	unlock_sim(sim);
	free(container_of(dev, struct sim_handle, dev));
}

static const struct device_ops sim_ops = {
	.name = "simulated",
	.submit = sim_submit,
	.rw = sim_rw,
	.flush = sim_flush,
	.complete = sim_complete,
	.close = sim_close,
};

/* ---- life ----------------------------------------------------------------------------------------- */

static struct sim *sim_alloc(uint64_t size, uint32_t align)
{
	struct sim *sim = calloc(1, sizeof(*sim));

	if (!sim)
		return NULL;
	pthread_mutex_init(&sim->lock, NULL);
	sim->size = size;
	sim->align = align;
	sim_tree_init(&sim->durable, size / BLOCK_SIZE);
	sim_tree_init(&sim->current, size / BLOCK_SIZE);
	return sim;
}

int sim_create(uint64_t size, uint32_t align, uint64_t seed, struct sim **out)
{
	xassert(size > 0 && size % BLOCK_SIZE == 0 && (align == SECTOR_SIZE || align == BLOCK_SIZE));
	*out = sim_alloc(size, align);
	if (!*out)
		return -ENOMEM;
	(*out)->rng = seed;
	return 0;
}

void sim_destroy(struct sim *sim)
{
	xassert(!sim->open);
	while (sim->oldest)
		held_free(sim, sim->oldest);
	sim_tree_clear(&sim->durable);
	sim_tree_clear(&sim->current);
	pthread_mutex_destroy(&sim->lock);
	free(sim);
}

static void clone_held(struct sim *to, const struct held *h)
{
	struct held *copy = held_new(to, h->first, h->count);

	copy->done_seq = h->done_seq;
	copy->fua = h->fua;
	for (size_t i = 0; i < h->count; i++) {
		copy->blocks[i].page = sim_page_get(h->blocks[i].page);
		copy->blocks[i].sectors = h->blocks[i].sectors;
	}
}

int sim_clone(const struct sim *sim, struct sim **out)
{
	struct sim *copy = sim_alloc(sim->size, sim->align);

	if (!copy)
		return -ENOMEM;
	lock_sim(sim);
	copy->rng = sim->rng;
	sim_tree_copy(&copy->durable, &sim->durable);
	sim_tree_copy(&copy->current, &sim->current);
	for (const struct held *h = sim->oldest; h; h = h->next)
		clone_held(copy, h);
	copy->done_seq = sim->done_seq;
	copy->events = sim->events;
	copy->crash_at = sim->crash_at;
	copy->drop_flushes = sim->drop_flushes;
	memcpy(copy->rules, sim->rules, sizeof(copy->rules));
	copy->crashed = sim->crashed;
	copy->shuffle = sim->shuffle;
	copy->fua_flushes = sim->fua_flushes;
	unlock_sim(sim);
	*out = copy;
	return 0;
}

int sim_device(struct sim *sim, struct device **out)
{
	struct sim_handle *handle = calloc(1, sizeof(*handle));
	bool taken;

	if (!handle)
		return -ENOMEM;
	lock_sim(sim);
	taken = sim->open;
	sim->open = true;
	unlock_sim(sim);
	if (taken) {
		free(handle);
		return -ERR_DEV_IN_USE;
	}
	handle->sim = sim;
	handle->dev.ops = &sim_ops;
	handle->dev.size = sim->size;
	handle->dev.align = sim->align;
	handle->dev.volatile_cache = true;
	handle->dev.fua_flushes = sim->fua_flushes;
	/* As for real devices: what was written before may still need a flush. */
	atomic_init(&handle->dev.writes_done, 1);
	snprintf(handle->dev.path, sizeof(handle->dev.path), "simulated device");
	*out = &handle->dev;
	return 0;
}

/* ---- power and faults -------------------------------------------------------------------------------- */

uint64_t sim_events(const struct sim *sim)
{
	uint64_t events;

	lock_sim(sim);
	events = sim->events;
	unlock_sim(sim);
	return events;
}

void sim_crash_at(struct sim *sim, uint64_t n)
{
	lock_sim(sim);
	sim->crash_at = n;
	unlock_sim(sim);
}

bool sim_crashed(const struct sim *sim)
{
	bool crashed;

	lock_sim(sim);
	crashed = sim->crashed;
	unlock_sim(sim);
	return crashed;
}

/* How a power cut leans, in per cent; the rest of the writes is torn. */
static const struct lean {
	unsigned keep, drop;
} leans[] = {{100, 0}, {0, 100}, {90, 5}, {5, 90}, {45, 45}, {45, 45}, {30, 30}, {0, 0}};

/* Torn: any subset of the sectors, or all on one side of a cut. */
static bool sector_survives(uint64_t *rng, unsigned shape, uint64_t sector, uint64_t cut)
{
	if (shape == 0)
		return sector < cut;
	if (shape == 1)
		return sector >= cut;
	return random_next(rng) & 1;
}

static void tear(struct held *h, uint64_t *rng)
{
	unsigned shape = (unsigned)random_below(rng, 4);
	uint64_t cut = random_below(rng, h->count * SECTORS_PER_BLOCK + 1);

	for (size_t i = 0; i < h->count; i++)
		for (unsigned s = 0; s < SECTORS_PER_BLOCK; s++)
			if (!sector_survives(rng, shape, i * SECTORS_PER_BLOCK + s, cut))
				h->blocks[i].sectors &= (uint8_t)~(1u << s);
}

void sim_restart(struct sim *sim, uint64_t seed)
{
	uint64_t rng = seed;
	const struct lean *lean = &leans[random_below(&rng, ARRAY_LEN(leans))];

	lock_sim(sim);
	xassert(!sim->open);
	while (sim->oldest) {
		struct held *h = sim->oldest;
		unsigned fate = (unsigned)random_below(&rng, 100);

		if (fate >= lean->keep + lean->drop)
			tear(h, &rng);
		if (fate < lean->keep || fate >= lean->keep + lean->drop)
			make_durable(sim, h);
		held_free(sim, h);
	}
	sim_tree_copy(&sim->current, &sim->durable);
	sim->crashed = false;
	sim->crash_at = 0;
	unlock_sim(sim);
}

void sim_settle(struct sim *sim)
{
	lock_sim(sim);
	for (struct held *h = sim->oldest, *next; h; h = next) {
		next = h->next;
		make_durable(sim, h);
		if (!h->in_flight)
			held_free(sim, h);
	}
	unlock_sim(sim);
}

void sim_fail(struct sim *sim, enum io_kind kind, uint64_t offset, uint64_t len, unsigned count)
{
	unsigned i = 0;

	lock_sim(sim);
	if (count == 0) {
		memset(sim->rules, 0, sizeof(sim->rules));
	} else {
		while (i < FAIL_RULES && sim->rules[i].count)
			i++;
		xassert(i < FAIL_RULES);
		sim->rules[i] = (struct fail_rule){kind, offset, len, count};
	}
	unlock_sim(sim);
}

void sim_fua_flushes(struct sim *sim, bool fua_flushes)
{
	lock_sim(sim);
	xassert(!sim->open);
	sim->fua_flushes = fua_flushes;
	unlock_sim(sim);
}

void sim_shuffle(struct sim *sim, bool shuffle)
{
	lock_sim(sim);
	sim->shuffle = shuffle;
	unlock_sim(sim);
}

void sim_drop_flushes(struct sim *sim, uint64_t n)
{
	lock_sim(sim);
	sim->drop_flushes = n;
	unlock_sim(sim);
}

/* ---- direct access ------------------------------------------------------------------------------------ */

int sim_peek(struct sim *sim, uint64_t offset, void *buf, size_t len)
{
	int rc = 0;

	if (offset > sim->size || len > sim->size - offset)
		return -EINVAL;
	lock_sim(sim);
	if (sim->crashed)
		rc = -ERR_DEV_READ;
	else
		read_current(sim, offset, buf, len);
	unlock_sim(sim);
	return rc;
}

/* Whole sectors are written; what the caller does not give of the first and last is read first. */
int sim_poke(struct sim *sim, uint64_t offset, const void *buf, size_t len)
{
	uint64_t start = offset & ~(uint64_t)(SECTOR_SIZE - 1), cookie;
	size_t span;
	uint8_t *sectors;
	int rc;

	if (offset > sim->size || len > sim->size - offset)
		return -EINVAL;
	if (len == 0)
		return 0;
	span = ((size_t)(offset - start) + len + SECTOR_SIZE - 1) & ~(size_t)(SECTOR_SIZE - 1);
	sectors = malloc(span);
	if (!sectors)
		return -ENOMEM;
	lock_sim(sim);
	read_current(sim, start, sectors, span);
	memcpy(sectors + (offset - start), buf, len);
	rc = begin(sim, IO_WRITE, start, sectors, span, false, &cookie);
	rc = finish(sim, IO_WRITE, cookie, rc);
	unlock_sim(sim);
	free(sectors);
	return rc;
}

bool sim_shows_canary(const void *buf, size_t len)
{
	const uint64_t *words = buf;

	for (size_t i = 0; i < len / sizeof(*words); i++)
		if (words[i] == SIM_CANARY)
			return true;
	return false;
}
