/* SPDX-License-Identifier: MIT
 *
 * errors.c - the table of private error codes, read in three ways.
 */
#include "errors.h"

#include <string.h>

#include "types.h"

struct error_entry {
	const char *name;
	int no;
	const char *text;
};

static const struct error_entry entries[] = {
#define X(name, no, text) {#name, no, text},
	EXTFS_ERROR_TABLE(X)
#undef X
};

_Static_assert(ARRAY_LEN(entries) == ERR_END - ERR_FIRST_PRIVATE - 1, "one entry for each code");

/* The entry of a private code; NULL for an errno value. Codes that nobody defined are ours to fix. */
static const struct error_entry *entry_of(int code)
{
	xassert(code <= 0 && code > -ERR_END);
	return code < -ERR_FIRST_PRIVATE ? &entries[-code - ERR_FIRST_PRIVATE - 1] : NULL;
}

int err_errno(int code)
{
	const struct error_entry *e = entry_of(code);

	return e ? e->no : -code;
}

const char *err_text(int code)
{
	const struct error_entry *e = entry_of(code);
	const char *text = e ? e->text : strerrordesc_np(-code);

	return text ? text : "unknown error";
}

const char *err_name(int code)
{
	const struct error_entry *e = entry_of(code);
	const char *name = e ? e->name : strerrorname_np(-code);

	return name ? name : "unknown";
}
