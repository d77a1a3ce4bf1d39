"""The Linux kernel's own NBD client, in a virtual machine: a file system on a live disk, and its backups.

The guest makes an ext4 file system over `nbd-client`, the host takes a point in time while it is
frozen, and the guest goes on writing. What was pulled and pushed must then be exactly the frozen
file system: the same bytes, clean for fsck, with the checksums that the guest took.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest

from fixtures.initramfs import KernelUnavailable
from fixtures.kernel_vm import HOST, Vm
from tests.conftest import ServeFunction
from tests.support.certificates import Pki, subject
from tests.support.disks import MIB, allocated_bytes, make_disk, make_sparse, sha256
from tests.support.peers import require, unavailable
from tests.support.processes import run

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(400)]

GUEST_TIMEOUT_S = 200.0


@pytest.fixture(autouse=True, scope="module")
def _kernel_starts() -> None:
    require("qemu-system-x86_64")
    try:
        assert Vm.run("nbd-client -V >/dev/null", timeout_s=60).status == 0
    except KernelUnavailable as error:
        unavailable(f"no kernel to boot: {error}")


def in_guest(script: str, cpus: int = 1) -> Vm:
    """A guest that runs `script` and stops at its first error."""
    return Vm("set -e\n" + script, cpus)


def sums(output: str) -> dict[str, str]:
    """File names and digests among the lines that the guest printed."""
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", output, re.MULTILINE)}


LIVE_FILE_SYSTEM = """
attach nbd0 {host} {port} -N disk -C {connections}
mkfs.ext4 -q -F /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
for file in a b c d; do
    dd if=/dev/urandom of=/mnt/$file bs=1M count=6 conv=fsync 2>/dev/null
done
mkdir /mnt/many
for file in $(seq 200); do echo "$file" >/mnt/many/$file; done
dd if=/dev/urandom of=/mnt/sync bs=4k count=64 oflag=sync 2>/dev/null
cd /mnt
sha256sum a b c d sync many/7 many/200
cd /
fsfreeze -f /mnt
meet frozen
fsfreeze -u /mnt
dd if=/dev/urandom of=/mnt/a bs=1M count=6 conv=notrunc,fsync 2>/dev/null
rm -r /mnt/b /mnt/many
dd if=/dev/urandom of=/mnt/e bs=1M count=20 conv=fsync 2>/dev/null
fstrim /mnt
sync
meet moved-on
umount /mnt
detach nbd0
echo live again
attach nbd0 {host} {port} -N disk
mount -t ext4 -o ro /dev/nbd0 /mnt
test -e /mnt/e
test ! -e /mnt/b
umount /mnt
detach nbd0
meet detached
port=$answer
for copy in pull push; do
    attach nbd1 {host} "$port" -N $copy
    mount -t ext4 -o ro /dev/nbd1 /mnt
    echo "copy $copy"
    cd /mnt
    sha256sum a b c d sync many/7 many/200
    test ! -e e
    cd /
    umount /mnt
    detach nbd1
done
"""


@pytest.mark.parametrize("connections", [1, 4])
def test_backups_of_a_live_file_system_are_its_frozen_state(
    tmp_path: Path, serve: ServeFunction, connections: int
) -> None:
    size = 96 * MIB
    disk = make_sparse(tmp_path / "disk.img", size)
    pull, push = tmp_path / "pull.img", tmp_path / "push.img"
    server = serve(disk=disk)
    script = LIVE_FILE_SYSTEM.format(host=HOST, port=server.port, connections=connections)
    with in_guest(script, cpus=connections) as vm:
        vm.wait_for("frozen", GUEST_TIMEOUT_S)
        server.cli("snapshot", "create", "disk", "--name", "frozen")
        # Slow enough that most of it is copied while the guest writes again.
        server.cli("backup", "disk", str(push), "--job-id", "push", "--no-wait", "-r", "1M")
        run("cp", "--sparse=always", disk, tmp_path / "reference.img")
        vm.go_on()
        vm.wait_for("moved-on", GUEST_TIMEOUT_S)
        run(require("qemu-img"), "convert", "-O", "raw", server.uri("disk@frozen"), pull)
        server.cli("job", "set-speed", "push", "0")
        server.cli("job", "watch", "push")
        vm.go_on()
        vm.wait_for("detached", GUEST_TIMEOUT_S)
        reference = sha256(tmp_path / "reference.img")
        assert sha256(pull) == sha256(push) == reference
        assert sha256(disk) != reference
        for copy in (pull, push):
            run(require("e2fsck"), "-f", "-n", copy)
        copies = serve(pull=pull, push=push, options=["-r"])
        vm.go_on(str(copies.port))
        result = vm.finish(GUEST_TIMEOUT_S)
    assert result.status == 0, result.output
    live, of_pull, of_push = (
        sums(part) for part in re.split(r"^copy \w+$", result.output, flags=re.MULTILINE)
    )
    assert len(live) == 7
    assert of_pull == of_push == live


def test_a_discard_of_the_whole_disk_in_giant_requests_spares_the_view(
    tmp_path: Path, serve: ServeFunction
) -> None:
    size = 5 * 1024 * MIB
    disk = make_sparse(tmp_path / "disk.img", size)
    patch = make_disk(tmp_path / "patch.img", 3 * MIB + 4096, seed=5)
    for offset in (0, 4 * 1024 * MIB - 8192, size - 4 * MIB):
        run(
            "dd",
            f"if={patch}",
            f"of={disk}",
            "bs=4096",
            f"seek={offset // 4096}",
            "conv=notrunc",
            "status=none",
        )
    before = json.loads(run(require("qemu-img"), "map", "--output=json", "-f", "raw", disk))
    assert sum(not extent["zero"] for extent in before) == 3
    run("cp", "--sparse=always", disk, tmp_path / "reference.img")
    server = serve(disk=disk)
    server.cli("snapshot", "create", "disk", "--name", "s")
    result = Vm.run(
        f"""
        set -e
        attach nbd0 {HOST} {server.port} -N disk
        cat /sys/block/nbd0/queue/discard_max_bytes
        blkdiscard /dev/nbd0
        sync
        detach nbd0
        """,
        GUEST_TIMEOUT_S,
    )
    assert result.status == 0, result.output
    assert allocated_bytes(disk) < MIB
    identical = run(
        *(require("qemu-img"), "compare", "-U", "-f", "raw", "-F", "raw"),
        *(server.uri("disk@s"), tmp_path / "reference.img"),
    )
    assert "identical" in identical


def test_a_read_only_view_is_mounted_by_the_kernel_while_the_disk_is_written(
    tmp_path: Path, serve: ServeFunction
) -> None:
    server = serve(disk=make_sparse(tmp_path / "disk.img", 64 * MIB))
    script = f"""
    attach nbd0 {HOST} {server.port} -N disk
    mkfs.ext4 -q -F /dev/nbd0
    mount -t ext4 /dev/nbd0 /mnt
    dd if=/dev/urandom of=/mnt/file bs=1M count=8 conv=fsync 2>/dev/null
    sha256sum </mnt/file
    fsfreeze -f /mnt
    meet frozen
    fsfreeze -u /mnt
    attach nbd1 {HOST} {server.port} -N disk@s
    mkdir /tmp/view
    mount -t ext4 -o ro /dev/nbd1 /tmp/view
    dd if=/dev/urandom of=/mnt/file bs=1M count=8 conv=notrunc,fsync 2>/dev/null
    sha256sum </tmp/view/file
    sha256sum </mnt/file
    umount /tmp/view /mnt
    detach nbd1
    detach nbd0
    """
    with in_guest(script) as vm:
        vm.wait_for("frozen", GUEST_TIMEOUT_S)
        server.cli("snapshot", "create", "disk", "--name", "s")
        vm.go_on()
        result = vm.finish(GUEST_TIMEOUT_S)
    assert result.status == 0, result.output
    frozen, viewed, live = re.findall(r"^([0-9a-f]{64})  -$", result.output, re.MULTILINE)
    assert viewed == frozen
    assert live != frozen


def test_kernel_writes_on_four_connections_over_tls(tmp_path: Path, serve: ServeFunction) -> None:
    pki = Pki(tmp_path)
    certificates = pki.client("guest")
    disk = make_sparse(tmp_path / "disk.img", 32 * MIB)
    options = ["--tls-creds", str(pki.server()), "--export-authz", f"disk={subject(certificates)}"]
    server = serve(disk=disk, options=options)
    files = "".join(
        f"cat >/tmp/{name} <<'PEM'\n{(certificates / name).read_text()}PEM\n"
        for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem")
    )
    script = f"""
    tls="-enable-tls -cacertfile /tmp/ca-cert.pem -tlshostname localhost"
    tls="$tls -certfile /tmp/client-cert.pem -keyfile /tmp/client-key.pem"
    attach nbd0 {HOST} {server.port} -N disk -C 4 $tls
    dd if=/dev/urandom of=/tmp/data bs=1M count=24 2>/dev/null
    for part in 0 1 2 3; do
        at=$((part * 96))
        dd if=/tmp/data of=/dev/nbd0 bs=64k skip=$at seek=$at count=96 conv=fsync 2>/dev/null &
    done
    wait
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/nbd0 bs=1M count=24 2>/dev/null | sha256sum
    sha256sum </tmp/data
    detach nbd0
    """
    with in_guest(files + script, cpus=2) as vm:
        ended = vm.finish(GUEST_TIMEOUT_S)
    assert ended.status == 0, ended.output + server.log()
    read, written = re.findall(r"^([0-9a-f]{64})  -$", ended.output, re.MULTILINE)
    assert read == written
    assert hashlib.sha256(disk.read_bytes()[: 24 * MIB]).hexdigest() == written
    lines = [line for line in server.log().splitlines() if "uses export disk" in line]
    assert len(lines) == 4
    assert all("(simple replies, TLSv1." in line for line in lines)
