"""The peers of `difference.py`: expexp processes, a scripted target, a scripted client.

All of them listen and connect on the loopback. Every wait has an end.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple

import trustme
from difference_cases import EXPOSITION, PROBE, Step, Steps

PATIENCE_SECONDS = 5  # longer than every deadline in a case
TARGET_PATIENCE_SECONDS = 3
SCRAPE_SECONDS = 2  # of modules: never reached by an answer that ends
SHORT_SCRAPE_SECONDS = 0.4
PIECE_BYTES = 1 << 16
HEAD_BYTES = 1 << 18
GOOD_ANSWER: Steps = (
    Step("send", b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
         % len(EXPOSITION) + EXPOSITION),
    Step("close"),
)  # fmt: skip
LOOPBACK = "127.0.0.1"
OTHER_PATH = re.compile(rb"GET /(?!metrics|own)")  # than those of the modules


class Certificates(NamedTuple):
    """The contexts and files of one authority, for listeners and targets."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    folder: Path


def make_certificates(folder: Path) -> Certificates:
    """Write a server's certificate and its authority to the folder; return contexts with them."""
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", LOOPBACK)
    leaf.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "server.pem").chmod(0o600)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return Certificates(server, client, folder)


def reset(connection: socket.socket) -> None:
    """End a connection with a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """End the sending direction; TLS stays readable, and says no goodbye."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_WR)


def say_goodbye(connection: socket.socket) -> None:
    """Send TLS's own end, without waiting for the peer's."""
    if isinstance(connection, ssl.SSLSocket):
        with contextlib.suppress(OSError, ValueError):
            connection.settimeout(0)
            connection.unwrap()


def read_to_end(connection: socket.socket) -> tuple[bytes, str]:
    """Return what still comes, and how it ends: "end", "reset", "silence" or "cut" (TLS)."""
    pieces: list[bytes] = []
    end = "end"
    try:
        while piece := connection.recv(PIECE_BYTES):
            pieces.append(piece)
    except (socket.timeout, TimeoutError):
        end = "silence"
    except ssl.SSLEOFError:
        end = "cut"
    except OSError:
        end = "reset"
    return b"".join(pieces), end


class Target:
    """A server that plays a script to whoever connects, and keeps the heads that it received."""

    def __init__(self, certificates: Certificates) -> None:
        """Listen on two ports, the second one with TLS; nothing is accepted before `start`."""
        self._context = certificates.server
        self._listeners = [socket.create_server((LOOPBACK, 0), backlog=64) for _ in range(2)]
        self.ports = [listener.getsockname()[1] for listener in self._listeners]
        self.find_script: Callable[[bytes], Steps] = self._current_script
        self.script: Steps = GOOD_ANSWER
        self.received: list[bytes] = []
        self._playing: list[threading.Thread] = []

    def _current_script(self, head: bytes) -> Steps:
        """Return the script that was prepared, or a good answer where a redirect leads to."""
        return GOOD_ANSWER if OTHER_PATH.match(head) else self.script

    def start(self) -> None:
        """Accept connections in daemon threads."""
        for position, listener in enumerate(self._listeners):
            arguments = (listener, position == 1)
            threading.Thread(target=self._accept, args=arguments, daemon=True).start()

    def prepare(self, script: Steps) -> None:
        """Play this script from now on, and forget what was received."""
        self.script = script
        self.received = []
        self._playing = []

    def settle(self) -> tuple[bytes, ...]:
        """Wait until all that was played has ended; return the heads that came."""
        for thread in list(self._playing):
            thread.join(TARGET_PATIENCE_SECONDS)
        return tuple(self.received)

    def _accept(self, listener: socket.socket, is_tls: bool) -> None:
        """Start a thread for every connection."""
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(connection, is_tls), daemon=True)
            self._playing.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, is_tls: bool) -> None:
        """Shake hands, read a head, and play; whatever fails ends the connection."""
        connection.settimeout(TARGET_PATIENCE_SECONDS)
        try:
            if is_tls:
                connection = self._context.wrap_socket(connection, server_side=True)
            head = self._read_head(connection)
            self.received.append(head)
            play_answer(connection, self.find_script(head))
        except (OSError, ValueError):
            connection.close()

    def _read_head(self, connection: socket.socket) -> bytes:
        """Return the bytes up to an empty line, or to the end."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES:
            piece = connection.recv(PIECE_BYTES)
            if not piece:
                break
            head += piece
        return head


def play_answer(connection: socket.socket, script: Steps) -> None:
    """Do what the script says, and end the connection in the way of its last step."""
    for action, data, seconds in script:
        if action == "send":
            connection.sendall(data)
        elif action == "pause":
            time.sleep(seconds)
        elif action == "hold":
            read_to_end(connection)
        elif action == "reset":
            reset(connection)
            return
        elif action == "close":
            say_goodbye(connection)
    connection.close()


class Process:
    """One expexp, its target, its listeners and its log."""

    def __init__(self, name: str, path: Path, certificates: Certificates) -> None:
        """Write a configuration and start the file; raise RuntimeError if it does not listen."""
        self.name = name
        self.target = Target(certificates)
        folder = certificates.folder
        config = folder / f"{name}.json"
        config.write_text(configuration(self.target.ports, folder))
        self._log_path = folder / f"{name}.log"
        flags = (
            f"-config={config}",
            f"-web.listen-address={LOOPBACK}:0",
            f"-web.tls.listen-address={LOOPBACK}:0",
            f"-web.tls.cert={folder / 'server.pem'}",
            f"-web.tls.key={folder / 'server.pem'}",
            "-log.level=debug",
            "-log.json",
        )
        start = Path(__file__).with_name("difference_start.py")
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(start), str(path), *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self._log = self._log_path.open("rb")
        self._tail = b""
        #: What differs from process to process, and what stands for it.
        self._names = [
            (b"%b:%d" % (LOOPBACK.encode(), port), b"%b:%b" % (LOOPBACK.encode(), name))
            for port, name in zip(self.target.ports, (b"PLAIN", b"TLS"))
        ]
        self.ports = self._find_ports()

    def _find_ports(self) -> dict[str, int]:
        """Wait for the lines that name the listeners; return their ports."""
        end = time.monotonic() + 20
        text = ""
        while time.monotonic() < end and self._process.poll() is None:
            text = self._log_path.read_text()
            found = dict(re.findall(r"listening on (https?)://[^ \"]*:([0-9]+)", text))
            if len(found) == 2:
                self.read_log()
                return {"plain": int(found["http"]), "tls": int(found["https"])}
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"{self.name} does not start: {text}")

    def read_log(self) -> list[str]:
        """Return the new lines of the log, as "level message", without what varies."""
        self._tail += self._log.read()
        *lines, self._tail = self._tail.split(b"\n")
        return [log_line(self.hide_names(line)) for line in lines]

    def hide_names(self, content: bytes) -> bytes:
        """Return the content with words instead of the target's ports."""
        for port, name in self._names:
            content = content.replace(port, name)
        return content

    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def log_line(raw: bytes) -> str:
    """Return level and message of a line in JSON; other lines as they are."""
    try:
        entry = json.loads(raw)
        text = f"{entry['level']} {entry['msg']}"
    except (ValueError, KeyError, TypeError):
        text = raw.decode("utf-8", "backslashreplace")
    return re.sub(r"took [0-9.]+ms", "took TIME", text)


def configuration(ports: Sequence[int], folder: Path) -> str:
    """Return the configuration whose http modules all lead to one target."""
    (folder / "f.prom").write_bytes(EXPOSITION)
    modules: dict[str, object] = {"f": {"method": "file", "file": {"path": str(folder / "f.prom")}}}
    for name in ("v", "u", "vt", "ut", "vs", "us", "vts", "uts"):
        seconds = SHORT_SCRAPE_SECONDS if "s" in name else SCRAPE_SECONDS
        modules[name] = {
            "method": "http",
            "timeout": f"{seconds}s",
            "http": http_section(ports, folder, "t" in name, "v" in name),
        }
    settings = {
        "path": "/own?own=%20a",
        "headers": {"X-Module": "module", "accept": "text/plain", "X-New": "new"},
        "basic_auth_username": "user",
        "basic_auth_password": "password",
    }
    section = {**http_section(ports, folder, False, True), **settings}
    modules["h"] = {"method": "http", "timeout": f"{SCRAPE_SECONDS}s", "http": section}
    return json.dumps({"modules": modules})


def http_section(
    ports: Sequence[int], folder: Path, is_tls: bool, is_verified: bool
) -> dict[str, object]:
    """Return the section `http` of a module."""
    section: dict[str, object] = {"address": LOOPBACK, "port": ports[0], "verify": is_verified}
    if is_tls:
        section["port"] = ports[1]
        section["scheme"] = "https"
        section["tls_root_ca_file"] = str(folder / "ca.pem")
    return section


class Talk(NamedTuple):
    """What a client received, and how the connection ended."""

    answer: bytes
    end: str


def client_address(number: int) -> str:
    """Return the loopback address of a case: log lines name it, and so belong to the case."""
    return f"127.{1 + (number >> 16) % 250}.{(number >> 8) & 255}.{number & 255}"


def converse(port: int, source: str, context: ssl.SSLContext | None, steps: Steps) -> Talk:
    """Connect, do the steps, and read to the end."""
    raw = socket.socket()
    raw.settimeout(PATIENCE_SECONDS)
    connection = raw
    try:
        raw.bind((source, 0))
        raw.connect((LOOPBACK, port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context:
            connection = context.wrap_socket(
                raw, server_hostname=LOOPBACK, suppress_ragged_eofs=False
            )
        is_broken = not send_steps(connection, steps)
        if steps and steps[-1].action == "reset":
            reset(connection)
            return Talk(b"", "reset by us")
        answer, end = read_to_end(connection)
        return Talk(answer, "reset" if is_broken else end)
    finally:
        connection.close()
        raw.close()


def send_steps(connection: socket.socket, steps: Steps) -> bool:
    """Do the steps until the peer breaks the connection; return False if it does."""
    try:
        for action, data, seconds in steps:
            if action == "send":
                connection.sendall(data)
            elif action == "pause":
                time.sleep(seconds)
            elif action == "half-close":
                half_close(connection)
    except OSError:
        return False
    return True


def good_steps(module: str) -> Steps:
    """Return the steps of a client that asks for a module, and nothing else."""
    line = b"GET /proxy?module=%b HTTP/1.1\r\n" % module.encode()
    return (Step("send", line + PROBE.partition(b"\r\n")[2]),)
