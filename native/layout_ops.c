/* SPDX-License-Identifier: MIT
 *
 * layout_ops.c - what LAYOUT_GET, LAYOUT_COMMIT and LAYOUT_RETURN have in common.
 */
#include "layout_ops.h"

#include <time.h>

uint64_t layout_ticks(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
