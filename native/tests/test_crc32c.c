/* SPDX-License-Identifier: MIT
 *
 * test_crc32c.c - CRC-32C against RFC 3720 B.4, SipHash-2-4 against its authors' vectors.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "crc32c.h"

static void rfc_vectors(void **state)
{
	static const uint8_t read_pdu[48] = {
		0x01, 0xc0, [16] = 0x14, [22] = 0x04, [27] = 0x14, [31] = 0x18, [32] = 0x28, [40] = 0x02,
	};
	uint8_t buf[32];

	assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283);
	memset(buf, 0, sizeof(buf));
	assert_int_equal(crc32c(0, buf, sizeof(buf)), 0x8a9136aa);
	memset(buf, 0xff, sizeof(buf));
	assert_int_equal(crc32c(0, buf, sizeof(buf)), 0x62a8ab43);
	for (unsigned i = 0; i < 32; i++)
		buf[i] = (uint8_t)i;
	assert_int_equal(crc32c(0, buf, sizeof(buf)), 0x46dd794e);
	assert_int_equal(crc32c_portable(0, buf, sizeof(buf)), 0x46dd794e);
	for (unsigned i = 0; i < 32; i++)
		buf[i] = (uint8_t)(31 - i);
	assert_int_equal(crc32c(0, buf, sizeof(buf)), 0x113fdb5c);
	assert_int_equal(crc32c(0, read_pdu, sizeof(read_pdu)), 0xd9963a56);
	assert_int_equal(crc32c(0, buf, 0), 0);
}

static uint8_t *noise(size_t len)
{
	uint8_t *buf = malloc(len);
	uint64_t x = 88172645463325252ull;

	assert_non_null(buf);
	for (size_t i = 0; i < len; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		buf[i] = (uint8_t)x;
	}
	return buf;
}

/* Every length around the sizes at which the hardware path changes its way of working, at every alignment. */
static void hardware_equals_portable(void **state)
{
	size_t max = 3 * 4096;
	uint8_t *buf = noise(max + 8);

	for (size_t len = 0; len <= max; len += len < 800 || (len > 4060 && len < 4900) ? 1 : 97)
		for (unsigned align = 0; align < 8; align += 3)
			assert_int_equal(crc32c(7, buf + align, len),
					 crc32c_portable(7, buf + align, len));
	free(buf);
}

/* A block's checksum is taken in pieces around its checksum field. */
static void pieces_equal_whole(void **state)
{
	uint8_t *buf = noise(4096);
	uint32_t whole = crc32c(0, buf, 4096);

	for (size_t cut = 0; cut <= 4096; cut += 13)
		assert_int_equal(crc32c(crc32c(0, buf, cut), buf + cut, 4096 - cut), whole);
	free(buf);
}

/* Key 00..0f, message 00..n-1: n is the index. */
static const uint64_t sip_vectors[64] = {
	0x726fdb47dd0e0e31ull, 0x74f839c593dc67fdull, 0x0d6c8009d9a94f5aull, 0x85676696d7fb7e2dull,
	0xcf2794e0277187b7ull, 0x18765564cd99a68dull, 0xcbc9466e58fee3ceull, 0xab0200f58b01d137ull,
	0x93f5f5799a932462ull, 0x9e0082df0ba9e4b0ull, 0x7a5dbbc594ddb9f3ull, 0xf4b32f46226bada7ull,
	0x751e8fbc860ee5fbull, 0x14ea5627c0843d90ull, 0xf723ca908e7af2eeull, 0xa129ca6149be45e5ull,
	0x3f2acc7f57c29bdbull, 0x699ae9f52cbe4794ull, 0x4bc1b3f0968dd39cull, 0xbb6dc91da77961bdull,
	0xbed65cf21aa2ee98ull, 0xd0f2cbb02e3b67c7ull, 0x93536795e3a33e88ull, 0xa80c038ccd5ccec8ull,
	0xb8ad50c6f649af94ull, 0xbce192de8a85b8eaull, 0x17d835b85bbb15f3ull, 0x2f2e6163076bcfadull,
	0xde4daaaca71dc9a5ull, 0xa6a2506687956571ull, 0xad87a3535c49ef28ull, 0x32d892fad841c342ull,
	0x7127512f72f27cceull, 0xa7f32346f95978e3ull, 0x12e0b01abb051238ull, 0x15e034d40fa197aeull,
	0x314dffbe0815a3b4ull, 0x027990f029623981ull, 0xcadcd4e59ef40c4dull, 0x9abfd8766a33735cull,
	0x0e3ea96b5304a7d0ull, 0xad0c42d6fc585992ull, 0x187306c89bc215a9ull, 0xd4a60abcf3792b95ull,
	0xf935451de4f21df2ull, 0xa9538f0419755787ull, 0xdb9acddff56ca510ull, 0xd06c98cd5c0975ebull,
	0xe612a3cb9ecba951ull, 0xc766e62cfcadaf96ull, 0xee64435a9752fe72ull, 0xa192d576b245165aull,
	0x0a8787bf8ecb74b2ull, 0x81b3e73d20b49b6full, 0x7fa8220ba3b2eceaull, 0x245731c13ca42499ull,
	0xb78dbfaf3a8d83bdull, 0xea1ad565322a1a0bull, 0x60e61c23a3795013ull, 0x6606d7e446282b93ull,
	0x6ca4ecb15c5f91e1ull, 0x9f626da15c9625f3ull, 0xe51b38608ef25f57ull, 0x958a324ceb064572ull,
};

static void siphash_vectors(void **state)
{
	const uint64_t key[2] = {0x0706050403020100ull, 0x0f0e0d0c0b0a0908ull};
	uint8_t buf[65];

	for (unsigned i = 0; i < 64; i++)
		buf[i + 1] = (uint8_t)i;
	for (unsigned n = 0; n < 64; n++)
		assert_true(siphash24(key, buf + 1, n) == sip_vectors[n]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rfc_vectors),
		cmocka_unit_test(hardware_equals_portable),
		cmocka_unit_test(pieces_equal_whole),
		cmocka_unit_test(siphash_vectors),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
