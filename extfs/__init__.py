"""extfs: a filesystem in user space that owns a raw block device and grants its extents.

The layers, from the top down (``tests/test_layers.py`` enforces the order):

- ``extfs.cli``, ``extfs.daemon``: the command and the wiring of one mounted filesystem.
- ``extfs.fuse``, ``extfs.control``, ``extfs.nfs``: the fronts; they do not know each other.
- ``extfs.layout``: holders of granted extents, recall, lease time, fencing.
- ``extfs.check``: fsck and dump, which read the format without the C code.
- ``extfs.core``: the only importer of the C module ``extfs._core``, built from ``native/``.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _distribution_version

__all__ = ["__version__"]

try:
    __version__: str = _distribution_version("extfs")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
