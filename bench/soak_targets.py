"""The targets of `soak.py`: healthy ones, and one of each kind that is ill.

    soak_targets.py PORT TLS_PORT FOLDER    # serve until the process is killed

A path is `/KIND/NUMBER`. The body of a healthy target follows from its number, so that anyone can
say what it must be. While the file FOLDER/plant-byte exists, one body in each second has one wrong
digit. The TLS port wants a client certificate of the authority in FOLDER.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
import time
from pathlib import Path

LOOPBACK = "127.0.0.1"
SAMPLES = 60  # of a healthy target
CONTROL = "control"  # of a target that is asked without expexp: its bodies are never wrong
TEXT = "text/plain; version=0.0.4"
#: Kinds of ill targets. Each behaves badly in two of three seconds, or always (hang, dead).
ILL = ("hang", "drip", "truncate", "redirect", "html", "status", "reset", "endless")
ILL_SECONDS = (0, 1)
PERIOD_SECONDS = 3


def healthy_body(number: str) -> bytes:
    """Return the body of a healthy target."""
    lines = [
        f'soak_value{{target="{number}",place="{place}"}} {place}.5\n' for place in range(SAMPLES)
    ]
    return ("# HELP soak_value A value.\n# TYPE soak_value gauge\n" + "".join(lines)).encode()


def answer_with(body: bytes, length: int | None = None) -> bytes:
    """Return an answer with status 200, which may announce another length."""
    size = len(body) if length is None else length
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: {TEXT}\r\nContent-Length: {size}\r\n\r\n".encode() + body
    )


async def behave_badly(kind: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    """Answer as a target of this kind does when it is ill."""
    if kind == "hang":
        await asyncio.sleep(5)
    elif kind == "drip":
        for byte in answer_with(body)[:100]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
    elif kind == "truncate":
        writer.write(answer_with(body[:100], len(body)))
    elif kind == "redirect":
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /metrics\r\nContent-Length: 0\r\n\r\n")
    elif kind == "html":
        writer.write(answer_with(b"<html>no exposition</html>\n"))
    elif kind == "status":
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    elif kind == "endless":
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(40):
            writer.write(b"# filler\n" * 2000)
            await writer.drain()
            await asyncio.sleep(0.1)
    with contextlib.suppress(OSError):
        await writer.drain()


class Targets:
    """Answers the requests of all connections."""

    def __init__(self, folder: Path) -> None:
        """Plant a wrong byte while the folder has the file that says so."""
        self._plant = folder / "plant-byte"
        self._planted = 0

    def body_of(self, number: str) -> bytes:
        """Return the body of a healthy target, with one wrong digit if that is planted."""
        body = healthy_body(number)
        now = int(time.time())
        is_control = number.startswith(CONTROL)
        if not is_control and self._plant.exists() and now != self._planted:
            self._planted = now
            body = body.replace(b" 7.5\n", b" 8.5\n")
        return body

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close the connection."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            kind, _, number = head.split(b" ", 2)[1].decode().lstrip("/").partition("/")
            is_ill = kind == "hang" or int(time.time()) % PERIOD_SECONDS in ILL_SECONDS
            if kind in ILL and is_ill:
                await behave_badly(kind, healthy_body(number), writer)
            else:
                writer.write(answer_with(self.body_of(number.partition("?")[0])))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass
        finally:
            writer.close()


async def serve(port: int, tls_port: int, folder: Path) -> None:
    """Serve both ports until the process is killed."""
    targets = Targets(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "target.pem")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    plain = await asyncio.start_server(targets.answer, LOOPBACK, port, backlog=1024)
    await asyncio.start_server(targets.answer, LOOPBACK, tls_port, backlog=1024, ssl=context)
    await plain.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
