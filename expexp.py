#!/usr/bin/env python3
"""expexp puts every Prometheus exporter of a host behind one port.

    python3 expexp.py -config expexp.yaml
    curl 'http://localhost:9999/proxy?module=NAME'

`GET /proxy?module=NAME` fetches that exporter over HTTP, runs that command or reads that file,
verifies that the result is a Prometheus exposition, and answers with it. `up` then means what it
would mean if the exporter were scraped directly. It takes over from exporter_exporter: same flags,
same configuration, same metrics.

What this program does to your host: it listens on the ports you name, connects to the targets in
its configuration, runs the commands and reads the files in its configuration. Nothing else: it
writes no file, starts no shell, loads no plugin, follows no redirect and uses no proxy of the
environment. Every wait has a deadline and every quantity that comes from outside a limit.

Endpoints: /proxy (flag -web.proxy-path), /metrics (-web.telemetry-path), / (the modules, as HTML or
JSON), /-/healthy and /-/ready. Exit codes: 0 stopped by a signal or nothing to do, 1 bad
configuration or a port in use, 2 bad flags.

Needs Python 3.9 or later, and PyYAML for a configuration in YAML (one in JSON does without).
To be read once, from top to bottom: nothing is used in a section above the one that defines it.

Contents:
  1  Constants and limits
  2  What can go wrong
  3  Small values
  4  Exposition: grammar
  5  Exposition: reading lines
  6  Exposition: verdict
  7  Self-metrics
  8  Flags
  9  Configuration
 10  Loading
 11  Scraping targets
 12  Application
 13  HTTP server
 14  Command line

Specifications: the text format 0.0.4 and Prometheus's own parser of it
(prometheus.io/docs/instrumenting/exposition_formats), HTTP/1.1 (RFC 9110 and 9112).

Licensed under the Apache License, Version 2.0.
"""

from __future__ import annotations

import base64
import codecs
import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gzip
import hmac
import html
import http
import http.client
import http.server
import io
import ipaddress
import json
import logging
import math
import os
import platform
import queue
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, Final, NamedTuple, Union, cast

try:
    import yaml
except ImportError:  # a host without PyYAML can still use a configuration in JSON
    yaml = None  # type: ignore[assignment]

__version__ = "1.0.0"
__all__ = ["ExpositionError", "main", "verify_exposition"]

# ==================================================================================================
# 1  Constants and limits
# ==================================================================================================
# Every quantity that comes from outside has its bound in `Limits`, with the reason beside it. The
# README's table of limits is checked against this one.

TEXT_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN_CONTENT_TYPE: Final = "text/plain; charset=utf-8"
SCRAPE_TIMEOUT_HEADER: Final = "X-Prometheus-Scrape-Timeout-Seconds"
MEBIBYTE: Final = 1 << 20
PIECE_BYTES: Final = 1 << 16
LAST_PORT: Final = 65535
UNKNOWN_MODULE: Final = "unknown"  # one label value for all of them: clients create no series
# RFC 9110, 7.6.1, and those that describe a body which is read and sent anew.
HOP_BY_HOP: Final = (
    "connection|keep-alive|proxy-authenticate|proxy-authorization|proxy-connection|te|trailer|"
    "transfer-encoding|upgrade|content-length|expect"
)
TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2: a header's name


def limit(default: float, why: str) -> Any:
    """A field of `Limits`: its default and the reason for it."""
    return dataclasses.field(default=default, metadata={"documentation": why})


@dataclass(frozen=True)
class Limits:
    """Every bound on what comes from outside; units end the names."""

    connections: int = limit(512, "one thread each; idle ones make room when all are taken")
    file_descriptors: int = limit(8192, "the soft limit becomes this or the hard limit")
    accept_pause_seconds: float = limit(0.05, "without descriptors: accepting must not spin")
    request_line_bytes: int = limit(8192, "the longest sensible query names a blackbox target")
    header_block_bytes: int = limit(32768, "all headers of a request")
    header_seconds: float = limit(10, "to send a request's line and headers: slow-loris")
    write_stall_seconds: float = limit(30, "a client that does not read must not keep a slot")
    idle_seconds: float = limit(180, "an idle connection: longer than the usual scrape interval")
    unread_bytes: int = limit(262144, "a request's body, read away so that the answer arrives")
    unread_seconds: float = limit(2, "for reading it away")
    body_bytes: int = limit(256 * MEBIBYTE, "a target's body, also decoded; output; a file")
    held_bytes: int = limit(512 * MEBIBYTE, "the bodies of all requests together, then busy")
    config_bytes: int = limit(16 * MEBIBYTE, "a configuration file")
    arguments: int = limit(32, "`args` and `params` of one request")
    argument_bytes: int = limit(256, "one of them")
    resolver_threads: int = limit(8, "name look-ups under way at once")
    stderr_bytes: int = limit(4096, "a failing command's last words, for the log")
    log_line_characters: int = limit(8192, "the message of a log line")
    scrape_seconds: float = limit(60, "a scrape where neither module nor client says less")
    longest_scrape_seconds: float = limit(86400, "a scrape, whatever module and client say")
    term_to_kill_seconds: float = limit(0.5, "for a command's group to end; off the request's path")
    drain_seconds: float = limit(10, "to finish requests at shutdown: below systemd's own limit")
    failure_reminder_seconds: float = limit(300, "between warnings of a module that keeps failing")


# ==================================================================================================
# 2  What can go wrong
# ==================================================================================================
# Three errors, split by who must act: the operator (ConfigError), the client (RequestError), the
# target (ScrapeError). What differs inside one of them is data, not a subclass. REASONS is the one
# table from which statuses, counters and the README's list of failures come.

ALL_METHODS: Final = ("http", "exec", "file")


def rows(table: str) -> list[list[str]]:
    """The cells of a table in a text, which two blanks or more separate."""
    return [re.split(" {2,}", line) for line in table.strip().splitlines()]


def names_of(cell: str) -> tuple[str, ...]:
    """The names in a cell of such a table; `-` is none."""
    return tuple(cell.strip("-").split())


class Reason(NamedTuple):
    """Why a proxied request failed: a value of the label `reason`, and what follows from it."""

    name: str
    status: int  # of the answer; 0: the target's, or none any more
    methods: tuple[str, ...]  # of the modules that can fail this way; none: there is no module
    counters: tuple[str, ...]  # of the original, expexp_..._total, to be raised as well
    documentation: str


REASONS: Final = {
    name: Reason(name, int(status), names_of(methods), names_of(counters), documentation)
    for name, status, methods, counters, documentation in rows("""
bad_arguments   400  http exec       -                         no module; args or params refused
unknown_module  404  -               -                         counted under module="unknown"
malformed       500  http exec file  malformed_content_errors  not verified, gzip broken
command         500  exec            command_fails             not started, status not 0, killed
file            500  file            file_fails                missing, unreadable, no file or FIFO
unreachable     502  http            -                         not resolved, refused, reset, TLS
truncated       502  http            -                         less than announced, invalid chunks
protocol        502  http            -                         not HTTP, endless headers, a 1xx
too_large       502  http exec file  -                         body, decoded body, output over limit
busy            503  http exec file  -                         too many bodies in memory
timeout         504  http exec file  proxy_timeout_errors      the deadline, wherever it struck
status            0  http            -                         other than 200: passed on as it is
aborted           0  http            -                         after the status was sent: reset
    """)
}


def excerpt(text: str | bytes, limit: int = 80) -> str:
    """The beginning of a foreign text, fit for one line: escaped where not printable, bounded."""
    if isinstance(text, bytes):
        text = text[: 4 * limit + 4].decode("utf-8", "backslashreplace")
    shown = (char if char.isprintable() else ascii(char)[1:-1] for char in text[:limit])
    return "".join(shown) + ("..." if len(text) > limit else "")


class ExpexpError(Exception):
    """The base of all errors that expexp raises on purpose."""


class Problem(NamedTuple):
    """One thing wrong with the configuration; line 0 where a place has no line (JSON)."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        """`expexp.yaml:12:5: modules.node.http.prot: unknown key`."""
        file, path = excerpt(self.file, 200), excerpt(self.path, 200)
        place = f"{file}:{self.line}:{self.column}" if self.line else file
        return ": ".join(part for part in (place, path, self.message) if part)


class ConfigError(ExpexpError):
    """The configuration cannot be used; for the operator. `problems` has all of them, sorted."""

    def __init__(self, *problems: Problem) -> None:
        """Sort the problems by file and line."""
        self.problems = sorted(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RequestError(ExpexpError):
    """A request is refused before any module is asked; for the client."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        """Keep the status, the text for the client and headers such as `Allow`."""
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class ScrapeError(ExpexpError):
    """A scrape failed; `reason` is one of REASONS, `detail` is for the log alone."""

    def __init__(self, reason: str, message: str, detail: str = "") -> None:
        """Look the reason up."""
        super().__init__(message)
        self.reason, self.message, self.detail = REASONS[reason], message, detail


class ExpositionError(ExpexpError):
    """A body is no exposition. `line` and `column` are 1-based; `message` says what is wrong."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        """Keep the position and the message."""
        super().__init__(f"line {line}, column {column}: {message}")
        self.line, self.column, self.message = line, column, message


# ==================================================================================================
# 3  Small values
# ==================================================================================================
# Values that several sections share. Pure: texts and numbers in, values out. A closed list.


class Secret:
    """A text that shows itself only when asked to: never in a page, log, error, repr or metric."""

    def __init__(self, text: str) -> None:
        """Wrap the text."""
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        """Always the same, whatever is inside."""
        return "<secret>"


class Deadline:
    """The moment by which a scrape must be over; every wait of the scrape counts against it."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """Start now, for so many seconds."""
        self._seconds, self._clock, self._at = seconds, clock, clock() + seconds

    def error(self) -> ScrapeError:
        """The error to raise when it has passed."""
        return ScrapeError("timeout", f"timed out after {self._seconds:.3g} s")

    def check(self) -> None:
        """Raise ScrapeError("timeout") when it has passed."""
        self.remaining()

    def remaining(self) -> float:
        """Seconds that remain, more than 0; raises ScrapeError("timeout") when none do."""
        seconds = self._at - self._clock()
        if seconds <= 0:
            raise self.error()
        return seconds


DURATION_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
DURATION_PART: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})(ns|us|ms|s|m|h)")


def parse_duration(text: str) -> float:
    """Seconds of a duration as Go writes it, such as `1m30s` or `0`; ValueError otherwise."""
    micro = re.compile("[\u00b5\u03bc]s")  # with the micro sign, with a Greek mu
    plain = micro.sub("us", text.removeprefix("+"))
    parts = DURATION_PART.findall(plain)
    if text != "0" and (not parts or "".join(number + unit for number, unit in parts) != plain):
        raise ValueError(f'expected a duration such as "5s" or "1m30s", found "{excerpt(text)}"')
    return sum(float(number) * DURATION_UNITS[unit] for number, unit in parts)


def parse_listen_address(text: str) -> tuple[str, int]:
    """Host ("" for all) and port of `:9999`, `127.0.0.1:9999` or `[::1]:9999`; ValueError."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^:\[\]\s/]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > LAST_PORT:
        example = 'an address such as ":9999" or "[::1]:9999"'
        raise ValueError(f'expected {example}, found "{excerpt(text)}"')
    return found[1] or found[2] or "", int(found[3])


def parse_client_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of a client without its zone, as IPv4 where it is mapped to IPv6."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


Pairs = Sequence[tuple[bytes, bytes]]


def parse_query(query: str) -> Pairs:
    """Names and values of a query in their order, as bytes; http.server hands it on as latin-1."""
    parts = query.replace("+", " ").encode("latin-1", "replace").split(b"&")
    pairs = (part.partition(b"=") for part in parts if part)
    unquote = urllib.parse.unquote_to_bytes
    return [(unquote(name), unquote(value)) for name, _, value in pairs]


def render_query(pairs: Pairs) -> str:
    """A query that `parse_query` reads back to the same pairs."""
    return urllib.parse.urlencode(pairs)


def accepts(header: str, wanted: str) -> bool:
    """Whether a header such as Accept names the wanted value, and not with q=0."""
    for part in header.lower().replace(" ", "").split(","):
        value, *parameters = part.split(";")
        if value == wanted:
            return not any(re.fullmatch(r"q=0(?:\.0*)?", parameter) for parameter in parameters)
    return False


def scrape_timeout(module: float, header: str, offset: float, limits: Limits) -> float:
    """Seconds that a scrape may take: the least of the module's (0: none), the client's, ours.

    The client's header counts less the offset, so that our answer reaches it before it gives up;
    where that leaves nothing, half of the header's value. Nonsense in the header is ignored.
    """
    seconds = [module] if module > 0 else []
    with contextlib.suppress(ValueError):
        client = float(header)
        if 0 < client < float("inf"):
            seconds.append(client - offset if client > offset else client / 2)
    return min(*seconds, limits.longest_scrape_seconds) if seconds else limits.scrape_seconds


# ==================================================================================================
# 4  Exposition: grammar
# ==================================================================================================
# The two line formats as data: byte classes, productions made of them, and a `Dialect` for each.
# The reader of section 5 goes by runs of the classes, its fast path is composed of the productions.
# Runs of one byte class are possessive (`++`, `*+`, `}+`). Python before 3.11 does not know that;
# plain ones match the same, since nothing here is ambiguous. Of groups only the outermost is, and
# not before 3.11.5: Debian 12's 3.11.2 takes half a group for a whole one then (gh-106052).
# `(?:x|)` is `x` or nothing, faster than `(?:x)?`; a class without `^` is faster than one with.
# Authority for what is ingested: Prometheus's lexers, model/textparse/{promlex,openmetricslex}.l.


def compile_production(pattern: bytes) -> re.Pattern[bytes]:
    """Return `pattern` compiled, with plain quantifiers where Python has no possessive ones."""
    if sys.version_info < (3, 11):
        pattern = re.sub(rb"([*+?}])\+", rb"\1", pattern)
    return re.compile(pattern)


RUN_STEP: Final = 256


def compile_run(unit: bytes) -> re.Pattern[bytes]:
    """Return a run of `unit` (up to 256 bytes) for `scan`, at most 64 KiB of it at a time.

    The bound keeps one match short, so that other threads and the deadline get their turn on an
    endless token; the nesting keeps each level within what `re` repeats without recursion.
    """
    return re.compile(rb"(?:%b){1,%d}" % (unit, RUN_STEP))


# Byte classes. A name is a run of its class that does not start with a digit.
METRIC_BYTE: Final = rb"[a-zA-Z0-9_:]"
LABEL_BYTE: Final = rb"[a-zA-Z0-9_]"
METRIC_NAME: Final = rb"(?![0-9])" + METRIC_BYTE + rb"++"
LABEL_NAME: Final = rb"(?![0-9])" + LABEL_BYTE + rb"++"

# What Go's ParseFloat reads, less hexadecimal and underscores, which Prometheus refuses.
DECIMAL: Final = rb"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?"
INFINITY: Final = rb"[+-]?[iI][nN][fF](?:[iI][nN][iI][tT][yY])?"
NOT_A_NUMBER: Final = rb"[nN][aA][nN]"
NUMBER: Final = compile_production(rb"(%b)|%b|%b" % (DECIMAL, INFINITY, NOT_A_NUMBER))
MAX_TIMESTAMP: Final = b"9223372036854775807"  # int64, milliseconds

# A backslash takes the next byte with it, but no line end. Other escapes than these mean nothing.
ESCAPE: Final = re.compile(rb'\\([\\"n])')
ESCAPED: Final = {b"\\": b"\\", b'"': b'"', b"n": b"\n"}

# Runs for the reader. Prometheus's lexer skips NUL in a label value, even after a backslash, and
# after one, but stops at it in a quoted name.
METRIC_RUN: Final = compile_run(METRIC_BYTE + rb"{1,256}")
LABEL_RUN: Final = compile_run(LABEL_BYTE + rb"{1,256}")
QUOTED_NAME_RUN: Final = compile_run(rb'[^"\\\0]{1,256}|\\[^\n\0]')
TEXT_VALUE_RUN: Final = compile_run(rb'[^"\\]{1,256}|\\\0*[^\n\0]')
TEXT_TOKEN_RUN: Final = compile_run(rb"[^{ \t\n\0]{1,256}")
NUL_RUN: Final = compile_run(rb"\0{1,256}")
BLANK_RUN: Final = compile_run(rb"[ \t]{1,256}")

# Canonical forms for the fast path. Digits are bounded so that no literal can overflow.
CANONICAL_BYTE: Final = rb"[\0-\t\x0b-!#-\[\]-\xff]"  # no quote, backslash or newline
CANONICAL_VALUE: Final = rb'"%b*+(?:"|(?:\\[\\"n]%b*+)+")' % (CANONICAL_BYTE, CANONICAL_BYTE)
CANONICAL_NUMBER: Final = (
    rb"(?:-?[0-9]{1,200}+(?:\.[0-9]{1,200}+|)(?:e(?:\+?[0-9]{1,2}|-[0-9]{1,3})|)|[+-]Inf|NaN)"
)
MAX_FAST_LABELS: Final = 16  # node_os_info has 12


def compose_labels(depth: int = 0) -> bytes:
    """Return up to 16 pairs from the `depth`-th on, each with a name that none before it has."""
    taken = b"".join(rb"|(?P=l%d)=" % number for number in range(depth))
    pair = rb"(?!__name__=%b)(?P<l%d>%b)=%b" % (taken, depth, LABEL_NAME, CANONICAL_VALUE)
    if depth + 1 == MAX_FAST_LABELS:
        return pair
    return pair + rb"(?:,%b|)" % compose_labels(depth + 1)


def compose_run(metadata: bytes, timestamp: bytes) -> re.Pattern[bytes]:
    """Return a run of canonical lines, at most 500: a match holds the interpreter lock."""
    labels = rb"(?:\{%b\}|)" % compose_labels()
    sample = METRIC_NAME + labels + b" " + CANONICAL_NUMBER + rb"(?: %b|)" % timestamp
    possessive = b"+" if sys.version_info >= (3, 11, 5) else b""
    lines = rb"(?:(?:%b|# (?:%b))\n){1,500}%b" % (sample, metadata, possessive)
    return compile_production(lines)


def compose_metadata(types: tuple[bytes, ...]) -> bytes:
    """Return a canonical HELP or TYPE line, without its `# `."""
    help_line = rb"HELP %b [^\n]*+" % METRIC_NAME
    return help_line + rb"|TYPE %b (?:%b)" % (METRIC_NAME, b"|".join(types))


@dataclass(frozen=True)
class Dialect:
    """What distinguishes the two line formats; the readers know no other difference."""

    types: tuple[bytes, ...]
    token: re.Pattern[bytes]
    label_value: re.Pattern[bytes]
    fast: re.Pattern[bytes]


TEXT_TYPES: Final = (b"counter", b"gauge", b"histogram", b"summary", b"untyped")
TEXT: Final = Dialect(
    types=TEXT_TYPES,
    token=TEXT_TOKEN_RUN,
    label_value=TEXT_VALUE_RUN,
    fast=compose_run(compose_metadata(TEXT_TYPES), rb"[0-9]{1,18}+"),
)

# ==================================================================================================
# 5  Exposition: reading lines
# ==================================================================================================
# The reader defines what is accepted at the default level and makes every message. Each `read_*`
# takes a source and a position in it, and returns the position after what it read, and that. It
# raises ExpositionError and nothing else, save what the caller's `tick` raises. `tick` is called at
# every line, every label, and every 64 KiB of one token, so that no body outlives a deadline. Time
# is linear in the size of the body, whatever it holds.
# The fast path takes a run of canonical lines in one match. It accepts only what the reader accepts
# without a word; without it every verdict and every count would be the same.

CONTINUATION_BYTES: Final = bytes(range(0x80, 0xC0))  # those that do not begin a character
FOUND: Final = re.compile(rb"[^ \t\n]{1,400}")  # what a message quotes
WINDOW_BYTES: Final = 262_144  # copied to be checked for UTF-8, and the longest single match


def no_tick() -> None:
    """Return nothing: the body may take as long as it takes."""


class Source(NamedTuple):
    """A body to read. NamedTuples here, since most of them are made for every line."""

    body: bytes
    dialect: Dialect
    tick: Callable[[], None]


class Label(NamedTuple):
    """One pair in braces: its name unescaped, its value as it was written."""

    pos: int
    name: bytes
    value: bytes


class Sample(NamedTuple):
    """One line with a value, the name unescaped, the rest as it was written."""

    pos: int
    name: bytes
    labels: list[Label]
    value: bytes
    timestamp: bytes


class Metadata(NamedTuple):
    """One HELP or TYPE line."""

    pos: int
    keyword: bytes
    name: bytes
    text: bytes


Line = Union[Sample, Metadata, None]


def is_utf8(text: bytes) -> bool:
    """Return whether `text` is UTF-8; in pieces, as a decoded copy may take four times as much."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, 0 if text.isascii() else len(text), WINDOW_BYTES):
            decoder.decode(text[start : start + WINDOW_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def find_line_end(body: bytes, pos: int) -> int:
    """Return where the line at `pos` ends: at its newline, or with the body."""
    end = body.find(b"\n", pos)
    return end if end >= 0 else len(body)


def refuse(source: Source, pos: int, message: str) -> ExpositionError:
    """Return the error to raise for what stands at `pos`."""
    start = source.body.rfind(b"\n", 0, pos) + 1
    until = source.body[start:pos] + (source.body[pos : pos + 1] or b"\n")
    if is_utf8(source.body[start : find_line_end(source.body, pos)]):
        until = until.translate(None, CONTINUATION_BYTES)
    return ExpositionError(message, source.body.count(b"\n", 0, pos) + 1, len(until))


def describe(source: Source, pos: int) -> str:
    """Return what stands at `pos`, in words or in quotes."""
    found = FOUND.match(source.body, pos)
    if found:
        return f'"{excerpt(found[0])}"'
    names = {b"": "the end of the body", b"\n": "the end of the line"}
    return names.get(peek(source, pos), "a blank")


def expected(source: Source, pos: int, what: str) -> ExpositionError:
    """Return the error for `what` missing at `pos`; it quotes what stands there instead."""
    return refuse(source, pos, f"expected {what}, found {describe(source, pos)}")


def peek(source: Source, pos: int) -> bytes:
    """Return the byte at `pos`, nothing at the end of the body."""
    return source.body[pos : pos + 1]


def scan(source: Source, pos: int, run: re.Pattern[bytes]) -> int:
    """Return the end of the longest repetition of `run` from `pos` on."""
    while True:
        found = run.match(source.body, pos)
        end = found.end() if found else pos
        if end - pos < RUN_STEP:  # what compile_run matches is shorter only where the run ends
            return end
        source.tick()
        pos = end


def skip_blanks(source: Source, pos: int) -> int:
    """Return the position of the next byte that is no blank."""
    return scan(source, pos, BLANK_RUN) if peek(source, pos) in (b" ", b"\t") else pos


def read_quoted(source: Source, pos: int, run: re.Pattern[bytes]) -> tuple[int, bytes]:
    """Return what stands between the quote at `pos` and the one that closes it, not unescaped."""
    end = scan(source, pos + 1, run)
    if peek(source, end) != b'"':
        what = "expected a second quote to close this one"
        raise refuse(source, pos, f"{what}, found {describe(source, end)}")
    return end + 1, source.body[pos + 1 : end]


def read_name(source: Source, pos: int, run: re.Pattern[bytes], what: str) -> tuple[int, bytes]:
    """Return a name, bare or quoted; of a quoted one nothing is asked here."""
    if peek(source, pos) == b'"':
        end, name = read_quoted(source, pos, QUOTED_NAME_RUN)
        return end, ESCAPE.sub(lambda found: ESCAPED[found[1]], name)
    end = scan(source, pos, run)
    if end == pos or peek(source, pos).isdigit():
        raise expected(source, pos, what)
    return end, source.body[pos:end]


def read_label_value(source: Source, pos: int) -> tuple[int, bytes]:
    """Return a label's value as it was written, from the equals sign on."""
    if peek(source, pos) != b"=":
        raise expected(source, pos, '"="')
    pos = skip_blanks(source, pos + 1)
    if peek(source, pos) != b'"':
        raise expected(source, pos, "a label value in double quotes")
    end, value = read_quoted(source, pos, source.dialect.label_value)
    if not is_utf8(value):
        raise refuse(source, pos, f'expected a label value in UTF-8, found "{excerpt(value)}"')
    return skip_blanks(source, scan(source, end, NUL_RUN)), value


def read_labels(source: Source, pos: int, name: bytes | None) -> tuple[int, bytes, list[Label]]:
    """Return what stands in the braces that open at `pos`: the metric's name, and the pairs."""
    start, labels = pos, []
    pos = skip_blanks(source, pos + 1)
    while peek(source, pos) != b"}":
        source.tick()
        place, quoted = pos, peek(source, pos) == b'"'
        pos, label = read_name(source, pos, LABEL_RUN, 'a label name or "}"')
        pos = skip_blanks(source, pos)
        if quoted and name is None and peek(source, pos) in (b",", b"}"):
            name = label
        else:
            pos, value = read_label_value(source, pos)
            labels.append(Label(place, label, value))
        if peek(source, pos) == b",":
            pos = skip_blanks(source, pos + 1)
    if name is None:
        raise refuse(source, start, "expected a metric name, before the braces or quoted in them")
    require_names(source, [Label(start, name, b""), *labels])
    return pos + 1, name, labels


def require_names(source: Source, labels: list[Label]) -> None:
    """Return nothing; raise for a bad name, or one that is there twice. Empty labels do not count.

    The first is the metric's own, of which Prometheus makes the label `__name__`.
    """
    seen = {b"__name__"}
    for number, label in enumerate(labels):
        if not label.name or not is_utf8(label.name):
            found = f'"{excerpt(label.name)}"'
            raise refuse(source, label.pos, f"expected a name in UTF-8, found {found}")
        if number and label.name in seen:
            raise refuse(source, label.pos, f'found the label "{excerpt(label.name)}" twice')
        if label.value:
            seen.add(label.name)


def read_number(source: Source, pos: int, what: str) -> tuple[int, bytes]:
    """Return a float as it was written; one that float64 cannot hold is refused."""
    end = scan(source, pos, source.dialect.token)
    number = NUMBER.fullmatch(source.body, pos, end)
    if not number:
        raise expected(source, pos, what)
    if number[1] and math.isinf(float(number[1])):
        raise expected(source, pos, f"{what} within the range of float64")
    return end, number[0]


def read_timestamp(source: Source, pos: int) -> tuple[int, bytes]:
    """Return a timestamp: milliseconds, digits only, within int64."""
    end = scan(source, pos, source.dialect.token)
    digits = source.body[pos:end]
    significant = digits.lstrip(b"0")
    if not digits.isdigit():
        raise expected(source, pos, "a timestamp (digits only) or the end of the line")
    if (len(significant), significant) > (len(MAX_TIMESTAMP), MAX_TIMESTAMP):
        raise expected(source, pos, "a timestamp within the range of int64")
    return end, digits


def read_sample(source: Source, pos: int) -> tuple[int, Sample]:
    """Return a sample."""
    start, name, timestamp = pos, None, b""
    labels: list[Label] = []
    if peek(source, pos) not in (b"{", b'"'):
        pos, name = read_name(source, pos, METRIC_RUN, "a metric name")
        pos = skip_blanks(source, pos)
    if peek(source, pos) == b"{":
        pos, name, labels = read_labels(source, pos, name)
    elif name is None:
        raise expected(source, pos, "a metric name (a quoted one belongs in braces)")
    pos, value = read_number(source, skip_blanks(source, pos), "a value")
    pos = skip_blanks(source, pos)
    if peek(source, pos) not in (b"\n", b""):
        pos, timestamp = read_timestamp(source, pos)
        pos = skip_blanks(source, pos)
    if peek(source, pos) not in (b"\n", b""):
        raise expected(source, pos, "the end of the line")
    return pos + 1, Sample(start, name, labels, value, timestamp)


def read_comment(source: Source, pos: int) -> tuple[int, Line]:
    """Return the line that the `#` at `pos` starts: HELP, TYPE or a comment."""
    body, end = source.body, find_line_end(source.body, pos)
    word = skip_blanks(source, pos + 1)
    name = skip_blanks(source, word + 4)
    if word > pos + 1 and name > word + 4 and body[word : word + 4] in (b"HELP", b"TYPE"):
        return read_metadata(source, word, name)
    # Prometheus takes this NUL for the end of the body. All that follows would be lost in silence.
    lost = body.find(b"\0", pos, end if word == pos + 1 else word + 1)
    if lost >= 0:
        raise refuse(source, lost, "a NUL byte here ends the body for Prometheus")
    return end + 1, None


def read_metadata(source: Source, word: int, pos: int) -> tuple[int, Metadata]:
    """Return a HELP or TYPE line, from its name on. Any one byte but NUL ends the name."""
    keyword = source.body[word : word + 4]
    pos, name = read_name(source, pos, METRIC_RUN, f"a metric name after {keyword.decode()}")
    end = find_line_end(source.body, pos)
    text = source.body[pos + 1 : end]
    if peek(source, pos) == b"\0":
        raise expected(source, pos, "a blank")
    if keyword == b"TYPE" and text not in source.dialect.types:
        types = b", ".join(source.dialect.types).decode()
        raise refuse(source, min(pos + 1, end), f'expected one of {types}, found "{excerpt(text)}"')
    if not is_utf8(text):
        raise refuse(source, pos + 1, f'expected a text in UTF-8, found "{excerpt(text)}"')
    return end + 1, Metadata(word, keyword, name, text)


def read_line(source: Source, pos: int) -> tuple[int, Line]:
    """Return the line at `pos`, None for one that says nothing, and the start of the next."""
    pos = skip_blanks(source, pos)
    if peek(source, pos) in (b"\n", b""):
        return pos + 1, None
    return (read_comment if peek(source, pos) == b"#" else read_sample)(source, pos)


def count_samples(body: bytes, start: int, end: int) -> int:
    """Return how many canonical lines from `start` to `end` are samples: have no `#`."""
    comments = body.count(b"\n#", start, end) + body.startswith(b"#", start)
    return body.count(b"\n", start, end) - comments


def read_window(
    source: Source, pos: int, end: int, fast: re.Pattern[bytes] | None
) -> tuple[int, int]:
    """Return where the lines that start before `end` end, and how many samples they have."""
    samples = 0
    while pos < end:
        source.tick()
        run = fast.match(source.body, pos, end) if fast else None
        if run:
            samples += count_samples(source.body, pos, run.end())
            pos = run.end()
        else:
            pos, line = read_line(source, pos)
            samples += isinstance(line, Sample)
    return pos, samples


def read_exposition(
    body: bytes, dialect: Dialect, tick: Callable[[], None] = no_tick, fast: bool = True
) -> int:
    """Return how many samples the whole body has.

    The fast path is for UTF-8 only, so that no label value or help text need be looked at again.
    That is decided window by window: a Latin-1 comment costs its own window the fast path.
    """
    source = Source(body, dialect, tick)
    pos = samples = 0
    while pos < len(body):
        end = body.rfind(b"\n", pos, pos + WINDOW_BYTES) + 1 or min(pos + WINDOW_BYTES, len(body))
        run = dialect.fast if fast and is_utf8(body[pos:end]) else None
        pos, found = read_window(source, pos, end, run)
        samples += found
    return samples


# ==================================================================================================
# 6  Exposition: verdict
# ==================================================================================================
# From a response's content type to a verdict. Any string is a content type; none raises.

OPENMETRICS_TYPE: Final = "application/openmetrics-text"
PROTOBUF_TYPE: Final = "application/vnd.google.protobuf"
PROTOBUF_PARAMETERS: Final = {"proto": "io.prometheus.client.metricfamily", "encoding": "delimited"}
MEDIA_PARAMETER: Final = re.compile(r';\s*([^\s=;"]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;]*)')
MAX_CONTENT_TYPE: Final = 1_024  # characters looked at; a sensible one has 120


def parse_media_type(content_type: str) -> tuple[str, dict[str, str]]:
    """Return the media type in lower case, and its parameters, whatever `content_type` is."""
    content_type = content_type[:MAX_CONTENT_TYPE]
    parameters = {
        name.lower(): re.sub(r"\\(.)", r"\1", value[1:-1])
        if value[:1] == value[-1:] == '"'
        else value.strip()
        for name, value in MEDIA_PARAMETER.findall(content_type)
    }
    return content_type.partition(";")[0].strip().lower(), parameters


def is_openmetrics_body(body: bytes) -> bool:
    """Return whether the last line is `# EOF`, with or without its newline."""
    tail = body[-7:]
    return tail in (b"# EOF\n", b"# EOF") or tail.endswith(b"\n# EOF") or tail == b"\n# EOF\n"


def verify_exposition(
    body: bytes,
    content_type: str,
    strict: bool = False,  # noqa: ARG001 - strict rules come with the next part
    tick: Callable[[], None] = no_tick,
) -> int:
    """Return the number of samples in `body`, which Prometheus would ingest.

    Raises ExpositionError where it would not, and whatever `tick` raises. OpenMetrics and protobuf
    are not read yet (0 samples), nor is anything judged strictly.
    """
    media_type, _ = parse_media_type(content_type)
    if media_type in (OPENMETRICS_TYPE, PROTOBUF_TYPE):
        return 0
    return read_exposition(body, TEXT, tick)


# ==================================================================================================
# 7  Self-metrics
# ==================================================================================================
# What expexp says about itself: the original's names and labels, and new ones that begin with
# expexp_. Each is declared once, in SELF_METRICS; a name that is not there is a KeyError. No IO.


class Declaration(NamedTuple):
    """One of our families; `labels` in the order in which values are given."""

    name: str
    kind: str
    labels: tuple[str, ...]
    documentation: str


SELF_METRICS: Final = [
    Declaration(name, kind, names_of(labels), documentation)
    for name, kind, labels, documentation in rows("""
expexp_proxy_duration_seconds          summary  module  Duration of proxied requests.
expexp_proxy_errors_total              counter  module  Proxied requests that failed.
expexp_proxy_timeout_errors_total      counter  module  Proxied requests that met their deadline.
expexp_malformed_content_errors_total  counter  module  Bodies that are no exposition.
expexp_command_starts_total            counter  module  Commands started.
expexp_command_fails_total             counter  module  Commands that failed or were too slow.
expexp_file_fails_total                counter  module  Files that could not be read.
expexp_proxy_failures_total            counter  module reason  Proxied requests that failed.
expexp_http_requests_total             counter  path code  Requests answered, by route.
expexp_http_requests_in_flight         gauge    -  Requests that are being answered.
expexp_open_connections                gauge    -  Connections that clients hold open.
expexp_rejected_connections_total      counter  -  Connections closed because no slot was free.
expexp_build_info                      gauge    version pythonversion  Always 1.
build_info                             gauge    version revision branch goversion  Always 1.
python_info                            gauge    implementation major minor patchlevel version  1.
process_cpu_seconds_total              counter  -  User and system time, in seconds.
process_open_fds                       gauge    -  Open file descriptors.
process_max_fds                        gauge    -  Soft limit of file descriptors.
process_virtual_memory_bytes           gauge    -  Virtual memory, in bytes.
process_resident_memory_bytes          gauge    -  Resident memory, in bytes.
process_start_time_seconds             gauge    -  Start, in seconds since 1970.
process_threads                        gauge    -  Threads.
    """)
]
#: What every module has from the start, beside its failures.
MODULE_COUNTERS: Final = [d.name for d in SELF_METRICS if d.labels == ("module",)]


def render_number(value: float) -> str:
    """The number as the text format writes it; whole ones without a point."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def render_labels(names: Sequence[str], values: Sequence[str]) -> str:
    """`{name="value",...}`, escaped, or nothing."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{name}="{value.translate(escapes)}"' for name, value in zip(names, values))
    return f"{{{pairs}}}" if pairs else ""


class SelfMetrics:
    """Our counters, gauges and summaries; may be used by all threads at once."""

    def __init__(self) -> None:
        """Know every declared family; those without labels start at zero."""
        self._lock = threading.Lock()
        # A child is [value, count]; the count is a summary's.
        self._families: dict[str, dict[tuple[str, ...], list[float]]] = {
            declared.name: {} if declared.labels else {(): [0, 0]} for declared in SELF_METRICS
        }

    def increment(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter or gauge; adding 0 makes the series appear."""
        with self._lock:
            self._families[name].setdefault(labels, [0, 0])[0] += by

    def set(self, name: str, *labels: str, to: float) -> None:
        """Set a gauge, or a counter that is kept elsewhere."""
        with self._lock:
            self._families[name][labels] = [to, 0]

    def observe(self, name: str, *labels: str, seconds: float, count: int = 1) -> None:
        """Count one event in a summary, and its length."""
        with self._lock:
            child = self._families[name].setdefault(labels, [0, 0])
            child[:] = child[0] + seconds, child[1] + count

    def create_module(self, module: str, method: str) -> None:
        """Create all series of a module at zero: only the reasons that its method can have."""
        for name in MODULE_COUNTERS:
            self.increment(name, module, by=0)
        for reason in REASONS.values():
            if method in reason.methods:
                self.increment("expexp_proxy_failures_total", module, reason.name, by=0)

    def fail(self, module: str, method: str, reason: Reason) -> None:
        """Count one failure, wherever REASONS says."""
        self.increment("expexp_proxy_errors_total", module)
        self.increment("expexp_proxy_failures_total", module, reason.name)
        # As in the original, a command that had to be ended at the deadline has failed, too.
        slow = ("command_fails",) if (method, reason.name) == ("exec", "timeout") else ()
        for counter in (*reason.counters, *slow):
            self.increment(f"expexp_{counter}_total", module)

    def render(self) -> str:
        """All of it in the text format, families and series in stable order."""
        with self._lock:
            families = {name: sorted(family.items()) for name, family in self._families.items()}
        lines: list[str] = []
        for name, kind, labels, documentation in sorted(SELF_METRICS):
            lines += f"# HELP {name} {documentation}", f"# TYPE {name} {kind}"
            for values, (value, count) in families[name]:
                series, number = render_labels(labels, values), render_number(value)
                if kind == "summary":
                    lines += f"{name}_sum{series} {number}", f"{name}_count{series} {count}"
                else:
                    lines.append(f"{name}{series} {number}")
        return "\n".join(lines) + "\n"


# ==================================================================================================
# 8  Flags
# ==================================================================================================
# The original's flags and ours, each declared once, as a field of Options. The rules are those of
# Go: `-name value`, `-name=value`, one dash or two, exact names. argparse would abbreviate them.
# Pure: a list of texts in, Options out.

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
#: The original's levels, with those of Python's logging.
LOG_LEVELS: Final = {
    **dict.fromkeys(("panic", "fatal"), logging.CRITICAL),
    "error": logging.ERROR,
    **dict.fromkeys(("warning", "warn"), logging.WARNING),
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG - 5,
}
BOOLEANS: Final = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}


class FlagError(ExpexpError):
    """The flags cannot be used; for whoever typed them."""


def choice(what: str, values: Mapping[str, Any]) -> Callable[[str], Any]:
    """A parser of one of some words, in any case."""

    def parse(text: str) -> Any:
        """The word's value; ValueError."""
        if text.lower() not in values:
            raise ValueError(f"expected {what}")
        return values[text.lower()]

    return parse


def parse_network(text: str) -> Network:
    """A network of `10.0.0.0/8` or `fe80::/10`; ValueError for anything else, an address too."""
    with contextlib.suppress(ValueError):
        if "/" in text:
            return ipaddress.ip_network(text, strict=False)
    raise ValueError(f"invalid CIDR address: {excerpt(text)}")


def parse_listen(text: str) -> tuple[str, int] | None:
    """Host and port to listen on, None for ""; ValueError."""
    return parse_listen_address(text) if text else None


def parse_offset(text: str) -> float:
    """Seconds of a duration, or of a plain number; ValueError."""
    return parse_duration(text + "s" if re.fullmatch(r"[0-9.]+", text) else text)


def parse_url_path(text: str) -> str:
    """An absolute path without `.`, `..` and doubled slashes."""
    return "/" + os.path.normpath("/" + text).lstrip("/")


def no_value(_text: str) -> str:
    """Never a value; ValueError."""
    raise ValueError("not supported")


parse_boolean: Final = choice("true or false", BOOLEANS)
parse_level: Final = choice(f"one of {', '.join(LOG_LEVELS)}", LOG_LEVELS)


def flag(
    name: str, parse: Callable[[str], Any], typed: Any, documentation: str, other: str = ""
) -> Any:
    """A field that is a flag; `typed` is its default as a user types it, () makes it repeatable."""
    names = tuple(filter(None, (name, other)))
    metadata = {"names": names, "parse": parse, "typed": typed, "documentation": documentation}
    default = typed if parse is no_value or typed == () else parse(typed)
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The values of all flags."""

    allow_net: tuple[Network, ...] = flag(
        "allow.net", parse_network, (), "Allow clients of this network (CIDR); may be repeated."
    )
    config_dirs: tuple[str, ...] = flag(
        "config.dirs", str, (), "Folder of files with one module each; may be repeated."
    )
    config_file: str = flag(
        "config.file", str, "expexp.yaml", 'File with the modules; "" for none.', "config"
    )
    config_skip_dirs: bool = flag(
        "config.skip-dirs", parse_boolean, "false", "Skip a -config.dirs that does not exist."
    )
    help: bool = flag("help", parse_boolean, "false", "Show the flags and exit.", "h")
    log_json: bool = flag("log.json", parse_boolean, "false", "Write the log as JSON.")
    log_level: int = flag("log.level", parse_level, "warning", f"One of {', '.join(LOG_LEVELS)}.")
    timeout_offset: float = flag(
        "timeout-offset", parse_offset, "0.5", "Seconds taken off Prometheus's scrape timeout."
    )
    version: bool = flag("version", parse_boolean, "false", "Show the version and exit.")
    bearer_token: Secret = flag(  # noqa: RUF009 - frozen
        "web.bearer.token", Secret, "", "Token that clients must send."
    )
    bearer_token_file: str = flag("web.bearer.token-file", str, "", "File with that token.")
    listen_address: tuple[str, int] | None = flag(
        "web.listen-address", parse_listen, ":9999", 'Address to listen on; "" for none.'
    )
    proxy_path: str = flag("web.proxy-path", parse_url_path, "/proxy", "Path of the modules.")
    telemetry_path: str = flag(
        "web.telemetry-path", parse_url_path, "/metrics", "Path of our own metrics."
    )
    winsvc: str = flag("winsvc", no_value, "", "Not supported: there is no Windows service.")


def declared_flags() -> dict[str, dataclasses.Field[Any]]:
    """All names of flags, with the fields of Options that declare them."""
    return {name: f for f in dataclasses.fields(Options) for name in f.metadata["names"]}


def parse_flags(arguments: Sequence[str]) -> Options:
    """The options of a command line; raises FlagError with what is wrong."""
    flags, rest = declared_flags(), list(arguments)
    values: dict[str, Any] = {}
    while rest:
        argument = rest.pop(0)
        found = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if not found:
            raise FlagError(f'unexpected argument "{excerpt(argument)}"')
        name, text = found.groups()
        if name not in flags:
            raise FlagError(f"flag provided but not defined: -{excerpt(name)}")
        field = flags[name]
        if text is None and field.metadata["parse"] is parse_boolean:
            text = "true"
        if text is None and not rest:
            raise FlagError(f"flag needs an argument: -{name}")
        text = rest.pop(0) if text is None else text
        try:
            value = field.metadata["parse"](text)
        except ValueError as error:
            raise FlagError(f'invalid value "{excerpt(text)}" for flag -{name}: {error}') from None
        if field.metadata["typed"] == ():
            value = (*values.get(field.name, ()), value)
        values[field.name] = value
    return Options(**values)


def render_usage() -> str:
    """All flags with their defaults."""
    lines = ["Usage of expexp:"]
    for field in dataclasses.fields(Options):
        names, typed = field.metadata["names"], field.metadata["typed"]
        shown = f" (default {typed})" if typed not in ("", (), "false") else ""
        lines.append("  " + ", ".join(f"-{name}" for name in names))
        lines.append(f"        {field.metadata['documentation']}{shown}")
    return "\n".join(lines) + "\n"


# ==================================================================================================
# 9  Configuration
# ==================================================================================================
# A document (YAML or JSON) becomes a tree of nodes with places, the tree frozen dataclasses. A key
# is declared once, as a field of its dataclass: how it is read, its default, what it means.
# Scalars keep their source text until a key says what it wants: YAML 1.1 would read `1.10`, `no`
# and `010` as other things than their text. All problems are collected, then raised at once. Pure.

MISSING_PYYAML: Final = (
    "PyYAML is needed to read YAML: install python3-yaml (Debian, Ubuntu), python3-pyyaml (RHEL, "
    "Fedora) or PyYAML (pip), or write the configuration as a .json file"
)
YAML_KINDS: Final = {"int": "number", "float": "number", "bool": "boolean", "null": "nothing"}


class NodeError(ExpexpError):
    """A node is not what it should be; the section that reads it adds the path."""

    def __init__(self, message: str, node: Node) -> None:
        """Keep the node for its place."""
        super().__init__(message)
        self.node = node


@dataclass(frozen=True)
class Node:
    """A value of a document and where it stands; `kind` is what people call it in messages."""

    kind: str  # mapping, list, string, number, boolean, nothing
    line: int = dataclasses.field(default=0, compare=False)
    column: int = dataclasses.field(default=0, compare=False)
    text: str = ""  # the source text of a scalar
    items: tuple[Node, ...] = ()
    entries: tuple[tuple[Node, Node], ...] = ()

    def show(self) -> str:
        """What was found, for a message."""
        shown = {"string": f'"{excerpt(self.text)}"', "nothing": "nothing"}
        return shown.get(self.kind) or f"the {self.kind} {excerpt(self.text)}".strip()


def mismatch(what: str, node: Node) -> NodeError:
    """The error for a node that is something else than what was expected."""
    return NodeError(f"expected {what}, found {node.show()}", node)


def read_yaml(raw: Any, done: dict[int, Node | None]) -> Node:
    """The node of PyYAML's node. An alias is read once, so that no bomb of aliases can grow."""
    line, column = raw.start_mark.line + 1, raw.start_mark.column + 1
    if id(raw) in done:
        node = done[id(raw)]
        if node is None:
            raise NodeError("an alias that contains itself", Node("nothing", line, column))
        return node
    done[id(raw)] = None
    if raw.id == "mapping":
        pairs = [
            (key.tag, read_yaml(key, done), read_yaml(value, done)) for key, value in raw.value
        ]
        node = Node("mapping", line, column, entries=merged(pairs))
    elif raw.id == "sequence":
        items = tuple(read_yaml(item, done) for item in raw.value)
        node = Node("list", line, column, items=items)
    else:
        kind = YAML_KINDS.get(raw.tag.rpartition(":")[2], "string")
        node = Node(kind, line, column, raw.value)
    done[id(raw)] = node
    return node


def merged(pairs: Sequence[tuple[str, Node, Node]]) -> tuple[tuple[Node, Node], ...]:
    """A mapping's own entries, then those that its merge keys (`<<`) add."""
    own = [(key, value) for tag, key, value in pairs if not tag.endswith(":merge")]
    for source in (value for tag, _, value in pairs if tag.endswith(":merge")):
        for mapping in source.items or (source,):
            if mapping.kind != "mapping":
                raise mismatch("a mapping to merge", mapping)
            names = {key.text for key, _ in own}
            own += (entry for entry in mapping.entries if entry[0].text not in names)
    return tuple(own)


def parse_yaml(text: str, filename: str) -> Node:
    """The first document of a YAML text; raises ConfigError."""
    line, column = 0, 0
    if yaml is None:
        raise ConfigError(Problem(filename, 0, 0, "", MISSING_PYYAML))
    try:
        raw = next(yaml.compose_all(text, Loader=yaml.SafeLoader), None)
        return read_yaml(raw, {}) if raw else Node("nothing", 1, 1)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        words = " ".join(filter(None, (error.context, error.problem)))
        message = "not YAML: " + re.sub(r"'(?!<)[^' ]{3,}'", "'...'", words)  # may be secret
    except yaml.reader.ReaderError as error:  # has no mark
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"not YAML: {error.reason}"
    except NodeError as error:
        line, column, message = error.node.line, error.node.column, str(error)
    except RecursionError:
        message = "nested too deeply"
    raise ConfigError(Problem(filename, line, column, "", message))


class JsonNumber(str):
    """The source text of a number in JSON."""

    __slots__ = ()


def read_json(value: Any) -> Node:
    """The node of a value as `parse_json` has it; objects are tuples of pairs."""
    if isinstance(value, tuple):
        return Node("mapping", entries=tuple((read_json(k), read_json(v)) for k, v in value))
    if isinstance(value, list):
        return Node("list", items=tuple(map(read_json, value)))
    if value is None or isinstance(value, bool):
        return Node("nothing") if value is None else Node("boolean", text=str(value).lower())
    return Node("number" if isinstance(value, JsonNumber) else "string", text=value)


def parse_json(text: str, filename: str) -> Node:
    """The tree of a JSON text; its nodes have no places; raises ConfigError."""
    numbers: Any = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), JsonNumber)
    try:
        return read_json(json.loads(text, object_pairs_hook=tuple, **numbers))
    except json.JSONDecodeError as error:
        problem = Problem(filename, error.lineno, error.colno, "", f"not JSON: {error.msg}")
    except RecursionError:
        problem = Problem(filename, 0, 0, "", "nested too deeply")
    raise ConfigError(problem)


def parse_document(text: str, filename: str) -> Node:
    """The tree of a text, JSON if the file is named so, else YAML; raises ConfigError."""
    return (parse_json if filename.endswith(".json") else parse_yaml)(text, filename)


# --- readers: what a key wants of its node; they raise NodeError

SCALARS: Final = ("string", "number", "boolean", "nothing")
A_TEXT: Final = "[^\0\ud800-\udfff]*"  # escapes can spell half a character
A_HOST: Final = "a host name or an IP address, without a port"


def scalar(
    what: str,
    pattern: str = A_TEXT,
    convert: Callable[[str], Any] = str,
    kinds: Sequence[str] = SCALARS,
    secret: bool = False,
) -> Callable[[Node], Any]:
    """A reader of a scalar: its source text matches the pattern, `convert` makes the value of it.

    Where `convert` raises a ValueError the text is not what was expected, either. No message shows
    the text of a secret.
    """

    def read(node: Node) -> Any:
        """The value."""
        with contextlib.suppress(ValueError):
            if node.kind in kinds and re.fullmatch(pattern, node.text, re.DOTALL):
                return convert(node.text)
        raise NodeError(f"expected {what}", node) if secret else mismatch(what, node)

    return read


def mapping_of(read_name: Callable[[Node], Any], what: str, pattern: str) -> Callable[[Node], Any]:
    """A reader of a mapping of names to secrets, which its messages do not show."""

    def read(node: Node) -> Mapping[str, Secret]:
        """The names and secrets."""
        if node.kind != "mapping":
            raise mismatch("a mapping", Node(node.kind, node.line, node.column))
        names = [read_name(name) for name, _ in node.entries]
        for position, (name, value) in enumerate(node.entries):
            if names[position] in names[:position]:
                raise NodeError(f'"{excerpt(name.text)}" is given twice', name)
            if value.kind not in SCALARS or not re.fullmatch(pattern, value.text, re.DOTALL):
                raise NodeError(f"expected {what}", value)
        return dict(zip(names, (Secret(value.text) for _, value in node.entries)))

    return read


def to_port(text: str) -> int:
    """A port; `9_100`, `0x238c` and `9100.0` are whole numbers as well. ValueError."""
    port = int(text.partition(".")[0].replace("_", ""), 0)
    if not 1 <= port <= LAST_PORT:
        raise ValueError("no port")
    return port


def to_address(text: str) -> str:
    """A host name or an IP address, an IPv6 one without its brackets. ValueError."""
    address = text.strip("[]")
    return str(ipaddress.IPv6Address(address)) if ":" in address else address


def to_path(text: str) -> str:
    """Path and query of a URL, with a leading slash and escaped where a request line needs it."""
    path = urllib.parse.quote(text.partition("#")[0], safe="/%?&=+,;:@!$'()*~")
    return path if path.startswith("/") else "/" + path


read_text: Final = scalar("text")
read_secret: Final = scalar("text without a NUL", convert=Secret, secret=True)
read_something: Final = scalar("text that is not empty", f"(?=.){A_TEXT}")
read_method: Final = scalar("http, exec or file", "http|exec|file")
read_scheme: Final = scalar("http or https", "https?")
read_boolean: Final = scalar(
    "true or false", convert=lambda text: text.lower() in ("true", "yes", "on"), kinds=("boolean",)
)
read_port: Final = scalar(
    f"a port from 1 to {LAST_PORT}",
    r"(0x[0-9a-fA-F_]{1,9}|[1-9][0-9_]{0,9})(\.0*)?",
    to_port,
    ("number",),
)
read_duration: Final = scalar('a duration such as "5s" or "1m30s"', convert=parse_duration)
read_address: Final = scalar(
    A_HOST, r"[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]+\]|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+", to_address
)
read_path: Final = scalar(
    "the path of a URL, with two hexadecimal digits after each %",
    r"(?![a-z]+://)(?:[^%]|%[0-9A-Fa-f]{2})*",
    to_path,
    secret=True,  # there may be a token in its query
)
read_environment: Final = mapping_of(
    scalar("the name of a variable", f"(?=[^=]+$){A_TEXT}", secret=True),
    "text without a NUL",
    A_TEXT,
)
SENT_HEADER: Final = rf"(?!(?i:{HOP_BY_HOP})$){TOKEN.pattern}"
read_headers: Final = mapping_of(
    scalar("the name of a header to send", SENT_HEADER, str.title),
    "one line of Latin-1 text",
    r"[\t\x20-\x7e\x80-\xff]*",
)


def read_list(node: Node) -> tuple[str, ...]:
    """Texts; entries that are nothing are dropped, as the original does."""
    if node.kind != "list":
        raise mismatch("a list", node)
    return tuple(read_text(item) for item in node.items if item.kind != "nothing")


def read_accepted(node: Node) -> bool | tuple[str, ...]:
    """What a client may add: all, nothing, or what is listed."""
    if node.kind not in ("list", "boolean"):
        raise mismatch("true, false or a list", node)
    return read_list(node) if node.kind == "list" else cast(bool, read_boolean(node))


# --- sections: dataclasses whose fields declare the keys

REQUIRED: Final = "required"


def key(read: Callable[[Node], Any], default: Any, documentation: str) -> Any:
    """A field that is a key of the configuration; one that is REQUIRED has no default."""
    metadata = {"read": read, "default": default, "documentation": documentation}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


@dataclass(frozen=True, repr=False)  # what it holds may be secret
class HttpTarget:
    """The section `http` of a module."""

    port: int = key(read_port, REQUIRED, "port of the exporter")
    scheme: str = key(read_scheme, "http", "`http` or `https`")
    address: str = key(read_address, "localhost", "host name or IP address of the exporter")
    path: str = key(read_path, "/metrics", "path; it may have a query, which is added")
    headers: Mapping[str, Secret] = key(read_headers, {}, "headers that replace the client's")
    basic_auth_username: str = key(read_text, "", "user name to send")
    basic_auth_password: Secret = key(  # noqa: RUF009 - frozen
        read_secret, Secret(""), "password to send"
    )
    tls_insecure_skip_verify: bool = key(read_boolean, False, "accept any certificate")
    tls_cert_file: str = key(read_text, "", "client certificate to present")
    tls_key_file: str = key(read_text, "", "its key")
    tls_ca_cert_file: str = key(read_text, "", "trust these instead of the system's authorities")
    tls_root_ca_file: str = key(read_text, "", "trust these beside the system's authorities")
    server_name: str = key(read_text, "", "name to ask for and to find in the certificate")
    tls_context: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def shown(self) -> str:
        """The URL without its query, in which there may be a token."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{host}:{self.port}{self.path.partition('?')[0]}"


@dataclass(frozen=True, repr=False)
class ExecTarget:
    """The section `exec` of a module; shown is its command alone: arguments may be secret."""

    command: str = key(read_something, REQUIRED, "program to run, without a shell")
    args: tuple[str, ...] = key(read_list, (), "its arguments")
    env: Mapping[str, Secret] = key(read_environment, {}, "added to the command's environment")
    clear_env: bool = key(read_boolean, False, "give the command nothing but `env`")

    @property
    def shown(self) -> str:
        """The command."""
        return self.command


@dataclass(frozen=True)
class FileTarget:
    """The section `file` of a module."""

    path: str = key(read_something, REQUIRED, "regular file or FIFO to read")

    @property
    def shown(self) -> str:
        """The path."""
        return self.path


Target = Union[HttpTarget, ExecTarget, FileTarget]
TARGETS: Final[Mapping[str, Any]] = {"http": HttpTarget, "exec": ExecTarget, "file": FileTarget}


@dataclass(frozen=True)
class Module:
    """A module of the configuration."""

    method: str = key(read_method, REQUIRED, "`http`, `exec` or `file`")
    timeout: float = key(read_duration, 0.0, "longest duration of a scrape; 0: none")
    verify: bool = key(read_boolean, True, "refuse what Prometheus would refuse")
    accept_args: bool | tuple[str, ...] = key(read_accepted, True, "clients' `args`, or globs")
    accept_params: bool | tuple[str, ...] = key(read_accepted, True, "clients' `params`, or names")
    name: str = ""
    target: Any = None


#: Keys of a module that may stand in the section of its method as well; and whose they are.
SHARED_KEYS: Final = {
    "verify": ALL_METHODS,
    "accept_args": ("exec",),
    "accept_params": ("http", "exec"),
}
PAIRED_KEYS: Final = {
    "tls_cert_file": "tls_key_file",
    "tls_key_file": "tls_cert_file",
    "basic_auth_username": "basic_auth_password",
    "basic_auth_password": "basic_auth_username",
}


@dataclass(frozen=True)
class Config:
    """A whole configuration; a request keeps the one that it began with."""

    modules: Mapping[str, Module]
    default_module: str


Keys = Mapping[str, Mapping[str, Any]]


def declared_keys(section: Any) -> Keys:
    """The keys of a section's dataclass, with what `key` said of them."""
    return {f.name: f.metadata for f in dataclasses.fields(section) if "read" in f.metadata}


def suggest(message: str, name: str, known: Iterable[str]) -> str:
    """The message, with the nearest of the known names if one is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return message + (f'; did you mean "{near[0]}"?' if near else "")


class DocumentReader:
    """Reads the tree of one document; collects problems, and remembers where every key stands."""

    def __init__(self, filename: str) -> None:
        """Begin with no problems."""
        self.filename = filename
        self.problems: list[Problem] = []
        self.places: dict[str, Node] = {}

    def problem(self, path: str, message: str, node: Node | None = None) -> None:
        """Note a problem, by default where the path stands."""
        place = node or self.places.get(path) or Node("nothing")
        self.problems.append(Problem(self.filename, place.line, place.column, path, message))

    def entries(self, node: Node, path: str, known: Iterable[str] = ()) -> dict[str, Node]:
        """Keys and values of a mapping; duplicates and, if some are known, others are problems."""
        found: dict[str, Node] = {}
        if node.kind != "mapping":
            self.problem(path, str(mismatch("a mapping", node)), node)
        for name_node, value in node.entries:
            name = name_node.text
            where = f"{path}.{name}".lstrip(".")
            if not re.fullmatch(f"(?=.){A_TEXT}", name, re.DOTALL):
                self.problem(path, str(mismatch("a name", name_node)), name_node)
            elif name in found:
                first = found[name].line
                again = f"; first on line {first}" if first else ""
                self.problem(where, f"given twice{again}", name_node)
            elif known and name not in known:
                self.problem(where, suggest("unknown key", name, known), name_node)
            else:
                found[name] = self.places[where] = value
        return found

    def values(self, declared: Keys, nodes: Mapping[str, Node], path: str) -> dict[str, Any]:
        """What the readers of declared keys make of the nodes; nothing is as good as absent."""
        values: dict[str, Any] = {}
        for name, metadata in declared.items():
            node = nodes.get(name, Node("nothing"))
            if node.kind != "nothing":
                try:
                    values[name] = metadata["read"](node)
                except NodeError as error:
                    self.problem(f"{path}.{name}".lstrip("."), str(error), error.node)
            elif metadata["default"] is REQUIRED:
                where = self.places.get(f"{path}.{name}") or self.places.get(path)
                self.problem(f"{path}.{name}", f"required: {metadata['documentation']}", where)
        return values

    def config(self, node: Node) -> tuple[dict[str, Module | None], str]:
        """The modules of a whole file (None for one with problems) and the default's name."""
        if node.kind == "nothing":
            return {}, ""
        nodes = self.entries(node, "", ("modules", "defaultModule", "global"))
        listed = nodes.get("modules", Node("nothing"))
        found = {} if listed.kind == "nothing" else self.entries(listed, "modules")
        modules = {name: self.module(name, each, f"modules.{name}") for name, each in found.items()}
        default = {"defaultModule": {"read": read_text, "default": ""}}
        return modules, self.values(default, nodes, "").get("defaultModule", "")

    def module(self, name: str, node: Node, path: str) -> Module | None:
        """One module; None if there are problems with it."""
        before = len(self.problems)
        self.places.setdefault(path, node)
        nodes = self.entries(node, path, (*declared_keys(Module), *TARGETS))
        if node.kind != "mapping":
            return None
        method = nodes.get("method", Node("nothing")).text
        values = self.values(declared_keys(Module), nodes, path)
        section = self.section(nodes, values, method, path) if method in TARGETS else {}
        if len(self.problems) > before:
            return None
        return Module(**values, name=name, target=TARGETS[method](**section))

    def section(
        self, nodes: Mapping[str, Node], values: dict[str, Any], method: str, path: str
    ) -> dict[str, Any]:
        """Values of a method's section; those of keys that it shares join the module's values."""
        where, declared = f"{path}.{method}", declared_keys(TARGETS[method])
        self.places.setdefault(where, self.places[path])
        own = self.entries(nodes.get(method, Node("mapping")), where, (*declared, *SHARED_KEYS))
        for other in set(TARGETS) & set(nodes) - {method}:
            self.problem(f"{path}.{other}", f'settings of another method: this is "{method}"')
        for name, methods in SHARED_KEYS.items():
            place = f"{where}.{name}" if name in own else f"{path}.{name}"
            if (name in own or name in nodes) and method not in methods:
                self.problem(place, f'no setting of the method "{method}"')
            shared = self.values({name: declared_keys(Module)[name]}, own, where)
            if name in shared and values.setdefault(name, shared[name]) != shared[name]:
                self.problem(place, f"differs from {path}.{name}")
        section = self.values(declared, own, where)
        for name, other in PAIRED_KEYS.items():
            if name in section and other not in section:
                self.problem(f"{where}.{name}", f"needs {other} beside it")
        return section


# ==================================================================================================
# 10  Loading
# ==================================================================================================
# The files that expexp reads when it starts: configuration, certificates, token. IO. What is wrong
# with any of them is a ConfigError.


def load_text(filename: str, most_bytes: int) -> str:
    """The text of a file; raises ConfigError when it is not there, too large or not UTF-8."""
    line, column = 0, 0
    try:
        with open(filename, "rb") as file:
            content = file.read(most_bytes + 1)
        if len(content) <= most_bytes:
            return content.decode("utf-8-sig")
        message = f"larger than {most_bytes} bytes"
    except OSError as error:
        message = f"cannot be read: {words_of(error)}"
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        message = "not UTF-8"
    raise ConfigError(Problem(filename, line, column, "", message))


def words_of(error: BaseException) -> str:
    """What an error of the system or of TLS says, without numbers and names of C."""
    found = (getattr(error, name, None) for name in ("verify_message", "reason", "strerror"))
    text = next((text for text in found if isinstance(text, str)), "")
    plain = re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", text).lower().replace("_", " ")
    return plain or str(error).strip() or type(error).__name__


DOCUMENT_NAME: Final = re.compile(r"(.+)\.(?:yml|yaml|json)")


class ConfigLoader:
    """Loads a configuration from its file and folders; `warnings` has what is no problem."""

    def __init__(self, limits: Limits) -> None:
        """Begin with nothing."""
        self._limits = limits
        self._problems: list[Problem] = []
        self._modules: dict[str, Module] = {}
        self._origins: dict[str, str] = {}
        self.warnings: list[str] = []

    def load(self, filename: str, folders: Sequence[str], skip_missing: bool) -> Config:
        """The whole configuration, with TLS contexts; raises ConfigError with all problems."""
        default = ""
        with self._reading(filename) as reader:
            if filename:
                modules, default = reader.config(self._document(filename))
                for name, module in modules.items():
                    self._add(name, module, reader)
        for folder in folders:
            with self._reading(folder):
                self._load_folder(folder, skip_missing)
        if default and default not in self._origins:
            message = suggest(f'no module "{excerpt(default)}"', default, self._modules)
            reader.problem("defaultModule", message)
            self._problems += reader.problems[-1:]
        if self._problems:
            raise ConfigError(*self._problems)
        return Config(dict(sorted(self._modules.items())), default)

    @contextlib.contextmanager
    def _reading(self, filename: str) -> Iterator[DocumentReader]:
        """A reader for a file; its problems and those of a ConfigError are collected."""
        reader = DocumentReader(filename)
        try:
            yield reader
        except ConfigError as error:
            self._problems += error.problems
        self._problems += reader.problems

    def _document(self, filename: str) -> Node:
        """The tree of a file; raises ConfigError."""
        return parse_document(load_text(filename, self._limits.config_bytes), filename)

    def _load_folder(self, folder: str, skip_missing: bool) -> None:
        """Add a module for each document in a folder, in sorted order; raises ConfigError."""
        if skip_missing and not os.path.exists(folder):
            self.warnings.append(f"skipping non existent config.dirs entry '{folder}'")
            return
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            message = f"failed reading directory: {words_of(error)}"
            raise ConfigError(Problem(folder, 0, 0, "", message)) from None
        for name in names:
            filename = os.path.join(folder, name)
            found = DOCUMENT_NAME.fullmatch(name)
            if not found or os.path.isdir(filename):
                self.warnings.append(f"skipping non-yaml file {filename}")
                continue
            with self._reading(filename) as reader:
                document = self._document(filename)
                self._add(
                    found[1], reader.module(found[1], document, f"modules.{found[1]}"), reader
                )

    def _add(self, name: str, module: Module | None, reader: DocumentReader) -> None:
        """Add a module, if there are no problems with it, checked against what is on this host."""
        path = f"modules.{name}"
        line = reader.places[path].line
        here = f"{reader.filename}:{line}" if line else reader.filename
        first = self._origins.setdefault(name, here)
        if first != here:
            reader.problem(path, f"module {name} is already defined in {first}")
        elif module:
            self._modules[name] = self._check_host(module, reader)

    def _check_host(self, module: Module, reader: DocumentReader) -> Module:
        """The module with what it needs of this host; what is not there yet is a warning."""
        target = module.target
        if isinstance(target, HttpTarget):
            context = load_client_context(target, reader, f"modules.{module.name}.http")
            target = dataclasses.replace(target, tls_context=context)
            return dataclasses.replace(module, target=target)
        if isinstance(target, ExecTarget):
            path = target.env.get("PATH", Secret(os.defpath if target.clear_env else ""))
            if not shutil.which(target.command, path=path.reveal() or None):
                self.warnings.append(f"module {module.name}: no command {excerpt(target.command)}")
        if isinstance(target, FileTarget) and not os.path.exists(target.path):
            self.warnings.append(f"module {module.name}: no file {excerpt(target.path)}")
        return module


IGNORE_UNEXPECTED_EOF: Final = 0x80  # of OpenSSL 3; Python names it from 3.12 on


def load_client_context(
    target: HttpTarget, reader: DocumentReader, path: str
) -> ssl.SSLContext | None:
    """The TLS settings towards a target, if any; unusable files are noted as problems."""
    authorities = [
        name for name in ("tls_ca_cert_file", "tls_root_ca_file") if getattr(target, name)
    ]
    if target.scheme == "http" and not (authorities or target.tls_cert_file):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # With OpenSSL 3 Python 3.9 takes any end for a proper one: a body cut short would look whole.
    context.options &= ~IGNORE_UNEXPECTED_EOF
    if not target.tls_ca_cert_file:
        context.load_default_certs()
    for name in authorities:
        with noted(reader, f"{path}.{name}", f"certificates in {getattr(target, name)}"):
            context.load_verify_locations(getattr(target, name))
    if target.tls_cert_file:
        files = (target.tls_cert_file, target.tls_key_file)
        with noted(reader, f"{path}.tls_cert_file", "certificate {} with key {}".format(*files)):
            context.load_cert_chain(*files, password=no_password)
    if target.tls_insecure_skip_verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def no_password() -> str:
    """Never a password; without this function OpenSSL would ask for one at the terminal."""
    raise ValueError("the key is encrypted")


@contextlib.contextmanager
def noted(reader: DocumentReader, path: str, what: str) -> Iterator[None]:
    """Note a file that cannot be used as a problem."""
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reader.problem(path, f"cannot use {what}: {words_of(error)}")


def load_token(options: Options, limits: Limits) -> Secret | None:
    """The bearer token that clients must send, None if none; raises ConfigError."""
    filename = options.bearer_token_file
    if not filename:
        return options.bearer_token if options.bearer_token.reveal() else None
    if options.bearer_token.reveal():
        message = "-web.bearer.token and -web.bearer.token-file are mutually exclusive"
        raise ConfigError(Problem("", 0, 0, "", message))
    text = load_text(filename, limits.config_bytes).strip()
    if not text:
        raise ConfigError(Problem(filename, 0, 0, "", "token file should not be empty"))
    return Secret(text)


# ==================================================================================================
# 11  Scraping targets
# ==================================================================================================
# One function a method, `scrape_http`, `scrape_exec`, `scrape_file`, in the table SCRAPERS: each
# takes a Job and returns a Scrape or raises ScrapeError. Every wait ends at the job's deadline.
# What is read is held in memory against a budget that all requests share; what is opened is closed
# by the job's `cleanup`, which the server runs when the response has been written. IO.

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """What a target answered; the body is read whole, or an iterator for an unverified target."""

    status: int
    headers: Headers
    body: bytes | Iterator[bytes]
    modified: float | None = None  # when a regular file was, in seconds since 1970


class Budget:
    """Bytes that all requests together may hold."""

    def __init__(self, most_bytes: int) -> None:
        """Begin with nothing held."""
        self._free, self._lock = most_bytes, threading.Lock()

    def take(self, count: int) -> None:
        """Hold more bytes, or less; raises ScrapeError("busy") if it would be too many."""
        with self._lock:
            if count > self._free:
                raise ScrapeError("busy", "too many bodies in memory, try again later")
            self._free -= count


class Resolver:
    """Looks names up in a few daemon threads, so that a look-up can be given up."""

    def __init__(self, threads: int) -> None:
        """Allow so many look-ups at once."""
        self._slots = threading.BoundedSemaphore(threads)

    def resolve(self, host: str, port: int, deadline: Deadline) -> Sequence[tuple[Any, ...]]:
        """What getaddrinfo says; raises its errors, or ScrapeError when the deadline is first."""
        look_up = functools.partial(socket.getaddrinfo, port=port, type=socket.SOCK_STREAM)
        # RFC 6761, 6.3: localhost is the loopback, and must not wait behind a dead name server.
        known = ("127.0.0.1", "::1") if host.lower() == "localhost" else (host,)
        with contextlib.suppress(socket.gaierror):
            return [entry for each in known for entry in look_up(each, flags=socket.AI_NUMERICHOST)]
        if not self._slots.acquire(timeout=deadline.remaining()):
            raise deadline.error()
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        threading.Thread(target=self._answer, args=(answer, look_up, host), daemon=True).start()
        try:
            return cast("Sequence[tuple[Any, ...]]", answer.result(deadline.remaining()))
        except concurrent.futures.TimeoutError:
            raise deadline.error() from None

    def _answer(self, answer: Any, look_up: Callable[[str], Any], host: str) -> None:
        """Resolve a name in a thread of its own."""
        try:
            answer.set_result(look_up(host))
        except (OSError, UnicodeError) as error:
            answer.set_exception(error)
        finally:
            self._slots.release()


class Commands:
    """Runs commands in process groups of their own, and ends these groups."""

    def __init__(self, limits: Limits, soft_descriptors: int) -> None:
        """`soft_descriptors` is the limit that commands get back, 0 if it was not raised."""
        self._limits, self._soft_descriptors = limits, soft_descriptors
        self._running: set[subprocess.Popen[bytes]] = set()  # each use of it is atomic

    def start(self, arguments: Sequence[bytes], env: Mapping[bytes, bytes]) -> Any:
        """A started process; raises ScrapeError("command") when it cannot be started."""
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            process = subprocess.Popen(  # noqa: S603 - the operator's command, without a shell
                arguments, env=env, stdin=null, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise ScrapeError("command", f"cannot start the command: {words_of(error)}") from None
        self._running.add(process)
        if self._soft_descriptors and hasattr(resource, "prlimit"):
            # Not in the child before exec: Python code there can deadlock in a program of threads.
            limits = self._soft_descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            with contextlib.suppress(OSError):
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """TERM to a command's group and a little later KILL, off the request's path."""
        threading.Thread(target=self._end, args=(process,), daemon=True).start()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End the group, then reap its leader: only now can the process id be used again."""
        grace = {signal.SIGTERM: self._limits.term_to_kill_seconds, signal.SIGKILL: 0.0}
        for number, seconds in grace.items():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.returncode is None:  # else reaped, and its id may be another's
                    os.killpg(process.pid, number)
            time.sleep(seconds)
        process.wait()
        self._running.discard(process)

    def end_all(self) -> None:
        """End the groups of all commands, at the end of the program."""
        for process in list(self._running):
            self.end(process)
        end = time.monotonic() + 2 * self._limits.term_to_kill_seconds
        while self._running and time.monotonic() < end:
            time.sleep(0.01)


@dataclass(frozen=True)
class Tools:
    """What the scrapers share."""

    limits: Limits
    budget: Budget
    resolver: Resolver
    commands: Commands
    metrics: SelfMetrics
    #: One lock a path: of two readers of a FIFO each would get a part.
    file_locks: dict[str, threading.Lock] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One scrape that a client has asked for."""

    module: Module
    pairs: Pairs  # the query without the module
    headers: Headers  # the client's, without what expexp itself consumed
    client: str
    deadline: Deadline
    cleanup: contextlib.ExitStack
    tools: Tools


def join_pieces(job: Job, pieces: Iterable[bytes]) -> bytes:
    """All pieces as one body; raises ScrapeError when there are too many bytes or too late."""
    body, budget = io.BytesIO(), job.tools.budget  # a BytesIO hands out what it holds uncopied
    for piece in pieces:
        job.deadline.check()
        budget.take(len(piece))
        job.cleanup.callback(budget.take, -len(piece))
        body.write(piece)
        check_size(job, body.tell())
    return body.getvalue()


def check_size(job: Job, count: int) -> None:
    """Raise ScrapeError("too_large") if a body has more bytes than it may."""
    if count > job.tools.limits.body_bytes:
        raise ScrapeError("too_large", f"more than {job.tools.limits.body_bytes} bytes")


# --- http


class DeadlineReader(io.RawIOBase):
    """Reads from a socket, but never longer than what remains, however slowly bytes drip in."""

    def __init__(self, raw: Any, connection: socket.socket, remaining: Callable[[], float]) -> None:
        """`remaining` says how many seconds the next read may take; it may raise."""
        self._raw, self._connection, self._remaining = raw, connection, remaining
        self.at_end = False

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read once; raises TimeoutError, or what `remaining` raises."""
        self._connection.settimeout(self._remaining())
        count = self._raw.readinto(buffer)
        self.at_end = not count
        return cast(int, count)

    def close(self) -> None:
        """Close what is read from."""
        self._raw.close()
        super().close()


class TargetConnection(http.client.HTTPConnection):
    """A connection to a target whose every wait counts against the job's deadline."""

    def __init__(self, host: str, **named: Any) -> None:
        """Keep the `job`: where to connect to is its module's to say, whatever `host` is."""
        self._job: Job = named.pop("job")
        super().__init__(host, **named)

    def connect(self) -> None:
        """Connect, and shake hands where the scheme is https; raises OSError or ScrapeError."""
        target, deadline = self._job.module.target, self._job.deadline
        self.sock = connect_socket(self._job, target.address, target.port)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(deadline.remaining())
        if target.scheme == "https":
            # A body cut short by an attacker is an error, not an end: no ragged ends.
            wrap = functools.partial(target.tls_context.wrap_socket, suppress_ragged_eofs=False)
            self.sock = wrap(self.sock, server_hostname=target.server_name or target.address)
            self.sock.settimeout(deadline.remaining())

    def response_class(self, sock: Any, **named: Any) -> http.client.HTTPResponse:  # type: ignore[override]
        """A response that is read through a DeadlineReader."""
        response = http.client.HTTPResponse(sock, **named)
        reader = DeadlineReader(response.fp.detach(), sock, self._job.deadline.remaining)
        response.fp = io.BufferedReader(reader, PIECE_BYTES)
        return response


def connect_socket(job: Job, host: str, port: int) -> socket.socket:
    """A connected socket; several addresses share what remains. Raises OSError or ScrapeError."""
    addresses, errors = job.tools.resolver.resolve(host, port, job.deadline), []
    for position, (family, kind, protocol, _, address) in enumerate(addresses):
        share = job.deadline.remaining() / (len(addresses) - position)
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(share)
            connection.connect(address)
        except OSError as error:
            connection.close()
            errors.append(error)
        else:
            return connection
    raise errors[0]


CUT_SHORT: Final = (http.client.IncompleteRead, ssl.SSLEOFError, ssl.SSLZeroReturnError)
#: What urllib, http.client, ssl and sockets raise, most special first; the reason, and the words.
TARGET_ERRORS: Final[Sequence[tuple[Any, str, str]]] = (
    ((socket.timeout, TimeoutError), "timeout", "timed out"),
    (CUT_SHORT, "truncated", "the target closed before the end of its body"),
    ((ConnectionResetError, BrokenPipeError), "unreachable", "the target closed the connection"),
    (ssl.SSLError, "unreachable", "TLS: {}"),
    (OSError, "unreachable", "{}"),
    (UnicodeError, "unreachable", "not a host name"),
    (Exception, "protocol", "not HTTP: {}"),
)


@contextlib.contextmanager
def target_errors(deadline: Deadline) -> Iterator[None]:
    """Turn what goes wrong between us and a target into a ScrapeError."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        deadline.check()
        cause: Any = error.reason if isinstance(error, urllib.error.URLError) else error
        if getattr(cause, "reason", "") == "UNEXPECTED_EOF_WHILE_READING":  # so says Python 3.9
            cause = ssl.SSLEOFError()
        reason, words = next((r, w) for kinds, r, w in TARGET_ERRORS if isinstance(cause, kinds))
        raise ScrapeError(reason, words.format(excerpt(words_of(cause), 200))) from None


def request_headers(job: Job) -> dict[str, str]:
    """The headers for a target: the client's, with what expexp and the module set instead."""
    target, headers = job.module.target, cast("dict[str, str]", {})
    for name, value in (*end_to_end(job.headers), ("X-Forwarded-For", job.client)):
        title = name.title()
        together = "; " if title == "Cookie" else ", "
        headers[title] = together.join(filter(None, (headers.get(title), value)))
    headers["Host"] = urllib.parse.urlsplit(target.shown).netloc
    headers.setdefault("User-Agent", f"expexp/{__version__}")
    headers[SCRAPE_TIMEOUT_HEADER] = f"{job.deadline.remaining():.3f}"
    if job.module.verify:
        compressed = accepts(headers.get("Accept-Encoding", ""), "gzip")
        headers["Accept-Encoding"] = "gzip" if compressed else "identity"
    if target.basic_auth_username:
        pair = f"{target.basic_auth_username}:{target.basic_auth_password.reveal()}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    headers.update((name, secret.reveal()) for name, secret in target.headers.items())
    return headers


def end_to_end(headers: Headers) -> Headers:
    """The headers that go on: without the hop-by-hop ones and those that Connection names."""
    lists = (value for name, value in headers if name.lower() == "connection")
    named = {part.strip().lower() for value in lists for part in value.split(",")}
    return [(n, v) for n, v in headers if n.lower() not in {*HOP_BY_HOP.split("|"), *named}]


def request_url(job: Job) -> str:
    """The URL for a target: the client's parameters, then the path's own."""
    target = job.module.target
    pairs = [tuple(v.split(b"=", 1)) if n == b"params" else (n, v) for n, v in job.pairs]
    queries = (render_query(cast(Pairs, pairs)), target.path.partition("?")[2])
    return "?".join(filter(None, (target.shown, "&".join(filter(None, queries)))))


def scrape_http(job: Job) -> Scrape:
    """The answer of an http target. IO; raises ScrapeError."""
    url, headers = request_url(job), request_headers(job)
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - http or https
    request.timeout = job.deadline.remaining()
    with target_errors(job.deadline):  # the bare handler knows no proxies, redirects, file: or ftp:
        response = urllib.request.AbstractHTTPHandler().do_open(TargetConnection, request, job=job)
    job.cleanup.callback(response.close)
    check_head(response)
    passed, pieces = end_to_end(response.getheaders()), response_pieces(job, response)
    if job.module.verify:
        return Scrape(response.status, passed, join_pieces(job, pieces))
    length = [("Content-Length", str(response.length))] if response.length is not None else []
    return Scrape(response.status, [*passed, *length], pieces)


def check_head(response: Any) -> None:
    """Raise ScrapeError for the head of a response that http.client lets pass."""
    if response.status < http.HTTPStatus.OK:
        raise ScrapeError("protocol", f"not HTTP: an answer with status {response.status}")
    if response.fp.raw.at_end:  # http.client takes an early end for that of the headers
        raise ScrapeError("truncated", "the target closed in the middle of its headers")
    if "Content-Length" in response.headers and response.length is None and not response.chunked:
        raise ScrapeError("protocol", "not HTTP: an invalid Content-Length")


def response_pieces(job: Job, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body of a response; raises ScrapeError when its end is not its announced end."""
    # Counted here: before Python 3.12 read1 does not, and none says when a peer closes early.
    length: Any = math.inf if response.length is None else response.length
    count = 0
    while count < length:
        with target_errors(job.deadline):  # what there is: a stream is passed on as it comes
            piece = response.read1(min(PIECE_BYTES, length - count))
        if not piece:
            break
        count += len(piece)
        check_size(job, count)
        yield piece
    if count < length < math.inf:
        raise ScrapeError("truncated", f"the target closed after {count} bytes of its body")


# --- exec

#: What a service manager gave to expexp alone.
OWN_ENVIRONMENT: Final = re.compile(rb"NOTIFY_SOCKET|LISTEN_.*|WATCHDOG_.*", re.DOTALL)


def command_arguments(job: Job) -> list[bytes]:
    """The command, its configured arguments, then the client's in the order of the query."""
    prefixes = {b"args": b"", b"params": b"--"}
    added = [prefixes[name] + value for name, value in job.pairs if name in prefixes]
    return [*map(os.fsencode, (job.module.target.command, *job.module.target.args)), *added]


def command_environment(job: Job) -> dict[bytes, bytes]:
    """The environment of a command."""
    target = job.module.target
    inherited = {} if target.clear_env else os.environb
    environment = {k: v for k, v in inherited.items() if not OWN_ENVIRONMENT.fullmatch(k)}
    added = {os.fsencode(k): os.fsencode(v.reveal()) for k, v in target.env.items()}
    return {**environment, b"EXPEXP_TIMEOUT_SECONDS": b"%.3f" % job.deadline.remaining(), **added}


def command_pieces(job: Job, process: Any, words: bytearray) -> Iterator[bytes]:
    """What a command writes on stdout until it has exited; its last words go to `words`.

    Raises ScrapeError("command") in the end, unless the command has exited with 0.
    """
    poll, stdout, stderr = select.poll(), process.stdout.fileno(), process.stderr.fileno()
    with exit_descriptor(process.pid) as exited:
        for source in filter(None, (process.stdout, process.stderr, exited)):
            poll.register(source, select.POLLIN)
        while True:
            # Asked before the pipes are: what was written before the exit is in them by then. A
            # grandchild may hold them open for ever, so their end is not waited for. The command
            # is not reaped yet, so its id stays its own.
            over = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            wait = 0 if over else min(job.deadline.remaining(), math.inf if exited else 0.02)
            ready = {descriptor for descriptor, _ in poll.poll(wait * 1000)} & {stdout, stderr}
            if over and not ready:
                return check_exit(over.si_status, over.si_code != os.CLD_EXITED)
            pieces = {pipe: os.read(pipe, PIECE_BYTES) for pipe in ready}
            for ended in [pipe for pipe, piece in pieces.items() if not piece]:
                poll.unregister(ended)
            words[:] = (words + pieces.get(stderr, b""))[-job.tools.limits.stderr_bytes :]
            yield pieces.get(stdout, b"")


def check_exit(status: int, killed: bool) -> None:
    """Raise ScrapeError("command") unless a command has exited with 0."""
    names = {number.value: number.name for number in signal.Signals}
    killer = names.get(status, f"signal {status}")
    if killed or status:
        how = f"was killed by {killer}" if killed else f"exited with status {status}"
        raise ScrapeError("command", f"the command {how}")


def exit_descriptor(process_id: int) -> Any:
    """A file that is ready to read when the process exits; a context of None if there is none."""
    try:
        return io.FileIO(os.pidfd_open(process_id))
    except (AttributeError, OSError):  # not Linux, or before 5.3
        return contextlib.nullcontext()


def scrape_exec(job: Job) -> Scrape:
    """What a command prints, if it then exits with 0. IO; raises ScrapeError."""
    job.tools.metrics.increment("expexp_command_starts_total", job.module.name)
    process = job.tools.commands.start(command_arguments(job), command_environment(job))
    words = bytearray()
    try:
        with process.stdout, process.stderr:
            body = join_pieces(job, command_pieces(job, process, words))
    except ChildProcessError:  # reaped at the end of the program, by `Commands.end_all`
        raise ScrapeError("command", "the command was killed by SIGKILL") from None
    except ScrapeError as error:
        error.detail = excerpt(bytes(words).strip(), job.tools.limits.stderr_bytes)
        raise
    finally:
        job.tools.commands.end(process)
    return text_scrape(body)


def text_scrape(body: bytes, modified: float | None = None) -> Scrape:
    """The scrape of a body that came without a content type."""
    content_type = OPENMETRICS_CONTENT_TYPE if is_openmetrics_body(body) else TEXT_CONTENT_TYPE
    return Scrape(http.HTTPStatus.OK, [("Content-Type", content_type)], body, modified)


# --- file


def scrape_file(job: Job) -> Scrape:
    """What is in a file or comes out of a FIFO, read by one request at a time. IO; ScrapeError."""
    path = job.module.target.path
    lock = job.tools.file_locks.setdefault(path, threading.Lock())
    try:
        mode = os.stat(path).st_mode  # not opened yet: opening a device may do things to it
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise ScrapeError("file", f"{excerpt(path)} is neither a regular file nor a FIFO")
        if not lock.acquire(timeout=job.deadline.remaining()):
            raise job.deadline.error()
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(lock.release)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            file = cleanup.enter_context(io.FileIO(descriptor))
            modified = os.fstat(descriptor).st_mtime if stat.S_ISREG(mode) else None
            return text_scrape(join_pieces(job, file_pieces(job, file)), modified)
    except OSError as error:
        raise ScrapeError("file", f"cannot read {excerpt(path)}: {words_of(error)}") from None


def file_pieces(job: Job, file: io.FileIO) -> Iterator[bytes]:
    """What is in a file, or what writers put into a FIFO until the last of them has closed it."""
    poll, piece = select.poll(), None
    poll.register(file, select.POLLIN)
    while piece != b"":
        # Without a writer poll reports nothing, but read returns as if at the end: poll first.
        if poll.poll(job.deadline.remaining() * 1000):
            piece = file.read(PIECE_BYTES)  # None if another reader was faster
            yield piece or b""


MTIME_FAMILY: Final = b"expexp_file_mtime_timestamp"


def with_mtime(body: bytes, module: Module, modified: float) -> bytes:
    """The body and, if it does not have that family, the time of the file's modification."""
    if re.search(rb"(?m)^(?:#[ \t]+(?:HELP|TYPE)[ \t]+)?" + MTIME_FAMILY + rb"(?![\w:])", body):
        return body
    series = render_labels(("module", "path"), (module.name, module.target.path)).encode()
    head = b"# HELP %b Time of modification of parsed file.\n# TYPE %b gauge\n"
    added = head % (MTIME_FAMILY, MTIME_FAMILY) + b"%b%b %r\n" % (MTIME_FAMILY, series, modified)
    end = b"# EOF\n" if is_openmetrics_body(body) else b""
    before = body.rstrip(b"\n")[:-5] if end else body
    newline = b"\n" if before and not before.endswith(b"\n") else b""
    return b"".join((before, newline, added, end))


# --- verification of what was scraped

#: With which Prometheus 3 takes an exposition.
USABLE_MEDIA_TYPES: Final = ("text/plain", OPENMETRICS_TYPE, PROTOBUF_TYPE)


def verify_scrape(job: Job, headers: Headers, body: bytes) -> Headers:
    """The headers, with a usable content type; ScrapeError if the body is no exposition."""
    names = {name.lower(): value for name, value in reversed(headers)}  # the first of several
    encoding = names.get("content-encoding", "identity").strip().lower()
    content_type = names.get("content-type", "")
    if encoding == "gzip":
        body = join_pieces(job, gunzip_pieces(body))
    elif encoding not in ("", "identity"):
        raise ScrapeError("malformed", f'cannot verify the encoding "{excerpt(encoding)}"')
    try:
        verify_exposition(body, content_type, tick=job.deadline.check)
    except ExpositionError as error:
        line = (*body.split(b"\n", error.line), b"")[max(error.line - 1, 0)]
        detail = f'the line is "{excerpt(line, 200)}"' if error.line else ""
        raise ScrapeError("malformed", str(error), detail) from None
    if parse_media_type(content_type)[0] in USABLE_MEDIA_TYPES:
        return headers
    others = [pair for pair in headers if pair[0].lower() != "content-type"]
    return [*others, ("Content-Type", TEXT_CONTENT_TYPE)]


def gunzip_pieces(body: bytes) -> Iterator[bytes]:
    """The decoded body, of one gzip member or several; raises ScrapeError("malformed")."""
    member: Any = None
    for start in range(0, len(body), PIECE_BYTES):  # in parts: what is left over is copied
        part = body[start : start + PIECE_BYTES]
        while part:
            member = member or zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            try:
                piece = member.decompress(part, 4 * PIECE_BYTES)
            except zlib.error as error:
                raise ScrapeError("malformed", f"broken gzip: {error}") from None
            yield piece
            # Output that is still to come never uses up the input: the checksum follows it.
            part = member.unused_data or member.unconsumed_tail
            member = None if member.eof else member
    if member or not body:
        raise ScrapeError("malformed", "broken gzip: cut short")


SCRAPERS: Final = {"http": scrape_http, "exec": scrape_exec, "file": scrape_file}


def scrape_target(job: Job) -> Scrape:
    """What the module's method scrapes, verified if the module wants that. Raises ScrapeError."""
    result = SCRAPERS[job.module.method](job)
    headers, body = result.headers, result.body
    if result.status != http.HTTPStatus.OK or not isinstance(body, bytes):
        return result
    if job.module.verify:
        headers = verify_scrape(job, headers, body)
    if result.modified is not None:
        body = with_mtime(body, job.module, result.modified)
    return dataclasses.replace(result, headers=headers, body=body)


# ==================================================================================================
# 12  Application
# ==================================================================================================
# A Request becomes a Response: who may ask, which route, which module, and every error an answer.
# No sockets here. `handle` never raises: the one place that catches Exception is in it.

LOGGER: Final = logging.getLogger("expexp")


@dataclass(frozen=True)
class Request:
    """What a client asked for; `target` is path and query, as latin-1 text."""

    method: str
    target: str
    headers: Headers
    client: str

    @property
    def path(self) -> str:
        """The path without the query."""
        return self.target.partition("?")[0]

    def header(self, name: str) -> str:
        """The values of a header, joined; "" if there are none."""
        return ", ".join(value for given, value in self.headers if given.lower() == name.lower())


@dataclass
class Response:
    """What is sent; `cleanup` is run when it has been, or when that failed."""

    status: int
    headers: Headers
    body: bytes | Iterator[bytes] = b""
    cleanup: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    aborted: bool = False  # failed after the status was sent


def text_response(status: int, text: str, *headers: tuple[str, str]) -> Response:
    """A response of one line of plain text."""
    fixed = (("Content-Type", PLAIN_CONTENT_TYPE), ("X-Content-Type-Options", "nosniff"))
    return Response(status, [*fixed, *headers], f"{text}\n".encode("utf-8", "replace"))


def status_phrase(status: int) -> str:
    """The usual words for a status, "" for an unusual one."""
    return http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else ""


class FailureLog:
    """Decides which failures and recoveries of modules are worth a line in the log."""

    def __init__(self, reminder_seconds: float, clock: Callable[[], float]) -> None:
        """Begin with all modules well."""
        self._reminder_seconds, self._clock = reminder_seconds, clock
        self._last: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def is_news(self, module: str, reason: str) -> bool:
        """Whether this outcome ("" is success) differs from the last one, or is a reminder."""
        now = self._clock()
        with self._lock:
            last, since = self._last.get(module, ("", now))
            if reason == last and (not reason or now - since < self._reminder_seconds):
                return False
            self._last[module] = (reason, now)
            return True


def choose_module(config: Config, pairs: Pairs) -> tuple[Module, Pairs]:
    """The module that a query names, or the default one, and the query without its name."""
    position = next((i for i, (name, _) in enumerate(pairs) if name == b"module"), len(pairs))
    given = b"".join(value for _, value in pairs[position : position + 1])
    name = given.decode("utf-8", "replace") or config.default_module
    if not name:
        raise ScrapeError("bad_arguments", "the parameter module is missing")
    if name not in config.modules:
        raise ScrapeError("unknown_module", f'unknown module "{excerpt(name)}"')
    return config.modules[name], [*pairs[:position], *pairs[position + 1 :]]


PARAMETER: Final = re.compile(rb"([A-Za-z][A-Za-z0-9_.-]*)=.*", re.DOTALL)
ARGUMENT_KINDS: Final = {"exec": (b"args", b"params"), "http": (b"params",), "file": ()}


def check_arguments(module: Module, pairs: Pairs, limits: Limits) -> None:
    """Raise ScrapeError("bad_arguments") for what a client may not add to this module."""
    added = [pair for pair in pairs if pair[0] in ARGUMENT_KINDS[module.method]]
    if len(added) > limits.arguments:
        raise ScrapeError("bad_arguments", f"more than {limits.arguments} args and params")
    for kind, value in added:
        wrong = ""
        if len(value) > limits.argument_bytes:
            wrong = f"longer than {limits.argument_bytes} bytes"
        elif b"\0" in value:
            wrong = "a NUL in it"
        elif kind == b"params" and not PARAMETER.fullmatch(value):
            wrong = 'not of the form "name=value"'
        elif not is_accepted(module, kind, value):
            wrong = "not accepted by this module"
        if wrong:
            raise ScrapeError("bad_arguments", f'{kind.decode()} "{excerpt(value)}": {wrong}')


def is_accepted(module: Module, kind: bytes, value: bytes) -> bool:
    """Whether a module accepts an argument, or a parameter of that name."""
    accepted = module.accept_args if kind == b"args" else module.accept_params
    if isinstance(accepted, bool):
        return accepted
    if kind == b"params":
        return os.fsdecode(value.partition(b"=")[0]) in accepted
    return any(fnmatch.fnmatchcase(os.fsdecode(value), glob) for glob in accepted)


class Access:
    """Who may ask: networks first, then the bearer token."""

    def __init__(self, networks: Sequence[Network], token: Secret | None) -> None:
        """No networks: any. No token: none needed."""
        self._networks, self.token = networks, token

    def check(self, request: Request) -> None:
        """Raise RequestError with 403 or 401."""
        address = parse_client_address(request.client)
        if self._networks and not any(address in network for network in self._networks):
            raise RequestError(http.HTTPStatus.FORBIDDEN, "Forbidden")
        authorization = request.header("authorization")
        scheme, _, given = authorization.partition(" ")
        if not self.token:
            return
        given_bytes, token = given.strip().encode("latin-1"), self.token.reveal().encode()
        if scheme.lower() == "bearer" and hmac.compare_digest(given_bytes, token):
            return
        wrong = "Invalid Bearer Token"
        if scheme.lower() != "bearer":
            missing = "Authorization header is missing"
            wrong = "Authorization header not of Bearer type" if authorization else missing
        challenge = ("WWW-Authenticate", 'Bearer realm="expexp"')
        raise RequestError(http.HTTPStatus.UNAUTHORIZED, wrong, challenge)


class Application:
    """Answers requests; knows the configuration, the routes and what to count."""

    def __init__(
        self,
        config: Config,
        options: Options,
        access: Access,
        tools: Tools,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tools` are what scrapers need; raises ConfigError if two routes have one path."""
        self._options, self._access, self._tools, self._clock = options, access, tools, clock
        self._metrics = tools.metrics
        self._failures = FailureLog(tools.limits.failure_reminder_seconds, clock)
        self._routes: dict[str, Callable[[Request], Response]] = {
            "/": self._index,
            "/-/healthy": lambda _: text_response(http.HTTPStatus.OK, "expexp is healthy."),
            "/-/ready": lambda _: text_response(http.HTTPStatus.OK, "expexp is ready."),
        }
        self._add_route("-web.telemetry-path", options.telemetry_path, self._telemetry)
        self._add_route("-web.proxy-path", options.proxy_path, self._proxy)
        self.replace_config(config)

    def _add_route(self, name: str, path: str, route: Callable[[Request], Response]) -> None:
        """Add the route of a flag; raises ConfigError if another one has its path."""
        if path in self._routes:
            message = f"flag {name} can not be set to {path}: that path is taken"
            if path == self._options.telemetry_path != "/" and name == "-web.proxy-path":
                flags = "flags -web.proxy-path and -web.telemetry-path"
                message = f"{flags} can not be set to the same value"
            raise ConfigError(Problem("", 0, 0, "", message))
        self._routes[path] = route

    def replace_config(self, config: Config) -> None:
        """Use another configuration for the requests that begin from now on."""
        for module in config.modules.values():
            self._metrics.create_module(module.name, module.method)
            self._metrics.observe("expexp_proxy_duration_seconds", module.name, seconds=0, count=0)
        self._config = config

    def handle(self, request: Request, refusal: RequestError | None = None) -> Response:
        """The response, whatever happens; `refusal` is why the server could not read a request."""
        started = self._clock()
        self._metrics.increment("expexp_http_requests_in_flight")
        try:
            response = self._route(request, refusal)
        except RequestError as error:
            response = text_response(error.status, error.message, *error.headers)
        except Exception:
            LOGGER.exception("unexpected error in answering %s", excerpt(request.target, 200))
            status = http.HTTPStatus.INTERNAL_SERVER_ERROR
            response = text_response(status, "Internal Server Error: see the log")
        response.cleanup.callback(self._finish, request, response, started)
        return response

    def _finish(self, request: Request, response: Response, started: float) -> None:
        """Count and log a request that has been answered."""
        self._metrics.increment("expexp_http_requests_in_flight", by=-1)
        path = request.path if request.path in self._routes else "other"
        self._metrics.increment("expexp_http_requests_total", path, str(int(response.status)))
        line = f'{request.client} - {excerpt(request.method)} "{excerpt(request.target, 2000)}"'
        phrase = status_phrase(response.status) + (", aborted" if response.aborted else "")
        milliseconds = (self._clock() - started) * 1000
        LOGGER.info("%s %d %s (took %.2fms)", line, response.status, phrase, milliseconds)

    def _route(self, request: Request, refusal: RequestError | None) -> Response:
        """What the route's function answers; raises RequestError if it is not asked."""
        if refusal:
            raise refusal
        self._access.check(request)
        route = self._routes.get(request.path)
        if not route:
            raise RequestError(http.HTTPStatus.NOT_FOUND, "404 page not found")
        if request.method not in ("GET", "HEAD"):
            status = http.HTTPStatus.METHOD_NOT_ALLOWED
            raise RequestError(status, "405 method not allowed", ("Allow", "GET, HEAD"))
        return route(request)

    def _proxy(self, request: Request) -> Response:
        """A module's exposition, or why there is none."""
        config, module, started = self._config, None, self._clock()
        with contextlib.ExitStack() as cleanup:
            try:
                pairs = parse_query(request.target.partition("?")[2])
                module, pairs = choose_module(config, pairs)
                cleanup.callback(self._observe, module.name, started)
                check_arguments(module, pairs, self._tools.limits)
                result = scrape_target(self._job(request, module, pairs, cleanup))
                response = self._scraped(module, result)
            except ScrapeError as error:
                self._note(module, error)
                text = (
                    f"module {excerpt(module.name)}: {error.message}" if module else error.message
                )
                return text_response(error.reason.status, text)
            response.cleanup = cleanup.pop_all()
            return response

    def _observe(self, module: str, started: float) -> None:
        """Count a proxied request and its duration."""
        self._metrics.observe(
            "expexp_proxy_duration_seconds", module, seconds=self._clock() - started
        )

    def _job(
        self, request: Request, module: Module, pairs: Pairs, cleanup: contextlib.ExitStack
    ) -> Job:
        """The scrape that a request asks for; what it holds is given back by `cleanup`."""
        header, offset = request.header(SCRAPE_TIMEOUT_HEADER), self._options.timeout_offset
        seconds = scrape_timeout(module.timeout, header, offset, self._tools.limits)
        consumed = "authorization" if self._access.token else ""
        headers = [pair for pair in request.headers if pair[0].lower() != consumed]
        deadline = Deadline(seconds, self._clock)
        return Job(module, pairs, headers, request.client, deadline, cleanup, self._tools)

    def _scraped(self, module: Module, result: Scrape) -> Response:
        """The response with what a target answered; the target's own failures are counted."""
        if result.status != http.HTTPStatus.OK:
            message = f"the target answered with status {result.status}"
            self._note(module, ScrapeError("status", message))
        elif self._failures.is_news(module.name, ""):
            LOGGER.warning("module %s: recovered", module.name)
        response = Response(result.status, result.headers, result.body)
        if not isinstance(result.body, bytes):
            response.body = self._streamed(module, response, result.body)
        return response

    def _streamed(
        self, module: Module, response: Response, pieces: Iterator[bytes]
    ) -> Iterator[bytes]:
        """The pieces; a failure after the status was sent counts as aborted."""
        try:
            yield from pieces
        except ScrapeError as error:
            response.aborted = True
            self._note(module, ScrapeError("aborted", error.message))
            raise

    def _note(self, module: Module | None, error: ScrapeError) -> None:
        """Count a failure, and log it if it is news."""
        name, method = (module.name, module.method) if module else (UNKNOWN_MODULE, "")
        self._metrics.fail(name, method, error.reason)
        place = f"module {name}" if module else "no module"
        text = ": ".join(filter(None, (place, error.reason.name, error.message, error.detail)))
        # What a client does wrong is no failure of the module, and must not fill the log.
        clients_fault = error.reason.status in range(400, 500)
        news = not clients_fault and self._failures.is_news(name, error.reason.name)
        LOGGER.log(logging.WARNING if news else logging.DEBUG, "%s", text)

    def _telemetry(self, request: Request) -> Response:
        """Our own metrics."""
        collect_process(self._metrics)
        body, headers = self._metrics.render().encode(), [("Content-Type", TEXT_CONTENT_TYPE)]
        if accepts(request.header("accept-encoding"), "gzip"):
            body = gzip.compress(body, 6)
            headers.append(("Content-Encoding", "gzip"))
        return Response(http.HTTPStatus.OK, [*headers, ("Vary", "Accept-Encoding")], body)

    def _index(self, request: Request) -> Response:
        """The modules, for people as HTML and for programs as JSON."""
        modules, options = self._config.modules, self._options
        if accepts(request.header("accept"), "application/json"):
            body = json.dumps({name: outline(module) for name, module in modules.items()})
            headers = [("Content-Type", "application/json")]
        else:
            body = render_index(modules, options.proxy_path, options.telemetry_path)
            headers = [
                ("Content-Type", "text/html; charset=utf-8"),
                ("Content-Security-Policy", "default-src 'none'"),
                ("X-Content-Type-Options", "nosniff"),
            ]
        return Response(http.HTTPStatus.OK, [*headers, ("Vary", "Accept")], body.encode())


def outline(module: Module) -> dict[str, Any]:
    """What clients may know of a module: nothing in which there may be a secret."""
    timeout, shown = module.timeout or None, module.target.shown
    return {"method": module.method, "timeout": timeout, "target": shown, "verify": module.verify}


PAGE: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>expexp</title></head>
<body><h1>expexp</h1>
<h2>Exporters:</h2>
<ul>
{items}
</ul>
<p><a href="{telemetry}">Metrics of expexp itself</a></p>
</body></html>
"""


def relative(path: str) -> str:
    """A path as seen from /; one with a colon must not begin like a URL with a scheme."""
    return f"./{path[1:]}" if ":" in path else path[1:]


def render_index(modules: Mapping[str, Module], proxy_path: str, telemetry_path: str) -> str:
    """The page at /; its links are relative, so that they hold behind a reverse proxy."""
    items = []
    for name, module in modules.items():
        query = urllib.parse.quote(name, safe="")
        link = html.escape(f"{relative(proxy_path)}?module={query}")
        shown = html.escape(f"{module.method} {module.target.shown}")
        items.append(f'<li><a href="{link}">{html.escape(name)}</a> {shown}</li>')
    return PAGE.format(items="\n".join(items), telemetry=html.escape(relative(telemetry_path)))


def collect_process(metrics: SelfMetrics) -> None:
    """Set the metrics of this process; what a system does not tell stays 0. IO."""
    times, tick = os.times(), os.sysconf("SC_CLK_TCK")
    values: dict[str, float] = {
        "process_cpu_seconds_total": times.user + times.system,
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "process_threads": threading.active_count(),
    }
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        with open("/proc/self/stat", "rb") as file:
            # The name of the program may contain blanks and brackets; proc(5) counts from 1.
            fields = file.read().rpartition(b")")[2].split()
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        values["process_start_time_seconds"] = round(boot + int(fields[19]) / tick, 2)
        values["process_virtual_memory_bytes"] = int(fields[20])
        values["process_resident_memory_bytes"] = int(fields[21]) * resource.getpagesize()
        values["process_open_fds"] = len(os.listdir("/proc/self/fd")) - 1
    for name, value in values.items():
        metrics.set(name, to=value)


# ==================================================================================================
# 13  HTTP server
# ==================================================================================================
# Sockets in, Requests out, Responses back. A thread a connection, and no more connections than
# there are slots. No client that does not send, does not read or hangs up decides anything here:
# reads have a deadline, writes must make progress, and both cost one line at debug.

REQUEST_LINE: Final = re.compile(rb"(\S+) (\S+) HTTP/([0-9.]+)\r?\n")
ABSOLUTE_FORM: Final = re.compile(r"\Ahttps?://[^/?#]*", re.IGNORECASE)
CONTROL: Final = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")  # never in a header
NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Connections:
    """The connections that clients hold, and which of them are idle."""

    def __init__(self, most: int, metrics: SelfMetrics) -> None:
        """Begin with none."""
        self._most, self._metrics = most, metrics
        self._open: set[socket.socket] = set()
        self._idle: dict[socket.socket, None] = {}  # the one that has been idle longest is first
        self._lock = threading.RLock()
        self.draining = False

    def admit(self, connection: socket.socket) -> bool:
        """Give a connection a slot, if need be that of the oldest idle one; False if all work."""
        with self._lock:
            if len(self._open) >= self._most and not self.evict():
                self._metrics.increment("expexp_rejected_connections_total")
                return False
            self._open.add(connection)
            self._metrics.set("expexp_open_connections", to=len(self._open))
            return True

    def remove(self, connection: socket.socket) -> None:
        """Free a connection's slot."""
        with self._lock:
            self._open.discard(connection)
            self._metrics.set("expexp_open_connections", to=len(self._open))

    def evict(self) -> bool:
        """Have the oldest idle connection end; its thread wakes from reading. False if none is."""
        with self._lock:
            connection = next(iter(self._idle), None)
            if not connection:
                return False
            del self._idle[connection]
            self.remove(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            return True

    @contextlib.contextmanager
    def idle(self, connection: socket.socket) -> Iterator[None]:
        """A connection waits for a request."""
        with self._lock:
            self._idle[connection] = None
        try:
            yield
        finally:
            with self._lock:
                self._idle.pop(connection, None)

    def drain(self, seconds: float) -> bool:
        """Wait until all connections have ended, the idle ones at once; False if some have not."""
        end, self.draining = time.monotonic() + seconds, True
        while self._open and time.monotonic() < end:
            if not self.evict():
                time.sleep(0.01)
        return not self._open


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one connection, request after request."""

    server: Server
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Read through a DeadlineReader."""
        super().setup()
        self._client = str(parse_client_address(self.client_address[0]))
        self._limits = self.server.limits
        self._wait_seconds = self._limits.header_seconds
        raw = cast(io.BufferedReader, self.rfile).detach()
        self.rfile = io.BufferedReader(DeadlineReader(raw, self.connection, self._remaining))

    def _remaining(self) -> float:
        """Seconds that the next read may take; raises TimeoutError when none remain."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the client took too long")
        return seconds

    def handle_one_request(self) -> None:
        """Answer one request, or find that there is none; sets `close_connection`."""
        self.close_connection, has_body = True, False
        request, refusal = Request("-", "-", (), self._client), None
        if not self._await_request():
            return
        try:
            request = self._read_request()
            length = request.header("content-length").strip() or "0"
            has_body = length != "0" or bool(request.header("transfer-encoding"))
        except RequestError as error:
            refusal = error
        except (TimeoutError, socket.timeout):
            status = http.HTTPStatus.REQUEST_TIMEOUT
            refusal = RequestError(status, "the request did not arrive in time")
        self.close_connection |= bool(refusal) or has_body
        self._write(self.server.application.handle(request, refusal), request)
        if refusal or has_body:
            self._discard()

    def _await_request(self) -> bool:
        """Wait for the first byte of a request; False if the client closes instead."""
        self._until = time.monotonic() + self._wait_seconds
        with self.server.connections.idle(self.connection):
            arrived = bool(cast(io.BufferedReader, self.rfile).peek(1))
        self._wait_seconds = self._limits.idle_seconds
        self._until = time.monotonic() + self._limits.header_seconds
        return arrived

    def _read_request(self) -> Request:
        """The request; raises RequestError if it is none, OSError if it does not arrive."""
        most = self._limits.request_line_bytes
        line = self.rfile.readline(most + 1)
        if line in (b"\r\n", b"\n"):  # RFC 9112, 2.2: one empty line before a request is ignored
            line = self.rfile.readline(most + 1)
        if len(line) > most:
            raise RequestError(http.HTTPStatus.REQUEST_URI_TOO_LONG, "the request line is too long")
        found = REQUEST_LINE.fullmatch(line)
        if not found:  # a bare `GET /` is HTTP/0.9, in which no status could be said
            raise RequestError(http.HTTPStatus.BAD_REQUEST, "malformed request line")
        method, target, self.request_version = (part.decode("latin-1") for part in found.groups())
        if self.request_version not in ("1.0", "1.1"):
            status = http.HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            raise RequestError(status, "expected HTTP/1.0 or HTTP/1.1")
        target = ABSOLUTE_FORM.sub("", target, count=1) or "/"
        request = Request(method, target, self._read_headers(), self._client)
        tokens = request.header("connection").lower().replace(" ", "").split(",")
        old = self.request_version == "1.0"
        self.close_connection = "close" in tokens or (old and "keep-alive" not in tokens)
        return request

    def _read_headers(self) -> Headers:
        """The headers; raises RequestError if they are too large or malformed."""
        block, line, most = b"", b"", self._limits.header_block_bytes
        status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        while line not in (b"\r\n", b"\n"):
            line = self.rfile.readline(most + 1 - len(block))
            block += line
            if len(block) > most:
                raise RequestError(status, "the headers are too large")
            if not line.endswith(b"\n"):
                raise ConnectionResetError("closed in the middle of a request")
        try:
            message = http.client.parse_headers(io.BytesIO(block))
        except http.client.HTTPException:
            raise RequestError(status, "too many headers") from None
        tokens = all(TOKEN.fullmatch(name) for name in message)
        if CONTROL.search(block) or message.defects or message.get_payload() or not tokens:
            raise RequestError(http.HTTPStatus.BAD_REQUEST, "malformed headers")
        return [(name, " ".join(value.split("\r\n"))) for name, value in message.items()]

    def _write(self, response: Response, request: Request) -> None:
        """Send a response; the connection is reset if that fails after a part of it was sent."""
        with response.cleanup:
            try:
                self._send_response(response, request.method == "HEAD")
            except (OSError, ScrapeError) as error:
                LOGGER.debug("%s: response not sent: %s", request.client, error)
                response.aborted = True
                self._reset()

    def _send_response(self, response: Response, is_head: bool) -> None:
        """Send head and body, in one write if they are small."""
        headers, body = list(response.headers), response.body
        names = {name.lower() for name, _ in headers}
        whole = isinstance(body, bytes)
        chunked = not whole and "content-length" not in names and self.request_version == "1.1"
        known_end = whole or chunked or "content-length" in names
        self.close_connection |= not known_end or self.server.connections.draining
        connection = "close" if self.close_connection else "keep-alive"
        bodiless = response.status in (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED)
        added = {"Content-Length": str(len(cast(bytes, body)))} if whole and not bodiless else {}
        added.update({"Transfer-Encoding": "chunked"} if chunked else {})
        added.update({} if "date" in names else {"Date": self.date_time_string()})
        head = render_head(response.status, [*headers, *added.items(), ("Connection", connection)])
        if is_head or bodiless:
            self._send(head)
        elif isinstance(body, bytes):
            self._send(head + body[:PIECE_BYTES])
            self._send(memoryview(body)[PIECE_BYTES:])
        else:
            self._send(head)
            for piece in body:
                self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self._send(b"0\r\n\r\n" if chunked else b"")

    def _send(self, content: bytes | memoryview) -> None:
        """Send all of it; raises TimeoutError when there is no progress."""
        rest = memoryview(content)
        while rest:
            self.connection.settimeout(self._limits.write_stall_seconds)
            rest = rest[self.connection.send(rest[: 4 * PIECE_BYTES]) :]

    def _reset(self) -> None:
        """Close so that the client sees an error: to HTTP/1.0 a plain close is a complete body."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.rfile.close()
        self.connection.close()

    def _discard(self) -> None:
        """Read away what the client still sends: closing now would reset what we answered."""
        self._until = time.monotonic() + self._limits.unread_seconds
        left = self._limits.unread_bytes
        with contextlib.suppress(OSError, ValueError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0:
                left -= len(cast(io.BufferedReader, self.rfile).read1(PIECE_BYTES)) or left


def render_head(status: int, headers: Headers) -> bytes:
    """Status line and headers; line breaks in a target's folded header become blanks."""
    lines = [f"HTTP/1.1 {int(status)} {status_phrase(status)}"]
    lines += (f"{name}: {' '.join(value.split())}" for name, value in headers)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


class Server(http.server.ThreadingHTTPServer):
    """A listener; several may share connections and application."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(
        self,
        address: tuple[str, int],
        application: Application,
        connections: Connections,
        limits: Limits,
    ) -> None:
        """Bind and listen, for no host to all addresses of both families; raises OSError."""
        self.application, self.connections, self.limits = application, connections, limits
        any_host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - as asked
        self._any = not address[0]
        found = socket.getaddrinfo(address[0] or any_host, address[1], type=socket.SOCK_STREAM)
        self.address_family, bound = found[0][0], found[0][4]
        super().__init__(cast("tuple[str, int]", bound), Handler)

    def server_bind(self) -> None:
        """Bind without the look-up of our own name that http.server would do."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not self._any))
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        """Where this listener is, for the log."""
        host, port = cast("tuple[str, int]", self.server_address[:2])
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; without file descriptors an idle connection goes, and a moment is waited."""
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in NO_DESCRIPTORS:
                self.connections.evict()
                time.sleep(self.limits.accept_pause_seconds)
            raise

    def verify_request(self, request: Any, _client_address: Any) -> bool:
        """Whether there is a slot for a connection; without one it is closed at once."""
        return self.connections.admit(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and free its slot."""
        self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """One line at debug for a client that hangs up; the trace of anything else to the log."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            LOGGER.debug("%s: %s", client_address[0], error)
        else:
            LOGGER.error("unexpected error in serving %s", client_address[0], exc_info=error)


# ==================================================================================================
# 14  Command line
# ==================================================================================================
# Puts the parts together, waits for a signal, and takes them apart. Exit codes: 0, 1 and 2 as the
# top of this file says. Nothing runs at import.


class LogFormatter(logging.Formatter):
    """One line a record, `key=value` or JSON; control characters escaped, length bounded."""

    def __init__(self, as_json: bool, most_characters: int) -> None:
        """Choose between the two forms."""
        super().__init__()
        self._as_json, self._most = as_json, most_characters

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        message = message[: self._most] + ("..." if len(message) > self._most else "")
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        level = record.levelname.lower()
        if self._as_json:
            return json.dumps({"level": level, "msg": message, "time": created})
        quoted = json.dumps(message, ensure_ascii=not message.isprintable())
        return f'time="{created}" level={level} msg={quoted}'


def set_up_logging(options: Options, limits: Limits) -> None:
    """Log to stderr, as the flags say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(options.log_json, limits.log_line_characters))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(options.log_level)
    LOGGER.propagate = False
    logging.addLevelName(logging.CRITICAL, "FATAL")
    logging.raiseExceptions = False  # a closed stderr must not stop a scrape


def complain(options: Options, *problems: object) -> int:
    """Say why expexp does not start, a line each, as JSON if the log is; the exit code 1."""
    for problem in problems:
        if options.log_json:
            LOGGER.critical("%s", problem)
        else:
            sys.stderr.write(f"{problem}\n")
    return 1


def raise_descriptor_limit(most: int) -> int:
    """Raise the soft limit of file descriptors; the former one, 0 if it was not raised. IO."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if resource.RLIM_INFINITY in (soft, wanted) or soft >= wanted:
        return 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft


def is_loopback(host: str) -> bool:
    """Whether a listener on this host is reached from this host alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return host == "localhost"


def set_constant_metrics(metrics: SelfMetrics) -> None:
    """Set the metrics that never change."""
    python, numbers = platform.python_version(), platform.python_version_tuple()
    metrics.set("expexp_build_info", __version__, python, to=1)
    metrics.set("build_info", __version__, "unknown", "unknown", f"python{python}", to=1)
    metrics.set("python_info", platform.python_implementation(), *numbers, python, to=1)


class Program:
    """All parts of a running expexp."""

    def __init__(self, options: Options, limits: Limits) -> None:
        """Load and check everything, and bind; raises ConfigError or OSError."""
        self._limits, metrics, loader = limits, SelfMetrics(), ConfigLoader(limits)
        set_constant_metrics(metrics)
        config = loader.load(options.config_file, options.config_dirs, options.config_skip_dirs)
        access = Access(options.allow_net, load_token(options, limits))
        self.commands = Commands(limits, raise_descriptor_limit(limits.file_descriptors))
        budget, resolver = Budget(limits.held_bytes), Resolver(limits.resolver_threads)
        tools = Tools(limits, budget, resolver, self.commands, metrics)
        self.application = Application(config, options, access, tools)
        self.connections = Connections(limits.connections, metrics)
        listeners = filter(None, (options.listen_address,))
        self.servers = [
            Server(address, self.application, self.connections, limits) for address in listeners
        ]
        for warning in (*loader.warnings, *warn_of_access(config, options, access)):
            LOGGER.warning("%s", warning)
        if not config.modules:
            LOGGER.error("no modules loaded from any config file")

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then finish what runs."""
        # A SimpleQueue may be filled in a signal handler, where a lock could be held already.
        signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.put(number))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children could not be waited for
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            LOGGER.info("listening on %s", server.url)
        while signals.get() == signal.SIGHUP:
            LOGGER.warning("SIGHUP: this version reads its configuration only when it starts")
        self.stop()

    def stop(self) -> None:
        """Stop accepting, finish what runs, end commands."""
        LOGGER.info("stopping")
        for server in self.servers:
            server.shutdown()
            server.server_close()
        if not self.connections.drain(self._limits.drain_seconds):
            LOGGER.warning("stopped with requests unfinished")
        self.commands.end_all()


def warn_of_access(config: Config, options: Options, access: Access) -> Iterator[str]:
    """What an operator should know from the start of who may ask for what."""
    for network in options.allow_net:
        LOGGER.info("Allowing connections only from %s", network)
    names = [
        name
        for name, module in config.modules.items()
        if module.method == "exec" and (module.accept_args or module.accept_params)
    ]
    host = options.listen_address[0] if options.listen_address else "localhost"
    if names and not (is_loopback(host) or access.token or options.allow_net):
        shown = excerpt(", ".join(names), 200)
        yield (
            f"anyone who reaches this port can add arguments to the commands of {shown}: "
            "set accept_args and accept_params, -allow.net or -web.bearer.token"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run expexp with these arguments, or the command line's; returns the exit code."""
    limits = Limits()
    try:
        options = parse_flags(sys.argv[1:] if argv is None else argv)
    except FlagError as error:
        sys.stderr.write(f"{error}\n{render_usage()}")
        return 2
    if options.help or options.version:
        version = f"expexp {__version__} (Python {platform.python_version()})\n"
        sys.stderr.write(render_usage() if options.help else version)
        return 0
    set_up_logging(options, limits)
    if not options.listen_address:
        LOGGER.warning("No web addresses to listen on, nothing to do!")
        return 0
    try:
        program = Program(options, limits)
    except ConfigError as error:
        return complain(options, *error.problems)
    except (OSError, UnicodeError) as error:
        host, port = options.listen_address
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return complain(options, f"cannot listen on {where}: {words_of(error)}")
    program.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
