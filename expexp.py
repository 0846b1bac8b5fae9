#!/usr/bin/env python3
"""Put every Prometheus exporter of a host behind one port.

    python3 expexp.py -config expexp.yaml

`up` means what it would mean without expexp. Flags, configuration and metrics follow those of
exporter_exporter ("the original"). expexp listens on :9999 or the ports you name, connects to the
configured targets and container engines, runs the configured commands, reads the configured files,
and reloads changed certificates and secrets. It writes no file, starts no shell, loads no plugin,
follows no redirect to another address and ignores proxies in the environment. Besides the commands
it runs only Python, for -web.tls.certmatch. Waits for peers have deadlines. Input has limits.

Endpoints: /proxy, /metrics, /, /sd (discovery), /-/healthy, /-/ready, /-/reload, /-/explain.
Exit codes: 0 stopped by a signal or no address to listen on, 1 bad configuration or a port in use,
2 bad flags. -verify: 0 well-formed, 1 ill-formed, 2 not readable. -explain: 1 without a 200.
Needs: Python 3.9 or later, and PyYAML unless the configuration is JSON. License: Apache 2.0.
Specifications: text format 0.0.4, OpenMetrics 1.0, client_model's metrics.proto, RFC 9110 and 9112.

"IO." marks what reads or writes. No section uses names of later ones. The path of one scrape:
 15  `Server` accepts a connection. `ClientConnection.handle` does its TLS handshake in a thread.
     `_answer` waits for a request. `read_request` reads its line and headers.
 14  `Application.handle` answers the request. `_route` calls `admit` to check the client.
     `proxy` chooses the module, checks its arguments and sets the `Deadline` (section 3).
 13  `answer_job` takes a fresh answer from the cache, or calls `scrape_target`. That calls
     `scrape_http`, `scrape_exec` or `scrape_file`. `verify_scrape` unpacks gzip.
  7  `verify_exposition` reads text with section 5, protobuf with section 6.
  2  REASONS has the status of each `ScrapeError`. `SelfMetrics.fail` (section 8) counts the error.
 15  `_write` sends the `Response` of `proxy`. Then `_finish` counts and logs the request.

Contents:
  1  Constants and limits
  2  What can go wrong
  3  Small values
  4  Exposition: grammar
  5  Exposition: reading lines
  6  Exposition: protobuf
  7  Exposition: verdict
  8  Self-metrics
  9  Flags
 10  Configuration
 11  Loading
 12  HTTP/1.1 in both directions
 13  Scraping targets
 14  Application
 15  HTTP server
 16  Command line
"""

from __future__ import annotations

import signal
import sys

if (found := sys.version_info) < (3, 9):  # expexp needs Python 3.9 or later
    sys.exit(f"expexp needs Python 3.9 or later, found {sys.version[:3]}")
if __name__ == "__main__":  # before `run`, Ctrl-C ends expexp without a traceback, like SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import _thread
import base64
import bisect
import calendar
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import gzip
import hashlib
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import platform
import pwd
import queue
import random
import re
import resource
import select
import shutil
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import threading
import time
import urllib.request
import warnings
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from math import ceil, inf, isinf
from select import POLLIN, POLLOUT
from ssl import SSLContext
from subprocess import DEVNULL as NULL
from subprocess import PIPE
from threading import BoundedSemaphore, Lock, Semaphore
from time import monotonic, sleep
from typing import Any, Callable, NamedTuple, Union, cast
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit
from urllib.parse import quote as percent_encode
from weakref import WeakSet

try:
    import yaml
except ImportError:  # a host without PyYAML can still use a configuration in JSON
    yaml = None  # type: ignore[assignment]

__version__ = "1.0.0"
REVISION = "unknown"  # `make dist` writes the commit
__all__ = ["ExpositionError", "main", "verify_exposition"]

# ==================================================================================================
# 1  Constants and limits
# ==================================================================================================
# `Limits` has the bounds on resources. A test compares docs/operation.md with these values.

TEXT_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SCRAPE_TIMEOUT_HEADER = "X-Prometheus-Scrape-Timeout-Seconds"
MEBIBYTE = 1048576
PIECE_BYTES = 65536
LAST_PORT = 65535
OK = 200
UNKNOWN_MODULE = "unknown"  # one label value: clients cannot create series
HOP_BY_HOP = (  # RFC 9110, 7.6.1, and two about the body, which expexp frames itself
    "Connection|Keep-Alive|Proxy-Authenticate|Proxy-Authorization|Proxy-Connection|Te|Trailer|"
    "Transfer-Encoding|Upgrade|Content-Length|Expect"
)
NAME_CHARACTERS = r"!#$%&'*+.^_`|~0-9A-Za-z-"
MODULE_SHARE = 0.75  # of the connections: for one module, cache waiters included
PROXY_SHARE = 0.875  # for all modules: `/metrics` and `/-/healthy` keep the rest
RELOAD_SHARE = 0.1  # for requests that wait for a reload: a file system can block it
HEADER_NAME = rf"[{NAME_CHARACTERS}]+"  # the name of a header: RFC 9110, 5.6.2
Header = tuple[str, str]  # name and value of a header. Received names become Title-Case


@dataclass(frozen=True)
class Limits:
    """Bounds on everything that comes from outside. Most names end in their unit."""

    connections: int = 512  # one thread each; if all are taken, one without a scrape is evicted
    file_descriptors: int = 8192  # the soft limit is set to this, or to a lower hard limit
    connection_descriptors: int = 5  # for one client, its TLS and a command
    accept_pause_seconds: float = 0.05  # accept must not spin when no descriptor is free
    request_line_bytes: int = 65536  # a federation query has many match[] parameters
    header_block_bytes: int = 65536  # with the request line 64 MiB for 512 connections
    handshake_seconds: float = 10  # for a client's TLS handshake: slow-loris
    header_seconds: float = 10  # for a request's line and headers: slow-loris
    write_stall_seconds: float = 30  # without progress: a client must read to keep a slot
    write_bytes_per_second: int = 65536  # a piece's time: its size at this rate, plus the stall
    idle_seconds: float = 180  # an idle connection: longer than the usual scrape interval
    target_head_bytes: int = 262144  # status line and headers of a target's answer
    unread_bytes: int = 262144  # of a body, discarded so that the answer arrives
    unread_seconds: float = 2  # to read that body
    body_bytes: int = 268435456  # 256 MiB: a body, sent or decoded; a command's output; a file
    held_bytes: int = 536870912  # 512 MiB: bodies and heads of all requests; above it: busy
    large_verifications: int = 2  # concurrent, above 1 MiB: 40 of them delay small ones by 0.4 s
    config_bytes: int = 16777216  # 16 MiB: a file of configuration, certificates or a key
    rotation_seconds: float = 1  # between checks of certificate and secret files
    retry_seconds: float = 300  # before unusable files are read again although unchanged
    bcrypt_cost: int = 14  # highest cost of a hash: about a second of processor time
    bcrypt_waiting: int = 48  # requests that wait to hash a password: others need slots, too
    bcrypt_seconds: float = 120  # for that wait: twice what the costliest hashes take
    certmatch_processes: int = 2  # concurrent; more would take all cores
    certmatch_seconds: float = 2  # for the operator's pattern on a client's names
    secret_bytes: int = 65536  # a file with a password or token
    cache_entries: int = 256  # cached answers of modules
    cache_bytes: int = 67108864  # 64 MiB: all cached answers together
    exec_scrapes: int = 10  # running commands of one module without max_concurrent
    file_scrapes: int = 50  # running reads of one module without max_concurrent
    arguments: int = 32  # `args` and `params` of one request
    argument_bytes: int = 256  # one argument
    resolver_threads: int = 8  # concurrent name look-ups
    stderr_bytes: int = 4096  # the end of a failed command's stderr, for the log
    log_line_bytes: int = 4096  # a log line: writing that many to a pipe is atomic
    log_queue_lines: int = 1000  # waiting for a slow stderr; more lines are dropped
    log_flush_seconds: float = 0.5  # to write the queued log lines at the end
    hang_up_seconds: float = 0.2  # between checks whether a waiting client has hung up
    evicted_connections: int = 32  # whose threads still run; above it new ones wait, up to 1 s
    unspread_scrapes: int = 32  # of a module at once; further ones start after a random delay
    scrape_spread_seconds: float = 0.001  # per running scrape: the longest such delay
    hang_up_spread_seconds: float = 0.3  # longest delay after hang-ups: all could wake at once
    reload_seconds: float = 60  # to wait for a reload to end, then 503
    scrape_seconds: float = 60  # a scrape without a timeout of the module or the client
    client_scrape_seconds: float = 600  # with only a client's timeout: a longer one holds a slot
    longest_scrape_seconds: float = 86400  # a scrape with any timeout
    term_to_kill_seconds: float = 0.5  # for a command's process group to end
    drain_seconds: float = 10  # to finish requests at shutdown: below systemd's own limit
    failure_reminder_seconds: float = 300  # between warnings about a module that keeps failing
    failure_pause_seconds: float = 10  # between any two warnings about a module
    queries: int = 64  # counted for a module; the outcomes of one more are kept
    unused_query_seconds: float = 3600  # older than the last scrape: the query no longer counts

    def share(self, part: float) -> int:
        """Return this fraction of the connections, at least one."""
        return max(1, int(self.connections * part))


# ==================================================================================================
# 2  What can go wrong
# ==================================================================================================
# ConfigError tells the operator what to repair. RequestError tells the client. ScrapeError says
# what failed at a target. REASONS decides statuses and counters. A test compares the docs with it.


class Reason(NamedTuple):
    """A cause of failed requests. The name is a value of the label `reason`."""

    name: str
    status: int  # of the answer; 0: the target's
    methods: tuple[str, ...] = ("http", "exec", "file")  # of the modules that can fail this way
    counter: str = ""  # a counter of the original to increment as well


REASONS = {
    reason.name: reason
    for reason in (
        Reason("bad_arguments", 400, ("http", "exec")),  # no module; args or params refused
        Reason("unknown_module", 404, ()),  # counted under module="unknown"
        Reason("malformed", 500, counter="expexp_malformed_content_errors_total"),
        Reason("command", 500, ("exec",), "expexp_command_fails_total"),
        Reason("file", 500, ("file",), "expexp_file_fails_total"),
        Reason("unreachable", 502, ("http",)),  # not resolved, refused, reset, TLS
        Reason("truncated", 502, ("http",)),  # less than announced, invalid chunks
        Reason("protocol", 502, ("http",)),  # not HTTP, endless headers or 1xx answers, 101
        Reason("too_large", 502),  # body, decoded body, output or file over its limit
        Reason("busy", 503),  # max_concurrent, bodies in memory
        Reason("timeout", 504, counter="expexp_proxy_timeout_errors_total"),
        Reason("status", 0, ("http",)),  # not 200: passed on; an unfollowed redirect: 502
        Reason("aborted", 502),  # the client hung up, or the body failed after the status was sent
    )
}


def excerpt(text: str | bytes | memoryview, limit: int = 80) -> str:
    """Return the first `limit` characters of a foreign text, unprintable ones escaped."""
    if not isinstance(text, str):
        text = str(text[: 5 * limit], "utf-8", "backslashreplace")
    shown = [char if char.isprintable() else ascii(char).strip("'") for char in text[:limit]]
    if len(text) > limit:
        shown.append("...")
    return "".join(shown)


class ExpexpError(Exception):
    """Base class of expexp's own errors, except CertificateError."""


class Problem(NamedTuple):
    """One fault of the configuration: `expexp.yaml:12:5: modules.node.http.foo: unknown key`."""

    file: str
    line: int  # 0: unknown
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        place = excerpt(self.file, 200)
        if self.line:
            place += f":{self.line}:{self.column}"
        return ": ".join(filter(None, (place, excerpt(self.path, 200), self.message)))


class ConfigError(ExpexpError):
    """The configuration has faults. `args` has all of them, sorted by place."""


class RequestError(ExpexpError):
    """A request is refused before a module is scraped."""

    def __init__(self, status: int, message: str, *headers: Header) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


class ScrapeError(ExpexpError):
    """A scrape failed for one of REASONS. Only the log and explanations show `detail`."""

    def __init__(self, reason: str, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.reason = REASONS[reason]
        self.message = message
        self.detail = detail


class ExpositionError(ExpexpError):
    """A body is not an exposition. `line` and `column` begin at 1, and are 0 in protobuf."""

    def __init__(self, message: str, line: int, column: int, pos: int, text: bytes = b"") -> None:
        place = f"line {line}, column {column}" if line else f"byte {pos}"
        super().__init__(f"{place}: {message}")
        self.message = message
        self.line = line
        self.column = column
        self.offset = pos  # of the first byte of the line, in protobuf of the field
        self.text = text  # the line


# ==================================================================================================
# 3  Small values
# ==================================================================================================
# Values that several sections share. Only `Deadline` is not pure: it reads a clock.

SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
DURATION_PART = r"([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(ns|us|ms|s|m|h)"
Address = tuple[str, int]  # host and port
Query = Sequence[tuple[bytes, bytes]]  # names and values of a query


@dataclass(frozen=True, repr=False)
class Secret:
    """A text that no page, log, error, repr or metric shows."""

    revealed: str

    def __bool__(self) -> bool:
        return bool(self.revealed)


class Deadline:
    """The moment at which work must end. No single wait exceeds `longest_wait` seconds."""

    def __init__(self, seconds: float, longest_wait: float = inf, client_fd: int = -1) -> None:
        self.seconds = seconds
        self.longest_wait = longest_wait
        self.client_fd = client_fd  # descriptor of the client's connection, polled for its hang-up
        self.began = monotonic()
        self._end = self.began + seconds
        self._yield_below = inf  # remaining seconds at the next yield

    def remaining(self) -> float:
        """Return the seconds that the next wait may take. Raise ScrapeError after the deadline."""
        left = self._end - monotonic()
        if left <= 0:  # poll would wait for ever with a negative timeout
            raise ScrapeError("timeout", f"timed out after {self.seconds:.3g} s")
        return min(left, self.longest_wait)

    def tick(self) -> None:
        """Let other threads run, once a millisecond. Raise ScrapeError after the deadline."""
        left = self.remaining()
        if left < self._yield_below:
            self._yield_below = left - 0.001
            sleep(1e-6)  # or others wait 5 ms for each step; before 3.11, sleep(0) lets none run


def parse_duration(text: str) -> float:
    """Return the seconds of a duration in Go's syntax, such as `1m30s`. Raise ValueError."""
    plain = re.sub("[\xb5\u03bc]s", "us", text)  # the micro sign and the Greek mu
    if not re.fullmatch(rf"\+?(?:0|(?:{DURATION_PART})+)", plain):
        raise ValueError(f'expected a duration such as "5s" or "1m30s", found "{excerpt(text)}"')
    return sum(float(number) * SECONDS[unit] for number, unit in re.findall(DURATION_PART, plain))


def is_host(text: str) -> bool:
    """Return whether this is a host with an optional port, as in the header Host."""
    form = r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[1-9][0-9]{,4})?"
    return re.fullmatch(form, text) is not None


def render_address(address: Address) -> str:
    """Return host and port as a user types them, IPv6 addresses in brackets."""
    host, port = address
    if ":" in host:
        host = f"[{host}]"
    return f"{host}:{port}"


@lru_cache(maxsize=1024)
def parse_client_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return a client's address without its zone. Return IPv4 if it was mapped to IPv6."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def parse_query(query: str) -> Query:
    """Return the names and values of a query in order. Its bytes were decoded as Latin-1."""
    pairs = parse_qsl(query, keep_blank_values=True, encoding="latin-1")
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


@lru_cache(maxsize=16)
def accepts(header: str, wanted: str) -> bool:
    """Return whether a header such as Accept names a value without q=0."""
    rest = r"(?![^,]*;q=0(?:\.0*)?(?:[;,]|$))(?:[;,].*)?"
    return bool(re.fullmatch(rf"(?:.*,)?{wanted}{rest}", header.lower().replace(" ", "")))


def scrape_timeout(configured: float, header: str, offset: float, limits: Limits) -> float:
    """Return the seconds that a scrape may take. `configured` is the module's timeout or 0."""
    try:
        sent = float(header)
    except ValueError:
        sent = 0  # ignored, as are 0, negative numbers, nan and inf
    if not 0 < sent < inf:
        return min(configured or limits.scrape_seconds, limits.longest_scrape_seconds)
    left = sent - offset if sent > offset else sent / 2  # the offset is for the way back
    return min(left, configured or limits.client_scrape_seconds, limits.longest_scrape_seconds)


# ==================================================================================================
# 4  Exposition: grammar
# ==================================================================================================
# The two line formats as data: tokens for the reader of section 5, productions for its fast path,
# and a `Dialect` for each format. Long runs of one byte class are possessive (`++`, `*+`, `}+`).
# Before Python 3.11 plain runs match the same, because nothing is ambiguous. An outermost group is
# possessive from 3.11.5 on: 3.11.2 takes half a group for a whole one (gh-106052).
# `(?:x|)` is faster than `(?:x)?`, and a class is faster without `^`. Authority: Prometheus's
# lexers, model/textparse/{promlex,openmetricslex}.l.

Pattern = re.Pattern[bytes]
POSSESSIVE = sys.version_info >= (3, 11)
OUTERMOST = b"+" if sys.version_info >= (3, 11, 5) else b""  # behind an outermost group


def compile_production(pattern: bytes) -> Pattern:
    """Return `pattern` compiled, with plain quantifiers where Python has no possessive ones."""
    if not POSSESSIVE:
        pattern = re.sub(rb"([*+?}])\+", rb"\1", pattern)
    return re.compile(pattern)


# Prometheus has no such limits. One match takes a token (a name, value, number, text or run of
# blanks) in 1 ms. Longer tokens and more labels would take much memory, or block all other threads.
MAX_TOKEN_BYTES = 65_536
MAX_LABELS = 10_000
MAX_LABELS_BYTES = 1_048_576
TOO_MANY_LABELS = "expected at most 10000 labels of 1 MiB together"

METRIC_NAME = rb"[a-zA-Z_:][a-zA-Z0-9_:]{0,9999}+"
LABEL_NAME = rb"[a-zA-Z_][a-zA-Z0-9_]{0,9999}+"
# What Go's ParseFloat reads, without hexadecimal and underscores: Prometheus refuses both.
DECIMAL = rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?"
NUMBER = compile_production(rb"(%b)|[+-]?(?i:inf(?:inity)?)|(?i:nan)" % DECIMAL)

# Tokens for the reader. A backslash takes the next byte with it, except a newline. Only three
# escapes have a meaning. Prometheus's lexer skips NUL after a label value and inside one, even
# after a backslash. It stops at NUL in a quoted name.
ESCAPE = re.compile(rb'\\([\\"n])')
BLANKS = re.compile(rb"[ \t]+")
WORD = re.compile(rb"[A-Z][A-Z\0]*")
NULS = re.compile(rb"\0+")
NUMBER_TOKEN = re.compile(rb"[^{ \t\n\0]+")  # a number, or what stands in its place
REST = re.compile(rb"[^\n]+")
AFTER_LABEL = compile_production(rb'[,}"]|\w{1,9999}+[ \t]{0,9999}+=')
UP_TO_NUL = re.compile(rb"[^\n\0]+")
METRIC_TOKEN = re.compile(rb"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_TOKEN = re.compile(rb"[a-zA-Z_][a-zA-Z0-9_]*")
QUOTED_NAME = compile_production(rb'[^"\\\0]*+(?:\\[^\n\0][^"\\\0]*+)*')

# Canonical forms for the fast path: what Go's libraries write. Bounds on digits prevent overflow.
# Bounds on runs limit tokens. Bounds on groups limit memory: a repetition takes 100 bytes.
FAST_LABEL = rb"[a-zA-Z][a-zA-Z0-9_]{0,9999}+"  # so it is not __name__
VALUE_BYTE = rb"[\x01-\t\x0b-!#-\[\]-\xff]"  # no quote, backslash, newline or NUL
CANONICAL_VALUE = rb'"%b{0,9999}+"' % VALUE_BYTE
DIGITS = rb"[0-9]{1,200}+(?:\.[0-9]{0,200}+|)"
EXPONENT = rb"(?:[eE](?<=[0-9.].)(?:\+?[0-9]{1,2}|-[0-9]{1,3})|)"  # not after Inf and NaN
CANONICAL_NUMBER = rb"(?:-?+%b|[+-]Inf|NaN)" % DIGITS  # without its exponent
MAX_FAST_LABELS = 20  # node_os_info has 12; to compare more names takes too long

# Wide forms: what other libraries write. Label names have quotes only if they need them.
QUOTED = rb'"[^"\\\n\0]{1,9999}+"'
WIDE_NAME = rb'(?:%b|_(?!_name__=)\w{0,9999}+|(?!"%b")%b)' % (FAST_LABEL, LABEL_NAME, QUOTED)
WIDE_VALUE = rb'"%b{0,9999}+(?:"|(?:\\[^\n\0]%b{0,800}+){1,64}")' % (VALUE_BYTE, VALUE_BYTE)
WIDE_NUMBER = rb"(?:[+-]?+(?:%b|\.[0-9]{1,200}+|(?i:inf(?:inity|)))|(?i:nan))" % DIGITS
#: A label, or the metric's quoted name, in a line that the wide forms match. The group: its name.
LABEL_PAIR = compile_production(rb"[{,] *+(?:(%b)=%b|%b)" % (WIDE_NAME, WIDE_VALUE, QUOTED))


def compose_labels(name: bytes, value: bytes, comma: bytes, depth: int = 0) -> bytes:
    """Return a pattern of labels from number `depth` on. In group `more` names may repeat."""
    taken = b"".join(rb"(?!(?P=l%d)=)" % number for number in range(depth))
    pair = rb"%b(?P<l%d>%b)=%b" % (taken, depth, name, value)
    if depth + 1 == MAX_FAST_LABELS:
        return pair + rb"(?:(?P<more>%b)%b=%b){0,200}" % (comma, name, value)
    return pair + rb"(?:%b%b|)" % (comma, compose_labels(name, value, comma, depth + 1))


CANONICAL_LABELS = compose_labels(FAST_LABEL, CANONICAL_VALUE, b",")
CANONICAL_SERIES = rb"%b(?:\{%b\}|)" % (METRIC_NAME, CANONICAL_LABELS)


def compose_wide_series(comma: bytes) -> bytes:
    """Return a pattern of a series. Its name may be quoted in the braces."""
    # Python 3.11 and 3.13 raise SystemError if a group set on an earlier line is tried again and
    # fails while the match goes on. So no group starts at a closing brace.
    labels = compose_labels(WIDE_NAME, WIDE_VALUE, comma + rb"(?!\})")
    opening = rb"(?:%b\{|\{%b(?:%b|(?=\})))" % (METRIC_NAME, QUOTED, comma)
    return rb"(?:%b(?:(?!\})%b,?|)\}|%b)" % (opening, labels, METRIC_NAME)


OPENMETRICS_TIME = rb"%b(?: -?+%b%b|)" % (EXPONENT, DIGITS, EXPONENT)
EXEMPLAR_LABELS = rb"\{(?:%b=%b(?:,|(?=\}))){0,64}\}" % (LABEL_NAME, WIDE_VALUE)
EXEMPLAR = rb" # %b %b%b" % (EXEMPLAR_LABELS, CANONICAL_NUMBER, OPENMETRICS_TIME)
AFTER_VALUE = rb"%b(?:%b|)" % (OPENMETRICS_TIME, EXEMPLAR)
#: Base units. The reader checks others: a pattern for all takes quadratic time.
UNIT = (
    rb"|UNIT %b(?:(?<=_seconds) seconds|(?<=_bytes) bytes|(?<=_ratio) ratio|(?<=_volts) volts"
    rb"|(?<=_amperes) amperes|(?<=_joules) joules|(?<=_grams) grams|(?<=_meters) meters"
    rb"|(?<=_celsius) celsius)" % METRIC_NAME
)
TEXT_TYPES = (b"untyped", b"counter", b"gauge", b"histogram", b"summary")
OPENMETRICS_TYPES = (b"unknown", *TEXT_TYPES[1:], b"gaugehistogram", b"info", b"stateset")
RUN_SAMPLES = 200


def compose_metadata(types: tuple[bytes, ...], more: bytes = b"") -> bytes:
    """Return a pattern of a HELP line, a TYPE line, or a line of `more`."""
    forms = METRIC_NAME, METRIC_NAME, b"|".join(types), more
    return rb"# (?:HELP %b [^\n]{0,9999}+|TYPE %b (?:%b)%b)\n" % forms


TEXT_METADATA = compose_metadata(TEXT_TYPES)
OPENMETRICS_METADATA = compose_metadata(OPENMETRICS_TYPES, UNIT)
TEXT_TIME = EXPONENT + rb"(?: [0-9]{1,18}+|)"


def compose_run(metadata: bytes, series: bytes, number: bytes, after: bytes) -> Pattern:
    """Return a pattern of up to RUN_SAMPLES samples. Each match holds the interpreter lock."""
    block = rb"(?:%b(?:%b){0,5}|)%b %b%b\n" % (metadata, metadata, series, number, after)
    return compile_production(rb"(?:%b){1,%d}%b" % (block, RUN_SAMPLES, OUTERMOST))


class Dialect(NamedTuple):
    """What distinguishes the two line formats. The defaults are those of the text format."""

    types: tuple[bytes, ...] = TEXT_TYPES  #: a family without a type has the first one
    label_value: Pattern = compile_production(rb'[^"\\]*+(?:\\\0*+[^\n\0][^"\\]*+)*')
    fast: Pattern = compose_run(TEXT_METADATA, CANONICAL_SERIES, CANONICAL_NUMBER, TEXT_TIME)
    wide: Pattern = compose_run(  #: also comments, blank lines, VictoriaMetrics's blanks
        rb"(?:%b|#(?:[^ \t\n\0]| [^A-Z \t\n\0])[^\n\0]*+\n|\n(?!\n))" % TEXT_METADATA,
        compose_wide_series(b", {0,9999}+"),
        WIDE_NUMBER,
        TEXT_TIME + rb"[ \t]{0,9999}+",
    )
    separator: Pattern = BLANKS  #: before a value, a timestamp, a keyword
    timestamp: Pattern = re.compile(rb"()[0-9]+")
    no_timestamp: Pattern = compile_production(rb"[ \t]{0,65537}+(?:\n|\Z)")
    after_name: Pattern = re.compile(rb"[^\0\n]|(?=\n)|\Z")  #: in metadata
    timestamp_unit: str = "milliseconds"
    keywords: tuple[bytes, ...] = (b"HELP", b"TYPE")
    openmetrics: bool = False


TEXT = Dialect()
OPENMETRICS = Dialect(
    types=OPENMETRICS_TYPES,
    separator=re.compile(b" "),
    label_value=compile_production(rb'[^"\\\n]*+(?:\\\0*+[^\n\0][^"\\\n]*+)*'),
    timestamp=compile_production(b"(%b)" % DECIMAL),
    no_timestamp=re.compile(rb"(?! )| (?:\n|\Z|# \{)"),
    after_name=re.compile(b" "),
    fast=compose_run(OPENMETRICS_METADATA, CANONICAL_SERIES, CANONICAL_NUMBER, AFTER_VALUE),
    wide=compose_run(OPENMETRICS_METADATA, compose_wide_series(b","), WIDE_NUMBER, AFTER_VALUE),
    timestamp_unit="seconds",
    keywords=(b"HELP", b"TYPE", b"UNIT"),
    openmetrics=True,
)

# ==================================================================================================
# 5  Exposition: reading lines
# ==================================================================================================
# The reader defines what is accepted and makes every message. Each `read_*` reads at the position
# of its source and advances it. It raises only ExpositionError and what the caller's `tick` raises.
# `tick` is called for each run, line, label and window of a long comment, so a deadline ends the
# reading of any body. Time is linear in the size of the body. The fast path reads a run of lines in
# one match. It accepts only what the reader accepts: verdicts and counts are the same without it.

FOUND = re.compile(rb"[^ \t\n]{1,400}")  # what a message quotes
# The most bytes in one match (2 ms for labels that begin alike) and in the reader's UTF-8 checks.
WINDOW_BYTES = 131_072 if POSSESSIVE else 65_536
LINE_BYTES = 1_048_576  # in a longer line, columns count bytes
ADVICE = {  #: for messages; a pattern is searched in `b'x'` (the byte before `pos`) plus message
    r"""b'[\w:]'.*[ek"], found "(?![-.\d]+")[^"{}=,\\]""": "names with this character need quotes",
    r'name, found "\\(ufeff|xff\\xfe|xfe\\xff)': "save the file as UTF-8 without a byte order mark",
    r'name, found "\\x1f\\x8b': "the body is gzip: decompress it, or send Content-Encoding: gzip",
    r"name, found the end of the line": "OpenMetrics allows no empty line",
    r"name, found a": "OpenMetrics allows no blank before a name",
    r' seconds, or a newline, found "#': 'an exemplar begins with " # {"',
    r"newline, found a": 'OpenMetrics allows a blank only before a timestamp and before "# {"',
    r'untyped.*"(unknown|info|stateset|g\w+m)"': "write untyped, or serve it as OpenMetrics",
}
Tick = Callable[[], object]


def no_tick() -> None:
    """Do nothing: no deadline ends the reading."""


def is_utf8(text: bytes) -> bool:
    """Return whether `text` is UTF-8."""
    try:
        return text.isascii() or bool(text.decode())
    except UnicodeDecodeError:
        return False


def quote(text: bytes) -> str:
    """Return a foreign text in quotes, for a message."""
    return f'"{excerpt(text)}"'


@dataclass
class Source:
    """A body, and the position of the next byte to read."""

    body: bytes
    dialect: Dialect
    tick: Tick = no_tick
    pos: int = 0
    fast_from: int = 0  # the reader takes the lines before this position

    def error_at(self, pos: int, message: str) -> ExpositionError:
        """Return the error to raise for what stands at `pos`."""
        for form, advice in ADVICE.items():
            found = f"{self.body[pos - 1 : pos]!r}{message}"
            if re.search(form, found):
                message += f"; {advice}"
        line = self.body.count(b"\n", 0, pos) + 1  # 0.17 s for 256 MiB, once a scrape
        start = self.body.rfind(b"\n", 0, pos) + 1
        text = self.body[start : start + LINE_BYTES].partition(b"\n")[0]
        before = pos - start
        if len(text) < LINE_BYTES and is_utf8(text):
            before = len(text[:before].decode(errors="ignore"))
        return ExpositionError(message, line, before + 1, start, text)

    def describe(self, pos: int) -> str:
        """Return what stands at `pos`, in words or in quotes."""
        found = FOUND.match(self.body, pos)
        if found:
            return quote(found[0])
        names = {b"": "the end of the body", b"\n": "the end of the line", b"\t": "a tab"}
        return names.get(self.body[pos : pos + 1], "a blank")

    def expected(self, pos: int, what: str, found: str = "") -> ExpositionError:
        """Return the error for `what` missing at `pos`. It shows `found`, or what stands there."""
        return self.error_at(pos, f"expected {what}, found {found or self.describe(pos)}")

    def require(self, fits: object, pos: int, what: str, found: bytes | None = None) -> None:
        """Raise the error for `what` missing at `pos` if `fits` is false."""
        if not fits:
            raise self.expected(pos, what, "" if found is None else quote(found))

    def peek(self) -> bytes:
        """Return the next byte, b"" at the end of the body."""
        return self.body[self.pos : self.pos + 1]

    def take(self, form: Pattern, what: str) -> bytes:
        """Return and skip the next token, b"" if there is none. A message calls it `what`."""
        pos = self.pos
        found = form.match(self.body, pos, pos + MAX_TOKEN_BYTES + 2)  # an escape is not cut
        token = found[0] if found else b""
        if len(token) > MAX_TOKEN_BYTES:
            raise self.error_at(pos, f"expected {what} of at most {MAX_TOKEN_BYTES} bytes")
        self.pos += len(token)
        return token

    def skip_blanks(self) -> None:
        """Skip optional blanks, which only the text format has."""
        if not self.dialect.openmetrics:
            self.take(BLANKS, "a run of blanks")

    def skip_separator(self) -> bytes:
        """Return and skip what separates two tokens, b"" if it is missing."""
        return self.take(self.dialect.separator, "a run of blanks")


class Label(NamedTuple):
    """One pair in braces: its name unescaped, its value as it was written."""

    pos: int
    name: bytes
    value: bytes


class Sample(NamedTuple):
    """One line with a value. Names are unescaped, the rest is as it was written."""

    pos: int
    name: bytes
    labels: Labels
    value: bytes
    timestamp: bytes
    exemplar: Labels | None


class Metadata(NamedTuple):
    """One HELP, TYPE or UNIT line."""

    pos: int
    keyword: bytes
    name: bytes
    text: bytes


Labels = list[Label]
Line = Union[Sample, Metadata, None]  # None: an empty line or a comment


def unescape(text: bytes) -> bytes:
    """Return `text` as Prometheus understands it."""
    return ESCAPE.sub(lambda found: b"\n" if found[1] == b"n" else found[1], text)


def read_quoted(source: Source, form: Pattern, what: str) -> bytes:
    """Return the text between the next quote and the one that closes it, still escaped."""
    opening = source.pos
    source.pos += 1
    text = source.take(form, what)
    source.require(source.peek() != b"\\", source.pos, r"one of the escapes \\, \" and \n")
    if source.peek() != b'"':
        found = source.describe(source.pos)
        raise source.expected(opening, "a second quote to close this one", found)
    source.pos += 1
    return text


def read_name(source: Source, form: Pattern, what: str) -> bytes:
    """Return a name, bare or quoted. A quoted one may hold any byte except NUL."""
    if source.peek() == b'"':
        return unescape(read_quoted(source, QUOTED_NAME, "a name"))
    name = source.take(form, "a name")
    source.require(name, source.pos, what)
    return name


def read_label_value(source: Source) -> bytes:
    """Read the equals sign and a label's value. Return the value as it was written."""
    source.require(source.peek() == b"=", source.pos, '"="')
    source.pos += 1
    source.skip_blanks()
    start = source.pos
    source.require(source.peek() == b'"', start, "a label value in double quotes")
    value = read_quoted(source, source.dialect.label_value, "a label value")
    source.require(is_utf8(value), start, "a label value in UTF-8", value)
    source.take(NULS, "a run of NUL bytes")
    source.skip_blanks()
    if value.endswith(b"=") and rb"\"" in value and not AFTER_LABEL.match(source.body, source.pos):
        raise source.expected(start, "a closing quote without a backslash", quote(value))
    return value


def read_labels(source: Source, name: bytes | None) -> tuple[bytes | None, Labels]:
    """Read braces. Return the metric's name (`name`, or a quoted one in them) and the labels."""
    labels = Labels()
    opening = source.pos
    source.pos += 1
    source.skip_blanks()
    while source.peek() != b"}":
        source.tick()
        start = source.pos
        is_quoted = source.peek() == b'"'
        label = read_name(source, LABEL_TOKEN, 'a label name or "}"')
        source.skip_blanks()
        if is_quoted and name is None and source.peek() in (b",", b"}"):
            name = label
        else:
            labels.append(Label(start, label, read_label_value(source)))
        if len(labels) > MAX_LABELS or source.pos - opening > MAX_LABELS_BYTES:
            raise source.error_at(start, TOO_MANY_LABELS)
        if source.peek() == b",":
            source.pos += 1
            source.skip_blanks()
        elif source.dialect.openmetrics:
            source.require(source.peek() == b"}", source.pos, '"," or "}"')
    source.pos += 1
    return name, labels


def find_wrong_label(tick: Tick, labels: Labels, taken: set[bytes], *kept: bytes) -> Label | None:
    """Return the first label not in UTF-8, or whose name is empty or `taken`. Extend `taken`."""
    # Prometheus first drops all labels of a name if one of them is empty, unless it is in `kept`.
    dropped = {name for _, name, value in labels if not value}.difference(kept)
    for label in labels:
        tick()
        _, name, value = label
        is_bad = not name or name in taken or not is_utf8(name)
        if not is_utf8(value) or (is_bad and name not in dropped):
            return label
        taken.add(name)
    return None


def read_number(source: Source, what: str, form: Pattern = NUMBER) -> bytes:
    """Skip a separator. Return the number after it as it was written."""
    blank = source.skip_separator()
    start = source.pos
    number = source.take(NUMBER_TOKEN, "a number")
    source.require(blank or not source.dialect.openmetrics, start, "a blank")
    found = form.fullmatch(number)
    if not found:
        raise source.expected(start, what)
    if found[1] and isinf(float(found[1])):
        raise source.expected(start, "a number within the range of float64")
    return number


def read_timestamp(source: Source) -> bytes:
    """Return a timestamp or b"": int64 milliseconds, in OpenMetrics float seconds."""
    dialect = source.dialect
    if dialect.no_timestamp.match(source.body, source.pos):
        return b""
    what = f"a timestamp in {dialect.timestamp_unit}, or a newline"
    number = read_number(source, what, dialect.timestamp)
    if not dialect.openmetrics and int(number.lstrip(b"0")[:20] or b"0") >= 2**63:
        raise source.expected(source.pos - len(number), "a timestamp within the range of int64")
    return number


def read_sample(source: Source) -> Sample:
    """Return a sample."""
    start = source.pos
    name = None
    labels = Labels()
    if source.peek() not in (b"{", b'"'):
        name = read_name(source, METRIC_TOKEN, "a metric name")
        source.skip_blanks()
    if source.peek() == b"{":
        name, labels = read_labels(source, name)
    if name is None:
        raise source.expected(start, "a metric name, before the braces or quoted in them")
    source.require(name and is_utf8(name), start, "a name in UTF-8", name)
    wrong = find_wrong_label(source.tick, labels, {b"__name__"}, b"__name__")
    if wrong:
        label = wrong.name
        source.require(label and is_utf8(label), wrong.pos, "a name in UTF-8", label)
        raise source.error_at(wrong.pos, f"found the label {quote(label)} twice")
    value = read_number(source, "a value")
    timestamp = read_timestamp(source)
    exemplar = None
    end = source.pos
    if source.dialect.openmetrics and source.body.startswith(b" # {", end):
        source.pos += 3
        _, exemplar = read_labels(source, b"")
        if re.search(rb"[\0\n]", source.body[end : source.pos]):
            raise source.error_at(end + 1, "expected no NUL and no newline in an exemplar")
        read_number(source, "an exemplar's value")
        read_timestamp(source)
    return Sample(start, name, labels, value, timestamp, exemplar)


def read_comment(source: Source) -> Metadata | None:
    """Return the metadata in a line that begins with `#`, None for a comment or `# EOF`."""
    start = source.pos
    source.pos += 1
    blank = source.skip_separator()
    rest = REST if blank and source.peek() != b"\0" else UP_TO_NUL
    keyword = blank and source.take(WORD, "a word").replace(b"\0", b"")
    end = source.pos
    if source.skip_separator() and keyword in source.dialect.keywords:
        return read_metadata(source, start, keyword)
    if source.dialect.openmetrics:
        line = source.body[start : start + WINDOW_BYTES].partition(b"\n")[0]
        source.require(keyword == b"EOF", start, 'HELP, TYPE, UNIT or "# EOF"', line)
        if source.body[end : end + 2] not in (b"", b"\n"):
            raise source.error_at(end, 'expected nothing after "# EOF"')
        source.pos = len(source.body) + 1
    while found := rest.match(source.body, source.pos, source.pos + WINDOW_BYTES):
        source.tick()
        source.pos = found.end()
    # Prometheus takes this NUL for the end of the body. All that follows would be lost silently.
    if source.peek() == b"\0":
        raise source.error_at(source.pos, "a NUL byte here ends the body for Prometheus")
    return None


def read_metadata(source: Source, start: int, keyword: bytes) -> Metadata:
    """Return the HELP, TYPE or UNIT line from `start` on. The caller has read its keyword."""
    dialect = source.dialect
    name = read_name(source, METRIC_TOKEN, f"a metric name after {keyword.decode()}")
    after = dialect.after_name.match(source.body, source.pos)
    if not after:
        raise source.expected(source.pos, "a blank")
    source.pos = after.end()
    text_start = source.pos
    text = source.take(REST, "a text")
    if keyword == b"TYPE" and text not in dialect.types:
        source.require(after[0] in b" \t", after.start(), "a blank")  # where the name ended
        types = b", ".join(dialect.types).decode()
        raise source.expected(text_start, f"one of {types}", quote(text))
    fits = keyword != b"UNIT" or not text or name.endswith(b"_" + text)
    source.require(fits, text_start, "a unit that the metric's name ends in", text)
    source.require(is_utf8(text), text_start, "a text in UTF-8", text)
    return Metadata(start, keyword, name, text)


def read_line(source: Source) -> Line:
    """Return the next line. OpenMetrics has no blank lines and ends with `# EOF`."""
    source.skip_blanks()
    needs_eof = bool(source.dialect.openmetrics and source.body)  # Prometheus accepts an empty body
    line: Line = None
    if source.peek() == b"#":
        line = read_comment(source)
    elif needs_eof or source.peek() not in b"\n":
        source.require(source.peek(), source.pos, '"# EOF"')
        line = read_sample(source)
    source.skip_blanks()
    is_over = source.pos >= len(source.body) + needs_eof
    source.require(is_over or source.peek() == b"\n", source.pos, "a newline")
    source.pos += 1
    return line


def has_label_twice(run: bytes) -> bool:
    """Return whether a line has more than MAX_FAST_LABELS labels, one of them twice."""
    for line in run.split(b"\n"):
        if line.count(b'="') > MAX_FAST_LABELS:
            names = LABEL_PAIR.findall(line)
            if len(set(names)) < len(names):
                return True
    return False


def read_runs(source: Source, end: int, form: Pattern) -> int:
    """Read the lines up to `end` that `form` takes. Return how many samples they have."""
    body = source.body
    samples = 0
    last = source.pos
    while run := form.match(body, source.pos, end):
        source.tick()
        if run["more"] and has_label_twice(run[0]):
            source.fast_from = run.end()  # else each of its lines would be matched again
            break
        samples += RUN_SAMPLES  # only the last run may have fewer
        last = source.pos
        source.pos = run.end()
    lines = b"\n" + body[last : source.pos]
    others = lines.count(b"\n#")
    if form is source.dialect.wide:
        others += lines.count(b"\n\n")
    return max(samples - RUN_SAMPLES, 0) + lines.count(b"\n", 1) - others


def read_exposition(body: bytes, dialect: Dialect, tick: Tick = no_tick) -> int:
    """Return the number of samples. A window that is not UTF-8 is read line by line."""
    source = Source(body, dialect, tick)
    stop = 0
    samples = 0
    while source.pos <= len(body):
        start = source.pos
        if start >= stop:
            stop = body.rfind(b"\n", start, start + WINDOW_BYTES) + 1 or start + WINDOW_BYTES
            if not is_utf8(body[start:stop]):
                source.fast_from = stop
        tick()
        if start >= source.fast_from:
            samples += read_runs(source, stop, dialect.fast)
            samples += read_runs(source, stop, dialect.wide)
        if source.pos < stop:  # measured: to read a line past each window took 5 % longer
            samples += isinstance(read_line(source), Sample)
    return samples


# ==================================================================================================
# 6  Exposition: protobuf
# ==================================================================================================
# A body is a run of `io.prometheus.client.MetricFamily` messages, each after its length. PROTOBUF
# has the known fields. Others are skipped. As in Prometheus's decoder, wire types and lengths must
# fit, names, help and label values must be UTF-8, and label names must differ. The patterns
# PLAIN accept only what `read_fields` accepts. Authority: client_model, protobuf's encoding page.

PROTOBUF = {  #: fields by message, in the order of their numbers; callers read those of kind ""
    "MetricFamily": {"name": "text", "help": "text", "type": "int", "metric": "", "unit": "text"},
    "Metric": {
        "label": "",
        "gauge": "Gauge",
        "counter": "Counter",
        "summary": "Summary",
        "untyped": "Gauge",
        "timestamp_ms": "int",
        "histogram": "Histogram",
    },
    "LabelPair": {"name": "text", "value": "text"},
    "Gauge": {"value": "double"},
    "Counter": {"value": "double", "exemplar": "Exemplar", "created": "Timestamp"},
    "Summary": {"count": "int", "sum": "double", "quantile": "Quantile", "created": "Timestamp"},
    "Quantile": {"quantile": "double", "value": "double"},
    "Histogram": {
        "count": "int",
        "sum": "double",
        "bucket": "Bucket",
        "count_float": "double",
        "schema": "int",
        "zero_threshold": "double",
        "zero_count": "int",
        "zero_count_float": "double",
        "negative_span": "Span",
        "negative_delta": "ints",
        "negative_count": "doubles",
        "positive_span": "Span",
        "positive_delta": "ints",
        "positive_count": "doubles",
        "created": "Timestamp",
        "exemplar": "Exemplar",
    },
    "Bucket": {"count": "int", "bound": "double", "exemplar": "Exemplar", "count_float": "double"},
    "Span": {"offset": "int", "length": "int"},
    "Exemplar": {"label": "LabelPair", "value": "double", "timestamp": "Timestamp"},
    "Timestamp": {"seconds": "int", "nanos": "int"},
    "ints": {},  # a run of numbers, which PLAIN matches
}
FIELDS = {name: dict(enumerate(fields.items(), 1)) for name, fields in PROTOBUF.items()}
CONTINUED = 0x80  # set in each byte of a number except the last
LENGTH_DELIMITED = 2
#: 0: a varint. 1: 8 bytes. 5: 4 bytes. 2: a length and bytes (kinds not listed here).
WIRES = {"int": (0,), "double": (1,), "ints": (0, 2), "doubles": (1, 2), "any": (0, 1, 2, 5)}
MAX_PREFIX_BYTES = 5  # of the length before a message, as in Prometheus
#: Fields that make a histogram native. Prometheus adds the label `le` to other histograms.
NATIVE = {"zero_threshold", "zero_count", "negative_span", "positive_span"}
VARINT = compile_production(rb"[\x80-\xff]{0,9}+[\x00-\x7f]")
#: A length of 1 to 127, and an ASCII text of that length.
SHORT = b"|".join(rb"\x%02x[\x00-\x7f]{%d}" % (size, size) for size in range(1, 128))
PLAIN = {  #: fields that need no further check, by message
    "Bucket": compile_production(rb"(?s)\x08%b\x11.{8}" % VARINT.pattern),
    "Quantile": re.compile(rb"(?s)\x09.{8}\x11.{8}"),
    "ints": compile_production(rb"(?:%b){1,256}" % VARINT.pattern),
}
LABEL = rb"\n([\x00-\x7f])\n(?!\x08__name__)(%b)\x12(%b)" % (SHORT, SHORT)
LABEL_FIELD = re.compile(LABEL)
PLAIN_METRIC = compile_production(  #: one number, short ASCII labels, whose sizes are unchecked
    rb"(?s)(?:%b){0,30}%b[\x12\x1a*]\x09\x09.{8}(?:0%b)?" % (LABEL, OUTERMOST, VARINT.pattern)
)
Field = tuple[str, int, int]  # path, start and end of the content


def garbled(path: str, pos: int, message: str) -> ExpositionError:
    """Return the error to raise for a field."""
    return ExpositionError(f"{path}: {message}", 0, 0, pos)


def read_varint(body: bytes, pos: int, end: int, path: str) -> tuple[int, int]:
    """Return where the number at `pos` ends, and the number: seven bits a byte, at most 64."""
    if pos < end and body[pos] < CONTINUED:
        return pos + 1, body[pos]
    found = VARINT.match(body, pos, end)
    if not found:
        raise garbled(path, pos, "expected a complete varint")
    value = 0
    for byte in reversed(found[0]):
        value = value << 7 | byte & 0x7F
    return found.end(), value & 0xFFFF_FFFF_FFFF_FFFF


def read_content(body: bytes, pos: int, end: int, path: str, wire: int) -> tuple[int, int]:
    """Return where the content of a field begins and ends. Refuse obsolete groups."""
    if wire == 0:
        return pos, read_varint(body, pos, end, path)[0]
    start = pos
    length = {1: 8, 5: 4}.get(wire, 0)
    if wire == LENGTH_DELIMITED:
        start, length = read_varint(body, pos, end, path)
    if start + length > end:
        raise garbled(path, pos, f"expected {length} bytes, found {end - start}")
    return start, start + length


def read_fields(source: Source, pos: int, end: int, path: str, kind: str) -> Iterator[Field]:
    """Yield path, start and end of known fields, except plain ones. A field precedes its parts."""
    body = source.body
    plain = PLAIN.get(kind)
    while pos < end:
        source.tick()
        if plain and (run := plain.match(body, pos, end)):
            pos = run.end()
            continue
        start, tag = read_varint(body, pos, end, path)
        number = tag >> 3 & 0xFFFF_FFFF
        wire = tag & 7
        name, content = FIELDS[kind].get(number, ("", "any"))
        here = f"{path}.{name or number}"
        if not 0 < number < 1 << 31 or wire not in WIRES.get(content, (LENGTH_DELIMITED,)):
            raise garbled(here, start, f"expected no field {number} with the wire type {wire}")
        start, pos = read_content(body, start, end, here, wire)
        if content == "text" and pos - start > MAX_TOKEN_BYTES:
            raise garbled(here, start, f"expected at most {MAX_TOKEN_BYTES} bytes")
        if content == "doubles" and (pos - start) % 8:
            raise garbled(here, start, "expected a multiple of 8 bytes")
        if name:
            yield here, start, pos
        if content in FIELDS:
            yield from read_fields(source, start, pos, here, content)


def check_metric(source: Source, pos: int, end: int) -> None:
    """Raise ExpositionError for a metric that Prometheus refuses."""
    if PLAIN_METRIC.fullmatch(source.body, pos, end):
        pairs = LABEL_FIELD.findall(source.body, pos, end)
        names = {name for size, name, text in pairs if ord(size) - 2 == len(name + text)}
        if len(names) == len(pairs):  # all lengths fit, no name is there twice
            return
    labels = Labels()
    found = set()
    size = 0
    for path, start, stop in read_fields(source, pos, end, "metric_family.metric", "Metric"):
        found.add(path.rpartition(".")[2])
        if path == "metric_family.metric.label":
            size += stop - start
            if len(labels) == MAX_LABELS or size > MAX_LABELS_BYTES:
                raise garbled("metric_family.metric", start, TOO_MANY_LABELS)
            pair = {"name": b"", "value": b""}
            for part, begin, until in read_fields(source, start, stop, path, "LabelPair"):
                pair[part.rpartition(".")[2]] = source.body[begin:until]
            labels.append(Label(start, **pair))
    taken = {b"__name__"}
    if "quantile" in found:
        taken.add(b"quantile")
    if "histogram" in found and NATIVE.isdisjoint(found):
        taken.add(b"le")
    wrong = find_wrong_label(source.tick, labels, taken, b"__name__", b"")
    if wrong:
        shown = f"{quote(wrong.name)}={quote(wrong.value)}"
        message = f"expected UTF-8 and a unique name, found {shown}"
        raise garbled("metric_family.metric.label", wrong.pos, message)


def read_family(source: Source, pos: int, end: int) -> int:
    """Return how many metrics a family has. Without any, Prometheus ignores its name and type."""
    last = {"metric_family.type": b"\0"}
    metrics = 0
    for path, start, stop in read_fields(source, pos, end, "metric_family", "MetricFamily"):
        if path == "metric_family.metric":
            check_metric(source, start, stop)
            metrics += 1
        else:
            last[path] = source.body[start:stop]
    if not metrics:
        return 0
    name = last.get("metric_family.name", b"")
    if not name or not is_utf8(name) or not is_utf8(last.get("metric_family.help", b"")):
        raise garbled("metric_family", pos, f"expected name and help in UTF-8, found {quote(name)}")
    if last["metric_family.type"] > b"\5":
        raise garbled("metric_family", pos, "expected a type up to 5")
    return metrics


def read_protobuf(body: bytes, tick: Tick) -> int:
    """Return how many metrics the whole body has."""
    source = Source(body, TEXT, tick)
    pos = 0
    metrics = 0
    while pos < len(body):
        tick()
        start, end = read_content(body, pos, len(body), "metric_family", LENGTH_DELIMITED)
        if start - pos > MAX_PREFIX_BYTES:
            raise garbled("metric_family", pos, "expected a length of at most 5 bytes")
        metrics += read_family(source, start, end)
        pos = end
    return metrics


# ==================================================================================================
# 7  Exposition: verdict
# ==================================================================================================
# The content type of a body chooses its reader. An unknown or missing content type means text.

CONTENT_TYPE = re.compile(  #: as Prometheus 3 accepts it: no parameter may have two values
    r"(?ai)\s{0,9}(?:text/plain|application/(?:openmetrics-text|vnd\.google\.protobuf))\s{0,9}"
    r"(?:;\s{0,9}([!#-'*+.0-9A-Z^-~-]{1,99})\s{0,9}=\s{0,9}"
    r"""([!#-'*+.0-9A-Z^-~-]{1,99}|"(?:[^"\\]|\\.){0,99}")\s{0,9}"""
    r"(?!.{0,999};\s{0,9}\1\s{0,9}=(?!\s{0,9}\2\s{0,9}(?:;|$)))){0,9};?\s{0,9}"
)


def is_openmetrics_body(body: bytes) -> bool:
    """Return whether the last line is `# EOF`, with or without its newline."""
    return bool(re.search(rb"(?:\A|\n)# EOF\n?\Z", body[-7:]))


def choose_dialect(content_type: str) -> Dialect | None:
    """Return the dialect of a content type, None for protobuf. Unknown types are read as text."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/vnd.google.protobuf":
        return None
    return OPENMETRICS if media_type == "application/openmetrics-text" else TEXT


def verify_exposition(body: bytes, content_type: str, tick: Tick = no_tick) -> int:
    """Return the number of samples in `body`, in protobuf the number of metrics.

    Raise ExpositionError if Prometheus would not ingest the body, and any error of `tick`. Refuse
    more than Prometheus: a NUL byte that hides the rest of a text, a token of more than 64 KiB, a
    series with more than 10,000 labels or 1 MiB of labels, and obsolete groups in protobuf.
    """
    dialect = choose_dialect(content_type)
    if dialect is None:
        return read_protobuf(body, tick)
    return read_exposition(body, dialect, tick)


# ==================================================================================================
# 8  Self-metrics
# ==================================================================================================
# SELF_METRICS declares the original's metrics and ours, by type and labels. No IO.

SELF_METRICS = {
    ("summary", "module"): {"expexp_proxy_duration_seconds": "Duration of proxied requests."},
    ("counter", "module"): {
        "expexp_proxy_errors_total": "Proxied requests that failed.",
        "expexp_proxy_timeout_errors_total": "Proxied requests that reached their deadline.",
        "expexp_malformed_content_errors_total": "Bodies that failed verification.",
        "expexp_command_starts_total": "Attempts to start a command.",
        "expexp_command_fails_total": "Commands that failed or were too slow.",
        "expexp_file_fails_total": "Files that could not be read.",
    },
    ("counter", "module", "reason"): {"expexp_proxy_failures_total": "Failed requests to modules."},
    ("counter", "path", "code"): {"expexp_http_requests_total": "Requests answered, by route."},
    ("counter", "reason"): {"expexp_tls_handshake_failures_total": "Failed TLS handshakes."},
    ("counter",): {
        "expexp_rejected_connections_total": "Connections closed for lack of a slot or thread.",
        "expexp_log_lines_dropped_total": "Log lines that were not written.",
        "process_cpu_seconds_total": "User and system time in seconds.",
    },
    ("gauge",): {
        "expexp_http_requests_in_flight": "Requests that are being answered.",
        "expexp_open_connections": "Open connections of clients.",
        "expexp_tls_certificate_expiry_timestamp_seconds": "Earliest expiry in expexp's chain.",
        "expexp_config_last_reload_successful": "Whether the last reload was successful.",
        "expexp_config_last_reload_success_timestamp_seconds": "Time of the last good reload.",
        "expexp_credentials_last_reload_successful": "Whether all credentials are up to date.",
        "process_open_fds": "Open file descriptors.",
        "process_max_fds": "Soft limit of file descriptors.",
        "process_virtual_memory_bytes": "Virtual memory in bytes.",
        "process_resident_memory_bytes": "Resident memory in bytes.",
        "process_start_time_seconds": "Start of the process, in seconds since 1970.",
        "process_threads": "Threads of the process.",
    },
    ("gauge", "version", "pythonversion"): {"expexp_build_info": "Version of expexp. Always 1."},
    ("gauge", "version", "revision", "branch", "goversion"): {"build_info": "Versions. Always 1."},
    ("gauge", "implementation", "major", "minor", "patchlevel", "version"): {
        "python_info": "Version of Python. Always 1."
    },
}
HANDSHAKE_FAULTS = ("timeout", "closed", "plain_http", "certificate", "protocol")
MODULE_SAMPLES = (
    *SELF_METRICS["counter", "module"],
    "expexp_proxy_duration_seconds_sum",
    "expexp_proxy_duration_seconds_count",
)


def render_labels(names: Sequence[str], values: Sequence[str]) -> str:
    """Return `{name="value",...}` with escaped values. Return "" without labels."""
    text = ""
    for name, value in zip(names, values):
        escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        text += f',{name}="{escaped}"'
    return "{" + text[1:] + "}" if text else ""


class SelfMetrics:
    """The series of SELF_METRICS. All threads share them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._samples: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        for name in (*SELF_METRICS["counter",], "expexp_open_connections"):
            self.increment(name, by=0)
        for fault in HANDSHAKE_FAULTS:
            self.increment("expexp_tls_handshake_failures_total", fault, by=0)

    def set(self, **values: float) -> None:
        """Set gauges without labels, or counters whose values come from elsewhere."""
        with self._lock:
            for name, value in values.items():
                self._samples[name][()] = value

    def increment(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter or gauge. Adding 0 creates the series."""
        with self._lock:
            samples = self._samples[name]
            samples[labels] = samples.get(labels, 0) + by

    def forget_modules(self, known: Callable[[], Iterable[str]]) -> None:
        """Drop the series of all modules except the known ones."""
        with self._lock:  # also during `known`: no module may gain a series then
            kept = {UNKNOWN_MODULE, *known()}
            for name in (*MODULE_SAMPLES, "expexp_proxy_failures_total"):
                samples = self._samples[name]
                for labels in [labels for labels in samples if labels[0] not in kept]:
                    del samples[labels]

    def create_module(self, module: str, method: str) -> None:
        """Create the series of a module at zero, with the reasons why its method can fail."""
        for name in MODULE_SAMPLES:
            self.increment(name, module, by=0)
        for reason in REASONS.values():
            if method in reason.methods:
                self.increment("expexp_proxy_failures_total", module, reason.name, by=0)

    def fail(self, module: str, method: str, reason: Reason) -> None:
        """Count a failure, also in the counter of the original that REASONS names."""
        self.increment("expexp_proxy_errors_total", module)
        self.increment("expexp_proxy_failures_total", module, reason.name)
        if reason.counter:
            self.increment(reason.counter, module)
        if method == "exec" and reason.name == "timeout":  # as in the original
            self.increment("expexp_command_fails_total", module)

    def render(self) -> str:
        """Return all series in the text format."""
        with self._lock:
            samples = {name: sorted(series.items()) for name, series in self._samples.items()}
        text = ""
        for (kind, *labels), names in SELF_METRICS.items():
            for name, documentation in names.items():
                text += f"# HELP {name} {documentation}\n# TYPE {name} {kind}\n"
                for part in (name, name + "_sum", name + "_count"):
                    rows = samples.get(part, ())
                    text += "".join(f"{part}{render_labels(labels, own)} {n}\n" for own, n in rows)
        return text


# ==================================================================================================
# 9  Flags
# ==================================================================================================
# FLAGS declares the original's flags and ours. The syntax is Go's: `-name value` or `-name=value`,
# one dash or two, exact names. argparse would accept abbreviations. Pure: texts in, Options out.

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
Convert = Callable[[str], Any]  # from the text of a flag or key; raises ValueError
Values = dict[str, Any]  # by name
SEVERE_LEVELS = {"panic": 50, "fatal": 50, "error": 40, "warning": 30, "warn": 30}
LOG_LEVELS = SEVERE_LEVELS | {"info": 20, "debug": 10, "trace": 5}


class FlagError(ExpexpError):
    """The flags cannot be used. The message is a sentence."""


def parse_boolean(text: str) -> bool:
    """Return the boolean that a word means in Go or YAML, ignoring case. Raise ValueError."""
    found = re.fullmatch("(?ai)(1|t|true|yes|on)|0|f|false|no|off", text)
    if not found:
        raise ValueError("expected true or false")
    return found[1] is not None


def parse_level(text: str) -> int:
    """Return the number of a log level in upper or lower case. Raise ValueError."""
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"expected one of {', '.join(LOG_LEVELS)}")
    return LOG_LEVELS[text.lower()]


def parse_address(text: str) -> Address | None:
    """Return host ("" for all) and port of `[::1]:9999`, None for no text. Raise ValueError."""
    if not text:
        return None
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^:\[\]\s/]*):([0-9]{1,5})", text)
    if not found or int(found[2]) > LAST_PORT:
        raise ValueError('expected an address such as ":9999" or "[::1]:9999"')
    return found[1].strip("[]"), int(found[2])


def parse_network(text: str) -> Network:
    """Return the network of a text such as `10.0.0.0/8`. Raise ValueError without a slash."""
    if "/" not in text:
        raise ValueError('expected a network such as "10.0.0.0/8"')
    return ipaddress.ip_network(text, strict=False)


def parse_external(text: str) -> tuple[str, ...]:
    """Return scheme, host with an optional port, and path, "" where missing. Raise ValueError."""
    found = re.fullmatch(r"(?:(https?)://)?([^/]*)((?:/[A-Za-z0-9_.~%-]+)*)/?", text)
    if not found or (text and not is_host(found[2])):
        raise ValueError('expected a host or a URL, such as "db1:9999" or "https://db1/expexp"')
    return found.groups("")


def parse_seconds(text: str) -> float:
    """Return the seconds of a duration or number, at most a day. Raise ValueError."""
    seconds = parse_duration(re.sub(r"^[0-9.]+$", r"\g<0>s", text))
    if seconds > Limits.longest_scrape_seconds:
        raise ValueError("expected a day at most")
    return seconds


def parse_path(text: str) -> str:
    """Return an absolute path without `.`, `..` and doubled slashes."""
    return "/" + os.path.normpath("/" + text).lstrip("/")


def parse_pattern(text: str) -> str:
    """Return a regular expression. Raise ValueError if Python rejects it or warns about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # `[a&&b]` compiles, but Go might read it differently
        try:
            re.compile(text, re.ASCII)
        except (re.error, Warning, OverflowError, RecursionError) as error:
            raise ValueError(f"not a Python regular expression: {error}") from None
    if re.search(r"\[:\^?\w+:]", text):  # Python does not always warn
        raise ValueError("not a Python regular expression: POSIX classes are not supported")
    return text


class Flag(NamedTuple):
    """A flag of the command line."""

    documentation: str  # `backquotes` mark the name of its value, as in Go
    parse: Convert = str
    default: str | None = ""  # as a user types it; None: a repeatable flag without a default


FLAGS = {
    "allow.net": Flag("Allow only clients of this `network`. Repeatable.", parse_network, None),
    "config.auto-reload-interval": Flag("Check files every `duration`; 0: no.", parse_seconds, "0"),
    "config.check": Flag("Check configuration and credentials, and exit.", parse_boolean, "false"),
    "config.dirs": Flag("Read a module from each file in this `folder`. Repeatable.", default=None),
    "config.file": Flag("Read the modules in this `file`. Also -config.", default="expexp.yaml"),
    "config.skip-dirs": Flag("Skip a -config.dirs that does not exist.", parse_boolean, "false"),
    "explain": Flag("Scrape this `module`, explain what happens, and exit."),
    "help": Flag("Show all flags, and exit. Also -h.", parse_boolean, "false"),
    "log.access": Flag("Log each request, whatever -log.level is.", parse_boolean, "false"),
    "log.json": Flag("Write the log as JSON.", parse_boolean, "false"),
    "log.level": Flag("Log lines of this `level` and above.", parse_level, "warning"),
    "timeout-offset": Flag("Take this `duration` off Prometheus's timeout.", parse_seconds, "0.5"),
    "verify": Flag("Verify the exposition in this `file`, and exit. Repeatable.", default=None),
    "verify.content-type": Flag("Content `type` for -verify. Default: text, OpenMetrics at # EOF."),
    "version": Flag("Show the version, and exit.", parse_boolean, "false"),
    "web.bearer.token": Flag("Require clients to send this `token`.", Secret),
    "web.bearer.token-file": Flag("Require clients to send the token in this `file`."),
    "web.config.file": Flag("Read TLS settings and users from this exporter-toolkit `file`."),
    "web.enable-lifecycle": Flag("Let clients reload with POST /-/reload.", parse_boolean, "false"),
    "web.external-address": Flag("Host or `URL` in /sd. Default: the header Host.", parse_external),
    "web.listen-address": Flag('Listen on this `address`. "" disables it.', parse_address, ":9999"),
    "web.proxy-path": Flag("Serve the modules at this `path`.", parse_path, "/proxy"),
    "web.telemetry-path": Flag("Serve expexp's metrics at this `path`.", parse_path, "/metrics"),
    "web.tls.ca": Flag("Verify client certificates with the CAs in this `file`.", default="ca.pem"),
    "web.tls.cert": Flag("Serve TLS with the certificate in this `file`.", default="cert.pem"),
    "web.tls.certmatch": Flag("Require a certificate name that matches `pattern`.", parse_pattern),
    "web.tls.key": Flag("Serve TLS with the key in this `file`.", default="key.pem"),
    "web.tls.listen-address": Flag('Serve TLS on this `address`. "" disables it.', parse_address),
    "web.tls.verify": Flag("Require and verify client certificates.", parse_boolean, "false"),
}
ALIASES = {"config": "config.file", "h": "help"}
GONE = {
    "verify.strict": "-verify.strict is gone: run contrib/expolint.py --strict FILE.",
    "winsvc": "-winsvc is not supported: there is no Windows service.",
}
GUARDS = ("web.bearer.token", "web.bearer.token-file", "web.config.file")
WARNINGS = "warnings"  #: the Options key of warnings about the flags
Options = Mapping[str, Any]


def parse_flags(arguments: Sequence[str]) -> Options:
    """Return the options of a command line. Raise FlagError."""
    options: Values = {WARNINGS: ()}
    for name, flag in FLAGS.items():
        options[name] = () if flag.default is None else flag.parse(flag.default)
    rest = iter(arguments)
    for argument in rest:
        found = re.fullmatch(r"(?s)--?([^-=][^=]*)(?:=(.*))?", argument)
        if not found:
            raise FlagError(f'unexpected argument "{excerpt(argument)}".')
        typed, text = found.groups()
        name = ALIASES.get(typed, typed)
        if name in GONE:
            raise FlagError(GONE[name])
        if name not in FLAGS:
            near = "".join(difflib.get_close_matches(name, FLAGS, 1))
            hint = f"; did you mean -{near}?" if near else "."
            raise FlagError(f"unknown flag -{excerpt(name)}{hint}")
        flag = FLAGS[name]
        if text is None:
            text = "true" if flag.parse is parse_boolean else next(rest, None)
        if text is None:
            raise FlagError(f"flag -{name} needs a value.")
        try:
            value = flag.parse(text)
        except ValueError as error:
            raise FlagError(f'invalid value "{excerpt(text)}" for -{name}: {error}.') from None
        if name in GUARDS and not text:  # if a template leaves it empty, everybody gets in
            options[WARNINGS] += (f"flag -{name} has no value and protects nothing",)
        options[name] = (*options[name], value) if flag.default is None else value
    return options


def render_usage() -> str:
    """Return an example, all flags grouped by name, endpoints and exit codes."""
    text = "Usage: python3 expexp.py -config expexp.yaml\n"
    former = ""
    for name, flag in FLAGS.items():
        if name[:4] != former[:4]:
            text += "\n"
        former = name
        words = " ".join([f"  -{name}", *re.findall("`(.+)`", flag.documentation)])
        default = f" (default {flag.default})" if flag.default else ""
        text += f"{words}\n        {flag.documentation}{default}\n"
    return text.replace("`", "") + "".join(re.findall("(?s)\nEndpoints:.*?\n\n", __doc__ or ""))


# ==================================================================================================
# 10  Configuration
# ==================================================================================================
# A document becomes a tree of nodes, and the tree becomes frozen dataclasses. Their fields declare
# the keys. Scalars keep their source text: YAML 1.1 changes `1.10`, `no` and `010`. Pure.

YAML_KINDS = {"int": "number", "float": "number", "bool": "boolean", "null": "nothing"}
Place = tuple[int, int]  # line and column; 0: unknown, as in JSON


class NodeError(ExpexpError):
    """A node or document cannot be used. Its arguments are a message and a place, if known."""


class Node(NamedTuple):
    """A value of a document and its place. Messages show `kind`."""

    kind: str = "nothing"  # string, number, boolean, mapping or list
    text: str = ""  # the source text of a scalar
    place: Place = (0, 0)
    items: Sequence[Node] = ()
    entries: Sequence[tuple[Node, Node]] = ()


def place_after(before: str) -> Place:
    """Return the place after this text."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def build_yaml(loader: Any, raw: Any) -> Node:
    """Return the Node of a PyYAML node. The loader builds an anchor once: no alias can explode."""
    place = raw.start_mark.line + 1, raw.start_mark.column + 1
    build = loader.construct_object
    if raw.id == "scalar":
        kind = YAML_KINDS.get(raw.tag.rpartition(":")[2], "string")
        return Node(kind, "" if kind == "nothing" else raw.value, place)  # `~` has no text
    if raw.id == "sequence":
        return Node("list", "", place, [build(item) for item in raw.value])
    entries: list[tuple[Node, Node]] = []
    merged: list[Node] = []
    for name, value in raw.value:
        if name.tag.endswith(":merge"):
            source = build(value)
            merged += source.items or [source]
        else:
            entries.append((build(name), build(value)))
    for mapping in merged:
        if mapping.kind != "mapping":  # its text may be secret
            raise NodeError(f"expected a mapping to merge, found: {mapping.kind}", mapping.place)
        names = {name.text for name, _ in entries}  # own entries win
        entries += [entry for entry in mapping.entries if entry[0].text not in names]
    return Node("mapping", "", place, entries=entries)


def parse_yaml(text: str) -> Node:
    """Return the first document of a YAML text. Raise NodeError."""
    if yaml is None:
        raise NodeError(
            "PyYAML is needed to read YAML: install python3-yaml (Debian, Ubuntu), python3-pyyaml "
            "(RHEL, Fedora) or PyYAML (pip), or write the configuration as a .json file"
        )
    loader: Any = type("Loader", (yaml.SafeLoader,), {"yaml_constructors": {None: build_yaml}})
    try:
        return loader(text).get_data() or NOTHING
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark
        found = re.sub(r"'(?!<)[^' ]{3,}'", "'...'", str(error.problem))  # may be secret
        if r"'\t'" in found:
            found = "a tab: indent with blanks"
        raise NodeError(f"not YAML: {found}", (mark.line + 1, mark.column + 1)) from None


def build_json(value: Any) -> Node:
    """Return the node of a JSON value. An object is a tuple of pairs here, a number is a node."""
    if isinstance(value, list):
        return Node("list", items=[build_json(item) for item in value])
    if isinstance(value, bool):
        return Node("boolean", str(value).lower())
    if isinstance(value, str):
        return Node("string", value)
    if type(value) is tuple:
        return Node("mapping", entries=[(Node("string", k), build_json(v)) for k, v in value])
    return value or NOTHING


def parse_json(text: str) -> Node:
    """Return the tree of a JSON text, without places. Raise NodeError."""
    number = partial(Node, "number")
    hooks: Any = {"parse_int": number, "parse_float": number, "parse_constant": number}
    try:
        return build_json(json.loads(text, object_pairs_hook=tuple, **hooks))
    except json.JSONDecodeError as error:
        raise NodeError(f"not JSON: {error.msg}", (error.lineno, error.colno)) from None


# --- readers: they return the value of a key's node, or raise NodeError
Read = Callable[[Node], Any]
NOTHING = Node()  # of an absent key, JSON's null, and an empty document
#: A byte that is not UTF-8, or a character that YAML forbids.
UNREADABLE = re.compile("[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NO_NUL = "[^\0\ud800-\udfff]*"  # JSON's escapes can spell a lone surrogate


def scalar(
    what: str, pattern: str = NO_NUL, convert: Convert = str, kind: str = "", secret: bool = False
) -> Read:
    """Return a reader of scalars whose source text matches `pattern`. `convert` makes the value."""

    def read(node: Node) -> Any:
        """Return the value. Raise NodeError, which shows no secret and nothing before an @."""
        if node.kind not in ("list", "mapping") and re.fullmatch(pattern, node.text):
            with suppress(ValueError):
                value = convert(node.text)
                if kind in ("", node.kind):
                    return value
                if node.kind == "string":
                    words = f'expected a {kind}, found the text "{node.text}": remove the quotes'
                    raise NodeError(words)  # at the place of its key's value
        text = excerpt(re.sub(r"(?s)\A([A-Za-z][A-Za-z0-9+.-]*://)?.*@", r"\1...@", node.text))
        shown = {"string": f'"{text}"', "nothing": "nothing"}
        found = ", found " + shown.get(node.kind, f"the {node.kind} {text}".rstrip())
        if text and (secret or convert is Secret):
            found = ""
        raise NodeError(f"expected {what}{found}", node.place)

    return read


def to_port(text: str) -> int:
    """Return a port, also of `9_100`, `0x238c` and `9100.0`. Raise ValueError."""
    port = int(text.partition(".")[0], 0)
    if not 1 <= port <= LAST_PORT:
        raise ValueError("no port")
    return port


def to_address(text: str) -> str:
    """Return a host name or an IP address without brackets. Raise ValueError."""
    address = text.strip("[]")
    return str(ipaddress.IPv6Address(address)) if ":" in address else address


def to_path(text: str) -> str:
    """Return path and query of a URL, escaped for a request line and with a leading slash."""
    return "/" + percent_encode(text.partition("#")[0], "/%?&=+,;:@!$'()*~").removeprefix("/")


def read_list(node: Node, what: str = "a list") -> Sequence[str]:
    """Return the texts of a list. Drop entries without a value, as the original does."""
    if node.kind != "list":  # arguments may be secret: the message does not show the text
        raise NodeError(f"expected {what}, found the {node.kind}")
    return tuple(read_secret(item).revealed for item in node.items if item.kind != "nothing")


HASH = r"\$2[aby]\$(0[4-9]|1[0-4])\$[./A-Za-z0-9]{53}"  # up to Limits.bcrypt_cost
PORT = r"(0x[0-9a-fA-F_]{1,9}|[1-9][0-9_]{0,9})(\.0*)?"
HOST = r"[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]+\]|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+"
#: Refuses a password before a host: pages and the log show the target.
NO_PASSWORD = r"(?![^/?#]*:(?s:.*)@)(?!//[^?#]*@)"  # noqa: S105 - a pattern
A_PATH = "the path of a URL (put the host into address), two hexadecimal digits after %"
URL_PATH = rf"{NO_PASSWORD}(?![a-z]+://)(?:[^%]|%[0-9A-Fa-f]{{2}})*"
LINE = r"[\t\x20-\x7e\x80-\xff]*"
SENT_HEADER = rf"(?!(?i:{HOP_BY_HOP})$){HEADER_NAME}"
AUTH_TYPES = ("NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert")
read_text = scalar("text without a NUL")
read_secret = scalar("text without a NUL", convert=Secret)
read_module_name = scalar("a name", "[^\0\ud800-\udfff]+")
BOOLEAN = "(?i:true|false|yes|no|on|off)"
VERIFY_CHOICE = "true or false (contrib/expolint.py has the former strict level)"
read_boolean = scalar("true or false", BOOLEAN, parse_boolean, "boolean")
read_discovery = scalar("true, false, or params and labels", BOOLEAN, parse_boolean, "boolean")
read_label = scalar("a label, not module, instance, __*", r"(?a)(?!__|module$|instance$)[^\W\d]\w*")
read_duration = scalar('a duration such as "5s" or "1m30s"', convert=parse_duration)
read_port = scalar(f"a port from 1 to {LAST_PORT}", PORT, to_port, "number")
read_address = scalar("a host or IP address (no port, scheme or path)", HOST, to_address)
read_name_or_path = scalar("a name or path, without a password", NO_PASSWORD + NO_NUL)
read_engine = scalar("a socket such as unix:///run/x.sock", f"unix:///[^\0]{NO_NUL}")
read_header = scalar("the name of a header to send", SENT_HEADER, str.title)
read_header_value = scalar("one line of Latin-1 text", LINE, Secret)
read_variable = scalar("the name of a variable", "[^=\0\ud800-\udfff]+", secret=True)
read_auth_type = scalar(" or ".join(AUTH_TYPES), "|".join(AUTH_TYPES))
# Messages do not show names of users: a password could follow a colon.
read_user = scalar("the name of a user, without a colon", f"(?=[^:]+$){NO_NUL}", secret=True)
read_hash = scalar(f"a bcrypt hash of cost 4-{Limits.bcrypt_cost}", HASH, Secret)


def read_accepted(node: Node) -> Any:
    """Return whether clients may add anything, or the list of what they may add."""
    if node.kind == "boolean":
        return read_boolean(node)
    return read_list(node, "true, false or a list")


# --- sections: the fields of their dataclasses declare the keys
RIVAL_KEYS = (  # a section may have one key of each group
    ("address", "unix_socket", "container"),
    ("basic_auth_password", "basic_auth_password_file", "bearer_token_file"),
)
#: Docker's socket, and podman's, which is tried if Docker's is missing.
ENGINES = ("unix:///var/run/docker.sock", "unix:///run/podman/podman.sock")


def key(read: Any, default: Any = "", *needs: str, required: str = "") -> Any:
    """Return a field for a key. If `needs` names keys, the section must have one of them, too."""
    metadata = {"read": read, "default": default, "needs": needs, "required": required}
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


@dataclass(frozen=True, repr=False)  # it may hold secrets
class HttpTarget:
    """Section `http` of a module. With a `unix_socket` the port may be missing."""

    unix_socket: str = key(read_name_or_path)
    port: int = key(read_port, 0, required="port of the exporter")
    scheme: str = key(scalar("http or https", "https?"), "http")
    address: str = key(read_address, "localhost")
    container: str = key(scalar("the name of a container", "[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"))
    container_host: str = key(read_engine, ENGINES[0], "container")
    path: str = key(scalar(A_PATH, URL_PATH, to_path, secret=True), "/metrics")  # may hold a token
    headers: Mapping[str, Secret] = key((read_header, read_header_value), {})
    basic_auth_username: str = key(read_user, "", "basic_auth_password", "basic_auth_password_file")
    basic_auth_password: Secret = key(read_secret, Secret(""), "basic_auth_username")  # noqa: RUF009 - frozen
    basic_auth_password_file: str = key(read_text, "", "basic_auth_username")
    bearer_token_file: str = key(read_text)
    tls_insecure_skip_verify: bool = key(read_boolean, False)
    tls_cert_file: str = key(read_text, "", "tls_key_file")
    tls_key_file: str = key(read_text, "", "tls_cert_file")
    tls_min_version: str = key(scalar("TLS10, TLS11, TLS12 or TLS13", "TLS1[0-3]"), "TLS12")
    tls_ca_cert_file: str = key(read_text)  # instead of the system's authorities
    tls_root_ca_file: str = key(read_text)  # beside the system's authorities
    content_type: str = key(scalar("one line of Latin-1 text", LINE))
    server_name: str = key(read_name_or_path)

    @cached_property
    def netloc(self) -> str:
        """Return host and port as in a URL, or the host alone if there is no port."""
        host = self.container or self.address
        return render_address((host, self.port)) if self.port else host

    @cached_property
    def url(self) -> str:
        """Return the URL without its query, which may hold a token."""
        return f"{self.scheme}://{self.netloc}{self.path.partition('?')[0]}"

    @cached_property
    def shown(self) -> str:
        """Return the URL, and the socket or container behind it."""
        if self.container:
            return f"{self.url} in a container"
        return f"{self.url} at {self.unix_socket}" if self.unix_socket else self.url


@dataclass(frozen=True, repr=False)
class ExecTarget:
    """Section `exec` of a module. `shown` is the command alone: arguments may be secret."""

    command: str = key(read_text, required="program to run, without a shell")
    args: Sequence[str] = key(read_list, ())
    env: Mapping[str, Secret] = key((read_variable, read_secret), {})
    clear_env: bool = key(read_boolean, False)
    shown = property(operator.attrgetter("command"))


@dataclass(frozen=True)
class FileTarget:
    """Section `file` of a module."""

    path: str = key(read_text, required="regular file or FIFO to read")
    shown = property(operator.attrgetter("path"))


TARGETS: Mapping[str, Any] = {"http": HttpTarget, "exec": ExecTarget, "file": FileTarget}


@dataclass(frozen=True)
class Discovery:
    """How /sd lists a module: once, or once for each combination of its parameters' values."""

    params: Mapping[str, Sequence[str]] = key((read_label, read_list), {})
    labels: Mapping[str, str] = key((read_label, read_text), {})


@dataclass(frozen=True)
class Module:
    """A module."""

    method: str = key(scalar("http, exec or file", "http|exec|file"), required="http, exec or file")
    timeout: float = key(read_duration, 0.0)
    verify: bool = key(scalar(VERIFY_CHOICE, BOOLEAN, parse_boolean, "boolean"), True)
    cache: float = key(read_duration, 0.0)
    max_concurrent: int = key(scalar("0 to 999999", "0|[1-9][0-9]{0,5}", int, "number"), 0)
    scrape_interval: float = key(read_duration, 0.0)
    discovery: Any = key(Discovery, Discovery())  # noqa: RUF009 - frozen
    accept_args: bool | Sequence[str] = key(read_accepted, True)
    accept_params: bool | Sequence[str] = key(read_accepted, True)
    name: str = ""
    target: Any = None


class Config(NamedTuple):
    """The modules, and the name of the default module or ""."""

    modules: Mapping[str, Module]
    default_module: str


@dataclass(frozen=True)
class TlsServer:
    """Section `tls_server_config` of a web configuration."""

    cert_file: str = key(read_text, required="certificate, and the chain behind it")
    key_file: str = key(read_text, required="its key")
    client_auth_type: str = key(read_auth_type, AUTH_TYPES[0], "client_ca_file")
    client_ca_file: str = key(read_text, "", "client_auth_type")
    client_allowed_sans: Sequence[str] = key(read_list, (), "client_auth_type")
    min_version: str = key(scalar("TLS12 or TLS13", "TLS1[23]"), "TLS12")
    max_version: str = key(scalar("TLS12 or TLS13", "TLS1[23]"), "TLS13")


@dataclass(frozen=True, repr=False)
class WebConfig:
    """Content of -web.config.file, with some of the keys of exporter-toolkit."""

    tls_server_config: Any = key(TlsServer, None)  # noqa: RUF009 - frozen
    basic_auth_users: Mapping[str, Secret] = key((read_user, read_hash), {})


def declared_keys(section: Any) -> Mapping[str, Any]:
    """Return the keys of a section's dataclass, with the arguments of `key`."""
    return {field.name: field.metadata for field in dataclasses.fields(section) if field.metadata}


MODULE_KEYS = declared_keys(Module)
#: Keys of a module that its method's section may have instead.
SHARED_KEYS = {k: MODULE_KEYS[k] for k in ("verify", "accept_args", "accept_params")}
UNFIT_KEYS = {"http": ["accept_args"], "exec": [], "file": ["accept_args", "accept_params"]}
TOP_KEYS = ("modules", "defaultModule", "global")
TOOLKIT_KEYS = "http_server_config|rate_limit|cert|key|client_ca|.*cipher_suites|curve_.*"


def suggest(message: str, name: str, known: Iterable[str]) -> str:
    """Return the message, with the nearest of the known names if one is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f'{message}; did you mean "{near[0]}"?' if near else message


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key, with its section or the most similar key."""
    if re.fullmatch(TOOLKIT_KEYS, name):
        return "known to exporter-toolkit, not supported here"
    homes: Values = {f"section {one}": declared_keys(TARGETS[one]) for one in TARGETS}
    homes |= {"the module, beside method": MODULE_KEYS, "the top of -config.file": TOP_KEYS}
    home = " or ".join(one for one in homes if name in homes[one])
    if home:
        return f"unknown key here; it belongs to {home}"
    return suggest("unknown key", name, known)


def shell_advice(command: str) -> str:
    """Return advice for a command that is written for a shell, or ""."""
    if re.fullmatch(r"[^\s~$|&;<>]+", command):
        return ""
    return "; there is no shell: put arguments into args, or the line into a script"


def words_of(error: BaseException) -> str:
    """Return the message of a system or TLS error, without error numbers and C file names."""
    text = ""
    for name in ("strerror", "reason", "verify_message"):  # the last is the most exact
        found = getattr(error, name, None)
        if isinstance(found, str):
            text = found
    plain = re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", text).lower().replace("_", " ")
    return plain or str(error).strip() or type(error).__name__


class DocumentReader:
    """Reads the tree of a document. Adds problems to a list that documents can share."""

    def __init__(self, filename: str, problems: list[Problem]) -> None:
        self.filename = filename
        self.problems = problems
        self.places: dict[str, Place] = {"": (0, 0)}
        self._has_refused_keys = False  # True: a required key may just be misspelled

    def problem(self, path: str, message: str, place: Place | None = None) -> None:
        """Note a problem, by default at the place of the path or the nearest section around it."""
        around = path
        while around not in self.places:
            around = around.rpartition(".")[0]
        place = place or self.places[around]
        self.problems.append(Problem(excerpt(self.filename, 200), *place, path, message))

    @contextmanager
    def noting(self, path: str, what: str = "cannot be read") -> Iterator[None]:
        """Note an error of the block as a problem. `what` precedes a system or TLS error."""
        try:
            yield
        except NodeError as error:
            self.problem(path, *error.args)
        except RecursionError:  # in a parser
            self.problem(path, "nested too deeply")
        except (OSError, ValueError, OverflowError) as error:  # ssl.SSLError is an OSError
            self.problem(path, f"{what}: {words_of(error)}")

    def entries(
        self, node: Node, prefix: str, known: Iterable[str] = (), read_name: Read = read_module_name
    ) -> dict[str, Node]:
        """Return keys and values of a mapping. Note duplicates, and keys that are not known."""
        before = len(self.problems)
        found: dict[str, Node] = {}
        if node.kind not in ("mapping", "nothing"):  # its text may be secret, such as a password
            self.problem(prefix[:-1], f"expected a mapping, found the {node.kind}", node.place)
        for name_node, value in node.entries:
            name = self.read(read_name, name_node, prefix[:-1])
            where = f"{prefix}{name}"
            if name in found:
                self.problem(where, "given twice", name_node.place)
            elif known and name and name not in known:
                self.problem(where, unknown_key(name, known), name_node.place)
            elif name:
                found[name] = value
                self.places[where] = value.place
        self._has_refused_keys |= len(self.problems) > before
        return found

    def read(self, reader: Any, node: Node, path: str) -> Any:
        """Return the value of a key's node. What has a problem is None or left out."""
        prefix = path and f"{path}."
        if reader is Discovery and node.kind != "mapping":
            return Discovery() if self.read(read_discovery, node, path) else None
        if isinstance(reader, type):  # the dataclass of a section
            declared = declared_keys(reader)
            return reader(**self.values(declared, self.entries(node, prefix, declared), prefix))
        if isinstance(reader, tuple):  # readers of names and of secrets
            found = self.entries(node, prefix, read_name=reader[0])
            return {name: self.read(reader[1], found[name], prefix + name) for name in found}
        with self.noting(path):
            return reader(node)

    def values(self, declared: Mapping[str, Any], nodes: Mapping[str, Node], prefix: str) -> Values:
        """Return the values of the keys present, None for a bad one. Note contradictions."""
        values: Values = {}
        for name, metadata in declared.items():
            node = nodes.get(name, NOTHING)
            where = prefix + name
            is_text = node.kind == "string" and isinstance(metadata["default"], str)
            if node.text or not (is_text or node.kind == "nothing"):  # empty texts do not count
                values[name] = self.read(metadata["read"], node, where)
            elif metadata["required"] and not ("unix_socket" in values or self._has_refused_keys):
                self.problem(where, f"required: {metadata['required']}")
        given = [name for name in values if values[name] != declared[name]["default"]]
        for name in given:
            needs = declared[name]["needs"]
            if values[name] and needs and set(needs).isdisjoint(given):
                self.problem(prefix + name, f"needs {needs[0]} beside it")
        for group in RIVAL_KEYS:
            rivals = [name for name in group if name in given]
            for name in rivals[1:]:
                self.problem(prefix + name, f"does not go with {rivals[0]}")
        if values.get("client_allowed_sans") == ():
            self.problem(prefix + "client_allowed_sans", "must list at least one name")
        return values

    def module(self, name: str, node: Node) -> Module | None:
        """Return a module, or None after a problem."""
        before = len(self.problems)
        prefix = f"modules.{name}."
        self.places.setdefault(prefix[:-1], node.place)
        self._has_refused_keys = False
        nodes = self.entries(node, prefix, (*MODULE_KEYS, *TARGETS))
        values = self.values(MODULE_KEYS, nodes, prefix)
        method = values.get("method")
        if not method:
            return None
        inner = f"{prefix}{method}."
        declared = {**declared_keys(TARGETS[method]), **SHARED_KEYS}
        own = self.entries(nodes.get(method, NOTHING), inner, declared)
        target = self.values(declared, own, inner)
        for shared in SHARED_KEYS:  # add the section's values to the module's
            value = target.pop(shared, None)
            if value is not None and values.setdefault(shared, value) not in (value, None):
                self.problem(inner + shared, f"differs from {prefix}{shared}")
        if method == "http" and values.get("verify") is False and values.get("cache"):
            self.problem(prefix + "cache", "needs verify: a streamed answer cannot be cached")
        for other in (*TARGETS, *UNFIT_KEYS[method]):
            if other in {**nodes, **values} and other != method:
                self.problem(prefix + other, f'does not go with method "{method}"')
        if len(self.problems) > before:
            return None
        return Module(**values, name=name, target=TARGETS[method](**target))


# ==================================================================================================
# 11  Loading
# ==================================================================================================
# The files that expexp reads become one Snapshot: the configuration at start and on a reload,
# certificates and secrets also when they change. A value is replaced as a whole or not at all. A
# problem with a file is a ConfigError at start, and a line in the log later. IO.

LOGGER = logging.getLogger("expexp")
ACCESS = logging.getLogger("expexp.access")  # requests, whose lines LOGGER's handler writes
NOTICE = 60  # a start, a reload, an end: above CRITICAL, so written at every -log.level


@lru_cache
def notify_socket() -> socket.socket:
    """Return the one socket to systemd, kept in case descriptors run out later. IO."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.settimeout(1)
    return channel


def notify(state: str) -> None:
    """Send a state to systemd, if it asks for states: sd_notify(3). Wait up to a second. IO."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    with suppress(OSError):
        if address:
            notify_socket().sendto(state.encode(), re.sub("^@", "\0", address))


def log_problems(problems: Iterable[Problem]) -> None:
    """Log why files are not used."""
    for problem in problems:
        words = "reload failed, keeping the previous configuration: %s"
        LOGGER.error(words, problem, extra={"fields": problem._asdict()})


# --- files
CERTIFICATE = re.compile(b"-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----")
PRIVATE_KEY = re.compile(rb"BEGIN (?!ENCR|OPENSSH)[A-Z ]*PRIVATE KEY-----(?!\s*Proc-Type)")
PEM_MISTAKES = {  #: what a file holds instead of a certificate or key in PEM, and what to do
    rb"\A\s*\Z": "an empty file: write it again",
    rb"BEGIN ENCRYPTED|4,ENCRYPTED": "an encrypted key: decrypt it with openssl pkey",
    rb"BEGIN OPENSSH": "an OpenSSH key: make a new one with openssl genpkey",
    rb"BEGIN.* REQUEST": "a certificate request: use the certificate that the CA issued",
    rb"BEGIN PKCS7": "PKCS#7: convert it with openssl pkcs7 -print_certs",
    rb"BEGIN CERTIFICATE-(?!.*END)": "a part of a certificate: write it again",
    rb"BEGIN CERTIFICATE": "a certificate: name the file of its key here",
    rb"PRIVATE KEY-----": "a private key: name the file of its certificate here",
    rb"\A\x30(\x80|\x82..)\x02\x01\x03": "PKCS#12: convert it with openssl pkcs12 -nodes",
    rb"\A\x30.{1,3}\x02\x01[\0\1]": "a key in DER: convert it with openssl pkey -inform der",
    rb"\A\x30\x82..\x30": "DER: convert it with openssl x509 -inform der",
    rb"": "something else: PEM begins with -----BEGIN",
}
TLS_FLAGS = ("web.tls.cert", "web.tls.key", "web.tls.ca")
#: DER of an RSA key whose length takes one byte: it has fewer than 2048 bits (1936 at most).
SHORT_RSA = re.compile(rb"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00\x03(?!\x82)")
#: By their names in configurations. RFC 8446, 4.1.2: TLS 1.0 is 0x0301.
TLS_VERSIONS = {f"TLS1{minor}": ssl.TLSVersion(0x0301 + minor) for minor in range(4)}
IGNORE_UNEXPECTED_EOF = 0x80  # a truncated body would look complete; in ssl from 3.10
SEARCH_NAMES = (
    "import re, sys; pattern, *names = sys.argv[1:];"
    "sys.exit(0 if any(re.search(pattern, name, re.ASCII) for name in names) else 3)"
)
MATCHING = BoundedSemaphore(Limits.certmatch_processes)
# RFC 5280, 4.1.2.5: a sequence of two dates, in UTC and with seconds. The latter is the expiry.
VALIDITY = re.compile(rb"\x30[\x1e\x20\x22]..[0-9]{12,14}Z([\x17\x18]).([0-9]{12,14})Z")


def fingerprint(filename: str) -> list[int]:
    """Return a file's mode (0: missing), and what a write or a replacement changes. IO."""
    try:
        found = os.stat(filename)  # of the file behind a link
    except OSError:
        return [0]
    if stat.S_ISFIFO(found.st_mode):  # it can be read only once
        return [found.st_mode]
    return [*found[:7], found.st_mtime_ns, found.st_ctime_ns]  # not st_atime


def certificate_end(certificate: str) -> float:
    """Return when a certificate in PEM expires, Unix time. Raise ValueError if it does not say."""
    found = VALIDITY.search(ssl.PEM_cert_to_DER_cert(certificate))
    if not found:
        raise ValueError("no certificate")
    year = "%Y" if found[1] == b"\x18" else "%y"
    return calendar.timegm(time.strptime(found[2].decode(), f"{year}%m%d%H%M%S"))


class NamedFile(NamedTuple):
    """A file, and the key or flag that names it."""

    setting: str
    name: str


class LoadedValue(DocumentReader):
    """A value loaded from files, with its problems and the fingerprints of the files."""

    def __init__(self, former: DocumentReader, at_start: bool, *arguments: Any) -> None:
        """Load the value, or keep that of `former` after problems. Use the places of `former`."""
        super().__init__(former.filename, [])
        self.places = former.places
        self.value: Any = getattr(former, "value", None)
        self.at_start = at_start
        self.files: dict[str, list[int]] = {}
        self.warnings: list[str] = []
        self.checked_at = monotonic()  # when the files were last checked; inf during a check
        self._tried_at = self.checked_at
        self.arguments = arguments
        try:
            value = cast(Any, self).load(*arguments)  # each subclass has its own
        except Exception:  # a bug of expexp must not end a working service
            LOGGER.exception("unexpected error in loading")
            self.problem("", "unexpected error: see the log")
        self.problems.sort()
        if not self.problems:
            self.value = value
            for warning in self.warnings:
                LOGGER.warning("%s", warning)

    def fingerprints(self) -> dict[str, list[int]]:
        """Return the fingerprints of the files now. IO."""
        return {name: fingerprint(name) for name in self.files}

    def is_due(self) -> bool:
        """Return whether files have changed, or a failed load is to be retried. IO."""
        may_retry = monotonic() - self._tried_at >= Limits.retry_seconds  # descriptors can run out
        return bool(self.problems and may_retry) or self.fingerprints() != self.files

    def using(self, named: NamedFile) -> AbstractContextManager[None]:
        """Note an error of the block as a problem with a file."""
        return self.noting(named.setting, f"cannot use {excerpt(named.name, 200)}")

    def record(self, filename: str) -> int:
        """Note a file's fingerprint. Return its mode. Accept a pipe once, only at start. IO."""
        was_read = filename in self.files
        self.files[filename] = fingerprint(filename)
        mode = self.files[filename][0]
        if stat.S_ISFIFO(mode) and (was_read or not self.at_start):
            raise ValueError("a pipe, which can be read only once")
        return mode

    def content(self, filename: str, most_bytes: int = Limits.config_bytes) -> bytes:
        """Return the content of a file. Raise OSError, or ValueError if it is too large. IO."""
        self.record(filename)
        with open(filename, "rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"larger than {most_bytes} bytes")
        return content

    def document(self, filename: str) -> Node:
        """Return the tree of a file: `.json` or else YAML. Raise only what `noting` catches. IO."""
        text = self.content(filename).decode("utf-8-sig", "surrogateescape")
        wrong = UNREADABLE.search(text)
        if wrong:
            raise NodeError("not UTF-8, or a control character", place_after(text[: wrong.start()]))
        return parse_json(text) if filename.endswith(".json") else parse_yaml(text)

    def secret(self, named: NamedFile) -> Secret:
        """Return the content of a file, if one is named, without blanks around it. IO."""
        if named.name:
            with self.using(named):
                content = self.content(named.name, Limits.secret_bytes)
                self.warn_if_public(named.name)
                text = content.decode("utf-8-sig", "surrogateescape").strip()
                if text and re.fullmatch(NO_NUL, text):
                    return Secret(text)
                raise ValueError("expected text in UTF-8, not empty and without a NUL")
        return Secret("")

    def warn_if_public(self, filename: str) -> None:
        """Add a warning, one for each file, if everybody can read a file with secrets."""
        warning = f"{excerpt(filename, 200)} holds secrets and can be read by everybody"
        if self.files[filename][0] & stat.S_IROTH and warning not in self.warnings:
            self.warnings.append(warning)

    def pem(self, pattern: Pattern, what: str, filename: str) -> list[str]:
        """Return the matches in a PEM file. Raise OSError, or ValueError if nothing matches. IO."""
        content = self.content(filename)
        blocks = [block.decode() for block in pattern.findall(content)]
        for mistake, found in PEM_MISTAKES.items():  # the last one matches anything
            if not blocks and re.search(mistake, content, re.DOTALL):
                raise ValueError(f"expected {what} in PEM, found {found}")
        return blocks

    def certificates(self, context: SSLContext, filename: str) -> list[str]:
        """Return the certificates in a PEM file. Raise OSError or ValueError. IO."""
        found = self.pem(CERTIFICATE, "a certificate", filename)
        is_short = SHORT_RSA.search(ssl.PEM_cert_to_DER_cert(found[0]))  # the others do no harm
        if is_short and context.minimum_version >= ssl.TLSVersion.TLSv1_2:
            raise ValueError("expected an RSA key of 2048+ bits, found fewer: make a new one")
        return found

    def trust(self, context: SSLContext, named: NamedFile) -> str:
        """Let a context trust the certificates in a file. Return them. Note problems. IO."""
        if named.name:
            with self.using(named):
                authorities = "\n".join(self.certificates(context, named.name))
                context.load_verify_locations(cadata=authorities)
                return authorities
        return ""

    def present(self, context: SSLContext, chain: NamedFile, chain_key: NamedFile) -> float:
        """Let a context present a chain. Return its earliest expiry, Unix time. IO."""
        expires = 0.0
        with self.using(chain):
            expires = min(map(certificate_end, self.certificates(context, chain.name)))
            self.record(chain.name)  # OpenSSL reads it again, which a pipe does not allow
            with self.using(chain_key):
                mode = self.record(chain_key.name)
                self.warn_if_public(chain_key.name)
                if not stat.S_ISFIFO(mode):  # OpenSSL reads a pipe itself
                    self.pem(PRIVATE_KEY, "a private key", chain_key.name)
                # Without a password, OpenSSL would ask for one at the terminal.
                context.load_cert_chain(chain.name, chain_key.name, password="")
        if 0 < expires < time.time():
            self.warnings.append(f"a certificate in {excerpt(chain.name, 200)} has expired")
        return expires


# --- clients and their credentials
def load_bcrypt() -> Any:
    """Return the function crypt_rn of libxcrypt. Raise NodeError if it is missing. IO."""
    for name in ("libcrypt.so.2", "libcrypt.so.1"):  # libcrypt.so is for compilers only
        with suppress(OSError, AttributeError):
            function = ctypes.CDLL(name).crypt_rn
            function.restype = ctypes.c_char_p
            if hash_password(function, b"", "$2b$04$" + "." * 53):
                return function
    raise NodeError("needs libxcrypt: libcrypt1 (Debian, Ubuntu) or libxcrypt (RHEL, Fedora)")


def hash_password(crypt_rn: Any, password: bytes, stored: str) -> Any:
    """Return the bcrypt hash of a password, with the cost and salt of a stored hash."""
    buffer = ctypes.create_string_buffer(32768)  # one a call: crypt() shares one between threads
    return crypt_rn(password, stored.encode(), buffer, len(buffer))


class PasswordChecks:
    """Proofs of right passwords, and a queue for hashing: known users first. Reloads keep both."""

    def __init__(self) -> None:
        self.key = os.urandom(32)
        self.proofs: dict[str, bytes] = {}  # keyed hashes by user: no password is kept
        self._changed = threading.Condition()
        self._queue: list[tuple[bool, float, int]] = []  # the first one hashes

    @contextmanager
    def turn(self, is_known: bool) -> Iterator[None]:
        """Wait for the turn to hash. Raise RequestError if too many wait, or this one too long."""
        own = (not is_known, monotonic(), threading.get_ident())
        try:
            with self._changed:
                bisect.insort(self._queue, own, 1)
                del self._queue[Limits.bcrypt_waiting + 1 :]
                self._changed.wait_for(lambda: own not in self._queue[1:], Limits.bcrypt_seconds)
                if own not in self._queue[:1]:
                    raise RequestError(503, "too many passwords are being checked, try again later")
            yield
        finally:
            with self._changed:
                if own in self._queue:
                    self._queue.remove(own)
                    self._changed.notify_all()


class Users(NamedTuple):
    """The users of a web configuration, at least one."""

    hashes: Mapping[str, Secret]
    crypt_rn: Any
    checks: PasswordChecks

    def prove(self, given: str) -> bool:
        """Return whether base64 `user:password` is right. Cache successes. Raise RequestError."""
        try:
            pair = base64.b64decode(given, validate=True)
        except ValueError:
            return False
        raw_name, colon, password = pair.partition(b":")
        name = raw_name.decode("utf-8", "replace")
        stored = self.hashes.get(name, Secret("")).revealed
        # A changed hash voids the proof. Without the key, the time of `==` tells nothing.
        proofs = self.checks.proofs
        proof = hmac.digest(self.checks.key, stored.encode() + pair, "sha256")
        if proofs.get(name) == proof:
            return True
        with self.checks.turn(stored != ""):
            if proofs.get(name) == proof:  # another request has hashed it meanwhile
                return True
            # Unknown names cost as much as the costliest user. Equal costs hide which names exist.
            hashes = [secret.revealed for secret in self.hashes.values()]
            like = stored or max(hashes, key=lambda text: text[4:6])
            hashed = hash_password(self.crypt_rn, password, like) or b""
            is_right = hmac.compare_digest(hashed, stored.encode())
            if is_right and stored and colon and b"\0" not in password:  # bcrypt stops at NUL
                proofs[name] = proof
                return True
        return False


class CertificateError(OSError):
    """A client's certificate is well-formed, but does not let the client in."""


@lru_cache(maxsize=1024)
def match_names(pattern: str, names: tuple[str, ...], seconds: float) -> bool:
    """Return whether a name matches. Raise CertificateError if that is unknown. IO."""
    # In this process, `([a-z0-9]+[.-]?)+` took 14 s for 29 bytes, and all other threads waited.
    command = [sys.executable, "-ISc", SEARCH_NAMES, pattern, *names]
    if not MATCHING.acquire(timeout=seconds):
        raise CertificateError("too many names are being matched")
    try:  # no shell; after -c nothing is taken for an option
        status = subprocess.call(command, timeout=seconds, stdin=NULL, stdout=NULL, stderr=NULL)  # noqa: S603 - see above
    except subprocess.TimeoutExpired:
        raise CertificateError("matching -web.tls.certmatch takes too long") from None
    except OSError as error:  # it did not start
        raise CertificateError(f"matching -web.tls.certmatch failed: {words_of(error)}") from None
    finally:
        MATCHING.release()
    if status not in (0, 3):  # killed or not started: no result to cache
        raise CertificateError("matching -web.tls.certmatch failed")
    return status == 0


def canonical_name(text: str) -> str:
    """Return an IP address in its one short form, any other name unchanged."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(text))
    return text


class PreparedTls(NamedTuple):
    """How to serve TLS, and to which clients, with all files loaded."""

    settings: TlsServer
    context: SSLContext
    expires: float  #: earliest expiry in our chain, Unix time
    authorities: str  #: of clients' certificates, in PEM; "" if none are asked for

    def check(self, certificate: Mapping[str, Any], certmatch: str, seconds: float) -> None:
        """Raise CertificateError if no name in a client's verified certificate lets it in."""
        subject = itertools.chain.from_iterable(certificate.get("subject", ()))
        common = [text for kind, text in subject if kind == "commonName"]
        pairs = certificate.get("subjectAltName", ())
        kinds = ("DNS", "IP Address", "email", "URI")
        names = [canonical_name(text) for kind, text in pairs if kind in kinds]
        allowed = {*map(canonical_name, self.settings.client_allowed_sans)}
        # A `$` in a pattern also matches before a line break, so names with one are dropped.
        shown = tuple(filter(str.isprintable, common + names))
        is_allowed = not (certificate and allowed and allowed.isdisjoint(names))
        if is_allowed and certmatch:
            is_allowed = match_names(certmatch, shown, seconds)
        if not is_allowed:
            found = excerpt(", ".join(shown), 200) or "it has none"
            raise CertificateError(f"no name in the certificate is allowed: {found}")


class Credentials(NamedTuple):
    """What clients need to get in, and the TLS to serve them. Replaced as a whole."""

    token: Secret
    users: Users | None
    tls: PreparedTls | None

    def is_token(self, given: str) -> bool:
        """Return whether a client has sent the token, compared in constant time."""
        return hmac.compare_digest(given.encode("latin-1"), self.token.revealed.encode())

    @property
    def protections(self) -> set[str]:
        """Return the protections in force, which a reload cannot drop."""
        protections = {"authentication"} if self.token or self.users else set()
        if self.tls:
            protections.add("TLS")
            if self.tls.settings.client_auth_type == AUTH_TYPES[-1]:
                protections.add("client certificates")
            if self.tls.settings.client_allowed_sans:
                protections.add("client_allowed_sans")
        return protections


class LoadedCredentials(LoadedValue):
    """Our credentials, loaded from flags and files."""

    def load(self, options: Options, checks: PasswordChecks) -> Credentials:
        """Return the credentials. Note what is unusable as problems. IO."""
        self.warnings += options[WARNINGS]
        web = self._web_config(options)
        token = options["web.bearer.token"]
        file = NamedFile("-web.bearer.token-file", options["web.bearer.token-file"])
        if token and file.name:
            self.problem("", "-web.bearer.token and -web.bearer.token-file are mutually exclusive")
        users = None
        if web.basic_auth_users:
            with self.noting("basic_auth_users"):
                users = Users(web.basic_auth_users, load_bcrypt(), checks)
        settings = web.tls_server_config
        if options["web.tls.listen-address"]:
            settings = TlsServer("", "", AUTH_TYPES[-1 if options["web.tls.verify"] else 0])
        else:
            if options["web.tls.verify"] and not settings:  # it promises a check that is not made
                self.problem("", "-web.tls.verify needs -web.tls.listen-address")
            idle = [flag for flag in TLS_FLAGS if options[flag] != FLAGS[flag].default]
            words = "flag -%s has no effect without -web.tls.listen-address"
            self.warnings += [words % flag for flag in idle]
        tls = self._tls(options, settings) if settings else None
        credentials = Credentials(token or self.secret(file), users, tls)
        if options["web.tls.certmatch"] and "client certificates" not in credentials.protections:
            self.problem("", f"-web.tls.certmatch needs -web.tls.verify or {AUTH_TYPES[-1]}")
        if self.value and not self.problems:
            # A file that is half written, or deleted by mistake, must not let everybody in.
            for what in self.value.protections - credentials.protections:
                self.problem("", f"{what} cannot be given up without a restart")
            if tls and not self.value.tls:  # its listener is plain
                self.problem("", "TLS cannot be turned on without a restart")
        return credentials

    def _web_config(self, options: Options) -> WebConfig:
        """Return the content of -web.config.file. Note problems. IO."""
        web = WebConfig()
        if self.filename:
            with self.noting(""):
                web = self.read(WebConfig, self.document(self.filename), "")
                if web.basic_auth_users:
                    self.warn_if_public(self.filename)
                elif not (web.tls_server_config or self.problems):
                    raise NodeError("neither tls_server_config nor basic_auth_users is set")
        if self.problems:
            return WebConfig()
        advice = "remove the flag, and set client_auth_type to ask for certificates"
        for flag in ("web.tls.listen-address", "web.tls.verify"):
            if web.tls_server_config and options[flag]:  # if ignored, anybody would get in
                self.problem("tls_server_config", f"does not go with -{flag}: {advice}")
        return web

    def _tls(self, options: Options, settings: TlsServer) -> PreparedTls:
        """Return how to serve TLS with these settings. Note problems. IO."""
        folder = os.path.dirname(self.filename)
        files = [NamedFile(f"-{flag}", options[flag]) for flag in TLS_FLAGS]
        if not options["web.tls.listen-address"]:
            files = [
                NamedFile("tls_server_config." + one, os.path.join(folder, getattr(settings, one)))
                for one in ("cert_file", "key_file", "client_ca_file")
            ]
        chain, chain_key, ca = files
        if settings.min_version > settings.max_version:
            self.problem("tls_server_config.min_version", "is above max_version")
        context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options &= ~IGNORE_UNEXPECTED_EOF
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2")  # not for TLS 1.3
        context.minimum_version = TLS_VERSIONS[settings.min_version]
        context.maximum_version = TLS_VERSIONS[settings.max_version]
        # No session tickets: a client that resumes by one does not show its certificate.
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION  # needed by OpenSSL 1.1.1
        context.num_tickets = 0
        context.verify_flags |= 0x80000  # PARTIAL_CHAIN: trust what the operator names, as Go does
        # AUTH_TYPES has the order of these modes: none, optional, required.
        context.verify_mode = ssl.VerifyMode(AUTH_TYPES.index(settings.client_auth_type))
        authorities = self.trust(context, ca) if context.verify_mode else ""
        return PreparedTls(settings, context, self.present(context, chain, chain_key), authorities)


# --- modules and their targets
@cache
def client_context(version: str, trusts_system: bool, is_verified: bool) -> SSLContext:
    """Return a TLS context for targets. To load the system's CAs takes 35 ms and 1 MB. IO."""
    context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options &= ~IGNORE_UNEXPECTED_EOF
    level = 0 if version < "TLS12" else 2  # before 1.2, TLS signs with SHA-1: level 0 allows it
    # The ciphers of Go's client since 1.22, up to TLS 1.2: no RSA key exchange. Python's differ.
    context.set_ciphers(f"ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES+SHA1:@SECLEVEL={level}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of these versions
        context.minimum_version = TLS_VERSIONS[version]
    if trusts_system:
        context.load_default_certs()
    if not is_verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@dataclass(frozen=True, repr=False)
class TargetCredentials:
    """How expexp and an http target authenticate each other."""

    context: SSLContext | None
    authorization: str


class LoadedTarget(LoadedValue):
    """The credentials for a module's target, loaded from files."""

    def load(self, target: HttpTarget, prefix: str) -> TargetCredentials:
        """Return the credentials. Note unusable files as problems. IO."""
        authorization = ""
        if target.bearer_token_file:
            file = NamedFile(prefix + "bearer_token_file", target.bearer_token_file)
            authorization = f"Bearer {self.secret(file).revealed}"
            if not re.fullmatch(LINE, authorization):  # http.client would show it in its error
                self.problem(file.setting, "token file should hold one line of Latin-1 text")
        elif target.basic_auth_username:
            file = NamedFile(prefix + "basic_auth_password_file", target.basic_auth_password_file)
            password = target.basic_auth_password or self.secret(file)
            pair = f"{target.basic_auth_username}:{password.revealed}"
            authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return TargetCredentials(self._context(target, prefix), authorization)

    def _context(self, target: HttpTarget, prefix: str) -> SSLContext | None:
        """Return the TLS settings towards a target, if any. Note problems. IO."""
        keys = ("tls_ca_cert_file", "tls_root_ca_file", "tls_cert_file", "tls_key_file")
        ca, more_ca, chain, chain_key = (NamedFile(prefix + k, getattr(target, k)) for k in keys)
        has_files = ca.name or more_ca.name or chain.name
        if target.scheme == "http" and not has_files:
            return None
        version = target.tls_min_version
        if version < "TLS12":
            self.warnings.append(f"{target.shown}: others can read and alter what {version} sends")
        is_verified = not target.tls_insecure_skip_verify
        build = client_context.__wrapped__ if has_files else client_context  # no files: shared
        context = None
        with self.noting(prefix + "tls_min_version", f"OpenSSL here has no {version}"):
            context = build(version, is_verified and not ca.name, is_verified)
            self.trust(context, ca)
            self.trust(context, more_ca)
            if chain.name:
                self.present(context, chain, chain_key)
        return context


class LoadedConfig(LoadedValue):
    """The modules, loaded from a file and from folders."""

    def load(self, former: DocumentReader, options: Options, checks: PasswordChecks) -> Config:
        """Return the configuration, without the modules that have problems. IO."""
        self.credentials = LoadedCredentials(former, self.at_start, options, checks)
        client_context.cache_clear()  # the system's authorities may have changed, too
        self.modules: dict[str, Module] = {}
        self.origins: dict[str, str] = {}
        self.targets: dict[str, LoadedValue] = {}
        source = DocumentReader(options["config.file"], self.problems)
        default = ""
        if source.filename:
            with source.noting(""):
                top = source.entries(self.document(source.filename), "", TOP_KEYS)
                given = top.get("defaultModule", NOTHING)
                default = source.read(read_text, given, "defaultModule") or ""
                for name, node in source.entries(top.get("modules", NOTHING), "modules.").items():
                    self._add(source, name, node)
        for folder in options["config.dirs"]:
            with DocumentReader(folder, self.problems).noting("", "failed reading directory"):
                self._load_folder(folder, options["config.skip-dirs"])
        if default and default not in self.origins:
            message = suggest(f'no module "{excerpt(default)}"', default, self.modules)
            source.problem("defaultModule", message)
        for included in (self.credentials, *self.targets.values()):
            self.problems += included.problems
            if included.problems:  # then these files also make the configuration due
                self.files.update(included.files)
        if self.value and self.value.modules and not (self.modules or self.problems):
            self.problem("", "no modules are left: that needs a restart")  # a half-written file
        return Config(dict(sorted(self.modules.items())), default)

    def _load_folder(self, folder: str, skip_missing: bool) -> None:
        """Add a module for each document in a folder, in sorted order. Raise OSError."""
        if not self.record(folder) and skip_missing:
            self.warnings.append(f"skipping non existent config.dirs entry '{folder}'")
            return
        for name in sorted(os.listdir(folder)):
            filename = os.path.join(folder, name)
            found = re.fullmatch(r"(?!\.#)(.+)\.(?:yml|yaml|json)", name)  # `.#`: Emacs's locks
            if not found or os.path.isdir(filename):
                self.warnings.append(f"skipping non-yaml file {filename}")
                continue
            source = DocumentReader(filename, self.problems)
            with source.noting(""):
                module = read_module_name(Node("string", found[1]))  # its bytes may not be UTF-8
                if os.path.exists(filename) and not os.path.isfile(filename):
                    raise NodeError("not a regular file")  # reading a pipe would block
                self._add(source, module, self.document(filename))

    def _add(self, source: DocumentReader, name: str, node: Node) -> None:
        """Add a module if it has no problems. A missing command or file is a warning. IO."""
        sleep(1e-6)  # or a reload of 300 modules would keep scrapes from the interpreter's lock
        path = f"modules.{name}"
        module = source.module(name, node)
        here = str(Problem(excerpt(source.filename, 200), *node.place, "", ""))
        first = self.origins.setdefault(name, here)
        if first != here:
            source.problem(path, f"module {excerpt(name)} is already defined in {first}")
        if first != here or not module:
            return
        self.modules[name] = module
        target = module.target
        missing = advice = ""
        if isinstance(target, HttpTarget):
            if target.basic_auth_password or "Authorization" in target.headers:
                self.warn_if_public(source.filename)
            self.targets[name] = LoadedTarget(source, self.at_start, target, f"{path}.http.")
        elif isinstance(target, ExecTarget):
            search = target.env.get("PATH", Secret("")).revealed
            if not shutil.which(target.command, path=search or None):
                missing = "executable"
                advice = shell_advice(target.command)
        elif not os.path.exists(target.path):
            missing = "file"
        if missing:
            self.warnings.append(f"module {name}: no {missing} {excerpt(target.shown)}{advice}")


class Snapshot(NamedTuple):
    """All that was loaded from files. A scrape keeps its module even if a reload replaces it."""

    config: LoadedValue  # the value is a Config
    credentials: LoadedValue  # of clients: the value is a Credentials
    targets: dict[str, LoadedValue]  # by module: the values are TargetCredentials
    loaded: float  # when the configuration was loaded, Unix time

    @property
    def trust(self) -> Any:
        """Return the settings whose change invalidates existing TLS connections."""
        tls = self.credentials.value.tls
        return tls and (tls.authorities, tls.context.verify_mode, tls.settings.client_allowed_sans)


class Loader:
    """Holds the snapshot. Reloads and changed credentials update it. Raise ConfigError."""

    def __init__(self, options: Options, limits: Limits) -> None:
        self._arguments = options, PasswordChecks()
        self._limits = limits
        self._reloading = Lock()
        self._reloads = 0  # begun so far
        self._swapping = Lock()  # of `snapshot`, never held while files are read
        web = DocumentReader(options["web.config.file"], [])
        config = LoadedConfig(DocumentReader("", []), True, web, *self._arguments)
        if config.problems:
            raise ConfigError(*config.problems)
        self.snapshot = Snapshot(config, config.credentials, config.targets, time.time())

    def current(self) -> Snapshot:
        """Return the snapshot. Load clients' credentials again first if their files changed. IO."""
        self.refresh("", self.snapshot.credentials)
        return self.snapshot

    def refresh(self, name: str, former: LoadedValue) -> LoadedValue:
        """Return credentials of a module ("": of clients), loaded again if files changed. IO."""
        with self._swapping:
            if monotonic() - former.checked_at < self._limits.rotation_seconds:
                return former
            former.checked_at = inf  # while this thread looks, others use `former`
        fresh = former
        try:
            if former.is_due():
                fresh = type(former)(former, False, *former.arguments)
                log_problems(found for found in fresh.problems if found not in former.problems)
                if not fresh.problems:
                    LOGGER.info("credentials reloaded: %s", excerpt(", ".join(fresh.files), 400))
        finally:
            former.checked_at = monotonic()
        with self._swapping:
            if self.snapshot.credentials is former:  # no reload has replaced it
                self.snapshot = self.snapshot._replace(credentials=fresh)
            elif self.snapshot.targets.get(name) is former:
                self.snapshot.targets[name] = fresh
        return fresh

    def reload(self) -> Sequence[Problem]:
        """Read all files. Waiting callers share a run. Return problems. Raise RequestError."""
        reloads = self._reloads
        if not self._reloading.acquire(timeout=self._limits.reload_seconds):
            LOGGER.error("a reload has not ended in time: a file system may hang")
            raise RequestError(503, "a reload has not ended in time: a file system may hang")
        try:
            if self._reloads != reloads:  # another thread has read all files since
                return self.snapshot.config.problems
            self._reloads += 1
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            former = self.snapshot.config
            config = LoadedConfig(former, False, self.snapshot.credentials, *self._arguments)
            notify("READY=1")
            log_problems(config.problems)
            with self._swapping:
                new = self.snapshot._replace(config=config, credentials=config.credentials)
                if not config.problems:
                    new = new._replace(targets=config.targets, loaded=time.time())
                self.snapshot = new
            if not config.problems:
                old = former.value.modules
                modules = config.value.modules
                added = len(modules.keys() - old.keys())
                removed = len(old.keys() - modules.keys())
                changed = sum(modules[name] != old.get(name, modules[name]) for name in modules)
                words = "configuration reloaded: %d modules, %d added, %d changed, %d removed"
                LOGGER.log(NOTICE, words, len(modules), added, changed, removed)
            return config.problems
        finally:
            self._reloading.release()


# ==================================================================================================
# 12  HTTP/1.1 in both directions
# ==================================================================================================
# A `Wire` is a non-blocking connection to a client or a target. Its waits have a deadline. The
# parser of headers is strict with clients. From targets it accepts what Prometheus accepts. IO.

Headers = Sequence[Header]
Pieces = Iterator[bytes]

BODILESS = (204, 304)  # statuses
LINE_END = re.compile(rb"\n")
#: The newline of an empty line. `search` is slow for a pattern that begins with `^`.
EMPTY_LINE = re.compile(rb"\n(?:(?<=\n\r\n)|(?<=\n\n)|(?<=\A\r\n)|(?<=\A\n))")
#: An SSLError's text has this if the peer closed. Its class depends on Python and OpenSSL.
TLS_EOF = re.compile(r"EOF[ _)]")
FOLD = re.compile(r"\n[ \t]+")  # RFC 9112, 5.2: the value continues on the next line
# Both are linear, as no two parts match the same text: 30 ms for 256 KiB that fail at the end.
STRICT_HEADER = re.compile(rf"(?m)^({HEADER_NAME}):({LINE})\n")
#: Also with blanks in the name, as in `Content-Length : 4`.
TOLERANT_HEADER = re.compile(rf"(?m)^((?! )[ {NAME_CHARACTERS}]+):({LINE})\n")
STATUS_LINE = re.compile(rb"HTTP/([0-9]\.[0-9]) +([1-9][0-9]{2})(?: [^\r\n]*)?\r?\n?")
CHUNK_SIZE = re.compile(rb"\A([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r?\n")
CHUNK_END = re.compile(rb"\A\r\n")  # after a chunk's data
CHUNK_LINE_BYTES = 4096  # also for all trailers together, as in Go
NO_END = "the target closed before the end of its body"


def parse_headers(block: bytes, grammar: re.Pattern[str]) -> Headers:
    """Return the headers of a block that ends in an empty line. Raise RequestError."""
    text = block.decode("latin-1").replace("\r\n", "\n")
    unfolded = FOLD.sub(" ", text)
    parts = grammar.split(unfolded)  # a text between headers, a name, a value, and so on
    rest = "".join(parts[::3])
    if rest != "\n":
        name = re.split("[:\r\n]", rest)[0]  # the value may be secret
        raise RequestError(400, f'malformed header "{excerpt(name)}"')
    pairs = zip(parts[1::3], parts[2::3])
    # Go keeps a name with a blank under a key that no code looks up.
    return [(name.title(), value.strip(" \t")) for name, value in pairs if " " not in name]


def values_of(headers: Headers, name: str) -> list[str]:
    """Return the values of the headers with a name. Pass the name in Title-Case."""
    return [value for given, value in headers if given == name]


def connection_options(headers: Headers) -> list[str]:
    """Return the options in the header Connection, in Title-Case: RFC 9110, 7.6.1."""
    listed = ",".join(values_of(headers, "Connection")).title()
    return [option.strip(" \t") for option in listed.split(",")]


def render_head(first_line: str, headers: Iterable[Header]) -> bytes:
    """Return the head of a request or answer. `parse_headers` allows no line break in a value."""
    lines = [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([first_line, *lines, "\r\n"]).encode("latin-1", "replace")


def wait(deadline: Deadline, events: Mapping[Any, int], longest: float = inf) -> Set[int]:
    """Return the ready descriptors, none once `longest` or the deadline ends. Raise ScrapeError."""
    poll = select.poll()
    for source, event in events.items():
        poll.register(source, event)
    if deadline.client_fd >= 0:
        # As in Go's server, a half-close counts as a hang-up. POLLIN would see pipelined requests.
        poll.register(deadline.client_fd, select.POLLRDHUP)
    ready = dict(poll.poll(1000 * min(deadline.remaining(), longest))).keys()
    if deadline.client_fd in ready:
        # Measured for 520 hang-ups: the p99 of other scrapes is 65-196 ms, without this 252-274 ms.
        most = min(Limits.hang_up_spread_seconds, deadline.remaining())  # this may hold a FIFO lock
        sleep(random.random() * most)  # noqa: S311 - no secret
        raise ScrapeError("aborted", "the client closed its side before the answer")
    return ready


class Wire:
    """A non-blocking connection, plain or over TLS. No wait outlasts the current deadline."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self.connection = connection
        self.deadline = deadline
        self._received = bytearray()  # and not yet returned

    def attempt(self, operation: Callable[..., Any], event: int, *arguments: Any) -> Any:
        """Return an operation's result. If it would block, wait. Raise OSError or ScrapeError."""
        # Measured for one request: `poll` needs 15 system calls, `settimeout` per read 23.
        while True:  # A retry sends the same slice: with another, OpenSSL fails (BAD_LENGTH).
            try:
                return operation(*arguments)
            except ssl.SSLWantReadError:  # TLS may have to read before it can write
                awaited = POLLIN
            except ssl.SSLWantWriteError:
                awaited = POLLOUT
            except BlockingIOError:
                awaited = event
            if not wait(self.deadline, {self.connection: awaited}):
                raise TimeoutError("timed out")

    def start_tls(self, context: SSLContext, **settings: Any) -> ssl.SSLSocket:
        """Shake hands and return the TLS socket. Raise OSError, ValueError or ScrapeError."""
        tls = context.wrap_socket(self.connection, do_handshake_on_connect=False, **settings)
        self.connection = tls
        try:
            self.attempt(tls.do_handshake, POLLIN)
        except ssl.SSLError as error:
            if TLS_EOF.search(str(error)):
                raise ConnectionResetError("closed during the TLS handshake") from None
            raise
        return tls

    def receive(self, most: int) -> bytes:
        """Return up to `most` bytes, b"" if the peer has closed. Raise OSError or ScrapeError."""
        if self._received:
            return self._take(most)
        return self._receive(most)

    def await_data(self) -> bool:
        """Return True as soon as there is a byte to read, False when the peer has closed."""
        return bool(self._received) or self._fill()

    def read_through(self, end: Pattern, most: int) -> bytes:
        """Return bytes through a match of `end`: at most `most` + 1, fewer if the peer closes."""
        searched = 0
        while True:
            found = end.search(self._received, searched)
            if found:
                return self._take(min(found.end(), most + 1))
            count = len(self._received)
            if count > most or not self._fill():
                return self._take(most + 1)
            searched = count  # a match has one byte

    def _fill(self) -> bool:
        """Receive one more piece. Return False if the peer has closed."""
        piece = self._receive(PIECE_BYTES)
        self._received += piece
        return bool(piece)

    def _receive(self, most: int) -> bytes:
        """Return up to `most` bytes from the connection, b"" if the peer has closed."""
        self.deadline.remaining()  # if the peer never pauses, no wait checks it
        return cast(bytes, self.attempt(self.connection.recv, POLLIN, most))

    def _take(self, most: int) -> bytes:
        """Return up to `most` received bytes."""
        taken = bytes(self._received[:most])
        del self._received[:most]
        return taken

    def send(self, content: bytes | memoryview) -> None:
        """Send all bytes. Raise OSError or ScrapeError."""
        rest = memoryview(content)
        while rest:
            piece = rest[: 4 * PIECE_BYTES]
            rest = rest[self.attempt(self.connection.send, POLLOUT, piece) :]

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def read_header_block(wire: Wire, most: int, grammar: re.Pattern[str]) -> Headers:
    """Return headers up to an empty line. Raise RequestError, OSError, EOFError or ScrapeError."""
    block = wire.read_through(EMPTY_LINE, most)
    if len(block) > most:
        raise RequestError(431, "the headers are too large")
    if not EMPTY_LINE.search(block):
        raise EOFError("closed in the middle of a request")
    return parse_headers(block, grammar)


class TargetExchange:
    """A GET request on a wire, and its answer. urllib uses it as connection and as response."""

    # urllib splits the URL, adds `Connection: close` and capitalizes the names of headers.
    sock = None  # urllib would close it before the body is read
    reason = ""
    pieces: Pieces = iter(())  # of the body; raises ScrapeError if it is cut short

    def __init__(self, _host: str, *, wire: Wire, most: int, **_timeout: float) -> None:
        self._wire = wire
        self._most = most  # bytes of the answer's head
        self._request = b""
        self.close = wire.close
        self.length = inf  # bytes of the body; inf: not announced
        self.count = 0  # bytes of the body that were read

    def set_debuglevel(self, _level: int) -> None:
        """Ignore the debug level of urllib."""

    def request(
        self, method: str, selector: str, _body: None, headers: Mapping[str, str], **_coding: bool
    ) -> None:
        """Keep the request until `getresponse`: here urllib would wrap an OSError in a URLError."""
        line = f"{method} {selector or '/'} HTTP/1.1"
        self._request = render_head(line, headers.items())

    def getresponse(self) -> TargetExchange:
        """Send the request, and read the answer's head. Raise OSError or ScrapeError."""
        self._wire.send(self._request)
        for _ in range(6):  # Go's client reads five interim answers before it gives up
            version = self._read_head()
            if self.status >= OK:
                self._find_end(version)
                return self
            if self.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                break
        raise ScrapeError("protocol", f"not HTTP: an answer with status {self.status}")

    def _read_head(self) -> bytes:
        """Read a status line and headers. Return the version of HTTP, such as b"1.1"."""
        line = self._wire.read_through(LINE_END, self._most)
        if not line:
            raise ConnectionResetError("closed without an answer")
        found = STATUS_LINE.fullmatch(line)
        if not found:
            shown = excerpt(line.strip(), 200) or "an empty line"
            raise ScrapeError("protocol", f"not HTTP: {shown}")
        try:
            self.headers = read_header_block(self._wire, self._most - len(line), TOLERANT_HEADER)
        except RequestError as error:
            raise ScrapeError("protocol", f"not HTTP: {error.message}") from None
        except EOFError:
            raise ScrapeError("truncated", "the target closed within its headers") from None
        self.status = int(found[2])
        return found[1]

    def _find_end(self, version: bytes) -> None:
        """Find how the body ends: RFC 9112, 6.3. Raise ScrapeError if a header is invalid."""
        lengths = set(values_of(self.headers, "Content-Length"))
        length = ", ".join(sorted(lengths))
        if lengths and not re.fullmatch("[0-9]{1,19}", length):  # enough for 64 bits
            raise ScrapeError("protocol", f'not HTTP: invalid Content-Length "{excerpt(length)}"')
        codings = []
        if version >= b"1.1":  # HTTP/1.0 has no transfer codings; Go ignores them, too
            codings = values_of(self.headers, "Transfer-Encoding")
        coding = ", ".join(codings)
        if codings and coding.lower() != "chunked":
            raise ScrapeError(
                "protocol", f'not HTTP: unknown Transfer-Encoding "{excerpt(coding)}"'
            )
        if self.status in BODILESS:
            return
        if lengths and not codings:
            self.length = int(length)
        self.pieces = self._chunks() if codings else self._read(self.length)

    def _read(self, left: float) -> Pieces:
        """Yield `left` bytes of the body in pieces. inf: all bytes until the target closes."""
        while left:
            piece = self._wire.receive(int(min(left, PIECE_BYTES)))
            if not piece:
                break
            self.count += len(piece)
            left -= len(piece)
            yield piece
        if 0 < left < inf:
            raise ScrapeError(
                "truncated", f"the target closed after {self.count} bytes of its body"
            )

    def _chunks(self) -> Pieces:
        """Yield the data of the chunks (RFC 9112, 7.1). Discard the trailers."""
        while size := int(self._read_match(LINE_END, CHUNK_SIZE)[1], 16):
            yield from self._read(size)
            self._read_match(LINE_END, CHUNK_END)
        self._read_match(EMPTY_LINE, EMPTY_LINE)

    def _read_match(self, end: Pattern, part: Pattern) -> re.Match[bytes]:
        """Read through `end`. Return the match of `part` in what was read. Raise ScrapeError."""
        read = self._wire.read_through(end, CHUNK_LINE_BYTES)
        found = part.search(read)
        if found:
            return found
        is_cut = not end.search(read) and len(read) <= CHUNK_LINE_BYTES
        raise ScrapeError("truncated", NO_END if is_cut else f'an invalid chunk: "{excerpt(read)}"')


# ==================================================================================================
# 13  Scraping targets
# ==================================================================================================
# A function of SCRAPERS takes a Job and returns a Scrape or raises ScrapeError, by the deadline of
# the job. All requests share one budget for bodies. `Job.cleanup` runs when the job ends. IO.

AnyLock = Union[Lock, Semaphore]
Process = subprocess.Popen[bytes]
REAPING_SECONDS = 0.02  # between two attempts to reap a command
#: The fault for a verify_code of OpenSSL. 0: no certificate failed. All other codes: "chain".
TLS_FAULTS = {0: "protocol", 9: "expiry", 10: "expiry", 62: "name", 63: "name", 64: "name"}
DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # not in the header Host, as in Go
MTIME_FAMILY = b"expexp_file_mtime_timestamp"
MTIME_LINE = re.compile(rb"(?m)^(?:#[ \t]+(?:HELP|TYPE)[ \t]+)?%b(?![\w:])" % MTIME_FAMILY)
MTIME_LINES = """\
# HELP {0} Time of modification of parsed file.
# TYPE {0} gauge
{0}{1} {2!r}
"""


class Scrape(NamedTuple):
    """A target's answer. The body is an iterator only if it is streamed to the client."""

    status: int
    headers: Headers
    body: bytes | Pieces
    modified: float | None = None  # a regular file's modification time, Unix time
    packed: bytes = b""  # the body in gzip
    samples: int | None = None  # of a verified body


def with_header(headers: Headers, name: str, value: str) -> Headers:
    """Return the headers with one named `name`, in place of any others."""
    return [*(pair for pair in headers if pair[0] != name), (name, value)]


class Reservation:
    """The part of the shared resources that a request, or a step of it, has reserved."""

    def __init__(self, tools: Tools, cleanup: ExitStack | None = None) -> None:
        self._tools = tools
        self._counts: dict[str, int] = defaultdict(int)
        if cleanup:
            cleanup.callback(self.release)

    def reserve(self, what: str, most: float, words: str, count: int = 1) -> int:
        """Reserve `count` more. Return the new total. Raise ScrapeError("busy") above `most`."""
        with self._tools.lock:
            used = self._tools.used.get(what, 0) + count
            if used > most:
                raise ScrapeError("busy", words)
            self._tools.used[what] = used
            self._counts[what] += count
        return used

    def reserve_bytes(self, count: int) -> None:
        """Reserve memory for bodies. Raise ScrapeError("busy") if all requests hold too much."""
        self.reserve("bytes", self._tools.limits.held_bytes, "too many bodies in memory", count)

    def release(self) -> None:
        """Release everything."""
        used = self._tools.used
        with self._tools.lock:
            while self._counts:
                what, count = self._counts.popitem()
                used[what] -= count
                if not used[what]:
                    del used[what]  # names of modules come and go


def total_size(scrape: Scrape) -> int:
    """Return the bytes of a body plus those of its gzip form."""
    return len(cast(bytes, scrape.body)) + len(scrape.packed)


@dataclass
class Run:
    """One scrape of a module with `cache`. Equal requests share it."""

    module: Module  # a reload may have changed it since
    completed_at: float = inf  # monotonic; inf while running, or if not cached
    size: float = inf  # bytes of a good answer and its gzip form
    outcome: list[Any] = dataclasses.field(default_factory=list)  # a Scrape, or why there is none
    running: Lock = dataclasses.field(default_factory=Lock)  # held while it runs


class Cache:
    """The last good answers of modules with `cache`. Concurrent requests share one run."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._runs: dict[Any, Run] = {}  # completed ones in order of completion

    def answer(self, job: Job, key: Any) -> Scrape:
        """Return a fresh answer, cached or new. Raise ScrapeError."""
        module = job.module
        while True:
            asked = monotonic()
            with self._lock:
                run: Any = self._runs.get(key)
                is_new = not run or run.module != module or asked - run.completed_at >= module.cache
                if is_new:
                    run = self._runs[key] = self._start(job, key)
            is_own = is_new and module.method != "exec"
            if is_own:
                self._make(job, key, run)
            outcome = wait_for(run, job.deadline)
            if isinstance(outcome, Scrape):
                break
            # If another client's scrape was too late, or that client hung up, start another one.
            if is_new or outcome[0] not in ("timeout", "aborted"):
                raise ScrapeError(*outcome)
        if not is_own:  # the body may be evicted while it is sent
            job.held.reserve_bytes(total_size(outcome))
        if asked < run.completed_at:
            return outcome
        aged = with_header(outcome.headers, "Age", str(int(asked - run.completed_at)))
        return outcome._replace(headers=aged)

    def _start(self, job: Job, key: Any) -> Run:
        """Return a new run. Start it if it is a command. Raise ScrapeError."""
        run = Run(job.module)
        run.running.acquire()
        if job.module.method == "exec":
            # A command outlives its clients. If it is too slow for one, it answers the next.
            longest = scrape_timeout(job.module.timeout, "", 0, job.tools.limits)
            deadline = Deadline(max(longest, job.deadline.remaining()))
            cleanup = ExitStack()
            held = Reservation(job.tools, cleanup)
            own = job._replace(deadline=deadline, cleanup=cleanup, held=held)
            Task(cleanup.close, self._make, own, key, run)
        return run

    def _make(self, job: Job, key: Any, run: Run) -> None:
        """Scrape the target. Note its answer, or the arguments of a ScrapeError, as the outcome."""
        try:
            outcome = scrape_target(job)
            run.outcome.append(outcome)
            if outcome.status == OK:
                run.size = total_size(outcome)
        except ScrapeError as error:  # its traceback would keep bodies
            run.outcome.append((error.reason.name, error.message, error.detail))
        finally:
            self._keep(job.tools.limits, key, run)
            run.running.release()

    def _keep(self, limits: Limits, key: Any, run: Run) -> None:
        """Cache a good answer. Evict the oldest ones beyond the bounds."""
        most = limits.cache_bytes
        with self._lock:
            if self._runs.get(key) is not run:  # the module has changed
                return
            del self._runs[key]
            if run.size <= most:  # a larger one would evict all others in vain
                run.completed_at = monotonic()
                self._runs[key] = run
            done = [each for each in self._runs.items() if each[1].completed_at < inf]
            while len(done) > limits.cache_entries or sum(r.size for _, r in done) > most:
                del self._runs[done.pop(0)[0]]


class Task:
    """Work in a thread that can be left behind. `done` is called at its end."""

    def __init__(self, done: Callable[[], None], work: Callable[..., Any], *arguments: Any) -> None:
        self.outcome: list[Any] = []  # the result or the error of the work
        self.running = Lock()  # measured: an Event takes twice as long
        self.running.acquire()
        try:
            # `Thread.start` takes twice as long, and for ever if memory runs out just then.
            _thread.start_new_thread(self._run, (done, work, *arguments))
        except (MemoryError, RuntimeError):
            done()
            raise ScrapeError("busy", "no thread can be started, try again later") from None

    def _run(self, done: Callable[[], None], work: Callable[..., Any], *arguments: Any) -> None:
        """Do the work in the task's thread."""
        try:
            self.outcome.append(work(*arguments))
        except (ExpexpError, OSError, UnicodeError, MemoryError) as error:
            self.outcome.append(error)
        finally:
            done()
            self.running.release()


def acquire(lock: AnyLock, deadline: Deadline) -> None:
    """Acquire a lock or a semaphore. Raise ScrapeError."""
    # No single call can wait for both a lock and the client's hang-up.
    while not lock.acquire(timeout=min(deadline.remaining(), Limits.hang_up_seconds)):
        wait(deadline, {}, 0)


@contextmanager
def hold(lock: AnyLock, deadline: Deadline) -> Iterator[None]:
    """Hold a lock or a semaphore. Raise ScrapeError."""
    acquire(lock, deadline)
    try:
        yield
    finally:
        lock.release()


def wait_for(task: Task | Run, deadline: Deadline) -> Any:
    """Return the result of a task. Raise the errors of its work, and ScrapeError."""
    with hold(task.running, deadline):  # others may wait for it, too
        if not task.outcome:
            raise RuntimeError("unexpected error in a thread: see the log")
        if isinstance(task.outcome[0], Exception):
            # A kept error forms a cycle with its traceback, whose frames hold whole bodies.
            raise task.outcome.pop()
        return task.outcome[0]


@lru_cache(maxsize=1024)
def numeric_addresses(host: str, port: int) -> Any:
    """Return the entries of getaddrinfo for localhost or a numeric address, [] for a name."""
    # RFC 6761, 6.3: localhost is the loopback, and must not wait behind a dead name server.
    numeric = None if host.lower() == "localhost" else host  # None: the loopback
    flags = socket.AI_NUMERICHOST
    with suppress(socket.gaierror):  # sorted: IPv4 comes first
        return sorted(socket.getaddrinfo(numeric, port, type=socket.SOCK_STREAM, flags=flags))
    return []


class Commands:
    """Runs commands in process groups of their own, and ends these groups."""

    def __init__(self, limits: Limits, soft_limit: int) -> None:
        self._limits = limits
        self._soft_limit = soft_limit  # of descriptors, for commands; 0: not changed
        own = r"(?s)NOTIFY_SOCKET|LISTEN_.*|WATCHDOG_.*"  # for expexp alone, by a service manager
        self._environment = {k: v for k, v in os.environ.items() if not re.fullmatch(own, k)}
        self.unreaped: dict[Process, str] = {}  # the module if its scrape failed; used atomically
        self._ending: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._reap, daemon=True).start()

    def start(self, job: Job) -> Any:
        """Start the job's command and return its process. Raise ScrapeError."""
        target = job.module.target
        prefixes = {b"args": b"", b"params": b"--"}
        env = {} if target.clear_env else dict(self._environment)
        env["EXPEXP_TIMEOUT_SECONDS"] = f"{job.deadline.remaining():.3f}"
        env.update({name: secret.revealed for name, secret in target.env.items()})
        added = [prefixes[name] + value for name, value in job.pairs]  # in the query's order
        arguments = [target.command, *target.args, *added]  # Popen encodes texts
        try:
            job.note("starting the command", details=b"\n".join(map(os.fsencode, arguments)))
            process = subprocess.Popen(  # noqa: S603 - the operator's command, without a shell
                arguments, 0, env=env, stdin=NULL, stdout=PIPE, stderr=PIPE, start_new_session=True
            )
        except (OSError, ValueError) as error:
            words = start_fault(error, target.command, env.get("PATH", ""))
            raise ScrapeError("command", f"cannot start the command: {words}") from None
        self.unreaped[process] = ""
        if self._soft_limit:
            # Not in the child before exec: Python code there can deadlock in a threaded program.
            limits = self._soft_limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            # AttributeError: not on Linux. ValueError: prlimit(1) has lowered the hard limit.
            with suppress(OSError, AttributeError, ValueError):
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        return process

    def end(self, process: Process) -> None:
        """Send TERM to a command's group. The reaper sends KILL later, outside the request."""
        signal_group(process, signal.SIGTERM)
        due = monotonic() + self._limits.term_to_kill_seconds
        self._ending.put((ceil(due / REAPING_SECONDS) * REAPING_SECONDS, process))  # many at once

    def _reap(self) -> None:
        """Send KILL to groups when it is due, then reap their leaders. Run in a daemon thread."""
        due, process = self._ending.get()  # a group's id is not reused before its leader is reaped
        while True:
            try:
                sleep(max(0, due - monotonic()))
                signal_group(process, signal.SIGKILL)
                if process.poll() is None:  # it dies soon, or hangs in the kernel
                    self._ending.put((monotonic() + REAPING_SECONDS, process))
                else:
                    self.unreaped.pop(process, None)
                    self._reap_orphans()
                due, process = self._ending.get()
            except (MemoryError, RuntimeError):  # noqa: PERF203 - the same leader is tried again
                sleep(REAPING_SECONDS)

    def _reap_orphans(self) -> None:
        """Reap orphans of commands. As a container's first process, expexp is their parent."""
        # Orphans become children of the main thread. Children of other threads are not listed.
        with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = set(map(int, file.read().split()))
            known = {process.pid for process in list(self.unreaped)}
            for orphan in children - known:
                os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOHANG)

    def end_all(self) -> None:
        """End the groups of all commands at shutdown."""
        for process in list(self.unreaped):
            self.end(process)
        end = monotonic() + 2 * self._limits.term_to_kill_seconds
        while self.unreaped and monotonic() < end:
            sleep(0.01)


def start_fault(error: Exception, command: str, path: str) -> str:
    """Return why a command cannot be started."""
    words = words_of(error)
    if isinstance(error, UnicodeError):
        words = "it cannot be encoded in this locale"
    elif getattr(error, "errno", 0) == errno.ENOEXEC:
        words += ": begin the script with #!/bin/sh, and with no byte order mark before it"
    elif isinstance(error, FileNotFoundError) and shutil.which(command, path=path or os.defpath):
        words = "the interpreter in its first line is missing, or this line ends in CR"
    else:
        words += shell_advice(command)
    return words


def signal_group(process: Process, number: int) -> None:
    """Send a signal to the group of a process, unless the process has been reaped."""
    with suppress(ProcessLookupError, PermissionError):
        if process.returncode is None:
            os.killpg(process.pid, number)


def exit_of(process: Process) -> str | None:
    """Return how a command failed, "" if it exited with 0, None while it runs. Do not reap it."""
    try:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:  # the reaper was faster
        return "was killed by SIGKILL"
    if not found:
        return None
    if found.si_code == os.CLD_EXITED:
        return f"exited with status {found.si_status}" if found.si_status else ""
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(found.si_status, f'signal {found.si_status}')}"


class Tools:
    """What the scrapers share."""

    def __init__(self, limits: Limits, commands: Commands, metrics: SelfMetrics) -> None:
        self.limits = limits
        self.commands = commands
        self.metrics = metrics
        self.cache = Cache()
        self.used: dict[str, int] = {}  # bytes of bodies, requests, each module's scrapes, reads
        self.lock = Lock()  # of `used`
        self.resolver_slots = Semaphore(limits.resolver_threads)
        self.verifications = Semaphore(limits.large_verifications)
        self.fifos: dict[str, Fifo] = {}  # by real path


class Job(NamedTuple):
    """One scrape that a client has asked for."""

    module: Module
    pairs: Query  # the query without the module
    headers: Headers  # the client's, end-to-end and without what expexp itself consumed
    client: str
    deadline: Deadline
    cleanup: ExitStack
    held: Reservation
    tools: Tools
    credentials: Any = None  # a LoadedValue, for an http target: its value is a TargetCredentials
    steps: Any = None  # a list if the scrape is explained: times (monotonic), words and details

    def note(self, words: str, *values: object, details: bytes = b"") -> None:
        """Add a step to an explanation. The details are for trusted clients only."""
        if self.steps is not None:  # nothing is formatted for other scrapes
            self.steps.append((monotonic(), words % values, details))


def scrape_bound(job: Job) -> int:
    """Return how many scrapes of the job's module may run at once."""
    limits = job.tools.limits
    most = limits.share(MODULE_SHARE)
    own: int = getattr(limits, f"{job.module.method}_scrapes", most)  # http has no bound of its own
    return job.module.max_concurrent or min(own, most)


def join_pieces(job: Job, pieces: Iterable[bytes]) -> bytes:
    """Return all pieces as one body. Raise ScrapeError if it is too large or too late."""
    body = io.BytesIO()  # `getvalue` does not copy
    for piece in pieces:
        job.deadline.remaining()
        job.held.reserve_bytes(len(piece))
        body.write(piece)
        check_size(job.tools.limits, body.tell())
    return body.getvalue()


def check_size(limits: Limits, count: int) -> None:
    """Raise ScrapeError("too_large") if a body has too many bytes."""
    if count > limits.body_bytes:
        raise ScrapeError("too_large", f"more than {limits.body_bytes} bytes")


# --- http
def connect_any(job: Job, addresses: Any) -> Wire:
    """Return a connection to the first address that accepts. Raise OSError or ScrapeError."""
    errors = []
    for position, (family, kind, protocol, _, address) in enumerate(addresses):
        share = job.deadline.remaining() / (len(addresses) - position)
        deadline = Deadline(share, client_fd=job.deadline.client_fd)
        wire = None
        try:
            wire = Wire(socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol), deadline)
            if family == socket.AF_UNIX:  # a full backlog is EAGAIN; poll does not wait for it
                wire.connection.connect(address)
            else:
                wire.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                wire.attempt(wire.connection.connect, POLLOUT, address)
        except (OSError, ScrapeError) as error:
            errors.append(error)
            if wire:
                wire.close()
        else:
            wire.deadline = job.deadline
            job.cleanup.callback(wire.close)
            job.note("connected to %s", address)
            return wire
    wait(job.deadline, {}, 0)  # raises at the deadline, or if the client has hung up
    raise errors[0]


def connect_host(job: Job, host: str, port: int) -> Wire:
    """Return a connection to a port. Raise OSError, UnicodeError or ScrapeError."""
    addresses = numeric_addresses(host, port)
    if not addresses:
        acquire(job.tools.resolver_slots, job.deadline)
        # The call cannot be interrupted. At the deadline its thread is left behind, with the slot.
        query = (host, port, socket.AF_UNSPEC, socket.SOCK_STREAM)
        task = Task(job.tools.resolver_slots.release, socket.getaddrinfo, *query)
        addresses = wait_for(task, job.deadline)
    return connect_any(job, addresses)


def connect_unix(job: Job, path: str) -> Wire:
    """Return a connection to a unix socket. Raise OSError or ScrapeError."""
    return connect_any(job, [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", path)])


def target_failure(error: Exception, deadline: Deadline) -> ScrapeError:
    """Return the ScrapeError for an error of a target's connection. Raise ScrapeError if late."""
    deadline.remaining()
    words = excerpt(words_of(error), 200)
    if isinstance(error, ssl.SSLError):
        if TLS_EOF.search(str(error)):
            return ScrapeError("truncated", NO_END)
        fault = TLS_FAULTS.get(getattr(error, "verify_code", 0), "chain")
        words = f"TLS: {fault}: {words}"
    return ScrapeError("unreachable", words)


def request_headers(job: Job) -> dict[str, str]:
    """Return the headers for a target: the client's and expexp's, overridden by the module's."""
    target = job.module.target
    headers: dict[str, str] = {}
    for name, value in (*job.headers, ("X-Forwarded-For", job.client)):
        separator = "; " if name == "Cookie" else ", "
        known = headers.get(name)
        headers[name] = f"{known}{separator}{value}" if known else value
    headers["Host"] = target.netloc.removesuffix(DEFAULT_PORTS[target.scheme])
    headers.setdefault("User-Agent", f"expexp/{__version__}")
    headers[SCRAPE_TIMEOUT_HEADER] = f"{job.deadline.remaining():.3f}"
    if job.module.verify:
        headers["Accept-Encoding"] = "gzip" if takes_gzip(job) else "identity"
    if authorization := job.credentials.value.authorization:
        headers["Authorization"] = authorization
    for name, secret in target.headers.items():
        headers[name] = secret.revealed
    return headers


def end_to_end(headers: Headers) -> list[Header]:
    """Return the headers that are not hop-by-hop: RFC 9110, 7.6.1."""
    dropped = {*HOP_BY_HOP.split("|"), *connection_options(headers)}
    return [pair for pair in headers if pair[0] not in dropped]


def ask(job: Job, connect: Callable[[Job], Wire], url: str, headers: dict[str, str]) -> Any:
    """Send a GET on a new connection. Return its TargetExchange. Raise ScrapeError."""
    handler: Any = urllib.request.AbstractHTTPHandler()  # knows no proxies, `file:` or `ftp:`
    most = job.tools.limits.target_head_bytes
    request = urllib.request.Request(url, origin_req_host="localhost")  # noqa: S310 - http(s)
    request.headers = headers  # not one by one: measured
    request.timeout = None  # urllib's timeout applies to each read; the wire has a deadline
    try:
        exchange = handler.do_open(TargetExchange, request, wire=connect(job), most=most)
    except (OSError, ValueError) as error:
        raise target_failure(error, job.deadline) from None
    job.held.reserve_bytes(sum(len(n) + len(v) + 200 for n, v in exchange.headers))  # 200: measured
    return exchange


def origin_of(url: str) -> str:
    """Return scheme and address of a URL, without user, final dot or default port."""
    parts = urlsplit(url)
    address = unquote(parts.netloc).rpartition("@")[2].lower()
    host = address.removesuffix(DEFAULT_PORTS.get(parts.scheme, ""))
    return f"{parts.scheme}://{host.replace('.:', ':').removesuffix('.')}"


def fetch(job: Job) -> Any:
    """Return a target's TargetExchange, after redirects within its origin. Raise ScrapeError."""
    url: str = job.module.target.url
    # `params=name=value` is a parameter of that name. The path's own parameters follow.
    pairs = [v.partition(b"=")[::2] if n == b"params" else (n, v) for n, v in job.pairs]
    queries = urlencode(pairs), job.module.target.path.partition("?")[2]
    if any(queries):
        url += "?" + "&".join(filter(None, queries))
    for _ in range(10):  # as many requests as Go's client sends, redirects included
        headers = request_headers(job)
        job.note("GET %s with %s", job.module.target.url, ", ".join(headers))  # no values: secret
        response = ask(job, connect_target, url, headers)
        media = ", ".join(values_of(response.headers, "Content-Type"))
        job.note("answered with status %d, Content-Type", response.status, details=media.encode())
        location = "".join(values_of(response.headers, "Location")[:1])
        if response.status not in (301, 302, 303, 307, 308) or not location:  # as in Go's client
            return response
        response.close()  # its body is not read
        former = origin_of(url)
        url = urljoin(url, percent_encode(location, "!#$%&'()*+,/:;=?@~", "latin-1"))  # encodes []
        if origin_of(url) != former:
            break
    # Prometheus would follow it from its own host, and take other metrics for the target's.
    path = urlsplit(url).path.rpartition("@")[2]  # user, password, query may be secret
    words = f"redirect {response.status} not followed: it leads to {origin_of(url)}{path}"
    raise ScrapeError("status", f"{excerpt(words, 300)}; set path, port or scheme")


def scrape_http(job: Job) -> Scrape:
    """Return the answer of an http target. Raise ScrapeError."""
    response = fetch(job)
    # Without Location, which clients would resolve on our address.
    headers = [pair for pair in end_to_end(response.headers) if pair[0] != "Location"]
    body: Any = response_pieces(job, response)
    if job.module.verify or job.steps is not None:
        body = join_pieces(job, body)
        response.close()  # a client that reads slowly keeps no connection to the target
    elif response.length < inf:
        headers.append(("Content-Length", f"{response.length:d}"))
    return Scrape(response.status, headers, body)


def response_pieces(job: Job, response: TargetExchange) -> Pieces:
    """Yield the body of an answer. Raise ScrapeError if it is cut short or too large."""
    try:
        for piece in response.pieces:
            check_size(job.tools.limits, response.count)
            yield piece
    except OSError as error:
        raise target_failure(error, job.deadline) from None


# --- containers: expexp asks the engine for a container's address, over Docker's and podman's API
def connect_engine(job: Job) -> Wire:
    """Return a connection to a container engine. Raise ScrapeError."""
    host: str = job.module.target.container_host
    if host == ENGINES[0] and not os.path.exists(host.partition("://")[2]):
        host = ENGINES[1]
    try:
        return connect_unix(job, host.partition("://")[2])
    except OSError as error:
        raise ScrapeError("unreachable", f"{host}: {words_of(error)}") from None


def ask_engine(job: Job) -> bytes:
    """Return the engine's description of a container, in JSON. Raise ScrapeError."""
    url = f"http://localhost/containers/{job.module.target.container}/json"
    try:
        response = ask(job, connect_engine, url, {"Host": "localhost"})
        body = join_pieces(job, response_pieces(job, response))
        response.close()
    except ScrapeError as error:
        if error.reason.name in ("timeout", "busy", "aborted"):
            raise
        words = f"cannot ask the container engine: {error.message}"
        raise ScrapeError("unreachable", words) from None
    if response.status == OK:
        return body
    words = f"the container engine answers with status {response.status}"
    if response.status == http.HTTPStatus.NOT_FOUND:
        words = "there is no such container"
    raise ScrapeError("unreachable", words)


def find_container(job: Job) -> Address:
    """Return the address where a container's port is published, or else the container's own."""
    port = job.module.target.port
    try:
        described = json.loads(ask_engine(job))
        network = described["NetworkSettings"]
        networks = [network, *(network.get("Networks") or {}).values()]
        addresses = [each["IPAddress"] for each in networks if each.get("IPAddress")]
        if described["HostConfig"]["NetworkMode"] == "host":
            addresses.append("127.0.0.1")
        published = (network.get("Ports") or {}).get(f"{port}/tcp")
        if published:
            addresses.insert(0, published[0]["HostIp"])
            port = to_port(published[0]["HostPort"])
        if not described["State"]["Running"]:
            raise ScrapeError("unreachable", "the container is not running")
        if not addresses:
            words = f"the container publishes no port {port}, and has no address of its own"
            raise ScrapeError("unreachable", words)
        # podman leaves HostIp empty for a port that is published on all addresses.
        return str(ipaddress.ip_address(f"{addresses[0]}" or "127.0.0.1")), port
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        words = f"cannot understand the answer of the container engine: {error!r}"
        raise ScrapeError("unreachable", excerpt(words, 200)) from None


def connect_target(job: Job) -> Wire:
    """Return a connection to a target, over TLS for https. Raise like `Wire.start_tls`."""
    target = job.module.target
    if target.unix_socket:
        wire = connect_unix(job, target.unix_socket)
    elif target.container:
        address = find_container(job)
        job.note("the container is at %s", render_address(address))
        wire = connect_host(job, *address)
    else:
        wire = connect_host(job, target.address, target.port)
    if target.scheme == "https":
        # The final dot of a name is for the resolver: SNI and certificates have none.
        name = (target.server_name or target.container or target.address).removesuffix(".")
        context = job.credentials.value.context
        # An attacker can cut a body short: an end without close_notify is an error.
        wire.start_tls(context, server_hostname=name, suppress_ragged_eofs=False)
        job.note("completed the TLS handshake")
    return wire


# --- exec
def command_pieces(job: Job, process: Any, pidfd: Any, stderr: bytearray) -> Pieces:
    """Yield a command's stdout, keep the end of its stderr in `stderr`. Raise ScrapeError."""
    stdout = process.stdout.fileno()
    pipes = {stdout, process.stderr.fileno()}
    awaited = dict.fromkeys(pipes, POLLIN)
    longest = 0.02
    if pidfd:
        awaited[pidfd.fileno()] = POLLIN
        longest = inf
    while True:
        # Check for the exit first: the pipes then hold all output. A grandchild can keep them open.
        fault = exit_of(process)
        ready = pipes & wait(job.deadline, awaited, longest if fault is None else 0)
        if fault and not ready:
            raise ScrapeError("command", f"the command {fault}")
        if fault == "" and not ready:
            return
        for pipe in ready:
            piece = os.read(pipe, PIECE_BYTES)
            if not piece:
                del awaited[pipe]
            elif pipe == stdout:
                yield piece
            else:
                stderr[:] = (stderr + piece)[-job.tools.limits.stderr_bytes :]


def scrape_exec(job: Job) -> Scrape:
    """Return the output of a command that exits with 0. Raise ScrapeError."""
    name = job.module.name
    commands = job.tools.commands
    most = scrape_bound(job)
    # Commands may ignore TERM or hang. Without a bound, 10 clients that hung up kept 426 running.
    given_up = [process for process, module in list(commands.unreaped.items()) if module == name]
    if [*map(exit_of, given_up)].count(None) >= most:
        raise ScrapeError("busy", f"{most} commands of earlier scrapes have not ended yet")
    if job.steps is None:
        job.tools.metrics.increment("expexp_command_starts_total", name)
    process = commands.start(job)
    stderr = bytearray()
    pidfd: Any = nullcontext()
    try:
        with suppress(AttributeError, OSError):  # not Linux, or before 5.3
            pidfd = io.FileIO(os.pidfd_open(process.pid))
        with process.stdout, process.stderr, pidfd as opened:
            return text_scrape(join_pieces(job, command_pieces(job, process, opened, stderr)))
    except ScrapeError as error:
        error.detail = excerpt(bytes(stderr).strip(), job.tools.limits.stderr_bytes)
        commands.unreaped[process] = name  # it counts until it has ended
        raise
    finally:
        commands.end(process)
        job.note("the command has written this to stderr", details=bytes(stderr))


def text_scrape(body: bytes, modified: float | None = None) -> Scrape:
    """Return the scrape of a body without a content type."""
    content_type = OPENMETRICS_CONTENT_TYPE if is_openmetrics_body(body) else TEXT_CONTENT_TYPE
    return Scrape(OK, [("Content-Type", content_type)], body, modified)


# --- file
def scrape_file(job: Job) -> Scrape:
    """Return the scrape of a file or FIFO. Raise ScrapeError."""
    # A hung `stat`, `open` or `read` leaves its thread behind, at most one for each scrape allowed.
    most = scrape_bound(job)
    held = Reservation(job.tools)
    words = f"{most} reads of it have not returned: its file system may hang"
    held.reserve(f"reads of {job.module.name}", most, words)
    task = Task(held.release, read_module_path, job._replace(held=held))
    try:
        found: Scrape = wait_for(task, job.deadline)
    except (OSError, UnicodeError) as error:
        raise ScrapeError("file", f"cannot be read: {words_of(error)}") from None
    except ScrapeError as error:
        # Let the thread close a FIFO before the answer, or text written meanwhile may be lost.
        if task.running.acquire(timeout=1 if error.reason.name == "aborted" else 0.03):
            task.running.release()
        raise
    job.held.reserve_bytes(total_size(found))
    return found


def read_module_path(job: Job) -> Scrape:
    """Return the scrape of a file or FIFO. Raise OSError, UnicodeError or ScrapeError."""
    path: str = job.module.target.path
    kind = stat.S_IFMT(os.stat(path).st_mode)  # before `open`, which may act on a device
    if kind == stat.S_IFIFO:
        job.note("a FIFO: this takes what is in it, and the next scrape does not get it")
        return read_fifo(job, os.path.realpath(path))
    if kind != stat.S_IFREG:
        raise ScrapeError("file", "neither a regular file nor a FIFO")
    with open_path(job, kind) as file:
        modified = os.fstat(file.fileno()).st_mtime
        return text_scrape(join_pieces(job, iter(lambda: file.read(PIECE_BYTES), b"")), modified)


@contextmanager
def open_path(job: Job, kind: int) -> Iterator[io.FileIO]:
    """Open a module's file or FIFO. Raise OSError, or ScrapeError if replaced or too large."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO may have no writer
    with io.FileIO(os.open(job.module.target.path, flags)) as file:
        found = os.fstat(file.fileno())
        if stat.S_IFMT(found.st_mode) != kind:
            raise ScrapeError("file", "replaced while it was opened")
        check_size(job.tools.limits, found.st_size)
        yield file


class Fifo:
    """A FIFO. One scrape at a time reads it: two readers would each get a part."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.unfinished: io.FileIO | None = None  # the rest of an answer cut short, to discard

    def close(self) -> None:
        """Close `unfinished`: its answer has been read."""
        if self.unfinished:
            self.unfinished.close()
            self.unfinished = None


def read_fifo(job: Job, key: str) -> Scrape:
    """Return the scrape of the FIFO with the real path `key`. Raise OSError or ScrapeError."""
    path: str = job.module.target.path
    fifo = job.tools.fifos.setdefault(key, Fifo())
    with hold(fifo.lock, job.deadline):
        rest = fifo.unfinished
        if rest and os.path.samestat(os.fstat(rest.fileno()), os.stat(path)):
            for _ in fifo_pieces(job, rest):
                pass
        fifo.close()
        with open_path(job, stat.S_IFIFO) as file:
            while not wait(job.deadline, {file: POLLIN}):
                pass
            fifo.unfinished = io.FileIO(os.dup(file.fileno()))
            body = join_pieces(job, fifo_pieces(job, file))
            fifo.close()
            return text_scrape(body)


def fifo_pieces(job: Job, file: io.FileIO) -> Pieces:
    """Yield the bytes of a FIFO until its last writer closes it."""
    piece = None
    while piece != b"":
        # Without a writer, poll reports nothing, but read sees an end: poll before each read.
        if wait(job.deadline, {file: POLLIN}):
            piece = file.read(PIECE_BYTES)  # None if another reader was faster
            yield piece or b""


def with_mtime(body: bytes, module: Module, modified: float) -> bytes:
    """Return the body with the file's modification time, unless it has that family already."""
    # `in` comes first: the expression alone takes longer than the rest of the scrape.
    if MTIME_FAMILY in body and MTIME_LINE.search(body):
        return body
    labels = render_labels(("module", "path"), (module.name, module.target.path))
    added = MTIME_LINES.format(MTIME_FAMILY.decode(), labels, modified).encode()
    if is_openmetrics_body(body):
        added += b"# EOF\n"
        body = body.rstrip(b"\n")[:-5]
    if body and not body.endswith(b"\n"):
        body += b"\n"
    return body + added


# --- verification of what was scraped
def verify_scrape(job: Job, headers: Headers, body: bytes, configured: str) -> tuple[str, int]:
    """Return the content type to send and the number of samples. Raise ScrapeError."""
    encoding = (*values_of(headers, "Content-Encoding"), "")[0]
    given = configured or (*values_of(headers, "Content-Type"), "")[0]
    content_type = given if CONTENT_TYPE.fullmatch(given) else TEXT_CONTENT_TYPE
    decoded = Reservation(job.tools)
    try:
        if encoding == "gzip":  # Prometheus decodes nothing else, either
            body = join_pieces(job._replace(held=decoded), gunzip_pieces(body))
            job.note("unpacked %d bytes", len(body), details=body)
        # Measured for 40 bodies of 50 MB: the p99 of others is 90-156 ms, without this 375 ms.
        with hold(job.tools.verifications, job.deadline) if len(body) > MEBIBYTE else nullcontext():
            samples = verify_exposition(body, content_type, job.deadline.tick)
        job.note("verified %d samples", samples)
    except zlib.error as error:
        raise ScrapeError("malformed", f"broken gzip: {str(error).rpartition(': ')[2]}") from None
    except ExpositionError as error:
        detail = f'the line is "{excerpt(error.text, 200)}"' if error.line else ""
        message = str(error)
        if encoding not in ("", "identity", "gzip"):
            message += f'; Content-Encoding is "{excerpt(encoding)}", and only gzip is decoded'
        if not re.match("(?i)text/plain|application/openmetrics-text|.*=delimited|$", given):
            message += f'; Content-Type is "{excerpt(given, 200)}"'
        raise ScrapeError("malformed", message, detail) from None
    finally:
        decoded.release()
    return content_type, samples


def gunzip_pieces(body: bytes) -> Pieces:
    """Yield the decoded body of one or more gzip members. Raise zlib.error."""
    member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    for start in range(0, len(body), PIECE_BYTES):  # in parts: zlib copies unused input
        part = body[start : start + PIECE_BYTES]
        while part:
            if member.eof:
                member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            yield member.decompress(part, 4 * PIECE_BYTES)
            part = member.unused_data or member.unconsumed_tail  # the latter if output remains
    if not member.eof:
        raise zlib.error("cut short")


#: What clients may add to a module's scrape.
ARGUMENT_KINDS = {"exec": (b"args", b"params"), "http": (b"params",), "file": ()}
SCRAPERS = {"http": scrape_http, "exec": scrape_exec, "file": scrape_file}
GZIP_BYTES = range(1024, 16777216)  # smaller ones fit into a packet, larger ones take too long
NEUTRAL = ("Host", "User-Agent", "X-Forwarded-For", SCRAPE_TIMEOUT_HEADER)  # to the body


def scrape_target(job: Job) -> Scrape:
    """Return the module's scrape, verified if the module wants that. Raise ScrapeError."""
    module = job.module
    most = scrape_bound(job)
    slot = Reservation(job.tools, job.cleanup)
    words = f"already running {most} scrapes (max_concurrent)"
    running = slot.reserve(f"scrapes of {module.name}", most, words)
    limits = job.tools.limits
    if running > limits.unspread_scrapes:
        # Measured for 520 requests: the p99 of other scrapes is 138-184 ms, without this 382 ms.
        longest = running * limits.scrape_spread_seconds
        wait(job.deadline, {}, random.random() * longest)  # noqa: S311 - no secret
    result = SCRAPERS[module.method](job)
    if isinstance(result.body, bytes):  # a slow client holds a slot only for a stream
        slot.release()
        job.note("read %d bytes", len(result.body), details=result.body)
    if result.status != OK:
        return result
    headers, body = result.headers, cast(bytes, result.body)
    content_type: str = getattr(module.target, "content_type", "")
    samples = None
    if module.verify:
        content_type, samples = verify_scrape(job, headers, body, content_type)
    if content_type:
        headers = with_header(headers, "Content-Type", content_type)
    if result.modified is not None:
        body = with_mtime(body, module, result.modified)
    packed = b""
    if module.method != "http" and len(body) in GZIP_BYTES:
        headers = with_header(headers, "Vary", "Accept-Encoding")
        if module.cache or takes_gzip(job):
            packed = join_pieces(job, [gzip.compress(body, 1)])
    return result._replace(headers=headers, body=body, packed=packed, samples=samples)


def takes_gzip(job: Job) -> bool:
    """Return whether the client accepts gzip."""
    return accepts(",".join(values_of(job.headers, "Accept-Encoding")), "gzip")


def answer_job(job: Job) -> Scrape:
    """Return the target's answer, new or cached. Raise ScrapeError."""
    module = job.module
    limits = job.tools.limits
    # A target that hangs must not take all connections. Requests that wait for a cache count, too.
    own = f"requests to {module.name}"
    job.held.reserve(own, limits.share(MODULE_SHARE), "too many requests to it are being answered")
    words = "too many requests to all modules are being answered"
    job.held.reserve("requests", limits.share(PROXY_SHARE), words)
    if module.cache and job.steps is None:
        headers: Headers = ()
        if module.method == "http":
            headers = sorted(pair for pair in job.headers if pair[0] not in NEUTRAL)
        scrape = job.tools.cache.answer(job, (module.name, tuple(job.pairs), tuple(headers)))
    else:
        scrape = scrape_target(job)
    if scrape.packed and takes_gzip(job):
        packed = with_header(scrape.headers, "Content-Encoding", "gzip")
        return scrape._replace(headers=packed, body=scrape.packed)
    return scrape


# ==================================================================================================
# 14  Application
# ==================================================================================================
# A Request becomes a Response: admission, route, module, and an answer for every error. No sockets
# here. `handle` never raises. Only `handle` and loading catch Exception.

STARTED = time.time()
OWN_HEADERS = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"))
PROMETHEUS_HEADERS = {  # Prometheus 3's. explain adds them for curl and browsers
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-"
    "8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "Accept-Encoding": "gzip",
    SCRAPE_TIMEOUT_HEADER: "10",
}
LOOPBACK = re.compile(r"(?i)((localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?)?")  # as Host
RECENT_SCRAPES = 60  # in a sparkline
FIRST_STEP = "module %s: %s %s, deadline in %.3g s (the module's: %s, the client's: %s)"
HIDDEN = b"shown to authenticated clients or on the loopback"


class Request(NamedTuple):
    """A client's request."""

    method: str
    target: str  # path and query, as latin-1 text
    headers: Headers
    client: str
    scheme: str = "http"
    version: str = "1.1"
    client_fd: int = -1  # descriptor of the client's connection, polled for its hang-up
    is_trusted: bool = False  # the client has authenticated, or is on this host and no proxy

    @property
    def path(self) -> str:
        """Return the path without the query."""
        return self.target.partition("?")[0]

    def header(self, name: str) -> str:
        """Return the values of a header, joined; "" without any. The name is in Title-Case."""
        return ", ".join(values_of(self.headers, name))

    @property
    def keeps_connection(self) -> bool:
        """Return whether the client keeps the connection open: RFC 9112, 9.3."""
        options = connection_options(self.headers)
        return "Close" not in options and (self.version != "1.0" or "Keep-Alive" in options)


@dataclass
class Response:
    """The answer to a client. `cleanup` runs after it has been sent or has failed."""

    status: int
    headers: Headers
    body: bytes | Pieces = b""
    cleanup: ExitStack = dataclasses.field(default_factory=ExitStack)
    aborted: bool = False  # the client hung up, or the answer failed after its status
    module: str = ""  # the module whose duration is observed, if any


def own_response(
    status: int, text: str, *more: Header, media_type: str = "text/plain; charset=utf-8"
) -> Response:
    """Return a response with a text of expexp itself."""
    headers = [("Content-Type", media_type), *OWN_HEADERS, *more]
    return Response(status, headers, f"{text}\n".encode("utf-8", "replace"))


def choose_module(config: Config, request: Request) -> tuple[Module, Query]:
    """Return the module that a query names, or the default one, and what the query has for it."""
    name = config.default_module
    rest = list(parse_query(request.target.partition("?")[2]))
    given = dict(reversed(rest)).get(b"module")  # the first one: later ones are for the target
    if given is not None:  # even if it is empty, as relabelling can make it
        name = given.decode("utf-8", "replace")
        rest.remove((b"module", given))
    elif not name:
        raise ScrapeError("bad_arguments", "the parameter module is missing")
    if name not in config.modules:
        raise ScrapeError("unknown_module", f'unknown module "{excerpt(name)}"')
    module = config.modules[name]
    if module.method != "http":  # its target gets the whole query
        rest = [pair for pair in rest if pair[0] in ARGUMENT_KINDS[module.method]]
    return module, rest


def check_arguments(module: Module, pairs: Query, limits: Limits) -> None:
    """Raise ScrapeError("bad_arguments") for an argument that the module does not accept."""
    added = [pair for pair in pairs if pair[0] in ARGUMENT_KINDS[module.method]]
    if len(added) > limits.arguments:
        raise ScrapeError("bad_arguments", f"more than {limits.arguments} args and params")
    for kind, value in added:
        fault = ""
        if len(value) > limits.argument_bytes:
            fault = f"longer than {limits.argument_bytes} bytes"
        elif b"\0" in value:
            fault = "a NUL in it"
        elif kind == b"params" and not re.match(rb"[A-Za-z][A-Za-z0-9_.-]*=", value):
            fault = 'not of the form "name=value"'
        elif not is_accepted(module, kind, value):
            fault = "not accepted by this module"
        if fault:
            raise ScrapeError("bad_arguments", f'{kind.decode()} "{excerpt(value)}": {fault}')


def is_accepted(module: Module, kind: bytes, value: bytes) -> bool:
    """Return whether a module accepts a value of `args`, or the name in one of `params`."""
    accepted = module.accept_args if kind == b"args" else module.accept_params
    if isinstance(accepted, bool):
        return accepted
    if kind == b"params":
        return os.fsdecode(value.partition(b"=")[0]) in accepted
    return any(fnmatch.fnmatchcase(os.fsdecode(value), glob) for glob in accepted)


def admit(request: Request, networks: Sequence[Network], credentials: Credentials) -> Request:
    """Return the request with `is_trusted`, without expexp's credentials. Raise RequestError."""
    address = parse_client_address(request.client)
    if networks and not any(address in network for network in networks):
        raise RequestError(403, "Forbidden")
    names = " ".join(dict(request.headers))
    is_proxied = request.version == "1.0" or re.search("(?i)forwarded|via", names)  # nginx uses 1.0
    has_certificate = request.scheme == "https" and "client certificates" in credentials.protections
    is_local = LOOPBACK.fullmatch(request.header("Host")) and address.is_loopback
    is_trusted = has_certificate or bool(is_local and not is_proxied)
    schemes = {}
    if credentials.token:
        schemes["Bearer"] = (credentials.is_token, "Invalid Bearer Token")
    if credentials.users:
        schemes["Basic"] = (credentials.users.prove, "Invalid user or password")
    if not schemes:  # no credentials are needed
        return request._replace(is_trusted=is_trusted)
    name, _, given = request.header("Authorization").partition(" ")
    scheme = name.title()
    wrong = "Authorization header is missing"
    if scheme in schemes:
        is_valid, wrong = schemes[scheme]
        if is_valid(given.strip()):
            others = [pair for pair in request.headers if pair[0] != "Authorization"]
            return request._replace(headers=others, is_trusted=True)
    elif scheme:
        wrong = f"Authorization header not of {' or '.join(schemes)} type"
    challenges = ", ".join([f'{each} realm="expexp"' for each in schemes])
    raise RequestError(401, wrong, ("WWW-Authenticate", challenges))


@lru_cache  # a scrape needs the time of this second in two forms
def utc_time(seconds: float, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    """Return a Unix time as text, by default such as `2026-11-30T15:12:20Z`."""
    return time.strftime(form, time.gmtime(seconds))


@dataclass
class Outcome:
    """How the last scrape with one query ended, and what was logged about it."""

    succeeded_at: float  # monotonic; before any success, of the first scrape
    noted_at: float  # monotonic
    fields: Values = dataclasses.field(default_factory=dict)  # `last_scrape` of the page
    logged_reason: str = ""  # in the last warning, except busy


class History:
    """The outcomes of a module by query. Logs recoveries and new failures as warnings."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = Lock()
        self._outcomes = OrderedDict[int, Outcome]()  # the least recently used one first
        self._recent = deque[tuple[float, str]](maxlen=RECENT_SCRAPES)  # seconds and reasons
        self._logged_at = -inf
        self._left_out = 0  # suppressed warnings since then

    def note(self, attempt: Attempt, text: str, patience: float = 0, **fields: Any) -> None:
        """Keep the outcome of a scrape. Log it as `text`, and as a warning if it is news."""
        job = attempt.job
        now = monotonic()
        at = utc_time(int(time.time()))
        seconds = round(now - job.deadline.began, 4)
        reason = fields.get("reason", "")  # none: it has succeeded
        fields.update(time=at, seconds=seconds, deadline=job.deadline.seconds, query=attempt.query)
        fields["state"] = "failing" if reason else "ok"
        key = hash(tuple(job.pairs))  # hashes of bytes are salted
        with self._lock:
            self._recent.append((seconds, reason))
            outcome = self._outcomes.pop(key, None) or Outcome(now, now)
            if len(self._outcomes) > self._limits.queries:  # keep one more, to know "more than 64"
                good = [k for k, each in self._outcomes.items() if not each.fields["failing_since"]]
                forgotten = self._outcomes.pop([*good, *self._outcomes][0])
                if reason and not good:  # so many fail that one more is no news
                    outcome = forgotten
            self._outcomes[key] = outcome
            since = outcome.fields.get("failing_since") or at
            fields["failing_since"] = since if reason else None
            outcome.fields = fields
            outcome.noted_at = now
            extra = {"fields": {"module": job.module.name, **fields}}
            if self._is_news(outcome, reason, patience):
                more = f" ({self._left_out} more left out)" if self._left_out else ""
                LOGGER.warning("%s%s", text, more, extra=extra)
                self._left_out = 0
                self._logged_at = now
                if reason != "busy":
                    outcome.logged_reason = reason
            elif reason:
                LOGGER.debug("%s", text, extra=extra)

    def _is_news(self, outcome: Outcome, reason: str, patience: float) -> bool:
        """Return whether to warn of an outcome. Note a success. Count a warning left out."""
        since = outcome.noted_at - self._logged_at
        if reason:
            is_due = since >= self._limits.failure_reminder_seconds
            is_news = is_due or reason not in ("busy", outcome.logged_reason)  # busy: only if due
            is_news = is_news and outcome.noted_at - outcome.succeeded_at >= patience
        else:
            outcome.succeeded_at = outcome.noted_at
            is_news = outcome.logged_reason != ""
        is_early = is_news and since < self._limits.failure_pause_seconds
        self._left_out += is_early
        return is_news and not is_early

    def summary(self) -> Values:
        """Return the module's state for the page at /, by the keys of its JSON."""
        with self._lock:
            outcomes = list(self._outcomes.values())
            recent = list(self._recent)
        most = self._limits.queries
        queries = f"more than {most}" if len(outcomes) > most else len(outcomes)
        found: Values = {"last_scrape": None, "last_success": None, "last_failure": None}
        since = []
        for outcome in outcomes:
            if outcomes[-1].noted_at - outcome.noted_at < self._limits.unused_query_seconds:
                found["last_scrape"] = outcome.fields
                ended = "last_success"
                if outcome.fields["failing_since"]:
                    ended = "last_failure"
                    since.append(outcome.fields["failing_since"])
                found[ended] = outcome.fields
        return {
            **found,
            "failing_since": min(since, default=None),
            "queries": queries,
            "recent": recent,
        }


class Attempt(NamedTuple):
    """A request for a module's exposition. Counts and logs how it ends."""

    job: Job  # if it has steps, the scrape is explained, and not counted, logged or kept
    history: History
    patience: float  # a timeout is no news within so many seconds of a success
    query: str  # what the client has asked of the module: it may name one target of many

    def observe(self, scrape: Scrape) -> Any:
        """Return the body of a target's answer. Note how the answer ends."""
        if scrape.status != OK:
            words = f"the target answered with status {scrape.status}"
            if scrape.status == REASONS["bad_arguments"].status and not self.job.pairs:
                words += "; if it needs a parameter, set discovery: false or discovery.params"
            error = ScrapeError("status", words)
            self.fail(error, error.reason, scrape.status)
        if isinstance(scrape.body, bytes):
            return b"".join(self._pieces(scrape, [scrape.body]))  # which copies nothing
        return self._pieces(scrape, scrape.body)

    def _pieces(self, scrape: Scrape, pieces: Iterable[bytes]) -> Pieces:
        """Yield the pieces of a body. A failure after the status was sent counts as aborted."""
        size = 0
        try:
            for piece in pieces:
                size += len(piece)
                yield piece
        except ScrapeError as error:
            self.fail(error, REASONS["aborted"], scrape.status)
            raise
        if scrape.status == OK and self.job.steps is None:
            text = f"module {self.job.module.name}: recovered"
            if self.query:
                text += f" (query {self.query})"
            age = excerpt(dict(scrape.headers).get("Age", ""))
            self.history.note(self, text, status=OK, samples=scrape.samples, bytes=size, age=age)

    def fail(self, error: ScrapeError, reason: Reason, status: int) -> str:
        """Count and log a failure. Return its words, with the target's URL where it matters."""
        job = self.job
        module = job.module
        kind = error.reason.name
        words = error.message
        # Faults of the request and of the body's text, and "busy", do not need the target's URL.
        if kind not in ("bad_arguments", "malformed", "busy", "aborted"):
            words = f"{excerpt(module.target.shown, 200)}: {words}"
        if self.query and kind != "bad_arguments":
            words += f" (query {self.query})"
        if job.steps is not None:
            job.note("%s: %s", reason.name, words, details=error.detail.encode())
            return words
        text = f"module {module.name}: {reason.name}: {words}"
        if error.detail:
            text += f": {error.detail}"
        if kind == "aborted":  # the client hung up: the module has not failed
            job.tools.metrics.increment("expexp_proxy_failures_total", module.name, kind)
        else:
            job.tools.metrics.fail(module.name, module.method, reason)
        if kind in ("aborted", "bad_arguments"):  # what clients do must not fill the log
            LOGGER.debug("%s", text)
        else:
            patience = self.patience if kind == "timeout" else 0
            self.history.note(self, text, patience, status=status, reason=reason.name, error=words)
        return words


# The templates of the page at /. Its links are relative: they work behind a reverse proxy.
STYLE = """
:root { color-scheme: light dark; background: canvas; font: 1rem/1.4 system-ui, sans-serif }
table { border-collapse: collapse; width: 100% } td:nth-child(2) { min-width: 9rem }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
tr { border-bottom: 1px solid #8886; border-left: .4rem solid #888 } thead tr { border-left: 0 }
.failing { border-left-color: #d33 } .ok { border-left-color: #2a4 } .age, svg { display: block }
.never :is(meter, svg), .q0, .q1 { display: none } .age:not(:empty)::after { content: ' s old' }
svg * { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke } path { stroke: #d33 }
th, td:nth-child(n+5) { white-space: nowrap } td { min-width: 4rem } pre { white-space: pre-wrap }
@media (max-width: 78rem) { thead { display: none } tr, td { display: block } td { padding: .1rem }
td[title]:not(:empty)::before { content: attr(title); opacity: .7; margin-right: .6rem } }
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    "Content-Security-Policy",
    f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",  # noqa: E501
)
PAGE_START = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>expexp</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
"""
PAGE = f"""</head><body><main><h1>expexp {__version__}</h1>
<p>Started {utc_time(STARTED)} on {{access}}. Loaded {{loaded}} from {{files}}: {{modules}} modules.
<a href=".{{telemetry}}">Metrics of expexp itself</a> <a href="./sd">Service discovery</a> \
<a href="./-/healthy">Health</a></p>
<pre>{{problems}}</pre><table><thead><tr><th>Module<th>Target<th>Last scrape, failing since\
<th>Query<th>At<th>Seconds<th>Status<th>Samples<th>Bytes</thead>
"""
ROW = """<tr class="{state}"><td title="Module"><a href=".{path}?{link}">{name}</a> \
<a href="./-/explain?{link}">explain</a><td title="Target">{method} {target}\
<td title="Last scrape">{state} {failing_since} {error}<td title="Query">{query}<span \
class="q{queries}"> (of {queries})</span><td title="At">{time}<span class="age">{age}</span><td \
title="Seconds">{seconds}<meter max="{deadline}" value="{seconds}" title="of {deadline} s"></meter>\
<svg width="120" height="20" viewBox="-1 -{longest} 62 {longest}" role="img" \
preserveAspectRatio="none"><title>{words}</title><path d="{marks}"/><polyline points="{points}"/>\
</svg><td title="Status">{status}<td title="Samples">{samples}<td title="Bytes">{bytes}</tr>
"""


def fill(template: str, **values: Any) -> str:
    """Return a template filled with escaped values. Missing ones and None become empty."""
    escaped = {name: html.escape(str(value)) for name, value in values.items() if value is not None}
    return template.format_map(defaultdict(str, escaped))


def draw(recent: Sequence[tuple[float, str]]) -> Values:
    """Return a sparkline: durations as a line, failures as bars, and a summary."""
    longest = 0.0
    points = ""
    marks = ""
    for number, (seconds, reason) in enumerate(recent):
        longest = max(longest, seconds)
        points += f" {number},{-seconds}"
        if reason:
            marks += f"M{number},0v-9e5"
    words = f"scrapes: {len(recent)}, failed: {marks.count('M')}, longest: {longest} s"
    return {"points": points, "marks": marks, "longest": longest or 1, "words": words}


def render_rows(name: str, about: Values, path: str) -> str:
    """Return a module's rows: two if only some of its queries fail."""
    known = {**about, **draw(about["recent"]), "path": path, "name": excerpt(name, 200)}
    known["target"] = excerpt(about["target"], 200)
    link = urlencode({"module": name})
    rows = ""
    for shown in (about["last_failure"], about["last_success"]):
        if shown:
            known["link"] = "&".join(filter(None, [link, shown["query"]]))
            rows += fill(ROW, **{**known, **shown})
    return rows or fill(ROW, **known, link=link, state="never")


def render_page(uri: str, outlines: Values, application: Application) -> str:
    """Return the page at /."""
    options = application.options
    snapshot = application.loader.snapshot
    page = PAGE_START
    found = re.search(r"[?&]refresh=([1-9]\d{0,2}|[12]\d{3}|3[0-5]\d\d|3600)(?![^&])", uri)
    if found:
        page += f'<meta http-equiv="refresh" content="{found[1]}">'
    told = "\n".join(map(str, snapshot.config.problems[:20]))
    if told:
        told = f"Reload failed, the previous configuration is in use:\n{told}"
    access = application.access()
    if snapshot.credentials.value.tls:
        access += f", certificate until {utc_time(snapshot.credentials.value.tls.expires)}"
    files = ", ".join(filter(None, [options["config.file"], *options["config.dirs"]]))
    facts = {"access": access, "files": files, "modules": len(outlines), "problems": told}
    facts.update(loaded=utc_time(snapshot.loaded), telemetry=options["web.telemetry-path"])
    page += fill(PAGE, **facts)
    rows = [render_rows(*pair, options["web.proxy-path"]) for pair in outlines.items()]
    rows.sort()  # a row begins with its state: failing, never, ok
    return page + "".join(rows) + "</table></main></body></html>"


def collect(metrics: SelfMetrics, snapshot: Snapshot) -> None:
    """Set the metrics of reloads and of this process, except those that the system lacks. IO."""
    put = metrics.set
    own = snapshot.credentials
    has_problems = any(each.problems for each in (own, *snapshot.targets.values()))
    put(expexp_credentials_last_reload_successful=int(not has_problems))
    put(expexp_config_last_reload_successful=int(not snapshot.config.problems))
    put(expexp_config_last_reload_success_timestamp_seconds=snapshot.loaded)
    if own.value.tls:
        put(expexp_tls_certificate_expiry_timestamp_seconds=own.value.tls.expires)
    put(process_start_time_seconds=STARTED, process_cpu_seconds_total=time.process_time())
    put(process_max_fds=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    with suppress(OSError), open("/proc/self/stat", "rb") as file:
        # The program's name may contain blanks and brackets. proc(5) counts from 1.
        fields = file.read().rpartition(b")")[2].split()
        put(process_threads=int(fields[17]), process_virtual_memory_bytes=int(fields[20]))
        put(process_resident_memory_bytes=int(fields[21]) * resource.getpagesize())
        put(process_open_fds=len(os.listdir("/proc/self/fd")) - 2)  # our own two


def render_telemetry(application: Application, request: Request) -> Response:
    """Return our own metrics, compressed if the client accepts that."""
    collect(application.metrics, application.loader.snapshot)
    # Not at a reload: requests for removed modules may end after it, and create series again.
    application.metrics.forget_modules(lambda: application.modules)
    body = application.metrics.render().encode()
    headers = [("Content-Type", TEXT_CONTENT_TYPE), ("Vary", "Accept-Encoding")]
    if accepts(request.header("Accept-Encoding"), "gzip"):
        body = gzip.compress(body, 1)
        headers.append(("Content-Encoding", "gzip"))
    return Response(OK, headers, body)


def list_targets(application: Application, request: Request) -> Response:
    """Return the modules for Prometheus's HTTP service discovery. Raise RequestError."""
    scheme, host, prefix = application.options["web.external-address"]
    address = host or request.header("Host")
    if not is_host(address):
        expected = "a header Host with a host and perhaps a port, or -web.external-address"
        raise RequestError(400, f'expected {expected}, found "{excerpt(address)}"')
    groups = []
    for module in application.modules.values():
        if not module.discovery:
            continue
        params = module.discovery.params
        labels = {
            "__metrics_path__": prefix + application.options["web.proxy-path"],
            "__scheme__": scheme or request.scheme,
            "__param_module": module.name,
            "__meta_expexp_method": module.method,
            "module": module.name,  # else the go_* series of two modules would be the same
        }
        interval = module.scrape_interval
        if interval:
            # Both or none: Prometheus drops targets with timeout > interval, or with fractions.
            timeout = (module.timeout or interval) + application.options["timeout-offset"]
            labels["__scrape_interval__"] = f"{max(1, interval * 1000):.0f}ms"
            labels["__scrape_timeout__"] = f"{max(1, min(interval, timeout) * 1000):.0f}ms"
        labels.update(module.discovery.labels)
        for values in itertools.product(*params.values()):
            added = dict(zip(params, values))
            if added:  # also in instance, by which dashboards tell targets apart
                added["instance"] = f"{address} {' '.join(values)}"
            for name in params:
                added[f"__param_{name}"] = added[name]
            groups.append({"targets": [address], "labels": {**labels, **added}})
    return own_response(200, json.dumps(groups), media_type="application/json")


def answer_probe(_application: Application, request: Request) -> Response:
    """Answer that expexp is healthy, or ready."""
    return own_response(200, f"expexp is {request.path.removeprefix('/-/')}.")


def explain(application: Application, request: Request) -> Response:
    """Return an account of a scrape made now. No cache, metric, page or log keeps it."""
    sent = [(k, v) for k, v in request.headers if k != "Accept" or "version=" in v]
    missing = {k: v for k, v in PROMETHEUS_HEADERS.items() if not values_of(sent, k)}
    started = monotonic()
    steps: Any = []
    response = application.proxy(request._replace(headers=[*sent, *missing.items()]), steps)
    response.cleanup.close()
    if len(steps) < 2:  # noqa: PLR2004 - it was refused before the scrape
        return dataclasses.replace(response, module="")
    text = f"{response.status}: the status that /proxy would answer with now\n"
    text += f"headers from Prometheus's defaults: {', '.join(missing)}"
    for at, words, details in steps:
        text += f"\n{at - started:8.3f} s  {excerpt(words, 2000)}"
        if details.startswith(b"\x1f\x8b"):  # gzip
            continue
        shown = details if request.is_trusted else details and HIDDEN
        for line in shown[:8192].splitlines()[:20]:
            text += f"\n{'':12}{excerpt(line, 200)}"
    return own_response(OK, text)


class Application:
    """Answers requests by their routes."""

    def __init__(self, loader: Loader, options: Options, tools: Tools) -> None:
        """Add the routes. Raise ConfigError if two of them have the same path."""
        self.loader = loader
        self.options = options
        self.metrics = tools.metrics
        self.limits = tools.limits
        self.addresses = ""  # of the listeners, for the page
        self._tools = tools
        self.histories: dict[str, History] = defaultdict(partial(History, tools.limits))
        self._reload_slots = BoundedSemaphore(tools.limits.share(RELOAD_SHARE))
        self._routes: dict[str, Callable[[Application, Request], Response]] = {
            "/": Application._index,
            "/-/explain": explain,
            "/-/healthy": answer_probe,
            "/-/ready": answer_probe,
            "/-/reload": Application._reload,
            "/sd": list_targets,
            options["web.telemetry-path"]: render_telemetry,
            options["web.proxy-path"]: Application.proxy,
        }
        if len(self._routes) < 8:  # noqa: PLR2004 - two routes have the same path
            message = "-web.telemetry-path and -web.proxy-path need paths that no endpoint has yet"
            raise ConfigError(Problem("", 0, 0, "", message))
        self._prepared: LoadedValue | None = None
        self._prepare_modules()

    def access(self) -> str:
        """Return the addresses, and the requirements for clients."""
        rules = sorted(self.loader.snapshot.credentials.value.protections)
        clients = ", ".join([*map(str, self.options["allow.net"]), *rules]) or "all"
        return f"{self.addresses}, clients: {clients}"

    @property
    def modules(self) -> Mapping[str, Module]:
        """Return the modules of the configuration in use, by name."""
        return cast(Config, self.loader.snapshot.config.value).modules

    def _prepare_modules(self) -> None:
        """Prepare metrics for the modules, once for each configuration."""
        config = self.loader.snapshot.config
        if config is self._prepared:  # 50 threads at once took 3.9 s for 300 modules
            return
        self._prepared = config
        modules = self.modules
        for name, module in modules.items():
            self.metrics.create_module(name, module.method)
        for gone in set(self.histories).difference(modules):
            self.histories.pop(gone, None)  # another reload may have done it

    def reload(self) -> Sequence[Problem]:
        """Read all files again and return the problems. Raise RequestError."""
        problems = self.loader.reload()
        self._prepare_modules()
        return problems

    def handle(self, request: Request, refusal: RequestError | None = None) -> Response:
        """Return the response, also if the server could not read the request (`refusal`)."""
        started = monotonic()
        self.metrics.increment("expexp_http_requests_in_flight")
        try:
            response = self._route(request, refusal)
        except RequestError as error:
            response = own_response(error.status, error.message, *error.headers)
        except Exception:
            LOGGER.exception("unexpected error in answering %s", excerpt(request.target))
            response = own_response(500, "Internal Server Error: see the log")
        response.cleanup.callback(self._finish, request, response, started)
        return response

    def _finish(self, request: Request, response: Response, started: float) -> None:
        """Count and log a request that has been answered."""
        seconds = monotonic() - started
        path = request.path if request.path in self._routes else "other"
        status = response.status
        self.metrics.increment("expexp_http_requests_in_flight", by=-1)
        self.metrics.increment("expexp_http_requests_total", path, str(status))
        if response.module:
            self.metrics.increment("expexp_proxy_duration_seconds_sum", response.module, by=seconds)
            self.metrics.increment("expexp_proxy_duration_seconds_count", response.module)
        if not ACCESS.isEnabledFor(logging.INFO):  # format nothing that is not logged
            return
        method = excerpt(request.method)
        target = excerpt(request.target, 2000)
        phrase = http.client.responses.get(status, "")
        if response.aborted:
            phrase += ", aborted"
        fields = {"client": request.client, "method": method, "path": target, "status": status}
        fields.update(seconds=round(seconds, 4), module=response.module)
        took = f"{phrase} (took {seconds * 1000:.2f}ms)"
        text = f'{request.client} - {method} "{target}" {status} {took}'
        ACCESS.info("%s", text, extra={"fields": fields})

    def _route(self, request: Request, refusal: RequestError | None) -> Response:
        """Return the route's response. Raise RequestError."""
        if refusal:
            raise refusal
        path = request.path
        request = admit(request, self.options["allow.net"], self.loader.current().credentials.value)
        if path not in self._routes:
            raise RequestError(404, "404 page not found")
        allowed = "POST, PUT" if path == "/-/reload" else "GET, HEAD"
        if request.method not in allowed.split(", "):
            raise RequestError(405, "405 method not allowed", ("Allow", allowed))
        return self._routes[path](self, request)

    def proxy(self, request: Request, steps: Any = None) -> Response:
        """Return a module's exposition, or why there is none. Append to `steps`, unless None."""
        snapshot = self.loader.snapshot
        try:
            module, pairs = choose_module(snapshot.config.value, request)
        except ScrapeError as error:
            if steps is None:
                self.metrics.fail(UNKNOWN_MODULE, "", error.reason)
            return own_response(error.reason.status, error.message)
        limits = self.limits
        wanted = request.header(SCRAPE_TIMEOUT_HEADER)
        seconds = scrape_timeout(module.timeout, wanted, self.options["timeout-offset"], limits)
        is_early = seconds < (module.timeout or limits.scrape_seconds)
        patience = limits.failure_reminder_seconds if is_early else 0
        known = snapshot.targets.get(module.name)
        with ExitStack() as cleanup:
            deadline = Deadline(seconds, client_fd=request.client_fd)
            held = Reservation(self._tools, cleanup)
            credentials = known and self.loader.refresh(module.name, known)
            parts = (module, pairs, end_to_end(request.headers), request.client, deadline, cleanup)
            job = Job(*parts, held, self._tools, credentials, steps)
            query = excerpt(urlencode(pairs, safe=":/"), 200)
            attempt = Attempt(job, self.histories[module.name], patience, query)
            try:
                check_arguments(module, pairs, limits)
                about = (module.name, module.method, module.target.shown)
                job.note(FIRST_STEP, *about, seconds, module.timeout or "none", wanted)
                found = answer_job(job)
                body = attempt.observe(found)
                response = Response(found.status, found.headers, body, cleanup.pop_all())
            except ScrapeError as error:
                status = error.reason.status or 502
                text = f"module {excerpt(module.name)}: {attempt.fail(error, error.reason, status)}"
                response = own_response(status, text)
                response.aborted = error.reason.name == "aborted"
        response.module = module.name
        return response

    def _index(self, request: Request) -> Response:
        """Return the state of the modules as HTML, or as JSON if the client accepts that."""
        outlines = {}
        for name, module in self.modules.items():
            outlines[name] = {  # nothing that may hold a secret
                "method": module.method,
                "timeout": module.timeout or None,
                "target": module.target.shown,
                "verify": module.verify,
                **self.histories[name].summary(),
            }
        if accepts(request.header("Accept"), "application/json"):
            return own_response(200, json.dumps(outlines), media_type="application/json")
        page = render_page(request.target, outlines, self)
        return own_response(200, page, POLICY, media_type="text/html; charset=utf-8")

    def _reload(self, _request: Request) -> Response:
        """Reload, if clients may ask for that. Return the problems. Raise RequestError."""
        if not self.options["web.enable-lifecycle"]:
            raise RequestError(403, "-web.enable-lifecycle is not set")
        if not self._reload_slots.acquire(blocking=False):
            raise RequestError(503, "too many requests wait for a reload, try again later")
        try:
            problems = self.reload()
        finally:
            self._reload_slots.release()
        text = "\n".join(map(str, problems))
        return own_response(500 if problems else 200, text or "expexp has reloaded.")


# ==================================================================================================
# 15  HTTP server
# ==================================================================================================
# Each connection has a slot and a thread. Reads have deadlines, and writes must make progress. A
# new connection can evict another, except one that awaits an answer or reads a scrape. IO.

POLL_SECONDS = 0.05  # between checks for a signal, a shutdown and a due watchdog
TRIM_SECONDS = 10  # between trims: glibc kept 50 MB of freed memory after ten minutes
# The start of an absolute form. The lookahead fixes the host's end: no match backtracks.
URL_START = r"(?:(?i:https?)://[^\s/?#]*(?=[\s/?#]))?"
REQUEST_LINE = re.compile(rf"(?a)(\S+) (?=\S){URL_START}(\S*) HTTP/([0-9.]+)\r?\n")


class Connections:
    """The connections that clients hold. Those that can be evicted make room for new ones."""

    def __init__(self) -> None:
        self.slots = 0  # until `fit`, and again while connections drain
        self._open: set[socket.socket] = set()  # each use of it is atomic
        self._held: WeakSet[socket.socket] = WeakSet()  # with a thread, evicted or not
        self._exposed = OrderedDict[socket.socket, bool]()  # oldest first; used atomically

    def admit(self, connection: socket.socket) -> bool:
        """Give a connection a slot. If none is free, evict another one, or return False."""
        if len(self._open) >= self.slots:
            if not self.evict():
                return False
            self._await_evicted()
        self._held.add(connection)
        self._open.add(connection)
        return True

    def _await_evicted(self) -> None:
        """Wait until few evicted connections still have a thread."""
        # A flood left 8,000 of them. Each woke 200 times a second, and expexp answered nothing.
        for _ in range(1000):  # at most a second: the loop must go on
            if len(self._held) - len(self._open) <= Limits.evicted_connections:
                return
            sleep(0.001)

    def fit(self, most: int) -> int:
        """Change the number of slots. Evict connections beyond it. Return how many are left."""
        self.slots = most
        while len(self._open) > most and self.evict():
            pass
        return len(self._open)

    def remove(self, connection: socket.socket) -> None:
        """Free a connection's slot."""
        self._open.discard(connection)
        self._held.discard(connection)
        self._exposed.pop(connection, None)

    def expose(self, connection: socket.socket) -> None:
        """Allow the eviction of a connection, after all others that can be evicted now."""
        self._exposed.pop(connection, None)
        if connection in self._open:
            self._exposed[connection] = True

    def protect(self, connection: socket.socket) -> bool:
        """Forbid the eviction of an exposed connection. Return False if it has been evicted."""
        return self._exposed.pop(connection, False)

    def evict(self) -> bool:
        """End the connection that was exposed first. Return False if none is exposed."""
        try:
            oldest, _ = self._exposed.popitem(last=False)
        except KeyError:
            return False
        self._open.discard(oldest)
        self._exposed.pop(oldest, None)  # its thread may have exposed it meanwhile
        with suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread
        return True

    def drain(self, seconds: float) -> bool:
        """Evict connections, wait for the others. Return whether all have ended in time."""
        end = monotonic() + seconds
        while self.fit(0) and monotonic() < end:
            sleep(0.01)
        return not self._open


def handshake_fault(error: Exception) -> str:
    """Return the name in HANDSHAKE_FAULTS for an error in a client's handshake."""
    reason = str(getattr(error, "reason", "EOF"))
    if isinstance(error, (TimeoutError, ScrapeError)):
        return "timeout"
    is_refused = isinstance(error, (CertificateError, UnicodeError))  # UnicodeError: a bad name
    if is_refused or re.search("CERTIFICATE|UNKNOWN_CA", reason):  # or the client refused ours
        return "certificate"
    # "Closed before" are Python's words for a reset.
    return "closed" if re.search("EOF|Closed before", reason) else "protocol"


def read_request(wire: Wire, limits: Limits, client: str, scheme: str) -> Request:
    """Return a request. Raise RequestError if malformed, else OSError, EOFError or ScrapeError."""
    line = wire.read_through(LINE_END, limits.request_line_bytes)
    if line in (b"\r\n", b"\n"):  # RFC 9112, 2.2: one empty line before a request is ignored
        line = wire.read_through(LINE_END, limits.request_line_bytes)
    if len(line) > limits.request_line_bytes:
        raise RequestError(414, "the request line is too long")
    found = REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if not found:  # also for a bare `GET /` of HTTP/0.9
        raise RequestError(400, "malformed request line")
    method, target, version = found.groups()
    if version not in ("1.0", "1.1"):
        raise RequestError(505, "expected HTTP/1.0 or HTTP/1.1")
    headers = read_header_block(wire, limits.header_block_bytes, STRICT_HEADER)
    hosts = len(values_of(headers, "Host"))
    if hosts != 1 and version == "1.1":  # RFC 9112, 3.2
        raise RequestError(400, f"expected one header Host, found {hosts}: send exactly one")
    descriptor = wire.connection.fileno()
    return Request(method, target or "/", headers, client, scheme, version, descriptor)


class ClientConnection(socketserver.BaseRequestHandler):
    """One connection of a client, plain or with TLS, from its first byte to its last."""

    server: Server

    def setup(self) -> None:
        """Prepare the connection. Do not wait for the client."""
        self._client = str(parse_client_address(self.client_address[0]))
        self._limits = self.server.limits
        self._application = self.server.application
        self._snapshot = self._application.loader.current()
        self._socket: socket.socket = self.request  # plain, also below TLS
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._is_closing = False
        self._wire = Wire(self._socket, Deadline(self._limits.handshake_seconds))

    def handle(self) -> None:
        """Shake hands if the listener speaks TLS, then answer requests."""
        try:
            if self.server.speaks_tls:
                self._shake_hands()
        except (OSError, ScrapeError, UnicodeError) as error:
            fault = handshake_fault(error)
            self._application.metrics.increment("expexp_tls_handshake_failures_total", fault)
            LOGGER.info("%s: TLS handshake failed: %s: %s", self._client, fault, words_of(error))
            self._wire.close()  # no close_notify: OpenSSL then forgets the session
            if fault not in ("timeout", "closed"):
                self._discard()  # or else the alert could be lost
            return
        self._wire.deadline = Deadline(self._limits.header_seconds)
        try:
            while not self._is_closing:
                self._answer()
        except (OSError, EOFError, ScrapeError) as error:
            LOGGER.debug("%s: %s", self._client, error)

    def _shake_hands(self) -> None:
        """Shake hands, check the certificate. Raise OSError, UnicodeError or ScrapeError."""
        first = self._wire.attempt(self._socket.recv, POLLIN, 1, socket.MSG_PEEK)
        tls: Any = self._snapshot.credentials.value.tls
        if first not in (b"\x16", b""):  # 0x16 begins a handshake: RFC 8446, 5.1; empty: closed
            self._application.metrics.increment("expexp_tls_handshake_failures_total", "plain_http")
            return
        # Wrap a duplicate: wrapping detaches a socket, but the server evicts by the original one.
        self._wire = Wire(self._socket.dup(), self._wire.deadline)
        certificate = self._wire.start_tls(tls.context, server_side=True).getpeercert() or {}
        # OpenSSL does not verify a resumed TLS 1.2 session, and `ssl` cannot forbid resumption.
        if certificate and ssl.cert_time_to_seconds(str(certificate["notAfter"])) < time.time():
            raise CertificateError("certificate has expired")
        pattern = self._application.options["web.tls.certmatch"]
        tls.check(certificate, pattern, self._limits.certmatch_seconds)

    def finish(self) -> None:
        """Send close_notify and close the duplicate socket. The server closes the plain one."""
        if isinstance(self._wire.connection, ssl.SSLSocket):
            with suppress(OSError, ValueError):
                self._wire.connection.unwrap()
            self._wire.close()

    def _discard(self) -> None:
        """Discard what the client still sends: closing at once could destroy the answer."""
        self.server.connections.expose(self._socket)
        self.finish()
        wire = Wire(self._socket, Deadline(self._limits.unread_seconds))
        left = self._limits.unread_bytes
        with suppress(OSError, ScrapeError):
            self._socket.shutdown(socket.SHUT_WR)
            while left > 0 and (piece := wire.receive(PIECE_BYTES)):
                left -= len(piece)

    def _answer(self) -> None:
        """Answer the next request. Close the connection if the client has closed its side."""
        self._is_closing = True
        self.server.connections.expose(self._socket)
        arrived = self._wire.await_data()
        snapshot = self._application.loader.current()
        # Do not answer a client that was admitted under rules that have changed since.
        if not arrived or (self.server.speaks_tls and snapshot.trust != self._snapshot.trust):
            return
        self._wire.deadline = Deadline(self._limits.header_seconds)
        request = Request("-", "-", (), self._client)
        refusal = None
        try:
            request = read_request(self._wire, self._limits, self._client, self.server.scheme)
        except RequestError as error:
            refusal = error
        except (TimeoutError, ScrapeError):
            refusal = RequestError(408, "the request did not arrive in time")
        if not self.server.connections.protect(self._socket):
            return  # evicted: a slow request keeps no slot
        if self.server.speaks_tls and self._wire.connection is self._socket:
            refusal = RequestError(400, "Client sent an HTTP request to an HTTPS server.")
        length = request.header("Content-Length").strip(" 0")
        is_unread = bool(refusal or length or request.header("Transfer-Encoding"))
        is_stale = snapshot[:2] != self._snapshot[:2]  # other configuration or credentials
        self._is_closing = is_unread or is_stale or not request.keeps_connection
        response = self._application.handle(request, refusal)
        self._is_closing |= response.aborted  # the client has shut down its sending side
        # Requests to modules are bounded. Any other client that does not read can be evicted.
        if not response.module or response.status != OK:
            self.server.connections.expose(self._socket)
        self._write(response, request)
        if is_unread:
            self._discard()
        self._wire.deadline = Deadline(self._limits.idle_seconds)

    def _write(self, response: Response, request: Request) -> None:
        """Send a response. Reset the connection if that fails. Raise OSError or ScrapeError."""
        stall = self._limits.write_stall_seconds
        with response.cleanup:
            response.aborted = True
            try:
                for piece in self._pieces(response, request):
                    # A streamed body as a whole also ends at the deadline of its scrape.
                    seconds = stall + len(piece) / self._limits.write_bytes_per_second
                    self._wire.deadline = Deadline(seconds, longest_wait=stall)
                    self._wire.send(piece)
                response.aborted = False
            finally:
                if response.aborted:  # to an HTTP/1.0 client a plain close is a complete body
                    linger = struct.pack("ii", 1, 0)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self._wire.close()
                    self._socket.close()

    def _pieces(self, response: Response, request: Request) -> Iterator[bytes | memoryview]:
        """Yield head and body, as one piece if they are small."""
        headers = list(response.headers)
        given = dict(headers)
        body = response.body
        if response.status in BODILESS:
            body = b""
        elif isinstance(body, bytes):
            headers.append(("Content-Length", str(len(body))))
        elif "Content-Length" not in given:
            if request.version == "1.0":
                self._is_closing = True  # only closing ends the body
            else:
                headers.append(("Transfer-Encoding", "chunked"))
                pieces = itertools.chain(body, [b""])  # RFC 9112, 7.1: the last chunk is empty
                body = (b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        if request.method == "HEAD":
            body = b""
        if "Date" not in given:
            headers.append(("Date", utc_time(int(time.time()), "%a, %d %b %Y %H:%M:%S GMT")))
        self._is_closing |= not self.server.connections.slots
        headers.append(("Connection", "close" if self._is_closing else "keep-alive"))
        phrase = http.client.responses.get(response.status, "")
        head = render_head(f"HTTP/1.1 {response.status} {phrase}", headers)
        if isinstance(body, bytes):
            yield head + body[:PIECE_BYTES]
            yield memoryview(body)[PIECE_BYTES:]
        else:
            yield head
            yield from body


class Server(http.server.ThreadingHTTPServer):
    """A listener. Several may share connections and application."""

    request_queue_size = 1024
    allow_reuse_port = False  # two that listen on one port would share its requests

    def __init__(
        self, address: Address, speaks_tls: bool, application: Application, connections: Connections
    ) -> None:
        """Bind and listen: to IPv4 and IPv6 for `::` or no host. Raise OSError, UnicodeError."""
        self.application = application
        self.connections = connections
        self.limits = application.limits
        self.speaks_tls = speaks_tls
        self.scheme = "https" if speaks_tls else "http"
        host, port = address
        if not host:
            host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - as asked
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = found[0]
        super().__init__(found[-1], ClientConnection)
        self.service_actions()
        bound: Any = self.server_address
        self.url = f"{self.scheme}://{render_address(bound[:2])}"
        self.is_loopback = parse_client_address(bound[0]).is_loopback

    def server_bind(self) -> None:
        """Bind, `::` to IPv4 as well. http.server would also look up our own name."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    def serve_forever(self, poll_interval: float = POLL_SECONDS) -> None:
        """Accept clients until `shutdown`, also after memory has run out."""
        while True:
            try:
                return super().serve_forever(poll_interval)
            except (MemoryError, RuntimeError):  # noqa: PERF203 - this thread must not end
                sleep(self.limits.accept_pause_seconds)

    def service_actions(self) -> None:
        """Note that the loop runs, for systemd's watchdog. Fit the slots to the descriptors."""
        self.ran_at = monotonic()
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # prlimit(1) may have lowered it
        most = min(self.limits.connections, soft // self.limits.connection_descriptors)
        self.application.metrics.set(expexp_open_connections=self.connections.fit(most))

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a client. Make room after any failure, such as EMFILE. Raise OSError."""
        try:
            return self.socket.accept()
        except OSError:
            self._make_room()
            raise

    def _make_room(self) -> None:
        """Evict a batch of connections. Give their threads a moment to end."""
        for _ in range(16):  # with one, a scrape behind 300 idle clients waits for 15 s
            self.connections.evict()
        sleep(self.limits.accept_pause_seconds)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own. Close it if there is no slot or no thread."""
        attempts = 4 if self.connections.admit(request) else 0
        for _ in range(attempts):  # `Thread.start` waits for ever if a new thread finds no memory
            try:
                self.connections.expose(request)  # a thread may die before it runs
                _thread.start_new_thread(self.process_request_thread, (request, client_address))
            except (MemoryError, RuntimeError):  # noqa: PERF203 - it is tried again
                self.connections.protect(request)
                self._make_room()
            else:
                return
        LOGGER.debug("%s: closed: no slot or no thread is free", client_address[0])
        self.application.metrics.increment("expexp_rejected_connections_total")
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and free its slot."""
        self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """Log an unexpected error."""
        LOGGER.error("unexpected error in serving %s", client_address[0], exc_info=sys.exc_info())


# ==================================================================================================
# 16  Command line
# ==================================================================================================
# Builds the parts, waits for a signal, and stops them. Importing this file runs nothing. IO.

PRIORITIES = ("", "<7>", "<6>", "<4>", "<3>", "<2>", "<5>")  # of syslog(3), by `level // 10`


class LogFormatter(logging.Formatter):
    """Formats a record as JSON or `key=value` (FATAL: plain text), of at most `most_bytes`."""

    def __init__(self, as_json: bool, most_bytes: int, for_journal: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._most = most_bytes
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. A long message loses its middle, because a trace ends in its cause."""
        message = super().format(record)
        created = utc_time(int(record.created))
        level = record.levelname.lower()
        fields = getattr(record, "fields", {})
        while True:
            if self._as_json:
                line = json.dumps({"level": level, "msg": message, "time": created, **fields})
            elif record.levelno == logging.CRITICAL:  # why expexp does not start
                line = message
            else:
                quoted = json.dumps(message, ensure_ascii=not message.isprintable())
                line = f'time="{created}" level={level} msg={quoted}'
            if self._for_journal:
                line = PRIORITIES[record.levelno // 10] + line
            if len(line.encode("utf-8", "replace")) <= self._most:
                return line
            if not fields:
                half = len(message) * 7 // 16
                message = f"{message[:half]}...{message[-half:]}"
            fields = {}  # the message says the most important


class LogWriter(logging.Handler):
    """Queues log lines for a thread that writes them. A full pipe must not block other threads."""

    def __init__(self, descriptor: int, limits: Limits, metrics: SelfMetrics) -> None:
        super().__init__()
        self._descriptor = descriptor  # it stays blocking: other processes share it
        self._limits = limits
        self._metrics = metrics
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_lines, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of a record, or drop it. The handler's lock admits one thread."""
        with suppress(MemoryError, RuntimeError):
            if self._lines.qsize() < self._limits.log_queue_lines:
                self._lines.put(f"{self.format(record)}\n".encode("utf-8", "replace"))
                return
        self._drop()

    def stop(self) -> None:
        """Wait until all lines are written, at most `log_flush_seconds`."""
        self._lines.put(b"")
        self._thread.join(self._limits.log_flush_seconds)

    def _write_lines(self) -> None:
        """Write lines until `stop`. Drop a line that cannot be written."""
        rest = b""
        while line := self._lines.get():
            try:
                rest = (rest and b"\n") + line  # a full disk may have cut the previous line
                while rest:  # a terminal or a socket can take a part
                    rest = rest[os.write(self._descriptor, rest) :]
            except (OSError, MemoryError):  # noqa: PERF203 - the next line may be written
                self._drop()

    def _drop(self) -> None:
        """Count a dropped line."""
        with suppress(MemoryError):
            self._metrics.increment("expexp_log_lines_dropped_total")


def set_up_logging(handler: logging.Handler, options: Options, limits: Limits) -> None:
    """Log to this handler with the level and format of the flags."""
    for_journal = False
    with suppress(OSError):  # systemd.exec(5): the variable names the journal's device and inode
        found = os.fstat(2)
        for_journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    handler.setFormatter(LogFormatter(options["log.json"], limits.log_line_bytes - 1, for_journal))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(options["log.level"])
    ACCESS.setLevel(logging.INFO if options["log.access"] else 0)  # 0: as LOGGER
    logging.addLevelName(logging.CRITICAL, "FATAL")
    logging.addLevelName(NOTICE, "NOTICE")
    logging.logThreads = False  # or `threading` keeps an object for each thread, to name it
    logging.raiseExceptions = False  # a closed stderr must not stop a scrape


def log_thread_error(ended: Any) -> None:
    """Log the error that ended a thread. Python's own hook would block on a full stderr."""
    LOGGER.error("unexpected error in a thread", exc_info=ended.exc_value)


def tell(text: str) -> None:
    """Write to stderr, if there is one."""
    with suppress(AttributeError, OSError):
        sys.stderr.write(text)


def fit_descriptors(limits: Limits) -> tuple[Limits, int]:
    """Set the soft limit of descriptors. Return fitting limits, and the former soft limit. IO."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min({hard, limits.file_descriptors} - {resource.RLIM_INFINITY})
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    connections = min(limits.connections, most // limits.connection_descriptors)
    return dataclasses.replace(limits, connections=connections), soft


class Program:
    """All parts of a running expexp. Raise ConfigError if something is wrong at the start."""

    def __init__(self, options: Options, limits: Limits) -> None:
        limits, former_descriptors = fit_descriptors(limits)
        metrics = SelfMetrics()
        python = platform.python_version()
        metrics.increment("expexp_build_info", __version__, python)
        metrics.increment("build_info", __version__, REVISION, "unknown", f"python{python}")
        implementation = platform.python_implementation()
        metrics.increment("python_info", implementation, *python.split("."), python)
        self.loader = Loader(options, limits)
        self.commands = Commands(limits, former_descriptors)
        self.application = Application(self.loader, options, Tools(limits, self.commands, metrics))
        self.connections = Connections()
        self.servers: list[Server] = []
        self._is_ending = False
        self._no_reload = Lock()  # held until SIGHUP releases it, and taken by the reload
        self._no_reload.acquire()
        if not self.application.modules:
            LOGGER.error("no modules loaded from any config file")

    def listen(self) -> None:
        """Bind all listeners. Warn of what is exposed. Raise ConfigError."""
        plain = self.application.options["web.listen-address"]
        secure = self.application.options["web.tls.listen-address"]
        has_tls = self.loader.snapshot.credentials.value.tls is not None
        # TLS without a listener of its own is served on the plain one.
        for address, speaks_tls in ((plain, has_tls and not secure), (secure, True)):
            if address:
                try:
                    server = Server(address, speaks_tls, self.application, self.connections)
                except (OSError, UnicodeError) as error:
                    message = f"cannot listen on {render_address(address)}: {words_of(error)}"
                    raise ConfigError(Problem("", 0, 0, "", message)) from None
                self.servers.append(server)
        self.application.addresses = ", ".join([server.url for server in self.servers])
        self._log_exposure()

    def _log_exposure(self) -> None:
        """Warn of plain HTTP beside TLS, and if anyone can add arguments to commands."""
        protections = self.loader.snapshot.credentials.value.protections
        exposed = [server for server in self.servers if not server.is_loopback]
        plain = [server.url for server in exposed if not server.speaks_tls]
        if plain and "TLS" in protections:
            LOGGER.warning("plain HTTP is still served beside TLS: %s", ", ".join(plain))
        is_open = plain or (exposed and "client certificates" not in protections)
        is_guarded = self.application.options["allow.net"] or "authentication" in protections
        modules = [each for each in self.application.modules.values() if each.method == "exec"]
        names = [each.name for each in modules if each.accept_args or each.accept_params]
        if names and is_open and not is_guarded:
            LOGGER.warning(
                "anyone who reaches this port can add arguments to the commands of %s: set "
                "accept_args and accept_params, -allow.net, -web.config.file or -web.tls.verify",
                excerpt(", ".join(names), 200),
            )

    def status(self) -> str:
        """Return the line STATUS for systemd."""
        known = self.application.modules
        since = [self.application.histories[name].summary()["failing_since"] for name in known]
        return f"STATUS={len(known)} modules, {len(since) - since.count(None)} failing"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then finish what runs."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, no child can be waited for
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            LOGGER.info("listening on %s", server.url)
        started = (__version__, len(self.application.modules), self.application.access())
        LOGGER.log(NOTICE, "expexp %s started: %d modules, %s", *started)
        notify(f"READY=1\n{self.status()}")
        # A reload can hang in a file system. This thread must still be able to end the program.
        threading.Thread(target=self._keep_reloading, daemon=True).start()
        is_ours = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        microseconds = os.environ.get("WATCHDOG_USEC") if is_ours else None
        seconds = float(microseconds or inf) / 4e6  # a quarter; systemd recommends a half
        notified = monotonic()
        while not self._is_ending:
            try:
                sleep(POLL_SECONDS)
                now = monotonic()
                if now % TRIM_SECONDS < POLL_SECONDS:  # musl has no malloc_trim: `int` does nothing
                    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
                    notify(self.status())
                if now - notified >= seconds >= now - min(each.ran_at for each in self.servers):
                    notified = now
                    notify("WATCHDOG=1")
            except (MemoryError, OSError):  # noqa: PERF203 - this thread must not end
                continue
        LOGGER.log(NOTICE, "stopping")
        self.stop()

    def _note_signal(self, number: int, _frame: Any) -> None:
        """Note a signal without a wait: with a `threading.Event`, 5 of 30 runs hung."""
        if number != signal.SIGHUP:
            self._is_ending = True
        else:
            with suppress(RuntimeError):  # another signal has released it
                self._no_reload.release()

    def _keep_reloading(self) -> None:
        """Reload after a signal, and after a change of files with -config.auto-reload-interval."""
        seconds = self.application.options["config.auto-reload-interval"] or -1  # -1: for ever
        found: Any = None
        while True:
            try:
                is_wanted = self._no_reload.acquire(timeout=seconds)
                former = found
                config = self.loader.snapshot.config
                found = config.fingerprints()
                if is_wanted or (found == former and config.is_due()):  # no file is being written
                    self.application.reload()
            except (MemoryError, RuntimeError, RequestError):  # noqa: PERF203 - go on
                sleep(self.application.limits.accept_pause_seconds)

    def stop(self) -> None:
        """Stop accepting, finish what runs, end commands."""
        notify("STOPPING=1")
        for server in self.servers:
            server.shutdown()
            server.server_close()
        if not self.connections.drain(self.application.limits.drain_seconds):
            LOGGER.warning("stopped with requests unfinished")
        self.commands.end_all()


def read_input(name: str, limits: Limits) -> bytes:
    """Return the content of a file, `-` for stdin. Raise OSError or ScrapeError. IO."""
    with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
        body = file.read(limits.body_bytes + 1)
    check_size(limits, len(body))
    return body


def point_at(line: bytes, column: int) -> str:
    """Return the escaped text around a column of a line, and a caret below the column."""
    text = line.decode("utf-8" if is_utf8(line) else "latin-1")  # columns are bytes in the latter
    before = excerpt(text[: column - 1][-59:], 200)
    rest = excerpt(text[column - 1 :], 60)
    caret = " " * len(before) + "^"
    return f"    {before}{rest}\n    {caret}\n"


def verify_file(name: str, options: Options, limits: Limits) -> int:
    """Verify a file, write the verdict to stdout, and return the exit code of -verify. IO."""
    shown = "<stdin>" if name == "-" else excerpt(name, 200)
    code = 0
    try:
        body = read_input(name, limits)
        content_type = options["verify.content-type"] or text_scrape(body).headers[0][1]
        try:
            text = f"{shown}: well-formed, samples: {verify_exposition(body, content_type)}\n"
        except ExpositionError as error:
            code = 1
            text = f"{shown}: {error}\n"
            if error.line:  # 0 in protobuf
                text = f"{shown}:{error.line}:{error.column}: {error.message}\n"
                text += point_at(error.text, error.column)
        os.write(1, text.encode("utf-8", "replace"))
    except (OSError, ScrapeError) as error:
        tell(f"{shown}: cannot be read or reported: {words_of(error)}\n")
        code = 2
    return code


def explain_module(options: Options, limits: Limits) -> int:
    """Explain a scrape on stdout, and return the exit code of -explain. IO."""
    program = Program(options, limits)
    target = "?" + urlencode({"module": options["explain"]})
    request = Request("GET", target, (), "127.0.0.1", is_trusted=True)
    response: Any = explain(program.application, request)
    program.commands.end_all()
    with suppress(OSError):
        os.write(1, response.body)
    user: Any = os.geteuid()
    with suppress(KeyError):  # in a container a user may have no name
        user = pwd.getpwuid(user).pw_name
    tell(f"scraped as the user {user}\n")
    return int(not response.body.startswith(b"200"))


def perform(options: Options, limits: Limits) -> int:
    """Do what the flags ask for. Return the exit code. Raise FlagError or ConfigError."""
    if options["verify.content-type"] and not options["verify"]:
        raise FlagError("flag -verify.content-type needs -verify.")
    if options["help"]:
        with suppress(OSError):
            os.write(1, render_usage().encode())
    elif options["version"]:
        tell(f"expexp {__version__} (revision {REVISION}, Python {platform.python_version()})\n")
    elif options["verify"]:
        return max(verify_file(name, options, limits) for name in options["verify"])
    elif options["explain"]:
        return explain_module(options, limits)
    elif options["config.check"]:
        config, credentials, targets, _ = Program(options, limits).loader.snapshot
        warned = sum(len(part.warnings) for part in (config, credentials, *targets.values()))
        tell(f"0 problems, {warned} warnings, modules: {len(config.value.modules)}\n")
    elif options["web.listen-address"] or options["web.tls.listen-address"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it must not end expexp while it starts
        program = Program(options, limits)
        program.listen()
        # After 40 bodies of 50 MB, 1.5 GB stayed. A threshold of 256 KiB would slow Python 3.9.
        with suppress(OSError, AttributeError):  # musl has no mallopt
            ctypes.CDLL(None).mallopt(-3, MEBIBYTE)  # M_MMAP_THRESHOLD
        # Without a stderr, descriptor 2 may become a client's.
        writer = LogWriter(2 if sys.stderr else -1, limits, program.application.metrics)
        set_up_logging(writer, options, limits)
        threading.excepthook = log_thread_error
        sys.unraisablehook = log_thread_error  # for threads that `threading` does not know
        program.run()
        writer.stop()
    else:
        LOGGER.warning("No web addresses to listen on, nothing to do!")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run expexp with these arguments, or the command line's. Return the exit code."""
    limits = Limits()
    try:
        options = parse_flags(sys.argv[1:] if argv is None else argv)
        set_up_logging(logging.StreamHandler(sys.stderr), options, limits)
        return perform(options, limits)
    except FlagError as error:
        tell(f"{error} See -help\n")
        return 2
    except ConfigError as error:
        for problem in error.args:
            LOGGER.critical("%s", problem, extra={"fields": problem._asdict()})
        if len(error.args) > 1:
            LOGGER.critical("%d problems", len(error.args))
        return 1


if __name__ == "__main__":
    sys.exit(main())
