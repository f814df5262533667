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

PREFIX = "iqn.2026-01.extfs.test"
TARGET = f"{PREFIX}:disk"
INITIATORS = ("server", "server.second", "standby", "target", "one", "two")
"""Who may log in, by the part behind the prefix. A session that does not answer is dropped after 6
seconds, else 45: a LOGICAL UNIT RESET waits for the half-sent commands of a host that froze."""
PORTAL = "192.168.77.1"
_CONFIG = "/sys/kernel/config/target"
_SERIAL = "extfs-0-5c51-0001"

STATE_SIZE = 4 << 20

# Writes up to this size come with their data. A LOGICAL UNIT RESET waits for data that the target
# has asked for, and an initiator that asked for the reset sends none until it is done: with the
# defaults of LIO both then wait until the target drops the session.
PIECE = 256 << 10

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
for name in {" ".join(INITIATORS)}; do
  host=$group/acls/{PREFIX}:$name
  mkdir -p $host/lun_0
  ln -s $group/lun/lun_0 $host/lun_0/disk
  echo 3 >$host/attrib/nopin_timeout
  echo 3 >$host/attrib/nopin_response_timeout
  echo 3 >$host/attrib/dataout_timeout
  echo 1 >$host/attrib/dataout_timeout_retries
done
for setting in InitialR2T=No ImmediateData=Yes MaxRecvDataSegmentLength={PIECE} \\
    FirstBurstLength={PIECE}; do
  echo ${{setting#*=}} >$group/param/${{setting%%=*}}
done
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


def wait_session(initiator: str) -> str:
    """A script that waits until the initiator is logged in."""
    where = f"{_CONFIG}/iscsi/{TARGET}/tpgt_1/acls/{initiator}/info"
    return f"until grep -q LOGGED_IN {where}; do usleep 50000; done"


def key_of(guest: Guest, initiator: str) -> str | None:
    """The key that the initiator has registered, as "0x..."."""
    found = re.search(rf"{re.escape(initiator)},\S* Key: (0x[0-9a-f]+)", registrations(guest))
    return found and found[1]


def registrations(guest: Guest) -> str:
    """What the target holds: registrations and the reservation, in the kernel's words."""
    directory = f"{_CONFIG}/core/iblock_0/disk/pr"
    return guest.check(f'cd {directory}; for f in res_*; do echo "$f: $(cat $f 2>&1)"; done')
