"""Several hosts on one machine: each a set of namespaces (network, mounts, host name, processes) with an address, a name, an ssh
server, and disks of its own. Linux, as root.

    with Hosts(3, folder) as hosts:
        hosts["node1"].run(["ssh", "node2", "hostname"], timeout=10)

Nothing of this is seen from outside, and nothing stays: bridge and hosts are namespaces of processes that end with the process
that made them, a crash included. The folder, and the rest of the machine's files, are seen by every host: the shared disk. What a
host has for itself is /mnt (its local disk), /run, /dev/shm, /root/.ssh and /root/.cache.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

NETWORK = "10.77.0"
DISK = "/mnt"
# Of a machine's programs; the packages of Debian that hold them.
PROGRAMS = {
    "ip": "iproute2",
    "setpriv": "util-linux",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
}
START = 20.0  # seconds in which a host is up; one is, as a rule

# What runs as the first process of a host. It says what it has done line by line, and waits for its network in between.
_BOOT = r"""
set -e
name=$1 address=$2 folder=$3
hostname "$name"
mount -t tmpfs -o mode=755 tmpfs /run
for disk in /mnt /dev/shm; do mount -t tmpfs -o mode=1777,size=2g tmpfs "$disk"; done
mkdir -p /root/.ssh /root/.cache /run/sshd
for home in /root/.ssh /root/.cache; do mount -t tmpfs -o mode=700 tmpfs "$home"; done
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
cp "$folder/key" /root/.ssh/id_ed25519
cp "$folder/known_hosts" "$folder/ssh_config" /root/.ssh/
mv /root/.ssh/ssh_config /root/.ssh/config
chmod 600 /root/.ssh/*
echo made
read -r _
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
echo up
exec </dev/null >"$folder/$name.log" 2>&1 /usr/sbin/sshd -D -e -f /dev/null -h "$folder/key" \
    -o AuthorizedKeysFile="$folder/key.pub" -o StrictModes=no -o UsePAM=no -o PidFile=none -o ListenAddress="$address"
"""


def missing(programs: Mapping[str, str] = PROGRAMS) -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if absent:
        return f"needs programs that are not there: apt-get install --no-install-recommends {' '.join(absent)}"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True
    )
    return f"cannot make a bridge in a namespace: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One host. Commands run in it as root, in `folder`, with the environment that is given and no other."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        command = [*_ends_with_us(), "unshare", "-n", "-u", "-m", "-p", "-f", "--kill-child", "--mount-proc"]
        command += ["--propagation", "private", "bash", "-c", _BOOT, "boot", name, address, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._expect("made")

    @property
    def pid(self) -> int:
        """Of the process above the host's first: it is in the host's network, and its end is the host's."""
        return self._process.pid

    @property
    def disk(self) -> Path:
        """Its local disk, as this process reaches it."""
        return Path(f"/proc/{self._first()}/root{DISK}")

    def connect(self) -> None:
        """Once its end of the cable is there."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._expect("up")
        deadline = time.monotonic() + START
        while self.run(["bash", "-c", f"exec 3<>/dev/tcp/{self.address}/22"], timeout=START).returncode:
            assert time.monotonic() < deadline, (
                f"no ssh on {self.name}: {(self.folder / f'{self.name}.log').read_text()}"
            )
            time.sleep(0.05)

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command in this host."""
        first = self._first()
        return ["nsenter", "-t", str(first), "-n", "-u", "-m", "-p", "--wdns=/", "--", *command]

    def run(
        self,
        command: Sequence[str],
        timeout: float,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. One that takes longer is ended, with all that it started here.

        Raises:
            subprocess.TimeoutExpired: with what was said until then.
        """
        process = self.start(command, environment, folder, timeout=timeout)
        try:
            out, err = process.communicate(timeout=timeout + 15)
        except BaseException:
            process.kill()
            raise
        if process.returncode in (124, 137):
            raise subprocess.TimeoutExpired(list(command), timeout, out, err)
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = 600.0,
    ) -> subprocess.Popen[str]:
        """Start a command, which ends with the timeout, with the process that is returned, with this one, and with the host."""
        limited = ["setpriv", "--pdeathsig", "TERM", "timeout", "--kill-after=5", str(timeout), *command]
        moved = ["bash", "-c", 'cd "$0" && exec "$@"', str(folder or self.folder), *limited]
        own = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*_ends_with_us(), *self.inside(moved)],
            **{"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe},
            text=True,
            env=own | dict(environment or {}),
        )

    def cut(self) -> None:
        """Take its cable away; `mend` puts it back."""
        self.run(["ip", "link", "set", "eth0", "down"], timeout=10).check_returncode()

    def mend(self) -> None:
        self.run(["ip", "link", "set", "eth0", "up"], timeout=10).check_returncode()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _first(self) -> int:
        """The host's first process, which has all its namespaces."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        assert children, f"{self.name} has ended"
        return int(children[0])

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None and self._process.stderr is not None
        if self._process.stdout.readline().decode().strip() != word:
            raise RuntimeError(f"{self.name} did not start: {self._process.stderr.read().decode().strip()}")


class Hosts:
    """node1, node2, ... on one bridge, at 10.77.0.1, 10.77.0.2, ...; a mapping of names to hosts."""

    def __init__(self, count: int, folder: Path) -> None:
        """Writes keys and names into the folder, which every host sees."""
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self.folder = folder
        self._hosts: dict[str, Host] = {}
        self._bridge: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Hosts:
        try:
            self._write_files()
            self._bridge = subprocess.Popen(
                [*_ends_with_us(), "unshare", "-n", "bash", "-c", _BRIDGE],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert self._bridge.stdout is not None and self._bridge.stdout.readline() == b"up\n"
            for number, name in enumerate(self.names, start=1):
                host = self._hosts[name] = Host(name, f"{NETWORK}.{number}", self.folder)
                self._lay_cable(number, host)
                host.connect()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def down(self) -> None:
        """End every process of every host; their namespaces, addresses and disks go with them."""
        for host in self._hosts.values():
            host.end()
        self._hosts.clear()
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.communicate()
            self._bridge = None

    def slow_down(self, name: str, rate: str) -> None:
        """Let a host send no more than `rate` (of tc: "1gbit")."""
        shape = [
            "tc",
            "qdisc",
            "replace",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "256kb",
            "latency",
            "50ms",
        ]
        self[name].run(shape, timeout=10).check_returncode()

    def full_speed(self, name: str) -> None:
        """After `slow_down`; nothing where the host is as it was."""
        self[name].run(["tc", "qdisc", "del", "dev", "eth0", "root"], timeout=10)

    def _lay_cable(self, number: int, host: Host) -> None:
        assert self._bridge is not None
        lines = [
            f"ip link add port{number} type veth peer name eth0 netns {host.pid}",
            f"ip link set port{number} master bridge up",
        ]
        enter = ["nsenter", "-t", str(self._bridge.pid), "-n"]
        for line in lines:
            subprocess.run([*enter, *shlex.split(line)], check=True, timeout=10)

    def _write_files(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        key = folder / "key"
        if not key.exists():
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", str(key)]
            subprocess.run(make, check=True, timeout=30)
        numbered = list(enumerate(self.names, start=1))
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{number} {name}" for number, name in numbered)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        # Without this a lookup of an unknown address asks name servers that cannot be reached, and waits.
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        public = " ".join((folder / "key.pub").read_text().split()[:2])
        known = [f"{name},{NETWORK}.{number} {public}\n" for number, name in numbered]
        (folder / "known_hosts").write_text("".join(known))
        (folder / "ssh_config").write_text("Host *\n  BatchMode yes\n  ConnectTimeout 5\n")


_BRIDGE = (
    "ip link add bridge type bridge && ip link set bridge up && ip link set lo up && echo up && exec sleep infinity"
)


def _ends_with_us() -> list[str]:
    """A command below this one is killed when the thread that started it ends, however that happens."""
    return ["setpriv", "--pdeathsig", "KILL", "--"]
