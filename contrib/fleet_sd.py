#!/usr/bin/env python3
"""Ask every expexp of a fleet which modules it has, and make one list of targets for Prometheus.

    python3 fleet_sd.py -hosts hosts.txt -output /etc/prometheus/expexp.json
    python3 fleet_sd.py -hosts hosts.txt -serve 127.0.0.1:9998

The first command asks once, writes a file for file_sd_configs and ends. The second asks again and
again, -interval after each round, and serves one URL for http_sd_configs. The file with hosts has
one `host:port` (http) or URL a line, for example `https://host1.example.org:9999/sd`. Empty lines
and lines that begin with # are ignored. The password or token goes to every host in the file, and
over plain HTTP unless the line begins with https://.

A host that does not answer keeps its last targets for -keep, and is named on stderr. The last
targets are in memory, and in -state if that file is given (by default beside -output). Each host
has -timeout for its whole answer, from the look-up of its name to the last byte.

Exit codes: 0 list and state were written, 1 one of them was not, 2 bad flags.
Needs: Python 3.9 or later, nothing else. It opens no port without -serve and starts no program.
License: Apache License, Version 2.0.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import http.server
import json
import os
import re
import ssl
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

#: Prometheus's name for one element of the list: {"targets": [...], "labels": {...}}.
Group = dict[str, Any]

LABEL_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: |\r?\n)")
DURATION = re.compile(r"([0-9]{1,9})(s|m|h|d)")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PIECE_BYTES = 65536
OK = 200
TLS_ALERT = b"\x15\x03"  # how a server of TLS answers plain HTTP


class FleetError(Exception):
    """A host gave no usable answer, or the list cannot be written."""


class FlagError(Exception):
    """The command line is wrong."""


# --- flags


def parse_seconds(text: str) -> int:
    """Return the seconds of a duration such as 90s or 24h. Raise ValueError."""
    found = DURATION.fullmatch(text)
    if not found:
        raise ValueError('expected a duration such as "30s" or "24h"')
    return int(found[1]) * UNITS[found[2]]


def parse_count(text: str) -> int:
    """Return a whole number above 0. Raise ValueError."""
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ValueError("expected a whole number above 0")
    return int(text)


def parse_listener(text: str) -> tuple[str, int] | None:
    """Return host and port to listen on, None for an empty text. Raise ValueError."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port):
        raise ValueError('expected an address such as "127.0.0.1:9998"')
    return host.strip("[]"), int(port)


class Flag(NamedTuple):
    """One flag: its name, how its text becomes a value, its default text, and its help."""

    name: str
    parse: Callable[[str], Any]
    default: str
    documentation: str


FLAGS = (
    Flag("hosts", str, "-", "File with one host:port or URL a line. - is stdin."),
    Flag("output", str, "-", "File to write for file_sd_configs. - is stdout."),
    Flag("state", str, "", "File with the last targets. Default: OUTPUT.state, none for stdout."),
    Flag("serve", parse_listener, "", "Address to serve the list on, instead of -output."),
    Flag("interval", parse_seconds, "60s", "With -serve: the pause between two rounds."),
    Flag("keep", parse_seconds, "24h", "How long a silent host keeps its last targets."),
    Flag("timeout", parse_seconds, "10s", "Time for the whole answer of one host."),
    Flag("concurrency", parse_count, "200", "Hosts that are asked at once."),
    Flag("max-bytes", parse_count, "1048576", "Largest answer of one host."),
    Flag("ca", str, "", "File with authorities, instead of the system's, for https."),
    Flag("cert", str, "", "File with the client certificate to present."),
    Flag("key", str, "", "File with its key."),
    Flag("user", str, "", "User name for basic auth."),
    Flag("password-file", str, "", "File with the password of -user."),
    Flag("token-file", str, "", "File with a bearer token."),
)
Options = dict[str, Any]


def parse_flags(arguments: Sequence[str]) -> Options:
    """Return the value of each flag. Raise FlagError."""
    texts = {flag.name: flag.default for flag in FLAGS}
    rest = iter(arguments)
    for argument in rest:
        found = re.fullmatch(r"--?([a-z-]+)(?:=(.*))?", argument, re.DOTALL)
        if not found or found[1] not in texts:
            raise FlagError(f"unknown flag {argument!a}: see -help")
        text = found[2] if found[2] is not None else next(rest, None)
        if text is None:
            raise FlagError(f"flag -{found[1]} needs a value")
        texts[found[1]] = text
    options = {flag.name: parse_value(flag, texts[flag.name]) for flag in FLAGS}
    check_flags(options)
    if not options["state"] and options["output"] != "-":
        options["state"] = options["output"] + ".state"
    return options


def parse_value(flag: Flag, text: str) -> Any:
    """Return the value of a flag. Raise FlagError."""
    try:
        return flag.parse(text)
    except ValueError as error:
        raise FlagError(f"-{flag.name} {text!a}: {error}") from None


def check_flags(options: Options) -> None:
    """Raise FlagError for flags that do not go together."""
    for one, other in (("cert", "key"), ("key", "cert"), ("user", "password-file")):
        if options[one] and not options[other]:
            raise FlagError(f"-{one} needs -{other}")
    if options["user"] and options["token-file"]:
        raise FlagError("-user and -token-file do not go together")
    if options["serve"] and options["hosts"] == "-":  # its second read finds no host
        raise FlagError("-serve needs a file for -hosts: stdin can be read only once")


def render_help() -> str:
    """Return the docstring and the flags."""
    lines = [(__doc__ or "").strip(), "", "Flags:"]
    for flag in FLAGS:
        shown = f" (default {flag.default})" if flag.default else ""
        lines.append(f"  -{flag.name:14} {flag.documentation}{shown}")
    return "\n".join(lines) + "\n"


# --- one host


class Host(NamedTuple):
    """A host to ask: the line that names it, and the parts of its URL."""

    name: str
    is_tls: bool
    address: str
    port: int
    netloc: str
    path: str


def parse_host(line: str) -> Host:
    """Return the host of a line of -hosts. Raise FleetError."""
    url = line if "://" in line else f"http://{line}/sd"
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FleetError(f"{line!a}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise FleetError(f"{line!a}: expected host:port, or a URL with http or https")
    if not re.fullmatch(r"[!-~]*", url):
        raise FleetError(f"{line!a}: expected no blanks, and ASCII only")
    is_tls = parts.scheme == "https"
    default_port = 443 if is_tls else 80
    path = (parts.path or "/sd") + (f"?{parts.query}" if parts.query else "")
    return Host(line, is_tls, parts.hostname, port or default_port, parts.netloc, path)


def read_hosts(name: str) -> list[Host]:
    """Return the hosts in a file, each once, in its order. Raise FleetError."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{name}: cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    return [parse_host(line) for line in dict.fromkeys(lines) if line and line[0] != "#"]


def check_groups(document: Any) -> list[Group]:
    """Return target groups with nothing but what Prometheus reads. Raise FleetError."""
    if not isinstance(document, list):
        raise FleetError("expected a list of target groups: is this the /sd of an expexp?")
    groups = []
    for group in document:
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
            raise FleetError("expected target groups with a list of targets")
        labels = group.get("labels") or {}
        if not isinstance(labels, dict):
            raise FleetError("expected labels that are a mapping")
        for name, value in labels.items():
            if not (LABEL_NAME.fullmatch(name) and isinstance(value, str)):
                raise FleetError(f"expected labels with a text each, found {name!a}")
        groups.append({"targets": targets, "labels": labels})
    return groups


def parse_answer(host: Host, answer: bytes) -> list[Group]:
    """Return the target groups of an HTTP answer that ended. Raise FleetError."""
    head, empty_line, body = answer.partition(b"\r\n\r\n")
    status = STATUS_LINE.match(answer)
    hint = ""
    if not host.is_tls and (answer.startswith(TLS_ALERT) or (status and status[1] == b"400")):
        hint = f", and the host may speak TLS: then write https://{host.netloc}{host.path}"
    if not answer:
        raise FleetError("the connection was closed without an answer")
    if not (status and empty_line):
        raise FleetError(f"the answer is not HTTP{hint}")
    if int(status[1]) != OK:
        raise FleetError(f"the answer has status {status[1].decode()}{hint}")
    length = re.search(rb"(?i)\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*(?:\r\n|\Z)", head)
    if length and int(length[1]) != len(body):
        raise FleetError(f"the answer was cut short: {len(body)} of {int(length[1])} bytes")
    try:
        return check_groups(json.loads(body))
    except (ValueError, RecursionError):
        raise FleetError("the answer is not JSON") from None


async def fetch(host: Host, request_headers: str, context: ssl.SSLContext, most: int) -> bytes:
    """Return all bytes of a host's answer. Raise OSError or FleetError.

    HTTP/1.0 ends a body with its length or with the connection: a proxy sends no chunks.
    """
    tls = context if host.is_tls else None
    reader, writer = await asyncio.open_connection(host.address, host.port, ssl=tls)
    try:
        request = f"GET {host.path} HTTP/1.0\r\nHost: {host.netloc}\r\n{request_headers}\r\n"
        writer.write(request.encode("latin-1"))
        await writer.drain()
        answer = bytearray()
        while piece := await reader.read(PIECE_BYTES):
            answer += piece
            if len(answer) > most:
                raise FleetError(f"the answer has more than {most} bytes (-max-bytes)")
        return bytes(answer)
    finally:
        writer.transport.abort()  # a graceful end could wait for a host that does not read


def describe(error: BaseException) -> str:
    """Return the message of an error of a connection."""
    if isinstance(error, ssl.SSLError):  # its errno is a number of OpenSSL's, not of the system
        reason = getattr(error, "verify_message", "")
        return f"TLS: {reason or (error.reason or str(error)).lower().replace('_', ' ')}"
    number = int(getattr(error, "errno", None) or 0)
    if number in errno.errorcode:
        return os.strerror(number)  # asyncio has words of its own
    return f"{type(error).__name__}: {error}"


# --- all hosts


class Known(NamedTuple):
    """What a host said last, and when: Unix time."""

    time: float
    groups: list[Group]


class Fleet:
    """The hosts of a fleet and their last targets."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._known: dict[str, Known] = {}
        # Not `asyncio.run`: at its end it waits for look-ups of names that hang.
        self._loop = asyncio.new_event_loop()
        self._read_state()

    def _read_state(self) -> None:
        """Read the last targets of an earlier run. A file that is missing or damaged is empty."""
        path = self._options["state"]
        if not path or not os.path.exists(path):
            return
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            for name, (when, groups) in document.items():
                self._known[name] = Known(float(when), check_groups(groups))
        except (OSError, ValueError, TypeError, AttributeError, FleetError) as error:
            tell(f"{path}: cannot be used, hosts that are silent now have no targets: {error}")

    def _headers(self) -> str:
        """Return the headers of each request. Raise FleetError."""
        options = self._options
        lines = "User-Agent: expexp-fleet_sd\r\nAccept: application/json\r\n"
        if options["user"]:
            pair = f"{options['user']}:{read_secret(options['password-file'])}".encode()
            lines += f"Authorization: Basic {base64.b64encode(pair).decode()}\r\n"
        if options["token-file"]:
            lines += f"Authorization: Bearer {read_secret(options['token-file'])}\r\n"
        return lines

    def _context(self) -> ssl.SSLContext:
        """Return how to speak TLS. Raise FleetError."""
        options = self._options
        try:
            context = ssl.create_default_context(cafile=options["ca"] or None)
            if options["cert"]:
                context.load_cert_chain(options["cert"], options["key"])
        except OSError as error:
            raise FleetError(f"-ca, -cert or -key cannot be used: {describe(error)}") from None
        return context

    def ask(self) -> list[Group]:
        """Ask all hosts, and return the target groups of all. Raise FleetError."""
        hosts = read_hosts(self._options["hosts"])
        asked = self._ask_all(hosts, self._headers(), self._context())
        faults = self._loop.run_until_complete(asked)
        return self._merge(hosts, faults)

    async def _ask_all(
        self, hosts: Iterable[Host], headers: str, context: ssl.SSLContext
    ) -> dict[str, str]:
        """Ask all hosts, note their answers, and return the faults of the others by host."""
        slots = asyncio.Semaphore(self._options["concurrency"])
        faults: dict[str, str] = {}

        async def ask_one(host: Host) -> None:
            """Ask one host within the timeout, which begins when it has a slot."""
            async with slots:
                try:
                    answer = fetch(host, headers, context, self._options["max-bytes"])
                    body = await asyncio.wait_for(answer, self._options["timeout"])
                    self._known[host.name] = Known(time.time(), parse_answer(host, body))
                except (asyncio.TimeoutError, TimeoutError):
                    faults[host.name] = f"no answer within {self._options['timeout']} s"
                except (OSError, ValueError) as error:
                    faults[host.name] = describe(error)
                except FleetError as error:
                    faults[host.name] = str(error)

        await asyncio.gather(*map(ask_one, hosts))
        return faults

    def _merge(self, hosts: Sequence[Host], faults: dict[str, str]) -> list[Group]:
        """Return the groups of all hosts in their order, and name the silent ones on stderr."""
        oldest = time.time() - self._options["keep"]
        known = {}
        for host in hosts:
            last = self._known.get(host.name)
            if last and (host.name not in faults or last.time >= oldest):
                known[host.name] = last
            if host.name in faults:
                kept = len(known[host.name].groups) if host.name in known else 0
                tell(f"{host.name}: {faults[host.name]}; target groups kept: {kept}")
        self._known = known
        if faults and not known:
            raise FleetError("no host has answered, and none has targets from before")
        return [group for last in known.values() for group in last.groups]

    def write_state(self) -> None:
        """Keep the last targets for the next run. Raise FleetError."""
        if self._options["state"]:
            write_file(self._options["state"], json.dumps(self._known))


def read_secret(name: str) -> str:
    """Return the first line of a file. Raise FleetError."""
    try:
        lines = Path(name).read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise FleetError(f"{name}: cannot be read: {error.strerror}") from None
    if not lines or not lines[0].isprintable():
        raise FleetError(f"{name}: expected one line of text")
    return lines[0]


def write_file(name: str, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one. Raise FleetError."""
    folder = os.path.dirname(name) or "."
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".fleet_sd-", dir=folder)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)  # Prometheus runs as another user
            os.replace(temporary, name)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise FleetError(f"{name}: cannot be written: {error.strerror}") from None


def tell(text: str) -> None:
    """Write a line to stderr, without control characters of foreign texts."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    sys.stderr.write(shown + "\n")


# --- what to do with the list


class ListHandler(http.server.BaseHTTPRequestHandler):
    """Answers every GET with the list of the last round."""

    timeout = 10  # a client that does not send must not keep a thread
    content = b""  # of the last round, none before its end

    def do_GET(self) -> None:
        """Send the list, or 503 before the first round has ended."""
        content = type(self).content
        self.send_response(OK if content else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Write no line for a request."""


def serve(fleet: Fleet, options: Options) -> None:
    """Ask again and again, and serve the list of the last round. Raise FleetError."""
    host, port = options["serve"]
    try:
        server = http.server.ThreadingHTTPServer((host, port), ListHandler)
    except OSError as error:
        raise FleetError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tell(f"listening on http://{host}:{server.server_port}/")
    while True:
        try:
            ListHandler.content = json.dumps(fleet.ask()).encode()
            fleet.write_state()
        except FleetError as error:  # the list of the last good round stays
            tell(str(error))
        time.sleep(options["interval"])


def run(options: Options) -> None:
    """Do what the flags ask for. Raise FleetError."""
    fleet = Fleet(options)
    if options["serve"]:
        serve(fleet, options)
    text = json.dumps(fleet.ask(), indent=1) + "\n"
    if options["output"] == "-":
        sys.stdout.write(text)
    else:
        write_file(options["output"], text)
    fleet.write_state()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, or those of the command line, and return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "-help", "--help") for argument in given):
        sys.stdout.write(render_help())
        return 0
    try:
        run(parse_flags(given))
    except FlagError as error:
        tell(str(error))
        return 2
    except FleetError as error:
        tell(str(error))
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a look-up of a name that hangs must not keep the program
