/* SPDX-License-Identifier: MIT
 *
 * ioctx_fixed.c - fixed files and buffers.
 *
 * A buffer is IOCTX_FIXED_BYTES from a page on, and has a slot, which is its number in the kernel's table.
 *
 * Invariants:
 * 1. base[slot] is not NULL exactly while the kernel has that buffer, with the pages that were there when it was added.
 * 2. slots[] maps a page's hash to a slot that may be another page's, or free: whoever finds one compares base[slot].
 *    Of two pages with one hash the one that was added first is not found, and so not used.
 */
#include "ioctx_fixed.h"

#include <liburing.h>
#include <stdlib.h>

#define BUFFERS 256u   /* pins 4 MiB */
#define HASH_BITS 12u
#define DEVICE_FILE 0u

struct fixed {
	const struct device *dev;
	bool file_known;
	unsigned n;
	uint8_t *base[BUFFERS];
	uint8_t slots[1u << HASH_BITS];
};

_Static_assert(BUFFERS <= UINT8_MAX + 1u, "slots are bytes");

static uint8_t *slot_of(struct fixed *f, uintptr_t addr)
{
	uint64_t page = addr / IOCTX_FIXED_ALIGN;

	return &f->slots[page * UINT64_C(0x9e3779b97f4a7c15) >> (64 - HASH_BITS)];
}

struct fixed *fixed_create(struct io_uring *ring, const struct device *dev)
{
	struct fixed *f = calloc(1, sizeof(*f));

	if (!f)
		return NULL;
	f->dev = dev;
	if (io_uring_register_files_sparse(ring, 1)) {
		free(f);
		return NULL;
	}
	if (io_uring_register_buffers_sparse(ring, BUFFERS))
		f->n = BUFFERS; /* no room for any */
	return f;
}

void fixed_destroy(struct fixed *f, struct io_uring *ring)
{
	if (!f)
		return;
	/* Here and now: what is left to the end of the ring may last longer than the ring. */
	io_uring_unregister_buffers(ring);
	io_uring_unregister_files(ring);
	free(f);
}

/* ---- memory ---- */

static bool update(struct io_uring *ring, unsigned slot, void *at, size_t len)
{
	struct iovec iov = {at, len};

	return io_uring_register_buffers_update_tag(ring, slot, &iov, NULL, 1) == 1;
}

bool fixed_add(struct fixed *f, struct io_uring *ring, void *at)
{
	unsigned slot = 0;

	xassert((uintptr_t)at % IOCTX_FIXED_ALIGN == 0);
	if (f->n == BUFFERS)
		return false;
	while (f->base[slot])
		slot++;
	if (!update(ring, slot, at, IOCTX_FIXED_BYTES))
		return false;
	f->base[slot] = at;
	f->n++;
	for (size_t page = 0; page < IOCTX_FIXED_BYTES; page += IOCTX_FIXED_ALIGN)
		*slot_of(f, (uintptr_t)at + page) = (uint8_t)slot;
	return true;
}

void fixed_remove(struct fixed *f, struct io_uring *ring, void *at)
{
	for (unsigned slot = 0; slot < BUFFERS; slot++) {
		if (f->base[slot] != at)
			continue;
		/* Taking one out of the table allocates nothing and cannot fail. */
		xassert(update(ring, slot, NULL, 0));
		f->base[slot] = NULL;
		f->n--;
		return;
	}
}

/* ---- use ---- */

static void apply_memory(struct fixed *f, struct io_uring_sqe *sqe)
{
	unsigned slot = *slot_of(f, (uintptr_t)sqe->addr);
	uint8_t *base = f->base[slot];
	uintptr_t at = (uintptr_t)sqe->addr - (uintptr_t)base;

	if (!base || at >= IOCTX_FIXED_BYTES || sqe->len > IOCTX_FIXED_BYTES - at)
		return;
	sqe->opcode = sqe->opcode == IORING_OP_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
	sqe->buf_index = (uint16_t)slot;
}

void fixed_apply(struct fixed *f, struct io_uring *ring, const struct device *dev,
		 struct io_uring_sqe *sqe)
{
	int fd = sqe->fd;

	if (dev != f->dev)
		return;
	if (sqe->opcode == IORING_OP_READ || sqe->opcode == IORING_OP_WRITE)
		apply_memory(f, sqe);
	if (unlikely(!f->file_known))
		f->file_known = io_uring_register_files_update(ring, DEVICE_FILE, &fd, 1) == 1;
	if (likely(f->file_known)) {
		sqe->fd = DEVICE_FILE;
		sqe->flags |= IOSQE_FIXED_FILE;
	}
}
