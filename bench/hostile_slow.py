"""The attacks of `hostile.py` with slow clients, and with more clients than there are connections.

500 slow clients stay for a minute each. A client whose connection ends opens another one.
"""

from __future__ import annotations

import contextlib
import math
import resource
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable, NamedTuple, cast

from compare import BenchError
from hostile_attacks import (
    FLOODED_SECONDS,
    FREED_SECONDS,
    P99_SECONDS,
    VICTIM,
    Figure,
    at_least,
    at_most,
    healthy_figure,
    left_figure,
    show,
    tls_flags,
)
from hostile_peers import (
    CONNECT_SECONDS,
    HEALTHY,
    LOOPBACK,
    Bench,
    Samples,
    Service,
    as_attacker,
    ask,
    close_all,
    lower_priority,
    open_clients,
    read_statuses,
    receive,
    request_bytes,
    scraping,
    serving,
)

SLOW_CLIENTS = 500
MEDIAN_RATIO = 1.2
SLOW_INTERVAL = 0.02  # that of the control: both medians are of scrapes that are as frequent
TICKS = 10  # a second: each client acts in one of them
NEW_READERS = 2  # a tick: hundreds of scrapes of 1 MB at once would be another attack
RAMP_SECONDS = 60
HANDSHAKE_SECONDS = 10  # the limit `handshake_seconds`
HEADER_SECONDS = 10  # the limit `header_seconds`
ANSWER_BYTES = 1_000_000  # 384 of these bodies are less than `held_bytes`
READ_BYTES = 4096  # a second: so few that an answer takes four minutes, and no stall
RECEIVE_BUFFER = 4096
SEGMENT_BYTES = 1400  # as on a network: those of the loopback give a send buffer of megabytes
WRITE_SECONDS = 30 + ANSWER_BYTES / 65536  # `write_stall_seconds`, `write_bytes_per_second`
LATE_SECONDS = 5  # clients act once a second with a low priority, and 500 threads end at once
FEWEST_OPEN = 350  # connections: fewer would be no attack
ESTABLISHED = 1  # TCP_ESTABLISHED of tcp(7)
WAITING = 384  # requests that one module may have
CONNECTIONS = 512
FLOOD = 5000
REFUSED_SECONDS = 1
MOST_FAILED = 20  # connections: each takes two seconds
NEWEST = 50


class Drip(NamedTuple):
    """What a slow client sends at once, then byte by byte, and how much it reads a second."""

    at_once: bytes = b""
    dripped: bytes = b""
    read: int = 0  # 0: the first byte of an answer is the end
    new_per_tick: int = 10  # connections


@dataclass
class SlowClient:
    """A connection of a slow client, and since when it is slow: an answer may take its time."""

    connection: socket.socket
    since: float = math.inf
    sent: int = 0  # bytes, one by one

    @property
    def seconds(self) -> float:
        """Return for how long the client has been slow."""
        return max(0.0, time.monotonic() - self.since)


class SlowClients:
    """Clients that act once a second, in a thread; each comes back when its connection ends."""

    def __init__(self, port: int, drip: Drip) -> None:
        """Prepare to connect."""
        self._port = port
        self._drip = drip
        self._over = threading.Event()
        self._clients: dict[int, SlowClient] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._may_connect = 0
        self.ended = 0
        self.longest = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the clients act inside this context. Close all connections at its end."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()
            for client in self._clients.values():
                self.longest = max(self.longest, client.seconds)
            close_all([client.connection for client in self._clients.values()])

    def _run(self) -> None:
        """Let a tenth of the clients act, ten times a second."""
        lower_priority()
        tick = 0
        while not self._over.wait(1 / TICKS):
            tick += 1
            self._may_connect = self._drip.new_per_tick
            for number in range(tick % TICKS, SLOW_CLIENTS, TICKS):
                with contextlib.suppress(OSError):
                    self._act(number)

    def _act(self, number: int) -> None:
        """Connect, or act on the connection. Raise OSError if it cannot be made."""
        client = self._clients.get(number)
        with contextlib.suppress(ConnectionError):
            if client and self._is_open(client):
                return
        if client:
            self.ended += 1
            self.longest = max(self.longest, client.seconds)
            client.connection.close()
            del self._clients[number]
        if self._may_connect:
            self._may_connect -= 1
            self._clients[number] = self._connect()

    def _connect(self) -> SlowClient:
        """Open a connection, and send what is sent at once."""
        connection = socket.socket()
        try:
            if self._drip.read:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
            connection.settimeout(CONNECT_SECONDS)
            connection.connect((LOOPBACK, self._port))
            connection.sendall(self._drip.at_once)
            connection.setblocking(False)
        except OSError:
            connection.close()
            raise
        return SlowClient(connection, math.inf if self._drip.read else time.monotonic())

    def _is_open(self, client: SlowClient) -> bool:
        """Send the next byte, or read the next ones. Return whether the connection goes on.

        After a reset a slow reader could read for long what its buffer holds.
        """
        state = client.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if state != ESTABLISHED:
            return False
        try:
            piece = client.connection.recv(self._drip.read or 1)
        except BlockingIOError:
            byte = self._drip.dripped[client.sent : client.sent + 1]
            with contextlib.suppress(BlockingIOError):
                client.sent += client.connection.send(byte)
            return True
        if client.since == math.inf:
            client.since = time.monotonic()
        return bool(piece and self._drip.read)


def median_figure(samples: Samples) -> Figure:
    """Return the median of a healthy scrape by that of a service that nobody attacks."""
    median = samples.percentile(0.5)
    note = f" ({show(median * 1000)} ms, not attacked {show(samples.control_median * 1000)} ms)"
    if samples.control > P99_SECONDS / 2:
        note += ": the machine is too busy"
    ratio = median / samples.control_median if samples.control_median else math.inf
    return at_most("median of a healthy scrape by the control's", ratio, MEDIAN_RATIO, note)


def be_slow(bench: Bench, drip: Drip, limit: float, tls: bool = False) -> list[Figure]:
    """Keep 500 slow clients; compare healthy scrapes with those of the control."""
    modules = {"victim": bench.http("megabyte", timeout="60s")}
    with serving(bench, modules, *tls_flags(bench, tls)) as service:
        clients = SlowClients(service.tls_port if tls else service.port, drip)
        with scraping(service, SLOW_INTERVAL) as scraper, clients.running():
            wait_until(lambda: open_connections(service) >= FEWEST_OPEN, RAMP_SECONDS)
            scraper.restart()
            time.sleep(bench.slow_seconds)
            samples = scraper.samples()
        held = "longest connection of a slow client, s"
        return [
            median_figure(samples),
            healthy_figure(samples),
            at_most(held, clients.longest, limit + LATE_SECONDS, f" ({clients.ended} were ended)"),
            left_figure(service),
        ]


def open_connections(service: Service) -> float:
    """Return how many connections a service has."""
    return service.metric("expexp_open_connections")


def attack_slow_line(bench: Bench) -> list[Figure]:
    """Send the request line byte by byte."""
    return be_slow(bench, Drip(b"", request_bytes(f"{VICTIM}&x={'x' * 9999}")), HEADER_SECONDS)


def attack_slow_headers(bench: Bench) -> list[Figure]:
    """Send the headers byte by byte."""
    line, _, headers = request_bytes(VICTIM, f"X-Filler: {'x' * 9999}").partition(b"\n")
    return be_slow(bench, Drip(line + b"\n", headers), HEADER_SECONDS)


def attack_slow_handshake(bench: Bench) -> list[Figure]:
    """Send the first message of a TLS handshake byte by byte."""
    sent = ssl.MemoryBIO()
    context = bench.certificates.client
    tls = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return be_slow(bench, Drip(b"", sent.read()), HANDSHAKE_SECONDS, tls=True)


def attack_no_handshake(bench: Bench) -> list[Figure]:
    """Connect to the port for TLS, and say nothing."""
    return be_slow(bench, Drip(), HANDSHAKE_SECONDS, tls=True)


def attack_slow_answer(bench: Bench) -> list[Figure]:
    """Read a body of a megabyte slowly, with a small receive buffer."""
    return be_slow(bench, Drip(request_bytes(VICTIM), b"", READ_BYTES, NEW_READERS), WRITE_SECONDS)


# More clients than there are connections


class Flood:
    """Connections that one thread opens, and the seconds after which each was closed."""

    def __init__(self, port: int) -> None:
        """Prepare to connect."""
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._opened: dict[int, float] = {}
        self.clients: list[socket.socket] = []
        self.lives: list[float] = []
        self.failed = 0

    def open(self, count: int) -> None:
        """Open many connections one after the other; note which ones are closed meanwhile."""
        for _ in range(count):
            started = time.monotonic()
            try:
                client = socket.create_connection((LOOPBACK, self._port), timeout=CONNECT_SECONDS)
            except OSError:
                self.failed += 1
                if self.failed > MOST_FAILED:
                    return
                continue
            client.setblocking(False)
            self._opened[client.fileno()] = started
            self.clients.append(client)
            self._selector.register(client, selectors.EVENT_READ)
            self.note_ends(0)

    def note_ends(self, seconds: float) -> None:
        """Note the connections that end within some seconds."""
        end = time.monotonic() + seconds
        while True:
            for key, _ in self._selector.select(min(0.05, seconds)):
                client = cast(socket.socket, key.fileobj)
                if receive(client) == b"":
                    self._selector.unregister(client)
                    self.lives.append(time.monotonic() - self._opened[key.fd])
                    self.clients.remove(client)
                    client.close()
            if time.monotonic() >= end:
                return

    def close(self) -> None:
        """Close all connections."""
        self._selector.close()
        close_all(self.clients)


def flood(port: int) -> Flood:
    """Open 5,000 connections, and wait for a second."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FLOOD + 2 * CONNECTIONS
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BenchError(f"needs {needed} file descriptors, the hard limit is {hard}")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    clients = Flood(port)

    def work() -> Flood:
        clients.open(FLOOD)
        clients.note_ends(REFUSED_SECONDS)
        return clients

    return as_attacker(work)


def open_waiting(service: Service) -> list[socket.socket]:
    """Send requests for a silent module. Return when each waits: an unread one could be evicted."""
    waiting = open_clients(service.port, request_bytes(VICTIM), WAITING)
    in_flight = "expexp_http_requests_in_flight"  # with this request for /metrics
    wait_until(lambda: service.metric(in_flight) > WAITING)
    return waiting


def attack_flood(bench: Bench) -> list[Figure]:
    """Take all connections, some of them idle, and open 5,000 more."""
    with serving(bench, {"victim": bench.http("silent", timeout="60s")}) as service:
        waiting = open_waiting(service)
        with scraping(service) as scraper:
            idle = open_clients(service.port, b"", CONNECTIONS - WAITING)
            more = flood(service.port)
            answered = statuses_of_newest(more)
            samples = scraper.samples()
            gone = sum(receive(client) is not None for client in set_nonblocking(waiting))
            close_all([*waiting, *idle])
            more.close()
        left = len(more.clients)
        ended = len(more.lives)
        what = "more connections that are open a second later"
        return [
            at_most("healthy scrapes that fail", samples.failed, 0, f" of {len(samples.seconds)}"),
            healthy_figure(samples, FLOODED_SECONDS),
            at_most(what, left, CONNECTIONS - WAITING, f" ({ended} ended)"),
            at_most("connections that could not be made", more.failed, 0),
            at_least(f"newest {NEWEST} that are answered", answered.count(200), NEWEST),
            at_most("clients that wait for a module and are cut off", gone, 0),
            left_figure(service),
        ]


def set_nonblocking(clients: Sequence[socket.socket]) -> Sequence[socket.socket]:
    """Return the same connections, on which no read waits any more."""
    for client in clients:
        client.setblocking(False)
    return clients


def statuses_of_newest(more: Flood) -> list[int]:
    """Send a request on the newest connections; return the statuses that come within a second."""
    newest = more.clients[-NEWEST:]
    for client in newest:
        with contextlib.suppress(OSError):
            client.send(request_bytes("/-/healthy"))
    return read_statuses(newest, REFUSED_SECONDS)


def attack_flood_full(bench: Bench) -> list[Figure]:
    """Open 5,000 connections when there is no slot and none can make room.

    384 requests wait for a silent module. Then 900 descriptors allow 180 connections.
    """
    with serving(bench, {"victim": bench.http("silent", timeout="60s")}) as service:
        waiting = open_waiting(service)
        rejected = service.metric("expexp_rejected_connections_total")
        limits = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (900, limits[1]))
        time.sleep(0.2)
        more = flood(service.port)
        close_all(waiting)
        more.close()
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limits)
        begun = time.monotonic()
        wait_until(lambda: ask(service.port, HEALTHY, 1)[0] == 200)
        seconds = time.monotonic() - begun
        counted = service.metric("expexp_rejected_connections_total") - rejected
        refused = sum(life <= REFUSED_SECONDS for life in more.lives)
        return [
            at_least("refused within a second, of 5,000", refused, FLOOD),
            at_least("of these counted as rejected", counted, FLOOD),
            at_most("until a healthy scrape after their end, s", seconds, FREED_SECONDS),
            left_figure(service),
        ]


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something. Raise BenchError if it does not come."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise BenchError(f"what the attack needs is not there after {seconds:.0f} s")
        time.sleep(0.1)
