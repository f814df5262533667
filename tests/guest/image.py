"""What a guest boots: Debian's kernel and a small root of its own, made once and kept.

``ensure()`` returns the image, and makes it where it is missing or older than what it is made from:

    packages/        Debian packages, downloaded and unpacked, nothing installed
    vmlinux          the kernel, uncompressed: the emulator starts it 4 s sooner than a bzImage
    initramfs.cpio   busybox, kernel modules, nfs-utils, xfsprogs, and the files of rootfs/
    tools.img        ext4 with what is too large for the memory of every guest: fio, open-iscsi
    stamp            digest of the sources of all this; written last

It needs the network once, and only programs of the packages that scripts/setup installs.
Nothing of it depends on how the tests use it, and it imports the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DIRECTORY = HERE.parent.parent / "native" / "build" / "guest"
EMULATOR = "qemu-system-x86_64"

KERNEL = "linux-image-amd64"
"""The meta package; the kernel proper is what it depends on."""

# nfs-utils, open-iscsi, and the libraries that their programs and xfsprogs need and a bare system
# lacks.
PACKAGES = [
    "nfs-common",
    "nfs-kernel-server",
    "libnfsidmap1",
    "libtirpc3",
    "libwrap0",
    "libevent-core-2.1-7",
    "libdevmapper1.02.1",
    "libgssapi-krb5-2",
    "libkrb5-3",
    "libk5crypto3",
    "libkrb5support0",
    "libcom-err2",
    "libkeyutils1",
    "libsqlite3-0",
    "xfsprogs",
    "libinih1",
    "liburcu8",
    "kmod",
    "libkmod2",
    "open-iscsi",
    "libisns0",
    "libopeniscsiusr",
    "libssl3",
    "libmount1",
    "libsystemd0",
]

# Modules by name; what they depend on comes along.
MODULES = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_scsi",
    "virtio_console",
    "sd_mod",
    "sg",
    "dm_mod",
    "loop",
    "sunrpc",
    "nfs",
    "nfsv4",
    "blocklayoutdriver",
    "nfsd",
    "lockd",
    "auth_rpcgss",
    "rpcsec_gss_krb5",
    "xfs",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    "libcrc32c",
    "iscsi_tcp",
    "target_core_mod",
    "target_core_iblock",
    "iscsi_target_mod",
    "9p",
    "9pnet_virtio",
    "overlay",
    "fuse",
]

# Where the program is in the packages, and where it goes.
PROGRAMS = {
    "bin/kmod": "sbin/kmod",
    "sbin/mount.nfs": "sbin/mount.nfs",
    "sbin/mkfs.xfs": "sbin/mkfs.xfs",
    "usr/sbin/xfs_io": "usr/sbin/xfs_io",
    "usr/sbin/blkmapd": "usr/sbin/blkmapd",
    "usr/sbin/rpcdebug": "usr/sbin/rpcdebug",
    "usr/sbin/rpc.nfsd": "usr/sbin/rpc.nfsd",
    "usr/sbin/rpc.mountd": "usr/sbin/rpc.mountd",
    "usr/sbin/exportfs": "usr/sbin/exportfs",
}
# Programs of this machine that busybox has no equal of.
HOST_PROGRAMS = ("chrt", "flock", "getfattr", "setfattr", "sg_inq", "sg_persist", "sg_vpd")
# Programs of the disk of tools: those of this machine by name, those of the packages by path.
TOOLS = ("fio", "sbin/iscsid", "sbin/iscsiadm")
LINKS = {
    "sbin/mount.nfs4": "mount.nfs",
    "sbin/umount.nfs": "mount.nfs",
    "sbin/umount.nfs4": "mount.nfs",
    **{f"sbin/{name}": "kmod" for name in ("modprobe", "insmod", "rmmod", "lsmod", "modinfo")},
    **{f"usr/bin/{Path(name).name}": "tool" for name in TOOLS},
    "usr/lib/x86_64-linux-gnu": "../../lib/x86_64-linux-gnu",
    "var/run": "../run",
}
DIRECTORIES = [
    "bin",
    "sbin",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "etc",
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    "mnt",
    "root",
    "tools",
    "lib64",
    "lib/x86_64-linux-gnu",
    "var/lib/nfs/rpc_pipefs",
    "var/lib/nfs/v4recovery",
]
# The module loader of busybox does not know soft dependencies; kmod takes its place.
NOT_BUSYBOX = {"modprobe", "insmod", "rmmod", "lsmod", "modinfo", "depmod"}


class ImageError(Exception):
    """The image cannot be made; says why."""


@dataclass(frozen=True)
class Image:
    """Files to boot from."""

    kernel: Path
    initramfs: Path
    tools: Path


def why_no_guest() -> str | None:
    """The reason why guests cannot be had on this machine, or None when they can.

    That something failed to be made or downloaded is no such reason, but an error.
    """
    if platform.machine() != "x86_64":
        return (
            f"guests are x86-64 machines with programs of this one, which is {platform.machine()}"
        )
    if shutil.which("apt-get") is None:
        return "the kernel of guests comes from Debian packages, and there is no apt-get"
    if shutil.which(EMULATOR) is None:
        return (
            f"there is no {EMULATOR} (Debian: qemu-system-x86); scripts/setup could not install it"
        )
    return None


def _run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command to its end; its standard output. ImageError with what it said."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise ImageError(f"there is no {command[0]}; run scripts/setup") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ImageError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{said}")
    return done.stdout


def _sources() -> list[Path]:
    return sorted(
        path
        for path in (Path(__file__), *HERE.glob("rootfs/**/*"), *HERE.glob("programs/*.c"))
        if path.is_file()
    )


def _digest() -> str:
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process makes the image; others wait and then find it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(say: Callable[[str], None] = lambda text: None) -> Image:
    """The image, made now if need be; `say` is told what takes long. ImageError."""
    image = Image(DIRECTORY / "vmlinux", DIRECTORY / "initramfs.cpio", DIRECTORY / "tools.img")
    with _locked(DIRECTORY):
        stamp, digest = DIRECTORY / "stamp", _digest()
        files = (image.kernel, image.initramfs, image.tools)
        if all(path.exists() for path in (*files, stamp)) and stamp.read_text() == digest:
            return image
        stamp.unlink(missing_ok=True)
        packages = _fetch(DIRECTORY, say)
        say("building the guest's root")
        version = next((packages / "lib" / "modules").iterdir()).name
        _extract_kernel(packages / "boot" / f"vmlinuz-{version}", image.kernel)
        _Root(DIRECTORY / "root", packages, version).make(image.initramfs)
        _make_tools(DIRECTORY / "tools", packages, image.tools)
        stamp.write_text(digest)
    return image


# ---- packages ----------------------------------------------------------------------------------


def _fetch(directory: Path, say: Callable[[str], None]) -> Path:
    """Download and unpack the packages; skipped when the same ones are there."""
    unpacked, listing = directory / "packages", directory / "packages.list"
    wanted = "\n".join([KERNEL, *PACKAGES])
    if unpacked.is_dir() and listing.exists() and listing.read_text() == wanted:
        return unpacked
    listing.unlink(missing_ok=True)
    shutil.rmtree(unpacked, ignore_errors=True)
    downloads = directory / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()
    say("downloading Debian's kernel and the programs of the guest")
    try:
        _download(downloads)
    except ImageError:
        # The lists of packages are old, or were never fetched.
        _run("apt-get", "-q", "-o", "Acquire::Retries=3", "update")
        _download(downloads)
    for package in sorted(downloads.glob("*.deb")):
        _run("dpkg", "-x", package, unpacked)
    shutil.rmtree(downloads)
    listing.write_text(wanted)
    return unpacked


def _download(directory: Path) -> None:
    depends = _run("apt-cache", "depends", KERNEL)
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if kernel is None:
        raise ImageError(f"apt knows no package that {KERNEL} depends on")
    options = ["-q", "-o", "Acquire::Retries=3", "-o", "APT::Sandbox::User=root"]
    _run("apt-get", *options, "download", kernel[1], *PACKAGES, cwd=directory)


def _extract_kernel(bzimage: Path, output: Path) -> None:
    """The ELF file inside a bzImage (Documentation/x86/boot.rst: setup_sects, payload_offset)."""
    raw = bzimage.read_bytes()
    sectors = raw[0x1F1] or 4
    offset, length = struct.unpack_from("<II", raw, 0x248)
    payload = raw[(sectors + 1) * 512 + offset :][:length]
    if payload[:6] == b"\xfd7zXZ\0":
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload[:2] == b"\x1f\x8b":
        kernel = zlib.decompressobj(31).decompress(payload)
    else:
        raise ImageError(f"{bzimage}: compressed in an unknown way ({payload[:6].hex()})")
    if kernel[:4] != b"\x7fELF":
        raise ImageError(f"{bzimage}: what was unpacked is no ELF file")
    output.write_bytes(kernel)


# ---- the root ----------------------------------------------------------------------------------


def _search_path(packages: Path) -> str:
    """Where the libraries of the packages are, for LD_LIBRARY_PATH."""
    parts = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
    return ":".join(str(packages / part) for part in parts)


def _libraries(program: Path, packages: Path) -> list[Path]:
    """Shared libraries that a program needs, the loader among them; those of the packages first."""
    text = subprocess.run(
        ["ldd", str(program)],
        env={**os.environ, "LC_ALL": "C", "LD_LIBRARY_PATH": _search_path(packages)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    missing = re.findall(r"^\s*(\S+) => not found", text, re.MULTILINE)
    if missing:
        raise ImageError(f"{program}: no library {', '.join(missing)}")
    found = re.findall(r"=> (/\S+) \(|^\s*(/\S+) \(", text, re.MULTILINE)
    return [Path(first or second) for first, second in found]


class _Root:
    """The directory that becomes the initramfs."""

    def __init__(self, root: Path, packages: Path, version: str) -> None:
        self.root = root
        self.packages = packages
        self.version = version

    def make(self, output: Path) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        for name in DIRECTORIES:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._busybox()
        for source, target in PROGRAMS.items():
            self._program(self.packages / source, target)
        for name in HOST_PROGRAMS:
            found = shutil.which(name)
            if found is None:
                raise ImageError(f"there is no {name}; run scripts/setup")
            self._program(Path(found), f"usr/bin/{name}")
        for link, target in LINKS.items():
            (self.root / link).unlink(missing_ok=True)
            (self.root / link).symlink_to(target)
        self._modules()
        self._own_files()
        self._pack(output)
        shutil.rmtree(self.root)

    def _busybox(self) -> None:
        busybox = shutil.which("busybox")
        if busybox is None:
            raise ImageError("there is no busybox; run scripts/setup")
        shutil.copy(busybox, self.root / "bin" / "busybox")
        for name in _run(busybox, "--list").split():
            if name not in NOT_BUSYBOX and name != "busybox":
                (self.root / "bin" / name).symlink_to("busybox")

    def _program(self, source: Path, target: str) -> None:
        if not source.exists():
            raise ImageError(f"{source}: not in Debian's packages any more")
        destination = self.root / target
        destination.unlink(missing_ok=True)
        shutil.copy(source, destination)
        for library in _libraries(source, self.packages):
            where = "lib64" if library.name.startswith("ld-linux") else "lib/x86_64-linux-gnu"
            if not (self.root / where / library.name).exists():
                shutil.copy(library, self.root / where / library.name)

    def _kmod(self, name: str, *arguments: str) -> str:
        """Run the packages' kmod under one of its names."""
        link = self.packages / "sbin" / name
        link.unlink(missing_ok=True)  # the package's own link is absolute
        link.parent.mkdir(exist_ok=True)
        link.symlink_to("../bin/kmod")
        return _run(link, *arguments, LD_LIBRARY_PATH=_search_path(self.packages))

    def _modules(self) -> None:
        directory = f"lib/modules/{self.version}"
        self._kmod("depmod", "-b", str(self.packages), self.version)
        files: set[Path] = set()
        for module in MODULES:
            listing = self._kmod(
                "modprobe", "-d", str(self.packages), "-S", self.version, "--show-depends", module
            )
            files |= {Path(name) for name in re.findall(r"^insmod (\S+)", listing, re.MULTILINE)}
        for file in files:
            target = self.root / file.relative_to(self.packages)
            target.parent.mkdir(parents=True, exist_ok=True)
            _run("strip", "--strip-debug", "-o", target, file)
        for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
            shutil.copy(self.packages / directory / name, self.root / directory / name)
        self._kmod("depmod", "-b", str(self.root), self.version)

    def _own_files(self) -> None:
        shutil.copytree(HERE / "rootfs", self.root, dirs_exist_ok=True)
        for source in HERE.glob("programs/*.c"):
            target = self.root / "usr" / "bin" / source.stem
            options = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Werror", "-static")
            _run("gcc", *options, source, "-o", target)
        for name in ("services", "protocols", "rpc"):
            if Path("/etc", name).exists():
                shutil.copy(Path("/etc", name), self.root / "etc" / name)

    def _pack(self, output: Path) -> None:
        names = sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*"))
        with open(output, "wb") as archive:
            subprocess.run(
                ["cpio", "--create", "--format=newc", "--quiet", "--owner=0:0"],
                cwd=self.root,
                input="\n".join([".", *names]).encode(),
                stdout=archive,
                check=True,
            )


def _make_tools(directory: Path, packages: Path, output: Path) -> None:
    """An ext4 image with the programs of TOOLS and all their libraries, in bin/ and lib/."""
    shutil.rmtree(directory, ignore_errors=True)
    for name in ("bin", "lib"):
        (directory / name).mkdir(parents=True)
    for name in TOOLS:
        found = str(packages / name) if "/" in name else shutil.which(name)
        if found is None or not Path(found).exists():
            raise ImageError(f"there is no {name}; run scripts/setup")
        shutil.copy(found, directory / "bin" / Path(name).name)
        for library in _libraries(Path(found), packages):
            shutil.copy(library, directory / "lib" / library.name)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    output.unlink(missing_ok=True)
    options: Sequence[str] = ("-q", "-F", "-O", "^has_journal", "-m", "0", "-d", str(directory))
    _run("/sbin/mkfs.ext4", *options, output, f"{size * 5 // 4 // 1024 + 4096}k")
    shutil.rmtree(directory)
