/* SPDX-License-Identifier: MIT
 *
 * fs_lock.c - the filesystem's lock (fs.h): which one a thread holds, and how it waits.
 *
 * Whoever holds it does so for some microseconds, unless blocks have to be read: less than it takes to sleep and be woken.
 * So a thread looks for a while before it sleeps.
 */
#include <unistd.h>

#include "fs.h"

#define LOOKS 300u

_Thread_local const struct fs *fs_locked;

static bool others_run(void)
{
	static _Atomic long cpus;

	if (!cpus)
		cpus = sysconf(_SC_NPROCESSORS_ONLN);
	return cpus > 1;
}

static inline void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

void fs_lock_contended(struct fs *fs, bool exclusive)
{
	if (others_run()) {
		for (unsigned i = 0; i < LOOKS; i++) {
			relax();
			if (!(exclusive ? pthread_rwlock_trywrlock(&fs->lock) :
					  pthread_rwlock_tryrdlock(&fs->lock)))
				return;
		}
	}
	if (exclusive)
		pthread_rwlock_wrlock(&fs->lock);
	else
		pthread_rwlock_rdlock(&fs->lock);
}
