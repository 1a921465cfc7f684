"""Hosts of a cluster as network namespaces of this machine, each with its own address, on a bridge of their own.

They share the file system, as nodes of a cluster do, and can reach each other and nothing else.
"""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

BRIDGE = f"ff{os.getpid() % 100_000}"


class Host:
    """One namespace with the address 10.77.0.`number`.

    Attributes:
        address: reachable from the other hosts.
    """

    def __init__(self, number: int) -> None:
        self.name = f"{BRIDGE}n{number}"
        self.address = f"10.77.0.{number}"
        self._link = f"{BRIDGE}v{number}"
        self._started: list[subprocess.Popen] = []
        ip("netns", "add", self.name)
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self._link, "master", BRIDGE, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", link, "up")

    def start(self, *words: str, folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen:
        """A command on this host, in a session of its own, its output appended to `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *words],
                cwd=folder,
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def connect(self, up: bool) -> None:
        """Plug the network cable in, or pull it."""
        ip("link", "set", self._link, "up" if up else "down")

    def processes(self, name: str) -> list[psutil.Process]:
        """What runs on this host under a name."""
        here = os.stat(f"/run/netns/{self.name}").st_ino
        found = []
        for process in psutil.process_iter(["name"]):
            with suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == here and name in process.info["name"]:
                    found.append(process)
        return found

    def remove(self) -> None:
        """End what runs here, then the host itself."""
        for process in self.processes(""):
            with suppress(psutil.Error):
                process.kill()
        for process in self._started:
            process.wait()
        ip("netns", "del", self.name)


def make_bridge() -> None:
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")


def remove_bridge() -> None:
    ip("link", "del", BRIDGE)


def reason_for_none() -> str | None:
    """Why this machine cannot have such hosts, if it cannot."""
    try:
        make_bridge()
        ip("netns", "add", f"{BRIDGE}try")
        ip("netns", "del", f"{BRIDGE}try")
        remove_bridge()
    except FileNotFoundError:
        return "iproute2 is not installed"
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def wait_until(condition, what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
