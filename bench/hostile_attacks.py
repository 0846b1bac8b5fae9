"""The attacks of `hostile.py`, one function each, and what each has to leave standing.

An attack starts an expexp of its own, scrapes a healthy module all the while, and returns figures.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.client
import math
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

from compare import BenchError, figure, memory
from hostile_peers import (
    HEALTHY,
    LOOPBACK,
    MEBIBYTE,
    Bench,
    Hang,
    Samples,
    Service,
    Usage,
    ask,
    ask_many,
    build_hang,
    close_all,
    lower_priority,
    open_clients,
    read_statuses,
    request_bytes,
    scraping,
    serving,
    usage_of,
)

P99_SECONDS = 0.25
FLOODED_SECONDS = 2  # for a scrape behind a thousand connections that wait to be accepted
OUTAGE_SECONDS = 5
LEFT_MEGABYTES = 80
HELD_MEGABYTES = 512 * MEBIBYTE / 1e6  # the limit `held_bytes`
SPARE_MEGABYTES = 64  # for what is not counted as held: threads, pieces that were just read
SPARE = 8  # threads and descriptors that a service may have more than at its start
SETTLE_SECONDS = 15
CLIENTS = 520  # more than there are connections
FREED_SECONDS = 2  # 0.5 s to notice that a client has gone, and the time that 520 threads take
FILE_BOUND = 50  # scrapes of one file module
DRAIN_SECONDS = 10
END_SECONDS = DRAIN_SECONDS + 2
ATTACK_SECONDS = 3  # the least that an attack lasts
VICTIM = "/proxy?module=victim"


class Figure(NamedTuple):
    """One row of the table."""

    what: str
    measured: str
    bound: str
    holds: bool


def at_most(what: str, value: float, bound: float, note: str = "") -> Figure:
    """Return a figure that must not exceed a bound."""
    return Figure(what, show(value) + note, f"at most {show(bound)}", value <= bound)


def at_least(what: str, value: float, bound: float) -> Figure:
    """Return a figure that must not be below a bound."""
    return Figure(what, show(value), f"at least {show(bound)}", value >= bound)


def show(value: float) -> str:
    """Return a number for the table."""
    if math.isnan(value):
        return "no answer"
    if math.isinf(value):
        return "never"
    return str(int(value)) if value == int(value) and value < 100_000 else figure(value)


def healthy_figure(samples: Samples, bound: float = P99_SECONDS) -> Figure:
    """Return the 99th percentile of a healthy scrape during the attack."""
    note = (
        f" ({len(samples.seconds)} scrapes, {samples.failed} failed; "
        f"not attacked {show(samples.control * 1000)})"
    )
    if samples.control > P99_SECONDS / 2:
        note += ": the machine is too busy"
    milliseconds = samples.percentile(0.99) * 1000
    return at_most("p99 of a healthy scrape, ms", milliseconds, bound * 1000, note)


def outage_figure(samples: Samples, bound: float = OUTAGE_SECONDS) -> Figure:
    """Return the longest time in which a scrape repeated every 100 ms did not succeed."""
    note = f" ({len(samples.seconds)} scrapes, {samples.failed} failed)"
    longest = samples.longest_outage(time.monotonic())
    return at_most("longest time without a scrape, s", longest, bound, note)


def left_figure(service: Service, threads: int = SPARE) -> Figure:
    """Wait until the service holds no more than before; return what it holds at last."""
    bound = f"{LEFT_MEGABYTES} MB, +{SPARE} descriptors, +{threads} threads, no child, 0 in flight"
    what = "left afterwards"
    end = time.monotonic() + SETTLE_SECONDS
    while service.runs:
        now = usage_of(service.pid)
        in_flight = service.metric("expexp_http_requests_in_flight") - 1  # this request
        if is_back(service.before, now, threads) and in_flight <= 0:
            return Figure(what, describe(service.before, now, in_flight), bound, holds=True)
        if time.monotonic() > end:
            return Figure(what, describe(service.before, now, in_flight), bound, holds=False)
        time.sleep(0.2)
    status = service.process.popen.returncode
    return Figure(what, f"the process ended with {status}", bound, holds=False)


def is_back(before: Usage, now: Usage, threads: int) -> bool:
    """Return whether a service holds at most what it held before an attack, and some spare."""
    return (
        now.megabytes <= LEFT_MEGABYTES
        and now.descriptors <= before.descriptors + SPARE
        and now.threads <= before.threads + threads
        and not now.children
    )


def describe(before: Usage, now: Usage, in_flight: float) -> str:
    """Return what a service holds, for the table."""
    descriptors, threads = now.descriptors - before.descriptors, now.threads - before.threads
    answer = "no answer" if math.isnan(in_flight) else f"{in_flight:.0f} in flight"
    return (
        f"{now.megabytes:.0f} MB, {descriptors:+} descriptors, {threads:+} threads, "
        f"{now.children} children, {answer}"
    )


def peak_megabytes(service: Service) -> float:
    """Return the peak of resident memory since the start."""
    return memory(service.pid, "VmHWM") * MEBIBYTE / 1e6


def repeat(work: Callable[[], object], seconds: float = ATTACK_SECONDS) -> None:
    """Do something again and again, at least once, until some seconds have passed."""
    end = time.monotonic() + seconds
    work()
    while time.monotonic() < end:
        work()


# Bodies


def attack_unit(bench: Bench) -> list[Figure]:
    """Make expexp verify the UNIT line for five clients at once."""
    with serving(bench, {"victim": bench.http("unit", timeout="60s")}) as service:
        with scraping(service) as scraper:
            repeat(lambda: ask_many(service.port, request_bytes(VICTIM), 5, 60))
            samples = scraper.samples()
        return [healthy_figure(samples), left_figure(service)]


def attack_protobuf(bench: Bench) -> list[Figure]:
    """Make expexp verify 8 million empty fields; compare the time with that of half as many."""
    settings = {"timeout": "100s"}
    modules = {
        "victim": bench.http("protobuf", **settings),
        "half": bench.http("protobuf-half", **settings),
    }
    with serving(bench, modules) as service:
        with scraping(service) as scraper:
            begun = time.monotonic()
            ask_many(service.port, request_bytes("/proxy?module=half"), 1, 100)
            half = time.monotonic() - begun
            ask_many(service.port, request_bytes(VICTIM), 1, 100)
            whole = time.monotonic() - begun - half
            samples = scraper.samples()
        more = peak_megabytes(service) - service.before.megabytes
        return [
            healthy_figure(samples),
            at_most("16 MiB by 8 MiB in time", whole / half, 3, f" ({whole:.1f} s)"),
            at_most("peak memory more, MB", more, 2.5 * 16 * MEBIBYTE / 1e6),
            left_figure(service),
        ]


def attack_head(bench: Bench) -> list[Figure]:
    """Scrape a target whose headers have 6.2 MB."""
    with serving(bench, {"victim": bench.http("head")}) as service:
        with scraping(service) as scraper:
            statuses: list[int] = []
            repeat(lambda: statuses.extend(ask_many(service.port, request_bytes(VICTIM), 20, 20)))
            samples = scraper.samples()
        accepted = sum(status == 200 for status in statuses)
        return [
            healthy_figure(samples),
            at_most("heads of 6.2 MB accepted", accepted, 0, f" of {len(statuses)}"),
            left_figure(service),
        ]


def take_bodies(bench: Bench, name: str) -> list[Figure]:
    """Scrape a body of 50 MB for 40 clients at once; a client that is refused tries again."""
    with serving(bench, {"victim": bench.http(name, timeout="60s")}) as service:
        with scraping(service) as scraper:
            missing = 40
            end = time.monotonic() + 120
            while missing and time.monotonic() < end and service.runs:
                statuses = ask_many(service.port, request_bytes(VICTIM), missing, 60)
                missing -= statuses.count(200)
            samples = scraper.samples()
        most = service.before.megabytes + HELD_MEGABYTES + SPARE_MEGABYTES
        return [
            healthy_figure(samples),
            at_most("clients without a body", missing, 0),
            at_most("peak memory, MB", peak_megabytes(service), most),
            left_figure(service),
        ]


def attack_bodies(bench: Bench) -> list[Figure]:
    """Scrape 50 MB for each of 40 clients."""
    return take_bodies(bench, "large")


def attack_bodies_gzip(bench: Bench) -> list[Figure]:
    """Scrape 50 MB, which the target sends in gzip, for each of 40 clients."""
    return take_bodies(bench, "large-gzip")


# Clients that hang up, or stay


def hang_up(
    bench: Bench,
    module: dict[str, Any],
    *headers: str,
    tls: bool = False,
) -> list[Figure]:
    """Send 520 requests for a module that does not answer, and close the connections."""
    context = bench.certificates.client if tls else None
    with serving(bench, {"victim": module}, *tls_flags(bench, tls)) as service:
        with scraping(service) as scraper:
            port = service.tls_port if tls else service.port
            clients = open_clients(port, request_bytes(VICTIM, *headers), CLIENTS, context)
            close_all(clients)
            freed = seconds_until_free(service)
            time.sleep(max(0.0, ATTACK_SECONDS - freed))
            samples = scraper.samples()
        return [
            healthy_figure(samples),
            at_most("until the threads are free, s", freed, FREED_SECONDS),
            left_figure(service),
        ]


def tls_flags(bench: Bench, tls: bool) -> list[str]:
    """Return the flags of a second listener with TLS, if there is to be one."""
    pem = bench.certificates.folder / "server.pem"
    return [f"-web.tls.cert={pem}", f"-web.tls.key={pem}"] if tls else []


def seconds_until_free(service: Service) -> float:
    """Return the seconds until there are no more threads than before; inf if it takes too long.

    They must stay away for a second: connections that wait to be accepted have no thread yet.
    """
    started = busy = time.monotonic()
    while time.monotonic() < started + SETTLE_SECONDS:
        now = time.monotonic()
        if len(os.listdir(f"/proc/{service.pid}/task")) > service.before.threads + SPARE:
            busy = now
        elif now > busy + 1:
            return busy - started
        time.sleep(0.02)
    return math.inf


def attack_hangup(bench: Bench) -> list[Figure]:
    """Hang up during scrapes of a silent target."""
    return hang_up(bench, bench.http("silent"))


def attack_hangup_day(bench: Bench) -> list[Figure]:
    """Hang up during scrapes that have a day."""
    return hang_up(bench, bench.http("silent"), "X-Prometheus-Scrape-Timeout-Seconds: 86400")


def attack_hangup_tls(bench: Bench) -> list[Figure]:
    """Hang up during scrapes over TLS."""
    return hang_up(bench, bench.http("silent"), tls=True)


def attack_hangup_cache(bench: Bench) -> list[Figure]:
    """Hang up while all clients wait for one cached run."""
    return hang_up(bench, bench.http("silent", cache="60s"))


def attack_hangup_fifo(bench: Bench) -> list[Figure]:
    """Hang up during scrapes of a FIFO that nobody writes."""
    path = bench.folder / "left.fifo"
    os.mkfifo(path)
    return hang_up(bench, {"method": "file", "file": {"path": str(path)}})


def sleeper(**settings: str) -> dict[str, Any]:
    """Return an exec module whose command sleeps."""
    return {"method": "exec", "exec": {"command": "sleep", "args": ["600"]}, **settings}


def attack_hangup_exec(bench: Bench) -> list[Figure]:
    """Hang up during commands that sleep."""
    return hang_up(bench, sleeper())


def attack_hangup_cached_exec(bench: Bench) -> list[Figure]:
    """Hang up while all clients wait for one cached command, which runs until its deadline."""
    return hang_up(bench, sleeper(cache="60s", timeout="10s"))


def shut_down(bench: Bench, tls: bool) -> list[Figure]:
    """Send 520 requests and shut down writing; each client must be answered with 502."""
    context = bench.certificates.client if tls else None
    with serving(bench, {"victim": bench.http("silent")}, *tls_flags(bench, tls)) as service:
        with scraping(service) as scraper:
            port = service.tls_port if tls else service.port
            clients = open_clients(port, request_bytes(VICTIM), CLIENTS, context)
            begun = time.monotonic()
            close_all(clients, half=True)
            statuses = read_statuses(clients, ATTACK_SECONDS)
            freed = seconds_until_free(service)
            time.sleep(max(0.0, begun + ATTACK_SECONDS - time.monotonic()))
            samples = scraper.samples()
        return [
            healthy_figure(samples),
            at_least("clients answered with 502", statuses.count(502), 380),
            at_most("until the threads are free, s", freed, FREED_SECONDS),
            left_figure(service),
        ]


def attack_half_closed(bench: Bench) -> list[Figure]:
    """Shut down writing during plain scrapes."""
    return shut_down(bench, tls=False)


def attack_half_closed_tls(bench: Bench) -> list[Figure]:
    """Shut down writing on the socket below TLS."""
    return shut_down(bench, tls=True)


def stay(
    bench: Bench, names: Sequence[str], path: str, count: int = CLIENTS, bound: float = P99_SECONDS
) -> list[Figure]:
    """Send requests for silent modules and stay; scrape another path for some seconds."""
    with serving(bench, {name: bench.http("silent") for name in names}) as service:
        with scraping(service, path=path) as scraper:
            clients: list[socket.socket] = []
            for name in names:
                request = request_bytes(f"/proxy?module={name}")
                clients += open_clients(service.port, request, count)
            time.sleep(ATTACK_SECONDS)
            pages = pages_answered(service)
            samples = scraper.samples()
            close_all(clients)
            freed = seconds_until_free(service)
        return [
            healthy_figure(samples, bound),
            at_least("pages of expexp's own answered", pages, len(PAGES)),
            at_most("until the threads are free, s", freed, FREED_SECONDS),
            left_figure(service),
        ]


PAGES = ("/", "/metrics", "/-/healthy", "/-/ready", "/sd")


def pages_answered(service: Service) -> int:
    """Return how many pages are answered within a second each."""
    return sum(ask(service.port, path, 1)[0] == 200 for path in PAGES)


def attack_stay(bench: Bench) -> list[Figure]:
    """Occupy as many connections as there are with scrapes of one silent module."""
    return stay(bench, ["victim"], HEALTHY)


def attack_stay_spread(bench: Bench) -> list[Figure]:
    """Occupy them with as many clients as `stay`, for three silent modules together."""
    return stay(bench, ["one", "two", "three"], "/-/healthy", count=CLIENTS // 3 + 1)


def attack_stay_all(bench: Bench) -> list[Figure]:
    """Occupy them with three silent modules: expexp's own pages must keep a slot."""
    return stay(bench, ["one", "two", "three"], "/-/healthy", bound=FLOODED_SECONDS)


# Files


def read_hung_file(bench: Bench, path: Path, hang: Hang | None) -> list[Figure]:
    """Scrape a file that hangs 2,000 times; release it; let it hang again, and send TERM."""
    module = {"method": "file", "timeout": "3s", "file": {"path": str(path)}}
    request = request_bytes(VICTIM)
    with serving(bench, {"victim": module}, wrapper=hang.wrapper if hang else ()) as service:
        statuses: list[int] = []
        with scraping(service) as scraper, hanging(hang):
            for _ in range(4):
                statuses += ask_many(service.port, request, CLIENTS, 5)
            pages = pages_answered(service)
            samples = scraper.samples()
            threads = usage_of(service.pid).threads - service.before.threads
        figures = [
            healthy_figure(samples),
            at_least("scrapes answered, of 2,080", sum(map(bool, statuses)), 2000),
            at_least("pages of expexp's own answered", pages, len(PAGES)),
            at_most("threads more while it hangs", threads, FILE_BOUND + SPARE),
            left_figure(service),
        ]
        with hanging(hang):
            clients = open_clients(service.port, request, FILE_BOUND)
            time.sleep(0.2)
            seconds = service.end(END_SECONDS)
            close_all(clients)
        return [*figures, at_most("from TERM to the end, s", seconds, END_SECONDS)]


@contextlib.contextmanager
def hanging(hang: Hang | None) -> Iterator[None]:
    """Make the file system hang inside this context."""
    if hang:
        hang.switch.touch()
    try:
        yield
    finally:
        if hang:
            hang.switch.unlink()


def attack_fifo(bench: Bench) -> list[Figure]:
    """Scrape a FIFO that nobody writes."""
    path = bench.folder / "silent.fifo"
    os.mkfifo(path)
    return read_hung_file(bench, path, None)


def attack_hung_stat(bench: Bench) -> list[Figure]:
    """Scrape a file whose `stat` does not return."""
    hang = build_hang(bench, "stat")
    return read_hung_file(bench, hang.folder / "a.prom", hang)


def attack_hung_open(bench: Bench) -> list[Figure]:
    """Scrape a file whose `open` does not return."""
    hang = build_hang(bench, "open")
    return read_hung_file(bench, hang.folder / "a.prom", hang)


def attack_hung_read(bench: Bench) -> list[Figure]:
    """Scrape a file whose `read` does not return."""
    hang = build_hang(bench, "read")
    return read_hung_file(bench, hang.folder / "a.prom", hang)


def attack_hung_reload(bench: Bench) -> list[Figure]:
    """Reload a configuration whose `stat` does not return, then send TERM."""
    hang = build_hang(bench, "stat")
    (hang.folder / "other.json").write_text('{"method": "file", "file": {"path": "/a"}}')
    flag = f"-config.dirs={hang.folder}"
    with serving(bench, {}, flag, wrapper=hang.wrapper) as service, hanging(hang):
        with scraping(service) as scraper:
            service.process.popen.send_signal(signal.SIGHUP)
            time.sleep(ATTACK_SECONDS)
            samples = scraper.samples()
        seconds = service.end(END_SECONDS)
        return [
            healthy_figure(samples),
            at_most("from TERM to the end, s", seconds, END_SECONDS),
        ]


# The log


def attack_stderr(bench: Bench) -> list[Figure]:
    """Log to a pipe that nobody reads."""
    fifo = bench.folder / "stderr.fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    wrapper = ["sh", "-c", 'exec "$@" 2>"$0"', str(fifo)]
    try:
        with serving(bench, {}, "-log.level=info", wrapper=wrapper) as service:
            return block_log(service)
    finally:
        os.close(reader)


def block_log(service: Service) -> list[Figure]:
    """Make 5,000 lines of the access log, then send TERM."""
    answered = 0
    with scraping(service) as scraper:
        for _ in range(250):
            statuses = ask_many(service.port, request_bytes(HEALTHY), 20, 10)
            answered += statuses.count(200)
            if 200 not in statuses:
                break
        samples = scraper.samples()
    dropped = service.metric("expexp_log_lines_dropped_total")
    left = left_figure(service)
    return [
        healthy_figure(samples),
        at_least("scrapes answered, of 5,000", answered, 5000),
        at_least("lines counted as dropped", dropped, 1),
        left,
        at_most("from TERM to the end, s", service.end(END_SECONDS), END_SECONDS),
    ]


def write_log(bench: Bench, name: str, timeouts: Sequence[str]) -> list[Figure]:
    """Scrape as fast as two clients can, for 12 s; measure the log at the default level."""
    seconds = 12
    with serving(bench, {"victim": bench.http(name)}) as service:
        with scraping(service) as scraper:
            size = service.log_size()
            attackers = [
                threading.Thread(target=alternate, args=(service.port, timeouts, seconds))
                for _ in range(2)
            ]
            for attacker in attackers:
                attacker.start()
            for attacker in attackers:
                attacker.join()
            samples = scraper.samples()
        rate = (service.log_size() - size) / seconds
        return [
            healthy_figure(samples),
            at_most("bytes of log a second", rate, 100),
            left_figure(service),
        ]


def alternate(port: int, timeouts: Sequence[str], seconds: float) -> None:
    """Scrape over one connection, with one scrape timeout after the other; empty is none."""
    lower_priority()
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for timeout in timeouts:
            headers = {"X-Prometheus-Scrape-Timeout-Seconds": timeout} if timeout else {}
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request("GET", VICTIM, headers=headers)
                connection.getresponse().read()
    connection.close()


def attack_log(bench: Bench) -> list[Figure]:
    """Alternate scrape timeouts of 0.00001 s and none."""
    return write_log(bench, "text", ["0.00001", ""])


def attack_log_flapping(bench: Bench) -> list[Figure]:
    """Scrape a target that is broken every other time."""
    return write_log(bench, "flapping", [""])


# What runs out


def attack_memory(bench: Bench) -> list[Figure]:
    """Limit the address space to what is in use and hardly more, several times."""
    with serving(bench, {"victim": bench.http("large", verify=False)}) as service:
        with scraping(service, interval=0.1) as scraper:
            for kibibytes in (0, 0, 256, 1024, 65536):
                take_memory(service, kibibytes * 1024)
            time.sleep(OUTAGE_SECONDS + 1)
            samples = scraper.samples()
        return [outage_figure(samples), left_figure(service)]


def take_memory(service: Service, room: int) -> None:
    """Send 300 requests for a large body while the address space is limited; lift the limit."""
    size = int(memory(service.pid, "VmSize") * MEBIBYTE) + room
    resource.prlimit(service.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    clients = open_clients(service.port, request_bytes(VICTIM), 300)
    time.sleep(1)
    close_all(clients)
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(service.pid, resource.RLIMIT_AS, no_limit)
    time.sleep(0.5)


class IdleClients:
    """Clients that keep connections open, say nothing, and come back when they are closed."""

    def __init__(self, port: int, count: int) -> None:
        """Connect, and look after the connections in a thread."""
        self._port = port
        self._count = count
        self._over = threading.Event()
        self._clients: list[socket.socket] = []
        self._fill()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections."""
        self._over.set()
        self._thread.join()
        close_all(self._clients)

    def _keep(self) -> None:
        """Replace what was closed, until it is over."""
        while not self._over.wait(0.1):
            for client in list(self._clients):
                with contextlib.suppress(BlockingIOError):
                    self._drop(client)
            self._fill()

    def _drop(self, client: socket.socket) -> None:
        """Forget a connection that has ended; raise BlockingIOError if it has not."""
        with contextlib.suppress(ConnectionError):
            client.setblocking(False)
            client.recv(1)
        client.close()
        self._clients.remove(client)

    def _fill(self) -> None:
        """Connect as often as connections are missing."""
        self._clients += open_clients(self._port, b"", self._count - len(self._clients))


def crowd(service: Service, more: Callable[[Service], None]) -> list[Figure]:
    """Keep 100 idle clients for 10 s, and do something more; measure outage, log and CPU."""
    seconds = 10
    with scraping(service, interval=0.1) as scraper:
        idle = IdleClients(service.port, 100)
        try:
            time.sleep(0.5)
            more(service)
            lines = service.log_lines()
            cpu = cpu_ticks(service.pid)
            scraper.restart()
            time.sleep(seconds)
            samples = scraper.samples()
            lines = service.log_lines() - lines
            cpu = cpu_ticks(service.pid) - cpu
        finally:
            idle.close()
    return [
        outage_figure(samples),
        at_most("lines of log a second", lines / seconds, 1.5),
        at_most("processors used", cpu / os.sysconf("SC_CLK_TCK") / seconds, 0.5),
        left_figure(service),
    ]


def cpu_ticks(pid: int) -> int:
    """Return the processor time of a process in ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def do_nothing(_service: Service) -> None:
    """Leave a service as it was started."""


def attack_threads(bench: Bench) -> list[Figure]:
    """Start with a limit of 40 threads, as another user: the limit does not bind root."""
    if os.geteuid():
        raise BenchError("needs root, to run expexp as a user without other processes")
    user = 61_000 + os.getpid() % 1000
    rights = "+dac_read_search"  # the interpreter may be in a folder of root's
    wrapper = ["prlimit", "--nproc=40:40", "setpriv", f"--reuid={user}", f"--regid={user}"]
    wrapper += ["--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    with serving(bench, {}, wrapper=wrapper) as service:
        return crowd(service, do_nothing)


def attack_descriptors(bench: Bench) -> list[Figure]:
    """Start with 64 descriptors."""
    with serving(bench, {}, wrapper=["prlimit", "--nofile=64:64"]) as service:
        return crowd(service, do_nothing)


def attack_descriptors_later(bench: Bench) -> list[Figure]:
    """Lower the limit to 64 descriptors after the start, when expexp has counted on more."""
    with serving(bench, {}) as service:
        return crowd(service, forbid_descriptors)


def forbid_descriptors(service: Service) -> None:
    """Limit the process to 64 descriptors."""
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (64, 64))


# Passwords


TRIES = 3  # of the right password
PASSWORD = "correct horse"  # noqa: S105 - of the users below, who live as long as an attack
USERS = {
    "scraper": "$2b$04$pwfdienbztpptitxkoyuyuwaNEnkpQ33nVPRlnOc9auor7CqVlj2O",
    "cheap": "$2b$10$ekdldljrnllgycejubslwux1rDeJTuoX/uIZjFtEeco/3Lp0o/bz2",
    "prometheus": "$2b$14$zepephqopndegwnbhcdgjuMIcAGU8LISSMlUMEa/wl8hV8kMfz1aa",
}


def basic(name: str, password: str) -> str:
    """Return the value of a header Authorization."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def guess(bench: Bench, names: Sequence[str]) -> list[Figure]:
    """Guess with one client for each name; count the tries of the right password at cost 14."""
    web = bench.folder / "web.yaml"
    web.write_text("basic_auth_users:\n" + "".join(f"  {n}: {h}\n" for n, h in USERS.items()))
    web.chmod(0o600)
    over = threading.Event()
    scraper_user = basic("scraper", PASSWORD)
    flag = f"-web.config.file={web}"
    with serving(bench, {}, flag, authorization=scraper_user) as service:
        pool = concurrent.futures.ThreadPoolExecutor(len(names), initializer=lower_priority)
        with scraping(service) as scraper, pool:
            for name in names:
                pool.submit(guess_passwords, service.port, name, over)
            time.sleep(1)
            cpu = cpu_ticks(service.pid)
            begun = time.monotonic()
            try:
                needed = tries_until_in(service.port)
                time.sleep(max(0.0, begun + ATTACK_SECONDS - time.monotonic()))
            finally:
                over.set()
            seconds = time.monotonic() - begun
            cpu = cpu_ticks(service.pid) - cpu
            samples = scraper.samples()
        return [
            healthy_figure(samples),
            at_most("tries until the right password gets in", needed, TRIES, f" ({seconds:.1f} s)"),
            at_most("processors used", cpu / os.sysconf("SC_CLK_TCK") / seconds, 1.2),
            left_figure(service),
        ]


def guess_passwords(port: int, name: str, over: threading.Event) -> None:
    """Guess until it is over, at most for a minute."""
    end = time.monotonic() + 60
    number = 0
    while not over.is_set() and time.monotonic() < end:
        number += 1
        ask(port, HEALTHY, 60, basic(name, f"wrong {number}"))
        time.sleep(0.02)  # refusals are quick: their number is not what is measured


def tries_until_in(port: int) -> float:
    """Return how many tries the right password takes that was not proved before."""
    for number in range(1, TRIES + 1):
        if ask(port, HEALTHY, 60, basic("prometheus", PASSWORD))[0] == 200:
            return number
        time.sleep(0.1)
    return math.inf


def attack_bcrypt(bench: Bench) -> list[Figure]:
    """Guess passwords of users that do not exist."""
    return guess(bench, [f"stranger-{number}" for number in range(40)])


def attack_bcrypt_known(bench: Bench) -> list[Figure]:
    """Guess passwords of a user at cost 10."""
    return guess(bench, ["cheap"] * 40)


# Signals and reloads


def end_while_draining(bench: Bench, number: int) -> bool:
    """Start expexp, send many signals while a scrape runs; return whether it ends."""
    modules = {"victim": bench.http("slow")}
    with serving(bench, modules) as service:
        clients = open_clients(service.port, request_bytes(VICTIM), 1)
        time.sleep(0.05)
        order = (signal.SIGTERM, signal.SIGINT)[:: -1 if number % 2 else 1]
        for name in order * 20:
            with contextlib.suppress(ProcessLookupError):
                service.process.popen.send_signal(name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.process.popen.wait(END_SECONDS)
        close_all(clients)
        return not service.runs


def attack_signals(bench: Bench) -> list[Figure]:
    """Send TERM and INT close together, 40 of them, to many services one after the other."""
    runs = bench.repeats
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ended = sum(pool.map(end_while_draining, [bench] * runs, range(runs)))
    return [at_least(f"runs that end, of {runs}", ended, runs)]


def attack_reloads(bench: Bench) -> list[Figure]:
    """Queue 50 reloads of 300 modules."""
    modules = {f"m{number}": bench.http("text") for number in range(300)}
    request = request_bytes("/-/reload", "Content-Length: 0", method="POST")
    with serving(bench, modules, "-web.enable-lifecycle") as service:
        with scraping(service) as scraper:
            one = seconds_of_reloads(service, request, 1)
            all_of_them = seconds_of_reloads(service, request, 50)
            repeat(lambda: seconds_of_reloads(service, request, 50))
            samples = scraper.samples()
        note = f" ({all_of_them:.2f} s; one takes {one:.2f} s)"
        return [
            healthy_figure(samples),
            at_most("50 reloads by one in time", all_of_them / one, 5, note),
            left_figure(service),
        ]


def seconds_of_reloads(service: Service, request: bytes, count: int) -> float:
    """Return how long some reloads at once take; raise BenchError if one is not answered."""
    begun = time.monotonic()
    statuses = ask_many(service.port, request, count, 60)
    if statuses != [200] * count:
        raise BenchError(f"{count} reloads were answered with {statuses}")
    return time.monotonic() - begun
