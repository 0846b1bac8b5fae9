"""The attack `faults` of `hostile.py`: every way in which a target can be ill, one after the other.

    hostile_faults.py PORT    # serve the ill HTTP targets until the process is killed

Each fault must give its documented status and reason, be answered at its deadline, and leave
nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compare import BenchError, free_port, process_running, wait_for_port
from hostile_attacks import Figure, show
from hostile_peers import LOOPBACK, MEBIBYTE, Bench, Service, Usage, ask, serving, usage_of

DEADLINE_SECONDS = 0.5
LATE_SECONDS = 0.05
LONG_SECONDS = 60.0
TRIES = 5
ROUNDS = 3  # of tries, if the median of a round is late: the machine may have been
LARGE_TRIES = 3
SETTLE_SECONDS = 5  # a command's group gets KILL half a second after its scrape
SPARE = 1  # threads and descriptors more after several tries
SPARE_MEGABYTES = 16
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
MARK = f"86400.{os.getpid()}"  # seconds that a script's sleep has in its command line


class Answer(NamedTuple):
    """What an ill HTTP target sends: first this, then something again and again."""

    first: bytes
    again: bytes = b""
    pause: float = 0
    stays: bool = False


def redirect_to(location: str) -> Answer:
    """Return an answer that leads elsewhere."""
    return Answer(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".encode())


def bomb() -> bytes:
    """Return an answer of 300 KB whose body has 300 MiB: one compressed MiB again and again."""
    text = b"# filler\n" * (MEBIBYTE // 9)
    packed = []
    for bits in (31, -15):  # with the head of gzip, and without
        packer = zlib.compressobj(wbits=bits)
        packed.append(packer.compress(text) + packer.flush(zlib.Z_FULL_FLUSH))
    return OK_HEAD + b"Content-Encoding: gzip\r\n\r\n" + packed[0] + 300 * packed[1]


def ill_answers() -> dict[str, Answer]:
    """Return what the HTTP targets answer, by path."""
    chunked = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    filler = b"# filler\n" * 2000
    return {
        "hangs": Answer(b"", stays=True),
        "drips-headers": Answer(OK_HEAD + b"X-Filler: ", b"x", 0.02),
        "drips-body": Answer(OK_HEAD + b"Content-Length: 99999\r\n\r\n", b"#", 0.02),
        "endless-headers": Answer(OK_HEAD, b"X-Filler: " + b"x" * 1000 + b"\r\n"),
        "endless-body": Answer(OK_HEAD + b"\r\n", filler, 0.02),
        "large-body": Answer(OK_HEAD + b"\r\n", filler),
        "cut-body": Answer(OK_HEAD + b"Content-Length: 99999\r\n\r\n" + filler),
        "cut-chunks": Answer(chunked + b"4\r\na 1\n\r\n"),
        "wrong-chunks": Answer(chunked + b"four\r\na 1\n\r\n0\r\n\r\n"),
        "no-http": Answer(b"SSH-2.0-OpenSSH_9.2p1\r\n", stays=True),
        "switches": Answer(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\n\r\n", stays=True),
        "interim": Answer(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "redirects": redirect_to("http://127.0.0.2:9/metrics"),
        "redirect-loop": redirect_to("/redirect-loop"),
        "html": Answer(OK_HEAD + b"\r\n<html><body>It works!</body></html>\n"),
        "broken-gzip": Answer(OK_HEAD + b"Content-Encoding: gzip\r\n\r\nno gzip"),
        "gzip-bomb": Answer(bomb()),
        "unavailable": Answer(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"),
    }


class Fault(NamedTuple):
    """A fault of a target, and what docs/operation.md says of it. Status 0: a reset."""

    name: str
    title: str
    status: int
    reason: str
    at_deadline: bool = False
    large: bool = False  # expexp reads up to its limit of bytes
    script: str = ""  # of an exec module
    writer: str = ""  # a script that writes the FIFO $1 during each scrape

    @property
    def seconds(self) -> float:
        """Return the timeout of the module."""
        return DEADLINE_SECONDS if self.at_deadline else LONG_SECONDS

    @property
    def tries(self) -> int:
        """Return how often the target is scraped."""
        return LARGE_TRIES if self.large else TRIES


FAULTS = (
    Fault("refuses", "refuses connections", 502, "unreachable"),
    Fault("no-name", "its name does not resolve", 502, "unreachable"),
    Fault("full", "hangs before accept", 504, "timeout", True),
    Fault("hangs", "hangs after accept", 504, "timeout", True),
    Fault("hangs-tls", "hangs in the TLS handshake", 504, "timeout", True),
    Fault("drips-headers", "drips headers", 504, "timeout", True),
    Fault("drips-body", "drips the body", 504, "timeout", True),
    Fault("endless-headers", "headers without end", 502, "protocol"),
    Fault("endless-body", "a slow body without end", 504, "timeout", True),
    Fault("large-body", "a fast body without end", 502, "too_large", large=True),
    Fault("cut-body", "cuts the body", 502, "truncated"),
    Fault("cut-unverified", "cuts a body that is not verified", 0, "aborted"),
    Fault("cut-chunks", "no last chunk", 502, "truncated"),
    Fault("wrong-chunks", "wrong chunks", 502, "truncated"),
    Fault("no-http", "is no HTTP server", 502, "protocol"),
    Fault("switches", "answers with 101", 502, "protocol"),
    Fault("interim", "100 without end", 502, "protocol"),
    Fault("redirects", "redirects elsewhere", 502, "status"),
    Fault("redirect-loop", "redirects to itself", 502, "status"),
    Fault("html", "answers with HTML", 500, "malformed"),
    Fault("broken-gzip", "broken gzip", 500, "malformed"),
    Fault("gzip-bomb", "300 MiB in 300 KB of gzip", 502, "too_large", large=True),
    Fault("unavailable", "answers with 503", 503, "status"),
    Fault("exits", "a script exits with 3", 500, "command", script="echo a 1; exit 3"),
    Fault("killed", "a script is killed", 500, "command", script="echo a 1; kill -9 $$"),
    Fault("sleeps", "a script hangs", 504, "timeout", True, script=f"sleep {MARK}"),
    Fault("children", "a script leaves children", 200, "", script=f"sleep {MARK} & echo a 1"),
    Fault("stubborn", "a script that ignores TERM", 504, "timeout", True,
          script=f"trap '' TERM; while :; do sleep {MARK}; done"),
    Fault("yes", "a script writes without end", 502, "too_large", script="yes '# a'", large=True),
    Fault("missing", "the file is missing", 500, "file"),
    Fault("folder", "the file is a folder", 500, "file"),
    Fault("fifo", "a FIFO without a writer", 504, "timeout", True),
    Fault("fifo-cut", "a FIFO whose writer ends early", 500, "malformed",
          writer='printf "a 1\\nb" > "$1"'),
    Fault("fifo-held", "a FIFO whose writer hangs", 504, "timeout", True,
          writer=f'exec 3> "$1"; printf "a 1\\nb" >&3; exec sleep {MARK}'),
)  # fmt: skip


class Places(NamedTuple):
    """Where the ill targets are."""

    folder: Path
    port: int
    full_port: int


def module_of(fault: Fault, places: Places) -> dict[str, Any]:
    """Return the module for a fault."""
    timeout = f"{fault.seconds * 1000:.0f}ms"
    if fault.script:
        section = {"command": "/bin/sh", "args": ["-c", fault.script]}
        return {"method": "exec", "timeout": timeout, "exec": section}
    if fault.name in ("missing", "folder") or fault.name.startswith("fifo"):
        section = {"path": str(places.folder / fault.name)}
        return {"method": "file", "timeout": timeout, "file": section}
    target: dict[str, Any] = {"address": LOOPBACK, "port": places.port, "path": f"/{fault.name}"}
    changes: Mapping[str, dict[str, Any]] = {
        "refuses": {"port": free_port()},
        "no-name": {"address": "nowhere.invalid"},
        "full": {"port": places.full_port},
        "hangs-tls": {"scheme": "https", "tls_insecure_skip_verify": True},
        "cut-unverified": {"path": "/cut-body", "verify": False},
    }
    return {"method": "http", "timeout": timeout, "http": target | changes.get(fault.name, {})}


# The targets


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request of one connection as its path says."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        found = ILL[head.split(b" ", 2)[1].lstrip(b"/").partition(b"?")[0].decode()]
        writer.write(found.first)
        await writer.drain()
        while found.again:
            writer.write(found.again)
            await writer.drain()
            await asyncio.sleep(found.pause)
        if found.stays:
            await reader.read()
    writer.close()


ILL: dict[str, Answer] = {}


async def serve(port: int) -> None:
    """Serve the ill targets until the process is killed."""
    ILL.update(ill_answers())
    server = await asyncio.start_server(answer, LOOPBACK, port, backlog=1024)
    await server.serve_forever()


@contextlib.contextmanager
def full_listener() -> Iterator[int]:
    """Yield a port whose queue of connections is full: further ones are not answered at all."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        port: int = listener.getsockname()[1]
        for _ in range(20):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect((LOOPBACK, port))
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(client, selectors.EVENT_WRITE)
            if not selector.select(0.2):
                yield port
                return
        raise BenchError("a listener with a full queue still accepts connections")


# What is measured


class Result(NamedTuple):
    """What the tries of one fault gave."""

    statuses: list[int]
    seconds: list[float]
    failures: dict[str, float]
    left: str


def failures_of(service: Service, name: str) -> dict[str, float]:
    """Return how often a module has failed, by reason."""
    status, body = ask(service.port, "/metrics")
    if status != 200:
        raise BenchError(f"/metrics is answered with {status}")
    sample = rf'(?m)^expexp_proxy_failures_total\{{module="{name}",reason="(\w+)"\}} (\S+)$'
    found = re.findall(sample, body.decode())
    return {reason: float(value) for reason, value in found if float(value)}


def try_fault(service: Service, fault: Fault, folder: Path) -> Result:
    """Scrape an ill target several times; return what came, and what is left afterwards."""
    before = usage_of(service.pid)
    statuses: list[int] = []
    seconds: list[float] = []
    for _ in range(ROUNDS):
        seconds = []
        for _ in range(fault.tries):
            with writing(fault, folder / fault.name):
                started = time.monotonic()
                status, _ = ask(service.port, f"/proxy?module={fault.name}", 2 * LONG_SECONDS)
                seconds.append(time.monotonic() - started)
                statuses.append(status)
        if statistics.median(seconds) <= fault.seconds + LATE_SECONDS:
            break
    failures = failures_of(service, fault.name)
    return Result(statuses, seconds, failures, left_of(service, before))


@contextlib.contextmanager
def writing(fault: Fault, path: Path) -> Iterator[None]:
    """Run the script that writes the FIFO of a fault, if it has one."""
    if not fault.writer:
        yield
        return
    writer = subprocess.Popen(["/bin/sh", "-c", fault.writer, "sh", str(path)])
    try:
        yield
    finally:
        writer.kill()
        writer.wait()


def left_of(service: Service, before: Usage) -> str:
    """Wait until nothing is left of a fault; return what still is."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        now = usage_of(service.pid)
        marked = processes_with(MARK)
        if not marked and is_back_again(before, now):
            return ""
        if time.monotonic() > end:
            more = [f"{one - other:+.0f} {name}" for name, one, other in zip(NAMES, now, before)]
            return f"{', '.join(more)}, {marked} processes"
        time.sleep(0.05)


NAMES = ("MB", "descriptors", "threads", "children")


def is_back_again(before: Usage, now: Usage) -> bool:
    """Return whether a service holds what it held before."""
    return (
        now.megabytes <= before.megabytes + SPARE_MEGABYTES
        and now.descriptors <= before.descriptors + SPARE
        and now.threads <= before.threads + SPARE
        and not now.children
    )


def processes_with(mark: str) -> int:
    """Return how many processes have a mark in their command line."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += mark.encode() in file.read_bytes()
    return found


def figure_of(fault: Fault, result: Result) -> Figure:
    """Return the row of a fault. Of the times the median counts: a machine may be late at times."""
    late = [seconds - fault.seconds for seconds in result.seconds]
    median = statistics.median(late)
    expected = {fault.reason: float(len(result.statuses))} if fault.reason else {}
    bound = f"{fault.status or 'a reset'} {fault.reason}".rstrip()
    statuses = map(str, sorted(set(result.statuses)))
    words = [" ".join(filter(None, ["/".join(statuses), "/".join(result.failures)]))]
    holds = (
        set(result.statuses) == {fault.status}
        and result.failures == expected
        and median <= LATE_SECONDS
        and not result.left
    )
    if fault.at_deadline:
        holds = holds and min(late) >= 0
        bound += f", 0 to {LATE_SECONDS * 1000:.0f} ms late"
        words.append(f"{show(median * 1000)} ms late (at most {show(max(late) * 1000)})")
    else:
        words.append(f"after {show(statistics.median(result.seconds) * 1000)} ms")
    words.append(f"leaves {result.left or 'nothing'}")
    return Figure(fault.title, ", ".join(words), f"{bound}, leaves nothing", holds)


def attack_faults(bench: Bench) -> list[Figure]:
    """Scrape one ill target after the other."""
    folder = bench.folder / "ill"
    folder.mkdir()
    (folder / "folder").mkdir()
    for name in ("fifo", "fifo-cut", "fifo-held"):
        os.mkfifo(folder / name)
    with full_listener() as full_port:
        port = free_port()
        command = [sys.executable, __file__, str(port)]
        with process_running(command, bench.folder) as targets:
            wait_for_port(targets, port)
            places = Places(folder, port, full_port)
            modules = {fault.name: module_of(fault, places) for fault in FAULTS}
            with serving(bench, modules) as service:
                return [figure_of(fault, try_fault(service, fault, folder)) for fault in FAULTS]


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
