/* SPDX-License-Identifier: MIT
 *
 * crc32c.h - CRC-32C (Castagnoli, RFC 3720 appendix B.4), and SipHash-2-4 for names.
 *
 * Pure functions; any thread. They cannot fail.
 */
#ifndef EXTFS_CRC32C_H
#define EXTFS_CRC32C_H

#include "types.h"

/* Continue with crc = an earlier result; start with 0. Hardware where the CPU has it. */
uint32_t crc32c(uint32_t crc, const void *buf, size_t len);
/* The same without hardware: what crc32c() falls back to, and what the tests compare it with. */
uint32_t crc32c_portable(uint32_t crc, const void *buf, size_t len);
/* key: two words of 8 key bytes each, little-endian. */
uint64_t siphash24(const uint64_t key[2], const void *buf, size_t len);

#endif
