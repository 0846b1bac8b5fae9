"""How fast expexp verifies, beside prometheus_client's parsers in the same process.

    make bench

Bodies: one scrape of a real node_exporter (it is started on the loopback, and ended), 100,000
samples in 10,000 families, and recorded bodies of other libraries (bench/bodies). The figures that
count are the ratios: machines are noisy, but both sides run on the same one, in turn.

Then the forms of other libraries, as ratios to canonical lines of the same content: of all lines,
and of one line in ten. Protobuf beside the same content in text. At last, on one family of 50 MB:
the memory that verification takes beyond the body, and the longest time that another thread had to
wait. With --against FILE the canonical lines of another expexp.py, in alternating runs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
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
from types import ModuleType

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

BODIES = Path(__file__).resolve().parent / "bodies"
Judge = Callable[[bytes, str], object]
TEXT = expexp.TEXT_CONTENT_TYPE
OPENMETRICS = expexp.OPENMETRICS_CONTENT_TYPE
PROTOBUF = (
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
)
PARSERS: dict[str, Callable[[str], object]] = {TEXT: parse_text, OPENMETRICS: parse_openmetrics}


@contextlib.contextmanager
def node_exporter() -> Iterator[int]:
    """Yield the port of a real node_exporter. Exit with 1 where there is none."""
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
        """Yield the families."""
        return self._families


def to_openmetrics(body: bytes) -> bytes:
    """Return the same scrape in OpenMetrics, which Debian's node_exporter does not speak."""
    registry = CollectorRegistry()
    registry.register(Recorded(body.decode()))
    exposition: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return exposition


def canonical_labels(number: int) -> str:
    """Labels as Go's libraries write them."""
    return f'{{area="heap",pool="G1 Eden Space",id="{number}"}}'


def canonical_value(number: int) -> str:
    """Return a value as Go's libraries write it."""
    return f" {number * 12345.5}"


def labels_of(count: int) -> Callable[[int], str]:
    """So many labels."""
    return lambda number: "{" + ",".join(f'l{n}="value {n + number}"' for n in range(count)) + "}"


def changed_labels(old: str, new: str) -> Callable[[int], str]:
    """Canonical labels with something replaced."""
    return lambda number: canonical_labels(number).replace(old, new)


def changed_value(value: str) -> Callable[[int], str]:
    """Return a value with the number in it."""
    return value.format


def lines(
    labels: Callable[[int], str], value: Callable[[int], str], quoted: bool = False
) -> list[str]:
    """Six thousand samples, without their newlines."""
    samples = []
    for number in range(6_000):
        name = f"jvm_{number // 10}_seconds_total"
        pairs = labels(number)
        series = f'{{"{name}",{pairs[1:]}' if quoted else name + pairs
        samples.append(series + value(number))
    return samples


def with_metadata(samples: list[str]) -> bytes:
    """Return a body with a family for each ten samples."""
    body = []
    for number in range(0, len(samples), 10):
        name = f"jvm_{number // 10}_seconds_total"
        body += [
            f"# HELP {name} Some text.",
            f"# TYPE {name} counter",
            *samples[number : number + 10],
        ]
    return ("\n".join(body) + "\n").encode()


CANONICAL = lines(canonical_labels, canonical_value)
FORM_LINES = {
    "trailing comma": lines(changed_labels("}", ",}"), canonical_value),
    "1.2E7": lines(canonical_labels, changed_value(" 1.23456{}E7")),
    "both, as from Java": lines(changed_labels("}", ",}"), changed_value(" 1.23456{}E7")),
    "blank after the comma": lines(changed_labels(",", ", "), canonical_value),
    "quoted names": lines(changed_labels("pool", '"my.pool"'), canonical_value, quoted=True),
    "nan": lines(canonical_labels, changed_value(" nan")),
    "+1": lines(canonical_labels, changed_value(" +{}")),
    ".5": lines(canonical_labels, changed_value(" .5{}")),
    "blank at the end": lines(canonical_labels, changed_value(" {}.5 ")),
    "an escape": lines(changed_labels("G1 ", r"G1\s"), canonical_value),
}
NO_LABELS = lines(changed_value("_{}_bytes_of_all_areas_of_the_heap"), canonical_value)
EMPTY_BRACES = lines(changed_value("_{}_bytes_of_all_areas_of_the_heap{{}}"), canonical_value)


def seconds(module: ModuleType, body: bytes, content_type: str) -> float:
    """Processor time of one verification."""
    started = time.thread_time()
    module.verify_exposition(body, content_type)
    return time.thread_time() - started


def speeds(work: list[tuple[ModuleType, bytes, str]], times: int = 9) -> list[float]:
    """Bytes a second of each, the fastest of alternating runs."""
    runs = [[seconds(*one) for one in work] for _ in range(times)]
    return [len(body) / min(taken) for (_, body, _), taken in zip(work, zip(*runs))]


def speed_of_client(body: bytes, content_type: str) -> float:
    """Bytes a second of prometheus_client's parser."""
    text = body.decode()
    parser = PARSERS[content_type]
    return len(body) / best(lambda: list(parser(text)), 2)  # type: ignore[call-overload]


def measure_form(name: str, odd: list[str], even: list[str]) -> None:
    """Print the ratios of a form's speed to that of canonical lines, and to prometheus_client's."""
    mixed = [odd[place] if place % 10 == 0 else even[place] for place in range(len(even))]
    bodies = [with_metadata(samples) for samples in (even, odd, mixed)]
    canonical, whole, tenth = speeds([(expexp, body, TEXT) for body in bodies])
    line = f"{name:22} {whole / 1e6:6.1f} MB/s, all {whole / canonical:4.2f}"
    line += f", 1 in 10 {tenth / canonical:4.2f}"
    line += f", prometheus_client {whole / speed_of_client(bodies[1], TEXT):5.1f}"
    ends = [body + b"# EOF\n" for body in bodies]
    with contextlib.suppress(expexp.ExpositionError):
        canonical, whole, tenth = speeds([(expexp, body, OPENMETRICS) for body in ends])
        line += f"; OpenMetrics: all {whole / canonical:4.2f}, 1 in 10 {tenth / canonical:4.2f}"
    print(line)


def measure_forms() -> None:
    """Print a line for each form."""
    for name, odd in FORM_LINES.items():
        measure_form(name, odd, CANONICAL)
    measure_form("{}", EMPTY_BRACES, NO_LABELS)
    few = lines(labels_of(12), canonical_value)
    for count in (17, 20, 30):
        measure_form(f"{count} labels", lines(labels_of(count), canonical_value), few)


def measure_recorded() -> None:
    """Print the speed of the recorded bodies, each so often that it has half a megabyte."""
    for path in sorted(BODIES.iterdir()):
        if path.suffix in (".txt", ".openmetrics"):
            body = path.read_bytes()
            content_type = OPENMETRICS if path.suffix == ".openmetrics" else TEXT
            end = b"# EOF\n" if content_type == OPENMETRICS else b""
            many = body[: len(body) - len(end)] * (500_000 // len(body)) + end
            (ours,) = speeds([(expexp, many, content_type)])
            ratio = ours / speed_of_client(body, content_type)
            print(f"{path.name:30} {ours / 1e6:6.1f} MB/s, prometheus_client {ratio:5.1f}")


def measure_protobuf(body: bytes, text: bytes) -> None:
    """Print the speed of protobuf beside that of the same scrape in text."""
    by_bytes, text_speed = speeds([(expexp, body, PROTOBUF), (expexp, text, TEXT)])
    times = (len(body) / by_bytes) / (len(text) / text_speed)
    print(
        f"protobuf {by_bytes / 1e6:.1f} MB/s, {times:.1f} times as long as the same content in text"
    )


def measure_against(file: str, bodies: dict[str, tuple[bytes, str]]) -> None:
    """Print ratios of the speed of canonical lines to that of another expexp.py."""
    spec = importlib.util.spec_from_file_location("other", file)
    assert spec
    assert spec.loader
    other = importlib.util.module_from_spec(spec)
    sys.modules["other"] = other
    spec.loader.exec_module(other)
    for name, (body, content_type) in bodies.items():
        many = body * max(1, 1_000_000 // len(body)) if content_type == TEXT else body
        ours, theirs = speeds([(expexp, many, content_type), (other, many, content_type)], 25)
        print(
            f"{name:38} {ours / 1e6:7.1f} MB/s, against {theirs / 1e6:7.1f}: {ours / theirs:5.3f}"
        )


def best(work: Callable[[], object], times: int) -> float:
    """Return the shortest of several runs, in seconds."""
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", help="another expexp.py")
    options = parser.parse_args()
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
    measure_recorded()
    measure_forms()
    measure_protobuf(node_protobuf, node_text)
    measure_memory_and_stall()
    if options.against:
        bodies = {
            "node_exporter, text": (node_text, TEXT),
            "10,000 families, text": (families, TEXT),
            "10,000 families, OpenMetrics": (openmetrics, OPENMETRICS),
        }
        measure_against(options.against, bodies)


if __name__ == "__main__":
    main()
