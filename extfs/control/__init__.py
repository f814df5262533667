"""The control file: `client` and `waiting` for programs that use a mount, `status` for its daemon.

The calls themselves are served by the core's bridge; see ``native/extfs_ioctl.h``.
"""
