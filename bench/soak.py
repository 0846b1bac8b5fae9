"""Let a real Prometheus scrape hundreds of targets through one expexp while everything goes wrong.

    .venv/bin/python bench/soak.py                            # 60 minutes with faults
    .venv/bin/python bench/soak.py --minutes 15 --no-faults   # the same targets, all healthy
    .venv/bin/python bench/soak.py --minutes 1.5              # what CI runs
    .venv/bin/python bench/soak.py --minutes 1.5 --plant byte # must exit with 1

Prometheus scrapes every target once a second: http, https with client certificates, exec and file.
Meanwhile targets hang, drip, cut, redirect and refuse; scripts fail, hang and leave children; files
are replaced; the configuration is reloaded, good and bad; certificates are rotated; clients hang
up, read slowly, never send and flood the port. Everything is on the loopback and ends with the
script. The exit status is 1 if a bound does not hold. bench/README.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import trustme
from compare import (
    REPOSITORY,
    BenchError,
    Process,
    cpu_seconds,
    describe_file,
    end,
    free_port,
    memory,
    output_of,
    process_running,
    wait_for_port,
)
from soak_targets import ILL, LOOPBACK, healthy_body

INTERVAL = 1.0  # seconds between two scrapes of a target
LONGEST_GAP = 2.6  # seconds between two samples of `up`: Prometheus itself is late at times
LOOK_SECONDS = 5.0  # between two looks at what expexp holds
SETTLED_SECONDS = 300  # what expexp holds until then is what it may hold at the end
GROWTH = 1.10
SLACK = 8  # descriptors and threads of scrapes that run just now
SLACK_MEGABYTES = 8
HEALTHY_P99_SECONDS = 0.5
#: Of a hundred targets, in this order. The ill ones take what is left.
SHARES = {"http": 60, "https": 10, "exec": 5, "file": 10}
DEAD_PORT = 9  # discard: nobody listens there


class World(NamedTuple):
    """What all parts of the soak share."""

    folder: Path
    ports: tuple[int, int]  # of the targets, plain and with TLS
    port: int  # of expexp
    healthy: tuple[str, ...]  # names of modules that must never miss a scrape
    ill: tuple[str, ...]
    bodies: Mapping[str, bytes]  # what a healthy module must answer


# The modules


def http_section(world_ports: tuple[int, int], kind: str, number: int) -> dict[str, Any]:
    """Return an http module for a target."""
    section = {"address": LOOPBACK, "port": world_ports[0], "path": f"/{kind}/{number}"}
    return {"method": "http", "timeout": "900ms", "http": section}


def https_section(world_ports: tuple[int, int], number: int) -> dict[str, Any]:
    """Return an http module for a target that wants a client certificate."""
    module = http_section(world_ports, "good", number)
    module["http"] |= {
        "scheme": "https",
        "port": world_ports[1],
        "tls_ca_cert_file": "ca.pem",
        "tls_cert_file": "client.pem",
        "tls_key_file": "client.key",
    }
    return module


def exec_section(script: str) -> dict[str, Any]:
    """Return a module that runs a line of shell."""
    section = {"command": "/bin/sh", "args": ["-c", script]}
    return {"method": "exec", "timeout": "900ms", "accept_args": False, "exec": section}


ILL_SCRIPTS = {
    "fails": "echo oops >&2; exit 3",
    "hangs": "sleep 5",
    "children": "sleep 3 & echo a 1",
    "killed": "kill -9 $$",
}


def make_modules(
    folder: Path, ports: tuple[int, int], count: int, with_ill: bool
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return all modules, and the body of each healthy one."""
    modules: dict[str, Any] = {}
    bodies: dict[str, bytes] = {}
    counts = {method: count * share // 100 for method, share in SHARES.items()}
    if not with_ill:
        counts["http"] += count - sum(counts.values())
    for number in range(counts["http"]):
        modules[f"http{number}"] = http_section(ports, "good", number)
        bodies[f"http{number}"] = healthy_body(str(number))
    for number in range(counts["https"]):
        modules[f"https{number}"] = https_section(ports, number)
        bodies[f"https{number}"] = healthy_body(str(number))
    for number in range(counts["exec"]):
        modules[f"exec{number}"] = exec_section(f"echo 'soak_script {number}'")
        bodies[f"exec{number}"] = f"soak_script {number}\n".encode()
    for number in range(counts["file"]):
        path = folder / f"file{number}.prom"
        path.write_bytes(healthy_body(str(number)))
        modules[f"file{number}"] = {
            "method": "file",
            "timeout": "900ms",
            "file": {"path": str(path)},
        }
        bodies[f"file{number}"] = healthy_body(str(number))
    for number in range(count - len(modules)):
        kind = (*ILL, "dead", *ILL_SCRIPTS)[number % (len(ILL) + 1 + len(ILL_SCRIPTS))]
        name = f"ill_{kind}{number}"
        modules[name] = (
            exec_section(ILL_SCRIPTS[kind])
            if kind in ILL_SCRIPTS
            else http_section(ports, kind, number)
        )
        if kind == "dead":
            modules[name]["http"]["port"] = DEAD_PORT
    return modules, bodies


# The certificates


def write_certificates(folder: Path, authority: trustme.CA) -> None:
    """Write a certificate for the targets, and a new one for expexp as their client."""
    if not (folder / "target.pem").exists():
        leaf = authority.issue_cert("localhost", LOOPBACK)
        leaf.private_key_and_cert_chain_pem.write_to_path(str(folder / "target.pem"))
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    client = authority.issue_cert("expexp.example.org")
    for name, blob in (
        ("client.key", client.private_key_pem),
        ("client.pem", client.cert_chain_pems[0]),
    ):
        blob.write_to_path(str(folder / f"{name}.new"))
    for name in ("client.key", "client.pem"):  # between the two expexp keeps the former pair
        os.replace(folder / f"{name}.new", folder / name)


# The faults: each is one short act, done again and again in a random order


class Faults:
    """What goes wrong meanwhile."""

    def __init__(self, world: World, expexp: Process, authority: trustme.CA) -> None:
        """Prepare the acts. The same seed gives the same order."""
        self._world = world
        self._expexp = expexp
        self._authority = authority
        self._random = random.Random(1)  # noqa: S311 - an order, no secret
        self._good = (world.folder / "expexp.json").read_bytes()
        self._held: list[socket.socket] = []
        self.counts: dict[str, int] = {}

    def acts(self) -> dict[str, Callable[[], None]]:
        """Return all acts by name."""
        return {
            "reload": self._reload,
            "bad reload": self._reload_badly,
            "rotate": lambda: write_certificates(self._world.folder, self._authority),
            "replace a file": self._replace_file,
            "hang up": self._hang_up,
            "half a request": lambda: self._hold(b"GET /proxy?module=http0 HTTP/1.1\r\n"),
            "silence": lambda: self._hold(b""),
            "read slowly": lambda: self._hold(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"),
            "flood": self._flood,
            "nonsense": lambda: self._hold(os.urandom(200)),
        }

    def run_until(self, finish: float) -> None:
        """Do acts until this time."""
        acts = self.acts()
        while time.monotonic() < finish:
            name = self._random.choice(list(acts))
            self.counts[name] = self.counts.get(name, 0) + 1
            with contextlib.suppress(OSError):
                acts[name]()
            while len(self._held) > 60:
                self._held.pop(0).close()
            time.sleep(self._random.uniform(0.05, 0.6))
        for client in self._held:
            client.close()

    def _write_config(self, content: bytes) -> None:
        """Replace the configuration, and ask for a reload."""
        path = self._world.folder / "expexp.json"
        path.with_suffix(".new").write_bytes(content)
        os.replace(path.with_suffix(".new"), path)
        self._expexp.popen.send_signal(signal.SIGHUP)

    def _reload(self) -> None:
        """Reload a good configuration."""
        self._write_config(self._good)

    def _reload_badly(self) -> None:
        """Reload a configuration that is cut short."""
        self._write_config(self._good[:-20])
        time.sleep(0.1)
        self._write_config(self._good)

    def _replace_file(self) -> None:
        """Replace the file of a file module by one with the same content."""
        names = [name for name in self._world.healthy if name.startswith("file")]
        path = self._world.folder / f"{self._random.choice(names)}.prom"
        content = path.read_bytes()
        path.with_suffix(".new").write_bytes(content)
        os.replace(path.with_suffix(".new"), path)

    def _connect(self) -> socket.socket:
        """Open a connection to expexp."""
        return socket.create_connection((LOOPBACK, self._world.port), timeout=2)

    def _hold(self, request: bytes) -> None:
        """Send something, and keep the connection without reading."""
        client = self._connect()
        client.sendall(request)
        self._held.append(client)

    def _hang_up(self) -> None:
        """Ask many ill modules, and close all connections at once."""
        clients = []
        for name in self._world.ill[:20]:
            client = self._connect()
            client.sendall(f"GET /proxy?module={name} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            clients.append(client)
        for client in clients:
            client.close()

    def _flood(self) -> None:
        """Open many connections at once, and close them."""
        clients = []
        with contextlib.suppress(OSError):
            clients += [self._connect() for _ in range(100)]
        for client in clients:
            client.close()


# The watchers


class Look(NamedTuple):
    """What expexp held at a moment."""

    seconds: float
    megabytes: float
    descriptors: int
    threads: int
    zombies: frozenset[int]


def look_at(pid: int, seconds: float) -> Look:
    """Return what a process holds; raise BenchError if it has ended."""
    try:
        folder = Path(f"/proc/{pid}")
        return Look(
            seconds,
            memory(pid, "VmRSS"),
            len(list((folder / "fd").iterdir())),
            len(list((folder / "task").iterdir())),
            zombies_of(pid),
        )
    except OSError as error:
        raise BenchError(f"expexp has ended: {error}") from None


def zombies_of(parent: int) -> frozenset[int]:
    """Return the children of a process that have ended and are not reaped."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            if fields[0] == "Z" and int(fields[1]) == parent:
                found.add(int(file.parent.name))
    return frozenset(found)


class Checker:
    """An honest client that scrapes healthy modules and compares each body with what it must be."""

    def __init__(self, world: World) -> None:
        """Wait for `run_until`."""
        self._world = world
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    def run_until(self, finish: float) -> None:
        """Scrape ten modules a second until this time."""
        order = random.Random(2)  # noqa: S311 - an order, no secret
        while time.monotonic() < finish:
            name = order.choice(self._world.healthy)
            started = time.monotonic()
            fault = self._fault(name)
            self.seconds.append(time.monotonic() - started)
            if fault:
                self.wrong.append(f"{name}: {fault}")
            time.sleep(0.1)

    def _fault(self, name: str) -> str:
        """Return what is wrong with the answer of a module, or nothing."""
        connection = http.client.HTTPConnection(LOOPBACK, self._world.port, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("GET", f"/proxy?module={name}")
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                return repr(error)
        if answer.status != 200:
            return f"status {answer.status}: {body[:200]!r}"
        expected = self._world.bodies[name]
        if name.startswith("file"):  # expexp adds the time of modification
            body = body[: len(expected)]
        return "" if body == expected else "a wrong body"


# Prometheus


def prometheus_config(world: World) -> str:
    """Return a configuration that discovers all modules and scrapes them once a second."""
    job = {
        "job_name": "soak",
        "http_sd_configs": [
            {"url": f"http://{LOOPBACK}:{world.port}/sd", "refresh_interval": "1h"}
        ],
    }
    limits = {"scrape_interval": f"{INTERVAL:.0f}s", "scrape_timeout": f"{INTERVAL:.0f}s"}
    return json.dumps({"global": limits, "scrape_configs": [job]})


@contextlib.contextmanager
def prometheus_running(world: World) -> Iterator[str]:
    """Start a Prometheus, and yield the host and port of its API."""
    program = shutil.which("prometheus")
    if program is None:
        raise BenchError("prometheus not found: install Debian's prometheus")
    (world.folder / "prometheus.json").write_text(prometheus_config(world), encoding="utf-8")
    address = f"{LOOPBACK}:{free_port()}"
    command = [program, f"--config.file={world.folder / 'prometheus.json'}"]
    command += [f"--storage.tsdb.path={world.folder / 'data'}", f"--web.listen-address={address}"]
    with process_running([*command, "--log.level=error"], world.folder) as process:
        wait_for_port(process, int(address.rpartition(":")[2]))
        yield address


def query(address: str, text: str) -> list[dict[str, Any]]:
    """Return the result of a query."""
    connection = http.client.HTTPConnection(address, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", f"/api/v1/query?{urllib.parse.urlencode({'query': text})}")
        response = connection.getresponse()
        body = response.read()
    if response.status != 200:  # it has not read its data yet
        raise BenchError(f"Prometheus answers with status {response.status}")
    answer = json.loads(body)
    if answer.get("status") != "success":
        raise BenchError(f"Prometheus refuses a query: {answer}")
    return list(answer["data"]["result"])


class Scrapes(NamedTuple):
    """What Prometheus has of the healthy modules."""

    scraped: int
    down: int
    gaps: int
    unknown: int  # modules without any scrape


def scrapes_of(address: str, world: World, seconds: float) -> Scrapes:
    """Return how often the healthy modules were scraped, were down, and had a gap."""
    counted = down = gaps = 0
    seen = set()
    for series in query(address, f'up{{job="soak"}}[{math.ceil(seconds)}s]'):
        name = series["metric"]["module"]
        if name in world.bodies:
            seen.add(name)
            times = [float(when) for when, _ in series["values"]]
            counted += len(times)
            down += sum(value != "1" for _, value in series["values"])
            gaps += sum(later - sooner > LONGEST_GAP for sooner, later in zip(times, times[1:]))
    return Scrapes(counted, down, gaps, len(world.bodies) - len(seen))


# The report


class Row(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    bound: str
    holds: bool


def growth(looks: Sequence[Look], field: str, slack: float) -> Row:
    """Return the row of what must not grow from its settled value."""
    values = [float(getattr(look, field)) for look in looks]
    until = min(SETTLED_SECONDS, looks[-1].seconds / 2)  # a short soak has no five minutes
    before = max(float(getattr(look, field)) for look in looks if look.seconds <= until)
    tail = values[-max(3, len(values) // 20) :]
    after = statistics.median(tail)
    most = max(before * GROWTH, before + slack)
    what = "MB" if field == "megabytes" else field
    return Row(what, f"{before:.1f}, then {after:.1f}", f"at most {most:.1f}", after <= most)


def report(
    world: World, scrapes: Scrapes, looks: Sequence[Look], checker: Checker, cpu_share: float
) -> list[Row]:
    """Return all rows."""
    ordered = sorted(checker.seconds)
    median = ordered[len(ordered) // 2]
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    # A command is reaped half a second after its scrape. A look is a second after the one before.
    zombies = len({pid for one, two in zip(looks, looks[1:]) for pid in one.zombies & two.zombies})
    wrong = len(checker.wrong)
    return [
        Row("healthy modules, ill ones", f"{len(world.healthy)}, {len(world.ill)}", "", True),
        Row("scrapes of the healthy by Prometheus", f"{scrapes.scraped:,}", "", True),
        Row("healthy modules without a scrape", str(scrapes.unknown), "0", not scrapes.unknown),
        Row("`up` 0 of the healthy", str(scrapes.down), "0", not scrapes.down),
        Row("gaps in `up` of the healthy", str(scrapes.gaps), "0", not scrapes.gaps),
        Row("answers compared, wrong ones", f"{len(ordered):,}, {wrong}", "0 wrong", not wrong),
        Row(
            "median and p99 of these answers, ms",
            f"{median * 1e3:.1f}, {p99 * 1e3:.1f}",
            f"p99 at most {HEALTHY_P99_SECONDS * 1e3:.0f}",
            p99 <= HEALTHY_P99_SECONDS,
        ),
        growth(looks, "megabytes", SLACK_MEGABYTES),
        growth(looks, "descriptors", SLACK),
        growth(looks, "threads", SLACK),
        Row("zombies that stay for a second", str(zombies), "0", not zombies),
        Row("processors used by expexp and its commands", f"{cpu_share:.2f}", "", True),
    ]


# All of it


class Soak(NamedTuple):
    """A running soak."""

    world: World
    expexp: Process
    authority: trustme.CA
    prometheus: str


@contextlib.contextmanager
def soaking(options: argparse.Namespace) -> Iterator[Soak]:
    """Start the targets, expexp and Prometheus, and end them at the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = trustme.CA()
        write_certificates(folder, authority)
        ports = free_port(), free_port()
        script = str(Path(__file__).with_name("soak_targets.py"))
        command = [sys.executable, script, *map(str, ports), str(folder)]
        targets = stack.enter_context(process_running(command, folder))
        wait_for_port(targets, ports[1])
        modules, bodies = make_modules(folder, ports, options.targets, options.faults)
        (folder / "expexp.json").write_text(json.dumps({"modules": modules}), encoding="utf-8")
        port = free_port()
        command = [options.python, str(options.expexp), "-config=expexp.json"]
        command += [f"-web.listen-address={LOOPBACK}:{port}"]
        expexp = stack.enter_context(process_running(command, folder))
        wait_for_port(expexp, port)
        ill = tuple(name for name in modules if name not in bodies)
        world = World(folder, ports, port, tuple(bodies), ill, bodies)
        address = stack.enter_context(prometheus_running(world))
        yield Soak(world, expexp, authority, address)


def wait_for_scrapes(soak: Soak) -> None:
    """Wait until Prometheus has scraped every healthy module."""
    finish = time.monotonic() + 60
    while time.monotonic() < finish:
        with contextlib.suppress(OSError, BenchError):
            if not scrapes_of(soak.prometheus, soak.world, 10).unknown:
                return
        time.sleep(0.5)
    raise BenchError("Prometheus has not scraped every module within 60 s")


def plant(what: str, soak: Soak) -> list[Any]:
    """Plant a fault that the soak must find. Return what keeps it alive."""
    if what == "byte":
        (soak.world.folder / "plant-byte").touch()
    if what == "scrape":  # a healthy target is away for two scrapes
        soak.world.folder.joinpath("file0.prom").rename(soak.world.folder / "away")
        back = soak.world.folder.joinpath("away").rename
        timer = threading.Timer(2.5, back, [soak.world.folder / "file0.prom"])
        timer.start()
        return [timer]
    return []


def leak(clients: list[socket.socket], port: int) -> None:
    """Keep one more connection, as a leaked descriptor would."""
    with contextlib.suppress(OSError):
        client = socket.create_connection((LOOPBACK, port))
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
        clients.append(client)


def run(options: argparse.Namespace) -> list[Row]:
    """Run the whole soak and return its rows."""
    seconds = options.minutes * 60
    with soaking(options) as soak:
        wait_for_scrapes(soak)
        pid = soak.expexp.popen.pid
        started = time.monotonic()
        finish = started + seconds
        checker = Checker(soak.world)
        works: list[Callable[[float], None]] = [checker.run_until]
        if options.faults:
            works.append(Faults(soak.world, soak.expexp, soak.authority).run_until)
        threads = [threading.Thread(target=work, args=(finish,)) for work in works]
        used = cpu_seconds(pid)
        for thread in threads:
            thread.start()
        looks: list[Look] = []
        leaked: list[socket.socket] = []
        planted: list[Any] = []
        while (left := finish - time.monotonic()) > 0:
            time.sleep(min(LOOK_SECONDS, left))
            looks.append(look_at(pid, time.monotonic() - started))
            tell(looks)
            if options.plant and not planted and time.monotonic() - started > seconds / 3:
                planted = [plant(options.plant, soak)]
            if options.plant == "descriptor":
                leak(leaked, soak.world.port)
        used = cpu_seconds(pid) - used
        for thread in threads:
            thread.join()
        looks += rest_of(pid, started)
        scrapes = scrapes_of(soak.prometheus, soak.world, seconds)
        for fault in checker.wrong[:10]:
            print(f"wrong: {fault}", file=sys.stderr)
        for client in leaked:
            client.close()
        return report(soak.world, scrapes, looks, checker, used / seconds)


def tell(looks: Sequence[Look]) -> None:
    """Say once a minute on stderr how it goes."""
    last = looks[-1]
    if last.seconds % 60 < LOOK_SECONDS:
        held = f"{last.megabytes:.0f} MB, {last.descriptors} descriptors, {last.threads} threads"
        print(f"{last.seconds / 60:.0f} min: {held}", file=sys.stderr)


def rest_of(pid: int, started: float) -> list[Look]:
    """Return looks after the faults have ended."""
    looks = []
    for _ in range(3):
        time.sleep(1)
        looks.append(look_at(pid, time.monotonic() - started))
    return looks


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Soak an expexp.py on the loopback.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--targets", type=int, default=300)
    parser.add_argument("--no-faults", dest="faults", action="store_false")
    parser.add_argument("--plant", choices=["byte", "scrape", "descriptor"])
    parser.add_argument("--expexp", type=Path, default=REPOSITORY / "expexp.py", metavar="FILE")
    parser.add_argument("--python", default=sys.executable, metavar="PATH")
    options = parser.parse_args()
    python = shutil.which(options.python)
    if python is None or not options.expexp.is_file():
        parser.error("--python or --expexp: not found")
    options.python = os.path.abspath(python)
    options.expexp = options.expexp.resolve()
    return options


def main() -> int:
    """Print the table; return 1 if a bound does not hold."""
    signal.signal(signal.SIGTERM, end)
    options = parse_arguments()
    version = output_of([options.python, "-c", "import platform; print(platform.python_version())"])
    kind = "with faults" if options.faults else "without faults"
    print(f"expexp.py {describe_file(options.expexp)}; Python {version}; ", end="")
    print(
        f"{options.targets} targets at {INTERVAL:.0f} s for {options.minutes:g} minutes, {kind}\n"
    )
    rows = run(options)
    print("| figure | found | bound | holds |\n|---|---|---|---|")
    for row in rows:
        holds = "yes" if row.holds else "**no**"
        print(f"| {row.what} | {row.found} | {row.bound or '-'} | {holds if row.bound else '-'} |")
    return int(not all(row.holds for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"soak.py: {error}")
