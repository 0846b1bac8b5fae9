"""What clients that do not belong cost those that do: median times of scrapes, as ratios.

300 clients that connect to the TLS port and say nothing, against none of them, in turns; and a
user's password, remembered and hashed anew.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import trustme

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import expexp

SILENT = 300
ROUNDS = 6
SCRAPES = 60
PASSWORD = b"correct horse"


def write_files(folder: Path) -> ssl.SSLContext:
    """Write configuration and certificates. Return what a client needs to get in over TLS."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    server.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = authority.issue_cert("prometheus.example.org")
    with client.private_key_and_cert_chain_pem.tempfile() as file:
        context.load_cert_chain(file)
    hashed = expexp.hash_password(expexp.load_bcrypt(), PASSWORD, "$2b$10$" + "." * 53)
    (folder / "a.prom").write_text("a 1\n" * 100)
    (folder / "expexp.yaml").write_text("modules: {a: {method: file, file: {path: a.prom}}}\n")
    (folder / "web.yaml").write_text(f"""\
tls_server_config: {{
  cert_file: server.pem, key_file: server.pem,
  client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem }}
basic_auth_users: {{ prometheus: "{(hashed or b"").decode()}" }}
""")
    for name in ("server.pem", "web.yaml"):
        os.chmod(folder / name, 0o600)
    return context


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """Yield the port of an expexp with TLS and a user."""
    flags = ["-web.listen-address=127.0.0.1:0", "-web.config.file=web.yaml", "-log.level=info"]
    command = [sys.executable, expexp.__file__, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stderr
        found = re.search(r"listening on https://\S+:(\d+)", process.stderr.readline())
        assert found
        os.set_blocking(process.stderr.fileno(), False)
        try:
            yield int(found[1])
        finally:
            process.kill()


def scrape(port: int, context: ssl.SSLContext) -> float:
    """Seconds that one scrape takes, handshake and password included."""
    started = time.perf_counter()
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    with contextlib.closing(connection):
        pair = base64.b64encode(b"prometheus:" + PASSWORD).decode()
        connection.request("GET", "/proxy?module=a", headers={"Authorization": f"Basic {pair}"})
        response = connection.getresponse()
        assert response.read().startswith(b"a 1\n")
    return time.perf_counter() - started


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as cleanup:
        folder = Path(name)
        context = write_files(folder)
        port = cleanup.enter_context(serving(folder))
        first = scrape(port, context)
        alone: list[float] = []
        beside: list[float] = []
        for _ in range(ROUNDS):
            alone += (scrape(port, context) for _ in range(SCRAPES))
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(SILENT)]
            beside += (scrape(port, context) for _ in range(SCRAPES))
            for connection in silent:
                connection.close()
        usual, crowded = statistics.median(alone), statistics.median(beside)
        print(f"a scrape over mutual TLS with a remembered password  {usual * 1000:7.2f} ms")
        print(f"the same beside {SILENT} silent TLS clients              {crowded * 1000:7.2f} ms")
        print(f"ratio (at most 1.20)                                 {crowded / usual:7.2f}")
        print(f"the first scrape, which pays for bcrypt of cost 10   {first * 1000:7.2f} ms")
        return int(crowded / usual > 1.2)


if __name__ == "__main__":
    sys.exit(main())
