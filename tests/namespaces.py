"""Two hosts on this machine, each with an address, a name and an sshd of its own, and a third one that joins them:
network namespaces, which end with the test."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

TOOLS = {"ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server", "ssh": "openssh-client"}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [
    f"{name} (apt-get install {package})" for name, package in TOOLS.items() if not shutil.which(name, path=PATH)
]
needed = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0,
    reason=f"needs {', '.join(MISSING)}" if MISSING else "needs root: hosts are network namespaces",
)
ADDRESSES = {"hub": "10.213.7.1", "a": "10.213.7.2", "b": "10.213.7.3"}
SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
ListenAddress {address}
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
SSH = """
Host a b
  User {user}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
Host a
  HostName {a}
Host b
  HostName {b}
"""


class Hosts:
    """ "hub" is where commands are given; "a" and "b" are reached from there by ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {name: f"suanli-{os.getpid()}-{name}" for name in ADDRESSES}
        self.started: list[subprocess.Popen[bytes]] = []
        self.ssh = f"ssh -F {folder / 'ssh_config'}"

    # --- making and removing ---

    def make(self) -> None:
        for space in self.names.values():
            _do("ip", "netns", "add", space)
            self.ip(space, "link", "set", "lo", "up")
        hub = self.names["hub"]
        self.ip(hub, "link", "add", "bridge", "type", "bridge")
        self.ip(hub, "address", "add", f"{ADDRESSES['hub']}/24", "dev", "bridge")
        self.ip(hub, "link", "set", "bridge", "up")
        for name in ("a", "b"):
            space = self.names[name]
            self.ip(hub, "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            self.ip(hub, "link", "set", "dev", name, "master", "bridge", "up")
            self.ip(space, "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            self.ip(space, "link", "set", "eth0", "up")
        self._keys()
        for name in ("a", "b"):
            self._sshd(name)

    def _keys(self) -> None:
        folder = self.folder
        for key in ("host_key", "user_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        public = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"{ADDRESSES[name]} {public}" for name in ("a", "b")))
        (folder / "ssh_config").write_text(SSH.format(user=getpass.getuser(), folder=folder, **ADDRESSES))

    def _sshd(self, name: str) -> None:
        configuration = self.folder / f"sshd_{name}"
        configuration.write_text(SSHD.format(folder=self.folder, address=ADDRESSES[name]))
        sshd = shutil.which("sshd", path=PATH)
        # Its folder for unprivileged children has a fixed place, which is this sshd's own here.
        own = f"hostname {name} && mount -t tmpfs none /run && mkdir -m 755 /run/sshd"
        script = f"{own} && exec {sshd} -D -e -f {configuration}"
        command = ["ip", "netns", "exec", self.names[name], "unshare", "--uts", "--mount", "sh", "-c", script]
        self.start(command, said=self.folder / f"sshd_{name}.log")
        end = time.monotonic() + 20
        while b"listening" not in (self.folder / f"sshd_{name}.log").read_bytes():
            assert time.monotonic() < end, (self.folder / f"sshd_{name}.log").read_text()
            time.sleep(0.05)

    def start(self, command: Sequence[str], said: Path) -> None:
        with said.open("wb") as stream:
            self.started.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, env=_env()
                )
            )

    def remove(self) -> None:
        for space in self.names.values():
            for number in self.processes(space):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, env=_env(), check=False)
        for process in self.started:
            process.kill()
            process.wait()

    # --- use ---

    def ip(self, space: str, *words: str) -> None:
        _do("ip", "-netns", space, *words)

    def cut(self, name: str) -> None:
        self.ip(self.names["hub"], "link", "set", "dev", name, "down")

    def mend(self, name: str) -> None:
        self.ip(self.names["hub"], "link", "set", "dev", name, "up")

    def processes(self, space: str) -> list[int]:
        told = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, env=_env(), check=False)
        return [int(word) for word in told.stdout.split()]

    def training(self, name: str) -> dict[int, str]:
        """The processes of suanli on a host, with their command lines."""
        found = {}
        for number in self.processes(self.names[name]):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line.startswith(sys.executable) and "suanli" in line:
                    found[number] = line
        return found

    def command(self, name: str, *words: object) -> list[str]:
        return ["ip", "netns", "exec", self.names[name], sys.executable, "-m", "suanli", *map(str, words)]

    def popen(self, name: str, *words: object, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_env() | {"SUANLI_SSH": self.ssh} | more,
            start_new_session=True,
        )


def _env() -> dict[str, str]:
    return {**os.environ, "PATH": PATH}


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=_env(), check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


@contextlib.contextmanager
def made(folder: Path) -> Iterator[Hosts]:
    hosts = Hosts(folder)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()
