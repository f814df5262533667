"""`extfs mount --nfs`, --export, --config and `extfs clients`, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import rundir
from conftest import ExtfsRunner, Mounted, extfs_command

fuse = pytest.mark.fuse


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nfs"], "--nfs without --export serves nothing"),
        (["--nfs", "localhost:2049", "--export", "/"], "not a numeric ADDRESS:PORT"),
        (["--nfs", "127.0.0.1:0", "--export", "/"], "not an ADDRESS:PORT"),
        (["--nfs", "127.0.0.1:65536", "--export", "/"], "not an ADDRESS:PORT"),
        (["--export", "/"], "there is no --nfs"),
        (["--nfs", "--export", "relative"], "the path must start with /"),
        (["--nfs", "--export", "/:rw,ro"], "exclude each other"),
        (["--nfs", "--export", "/:layouts=tape"], "is to be none, block"),
        (["--config", "x.toml"], "no DEVICE"),
    ],
)
def test_wrong_words_are_told(extfs: ExtfsRunner, arguments: list[str], words: str) -> None:
    result = extfs("mount", "/dev/null", "/nowhere", *arguments, check=False)
    assert result.returncode == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device = 3", "$.device"),
        ('device = "d"', "mountpoint"),
        ('device = "d"\nmountpoint = "m"\nnsf = 1', "nsf"),
        ('device = "d"\nmountpoint = "m"\n[nfs]\nlease = 1', "$.nfs.lease"),
        ('device = "d"\nmountpoint = "m"\n[nfs]', "--nfs without --export"),
        ('device = "d"\nmountpoint = "m"\noptions = "cache=huge"', "is not a size"),
        ('device = "d', ""),
        ('device = "\xff"', ""),
    ],
)
def test_a_wrong_configuration_is_told(
    extfs: ExtfsRunner, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(text.encode("latin-1"))
    result = extfs("mount", "--config", file, check=False)
    assert result.returncode == 2
    assert str(file) in result.stderr
    assert words in result.stderr
    assert "internal error" not in result.stderr


def test_a_configuration_that_is_not_there(extfs: ExtfsRunner, tmp_path: Path) -> None:
    result = extfs("mount", "--config", tmp_path / "x.toml", check=False)
    assert result.returncode == 2
    assert "No such file" in result.stderr


@fuse
def test_what_cannot_be_served_is_not_mounted(
    scratch_image: Path, extfs: ExtfsRunner, run_directory: rundir.RunDirectory
) -> None:
    extfs("mkfs", scratch_image)
    target = run_directory.new_mountpoint()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, arguments in (
            ("Address already in use", ["--nfs", f"127.0.0.1:{port}", "--export", "/"]),
            ("no such directory", ["--nfs", f"127.0.0.1:{free_port()}", "--export", "/gone"]),
            ("read-only", ["-o", "ro", "--nfs", f"127.0.0.1:{free_port()}", "--export", "/"]),
            ("writeback_cache", ["-o", "writeback_cache", "--nfs", "--export", "/"]),
        ):
            result = extfs("mount", scratch_image, target, *arguments, check=False)
            assert result.returncode == 1, arguments
            assert words in result.stderr
            assert not rundir.mounts_below(target)
    assert "clean" in extfs("fsck", scratch_image).stdout


@fuse
def test_clients_of_a_mount(
    loop_device: rundir.LoopDevice, extfs: ExtfsRunner, mount_extfs: Callable[..., Mounted]
) -> None:
    extfs("mkfs", loop_device)
    port = free_port()
    mounted = mount_extfs(
        loop_device, more=["--nfs", f"127.0.0.1:{port}", "--export", "/:insecure"]
    )
    with socket.create_connection(("127.0.0.1", port)):
        said = extfs("clients", mounted.mountpoint).stdout
        assert f"127.0.0.1:{port}" in said
        told = json.loads(extfs("clients", "--json", mounted.mountpoint).stdout)
        assert (told["connections"], told["clients"]) == (1, [])
    status = json.loads((mounted.mountpoint / ".extfs" / "status").read_text())
    assert status["nfs"]["listening"] == [f"127.0.0.1:{port}"]


@fuse
def test_a_mount_that_serves_nobody_says_so(extfs: ExtfsRunner, mounted: Mounted) -> None:
    result = extfs("clients", mounted.mountpoint, check=False)
    assert result.returncode == 1
    assert "without --nfs" in result.stderr
    assert json.loads((mounted.mountpoint / ".extfs" / "status").read_text())["nfs"] is None


@fuse
def test_the_configuration_mounts_and_serves(
    scratch_image: Path, extfs: ExtfsRunner, run_directory: rundir.RunDirectory, tmp_path: Path
) -> None:
    """Twice: the second start finds the records of the first. Ctrl-C unmounts."""
    extfs("mkfs", scratch_image)
    target = run_directory.new_mountpoint()
    ports = [free_port(), free_port()]
    file = tmp_path / "x.toml"
    file.write_text(
        f'device = "{scratch_image}"\nmountpoint = "{target}"\noptions = "noatime"\n'
        f'[nfs]\nlisten = ["127.0.0.1:{ports[0]}", "127.0.0.1:{ports[1]}"]\nlease = 30\n'
        '[[nfs.export]]\npath = "/"\nnetworks = ["10.0.0.0/8"]\noptions = ["rw"]\n'
    )
    for epoch in (1, 2):
        daemon = subprocess.Popen(
            extfs_command("mount", "--config", file, "--foreground"),
            env=run_directory.environment(), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert daemon.stderr is not None
        for line in daemon.stderr:
            if f":{ports[1]}" in line:
                break
        told = json.loads(extfs("clients", "--json", target).stdout)
        assert told["listening"] == [f"127.0.0.1:{port}" for port in ports]
        assert told["lease"]["seconds"] == 30
        assert told["epoch"] == epoch
        os.kill(daemon.pid, signal.SIGINT)
        daemon.communicate(timeout=60)
        assert daemon.returncode == 0
        assert not rundir.mounts_below(target)
