"""The kernel's own NFS server on XFS in a guest, with pNFS block layouts: peer and reference."""

from __future__ import annotations

from guest.machine import Guest

EXPORT = "/export"


def serve(guest: Guest, disk: str = "/dev/sda") -> None:
    """Format a disk of the guest and export it; mount "/" of port 2049, version 4.1 or 4.2."""
    guest.check(
        f"""set -e
modprobe -a xfs sunrpc nfsd
mkfs.xfs -f -q -m reflink=0 {disk}
mkdir -p {EXPORT}
mount -t xfs {disk} {EXPORT}
chmod 777 {EXPORT}
grep -q rpc_pipefs /proc/mounts || mount -t rpc_pipefs rpc /var/lib/nfs/rpc_pipefs
mount -t nfsd nfsd /proc/fs/nfsd
echo 10 >/proc/fs/nfsd/nfsv4gracetime
echo 30 >/proc/fs/nfsd/nfsv4leasetime
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
echo '{EXPORT} *(rw,pnfs,no_root_squash,insecure,no_subtree_check,fsid=0,sec=sys)' >/etc/exports
exportfs -r
rpc.mountd -N 3 -V 4
rpc.nfsd -N 3 -V 4.1 -V 4.2 -U 4
echo Y >/proc/fs/nfsd/v4_end_grace
""",
        60,
    )
