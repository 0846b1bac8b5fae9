"""What `host.py` takes from a host: a memory limit, /proc, the disk, the time of day.

All of it is in namespaces or control groups of its own, and ends with the process that is in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Callable, NamedTuple

import trustme
from compare import BenchError
from hostile_peers import LOOPBACK, MEBIBYTE, Bench, MissingError, Service, read_or_nothing

WAIT_SECONDS = 10  # for what is expected to happen at once


def seconds_until(is_reached: Callable[[], bool], seconds: float = WAIT_SECONDS) -> float:
    """Return the seconds until something holds, inf if that takes too long."""
    started = time.monotonic()
    while not is_reached():
        if time.monotonic() > started + seconds:
            return float("inf")
        time.sleep(0.005)
    return time.monotonic() - started


def find(program: str) -> str:
    """Return the path of a program; raise MissingError without it."""
    found = shutil.which(program)
    if found is None:
        raise MissingError(f"{program} not found")
    return found


def require_root(purpose: str) -> None:
    """Raise MissingError for another user than root."""
    if os.geteuid():
        raise MissingError(f"needs root, {purpose}")


# Mounts


def with_mounts(script: str, argument: str = "") -> list[str]:
    """Return a wrapper that runs a script in a mount namespace: $0 is the argument, "$@" expexp.

    Raise MissingError if there can be no such namespace.
    """
    require_root("to mount in a namespace")
    unshare = [find("unshare"), "--mount"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise MissingError(f"no mount namespace: {tried.stderr.strip()}")
    return [*unshare, "sh", "-euc", script, argument]


def mount_anew(service: Service, *command: str) -> None:
    """Run a command in the mount namespace of a service."""
    enter = [find("nsenter"), f"--target={service.pid}", "--mount"]
    subprocess.run([*enter, *command], check=True, capture_output=True)


# A limit of memory


class MemoryGroup(NamedTuple):
    """A control group with a limit of memory."""

    folder: Path
    limit: Path
    events: Path  # has a line `oom_kill NUMBER`

    @property
    def wrapper(self) -> list[str]:
        """Return what runs a command in the group."""
        return ["sh", "-euc", 'echo 0 >"$0"; exec "$@"', str(self.folder / "cgroup.procs")]

    def set_limit(self, megabytes: int) -> None:
        """Change the limit."""
        self.limit.write_text(str(megabytes * MEBIBYTE), encoding="ascii")

    def kills(self) -> int:
        """Return how many processes the kernel has killed for lack of memory."""
        lines = map(str.split, self.events.read_text(encoding="ascii").splitlines())
        return sum(int(line[1]) for line in lines if line[0] == "oom_kill")


def parents_of_groups() -> Iterator[tuple[Path, str, str]]:
    """Yield where a group can be made, with the names of its limit and of its events."""
    mounts: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, target, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            mounts[kind] = Path(target)
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        own = path.lstrip("/")
        if "cgroup" in mounts and "memory" in controllers.split(","):
            yield mounts["cgroup"] / own, "memory.limit_in_bytes", "memory.oom_control"
        if "cgroup2" in mounts and number == "0":  # beside ours: a group with processes has none
            parent = (mounts["cgroup2"] / own).parent if own else mounts["cgroup2"]
            yield parent, "memory.max", "memory.events"


@contextlib.contextmanager
def memory_group(megabytes: int) -> Iterator[MemoryGroup]:
    """Make a control group, of version 1 or 2, and remove it; raise MissingError without one."""
    faults: list[str] = []
    for parent, limit, events in parents_of_groups():
        folder = parent / f"expexp-host-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            faults.append(f"{folder}: {error.strerror}")
            continue
        group = MemoryGroup(folder, folder / limit, folder / events)
        try:
            if group.limit.exists():
                group.set_limit(megabytes)
                yield group
                return
            faults.append(f"{group.limit}: missing")
        finally:
            remove_group(folder)
    raise MissingError("no control group for memory: " + ("; ".join(faults) or "none is mounted"))


def remove_group(folder: Path) -> None:
    """Remove a control group when its last process has ended."""

    def is_removed() -> bool:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return not folder.exists()

    if seconds_until(is_removed) > WAIT_SECONDS:
        raise BenchError(f"{folder} cannot be removed")


# Processes


def children_of(pid: int) -> set[int]:
    """Return the children of a process."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for file in files for child in read_or_nothing(file).split()}


def is_alive(pid: int) -> bool:
    """Return whether a process runs: a zombie does not."""
    state = read_or_nothing(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


# The time of day


class Clock:
    """The time of day of a process, which can jump."""

    def __init__(self, folder: Path) -> None:
        """Build the library that shifts the time."""
        library = folder / "clock.so"
        source = Path(__file__).with_name("host_clock.c")
        command = [find("gcc"), "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self._file = folder / "clock"
        self._file.write_bytes(bytes(8))
        self.wrapper = ["env", f"LD_PRELOAD={library}", f"CLOCK_FILE={self._file}"]

    def jump(self, days: float) -> None:
        """Let the time differ from ours by so many days."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("q", int(days * 86400)))


def certificates_of_a_day(folder: Path) -> tuple[list[str], ssl.SSLContext]:
    """Return the flags of a listener for client certificates, and a client. All last for a day."""
    authority = trustme.CA()
    now = datetime.now(timezone.utc)
    start, end = now - timedelta(days=1), now + timedelta(days=1)
    server = authority.issue_cert("localhost", LOOPBACK, not_before=start, not_after=end)
    server.private_key_and_cert_chain_pem.write_to_path(str(folder / "day.pem"))
    (folder / "day.pem").chmod(0o600)
    authority.cert_pem.write_to_path(str(folder / "day-ca.pem"))
    client = ssl.create_default_context()
    authority.configure_trust(client)
    identity = authority.issue_cert("prometheus.example.org", not_before=start, not_after=end)
    with identity.private_key_and_cert_chain_pem.tempfile() as file:
        client.load_cert_chain(file)
    pem = folder / "day.pem"
    flags = [f"-web.tls.cert={pem}", f"-web.tls.key={pem}", f"-web.tls.ca={folder}/day-ca.pem"]
    return [*flags, "-web.tls.verify"], client


# A user with many processes


@contextlib.contextmanager
def neighbours(wrapper: Sequence[str], count: int) -> Iterator[None]:
    """Run so many processes behind a wrapper, and end them."""
    script = 'i=0; while [ $i -lt "$0" ]; do sleep 60 & i=$((i+1)); done; echo; wait'
    command = [*wrapper, "sh", "-c", script, str(count - 1)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as shell:
        try:
            if not shell.stdout or not shell.stdout.readline():
                raise BenchError(f"{count} processes cannot be started")
            yield
        finally:
            os.killpg(shell.pid, 9)


def make_folder(bench: Bench) -> Path:
    """Return a new folder."""
    return Path(tempfile.mkdtemp(dir=bench.folder))
