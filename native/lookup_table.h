/* SPDX-License-Identifier: MIT
 *
 * lookup_table.h - how many lookups of each inode the kernel has not forgotten yet: number ->
 * count, 16 bytes a slot.
 *
 * Open addressing with linear probing; deletion moves followers back, so there are no tombstones.
 * The table grows by half above 7/8 full and shrinks below 1/4, so 10^6 growing entries take 18 to
 * 28 MB. Not locked: the inode table's mutex covers it. No error but -ENOMEM.
 */
#ifndef EXTFS_LOOKUP_TABLE_H
#define EXTFS_LOOKUP_TABLE_H

#include "types.h"

struct lookup_slot { inum_t ino; /* 0: free */ uint64_t count; };
struct lookup_table {
	struct lookup_slot *slots;
	uint64_t capacity, entries;
};

/* The count of ino grows by n; -ENOMEM: nothing changed. */
int lookup_table_add(struct lookup_table *lt, inum_t ino, uint64_t n);
/* The count of ino falls by n, not below 0; an entry that reaches 0 leaves. Returns what is
 * left. */
uint64_t lookup_table_sub(struct lookup_table *lt, inum_t ino, uint64_t n);
uint64_t lookup_table_count(const struct lookup_table *lt, inum_t ino);
void lookup_table_clear(struct lookup_table *lt);

#endif
