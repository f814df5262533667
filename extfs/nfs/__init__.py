"""The layout server: NFSv4.1 and 4.2 with pNFS block layouts (RFC 8881, 7862, 5663, 8276).

Bytes in, bytes and effects out: only ``server.py`` owns sockets and threads. All protocol code runs
in one thread, operation by operation; see `extfs.nfs.effects` for what may happen in between.
"""
