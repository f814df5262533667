"""The storage: the kernel's own iSCSI target (LIO) in a guest, with persistent reservations.

The unit's blocks are a raw image of the host, which can look at them at any time. Registrations
that were made with APTPL lie on a disk of their own, and outlive the guest as they do in an array.
LIO saves them (without making them durable: so the filesystem of that disk is mounted "sync"), but
reading them back is left to user space, so `start` does that, before anybody can log in.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from guest.machine import Guest

TARGET = "iqn.2026-01.extfs.test:disk"
PORTAL = "192.168.77.1"
_CONFIG = "/sys/kernel/config/target"
_SERIAL = "extfs-0-5c51-0001"

STATE_SIZE = 4 << 20

# One line for each registration that LIO saved: its lines joined with commas.
_JOIN = r"""awk '/PR_REG_START/{l=""; next} /PR_REG_END/{print l; next} NF{l=l (l?",":"") $0}'"""

_START = f"""set -e
modprobe configfs
grep -q configfs /proc/mounts || mount -t configfs config /sys/kernel/config
modprobe -a ext4 target_core_mod target_core_iblock iscsi_target_mod
mkdir -p /var/target
mount -t ext4 -o sync /dev/vdc /var/target
mkdir -p /var/target/pr /var/target/alua
unit={_CONFIG}/core/iblock_0/disk
mkdir -p $unit
echo udev_path=/dev/vdb >$unit/control
echo {_SERIAL} >$unit/wwn/vpd_unit_serial
echo 1 >$unit/enable
saved=/var/target/pr/aptpl_{_SERIAL}
if [ -s $saved ]; then
  {_JOIN} $saved | while read -r line; do echo "$line" >$unit/pr/res_aptpl_metadata; done
fi
group={_CONFIG}/iscsi/{TARGET}/tpgt_1
mkdir -p {_CONFIG}/iscsi
mkdir -p $group/lun/lun_0
ln -s $unit $group/lun/lun_0/disk
echo 0 >$group/attrib/authentication
echo 1 >$group/attrib/generate_node_acls
echo 1 >$group/attrib/cache_dynamic_acls
echo 0 >$group/attrib/demo_mode_write_protect
mkdir -p $group/np/0.0.0.0:3260
echo 1 >$group/enable
"""


def new_state(path: Path) -> None:
    """Make the image of the disk for registrations."""
    with open(path, "wb") as file:
        file.truncate(STATE_SIZE)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", str(path)], check=True, capture_output=True)


def start(guest: Guest) -> None:
    """Serve /dev/vdb of the guest, whose /dev/vdc is the disk for registrations."""
    guest.check(_START)


def forget(guest: Guest) -> None:
    """Lose what was saved, as a target without APTPL does; before `start`."""
    guest.check("modprobe ext4; mount -t ext4 /dev/vdc /mnt && rm -rf /mnt/pr; sync; umount /mnt")


def sessions(guest: Guest) -> list[str]:
    """Names of the initiators that are logged in."""
    text = guest.check(f"cat {_CONFIG}/iscsi/{TARGET}/tpgt_1/dynamic_sessions 2>/dev/null; true")
    return [name for name in text.replace("\0", "\n").split() if name]


def wait_session(initiator: str) -> str:
    """A script that waits until the initiator is logged in."""
    where = f"{_CONFIG}/iscsi/{TARGET}/tpgt_1/dynamic_sessions"
    return f"until tr '\\0' '\\n' <{where} | grep -qx {initiator}; do usleep 50000; done"


def key_of(guest: Guest, initiator: str) -> str | None:
    """The key that the initiator has registered, as "0x..."."""
    found = re.search(rf"{re.escape(initiator)},\S* Key: (0x[0-9a-f]+)", registrations(guest))
    return found and found[1]


def registrations(guest: Guest) -> str:
    """What the target holds: registrations and the reservation, in the kernel's words."""
    directory = f"{_CONFIG}/core/iblock_0/disk/pr"
    return guest.check(f'cd {directory}; for f in res_*; do echo "$f: $(cat $f 2>&1)"; done')
