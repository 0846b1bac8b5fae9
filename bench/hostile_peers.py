"""The peers of `hostile.py`: targets, an honest scraper, hostile clients, expexp itself.

All of them listen and connect on the loopback. Every wait has an end.

    hostile_peers.py targets PORT                   # serve the bodies below until it is killed
    hostile_peers.py hostile-targets PORT           # the same with a lower priority
    hostile_peers.py sample PORT PATH SECONDS USER  # scrape every SECONDS, and print each try
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import http.client
import json
import math
import os
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar, cast

from compare import (
    BenchError,
    Process,
    free_port,
    memory,
    node_exposition,
    process_running,
    wait_for_port,
)
from difference_peers import Certificates, half_close, make_certificates

LOOPBACK = "127.0.0.1"
MEBIBYTE = 1 << 20
CONNECT_SECONDS = 2
ASK_SECONDS = 10
SAMPLE_SECONDS = 3600  # the life of a scraper that nobody ends
TRY_SECONDS = 10  # of one sample
HEALTHY = "/proxy?module=healthy"
TEXT = "text/plain; version=0.0.4"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
PROTOBUF = (
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
)


class MissingError(BenchError):
    """The machine lacks what an attack needs."""


# The targets


def answer_with(body: bytes, content_type: str = TEXT, *headers: str) -> bytes:
    """Return a whole HTTP answer with status 200."""
    lines = ["HTTP/1.1 200 OK", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "".join(line + "\r\n" for line in [*lines, *headers, ""]).encode() + body


def packed(body: bytes, content_type: str) -> bytes:
    """Return a whole answer whose body is compressed with gzip."""
    return answer_with(gzip.compress(body, mtime=0), content_type, "Content-Encoding: gzip")


def unit_body() -> bytes:
    """Return the line that was quadratic: 261 KB, 312 bytes in gzip."""
    return b"# UNIT " + b"_" * 174_000 + b" " + b"_" * 87_000 + b"a\n# EOF\n"


def varint(number: int) -> bytes:
    """Return a number in the encoding of protobuf."""
    pieces = bytearray()
    while number > 0x7F:
        pieces.append(number & 0x7F | 0x80)
        number >>= 7
    pieces.append(number)
    return bytes(pieces)


def delimited(content: bytes) -> bytes:
    """Return a message of protobuf after its length."""
    return varint(len(content)) + content


def protobuf_body(size: int) -> bytes:
    """Return one metric whose histogram has as many empty buckets as fit into the size."""
    buckets = b"\x1a\x00" * (size // 2)
    metric = b"\x3a" + delimited(buckets)
    return delimited(b"\x0a\x01a\x18\x04\x22" + delimited(metric))


def large_body(size: int) -> bytes:
    """Return an exposition of about this size."""
    line = b'family_total{code="200",method="GET",path="/api/v1/items"} %d.5\n'
    return b"".join(line % number for number in range(size // (len(line) + 4)))


def head_of(size: int) -> bytes:
    """Return an answer whose headers have about this size; none exceeds 64 KiB."""
    headers = [f"X-Filler-{number}: {'x' * 65_000}" for number in range(size // 65_000)]
    return answer_with(b"a 1\n", TEXT, *headers)


ANSWERS: Mapping[str, Callable[[], bytes]] = {
    "text": lambda: answer_with(node_exposition(devices=9, processors=30)),
    "unit": lambda: packed(unit_body(), OPENMETRICS),
    "protobuf": lambda: packed(protobuf_body(16 * MEBIBYTE), PROTOBUF),
    "protobuf-half": lambda: packed(protobuf_body(8 * MEBIBYTE), PROTOBUF),
    "large": lambda: answer_with(large_body(50_000_000)),
    "megabyte": lambda: answer_with(large_body(1_000_000)),
    "large-gzip": lambda: packed(large_body(50_000_000), TEXT),
    "head": lambda: head_of(6_200_000),
    "broken": lambda: answer_with(b"a one\n"),
}


@functools.cache
def answer_for(name: str) -> bytes:
    """Return the answer of a name in the table."""
    return ANSWERS[name]()


async def answer_requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer what one connection asks for.

    `/silent` is never answered, `/slow` after 0.3 s, `/drip` for ever, `/flapping` is broken every
    other time.
    """
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            name = head.split(b" ", 2)[1].lstrip(b"/").partition(b"?")[0].decode()
            if name == "silent":
                await reader.read()
                break
            if name == "slow":
                await asyncio.sleep(0.3)
                name = "text"
            if name == "flapping":
                name = next(FLAPPING)
            if name == "drip":
                await drip(writer)
                break
            await send(writer, answer_for(name))
    writer.close()


async def drip(writer: asyncio.StreamWriter) -> None:
    """Send a byte every 50 ms, for a minute at most."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
    for _ in range(1200):
        writer.write(b"#")
        await writer.drain()
        await asyncio.sleep(0.05)


def flap() -> Iterator[str]:
    """Yield the two answers of a target that is ill every other time."""
    while True:
        yield "broken"
        yield "text"


FLAPPING = flap()


async def send(writer: asyncio.StreamWriter, answer: bytes) -> None:
    """Send an answer in pieces, so that no copy of the whole of it is made."""
    view = memoryview(answer)
    for start in range(0, len(view), MEBIBYTE):
        writer.write(view[start : start + MEBIBYTE])
        await writer.drain()


async def serve_targets(port: int) -> None:
    """Serve the targets until the process is killed."""
    server = await asyncio.start_server(answer_requests, LOOPBACK, port, backlog=1024)
    await server.serve_forever()


@contextlib.contextmanager
def targets_running(folder: Path, kind: str) -> Iterator[int]:
    """Start a process with the targets, and yield its port."""
    port = free_port()
    command = [sys.executable, __file__, kind, str(port)]
    with process_running(command, folder) as process:
        wait_for_port(process, port)
        yield port


# The honest scraper: a process of its own, so that no attacker's thread holds its interpreter lock


class Samples(NamedTuple):
    """What an honest scraper saw: when each try began, the seconds that it took, the status."""

    starts: list[float]
    seconds: list[float]
    statuses: list[int]
    interval: float
    control: float  # the 99th percentile, in seconds, of an expexp that nobody attacked meanwhile
    control_median: float

    @property
    def failed(self) -> int:
        """Return how many tries had no answer with status 200."""
        return sum(status != 200 for status in self.statuses)

    def percentile(self, share: float) -> float:
        """Return the seconds that this share of scrapes takes, one in each interval.

        A scraper that waits 8 s for one answer has one sample, where one scrape in each interval
        would have had hundreds. These are added, each as much shorter as it would have begun later.
        A try that failed counts as the longest that there can be.
        """
        values: list[float] = []
        for seconds, status in zip(self.seconds, self.statuses):
            left = seconds if status == 200 else TRY_SECONDS
            values.append(left)
            lost = int(seconds / self.interval)
            values += (left - number * self.interval for number in range(1, lost + 1))
        values.sort()
        return values[math.ceil(share * len(values)) - 1] if values else math.inf

    def longest_outage(self, end: float) -> float:
        """Return the longest time from the start of a try to the end of the next good one."""
        longest = 0.0
        since: float | None = None
        for start, seconds, status in zip(self.starts, self.seconds, self.statuses):
            since = start if since is None else since
            if status == 200:
                longest = max(longest, start + seconds - since)
                since = None
        return longest if since is None else max(longest, end - since)


class Scraper:
    """A running honest scraper."""

    def __init__(self, process: Process, interval: float, control: Scraper | None) -> None:
        """Read what the process prints from now on."""
        self._process = process
        self._interval = interval
        self._control = control
        self.restart()

    def restart(self) -> None:
        """Forget the samples so far."""
        self._started = time.monotonic()
        if self._control:
            self._control.restart()

    def samples(self) -> Samples:
        """Return the samples so far; a try that is under way counts with the time that it took."""
        control = self._control.samples() if self._control else Samples([0], [0], [200], 1, 0, 0)
        figures = control.percentile(0.99), control.percentile(0.5)
        samples = Samples([], [], [], self._interval, *figures)
        now = time.monotonic()
        done = self._started
        for line in self._process.errors.read_text(encoding="ascii").splitlines():
            parts = line.split()
            if len(parts) == 3 and float(parts[0]) >= self._started:
                add_sample(samples, float(parts[0]), float(parts[1]), int(parts[2]))
                done = float(parts[0]) + float(parts[1])
        if now - done > self._interval + 0.1:
            add_sample(samples, done, now - done, 200 if now - done < TRY_SECONDS else 0)
        return samples


def add_sample(samples: Samples, start: float, seconds: float, status: int) -> None:
    """Add one try."""
    samples.starts.append(start)
    samples.seconds.append(seconds)
    samples.statuses.append(status)


@contextlib.contextmanager
def scraping(service: Service, interval: float = 0.01, path: str = HEALTHY) -> Iterator[Scraper]:
    """Scrape a healthy module in a process of its own; wait for the first samples."""
    command = [sys.executable, __file__, "sample", str(service.port), path, str(interval)]
    command.append(service.authorization)
    with process_running(command, service.folder) as process:
        end = time.monotonic() + ASK_SECONDS
        while process.errors.read_bytes().count(b"\n") < 5:
            process.require_alive()
            if time.monotonic() > end:
                raise BenchError("a healthy module is not served before the attack")
            time.sleep(0.02)
        yield Scraper(process, interval, service.control)


def sample(port: int, path: str, interval: float, authorization: str) -> None:
    """Scrape in turns over a kept connection and a new one, and print each try."""
    headers = {"X-Prometheus-Scrape-Timeout-Seconds": "10"}
    if authorization:
        headers["Authorization"] = authorization
    kept: http.client.HTTPConnection | None = None
    patience = TRY_SECONDS if interval < 0.1 else 1
    end = time.monotonic() + SAMPLE_SECONDS
    number = 0
    while time.monotonic() < end:
        number += 1
        started = time.monotonic()
        connection = kept or http.client.HTTPConnection(LOOPBACK, port, timeout=patience)
        status = try_scrape(connection, path, headers)
        if not status and kept:  # as Prometheus: a kept connection may have been closed meanwhile
            connection.close()
            connection = http.client.HTTPConnection(LOOPBACK, port, timeout=patience)
            status = try_scrape(connection, path, headers)
        took = time.monotonic() - started
        print(f"{started:.6f} {took:.6f} {status}", flush=True)
        kept = connection if number % 2 and status else None
        if not kept:
            connection.close()
        time.sleep(max(0.0, started + interval - time.monotonic()))


def try_scrape(
    connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str]
) -> int:
    """Return the status of a scrape whose body is complete, or 0."""
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        return 0
    return response.status


# Hostile clients


def request_bytes(path: str, *headers: str, method: str = "GET") -> bytes:
    """Return the bytes of a request after whose answer the connection ends."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, ""]
    return "".join(line + "\r\n" for line in lines).encode()


Result = TypeVar("Result")


def as_attacker(work: Callable[[], Result]) -> Result:
    """Do some work in a thread that gets less processor time than others, and return its result."""
    with ThreadPoolExecutor(1, initializer=lower_priority) as pool:
        return pool.submit(work).result()


def lower_priority() -> None:
    """Take processor time from this thread in favour of expexp and its honest scraper.

    A hostile client has a machine of its own. Here it must not take the time that the measured
    ones need.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def open_clients(
    port: int, request: bytes, count: int, context: ssl.SSLContext | None = None
) -> list[socket.socket]:
    """Open connections and send a request on each; stop at the first one that is refused."""

    def work() -> list[socket.socket]:
        clients: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while len(clients) < count:
                clients.append(open_client(port, request, context))
        return clients

    return as_attacker(work)


def open_client(port: int, request: bytes, context: ssl.SSLContext | None) -> socket.socket:
    """Open a connection and send a request; raise OSError if nobody accepts it."""
    client = socket.create_connection((LOOPBACK, port), timeout=CONNECT_SECONDS)
    with contextlib.suppress(OSError):  # closed already: there is no slot for it
        if context:
            client = context.wrap_socket(client, server_hostname="localhost")
        client.sendall(request)
    return client


def close_all(clients: Sequence[socket.socket], half: bool = False) -> None:
    """Close connections, or their sending direction alone."""
    for client in clients:
        if half:
            half_close(client)
        else:
            client.close()


def read_statuses(clients: Sequence[socket.socket], seconds: float) -> list[int]:
    """Return the statuses of the answers that are complete in time; 0: closed without one.

    The connections are closed.
    """
    return as_attacker(lambda: collect_statuses(clients, time.monotonic() + seconds))


def collect_statuses(clients: Sequence[socket.socket], end: float) -> list[int]:
    """Read from all connections until they have ended, or the time is over; close them."""
    statuses: list[int] = []
    firsts: dict[int, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for client in clients:
            client.setblocking(False)
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(0.1):
                piece = receive(cast(socket.socket, key.fileobj))
                if piece:
                    firsts[key.fd] = (firsts.get(key.fd, b"") + piece)[:12]
                elif piece is not None:
                    selector.unregister(key.fileobj)
                    first = firsts.get(key.fd, b"")
                    statuses.append(int(first[9:12]) if len(first) == 12 else 0)
    close_all(clients)
    return statuses


def receive(client: socket.socket) -> bytes | None:
    """Return the next bytes, nothing at the end, or None if there are none now."""
    try:
        return client.recv(1 << 18)
    except (BlockingIOError, ssl.SSLWantReadError):
        return None
    except OSError:
        return b""


def ask_many(port: int, request: bytes, count: int, seconds: float) -> list[int]:
    """Send a request on each of several connections at once; return the statuses that came."""
    return read_statuses(open_clients(port, request, count), seconds)


def ask(
    port: int, path: str, seconds: float = ASK_SECONDS, authorization: str = ""
) -> tuple[int, bytes]:
    """Return status and body of one request; 0 if there is no answer."""
    headers = {"Authorization": authorization} if authorization else {}
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=seconds)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


# expexp


class Usage(NamedTuple):
    """What a process holds."""

    megabytes: float
    descriptors: int
    threads: int
    children: int


def usage_of(pid: int) -> Usage:
    """Return what a process holds, as /proc says; raise OSError when it has ended."""
    folder = Path(f"/proc/{pid}")
    children = " ".join(read_or_nothing(file) for file in folder.glob("task/*/children"))
    return Usage(
        memory(pid, "VmRSS") * MEBIBYTE / 1e6,
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
        len(children.split()),
    )


def read_or_nothing(file: Path) -> str:
    """Return the text of a file of a thread, which may have ended."""
    with contextlib.suppress(OSError):
        return file.read_text(encoding="ascii")
    return ""


@dataclass
class Service:
    """An expexp that runs, and what it held before the attack."""

    process: Process
    folder: Path
    port: int
    tls_port: int
    authorization: str
    before: Usage
    control: Scraper | None
    pid: int

    @property
    def runs(self) -> bool:
        """Return whether the process has not ended."""
        return self.process.popen.poll() is None

    def metric(self, name: str) -> float:
        """Return the sum of the samples of a metric of expexp's own; nan without an answer."""
        status, body = ask(self.port, "/metrics", authorization=self.authorization)
        found = re.findall(rf"(?m)^{name}(?:\{{.*\}})? (\S+)$", body.decode())
        return sum(map(float, found)) if status == 200 else math.nan

    def log_size(self) -> int:
        """Return the bytes of the log so far."""
        return self.process.errors.stat().st_size

    def log_lines(self) -> int:
        """Return the lines of the log so far."""
        return self.process.errors.read_bytes().count(b"\n")

    def end(self, seconds: float) -> float:
        """Send SIGTERM; return the seconds to the end of the process, inf if it stays."""
        started = time.monotonic()
        if self.runs:
            os.kill(self.pid, signal.SIGTERM)
        try:
            self.process.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return math.inf
        return time.monotonic() - started


class Bench(NamedTuple):
    """What all attacks share: the file, the interpreter, a folder and the targets."""

    expexp: Path
    python: str
    folder: Path
    certificates: Certificates
    healthy_port: int
    hostile_port: int
    repeats: int  # of the attack that is repeated most
    slow_seconds: float  # of each attack with slow clients
    control: Scraper | None = None
    require_all: bool = True  # an attack that this machine does not allow counts as failed

    def http(self, name: str, **settings: Any) -> dict[str, Any]:
        """Return an http module that leads to a hostile target."""
        section = {"address": LOOPBACK, "port": self.hostile_port, "path": f"/{name}"}
        verify = settings.pop("verify", True)
        return {"method": "http", "http": {**section, "verify": verify}, **settings}


@contextlib.contextmanager
def open_bench(expexp: Path, python: str, repeats: int, slow_seconds: float) -> Iterator[Bench]:
    """Start the targets and an expexp that nobody attacks, and end them at the end.

    All files are in a temporary folder.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        healthy = stack.enter_context(targets_running(folder, "targets"))
        hostile = stack.enter_context(targets_running(folder, "hostile-targets"))
        certificates = make_certificates(folder)
        lengths = repeats, slow_seconds
        bench = Bench(expexp, python, folder, certificates, healthy, hostile, *lengths)
        bystander = stack.enter_context(serving(bench, {}))
        control = stack.enter_context(scraping(bystander, interval=0.02))
        yield bench._replace(control=control)


@contextlib.contextmanager
def serving(
    bench: Bench,
    modules: Mapping[str, Any],
    *flags: str,
    wrapper: Sequence[str] = (),
    authorization: str = "",
    port: int = 0,
) -> Iterator[Service]:
    """Start expexp with these modules and a healthy one, and kill it at the end."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    write_modules(bench, folder, modules)
    port, tls_port = port or free_port(), free_port()
    command = [*wrapper, bench.python, str(bench.expexp), "-config=expexp.json"]
    command.append(f"-web.listen-address={LOOPBACK}:{port}")
    command += flags
    if any(flag.startswith("-web.tls.cert=") for flag in flags):
        command.append(f"-web.tls.listen-address={LOOPBACK}:{tls_port}")
    with process_running(command, folder) as process:
        wait_for_port(process, port)
        for path in (HEALTHY, "/metrics", "/"):
            ask(port, path, authorization=authorization)
        process.require_alive()  # another process may listen there
        pid = pid_behind(process.popen.pid)
        before = usage_of(pid)
        yield Service(process, folder, port, tls_port, authorization, before, bench.control, pid)


def write_modules(bench: Bench, folder: Path, modules: Mapping[str, Any]) -> None:
    """Write the configuration of a service, with a healthy module before these."""
    section = {"address": LOOPBACK, "port": bench.healthy_port, "path": "/text"}
    document = {"modules": {"healthy": {"method": "http", "http": section}, **modules}}
    (folder / "expexp.json").write_text(json.dumps(document), encoding="utf-8")


def pid_behind(pid: int) -> int:
    """Return the process that `unshare --fork` has made, or the process itself."""
    while read_or_nothing(Path(f"/proc/{pid}/comm")) == "unshare\n":
        pid = int(read_or_nothing(Path(f"/proc/{pid}/task/{pid}/children")).split()[0])
    return pid


# A file system that hangs


class Hang(NamedTuple):
    """A folder whose files hang while a file exists, and the command that preloads the library."""

    folder: Path
    switch: Path
    wrapper: list[str]


def build_hang(bench: Bench, call: str) -> Hang:
    """Build the library that makes `stat`, `open` or `read` hang in a folder; make that folder."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise BenchError("gcc not found: install Debian's gcc")
    library = bench.folder / "hang.so"
    source = Path(__file__).with_name("hostile_hang.c")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    folder = Path(tempfile.mkdtemp(dir=bench.folder, prefix="hung-"))
    switch = Path(f"{folder}.hangs")
    (folder / "a.prom").write_text("a 1\n", encoding="utf-8")
    environment = {
        "LD_PRELOAD": library,
        "HANG_CALL": call,
        "HANG_PREFIX": f"{folder}/",
        "HANG_WHILE": switch,
    }
    return Hang(folder, switch, ["env", *(f"{key}={value}" for key, value in environment.items())])


def main() -> None:
    """Be the targets or an honest scraper."""
    if sys.argv[1] == "hostile-targets":
        lower_priority()
    if sys.argv[1] != "sample":
        asyncio.run(serve_targets(int(sys.argv[2])))
    else:
        sample(int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5])


if __name__ == "__main__":
    main()
