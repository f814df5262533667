"""The kernel's NFS client in a guest: mounts, what they counted, and contents of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from guest import mountstats
from guest.machine import HOST, Guest, GuestError
from guest.mountstats import MountStats

MIB = 1 << 20
MOUNTPOINT = "/mnt/nfs"
LAYOUT = "LAYOUT_BLOCK_VOLUME"
DEBUG_LINES = 200


class Client:
    """One NFS mount of a guest, at `mountpoint`, where `layout` is what it should use."""

    def __init__(self, guest: Guest, *, mountpoint: str = MOUNTPOINT, layout: str = LAYOUT) -> None:
        self.guest = guest
        self.mountpoint = mountpoint
        self.layout = layout

    def prepare(self, *, block_layouts: bool = True) -> None:
        """Load the client's modules, and start what finds the disks of block layouts; once."""
        self.guest.check(
            "grep -q rpc_pipefs /proc/mounts && exit 0\n"
            "modprobe -a sunrpc nfsv4\n"
            "mount -t rpc_pipefs rpc /var/lib/nfs/rpc_pipefs\n"
        )
        if block_layouts:
            self.guest.check(
                "pidof blkmapd >/dev/null && exit 0\n"
                "modprobe -a blocklayoutdriver dm_mod\n"
                # The kernel asks blkmapd and only then goes to sleep: an answer that is there
                # before never wakes it. With this policy blkmapd cannot take the CPU from it.
                "chrt -i 0 blkmapd -f >/run/blkmapd.log 2>&1 &\n"
                # Its upcall pipe is opened once it has looked at the disks.
                "for i in $(seq 100); do\n"
                "  ls -l /proc/$(pidof blkmapd)/fd 2>/dev/null | grep -q blocklayout && exit 0\n"
                "  usleep 50000\n"
                "done\n"
                "cat /run/blkmapd.log; exit 1"
            )

    def mount(
        self,
        port: int,
        path: str = "/",
        *,
        version: str = "4.2",
        options: str = "",
        server: str = HOST,
        seconds: float = 40,
    ) -> None:
        """Mount; CommandError with what mount said."""
        words = f"vers={version},port={port},sec=sys,{options}".rstrip(",")
        self.guest.check(
            f"mkdir -p {self.mountpoint}\n"
            f"mount -t nfs4 -o {words} {server}:{path} {self.mountpoint}",
            seconds,
        )

    def unmount(self, seconds: float = 40) -> None:
        self.guest.check(f"umount {self.mountpoint}", seconds)

    # -- counters --

    def stats(self) -> MountStats:
        return mountstats.parse(self.guest.check("cat /proc/self/mountstats"), self.mountpoint)

    @contextmanager
    def counted(self) -> Iterator[Counted]:
        """Counts what the block does: ``with client.counted() as c: ...`` then ``c["WRITE"]``."""
        counted = Counted(self.stats(), self.layout)
        yield counted
        counted.close(self.stats())

    def drop_caches(self) -> None:
        """Forget clean pages, so that the next read asks the device or the server."""
        self.guest.check("sync; echo 3 >/proc/sys/vm/drop_caches")

    # -- what tests do with files; paths are below the mountpoint --

    def path(self, name: str) -> str:
        return f"{self.mountpoint}/{name}"

    def digest(self, path: str, *, direct: bool = False, seconds: float = 120) -> str:
        """SHA-256 of a file of the guest, by its absolute path."""
        source = f"dd if={path} bs=1M iflag=direct 2>/dev/null" if direct else f"cat {path}"
        return self.guest.check(f"{source} | sha256sum", seconds).split()[0]

    def random_file(self, name: str, size: int) -> str:
        """Random bytes in the guest's memory; the path of the file."""
        path = f"/tmp/{name}"
        self.guest.check(f"head -c {size} /dev/urandom >{path}")
        return path

    def copy_in(self, source: str, name: str, *, block: int = MIB, direct: bool = False) -> None:
        """Write a file of the guest into one of the mount, durably."""
        flags = "oflag=direct" if direct else ""
        self.guest.check(
            f"dd if={source} of={self.path(name)} bs={block} conv=fsync {flags} 2>/dev/null", 180
        )

    def xfs_io(self, name: str, *commands: str, flags: str = "", seconds: float = 60) -> str:
        """Run commands of xfs_io(8) on a file; -f in `flags` makes it, -d is O_DIRECT."""
        words = " ".join(f"-c '{command}'" for command in commands)
        # Its exit code is 0 whatever fails.
        return self.guest.check(
            f"xfs_io {flags} {words} {self.path(name)} 2>/tmp/xfs_io.said\n"
            "[ $? -eq 0 ] && [ ! -s /tmp/xfs_io.said ] || { cat /tmp/xfs_io.said; exit 1; }",
            seconds,
        )

    # -- evidence for a failure --

    def debug(self, on: bool = True) -> None:
        """Have the kernel log what the client does with layouts."""
        flag = "-s" if on else "-c"
        self.guest.check(f"rpcdebug -m nfs {flag} pnfs pnfs_ld >/dev/null")

    def evidence(self) -> str:
        """Counters, what blkmapd found, and the end of the kernel's log."""
        try:
            text = self.guest.run(
                f"cat /run/blkmapd.log 2>/dev/null; echo '-- dmesg'; dmesg | tail -n {DEBUG_LINES}"
            ).output
            return f"-- {self.guest.name}: {self.stats()}\n{text}"
        except (GuestError, ValueError) as error:
            return f"-- {self.guest.name}: {error}"


class Counted:
    """What a client counted between two moments; known once the block has ended."""

    def __init__(self, before: MountStats, layout: str) -> None:
        self._before = before
        self._layout = layout
        self._difference: MountStats | None = None

    def close(self, after: MountStats) -> None:
        self._difference = after - self._before

    @property
    def stats(self) -> MountStats:
        assert self._difference is not None, "the block has not ended"
        return self._difference

    def __getitem__(self, operation: str) -> int:
        return self.stats[operation]

    def __str__(self) -> str:
        return str(self.stats)

    def assert_by_layout(self, *, reads: bool = False, writes: bool = False) -> None:
        """The data moved between this client and the disk, and none of them over the network."""
        assert self["READ"] == 0, f"read through the server: {self}"
        assert self["WRITE"] == 0, f"written through the server: {self}"
        if reads:
            assert self.stats.pnfs_reads > 0, f"nothing was read: {self}"
        if writes:
            assert self.stats.pnfs_writes > 0, f"nothing was written: {self}"
            assert self["LAYOUTCOMMIT"] > 0, f"nothing was committed: {self}"
        assert self.stats.layout == self._layout, str(self)
