/* SPDX-License-Identifier: MIT
 *
 * crc32c.c - CRC-32C by table or by the SSE4.2 instruction, and SipHash-2-4.
 *
 * Bit order is reflected: bit 31 of a register holds the coefficient of x^0. "raw" is the register
 * without the inversions at start and end; it is linear, which allows splitting a buffer:
 * raw(c, A || B) = shift(raw(c, A), len B) ^ raw(0, B), where shift(c, n) appends n zero bytes.
 *
 * The instruction takes 3 cycles but one can start every cycle, so three parts of a buffer run side by side
 * and are joined by shift(), which is four table lookups for a length known in advance.
 */
#include "crc32c.h"

#include <endian.h>
#include <string.h>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HAVE_SSE42 1
#endif

#define POLY 0x82f63b78u

/* slice[n][b]: byte b followed by n zero bytes. */
static uint32_t slice[8][256];

static inline uint64_t load64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static void build_slices(void)
{
	for (unsigned b = 0; b < 256; b++) {
		uint32_t c = b;

		for (unsigned bit = 0; bit < 8; bit++)
			c = (c >> 1) ^ (c & 1 ? POLY : 0);
		slice[0][b] = c;
	}
	for (unsigned n = 1; n < 8; n++)
		for (unsigned b = 0; b < 256; b++)
			slice[n][b] = (slice[n - 1][b] >> 8) ^ slice[0][slice[n - 1][b] & 0xff];
}

static uint32_t raw_table(uint32_t c, const uint8_t *p, size_t len)
{
	for (; len >= 8; len -= 8, p += 8) {
		uint64_t v = le64toh(load64(p)) ^ c;

		c = 0;
		for (unsigned i = 0; i < 8; i++)
			c ^= slice[7 - i][(v >> (8 * i)) & 0xff];
	}
	while (len--)
		c = (c >> 8) ^ slice[0][(c ^ *p++) & 0xff];
	return c;
}

uint32_t crc32c_portable(uint32_t crc, const void *buf, size_t len)
{
	return ~raw_table(~crc, buf, len);
}

#ifdef HAVE_SSE42

/* Three long parts and two words make a block; short parts serve what is left of other sizes. */
#define LONG_PART 1360u
#define SHORT_PART 128u

struct shift_table {
	uint32_t t[4][256];
};

static struct shift_table shift_long, shift_short;
static bool have_hardware;

static void build_shift(struct shift_table *s, size_t zeros)
{
	static const uint8_t zero[LONG_PART];

	for (unsigned i = 0; i < 4; i++)
		for (unsigned b = 0; b < 256; b++)
			s->t[i][b] = raw_table((uint32_t)b << (8 * i), zero, zeros);
}

static inline uint32_t shift(const struct shift_table *s, uint32_t c)
{
	return s->t[0][c & 0xff] ^ s->t[1][(c >> 8) & 0xff] ^ s->t[2][(c >> 16) & 0xff] ^
	       s->t[3][c >> 24];
}

__attribute__((target("sse4.2"))) static inline uint32_t
raw_three(uint32_t c, const uint8_t *p, size_t part, const struct shift_table *s)
{
	uint64_t x = c, y = 0, z = 0;

	for (size_t i = 0; i < part; i += 8) {
		x = _mm_crc32_u64(x, load64(p + i));
		y = _mm_crc32_u64(y, load64(p + part + i));
		z = _mm_crc32_u64(z, load64(p + 2 * part + i));
	}
	return shift(s, shift(s, (uint32_t)x) ^ (uint32_t)y) ^ (uint32_t)z;
}

__attribute__((target("sse4.2"))) static uint32_t raw_sse42(uint32_t c, const uint8_t *p, size_t len)
{
	uint64_t x;

	for (; len >= 3 * LONG_PART; len -= 3 * LONG_PART, p += 3 * LONG_PART)
		c = raw_three(c, p, LONG_PART, &shift_long);
	for (; len >= 3 * SHORT_PART; len -= 3 * SHORT_PART, p += 3 * SHORT_PART)
		c = raw_three(c, p, SHORT_PART, &shift_short);
	x = c;
	for (; len >= 8; len -= 8, p += 8)
		x = _mm_crc32_u64(x, load64(p));
	for (; len; len--, p++)
		x = _mm_crc32_u8((uint32_t)x, *p);
	return (uint32_t)x;
}

#endif

__attribute__((constructor)) static void crc32c_init(void)
{
	build_slices();
#ifdef HAVE_SSE42
	__builtin_cpu_init();
	have_hardware = __builtin_cpu_supports("sse4.2");
	build_shift(&shift_long, LONG_PART);
	build_shift(&shift_short, SHORT_PART);
#endif
}

uint32_t crc32c(uint32_t crc, const void *buf, size_t len)
{
#ifdef HAVE_SSE42
	if (likely(have_hardware))
		return ~raw_sse42(~crc, buf, len);
#endif
	return crc32c_portable(crc, buf, len);
}

/* SipHash: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012, section 2. */

static inline uint64_t rotl(uint64_t x, unsigned n)
{
	return (x << n) | (x >> (64 - n));
}

static inline void sip_rounds(uint64_t v[4], unsigned n)
{
	while (n--) {
		v[0] += v[1];
		v[2] += v[3];
		v[1] = rotl(v[1], 13) ^ v[0];
		v[3] = rotl(v[3], 16) ^ v[2];
		v[0] = rotl(v[0], 32);
		v[2] += v[1];
		v[0] += v[3];
		v[1] = rotl(v[1], 17) ^ v[2];
		v[3] = rotl(v[3], 21) ^ v[0];
		v[2] = rotl(v[2], 32);
	}
}

uint64_t siphash24(const uint64_t key[2], const void *buf, size_t len)
{
	const uint8_t *p = buf;
	uint64_t last = (uint64_t)len << 56;
	uint64_t v[4] = {
		key[0] ^ 0x736f6d6570736575ull,
		key[1] ^ 0x646f72616e646f6dull,
		key[0] ^ 0x6c7967656e657261ull,
		key[1] ^ 0x7465646279746573ull,
	};

	for (size_t words = len / 8; words; words--, p += 8) {
		uint64_t m = le64toh(load64(p));

		v[3] ^= m;
		sip_rounds(v, 2);
		v[0] ^= m;
	}
	for (unsigned i = 0; i < len % 8; i++)
		last |= (uint64_t)p[i] << (8 * i);
	v[3] ^= last;
	sip_rounds(v, 2);
	v[0] ^= last;
	v[2] ^= 0xff;
	sip_rounds(v, 4);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}
