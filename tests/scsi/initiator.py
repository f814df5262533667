"""A guest's way to the disk: open-iscsi, with a daemon that brings a lost session back."""

from __future__ import annotations

from guest.machine import Guest

from scsi.target import PIECE, PORTAL, PREFIX, TARGET

_SETTINGS = """\
node.startup = manual
node.session.timeo.replacement_timeout = 120
node.conn[0].timeo.login_timeout = 5
node.conn[0].timeo.logout_timeout = 5
node.conn[0].timeo.noop_out_interval = 2
node.conn[0].timeo.noop_out_timeout = 3
node.session.err_timeo.abort_timeout = 15
node.session.err_timeo.lu_reset_timeout = 30
node.session.err_timeo.tgt_reset_timeout = 30
node.session.initial_login_retry_max = 4
node.session.cmds_max = 128
node.session.queue_depth = 32
node.session.iscsi.InitialR2T = No
node.session.iscsi.ImmediateData = Yes
"""

_LOG = "/run/iscsid.log"

# LIO refuses READ CAPACITY (16) to who is not registered with a reserved unit: the disk of a host
# that comes later has no size, and the kernel's layout driver then writes through the server. So be
# registered while the size is read.
_SIZE = """if [ $(blockdev --getsize64 /dev/${disk##*/}) = 0 ]; then
      sg_persist -n -o -G -S 0x1 /dev/${disk##*/}
      echo 1 >$disk/device/rescan
      sg_persist -n -o -G -K 0x1 -S 0 /dev/${disk##*/}
      [ $(blockdev --getsize64 /dev/${disk##*/}) != 0 ]
    fi"""


def name(guest: Guest) -> str:
    """The initiator's name of a guest."""
    return f"{PREFIX}:{guest.name}"


def start(guest: Guest) -> None:
    """Start the daemon that brings lost sessions back; once for each guest."""
    guest.check(
        f"""set -e
modprobe -a iscsi_tcp sd_mod sg
mkdir -p /etc/iscsi /run/lock/iscsi /var/lib/iscsi
echo InitiatorName={name(guest)} >/etc/iscsi/initiatorname.iscsi
cat >/etc/iscsi/iscsid.conf <<'END'
{_SETTINGS}END
iscsid -f >{_LOG} 2>&1 &
daemon=$!
until grep -q ISCSIADM_ABSTRACT_NAMESPACE /proc/net/unix; do
  kill -0 $daemon || {{ cat {_LOG}; exit 1; }}
  usleep 20000
done
"""
    )


def login(guest: Guest, *, nexus: str = "", address: str = PORTAL) -> str:
    """Log in; the path of the disk. The first one gets its name in /dev/disk/by-id.

    `nexus`: a second session, of an initiator of this name: the guest then has the unit twice, by
    two nexuses, as two hosts would.
    """
    face = f"-I {nexus}" if nexus else ""
    where = f"-T {TARGET} -p {address}:3260 {face}"
    make_face = (
        f"iscsiadm -m iface {face} -o new\n"
        f"iscsiadm -m iface {face} -o update -n iface.initiatorname -v {name(guest)}.{nexus}"
    )
    return guest.check(
        f"""set -e
exec 3>&1 >/run/iscsiadm.log 2>&1
trap '[ $? -eq 0 ] || cat /run/iscsiadm.log {_LOG} >&3' EXIT
before=$(echo /sys/block/sd*)
{make_face if nexus else ""}
iscsiadm -m node -o new {where}
iscsiadm -m node {where} --login
for i in $(seq 200); do
  for disk in /sys/block/sd*; do
    case " $before " in *" $disk "*) continue ;; esac
    [ -e $disk/device/vendor ] && grep -q LIO-ORG $disk/device/vendor || continue
    read -r identity <$disk/device/wwid
    link=/dev/disk/by-id/wwn-0x${{identity#naa.}}
    [ -L $link ] || ln -s ../../${{disk##*/}} $link
    {_SIZE}
    echo {PIECE >> 10} >$disk/queue/max_sectors_kb
    echo /dev/${{disk##*/}} >&3
    exit 0
  done
  usleep 50000
done
echo the disk does not come
exit 1
"""
    ).strip()


def attend(guest: Guest) -> None:
    """Have the disk's unit attention told to a command that does not matter, as the path checker of
    multipathd would: the kernel's client does not repeat the registration of its key."""
    guest.run("sg_persist -n -k $(ls /dev/disk/by-id/wwn-*)")


def logout(guest: Guest, nexus: str) -> None:
    """End the session of a second nexus; its disk goes."""
    guest.check(f"iscsiadm -m node -T {TARGET} -I {nexus} --logout")
