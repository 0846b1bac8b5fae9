"""The cases of `host.py`, one function each: a host in trouble, and what expexp makes of it.

A case starts an expexp of its own, scrapes a healthy module all the while, and returns figures.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

from compare import (
    BenchError,
    RefusedError,
    free_port,
    memory,
    node_exposition,
    process_running,
    wait_for_port,
)
from host_peers import (
    make_folder,
    memory_group,
    mount_anew,
    neighbours,
    require_root,
    seconds_until,
    with_mounts,
)
from hostile_attacks import (
    END_SECONDS,
    OUTAGE_SECONDS,
    VICTIM,
    Figure,
    at_least,
    at_most,
    left_figure,
    outage_figure,
)
from hostile_peers import (
    ASK_SECONDS,
    HEALTHY,
    LOOPBACK,
    MEBIBYTE,
    Bench,
    Scraper,
    Service,
    ask,
    close_all,
    open_clients,
    read_statuses,
    request_bytes,
    scraping,
    serving,
    write_modules,
)

COMMAND = "/proxy?module=command"
TROUBLE_SECONDS = 3
RECOVERY_SECONDS = 5
INTERVAL = 0.1  # between the scrapes of a healthy module
REJECTED = "expexp_rejected_connections_total"
DROPPED = "expexp_log_lines_dropped_total"
BODY = node_exposition(devices=9, processors=30)  # of the healthy module


# Figures


def shell(script: str, **settings: Any) -> dict[str, Any]:
    """Return an exec module that runs a script."""
    return {"method": "exec", "exec": {"command": "sh", "args": ["-c", script]}, **settings}


def modules_for(bench: Bench) -> dict[str, Any]:
    """Return a module that never answers, and one whose command answers."""
    return {"victim": bench.http("silent"), "command": shell("echo a 1")}


def failures(service: Service, module: str, reason: str) -> float:
    """Return how many scrapes of a module have failed for a reason."""
    labels = f'module="{module}",reason="{reason}"'
    return service.metric(rf"expexp_proxy_failures_total\{{{labels}\}}")


def said(service: Service, words: str, log: Path | None = None) -> Figure:
    """Return how many lines of the log have these words, at least one; wait for it."""
    file = log or service.process.errors

    def count() -> int:
        return file.read_text(encoding="utf-8", errors="replace").count(words)

    seconds_until(lambda: count() > 0)
    return at_least(f'lines of the log with "{words}"', count(), 1)


def recovery(service: Service, path: str = HEALTHY, patience: float = 1) -> Figure:
    """Return the seconds until a scrape over a new connection succeeds again."""
    seconds = seconds_until(lambda: ask(service.port, path, patience)[0] == 200)
    what = f"until {path.rpartition('=')[2]} is scraped again, s"
    return at_most(what, seconds, RECOVERY_SECONDS)


def ending(service: Service) -> Figure:
    """Send TERM, and return the seconds to the end."""
    return at_most("from TERM to the end, s", service.end(END_SECONDS), END_SECONDS)


def lift(service: Service, kind: int) -> None:
    """Lift a limit of a process."""
    resource.prlimit(service.pid, kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Kept:
    """One connection that stays open, as Prometheus keeps one for each target."""

    def __init__(self, service: Service) -> None:
        """Connect with a scrape; raise BenchError if it fails."""
        self._connection = http.client.HTTPConnection(LOOPBACK, service.port, timeout=2)
        self._connection.connect()
        self._connection.auto_open = 0  # it must stay the same
        if self.ask(HEALTHY) != 200:
            raise BenchError("a healthy module is not served before the trouble")

    def ask(self, path: str) -> int:
        """Return the status of a request, 0 without an answer."""
        try:
            self._connection.request("GET", path)
            response = self._connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            return 0
        return response.status

    def scrape(self, seconds: float) -> tuple[int, int]:
        """Scrape every 100 ms; return how many scrapes were answered, and of how many."""
        end = time.monotonic() + seconds
        statuses: list[int] = []
        while time.monotonic() < end:
            statuses.append(self.ask(HEALTHY))
            time.sleep(INTERVAL)
        return statuses.count(200), len(statuses)


@contextlib.contextmanager
def watched(service: Service) -> Iterator[Scraper]:
    """Scrape the healthy module every 100 ms."""
    with scraping(service, interval=INTERVAL) as scraper:
        yield scraper


# What runs out


def case_descriptors(bench: Bench) -> list[Figure]:
    """Start with 64 descriptors; 60 clients hold scrapes; then no descriptor is free at all."""
    wrapper = ["prlimit", "--nofile=64:64"]
    modules = {**modules_for(bench), "starved": shell("echo a 1")}
    with serving(bench, modules, wrapper=wrapper) as service:
        with watched(service) as scraper:
            clients = open_clients(service.port, request_bytes(VICTIM), 60)
            time.sleep(TROUBLE_SECONDS)
            counted = service.metric(REJECTED) + failures(service, "victim", "busy")
            samples = scraper.samples()
            close_all(clients)
        figures = [
            outage_figure(samples),
            at_least("connections rejected or busy, as /metrics says", counted, 1),
            recovery(service, COMMAND),
        ]
        return [*figures, *take_descriptors(service), left_figure(service), ending(service)]


def take_descriptors(service: Service) -> list[Figure]:
    """Lower the limit below the lowest descriptor that is free, and lift it again."""
    soft, hard = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    kept = Kept(service)
    in_use = set(map(int, os.listdir(f"/proc/{service.pid}/fd")))
    free = min(set(range(hard)) - in_use)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (free, hard))
    path = "/proxy?module=starved"  # no warning about it has been logged in the last 10 s
    statuses = [kept.ask(path) for _ in range(10)]
    figure = said(service, "too many open files")
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (soft, hard))
    return [
        at_least("scrapes answered with 500 without a descriptor", statuses.count(500), 1),
        figure,
        recovery(service, path),
    ]


def case_memory(bench: Bench) -> list[Figure]:
    """Start with an address space that has room for some threads alone; 40 clients come."""
    seconds = 5
    modules = {**modules_for(bench), "victim": bench.http("silent", timeout=f"{seconds}s")}
    with serving(bench, modules) as service:
        size = int(memory(service.pid, "VmPeak") + 16) * MEBIBYTE
    with serving(bench, modules, wrapper=["prlimit", f"--as={size}:"]) as service:
        with watched(service) as scraper:
            clients: list[socket.socket] = []
            for _ in range(40):  # one by one: a scrape that has begun cannot be evicted
                clients += open_clients(service.port, request_bytes(VICTIM), 1)
                time.sleep(INTERVAL)
            ended = len(read_statuses(clients, 2 * ASK_SECONDS))
            counted = seconds_until(lambda: service.metric(REJECTED) > 0)
            samples = scraper.samples()
        lift(service, resource.RLIMIT_AS)
        return [
            outage_figure(samples, seconds + OUTAGE_SECONDS),
            at_least("connections that were answered or closed, of 40", ended, 40),
            at_most(f"until /metrics has {REJECTED}, s", counted, RECOVERY_SECONDS),
            recovery(service, COMMAND),
            left_figure(service),
            ending(service),
        ]


STARTS = range(128, 16, -8)  # MiB: from enough for all to too little for Python


def case_memory_start(bench: Bench) -> list[Figure]:
    """Start with less and less address space: expexp must serve, or end and say why."""
    outcomes = [start_within(bench, megabytes) for megabytes in STARTS]
    ended = [outcome for outcome in outcomes if outcome not in ("serves", "waits", "hangs")]
    words = "memory|thread|unexpected error|failed to map"
    said_why = sum(bool(re.search(words, outcome, re.IGNORECASE)) for outcome in ended)
    waits = outcomes.count("waits")
    return [
        at_least(f"starts that serve, of {len(outcomes)}", outcomes.count("serves"), 1),
        at_most("starts that hang", outcomes.count("hangs"), 0, f" ({waits} wait for memory)"),
        at_most(
            "starts that end and do not say why", len(ended) - said_why, 0, f" of {len(ended)}"
        ),
    ]


def start_within(bench: Bench, megabytes: int) -> str:
    """Start with a limit. Return how it ends: "serves", "waits", "hangs" or the log's last line.

    One that has room for no thread of a connection waits: it serves when the limit is lifted.
    """
    folder = make_folder(bench)
    write_modules(bench, folder, {})
    port = free_port()
    command = ["prlimit", f"--as={megabytes * MEBIBYTE}:", bench.python, str(bench.expexp)]
    command += ["-config=expexp.json", f"-web.listen-address={LOOPBACK}:{port}"]

    def serves() -> bool:
        return ask(port, "/-/healthy", 1)[0] == 200

    with process_running(command, folder) as process:
        try:
            wait_for_port(process, port)
            is_served = seconds_until(serves, RECOVERY_SECONDS) <= RECOVERY_SECONDS
            process.require_alive()
        except RefusedError as error:
            return str(error)
        except BenchError:
            return "hangs"
        if is_served:
            return "serves"
        no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.popen.pid, resource.RLIMIT_AS, no_limit)
        is_back = seconds_until(serves, RECOVERY_SECONDS) <= RECOVERY_SECONDS
        return "waits" if is_back else "hangs"


def case_memory_group(bench: Bench) -> list[Figure]:
    """Run a command that takes more memory than a control group has; then raise its limit."""
    script = "b = b'1' * (200 << 20); print('a', len(b))"
    hog = {"method": "exec", "exec": {"command": bench.python, "args": ["-c", script]}}
    modules = {**modules_for(bench), "hog": {**hog, "timeout": "60s"}}
    require_root("to make a control group")
    with memory_group(150) as group, serving(bench, modules, wrapper=group.wrapper) as service:
        with watched(service) as scraper:
            statuses = [ask(service.port, "/proxy?module=hog", 60)[0] for _ in range(3)]
            time.sleep(1)
            samples = scraper.samples()
        kills = group.kills()
        group.set_limit(1000)
        return [
            outage_figure(samples),
            at_least("processes that the kernel killed", kills, 3),
            at_least("scrapes of the command answered with 500, of 3", statuses.count(500), 3),
            said(service, "was killed by SIGKILL"),
            recovery(service, "/proxy?module=hog", RECOVERY_SECONDS),
            left_figure(service),
            ending(service),
        ]


def case_processes(bench: Bench) -> list[Figure]:
    """Let other processes of the same user fill its limit of 40, and end them."""
    require_root("to run expexp as a user without other processes")
    user = 62_000 + os.getpid() % 1000
    rights = "+dac_read_search"  # the interpreter may be in a folder of root's
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    become += [f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    wrapper = ["prlimit", "--nproc=40:40", *become]
    with serving(bench, modules_for(bench), wrapper=wrapper) as service:
        kept = Kept(service)
        with neighbours(become, 45):
            answered, tried = kept.scrape(TROUBLE_SECONDS)
            status = kept.ask(COMMAND)
            refused = ask(service.port, HEALTHY, 2)[0]
        return [
            at_most(
                "scrapes over an open connection that failed", tried - answered, 0, f" of {tried}"
            ),
            at_least("status of a command that cannot be started", status, 500),
            said(service, "resource temporarily unavailable"),
            at_most("status of a new connection (0: closed)", refused, 0),
            recovery(service),
            at_least(REJECTED, service.metric(REJECTED), 1),
            recovery(service, COMMAND),
            left_figure(service),
            ending(service),
        ]


# The file systems


def case_proc(bench: Bench) -> list[Figure]:
    """Hide /proc behind an empty file system, then take that away."""
    script = 'mount -t tmpfs -o size=4k,mode=555 none /proc; exec "$@"'
    with serving(bench, modules_for(bench), wrapper=with_mounts(script, "sh")) as service:
        with watched(service) as scraper:
            statuses = [ask(service.port, COMMAND)[0] for _ in range(20)]
            without = process_metrics(service)
            service.process.popen.send_signal(signal.SIGHUP)
            figure = said(service, "configuration reloaded")
            samples = scraper.samples()
        mount_anew(service, "umount", "/proc")
        return [
            outage_figure(samples),
            at_least("commands that ran, of 20", statuses.count(200), 20),
            figure,
            at_most("metrics process_* of /proc in /metrics", without, 0),
            at_least("the same when /proc is back, of 4", process_metrics(service), 4),
            left_figure(service),
            ending(service),
        ]


def process_metrics(service: Service) -> float:
    """Return how many metrics that need /proc are in /metrics; inf without an answer."""
    status, body = ask(service.port, "/metrics")
    names = rb"(?m)^process_(?:threads|virtual_memory_bytes|resident_memory_bytes|open_fds) "
    return len(re.findall(names, body)) if status == 200 else math.inf


def case_read_only(bench: Bench) -> list[Figure]:
    """Make all that expexp sees read-only, and writable again."""
    folder = make_folder(bench)
    script = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; mount -o remount,bind,ro /'
    script += '; exec "$@"'
    writer = shell(f"echo 1 >'{folder}/written' && echo a 1")
    modules = {**modules_for(bench), "writer": writer}
    with serving(bench, modules, wrapper=with_mounts(script, str(bench.folder))) as service:
        with watched(service) as scraper:
            status = ask(service.port, "/proxy?module=writer")[0]
            statuses = [ask(service.port, COMMAND)[0] for _ in range(20)]
            service.process.popen.send_signal(signal.SIGHUP)
            figures = [
                said(service, "Read-only file system"),
                said(service, "configuration reloaded"),
            ]
            samples = scraper.samples()
        mount_anew(service, "mount", "-o", "remount,bind,rw", str(bench.folder))
        return [
            outage_figure(samples),
            at_least("status of a command that writes", status, 500),
            *figures,
            at_least("commands that ran, of 20", statuses.count(200), 20),
            recovery(service, "/proxy?module=writer"),
            left_figure(service),
            ending(service),
        ]


# The log


def case_disk(bench: Bench) -> list[Figure]:
    """Fill the file system of the log with it, and enlarge that file system."""
    folder = make_folder(bench)
    script = 'mount -t tmpfs -o size=64k none "$0"; exec "$@" 2>>"$0/log"'
    wrapper = with_mounts(script, str(folder))
    with serving(bench, {}, "-log.level=info", wrapper=wrapper) as service:
        log = Path(f"/proc/{service.pid}/root{folder}/log")
        with watched(service) as scraper:
            answered = scrape_until_dropped(service)
            dropped = service.metric(DROPPED)
            samples = scraper.samples()
        mount_anew(service, "mount", "-o", "remount,size=1m", str(folder))
        figures = after_drops(service, log.read_bytes)
        return [
            outage_figure(samples),
            Figure("scrapes answered while it fills", *share(answered)),
            at_least("lines counted as dropped", dropped, 1),
            *figures,
            left_figure(service),
            ending(service),
        ]


def scrape_until_dropped(service: Service) -> list[int]:
    """Scrape until lines of the log are dropped, and 100 times more; return the statuses."""
    statuses: list[int] = []
    left = 5000
    while left:
        left -= 1
        statuses.append(ask(service.port, "/-/healthy")[0])
        if not left % 20 and left > 100 and service.metric(DROPPED) > 0:
            left = 100
    return statuses


def share(statuses: Sequence[int]) -> tuple[str, str, bool]:
    """Return how many requests have succeeded, as they must all, for a figure."""
    good = statuses.count(200)
    return f"{good} of {len(statuses)}", "all", good == len(statuses)


def after_drops(service: Service, read: Callable[[], bytes]) -> list[Figure]:
    """Return that the log goes on, with whole lines, after lines have been dropped."""
    marker = f"/marker-{os.getpid()}"

    def is_there() -> bool:
        ask(service.port, marker)
        return marker.encode() in read()

    seconds = seconds_until(is_there)
    dropped = service.metric(DROPPED)
    for _ in range(20):
        ask(service.port, marker)
    broken = [line for line in read().splitlines() if line and line.count(b'time="') != 1]
    return [
        at_most("until lines are written again, s", seconds, 1),
        at_most("lines dropped after that", service.metric(DROPPED) - dropped, 0),
        at_most("lines of the log that are not one line", len(broken), 0),
    ]


def case_pipe(bench: Bench) -> list[Figure]:
    """Log to a pipe that nobody reads, and begin to read it."""
    fifo = make_folder(bench) / "stderr"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    wrapper = ["sh", "-c", 'exec "$@" 2>"$0"', str(fifo)]
    pieces: list[bytes] = []

    def read() -> bytes:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(reader, 65536):
                pieces.append(piece)
        return b"".join(pieces)

    try:
        with serving(bench, {}, "-log.level=info", wrapper=wrapper) as service:
            with watched(service) as scraper:
                answered = scrape_until_dropped(service)
                samples = scraper.samples()
            dropped = service.metric(DROPPED)
            figures = after_drops(service, read)
            return [
                outage_figure(samples),
                Figure("scrapes answered while it is full", *share(answered)),
                at_least("lines counted as dropped", dropped, 1),
                *figures,
                left_figure(service),
                ending(service),
            ]
    finally:
        os.close(reader)


CLOSED = {"0": "0<&-", "1": "1>&-", "2": "2>&-", "0, 1 and 2": "0<&- 1>&- 2>&-"}


def case_closed(bench: Bench) -> list[Figure]:
    """Start with descriptors 0, 1 and 2 closed, each and all."""
    return [figure for name in CLOSED for figure in close_standard(bench, name)]


def close_standard(bench: Bench, name: str) -> list[Figure]:
    """Start with these descriptors closed; compare each byte of the answers."""
    file = make_folder(bench) / "a.prom"
    file.write_text("a 1\n", encoding="ascii")
    modules = {
        **modules_for(bench),
        "file": {"method": "file", "file": {"path": str(file)}},
        "bad": shell("echo noise >&2; exit 3"),
    }
    wrapper = ["sh", "-c", f'exec "$@" {CLOSED[name]}', "sh"]
    with serving(bench, modules, "-log.level=info", wrapper=wrapper) as service:
        right = 0
        for _ in range(10):
            right += ask(service.port, HEALTHY) == (200, BODY)
            right += ask(service.port, COMMAND) == (200, b"a 1\n")
            right += ask(service.port, "/proxy?module=file")[1].startswith(b"a 1\n# HELP")
            wrong = ask(service.port, "/proxy?module=bad")
            right += wrong == (500, b"module bad: sh: the command exited with status 3\n")
        dropped = service.metric(DROPPED)
        figures = [
            at_least(f"right answers without {name}, of 40", right, 40),
            at_least(f"lines counted as dropped without {name}", dropped, 40 * ("2" in name)),
            left_figure(service),
            ending(service),
        ]
        status = service.process.popen.returncode
        return [*figures, at_most("exit status", math.inf if status is None else status, 0)]
