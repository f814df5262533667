/* SPDX-License-Identifier: MIT
 *
 * bridge_dispatch.c - who serves which opcode: the one place that says so.
 *
 * Requests about /.extfs and what is in it go to bridge_control.c before this table is asked.
 *
 * C: a handler of the bridge. FORWARD: pyfuse3, extfs/fuse/operations.py. NONE: ENOSYS, for the
 * stated reason. The columns: opcode, server, handler, fixed bytes of arguments that the handler
 * counts on.
 *
 * pyfuse3 would lose the flags of setxattr (XATTR_CREATE becomes a separate look,
 * FUSE_SETXATTR_ACL_KILL_SGID disappears).
 */
#include "bridge.h"

#define ARG(type) sizeof(struct type)

/* clang-format off */
#define OPCODE_TABLE(C, FORWARD, NONE)                                                          \
	C(LOOKUP,             serve_lookup,          1)                                         \
	C(FORGET,             serve_forget,          ARG(fuse_forget_in))                       \
	C(GETATTR,            serve_getattr,         0)                                         \
	C(SETATTR,            serve_setattr,         ARG(fuse_setattr_in))                      \
	C(READLINK,           serve_readlink,        0)                                         \
	C(SYMLINK,            serve_symlink,         1)                                         \
	C(MKNOD,              serve_mknod,           ARG(fuse_mknod_in))                        \
	C(MKDIR,              serve_mkdir,           ARG(fuse_mkdir_in))                        \
	C(UNLINK,             serve_unlink,          1)                                         \
	C(RMDIR,              serve_rmdir,           1)                                         \
	C(RENAME,             serve_rename,          ARG(fuse_rename_in))                       \
	C(LINK,               serve_link,            ARG(fuse_link_in))                         \
	C(OPEN,               serve_open,            ARG(fuse_open_in))                         \
	C(READ,               serve_read,            ARG(fuse_read_in))                         \
	C(WRITE,              serve_write,           ARG(fuse_write_in))                        \
	C(STATFS,             serve_statfs,          0)                                         \
	C(RELEASE,            serve_release,         ARG(fuse_release_in))                      \
	C(FSYNC,              serve_fsync,           ARG(fuse_fsync_in))                        \
	C(SETXATTR,           serve_setxattr,        FUSE_COMPAT_SETXATTR_IN_SIZE)              \
	C(GETXATTR,           serve_getxattr,        ARG(fuse_getxattr_in))                     \
	C(LISTXATTR,          serve_listxattr,       ARG(fuse_getxattr_in))                     \
	C(REMOVEXATTR,        serve_removexattr,     1)                                         \
	C(FLUSH,              serve_flush,           ARG(fuse_flush_in))                        \
	FORWARD(INIT)                                                                           \
	C(OPENDIR,            serve_opendir,         ARG(fuse_open_in))                         \
	C(READDIR,            serve_readdir,         ARG(fuse_read_in))                         \
	C(RELEASEDIR,         serve_releasedir,      ARG(fuse_release_in))                      \
	C(FSYNCDIR,           serve_fsyncdir,        ARG(fuse_fsync_in))                        \
	C(GETLK,              serve_getlk,           ARG(fuse_lk_in))                           \
	C(SETLK,              serve_setlk,           ARG(fuse_lk_in))                           \
	C(SETLKW,             serve_setlkw,          ARG(fuse_lk_in))                           \
	NONE(ACCESS)          /* default_permissions: the kernel checks */                      \
	C(CREATE,             serve_create,          ARG(fuse_create_in))                       \
	C(INTERRUPT,          serve_interrupt,       ARG(fuse_interrupt_in))                    \
	NONE(BMAP)            /* fuseblk only; blocks move, so no number would stay true */     \
	C(DESTROY,            serve_destroy,         0)                                         \
	C(IOCTL,              serve_ioctl,           ARG(fuse_ioctl_in))                        \
	NONE(POLL)            /* else every io_uring read and write would ask first: EVENT_SOCKET */ \
	NONE(NOTIFY_REPLY)    /* answers FUSE_NOTIFY_RETRIEVE, which is never sent */           \
	C(BATCH_FORGET,       serve_batch_forget,    ARG(fuse_batch_forget_in))                 \
	C(FALLOCATE,          serve_fallocate,       ARG(fuse_fallocate_in))                    \
	C(READDIRPLUS,        serve_readdirplus,     ARG(fuse_read_in))                         \
	C(RENAME2,            serve_rename2,         ARG(fuse_rename2_in))                      \
	C(LSEEK,              serve_lseek,           ARG(fuse_lseek_in))                        \
	C(COPY_FILE_RANGE,    serve_copy_file_range, ARG(fuse_copy_file_range_in))              \
	NONE(SETUPMAPPING)    /* DAX */                                                         \
	NONE(REMOVEMAPPING)   /* DAX */                                                         \
	NONE(SYNCFS)          /* never sent to a mount of type fuse */                          \
	C(TMPFILE,            serve_tmpfile,         ARG(fuse_create_in))                       \
	C(STATX,              serve_statx,           ARG(fuse_statx_in))                        \
	C(COPY_FILE_RANGE_64, serve_copy_file_range, ARG(fuse_copy_file_range_in))
/* clang-format on */

static const struct opcode_row rows[FUSE_ABI_OPCODES] = {
#define ROW_C(op, handler, len) [FUSE_##op] = {#op, OPCODE_C, len, handler},
#define ROW_FORWARD(op) [FUSE_##op] = {#op, OPCODE_FORWARD, 0, NULL},
#define ROW_NONE(op) [FUSE_##op] = {#op, OPCODE_UNKNOWN, 0, NULL},
	OPCODE_TABLE(ROW_C, ROW_FORWARD, ROW_NONE)
};

const struct opcode_row *bridge_opcode(uint32_t opcode)
{
	return opcode < FUSE_ABI_OPCODES && rows[opcode].name ? &rows[opcode] : NULL;
}
