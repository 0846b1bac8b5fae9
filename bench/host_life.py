"""The cases of `host.py` about time and life: the clock, signals, the first process, a kill."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import BenchError
from host_cases import (
    COMMAND,
    RECOVERY_SECONDS,
    TROUBLE_SECONDS,
    ending,
    modules_for,
    recovery,
    said,
    shell,
    watched,
)
from host_peers import (
    Clock,
    certificates_of_a_day,
    children_of,
    find,
    is_alive,
    make_folder,
    require_root,
    seconds_until,
)
from hostile_attacks import (
    OUTAGE_SECONDS,
    VICTIM,
    Figure,
    at_least,
    at_most,
    left_figure,
    outage_figure,
)
from hostile_peers import (
    LOOPBACK,
    Bench,
    Service,
    ask,
    close_all,
    open_clients,
    read_statuses,
    request_bytes,
    serving,
    usage_of,
    write_modules,
)

HOUR = 1 / 24
CACHE_SECONDS = 3
DEADLINE_SECONDS = 2
LATE_SECONDS = 1  # that a deadline may be exceeded on a busy machine
FAILED_HANDSHAKES = "expexp_tls_handshake_failures_total"


# The time of day


def case_clock(bench: Bench) -> list[Figure]:
    """Let the time of day jump an hour, days and back, and watch what has a deadline."""
    folder = make_folder(bench)
    clock = Clock(folder)
    flags, client = certificates_of_a_day(folder)
    modules = {
        "command": shell("echo a 1"),
        "victim": bench.http("drip", timeout=f"{DEADLINE_SECONDS}s"),
        "cached": shell("echo a $$", cache=f"{CACHE_SECONDS}s"),
    }
    flags += ["-log.level=info", "-config.auto-reload-interval=500ms"]
    with serving(bench, modules, *flags, wrapper=clock.wrapper) as service:
        with watched(service) as scraper:
            figures = [
                *(jump_during_deadline(service, clock, days) for days in (HOUR, -HOUR, 30)),
                *(jump_during_cache(service, clock, days) for days in (HOUR, -30)),
                *jump_over_certificates(service, clock, client),
                jump_during_reload(bench, service, clock, modules),
            ]
            samples = scraper.samples()
        return [outage_figure(samples), *figures, left_figure(service), ending(service)]


def in_days(days: float) -> str:
    """Return a jump for the table."""
    return f"{days:+.0f} days" if abs(days) >= 1 else f"{days * 24:+.0f} h"


def jump_during_deadline(service: Service, clock: Clock, days: float) -> Figure:
    """Jump while a scrape of a slow target runs; return by how much its end differs."""
    begun = time.monotonic()
    clients = open_clients(service.port, request_bytes(VICTIM), 1)
    time.sleep(0.5)
    clock.jump(days)
    for client in clients:
        client.settimeout(2 * DEADLINE_SECONDS + LATE_SECONDS)
        with contextlib.suppress(OSError):
            client.recv(1)
    seconds = time.monotonic() - begun
    close_all(clients)
    clock.jump(0)
    what = f"{DEADLINE_SECONDS} s of a slow target with a jump of {in_days(days)} differ by, s"
    return at_most(what, abs(seconds - DEADLINE_SECONDS), LATE_SECONDS, f" ({seconds:.2f})")


def jump_during_cache(service: Service, clock: Clock, days: float) -> Figure:
    """Jump while an answer is cached; return by how much its life differs from what it must be."""
    path = "/proxy?module=cached"
    time.sleep(CACHE_SECONDS)  # the answer before
    begun = time.monotonic()
    first = ask(service.port, path)
    clock.jump(days)
    ages: list[int] = []

    def is_new() -> bool:
        """Return whether the answer is another one; note its age if not."""
        connection = http.client.HTTPConnection(LOOPBACK, service.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            is_same = (response.status, response.read()) == first
            if is_same:
                ages.append(int(response.headers.get("Age", "-1")))
        return not is_same

    seconds_until(is_new)
    seconds = time.monotonic() - begun
    clock.jump(0)
    note = f" ({seconds:.2f}; Age {min(ages, default=-1)} to {max(ages, default=-1)})"
    what = f"{CACHE_SECONDS} s of a cache with a jump of {in_days(days)} differ by, s"
    differs = abs(seconds - CACHE_SECONDS)
    if not ages or min(ages) < 0 or max(ages) > CACHE_SECONDS:
        differs = math.inf
    return at_most(what, differs, LATE_SECONDS, note)


def jump_over_certificates(
    service: Service, clock: Clock, client: ssl.SSLContext
) -> Iterator[Figure]:
    """Jump past the life of the client's certificate, before it, and back."""
    what = "until a client certificate is accepted, s"
    yield at_most(what, until_handshake(service, client, True), RECOVERY_SECONDS)
    for days in (30, -30):
        failed = service.metric(FAILED_HANDSHAKES)
        clock.jump(days)
        seconds = until_handshake(service, client, False)
        refused = f"until the certificate is refused after {in_days(days)}, s"
        yield at_most(refused, seconds, RECOVERY_SECONDS)
        yield at_least("handshakes that failed more", service.metric(FAILED_HANDSHAKES) - failed, 1)
    yield said(service, "certificate is not yet valid")
    yield said(service, "certificate has expired")
    clock.jump(0)
    seconds = until_handshake(service, client, True)
    yield at_most(f"{what}, after the jump back", seconds, RECOVERY_SECONDS)


def until_handshake(service: Service, client: ssl.SSLContext, is_accepted: bool) -> float:
    """Return the seconds until a TLS connection is accepted, or refused."""
    return seconds_until(lambda: shakes_hands(service, client) == is_accepted)


def shakes_hands(service: Service, client: ssl.SSLContext) -> bool:
    """Return whether a request over a new TLS connection is answered."""
    request = request_bytes("/-/healthy")
    clients = open_clients(service.tls_port, request, 1, client)
    return 200 in read_statuses(clients, 5)


def jump_during_reload(
    bench: Bench, service: Service, clock: Clock, modules: dict[str, Any]
) -> Figure:
    """Change the configuration after a jump backward; return when the change is in use."""
    clock.jump(-1)
    write_modules(bench, service.folder, {**modules, "added": shell("echo b 1")})
    seconds = seconds_until(lambda: ask(service.port, "/proxy?module=added")[0] == 200)
    clock.jump(0)
    return at_most("until a changed file is in use after -1 days, s", seconds, RECOVERY_SECONDS)


# The first process


def case_first(bench: Bench) -> list[Figure]:
    """Be process 1 of a namespace, and get the orphans of commands."""
    require_root("to make a namespace of processes")
    wrapper = [find("unshare"), "--pid", "--fork", "--mount-proc", "--kill-child"]
    orphan = shell("for i in 1 2 3 4 5; do setsid sleep 0.3 & done >/dev/null 2>&1; echo a 1")
    modules = {"command": shell("echo a 1"), "orphan": orphan}
    with serving(bench, modules, wrapper=wrapper) as service:
        adopted: set[int] = set()
        with watched(service) as scraper:
            statuses: list[int] = []
            for _ in range(40):
                statuses.append(ask(service.port, "/proxy?module=orphan")[0])
                adopted |= children_of(service.pid)
            time.sleep(1)
            zombies = len(children_of(service.pid))
            ask(service.port, COMMAND)
            seconds = seconds_until(lambda: not children_of(service.pid))
            os.kill(service.pid, signal.SIGHUP)
            figure = said(service, "configuration reloaded")
            samples = scraper.samples()
        figures = [
            outage_figure(samples),
            at_least("commands that ran, of 40", statuses.count(200), 40),
            at_least("orphans that became children", len(adopted), 100),
            at_most(
                "until all are reaped after one command more, s",
                seconds,
                RECOVERY_SECONDS,
                f" ({zombies} before)",
            ),
            figure,
            left_figure(service),
            ending(service),
        ]
        status = service.process.popen.returncode
        return [*figures, at_most("exit status", math.inf if status is None else status, 0)]


# SIGHUP


def reloads(service: Service) -> int:
    """Return how many reloads the log has."""
    return service.process.errors.read_bytes().count(b"configuration reloaded")


def case_hangups(bench: Bench) -> list[Figure]:
    """Send many SIGHUPs in two bursts: the last one must count."""
    modules = modules_for(bench)
    with serving(bench, modules) as service, watched(service) as scraper:
        for _ in range(bench.repeats // 2):
            os.kill(service.pid, signal.SIGHUP)
        seconds_until(lambda: reloads(service) > 0)
        for number in range(bench.repeats // 2, bench.repeats):
            if number == bench.repeats - 1:
                write_modules(bench, service.folder, {**modules, "added": shell("echo b 1")})
            os.kill(service.pid, signal.SIGHUP)
        seconds = seconds_until(lambda: ask(service.port, "/proxy?module=added")[0] == 200)
        time.sleep(TROUBLE_SECONDS)
        return [
            outage_figure(scraper.samples()),
            at_most(
                f"until the change before the last of {bench.repeats} counts, s",
                seconds,
                RECOVERY_SECONDS,
            ),
            at_least("reloads in the log", reloads(service), 2),
            at_most("reloads in the log", reloads(service), 2 + bench.repeats // 20),
            left_figure(service),
            ending(service),
        ]


def case_hangups_apart(bench: Bench) -> list[Figure]:
    """Send many SIGHUPs one at a time, each with a change that must count."""
    modules = modules_for(bench)
    slowest = 0.0
    with serving(bench, modules) as service, watched(service) as scraper:
        for number in range(bench.repeats):
            write_modules(bench, service.folder, {**modules, f"m{number % 2}": shell("echo b 1")})
            os.kill(service.pid, signal.SIGHUP)
            slowest = max(slowest, seconds_until(lambda: reloads(service) > number))  # noqa: B023
            if math.isinf(slowest):
                break
        samples = scraper.samples()
        more = usage_of(service.pid).megabytes - service.before.megabytes
        return [
            outage_figure(samples),
            at_least(f"reloads in the log, of {bench.repeats}", reloads(service), bench.repeats),
            at_most("slowest reload, s", slowest, OUTAGE_SECONDS),
            recovery(service, f"/proxy?module=m{(bench.repeats - 1) % 2}"),
            at_most("memory more, MB", more, 8),
            left_figure(service),
            ending(service),
        ]


# SIGKILL


def case_killed(bench: Bench) -> list[Figure]:
    """Kill expexp while commands run, and start it on the same port at once."""
    modules = {
        **modules_for(bench),
        "sleeper": shell("exec sleep 60"),
        "talker": shell("while echo a 1; do sleep 0.1; done"),
    }
    left: set[int] = set()
    begun = time.monotonic()
    try:
        with serving(bench, modules) as service, watched(service) as scraper:
            start = time.monotonic() - begun  # on a busy machine, some seconds
            clients = start_commands(service)
            left |= children_of(service.pid)
            killed = time.monotonic()
            os.kill(service.pid, signal.SIGKILL)
            service.process.popen.wait(RECOVERY_SECONDS)
            with serving(bench, modules, port=service.port) as second:
                bound = time.monotonic() - killed
                time.sleep(TROUBLE_SECONDS)
                figures = [
                    outage_figure(scraper.samples(), start + OUTAGE_SECONDS),
                    at_most("until the port is served again, s", bound, start + RECOVERY_SECONDS),
                    *fates(left),
                    at_most("children of the next one", len(children_of(second.pid)), 0),
                    recovery(second, COMMAND),
                    left_figure(second),
                    ending(second),
                ]
            close_all(clients)
            return figures
    finally:
        end_commands(left)


def start_commands(service: Service) -> list[socket.socket]:
    """Scrape two commands that do not end; return the connections when both run."""
    clients = [
        client
        for name in ("sleeper", "talker")
        for client in open_clients(service.port, request_bytes(f"/proxy?module={name}"), 1)
    ]
    if seconds_until(lambda: len(children_of(service.pid)) == 2) > RECOVERY_SECONDS:
        raise BenchError("the commands do not run")
    time.sleep(0.2)
    return clients


def fates(pids: set[int]) -> list[Figure]:
    """Return how many commands run on: the one that writes nothing, as documented."""
    names = sorted(
        re.sub(rb"\0.*", b"", Path(f"/proc/{pid}/cmdline").read_bytes()).decode()
        for pid in pids
        if is_alive(pid)
    )
    is_documented = names == ["sleep"]
    return [Figure("commands that run on", ", ".join(names) or "none", "sleep", is_documented)]


def end_commands(pids: set[int]) -> None:
    """Kill the groups of commands that run on."""
    for pid in filter(is_alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
