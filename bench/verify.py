"""How fast expexp verifies, beside prometheus_client's parsers in the same process.

    make bench

Bodies: one scrape of a real node_exporter (it is started on the loopback, and ended), and 100,000
samples in 10,000 families. The figures that count are the ratios: machines are noisy, but both
sides run on the same one, in turn. Then, on one family of 50 MB: the memory that verification takes
beyond the body, and the longest time that another thread had to wait.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "contrib"))
import expolint

import expexp

Judge = Callable[[bytes, str], object]

TEXT = expexp.TEXT_CONTENT_TYPE
OPENMETRICS = expexp.OPENMETRICS_CONTENT_TYPE
PROTOBUF = (
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
)
PARSERS: dict[str, Callable[[str], object]] = {TEXT: parse_text, OPENMETRICS: parse_openmetrics}


@contextlib.contextmanager
def node_exporter() -> Iterator[int]:
    """The port of a real node_exporter; exits with 1 where there is none."""
    program = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")
    if not program:
        sys.exit("bench/verify.py needs node_exporter (Debian: prometheus-node-exporter)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [program, f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def scrape(port: int, accept: str) -> bytes:
    """One scrape, which may have to wait until the exporter listens."""
    end = time.monotonic() + 10
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/metrics", headers={"Accept": accept})
                return connection.getresponse().read()
            except ConnectionRefusedError:
                if time.monotonic() > end:
                    raise
        time.sleep(0.05)


def many_families(suffix: str, end: str) -> bytes:
    """100,000 samples in 10,000 families."""
    lines: list[str] = []
    for number in range(10_000):
        name = f"family_{number}_requests"
        lines += [f"# HELP {name} Requests of one kind.", f"# TYPE {name} counter"]
        for code in range(10):
            labels = f'{{code="{200 + code}",method="GET",path="/api/v1/items/{number}"}}'
            lines.append(f"{name}{suffix}{labels} {number * 10 + code}.5")
    return ("\n".join(lines) + "\n" + end).encode()


class Recorded:
    """A collector of the families of one scrape."""

    def __init__(self, text: str) -> None:
        """Parse the text format, without a gauge and a counter that clash in OpenMetrics."""
        families = list(parse_text(text))
        self._families = [f for f in families if not f.name.startswith("go_memstats_alloc_bytes")]

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families


def to_openmetrics(body: bytes) -> bytes:
    """The same scrape in OpenMetrics, which Debian's node_exporter does not speak."""
    registry = CollectorRegistry()
    registry.register(Recorded(body.decode()))
    exposition: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return exposition


def best(work: Callable[[], object], times: int) -> float:
    """The shortest of several runs, in seconds."""
    runs = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        runs.append(time.perf_counter() - started)
    return min(runs)


def compare(
    name: str, body: bytes, content_type: str, judge: Judge = expexp.verify_exposition
) -> None:
    """Print one line about one body; where prometheus_client has a parser, with the ratio."""
    times = 7 if judge is expexp.verify_exposition else 2
    ours = best(lambda: judge(body, content_type), times)
    size = len(body) / 1e6
    line = f"{name:38} {size:6.2f} MB {size / ours:7.1f} MB/s"
    parser = PARSERS.get(content_type)
    if parser:
        text = body.decode()
        theirs = best(lambda: list(parser(text)), 2)  # type: ignore[call-overload]
        line += f"   prometheus_client {size / theirs:5.1f} MB/s, ratio {theirs / ours:5.1f}"
    print(line)


def measure_memory_and_stall() -> None:
    """Print the peak of memory beyond the body, and the longest wait of another thread."""
    line = b'family_total{code="200",method="GET",path="/api/v1/items"} 12345.5\n'
    body = line * (50_000_000 // len(line))
    tracemalloc.start()
    expexp.verify_exposition(body, TEXT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    longest, over = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    expexp.verify_exposition(body, TEXT)
    over.set()
    watcher.join()
    memory = 1 + peak / len(body)
    print(f"one family of 50 MB: peak {memory:.2f} times the body, stall {longest * 1e3:.1f} ms")


def main() -> None:
    """Print the table."""
    print(f"Python {sys.version.split()[0]}, prometheus_client {version('prometheus_client')}")
    with node_exporter() as port:
        node_text = scrape(port, "text/plain")
        node_protobuf = scrape(port, PROTOBUF)
    node_openmetrics = to_openmetrics(node_text)
    families = many_families("", "")
    openmetrics = many_families("_total", "# EOF\n")
    judges: dict[str, Judge] = {"": expexp.verify_exposition, ", linter": expolint.findings}
    for who, judge in judges.items():
        compare(f"node_exporter, text{who}", node_text, TEXT, judge)
        compare(f"10,000 families, text{who}", families, TEXT, judge)
        compare(f"node_exporter, OpenMetrics{who}", node_openmetrics, OPENMETRICS, judge)
        compare(f"10,000 families, OpenMetrics{who}", openmetrics, OPENMETRICS, judge)
    compare("node_exporter, protobuf", node_protobuf, PROTOBUF)
    measure_memory_and_stall()


if __name__ == "__main__":
    main()
