# What cffi generates from native/extfs_core.h. extfs.core is its only importer and gives it types.

from typing import Any

ffi: Any
lib: Any
