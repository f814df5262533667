"""The PEP 517 backend of extfs: setuptools, with the C module built by native/Makefile.

The Makefile owns every compiler flag and dependency, so that the extension, the C tests and the
sanitizer builds come from the same objects, and a rebuild compiles only what changed. This file
adds the two things make cannot do: generating the extension's source with cffi, and putting the
result where setuptools wants it.

Run as a program, ``build_backend.py generate HEADER OUTPUT`` writes the extension's C source.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
MODULE = "extfs._core"

# What the public header's types need; cffi knows them by itself, a C compiler does not.
PREAMBLE = """
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include "{header}"
"""


def generate(header: Path, output: Path) -> None:
    """Write the C source of the extension for the declarations in `header`, read verbatim."""
    from cffi import FFI  # only the build environment has it

    ffi = FFI()
    try:
        ffi.cdef(header.read_text(encoding="utf-8"))
    except Exception as error:
        raise SystemExit(f"{header}: cffi cannot read it: {error}") from error
    ffi.set_source(MODULE, PREAMBLE.format(header=header.name))
    with contextlib.redirect_stdout(None):
        ffi.emit_c_code(str(output))
    os.utime(output)  # cffi leaves an unchanged file alone, and make would run this again


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "generate":
        raise SystemExit("usage: build_backend.py generate HEADER OUTPUT")
    generate(Path(sys.argv[2]), Path(sys.argv[3]))
    raise SystemExit(0)


from setuptools import Extension  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403
from setuptools.command.build_ext import build_ext  # noqa: E402


class BuildCore(build_ext):
    """Builds ``extfs._core`` with native/Makefile.

    Environment: EXTFS_BUILD, a build directory to use instead of native/build/default;
    EXTFS_SAN, sanitizers for the extension ("address,undefined"), for debugging only.
    """

    def build_extension(self, ext: Extension) -> None:
        self._require_sources()
        sanitizers = os.environ.get("EXTFS_SAN", "")
        name = sanitizers.replace(",", "-") or "default"
        build = Path(os.environ.get("EXTFS_BUILD") or NATIVE / "build" / name)
        command = [
            *("make", "--no-print-directory", "-C", str(NATIVE), "-j2", "pyext"),
            *(f"PYTHON={sys.executable}", f"BUILD={build}", f"SAN={sanitizers}"),
        ]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit("extfs: building the core needs make and gcc") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"extfs: building the core failed (make exited {error.returncode})"
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old module mapped: replace the file, never write into it.
        staged = target.with_name(target.name + ".new")
        shutil.copyfile(build / "extfs" / "_core.abi3.so", staged)
        staged.replace(target)

    @staticmethod
    def _require_sources() -> None:
        if not (NATIVE / "extfs_core.h").is_file():
            raise SystemExit(
                f"extfs: {NATIVE}/extfs_core.h is missing; the source tree is incomplete"
            )
        if not any(NATIVE.glob("*.c")):
            raise SystemExit(f"extfs: no C source in {NATIVE}; the source tree is incomplete")
