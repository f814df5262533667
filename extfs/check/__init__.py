"""fsck and dump: a reader of the on-disk format that shares no code with the native core.

From the bottom up:

- ``layout``: the structures of FORMAT.md as tables; ``checksum``: CRC-32C and SipHash-2-4.
- ``volume``: the device, the superblock and verified metadata blocks; ``log``: journal and replay.
- ``trees``: walking and building B+trees.
- ``inventory``: the passes that read every tree; ``space``, ``names``, ``attributes``: what has to
  agree with what. ``report``: findings.
- ``repair``, ``mend``: what can be put right without guessing, and how it reaches the device.
- ``fsck``, ``dump``, ``mapping``: what the commands call.

All sizes are in blocks of 4096 bytes unless a name says bytes. Nothing here imports ``extfs.core``.
"""
