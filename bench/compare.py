"""Measure expexp beside exporter_exporter, with nginx as the floor, and print a Markdown table.

    .venv/bin/python bench/compare.py             # every workload, about seven minutes
    .venv/bin/python bench/compare.py --short     # one connection, five workloads

bench/README.md says what each row means and how to measure another interpreter or another file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import trustme

REPOSITORY = Path(__file__).resolve().parent.parent

PEER = "exporter_exporter"
OURS = "expexp"
AGAINST = "against"
FLOOR = "nginx"
OWN_TEXT = "expexp, text"

# Debian's names: the program, and the package that brings it.
PACKAGES = {
    "prometheus-exporter-exporter": "prometheus-exporter-exporter",
    "nginx": "nginx-light",
    "wrk": "wrk",
}

# The headers that Prometheus 2.42 sends with a scrape timeout of 10 s.
SCRAPE_HEADERS = {
    "User-Agent": "Prometheus/2.42.0",
    "Accept": (
        "application/openmetrics-text;version=1.0.0,"
        "application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    ),
    "Accept-Encoding": "gzip",
    "X-Prometheus-Scrape-Timeout-Seconds": "10",
}

START_SECONDS = 20
ANSWER_SECONDS = 60
SETTLE_SECONDS = 5
REAP_SECONDS = 5
SLOW_SECONDS = 1.0
# The part of a length by which answers may differ whose length varies.
VARYING_LENGTH = 0.1


class BenchError(Exception):
    """A premise of the measurement does not hold, so there is no result."""


class RefusedError(BenchError):
    """A program does not take the configuration, or does not serve the form of the body."""


@dataclass(frozen=True)
class Workload:
    """What the programs are asked for, and how often.

    A round of latency has `requests`, and there are `repeats` times as many rounds as for load:
    short rounds that alternate see the same disturbances of a busy machine.
    """

    name: str
    title: str
    method: str = "http"
    body: str = "text"
    verify: bool = True
    tls: bool = False
    has_floor: bool = False
    peer_may_refuse: bool = False
    encoding: str = "gzip"
    requests: int = 50
    repeats: int = 3
    connections: tuple[int, ...] = ()
    together: int = 0


TEXT = Workload("text", "57 KB text, verified", has_floor=True, connections=(8, 64))

WORKLOADS = (
    TEXT,
    Workload(
        "unverified",
        "57 KB text, unverified",
        verify=False,
        has_floor=True,
        connections=(8, 64),
    ),
    Workload(
        "gzip",
        "57 KB text, gzip, verified",
        body="gzip",
        has_floor=True,
        connections=(8, 64),
    ),
    Workload("tls", "57 KB text, verified, mutual TLS", tls=True, has_floor=True),
    Workload(
        "openmetrics",
        "57 KB OpenMetrics, verified",
        body="openmetrics",
        peer_may_refuse=True,
        connections=(8,),
    ),
    Workload(
        "exec",
        "exec /bin/echo",
        method="exec",
        body="echo",
        encoding="identity",
        requests=150,
        repeats=1,
        connections=(8,),
    ),
    Workload("exec-gzip", "exec cat of 57 KB, answered in gzip", method="exec"),
    Workload(
        "file",
        "file of 57 KB",
        method="file",
        peer_may_refuse=True,
        encoding="identity",
        connections=(8,),
    ),
    Workload("file-gzip", "file of 57 KB, answered in gzip", method="file", peer_may_refuse=True),
    Workload("metrics", "/metrics", method="metrics", connections=(8,)),
    Workload(
        "large",
        "100,000 samples, verified",
        body="large",
        has_floor=True,
        requests=4,
        repeats=1,
        together=8,
    ),
    Workload("slow", "64 targets of 1 s", body="slow", requests=0, together=64),
)

SHORT = ("text", "gzip", "tls", "exec", "large")
STARTS = "start"


# The bodies of the targets


NODE_AREAS = ("memory", "netstat", "vmstat", "sockstat", "filefd", "pressure", "timex", "xfs")
NODE_STATES = ("active", "bounce", "cached", "dirty", "free", "huge", "inactive", "locked")
NODE_KINDS = ("anonymous", "file", "total")
NETWORK_DIRECTIONS = ("receive", "transmit")
NETWORK_KINDS = ("bytes", "compressed", "drop", "errs", "fifo", "frame", "nohandler", "packets")
CPU_MODES = ("idle", "iowait", "irq", "nice", "softirq", "steal", "system", "user")
MARKER = b"node_memory_active_anonymous_bytes 1.048576e+06\n"


def node_exposition(devices: int, processors: int) -> bytes:
    """Return a text exposition of the families that node_exporter has."""
    lines: list[str] = []
    for area in NODE_AREAS:
        kind = "untyped" if area == "vmstat" else "gauge"
        for number, (state, name) in enumerate(product(NODE_STATES, NODE_KINDS), 1):
            family = f"node_{area}_{state}_{name}_bytes"
            lines.append(f"# HELP {family} Field {state} {name} of the {area} statistics.")
            lines.append(f"# TYPE {family} {kind}")
            lines.append(f"{family} {1.048576 * number}e+06")
    for direction, name in product(NETWORK_DIRECTIONS, NETWORK_KINDS):
        family = f"node_network_{direction}_{name}_total"
        lines.append(f"# HELP {family} Network device statistic {direction} {name}.")
        lines.append(f"# TYPE {family} counter")
        lines += (
            f'{family}{{device="veth{device}"}} {device * 40961}' for device in range(devices)
        )
    lines.append("# HELP node_cpu_seconds_total Seconds the CPUs spent in each mode.")
    lines.append("# TYPE node_cpu_seconds_total counter")
    for processor in range(processors):
        lines += (
            f'node_cpu_seconds_total{{cpu="{processor}",mode="{mode}"}} {processor * 31}.25'
            for mode in CPU_MODES
        )
    return "".join(line + "\n" for line in lines).encode()


EXEMPLAR_FAMILY = b"""\
# HELP node_scrape_collector_seconds Time that collectors took.
# TYPE node_scrape_collector_seconds histogram
node_scrape_collector_seconds_bucket{le="0.1"} 17 # {trace_id="4bf92f3577b34da6"} 0.067
node_scrape_collector_seconds_bucket{le="+Inf"} 18
node_scrape_collector_seconds_count 18
node_scrape_collector_seconds_sum 1.5
# EOF
"""


def to_openmetrics(text: bytes) -> bytes:
    """Return the same families in OpenMetrics, and one histogram with an exemplar."""
    without_suffix = re.sub(rb"(?m)^(# (?:HELP|TYPE) \w+)_total ", rb"\1 ", text)
    unknown = re.sub(rb"(?m)^(# TYPE \w+) untyped$", rb"\1 unknown", without_suffix)
    return unknown + EXEMPLAR_FAMILY


def make_bodies() -> dict[str, bytes]:
    """Return the bodies of the targets by name, as they are sent."""
    text = node_exposition(devices=9, processors=30)
    assert 55_000 < len(text) < 59_000, len(text)
    assert MARKER in text
    large = node_exposition(devices=3_500, processors=5_475)
    samples = sum(not line.startswith(b"#") for line in large.splitlines())
    assert 99_900 < samples < 100_100, samples
    return {
        "text": text,
        "gzip": gzip.compress(text, mtime=0),
        "openmetrics": to_openmetrics(text),
        "large": large,
        "echo": b"up 1\n",
        "slow": b"up 1\n",
        "broken": b"up one\n",
    }


# The site: a temporary folder with certificates, and the targets


@dataclass(frozen=True)
class Site:
    """What all programs share: files, certificates and the ports of the targets."""

    folder: Path
    bodies: dict[str, bytes]
    target_port: int
    slow_port: int
    client: ssl.SSLContext
    stranger: ssl.SSLContext


def find_program(name: str) -> str:
    """Return the path of a program, also from the folders of system programs."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        package = PACKAGES[name]
        print(f"bench/compare.py: {name} not found: install Debian's {package}", file=sys.stderr)
        sys.exit(2)
    return found


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def make_certificates(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Write the server's files, and return a client with a certificate and one without."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    server.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    server.private_key_pem.write_to_path(str(folder / "key.pem"))
    (folder / "key.pem").chmod(0o600)
    stranger = ssl.create_default_context()
    authority.configure_trust(stranger)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    identity = authority.issue_cert("prometheus.example.org")
    with identity.private_key_and_cert_chain_pem.tempfile() as file:
        client.load_cert_chain(file)
    return client, stranger


NGINX = """\
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  keepalive_requests 10000000;
  keepalive_timeout 300;
  types { }
  %s
}
"""

# `localhost` and not an address: the default of a module is to ask `localhost`, and a program that
# tries ::1 first must find the target there, as it finds a real exporter.
NGINX_TARGET = """\
  default_type "text/plain; version=0.0.4; charset=utf-8";
  server {{
    listen localhost:{port};
    root "{root}";
    location /gzip {{ add_header Content-Encoding gzip; }}
    location /openmetrics {{
      default_type "application/openmetrics-text; version=1.0.0; charset=utf-8";
    }}
  }}
"""

NGINX_PROXY = """\
  upstream target {{ server 127.0.0.1:{target_port}; keepalive 64; }}
  server {{
    listen {address}{tls};
    location / {{ return 200; }}
    location /proxy {{
      proxy_pass http://target/{body};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_max_temp_file_size 0;
    }}
  }}
"""

NGINX_TLS = """ ssl;
    ssl_certificate "{folder}/cert.pem";
    ssl_certificate_key "{folder}/key.pem";
    ssl_client_certificate "{folder}/ca.pem";
    ssl_verify_client on"""


def nginx_command(folder: Path, configuration: str) -> list[str]:
    """Write the configuration, and return the command that runs nginx with it."""
    file = folder / "nginx.conf"
    file.write_text(NGINX % configuration, encoding="utf-8")
    return [find_program("nginx"), "-p", str(folder), "-c", str(file), "-e", "stderr"]


async def answer_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each request of one connection after a second."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nup 1\n"
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(SLOW_SECONDS)
            writer.write(answer)
            await writer.drain()
    writer.close()


async def serve_slowly(port: int) -> None:
    """Serve the slow target until the process is killed."""
    server = await asyncio.start_server(answer_slowly, "localhost", port, backlog=256)
    await server.serve_forever()


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """Start the targets, and end them."""
    client, stranger = make_certificates(folder)
    root = folder / "bodies"
    root.mkdir()
    bodies = make_bodies()
    for name, body in bodies.items():
        (root / name).write_bytes(body)
    site = Site(folder, bodies, free_port(), free_port(), client, stranger)
    static = nginx_command(folder, NGINX_TARGET.format(port=site.target_port, root=root))
    slow = [sys.executable, __file__, "--serve-slowly", str(site.slow_port)]
    with process_running(static, folder) as target, process_running(slow, folder) as sleeper:
        wait_for_port(target, site.target_port)
        wait_for_port(sleeper, site.slow_port)
        yield site


# Processes, and what /proc says about them


class Process(NamedTuple):
    """A process that this script started, and the file with its stderr."""

    popen: subprocess.Popen[bytes]
    errors: Path
    started: float

    def require_alive(self) -> None:
        """Raise RefusedError with the last line of stderr if the process has ended."""
        if self.popen.poll() is not None:
            lines = self.errors.read_text(encoding="utf-8", errors="replace").splitlines()
            raise RefusedError(f"exit status {self.popen.returncode}: {''.join(lines[-1:])}")


@contextlib.contextmanager
def process_running(command: Sequence[str], folder: Path) -> Iterator[Process]:
    """Run a command, and kill that process at the end."""
    errors = Path(tempfile.mkdtemp(dir=folder)) / "stderr"
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with errors.open("wb") as file:
        started = time.perf_counter()
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=folder,
            env=environment,
        )
    try:
        yield Process(popen, errors, started)
    finally:
        popen.kill()
        popen.wait()


def wait_for_port(process: Process, port: int) -> None:
    """Return when the process accepts connections."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        process.require_alive()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise BenchError(f"nothing listens on port {port} after {START_SECONDS} s")


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, its ended threads and its reaped children.

    The clock of the process counts nanoseconds. Its number is made as clock_getcpuclockid(3) makes
    it. Children are counted in ticks of 10 ms.
    """
    own = time.clock_gettime((~pid << 3) | 2)
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    children = int(fields[13]) + int(fields[14])
    return own + children / os.sysconf("SC_CLK_TCK")


def context_switches(pid: int) -> int:
    """Return the context switches of the living threads, voluntary or not."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (task / "status").read_text(encoding="utf-8")
            total += sum(map(int, re.findall(r"ctxt_switches:\s*(\d+)", status)))
    return total


def has_children(pid: int) -> bool:
    """Return whether a thread of a process has children. Threads may end meanwhile."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if file.read_text():
                return True
    return False


def wait_for_reaping(pid: int) -> None:
    """Return when a process has reaped its children: only then is their time counted as its own.

    expexp reaps a command half a second after its end.
    """
    end = time.monotonic() + REAP_SECONDS
    while has_children(pid):
        if time.monotonic() > end:
            raise BenchError(f"process {pid} has children left after {REAP_SECONDS} s")
        time.sleep(0.02)


def memory(pid: int, key: str) -> float:
    """Return VmRSS or VmHWM of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(rf"(?m)^{key}:\s*(\d+) kB$", status)
    assert found, key
    return int(found[1]) / 1024


def settled_memory(pid: int) -> float:
    """Return the resident memory in MiB when it has stood still for half a second."""
    end = time.monotonic() + SETTLE_SECONDS
    previous, unchanged = -1.0, 0
    while time.monotonic() < end and unchanged < 5:
        time.sleep(0.1)
        now = memory(pid, "VmRSS")
        unchanged = unchanged + 1 if now == previous else 0
        previous = now
    return previous


# A client that costs little


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    head: bytes
    body: bytes

    def decoded(self) -> bytes:
        """Return the body without gzip."""
        if re.search(rb"(?i)\r\ncontent-encoding: *gzip\r\n", self.head):
            return gzip.decompress(self.body)
        return self.body


CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")
CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked\r\n")


class Connection:
    """A keep-alive connection, as Prometheus has one to each of its targets."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext | None = None) -> None:
        """Connect, with TLS if there is a context."""
        self._socket = socket.create_connection(address, timeout=ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            self._socket = context.wrap_socket(self._socket, server_hostname=address[0])

    def __enter__(self) -> Connection:
        """Return the connection."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the connection."""
        self._socket.close()

    def ask(self, request: bytes) -> Answer:
        """Send a request, and return its answer."""
        self._socket.sendall(request)
        data = self._receive()
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._receive()
        head, rest = data[: end + 4], data[end + 4 :]
        length = CONTENT_LENGTH.search(head)
        if length:
            body = self._read_length(rest, int(length[1]))
        elif CHUNKED.search(head):
            body = self._read_chunks(rest)
        else:
            raise BenchError(f"an answer without a length: {head!r}")
        return Answer(int(head[9:12]), head, body)

    def _receive(self) -> bytes:
        """Return the next bytes."""
        data = self._socket.recv(1 << 20)
        if not data:
            raise BenchError("the connection was closed within an answer")
        return data

    def _read_length(self, first: bytes, length: int) -> bytes:
        """Return a body of a known length, whose first bytes are here."""
        pieces = [first]
        missing = length - len(first)
        while missing > 0:
            piece = self._receive()
            pieces.append(piece)
            missing -= len(piece)
        if missing < 0:
            raise BenchError(f"{-missing} bytes more than announced")
        return b"".join(pieces)

    def _read_chunks(self, data: bytes) -> bytes:
        """Return a chunked body, whose first bytes are here."""
        pieces: list[bytes] = []
        while True:
            while (end := data.find(b"\r\n")) < 0:
                data += self._receive()
            size = int(data[:end], 16)
            data = data[end + 2 :]
            missing = size + 2 - len(data)
            if missing > 0:
                waiting = [data]
                while missing > 0:
                    waiting.append(self._receive())
                    missing -= len(waiting[-1])
                data = b"".join(waiting)
            if not size:
                return b"".join(pieces)
            pieces.append(data[:size])
            data = data[size + 2 :]


def make_request(path: str, encoding: str = "gzip") -> bytes:
    """Return the bytes of a scrape by a client that accepts an encoding."""
    headers = {"Host": "127.0.0.1", **SCRAPE_HEADERS, "Accept-Encoding": encoding}
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "".join(line + "\r\n" for line in [*lines, ""]).encode()


# The programs


@dataclass(frozen=True)
class Launch:
    """What a program needs to be started for one workload."""

    site: Site
    workload: Workload
    folder: Path
    port: int

    @property
    def address(self) -> str:
        """Return the address to listen on."""
        return f"127.0.0.1:{self.port}"


class Program:
    """A program under test."""

    label: str
    health: str

    def command(self, launch: Launch) -> list[str]:
        """Write the configuration, and return the command that starts the program."""
        raise NotImplementedError


class ExporterExporter(Program):
    """The peer."""

    label = PEER
    health = "/"

    def command(self, launch: Launch) -> list[str]:
        """Write the configuration, and return the command."""
        return [find_program("prometheus-exporter-exporter"), *proxy_flags(launch)]


@dataclass(frozen=True)
class Expexp(Program):
    """An expexp.py, as a script or as a compiled module."""

    label: str
    python: str
    file: Path
    as_module: bool
    health: str = "/-/healthy"

    def command(self, launch: Launch) -> list[str]:
        """Write the configuration, and return the command."""
        if not self.as_module:
            return [self.python, str(self.file), *proxy_flags(launch)]
        folder = self._compile(launch)
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); import expexp; "
        return [self.python, "-I", "-c", code + "sys.exit(expexp.main())", *proxy_flags(launch)]

    def _compile(self, launch: Launch) -> Path:
        """Return a folder with the module and its bytecode, which is made once."""
        folder = launch.site.folder / f"module-{self.label}"
        if not folder.exists():
            folder.mkdir()
            shutil.copy(self.file, folder / "expexp.py")
            subprocess.run([self.python, "-m", "compileall", "-q", str(folder)], check=True)
        return folder


class Nginx(Program):
    """A plain proxy, which verifies nothing: the floor."""

    label = FLOOR
    health = "/"

    def command(self, launch: Launch) -> list[str]:
        """Write the configuration, and return the command."""
        site = launch.site
        tls = NGINX_TLS.format(folder=site.folder) if launch.workload.tls else ""
        server = NGINX_PROXY.format(
            target_port=site.target_port,
            address=launch.address,
            tls=tls,
            body=launch.workload.body,
        )
        return nginx_command(launch.folder, server)


def proxy_flags(launch: Launch) -> list[str]:
    """Write a configuration that both proxies read, and return the flags that both take."""
    file = launch.folder / "expexp.yaml"
    modules = make_modules(launch.workload, launch.site)
    file.write_text(json.dumps({"modules": modules}), encoding="utf-8")
    flags = [f"-config.file={file}"]
    if not launch.workload.tls:
        return [*flags, f"-web.listen-address={launch.address}"]
    certificates = launch.site.folder
    return [
        *flags,
        "-web.listen-address=",
        f"-web.tls.listen-address={launch.address}",
        "-web.tls.verify",
        f"-web.tls.cert={certificates / 'cert.pem'}",
        f"-web.tls.key={certificates / 'key.pem'}",
        f"-web.tls.ca={certificates / 'ca.pem'}",
    ]


def make_modules(workload: Workload, site: Site) -> dict[str, dict[str, Any]]:
    """Return the modules of a workload: those to measure, and one whose body is broken."""
    modules = {"broken": make_module(workload, site, "broken")}
    for number in range(workload.together if workload.body == "slow" else 1):
        modules[f"m{number}"] = make_module(workload, site, workload.body)
    return modules


def make_module(workload: Workload, site: Site, body: str) -> dict[str, Any]:
    """Return one module; an http module keeps the default address."""
    module: dict[str, Any] = {"method": workload.method, "timeout": "30s"}
    path = str(site.folder / "bodies" / body)
    if workload.method == "exec":
        words = site.bodies[body].decode().split()
        command = ["/bin/echo", *words] if workload.body == "echo" else ["/bin/cat", path]
        return {**module, "exec": {"command": command[0], "args": command[1:]}}
    if workload.method == "file":
        return {**module, "file": {"path": path}}
    port = site.slow_port if body == "slow" else site.target_port
    http = {"port": port, "path": f"/{body}", "verify": workload.verify}
    return {**module, "method": "http", "http": http}


# A program that runs a workload


@dataclass
class Subject:
    """A program that runs, prepared and checked for one workload."""

    label: str
    workload: Workload
    pid: int
    address: tuple[str, int]
    context: ssl.SSLContext | None
    start_seconds: float
    length: int = 0

    @property
    def path(self) -> str:
        """Return the path of a scrape."""
        return "/metrics" if self.workload.method == "metrics" else "/proxy?module=m0"

    @property
    def varies(self) -> bool:
        """Return whether answers differ in length.

        Counters grow, and the peer serves the families of commands and files in random order.
        """
        return self.workload.method == "metrics" or (self.is_compressed and self.label == PEER)

    @property
    def is_compressed(self) -> bool:
        """Return whether the proxies compress the answer themselves."""
        workload = self.workload
        return workload.method in ("exec", "file") and workload.encoding == "gzip"

    @property
    def request(self) -> bytes:
        """Return the bytes of a scrape."""
        return make_request(self.path, self.workload.encoding)

    def connect(self) -> Connection:
        """Return a new connection."""
        return Connection(self.address, self.context)

    def require(self, answers: Iterable[Answer]) -> None:
        """Raise BenchError unless each answer has status 200 and the length that was learnt."""
        tolerance = VARYING_LENGTH * self.length if self.varies else 0
        for answer in answers:
            if answer.status != 200:
                raise BenchError(f"{self.label}: status {answer.status}: {answer.body[:200]!r}")
            if abs(len(answer.body) - self.length) > tolerance:
                length = len(answer.body)
                raise BenchError(f"{self.label}: {length} bytes, expected {self.length}")


@contextlib.contextmanager
def started(program: Program, workload: Workload, site: Site) -> Iterator[Subject]:
    """Start a program, and wait for its first answer."""
    folder = Path(tempfile.mkdtemp(dir=site.folder))
    launch = Launch(site, workload, folder, free_port())
    context = site.client if workload.tls else None
    address = ("127.0.0.1", launch.port)
    with process_running(program.command(launch), folder) as process:
        seconds = wait_for_answer(process, address, context, program.health)
        yield Subject(program.label, workload, process.popen.pid, address, context, seconds)


def wait_for_answer(
    process: Process, address: tuple[str, int], context: ssl.SSLContext | None, path: str
) -> float:
    """Return the seconds from the start of a process to its first answer with status 200."""
    request = make_request(path)
    while time.perf_counter() - process.started < START_SECONDS:
        process.require_alive()
        with contextlib.suppress(OSError), Connection(address, context) as connection:
            if connection.ask(request).status == 200:
                return time.perf_counter() - process.started
        time.sleep(0.001)
    raise BenchError(f"no answer from {address} within {START_SECONDS} s")


def check(subject: Subject, site: Site) -> None:
    """Check the first answer, its verdict and who gets in, and learn the length of answers."""
    workload = subject.workload
    with subject.connect() as connection:
        first = connection.ask(subject.request)
        if first.status != 200:
            raise RefusedError(f"status {first.status}: {first.body[:200]!r}")
        subject.length = len(first.body)
        check_body(subject, first, site)
        if workload.method != "metrics" and subject.label != FLOOR:
            broken = connection.ask(make_request("/proxy?module=broken")).status
            if broken != (500 if workload.verify else 200):
                raise BenchError(f"{subject.label}: status {broken} for a broken body")
    if workload.tls:
        check_stranger(subject, site)


def check_body(subject: Subject, answer: Answer, site: Site) -> None:
    """Raise BenchError unless the body is the target's.

    The peer serialises again what commands print and files hold, so there a sample must be in it.
    """
    workload = subject.workload
    if workload.method == "http":
        right = answer.body == site.bodies[workload.body]
    elif workload.body == "echo":
        right = b"up 1\n" in answer.decoded()
    elif workload.method in ("exec", "file"):
        right = MARKER in answer.decoded()
    else:
        right = b"# TYPE process_resident_memory_bytes gauge\n" in answer.decoded()
    if not right:
        raise BenchError(f"{subject.label}: not the target's body: {answer.body[:200]!r}")


def check_stranger(subject: Subject, site: Site) -> None:
    """Raise BenchError if a client without a certificate gets the metrics."""
    try:
        with Connection(subject.address, site.stranger) as connection:
            status = connection.ask(make_request(subject.path)).status
    except (OSError, BenchError):
        return
    if status == 200:
        raise BenchError(f"{subject.label}: a client without a certificate got in")


# Measures


@dataclass
class Row:
    """One line of the table: a figure of each round for each program."""

    workload: str
    measure: str
    values: dict[str, list[float]] = field(default_factory=dict)
    reference: str = PEER

    def add(self, label: str, value: float) -> None:
        """Note the figure of one more round."""
        self.values.setdefault(label, []).append(value)

    def ratios(self, label: str, reference: str) -> list[float]:
        """Return the ratios of two programs, round by round."""
        pairs = zip(self.values.get(label, []), self.values.get(reference, []))
        return [ours / theirs for ours, theirs in pairs if theirs > 0]


def in_turn(subjects: Sequence[Subject], number: int) -> Sequence[Subject]:
    """Return the programs in the order of this round: every other round is reversed."""
    return subjects if number % 2 == 0 else subjects[::-1]


@dataclass(frozen=True)
class Effort:
    """How many rounds are measured, and how long."""

    rounds: int
    loads: int
    wrk_seconds: int
    one_connection: bool


def measure_latency(subjects: Sequence[Subject], rounds: int) -> list[Row]:
    """Measure scrapes over one keep-alive connection."""
    title = subjects[0].workload.title
    latency = Row(title, "latency, ms")
    cpu = Row(title, "CPU per request, ms")
    switches = Row(title, "context switches per request")
    with contextlib.ExitStack() as stack:
        connections = {id(one): stack.enter_context(one.connect()) for one in subjects}
        for subject in subjects:
            one_round(subject, connections[id(subject)], subject.workload.requests)
        for number in range(rounds):
            for subject in in_turn(subjects, number):
                requests = subject.workload.requests
                figures = one_round(subject, connections[id(subject)], requests)
                latency.add(subject.label, figures.latency_ms)
                cpu.add(subject.label, figures.cpu_ms)
                switches.add(subject.label, figures.switches)
    return [latency, cpu, switches]


class RoundFigures(NamedTuple):
    """What one round over one connection costs, a request."""

    latency_ms: float
    cpu_ms: float
    switches: float


def one_round(subject: Subject, connection: Connection, requests: int) -> RoundFigures:
    """Scrape a number of times, one after another."""
    request = subject.request
    times: list[float] = []
    answers: list[Answer] = []
    switches = context_switches(subject.pid)
    cpu = cpu_seconds(subject.pid)
    # The answers are judged after the round, which measures the server and no checks.
    for _ in range(requests):
        before = time.perf_counter()
        answer = connection.ask(request)
        times.append(time.perf_counter() - before)
        answers.append(answer)
    if subject.workload.method == "exec":
        wait_for_reaping(subject.pid)
    cpu = cpu_seconds(subject.pid) - cpu
    switches = context_switches(subject.pid) - switches
    subject.require(answers)
    milliseconds = statistics.median(times) * 1000
    return RoundFigures(milliseconds, cpu * 1000 / requests, switches / requests)


WRK_SCRIPT = """\
done = function(summary)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("RESULT %d %d %d %d\\n",
    summary.duration, summary.requests, summary.bytes, failed))
end
"""


def measure_throughput(
    subjects: Sequence[Subject], connections: int, effort: Effort, site: Site
) -> Row:
    """Measure requests per second over several connections with wrk."""
    script = site.folder / "wrk.lua"
    script.write_text(WRK_SCRIPT, encoding="utf-8")
    row = Row(subjects[0].workload.title, f"requests/s at {connections}")
    for number in range(effort.loads):
        for subject in in_turn(subjects, number):
            row.add(subject.label, run_wrk(subject, connections, effort.wrk_seconds, script))
    return row


def run_wrk(subject: Subject, connections: int, seconds: int, script: Path) -> float:
    """Return requests per second; raise BenchError if any of them failed."""
    # The clients of the round before have hung up, and their commands may still be running.
    wait_for_reaping(subject.pid)
    threads = 1 if connections < 64 else 2
    host, port = subject.address
    command = [find_program("wrk"), f"-c{connections}", f"-t{threads}", f"-d{seconds}s"]
    command += [f"-s{script}", "--timeout=10s"]
    headers = {**SCRAPE_HEADERS, "Accept-Encoding": subject.workload.encoding}
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    command.append(f"http://{host}:{port}{subject.path}")
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+)", output)
    assert found, output
    microseconds, requests, size, failed = map(int, found.groups())
    if failed or not requests:
        raise BenchError(f"{subject.label}: {failed} errors at {connections} connections: {output}")
    if size / requests < subject.length * (1 - VARYING_LENGTH):
        raise BenchError(f"{subject.label}: {size} bytes in {requests} answers")
    return requests / microseconds * 1e6


def measure_together(subjects: Sequence[Subject], rounds: int) -> Row:
    """Measure the time until all of several requests at once are answered."""
    workload = subjects[0].workload
    row = Row(workload.title, f"{workload.together} at once, s")
    for number in range(rounds):
        for subject in in_turn(subjects, number):
            row.add(subject.label, ask_together(subject, workload.together))
    return row


def ask_together(subject: Subject, count: int) -> float:
    """Return the seconds that a number of requests take that are sent at once."""
    modules = count if subject.workload.body == "slow" else 1
    requests = [make_request(f"/proxy?module=m{number % modules}") for number in range(count)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        connections = [stack.enter_context(subject.connect()) for _ in range(count)]
        before = time.perf_counter()
        answers = list(pool.map(Connection.ask, connections, requests))
        seconds = time.perf_counter() - before
    subject.require(answers)
    return seconds


def peak_memory(subjects: Sequence[Subject], what: str) -> Row:
    """Read the peak of resident memory since the programs were started for this workload."""
    row = Row(subjects[0].workload.title, f"peak memory {what}, MiB")
    for subject in subjects:
        row.add(subject.label, memory(subject.pid, "VmHWM"))
    return row


def answer_bytes(subjects: Sequence[Subject], plain: int) -> Row:
    """Return the bytes of an answer, beside those of the body that is not compressed."""
    row = Row(subjects[0].workload.title, f"bytes of an answer, {plain:,} without gzip")
    for subject in subjects:
        row.add(subject.label, subject.length)
    return row


def measure(subjects: Sequence[Subject], effort: Effort, site: Site) -> Iterator[Row]:
    """Measure all rows of one workload.

    One connection comes first: after a burst exporter_exporter goes on working for seconds.
    """
    workload = subjects[0].workload
    if workload.requests:
        yield from measure_latency(subjects, effort.rounds * workload.repeats)
        yield peak_memory(subjects, "at 1")
    if subjects[0].is_compressed:
        yield answer_bytes(subjects, len(site.bodies[workload.body]))
    if effort.one_connection:
        return
    for connections in workload.connections:
        yield measure_throughput(subjects, connections, effort, site)
    if workload.connections:
        yield peak_memory(subjects, f"at {workload.connections[-1]}")
    if workload.together:
        yield measure_together(subjects, effort.loads)
        yield peak_memory(subjects, f"at {workload.together}")


# Workloads


@dataclass(frozen=True)
class Bench:
    """The programs and the effort of one run."""

    site: Site
    programs: tuple[Program, ...]
    effort: Effort


def run_workload(bench: Bench, workload: Workload) -> list[Row]:
    """Start the programs for a workload, check them, and measure."""
    with contextlib.ExitStack() as stack:
        subjects = [
            subject
            for program in bench.programs
            if program.label != FLOOR or workload.has_floor
            for subject in enter(stack, bench, program, workload)
        ]
        reference = PEER
        if PEER not in [subject.label for subject in subjects]:
            subjects.append(start_own_text(stack, bench))
            reference = OWN_TEXT
        rows = list(measure(subjects, bench.effort, bench.site))
    for row in rows:
        row.reference = reference
    return rows


def enter(
    stack: contextlib.ExitStack, bench: Bench, program: Program, workload: Workload
) -> list[Subject]:
    """Start and check one program; return none if it is the peer, and may refuse the form."""
    try:
        subject = stack.enter_context(started(program, workload, bench.site))
        check(subject, bench.site)
    except RefusedError as error:
        if program.label == PEER and workload.peer_may_refuse:
            print(f"{PEER} refuses {workload.name}: {error}", file=sys.stderr)
            return []
        raise BenchError(f"{program.label}: {error}") from error
    return [subject]


def start_own_text(stack: contextlib.ExitStack, bench: Bench) -> Subject:
    """Start expexp once more, with the canonical text, where the peer refuses the form."""
    ours = next(program for program in bench.programs if program.label == OURS)
    subject = stack.enter_context(started(ours, TEXT, bench.site))
    check(subject, bench.site)
    subject.label = OWN_TEXT
    return subject


def run_starts(bench: Bench) -> list[Row]:
    """Measure start and idle memory, of expexp both as a script and as a compiled module."""
    titles = {False: "start, as a script", True: "start, as a module with bytecode"}
    starts = {kind: Row(title, "first answer, ms") for kind, title in titles.items()}
    idle = {kind: Row(title, "idle memory, MiB") for kind, title in titles.items()}
    programs = [program for program in bench.programs if program.label != FLOOR]
    for number in range(bench.effort.rounds):
        for program in programs if number % 2 == 0 else programs[::-1]:
            for kind, variant in variants(program):
                with started(variant, TEXT, bench.site) as subject:
                    starts[kind].add(subject.label, subject.start_seconds * 1000)
                    idle[kind].add(subject.label, settled_memory(subject.pid))
    return [starts[False], idle[False], starts[True], idle[True]]


def variants(program: Program) -> Iterator[tuple[bool, Program]]:
    """Yield the ways to start a program, with the kind of row: as a module or not."""
    for as_module in (False, True):
        if isinstance(program, Expexp):
            yield (
                as_module,
                Expexp(program.label, program.python, program.file, as_module),
            )
        else:
            yield as_module, program


def run_all(bench: Bench, names: Sequence[str]) -> tuple[list[Row], dict[str, str]]:
    """Return the rows, and the errors of workloads that have none."""
    rows: list[Row] = []
    failures: dict[str, str] = {}
    work = {workload.name: workload for workload in WORKLOADS}
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            rows += run_starts(bench) if name == STARTS else run_workload(bench, work[name])
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error)
    return rows, failures


# The table


def figure(value: float) -> str:
    """Return a number with three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def median_of(row: Row, label: str) -> str:
    """Return the median of a program's rounds."""
    return figure(statistics.median(row.values[label])) if label in row.values else "-"


def ratio_of(row: Row, label: str, reference: str) -> str:
    """Return the median of the ratios of the rounds, and their spread."""
    ratios = row.ratios(label, reference)
    if not ratios:
        return "-"
    middle = f"{statistics.median(ratios):.2f}"
    if len(ratios) == 1:
        return middle
    return f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table."""
    against = any(AGAINST in row.values for row in rows)
    titles = ["workload", "measure", PEER, OURS, "ratio (spread)", FLOOR]
    if against:
        titles += [AGAINST, f"{OURS} / {AGAINST} (spread)"]
    yield "| " + " | ".join(titles) + " |"
    yield "|---|---|" + "---:|" * (len(titles) - 2)
    for row in rows:
        reference = median_of(row, row.reference)
        if row.reference == OWN_TEXT:
            reference = f"refuses; own text {reference}"
        cells = [row.workload, row.measure, reference, median_of(row, OURS)]
        cells += [ratio_of(row, OURS, row.reference), median_of(row, FLOOR)]
        if against:
            cells += [median_of(row, AGAINST), ratio_of(row, OURS, AGAINST)]
        yield "| " + " | ".join(cells) + " |"


def output_of(command: Sequence[str]) -> str:
    """Return the first line that a command prints."""
    result = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return result.stdout.strip().partition("\n")[0]


def first_match(pattern: str, text: str) -> str:
    """Return the group of a pattern, or the whole text."""
    found = re.search(pattern, text)
    return found[1] if found else text


def describe_file(file: Path) -> str:
    """Return a name that tells one version of a file from another."""
    return f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def describe(options: argparse.Namespace) -> dict[str, str]:
    """Return what was measured, with versions."""
    code = "import platform as p; print(p.python_implementation(), p.python_version())"
    peer = output_of([find_program("prometheus-exporter-exporter"), "-version"])
    head = {
        "Python": output_of([options.python, "-c", code]),
        "expexp.py": describe_file(options.expexp),
        "exporter_exporter": first_match(r"Version: ([^-\s]+)", peer),
        "nginx": first_match(r"nginx/(\S+)", output_of([find_program("nginx"), "-v"])),
        "wrk": first_match(r"(\d\S*)", output_of([find_program("wrk"), "-v"])),
        "processors": str(os.cpu_count()),
        "load at the start": f"{os.getloadavg()[0]:.2f}",
    }
    if options.against:
        head["against"] = describe_file(options.against)
    return head


def report(head: dict[str, str], rows: Sequence[Row], failures: dict[str, str]) -> None:
    """Print the head, the table, and the errors."""
    print("; ".join(f"{name} {value}" for name, value in head.items()) + ".")
    print()
    for line in table(rows):
        print(line)
    for name, error in failures.items():
        print(f"\nNo result for {name}: {error}")


# The command line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [workload.name for workload in WORKLOADS] + [STARTS]
    parser = argparse.ArgumentParser(description="Measure expexp beside exporter_exporter.")
    parser.add_argument("--python", default=sys.executable, help="interpreter to measure")
    parser.add_argument("--expexp", type=Path, default=REPOSITORY / "expexp.py", metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a second expexp.py")
    parser.add_argument("--module", action="store_true", help="start expexp as a compiled module")
    parser.add_argument("--short", action="store_true", help="one connection, five workloads")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="rounds, of which quick workloads have three times as many (7)",
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="WORKLOAD", help=str(names))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")
    parser.add_argument("--serve-slowly", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only or (SHORT if options.short else names)
    return options


def choose_effort(options: argparse.Namespace) -> Effort:
    """Return how long to measure."""
    rounds: int = options.rounds
    return Effort(rounds, max(1, rounds * 3 // 4), 2, options.short)


def choose_programs(options: argparse.Namespace) -> tuple[Program, ...]:
    """Return the programs to measure."""
    ours = Expexp(OURS, options.python, options.expexp.resolve(), options.module)
    programs: list[Program] = [ExporterExporter(), ours]
    if options.against:
        against = Expexp(AGAINST, options.python, options.against.resolve(), options.module)
        programs.append(against)
    return (*programs, Nginx())


def end(_number: int, _frame: object) -> None:
    """Unwind the stack, which ends the programs, when this script is ended."""
    sys.exit(143)


def main() -> int:
    """Measure and print; return 1 if a workload has no result."""
    options = parse_arguments()
    if options.serve_slowly:
        asyncio.run(serve_slowly(options.serve_slowly))
    signal.signal(signal.SIGTERM, end)
    for name in PACKAGES:
        find_program(name)
    head = describe(options)
    with tempfile.TemporaryDirectory() as name, open_site(Path(name)) as site:
        bench = Bench(site, choose_programs(options), choose_effort(options))
        rows, failures = run_all(bench, options.only)
    head["load at the end"] = f"{os.getloadavg()[0]:.2f}"
    report(head, rows, failures)
    if options.json:
        figures = {"head": head, "rows": [asdict(row) for row in rows], "failures": failures}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
