"""What `soak.py` finds: what expexp holds, what Prometheus has, when the machine was late.

A fault counts only if the machine was not late at that moment. Prometheus also scrapes some targets
directly, without expexp: if these scrapes were late, the machine was.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import statistics
import time
import urllib.parse
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compare import BenchError, cpu_seconds, memory
from soak_targets import SAMPLES

LONGEST_GAP = 2.6  # seconds between two samples of `up`
LATE_SECONDS = 0.1  # of a direct scrape, which takes a few milliseconds
MARGIN_SECONDS = 1.0  # beside a late moment
LATE_SHARE = 0.9  # of the time: beyond it there is no verdict
SLOW_SECONDS = 0.4  # of a failed scrape: a quicker one has not failed because of the machine
SETTLED_SECONDS = 300  # what expexp holds until then is what it may hold at the end
GROWTH = 1.10
SLACK = 8  # descriptors and threads of scrapes that run just now
SLACK_MEGABYTES = 8
EPISODE_SECONDS = 2.0  # scrapes that fail later belong to another episode
UNSETTLED_MEGABYTES = 16  # of a run that is too short for its memory to settle
HEALTHY_P99_SECONDS = 0.5
PROCESSES = 3  # that have to run for an answer through expexp: each may be as late as a direct one
CALM_SECONDS = 3.0  # for a look at what expexp holds
SETTLE_SECONDS = 30  # until it holds no more than before
STAYING_SECONDS = 3.0  # of a zombie: a command is reaped half a second after its scrape


# What expexp holds


class Look(NamedTuple):
    """What expexp held at a moment."""

    seconds: float
    megabytes: float
    descriptors: int
    threads: int
    zombies: frozenset[int]


class Held(NamedTuple):
    """What expexp held within some seconds, without what Prometheus's connections hold.

    Prometheus keeps more connections after a moment with many scrapes. They are no leak.
    """

    descriptors: float
    threads: float


def look_at(pid: int, seconds: float) -> Look:
    """Return what a process holds; raise BenchError if it has ended."""
    try:
        return Look(
            seconds,
            memory(pid, "VmRSS"),
            entries(pid, "fd"),
            entries(pid, "task"),
            zombies_of(pid),
        )
    except OSError as error:
        raise BenchError(f"expexp has ended: {error}") from None


def entries(pid: int, folder: str) -> int:
    """Return how many descriptors or threads a process has."""
    return len(list(Path(f"/proc/{pid}/{folder}").iterdir()))


def zombies_of(parent: int) -> frozenset[int]:
    """Return the children of a process that have ended and are not reaped."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            if fields[0] == "Z" and int(fields[1]) == parent:
                found.add(int(file.parent.name))
    return frozenset(found)


def links_of(pid: int) -> list[str]:
    """Return what the descriptors of a process lead to."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    return links


def accepted_from(client: int, port: int) -> set[str]:
    """Return the sockets of a server on the loopback whose peer is a process."""
    clients = set(links_of(client))
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    ends: dict[str, tuple[int, int]] = {}
    for fields in map(str.split, lines):
        local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
        ends[f"socket:[{fields[9]}]"] = local, remote
    ports = {local for link, (local, remote) in ends.items() if remote == port and link in clients}
    return {link for link, (local, remote) in ends.items() if local == port and remote in ports}


def held_by(pid: int, prometheus: int, port: int) -> Held:
    """Return what expexp holds, without what Prometheus's connections hold.

    Scrapes that run just now add descriptors, so the least counts. A thread can begin later than
    its connection, so for threads the median counts.
    """
    descriptors = []
    threads = []
    end = time.monotonic() + CALM_SECONDS
    while time.monotonic() < end:
        links = links_of(pid)
        accepted = accepted_from(prometheus, port)
        descriptors.append(sum(link not in accepted for link in links))
        threads.append(entries(pid, "task") - len(accepted.intersection(links)))
        time.sleep(0.05)
    return Held(min(descriptors), statistics.median(threads))


def held_at_last(pid: int, prometheus: int, port: int, before: Held) -> Held:
    """Return what expexp holds as soon as it is no more than before, or after 30 s."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        after = held_by(pid, prometheus, port)
        if all(two <= most_of(one) for one, two in zip(before, after)) or time.monotonic() > end:
            return after


def most_of(before: float, slack: float = SLACK) -> float:
    """Return the most that may be there later."""
    return max(before * GROWTH, before + slack)


# What Prometheus has


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


def samples_of(series: dict[str, Any]) -> list[tuple[float, float]]:
    """Return time and value of each sample of a series."""
    return [(float(when), float(value)) for when, value in series["values"]]


class Span(NamedTuple):
    """A stretch of time, in seconds since 1970."""

    start: float
    end: float


class Lateness:
    """When the machine was late: targets that Prometheus scrapes directly were late as well."""

    def __init__(self, spans: Iterable[Span]) -> None:
        """Join spans that overlap."""
        self.spans: list[Span] = []
        for span in sorted(spans):
            if self.spans and span.start <= self.spans[-1].end:
                longer = max(span.end, self.spans[-1].end)
                self.spans[-1] = Span(self.spans[-1].start, longer)
            else:
                self.spans.append(span)

    @property
    def seconds(self) -> float:
        """Return the seconds of all spans."""
        return sum(span.end - span.start for span in self.spans)

    def excuses(self, start: float, end: float) -> bool:
        """Return whether the machine was late at some time between two."""
        return any(span.start <= end and start <= span.end for span in self.spans)


class Control(NamedTuple):
    """The direct scrapes of Prometheus."""

    scraped: int
    late: int
    longest: float
    lateness: Lateness


def control_of(address: str, seconds: float) -> Control:
    """Return how late the scrapes were that do not go through expexp."""
    window = f'{{job="control"}}[{math.ceil(seconds)}s]'
    spans: list[Span] = []
    durations: list[float] = []
    for series in query(address, f"scrape_duration_seconds{window}"):
        for when, took in samples_of(series):
            durations.append(took)
            if took > LATE_SECONDS:
                spans.append(Span(when - MARGIN_SECONDS, when + took + MARGIN_SECONDS))
    for series in query(address, f"up{window}"):
        samples = samples_of(series)
        spans += gaps_of(samples)
        spans += [Span(when - 1, when + 2) for when, value in samples if value != 1]
    return Control(len(durations), len(spans), max(durations, default=0), Lateness(spans))


def gaps_of(samples: Sequence[tuple[float, float]]) -> list[Span]:
    """Return the gaps between samples that are too long."""
    times = [when for when, _ in samples]
    pairs = zip(times, times[1:])
    return [Span(sooner, later) for sooner, later in pairs if later - sooner > LONGEST_GAP]


class Faults(NamedTuple):
    """How many faults count, and how many came while the machine was late."""

    counted: int
    excused: int

    def row(self, what: str) -> Row:
        """Return the row of these faults, of which there must be none that counts."""
        late = f" ({self.excused} more while the machine was late)" if self.excused else ""
        return Row(what, f"{self.counted}{late}", "0", not self.counted)


def judge(spans: Collection[Span], lateness: Lateness) -> Faults:
    """Return how many faults count: those at times when the machine was not late."""
    excused = sum(lateness.excuses(span.start, span.end) for span in spans)
    return Faults(len(spans) - excused, excused)


class Down(NamedTuple):
    """A failed scrape: when, and how long it took."""

    when: float
    seconds: float


def episodes_of(down: Collection[Down], began: float) -> list[str]:
    """Return when scrapes failed, as seconds from `began` (Unix time), and how many at a time."""
    episodes: list[list[float]] = []
    for when in sorted(each.when for each in down):
        if not episodes or when - episodes[-1][-1] > EPISODE_SECONDS:
            episodes.append([])
        episodes[-1].append(when)
    return [
        f"{each[0] - began:.0f} s to {each[-1] - began:.0f} s: {len(each)}" for each in episodes
    ]


def judge_down(down: Collection[Down], lateness: Lateness) -> Faults:
    """Return how many failed scrapes count: a quick one always does."""
    slow = [Span(one.when, one.when + 1) for one in down if one.seconds >= SLOW_SECONDS]
    found = judge(slow, lateness)
    return Faults(found.counted + len(down) - len(slow), found.excused)


class Scrapes(NamedTuple):
    """What Prometheus has of the healthy modules."""

    scraped: int
    down: list[Down]
    gaps: list[Span]
    unknown: int  # modules without any scrape


def scrapes_of(address: str, names: Collection[str], seconds: float, job: str = "soak") -> Scrapes:
    """Return how often modules were scraped, were down, and had a gap."""
    counted = 0
    down: list[Down] = []
    gaps: list[Span] = []
    seen = set()
    for series in query(address, f'up{{job="{job}"}}[{math.ceil(seconds)}s]'):
        name = series["metric"]["module"]
        if name in names:
            seen.add(name)
            samples = samples_of(series)
            counted += len(samples)
            failed = [when for when, value in samples if value != 1]
            if failed:
                took = durations_of(address, job, name, seconds)
                down += [Down(when, took.get(when, 0)) for when in failed]
            gaps += gaps_of(samples)
    return Scrapes(counted, down, gaps, len(names) - len(seen))


def durations_of(address: str, job: str, module: str, seconds: float) -> dict[float, float]:
    """Return how long the scrapes of a module took, by their time."""
    labels = f'{{job="{job}",module="{module}"}}[{math.ceil(seconds) + 2}s]'
    found = query(address, f"scrape_duration_seconds{labels}")
    return {when: took for series in found for when, took in samples_of(series)}


def wrong_values(address: str, seconds: float) -> int:
    """Return how many series had a value that no healthy target gives."""
    wrong = 0
    for place in range(SAMPLES):
        series = f'soak_value{{job="soak",place="{place}"}}[{math.ceil(seconds)}s]'
        text = " or ".join(f"{name}({series}) != {place}.5" for name in EXTREMES)
        wrong += sum(int(found["value"][1]) for found in query(address, f"count({text})"))
    return wrong


EXTREMES = ("max_over_time", "min_over_time")


# What an honest client has


class Wrong(NamedTuple):
    """A wrong answer: when it came, what is wrong, and whether a late machine can be why."""

    span: Span
    what: str
    may_be_late: bool


class Answers(NamedTuple):
    """How long answers took, those of a target that was asked directly, and the wrong ones."""

    seconds: list[float]
    control: list[float]
    wrong: list[Wrong]

    def judge(self, lateness: Lateness) -> Faults:
        """Return how many wrong answers count."""
        slow = [wrong.span for wrong in self.wrong if wrong.may_be_late]
        found = judge(slow, lateness)
        return Faults(found.counted + len(self.wrong) - len(slow), found.excused)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


# What the programs use


class Usage(NamedTuple):
    """Processor time of a program and its commands, in seconds, and its memory in MiB."""

    cpu: float
    resident: float
    peak: float


def usage_of(pid: int, cpu_before: float) -> Usage:
    """Return what a process has used since it had used so many seconds."""
    cpu = cpu_seconds(pid) - cpu_before
    return Usage(cpu, memory(pid, "VmRSS"), memory(pid, "VmHWM"))


# The rows


class Row(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    bound: str = ""
    holds: bool = True


class Findings(NamedTuple):
    """All that was found."""

    counts: tuple[int, int]  # of healthy and ill modules
    scrapes: Scrapes
    control: Control
    wrong_values: int
    answers: Answers
    looks: list[Look]
    before: Held
    after: Held
    staying: int  # zombies at the end
    seconds: float
    looked_at: float  # seconds of Prometheus's data: the settling at the end as well
    used: Usage
    original: tuple[Scrapes, Usage] | None


def growth(looks: Sequence[Look]) -> Row:
    """Return the row of the memory, which must not grow from its settled value."""
    values = [look.megabytes for look in looks]
    until = min(SETTLED_SECONDS, looks[-1].seconds / 2)  # a short soak has no five minutes
    first = looks[0].megabytes  # a very late machine has no other look until then
    before = max([first, *(look.megabytes for look in looks if look.seconds <= until)])
    after = statistics.median(values[-max(3, len(values) // 20) :])
    is_short = until < SETTLED_SECONDS
    most = most_of(before, UNSETTLED_MEGABYTES if is_short else SLACK_MEGABYTES)
    return Row("MB", f"{before:.1f}, then {after:.1f}", f"at most {most:.1f}", after <= most)


def held_row(what: str, before: float, after: float) -> Row:
    """Return the row of what must not have grown."""
    most = most_of(before)
    found = f"{before:.0f}, then {after:.0f}"
    return Row(f"{what} without Prometheus's", found, f"at most {most:.0f}", after <= most)


def staying_zombies(found: Findings) -> int:
    """Return how many zombies were seen twice, five seconds apart, or stay at the end."""
    pairs = zip(found.looks, found.looks[1:])
    return len({pid for one, two in pairs for pid in one.zombies & two.zombies}) + found.staying


def rows_of_service(found: Findings) -> list[Row]:
    """Return the rows of what was served."""
    lateness = found.control.lateness
    scrapes = found.scrapes
    late = f"{found.control.late} late of {found.control.scraped:,}, "
    late += f"the longest {found.control.longest:.2f} s; in all {lateness.seconds:.0f} s"
    most = LATE_SHARE * found.looked_at
    p99 = percentile(found.answers.seconds, 0.99)
    p99_direct = percentile(found.answers.control, 0.99)
    p99_bound = HEALTHY_P99_SECONDS + PROCESSES * p99_direct
    median = percentile(found.answers.seconds, 0.5)
    wrong = found.answers.judge(lateness).row("wrong answers, of these")
    return [
        Row("healthy modules, ill ones", "{}, {}".format(*found.counts)),
        Row("scrapes of the healthy by Prometheus", f"{scrapes.scraped:,}"),
        Row(
            "direct scrapes by Prometheus", late, f"at most {most:.0f} s", lateness.seconds <= most
        ),
        Row("healthy modules without a scrape", str(scrapes.unknown), "0", not scrapes.unknown),
        judge_down(scrapes.down, lateness).row("`up` 0 of the healthy"),
        judge(scrapes.gaps, lateness).row("gaps in `up` of the healthy"),
        Row("wrong series in Prometheus", str(found.wrong_values), "0", not found.wrong_values),
        Row("answers compared", f"{len(found.answers.seconds):,}"),
        wrong,
        Row(
            "median and p99 of these answers, p99 of direct ones, ms",
            f"{median * 1e3:.1f}, {p99 * 1e3:.1f}, {p99_direct * 1e3:.1f}",
            f"p99 at most {p99_bound * 1e3:.0f}",
            p99 <= p99_bound,
        ),
    ]


def rows_of_original(found: Findings) -> list[Row]:
    """Return the rows that compare expexp with exporter_exporter."""
    if not found.original:
        return []
    scrapes, used = found.original
    cpu = f"{found.used.cpu:.1f}, {used.cpu:.1f}, ratio {found.used.cpu / used.cpu:.2f}"
    memories = f"{found.used.resident:.1f} and {found.used.peak:.1f}, "
    memories += f"{used.resident:.1f} and {used.peak:.1f}"
    down = f"{len(scrapes.down)}, {len(scrapes.gaps)}"
    return [
        Row("scrapes through exporter_exporter", f"{scrapes.scraped:,}"),
        Row("`up` 0 and gaps through exporter_exporter", down),
        Row("CPU seconds of expexp and of exporter_exporter, commands included", cpu),
        Row("MiB at the end and at most, of expexp and of exporter_exporter", memories),
    ]


def report(found: Findings) -> list[Row]:
    """Return all rows."""
    zombies = staying_zombies(found)
    return [
        *rows_of_service(found),
        growth(found.looks),
        held_row("descriptors", found.before.descriptors, found.after.descriptors),
        held_row("threads", found.before.threads, found.after.threads),
        Row("zombies that stay", str(zombies), "0", not zombies),
        Row(
            "processors used by expexp and its commands",
            f"{found.used.cpu / found.seconds:.2f}",
        ),
        *rows_of_original(found),
    ]
