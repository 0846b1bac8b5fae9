"""Let a real Prometheus scrape hundreds of targets through one expexp while everything goes wrong.

    .venv/bin/python bench/soak.py                            # 60 minutes with faults
    .venv/bin/python bench/soak.py --minutes 15 --no-faults   # the same targets, all healthy
    .venv/bin/python bench/soak.py --minutes 1.5              # 100 targets, what CI runs
    .venv/bin/python bench/soak.py --minutes 1.5 --plant byte # must exit with 1
    .venv/bin/python bench/soak.py --no-faults --against-original  # beside exporter_exporter

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
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import trustme
from compare import (
    PEER,
    REPOSITORY,
    BenchError,
    Process,
    cpu_seconds,
    describe_file,
    end,
    find_program,
    first_match,
    free_port,
    output_of,
    process_running,
    wait_for_port,
)
from soak_report import (
    STAYING_SECONDS,
    Answers,
    Findings,
    Look,
    Row,
    Scrapes,
    Span,
    Wrong,
    control_of,
    episodes_of,
    held_at_last,
    held_by,
    look_at,
    report,
    scrapes_of,
    usage_of,
    wrong_values,
    zombies_of,
)
from soak_targets import CONTROL, ILL, LOOPBACK, healthy_body

INTERVAL = 1.0  # seconds between two scrapes of a target
LOOK_SECONDS = 5.0  # between two looks at what expexp holds
CONTROLS = 10  # targets that Prometheus scrapes directly, at other moments of a second
LOG_LINES = 40
LONG_MINUTES = 10  # a shorter soak has fewer targets: it is for a machine of CI
TARGETS = 300
FEW_TARGETS = 100
#: Of a hundred targets, in this order. The ill ones take what is left.
SHARES = {"http": 60, "https": 10, "exec": 5, "file": 10}
SHARES_OF_ORIGINAL = {"http": 0, "https": 0, "exec": 5, "file": 0}
DEAD_PORT = 9  # discard: nobody listens there


class World(NamedTuple):
    """What all parts of the soak share."""

    folder: Path
    ports: tuple[int, int]  # of the targets, plain and with TLS
    port: int  # of expexp
    healthy: tuple[str, ...]  # names of modules that must never miss a scrape
    ill: tuple[str, ...]
    bodies: Mapping[str, bytes]  # what a healthy module must answer
    original_port: int | None  # of exporter_exporter


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
    folder: Path, ports: tuple[int, int], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return all modules, and the body of each healthy one."""
    modules: dict[str, Any] = {}
    bodies: dict[str, bytes] = {}
    count = options.targets
    with_ill = options.faults
    shares = SHARES_OF_ORIGINAL if options.against_original else SHARES
    counts = {method: count * share // 100 for method, share in shares.items()}
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
        (folder / f"{name}.new").chmod(0o600)
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
        """Replace the file of a file module by one with the same content.

        `--plant scrape` takes that of `file0` away.
        """
        names = [name for name in self._world.healthy if name.startswith("file")][1:]
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


class Checker:
    """An honest client that scrapes healthy modules and compares each body with what it must be.

    After each scrape it asks a target directly, to tell how late the machine is.
    """

    def __init__(self, world: World) -> None:
        """Wait for `run_until`."""
        self._world = world
        self.answers = Answers([], [], [])

    def run_until(self, finish: float) -> None:
        """Scrape ten modules a second until this time."""
        order = random.Random(2)  # noqa: S311 - an order, no secret
        while time.monotonic() < finish:
            name = order.choice(self._world.healthy)
            begun = time.time()
            started = time.monotonic()
            fault = self._fault(name)
            asked = time.monotonic()
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ask(self._world.ports[0], f"/good/{CONTROL}")
            self.answers.seconds.append(asked - started)
            self.answers.control.append(time.monotonic() - asked)
            if self._world.original_port:  # so that both have the same work
                with contextlib.suppress(OSError, http.client.HTTPException):
                    self._ask(self._world.original_port, f"/proxy?module={name}")
            if fault:
                what, may_be_late = fault
                span = Span(begun, begun + asked - started)
                self.answers.wrong.append(Wrong(span, f"{name}: {what}", may_be_late))
            time.sleep(0.1)

    def _ask(self, port: int, path: str) -> tuple[int, bytes]:
        """Return status and body of an answer. Raise OSError or HTTPException without one."""
        connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _fault(self, name: str) -> tuple[str, bool] | None:
        """Return what is wrong with the answer of a module, and whether lateness can be why."""
        try:
            status, body = self._ask(self._world.port, f"/proxy?module={name}")
        except (OSError, http.client.HTTPException) as error:
            return repr(error), isinstance(error, socket.timeout)
        if status != 200:
            return f"status {status}: {body[:200]!r}", status == 504
        expected = self._world.bodies[name]
        if name.startswith("file"):  # expexp adds the time of modification
            body = body[: len(expected)]
        return None if body == expected else ("a wrong body", False)


# Prometheus


def prometheus_config(world: World) -> str:
    """Return a configuration that scrapes once a second.

    Prometheus discovers the modules, and scrapes some targets directly. Through exporter_exporter
    it scrapes the same modules, if that runs.
    """
    url = f"http://{LOOPBACK}:{world.port}/sd"
    soak = {"job_name": "soak", "http_sd_configs": [{"url": url, "refresh_interval": "1h"}]}
    direct = [
        target_group(world.ports[0], __metrics_path__=f"/good/{CONTROL}{number}")
        for number in range(CONTROLS)
    ]
    jobs: list[dict[str, Any]] = [soak, {"job_name": "control", "static_configs": direct}]
    if world.original_port:
        groups = [
            target_group(
                world.original_port, __metrics_path__="/proxy", __param_module=name, module=name
            )
            for name in world.healthy
        ]
        jobs.append({"job_name": "original", "static_configs": groups})
    limits = {"scrape_interval": f"{INTERVAL:.0f}s", "scrape_timeout": f"{INTERVAL:.0f}s"}
    return json.dumps({"global": limits, "scrape_configs": jobs})


def target_group(port: int, **labels: str) -> dict[str, Any]:
    """Return a group of one target."""
    return {"targets": [f"{LOOPBACK}:{port}"], "labels": labels}


class Prometheus(NamedTuple):
    """A running Prometheus, and the host and port of its API."""

    process: Process
    address: str


@contextlib.contextmanager
def prometheus_running(world: World) -> Iterator[Prometheus]:
    """Start a Prometheus, and end it at the end."""
    program = shutil.which("prometheus")
    if program is None:
        raise BenchError("prometheus not found: install Debian's prometheus")
    (world.folder / "prometheus.json").write_text(prometheus_config(world), encoding="utf-8")
    address = f"{LOOPBACK}:{free_port()}"
    command = [program, f"--config.file={world.folder / 'prometheus.json'}"]
    command += [f"--storage.tsdb.path={world.folder / 'data'}", f"--web.listen-address={address}"]
    with process_running([*command, "--log.level=error"], world.folder) as process:
        wait_for_port(process, int(address.rpartition(":")[2]))
        yield Prometheus(process, address)


# All of it


class Soak(NamedTuple):
    """A running soak."""

    world: World
    expexp: Process
    authority: trustme.CA
    prometheus: Prometheus
    original: Process | None

    @property
    def pids(self) -> tuple[int, int, int]:
        """Return the processes of expexp and of Prometheus, and expexp's port."""
        return self.expexp.popen.pid, self.prometheus.process.popen.pid, self.world.port


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
        modules, bodies = make_modules(folder, ports, options)
        (folder / "expexp.json").write_text(json.dumps({"modules": modules}), encoding="utf-8")
        port = free_port()
        command = [options.python, str(options.expexp), "-config=expexp.json"]
        command += [f"-web.listen-address={LOOPBACK}:{port}"]
        expexp = stack.enter_context(process_running(command, folder))
        wait_for_port(expexp, port)
        original = None
        original_port = None
        if options.against_original:
            original_port = free_port()
            command = original_command(folder, modules, original_port)
            original = stack.enter_context(process_running(command, folder))
            wait_for_port(original, original_port)
        ill = tuple(name for name in modules if name not in bodies)
        world = World(folder, ports, port, tuple(bodies), ill, bodies, original_port)
        prometheus = stack.enter_context(prometheus_running(world))
        yield Soak(world, expexp, authority, prometheus, original)


def original_command(folder: Path, modules: Mapping[str, Any], port: int) -> list[str]:
    """Write the same modules for exporter_exporter, and return the command that starts it."""
    known = {
        name: {key: value for key, value in module.items() if key != "accept_args"}
        for name, module in modules.items()
    }
    path = folder / "original.yaml"  # JSON is YAML
    path.write_text(json.dumps({"modules": known}), encoding="utf-8")
    program = find_program("prometheus-exporter-exporter")
    return [program, f"-config.file={path}", f"-web.listen-address={LOOPBACK}:{port}"]


def wait_for_scrapes(soak: Soak) -> None:
    """Wait until Prometheus has scraped every healthy module."""
    finish = time.monotonic() + 60
    while time.monotonic() < finish:
        with contextlib.suppress(OSError, BenchError):
            if not prometheus_scrapes(soak, 10).unknown:
                return
        time.sleep(0.5)
    raise BenchError("Prometheus has not scraped every module within 60 s")


def prometheus_scrapes(soak: Soak, seconds: float, job: str = "soak") -> Scrapes:
    """Return what Prometheus has of the healthy modules."""
    return scrapes_of(soak.prometheus.address, soak.world.healthy, seconds, job)


def plant(what: str, folder: Path) -> None:
    """Plant a fault that the soak must find."""
    if what == "byte":
        (folder / "plant-byte").touch()
    if what == "scrape":  # a healthy target is away for two scrapes
        (folder / "file0.prom").rename(folder / "away")
        threading.Timer(2.5, (folder / "away").rename, [folder / "file0.prom"]).start()


def leak(clients: list[socket.socket], port: int) -> None:
    """Keep one more connection, as a leaked descriptor would."""
    with contextlib.suppress(OSError):
        client = socket.create_connection((LOOPBACK, port))
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
        clients.append(client)


def run(options: argparse.Namespace) -> list[Row]:
    """Run the whole soak and return its rows."""
    with soaking(options) as soak, leaking() as leaked:
        wait_for_scrapes(soak)
        before = held_by(*soak.pids)
        checker = Checker(soak.world)
        works: list[Callable[[float], None]] = [checker.run_until]
        if options.faults:
            works.append(Faults(soak.world, soak.expexp, soak.authority).run_until)
        pid = soak.expexp.popen.pid
        cpu = cpu_seconds(pid)
        original_cpu = cpu_seconds(soak.original.popen.pid) if soak.original else 0
        started = time.monotonic()
        looks = watch(options, soak, works, leaked)
        seconds = time.monotonic() - started
        used = usage_of(pid, cpu)
        original_used = usage_of(soak.original.popen.pid, original_cpu) if soak.original else None
        after = held_at_last(*soak.pids, before)
        staying = zombies_that_stay(pid)
        for wrong in checker.answers.wrong[:10]:
            print(f"wrong: {wrong.what}", file=sys.stderr)
        passed = time.monotonic() - started
        scrapes = prometheus_scrapes(soak, passed)
        for episode in episodes_of(scrapes.down, time.time() - passed):
            print(f"failed, {episode}", file=sys.stderr)
        found = Findings(
            counts=(len(soak.world.healthy), len(soak.world.ill)),
            scrapes=scrapes,
            control=control_of(soak.prometheus.address, passed),
            wrong_values=wrong_values(soak.prometheus.address, passed),
            answers=checker.answers,
            looks=looks,
            before=before,
            after=after,
            staying=staying,
            seconds=seconds,
            looked_at=passed,
            used=used,
            original=(prometheus_scrapes(soak, passed, "original"), original_used)
            if original_used
            else None,
        )
        rows = report(found)
        if not all(row.holds for row in rows):
            tell_log(soak.expexp)
        return rows


def tell_log(expexp: Process) -> None:
    """Write the end of expexp's log to stderr."""
    lines = expexp.errors.read_text(encoding="utf-8", errors="replace").splitlines()
    print(*lines[-LOG_LINES:], sep="\n", file=sys.stderr)


@contextlib.contextmanager
def leaking() -> Iterator[list[socket.socket]]:
    """Yield a list for leaked connections, and close them at the end."""
    leaked: list[socket.socket] = []
    try:
        yield leaked
    finally:
        for client in leaked:
            client.close()


def watch(
    options: argparse.Namespace,
    soak: Soak,
    works: list[Callable[[float], None]],
    leaked: list[socket.socket],
) -> list[Look]:
    """Do the works for the whole time. Return what expexp held meanwhile."""
    pid = soak.expexp.popen.pid
    started = time.monotonic()
    finish = started + options.minutes * 60
    threads = [threading.Thread(target=work, args=(finish,)) for work in works]
    for thread in threads:
        thread.start()
    looks: list[Look] = []
    planted = False
    while (left := finish - time.monotonic()) > 0:
        time.sleep(min(LOOK_SECONDS, left))
        looks.append(look_at(pid, time.monotonic() - started))
        tell(looks)
        if not planted and time.monotonic() - started > options.minutes * 20:
            planted = True
            plant(options.plant, soak.world.folder)
        if options.plant == "descriptor":
            leak(leaked, soak.world.port)
    for thread in threads:
        thread.join()
    return looks


def zombies_that_stay(pid: int) -> int:
    """Return how many zombies there are now and are still there some seconds later."""
    sooner = zombies_of(pid)
    time.sleep(STAYING_SECONDS)
    return len(sooner & zombies_of(pid))


def tell(looks: Sequence[Look]) -> None:
    """Say once a minute on stderr how it goes."""
    last = looks[-1]
    if last.seconds % 60 < LOOK_SECONDS:
        held = f"{last.megabytes:.0f} MB, {last.descriptors} descriptors, {last.threads} threads"
        print(f"{last.seconds / 60:.0f} min: {held}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Soak an expexp.py on the loopback.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--targets", type=int, help=f"{TARGETS}, or {FEW_TARGETS} in a short soak")
    parser.add_argument("--no-faults", dest="faults", action="store_false")
    parser.add_argument(
        "--against-original",
        action="store_true",
        help="scrape the same http and exec modules through exporter_exporter as well",
    )
    parser.add_argument("--plant", choices=["byte", "scrape", "descriptor"])
    parser.add_argument("--expexp", type=Path, default=REPOSITORY / "expexp.py", metavar="FILE")
    parser.add_argument("--python", default=sys.executable, metavar="PATH")
    options = parser.parse_args()
    if options.against_original and options.faults:
        parser.error("--against-original needs --no-faults")
    if not options.targets:
        options.targets = TARGETS if options.minutes >= LONG_MINUTES else FEW_TARGETS
    python = shutil.which(options.python)
    if python is None or not options.expexp.is_file():
        parser.error("--python or --expexp: not found")
    options.python = os.path.abspath(python)
    options.expexp = options.expexp.resolve()
    return options


def peer_version() -> str:
    """Return the version of exporter_exporter."""
    text = output_of([find_program("prometheus-exporter-exporter"), "-version"])
    return first_match(r"Version: ([^-\s]+)", text)


def main() -> int:
    """Print the table; return 1 if a bound does not hold."""
    signal.signal(signal.SIGTERM, end)
    options = parse_arguments()
    version = output_of([options.python, "-c", "import platform; print(platform.python_version())"])
    kind = "with faults" if options.faults else "without faults"
    if options.against_original:
        kind += f", beside {PEER} {peer_version()}"
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
