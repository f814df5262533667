"""A holder that reaches the device by another way than the daemon: a second loop device."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted

from extfs.control.client import Descriptor, EventType, Iomode, Layout, LayoutState

pytestmark = pytest.mark.fuse

BLOCK = 4096
LENGTH = 64 * BLOCK


@contextmanager
def direct(device: rundir.LoopDevice) -> Iterator[int]:
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write(device: int, layout: Layout, byte: bytes) -> None:
    """All blocks that the layout lets be written."""
    with mmap.mmap(-1, LENGTH) as memory:
        memory[:] = byte * LENGTH
        for extent in layout.writable():
            with memoryview(memory)[: extent.length] as part:
                assert os.pwrite(device, part, extent.physical) == extent.length


def read(device: int, layout: Layout) -> bytes:
    found = b""
    with mmap.mmap(-1, LENGTH) as memory:
        for extent in layout.extents:
            assert extent.state is LayoutState.READ_DATA
            with memoryview(memory)[: extent.length] as part:
                assert os.preadv(device, [part], extent.physical) == extent.length
            found += memory[: extent.length]
    return found


def test_a_holder_on_another_loop_device_of_the_image(
    make_image: Callable[..., Path],
    make_loop: Callable[..., rundir.LoopDevice],
    extfs: ExtfsRunner,
    mount_extfs: Callable[..., Mounted],
) -> None:
    """What either side wrote, the other side reads, as soon as the calls have returned.

    This works because both go past the page cache of their loop device, to the same image. What
    does not: a holder that opens its loop device without O_DIRECT, since the page cache of that
    device is told of nothing that happens to the image; and a holder that looks for the device
    that INFO names: that is the daemon's.
    """
    image = make_image()
    near, far = make_loop(image=image), make_loop(image=image)
    extfs("mkfs", near)
    mounted = mount_extfs(near)
    path = mounted.mountpoint / "file"
    path.touch()
    with Descriptor.of(path, write=True) as file, direct(far) as device:
        holder = file.register("far")
        layout = holder.get(Iomode.RW, 0, LENGTH)
        assert layout.next == LENGTH
        write(device, layout, b"1")
        assert holder.commit([(0, LENGTH)], file_size=LENGTH) == LENGTH
        assert path.read_bytes() == b"1" * LENGTH
        # In place, under pages that the kernel keeps by now.
        holder.give_all_back()
        layout = holder.get(Iomode.RW, 0, LENGTH)
        assert {e.state for e in layout.extents} == {LayoutState.READ_WRITE_DATA}
        write(device, layout, b"2")
        holder.commit()
        assert path.read_bytes() == b"2" * LENGTH
        # And back: what is written through the mount is on the device when write(2) returns.
        holder.give_all_back()
        with open(path, "r+b", buffering=0) as through:
            assert through.write(b"3" * LENGTH) == LENGTH
        layout = holder.get(Iomode.READ, 0, LENGTH)
        assert read(device, layout) == b"3" * LENGTH
        assert not [e for e in file.events() if e.type is EventType.REVOKED]
        holder.give_all_back()
    mounted.unmount()
    extfs("fsck", near)
